//! The life of an instance (ams-model sections 3.2 and 3.3): intent and observation in, the next status and
//! at most one action out. Level-triggered: called again with the same it says the same, so a lost event, a
//! failed action or a restart of AMS in between costs time and nothing else.
//!
//! Never ends a run because something is silent: a run ends when it says so, when its shim is dead, when it was
//! never ready in time, or when a request asks for it.

use std::time::{Duration, Instant};

use fanlight_api::{ams::InstanceStatus, guest::Ended};
use serde::{Deserialize, Serialize};

use super::model::{Goal, InstanceRecord, Intent, Observed, Reach, Session, Target};

/// What the engine knows of an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Number of the last run; 0 = none.
    pub run: u32,
    /// How far it is.
    pub phase: Phase,
}

impl Seen {
    /// The engine has nothing under this id.
    pub const ABSENT: Self = Self { run: 0, phase: Phase::Absent };
}

/// How far an instance is, as the engine sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Nothing is there.
    Absent,
    /// Made, never started.
    Idle,
    /// A run was started.
    Starting,
    /// The run is ready.
    Ready,
    /// The run was asked to end.
    Stopping,
    /// The run has ended; no process is left.
    Ended(Ended),
}

impl Phase {
    /// Whether processes may be there.
    pub fn is_live(&self) -> bool {
        matches!(self, Self::Starting | Self::Ready | Self::Stopping)
    }
}

/// How long steps may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// From the start of a run until it is ready.
    pub start: Duration,
    /// From a request to stop until the run is killed.
    pub stop: Duration,
}

/// The net below the engine's own grace, after a request to stop.
const STOP_NET: Duration = Duration::from_secs(5);

/// For how long an instance has been as it is and wanted as it is wanted, as far as this process has seen it. Wall
/// clocks do not count, because they jump; nor does time in which this process did not run.
#[derive(Debug, Default)]
pub struct Watch {
    seen: Option<(InstanceStatus, u32, Intent, Instant)>,
}

impl Watch {
    /// Sees the record now.
    pub fn see(&mut self, now: Instant, record: &InstanceRecord) -> Duration {
        let (status, run) = (record.observed.status, record.observed.run);
        let same = |seen: &&(InstanceStatus, u32, Intent, Instant)| {
            (seen.0, seen.1, &seen.2) == (status, run, &record.intent)
        };
        if let Some((_, _, _, since)) = self.seen.as_ref().filter(same) {
            return now.saturating_duration_since(*since);
        }
        self.seen = Some((status, run, record.intent.clone(), now));
        Duration::ZERO
    }
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Ask the agent for a session.
    AskSession,
    /// Make the instance in the engine.
    Create,
    /// Start this run.
    Start {
        /// Number of the run.
        run: u32,
    },
    /// Hand over to a waiting run what its launch asked for.
    Claim,
    /// Ask the run to end; the engine kills it after the grace.
    Stop,
    /// End the run now.
    Kill,
    /// End what is there and remove its files.
    Destroy,
    /// Tell the agent that the session is over.
    EndSession,
    /// Remove the record.
    Forget,
}

/// What follows from looking at an instance.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// To be written before the action is carried out, when it differs.
    pub observed: Observed,
    /// To be carried out, then look again.
    pub action: Option<Action>,
    /// When to look again at the latest.
    pub wake_in: Option<Duration>,
}

/// Decides. `now`: for people, Unix seconds; `watched`: what [`Watch`] says of the record.
pub fn decide(record: &InstanceRecord, seen: &Seen, now: i64, watched: Duration, limits: Limits) -> Decision {
    let mut next = Next { observed: record.observed.clone(), now, watched, wake_in: None };
    let action = match record.intent.target {
        Target::Prepared => match (record.observed.status, &seen.phase) {
            // What it copies may be gone when it is started.
            (InstanceStatus::Created, Phase::Absent) if record.copy_of.is_some() => Some(Action::Create),
            (InstanceStatus::Created, _) => {
                next.status(InstanceStatus::Prepared);
                None
            }
            _ => None,
        },
        Target::Running => running(record, seen, &mut next, limits),
        Target::Stopped => stopped(record, seen, &mut next, limits),
        Target::Deleted => deleted(record, seen, &mut next, limits),
    };
    Decision { observed: next.observed, action, wake_in: next.wake_in }
}

