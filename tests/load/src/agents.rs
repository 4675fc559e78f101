//! Simulated agents and the instances behind them: the agent's side of the bus, and the instance's end of every
//! session's link. What a client sends, its instance sends back.
//!
//! They keep the times of real ones: reports of the agent every 2 s, of all its sessions every 5 s, of changes 10 ms
//! after the first of them. An instance is launching, starting and running within 300 ms.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result};
use fanlight_api::{
    AgentId, InstanceId, PROTOCOL_VERSION, SessionId,
    agent_link::{ClientState, ClientStatus},
    bus::{
        AgentReport, AgentRequest, AgentResponse, InstanceState, SessionReport, SessionsReport,
        agent_requests, agents_report, session_down, sessions_report,
    },
    link::{Frame, Link, Packet, PacketKind, Side, hello},
};
use fanlight_bus::{Bus, BusConfig, Serving};
use serde_json::json;
use tokio::{sync::Notify, task::JoinSet};

use crate::sockets::turned;

/// The application that all of them have.
pub const APPLICATION: &str = "terminal";
const REPORT_EVERY: Duration = Duration::from_secs(2);
const REPORT_SESSIONS_EVERY: Duration = Duration::from_secs(5);
const REPORT_PAUSE: Duration = Duration::from_millis(10);
const SESSIONS_PER_REPORT: usize = 200;
const LAUNCH: Duration = Duration::from_millis(100);
const START: Duration = Duration::from_millis(200);
const STOP: Duration = Duration::from_millis(50);
/// How long a session is known that is gone.
const GONE: Duration = Duration::from_secs(1);
/// How often links are looked at for packets to be sent again.
const RETRY: Duration = Duration::from_millis(100);

/// All agents and instances. Dropping it ends them.
pub struct Agents {
    agents: Vec<Arc<Agent>>,
    instances: Arc<Instances>,
    _serving: Vec<Serving>,
    _tasks: JoinSet<()>,
}

struct Agent {
    id: AgentId,
    cluster_id: String,
    bus: Bus,
    table: Mutex<Table>,
    changed: Notify,
    instances: Arc<Instances>,
}

#[derive(Default)]
struct Table {
    sessions: HashMap<SessionId, Held>,
    changed: BTreeSet<SessionId>,
}

struct Held {
    state: InstanceState,
    instance_id: Option<InstanceId>,
    client: Option<ClientStatus>,
}

impl Agents {
    /// Starts so many agents, each with a cluster and a connection of its own.
    ///
    /// # Errors
    /// The bus is not there.
    pub async fn start(bus: &BusConfig, count: usize) -> Result<Self> {
        let mut tasks = JoinSet::new();
        let instances = Arc::new(Instances {
            bus: connect(bus).await?,
            table: Mutex::default(),
            echoed: AtomicU64::new(0),
        });
        // One subscription for all instances saves the generator's time; each real streamer is one of its agent's.
        let mut packets = instances.bus.subscribe("sessions.*.up").await?;
        let worker = instances.clone();
        tasks.spawn(async move {
            let mut retry = tokio::time::interval(RETRY);
            loop {
                tokio::select! {
                    message = packets.next() => match message {
                        Some(message) => {
                            if let Ok(packet) = message.json::<Packet>() {
                                worker.take(packet);
                            }
                        }
                        None => return,
                    },
                    _ = retry.tick() => worker.send_again(),
                }
            }
        });
        let mut agents = Vec::new();
        let mut serving = Vec::new();
        for number in 0..count {
            let agent = Arc::new(Agent {
                id: format!("agent{number}").parse()?,
                cluster_id: format!("cluster{number}"),
                bus: connect(bus).await?,
                table: Mutex::default(),
                changed: Notify::new(),
                instances: instances.clone(),
            });
            let server = agent.clone();
            let handler = move |request| {
                let agent = server.clone();
                async move { agent.answer(request) }
            };
            serving.push(agent.bus.serve_json(&agent_requests(&agent.id), "agent", handler).await?);
            // Agents do not start together, so their reports are spread over time.
            let offset = number as f64 / count as f64;
            tasks.spawn(agent.clone().report(offset));
            agents.push(agent);
        }
        Ok(Self { agents, instances, _serving: serving, _tasks: tasks })
    }

    /// Sessions that an instance runs for.
    pub fn running(&self) -> usize {
        self.instances.table().len()
    }

    /// Sessions that any agent still knows.
    pub fn known(&self) -> usize {
        self.agents.iter().map(|agent| agent.table().sessions.len()).sum()
    }

    /// Text frames that instances sent back.
    pub fn echoed(&self) -> u64 {
        self.instances.echoed.load(Ordering::Relaxed)
    }
}

