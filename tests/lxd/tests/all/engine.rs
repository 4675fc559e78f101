//! The engine of LXD against the contract of engines, and against what only containers and members can suffer.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fanlight_ams::{
    LxdConfig, Phase, PortsConfig,
    engine::{Engine, LxdEngine, Spec},
};
use fanlight_api::{
    InstanceId, NodeId, PROTOCOL_VERSION,
    guest::{EndReason, Guest, GuestApplication},
};
use fanlight_lxd::{Lxd, StateAction};
use fanlight_tests_lxd::{Harness, NETWORK, POOL, SOON, image};

use crate::contract::{GRACE, contract, many_at_a_time, until_ended, until_phase};

/// Makes specs of instances, each with a place of its own.
pub struct Specs {
    image: String,
    node: NodeId,
    places: u32,
}

impl Specs {
    pub fn new(image: &str, node: &str) -> Self {
        Self { image: image.into(), node: node.parse().expect("a name"), places: 0 }
    }

    /// An instance that does this.
    pub fn spec(&mut self, command: &str) -> Spec {
        let mut share = fanlight_ams::cores::placement::Share { cpus: 1, ..Default::default() };
        share.memory_bytes = 256 << 20;
        share.place = self.places;
        self.places += 1;
        let guest = Guest {
            version: PROTOCOL_VERSION,
            instance_id: InstanceId::generate(),
            application: GuestApplication {
                name: "test".into(),
                command: vec![command.into()],
                ..GuestApplication::default()
            },
            display: Default::default(),
            streaming: None,
            media: Default::default(),
            pool: None,
            devmode: false,
        };
        Spec {
            guest,
            package: None,
            node: self.node.clone(),
            image: Some(self.image.clone()),
            share,
            disk_bytes: 0,
            services: Vec::new(),
            public_address: None,
            base: false,
            copy_of: None,
            addons: Vec::new(),
        }
    }
}

pub fn config(harness: &mut Harness, address: &str) -> LxdConfig {
    LxdConfig {
        url: harness.members()[0].folder.join("unix.socket").display().to_string(),
        pool: POOL.into(),
        network: NETWORK.into(),
        address: address.into(),
        media_ports: PortsConfig { first: 20_000, last: 20_999 },
        ..LxdConfig::default()
    }
}

/// The engine with the image of the tests in it; the image's SHA-256.
async fn engine(config: LxdConfig) -> Result<(LxdEngine, String)> {
    let engine = LxdEngine::open(config).await?;
    let (archive, sha256) = image::with_stand_in()?;
    engine.import_image(&sha256, &archive).await?;
    engine.import_image(&sha256, &archive).await?;
    Ok((engine, sha256))
}

/// What LXD has of ours: containers and ports.
pub async fn left(lxd: &Lxd, member: Option<&str>, address: &str) -> Result<Vec<String>> {
    let project = lxd.project("fanlight");
    let mut left: Vec<_> = project.all_instances().await?.into_iter().map(|instance| instance.name).collect();
    let at = member.map_or_else(|| lxd.clone(), |member| lxd.target(member));
    match at.forward(NETWORK, address).await {
        Ok((forward, _)) => left.extend(forward.ports.into_iter().map(|port| port.description)),
        Err(error) if error.is_not_found() => {}
        Err(error) => return Err(error.into()),
    }
    Ok(left)
}

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

#[test]
fn one_server_keeps_the_contract_of_engines() {
    let mut harness = Harness::single().expect("LXD runs");
    let config = config(&mut harness, "10.91.0.11");
    let lxd = harness.unix(0).expect("a client");
    let test = async {
        let (engine, image) = engine(config.clone()).await?;
        let mut specs = Specs::new(&image, "m1");
        let machines = engine.machines().await?;
        ensure!(machines.len() == 1 && machines[0].address == "10.91.0.11", "{machines:?}");
        ensure!(machines[0].places == 252 && machines[0].online, "{machines:?}");
        contract(&engine, || specs.spec("run")).await;
        ensure!(left(&lxd, None, "10.91.0.11").await?.is_empty());
        ends(&engine, &lxd, &mut specs).await?;
        adopts(&engine, config, &mut specs).await?;
        images(&engine, &harness).await?;

        let files = open_files();
        let mut specs = Specs::new(&image, "m1");
        many_at_a_time(&engine, 16, || specs.spec("run")).await;
        let left = left(&lxd, None, "10.91.0.11").await?;
        ensure!(left.is_empty(), "{left:?}");
        // Connections that wait for their next use are ended after a while.
        ensure!(open_files() <= files + 5, "{} files are open, {files} were", open_files());
        Ok(())
    };
    harness.within(test).expect("it keeps the contract");
}

