//! The simulated world: one queue of events, one clock, a network that loses, repeats and delays, and the processes.
//! Everything that happens follows from the seed.
//!
//! What the processes decide is decided by the real cores; the files beside this one do what the shells of the
//! programs do with the answers.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use fanlight_api::{
    InstanceId, SessionId,
    agent_link::{StreamerStatus, ToStreamer},
    bus::{AgentReport, AgentRequest, AgentResponse, GatewayRequest, GatewayResponse, SessionsReport},
    link::{Frame, Packet},
};

use crate::{
    agent::{Agent, AgentTimer},
    ams::{Ams, AmsTimer, Launched, Listing},
    check::Ledger,
    check::is_program,
    client::{Ask, Client, ClientTimer, Tell},
    engine::{Engine, StreamerTimer},
    gateway::{GatewayTimer, Unit},
    planted::Planted,
    rng::Rng,
    store::{Store, Watched},
};

/// Unix second at which every simulation begins.
const EPOCH: i64 = 1_800_000_000;
/// Places between which messages may be cut off.
const SITES: usize = 13;
const STORE_SITE: usize = 11;
const BUS_SITE: usize = 12;

/// Somebody who gets messages and timers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pid {
    /// A gateway unit.
    Gateway(usize),
    /// The agent of a cluster.
    Agent(usize),
    /// The AMS of a cluster.
    Ams(usize),
    /// A streamer of a cluster, by its number in this world.
    Streamer(usize, u64),
    /// A caller, who may be a client too.
    Client(usize),
    /// The one who makes faults and brings people.
    Fate,
}

impl Pid {
    fn site(self) -> usize {
        match self {
            Self::Gateway(unit) => unit,
            Self::Agent(cluster) => 4 + cluster,
            Self::Ams(cluster) => 6 + cluster,
            Self::Streamer(cluster, _) => 8 + cluster,
            Self::Client(_) | Self::Fate => 10,
        }
    }
}

/// What travels.
#[derive(Clone, Debug)]
pub enum Message {
    /// Bus: an agent about itself.
    AgentReport(Arc<AgentReport>),
    /// Bus: an agent about sessions.
    SessionsReport(Arc<SessionsReport>),
    /// Bus: the same, to all units, for what it lacks.
    Absence(Arc<SessionsReport>),
    /// Bus: a unit asks an agent.
    AskAgent(u64, Box<AgentRequest>),
    /// Bus: its answer.
    AgentSays(u64, Box<AgentResponse>),
    /// Bus: an agent asks any unit.
    AskGateway(u64, Box<GatewayRequest>),
    /// Bus: its answer.
    GatewaySays(u64, Box<GatewayResponse>),
    /// Bus: a packet from the client's side.
    Up(Box<Packet>),
    /// Bus: a packet from the instance's side.
    Down(Box<Packet>),
    /// Store: a record changed.
    Watch(Box<Watched>),
    /// HTTP: the agent reads AMS's list.
    List(u64),
    /// Its answer.
    Listed(u64, Arc<Listing>),
    /// HTTP: the agent launches.
    Launch(u64, Box<Launched>),
    /// Its answer: the instance and how its placement went, or a refusal.
    LaunchAnswer(u64, Result<(InstanceId, Result<(), String>), String>),
    /// HTTP: the agent removes an instance.
    Delete(u64, InstanceId, bool),
    /// Its answer.
    Deleted(u64),
    /// AMS tells that something about its instances changed.
    AmsEvent,
    /// HTTP: AMS wants a session from its agent.
    SessionPost(u64, InstanceId),
    /// Its answer; the failure says whether it may pass.
    SessionMade(u64, Result<SessionId, bool>),
    /// HTTP: AMS ends a session.
    SessionDelete(u64, SessionId),
    /// Its answer; the failure says whether it may pass.
    SessionDeleted(u64, Result<(), bool>),
    /// A streamer has reached its agent.
    StreamOpen(u64),
    /// On a streamer's connection, to the agent.
    ToAgent(u64, Box<StreamUp>),
    /// On a streamer's connection, to the streamer.
    ToStreamer(u64, Box<ToStreamer>),
    /// A streamer's connection is cut.
    StreamCut(u64),
    /// HTTP: a caller asks a unit.
    Ask(u64, Box<Ask>),
    /// Its answer.
    Tell(u64, Box<Tell>),
    /// On a client's socket, to the unit.
    SocketUp(u64, String),
    /// On a client's socket, to the client.
    SocketDown(u64, String),
    /// A client's socket is closed.
    SocketClosed(u64),
}

