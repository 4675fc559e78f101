import { describe, expect, test } from "vitest";
import { iceServers, offeredVideoCodecs, rejectedMedia, stereo } from "./transport";

describe("transport", () => {
  test("ICE servers get credentials only when both are there", () => {
    expect(
      iceServers([
        { urls: ["stun:h:1"] },
        { urls: ["stun:h:1"], username: "", password: "" },
        { urls: ["turn:h:1"], username: "u", password: "p" },
      ]),
    ).toEqual([{ urls: ["stun:h:1"] }, { urls: ["stun:h:1"] }, { urls: ["turn:h:1"], username: "u", credential: "p" }]);
  });

  const answer = "v=0\r\nm=audio 9 UDP/TLS/RTP/SAVPF 111\r\nm=video 0 UDP/TLS/RTP/SAVPF 0\r\nm=application 9 UDP/DTLS/SCTP x\r\n";

  test("rejected sections are found", () => {
    expect(rejectedMedia(answer)).toEqual(["video"]);
    expect(rejectedMedia("")).toEqual([]);
  });

  test("offered video codecs are named once and without repair formats", () => {
    const offer =
      "v=0\nm=audio 9 x 111\na=rtpmap:111 opus/48000/2\nm=video 9 x 96 97 98\na=rtpmap:96 H264/90000\na=rtpmap:97 rtx/90000\na=rtpmap:98 H264/90000\na=rtpmap:99 VP8/90000\n";
    expect(offeredVideoCodecs(offer)).toEqual(["H264", "VP8"]);
  });

  test("the answer asks for two channels of sound", () => {
    const sdp = "m=audio 9 x 111\r\na=rtpmap:111 opus/48000/2\r\na=fmtp:111 minptime=10;useinbandfec=1\r\n";
    expect(stereo(sdp)).toContain("a=fmtp:111 minptime=10;useinbandfec=1;stereo=1\r\n");
    expect(stereo(stereo(sdp))).toBe(stereo(sdp));
    expect(stereo("m=video 9 x 96\r\n")).toBe("m=video 9 x 96\r\n");
  });
});
