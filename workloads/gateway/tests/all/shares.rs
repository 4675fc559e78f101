//! Shares, from their making to the socket that they lead to.

use std::time::Duration;

use fanlight_api::{
    SessionId,
    bus::{GatewayRequest, GatewayResponse, InstanceState, gateway_sessions},
    gateway::{SharePatch, SharePost},
};
use reqwest::Method;
use serde_json::{Value, json};

use crate::rig::{Answer, Rig, send, spoilt};

async fn active(rig: &Rig) -> String {
    let id = rig.create(json!({})).await["id"].as_str().expect("an id").to_owned();
    rig.agent.set(&id, InstanceState::Running, "");
    rig.until_status(&id, Some("active")).await;
    id
}

async fn share(rig: &Rig, session: &str, more: Value) -> Answer {
    let mut body = json!({ "type": "adb" });
    body.as_object_mut().expect("object").extend(more.as_object().expect("object").clone());
    rig.post(&format!("/1.0/sessions/{session}/share"), body).await
}

/// Opens a share's URL without any token but its own.
async fn open(rig: &Rig, url: &str) -> Answer {
    send(rig.client.get(url)).await
}

fn now() -> i64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_secs() as i64
}

#[tokio::test]
async fn a_share_is_made_listed_changed_and_taken_back() {
    let rig = Rig::new().await;
    let session = active(&rig).await;
    let made = share(&rig, &session, json!({ "description": "for Eva", "expiry_min": 30 })).await.expect(200);
    let made = &made["metadata"];
    let id = made["id"].as_str().expect("an id").to_owned();
    assert_eq!((&made["type"], &made["expiry_min"]), (&json!("adb"), &json!(30)));
    let url = made["url"].as_str().expect("a url").to_owned();
    let start = format!("https://{}/1.0/sessions/{session}/connect?type=adb&token=", rig.address);
    assert!(url.starts_with(&start), "{url}");

    let listed = rig.get("/1.0/shares").await.expect(200);
    assert_eq!((&listed["metadata"], &listed["total_size"]), (&json!([id]), &json!(1)));
    let listed = rig.get(&format!("/1.0/shares?recursion=true&session_id={session}")).await.expect(200);
    let base = listed["metadata"][0].clone();
    assert!(base.get("url").is_none(), "lists show no URLs: {base}");
    assert_eq!((&base["description"], &base["session_id"]), (&json!("for Eva"), &json!(session)));
    let path = format!("/1.0/shares/{id}");
    let shown = rig.get(&path).await.expect(200)["metadata"].clone();
    assert_eq!(shown["url"], url.as_str());

    let later = now() + 86_400;
    let change = json!({ "description": "for Max", "expiry_at": later });
    let changed = rig.ask(Method::PATCH, &path, Some(change)).await.expect(200)["metadata"].clone();
    assert_eq!((&changed["description"], &changed["expiry_at"]), (&json!("for Max"), &json!(later)));
    for (body, part) in [
        (json!({ "expiry_at": 5 }), "expiry_at is 5"),
        (json!({ "expiry_at": now() + 40 * 86_400 }), "at most 30 days"),
        (json!({ "description": "x".repeat(1025) }), "description has 1025"),
        (json!({ "expiry_at": "soon" }), "expiry_at"),
    ] {
        rig.ask(Method::PATCH, &path, Some(body)).await.refused(400, part);
    }

    open(&rig, &url).await.expect(200);
    rig.ask(Method::DELETE, &path, None).await.expect(200);
    open(&rig, &url).await.refused(404, &id);
    rig.get(&path).await.refused(404, &id);
    rig.ask(Method::PATCH, &path, Some(json!({}))).await.refused(404, &id);
    rig.ask(Method::DELETE, &path, None).await.refused(404, &id);
    assert_eq!(rig.get("/1.0/shares").await.expect(200)["metadata"], json!([]));
}

#[tokio::test]
async fn an_agent_shares_the_sessions_of_its_instances_and_no_others() {
    let rig = Rig::new().await;
    let session: SessionId = active(&rig).await.parse().expect("an id");
    let ask = |request: GatewayRequest| {
        let bus = rig.bus.clone();
        async move {
            let answer = bus.request_json(&gateway_sessions(), &request, Duration::from_secs(10)).await;
            answer.expect("an answer")
        }
    };
    let agent = |name: &str| name.parse().expect("an id");
    let create = |name: &str, kind: &str| GatewayRequest::CreateShare {
        agent_id: agent(name),
        session_id: session.clone(),
        share: SharePost { kind: Some(kind.into()), expiry_min: Some(30), ..SharePost::default() },
    };
    let GatewayResponse::Shared { share } = ask(create("agent0", "adb")).await else { panic!("not shared") };
    assert!(open(&rig, share.url.expose()).await.expect(200)["metadata"]["url"].is_string());
    let later = now() + 3600;
    let update = |name: &str| GatewayRequest::UpdateShare {
        agent_id: agent(name),
        session_id: session.clone(),
        share_id: share.id.clone(),
        patch: SharePatch { expiry_at: Some(later), ..SharePatch::default() },
    };
    let GatewayResponse::Shared { share: changed } = ask(update("agent0")).await else {
        panic!("not changed")
    };
    assert_eq!((&changed.id, changed.expiry_at), (&share.id, later));
    let delete = |name: &str| GatewayRequest::DeleteShare {
        agent_id: agent(name),
        session_id: session.clone(),
        share_id: share.id.clone(),
    };
    for (request, wanted) in [
        (create("agent0", "video"), 400),
        (create("other", "adb"), 404),
        (update("other"), 404),
        (delete("other"), 404),
    ] {
        let answer: GatewayResponse = ask(request.clone()).await;
        let GatewayResponse::Refused { status, .. } = answer else { panic!("{request:?}: {answer:?}") };
        assert_eq!(status, Some(wanted), "{request:?}");
    }
    assert_eq!(ask(delete("agent0")).await, GatewayResponse::Ended);
    rig.get(&format!("/1.0/shares/{}", share.id)).await.refused(404, "no share");
}

