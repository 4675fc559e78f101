//! A simulated agent: what `workloads/agent/src/{ams,gateway,stream}.rs` do with the answers of its cores.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use fanlight_agent::cores::{Inventory, LaunchFailure, Sessions, Work, capacity};
use fanlight_api::{
    InstanceId, SessionId,
    agent_link::ToStreamer,
    bus::{
        AgentReport, AgentRequest, AgentResponse, GatewayRequest, GatewayResponse, InstanceState, Launch,
        SessionReport, SessionsReport,
    },
    gateway::Screen,
    link::{Packet, Side},
};

use crate::{
    ams::{Launched, Listing},
    check, note,
    planted::Planted,
    world::{Message, Pid, StreamUp, Timer, World},
};

const REPORT_MS: u64 = 2000;
const REPORT_SESSIONS_MS: u64 = 5000;
const REPORT_PAUSE_MS: u64 = 10;
const READ_MS: u64 = 10_000;
const READ_PAUSE_MS: u64 = 50;
const FIRST_RETRY_MS: u64 = 200;
const LAST_RETRY_MS: u64 = 5000;
const LAUNCH_PATIENCE_MS: u64 = 300_000;
const ASK_MS: u64 = 3000;
/// How long a connection to AMS may be silent before a request over it has failed.
const HTTP_MS: u64 = 5000;

/// What an agent has in memory.
pub struct Agent {
    /// The core.
    pub sessions: Sessions,
    /// What AMS said last.
    pub inventory: Inventory,
    /// Connected streamers by session: number of the connection.
    pub streamers: BTreeMap<SessionId, u64>,
    launches: BTreeMap<SessionId, LaunchTask>,
    calls: BTreeMap<u64, Call>,
    leaving: bool,
    reading: bool,
    wanted: bool,
    read_planned: bool,
    retry_at: Option<u64>,
    pause: u64,
    change_planned: bool,
    told: Option<AgentReport>,
    series: u64,
}

/// A launch on its way.
struct LaunchTask {
    launch: Launch,
    began: u64,
    pause: u64,
    reached: bool,
}

/// A question, and what its answer is for.
enum Call {
    Read { begun: Instant },
    Launch(SessionId),
    Delete,
    Session(u64),
    EndSession(u64),
}

/// Timers of an agent.
#[derive(Clone, Debug)]
pub enum AgentTimer {
    /// The core's.
    Tick,
    /// Tell about itself.
    Report,
    /// Tell all sessions.
    ReportSessions,
    /// Tell what changed.
    ReportChanged,
    /// Read everything of AMS.
    ReadAll,
    /// Read AMS, as somebody asked.
    Read,
    /// Launch again.
    Launch(SessionId, u32),
    /// A question was not answered.
    Late(u64),
}

impl Agent {
    /// One that just started.
    pub fn new(cluster_id: String) -> Self {
        Self {
            sessions: Sessions::default(),
            inventory: Inventory { cluster_id, ..Inventory::default() },
            streamers: BTreeMap::new(),
            launches: BTreeMap::new(),
            calls: BTreeMap::new(),
            leaving: false,
            reading: false,
            wanted: false,
            read_planned: false,
            retry_at: None,
            pause: FIRST_RETRY_MS,
            change_planned: false,
            told: None,
            series: 0,
        }
    }

    /// Whether it forwards packets of a session.
    pub fn has_streamer(&self, session: &SessionId) -> bool {
        self.streamers.contains_key(session)
    }
}

impl World {
    /// An agent begins.
    pub fn agent_start(&mut self, cluster: usize) {
        // Where it is not configured, nothing is reported before AMS has named it.
        let cluster_id = if self.named { check::cluster_id(cluster) } else { String::new() };
        self.agents[cluster] = Agent::new(cluster_id);
        let pid = Pid::Agent(cluster);
        for (delay, timer) in [
            (1000, AgentTimer::Tick),
            (1, AgentTimer::Report),
            (2, AgentTimer::ReportSessions),
            (READ_MS, AgentTimer::ReadAll),
        ] {
            self.timer_in(pid, delay, Timer::Agent(timer));
        }
        self.read_ams(cluster);
    }

