// Streams in a real browser for a while and says how media came and whether it kept coming: one JSON object on the
// standard output. What it should connect to comes as one JSON object on the standard input: `url` and `stun_servers`
// of the gateway's answer, and `seconds` to watch. It runs wherever it is started, such as behind a bad network.

import { readFileSync } from "node:fs";
import { text } from "node:stream/consumers";
import { chromium } from "playwright-core";

/** Milliseconds for an instance to boot and a connection to find its way on a busy machine. */
const CONNECT = 90_000;
const EVERY = 200;

const { url, stun_servers: stunServers, seconds } = JSON.parse(await text(process.stdin));
const browser = await chromium.launch({
  executablePath: process.env.FANLIGHT_CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--autoplay-policy=no-user-gesture-required"],
});
try {
  // The certificate of a local stack is its own.
  const page = await (await browser.newContext({ ignoreHTTPSErrors: true })).newPage();
  await page.setContent("<!doctype html><title>network</title><body></body>");
  await page.addScriptTag({
    // The client keeps its connections to itself; this one has to be looked into.
    content: `(() => { const Real = RTCPeerConnection;
      window.RTCPeerConnection = class extends Real { constructor(...given) { super(...given); window.connection = this; } };
    })();`,
  });
  await page.addScriptTag({ content: readFileSync(new URL("client.js", import.meta.url), "utf8") });
  const id = await page.evaluate((options) => window.raw.start(options), { url, stunServers });
  await page.evaluate(([id, ms]) => window.raw.wait(id, "ready", ms), [id, CONNECT]);
  const watched = await page.evaluate(async ([ms, every]) => {
    const look = async () => {
      const found = { at: performance.now() };
      const reports = await window.connection.getStats();
      const transport = [...reports.values()].find(({ type }) => type === "transport");
      const pair = reports.get(transport.selectedCandidatePairId);
      const { candidateType, relayProtocol, protocol } = reports.get(pair.localCandidateId);
      const remote = reports.get(pair.remoteCandidateId);
      found.way = { local: candidateType, relayProtocol, protocol, remote: `${remote.address}:${remote.port}` };
      const video = [...reports.values()].find(({ type, kind }) => type === "inbound-rtp" && kind === "video");
      for (const name of ["framesDecoded", "framesDropped", "keyFramesDecoded", "packetsReceived", "packetsLost", "nackCount", "pliCount",
        "retransmittedPacketsReceived", "freezeCount", "totalFreezesDuration"]) found[name] = video[name] ?? 0;
      return found;
    };
    const first = await look();
    let last = first;
    let moved = first;
    let longestPause = 0;
    while (last.at - first.at < ms) {
      await new Promise((resolve) => setTimeout(resolve, every));
      last = await look();
      if (last.framesDecoded > moved.framesDecoded) moved = last;
      else longestPause = Math.max(longestPause, last.at - moved.at);
    }
    return { first, last, longest_pause_ms: longestPause };
  }, [seconds * 1000, EVERY]);
  const pictured = await page.evaluate((id) => window.raw.pictured(id), id);
  const events = await page.evaluate((id) => window.raw.events(id), id);
  const errors = events.filter(({ kind }) => kind === "error");
  await page.evaluate((id) => window.raw.leave(id), id);
  console.log(JSON.stringify({ browser: browser.version(), ...watched, pictured, errors }));
} finally {
  await browser.close();
}
