//! Waiting for work at the server, with one line on a terminal that says how far it is.

use std::{
    io::{IsTerminal as _, Write as _},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use fanlight_api::ams::Operation;
use fanlight_client::{AmsClient, ClientError};

use super::{
    cli::Patience,
    output::{harmless, note},
};

/// How often the line is written anew.
const EVERY: Duration = Duration::from_millis(300);

/// The line; it is gone when this is.
pub struct Line {
    shown: bool,
    written: bool,
}

impl Line {
    /// A line on standard error, or none where that is no terminal.
    pub fn new() -> Self {
        Self { shown: std::io::stderr().is_terminal(), written: false }
    }

    /// Whether anybody sees it.
    pub fn is_shown(&self) -> bool {
        self.shown
    }

    /// Writes it anew.
    pub fn say(&mut self, text: &str) {
        if !self.shown {
            return;
        }
        let columns = super::terminal::size().map_or(80, |(columns, _)| usize::from(columns).max(20));
        let text: String = harmless(text).chars().take(columns - 1).collect();
        let mut out = std::io::stderr();
        // Best effort: a line that is not seen is no failure.
        let _ = write!(out, "\r{text}\x1b[K");
        let _ = out.flush();
        self.written = true;
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if self.written {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

/// Waits for the end of an operation, if that is wanted. `doing` is what is said meanwhile.
///
/// # Errors
/// It failed, or goes on beyond the time.
pub async fn follow(ams: &AmsClient, operation: &Operation, doing: &str, patience: &Patience) -> Result<()> {
    if patience.no_wait {
        if !operation.is_final() {
            note(&format!("{doing}: accepted as operation {}", operation.id));
        }
        return Ok(());
    }
    finish(ams, operation, doing, patience.timeout).await.map(|_| ())
}

/// Waits for the end of an operation.
///
/// # Errors
/// It failed, or goes on beyond the time.
pub async fn finish(
    ams: &AmsClient,
    operation: &Operation,
    doing: &str,
    timeout: Duration,
) -> Result<Operation> {
    let mut line = Line::new();
    let instance = operation.resource("instances").map(str::to_owned);
    let waiting = ams.wait(operation, timeout);
    tokio::pin!(waiting);
    let mut ticks = tokio::time::interval(EVERY);
    let done = loop {
        tokio::select! {
            done = &mut waiting => break done,
            _ = ticks.tick(), if line.is_shown() => {
                let state = match &instance {
                    Some(id) => ams.instance(id).await.ok().map(|instance| match instance.status_message.as_str() {
                        "" => instance.status.clone(),
                        message => format!("{}: {message}", instance.status),
                    }),
                    None => ams.operation(&operation.id).await.ok().map(|operation| operation.status.to_lowercase()),
                };
                line.say(&format!("{doing}: {}", state.unwrap_or_default()));
            }
        }
    };
    drop(line);
    match done {
        Ok(operation) => Ok(operation),
        Err(ClientError::TimedOut { path, .. }) if path.contains(&operation.id.to_string()) => bail!(
            "{doing}: not done after {}; it goes on at the server as operation {}; --timeout waits longer",
            humantime::format_duration(timeout),
            operation.id
        ),
        Err(error) => Err(error).with_context(|| doing.to_owned()),
    }
}
