import { describe, expect, test } from "vitest";
import { Keyboard, type KeyEventFacts } from "./keyboard";
import { keyFor } from "./keys";

const press = (code: string, key = "", numLock = false) => keyFor({ code, key, numLock }, "us");

describe("keys", () => {
  test.each([
    ["KeyA", 4],
    ["KeyZ", 29],
    ["Digit1", 30],
    ["Digit9", 38],
    ["Digit0", 39],
    ["Enter", 40],
    ["Space", 44],
    ["Quote", 50],
    ["Semicolon", 51],
    ["Comma", 54],
    ["CapsLock", 57],
    ["F1", 58],
    ["F12", 69],
    ["PrintScreen", 70],
    ["ArrowRight", 79],
    ["ArrowUp", 82],
    ["ControlLeft", 83],
    ["AltRight", 87],
    ["NumLock", 88],
  ])("%s has the original's number %i", (code, number) => {
    expect(press(code)).toEqual({ key: { code: number }, shift: false });
  });

  test.each([
    ["Backquote", 41],
    ["IntlBackslash", 86],
    ["F13", 183],
    ["F24", 194],
    ["ShiftRight", 54],
    ["ControlRight", 97],
    ["MetaRight", 126],
    ["NumpadEnter", 96],
    ["NumpadAdd", 78],
  ])("%s has no number there and goes as the Linux code %i", (code, evdev) => {
    expect(press(code)).toEqual({ key: { evdev }, shift: false });
  });

  test("no number is given twice", () => {
    const names = ["KeyA", "Digit0", "F1", "Backquote", "IntlBackslash", "ShiftRight", "ShiftLeft", "AltRight"];
    const seen = names.map((name) => JSON.stringify(press(name)?.key));
    expect(new Set(seen).size).toBe(names.length);
  });

  test("keys that no keyboard has are not sent", () => {
    for (const code of ["", "Unidentified", "Fn", "constructor", "__proto__", "toString"]) {
      expect(press(code)).toBeUndefined();
    }
  });

  test("the number pad gives digits with NumLock and navigation without", () => {
    expect(press("Numpad7", "7", true)?.key).toEqual({ code: 36 });
    expect(press("Numpad7", "Home", false)?.key).toEqual({ code: 74 });
    expect(press("Numpad7", "Home", true)?.key).toEqual({ code: 74 }); // Shift turns NumLock around.
    expect(press("Numpad5", "Clear", false)).toBeUndefined();
    expect(press("NumpadDecimal", ",", true)?.key).toEqual({ code: 54 });
    expect(press("NumpadDecimal", "Delete", false)?.key).toEqual({ code: 76 });
  });

  test("digits of the number pad borrow Shift where the digit row needs it", () => {
    expect(keyFor({ code: "Numpad1", key: "1", numLock: true }, "fr")).toEqual({ key: { code: 30 }, shift: true });
    expect(keyFor({ code: "Numpad1", key: "End", numLock: false }, "fr")?.shift).toBe(false);
    expect(keyFor({ code: "Digit1", key: "&", numLock: true }, "fr")?.shift).toBe(false);
  });
});

const facts = (code: string, more: Partial<KeyEventFacts> = {}): KeyEventFacts => ({
  code,
  key: "",
  numLock: false,
  ctrl: false,
  shift: false,
  alt: false,
  meta: false,
  altGraph: false,
  timeStamp: 1_000,
  ...more,
});
const brief = (messages: { key: object; pressed: boolean }[]) =>
  messages.map(({ key, pressed }) => `${pressed ? "+" : "-"}${Object.values(key)[0]}`);

describe("keyboard", () => {
  test("a modifier is sent at once and alone", () => {
    const keyboard = new Keyboard();
    expect(brief(keyboard.down(facts("ShiftLeft", { shift: true })))).toEqual(["+84"]);
    expect(brief(keyboard.down(facts("KeyA", { shift: true })))).toEqual(["+4"]);
    expect(brief(keyboard.up(facts("ShiftLeft")))).toEqual(["-84"]);
    expect(brief(keyboard.up(facts("KeyA")))).toEqual(["-4"]);
    expect(keyboard.held).toBe(0);
  });

  test("a repeated key is sent once", () => {
    const keyboard = new Keyboard();
    expect(keyboard.down(facts("KeyA"))).toHaveLength(1);
    expect(keyboard.down(facts("KeyA"))).toHaveLength(0);
  });

  test("a release that was lost is made good at the next key", () => {
    const keyboard = new Keyboard();
    keyboard.down(facts("ControlLeft", { ctrl: true }));
    expect(brief(keyboard.down(facts("KeyA")))).toEqual(["-83", "+4"]);
  });

  test("a modifier that was down before the picture had the focus is pressed first", () => {
    const keyboard = new Keyboard();
    expect(brief(keyboard.down(facts("KeyC", { ctrl: true })))).toEqual(["+83", "+6"]);
    // The right one was the real one; its release is noticed by the flags.
    expect(brief(keyboard.up(facts("ControlRight")))).toEqual([]);
    expect(brief(keyboard.down(facts("KeyC")))).toEqual(["-83"]); // KeyC is still held.
  });

  test("AltGr of Windows does not hold Control", () => {
    const keyboard = new Keyboard("de");
    expect(brief(keyboard.down(facts("ControlLeft", { ctrl: true, timeStamp: 50 })))).toEqual(["+83"]);
    expect(brief(keyboard.down(facts("AltRight", { timeStamp: 50, altGraph: true })))).toEqual(["-83", "+87"]);
    const q = facts("KeyQ", { ctrl: true, alt: true, altGraph: true, timeStamp: 90 });
    expect(brief(keyboard.down(q))).toEqual(["+20"]);
  });

  test("keys that went up while Meta was held are released with it", () => {
    const keyboard = new Keyboard();
    keyboard.down(facts("MetaLeft", { meta: true }));
    keyboard.down(facts("KeyC", { meta: true }));
    expect(brief(keyboard.up(facts("MetaLeft")))).toEqual(["-86", "-6"]);
    expect(keyboard.held).toBe(0);
  });

  test("everything is released, the latest first, and a borrowed Shift with it", () => {
    const keyboard = new Keyboard("fr");
    keyboard.down(facts("KeyA"));
    expect(brief(keyboard.down(facts("Numpad1", { key: "1", numLock: true })))).toEqual(["+84", "+30"]);
    expect(brief(keyboard.releaseAll())).toEqual(["-30", "-84", "-4"]);
    expect(keyboard.releaseAll()).toEqual([]);
  });

  test("a release without a press says nothing", () => {
    expect(new Keyboard().up(facts("KeyA"))).toEqual([]);
  });
});
