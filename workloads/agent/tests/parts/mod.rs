//! What an agent lives between, made up: an AMS on a unix socket, a gateway that listens on the bus, streamers.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use axum::{
    Router,
    extract::{Path as Segment, Query, State, WebSocketUpgrade, ws::Message as AxumMessage},
    response::Response,
    routing::{delete, get},
};
use fanlight_agent::{Config, Parts, Running};
use fanlight_api::{
    SessionId,
    agent_link::{StreamerStatus, ToAgent, ToStreamer},
    ams::{Instance, InstanceStatus, InstancesPost},
    bus::{AgentReport, AgentRequest, AgentResponse, InstanceState, SessionReport, SessionsReport},
    guest::Streaming,
};
use fanlight_bus::{Bus, Subscription};
use fanlight_client::{Endpoint, Identity, Trust, WebSocket};
use fanlight_service::{
    ApiError, Shutdown,
    http::{Binding, Edge, GatewayStyle, Json, Limits, bind_unix, serve},
    tls::{self, KeyFiles},
};
use futures_util::{SinkExt, StreamExt};
use http::{HeaderMap, StatusCode, header::AUTHORIZATION};
use serde_json::{Value, json};
use tokio::sync::broadcast;
use tokio_tungstenite::tungstenite::Message;

pub const PATIENCE: Duration = Duration::from_secs(30);

/// An AMS that does what its test says.
pub struct Ams {
    pub path: PathBuf,
    state: Arc<Shared>,
    shutdown: Option<Shutdown>,
}

struct Shared {
    inner: Mutex<Inner>,
    events: broadcast::Sender<String>,
}

#[derive(Default)]
pub struct Inner {
    pub instances: BTreeMap<String, Instance>,
    /// Idempotency key → instance.
    pub keys: BTreeMap<String, String>,
    /// Bodies of launches, with their keys.
    pub launches: Vec<(String, InstancesPost)>,
    pub deletions: Vec<(String, bool)>,
    /// Launches answer with this instead.
    pub refuse: Option<(u16, String)>,
    /// Launches make no instance and their operations fail.
    pub fail: Option<String>,
    /// Launches do their work and then answer with an error, as after a lost connection.
    pub lose_answers: u32,
    /// Deletions are accepted and do nothing.
    pub keep_deleted: bool,
}

impl Ams {
    pub fn start(path: &Path) -> Self {
        let state = Arc::new(Shared { inner: Mutex::default(), events: broadcast::channel(64).0 });
        let mut ams = Self { path: path.to_owned(), state, shutdown: None };
        ams.restart();
        ams
    }

    pub fn inner(&self) -> MutexGuard<'_, Inner> {
        self.state.inner.lock().expect("no test thread panicked inside")
    }

    pub fn restart(&mut self) {
        let router = Router::new()
            .route(
                "/1.0",
                get(async || {
                    sync(json!({"api_extensions": [], "api_status": "stable",
                "api_version": "1.0", "auth": "trusted", "auth_methods": [], "cluster_id": "cluster-7"}))
                }),
            )
            .route(
                "/1.0/applications",
                get(async || {
                    sync(json!([{
                "id": "a1", "name": "terminal", "status_code": 2, "status": "ready", "title": "Terminal",
                "versions": [{"number": 0, "status_code": 3, "status": "active", "published": true}]}]))
                }),
            )
            .route(
                "/1.0/nodes",
                get(async || {
                    sync(json!([{"name": "n", "status_code": 4, "cpus": 4,
                "cpu_allocation_rate": 4.0, "memory": "8GB", "memory_allocation_rate": 2.0}]))
                }),
            )
            .route("/1.0/instances", get(list).post(launch))
            .route("/1.0/instances/{id}", delete(remove))
            .route("/1.0/operations/{id}/wait", get(wait))
            .route("/1.0/events", get(events))
            .with_state(self.state.clone());
        let shutdown = Shutdown::new();
        let edge = Edge::new(router, Arc::new(GatewayStyle), 1024 * 1024);
        let listener = bind_unix(&self.path, 0o600).expect("bound");
        serve(Binding::Unix(listener), edge, Limits::default(), &shutdown).expect("served");
        self.shutdown = Some(shutdown);
    }

    pub async fn stop(&mut self) {
        if let Some(shutdown) = self.shutdown.take() {
            // Ends the websockets of events as well.
            let _ = self.state.events.send(String::new());
            shutdown.stop(PATIENCE).await;
        }
        let _ = std::fs::remove_file(&self.path);
    }

    /// Puts an instance there, or changes it, and tells the event.
    pub fn set(&self, id: &str, session: &str, status: InstanceStatus, ours: bool) {
        let mut tags = vec![format!("session={session}")];
        tags.extend(ours.then(|| "launched-by=agent".to_owned()));
        let instance = instance(id, tags, status);
        self.inner().instances.insert(id.to_owned(), instance);
        self.state.tell(id);
    }

    /// Changes the status of the only instance of a session.
    pub fn status(&self, session: &SessionId, status: InstanceStatus, error: &str) {
        let id = {
            let mut inner = self.inner();
            let instance = inner
                .instances
                .values_mut()
                .find(|instance| instance.session().as_ref() == Some(session))
                .expect("an instance of the session");
            instance.status_code = status.code();
            instance.status = status.as_str().into();
            instance.error_message = error.into();
            instance.id.to_string()
        };
        self.state.tell(&id);
    }
}

