// Listens to a surface of the page and sends what a person does there as control messages. The thin shell
// around the pure parts beside it; it owns listeners and timers and nothing else.

import { type Box, RelativeMotion, type Size, scaleOf, toPicture } from "./geometry";
import { type KeyMessage, Keyboard } from "./keyboard";
import { Buttons, Fingers, MoveGate } from "./pointer";
import { Wheel } from "./wheel";

export interface InputOptions {
  /** Takes the focus and the events; the picture lies inside it as `object-fit: contain` does. */
  surface: HTMLElement;
  /** Size of the picture in its own pixels; zero while there is none. */
  picture: () => Size;
  /** Sends one control message. */
  send: (type: string, data: object) => void;
  /** The page's own shortcuts: a key event for which this returns true is not sent. */
  intercept?: (event: KeyboardEvent) => boolean;
  /** The instance's keyboard layout, as an xkb name. */
  layout?: string;
}

interface Move {
  x?: number;
  y?: number;
  rx: number;
  ry: number;
}

/** 250 moves a second are more than any display shows. */
const MOVE_GAP_MS = 4;

const merge = (older: Move, newer: Move): Move => ({ ...newer, rx: older.rx + newer.rx, ry: older.ry + newer.ry });

const hundredths = (value: number): number => Math.round(value * 100) / 100;

const modifiersOf = (event: KeyboardEvent | MouseEvent) => ({
  ctrl: event.ctrlKey,
  shift: event.shiftKey,
  alt: event.altKey,
  meta: event.metaKey,
  altGraph: event.getModifierState("AltGraph"),
});

export class Input {
  readonly #options: InputOptions;
  readonly #keyboard: Keyboard;
  readonly #buttons = new Buttons();
  readonly #fingers = new Fingers();
  readonly #wheel = new Wheel();
  readonly #motion = new RelativeMotion();
  readonly #gate = new MoveGate<Move>(MOVE_GAP_MS, merge);
  readonly #abort = new AbortController();
  #last: { x: number; y: number } | undefined;
  #timer: ReturnType<typeof setTimeout> | undefined;

