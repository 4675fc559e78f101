//! How fast to encode: bit rate from the bandwidth estimate, frame rate when even the lowest bit rate is too
//! much, and how often a key frame may be asked for. Plain values.

use std::time::{Duration, Instant};

/// Share of the estimate the encoder may use: the rest is for repetitions, headers and error of the estimate
/// (media-stack section 2).
const SHARE: f64 = 0.85;
/// A smaller change downwards is not worth telling the encoder.
const DOWN: f64 = 0.03;
/// A smaller change upwards waits.
const UP: f64 = 0.08;
/// Least time between two changes upwards.
const UP_EVERY: Duration = Duration::from_millis(500);
/// Least time between two key frames asked for (media-stack section 8, 4).
const KEY_EVERY: Duration = Duration::from_millis(300);
/// Never fewer frames than this, however thin the path is.
const SLOWEST: Duration = Duration::from_millis(200);

/// What the encoder is to do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// Bits per second.
    pub bitrate_bps: u64,
    /// Least time between two frames; the display's own interval unless the path is too thin for it.
    pub interval: Duration,
}

/// The rate of one stream.
#[derive(Clone, Debug)]
pub struct Rate {
    min_bps: u64,
    max_bps: u64,
    frame: Duration,
    estimate_bps: u64,
    audio_bps: u64,
    pace: Pace,
    raised: Option<Instant>,
}

impl Rate {
    /// Limits in bits per second, `fps` of the display (at least 1), and an estimate to begin with.
    pub fn new(min_bps: u64, max_bps: u64, fps: u32, estimate_bps: u64) -> Self {
        let frame = Duration::from_secs(1) / fps.max(1);
        let pace = Pace { bitrate_bps: max_bps, interval: frame };
        let mut rate = Self {
            min_bps,
            max_bps: max_bps.max(min_bps),
            frame,
            estimate_bps,
            audio_bps: 0,
            pace,
            raised: None,
        };
        rate.pace = rate.wanted();
        rate
    }

    /// What holds now.
    pub fn pace(&self) -> Pace {
        self.pace
    }

    /// The estimate it follows.
    pub fn estimate_bps(&self) -> u64 {
        self.estimate_bps
    }

    /// Bits per second that go to sound.
    pub fn set_audio(&mut self, now: Instant, audio_bps: u64) -> Option<Pace> {
        self.audio_bps = audio_bps;
        self.follow(now)
    }

    /// Takes an estimate; tells what to change.
    pub fn set_estimate(&mut self, now: Instant, estimate_bps: u64) -> Option<Pace> {
        self.estimate_bps = estimate_bps;
        self.follow(now)
    }

    fn follow(&mut self, now: Instant) -> Option<Pace> {
        let wanted = self.wanted();
        // One number for both: what is sent per second is bit rate times the share of frames.
        let flow =
            |pace: Pace| pace.bitrate_bps as f64 * self.frame.as_secs_f64() / pace.interval.as_secs_f64();
        let (old, new) = (flow(self.pace), flow(wanted));
        let raise = new > old;
        let enough = if raise {
            new >= old * (1.0 + UP) || wanted.bitrate_bps == self.max_bps
        } else {
            new <= old * (1.0 - DOWN)
        };
        let too_soon =
            raise && self.raised.is_some_and(|raised| now.saturating_duration_since(raised) < UP_EVERY);
        if new == old || !enough || too_soon {
            return None;
        }
        if raise {
            self.raised = Some(now);
        }
        self.pace = wanted;
        Some(wanted)
    }

    fn wanted(&self) -> Pace {
        let room = (self.estimate_bps as f64 * SHARE - self.audio_bps as f64).max(1.0);
        let bitrate = room.clamp(self.min_bps as f64, self.max_bps as f64);
        // Quality has a floor; below it there are fewer frames of that quality (stream-protocol section 3:
        // the size of the picture never changes).
        let stretch = self.min_bps as f64 / room;
        let interval = if stretch > 1.0 {
            self.frame.mul_f64(stretch.min(1e3)).min(SLOWEST.max(self.frame))
        } else {
            self.frame
        };
        Pace { bitrate_bps: bitrate as u64, interval }
    }
}

