//! The clients against a server made up for each test, over real TLS or a unix socket.

use std::{
    net::TcpListener,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    body::Bytes,
    extract::{Extension, Path as Segment, State, WebSocketUpgrade, ws::Message},
    response::{IntoResponse, Response},
    routing::{delete, get, post},
};
use fanlight_api::{
    Secret, SessionId,
    gateway::{SessionStatus, SessionsPost},
};
use fanlight_client::{
    AmsClient, ClientError, Endpoint, GatewayClient, Identity, SessionsQuery, Signal, Trust,
};
use fanlight_service::{
    ApiError, Shutdown,
    http::{Binding, Edge, GatewayStyle, Json, Limits, Peer, bind_unix, serve},
    tls::{self, KeyFiles},
};
use http::{HeaderMap, StatusCode};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(30);

struct Server {
    folder: tempfile::TempDir,
    url: String,
    shutdown: Shutdown,
}

impl Server {
    /// Serves routes with a certificate of an authority of its own, for 127.0.0.1.
    fn start(router: Router) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        tls::install_provider();
        let files = |name: &str| KeyFiles::in_folder(folder.path(), name);
        tls::ensure_ca(&files("ca"), "ca").expect("made");
        tls::ensure_signed_by(&files("ca"), &files("server"), "server", &["127.0.0.1".into()]).expect("made");
        tls::ensure_signed_by(&files("ca"), &files("client"), "client", &["client".into()]).expect("made");
        tls::ensure_ca(&files("other"), "other").expect("made");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let config = tls::server_config(&files("server")).expect("usable");
        let shutdown = Shutdown::new();
        let edge = Edge::new(router, Arc::new(GatewayStyle), 1024 * 1024);
        let address = serve(Binding::Tls(listener, config), edge, Limits::default(), &shutdown);
        let address = address.expect("served").expect("an address");
        Self { folder, url: format!("https://{address}"), shutdown }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    fn endpoint(&self) -> Endpoint {
        Endpoint::http(&self.url, &Trust::Authority(self.path("ca.crt")), None).expect("valid")
    }
}

