// One stream: a session seen and driven in this page. Ties signalling, transport, input and figures together,
// keeps the time of every step, and comes back by itself when the connection breaks. Knows nothing of how the
// page looks; a page listens to events.

import { ApiError, type Invitation, type Session, type StunServer } from "./api";
import { Emitter } from "./emitter";
import { watchFrames } from "./frames";
import { Input } from "./input/input";
import { Phase, watchRefresh } from "./phase";
import { Signal } from "./signal";
import { type HostStats, type Stats, StatsCollector, readHostStats } from "./stats";
import { type Step, StreamError, type StepTime, nextStep } from "./steps";
import { CONTROL, EXTENSION, Transport } from "./transport";

export type StreamState =
  | "idle"
  /** On the way through the steps. */
  | "connecting"
  /** Connected; input works. */
  | "live"
  /** The connection broke; joining again. */
  | "reconnecting"
  | "ended"
  /** Given up; `error` says at which step and why. */
  | "failed";

export type EndReason =
  /** We left; the session may go on. */
  | "left"
  /** We ended the session. */
  | "stopped"
  /** Another client took the stream over, or the instance cut this one; the session goes on. */
  | "replaced"
  /** The session is over. */
  | "session-ended";

export interface Ended {
  reason: EndReason;
  /** For people. */
  message: string;
}

/** How a stream gets at its session. The client library has one for the REST API; a page with a backend of its own brings another. */
export interface Connector {
  /** Creates or joins the session. */
  open(): Promise<Invitation>;
  /** Joins it again, after the connection broke. Without it a broken stream is not repaired. */
  rejoin?(id: string): Promise<Invitation>;
  /** What became of the session. */
  session?(id: string): Promise<Pick<Session, "status" | "status_message">>;
  /** Ends the session. */
  stop?(id: string): Promise<void>;
}

/** The application's cursor, as the instance describes it. */
export type Cursor =
  | { kind: "hidden" }
  | { kind: "named"; name: string }
  | {
      kind: "image";
      width: number;
      height: number;
      hotX: number;
      hotY: number;
      /** A PNG file, or raw RGBA rows. */
      data: { png: Uint8Array } | { rgba: Uint8ClampedArray };
    };

export interface StreamEvents {
  state: StreamState;
  step: StepTime;
  /** Connected and a first frame decoded: the stream can be used. */
  ready: void;
  /** Packets stopped (`false`) or flow again. */
  flowing: boolean;
  /** An attempt to come back begins; its number from 1. */
  reconnecting: { attempt: number; cause: string };
  error: StreamError;
  ended: Ended;
  stats: Stats;
  /** The browser does not play sound before the person did something; call `unmute` from a click. */
  "sound-blocked": boolean;
  cursor: Cursor;
  /** The application wants the pointer to itself (`true`) or gives it back. */
  "pointer-lock": boolean;
  /** A message that the application sends to its page (stream-protocol section 9). */
  message: { type: string; data: string };
}

export interface StreamOptions {
  video: HTMLVideoElement;
  /** Plays the sound; without it there is none. Apart from the video, so that neither waits for the other. */
  audio?: HTMLAudioElement;
  /** Takes keyboard, mouse and touch. It must be focusable, and the video must fill it with `object-fit: contain`. */
  surface?: HTMLElement;
  /** The instance's keyboard layout, as an xkb name. Default `us`. */
  layout?: string;
  /** Of AV1, H264, VP8, VP9, the most wanted first. Default: the instance chooses. */
  codecs?: string[];
  /** The page's own shortcuts, see `InputOptions`. */
  intercept?: (event: KeyboardEvent) => boolean;
  /** For tests. */
  iceTransportPolicy?: RTCIceTransportPolicy;
  iceServers?: StunServer[];
  /** Milliseconds from `dtls` to the first decoded frame. Default 30,000. */
  firstFrameMs?: number;
}

/** Pauses before the attempts to come back, in milliseconds; the last one repeats. */
const BACK_OFF_MS = [0, 500, 1_000, 2_000, 4_000, 8_000];
/** No more attempts after this long without success. */
const GIVE_UP_MS = 180_000;
/** How long a session may need to show that it ended, after its instance closed the stream. */
const SETTLE_MS = 2_000;

const STOPPED: Ended = { reason: "stopped", message: "You ended the session." };

const OVER: readonly string[] = ["error", "terminating", "terminated"];

/** Whether an error of the gateway will still be the same in a moment. */
const isFinal = (error: unknown): error is ApiError =>
  error instanceof ApiError && [400, 401, 403, 404, 410].includes(error.status);

