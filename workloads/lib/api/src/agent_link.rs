//! Messages between a streamer and its agent: JSON text frames on one websocket,
//! `wss://AGENT/internal/1.0/stream` with `Authorization: Bearer <instance token>`.
//!
//! The streamer opens it, keeps it, and opens it again with back-off. Nothing here needs to arrive: link
//! packets are re-sent by their ends, status is sent whole on every change and every 5 s.

use serde::{Deserialize, Serialize};

use crate::{InstanceId, SessionId, guest::Ended, link::Packet};

/// From the streamer to the agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum ToAgent {
    /// First message on every connection.
    Hello {
        /// [`crate::PROTOCOL_VERSION`].
        version: u32,
        /// Session of the token.
        session_id: SessionId,
        /// Instance the streamer runs in.
        instance_id: InstanceId,
    },
    /// To be forwarded to the unit that holds the client.
    Link(Packet),
    /// The whole state.
    Status(StreamerStatus),
    /// One step of the connect funnel was reached.
    Step(FunnelStep),
}

/// From the agent to the streamer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum ToStreamer {
    /// From the unit that holds the client.
    Link(Packet),
    /// The session has ended: say goodbye to the client now. AMS stops the instance by itself.
    EndStream {
        /// Shown to the client.
        message: String,
    },
}

/// State of a streamer, sent whole.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StreamerStatus {
    /// The application has shown its first window.
    pub ready: bool,
    /// The client that has the stream, or is getting it.
    #[serde(default)]
    pub client: Option<ClientStatus>,
    /// Unix seconds since when nobody is connected; absent while somebody is.
    #[serde(default)]
    pub idle_since: Option<i64>,
    /// The instance is about to exit.
    #[serde(default)]
    pub ended: Option<Ended>,
}

/// The client of a streamer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClientStatus {
    /// Its generation.
    pub generation: u64,
    /// How far it is.
    pub state: ClientState,
}

/// How far a client is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClientState {
    /// Offer and answer are being exchanged.
    Signalling,
    /// ICE and DTLS are up.
    Connected,
    /// A decoded frame was acknowledged or follows from RTCP.
    Streaming,
}

/// One step of the connect funnel (design section 3), counted from when the client's `settings` arrived.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FunnelStep {
    /// Generation it belongs to.
    pub generation: u64,
    /// `signalled`, `ice`, `dtls`, `first-frame`, or `failed`.
    pub step: String,
    /// Milliseconds since the client's first frame of signalling arrived.
    pub duration_ms: u64,
    /// Only for `failed`: which step and why.
    #[serde(default)]
    pub message: Option<String>,
}
