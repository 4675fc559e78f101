//! `fanlight monitor`: the events of AMS as they come.

use anyhow::{Context as _, Result};
use fanlight_api::ams::Event;
use fanlight_client::Signal;

use super::{
    cli::{EventKind, Format, Monitor},
    output::{self, cell, harmless, note},
    remotes::client,
};

/// `fanlight monitor`
///
/// # Errors
/// The server cannot be reached at first, or does not let this client in.
pub async fn monitor(options: Monitor) -> Result<()> {
    let ams = client(&options.target)?;
    let kinds: Vec<String> = options.kinds.iter().map(|kind| name(*kind).to_owned()).collect();
    let mut events = ams.events_of(&kinds);
    let mut connected = false;
    loop {
        match events.next().await {
            Signal::Connected => connected = true,
            Signal::Event(event) => show(options.output.format, &event)?,
            // A refusal does not get better by asking again.
            Signal::Disconnected(error) if !connected || !error.is_transient() => {
                return Err(error).context("following the events");
            }
            Signal::Disconnected(error) => {
                note(&format!("events are lost until the connection is back: {}", error.chain()))
            }
        }
    }
}

fn name(kind: EventKind) -> &'static str {
    match kind {
        EventKind::Operation => "operation",
        EventKind::Lifecycle => "lifecycle",
        EventKind::Logging => "logging",
    }
}

fn show(format: Format, event: &Event) -> Result<()> {
    match format {
        Format::Table => output::print(&format!("{}\n", harmless(&line(event)))),
        Format::Json => {
            let text = serde_json::to_string(event).context("writing an event as JSON")?;
            output::print(&format!("{text}\n"))
        }
        Format::Yaml => {
            output::print("---\n")?;
            output::document(Format::Yaml, event)
        }
    }
}

/// An event in one line.
fn line(event: &Event) -> String {
    let metadata = &event.metadata;
    let text = match event.kind.as_str() {
        "lifecycle" => format!("{} {}", cell(metadata, "/action"), cell(metadata, "/source")),
        "operation" => {
            let error = cell(metadata, "/err");
            let error = if error.is_empty() { error } else { format!(": {error}") };
            format!(
                "{} {} ({}){error}",
                cell(metadata, "/id"),
                cell(metadata, "/description"),
                cell(metadata, "/status").to_lowercase()
            )
        }
        _ => match cell(metadata, "/message") {
            message if message.is_empty() => metadata.to_string(),
            message => format!("{} {message}", cell(metadata, "/level")),
        },
    };
    // To the millisecond; what is behind is of no use to people.
    let time: String = event.timestamp.chars().take(23).collect();
    format!("{time} {:<9} {text}", event.kind)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn events_are_one_line_each() {
        let event = |kind: &str, metadata| Event {
            kind: kind.into(),
            timestamp: "2026-01-05T10:00:00.123456789Z".into(),
            metadata,
        };
        for (event, expected) in [
            (
                event("lifecycle", json!({"action": "instance-running", "source": "/1.0/instances/x"})),
                "2026-01-05T10:00:00.123 lifecycle instance-running /1.0/instances/x",
            ),
            (
                event(
                    "operation",
                    json!({"id": "o", "description": "Creating instance", "status": "Failure", "err": "no"}),
                ),
                "2026-01-05T10:00:00.123 operation o Creating instance (failure): no",
            ),
            (
                event("logging", json!({"level": "info", "message": "hello"})),
                "2026-01-05T10:00:00.123 logging   info hello",
            ),
        ] {
            assert_eq!(line(&event), expected);
        }
    }
}
