//! Who gets in.

use reqwest::Method;
use serde_json::json;

use crate::rig::{Rig, eventually, exists, send, spoilt};

#[tokio::test]
async fn every_spelling_of_the_token_opens_and_everything_else_is_401() {
    let rig = Rig::new().await;
    let url = rig.url("/1.0/sessions");
    let with = |value: String| rig.client.get(&url).header("authorization", value);
    for good in ["macaroon root=", "Macaroon root=", "MACAROON root="] {
        send(with(format!("{good}{}", rig.token))).await.expect(200);
    }
    send(rig.client.get(format!("{url}?api_token={}", rig.token))).await.expect(200);
    let header_wins = rig.client.get(format!("{url}?api_token={}", rig.token));
    send(header_wins.header("authorization", "macaroon root=x")).await.refused(401, "malformed");
    send(rig.client.get(&url)).await.refused(401, "Authorization: macaroon root=TOKEN");
    for (bad, part) in [
        ("Bearer x".to_owned(), "form"),
        (format!("macaroon {}", rig.token), "form"),
        ("macaroon root=".to_owned(), "malformed"),
        (format!("macaroon root={}", &rig.token[..rig.token.len() - 4]), "malformed"),
        (format!("macaroon root={}", spoilt(&rig.token)), "not valid here"),
    ] {
        send(with(bad)).await.refused(401, part);
    }
    let answer = send(rig.client.get(&url)).await;
    assert_eq!(answer.headers["www-authenticate"], "macaroon");
    assert!(answer.headers.contains_key("x-request-id"));
}

#[tokio::test]
async fn accounts_are_made_listed_and_deleted_on_the_internal_socket_alone() {
    let mut rig = Rig::new().await;
    rig.get("/1.0/accounts").await.refused(404, "/1.0/accounts");
    let internal = |method, path: &'static str, body| rig.internal(method, path, body);
    let listed = internal(Method::GET, "/1.0/accounts/", None).await.expect(200);
    assert_eq!(listed["metadata"][0]["name"], "tests");
    assert!(!listed.to_string().contains("salt"), "{listed}");
    internal(Method::POST, "/1.0/accounts", Some(json!({ "name": "tests" })))
        .await
        .refused(409, "exists already");
    internal(Method::POST, "/1.0/accounts", Some(json!({ "name": "a b" }))).await.refused(400, "a b");
    internal(Method::POST, "/1.0/accounts", Some(json!({ "nome": "x" }))).await.refused(400, "nome");
    internal(Method::POST, "/1.0/accounts", Some(json!({ "name": "x", "expiry_at": 5 })))
        .await
        .refused(400, "expiry_at");
    internal(Method::GET, "/1.0/sessions", None).await.expect(200);
    internal(Method::DELETE, "/1.0/accounts/nobody", None).await.refused(404, "nobody");
    rig.get("/1.0/sessions").await.expect(200);
    internal(Method::DELETE, "/1.0/accounts/tests", None).await.expect(200);
    rig.get("/1.0/sessions").await.refused(401, "deleted");
    assert!(exists(rig.folder.path(), "gateway.sock"));
    rig.stop().await;
    assert!(!exists(rig.folder.path(), "gateway.sock"));
}

#[tokio::test]
async fn status_and_description_need_no_token_and_say_more_with_one() {
    let rig = Rig::new().await;
    let bare = send(rig.client.get(rig.url("/1.0/status"))).await.expect(200);
    assert_eq!(bare["metadata"], json!({ "status": "healthy" }));
    eventually(|| async { rig.get("/1.0/status").await.expect(200)["metadata"]["agents"] == 1 }).await;
    let full = rig.get("/1.0/status/").await.expect(200);
    assert_eq!(full["metadata"], json!({ "status": "healthy", "agents": 1, "database_nodes": 1 }));
    let described = send(rig.client.get(rig.url("//1.0/"))).await.expect(200);
    assert_eq!(described["metadata"]["auth"], "untrusted");
    assert_eq!(rig.get("/1.0").await.expect(200)["metadata"]["auth"], "trusted");
}

#[tokio::test]
async fn unknown_paths_and_methods_answer_in_the_envelope() {
    let rig = Rig::new().await;
    rig.get("/").await.body.to_string();
    rig.get("/1.0/invitations").await.refused(404, "/1.0/invitations");
    rig.get("/index.php").await.refused(404, "/index.php");
    rig.ask(Method::PATCH, "/1.0/sessions", None).await.refused(405, "PATCH");
    rig.ask(Method::PUT, "/1.0/status", None).await.refused(405, "PUT");
}

#[tokio::test]
async fn pages_of_named_origins_may_call_and_others_may_not() {
    let rig = Rig::with(|config| config.cors.origins = vec!["https://shop.example".into()]).await;
    let preflight = |origin: &'static str| {
        rig.client
            .request(Method::OPTIONS, rig.url("/1.0/sessions/"))
            .header("origin", origin)
            .header("access-control-request-method", "POST")
            .header("access-control-request-headers", "authorization,content-type")
    };
    let answer = send(preflight("https://shop.example")).await;
    assert_eq!(answer.status, 204);
    assert_eq!(answer.headers["access-control-allow-origin"], "https://shop.example");
    assert!(answer.headers["access-control-allow-headers"].to_str().expect("text").contains("authorization"));
    let other = send(preflight("https://evil.example")).await;
    assert_eq!(other.status, 405);
    assert!(!other.headers.contains_key("access-control-allow-origin"));
    let refused =
        send(rig.client.get(rig.url("/1.0/sessions")).header("origin", "https://shop.example")).await;
    assert_eq!(
        refused.headers["access-control-allow-origin"], "https://shop.example",
        "errors can be read too"
    );
    refused.refused(401, "API token");
}

#[tokio::test]
async fn more_requests_than_allowed_are_429() {
    let rig = Rig::with(|config| config.limits.requests_per_second = 5).await;
    let mut statuses = Vec::new();
    for _ in 0..20 {
        statuses.push(rig.get("/1.0/status").await.status);
    }
    assert!(statuses.contains(&429) && statuses.contains(&200), "{statuses:?}");
}

#[tokio::test]
async fn metrics_carry_the_names_of_the_original() {
    let rig = Rig::new().await;
    rig.create(json!({})).await;
    let text = rig.client.get(format!("http://{}/metrics", rig.metrics)).send().await.expect("answer");
    let text = text.text().await.expect("text");
    for part in [
        "anbox_stream_gateway_sessions_total{status=\"created\"} 1",
        "anbox_stream_gateway_accounts_total 1",
        "anbox_stream_gateway_agents_total 1",
        "handler=\"create_new_session\"",
    ] {
        assert!(text.contains(part), "{part} is missing in:\n{text}");
    }
}