impl Shared {
    fn tell(&self, id: &str) {
        let event = json!({"type": "lifecycle", "timestamp": "2026-01-01T00:00:00Z",
            "metadata": {"action": "instance-changed", "source": format!("/1.0/instances/{id}")}});
        let _ = self.events.send(event.to_string());
    }
}

fn instance(id: &str, tags: Vec<String>, status: InstanceStatus) -> Instance {
    serde_json::from_value(json!({"id": id, "name": id, "type": "container", "tags": tags,
        "status_code": status.code(), "status": status.as_str()}))
    .expect("valid")
}

fn sync(metadata: Value) -> Json<Value> {
    Json(json!({"type": "sync", "status": "Success", "status_code": 200, "operation": "", "error_code": 0,
        "error": "", "metadata": metadata}))
}

fn operation(code: u16, err: &str, instance: Option<&str>) -> Value {
    let resources = instance.map_or(json!({}), |id| json!({"instances": [format!("/1.0/instances/{id}")]}));
    json!({"id": "o1", "class": "task", "description": "Creating instance", "created_at": null, "updated_at": null,
        "status": "", "status_code": code, "resources": resources, "err": err})
}

fn accepted(operation: &Value) -> (StatusCode, Json<Value>) {
    let body = json!({"type": "async", "status": "Operation created", "status_code": 100,
        "operation": "/1.0/operations/o1", "error_code": 0, "error": "", "metadata": operation});
    (StatusCode::ACCEPTED, Json(body))
}

async fn list(State(ams): State<Arc<Shared>>) -> Json<Value> {
    let instances: Vec<Instance> = ams.inner.lock().expect("whole").instances.values().cloned().collect();
    sync(json!(instances))
}

async fn launch(
    State(ams): State<Arc<Shared>>,
    headers: HeaderMap,
    Json(post): Json<InstancesPost>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let key = headers["idempotency-key"].to_str().expect("text").to_owned();
    let mut inner = ams.inner.lock().expect("whole");
    if let Some((status, text)) = inner.refuse.clone() {
        let status = StatusCode::from_u16(status).expect("a status");
        return Err(ApiError::new(status, "refused", text));
    }
    if let Some(text) = inner.fail.clone() {
        return Ok(accepted(&operation(400, &text, Some("never"))));
    }
    inner.launches.push((key.clone(), post.clone()));
    let next = format!("i{}", inner.instances.len() + 1);
    let id = inner.keys.entry(key).or_insert(next).clone();
    inner.instances.entry(id.clone()).or_insert_with(|| instance(&id, post.tags, InstanceStatus::Created));
    if inner.lose_answers > 0 {
        inner.lose_answers -= 1;
        return Err(ApiError::unavailable("lost", "the answer was lost"));
    }
    drop(inner);
    ams.tell(&id);
    Ok(accepted(&operation(200, "", Some(&id))))
}

