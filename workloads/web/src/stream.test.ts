// The stream as a whole, with a browser made of cardboard: what it does when things break.

import { afterEach, beforeEach, describe, expect, test, vi } from "vitest";
import { ApiError } from "./api";
import { type Connector, Stream, type StreamEvents } from "./stream";

class FakeChannel {
  readyState = "connecting";
  sent: Record<string, unknown>[] = [];
  onopen?: () => void;
  onmessage?: (event: { data: unknown }) => void;
  onerror?: (event: unknown) => void;
  onclose?: () => void;
  constructor(readonly label: string) {}
  send(text: string) {
    this.sent.push(JSON.parse(text));
  }
  open() {
    this.readyState = "open";
    this.onopen?.();
  }
}

class FakePeer {
  static all: FakePeer[] = [];
  channels = new Map<string, FakeChannel>();
  iceConnectionState = "new";
  connectionState = "new";
  closed = false;
  onicecandidate?: (event: unknown) => void;
  oniceconnectionstatechange?: () => void;
  onconnectionstatechange?: () => void;
  ontrack?: (event: unknown) => void;
  constructor() {
    FakePeer.all.push(this);
  }
  createDataChannel(label: string) {
    const channel = new FakeChannel(label);
    this.channels.set(label, channel);
    return channel;
  }
  async setRemoteDescription() {}
  async setLocalDescription() {}
  async addIceCandidate() {}
  async createAnswer() {
    return { type: "answer", sdp: "m=video 9 x 96\r\n" };
  }
  async getStats() {
    return new Map();
  }
  close() {
    this.closed = true;
  }
  ice(state: string) {
    this.iceConnectionState = state;
    this.oniceconnectionstatechange?.();
  }
  connection(state: string) {
    this.connectionState = state;
    this.onconnectionstatechange?.();
  }
  channel(label: string) {
    const channel = this.channels.get(label);
    if (!channel) throw new Error(`no channel ${label}`);
    return channel;
  }
  /** The control channel fails as an SCTP abort makes it fail. */
  abort() {
    this.channel("control").onerror?.({ error: Object.assign(new Error("User-Initiated Abort"), { sctpCauseCode: 12 }) });
  }
}

class FakeSocket {
  static all: FakeSocket[] = [];
  sent: Record<string, unknown>[] = [];
  closed = false;
  onopen?: () => void;
  onmessage?: (event: { data: string }) => void;
  onclose?: (event: { code: number; reason: string }) => void;
  constructor(readonly url: string) {
    FakeSocket.all.push(this);
  }
  send(text: string) {
    this.sent.push(JSON.parse(text));
  }
  close() {
    this.closed = true;
  }
  receive(message: object) {
    this.onmessage?.({ data: JSON.stringify(message) });
  }
}

const settle = () => vi.advanceTimersByTimeAsync(0);
const last = <T>(list: T[]): T => {
  const item = list.at(-1);
  if (item === undefined) throw new Error("nothing was made yet");
  return item;
};

/** Plays the instance's part of the newest attempt until keys are agreed. */
async function answerAll() {
  await settle();
  const socket = last(FakeSocket.all);
  socket.onopen?.();
  socket.receive({ type: "resp:discover", max_api_version: 2, fps: 60, capabilities: [] });
  socket.receive({ type: "offer", sdp: btoa("m=video 9 x 96\r\n") });
  await settle();
  const peer = last(FakePeer.all);
  peer.ice("connected");
  peer.connection("connected");
  for (const channel of peer.channels.values()) channel.open();
  await settle();
  return peer;
}

const invitation = (id: string) => ({ id, url: `ws://gw/${id}`, stun_servers: [] });

function start(connector: Partial<Connector> = {}) {
  const video = Object.assign(new EventTarget(), {
    srcObject: null,
    muted: false,
    videoWidth: 1280,
    videoHeight: 720,
    currentTime: 0,
    play: async () => {},
    frames: [] as ((now: number, metadata: object) => void)[],
    requestVideoFrameCallback(callback: (now: number, metadata: object) => void) {
      return this.frames.push(callback);
    },
    cancelVideoFrameCallback() {
      this.frames = [];
    },
  });
  const calls: string[] = [];
  const stream = new Stream(
    {
      open: async () => invitation("s1"),
      rejoin: async (id) => {
        calls.push("rejoin");
        return invitation(id);
      },
      session: async () => {
        calls.push("session");
        return { status: "active", status_message: "" };
      },
      stop: async () => void calls.push("stop"),
      ...connector,
    },
    { video: video as unknown as HTMLVideoElement },
  );
  const events: string[] = [];
  const note = <Name extends keyof StreamEvents>(name: Name, words: (value: StreamEvents[Name]) => string) =>
    stream.on(name, (value) => events.push(words(value)));
  note("state", (state) => state);
  note("step", ({ step }) => step);
  note("error", (error) => `error at ${error.step}: ${error.message}`);
  note("ended", ({ reason }) => `because ${reason}`);
  const connected = stream.connect();
  return { stream, video, events, calls, connected };
}