/// Thins out requests for key frames without losing the last one.
#[derive(Clone, Copy, Debug, Default)]
pub struct KeyLimit {
    last: Option<Instant>,
    waiting: bool,
}

impl KeyLimit {
    /// A key frame was asked for; tells whether to make one now.
    pub fn ask(&mut self, now: Instant) -> bool {
        self.waiting = true;
        self.due(now)
    }

    /// Whether a request that had to wait is due; call at [`KeyLimit::deadline`].
    pub fn due(&mut self, now: Instant) -> bool {
        let free = self.last.is_none_or(|last| now.saturating_duration_since(last) >= KEY_EVERY);
        if !self.waiting || !free {
            return false;
        }
        *self = Self { last: Some(now), waiting: false };
        true
    }

    /// When to call [`KeyLimit::due`].
    pub fn deadline(&self) -> Option<Instant> {
        self.last.filter(|_| self.waiting).map(|last| last + KEY_EVERY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate(estimate: u64) -> Rate {
        Rate::new(2_500_000, 5_000_000, 60, estimate)
    }

    #[test]
    fn the_encoder_gets_its_share_of_the_estimate_inside_the_limits() {
        for (estimate, bitrate) in
            [(4_000_000, 3_400_000), (100_000_000, 5_000_000), (2_000_000, 2_500_000), (0, 2_500_000)]
        {
            assert_eq!(rate(estimate).pace().bitrate_bps, bitrate, "{estimate}");
        }
    }

    #[test]
    fn below_the_lowest_rate_there_are_fewer_frames_instead() {
        let frame = Duration::from_secs(1) / 60;
        assert_eq!(rate(4_000_000).pace().interval, frame);
        let thin = rate(1_470_588).pace().interval;
        assert!(thin > frame.mul_f64(1.99) && thin < frame.mul_f64(2.01), "{thin:?}");
        assert_eq!(rate(0).pace().interval, SLOWEST);
        assert_eq!(
            Rate::new(1, 2, 1, 0).pace().interval,
            Duration::from_secs(1),
            "one frame a second stays one"
        );
    }

    #[test]
    fn small_changes_are_left_alone_and_drops_are_followed_at_once() {
        let mut now = Instant::now();
        let mut rate = rate(4_000_000);
        assert_eq!(rate.set_estimate(now, 4_100_000), None);
        assert_eq!(rate.set_estimate(now, 3_950_000), None);
        assert_eq!(rate.set_estimate(now, 3_000_000).map(|pace| pace.bitrate_bps), Some(2_550_000));
        assert!(rate.set_estimate(now, 4_000_000).is_some());
        assert_eq!(rate.set_estimate(now, 5_000_000), None, "not twice upwards in half a second");
        now += UP_EVERY;
        assert!(rate.set_estimate(now, 5_000_000).is_some());
        assert!(rate.set_estimate(now, 2_000_000).is_some());
        now += UP_EVERY;
        assert!(rate.set_estimate(now, 9_000_000).is_some_and(|pace| pace.bitrate_bps == 5_000_000));
    }

    #[test]
    fn sound_is_taken_off_first() {
        let mut rate = rate(4_000_000);
        let pace = rate.set_audio(Instant::now(), 140_000).expect("a change");
        assert_eq!(pace.bitrate_bps, 3_260_000);
    }

    #[test]
    fn key_frames_are_thinned_out_but_the_last_request_counts() {
        let mut now = Instant::now();
        let mut limit = KeyLimit::default();
        assert!(limit.ask(now));
        assert!(!limit.ask(now));
        let due = limit.deadline().expect("one waits");
        now = due;
        assert!(limit.due(now));
        assert_eq!(limit.deadline(), None);
        assert!(!limit.due(now + KEY_EVERY), "nobody asked again");
    }
}
