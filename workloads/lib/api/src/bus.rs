//! Subjects and messages between gateway and agents. The bus may lose, repeat or delay any of them: reports
//! are whole states that are sent again, requests are idempotent and repeated until their effect is seen.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    AgentId, InstanceId, SessionId, ShareId,
    agent_link::{ClientStatus, FunnelStep},
    gateway::{Application, Screen, ShareCreated, SharePatch, SharePost, StunServer},
    guest::Streaming,
};

/// Queue group of the gateway's units.
pub const GATEWAY_GROUP: &str = "gateway";

/// [`AgentReport`], to every gateway unit.
pub fn agents_report() -> String {
    "agents.report".into()
}

/// [`SessionsReport`], to one gateway unit (queue group).
pub fn sessions_report() -> String {
    "sessions.report".into()
}

/// [`GatewayRequest`] → [`GatewayResponse`], to one gateway unit (queue group).
pub fn gateway_sessions() -> String {
    "gateway.sessions".into()
}

/// [`AgentRequest`] → [`AgentResponse`], to one agent.
pub fn agent_requests(agent: &AgentId) -> String {
    format!("agents.{}.requests", token(agent.as_str()))
}

/// [`crate::link::Packet`] from the unit that holds the client, to whoever holds the instance.
pub fn session_up(session: &SessionId) -> String {
    format!("sessions.{}.up", token(session.as_str()))
}

/// [`crate::link::Packet`] from the instance, to the unit that holds the client.
pub fn session_down(session: &SessionId) -> String {
    format!("sessions.{}.down", token(session.as_str()))
}

/// Ids may hold dots, which separate tokens of a subject.
fn token(id: &str) -> String {
    id.replace('.', "~")
}

/// What an agent tells about itself every 2 s. An agent unheard of for 10 s gets no new sessions; its
/// running sessions are left alone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AgentReport {
    /// [`crate::PROTOCOL_VERSION`].
    pub version: u32,
    /// Who.
    pub agent_id: AgentId,
    /// Changes with every start of the agent.
    pub incarnation: String,
    /// Region it serves.
    pub region: String,
    /// Cluster behind it.
    pub cluster_id: String,
    /// When this was sent by the agent's clock, Unix milliseconds; 0 = not told.
    #[serde(default)]
    pub sent_ms: i64,
    /// Degrees, WGS 84: latitude, longitude.
    #[serde(default)]
    pub location: Option<(f64, f64)>,
    /// STUN URLs of the region, by which clients may measure their way there.
    #[serde(default)]
    pub stun_urls: Vec<String>,
    /// What can be streamed there.
    pub applications: Vec<ReportedApplication>,
    /// What is free there.
    #[serde(default)]
    pub capacity: Capacity,
    /// AMS answered the last question; without it no new sessions are sent.
    pub ams_reachable: bool,
    /// Going down: no new sessions, please.
    #[serde(default)]
    pub leaving: bool,
}

/// An application of a cluster.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReportedApplication {
    /// As shown to clients.
    #[serde(flatten)]
    pub application: Application,
    /// Numbers of all launchable versions.
    pub versions: Vec<u32>,
    /// The version that a launch without a number takes; absent: none is published.
    #[serde(default)]
    pub published: Option<u32>,
    /// What an instance takes.
    #[serde(default)]
    pub needs: Needs,
}

/// What an instance of an application takes of a cluster; 0 = not told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Needs {
    /// CPUs.
    #[serde(default)]
    pub cpus: u32,
    /// Bytes.
    #[serde(default)]
    pub memory_bytes: u64,
    /// Shares of GPUs.
    #[serde(default)]
    pub gpu_slots: u32,
    /// Parallel hardware encodes that it cannot do without.
    #[serde(default)]
    pub encoder_slots: u32,
}

