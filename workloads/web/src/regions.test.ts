import { afterEach, beforeEach, describe, expect, test, vi } from "vitest";
import type { Region } from "./api";
import { FanlightClient } from "./client";
import { type Outcome, probe } from "./probe";
import { RoundTrips, measure } from "./regions";

/** What a server does after so many milliseconds. */
type Behaviour = { ms: number; alone?: boolean; type?: string; code?: number; text?: string; complete?: boolean };

/** A network of STUN and TURN servers as peer connections see it. Each URL behaves one way for each try; the last stays. */
class Network {
  readonly asked: RTCConfiguration[] = [];
  open = 0;
  readonly #tries = new Map<string, number>();

  constructor(readonly servers: Record<string, Behaviour[]>) {}

  readonly peer = (configuration: RTCConfiguration): RTCPeerConnection => {
    const url = String(configuration.iceServers?.[0]?.urls);
    if (url.startsWith("bad:")) throw new SyntaxError("not an ICE server");
    this.asked.push(configuration);
    this.open += 1;
    const turn = this.#tries.get(url) ?? 0;
    this.#tries.set(url, turn + 1);
    const list = this.servers[url] ?? [];
    const behaviour = list[Math.min(turn, list.length - 1)];
    const timers: ReturnType<typeof setTimeout>[] = [];
    const fake = {
      iceGatheringState: "new",
      onicecandidate: undefined as ((event: unknown) => void) | undefined,
      onicecandidateerror: undefined as ((event: unknown) => void) | undefined,
      onicegatheringstatechange: undefined as (() => void) | undefined,
      createDataChannel: () => ({}),
      createOffer: async () => ({ type: "offer", sdp: "" }),
      setLocalDescription: async () => {
        if (!behaviour?.alone) fake.onicecandidate?.({ candidate: { type: "host" } });
        if (behaviour === undefined) return;
        timers.push(
          setTimeout(() => {
            const { type, code, text = "", complete } = behaviour;
            if (type !== undefined) fake.onicecandidate?.({ candidate: { type } });
            if (code !== undefined) fake.onicecandidateerror?.({ errorCode: code, errorText: text });
            if (complete) {
              fake.iceGatheringState = "complete";
              fake.onicegatheringstatechange?.();
            }
          }, behaviour.ms),
        );
      },
      close: () => {
        this.open -= 1;
        timers.forEach(clearTimeout);
      },
    };
    return fake as unknown as RTCPeerConnection;
  };
}

const now = () => Date.now();

beforeEach(() => void vi.useFakeTimers());
afterEach(() => {
  vi.useRealTimers();
  vi.unstubAllGlobals();
});

async function finished<T>(work: Promise<T>): Promise<T> {
  await vi.runAllTimersAsync();
  return work;
}

describe("probe", () => {
  const outcome = (url: string, behaviour: Behaviour | undefined): Promise<Outcome> => {
    const network = new Network(behaviour ? { [url]: [behaviour] } : {});
    return finished(probe({ urls: url }, { limitMs: 1_000, peer: network.peer, now })).then((result) => {
      expect(network.open).toBe(0);
      return result;
    });
  };

  test.each<[string, string, Behaviour | undefined, Outcome]>([
    ["an address of ours is the end", "stun:a", { ms: 40, type: "srflx" }, { kind: "given", ms: 40 }],
    ["a relay is the end", "turn:a", { ms: 50, type: "relay" }, { kind: "given", ms: 50 }],
    ["a relay needs more than an address of ours", "turn:a", { ms: 50, type: "srflx" }, { kind: "silent" }],
    ["nothing comes back", "stun:a", undefined, { kind: "silent" }],
    ["an answer after the limit is none", "stun:a", { ms: 1_200, type: "srflx" }, { kind: "silent" }],
    ["the server refuses", "turn:a", { ms: 30, code: 401, text: "Unauthorized", complete: true }, { kind: "refused", code: 401, text: "Unauthorized" }],
    ["the browser does not reach it", "stun:a", { ms: 30, code: 701, text: "no such host", complete: true }, { kind: "unreachable", text: "no such host" }],
    ["gathering ends without a word", "stun:a", { ms: 30, complete: true }, { kind: "ended" }],
    ["there is no network at all", "stun:a", { ms: 1, complete: true, alone: true }, { kind: "unreachable", text: "the browser uses no network for it" }],
    ["no relay and no word is silence", "turn:a", { ms: 30, complete: true }, { kind: "silent" }],
  ])("%s", async (_, url, behaviour, expected) => {
    expect(await outcome(url, behaviour)).toEqual(expected);
  });

  test("a URL that the browser refuses is told", async () => {
    const network = new Network({});
    expect(await probe({ urls: "bad:x" }, { limitMs: 1_000, peer: network.peer })).toEqual({ kind: "unreachable", text: "not an ICE server" });
  });

  test("relays are asked for alone", async () => {
    const network = new Network({ "turn:a": [{ ms: 1, type: "relay" }] });
    await finished(probe({ urls: "turn:a", username: "u", credential: "p" }, { limitMs: 1_000, peer: network.peer, now }));
    expect(network.asked).toEqual([{ iceServers: [{ urls: "turn:a", username: "u", credential: "p" }], iceTransportPolicy: "relay" }]);
  });
});

