// What the client library shows to others.

export {
  Api,
  ApiError,
  type ApiOptions,
  type Application,
  type Check,
  type CheckStatus,
  type CreateOptions,
  type Diagnosis,
  type Invitation,
  type Region,
  type Screen,
  type Session,
  type SessionStatus,
  type StunServer,
} from "./api";
export { checkConnection, type CheckOptions } from "./check";
export { FanlightClient, type LaunchOptions } from "./client";
export type { RoundTripOptions } from "./regions";
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
