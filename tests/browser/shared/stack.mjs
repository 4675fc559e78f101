// A running stack as tests and benches see it: found by the FANLIGHT_* variables, or started for the occasion and
// ended with everything it made.

import { execFile, execFileSync } from "node:child_process";
import { cpSync, existsSync, mkdirSync, mkdtempSync, readFileSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import https from "node:https";
import { tmpdir } from "node:os";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";

const run = promisify(execFile);
const root = resolve(dirname(fileURLToPath(import.meta.url)), "../../..");

/** The folder of the built programs. */
export function binaries() {
  const folder = process.env.FANLIGHT_BIN_DIR ?? join(process.env.CARGO_TARGET_DIR ?? join(root, "target"), "release");
  if (!existsSync(join(folder, "fanlight"))) {
    throw new Error(`no program fanlight in ${folder}: build first (./dev build), or name the folder in FANLIGHT_BIN_DIR`);
  }
  return folder;
}

const unquote = (text) => text.replace(/^'|'$/g, "").replaceAll("'\\''", "'");

/** The variables in a file that a shell could read. */
export const variables = (file) =>
  Object.fromEntries(
    readFileSync(file, "utf8")
      .split("\n")
      .map((line) => /^(?:export )?(FANLIGHT_\w+)=(.*)$/.exec(line))
      .filter(Boolean)
      .map(([, name, value]) => [name, unquote(value)]),
  );

/**
 * Test applications in a folder of their own, each with the programs it needs beside its manifest: an instance sees
 * its package and nothing else of this machine's folders.
 */
function applications(folder) {
  const bin = binaries();
  for (const name of readdirSync(join(root, "tests/apps/applications"))) {
    const target = join(folder, name);
    cpSync(join(root, "tests/apps/applications", name), target, { recursive: true });
    mkdirSync(join(target, "bin"), { recursive: true });
    const manifest = readFileSync(join(target, "manifest.yaml"), "utf8");
    for (const program of ["fanlight-pattern", "fanlight-scene"]) {
      if (!manifest.includes(program)) continue;
      cpSync(join(bin, program), join(target, "bin", program));
      // Packages are compressed at every start; symbols are not needed there.
      execFileSync("strip", ["--strip-debug", join(target, "bin", program)]);
    }
  }
  return folder;
}

export class Stack {
  constructor(env, state, folder) {
    this.env = env;
    /** State folder of the stack; it is how one asks for a fresh link to the page. */
    this.state = state;
    this.folder = folder;
    const pem = (name) => readFileSync(env[name], "utf8");
    this.ca = pem("FANLIGHT_CA");
    this.client = { cert: pem("FANLIGHT_AMS_CERT"), key: pem("FANLIGHT_AMS_KEY") };
  }

  /** The stack of the environment, or a new one. `arguments` are for `fanlight up`. */
  static async open({ arguments: more = [], own = false } = {}) {
    if (process.env.FANLIGHT_GATEWAY_URL && process.env.FANLIGHT_STATE && !own) {
      return new Stack(process.env, process.env.FANLIGHT_STATE, undefined);
    }
    const folder = mkdtempSync(join(tmpdir(), "fanlight-"));
    const state = join(folder, "state");
    const ui = process.env.FANLIGHT_UI_DIR ?? join(root, "workloads/web/dist");
    if (!existsSync(join(ui, "index.html"))) throw new Error(`no page in ${ui}: build it first (./dev build)`);
    const apps = applications(join(folder, "applications"));
    try {
      await run(
        join(binaries(), "fanlight"),
        ["up", "--detach", "--ports", "auto", "--state", state, "--ui", ui,
          "--applications", join(root, "workloads/fanlight/applications"), "--applications", apps, ...more],
        { timeout: 180_000, env: { ...process.env, FANLIGHT_STATE: undefined } },
      );
    } catch (error) {
      await run(join(binaries(), "fanlight"), ["down", "--state", state]).catch(() => undefined);
      throw new Error(`the stack did not start: ${error.stderr?.trim() || error.message}; its files are in ${folder}`);
    }
    return new Stack(variables(join(state, "env")), state, folder);
  }

  /** Ends a stack that was started here. */
  async close() {
    if (!this.folder) return;
    await run(join(binaries(), "fanlight"), ["down", "--state", this.state], { timeout: 120_000 });
    rmSync(this.folder, { recursive: true, force: true });
  }

  /** A link to the page that works once. */
  async link() {
    const { stdout } = await run(join(binaries(), "fanlight"), ["code", "--state", this.state], { timeout: 20_000 });
    return stdout.trim();
  }

  #request(base, method, path, body, headers, tls) {
    return new Promise((resolve, reject) => {
      const text = body === undefined ? undefined : JSON.stringify(body);
      const call = https.request(
        new URL(path, base),
        { method, ca: this.ca, agent: false, timeout: 30_000, headers: { ...headers, ...(text && { "Content-Type": "application/json" }) }, ...tls },
        (response) => {
          let received = "";
          response.setEncoding("utf8");
          response.on("data", (piece) => (received += piece));
          response.on("end", () => {
            let parsed = received;
            try {
              parsed = JSON.parse(received);
            } catch {
              // Logs are no JSON.
            }
            resolve({ status: response.statusCode, body: parsed });
          });
          response.on("error", reject);
        },
      );
      call.on("timeout", () => call.destroy(new Error(`${method} ${path}: no answer within 30 s`)));
      call.on("error", reject);
      call.end(text);
    });
  }

  /** A request to the gateway's API with all rights. */
  gateway(method, path, body) {
    return this.#request(this.env.FANLIGHT_GATEWAY_URL, method, path, body, { Authorization: `macaroon root=${this.env.FANLIGHT_TOKEN}` });
  }

  /** A request to AMS with all rights. */
  ams(method, path, body) {
    return this.#request(this.env.FANLIGHT_AMS_URL, method, path, body, {}, this.client);
  }

  /** Id of the instance of a session. */
  async instance(session) {
    const { status, body } = await this.gateway("GET", `/1.0/sessions/${session}`);
    if (status !== 200) throw new Error(`session ${session}: ${status} ${body.error}`);
    return body.metadata.container_id;
  }

  /** Ends all sessions and waits until their instances are gone. */
  async clear() {
    const { body } = await this.gateway("GET", "/1.0/sessions");
    for (const id of body.metadata ?? []) await this.gateway("DELETE", `/1.0/sessions/${id}`);
    await until("all instances are gone", 30_000, async () => (await this.ams("GET", "/1.0/instances")).body.metadata?.length === 0);
  }
}

/** Waits for a condition; what it returns, once that is true. */
export async function until(what, ms, condition) {
  const end = performance.now() + ms;
  let last;
  for (;;) {
    try {
      const result = await condition();
      if (result) return result;
      last = undefined;
    } catch (error) {
      if (error.fatal) throw error;
      last = error;
    }
    if (performance.now() > end) throw new Error(`not within ${ms / 1000} s: ${what}${last ? ` (${last.message})` : ""}`);
    await new Promise((next) => setTimeout(next, 50));
  }
}

/** Writes a file with its folders; for what tests leave behind for people. */
export function keep(file, content) {
  mkdirSync(dirname(file), { recursive: true });
  writeFileSync(file, content);
}

export { root };
