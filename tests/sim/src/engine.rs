//! What really runs: the instances of a cluster, and in each a streamer with its end of the reliable links, its
//! clients and its idle timer. It outlives agents and AMS.

use std::collections::BTreeMap;

use fanlight_ams::cores::life::{Phase, Seen};
use fanlight_api::{
    InstanceId, SessionId,
    agent_link::{ClientState, ClientStatus, StreamerStatus, ToStreamer},
    guest::{EndReason, Ended, Streaming},
    link::{Frame, Link, Packet, PacketKind, Side, hello},
};

use crate::{
    check::Cause,
    note,
    planted::Planted,
    world::{Message, Pid, StreamUp, Timer, World},
};

const STATUS_MS: u64 = 5000;
const FIRST_PAUSE_MS: u64 = 100;
const LAST_PAUSE_MS: u64 = 5000;
const FIRST_CLIENT_MS: u64 = 600_000;
const MAX_LINKS: usize = 4;
const LINK_SILENCE_MS: u64 = 120_000;

/// The engine of a cluster.
#[derive(Default)]
pub struct Engine {
    /// What is there.
    pub instances: BTreeMap<InstanceId, Running>,
}

/// An instance.
pub struct Running {
    /// Number of the last run.
    pub run: u32,
    /// Told apart from all other runs there ever were.
    pub number: u64,
    /// How far it is.
    pub phase: Phase,
    /// Its streamer, while it runs.
    pub streamer: Option<Streamer>,
}

/// A streamer.
pub struct Streamer {
    /// Told apart from all others there ever were.
    pub number: u64,
    /// Its session.
    pub session: SessionId,
    joinable: bool,
    idle_ms: Option<u64>,
    /// Connection with the agent.
    pub connection: Option<u64>,
    pause: u64,
    links: BTreeMap<u64, Line>,
    over: Option<u64>,
    timer_at: Option<u64>,
    /// Generation that asked for the stream last.
    current: Option<u64>,
    /// Who watches.
    pub watcher: Option<(u64, usize)>,
    had_client: bool,
    idle_since: Option<u64>,
}

/// A streamer's end of a link, and what went over it.
struct Line {
    link: Link,
    heard: u64,
    taken: u64,
    sent: u64,
}

/// Timers of a streamer, or of the engine around it.
#[derive(Clone, Debug)]
pub enum StreamerTimer {
    /// Reach the agent.
    Connect,
    /// Tell the state.
    Status(u64),
    /// A link sends again.
    Links,
    /// The instance is ready.
    Ready(InstanceId),
    /// The run ends.
    End(InstanceId, Ended),
    /// Media of this generation and client is up.
    Media(u64, usize),
    /// The client of this generation has left.
    Left(u64),
    /// Perhaps nobody came for too long.
    Idle,
}

impl Streamer {
    /// One that has got its session just now.
    fn new(number: u64, streaming: &Streaming, now: u64) -> Self {
        Self {
            number,
            session: streaming.session_id.clone(),
            joinable: streaming.joinable,
            idle_ms: match (streaming.joinable, streaming.idle_time_min) {
                (true, 0) => None,
                (true, minutes) => Some(u64::from(minutes) * 60_000),
                (false, _) => Some(FIRST_CLIENT_MS),
            },
            connection: None,
            pause: FIRST_PAUSE_MS,
            links: BTreeMap::new(),
            over: None,
            timer_at: None,
            current: None,
            watcher: None,
            had_client: false,
            idle_since: Some(now),
        }
    }
}

impl Engine {
    /// How far an instance is.
    pub fn seen(&self, id: &InstanceId) -> Seen {
        self.instances
            .get(id)
            .map_or(Seen::ABSENT, |running| Seen { run: running.run, phase: running.phase.clone() })
    }
}

fn ended(reason: EndReason, message: &str) -> Ended {
    Ended { reason, message: message.into() }
}

impl World {
    fn instance_of(&mut self, cluster: usize, number: u64) -> Option<InstanceId> {
        let found = self.engines[cluster]
            .instances
            .iter()
            .find(|(_, running)| running.streamer.as_ref().is_some_and(|streamer| streamer.number == number));
        found.map(|(id, _)| id.clone())
    }

    fn streamer(&mut self, cluster: usize, number: u64) -> Option<&mut Streamer> {
        self.engines[cluster]
            .instances
            .values_mut()
            .filter_map(|running| running.streamer.as_mut())
            .find(|streamer| streamer.number == number)
    }

