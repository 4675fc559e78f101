//! A gateway on free ports, a caller, and a simulated agent with its streamers.

use std::{
    collections::{BTreeMap, HashMap},
    net::{SocketAddr, TcpListener},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use fanlight_api::{
    SessionId,
    bus::{
        AgentReport, AgentRequest, AgentResponse, Capacity, InstanceState, Launch, Needs,
        ReportedApplication, SessionReport, SessionsReport, agent_requests, agents_report, session_down,
        session_up, sessions_report,
    },
    gateway::{Application, StunServer},
    link::{Frame, Link, Packet, Side, hello},
};
use fanlight_bus::Bus;
use fanlight_gateway::{Config, Parts, Running};
use fanlight_store::{Embedded, Handle};
use reqwest::Method;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::JoinHandle;

/// A gateway with its surroundings.
pub struct Rig {
    pub running: Option<Running>,
    pub bus: Bus,
    pub store: Handle,
    pub agent: Agent,
    pub address: SocketAddr,
    pub page: SocketAddr,
    pub metrics: SocketAddr,
    pub token: String,
    pub folder: TempDir,
    config: Config,
    /// Trusts the gateway's certificate.
    pub client: reqwest::Client,
    /// Speaks on the internal socket.
    pub local: reqwest::Client,
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: reqwest::header::HeaderMap,
    pub body: Value,
}

impl Answer {
    #[track_caller]
    pub fn expect(self, status: u16) -> Value {
        assert_eq!(self.status, status, "{}", self.body);
        assert_eq!(self.body["status_code"], status, "{}", self.body);
        let kind = match status {
            202 => "async",
            200..300 => "sync",
            _ => "error",
        };
        assert_eq!(self.body["type"], kind, "{}", self.body);
        assert_eq!(self.body["status"], if status < 300 { "success" } else { "failed" }, "{}", self.body);
        self.body
    }

    /// An error whose text holds `part`.
    #[track_caller]
    pub fn refused(self, status: u16, part: &str) {
        let body = self.expect(status);
        let text = body["error"].as_str().expect("an error has a text");
        assert!(text.contains(part), "{part:?} is not in {text:?}");
        assert_eq!(body["metadata"]["request_id"].as_str().map(str::len), Some(20), "{body}");
    }
}

impl Rig {
    pub async fn new() -> Self {
        Self::with(|_| {}).await
    }

    pub async fn with(change: impl FnOnce(&mut Config)) -> Self {
        let folder = tempfile::tempdir().expect("folder");
        let bus = Bus::local();
        let store: Handle = Arc::new(Embedded::memory());
        let mut config = Config::default();
        config.tls.certificate = folder.path().join("gateway.crt");
        config.tls.key = folder.path().join("gateway.key");
        config.internal_socket = folder.path().join("gateway.sock");
        config.ui.path = folder.path().join("page");
        std::fs::create_dir_all(config.ui.path.join("assets")).expect("folder");
        std::fs::write(config.ui.path.join("index.html"), "<!doctype html><title>page</title>")
            .expect("file");
        std::fs::write(config.ui.path.join("assets/a.js"), "export {}").expect("file");
        change(&mut config);
        let agent = Agent::start(bus.clone(), "agent0", "here").await;
        let unset = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut rig = Self {
            running: None,
            bus,
            store,
            agent,
            address: unset,
            page: unset,
            metrics: unset,
            token: String::new(),
            client: reqwest_client(None),
            local: reqwest_client(None),
            config,
            folder,
        };
        rig.start().await;
        let created = rig.internal(Method::POST, "/1.0/accounts", Some(json!({ "name": "tests" }))).await;
        let created = created.expect(201);
        rig.token = created["metadata"]["token"].as_str().expect("a token").into();
        rig
    }

    /// Starts the gateway (again, on the same port).
    pub async fn start(&mut self) {
        let free = || TcpListener::bind("127.0.0.1:0").expect("a free port");
        let listener = match self.address.port() {
            0 => free(),
            _ => TcpListener::bind(self.address).expect("the port from before"),
        };
        let parts = Parts {
            bus: Some(self.bus.clone()),
            store: Some(self.store.clone()),
            listener: Some(listener),
            ui_listener: Some(free()),
            metrics_listener: Some(free()),
        };
        let running = fanlight_gateway::start(self.config.clone(), parts).await.expect("the gateway starts");
        self.address = running.public_address;
        self.page = running.ui_address.expect("a plain listener");
        self.metrics = running.metrics_address.expect("metrics");
        self.running = Some(running);
        let pem = std::fs::read(&self.config.tls.certificate).expect("certificate");
        self.client = reqwest_client(Some(&pem));
        self.local = reqwest::Client::builder()
            .unix_socket(self.config.internal_socket.as_path())
            .build()
            .expect("client");
    }

    pub async fn stop(&mut self) {
        if let Some(running) = self.running.take() {
            running.stop().await;
        }
    }

    pub fn url(&self, path: &str) -> String {
        format!("https://{}{path}", self.address)
    }

    /// With the token.
    pub async fn ask(&self, method: Method, path: &str, body: Option<Value>) -> Answer {
        let request = self.client.request(method, self.url(path));
        let request = request.header("authorization", format!("macaroon root={}", self.token));
        send(match body {
            Some(body) => request.body(body.to_string()),
            None => request,
        })
        .await
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.ask(Method::GET, path, None).await
    }

    pub async fn post(&self, path: &str, body: Value) -> Answer {
        self.ask(Method::POST, path, Some(body)).await
    }

    /// On the unix socket.
    pub async fn internal(&self, method: Method, path: &str, body: Option<Value>) -> Answer {
        let request = self.local.request(method, format!("http://gateway{path}"));
        send(match body {
            Some(body) => request.body(body.to_string()),
            None => request,
        })
        .await
    }

    /// A session of the application `terminal`, as created.
    pub async fn create(&self, more: Value) -> Value {
        let mut body = json!({ "app": "terminal", "joinable": true });
        for (key, value) in more.as_object().expect("an object") {
            body[key] = value.clone();
        }
        self.post("/1.0/sessions", body).await.expect(201)["metadata"].clone()
    }

    pub async fn status_of(&self, id: &str) -> Option<String> {
        let answer = self.get(&format!("/1.0/sessions/{id}")).await;
        match answer.status {
            404 => None,
            _ => Some(answer.expect(200)["metadata"]["status"].as_str().expect("a status").into()),
        }
    }

    /// Waits until a session has a status; `None`: until it is gone.
    #[track_caller]
    pub fn until_status<'a>(&'a self, id: &'a str, want: Option<&'a str>) -> impl Future<Output = ()> + 'a {
        eventually(move || async move { self.status_of(id).await.as_deref() == want })
    }
}

