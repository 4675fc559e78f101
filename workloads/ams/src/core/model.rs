//! Records of AMS as they lie in the store, and their keys.

use std::{cmp::Ordering, collections::BTreeMap};

use fanlight_api::{
    ApplicationId, InstanceId, NodeId, OperationId, SessionId,
    ams::{self, InstanceConfig, InstanceStatus, Operation, Pool, PoolPatch, PoolState, Resources},
    gateway::Screen,
    guest::{GuestApplication, PoolStart, Streaming},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::placement::{Encoder, Share};
use crate::{manifest, size};

/// Keys of the records.
pub mod key {
    use fanlight_api::{ApplicationId, InstanceId, NodeId, OperationId};

    /// Prefix of [`instance`].
    pub const INSTANCES: &str = "ams/instances/";
    /// Prefix of [`application`].
    pub const APPLICATIONS: &str = "ams/applications/";
    /// Prefix of [`operation`].
    pub const OPERATIONS: &str = "ams/operations/";
    /// Prefix of [`certificate`].
    pub const CERTIFICATES: &str = "ams/certificates/";
    /// Prefix of [`launch`].
    pub const LAUNCHES: &str = "ams/launches/";
    /// Prefix of the keys of units that are there; each goes with the lease of its unit.
    pub const UNITS: &str = "ams/units/";
    /// Prefix of [`node`].
    pub const NODES: &str = "ams/nodes/";
    /// Prefix of [`image`].
    pub const IMAGES: &str = "ams/images/";
    /// Id of the image that is taken where none is named.
    pub const DEFAULT_IMAGE: &str = "ams/default-image";
    /// Prefix of [`addon`].
    pub const ADDONS: &str = "ams/addons/";
    /// Identity of the cluster.
    pub const CLUSTER: &str = "ams/cluster";

    /// [`super::InstanceRecord`].
    pub fn instance(id: &InstanceId) -> String {
        format!("{INSTANCES}{id}")
    }

    /// Id of the instance with this name.
    pub fn instance_name(name: &str) -> String {
        format!("ams/instance-names/{name}")
    }

    /// [`super::ApplicationRecord`].
    pub fn application(id: &ApplicationId) -> String {
        format!("{APPLICATIONS}{id}")
    }

    /// Id of the application with this name.
    pub fn application_name(name: &str) -> String {
        format!("ams/application-names/{name}")
    }

    /// [`super::OperationRecord`].
    pub fn operation(id: &OperationId) -> String {
        format!("{OPERATIONS}{id}")
    }

    /// [`crate::core::placement::Allocations`].
    pub fn allocations(node: &NodeId) -> String {
        format!("ams/allocations/{node}")
    }

    /// [`super::NodeRecord`].
    pub fn node(name: &str) -> String {
        format!("{NODES}{name}")
    }

    /// [`super::ImageRecord`].
    pub fn image(id: &str) -> String {
        format!("{IMAGES}{id}")
    }

    /// Id of the image with this name.
    pub fn image_name(name: &str) -> String {
        format!("ams/image-names/{name}")
    }

    /// [`super::AddonRecord`]. The name comes from a caller and has letters, digits, `-`, `_` and `.` only.
    pub fn addon(name: &str) -> String {
        format!("{ADDONS}{name}")
    }

    /// [`super::CertificateRecord`].
    pub fn certificate(fingerprint: &str) -> String {
        format!("{CERTIFICATES}{fingerprint}")
    }

    /// [`super::LaunchRecord`]. The scope comes from a caller, so it is written in hex.
    pub fn launch(scope: &str) -> String {
        format!("{LAUNCHES}{}", hex::encode(scope))
    }
}

/// Who this cluster is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClusterRecord {
    /// Xid.
    pub id: String,
    /// Name.
    pub name: String,
}

/// A trusted client certificate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CertificateRecord {
    /// Base64 of the DER form.
    pub certificate: String,
    /// Unix seconds.
    pub added_at: i64,
}

