// The stream page: the picture, the bar above it, what is said while connecting and after failing, full
// screen, pointer lock and the panel. Everything about the stream itself is the library's.

import { scaleOf } from "../input/geometry";
import { listenToText } from "../input/text";
import { type Cursor, type Ended, Stream, type StreamOptions } from "../stream";
import { STEPS, STEP_WORDS, type Step, type StreamError, nextStep } from "../steps";
import { cssCursor } from "./cursor";
import { type View, button, h } from "./dom";
import { LAYOUTS, preferredLayout, rememberLayout } from "./layouts";
import { panel as makePanel } from "./panel";
import { routes } from "./routes";

/** How long a hint stays. */
const HINT_MS = 5_000;

/** A failure at these steps means that there is no instance to come back to. */
const UNBORN: readonly Step[] = ["created", "discover"];

const MENU_KEYS = "Ctrl+Alt+Shift+M";

export interface PlayerOptions {
  title: string;
  /** Finds out a better title; asked when the picture is there, not to delay it. */
  betterTitle: () => Promise<string | undefined>;
  /** Makes the stream; called once per attempt of the person. */
  open: (options: StreamOptions) => Stream;
  /** Makes a stream that joins a session that is known by now. */
  rejoin: (id: string, options: StreamOptions) => Stream;
  /** The session's id is known. */
  onSession: (id: string) => void;
  /** A stream begins; for the tests' window. */
  onStream: (stream: Stream) => void;
  onUnauthorized: () => void;
  /** Opens the connection check. */
  onCheck: () => void;
}

