//! `fanlight-sim`: runs seeds of the simulation, and shows that planted bugs are found.

use std::{
    process::ExitCode,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Instant,
};

use fanlight_tests_sim::{Outcome, planted::Planted, run};

/// Lines shown of a seed that failed.
const LINES: usize = 40;
/// Seeds within which a planted bug must be found.
const PLANTED_SEEDS: u64 = 2000;
/// Seeds that count as one test.
const SEEDS_A_TEST: u64 = 1000;
const USAGE: &str = "\
fanlight-sim [--seeds N] [--from S] [--planted NAME|all]   run seeds, then look for planted bugs
fanlight-sim --seed S [--trace] [--planted NAME]           run one seed, with everything that happens";

struct Arguments {
    seeds: u64,
    from: u64,
    seed: Option<u64>,
    trace: bool,
    planted: Vec<Planted>,
}

fn arguments() -> Result<Arguments, String> {
    let mut parsed = Arguments { seeds: 1000, from: 0, seed: None, trace: false, planted: Vec::new() };
    let mut rest = std::env::args().skip(1);
    while let Some(flag) = rest.next() {
        let mut value = || rest.next().ok_or_else(|| format!("{flag} needs a value"));
        let number = |text: String| text.parse::<u64>().map_err(|_| format!("{text:?} is no number"));
        match flag.as_str() {
            "--seeds" => parsed.seeds = number(value()?)?,
            "--from" => parsed.from = number(value()?)?,
            "--seed" => parsed.seed = Some(number(value()?)?),
            "--trace" => parsed.trace = true,
            "--planted" => match value()?.as_str() {
                "all" => parsed.planted = Planted::ALL.to_vec(),
                name => parsed.planted.push(Planted::of(name).ok_or_else(|| {
                    let names: Vec<&str> = Planted::ALL.iter().map(|planted| planted.name()).collect();
                    format!("no planted bug {name:?}; there are: {}", names.join(", "))
                })?),
            },
            _ => return Err(format!("{flag:?} is not understood\n{USAGE}")),
        }
    }
    Ok(parsed)
}

/// A seed that broke an invariant.
struct Failure {
    seed: u64,
    violation: String,
}

/// What many seeds came to.
struct Tally {
    failures: Vec<Failure>,
    done: u64,
    least_events: u64,
    events: u64,
}

/// Runs seeds on all cores; `first`: until one fails.
fn run_many(from: u64, seeds: u64, planted: Option<Planted>, first: bool) -> Tally {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(16);
    let next = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let tally = Mutex::new(Tally { failures: Vec::new(), done: 0, least_events: u64::MAX, events: 0 });
    let started = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= seeds {
                        return;
                    }
                    let seed = from + number;
                    let outcome = run(seed, planted, 0);
                    let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
                    tally.done += 1;
                    tally.events += outcome.events;
                    if let Some(violation) = outcome.violation {
                        if planted.is_none() {
                            println!("seed {seed} failed: {violation}");
                        }
                        tally.failures.push(Failure { seed, violation });
                        // A few show as much as thousands.
                        if first || tally.failures.len() >= 20 {
                            stop.store(true, Ordering::Relaxed);
                        }
                    } else {
                        tally.least_events = tally.least_events.min(outcome.events);
                    }
                    if planted.is_none() && tally.done.is_multiple_of(1000) {
                        println!("{} seeds after {:.1} s", tally.done, started.elapsed().as_secs_f64());
                    }
                }
            });
        }
    });
    let mut tally = tally.into_inner().unwrap_or_else(PoisonError::into_inner);
    tally.failures.sort_by_key(|failure| failure.seed);
    tally
}

fn show(seed: u64, planted: Option<Planted>, lines: usize) -> Outcome {
    let outcome = run(seed, planted, lines);
    for line in &outcome.trace {
        println!("{line}");
    }
    outcome
}

fn main() -> ExitCode {
    let arguments = match arguments() {
        Ok(arguments) => arguments,
        Err(error) => {
            eprintln!("fanlight-sim: {error}");
            return ExitCode::from(2);
        }
    };
    if let Some(seed) = arguments.seed {
        let lines = if arguments.trace { usize::MAX } else { LINES };
        let outcome = show(seed, arguments.planted.first().copied(), lines);
        println!(
            "seed {seed}: {} events, {}",
            outcome.events,
            outcome.violation.as_deref().unwrap_or("all well")
        );
        return if outcome.violation.is_some() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
    }
    let (mut passed, mut failed) = (0_u64, 0_u64);
    if arguments.seeds > 0 {
        let started = Instant::now();
        let tally = run_many(arguments.from, arguments.seeds, None, false);
        println!(
            "{} seeds from {} in {:.1} s, {} events, at least {} a seed",
            tally.done,
            arguments.from,
            started.elapsed().as_secs_f64(),
            tally.events,
            tally.least_events,
        );
        if let Some(failure) = tally.failures.first() {
            println!("\nthe last that happened with seed {}:", failure.seed);
            show(failure.seed, None, LINES);
            println!("\nreplay it with: fanlight-sim --seed {} --trace", failure.seed);
        }
        failed += tally.failures.len() as u64;
        passed += ((tally.done - tally.failures.len() as u64) / SEEDS_A_TEST).max(u64::from(failed == 0));
    }
    for planted in arguments.planted {
        let started = Instant::now();
        let tally = run_many(arguments.from, PLANTED_SEEDS, Some(planted), true);
        let took = started.elapsed().as_secs_f64();
        match tally.failures.first() {
            Some(failure) => {
                println!(
                    "planted {}: found after {} seeds ({took:.1} s), seed {}: {}",
                    planted.name(),
                    tally.done,
                    failure.seed,
                    failure.violation
                );
                passed += 1;
            }
            None => {
                println!("planted {}: NOT found within {PLANTED_SEEDS} seeds ({took:.1} s)", planted.name());
                failed += 1;
            }
        }
    }
    println!("{passed} passed, {failed} failed");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
