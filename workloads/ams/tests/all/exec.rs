//! Programs in running instances: over the API with an engine that only plays them, and really, in a sandbox.

use std::{collections::BTreeMap, time::Duration};

use fanlight_ams::{
    Phase,
    engine::{Control, Engine, EngineError, Exec, ProcessEngine, Running, Script, Spec},
};
use fanlight_api::ams::{exec::ExecPost, status};
use fanlight_client::{ClientError, ExecOutput};
use futures_util::StreamExt as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::{
    api::Stack,
    stack::{PATIENCE, process_config, processes_with, spec, until, until_phase},
};

fn post(command: &[&str], interactive: bool) -> ExecPost {
    ExecPost {
        command: command.iter().map(ToString::to_string).collect(),
        interactive,
        ..ExecPost::default()
    }
}

async fn all(output: &mut ExecOutput) -> String {
    let mut text = Vec::new();
    while let Some(bytes) = output.next().await.expect("read") {
        text.extend_from_slice(&bytes);
    }
    String::from_utf8(text).expect("text")
}

fn code(error: ClientError) -> u16 {
    match error {
        ClientError::Refused { status, .. } => status.as_u16(),
        other => panic!("not a refusal: {other}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_is_talked_to_and_its_status_is_told() {
    let stack = Stack::start(Script::Run, |_| {}).await;
    stack.application().await;
    let id = stack.launch().await;

    let mut exec = stack.client.exec(&id, &post(&["echo", "a", "b"], false)).await.expect("begun");
    assert_eq!((exec.operation.class.as_str(), exec.operation.may_cancel), ("websocket", true));
    assert_eq!(all(&mut exec.output).await, "a b\n");
    let errors = exec.errors.as_mut().expect("without a terminal there are two");
    assert_eq!(all(errors).await, "");
    let done = stack.client.wait(&exec.operation, PATIENCE).await.expect("success");
    assert_eq!(done.metadata.expect("an answer")["return"], 0);

    let exec = stack.client.exec(&id, &post(&["false"], false)).await.expect("begun");
    let done = stack.client.wait(&exec.operation, PATIENCE).await.expect("success, whatever the status");
    assert_eq!(done.metadata.expect("an answer")["return"], 1);

    // More than there is room for on the way, and the end of the input.
    let mut exec = stack.client.exec(&id, &post(&["cat"], false)).await.expect("begun");
    let much = bytes::Bytes::from(vec![b'x'; 3 << 20]);
    let sent = much.clone();
    let mut input = exec.input;
    let write = tokio::spawn(async move {
        input.write(&sent).await.expect("written");
        input.finish().await.expect("finished");
    });
    assert_eq!(all(&mut exec.output).await.len(), much.len());
    write.await.expect("written");
    stack.client.wait(&exec.operation, PATIENCE).await.expect("success");

    // A signal; and a terminal, whose one stream carries both ways.
    let mut exec = stack.client.exec(&id, &post(&["sleep", "9"], false)).await.expect("begun");
    exec.controls.signal(15).await.expect("said");
    let done = stack.client.wait(&exec.operation, PATIENCE).await.expect("success");
    assert_eq!(done.metadata.expect("an answer")["return"], 143);
    let mut exec = stack.client.exec(&id, &post(&["echo", "hello"], true)).await.expect("begun");
    assert!(exec.errors.is_none());
    assert_eq!(all(&mut exec.output).await, "hello\n");
    stack.client.wait(&exec.operation, PATIENCE).await.expect("success");
    stack.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_goes_away_and_who_cancels_ends_the_program() {
    let stack = Stack::start(Script::Run, |_| {}).await;
    stack.application().await;
    let id = stack.launch().await;
    // Without a terminal, and with one.
    for interactive in [false, true] {
        let exec = stack.client.exec(&id, &post(&["sleep", "9"], interactive)).await.expect("begun");
        let operation = exec.operation.clone();
        drop(exec);
        let done = stack.client.wait(&operation, PATIENCE).await.expect("success");
        assert_eq!(done.metadata.expect("an answer")["return"], 129);
    }
    let exec = stack.client.exec(&id, &post(&["sleep", "9"], false)).await.expect("begun");
    stack.client.cancel(&exec.operation.id).await.expect("accepted");
    until("it is cancelled", async || {
        let operation = stack.client.operation(&exec.operation.id).await.expect("there");
        (operation.status_code == status::CANCELLED).then_some(())
    })
    .await;
    assert_eq!(code(stack.client.cancel(&exec.operation.id).await.expect_err("over")), 400);
    stack.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_open_once_and_are_told_to_nobody_else() {
    let stack = Stack::start(Script::Run, |_| {}).await;
    stack.application().await;
    let id = stack.launch().await;
    let mut events =
        stack.client.endpoint().websocket("/1.0/events", Default::default()).await.expect("opened");
    let exec = stack.client.exec(&id, &post(&["echo", "a"], false)).await.expect("begun");
    let fds = exec.operation.metadata.clone().expect("secrets")["fds"].clone();
    let fds: BTreeMap<String, String> = serde_json::from_value(fds).expect("texts");
    assert_eq!(fds.keys().collect::<Vec<_>>(), ["0", "1", "2", "control"]);
    // The client has used all of them.
    let url = format!("https://{}/1.0/operations/{}/websocket", stack.running.address(), exec.operation.id);
    let http =
        reqwest::Client::builder().no_proxy().tls_danger_accept_invalid_certs(true).build().expect("made");
    for secret in fds.values().map(String::as_str).chain(["", "wrong"]) {
        let request = http
            .get(format!("{url}?secret={secret}"))
            .header("connection", "upgrade")
            .header("upgrade", "websocket")
            .header("sec-websocket-version", "13")
            .header("sec-websocket-key", "AAAAAAAAAAAAAAAAAAAAAA==");
        assert_eq!(request.send().await.expect("answered").status(), 403);
    }
    stack.client.wait(&exec.operation, PATIENCE).await.expect("success");
    let stored = stack.client.operation(&exec.operation.id).await.expect("there");
    let mut told = serde_json::to_string(&stored).expect("JSON");
    while let Ok(Some(Ok(event))) = tokio::time::timeout(Duration::from_millis(200), events.next()).await {
        told.push_str(event.to_text().unwrap_or_default());
    }
    assert!(told.contains(exec.operation.id.as_str()), "the events were looked at");
    assert!(fds.values().all(|secret| !told.contains(secret)));

    assert_eq!(code(stack.client.exec(&id, &post(&[], false)).await.err().expect("no program")), 400);
    assert_eq!(code(stack.client.exec("nobody", &post(&["a"], false)).await.err().expect("not there")), 404);
    stack.running.stop().await;
}

/// An instance that runs, in its own sandbox.
async fn running(folder: &std::path::Path) -> (ProcessEngine, Spec) {
    let engine = ProcessEngine::open(process_config(folder)).await.expect("opened");
    let instance = spec(folder, &["run"]);
    engine.create(&instance).await.expect("made");
    let early = engine.exec(instance.id(), exec("true")).await;
    assert!(matches!(early, Err(EngineError::NotRunning(_))), "it was not started");
    engine.start(instance.id(), 1).await.expect("started");
    until_phase(&engine, instance.id(), "ready", |phase| *phase == Phase::Ready).await;
    (engine, instance)
}

fn exec(script: &str) -> Exec {
    Exec { command: vec!["sh".into(), "-c".into(), script.into()], ..Exec::default() }
}

/// Gives no input; gives the status, and what was said on both.
async fn finish(running: Running) -> (i32, String, String) {
    let (mut said, mut complained) = (Vec::new(), Vec::new());
    drop(running.stdin);
    let mut stdout = running.stdout;
    // A terminal ends with an error or with an end.
    let _ = stdout.read_to_end(&mut said).await;
    if let Some(mut stderr) = running.stderr {
        stderr.read_to_end(&mut complained).await.expect("read");
    }
    let code = tokio::time::timeout(PATIENCE, running.ended).await.expect("in time").expect("a status");
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (code, text(said), text(complained))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_runs_as_the_application_does_and_reaches_no_more() {
    let folder = tempfile::tempdir().expect("made");
    let secret = folder.path().join("token");
    std::fs::write(&secret, "secret").expect("written");
    let (engine, instance) = running(folder.path()).await;
    let id = instance.id();
    let script = r#"echo "user $(id -un)"; echo "home $HOME"; echo "at $(pwd)"; echo "host $(hostname)"
        echo "mine $MINE"; echo "package $(ls /app)"; echo "first $(cat /proc/1/comm)"
        grep -E '^(CapEff|CapPrm|NoNewPrivs)' /proc/self/status | tr -d '\t'
        ls -d "$SECRET" /root/* /etc/shadow; touch /usr/x /app/x /x; echo "seen $(ls -d /proc/[0-9]* | wc -l)""#;
    let mut program = exec(script);
    program.environment.insert("MINE".into(), "a 'quoted' \"value\"\n$(and a second line)".into());
    program.environment.insert("SECRET".into(), secret.display().to_string());
    let (code, said, complained) = finish(engine.exec(id, program).await.expect("begun")).await;
    assert_eq!(code, 0, "{said}{complained}");
    for line in [
        "user fanlight\n",
        "home /home/fanlight\n",
        "at /home/fanlight\n",
        &format!("host {id}\n"),
        "mine a 'quoted' \"value\"\n$(and a second line)\n",
        "package manifest.yaml\n",
        "first bwrap\n",
        "CapEff:0000000000000000\n",
        "CapPrm:0000000000000000\n",
        "NoNewPrivs:1\n",
    ] {
        assert!(said.contains(line), "{line:?} is missing: {said}{complained}");
    }
    assert!(!said.contains("token") && !said.contains("shadow"), "{said}");
    let seen: usize = said.rsplit("seen ").next().expect("a number").trim().parse().expect("a number");
    assert!(seen < 15, "processes of the host are seen: {said}");

    // What a user names has no effect on the way in.
    let mut program = exec("exit 3");
    program.environment.insert("LD_PRELOAD".into(), "/nowhere/evil.so".into());
    program.environment.insert("PATH".into(), "/usr/bin:/bin".into());
    let (code, _, complained) = finish(engine.exec(id, program).await.expect("begun")).await;
    assert_eq!(code, 3);
    let before = ["nsenter", "setpriv", "setsid", "unshare", "prlimit"];
    assert!(before.iter().all(|name| !complained.contains(name)), "{complained}");

    let mut running = engine.exec(id, exec("cat; echo end >&2")).await.expect("begun");
    running.stdin.write_all(b"typed").await.expect("written");
    assert_eq!(finish(running).await, (0, "typed".into(), "end\n".into()));
    let missing = Exec { command: vec!["/nowhere/program".into()], ..Exec::default() };
    assert_eq!(finish(engine.exec(id, missing).await.expect("begun")).await.0, 127);
    for (command, variable) in [("", "A"), ("-c", "A"), ("true", "A B"), ("true", "1")] {
        let mut bad = Exec { command: vec![command.into()], ..Exec::default() };
        bad.environment.insert(variable.into(), String::new());
        assert!(
            matches!(engine.exec(id, bad).await, Err(EngineError::Refused { .. })),
            "{command} {variable}"
        );
    }
    engine.delete(id).await.expect("deleted");
}

/// Whether this program runs; the way into an instance names it as well, but does not begin with it.
fn runs(line: &str) -> bool {
    processes_with(line).into_iter().any(|pid| {
        let own = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&own).replace('\0', " ").starts_with(line)
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_has_a_size_a_name_and_the_keys_that_end_programs() {
    let folder = tempfile::tempdir().expect("made");
    let (engine, instance) = running(folder.path()).await;
    let mut shell = Exec { command: vec!["bash".into(), "--norc".into()], ..Exec::default() };
    shell.terminal = Some((100, 30));
    let mut running = engine.exec(instance.id(), shell).await.expect("begun");
    assert!(running.stderr.is_none());
    let mut said = String::new();
    let mut stdout = running.stdout;
    let mut hear = async |needle: &str| {
        let mut buffer = [0; 4096];
        let heard = async {
            while !said.contains(needle) {
                let length = stdout.read(&mut buffer).await.expect("read");
                assert!(length > 0, "it ended: {said}");
                said.push_str(&String::from_utf8_lossy(&buffer[..length]));
            }
        };
        let in_time = tokio::time::timeout(PATIENCE, heard).await.is_ok();
        assert!(in_time, "{needle} was not said: {said}");
        std::mem::take(&mut said)
    };
    let first = b"stty size; tty; echo fir\"\"st; PS1='rea''dy> '\n";
    running.stdin.write_all(first).await.expect("written");
    // The shell reads the size before a prompt and writes it back, and may overwrite one that is set in between.
    let text = hear("ready> ").await;
    assert!(text.contains("30 100") && text.contains("/dev/pts/") && !text.contains("job control"), "{text}");
    running.control.send(Control::Resize(120, 40)).await.expect("said");
    // The size goes another way than what is typed, so it may be there a moment later.
    let wait = b"until [ \"$(stty size)\" = '40 120' ]; do sleep 0.01; done; echo sec\"\"ond\n";
    running.stdin.write_all(wait).await.expect("written");
    hear("second").await;
    // Ctrl-C ends what runs, not the shell.
    running.stdin.write_all(b"echo sle\"\"eping; sleep 77771; echo sta\"\"tus $?\n").await.expect("written");
    hear("sleeping").await;
    until("it sleeps", async || runs("sleep 77771").then_some(())).await;
    running.stdin.write_all(b"\x03").await.expect("written");
    // The shell throws away what was typed before its next prompt.
    hear("ready> ").await;
    running.stdin.write_all(b"echo sta\"\"tus $?\n").await.expect("written");
    hear("status 130").await;
    running.stdin.write_all(b"exit 7\n").await.expect("written");
    let code = tokio::time::timeout(PATIENCE, running.ended).await.expect("in time").expect("a status");
    assert_eq!(code, 7);
    engine.delete(instance.id()).await.expect("deleted");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_ends_by_signals_with_its_user_and_with_its_instance() {
    let folder = tempfile::tempdir().expect("made");
    let (engine, instance) = running(folder.path()).await;
    let id = instance.id();
    let begin = async |script: &str, mark: &str, terminal: Option<(u16, u16)>| {
        let running = engine.exec(id, Exec { terminal, ..exec(script) }).await.expect("begun");
        until("it runs", async || runs(mark).then_some(())).await;
        running
    };
    let running = begin("exec sleep 77772", "sleep 77772", None).await;
    running.control.send(Control::Signal(15)).await.expect("said");
    assert_eq!(finish(running).await.0, 143);

    // It listens to nothing, and what it starts goes its own way.
    for (mark, terminal) in [("sleep 77773", None), ("sleep 77774", Some((80, 24)))] {
        let script = format!("trap '' HUP TERM; setsid {mark} & {mark}");
        drop(begin(&script, mark, terminal).await);
        until("all of it is gone", async || processes_with(mark).is_empty().then_some(())).await;
    }
    assert_eq!(engine.seen(id).await.phase, Phase::Ready, "the instance goes on");

    let running = begin("exec sleep 77775", "sleep 77775", None).await;
    engine.stop(id, Duration::from_secs(10)).await;
    assert_eq!(finish(running).await.0, 137);
    until_phase(&engine, id, "stopped", |phase| matches!(phase, Phase::Ended(_))).await;
    assert!(matches!(engine.exec(id, exec("true")).await, Err(EngineError::NotRunning(_))));
    engine.delete(id).await.expect("deleted");
}