/// The status of an instance whose start, or whose session, failed for good.
pub fn failed(record: &InstanceRecord, error: String, now: i64) -> Observed {
    let watched = Duration::ZERO;
    let mut next = Next { observed: record.observed.clone(), now, watched, wake_in: None };
    next.observed.run = record.intent.run;
    next.fail(error);
    next.observed
}

struct Next {
    observed: Observed,
    now: i64,
    watched: Duration,
    wake_in: Option<Duration>,
}

impl Next {
    fn status(&mut self, status: InstanceStatus) {
        if self.observed.status != status {
            self.observed.status = status;
            self.observed.since = self.now;
            self.observed.message.clear();
            self.observed.error.clear();
        }
    }

    fn fail(&mut self, error: String) {
        self.status(InstanceStatus::Error);
        self.observed.error = error;
    }

    fn ended(&mut self, run: u32, ended: &Ended) {
        self.observed.run = run;
        if ended.reason.is_graceful() {
            self.status(InstanceStatus::Stopped);
            self.observed.message = ended.message.clone();
        } else {
            self.fail(ended.message.clone());
        }
    }
}

fn running(record: &InstanceRecord, seen: &Seen, next: &mut Next, limits: Limits) -> Option<Action> {
    use InstanceStatus as S;
    let run = record.intent.run;
    let status = record.observed.status;
    let over = record.observed.run == run && matches!(status, S::Error | S::Stopped);
    if over {
        // It failed for a reason of ours (time) while processes may still be there.
        return seen.phase.is_live().then_some(Action::Kill);
    }
    record.node.as_ref()?;
    if seen.run < run && seen.phase.is_live() {
        // An older run is in the way; a start was asked for while it was ending.
        return Some(Action::Kill);
    }
    match &seen.phase {
        Phase::Absent if record.observed.run == run && status != S::Prepared => {
            next.fail("the instance vanished: its files are gone".into());
            None
        }
        Phase::Absent => {
            next.status(S::Prepared);
            Some(if record.session == Session::Wanted { Action::AskSession } else { Action::Create })
        }
        Phase::Idle | Phase::Ended(_) if seen.run < run => {
            if record.session == Session::Wanted {
                return Some(Action::AskSession);
            }
            next.observed.run = run;
            next.status(S::Started);
            Some(Action::Start { run })
        }
        // The engine may know of a run only after its start was tried, so this is no run of ours.
        Phase::Idle => None,
        Phase::Starting => {
            let known = status == S::Started && record.observed.run == run;
            let waited = if known { next.watched } else { Duration::ZERO };
            next.observed.run = run;
            next.status(S::Started);
            if waited >= limits.start {
                next.fail(format!(
                    "the instance timed out: not ready within {} s after its start",
                    limits.start.as_secs()
                ));
                return Some(Action::Kill);
            }
            next.wake_in = Some(limits.start - waited);
            None
        }
        // It runs for those who wait in it only when it has been told who they are.
        Phase::Ready if record.is_claimed() => {
            let known = status == S::Started && record.observed.run == run;
            let waited = if known { next.watched } else { Duration::ZERO };
            next.observed.run = run;
            next.status(S::Started);
            if waited >= limits.start {
                next.fail(format!(
                    "the instance timed out: it did not take its claim within {} s",
                    limits.start.as_secs()
                ));
                return Some(Action::Kill);
            }
            next.wake_in = Some(limits.start - waited);
            Some(if record.session == Session::Wanted { Action::AskSession } else { Action::Claim })
        }
        // A run that is ending by itself is still there.
        Phase::Ready | Phase::Stopping => {
            next.observed.run = run;
            next.status(S::Running);
            None
        }
        Phase::Ended(ended) => {
            next.ended(run, ended);
            None
        }
    }
}

