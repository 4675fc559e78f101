//! The life of a session as a pure value: what reports, calls and timers make of its record, and what the record
//! asks for. No clock, no store, no bus; the shell is [`crate::sessions`].
//!
//! ```text
//! created ──► active ──► terminating ──► terminated ──► (record removed if ephemeral)
//!    │           │
//!    └──► error ◄┘        error ──► active   when the instance runs again
//! ```
//! Every input is level-triggered: the same input twice changes nothing the second time, because the bus repeats
//! and loses messages. What must happen outside is not queued here but read off the record ([`Session::wants`])
//! and repeated until a report shows that it happened.

use fanlight_api::{
    AgentId, InstanceId, SessionId,
    agent_link::ClientState,
    bus::{InstanceState, Launch, SessionReport},
    gateway::{self, Screen, SessionStatus},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// How long an instance may take to run, seconds.
pub const CREATION_SECONDS: i64 = 300;

/// Who asked for a session first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// A caller of our API: the instance lives for the session.
    #[default]
    Gateway,
    /// AMS: the session lives for the instance.
    Ams,
}

/// The record of a session.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Session {
    /// Id.
    pub id: SessionId,
    /// Who asked first.
    #[serde(default)]
    pub origin: Origin,
    /// Account that created it; empty for AMS.
    #[serde(default)]
    pub account: String,
    /// Application name.
    pub app: String,
    /// Absent: the latest published.
    #[serde(default)]
    pub app_version: Option<u32>,
    /// Where it runs.
    pub region: String,
    /// Cluster that runs it.
    pub cluster_id: String,
    /// Agent that took it, or that last reported it.
    pub agent_id: AgentId,
    /// Its instance, once known.
    #[serde(default)]
    pub instance_id: Option<InstanceId>,
    /// Whether an agent ever reported an instance for it.
    #[serde(default)]
    pub seen: bool,
    /// Display at launch.
    pub screen: Screen,
    /// Whether another client may come after the first left.
    pub joinable: bool,
    /// Whether the record goes when the instance ends.
    pub ephemeral: bool,
    /// Minutes without a client; 0 = never.
    pub idle_time_min: u32,
    /// The caller's data.
    #[serde(default)]
    pub extra_data: Value,
    /// Counts launches.
    pub attempt: u32,
    /// State.
    pub status: SessionStatus,
    /// Detail.
    #[serde(default)]
    pub message: String,
    /// Unix seconds.
    pub created_at: i64,
    /// Unix milliseconds, for measuring its steps.
    #[serde(default)]
    pub created_ms: i64,
    /// Newest generation for which a socket token was made.
    pub generation: u64,
    /// Newest generation whose socket was opened; 0: none.
    #[serde(default)]
    pub used_generation: u64,
    /// Whether a client ever had the stream, and whether the last one left.
    #[serde(default)]
    pub client: Client,
    /// The wish to end it.
    #[serde(default)]
    pub ending: Option<Ending>,
}

/// What is known of the clients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Client {
    /// None had the stream so far.
    #[default]
    Never,
    /// One has it.
    Connected,
    /// The last one left.
    Left,
}

/// A wish to end a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ending {
    /// Shown to a connected client.
    pub message: String,
    /// Skip the graceful stop.
    pub force: bool,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Input<'a> {
    /// An agent of the session's cluster reports it.
    Report {
        /// Who.
        agent_id: &'a AgentId,
        /// What.
        report: &'a SessionReport,
    },
    /// Complete reports of its agent lack it, for longer than a late message explains.
    Missing,
    /// A caller wants it to end.
    End(Ending),
    /// There is nothing left to end: the agent or AMS said so.
    Gone,
    /// Time passed. The observer was able to see reports since this Unix second.
    Tick {
        /// Time without observation does not count against a session.
        observing_since: i64,
    },
}

/// What becomes of a record.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// Nothing changed.
    Keep,
    /// Write this.
    Put(Box<Session>),
    /// Remove it.
    Remove,
}

/// What has to be asked of the agent, again and again until a report shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// Nothing.
    Nothing,
    /// To take the session.
    Accept,
    /// To end it.
    End,
}

/// Why a socket was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenRefused {
    /// The session is over.
    Ended,
    /// A newer generation has been used.
    Older,
    /// This token was used before.
    Used,
}

