// From DOM key events to key numbers (stream-protocol section 7.1). Codes name physical positions, so the
// instance's layout decides the characters. Pure: no events are listened to here.

/** A key as it goes on the wire: the original's number, or a Linux key code (our extension). */
export type Key = { code: number } | { evdev: number };

/** `KeyboardEvent.code` → the original's number. */
const CODES: Record<string, number> = {
  Enter: 40,
  Escape: 41,
  Backspace: 42,
  Tab: 43,
  Space: 44,
  Minus: 45,
  Equal: 46,
  BracketLeft: 47,
  BracketRight: 48,
  Backslash: 49,
  Quote: 50,
  Semicolon: 51,
  Comma: 54,
  Period: 55,
  Slash: 56,
  CapsLock: 57,
  PrintScreen: 70,
  ScrollLock: 71,
  Pause: 72,
  Insert: 73,
  Home: 74,
  PageUp: 75,
  Delete: 76,
  End: 77,
  PageDown: 78,
  ArrowRight: 79,
  ArrowLeft: 80,
  ArrowDown: 81,
  ArrowUp: 82,
  ControlLeft: 83,
  ShiftLeft: 84,
  AltLeft: 85,
  MetaLeft: 86,
  AltRight: 87,
  NumLock: 88,
  AudioVolumeDown: 89,
  AudioVolumeUp: 90,
  Power: 91,
  BrowserBack: 92,
};
for (let i = 0; i < 26; i++) CODES[`Key${String.fromCharCode(65 + i)}`] = 4 + i;
for (let i = 1; i <= 9; i++) CODES[`Digit${i}`] = 29 + i;
CODES["Digit0"] = 39;
for (let i = 1; i <= 12; i++) CODES[`F${i}`] = 57 + i;

/** `KeyboardEvent.code` → Linux key code, for keys without a number in the original's table. */
const EVDEV: Record<string, number> = {
  Backquote: 41,
  IntlBackslash: 86,
  IntlRo: 89,
  IntlYen: 124,
  KanaMode: 93,
  Lang1: 122,
  Lang2: 123,
  Convert: 92,
  NonConvert: 94,
  ShiftRight: 54,
  ControlRight: 97,
  MetaRight: 126,
  ContextMenu: 127,
  NumpadAdd: 78,
  NumpadSubtract: 74,
  NumpadMultiply: 55,
  NumpadDivide: 98,
  NumpadEnter: 96,
  NumpadEqual: 117,
  NumpadComma: 121,
  AudioVolumeMute: 113,
  MediaPlayPause: 164,
  MediaTrackNext: 163,
  MediaTrackPrevious: 165,
  MediaStop: 166,
  BrowserForward: 159,
  BrowserRefresh: 173,
  BrowserHome: 172,
  Help: 138,
  Undo: 131,
  Copy: 133,
  Paste: 135,
  Cut: 137,
};
for (let i = 13; i <= 24; i++) EVDEV[`F${i}`] = 183 + (i - 13);

/** Keys of the number pad whose meaning hangs on NumLock: with it a character, without it navigation. */
const NUMPAD: Record<string, { on: string; off: string | undefined }> = {
  Numpad0: { on: "Digit0", off: "Insert" },
  Numpad1: { on: "Digit1", off: "End" },
  Numpad2: { on: "Digit2", off: "ArrowDown" },
  Numpad3: { on: "Digit3", off: "PageDown" },
  Numpad4: { on: "Digit4", off: "ArrowLeft" },
  Numpad5: { on: "Digit5", off: undefined },
  Numpad6: { on: "Digit6", off: "ArrowRight" },
  Numpad7: { on: "Digit7", off: "Home" },
  Numpad8: { on: "Digit8", off: "ArrowUp" },
  Numpad9: { on: "Digit9", off: "PageUp" },
  NumpadDecimal: { on: "Period", off: "Delete" },
};

/** Layouts whose digit row gives digits only with Shift. */
const DIGITS_NEED_SHIFT = new Set(["fr", "be", "cz", "sk"]);

export interface KeyPress {
  key: Key;
  /** Shift has to be held around it. */
  shift: boolean;
}

/** The part of a KeyboardEvent that decides. */
export interface KeyFacts {
  code: string;
  key: string;
  numLock: boolean;
}

const plain = (code: string): Key | undefined => {
  const number = CODES[code];
  if (number !== undefined) return { code: number };
  const evdev = EVDEV[code];
  return evdev === undefined ? undefined : { evdev };
};

/**
 * What to press for a key event under the instance's layout; nothing for keys that no keyboard has.
 *
 * The instance's NumLock is never relied on: the two sides could disagree about it for ever.
 */
export function keyFor(facts: KeyFacts, layout: string): KeyPress | undefined {
  const numpad = NUMPAD[facts.code];
  if (numpad) {
    // The key that the browser reports tells more than the lock's state (Shift turns it around).
    const character = /^[0-9.,]$/.test(facts.key);
    const name = character || (facts.numLock && facts.key.length === 1) ? numpad.on : numpad.off;
    if (name === undefined) return undefined;
    const key = plain(name === "Period" && facts.key === "," ? "Comma" : name);
    return key && { key, shift: name.startsWith("Digit") && DIGITS_NEED_SHIFT.has(layout) };
  }
  const key = plain(facts.code);
  return key && { key, shift: false };
}

/** A stable name for a key, to remember what is held. */
export function keyName(key: Key): string {
  return "code" in key ? `c${key.code}` : `e${key.evdev}`;
}

/** Whether a `KeyboardEvent.code` is a modifier. */
export function isModifier(code: string): boolean {
  return /^(Control|Shift|Alt|Meta)(Left|Right)$/.test(code);
}

export const SHIFT_LEFT: Key = { code: 84 };
