//! Bodies of the gateway's REST API (gateway-api sections 5 and 6).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use crate::{SessionId, ShareId};

/// Size, rate and density of a display (gateway-api section 5.1). All sides in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Screen {
    /// 1 to 3840, rounded up to even.
    pub width: u32,
    /// 1 to 3840 (the shorter side at most 2160), rounded up to even.
    pub height: u32,
    /// Frames per second, 1 to 240.
    pub fps: u32,
    /// Dots per inch, at least 72.
    pub density: u32,
}

impl Default for Screen {
    fn default() -> Self {
        Self { width: 1280, height: 720, fps: 60, density: 240 }
    }
}

/// Why a screen was refused. The text names the field.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScreenError {
    /// A side is outside its range.
    #[error("screen.{field} is {value}: {allowed}")]
    Field {
        /// `width`, `height`, `fps` or `density`.
        field: &'static str,
        /// What was given.
        value: i64,
        /// What is allowed, in words.
        allowed: &'static str,
    },
}

/// A screen as requested: every member optional (gateway-api sections 6.4 and 6.8). Values are wide
/// integers so that absurd numbers get a named error and not a parser's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ScreenPatch {
    /// Pixels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub width: Option<i64>,
    /// Pixels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub height: Option<i64>,
    /// Frames per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fps: Option<i64>,
    /// Dots per inch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub density: Option<i64>,
}

impl ScreenPatch {
    /// The screen that results when the members given replace those of `current`.
    ///
    /// # Errors
    /// Names the first member that is out of range.
    pub fn apply(&self, current: Screen) -> Result<Screen, ScreenError> {
        let member = |field, value: Option<i64>, current: u32, low: i64, high: i64, allowed| match value {
            None => Ok(current),
            Some(value) if (low..=high).contains(&value) => Ok(value as u32),
            Some(value) => Err(ScreenError::Field { field, value, allowed }),
        };
        let side = "1 to 3840 pixels are allowed, and at most 2160 on the shorter side";
        let screen = Screen {
            width: member("width", self.width, current.width, 1, 3840, side)?.next_multiple_of(2),
            height: member("height", self.height, current.height, 1, 3840, side)?.next_multiple_of(2),
            fps: member("fps", self.fps, current.fps, 1, 240, "1 to 240 frames per second are allowed")?,
            density: member(
                "density",
                self.density,
                current.density,
                72,
                1200,
                "72 to 1200 dots per inch are allowed",
            )?,
        };
        if screen.width.min(screen.height) > 2160 {
            let (field, value) = if screen.width < screen.height {
                ("width", screen.width)
            } else {
                ("height", screen.height)
            };
            return Err(ScreenError::Field { field, value: value.into(), allowed: side });
        }
        Ok(screen)
    }
}

/// One ICE server entry (gateway-api section 5.2). URLs are `stun:`, `turn:` or `turns:`; entries with a
/// `turn` URL always carry both credentials.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StunServer {
    /// ICE URLs.
    pub urls: Vec<String>,
    /// User of the TURN server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub username: Option<String>,
    /// Password of the TURN server; short-lived, made per session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password: Option<crate::Secret>,
}

/// Life of a session (gateway-api section 7.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum SessionStatus {
    /// The launch was handed to an agent.
    Created,
    /// The instance runs.
    Active,
    /// The instance failed; `status_message` says why.
    Error,
    /// Deletion is in progress.
    Terminating,
    /// Ended gracefully; the record is kept because the session is not ephemeral.
    Terminated,
}

/// A session as shown (gateway-api section 5.3).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Session {
    /// Id.
    pub id: SessionId,
    /// Application name.
    pub app: String,
    /// Where the instance is.
    pub region: String,
    /// Cluster of the instance.
    pub cluster_id: String,
    /// AMS instance id under its old name; empty while there is none.
    pub container_id: String,
    /// Whether another client may come after the first left.
    pub joinable: bool,
    /// State.
    pub status: SessionStatus,
    /// Detail, e.g. the text of a failure.
    pub status_message: String,
}