impl Session {
    /// As shown to callers.
    pub fn show(&self) -> gateway::Session {
        gateway::Session {
            id: self.id.clone(),
            app: self.app.clone(),
            region: self.region.clone(),
            cluster_id: self.cluster_id.clone(),
            container_id: self.instance_id.as_ref().map(ToString::to_string).unwrap_or_default(),
            joinable: self.joinable,
            status: self.status,
            status_message: self.message.clone(),
        }
    }

    /// As handed to an agent.
    pub fn launch(&self) -> Launch {
        Launch {
            session_id: self.id.clone(),
            attempt: self.attempt,
            app: self.app.clone(),
            app_version: self.app_version,
            screen: self.screen,
            joinable: self.joinable,
            ephemeral: self.ephemeral,
            idle_time_min: self.idle_time_min,
            extra_data: self.extra_data.clone(),
        }
    }

    /// Whether it has, or will have, an instance that clients can reach.
    pub fn is_live(&self) -> bool {
        matches!(self.status, SessionStatus::Created | SessionStatus::Active)
    }

    /// What has to be asked of the agent now.
    pub fn wants(&self) -> Want {
        match self.status {
            SessionStatus::Created if self.origin == Origin::Gateway && !self.seen => Want::Accept,
            SessionStatus::Terminating if self.ending.is_some() => Want::End,
            _ => Want::Nothing,
        }
    }

    /// What an input makes of the record.
    pub fn handle(&self, now: i64, input: &Input<'_>) -> Verdict {
        let mut next = self.clone();
        let keep = match input {
            Input::Report { agent_id, report } => next.report(agent_id, report),
            Input::Missing => next.missing(),
            Input::End(ending) => next.end(ending),
            Input::Gone => next.gone("the instance is gone"),
            Input::Tick { observing_since } => next.tick(now, *observing_since),
        };
        match keep {
            false => Verdict::Remove,
            true if next == *self => Verdict::Keep,
            true => Verdict::Put(Box::new(next)),
        }
    }

    /// Returns whether the record stays; so do the next ones.
    fn report(&mut self, agent_id: &AgentId, report: &SessionReport) -> bool {
        self.agent_id = agent_id.clone();
        if let Some(instance_id) = &report.instance_id {
            self.instance_id = Some(instance_id.clone());
        }
        if report.state != InstanceState::Gone {
            self.seen = true;
        }
        let message = report.message.clone().unwrap_or_default();
        match report.state {
            InstanceState::Gone => return self.gone(or(&message, "the instance is gone")),
            // Once its end is wished for, only the instance's absence ends the session.
            _ if self.ending.is_some() => {}
            InstanceState::Launching | InstanceState::Starting => {
                if self.status == SessionStatus::Created {
                    self.message = message;
                }
            }
            InstanceState::Running => {
                self.status = SessionStatus::Active;
                self.message.clear();
            }
            InstanceState::Ending => {
                if self.is_live() {
                    self.status = SessionStatus::Terminating;
                    self.message = or(&message, "the instance is being stopped").into();
                }
            }
            InstanceState::Stopped => {
                if self.status != SessionStatus::Error {
                    self.status = SessionStatus::Terminated;
                    self.message = or(&message, "the instance has ended").into();
                    // An instance of AMS's can be started again; its session goes when it goes.
                    return self.origin == Origin::Ams || !self.ephemeral;
                }
            }
            InstanceState::Failed => {
                self.status = SessionStatus::Error;
                self.message = or(&message, "the instance failed").into();
            }
        }
        match &report.client {
            Some(client) if client.state != ClientState::Signalling => self.client = Client::Connected,
            // Without its streamer an agent does not know, and has not heard that anybody left.
            None if self.client == Client::Connected && report.streamer_connected => {
                self.client = Client::Left
            }
            _ => {}
        }
        true
    }

    fn missing(&mut self) -> bool {
        // Before the first report there may be no instance yet.
        if self.seen || self.ending.is_some() { self.gone("the instance has vanished") } else { true }
    }

    fn end(&mut self, ending: &Ending) -> bool {
        if self.status == SessionStatus::Terminated && self.origin == Origin::Gateway {
            // Nothing runs; all that is left is the record.
            return false;
        }
        self.status = SessionStatus::Terminating;
        self.message.clone_from(&ending.message);
        match &mut self.ending {
            Some(before) => before.force |= ending.force,
            None => self.ending = Some(ending.clone()),
        }
        true
    }