describe("measure", () => {
  const measured = (servers: Record<string, Behaviour[]>) => {
    const network = new Network(servers);
    return finished(measure(Object.keys(servers), { peer: network.peer, now })).then((ms) => ({ ms, asked: network.asked.length }));
  };

  test("the better one of two tries counts", async () => {
    expect(await measured({ "stun:a": [{ ms: 80, type: "srflx" }, { ms: 21, type: "srflx" }] })).toEqual({ ms: 21, asked: 2 });
    expect(await measured({ "stun:a": [{ ms: 20, type: "srflx" }, { ms: 90, type: "srflx" }] })).toEqual({ ms: 20, asked: 2 });
  });

  test("the nearest of several servers counts", async () => {
    const far = [{ ms: 300, type: "srflx" }];
    expect((await measured({ "stun:a": far, "stun:b": [{ ms: 30, type: "srflx" }] })).ms).toBe(30);
  });

  test("a second try that gets lost costs the rest of the second and no more", async () => {
    const began = Date.now();
    expect((await measured({ "stun:a": [{ ms: 400, type: "srflx" }, { ms: 5_000 }] })).ms).toBe(400);
    expect(Date.now() - began).toBeLessThanOrEqual(5_000);
    const slow = measure(["stun:a"], { peer: new Network({}).peer, now });
    await vi.advanceTimersByTimeAsync(1_001);
    expect(await slow).toBeUndefined();
  });

  test("who does not answer is not asked twice, and TURN servers are not asked at all", async () => {
    expect(await measured({ "stun:a": [{ ms: 5_000 }] })).toEqual({ ms: undefined, asked: 1 });
    expect(await measured({ "turn:a": [{ ms: 1, type: "relay" }] })).toEqual({ ms: undefined, asked: 0 });
  });
});

const region = (name: string, ...urls: string[]): Region => (urls.length > 0 ? { name, stun_servers: urls } : { name });

describe("round trips", () => {
  const setUp = (answers: (Region[] | Error)[], servers: Record<string, Behaviour[]> = {}) => {
    const network = new Network(servers);
    let asked = 0;
    const api = {
      regions: async () => {
        const answer = answers[Math.min(asked++, answers.length - 1)];
        if (answer instanceof Error || answer === undefined) throw answer;
        return answer;
      },
    };
    return { network, trips: new RoundTrips(api, { peer: network.peer, now }), asked: () => asked };
  };
  const near = [{ ms: 10, type: "srflx" }];
  const far = [{ ms: 120, type: "srflx" }];

  test("each region that can be measured is, and one that fails is left out", async () => {
    const regions = [region("near", "stun:n"), region("far", "stun:f"), region("mute", "stun:m"), region("bare")];
    const { trips } = setUp([regions], { "stun:n": near, "stun:f": far });
    expect(await finished(trips.get())).toEqual({ near: 10, far: 120 });
  });

  test.each([
    ["no region", []],
    ["one region", [region("near", "stun:n")]],
    ["one region with a server", [region("near", "stun:n"), region("bare")]],
  ])("with %s nothing is measured", async (_, regions) => {
    const { trips, network } = setUp([regions], { "stun:n": near });
    expect(await finished(trips.get())).toBeUndefined();
    expect(network.asked).toEqual([]);
  });

  test("what is known is kept for ten minutes, also while it is still being measured", async () => {
    const regions = [region("near", "stun:n"), region("far", "stun:f")];
    const { trips, asked } = setUp([regions], { "stun:n": near, "stun:f": far });
    const [first, second] = await finished(Promise.all([trips.get(), trips.get()]));
    expect(second).toEqual(first);
    await vi.advanceTimersByTimeAsync(590_000);
    await trips.get();
    expect(asked()).toBe(1);
    await vi.advanceTimersByTimeAsync(20_000);
    await finished(trips.get());
    expect(asked()).toBe(2);
  });

  test("a gateway that does not list its regions is asked again the next time", async () => {
    const regions = [region("near", "stun:n"), region("far", "stun:f")];
    const { trips } = setUp([new Error("not now"), regions], { "stun:n": near, "stun:f": far });
    expect(await finished(trips.get())).toBeUndefined();
    expect(await finished(trips.get())).toEqual({ near: 10, far: 120 });
  });
});

describe("launch", () => {
  const launched = async (options: { region?: string }, regions: Region[], servers: Record<string, Behaviour[]>) => {
    vi.stubGlobal("window", new EventTarget());
    const requests: { method: string; path: string; body: unknown }[] = [];
    const network = new Network(servers);
    const client = new FanlightClient({
      roundTrips: { peer: network.peer, now },
      fetch: async (url, init) => {
        requests.push({ method: init?.method ?? "", path: String(url), body: init?.body ? JSON.parse(String(init.body)) : undefined });
        const metadata = String(url).startsWith("/1.0/regions") ? regions : undefined;
        // The create is refused: the stream has no browser to go on in.
        return metadata
          ? new Response(JSON.stringify({ status: "success", metadata }), { status: 200 })
          : new Response(JSON.stringify({ status: "failed", error: "refused" }), { status: 403 });
      },
    });
    const video = new EventTarget() as unknown as HTMLVideoElement;
    const stream = client.launch("terminal", { video, ...options });
    await finished(stream.connect());
    return { create: requests.find(({ method }) => method === "POST")?.body as Record<string, unknown>, requests };
  };
  const both = [region("near", "stun:n"), region("far", "stun:f")];
  const servers = { "stun:n": [{ ms: 10, type: "srflx" }], "stun:f": [{ ms: 120, type: "srflx" }] };

  test("the round trips go to the gateway with the launch", async () => {
    const { create } = await launched({}, both, servers);
    expect(create["round_trips"]).toEqual({ near: 10, far: 120 });
    expect(create["region"]).toBeUndefined();
  });

  test("who names a region measures nothing", async () => {
    const { create, requests } = await launched({ region: "far" }, both, servers);
    expect(create["region"]).toBe("far");
    expect(create).not.toHaveProperty("round_trips");
    expect(requests).toHaveLength(1);
  });

  test("with one region the launch is as it always was", async () => {
    const { create } = await launched({}, both.slice(0, 1), servers);
    expect(create).not.toHaveProperty("round_trips");
  });
});
