//! The cores of gateway, agent and AMS in one seeded simulation: see docs/explanation/simulation.md.

// A condition that changes something is no guard of a match.
#![allow(clippy::collapsible_match)]

pub mod agent;
pub mod ams;
pub mod check;
pub mod client;
pub mod engine;
pub mod fate;
pub mod gateway;
pub mod planted;
pub mod rng;
pub mod store;
pub mod world;

use planted::Planted;
use world::World;

/// What a seed came to.
#[derive(Debug)]
pub struct Outcome {
    /// The broken invariant.
    pub violation: Option<String>,
    /// Messages and other events, timers not counted.
    pub events: u64,
    /// The last lines of what happened, when they were asked for.
    pub trace: Vec<String>,
}

/// Lives through one seed; keeps the last `lines` lines of what happened.
pub fn run(seed: u64, planted: Option<Planted>, lines: usize) -> Outcome {
    let mut world = World::new(seed, planted, lines);
    let violation = world.live().err();
    Outcome { violation, events: world.events, trace: world.lines().cloned().collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_is_the_same_world_each_time() {
        let first = run(7, None, usize::MAX);
        assert_eq!(first.violation, None);
        assert!(first.events >= fate::LEAST_EVENTS);
        let again = run(7, None, usize::MAX);
        assert_eq!(first.trace, again.trace);
        assert_ne!(first.trace, run(8, None, usize::MAX).trace);
    }

    #[test]
    fn a_planted_bug_is_found_and_told_with_what_happened_last() {
        let found = (0..50).map(|seed| run(seed, Some(Planted::AttemptNotFenced), 40));
        let outcome = found.into_iter().find(|outcome| outcome.violation.is_some()).expect("found early");
        let last = outcome.trace.iter().rev().take(3).any(|line| line.contains("VIOLATION"));
        assert!(last && outcome.trace.len() <= 40, "{:#?}", outcome.trace);
    }
}