#[tokio::test]
async fn wrong_requests_for_shares_are_named_and_the_sixth_share_is_refused() {
    let rig = Rig::new().await;
    let session = active(&rig).await;
    for (body, part) in [
        (json!({ "type": "video" }), "type is \"video\""),
        (json!({ "expiry_min": 0 }), "expiry_min is 0"),
        (json!({ "expiry_at": 1 }), "expiry_at is 1"),
        (json!({ "expiry_min": 60 * 24 * 31 }), "1 to 43200 minutes"),
        (json!({ "description": 7 }), "description"),
    ] {
        share(&rig, &session, body).await.refused(400, part);
    }
    rig.post("/1.0/sessions/unheard-of/share", json!({ "type": "adb" })).await.refused(404, "unheard-of");
    rig.post(&format!("/1.0/sessions/{session}/share"), json!({})).await.refused(400, "type is \"\"");
    // All at the same time: the limit holds anyway.
    let many = (0..8).map(|_| share(&rig, &session, json!({})));
    let answers = futures_util::future::join_all(many).await;
    let count = |status| answers.iter().filter(|answer| answer.status == status).count();
    assert_eq!((count(200), count(403)), (5, 3));
    share(&rig, &session, json!({})).await.refused(403, "5 shares already");
    let listed = rig.get("/1.0/shares?limit=2&offset=4").await.expect(200);
    assert_eq!(listed["metadata"].as_array().map(Vec::len), Some(1));
    assert_eq!(listed["total_size"], 5);
    for bad in ["limit=-1", "offset=x", "recursion=maybe", "session_id=a/b"] {
        assert_eq!(rig.get(&format!("/1.0/shares?{bad}")).await.status, 400, "{bad}");
    }
    // They end with their session.
    rig.ask(Method::DELETE, &format!("/1.0/sessions/{session}?sync=true"), None).await.expect(200);
    assert_eq!(rig.get("/1.0/shares").await.expect(200)["total_size"], 0);
    let left = rig.store.range("gateway/shares/", None, 10).await.expect("read");
    assert!(left.entries.is_empty(), "{left:?}");
}

#[tokio::test]
async fn a_share_opens_its_session_alone_and_an_image_without_adb_says_so() {
    let rig = Rig::new().await;
    let session = rig.create(json!({})).await["id"].as_str().expect("an id").to_owned();
    let made = share(&rig, &session, json!({})).await.expect(200);
    let url = made["metadata"]["url"].as_str().expect("a url").to_owned();
    open(&rig, &url).await.refused(400, "not active");
    rig.agent.set(&session, InstanceState::Running, "");
    rig.until_status(&session, Some("active")).await;

    let connected = open(&rig, &url).await.expect(200)["metadata"].clone();
    assert_eq!(connected["stun_servers"][0]["urls"], json!(["stun:127.0.0.1:5349"]));
    let socket = connected["url"].as_str().expect("a url").to_owned();
    let start = format!("wss://{}/1.0/sessions/{session}/sockets/adb?token=", rig.address);
    assert!(socket.starts_with(&start), "{socket}");
    let over_http = |socket: &str| socket.replace("wss://", "https://");
    open(&rig, &over_http(&socket)).await.refused(400, "ADB is not supported by this image");
    // A later user of the share takes over.
    open(&rig, &url).await.expect(200);
    open(&rig, &over_http(&socket)).await.refused(410, "connected through this share later");

    let other = active(&rig).await;
    open(&rig, &url.replace(&session, &other)).await.refused(403, "another session");
    let (before, token) = url.split_once("token=").expect("a token");
    open(&rig, &format!("{before}token={}", spoilt(token))).await.refused(401, "token");
    open(&rig, &format!("{before}token=")).await.refused(401, "token of a share");
    open(&rig, &url.replace("type=adb", "type=video")).await.refused(400, "type is \"video\"");
    open(&rig, &format!("{before}token={}", rig.token)).await.refused(403, "another kind");
    let (before, _) =
        over_http(&socket).split_once("token=").map(|(a, b)| (a.to_owned(), b.to_owned())).expect("two");
    open(&rig, &format!("{before}token={token}")).await.refused(403, "another kind");
    open(&rig, &format!("{before}token=")).await.refused(401, "socket token");
    // The token of a share opens nothing else.
    let header = format!("macaroon root={token}");
    let request = rig.client.get(rig.url("/1.0/sessions")).header("authorization", header);
    send(request).await.refused(403, "another kind");
}
