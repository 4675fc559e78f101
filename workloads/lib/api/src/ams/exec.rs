//! Programs in running instances (ams-api section 5).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::nullable;
use crate::Secret;

/// Body of `POST /1.0/instances/{id}/exec`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct ExecPost {
    /// Program and arguments; no shell.
    #[serde(deserialize_with = "nullable")]
    pub command: Vec<String>,
    /// Added to the environment.
    #[serde(deserialize_with = "nullable")]
    pub environment: BTreeMap<String, String>,
    /// With a terminal.
    #[serde(deserialize_with = "nullable")]
    pub interactive: bool,
    /// Columns of the terminal; 0 = 80.
    #[serde(deserialize_with = "nullable")]
    pub width: u16,
    /// Rows of the terminal; 0 = 24.
    #[serde(deserialize_with = "nullable")]
    pub height: u16,
}

/// Metadata of the operation of an exec, as answered to who began it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ExecFds {
    /// `0`, `1`, `2` and `control` → the secret that opens the websocket, once.
    pub fds: BTreeMap<String, Secret>,
}

/// One text frame on the control websocket.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ExecControl {
    /// `window-resize` or `signal`.
    pub command: String,
    /// `width` and `height` as texts.
    #[serde(deserialize_with = "nullable")]
    pub args: BTreeMap<String, String>,
    /// Number of the signal.
    #[serde(deserialize_with = "nullable")]
    pub signal: i32,
}
