//! A bound on requests per second over all callers: a bucket that fills evenly and holds one second's worth.
//! Pure; the time is an argument.
//!
//! The lower half of the bucket is kept for those who took less than their share lately. Whoever asks for more than
//! everybody together may have empties the upper half only, and the others do not notice.

use std::{
    collections::{HashMap, HashSet},
    hash::{BuildHasher as _, RandomState},
    net::{IpAddr, Ipv6Addr},
    time::{Duration, Instant},
};

/// What is remembered of a caller fades with this time constant.
const FADE: Duration = Duration::from_secs(1);
/// A caller counts while it has had more turns than this lately.
const ACTIVE: f64 = 0.1;
/// How often the callers that count are counted.
const COUNT_EVERY: Duration = Duration::from_millis(100);
/// Most callers that are told apart. A new one beyond them shares with all others beyond them.
const MAX_CALLERS: usize = 4096;

/// Who asks. Equal ones share their part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Asker(pub u64);

/// Most credentials that are known to be valid; all are forgotten when there are more, and learnt again.
const MAX_CREDENTIALS: usize = 4096;

/// Tells callers apart: by a credential that proved to be valid, else by their address, so that nobody gets a larger
/// part by making credentials up.
#[derive(Debug, Default)]
pub struct Callers {
    hasher: RandomState,
    valid: HashSet<u64>,
}

impl Callers {
    /// Who asks.
    pub fn who(&self, credential: Option<&str>, address: Option<IpAddr>) -> Asker {
        let credential = credential.map(|credential| self.hasher.hash_one(credential));
        if let Some(known) = credential.filter(|hash| self.valid.contains(hash)) {
            return Asker(known);
        }
        // A single site has a whole network of IPv6 addresses to itself.
        let network = match address.map(|address| address.to_canonical()) {
            Some(IpAddr::V6(address)) => {
                Some(IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 64))))
            }
            other => other,
        };
        Asker(self.hasher.hash_one(network))
    }

    /// Takes note of a credential that proved to be valid.
    pub fn learn(&mut self, credential: &str) {
        if self.valid.len() >= MAX_CREDENTIALS {
            self.valid.clear();
        }
        self.valid.insert(self.hasher.hash_one(credential));
    }
}

/// The bucket.
#[derive(Debug)]
pub struct Bucket {
    per_second: f64,
    level: f64,
    at: Instant,
    /// Turns had lately, faded.
    askers: HashMap<Asker, Turns>,
    /// What one of the active callers may have per second before the others are protected from it.
    share: f64,
    counted: Instant,
}

#[derive(Debug)]
struct Turns {
    lately: f64,
    at: Instant,
}

impl Turns {
    fn at(&self, now: Instant) -> f64 {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.lately * (-passed / FADE.as_secs_f64()).exp()
    }
}

impl Bucket {
    /// A full one. 0 per second: no bound.
    pub fn new(per_second: u32, now: Instant) -> Self {
        let per_second = per_second.into();
        Self {
            per_second,
            level: per_second,
            at: now,
            askers: HashMap::new(),
            share: per_second,
            counted: now,
        }
    }

    /// Takes one turn, if there is one for this caller.
    pub fn take(&mut self, now: Instant, asker: Asker) -> bool {
        if self.per_second == 0.0 {
            return true;
        }
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.level = (self.level + passed * self.per_second).min(self.per_second);
        self.at = now;
        if self.level < 1.0 {
            return false;
        }
        if now.saturating_duration_since(self.counted) >= COUNT_EVERY {
            self.count(now);
        }
        let known = self.askers.contains_key(&asker) || self.askers.len() < MAX_CALLERS;
        let asker = if known { asker } else { Asker(0) };
        let turns = self.askers.entry(asker).or_insert(Turns { lately: 0.0, at: now });
        let lately = turns.at(now);
        // Turns per second at an even rate are as many as are remembered with a time constant of a second.
        let alone = self.share >= self.per_second;
        if !alone && self.level < self.per_second / 2.0 && lately >= self.share {
            return false;
        }
        *turns = Turns { lately: lately + 1.0, at: now };
        self.level -= 1.0;
        true
    }

