//! The verbs of AMS as a person or a script uses them: the program itself, against a server that does what the
//! reference says.

mod server;
mod tty;

use std::{
    ffi::OsStr,
    io::Write as _,
    process::{Output, Stdio},
    time::Duration,
};

use serde_json::{Value, json};
use server::{INSTANCE, PASSWORD, Server, TOKEN};
use tokio::{io::AsyncReadExt as _, process::Command};

const PATIENCE: Duration = Duration::from_secs(60);

/// The command, with a home of its own and the local stack of the server.
fn command(server: &Server, words: &[impl AsRef<OsStr>]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fanlight"));
    command
        .args(words)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("HOME", server.folder.path())
        .current_dir(server.folder.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

async fn run(server: &Server, words: &[impl AsRef<OsStr>]) -> Output {
    let mut local = command(server, words);
    local.env("FANLIGHT_STATE", server.state().join("state"));
    finish(local).await
}

/// Against whatever remote there is.
async fn run_remote(server: &Server, words: &[impl AsRef<OsStr>]) -> Output {
    finish(command(server, words)).await
}

async fn finish(mut command: Command) -> Output {
    tokio::time::timeout(PATIENCE, command.output()).await.expect("it ends").expect("it starts")
}

fn out(output: &Output) -> String {
    assert!(output.status.success(), "{}: {}", output.status, err(output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn code(output: &Output) -> i32 {
    output.status.code().expect("it was not killed")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn instances_are_listed_for_people_and_for_programs() {
    let server = Server::start();
    let text = out(&run(&server, &["ls"]).await);
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].starts_with("ID ") && lines[0].ends_with("MESSAGE"), "{text}");
    assert!(
        lines[1].contains(INSTANCE) && lines[1].contains("running") && lines[1].contains("a,b"),
        "{text}"
    );
    assert!(!text.contains('\u{1b}'), "a name cannot drive the terminal");
    let list: Value =
        serde_json::from_str(&out(&run(&server, &["ls", "--format", "json"]).await)).expect("JSON");
    assert_eq!(list[0]["id"], INSTANCE);
    let list: Value =
        serde_yaml_ng::from_str(&out(&run(&server, &["ls", "--format", "yaml"]).await)).expect("YAML");
    assert_eq!(list[1]["config"]["security"]["delete_protected"], true);
    out(&run(&server, &["ls", "--filter", "app=game", "--filter", "tag=a,b"]).await);
    let asked = server.shared.requests();
    assert!(asked.contains(&"GET /1.0/instances?recursion=1&app_name=game&tags=a%2Cb".into()), "{asked:?}");
    let shown = out(&run(&server, &["show", "one"]).await);
    assert!(shown.lines().any(|line| line == "address                           192.0.2.7"), "{shown}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exit_codes_tell_scripts_what_kind_of_failure_it_was() {
    let server = Server::start();
    for (words, expected, said) in [
        (&["show", "nothing"][..], 3, "instance not found"),
        (&["auth", "permission", "ls"], 4, "hint: an administrator"),
        (&["launch", "failing"], 1, "no suitable node"),
        (&["launch", "none"], 3, "application not found"),
        (&["launch"], 2, "required"),
        (&["ls", "--filter", "colour=red"], 2, "colour"),
        (&["delete", "--all"], 2, "--yes"),
        (&["wait", "broken"], 1, "it broke"),
        (&["wait", "nothing"], 3, "no instance"),
        (&["show", "one", "--remote", "none"], 3, "fanlight remote add"),
        (&["show", "../x"], 1, "A-Z"),
        (&["ams", "config", "show", "no.such"], 3, "no.such"),
    ] {
        let output = run(&server, words).await;
        assert_eq!(code(&output), expected, "{words:?}: {}", err(&output));
        assert!(err(&output).contains(said), "{words:?}: {}", err(&output));
    }
    let nobody = finish({
        let mut command = command(&server, &["ls"]);
        command.env("FANLIGHT_STATE", server.folder.path().join("none"));
        command
    })
    .await;
    assert_eq!(code(&nobody), 1);
    assert!(err(&nobody).contains("fanlight up"), "{}", err(&nobody));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn work_is_waited_for_unless_it_is_not_wanted() {
    let server = Server::start();
    let id = format!("{INSTANCE}\n");
    assert_eq!(out(&run(&server, &["launch", "game", "--name", "x"]).await), id);
    assert_eq!(out(&run(&server, &["launch", "slow", "--no-wait"]).await), id);
    let late = run(&server, &["launch", "slow", "--timeout", "1s"]).await;
    assert_eq!(code(&late), 1);
    assert!(err(&late).contains("goes on at the server") && err(&late).contains(INSTANCE), "{}", err(&late));
    assert_eq!(String::from_utf8_lossy(&late.stdout), id, "a launch that takes long can be looked into");
    let asked = server.shared.requests();
    assert!(asked.contains(&"POST /1.0/instances?no_wait=true".to_owned()), "{asked:?}");
    let sent = server.shared.bodies("POST", "/1.0/instances?no_wait=false");
    assert_eq!((&sent[0]["app_id"], &sent[0]["name"]), (&json!("game"), &json!("x")));
    let shown = out(&run(&server, &["launch", "game", "--format", "json"]).await);
    assert_eq!(serde_json::from_str::<Value>(&shown).expect("JSON")["name"], "one");
    out(&run(&server, &["init", "game"]).await);
    let sent = server.shared.bodies("POST", "/1.0/instances?no_wait=false");
    assert_eq!(sent.last().expect("some")["no_start"], true);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_reach_the_server_as_the_reference_has_them() {
    let server = Server::start();
    out(&run(&server, &["start", "one", "two"]).await);
    out(&run(&server, &["set", "one", "delete-protected", "true"]).await);
    out(&run(&server, &["restart", "one"]).await);
    let kept = run(&server, &["restart", "stopped"]).await;
    assert!(err(&kept).contains("stays so"), "{}", err(&kept));
    let changes = server.shared.bodies("PATCH", "/1.0/instances/one?no_wait=false");
    assert_eq!(
        changes.iter().map(|body| body["desired_status"].clone()).collect::<Vec<_>>(),
        ["started", "stopped", "started"]
    );
    let protection = server.shared.bodies("PATCH", "/1.0/instances/one");
    assert_eq!(protection[0]["config"]["security"]["delete_protected"], true);
    out(&run(&server, &["delete", "one", "--force"]).await);
    assert_eq!(server.shared.bodies("DELETE", "/1.0/instances/one"), [json!({"force": true})]);
    let output = run(&server, &["delete", "--all", "--yes"]).await;
    assert!(err(&output).contains("1 instance protected"), "{}", err(&output));
    assert_eq!(
        server.shared.bodies("DELETE", "/1.0/instances"),
        [json!({"ids": [INSTANCE], "force": false})]
    );
    out(&run(&server, &["node", "set", "n1", "cpu-allocation-rate", "2"]).await);
    let patch = &server.shared.bodies("PATCH", "/1.0/nodes/n1")[0];
    assert_eq!((&patch["cpu_allocation_rate"], &patch["cpus"]), (&json!(2.0), &Value::Null));
    out(&run(&server, &["ams", "config", "set", "a.b", "y"]).await);
    assert_eq!(server.shared.bodies("PATCH", "/1.0/config"), [json!({"name": "a.b", "value": "y"})]);
    assert_eq!(out(&run(&server, &["ams", "config", "show", "c"]).await), "7\n");
    out(&run(&server, &["auth", "group", "grant", "g", "can_view", "instance:*"]).await);
    let group = &server.shared.bodies("PUT", "/1.0/auth/groups/g")[0];
    assert_eq!(
        group["permissions"],
        json!([{"entitlement": "can_view", "resource": "server"}, {"entitlement": "can_view", "resource": "instance:*"}])
    );
    assert_eq!(code(&run(&server, &["auth", "group", "revoke", "g", "can_edit", "server"]).await), 3);
    out(&run(&server, &["ams", "cancel", "11111111-9dd7-4a26-aef2-5462814869a1"]).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn folders_and_archives_are_uploaded_with_their_fingerprint() {
    let server = Server::start();
    let folder = server.folder.path().join("app");
    std::fs::create_dir(&folder).expect("made");
    std::fs::write(folder.join("manifest.yaml"), "name: app\n").expect("written");
    out(&run(&server, &["application", "create", "app"]).await);
    let zip = server.folder.path().join("app.zip");
    std::fs::write(&zip, vec![7; 3_000_000]).expect("written");
    out(&run(&server, &["application", "create", "app.zip"]).await);
    let uploads = server.shared.uploads.lock().expect("held by nobody").clone();
    assert_eq!(uploads.len(), 2);
    assert_eq!(uploads[1].1, 3_000_000);
    for (headers, _) in &uploads {
        assert_eq!(headers["transfer-encoding"], "chunked");
        assert_eq!(headers["x-ams-request"], "");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_without_a_terminal_has_its_streams_apart_and_passes_its_exit_code() {
    let server = Server::start();
    let script = "cat; echo to-stderr >&2; echo \"$GREETING\"; exit 42";
    let mut command = command(&server, &["exec", "one", "--env", "GREETING=hello", "--", "sh", "-c", script]);
    let mut child = command
        .env("FANLIGHT_STATE", server.state().join("state"))
        .stdin(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut stdin = child.stdin.take().expect("piped");
    let large = vec![b'x'; 1_000_000];
    let typing = {
        let large = large.clone();
        tokio::spawn(async move {
            use tokio::io::AsyncWriteExt as _;
            stdin.write_all(&large).await.expect("taken");
            // Dropped here: the end of the input.
        })
    };
    let output =
        tokio::time::timeout(PATIENCE, child.wait_with_output()).await.expect("it ends").expect("waited for");
    typing.await.expect("typed");
    assert_eq!(code(&output), 42, "{}", err(&output));
    assert_eq!(err(&output), "to-stderr\n");
    assert!(
        output.stdout.starts_with(&large) && output.stdout.ends_with(b"hello\n"),
        "{}",
        output.stdout.len()
    );
    assert_eq!(output.stdout.len(), large.len() + 6);
    assert_eq!(*server.shared.dialled.lock().expect("held by nobody"), ["control", "0", "1", "2"]);
    assert_eq!(code(&run(&server, &["exec", "none", "--", "true"]).await), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signal_goes_to_the_program_which_decides_what_it_means() {
    let server = Server::start();
    let script = "trap 'echo caught; exit 5' TERM; echo ready; while :; do sleep 0.05; done";
    let mut command = command(&server, &["exec", "one", "--", "sh", "-c", script]);
    let mut child = command.env("FANLIGHT_STATE", server.state().join("state")).spawn().expect("it starts");
    let mut stdout = child.stdout.take().expect("piped");
    let mut ready = [0; 6];
    stdout.read_exact(&mut ready).await.expect("it says that it is ready");
    assert_eq!(&ready, b"ready\n");
    // SAFETY: a signal to a child of our own that has not been waited for.
    unsafe { libc::kill(child.id().expect("it runs") as i32, libc::SIGTERM) };
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).await.expect("text");
    assert_eq!(rest, "caught\n");
    let status = tokio::time::timeout(PATIENCE, child.wait()).await.expect("it ends").expect("waited for");
    assert_eq!(status.code(), Some(5));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_goes_away_ends_the_program() {
    let server = Server::start();
    let mut command = command(&server, &["exec", "one", "--", "sh", "-c", "while :; do echo line; done"]);
    let mut child = command.env("FANLIGHT_STATE", server.state().join("state")).spawn().expect("it starts");
    let mut stdout = child.stdout.take().expect("piped");
    let mut first = [0; 5];
    stdout.read_exact(&mut first).await.expect("it speaks");
    drop(stdout);
    let status = tokio::time::timeout(PATIENCE, child.wait()).await.expect("it ends").expect("waited for");
    assert_eq!(status.code(), Some(128 + libc::SIGPIPE));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_terminal_is_handed_over_and_is_as_before_afterwards() {
    let server = Server::start();
    let state = server.state().join("state");
    let ended = tokio::task::spawn_blocking(move || {
        let mut tty = tty::Terminal::open(100, 30);
        let before = tty.settings();
        let environment =
            [("FANLIGHT_STATE", state.as_os_str()), ("HOME", state.as_os_str()), ("TERM", "vt220".as_ref())];
        let mut child = tty.run(env!("CARGO_BIN_EXE_fanlight"), &["shell", "one"], &environment);
        tty.expect("READY 100 30 vt220");
        assert!(!tty.is_cooked(), "keys go through as they are");
        // Interrupt, which is a key like any other now.
        tty.type_in(b"\x03");
        tty.expect("HEARD 03");
        tty.resize(120, 40);
        tty.expect("SIZE 120 40");
        tty.type_in(b"q");
        tty.expect("HEARD 71");
        let status = child.wait().expect("it ends");
        (status.code(), tty.settings() == before, tty.is_cooked())
    });
    let ended = tokio::time::timeout(PATIENCE, ended).await.expect("in time").expect("no panic");
    assert_eq!(ended, (Some(7), true, true));
    assert_eq!(*server.shared.dialled.lock().expect("held by nobody"), ["control", "0"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_that_is_ended_from_outside_leaves_the_terminal_as_it_was() {
    let server = Server::start();
    let state = server.state().join("state");
    let ended = tokio::task::spawn_blocking(move || {
        let mut tty = tty::Terminal::open(80, 24);
        let before = tty.settings();
        let environment = [("FANLIGHT_STATE", state.as_os_str()), ("HOME", state.as_os_str())];
        let mut child =
            tty.run(env!("CARGO_BIN_EXE_fanlight"), &["exec", "-t", "one", "--", "sh"], &environment);
        tty.expect("READY 80 24");
        // SAFETY: a signal to a child of our own that has not been waited for.
        unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
        let status = child.wait().expect("it ends");
        (status.code(), tty.settings() == before)
    });
    let ended = tokio::time::timeout(PATIENCE, ended).await.expect("in time").expect("no panic");
    assert_eq!(ended, (Some(128 + libc::SIGTERM), true));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_go_in_and_out_whole() {
    let server = Server::start();
    let here = |name: &str| server.folder.path().join(name);
    let there = here("there");
    std::fs::create_dir(&there).expect("made");
    let bytes: Vec<u8> = (0..2_000_000_u32).map(|n| (n % 251) as u8).collect();
    std::fs::write(here("a file"), &bytes).expect("written");
    let to = there.to_str().expect("UTF-8");
    out(&run(&server, &["file", "push", "a file", "one", to]).await);
    assert_eq!(std::fs::read(there.join("a file")).expect("arrived"), bytes);
    let from = there.join("a file");
    out(&run(&server, &["file", "pull", "one", from.to_str().expect("UTF-8"), "back"]).await);
    assert_eq!(std::fs::read(here("back")).expect("arrived"), bytes);
    std::fs::create_dir_all(here("tree/sub")).expect("made");
    std::fs::write(here("tree/sub/leaf"), "leaf").expect("written");
    out(&run(&server, &["file", "push", "tree", "one", to]).await);
    assert_eq!(std::fs::read(there.join("tree/sub/leaf")).expect("arrived"), b"leaf");
    let tree = there.join("tree");
    out(&run(&server, &["file", "pull", "-r", "one", tree.to_str().expect("UTF-8"), "copy"]).await);
    assert_eq!(std::fs::read(here("copy/sub/leaf")).expect("arrived"), b"leaf");
    let output = run(&server, &["file", "pull", "one", "/no/such/file", "none"]).await;
    assert_eq!(code(&output), 1);
    assert!(err(&output).contains("cannot be read") && !here("none").exists(), "{}", err(&output));
    let output = run(&server, &["file", "push", "missing", "one", to]).await;
    assert_eq!(code(&output), 1);
    assert!(err(&output).contains("missing"), "{}", err(&output));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn logs_come_from_the_server_or_from_the_instance() {
    let server = Server::start();
    assert_eq!(out(&run(&server, &["logs", "broken", "-n", "2"]).await), "2\n3\n");
    assert_eq!(out(&run(&server, &["show-log", "broken"]).await), "system.log\n");
    assert_eq!(out(&run(&server, &["show-log", "broken", "system.log"]).await), "1\n2\n3\n");
    let output = run(&server, &["logs", "broken", "--follow"]).await;
    assert!(err(&output).contains("without --follow"), "{}", err(&output));
    // Nobody can run programs in this one, so what the server keeps is followed until the instance has ended.
    assert_eq!(
        out(&run(&server, &["logs", "ending", "--follow", "-n", "1"]).await),
        "==> system.log <==\n3\n"
    );
    // The server keeps none of this one, so a program in it is asked.
    run(&server, &["logs", "one", "-n", "3"]).await;
    let asked = server.shared.bodies("POST", "/1.0/instances/one/exec");
    assert_eq!(asked[0]["command"][0], "sh");
    assert_eq!(asked[0]["command"][4], "3");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_remote_is_believed_by_its_fingerprint_and_trusts_this_client_by_the_password() {
    let server = Server::start();
    let url = server.url.clone();
    let password = server.folder.path().join("password");
    std::fs::write(&password, format!("{PASSWORD}\n")).expect("written");
    let password = password.to_str().expect("UTF-8");
    let add = |fingerprint: &str, password: &str| {
        ["remote", "add", "far", &url, "--fingerprint", fingerprint, "--password-file", password]
            .map(str::to_owned)
    };
    // Whoever cannot be asked must say whom to believe.
    let output = run_remote(&server, &["remote", "add", "far", &url]).await;
    assert_eq!(code(&output), 2);
    assert!(err(&output).contains(&server.fingerprint), "{}", err(&output));
    let output = run_remote(&server, &add(&"ab".repeat(32), password)).await;
    assert!(err(&output).contains("not the server you expect"), "{}", err(&output));
    let wrong = server.folder.path().join("wrong");
    std::fs::write(&wrong, "guess").expect("written");
    let output = run_remote(&server, &add(&server.fingerprint, wrong.to_str().expect("UTF-8"))).await;
    assert_eq!(code(&output), 4, "{}", err(&output));
    assert_eq!(code(&run_remote(&server, &["ls", "--remote", "far"]).await), 3, "nothing half is kept");
    out(&run_remote(&server, &add(&server.fingerprint, password)).await);
    let text = out(&run_remote(&server, &["ls", "--remote", "far"]).await);
    assert!(text.contains(INSTANCE), "{text}");
    out(&run_remote(&server, &["remote", "switch", "far"]).await);
    assert!(out(&run_remote(&server, &["ls"]).await).contains(INSTANCE), "it is asked where none is named");
    let output = run_remote(&server, &["exec", "one", "--", "sh", "-c", "echo far; exit 3"]).await;
    assert_eq!((code(&output), output.stdout.as_slice()), (3, &b"far\n"[..]));
    let list = out(&run_remote(&server, &["remote", "ls"]).await);
    assert!(list.lines().any(|line| line.starts_with("far") && line.ends_with("yes")), "{list}");
    let key = server.folder.path().join(".config/fanlight/client.key");
    use std::os::unix::fs::PermissionsExt as _;
    assert_eq!(std::fs::metadata(key).expect("made").permissions().mode() & 0o777, 0o600);
    let kept =
        std::fs::read_to_string(server.folder.path().join(".config/fanlight/remotes.toml")).expect("kept");
    assert!(!kept.contains(PASSWORD), "the password is used once");
    out(&run_remote(&server, &["remote", "remove", "far"]).await);
    assert_eq!(code(&run_remote(&server, &["ls", "--remote", "far"]).await), 3);
    // An impostor with another certificate is not spoken to.
    out(&run_remote(&server, &add(&server.fingerprint, password)).await);
    let file = server.folder.path().join(".config/fanlight/remotes.toml");
    let text = std::fs::read_to_string(&file).expect("kept").replace(&server.fingerprint, &"cd".repeat(32));
    std::fs::write(&file, text).expect("written");
    let output = run_remote(&server, &["ls", "--remote", "far"]).await;
    assert_eq!(code(&output), 1);
    assert!(err(&output).contains("another certificate"), "{}", err(&output));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_remote_can_be_asked_with_a_token_in_a_file() {
    let server = Server::start();
    let file = server.folder.path().join("token");
    std::fs::write(&file, TOKEN).expect("written");
    let words =
        ["remote", "add", "far", &server.url, "--fingerprint", &server.fingerprint, "--token-file", "token"];
    out(&run_remote(&server, &words).await);
    assert!(out(&run_remote(&server, &["ls", "--remote", "far"]).await).contains(INSTANCE));
    let output = run_remote(&server, &["exec", "--remote", "far", "one", "--", "true"]).await;
    assert_eq!(code(&output), 0, "streams are opened by their secrets alone: {}", err(&output));
    std::fs::write(&file, "bad.token").expect("written");
    assert_eq!(
        code(&run_remote(&server, &["ls", "--remote", "far"]).await),
        4,
        "it is read anew at each use"
    );
    let kept =
        std::fs::read_to_string(server.folder.path().join(".config/fanlight/remotes.toml")).expect("kept");
    assert!(!kept.contains(TOKEN));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_are_printed_as_they_come() {
    let server = Server::start();
    for (format, expected) in [
        ("table", "2026-01-05T10:00:00.123 lifecycle instance-running /1.0/instances/x\n"),
        ("json", "{\"type\":\"lifecycle\",\"timestamp\":\"2026-01-05T10:00:00.123456789Z\""),
    ] {
        let words = ["monitor", "--type", "lifecycle", "--type", "operation", "--format", format];
        let mut command = command(&server, &words);
        let mut child =
            command.env("FANLIGHT_STATE", server.state().join("state")).spawn().expect("it starts");
        let mut seen = vec![0; expected.len()];
        let reading = child.stdout.as_mut().expect("piped").read_exact(&mut seen);
        tokio::time::timeout(PATIENCE, reading).await.expect("in time").expect("an event");
        assert_eq!(String::from_utf8_lossy(&seen), expected);
        child.kill().await.expect("ended");
    }
    assert!(server.shared.requests().contains(&"GET /1.0/events?type=lifecycle,operation".into()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shells_complete_commands_and_the_names_of_instances() {
    let server = Server::start();
    let complete = async |words: &[&str]| {
        let mut command = command(&server, &[&["--", "fanlight"], words].concat());
        command.env("FANLIGHT_STATE", server.state().join("state")).env("COMPLETE", "bash");
        command.env("_CLAP_COMPLETE_INDEX", words.len().to_string()).env("_CLAP_IFS", "\n");
        out(&finish(command).await)
    };
    assert!(complete(&["lau"]).await.lines().any(|line| line == "launch"));
    let names = complete(&["show", ""]).await;
    assert!(names.lines().any(|line| line == "one"), "{names}");
    let script = out(&run(&server, &["completion", "bash"]).await);
    let mut shell =
        std::process::Command::new("bash").arg("-n").stdin(Stdio::piped()).spawn().expect("bash is there");
    shell.stdin.take().expect("piped").write_all(script.as_bytes()).expect("read");
    assert!(shell.wait().expect("ended").success(), "bash understands it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_benchmark_reports_percentiles_and_names_what_failed() {
    let server = Server::start();
    let output = run(&server, &["benchmark", "game", "--count", "2"]).await;
    assert_eq!(code(&output), 3, "an application that is not there is one failure: {}", err(&output));
}
