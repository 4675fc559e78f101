// Plain HTTPS requests to the gateway and AMS, as any program would make them.

import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import https from "node:https";

/** A PEM given as text or as the name of a file. */
const pem = (value) => (value && !value.startsWith("-----BEGIN") ? readFileSync(value, "utf8") : value);

const need = (name) => {
  const value = process.env[name];
  if (!value) throw new Error(`the variable ${name} is not set; it comes with a running stack (fanlight up --detach)`);
  return value;
};

const gateway = need("FANLIGHT_GATEWAY_URL");
const token = need("FANLIGHT_TOKEN");
const ca = pem(need("FANLIGHT_CA"));

/** One request: status, parsed body (or its text), headers. */
function request(base, method, path, { body, headers = {}, tls = {} } = {}) {
  const url = new URL(path, base);
  const text = body === undefined ? undefined : typeof body === "string" ? body : JSON.stringify(body);
  return new Promise((resolve, reject) => {
    const call = https.request(
      url,
      { method, ca, agent: false, timeout: 30_000, headers: text === undefined ? headers : { "Content-Type": "application/json", ...headers }, ...tls },
      (response) => {
        let received = "";
        response.setEncoding("utf8");
        response.on("data", (piece) => (received += piece));
        response.on("end", () => {
          let parsed = received;
          try {
            parsed = JSON.parse(received);
          } catch {
            // The cases look at what came, whatever it is.
          }
          resolve({ status: response.statusCode, body: parsed, headers: response.headers });
        });
        response.on("error", reject);
      },
    );
    call.on("timeout", () => call.destroy(new Error(`${method} ${url.pathname}: no answer within 30 s`)));
    call.on("error", reject);
    call.end(text);
  });
}

/** The header exactly as the original's browser client sends it. */
const AUTHORIZED = { Accept: "application/json, text/plain, */*", Authorization: `Macaroon root=${token}` };

export const api = (method, path, body, headers = AUTHORIZED) => request(gateway, method, path, { body, headers });

/** AMS by its client certificate. Its server is checked by the same authority. */
export const ams = (method, path, body) =>
  request(need("FANLIGHT_AMS_URL"), method, path, {
    body,
    tls: { cert: pem(need("FANLIGHT_AMS_CERT")), key: pem(need("FANLIGHT_AMS_KEY")) },
  });

/** Asks for a websocket and says what came: status 101, or the refusal with its body. */
export function upgrade(url) {
  const target = new URL(url.replace(/^ws/, "http"));
  return new Promise((resolve, reject) => {
    const call = https.request(target, {
      ca,
      agent: false,
      timeout: 30_000,
      headers: {
        Connection: "Upgrade",
        Upgrade: "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": createHash("md5").update(String(Math.random())).digest("base64"),
      },
    });
    call.on("upgrade", (_response, socket) => {
      socket.destroy();
      resolve({ status: 101 });
    });
    call.on("response", (response) => {
      let received = "";
      response.setEncoding("utf8");
      response.on("data", (piece) => (received += piece));
      response.on("end", () => resolve({ status: response.statusCode, body: received }));
    });
    call.on("timeout", () => call.destroy(new Error("no answer to the upgrade within 30 s")));
    call.on("error", reject);
    call.end();
  });
}
