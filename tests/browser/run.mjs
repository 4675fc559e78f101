// Drives the applications through the page in Chromium, as a person would, and believes only pixels and decoded
// sound. The stack is found by the FANLIGHT_* variables, or started for the occasion. Arguments choose cases by the
// beginning of their names. Pictures of failures are kept in $FANLIGHT_SHOTS, when that is set.

import assert from "node:assert/strict";
import { createSocket } from "node:dgram";
import { once } from "node:events";
import { mkdirSync } from "node:fs";
import { join } from "node:path";
import { chromium } from "playwright-core";
import { browser, launch, open, screenshot, session, shown, start } from "./shared/page.mjs";
import { Stack, until } from "./shared/stack.mjs";

/** Milliseconds for what follows from one action. */
const SOON = 15_000;

const stack = await Stack.open();
const engine = await browser(chromium);
console.log(`with: Chromium ${engine.version()}, Node ${process.version}`);

const cases = [];
const test = (name, body) => cases.push({ name, body });

const probe = (page, what, ...args) => page.evaluate(([name, given]) => window.probe[name](...given), [what, args]);

/** Waits until most of the picture has a colour, each channel between two bounds. */
const filled = (page, name, low, high) =>
  until(`most of the picture is ${name}`, SOON, async () => (await probe(page, "share", low, high)) > 0.9);
const RED = [[120, 0, 0], [255, 90, 90]];
const GREEN = [[0, 100, 0], [120, 255, 120]];
const BLUE = [[0, 0, 90], [120, 130, 255]];

/** Types into the streamed application. */
async function type(page, text) {
  await page.locator(".surface").focus();
  for (const letter of text) {
    // The browser driver sends a capital letter without its Shift key; a person's keyboard does not.
    const shifted = letter !== letter.toLowerCase() || '~!@#$%^&*()_+{}|:"<>?'.includes(letter);
    if (shifted) await page.keyboard.down("Shift");
    await page.keyboard.press(letter, { delay: 5 });
    if (shifted) await page.keyboard.up("Shift");
  }
  await page.keyboard.press("Enter");
}

/** Frames come on: `count` more are decoded. */
async function advancing(page, count) {
  const before = await probe(page, "decoded");
  await until(`${count} more frames are decoded`, SOON, async () => (await probe(page, "decoded")) >= before + count);
}

const ended = (id) =>
  until(`session ${id} is gone`, 30_000, async () => {
    const { status, body } = await stack.gateway("GET", `/1.0/sessions/${id}`);
    return status === 404 || body.metadata?.status === "terminated";
  });

test("the page logs in with its link and shows the applications that come with Fanlight", async (page) => {
  const names = await page.locator(".card").evaluateAll((cards) => cards.map((card) => card.dataset.app));
  for (const name of ["terminal", "paint", "game"]) assert.ok(names.includes(name), `${name} is not among ${names}`);
  assert.ok(!page.url().includes("code="), "the code left the address");
});

test("a terminal shows what is typed into it", async (page) => {
  await launch(page, "terminal");
  assert.ok((await probe(page, "contrast")) > 12, "the picture is not blank");
  assert.deepEqual(await probe(page, "size"), [1280, 720]);
  // Colours by escape codes: only a shell that ran the command as it was typed fills the screen with them.
  await type(page, String.raw`PS1=; clear; printf '\e[48;2;220;20;20m\e[2J'`);
  await filled(page, "red", ...RED);
  await type(page, String.raw`printf '\e[48;2;20;200;20m\e[2J\e[H'`);
  await filled(page, "green", ...GREEN);
  // Modifiers: Ctrl+C ends a program that would never end; what follows is typed into the shell again.
  await type(page, "sleep 1000");
  await page.keyboard.press("Control+c");
  await type(page, String.raw`printf '\e[48;2;20;20;200m\e[2J\e[H'`);
  await filled(page, "blue", ...BLUE);
});

test("leaving keeps the session, joining again finds the picture as it was, and stopping ends it", async (page) => {
  await launch(page, "terminal");
  const id = await session(page);
  await type(page, String.raw`PS1=; clear; printf '\e[48;2;220;20;20m\e[2J'`);
  await filled(page, "red", ...RED);
  await page.getByText("Leave", { exact: true }).click();
  const row = page.locator(`.session[data-session="${id}"]`);
  await row.waitFor({ timeout: SOON });
  await row.getByText("Join", { exact: true }).click();
  await shown(page, SOON).catch((error) => {
    // One colour is what our own page takes for blank: the pixels decide.
    if (!/shows a picture/.test(error.message)) throw error;
  });
  assert.equal(await session(page), id);
  await filled(page, "red", ...RED);
  await type(page, String.raw`printf '\e[48;2;20;200;20m\e[2J\e[H'`);
  await filled(page, "green", ...GREEN);
  await page.getByText("Stop", { exact: true }).click();
  await page.waitForSelector(".gallery", { timeout: SOON });
  await ended(id);
});

