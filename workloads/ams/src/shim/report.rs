//! What a shim and AMS tell each other: files in the folder of the instance, and JSON lines on its socket.

use std::{collections::BTreeMap, io, path::Path};

use serde::{Deserialize, Serialize};

use crate::{core::life::Phase, engine::Group, processes::Identity};

/// Written by AMS before it starts a shim.
pub const LAUNCH_FILE: &str = "launch.json";
/// Fed to the streamer; mode 0600.
pub const GUEST_FILE: &str = "guest.json";
/// Written by the shim on every change.
pub const STATE_FILE: &str = "state.json";
/// Where the shim answers.
pub const SOCKET: &str = "shim.sock";
/// Held by the shim while it lives.
pub const LOCK_FILE: &str = "lock";
/// Folder of the notify socket.
pub const NOTIFY_FOLDER: &str = "notify";
/// The notify socket in it.
pub const NOTIFY_SOCKET: &str = "notify";
/// Logs that the shim writes.
pub const LOGS: &str = "logs";
/// Logs that are written inside of the instance. Nothing in there is to be trusted, links least of all.
pub const GUEST_LOGS: &str = "guest-logs";

/// What to run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Launch {
    /// [`fanlight_api::PROTOCOL_VERSION`] of the writer.
    pub version: u32,
    /// Number of the run.
    pub run: u32,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Its whole environment.
    pub environment: BTreeMap<String, String>,
    /// Most processes of the instance's user; none: no bound.
    #[serde(default)]
    pub processes: Option<u64>,
    /// Keeps the run to what it may take; none: nothing does.
    #[serde(default)]
    pub group: Option<Group>,
}

/// The whole state of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// [`fanlight_api::PROTOCOL_VERSION`] of the writer.
    pub version: u32,
    /// Number of the run.
    pub run: u32,
    /// The shim.
    pub shim: Identity,
    /// The outermost process of the run, once it was started.
    #[serde(default)]
    pub sandbox: Option<Identity>,
    /// How far the run is.
    pub phase: Phase,
    /// What the streamer says it does.
    #[serde(default)]
    pub status: String,
}

/// From AMS to the shim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Command {
    /// End gracefully, and by force when that takes longer.
    Stop {
        /// Seconds.
        grace_s: u64,
    },
    /// End now.
    Kill,
}

/// Reads a JSON file; none when it is not there.
pub fn read<T: for<'de> Deserialize<'de>>(path: &Path) -> io::Result<Option<T>> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {error}", path.display())))
}

/// Writes a JSON file of mode 0600 as a whole and makes it last: a crash leaves the old one or the new one.
pub fn write<T: Serialize>(path: &Path, value: &T) -> io::Result<()> {
    use std::{io::Write as _, os::unix::fs::OpenOptionsExt as _};
    let temporary = path.with_extension("new");
    let bytes = serde_json::to_vec(value)?;
    let mut file =
        std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(&bytes)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
    if let Some(folder) = path.parent() {
        std::fs::File::open(folder)?.sync_all()?;
    }
    Ok(())
}
