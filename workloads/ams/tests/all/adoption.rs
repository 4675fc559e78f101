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
    ams::{InstanceStatus, InstancesPost, Operation, Source},
    guest::EndReason,
};
use fanlight_client::{AmsClient, ClientError, Endpoint};

use crate::{
    api::tar_of,
    stack::{AMS, PATIENCE, process_config, processes_with, spec, streamer, until, until_phase},
};

#[tokio::test(flavor = "multi_thread")]
async fn what_is_killed_while_its_sandbox_is_made_leaves_nothing() {
    let folder = tempfile::tempdir().expect("made");
    let engine = ProcessEngine::open(process_config(folder.path())).await.expect("opened");
    // Making a sandbox takes some 20 ms, or 100 where there is much to do.
    for delay in (0..120).step_by(4).map(Duration::from_millis) {
        let instance = spec(folder.path(), &["run"]);
        engine.create(&instance).await.expect("made");
        engine.start(instance.id(), 1).await.expect("started");
        tokio::time::sleep(delay).await;
        engine.delete(instance.id()).await.expect("deleted");
        // The shim ends a moment after it said that the run is over. What belongs to nobody any more goes on for ever.
        until(&format!("nothing is left of what was deleted after {delay:?}"), async || {
            processes_with(instance.id().as_str()).is_empty().then_some(())
        })
        .await;
    }
}

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
        Self::faulty(folder, None).await
    }

    /// Ends by itself as many steps after the file is there as it says.
    async fn faulty(folder: &Path, fault: Option<&Path>) -> Self {
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
            .envs(fault.map(|file| ("FANLIGHT_FAULT", file)))
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

/// Launches, stops and deletes as far as AMS lives. `last` is the operation that was accepted last.
async fn whole_life(client: &AmsClient, last: &mut Option<Operation>) -> Result<(), ClientError> {
    let post = InstancesPost { app_id: "keep".into(), ..InstancesPost::default() };
    let launch = last.insert(client.launch(&post, false, None).await?);
    let id = launch.resource("instances").expect("an instance").to_owned();
    client.wait(launch, PATIENCE).await?;
    let stop = last.insert(client.stop_instance(&id, false).await?);
    client.wait(stop, PATIENCE).await?;
    let deletion = last.insert(client.delete_instance(&id, true).await?);
    client.wait(deletion, PATIENCE).await?;
    Ok(())
}

/// AMS ends after so many steps of a life, and comes back. False: the life has fewer steps.
async fn ends_after(steps: u32) -> bool {
    let folder = tempfile::tempdir().expect("made");
    let fault = folder.path().join("fault");
    let mut ams = Program::faulty(folder.path(), Some(&fault)).await;
    let package = tar_of("name: keep\ncommand: run\nresources: {cpus: 1, memory: 64MB}\n");
    let operation = ams.client.create_application(package.into()).await.expect("accepted");
    ams.client.wait(&operation, PATIENCE).await.expect("created");
    std::fs::write(&fault, steps.to_string()).expect("written");
    let mut last = None;
    let ended = whole_life(&ams.client, &mut last).await.is_err();
    if ended {
        until("AMS has ended", async || ams.child.try_wait().expect("asked")).await;
    } else {
        ams.kill();
    }

    let ams = Program::start(folder.path()).await;
    // What was begun goes on to where it was to go.
    if let Some(operation) = last {
        let ended = ams.client.wait(&operation, PATIENCE).await;
        assert!(ended.is_ok(), "after {steps} steps: {ended:?}");
    }
    let settled = until("instances are at rest", async || {
        let all = ams.client.instances(&[]).await.ok()?;
        let at_rest = all.iter().all(|instance| {
            matches!(
                instance.status(),
                InstanceStatus::Running | InstanceStatus::Stopped | InstanceStatus::Error
            )
        });
        at_rest.then_some(all)
    })
    .await;
    for instance in &settled {
        assert_ne!(instance.status(), InstanceStatus::Error, "after {steps} steps: {instance:?}");
        let alive = !processes_with(instance.id.as_str()).is_empty();
        assert_eq!(alive, instance.status() == InstanceStatus::Running, "after {steps} steps: {instance:?}");
        // A deletion that was asked for may be done in this moment.
        if let Ok(operation) = ams.client.delete_instance(instance.id.as_str(), true).await {
            ams.client.wait(&operation, PATIENCE).await.expect("deleted");
        }
    }
    assert!(ams.client.instances(&[]).await.expect("listed").is_empty());
    assert_eq!(std::fs::read_dir(folder.path().join("state/instances")).expect("there").count(), 0);
    let nodes = ams.client.nodes().await.expect("listed");
    assert_eq!((nodes[0].used_cpus, nodes[0].used_memory_bytes), (0, 0), "after {steps} steps");
    ams.kill();
    let text = folder.path().display().to_string();
    until("no process is left", async || processes_with(&text).is_empty().then_some(())).await;
    ended
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ams_that_is_killed_at_any_step_of_a_life_leaves_nothing_undone() {
    let mut steps = 1;
    loop {
        let both = tokio::join!(ends_after(steps), ends_after(steps + 1));
        if both == (false, false) {
            break;
        }
        steps += 2;
    }
    // Fewer would mean that steps are not counted.
    assert!((10..100).contains(&steps), "{steps} steps");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_begins_with_the_files_of_its_source() {
    use std::os::unix::fs::MetadataExt as _;
    let folder = tempfile::tempdir().expect("made");
    let ams = Program::start(folder.path()).await;
    let package = tar_of("name: keep\ncommand: run\nresources: {cpus: 1, memory: 64MB}\n");
    let operation = ams.client.create_application(package.into()).await.expect("accepted");
    ams.client.wait(&operation, PATIENCE).await.expect("created");
    let launch = async |post: InstancesPost| {
        let operation = ams.client.launch(&post, false, None).await?;
        let id = operation.resource("instances").expect("an instance").to_owned();
        ams.client.wait(&operation, PATIENCE).await.map(|_| id)
    };
    let source =
        launch(InstancesPost { app_id: "keep".into(), ..InstancesPost::default() }).await.expect("runs");
    let home = |id: &str| folder.path().join("state/instances").join(id).join("home");
    std::fs::create_dir(home(&source).join("notes")).expect("made");
    std::fs::write(home(&source).join("notes/one"), "mine").expect("written");
    std::os::unix::fs::symlink("/etc/passwd", home(&source).join("link")).expect("made");

    let copy = |kind: &str, id: &str| InstancesPost {
        source: Some(Source { kind: kind.into(), id: id.into() }),
        ..InstancesPost::default()
    };
    let refused = |result: Result<String, ClientError>| match result {
        Err(ClientError::Refused { status, text, .. }) => (status.as_u16(), text),
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(launch(copy("instance", &source)).await), (400, "instance must be stopped".into()));
    let (code, text) = refused(launch(copy("image", &source)).await);
    assert!(code == 400 && text.contains("source.type"), "{text}");
    assert_eq!(refused(launch(copy("instance", "nobody")).await).0, 404);
    let both = InstancesPost { app_id: "keep".into(), ..copy("instance", &source) };
    let (code, text) = refused(launch(both).await);
    assert!(code == 400 && text.contains("app_id"), "{text}");

    let stop = ams.client.stop_instance(&source, false).await.expect("accepted");
    ams.client.wait(&stop, PATIENCE).await.expect("stopped");
    let rest = launch(InstancesPost { no_start: true, ..copy("instance", &source) }).await.expect("made");
    let running = launch(copy("instance", &source)).await.expect("runs");
    for (id, status) in [(&rest, "prepared"), (&running, "running")] {
        let shown = ams.client.instance(id).await.expect("there");
        assert_eq!((shown.status.as_str(), shown.app_name.as_str()), (status, "keep"));
        let note = home(id).join("notes/one");
        assert_eq!(std::fs::read_to_string(&note).expect("copied"), "mine");
        let owner = std::fs::metadata(home(id)).expect("there").uid();
        assert_eq!(std::fs::metadata(note).expect("there").uid(), owner);
        let link = home(id).join("link");
        assert!(std::fs::symlink_metadata(&link).expect("there").is_symlink());
        assert_eq!(std::fs::symlink_metadata(link).expect("there").uid(), owner);
    }
    for id in [&source, &rest, &running] {
        let operation = ams.client.delete_instance(id, true).await.expect("accepted");
        ams.client.wait(&operation, PATIENCE).await.expect("deleted");
    }
    ams.kill();
}
