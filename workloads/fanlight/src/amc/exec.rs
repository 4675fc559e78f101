//! `fanlight exec`, `shell`, `logs` and `show-log`: programs in instances, and what they and the application say.
//!
//! With a terminal, every key goes to the program and this terminal is as before when the program ends, or when this
//! command does. Without one, input, output, errors and signals go through as they would to a program here. Either way
//! the exit code is the program's.

use std::{
    collections::BTreeMap,
    io::{self, IsTerminal as _, Read as _},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use fanlight_api::ams::{InstanceStatus, Operation, exec::ExecPost};
use fanlight_client::{AmsClient, ClientError, Exec, ExecInput, ExecOutput};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
};

use super::{
    cli, output,
    remotes::client,
    terminal::{self, Raw},
};

/// A program may run for as long as it likes.
const FOREVER: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Chunks of input that wait for the connection.
const QUEUE: usize = 8;
/// End of transmission: how the end of input is typed on a terminal.
const EOT: &[u8] = &[4];
/// The folder in which instances of every engine keep the logs of what runs in them.
const LOGS: &str = "/var/log/fanlight";
/// How often logs are looked at that cannot be followed.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Status of the script that reads logs where there are none.
const NO_LOGS: u8 = 66;

/// `fanlight exec`. Returns the exit code of the program.
///
/// # Errors
/// The instance does not run, or the connection is lost.
pub async fn exec(options: cli::Exec) -> Result<u8> {
    let ams = client(&options.target)?;
    let terminals = io::stdin().is_terminal() && io::stdout().is_terminal();
    let interactive = options.interactive || (terminals && !options.no_interactive);
    let environment = options.environment.into_iter().collect();
    run(&ams, &options.instance, options.command, environment, interactive).await
}

/// `fanlight shell`. Returns the exit code of the shell.
///
/// # Errors
/// As of [`exec`].
pub async fn shell(options: cli::Shell) -> Result<u8> {
    // A login shell of root where there is one; an instance without root has no use for su.
    const SCRIPT: &str = "if [ \"$(id -u)\" = 0 ] && command -v su >/dev/null 2>&1; then exec su -l; fi; \
        if command -v bash >/dev/null 2>&1; then exec bash -l; fi; exec sh -l";
    let ams = client(&options.target)?;
    let command = ["sh", "-c", SCRIPT].map(String::from).to_vec();
    run(&ams, &options.instance, command, BTreeMap::new(), io::stdin().is_terminal()).await
}

/// `fanlight logs`. Returns the exit code of what reads them in the instance.
///
/// # Errors
/// The instance is not there, or nobody can read its logs.
pub async fn logs(options: cli::Logs) -> Result<u8> {
    let ams = client(&options.target)?;
    let instance = ams.instance(&options.instance).await.context("finding the instance")?;
    let lines = options.lines;
    if !options.follow {
        let names = ams.instance_logs(&options.instance).await.context("listing the logs")?;
        let names: Vec<&str> = names.iter().map(|log| log.rsplit('/').next().unwrap_or(log)).collect();
        for name in &names {
            let Some(text) = log(&ams, &options.instance, name).await? else { continue };
            if names.len() > 1 {
                output::print(&format!("==> {name} <==\n"))?;
            }
            output::print_bytes(last_lines(&text, lines))?;
        }
        if !names.is_empty() || instance.status() != InstanceStatus::Running {
            return Ok(0);
        }
    }
    if instance.status() != InstanceStatus::Running {
        bail!(
            "the instance is {}, so no more will come; without --follow its stored logs are printed",
            instance.status().as_str()
        );
    }
    let command = ["sh", "-c", &read_logs(options.follow), "sh", &lines.to_string(), LOGS];
    let command = command.map(String::from).to_vec();
    match run(&ams, &options.instance, command, BTreeMap::new(), false).await {
        Ok(NO_LOGS) if options.follow => follow_stored(&ams, &options.instance, lines).await,
        Ok(NO_LOGS) => bail!("the instance keeps no logs: there is nothing in {LOGS}, and no journal"),
        Err(error) if options.follow && is_unsupported(&error) => {
            follow_stored(&ams, &options.instance, lines).await
        }
        other => other,
    }
}