/// What operators have set of a node; what is not set is the configuration's, or the machine's own.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeRecord {
    /// Unique name.
    pub name: String,
    /// Unix seconds; 0: it was never added, the engine brought it along.
    pub created_at: i64,
    /// Where its engine answers, as asked for.
    pub address: String,
    /// AMS set the machine up.
    pub managed: bool,
    /// Being added.
    pub joining: bool,
    /// Why it could not be added.
    pub failed: Option<String>,
    /// Where clients reach it.
    pub public_address: Option<String>,
    /// CPUs offered; 0: all.
    pub cpus: u32,
    /// Over-commit factor.
    pub cpu_allocation_rate: Option<f64>,
    /// Bytes offered.
    pub memory_bytes: Option<u64>,
    /// Over-commit factor.
    pub memory_allocation_rate: Option<f64>,
    /// Of all GPUs together.
    pub gpu_slots: Option<u32>,
    /// Of all GPUs together.
    pub gpu_encoder_slots: Option<u32>,
    /// Words for selectors.
    pub tags: Option<Vec<String>>,
    /// No new instances.
    pub unschedulable: Option<bool>,
    /// Single GPUs, by number.
    pub gpus: BTreeMap<u32, GpuSlots>,
}

/// Slots of a single GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuSlots {
    /// Instances that may share it.
    pub slots: Option<u32>,
    /// Parallel encodes.
    pub encoder_slots: Option<u32>,
}

impl NodeRecord {
    /// A node of which nothing is set.
    pub fn of(name: &str) -> Self {
        Self { name: name.to_owned(), ..Self::default() }
    }
}

/// An image with its versions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// Xid.
    pub id: String,
    /// Unique name.
    pub name: String,
    /// Unix seconds.
    pub created_at: i64,
    /// `x86_64`, `aarch64`.
    pub architecture: String,
    /// By number.
    pub versions: BTreeMap<u32, ImageVersionRecord>,
    /// Number of the next version; numbers are never used twice.
    pub next_version: u32,
}

/// One version of an image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImageVersionRecord {
    /// SHA-256 of the file, hex; the engine knows it under this name.
    pub sha256: String,
    /// Bytes of the file.
    pub size: u64,
    /// Unix seconds.
    pub created_at: i64,
    /// How far it is.
    pub state: ImageState,
}

/// How far a version of an image is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum ImageState {
    /// The engine is taking it in.
    Importing,
    /// Can be used.
    Active,
    /// The engine refused it.
    Failed {
        /// Why.
        error: String,
    },
}

impl ImageRecord {
    /// The newest version that can be used.
    pub fn newest(&self) -> Option<(u32, &ImageVersionRecord)> {
        let mut versions = self.versions.iter().rev();
        versions
            .find(|(_, version)| version.state == ImageState::Active)
            .map(|(number, version)| (*number, version))
    }
}

/// The newest launch under an idempotency key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LaunchRecord {
    /// Older attempts are refused.
    pub attempt: u64,
    /// What it made.
    pub instance: InstanceId,
    /// The operation that was answered.
    pub operation: OperationId,
    /// Unix seconds.
    pub at: i64,
}

impl LaunchRecord {
    /// How a launch with this attempt stands to the one that counts: a lesser one is refused, an equal one is the
    /// same launch again, a greater one makes a new instance.
    pub fn judge(&self, attempt: u64) -> Ordering {
        attempt.cmp(&self.attempt)
    }
}

/// Long work, and what ends it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OperationRecord {
    /// As answered.
    pub operation: Operation,
    /// Ends when this is reached; none: the unit that began it ends it.
    #[serde(default)]
    pub goal: Option<Goal>,
    /// The unit that began it.
    #[serde(default)]
    pub unit: String,
    /// Unix seconds of the end, while not final: of the begin.
    pub at: i64,
}

/// What an operation on an instance waits for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Goal {
    /// Which instance.
    pub instance: InstanceId,
    /// What.
    pub reach: Reach,
}

/// A state that is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reach {
    /// Prepared, or further.
    Prepared,
    /// This run is ready.
    Running {
        /// Number of the run.
        run: u32,
    },
    /// No process is left.
    Stopped,
    /// The record is gone.
    Deleted,
}

/// What was asked for. Changed by requests only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intent {
    /// Where the instance should be.
    pub target: Target,
    /// Number of the run that is meant; each start counts up.
    pub run: u32,
    /// Skip the graceful part of the end.
    #[serde(default)]
    pub force: bool,
    /// Unix seconds since when.
    pub since: i64,
}

impl Intent {
    /// A request to remove the instance. Asked again, the time of the first request counts, and force stays.
    pub fn delete(&self, force: bool, now: i64) -> Self {
        let again = self.target == Target::Deleted;
        Self {
            target: Target::Deleted,
            force: force || (self.force && again),
            since: if again { self.since } else { now },
            run: self.run,
        }
    }

