// How long decoded pictures wait for this viewer's display. The instance shifts its frame clock by it until its
// pictures arrive just before the display's refresh. `Phase` is pure; `watchRefresh` is the shell that asks the browser
// how often the display refreshes.

/** What the instance is told, in milliseconds: the 10th, 50th and 90th percentile of the pictures since the last message. */
export interface Shown {
  type: "shown";
  low_ms: number;
  mid_ms: number;
  high_ms: number;
  frames: number;
}

const EVERY_MS = 500;
const FEWEST = 20;
/** What took longer than this to come together does not tell where the display's clock is now. */
const STALE_MS = 5_000;
/**
 * Of a display that refreshes faster nothing is said: there is hardly anything to gain, and pictures come early and late by
 * about its whole interval, so that moving them would never end.
 */
const FASTEST_MS = 8;
/** A picture this late still makes the refresh: the browser draws 1 to 2 ms after it. */
const GRACE_MS = 1;
/** Two times that are both on the display's clock differ by whole intervals, give or take what browsers round off. */
const TOLERANCE_MS = 1;

const modulo = (value: number, by: number): number => ((value % by) + by) % by;

/** Nearest rank; `sorted` is not empty. */
const percentile = (sorted: readonly number[], share: number): number =>
  Math.round((sorted[Math.ceil(share * sorted.length) - 1] ?? 0) * 10) / 10;

/**
 * Milliseconds from the end of decoding to the display's next refresh; nothing when the browser does not say enough.
 *
 * Chromium (seen with 156, compared with a trace of its compositor) gives a stream of low latency out like this:
 * `presentationTime` is when the compositor took the picture over, 0.3 ms after decoding whatever the display does, so
 * it knows nothing of the wait. `expectedDisplayTime` is on the display's clock to a tenth of a millisecond, but it is
 * a forecast that is one interval further in one connection than in the next, for pictures that are drawn equally late.
 * `now` is on that clock too, but late by an interval whenever the page is busy. What all of them agree about is the
 * clock, so the wait is how far the end of decoding is from its next tick: pictures are drawn 1 to 2 ms after that.
 * A browser whose `expectedDisplayTime` is not on the clock means something else by it, and nothing is made of it.
 */
export function waitOf(now: number, metadata: VideoFrameCallbackMetadata, refreshMs: number): number | undefined {
  const { receiveTime, processingDuration, expectedDisplayTime } = metadata;
  if (receiveTime === undefined || receiveTime <= 0 || processingDuration === undefined) return undefined;
  const off = modulo(expectedDisplayTime - now + refreshMs / 2, refreshMs) - refreshMs / 2;
  if (!(Math.abs(off) <= TOLERANCE_MS)) return undefined;
  const decoded = receiveTime + processingDuration * 1000;
  return Math.max(0, modulo(expectedDisplayTime - decoded + GRACE_MS, refreshMs) - GRACE_MS);
}

/** Collects what the pictures say, and tells when there is something to report. */
export class Phase {
  #refreshMs: number | undefined;
  #waits: number[] = [];
  #since: number | undefined;
  #toldAt = Number.NEGATIVE_INFINITY;

  /** Milliseconds between two refreshes of the display. */
  refresh(ms: number): void {
    this.#refreshMs = ms;
  }

  /** One picture, as requestVideoFrameCallback tells it. The message that is due with it, if one is. */
  frame(now: number, metadata: VideoFrameCallbackMetadata): Shown | undefined {
    if (this.#refreshMs === undefined || this.#refreshMs < FASTEST_MS) return undefined;
    const wait = waitOf(now, metadata, this.#refreshMs);
    if (wait === undefined) return undefined;
    if (this.#since === undefined || now - this.#since > STALE_MS) {
      this.#since = now;
      this.#waits = [];
    }
    this.#waits.push(wait);
    if (this.#waits.length < FEWEST || now - this.#toldAt < EVERY_MS) return undefined;
    const sorted = this.#waits.sort((a, b) => a - b);
    this.#toldAt = now;
    this.#since = undefined;
    this.#waits = [];
    return {
      type: "shown",
      low_ms: percentile(sorted, 0.1),
      mid_ms: percentile(sorted, 0.5),
      high_ms: percentile(sorted, 0.9),
      frames: sorted.length,
    };
  }
}

/**
 * The interval between refreshes, from the times of animation frames one after another; nothing when they are too few
 * or make no sense. A busy page misses some, so a difference may be several intervals.
 */
export function refreshOf(times: readonly number[]): number | undefined {
  const steps = times.slice(1).map((time, i) => time - (times[i] ?? time)).filter((step) => step > 1);
  if (steps.length < 8) return undefined;
  const one = [...steps].sort((a, b) => a - b)[steps.length >> 2] ?? 0;
  const intervals = steps.reduce((sum, step) => sum + Math.round(step / one), 0);
  const mean = steps.reduce((sum, step) => sum + step, 0) / intervals;
  return mean >= 2 && mean <= 50 ? mean : undefined;
}

/** Enough to see the interval through some noise, over in a quarter of a second. */
const SAMPLES = 17;
/** A window may be moved to another display. */
const AGAIN_MS = 10_000;

/** Measures the interval now and then until the returned function is called. */
export function watchRefresh(report: (ms: number) => void): () => void {
  let handle = 0;
  let times: number[] = [];
  const next = (now: number) => {
    times.push(now);
    if (times.length < SAMPLES) {
      handle = requestAnimationFrame(next);
      return;
    }
    const ms = refreshOf(times);
    times = [];
    handle = 0;
    if (ms !== undefined) report(ms);
  };
  const begin = () => {
    // In a page that is not seen the last measurement still waits for its frames.
    if (handle === 0) handle = requestAnimationFrame(next);
  };
  begin();
  const timer = setInterval(begin, AGAIN_MS);
  return () => {
    clearInterval(timer);
    cancelAnimationFrame(handle);
  };
}
