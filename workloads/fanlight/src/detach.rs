//! Running a stack behind the terminal: the command starts itself again in a session of its own, shows what the
//! child says until it is ready, and returns.

use std::{
    ffi::OsString,
    fs::{File, OpenOptions},
    io::{BufRead, BufReader, Write},
    os::unix::{fs::OpenOptionsExt, process::CommandExt},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

use crate::state::State;

/// Set in the environment of the child.
const CHILD: &str = "FANLIGHT_DETACHED";
/// How much of the log a failure shows, lines.
const TAIL_LINES: usize = 20;

/// Whether this process is the detached child.
pub fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

/// Starts this command again in the background and waits until it is ready.
///
/// # Errors
/// The child ended before it was ready; the text holds the end of its log.
pub fn run(state: &State) -> Result<()> {
    let program = std::env::current_exe().context("finding this program")?;
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let log = OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(0o600)
        .open(state.log())
        .with_context(|| format!("opening {}", state.log().display()))?;
    let mut command = Command::new(program);
    command.args(arguments).env(CHILD, "1").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
    // SAFETY: setsid is async-signal-safe and touches no memory of this process.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            Ok(())
        });
    }
    let mut child = command.spawn().context("starting the stack in the background")?;
    let Some(output) = child.stdout.take() else { bail!("the stack in the background has no output") };
    // The child closes its standard output when it is ready; it also closes when it ends.
    let mut shown = std::io::stdout();
    for line in BufReader::new(output).lines() {
        let line = line.context("reading what the stack says")?;
        writeln!(shown, "{line}").context("printing progress")?;
    }
    match child.try_wait().context("looking after the stack in the background")? {
        None => Ok(()),
        Some(_) => fail(state),
    }
}

/// Tells the parent that everything is ready: standard output goes nowhere from here on.
///
/// # Errors
/// The null device cannot be opened.
pub fn ready() -> Result<()> {
    let nowhere = OpenOptions::new().write(true).open("/dev/null").context("opening the null device")?;
    rustix::stdio::dup2_stdout(nowhere).context("closing standard output")
}

fn fail(state: &State) -> Result<()> {
    let log = File::open(state.log()).map(BufReader::new).map(|log| log.lines().map_while(Result::ok));
    let lines: Vec<String> = log.map(Iterator::collect).unwrap_or_default();
    let tail = lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n");
    bail!("the stack ended before it was ready; its log, {}, ends with\n{tail}", state.log().display())
}