fn sync(metadata: Value) -> Json<Value> {
    Json(json!({"type": "sync", "status": "Success", "status_code": 200, "operation": "", "error_code": 0,
        "error": "", "metadata": metadata}))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_right_server_is_believed_and_our_certificate_is_shown() {
    let who = async |Extension(peer): Extension<Peer>| sync(json!({ "version": peer.fingerprint() }));
    let server = Server::start(Router::new().route("/1.0/version", get(who)));
    let identity = Identity { certificate: server.path("client.crt"), key: server.path("client.key") };
    let own = tls::fingerprint_of_file(&identity.certificate).expect("there");
    let right = tls::fingerprint_of_file(&server.path("server.crt")).expect("there");
    for trust in [Trust::Authority(server.path("ca.crt")), Trust::Pinned(right.to_uppercase())] {
        let endpoint = Endpoint::http(&server.url, &trust, Some(&identity)).expect("valid");
        let version = AmsClient::new(endpoint).version().await.expect("believed");
        assert_eq!(version.version, own, "{trust:?}");
    }
    for trust in [Trust::Authority(server.path("other.crt")), Trust::Pinned(own), Trust::System] {
        let Ok(endpoint) = Endpoint::http(&server.url, &trust, None) else {
            assert_eq!(trust, Trust::System, "only this may be missing on a machine");
            continue;
        };
        let error = AmsClient::new(endpoint.clone()).version().await.expect_err("another server");
        assert!(matches!(error, ClientError::Unreachable { .. }) && error.is_transient(), "{error:?}");
        assert!(error.chain().contains("certificate"), "{}", error.chain());
        assert!(endpoint.websocket("/1.0/events", HeaderMap::new()).await.is_err());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn errors_keep_what_the_server_said() {
    let broken = async || (StatusCode::OK, "<html>no envelope</html>").into_response();
    let teapot =
        async || -> Response { ApiError::not_found("session-not-found", "no such session").into_response() };
    let sly = async || {
        Json(json!({"type": "error", "error": "instance not found", "error_code": 404, "metadata": {}}))
    };
    let router = Router::new()
        .route("/1.0/sessions/s1", get(teapot))
        .route("/1.0/instances/i1", get(sly))
        .route("/1.0/version", get(broken))
        .route("/1.0/regions", get(broken))
        .route(
            "/1.0",
            get(async || -> Response { (StatusCode::BAD_GATEWAY, "proxy says no").into_response() }),
        );
    let server = Server::start(router);
    let gateway = GatewayClient::new(server.endpoint(), None);
    let ams = AmsClient::new(server.endpoint());

    let error = gateway.session(&"s1".parse().expect("valid")).await.expect_err("refused");
    assert!(error.is_not_found() && !error.is_transient());
    assert_eq!(error.code(), "session-not-found");
    let ClientError::Refused { text, request_id, .. } = &error else { panic!("{error:?}") };
    assert_eq!((text.as_str(), request_id.len()), ("no such session", 20));

    let error = ams.instance("i1").await.expect_err("refused under status 200");
    assert!(error.is_not_found(), "{error:?}");
    assert!(error.to_string().contains("instance not found"));

    let error = gateway.regions().await.expect_err("no envelope");
    assert!(matches!(error, ClientError::Answer { .. }) && error.is_transient(), "{error:?}");
    let error = ams.version().await.expect_err("no envelope");
    assert!(matches!(error, ClientError::Answer { .. }), "{error:?}");
    let error = ams.service().await.expect_err("a proxy's page");
    assert_eq!(error.status(), Some(StatusCode::BAD_GATEWAY));
    assert!(error.is_transient());

    for name in ["", "..", "a/b", "a?b", "a b"] {
        let error = ams.instance(name).await.expect_err("no name");
        assert!(matches!(error, ClientError::Address { .. }), "{name:?}");
    }
    server.shutdown.stop(PATIENCE).await;
    let error = gateway.status().await.expect_err("gone");
    assert!(matches!(error, ClientError::Unreachable { .. }), "{error:?}");
    assert!(error.to_string().contains(&server.url), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_gateway_gets_the_token_and_bodies_as_documented() {
    let create = async |headers: HeaderMap, body: Bytes| -> Result<Response, ApiError> {
        if headers["authorization"] != "macaroon root=t0ken" {
            return Err(ApiError::unauthorized("no"));
        }
        let body: Value = serde_json::from_slice(&body).expect("JSON");
        assert_eq!((body["app"].as_str(), body["joinable"].as_bool()), (Some("terminal"), Some(true)));
        let answer = Json(json!({"type": "sync", "status": "success", "status_code": 201, "metadata": {
            "id": "s1", "region": "here", "joinable": true, "status": "created", "url": "wss://x/y?token=z",
            "stun_servers": []}}));
        Ok((StatusCode::CREATED, answer).into_response())
    };
    let list = async |uri: http::Uri| {
        assert_eq!(uri.query(), Some("recursion=true&status=active&limit=5"));
        Json(
            json!({"type": "sync", "status": "success", "status_code": 200, "total_size": 0, "metadata": []}),
        )
    };
    let nothing = async |uri: http::Uri| {
        assert_eq!(uri.query(), Some("sync=true"));
        Json(json!({"type": "sync", "status": "success", "status_code": 200}))
    };
    let echo = async |uri: http::Uri, upgrade: WebSocketUpgrade| -> Response {
        upgrade.on_upgrade(async move |mut socket| {
            let _ = socket.send(Message::Text(uri.to_string().into())).await;
        })
    };
    let router = Router::new()
        .route("/1.0/sessions", post(create).get(list))
        .route("/1.0/sessions/{id}", delete(nothing))
        .route("/1.0/sessions/{id}/sockets/slave", get(echo));
    let server = Server::start(router);
    let gateway = GatewayClient::new(server.endpoint(), Some(Secret::new("t0ken")));
    let request =
        SessionsPost { app: Some("terminal".into()), joinable: Some(true), ..SessionsPost::default() };
    let created = gateway.create_session(&request).await.expect("created");
    assert_eq!(created.status, SessionStatus::Created);
    let query = SessionsQuery { status: Some(SessionStatus::Active), limit: Some(5), offset: None };
    assert_eq!(gateway.sessions(&query).await.expect("listed"), []);
    let id: SessionId = "s1".parse().expect("valid");
    gateway.delete_session(&id, true).await.expect("an answer without metadata is fine");
    let url = "wss://elsewhere.example/1.0/sessions/s1/sockets/slave?token=z";
    let mut socket = gateway.signalling(url).await.expect("opened where the client has the gateway");
    let first = futures_util::StreamExt::next(&mut socket).await.expect("a frame").expect("text");
    assert!(first.to_text().expect("text").ends_with("/1.0/sessions/s1/sockets/slave?token=z"));
    let stranger = GatewayClient::new(server.endpoint(), Some(Secret::new("wrong")));
    let error = stranger.create_session(&request).await.expect_err("refused");
    assert_eq!(error.status(), Some(StatusCode::UNAUTHORIZED));
    assert!(!format!("{stranger:?} {error:?}").contains("wrong"), "tokens do not show");
    let bad = GatewayClient::new(server.endpoint(), Some(Secret::new("a\nb")));
    assert!(matches!(bad.regions().await, Err(ClientError::Address { .. })));
}

fn operation(code: u16, err: &str) -> Value {
    json!({"id": "o1", "class": "task", "description": "Creating instance", "created_at": null, "updated_at": null,
        "status": "Running", "status_code": code, "resources": {"instances": ["/1.0/instances/i7"]}, "err": err})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn operations_are_waited_for_and_their_failures_told() {
    let polls = Arc::new(AtomicU32::new(0));
    let launch = async |headers: HeaderMap, uri: http::Uri| {
        assert_eq!(
            (uri.query(), headers["idempotency-key"].to_str().ok()),
            (Some("no_wait=true"), Some("s1/1"))
        );
        let body = Json(json!({"type": "async", "status": "Operation created", "status_code": 100,
            "operation": "/1.0/operations/o1", "error_code": 0, "error": "", "metadata": operation(103, "")}));
        (StatusCode::ACCEPTED, body)
    };
    let wait = async |State(polls): State<Arc<AtomicU32>>, Segment(_): Segment<String>| match polls
        .fetch_add(1, Ordering::SeqCst)
    {
        0 | 2 => sync(operation(103, "")),
        1 => sync(operation(200, "")),
        3 => sync(operation(400, "no suitable node")),
        _ => {
            tokio::time::sleep(Duration::from_millis(200)).await;
            sync(operation(103, ""))
        }
    };
    let router = Router::new()
        .route("/1.0/instances", post(launch))
        .route("/1.0/operations/{id}/wait", get(wait))
        .with_state(polls);
    let server = Server::start(router);
    let ams = AmsClient::new(server.endpoint());
    let launched = ams.launch(&Default::default(), true, Some("s1/1")).await.expect("launched");
    assert_eq!(launched.resource("instances"), Some("i7"));
    assert!(ams.wait(&launched, PATIENCE).await.expect("ends well").succeeded());
    let error = ams.wait(&launched, PATIENCE).await.expect_err("fails");
    assert_eq!(error.to_string(), "Creating instance: no suitable node");
    let error = ams.wait(&launched, Duration::from_millis(500)).await.expect_err("takes too long");
    assert!(matches!(error, ClientError::TimedOut { .. }), "{error:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_are_looked_for_again_after_a_loss_and_each_new_beginning_is_told() {
    fn serve_events(path: &Path) -> Shutdown {
        let events = async |upgrade: WebSocketUpgrade| -> Response {
            upgrade.on_upgrade(async move |mut socket| {
                let event = json!({"type": "lifecycle", "timestamp": "t",
                    "metadata": {"action": "instance-running", "source": "/1.0/instances/i1"}});
                let _ = socket.send(Message::Text("not an event".into())).await;
                let _ = socket.send(Message::Text(event.to_string().into())).await;
                // Then the connection is lost.
            })
        };
        let shutdown = Shutdown::new();
        let edge = Edge::new(Router::new().route("/1.0/events", get(events)), Arc::new(GatewayStyle), 1024);
        let listener = bind_unix(path, 0o600).expect("bound");
        serve(Binding::Unix(listener), edge, Limits::default(), &shutdown).expect("served");
        shutdown
    }
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("ams.sock");
    let ams = AmsClient::new(Endpoint::unix(&path).expect("valid"));
    let mut events = ams.events();
    let mut next = async || tokio::time::timeout(PATIENCE, events.next()).await.expect("something comes");
    assert!(matches!(next().await, Signal::Disconnected(_)), "nobody is there yet");
    let shutdown = serve_events(&path);
    for _ in 0..2 {
        while !matches!(next().await, Signal::Connected) {}
        let Signal::Event(event) = next().await else { panic!("an event follows") };
        assert_eq!(event.metadata["action"], "instance-running");
        assert!(matches!(next().await, Signal::Disconnected(_)));
    }
    shutdown.stop(PATIENCE).await;
}
