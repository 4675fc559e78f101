//! A server that answers as the reference says AMS does, with as little behind it as the command can notice: lists that
//! are fixed, operations that end at once, and programs that run right here.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    process::Stdio,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Extension, Router,
    body::Bytes,
    extract::{Path as Segment, Query, Request, State, WebSocketUpgrade, ws::Message, ws::WebSocket},
    http::{HeaderMap, StatusCode, header::AUTHORIZATION},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{any, delete, get, post},
};
use fanlight_service::{
    Shutdown,
    http::{Binding, Edge, GatewayStyle, Json, Limits, Peer, bind_unix, serve},
    tls::{self, KeyFiles},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    process::Command,
    sync::{mpsc, oneshot, watch},
};

/// The trust password that it takes.
pub const PASSWORD: &str = "let me in";
/// The bearer token that it takes.
pub const TOKEN: &str = "good.token";
/// Id of the one instance.
pub const INSTANCE: &str = "cilsreunfpfec9b1ktg0";
const EXEC: &str = "66e83638-9dd7-4a26-aef2-5462814869a1";
const DONE: &str = "11111111-9dd7-4a26-aef2-5462814869a1";
const FAILED: &str = "22222222-9dd7-4a26-aef2-5462814869a1";
const ENDLESS: &str = "33333333-9dd7-4a26-aef2-5462814869a1";

/// What a running server knows.
pub struct Server {
    pub folder: tempfile::TempDir,
    pub shared: Arc<Shared>,
    /// Address with TLS, if it serves any.
    pub url: String,
    /// Fingerprint of its certificate.
    pub fingerprint: String,
    shutdown: Shutdown,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shutdown.token().cancel();
    }
}

#[derive(Default)]
pub struct Shared {
    /// Every request: method, path with query, body.
    pub seen: Mutex<Vec<(String, String, Value)>>,
    /// Uploads: headers and length.
    pub uploads: Mutex<Vec<(HeaderMap, usize)>>,
    /// Which streams of an exec were opened, in order.
    pub dialled: Mutex<Vec<String>>,
    /// Certificates that are trusted.
    trusted: Mutex<BTreeSet<String>>,
    exec: Mutex<Option<Exec>>,
}

struct Exec {
    /// Secret to stream; each works once.
    secrets: BTreeMap<String, String>,
    sockets: BTreeMap<String, oneshot::Sender<WebSocket>>,
    status: watch::Receiver<Option<i32>>,
}

impl Shared {
    /// Bodies of the requests to a path.
    pub fn bodies(&self, method: &str, path: &str) -> Vec<Value> {
        let seen = self.seen.lock().expect("nobody panics while holding it");
        seen.iter().filter(|(m, p, _)| m == method && p == path).map(|(_, _, body)| body.clone()).collect()
    }

    /// All requests as `METHOD path`.
    pub fn requests(&self) -> Vec<String> {
        let seen = self.seen.lock().expect("nobody panics while holding it");
        seen.iter().map(|(method, path, _)| format!("{method} {path}")).collect()
    }
}

impl Server {
    /// Serves on the socket where the command looks for the local stack of this folder, and with TLS.
    pub fn start() -> Self {
        tls::install_provider();
        let folder = tempfile::tempdir().expect("a folder");
        let shared = Arc::new(Shared::default());
        let shutdown = Shutdown::new();
        let edge = Edge::new(router(shared.clone()), Arc::new(GatewayStyle), 64 * 1024 * 1024);
        std::fs::create_dir_all(folder.path().join("state/run")).expect("made");
        let socket = bind_unix(&folder.path().join("state/run/ams.sock"), 0o600).expect("bound");
        serve(Binding::Unix(socket), edge.clone(), Limits::default(), &shutdown).expect("served");
        let files = KeyFiles::in_folder(folder.path(), "server");
        let fingerprint = tls::ensure_self_signed(&files, "ams", &["127.0.0.1".into()]).expect("made");
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let config = tls::server_config(&files).expect("usable");
        let address = serve(Binding::Tls(listener, config), edge, Limits::default(), &shutdown);
        let url = format!("https://{}", address.expect("served").expect("an address"));
        Self { folder, shared, url, fingerprint, shutdown }
    }