/// Capacity of a cluster, for choosing among clusters. Absent = unknown, counts as free. A cluster that tells what
/// is free but not for one node together may still refuse a launch; the agent then says so.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Capacity {
    /// Instances that run now.
    #[serde(default)]
    pub instances: u32,
    /// Further instances that may be started.
    #[serde(default)]
    pub free_instances: Option<u32>,
    /// CPUs after over-commit.
    #[serde(default)]
    pub cpus: Option<f64>,
    /// Free CPUs after over-commit.
    #[serde(default)]
    pub free_cpus: Option<f64>,
    /// Bytes of memory after over-commit.
    #[serde(default)]
    pub memory_bytes: Option<u64>,
    /// Free bytes of memory after over-commit.
    #[serde(default)]
    pub free_memory_bytes: Option<u64>,
    /// Free shares of GPUs. Absent: unknown; 0 also where there is no GPU.
    #[serde(default)]
    pub free_gpu_slots: Option<u32>,
    /// Free parallel hardware encodes. Absent: unknown or none, streams are encoded in software.
    #[serde(default)]
    pub free_encoder_slots: Option<u32>,
}

/// States of sessions as an agent sees them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SessionsReport {
    /// [`crate::PROTOCOL_VERSION`].
    pub version: u32,
    /// Who reports.
    pub agent_id: AgentId,
    /// Cluster behind it.
    pub cluster_id: String,
    /// Whether `sessions`, together with the other parts of the series, is everything the agent knows (after a sync
    /// with AMS), so that a session of this agent that is missing there has no instance.
    pub complete: bool,
    /// Which complete report this is a part of; another number with each.
    #[serde(default)]
    pub series: u64,
    /// Which part this is, from 0.
    #[serde(default)]
    pub part: u32,
    /// How many parts the series has; 0 counts as 1.
    #[serde(default)]
    pub parts: u32,
    /// States, in any order.
    pub sessions: Vec<SessionReport>,
}

/// State of one session as its agent sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SessionReport {
    /// Which.
    pub session_id: SessionId,
    /// Its instance, once there is one.
    #[serde(default)]
    pub instance_id: Option<InstanceId>,
    /// How far the instance is.
    pub state: InstanceState,
    /// Text of a failure or of the end.
    #[serde(default)]
    pub message: Option<String>,
    /// Whether the streamer is connected to the agent now.
    #[serde(default)]
    pub streamer_connected: bool,
    /// Who has the stream.
    #[serde(default)]
    pub client: Option<ClientStatus>,
    /// Unix seconds since when no client is connected.
    #[serde(default)]
    pub idle_since: Option<i64>,
    /// Steps of the connect funnel since the last report; each is sent once, for logs and metrics.
    #[serde(default)]
    pub steps: Vec<FunnelStep>,
}

/// How far the instance of a session is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InstanceState {
    /// Accepted, AMS is being asked.
    Launching,
    /// AMS has the instance, it is not running yet.
    Starting,
    /// Running.
    Running,
    /// Being stopped or deleted.
    Ending,
    /// Ended gracefully; the instance may still be there.
    Stopped,
    /// Failed; `message` says why, the instance is kept for its logs.
    Failed,
    /// There is no such instance (any more).
    Gone,
}

/// What the gateway asks of an agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum AgentRequest {
    /// Take this session: answer at once, launch behind it. The same session again is the same launch.
    Accept(Launch),
    /// TURN credentials for another client of the session.
    Credentials {
        /// Which.
        session_id: SessionId,
    },
    /// Stop and delete the instance of the session; repeated until a report says `Gone`.
    End {
        /// Which.
        session_id: SessionId,
        /// Shown to a connected client.
        message: String,
        /// Skip the graceful stop.
        #[serde(default)]
        force: bool,
    },
}

