// Which keys are held, and what to send when that changes (stream-protocol section 7.1). Pure.
//
// Modifiers are sent as keys of their own, at once. Browsers lose releases (a shortcut of the system took
// the focus away, macOS swallows them while Meta is down), so every event's modifier flags are compared
// with what is held here and the difference is sent first.

import { type Key, type KeyFacts, type KeyPress, SHIFT_LEFT, isModifier, keyFor } from "./keys";

export interface KeyMessage {
  key: Key;
  pressed: boolean;
}

export interface ModifierFacts {
  ctrl: boolean;
  shift: boolean;
  alt: boolean;
  meta: boolean;
  altGraph: boolean;
}

/** A key event, taken apart. */
export interface KeyEventFacts extends KeyFacts, ModifierFacts {
  /** Milliseconds. */
  timeStamp: number;
}

/** On Windows AltGr arrives as Control and Alt; the invented Control has the same time. */
const INVENTED_CONTROL_MS = 5;

export class Keyboard {
  /** By `KeyboardEvent.code`, in the order of pressing. */
  readonly #held = new Map<string, KeyPress>();
  #controlDownAt = Number.NEGATIVE_INFINITY;

  /** `layout` is the instance's, as an xkb name. */
  constructor(public layout = "us") {}

  down(event: KeyEventFacts): KeyMessage[] {
    const messages = isModifier(event.code) ? [] : this.modifiers(event);
    if (event.code === "ControlLeft") this.#controlDownAt = event.timeStamp;
    if (event.code === "AltRight" && event.timeStamp - this.#controlDownAt <= INVENTED_CONTROL_MS) {
      messages.push(...this.#release("ControlLeft"));
    }
    if (this.#held.has(event.code)) return messages; // The instance repeats keys by itself.
    const press = keyFor(event, this.layout);
    if (!press) return messages;
    this.#held.set(event.code, press);
    if (press.shift) messages.push({ key: SHIFT_LEFT, pressed: true });
    messages.push({ key: press.key, pressed: true });
    return messages;
  }

  up(event: KeyEventFacts): KeyMessage[] {
    const messages = this.#release(event.code);
    if (event.code.startsWith("Meta")) {
      // macOS sends no release for keys that go up while Meta is held.
      for (const code of [...this.#held.keys()]) {
        if (!isModifier(code)) messages.push(...this.#release(code));
      }
    }
    return messages;
  }

  /** Brings the held modifiers in line with the flags of a key or pointer event. */
  modifiers(flags: ModifierFacts): KeyMessage[] {
    // With AltGr down some systems report Control and Alt as well; then only missing releases are trusted.
    return [
      ...this.#compare("Control", flags.ctrl, !flags.altGraph),
      ...this.#compare("Shift", flags.shift, true),
      ...this.#compare("Alt", flags.alt || flags.altGraph, !flags.altGraph),
      ...this.#compare("Meta", flags.meta, true),
    ];
  }

  /** Releases everything, the latest first. */
  releaseAll(): KeyMessage[] {
    return [...this.#held.keys()].reverse().flatMap((code) => this.#release(code));
  }

  get held(): number {
    return this.#held.size;
  }

  #compare(name: string, down: boolean, mayPress: boolean): KeyMessage[] {
    const sides = [`${name}Left`, `${name}Right`].filter((code) => this.#held.has(code));
    if (!down) return sides.flatMap((code) => this.#release(code));
    if (sides.length > 0 || !mayPress) return [];
    const code = `${name}Left`;
    const press = keyFor({ code, key: name, numLock: false }, this.layout);
    if (!press) return [];
    this.#held.set(code, press);
    return [{ key: press.key, pressed: true }];
  }

  #release(code: string): KeyMessage[] {
    const press = this.#held.get(code);
    if (!press) return [];
    this.#held.delete(code);
    const messages: KeyMessage[] = [{ key: press.key, pressed: false }];
    // The Shift that was only lent goes back, unless the person holds it by now.
    if (press.shift && !this.#held.has("ShiftLeft")) messages.push({ key: SHIFT_LEFT, pressed: false });
    return messages;
  }
}
