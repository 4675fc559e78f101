// Chromium with Fanlight's page in it.

import { existsSync } from "node:fs";
import { until } from "./stack.mjs";

/** Milliseconds from a click on Launch to the first picture on a busy machine. */
export const LAUNCH = 60_000;

const executable = process.env.FANLIGHT_CHROMIUM ?? "/usr/bin/chromium";
const FLAGS = [
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
  "--disable-background-timer-throttling",
  "--disable-renderer-backgrounding",
  "--disable-backgrounding-occluded-windows",
  "--autoplay-policy=no-user-gesture-required",
  "--allow-loopback-in-peer-connection",
];

/** Starts the browser; `wrapper` is a program that starts it somewhere else, such as in a network namespace. */
export async function browser(chromium, { wrapper } = {}) {
  if (!existsSync(executable)) throw new Error(`no browser at ${executable}: install chromium, or name one in FANLIGHT_CHROMIUM`);
  return chromium.launch({ executablePath: wrapper ?? executable, args: FLAGS });
}

/** A page that is logged in and shows the gallery. Its complaints are collected in `page.complaints`. */
export async function open(chromium, stack, { viewport = { width: 1340, height: 800 }, display = "720p" } = {}) {
  const context = await chromium.newContext({ ignoreHTTPSErrors: true, viewport });
  await context.addInitScript({ path: new URL("probe.js", import.meta.url).pathname });
  await context.addInitScript((name) => localStorage.setItem("fanlight.display", name), display);
  const page = await context.newPage();
  page.complaints = [];
  page.on("pageerror", (error) => page.complaints.push(String(error)));
  page.on("console", (message) => message.type() === "error" && page.complaints.push(message.text()));
  await page.goto(await stack.link());
  await page.waitForSelector(".card", { timeout: 20_000 });
  return page;
}

const live = (page) => page.evaluate(() => ({ state: window.fanlight.state, steps: window.fanlight.steps.map((s) => ({ ...s })), error: window.fanlight.error }));

/** Waits until the stream in the page shows a picture that is not blank; the steps on the way. */
export async function shown(page, ms = LAUNCH) {
  return until("the page shows a picture", ms, async () => {
    const { state, steps, error } = await live(page);
    if (error) throw Object.assign(new Error(`step ${error.step}: ${error.message}`), { fatal: true });
    return state === "live" && steps.some(({ step }) => step === "first-frame") && steps;
  });
}

/** Launches an application by its card in the gallery, as a person does. */
export async function launch(page, app) {
  await page.locator(`.card[data-app="${app}"] a`).click();
  return shown(page);
}

/** Launches an application by the page's address; for applications that a test brings. */
export async function start(page, app) {
  await page.evaluate((name) => (location.hash = `#/app/${name}`), app);
  return shown(page);
}

export const session = (page) => page.evaluate(() => window.fanlight.sessionId);

/** A picture of the page for people who look into a failure. */
export async function screenshot(page, file) {
  await page.screenshot({ path: file }).catch(() => undefined);
}