    /// An agent is asked to end: it says goodbye first.
    pub fn agent_leaves(&mut self, cluster: usize) {
        self.agents[cluster].leaving = true;
        self.report_agent(cluster);
        self.crash(Pid::Agent(cluster));
    }

    /// Changes sessions, and does the work that follows.
    fn with_sessions<R>(
        &mut self,
        cluster: usize,
        change: impl FnOnce(&mut Sessions, Instant) -> (R, Vec<Work>),
    ) -> R {
        let now = self.instant();
        let (result, work) = change(&mut self.agents[cluster].sessions, now);
        if self.agents[cluster].sessions.has_changes() {
            self.agent_changed(cluster);
        }
        for work in work {
            self.perform(cluster, work);
        }
        result
    }

    fn agent_changed(&mut self, cluster: usize) {
        if !self.agents[cluster].change_planned {
            self.agents[cluster].change_planned = true;
            self.timer_in(Pid::Agent(cluster), REPORT_PAUSE_MS, Timer::Agent(AgentTimer::ReportChanged));
        }
    }

    fn perform(&mut self, cluster: usize, work: Work) {
        match work {
            Work::Launch(launch) => {
                let session = launch.session_id.clone();
                let task =
                    LaunchTask { launch: *launch, began: self.now, pause: FIRST_RETRY_MS, reached: false };
                self.agents[cluster].launches.insert(session.clone(), task);
                self.try_launch(cluster, &session);
            }
            Work::Delete { instance_id, session_id, force } => {
                note!(self, "agent {cluster} removes {instance_id} of {session_id}");
                let call = self.fresh();
                self.agents[cluster].calls.insert(call, Call::Delete);
                let message = Message::Delete(call, instance_id, force);
                self.http(Pid::Agent(cluster), Pid::Ams(cluster), message);
                self.timer_in(Pid::Agent(cluster), HTTP_MS, Timer::Agent(AgentTimer::Late(call)));
            }
            Work::EndStream { session_id, message } => {
                if let Some(connection) = self.agents[cluster].streamers.get(&session_id) {
                    let message = ToStreamer::EndStream { message };
                    self.on_connection(*connection, Message::ToStreamer(*connection, Box::new(message)));
                }
            }
            Work::ReadAms => self.read_ams(cluster),
        }
    }

    // --- AMS ------------------------------------------------------------------------------------------------

    fn read_ams(&mut self, cluster: usize) {
        let agent = &mut self.agents[cluster];
        agent.wanted = true;
        if !agent.reading && !agent.read_planned {
            agent.read_planned = true;
            let delay = agent.retry_at.map_or(0, |at| at.saturating_sub(self.now)).max(1);
            self.timer_in(Pid::Agent(cluster), delay, Timer::Agent(AgentTimer::Read));
        }
    }

    fn read(&mut self, cluster: usize) {
        let begun = self.instant();
        let call = self.fresh();
        let agent = &mut self.agents[cluster];
        agent.read_planned = false;
        if agent.reading || !agent.wanted {
            return;
        }
        agent.wanted = false;
        agent.reading = true;
        agent.calls.insert(call, Call::Read { begun });
        self.http(Pid::Agent(cluster), Pid::Ams(cluster), Message::List(call));
        self.timer_in(Pid::Agent(cluster), HTTP_MS, Timer::Agent(AgentTimer::Late(call)));
    }

