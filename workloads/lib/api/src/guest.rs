//! What an instance gets at creation, and what it reports back.
//!
//! The guest file is one JSON document. For the process engine the shim feeds it to the streamer on standard
//! input, so that no path inside the instance ever holds the token; for containers it is a file of mode 0600.
//! Beside it lies the order of the run, and the supervisor inside the container answers with the state of the run;
//! [`conclude`] is the one judgement of how a run ended, for both engines.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

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
    /// The instance waits in a pool until it is claimed: how much of it runs until then. Absent in a claim.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<PoolStart>,
    /// The instance stays when its application ends, so that it can be looked into.
    #[serde(default)]
    pub devmode: bool,
}

/// How much of an instance runs while it waits in the pool of its application.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum PoolStart {
    /// Display, sound and encoder; the application starts with the claim and gets the caller's data.
    #[default]
    Streamer,
    /// The application too, so that only callers without data of their own can have it.
    Application,
}

/// What the streamer of an instance of a pool answers to a claim: one line of JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClaimAnswer {
    /// The instance has the session of the claim, from this claim or from the same one before.
    pub ok: bool,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The streamer could not be asked now: the same claim may do later.
    #[serde(default)]
    pub again: bool,
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
    /// Longest time of one of its hooks, seconds; absent: as whoever runs them says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hook_time_s: Option<u64>,
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

/// Folder inside a container for what AMS and the container tell each other. Only root may look into it.
pub const GUEST_DIR: &str = "/var/lib/fanlight";
/// The [`Guest`], written by AMS before each start, mode 0600.
pub const GUEST_FILE: &str = "guest.json";
/// The [`GuestRun`], written by AMS before each start, mode 0600.
pub const RUN_FILE: &str = "run.json";
/// The [`GuestState`], written by the supervisor on every change.
pub const STATE_FILE: &str = "state.json";

/// The order to run: the file beside the guest file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestRun {
    /// [`crate::PROTOCOL_VERSION`] of the writer.
    pub version: u32,
    /// Number of the run, which grows with every start.
    pub run: u32,
    /// Added to the environment of the streamer.
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
    /// Longest time of one hook, seconds.
    #[serde(default = "hook_time")]
    pub hook_time_s: u64,
    /// Whether the hooks of the application are run.
    #[serde(default)]
    pub hooks: bool,
    /// Addons below [`ADDONS`], whose hooks run before those of the application, in this order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addons: Vec<GuestAddon>,
}

/// Folder of [`GUEST_DIR`] with a folder for each addon.
pub const ADDONS: &str = "addons";

/// An addon whose hooks are run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestAddon {
    /// Its name, which is that of its folder.
    pub name: String,
    /// Longest time of one of its hooks, seconds.
    #[serde(default = "hook_time")]
    pub hook_time_s: u64,
}

fn hook_time() -> u64 {
    900
}

/// How far the run inside a container is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestState {
    /// [`crate::PROTOCOL_VERSION`] of the writer.
    pub version: u32,
    /// Number of the run.
    pub run: u32,
    /// How far it is.
    pub phase: GuestPhase,
    /// What the streamer says it does.
    #[serde(default)]
    pub status: String,
}

/// Steps of a run inside a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuestPhase {
    /// Under way.
    Starting,
    /// The application can be used.
    Ready,
    /// Asked to end.
    Stopping,
    /// Over; the container powers itself off.
    Ended(Ended),
}

/// Why the run ended, from the exit status, whether it was stopped (and if so whether it had been asked before it was
/// killed), and what the streamer said itself.
pub fn conclude(
    status: std::io::Result<std::process::ExitStatus>,
    stopped: Option<bool>,
    said: Option<Ended>,
) -> Ended {
    use std::os::unix::process::ExitStatusExt as _;
    let failed = |message: String| Ended { reason: EndReason::Failed, message };
    let status = match status {
        Ok(status) => status,
        Err(error) => return failed(format!("waiting for the streamer: {error}")),
    };
    match said {
        Some(said) if stopped.is_some() && said.reason.is_graceful() => {
            Ended { reason: EndReason::Stopped, ..said }
        }
        Some(said) if stopped.is_none() && said.reason.is_graceful() == status.success() => said,
        // What failed while it was stopped is stopped; what says it is fine and then crashes is not.
        _ if stopped.is_some() => Ended {
            reason: EndReason::Stopped,
            message: match status.signal() {
                Some(9) if stopped == Some(true) => "killed, because it did not stop in time".into(),
                Some(9) => "killed".into(),
                _ => "stopped".into(),
            },
        },
        _ => match (status.code(), status.signal()) {
            (Some(0), _) => Ended { reason: EndReason::Finished, message: "finished".into() },
            (Some(EXIT_BAD_GUEST), _) => {
                failed("the streamer cannot use its guest file; streamer.log says why".into())
            }
            (Some(code), _) if code > 128 => {
                failed(format!("the streamer was ended by signal {}; streamer.log may say more", code - 128))
            }
            (Some(code), _) => {
                failed(format!("the streamer ended with status {code}; streamer.log may say why"))
            }
            (None, signal) => failed(format!("the run was ended by signal {}", signal.unwrap_or_default())),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;

    use super::*;

    #[test]
    fn the_end_of_a_run_is_told_from_its_exit_its_words_and_what_was_asked() {
        let code = |code: i32| std::process::ExitStatus::from_raw(code << 8);
        let signal = std::process::ExitStatus::from_raw;
        let said = |reason| Some(Ended { reason, message: "said".into() });
        use EndReason as E;
        for (status, stopped, said, reason, text) in [
            (code(0), None, said(E::Idle), E::Idle, "said"),
            (code(0), None, None, E::Finished, "finished"),
            (code(0), Some(true), None, E::Stopped, "stopped"),
            (code(0), Some(true), said(E::Stopped), E::Stopped, "said"),
            (signal(9), Some(true), None, E::Stopped, "did not stop in time"),
            (signal(9), Some(false), None, E::Stopped, "killed"),
            (code(70), Some(true), said(E::Failed), E::Stopped, "stopped"),
            (code(70), None, said(E::Failed), E::Failed, "said"),
            (code(70), None, None, E::Failed, "status 70"),
            (code(78), None, None, E::Failed, "guest file"),
            (code(139), None, None, E::Failed, "signal 11"),
            (signal(9), None, None, E::Failed, "signal 9"),
            (code(139), None, said(E::Finished), E::Failed, "signal 11"),
            (code(0), None, said(E::Failed), E::Finished, "finished"),
        ] {
            let ended = conclude(Ok(status), stopped, said);
            assert!(
                ended.reason == reason && ended.message.contains(text),
                "{status:?} {stopped:?}: {ended:?}"
            );
        }
    }

    #[test]
    fn an_order_to_run_needs_only_its_version_and_number() {
        let run: GuestRun = serde_json::from_str(r#"{"version":1,"run":3,"later":true}"#).expect("enough");
        assert_eq!((run.run, run.hook_time_s, run.hooks), (3, 900, false));
        let state = GuestState { version: 1, run: 3, phase: GuestPhase::Ready, status: String::new() };
        let text = serde_json::to_string(&state).expect("JSON");
        assert_eq!(text, r#"{"version":1,"run":3,"phase":"ready","status":""}"#);
    }
}
