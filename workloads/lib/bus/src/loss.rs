//! Counting lost messages without flooding the log.

use std::sync::atomic::{AtomicU64, Ordering};

/// A count of lost messages.
#[derive(Debug, Default)]
pub struct Loss(AtomicU64);

impl Loss {
    /// Counts one; logs the first, second, fourth, eighth … so that a flood of losses is no flood of lines.
    pub fn count(&self, subject: &str, why: &str) {
        let lost = self.0.fetch_add(1, Ordering::Relaxed) + 1;
        if lost.is_power_of_two() {
            tracing::warn!(subject, lost, "bus message lost: {why}; {lost} lost so far");
        }
    }

    /// How many so far.
    pub fn total(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
