//! What runs instances. Small on purpose: what should be is decided above, this makes it so and says what is.

mod cgroup;
mod lxd;
mod process;
mod simulated;

mod enter;
mod exec;

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use async_trait::async_trait;
use fanlight_api::{InstanceId, NodeId, ams::Service, guest::Guest};
use tokio::sync::broadcast;

pub use cgroup::{Bounds, Group, Groups};
pub use exec::{Control, Exec, Running};

pub use lxd::LxdEngine;
pub use process::{Bounding, ProcessConfig, ProcessEngine};
pub use simulated::{Script, SimulatedEngine};

use crate::core::{life::Seen, placement::Share};

/// Everything needed to make an instance.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Which, and what the streamer in it gets.
    pub guest: Guest,
    /// Folder of the application's package.
    pub package: Option<PathBuf>,
    /// Where it goes.
    pub node: NodeId,
    /// SHA-256 of the image it is made of; none: the programs of the machine itself.
    pub image: Option<String>,
    /// What it may take, and its place on the node.
    pub share: Share,
    /// Most bytes of its disk; 0: no bound.
    pub disk_bytes: u64,
    /// Ports that are reached through the node.
    pub services: Vec<Service>,
    /// Where clients reach its node; none: where the engine says.
    pub public_address: Option<IpAddr>,
    /// A helper in which an application is made: nothing is run but what is asked for with [`Engine::exec`].
    pub base: bool,
    /// The instance whose files it begins with.
    pub copy_of: Option<InstanceId>,
    /// Whose hooks run before those of the application, in order.
    pub addons: Vec<SpecAddon>,
}

/// An addon of an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpecAddon {
    /// Its name, which is that of its folder in the instance.
    pub name: String,
    /// How long one of its hooks may take, seconds.
    pub hook_time_s: u64,
    /// What is to be put into the instance; none: it is in the image.
    pub package: Option<PathBuf>,
}

/// A machine as its engine sees it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Machine {
    /// Unique name.
    pub name: String,
    /// Where it is.
    pub address: String,
    /// Takes instances.
    pub online: bool,
    /// Was emptied by an operator and takes none until it is brought back.
    pub evacuated: bool,
    /// What is wrong, for people.
    pub message: String,
    /// Leads the engine's database.
    pub leader: bool,
    /// `x86_64`, `aarch64`.
    pub architecture: String,
    /// CPUs there are.
    pub cpus: u32,
    /// Bytes there are.
    pub memory_bytes: u64,
    /// Bytes of the disk for instances, and how many are free; none: not known.
    pub disk: Option<(u64, u64)>,
    /// Name of that disk.
    pub storage_pool: String,
    /// GPUs there are.
    pub gpus: Vec<MachineGpu>,
    /// How many addresses and ports there are for instances.
    pub places: u32,
}

/// A GPU of a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MachineGpu {
    /// `amd`, `intel`, `nvidia`.
    pub kind: String,
    /// On the bus.
    pub pci_address: String,
    /// `renderD128`; empty: none.
    pub render_name: String,
    /// Where it is in the machine.
    pub numa_node: u32,
}

/// A machine to be added, as asked for.
#[derive(Clone, Debug, Default)]
pub struct MachineJoin {
    /// Unique name.
    pub name: String,
    /// Where its engine answers.
    pub address: String,
    /// Password or token that lets us in.
    pub secret: fanlight_api::Secret,
    /// It is a member of the cluster already.
    pub unmanaged: bool,
    /// Block device or pool for its instances; empty: the engine's default.
    pub storage: String,
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
    /// Something that this engine does not have.
    #[error("{0} not supported: {1}")]
    Unsupported(&'static str, &'static str),
    /// Bounds are required, and this machine does not have them.
    #[error("instances cannot be kept to what they ask for, and engine.bounds requires it: {0}")]
    Unbounded(String),
    /// Programs can be run in a started instance only.
    #[error("instance {0} is not running")]
    NotRunning(InstanceId),
    /// The engine refused, or could not be asked.
    #[error("{doing}: {reason}")]
    Refused {
        /// What was tried.
        doing: &'static str,
        /// What it said.
        reason: String,
    },
    /// The engine does not answer now.
    #[error("{doing}: the engine does not answer: {reason}")]
    Away {
        /// What was tried.
        doing: &'static str,
        /// Why not.
        reason: String,
    },
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
    /// Whether all units of AMS see the same instances through it.
    fn is_shared(&self) -> bool {
        false
    }

    /// Whether instances are made of images; otherwise of the programs of the machine.
    fn has_images(&self) -> bool {
        false
    }

    /// The machines there are.
    ///
    /// # Errors
    /// The engine cannot be asked.
    async fn machines(&self) -> Result<Vec<Machine>, EngineError>;

    /// Takes a machine in.
    ///
    /// # Errors
    /// It cannot be reached, it refuses, or this engine has one machine only.
    async fn add_machine(&self, _join: &MachineJoin) -> Result<(), EngineError> {
        Err(EngineError::Unsupported("adding nodes", "instances run on this machine alone"))
    }

    /// Lets a machine go. Not there is fine.
    ///
    /// # Errors
    /// It cannot be reached, or this engine has one machine only.
    async fn remove_machine(&self, _name: &str, _force: bool) -> Result<(), EngineError> {
        Err(EngineError::Unsupported("removing nodes", "instances run on this machine alone"))
    }

    /// Takes an image in. There already is fine.
    ///
    /// # Errors
    /// It is damaged, or there is no room.
    async fn import_image(&self, _sha256: &str, _file: &Path) -> Result<(), EngineError> {
        Err(EngineError::Unsupported("images", "instances run the programs of this machine"))
    }

    /// Removes an image. Not there is fine.
    ///
    /// # Errors
    /// The engine cannot be asked.
    async fn delete_image(&self, _sha256: &str) -> Result<(), EngineError> {
        Ok(())
    }

    /// Makes an image of a stopped instance, and gives its SHA-256.
    ///
    /// # Errors
    /// There is no such instance, it runs, or there is no room.
    async fn publish(&self, _id: &InstanceId) -> Result<String, EngineError> {
        Err(EngineError::Unsupported("images", "instances run the programs of this machine"))
    }

    /// Where a started instance is reached from its node; none: not known, or the node's own.
    async fn address(&self, _id: &InstanceId) -> Option<IpAddr> {
        None
    }

    /// Runs a program in an instance that was started.
    ///
    /// # Errors
    /// It does not run, or there is no such program.
    async fn exec(&self, _id: &InstanceId, _exec: Exec) -> Result<Running, EngineError> {
        Err(EngineError::Unsupported("exec", "this engine has no way into instances"))
    }

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
