// What the client library shows to others.

export {
  Api,
  ApiError,
  type ApiOptions,
  type Application,
  type CreateOptions,
  type Invitation,
  type Screen,
  type Session,
  type SessionStatus,
  type StunServer,
} from "./api";
export { FanlightClient, type LaunchOptions } from "./client";
export {
  Stream,
  type Connector,
  type Cursor,
  type Ended,
  type EndReason,
  type StreamEvents,
  type StreamOptions,
  type StreamState,
} from "./stream";
export { STEPS, STEP_WORDS, StreamError, type Step, type StepTime } from "./steps";
export type { HostStats, Split, Stats } from "./stats";
