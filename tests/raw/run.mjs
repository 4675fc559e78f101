// Plays the documented signalling sequences, the good ones (H1 to H5) and the failures (F1 to F16), against a
// running stack: in a real browser, with code that imports nothing of Fanlight's. Where a failure is the client's
// own, the case checks what the servers owe it: that they do not cause it, or that they survive it.
//
// The stack is found by the variables FANLIGHT_GATEWAY_URL, FANLIGHT_TOKEN, FANLIGHT_CA, FANLIGHT_AMS_URL,
// FANLIGHT_AMS_CERT and FANLIGHT_AMS_KEY. Arguments choose cases by the first words of their names, e.g. H1 F12.

import assert from "node:assert/strict";
import { readFileSync, readdirSync } from "node:fs";
import http from "node:http";
import { chromium } from "playwright-core";
import { ams, api, upgrade } from "./rest.mjs";

/** Milliseconds for anything that needs an instance to boot on a busy machine. */
const BOOT = 60_000;
/** Milliseconds for anything else that has to happen. */
const SOON = 20_000;

const CHROMIUM = process.env.FANLIGHT_CHROMIUM ?? "/usr/bin/chromium";
const FLAGS = [
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
  "--autoplay-policy=no-user-gesture-required",
  "--allow-loopback-in-peer-connection",
];

// The stage: a page of our own that only carries the raw client.

const script = readFileSync(new URL("client.js", import.meta.url));
const site = http.createServer((request, response) => {
  const isScript = request.url === "/client.js";
  response.setHeader("Content-Type", `${isScript ? "text/javascript" : "text/html"}; charset=utf-8`);
  response.end(isScript ? script : '<!doctype html><title>raw</title><body></body><script src="/client.js"></script>');
});
await new Promise((resolve) => site.listen(0, "127.0.0.1", resolve));
const address = `http://127.0.0.1:${site.address().port}/`;
const browser = await chromium.launch({ executablePath: CHROMIUM, args: FLAGS });
console.log(`with: Chromium ${browser.version()}, Node ${process.version}`);

const pages = [];
async function newPage() {
  // The certificate of a local stack is its own; the REST calls check it, the browser has no way to be told.
  const context = await browser.newContext({ ignoreHTTPSErrors: true });
  const page = await context.newPage();
  await page.goto(address);
  pages.push(page);
  return page;
}

/** A raw client in a page; its methods mirror `window.raw`. */
async function client(options, page) {
  const home = page ?? (await newPage());
  const id = await home.evaluate((o) => window.raw.start(o), options);
  const call =
    (name) =>
    (...args) =>
      home.evaluate(([method, ...rest]) => window.raw[method](...rest), [name, id, ...args]);
  const names = ["events", "offer", "answer", "counters", "pictured", "size", "control", "closeControl", "leave", "vanish"];
  const self = Object.fromEntries(names.map((name) => [name, call(name)]));
  self.wait = (kind, ms = SOON, skip = 0) => call("wait")(kind, ms, skip);
  self.has = async (kind) => (await self.events()).some((event) => event.kind === kind);
  return self;
}

