//! The supervisor of a container as a program, which is asked to end by a signal.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    process::{Command, Stdio},
};

use rustix::process::{Pid, Signal, kill_process};

const TELL_READY: &str = "python3 -c 'import os, socket; \
    socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b\"READY=1\", os.environ[\"NOTIFY_SOCKET\"])'";

#[test]
fn a_system_that_goes_down_ends_the_streamer_gracefully() {
    if !rustix::process::geteuid().is_root() {
        // Only root may start programs of other users.
        eprintln!("not run: it needs root");
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let guest = folder.path().join("var/lib/fanlight");
    fs::create_dir_all(&guest).expect("made");
    fs::write(guest.join("guest.json"), "{}").expect("written");
    fs::write(guest.join("run.json"), r#"{"version":1,"run":1}"#).expect("written");
    let streamer = folder.path().join("streamer");
    let text =
        format!("#!/bin/sh\ntrap 'echo asked; exit 0' TERM\n{TELL_READY}\nwhile :; do sleep 0.05; done\n");
    fs::write(&streamer, text).expect("written");
    fs::set_permissions(&streamer, fs::Permissions::from_mode(0o755)).expect("executable");
    let program = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fanlight-streamer"));
        command.args(["guest", "--root"]).arg(folder.path());
        command
    };
    let mut supervisor = program()
        .args(["--user", "root", "--no-poweroff", "--streamer"])
        .arg(&streamer)
        .stderr(Stdio::null())
        .spawn()
        .expect("the program starts");
    let ready = program().args(["wait", "--run", "1"]).output().expect("the program starts");
    assert_eq!(
        String::from_utf8_lossy(&ready.stdout),
        "{\"version\":1,\"run\":1,\"phase\":\"ready\",\"status\":\"\"}\n"
    );
    let pid = Pid::from_raw(supervisor.id().cast_signed()).expect("a process");
    kill_process(pid, Signal::TERM).expect("it lives");
    assert!(supervisor.wait().expect("it ends").success());
    let state = program().arg("state").output().expect("the program starts");
    let state = String::from_utf8_lossy(&state.stdout).into_owned();
    assert!(state.contains(r#"{"ended":{"reason":"stopped","message":"stopped"}}"#), "{state}");
    let log = fs::read_to_string(folder.path().join("var/log/fanlight/streamer.log")).expect("written");
    assert_eq!(log, "asked\n");
}