fn stopped(record: &InstanceRecord, seen: &Seen, next: &mut Next, limits: Limits) -> Option<Action> {
    use InstanceStatus as S;
    match &seen.phase {
        phase if phase.is_live() => {
            if matches!(record.observed.status, S::Created | S::Prepared | S::Started)
                && *phase == Phase::Ready
            {
                next.status(S::Running);
            }
            next.observed.message = "stopping".into();
            stop(record, next, limits)
        }
        Phase::Ended(ended) if record.observed.run <= seen.run => {
            let known =
                matches!(record.observed.status, S::Error | S::Stopped) && record.observed.run == seen.run;
            if !known {
                next.ended(seen.run, ended);
            }
            None
        }
        _ => {
            if record.observed.status != S::Error {
                next.status(S::Stopped);
            }
            None
        }
    }
}

fn deleted(record: &InstanceRecord, seen: &Seen, next: &mut Next, limits: Limits) -> Option<Action> {
    match &seen.phase {
        Phase::Absent if record.session.to_end().is_some() => Some(Action::EndSession),
        Phase::Absent => Some(Action::Forget),
        phase if phase.is_live() && !record.intent.force => stop(record, next, limits),
        Phase::Ended(ended) => {
            // Said before it goes, for those who follow the events.
            if matches!(record.observed.status, InstanceStatus::Started | InstanceStatus::Running) {
                next.ended(seen.run, ended);
            }
            Some(Action::Destroy)
        }
        _ => Some(Action::Destroy),
    }
}

/// Asks first, kills when time is up. The engine's own grace is the first; this is the net below it.
fn stop(record: &InstanceRecord, next: &mut Next, limits: Limits) -> Option<Action> {
    let patience = limits.stop + STOP_NET;
    if record.intent.force || next.watched >= patience {
        return Some(Action::Kill);
    }
    next.wake_in = Some(patience - next.watched);
    Some(Action::Stop)
}

/// Whether an operation has reached its goal: none = not yet. `record`: none = removed.
pub fn outcome(goal: &Goal, record: Option<&InstanceRecord>) -> Option<Result<(), String>> {
    use InstanceStatus as S;
    let Some(record) = record else {
        return Some(match goal.reach {
            Reach::Stopped | Reach::Deleted => Ok(()),
            Reach::Prepared | Reach::Running { .. } => Err("the instance was deleted".into()),
        });
    };
    let observed = &record.observed;
    match goal.reach {
        Reach::Deleted => None,
        _ if record.intent.target == Target::Deleted => Some(Err("the instance was deleted".into())),
        Reach::Prepared => match observed.status {
            S::Created | S::Unknown => None,
            S::Error => Some(Err(observed.error.clone())),
            _ => Some(Ok(())),
        },
        Reach::Running { run } if observed.run < run => None,
        Reach::Running { run } => match observed.status {
            _ if observed.run > run => Some(Err("the instance was started again".into())),
            S::Running => Some(Ok(())),
            S::Error => Some(Err(observed.error.clone())),
            S::Stopped if observed.message.is_empty() => {
                Some(Err("the instance stopped before it was running".into()))
            }
            S::Stopped => {
                Some(Err(format!("the instance stopped before it was running: {}", observed.message)))
            }
            _ => None,
        },
        Reach::Stopped => match observed.status {
            S::Stopped => Some(Ok(())),
            S::Error => Some(Err(observed.error.clone())),
            _ if record.intent.target == Target::Running => {
                Some(Err("the instance was started again".into()))
            }
            _ => None,
        },
    }
}

/// The lifecycle events of a change of status.
pub fn events(before: InstanceStatus, after: InstanceStatus) -> Option<&'static str> {
    use InstanceStatus as S;
    if before == after {
        return None;
    }
    match after {
        S::Created => Some("instance-created"),
        S::Prepared => Some("instance-scheduled"),
        S::Started => Some("instance-started"),
        S::Running => Some("instance-running"),
        S::Stopped => Some("instance-stopped"),
        S::Error => Some("instance-failed"),
        S::Deleted => Some("instance-removed"),
        S::Unknown => None,
    }
}

#[cfg(test)]
mod tests {
    use fanlight_api::{ams::InstanceStatus as S, guest::EndReason};
    use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

