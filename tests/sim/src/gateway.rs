//! A simulated gateway unit: what `workloads/gateway/src/sessions.rs` and `relay.rs` do with the answers of the
//! session core, the choice of agents and the reliable link.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use fanlight_api::{
    AgentId, SessionId,
    bus::{
        AgentRequest, AgentResponse, GatewayRequest, GatewayResponse, InstanceState, SessionReport,
        SessionsReport,
    },
    gateway::SessionStatus,
    link::{Frame, Link, Packet, PacketKind, Side},
};
use fanlight_gateway::cores::{
    absence::Absence,
    agents::{Agents, Candidate},
    session::{Ending, Input, Origin, Session, Verdict, Waiting, Want},
};

use crate::{
    check,
    client::{Ask, Tell},
    note,
    planted::Planted,
    store::StoreFailure,
    world::{Message, Pid, Timer, World},
};

const ACCEPT_MS: u64 = 1000;
const AGENT_MS: u64 = 2000;
const RECONCILE_MS: u64 = 500;
const FIRST_PAUSE_MS: u64 = 1000;
const LAST_PAUSE_MS: u64 = 10_000;
const RENEW_MS: u64 = 2000;
const TRUST_MS: u64 = 6000;
const FIRST_REPORTS_MS: u64 = 3000;
const INSTANCE_MS: u64 = 300_000;
const LINGER_MS: u64 = 30_000;

/// What a unit has in memory.
#[derive(Default)]
pub struct Unit {
    /// It has seen the records and serves.
    pub ready: bool,
    started: u64,
    /// Agents it heard of.
    pub agents: Agents,
    /// Records as it knows them.
    pub index: BTreeMap<SessionId, (Arc<Session>, u64)>,
    /// The watch must be begun anew.
    pub watch_broken: bool,
    /// Nothing comes earlier than what came last.
    pub watch_at: u64,
    /// The watch tells nothing until then.
    pub watch_stalled_until: u64,
    asked: BTreeMap<SessionId, (u64, u64)>,
    absence: Absence,
    lease: Option<u64>,
    sign: u64,
    owner: bool,
    waiting: Waiting,
    /// Questions of the reconciler that are not answered.
    open: u32,
    calls: BTreeMap<u64, Call>,
    /// Open sockets by session and generation.
    pub relays: BTreeMap<(SessionId, u64), Relay>,
}

/// A question to an agent, and what its answer is for.
enum Call {
    Create(Box<Creating>),
    AcceptAgain(SessionId),
    End { session: SessionId, cluster_id: String, why: EndWhy },
    Credentials { reply: Reply, tell: Tell },
}

enum EndWhy {
    Forced(Reply),
    Beside,
    Again(Option<(u64, u64)>),
}

/// Whom to answer.
#[derive(Clone, Copy, Debug)]
pub struct Reply {
    client: usize,
    call: u64,
}

struct Creating {
    reply: Reply,
    session: Session,
    candidates: Vec<Candidate>,
    number: usize,
}

/// A create that waits for the first reports.
#[derive(Clone, Debug)]
pub struct Post {
    /// Idempotency key.
    pub key: Option<String>,
    /// What is asked for.
    pub joinable: bool,
    /// The record goes with its instance.
    pub ephemeral: bool,
    /// Minutes without a client.
    pub idle_time_min: u32,
}

/// Timers of a unit.
#[derive(Clone, Debug)]
pub enum GatewayTimer {
    /// The reconciler looks.
    Reconcile,
    /// The lease of the unit is renewed.
    Own,
    /// A question was not answered.
    Late(u64),
    /// A create tries again to find an agent.
    Create(Box<Post>, Reply),
    /// A link sends again.
    Link(SessionId, u64),
    /// A socket's instance did not answer, or its last frames were not taken.
    GiveUp(SessionId, u64, u64),
    /// Planted: what was acknowledged is written late.
    WriteLate(Box<Creating2>),
}

/// A record that is written after it was acknowledged.
#[derive(Clone, Debug)]
pub struct Creating2(Session);

/// A client's socket.
pub struct Relay {
    /// Number of the socket.
    pub socket: u64,
    /// Our end.
    pub link: Link,
    heard: bool,
    lingering: bool,
    /// A timer is planned for then.
    timer_at: Option<u64>,
}

impl Unit {
    /// Takes a record; an older one than known is ignored.
    pub fn index_put(&mut self, session: Arc<Session>, revision: u64) {
        let known = self.index.get(&session.id).map_or(0, |(_, revision)| *revision);
        if known < revision {
            self.index.insert(session.id.clone(), (session, revision));
        }
    }

    /// A record is gone.
    pub fn index_remove(&mut self, id: &SessionId) {
        self.index.remove(id);
    }

    fn is_due(&mut self, id: &SessionId, now: u64) -> bool {
        let (at, pause) = self.asked.get(id).copied().unwrap_or((now, FIRST_PAUSE_MS));
        if at > now {
            return false;
        }
        self.asked.insert(id.clone(), (now + pause, (pause * 2).min(LAST_PAUSE_MS)));
        true
    }
}

