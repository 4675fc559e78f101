// The sizes a display can be launched with.

import type { Screen } from "../api";

export const DISPLAYS: readonly (readonly [name: string, title: string])[] = [
  ["720p", "1280 × 720"],
  ["1080p", "1920 × 1080"],
  ["window", "As this window"],
];

/** Even, and within what the gateway allows. */
const side = (pixels: number): number => Math.min(3840, Math.max(320, Math.floor(pixels / 2) * 2));

/** The screen to ask for. `window` is the size that the picture will have in the page, in physical pixels. */
export function screenFor(name: string, window: { width: number; height: number; ratio: number }): Screen {
  const fps = 60;
  const density = 96;
  switch (name) {
    case "1080p":
      return { width: 1920, height: 1080, fps, density };
    case "window": {
      const [width, height] = [window.width * window.ratio, window.height * window.ratio];
      // The longer side may have 3840 pixels, the shorter one 2160; the proportions stay.
      const scale = Math.min(1, 3840 / Math.max(width, height), 2160 / Math.min(width, height));
      return { width: side(width * scale), height: side(height * scale), fps, density };
    }
    default:
      return { width: 1280, height: 720, fps, density };
  }
}

const STORED = "fanlight.display";

export function preferredDisplay(): string {
  const stored = localStorage.getItem(STORED);
  return DISPLAYS.some(([name]) => name === stored) && stored !== null ? stored : "720p";
}

export function rememberDisplay(name: string): void {
  localStorage.setItem(STORED, name);
}
