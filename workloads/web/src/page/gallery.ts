// The first page: applications to launch and running sessions to come back to.

import { ApiError, type Application, type Session } from "../api";
import type { FanlightClient } from "../client";
import { openCheck } from "./check";
import { DISPLAYS, preferredDisplay, rememberDisplay } from "./displays";
import { type View, button, h } from "./dom";
import { routes } from "./routes";

const REFRESH_MS = 4_000;

/** Turns a name such as `moving-scene` into a heading for applications without a title. */
export function titleOf(application: Pick<Application, "name" | "title">): string {
  if (application.title) return application.title;
  const words = application.name.replace(/[-_]+/g, " ").trim();
  return words.charAt(0).toUpperCase() + words.slice(1);
}

const STATUS_WORDS: Record<Session["status"], string> = {
  created: "starting",
  active: "running",
  error: "failed",
  terminating: "ending",
  terminated: "ended",
};

export function gallery(client: FanlightClient, onUnauthorized: () => void): View {
  const cards = h("ul", { class: "cards" });
  const sessions = h("ul", { class: "sessions" });
  const sessionsSection = h(
    "section",
    { hidden: true, aria: { labelledby: "sessions-title" } },
    h("h2", { id: "sessions-title" }, "Running sessions"),
    sessions,
  );
  const notice = h("p", { class: "notice", role: "status", hidden: true });
  const display = h("select", { id: "display" });
  for (const [name, title] of DISPLAYS) display.append(h("option", { value: name }, title));
  display.value = preferredDisplay();
  display.addEventListener("change", () => rememberDisplay(display.value));

  const element = h(
    "div",
    { class: "gallery" },
    h(
      "header",
      { class: "masthead" },
      h("div", { class: "brand" }, h("img", { src: `${import.meta.env.BASE_URL}favicon.svg`, alt: "", width: 36, height: 36 }), h("h1", {}, "Fanlight")),
      h(
        "div",
        { class: "masthead-tools" },
        button("Connection check", "button quiet", () => openCheck(client), "Look at each step on the way of a stream"),
        h("label", { class: "field" }, h("span", {}, "Display"), display),
      ),
    ),
    h(
      "main",
      {},
      notice,
      h("section", { aria: { labelledby: "applications-title" } }, h("h2", { id: "applications-title" }, "Applications"), cards),
      sessionsSection,
    ),
  );

  let shown = "";
  let titles = new Map<string, string>();
  let stopped = false;
  let timer: ReturnType<typeof setTimeout> | undefined;

  const say = (text: string | undefined) => {
    notice.hidden = text === undefined;
    notice.textContent = text ?? "";
  };

  const refresh = async (): Promise<void> => {
    clearTimeout(timer);
    try {
      const [applications, running] = await Promise.all([client.applications(), client.sessions()]);
      if (stopped) return;
      // Lists are only built anew when they changed, so that focus and hover stay where they are.
      const now = JSON.stringify([applications, running]);
      if (now !== shown) {
        shown = now;
        titles = new Map(applications.map((application) => [application.name, titleOf(application)]));
        cards.replaceChildren(...applications.map(card));
        const alive = running.filter(({ status }) => status !== "terminated" && status !== "terminating");
        sessions.replaceChildren(...alive.map(sessionRow));
        sessionsSection.hidden = alive.length === 0;
      }
      say(applications.length === 0 ? "There are no applications yet. They appear here as soon as one is published." : undefined);
    } catch (error) {
      if (stopped) return;
      if (error instanceof ApiError && error.unauthorized) return onUnauthorized();
      say(`The list could not be fetched: ${error instanceof Error ? error.message : String(error)}. Trying again…`);
    }
    if (!stopped) timer = setTimeout(() => void refresh(), REFRESH_MS);
  };

  const card = (application: Application): HTMLElement => {
    const title = titleOf(application);
    return h(
      "li",
      { class: "card", data: { app: application.name } },
      picture(application, title),
      h("div", { class: "card-text" }, h("h3", {}, title), h("p", {}, application.description || application.name)),
      h("a", { class: "button primary", href: routes.launch(application.name), aria: { label: `Launch ${title}` } }, "Launch"),
    );
  };

  const sessionRow = (session: Session): HTMLElement => {
    const title = titles.get(session.app) ?? titleOf({ name: session.app });
    const failed = session.status === "error";
    return h(
      "li",
      { class: "session", data: { session: session.id, status: session.status } },
      h(
        "div",
        { class: "session-text" },
        h("strong", {}, title),
        h("span", { class: `badge ${session.status}` }, STATUS_WORDS[session.status] ?? session.status),
        session.status_message ? h("span", { class: "detail" }, session.status_message) : undefined,
        h("code", { class: "detail" }, session.id),
      ),
      failed
        ? undefined
        : h("a", { class: "button", href: routes.join(session.id), aria: { label: `Join ${title}` } }, "Join"),
      button(
        failed ? "Remove" : "Stop",
        "button quiet",
        async () => {
          try {
            await client.stop(session.id);
          } catch (error) {
            say(`The session could not be stopped: ${error instanceof Error ? error.message : String(error)}`);
            return;
          }
          await refresh();
        },
        `${failed ? "Remove" : "Stop"} ${title}`,
      ),
    );
  };

  void refresh();
  // Where there are several regions, a launch is quicker when the way to them is known by then.
  void client.roundTrips();
  return {
    element,
    title: "Fanlight",
    dispose() {
      stopped = true;
      clearTimeout(timer);
    },
  };
}

/** The application's icon, or its first letter when there is none or the browser may not show it. */
function picture(application: Application, title: string): HTMLElement {
  const letter = h("span", { class: "icon letter", aria: { hidden: "true" } }, title.charAt(0));
  letter.dataset["hue"] = String([...application.name].reduce((sum, character) => sum + character.charCodeAt(0), 0) % 6);
  if (!application.icon?.startsWith("data:image/")) return letter;
  const image = h("img", { class: "icon", src: application.icon, alt: "", width: 56, height: 56 });
  image.addEventListener("error", () => image.replaceWith(letter));
  return image;
}