export class Stream extends Emitter<StreamEvents> {
  readonly #connector: Connector;
  readonly #options: StreamOptions;
  #state: StreamState = "idle";
  #id: string | undefined;
  #startedAt = 0;
  #steps: StepTime[] = [];
  #error: StreamError | undefined;
  #stats: Stats | undefined;
  #layout: string;
  #wantsSound = true;
  /** The attempt in progress or alive; everything that arrives for an older one is dropped. */
  #attempt: Attempt | undefined;
  #wake: (() => void) | undefined;
  #stopping = false;
  readonly #page = new AbortController();

  constructor(connector: Connector, options: StreamOptions) {
    super();
    this.#connector = connector;
    this.#options = options;
    this.#layout = options.layout ?? "us";
  }

  get state(): StreamState {
    return this.#state;
  }
  get sessionId(): string | undefined {
    return this.#id;
  }
  /** Steps of the attempt in progress or of the last one. */
  get steps(): readonly StepTime[] {
    return this.#steps;
  }
  get error(): StreamError | undefined {
    return this.#error;
  }
  get stats(): Stats | undefined {
    return this.#stats;
  }
  /** The peer connection, for figures of the caller's own. */
  get peerConnection(): RTCPeerConnection | undefined {
    return this.#attempt?.transport.pc;
  }

