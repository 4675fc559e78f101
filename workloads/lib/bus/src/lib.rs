//! The bus between gateway and agents: publish and subscribe, and request and reply, over NATS or inside one
//! process. Subjects and messages are in `fanlight_api::bus`; this crate carries bytes.
//!
//! The bus is not a store: any message may be lost. Publishing never waits and never fails; a subscriber that
//! does not keep up loses messages, and so does everybody while the server is away. Losses are counted
//! ([`Bus::lost`]) and logged. What must arrive is sent again by whoever wants it to arrive.

mod config;
mod local;
mod loss;
mod nats;
mod serve;
mod subject;

use std::{
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::Stream;
use serde::{Serialize, de::DeserializeOwned};
use tokio::sync::watch;

pub use config::BusConfig;
pub use serve::Serving;

/// Most messages that wait for one subscriber; the next ones are lost.
pub const QUEUE_MESSAGES: usize = 4096;
/// Most bytes of payload that wait for one subscriber of the in-process bus; the next messages are lost.
pub const QUEUE_BYTES: usize = 32 * 1024 * 1024;
/// Largest payload, bytes. The default limit of NATS servers, kept by the in-process bus as well.
pub const MAX_PAYLOAD_BYTES: usize = 1024 * 1024;

/// A handle to a bus; clones are the same bus.
#[derive(Clone)]
pub struct Bus {
    backend: Backend,
}

#[derive(Clone)]
enum Backend {
    Local(Arc<local::Local>),
    Nats(Arc<nats::Nats>),
}

/// Why a bus or a subscription could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    /// `bus.url` is of no known kind.
    #[error("bus.url {url:?} is invalid: {reason}")]
    Url {
        /// As configured, without credentials.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A file of the configuration cannot be read.
    #[error("reading {key} {path:?}")]
    File {
        /// Name of the setting.
        key: &'static str,
        /// Its value.
        path: std::path::PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// Settings that exclude each other.
    #[error("{0}")]
    Settings(String),
    /// A subject with characters or empty parts that are not allowed.
    #[error("bus subject {0:?} is invalid")]
    Subject(String),
    /// The NATS client refused.
    #[error("{what} on the bus at {server}")]
    Nats {
        /// What was tried.
        what: String,
        /// Address of the server.
        server: String,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Why a request got no answer.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// Nobody serves the subject.
    #[error("nobody serves {0} on the bus")]
    NoResponders(String),
    /// Somebody serves it and did not answer in time.
    #[error("no answer from {subject} on the bus within {} ms", .timeout.as_millis())]
    TimedOut {
        /// Where it was sent.
        subject: String,
        /// How long an answer was waited for.
        timeout: Duration,
    },
    /// The server of the bus was away all the time.
    #[error("the bus is not connected; {subject} was not asked")]
    NotConnected {
        /// Where it was to be sent.
        subject: String,
    },
    /// A subject with characters that are not allowed.
    #[error("bus subject {0:?} is invalid")]
    Subject(String),
    /// Beyond [`MAX_PAYLOAD_BYTES`].
    #[error(
        "message of {size} bytes for {subject} is too large: at most {MAX_PAYLOAD_BYTES} bytes are allowed"
    )]
    TooLarge {
        /// Where it was to be sent.
        subject: String,
        /// Its size.
        size: usize,
    },
    /// The question cannot be written or the answer not read as what was expected.
    #[error("message to or from {subject} on the bus does not fit its type")]
    Codec {
        /// Where it was sent.
        subject: String,
        /// Why not.
        #[source]
        source: serde_json::Error,
    },
    /// The NATS client failed.
    #[error("asking {subject} on the bus")]
    Other {
        /// Where it was sent.
        subject: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// A message as received.
#[derive(Clone)]
pub struct Message {
    /// Where it was sent.
    pub subject: String,
    /// Content.
    pub payload: Bytes,
    /// Where an answer is awaited.
    pub reply: Option<String>,
    bus: Bus,
}

impl Message {
    /// Answers a request; does nothing when no answer is awaited. May be lost, as any message.
    pub fn respond(&self, payload: impl Into<Bytes>) {
        if let Some(reply) = &self.reply {
            self.bus.publish(reply, payload.into());
        }
    }

    /// [`Message::respond`] with a value as JSON.
    pub fn respond_json<T: Serialize>(&self, value: &T) {
        if let Some(reply) = &self.reply {
            self.bus.publish_json(reply, value);
        }
    }

    /// The payload read as JSON.
    ///
    /// # Errors
    /// It is not JSON or not of this type.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        serde_json::from_slice(&self.payload)
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Message")
            .field("subject", &self.subject)
            .field("bytes", &self.payload.len())
            .field("reply", &self.reply)
            .finish()
    }
}

/// The messages of one subscription, a [`Stream`]; dropping it ends the subscription.
pub struct Subscription {
    source: Source,
    bus: Bus,
}

enum Source {
    Local(local::Receiver),
    Nats(async_nats::Subscriber),
}

impl Subscription {
    /// The next message; `None` when the bus itself has ended.
    pub async fn next(&mut self) -> Option<Message> {
        futures_util::StreamExt::next(&mut StreamRef(self)).await
    }
}

struct StreamRef<'a>(&'a mut Subscription);

impl Stream for StreamRef<'_> {
    type Item = Message;
    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Message>> {
        Pin::new(&mut *self.0).poll_next(cx)
    }
}