fn reqwest_client(pem: Option<&[u8]>) -> reqwest::Client {
    fanlight_service::tls::install_provider();
    let trusted = pem.map(|pem| reqwest::Certificate::from_pem(pem).expect("PEM"));
    reqwest::Client::builder()
        .tls_certs_only(trusted)
        .redirect(reqwest::redirect::Policy::none())
        .timeout(Duration::from_secs(60))
        .build()
        .expect("client")
}

pub async fn send(request: reqwest::RequestBuilder) -> Answer {
    let response = request.send().await.expect("an answer");
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    let text = response.text().await.expect("a body");
    let body = serde_json::from_str(&text).unwrap_or(Value::String(text));
    Answer { status, headers, body }
}

/// Waits until a condition holds.
#[track_caller]
pub fn eventually<F, C>(condition: C) -> impl Future<Output = ()>
where
    C: Fn() -> F,
    F: Future<Output = bool>,
{
    let place = std::panic::Location::caller();
    async move {
        let give_up = Instant::now() + Duration::from_secs(60);
        while !condition().await {
            assert!(Instant::now() < give_up, "waited in vain at {place}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// A simulated agent; dropping it ends it.
pub struct Agent {
    pub id: &'static str,
    bus: Bus,
    state: Arc<Mutex<State>>,
    /// Answers nothing and reports nothing.
    pub silent: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct State {
    region: &'static str,
    location: Option<(f64, f64)>,
    instances: BTreeMap<SessionId, Instance>,
    /// Launches as accepted, in order.
    accepted: Vec<Launch>,
    ended: Vec<SessionId>,
    refuse: Option<(String, String)>,
    /// Accepts without an answer, so many times.
    swallow: u32,
    /// Instances stay in this state when they are told to end.
    stuck: Option<InstanceState>,
}

#[derive(Clone)]
struct Instance {
    state: InstanceState,
    message: Option<String>,
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Agent {
    pub async fn start(bus: Bus, id: &'static str, region: &'static str) -> Self {
        Self::start_at(bus, id, region, None).await
    }

    pub async fn start_at(
        bus: Bus,
        id: &'static str,
        region: &'static str,
        location: Option<(f64, f64)>,
    ) -> Self {
        let state = Arc::new(Mutex::new(State { region, location, ..State::default() }));
        let silent = Arc::new(AtomicBool::new(false));
        let mut agent =
            Self { id, bus: bus.clone(), state: state.clone(), silent: silent.clone(), tasks: vec![] };
        let subject = agent_requests(&id.parse().expect("id"));
        let mut requests = bus.subscribe(&subject).await.expect("subscribes");
        let (state, quiet) = (state.clone(), silent.clone());
        agent.tasks.push(tokio::spawn(async move {
            while let Some(message) = requests.next().await {
                if quiet.load(Ordering::SeqCst) {
                    continue;
                }
                let request: AgentRequest = message.json().expect("a request");
                if let Some(answer) = state.lock().expect("lock").answer(request) {
                    message.respond_json(&answer);
                }
            }
        }));
        let reporter = agent.reporter();
        agent.tasks.push(tokio::spawn(async move {
            loop {
                reporter();
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }));
        agent
    }

    /// Publishes both reports once.
    fn reporter(&self) -> impl Fn() + Send + 'static {
        let (bus, state, silent, id) = (self.bus.clone(), self.state.clone(), self.silent.clone(), self.id);
        move || {
            if silent.load(Ordering::SeqCst) {
                return;
            }
            let state = state.lock().expect("lock");
            let application = |name: &str| ReportedApplication {
                application: Application {
                    name: name.into(),
                    title: name.to_uppercase(),
                    ..Default::default()
                },
                versions: vec![0, 1],
                published: Some(1),
                needs: Needs::default(),
            };
            let cluster_id = format!("cluster-{id}");
            bus.publish_json(
                &agents_report(),
                &AgentReport {
                    version: 1,
                    agent_id: id.parse().expect("id"),
                    incarnation: "1".into(),
                    region: state.region.into(),
                    cluster_id: cluster_id.clone(),
                    sent_ms: 0,
                    location: state.location,
                    stun_urls: vec![format!("stun:{}.example:3478", state.region)],
                    applications: vec![application("terminal"), application("paint")],
                    capacity: Capacity::default(),
                    ams_reachable: true,
                    leaving: false,
                },
            );
            let report = |(session_id, instance): (&SessionId, &Instance)| SessionReport {
                session_id: session_id.clone(),
                instance_id: Some(format!("i-{session_id}").parse().expect("id")),
                state: instance.state,
                message: instance.message.clone(),
                streamer_connected: false,
                client: None,
                idle_since: None,
                steps: vec![],
            };
            bus.publish_json(
                &sessions_report(),
                &SessionsReport {
                    version: 1,
                    agent_id: id.parse().expect("id"),
                    cluster_id,
                    complete: true,
                    series: 0,
                    part: 0,
                    parts: 1,
                    sessions: state.instances.iter().map(report).collect(),
                },
            );
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("lock")
    }

    /// Sets the state of a session's instance.
    pub fn set(&self, id: &str, state: InstanceState, message: &str) {
        let message = (!message.is_empty()).then(|| message.to_owned());
        self.lock().instances.insert(id.parse().expect("id"), Instance { state, message });
    }

    pub fn remove(&self, id: &str) {
        self.lock().instances.remove(&id.parse().expect("id"));
    }

    pub fn refuse(&self, code: &str, message: &str) {
        self.lock().refuse = Some((code.into(), message.into()));
    }

    /// Launches so many times without saying so.
    pub fn swallow(&self, times: u32) {
        self.lock().swallow = times;
    }

    /// Keeps instances in a state when they are told to end; none: they go.
    pub fn stick(&self, state: Option<InstanceState>) {
        self.lock().stuck = state;
    }

    pub fn accepted(&self) -> Vec<Launch> {
        self.lock().accepted.clone()
    }

    pub fn instances(&self) -> Vec<String> {
        self.lock().instances.keys().map(ToString::to_string).collect()
    }

    pub fn ended(&self, id: &str) -> usize {
        self.lock().ended.iter().filter(|ended| ended.as_str() == id).count()
    }
}

impl State {
    fn answer(&mut self, request: AgentRequest) -> Option<AgentResponse> {
        let accepted = || AgentResponse::Accepted {
            stun_servers: vec![StunServer { urls: vec!["stun:127.0.0.1:5349".into()], ..Default::default() }],
        };
        match request {
            AgentRequest::Accept(launch) => {
                if let Some((code, message)) = self.refuse.clone() {
                    return Some(AgentResponse::Refused { code, message });
                }
                let instance = Instance { state: InstanceState::Launching, message: None };
                self.instances.entry(launch.session_id.clone()).or_insert(instance);
                self.accepted.push(launch);
                if self.swallow > 0 {
                    self.swallow -= 1;
                    return None;
                }
                Some(accepted())
            }
            AgentRequest::Credentials { .. } => Some(accepted()),
            AgentRequest::End { session_id, .. } => {
                self.ended.push(session_id.clone());
                if let Some(state) = self.stuck
                    && let Some(instance) = self.instances.get_mut(&session_id)
                {
                    instance.state = state;
                    return Some(AgentResponse::Ending { state });
                }
                self.instances.remove(&session_id);
                Some(AgentResponse::Ending { state: InstanceState::Gone })
            }
        }
    }
}

/// A simulated streamer of one session: answers every text with `echo:TEXT`, over a path that loses one
/// packet of `loses` in each direction (0: none).
pub struct Streamer {
    task: JoinHandle<()>,
    state: Arc<Mutex<StreamerState>>,
}

#[derive(Default)]
struct StreamerState {
    opened: Vec<(u64, Frame)>,
    texts: Vec<String>,
    closed: Vec<u64>,
}

impl Drop for Streamer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Streamer {
    pub async fn start(bus: &Bus, id: &str, loses: u64) -> Self {
        let session: SessionId = id.parse().expect("id");
        let mut packets = bus.subscribe(&session_up(&session)).await.expect("subscribes");
        let state = Arc::new(Mutex::new(StreamerState::default()));
        let (bus, kept) = (bus.clone(), state.clone());
        let task = tokio::spawn(async move {
            let down = session_down(&session);
            let mut links: HashMap<u64, Link> = HashMap::new();
            // A fixed seed: every run loses alike, but no two rounds do.
            let mut random = 0x9e37_79b9_7f4a_7c15_u64;
            let mut lost = move || {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                loses > 0 && random.is_multiple_of(loses)
            };
            bus.publish_json(&down, &hello(session.clone()));
            loop {
                let tick = tokio::time::sleep(Duration::from_millis(20));
                tokio::select! {
                    packet = packets.next() => {
                        let packet: Packet = packet.expect("the bus lives").json().expect("a packet");
                        if lost() {
                            continue;
                        }
                        let link = links
                            .entry(packet.generation)
                            .or_insert_with(|| Link::new(session.clone(), packet.generation, Side::Instance));
                        link.receive(packet);
                    }
                    () = tick => {}
                }
                for (generation, link) in &mut links {
                    while let Some(frame) = link.poll_frame() {
                        let mut state = kept.lock().expect("lock");
                        match frame {
                            Frame::Text { text } if text == "bye" => {
                                link.send(Frame::Text { text: "echo:bye".into() }).expect("fits");
                                link.send(Frame::Closed).expect("fits");
                            }
                            Frame::Text { text } => {
                                link.send(Frame::Text { text: format!("echo:{text}") }).expect("fits");
                                state.texts.push(text);
                            }
                            Frame::Closed => state.closed.push(*generation),
                            open @ Frame::Open { .. } => state.opened.push((*generation, open)),
                        }
                    }
                    while let Some(packet) = link.poll_transmit(Instant::now()) {
                        if !lost() {
                            bus.publish_json(&down, &packet);
                        }
                    }
                }
            }
        });
        Self { task, state }
    }

    pub fn opened(&self) -> Vec<(u64, Frame)> {
        self.state.lock().expect("lock").opened.clone()
    }

    pub fn texts(&self) -> Vec<String> {
        self.state.lock().expect("lock").texts.clone()
    }

    pub fn closed(&self) -> Vec<u64> {
        self.state.lock().expect("lock").closed.clone()
    }
}

/// A file of a rig's folder.
pub fn exists(folder: &Path, name: &str) -> bool {
    folder.join(name).exists()
}

/// A token with one character of its signature changed.
pub fn spoilt(token: &str) -> String {
    let (start, end) = token.split_at(token.len() - 10);
    let other = if end.starts_with('A') { 'B' } else { 'A' };
    format!("{start}{other}{}", &end[1..])
}