    fn gone(&mut self, message: &str) -> bool {
        if self.ending.is_some() {
            // A caller's wish ends non-ephemeral sessions as `terminated`, failed ones are forgotten.
            self.status = SessionStatus::Terminated;
            self.ending = None;
            return !self.ephemeral && self.origin == Origin::Gateway;
        }
        match self.status {
            // The agent may have forgotten a launch that was never reported: it is asked again.
            SessionStatus::Created if !self.seen && self.origin == Origin::Gateway => true,
            // Kept for diagnosis until somebody removes it.
            SessionStatus::Error => true,
            SessionStatus::Terminated => self.origin == Origin::Gateway,
            SessionStatus::Created | SessionStatus::Active | SessionStatus::Terminating => {
                self.status = SessionStatus::Terminated;
                self.message = message.into();
                !self.ephemeral && self.origin == Origin::Gateway
            }
        }
    }

    fn tick(&mut self, now: i64, observing_since: i64) -> bool {
        let waiting_since = self.created_at.max(observing_since);
        if self.status == SessionStatus::Created && now - waiting_since >= CREATION_SECONDS {
            let last =
                or(&self.message, if self.seen { "it was starting" } else { "its agent never reported it" });
            self.message = format!("the instance did not run within {CREATION_SECONDS} s: {last}");
            self.status = SessionStatus::Error;
        }
        true
    }

    /// Counts a new generation, for a join.
    ///
    /// # Errors
    /// Says in words why the session cannot be joined.
    pub fn join(&self) -> Result<Self, String> {
        if !self.is_live() {
            let status = serde_json::to_value(self.status).unwrap_or_default();
            let status = status.as_str().unwrap_or_default();
            return Err(match self.message.as_str() {
                "" => format!("session {} is {status} and cannot be joined", self.id),
                message => format!("session {} is {status} and cannot be joined: {message}", self.id),
            });
        }
        if !self.joinable && self.client == Client::Left {
            return Err(format!("session {} is not joinable and its client has left", self.id));
        }
        Ok(Self { generation: self.generation + 1, ..self.clone() })
    }

    /// Binds a generation to the socket that is being opened.
    ///
    /// # Errors
    /// The session is over, or the token was used or outdated.
    pub fn open(&self, generation: u64) -> Result<Self, OpenRefused> {
        if !self.is_live() {
            return Err(OpenRefused::Ended);
        }
        if generation < self.used_generation {
            return Err(OpenRefused::Older);
        }
        if generation == self.used_generation {
            return Err(OpenRefused::Used);
        }
        Ok(Self { used_generation: generation, ..self.clone() })
    }
}

fn or<'a>(text: &'a str, otherwise: &'a str) -> &'a str {
    if text.is_empty() { otherwise } else { text }
}

#[cfg(test)]
pub(crate) mod tests {
    use fanlight_api::agent_link::ClientStatus;

    use super::*;

    const NOW: i64 = 1_000_000;

    pub(crate) fn session() -> Session {
        Session {
            id: "s1".parse().expect("id"),
            origin: Origin::Gateway,
            account: "me".into(),
            app: "terminal".into(),
            app_version: None,
            region: "here".into(),
            cluster_id: "cluster0".into(),
            agent_id: "a1".parse().expect("id"),
            instance_id: None,
            seen: false,
            screen: Screen::default(),
            joinable: true,
            ephemeral: true,
            idle_time_min: 30,
            extra_data: Value::Null,
            attempt: 1,
            status: SessionStatus::Created,
            message: String::new(),
            created_at: NOW,
            created_ms: NOW * 1000,
            generation: 1,
            used_generation: 0,
            client: Client::Never,
            ending: None,
        }
    }

    fn report(state: InstanceState) -> SessionReport {
        SessionReport {
            session_id: "s1".parse().expect("id"),
            instance_id: Some("i1".parse().expect("id")),
            state,
            message: None,
            streamer_connected: true,
            client: None,
            idle_since: None,
            steps: vec![],
        }
    }