/// The agent behind an id of ours.
pub fn cluster_of(agent: &AgentId) -> Option<usize> {
    agent.as_str().strip_prefix('a')?.parse().ok()
}

type Step<T = ()> = Result<T, StoreFailure>;

impl World {
    /// A unit begins: nobody is served before the records are known.
    pub fn gateway_start(&mut self, unit: usize) {
        self.units[unit] = Unit { started: self.now, watch_broken: true, ..Unit::default() };
        let pid = Pid::Gateway(unit);
        self.store_watch_again(unit);
        self.timer_in(pid, RECONCILE_MS, Timer::Gateway(GatewayTimer::Reconcile));
        self.timer_in(pid, 1, Timer::Gateway(GatewayTimer::Own));
    }

    /// Keeps the lease of a unit, and with it, perhaps, the part of the one that looks after what waits.
    fn own(&mut self, unit: usize) {
        let now = self.now;
        self.timer_in(Pid::Gateway(unit), RENEW_MS, Timer::Gateway(GatewayTimer::Own));
        if !self.has_store(unit) {
            let one = &mut self.units[unit];
            if now >= one.sign + TRUST_MS {
                one.owner = false;
            }
            return;
        }
        let fresh = self.units[unit].lease.is_none();
        let lease = match self.units[unit].lease {
            Some(lease) => lease,
            None => self.fresh(),
        };
        let owned = match self.store.own(unit, lease, fresh, now) {
            Some(owned) => {
                self.units[unit].lease = Some(lease);
                owned
            }
            None if self.has(Planted::LeaseNotRearmed) => false,
            None => {
                // Ended while we were cut off: begin again at once with a new one.
                let lease = self.fresh();
                self.units[unit].lease = Some(lease);
                self.store.own(unit, lease, true, now).unwrap_or(false)
            }
        };
        let one = &mut self.units[unit];
        one.sign = now;
        one.owner = owned;
    }

    /// Something reached a unit.
    pub fn gateway_message(&mut self, unit: usize, from: Pid, message: Message) {
        match message {
            Message::Watch(watched) => return self.store_watched(unit, *watched),
            Message::SocketClosed(number) => return self.socket_closed(unit, number),
            _ if !self.units[unit].ready => return,
            _ => {}
        }
        match message {
            Message::AgentReport(report) => {
                let now = self.instant();
                self.units[unit].agents.report(now, (*report).clone());
            }
            Message::SessionsReport(report) => {
                for session in &report.sessions {
                    if self.take_session(unit, &report, session) == Err(StoreFailure::Died) {
                        return;
                    }
                }
            }
            Message::Absence(report) => self.look_for_absent(unit, &report),
            Message::AgentSays(call, response) => self.agent_said(unit, call, Some(*response)),
            Message::AskGateway(call, request) => {
                let response = match self.serve_agent(unit, *request) {
                    Ok(response) => response,
                    Err(StoreFailure::Died) => return,
                    Err(StoreFailure::Unusable) => GatewayResponse::Refused {
                        code: "internal".into(),
                        message: "the gateway's store failed".into(),
                        status: None,
                    },
                };
                self.publish(Pid::Gateway(unit), from, Message::GatewaySays(call, Box::new(response)));
            }
            Message::Down(packet) => self.relay_packet(unit, *packet),
            Message::Ask(call, ask) => {
                let Pid::Client(client) = from else { return };
                let reply = Reply { client, call };
                match *ask {
                    Ask::Create(post) => self.create(unit, reply, post),
                    Ask::Join(id) => self.join(unit, reply, &id),
                    Ask::Open { session, generation, socket } => {
                        self.open(unit, reply, &session, generation, socket);
                    }
                    Ask::Delete { session, force } => self.delete(unit, reply, &session, force),
                }
            }
            Message::SocketUp(number, text) => self.socket_text(unit, number, text),
            _ => {}
        }
    }

    /// Time passed for a unit.
    pub fn gateway_timer(&mut self, unit: usize, timer: GatewayTimer) {
        match timer {
            GatewayTimer::Reconcile => self.reconcile(unit),
            GatewayTimer::Own => self.own(unit),
            GatewayTimer::Late(call) => self.agent_said(unit, call, None),
            GatewayTimer::Create(post, reply) => self.create(unit, reply, *post),
            GatewayTimer::Link(session, generation) => {
                let (key, now) = ((session, generation), self.now);
                if let Some(relay) = self.units[unit].relays.get_mut(&key) {
                    relay.timer_at = relay.timer_at.filter(|at| *at > now);
                    self.relay_pump(unit, &key);
                }
            }
            GatewayTimer::GiveUp(session, generation, socket) => {
                let key = (session, generation);
                let Some(relay) = self.units[unit].relays.get(&key) else { return };
                if relay.socket == socket && (relay.lingering || !relay.heard) {
                    let lingering = relay.lingering;
                    if lingering {
                        self.units[unit].relays.remove(&key);
                    } else {
                        self.relay_end(unit, &key, Some("the instance did not answer"));
                    }
                }
            }
            GatewayTimer::WriteLate(late) => {
                let session = late.0;
                let id = session.id.clone();
                let _ = self.store_session(unit, &id, Some(session));
            }
        }
    }

