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

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use fanlight_api::{
    AgentId, InstanceId, SessionId,
    agent_link::ClientState,
    bus::{InstanceState, Launch, SessionReport},
    gateway::{self, Screen, SessionStatus},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::agents::Candidate;

/// How long an instance may take to run.
pub const CREATION: Duration = Duration::from_secs(300);

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
    /// Whether an agent ever reported an instance for it; a launch that AMS has not answered is none.
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
    /// A repeated create was answered with it: the create that made it must not take it back.
    #[serde(default)]
    pub promised: bool,
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
    /// Time passed.
    Tick {
        /// For how long the observer has seen it wait, by a clock that does not jump ([`Waiting`]).
        waited: Duration,
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
    pub fn handle(&self, input: &Input<'_>) -> Verdict {
        let mut next = self.clone();
        let keep = match input {
            Input::Report { agent_id, report } => next.report(agent_id, report),
            Input::Missing => next.missing(),
            Input::End(ending) => next.end(ending),
            Input::Gone => next.gone("the instance is gone"),
            Input::Tick { waited } => next.tick(*waited),
        };
        match keep {
            false => Verdict::Remove,
            true if next == *self => Verdict::Keep,
            true => Verdict::Put(Box::new(next)),
        }
    }

    /// What an input from the agent of a cluster makes of the record: nothing when the session went elsewhere
    /// meanwhile, which whoever took the input may not know yet.
    pub fn handle_from(&self, cluster_id: &str, input: &Input<'_>) -> Verdict {
        if self.cluster_id == cluster_id { self.handle(input) } else { Verdict::Keep }
    }

    /// Answers a create that is repeated while the first one may still look for an agent. Whoever repeats it after the
    /// socket of the first answer was used needs another one, as a join would.
    pub fn promise(&self) -> Verdict {
        let mut next = self.clone();
        next.promised |= self.status == SessionStatus::Created;
        if self.used_generation >= self.generation
            && let Ok(joined) = self.join()
        {
            next.generation = joined.generation;
        }
        if next == *self { Verdict::Keep } else { Verdict::Put(Box::new(next)) }
    }

    /// No agent took it: it never was, unless somebody was promised it, or it has come to be all the same.
    pub fn give_up(&self) -> Verdict {
        let undecided = self.status == SessionStatus::Created && !self.promised;
        if undecided { Verdict::Remove } else { Verdict::Keep }
    }

    /// Goes to another agent, because the one before did not take it; not when it runs all the same, and not when it
    /// is to end, for then it ends where it is.
    pub fn move_to(&self, candidate: &Candidate) -> Verdict {
        if self.status != SessionStatus::Created {
            return Verdict::Keep;
        }
        Verdict::Put(Box::new(Self {
            region: candidate.region.clone(),
            cluster_id: candidate.cluster_id.clone(),
            agent_id: candidate.agent_id.clone(),
            // What the one before may have reported is not there.
            instance_id: None,
            seen: false,
            message: String::new(),
            ..self.clone()
        }))
    }

    /// Returns whether the record stays; so do the next ones.
    fn report(&mut self, agent_id: &AgentId, report: &SessionReport) -> bool {
        self.agent_id = agent_id.clone();
        if let Some(instance_id) = &report.instance_id {
            self.instance_id = Some(instance_id.clone());
        }
        // A launch on its way is lost with its agent, and must then be asked for again.
        if report.state != InstanceState::Gone && report.instance_id.is_some() {
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

    /// Whether [`Input::Missing`] would say something. A report that lacks any other session means nothing, and must
    /// not count later, either.
    pub fn can_be_missed(&self) -> bool {
        // Before the first report there may be no instance yet. One that AMS still did not start after the time-out
        // was given up by AMS, too.
        let given_up = self.origin == Origin::Ams && self.status == SessionStatus::Error;
        self.seen || self.ending.is_some() || given_up
    }

    fn missing(&mut self) -> bool {
        !self.can_be_missed() || self.gone("the instance has vanished")
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
            // Kept for diagnosis until somebody removes it. Those of AMS's instances go with them: whoever removed
            // the instance has seen it.
            SessionStatus::Error | SessionStatus::Terminated if self.origin == Origin::Ams => false,
            SessionStatus::Error => true,
            SessionStatus::Terminated => self.origin == Origin::Gateway,
            SessionStatus::Created | SessionStatus::Active | SessionStatus::Terminating => {
                self.status = SessionStatus::Terminated;
                self.message = message.into();
                !self.ephemeral && self.origin == Origin::Gateway
            }
        }
    }

    fn tick(&mut self, waited: Duration) -> bool {
        if self.status == SessionStatus::Created && waited >= CREATION {
            let last =
                or(&self.message, if self.seen { "it was starting" } else { "its agent never reported it" });
            self.message = format!("the instance did not run within {} s: {last}", CREATION.as_secs());
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

/// Since when sessions wait, as far as one observer has seen it. Wall clocks do not count, because they jump and
/// differ among units; nor does time in which the observer saw nothing.
#[derive(Debug, Default)]
pub struct Waiting {
    since: HashMap<SessionId, Instant>,
}

impl Waiting {
    /// Sees that these sessions wait, and no others.
    pub fn see<'a>(&mut self, now: Instant, ids: impl IntoIterator<Item = &'a SessionId>) {
        let seen = ids.into_iter().map(|id| (id.clone(), self.since.get(id).copied().unwrap_or(now)));
        self.since = seen.collect();
    }

    /// For how long a session has waited.
    pub fn waited(&self, now: Instant, id: &SessionId) -> Duration {
        self.since.get(id).map_or(Duration::ZERO, |since| now.saturating_duration_since(*since))
    }

    /// Begins anew: something may have passed unseen.
    pub fn reset(&mut self) {
        self.since.clear();
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
            promised: false,
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
        match session.handle(input) {
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
        let tick = |session: &Session, waited| session.handle(&Input::Tick { waited });
        assert_eq!(tick(&created, CREATION - Duration::from_secs(1)), Verdict::Keep);
        let Verdict::Put(failed) = tick(&created, CREATION) else { panic!("no time-out") };
        assert_eq!((failed.status, failed.wants()), (SessionStatus::Error, Want::Nothing));
        assert!(failed.message.contains("300 s"), "{}", failed.message);
        let seen = reported(&created, InstanceState::Launching).expect("kept");
        assert_eq!(seen.wants(), Want::Nothing);
    }

    #[test]
    fn a_launch_that_was_lost_with_its_agent_is_wanted_again() {
        let agent_id = session().agent_id;
        let launching = SessionReport { instance_id: None, ..report(InstanceState::Launching) };
        let told = Input::Report { agent_id: &agent_id, report: &launching };
        let launching = after(&session(), &told).expect("kept");
        // The agent has restarted and knows nothing of it.
        let missed = after(&launching, &Input::Missing).expect("kept");
        assert_eq!((missed.status, missed.wants()), (SessionStatus::Created, Want::Accept));
        let starting = reported(&missed, InstanceState::Starting).expect("kept");
        assert_eq!(after(&starting, &Input::Missing), None, "there was an instance, and it has vanished");
    }

    #[test]
    fn a_session_that_went_elsewhere_hears_only_from_there() {
        let elsewhere = Candidate {
            agent_id: "a2".parse().expect("id"),
            region: "there".into(),
            cluster_id: "cluster1".into(),
        };
        let seen = reported(&session(), InstanceState::Starting).expect("kept");
        let Verdict::Put(moved) = seen.move_to(&elsewhere) else { panic!("it moves") };
        assert_eq!((moved.agent_id.as_str(), moved.region.as_str()), ("a2", "there"));
        assert_eq!((moved.seen, &moved.instance_id, moved.wants()), (false, &None, Want::Accept));
        let agent_id = session().agent_id;
        let late = report(InstanceState::Ending);
        for input in
            [Input::Report { agent_id: &agent_id, report: &late }, Input::Gone, Input::Missing, end()]
        {
            assert_eq!(moved.handle_from("cluster0", &input), Verdict::Keep, "{input:?}");
        }
        assert_ne!(moved.handle_from("cluster1", &end()), Verdict::Keep);
        let ending = after(&session(), &end()).expect("kept");
        assert_eq!(ending.move_to(&elsewhere), Verdict::Keep, "it ends where it may have begun");
        let running = reported(&session(), InstanceState::Running).expect("kept");
        assert_eq!(running.move_to(&elsewhere), Verdict::Keep, "it was taken, and the answer was lost");
    }

    #[test]
    fn a_create_that_nobody_took_is_taken_back_unless_somebody_relies_on_it() {
        assert_eq!(session().give_up(), Verdict::Remove);
        let used = Session { used_generation: 1, status: SessionStatus::Active, ..session() };
        let Verdict::Put(again) = used.promise() else { panic!("its socket was used") };
        assert_eq!((again.generation, again.promised), (2, false));
        assert_eq!(again.promise(), Verdict::Keep);
        let Verdict::Put(promised) = session().promise() else { panic!("it is promised") };
        assert_eq!((promised.give_up(), promised.promise()), (Verdict::Keep, Verdict::Keep));
        let running = reported(&session(), InstanceState::Running).expect("kept");
        assert_eq!((running.give_up(), running.promise()), (Verdict::Keep, Verdict::Keep));
        let ending = after(&session(), &end()).expect("kept");
        assert_eq!(ending.give_up(), Verdict::Keep, "its end goes on");
    }

    #[test]
    fn only_time_that_was_watched_counts_as_waiting() {
        let (start, id) = (Instant::now(), session().id);
        let later = |seconds| start + Duration::from_secs(seconds);
        let mut waiting = Waiting::default();
        assert_eq!(waiting.waited(later(9), &id), Duration::ZERO, "never seen");
        waiting.see(start, [&id]);
        waiting.see(later(10), [&id]);
        assert_eq!(waiting.waited(later(20), &id), Duration::from_secs(20));
        waiting.reset();
        waiting.see(later(30), [&id]);
        assert_eq!(waiting.waited(later(31), &id), Duration::from_secs(1), "it was not watched meanwhile");
        waiting.see(later(40), []);
        waiting.see(later(50), [&id]);
        assert_eq!(waiting.waited(later(51), &id), Duration::from_secs(1), "it did not wait meanwhile");
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
        let failed = reported(&stopped, Failed).expect("kept for its instance");
        assert_eq!(reported(&failed, Gone), None, "nothing is left to be diagnosed");
        let never = Session { origin: Origin::Ams, ..self::session() };
        let given_up = after(&never, &Input::Tick { waited: CREATION }).expect("kept");
        assert_eq!(after(&given_up, &Input::Missing), None, "AMS never started it");
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
            for step in 0..60 {
                let agent_id = session.agent_id.clone();
                let mut report = report(states[random(states.len() as u64) as usize]);
                if random(2) == 0 {
                    report.client = Some(ClientStatus { generation: 1, state: ClientState::Streaming });
                }
                let input = match random(12) {
                    0 => Input::Missing,
                    1 => end(),
                    2 => Input::Gone,
                    3 => Input::Tick { waited: Duration::from_secs(random(400)) },
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
                match session.handle(&input) {
                    Verdict::Keep => {}
                    Verdict::Remove => {
                        let wished = before.ending.is_some() || matches!(input, Input::End(_));
                        let by_rule = before.ephemeral || before.origin == Origin::Ams || wished;
                        assert!(by_rule, "{}", context());
                        let kept = before.status == SessionStatus::Error && before.origin == Origin::Gateway;
                        assert!(!kept || wished, "{}", context());
                        break;
                    }
                    Verdict::Put(next) => session = *next,
                }
                let again = session.handle(&input);
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
