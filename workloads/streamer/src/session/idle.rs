//! When an instance without clients ends itself (design section 1, gateway-api section 7.3).
//!
//! A joinable session waits its idle time for the next client. One that is not joinable is over when its
//! client has left for good; until that client was there at all, it waits a fixed while, because a launch is
//! answered before the instance runs.

use std::time::{Duration, Instant};

/// How long an instance nobody can join again waits for its only client.
const FIRST_CLIENT_LIMIT: Duration = Duration::from_secs(600);

/// How far the client that owns the stream is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// There is none.
    Nobody,
    /// It is signalling; this ends by itself, well or badly, within the limits of signalling.
    Arriving,
    /// Media flows, or may again.
    Connected,
}

/// Watches whether somebody is there.
#[derive(Clone, Debug)]
pub struct Idle {
    joinable: bool,
    limit: Option<Duration>,
    /// Nobody is there since then.
    since: Option<Instant>,
    had_client: bool,
    arriving: bool,
}

impl Idle {
    /// Nobody is there yet. `idle_time_min` counts minutes, 0 means for ever; it matters for joinable
    /// sessions only.
    pub fn new(now: Instant, joinable: bool, idle_time_min: u32) -> Self {
        let limit = match (joinable, idle_time_min) {
            (true, 0) => None,
            (true, minutes) => Some(Duration::from_secs(u64::from(minutes) * 60)),
            (false, _) => Some(FIRST_CLIENT_LIMIT),
        };
        Self { joinable, limit, since: Some(now), had_client: false, arriving: false }
    }

    /// The client came, got on or left. Somebody who is only signalling does not stop the time; but who takes a
    /// stream over that nobody may join once its client has left, must not find that the instance ends.
    pub fn set_presence(&mut self, now: Instant, presence: Presence) {
        self.arriving = presence == Presence::Arriving;
        if presence == Presence::Connected {
            self.had_client = true;
            self.since = None;
        } else if self.since.is_none() {
            self.since = Some(now);
        }
    }

    /// When the instance ends if nobody comes.
    pub fn deadline(&self) -> Option<Instant> {
        let since = self.since?;
        if self.had_client && !self.joinable {
            return (!self.arriving).then_some(since);
        }
        since.checked_add(self.limit?)
    }

    /// Why the instance ends now; `None` as long as it does not.
    pub fn verdict(&self, now: Instant) -> Option<String> {
        if self.deadline()? > now {
            return None;
        }
        Some(match (self.joinable, self.had_client) {
            (false, true) => "the client has left and the session cannot be joined again".into(),
            (false, false) => {
                format!("no client came within {} minutes", FIRST_CLIENT_LIMIT.as_secs() / 60)
            }
            (true, _) => format!(
                "no client for {} minutes, the session's idle time",
                self.limit.unwrap_or_default().as_secs() / 60
            ),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn a_session_that_cannot_be_joined_again_ends_with_its_client() {
        let start = Instant::now();
        let mut idle = Idle::new(start, false, 5);
        assert!(idle.verdict(start + 9 * MINUTE).is_none());
        idle.set_presence(start, Presence::Connected);
        assert!(idle.verdict(start + 1000 * MINUTE).is_none());
        idle.set_presence(start + MINUTE, Presence::Nobody);
        assert!(idle.verdict(start + MINUTE).is_some());
    }

    #[test]
    fn a_take_over_does_not_end_a_session_that_cannot_be_joined_again_but_one_that_fails_does() {
        let start = Instant::now();
        let mut idle = Idle::new(start, false, 0);
        idle.set_presence(start, Presence::Connected);
        idle.set_presence(start + MINUTE, Presence::Arriving);
        assert_eq!(idle.deadline(), None);
        idle.set_presence(start + MINUTE, Presence::Connected);
        assert_eq!(idle.deadline(), None);
        idle.set_presence(start + 2 * MINUTE, Presence::Arriving);
        idle.set_presence(start + 3 * MINUTE, Presence::Nobody);
        assert!(idle.verdict(start + 3 * MINUTE).is_some_and(|text| text.contains("left")));
    }

    #[test]
    fn who_is_only_signalling_does_not_stop_the_idle_time() {
        let start = Instant::now();
        let mut idle = Idle::new(start, true, 3);
        idle.set_presence(start + MINUTE, Presence::Arriving);
        assert_eq!(idle.deadline(), Some(start + 3 * MINUTE));
        let mut idle = Idle::new(start, false, 0);
        idle.set_presence(start + MINUTE, Presence::Arriving);
        assert_eq!(idle.deadline(), Some(start + FIRST_CLIENT_LIMIT));
    }

    #[test]
    fn nobody_ever_coming_ends_it_too() {
        let start = Instant::now();
        let idle = Idle::new(start, false, 0);
        assert!(idle.verdict(start + 10 * MINUTE).is_some_and(|text| text.contains("10 minutes")));
    }

    #[test]
    fn a_joinable_session_waits_its_idle_time_from_the_last_moment_somebody_was_there() {
        let start = Instant::now();
        let mut idle = Idle::new(start, true, 3);
        idle.set_presence(start + MINUTE, Presence::Connected);
        idle.set_presence(start + 5 * MINUTE, Presence::Nobody);
        idle.set_presence(start + 7 * MINUTE, Presence::Nobody);
        assert_eq!(idle.deadline(), Some(start + 8 * MINUTE));
        assert!(idle.verdict(start + 8 * MINUTE).is_some_and(|text| text.contains("3 minutes")));
        idle.set_presence(start + 7 * MINUTE, Presence::Connected);
        assert_eq!(idle.deadline(), None);
    }

    #[test]
    fn zero_minutes_mean_for_ever_and_absurd_times_do_not_overflow() {
        let start = Instant::now();
        assert_eq!(Idle::new(start, true, 0).deadline(), None);
        let far = Idle::new(start, true, u32::MAX);
        assert!(far.verdict(start + 1000 * MINUTE).is_none());
    }
}
