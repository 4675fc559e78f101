//! Programs in instances: LXD's streams as those that the rest of AMS knows.

use std::{io, time::Duration};

use bytes::Bytes;
use fanlight_lxd::{ExecOptions, ExecOutput, Lxd, LxdError};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _, DuplexStream},
    sync::{mpsc, oneshot},
};

use crate::engine::{Control, Exec, Running};

/// Bytes on their way between a program and its user.
const BUFFER: usize = 64 * 1024;
/// How long a program may run; LXD wants some bound.
const LONGEST: Duration = Duration::from_secs(7 * 24 * 3600);
/// The signal of a terminal that is closed.
const SIGHUP: i32 = 1;

/// Runs a program as root of the instance.
pub async fn run(lxd: &Lxd, name: &str, exec: Exec) -> Result<Running, LxdError> {
    let options = ExecOptions {
        command: exec.command,
        environment: exec.environment,
        terminal: exec.terminal,
        ..ExecOptions::default()
    };
    let started = lxd.exec(name, &options).await?;
    let fanlight_lxd::Exec { operation, mut input, output, errors, mut controls } = started;
    let (stdin, mut typed) = tokio::io::duplex(BUFFER);
    let (stdout, to_stdout) = tokio::io::duplex(BUFFER);
    let (control, mut said) = mpsc::channel(16);
    let (end, ended) = oneshot::channel();
    let writer = tokio::spawn(async move {
        let mut buffer = vec![0; BUFFER / 2];
        loop {
            match typed.read(&mut buffer).await {
                Ok(0) | Err(_) => break,
                Ok(count) => {
                    if input.write(&Bytes::copy_from_slice(&buffer[..count])).await.is_err() {
                        return;
                    }
                }
            }
        }
        let _ = input.finish().await;
        // Closing the stream before the program has ended would end its terminal.
        std::future::pending::<()>().await;
    });
    let stderr = errors.map(|errors| {
        let (stderr, to_stderr) = tokio::io::duplex(BUFFER);
        tokio::spawn(copy(errors, to_stderr));
        Box::pin(stderr) as std::pin::Pin<Box<dyn AsyncRead + Send>>
    });
    tokio::spawn(copy(output, to_stdout));
    let controller = tokio::spawn(async move {
        loop {
            let told = match said.recv().await {
                Some(Control::Resize(columns, rows)) => controls.resize(columns, rows).await,
                Some(Control::Signal(number)) => controls.signal(number).await,
                Some(Control::HangUp) => controls.signal(SIGHUP).await,
                // Nobody will say anything; closing the stream would end the program.
                None => std::future::pending().await,
            };
            if told.is_err() {
                return;
            }
        }
    });
    tokio::spawn(async move {
        let code = operation.wait(LONGEST).await.ok().and_then(|outcome| {
            let code = outcome.metadata.as_ref().and_then(|metadata| metadata["return"].as_i64());
            code.and_then(|code| i32::try_from(code).ok())
        });
        writer.abort();
        controller.abort();
        if let Some(code) = code {
            // Nobody waiting is fine.
            let _ = end.send(code);
        }
    });
    Ok(Running { stdin: Box::pin(stdin), stdout: Box::pin(stdout), stderr, control, ended })
}

async fn copy(mut from: ExecOutput, mut to: DuplexStream) {
    while let Ok(Some(bytes)) = from.next().await {
        if to.write_all(&bytes).await.is_err() {
            return;
        }
    }
}

/// Runs a program to its end and gives its status and the first bytes of what it wrote.
pub async fn capture(lxd: &Lxd, name: &str, command: &[&str], most: u64) -> Result<(i32, Vec<u8>), LxdError> {
    let command = command.iter().map(|word| (*word).to_owned()).collect();
    let mut running = run(lxd, name, Exec { command, ..Exec::default() }).await?;
    drop(running.stdin);
    let mut said = Vec::new();
    let read: io::Result<_> = (&mut running.stdout).take(most).read_to_end(&mut said).await;
    let code = running.ended.await.unwrap_or(-1);
    read.map(|_| (code, said))
        .map_err(|error| LxdError::Answer { call: format!("running {}", name), reason: error.to_string() })
}
