//! The sessions of a cluster as its agent sees them: a plain value, fed by the gateway's requests, by what AMS
//! lists, and by the streamers. Nothing in it is durable; after a restart it is filled again from AMS and by
//! streamers that come back.
//!
//! AMS's list is the truth about instances. Because a list takes time to read, each carries the moment it was
//! begun: what happened after that moment is not judged by it.
//!
//! Methods return [`Work`] for the shell. All work may be lost; it is asked for again by [`Sessions::tick`] or by
//! the gateway until its effect is seen.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::{Duration, Instant},
};

use fanlight_api::{
    InstanceId, SessionId,
    agent_link::{FunnelStep, StreamerStatus},
    ams::{Instance, InstanceStatus},
    bus::{InstanceState, Launch, SessionReport},
};

/// Tag of instances that an agent launched for a session of the gateway, so that it knows them again after a
/// restart. Instances of sessions that AMS began lack it; AMS removes those.
pub const LAUNCHED_TAG: &str = "launched-by=agent";

/// How long an ended session is still reported.
const REPORT_ENDED: Duration = Duration::from_secs(30);
/// How long late launches of an ended session are still recognised.
const REMEMBER_ENDED: Duration = Duration::from_secs(600);
/// Pause between two deletions of an instance that does not go.
const DELETE_AGAIN: Duration = Duration::from_secs(5);
/// An instance that ended gracefully is kept until this many whole reports said so, and at least so long.
const STOPPED_TOLD: u32 = 2;
const STOPPED_KEPT: Duration = Duration::from_secs(3);
/// Most funnel steps that wait for the next report of a session.
const MAX_STEPS: usize = 64;

/// What the shell is to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Work {
    /// Ask AMS for an instance; tell [`Sessions::launched`].
    Launch(Box<Launch>),
    /// Ask AMS to remove an instance.
    Delete {
        /// Which.
        instance_id: InstanceId,
        /// Whose.
        session_id: SessionId,
        /// Skip the graceful stop.
        force: bool,
    },
    /// Tell the streamer that the session has ended.
    EndStream {
        /// Which.
        session_id: SessionId,
        /// Shown to the client.
        message: String,
    },
    /// Read AMS's list soon.
    ReadAms,
}

/// Why a launch led to nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaunchFailure {
    /// For people.
    pub text: String,
    /// AMS certainly made no instance.
    pub certain: bool,
}

/// All sessions.
#[derive(Debug, Default)]
pub struct Sessions {
    table: BTreeMap<SessionId, Session>,
    /// Sessions that ended, so that a launch that arrives late makes nothing.
    ended: HashMap<SessionId, Instant>,
    changed: BTreeSet<SessionId>,
}

#[derive(Debug)]
struct Session {
    since: Instant,
    /// Newest launch; none for sessions of AMS and after a restart.
    attempt: Option<u32>,
    launching: bool,
    /// AMS's answer to the launch.
    asked: Option<(InstanceId, Instant)>,
    failed: Option<LaunchFailure>,
    instance: Option<Seen>,
    ending: Option<Ending>,
    finished: Option<Finished>,
    streamer: Option<Streamer>,
    /// What the streamer told last; kept while it is away, because its client most likely stays.
    status: Option<StreamerStatus>,
    steps: Vec<FunnelStep>,
}

/// An instance as AMS last listed it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    id: InstanceId,
    status: InstanceStatus,
    message: Option<String>,
    /// Launched by an agent, not by AMS.
    ours: bool,
    /// Since when it is stopped, and how many whole reports said so.
    stopped: Option<(Instant, u32)>,
}

#[derive(Debug)]
struct Ending {
    since: Instant,
    force: bool,
    asked_at: Option<Instant>,
}

#[derive(Debug)]
struct Finished {
    state: InstanceState,
    at: Instant,
    instance_id: Option<InstanceId>,
    message: Option<String>,
}

#[derive(Debug)]
struct Streamer {
    connection: u64,
    instance_id: InstanceId,
    /// It has told its state; before that nobody knows whether it has a client.
    told: bool,
}

impl Session {
    fn new(now: Instant) -> Self {
        Self {
            since: now,
            attempt: None,
            launching: false,
            asked: None,
            failed: None,
            instance: None,
            ending: None,
            finished: None,
            streamer: None,
            status: None,
            steps: Vec::new(),
        }
    }

    fn state(&self) -> InstanceState {
        if let Some(finished) = &self.finished {
            return finished.state;
        }
        if self.ending.is_some() {
            return InstanceState::Ending;
        }
        match &self.instance {
            Some(seen) => state_of(seen.status),
            None if self.failed.is_some() => InstanceState::Failed,
            None if self.launching => InstanceState::Launching,
            None => InstanceState::Starting,
        }
    }