export function player(options: PlayerOptions): View {
  // The picture.
  const video = h("video", { class: "picture", playsInline: true, muted: true, disablePictureInPicture: true });
  const audio = h("audio");
  const surface = h(
    "div",
    { class: "surface", tabIndex: 0, role: "application", aria: { label: `${options.title}, streamed. ${MENU_KEYS} leads to the menu.` } },
    video,
  );
  const overlay = h("div", { class: "overlay", role: "status" });
  const keys = h("textarea", {
    class: "keys",
    tabIndex: -1,
    autocomplete: "off",
    spellcheck: false,
    autocapitalize: "none",
    aria: { label: "Text for the application" },
  });
  const hint = h("p", { class: "hint", role: "status", hidden: true });
  const sound = h("button", { class: "button chip", type: "button", hidden: true }, "Click for sound");
  const stats = makePanel();
  stats.element.hidden = true;

  // The bar.
  const leave = h("a", { class: "button quiet", href: routes.gallery, title: "Back to the gallery; the session goes on for a while" }, "Leave");
  const state = h("span", { class: "state", data: { state: "connecting" } }, "Connecting");
  const layout = h("select", { title: "Keyboard layout of the application" });
  for (const [name, title] of LAYOUTS) layout.append(h("option", { value: name }, title));
  const lock = button("Capture mouse", "button quiet mouse-only", () => lockPointer());
  const mute = button("Mute", "button quiet", () => toggleSound());
  const typing = button("Type", "button quiet touch-only", () => keys.focus(), "Open the on-screen keyboard");
  const full = button("Full screen", "button quiet", () => toggleFullScreen());
  const figures = button("Figures", "button quiet", () => togglePanel());
  figures.setAttribute("aria-expanded", "false");
  const stop = button("Stop", "button danger", () => stopSession(), "End the session and its application");
  const heading = h("span", { class: "bar-title" }, options.title);
  const bar = h(
    "header",
    { class: "bar", role: "toolbar", aria: { label: "Stream" } },
    leave,
    heading,
    state,
    h("span", { class: "spacer" }),
    h("label", { class: "field" }, h("span", {}, "Keyboard"), layout),
    lock,
    typing,
    mute,
    full,
    figures,
    stop,
  );
  const stage = h("div", { class: "stage" }, keys, surface, overlay, hint, sound, stats.element);
  const element = h("div", { class: "player" }, bar, stage, audio);

  const page = new AbortController();
  const { signal } = page;
  let stream: Stream | undefined;
  let muted = false;
  let soundBlocked = false;
  let lockWanted = false;
  let hintTimer: ReturnType<typeof setTimeout> | undefined;
  let cursor: Cursor | undefined;

  const say = (text: string) => {
    clearTimeout(hintTimer);
    hint.textContent = text;
    hint.hidden = false;
    hintTimer = setTimeout(() => (hint.hidden = true), HINT_MS);
  };

  listenToText(keys, (type, data) => stream?.send(type, data), signal);

  let titled = false;
  const findTitle = async (): Promise<void> => {
    if (titled) return;
    titled = true;
    const title = await options.betterTitle();
    if (title === undefined || signal.aborted) return;
    heading.textContent = title;
    document.title = `${title} – Fanlight`;
  };

  // What is shown over the picture.

  const showSteps = () => {
    if (!stream) return;
    const reached = new Map(stream.steps.map((time) => [time.step, time.ms]));
    const next = nextStep(stream.steps);
    overlay.replaceChildren(
      h(
        "div",
        { class: "message" },
        h("h2", {}, stream.state === "reconnecting" ? "Connecting again" : `Opening ${options.title}`),
        h(
          "ol",
          { class: "steps" },
          ...STEPS.map((step) => {
            const at = reached.get(step);
            const progress = at !== undefined ? "done" : step === next ? "now" : "later";
            return h(
              "li",
              { class: progress },
              h("span", {}, STEP_WORDS[step].doing),
              h("span", { class: "at" }, at === undefined ? "" : `${Math.round(at)} ms`),
            );
          }),
        ),
        button("Cancel", "button", () => void (location.hash = routes.gallery)),
      ),
    );
    overlay.hidden = false;
  };

  const showFailure = (error: StreamError) => {
    const id = stream?.sessionId;
    overlay.replaceChildren(
      h(
        "div",
        { class: "message problem", role: "alert", data: { step: error.step } },
        h("h2", {}, STEP_WORDS[error.step].failed),
        h("p", {}, sentence(error.message)),
        h("p", { class: "advice" }, error.advice),
        h(
          "div",
          { class: "actions" },
          // What never started does not start by asking again; where the instance runs, a new one would be a waste.
          button("Try again", "button primary", () => again(UNBORN.includes(error.step) ? undefined : id)),
          button("Connection check", "button", options.onCheck, "Look at each step on the way of a stream"),
          h("a", { class: "button", href: routes.gallery }, "Back to the gallery"),
        ),
      ),
    );
    overlay.hidden = false;
  };

  const showEnd = (ended: Ended) => {
    const id = stream?.sessionId;
    const canContinue = ended.reason === "replaced" && id !== undefined;
    overlay.replaceChildren(
      h(
        "div",
        { class: "message", data: { reason: ended.reason } },
        h("h2", {}, canContinue ? "The stream goes on elsewhere" : "The stream ended"),
        h("p", {}, sentence(ended.message)),
        h(
          "div",
          { class: "actions" },
          canContinue ? button("Continue here", "button primary", () => again(id)) : undefined,
          h("a", { class: canContinue ? "button" : "button primary", href: routes.gallery }, "Back to the gallery"),
        ),
      ),
    );
    overlay.hidden = false;
  };

  const setState = (name: string, words: string) => {
    state.dataset["state"] = name;
    state.textContent = words;
  };

  // One stream after the other.

  const start = (make: (options: StreamOptions) => Stream) => {
    const current = make({ video, audio, surface, layout: layout.value, intercept });
    stream = current;
    options.onStream(current);
    const mine = <T>(listener: (value: T) => void) => (value: T) => {
      if (stream === current) listener(value);
    };
    current.on(
      "state",
      mine((next) => {
        element.dataset["state"] = next;
        if (next === "connecting" || next === "reconnecting") {
          setState(next, next === "connecting" ? "Connecting" : "Connecting again");
          showSteps();
        } else if (next === "live") setState(next, "Connected");
      }),
    );
    current.on(
      "step",
      mine(({ step }) => {
        if (step === "created" && current.sessionId !== undefined) options.onSession(current.sessionId);
        stats.steps(current.steps);
        if (!overlay.hidden) showSteps();
      }),
    );
    current.on(
      "ready",
      mine(() => {
        overlay.hidden = true;
        overlay.replaceChildren();
        void findTitle();
        setState("live", "Connected");
        if (document.activeElement === document.body || document.activeElement === null) surface.focus();
      }),
    );
    current.on(
      "flowing",
      mine((flowing) => setState(flowing ? "live" : "unstable", flowing ? "Connected" : "Unstable")),
    );
    current.on(
      "reconnecting",
      mine(({ attempt, cause }) => {
        setState("reconnecting", `Connecting again (${attempt})`);
        say(cause);
      }),
    );
    current.on(
      "error",
      mine((error) => {
        if (error.code === 401) return options.onUnauthorized();
        setState("failed", "Failed");
        showFailure(error);
      }),
    );
    current.on(
      "ended",
      mine((ended) => {
        releasePointer();
        setState("ended", "Ended");
        showEnd(ended);
      }),
    );
    current.on("stats", mine((figure) => stats.show(figure)));
    current.on(
      "sound-blocked",
      mine((blocked) => {
        soundBlocked = blocked;
        sound.hidden = !blocked || muted;
      }),
    );
    current.on("cursor", mine((next) => void showCursor(next)));
    current.on("pointer-lock", mine((wanted) => applicationWantsPointer(wanted)));
    if (muted) current.mute();
    void current.connect();
  };

  const again = (id: string | undefined) => {
    stream?.leave();
    start((streamOptions) => (id === undefined ? options.open(streamOptions) : options.rejoin(id, streamOptions)));
  };

  // Sound.

  const playSound = () => {
    if (soundBlocked && !muted) stream?.unmute();
  };
  const toggleSound = () => {
    muted = !muted;
    mute.textContent = muted ? "Unmute" : "Mute";
    if (muted) stream?.mute();
    else stream?.unmute();
    sound.hidden = muted || !soundBlocked;
  };
  sound.addEventListener("click", () => {
    playSound();
    surface.focus();
  });
  // Whatever a person does in the picture is the gesture that browsers wait for.
  surface.addEventListener("pointerdown", playSound, { signal });
  surface.addEventListener("keydown", playSound, { signal });

  // Pointer.

  const lockPointer = async (): Promise<void> => {
    surface.focus();
    const request = surface.requestPointerLock as (options?: object) => Promise<void> | undefined;
    try {
      await request.call(surface, { unadjustedMovement: true });
    } catch (error) {
      if (error instanceof DOMException && error.name === "NotSupportedError") {
        // The system cannot give movement without acceleration; with it is good enough.
        await Promise.resolve(request.call(surface)).catch(() => undefined);
      }
    }
  };
  const releasePointer = () => {
    lockWanted = false;
    if (document.pointerLockElement === surface) document.exitPointerLock();
  };
  const applicationWantsPointer = (wanted: boolean) => {
    if (!wanted) return releasePointer();
    if (document.pointerLockElement === surface) return;
    lockWanted = true;
    // Without a recent gesture the browser refuses; the next click is one.
    if (navigator.userActivation?.isActive) void lockPointer();
    else say("The application wants the mouse: click into the picture.");
  };
  surface.addEventListener("pointerdown", (event) => lockWanted && event.pointerType === "mouse" && void lockPointer(), { signal });
  document.addEventListener(
    "pointerlockchange",
    () => {
      const locked = document.pointerLockElement === surface;
      element.classList.toggle("locked", locked);
      if (!locked) return;
      lockWanted = false;
      say(document.fullscreenElement ? "Mouse captured. Hold Esc to get it back." : "Mouse captured. Press Esc to get it back.");
    },
    { signal },
  );
  document.addEventListener("pointerlockerror", () => say("The browser did not let the mouse be captured."), { signal });

  const showCursor = async (next: Cursor): Promise<void> => {
    cursor = next;
    const scale = scaleOf(surface.getBoundingClientRect(), { width: video.videoWidth, height: video.videoHeight });
    try {
      const css = await cssCursor(next, scale);
      if (cursor === next) surface.style.cursor = css;
    } catch {
      surface.style.cursor = "default"; // An image that this browser cannot read.
    }
  };
  const resized = new ResizeObserver(() => cursor?.kind === "image" && void showCursor(cursor));
  resized.observe(surface);

  // Full screen, panel, shortcuts.

  const toggleFullScreen = async (): Promise<void> => {
    if (document.fullscreenElement) return document.exitFullscreen();
    try {
      await element.requestFullscreen({ navigationUI: "hide" });
    } catch {
      say("The browser did not allow full screen.");
      return;
    }
    surface.focus();
    const { keyboard } = navigator as Navigator & { keyboard?: { lock?: () => Promise<void> } };
    // Then Esc, Alt+Tab and the like reach the application; where that is not possible they stay the browser's.
    await keyboard?.lock?.().catch(() => undefined);
  };
  document.addEventListener(
    "fullscreenchange",
    () => {
      const on = document.fullscreenElement === element;
      element.classList.toggle("full", on);
      element.classList.remove("menu");
      full.textContent = on ? "Leave full screen" : "Full screen";
      if (on) say(`Hold Esc to leave full screen. ${MENU_KEYS} shows the menu.`);
    },
    { signal },
  );
  const togglePanel = () => {
    stats.element.hidden = !stats.element.hidden;
    figures.setAttribute("aria-expanded", String(!stats.element.hidden));
  };
  /** The way out of the picture for people without a mouse; everything else is the application's. */
  function intercept(event: KeyboardEvent): boolean {
    if (!(event.ctrlKey && event.altKey && event.shiftKey && event.code === "KeyM")) return false;
    event.preventDefault();
    if (event.type === "keydown") {
      releasePointer();
      element.classList.add("menu");
      leave.focus();
    }
    return true;
  }
  surface.addEventListener("focus", () => element.classList.remove("menu"), { signal });
  surface.addEventListener(
    "focus",
    () => {
      if (sessionStorage.getItem("fanlight.menu-hint") !== null) return;
      sessionStorage.setItem("fanlight.menu-hint", "shown");
      say(`Keys go to the application. ${MENU_KEYS} leads back to the menu.`);
    },
    { signal },
  );

  const stopSession = async (): Promise<void> => {
    try {
      await stream?.stop();
      location.hash = routes.gallery;
    } catch (error) {
      say(`The session could not be stopped: ${error instanceof Error ? error.message : String(error)}`);
    }
  };

  layout.addEventListener("change", () => {
    rememberLayout(layout.value);
    stream?.setLayout(layout.value);
    surface.focus();
  });

  // Guessing the layout must not delay the stream.
  layout.value = "us";
  void preferredLayout().then((name) => {
    if (signal.aborted) return;
    layout.value = name;
    stream?.setLayout(name);
  });
  start(options.open);

  return {
    element,
    title: `${options.title} – Fanlight`,
    dispose() {
      page.abort();
      resized.disconnect();
      clearTimeout(hintTimer);
      releasePointer();
      if (document.fullscreenElement) void document.exitFullscreen();
      stream?.leave();
    },
  };
}

/** Messages come from programs: a capital and a full stop make them sentences. */
export function sentence(message: string): string {
  const text = message.trim();
  if (text === "") return "";
  const ended = /[.!?…]$/.test(text) ? text : `${text}.`;
  return ended.charAt(0).toUpperCase() + ended.slice(1);
}
