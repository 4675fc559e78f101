// Signalling over the websocket (signaling sections 2 to 5, client side of version 2). The states are
// explicit and every one that waits has a deadline; what arrives in the wrong state is ignored or ends the
// attempt with words. Knows nothing of RTCPeerConnection: descriptions and candidates pass through as text.

import { Emitter } from "./emitter";
import { StreamError, type Step } from "./steps";

export type SignalState =
  /** The socket is being opened. */
  | "connecting"
  /** `discover` was sent; the instance may still be booting. */
  | "discovering"
  /** `settings` were sent. */
  | "awaiting-offer"
  /** The offer was handed out; our answer is being made. */
  | "answering"
  /** The answer was sent; candidates go both ways. */
  | "trickling"
  /** Over, by us or after a failure. */
  | "closed";

/** What the instance is told about this client. */
export interface Settings {
  data_channels: string[];
  enable_speaker: boolean;
  enable_microphone: boolean;
  enable_video: boolean;
  enable_camera: boolean;
  device_type?: string;
  /** Of AV1, H264, VP8, VP9, the most wanted first. */
  preferred_decoder_codecs?: string[];
}

export interface Candidate {
  candidate: string;
  sdpMid?: string | null;
  sdpMLineIndex?: number | null;
}

/** The part of WebSocket that is used here, so that tests can bring their own. */
export interface SocketLike {
  onopen: ((event: never) => void) | null;
  onmessage: ((event: { data: unknown }) => void) | null;
  onerror: ((event: never) => void) | null;
  onclose: ((event: { code: number; reason: string }) => void) | null;
  send(text: string): void;
  close(code?: number): void;
}

export interface Discovered {
  maxApiVersion: number;
  fps: number | undefined;
  capabilities: string[];
}

export interface SignalEvents {
  state: SignalState;
  discovered: Discovered;
  /** The SDP of the instance's offer. */
  offer: string;
  candidate: Candidate;
  /** The end; no event follows. */
  error: StreamError;
}

export interface Deadlines {
  socket: number;
  discover: number;
  offer: number;
}

/** An instance may have to boot first, which is why `discover` may take as long as the original allows. */
const DEADLINES: Deadlines = { socket: 15_000, discover: 300_000, offer: 60_000 };

const API_VERSION = 2;

/** The step that a failure in this state belongs to. */
const STEP_OF: Record<SignalState, Step> = {
  connecting: "socket",
  discovering: "discover",
  "awaiting-offer": "offer",
  answering: "offer",
  trickling: "ice",
  closed: "ice",
};

/** `ws:`/`wss:` of a URL given in any of the four schemes; browsers before 2024 take no other. */
export function socketUrl(url: string): string {
  return url.replace(/^http(s?):/i, "ws$1:");
}

export class Signal extends Emitter<SignalEvents> {
  #state: SignalState = "connecting";
  readonly #socket: SocketLike;
  readonly #settings: Settings;
  readonly #deadlines: Deadlines;
  #timer: ReturnType<typeof setTimeout> | undefined;
  /** Local candidates made before the answer went out; the instance expects the answer first. */
  #early: Candidate[] = [];

  constructor(
    url: string,
    settings: Settings,
    options: { createSocket?: (url: string) => SocketLike; deadlines?: Partial<Deadlines> } = {},
  ) {
    super();
    this.#settings = settings;
    this.#deadlines = { ...DEADLINES, ...options.deadlines };
    const create = options.createSocket ?? ((address: string) => new WebSocket(address) as SocketLike);
    this.#socket = create(socketUrl(url));
    this.#socket.onopen = () => this.#opened();
    this.#socket.onmessage = (event) => this.#received(event.data);
    // An error event carries no reason and a close event always follows.
    this.#socket.onerror = null;
    this.#socket.onclose = (event) => this.#dropped(event.code, event.reason);
    this.#await(this.#deadlines.socket, "it did not open");
  }

  get state(): SignalState {
    return this.#state;
  }