    fn instance_id(&self) -> Option<&InstanceId> {
        let seen = self.instance.as_ref().map(|seen| &seen.id);
        let asked = self.asked.as_ref().map(|(id, _)| id);
        let finished = self.finished.as_ref().and_then(|finished| finished.instance_id.as_ref());
        let streamer = self.streamer.as_ref().map(|streamer| &streamer.instance_id);
        seen.or(asked).or(finished).or(streamer)
    }

    fn message(&self) -> Option<String> {
        if let Some(finished) = &self.finished {
            return finished.message.clone();
        }
        let seen = self.instance.as_ref().and_then(|seen| seen.message.clone());
        let ended = || {
            let ended = self.status.as_ref()?.ended.as_ref()?;
            Some(ended.message.clone())
        };
        let failed = || self.failed.as_ref().map(|failure| failure.text.clone());
        seen.or_else(ended).or_else(failed)
    }

    /// The latest moment of something that a list must not overlook.
    fn touched(&self) -> Instant {
        let asked = self.asked.as_ref().map(|(_, at)| *at);
        let ending = self.ending.as_ref().map(|ending| ending.since);
        [asked, ending].into_iter().flatten().fold(self.since, Instant::max)
    }

    fn finish(&mut self, now: Instant, state: InstanceState) {
        self.finished = Some(Finished {
            state,
            at: now,
            instance_id: self.instance_id().cloned(),
            message: self.message(),
        });
        self.instance = None;
        self.asked = None;
        self.launching = false;
    }

    fn delete(&mut self, now: Instant, session_id: &SessionId) -> Option<Work> {
        let instance_id =
            self.instance.as_ref().map(|seen| &seen.id).or(self.asked.as_ref().map(|(id, _)| id))?.clone();
        let ending = self.ending.as_mut()?;
        if ending.asked_at.is_some_and(|at| now.saturating_duration_since(at) < DELETE_AGAIN) {
            return None;
        }
        ending.asked_at = Some(now);
        Some(Work::Delete { instance_id, session_id: session_id.clone(), force: ending.force })
    }

    fn report(&mut self, session_id: &SessionId) -> SessionReport {
        let status = self.status.as_ref().filter(|_| self.finished.is_none());
        SessionReport {
            session_id: session_id.clone(),
            instance_id: self.instance_id().cloned(),
            state: self.state(),
            message: self.message(),
            streamer_connected: self.streamer.as_ref().is_some_and(|streamer| streamer.told),
            client: status.and_then(|status| status.client.clone()),
            idle_since: status.and_then(|status| status.idle_since),
            steps: std::mem::take(&mut self.steps),
        }
    }
}

fn state_of(status: InstanceStatus) -> InstanceState {
    match status {
        InstanceStatus::Error => InstanceState::Failed,
        InstanceStatus::Unknown
        | InstanceStatus::Created
        | InstanceStatus::Prepared
        | InstanceStatus::Started => InstanceState::Starting,
        InstanceStatus::Running => InstanceState::Running,
        InstanceStatus::Stopped => InstanceState::Stopped,
        InstanceStatus::Deleted => InstanceState::Ending,
    }
}

impl Sessions {
    fn change(&mut self, id: &SessionId) {
        self.changed.insert(id.clone());
    }

    /// The gateway wants a session launched. The same or an older attempt again changes nothing.
    ///
    /// # Errors
    /// The session has ended here; the text is for people.
    pub fn accept(&mut self, now: Instant, launch: &Launch) -> Result<Vec<Work>, String> {
        let id = &launch.session_id;
        let ended = || format!("session {id} has ended; it is not launched again");
        if self.ended.contains_key(id) {
            return Err(ended());
        }
        let session = self.table.entry(id.clone()).or_insert_with(|| Session::new(now));
        if session.ending.is_some() {
            return Err(ended());
        }
        let known = session.attempt.is_some_and(|attempt| attempt >= launch.attempt);
        session.attempt = session.attempt.max(Some(launch.attempt));
        if known || session.instance.is_some() {
            return Ok(Vec::new());
        }
        session.since = now;
        session.launching = true;
        session.asked = None;
        session.failed = None;
        session.finished = None;
        self.change(id);
        Ok(vec![Work::Launch(Box::new(launch.clone()))])
    }

    /// Whether a launch is still wanted; asked before each attempt to reach AMS.
    pub fn wants_launch(&self, id: &SessionId, attempt: u32) -> bool {
        self.table.get(id).is_some_and(|session| {
            session.launching && session.ending.is_none() && session.attempt == Some(attempt)
        })
    }

