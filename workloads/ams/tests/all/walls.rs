//! What an instance can reach: tried from inside, by the program that is streamed.

use fanlight_ams::{
    Phase,
    engine::{Engine as _, ProcessEngine},
};

use crate::stack::{process_config, spec, until, until_phase};

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_sees_its_own_and_nothing_else() {
    let folder = tempfile::tempdir().expect("made");
    let secret = folder.path().join("token");
    std::fs::write(&secret, "secret").expect("written");
    let engine = ProcessEngine::open(process_config(folder.path())).await.expect("opened");
    let other = spec(folder.path(), &["run"]);
    let probe = spec(folder.path(), &["probe", secret.to_str().expect("UTF-8")]);
    for instance in [&other, &probe] {
        engine.create(instance).await.expect("made");
        engine.start(instance.id(), 1).await.expect("started");
        until_phase(&engine, instance.id(), "ready", |phase| *phase == Phase::Ready).await;
    }
    let verdict = until("the attempts are made", async || {
        let log = engine.read_log(probe.id(), "application.log").await.ok()?;
        let log = String::from_utf8(log).expect("text");
        log.contains("end\n").then_some(log)
    })
    .await;
    for line in verdict.lines() {
        assert!(!line.contains("REACHED") && !line.contains("IMPOSSIBLE"), "{verdict}");
    }
    assert!(verdict.contains("state folder: refused") && verdict.contains("package: possible"), "{verdict}");
    let home = folder.path().join("instances").join(probe.id().as_str()).join("home");
    assert!(home.join("mine").exists(), "the home is not the instance's");
    if rustix::process::geteuid().is_root() {
        use std::os::unix::fs::MetadataExt as _;
        let uids = [&other, &probe].map(|instance| {
            let folder = folder.path().join("instances").join(instance.id().as_str());
            std::fs::metadata(folder.join("home")).expect("there").uid()
        });
        assert!(uids[0] != uids[1] && uids.iter().all(|uid| *uid >= 200_000), "{uids:?}");
    }
    for instance in [&other, &probe] {
        engine.delete(instance.id()).await.expect("deleted");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn logs_that_are_links_or_pipes_are_not_followed() {
    let folder = tempfile::tempdir().expect("made");
    let secret = folder.path().join("token");
    std::fs::write(&secret, "secret").expect("written");
    let engine = ProcessEngine::open(process_config(folder.path())).await.expect("opened");
    let instance = spec(folder.path(), &["links", secret.to_str().expect("UTF-8")]);
    engine.create(&instance).await.expect("made");
    engine.start(instance.id(), 1).await.expect("started");
    until("the links are made", async || engine.read_log(instance.id(), "application.log").await.ok()).await;
    let expected = ["application.log", "shim.log", "streamer.log"];
    until("nothing but logs is listed", async || {
        (engine.logs(instance.id()).await == expected).then_some(())
    })
    .await;
    for name in ["passwd.log", "secret.log", "pipe.log"] {
        assert!(engine.read_log(instance.id(), name).await.is_err(), "{name}");
    }
    engine.delete(instance.id()).await.expect("deleted");
}
