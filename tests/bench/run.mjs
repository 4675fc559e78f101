// Measures one thing and prints one JSON line per figure: `node run.mjs latency|start|idle|bottleneck|lxd`.
//
// The figures are those of a user: the programs as built, an application's pixels, Chromium's decoder. A figure that
// cannot be measured is an error, never a guess. The stack is started here; with FANLIGHT_GATEWAY_URL and
// FANLIGHT_STATE set, a running one is used (but not by `bottleneck`, whose stack has to listen beside its link). `lxd` is
// the part of the bench `ams` that needs a stack over LXD to run.

import { execFileSync } from "node:child_process";
import { readFileSync } from "node:fs";
import os from "node:os";
import { chromium } from "playwright-core";
import { root } from "../browser/shared/stack.mjs";
import { bottleneck } from "./bottleneck.mjs";
import { idle } from "./idle.mjs";
import { latency } from "./latency.mjs";
import { lxd } from "./lxd.mjs";
import { start } from "./start.mjs";

const benches = { latency, start, idle, bottleneck, lxd };
const name = process.argv[2];
if (!benches[name]) {
  console.error(`which bench? ${Object.keys(benches).join(", ")}`);
  process.exit(2);
}

const quiet = (file, ...args) => {
  try {
    return execFileSync(file, args, { cwd: root, encoding: "utf8", stdio: ["ignore", "pipe", "ignore"] }).trim();
  } catch {
    return "unknown";
  }
};
const cpu = /model name\s*: (.*)/.exec(readFileSync("/proc/cpuinfo", "utf8"))?.[1] ?? os.arch();
const setting = {
  date: new Date().toISOString().slice(0, 10),
  commit: quiet("git", "rev-parse", "--short", "HEAD"),
  machine: `${os.cpus().length} × ${cpu}, ${Math.round(os.totalmem() / 2 ** 30)} GiB, Linux ${os.release()}`,
  browser: quiet(process.env.FANLIGHT_CHROMIUM ?? "chromium", "--version").replace(/ built on.*/, ""),
};

let missed = 0;
/** Prints one figure. `bound` is what it must not exceed (or, with `least`, not stay below); null: none. */
function figure(metric, value, unit, bound = null, { least = false, ...more } = {}) {
  if (!Number.isFinite(value)) throw new Error(`${metric} could not be measured: ${value}`);
  const ok = bound === null || (least ? value >= bound : value <= bound);
  if (!ok) missed++;
  const rounded = Math.round(value * 1000) / 1000;
  console.log(JSON.stringify({ bench: name === "lxd" ? "ams" : name, metric, value: rounded, unit, bound, ok, ...more, ...setting }));
}

const load = os.loadavg()[0];
if (load > 0.5 * os.cpus().length) console.error(`bench: the machine is busy (load ${load.toFixed(1)}); figures of times will be worse than they could be`);
try {
  await benches[name]({ chromium, figure, say: (text) => console.error(`bench: ${text}`) });
} catch (error) {
  console.error(`bench ${name} could not measure: ${error.stack ?? error}`);
  process.exit(1);
}
// A bound that was missed is told by `ok`; the status tells it too.
process.exit(missed === 0 ? 0 : 3);
