//! Signalling sockets.

use std::{sync::Arc, time::Duration};

use fanlight_api::{
    bus::InstanceState,
    gateway::ScreenPatch,
    link::{Frame, MAX_FRAME_BYTES},
};
use futures_util::{SinkExt as _, StreamExt as _};
use reqwest::Method;
use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject as _};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Error, Message, client::IntoClientRequest as _},
};

use crate::rig::{Rig, Streamer, eventually, spoilt};

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

pub struct Socket(WebSocketStream<Box<dyn Stream>>);

/// Opens a socket; a refusal is its status and body.
pub async fn open(rig: &Rig, url: &str, origin: Option<&str>) -> Result<Socket, (u16, Value)> {
    let mut request = url.into_client_request().expect("a URL");
    if let Some(origin) = origin {
        request.headers_mut().insert("origin", origin.parse().expect("a header"));
    }
    let authority = request.uri().authority().expect("an authority").to_string();
    let tcp = TcpStream::connect(&authority).await.expect("connects");
    let stream: Box<dyn Stream> = if url.starts_with("wss:") {
        let mut roots = rustls::RootCertStore::empty();
        let file = rig.folder.path().join("gateway.crt");
        roots.add(CertificateDer::from_pem_file(file).expect("PEM")).expect("a root");
        let config = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        let name = ServerName::try_from("127.0.0.1").expect("a name");
        Box::new(tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, tcp).await.expect("TLS"))
    } else {
        Box::new(tcp)
    };
    match tokio_tungstenite::client_async(request, stream).await {
        Ok((socket, _)) => Ok(Socket(socket)),
        Err(Error::Http(response)) => {
            let body = response.body().as_deref().unwrap_or_default();
            Err((response.status().as_u16(), serde_json::from_slice(body).expect("an envelope")))
        }
        Err(error) => panic!("{error}"),
    }
}

impl Socket {
    pub async fn send(&mut self, text: &str) {
        self.0.send(Message::text(text)).await.expect("sends");
    }

    /// The next text; `None` when the socket was closed.
    pub async fn next(&mut self) -> Option<String> {
        loop {
            let message =
                tokio::time::timeout(Duration::from_secs(60), self.0.next()).await.expect("in time");
            match message {
                Some(Ok(Message::Text(text))) => return Some(text.to_string()),
                Some(Ok(Message::Close(_))) | None => return None,
                Some(Ok(_)) => {}
                Some(Err(error)) => panic!("{error}"),
            }
        }
    }

    /// Expects an `error` message and then the end.
    pub async fn ends_with(&mut self, code: u64, part: &str) {
        let text = self.next().await.expect("an error before the end");
        let error: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!((&error["type"], &error["code"]), (&json!("error"), &json!(code)), "{error}");
        assert!(error["message"].as_str().expect("a message").contains(part), "{error}");
        assert_eq!(self.next().await, None);
    }

    async fn close(mut self) {
        self.0.close(None).await.expect("closes");
    }
}

fn field<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().unwrap_or_else(|| panic!("no {name} in {value}"))
}

async fn join(rig: &Rig, id: &str, body: Value) -> Value {
    rig.post(&format!("/1.0/sessions/{id}/join"), body).await.expect(200)["metadata"].clone()
}

#[tokio::test]
async fn frames_wait_for_the_instance_and_arrive_in_order_both_ways() {
    let rig = Rig::new().await;
    let created = rig.create(json!({})).await;
    let id = field(&created, "id");
    let mut socket = open(&rig, field(&created, "url"), None).await.expect("opens");
    for number in 0..5 {
        socket.send(&format!("early {number}")).await;
    }
    let streamer = Streamer::start(&rig.bus, id, 0).await;
    for number in 0..5 {
        assert_eq!(socket.next().await, Some(format!("echo:early {number}")));
    }
    assert_eq!(streamer.opened(), [(1, Frame::Open { screen: None, stun_servers: vec![] })]);
    // The instance is done: its last frame arrives before the end.
    socket.send("bye").await;
    assert_eq!(socket.next().await.as_deref(), Some("echo:bye"));
    assert_eq!(socket.next().await, None);
}

