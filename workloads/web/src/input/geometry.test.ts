import { describe, expect, test } from "vitest";
import { RelativeMotion, contained, scaleOf, toPicture } from "./geometry";

const picture = { width: 1280, height: 720 };
/** Twice as wide as the picture needs: bars left and right. */
const wide = { left: 100, top: 50, width: 1280, height: 360 };
const tall = { left: 0, top: 0, width: 640, height: 960 };

describe("geometry", () => {
  test("the picture lies in the middle, with bars beside it", () => {
    expect(contained(wide, picture)).toEqual({ left: 420, top: 50, width: 640, height: 360 });
    expect(contained(tall, picture)).toEqual({ left: 0, top: 300, width: 640, height: 360 });
  });

  test.each([
    [{ x: 420, y: 50 }, { x: 0, y: 0, inside: true }],
    [{ x: 740, y: 230 }, { x: 640, y: 360, inside: true }],
    [{ x: 420.25, y: 50 }, { x: 0.5, y: 0, inside: true }],
    [{ x: 1060, y: 410 }, { x: 1279, y: 719, inside: false }],
    [{ x: 0, y: 9_999 }, { x: 0, y: 719, inside: false }],
    [{ x: 1_059.9, y: 409.9 }, { x: 1_279, y: 719, inside: true }],
  ])("page position %o is picture position %o", (client, expected) => {
    const at = toPicture(client, wide, picture);
    expect(at?.inside).toBe(expected.inside);
    expect(at?.x).toBeCloseTo(expected.x, 5);
    expect(at?.y).toBeCloseTo(expected.y, 5);
  });

  test("without a picture or a place for it there is no position", () => {
    expect(toPicture({ x: 1, y: 1 }, wide, { width: 0, height: 0 })).toBeUndefined();
    expect(toPicture({ x: 1, y: 1 }, { ...wide, height: 0 }, picture)).toBeUndefined();
    expect(scaleOf(wide, { width: 0, height: 0 })).toBe(0);
  });

  test("relative movement is in pixels of the picture and no part of it is lost", () => {
    const motion = new RelativeMotion();
    const scale = scaleOf(tall, picture); // shown at half its size
    expect(scale).toBe(0.5);
    expect(motion.add(3, -1, scale)).toEqual({ x: 6, y: -2 });
    expect(motion.add(0.25, 0, 0.5)).toEqual({ x: 0, y: 0 });
    expect(motion.add(0.25, 0, 0.5)).toEqual({ x: 1, y: 0 });
    expect(motion.add(5, 5, 0)).toEqual({ x: 0, y: 0 });
  });
});