test("the mouse draws in a program of the X11 world", async (page) => {
  await launch(page, "paint");
  // The black sheet of the new picture is what the mouse draws on, in red; a window of tools lies over its middle.
  const sheet = await until("a sheet to draw on is shown", SOON, async () => {
    const points = [];
    for (let y = 100; y < 700; y += 20) for (let x = 100; x < 1180; x += 20) points.push([x, y]);
    const colours = await probe(page, "colours", points);
    const black = points.filter((_, i) => colours[i].every((value) => value < 24));
    if (black.length < 40) return undefined;
    const [xs, ys] = [black.map(([x]) => x), black.map(([, y]) => y)];
    return { left: Math.min(...xs), right: Math.max(...xs), top: Math.min(...ys), bottom: Math.max(...ys) };
  });
  const y = sheet.bottom - 40;
  const [from, to] = [sheet.left + 40, Math.min(sheet.right - 40, sheet.left + 340)];
  const stroke = [];
  for (let x = from + 20; x <= to - 20; x += 20) stroke.push([x, y]);
  const drawn = async () => {
    const around = stroke.flatMap(([x, at]) => [-2, -1, 0, 1, 2].map((d) => [x, at + d]));
    const colours = await probe(page, "colours", around);
    return stroke.filter((_, i) => colours.slice(i * 5, i * 5 + 5).some(([red]) => red > 60)).length;
  };
  assert.equal(await drawn(), 0, "the sheet is clean");
  const place = (x, at) => probe(page, "place", x, at);
  const begin = await place(from, y);
  await page.mouse.move(begin.x, begin.y);
  await page.mouse.down();
  for (let x = from; x <= to; x += 5) {
    const point = await place(x, y);
    await page.mouse.move(point.x, point.y);
  }
  await page.mouse.up();
  await until("the stroke is in the picture", SOON, async () => (await drawn()) >= stroke.length - 1);
});

test("a game moves and is heard", async (page) => {
  await launch(page, "game");
  await advancing(page, 60);
  await until("sound is decoded", 30_000, async () => {
    const { audio } = await probe(page, "statistics");
    return audio.totalAudioEnergy > 1e-4;
  });
});

test("frame numbers and the clock in the pixels advance", async (page) => {
  await start(page, "pattern");
  await until("a barcode is read", SOON, () => probe(page, "barcode"));
  // How many come in a second is the benches' business: this machine may be busy.
  const frames = [];
  await until("a hundred frames are shown and readable", 30_000, async () => {
    const seen = await probe(page, "watch", 1_000);
    assert.equal(seen.unreadable, 0, "every frame is readable");
    frames.push(...seen.frames);
    return frames.length >= 100;
  });
  // A picture may come twice, when a key frame was asked for; none may come after a later one.
  let repeated = 0;
  for (let i = 1; i < frames.length; i++) {
    assert.ok(frames[i].frame >= frames[i - 1].frame, `frame ${frames[i].frame} follows ${frames[i - 1].frame}`);
    if (frames[i].frame === frames[i - 1].frame) repeated++;
  }
  assert.ok(repeated <= frames.length / 20, `${repeated} of ${frames.length} frames are repeated`);
  const delays = frames.map(({ delayMs }) => delayMs).sort((a, b) => a - b);
  assert.ok(delays[0] > 0 && delays[frames.length >> 1] < 500, `delays from ${delays[0]} to ${delays.at(-1)} ms`);
});