    // --- what AMS asks for ---------------------------------------------------------------------------------

    /// Makes an instance. False: it could not be made.
    pub fn engine_create(&mut self, cluster: usize, id: &InstanceId) -> bool {
        let bad = self.weather.engine;
        if !self.calm && self.rng.chance(bad) {
            return false;
        }
        let idle = Running { run: 0, number: 0, phase: Phase::Idle, streamer: None };
        self.engines[cluster].instances.entry(id.clone()).or_insert(idle);
        true
    }

    /// Starts a run. False: nothing could be started.
    pub fn engine_start(
        &mut self,
        cluster: usize,
        id: &InstanceId,
        run: u32,
        streaming: Option<&Streaming>,
    ) -> bool {
        let bad = self.weather.engine;
        if !self.calm && self.rng.chance(bad) {
            return false;
        }
        let number = self.fresh();
        let now = self.now;
        let Some(running) = self.engines[cluster].instances.get_mut(id) else { return false };
        // The engine keeps to its contract; whether it is asked rightly is judged.
        let asked_again = running.run >= run;
        let live = running.phase.is_live();
        if live {
            self.violate(format!("run {run} of {id} was started while another run was there"));
            return true;
        }
        if asked_again {
            return true;
        }
        running.run = run;
        running.number = number;
        running.phase = Phase::Starting;
        running.streamer = streaming.map(|streaming| Streamer::new(number, streaming, now));
        if let Some(streaming) = streaming {
            self.ledger.runs(&streaming.session_id);
        }
        let pid = Pid::Streamer(cluster, number);
        let (connect, ready) = (self.rng.between(20, 300), self.rng.between(100, 2500));
        self.timer_in(pid, connect, Timer::Streamer(StreamerTimer::Connect));
        self.timer_in(pid, 1000, Timer::Streamer(StreamerTimer::Idle));
        let bad = self.weather.engine / 2.0;
        if self.calm || !self.rng.chance(bad) {
            self.timer_in(pid, ready, Timer::Streamer(StreamerTimer::Ready(id.clone())));
        }
        self.engine_changed(cluster, id);
        true
    }

    /// Tells a run that waits whose it is. None: it could not be told now, or its answer was lost; false: it refuses.
    pub fn engine_claim(&mut self, cluster: usize, id: &InstanceId, streaming: &Streaming) -> Option<bool> {
        let bad = self.weather.engine;
        let (lost, late) = match self.calm {
            true => (false, false),
            false => (self.rng.chance(bad), self.rng.chance(bad)),
        };
        let now = self.now;
        let running = self.engines[cluster].instances.get_mut(id)?;
        if lost || running.phase != Phase::Ready {
            return None;
        }
        let number = running.number;
        match &running.streamer {
            Some(streamer) if streamer.session != streaming.session_id => return Some(false),
            Some(_) => {}
            None => {
                running.streamer = Some(Streamer::new(number, streaming, now));
                self.ledger.runs(&streaming.session_id);
                let pid = Pid::Streamer(cluster, number);
                self.timer_in(pid, 1, Timer::Streamer(StreamerTimer::Connect));
            }
        }
        (!late).then_some(true)
    }

    /// Asks a run to end, and kills it after the grace.
    pub fn engine_stop(&mut self, cluster: usize, id: &InstanceId, grace: u64) {
        self.judge_end(cluster, id);
        let Some(running) = self.engines[cluster].instances.get_mut(id) else { return };
        if !running.phase.is_live() {
            return;
        }
        if grace == 0 {
            return self.run_ends(cluster, id, ended(EndReason::Stopped, "killed"));
        }
        let again = running.phase == Phase::Stopping;
        running.phase = Phase::Stopping;
        let number = running.number;
        if !again {
            let takes = if self.rng.chance(0.1) { grace } else { self.rng.between(10, 1000) };
            let end = StreamerTimer::End(id.clone(), ended(EndReason::Stopped, "stopped"));
            self.timer_in(Pid::Streamer(cluster, number), takes, Timer::Streamer(end));
        }
        self.engine_changed(cluster, id);
    }

    /// Ends what runs and removes everything.
    pub fn engine_delete(&mut self, cluster: usize, id: &InstanceId) {
        self.judge_end(cluster, id);
        if self.engines[cluster].instances.get(id).is_some_and(|running| running.phase.is_live()) {
            self.run_ends(cluster, id, ended(EndReason::Stopped, "removed"));
        }
        self.engines[cluster].instances.remove(id);
        self.engine_changed(cluster, id);
    }