impl Stream for Subscription {
    type Item = Message;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Message>> {
        let bus = self.bus.clone();
        match &mut self.source {
            Source::Local(receiver) => receiver.poll_recv(cx).map(|delivery| {
                delivery.map(|delivery| Message {
                    subject: delivery.subject.to_string(),
                    payload: delivery.payload,
                    reply: delivery.reply.map(|reply| reply.to_string()),
                    bus,
                })
            }),
            Source::Nats(subscriber) => Pin::new(subscriber).poll_next(cx).map(|message| {
                message.map(|message| Message {
                    subject: message.subject.to_string(),
                    payload: message.payload,
                    reply: message.reply.map(|reply| reply.to_string()),
                    bus,
                })
            }),
        }
    }
}

impl Bus {
    /// A bus inside this process.
    pub fn local() -> Self {
        Self { backend: Backend::Local(Arc::default()) }
    }

    /// The bus of a configuration. A NATS server that is not there yet is no error: it is looked for until it
    /// comes, which the log says, and [`Bus::connected`] tells.
    ///
    /// # Errors
    /// The configuration is wrong or one of its files cannot be read.
    pub async fn connect(config: &BusConfig) -> Result<Self, BusError> {
        if config.url == "local:" {
            return Ok(Self::local());
        }
        let nats = nats::Nats::connect(config).await?;
        Ok(Self { backend: Backend::Nats(Arc::new(nats)) })
    }

    /// Whether the bus is inside this process, where nobody else is on it.
    pub fn is_local(&self) -> bool {
        matches!(self.backend, Backend::Local(_))
    }

    /// Whether the server is reached now, and its changes. Always true inside one process.
    pub fn connected(&self) -> watch::Receiver<bool> {
        match &self.backend {
            Backend::Local(local) => local.connected(),
            Backend::Nats(nats) => nats.connected(),
        }
    }

    /// Messages lost on this side since the start: slow subscribers, no connection, too large.
    pub fn lost(&self) -> u64 {
        match &self.backend {
            Backend::Local(local) => local.lost(),
            Backend::Nats(nats) => nats.lost(),
        }
    }

    /// Sends a message to whoever subscribes to the subject now. Messages of one sender to one subject arrive
    /// in order, as far as they arrive.
    pub fn publish(&self, subject: &str, payload: impl Into<Bytes>) {
        let payload = payload.into();
        match &self.backend {
            Backend::Local(local) => local.publish(subject, None, payload),
            Backend::Nats(nats) => nats.publish(subject, payload),
        }
    }

    /// [`Bus::publish`] with a value as JSON.
    pub fn publish_json<T: Serialize + ?Sized>(&self, subject: &str, value: &T) {
        match serde_json::to_vec(value) {
            Ok(payload) => self.publish(subject, payload),
            Err(error) => {
                tracing::error!(
                    subject,
                    error = &error as &dyn std::error::Error,
                    "bus message cannot be written"
                );
            }
        }
    }

    /// Everything sent to a subject from now on. `*` stands for one part of a subject, `>` at the end for one
    /// or more.
    ///
    /// # Errors
    /// The subject is invalid, or the bus has ended.
    pub async fn subscribe(&self, subject: &str) -> Result<Subscription, BusError> {
        self.subscribe_as(subject, None).await
    }

    /// As [`Bus::subscribe`], each message to one member of the group.
    ///
    /// # Errors
    /// The subject or the group is invalid, or the bus has ended.
    pub async fn queue_subscribe(&self, subject: &str, group: &str) -> Result<Subscription, BusError> {
        self.subscribe_as(subject, Some(group)).await
    }

    async fn subscribe_as(&self, subject: &str, group: Option<&str>) -> Result<Subscription, BusError> {
        if !subject::is_valid_filter(subject) {
            return Err(BusError::Subject(subject.into()));
        }
        if let Some(group) = group.filter(|group| !subject::is_valid(group)) {
            return Err(BusError::Subject(group.into()));
        }
        let source = match &self.backend {
            Backend::Local(local) => Source::Local(local.subscribe(subject, group)),
            Backend::Nats(nats) => Source::Nats(nats.subscribe(subject, group).await?),
        };
        Ok(Subscription { source, bus: self.clone() })
    }

    /// Asks whoever serves the subject. Who asks must expect that the question was acted on although no answer
    /// came.
    ///
    /// # Errors
    /// Nobody serves it, or no answer came in time.
    pub async fn request(
        &self,
        subject: &str,
        payload: impl Into<Bytes>,
        timeout: Duration,
    ) -> Result<Bytes, RequestError> {
        let payload = payload.into();
        if !subject::is_valid(subject) {
            return Err(RequestError::Subject(subject.into()));
        }
        if payload.len() > MAX_PAYLOAD_BYTES {
            return Err(RequestError::TooLarge { subject: subject.into(), size: payload.len() });
        }
        match &self.backend {
            Backend::Local(local) => local.request(subject, payload, timeout).await,
            Backend::Nats(nats) => nats.request(subject, payload, timeout).await,
        }
    }

    /// [`Bus::request`] with question and answer as JSON.
    ///
    /// # Errors
    /// As [`Bus::request`], or the answer is of another type.
    pub async fn request_json<Q: Serialize + ?Sized, A: DeserializeOwned>(
        &self,
        subject: &str,
        question: &Q,
        timeout: Duration,
    ) -> Result<A, RequestError> {
        let codec = |source| RequestError::Codec { subject: subject.to_owned(), source };
        let payload = serde_json::to_vec(question).map_err(codec)?;
        let answer = self.request(subject, payload, timeout).await?;
        serde_json::from_slice(&answer).map_err(codec)
    }

    /// Waits until the server has everything that was published and subscribed before, at most so long.
    /// Returns whether it has.
    pub async fn flush(&self, timeout: Duration) -> bool {
        match &self.backend {
            Backend::Local(_) => true,
            Backend::Nats(nats) => nats.flush(timeout).await,
        }
    }
}
