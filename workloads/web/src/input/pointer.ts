// Buttons, fingers and the pace of moves (stream-protocol sections 7.2, 7.3 and 7.5). Pure.

/**
 * Bit of `MouseEvent.buttons` → number on the wire. The original never sends the fourth button (bit 8, "back"); ours
 * takes the number that its table leaves free.
 */
const BUTTONS: readonly (readonly [bit: number, wire: number])[] = [
  [1, 1],
  [4, 2],
  [2, 3],
  [8, 4],
  [16, 5],
];

export interface ButtonMessage {
  button: number;
  pressed: boolean;
}

/** Remembers which buttons are down and says what changed. */
export class Buttons {
  #down = 0;

  /** `buttons` as in MouseEvent. */
  change(buttons: number): ButtonMessage[] {
    const messages: ButtonMessage[] = [];
    for (const [bit, button] of BUTTONS) {
      const pressed = (buttons & bit) !== 0;
      if (pressed !== ((this.#down & bit) !== 0)) messages.push({ button, pressed });
    }
    this.#down = buttons;
    return messages;
  }

  releaseAll(): ButtonMessage[] {
    return this.change(0);
  }
}

const SLOTS = 10;

/** Gives fingers the small numbers that the protocol wants. */
export class Fingers {
  readonly #slots = new Map<number, number>();

  /** A slot 0 to 9 for a pointer that came down; nothing when all are taken. */
  down(pointerId: number): number | undefined {
    const known = this.#slots.get(pointerId);
    if (known !== undefined) return known;
    const taken = new Set(this.#slots.values());
    for (let slot = 0; slot < SLOTS; slot++) {
      if (taken.has(slot)) continue;
      this.#slots.set(pointerId, slot);
      return slot;
    }
    return undefined;
  }

  slot(pointerId: number): number | undefined {
    return this.#slots.get(pointerId);
  }

  /** The message for a finger that went up; nothing when it was not down. */
  up(pointerId: number): { id: number; last: boolean } | undefined {
    const slot = this.#slots.get(pointerId);
    if (slot === undefined) return undefined;
    this.#slots.delete(pointerId);
    return { id: slot, last: this.#slots.size === 0 };
  }

  releaseAll(): { id: number; last: boolean }[] {
    return [...this.#slots.keys()].flatMap((id) => this.up(id) ?? []);
  }
}

/**
 * Lets moves through at most once in `gapMs`: mice report up to 8,000 times a second, and the latest position is
 * worth more than all positions. A move that had to wait is kept; whoever holds the gate fetches it in time.
 */
export class MoveGate<Move> {
  #sentAt = Number.NEGATIVE_INFINITY;
  #waiting: Move | undefined;

  constructor(
    private readonly gapMs: number,
    private readonly merge: (older: Move, newer: Move) => Move,
  ) {}

  /** The move to send now, if any. */
  offer(move: Move, now: number): Move | undefined {
    this.#waiting = this.#waiting === undefined ? move : this.merge(this.#waiting, move);
    return now - this.#sentAt >= this.gapMs ? this.flush(now) : undefined;
  }

  /** What waits, at once: before a button, or when the gap is over. */
  flush(now: number): Move | undefined {
    const move = this.#waiting;
    this.#waiting = undefined;
    if (move !== undefined) this.#sentAt = now;
    return move;
  }

  /** Milliseconds until the waiting move may go; nothing when none waits. */
  due(now: number): number | undefined {
    return this.#waiting === undefined ? undefined : Math.max(0, this.gapMs - (now - this.#sentAt));
  }
}
