//! What is streamed is somebody else's program: it must see nothing of the stack. A probe inside tries.

use anyhow::{Context, Result, ensure};
use fanlight_tests_stack::{
    BOOT,
    stack::{Application, Stack, pattern},
    until,
};
use serde_json::{Value, json};

/// The verdicts of the probe, one JSON object a line, out of whatever else a log holds.
fn verdicts(text: &str) -> Vec<Value> {
    let from_brace = |line: &str| serde_json::from_str::<Value>(&line[line.find('{')?..]).ok();
    text.lines()
        .filter_map(from_brace)
        .filter(|line| line.get("attempt").is_some() || line.get("summary").is_some())
        .collect()
}

async fn probed(stack: &Stack, app: &str) -> Result<()> {
    let (session, _) = stack.create(app, json!({})).await?;
    let instance = stack.instance(&session).await?;
    let found = until("the probe has finished", BOOT, || async {
        let logs = stack.ams.get(&format!("/1.0/instances/{instance}/logs")).await?.expect(200)?;
        let names = logs.metadata().as_array().cloned().unwrap_or_default();
        for name in names.iter().filter_map(Value::as_str) {
            // A list may hold names or paths.
            let name = name.rsplit('/').next().unwrap_or(name);
            let log = stack.ams.get(&format!("/1.0/instances/{instance}/logs/{name}")).await?.expect(200)?;
            let found = verdicts(&log.text);
            if found.iter().any(|line| line["summary"] == true) {
                return Ok(Some(found));
            }
        }
        Ok(None)
    })
    .await?;
    let allowed: Vec<_> = found.iter().filter(|line| line["denied"] == false).collect();
    ensure!(allowed.is_empty(), "the application could: {allowed:#?}");
    let attempts = found.iter().filter(|line| line.get("attempt").is_some()).count();
    ensure!(attempts > 20, "only {attempts} attempts were made");
    stack.gateway.delete(&format!("/1.0/sessions/{session}")).await?.expect(200)?;
    stack.session_is_gone(&session).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_application_sees_nothing_of_the_stack_and_of_other_instances() -> Result<()> {
    let stack = Stack::start(&[pattern()], &[]).await?;
    let (other, _) = stack.create("pattern", json!({})).await?;
    let other_instance = stack.instance(&other).await?;
    let state = stack.state();
    let path = |below: &str| state.join(below).display().to_string();
    let pids = stack.processes_of(&other_instance);
    ensure!(!pids.is_empty(), "the other instance has no processes");

    let mut command: Vec<String> = vec!["fanlight-probe".into()];
    let mut add = |option: &str, value: String| command.extend([option.to_owned(), value]);
    add("--secret", stack.variables["FANLIGHT_TOKEN"].clone());
    for file in ["env", "token", "trust/ca.key", "gateway/gateway.redb"] {
        add("--read", path(file));
    }
    for file in ["/etc/shadow", "/root/.bashrc", "/proc/1/environ", "/proc/kcore", "/run/udev", "/home/root"]
    {
        add("--read", file.into());
    }
    for folder in ["", "trust", "run", "ams", "ams/instances"] {
        add("--list", path(folder));
    }
    add("--list", path(&format!("ams/instances/{other_instance}")));
    add("--list", stack.folder().display().to_string());
    add("--list", "/root".into());
    for file in
        ["/usr/bin/fanlight-probe-was-here", "/etc/fanlight-probe-was-here", "/fanlight-probe-was-here"]
    {
        add("--write", file.into());
    }
    for socket in ["run/gateway.sock", "run/ams.sock"] {
        add("--connect", path(socket));
    }
    add("--connect", path(&format!("ams/instances/{other_instance}/shim.sock")));
    for pid in pids.iter().map(|process| process.pid).chain(stack.pid()) {
        // Numbers of other namespaces may be there in ours too; only high ones cannot.
        if pid > 1000 {
            add("--kill", pid.to_string());
        }
    }
    let in_terminal: Vec<String> =
        ["foot", "sh", "-c", "\"$@\" > /proc/self/fd/9 2>&1; sleep 600", "sh"].map(String::from).into();
    let mut staying = command.clone();
    staying.push("--wait".into());
    let inside = [
        Application { name: "probe", command: staying },
        // From inside the streamed terminal, with its output where the log is: descriptor 9 is our own standard output.
        Application {
            name: "probe-terminal",
            command: ["/bin/sh", "-c", "exec \"$@\" 9>&1", "sh"]
                .map(String::from)
                .into_iter()
                .chain(in_terminal)
                .chain(command)
                .collect(),
        },
    ];
    stack.add(&inside).await?;
    for application in inside {
        probed(&stack, application.name).await.with_context(|| application.name.to_owned())?;
    }
    stack.end().await
}
