// The peer connection (stream-protocol sections 1 to 4): answers the instance's offer, opens the data
// channels, hands out tracks, and says in words what became of ICE and DTLS. Knows nothing of signalling
// sockets, of input, or of elements in a page.

import type { StunServer } from "./api";
import { Emitter } from "./emitter";
import type { Candidate } from "./signal";
import { StreamError } from "./steps";

/** Always opened by the client; JSON in the original's form. */
export const CONTROL = "control";
/** Our own out-of-band channel; servers that do not know it ignore it. */
export const EXTENSION = "fanlight";

/** Cause code of an SCTP user-initiated abort: how an instance ends a stream on purpose. */
const SCTP_USER_ABORT = 12;

export interface TransportEvents {
  /** A local candidate to be sent to the instance. */
  candidate: Candidate;
  /** A path works. */
  ice: void;
  /** Keys are agreed. */
  dtls: void;
  track: MediaStreamTrack;
  /** A data channel opened. */
  open: string;
  message: { channel: string; text: string };
  /** Packets stopped (`false`) or flow again (`true`). */
  flowing: boolean;
  /** The instance ended the stream on purpose. */
  aborted: string;
  /** The connection broke. */
  lost: StreamError;
}

export interface TransportOptions {
  iceServers: StunServer[];
  /** For tests through a relay. */
  iceTransportPolicy?: RTCIceTransportPolicy;
  /** Milliseconds for ICE, then for DTLS. */
  iceMs?: number;
  dtlsMs?: number;
  /** Milliseconds without packets before the connection counts as lost. */
  graceMs?: number;
}

/** The original's server entries as the browser wants them. Credentials only where both are given. */
export function iceServers(servers: readonly StunServer[]): RTCIceServer[] {
  return servers.map(({ urls, username, password }) =>
    username !== undefined && password !== undefined && username !== ""
      ? { urls, username, credential: password }
      : { urls },
  );
}

/** The kinds of media that the answer rejects although they were offered for sending. */
export function rejectedMedia(answerSdp: string): string[] {
  return answerSdp
    .split(/^m=/m)
    .slice(1)
    .filter((section) => /^(audio|video) 0 /.test(section))
    .map((section) => section.slice(0, section.indexOf(" ")));
}