    fn tell(&mut self, unit: usize, reply: Reply, tell: Tell) {
        if let Tell::Created { session, .. } = &tell {
            let id = session.clone();
            self.judge_acknowledged(&id);
        }
        let to = Pid::Client(reply.client);
        self.http(Pid::Gateway(unit), to, Message::Tell(reply.call, Box::new(tell)));
    }

    // --- create --------------------------------------------------------------------------------------------

    fn create(&mut self, unit: usize, reply: Reply, post: Post) {
        if self.try_create(unit, reply, post).is_err_and(|error| error == StoreFailure::Unusable) {
            self.tell(unit, reply, Tell::Failed);
        }
    }

    fn try_create(&mut self, unit: usize, reply: Reply, post: Post) -> Step {
        let pid = Pid::Gateway(unit);
        if let Some(key) = &post.key {
            self.store_read(unit)?;
            if let Some((known, _)) = self.store.repeats.get(key).cloned()
                && let Some(session) = self.store_change(unit, &known, Session::promise)?
            {
                let tell = Tell::Created { session: session.id.clone(), generation: session.generation };
                self.credentials(unit, reply, &session, tell);
                return Ok(());
            }
        }
        let now = self.instant();
        let candidates = match check::choose(&self.units[unit].agents, now, &mut self.rng) {
            Ok(candidates) => candidates,
            Err(_) if self.now < self.units[unit].started + FIRST_REPORTS_MS => {
                let again = GatewayTimer::Create(Box::new(post), reply);
                self.timer_in(pid, 50, Timer::Gateway(again));
                return Ok(());
            }
            Err(_) => {
                self.tell(unit, reply, Tell::Refused);
                return Ok(());
            }
        };
        let first = &candidates[0];
        let number = self.fresh();
        let mut session = check::blank_session();
        session.id = format!("s{number}").parse().expect("a valid id");
        session.region = first.region.clone();
        session.cluster_id = first.cluster_id.clone();
        session.agent_id = first.agent_id.clone();
        session.joinable = post.joinable;
        session.ephemeral = post.ephemeral;
        session.idle_time_min = post.idle_time_min;
        session.created_at = self.wall(pid);
        session.generation = 1;
        let id = session.id.clone();
        self.ledger.begin(&id, self.now, false);
        let later = self.now + ACCEPT_MS * candidates.len() as u64 + FIRST_PAUSE_MS;
        self.units[unit].asked.insert(id.clone(), (later, FIRST_PAUSE_MS));
        if self.has(Planted::AcknowledgedBeforeWritten) {
            let tell = Tell::Created { session: id, generation: 1 };
            self.tell(unit, reply, tell);
            let late = GatewayTimer::WriteLate(Box::new(Creating2(session)));
            self.timer_in(pid, 30, Timer::Gateway(late));
            return Ok(());
        }
        if let Some(key) = &post.key {
            self.judge_key(key, &id);
        }
        // One transaction; nothing comes between the two.
        if let Some(key) = &post.key
            && !self.has(Planted::RepeatForgotten)
        {
            self.store_read(unit)?;
            self.store.repeats.insert(key.clone(), (id.clone(), 0));
        }
        self.store_session(unit, &id, Some(session.clone()))?;
        let creating = Creating { reply, session, candidates, number: 0 };
        self.try_candidate(unit, creating)
    }

    fn try_candidate(&mut self, unit: usize, mut creating: Creating) -> Step {
        let Some(candidate) = creating.candidates.get(creating.number).cloned() else {
            let left = self.leave(unit, &creating.session, Session::give_up)?;
            if left.as_ref().is_some_and(|left| left.status == SessionStatus::Active) {
                self.taken_after_all(unit, creating.reply, left);
            } else {
                self.tell(unit, creating.reply, Tell::Refused);
            }
            return Ok(());
        };
        if creating.number > 0 {
            match self.leave(unit, &creating.session, |current| current.move_to(&candidate))? {
                Some(current) if current.cluster_id == candidate.cluster_id && current.ending.is_none() => {
                    creating.session = (*current).clone();
                }
                left => {
                    self.taken_after_all(unit, creating.reply, left);
                    return Ok(());
                }
            }
        }
        let request = AgentRequest::Accept(creating.session.launch());
        let session = creating.session.clone();
        self.ask_agent(unit, &session, request, ACCEPT_MS, Call::Create(Box::new(creating)));
        Ok(())
    }

