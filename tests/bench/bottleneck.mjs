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
import { quantile, round } from "./numbers.mjs";

const RATE = "4mbit";
const QUEUE = "150ms";
const WARM_MS = 5_000;
const MEASURE_MS = 20_000;

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
    const page = await open(engine, stack);
    // The page itself is loaded over the open link; what is measured is the stream.
    sh("tc", "qdisc", "add", "dev", path.near, "root", "tbf", "rate", RATE, "burst", "16kb", "latency", QUEUE);
    await start(page, "pattern-full");
    await page.evaluate((ms) => window.probe.watch(ms), WARM_MS);
    const { frames, unreadable, before, after, seconds } = await page.evaluate((ms) => window.probe.watch(ms), MEASURE_MS);
    if (frames.length < 2) throw new Error(`only ${frames.length} frames could be read in ${seconds} s (${unreadable} could not)`);
    const begin = before.at;
    const gaps = frames.map(({ at }, i) => at - (frames[i - 1]?.at ?? begin));
    // The end counts as well: a stream that stopped has its longest freeze there.
    gaps.push(after.at - frames.at(-1).at);
    const decoded = after.video.framesDecoded - before.video.framesDecoded;
    const kbps = ((after.video.bytesReceived - before.video.bytesReceived) * 8) / 1000 / seconds;
    const more = {
      size: "1280x720", fps: 60, content: "full", rate: RATE, queue: QUEUE, seconds: round(seconds),
      kbps: round(kbps, 0), lost: after.video.packetsLost - before.video.packetsLost, unreadable,
      freezes: after.video.freezeCount - before.video.freezeCount,
    };
    say(sh("tc", "-s", "qdisc", "show", "dev", path.near).replaceAll("\n", " ").trim());
    figure("longest_freeze_ms", Math.max(...gaps), "ms", 500, more);
    figure("frame_delay_p95_ms", quantile(frames.map(({ delayMs }) => delayMs), 0.95), "ms", 300, more);
    figure("frame_delay_p50_ms", quantile(frames.map(({ delayMs }) => delayMs), 0.5), "ms", null, more);
    figure("frames_decoded", decoded, "1", null, more);
  } finally {
    await engine?.close();
    await stack?.close();
    unlink(path);
    rmSync(scratch, { recursive: true, force: true });
  }
}
