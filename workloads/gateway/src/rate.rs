//! A bound on requests per second over all callers: a bucket that fills evenly and holds one second's worth.
//! Pure; the time is an argument.

use std::time::Instant;

/// The bucket.
#[derive(Debug)]
pub struct Bucket {
    per_second: f64,
    level: f64,
    at: Instant,
}

impl Bucket {
    /// A full one. 0 per second: no bound.
    pub fn new(per_second: u32, now: Instant) -> Self {
        Self { per_second: per_second.into(), level: per_second.into(), at: now }
    }

    /// Takes one turn, if there is one.
    pub fn take(&mut self, now: Instant) -> bool {
        if self.per_second == 0.0 {
            return true;
        }
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.level = (self.level + passed * self.per_second).min(self.per_second);
        self.at = now;
        if self.level < 1.0 {
            return false;
        }
        self.level -= 1.0;
        true
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_second_holds_its_turns_and_no_more() {
        let start = Instant::now();
        let mut bucket = Bucket::new(10, start);
        assert_eq!((0..20).filter(|_| bucket.take(start)).count(), 10);
        let later = start + Duration::from_millis(300);
        assert_eq!((0..20).filter(|_| bucket.take(later)).count(), 3);
        let much_later = start + Duration::from_secs(60);
        assert_eq!((0..20).filter(|_| bucket.take(much_later)).count(), 10);
        let mut unbounded = Bucket::new(0, start);
        assert!((0..1000).all(|_| unbounded.take(start)));
    }
}
