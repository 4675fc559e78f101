//! The cores of gateway, agent and AMS in one seeded simulation: see docs/explanation/simulation.md.

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