async fn remove(
    State(ams): State<Arc<Shared>>,
    Segment(id): Segment<String>,
    Json(body): Json<Value>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let mut inner = ams.inner.lock().expect("whole");
    inner.deletions.push((id.clone(), body["force"] == true));
    if !inner.instances.contains_key(&id) {
        return Err(ApiError::not_found("not-found", "instance not found"));
    }
    if !inner.keep_deleted {
        inner.instances.remove(&id);
    }
    drop(inner);
    ams.tell(&id);
    Ok(accepted(&operation(103, "", Some(&id))))
}

async fn wait(Segment(_): Segment<String>, Query(_): Query<BTreeMap<String, String>>) -> Json<Value> {
    sync(operation(200, "", None))
}

async fn events(State(ams): State<Arc<Shared>>, upgrade: WebSocketUpgrade) -> Response {
    let mut events = ams.events.subscribe();
    upgrade.on_upgrade(async move |mut socket| {
        while let Ok(event) = events.recv().await {
            if event.is_empty() || socket.send(AxumMessage::Text(event.into())).await.is_err() {
                return;
            }
        }
    })
}

/// An agent with everything around it.
pub struct World {
    pub folder: tempfile::TempDir,
    pub bus: Bus,
    pub ams: Ams,
    pub agent: Option<Running>,
    agents: Subscription,
    sessions: Subscription,
}

impl World {
    /// A running agent that has told the gateways what it has.
    pub async fn new() -> Self {
        let mut world = Self::without_agent().await;
        world.start_agent().await;
        world.until_agent(|report| report.ams_reachable && !report.applications.is_empty()).await;
        world
    }

    pub async fn without_agent() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let bus = Bus::local();
        let ams = Ams::start(&folder.path().join("ams.sock"));
        let client = KeyFiles::in_folder(folder.path(), "ams-client");
        tls::install_provider();
        tls::ensure_self_signed(&client, "ams", &["ams".into()]).expect("made");
        tls::ensure_self_signed(&KeyFiles::in_folder(folder.path(), "stranger"), "x", &["x".into()])
            .expect("made");
        Self {
            agents: bus.subscribe("agents.report").await.expect("subscribed"),
            sessions: bus.subscribe("sessions.report").await.expect("subscribed"),
            folder,
            bus,
            ams,
            agent: None,
        }
    }

    pub async fn start_agent(&mut self) {
        self.start_agent_with(|_| {}).await;
    }

    pub async fn start_agent_with(&mut self, change: impl FnOnce(&mut Config)) {
        let path = |name: &str| self.folder.path().join(name);
        let mut config = Config {
            id: "agent.1".into(),
            region: "here".into(),
            listen: "127.0.0.1:0".parse().expect("valid"),
            token_key: path("token.key"),
            ..Config::default()
        };
        config.tls.certificate = path("agent.crt");
        config.tls.key = path("agent.key");
        config.clients.certificates = vec![path("ams-client.crt")];
        config.ams.socket = self.ams.path.clone();
        change(&mut config);
        let parts = Parts { bus: Some(self.bus.clone()), ..Parts::default() };
        self.agent = Some(fanlight_agent::start(config, parts).await.expect("started"));
    }

    /// Waits for a report of the agent that is as wanted.
    pub async fn until_agent(&mut self, wanted: impl Fn(&AgentReport) -> bool) -> AgentReport {
        let found = async {
            loop {
                let message = self.agents.next().await.expect("the bus lives");
                let report: AgentReport = message.json().expect("a report");
                if wanted(&report) {
                    return report;
                }
            }
        };
        tokio::time::timeout(PATIENCE, found).await.expect("the report comes")
    }

    /// Waits for a report of a session that is as wanted.
    pub async fn until_session(
        &mut self,
        session: &SessionId,
        wanted: impl Fn(&SessionReport) -> bool,
    ) -> SessionReport {
        let found = async {
            loop {
                let report = self.report().await;
                let of_session = report.sessions.into_iter().find(|report| report.session_id == *session);
                if let Some(report) = of_session.filter(|report| wanted(report)) {
                    return report;
                }
            }
        };
        tokio::time::timeout(PATIENCE, found).await.expect("the report comes")
    }

    pub async fn until_state(&mut self, session: &SessionId, state: InstanceState) -> SessionReport {
        self.until_session(session, |report| report.state == state).await
    }

    /// The next report of sessions.
    pub async fn report(&mut self) -> SessionsReport {
        let message = tokio::time::timeout(PATIENCE, self.sessions.next()).await.expect("reports come");
        message.expect("the bus lives").json().expect("a report")
    }

    /// Asks the agent as a gateway does.
    pub async fn ask(&self, request: &AgentRequest) -> AgentResponse {
        self.bus.request_json("agents.agent~1.requests", request, PATIENCE).await.expect("answered")
    }

    pub fn address(&self) -> String {
        format!("https://{}", self.agent.as_ref().expect("an agent").address)
    }

    /// The agent's API, with or without a certificate from the folder.
    pub fn endpoint(&self, name: Option<&str>) -> Endpoint {
        let fingerprint = tls::fingerprint_of_file(&self.folder.path().join("agent.crt")).expect("there");
        let identity = name.map(|name| {
            let files = KeyFiles::in_folder(self.folder.path(), name);
            Identity { certificate: files.certificate, key: files.key }
        });
        Endpoint::http(&self.address(), &Trust::Pinned(fingerprint), identity.as_ref()).expect("valid")
    }

    /// What the launch of a session handed to its instance.
    pub async fn streaming(&self, session: &SessionId) -> Streaming {
        let found = async {
            loop {
                let streaming = self
                    .ams
                    .inner()
                    .launches
                    .iter()
                    .filter_map(|(_, post)| post.streaming.clone())
                    .find(|streaming| streaming.session_id == *session);
                match streaming {
                    Some(streaming) => return streaming,
                    None => tokio::time::sleep(Duration::from_millis(10)).await,
                }
            }
        };
        tokio::time::timeout(PATIENCE, found).await.expect("the launch comes")
    }
}

