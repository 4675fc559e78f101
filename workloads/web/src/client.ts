// The entrance to the library: applications, sessions, and streams of them.

import { Api, type ApiOptions, type Application, type CreateOptions, type Screen, type Session } from "./api";
import { RoundTrips, type RoundTripOptions } from "./regions";
import { type Connector, Stream, type StreamOptions } from "./stream";

export type LaunchOptions = StreamOptions & Omit<CreateOptions, "app">;

/** A session without a client ends after this many minutes unless told otherwise. */
export const IDLE_MINUTES = 10;

export class FanlightClient {
  readonly api: Api;
  readonly #roundTrips: RoundTrips;

  constructor(options: ApiOptions & { roundTrips?: RoundTripOptions } = {}) {
    this.api = new Api(options);
    this.#roundTrips = new RoundTrips(this.api, options.roundTrips);
  }

  applications(): Promise<Application[]> {
    return this.api.applications();
  }

  sessions(): Promise<Session[]> {
    return this.api.sessions();
  }

  /**
   * Milliseconds to each region, where there are several; otherwise nothing is measured. Known for ten minutes, so that
   * asking early makes a later launch quicker.
   */
  roundTrips(): Promise<Record<string, number> | undefined> {
    return this.#roundTrips.get();
  }

  /**
   * A stream of a new session of `app`. Nothing happens before its `connect()`. Without a `region` the gateway picks one,
   * by the round trips from here where there are several.
   */
  launch(app: string, options: LaunchOptions): Stream {
    const { app_version, region, screen, ephemeral, extra_data, round_trips } = options;
    const request: CreateOptions = {
      app,
      joinable: options.joinable ?? true,
      idle_time_min: options.idle_time_min ?? IDLE_MINUTES,
      ...(app_version === undefined ? {} : { app_version }),
      ...(region === undefined ? {} : { region }),
      ...(screen === undefined ? {} : { screen }),
      ...(ephemeral === undefined ? {} : { ephemeral }),
      ...(extra_data === undefined ? {} : { extra_data }),
    };
    const open = async () => {
      const measured = round_trips ?? (region === undefined ? await this.roundTrips() : undefined);
      return this.api.create(measured === undefined ? request : { ...request, round_trips: measured });
    };
    return new Stream(this.#connector(open), options);
  }

  /** A stream of a session that runs. `screen` changes its display. */
  join(id: string, options: StreamOptions & { screen?: Screen }): Stream {
    return new Stream(this.#connector(() => this.api.join(id, options.screen)), options);
  }

  /** Ends a session. */
  stop(id: string): Promise<void> {
    return this.api.delete(id);
  }

  #connector(open: Connector["open"]): Connector {
    const { api } = this;
    return {
      open,
      rejoin: (id) => api.join(id),
      session: (id) => api.session(id),
      stop: (id) => api.delete(id),
    };
  }
}
