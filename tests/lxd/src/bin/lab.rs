//! Runs a command beside a whole stack over a real LXD, and ends all of it: `fanlight-lxd-lab -- COMMAND...`. The command
//! runs in the hub's network, which reaches the gateway and no container, with the stack's variables in its environment.

use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use fanlight_tests_lxd::{
    Harness,
    stack::{Machine, start},
};

fn main() -> Result<ExitCode> {
    let mut words =
        std::env::args_os().skip_while(|word| word != "--").skip(1).collect::<Vec<_>>().into_iter();
    let program = words.next().context("usage: fanlight-lxd-lab -- COMMAND...")?;
    let mut harness = Harness::single()?;
    let machine = Machine::prepare(&mut harness)?;
    let test = async {
        let stack = start(&machine, &[]).await?;
        let mut command = Command::new(program);
        command.args(words).envs(&stack.variables).env("FANLIGHT_STATE", stack.state());
        let status = tokio::process::Command::from(command).status().await.context("starting the command")?;
        stack.end().await?;
        Ok(status)
    };
    let status = harness.within(test)?;
    ensure!(status.code().is_some(), "the command was ended by a signal: {status}");
    Ok(ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1)))
}
