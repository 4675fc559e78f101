//! The page: its files, its login, and what its cookie opens.

use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};

use crate::{
    relay::open,
    rig::{Answer, Rig, send},
};

struct Page<'a> {
    rig: &'a Rig,
    cookie: String,
}

impl Page<'_> {
    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.rig.page)
    }

    fn origin(&self) -> String {
        format!("http://{}", self.rig.page)
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.rig.client.request(method, self.url(path)).header("cookie", &self.cookie)
    }

    async fn post(&self, path: &str, body: Value) -> Answer {
        send(self.request(Method::POST, path).header("origin", self.origin()).body(body.to_string())).await
    }
}

async fn log_in(rig: &Rig) -> Page<'_> {
    let code =
        rig.internal(Method::POST, "/1.0/ui/codes", None).await.expect(201)["metadata"]["code"].clone();
    let page = Page { rig, cookie: String::new() };
    let answer = page.post("/ui/login", json!({ "code": code })).await;
    let header = answer.headers["set-cookie"].to_str().expect("text").to_owned();
    answer.expect(200);
    for part in ["HttpOnly", "SameSite=Strict", "Path=/", "Max-Age=43200"] {
        assert!(header.contains(part), "{header}");
    }
    assert!(!header.contains("Secure"), "the loopback listener has no TLS");
    page.post("/ui/login", json!({ "code": code })).await.refused(403, "used already");
    Page { rig, cookie: header.split(';').next().expect("a cookie").to_owned() }
}

#[tokio::test]
async fn files_are_served_with_a_policy_on_both_listeners() {
    let rig = Rig::new().await;
    for base in [format!("http://{}", rig.page), format!("https://{}", rig.address)] {
        let get = |path: &str| rig.client.get(format!("{base}{path}"));
        let index = send(get("/ui/")).await;
        assert_eq!(index.status, 200);
        assert!(index.body.as_str().expect("a page").contains("<title>page"));
        let policy = index.headers["content-security-policy"].to_str().expect("text");
        assert!(
            policy.contains("default-src 'self'") && policy.contains("frame-ancestors 'none'"),
            "{policy}"
        );
        assert_eq!(index.headers["cache-control"], "no-cache");
        let script = send(get("/ui/assets/a.js")).await;
        assert_eq!(
            (script.status, script.headers["content-type"].to_str().expect("text")),
            (200, "text/javascript")
        );
        assert!(script.headers["cache-control"].to_str().expect("text").contains("immutable"));
        assert_eq!(send(get("/ui")).await.headers["location"], "/ui/");
        assert_eq!(send(get("/")).await.headers["location"], "/ui/");
        send(get("/ui/nothing.js")).await.refused(404, "/ui/nothing.js");
        send(get("/ui/%2e%2e/gateway.key")).await.refused(404, "");
        send(get("/ui/session")).await.refused(401, "not logged in");
    }
}

#[tokio::test]
async fn other_names_of_this_machine_are_not_served_without_tls() {
    let rig = Rig::new().await;
    let port = rig.page.port();
    for host in
        [format!("evil.example:{port}"), "127.0.0.1".into(), "127.0.0.1:1".into(), "localhost.".into()]
    {
        let request = rig.client.get(format!("http://{}/1.0/status", rig.page)).header("host", host);
        send(request).await.refused(421, "not served here");
    }
    let request =
        rig.client.get(format!("http://{}/1.0/status", rig.page)).header("host", format!("LOCALHOST:{port}"));
    send(request).await.expect(200);
}

#[tokio::test]
async fn the_cookie_launches_and_joins_and_does_nothing_else() {
    let rig = Rig::new().await;
    let page = log_in(&rig).await;
    let shown = send(page.request(Method::GET, "/ui/session")).await.expect(200)["metadata"].clone();
    assert_eq!((&shown["account"], &shown["rights"]), (&json!("ui"), &json!("launch")));
    assert_eq!(
        send(page.request(Method::GET, "/1.0/applications")).await.expect(200)["metadata"][1]["name"],
        "terminal"
    );
    let created = page
        .post("/1.0/sessions", json!({ "app": "terminal", "joinable": true }))
        .await
        .expect(201)["metadata"]
        .clone();
    let url = created["url"].as_str().expect("a url");
    let id = created["id"].as_str().expect("an id");
    assert!(url.starts_with(&format!("ws://{}/1.0/sessions/{id}/sockets/slave?token=", rig.page)), "{url}");
    let joined =
        page.post(&format!("/1.0/sessions/{id}/join"), json!({})).await.expect(200)["metadata"].clone();

    // Another site's page has the cookie sent along, but not our origin.
    let body = json!({ "app": "terminal" }).to_string();
    for origin in [None, Some("https://evil.example"), Some("null")] {
        let mut request = page.request(Method::POST, "/1.0/sessions").body(body.clone());
        if let Some(origin) = origin {
            request = request.header("origin", origin);
        }
        send(request).await.refused(403, "origin");
        let (status, answer) = open(&rig, url, origin).await.err().expect("refused");
        assert_eq!((status, &answer["metadata"]["code"]), (403, &json!("wrong-origin")));
    }
    let own = page.origin();
    let opened = open(&rig, joined["url"].as_str().expect("a url"), Some(&own)).await;
    assert!(opened.is_ok());

    // Sessions of others are not there for it; its own are there for everybody with full rights.
    let foreign = rig.create(json!({})).await;
    let foreign = foreign["id"].as_str().expect("an id");
    send(page.request(Method::GET, &format!("/1.0/sessions/{foreign}"))).await.refused(404, foreign);
    assert_eq!(send(page.request(Method::GET, "/1.0/sessions")).await.expect(200)["metadata"], json!([id]));
    rig.get(&format!("/1.0/sessions/{id}")).await.expect(200);
    let status = send(page.request(Method::GET, "/1.0/status")).await.expect(200);
    assert_eq!(status["metadata"], json!({ "status": "healthy" }));
    send(page.request(Method::GET, "/1.0/accounts")).await.refused(404, "");
    let delete = page.request(Method::DELETE, &format!("/1.0/sessions/{id}?sync=true"));
    send(delete.header("origin", page.origin())).await.expect(200);

    page.post("/ui/logout", json!({})).await.expect(200);
    send(page.request(Method::GET, "/1.0/sessions")).await.refused(401, "login of this page is over");
}

#[tokio::test]
async fn over_tls_the_cookie_is_secure_and_sockets_stay_on_the_page_s_origin() {
    let rig = Rig::with(|config| config.public_url = "https://gateway.example:4000".into()).await;
    let code =
        rig.internal(Method::POST, "/1.0/ui/codes", None).await.expect(201)["metadata"]["code"].clone();
    let origin = format!("https://{}", rig.address);
    let post = |path: &str, body: Value| {
        rig.client.post(rig.url(path)).header("origin", origin.clone()).body(body.to_string())
    };
    let answer = send(post("/ui/login", json!({ "code": code }))).await;
    let cookie = answer.headers["set-cookie"].to_str().expect("text").to_owned();
    assert!(cookie.contains("; Secure"), "{cookie}");
    let cookie = cookie.split(';').next().expect("a cookie").to_owned();
    let request = post("/1.0/sessions", json!({ "app": "terminal" })).header("cookie", cookie);
    let created = send(request).await.expect(201);
    let start = format!("wss://{}/", rig.address);
    assert!(created["metadata"]["url"].as_str().expect("a url").starts_with(&start), "{created}");
    let public = rig.create(json!({})).await;
    assert!(public["url"].as_str().expect("a url").starts_with("wss://gateway.example:4000/"), "{public}");
}
