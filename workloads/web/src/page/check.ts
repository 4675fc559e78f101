// The connection check: a dialog that walks the path of a stream and says in words which step is broken.

import type { Check, CheckStatus } from "../api";
import { checkConnection } from "../check";
import type { FanlightClient } from "../client";
import { button, h } from "./dom";

const STATUS_WORDS: Record<CheckStatus, string> = {
  ok: "as it should be",
  skipped: "not looked at",
  warning: "not as it should be",
  failed: "broken",
};

/** What the checks come to, in one sentence. */
export function summary(checks: readonly Check[]): string {
  const broken = checks.find(({ status }) => status === "failed");
  if (broken) return `A stream does not get past the step “${broken.step}”.`;
  const warnings = checks.filter(({ status }) => status === "warning").length;
  if (warnings === 0) return "Nothing is wrong on the way of a stream.";
  return `Streams work, but ${warnings === 1 ? "one thing is" : `${warnings} things are`} not as it should be.`;
}

/** The worst of them, for the colour of the summary. */
const worst = (checks: readonly Check[]): CheckStatus =>
  (["failed", "warning"] as const).find((status) => checks.some((check) => check.status === status)) ?? "ok";

/** Opens the dialog over the page; it checks at once. */
export function openCheck(client: FanlightClient): void {
  const result = h("p", { class: "check-result", role: "status", data: { state: "working" } });
  // It scrolls, and keys can do that only where it takes the focus.
  const list = h("ul", { class: "checks", tabIndex: 0, aria: { label: "Steps" } });
  const again = button("Check again", "button", () => run());
  const close = button("Close", "button primary", () => dialog.close());
  const dialog = h(
    "dialog",
    { class: "check", aria: { labelledby: "check-title" } },
    h("h2", { id: "check-title" }, "Connection check"),
    result,
    list,
    h("div", { class: "actions" }, close, again),
  );

  const show = (checks: readonly Check[]) => {
    list.replaceChildren(
      ...checks.map(({ step, status, text, advice }) =>
        h(
          "li",
          { class: status, data: { step, status } },
          // The mark is drawn by the style sheet; who listens gets words.
          h("strong", {}, step, h("span", { class: "unseen" }, `, ${STATUS_WORDS[status] ?? status}`)),
          h("span", {}, text),
          advice ? h("span", { class: "advice" }, advice) : undefined,
        ),
      ),
    );
  };

  async function run(): Promise<void> {
    result.dataset["state"] = "working";
    result.textContent = "Looking at each step…";
    const checks = await checkConnection(client.api, { onProgress: (known) => dialog.open && show(known) });
    if (!dialog.open) return;
    show(checks);
    result.dataset["state"] = worst(checks);
    result.textContent = summary(checks);
    list.querySelector(".failed")?.scrollIntoView({ block: "center" });
  }

  const gone = new AbortController();
  dialog.addEventListener("close", () => {
    gone.abort();
    dialog.remove();
  });
  // It belongs to the page that it was opened from.
  window.addEventListener("hashchange", () => dialog.close(), { signal: gone.signal });
  // A click beside the dialog closes it, as people expect of what lies over a page.
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  document.body.append(dialog);
  dialog.showModal();
  close.focus();
  again.click();
}
