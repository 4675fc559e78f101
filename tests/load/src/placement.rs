//! The bench `placement`: how long one choice of a cluster takes among ten thousand. The pure function alone, with
//! reports as agents send them.

use std::{collections::BTreeMap, hint::black_box, time::Instant};

use anyhow::{Context as _, Result, ensure};
use fanlight_api::gateway::Location;
use fanlight_gateway::cores::agents::{Agents, Wanted, Whereabouts};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use serde_json::{Value, json};

use crate::figures::{Bound, Figures, median, percentile};

const AGENTS: usize = 10_000;
const REGIONS: usize = 50;
/// Applications of each cluster, of which every one has the first.
const APPLICATIONS: usize = 20;
const DECISIONS: usize = 3000;
const ROUNDS: usize = 3;

/// Measures all figures.
///
/// # Errors
/// A decision is none.
pub fn run(figures: &mut Figures, seed: u64) -> Result<()> {
    let mut random = StdRng::seed_from_u64(seed);
    let now = Instant::now();
    let mut agents = Agents::default();
    for number in 0..AGENTS {
        agents.report(now, serde_json::from_value(report(number, &mut random)).context("a report")?);
    }
    let round_trips: BTreeMap<String, f64> =
        (0..REGIONS).map(|region| (format!("region{region}"), random.random_range(5.0..300.0))).collect();

    let (mut chosen, mut refused) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let mut times = Vec::with_capacity(DECISIONS);
        for number in 0..DECISIONS {
            let region = format!("region{}", random.random_range(0..REGIONS));
            let client = match number % 3 {
                0 => Whereabouts::Unknown,
                1 => Whereabouts::RoundTrips(&round_trips),
                _ => Whereabouts::At(somewhere(&mut random)),
            };
            // Most callers name no region; those that do leave less to choose from.
            let region = if number % 10 == 9 { region.as_str() } else { "" };
            let wanted = Wanted { app: "application0", version: None, region, client };
            let start = Instant::now();
            let candidates = black_box(agents.choose(now, black_box(wanted), || random.random()));
            times.push(start.elapsed().as_secs_f64() * 1000.0);
            ensure!(candidates.is_ok_and(|candidates| !candidates.is_empty()), "a decision chose nobody");
        }
        chosen.push(times);
        // Nobody can: the answer says why, of all of them.
        let mut times = Vec::with_capacity(DECISIONS / 10);
        for _ in 0..DECISIONS / 10 {
            let wanted =
                Wanted { app: "application0", version: Some(7), region: "", client: Whereabouts::Unknown };
            let start = Instant::now();
            let candidates = black_box(agents.choose(now, black_box(wanted), || random.random()));
            times.push(start.elapsed().as_secs_f64() * 1000.0);
            ensure!(candidates.is_err(), "a version that nobody has was found");
        }
        refused.push(times);
    }
    let over = |rounds: &[Vec<f64>], percent: f64| {
        median(&rounds.iter().map(|times| percentile(times, percent)).collect::<Vec<_>>())
    };
    figures.print("place_10000_agents_ms", over(&chosen, 99.0), "ms", Bound::AtMost(1.0))?;
    figures.print("place_10000_agents_p50_ms", over(&chosen, 50.0), "ms", Bound::None)?;
    figures.print("refuse_10000_agents_ms", over(&refused, 99.0), "ms", Bound::None)?;
    Ok(())
}

fn somewhere(random: &mut StdRng) -> Location {
    Location { latitude: random.random_range(-60.0..70.0), longitude: random.random_range(-180.0..180.0) }
}

fn report(number: usize, random: &mut StdRng) -> Value {
    let place = somewhere(random);
    let application = |number: usize| {
        json!({
            "name": format!("application{number}"),
            "versions": [0, 1, 2],
            "published": 2,
            "needs": { "cpus": 2, "memory_bytes": 3_u64 << 30, "gpu_slots": 0 },
        })
    };
    let others = (1..APPLICATIONS).map(|other| application((number * 7 + other) % 200 + 1));
    json!({
        "version": 1,
        "agent_id": format!("agent{number}"),
        "incarnation": "one",
        "region": format!("region{}", number % REGIONS),
        "cluster_id": format!("cluster{number}"),
        "location": [place.latitude, place.longitude],
        "applications": std::iter::once(application(0)).chain(others).collect::<Vec<_>>(),
        "capacity": {
            "instances": 10,
            "cpus": 64.0,
            "free_cpus": random.random_range(0.0..64.0_f64).floor(),
            "memory_bytes": 256_u64 << 30,
            "free_memory_bytes": random.random_range(0..256_u64) << 30,
        },
        "ams_reachable": random.random_range(0..50) != 0,
        "leaving": false,
    })
}
