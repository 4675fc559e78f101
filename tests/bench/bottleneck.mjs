// A picture in full motion over a link of 4 Mbit/s whose queue holds 150 ms: whether frames go on, how late they are.
//
// The browser runs in a network namespace of its own; a pair of virtual interfaces is the link, and the queue is shaped
// where packets leave towards the browser. Needs root.

import { execFileSync } from "node:child_process";
import { chmodSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { browser, open, start } from "../browser/shared/page.mjs";
import { Stack } from "../browser/shared/stack.mjs";
import { median, quantile, round } from "./numbers.mjs";

const RATE = "4mbit";
const QUEUE = "150ms";
const WARM_MS = 5_000;
const MEASURE_MS = 20_000;
const RUNS = 3;

const sh = (command, ...args) => execFileSync(command, args, { encoding: "utf8", stdio: ["ignore", "pipe", "pipe"] });

/** A namespace with a link to this one; addresses from a range that is set aside for tests (RFC 2544). */
function link() {
  const id = process.pid % 65536;
  const name = `fanlight${id}`;
  const [near, far] = [`fl${id}a`, `fl${id}b`];
  const net = `198.18.${id % 256}`;
  try {
    sh("ip", "netns", "add", name);
    sh("ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", name);
    // Addresses that appear later would look to the browser like a change of network.
    sh("ip", "link", "set", near, "addrgenmode", "none");
    sh("ip", "-n", name, "link", "set", far, "addrgenmode", "none");
    sh("ip", "addr", "add", `${net}.1/30`, "dev", near);
    sh("ip", "link", "set", near, "up");
    sh("ip", "-n", name, "addr", "add", `${net}.2/30`, "dev", far);
    sh("ip", "-n", name, "link", "set", far, "up");
    sh("ip", "-n", name, "link", "set", "lo", "up");
  } catch (error) {
    unlink({ name, near });
    throw new Error(`making a network namespace with a link (this needs root): ${error.stderr?.trim() || error.message}`);
  }
  return { name, near, address: `${net}.1` };
}

function unlink({ name, near }) {
  for (const command of [["link", "del", near], ["netns", "del", name]]) {
    try {
      sh("ip", ...command);
    } catch {
      // It was not made.
    }
  }
}

function evaluate({ frames, unreadable, before, after, seconds }) {
  if (frames.length < 2) throw new Error(`only ${frames.length} frames could be read in ${seconds} s (${unreadable} could not)`);
  const gaps = frames.map(({ at }, i) => at - (frames[i - 1]?.at ?? before.at));
  // The end counts as well: a stream that stopped has its longest freeze there.
  gaps.push(after.at - frames.at(-1).at);
  const delays = frames.map(({ delayMs }) => delayMs);
  const grown = (key) => after.video[key] - before.video[key];
  return {
    longest: round(Math.max(...gaps)),
    p50: round(quantile(delays, 0.5)),
    p95: round(quantile(delays, 0.95)),
    decoded: grown("framesDecoded"),
    kbps: round((grown("bytesReceived") * 8) / 1000 / seconds, 0),
    lost: grown("packetsLost"),
    freezes: grown("freezeCount"),
    unreadable,
  };
}

export async function bottleneck({ chromium, figure, say }) {
  const path = link();
  const scratch = mkdtempSync(join(tmpdir(), "fanlight-"));
  let stack;
  let engine;
  try {
    stack = await Stack.open({ own: true, arguments: ["--listen", path.address] });
    const wrapper = join(scratch, "browser");
    writeFileSync(wrapper, `#!/bin/sh\nexec ip netns exec ${path.name} "${process.env.FANLIGHT_CHROMIUM ?? "/usr/bin/chromium"}" "$@"\n`);
    chmodSync(wrapper, 0o755);
    engine = await browser(chromium, { wrapper });
    const runs = [];
    for (let i = 0; i < RUNS; i++) {
      await stack.clear();
      const page = await open(engine, stack);
      // The page itself is loaded over the open link; what is measured is the stream.
      sh("tc", "qdisc", "add", "dev", path.near, "root", "tbf", "rate", RATE, "burst", "16kb", "latency", QUEUE);
      try {
        await start(page, "pattern-full");
        await page.evaluate((ms) => window.probe.watch(ms), WARM_MS);
        runs.push(evaluate(await page.evaluate((ms) => window.probe.watch(ms), MEASURE_MS)));
        const dropped = /dropped (\d+)/.exec(sh("tc", "-s", "qdisc", "show", "dev", path.near))?.[1];
        say(`run ${i + 1}: ${JSON.stringify(runs[i])}, ${dropped} packets dropped by the queue`);
      } finally {
        sh("tc", "qdisc", "del", "dev", path.near, "root");
        await page.context().close();
      }
    }
    const of = (key) => runs.map((one) => one[key]);
    const more = {
      size: "1280x720", fps: 60, content: "full", rate: RATE, queue: QUEUE, seconds: MEASURE_MS / 1000,
      kbps: of("kbps"), lost: of("lost"), unreadable: of("unreadable"), freezes: of("freezes"),
    };
    // One freeze is one too many: of these the worst run counts, of the others the median.
    figure("longest_freeze_ms", Math.max(...of("longest")), "ms", 500, { ...more, runs: of("longest") });
    figure("frame_delay_p95_ms", median(of("p95")), "ms", 300, { ...more, runs: of("p95") });
    figure("frame_delay_p50_ms", median(of("p50")), "ms", null, { ...more, runs: of("p50") });
    figure("frames_decoded", median(of("decoded")), "1", null, { ...more, runs: of("decoded") });
  } finally {
    await engine?.close();
    await stack?.close();
    unlink(path);
    rmSync(scratch, { recursive: true, force: true });
  }
}
