// Figures of a running stream, once a second: from getStats (counters, so differences are taken), from every
// displayed frame (requestVideoFrameCallback), and from what the instance says about itself. The arithmetic is
// pure; `StatsCollector` is the shell that asks the browser.

/** What the instance reports on our channel, about once a second while frames flow. */
export interface HostStats {
  /** Milliseconds per frame: from the application's commit to the encoder. */
  capture_ms: number;
  encode_ms: number;
  /** Milliseconds per frame: packetising, pacing, sending. */
  send_ms: number;
  bitrate_kbps: number;
  /** The instance's estimate of the bandwidth. */
  estimate_kbps: number;
  encoder: string;
}

/** All times in milliseconds, as means over the last second; absent where the browser does not tell. */
export interface Stats {
  /** Unix milliseconds. */
  at: number;
  width: number;
  height: number;
  /** Decoded frames per second. */
  fps: number;
  /** Frames that reached the display per second. */
  displayedFps: number;
  framesDecoded: number;
  framesDropped: number;
  keyFrames: number;
  bitrateKbps: number;
  /** Round trip of the media path. */
  rttMs: number | undefined;
  /** Share of packets lost on the way, 0 to 1, before repair. */
  loss: number;
  packetsLost: number;
  jitterMs: number | undefined;
  /** By the browser's rules, to which a picture that stands still for a while is frozen. */
  freezes: number;
  freezeMs: number;
  codec: string | undefined;
  decoder: string | undefined;
  /** Kinds of the addresses in use, e.g. `host → srflx`. */
  path: string | undefined;
  audio: { bitrateKbps: number; level: number | undefined; concealed: number } | undefined;
  /** Where the time between commit and display goes; of the last second in which frames came. */
  split: Split;
  host: HostStats | undefined;
}

export interface Split {
  /** Capture, encode and send, by the instance's own word. */
  hostMs: number | undefined;
  /** Half the round trip, and the time until the frame's last packet was there. */
  networkMs: number | undefined;
  decodeMs: number | undefined;
  /** Waiting for the decoder and for the display. */
  displayMs: number | undefined;
  totalMs: number | undefined;
}

/** The counters of one moment that differences are taken of. */
export interface Counters {
  at: number;
  bytes: number;
  packetsReceived: number;
  packetsLost: number;
  framesDecoded: number;
  framesAssembled: number;
  assemblySeconds: number;
  decodeSeconds: number;
  audioBytes: number;
}

/** What one displayed frame says, in milliseconds. */
export interface FrameTimes {
  decodeMs: number | undefined;
  /** Arrival of the last packet → expected on the display. */
  arrivalToDisplayMs: number | undefined;
}

type Report = Record<string, unknown> & { type: string; id: string };

const number = (value: unknown): number | undefined =>
  typeof value === "number" && Number.isFinite(value) ? value : undefined;
const text = (value: unknown): string | undefined => (typeof value === "string" && value !== "" ? value : undefined);

/** Reads the reports of one getStats call. */
export function readReports(reports: readonly Report[]): {
  video: Report | undefined;
  audio: Report | undefined;
  pair: Report | undefined;
  byId: Map<string, Report>;
} {
  const byId = new Map(reports.map((report) => [report.id, report]));
  const inbound = (kind: string) => reports.find((report) => report.type === "inbound-rtp" && report["kind"] === kind);
  const transport = reports.find((report) => report.type === "transport");
  const selected = text(transport?.["selectedCandidatePairId"]);
  const pair =
    (selected === undefined ? undefined : byId.get(selected)) ??
    reports.find((report) => report.type === "candidate-pair" && report["nominated"] === true);
  return { video: inbound("video"), audio: inbound("audio"), pair, byId };
}

export function countersOf(video: Report | undefined, audio: Report | undefined, at: number): Counters {
  return {
    at,
    bytes: number(video?.["bytesReceived"]) ?? 0,
    packetsReceived: number(video?.["packetsReceived"]) ?? 0,
    packetsLost: number(video?.["packetsLost"]) ?? 0,
    framesDecoded: number(video?.["framesDecoded"]) ?? 0,
    framesAssembled: number(video?.["framesAssembledFromMultiplePackets"]) ?? 0,
    assemblySeconds: number(video?.["totalAssemblyTime"]) ?? 0,
    decodeSeconds: number(video?.["totalDecodeTime"]) ?? 0,
    audioBytes: number(audio?.["bytesReceived"]) ?? 0,
  };
}

/** Mean of the values that are there. */
export function mean(values: readonly (number | undefined)[]): number | undefined {
  const known = values.filter((value) => value !== undefined);
  return known.length === 0 ? undefined : known.reduce((sum, value) => sum + value, 0) / known.length;
}

/** What of a frame's way is whose, from the pieces that are known. */
export function split(
  host: HostStats | undefined,
  rttMs: number | undefined,
  before: Counters,
  after: Counters,
  frames: readonly FrameTimes[],
): Split {
  const hostMs = host && host.capture_ms + host.encode_ms + host.send_ms;
  const decoded = after.framesDecoded - before.framesDecoded;
  const assembled = after.framesAssembled - before.framesAssembled;
  // A frame in one packet needs no assembly, so the time is spread over all frames.
  const assemblyMs =
    assembled > 0 && decoded > 0 ? ((after.assemblySeconds - before.assemblySeconds) * 1000) / Math.max(decoded, assembled) : 0;
  const networkMs = rttMs === undefined ? undefined : rttMs / 2 + assemblyMs;
  const decodeMs =
    mean(frames.map((frame) => frame.decodeMs)) ??
    (decoded > 0 ? ((after.decodeSeconds - before.decodeSeconds) * 1000) / decoded : undefined);
  const shown = mean(frames.map((frame) => frame.arrivalToDisplayMs));
  const displayMs = shown === undefined || decodeMs === undefined ? undefined : Math.max(0, shown - decodeMs);
  const parts = [hostMs, networkMs, decodeMs, displayMs];
  const totalMs = parts.every((part) => part !== undefined) ? parts.reduce((sum, part) => sum + part, 0) : undefined;
  return { hostMs, networkMs, decodeMs, displayMs, totalMs };
}

