// Walks the path that a stream takes, as this browser sees it: what the gateway says of itself, then what only a
// browser can know. Looking (`checkConnection`) and judging (the rest, pure) are apart. The words are those of the
// command `fanlight doctor`.

import { type Api, ApiError, type Check, type CheckStatus, type Diagnosis, type StunServer } from "./api";
import { type Outcome, type ProbeOptions, probe } from "./probe";
import { iceServers } from "./transport";

/** Tokens and credentials of TURN servers bear times; more than this is dangerous. */
const MAX_CLOCK_DIFFERENCE_MS = 30_000;
const PROBE_MS = 5_000;
/** Servers of one region that are tried, at most. */
const MAX_SERVERS = 16;

export interface CheckOptions {
  /** Called with everything that is known by now, whenever there is more. */
  onProgress?: (checks: Check[]) => void;
  /** For tests. */
  peer?: ProbeOptions["peer"];
  now?: () => number;
  secure?: boolean;
  /** Names of the video codecs that can be received; absent when the browser has no WebRTC or does not tell. */
  codecs?: string[] | undefined;
}

/** A server of a region and what became of trying it. */
export interface Tried {
  url: string;
  outcome: Outcome;
}

const check = (step: string, status: CheckStatus, text: string, advice = ""): Check => ({ step, status, text, advice });

/** Looks at everything. Never rejects: what goes wrong is a check. */
export async function checkConnection(api: Pick<Api, "doctor">, options: CheckOptions = {}): Promise<Check[]> {
  const { onProgress = () => undefined, now = () => Date.now() } = options;
  const codecs = "codecs" in options ? options.codecs : videoCodecs();
  const rtc = options.peer !== undefined || typeof RTCPeerConnection !== "undefined";
  const checks = [judgeBrowser(options.secure ?? globalThis.isSecureContext), judgeCodecs(rtc, codecs)];
  onProgress([...checks]);
  const began = now();
  let diagnosis: Diagnosis;
  try {
    diagnosis = await api.doctor();
  } catch (error) {
    checks.push(...judgeFailure(error));
    onProgress([...checks]);
    return checks;
  }
  const took = now() - began;
  checks.push(
    check("gateway", "ok", `the gateway answers in ${milliseconds(took)}`),
    judgeTime(diagnosis.time_ms - (began + took / 2)),
    ...diagnosis.checks,
  );
  onProgress([...checks]);
  if (!rtc) return [...checks, ...["udp", "relay"].map((step) => skippedBecause(step, "decoding"))];
  const regions = await Promise.all(
    Object.entries(diagnosis.stun_servers).map(async ([name, servers]) => [name, await tryServers(servers, options)] as const),
  );
  checks.push(...judgeServers(regions));
  onProgress([...checks]);
  return checks;
}

/** Tries every URL by itself, all at once. */
async function tryServers(servers: readonly StunServer[], options: CheckOptions): Promise<Tried[]> {
  const single = iceServers(servers).flatMap((server) => [server.urls].flat().map((url) => ({ ...server, urls: url })));
  return Promise.all(
    single.slice(0, MAX_SERVERS).map(async (server) => ({
      url: server.urls,
      outcome: await probe(server, { ...options, limitMs: PROBE_MS }),
    })),
  );
}