    fn engine_changed(&mut self, cluster: usize, id: &InstanceId) {
        self.nudge(cluster, id, false);
    }

    /// A run is over, for whatever reason.
    pub fn run_ends(&mut self, cluster: usize, id: &InstanceId, ended: Ended) {
        let Some(running) = self.engines[cluster].instances.get_mut(id) else { return };
        if !running.phase.is_live() {
            return;
        }
        note!(self, "run of {id} ends: {ended:?}");
        let Some(running) = self.engines[cluster].instances.get_mut(id) else { return };
        running.phase = Phase::Ended(ended);
        if let Some(streamer) = running.streamer.take() {
            if let Some(connection) = streamer.connection {
                self.doom_connection(connection, 50);
            }
            if let Some((generation, client)) = streamer.watcher {
                self.client_lost_media(client, &streamer.session, generation);
            }
            self.ledger.run_over(&streamer.session);
        }
        self.engine_changed(cluster, id);
    }

    /// The instance dies, or its application ends.
    pub fn instance_dies(&mut self, cluster: usize, id: &InstanceId, gracefully: bool) {
        self.ledger.cause(id, Cause::Itself);
        let reason = if gracefully { EndReason::Finished } else { EndReason::Failed };
        self.run_ends(cluster, id, ended(reason, "it ended by itself"));
    }

    // --- the streamer --------------------------------------------------------------------------------------

    /// Time passed for a streamer.
    pub fn streamer_timer(&mut self, cluster: usize, number: u64, timer: StreamerTimer) {
        let pid = Pid::Streamer(cluster, number);
        match timer {
            StreamerTimer::Ready(id) => {
                let Some(running) = self.engines[cluster].instances.get_mut(&id) else { return };
                let ours = running.number == number;
                if ours && running.phase == Phase::Starting {
                    running.phase = Phase::Ready;
                    self.engine_changed(cluster, &id);
                }
            }
            StreamerTimer::End(id, ended) => {
                let running = self.engines[cluster].instances.get(&id);
                let ours = running.is_some_and(|running| running.number == number);
                if ours {
                    self.run_ends(cluster, &id, ended);
                }
            }
            StreamerTimer::Connect => self.streamer_connects(cluster, number),
            StreamerTimer::Status(connection) => {
                let Some(streamer) = self.streamer(cluster, number) else { return };
                if streamer.connection == Some(connection) {
                    self.streamer_status(cluster, number);
                    self.timer_in(pid, STATUS_MS, Timer::Streamer(StreamerTimer::Status(connection)));
                }
            }
            StreamerTimer::Links => {
                let now = self.now;
                if let Some(streamer) = self.streamer(cluster, number) {
                    streamer.timer_at = streamer.timer_at.filter(|at| *at > now);
                    self.streamer_pump(cluster, number);
                }
            }
            StreamerTimer::Media(generation, client) => {
                self.media_up(cluster, number, generation, client);
            }
            StreamerTimer::Left(generation) => {
                let now = self.now;
                let Some(streamer) = self.streamer(cluster, number) else { return };
                if streamer.watcher.is_some_and(|(watching, _)| watching == generation) {
                    streamer.watcher = None;
                    streamer.idle_since = Some(now);
                    self.streamer_status(cluster, number);
                    self.streamer_idles(cluster, number);
                }
            }
            StreamerTimer::Idle => {
                self.streamer_idles(cluster, number);
                self.timer_in(pid, 5000, Timer::Streamer(StreamerTimer::Idle));
            }
        }
    }

    /// The idle timer lives in the instance and nowhere else.
    fn streamer_idles(&mut self, cluster: usize, number: u64) {
        let now = self.now;
        let Some(streamer) = self.streamer(cluster, number) else { return };
        let Some(since) = streamer.idle_since else { return };
        let over = match streamer.had_client && !streamer.joinable {
            true => true,
            false => streamer.idle_ms.is_some_and(|limit| now >= since + limit),
        };
        if over && let Some(id) = self.instance_of(cluster, number) {
            self.ledger.cause(&id, Cause::Itself);
            self.run_ends(cluster, &id, ended(EndReason::Idle, "nobody is there"));
        }
    }