/// Every way to end.
async fn ends(engine: &LxdEngine, lxd: &Lxd, specs: &mut Specs) -> Result<()> {
    for (command, reason, text) in [
        ("finish", EndReason::Finished, "done"),
        ("fail", EndReason::Failed, "said no"),
        ("vanish", EndReason::Failed, "nothing in it said why"),
    ] {
        let instance = specs.spec(command);
        engine.create(&instance).await?;
        engine.start(instance.id(), 1).await?;
        let ended = until_ended(engine, instance.id()).await;
        ensure!(ended.reason == reason && ended.message.contains(text), "{command}: {ended:?}");
        let log = engine.read_log(instance.id(), "streamer.log").await?;
        ensure!(String::from_utf8_lossy(&log).contains(command), "{command}");
        engine.delete(instance.id()).await?;
    }

    // Killed by somebody else.
    let killed = specs.spec("run");
    engine.create(&killed).await?;
    engine.start(killed.id(), 1).await?;
    until_phase(engine, killed.id(), "ready", |phase| *phase == Phase::Ready).await;
    let project = lxd.project("fanlight");
    let name = format!("ams-{}", killed.id());
    let kill = async || project.change_state(&name, StateAction::Stop, SOON, true).await?.wait(SOON).await;
    loop {
        match kill().await {
            // The engine is about to note something.
            Err(error) if error.is_busy() => tokio::time::sleep(Duration::from_millis(50)).await,
            killed => {
                killed?;
                break;
            }
        }
    }
    let ended = until_ended(engine, killed.id()).await;
    ensure!(ended.reason == EndReason::Failed, "{ended:?}");
    // Removed by somebody else.
    project.delete(&name).await?.wait(SOON).await?;
    until_phase(engine, killed.id(), "gone", |phase| *phase == Phase::Absent).await;
    engine.delete(killed.id()).await?;

    // Never ready, and does not stop when it is asked.
    let hangs = specs.spec("hang");
    engine.create(&hangs).await?;
    engine.start(hangs.id(), 1).await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    ensure!(engine.seen(hangs.id()).await.phase == Phase::Starting);
    engine.stop(hangs.id(), Duration::ZERO).await;
    let ended = until_ended(engine, hangs.id()).await;
    ensure!(ended.reason == EndReason::Stopped, "{ended:?}");
    engine.delete(hangs.id()).await?;
    let stubborn = specs.spec("stubborn");
    engine.create(&stubborn).await?;
    engine.start(stubborn.id(), 1).await?;
    until_phase(engine, stubborn.id(), "ready", |phase| *phase == Phase::Ready).await;
    engine.stop(stubborn.id(), Duration::from_secs(2)).await;
    let ended = until_ended(engine, stubborn.id()).await;
    ensure!(ended.reason == EndReason::Stopped, "{ended:?}");
    engine.delete(stubborn.id()).await?;
    Ok(())
}

/// Another engine over the same LXD, as after a restart of AMS or in another unit, sees what the first one sees.
async fn adopts(engine: &LxdEngine, config: LxdConfig, specs: &mut Specs) -> Result<()> {
    let (ready, idle, hangs) = (specs.spec("run"), specs.spec("run"), specs.spec("hang"));
    for instance in [&ready, &idle, &hangs] {
        engine.create(instance).await?;
    }
    engine.start(ready.id(), 1).await?;
    engine.start(hangs.id(), 1).await?;
    until_phase(engine, ready.id(), "ready", |phase| *phase == Phase::Ready).await;
    // That it is ready is noted after it is told.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let other = LxdEngine::open(config).await?;
    for (instance, phase) in [(&ready, Phase::Ready), (&idle, Phase::Idle), (&hangs, Phase::Starting)] {
        let seen = other.seen(instance.id()).await;
        ensure!(seen.phase == phase, "{seen:?}");
    }
    other.start(ready.id(), 1).await?;
    ensure!(other.seen(ready.id()).await == engine.seen(ready.id()).await);
    ensure!(other.address(ready.id()).await == engine.address(ready.id()).await);
    engine.stop(ready.id(), GRACE).await;
    ensure!(until_ended(&other, ready.id()).await.reason == EndReason::Stopped);
    for instance in [&ready, &idle, &hangs] {
        other.delete(instance.id()).await?;
        until_phase(engine, instance.id(), "gone", |phase| *phase == Phase::Absent).await;
    }
    Ok(())
}

/// Images that are no good, and one made of an instance.
async fn images(engine: &LxdEngine, harness: &Harness) -> Result<()> {
    let file = harness.path("broken.tar");
    std::fs::write(&file, b"no archive")?;
    let sha256 = fanlight_tests_lxd::sha256(b"no archive");
    let error = engine.import_image(&sha256, &file).await.err().context("it is no archive")?.to_string();
    ensure!(error.contains("importing the image"), "{error}");
    let error =
        engine.import_image(&"0".repeat(64), &file).await.err().context("another SHA-256")?.to_string();
    ensure!(error.contains("importing the image"), "{error}");
    engine.delete_image(&sha256).await?;
    let mut missing = Specs::new(&"0".repeat(64), "m1");
    let instance = missing.spec("run");
    let error = engine.create(&instance).await.err().context("there is no such image")?.to_string();
    ensure!(error.contains("making the container"), "{error}");
    engine.delete(instance.id()).await?;
    Ok(())
}

