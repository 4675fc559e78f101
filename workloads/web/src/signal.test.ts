import { afterEach, beforeEach, describe, expect, test, vi } from "vitest";
import { Signal, type SocketLike, socketUrl } from "./signal";
import type { StreamError } from "./steps";

class FakeSocket implements SocketLike {
  onopen: ((event: never) => void) | null = null;
  onmessage: ((event: { data: unknown }) => void) | null = null;
  onerror: ((event: never) => void) | null = null;
  onclose: ((event: { code: number; reason: string }) => void) | null = null;
  sent: Record<string, unknown>[] = [];
  closed = false;
  send(text: string) {
    this.sent.push(JSON.parse(text));
  }
  close() {
    this.closed = true;
  }
  open() {
    this.onopen?.(undefined as never);
  }
  receive(message: unknown) {
    this.onmessage?.({ data: typeof message === "string" ? message : JSON.stringify(message) });
  }
  types() {
    return this.sent.map((message) => message["type"]);
  }
}

const SETTINGS = {
  data_channels: ["fanlight"],
  enable_speaker: true,
  enable_microphone: false,
  enable_video: true,
  enable_camera: false,
};

function start(settings = {}) {
  const socket = new FakeSocket();
  const urls: string[] = [];
  const signal = new Signal("https://gw/1.0/sessions/x/sockets/slave?token=T", { ...SETTINGS, ...settings }, {
    createSocket: (url) => {
      urls.push(url);
      return socket;
    },
  });
  const errors: StreamError[] = [];
  const offers: string[] = [];
  const candidates: unknown[] = [];
  signal.on("error", (error) => errors.push(error));
  signal.on("offer", (sdp) => offers.push(sdp));
  signal.on("candidate", (candidate) => candidates.push(candidate));
  return { socket, signal, errors, offers, candidates, urls };
}

function untilOffer() {
  const all = start();
  all.socket.open();
  all.socket.receive({ type: "resp:discover", max_api_version: 2, fps: 60, capabilities: [] });
  all.socket.receive({ type: "offer", sdp: btoa("v=0") });
  return all;
}

beforeEach(() => vi.useFakeTimers());
afterEach(() => vi.useRealTimers());

