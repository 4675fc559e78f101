//! What an instance gets at creation, and what it reports back.
//!
//! The guest file is one JSON document. For the process engine the shim feeds it to the streamer on standard
//! input, so that no path inside the instance ever holds the token; for containers it is a file of mode 0600.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{InstanceId, Secret, SessionId, gateway::Screen};

/// Everything the streamer needs to know.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Guest {
    /// [`crate::PROTOCOL_VERSION`] of the writer.
    pub version: u32,
    /// Instance this is.
    pub instance_id: InstanceId,
    /// What to run.
    pub application: GuestApplication,
    /// Display at start.
    pub display: Screen,
    /// How to reach the agent; absent for instances that are not streamed.
    #[serde(default)]
    pub streaming: Option<Streaming>,
    /// Where media goes.
    #[serde(default)]
    pub media: Media,
}

/// The program of an application (design section 8).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GuestApplication {
    /// Name of the application, for logs.
    pub name: String,
    /// Program and arguments; no shell.
    pub command: Vec<String>,
    /// Added to the environment.
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
    /// Absolute; default: the home folder.
    #[serde(default)]
    pub working_directory: Option<String>,
    /// What happens when the program ends.
    #[serde(default)]
    pub restart: Restart,
}

/// What happens when the program of an application ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    /// Status 0 ends the instance gracefully, anything else ends it as failed.
    #[default]
    Never,
    /// Status 0 ends the instance; a failure is started again, with back-off, at most 5 times in a minute.
    OnFailure,
    /// Started again whatever happened, with back-off.
    Always,
}

/// Handed out by the agent for one session (ams-model section 3.6).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Streaming {
    /// Session that owns the instance.
    pub session_id: SessionId,
    /// Websocket of the agent, `wss://host:port/internal/1.0/stream`.
    pub agent_url: String,
    /// Opens that websocket for this session only.
    pub token: Secret,
    /// SHA-256 of the agent's certificate (DER), lower-case hex; empty: checked against the system's roots.
    #[serde(default)]
    pub fingerprint: String,
    /// Whether the instance outlives its client.
    #[serde(default)]
    pub joinable: bool,
    /// Minutes without a client before the instance ends itself; 0 = never.
    #[serde(default)]
    pub idle_time_min: u32,
    /// The caller's data, handed on to the application.
    #[serde(default)]
    pub extra_data: Value,
}

/// Addresses and limits of the media path.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Media {
    /// Address to bind the one UDP socket to; absent: 127.0.0.1.
    pub bind: Option<IpAddr>,
    /// UDP port; 0 = any free one.
    pub port: u16,
    /// Addresses that clients or TURN servers reach; empty: the bound address. Port 0 means the bound port.
    pub advertise: Vec<SocketAddr>,
    /// Encoder chosen for the node (`x264`, `openh264`, …); absent: the best that works.
    pub encoder: Option<String>,
}

/// How an instance ended, told to the shim in the field `X_FANLIGHT_RESULT` of a notify datagram.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// Why.
    pub reason: EndReason,
    /// For people: which step, which values, what to do.
    pub message: String,
}

/// Why an instance ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EndReason {
    /// Asked to stop.
    Stopped,
    /// The application ended with status 0.
    Finished,
    /// No client for the session's idle time.
    Idle,
    /// The application or the streamer failed.
    Failed,
}

impl EndReason {
    /// Whether the instance ended as it should.
    pub fn is_graceful(self) -> bool {
        self != Self::Failed
    }
}

/// Exit status of a streamer whose instance ended gracefully.
pub const EXIT_GRACEFUL: i32 = 0;
/// Exit status of a streamer whose instance failed; the reason was sent in a notify datagram and logged.
pub const EXIT_FAILED: i32 = 70;
/// Exit status of a streamer that could not read its guest file.
pub const EXIT_BAD_GUEST: i32 = 78;
