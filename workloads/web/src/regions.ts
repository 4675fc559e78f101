// How far it is to each region, measured to its STUN servers, so that the gateway can pick the nearest one. With
// fewer than two regions that can be measured there is nothing to pick, and nothing is measured.

import type { Api, Region } from "./api";
import { type ProbeOptions, probe } from "./probe";

/** Milliseconds for all tries of a region together: a launch may wait for them. */
const LIMIT_MS = 1_000;
/** The first try also finds the server's address and wakes sleeping links; the better one of two is nearer the truth. */
const TRIES = 2;
const KEEP_MS = 600_000;
/** STUN servers of one region that are tried at once; the nearest of them counts. */
const MAX_SERVERS = 3;

export interface RoundTripOptions {
  /** For tests. */
  peer?: ProbeOptions["peer"];
  now?: () => number;
}

/** Milliseconds to one region; nothing when none of its servers answers in time. */
export async function measure(urls: readonly string[], options: RoundTripOptions = {}): Promise<number | undefined> {
  const { now = () => performance.now() } = options;
  const end = now() + LIMIT_MS;
  const best = async (url: string): Promise<number> => {
    let least = Infinity;
    for (let i = 0; i < TRIES && now() < end; i++) {
      const outcome = await probe({ urls: url }, { ...options, limitMs: end - now() });
      if (outcome.kind !== "given") break;
      least = Math.min(least, outcome.ms);
    }
    return least;
  };
  const stun = urls.filter((url) => /^stun:/i.test(url)).slice(0, MAX_SERVERS);
  const least = Math.min(...(await Promise.all(stun.map(best))));
  // Parts of milliseconds below a tenth are noise.
  return Number.isFinite(least) ? Math.round(least * 10) / 10 : undefined;
}

/** Measures once and remembers it for ten minutes. */
export class RoundTrips {
  readonly #api: Pick<Api, "regions">;
  readonly #options: RoundTripOptions;
  #known: { at: number; trips: Promise<Record<string, number> | undefined> } | undefined;

  constructor(api: Pick<Api, "regions">, options: RoundTripOptions = {}) {
    this.#api = api;
    this.#options = options;
  }

  /** Milliseconds per region. Nothing when there is no choice of regions or it cannot be found out. Never rejects. */
  get(): Promise<Record<string, number> | undefined> {
    const now = (this.#options.now ?? (() => performance.now()))();
    if (this.#known === undefined || now - this.#known.at > KEEP_MS) {
      const known = { at: now, trips: this.#measure() };
      this.#known = known;
      // Nothing was learned: the next launch asks again.
      known.trips.catch(() => {
        if (this.#known === known) this.#known = undefined;
      });
    }
    return this.#known.trips.catch(() => undefined);
  }

  async #measure(): Promise<Record<string, number> | undefined> {
    const regions: Region[] = await this.#api.regions();
    const measurable = regions.filter(({ stun_servers: urls }) => Array.isArray(urls) && urls.length > 0);
    if (measurable.length < 2 || (this.#options.peer === undefined && typeof RTCPeerConnection === "undefined")) return undefined;
    const trips = await Promise.all(
      measurable.map(async ({ name, stun_servers: urls = [] }) => [name, await measure(urls, this.#options)] as const),
    );
    const known = trips.filter((trip): trip is [string, number] => trip[1] !== undefined);
    return known.length > 0 ? Object.fromEntries(known) : undefined;
  }
}
