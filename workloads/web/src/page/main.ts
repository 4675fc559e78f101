// The page's entrance: logs in, then shows the view that the address asks for.

import { ApiError } from "../api";
import { FanlightClient } from "../client";
import type { Stream } from "../stream";
import { openCheck } from "./check";
import { preferredDisplay, screenFor } from "./displays";
import { type View, h } from "./dom";
import { gallery, titleOf } from "./gallery";
import { login, wordsFor } from "./login";
import { player } from "./player";
import { type Route, loginCode, parseRoute, routes } from "./routes";

const client = new FanlightClient();
const root = document.getElementById("app") ?? document.body;
let view: View | undefined;
/** The route on show; the address of a launched session changes without a new view. */
let shownHash = "";

/** What tests and curious people look at. No secrets: the page has none. */
const live = {
  client,
  stream: undefined as Stream | undefined,
  get state() {
    return this.stream?.state ?? "idle";
  },
  get sessionId() {
    return this.stream?.sessionId;
  },
  /** Steps with milliseconds since the click. */
  get steps() {
    return this.stream?.steps ?? [];
  },
  get stats() {
    return this.stream?.stats;
  },
  get error() {
    const error = this.stream?.error;
    return error && { step: error.step, message: error.message, sentence: error.sentence, code: error.code };
  },
};
declare global {
  interface Window {
    fanlight: typeof live;
  }
}
window.fanlight = live;

function show(next: View): void {
  view?.dispose();
  view = next;
  document.title = next.title;
  root.replaceChildren(next.element);
}

function showLogin(why?: string): void {
  show(login(client, why, () => void open()));
}

const expired = () => showLogin("You are not logged in any more.");

function showRoute(route: Route): void {
  live.stream = undefined;
  if (route.view === "gallery") return show(gallery(client, expired));
  const title = route.view === "launch" ? titleOf({ name: route.app }) : "Session";
  show(
    player({
      title,
      betterTitle: () => titleFor(route),
      open: (options) =>
        route.view === "launch"
          ? client.launch(route.app, { ...options, screen: requestedScreen() })
          : client.join(route.session, options),
      rejoin: (id, options) => client.join(id, options),
      onSession: (id) => {
        // Reloading the page then comes back to this session and does not launch another.
        shownHash = routes.join(id);
        history.replaceState(null, "", shownHash);
      },
      onStream: (stream) => (live.stream = stream),
      onUnauthorized: expired,
      onCheck: () => openCheck(client),
    }),
  );
}

/** The title of the application as the gallery shows it; nothing when it cannot be found out. */
async function titleFor(route: Route): Promise<string | undefined> {
  try {
    const name =
      route.view === "launch" ? route.app : route.view === "join" ? (await client.api.session(route.session)).app : "";
    const application = (await client.applications()).find((known) => known.name === name);
    return titleOf(application ?? { name });
  } catch {
    return undefined; // The stream itself will say what is wrong.
  }
}

function requestedScreen() {
  // The bar takes its part of the window.
  const { innerWidth: width, innerHeight: height, devicePixelRatio: ratio } = window;
  return screenFor(preferredDisplay(), { width, height: height - 48, ratio });
}

/** Logs in when the address carries a code, checks the cookie otherwise, and shows the route. */
async function open(): Promise<void> {
  const code = loginCode(location.hash);
  if (code !== undefined) {
    // The code leaves the address before anything else: it must not stay in the history, even when it fails.
    history.replaceState(null, "", routes.gallery);
    try {
      await client.api.login(code);
    } catch (error) {
      // Opening the same address twice is common, and the cookie of the first time may still be good.
      if (!(await client.api.loggedIn().catch(() => false))) return showLogin(wordsFor(error));
    }
  } else {
    try {
      if (!(await client.api.loggedIn())) return showLogin();
    } catch (error) {
      // A gateway without this address, or one that is away for a moment: the view itself will tell.
      if (!(error instanceof ApiError)) throw error;
    }
  }
  shownHash = location.hash;
  showRoute(parseRoute(location.hash));
}

window.addEventListener("hashchange", () => {
  if (location.hash === shownHash) return;
  void open();
});

root.replaceChildren(h("p", { class: "notice" }, "Opening…"));
void open();