#[tokio::test]
async fn a_bus_that_loses_packets_loses_no_frame() {
    let rig = Rig::new().await;
    let created = rig.create(json!({})).await;
    let id = field(&created, "id");
    let streamer = Streamer::start(&rig.bus, id, 3).await;
    let mut socket = open(&rig, field(&created, "url"), None).await.expect("opens");
    let texts: Vec<String> = (0..60).map(|number| format!("frame {number}")).collect();
    for text in &texts {
        socket.send(text).await;
    }
    for text in &texts {
        assert_eq!(socket.next().await, Some(format!("echo:{text}")));
    }
    socket.send("last").await;
    socket.close().await;
    eventually(|| async { streamer.closed() == [1] }).await;
    assert_eq!(streamer.texts().last().map(String::as_str), Some("last"), "frames before the close arrive");
}

#[tokio::test]
async fn a_join_hands_over_the_display_and_replaces_the_older_client() {
    let rig = Rig::new().await;
    let created = rig.create(json!({})).await;
    let id = field(&created, "id");
    let streamer = Streamer::start(&rig.bus, id, 0).await;
    let mut first = open(&rig, field(&created, "url"), None).await.expect("opens");
    first.send("a").await;
    assert_eq!(first.next().await.as_deref(), Some("echo:a"));
    let unused = join(&rig, id, json!(null)).await;
    let second = join(&rig, id, json!({ "screen": { "width": 800 }, "disconnect_clients": true })).await;
    assert_eq!(field(&second, "id"), id);
    first.send("b").await;
    assert_eq!(first.next().await.as_deref(), Some("echo:b"), "a join that is not used hurts nobody");
    let mut newer = open(&rig, field(&second, "url"), None).await.expect("opens");
    first.ends_with(8, "another client").await;
    newer.send("c").await;
    assert_eq!(newer.next().await.as_deref(), Some("echo:c"));
    let screen = Some(ScreenPatch { width: Some(800), ..Default::default() });
    assert_eq!(streamer.opened()[1], (3, Frame::Open { screen, stun_servers: vec![] }));
    let (status, body) = open(&rig, field(&unused, "url"), None).await.err().expect("outdated");
    assert_eq!((status, &body["metadata"]["code"]), (410, &json!("token-outdated")));
    rig.post(&format!("/1.0/sessions/{id}/join"), json!({ "screen": { "fps": 0 } }))
        .await
        .refused(400, "screen.fps");
    rig.post("/1.0/sessions/unknown/join", json!({})).await.refused(404, "unknown");
}

#[tokio::test]
async fn wrong_tokens_roles_and_sessions_are_refused_before_the_upgrade() {
    let rig = Rig::new().await;
    let (mine, other) = (rig.create(json!({})).await, rig.create(json!({})).await);
    let (url, id) = (field(&mine, "url"), field(&mine, "id"));
    let path = |text: &str| format!("wss://{}{text}", rig.address);
    let token = url.split("token=").nth(1).expect("a token");
    let foreign = field(&other, "url").split("token=").nth(1).expect("a token");
    for (url, status, code) in [
        (path(&format!("/1.0/sessions/{id}/sockets/slave")), 401, "unauthorized"),
        (path(&format!("/1.0/sessions/{id}/sockets/slave?token=x")), 401, "unauthorized"),
        (path(&format!("/1.0/sessions/{id}/sockets/slave?token={}", spoilt(token))), 401, "unauthorized"),
        (path(&format!("/1.0/sessions/{id}/sockets/slave?token={foreign}")), 403, "foreign-token"),
        (path(&format!("/1.0/sessions/{id}/sockets/slave?token={}", rig.token)), 403, "wrong-token-kind"),
        (path(&format!("/1.0/sessions/{id}/sockets/master?token={token}")), 400, "unsupported-role"),
        (path(&format!("/1.0/sessions/{id}/sockets/adb?token={token}")), 403, "wrong-token-kind"),
        (path(&format!("/1.0/sessions/{id}/sockets/tea?token={token}")), 404, "not-found"),
    ] {
        let (got, body) = open(&rig, &url, None).await.err().expect("refused");
        assert_eq!((got, &body["metadata"]["code"]), (status, &json!(code)), "{url} {body}");
    }
    let bearer =
        rig.client.get(rig.url("/1.0/sessions")).header("authorization", format!("macaroon root={token}"));
    crate::rig::send(bearer).await.refused(403, "API token");
    crate::rig::send(rig.client.get(url.replace("wss:", "https:"))).await.refused(426, "");
    let mut opened = open(&rig, &url.replace("/sessions/", "/session/"), None).await.expect("both spellings");
    let (status, body) = open(&rig, url, None).await.err().expect("used");
    assert_eq!((status, &body["metadata"]["code"]), (403, &json!("token-used")));
    rig.ask(Method::DELETE, &format!("/1.0/sessions/{id}?sync=true"), None).await.expect(200);
    opened.ends_with(3, "ended").await;
    let (status, _) = open(&rig, url, None).await.err().expect("gone");
    assert_eq!(status, 404);
}

