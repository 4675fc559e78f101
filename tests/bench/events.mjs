// The events of AMS as they come, each with the time of its arrival. Node has no client for websockets that takes a
// client certificate, and of the protocol only reading unmasked text is needed here (RFC 6455, section 5.2).

import { randomBytes } from "node:crypto";
import https from "node:https";

export class AmsEvents {
  /** `{epoch, text}`: Unix milliseconds of the arrival, and the event. */
  seen = [];
  #socket;

  static open(stack) {
    return new Promise((resolve, reject) => {
      const call = https.request(new URL("/1.0/events", stack.env.FANLIGHT_AMS_URL), {
        ca: stack.ca,
        ...stack.client,
        agent: false,
        headers: {
          Connection: "Upgrade",
          Upgrade: "websocket",
          "Sec-WebSocket-Version": "13",
          "Sec-WebSocket-Key": randomBytes(16).toString("base64"),
        },
      });
      call.on("upgrade", (_response, socket, head) => {
        const events = new AmsEvents();
        events.#listen(socket, head);
        resolve(events);
      });
      call.on("response", (response) => reject(new Error(`AMS refused its events: status ${response.statusCode}`)));
      call.on("error", reject);
      call.end();
    });
  }

  #listen(socket, head) {
    this.#socket = socket;
    let rest = head;
    const take = (piece) => {
      rest = Buffer.concat([rest, piece]);
      for (;;) {
        if (rest.length < 2) return;
        let [length, begin] = [rest[1] & 0x7f, 2];
        if (length === 126) {
          if (rest.length < 4) return;
          [length, begin] = [rest.readUInt16BE(2), 4];
        } else if (length === 127) {
          if (rest.length < 10) return;
          [length, begin] = [Number(rest.readBigUInt64BE(2)), 10];
        }
        if (rest.length < begin + length) return;
        if ((rest[0] & 0x0f) === 1) {
          this.seen.push({ epoch: performance.timeOrigin + performance.now(), text: rest.toString("utf8", begin, begin + length) });
        }
        rest = rest.subarray(begin + length);
      }
    };
    take(Buffer.alloc(0));
    socket.on("data", take);
    socket.on("error", () => undefined);
  }

  close() {
    this.#socket?.destroy();
  }
}
