//! When things should happen: an open loop. The next request is due whether or not the last one was answered, and
//! its latency counts from when it was due, so that a server that stands still is not measured too well.

use std::{
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use tokio::sync::mpsc;

/// Times of `count` independent arrivals (a Poisson process) at a rate per second, from now on; each comes out when
/// it is due, with its number.
pub fn arrivals(seed: u64, rate: f64, count: usize) -> mpsc::UnboundedReceiver<(usize, Instant)> {
    let (sender, receiver) = mpsc::unbounded_channel();
    let mut random = StdRng::seed_from_u64(seed);
    // A thread of its own: the runtime's timers have steps of a millisecond, and its workers may be busy.
    thread::spawn(move || {
        let mut due = Instant::now() + Duration::from_millis(5);
        for number in 0..count {
            let uniform: f64 = random.random_range(f64::EPSILON..1.0);
            due += Duration::from_secs_f64(-uniform.ln() / rate);
            thread::sleep(due.saturating_duration_since(Instant::now()));
            if sender.send((number, due)).is_err() {
                return;
            }
        }
    });
    receiver
}

/// A time as nanoseconds since the first one that was asked for, to be sent along.
pub fn nanos(at: Instant) -> u64 {
    static FIRST: OnceLock<Instant> = OnceLock::new();
    // A little earlier, so that what was due before the first question is no time below zero.
    let first = FIRST.get_or_init(|| Instant::now() - Duration::from_secs(60));
    u64::try_from(at.saturating_duration_since(*first).as_nanos()).unwrap_or(u64::MAX)
}

/// Milliseconds since a time.
pub fn ms_since(at: Instant) -> f64 {
    at.elapsed().as_secs_f64() * 1000.0
}