    fn streamer_connects(&mut self, cluster: usize, number: u64) {
        let (pid, agent) = (Pid::Streamer(cluster, number), Pid::Agent(cluster));
        let Some(id) = self.instance_of(cluster, number) else { return };
        let reachable = self.process(agent).up && !self.is_blocked(pid, agent);
        let Some(streamer) = self.streamer(cluster, number) else { return };
        if streamer.connection.is_some() {
            return;
        }
        if !reachable {
            let pause = streamer.pause;
            streamer.pause = (pause * 2).min(LAST_PAUSE_MS);
            return self.timer_in(pid, pause, Timer::Streamer(StreamerTimer::Connect));
        }
        streamer.pause = FIRST_PAUSE_MS;
        let session = streamer.session.clone();
        let connection = self.open_connection(cluster, number, session.clone(), id);
        if let Some(streamer) = self.streamer(cluster, number) {
            streamer.connection = Some(connection);
        }
        self.on_connection(connection, Message::StreamOpen(connection));
        let up = StreamUp::Link(hello(session));
        self.on_connection(connection, Message::ToAgent(connection, Box::new(up)));
        self.streamer_status(cluster, number);
        self.streamer_pump(cluster, number);
        self.timer_in(pid, STATUS_MS, Timer::Streamer(StreamerTimer::Status(connection)));
    }

    fn streamer_status(&mut self, cluster: usize, number: u64) {
        let wall = self.wall(Pid::Fate);
        let Some(streamer) = self.streamer(cluster, number) else { return };
        let Some(connection) = streamer.connection else { return };
        let status = StreamerStatus {
            ready: true,
            client: match (streamer.watcher, streamer.current) {
                (Some((generation, _)), _) => {
                    Some(ClientStatus { generation, state: ClientState::Streaming })
                }
                (None, Some(generation)) => Some(ClientStatus { generation, state: ClientState::Signalling }),
                (None, None) => None,
            },
            idle_since: streamer.idle_since.map(|_| wall),
            ended: None,
        };
        let up = StreamUp::Status(status);
        self.on_connection(connection, Message::ToAgent(connection, Box::new(up)));
    }

    /// Something reached a streamer.
    pub fn streamer_message(&mut self, cluster: usize, number: u64, message: Message) {
        match message {
            Message::StreamCut(connection) => {
                let Some(streamer) = self.streamer(cluster, number) else { return };
                if streamer.connection == Some(connection) {
                    streamer.connection = None;
                    let timer = Timer::Streamer(StreamerTimer::Connect);
                    self.timer_in(Pid::Streamer(cluster, number), FIRST_PAUSE_MS, timer);
                }
            }
            Message::ToStreamer(connection, down) => {
                let current =
                    self.streamer(cluster, number).is_some_and(|one| one.connection == Some(connection));
                if !current {
                    return;
                }
                match *down {
                    ToStreamer::Link(packet) => self.streamer_packet(cluster, number, packet),
                    // AMS stops the instance by itself; its client hears it from the gateway too.
                    ToStreamer::EndStream { .. } => {}
                }
            }
            _ => {}
        }
    }

    fn streamer_packet(&mut self, cluster: usize, number: u64, packet: Packet) {
        let now = self.now;
        let Some(streamer) = self.streamer(cluster, number) else { return };
        if packet.session_id != streamer.session || packet.from != Side::Client {
            return;
        }
        let generation = packet.generation;
        if !streamer.links.contains_key(&generation) {
            let late = streamer.over.is_some_and(|over| generation <= over);
            if late || !matches!(packet.kind, PacketKind::Data { .. }) {
                return;
            }
            let link = Link::new(streamer.session.clone(), generation, Side::Instance);
            streamer.links.insert(generation, Line { link, heard: now, taken: 0, sent: 0 });
            while streamer.links.len() > MAX_LINKS {
                let oldest = streamer.links.pop_first().map(|(oldest, _)| oldest);
                streamer.over = streamer.over.max(oldest);
            }
        }
        let Some(line) = streamer.links.get_mut(&generation) else { return };
        line.heard = now;
        line.link.receive(packet);
        while let Some(line) = self.streamer(cluster, number).and_then(|one| one.links.get_mut(&generation)) {
            let Some(frame) = line.link.poll_frame() else { break };
            match frame {
                Frame::Text { text } => {
                    let wanted = line.taken;
                    line.taken += 1;
                    if text != format!("c:{generation}:{wanted}") {
                        self.violate(format!(
                            "streamer {number} got frame {text:?} of generation {generation} where number {wanted} was due"
                        ));
                    }
                    self.streamer_frame(cluster, number, generation, wanted);
                }
                Frame::Open { .. } | Frame::Closed => {}
            }
        }
        self.streamer_pump(cluster, number);
    }