    fn was_read(&mut self, cluster: usize, begun: Instant, listing: Option<Arc<Listing>>) {
        let now = self.now;
        self.agents[cluster].reading = false;
        match listing {
            Some(listing) => {
                self.with_sessions(cluster, |sessions, now| {
                    ((), sessions.synced(now, begun, &listing.instances))
                });
                let agent = &mut self.agents[cluster];
                agent.inventory.applications.clone_from(&listing.applications);
                agent.inventory.capacity = capacity(&listing.nodes, &listing.instances, &[]);
                agent.inventory.listed = Some(begun);
                agent.inventory.cluster_id = check::cluster_id(cluster);
                agent.retry_at = None;
                agent.pause = FIRST_RETRY_MS;
                if !std::mem::replace(&mut agent.inventory.reachable, true) {
                    self.agent_changed(cluster);
                }
                if self.agents[cluster].wanted {
                    self.agents[cluster].read_planned = true;
                    self.timer_in(Pid::Agent(cluster), READ_PAUSE_MS, Timer::Agent(AgentTimer::Read));
                }
            }
            None => {
                let agent = &mut self.agents[cluster];
                let was = std::mem::replace(&mut agent.inventory.reachable, false);
                agent.retry_at = Some(now + agent.pause);
                agent.pause = (agent.pause * 2).min(LAST_RETRY_MS);
                if was {
                    self.agent_changed(cluster);
                }
                self.read_ams(cluster);
            }
        }
    }

    fn try_launch(&mut self, cluster: usize, session: &SessionId) {
        let call = self.fresh();
        let agent = &mut self.agents[cluster];
        let Some(task) = agent.launches.get_mut(session) else { return };
        if !agent.sessions.wants_launch(session, task.launch.attempt) {
            let failure = LaunchFailure { text: "the session was ended".into(), certain: !task.reached };
            return self.launched(cluster, session, Err(failure));
        }
        task.reached = true;
        let launched = Launched {
            session: session.clone(),
            attempt: task.launch.attempt,
            joinable: task.launch.joinable,
            idle_time_min: task.launch.idle_time_min,
        };
        agent.calls.insert(call, Call::Launch(session.clone()));
        self.http(Pid::Agent(cluster), Pid::Ams(cluster), Message::Launch(call, Box::new(launched)));
        self.timer_in(Pid::Agent(cluster), HTTP_MS, Timer::Agent(AgentTimer::Late(call)));
    }

    fn launched(&mut self, cluster: usize, session: &SessionId, result: Result<InstanceId, LaunchFailure>) {
        let Some(task) = self.agents[cluster].launches.get(session) else { return };
        let attempt = task.launch.attempt;
        if result.is_err() {
            self.agents[cluster].launches.remove(session);
        }
        self.with_sessions(cluster, |sessions, now| ((), sessions.launched(now, session, attempt, result)));
    }

    fn launch_answered(
        &mut self,
        cluster: usize,
        session: &SessionId,
        answer: Option<Result<(InstanceId, Result<(), String>), String>>,
    ) {
        let now = self.now;
        let Some(task) = self.agents[cluster].launches.get_mut(session) else { return };
        match answer {
            Some(Ok((instance, placed))) => {
                self.launched(cluster, session, Ok(instance));
                match placed {
                    Ok(()) => {
                        self.agents[cluster].launches.remove(session);
                    }
                    Err(text) => {
                        self.launched(cluster, session, Err(LaunchFailure { text, certain: false }));
                    }
                }
            }
            Some(Err(text)) => {
                self.launched(cluster, session, Err(LaunchFailure { text, certain: true }));
            }
            None if now < task.began + LAUNCH_PATIENCE_MS => {
                let pause = task.pause;
                task.pause = (pause * 2).min(LAST_RETRY_MS);
                let again = AgentTimer::Launch(session.clone(), task.launch.attempt);
                self.timer_in(Pid::Agent(cluster), pause, Timer::Agent(again));
            }
            None => {
                let failure = LaunchFailure { text: "AMS does not answer".into(), certain: false };
                self.launched(cluster, session, Err(failure));
            }
        }
    }

    // --- messages -------------------------------------------------------------------------------------------