  constructor(options: InputOptions) {
    this.#options = options;
    this.#keyboard = new Keyboard(options.layout ?? "us");
    const { surface } = options;
    this.#listen(surface, "keydown", (event) => this.#key(event, true));
    this.#listen(surface, "keyup", (event) => this.#key(event, false));
    this.#listen(surface, "blur", () => this.#sendKeys(this.#keyboard.releaseAll()));
    this.#listen(surface, "pointerdown", (event) => this.#pointerDown(event));
    this.#listen(surface, "pointerup", (event) => this.#pointerUp(event));
    this.#listen(surface, "pointercancel", (event) => this.#pointerUp(event));
    // The raw events come as the mouse reports, not once per displayed frame.
    const raw = "onpointerrawupdate" in surface;
    this.#listen(surface, "pointermove", (event) => this.#pointerMove(event, !raw || event.pointerType === "touch"));
    if (raw) {
      const rawListener = (event: Event) => {
        if ((event as PointerEvent).pointerType !== "touch") this.#move(event as PointerEvent);
      };
      surface.addEventListener("pointerrawupdate", rawListener, { signal: this.#abort.signal });
    }
    this.#listen(surface, "wheel", (event) => this.#wheelTurned(event), { passive: false });
    // What the browser would do by itself: menus, autoscroll, history, dragging the picture out.
    for (const name of ["contextmenu", "dragstart", "selectstart", "auxclick"] as const) {
      surface.addEventListener(name, (event) => event.preventDefault(), { signal: this.#abort.signal });
    }
    this.#listen(surface, "mousedown", (event) => event.preventDefault());
    this.#listen(surface, "mouseup", (event) => event.preventDefault());
    const releaseAll = () => this.releaseAll();
    const { signal } = this.#abort;
    window.addEventListener("blur", releaseAll, { signal });
    window.addEventListener("pagehide", releaseAll, { signal });
    document.addEventListener("visibilitychange", () => document.hidden && this.releaseAll(), { signal });
  }

  /** The instance's layout changed. */
  set layout(layout: string) {
    this.#keyboard.layout = layout;
  }

  /** Lets go of everything that is held. */
  releaseAll(): void {
    this.#sendKeys(this.#keyboard.releaseAll());
    for (const message of this.#buttons.releaseAll()) this.#options.send("input::mouse-button", message);
    for (const message of this.#fingers.releaseAll()) this.#options.send("input::touch-end", message);
  }

  /** Releases everything and stops listening. */
  dispose(): void {
    this.releaseAll();
    clearTimeout(this.#timer);
    this.#abort.abort();
  }

  #listen<Name extends keyof HTMLElementEventMap>(
    target: HTMLElement,
    name: Name,
    listener: (event: HTMLElementEventMap[Name]) => void,
    options: AddEventListenerOptions = {},
  ): void {
    target.addEventListener(name, listener, { ...options, signal: this.#abort.signal });
  }

  #key(event: KeyboardEvent, pressed: boolean): void {
    if (event.isComposing || this.#options.intercept?.(event)) return;
    event.preventDefault();
    event.stopPropagation();
    const facts = {
      code: event.code,
      key: event.key,
      numLock: event.getModifierState("NumLock"),
      timeStamp: event.timeStamp,
      ...modifiersOf(event),
    };
    this.#sendKeys(pressed ? this.#keyboard.down(facts) : this.#keyboard.up(facts));
  }

  #sendKeys(messages: KeyMessage[]): void {
    for (const { key, pressed } of messages) this.#options.send("input::key", { ...key, pressed });
  }

  #pointerDown(event: PointerEvent): void {
    const { surface } = this.#options;
    event.preventDefault();
    surface.focus({ preventScroll: true });
    if (document.pointerLockElement !== surface) {
      // Moves outside belong to us as long as something is held. A pointer that is gone already cannot be captured.
      try {
        surface.setPointerCapture(event.pointerId);
      } catch {
        // The release arrives as `pointercancel` then.
      }
    }
    if (event.pointerType === "touch") {
      const at = this.#position(event);
      const id = at && this.#fingers.down(event.pointerId);
      if (at && id !== undefined) this.#options.send("input::touch-start", { id, x: at.x, y: at.y });
      return;
    }
    this.#sendKeys(this.#keyboard.modifiers(modifiersOf(event)));
    this.#pointerMove(event, true);
  }

  #pointerUp(event: PointerEvent): void {
    if (event.pointerType === "touch") {
      const message = this.#fingers.up(event.pointerId);
      if (message) this.#options.send("input::touch-end", message);
      return;
    }
    if (event.type === "pointercancel") {
      for (const message of this.#buttons.releaseAll()) this.#options.send("input::mouse-button", message);
      return;
    }
    this.#pointerMove(event, true);
  }

  /** Position and buttons; further buttons than the first arrive as moves. */
  #pointerMove(event: PointerEvent, moves: boolean): void {
    if (event.pointerType === "touch") {
      const id = this.#fingers.slot(event.pointerId);
      const at = id === undefined ? undefined : this.#position(event);
      if (at) this.#options.send("input::touch-move", { id, x: at.x, y: at.y });
      return;
    }
    // Raw events report movement themselves; only the position of a click must not be missed.
    if (moves && (event.type === "pointermove" || !this.#locked())) this.#move(event);
    const changes = this.#buttons.change(event.buttons);
    if (changes.length === 0) return;
    this.#flush();
    for (const message of changes) this.#options.send("input::mouse-button", message);
  }

  #move(event: PointerEvent): void {
    const move = this.#locked() ? this.#relative(event) : this.#absolute(event);
    if (!move) return;
    const now = this.#gate.offer(move, performance.now());
    if (now) this.#options.send("input::mouse-move", now);
    const due = this.#gate.due(performance.now());
    if (due !== undefined && this.#timer === undefined) this.#timer = setTimeout(() => this.#flush(), due);
  }

  #relative(event: PointerEvent): Move | undefined {
    this.#last = undefined;
    const { x, y } = this.#motion.add(event.movementX, event.movementY, scaleOf(this.#box(), this.#options.picture()));
    return x === 0 && y === 0 ? undefined : { rx: x, ry: y };
  }

  #absolute(event: PointerEvent): Move | undefined {
    const at = this.#position(event);
    if (!at) return undefined;
    // A click where the pointer is already needs no move.
    if (this.#last && this.#last.x === at.x && this.#last.y === at.y) return undefined;
    const last = this.#last ?? at;
    this.#last = at;
    const { x, y } = this.#motion.add(at.x - last.x, at.y - last.y, 1);
    return { x: at.x, y: at.y, rx: x, ry: y };
  }

  #flush(): void {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    const move = this.#gate.flush(performance.now());
    if (move) this.#options.send("input::mouse-move", move);
  }

  #wheelTurned(event: WheelEvent): void {
    event.preventDefault();
    const old = event as WheelEvent & { wheelDeltaX?: number; wheelDeltaY?: number };
    const { deltaX, deltaY, deltaMode, wheelDeltaX, wheelDeltaY } = old;
    const clicks = this.#wheel.add({
      deltaX,
      deltaY,
      deltaMode,
      ...(wheelDeltaX === undefined ? {} : { wheelDeltaX }),
      ...(wheelDeltaY === undefined ? {} : { wheelDeltaY }),
    });
    if (clicks.length === 0) return;
    this.#flush();
    for (const click of clicks) this.#options.send("input::mouse-wheel", click);
  }

  #locked(): boolean {
    return document.pointerLockElement === this.#options.surface;
  }

  #box(): Box {
    return this.#options.surface.getBoundingClientRect();
  }

  #position(event: PointerEvent): { x: number; y: number } | undefined {
    const at = toPicture({ x: event.clientX, y: event.clientY }, this.#box(), this.#options.picture());
    return at && { x: hundredths(at.x), y: hundredths(at.y) };
  }
}
