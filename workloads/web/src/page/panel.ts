// The panel with the figures of a stream.

import type { Stats } from "../stats";
import { STEP_WORDS, type StepTime } from "../steps";
import { h } from "./dom";

const ms = (value: number | undefined): string => (value === undefined ? "–" : `${value.toFixed(value < 10 ? 1 : 0)} ms`);

/** kbit/s in words. */
export function rate(kbps: number): string {
  return kbps >= 1_000 ? `${(kbps / 1_000).toFixed(1)} Mbit/s` : `${Math.round(kbps)} kbit/s`;
}

/** The lines of the panel: label and value. */
export function lines(stats: Stats): [label: string, value: string][] {
  const { audio, host } = stats;
  return [
    ["Picture", `${stats.width} × ${stats.height}${stats.codec ? `, ${stats.codec}` : ""}`],
    ["Frames", `${stats.fps.toFixed(0)} fps decoded, ${stats.displayedFps.toFixed(0)} shown`],
    ["Bitrate", rate(stats.bitrateKbps)],
    ["Possible bitrate", host ? rate(host.estimate_kbps) : "–"],
    ["Round trip", ms(stats.rttMs)],
    ["Loss", `${(stats.loss * 100).toFixed(1)} % (${stats.packetsLost} packets)`],
    ["Jitter", ms(stats.jitterMs)],
    ["Sound", audio ? rate(audio.bitrateKbps) : "none"],
    ["Encoder", host?.encoder ?? "–"],
    ["Decoder", stats.decoder ?? "–"],
    ["Path", stats.path ?? "–"],
  ];
}

const PARTS = [
  ["hostMs", "Host"],
  ["networkMs", "Network"],
  ["decodeMs", "Decode"],
  ["displayMs", "Display"],
] as const;

export interface Panel {
  element: HTMLElement;
  show(stats: Stats): void;
  steps(steps: readonly StepTime[]): void;
}

export function panel(): Panel {
  const figures = h("dl", { class: "figures" });
  const bar = h("div", { class: "split-bar", aria: { hidden: "true" } });
  const segments = PARTS.map(([key]) => {
    const segment = h("span", { class: `split-${key}` });
    bar.append(segment);
    return segment;
  });
  const parts = h("dl", { class: "figures split" });
  const steps = h("dl", { class: "figures" });
  const element = h(
    "aside",
    { class: "panel", aria: { label: "Figures of the stream" } },
    h("h2", {}, "Stream"),
    figures,
    h("h2", {}, "Delay of a frame"),
    bar,
    parts,
    h("h2", {}, "Connecting took"),
    steps,
  );
  const fill = (list: HTMLElement, pairs: readonly (readonly [string, string])[]) => {
    // Text is replaced in place: a list built anew every second would be read out again every second.
    while (list.children.length > pairs.length * 2) list.lastChild?.remove();
    while (list.children.length < pairs.length * 2) list.append(h("dt"), h("dd"));
    pairs.forEach(([label, value], i) => {
      const [term, definition] = [list.children[i * 2], list.children[i * 2 + 1]];
      if (term && term.textContent !== label) term.textContent = label;
      if (definition && definition.textContent !== value) definition.textContent = value;
    });
  };
  return {
    element,
    show(stats) {
      fill(figures, lines(stats));
      const { split } = stats;
      const total = PARTS.reduce((sum, [key]) => sum + (split[key] ?? 0), 0);
      PARTS.forEach(([key], i) => {
        const segment = segments[i];
        if (segment) segment.style.flexGrow = String(total > 0 ? (split[key] ?? 0) / total : 0);
      });
      fill(parts, [...PARTS.map(([key, label]) => [label, ms(split[key])] as const), ["Together", ms(split.totalMs)]]);
    },
    steps(times) {
      fill(
        steps,
        times.map(({ step, ms: at }) => [STEP_WORDS[step].doing, `${Math.round(at)} ms`] as const),
      );
    },
  };
}