/** Waits for a condition; the words say what was waited for when it never came. */
async function until(what, condition, ms = SOON) {
  const end = Date.now() + ms;
  for (;;) {
    const value = await condition();
    if (value) return value;
    if (Date.now() > end) throw new Error(`${what}: not within ${ms} ms`);
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
}

/** A picture that is not blank and goes on: the only proof of a stream. */
async function streams(some) {
  const before = (await some.counters()).video?.frames ?? 0;
  await until("frames go on", async () => ((await some.counters()).video?.frames ?? 0) > before + 10);
  await until("the picture is not blank", () => some.pictured());
}

// The REST side, by hand.

const ok = (answer, status) => {
  assert.equal(answer.status, status, `HTTP status, with body ${JSON.stringify(answer.body)}`);
  assert.equal(answer.body.status, "success");
  return answer.body.metadata;
};

const refused = (answer, status) => {
  assert.equal(answer.status, status, `HTTP status, with body ${JSON.stringify(answer.body)}`);
  assert.equal(answer.body.type, "error");
  assert.equal(answer.body.status, "failed");
  assert.equal(answer.body.status_code, status);
  assert.ok(answer.body.error.length > 0, "the refusal has words");
};

/** Exactly what version 1.31.0 of the original's client sends by default, in its order. */
const defaultBody = (app) => ({
  app,
  region: "",
  joinable: false,
  screen: { width: 1280, height: 720, fps: 60, density: 240 },
  extra_data: null,
});

const opened = new Set();

async function create(more = {}) {
  // With the trailing slash: that is what the original's client posts to, and it follows no redirect.
  const session = ok(await api("POST", "/1.0/sessions/", { ...defaultBody(application), ...more }), 201);
  opened.add(session.id);
  return session;
}
const join = async (id, body) => ok(await api("POST", `/1.0/sessions/${id}/join`, body), 200);
const sessionOf = async (id) => (await api("GET", `/1.0/sessions/${id}`)).body.metadata;
const active = (id) => until(`session ${id} is active`, async () => (await sessionOf(id))?.status === "active", BOOT);
const remove = async (id) => {
  opened.delete(id);
  await api("DELETE", `/1.0/sessions/${id}`);
};
const target = (invitation) => ({ url: invitation.url, stunServers: invitation.stun_servers });

/** A joinable session that runs, and a client that streams it. */
async function running(options = {}) {
  const session = await create({ joinable: true, idle_time_min: 5 });
  const some = await client({ ...target(session), ...options });
  await some.wait("ready", BOOT);
  return { session, some };
}

/** The instance still serves: a new client gets a picture. */
async function stillServes(id) {
  const next = await client(target(await join(id)));
  await next.wait("ready", BOOT);
  await streams(next);
  await next.leave();
}

/** The media sections of a description: kind and direction, in order. */
const sections = (sdp) =>
  sdp
    .split(/^m=/m)
    .slice(1)
    .map((section) => {
      const kind = section.slice(0, section.indexOf(" "));
      return kind === "application" ? kind : `${kind} ${/^a=(sendrecv|sendonly|recvonly|inactive)/m.exec(section)?.[1]}`;
    });

const listed = ok(await api("GET", "/1.0/applications"), 200).map(({ name }) => name);
/** One whose picture never stands still, where there is one. */
const application =
  process.env.FANLIGHT_RAW_APPLICATION ?? ["pattern", "scene", "terminal"].find((name) => listed.includes(name)) ?? listed[0];
if (application === undefined) throw new Error("the gateway lists no application to stream");

const cases = {
  async "H1 join a running session with API version 2"() {
    const session = await create({ joinable: true, idle_time_min: 5 });
    await active(session.id);
    const some = await client({ ...target(await join(session.id)), channels: ["one", "two"] });
    await some.wait("ready", BOOT);
    const kinds = (await some.events()).map(({ kind }) => kind);
    const order = ["opened", "got:resp:discover", "got:offer", "described", "ice:connected", "connection:connected", "ready"];
    assert.deepEqual([...kinds].filter((kind) => order.includes(kind)), order);
    assert.equal(kinds.filter((kind) => kind === "got:resp:discover").length, 1, "exactly one resp:discover");
    assert.equal(kinds.filter((kind) => kind === "got:offer").length, 1, "exactly one offer");
    const { message } = await some.wait("got:resp:discover");
    assert.equal(message.max_api_version, 2);
    assert.equal(message.fps, 60);
    assert.ok(Array.isArray(message.capabilities));
    for (const label of ["control", "one", "two"]) await some.wait(`open:${label}`);
    const offer = await some.offer();
    assert.deepEqual(sections(offer), ["audio sendonly", "video sendonly", "application"]);
    assert.match(offer, /^a=setup:actpass/m);
    assert.match(offer, /^a=group:BUNDLE /m);
    const streamsOf = new Set([...offer.matchAll(/^a=msid:(\S+)/gm)].map((match) => match[1]));
    assert.ok(!streamsOf.has("-") && streamsOf.size === 2, `picture and sound have streams of their own: ${[...streamsOf]}`);
    assert.deepEqual(sections(await some.answer()), ["audio recvonly", "video recvonly", "application"]);
    const { width, height } = await until("a frame was shown", () => some.size());
    assert.deepEqual([width, height], [1280, 720]);
    await streams(some);
    assert.ok(await some.control("input::key", { code: 44, pressed: true }));
    assert.ok(await some.control("input::key", { code: 44, pressed: false }));
    await streams(some);
  },

  async "H1 the same for an instance that AMS started with streaming"() {
    const started = await ams("POST", "/1.0/instances", {
      app_id: application,
      app_version: -1,
      no_start: false,
      config: { platform: "webrtc", enable_streaming: true, display: { width: 1280, height: 720, fps: 60, density: 240 } },
    });
    assert.equal(started.status, 202, JSON.stringify(started.body));
    const path = started.body.metadata.resources.instances[0];
    try {
      const id = await until(
        "the instance has the tag of its session",
        async () => {
          const { tags = [] } = (await ams("GET", path)).body.metadata;
          return tags.find((tag) => tag.startsWith("session="))?.slice("session=".length);
        },
        BOOT,
      );
      await until("the session is known", async () => (await api("GET", `/1.0/sessions/${id}`)).status === 200);
      // The end-to-end tests of the original's client join like this, again and again.
      for (let i = 0; i < 2; i++) {
        const some = await client(target(await join(id, { disconnect_clients: true })));
        await some.wait("ready", BOOT);
        await streams(some);
        await some.leave();
      }
    } finally {
      await ams("DELETE", path, { force: true });
    }
  },

  async "H1 candidates may come before the answer"() {
    const session = await create();
    const some = await client({ ...target(session), early: true });
    await some.wait("ready", BOOT);
    await streams(some);
  },

  async "H1 with a display that the joining client chooses"() {
    const { session, some } = await running();
    await some.leave();
    const next = await client(target(await join(session.id, { screen: { width: 801, height: 599 } })));
    await next.wait("ready", BOOT);
    await until("the picture has the size asked for, made even", async () => {
      const size = await next.size();
      return size?.width === 802 && size?.height === 600;
    });
  },

  async "H2 create and connect while the instance is still booting"() {
    const session = await create();
    assert.deepEqual([session.status, session.joinable], ["created", false]);
    const some = await client(target(session));
    await some.wait("opened");
    await some.wait("ready", BOOT);
    await streams(some);
    assert.equal((await sessionOf(session.id)).status, "active");
  },

  async "H3 a client that offers: API version 1"() {
    const some = await client({ ...target(await create()), apiVersion: 1, channels: ["one"] });
    await some.wait("ready", BOOT);
    assert.ok(!(await some.has("got:offer")), "the instance does not offer");
    for (const label of ["control", "one"]) await some.wait(`open:${label}`);
    await streams(some);
  },

  async "H3 a client that offers: API version 0"() {
    const some = await client({ ...target(await create()), apiVersion: 0 });
    await some.wait("ready", BOOT);
    await streams(some);
  },

  async "H3 an old client that sends neither discover nor settings"() {
    const some = await client({ ...target(await create()), apiVersion: 1, skip: ["discover", "settings"] });
    await some.wait("ready", BOOT);
    await streams(some);
  },

  async "H4 the newer client takes over at its settings, and the older one knows at once"() {
    const { session, some: older } = await running();
    const invitation = await join(session.id);
    await streams(older); // A join alone hurts nobody.
    const idle = await client({ ...target(invitation), mute: true });
    await idle.wait("opened");
    await streams(older); // Nor does a socket.
    const newer = await client(target(await join(session.id)));
    await newer.wait("ready", BOOT);
    const { code } = await older.wait("error");
    assert.equal(code, 14, "the older client sees the instance's abort, not a lost connection");
    assert.ok(!(await older.has("ice:disconnected")), "it did not have to wait for ICE");
    await streams(newer);
  },

  async "H5 a client leaves and comes back to the same instance"() {
    const { session, some } = await running();
    const { container_id: instance } = await sessionOf(session.id);
    await some.leave();
    await stillServes(session.id);
    const after = await sessionOf(session.id);
    assert.deepEqual([after.status, after.container_id], ["active", instance]);
  },

  async "H5 a session that is not joinable ends with its client"() {
    const session = await create({ joinable: false });
    const some = await client(target(session));
    await some.wait("ready", BOOT);
    await some.leave();
    await until("the session is gone", async () => {
      const answer = await api("GET", `/1.0/sessions/${session.id}`);
      return answer.status === 404 || ["terminated", "terminating"].includes(answer.body.metadata?.status);
    }, BOOT);
  },

  async "F1 create and join are refused with the right codes and the envelope"() {
    refused(await api("POST", "/1.0/sessions/", { ...defaultBody("no-such-application") }), 400);
    refused(await api("POST", "/1.0/sessions/", { ...defaultBody(application), app: undefined }), 400);
    refused(await api("POST", "/1.0/sessions/", '{"app":'), 400);
    refused(await api("POST", "/1.0/sessions/", { ...defaultBody(application), screen: { width: -1, height: 1e12 } }), 400);
    refused(await api("POST", "/1.0/sessions/", { ...defaultBody(application), region: "no-such-region" }), 404);
    refused(await api("POST", "/1.0/sessions/", defaultBody(application), {}), 401);
    refused(await api("POST", "/1.0/sessions/", defaultBody(application), { Authorization: "Macaroon root=AgEUx" }), 401);
    refused(await api("POST", "/1.0/sessions/bvpg7vbmend4td6moir0/join", {}), 404);
    const large = await api("POST", "/1.0/sessions/", { ...defaultBody(application), extra_data: "x".repeat(3_000_000) });
    assert.ok([400, 413].includes(large.status), `3 MB of body: ${large.status}`);
    assert.equal(large.body.status, "failed");
  },

  async "F2 every answer of create and join has a url and a list of servers"() {
    const session = await create({ joinable: true, idle_time_min: 5, extra_data: { any: ["value", 1] } });
    await active(session.id);
    // With and without a body: both have to work.
    for (const answer of [session, await join(session.id), await join(session.id, { disconnect_clients: true })]) {
      assert.match(answer.url, /^wss:\/\/[^/]+\/1\.0\/sessions\/[a-zA-Z0-9\-_:]+\/sockets\/slave\?token=.+$/);
      assert.ok(Array.isArray(answer.stun_servers));
    }
  },

  async "F3 a socket is refused at the upgrade, with a status that says why"() {
    const session = await create({ joinable: true, idle_time_min: 5 });
    const other = await create({ joinable: true, idle_time_min: 5 });
    const url = new URL(session.url);
    const without = new URL(url);
    without.search = "";
    assert.equal((await upgrade(without.href)).status, 401, "no token");
    assert.equal((await upgrade(`${without.href}?token=nonsense`)).status, 401, "no valid token");
    const foreign = new URL(other.url);
    foreign.pathname = url.pathname;
    assert.equal((await upgrade(foreign.href)).status, 403, "the token of another session");
    assert.equal((await upgrade(url.href.replace("/slave", "/adb"))).status >= 400, true, "another role");
    const some = await client(target(session));
    await some.wait("opened");
    assert.ok([403, 410].includes((await upgrade(session.url)).status), "a token that was used");
    const second = await client(target({ ...session, url: without.href }));
    assert.equal((await second.wait("error")).code, 2, "the SDK sees an error without a reason");
  },

  async "F3 both spellings of the path open a socket"() {
    const session = await create({ joinable: true, idle_time_min: 5 });
    const some = await client(target({ ...session, url: session.url.replace("/1.0/sessions/", "/1.0/session/") }));
    await some.wait("ready", BOOT);
  },

  async "F4 a socket that has to be closed says error first"() {
    const session = await create({ joinable: true, idle_time_min: 5 });
    const some = await client({ ...target(session), mute: true });
    await some.wait("opened");
    await remove(session.id);
    assert.equal((await some.wait("error", BOOT)).code, 2);
    const kinds = (await some.events()).map(({ kind }) => kind);
    assert.ok(kinds.includes("got:error"), `an error message came: ${kinds}`);
    assert.ok(!kinds.includes("closed") || kinds.indexOf("got:error") < kinds.indexOf("closed"), "before the end of the socket");
  },

  async "F5 the words of an error reach the page"() {
    const session = await create({ joinable: true, idle_time_min: 5 });
    const some = await client({ ...target(session), mute: true });
    await some.wait("opened");
    // Another client's socket replaces this one.
    const next = await client(target(await join(session.id)));
    await next.wait("opened");
    const { message } = await some.wait("got:error");
    assert.equal(typeof message.code, "number");
    assert.ok(message.message.length > 0);
    assert.deepEqual((({ code, message: words }) => ({ code, words }))(await some.wait("error")), { code: 2, words: message.message });
  },

  async "F6 version 2 is announced, and a version that nobody speaks is refused with words"() {
    const some = await client({ ...target(await create()), claimVersion: 9 });
    assert.equal((await some.wait("got:resp:discover", BOOT)).message.max_api_version, 2);
    const { message } = await some.wait("got:error");
    assert.ok(message.message.length > 0);
  },

  async "F7 discover and settings are answered without delay by a running instance"() {
    const { session, some } = await running();
    await some.leave();
    const next = await client(target(await join(session.id)));
    await next.wait("got:resp:discover", 5_000);
    await next.wait("got:offer", 5_000);
  },

  async "F7 a client that never answers does not block the next one"() {
    const session = await create({ joinable: true, idle_time_min: 5 });
    const some = await client({ ...target(session), silent: true });
    await some.wait("described", BOOT);
    await stillServes(session.id);
  },

  async "F8 an answer that is no description gets an error, and the instance lives"() {
    for (const answerSdp of [Buffer.from("v=0\r\nnonsense").toString("base64"), "not base64!", ""]) {
      const session = await create({ joinable: true, idle_time_min: 5 });
      const some = await client({ ...target(session), answerSdp: answerSdp || " " });
      await some.wait("got:offer", BOOT);
      const { message } = await some.wait("got:error");
      assert.ok(message.message.length > 0);
      await stillServes(session.id);
      await remove(session.id);
    }
  },

  async "F8 candidates that are none are ignored"() {
    const session = await create({ joinable: true, idle_time_min: 5 });
    const some = await client({ ...target(session), badCandidates: true });
    await some.wait("ready", BOOT); // The instance learns our address from our checks.
    await streams(some);
  },

  async "F9 a client without a codec in common gets an error"() {
    const session = await create({ joinable: true, idle_time_min: 5 });
    const some = await client({ ...target(session), rejectVideo: true, keepSocket: true });
    await some.wait("got:offer", BOOT);
    const { message } = await some.wait("got:error");
    assert.equal(message.code, 4, message.message);
    await stillServes(session.id);
  },

  async "F10 a client that no path reaches fails, and the instance is free for the next"() {
    const session = await create({ joinable: true, idle_time_min: 5 });
    const some = await client({ ...target(session), deaf: true });
    await some.wait("got:offer", BOOT);
    const { code } = await some.wait("error", 60_000);
    // Chromium may report `disconnected` long before `failed`, which the SDK takes for a lost connection.
    assert.ok([9, 10, 2].includes(code), `ICE failed (9, 10), or the instance said so first (2): ${code}`);
    await stillServes(session.id);
  },

  async "F11 a gap in the network of some seconds heals"() {
    const { some } = await running();
    await streams(some);
    const pid = networkProcess();
    process.kill(pid, "SIGSTOP");
    try {
      await new Promise((resolve) => setTimeout(resolve, 9_000));
    } finally {
      process.kill(pid, "SIGCONT");
    }
    await streams(some);
    assert.ok(!(await some.has("error")), "no error was reported");
  },

  async "F12 the instance's end is seen at once as such"() {
    const { session, some } = await running();
    await remove(session.id);
    const { code } = await some.wait("error");
    assert.equal(code, 14, "by the abort, not by a lost connection");
    assert.ok(!(await some.has("ice:disconnected")));
  },

  async "F13 a control channel that is closed takes nothing else with it"() {
    const { session, some } = await running();
    await some.closeControl();
    await some.wait("gone:control");
    await streams(some);
    await some.vanish();
    await stillServes(session.id);
  },

  async "F14 microphone and camera that never send do no harm"() {
    const session = await create({ joinable: true, idle_time_min: 5 });
    const some = await client({ ...target(session), microphone: true, camera: true });
    await some.wait("ready", BOOT);
    const offered = sections(await some.offer());
    assert.equal(offered[0], "audio sendrecv", "microphone wanted");
    assert.equal(offered.at(-1), "application");
    const [camera, screen] = [offered.indexOf("video recvonly"), offered.indexOf("video sendonly")];
    assert.ok(screen > 0 && camera < screen, `a camera's section comes before the picture's: ${offered}`);
    await streams(some);
  },

  async "F14 a client that wants neither picture nor sound gets its channels"() {
    const session = await create({ joinable: true, idle_time_min: 5 });
    const some = await client({ ...target(session), audio: false, video: false });
    await some.wait("ready", BOOT);
    await some.wait("open:control");
    assert.deepEqual(sections(await some.offer()), ["application"]);
  },

  async "F15 frames that nobody understands do not stop what follows"() {
    for (const text of ["{", "[]", "null", '{"type":7}', '{"kind":"discover"}']) {
      const session = await create({ joinable: true, idle_time_min: 5 });
      const some = await client({ ...target(session), first: [{ text }], tolerate: [5] });
      await some.wait("ready", BOOT);
      await remove(session.id);
    }
  },

  async "F15 an unknown type gets error 5, on which an old client goes on with version 1"() {
    const session = await create({ joinable: true, idle_time_min: 5 });
    const first = [{ text: '{"type":"dance"}' }];
    const some = await client({ ...target(session), first, tolerate: [5], apiVersion: 1, skip: ["discover"] });
    assert.equal((await some.wait("got:error", BOOT)).message.code, 5);
    await some.wait("ready", BOOT);
    await streams(some);
  },

  async "F15 binary and huge frames get an error before the socket ends, and the next client is served"() {
    for (const first of [[{ binary: [1, 2, 3] }], [{ large: 1_000_000 }]]) {
      const session = await create({ joinable: true, idle_time_min: 5 });
      const some = await client({ ...target(session), first, mute: true });
      assert.equal((await some.wait("error", BOOT)).code, 2);
      assert.ok(await some.has("got:error"), "with a message, not only a closed socket");
      await stillServes(session.id);
      await remove(session.id);
    }
  },

  async "F16 every ICE server in an answer is one that a browser takes"() {
    const session = await create({ joinable: true, idle_time_min: 5 });
    await active(session.id);
    const page = await newPage();
    for (const { stun_servers: servers } of [session, await join(session.id)]) {
      for (const { urls, username, password } of servers) {
        assert.ok(Array.isArray(urls) && urls.length > 0);
        for (const url of urls) assert.match(url, /^(stun|turns?):/);
        if (urls.some((url) => url.startsWith("turn"))) assert.ok(username && password, "turn needs both credentials");
      }
      assert.equal(await page.evaluate((list) => window.raw.iceServersAreTaken(list), servers), true);
    }
  },
};

/** The process of this browser through which all its packets go. */
function networkProcess() {
  const parents = new Map();
  const candidates = [];
  for (const entry of readdirSync("/proc").filter((name) => /^\d+$/.test(name))) {
    try {
      const status = readFileSync(`/proc/${entry}/stat`, "utf8");
      parents.set(Number(entry), Number(status.slice(status.lastIndexOf(")") + 2).split(" ")[1]));
      if (readFileSync(`/proc/${entry}/cmdline`, "utf8").includes("network.mojom.NetworkService")) candidates.push(Number(entry));
    } catch {
      // It ended while we looked.
    }
  }
  const ours = candidates.find((pid) => {
    for (let at = pid; at > 1; at = parents.get(at) ?? 0) if (at === process.pid) return true;
    return false;
  });
  if (ours === undefined) throw new Error("the browser's network process was not found");
  return ours;
}

// One after the other; each cleans up behind itself.

let [passed, failed] = [0, 0];
const chosen = process.argv.slice(2);
for (const [name, play] of Object.entries(cases)) {
  if (chosen.length > 0 && !chosen.some((start) => `${name} `.startsWith(`${start} `))) continue;
  const began = Date.now();
  let problem;
  try {
    await play();
  } catch (error) {
    problem = error;
  }
  for (const page of pages.splice(0)) await page.context().close().catch(() => undefined);
  for (const id of [...opened]) await remove(id).catch((error) => (problem ??= error));
  if (problem) failed += 1;
  else passed += 1;
  console.log(`${problem ? "not ok" : "ok"} ${name} (${Date.now() - began} ms)`);
  if (problem) console.log(`    ${String(problem.message ?? problem).split("\n").join("\n    ")}`);
}
await browser.close();
site.close();
console.log(`${passed} passed, ${failed} failed`);
process.exitCode = failed === 0 && passed > 0 ? 0 : 1;