/// What a streamer says on its connection.
#[derive(Clone, Debug)]
pub enum StreamUp {
    /// A packet for the client's side.
    Link(Packet),
    /// Its state.
    Status(StreamerStatus),
}

/// A timer of somebody.
#[derive(Clone, Debug)]
pub enum Timer {
    /// Of a unit.
    Gateway(GatewayTimer),
    /// Of an agent.
    Agent(AgentTimer),
    /// Of an AMS.
    Ams(AmsTimer),
    /// Of a streamer, or of what surrounds it.
    Streamer(StreamerTimer),
    /// Of a client.
    Client(ClientTimer),
    /// Next fault.
    Fault,
    /// Next person.
    Person,
    /// A process comes back.
    Restart(Pid),
    /// A partition ends.
    Heal(usize, usize),
    /// A process that did nothing goes on.
    Thaw(Pid),
}

#[derive(Debug)]
enum Event {
    Message { from: Pid, to: Pid, life: u32, message: Message },
    Timer { of: Pid, life: u32, timer: Timer },
}

#[derive(Debug)]
struct Item {
    at: u64,
    number: u64,
    event: Event,
}

impl PartialEq for Item {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.number) == (other.at, other.number)
    }
}
impl Eq for Item {}
impl PartialOrd for Item {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Item {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

/// How bad the world is.
#[derive(Clone, Debug)]
pub struct Weather {
    /// Probability that a message is lost.
    pub loss: f64,
    /// Probability that a message on the bus comes twice.
    pub repeat: f64,
    /// Probability that a message is slow.
    pub slow: f64,
    /// How slow, milliseconds.
    pub slow_ms: u64,
    /// Probability that a write to the store is done and its answer lost.
    pub unknown: f64,
    /// Probability that a process dies right after a write.
    pub crash_at_write: f64,
    /// Probability that making or starting an instance fails.
    pub engine: f64,
}

impl Weather {
    /// Nothing goes wrong.
    pub const FAIR: Self = Self {
        loss: 0.0,
        repeat: 0.0,
        slow: 0.0,
        slow_ms: 0,
        unknown: 0.0,
        crash_at_write: 0.0,
        engine: 0.0,
    };
}

/// A process that can end and come back.
#[derive(Clone, Copy, Debug, Default)]
pub struct Process {
    /// It runs.
    pub up: bool,
    /// Counts its starts; what was meant for an earlier one is lost.
    pub life: u32,
    /// It does nothing until then.
    pub frozen_until: u64,
    /// How far its wall clock is off, seconds.
    pub clock_s: i64,
    /// For how long its next life does nothing at first.
    pub slow_start_ms: u64,
}

/// A websocket of a client.
#[derive(Clone, Debug)]
pub struct Socket {
    /// Who holds it.
    pub unit: usize,
    /// Whose.
    pub client: usize,
    /// Which life of the unit.
    pub life: u32,
    /// Nothing passes any more; the ends will notice.
    pub doomed: bool,
    up_at: u64,
    down_at: u64,
}

/// A websocket of a streamer.
#[derive(Clone, Debug)]
pub struct Connection {
    /// Cluster of both ends.
    pub cluster: usize,
    /// The streamer.
    pub streamer: u64,
    /// Its session.
    pub session: SessionId,
    /// Its instance.
    pub instance: InstanceId,
    /// Which life of the agent.
    pub life: u32,
    /// Nothing passes any more; the ends will notice.
    pub doomed: bool,
    up_at: u64,
    down_at: u64,
}

/// Everything.
pub struct World {
    /// The seed's numbers.
    pub rng: Rng,
    /// Milliseconds since the beginning.
    pub now: u64,
    base: Instant,
    queue: BinaryHeap<Reverse<Item>>,
    number: u64,
    /// Which bug is planted.
    pub planted: Option<Planted>,
    /// How bad it is now.
    pub weather: Weather,
    blocked: [[bool; SITES]; SITES],
    /// What waits for those that do nothing.
    held: [VecDeque<Event>; SITES],
    /// By [`Pid::site`].
    pub processes: [Process; SITES],
    /// Gateway units.
    pub units: Vec<Unit>,
    /// Agents.
    pub agents: Vec<Agent>,
    /// AMS.
    pub ams: Vec<Ams>,
    /// What runs.
    pub engines: Vec<Engine>,
    /// The gateways' store.
    pub store: Store,
    /// People.
    pub clients: Vec<Client>,
    /// Open sockets.
    pub sockets: BTreeMap<u64, Socket>,
    /// Streamers' connections.
    pub connections: BTreeMap<u64, Connection>,
    /// What is known from above, to judge by.
    pub ledger: Ledger,
    /// Nobody new comes and no fault is made.
    pub calm: bool,
    /// Agents know the names of their clusters from their configuration.
    pub named: bool,
    next_id: u64,
    /// Events that were no mere timers.
    pub events: u64,
    /// All events.
    pub steps: u64,
    violation: Option<String>,
    trace: Option<VecDeque<String>>,
    lines: usize,
}

/// Notes what happens; costs nothing unless somebody wants to read it.
#[macro_export]
macro_rules! note {
    ($world:expr, $($arg:tt)*) => {
        if $world.traces() {
            let line = format!($($arg)*);
            $world.note(line);
        }
    };
}

impl World {
    /// An empty world with so many gateway units and clusters.
    pub fn new(seed: u64, planted: Option<Planted>, lines: usize) -> Self {
        let mut rng = Rng::new(seed);
        let units = rng.between(2, 3) as usize;
        let clusters = if rng.chance(0.3) { 1 } else { 2 };
        let loss = [0.0, 0.01, 0.05, 0.15][rng.below(4) as usize];
        let repeat = [0.0, 0.02, 0.1][rng.below(3) as usize];
        let slow = [0.0, 0.02, 0.1, 0.2][rng.below(4) as usize];
        let weather = Weather {
            loss,
            repeat,
            slow,
            slow_ms: [50, 500, 3000][rng.below(3) as usize],
            unknown: [0.0, 0.01, 0.03][rng.below(3) as usize],
            crash_at_write: [0.0, 0.005, 0.01][rng.below(3) as usize],
            engine: [0.0, 0.02, 0.1][rng.below(3) as usize],
        };
        let mut world = Self {
            now: 0,
            base: Instant::now(),
            queue: BinaryHeap::with_capacity(256),
            number: 0,
            planted,
            weather,
            blocked: Default::default(),
            held: Default::default(),
            processes: Default::default(),
            units: (0..units).map(|_| Unit::default()).collect(),
            agents: (0..clusters).map(|_| Agent::new(String::new())).collect(),
            ams: (0..clusters).map(|_| Ams::new(&mut rng)).collect(),
            engines: (0..clusters).map(|_| Engine::default()).collect(),
            store: Store::default(),
            clients: Vec::new(),
            sockets: BTreeMap::new(),
            connections: BTreeMap::new(),
            ledger: Ledger::default(),
            calm: false,
            named: rng.chance(0.5),
            next_id: 0,
            events: 0,
            steps: 0,
            violation: None,
            trace: (lines > 0).then(VecDeque::new),
            lines,
            rng,
        };
        for pid in world.everybody() {
            world.start(pid);
        }
        world.timer_in(Pid::Fate, 1000, Timer::Fault);
        world.timer_in(Pid::Fate, 500, Timer::Person);
        world
    }

