// Tries one STUN or TURN server the only way a browser can: a peer connection that knows no other server gathers
// candidates, and the one that comes from the server, or its error, is the outcome. What that means for a stream
// is judged elsewhere.

/** What became of trying a server. */
export type Outcome =
  /** It gave an address: ours as it sees it, or that of a relay. */
  | { kind: "given"; ms: number }
  /** Gathering ended without an address and without an error; so it is when our address is no other than the host's. */
  | { kind: "ended" }
  /** It answers and refuses; STUN's error code. */
  | { kind: "refused"; code: number; text: string }
  /** Nothing came back. */
  | { kind: "silent" }
  /** The browser could not reach it, or does not understand its URL. */
  | { kind: "unreachable"; text: string };

export interface ProbeOptions {
  /** Milliseconds before the server counts as silent. */
  limitMs: number;
  /** Makes the peer connection; for tests. */
  peer?: ((configuration: RTCConfiguration) => RTCPeerConnection) | undefined;
  now?: () => number;
}

/** Codes above this are the browser's own: it did not reach the server (W3C WebRTC, `RTCPeerConnectionIceErrorEvent`). */
const OWN_CODES = 700;

/** Tries the one URL in `server`. Never rejects. */
export async function probe(server: RTCIceServer, options: ProbeOptions): Promise<Outcome> {
  const { limitMs, peer = (configuration) => new RTCPeerConnection(configuration), now = () => performance.now() } = options;
  const relay = /^turns?:/i.test(String(server.urls));
  let pc: RTCPeerConnection;
  try {
    pc = peer({ iceServers: [server], ...(relay ? { iceTransportPolicy: "relay" } : {}) });
  } catch (error) {
    return { kind: "unreachable", text: error instanceof Error ? error.message : String(error) };
  }
  let timer: ReturnType<typeof setTimeout> | undefined;
  try {
    return await new Promise<Outcome>((resolve, reject) => {
      let began = now();
      let failure: Outcome | undefined;
      let host = false;
      timer = setTimeout(() => resolve(failure ?? { kind: "silent" }), limitMs);
      pc.onicecandidate = ({ candidate }) => {
        host ||= candidate?.type === "host";
        if (candidate?.type === (relay ? "relay" : "srflx")) resolve({ kind: "given", ms: now() - began });
      };
      pc.onicecandidateerror = ({ errorCode: code, errorText: text }) => {
        // With several networks there are several errors, and an address may still come through another one. What the
        // server itself said is worth more than what the browser says.
        if (code < OWN_CODES) failure = { kind: "refused", code, text };
        else failure ??= { kind: "unreachable", text: text || `the browser's error ${code}` };
      };
      pc.onicegatheringstatechange = () => {
        if (pc.iceGatheringState !== "complete") return;
        if (relay) resolve(failure ?? { kind: "silent" });
        else resolve(failure ?? (host ? { kind: "ended" } : { kind: "unreachable", text: "the browser uses no network for it" }));
      };
      // Something to connect is needed for candidates to be gathered at all.
      pc.createDataChannel("probe");
      pc.createOffer()
        .then((offer) => {
          began = now();
          return pc.setLocalDescription(offer);
        })
        .catch(reject);
    });
  } catch (error) {
    return { kind: "unreachable", text: error instanceof Error ? error.message : String(error) };
  } finally {
    clearTimeout(timer);
    pc.close();
  }
}