    fn end() -> Input<'static> {
        Input::End(Ending { message: "deleted".into(), force: false })
    }

    /// Applies an input; `None` when the record goes.
    fn after(session: &Session, input: &Input<'_>) -> Option<Session> {
        match session.handle(NOW, input) {
            Verdict::Keep => Some(session.clone()),
            Verdict::Put(next) => Some(*next),
            Verdict::Remove => None,
        }
    }

    fn reported(session: &Session, state: InstanceState) -> Option<Session> {
        let agent_id = session.agent_id.clone();
        after(session, &Input::Report { agent_id: &agent_id, report: &report(state) })
    }

    #[test]
    fn statuses_follow_the_instance() {
        use InstanceState::*;
        use SessionStatus as S;
        for (path, ephemeral, want) in [
            (&[Launching][..], true, Some(S::Created)),
            (&[Launching, Starting, Running], true, Some(S::Active)),
            (&[Running, Ending], true, Some(S::Terminating)),
            (&[Running, Ending, Stopped], true, None),
            (&[Running, Ending, Stopped], false, Some(S::Terminated)),
            (&[Running, Stopped, Gone], false, Some(S::Terminated)),
            (&[Running, Gone], true, None),
            (&[Running, Gone], false, Some(S::Terminated)),
            (&[Running, Failed], true, Some(S::Error)),
            (&[Failed, Gone], true, Some(S::Error)),
            (&[Failed, Stopped], true, Some(S::Error)),
            (&[Failed, Starting, Running], true, Some(S::Active)),
            (&[Gone], true, Some(S::Created)),
            (&[Starting, Gone], true, None),
        ] {
            let start = Session { ephemeral, ..session() };
            let last = path.iter().try_fold(start, |session, state| reported(&session, *state));
            assert_eq!(last.map(|session| session.status), want, "{path:?} ephemeral {ephemeral}");
        }
    }

    #[test]
    fn a_session_whose_end_is_wished_for_stays_terminating_until_the_instance_is_gone() {
        use InstanceState::*;
        let session = reported(&session(), Running).expect("kept");
        let mut session = after(&session, &end()).expect("kept");
        for state in [Running, Ending, Stopped, Failed, Starting] {
            session = reported(&session, state).expect("kept");
            assert_eq!((session.status, session.wants()), (SessionStatus::Terminating, Want::End));
        }
        assert_eq!(reported(&session, Gone), None);
        let kept = after(&Session { ephemeral: false, ..session }, &Input::Gone).expect("kept");
        assert_eq!((kept.status, kept.wants()), (SessionStatus::Terminated, Want::Nothing));
        assert_eq!(after(&kept, &end()), None, "a second delete removes the record");
    }

    #[test]
    fn a_launch_that_no_agent_reported_is_wanted_again_until_its_time_is_over() {
        let created = session();
        assert_eq!(created.wants(), Want::Accept);
        assert_eq!(after(&created, &Input::Missing), Some(created.clone()));
        let tick =
            |session: &Session, now, since| session.handle(now, &Input::Tick { observing_since: since });
        assert_eq!(tick(&created, NOW + CREATION_SECONDS - 1, 0), Verdict::Keep);
        assert_eq!(
            tick(&created, NOW + CREATION_SECONDS, NOW + 1),
            Verdict::Keep,
            "time without observation does not count"
        );
        let Verdict::Put(failed) = tick(&created, NOW + CREATION_SECONDS, 0) else { panic!("no time-out") };
        assert_eq!((failed.status, failed.wants()), (SessionStatus::Error, Want::Nothing));
        assert!(failed.message.contains("300 s"), "{}", failed.message);
        let seen = reported(&created, InstanceState::Launching).expect("kept");
        assert_eq!(seen.wants(), Want::Nothing);
    }

    #[test]
    fn a_session_of_an_ams_instance_lives_as_long_as_the_instance() {
        use InstanceState::*;
        let session = Session { origin: Origin::Ams, ..session() };
        assert_eq!(session.wants(), Want::Nothing, "AMS starts the instance by itself");
        assert_eq!(after(&session, &Input::Missing), Some(session.clone()), "not started yet");
        let stopped =
            [Running, Stopped].iter().try_fold(session, |session, state| reported(&session, *state));
        let stopped = stopped.expect("a stopped instance can be started again");
        assert_eq!(stopped.status, SessionStatus::Terminated);
        assert_eq!(reported(&stopped, Running).expect("kept").status, SessionStatus::Active);
        assert_eq!(reported(&stopped, Gone), None);
    }

    #[test]
    fn joins_are_counted_and_refused_where_no_client_could_come() {
        let joined = session().join().expect("created");
        assert_eq!(joined.generation, 2);
        for status in [SessionStatus::Error, SessionStatus::Terminating, SessionStatus::Terminated] {
            assert!(Session { status, ..session() }.join().is_err(), "{status:?}");
        }
        let running =
            reported(&Session { joinable: false, ..session() }, InstanceState::Running).expect("kept");
        let mut with_client = report(InstanceState::Running);
        with_client.client = Some(ClientStatus { generation: 1, state: ClientState::Streaming });
        let agent_id = running.agent_id.clone();
        let watched =
            after(&running, &Input::Report { agent_id: &agent_id, report: &with_client }).expect("kept");
        assert!(watched.join().is_ok(), "the first client is still there");
        let left = reported(&watched, InstanceState::Running).expect("kept");
        assert!(left.join().expect_err("left").contains("not joinable"));
        assert!(Session { joinable: true, ..left }.join().is_ok());
    }

    #[test]
    fn a_socket_token_opens_once_and_not_after_a_newer_one() {
        let session = Session { generation: 3, ..session() };
        let second = session.open(2).expect("newest used so far");
        assert_eq!(second.open(2), Err(OpenRefused::Used));
        assert_eq!(second.open(1), Err(OpenRefused::Older));
        let third = second.open(3).expect("newer");
        assert_eq!(third.open(2), Err(OpenRefused::Older));
        let ended = after(&third, &end()).expect("kept");
        assert_eq!(ended.open(4), Err(OpenRefused::Ended));
    }

    #[test]
    fn no_order_of_events_breaks_the_rules() {
        use InstanceState::*;
        let states = [Launching, Starting, Running, Ending, Stopped, Failed, Gone];
        for seed in 1..400_u64 {
            let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let mut random = move |below: u64| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state % below
            };
            let origin = if random(3) == 0 { Origin::Ams } else { Origin::Gateway };
            let mut session =
                Session { origin, ephemeral: random(2) == 0, joinable: random(2) == 0, ..session() };
            let mut now = NOW;
            for step in 0..60 {
                now += random(60) as i64;
                let agent_id = session.agent_id.clone();
                let mut report = report(states[random(states.len() as u64) as usize]);
                if random(2) == 0 {
                    report.client = Some(ClientStatus { generation: 1, state: ClientState::Streaming });
                }
                let input = match random(12) {
                    0 => Input::Missing,
                    1 => end(),
                    2 => Input::Gone,
                    3 => Input::Tick { observing_since: 0 },
                    4 => {
                        session = session.join().unwrap_or(session);
                        continue;
                    }
                    5 => {
                        let generation = 1 + random(session.generation);
                        session = session.open(generation).unwrap_or(session);
                        continue;
                    }
                    _ => Input::Report { agent_id: &agent_id, report: &report },
                };
                let before = session.clone();
                let context = || format!("seed {seed} step {step} {input:?} on {before:?}");
                match session.handle(now, &input) {
                    Verdict::Keep => {}
                    Verdict::Remove => {
                        let wished = before.ending.is_some() || matches!(input, Input::End(_));
                        let by_rule = before.ephemeral || before.origin == Origin::Ams || wished;
                        assert!(by_rule, "{}", context());
                        assert!(before.status != SessionStatus::Error || wished, "{}", context());
                        break;
                    }
                    Verdict::Put(next) => session = *next,
                }
                let again = session.handle(now, &input);
                let of_absence = matches!(input, Input::End(_) | Input::Gone)
                    || matches!(input, Input::Report { report, .. } if report.state == Gone);
                let removed_twice = again == Verdict::Remove && of_absence;
                assert!(
                    again == Verdict::Keep || removed_twice || before.client != session.client,
                    "not idempotent: {} then {again:?}",
                    context()
                );
                assert!(session.used_generation <= session.generation, "{}", context());
                assert_eq!(
                    session.ending.is_some(),
                    session.ending.is_some() && session.status == SessionStatus::Terminating
                );
                assert!(
                    session.status != SessionStatus::Error || !session.message.is_empty(),
                    "{}",
                    context()
                );
                assert!(!(session.is_live() && session.ending.is_some()), "{}", context());
            }
        }
    }
}
