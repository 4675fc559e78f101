import { describe, expect, test } from "vitest";
import { ApiError, type Check, type CheckStatus, type Diagnosis } from "./api";
import { type Tried, checkConnection, judgeBrowser, judgeCodecs, judgeFailure, judgeServers, judgeTime } from "./check";
import type { Outcome } from "./probe";

const expectCheck = (checks: Check[] | Check, step: string, status: CheckStatus, text: string, advice = "") => {
  const list = [checks].flat();
  const found = list.find((check) => check.step === step);
  if (!found) throw new Error(`no step ${step} in ${JSON.stringify(list)}`);
  expect(found.status, found.text).toBe(status);
  expect(found.text).toContain(text);
  expect(found.advice ?? "").toContain(advice);
  // Advice is for what is not as it should be.
  expect(Boolean(found.advice)).toBe(status === "warning" || status === "failed");
};

describe("this browser", () => {
  test.each<[boolean, string[] | undefined, CheckStatus, string]>([
    [true, ["H264", "VP8", "AV1", "rtx"], "ok", "decodes H.264, VP8 and AV1"],
    [true, ["h264", "vp8"], "ok", "decodes H.264 and VP8, but not AV1"],
    [true, ["VP8", "VP9"], "warning", "decodes VP8, but not H.264 and AV1"],
    [true, ["VP9"], "failed", "none of"],
    [true, undefined, "skipped", "does not tell"],
    [false, undefined, "failed", "no WebRTC"],
  ])("WebRTC %s, codecs %j: %s", (rtc, codecs, status, text) => expectCheck(judgeCodecs(rtc, codecs), "decoding", status, text));

  test("plain HTTP is warned of", () => {
    expectCheck(judgeBrowser(false), "page", "warning", "plain HTTP", "https://");
    expectCheck(judgeBrowser(true), "page", "ok", "everything");
  });
});

describe("the gateway", () => {
  test.each<[unknown, string, CheckStatus, string, string]>([
    [new ApiError("the gateway cannot be reached", 0), "gateway", "failed", "cannot be reached", "runs"],
    [new ApiError("broken", 500), "gateway", "failed", "500: broken", "log"],
    [new ApiError("not logged in", 401), "token", "failed", "not logged in", "fanlight code"],
    [new ApiError("not allowed", 403), "token", "failed", "not allowed", "fanlight code"],
    [new ApiError("not found", 404), "diagnosis", "skipped", "/1.0/doctor", ""],
    [new TypeError("odd"), "gateway", "failed", "odd", "runs"],
  ])("%s is step %s", (error, step, status, text, advice) => {
    const checks = judgeFailure(error);
    expectCheck(checks, step, status, text, advice);
    expectCheck(checks, "relay", "skipped", "");
    expect(checks.filter((check) => check.status === "failed")).toHaveLength(status === "failed" ? 1 : 0);
  });

  test("clocks that differ are warned of in both directions", () => {
    expectCheck(judgeTime(90_000), "time", "warning", "90 s behind", "time servers");
    expectCheck(judgeTime(-45_500), "time", "warning", "45 s ahead", "time servers");
    expectCheck(judgeTime(-1_200), "time", "ok", "1.2 s");
  });
});

