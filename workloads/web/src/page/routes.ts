// The page's addresses: everything lives behind `#`, so that one file serves them all. Pure.

export type Route =
  | { view: "gallery" }
  | { view: "launch"; app: string }
  | { view: "join"; session: string };

/** Characters that session ids are made of (gateway-api section 4). */
const SESSION = /^[a-zA-Z0-9\-_:]+$/;

/** What `location.hash` asks for; anything unknown is the gallery. */
export function parseRoute(hash: string): Route {
  const [, view, argument] = /^#\/(app|session)\/([^/]+)$/.exec(hash) ?? [];
  if (view === undefined || argument === undefined) return { view: "gallery" };
  let name: string;
  try {
    name = decodeURIComponent(argument);
  } catch {
    return { view: "gallery" };
  }
  if (view === "app") return { view: "launch", app: name };
  return SESSION.test(name) ? { view: "join", session: name } : { view: "gallery" };
}

export const routes = {
  gallery: "#/",
  launch: (app: string): string => `#/app/${encodeURIComponent(app)}`,
  join: (session: string): string => `#/session/${encodeURIComponent(session)}`,
};

/** The one-time code in `#code=…`, as the command line prints it. */
export function loginCode(hash: string): string | undefined {
  const code = new URLSearchParams(hash.replace(/^#/, "")).get("code");
  return code === null || code === "" ? undefined : code;
}