/// A session to launch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Launch {
    /// Which.
    pub session_id: SessionId,
    /// Counts launches of the session; AMS fences off older ones.
    pub attempt: u32,
    /// Application name.
    pub app: String,
    /// Absent: latest published.
    #[serde(default)]
    pub app_version: Option<u32>,
    /// Display.
    pub screen: Screen,
    /// Whether the instance outlives its client.
    pub joinable: bool,
    /// Whether the record goes when the instance ends.
    pub ephemeral: bool,
    /// Minutes without a client; 0 = never.
    pub idle_time_min: u32,
    /// The caller's data.
    #[serde(default)]
    pub extra_data: Value,
}

/// An agent's answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum AgentResponse {
    /// To `Accept` and `Credentials`.
    Accepted {
        /// ICE servers for the client.
        stun_servers: Vec<StunServer>,
    },
    /// To `End`: how far the instance is now.
    Ending {
        /// `Gone` when there is nothing to end.
        state: InstanceState,
    },
    /// Not possible.
    Refused {
        /// Stable, e.g. `unknown-application`, `no-capacity`, `ams-unreachable`, `leaving`.
        code: String,
        /// For people.
        message: String,
    },
}

/// What an agent asks of the gateway.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum GatewayRequest {
    /// AMS launches an instance with streaming and wants a session for it. Idempotent by `instance_id`.
    CreateSession {
        /// Who asks.
        agent_id: AgentId,
        /// Region of the agent.
        region: String,
        /// Cluster of the agent.
        cluster_id: String,
        /// The instance to be.
        instance_id: InstanceId,
        /// Application name; empty for raw instances.
        app: String,
        /// Display.
        screen: Screen,
    },
    /// The instance is gone: end the session.
    EndSession {
        /// Which.
        session_id: SessionId,
    },
    /// Somebody who may change the instance gives a way into its session away.
    CreateShare {
        /// Who asks: the session must be one of this agent's.
        agent_id: AgentId,
        /// Of which.
        session_id: SessionId,
        /// As at the gateway's own API.
        share: SharePost,
    },
    /// Changes a share of a session.
    UpdateShare {
        /// Who asks.
        agent_id: AgentId,
        /// Of which.
        session_id: SessionId,
        /// Which.
        share_id: ShareId,
        /// As at the gateway's own API.
        patch: SharePatch,
    },
    /// Takes a share of a session away.
    DeleteShare {
        /// Who asks.
        agent_id: AgentId,
        /// Of which.
        session_id: SessionId,
        /// Which.
        share_id: ShareId,
    },
}

/// The gateway's answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum GatewayResponse {
    /// To `CreateSession`.
    Created {
        /// The new session.
        session_id: SessionId,
        /// As stored.
        joinable: bool,
        /// As stored.
        idle_time_min: u32,
    },
    /// To `EndSession` and `DeleteShare`.
    Ended,
    /// To `CreateShare` and `UpdateShare`.
    Shared {
        /// As it is now.
        share: ShareCreated,
    },
    /// Not possible.
    Refused {
        /// Stable.
        code: String,
        /// For people.
        message: String,
        /// What the gateway's API would answer; absent: a conflict.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        status: Option<u16>,
    },
}

/// Body of the agent's `POST /internal/1.0/sessions` (AMS first; mutual TLS).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentSessionsPost {
    /// The instance to be.
    pub instance_id: InstanceId,
    /// Application name; empty for raw instances.
    #[serde(default)]
    pub app: String,
    /// Display.
    pub display: Screen,
}

/// Its answer (`metadata`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AgentSessionCreated {
    /// For the guest file; `streaming.session_id` is the session.
    pub streaming: Streaming,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dot_in_an_id_adds_no_subject_token() {
        let agent: AgentId = "eu.west:1".parse().expect("valid");
        assert_eq!(agent_requests(&agent), "agents.eu~west:1.requests");
    }

    #[test]
    fn messages_of_another_version_with_new_fields_are_understood() {
        let text = r#"{"type":"end","session_id":"s1","message":"bye","colour":"red"}"#;
        let request: AgentRequest = serde_json::from_str(text).expect("unknown fields are ignored");
        assert!(matches!(request, AgentRequest::End { force: false, .. }));
    }
}