#[tokio::test]
async fn a_session_that_fails_tells_its_client_why() {
    let rig = Rig::new().await;
    let created = rig.create(json!({})).await;
    let id = field(&created, "id");
    let mut socket = open(&rig, field(&created, "url"), None).await.expect("opens");
    rig.agent.set(id, InstanceState::Failed, "the program foot was not found");
    socket.ends_with(3, "the program foot was not found").await;
    let second = rig.create(json!({})).await;
    rig.agent.set(field(&second, "id"), InstanceState::Failed, "no GPU");
    rig.until_status(field(&second, "id"), Some("error")).await;
    let (status, body) = open(&rig, field(&second, "url"), None).await.err().expect("over");
    assert_eq!(status, 410);
    assert!(field(&body, "error").contains("no GPU"), "{body}");
}

#[tokio::test]
async fn frames_that_are_no_signalling_end_the_socket_with_a_reason() {
    let rig = Rig::new().await;
    let created = rig.create(json!({})).await;
    let id = field(&created, "id");
    let _streamer = Streamer::start(&rig.bus, id, 0).await;
    let next = || async {
        let joined = join(&rig, id, json!({})).await;
        open(&rig, field(&joined, "url"), None).await.expect("opens")
    };
    let mut socket = next().await;
    socket.0.send(Message::binary(vec![1, 2, 3])).await.expect("sends");
    socket.ends_with(5, "binary").await;
    for size in [MAX_FRAME_BYTES + 1, 1024 * 1024] {
        let mut socket = next().await;
        socket.send(&"x".repeat(size)).await;
        socket.ends_with(5, "too large").await;
    }
    let mut socket = next().await;
    socket.send(&"\u{1}".repeat(MAX_FRAME_BYTES)).await;
    socket.ends_with(5, "escapes").await;
    let mut socket = next().await;
    let large = "x".repeat(MAX_FRAME_BYTES);
    socket.send(&large).await;
    socket.send("y").await;
    let mut socket = next().await;
    for _ in 0..1001 {
        socket.send("z").await;
    }
    let last = loop {
        match socket.next().await {
            Some(text) if text == "echo:z" => {}
            other => break other,
        }
    };
    let error: Value = serde_json::from_str(&last.expect("an error")).expect("JSON");
    assert_eq!(error["code"], 5, "{error}");
}

#[tokio::test]
async fn an_instance_that_never_comes_is_given_up() {
    let rig = Rig::with(|config| config.limits.instance_time = Duration::from_millis(300)).await;
    let created = rig.create(json!({})).await;
    let mut socket = open(&rig, field(&created, "url"), None).await.expect("opens");
    socket.send("discover").await;
    socket.ends_with(7, "did not answer").await;
    let id = field(&created, "id");
    assert_eq!(rig.status_of(id).await.as_deref(), Some("created"), "the session itself goes on");
}

#[tokio::test]
async fn a_gateway_that_goes_down_says_so_and_the_session_goes_on() {
    let mut rig = Rig::new().await;
    let created = rig.create(json!({})).await;
    let id = field(&created, "id");
    let streamer = Streamer::start(&rig.bus, id, 0).await;
    let mut socket = open(&rig, field(&created, "url"), None).await.expect("opens");
    socket.send("a").await;
    assert_eq!(socket.next().await.as_deref(), Some("echo:a"));
    let reading = tokio::spawn(async move { socket.ends_with(1, "going down").await });
    rig.stop().await;
    reading.await.expect("told");
    rig.start().await;
    let joined = join(&rig, id, json!({})).await;
    let mut socket = open(&rig, field(&joined, "url"), None).await.expect("opens");
    socket.send("b").await;
    assert_eq!(socket.next().await.as_deref(), Some("echo:b"));
    assert_eq!(streamer.opened().len(), 2);
}
