import { describe, expect, test } from "vitest";
import { Wheel } from "./wheel";

const pixels = (deltaY: number, wheelDeltaY?: number) => ({
  deltaX: 0,
  deltaY,
  deltaMode: 0,
  ...(wheelDeltaY === undefined ? {} : { wheelDeltaY }),
});
const total = (wheel: Wheel, deltas: number[]) =>
  deltas.flatMap((delta) => wheel.add(pixels(delta))).reduce((sum, click) => sum + click.y, 0);

describe("wheel", () => {
  test("down is negative, right is negative", () => {
    expect(new Wheel().add({ deltaX: 0, deltaY: 100, deltaMode: 0 })).toEqual([{ x: 0, y: -1 }]);
    expect(new Wheel().add({ deltaX: -100, deltaY: 0, deltaMode: 0 })).toEqual([{ x: 1, y: 0 }]);
  });

  test("the small steps of a touch pad add up to clicks", () => {
    const wheel = new Wheel();
    expect(total(wheel, [30, 30, 30])).toBe(0);
    expect(total(wheel, [30])).toBe(-1);
    expect(total(new Wheel(), Array(50).fill(-10))).toBe(5);
  });

  test("a notch is one click whatever number of pixels the browser makes of it", () => {
    const wheel = new Wheel();
    for (let i = 0; i < 20; i++) expect(wheel.add(pixels(53, -120))).toEqual([{ x: 0, y: -1 }]);
    expect(wheel.add(pixels(-240, 240))).toEqual([{ x: 0, y: 1 }, { x: 0, y: 1 }]);
  });

  test("lines and pages are whole clicks", () => {
    expect(new Wheel().add({ deltaX: 0, deltaY: 3, deltaMode: 1 })).toEqual([{ x: 0, y: -1 }]);
    expect(new Wheel().add({ deltaX: 0, deltaY: 1, deltaMode: 1 })).toEqual([{ x: 0, y: -1 }]);
    expect(new Wheel().add({ deltaX: 0, deltaY: -6, deltaMode: 1 })).toHaveLength(2);
    expect(new Wheel().add({ deltaX: 0, deltaY: -1, deltaMode: 2 })).toEqual([{ x: 0, y: 1 }]);
  });

  test("turning around answers at once", () => {
    const wheel = new Wheel();
    wheel.add(pixels(90));
    expect(total(wheel, [-100])).toBe(1);
  });

  test("every click is −1, 0 or 1 and absurd numbers do not flood", () => {
    const clicks = new Wheel().add({ deltaX: -1e9, deltaY: 1e9, deltaMode: 0 });
    expect(clicks).toHaveLength(10);
    for (const { x, y } of clicks) expect([x, y]).toEqual([1, -1]);
    for (const bad of [Number.NaN, Number.POSITIVE_INFINITY]) {
      expect(new Wheel().add({ deltaX: bad, deltaY: bad, deltaMode: 0 })).toEqual([]);
    }
  });
});
