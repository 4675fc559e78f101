//! When a low bandwidth estimate is believed, and when the estimator is tried again. A plain value.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Share of lost packets from which on a low estimate is believed.
const BELIEVED_LOSS: f32 = 0.02;
/// Growth of the round trip over its lowest value from which on a low estimate is believed.
const BELIEVED_DELAY: Duration = Duration::from_millis(75);
/// Seconds of round trips looked at.
const RECENT: usize = 3;
/// First and longest time between two fresh starts of the estimator, and how long it must hold to forget them.
const DOUBT_AGAIN: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(64));
/// Whether a collapsed bandwidth estimate is believed.
///
/// The estimator judges by delays. Where a machine on the way stalls now and then, it sees congestion that is none,
/// and because it then measures its own low rate it stays down there. So an estimate below the lowest useful rate
/// needs evidence: lost packets, or a round trip that has grown and stays grown. With evidence it holds until the
/// estimator has been tried again. Without, the lowest useful rate is reported in its place, and the estimator is
/// started afresh. Each trial that ends with evidence doubles the time to the next.
#[derive(Debug)]
pub(crate) struct Doubt {
    floor_bps: u64,
    /// What the estimator says.
    pub(crate) estimate_bps: u64,
    /// There was evidence for the low estimate.
    believed: bool,
    lowest_rtt: Option<Duration>,
    /// Round trips of the last seconds. A queue raises all of them, a busy machine some.
    recent_rtts: VecDeque<Duration>,
    again: Duration,
    not_before: Instant,
}

impl Doubt {
    pub(crate) fn new(now: Instant, floor_bps: u64, estimate_bps: u64) -> Doubt {
        Doubt {
            floor_bps,
            estimate_bps,
            believed: false,
            lowest_rtt: None,
            recent_rtts: VecDeque::new(),
            again: DOUBT_AGAIN.0,
            not_before: now + DOUBT_AGAIN.0,
        }
    }

    /// The estimate to go by.
    pub(crate) fn reported(&self) -> u64 {
        if self.believed { self.estimate_bps } else { self.estimate_bps.max(self.floor_bps) }
    }

    /// Takes the last second's measurements. Gives the rate to start the estimator afresh with, when it should be.
    pub(crate) fn judge(&mut self, now: Instant, rtt: Option<Duration>, loss: Option<f32>) -> Option<u64> {
        let rtt = rtt?;
        let lowest = self.lowest_rtt.map_or(rtt, |lowest| lowest.min(rtt));
        self.lowest_rtt = Some(lowest);
        self.recent_rtts.push_back(rtt);
        if self.recent_rtts.len() > RECENT {
            self.recent_rtts.pop_front();
        }
        if self.estimate_bps >= self.floor_bps {
            self.believed = false;
            if now >= self.not_before + DOUBT_AGAIN.1 {
                self.again = DOUBT_AGAIN.0;
            }
            return None;
        }
        let grown = self.recent_rtts.iter().all(|recent| *recent > lowest + BELIEVED_DELAY);
        if !self.believed && (grown || loss.unwrap_or(0.0) >= BELIEVED_LOSS) {
            self.believed = true;
            self.not_before = now + self.again;
            self.again = (self.again * 2).min(DOUBT_AGAIN.1);
        }
        if now < self.not_before {
            return None;
        }
        self.believed = false;
        self.recent_rtts.clear();
        self.not_before = now + DOUBT_AGAIN.0;
        // The first probes go to several times the start, so a modest one finds a free path as quickly and does less
        // harm on one that is not.
        self.estimate_bps = (self.estimate_bps * 2).clamp(self.floor_bps / 2, self.floor_bps);
        Some(self.estimate_bps)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLOOR: u64 = 2_000_000;

    /// One second of measurements each: what the estimator says, round trip in milliseconds, loss.
    fn drive(doubt: &mut Doubt, now: &mut Instant, seconds: &[(u64, u64, f32)]) -> Vec<(u64, bool)> {
        let each = seconds.iter().map(|(estimate, rtt, loss)| {
            *now += Duration::from_secs(1);
            doubt.estimate_bps = *estimate;
            let afresh = doubt.judge(*now, Some(Duration::from_millis(*rtt)), Some(*loss));
            (doubt.reported(), afresh.is_some())
        });
        each.collect()
    }

    #[test]
    fn estimates_above_the_floor_pass_unchanged() {
        let mut now = Instant::now();
        let mut doubt = Doubt::new(now, FLOOR, 4_000_000);
        let seen =
            drive(&mut doubt, &mut now, &[(4_000_000, 10, 0.0), (2_500_000, 300, 0.2), (9_000_000, 10, 0.0)]);
        assert_eq!(seen, [(4_000_000, false), (2_500_000, false), (9_000_000, false)]);
    }

    #[test]
    fn without_evidence_the_floor_stands_in_and_the_estimator_is_tried_again() {
        let mut now = Instant::now();
        let mut doubt = Doubt::new(now, FLOOR, 4_000_000);
        let seen = drive(&mut doubt, &mut now, &[(300_000, 10, 0.0); 6]);
        assert!(seen.iter().all(|(reported, _)| *reported == FLOOR), "{seen:?}");
        assert_eq!(seen.iter().filter(|(_, afresh)| *afresh).count(), 3, "every other second: {seen:?}");
    }

    #[test]
    fn a_busy_second_among_others_is_no_evidence() {
        let mut now = Instant::now();
        let mut doubt = Doubt::new(now, FLOOR, 4_000_000);
        let seen =
            drive(&mut doubt, &mut now, &[(300_000, 10, 0.0), (300_000, 200, 0.0), (300_000, 12, 0.01)]);
        assert!(seen.iter().all(|(reported, _)| *reported == FLOOR), "{seen:?}");
    }

    #[test]
    fn loss_and_a_lasting_delay_are_evidence_that_holds_and_waits_longer_every_time() {
        for evidence in [(300_000, 10, 0.05), (300_000, 200, 0.0)] {
            let mut now = Instant::now();
            let mut doubt = Doubt::new(now, FLOOR, 4_000_000);
            drive(&mut doubt, &mut now, &[(4_000_000, 10, 0.0); 3]);
            let mut pauses = Vec::new();
            for _ in 0..4 {
                let believed = (0..9).find(|_| drive(&mut doubt, &mut now, &[evidence])[0].0 == 300_000);
                assert!(believed.is_some(), "{evidence:?} is believed");
                let calm = (300_000, 10, 0.0);
                let pause =
                    (1..100).find(|_| drive(&mut doubt, &mut now, &[calm])[0].1).expect("tries again");
                pauses.push(pause);
            }
            assert_eq!(pauses, [2, 4, 8, 16], "{evidence:?}");
        }
    }

    #[test]
    fn without_a_round_trip_nothing_is_judged() {
        let now = Instant::now();
        let mut doubt = Doubt::new(now, FLOOR, 4_000_000);
        doubt.estimate_bps = 1;
        assert_eq!(doubt.judge(now + Duration::from_secs(60), None, None), None);
        assert_eq!(doubt.reported(), FLOOR);
    }
}
