//! The suite `load`: the same programs and clients under a small load, without any bound of time. What is checked is
//! that everything is answered, once and in order, that too much is refused as such, and that nothing stays.

use std::process::ExitCode;

use anyhow::{Context as _, Result};
use fanlight_store::{StoreConfig, StoreExt as _};

use crate::{
    machine,
    servers::Store,
    world::{World, listed},
};

const SESSIONS: usize = 300;
const REQUESTS_PER_SECOND: u32 = 150;
/// What the allocator may keep for itself, KiB.
const SLACK_KIB: f64 = 8.0 * 1024.0;

/// Counts what holds and what does not.
#[derive(Default)]
struct Checks {
    passed: usize,
    failed: usize,
}

impl Checks {
    fn check(&mut self, what: &str, holds: bool, detail: impl FnOnce() -> String) {
        if holds {
            self.passed += 1;
            println!("ok      {what}");
        } else {
            self.failed += 1;
            println!("FAILED  {what}: {}", detail());
        }
    }
}

/// Runs all checks on each store.
///
/// # Errors
/// The programs cannot be started, or what has to be there for the checks is not.
pub async fn run(stores: &[Store], seed: u64) -> Result<ExitCode> {
    let mut checks = Checks::default();
    for store in stores {
        println!("on {store:?}");
        let mut world = World::start(*store, REQUESTS_PER_SECOND, 3, seed).await?;
        if let Err(error) = all(&mut checks, &mut world).await {
            checks.check("the programs can be loaded", false, || format!("{error:#}"));
        }
        if checks.failed > 0 {
            println!("the logs are kept in {}", world.servers.keep_logs().display());
            break;
        }
    }
    println!("{} passed, {} failed", checks.passed, checks.failed);
    Ok(if checks.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn all(checks: &mut Checks, world: &mut World) -> Result<()> {
    let caller = world.caller.clone();
    let created = world.creates(&caller, 100.0, 100).await;
    checks.check("every create is answered with a session", created.created.len() == 100, || {
        format!("{} were, {} refused, failed {:?}", created.created.len(), created.refused, created.failed)
    });
    let ids = listed(&world.servers.internal).await?;
    checks.check(
        "every session that was answered is listed",
        created.created.iter().all(|id| ids.contains(id)),
        || format!("{} are listed", ids.len()),
    );
    world.delete(&created.created).await?;

    world.fill(SESSIONS, 140.0).await?;
    checks.check("every client is joined with its instance", world.agents.running() >= SESSIONS, || {
        format!("{} instances run", world.agents.running())
    });
    let pid = world.servers.gateway_pid()?;
    let first_wave = machine::resident_kib(pid)? - world.base_kib;

    let echoed = world.agents.echoed();
    let frames = world.round_trips(600.0, 1800).await;
    let echoed = world.agents.echoed() - echoed;
    let detail = frames.as_ref().err().map(|error| format!("{error:#}")).unwrap_or_default();
    checks.check("every frame comes back once and in its order", frames.is_ok(), || detail);
    checks.check("no instance gets a frame twice", echoed == 1800, || format!("{echoed} of 1800"));

    let before = world.sockets.tally.errors().values().sum::<usize>();
    let joins = world.joins(40.0, 60).await?;
    checks.check("every join takes its session over", joins.connected.len() == 60, || {
        format!("{} did", joins.connected.len())
    });
    let joined = world.count_joined(300.0).await?;
    checks.check("all sessions stay joined", joined == SESSIONS, || format!("{joined} are"));
    let told = world.sockets.tally.errors();
    let count = told.values().sum::<usize>() - before;
    checks.check("clients that were replaced are told, and nobody else", count <= 60, || format!("{told:?}"));

    let overload = world.overload(2.0 * f64::from(REQUESTS_PER_SECOND), 5.0, 50.0, 4.0).await?;
    let (greedy, honest) = (&overload.greedy, &overload.honest);
    checks.check("twice the load is refused with 429", greedy.refused > 0, || "nothing was refused".into());
    checks.check("refusals leave room for as much as is allowed", greedy.created.len() >= 300, || {
        format!("{} were created", greedy.created.len())
    });
    let failed = || format!("{:?} {:?}", greedy.failed, honest.failed);
    checks.check(
        "nothing fails in another way",
        greedy.failed.is_empty() && honest.failed.is_empty(),
        failed,
    );
    checks.check("a caller that asks little is refused nothing", honest.refused == 0, || {
        format!("{} of {} were", honest.refused, honest.refused + honest.created.len())
    });

    world.clear().await?;
    let left = listed(&world.servers.internal).await?;
    checks
        .check("nothing is listed after all was deleted", left.is_empty(), || format!("{} are", left.len()));
    world.fill(SESSIONS, 140.0).await?;
    let second_wave = machine::resident_kib(pid)? - world.base_kib;
    let most = first_wave * 1.5 + SLACK_KIB;
    checks.check("memory of deleted sessions serves the next ones", second_wave <= most, || {
        format!("{second_wave:.0} KiB, at first {first_wave:.0} KiB")
    });
    world.clear().await?;

    let panics = world.servers.logged("panic")?;
    checks.check("no task of the gateway panicked", panics.is_empty(), || panics.join("\n"));
    world.servers.end_gateway().await?;
    let config = StoreConfig { url: world.servers.store_url.clone(), ..StoreConfig::default() };
    let store = fanlight_store::open(&config).await.context("opening the store that the gateway left")?;
    for prefix in ["gateway/sessions/", "gateway/instances/"] {
        let range = store.range(prefix, None, 10).await?;
        checks.check(
            &format!("nothing is left in the store below {prefix}"),
            range.entries.is_empty(),
            || format!("{:?}", range.entries.iter().map(|entry| &entry.key).collect::<Vec<_>>()),
        );
    }
    let key = store.get_json::<serde_json::Value>("gateway/root-key").await?;
    checks.check("the store is the gateway's own", key.is_some(), || "it holds no root key".into());
    store.close().await;
    Ok(())
}
