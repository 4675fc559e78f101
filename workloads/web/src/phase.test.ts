import { afterEach, beforeEach, describe, expect, test, vi } from "vitest";
import { Phase, refreshOf, waitOf, watchRefresh } from "./phase";

const T = 1000 / 60;

/** A picture that was decoded `wait` before a refresh, in a browser whose forecast is `ahead` intervals further. */
function picture(tick: number, wait: number, ahead = 1): VideoFrameCallbackMetadata {
  const now = tick * T;
  const decoded = now - wait;
  return {
    receiveTime: decoded - 1.5,
    processingDuration: 0.0015,
    presentationTime: decoded + 0.3,
    expectedDisplayTime: now + ahead * T,
    width: 1280,
    height: 720,
    mediaTime: 0,
    presentedFrames: tick,
  };
}

describe("the wait of one picture", () => {
  test("is the same whichever refresh the browser forecasts and however late the page is called", () => {
    for (const ahead of [0, 1, 2]) {
      for (const late of [0, 1]) expect(waitOf((100 + late) * T, picture(100, 6, ahead), T)).toBeCloseTo(6);
    }
    expect(waitOf(100 * T, picture(100, 16.7 - 3), T)).toBeCloseTo(13.7);
  });

  test("is of the display's interval, not of the stream's", () => {
    expect(waitOf(100 * T, picture(100, 11), T / 2)).toBeCloseTo(11 - T / 2);
  });

  test("of a picture that just makes it is 0, of one that just missed is nearly an interval", () => {
    expect(waitOf(100 * T, picture(100, -0.8), T)).toBe(0);
    expect(waitOf(100 * T, picture(100, -1.2), T)).toBeCloseTo(T - 1.2);
  });

  test("is not known where the browser does not say when the picture came or how long it was decoded", () => {
    const { receiveTime: _r, ...unreceived } = picture(100, 6);
    const { processingDuration: _p, ...undecoded } = picture(100, 6);
    expect(waitOf(100 * T, unreceived, T)).toBeUndefined();
    expect(waitOf(100 * T, undecoded, T)).toBeUndefined();
    expect(waitOf(100 * T, { ...picture(100, 6), receiveTime: 0 }, T)).toBeUndefined();
  });

  test("is not known where the forecast is not on the display's clock", () => {
    const other = { ...picture(100, 6), expectedDisplayTime: 100 * T + 5 };
    expect(waitOf(100 * T, other, T)).toBeUndefined();
    expect(waitOf(100 * T, { ...other, expectedDisplayTime: Number.NaN }, T)).toBeUndefined();
    // Browsers round to a tenth of a millisecond.
    expect(waitOf(100 * T, { ...other, expectedDisplayTime: 101 * T - 0.1 }, T)).toBeCloseTo(5.9);
  });
});

describe("the message", () => {
  const run = (phase: Phase, from: number, to: number, wait: (tick: number) => number = () => 6) => {
    const sent = [];
    for (let tick = from; tick < to; tick++) {
      const message = phase.frame(tick * T, picture(tick, wait(tick)));
      if (message) sent.push(message);
    }
    return sent;
  };
  const ready = () => {
    const phase = new Phase();
    phase.refresh(T);
    return phase;
  };

  test("has percentiles of the pictures since the last one, and comes every 500 ms at most", () => {
    const phase = ready();
    // Waits of 1, 2 … 10 ms in turn.
    const sent = run(phase, 1000, 1100, (tick) => 1 + (tick % 10));
    expect(sent).toEqual([
      { type: "shown", low_ms: 1, mid_ms: 5, high_ms: 9, frames: 20 },
      { type: "shown", low_ms: 1, mid_ms: 5, high_ms: 9, frames: 30 },
      { type: "shown", low_ms: 1, mid_ms: 5, high_ms: 9, frames: 30 },
    ]);
  });

  test("waits for 20 pictures", () => {
    const phase = ready();
    expect(run(phase, 10, 29)).toEqual([]);
    expect(run(phase, 29, 30)).toHaveLength(1);
    // One picture a refresh for 300 ms, then nothing for a while, then the rest.
    expect(run(phase, 60, 79)).toEqual([]);
    expect(run(phase, 179, 180)).toHaveLength(1);
  });

  test("is not made of pictures of long ago", () => {
    const phase = ready();
    expect(run(phase, 10, 29, () => 2)).toEqual([]);
    expect(run(phase, 1000, 1019, () => 9)).toEqual([]);
    expect(run(phase, 1019, 1020, () => 9)).toEqual([{ type: "shown", low_ms: 9, mid_ms: 9, high_ms: 9, frames: 20 }]);
  });

  test("is not made before the display's interval is known", () => {
    const phase = new Phase();
    expect(run(phase, 10, 100)).toEqual([]);
    phase.refresh(T);
    expect(run(phase, 100, 120)).toHaveLength(1);
  });

  test("is not made for a display so fast that pictures jitter by its whole interval", () => {
    const phase = new Phase();
    phase.refresh(1000 / 144);
    expect(run(phase, 10, 100)).toEqual([]);
    phase.refresh(1000 / 120);
    expect(run(phase, 100, 120)).toHaveLength(1);
  });

  test("is not made where the browser does not say enough", () => {
    const phase = ready();
    for (let tick = 10; tick < 100; tick++) {
      const { receiveTime: _r, ...metadata } = picture(tick, 6);
      expect(phase.frame(tick * T, metadata)).toBeUndefined();
    }
  });
});

describe("the display's interval", () => {
  const ticks = (count: number, ms: number) => Array.from({ length: count }, (_, i) => Math.round(i * ms * 10) / 10);

  test("is found through rounding and frames that a busy page missed", () => {
    expect(refreshOf(ticks(17, T))).toBeCloseTo(T, 1);
    expect(refreshOf(ticks(17, 1000 / 144))).toBeCloseTo(1000 / 144, 1);
    expect(refreshOf(ticks(25, T).filter((_, i) => ![3, 7, 8, 14].includes(i)))).toBeCloseTo(T, 1);
  });

  test("is not known from a few frames, or from a page that is hardly drawn", () => {
    expect(refreshOf([])).toBeUndefined();
    expect(refreshOf(ticks(8, T))).toBeUndefined();
    expect(refreshOf(ticks(17, 1000))).toBeUndefined();
  });

  describe("is measured", () => {
    beforeEach(() => {
      vi.useFakeTimers();
      vi.stubGlobal("requestAnimationFrame", (callback: FrameRequestCallback) =>
        setTimeout(() => callback(performance.now()), 10),
      );
      vi.stubGlobal("cancelAnimationFrame", (handle: number) => clearTimeout(handle));
    });
    afterEach(() => {
      vi.useRealTimers();
      vi.unstubAllGlobals();
    });

    test("at once and every ten seconds, with a few frames each, until the end", () => {
      const found: number[] = [];
      const stop = watchRefresh((ms) => found.push(ms));
      vi.advanceTimersByTime(200);
      expect(found).toHaveLength(1);
      expect(found[0]).toBeCloseTo(10);
      expect(vi.getTimerCount()).toBe(1);
      vi.advanceTimersByTime(10_000);
      expect(found).toHaveLength(2);
      vi.advanceTimersByTime(9_850);
      stop();
      expect(vi.getTimerCount()).toBe(0);
    });
  });
});