/// Body of `POST /1.0/sessions`. Unknown members are ignored (gateway-api section 4).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SessionsPost {
    /// Application name; required.
    #[serde(default)]
    pub app: Option<String>,
    /// -1 or absent: latest published; else exact.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub app_version: Option<i64>,
    /// Empty or absent: the gateway picks.
    #[serde(default)]
    pub region: Option<String>,
    /// Default true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ephemeral: Option<bool>,
    /// Default false.
    #[serde(default)]
    pub joinable: Option<bool>,
    /// Minutes without a client before the end; 0 = never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_time_min: Option<i64>,
    /// Any JSON value, handed to the instance.
    #[serde(default)]
    pub extra_data: Value,
    /// Display; absent members get the defaults.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub screen: Option<ScreenPatch>,
    /// Where the client is; our addition. Counts when no round trips are given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub location: Option<Location>,
    /// Address of the client, looked up in the GeoIP database of the gateway when neither round trips nor a
    /// location are given; our addition, for backends that call in the name of a client.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_address: Option<String>,
    /// Milliseconds from the client to each region, by name, as measured to the STUN servers that
    /// `GET /1.0/regions?recursion=true` tells; our addition.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub round_trips: BTreeMap<String, f64>,
}

/// A place on Earth, WGS 84.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Location {
    /// Degrees, -90 to 90.
    pub latitude: f64,
    /// Degrees, -180 to 180.
    pub longitude: f64,
}

/// Answer of `POST /1.0/sessions`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SessionCreated {
    /// Id.
    pub id: SessionId,
    /// Chosen region.
    pub region: String,
    /// As requested.
    pub joinable: bool,
    /// `created`.
    pub status: SessionStatus,
    /// Signalling websocket including its token.
    pub url: String,
    /// Never null.
    pub stun_servers: Vec<StunServer>,
}

/// Body of `POST /1.0/sessions/{id}/join`; may be empty.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct JoinPost {
    /// Changes of the display; absent members stay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub screen: Option<ScreenPatch>,
}

/// Answer of a join.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SessionJoined {
    /// Id (our addition).
    pub id: SessionId,
    /// Signalling websocket including its token.
    pub url: String,
    /// Never null.
    pub stun_servers: Vec<StunServer>,
}

/// An application that can be streamed. Clients of the original read `name` only.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Application {
    /// Name, as used in `POST /1.0/sessions`.
    pub name: String,
    /// What people read; our addition.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub title: String,
    /// One sentence; our addition.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// A `data:` URL of a small picture; our addition.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub icon: String,
}

/// A region with at least one live agent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Region {
    /// Name.
    pub name: String,
    /// STUN URLs by which a client may measure its way there; our addition, with `recursion=true` only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stun_servers: Vec<String>,
    /// Where it is, if its agents say so; our addition, with `recursion=true` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub location: Option<Location>,
}

/// Body of `DELETE /1.0/sessions`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SessionsDelete {
    /// Sessions to end, 1 to 1000.
    pub ids: Vec<String>,
}

/// Answer of `DELETE /1.0/sessions`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SessionsDeleted {
    /// Ended, or being ended when the answer is 202.
    pub deleted_sessions: Vec<String>,
    /// Those that could not be ended.
    pub errors: Vec<SessionError>,
}

/// Why a session of a batch could not be ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SessionError {
    /// Which.
    pub session_id: String,
    /// Why not.
    pub error_message: String,
    /// The HTTP status that a single delete would have had.
    pub status_code: u16,
}

/// Kinds of shares (gateway-api section 8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ShareKind {
    /// Access to the debug bridge of an Android instance.
    Adb,
}

/// Body of `POST /1.0/sessions/{id}/share`. Numbers are wide so that absurd ones get a named error.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SharePost {
    /// `adb`; required.
    #[serde(rename = "type", default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// Free text, at most 1024 characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Unix seconds, at most 30 days ahead; wins over `expiry_min`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expiry_at: Option<i64>,
    /// Minutes from now, at least 1; deprecated. Neither given: 12 hours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expiry_min: Option<i64>,
}

/// A share as listed (gateway-api section 5.4).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ShareBase {
    /// Id.
    pub id: ShareId,
    /// Session that it opens.
    pub session_id: SessionId,
    /// Kind.
    #[serde(rename = "type")]
    pub kind: ShareKind,
    /// Free text.
    pub description: String,
    /// Unix seconds.
    pub created_at: i64,
    /// Unix seconds after which it opens nothing.
    pub expiry_at: i64,
}

/// A share with its pre-signed URL.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Share {
    /// What lists show.
    #[serde(flatten)]
    pub base: ShareBase,
    /// `https://HOST/1.0/sessions/ID/connect?type=adb&token=…`
    pub url: crate::Secret,
}

/// Answer of `POST /1.0/sessions/{id}/share`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ShareCreated {
    /// Id.
    pub id: ShareId,
    /// Kind.
    #[serde(rename = "type")]
    pub kind: ShareKind,
    /// `https://HOST/1.0/sessions/ID/connect?type=adb&token=…`
    pub url: crate::Secret,
    /// Unix seconds after which it opens nothing.
    pub expiry_at: i64,
    /// The same in whole minutes from now.
    pub expiry_min: i64,
}

