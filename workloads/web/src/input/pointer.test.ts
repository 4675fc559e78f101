import { describe, expect, test } from "vitest";
import { Buttons, Fingers, MoveGate } from "./pointer";

describe("buttons", () => {
  test.each([
    [1, 1],
    [4, 2],
    [2, 3],
    [8, 4],
    [16, 5],
  ])("bit %i is button %i of the protocol", (bit, button) => {
    const buttons = new Buttons();
    expect(buttons.change(bit)).toEqual([{ button, pressed: true }]);
    expect(buttons.change(bit)).toEqual([]);
    expect(buttons.change(0)).toEqual([{ button, pressed: false }]);
  });

  test("all are released at once", () => {
    const buttons = new Buttons();
    buttons.change(1 | 2);
    expect(buttons.releaseAll()).toEqual([
      { button: 1, pressed: false },
      { button: 3, pressed: false },
    ]);
  });
});

describe("fingers", () => {
  test("get the lowest free slot and say which one was the last", () => {
    const fingers = new Fingers();
    expect([fingers.down(501), fingers.down(777), fingers.down(501)]).toEqual([0, 1, 0]);
    expect(fingers.up(501)).toEqual({ id: 0, last: false });
    expect(fingers.down(9)).toBe(0);
    expect(fingers.up(777)).toEqual({ id: 1, last: false });
    expect(fingers.up(9)).toEqual({ id: 0, last: true });
    expect(fingers.up(9)).toBeUndefined();
  });

  test("the eleventh finger is not sent", () => {
    const fingers = new Fingers();
    for (let id = 0; id < 10; id++) expect(fingers.down(id)).toBe(id);
    expect(fingers.down(10)).toBeUndefined();
    expect(fingers.releaseAll().at(-1)).toEqual({ id: 9, last: true });
  });
});

describe("move gate", () => {
  const gate = () => new MoveGate<{ x: number; rx: number }>(4, (older, newer) => ({ ...newer, rx: older.rx + newer.rx }));

  test("the first move goes at once, the next ones wait and are merged", () => {
    const moves = gate();
    expect(moves.offer({ x: 1, rx: 1 }, 100)).toEqual({ x: 1, rx: 1 });
    expect(moves.offer({ x: 2, rx: 1 }, 101)).toBeUndefined();
    expect(moves.offer({ x: 5, rx: 3 }, 102)).toBeUndefined();
    expect(moves.due(102)).toBe(2);
    expect(moves.flush(104)).toEqual({ x: 5, rx: 4 });
    expect(moves.due(104)).toBeUndefined();
  });

  test("after the gap a move goes at once again", () => {
    const moves = gate();
    moves.offer({ x: 1, rx: 1 }, 100);
    expect(moves.offer({ x: 2, rx: 1 }, 104)).toEqual({ x: 2, rx: 1 });
    expect(moves.flush(105)).toBeUndefined();
  });
});