    pub fn state(&self) -> &Path {
        self.folder.path()
    }
}

fn router(shared: Arc<Shared>) -> Router {
    let open = Router::new()
        .route("/1.0", get(service))
        .route("/1.0/version", get(async || sync(json!({"version": "9.9"}))))
        .route("/1.0/certificates", post(trust))
        .route("/1.0/operations/{id}/websocket", get(stream));
    let guarded = Router::new()
        .route("/1.0/instances", get(instances).post(launch).delete(accepted))
        .route("/1.0/instances/{id}", get(instance).patch(accepted).delete(accepted))
        .route("/1.0/instances/{id}/exec", post(exec))
        .route("/1.0/instances/{id}/logs", get(logs))
        .route("/1.0/instances/{id}/logs/{name}", get(async || "1\n2\n3\n".into_response()))
        .route("/1.0/operations/{id}", delete(accepted))
        .route("/1.0/operations/{id}/wait", get(wait))
        .route(
            "/1.0/config",
            get(async || sync(json!({"config": {"a.b": "x", "c": 7, "secret": true}}))).patch(accepted),
        )
        .route("/1.0/nodes/{id}", get(accepted).patch(accepted))
        .route("/1.0/auth/groups/{id}", get(group).put(accepted))
        .route("/1.0/auth/permissions", get(async || error(StatusCode::FORBIDDEN, "Not Authorized")))
        .route("/1.0/applications", post(upload))
        .route("/1.0/events", get(events))
        .fallback(any(async || error(StatusCode::NOT_FOUND, "not found")))
        .layer(middleware::from_fn_with_state(shared.clone(), guard));
    open.merge(guarded).layer(middleware::from_fn_with_state(shared.clone(), note)).with_state(shared)
}

fn sync(metadata: impl serde::Serialize) -> Response {
    Json(json!({"type": "sync", "status": "Success", "status_code": 200, "operation": "", "error_code": 0, "error": "",
        "metadata": metadata}))
    .into_response()
}

fn error(status: StatusCode, text: &str) -> Response {
    (status, Json(json!({"type": "error", "error": text, "error_code": status.as_u16(), "metadata": {}})))
        .into_response()
}

fn operation(id: &str, code: u16, err: &str, metadata: Value) -> Value {
    json!({"id": id, "class": "task", "description": "Doing it", "created_at": null, "updated_at": null,
        "status": if code < 200 { "Running" } else { "Success" }, "status_code": code,
        "resources": {"instances": [format!("/1.0/instances/{INSTANCE}")]}, "metadata": metadata, "may_cancel": false,
        "err": err, "server_address": ""})
}

fn pending(id: &str, metadata: Value) -> Response {
    let body = json!({"type": "async", "status": "Operation created", "status_code": 100,
        "operation": format!("/1.0/operations/{id}"), "error_code": 0, "error": "",
        "metadata": operation(id, 103, "", metadata)});
    (StatusCode::ACCEPTED, Json(body)).into_response()
}

async fn accepted() -> Response {
    pending(DONE, Value::Null)
}

/// Writes every request down, without what is behind a secret.
async fn note(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    let (parts, body) = request.into_parts();
    let path = parts.uri.path_and_query().map(ToString::to_string).unwrap_or_default();
    let is_upload = parts.headers.get("content-type").is_some_and(|kind| kind == "application/octet-stream");
    let bytes = axum::body::to_bytes(body, 64 * 1024 * 1024).await.expect("whole");
    if is_upload {
        shared.uploads.lock().expect("held by nobody").push((parts.headers.clone(), bytes.len()));
    }
    let value = serde_json::from_slice(&bytes).unwrap_or_default();
    let path = path.split("secret=").next().unwrap_or_default().to_owned();
    shared.seen.lock().expect("held by nobody").push((parts.method.to_string(), path, value));
    next.run(Request::from_parts(parts, bytes.into())).await
}