    /// A frame of a client: its settings ask for the stream, its answer begins media.
    fn streamer_frame(&mut self, cluster: usize, number: u64, generation: u64, frame: u64) {
        let Some(streamer) = self.streamer(cluster, number) else { return };
        match frame {
            0 => {
                if streamer.current.is_some_and(|current| current > generation) {
                    return self.streamer_sends(cluster, number, generation, Frame::Closed);
                }
                let old = streamer.current.replace(generation).filter(|old| *old != generation);
                let watcher = streamer.watcher.take();
                if let Some(old) = old {
                    self.streamer_sends(cluster, number, old, Frame::Closed);
                }
                let now = self.now;
                let Some(streamer) = self.streamer(cluster, number) else { return };
                if let Some((watching, client)) = watcher {
                    streamer.idle_since = Some(now);
                    let session = streamer.session.clone();
                    self.client_lost_media(client, &session, watching);
                }
                for piece in 0..3 {
                    let text = format!("i:{generation}:{piece}");
                    self.streamer_sends(cluster, number, generation, Frame::Text { text });
                }
                self.streamer_status(cluster, number);
            }
            1 => {
                let current = streamer.current == Some(generation);
                let session = streamer.session.clone();
                if current && let Some(client) = self.client_of(&session, generation) {
                    let delay = self.rng.between(50, 600);
                    let media = StreamerTimer::Media(generation, client);
                    self.timer_in(Pid::Streamer(cluster, number), delay, Timer::Streamer(media));
                }
            }
            _ => {}
        }
    }

    fn streamer_sends(&mut self, cluster: usize, number: u64, generation: u64, frame: Frame) {
        let Some(streamer) = self.streamer(cluster, number) else { return };
        if let Some(line) = streamer.links.get_mut(&generation) {
            line.sent += 1;
            let _ = line.link.send(frame);
        }
    }

    fn media_up(&mut self, cluster: usize, number: u64, generation: u64, client: usize) {
        let Some(streamer) = self.streamer(cluster, number) else { return };
        if streamer.current != Some(generation) {
            return;
        }
        let session = streamer.session.clone();
        if !self.client_gets_media(client, &session, generation, cluster, number) {
            return;
        }
        let Some(streamer) = self.streamer(cluster, number) else { return };
        streamer.watcher = Some((generation, client));
        streamer.had_client = true;
        streamer.idle_since = None;
        self.streamer_status(cluster, number);
    }

    /// Drains the links of a streamer and sleeps until they have something again.
    fn streamer_pump(&mut self, cluster: usize, number: u64) {
        let (now, instant) = (self.now, self.instant());
        let ignores = self.has(Planted::LostAckIgnored);
        let Some(streamer) = self.streamer(cluster, number) else { return };
        // What is given to it waits while the agent is away.
        let Some(connection) = streamer.connection else { return };
        let gone: Vec<u64> = streamer
            .links
            .iter()
            .filter(|(_, line)| !line.link.is_settled() && now - line.heard > LINK_SILENCE_MS)
            .map(|(generation, _)| *generation)
            .collect();
        for generation in gone {
            streamer.links.remove(&generation);
            streamer.over = streamer.over.max(Some(generation));
        }
        let mut packets = Vec::new();
        for line in streamer.links.values_mut() {
            while let Some(packet) = line.link.poll_transmit(instant) {
                if ignores && let PacketKind::Data { seq, .. } = packet.kind {
                    let kind = PacketKind::Ack { next: seq + 1 };
                    line.link.receive(Packet { from: Side::Client, kind, ..packet.clone() });
                }
                packets.push(packet);
            }
        }
        let deadline = streamer.links.values().filter_map(|line| line.link.deadline()).min();
        if let Some(deadline) = deadline {
            let delay = (deadline.saturating_duration_since(instant).as_millis() as u64).max(1);
            let at = now + delay;
            if streamer.timer_at.is_none_or(|planned| planned > at) {
                streamer.timer_at = Some(at);
                let timer = Timer::Streamer(StreamerTimer::Links);
                self.timer_in(Pid::Streamer(cluster, number), delay, timer);
            }
        }
        for packet in packets {
            let up = StreamUp::Link(packet);
            self.on_connection(connection, Message::ToAgent(connection, Box::new(up)));
        }
    }
}