/** Names of the codecs that a description offers for video, each once, without repair formats. */
export function offeredVideoCodecs(sdp: string): string[] {
  const names = new Set<string>();
  for (const section of sdp.split(/^m=/m).slice(1)) {
    if (!section.startsWith("video ")) continue;
    for (const match of section.matchAll(/^a=rtpmap:\d+ ([A-Za-z0-9-]+)\//gm)) {
      if (match[1] && !/^(rtx|red|ulpfec|flexfec-03)$/i.test(match[1])) names.add(match[1]);
    }
  }
  return [...names];
}

export class Transport extends Emitter<TransportEvents> {
  readonly pc: RTCPeerConnection;
  readonly #channels = new Map<string, RTCDataChannel>();
  readonly #options: Required<Pick<TransportOptions, "iceMs" | "dtlsMs" | "graceMs">>;
  #remoteCandidates: RTCIceCandidateInit[] = [];
  #described = false;
  #seen = { local: 0, remote: 0 };
  #reached: "new" | "ice" | "dtls" = "new";
  #over = false;
  #timer: ReturnType<typeof setTimeout> | undefined;
  #grace: ReturnType<typeof setTimeout> | undefined;

  constructor(options: TransportOptions) {
    super();
    this.#options = {
      iceMs: options.iceMs ?? 30_000,
      dtlsMs: options.dtlsMs ?? 15_000,
      graceMs: options.graceMs ?? 5_000,
    };
    try {
      this.pc = new RTCPeerConnection({
        iceServers: iceServers(options.iceServers),
        ...(options.iceTransportPolicy ? { iceTransportPolicy: options.iceTransportPolicy } : {}),
      });
    } catch (error) {
      throw new StreamError("created", `the gateway's list of ICE servers is not usable (${words(error)})`);
    }
    this.pc.onicecandidate = ({ candidate }) => {
      if (!candidate || candidate.candidate === "") return;
      this.#seen.local += 1;
      this.emit("candidate", candidate.toJSON() as Candidate);
    };
    this.pc.oniceconnectionstatechange = () => this.#iceChanged();
    this.pc.onconnectionstatechange = () => this.#connectionChanged();
    this.pc.ontrack = ({ track, receiver }) => {
      playAtOnce(receiver);
      this.emit("track", track);
    };
    for (const label of [CONTROL, EXTENSION]) this.#open(label);
  }

  /** Applies the instance's offer and makes the answer. @throws StreamError at step `offer` */
  async answer(offerSdp: string): Promise<string> {
    try {
      await this.pc.setRemoteDescription({ type: "offer", sdp: offerSdp });
    } catch (error) {
      throw new StreamError("offer", `the instance's offer could not be applied (${words(error)})`);
    }
    this.#described = true;
    for (const candidate of this.#remoteCandidates.splice(0)) void this.#add(candidate);
    let sdp: string;
    try {
      const answer = await this.pc.createAnswer();
      sdp = stereo(answer.sdp ?? "");
      await this.pc.setLocalDescription({ type: "answer", sdp });
    } catch (error) {
      throw new StreamError("offer", `no answer could be made (${words(error)})`);
    }
    if (rejectedMedia(sdp).includes("video")) {
      const offered = offeredVideoCodecs(offerSdp).join(", ") || "none";
      throw new StreamError("offer", `this browser decodes none of the offered video codecs (${offered})`);
    }
    this.#deadline(this.#options.iceMs, () => {
      const { local, remote } = this.#seen;
      return new StreamError("ice", `nothing answered on ${remote} remote and ${local} local addresses`);
    });
    return sdp;
  }

  /** Adds a candidate of the instance; the order against the offer does not matter. */
  addCandidate(candidate: Candidate): void {
    this.#seen.remote += 1;
    const init = { ...candidate } as RTCIceCandidateInit;
    if (this.#described) void this.#add(init);
    else this.#remoteCandidates.push(init);
  }

  /** Sends text on a channel. False when it is not open: input for a connection that is not there is dropped. */
  send(label: string, text: string): boolean {
    const channel = this.#channels.get(label);
    if (channel?.readyState !== "open") return false;
    channel.send(text);
    return true;
  }

  /** Bytes waiting to be sent on a channel. */
  buffered(label: string): number {
    return this.#channels.get(label)?.bufferedAmount ?? 0;
  }

  close(): void {
    if (this.#over) return;
    this.#over = true;
    clearTimeout(this.#timer);
    clearTimeout(this.#grace);
    this.pc.close();
  }

  #open(label: string): void {
    const channel = this.pc.createDataChannel(label);
    this.#channels.set(label, channel);
    channel.onopen = () => this.emit("open", label);
    channel.onmessage = ({ data }) => {
      if (typeof data === "string") this.emit("message", { channel: label, text: data });
    };
    if (label !== CONTROL) return;
    channel.onerror = (event) => {
      if (this.#over) return;
      const { error } = event as RTCErrorEvent;
      if (error.sctpCauseCode === SCTP_USER_ABORT) this.#abort();
      else this.#lose(new StreamError("first-frame", `the control channel failed (${words(error)})`));
    };
    channel.onclose = () => {
      // Without an error before it this is an orderly end from the other side, unless the path is gone too.
      if (!this.#over && this.pc.iceConnectionState !== "failed") this.#abort();
    };
  }

  async #add(candidate: RTCIceCandidateInit): Promise<void> {
    try {
      await this.pc.addIceCandidate(candidate);
    } catch (error) {
      console.debug("fanlight: the browser rejected a candidate", words(error));
    }
  }

  #iceChanged(): void {
    if (this.#over) return;
    switch (this.pc.iceConnectionState) {
      case "connected":
      case "completed":
        if (this.#grace !== undefined) {
          clearTimeout(this.#grace);
          this.#grace = undefined;
          this.emit("flowing", true);
        }
        this.#reachIce();
        break;
      case "disconnected":
        // Before the first connection this is only a step on the way to `failed`.
        if (this.#grace !== undefined || this.#reached === "new") break;
        this.emit("flowing", false);
        this.#grace = setTimeout(
          () => this.#lose(new StreamError("ice", "no packets came from the instance any more")),
          this.#options.graceMs,
        );
        break;
      case "failed": {
        const { local, remote } = this.#seen;
        this.#lose(
          new StreamError(
            "ice",
            this.#reached === "new"
              ? `none of ${remote} remote and ${local} local addresses reach each other`
              : "the path to the instance broke",
          ),
        );
        break;
      }
    }
  }

  #reachIce(): void {
    if (this.#reached !== "new") return;
    this.#reached = "ice";
    this.emit("ice", undefined);
    this.#deadline(this.#options.dtlsMs, () => new StreamError("dtls", "the handshake did not end"));
  }

  #connectionChanged(): void {
    if (this.#over) return;
    if (this.pc.connectionState === "connected" && this.#reached !== "dtls") {
      this.#reachIce();
      this.#reached = "dtls";
      clearTimeout(this.#timer);
      this.emit("dtls", undefined);
    } else if (this.pc.connectionState === "failed" && this.pc.iceConnectionState !== "failed") {
      // ICE is fine, so DTLS ended: before it was up that is a failure, afterwards the instance's good-bye.
      if (this.#reached === "dtls") this.#abort();
      else this.#lose(new StreamError("dtls", "the handshake failed"));
    }
  }

  #deadline(ms: number, error: () => StreamError): void {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => {
      const failure = error();
      this.#lose(new StreamError(failure.step, `${failure.message} within ${ms / 1000} seconds`));
    }, ms);
  }

  #abort(): void {
    if (this.#over) return;
    this.close();
    this.emit("aborted", "the instance ended the stream");
  }

  #lose(error: StreamError): void {
    if (this.#over) return;
    this.close();
    this.emit("lost", error);
  }
}

/** Asks for the smallest delay between arrival and display, by every name that browsers know for it. */
function playAtOnce(receiver: RTCRtpReceiver): void {
  const known = receiver as RTCRtpReceiver & { jitterBufferTarget?: number | null; playoutDelayHint?: number | null };
  if ("jitterBufferTarget" in known) known.jitterBufferTarget = 0;
  if ("playoutDelayHint" in known) known.playoutDelayHint = 0;
}

/** Browsers decode Opus to one channel unless the answer asks for two. */
export function stereo(sdp: string): string {
  const payload = /^a=rtpmap:(\d+) opus\/48000\/2/im.exec(sdp)?.[1];
  if (payload === undefined) return sdp;
  return sdp.replace(new RegExp(`^(a=fmtp:${payload} )(?!.*\\bstereo=)(.*?)(\\r?)$`, "m"), "$1$2;stereo=1$3");
}

function words(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