    fn created(&mut self, unit: usize, mut creating: Creating, answer: Option<AgentResponse>) -> Step {
        if matches!(answer, Some(AgentResponse::Accepted { .. })) {
            let agent = creating.candidates[creating.number].agent_id.clone();
            self.units[unit].agents.placed(&agent);
            let tell = Tell::Created { session: creating.session.id.clone(), generation: 1 };
            self.tell(unit, creating.reply, tell);
            return Ok(());
        }
        creating.number += 1;
        self.try_candidate(unit, creating)
    }

    /// Takes a session away from an agent that refused it or did not answer.
    fn leave(
        &mut self,
        unit: usize,
        session: &Session,
        change: impl FnOnce(&Session) -> Verdict,
    ) -> Result<Option<Arc<Session>>, StoreFailure> {
        if !self.has(Planted::SecondClusterLeft) {
            self.store_other(unit, |store| {
                store.ended.insert(session.id.clone());
            })?;
        }
        let after = self.store_change(unit, &session.id, change)?;
        let left = after.as_ref().is_none_or(|after| after.cluster_id != session.cluster_id);
        if left && !self.has(Planted::SecondClusterLeft) {
            self.publish_end(unit, &session.agent_id, &session.id, "the session went elsewhere");
        }
        if after.is_none() {
            self.units[unit].asked.remove(&session.id);
        }
        Ok(after)
    }

    /// What a create that found its session changed by others answers.
    fn taken_after_all(&mut self, unit: usize, reply: Reply, session: Option<Arc<Session>>) {
        match session {
            Some(session) if session.is_live() => {
                let tell = Tell::Created { session: session.id.clone(), generation: session.generation };
                self.credentials(unit, reply, &session, tell);
            }
            _ => self.tell(unit, reply, Tell::Gone),
        }
    }

    fn publish_end(&mut self, unit: usize, agent: &AgentId, id: &SessionId, message: &str) {
        let Some(cluster) = cluster_of(agent) else { return };
        let end = AgentRequest::End { session_id: id.clone(), message: message.into(), force: true };
        let call = self.fresh();
        self.publish(Pid::Gateway(unit), Pid::Agent(cluster), Message::AskAgent(call, Box::new(end)));
    }

    fn ask_agent(&mut self, unit: usize, session: &Session, request: AgentRequest, time: u64, call: Call) {
        let number = self.fresh();
        let pid = Pid::Gateway(unit);
        let now = self.instant();
        let agent = self.units[unit].agents.of_session(now, &session.agent_id, &session.cluster_id);
        self.units[unit].calls.insert(number, call);
        if let Some(cluster) = cluster_of(&agent) {
            self.publish(pid, Pid::Agent(cluster), Message::AskAgent(number, Box::new(request)));
        }
        // Without a bus the question fails at once.
        let time = if self.has_bus(pid) { time } else { 1 };
        self.timer_in(pid, time, Timer::Gateway(GatewayTimer::Late(number)));
    }

    fn agent_said(&mut self, unit: usize, number: u64, answer: Option<AgentResponse>) {
        let Some(call) = self.units[unit].calls.remove(&number) else { return };
        match call {
            Call::Create(creating) => {
                let reply = creating.reply;
                if self.created(unit, *creating, answer) == Err(StoreFailure::Unusable) {
                    self.tell(unit, reply, Tell::Failed);
                }
            }
            Call::AcceptAgain(id) => {
                if let Some(AgentResponse::Refused { message, .. }) = answer {
                    let note =
                        |current: &Session| Verdict::Put(Box::new(Session { message, ..current.clone() }));
                    if self.store_change(unit, &id, note) == Err(StoreFailure::Died) {
                        return;
                    }
                }
                self.reconciled(unit);
            }
            Call::End { session, cluster_id, why } => {
                let silent = answer.is_none();
                if let Some(AgentResponse::Ending { state: InstanceState::Gone }) = answer
                    && self.handle_from(unit, &session, &cluster_id, &Input::Gone) == Err(StoreFailure::Died)
                {
                    return;
                }
                match why {
                    EndWhy::Beside => {}
                    EndWhy::Again(pause) => {
                        if let Some(pause) = pause {
                            self.units[unit].asked.insert(session, pause);
                        }
                        self.reconciled(unit);
                    }
                    EndWhy::Forced(reply) => {
                        let tell = match silent {
                            true => match self.forget(unit, &session) {
                                Ok(()) => Tell::Deleted,
                                Err(StoreFailure::Unusable) => Tell::Failed,
                                Err(StoreFailure::Died) => return,
                            },
                            false => Tell::Deleted,
                        };
                        self.tell(unit, reply, tell);
                    }
                }
            }
            Call::Credentials { reply, tell } => {
                let tell = match answer {
                    Some(AgentResponse::Accepted { .. }) => tell,
                    _ => Tell::Failed,
                };
                self.tell(unit, reply, tell);
            }
        }
    }