/// One log; none where nothing has been written to it yet.
async fn log(ams: &AmsClient, instance: &str, name: &str) -> Result<Option<Vec<u8>>> {
    match ams.instance_log(instance, name).await {
        Ok(text) => Ok(Some(text.to_vec())),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error).with_context(|| format!("reading the log {name}")),
    }
}

/// Prints what is added to the logs that the server keeps, until the instance has ended.
async fn follow_stored(ams: &AmsClient, instance: &str, lines: u32) -> Result<u8> {
    let mut printed: BTreeMap<String, usize> = BTreeMap::new();
    let mut last = String::new();
    let mut ending = endings()?;
    loop {
        let running = ams.instance(instance).await.context("looking at the instance")?.status();
        for path in ams.instance_logs(instance).await.context("listing the logs")? {
            let name = path.rsplit('/').next().unwrap_or(&path).to_owned();
            let Some(text) = log(ams, instance, &name).await? else { continue };
            let fresh = match printed.insert(name.clone(), text.len()) {
                None => last_lines(&text, lines),
                // A log that has become shorter was begun anew.
                Some(before) => text.get(before..).unwrap_or(&text),
            };
            if fresh.is_empty() {
                continue;
            }
            if last != name {
                output::print(&format!("==> {name} <==\n"))?;
                last = name;
            }
            output::print_bytes(fresh)?;
        }
        if running != InstanceStatus::Running {
            return Ok(0);
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            number = next(&mut ending) => return Ok(ended_by(number)),
        }
    }
}

/// Whether the server runs no programs in instances, seen by an answer about an instance that is there.
fn is_unsupported(error: &anyhow::Error) -> bool {
    let status = error.chain().find_map(|cause| cause.downcast_ref::<ClientError>()?.status());
    status.is_some_and(|status| matches!(status.as_u16(), 404 | 405 | 501))
}

/// What reads logs in an instance: its log files, or its journal where it has none. Arguments: lines, folder.
fn read_logs(follow: bool) -> String {
    let (tail, journal) = if follow { (" -F", " -f") } else { ("", "") };
    format!(
        "set -- \"$1\" \"$2\"/*.log; n=$1; shift; \
         if [ -e \"$1\" ]; then exec tail -n \"$n\"{tail} -- \"$@\"; fi; \
         command -v journalctl >/dev/null 2>&1 || exit {NO_LOGS}; exec journalctl --no-pager -n \"$n\"{journal}"
    )
}

/// The end of a text, so many lines of it.
fn last_lines(text: &[u8], lines: u32) -> &[u8] {
    let body = text.strip_suffix(b"\n").unwrap_or(text);
    let Some(before) = lines.checked_sub(1) else { return &[] };
    let start = body.iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n').nth(before as usize);
    start.map_or(text, |(at, _)| &text[at + 1..])
}

/// `fanlight show-log`
///
/// # Errors
/// The instance or the log is not there.
pub async fn show_log(options: cli::ShowLog) -> Result<()> {
    let ams = client(&options.target)?;
    match &options.log {
        Some(log) => {
            let text = ams.instance_log(&options.instance, log).await.context("reading the log")?;
            output::print_bytes(&text)
        }
        None => {
            let logs = ams.instance_logs(&options.instance).await.context("listing the logs")?;
            let names = logs.iter().map(|log| format!("{}\n", log.rsplit('/').next().unwrap_or(log)));
            output::print(&names.collect::<String>())
        }
    }
}

async fn run(
    ams: &AmsClient,
    instance: &str,
    command: Vec<String>,
    mut environment: BTreeMap<String, String>,
    interactive: bool,
) -> Result<u8> {
    let (width, height) = if interactive { terminal::size().unwrap_or((80, 24)) } else { (0, 0) };
    if interactive && let Ok(term) = std::env::var("TERM") {
        environment.entry("TERM".into()).or_insert(term);
    }
    let request = ExecPost { command, environment, interactive, width, height };
    let exec = ams.exec(instance, &request).await.context("running the program")?;
    let operation = exec.operation.clone();
    let mut ending = endings()?;
    let ended = if interactive {
        with_terminal(exec, &mut ending).await?
    } else {
        without_terminal(exec, &mut ending).await?
    };
    match ended {
        Ended::Here(code) => Ok(code),
        // A program may close its streams and go on; whoever waits for it may have enough of that.
        Ended::Streams => tokio::select! {
            status = exit_status(ams, &operation) => status,
            number = next(&mut ending) => Ok(ended_by(number)),
        },
    }
}

