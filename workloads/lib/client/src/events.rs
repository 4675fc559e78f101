//! Events of AMS (ams-api section 4), looked for again whenever the connection is lost.

use std::time::Duration;

use fanlight_api::ams::Event;
use futures_util::{SinkExt, StreamExt};
use http::HeaderMap;
use tokio::{
    sync::mpsc,
    task::JoinHandle,
    time::{Instant, MissedTickBehavior},
};
use tokio_tungstenite::tungstenite::Message;

use crate::{ClientError, Endpoint, WebSocket};

const QUEUE: usize = 256;
const PING_EVERY: Duration = Duration::from_secs(20);
const SILENCE: Duration = Duration::from_secs(50);
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
    Disconnected(ClientError),
}

/// The events of a server. Dropping it ends the connection. Whoever does not keep up slows the server's
/// connection down and loses events with it, which shows as a [`Signal::Disconnected`].
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
    pub(crate) fn follow(endpoint: Endpoint, path: String, headers: HeaderMap) -> Self {
        let (sender, signals) = mpsc::channel(QUEUE);
        Self { signals, task: tokio::spawn(follow(endpoint, path, headers, sender)) }
    }

    /// The next signal. Never ends by itself; may be dropped and called again.
    pub async fn next(&mut self) -> Signal {
        match self.signals.recv().await {
            Some(signal) => signal,
            // The task ends only when this is dropped.
            None => std::future::pending().await,
        }
    }
}

async fn follow(endpoint: Endpoint, path: String, headers: HeaderMap, signals: mpsc::Sender<Signal>) {
    let mut pause = FIRST_RETRY;
    loop {
        let error = match endpoint.websocket(&path, headers.clone()).await {
            Ok(socket) => {
                if signals.send(Signal::Connected).await.is_err() {
                    return;
                }
                pause = FIRST_RETRY;
                match read(&endpoint, &path, socket, &signals).await {
                    Some(error) => error,
                    None => return,
                }
            }
            Err(error) => error,
        };
        if signals.send(Signal::Disconnected(error)).await.is_err() {
            return;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LAST_RETRY);
    }
}

/// Reads until the connection is lost; `None` when nobody listens any more.
async fn read(
    endpoint: &Endpoint,
    path: &str,
    mut socket: WebSocket,
    signals: &mpsc::Sender<Signal>,
) -> Option<ClientError> {
    let lost = |source: Box<dyn std::error::Error + Send + Sync>| ClientError::Unreachable {
        method: "GET",
        path: path.into(),
        server: endpoint.name(),
        source,
    };
    let mut pings = tokio::time::interval(PING_EVERY);
    pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut heard = Instant::now();
    loop {
        tokio::select! {
            received = socket.next() => {
                heard = Instant::now();
                let message = match received {
                    Some(Ok(message)) => message,
                    Some(Err(error)) => return Some(lost(Box::new(error))),
                    None => return Some(lost("the server closed the connection".into())),
                };
                let Message::Text(text) = message else { continue };
                match serde_json::from_str(&text) {
                    Ok(event) => signals.send(Signal::Event(event)).await.ok()?,
                    Err(error) => tracing::debug!(%error, "an event of AMS cannot be understood"),
                }
            }
            _ = pings.tick() => {
                if heard.elapsed() > SILENCE {
                    return Some(lost("the server is silent".into()));
                }
                if let Err(error) = socket.send(Message::Ping(Vec::new().into())).await {
                    return Some(lost(Box::new(error)));
                }
            }
        }
    }
}