    /// Something reached an agent.
    pub fn agent_message(&mut self, cluster: usize, from: Pid, message: Message) {
        let pid = Pid::Agent(cluster);
        match message {
            Message::AskAgent(call, request) => {
                let response = self.agent_answer(cluster, *request);
                self.publish(pid, from, Message::AgentSays(call, Box::new(response)));
            }
            Message::Listed(call, listing) => self.agent_called(cluster, call, Some(Answer::Listed(listing))),
            Message::LaunchAnswer(call, answer) => {
                self.agent_called(cluster, call, Some(Answer::Launched(answer)));
            }
            Message::Deleted(call) => self.agent_called(cluster, call, Some(Answer::Done)),
            Message::GatewaySays(call, response) => {
                self.agent_called(cluster, call, Some(Answer::Gateway(*response)));
            }
            Message::AmsEvent => self.read_ams(cluster),
            Message::SessionPost(call, _) if self.agents[cluster].inventory.cluster_id.is_empty() => {
                self.http(pid, from, Message::SessionMade(call, Err(true)));
            }
            Message::SessionPost(call, instance_id) => {
                let request = GatewayRequest::CreateSession {
                    agent_id: check::agent_id(cluster),
                    region: "here".into(),
                    cluster_id: self.agents[cluster].inventory.cluster_id.clone(),
                    instance_id,
                    app: "app".into(),
                    screen: Screen::default(),
                };
                self.ask_gateway(cluster, request, Call::Session(call));
            }
            Message::SessionDelete(call, session_id) => {
                let request = GatewayRequest::EndSession { session_id };
                self.ask_gateway(cluster, request, Call::EndSession(call));
            }
            Message::Up(packet) => {
                if packet.from == Side::Client
                    && let Some(connection) = self.agents[cluster].streamers.get(&packet.session_id)
                {
                    let message = Message::ToStreamer(*connection, Box::new(ToStreamer::Link(*packet)));
                    self.on_connection(*connection, message);
                }
            }
            Message::StreamOpen(number) => self.stream_open(cluster, number),
            Message::ToAgent(number, up) => self.stream_says(cluster, number, *up),
            Message::StreamCut(number) => {
                let Some(connection) = self.connections.get(&number) else { return };
                let session = connection.session.clone();
                if self.agents[cluster].streamers.get(&session) == Some(&number) {
                    self.agents[cluster].streamers.remove(&session);
                }
                self.with_sessions(cluster, |sessions, _| ((), sessions.streamer_gone(&session, number)));
            }
            _ => {}
        }
    }

    fn agent_answer(&mut self, cluster: usize, request: AgentRequest) -> AgentResponse {
        let refused = |code: &str| AgentResponse::Refused { code: code.into(), message: code.into() };
        match request {
            AgentRequest::Accept(launch) => {
                let agent = &self.agents[cluster];
                let known = agent.sessions.wants_launch(&launch.session_id, launch.attempt);
                if !known {
                    if agent.leaving {
                        return refused("leaving");
                    }
                    if !agent.inventory.reachable {
                        return refused("ams-unreachable");
                    }
                    if agent.inventory.lacks(&launch.app) {
                        return refused("unknown-application");
                    }
                }
                let accepted =
                    self.with_sessions(cluster, |sessions, now| match sessions.accept(now, &launch) {
                        Ok(work) => (true, work),
                        Err(_) => (false, Vec::new()),
                    });
                match accepted {
                    true => AgentResponse::Accepted { stun_servers: Vec::new() },
                    false => refused("session-ended"),
                }
            }
            AgentRequest::Credentials { .. } => AgentResponse::Accepted { stun_servers: Vec::new() },
            AgentRequest::End { session_id, message, force } => {
                let launching = self.agents[cluster].launches.contains_key(&session_id);
                if launching && self.has(Planted::LaunchForgotten) {
                    return AgentResponse::Ending { state: InstanceState::Gone };
                }
                let state = self
                    .with_sessions(cluster, |sessions, now| sessions.end(now, &session_id, &message, force));
                AgentResponse::Ending { state }
            }
        }
    }