    use super::*;
    use crate::core::model::ApplicationRef;

    const LIMITS: Limits = Limits { start: Duration::from_secs(60), stop: Duration::from_secs(10) };

    fn record(target: Target, status: S) -> InstanceRecord {
        InstanceRecord {
            id: "i1".parse().expect("valid"),
            name: "ams-i1".into(),
            created_at: 0,
            application: Some(ApplicationRef {
                id: "a1".parse().expect("valid"),
                name: "app".into(),
                version: 0,
            }),
            program: Default::default(),
            config: Default::default(),
            display: Default::default(),
            resources: Default::default(),
            tags: Vec::new(),
            user_data: None,
            image: Default::default(),
            services: Vec::new(),
            base: false,
            copy_of: None,
            addons: Vec::new(),
            pool: None,
            encoder: Default::default(),
            place: 0,
            gpu: None,
            node: "n1".parse().ok(),
            architecture: "x86_64".into(),
            session: Session::None,
            intent: Intent { target, run: 1, force: false, since: 100 },
            observed: Observed { status, run: 0, message: String::new(), error: String::new(), since: 100 },
        }
    }

    fn with_run(mut record: InstanceRecord, run: u32) -> InstanceRecord {
        record.observed.run = run;
        record
    }

    fn ended(reason: EndReason) -> Phase {
        Phase::Ended(Ended { reason, message: format!("{reason:?}") })
    }

    #[test]
    fn every_transition_of_the_reference_is_there() {
        let live = |phase| Seen { run: 1, phase };
        let idle = Seen { run: 0, phase: Phase::Idle };
        for (case, record, seen, now, status, action) in [
            (
                "created",
                record(Target::Running, S::Created),
                Seen::ABSENT,
                100,
                S::Prepared,
                Some(Action::Create),
            ),
            ("init", record(Target::Prepared, S::Created), Seen::ABSENT, 100, S::Prepared, None),
            (
                "copied",
                InstanceRecord {
                    copy_of: "dc25aaajueqt4lp7dag0".parse().ok(),
                    ..record(Target::Prepared, S::Created)
                },
                Seen::ABSENT,
                100,
                S::Created,
                Some(Action::Create),
            ),
            (
                "made",
                record(Target::Running, S::Prepared),
                idle.clone(),
                100,
                S::Started,
                Some(Action::Start { run: 1 }),
            ),
            (
                "start again after a crash of ours",
                with_run(record(Target::Running, S::Started), 1),
                idle,
                101,
                S::Started,
                Some(Action::Start { run: 1 }),
            ),
            (
                "starting",
                with_run(record(Target::Running, S::Started), 1),
                live(Phase::Starting),
                150,
                S::Started,
                None,
            ),
            (
                "too slow",
                with_run(record(Target::Running, S::Started), 1),
                live(Phase::Starting),
                160,
                S::Error,
                Some(Action::Kill),
            ),
            (
                "still there after being too slow",
                with_run(record(Target::Running, S::Error), 1),
                live(Phase::Starting),
                161,
                S::Error,
                Some(Action::Kill),
            ),
            (
                "ready",
                with_run(record(Target::Running, S::Started), 1),
                live(Phase::Ready),
                110,
                S::Running,
                None,
            ),
            (
                "silent for days",
                with_run(record(Target::Running, S::Running), 1),
                live(Phase::Ready),
                1_000_000,
                S::Running,
                None,
            ),
            (
                "finished",
                with_run(record(Target::Running, S::Running), 1),
                live(ended(EndReason::Finished)),
                110,
                S::Stopped,
                None,
            ),
            (
                "idle",
                with_run(record(Target::Running, S::Running), 1),
                live(ended(EndReason::Idle)),
                110,
                S::Stopped,
                None,
            ),
            (
                "crashed",
                with_run(record(Target::Running, S::Running), 1),
                live(ended(EndReason::Failed)),
                110,
                S::Error,
                None,
            ),
            (
                "failed to start",
                with_run(record(Target::Running, S::Started), 1),
                live(ended(EndReason::Failed)),
                110,
                S::Error,
                None,
            ),
            ("vanished", with_run(record(Target::Running, S::Running), 1), Seen::ABSENT, 110, S::Error, None),
            (
                "stop",
                with_run(record(Target::Stopped, S::Running), 1),
                live(Phase::Ready),
                101,
                S::Running,
                Some(Action::Stop),
            ),
            (
                "stop takes too long",
                with_run(record(Target::Stopped, S::Running), 1),
                live(Phase::Stopping),
                115,
                S::Running,
                Some(Action::Kill),
            ),
            (
                "stopped",
                with_run(record(Target::Stopped, S::Running), 1),
                live(ended(EndReason::Stopped)),
                101,
                S::Stopped,
                None,
            ),
            (
                "stop what never ran",
                record(Target::Stopped, S::Prepared),
                Seen::ABSENT,
                101,
                S::Stopped,
                None,
            ),
            (
                "start again",
                with_run(record(Target::Running, S::Stopped), 0),
                Seen { run: 0, phase: ended(EndReason::Stopped) },
                101,
                S::Started,
                Some(Action::Start { run: 1 }),
            ),
            (
                "delete a running one",
                with_run(record(Target::Deleted, S::Running), 1),
                live(Phase::Ready),
                101,
                S::Running,
                Some(Action::Stop),
            ),
            (
                "delete takes too long",
                with_run(record(Target::Deleted, S::Running), 1),
                live(Phase::Stopping),
                116,
                S::Running,
                Some(Action::Kill),
            ),
            (
                "delete a stopped one",
                with_run(record(Target::Deleted, S::Stopped), 1),
                live(ended(EndReason::Stopped)),
                101,
                S::Stopped,
                Some(Action::Destroy),
            ),
            (
                "deleted",
                with_run(record(Target::Deleted, S::Stopped), 1),
                Seen::ABSENT,
                101,
                S::Stopped,
                Some(Action::Forget),
            ),
        ] {
            // All of them are as they are since second 100.
            let decision = decide(&record, &seen, now, Duration::from_secs(now.unsigned_abs() - 100), LIMITS);
            assert_eq!((decision.observed.status, decision.action), (status, action), "{case}");
        }
    }

