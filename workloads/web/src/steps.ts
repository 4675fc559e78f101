// The steps from a click on Launch to the first picture, and the words for each of them when it fails.
// Everything that can go wrong is tied to one step, so that a person can be told where it stopped.

/**
 * The connect funnel in its order. A step is *reached* when its work is done:
 * - `created`: the gateway gave a socket URL for the session
 * - `socket`: the signalling websocket is open
 * - `discover`: the instance runs and answered
 * - `offer`: the instance's offer is applied and answered
 * - `ice`: a path for packets works
 * - `dtls`: keys are agreed
 * - `first-frame`: a picture that is not blank was decoded
 */
export const STEPS = ["created", "socket", "discover", "offer", "ice", "dtls", "first-frame"] as const;
export type Step = (typeof STEPS)[number];

/** When a step was reached, in milliseconds since the attempt began. */
export interface StepTime {
  step: Step;
  ms: number;
}

interface StepWords {
  /** What is being waited for, shown while it lasts. */
  doing: string;
  /** How a failure begins. */
  failed: string;
  /** What a person can do. */
  advice: string;
}

export const STEP_WORDS: Record<Step, StepWords> = {
  created: {
    doing: "Asking for a session",
    failed: "The session could not be opened",
    advice: "Look at the message above; if the gateway does not answer, check that Fanlight runs.",
  },
  socket: {
    doing: "Opening the signalling socket",
    failed: "The signalling socket could not be opened",
    advice: "A proxy between you and the gateway may block websockets, or the link is too old: try again.",
  },
  discover: {
    doing: "Waiting for the instance to start",
    failed: "The instance did not start",
    advice: "The instance's log says why (fanlight logs). Another attempt starts a new instance.",
  },
  offer: {
    doing: "Agreeing on picture and sound",
    failed: "Browser and instance did not agree on a stream",
    advice: "This browser may lack every codec that the instance can encode. A current browser helps.",
  },
  ice: {
    doing: "Looking for a path for the stream",
    failed: "No network path to the instance was found",
    advice: "The stream travels by UDP. A firewall may block it, or the instance's address cannot be reached from here.",
  },
  dtls: {
    doing: "Agreeing on keys",
    failed: "The encrypted connection was not established",
    advice: "Something on the way changes or drops packets. Try another network.",
  },
  "first-frame": {
    doing: "Waiting for the first picture",
    failed: "No picture arrived",
    advice: "The application may not have opened a window yet, or the browser cannot decode the stream.",
  },
};

/** A failure that knows at which step it happened. */
export class StreamError extends Error {
  readonly step: Step;
  /** The code of the peer's `error` message, or the HTTP status, if there was one. */
  readonly code: number | undefined;

  constructor(step: Step, message: string, code?: number) {
    super(message);
    this.name = "StreamError";
    this.step = step;
    this.code = code;
  }

  /** One sentence with the step and the reason. */
  get sentence(): string {
    return `${STEP_WORDS[this.step].failed}: ${this.message}`;
  }

  /** What a person can do. */
  get advice(): string {
    return STEP_WORDS[this.step].advice;
  }
}

/** The first step of the funnel that is not among `reached`; the last one when all are. */
export function nextStep(reached: readonly StepTime[]): Step {
  return STEPS.find((step) => !reached.some((time) => time.step === step)) ?? "first-frame";
}