    /// A launch has led to an instance, or to nothing. Also told when AMS gave up on an instance that it had
    /// accepted.
    pub fn launched(
        &mut self,
        now: Instant,
        id: &SessionId,
        attempt: u32,
        result: Result<InstanceId, LaunchFailure>,
    ) -> Vec<Work> {
        let Some(session) = self.table.get_mut(id).filter(|session| session.attempt == Some(attempt)) else {
            return Vec::new();
        };
        let mut work = Vec::new();
        session.launching = false;
        match result {
            Ok(instance_id) => {
                session.asked = Some((instance_id, now));
                work.extend(session.delete(now, id));
            }
            Err(failure) => {
                if failure.certain && session.ending.is_some() && session.instance.is_none() {
                    session.finish(now, InstanceState::Gone);
                    self.ended.insert(id.clone(), now);
                } else {
                    session.since = now;
                    session.failed = Some(failure);
                }
            }
        }
        work.push(Work::ReadAms);
        self.change(id);
        work
    }

    /// The gateway wants a session ended. Repeated until it hears `Gone`.
    pub fn end(
        &mut self,
        now: Instant,
        id: &SessionId,
        message: &str,
        force: bool,
    ) -> (InstanceState, Vec<Work>) {
        let session = self.table.entry(id.clone()).or_insert_with(|| Session::new(now));
        if session.finished.is_some() {
            // What ended gracefully, or was not there, is gone now.
            session.finish(now, InstanceState::Gone);
            self.ended.insert(id.clone(), now);
            self.change(id);
            return (InstanceState::Gone, Vec::new());
        }
        let mut work = Vec::new();
        match &mut session.ending {
            Some(ending) => {
                if force && !ending.force {
                    ending.force = true;
                    ending.asked_at = None;
                }
            }
            None => {
                session.ending = Some(Ending { since: now, force, asked_at: None });
                if session.streamer.is_some() {
                    work.push(Work::EndStream { session_id: id.clone(), message: message.to_owned() });
                }
                let nothing = session.instance.is_none() && session.asked.is_none() && !session.launching;
                if nothing && session.failed.as_ref().is_some_and(|failure| failure.certain) {
                    session.finish(now, InstanceState::Gone);
                    self.ended.insert(id.clone(), now);
                }
            }
        }
        if session.finished.is_none() {
            work.extend(session.delete(now, id));
            work.push(Work::ReadAms);
        }
        let state = session.state();
        self.change(id);
        (state, work)
    }

    /// AMS's list of instances, whose reading was begun at `begun`.
    pub fn synced(&mut self, now: Instant, begun: Instant, instances: &[Instance]) -> Vec<Work> {
        let mut work = Vec::new();
        let mut listed = BTreeSet::new();
        for instance in instances.iter().filter(|instance| !instance.base) {
            let Some(id) = instance.session() else { continue };
            let ours = instance.tags.iter().any(|tag| tag == LAUNCHED_TAG);
            if self.ended.contains_key(&id) {
                // Launched by a request that was on its way when the session ended. AMS removes its own.
                if ours {
                    let session = self.table.entry(id.clone()).or_insert_with(|| Session::new(now));
                    session.finished = None;
                    session.ending.get_or_insert(Ending { since: now, force: true, asked_at: None });
                } else if !self.table.contains_key(&id) {
                    continue;
                }
            }
            let status = instance.status();
            let text = match status {
                InstanceStatus::Error => &instance.error_message,
                _ => &instance.status_message,
            };
            let session = self.table.entry(id.clone()).or_insert_with(|| Session::new(now));
            if session.finished.is_some() && session.touched() < begun {
                session.finished = None;
            }
            let stopped = match session.instance.as_ref().and_then(|seen| seen.stopped) {
                _ if status != InstanceStatus::Stopped => None,
                Some(stopped) => Some(stopped),
                None => Some((now, 0)),
            };
            let seen = Seen {
                id: instance.id.clone(),
                status,
                message: (!text.is_empty()).then(|| text.clone()),
                ours,
                stopped,
            };
            let changed = session.instance.as_ref().is_none_or(|old| {
                (&old.id, old.status, &old.message) != (&seen.id, seen.status, &seen.message)
            });
            session.instance = Some(seen);
            session.launching = false;
            session.failed = None;
            work.extend(session.delete(now, &id));
            if changed {
                self.changed.insert(id.clone());
            }
            listed.insert(id);
        }
        for (id, session) in &mut self.table {
            if listed.contains(id)
                || session.finished.is_some()
                || session.launching
                || session.touched() >= begun
            {
                continue;
            }
            let stopped = session.instance.as_ref().is_some_and(|seen| seen.stopped.is_some() && seen.ours);
            let state = if session.ending.is_some() {
                self.ended.insert(id.clone(), now);
                InstanceState::Gone
            } else if stopped {
                InstanceState::Stopped
            } else if let Some(failure) = &mut session.failed {
                // The list says what the failure left open.
                failure.certain = true;
                continue;
            } else {
                InstanceState::Gone
            };
            session.finish(now, state);
            self.changed.insert(id.clone());
        }
        work
    }

