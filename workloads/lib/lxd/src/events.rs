//! Events of LXD, looked for again whenever the connection is lost.

use std::{collections::HashMap, time::Duration};

use fanlight_client::{ClientError, WebSocket};
use futures_util::{SinkExt, StreamExt};
use http::HeaderMap;
use serde::Deserialize;
use serde_json::Value;
use tokio::{
    sync::mpsc,
    task::JoinHandle,
    time::{Instant, MissedTickBehavior},
};
use tokio_tungstenite::tungstenite::Message;

use crate::{Lxd, LxdError};

const QUEUE: usize = 1024;
const PING_EVERY: Duration = Duration::from_secs(10);
const SILENCE: Duration = Duration::from_secs(30);
const FIRST_RETRY: Duration = Duration::from_millis(200);
const LAST_RETRY: Duration = Duration::from_secs(5);

/// What a follower of events learns.
#[derive(Debug)]
pub enum Signal {
    /// Events come from now on. Those before are lost: whoever goes by them must read the whole state now.
    Connected,
    /// Something happened.
    Event(Event),
    /// Events are lost until the next [`Signal::Connected`].
    Disconnected(LxdError),
}

/// Something that happened.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Event {
    /// `lifecycle`, `operation`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The member it happened on.
    pub location: String,
    /// The project it belongs to.
    pub project: String,
    /// What happened.
    pub metadata: Value,
}

/// What happened to something.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Lifecycle {
    /// `instance-started`, `instance-ready`, `instance-shutdown`, and others.
    pub action: String,
    /// Path of what it happened to, with the project as its query.
    pub source: String,
    /// More, by action.
    pub context: Option<HashMap<String, Value>>,
}

impl Event {
    /// What happened, if it is of that kind.
    pub fn lifecycle(&self) -> Option<Lifecycle> {
        (self.kind == "lifecycle").then(|| serde_json::from_value(self.metadata.clone()).ok())?
    }
}

impl Lifecycle {
    /// Name of the instance that it happened to.
    pub fn instance(&self) -> Option<&str> {
        let path = self.source.split('?').next()?;
        path.strip_prefix("/1.0/instances/")?.split('/').next().filter(|name| !name.is_empty())
    }
}

/// The events of a server or cluster. Dropping it ends the connection.
pub struct Events {
    signals: mpsc::Receiver<Signal>,
    task: JoinHandle<()>,
}

impl Drop for Events {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Events {
    /// The next signal. Never ends by itself; may be dropped and called again.
    pub async fn next(&mut self) -> Signal {
        match self.signals.recv().await {
            Some(signal) => signal,
            // The task ends only when this is dropped.
            None => std::future::pending().await,
        }
    }
}

impl Lxd {
    /// Follows the events of the project about the lives of things and about operations, from all members.
    pub fn events(&self) -> Events {
        let (sender, signals) = mpsc::channel(QUEUE);
        Events { signals, task: tokio::spawn(follow(self.clone(), sender)) }
    }
}

async fn follow(lxd: Lxd, signals: mpsc::Sender<Signal>) {
    let mut query = vec![("type", "lifecycle,operation".to_owned())];
    query.extend(lxd.project.clone().map(|project| ("project", project)));
    let mut pause = FIRST_RETRY;
    loop {
        let error = match lxd.endpoint.websocket_with("/1.0/events", &query, HeaderMap::new()).await {
            Ok(socket) => {
                if signals.send(Signal::Connected).await.is_err() {
                    return;
                }
                pause = FIRST_RETRY;
                match read(socket, &signals).await {
                    Some(error) => error,
                    None => return,
                }
            }
            Err(error @ ClientError::Refused { .. }) => LxdError::Client(error),
            Err(error) => lost(error),
        };
        if signals.send(Signal::Disconnected(error)).await.is_err() {
            return;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LAST_RETRY);
    }
}

fn lost(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> LxdError {
    LxdError::Unreachable { call: "GET /1.0/events".into(), source: source.into() }
}

/// Reads until the connection is lost; `None` when nobody listens any more.
async fn read(mut socket: WebSocket, signals: &mpsc::Sender<Signal>) -> Option<LxdError> {
    let mut pings = tokio::time::interval(PING_EVERY);
    pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut heard = Instant::now();
    loop {
        tokio::select! {
            received = socket.next() => {
                heard = Instant::now();
                let message = match received {
                    Some(Ok(message)) => message,
                    Some(Err(error)) => return Some(lost(error)),
                    None => return Some(lost("the server closed the connection")),
                };
                let bytes = match message {
                    Message::Text(text) => text.as_bytes().to_vec(),
                    Message::Binary(bytes) => bytes.to_vec(),
                    _ => continue,
                };
                match serde_json::from_slice(&bytes) {
                    Ok(event) => signals.send(Signal::Event(event)).await.ok()?,
                    Err(error) => tracing::debug!(%error, "an event of LXD cannot be understood"),
                }
            }
            _ = pings.tick() => {
                if heard.elapsed() > SILENCE {
                    return Some(lost("the server is silent"));
                }
                if let Err(error) = socket.send(Message::Ping(Vec::new().into())).await {
                    return Some(lost(error));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_instance_of_a_lifecycle_event_is_known() {
        let text = r#"{"type":"lifecycle","timestamp":"2026-11-22T10:00:00Z","location":"none",
            "project":"fanlight","metadata":{"action":"instance-started",
            "source":"/1.0/instances/c1?project=fanlight","requestor":{"protocol":"unix"}}}"#;
        let event: Event = serde_json::from_str(text).expect("as LXD writes it");
        let lifecycle = event.lifecycle().expect("a lifecycle event");
        assert_eq!((lifecycle.action.as_str(), lifecycle.instance()), ("instance-started", Some("c1")));
        let other = Lifecycle { source: "/1.0/images/ab".into(), ..Lifecycle::default() };
        assert_eq!(other.instance(), None);
        let operation = Event { kind: "operation".into(), ..event };
        assert!(operation.lifecycle().is_none());
    }
}