    fn credentials(&mut self, unit: usize, reply: Reply, session: &Session, tell: Tell) {
        let request = AgentRequest::Credentials { session_id: session.id.clone() };
        self.ask_agent(unit, session, request, AGENT_MS, Call::Credentials { reply, tell });
    }

    fn forget(&mut self, unit: usize, id: &SessionId) -> Step {
        self.ledger.forgotten(id);
        self.store_other(unit, |store| {
            store.ended.insert(id.clone());
        })?;
        if self.store.sessions.contains_key(id) {
            self.store_session(unit, id, None)?;
        }
        self.units[unit].asked.remove(id);
        Ok(())
    }

    fn handle(
        &mut self,
        unit: usize,
        id: &SessionId,
        input: &Input<'_>,
    ) -> Result<Option<Arc<Session>>, StoreFailure> {
        self.store_change(unit, id, |session| session.handle(input))
    }

    fn handle_from(
        &mut self,
        unit: usize,
        id: &SessionId,
        cluster_id: &str,
        input: &Input<'_>,
    ) -> Result<Option<Arc<Session>>, StoreFailure> {
        let careless = self.has(Planted::MovedNotNoticed);
        self.store_change(unit, id, |session| match careless {
            true => session.handle(input),
            false => session.handle_from(cluster_id, input),
        })
    }

    // --- join, delete ----------------------------------------------------------------------------------------

    fn join(&mut self, unit: usize, reply: Reply, id: &SessionId) {
        let mut refused = false;
        let joined = self.store_change(unit, id, |current| match current.join() {
            Ok(next) => Verdict::Put(Box::new(next)),
            Err(_) => {
                refused = true;
                Verdict::Keep
            }
        });
        match joined {
            Err(StoreFailure::Died) => {}
            Err(StoreFailure::Unusable) => self.tell(unit, reply, Tell::Failed),
            Ok(None) => self.tell(unit, reply, Tell::Gone),
            Ok(Some(_)) if refused => self.tell(unit, reply, Tell::Gone),
            Ok(Some(session)) => {
                let tell = Tell::Joined { generation: session.generation };
                self.credentials(unit, reply, &session, tell);
            }
        }
    }

    fn delete(&mut self, unit: usize, reply: Reply, id: &SessionId, force: bool) {
        self.ledger.end_wished(id);
        let ending = Ending { message: "the session was ended by its owner".into(), force };
        let found = self.store_read(unit).map(|()| self.store.sessions.get(id).cloned());
        let seen = match found {
            Ok(Some((session, _))) => session.seen,
            Ok(None) => return self.tell(unit, reply, Tell::Gone),
            Err(_) => return self.tell(unit, reply, Tell::Failed),
        };
        if !seen {
            let remembered = self.store_other(unit, |store| {
                store.ended.insert(id.clone());
            });
            match remembered {
                Ok(()) => {}
                Err(StoreFailure::Unusable) => return self.tell(unit, reply, Tell::Failed),
                Err(StoreFailure::Died) => return,
            }
        }
        match self.handle(unit, id, &Input::End(ending)) {
            Err(StoreFailure::Died) => {}
            Err(StoreFailure::Unusable) => self.tell(unit, reply, Tell::Failed),
            Ok(None) => self.tell(unit, reply, Tell::Deleted),
            Ok(Some(session)) if force => self.end(unit, &session, EndWhy::Forced(reply)),
            Ok(Some(session)) => {
                self.end(unit, &session, EndWhy::Beside);
                self.tell(unit, reply, Tell::Deleted);
            }
        }
    }

    fn end(&mut self, unit: usize, session: &Session, why: EndWhy) {
        let Some(ending) = &session.ending else {
            match why {
                EndWhy::Forced(reply) => self.tell(unit, reply, Tell::Deleted),
                EndWhy::Beside => {}
                EndWhy::Again(_) => self.reconciled(unit),
            }
            return;
        };
        let request = AgentRequest::End {
            session_id: session.id.clone(),
            message: ending.message.clone(),
            force: ending.force,
        };
        let again = self.now + AGENT_MS + FIRST_PAUSE_MS;
        self.units[unit].asked.insert(session.id.clone(), (again, FIRST_PAUSE_MS));
        let call = Call::End { session: session.id.clone(), cluster_id: session.cluster_id.clone(), why };
        self.ask_agent(unit, session, request, AGENT_MS, call);
    }

    // --- the reconciler ------------------------------------------------------------------------------------