    fn ask_gateway(&mut self, cluster: usize, request: GatewayRequest, call: Call) {
        let number = self.fresh();
        let pid = Pid::Agent(cluster);
        self.agents[cluster].calls.insert(number, call);
        if let Some(unit) = self.any_unit() {
            self.publish(pid, unit, Message::AskGateway(number, Box::new(request)));
        }
        self.timer_in(pid, ASK_MS, Timer::Agent(AgentTimer::Late(number)));
    }

    /// The bus gives a message of a queue group to one of those that are there.
    fn any_unit(&mut self) -> Option<Pid> {
        let there: Vec<Pid> = (0..self.units.len())
            .map(Pid::Gateway)
            .filter(|pid| self.process(*pid).up && self.has_bus(*pid))
            .collect();
        self.rng.pick(&there).copied()
    }

    fn agent_called(&mut self, cluster: usize, number: u64, answer: Option<Answer>) {
        let Some(call) = self.agents[cluster].calls.remove(&number) else { return };
        let pid = Pid::Agent(cluster);
        let ams = Pid::Ams(cluster);
        match (call, answer) {
            (Call::Read { begun }, Some(Answer::Listed(listing))) => {
                self.was_read(cluster, begun, Some(listing));
            }
            (Call::Read { begun }, _) => self.was_read(cluster, begun, None),
            (Call::Launch(session), Some(Answer::Launched(answer))) => {
                self.launch_answered(cluster, &session, Some(answer));
            }
            (Call::Launch(session), _) => self.launch_answered(cluster, &session, None),
            (Call::Delete, _) => self.read_ams(cluster),
            (Call::Session(reply), answer) => {
                let made = match answer {
                    Some(Answer::Gateway(GatewayResponse::Created { session_id, .. })) => Ok(session_id),
                    // A refusal is not tried again.
                    Some(_) => Err(false),
                    None => Err(true),
                };
                self.http(pid, ams, Message::SessionMade(reply, made));
            }
            (Call::EndSession(reply), answer) => {
                let ended = match answer {
                    Some(Answer::Gateway(GatewayResponse::Ended)) => Ok(()),
                    Some(_) => Err(false),
                    None => Err(true),
                };
                self.http(pid, ams, Message::SessionDeleted(reply, ended));
            }
        }
    }

    /// Time passed for an agent.
    pub fn agent_timer(&mut self, cluster: usize, timer: AgentTimer) {
        let pid = Pid::Agent(cluster);
        match timer {
            AgentTimer::Tick => {
                self.with_sessions(cluster, |sessions, now| ((), sessions.tick(now)));
                self.timer_in(pid, 1000, Timer::Agent(AgentTimer::Tick));
            }
            AgentTimer::Report => {
                self.report_agent(cluster);
                self.timer_in(pid, REPORT_MS, Timer::Agent(AgentTimer::Report));
            }
            AgentTimer::ReportSessions => {
                let now = self.instant();
                let complete = self.agents[cluster].inventory.is_complete(now)
                    || self.has(Planted::EndedOnLostObservation);
                let all = self.agents[cluster].sessions.report_all();
                self.publish_sessions(cluster, all, complete);
                self.timer_in(pid, REPORT_SESSIONS_MS, Timer::Agent(AgentTimer::ReportSessions));
            }
            AgentTimer::ReportChanged => {
                self.agents[cluster].change_planned = false;
                let changed = self.agents[cluster].sessions.report_changed();
                self.publish_sessions(cluster, changed, false);
                let report = self.agent_report(cluster);
                let news = self.agents[cluster].told.as_ref().is_none_or(|told| {
                    told.ams_reachable != report.ams_reachable || told.applications != report.applications
                });
                if news {
                    self.report_agent(cluster);
                }
            }
            AgentTimer::ReadAll => {
                self.read_ams(cluster);
                self.timer_in(pid, READ_MS, Timer::Agent(AgentTimer::ReadAll));
            }
            AgentTimer::Read => self.read(cluster),
            AgentTimer::Launch(session, attempt) => {
                let task = self.agents[cluster].launches.get(&session);
                if task.is_some_and(|task| task.launch.attempt == attempt) {
                    self.try_launch(cluster, &session);
                }
            }
            AgentTimer::Late(call) => self.agent_called(cluster, call, None),
        }
    }