/** Reads one `host-stats` message; nothing when it is not one. */
export function readHostStats(message: Record<string, unknown>): HostStats | undefined {
  const field = (name: string): number => Math.max(0, number(message[name]) ?? 0);
  if (message["type"] !== "host-stats") return undefined;
  return {
    capture_ms: field("capture_ms"),
    encode_ms: field("encode_ms"),
    send_ms: field("send_ms"),
    bitrate_kbps: field("bitrate_kbps"),
    estimate_kbps: field("estimate_kbps"),
    encoder: text(message["encoder"]) ?? "unknown",
  };
}

/** Asks the browser once a second and hands the figures on. */
export class StatsCollector {
  readonly #pc: RTCPeerConnection;
  readonly #report: (stats: Stats) => void;
  readonly #timer: ReturnType<typeof setInterval>;
  #before: Counters | undefined;
  #frames: FrameTimes[] = [];
  #presented = { count: 0, at: performance.now() };
  #host: { stats: HostStats; at: number } | undefined;
  #channelRttMs: number | undefined;
  #split: Split | undefined;

  constructor(pc: RTCPeerConnection, report: (stats: Stats) => void, everyMs = 1_000) {
    this.#pc = pc;
    this.#report = report;
    this.#timer = setInterval(() => void this.collect(), everyMs);
  }

  /** One displayed frame, as requestVideoFrameCallback tells it. */
  frame(metadata: VideoFrameCallbackMetadata): void {
    this.#presented.count += 1;
    const { receiveTime, processingDuration, expectedDisplayTime } = metadata;
    this.#frames.push({
      decodeMs: processingDuration === undefined ? undefined : processingDuration * 1000,
      arrivalToDisplayMs:
        receiveTime === undefined || receiveTime <= 0 ? undefined : Math.max(0, expectedDisplayTime - receiveTime),
    });
    if (this.#frames.length > 600) this.#frames.shift();
  }

  host(stats: HostStats): void {
    this.#host = { stats, at: performance.now() };
  }

  /** Round trip of a ping on the data channel: used while ICE has not measured one. */
  ping(rttMs: number): void {
    this.#channelRttMs = rttMs;
  }

  stop(): void {
    clearInterval(this.#timer);
  }

  async collect(): Promise<void> {
    const reports: Report[] = [];
    try {
      (await this.#pc.getStats()).forEach((report) => reports.push(report as Report));
    } catch {
      return; // The connection is being closed; there is nothing to report.
    }
    const { video, audio, pair, byId } = readReports(reports);
    const now = performance.now();
    const after = countersOf(video, audio, now);
    const before = this.#before;
    this.#before = after;
    const frames = this.#frames.splice(0);
    const presented = this.#presented;
    this.#presented = { count: 0, at: now };
    if (!before) return;
    const seconds = Math.max((after.at - before.at) / 1000, 0.001);
    const icePair = number(pair?.["currentRoundTripTime"]);
    const rttMs = icePair === undefined ? this.#channelRttMs : icePair * 1000;
    const lost = Math.max(0, after.packetsLost - before.packetsLost);
    const received = Math.max(0, after.packetsReceived - before.packetsReceived);
    const host = this.#host && now - this.#host.at < 10_000 ? this.#host.stats : undefined;
    const end = (id: unknown) => text(byId.get(text(id) ?? "")?.["candidateType"]);
    const [local, remote] = [end(pair?.["localCandidateId"]), end(pair?.["remoteCandidateId"])];
    const jitter = number(video?.["jitter"]);
    const moved = after.framesDecoded > before.framesDecoded;
    const parts = moved || !this.#split ? split(host, rttMs, before, after, frames) : this.#split;
    this.#split = parts;
    this.#report({
      at: Date.now(),
      width: number(video?.["frameWidth"]) ?? 0,
      height: number(video?.["frameHeight"]) ?? 0,
      fps: (after.framesDecoded - before.framesDecoded) / seconds,
      displayedFps: presented.count / Math.max((now - presented.at) / 1000, 0.001),
      framesDecoded: after.framesDecoded,
      framesDropped: number(video?.["framesDropped"]) ?? 0,
      keyFrames: number(video?.["keyFramesDecoded"]) ?? 0,
      bitrateKbps: ((after.bytes - before.bytes) * 8) / 1000 / seconds,
      rttMs,
      loss: lost + received > 0 ? lost / (lost + received) : 0,
      packetsLost: after.packetsLost,
      jitterMs: jitter === undefined ? undefined : jitter * 1000,
      freezes: number(video?.["freezeCount"]) ?? 0,
      freezeMs: (number(video?.["totalFreezesDuration"]) ?? 0) * 1000,
      codec: text(byId.get(text(video?.["codecId"]) ?? "")?.["mimeType"])?.replace(/^video\//, ""),
      decoder: text(video?.["decoderImplementation"]),
      path: local && remote ? `${local} → ${remote}` : undefined,
      audio: audio && {
        bitrateKbps: ((after.audioBytes - before.audioBytes) * 8) / 1000 / seconds,
        level: number(audio["audioLevel"]),
        concealed: number(audio["concealedSamples"]) ?? 0,
      },
      split: parts,
      host,
    });
  }
}