    /// A request to stop the instance.
    pub fn stop(&self, now: i64) -> Self {
        if self.target == Target::Stopped {
            return self.clone();
        }
        Self { target: Target::Stopped, since: now, force: false, run: self.run }
    }
}

/// Where an instance should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// Placed, not started.
    Prepared,
    /// The run was started; when it ends by itself, that is that.
    Running,
    /// No run.
    Stopped,
    /// Gone.
    Deleted,
}

/// What was last seen. Changed by the reconciler only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observed {
    /// Status.
    pub status: InstanceStatus,
    /// Run that the status belongs to; 0 = none yet.
    pub run: u32,
    /// What it waits for.
    #[serde(default)]
    pub message: String,
    /// Why it failed.
    #[serde(default)]
    pub error: String,
    /// Unix seconds since when the status holds.
    pub since: i64,
}

/// Streaming of an instance.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum Session {
    /// Not streamed.
    #[default]
    None,
    /// The agent has to be asked for one.
    Wanted,
    /// The agent brought it along; it is the agent's to end.
    Given {
        /// For the guest file.
        streaming: Streaming,
    },
    /// The agent made it for us; we end it with the instance.
    Made {
        /// For the guest file.
        streaming: Streaming,
    },
    /// We ended it, or it never came to be.
    Over,
}

impl Session {
    /// The data for the guest file.
    pub fn streaming(&self) -> Option<&Streaming> {
        match self {
            Self::Given { streaming } | Self::Made { streaming } => Some(streaming),
            Self::None | Self::Wanted | Self::Over => None,
        }
    }

    /// A session that we have to end.
    pub fn to_end(&self) -> Option<&SessionId> {
        match self {
            Self::Made { streaming } => Some(&streaming.session_id),
            _ => None,
        }
    }
}

/// What the root file system of an instance is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRef {
    /// Of the image; `host` for the programs of the machine itself.
    pub id: String,
    /// Name of the image.
    pub name: String,
    /// Version of the image.
    pub version: u32,
    /// SHA-256 of what the engine unpacks: the version's file, or what was made of it for an application.
    pub sha256: Option<String>,
}

impl Default for ImageRef {
    fn default() -> Self {
        let host = manifest::HOST_IMAGE;
        Self { id: host.into(), name: host.into(), version: 0, sha256: None }
    }
}

/// What an instance has of a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuShare {
    /// Number of the GPU on the node.
    pub gpu: u32,
    /// Slots.
    pub slots: u32,
    /// Parallel encodes.
    pub encodes: u32,
}

/// Which application an instance runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApplicationRef {
    /// Id.
    pub id: ApplicationId,
    /// Name at launch.
    pub name: String,
    /// Version.
    pub version: u32,
}

/// The part of an instance that was started before anybody asked for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pooled {
    /// Whether somebody has it.
    pub state: PoolState,
    /// How much of it was started.
    pub start: PoolStart,
}

/// What kind of thing every instance is, in the API; the other one would be a virtual machine.
pub const KIND: &str = "container";

/// One instance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InstanceRecord {
    /// Xid.
    pub id: InstanceId,
    /// Unique name.
    pub name: String,
    /// Unix seconds.
    pub created_at: i64,
    /// What it runs; none: what its image runs by itself.
    #[serde(default)]
    pub application: Option<ApplicationRef>,
    /// The program, as the version said at launch.
    pub program: GuestApplication,
    /// As asked for at launch.
    pub config: InstanceConfig,
    /// Display at start.
    pub display: Screen,
    /// What it takes.
    pub resources: Resources,
    /// Free words; `session=<id>` is ours.
    pub tags: Vec<String>,
    /// Handed on to the application.
    #[serde(default)]
    pub user_data: Option<String>,
    /// What its root file system is made of.
    #[serde(default)]
    pub image: ImageRef,
    /// Ports that are reached through its node.
    #[serde(default)]
    pub services: Vec<ams::Service>,
    /// A helper in which an application is made.
    #[serde(default)]
    pub base: bool,
    /// Whose files it began with.
    #[serde(default)]
    pub copy_of: Option<InstanceId>,
    /// Whose hooks run before those of the application, in order.
    #[serde(default)]
    pub addons: Vec<AddonRef>,
    /// It waits in the pool of its application, or was claimed and has not been told yet. None from then on.
    #[serde(default)]
    pub pool: Option<Pooled>,
    /// How it encodes.
    #[serde(default)]
    pub encoder: Encoder,
    /// Its place on the node; see [`Share::place`].
    #[serde(default)]
    pub place: u32,
    /// The GPU it shares, and its encodes there.
    #[serde(default)]
    pub gpu: Option<GpuShare>,
    /// Where it is; none: nothing fitted.
    pub node: Option<NodeId>,
    /// Architecture of the node.
    pub architecture: String,
    /// Streaming.
    pub session: Session,
    /// What was asked for.
    pub intent: Intent,
    /// What was last seen.
    pub observed: Observed,
}