/// A streamer.
pub struct Streamer {
    pub socket: WebSocket,
}

impl Streamer {
    /// Connects as the instance that was given `streaming`, and says hello.
    pub async fn connect(streaming: &Streaming, instance: &str) -> Self {
        let (base, path) =
            streaming.agent_url.split_at(streaming.agent_url.find("/internal").expect("a path"));
        let url = base.replace("wss://", "https://");
        let endpoint =
            Endpoint::http(&url, &Trust::Pinned(streaming.fingerprint.clone()), None).expect("an address");
        let socket = endpoint.websocket(path, bearer(streaming.token.expose())).await.expect("let in");
        let mut streamer = Self { socket };
        streamer
            .send(&ToAgent::Hello {
                version: 1,
                session_id: streaming.session_id.clone(),
                instance_id: instance.parse().expect("valid"),
            })
            .await;
        // As streamers do; one that was turned away may fail here.
        let status = serde_json::to_string(&ToAgent::Status(StreamerStatus::default())).expect("written");
        let _ = streamer.socket.send(Message::Text(status.into())).await;
        streamer
    }

    pub async fn send(&mut self, message: &ToAgent) {
        self.send_text(serde_json::to_string(message).expect("written")).await;
    }

    pub async fn send_text(&mut self, text: String) {
        self.socket.send(Message::Text(text.into())).await.expect("sent");
    }

    /// The next message; `None` when the agent closes.
    pub async fn next(&mut self) -> Option<ToStreamer> {
        let next = async {
            loop {
                match self.socket.next().await {
                    Some(Ok(Message::Text(text))) => {
                        return Some(serde_json::from_str(&text).expect("known"));
                    }
                    Some(Ok(Message::Close(_)) | Err(_)) | None => return None,
                    Some(Ok(_)) => {}
                }
            }
        };
        tokio::time::timeout(PATIENCE, next).await.expect("something comes")
    }
}

pub fn bearer(token: &str) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(AUTHORIZATION, format!("Bearer {token}").parse().expect("valid"));
    headers
}
