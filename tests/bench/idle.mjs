// What one instance costs when nothing moves and nothing sounds, with a client that looks at it: all its processes but
// the application, over half a minute.

import { browser, open, session, start } from "../browser/shared/page.mjs";
import { Stack } from "../browser/shared/stack.mjs";
import { memory, ofInstance } from "./processes.mjs";
import { median, round } from "./numbers.mjs";

const WARM_MS = 5_000;
const MEASURE_MS = 30_000;
const RUNS = 3;
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

export async function idle({ chromium, figure, say }) {
  const stack = await Stack.open();
  const engine = await browser(chromium);
  try {
    const runs = [];
    for (let i = 0; i < RUNS; i++) {
      await stack.clear();
      const page = await open(engine, stack);
      try {
        await start(page, "pattern-static");
        const instance = await stack.instance(await session(page));
        // Beyond the warm-up of every bench: the refinement of the last picture has to be over.
        await pause(WARM_MS);
        const measure = async () => ({
          at: performance.now(),
          processes: ofInstance(instance, "fanlight-pattern"),
          received: await page.evaluate(() => window.probe.statistics()),
        });
        const before = await measure();
        await pause(MEASURE_MS);
        const after = await measure();
        const seconds = (after.at - before.at) / 1000;
        const shares = after.processes.map(({ pid, name, cpuSeconds }) => {
          const earlier = before.processes.find((one) => one.pid === pid)?.cpuSeconds ?? 0;
          return { name, percent: ((cpuSeconds - earlier) / seconds) * 100, ...memory(pid) };
        });
        const sum = (key) => shares.reduce((total, one) => total + one[key], 0);
        const payload = ({ received }) => (received.video.bytesReceived ?? 0) + (received.audio.bytesReceived ?? 0) + received.channels.received;
        runs.push({
          cpu: sum("percent"),
          kbps: ((payload(after) - payload(before)) * 8) / 1000 / seconds,
          rss: sum("rss"),
          pss: sum("pss"),
          frames: after.received.video.framesDecoded - before.received.video.framesDecoded,
          shares,
        });
        say(`run ${i + 1}: ${shares.map(({ name, percent, rss }) => `${name} ${round(percent, 2)} % ${round(rss)} MB`).join(", ")}`);
      } finally {
        await page.context().close();
      }
    }
    const of = (key) => runs.map((one) => one[key]);
    const more = (key) => ({ runs: of(key).map((value) => round(value, 2)), size: "1280x720", seconds: MEASURE_MS / 1000 });
    figure("cpu_percent", median(of("cpu")), "% of one core", 0.5, more("cpu"));
    figure("bitrate_kbps", median(of("kbps")), "kbit/s", 20, { ...more("kbps"), frames: of("frames") });
    figure("rss_mb", median(of("rss")), "MB", 150, more("rss"));
    figure("pss_mb", median(of("pss")), "MB", null, more("pss"));
  } finally {
    await engine.close();
    await stack.close();
  }
}