    #[test]
    fn only_time_that_was_watched_counts_against_an_instance() {
        let start = Instant::now();
        let later = |seconds| start + Duration::from_secs(seconds);
        let starting = with_run(record(Target::Running, S::Started), 1);
        let seen = Seen { run: 1, phase: Phase::Starting };
        let mut watch = Watch::default();
        assert_eq!(watch.see(start, &starting), Duration::ZERO);
        assert_eq!(watch.see(later(59), &starting), Duration::from_secs(59));
        // The wall clock has jumped by a year; an hour before the start of the process is nobody's fault.
        for now in [100 - 3600, 100 + 365 * 86_400] {
            let decision = decide(&starting, &seen, now, Duration::from_secs(59), LIMITS);
            assert_eq!((decision.action, decision.wake_in), (None, Some(Duration::from_secs(1))));
        }
        let running = with_run(record(Target::Running, S::Running), 1);
        assert_eq!(watch.see(later(60), &running), Duration::ZERO, "it is another state");
        let stopping = with_run(record(Target::Stopped, S::Running), 1);
        assert_eq!(watch.see(later(90), &stopping), Duration::ZERO, "it is another wish");
        assert_eq!(watch.see(later(95), &stopping), Duration::from_secs(5));
        assert_eq!(Watch::default().see(later(99), &stopping), Duration::ZERO, "another process");
    }

    #[test]
    fn force_skips_the_graceful_part() {
        let mut record = with_run(record(Target::Deleted, S::Running), 1);
        record.intent.force = true;
        let seen = Seen { run: 1, phase: Phase::Ready };
        assert_eq!(decide(&record, &seen, 100, Duration::ZERO, LIMITS).action, Some(Action::Destroy));
    }