    /// All processes that can end and come back.
    pub fn everybody(&self) -> Vec<Pid> {
        let clusters = 0..self.agents.len();
        let units = (0..self.units.len()).map(Pid::Gateway);
        units.chain(clusters.clone().map(Pid::Agent)).chain(clusters.map(Pid::Ams)).collect()
    }

    // --- clocks ----------------------------------------------------------------------------------------

    /// The clock that never jumps.
    pub fn instant(&self) -> Instant {
        self.base + Duration::from_millis(self.now)
    }

    /// The wall clock of somebody, Unix seconds.
    pub fn wall(&self, pid: Pid) -> i64 {
        EPOCH + (self.now / 1000) as i64 + self.processes[pid.site()].clock_s
    }

    /// A number that was never given before.
    pub fn fresh(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    // --- telling and judging -----------------------------------------------------------------------------

    /// Whether somebody reads what happens.
    pub fn traces(&self) -> bool {
        self.trace.is_some()
    }

    /// Notes what happens.
    pub fn note(&mut self, line: String) {
        let now = self.now;
        if let Some(trace) = &mut self.trace {
            trace.push_back(format!("{:>9.3}  {line}", now as f64 / 1000.0));
            if trace.len() > self.lines {
                trace.pop_front();
            }
        }
    }

    /// An invariant does not hold. The first one counts.
    pub fn violate(&mut self, text: impl Into<String>) {
        if self.violation.is_none() {
            let text = text.into();
            note!(self, "VIOLATION {text}");
            self.violation = Some(text);
        }
    }

    /// The invariant that does not hold.
    pub fn violation(&self) -> Option<&str> {
        self.violation.as_deref()
    }

    /// The last lines of what happened.
    pub fn lines(&self) -> impl Iterator<Item = &String> {
        self.trace.iter().flatten()
    }

    /// Whether this bug is planted.
    pub fn has(&self, planted: Planted) -> bool {
        self.planted == Some(planted)
    }

    // --- processes -----------------------------------------------------------------------------------------

    /// The state of a process.
    pub fn process(&self, pid: Pid) -> Process {
        match pid {
            Pid::Streamer(..) | Pid::Client(_) | Pid::Fate => Process { up: true, ..Process::default() },
            _ => self.processes[pid.site()],
        }
    }

    /// A process begins.
    pub fn start(&mut self, pid: Pid) {
        let process = &mut self.processes[pid.site()];
        if process.up {
            return;
        }
        process.up = true;
        process.life += 1;
        process.frozen_until = 0;
        let slow = std::mem::take(&mut process.slow_start_ms);
        if slow > 0 {
            self.freeze(pid, slow);
        }
        note!(self, "{pid:?} starts");
        match pid {
            Pid::Gateway(unit) => self.gateway_start(unit),
            Pid::Agent(cluster) => self.agent_start(cluster),
            Pid::Ams(cluster) => self.ams_start(cluster),
            _ => {}
        }
    }

    /// A process dies with all it had in memory.
    pub fn crash(&mut self, pid: Pid) {
        let process = &mut self.processes[pid.site()];
        if !process.up {
            return;
        }
        process.up = false;
        note!(self, "{pid:?} dies");
        match pid {
            Pid::Gateway(unit) => {
                self.units[unit] = Unit::default();
                self.doom_sockets(unit, 1000);
            }
            Pid::Agent(cluster) => {
                self.agents[cluster] = Agent::new(String::new());
                self.doom_connections(cluster, 1000);
            }
            Pid::Ams(cluster) => self.ams[cluster].forget(),
            _ => {}
        }
        let back = 100 + self.rng.below(if self.rng.clone().chance(0.2) { 30_000 } else { 4000 });
        self.timer_in(Pid::Fate, back, Timer::Restart(pid));
    }

    /// Whether a process may go on after a write; under bad weather it may die there.
    pub fn survives_write(&mut self, pid: Pid) -> bool {
        let probability = self.weather.crash_at_write;
        if !self.calm && self.rng.chance(probability) {
            self.crash(pid);
            return false;
        }
        true
    }

    /// All sockets of a unit are cut; clients notice within this time.
    fn doom_sockets(&mut self, unit: usize, within_ms: u64) {
        let doomed: Vec<u64> = self
            .sockets
            .iter()
            .filter(|(_, socket)| socket.unit == unit && !socket.doomed)
            .map(|(number, _)| *number)
            .collect();
        for number in doomed {
            self.doom_socket(number, within_ms);
        }
    }

    /// A socket is cut; both ends notice.
    pub fn doom_socket(&mut self, number: u64, within_ms: u64) {
        let Some(socket) = self.sockets.get_mut(&number) else { return };
        socket.doomed = true;
        let (unit, client) = (socket.unit, socket.client);
        let to_client = 1 + self.rng.below(within_ms);
        let to_unit = 1 + self.rng.below(within_ms * 3);
        self.deliver(to_client, Pid::Fate, Pid::Client(client), Message::SocketClosed(number));
        self.deliver(to_unit, Pid::Fate, Pid::Gateway(unit), Message::SocketClosed(number));
    }

    fn doom_connections(&mut self, cluster: usize, within_ms: u64) {
        let doomed: Vec<u64> = self
            .connections
            .iter()
            .filter(|(_, connection)| connection.cluster == cluster && !connection.doomed)
            .map(|(number, _)| *number)
            .collect();
        for number in doomed {
            self.doom_connection(number, within_ms);
        }
    }

    /// A streamer's connection is cut; both ends notice.
    pub fn doom_connection(&mut self, number: u64, within_ms: u64) {
        let Some(connection) = self.connections.get_mut(&number) else { return };
        connection.doomed = true;
        let (cluster, streamer) = (connection.cluster, connection.streamer);
        let to_agent = 1 + self.rng.below(within_ms);
        let to_streamer = 1 + self.rng.below(within_ms);
        self.deliver(to_agent, Pid::Fate, Pid::Agent(cluster), Message::StreamCut(number));
        self.deliver(to_streamer, Pid::Fate, Pid::Streamer(cluster, streamer), Message::StreamCut(number));
    }

    // --- network -------------------------------------------------------------------------------------------

    /// Whether nothing passes between two places.
    pub fn is_blocked(&self, from: Pid, to: Pid) -> bool {
        self.blocked[from.site()][to.site()]
    }

    /// Whether a unit or agent has its bus.
    pub fn has_bus(&self, pid: Pid) -> bool {
        !self.blocked[pid.site()][BUS_SITE]
    }

    /// Whether a unit has its store.
    pub fn has_store(&self, unit: usize) -> bool {
        !self.blocked[unit][STORE_SITE]
    }

    /// Cuts two places off from each other, or joins them.
    pub fn block(&mut self, a: usize, b: usize, blocked: bool) {
        self.blocked[a][b] = blocked;
        self.blocked[b][a] = blocked;
        if !blocked {
            return;
        }
        // Connections through the cut are lost, and noticed late.
        for unit in 0..self.units.len() {
            if (a, b) == (unit, Pid::Fate.site()) {
                self.doom_sockets(unit, 20_000);
            }
            if (a, b) == (unit, STORE_SITE) {
                self.units[unit].watch_broken = true;
            }
        }
        for cluster in 0..self.agents.len() {
            if (a, b) == (Pid::Agent(cluster).site(), Pid::Streamer(cluster, 0).site()) {
                self.doom_connections(cluster, 20_000);
            }
        }
    }

    /// The pairs of places that can be cut off from each other.
    pub fn cuts(&self) -> Vec<(usize, usize)> {
        let mut cuts = Vec::new();
        for unit in 0..self.units.len() {
            cuts.extend([(unit, STORE_SITE), (unit, BUS_SITE), (unit, Pid::Fate.site())]);
            cuts.extend((0..self.agents.len()).map(|cluster| (unit, Pid::Agent(cluster).site())));
        }
        for cluster in 0..self.agents.len() {
            let agent = Pid::Agent(cluster).site();
            cuts.extend([
                (agent, BUS_SITE),
                (agent, Pid::Ams(cluster).site()),
                (agent, Pid::Streamer(cluster, 0).site()),
            ]);
        }
        cuts
    }

    /// The wall clock of somebody jumps.
    pub fn jump(&mut self, pid: Pid, seconds: i64) {
        self.processes[pid.site()].clock_s += seconds;
    }

    /// Somebody does nothing for a while.
    pub fn freeze(&mut self, pid: Pid, milliseconds: u64) {
        // Never shorter than before: what waits must stay in order.
        let process = &mut self.processes[pid.site()];
        process.frozen_until = process.frozen_until.max(self.now + milliseconds);
        self.timer_in(Pid::Fate, milliseconds, Timer::Thaw(pid));
    }

    /// Somebody who is about to start does nothing for a while.
    pub fn freeze_next(&mut self, pid: Pid, milliseconds: u64) {
        self.processes[pid.site()].slow_start_ms = milliseconds;
    }

    /// How long a message travels now.
    pub fn travel(&mut self) -> u64 {
        let usual = self.rng.between(1, 5);
        let slow = self.weather.slow;
        if slow > 0.0 && self.rng.chance(slow) { usual + self.rng.below(self.weather.slow_ms) } else { usual }
    }

    fn push(&mut self, delay: u64, event: Event) {
        self.number += 1;
        self.queue.push(Reverse(Item { at: self.now + delay, number: self.number, event }));
    }

    /// Delivers for certain, if the receiver still lives the same life.
    pub fn deliver(&mut self, delay: u64, from: Pid, to: Pid, message: Message) {
        let life = self.process(to).life;
        self.push(delay, Event::Message { from, to, life, message });
    }

    /// Sends over the bus: may be lost, repeated, late.
    pub fn publish(&mut self, from: Pid, to: Pid, message: Message) {
        if !self.has_bus(from) || !self.has_bus(to) || self.is_blocked(from, to) {
            return;
        }
        let (loss, repeat) = (self.weather.loss, self.weather.repeat);
        if loss > 0.0 && self.rng.chance(loss) {
            return;
        }
        if repeat > 0.0 && self.rng.chance(repeat) {
            let again = self.travel() + self.rng.below(300);
            self.deliver(again, from, to, message.clone());
        }
        let delay = self.travel();
        self.deliver(delay, from, to, message);
    }

    /// Sends a request or an answer over HTTP: may be lost or late, and comes once.
    pub fn http(&mut self, from: Pid, to: Pid, message: Message) {
        let loss = self.weather.loss;
        if self.is_blocked(from, to) || (loss > 0.0 && self.rng.chance(loss)) {
            return;
        }
        let delay = self.travel();
        self.deliver(delay, from, to, message);
    }

    /// Sends on a client's socket: in order, unless it is cut.
    pub fn on_socket(&mut self, number: u64, up: bool, text: String) {
        let delay = self.travel();
        let at = self.now + delay;
        let Some(socket) = self.sockets.get_mut(&number).filter(|socket| !socket.doomed) else { return };
        let (unit, client) = (Pid::Gateway(socket.unit), Pid::Client(socket.client));
        let last = if up { &mut socket.up_at } else { &mut socket.down_at };
        *last = at.max(*last);
        let delay = *last - self.now;
        match up {
            true => self.deliver(delay, client, unit, Message::SocketUp(number, text)),
            false => self.deliver(delay, unit, client, Message::SocketDown(number, text)),
        }
    }

    /// Closes a client's socket in good order: what was sent before still arrives.
    pub fn close_socket(&mut self, number: u64, by_unit: bool) {
        let Some(socket) = self.sockets.get_mut(&number) else { return };
        if socket.doomed {
            return;
        }
        socket.doomed = true;
        let (unit, client) = (Pid::Gateway(socket.unit), Pid::Client(socket.client));
        let at = if by_unit { socket.down_at } else { socket.up_at };
        let delay = at.saturating_sub(self.now) + 1;
        match by_unit {
            true => self.deliver(delay, unit, client, Message::SocketClosed(number)),
            false => self.deliver(delay, client, unit, Message::SocketClosed(number)),
        }
    }

    /// A client's socket with a unit.
    pub fn open_socket(&mut self, unit: usize, client: usize) -> u64 {
        let number = self.fresh();
        let life = self.process(Pid::Gateway(unit)).life;
        let socket = Socket { unit, client, life, doomed: false, up_at: 0, down_at: 0 };
        self.sockets.insert(number, socket);
        number
    }

    /// A streamer's connection with its agent.
    pub fn open_connection(
        &mut self,
        cluster: usize,
        streamer: u64,
        session: SessionId,
        instance: InstanceId,
    ) -> u64 {
        let number = self.fresh();
        let life = self.process(Pid::Agent(cluster)).life;
        let connection =
            Connection { cluster, streamer, session, instance, life, doomed: false, up_at: 0, down_at: 0 };
        self.connections.insert(number, connection);
        number
    }

    /// Sends on a streamer's connection: in order, unless it is cut.
    pub fn on_connection(&mut self, number: u64, message: Message) {
        let delay = self.travel();
        let at = self.now + delay;
        let Some(connection) = self.connections.get_mut(&number).filter(|one| !one.doomed) else { return };
        let (agent, streamer) =
            (Pid::Agent(connection.cluster), Pid::Streamer(connection.cluster, connection.streamer));
        let up = !matches!(message, Message::ToStreamer(..));
        let last = if up { &mut connection.up_at } else { &mut connection.down_at };
        *last = at.max(*last);
        let delay = *last - self.now;
        match up {
            true => self.deliver(delay, streamer, agent, message),
            false => self.deliver(delay, agent, streamer, message),
        }
    }

    // --- the loop ----------------------------------------------------------------------------------------

    /// Plans a timer.
    pub fn timer_in(&mut self, of: Pid, delay: u64, timer: Timer) {
        let life = self.process(of).life;
        self.push(delay, Event::Timer { of, life, timer });
    }

    /// Lets time pass until then, or until an invariant is broken.
    pub fn run_until(&mut self, until: u64) {
        while self.violation.is_none() {
            match self.queue.peek() {
                Some(Reverse(item)) if item.at <= until => {}
                _ => break,
            }
            let Some(Reverse(item)) = self.queue.pop() else { break };
            self.now = item.at;
            self.happen(item.event);
        }
        if self.violation.is_none() {
            self.now = self.now.max(until);
        }
    }

    fn happen(&mut self, event: Event) {
        self.steps += 1;
        let (to, life) = match &event {
            Event::Message { to, life, .. } => (*to, *life),
            Event::Timer { of, life, .. } => (*of, *life),
        };
        let process = self.process(to);
        if !process.up || process.life != life {
            return;
        }
        let held = &mut self.held[to.site()];
        if process.frozen_until > self.now || (!held.is_empty() && is_program(to)) {
            held.push_back(event);
            return;
        }
        self.take_place(event);
    }

    /// Somebody who did nothing for a while takes everything that waits, in order.
    fn thaw(&mut self, pid: Pid) {
        let until = self.process(pid).frozen_until;
        if until > self.now {
            return self.timer_in(Pid::Fate, until - self.now, Timer::Thaw(pid));
        }
        for event in std::mem::take(&mut self.held[pid.site()]) {
            self.happen(event);
        }
    }

    fn take_place(&mut self, event: Event) {
        match event {
            Event::Message { from, to, message, .. } => {
                self.events += 1;
                note!(self, "{from:?} -> {to:?}: {}", describe(&message));
                match to {
                    Pid::Gateway(unit) => self.gateway_message(unit, from, message),
                    Pid::Agent(cluster) => self.agent_message(cluster, from, message),
                    Pid::Ams(cluster) => self.ams_message(cluster, from, message),
                    Pid::Streamer(cluster, number) => self.streamer_message(cluster, number, message),
                    Pid::Client(client) => self.client_message(client, message),
                    Pid::Fate => {}
                }
            }
            Event::Timer { of, timer, .. } => match (of, timer) {
                (Pid::Gateway(unit), Timer::Gateway(timer)) => self.gateway_timer(unit, timer),
                (Pid::Agent(cluster), Timer::Agent(timer)) => self.agent_timer(cluster, timer),
                (Pid::Ams(cluster), Timer::Ams(timer)) => self.ams_timer(cluster, timer),
                (Pid::Streamer(cluster, number), Timer::Streamer(timer)) => {
                    self.streamer_timer(cluster, number, timer);
                }
                (Pid::Client(client), Timer::Client(timer)) => self.client_timer(client, timer),
                (_, Timer::Thaw(pid)) => self.thaw(pid),
                (_, timer) => self.fate(timer),
            },
        }
    }
}

/// One line for people.
fn describe(message: &Message) -> String {
    let packet = |packet: &Packet| match &packet.kind {
        fanlight_api::link::PacketKind::Data { seq, frame } => {
            let what = match frame {
                Frame::Open { .. } => "open",
                Frame::Text { text } => text,
                Frame::Closed => "closed",
            };
            format!("packet {}/{} #{seq} {what}", packet.session_id, packet.generation)
        }
        kind => format!("packet {}/{} {kind:?}", packet.session_id, packet.generation),
    };
    match message {
        Message::AgentReport(report) => {
            format!("agent report, AMS {}", if report.ams_reachable { "reachable" } else { "not reachable" })
        }
        Message::SessionsReport(report) => {
            let sessions: Vec<String> = report
                .sessions
                .iter()
                .map(|one| {
                    format!(
                        "{} {:?} {:?}",
                        one.session_id,
                        one.instance_id.as_ref().map(|id| id.as_str().to_owned()),
                        one.state
                    )
                })
                .collect();
            format!(
                "sessions of {}{}: {}",
                report.agent_id,
                if report.complete { ", complete" } else { "" },
                sessions.join(", ")
            )
        }
        Message::Absence(_) => "the same, to every unit".into(),
        Message::AskAgent(_, request) => match &**request {
            AgentRequest::Accept(launch) => format!("accept {}/{}", launch.session_id, launch.attempt),
            other => format!("{other:?}"),
        },
        Message::Up(one) | Message::Down(one) => packet(one),
        Message::ToAgent(_, up) => match &**up {
            StreamUp::Link(one) => packet(one),
            StreamUp::Status(status) => format!("status {status:?}"),
        },
        Message::ToStreamer(_, down) => match &**down {
            ToStreamer::Link(one) => packet(one),
            other => format!("{other:?}"),
        },
        Message::Listed(_, listing) => {
            let instances: Vec<String> = listing
                .instances
                .iter()
                .map(|one| {
                    format!("{} {} {:?}", one.id, one.status, one.session().map(|id| id.as_str().to_owned()))
                })
                .collect();
            format!("list: {}", instances.join(", "))
        }
        Message::Watch(watched) => format!(
            "watch {} r{} {:?}",
            watched.id,
            watched.revision,
            watched.session.as_ref().map(|session| session.status)
        ),
        Message::Launch(_, launched) => format!("launch {}/{}", launched.session, launched.attempt),
        other => {
            let mut text = format!("{other:?}");
            text.truncate(160);
            text
        }
    }
}