/// A connection that is there.
///
/// # Errors
/// It does not come to be.
pub async fn connect(config: &BusConfig) -> Result<Bus> {
    let bus = Bus::connect(config).await?;
    let mut connected = bus.connected();
    let waiting = connected.wait_for(|connected| *connected);
    tokio::time::timeout(Duration::from_secs(10), waiting).await.context("nats-server does not answer")??;
    Ok(bus)
}

impl Agent {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answer(self: Arc<Self>, request: AgentRequest) -> AgentResponse {
        let accepted = AgentResponse::Accepted { stun_servers: Vec::new() };
        match request {
            AgentRequest::Accept(launch) => {
                let id = launch.session_id;
                let held = Held { state: InstanceState::Launching, instance_id: None, client: None };
                if self.table().sessions.contains_key(&id) {
                    return accepted;
                }
                self.table().sessions.insert(id.clone(), held);
                self.tell(&id);
                tokio::spawn(self.launch(id));
                accepted
            }
            AgentRequest::Credentials { .. } => accepted,
            AgentRequest::End { session_id, .. } => {
                let known = self.set(&session_id, InstanceState::Ending);
                if !known {
                    return AgentResponse::Ending { state: InstanceState::Gone };
                }
                tokio::spawn(self.end(session_id));
                AgentResponse::Ending { state: InstanceState::Ending }
            }
        }
    }

    async fn launch(self: Arc<Self>, id: SessionId) {
        tokio::time::sleep(LAUNCH).await;
        if let Some(held) = self.table().sessions.get_mut(&id) {
            held.instance_id = Some(InstanceId::generate());
        }
        if !self.advance(&id, InstanceState::Launching, InstanceState::Starting) {
            return;
        }
        tokio::time::sleep(START).await;
        if self.advance(&id, InstanceState::Starting, InstanceState::Running) {
            self.instances.start(&id, &self);
        }
    }

    async fn end(self: Arc<Self>, id: SessionId) {
        tokio::time::sleep(STOP).await;
        self.instances.stop(&id);
        if self.advance(&id, InstanceState::Ending, InstanceState::Gone) {
            // Told by the next report of changes; a gateway that did not hear it asks again for the end.
            tokio::time::sleep(GONE).await;
            self.table().sessions.remove(&id);
        }
    }

    /// Sets a state unless the session is past it. Returns whether the session is known.
    fn set(&self, id: &SessionId, state: InstanceState) -> bool {
        match self.table().sessions.get_mut(id) {
            Some(held) if held.state == InstanceState::Gone => return true,
            Some(held) => held.state = state,
            None => return false,
        }
        self.tell(id);
        true
    }

    fn advance(&self, id: &SessionId, from: InstanceState, to: InstanceState) -> bool {
        let moved = match self.table().sessions.get_mut(id) {
            Some(held) if held.state == from => {
                held.state = to;
                true
            }
            _ => false,
        };
        if moved {
            self.tell(id);
        }
        moved
    }

    fn client(&self, id: &SessionId, generation: u64) {
        if let Some(held) = self.table().sessions.get_mut(id) {
            held.client = Some(ClientStatus { generation, state: ClientState::Streaming });
        }
        self.tell(id);
    }

    fn tell(&self, id: &SessionId) {
        self.table().changed.insert(id.clone());
        self.changed.notify_one();
    }

    async fn report(self: Arc<Self>, offset: f64) {
        let now = tokio::time::Instant::now();
        let spread = |period: Duration| tokio::time::interval_at(now + period.mul_f64(offset), period);
        self.report_itself();
        let mut itself = spread(REPORT_EVERY);
        let mut sessions = spread(REPORT_SESSIONS_EVERY);
        let mut series = 0;
        loop {
            tokio::select! {
                _ = itself.tick() => self.report_itself(),
                _ = sessions.tick() => {
                    let all: Vec<SessionReport> =
                        self.table().sessions.iter().map(|(id, held)| held.report(id)).collect();
                    series += 1;
                    let mut parts: Vec<&[SessionReport]> = all.chunks(SESSIONS_PER_REPORT).collect();
                    if parts.is_empty() {
                        parts.push(&[]);
                    }
                    for (part, sessions) in parts.iter().enumerate() {
                        self.publish(sessions.to_vec(), Some((series, part as u32, parts.len() as u32)));
                    }
                }
                () = self.changed.notified() => {
                    tokio::time::sleep(REPORT_PAUSE).await;
                    let changed: Vec<SessionReport> = {
                        let mut table = self.table();
                        let changed = std::mem::take(&mut table.changed);
                        changed.iter().filter_map(|id| Some(table.sessions.get(id)?.report(id))).collect()
                    };
                    for part in changed.chunks(SESSIONS_PER_REPORT) {
                        self.publish(part.to_vec(), None);
                    }
                }
            }
        }
    }

