//! What the exit of the application's program means: wait, start again, or the end of the instance.
//!
//! A program that ends with status 0 may have forked its real self away; as long as anything of it shows windows
//! or runs, the application is not over.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use fanlight_api::guest::{EndReason, Ended, Restart};

/// How long a program that ended with status 0 may take until what it started connects to the display.
const FORK_GRACE: Duration = Duration::from_secs(5);
/// Pauses before starting again.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LAST_PAUSE: Duration = Duration::from_secs(30);
/// A run of this length counts as good: the next failure is a first one again.
const GOOD_RUN: Duration = Duration::from_secs(60);
/// Failures within a minute after which [`Restart::OnFailure`] gives up.
const MAX_FAILURES: usize = 5;
const FAILURE_WINDOW: Duration = Duration::from_secs(60);

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// With a status.
    Status(i32),
    /// By a signal.
    Signal(i32),
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing until something happens or [`Rules::deadline`] passes.
    Wait,
    /// Start the program.
    Start,
    /// The instance is over.
    End(Ended),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Running {
        since: Instant,
    },
    /// Ended with status 0, others of it may go on.
    Left {
        until: Instant,
    },
    Pausing {
        until: Instant,
    },
}

/// Watches one application.
#[derive(Clone, Debug)]
pub struct Rules {
    name: String,
    restart: Restart,
    state: State,
    window: bool,
    clients: usize,
    family: bool,
    pause: Duration,
    failures: VecDeque<Instant>,
}

impl Rules {
    /// The program was started at `now`.
    pub fn new(now: Instant, name: &str, restart: Restart) -> Self {
        Self {
            name: name.to_owned(),
            restart,
            state: State::Running { since: now },
            window: false,
            clients: 0,
            family: false,
            pause: FIRST_PAUSE,
            failures: VecDeque::new(),
        }
    }

    /// The application has shown a window.
    pub fn window_shown(&mut self) {
        self.window = true;
    }

    /// So many programs are connected to the display.
    pub fn set_clients(&mut self, clients: usize) {
        self.clients = clients;
    }

    /// Whether processes that the program started are still there.
    pub fn set_family(&mut self, family: bool) {
        self.family = family;
    }

    /// The program was started (again).
    pub fn started(&mut self, now: Instant) {
        self.state = State::Running { since: now };
    }

    /// The program ended.
    pub fn exited(&mut self, now: Instant, exit: Exit) -> Next {
        let State::Running { since } = self.state else { return Next::Wait };
        if now.saturating_duration_since(since) >= GOOD_RUN {
            self.pause = FIRST_PAUSE;
        }
        let how = match exit {
            Exit::Status(0) if self.restart == Restart::Always => return self.again(now),
            Exit::Status(0) => {
                self.state = State::Left { until: now + FORK_GRACE };
                return self.check(now);
            }
            Exit::Status(status) => format!("ended with status {status}"),
            Exit::Signal(signal) => format!("was ended by signal {signal}"),
        };
        let name = &self.name;
        match self.restart {
            Restart::Always => self.again(now),
            Restart::Never => Self::failed(format!("application {name} {how}; see its log")),
            Restart::OnFailure => {
                self.failures.push_back(now);
                while self.failures.front().is_some_and(|first| now - *first > FAILURE_WINDOW) {
                    self.failures.pop_front();
                }
                if self.failures.len() > MAX_FAILURES {
                    let times = self.failures.len();
                    return Self::failed(format!(
                        "application {name} {how}, {times} times within a minute; see its log"
                    ));
                }
                self.again(now)
            }
        }
    }

    /// Looks again after a change, or at the deadline.
    pub fn check(&mut self, now: Instant) -> Next {
        match self.state {
            State::Running { .. } => Next::Wait,
            State::Pausing { until } if until <= now => Next::Start,
            State::Pausing { .. } => Next::Wait,
            State::Left { until } => {
                if self.clients > 0 {
                    // What was forked away has arrived; from now on only its leaving counts.
                    self.state = State::Left { until: now };
                    return Next::Wait;
                }
                if self.window && !self.family || until <= now {
                    return self.finished();
                }
                Next::Wait
            }
        }
    }

    /// When to call [`Rules::check`] even if nothing happens.
    pub fn deadline(&self) -> Option<Instant> {
        match self.state {
            State::Running { .. } => None,
            State::Pausing { until } => Some(until),
            State::Left { .. } if self.clients > 0 => None,
            State::Left { until } => Some(until),
        }
    }