impl InstanceRecord {
    /// Whether the node's CPUs and memory are kept for it.
    pub fn holds_resources(&self) -> bool {
        use InstanceStatus as S;
        self.node.is_some()
            && matches!(self.observed.status, S::Created | S::Prepared | S::Started | S::Running)
    }

    /// Its share of the node, once it has one; before, what it wishes.
    pub fn share(&self) -> Share {
        Share {
            cpus: self.resources.cpus,
            memory_bytes: self.resources.memory,
            disk_bytes: if self.resources.no_disk_reserve { 0 } else { self.resources.disk_size },
            gpu_slots: self.gpu.map_or(u32::try_from(self.resources.gpu_slots).unwrap_or(0), |gpu| gpu.slots),
            encoder_slots: self.gpu.map_or(0, |gpu| gpu.encodes),
            gpu: self.gpu.map(|gpu| gpu.gpu),
            place: self.place,
        }
    }

    /// Goes there, with this share.
    pub fn put(&mut self, node: NodeId, share: Share) {
        self.node = Some(node);
        self.place = share.place;
        self.gpu =
            share.gpu.map(|gpu| GpuShare { gpu, slots: share.gpu_slots, encodes: share.encoder_slots });
    }

    /// Whether it runs, or will, without being asked to start again.
    pub fn is_going(&self) -> bool {
        use InstanceStatus as S;
        self.intent.target == Target::Running
            && !matches!(self.observed.status, S::Stopped | S::Error | S::Deleted)
    }

    /// A request to start it again; its share must have been reserved before.
    pub fn start_again(&mut self, now: i64) {
        self.intent = Intent { target: Target::Running, run: self.intent.run + 1, force: false, since: now };
        // What a claim would have told it is in its new guest file.
        if self.is_claimed() {
            self.pool = None;
        }
        // From here on it holds its share again.
        self.observed = Observed {
            status: InstanceStatus::Prepared,
            run: self.observed.run,
            message: String::new(),
            error: String::new(),
            since: now,
        };
    }

    /// Waits for a launch.
    pub fn is_waiting(&self) -> bool {
        self.pool.is_some_and(|pool| pool.state == PoolState::Waiting)
    }

    /// Was taken by a launch whose data are on the way into it.
    pub fn is_claimed(&self) -> bool {
        self.pool.is_some_and(|pool| pool.state == PoolState::Claimed)
    }

    /// The agent made a session for it.
    pub fn with_session(mut self, streaming: Streaming) -> Self {
        if self.session == Session::Wanted {
            self.session = Session::Made { streaming };
        }
        self
    }

    /// What it runs, for people.
    pub fn program_name(&self) -> &str {
        self.application.as_ref().map_or(&self.image.name, |application| &application.name)
    }

    /// URL of the instance.
    pub fn url(&self) -> String {
        format!("/1.0/instances/{}", self.id)
    }

    /// As answered.
    /// `address`: its own; `public_address`: its node's.
    pub fn to_api(&self, address: &str, public_address: &str, stored_logs: Vec<String>) -> ams::Instance {
        let status = self.status();
        let application = self.application.as_ref();
        ams::Instance {
            id: self.id.clone(),
            name: self.name.clone(),
            base: self.base,
            kind: KIND.into(),
            status_code: status.code(),
            status: status.as_str().into(),
            status_message: self.observed.message.clone(),
            error_message: self.observed.error.clone(),
            node: self.node.as_ref().map(NodeId::to_string).unwrap_or_default(),
            app_id: application.map(|application| application.id.to_string()).unwrap_or_default(),
            app_name: application.map(|application| application.name.clone()).unwrap_or_default(),
            app_version: application.map_or(0, |application| application.version),
            image_id: self.image.id.clone(),
            image_version: self.image.version,
            created_at: self.created_at,
            address: if self.node.is_some() { address.to_owned() } else { String::new() },
            public_address: if self.node.is_some() { public_address.to_owned() } else { String::new() },
            services: self.services.clone(),
            stored_logs,
            config: self.config.clone(),
            resources: self.resources.clone(),
            architecture: self.architecture.clone(),
            tags: self.all_tags(),
            pool: self.pool.map(|pool| pool.state),
        }
    }

