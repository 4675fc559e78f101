// The gateway's REST API as the client needs it (gateway-api sections 3 to 6): envelopes are unwrapped,
// failures become an `ApiError` with words a person understands. Knows nothing of sockets and media.

export interface Application {
  name: string;
  /** Our additions; absent on other servers. */
  title?: string;
  description?: string;
  /** A `data:` URL. */
  icon?: string;
}

export type SessionStatus = "created" | "active" | "error" | "terminating" | "terminated";

export interface Session {
  id: string;
  app: string;
  region: string;
  cluster_id: string;
  container_id: string;
  joinable: boolean;
  status: SessionStatus;
  status_message: string;
}

/** Every member is optional; the gateway has defaults (1280×720, 60 per second). */
export interface Screen {
  width?: number;
  height?: number;
  fps?: number;
  density?: number;
}

export interface StunServer {
  urls: string[];
  username?: string;
  password?: string;
}

/** A region with at least one live agent. */
export interface Region {
  name: string;
  /** Our additions. STUN URLs by which the way there may be measured. */
  stun_servers?: string[];
  location?: { latitude: number; longitude: number };
}

export type CheckStatus = "ok" | "skipped" | "warning" | "failed";

/** One step of a diagnosis. */
export interface Check {
  /** Stable name, e.g. `agents`. */
  step: string;
  status: CheckStatus;
  /** What was seen. */
  text: string;
  /** What to do about it; absent or empty when there is nothing to do. */
  advice?: string;
}

/** What the gateway sees of the path that a stream takes. */
export interface Diagnosis {
  /** The gateway's clock, Unix milliseconds. */
  time_ms: number;
  checks: Check[];
  /** ICE servers per region, with short-lived credentials to try them. */
  stun_servers: Record<string, StunServer[]>;
}

/** What create and join answer: where to signal, and the ICE servers for it. */
export interface Invitation {
  id: string;
  url: string;
  stun_servers: StunServer[];
}

export interface CreateOptions {
  app: string;
  app_version?: number;
  region?: string;
  screen?: Screen;
  joinable?: boolean;
  /** Minutes without a client before the session ends; 0 is never. */
  idle_time_min?: number;
  ephemeral?: boolean;
  extra_data?: unknown;
  /** Milliseconds to each region, by name, as measured to its STUN servers. */
  round_trips?: Record<string, number>;
}

/** A request that failed. `status` is the HTTP status, 0 when no answer came. */
export class ApiError extends Error {
  readonly status: number;
  /** Stable name of the failure, e.g. `session-not-found`, when the server gave one. */
  readonly code: string | undefined;
  /** Find the log line by this. */
  readonly requestId: string | undefined;

  constructor(message: string, status: number, code?: string, requestId?: string) {
    super(message);
    this.name = "ApiError";
    this.status = status;
    this.code = code;
    this.requestId = requestId;
  }

  /** The browser is not logged in. */
  get unauthorized(): boolean {
    return this.status === 401;
  }
}

export interface ApiOptions {
  /** Where the gateway is, e.g. `https://gateway.example:4000`; default: where the page comes from. */
  baseUrl?: string;
  /**
   * API token, for callers that are not a page (a backend, a test). Pages use the cookie instead: a token
   * in a page is in the hands of everybody who opens it.
   */
  token?: string;
  fetch?: typeof fetch;
  /** Milliseconds before a request is given up; default 20,000. */
  timeoutMs?: number;
}

interface Envelope {
  type?: unknown;
  status?: unknown;
  status_code?: unknown;
  error?: unknown;
  metadata?: unknown;
}

const isObject = (value: unknown): value is Record<string, unknown> =>
  typeof value === "object" && value !== null && !Array.isArray(value);

/** Words for answers without an envelope, e.g. from a proxy in between. */
function wordsForStatus(status: number): string {
  switch (status) {
    case 401:
      return "not logged in";
    case 403:
      return "this account may not do that";
    case 404:
      return "not found";
    case 429:
      return "too many requests at once; wait a moment";
    case 502:
    case 503:
    case 504:
      return "the gateway is not ready; it may still be starting";
    default:
      return `the gateway answered with HTTP status ${status}`;
  }
}

/** Takes an answer apart: its `metadata`, or an `ApiError`. `body` is the text of the answer. */
export function openEnvelope(httpStatus: number, body: string): unknown {
  let envelope: Envelope | undefined;
  try {
    const parsed: unknown = JSON.parse(body);
    if (isObject(parsed)) envelope = parsed;
  } catch {
    // Not JSON: a proxy's page or an empty body. The status alone has to speak.
  }
  const ok = httpStatus >= 200 && httpStatus < 300;
  if (ok && envelope?.status === "success") return envelope.metadata;
  const detail = isObject(envelope?.metadata) ? envelope.metadata : {};
  const text = typeof envelope?.error === "string" && envelope.error !== "" ? envelope.error : undefined;
  throw new ApiError(
    text ?? (ok ? "the answer is not what a Fanlight gateway sends" : wordsForStatus(httpStatus)),
    httpStatus,
    typeof detail["code"] === "string" ? detail["code"] : undefined,
    typeof detail["request_id"] === "string" ? detail["request_id"] : undefined,
  );
}

