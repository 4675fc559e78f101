//! What runs instances. Small on purpose: what should be is decided above, this makes it so and says what is.

mod process;
mod simulated;

use std::{path::PathBuf, time::Duration};

use async_trait::async_trait;
use fanlight_api::{InstanceId, guest::Guest};
use tokio::sync::broadcast;

pub use process::{ProcessConfig, ProcessEngine};
pub use simulated::{Script, SimulatedEngine};

use crate::core::life::Seen;

/// Everything needed to make an instance.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Which, and what the streamer in it gets.
    pub guest: Guest,
    /// Folder of the application's package.
    pub package: Option<PathBuf>,
}

impl Spec {
    /// Which.
    pub fn id(&self) -> &InstanceId {
        &self.guest.instance_id
    }
}

/// The engine could not do something.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// Nothing is there under this id.
    #[error("instance {0} is not there")]
    Absent(InstanceId),
    /// No such log.
    #[error("log {0} not found")]
    NoLog(String),
    /// Instances cannot be kept apart on this machine.
    #[error("instances cannot be isolated: {0}")]
    NotIsolated(String),
    /// A program that is needed.
    #[error("the program {} is missing: {advice}", path.display())]
    MissingProgram {
        /// Where it should be.
        path: PathBuf,
        /// What to do.
        advice: &'static str,
    },
    /// Every user id of the configured range is taken.
    #[error("no user id is left of the {0} that instances may have")]
    NoUserId(u32),
    /// The shim did not come up.
    #[error("the shim of the instance did not start: {0}")]
    Shim(String),
    /// The disk has no room.
    #[error("{doing}: no space left on the disk of {}", path.display())]
    DiskFull {
        /// What was tried.
        doing: &'static str,
        /// Where.
        path: PathBuf,
    },
    /// Files.
    #[error("{doing} {}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

impl EngineError {
    /// An error of the file system, with a full disk told apart.
    pub(crate) fn io(doing: &'static str, path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        let path = path.into();
        match source.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                Self::DiskFull { doing, path }
            }
            _ => Self::Io { doing, path, source },
        }
    }
}

/// Runs instances. Every call can be repeated: doing what is done already is no error.
#[async_trait]
pub trait Engine: Send + Sync + 'static {
    /// Makes the files of an instance; nothing runs yet. Again: the guest file is written anew.
    ///
    /// # Errors
    /// The files cannot be made.
    async fn create(&self, spec: &Spec) -> Result<(), EngineError>;

    /// Starts a run. The same run again, or an older one, changes nothing.
    ///
    /// # Errors
    /// There is no such instance, or nothing could be started.
    async fn start(&self, id: &InstanceId, run: u32) -> Result<(), EngineError>;

    /// Asks the run to end, and kills it after `grace`. Returns at once; nothing to end is fine.
    async fn stop(&self, id: &InstanceId, grace: Duration);

    /// Ends what runs and removes everything of the instance, logs included. Nothing there is fine.
    ///
    /// # Errors
    /// Files are left.
    async fn delete(&self, id: &InstanceId) -> Result<(), EngineError>;

    /// How far an instance is.
    async fn seen(&self, id: &InstanceId) -> Seen;

    /// What the streamer of an instance says that it does; empty: nothing.
    async fn status(&self, id: &InstanceId) -> String;

    /// Everything that is there, whether somebody knows of it or not.
    ///
    /// # Errors
    /// The engine cannot be asked.
    async fn list(&self) -> Result<Vec<InstanceId>, EngineError>;

    /// Names of the logs of an instance.
    async fn logs(&self, id: &InstanceId) -> Vec<String>;

    /// A log, from its beginning, bounded by the engine.
    ///
    /// # Errors
    /// There is no such log.
    async fn read_log(&self, id: &InstanceId, name: &str) -> Result<Vec<u8>, EngineError>;

    /// Instances whose state changed; who lags misses some and looks at all.
    fn changes(&self) -> broadcast::Receiver<InstanceId>;
}