describe("servers", () => {
  const given: Outcome = { kind: "given", ms: 4 };
  const silent: Outcome = { kind: "silent" };
  const judged = (...servers: [string, Outcome][]) =>
    judgeServers([["here", servers.map(([url, outcome]): Tried => ({ url, outcome }))]]);

  test("where all answer, all is well", () => {
    const checks = judged(["stun:s", given], ["turn:t", given], ["turn:t?transport=tcp", given]);
    expectCheck(checks, "udp", "ok", "region here: stun:s answers in 4.0 ms");
    expectCheck(checks, "relay", "ok", "turn:t gives a relay in 4.0 ms; turn:t?transport=tcp gives");
    expectCheck(judged(["stun:s", { kind: "ended" }]), "udp", "ok", "this machine's own");
  });

  test("UDP that does not get through is told from servers that are down", () => {
    expectCheck(judged(["stun:a", given], ["stun:b", silent]), "udp", "warning", "UDP gets through, but stun:b does not answer", "start");
    expectCheck(judged(["stun:a", silent], ["turn:t", given]), "udp", "warning", "gets through to the TURN server", "start");
    expectCheck(judged(["stun:a", silent], ["turn:t?transport=tcp", given]), "udp", "warning", "relay over TCP", "firewalls");
    expectCheck(judged(["stun:a", silent], ["turns:t", given]), "udp", "warning", "relay over TCP", "firewalls");
    expectCheck(judged(["stun:a", silent], ["turn:t", silent]), "udp", "failed", "UDP does not get through", "TURN server over TCP");
    expectCheck(judged(["stun:a", { kind: "unreachable", text: "no such host" }]), "udp", "failed", "no such host", "firewalls");
  });

  test.each<[Outcome, string, string]>([
    [{ kind: "refused", code: 401, text: "Unauthorized." }, "refuses with 401 Unauthorized", "secret"],
    [{ kind: "refused", code: 486, text: "" }, "refuses with 486", "quota"],
    [{ kind: "refused", code: 508, text: "" }, "508", "ports"],
    [{ kind: "refused", code: 403, text: "" }, "403", "forbid"],
    [{ kind: "refused", code: 500, text: "" }, "500", "log"],
    [silent, "does not answer", "let UDP"],
    [{ kind: "unreachable", text: "no way" }, "no way", "let UDP"],
  ])("a relay that is not given: %j", (outcome, text, advice) => {
    expectCheck(judged(["stun:s", given], ["turn:t", outcome]), "relay", "failed", text, advice);
  });

  test("one relay of two is a warning", () => {
    expectCheck(judged(["turn:t", given], ["turn:t?transport=tcp", silent]), "relay", "warning", "gives a relay in 4.0 ms, but turn:t?transport=tcp", "let TCP");
  });

  test("a region without servers is said so", () => {
    expectCheck(judged(), "udp", "skipped", "straight to the instances");
    expectCheck(judged(), "relay", "skipped", "no TURN server");
    expectCheck(judged(["turn:t", given]), "udp", "skipped", "shows with the relay");
    expectCheck(judgeServers([]), "udp", "skipped", "no region");
  });
});

describe("the whole way", () => {
  const diagnosis: Diagnosis = {
    time_ms: 1_000_000,
    checks: [{ step: "agents", status: "ok", text: "alive: local" }],
    stun_servers: { here: [{ urls: ["bad:x", "turn:t"], username: "u", password: "p" }] },
  };
  const options = {
    secure: true,
    codecs: ["H264", "VP8", "AV1"],
    now: () => 1_000_000,
    peer: () => {
      throw new SyntaxError("refused by the browser");
    },
  };

  test("steps come in the order of a stream, and early ones are shown early", async () => {
    const counts: number[] = [];
    const checks = await checkConnection({ doctor: async () => diagnosis }, { ...options, onProgress: (known) => counts.push(known.length) });
    expect(checks.map(({ step }) => step)).toEqual(["page", "decoding", "gateway", "time", "agents", "udp", "relay"]);
    expect(counts).toEqual([2, 5, 7]);
    expectCheck(checks, "relay", "failed", "refused by the browser", "let UDP");
  });

  test("without WebRTC the servers are not tried", async () => {
    const { peer: _, ...rest } = options;
    const checks = await checkConnection({ doctor: async () => diagnosis }, rest);
    expectCheck(checks, "decoding", "failed", "no WebRTC", "current browser");
    expectCheck(checks, "relay", "skipped", "`decoding`");
  });

  test("a gateway that fails ends it with the reason", async () => {
    const checks = await checkConnection({ doctor: () => Promise.reject(new ApiError("gone", 0)) }, options);
    expectCheck(checks, "gateway", "failed", "gone", "runs");
    expectCheck(checks, "udp", "skipped", "`gateway`");
  });
});