    /// A streamer has connected; an older connection of the session no longer counts.
    pub fn streamer_connected(
        &mut self,
        now: Instant,
        id: &SessionId,
        instance_id: InstanceId,
        connection: u64,
    ) -> Vec<Work> {
        let known = self.table.contains_key(id);
        let session = self.table.entry(id.clone()).or_insert_with(|| Session::new(now));
        session.streamer = Some(Streamer { connection, instance_id, told: false });
        let mut work = Vec::new();
        if session.ending.is_some() {
            let message = "the session has ended".to_owned();
            work.push(Work::EndStream { session_id: id.clone(), message });
        }
        if !known {
            work.push(Work::ReadAms);
        }
        self.change(id);
        work
    }

    /// A streamer has told its state.
    pub fn streamer_status(&mut self, id: &SessionId, connection: u64, status: StreamerStatus) {
        let Some(streamer) = self.streamer(id, connection) else { return };
        let first = !std::mem::replace(&mut streamer.told, true);
        if let Some(session) = self.table.get_mut(id)
            && (first || session.status.as_ref() != Some(&status))
        {
            session.status = Some(status);
            self.change(id);
        }
    }

    /// A step of the connect funnel.
    pub fn streamer_step(&mut self, id: &SessionId, connection: u64, step: FunnelStep) {
        if self.streamer(id, connection).is_none() {
            return;
        }
        if let Some(session) = self.table.get_mut(id)
            && session.steps.len() < MAX_STEPS
        {
            session.steps.push(step);
            self.change(id);
        }
    }

    /// A connection of a streamer has ended.
    pub fn streamer_gone(&mut self, id: &SessionId, connection: u64) -> Vec<Work> {
        if self.streamer(id, connection).is_none() {
            return Vec::new();
        }
        if let Some(session) = self.table.get_mut(id) {
            session.streamer = None;
            self.change(id);
        }
        // Most likely the instance ends.
        vec![Work::ReadAms]
    }

    fn streamer(&mut self, id: &SessionId, connection: u64) -> Option<&mut Streamer> {
        let streamer = self.table.get_mut(id)?.streamer.as_mut()?;
        (streamer.connection == connection).then_some(streamer)
    }

    /// Time has passed: asks again for what did not happen, forgets what nobody needs. Once a second is enough.
    pub fn tick(&mut self, now: Instant) -> Vec<Work> {
        let mut work = Vec::new();
        for (id, session) in &mut self.table {
            work.extend(session.delete(now, id));
            let waits_for_list = session.ending.is_some() && session.instance.is_none() && !session.launching;
            if waits_for_list && session.finished.is_none() && !work.contains(&Work::ReadAms) {
                work.push(Work::ReadAms);
            }
            if let Some(seen) = &mut session.instance
                && let Some((since, told)) = seen.stopped
                && seen.ours
                && session.ending.is_none()
                && told >= STOPPED_TOLD
                && now.saturating_duration_since(since) >= STOPPED_KEPT
            {
                // Asked for again after as many more reports, should it not go.
                seen.stopped = Some((now, 0));
                let (instance_id, session_id) = (seen.id.clone(), id.clone());
                work.push(Work::Delete { instance_id, session_id, force: false });
            }
        }
        self.table.retain(|_, session| {
            let old = session
                .finished
                .as_ref()
                .is_some_and(|finished| now.saturating_duration_since(finished.at) >= REPORT_ENDED);
            !(old && session.streamer.is_none())
        });
        self.ended.retain(|_, at| now.saturating_duration_since(*at) < REMEMBER_ENDED);
        work
    }

    /// Reports of the sessions that changed since the last call of this or of [`Sessions::report_all`].
    pub fn report_changed(&mut self) -> Vec<SessionReport> {
        let changed = std::mem::take(&mut self.changed);
        changed.iter().filter_map(|id| Some(self.table.get_mut(id)?.report(id))).collect()
    }

    /// Whether [`Sessions::report_changed`] has something.
    pub fn has_changes(&self) -> bool {
        !self.changed.is_empty()
    }

    /// Reports of all sessions.
    pub fn report_all(&mut self) -> Vec<SessionReport> {
        self.changed.clear();
        for seen in self.table.values_mut().filter_map(|session| session.instance.as_mut()) {
            if let Some((_, told)) = &mut seen.stopped {
                *told += 1;
            }
        }
        self.table.iter_mut().map(|(id, session)| session.report(id)).collect()
    }
}

#[cfg(test)]
mod tests;