function videoCodecs(): string[] | undefined {
  if (typeof RTCRtpReceiver === "undefined") return undefined;
  const codecs = RTCRtpReceiver.getCapabilities?.("video")?.codecs;
  return codecs?.map(({ mimeType }) => mimeType.replace(/^video\//i, ""));
}

const milliseconds = (ms: number): string => `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;

const skippedBecause = (step: string, broken: string): Check =>
  check(step, "skipped", `cannot be looked at because \`${broken}\` failed`);

export function judgeBrowser(secure: boolean): Check {
  return secure
    ? check("page", "ok", "the browser lets this page do everything")
    : check(
        "page",
        "warning",
        "the page came over plain HTTP, so the browser does not let it capture keys and mouse wholly",
        "open the page by the gateway's https:// address",
      );
}

/** Which of the codecs that instances may send this browser decodes. */
export function judgeCodecs(rtc: boolean, codecs: readonly string[] | undefined): Check {
  if (!rtc) {
    return check(
      "decoding",
      "failed",
      "this browser has no WebRTC",
      "use a current browser, and check that no setting or extension turns WebRTC off",
    );
  }
  if (codecs === undefined) return check("decoding", "skipped", "this browser does not tell what it decodes");
  const known = (
    [
      ["h264", "H.264"],
      ["vp8", "VP8"],
      ["av1", "AV1"],
    ] as const
  ).map(([name, title]) => ({ title, there: codecs.some((codec) => codec.toLowerCase() === name) }));
  const titles = (there: boolean) => known.filter((codec) => codec.there === there).map(({ title }) => title);
  const [able, unable] = [titles(true), titles(false)];
  if (able.length === 0) {
    return check("decoding", "failed", "this browser decodes none of H.264, VP8 and AV1", "use a current browser");
  }
  const text = `this browser decodes ${words(able)}${unable.length > 0 ? `, but not ${words(unable)}` : ""}`;
  return unable.includes("H.264")
    ? check("decoding", "warning", text, "most instances send H.264: use a browser that decodes it")
    : check("decoding", "ok", text);
}

function words(items: readonly string[]): string {
  return items.length < 2 ? items.join("") : `${items.slice(0, -1).join(", ")} and ${items[items.length - 1] ?? ""}`;
}

/** What a failed request to the gateway means, and the steps that cannot be looked at for it. */
export function judgeFailure(error: unknown): Check[] {
  const said = error instanceof Error ? error.message : String(error);
  const status = error instanceof ApiError ? error.status : 0;
  const rest = (broken: string, ...steps: string[]) => steps.map((step) => skippedBecause(step, broken));
  switch (status) {
    case 401:
    case 403:
      return [
        check("gateway", "ok", "the gateway answers"),
        check("token", "failed", `the gateway does not take this page's login: ${said}`, "open the page by a fresh link; `fanlight code` prints one"),
        ...rest("token", "diagnosis", "udp", "relay"),
      ];
    case 404:
    case 405:
      return [
        check("gateway", "ok", "the gateway answers"),
        check("diagnosis", "skipped", "this gateway cannot look at itself (it does not know /1.0/doctor)"),
        ...["udp", "relay"].map((step) => check(step, "skipped", "the gateway does not say which STUN and TURN servers there are")),
      ];
    case 0:
      return [
        check("gateway", "failed", said, "check that the gateway runs, and that this machine is on the network"),
        ...rest("gateway", "time", "diagnosis", "udp", "relay"),
      ];
    default:
      return [
        check("gateway", "failed", `the gateway answers with HTTP status ${status}: ${said}`, "the gateway's log says more"),
        ...rest("gateway", "time", "diagnosis", "udp", "relay"),
      ];
  }
}

/** `difference`: the gateway's clock less this machine's, in milliseconds. */
export function judgeTime(difference: number): Check {
  const distance = Math.abs(difference);
  return distance > MAX_CLOCK_DIFFERENCE_MS
    ? check(
        "time",
        "warning",
        `this machine's clock is ${Math.floor(distance / 1_000)} s ${difference > 0 ? "behind" : "ahead of"} the gateway's`,
        "set the clocks by time servers: tokens and TURN credentials end too early or too late",
      )
    : check("time", "ok", `the clocks of this machine and of the gateway are within ${(distance / 1_000).toFixed(1)} s`);
}

/** The ways of the media: STUN and TURN servers of every region. */
export function judgeServers(regions: readonly (readonly [string, readonly Tried[]])[]): Check[] {
  if (regions.length === 0) {
    return ["udp", "relay"].map((step) => check(step, "skipped", "no region is known, so there is no server to try"));
  }
  return regions.flatMap(([region, servers]) => {
    const turn = servers.filter(({ url }) => /^turns?:/i.test(url));
    return [judgeUdp(region, servers.filter((server) => !turn.includes(server)), turn), judgeRelay(region, turn)];
  });
}

const works = ({ outcome }: Tried): boolean => outcome.kind === "given" || outcome.kind === "ended";
const answers = (server: Tried): boolean => works(server) || server.outcome.kind === "refused";
const overUdp = ({ url }: Tried): boolean => !/^turns:|[?&]transport=tcp/i.test(url);

function judgeUdp(region: string, stun: readonly Tried[], turn: readonly Tried[]): Check {
  const step = "udp";
  if (stun.length === 0) {
    return check(
      step,
      "skipped",
      turn.length === 0
        ? `region ${region} has no STUN server: streams go straight to the instances' addresses`
        : `region ${region} has no STUN server; whether UDP gets through shows with the relay`,
    );
  }
  const told = stun.filter(works).map(described);
  const problems = stun.filter((server) => !works(server)).map(described).join("; ");
  if (problems === "") return check(step, "ok", `region ${region}: ${told.join("; ")}`);
  const start = "start these servers, or take them out of the settings of the region's agents";
  if (told.length > 0) return check(step, "warning", `region ${region}: UDP gets through, but ${problems}`, start);
  // Nothing that speaks STUN answered. A TURN server that did shows which of the two it is: the servers, or UDP.
  if (turn.some((server) => overUdp(server) && answers(server))) {
    return check(step, "warning", `region ${region}: UDP gets through to the TURN server, but ${problems}`, start);
  }
  const open = "let UDP from here through the firewalls on the way";
  return turn.some((server) => !overUdp(server) && works(server))
    ? check(step, "warning", `region ${region}: UDP does not get through (${problems}); streams take the relay over TCP, with more delay`, open)
    : check(
        step,
        "failed",
        `region ${region}: UDP does not get through: ${problems}`,
        `${open}, or offer a TURN server over TCP; if others get through, the servers are fine`,
      );
}

function judgeRelay(region: string, turn: readonly Tried[]): Check {
  const step = "relay";
  if (turn.length === 0) {
    return check(step, "skipped", `region ${region} has no TURN server: only clients that reach the instances' addresses get streams`);
  }
  const given = turn.filter(works).map(described);
  const broken = turn.filter((server) => !works(server));
  const [first] = broken;
  if (first === undefined) return check(step, "ok", `region ${region}: ${given.join("; ")}`);
  const problems = broken.map(described).join("; ");
  return given.length === 0
    ? check(step, "failed", `region ${region}: no TURN server gives a relay: ${problems}`, relayAdvice(first))
    : check(step, "warning", `region ${region}: ${given.join("; ")}, but ${problems}`, relayAdvice(first));
}

/** A server and what became of it, in words. */
function described({ url, outcome }: Tried): string {
  switch (outcome.kind) {
    case "given":
      return `${url} ${/^turns?:/i.test(url) ? "gives a relay" : "answers"} in ${milliseconds(outcome.ms)}`;
    case "ended":
      return `${url} tells no other address than this machine's own`;
    case "refused":
      return `${url} refuses with ${outcome.code} ${outcome.text}`.replace(/[ .]+$/, "");
    case "silent":
      return `${url} does not answer`;
    case "unreachable":
      return `${url} cannot be reached: ${outcome.text}`;
  }
}

function relayAdvice({ url, outcome }: Tried): string {
  if (outcome.kind !== "refused") {
    return `let ${/^turns:/i.test(url) ? "TLS" : overUdp({ url, outcome }) ? "UDP" : "TCP"} to this server through the firewalls on the way, and check that it runs`;
  }
  switch (outcome.code) {
    case 401:
    case 441:
      return "the secret of the TURN server and that of the region's agents must be the same, and their clocks right";
    case 403:
      return "the TURN server's settings forbid this client or this kind of relay";
    case 486:
      return "raise the TURN server's quota of relays for one user, or wait";
    case 508:
      return "give the TURN server more ports for relays, or another server";
    default:
      return "the TURN server's log says more";
  }
}