test("keys, buttons and the pointer arrive as they were sent, and what is held is released on leaving", async (page) => {
  await start(page, "pattern");
  await page.locator(".surface").focus();
  const reading = (what, condition) =>
    until(what, SOON, async () => {
      const found = await probe(page, "barcode");
      return found && condition(found) && found;
    });
  // Evdev codes of the keys on a US keyboard.
  for (const [key, code] of [["a", 30], ["Enter", 28], ["F5", 63], ["ArrowLeft", 105], ["/", 53], ["`", 41], ["Delete", 111]]) {
    const before = (await reading("a barcode", () => true)).keyPresses;
    await page.keyboard.press(key);
    await reading(`key ${key} arrives as ${code}`, (now) => now.key === code && now.keyPresses === (before + 1) % 65536);
  }
  for (const [x, y] of [[10, 10], [640, 360], [1279, 719], [333, 555]]) {
    const point = await probe(page, "place", x, y);
    await page.mouse.move(point.x, point.y);
    await reading(`the pointer is at ${x}, ${y}`, ({ pointer }) => Math.abs(pointer[0] - x) <= 1 && Math.abs(pointer[1] - y) <= 1);
  }
  for (const [button, bit] of [["left", 1], ["right", 2], ["middle", 4]]) {
    await page.mouse.down({ button });
    await reading(`button ${button} is held`, ({ buttons }) => buttons === bit);
    await page.mouse.up({ button });
    await reading(`button ${button} is released`, ({ buttons }) => buttons === 0);
  }
  await page.mouse.down();
  await reading("a button is held", ({ buttons }) => buttons === 1);
  const id = await session(page);
  await page.evaluate(() => (location.hash = "#/"));
  await page.waitForSelector(".gallery");
  await page.evaluate((session) => (location.hash = `#/session/${session}`), id);
  await shown(page, SOON);
  await reading("nothing is held", ({ buttons }) => buttons === 0);
  await page.mouse.up();
});

test("a tone is heard at its loudness", async (page) => {
  await start(page, "pattern-tone");
  const level = async () => {
    const { audio } = await probe(page, "statistics");
    return audio;
  };
  await until("sound is decoded", SOON, async () => (await level()).totalAudioEnergy > 1e-3);
  const first = await level();
  await new Promise((resolve) => setTimeout(resolve, 2_000));
  const second = await level();
  const seconds = second.totalSamplesDuration - first.totalSamplesDuration;
  const energy = (second.totalAudioEnergy - first.totalAudioEnergy) / seconds;
  // Browsers square the largest sample of each stretch: a sine at half of full scale gives 1/4.
  assert.ok(energy > 0.2 && energy < 0.3, `energy per second is ${energy}`);
});

test("a second page takes the stream over and the first one is told at once", async (page) => {
  await start(page, "pattern");
  const id = await session(page);
  const other = await open(engine, stack);
  try {
    await other.evaluate((session) => (location.hash = `#/session/${session}`), id);
    await shown(other, SOON);
    await until("the first page is told", 5_000, () => page.evaluate(() => window.fanlight.state === "ended"));
    assert.equal(await page.locator(".message").getAttribute("data-reason"), "replaced");
    await other.evaluate(() => window.fanlight.stream.stop());
    await ended(id);
  } finally {
    await other.context().close();
  }
});

test("an application that does not exist is told in words", async (page) => {
  await page.evaluate(() => (location.hash = "#/app/no-such-thing"));
  const message = page.locator(".message.problem");
  await message.waitFor({ timeout: SOON });
  assert.equal(await message.getAttribute("data-step"), "created");
  assert.match(await message.innerText(), /no-such-thing/);
});

test("a link works once only", async (page) => {
  const link = await stack.link();
  const stranger = await engine.newContext({ ignoreHTTPSErrors: true });
  const other = await engine.newContext({ ignoreHTTPSErrors: true });
  try {
    const [first, second] = [await stranger.newPage(), await other.newPage()];
    await first.goto(link);
    await first.waitForSelector(".card", { timeout: SOON });
    await second.goto(link);
    await until("the second one is refused", SOON, () => second.evaluate(() => !document.querySelector(".card") && /code|link/i.test(document.body.innerText)));
  } finally {
    await stranger.close();
    await other.close();
  }
  assert.equal(page.complaints.length, 0);
});

/** Opens the connection check from what shows now and waits for its end; step, status and text of each line. */
async function connectionCheck(page) {
  await page.getByRole("button", { name: "Connection check" }).click();
  await page.locator('.check-result:not([data-state="working"])').waitFor({ timeout: SOON });
  return page
    .locator(".checks li")
    .evaluateAll((lines) => lines.map((line) => ({ ...line.dataset, text: line.innerText })));
}

