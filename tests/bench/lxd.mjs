// What a person waits for where instances are containers: from the launch until it runs, from POST /1.0/sessions to the
// first decoded frame that is not blank, and the same with a warm pool. The stack must be one over LXD.

import { quantile, round } from "./numbers.mjs";
import { browser, open, session, start as launch } from "../browser/shared/page.mjs";
import { Stack, until } from "../browser/shared/stack.mjs";

const RUNS = Number(process.env.FANLIGHT_BENCH_RUNS ?? 15);
const APP = "pattern";
const BOOT = 120_000;

async function done(stack, { status, body }) {
  if (status !== 202) throw new Error(`AMS answers ${status}: ${JSON.stringify(body)}`);
  const ended = await stack.ams("GET", `${body.operation}/wait?timeout=120`);
  if (ended.body.metadata?.status_code !== 200) throw new Error(`the operation failed: ${JSON.stringify(ended.body)}`);
  return body.metadata.resources;
}

async function running(stack) {
  const began = performance.now();
  const resources = await done(stack, await stack.ams("POST", "/1.0/instances", { app_id: APP }));
  const took = performance.now() - began;
  const id = resources.instances[0].split("/").at(-1);
  await done(stack, await stack.ams("DELETE", `/1.0/instances/${id}`, { force: true }));
  return took;
}

async function firstFrame(engine, stack) {
  const page = await open(engine, stack);
  try {
    const steps = await launch(page, APP);
    const at = Object.fromEntries(steps.map(({ step, ms }) => [step, ms]));
    return { ms: at["first-frame"], instance: await stack.instance(await session(page)) };
  } finally {
    await page.context().close();
    const { body } = await stack.gateway("GET", "/1.0/sessions");
    for (const id of body.metadata ?? []) await stack.gateway("DELETE", `/1.0/sessions/${id}`);
  }
}

/** Waits until an instance is gone: the next launch has the machine for itself. */
const gone = (stack, id) =>
  until(`instance ${id} is gone`, BOOT, async () => (await stack.ams("GET", `/1.0/instances/${id}`)).status === 404);

const instances = async (stack) => (await stack.ams("GET", "/1.0/instances?recursion=1")).body.metadata ?? [];

export async function lxd({ chromium, figure, say }) {
  const stack = await Stack.open();
  const engine = await browser(chromium);
  const more = { runs: RUNS, application: APP, engine: "lxd" };
  try {
    // The first container of an image is the slowest: LXD unpacks the image for it. It happens once for each image and node.
    const first = await running(stack);
    say(`first launch of the image: ${round(first, 0)} ms`);
    const launches = [];
    for (let i = 0; i < RUNS; i++) launches.push(await running(stack));
    say(`launch to running: ${launches.map((ms) => round(ms, 0)).join(", ")} ms`);
    figure("lxd_running_p50_ms", quantile(launches, 0.5), "ms", 4000, more);
    figure("lxd_running_p95_ms", quantile(launches, 0.95), "ms", null, more);
    figure("lxd_running_first_ms", first, "ms", null, { ...more, runs: 1 });

    const frames = [];
    for (let i = 0; i < RUNS; i++) {
      const { ms, instance } = await firstFrame(engine, stack);
      frames.push(ms);
      await gone(stack, instance);
    }
    say(`session to first frame: ${frames.map((ms) => round(ms, 0)).join(", ")} ms`);
    figure("lxd_first_frame_p50_ms", quantile(frames, 0.5), "ms", 6000, { ...more, size: "1280x720" });
    figure("lxd_first_frame_p95_ms", quantile(frames, 0.95), "ms", null, { ...more, size: "1280x720" });

    for (const kind of ["streamer", "application"]) {
      await done(stack, await stack.ams("PATCH", `/1.0/applications/${APP}`, { pool: { size: 1, start: kind } }));
      const claims = [];
      let before;
      for (let i = 0; i < RUNS; i++) {
        const waiting = await until("one instance waits", BOOT, async () => {
          const found = (await instances(stack)).filter(({ pool, status }) => pool === "waiting" && status === "running");
          return found.length === 1 && found[0].id !== before && found[0].id;
        });
        const { ms, instance } = await firstFrame(engine, stack);
        if (instance !== waiting) throw new Error(`the session got ${instance} and not ${waiting}, which waited`);
        await gone(stack, instance);
        before = waiting;
        claims.push(ms);
      }
      say(`session to first frame from the pool (${kind}): ${claims.map((ms) => round(ms, 0)).join(", ")} ms`);
      const told = { ...more, start: kind, size: "1280x720" };
      const suffix = kind === "streamer" ? "" : "_application";
      figure(`pool${suffix}_first_frame_p95_ms`, quantile(claims, 0.95), "ms", 1000, told);
      figure(`pool${suffix}_first_frame_p50_ms`, quantile(claims, 0.5), "ms", null, told);
    }
  } finally {
    await stack.ams("PATCH", `/1.0/applications/${APP}`, { pool: { size: 0 } });
    await engine.close();
    await stack.close();
  }
}
