//! Events: what happens, told to every open socket of `GET /1.0/events` (ams-api section 4). Live only; whoever
//! was not there asks for the state.

use std::time::SystemTime;

use fanlight_api::ams::{EVENT_LIFECYCLE, EVENT_OPERATION, Event, Lifecycle, Operation};
use tokio::sync::broadcast;

/// Events a slow socket may lag behind before it loses some.
const BACKLOG: usize = 4096;

/// The events. Clones are handles of the same.
#[derive(Clone, Debug)]
pub struct Events {
    sender: broadcast::Sender<Event>,
}

impl Default for Events {
    fn default() -> Self {
        Self { sender: broadcast::Sender::new(BACKLOG) }
    }
}

impl Events {
    /// All events from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.sender.subscribe()
    }

    /// The state of an operation changed; it is in the store already.
    pub fn operation(&self, operation: &Operation) {
        self.send(EVENT_OPERATION, serde_json::to_value(operation));
    }

    /// Something happened to an object. Instances are containers for older clients.
    pub fn lifecycle(&self, action: &str, source: &str) {
        let one = |action: String| {
            self.send(EVENT_LIFECYCLE, serde_json::to_value(Lifecycle { action, source: source.into() }));
        };
        one(action.to_owned());
        if let Some(rest) = action.strip_prefix("instance-") {
            one(format!("container-{rest}"));
        }
    }

    fn send(&self, kind: &str, metadata: serde_json::Result<serde_json::Value>) {
        let metadata = metadata.expect("texts and numbers always serialise");
        // Nobody listening is fine.
        let _ =
            self.sender.send(Event { kind: kind.into(), timestamp: timestamp(SystemTime::now()), metadata });
    }
}

/// RFC 3339 with fractions of a second.
pub fn timestamp(time: SystemTime) -> String {
    humantime::format_rfc3339_nanos(time).to_string()
}

/// Unix seconds.
pub fn unix_now() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}