test("check of the connection finds nothing broken in a whole stack, from the gallery and from a failure", async (page) => {
  const checks = await connectionCheck(page);
  const of = (step) => checks.find((check) => check.step === step)?.status;
  for (const step of ["page", "decoding", "gateway", "time", "store", "bus", "agents", "applications", "capacity"]) {
    assert.equal(of(step), "ok", `${step}: ${JSON.stringify(checks)}`);
  }
  assert.ok(checks.every(({ status }) => ["ok", "warning", "skipped"].includes(status)), JSON.stringify(checks));
  assert.notEqual(await page.locator(".check-result").getAttribute("data-state"), "failed");
  // It can be left by keys alone, and these are where they were before.
  assert.equal(await page.evaluate(() => document.activeElement.textContent), "Close");
  await page.keyboard.press("Escape");
  await page.locator("dialog").waitFor({ state: "detached", timeout: SOON });
  assert.equal(await page.evaluate(() => document.activeElement.textContent), "Connection check");

  await page.evaluate(() => (location.hash = "#/app/no-such-thing"));
  await page.locator(".message.problem").waitFor({ timeout: SOON });
  const again = await connectionCheck(page);
  assert.deepEqual(again.map(({ step }) => step), checks.map(({ step }) => step));
  await page.getByRole("button", { name: "Close" }).click();
  await page.locator("dialog").waitFor({ state: "detached", timeout: SOON });
});

/** A STUN server on loopback that answers after so many milliseconds (RFC 8489, sections 5 and 14.2). */
async function stunServer(delayMs) {
  const socket = createSocket("udp4");
  socket.on("message", (request, { address, port }) => {
    if (request.length < 20 || request.readUInt16BE(0) !== 0x0001) return;
    const answer = Buffer.alloc(32);
    answer.writeUInt16BE(0x0101, 0);
    answer.writeUInt16BE(12, 2);
    request.copy(answer, 4, 4, 20);
    answer.writeUInt16BE(0x0020, 20);
    answer.writeUInt16BE(8, 22);
    answer.writeUInt8(1, 25);
    answer.writeUInt16BE(port ^ 0x2112, 26);
    const own = address.split(".").map(Number);
    for (let i = 0; i < 4; i++) answer.writeUInt8(own[i] ^ request[4 + i], 28 + i);
    setTimeout(() => socket.send(answer, port, address, () => undefined), delayMs);
  });
  socket.bind(0, "127.0.0.1");
  await once(socket, "listening");
  return socket;
}

test("round trips to several regions are measured and sent with a launch", async (page) => {
  const servers = [await stunServer(0), await stunServer(150)];
  try {
    const [near, far] = servers.map((server) => `stun:127.0.0.1:${server.address().port}`);
    const region = (name, ...urls) => ({ name, ...(urls.length > 0 && { stun_servers: urls }) });
    const metadata = [region("near", near), region("far", far), region("mute", "stun:127.0.0.1:9"), region("bare")];
    await page.route("**/1.0/regions?*", (route) =>
      route.fulfill({ json: { type: "sync", status: "success", status_code: 200, metadata } }),
    );
    await page.reload();
    await page.waitForSelector(".card", { timeout: SOON });
    const request = page.waitForRequest((one) => one.method() === "POST" && one.url().endsWith("/1.0/sessions"));
    await page.locator('.card[data-app="terminal"] a').click();
    const { round_trips: trips } = (await request).postDataJSON();
    assert.deepEqual(Object.keys(trips).sort(), ["far", "near"]);
    assert.ok(trips.near > 0 && trips.near < trips.far && trips.far >= 150, JSON.stringify(trips));
  } finally {
    for (const server of servers) server.close();
  }
});

let [passed, failed] = [0, 0];
const wanted = process.argv.slice(2);
for (const { name, body } of cases) {
  if (wanted.length > 0 && !wanted.some((begin) => name.startsWith(begin))) continue;
  const began = performance.now();
  let page;
  try {
    await stack.clear();
    page = await open(engine, stack);
    await body(page);
    passed++;
    console.log(`ok      ${name} (${((performance.now() - began) / 1000).toFixed(1)} s)`);
  } catch (error) {
    failed++;
    console.log(`FAILED  ${name}\n        ${String(error.stack ?? error).replaceAll("\n", "\n        ")}`);
    for (const complaint of page?.complaints ?? []) console.log(`        the page said: ${complaint}`);
    if (page && process.env.FANLIGHT_SHOTS) {
      mkdirSync(process.env.FANLIGHT_SHOTS, { recursive: true });
      await screenshot(page, join(process.env.FANLIGHT_SHOTS, `${name.replaceAll(/\W+/g, "-").slice(0, 60)}.png`));
    }
  }
  await page?.context().close();
}
await stack.clear().catch((error) => {
  failed++;
  console.log(`FAILED  clearing up: ${error.message}`);
});
await engine.close();
await stack.close();
console.log(`${passed} passed, ${failed} failed`);
process.exit(failed === 0 && passed > 0 ? 0 : 1);
