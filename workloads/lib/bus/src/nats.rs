//! The bus over NATS core.
//!
//! The client library queues what is published while the server is away and sends it late; here such messages
//! are lost instead, because a late message on this bus is worth nothing and the queue would make publishers
//! wait once it is full. Subscriptions do survive: the library makes them again on every connection.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_nats::{Client, ConnectOptions, Event, Request, client::RequestErrorKind};
use bytes::Bytes;
use futures_util::{FutureExt as _, StreamExt as _};
use tokio::sync::watch;

use crate::{
    BusConfig, BusError, MAX_PAYLOAD_BYTES, QUEUE_MESSAGES, RequestError, config::read_secret, loss::Loss,
    subject,
};

/// How long the start waits for a first connection, so that a program and its server can be started together
/// without the first messages being lost.
const FIRST_CONNECTION: Duration = Duration::from_secs(1);
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(5);

/// A connection that is made again for ever.
pub struct Nats {
    client: Client,
    server: String,
    connected: watch::Sender<bool>,
    loss: Arc<Loss>,
}

impl Nats {
    pub async fn connect(config: &BusConfig) -> Result<Self, BusError> {
        if let Some(problem) = config.problems().into_iter().next() {
            return Err(BusError::Settings(problem));
        }
        let (servers, tls) = config.servers()?;
        let connected = watch::Sender::new(false);
        let loss = Arc::new(Loss::default());
        let options = options(config, tls, &connected, &loss)?;
        let server = config.url.clone();
        let client = options.connect(servers).await.map_err(|error| BusError::Nats {
            what: "connecting".into(),
            server: server.clone(),
            source: Box::new(error),
        })?;
        let nats = Self { client, server, connected, loss };
        if !nats.wait_connected(FIRST_CONNECTION).await {
            tracing::warn!(
                bus.url = nats.server,
                "the bus at {} is not there yet; waiting for it",
                nats.server
            );
        }
        Ok(nats)
    }

    pub fn connected(&self) -> watch::Receiver<bool> {
        self.connected.subscribe()
    }

    pub fn lost(&self) -> u64 {
        self.loss.total()
    }

    async fn wait_connected(&self, timeout: Duration) -> bool {
        let mut connected = self.connected.subscribe();
        tokio::time::timeout(timeout, connected.wait_for(|connected| *connected)).await.is_ok()
    }

    pub fn publish(&self, subject: &str, payload: Bytes) {
        if !subject::is_valid(subject) {
            return self.loss.count(subject, "its subject is invalid");
        }
        if payload.len() > MAX_PAYLOAD_BYTES {
            return self.loss.count(subject, "it is larger than 1 MiB");
        }
        if !*self.connected.borrow() {
            return self.loss.count(subject, "the bus is not connected");
        }
        // Only puts the message into the client's queue, which is done at once while there is room. The runtime must
        // not make a busy task wait here, which would look like a full queue.
        let queued =
            tokio::task::unconstrained(self.client.publish(subject.to_owned(), payload)).now_or_never();
        match queued {
            Some(Ok(())) => {}
            Some(Err(_)) => self.loss.count(subject, "the server does not take it"),
            None => self.loss.count(subject, "the server does not keep up"),
        }
    }

    pub async fn subscribe(
        &self,
        filter: &str,
        group: Option<&str>,
    ) -> Result<async_nats::Subscriber, BusError> {
        let subscribed = match group {
            None => self.client.subscribe(filter.to_owned()).await,
            Some(group) => self.client.queue_subscribe(filter.to_owned(), group.to_owned()).await,
        };
        subscribed.map_err(|error| BusError::Nats {
            what: format!("subscribing to {filter}"),
            server: self.server.clone(),
            source: Box::new(error),
        })
    }

    pub async fn request(
        &self,
        subject: &str,
        payload: Bytes,
        timeout: Duration,
    ) -> Result<Bytes, RequestError> {
        let deadline = tokio::time::Instant::now() + timeout;
        if !self.wait_connected(timeout).await {
            return Err(RequestError::NotConnected { subject: subject.into() });
        }
        let request = Request::new().payload(payload).timeout(Some(timeout));
        let answer =
            tokio::time::timeout_at(deadline, self.client.send_request(subject.to_owned(), request)).await;
        let timed_out = || RequestError::TimedOut { subject: subject.into(), timeout };
        match answer {
            Err(_) => Err(timed_out()),
            Ok(Ok(message)) => Ok(message.payload),
            Ok(Err(error)) => Err(match error.kind() {
                RequestErrorKind::TimedOut => timed_out(),
                RequestErrorKind::NoResponders => RequestError::NoResponders(subject.into()),
                _ => RequestError::Other { subject: subject.into(), source: Box::new(error) },
            }),
        }
    }

