//! What every engine does, whatever instances are to it. Included by the tests of each of them, so it needs nothing of
//! theirs.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use fanlight_ams::{
    Phase, Seen,
    engine::{Engine, EngineError, Exec, Spec},
};
use fanlight_api::{InstanceId, guest::EndReason};
use tokio::io::AsyncReadExt as _;

/// Longer than anything here takes; a test that needs it has failed.
const PATIENCE: Duration = Duration::from_secs(60);
/// For instances that stop when they are asked.
pub const GRACE: Duration = Duration::from_secs(10);

/// Waits until an instance is in a phase.
pub async fn until_phase(
    engine: &dyn Engine,
    id: &InstanceId,
    what: &str,
    reached: impl Fn(&Phase) -> bool,
) -> Seen {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let seen = engine.seen(id).await;
        if reached(&seen.phase) {
            return seen;
        }
        assert!(Instant::now() < deadline, "instance {id} is not {what}: {seen:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The end of a run that should have ended.
pub async fn until_ended(engine: &dyn Engine, id: &InstanceId) -> fanlight_api::guest::Ended {
    let seen = until_phase(engine, id, "ended", |phase| matches!(phase, Phase::Ended(_))).await;
    let Phase::Ended(ended) = seen.phase else { unreachable!("it has ended") };
    ended
}

/// What every engine does. `spec` makes an instance that runs until it is stopped.
pub async fn contract(engine: &dyn Engine, mut spec: impl FnMut() -> Spec) {
    let instance = spec();
    let id = instance.id();
    let mut changes = engine.changes();

    // Nothing there: nothing is an error but what needs an instance.
    assert_eq!(engine.seen(id).await, Seen::ABSENT);
    assert!(matches!(engine.start(id, 1).await, Err(EngineError::Absent(_))));
    engine.stop(id, GRACE).await;
    engine.delete(id).await.expect("nothing to delete is fine");
    assert!(matches!(engine.read_log(id, "streamer.log").await, Err(EngineError::NoLog(_))));

    // At least one machine, with a name of its own.
    let machines = engine.machines().await.expect("known");
    let names: BTreeSet<&str> = machines.iter().map(|machine| &*machine.name).collect();
    assert!(!names.is_empty() && names.len() == machines.len(), "{machines:?}");
    assert!(machines.iter().all(|machine| machine.cpus > 0 && machine.memory_bytes > 0), "{machines:?}");

    // Made, twice.
    engine.create(&instance).await.expect("made");
    engine.create(&instance).await.expect("made again");
    assert_eq!(engine.seen(id).await, Seen { run: 0, phase: Phase::Idle });
    assert!(engine.list().await.expect("listed").contains(id));

    // Started, twice; an older run changes nothing.
    engine.start(id, 1).await.expect("started");
    engine.start(id, 1).await.expect("started again");
    let seen = until_phase(engine, id, "ready", |phase| *phase == Phase::Ready).await;
    assert_eq!(seen.run, 1);
    engine.start(id, 0).await.expect("an older run");
    assert_eq!(engine.seen(id).await, seen);
    engine.create(&instance).await.expect("made again while it runs");
    assert_eq!(engine.seen(id).await, seen);

    // A program beside the application.
    let program =
        |words: &[&str]| Exec { command: words.iter().map(ToString::to_string).collect(), ..Exec::default() };
    for (words, code, text) in [(&["echo", "a b"][..], 0, "a b\n"), (&["false"], 1, "")] {
        let mut running = engine.exec(id, program(words)).await.expect("begun");
        let mut said = String::new();
        running.stdout.read_to_string(&mut said).await.expect("read");
        assert_eq!((running.ended.await, &*said), (Ok(code), text), "{words:?}");
    }

    // Stopped, and started again with the next run.
    engine.stop(id, GRACE).await;
    let ended = until_phase(engine, id, "stopped", |phase| matches!(phase, Phase::Ended(_))).await;
    assert!(matches!(&ended.phase, Phase::Ended(ended) if ended.reason == EndReason::Stopped), "{ended:?}");
    engine.stop(id, GRACE).await;
    let late = engine.exec(id, program(&["echo"])).await;
    assert!(matches!(late, Err(EngineError::NotRunning(_))), "it has ended");
    engine.start(id, 2).await.expect("started again");
    let seen = until_phase(engine, id, "ready again", |phase| *phase == Phase::Ready).await;
    assert_eq!(seen.run, 2);
    assert!(engine.logs(id).await.contains(&"streamer.log".to_owned()));
    let log = engine.read_log(id, "streamer.log").await.expect("there");
    assert!(!log.is_empty());
    for bad in ["", "no.log", "../guest.json", "..", ".", "a/b", "guest.json"] {
        assert!(matches!(engine.read_log(id, bad).await, Err(EngineError::NoLog(_))), "{bad:?}");
    }

    // Deleted while it runs.
    engine.delete(id).await.expect("deleted");
    assert_eq!(engine.seen(id).await, Seen::ABSENT);
    assert!(!engine.list().await.expect("listed").contains(id));
    engine.delete(id).await.expect("deleted again");
    assert!(engine.logs(id).await.is_empty());
    let mut heard = 0;
    while let Ok(changed) = changes.try_recv() {
        assert_eq!(changed, *id);
        heard += 1;
    }
    assert!(heard >= 6, "{heard} changes were told");

    // Several at a time, each by itself.
    let many: Vec<Spec> = (0..3).map(|_| spec()).collect();
    for instance in &many {
        engine.create(instance).await.expect("made");
        engine.start(instance.id(), 1).await.expect("started");
    }
    for instance in &many {
        until_phase(engine, instance.id(), "ready", |phase| *phase == Phase::Ready).await;
    }
    engine.stop(many[0].id(), Duration::ZERO).await;
    until_phase(engine, many[0].id(), "killed", |phase| matches!(phase, Phase::Ended(_))).await;
    assert_eq!(engine.seen(many[1].id()).await.phase, Phase::Ready);
    for instance in &many {
        engine.delete(instance.id()).await.expect("deleted");
    }
    assert!(engine.list().await.expect("listed").is_empty());
}

/// Many launches and deletes at a time. `spec` makes an instance that runs until it is stopped.
pub async fn many_at_a_time(engine: &dyn Engine, count: u32, mut spec: impl FnMut() -> Spec) {
    let many: Vec<Spec> = (0..count).map(|_| spec()).collect();
    let launched = many.iter().map(async |instance| {
        engine.create(instance).await.expect("made");
        engine.start(instance.id(), 1).await.expect("started");
        until_phase(engine, instance.id(), "ready", |phase| *phase == Phase::Ready).await;
    });
    futures_util::future::join_all(launched).await;
    let listed = engine.list().await.expect("listed");
    assert!(many.iter().all(|instance| listed.contains(instance.id())), "{listed:?}");
    let deleted = many.iter().map(async |instance| engine.delete(instance.id()).await.expect("deleted"));
    futures_util::future::join_all(deleted).await;
    assert!(engine.list().await.expect("listed").is_empty());
}