  /** Begins. Resolves when connected or failed; listen to the events for the rest. */
  async connect(): Promise<void> {
    if (this.#state !== "idle") return;
    const { signal } = this.#page;
    // A page that goes away says so, else the instance would encode for nobody until ICE notices.
    window.addEventListener("pagehide", () => this.#sayGoodbye(), { signal });
    // A network that comes back is worth an attempt at once.
    window.addEventListener("online", () => this.#wake?.(), { signal });
    this.#enter("connecting");
    this.#begin();
    try {
      const invitation = await this.#connector.open();
      this.#id = invitation.id;
      if (this.#over()) return;
      await this.#try(invitation);
    } catch (error) {
      this.#fail(asStreamError(error, "created"));
    }
  }

  /** Leaves the stream; the session goes on when it is joinable. */
  leave(): void {
    this.#finish({ reason: "left", message: "You left the stream." });
  }

  /** Ends the session for good. @throws ApiError when the gateway refuses; the stream is then still on */
  async stop(): Promise<void> {
    // The instance may close the stream before the answer is here; that is still our doing.
    this.#stopping = true;
    try {
      if (this.#id !== undefined) await this.#connector.stop?.(this.#id);
    } catch (error) {
      this.#stopping = false;
      throw error;
    }
    this.#finish(STOPPED);
  }

  /** Sends a control message. False when there is no connection. */
  send(type: string, data?: object): boolean {
    const message = data === undefined ? { type } : { type, data };
    return this.#attempt?.transport.send(CONTROL, JSON.stringify(message)) ?? false;
  }

  /** Tells the instance which keyboard layout to use, an xkb name like `de`. */
  setLayout(layout: string): void {
    this.#layout = layout;
    if (this.#attempt?.input) this.#attempt.input.layout = layout;
    this.#extension({ type: "layout", layout });
  }

  get layout(): string {
    return this.#layout;
  }

  /** Plays the sound; call it from a click when `sound-blocked` was reported. */
  unmute(): void {
    this.#wantsSound = true;
    this.#playSound();
  }

  mute(): void {
    this.#wantsSound = false;
    this.#options.audio?.pause();
  }

  #over(): boolean {
    return this.#state === "ended" || this.#state === "failed";
  }

  #enter(state: StreamState): void {
    if (this.#state === state) return;
    this.#state = state;
    this.emit("state", state);
  }

  #begin(): void {
    this.#startedAt = performance.now();
    this.#steps = [];
  }

  #reach(step: Step): void {
    if (this.#steps.some((time) => time.step === step)) return;
    const time = { step, ms: Math.round((performance.now() - this.#startedAt) * 10) / 10 };
    this.#steps.push(time);
    this.emit("step", time);
  }

  #finish(ended: Ended): void {
    if (this.#over()) return;
    this.#sayGoodbye();
    this.#tearDown(100);
    this.#enter("ended");
    this.emit("ended", ended);
  }

  #fail(error: StreamError): void {
    if (this.#over()) return;
    this.#tearDown(0);
    this.#error = error;
    this.#enter("failed");
    this.emit("error", error);
  }

  #sayGoodbye(): void {
    this.#attempt?.input?.releaseAll();
    this.send("stream::disconnect", {});
  }

  /** `lingerMs`: time for the good-bye to leave before the connection closes. */
  #tearDown(lingerMs: number): void {
    this.#page.abort();
    this.#attempt?.dispose(lingerMs);
    this.#attempt = undefined;
    this.#wake?.();
    this.#options.video.srcObject = null;
    if (this.#options.audio) this.#options.audio.srcObject = null;
  }

  #drop(): void {
    this.#attempt?.dispose(0);
    this.#attempt = undefined;
  }

  #extension(message: object): boolean {
    return this.#attempt?.transport.send(EXTENSION, JSON.stringify(message)) ?? false;
  }

  /**
   * One attempt with one invitation. Resolves when keys are agreed (`live`) or the stream is over; what happens
   * later is handled by events. @throws StreamError
   */
  async #try(invitation: Invitation): Promise<void> {
    this.#reach("created");
    this.#attempt?.dispose(0);
    const { video, audio } = this.#options;
    const transport = new Transport({
      iceServers: this.#options.iceServers ?? invitation.stun_servers,
      ...(this.#options.iceTransportPolicy ? { iceTransportPolicy: this.#options.iceTransportPolicy } : {}),
    });
    const signal = new Signal(invitation.url, {
      data_channels: [EXTENSION],
      enable_speaker: audio !== undefined,
      enable_microphone: false,
      enable_video: true,
      enable_camera: false,
      ...(this.#options.codecs ? { preferred_decoder_codecs: this.#options.codecs } : {}),
    });
    const attempt = new Attempt(transport, signal);
    this.#attempt = attempt;
    const current = () => this.#attempt === attempt;

    await new Promise<void>((resolve, reject) => {
      attempt.onDispose(resolve);
      const broken = (error: StreamError) => {
        if (!current()) return;
        if (this.#state === "live") void this.#reconnect(error.sentence);
        else reject(error);
      };
      signal.on("state", (state) => {
        if (state !== "discovering" || !current()) return;
        this.#reach("socket");
        this.#watchBoot(attempt, reject);
      });
      signal.on("discovered", () => current() && this.#reach("discover"));
      signal.on("offer", async (sdp) => {
        try {
          signal.answer(await transport.answer(sdp));
          if (current()) this.#reach("offer");
        } catch (error) {
          broken(asStreamError(error, "offer"));
        }
      });
      signal.on("candidate", (candidate) => transport.addCandidate(candidate));
      // Once keys are agreed the stream no longer hangs on the socket.
      signal.on("error", (error) => this.#state !== "live" && broken(error));
      transport.on("candidate", (candidate) => signal.candidate(candidate));
      transport.on("ice", () => current() && this.#reach("ice"));
      transport.on("dtls", () => {
        if (!current()) return;
        this.#reach("dtls");
        this.#live(attempt);
        resolve();
      });
      transport.on("track", (track) => {
        if (!current()) return;
        if (track.kind === "video") {
          video.muted = true;
          video.srcObject = new MediaStream([track]);
          void video.play().catch(() => undefined);
        } else if (audio) {
          audio.srcObject = new MediaStream([track]);
          this.#playSound();
        }
      });
      transport.on("open", (label) => {
        if (label === EXTENSION && current()) this.#extensionOpened(attempt);
      });
      transport.on("message", ({ channel, text }) => current() && this.#received(attempt, channel, text));
      transport.on("flowing", (flowing) => current() && this.emit("flowing", flowing));
      transport.on("lost", broken);
      transport.on("aborted", (message) => {
        if (!current()) return;
        if (this.#state === "live") void this.#hostEnded();
        else reject(new StreamError(nextStep(this.#steps), message));
      });
      attempt.onDispose(
        watchFrames(video, {
          frame: (metadata, now) => {
            attempt.collector?.frame(metadata);
            const shown = attempt.phase.frame(now, metadata);
            if (shown && current()) this.#extension(shown);
          },
          decoded: () => {
            if (!current()) return;
            attempt.decoded = true;
            signal.close();
            this.emit("ready", undefined);
          },
          shown: () => {
            if (!current()) return;
            this.#reach("first-frame");
            attempt.firstFrameMs = performance.now() - this.#startedAt;
            this.#acknowledge(attempt);
          },
        }),
      );
    });
  }

  /** While the instance boots, the session's record may already say that it will never come. */
  #watchBoot(attempt: Attempt, reject: (error: StreamError) => void): void {
    const { session } = this.#connector;
    const id = this.#id;
    if (!session || id === undefined) return;
    const timer = setInterval(() => {
      if (attempt.signal.state !== "discovering") {
        clearInterval(timer);
        return;
      }
      session.call(this.#connector, id).then(
        ({ status, status_message: message }) => {
          if (attempt.signal.state !== "discovering" || !OVER.includes(status)) return;
          reject(new StreamError("discover", message || `the session is ${status}`));
        },
        (error: unknown) => {
          // Whether the gateway is away for a moment does not matter here; that the session is gone does.
          if (attempt.signal.state !== "discovering") return;
          if (error instanceof ApiError && error.status === 404) {
            reject(new StreamError("discover", "the session ended before its instance was there", 404));
          }
        },
      );
    }, 2_000);
    attempt.onDispose(() => clearInterval(timer));
  }

  #live(attempt: Attempt): void {
    const { surface, video, intercept } = this.#options;
    this.#enter("live");
    attempt.collector = new StatsCollector(attempt.transport.pc, (stats) => {
      if (this.#attempt !== attempt) return;
      this.#stats = stats;
      this.emit("stats", stats);
    });
    if (surface) {
      attempt.input = new Input({
        surface,
        picture: () => ({ width: video.videoWidth, height: video.videoHeight }),
        send: (type, data) => this.send(type, data),
        layout: this.#layout,
        ...(intercept ? { intercept } : {}),
      });
    }
    const ms = this.#options.firstFrameMs ?? 30_000;
    const timer = setTimeout(() => {
      // A page in the background shows no frames, and one without a display cannot complain.
      if (attempt.decoded || document.hidden || video.currentTime > 0) return;
      this.#fail(new StreamError("first-frame", `none was decoded within ${ms / 1000} seconds`));
    }, ms);
    attempt.onDispose(() => clearTimeout(timer));
  }

  #playSound(): void {
    const { audio } = this.#options;
    if (!audio?.srcObject || !this.#wantsSound) return;
    audio.play().then(
      () => this.emit("sound-blocked", false),
      (error: unknown) => {
        if (error instanceof DOMException && error.name === "NotAllowedError") this.emit("sound-blocked", true);
      },
    );
  }

  // Our own channel.

  #extensionOpened(attempt: Attempt): void {
    this.#extension({ type: "layout", layout: this.#layout });
    this.#acknowledge(attempt);
    const ping = setInterval(() => this.#extension({ type: "ping", t: Math.round(performance.now() * 10) / 10 }), 2_000);
    attempt.onDispose(() => clearInterval(ping));
    // Whoever does not listen on our channel cannot be told how long pictures wait.
    attempt.onDispose(watchRefresh((ms) => attempt.phase.refresh(ms)));
  }

  /** Tells the instance that a frame was seen, once, as soon as there is both a frame and a channel. */
  #acknowledge(attempt: Attempt): void {
    if (attempt.firstFrameMs === undefined || attempt.acknowledged) return;
    attempt.acknowledged = this.#extension({ type: "first-frame", ms: Math.round(attempt.firstFrameMs) });
  }

  #received(attempt: Attempt, channel: string, text: string): void {
    let message: Record<string, unknown>;
    try {
      const parsed: unknown = JSON.parse(text);
      if (typeof parsed !== "object" || parsed === null) return;
      message = parsed as Record<string, unknown>;
    } catch {
      console.warn(`fanlight: a message on the channel "${channel}" is not JSON and was ignored`);
      return;
    }
    const type = message["type"];
    if (typeof type !== "string") return;
    if (channel === CONTROL) {
      const data = message["data"];
      this.emit("message", { type, data: typeof data === "string" ? data : "" });
      return;
    }
    switch (type) {
      case "pong": {
        const sent = message["t"];
        if (typeof sent === "number") attempt.collector?.ping(Math.max(0, performance.now() - sent));
        break;
      }
      case "host-stats": {
        const host: HostStats | undefined = readHostStats(message);
        if (host) attempt.collector?.host(host);
        break;
      }
      case "cursor": {
        const cursor = readCursor(message);
        if (cursor) this.emit("cursor", cursor);
        break;
      }
      case "pointer-lock":
        this.emit("pointer-lock", message["locked"] === true);
        break;
    }
  }

  // The end, and what may follow it.

  /** The instance closed the stream: find out whether the session is over or somebody else streams it now. */
  async #hostEnded(): Promise<void> {
    this.#drop();
    if (this.#stopping) return this.#finish(STOPPED);
    this.emit("flowing", false);
    const until = performance.now() + SETTLE_MS;
    for (;;) {
      const over = await this.#sessionOver();
      if (over) return this.#finish(over);
      if (performance.now() >= until || this.#over()) break;
      await this.#pause(500);
    }
    this.#finish({
      reason: "replaced",
      message: "Another client took this stream over, or the instance closed it. The session itself goes on.",
    });
  }

  /** The end of the session in words, or nothing while it goes on or cannot be asked about. */
  async #sessionOver(): Promise<Ended | undefined> {
    if (this.#id === undefined || !this.#connector.session) return undefined;
    try {
      const { status, status_message: message } = await this.#connector.session(this.#id);
      if (!OVER.includes(status)) return undefined;
      return { reason: "session-ended", message: message || "The session ended." };
    } catch (error) {
      if (error instanceof ApiError && error.status === 404) return { reason: "session-ended", message: "The session ended." };
      throw error instanceof ApiError && error.unauthorized ? asStreamError(error, "created") : new Retry();
    }
  }

  async #reconnect(cause: string): Promise<void> {
    const { rejoin } = this.#connector;
    this.#drop();
    if (!rejoin || this.#id === undefined) return this.#fail(new StreamError("ice", cause));
    this.#enter("reconnecting");
    const giveUpAt = performance.now() + GIVE_UP_MS;
    for (let attempt = 1; !this.#over(); attempt++) {
      await this.#pause(BACK_OFF_MS[Math.min(attempt - 1, BACK_OFF_MS.length - 1)] ?? 0);
      if (this.#over()) return;
      this.emit("reconnecting", { attempt, cause });
      this.#begin();
      try {
        const over = await this.#sessionOver();
        if (over) return this.#finish(over);
        await this.#try(await rejoin.call(this.#connector, this.#id));
        return;
      } catch (error) {
        // What the failed attempt still has on the way must not be taken for a success later.
        this.#drop();
        if (error instanceof StreamError || isFinal(error)) {
          const failure = asStreamError(error, "created");
          // Being refused once may be a session that is just ending; the next round asks what became of it.
          if (failure.code === 401 || performance.now() >= giveUpAt) return this.#fail(failure);
          cause = failure.sentence;
        } else if (performance.now() >= giveUpAt) {
          return this.#fail(new StreamError("created", "the gateway could not be reached any more"));
        }
      }
    }
  }

  /** Waits, but not longer than until the network is back or the stream is over. */
  #pause(ms: number): Promise<void> {
    if (ms === 0) return Promise.resolve();
    return new Promise((resolve) => {
      const timer = setTimeout(done, ms);
      const self = this;
      function done() {
        clearTimeout(timer);
        self.#wake = undefined;
        resolve();
      }
      this.#wake = done;
    });
  }
}

/** The gateway could not be asked; try again. */
class Retry extends Error {}

/** What belongs to one attempt and ends with it. */
class Attempt {
  collector: StatsCollector | undefined;
  input: Input | undefined;
  readonly phase = new Phase();
  decoded = false;
  acknowledged = false;
  firstFrameMs: number | undefined;
  readonly #disposers: (() => void)[] = [];

  constructor(
    readonly transport: Transport,
    readonly signal: Signal,
  ) {}

  onDispose(dispose: () => void): void {
    this.#disposers.push(dispose);
  }

  dispose(lingerMs: number): void {
    for (const dispose of this.#disposers.splice(0)) dispose();
    this.collector?.stop();
    this.input?.dispose();
    this.signal.close();
    if (lingerMs > 0) setTimeout(() => this.transport.close(), lingerMs);
    else this.transport.close();
  }
}

function asStreamError(error: unknown, step: Step): StreamError {
  if (error instanceof StreamError) return error;
  if (error instanceof ApiError) return new StreamError(step, error.message, error.status);
  return new StreamError(step, error instanceof Error ? error.message : String(error));
}

const bytes = (base64: unknown): Uint8Array<ArrayBuffer> | undefined => {
  if (typeof base64 !== "string") return undefined;
  try {
    return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  } catch {
    return undefined;
  }
};

/** Reads a `cursor` message; nothing when it makes no sense. */
export function readCursor(message: Record<string, unknown>): Cursor | undefined {
  const { kind, name } = message;
  if (kind === "hidden") return { kind };
  if (kind === "named") return typeof name === "string" && /^[a-z-]+$/.test(name) ? { kind, name } : undefined;
  if (kind !== "image") return undefined;
  const field = (key: string): number => {
    const value = message[key];
    return typeof value === "number" && Number.isFinite(value) ? Math.trunc(value) : 0;
  };
  const [width, height] = [field("width"), field("height")];
  if (width < 1 || height < 1 || width > 256 || height > 256) return undefined;
  const rest = { width, height, hotX: field("hot_x"), hotY: field("hot_y") };
  const png = bytes(message["png_base64"]);
  if (png) return { kind, ...rest, data: { png } };
  const rgba = bytes(message["rgba_base64"]);
  if (rgba?.length !== width * height * 4) return undefined;
  return { kind, ...rest, data: { rgba: new Uint8ClampedArray(rgba.buffer) } };
}