describe("signalling", () => {
  test("goes through its states in order and sends what the protocol asks for", () => {
    const { socket, signal, offers, urls } = start({ preferred_decoder_codecs: ["H264"], device_type: "" });
    expect(urls).toEqual(["wss://gw/1.0/sessions/x/sockets/slave?token=T"]);
    expect(signal.state).toBe("connecting");
    socket.open();
    expect(signal.state).toBe("discovering");
    expect(socket.sent).toEqual([{ type: "discover" }]);
    socket.receive({ type: "resp:discover", max_api_version: 2, fps: 60, capabilities: [] });
    expect(socket.sent[1]).toEqual({
      type: "settings",
      api_version: 2,
      ...SETTINGS,
      video: { preferred_decoder_codecs: ["H264"] },
    });
    expect(signal.state).toBe("awaiting-offer");
    socket.receive({ type: "offer", sdp: btoa("v=0\r\n") });
    expect(offers).toEqual(["v=0\r\n"]);
    expect(signal.state).toBe("answering");
    signal.answer("v=1");
    expect(socket.sent[2]).toEqual({ type: "answer", sdp: btoa("v=1") });
    expect(signal.state).toBe("trickling");
  });

  test("local candidates wait for the answer", () => {
    const { socket, signal } = untilOffer();
    signal.candidate({ candidate: "candidate:1", sdpMid: "0", sdpMLineIndex: 0 });
    signal.candidate({ candidate: "" });
    expect(socket.types()).toEqual(["discover", "settings"]);
    signal.answer("v=1");
    expect(socket.sent.slice(2)).toEqual([
      { type: "answer", sdp: btoa("v=1") },
      { type: "candidate", candidate: btoa("candidate:1"), sdpMid: "0", sdpMLineIndex: 0 },
    ]);
  });

  test("remote candidates are handed on in every state, with a missing field as null", () => {
    const { socket, candidates } = start();
    socket.open();
    socket.receive({ type: "candidate", candidate: btoa("candidate:9"), sdpMid: "1" });
    expect(candidates).toEqual([{ candidate: "candidate:9", sdpMid: "1", sdpMLineIndex: null }]);
  });

  test("a second discover answer and a second offer are ignored", () => {
    const { socket, offers, errors } = untilOffer();
    socket.receive({ type: "resp:discover", max_api_version: 2 });
    socket.receive({ type: "offer", sdp: btoa("other") });
    expect(socket.types()).toEqual(["discover", "settings"]);
    expect(offers).toEqual(["v=0"]);
    expect(errors).toEqual([]);
  });

  test("an instance that does not say its version is taken at ours, an older one is refused", () => {
    const fine = start();
    fine.socket.open();
    fine.socket.receive({ type: "resp:discover" });
    expect(fine.signal.state).toBe("awaiting-offer");
    const old = start();
    old.socket.open();
    old.socket.receive({ type: "resp:discover", max_api_version: 1 });
    expect(old.errors[0]?.step).toBe("discover");
    expect(old.errors[0]?.message).toContain("version 1");
    expect(old.socket.types()).toEqual(["discover"]);
  });

  test("what nobody can read is ignored", () => {
    vi.spyOn(console, "warn").mockImplementation(() => {});
    vi.spyOn(console, "debug").mockImplementation(() => {});
    const { socket, signal, errors } = start();
    socket.open();
    for (const bad of ["", "{", "[]", "null", "7", '{"type":7}', '{"type":"dance"}', '{"type":"candidate","candidate":"%"}']) {
      socket.receive(bad);
    }
    socket.onmessage?.({ data: new ArrayBuffer(8) });
    expect(signal.state).toBe("discovering");
    expect(errors).toEqual([]);
  });

  test("an error message ends it with its words, its code and the step it happened at", () => {
    const { socket, signal, errors } = start();
    socket.open();
    socket.receive({ type: "error", code: 3, message: "session ended" });
    expect(errors).toHaveLength(1);
    expect([errors[0]?.step, errors[0]?.message, errors[0]?.code]).toEqual(["discover", "session ended", 3]);
    expect([signal.state, socket.closed]).toEqual(["closed", true]);
    socket.onclose?.({ code: 1006, reason: "" });
    expect(errors).toHaveLength(1);
  });

  test.each([
    ["before it opens", (s: FakeSocket) => s, "socket"],
    ["while discovering", (s: FakeSocket) => s.open(), "discover"],
  ])("a socket that is closed %s is an error at that step", (_name, prepare, step) => {
    const { socket, errors } = start();
    prepare(socket);
    socket.onclose?.({ code: 1008, reason: "go away" });
    expect(errors[0]?.step).toBe(step);
    expect(errors[0]?.message).toContain("1008: go away");
  });

  test("a socket that is closed after the answer leaves the word to ICE", () => {
    const { socket, signal, errors } = untilOffer();
    signal.answer("v=1");
    socket.onclose?.({ code: 1006, reason: "" });
    expect(errors).toEqual([]);
    expect(signal.state).toBe("closed");
  });

  test("every wait has an end", () => {
    const slow = start();
    vi.advanceTimersByTime(15_000);
    expect(slow.errors[0]?.sentence).toContain("did not open within 15 seconds");
    const booting = start();
    booting.socket.open();
    vi.advanceTimersByTime(299_000);
    expect(booting.errors).toEqual([]);
    vi.advanceTimersByTime(1_000);
    expect(booting.errors[0]?.step).toBe("discover");
    const mute = start();
    mute.socket.open();
    mute.socket.receive({ type: "resp:discover", max_api_version: 2 });
    vi.advanceTimersByTime(60_000);
    expect(mute.errors[0]?.step).toBe("offer");
  });

  test("an offer that is not base64 is an error", () => {
    const { socket, errors } = start();
    socket.open();
    socket.receive({ type: "resp:discover", max_api_version: 2 });
    socket.receive({ type: "offer", sdp: "***" });
    expect(errors[0]?.step).toBe("offer");
  });

  test("after closing nothing is sent or reported", () => {
    const { socket, signal, errors } = untilOffer();
    signal.close();
    signal.answer("v=1");
    signal.candidate({ candidate: "candidate:1" });
    socket.receive({ type: "error", message: "late" });
    vi.advanceTimersByTime(600_000);
    expect(socket.types()).toEqual(["discover", "settings"]);
    expect(errors).toEqual([]);
  });

  test("addresses get the scheme of sockets", () => {
    expect(socketUrl("http://h/x")).toBe("ws://h/x");
    expect(socketUrl("wss://h/x")).toBe("wss://h/x");
  });
});
