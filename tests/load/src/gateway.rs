//! The bench `gateway`: what one gateway carries, with sessions whose client's and instance's sockets are both open.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::{
    figures::{Bound, Figures, median, percentile},
    servers::Store,
    sockets::Trip,
    world::World,
};

/// Creates per second that the gateway must sustain. It is set up for a little more requests than these, since sockets
/// and other calls come on top; twice that is the overload.
const SUSTAINED: f64 = 200.0;
const REQUESTS_PER_SECOND: u32 = 250;
const AGENTS: usize = 20;
const FILL_RATE: f64 = 160.0;
/// Frames per second from clients to their instances, and as many back.
const FRAMES: f64 = 1000.0;

fn say(text: &str) {
    eprintln!("bench: {text}");
}

/// Measures all figures on one store.
///
/// # Errors
/// Something could not be measured.
pub async fn run(figures: &mut Figures, store: Store, sessions: usize, seed: u64) -> Result<()> {
    let mut world = World::start(store, REQUESTS_PER_SECOND, AGENTS, seed).await?;
    let done = measure(&mut world, figures, sessions).await;
    if let Err(error) = done {
        let logs = world.servers.keep_logs();
        return Err(error.context(format!("the logs are kept in {}", logs.display())));
    }
    Ok(())
}

async fn measure(world: &mut World, figures: &mut Figures, sessions: usize) -> Result<()> {
    let caller = world.caller.clone();
    say("warming up");
    world.churn(&caller, 100.0, 400).await?.all_created()?;

    let mut costs = Vec::new();
    for level in [100, 1000, 10_000].into_iter().filter(|level| *level < sessions).chain([sessions]) {
        say(&format!("holding {level} sessions"));
        world.fill(level, FILL_RATE).await?;
        if level == sessions {
            // Memory of sessions that nothing happens to.
            tokio::time::sleep(Duration::from_secs(6)).await;
            figures.print("kb_per_session", world.kb_per_session()?, "kB", Bound::AtMost(50.0))?;
        }
        let idle = world.idle_cpu(Duration::from_secs(5)).await?;
        figures.print(&format!("idle_cpu_percent_{level}"), idle, "% of one core", Bound::None)?;
        let cost = world.cpu_per_create(SUSTAINED, 5, 200).await?;
        figures.print(&format!("cpu_us_per_create_{level}"), cost, "µs", Bound::None)?;
        costs.push(cost);
    }
    if let (Some(few), Some(many)) = (costs.first(), costs.last()) {
        figures.print("cost_ratio_10000_to_100", many / few, "ratio", Bound::AtMost(1.5))?;
    }

    say("creating");
    let outcomes = world.churn(&caller, SUSTAINED * 1.05, (SUSTAINED * 1.05 * 20.0) as usize).await?;
    outcomes.all_created()?;
    let rate = outcomes.created.len() as f64 / outcomes.seconds;
    figures.print("creates_per_s", rate, "1/s", Bound::AtLeast(SUSTAINED))?;
    figures.print("create_p50_ms", percentile(&outcomes.latencies, 50.0), "ms", Bound::None)?;
    figures.print("create_p99_ms", percentile(&outcomes.latencies, 99.0), "ms", Bound::AtMost(50.0))?;

    say("joining");
    let joins = world.joins(50.0, (sessions / 2).min(1000)).await?;
    figures.print("join_p50_ms", percentile(&joins.answered, 50.0), "ms", Bound::None)?;
    figures.print("join_p99_ms", percentile(&joins.answered, 99.0), "ms", Bound::AtMost(50.0))?;
    figures.print("join_first_frame_p99_ms", percentile(&joins.connected, 99.0), "ms", Bound::None)?;

    say("relaying");
    world.round_trips(FRAMES, 1000).await?;
    let mut relayed = Rounds::default();
    let mut direct = Rounds::default();
    for _ in 0..3 {
        direct.add(&world.direct_round_trips(FRAMES, 4000).await?);
        relayed.add(&world.round_trips(FRAMES, 4000).await?);
    }
    for (name, rounds) in [("relayed", &relayed), ("direct", &direct)] {
        figures.print(&format!("{name}_frame_p50_ms"), median(&rounds.frame_p50), "ms", Bound::None)?;
        figures.print(&format!("{name}_frame_p99_ms"), median(&rounds.frame_p99), "ms", Bound::None)?;
        figures.print(&format!("{name}_round_p99_ms"), median(&rounds.round_p99), "ms", Bound::None)?;
    }
    let added = median(&relayed.frame_p99) - median(&direct.frame_p99);
    figures.print("relay_p99_ms", added, "ms", Bound::AtMost(2.0))?;
    let joined = world.count_joined(FRAMES).await?;
    figures.print("joined_sessions", joined as f64, "1", Bound::AtLeast(10_000.0))?;

    say("overloading");
    let overload = world.overload(2.0 * f64::from(REQUESTS_PER_SECOND), 10.0, 200.0, 15.0).await?;
    let (greedy, honest) = (&overload.greedy, &overload.honest);
    ensure!(
        greedy.failed.is_empty() && honest.failed.is_empty(),
        "creates failed otherwise than by 429: {:?} {:?}",
        greedy.failed,
        honest.failed
    );
    ensure!(greedy.refused > 0, "twice the load was not refused anything");
    figures.print("overload_p99_ms", percentile(&greedy.latencies, 99.0), "ms", Bound::AtMost(100.0))?;
    figures.print(
        "overload_creates_per_s",
        greedy.created.len() as f64 / greedy.seconds,
        "1/s",
        Bound::None,
    )?;
    figures.print("overload_refused", greedy.refused as f64, "1", Bound::None)?;
    figures.print("overload_honest_refused", honest.refused as f64, "1", Bound::AtMost(0.0))?;
    let p99 = percentile(&honest.latencies, 99.0);
    figures.print("overload_honest_create_p99_ms", p99, "ms", Bound::AtMost(100.0))?;
    let rounds: Vec<f64> = overload.frames.iter().map(Trip::round_ms).collect();
    let p99 = percentile(&rounds, 99.0);
    figures.print("overload_relay_round_p99_ms", p99, "ms", Bound::None)?;
    world.servers.check()
}

/// Percentiles of several runs.
#[derive(Default)]
struct Rounds {
    /// Of single frames, in either direction.
    frame_p50: Vec<f64>,
    frame_p99: Vec<f64>,
    /// Of the way there and back.
    round_p99: Vec<f64>,
}

impl Rounds {
    fn add(&mut self, trips: &[Trip]) {
        let frames: Vec<f64> = trips.iter().flat_map(|trip| [trip.up_ms, trip.down_ms]).collect();
        let rounds: Vec<f64> = trips.iter().map(Trip::round_ms).collect();
        self.frame_p50.push(percentile(&frames, 50.0));
        self.frame_p99.push(percentile(&frames, 99.0));
        self.round_p99.push(percentile(&rounds, 99.0));
    }
}