/// Why nothing more is carried.
enum Ended {
    /// There is nothing more.
    Streams,
    /// This command ends, with this exit code.
    Here(u8),
}

/// The exit status of a program that has ended.
///
/// # Errors
/// The operation failed, or does not say.
pub async fn exit_status(ams: &AmsClient, operation: &Operation) -> Result<u8> {
    let done = ams.wait(operation, FOREVER).await.context("waiting for the end of the program")?;
    let status = done.metadata.as_ref().and_then(|metadata| metadata.get("return")?.as_i64());
    match status {
        Some(status) => Ok(u8::try_from(status).unwrap_or(super::failure::FAILED)),
        None => bail!("the program has ended, and the server does not say how"),
    }
}

async fn with_terminal(exec: Exec, ending: &mut Endings) -> Result<Ended> {
    let Exec { input, mut output, mut controls, .. } = exec;
    let mut resized = listen(SignalKind::window_change())?;
    let _raw = Raw::enter().context("handing the terminal over")?;
    tokio::spawn(carry(read_input(), input, AtEnd::Say));
    loop {
        tokio::select! {
            bytes = output.next() => match bytes.context("the connection to the program is lost")? {
                None => return Ok(Ended::Streams),
                Some(bytes) => if write(&mut io::stdout().lock(), &bytes)?.is_none() {
                    return Ok(Ended::Here(gone()));
                },
            },
            _ = resized.recv() => if let Some((columns, rows)) = terminal::size() {
                // A program that has just ended has no use for it.
                let _ = controls.resize(columns, rows).await;
            },
            number = next(ending) => return Ok(Ended::Here(ended_by(number))),
        }
    }
}

async fn without_terminal(exec: Exec, ending: &mut Endings) -> Result<Ended> {
    let Exec { input, mut output, errors, mut controls, .. } = exec;
    let mut errors = errors.context("the program has no standard error")?;
    tokio::spawn(carry(read_input(), input, AtEnd::Close));
    let (mut more, mut more_errors, mut signals) = (true, true, 0);
    while more || more_errors {
        tokio::select! {
            bytes = output.next(), if more => match bytes.context("the connection to the program is lost")? {
                None => more = false,
                Some(bytes) => if write(&mut io::stdout().lock(), &bytes)?.is_none() {
                    return Ok(Ended::Here(gone()));
                },
            },
            bytes = errors.next(), if more_errors => match bytes.context("the connection to the program is lost")? {
                None => more_errors = false,
                Some(bytes) => { write(&mut io::stderr().lock(), &bytes)?; }
            },
            number = next(ending) => {
                signals += 1;
                // The program decides what a signal means; whoever insists wants to be rid of it.
                if signals > 2 || controls.signal(number).await.is_err() {
                    return Ok(Ended::Here(ended_by(number)));
                }
            }
        }
    }
    Ok(Ended::Streams)
}

/// Runs a program without a terminal, with input and output of the caller's making; its errors go to standard error.
/// Returns its exit code.
///
/// # Errors
/// The instance does not run, the connection is lost, or `take` fails.
pub async fn piped(
    ams: &AmsClient,
    instance: &str,
    command: &[&str],
    input: mpsc::Receiver<Bytes>,
    mut take: impl FnMut(&[u8]) -> Result<()>,
) -> Result<u8> {
    let command = command.iter().map(|word| (*word).to_owned()).collect();
    let request = ExecPost { command, ..ExecPost::default() };
    let exec = ams.exec(instance, &request).await.context("running a program in the instance")?;
    let Exec { operation, input: to_program, mut output, errors, controls } = exec;
    let carrying = tokio::spawn(carry(input, to_program, AtEnd::Close));
    let complaining = tokio::spawn(complain(errors));
    while let Some(bytes) = output.next().await.context("the connection to the program is lost")? {
        take(&bytes)?;
    }
    // Neither can fail in a way that the exit status does not tell better.
    let _ = complaining.await;
    let status = exit_status(ams, &operation).await;
    carrying.abort();
    drop(controls);
    status
}

async fn complain(errors: Option<ExecOutput>) {
    let Some(mut errors) = errors else { return };
    while let Ok(Some(bytes)) = errors.next().await {
        let _ = write(&mut io::stderr().lock(), &bytes);
    }
}