beforeEach(() => {
  vi.useFakeTimers();
  FakePeer.all = [];
  FakeSocket.all = [];
  vi.stubGlobal("RTCPeerConnection", FakePeer);
  vi.stubGlobal("WebSocket", FakeSocket);
  vi.stubGlobal("window", new EventTarget());
  vi.stubGlobal("requestAnimationFrame", (callback: FrameRequestCallback) => setTimeout(() => callback(performance.now()), 10));
  vi.stubGlobal("cancelAnimationFrame", (handle: number) => clearTimeout(handle));
  vi.stubGlobal("document", Object.assign(new EventTarget(), { hidden: false, createElement: () => ({ getContext: () => null }) }));
});
afterEach(() => {
  vi.useRealTimers();
  vi.unstubAllGlobals();
});

describe("stream", () => {
  test("goes through the steps to the first picture and tells the instance", async () => {
    const { stream, video, events } = start();
    const peer = await answerAll();
    expect(events).toEqual(["connecting", "created", "socket", "discover", "offer", "ice", "dtls", "live"]);
    video.frames.splice(0).forEach((frame) => frame(0, {}));
    expect(events.at(-1)).toBe("first-frame");
    expect(peer.channel("fanlight").sent.map(({ type }) => type)).toEqual(["layout", "first-frame"]);
    expect(last(FakeSocket.all).closed).toBe(true);
    expect(stream.state).toBe("live");
  });

  test("tells the instance how long pictures wait for the display, while it can", async () => {
    const { video } = start();
    const peer = await answerAll();
    const channel = peer.channel("fanlight");
    const shown = () => channel.sent.filter(({ type }) => type === "shown");
    // The display refreshes every 10 ms here; a picture is decoded 4 ms before each refresh.
    const play = async (count: number) => {
      for (let i = 0; i < count; i++) {
        await vi.advanceTimersByTimeAsync(10);
        const now = performance.now();
        video.frames
          .splice(0)
          .forEach((frame) => frame(now, { receiveTime: now - 5, processingDuration: 0.001, expectedDisplayTime: now + 10 }));
      }
    };
    await play(20);
    expect(shown()).toEqual([]);
    await play(80);
    expect(shown().length).toBeGreaterThan(0);
    expect(shown()[0]).toEqual({ type: "shown", low_ms: 4, mid_ms: 4, high_ms: 4, frames: 20 });
    const before = shown().length;
    channel.readyState = "closing";
    await play(100);
    expect(shown()).toHaveLength(before);
  });

  test("a session that is refused fails at the first step with the gateway's words", async () => {
    const { stream, events } = start({ open: () => Promise.reject(new ApiError("application x is not known", 400)) });
    await settle();
    expect(events).toEqual(["connecting", "failed", "error at created: application x is not known"]);
    expect(stream.error?.code).toBe(400);
  });

  test("an instance that fails while it boots is reported with the session's words", async () => {
    const { events } = start({ session: async () => ({ status: "error", status_message: "the application ended with status 1" }) });
    await settle();
    last(FakeSocket.all).onopen?.();
    await vi.advanceTimersByTimeAsync(2_000);
    expect(events.at(-1)).toBe("error at discover: the application ended with status 1");
    expect(last(FakePeer.all).closed).toBe(true);
  });

  test("a connection that breaks is joined again", async () => {
    const { stream, events, calls } = start();
    const first = await answerAll();
    first.ice("disconnected");
    await vi.advanceTimersByTimeAsync(4_999);
    expect(stream.state).toBe("live");
    await vi.advanceTimersByTimeAsync(1);
    expect(stream.state).toBe("reconnecting");
    await answerAll();
    expect(calls).toEqual(["session", "rejoin"]);
    expect(stream.state).toBe("live");
    expect(first.closed).toBe(true);
    expect(events.filter((event) => event === "created")).toHaveLength(2);
  });

  test("a gap that heals in time changes nothing", async () => {
    const { stream } = start();
    const peer = await answerAll();
    peer.ice("disconnected");
    await vi.advanceTimersByTimeAsync(4_000);
    peer.ice("connected");
    await vi.advanceTimersByTimeAsync(20_000);
    expect([stream.state, FakePeer.all.length]).toEqual(["live", 1]);
  });

  test("while the gateway is away the attempts go on, with growing pauses", async () => {
    let away = true;
    let asked = 0;
    const { stream } = start({
      session: async () => {
        asked += 1;
        if (away) throw new ApiError("the gateway cannot be reached", 0);
        return { status: "active", status_message: "" };
      },
    });
    const peer = await answerAll();
    peer.ice("failed");
    await vi.advanceTimersByTimeAsync(20_000);
    expect(stream.state).toBe("reconnecting");
    expect(asked).toBeGreaterThan(4);
    expect(asked).toBeLessThan(9);
    away = false;
    await vi.advanceTimersByTimeAsync(8_000);
    await answerAll();
    expect(stream.state).toBe("live");
  });

  test("a network that comes back is tried at once", async () => {
    let asked = 0;
    const { stream } = start({
      session: async () => {
        asked += 1;
        throw new ApiError("the gateway cannot be reached", 0);
      },
    });
    (await answerAll()).ice("failed");
    await vi.advanceTimersByTimeAsync(16_000);
    const before = asked;
    window.dispatchEvent(new Event("online"));
    await settle();
    expect(asked).toBe(before + 1);
    stream.leave();
  });

  test("it does not come back to a session that is gone", async () => {
    const { events, calls } = start({ session: () => Promise.reject(new ApiError("session not found", 404)) });
    (await answerAll()).ice("failed");
    await settle();
    expect(events.slice(-2)).toEqual(["ended", "because session-ended"]);
    expect(calls).toEqual([]);
  });

  test("it gives up after a while", async () => {
    const { stream, events } = start({ rejoin: () => Promise.reject(new ApiError("no", 500)) });
    (await answerAll()).ice("failed");
    await vi.advanceTimersByTimeAsync(240_000);
    expect(stream.state).toBe("failed");
    expect(events.at(-1)).toContain("error at created");
  });

  test("a client that was replaced does not fight back", async () => {
    const { events, calls } = start();
    (await answerAll()).abort();
    await vi.advanceTimersByTimeAsync(60_000);
    expect(events.slice(-2)).toEqual(["ended", "because replaced"]);
    expect(calls).not.toContain("rejoin");
  });

  test("the instance's end is the session's, even when the record is a moment behind", async () => {
    let asked = 0;
    const { events } = start({
      session: async () => ({ status: ++asked < 3 ? "active" : "terminated", status_message: "" }),
    });
    (await answerAll()).abort();
    await vi.advanceTimersByTimeAsync(5_000);
    expect(events.at(-1)).toBe("because session-ended");
  });

  test("stopping is reported as stopping although the instance closes the stream first", async () => {
    let answer = () => {};
    const { stream, events } = start({ stop: () => new Promise((resolve) => (answer = resolve)) });
    const peer = await answerAll();
    const stopped = stream.stop();
    peer.abort();
    await settle();
    answer();
    await stopped;
    expect(events.slice(-2)).toEqual(["ended", "because stopped"]);
  });

  test("a stop that is refused leaves the stream on", async () => {
    const { stream } = start({ stop: () => Promise.reject(new ApiError("this account may not do that", 403)) });
    await answerAll();
    await expect(stream.stop()).rejects.toThrow("may not");
    expect(stream.state).toBe("live");
  });

  test("leaving says good-bye before the connection closes, and nothing happens afterwards", async () => {
    const { stream, events } = start();
    const peer = await answerAll();
    stream.leave();
    expect(peer.channel("control").sent).toEqual([{ type: "stream::disconnect", data: {} }]);
    expect(peer.closed).toBe(false);
    await vi.advanceTimersByTimeAsync(1_000);
    expect(peer.closed).toBe(true);
    const before = events.length;
    peer.ice("failed");
    peer.abort();
    stream.leave();
    await vi.advanceTimersByTimeAsync(60_000);
    expect(events).toHaveLength(before);
  });

  test("leaving while the session is being created does not connect afterwards", async () => {
    let created = (_: ReturnType<typeof invitation>) => {};
    const { stream } = start({ open: () => new Promise((resolve) => (created = resolve)) });
    stream.leave();
    created(invitation("s1"));
    await settle();
    expect([stream.state, FakeSocket.all.length]).toEqual(["ended", 0]);
  });

  test("no picture in time is an error of the last step", async () => {
    const { events } = start();
    await answerAll();
    await vi.advanceTimersByTimeAsync(30_000);
    expect(events.at(-1)).toContain("error at first-frame");
  });

  test("messages on our channel that make no sense are ignored", async () => {
    vi.spyOn(console, "warn").mockImplementation(() => {});
    const { stream } = start();
    const peer = await answerAll();
    const cursors: unknown[] = [];
    stream.on("cursor", (cursor) => cursors.push(cursor));
    for (const data of ["{", "[]", "null", '{"type":"cursor"}', '{"type":"pong"}', '{"type":"cursor","kind":"hidden"}']) {
      peer.channel("fanlight").onmessage?.({ data });
    }
    expect(cursors).toEqual([{ kind: "hidden" }]);
    expect(stream.state).toBe("live");
  });
});
