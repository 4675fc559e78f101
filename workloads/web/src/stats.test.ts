import { describe, expect, test } from "vitest";
import { isBlank } from "./frames";
import { type Counters, countersOf, readHostStats, readReports, split } from "./stats";
import { nextStep } from "./steps";
import { readCursor } from "./stream";

const at = (framesDecoded: number, decodeSeconds: number, assemblySeconds: number): Counters => ({
  ...countersOf(undefined, undefined, 0),
  framesDecoded,
  framesAssembled: framesDecoded,
  decodeSeconds,
  assemblySeconds,
});
const host = { capture_ms: 1, encode_ms: 3, send_ms: 0.5, bitrate_kbps: 1, estimate_kbps: 1, encoder: "x264" };

describe("stats", () => {
  test("the delay of a frame is split into what is whose", () => {
    const frames = [
      { decodeMs: 2, arrivalToDisplayMs: 10 },
      { decodeMs: 4, arrivalToDisplayMs: 12 },
    ];
    const parts = split(host, 2, at(0, 0, 0), at(60, 0.2, 0.06), frames);
    expect(parts).toEqual({ hostMs: 4.5, networkMs: 2, decodeMs: 3, displayMs: 8, totalMs: 17.5 });
  });

  test("what is not known is left out, and so is the sum", () => {
    const parts = split(undefined, undefined, at(0, 0, 0), at(10, 0.05, 0), []);
    expect([parts.hostMs, parts.networkMs, parts.displayMs, parts.totalMs]).toEqual([undefined, undefined, undefined, undefined]);
    expect(parts.decodeMs).toBeCloseTo(5);
    expect(split(host, 1, at(5, 1, 1), at(5, 1, 1), []).decodeMs).toBeUndefined();
  });

  test("the selected pair is found by the transport, else by nomination", () => {
    const pair = { type: "candidate-pair", id: "p1", nominated: true };
    const other = { type: "candidate-pair", id: "p2", nominated: false };
    const transport = { type: "transport", id: "t", selectedCandidatePairId: "p2" };
    expect(readReports([pair, other, transport]).pair?.id).toBe("p2");
    expect(readReports([pair, other]).pair?.id).toBe("p1");
    expect(readReports([]).video).toBeUndefined();
  });

  test("what the instance says about itself may have gaps", () => {
    expect(readHostStats({ type: "host-stats", encode_ms: 3, bitrate_kbps: "many" })).toEqual({
      capture_ms: 0,
      encode_ms: 3,
      send_ms: 0,
      bitrate_kbps: 0,
      estimate_kbps: 0,
      encoder: "unknown",
    });
    expect(readHostStats({ type: "pong" })).toBeUndefined();
  });
});

describe("frames", () => {
  const pixels = (...colours: number[][]) => Uint8ClampedArray.from(colours.flatMap((colour) => [...colour, 255]));
  test.each([
    ["black", pixels([0, 0, 0], [0, 0, 0]), true],
    ["a flat colour with the noise of compression", pixels([120, 60, 30], [124, 62, 28], [118, 55, 33]), true],
    ["a faint line on black", pixels([0, 0, 0], [0, 0, 0], [40, 40, 40]), false],
    ["two colours of the same brightness", pixels([200, 0, 0], [0, 0, 200]), false],
  ])("%s", (_name, rgba, blank) => expect(isBlank(rgba)).toBe(blank));
});

describe("steps", () => {
  test("the next step is the first that was not reached", () => {
    expect(nextStep([])).toBe("created");
    expect(nextStep([{ step: "created", ms: 1 }, { step: "socket", ms: 2 }])).toBe("discover");
  });
});

describe("cursor", () => {
  test("good ones are read", () => {
    expect(readCursor({ kind: "hidden" })).toEqual({ kind: "hidden" });
    expect(readCursor({ kind: "named", name: "text" })).toEqual({ kind: "named", name: "text" });
    const image = readCursor({ kind: "image", width: 1, height: 1, hot_x: 0, hot_y: 0, rgba_base64: btoa("abcd") });
    expect(image?.kind === "image" && "rgba" in image.data && [...image.data.rgba]).toEqual([97, 98, 99, 100]);
  });
  test.each([
    {},
    { kind: "named" },
    { kind: "named", name: "url(http://x)" },
    { kind: "image", width: 0, height: 1, png_base64: "" },
    { kind: "image", width: 9_999, height: 1, png_base64: "aaaa" },
    { kind: "image", width: 2, height: 2, rgba_base64: "aaaa" },
    { kind: "image", width: 2, height: 2, png_base64: "%%%" },
  ])("%j is not one", (message) => expect(readCursor(message)).toBeUndefined());
});