fn is_trusted(shared: &Shared, peer: &Peer, headers: &HeaderMap) -> bool {
    let known = |fingerprint: String| shared.trusted.lock().expect("held by nobody").contains(&fingerprint);
    !peer.tls
        || peer.fingerprint().is_some_and(known)
        || headers.get(AUTHORIZATION).is_some_and(|value| value == format!("Bearer {TOKEN}").as_str())
}

async fn guard(
    State(shared): State<Arc<Shared>>,
    Extension(peer): Extension<Peer>,
    request: Request,
    next: Next,
) -> Response {
    if is_trusted(&shared, &peer, request.headers()) {
        return next.run(request).await;
    }
    error(StatusCode::FORBIDDEN, "Not Authorized")
}

async fn service(
    State(shared): State<Arc<Shared>>,
    Extension(peer): Extension<Peer>,
    headers: HeaderMap,
) -> Response {
    let auth = if is_trusted(&shared, &peer, &headers) { "trusted" } else { "untrusted" };
    sync(
        json!({"api_extensions": ["instance_support"], "api_status": "stable", "api_version": "1.0", "auth": auth,
        "auth_methods": ["2waySSL"]}),
    )
}

async fn trust(
    State(shared): State<Arc<Shared>>,
    Extension(peer): Extension<Peer>,
    Json(body): Json<Value>,
) -> Response {
    use base64::{Engine as _, prelude::BASE64_STANDARD};
    if body["trust-password"] != PASSWORD {
        return error(StatusCode::FORBIDDEN, "wrong trust password");
    }
    let der = BASE64_STANDARD
        .decode(body["certificate"].as_str().unwrap_or_default())
        .expect("base64 without lines");
    let fingerprint = tls::fingerprint(&der);
    assert_eq!(peer.fingerprint(), Some(fingerprint.clone()), "it shows the certificate that it hands in");
    shared.trusted.lock().expect("held by nobody").insert(fingerprint);
    pending(DONE, Value::Null)
}

fn one(status: i32, text: &str) -> Value {
    json!({"id": INSTANCE, "name": "one", "type": "container", "status_code": status, "status": text, "node": "n1",
        "app_name": "game", "address": "192.0.2.7", "tags": ["a", "b"],
        "error_message": if status < 0 { "it broke" } else { "" }, "config": {"security": {"delete_protected": false}}})
}

async fn instances() -> Response {
    let mut protected = one(4, "running");
    protected["id"] = "cilsreunfpfec9b1ktgg".into();
    protected["name"] = "kept\u{1b}[2J".into();
    protected["config"]["security"]["delete_protected"] = true.into();
    sync([one(4, "running"), protected])
}

async fn instance(State(shared): State<Arc<Shared>>, Segment(id): Segment<String>) -> Response {
    match id.as_str() {
        // Runs when it is looked at for the first time, and no more after that.
        "ending" => match shared.bodies("GET", "/1.0/instances/ending").len() {
            0 | 1 => sync(one(4, "running")),
            _ => sync(one(5, "stopped")),
        },
        INSTANCE | "one" => sync(one(4, "running")),
        "broken" => sync(one(-1, "error")),
        "stopped" => sync(one(5, "stopped")),
        _ => error(StatusCode::NOT_FOUND, "instance not found"),
    }
}

async fn launch(Json(body): Json<Value>) -> Response {
    match body["app_id"].as_str() {
        Some("failing") => pending(FAILED, Value::Null),
        Some("slow") => pending(ENDLESS, Value::Null),
        Some("game") => pending(DONE, Value::Null),
        _ => error(StatusCode::NOT_FOUND, "application not found"),
    }
}

async fn logs(Segment(id): Segment<String>) -> Response {
    match id.as_str() {
        "broken" | "ending" => sync(["/1.0/instances/x/logs/system.log"]),
        _ => sync(json!([])),
    }
}

async fn group() -> Response {
    sync(json!({"name": "g", "permissions": [{"entitlement": "can_view", "resource": "server"}]}))
}

