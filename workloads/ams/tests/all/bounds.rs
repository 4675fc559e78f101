//! What an instance may take of its machine. Control groups of version 2 with the controllers memory, cpu and pids,
//! which root or a systemd unit with `Delegate=yes` may use, are needed for the bounds; elsewhere it must be said that
//! there are none.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use fanlight_ams::{
    Phase,
    cores::placement::Share,
    engine::{Bounding, Engine as _, EngineError, ProcessConfig, ProcessEngine, Spec},
};
use fanlight_api::guest::EndReason;

use crate::stack::{process_config, processes_with, spec, until, until_phase};

const MEMORY: u64 = 64 << 20;

fn bounded(folder: &Path, command: &[&str]) -> Spec {
    Spec { share: Share { cpus: 2, memory_bytes: MEMORY, ..Share::default() }, ..spec(folder, command) }
}

/// The group of the last run, as the shim was told.
fn group(folder: &Path, instance: &Spec) -> Option<PathBuf> {
    let path = folder.join("instances").join(instance.id().as_str()).join("launch.json");
    let launch: serde_json::Value =
        serde_json::from_slice(&fs::read(path).expect("it was started")).expect("JSON");
    launch["group"]["path"].as_str().map(PathBuf::from)
}

/// Where the machine has no bounds: that is said, and who requires them does not start.
async fn says_so(folder: &Path, engine: &ProcessEngine, reason: &str) {
    let machine = &engine.machines().await.expect("seen")[0];
    assert!(machine.online && machine.message.contains(reason), "{machine:?}");
    assert!(reason.contains("not bounded here") && reason.contains("memory"), "{reason}");
    let config = ProcessConfig { bounds: Bounding::Required, ..process_config(folder) };
    match ProcessEngine::open(config).await {
        Err(EngineError::Unbounded(why)) => assert!(reason.contains(&why), "{why}"),
        other => panic!("it starts without bounds: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_has_the_memory_the_cpus_and_the_processes_it_was_given_and_no_more() {
    let folder = tempfile::tempdir().expect("made");
    let engine = ProcessEngine::open(process_config(folder.path())).await.expect("opened");
    let (glutton, breeder) = (bounded(folder.path(), &["eat"]), bounded(folder.path(), &["breed"]));
    if let Some(reason) = engine.unbounded() {
        says_so(folder.path(), &engine, &reason).await;
        let run = bounded(folder.path(), &["run"]);
        engine.create(&run).await.expect("made");
        engine.start(run.id(), 1).await.expect("it runs all the same");
        until_phase(&engine, run.id(), "ready", |phase| *phase == Phase::Ready).await;
        engine.delete(run.id()).await.expect("deleted");
        return;
    }
    assert_eq!(engine.machines().await.expect("seen")[0].message, "");
    for instance in [&glutton, &breeder] {
        engine.create(instance).await.expect("made");
        engine.start(instance.id(), 1).await.expect("started");
    }
    until_phase(&engine, glutton.id(), "out of memory", |phase| {
        matches!(phase, Phase::Ended(ended)
            if ended.reason == EndReason::Failed && ended.message.contains("more than its 64MB"))
    })
    .await;

    let group_of = |instance: &Spec| group(folder.path(), instance).expect("it has a group");
    let read = |file: &str| fs::read_to_string(group_of(&breeder).join(file)).expect(file);
    assert_eq!(read("memory.max").trim(), MEMORY.to_string());
    assert_eq!(read("memory.oom.group").trim(), "1");
    assert_eq!(read("cpu.max").trim(), "200000 100000");
    assert_eq!(read("cpu.weight").trim(), "200");
    assert_eq!(read("pids.max").trim(), "4096");
    let ended = until("it can have no more of something", async || {
        let log = engine.read_log(breeder.id(), "application.log").await.is_ok();
        let phase = engine.seen(breeder.id()).await.phase;
        (log || matches!(phase, Phase::Ended(_))).then_some(phase)
    })
    .await;
    let pids: u64 = read("pids.current").trim().parse().expect("a number");
    assert!(pids <= 4096, "{pids} processes: {ended:?}");

    let groups = [&glutton, &breeder].map(group_of);
    for instance in [&glutton, &breeder] {
        engine.delete(instance.id()).await.expect("deleted");
    }
    for group in groups {
        assert!(!group.exists(), "{} is left behind", group.display());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn groups_that_were_left_behind_are_removed_with_what_is_in_them_when_the_engine_is_opened() {
    let folder = tempfile::tempdir().expect("made");
    let engine = ProcessEngine::open(process_config(folder.path())).await.expect("opened");
    let instance = bounded(folder.path(), &["run"]);
    engine.create(&instance).await.expect("made");
    engine.start(instance.id(), 1).await.expect("started");
    until_phase(&engine, instance.id(), "ready", |phase| *phase == Phase::Ready).await;
    let Some(left) = group(folder.path(), &instance) else {
        let reason = engine.unbounded().expect("without a group there are no bounds");
        says_so(folder.path(), &engine, &reason).await;
        engine.delete(instance.id()).await.expect("deleted");
        return;
    };
    assert!(!fs::read_to_string(left.join("cgroup.procs")).expect("there").trim().is_empty());
    engine.stop(instance.id(), Duration::ZERO).await;
    until_phase(&engine, instance.id(), "ended", |phase| matches!(phase, Phase::Ended(_))).await;
    // As if AMS had ended in the middle of a removal.
    fs::remove_dir_all(folder.path().join("instances").join(instance.id().as_str())).expect("removed");
    assert!(left.exists());
    let stray = std::process::Command::new("sleep").arg("8086").spawn().expect("started");
    fs::write(left.join("cgroup.procs"), stray.id().to_string()).expect("moved");
    drop(engine);
    let next = ProcessEngine::open(process_config(folder.path())).await.expect("opened");
    assert!(!left.exists(), "{} is left behind", left.display());
    assert!(next.list().await.expect("listed").is_empty());
    let mut stray = stray;
    assert!(!stray.wait().expect("it has ended").success());
    assert!(processes_with("sleep 8086").is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn bounds_that_are_switched_off_are_not_made() {
    let folder = tempfile::tempdir().expect("made");
    let config = ProcessConfig { bounds: Bounding::Off, ..process_config(folder.path()) };
    let engine = ProcessEngine::open(config).await.expect("opened");
    let instance = bounded(folder.path(), &["run"]);
    engine.create(&instance).await.expect("made");
    engine.start(instance.id(), 1).await.expect("started");
    until_phase(&engine, instance.id(), "ready", |phase| *phase == Phase::Ready).await;
    assert_eq!(group(folder.path(), &instance), None);
    assert_eq!(engine.machines().await.expect("seen")[0].message, "", "nobody wants to be told");
    engine.delete(instance.id()).await.expect("deleted");
}