    fn report_itself(&self) {
        let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        // As text, so that new optional fields of the report need nothing here.
        let report = json!({
            "version": PROTOCOL_VERSION,
            "agent_id": self.id,
            "incarnation": "load",
            "region": "here",
            "cluster_id": self.cluster_id,
            "sent_ms": since_epoch.as_millis() as u64,
            "applications": [{ "name": APPLICATION, "versions": [0], "published": 0 }],
            "capacity": { "instances": self.table().sessions.len(), "free_cpus": 64.0 },
            "ams_reachable": true,
        });
        debug_assert!(serde_json::from_value::<AgentReport>(report.clone()).is_ok());
        self.bus.publish_json(&agents_report(), &report);
    }

    /// `numbers`: series, part and parts of a report of everything.
    fn publish(&self, sessions: Vec<SessionReport>, numbers: Option<(u64, u32, u32)>) {
        let (series, part, parts) = numbers.unwrap_or((0, 0, 1));
        let report = SessionsReport {
            version: PROTOCOL_VERSION,
            agent_id: self.id.clone(),
            cluster_id: self.cluster_id.clone(),
            complete: numbers.is_some(),
            series,
            part,
            parts,
            sessions,
        };
        self.bus.publish_json(&sessions_report(), &report);
    }
}

impl Held {
    fn report(&self, id: &SessionId) -> SessionReport {
        SessionReport {
            session_id: id.clone(),
            instance_id: self.instance_id.clone(),
            state: self.state,
            message: None,
            streamer_connected: self.state == InstanceState::Running,
            client: self.client.clone(),
            idle_since: None,
            steps: Vec::new(),
        }
    }
}

/// The instances' ends of the links.
struct Instances {
    bus: Bus,
    table: Mutex<HashMap<SessionId, Instance>>,
    echoed: AtomicU64,
}

struct Instance {
    agent: Arc<Agent>,
    subject: String,
    /// By generation.
    links: BTreeMap<u64, Link>,
}

impl Instances {
    fn table(&self) -> MutexGuard<'_, HashMap<SessionId, Instance>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start(&self, id: &SessionId, agent: &Arc<Agent>) {
        let subject = session_down(id);
        // What waits for the instance comes at once.
        self.bus.publish_json(&subject, &hello(id.clone()));
        self.table().insert(id.clone(), Instance { agent: agent.clone(), subject, links: BTreeMap::new() });
    }

    fn stop(&self, id: &SessionId) {
        self.table().remove(id);
    }

    fn take(&self, packet: Packet) {
        let (id, generation) = (packet.session_id.clone(), packet.generation);
        let mut served = None;
        {
            let mut table = self.table();
            let Some(instance) = table.get_mut(&id) else { return };
            let known = instance.links.contains_key(&generation);
            if !known && !matches!(packet.kind, PacketKind::Data { .. }) {
                return;
            }
            let new = || Link::new(id.clone(), generation, Side::Instance);
            let link = instance.links.entry(generation).or_insert_with(new);
            link.receive(packet);
            let mut replaced = false;
            let mut closed = false;
            while let Some(frame) = link.poll_frame() {
                match frame {
                    Frame::Open { .. } => served = Some(instance.agent.clone()),
                    Frame::Text { text } => {
                        replaced = true;
                        self.echoed.fetch_add(1, Ordering::Relaxed);
                        // A link that is full ends its client, which the generator would see.
                        let _ = link.send(Frame::Text { text: turned(text) });
                    }
                    Frame::Closed => closed = true,
                }
            }
            if replaced {
                // The newest client that speaks takes over.
                for (_, older) in instance.links.range_mut(..generation) {
                    let _ = older.send(Frame::Closed);
                }
                instance.links.retain(|known, _| *known + 1 >= generation);
            }
            for link in instance.links.values_mut() {
                transmit(&self.bus, &instance.subject, link);
            }
            if closed {
                instance.links.remove(&generation);
            }
        }
        if let Some(agent) = served {
            agent.client(&id, generation);
        }
    }

    fn send_again(&self) {
        let now = Instant::now();
        for instance in self.table().values_mut() {
            for link in instance.links.values_mut() {
                if link.deadline().is_some_and(|deadline| deadline <= now) {
                    transmit(&self.bus, &instance.subject, link);
                }
            }
        }
    }
}

fn transmit(bus: &Bus, subject: &str, link: &mut Link) {
    while let Some(packet) = link.poll_transmit(Instant::now()) {
        bus.publish_json(subject, &packet);
    }
}
