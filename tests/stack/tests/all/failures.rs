//! Anything may be killed at any moment: streams go on where they can, nothing is left where they cannot, and the
//! next start finds what was there.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use fanlight_tests_stack::{
    BOOT, SOON,
    client::{Client, Habits},
    processes,
    stack::{Stack, application, pattern},
    until,
};
use serde_json::json;

/// The one process of an instance with this name.
fn process(stack: &Stack, instance: &str, name: &str) -> Result<i32> {
    let all = stack.processes_of(instance);
    let found = all.iter().find(|process| process.name.starts_with(name));
    Ok(found.with_context(|| format!("no {name} among {all:#?}"))?.pid)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_goes_on_while_everything_around_it_is_killed_and_started_again() -> Result<()> {
    let mut stack = Stack::start(&[pattern()], &[]).await?;
    let (session, url) = stack.create("pattern", json!({})).await?;
    let client = Client::connect(&stack.gateway, &url, Habits::default()).await?;
    client.streaming().await?;
    let instance = stack.instance(&session).await?;

    stack.kill().await?;
    client.more_frames(60).await?;
    stack.start_again().await?;
    client.more_frames(60).await?;
    // It is the same instance, adopted; a new client finds it.
    ensure!(stack.instance(&session).await? == instance, "the instance is another one");
    let url = stack.join(&session).await?;
    let newer = Client::connect(&stack.gateway, &url, Habits::default()).await?;
    newer.streaming().await?;
    client.ended(SOON).await?;

    stack.gateway.delete(&format!("/1.0/sessions/{session}")).await?.expect(200)?;
    newer.ended(SOON).await?;
    stack.session_is_gone(&session).await?;
    stack.no_instances().await?;
    stack.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn each_of_the_separate_programs_may_be_killed_while_a_stream_goes_on() -> Result<()> {
    let stack = Stack::start(&[pattern()], &["--separate"]).await?;
    let (session, url) = stack.create("pattern", json!({})).await?;
    let mut client = Client::connect(&stack.gateway, &url, Habits::default()).await?;
    client.streaming().await?;
    stack.session_is(&session, "active", BOOT).await?;
    let marker = stack.folder().display().to_string();
    for name in ["nats-server", "fanlight-ams", "fanlight-agent", "fanlight-gateway"] {
        // The kernel cuts names at 15 characters.
        let short = &name[..name.len().min(15)];
        let find = || {
            processes::with(&marker)
                .into_iter()
                .find(|process| process.name == short && !process.command.contains(" shim "))
        };
        let victim = find().with_context(|| format!("no {name} runs"))?.pid;
        processes::kill(victim);
        client.more_frames(30).await?;
        until(&format!("{name} runs again"), SOON, || async {
            Ok(find().filter(|process| process.pid != victim).map(|_| ()))
        })
        .await?;
        // And it works again: the whole way of a join goes through all four. The newest client stays for the next.
        let next = until(&format!("a client joins after {name} was killed"), BOOT, || async {
            let url = stack.join(&session).await?;
            Ok(Some(Client::connect(&stack.gateway, &url, Habits { boot: SOON, ..Habits::default() }).await?))
        })
        .await?;
        next.streaming().await?;
        client.ended(SOON).await?;
        client = next;
    }
    stack.gateway.delete(&format!("/1.0/sessions/{session}")).await?.expect(200)?;
    stack.session_is_gone(&session).await?;
    stack.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_part_of_an_instance_ends_it_with_a_reason_and_leaves_nothing() -> Result<()> {
    let stack = Stack::start(&[pattern()], &[]).await?;
    for name in ["fanlight-stream", "bwrap", "fanlight"] {
        let (session, url) = stack.create("pattern", json!({})).await?;
        let client = Client::connect(&stack.gateway, &url, Habits::default()).await?;
        client.streaming().await?;
        let instance = stack.instance(&session).await?;
        // The shim is the one process of the instance that is the `fanlight` program itself.
        let victim = match name {
            "fanlight" => {
                stack
                    .processes_of(&instance)
                    .into_iter()
                    .find(|process| process.command.contains(" shim "))
                    .context("no shim runs")?
                    .pid
            }
            name => process(&stack, &instance, name)?,
        };
        processes::kill(victim);
        let found = stack.session_is(&session, "error", BOOT).await?;
        ensure!(found["status_message"] != "", "killed {name}: the session says no reason: {found}");
        until("its processes have ended", SOON, || async {
            Ok(stack.processes_of(&instance).is_empty().then_some(()))
        })
        .await
        .with_context(|| format!("killed {name}"))?;
        stack.gateway.delete(&format!("/1.0/sessions/{session}")).await?.expect(200)?;
        stack.session_is_gone(&session).await?;
        stack.no_instances().await?;
    }
    stack.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_and_tokens_survive_a_restart_in_good_order() -> Result<()> {
    let mut stack = Stack::start(&[pattern()], &[]).await?;
    let token = stack.variables["FANLIGHT_TOKEN"].clone();
    let (session, _) = stack.create("pattern", json!({ "ephemeral": false })).await?;
    stack.session_is(&session, "active", BOOT).await?;
    stack.interrupt().await?;
    stack.nothing_is_left().await?;
    stack.start_again().await?;
    ensure!(stack.variables["FANLIGHT_TOKEN"] == token, "the token is another one");
    // Ended in good order, so the record says so; the old token still opens it.
    let found = stack.session_is(&session, "terminated", BOOT).await?;
    ensure!(found["app"] == "pattern", "{found}");
    let answer = stack.gateway.get("/1.0/applications").await?.expect(200)?;
    ensure!(answer.text.contains("pattern"), "{}", answer.text);
    stack.end().await
}

/// A small disk of its own, unmounted in the end with the folder around it.
struct Disk {
    folder: PathBuf,
}

impl Disk {
    fn mount(folder: &Path, megabytes: u32) -> Result<Self> {
        fs::create_dir_all(folder)?;
        let output = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={megabytes}m,mode=711"), "tmpfs"])
            .arg(folder)
            .output()
            .context("running mount")?;
        ensure!(
            output.status.success(),
            "mounting a small disk, which only root may: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(Self { folder: folder.to_owned() })
    }

    /// Writes until nothing more fits; the file that takes the room.
    fn fill(&self) -> Result<PathBuf> {
        let path = self.folder.join("filler");
        let mut file = fs::File::create(&path)?;
        for piece in [1 << 20, 4096, 1] {
            let bytes = vec![1_u8; piece];
            while file.write_all(&bytes).is_ok() {}
        }
        Ok(path)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Best effort: processes that were just killed may still hold it, and it is gone with the last of them.
        let _ = Command::new("umount").arg("--lazy").arg(&self.folder).status();
        let _ = self.folder.parent().map(fs::remove_dir_all);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_stops_new_work_with_a_reason_and_running_streams_go_on() -> Result<()> {
    let mut disk = None;
    let stack = Stack::start_with(&[pattern()], &[], |folder| {
        disk = Some(Disk::mount(&folder.join("state"), 128)?);
        Ok(())
    })
    .await?;
    let disk = disk.context("the disk was not mounted")?;
    let (running, url) = stack.create("pattern", json!({})).await?;
    let client = Client::connect(&stack.gateway, &url, Habits::default()).await?;
    client.streaming().await?;
    stack.session_is(&running, "active", BOOT).await?;

    let filler = disk.fill()?;
    client.more_frames(60).await?;
    // Where records still find room in their file it is the instance that has none.
    let answer = stack.gateway.post("/1.0/sessions", json!({ "app": "pattern" })).await?;
    if answer.status == 201 {
        let session = answer.metadata()["id"].as_str().context("no id")?.to_owned();
        let found = stack.session_is(&session, "error", BOOT).await?;
        ensure!(found["status_message"] != "", "no reason is given: {found}");
        fs::remove_file(&filler)?;
        stack.gateway.delete(&format!("/1.0/sessions/{session}")).await?.expect(200)?;
        stack.session_is_gone(&session).await?;
    } else {
        ensure!(answer.status >= 500 && !answer.error().is_empty(), "{} {}", answer.status, answer.text);
        fs::remove_file(&filler)?;
    }
    client.more_frames(30).await?;

    // With room again everything works as before, and what was there still is.
    let (session, url) = until("a session is made again", BOOT, || async {
        stack.create("pattern", json!({})).await.map(Some)
    })
    .await?;
    let next = Client::connect(&stack.gateway, &url, Habits::default()).await?;
    next.streaming().await?;
    for session in [running, session] {
        stack.session_is(&session, "active", BOOT).await?;
        stack.gateway.delete(&format!("/1.0/sessions/{session}")).await?.expect(200)?;
        stack.session_is_gone(&session).await?;
    }
    stack.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_stack_on_the_same_state_is_refused_and_hurts_nothing() -> Result<()> {
    let stack = Stack::start(&[pattern()], &[]).await?;
    let output = tokio::process::Command::new(fanlight_tests_stack::stack::programs()?.join("fanlight"))
        .args(["up", "--ports", "auto", "--state"])
        .arg(stack.state())
        .output()
        .await?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        !output.status.success() && said.contains(&stack.state().display().to_string()),
        "it said: {said}"
    );
    stack.create("pattern", json!({})).await?;
    stack.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_in_use_is_named_and_nothing_is_left_running() -> Result<()> {
    // Where somebody has the gateway's port already, that serves as well.
    let _taken = std::net::TcpListener::bind("127.0.0.1:4000");
    let folder = tempfile::Builder::new().prefix("fl-").tempdir()?;
    let output = tokio::process::Command::new(fanlight_tests_stack::stack::programs()?.join("fanlight"))
        .args(["up", "--state"])
        .arg(folder.path().join("state"))
        .output()
        .await?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success() && said.contains("4000"), "it said: {said}");
    let marker = folder.path().display().to_string();
    until("nothing runs", SOON, || async { Ok(processes::with(&marker).is_empty().then_some(())) }).await
}

#[tokio::test(flavor = "multi_thread")]
async fn applications_that_fail_end_their_session_with_the_reason() -> Result<()> {
    let applications = [
        application("missing", ["/no/such/program"]),
        application("quitter", ["/bin/true"]),
        application("failer", ["/bin/sh", "-c", "echo it hurts >&2; exit 3"]),
    ];
    let stack = Stack::start(&applications, &[]).await?;
    for (app, reason) in [("missing", "/no/such/program"), ("quitter", "window"), ("failer", "3")] {
        let (session, _) = stack.create(app, json!({})).await?;
        let found = stack.session_is(&session, "error", BOOT).await?;
        let message = found["status_message"].as_str().unwrap_or_default();
        ensure!(message.contains(reason), "{app}: {message:?} does not tell of {reason:?}");
        stack.gateway.delete(&format!("/1.0/sessions/{session}")).await?.expect(200)?;
        stack.session_is_gone(&session).await?;
    }
    stack.no_instances().await?;

    // For its developers the instance stays, and says the same.
    for (app, reason) in [("missing", "/no/such/program"), ("failer", "3")] {
        let body = json!({ "app_id": app, "config": { "devmode": true } });
        let answer = stack.ams.post("/1.0/instances", body).await?.expect(202)?;
        stack.operation(&answer).await.context("launching")?;
        let instance =
            answer.metadata()["resources"]["instances"][0].as_str().context("an instance")?.to_owned();
        let shown = stack.ams.get(&instance).await?.expect(200)?;
        let message = shown.metadata()["status_message"].as_str().unwrap_or_default().to_owned();
        ensure!(shown.metadata()["status"] == "running", "{app}: {}", shown.text);
        ensure!(message.contains(reason) && message.contains("devmode"), "{app}: {message:?}");
        stack
            .ams
            .call(reqwest::Method::DELETE, &instance, Some(json!({ "force": true })))
            .await?
            .expect(202)?;
    }
    stack.no_instances().await?;
    stack.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_application_that_forks_away_goes_on_until_its_window_closes() -> Result<()> {
    let forks = application("forker", ["/bin/sh", "-c", "fanlight-pattern --tone 440 & sleep 1; exit 0"]);
    let stack = Stack::start(&[forks], &[]).await?;
    let (session, url) = stack.create("forker", json!({})).await?;
    let client = Client::connect(&stack.gateway, &url, Habits::default()).await?;
    client.streaming().await?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    client.more_frames(30).await?;
    let instance = stack.instance(&session).await?;
    processes::kill(process(&stack, &instance, "fanlight-patter")?);
    client.ended(SOON).await?;
    until("its processes have ended", SOON, || async {
        Ok(stack.processes_of(&instance).is_empty().then_some(()))
    })
    .await?;
    stack.session_is_gone(&session).await?;
    stack.no_instances().await?;
    stack.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_vanishes_is_noticed_and_the_next_one_is_served() -> Result<()> {
    let stack = Stack::start(&[pattern()], &[]).await?;
    let (session, url) = stack.create("pattern", json!({})).await?;
    let client = Client::connect(&stack.gateway, &url, Habits::default()).await?;
    client.streaming().await?;
    // Neither good-bye nor close: as when a machine loses its power.
    std::mem::forget(client);
    let url = stack.join(&session).await?;
    let next = Client::connect(&stack.gateway, &url, Habits::default()).await?;
    next.streaming().await?;
    next.more_frames(30).await?;
    stack.end().await
}