    // --- reports --------------------------------------------------------------------------------------------

    fn agent_report(&self, cluster: usize) -> AgentReport {
        let agent = &self.agents[cluster];
        let mut report = check::blank_agent_report();
        report.agent_id = check::agent_id(cluster);
        report.cluster_id.clone_from(&agent.inventory.cluster_id);
        report.applications.clone_from(&agent.inventory.applications);
        report.capacity = agent.inventory.capacity.clone();
        report.ams_reachable = agent.inventory.reachable;
        report.leaving = agent.leaving;
        report
    }

    fn report_agent(&mut self, cluster: usize) {
        let report = Arc::new(self.agent_report(cluster));
        for unit in 0..self.units.len() {
            let message = Message::AgentReport(report.clone());
            self.publish(Pid::Agent(cluster), Pid::Gateway(unit), message);
        }
        self.agents[cluster].told = Some(Arc::unwrap_or_clone(report));
    }

    fn publish_sessions(&mut self, cluster: usize, sessions: Vec<SessionReport>, complete: bool) {
        let unknown = self.agents[cluster].inventory.cluster_id.is_empty();
        if unknown || (sessions.is_empty() && !complete) {
            return;
        }
        self.agents[cluster].series += 1;
        let series = self.agents[cluster].series;
        let report = SessionsReport {
            version: 1,
            agent_id: check::agent_id(cluster),
            cluster_id: self.agents[cluster].inventory.cluster_id.clone(),
            complete,
            series,
            part: 0,
            parts: 1,
            sessions,
        };
        let report = Arc::new(report);
        // Every unit hears it to conclude what is lacking, and one to note the states.
        for unit in 0..self.units.len() {
            let message = Message::Absence(report.clone());
            self.publish(Pid::Agent(cluster), Pid::Gateway(unit), message);
        }
        if let Some(unit) = self.any_unit() {
            self.publish(Pid::Agent(cluster), unit, Message::SessionsReport(report));
        }
    }

    // --- streamers ------------------------------------------------------------------------------------------

    fn stream_open(&mut self, cluster: usize, number: u64) {
        let Some(connection) = self.connections.get(&number).filter(|connection| !connection.doomed) else {
            return;
        };
        let (session, instance) = (connection.session.clone(), connection.instance.clone());
        if let Some(old) = self.agents[cluster].streamers.insert(session.clone(), number) {
            self.doom_connection(old, 10);
        }
        self.with_sessions(cluster, |sessions, now| {
            ((), sessions.streamer_connected(now, &session, instance, number))
        });
    }

    fn stream_says(&mut self, cluster: usize, number: u64, up: StreamUp) {
        let Some(connection) = self.connections.get(&number) else { return };
        let session = connection.session.clone();
        if self.agents[cluster].streamers.get(&session) != Some(&number) {
            return;
        }
        match up {
            StreamUp::Link(packet) => {
                let instance_id = Some(connection.instance.clone());
                self.publish_down(cluster, Packet { instance_id, ..packet });
            }
            StreamUp::Status(status) => self.with_sessions(cluster, |sessions, _| {
                sessions.streamer_status(&session, number, status);
                ((), Vec::new())
            }),
        }
    }

    fn publish_down(&mut self, cluster: usize, packet: Packet) {
        for unit in 0..self.units.len() {
            let follows = self.units[unit].relays.keys().any(|(session, _)| *session == packet.session_id);
            if follows {
                let message = Message::Down(Box::new(packet.clone()));
                self.publish(Pid::Agent(cluster), Pid::Gateway(unit), message);
            }
        }
    }
}

/// What came back.
enum Answer {
    Listed(Arc<Listing>),
    Launched(Result<(InstanceId, Result<(), String>), String>),
    Gateway(GatewayResponse),
    Done,
}