#[test]
fn instances_outlive_a_daemon_that_is_killed() {
    let mut harness = Harness::single().expect("LXD runs");
    let config = config(&mut harness, "10.91.0.11");
    let mut running = None;
    let launch = async {
        let (engine, image) = engine(config.clone()).await?;
        let mut specs = Specs::new(&image, "m1");
        let instance = specs.spec("run");
        engine.create(&instance).await?;
        engine.start(instance.id(), 1).await?;
        until_phase(&engine, instance.id(), "ready", |phase| *phase == Phase::Ready).await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        Ok((image, instance))
    };
    running.replace(harness.within(launch).expect("it is launched"));
    let (image, instance) = running.expect("it was launched");
    harness.members()[0].kill().expect("LXD runs");
    let away = async {
        // Nothing is lost, and what cannot be asked says so.
        let error = LxdEngine::open(config.clone()).await.err().context("LXD is away")?.to_string();
        ensure!(error.contains("lxd.url"), "{error}");
        Ok(())
    };
    harness.within(away).expect("it says that LXD is away");
    harness.members()[0].start().expect("LXD starts again");
    let back = async {
        let engine = LxdEngine::open(config.clone()).await?;
        ensure!(engine.seen(instance.id()).await.phase == Phase::Ready, "it was lost");
        let mut specs = Specs::new(&image, "m1");
        let (_, second) = (specs.spec("run"), specs.spec("run"));
        engine.create(&second).await?;
        engine.start(second.id(), 1).await?;
        until_phase(&engine, second.id(), "ready", |phase| *phase == Phase::Ready).await;
        for instance in [&instance, &second] {
            engine.delete(instance.id()).await?;
        }
        Ok(())
    };
    harness.within(back).expect("it goes on");
}

#[test]
fn a_cluster_keeps_the_contract_of_engines() {
    let mut harness = Harness::cluster().expect("LXD runs");
    let config = config(&mut harness, "");
    let lxd = harness.unix(0).expect("a client");
    let test = async {
        let (engine, image) = engine(config.clone()).await?;
        let machines = engine.machines().await?;
        let told: Vec<_> =
            machines.iter().map(|machine| (&*machine.name, &*machine.address, machine.online)).collect();
        ensure!(
            told == [("m1", "10.91.0.11", true), ("m2", "10.91.0.12", true), ("m3", "10.91.0.13", true)],
            "{told:?}"
        );
        let mut specs = Specs::new(&image, "m2");
        contract(&engine, || specs.spec("run")).await;
        ensure!(left(&lxd, Some("m2"), "10.91.0.12").await?.is_empty());

        // The same place on two members.
        let (on_m1, on_m3) = (Specs::new(&image, "m1").spec("run"), Specs::new(&image, "m3").spec("run"));
        for instance in [&on_m1, &on_m3] {
            engine.create(instance).await?;
            engine.start(instance.id(), 1).await?;
        }
        for instance in [&on_m1, &on_m3] {
            until_phase(&engine, instance.id(), "ready", |phase| *phase == Phase::Ready).await;
            let at = lxd.project("fanlight").instance(&format!("ams-{}", instance.id())).await?.0.location;
            ensure!(at == instance.node.as_str(), "{at}");
        }
        Ok((engine, image, on_m1, on_m3))
    };
    let (engine, image, on_m1, on_m3) = harness.within(test).expect("it keeps the contract");
    drop(engine);
    harness.members()[2].kill().expect("LXD runs on m3");
    let lost = async {
        // One that is about to be launched there fails by name, or waits for the member.
        let engine = LxdEngine::open(config.clone()).await?;
        let gone = until_ended(&engine, on_m3.id()).await;
        ensure!(gone.reason == EndReason::Failed && gone.message.contains("m3 is lost"), "{gone:?}");
        ensure!(engine.seen(on_m1.id()).await.phase == Phase::Ready);
        let machines = engine.machines().await?;
        ensure!(machines.iter().any(|machine| machine.name == "m3" && !machine.online), "{machines:?}");
        let mut specs = Specs::new(&image, "m3");
        let (_, late) = (specs.spec("run"), specs.spec("run"));
        let error = engine.create(&late).await.err().context("m3 is lost")?.to_string();
        ensure!(error.contains("making the container"), "{error}");
        engine.delete(on_m1.id()).await?;
        Ok(())
    };
    harness.within(lost).expect("a lost member is told");
    harness.members()[2].start().expect("LXD starts again on m3");
    let back = async {
        let engine = LxdEngine::open(config.clone()).await?;
        let there = until_phase(&engine, on_m3.id(), "there", |phase| *phase == Phase::Ready).await;
        ensure!(there.run == 1, "{there:?}");
        engine.delete(on_m3.id()).await?;
        ensure!(left(&lxd, Some("m3"), "10.91.0.13").await?.is_empty());
        Ok(())
    };
    harness.within(back).expect("a member that comes back has its instances");
}
