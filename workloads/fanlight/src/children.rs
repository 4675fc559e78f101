//! The programs of a stack that runs separately: started, started again when they end, ended with the stack.

use std::{path::PathBuf, process::Stdio, time::Duration};

use anyhow::{Context, Result};
use fanlight_service::shutdown::Shutdown;
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LAST_PAUSE: Duration = Duration::from_secs(5);
/// A program that ran this long starts over with the shortest pause.
const SETTLED: Duration = Duration::from_secs(30);
const PATIENCE: Duration = Duration::from_secs(20);

/// A program to keep running.
#[derive(Clone, Debug)]
pub struct Program {
    /// For messages.
    pub name: &'static str,
    /// What to run.
    pub path: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
}

impl Program {
    fn spawn(&self) -> Result<Child> {
        let mut command = Command::new(&self.path);
        command.args(&self.arguments).stdin(Stdio::null()).stdout(Stdio::null()).kill_on_drop(true);
        // SAFETY: prctl is async-signal-safe. If this process is killed, the programs it started must not stay
        // behind: they would hold the ports and files that the next start needs.
        unsafe {
            command.pre_exec(|| {
                rustix::process::set_parent_process_death_signal(Some(Signal::TERM))?;
                Ok(())
            });
        }
        command.process_group(0);
        command.spawn().with_context(|| format!("starting {} ({})", self.name, self.path.display()))
    }
}

/// Starts a program and keeps it running until the stack ends.
///
/// # Errors
/// It cannot be started at all.
pub fn keep(program: Program, shutdown: &Shutdown) -> Result<()> {
    let first = program.spawn()?;
    let ending = shutdown.clone();
    shutdown.spawn(program.name, async move {
        let mut child = first;
        let mut pause = FIRST_PAUSE;
        loop {
            let started = Instant::now();
            tokio::select! {
                status = child.wait() => {
                    let status = status.map_or_else(|error| error.to_string(), |status| status.to_string());
                    tracing::warn!(program = program.name, "{} ended ({status}); it is started again", program.name);
                }
                () = ending.stopping() => {
                    end(&program, child).await;
                    return;
                }
            }
            if started.elapsed() > SETTLED {
                pause = FIRST_PAUSE;
            }
            child = loop {
                tokio::select! {
                    () = sleep(pause) => {}
                    () = ending.stopping() => return,
                }
                pause = (pause * 2).min(LAST_PAUSE);
                match program.spawn() {
                    Ok(child) => break child,
                    Err(error) => tracing::error!("{error:#}"),
                }
            };
        }
    });
    Ok(())
}

async fn end(program: &Program, mut child: Child) {
    let pid = child.id().and_then(|pid| Pid::from_raw(pid as i32));
    if let Some(pid) = pid {
        // It may have ended in this moment.
        let _ = kill_process(pid, Signal::TERM);
    }
    if timeout(PATIENCE, child.wait()).await.is_err() {
        tracing::warn!("{} did not end in {} s and is killed", program.name, PATIENCE.as_secs());
        let _ = child.kill().await;
    }
}