    fn reconcile(&mut self, unit: usize) {
        let pid = Pid::Gateway(unit);
        self.store_watch_again(unit);
        if !self.has_bus(pid) || !self.units[unit].owner {
            // While we see nothing, or another unit is responsible, nothing is anybody's fault.
            self.units[unit].waiting.reset();
            self.units[unit].absence.reset();
            self.timer_in(pid, RECONCILE_MS, Timer::Gateway(GatewayTimer::Reconcile));
            return;
        }
        let pending: Vec<Arc<Session>> = self.units[unit]
            .index
            .values()
            .filter(|(session, _)| {
                matches!(session.status, SessionStatus::Created | SessionStatus::Terminating)
            })
            .map(|(session, _)| session.clone())
            .collect();
        let now = self.now;
        let asked = &mut self.units[unit].asked;
        asked.retain(|id, (at, _)| *at > now || pending.iter().any(|session| session.id == *id));
        let instant = self.instant();
        self.units[unit].waiting.see(instant, pending.iter().map(|session| &session.id));
        // One for this round itself, so that an answer cannot end it early.
        self.units[unit].open = 1;
        for session in pending {
            let tick = Input::Tick { waited: self.units[unit].waiting.waited(instant, &session.id) };
            if session.handle(&tick) != Verdict::Keep
                && self.handle(unit, &session.id, &tick) == Err(StoreFailure::Died)
            {
                return;
            }
            let want = session.wants();
            let once = match want {
                Want::Nothing => continue,
                Want::Accept => self.has(Planted::AcceptNotRepeated),
                Want::End => self.has(Planted::EndNotRepeated),
            };
            if once || !self.units[unit].is_due(&session.id, now) {
                continue;
            }
            self.units[unit].open += 1;
            match want {
                Want::End => {
                    let pause = self.units[unit].asked.get(&session.id).copied();
                    self.end(unit, &session, EndWhy::Again(pause));
                }
                _ => {
                    let request = AgentRequest::Accept(session.launch());
                    let call = Call::AcceptAgain(session.id.clone());
                    self.ask_agent(unit, &session, request, ACCEPT_MS, call);
                }
            }
        }
        self.reconciled(unit);
    }

    /// One question of a round is answered; the next round begins after the last one.
    fn reconciled(&mut self, unit: usize) {
        let Unit { open, absence, index, .. } = &mut self.units[unit];
        *open = open.saturating_sub(1);
        if *open == 0 {
            absence.forget(|id| index.contains_key(id));
            let pid = Pid::Gateway(unit);
            self.timer_in(pid, RECONCILE_MS, Timer::Gateway(GatewayTimer::Reconcile));
        }
    }

    // --- reports -------------------------------------------------------------------------------------------

    fn look_for_absent(&mut self, unit: usize, report: &SessionsReport) {
        let now = self.instant();
        let Unit { absence, index, owner, .. } = &mut self.units[unit];
        if !*owner {
            absence.reset();
            return;
        }
        let known = || -> Vec<SessionId> {
            index
                .values()
                .filter(|(session, _)| {
                    session.agent_id == report.agent_id
                        && session.cluster_id == report.cluster_id
                        && session.can_be_missed()
                })
                .map(|(session, _)| session.id.clone())
                .collect()
        };
        for id in absence.take(now, report, known) {
            note!(self, "unit {unit}: {id} has vanished");
            if self.handle_from(unit, &id, &report.cluster_id, &Input::Missing) == Err(StoreFailure::Died) {
                return;
            }
        }
    }

    fn take_session(&mut self, unit: usize, from: &SessionsReport, report: &SessionReport) -> Step {
        let id = &report.session_id;
        let remains = !matches!(report.state, InstanceState::Ending | InstanceState::Gone);
        let mut session = self.units[unit].index.get(id).map(|(session, _)| session.clone());
        if remains
            && session.as_ref().is_none_or(|session| session.cluster_id != from.cluster_id)
            && !self.has(Planted::IndexBelieved)
        {
            if self.store_read(unit).is_err() {
                return Ok(());
            }
            match self.store.sessions.get(id).cloned() {
                Some((found, revision)) => {
                    self.units[unit].index_put(found.clone(), revision);
                    session = Some(found);
                }
                None => {
                    self.units[unit].index_remove(id);
                    session = None;
                }
            }
        }
        let Some(session) = session else {
            if remains && self.has_store(unit) && self.store.ended.contains(id) {
                self.publish_end(unit, &from.agent_id, id, "the session has ended");
            }
            return Ok(());
        };
        if session.cluster_id != from.cluster_id {
            if remains && !self.has(Planted::SecondClusterLeft) {
                note!(self, "unit {unit}: {id} runs in a second cluster");
                self.publish_end(unit, &from.agent_id, id, "the session runs elsewhere");
            }
            return Ok(());
        }
        let now = self.instant();
        let keeps = self.units[unit].agents.is_alive(now, &session.agent_id);
        let agent_id = if keeps { &session.agent_id } else { &from.agent_id };
        let input = Input::Report { agent_id, report };
        if session.handle(&input) == Verdict::Keep {
            return Ok(());
        }
        match self.handle_from(unit, id, &from.cluster_id, &input) {
            Err(StoreFailure::Died) => Err(StoreFailure::Died),
            _ => Ok(()),
        }
    }