    #[test]
    fn the_session_is_asked_for_before_and_ended_after_the_instance() {
        let mut asked = record(Target::Running, S::Created);
        asked.session = Session::Wanted;
        assert_eq!(
            decide(&asked, &Seen::ABSENT, 100, Duration::ZERO, LIMITS).action,
            Some(Action::AskSession)
        );
        let streaming = serde_json::from_value(serde_json::json!({
            "session_id": "s1", "agent_url": "wss://a", "token": "t"
        }))
        .expect("valid");
        let mut made = with_run(record(Target::Deleted, S::Running), 1);
        made.session = Session::Made { streaming };
        let live = Seen { run: 1, phase: Phase::Ready };
        assert_eq!(decide(&made, &live, 100, Duration::ZERO, LIMITS).action, Some(Action::Stop));
        assert_eq!(
            decide(&made, &Seen::ABSENT, 100, Duration::ZERO, LIMITS).action,
            Some(Action::EndSession)
        );
        made.session = Session::Over;
        assert_eq!(decide(&made, &Seen::ABSENT, 100, Duration::ZERO, LIMITS).action, Some(Action::Forget));
    }

    #[test]
    fn a_claimed_run_is_told_once_it_has_a_session_and_runs_after_that() {
        use crate::core::model::Pooled;
        use fanlight_api::{ams::PoolState, guest::PoolStart};
        let ready = Seen { run: 1, phase: Phase::Ready };
        let mut one = with_run(record(Target::Running, S::Running), 1);
        let state = |state| Some(Pooled { state, start: PoolStart::Streamer });
        one.pool = state(PoolState::Waiting);
        let decide = |record: &InstanceRecord, seen: &Seen, watched| {
            let decision = decide(record, seen, 100, Duration::from_secs(watched), LIMITS);
            (decision.observed.status, decision.action)
        };
        assert_eq!(decide(&one, &ready, 0), (S::Running, None));
        one.pool = state(PoolState::Claimed);
        one.observed.status = S::Started;
        one.session = Session::Wanted;
        assert_eq!(decide(&one, &ready, 0), (S::Started, Some(Action::AskSession)));
        one.session = Session::None;
        assert_eq!(decide(&one, &ready, 0), (S::Started, Some(Action::Claim)));
        assert_eq!(decide(&one, &ready, 59), (S::Started, Some(Action::Claim)), "again and again");
        assert_eq!(decide(&one, &ready, 60), (S::Error, Some(Action::Kill)));
        let goal = Goal { instance: "i1".parse().expect("valid"), reach: Reach::Running { run: 1 } };
        assert_eq!(outcome(&goal, Some(&one)), None, "a launch waits for it");
        let gone = Seen { run: 1, phase: ended(EndReason::Failed) };
        assert_eq!(decide(&one, &gone, 0), (S::Error, None));
        one.pool = None;
        assert_eq!(decide(&one, &ready, 0), (S::Running, None));
    }

    #[test]
    fn operations_end_with_what_they_wait_for() {
        let goal = |reach| Goal { instance: "i1".parse().expect("valid"), reach };
        let run = goal(Reach::Running { run: 1 });
        assert_eq!(outcome(&run, Some(&record(Target::Running, S::Created))), None);
        assert_eq!(outcome(&run, Some(&with_run(record(Target::Running, S::Running), 1))), Some(Ok(())));
        assert!(matches!(outcome(&run, Some(&with_run(record(Target::Running, S::Error), 1))), Some(Err(_))));
        // The failure of the run before does not end the operation of this one.
        assert_eq!(outcome(&run, Some(&with_run(record(Target::Running, S::Error), 0))), None);
        assert!(matches!(outcome(&run, None), Some(Err(_))));
        assert_eq!(outcome(&goal(Reach::Deleted), None), Some(Ok(())));
        assert_eq!(outcome(&goal(Reach::Deleted), Some(&record(Target::Deleted, S::Stopped))), None);
        assert_eq!(
            outcome(&goal(Reach::Stopped), Some(&with_run(record(Target::Stopped, S::Stopped), 1))),
            Some(Ok(()))
        );
        assert_eq!(
            outcome(&goal(Reach::Prepared), Some(&record(Target::Prepared, S::Prepared))),
            Some(Ok(()))
        );
    }

