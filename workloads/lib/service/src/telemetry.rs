//! Logs: text on a terminal, JSON lines by option, to standard error. `FANLIGHT_LOG` sets the filter in the
//! syntax of `tracing_subscriber`'s `EnvFilter` (`info,fanlight_gateway=debug`).

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

/// The variable that holds the filter.
pub const FILTER_VARIABLE: &str = "FANLIGHT_LOG";

/// How lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// For people; coloured on terminals.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Logs could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter is not understood.
    #[error("the filter {filter:?} in {FILTER_VARIABLE} is not understood")]
    Filter {
        /// What was given.
        filter: String,
        /// The parser's reason.
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
}

/// Sends the logs of this process to standard error. A second call changes nothing, so that programs composed
/// in one process may each call it.
///
/// `default_filter` counts while `FANLIGHT_LOG` is not set.
///
/// # Errors
/// The filter is not understood.
pub fn init(format: Format, default_filter: &str) -> Result<(), TelemetryError> {
    let filter = std::env::var(FILTER_VARIABLE).unwrap_or_else(|_| default_filter.to_owned());
    let parsed = EnvFilter::try_new(&filter).map_err(|source| TelemetryError::Filter { filter, source })?;
    let terminal = std::io::stderr().is_terminal();
    let builder = tracing_subscriber::fmt()
        .with_env_filter(parsed)
        .with_writer(std::io::stderr)
        // It would say so on standard error too, and panic on a full disk.
        .log_internal_errors(false)
        .with_ansi(terminal && format == Format::Text);
    // The error says that somebody was here before, which is what we want then.
    let _ = match format {
        Format::Text => builder.try_init(),
        Format::Json => builder.json().flatten_event(true).try_init(),
    };
    Ok(())
}

/// A new id for one request, also handed to the caller: 20 characters, unique across machines.
pub fn request_id() -> String {
    xid::new().to_string()
}

/// The chain of an error's causes on one line, for logs.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        // Some libraries repeat their cause in their own text.
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_tells_each_cause_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("outer")]
        struct Outer(#[source] Inner);
        #[derive(Debug, thiserror::Error)]
        #[error("inner")]
        struct Inner;
        assert_eq!(chain(&Outer(Inner)), "outer: inner");
    }
}
