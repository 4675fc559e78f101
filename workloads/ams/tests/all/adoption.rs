//! AMS is killed, or stopped; instances go on, and the next AMS takes them up.

use std::{
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use fanlight_ams::{
    Phase,
    engine::{Engine as _, ProcessEngine},
};
use fanlight_api::{
    ams::{InstanceStatus, InstancesPost},
    guest::EndReason,
};
use fanlight_client::{AmsClient, Endpoint};

use crate::{
    api::tar_of,
    stack::{AMS, PATIENCE, process_config, processes_with, spec, streamer, until, until_phase},
};

#[tokio::test(flavor = "multi_thread")]
async fn instances_are_adopted_by_the_next_engine() {
    let folder = tempfile::tempdir().expect("made");
    let first = ProcessEngine::open(process_config(folder.path())).await.expect("opened");
    let running = spec(folder.path(), &["run"]);
    let killed = spec(folder.path(), &["run"]);
    let ended = spec(folder.path(), &["finish"]);
    let idle = spec(folder.path(), &["run"]);
    for instance in [&running, &killed, &ended] {
        first.create(instance).await.expect("made");
        first.start(instance.id(), 1).await.expect("started");
    }
    first.create(&idle).await.expect("made");
    for instance in [&running, &killed] {
        until_phase(&first, instance.id(), "ready", |phase| *phase == Phase::Ready).await;
    }
    until_phase(&first, ended.id(), "finished", |phase| matches!(phase, Phase::Ended(_))).await;
    std::fs::create_dir(folder.path().join("instances/halfmade")).expect("made");

    let second = ProcessEngine::open(process_config(folder.path())).await.expect("opened");
    assert_eq!(second.seen(running.id()).await.phase, Phase::Ready);
    assert_eq!(second.seen(idle.id()).await.phase, Phase::Idle);
    assert!(
        matches!(second.seen(ended.id()).await.phase, Phase::Ended(ended) if ended.reason == EndReason::Finished)
    );
    assert_eq!(second.list().await.expect("listed").len(), 4);
    assert!(!folder.path().join("instances/halfmade").exists());

    // A shim that dies while nobody watches is noticed by the one after.
    drop(second);
    let text = killed.id().to_string();
    for pid in processes_with(&text) {
        let pid = rustix::process::Pid::from_raw(pid).expect("a process");
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
    let third = ProcessEngine::open(process_config(folder.path())).await.expect("opened");
    until_phase(
        &third,
        killed.id(),
        "lost",
        |phase| matches!(phase, Phase::Ended(ended) if ended.reason == EndReason::Failed),
    )
    .await;
    third.stop(running.id(), Duration::from_secs(10)).await;
    until_phase(&third, running.id(), "stopped", |phase| matches!(phase, Phase::Ended(_))).await;
    for instance in [&running, &killed, &ended, &idle] {
        third.delete(instance.id()).await.expect("deleted");
    }
}

/// AMS as a program of its own.
struct Program {
    child: Child,
    client: AmsClient,
}

impl Program {
    async fn start(folder: &Path) -> Self {
        let text = format!(
            "listen = '127.0.0.1:0'\nsocket = '{0}/ams.sock'\nfolder = '{0}/state'\n\
             tls = {{ certificate = '{0}/ams.crt', key = '{0}/ams.key' }}\nstore = {{ url = 'file:{0}/ams.redb' }}\n\
             [engine]\nstreamer = ['{1}', 'run']\n",
            folder.display(),
            streamer(folder).display()
        );
        let config = folder.join("ams.toml");
        std::fs::write(&config, text).expect("written");
        let child = Command::new(AMS)
            .args(["--config", config.to_str().expect("UTF-8")])
            .stdin(Stdio::null())
            .spawn()
            .expect("started");
        fanlight_service::tls::install_provider();
        let client = AmsClient::new(Endpoint::unix(folder.join("ams.sock")).expect("a socket"));
        let program = Self { child, client };
        until("AMS answers", async || program.client.service().await.ok()).await;
        program
    }

    fn kill(mut self) -> AmsClient {
        self.child.kill().expect("killed");
        self.child.wait().expect("ended");
        self.client
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_ams_finds_its_instances_again_and_cleans_up() {
    let folder = tempfile::tempdir().expect("made");
    let ams = Program::start(folder.path()).await;
    let package = tar_of("name: keep\ncommand: run\nresources: {cpus: 1, memory: 64MB}\n");
    ams.client.create_application(package.into()).await.expect("created");
    let post = InstancesPost { app_id: "keep".into(), ..InstancesPost::default() };
    let mut ids = Vec::new();
    for _ in 0..3 {
        let operation = ams.client.launch(&post, false, None).await.expect("launched");
        let done = ams.client.wait(&operation, PATIENCE).await.expect("running");
        ids.push(done.resource("instances").expect("an instance").to_owned());
    }
    ams.kill();

    // While nobody is there: one instance loses its shim, and one its record's other half.
    let processes = |id: &str| processes_with(id);
    assert!(!processes(&ids[0]).is_empty());
    for pid in processes(&ids[1]) {
        let _ = rustix::process::kill_process(
            rustix::process::Pid::from_raw(pid).expect("a process"),
            rustix::process::Signal::KILL,
        );
    }

    let ams = Program::start(folder.path()).await;
    let status = async |id: &str| ams.client.instance(id).await.map(|instance| instance.status());
    until("the first goes on", async || {
        (status(&ids[0]).await.ok()? == InstanceStatus::Running).then_some(())
    })
    .await;
    until("the second failed", async || (status(&ids[1]).await.ok()? == InstanceStatus::Error).then_some(()))
        .await;
    let failed = ams.client.instance(&ids[1]).await.expect("there");
    assert!(failed.error_message.contains("shim"), "{failed:?}");
    assert!(failed.stored_logs.contains(&"streamer.log".to_owned()), "{failed:?}");

    // A deletion that AMS could not finish is finished by the next one.
    let deletion = ams.client.delete_instance(&ids[2], true).await.expect("accepted");
    ams.kill();
    let ams = Program::start(folder.path()).await;
    ams.client.wait(&deletion, PATIENCE).await.expect("deleted");
    until("its processes are gone", async || processes(&ids[2]).is_empty().then_some(())).await;
    for id in &ids[..2] {
        let operation = ams.client.delete_instance(id, false).await.expect("accepted");
        ams.client.wait(&operation, PATIENCE).await.expect("deleted");
    }
    assert!(ams.client.instances(&[]).await.expect("listed").is_empty());
    assert_eq!(std::fs::read_dir(folder.path().join("state/instances")).expect("there").count(), 0);
    let nodes = ams.client.nodes().await.expect("listed");
    assert_eq!((nodes[0].used_cpus, nodes[0].used_memory_bytes), (0, 0));
    ams.kill();
    let text = folder.path().display().to_string();
    until("no process is left", async || processes_with(&text).is_empty().then_some(())).await;
}