/// Body of `PATCH /1.0/shares/{id}`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SharePatch {
    /// Replaces the text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Unix seconds, at most 30 days ahead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expiry_at: Option<i64>,
}

/// Answer of `GET /1.0/sessions/{id}/connect`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ShareConnected {
    /// Signalling websocket including its token.
    pub url: crate::Secret,
    /// Never null.
    pub stun_servers: Vec<StunServer>,
}

/// Answer of `GET /1.0/config`: every item by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ConfigItems {
    /// Values as texts.
    pub config: BTreeMap<String, String>,
}

/// Body of `PATCH /1.0/config`: one item.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ConfigPatch {
    /// Name of the item.
    pub name: String,
    /// Its new value as a text; empty: the default again.
    pub value: String,
}

/// Outcome of one step of a diagnosis.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum CheckStatus {
    /// As it should be.
    Ok,
    /// Was not looked at, because an earlier step failed or it does not apply.
    Skipped,
    /// Streams will work, but not as well as they could.
    Warning,
    /// Streams will not work.
    Failed,
}

/// One step of a diagnosis.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Check {
    /// Stable name, e.g. `agents`.
    pub step: String,
    /// Outcome.
    pub status: CheckStatus,
    /// What was seen.
    pub text: String,
    /// What to do about it; empty when there is nothing to do.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub advice: String,
}

/// Answer of `GET /1.0/doctor`: what the gateway sees of the path that a stream takes; our addition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Diagnosis {
    /// The gateway's clock, Unix milliseconds.
    pub time_ms: i64,
    /// Steps in their order.
    pub checks: Vec<Check>,
    /// ICE servers per region, with short-lived credentials to try them.
    pub stun_servers: BTreeMap<String, Vec<StunServer>>,
}

/// Answer of `GET /1.0/status`; the counts only for callers with a valid API token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ServiceStatus {
    /// `healthy` or `unhealthy`.
    pub status: String,
    /// Live agents.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agents: Option<u64>,
    /// Members of the store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub database_nodes: Option<u64>,
}

/// Body of `POST /1.0/accounts` on the gateway's internal socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AccountsPost {
    /// 1 to 255 characters of `A-Z a-z 0-9 - _ : .`
    pub name: String,
    /// Unix seconds after which the token is refused; absent: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expiry_at: Option<i64>,
    /// What the account may do.
    #[serde(default)]
    pub rights: AccountRights,
}

/// What an account may do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum AccountRights {
    /// Everything.
    #[default]
    Full,
    /// List applications and regions; create, list, join and delete its own sessions. Used by the page.
    Launch,
}

/// An account as listed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Account {
    /// Name.
    pub name: String,
    /// Rights.
    pub rights: AccountRights,
    /// Unix seconds.
    pub created_at: i64,
    /// Unix seconds; absent: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expiry_at: Option<i64>,
}

/// Answer of `POST /1.0/accounts`; the only time the token is shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AccountCreated {
    /// Name.
    pub name: String,
    /// API token (gateway-api section 2.2).
    pub token: crate::Secret,
}

/// Answer of `POST /1.0/ui/codes` on the internal socket: a one-time code for the page.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LoginCode {
    /// Goes into the URL fragment `#code=`.
    pub code: crate::Secret,
    /// Unix seconds.
    pub expires_at: i64,
}

/// Body of `POST /ui/login`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LoginPost {
    /// The one-time code.
    pub code: crate::Secret,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn screens_are_rounded_up_to_even_and_absurd_ones_are_named() {
        let patch = |width, height| ScreenPatch { width, height, ..Default::default() };
        let ok = patch(Some(1279), Some(719)).apply(Screen::default()).expect("in range");
        assert_eq!((ok.width, ok.height), (1280, 720));
        assert!(patch(Some(2160), Some(3840)).apply(Screen::default()).is_ok());
        for (bad, field) in [
            (patch(Some(0), None), "width"),
            (patch(Some(-5), None), "width"),
            (patch(Some(i64::MAX), None), "width"),
            (patch(None, Some(3841)), "height"),
            (patch(Some(3840), Some(2400)), "height"),
        ] {
            let error = bad.apply(Screen::default()).expect_err("out of range").to_string();
            assert!(error.contains(field), "{error}");
        }
        let fps = ScreenPatch { fps: Some(0), ..Default::default() };
        assert!(fps.apply(Screen::default()).expect_err("zero").to_string().contains("screen.fps"));
        let density = ScreenPatch { density: Some(10), ..Default::default() };
        assert!(density.apply(Screen::default()).expect_err("low").to_string().contains("screen.density"));
    }
}
