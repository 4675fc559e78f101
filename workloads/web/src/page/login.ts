// What people see who are not logged in: where codes come from, and a place for one.

import { ApiError } from "../api";
import type { FanlightClient } from "../client";
import { type View, h } from "./dom";

export function login(client: FanlightClient, why: string | undefined, onDone: () => void): View {
  const input = h("input", { id: "code", type: "text", autocomplete: "off", spellcheck: false, required: true });
  const problem = h("p", { class: "problem", role: "alert", hidden: why === undefined }, why ?? "");
  const submit = h("button", { class: "button primary", type: "submit" }, "Open");
  const form = h("form", { class: "login-form" }, h("label", { htmlFor: "code" }, "One-time code"), input, submit);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    submit.disabled = true;
    try {
      // People paste the whole address as well as the code alone.
      await client.api.login(input.value.trim().replace(/^.*#code=/, ""));
      onDone();
    } catch (error) {
      problem.hidden = false;
      problem.textContent = wordsFor(error);
      input.select();
    } finally {
      submit.disabled = false;
    }
  });
  return {
    element: h(
      "main",
      { class: "login" },
      h("h1", {}, "Not logged in"),
      problem,
      h("p", {}, "This page opens with a one-time code. On the machine where Fanlight runs, get one with"),
      h("p", {}, h("code", {}, "fanlight code"), " or, from a checkout, ", h("code", {}, "./dev code")),
      h("p", {}, "and open the address that it prints, or put the code here:"),
      form,
    ),
    title: "Log in – Fanlight",
    dispose() {},
  };
}

/** Why a code was not taken. */
export function wordsFor(error: unknown): string {
  if (error instanceof ApiError && (error.unauthorized || error.status === 403)) {
    return "This code is not valid any more. Each code works once and for a short time.";
  }
  return error instanceof Error ? error.message : String(error);
}