  /** Sends our answer to the offer. */
  answer(sdp: string): void {
    if (this.#state !== "answering") return;
    this.#send({ type: "answer", sdp: btoa(sdp) });
    this.#enter("trickling");
    for (const candidate of this.#early.splice(0)) this.candidate(candidate);
  }

  /** Sends a local candidate; one that comes before the answer waits for it. */
  candidate(candidate: Candidate): void {
    if (this.#state === "closed" || candidate.candidate === "") return;
    if (this.#state !== "trickling") {
      this.#early.push(candidate);
      return;
    }
    const { candidate: line, sdpMid, sdpMLineIndex } = candidate;
    this.#send({ type: "candidate", candidate: btoa(line), sdpMid: sdpMid ?? "", sdpMLineIndex: sdpMLineIndex ?? 0 });
  }

  /** Ends signalling; nothing is reported after this. */
  close(): void {
    if (this.#state === "closed") return;
    this.#enter("closed");
    this.#socket.close(1000);
  }

  #opened(): void {
    if (this.#state !== "connecting") return;
    this.#enter("discovering");
    this.#send({ type: "discover" });
    this.#await(this.#deadlines.discover, "nothing answered");
  }

  #received(data: unknown): void {
    if (this.#state === "closed") return;
    if (typeof data !== "string") return; // No binary frames in this protocol.
    let message: Record<string, unknown>;
    try {
      const parsed: unknown = JSON.parse(data);
      if (typeof parsed !== "object" || parsed === null) return;
      message = parsed as Record<string, unknown>;
    } catch {
      console.warn("fanlight: a signalling frame is not JSON and was ignored");
      return;
    }
    switch (message["type"]) {
      case "resp:discover":
        return this.#discovered(message);
      case "offer":
        return this.#offered(message);
      case "candidate":
        return this.#candidate(message);
      case "error": {
        const { code, message: text } = message;
        const words = typeof text === "string" && text !== "" ? text : "the instance reported an error without words";
        return this.#fail(words, typeof code === "number" ? code : undefined);
      }
      default:
        console.debug("fanlight: a signalling message of an unknown type was ignored", message["type"]);
    }
  }

  #discovered(message: Record<string, unknown>): void {
    if (this.#state !== "discovering") return; // A second answer must not make a second `settings`.
    const max = message["max_api_version"];
    if (typeof max === "number" && max < API_VERSION) {
      return this.#fail(`the instance speaks signalling version ${max} at most, this client speaks ${API_VERSION}`);
    }
    const { fps, capabilities } = message;
    const { preferred_decoder_codecs: codecs, device_type: device, ...settings } = this.#settings;
    this.#enter("awaiting-offer");
    this.#send({
      type: "settings",
      api_version: API_VERSION,
      ...settings,
      ...(device ? { device_type: device } : {}),
      ...(codecs && codecs.length > 0 ? { video: { preferred_decoder_codecs: codecs } } : {}),
    });
    this.#await(this.#deadlines.offer, "the instance made no offer");
    this.emit("discovered", {
      maxApiVersion: typeof max === "number" ? max : API_VERSION,
      fps: typeof fps === "number" && fps > 0 ? fps : undefined,
      capabilities: Array.isArray(capabilities) ? capabilities.filter((name) => typeof name === "string") : [],
    });
  }

  #offered(message: Record<string, unknown>): void {
    if (this.#state !== "awaiting-offer") return; // There is only one offer; later ones cannot be honoured.
    const sdp = decode(message["sdp"]);
    if (sdp === undefined) return this.#fail("the instance's offer is not base64");
    this.#enter("answering");
    this.emit("offer", sdp);
  }

  #candidate(message: Record<string, unknown>): void {
    const line = decode(message["candidate"]);
    const { sdpMid, sdpMLineIndex } = message;
    if (line === undefined) {
      console.warn("fanlight: a candidate is not base64 and was ignored");
      return;
    }
    this.emit("candidate", {
      candidate: line,
      sdpMid: typeof sdpMid === "string" ? sdpMid : null,
      sdpMLineIndex: typeof sdpMLineIndex === "number" ? sdpMLineIndex : null,
    });
  }

  #dropped(code: number, reason: string): void {
    if (this.#state === "closed") return;
    // Everything that the path needs may be said already; whether it works is for ICE to tell.
    if (this.#state === "trickling") return this.#enter("closed");
    const why = reason === "" ? "" : `: ${reason}`;
    this.#fail(
      this.#state === "connecting"
        ? `the gateway refused or dropped it (code ${code}${why})`
        : `the gateway closed the signalling socket (code ${code}${why})`,
    );
  }

  #fail(message: string, code?: number): void {
    const step = STEP_OF[this.#state];
    this.#enter("closed");
    this.#socket.close();
    this.emit("error", new StreamError(step, message, code));
  }

  #enter(state: SignalState): void {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    this.#state = state;
    this.emit("state", state);
  }

  #await(ms: number, what: string): void {
    this.#timer = setTimeout(() => this.#fail(`${what} within ${ms / 1000} seconds`), ms);
  }

  #send(message: object): void {
    this.#socket.send(JSON.stringify(message));
  }
}

/** Text of a base64 string, or nothing. */
function decode(value: unknown): string | undefined {
  if (typeof value !== "string" || value === "") return undefined;
  try {
    return atob(value);
  } catch {
    return undefined;
  }
}
