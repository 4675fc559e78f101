//! The contract of engines, against each of them.

use std::time::Duration;

use fanlight_ams::{
    Phase,
    engine::{Engine, ProcessEngine, Script, SimulatedEngine},
};
use fanlight_api::{InstanceId, guest::EndReason};

use crate::{
    contract::{GRACE, contract, many_at_a_time, until_ended},
    stack::{process_config, processes_with, spec, until, until_phase},
};

#[tokio::test(flavor = "multi_thread")]
async fn the_simulated_engine_keeps_the_contract() {
    let folder = tempfile::tempdir().expect("made");
    let engine = SimulatedEngine::new(Script::Run);
    contract(&engine, || spec(folder.path(), &["run"])).await;
    many_at_a_time(&engine, 16, || spec(folder.path(), &["run"])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_process_engine_keeps_the_contract() {
    let folder = tempfile::tempdir().expect("made");
    let engine = ProcessEngine::open(process_config(folder.path())).await.expect("opened");
    assert_eq!(engine.isolation().refusal(), None, "this machine must allow namespaces");
    contract(&engine, || spec(folder.path(), &["run"])).await;
    many_at_a_time(&engine, 16, || spec(folder.path(), &["run"])).await;
    let left = std::fs::read_dir(folder.path().join("instances")).expect("there").count();
    assert_eq!(left, 0, "files are left");
    let text = folder.path().display().to_string();
    until("no process is left", async || processes_with(&text).is_empty().then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_way_to_end_is_told_in_words() {
    let folder = tempfile::tempdir().expect("made");
    let engine = ProcessEngine::open(process_config(folder.path())).await.expect("opened");
    for (command, reason, text) in [
        ("finish", EndReason::Finished, "done"),
        ("exit", EndReason::Failed, "status 70"),
        ("crash", EndReason::Failed, "signal 11"),
        ("fail", EndReason::Failed, "the application said no"),
    ] {
        let instance = spec(folder.path(), &[command]);
        engine.create(&instance).await.expect("made");
        engine.start(instance.id(), 1).await.expect("started");
        let ended = until_ended(&engine, instance.id()).await;
        assert!(ended.reason == reason && ended.message.contains(text), "{command}: {ended:?}");
        let log = engine.read_log(instance.id(), "streamer.log").await.expect("kept");
        assert!(String::from_utf8_lossy(&log).contains(command), "{command}");
        engine.delete(instance.id()).await.expect("deleted");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_stop_is_killed_and_what_forks_away_ends_with_its_instance() {
    let folder = tempfile::tempdir().expect("made");
    let engine = ProcessEngine::open(process_config(folder.path())).await.expect("opened");
    let stubborn = spec(folder.path(), &["stubborn"]);
    let forking = spec(folder.path(), &["fork", "98765"]);
    for instance in [&stubborn, &forking] {
        engine.create(instance).await.expect("made");
        engine.start(instance.id(), 1).await.expect("started");
        until_phase(&engine, instance.id(), "ready", |phase| *phase == Phase::Ready).await;
    }
    until("the daemon runs", async || (!processes_with("sleep 98765").is_empty()).then_some(())).await;
    engine.stop(stubborn.id(), Duration::from_secs(1)).await;
    engine.stop(forking.id(), GRACE).await;
    for (instance, text) in [(&stubborn, "killed"), (&forking, "asked to stop")] {
        let seen =
            until_phase(&engine, instance.id(), "ended", |phase| matches!(phase, Phase::Ended(_))).await;
        assert!(matches!(&seen.phase, Phase::Ended(ended) if ended.message.contains(text)), "{seen:?}");
    }
    until("the daemon is gone", async || processes_with("sleep 98765").is_empty().then_some(())).await;
    for instance in [&stubborn, &forking] {
        engine.delete(instance.id()).await.expect("deleted");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_killed_of_an_instance_all_of_it_is_gone() {
    let folder = tempfile::tempdir().expect("made");
    let engine = ProcessEngine::open(process_config(folder.path())).await.expect("opened");
    for (position, needle) in
        ["fanlight-ams shim", "bwrap", "/opt/fanlight/bin/streamer.pl run"].iter().enumerate()
    {
        let mark = format!("{}", 88_000 + position);
        let instance = spec(folder.path(), &["fork", &mark]);
        let id: InstanceId = instance.id().clone();
        engine.create(&instance).await.expect("made");
        engine.start(&id, 1).await.expect("started");
        until_phase(&engine, &id, "ready", |phase| *phase == Phase::Ready).await;
        let daemon = format!("sleep {mark}");
        until("the daemon runs", async || (!processes_with(&daemon).is_empty()).then_some(())).await;
        let victim = if *needle == "/opt/fanlight/bin/streamer.pl run" {
            // Inside, nothing names the instance: the streamer is the parent of the daemon.
            let daemon = processes_with(&daemon)[0];
            let stat = std::fs::read_to_string(format!("/proc/{daemon}/stat")).expect("runs");
            stat.rsplit_once(')')
                .expect("a name")
                .1
                .split_whitespace()
                .nth(1)
                .expect("a parent")
                .parse()
                .expect("a number")
        } else {
            let text = id.to_string();
            let of_instance = processes_with(&text);
            *of_instance
                .iter()
                .find(|pid| {
                    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                    String::from_utf8_lossy(&line).replace('\0', " ").contains(needle)
                })
                .unwrap_or_else(|| panic!("{needle} does not run"))
        };
        let pid = rustix::process::Pid::from_raw(victim).expect("a process");
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("killed");
        let seen = until_phase(&engine, &id, "failed", |phase| matches!(phase, Phase::Ended(_))).await;
        assert!(
            matches!(&seen.phase, Phase::Ended(ended) if ended.reason == EndReason::Failed),
            "{needle}: {seen:?}"
        );
        until("the daemon is gone", async || processes_with(&daemon).is_empty().then_some(())).await;
        let text = id.to_string();
        until("everything is gone", async || processes_with(&text).is_empty().then_some(())).await;
        engine.delete(&id).await.expect("deleted");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_programs_are_named() {
    let folder = tempfile::tempdir().expect("made");
    for (shim, streamer, needle) in [
        (
            vec![crate::stack::AMS.to_owned(), "shim".into()],
            "/nowhere/fanlight-streamer",
            "/nowhere/fanlight-streamer",
        ),
        (vec!["/nowhere/shim".to_owned()], "", "/nowhere/shim"),
        (vec!["/bin/false".to_owned()], "", "did not start"),
    ] {
        let mut config = process_config(folder.path());
        config.shim = shim;
        if !streamer.is_empty() {
            config.streamer = vec![streamer.into()];
        }
        let engine = ProcessEngine::open(config).await.expect("opened");
        let instance = spec(folder.path(), &["run"]);
        engine.create(&instance).await.expect("made");
        let error = engine.start(instance.id(), 1).await.expect_err("missing").to_string();
        assert!(error.contains(needle), "{error}");
        engine.delete(instance.id()).await.expect("deleted");
    }
}