    /// The status that is shown: what is being removed shows it at once, whatever the reconciler has seen so far.
    pub fn status(&self) -> InstanceStatus {
        if self.intent.target == Target::Deleted { InstanceStatus::Deleted } else { self.observed.status }
    }

    /// The words of its owner, and the one that names its session.
    pub fn all_tags(&self) -> Vec<String> {
        let mut tags = self.tags.clone();
        if let Some(streaming) = self.session.streaming() {
            let tag = session_tag(&streaming.session_id);
            if !tags.contains(&tag) {
                tags.push(tag);
            }
        }
        tags
    }
}

/// The tag that tells whose an instance is.
pub fn session_tag(session: &SessionId) -> String {
    format!("session={session}")
}

/// An application with its versions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ApplicationRecord {
    /// Xid.
    pub id: ApplicationId,
    /// Unique name.
    pub name: String,
    /// Unix seconds.
    pub created_at: i64,
    /// Do not rebuild on changes below.
    pub inhibit_auto_updates: bool,
    /// Replaces the tags of the newest manifest.
    #[serde(default)]
    pub tags: Option<Vec<String>>,
    /// Replaces the node selector of the newest manifest.
    #[serde(default)]
    pub node_selector: Option<Vec<String>>,
    /// Changes the pool of the manifest.
    #[serde(default)]
    pub pool: PoolPatch,
    /// By number.
    pub versions: BTreeMap<u32, VersionRecord>,
    /// Number of the next version; numbers are never used twice.
    pub next_version: u32,
    /// Being removed.
    #[serde(default)]
    pub deleted: bool,
}

/// One version of an application.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VersionRecord {
    /// Unix seconds.
    pub created_at: i64,
    /// Whether a launch without a number may take it.
    pub published: bool,
    /// Usable; otherwise being made, or failed.
    pub state: VersionState,
    /// What the package asks for.
    pub manifest: manifest::Checked,
    /// SHA-256 of `manifest.yaml`, hex.
    #[serde(default)]
    pub manifest_sha256: String,
    /// SHA-256 of the archive, hex.
    #[serde(default)]
    pub package_sha256: String,
    /// `data:` URL of the icon.
    #[serde(default)]
    pub icon: String,
    /// What its instances are made of.
    #[serde(default)]
    pub image: ImageRef,
    /// What was added to it, in order.
    #[serde(default)]
    pub addons: Vec<AddonRef>,
}

/// An addon with its versions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AddonRecord {
    /// Unique.
    pub name: String,
    /// Unix seconds.
    pub created_at: i64,
    /// By number.
    pub versions: BTreeMap<u32, AddonVersionRecord>,
    /// Number of the next version; numbers are never used twice.
    pub next_version: u32,
}

/// One version of an addon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AddonVersionRecord {
    /// Unix seconds.
    pub created_at: i64,
    /// SHA-256 of the package, hex.
    pub sha256: String,
    /// Bytes of the package.
    pub size: u64,
    /// How long one of its hooks may take, seconds.
    pub hook_time_s: u64,
}

/// A version of an addon that something stands on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddonRef {
    /// Which addon.
    pub name: String,
    /// Which of its versions.
    pub version: u32,
    /// How long one of its hooks may take, seconds.
    pub hook_time_s: u64,
}

impl AddonRef {
    /// As answered.
    pub fn to_api(&self) -> ams::addons::AddonUse {
        ams::addons::AddonUse { name: self.name.clone(), version: self.version }
    }
}

/// How far a version is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum VersionState {
    /// Being made; the instance in which it is, once there is one.
    Building {
        /// Which instance.
        base: Option<InstanceId>,
    },
    /// Can be launched.
    Active,
    /// Could not be made.
    Failed {
        /// Why.
        error: String,
    },
}

impl ApplicationRecord {
    /// The version with this number that can be launched, or the newest published one.
    ///
    /// # Errors
    /// The documented text (ams-api section 2.3).
    pub fn launchable(&self, number: Option<u32>) -> Result<(u32, &VersionRecord), String> {
        match number {
            Some(number) => match self.versions.get(&number) {
                Some(version) if version.state == VersionState::Active => Ok((number, version)),
                Some(_) => Err(format!("application version {number} is not active")),
                None => Err(format!("application version {number} not found")),
            },
            None => self
                .versions
                .iter()
                .rev()
                .find(|(_, version)| version.published && version.state == VersionState::Active)
                .map(|(number, version)| (*number, version))
                .ok_or_else(|| "published application version not found".into()),
        }
    }