    fn serve_agent(&mut self, unit: usize, request: GatewayRequest) -> Step<GatewayResponse> {
        match request {
            GatewayRequest::EndSession { session_id } => {
                self.ledger.end_wished(&session_id);
                self.handle(unit, &session_id, &Input::Gone)?;
                Ok(GatewayResponse::Ended)
            }
            GatewayRequest::CreateSession { agent_id, region, cluster_id, instance_id, .. } => {
                self.store_read(unit)?;
                if let Some(known) = self.store.instances.get(&instance_id)
                    && let Some((session, _)) = self.store.sessions.get(known)
                {
                    return Ok(GatewayResponse::Created {
                        session_id: session.id.clone(),
                        joinable: session.joinable,
                        idle_time_min: session.idle_time_min,
                    });
                }
                let number = self.fresh();
                let mut session = check::blank_session();
                session.id = format!("s{number}").parse().expect("a valid id");
                session.origin = Origin::Ams;
                session.region = region;
                session.cluster_id = cluster_id;
                session.agent_id = agent_id;
                session.instance_id = Some(instance_id.clone());
                session.joinable = true;
                session.ephemeral = true;
                session.created_at = self.wall(Pid::Gateway(unit));
                let id = session.id.clone();
                self.ledger.begin(&id, self.now, true);
                self.store.instances.insert(instance_id, id.clone());
                self.store_session(unit, &id, Some(session))?;
                Ok(GatewayResponse::Created { session_id: id, joinable: true, idle_time_min: 0 })
            }
            GatewayRequest::CreateShare { .. }
            | GatewayRequest::UpdateShare { .. }
            | GatewayRequest::DeleteShare { .. } => unreachable!("nobody shares in the simulation"),
        }
    }

    // --- sockets -------------------------------------------------------------------------------------------

    fn open(&mut self, unit: usize, reply: Reply, id: &SessionId, generation: u64, socket: u64) {
        let mut refused = false;
        let opened = self.store_change(unit, id, |current| match current.open(generation) {
            Ok(next) => Verdict::Put(Box::new(next)),
            Err(_) => {
                refused = true;
                Verdict::Keep
            }
        });
        let tell = match opened {
            Err(StoreFailure::Died) => return,
            Err(StoreFailure::Unusable) => Tell::Failed,
            Ok(None) => Tell::Gone,
            Ok(Some(session)) if refused && !session.is_live() => Tell::Gone,
            Ok(Some(_)) if refused => Tell::Failed,
            Ok(Some(_)) => Tell::Opened { generation },
        };
        if !matches!(tell, Tell::Opened { .. }) {
            return self.tell(unit, reply, tell);
        }
        let known = self.sockets.get(&socket).is_some_and(|socket| !socket.doomed);
        if !known {
            return;
        }
        let mut link = Link::new(id.clone(), generation, Side::Client);
        link.send(Frame::Open { screen: None, stun_servers: Vec::new() }).expect("the first frame fits");
        let key = (id.clone(), generation);
        self.units[unit]
            .relays
            .insert(key.clone(), Relay { socket, link, heard: false, lingering: false, timer_at: None });
        let give_up = GatewayTimer::GiveUp(key.0.clone(), generation, socket);
        self.timer_in(Pid::Gateway(unit), INSTANCE_MS, Timer::Gateway(give_up));
        self.relays_follow(unit, id);
        // The upgrade is answered on the socket itself.
        self.deliver(
            2,
            Pid::Gateway(unit),
            Pid::Client(reply.client),
            Message::Tell(reply.call, Box::new(tell)),
        );
        self.relay_pump(unit, &key);
    }

    fn relay_key(&self, unit: usize, socket: u64) -> Option<(SessionId, u64)> {
        let found = self.units[unit].relays.iter().find(|(_, relay)| relay.socket == socket);
        found.map(|(key, _)| key.clone())
    }

    fn socket_text(&mut self, unit: usize, socket: u64, text: String) {
        let Some(key) = self.relay_key(unit, socket) else { return };
        let Some(relay) = self.units[unit].relays.get_mut(&key).filter(|relay| !relay.lingering) else {
            return;
        };
        if relay.link.send(Frame::Text { text }).is_err() {
            return self.relay_end(unit, &key, Some("too much"));
        }
        self.relay_pump(unit, &key);
    }

    fn socket_closed(&mut self, unit: usize, socket: u64) {
        let Some(key) = self.relay_key(unit, socket) else {
            self.sockets.remove(&socket);
            return;
        };
        self.relay_end(unit, &key, None);
    }

    fn relay_packet(&mut self, unit: usize, packet: Packet) {
        let reuse = self.has(Planted::LinkNumberReused);
        let keys: Vec<(SessionId, u64)> =
            self.units[unit].relays.keys().filter(|(id, _)| *id == packet.session_id).cloned().collect();
        for key in keys {
            let Some(relay) = self.units[unit].relays.get_mut(&key) else { continue };
            relay.heard |=
                packet.from == Side::Instance && (packet.generation == key.1 || packet.generation == 0);
            if reuse && matches!(packet.kind, PacketKind::Hello) {
                relay.link = Link::new(key.0.clone(), key.1, Side::Client);
            }
            relay.link.receive(packet.clone());
            match relay.link.is_broken() {
                true if relay.lingering => {
                    self.units[unit].relays.remove(&key);
                }
                true => self.relay_end(unit, &key, Some("the session went to another instance")),
                false => self.relay_pump(unit, &key),
            }
        }
    }