/// Writes all of it at once; none where nobody reads any more.
fn write(out: &mut dyn io::Write, bytes: &[u8]) -> Result<Option<()>> {
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Ok(()) => Ok(Some(())),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(None),
        Err(error) => Err(error).context("printing what the program says"),
    }
}

/// What the end of our input means for the program.
#[derive(Clone, Copy, PartialEq, Eq)]
enum AtEnd {
    /// Its input ends.
    Close,
    /// It is said as it is typed; the stream carries the output too.
    Say,
}

async fn carry(mut from: mpsc::Receiver<Bytes>, mut to: ExecInput, at_end: AtEnd) {
    while let Some(bytes) = from.recv().await {
        // A program that takes no more has ended, or will not miss it.
        if to.write(&bytes).await.is_err() {
            return;
        }
    }
    match at_end {
        AtEnd::Close => {
            let _ = to.finish().await;
        }
        AtEnd::Say => {
            let _ = to.write(&Bytes::from_static(EOT)).await;
            // Dropping this half is no end: the other half reads on.
        }
    }
}

/// Standard input, read by a thread of its own: a read of a terminal cannot be given up, and must not keep this command
/// from ending.
fn read_input() -> mpsc::Receiver<Bytes> {
    let (sender, receiver) = mpsc::channel(QUEUE);
    std::thread::spawn(move || {
        let mut buffer = vec![0; 32 * 1024];
        let mut input = io::stdin().lock();
        loop {
            match input.read(&mut buffer) {
                Ok(0) => return,
                Ok(read) => {
                    if sender.blocking_send(Bytes::copy_from_slice(&buffer[..read])).is_err() {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    });
    receiver
}

fn listen(kind: SignalKind) -> Result<Signal> {
    signal(kind).context("listening to signals")
}

/// Signals and their numbers.
type Endings = [(Signal, i32); 4];

/// The signals that end a program which does not expect them. From here on they end nothing here by themselves.
fn endings() -> Result<Endings> {
    Ok([
        (listen(SignalKind::interrupt())?, libc::SIGINT),
        (listen(SignalKind::terminate())?, libc::SIGTERM),
        (listen(SignalKind::hangup())?, libc::SIGHUP),
        (listen(SignalKind::quit())?, libc::SIGQUIT),
    ])
}

async fn next([a, b, c, d]: &mut Endings) -> i32 {
    tokio::select! {
        _ = a.0.recv() => a.1,
        _ = b.0.recv() => b.1,
        _ = c.0.recv() => c.1,
        _ = d.0.recv() => d.1,
    }
}

fn ended_by(signal: i32) -> u8 {
    u8::try_from(128 + signal).unwrap_or(super::failure::FAILED)
}

/// The exit code of a program whose reader is gone.
fn gone() -> u8 {
    ended_by(libc::SIGPIPE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_of_a_log_are_whole_lines() {
        for (text, lines, expected) in [
            ("", 3, ""),
            ("a\nb\nc\n", 2, "b\nc\n"),
            ("a\nb\nc", 2, "b\nc"),
            ("a\nb\nc\n", 3, "a\nb\nc\n"),
            ("a\nb\nc\n", 9, "a\nb\nc\n"),
            ("a\nb\nc\n", 0, ""),
            ("\n\n\n", 1, "\n"),
        ] {
            assert_eq!(last_lines(text.as_bytes(), lines), expected.as_bytes(), "{text:?} {lines}");
        }
    }

    #[test]
    fn logs_are_read_by_a_script_that_a_plain_shell_understands() {
        let folder = tempfile::tempdir().expect("temporary folder");
        std::fs::write(folder.path().join("a.log"), "1\n2\n3\n").expect("written");
        let output = std::process::Command::new("sh")
            .args(["-c", &read_logs(false), "sh", "2"])
            .arg(folder.path())
            .output()
            .expect("a shell is there");
        assert_eq!(String::from_utf8_lossy(&output.stdout), "2\n3\n");
        assert!(output.status.success());
        let nothing = std::process::Command::new("/bin/sh")
            .args(["-c", &read_logs(true), "sh", "2", "/no/such/folder"])
            .env("PATH", "/no/such/folder")
            .status()
            .expect("a shell is there");
        assert_eq!(nothing.code(), Some(NO_LOGS.into()), "neither files nor a journal");
    }
}