    /// The newest version.
    pub fn newest(&self) -> Option<&VersionRecord> {
        self.versions.last_key_value().map(|(_, version)| version)
    }

    /// Tags that a node must have.
    pub fn selector(&self) -> Vec<String> {
        let from_manifest = || self.newest().map(|version| version.manifest.node_selector.clone());
        self.node_selector.clone().or_else(from_manifest).unwrap_or_default()
    }

    /// What is to wait: as the version says that a launch without a number gets, or as set since.
    pub fn pool(&self) -> Pool {
        let said = self.launchable(None).map(|(_, version)| version.manifest.pool).unwrap_or_default();
        Pool { size: self.pool.size.unwrap_or(said.size), start: self.pool.start.unwrap_or(said.start) }
    }

    /// As answered.
    pub fn to_api(&self) -> ams::Application {
        use ams::{ApplicationStatus, ImageStatus};
        let newest = self.newest();
        let status = match newest.map(|version| &version.state) {
            _ if self.deleted => ApplicationStatus::Deleted,
            Some(VersionState::Active) => ApplicationStatus::Ready,
            Some(VersionState::Failed { .. }) => ApplicationStatus::Error,
            Some(VersionState::Building { .. }) | None => ApplicationStatus::Initializing,
        };
        let (status_code, status) = status.wire();
        let manifest = newest.map(|version| version.manifest.clone()).unwrap_or_default();
        let versions = self.versions.iter().map(|(number, version)| {
            let (state, error) = match &version.state {
                VersionState::Building { .. } => (ImageStatus::Initializing, ""),
                VersionState::Active => (ImageStatus::Active, ""),
                VersionState::Failed { error } => (ImageStatus::Error, error.as_str()),
            };
            let (status_code, status) = state.wire();
            ams::ApplicationVersion {
                number: *number,
                status_code,
                status: status.into(),
                published: version.published,
                created_at: version.created_at,
                parent_image_id: version.image.id.clone(),
                parent_image_version: version.image.version,
                services: version.manifest.services.clone(),
                error_message: error.into(),
                video_encoder: version.manifest.video_encoder.clone(),
                manifest_version: version.manifest.version.clone(),
                features: version.manifest.features.clone(),
                addons: version.addons.iter().map(AddonRef::to_api).collect(),
                ..ams::ApplicationVersion::default()
            }
        });
        let wanted = &manifest.resources;
        ams::Application {
            id: self.id.clone(),
            name: self.name.clone(),
            status_code,
            status: status.into(),
            instance_type: manifest.instance_type.clone(),
            boot_package: String::new(),
            parent_image_id: newest.map(|version| version.image.id.clone()).unwrap_or_default(),
            parent_image_variant: "generic".into(),
            published: self.versions.values().any(|version| version.published),
            versions: versions.collect(),
            addons: newest
                .map(|version| version.addons.iter().map(|addon| addon.name.clone()).collect())
                .unwrap_or_default(),
            created_at: self.created_at,
            immutable: false,
            tags: self.tags.clone().unwrap_or(manifest.tags),
            resources: ams::SizedResources {
                cpus: wanted.cpus.unwrap_or(0),
                memory: wanted.memory_bytes.map(size::format).unwrap_or_default(),
                disk_size: wanted.disk_bytes.map(size::format).unwrap_or_default(),
                gpu_slots: wanted.gpu_slots.map_or(-1, |slots| i32::try_from(slots).unwrap_or(i32::MAX)),
                gpu_type: wanted.gpu_type.clone().unwrap_or_default(),
                vpu_slots: 0,
                no_disk_reserve: wanted.no_disk_reserve,
            },
            abi: String::new(),
            inhibit_auto_updates: self.inhibit_auto_updates,
            node_selector: self.selector(),
            vm: false,
            title: manifest.title,
            description: manifest.description,
            icon: newest.map(|version| version.icon.clone()).unwrap_or_default(),
            pool: self.pool(),
        }
    }
}

/// The caller's data as the streamer hands it on: JSON where it is JSON, else a text.
pub fn extra_data(user_data: &str) -> Value {
    serde_json::from_str(user_data).unwrap_or_else(|_| Value::String(user_data.to_owned()))
}