/** Checks what create and join answered; a wrong shape would otherwise fail much later and without words. */
export function readInvitation(metadata: unknown, id?: string): Invitation {
  if (!isObject(metadata)) throw new ApiError("the gateway's answer has no metadata", 0);
  const { url, stun_servers: servers } = metadata;
  if (typeof url !== "string" || url === "") throw new ApiError("the gateway gave no address for signalling", 0);
  const session = typeof metadata["id"] === "string" ? metadata["id"] : id;
  if (session === undefined) throw new ApiError("the gateway gave no session id", 0);
  return { id: session, url, stun_servers: Array.isArray(servers) ? (servers as StunServer[]) : [] };
}

export class Api {
  readonly #base: string;
  readonly #token: string | undefined;
  readonly #fetch: typeof fetch;
  readonly #timeoutMs: number;

  constructor(options: ApiOptions = {}) {
    this.#base = (options.baseUrl ?? "").replace(/\/+$/, "");
    this.#token = options.token;
    this.#fetch = options.fetch ?? globalThis.fetch.bind(globalThis);
    this.#timeoutMs = options.timeoutMs ?? 20_000;
  }

  /** One request; resolves with the answer's `metadata`. @throws ApiError */
  async request(method: string, path: string, body?: unknown): Promise<unknown> {
    const headers: Record<string, string> = { Accept: "application/json" };
    if (body !== undefined) headers["Content-Type"] = "application/json";
    if (this.#token !== undefined) headers["Authorization"] = `macaroon root=${this.#token}`;
    let status: number;
    let text: string;
    try {
      const response = await this.#fetch(this.#base + path, {
        method,
        headers,
        credentials: "same-origin",
        cache: "no-store",
        signal: AbortSignal.timeout(this.#timeoutMs),
        ...(body === undefined ? {} : { body: JSON.stringify(body) }),
      });
      status = response.status;
      text = await response.text();
    } catch (cause) {
      const late = cause instanceof DOMException && cause.name === "TimeoutError";
      throw new ApiError(
        late
          ? `the gateway did not answer within ${this.#timeoutMs / 1000} seconds`
          : "the gateway cannot be reached; is Fanlight running?",
        0,
      );
    }
    return openEnvelope(status, text);
  }

  async #list<T>(path: string): Promise<T[]> {
    const metadata = await this.request("GET", path);
    return Array.isArray(metadata) ? (metadata as T[]) : [];
  }

  applications(): Promise<Application[]> {
    return this.#list<Application>("/1.0/applications");
  }

  regions(): Promise<Region[]> {
    return this.#list<Region>("/1.0/regions?recursion=true");
  }

  /** What the gateway sees of the path that a stream takes. */
  async doctor(): Promise<Diagnosis> {
    const metadata = await this.request("GET", "/1.0/doctor");
    const { time_ms: time, checks, stun_servers: servers } = isObject(metadata) ? metadata : {};
    if (typeof time !== "number" || !Array.isArray(checks)) {
      throw new ApiError("the answer is not what a Fanlight gateway sends", 0);
    }
    return {
      time_ms: time,
      checks: checks as Check[],
      stun_servers: isObject(servers) ? (servers as Diagnosis["stun_servers"]) : {},
    };
  }

  sessions(): Promise<Session[]> {
    return this.#list<Session>("/1.0/sessions?recursion=true");
  }

  async session(id: string): Promise<Session> {
    return (await this.request("GET", `/1.0/sessions/${encodeURIComponent(id)}`)) as Session;
  }

  async create(options: CreateOptions): Promise<Invitation> {
    return readInvitation(await this.request("POST", "/1.0/sessions", options));
  }

  async join(id: string, screen?: Screen): Promise<Invitation> {
    const body = screen === undefined ? {} : { screen };
    return readInvitation(await this.request("POST", `/1.0/sessions/${encodeURIComponent(id)}/join`, body), id);
  }

  /** Ends the session. Ending one that is already gone is a success. */
  async delete(id: string): Promise<void> {
    try {
      await this.request("DELETE", `/1.0/sessions/${encodeURIComponent(id)}`);
    } catch (error) {
      if (!(error instanceof ApiError && error.status === 404)) throw error;
    }
  }

  /** Exchanges the one-time code for the page's cookie. */
  async login(code: string): Promise<void> {
    await this.request("POST", "/ui/login", { code });
  }

  /** Whether the page's cookie is good. */
  async loggedIn(): Promise<boolean> {
    try {
      await this.request("GET", "/ui/session");
      return true;
    } catch (error) {
      if (error instanceof ApiError && (error.status === 401 || error.status === 403)) return false;
      throw error;
    }
  }
}
