//! The bench `placement`: how long one choice of a cluster, and of a node, takes among ten thousand. The pure functions
//! alone, with reports as agents send them and nodes that are filled step by step.

use std::{collections::BTreeMap, hint::black_box, time::Instant};

use anyhow::{Context as _, Result, ensure};
use fanlight_ams::cores::placement::{self, Encoder, GpuOffer, Offer, Share, Strategy, Used, Wish};
use fanlight_api::gateway::Location;
use fanlight_gateway::cores::agents::{Agents, Wanted, Whereabouts};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use serde_json::{Value, json};

use crate::figures::{Bound, Figures, median, percentile};

const AGENTS: usize = 10_000;
const NODES: usize = 10_000;
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
    figures.print("place_10000_agents_ms", over(&chosen, 99.0), "ms", Bound::AtMost(1.0))?;
    figures.print("place_10000_agents_p50_ms", over(&chosen, 50.0), "ms", Bound::None)?;
    figures.print("refuse_10000_agents_ms", over(&refused, 99.0), "ms", Bound::None)?;
    nodes(figures, &mut random)
}

/// Instances on ten thousand nodes; each decision takes its share, so that they fill up as they would.
fn nodes(figures: &mut Figures, random: &mut StdRng) -> Result<()> {
    let offers: Vec<Offer> = (0..NODES).map(|number| offer(number, random)).collect::<Result<_>>()?;
    let mut used: Vec<Used> = vec![Used::default(); NODES];
    let by_name: BTreeMap<_, usize> =
        offers.iter().zip(0..).map(|(offer, at)| (offer.node.clone(), at)).collect();
    let (mut chosen, mut refused) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let mut times = Vec::with_capacity(DECISIONS);
        for number in 0..DECISIONS {
            let wish = Wish {
                share: Share { cpus: 2, memory_bytes: 3 << 30, disk_bytes: 3 << 30, ..Share::default() },
                encoder: [Encoder::Software, Encoder::GpuPreferred, Encoder::Gpu][number % 3],
                selector: if number % 5 == 4 { vec!["zone1".into()] } else { Vec::new() },
                ..Wish::default()
            };
            let strategy = if number % 2 == 0 { Strategy::Spread } else { Strategy::Binpack };
            let start = Instant::now();
            let placed = black_box(placement::place(black_box(&wish), strategy, offers.iter().zip(&used)));
            times.push(start.elapsed().as_secs_f64() * 1000.0);
            let placed = placed.context("a decision chose no node")?;
            used[by_name[&placed.node]].add(&placed.share);
        }
        chosen.push(times);
        let mut times = Vec::with_capacity(DECISIONS / 10);
        for _ in 0..DECISIONS / 10 {
            let wish = Wish { selector: vec!["nowhere".into()], ..Wish::default() };
            let start = Instant::now();
            let placed =
                black_box(placement::place(black_box(&wish), Strategy::Spread, offers.iter().zip(&used)));
            times.push(start.elapsed().as_secs_f64() * 1000.0);
            ensure!(placed.is_err(), "a tag that no node has was found");
        }
        refused.push(times);
    }
    figures.print("place_10000_nodes_ms", over(&chosen, 99.0), "ms", Bound::AtMost(1.0))?;
    figures.print("place_10000_nodes_p50_ms", over(&chosen, 50.0), "ms", Bound::None)?;
    figures.print("refuse_10000_nodes_ms", over(&refused, 99.0), "ms", Bound::None)
}

fn over(rounds: &[Vec<f64>], percent: f64) -> f64 {
    median(&rounds.iter().map(|times| percentile(times, percent)).collect::<Vec<_>>())
}

fn offer(number: usize, random: &mut StdRng) -> Result<Offer> {
    let gpus = (0..number % 3).map(|id| GpuOffer {
        id: id as u32,
        kind: "nvidia".into(),
        slots: 32,
        encoder_slots: 32,
    });
    Ok(Offer {
        node: format!("node{number}").parse().context("the name of a node")?,
        online: random.random_range(0..50) != 0,
        unschedulable: random.random_range(0..50) == 0,
        architecture: "x86_64".into(),
        tags: vec![format!("zone{}", number % 20), "ssd".into()],
        cpus: 256.0,
        memory_bytes: 512 << 30,
        disk_bytes: Some(4 << 40),
        disk_free_percent: Some(random.random_range(4.0..100.0)),
        gpus: gpus.collect(),
        places: 1000,
    })
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