    /// An engine that does what it is told, sometimes late, sometimes failing, sometimes crashing.
    struct World {
        record: Option<InstanceRecord>,
        seen: Seen,
        now: i64,
        start: Instant,
        watch: Watch,
    }

    impl World {
        fn step(&mut self, random: &mut StdRng) {
            self.now += random.random_range(0..3);
            let Some(record) = &mut self.record else { return };
            let instant = self.start + Duration::from_secs(self.now.unsigned_abs());
            let watched = self.watch.see(instant, record);
            let decision = decide(record, &self.seen, self.now, watched, LIMITS);
            record.observed = decision.observed;
            assert_eq!(record.observed.error.is_empty(), record.observed.status != S::Error);
            // A crash of AMS between writing and acting, or an action that fails.
            if random.random_bool(0.2) {
                self.watch = Watch::default();
                return;
            }
            match decision.action {
                Some(Action::Create) => {
                    assert_eq!(self.seen.phase, Phase::Absent);
                    self.seen = Seen { run: 0, phase: Phase::Idle };
                }
                Some(Action::Start { run }) => {
                    assert!(!self.seen.phase.is_live(), "two runs at a time");
                    assert!(run > self.seen.run, "a run was started twice");
                    self.seen = Seen { run, phase: Phase::Starting };
                }
                Some(Action::Stop) => self.seen.phase = Phase::Stopping,
                Some(Action::Kill) => self.seen.phase = ended(EndReason::Stopped),
                Some(Action::Destroy) => self.seen = Seen::ABSENT,
                Some(Action::Forget) => {
                    assert_eq!(self.seen.phase, Phase::Absent, "a record went before its instance");
                    self.record = None;
                }
                Some(Action::Claim) => {
                    assert_eq!(self.seen.phase, Phase::Ready, "a claim goes to a run that waits");
                    record.pool = None;
                }
                Some(Action::AskSession | Action::EndSession) | None => {}
            }
            match random.random_range(0..6) {
                0 if self.seen.phase == Phase::Starting => self.seen.phase = Phase::Ready,
                1 if self.seen.phase.is_live() && random.random_bool(0.2) => {
                    self.seen.phase =
                        ended(if random.random_bool(0.5) { EndReason::Failed } else { EndReason::Finished });
                }
                _ => {}
            }
        }
    }

    #[test]
    fn whatever_is_asked_in_any_order_what_was_asked_last_comes_about() {
        for seed in 0..300 {
            let mut random = StdRng::seed_from_u64(seed);
            let mut world = World {
                record: Some(record(Target::Running, S::Created)),
                seen: Seen::ABSENT,
                now: 100,
                start: Instant::now(),
                watch: Watch::default(),
            };
            for _ in 0..random.random_range(0..8) {
                for _ in 0..random.random_range(0..6) {
                    world.step(&mut random);
                }
                let Some(record) = &mut world.record else { break };
                let intent = &mut record.intent;
                if random.random_bool(0.5) {
                    *intent = Intent {
                        target: Target::Stopped,
                        since: world.now,
                        force: random.random_bool(0.2),
                        ..intent.clone()
                    };
                } else if matches!(record.observed.status, S::Stopped | S::Error) {
                    // The request refuses a start while a run is there.
                    *intent = Intent {
                        target: Target::Running,
                        run: intent.run + 1,
                        force: false,
                        since: world.now,
                    };
                }
            }
            let target = world.record.as_ref().expect("never deleted so far").intent.target;
            for _ in 0..200 {
                world.step(&mut random);
            }
            let record = world.record.as_mut().expect("still there");
            match target {
                Target::Running => assert!(
                    matches!(record.observed.status, S::Running | S::Stopped | S::Error),
                    "seed {seed}: {record:?}"
                ),
                _ => assert!(
                    !world.seen.phase.is_live() && matches!(record.observed.status, S::Stopped | S::Error),
                    "seed {seed}: {record:?}"
                ),
            }
            record.intent = Intent { target: Target::Deleted, since: world.now, ..record.intent.clone() };
            for _ in 0..200 {
                world.step(&mut random);
            }
            assert!(world.record.is_none() && world.seen == Seen::ABSENT, "seed {seed}");
        }
    }
}