    fn finished(&self) -> Next {
        let name = &self.name;
        if self.window {
            let message = format!("application {name} ended with status 0");
            Next::End(Ended { reason: EndReason::Finished, message })
        } else {
            Self::failed(format!(
                "application {name} ended with status 0 before it showed a window; see its log"
            ))
        }
    }

    fn failed(message: String) -> Next {
        Next::End(Ended { reason: EndReason::Failed, message })
    }

    fn again(&mut self, now: Instant) -> Next {
        self.state = State::Pausing { until: now + self.pause };
        self.pause = (self.pause * 2).min(LAST_PAUSE);
        Next::Wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(restart: Restart) -> (Rules, Instant) {
        let now = Instant::now();
        (Rules::new(now, "terminal", restart), now)
    }

    fn ended(next: Next) -> (EndReason, String) {
        match next {
            Next::End(ended) => (ended.reason, ended.message),
            other => panic!("{other:?} is no end"),
        }
    }

    #[test]
    fn status_0_after_a_window_finishes_the_instance_at_once() {
        for restart in [Restart::Never, Restart::OnFailure] {
            let (mut rules, now) = rules(restart);
            rules.window_shown();
            assert_eq!(ended(rules.exited(now, Exit::Status(0))).0, EndReason::Finished);
        }
    }

    #[test]
    fn status_0_without_a_window_is_a_failure_after_the_grace() {
        let (mut rules, now) = rules(Restart::Never);
        assert_eq!(rules.exited(now, Exit::Status(0)), Next::Wait);
        assert_eq!(rules.deadline(), Some(now + FORK_GRACE));
        let (reason, message) = ended(rules.check(now + FORK_GRACE));
        assert_eq!(reason, EndReason::Failed);
        assert!(message.contains("application terminal ended with status 0 before it showed a window"));
    }

    #[test]
    fn a_program_that_forked_away_goes_on_until_its_last_window_is_gone() {
        let (mut rules, now) = rules(Restart::Never);
        rules.exited(now, Exit::Status(0));
        rules.set_clients(1);
        assert_eq!(rules.check(now + Duration::from_secs(1)), Next::Wait);
        rules.window_shown();
        assert_eq!(rules.deadline(), None);
        assert_eq!(rules.check(now + Duration::from_secs(1000)), Next::Wait);
        rules.set_clients(0);
        assert_eq!(ended(rules.check(now + Duration::from_secs(1001))).0, EndReason::Finished);
    }

    #[test]
    fn a_launcher_with_a_window_may_leave_to_a_program_that_is_still_starting() {
        let (mut rules, now) = rules(Restart::Never);
        rules.window_shown();
        rules.set_family(true);
        assert_eq!(rules.exited(now, Exit::Status(0)), Next::Wait);
        assert_eq!(rules.check(now + Duration::from_secs(4)), Next::Wait);
        rules.set_family(false);
        assert_eq!(ended(rules.check(now + Duration::from_secs(4))).0, EndReason::Finished);
    }

    #[test]
    fn failures_end_the_instance_or_start_again_as_asked() {
        let (mut never, now) = rules(Restart::Never);
        let (reason, message) = ended(never.exited(now, Exit::Status(3)));
        assert_eq!(reason, EndReason::Failed);
        assert!(message.contains("status 3"), "{message}");
        let (mut never, now) = rules(Restart::Never);
        assert!(ended(never.exited(now, Exit::Signal(11))).1.contains("signal 11"));

        let (mut on_failure, mut now) = rules(Restart::OnFailure);
        let mut pauses = Vec::new();
        for _ in 0..MAX_FAILURES {
            assert_eq!(on_failure.exited(now, Exit::Status(1)), Next::Wait);
            let until = on_failure.deadline().expect("a pause");
            pauses.push((until - now).as_millis());
            now = until;
            assert_eq!(on_failure.check(now), Next::Start);
            on_failure.started(now);
        }
        assert_eq!(pauses, [500, 1000, 2000, 4000, 8000]);
        assert!(ended(on_failure.exited(now, Exit::Status(1))).1.contains("6 times within a minute"));

        let (mut always, mut now) = rules(Restart::Always);
        for _ in 0..20 {
            assert_eq!(always.exited(now, Exit::Status(0)), Next::Wait);
            now = always.deadline().expect("a pause");
            assert_eq!(always.check(now), Next::Start);
            always.started(now);
        }
        now += GOOD_RUN;
        always.exited(now, Exit::Status(1));
        assert_eq!(always.deadline(), Some(now + FIRST_PAUSE), "a long run is forgiven");
    }
}