    /// The library's own flush ends when everything is written to the socket. What the server has done with it shows
    /// only in an answer: it takes what comes over one connection in order, so that a message to ourselves is one.
    pub async fn flush(&self, timeout: Duration) -> bool {
        let round_trip = async {
            let inbox = self.client.new_inbox();
            let Ok(mut back) = self.client.subscribe(inbox.clone()).await else { return false };
            self.client.publish(inbox, Bytes::new()).await.is_ok() && back.next().await.is_some()
        };
        matches!(tokio::time::timeout(timeout, round_trip).await, Ok(true))
    }
}

fn options(
    config: &BusConfig,
    tls: bool,
    connected: &watch::Sender<bool>,
    loss: &Arc<Loss>,
) -> Result<ConnectOptions, BusError> {
    // The library takes the process-wide provider; where a main has installed one already, that one stays.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let server = config.url.clone();
    let mut options = ConnectOptions::new()
        .name("fanlight")
        .retry_on_initial_connect()
        .max_reconnects(None)
        .subscription_capacity(QUEUE_MESSAGES)
        .client_capacity(QUEUE_MESSAGES)
        .connection_timeout(Duration::from_secs(5))
        .ping_interval(Duration::from_secs(10))
        .require_tls(tls)
        .reconnect_delay_callback({
            let server = server.clone();
            move |attempts| {
                let delay = retry_delay(attempts);
                if attempts.is_power_of_two() {
                    tracing::info!(attempts, "looking for the bus at {server}, attempt {attempts}");
                }
                delay
            }
        })
        .event_callback({
            let connected = connected.clone();
            let loss = loss.clone();
            let ever = Arc::new(AtomicBool::new(false));
            move |event| {
                match event {
                    Event::Connected => {
                        let again = if ever.swap(true, Ordering::Relaxed) { " again" } else { "" };
                        tracing::info!("connected{again} to the bus at {server}");
                        connected.send_replace(true);
                    }
                    Event::Disconnected | Event::Closed => {
                        tracing::warn!("lost the bus at {server}; looking for it");
                        connected.send_replace(false);
                    }
                    Event::SlowConsumer(_) => loss.count("", "a subscriber does not keep up"),
                    Event::ServerError(error) => tracing::warn!("the bus at {server} says: {error}"),
                    Event::ClientError(error) => tracing::warn!("the bus at {server}: {error}"),
                    Event::LameDuckMode | Event::Draining => {
                        tracing::info!("the bus at {server} is going down")
                    }
                }
                async {}
            }
        });
    let given = |path: &std::path::PathBuf| !path.as_os_str().is_empty();
    if given(&config.token_file) {
        options = options.token(read_secret("bus.token_file", &config.token_file)?);
    }
    if !config.user.is_empty() {
        let password = read_secret("bus.password_file", &config.password_file)?;
        options = options.user_and_password(config.user.clone(), password);
    }
    // The library reads these at each connection, so that renewed files are taken; a first look here makes a
    // wrong path an error of the start.
    for (key, path) in
        [("bus.ca", &config.ca), ("bus.certificate", &config.certificate), ("bus.key", &config.key)]
    {
        if given(path) {
            std::fs::File::open(path).map_err(|source| BusError::File { key, path: path.clone(), source })?;
        }
    }
    if given(&config.ca) {
        options = options.add_root_certificates(config.ca.clone());
    }
    if given(&config.certificate) {
        options = options.add_client_certificate(config.certificate.clone(), config.key.clone());
    }
    Ok(options)
}

fn retry_delay(attempts: usize) -> Duration {
    let doublings = u32::try_from(attempts.saturating_sub(1)).unwrap_or(u32::MAX).min(16);
    (FIRST_RETRY * 2_u32.pow(doublings)).min(LAST_RETRY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_between_attempts_grow_to_a_limit() {
        let pauses: Vec<u128> =
            [0, 1, 2, 3, 6, 7, 1000, usize::MAX].map(|n| retry_delay(n).as_millis()).into();
        assert_eq!(pauses, [100, 100, 200, 400, 3200, 5000, 5000, 5000]);
    }
}
