// From wheel events to clicks (stream-protocol section 7.4). Notched wheels report large steps, touch pads a
// stream of small ones; both become clicks of −1, 0 or 1 with the sign the protocol wants. Pure.

/** The part of a WheelEvent that matters. `wheelDelta*` is old and not everywhere, but says whether the wheel has notches. */
export interface WheelFacts {
  deltaX: number;
  deltaY: number;
  /** 0 pixels, 1 lines, 2 pages. */
  deltaMode: number;
  wheelDeltaX?: number;
  wheelDeltaY?: number;
}

export interface Click {
  /** 1 is left. */
  x: number;
  /** 1 is up. */
  y: number;
}

const PIXELS_PER_CLICK = 100;
const LINES_PER_CLICK = 3;
/** `wheelDelta` of one notch. */
const NOTCH = 120;
/** One event may not flood the channel, whatever a driver reports. */
const MAX_CLICKS = 10;

export class Wheel {
  #x = 0;
  #y = 0;

  /** The clicks to send for one event, in order. */
  add(facts: WheelFacts): Click[] {
    const x = this.#axis("x", facts.deltaX, facts.deltaMode, facts.wheelDeltaX);
    const y = this.#axis("y", facts.deltaY, facts.deltaMode, facts.wheelDeltaY);
    const clicks: Click[] = [];
    for (let i = 0; i < Math.max(Math.abs(x), Math.abs(y)); i++) {
      clicks.push({ x: i < Math.abs(x) ? -Math.sign(x) + 0 : 0, y: i < Math.abs(y) ? -Math.sign(y) + 0 : 0 });
    }
    return clicks;
  }

  #axis(axis: "x" | "y", delta: number, mode: number, legacy: number | undefined): number {
    if (delta === 0 || !Number.isFinite(delta)) return 0;
    let steps: number;
    if (mode === 0 && legacy !== undefined && legacy !== 0 && legacy % NOTCH === 0) {
      // A wheel with notches: the number of pixels is the browser's taste, the number of notches is not.
      this.#rest(axis, 0);
      steps = -legacy / NOTCH;
    } else {
      const unit = mode === 0 ? PIXELS_PER_CLICK : mode === 1 ? LINES_PER_CLICK : 1;
      const kept = axis === "x" ? this.#x : this.#y;
      // Turning around must answer at once, not after the rest of the other direction is used up.
      const sum = (Math.sign(kept) === Math.sign(delta) ? kept : 0) + delta / unit;
      // Lines and pages come from wheels: a part of a click there would be an event without effect.
      steps = mode === 0 ? Math.trunc(sum + Math.sign(sum) * 1e-9) : Math.round(sum) || Math.sign(delta);
      this.#rest(axis, mode === 0 ? sum - steps : 0);
    }
    return Math.max(-MAX_CLICKS, Math.min(MAX_CLICKS, steps)) + 0;
  }

  #rest(axis: "x" | "y", value: number): void {
    if (axis === "x") this.#x = value;
    else this.#y = value;
  }
}
