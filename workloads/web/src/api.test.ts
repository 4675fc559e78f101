import { describe, expect, test } from "vitest";
import { Api, ApiError, openEnvelope, readInvitation } from "./api";

const failure = (action: () => unknown): ApiError => {
  try {
    action();
  } catch (error) {
    if (error instanceof ApiError) return error;
  }
  throw new Error("no ApiError was thrown");
};

describe("envelope", () => {
  test("a success gives its metadata", () => {
    expect(openEnvelope(200, '{"type":"sync","status":"success","status_code":200,"metadata":{"id":"a"}}')).toEqual({ id: "a" });
    expect(openEnvelope(200, '{"type":"sync","status":"success","status_code":200}')).toBeUndefined();
  });

  test("a failure gives its words, status, code and request id", () => {
    const error = failure(() =>
      openEnvelope(
        404,
        '{"type":"error","status":"failed","status_code":404,"error":"session not found","metadata":{"code":"session-not-found","request_id":"r1"}}',
      ),
    );
    expect([error.message, error.status, error.code, error.requestId]).toEqual(["session not found", 404, "session-not-found", "r1"]);
  });

  test.each([
    [401, "", "not logged in"],
    [429, "<html>slow down</html>", "too many requests"],
    [502, "Bad Gateway", "not ready"],
    [418, "{}", "418"],
    [404, '{"error":""}', "not found"],
    [200, "<html>login here</html>", "not what a Fanlight gateway sends"],
    [200, '{"status":"Success","metadata":[]}', "not what a Fanlight gateway sends"],
    [200, "[]", "not what a Fanlight gateway sends"],
  ])("status %i with body %j has words of its own", (status, body, words) => {
    expect(failure(() => openEnvelope(status, body)).message).toContain(words);
  });
});

describe("invitation", () => {
  test("join may leave the id out, a missing server list is an empty one", () => {
    expect(readInvitation({ url: "ws://x", stun_servers: null }, "s1")).toEqual({ id: "s1", url: "ws://x", stun_servers: [] });
  });
  test.each([undefined, null, [], {}, { url: "" }, { url: 7, id: "a" }, { url: "ws://x" }])("%j is refused with words", (metadata) => {
    expect(failure(() => readInvitation(metadata)).message).toContain("gateway");
  });
});

describe("api", () => {
  const answering = (status: number, body: unknown) => {
    const calls: { url: string; init: RequestInit }[] = [];
    const api = new Api({
      fetch: async (url, init) => {
        calls.push({ url: String(url), init: init ?? {} });
        return new Response(JSON.stringify(body), { status });
      },
      token: "T",
      baseUrl: "http://gw/",
    });
    return { api, calls };
  };

  test("creates with a body and the token in the header", async () => {
    const { api, calls } = answering(201, { status: "success", metadata: { id: "s", url: "ws://x", stun_servers: [] } });
    await api.create({ app: "terminal", joinable: true });
    expect(calls[0]?.url).toBe("http://gw/1.0/sessions");
    expect(calls[0]?.init.method).toBe("POST");
    expect(calls[0]?.init.body).toBe('{"app":"terminal","joinable":true}');
    expect((calls[0]?.init.headers as Record<string, string>)["Authorization"]).toBe("macaroon root=T");
  });

  test("ids cannot leave their place in the path", async () => {
    const { api, calls } = answering(200, { status: "success", metadata: {} });
    await api.session("../../accounts?x");
    expect(calls[0]?.url).toBe("http://gw/1.0/sessions/..%2F..%2Faccounts%3Fx");
  });

  test("deleting what is gone is a success, other failures are not", async () => {
    await expect(answering(404, { status: "failed", error: "gone" }).api.delete("s")).resolves.toBeUndefined();
    await expect(answering(500, { status: "failed", error: "broken" }).api.delete("s")).rejects.toThrow("broken");
  });

  test("the cookie is good, not good, or cannot be asked about", async () => {
    expect(await answering(200, { status: "success" }).api.loggedIn()).toBe(true);
    expect(await answering(401, { status: "failed" }).api.loggedIn()).toBe(false);
    await expect(answering(503, {}).api.loggedIn()).rejects.toThrow("not ready");
  });

  test("a gateway that cannot be reached is said so", async () => {
    const api = new Api({ fetch: () => Promise.reject(new TypeError("Failed to fetch")) });
    await expect(api.applications()).rejects.toThrow("cannot be reached");
  });
});