    /// What the record says to the sockets of a session.
    pub fn relays_follow(&mut self, unit: usize, id: &SessionId) {
        if self.units[unit].relays.is_empty() {
            return;
        }
        let keys: Vec<(SessionId, u64)> =
            self.units[unit].relays.keys().filter(|(session, _)| session == id).cloned().collect();
        for key in keys {
            let session = self.units[unit].index.get(id).map(|(session, _)| session.clone());
            let why = match &session {
                None => Some("the session has ended"),
                Some(session) if session.used_generation > key.1 => Some("another client took over"),
                Some(session) if !session.is_live() => Some("the session has ended"),
                Some(_) => None,
            };
            let Some(relay) = self.units[unit].relays.get_mut(&key) else { continue };
            let lingering = relay.lingering;
            if let Some(instance_id) = session.as_ref().and_then(|session| session.instance_id.as_ref()) {
                relay.link.expect(instance_id);
            }
            let why = why.or(relay.link.is_broken().then_some("the session went to another instance"));
            match why {
                Some(why) if !lingering => self.relay_end(unit, &key, Some(why)),
                _ if lingering && session.is_none() => {
                    self.units[unit].relays.remove(&key);
                }
                _ => {}
            }
        }
    }

    /// The socket is closed; its last frames are still delivered.
    fn relay_end(&mut self, unit: usize, key: &(SessionId, u64), error: Option<&str>) {
        let Some(relay) = self.units[unit].relays.get_mut(key).filter(|relay| !relay.lingering) else {
            return;
        };
        relay.lingering = true;
        let socket = relay.socket;
        let _ = relay.link.send(Frame::Closed);
        if let Some(error) = error {
            self.on_socket(socket, false, format!("error: {error}"));
            self.close_socket(socket, true);
        }
        if self.units[unit].index.contains_key(&key.0) {
            let give_up = GatewayTimer::GiveUp(key.0.clone(), key.1, socket);
            self.timer_in(Pid::Gateway(unit), LINGER_MS, Timer::Gateway(give_up));
            self.relay_pump(unit, key);
        } else {
            self.units[unit].relays.remove(key);
        }
    }

    /// Drains a link both ways and sleeps until it has something again.
    fn relay_pump(&mut self, unit: usize, key: &(SessionId, u64)) {
        let now = self.instant();
        let ignores = self.has(Planted::LostAckIgnored);
        let Some(relay) = self.units[unit].relays.get_mut(key) else { return };
        let (mut frames, mut packets) = (Vec::new(), Vec::new());
        while let Some(frame) = relay.link.poll_frame() {
            frames.push(frame);
        }
        while let Some(packet) = relay.link.poll_transmit(now) {
            if ignores && let PacketKind::Data { seq, .. } = packet.kind {
                let kind = PacketKind::Ack { next: seq + 1 };
                relay.link.receive(Packet { from: Side::Instance, kind, ..packet.clone() });
            }
            packets.push(packet);
        }
        let broken = relay.link.is_broken();
        let (deadline, lingering, settled) =
            (relay.link.deadline(), relay.lingering, relay.link.is_settled() || broken);
        let socket = relay.socket;
        for packet in packets {
            self.publish_up(unit, packet);
        }
        if lingering {
            if settled {
                self.units[unit].relays.remove(key);
                return;
            }
        } else if broken {
            return self.relay_end(unit, key, Some("the session went to another instance"));
        } else {
            for frame in frames {
                match frame {
                    Frame::Text { text } => self.on_socket(socket, false, text),
                    Frame::Closed => {
                        self.close_socket(socket, true);
                        self.relay_end(unit, key, None);
                        return;
                    }
                    Frame::Open { .. } => {}
                }
            }
        }
        if let Some(deadline) = deadline {
            let delay = deadline.saturating_duration_since(now).max(Duration::from_millis(1));
            let delay = delay.as_millis() as u64;
            let at = self.now + delay;
            let Some(relay) = self.units[unit].relays.get_mut(key) else { return };
            if relay.timer_at.is_none_or(|planned| planned > at) {
                relay.timer_at = Some(at);
                let timer = GatewayTimer::Link(key.0.clone(), key.1);
                self.timer_in(Pid::Gateway(unit), delay, Timer::Gateway(timer));
            }
        }
    }

    fn publish_up(&mut self, unit: usize, packet: Packet) {
        for cluster in 0..self.agents.len() {
            if self.agents[cluster].has_streamer(&packet.session_id) {
                let message = Message::Up(Box::new(packet.clone()));
                self.publish(Pid::Gateway(unit), Pid::Agent(cluster), message);
            }
        }
    }
}
