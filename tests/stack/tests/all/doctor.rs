//! `fanlight doctor` against real stacks: a whole one, and ones with a step of the path broken.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use fanlight_tests_stack::{
    BOOT, processes,
    stack::{Stack, pattern, programs},
    until,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::process::Command;

/// More than all steps may take together.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the command found.
struct Found {
    code: Option<i32>,
    checks: Vec<Value>,
    said: String,
}

impl Found {
    fn step(&self, name: &str) -> Result<&Value> {
        let found = self.checks.iter().find(|check| check["step"] == name);
        found.with_context(|| format!("no step {name} in {}", self.said))
    }

    fn steps_with(&self, status: &str) -> Vec<&str> {
        let these = self.checks.iter().filter(|check| check["status"] == status);
        these.filter_map(|check| check["step"].as_str()).collect()
    }

    /// The step failed, was the first to do so, and says why and what to do.
    fn breaks_at(&self, name: &str, text: &str, advice: &str) -> Result<()> {
        ensure!(self.code == Some(1), "it ended with {:?}: {}", self.code, self.said);
        ensure!(self.steps_with("failed").first() == Some(&name), "{name} did not fail first: {}", self.said);
        let check = self.step(name)?;
        let holds =
            |member: &str, words: &str| check[member].as_str().is_some_and(|said| said.contains(words));
        ensure!(holds("text", text) && holds("advice", advice), "{text:?}, {advice:?}: {check}");
        Ok(())
    }
}

async fn doctor(arguments: &[&str], variables: &[(&str, &str)]) -> Result<Found> {
    let mut command = Command::new(programs()?.join("fanlight"));
    command.args(["doctor", "--json"]).args(arguments);
    for name in ["FANLIGHT_STATE", "FANLIGHT_TOKEN", "FANLIGHT_CA"] {
        command.env_remove(name);
    }
    command.envs(variables.iter().copied());
    let output =
        tokio::time::timeout(PATIENCE, command.output()).await.context("the doctor does not end")??;
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).with_context(|| said.clone())?;
    let checks = report["checks"].as_array().context("no checks in the report")?.clone();
    Ok(Found { code: output.status.code(), checks, said })
}

fn path(path: &Path) -> Result<&str> {
    path.to_str().context("the path is no text")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_doctor_finds_a_whole_stack_whole_and_names_what_is_broken() -> Result<()> {
    let mut stack = Stack::start(&[pattern()], &[]).await?;
    let state = stack.state();
    let state = path(&state)?;
    let variable = |name: &str| {
        stack.variables.get(name).cloned().with_context(|| format!("the stack does not say its {name}"))
    };
    let (url, token, ca) =
        (variable("FANLIGHT_GATEWAY_URL")?, variable("FANLIGHT_TOKEN")?, variable("FANLIGHT_CA")?);

    let whole = doctor(&["--state", state, "--app", "pattern"], &[]).await?;
    ensure!(whole.code == Some(0) && whole.steps_with("failed").is_empty(), "{}", whole.said);
    for step in
        ["connect", "trust", "gateway", "time", "token", "store", "bus", "agents", "region", "application"]
    {
        ensure!(whole.step(step)?["status"] == "ok", "{step}: {}", whole.said);
    }
    // The same from elsewhere, by address, token and authority; no path of this machine is looked at.
    let variables = [("FANLIGHT_TOKEN", token.as_str()), ("FANLIGHT_CA", &ca)];
    let elsewhere = doctor(&["--url", &url], &variables).await?;
    ensure!(elsewhere.code == Some(0) && elsewhere.step("agents")?["status"] == "ok", "{}", elsewhere.said);
    ensure!(!elsewhere.said.contains(&token), "the token is printed");

    let missing = doctor(&["--state", state, "--app", "no-such-thing"], &[]).await?;
    missing.breaks_at("application", "no-such-thing", "published")?;
    let nowhere = doctor(&["--state", state, "--region", "moon"], &[]).await?;
    nowhere.breaks_at("region", "moon", "one of these")?;

    let file = stack.folder().join("token");
    fs::write(&file, "nonsense\n")?;
    let wrong = doctor(&["--state", state, "--token-file", path(&file)?], &[]).await?;
    wrong.breaks_at("token", "does not take the token", "fanlight account")?;
    ensure!(wrong.step("relay")?["status"] == "skipped", "{}", wrong.said);
    ensure!(!wrong.said.contains("nonsense"), "the token is printed");

    let stranger = doctor(&["--url", &url], &[("FANLIGHT_TOKEN", &token)]).await?;
    stranger.breaks_at("trust", "authority", "--ca")?;
    ensure!(stranger.step("token")?["status"] == "skipped", "{}", stranger.said);

    stack.interrupt().await?;
    let gone = doctor(&["--state", state], &[]).await?;
    gone.breaks_at("connect", "nothing listens", "fanlight up")?;
    ensure!(gone.step("udp")?["status"] == "skipped", "{}", gone.said);
    stack.nothing_is_left().await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_doctor_names_an_agent_that_fell_silent_and_sees_it_come_back() -> Result<()> {
    let stack = Stack::start(&[pattern()], &["--separate"]).await?;
    let state = stack.state();
    let state = path(&state)?;
    let marker = stack.folder().display().to_string();
    let agent = processes::with(&marker)
        .into_iter()
        .find(|process| process.name == "fanlight-agent")
        .context("no agent runs")?;
    let pid = Pid::from_raw(agent.pid).context("the agent has no process id")?;

    kill_process(pid, Signal::STOP)?;
    let silent = until("the doctor misses the agent", BOOT, || async {
        let found = doctor(&["--state", state], &[]).await?;
        if found.step("agents")?["status"] == "failed" { Ok(Some(found)) } else { bail!("{}", found.said) }
    })
    .await;
    kill_process(pid, Signal::CONT)?;
    let silent = silent?;
    silent.breaks_at("agents", "local", "agents")?;
    // One cause is told once.
    ensure!(silent.steps_with("failed") == ["agents"], "{}", silent.said);
    ensure!(silent.step("region")?["status"] == "skipped", "{}", silent.said);

    until("the doctor finds the agent again", BOOT, || async {
        let found = doctor(&["--state", state], &[]).await?;
        if found.code == Some(0) { Ok(Some(())) } else { bail!("{}", found.said) }
    })
    .await?;
    stack.end().await
}