async fn upload(State(_): State<Arc<Shared>>, headers: HeaderMap, body: Bytes) -> Response {
    use sha2::{Digest, Sha256};
    let digest = hex::encode(Sha256::digest(&body));
    match headers.get("x-ams-fingerprint") {
        Some(stated) if stated.as_bytes() == digest.as_bytes() => pending(DONE, Value::Null),
        _ => error(StatusCode::BAD_REQUEST, "fingerprint mismatch"),
    }
}

async fn events(upgrade: WebSocketUpgrade) -> Response {
    upgrade.on_upgrade(async |mut socket| {
        let event = json!({"type": "lifecycle", "timestamp": "2026-01-05T10:00:00.123456789Z",
            "metadata": {"action": "instance-running", "source": "/1.0/instances/x"}});
        let _ = socket.send(Message::text(event.to_string())).await;
        // Stays, as long as somebody listens.
        while let Some(Ok(_)) = socket.recv().await {}
    })
}

async fn wait(
    State(shared): State<Arc<Shared>>,
    Segment(id): Segment<String>,
    Query(query): Query<BTreeMap<String, String>>,
) -> Response {
    match id.as_str() {
        DONE => sync(operation(DONE, 200, "", Value::Null)),
        FAILED => sync(operation(FAILED, 400, "no suitable node", Value::Null)),
        EXEC => {
            let status = shared.exec.lock().expect("held by nobody").as_ref().map(|exec| exec.status.clone());
            let Some(mut status) = status else { return error(StatusCode::NOT_FOUND, "operation not found") };
            let ended = *status.wait_for(Option::is_some).await.expect("somebody runs it");
            sync(operation(EXEC, 200, "", json!({ "return": ended })))
        }
        _ => {
            let seconds = query["timeout"].parse().expect("whole seconds");
            tokio::time::sleep(Duration::from_secs(seconds)).await;
            sync(operation(ENDLESS, 103, "", Value::Null))
        }
    }
}

async fn exec(
    State(shared): State<Arc<Shared>>,
    Segment(id): Segment<String>,
    Json(body): Json<Value>,
) -> Response {
    if id != INSTANCE && id != "one" {
        return error(StatusCode::NOT_FOUND, "instance not found");
    }
    let interactive = body["interactive"] == true;
    let fds: &[&str] = if interactive { &["0", "control"] } else { &["0", "1", "2", "control"] };
    let mut secrets = BTreeMap::new();
    let mut sockets = BTreeMap::new();
    let mut arriving = BTreeMap::new();
    let mut told = BTreeMap::new();
    for fd in fds {
        let secret = format!("secret-of-{fd}-{}", rand::random::<u64>());
        let (sender, receiver) = oneshot::channel();
        secrets.insert(secret.clone(), (*fd).to_owned());
        sockets.insert((*fd).to_owned(), sender);
        arriving.insert((*fd).to_owned(), receiver);
        told.insert((*fd).to_owned(), secret);
    }
    let (ended, status) = watch::channel(None);
    *shared.exec.lock().expect("held by nobody") = Some(Exec { secrets, sockets, status });
    tokio::spawn(async move {
        let mut open = BTreeMap::new();
        for (fd, socket) in arriving {
            open.insert(fd, socket.await.expect("the client opens every stream"));
        }
        let status = if interactive { terminal(&body, open).await } else { pipes(&body, open).await };
        // The operation is asked for by whoever is still there.
        let _ = ended.send(Some(status));
    });
    pending(EXEC, json!({ "fds": told }))
}

async fn stream(
    State(shared): State<Arc<Shared>>,
    Query(query): Query<BTreeMap<String, String>>,
    headers: HeaderMap,
    upgrade: WebSocketUpgrade,
) -> Response {
    assert!(headers.get(AUTHORIZATION).is_none(), "the secret is the only credential of a stream");
    let found = {
        let mut exec = shared.exec.lock().expect("held by nobody");
        exec.as_mut().and_then(|exec| {
            let fd = exec.secrets.remove(query.get("secret")?)?;
            Some((exec.sockets.remove(&fd)?, fd))
        })
    };
    let Some((sender, fd)) = found else { return error(StatusCode::UNAUTHORIZED, "missing secret") };
    shared.dialled.lock().expect("held by nobody").push(fd);
    upgrade.on_upgrade(async move |socket| drop(sender.send(socket)))
}

