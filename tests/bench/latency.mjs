// Glass to glass: from drawing the clock into the application's pixels to the frame callback of the decoded frame.
// Input to photon: from sending a key in the page to the callback of the first frame that shows it.

import { browser, open, start } from "../browser/shared/page.mjs";
import { Stack } from "../browser/shared/stack.mjs";
import { median, quantile, round } from "./numbers.mjs";

const RUNS = Number(process.env.FANLIGHT_BENCH_RUNS ?? 5);
const WARM_MS = 5_000;

async function run(engine, stack, app, display, ms, keysEvery, note) {
  await stack.clear();
  const page = await open(engine, stack, display === "1080p" ? { display, viewport: { width: 1980, height: 1160 } } : { display });
  try {
    await start(page, app);
    // A key keeps an application awake that draws after input only.
    await page.evaluate(([time, every]) => window.probe.watch(time, every), [WARM_MS, keysEvery]);
    const result = await page.evaluate(([time, every]) => window.probe.watch(time, every), [ms, keysEvery]);
    if (result.frames.length < 10) throw new Error(`${note}: only ${result.frames.length} frames could be read in ${ms / 1000} s`);
    if (result.unreadable > result.frames.length / 100) throw new Error(`${note}: ${result.unreadable} frames could not be read`);
    return result;
  } finally {
    await page.context().close();
  }
}

export async function latency({ chromium, figure, say }) {
  const stack = await Stack.open();
  const engine = await browser(chromium);
  try {
    const delays = [];
    const keys = [];
    const typed = [];
    let unanswered = 0;
    for (let i = 0; i < RUNS; i++) {
      const glass = await run(engine, stack, "pattern", "720p", 10_000, 0, "glass to glass");
      delays.push(glass.frames.map(({ delayMs }) => delayMs));
      const moving = await run(engine, stack, "pattern", "720p", 10_000, 150, "input to photon");
      const still = await run(engine, stack, "pattern-input", "720p", 10_000, 150, "input to photon, still");
      if (moving.presses.length < 20) throw new Error(`only ${moving.presses.length} keys were answered in 10 s`);
      if (still.presses.length < 20) throw new Error(`only ${still.presses.length} keys were answered on a still screen in 10 s`);
      keys.push(moving.presses);
      typed.push(still.presses);
      unanswered += moving.unanswered;
      const show = (values) => `${round(quantile(values, 0.5))} / ${round(quantile(values, 0.95))}`;
      say(`run ${i + 1}: glass ${show(delays[i])} ms, key ${show(keys[i])} ms, key on a still screen ${show(typed[i])} ms`);
    }
    const across = (runs, share) => median(runs.map((values) => quantile(values, share)));
    const spread = (runs, share) => ({
      runs: runs.map((values) => round(quantile(values, share))),
      size: "1280x720", fps: 60, content: "desk",
    });
    figure("glass_to_glass_p50_ms", across(delays, 0.5), "ms", 20, spread(delays, 0.5));
    figure("glass_to_glass_p95_ms", across(delays, 0.95), "ms", 30, spread(delays, 0.95));
    figure("glass_to_glass_p99_ms", across(delays, 0.99), "ms", null, spread(delays, 0.99));
    figure("input_to_photon_p50_ms", across(keys, 0.5), "ms", 35, { ...spread(keys, 0.5), unanswered });
    figure("input_to_photon_p95_ms", across(keys, 0.95), "ms", 70, spread(keys, 0.95));
    figure("input_to_photon_still_p50_ms", across(typed, 0.5), "ms", null, { ...spread(typed, 0.5), content: "drawn after input only" });
    figure("input_to_photon_still_p95_ms", across(typed, 0.95), "ms", null, { ...spread(typed, 0.95), content: "drawn after input only" });

    const large = [];
    for (let i = 0; i < 3; i++) {
      const { before, after } = await run(engine, stack, "pattern", "1080p", 10_000, 0, "1080p60");
      large.push((after.video.framesDecoded - before.video.framesDecoded) / ((after.at - before.at) / 1000));
    }
    figure("fps_1080p60", median(large), "fps", 59, { least: true, runs: large.map((value) => round(value)), size: "1920x1080", content: "desk" });
  } finally {
    await engine.close();
    await stack.close();
  }
}