    /// Forgets callers of long ago, and shares the rate among the others.
    fn count(&mut self, now: Instant) {
        self.askers.retain(|_, turns| turns.at(now) > ACTIVE);
        self.share = self.per_second / self.askers.len().max(1) as f64;
        self.counted = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Asker = Asker(1);

    #[test]
    fn a_burst_of_one_second_s_worth_is_taken_and_no_more() {
        let start = Instant::now();
        let mut bucket = Bucket::new(10, start);
        assert_eq!((0..20).filter(|_| bucket.take(start, ONE)).count(), 10);
        let later = start + Duration::from_millis(300);
        assert_eq!((0..20).filter(|_| bucket.take(later, ONE)).count(), 3);
        let much_later = start + Duration::from_secs(60);
        assert_eq!((0..20).filter(|_| bucket.take(much_later, ONE)).count(), 10);
        let mut unbounded = Bucket::new(0, start);
        assert!((0..1000).all(|_| unbounded.take(start, ONE)));
    }

    /// Lets callers ask at even rates for some seconds; returns how many turns each had after the first second.
    fn serve(bucket: &mut Bucket, start: Instant, rates: &[u32], seconds: u32) -> Vec<u32> {
        let mut had = vec![0; rates.len()];
        for ms in 0..seconds * 1000 {
            let now = start + Duration::from_millis(ms.into());
            for (number, rate) in rates.iter().enumerate() {
                let before = u64::from(ms) * u64::from(*rate) / 1000;
                let after = u64::from(ms + 1) * u64::from(*rate) / 1000;
                for _ in before..after {
                    if bucket.take(now, Asker(number as u64 + 1)) && ms >= 1000 {
                        had[number] += 1;
                    }
                }
            }
        }
        had
    }

    #[test]
    fn whoever_asks_for_too_much_takes_nothing_from_those_who_do_not() {
        let start = Instant::now();
        let had = serve(&mut Bucket::new(200, start), start, &[1000, 10, 30], 11);
        assert_eq!(had[1..], [100, 300], "the others get all they ask for");
        let total: u32 = had.iter().sum();
        assert!((1950..=2200).contains(&total), "and nothing is wasted: {total}");
    }

    #[test]
    fn callers_that_all_ask_for_too_much_share_evenly() {
        let start = Instant::now();
        let had = serve(&mut Bucket::new(200, start), start, &[500, 1000], 11);
        let (less, more) = (had[0].min(had[1]), had[0].max(had[1]));
        assert!(less > 0 && more <= 3 * less, "{had:?}");
        assert!((1950..=2200).contains(&(less + more)), "{had:?}");
    }

    #[test]
    fn callers_are_told_apart_by_what_they_cannot_make_up() {
        let address = |text: &str| Some(text.parse().expect("an address"));
        let mut callers = Callers::default();
        let stranger = callers.who(None, address("192.0.2.1"));
        assert_eq!(callers.who(Some("made up"), address("192.0.2.1")), stranger);
        assert_eq!(callers.who(Some("also made up"), address("::ffff:192.0.2.1")), stranger);
        assert_ne!(callers.who(None, address("192.0.2.2")), stranger);
        assert_eq!(callers.who(None, address("2001:db8::1")), callers.who(None, address("2001:db8::2")));
        assert_ne!(callers.who(None, address("2001:db8::1")), callers.who(None, address("2001:db8:0:1::1")));
        callers.learn("valid");
        let known = callers.who(Some("valid"), address("192.0.2.1"));
        assert_ne!(known, stranger);
        assert_eq!(callers.who(Some("valid"), address("192.0.2.9")), known);
        for number in 0..2 * MAX_CREDENTIALS {
            callers.learn(&number.to_string());
        }
        assert!(callers.valid.len() <= MAX_CREDENTIALS);
    }

    #[test]
    fn many_callers_are_not_remembered_for_ever() {
        let start = Instant::now();
        let mut bucket = Bucket::new(1_000_000, start);
        for number in 0..2 * MAX_CALLERS as u64 {
            assert!(bucket.take(start, Asker(number)));
        }
        assert!(bucket.askers.len() <= MAX_CALLERS + 1);
        assert!(bucket.take(start + 20 * FADE, ONE));
        assert_eq!(bucket.askers.len(), 1);
    }
}
