import { describe, expect, test } from "vitest";
import type { CheckStatus } from "../api";
import { summary } from "./check";
import { screenFor } from "./displays";
import { titleOf } from "./gallery";
import { guessLayout } from "./layouts";
import { lines, rate } from "./panel";
import { sentence } from "./player";
import { loginCode, parseRoute, routes } from "./routes";

describe("routes", () => {
  test.each([
    ["", { view: "gallery" }],
    ["#/", { view: "gallery" }],
    ["#/app/moving%20scene", { view: "launch", app: "moving scene" }],
    ["#/session/cp5oh64ut74s9inbvt3g", { view: "join", session: "cp5oh64ut74s9inbvt3g" }],
    ["#/session/..%2Fx", { view: "gallery" }],
    ["#/app/%E0%A4%A", { view: "gallery" }],
    ["#/app/", { view: "gallery" }],
    ["#/app/a/b", { view: "gallery" }],
  ])("%s", (hash, route) => expect(parseRoute(hash)).toEqual(route));

  test("what is built is read again", () => {
    expect(parseRoute(routes.launch("ä/ö?#"))).toEqual({ view: "launch", app: "ä/ö?#" });
  });

  test("the code is found in the fragment only where there is one", () => {
    expect(loginCode("#code=AbC-1_2")).toBe("AbC-1_2");
    expect(loginCode("#code=")).toBeUndefined();
    expect(loginCode("#/session/x")).toBeUndefined();
  });
});

describe("layouts", () => {
  const keys = (map: Record<string, string>) => ({ get: (code: string) => map[code] });
  test.each([
    [undefined, "de-DE", "de"],
    [undefined, "de-CH", "ch"],
    [undefined, "en-GB", "gb"],
    [undefined, "pt-BR", "br"],
    [undefined, "xx", "us"],
    [keys({ KeyQ: "q", KeyY: "z" }), "en-US", "de"],
    [keys({ KeyQ: "a", KeyY: "y" }), "en-US", "fr"],
    [keys({ KeyQ: "a", KeyY: "y" }), "nl-BE", "be"],
    [keys({ KeyQ: "q", KeyY: "y" }), "de-DE", "us"],
    [keys({ KeyQ: "q", KeyY: "y" }), "es-MX", "es"],
    [keys({}), "it", "it"],
  ])("%o in %s is %s", (map, language, layout) => expect(guessLayout(map, language)).toBe(layout));
});

describe("displays", () => {
  const window = (width: number, height: number, ratio = 1) => screenFor("window", { width, height, ratio });
  test("sides are even, and never larger than the gateway allows", () => {
    expect(window(1279, 719)).toMatchObject({ width: 1278, height: 718 });
    expect(window(2560, 1400, 2)).toMatchObject({ width: 3840, height: 2100 });
    expect(window(10, 10)).toMatchObject({ width: 320, height: 320 });
    expect(screenFor("nonsense", { width: 0, height: 0, ratio: 1 })).toMatchObject({ width: 1280, height: 720, fps: 60 });
  });
});

describe("words", () => {
  test("names become headings", () => {
    expect(titleOf({ name: "moving-scene" })).toBe("Moving scene");
    expect(titleOf({ name: "x", title: "X 11" })).toBe("X 11");
  });
  test("messages become sentences", () => {
    expect(sentence(" no route ")).toBe("No route.");
    expect(sentence("Why?")).toBe("Why?");
    expect(sentence("")).toBe("");
  });
  test.each<[CheckStatus[], string]>([
    [["ok", "skipped"], "Nothing is wrong"],
    [["ok", "warning"], "one thing is not"],
    [["warning", "warning"], "2 things are not"],
    [["warning", "failed", "failed"], "past the step “1”"],
  ])("the checks %j come to a sentence", (statuses, words) => {
    expect(summary(statuses.map((status, i) => ({ step: String(i), status, text: "" })))).toContain(words);
  });
  test("the panel shows what is known and a dash for the rest", () => {
    expect(rate(4_250)).toBe("4.3 Mbit/s");
    expect(rate(20.4)).toBe("20 kbit/s");
    const shown = new Map(
      lines({
        at: 0,
        width: 1280,
        height: 720,
        fps: 59.6,
        displayedFps: 60,
        framesDecoded: 1,
        framesDropped: 0,
        keyFrames: 1,
        bitrateKbps: 900,
        rttMs: undefined,
        loss: 0.015,
        packetsLost: 3,
        jitterMs: 1.26,
        freezes: 0,
        freezeMs: 0,
        codec: "H264",
        decoder: undefined,
        path: undefined,
        audio: undefined,
        split: { hostMs: undefined, networkMs: undefined, decodeMs: undefined, displayMs: undefined, totalMs: undefined },
        host: undefined,
      }),
    );
    expect(shown.get("Picture")).toBe("1280 × 720, H264");
    expect(shown.get("Round trip")).toBe("–");
    expect(shown.get("Loss")).toBe("1.5 % (3 packets)");
    expect(shown.get("Jitter")).toBe("1.3 ms");
  });
});
