// From POST /1.0/sessions to the first decoded frame that is not blank, with the process engine and nothing warm but
// the browser; and the steps on the way.

import { AmsEvents } from "./events.mjs";
import { browser, open, session, start as launch } from "../browser/shared/page.mjs";
import { Stack, until } from "../browser/shared/stack.mjs";
import { median, quantile, round } from "./numbers.mjs";

const RUNS = Number(process.env.FANLIGHT_BENCH_RUNS ?? 20);

export async function start({ chromium, figure, say }) {
  const stack = await Stack.open();
  const engine = await browser(chromium);
  const events = await AmsEvents.open(stack);
  try {
    const runs = [];
    // The first launch of all reads programs from disk; it is told, but a machine boots once.
    for (let i = -1; i < RUNS; i++) {
      await stack.clear();
      const page = await open(engine, stack);
      try {
        events.seen.length = 0;
        // The page's own clock starts with the POST.
        const steps = await launch(page, "pattern");
        const began = await page.evaluate(() => performance.timeOrigin + performance.now()).then(async (now) => {
          const since = await page.evaluate(() => performance.now());
          const posted = await page.evaluate(() => {
            const posts = performance.getEntriesByType("resource").filter(({ name }) => /\/1\.0\/sessions\/?$/.test(name));
            return posts.at(-1)?.startTime;
          });
          return now - since + posted;
        });
        const at = Object.fromEntries(steps.map(({ step, ms }) => [step, ms]));
        const instance = await until("the session names its instance", 5_000, async () => stack.instance(await session(page)));
        const placed = events.seen.find(({ text, epoch }) => text.includes(instance) && epoch >= began);
        runs.push({
          placed: placed ? placed.epoch - began : Number.NaN,
          connected: at.discover,
          signalled: at.offer,
          ice: at.ice,
          first: at["first-frame"],
          after: at["first-frame"] - at.ice,
        });
        say(`${i < 0 ? "first launch" : `run ${i + 1}`}: ${Object.entries(at).map(([step, ms]) => `${step} ${round(ms, 0)}`).join(", ")} ms`);
      } finally {
        await page.context().close();
      }
    }
    const [cold, ...rest] = runs;
    const of = (step) => rest.map((one) => one[step]);
    const more = { runs: rest.length, size: "1280x720", application: "pattern", engine: "process" };
    figure("first_frame_p50_ms", quantile(of("first"), 0.5), "ms", null, more);
    figure("first_frame_p95_ms", quantile(of("first"), 0.95), "ms", 2000, more);
    figure("first_frame_first_launch_ms", cold.first, "ms", null, { ...more, runs: 1 });
    for (const [metric, step] of [["placed_ms", "placed"], ["streamer_connected_ms", "connected"], ["signalled_ms", "signalled"], ["ice_ms", "ice"]]) {
      figure(metric, median(of(step)), "ms", null, more);
    }
    figure("first_frame_after_ice_ms", median(of("after")), "ms", 150, more);
  } finally {
    events.close();
    await engine.close();
    await stack.close();
  }
}