/// Runs the program here, with pipes.
async fn pipes(body: &Value, mut open: BTreeMap<String, WebSocket>) -> i32 {
    let words: Vec<&str> =
        body["command"].as_array().expect("a list").iter().filter_map(Value::as_str).collect();
    let mut child = Command::new(words[0])
        .args(&words[1..])
        .envs(
            body["environment"]
                .as_object()
                .into_iter()
                .flatten()
                .filter_map(|(name, value)| Some((name, value.as_str()?))),
        )
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("a program that is there");
    let pid = child.id().expect("it runs") as i32;
    let mut stdin = child.stdin.take().expect("piped");
    let mut input = open.remove("0").expect("open");
    let typing = tokio::spawn(async move {
        // An abnormal end of the stream is the end of the input as well.
        while let Some(Ok(message)) = input.recv().await {
            let over = match message {
                Message::Binary(bytes) => stdin.write_all(&bytes).await.is_err(),
                Message::Close(_) => true,
                _ => false,
            };
            if over {
                return;
            }
        }
    });
    let mut control = open.remove("control").expect("open");
    let controlling = tokio::spawn(async move {
        while let Some(Ok(message)) = control.recv().await {
            let Message::Text(text) = message else { continue };
            let said: Value = serde_json::from_str(&text).expect("JSON");
            assert_eq!(said["command"], "signal");
            let number = said["signal"].as_i64().expect("a number") as i32;
            // SAFETY: a signal to a child of our own that has not been waited for.
            unsafe { libc::kill(pid, number) };
        }
    });
    let out = tokio::spawn(pour(child.stdout.take().expect("piped"), open.remove("1").expect("open")));
    let err = tokio::spawn(pour(child.stderr.take().expect("piped"), open.remove("2").expect("open")));
    let status = child.wait().await.expect("it ends");
    out.await.expect("poured");
    err.await.expect("poured");
    typing.abort();
    controlling.abort();
    use std::os::unix::process::ExitStatusExt as _;
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default())
}

async fn pour(mut from: impl AsyncReadExt + Unpin, mut to: WebSocket) {
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(read) = from.read(&mut buffer).await {
        if read == 0 || to.send(Message::Binary(Bytes::copy_from_slice(&buffer[..read]))).await.is_err() {
            break;
        }
    }
    // The end of the stream, then the end of the connection.
    let _ = to.send(Message::text("")).await;
    let _ = to.send(Message::Close(None)).await;
}

/// A program with a terminal: says what it hears, what size it has, and ends with status 7 at a `q`.
async fn terminal(body: &Value, mut open: BTreeMap<String, WebSocket>) -> i32 {
    let mut data = open.remove("0").expect("open");
    let mut control = open.remove("control").expect("open");
    let (sizes, mut sized) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(Ok(message)) = control.recv().await {
            let Message::Text(text) = message else { continue };
            let said: Value = serde_json::from_str(&text).expect("JSON");
            assert_eq!(said["command"], "window-resize");
            let side = |name: &str| said["args"][name].as_str().expect("sides are texts").to_owned();
            let _ = sizes.send(format!("SIZE {} {}\r\n", side("width"), side("height")));
        }
    });
    let term = body["environment"]["TERM"].as_str().unwrap_or("none");
    let hello = format!("READY {} {} {term}\r\n", body["width"], body["height"]);
    data.send(Message::Binary(hello.into())).await.expect("somebody listens");
    loop {
        tokio::select! {
            Some(size) = sized.recv() => {
                let _ = data.send(Message::Binary(size.into())).await;
            }
            message = data.recv() => match message {
                Some(Ok(Message::Binary(bytes))) => {
                    let said = format!("HEARD {}\r\n", hex::encode(&bytes));
                    let _ = data.send(Message::Binary(said.into())).await;
                    if bytes.contains(&b'q') {
                        let _ = data.send(Message::text("")).await;
                        let _ = data.send(Message::Close(None)).await;
                        return 7;
                    }
                }
                Some(Ok(_)) => {}
                _ => return 129,
            },
        }
    }
}
