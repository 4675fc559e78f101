//! Records of AMS as they lie in the store, and their keys.

use std::{cmp::Ordering, collections::BTreeMap};

use fanlight_api::{
    ApplicationId, InstanceId, NodeId, OperationId, SessionId,
    ams::{self, InstanceConfig, InstanceStatus, Operation, Resources},
    gateway::Screen,
    guest::{GuestApplication, Streaming},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::placement::Share;
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
    /// Ends when this is reached; none: whoever began it ends it.
    #[serde(default)]
    pub goal: Option<Goal>,
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

/// One instance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InstanceRecord {
    /// Xid.
    pub id: InstanceId,
    /// Unique name.
    pub name: String,
    /// Unix seconds.
    pub created_at: i64,
    /// What it runs.
    pub application: ApplicationRef,
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

    /// Its share of the node.
    pub fn share(&self) -> Share {
        Share {
            cpus: self.resources.cpus,
            memory_bytes: self.resources.memory,
            gpu_slots: u32::try_from(self.resources.gpu_slots).unwrap_or(0),
        }
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
        // From here on it holds its share again.
        self.observed = Observed {
            status: InstanceStatus::Prepared,
            run: self.observed.run,
            message: String::new(),
            error: String::new(),
            since: now,
        };
    }

    /// The agent made a session for it.
    pub fn with_session(mut self, streaming: Streaming) -> Self {
        if self.session == Session::Wanted {
            self.session = Session::Made { streaming };
        }
        self
    }

    /// URL of the instance.
    pub fn url(&self) -> String {
        format!("/1.0/instances/{}", self.id)
    }

    /// As answered.
    pub fn to_api(&self, address: &str, stored_logs: Vec<String>) -> ams::Instance {
        let mut tags = self.tags.clone();
        if let Some(streaming) = self.session.streaming() {
            let tag = session_tag(&streaming.session_id);
            if !tags.contains(&tag) {
                tags.push(tag);
            }
        }
        // What is being removed shows it at once, whatever the reconciler has seen so far.
        let status = if self.intent.target == Target::Deleted {
            InstanceStatus::Deleted
        } else {
            self.observed.status
        };
        ams::Instance {
            id: self.id.clone(),
            name: self.name.clone(),
            base: false,
            kind: "container".into(),
            status_code: status.code(),
            status: status.as_str().into(),
            status_message: self.observed.message.clone(),
            error_message: self.observed.error.clone(),
            node: self.node.as_ref().map(NodeId::to_string).unwrap_or_default(),
            app_id: self.application.id.to_string(),
            app_name: self.application.name.clone(),
            app_version: self.application.version,
            image_id: manifest::HOST_IMAGE.into(),
            image_version: 0,
            created_at: self.created_at,
            address: if self.node.is_some() { address.to_owned() } else { String::new() },
            public_address: String::new(),
            services: Vec::new(),
            stored_logs,
            config: self.config.clone(),
            resources: self.resources.clone(),
            architecture: self.architecture.clone(),
            tags,
        }
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
}

/// How far a version is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum VersionState {
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

    /// As answered.
    pub fn to_api(&self) -> ams::Application {
        use ams::{ApplicationStatus, ImageStatus};
        let newest = self.newest();
        let status = match newest.map(|version| &version.state) {
            _ if self.deleted => ApplicationStatus::Deleted,
            Some(VersionState::Active) => ApplicationStatus::Ready,
            Some(VersionState::Failed { .. }) => ApplicationStatus::Error,
            None => ApplicationStatus::Initializing,
        };
        let (status_code, status) = status.wire();
        let manifest = newest.map(|version| version.manifest.clone()).unwrap_or_default();
        let versions = self.versions.iter().map(|(number, version)| {
            let (state, error) = match &version.state {
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
                parent_image_id: manifest::HOST_IMAGE.into(),
                error_message: error.into(),
                video_encoder: version.manifest.video_encoder.clone(),
                manifest_version: version.manifest.version.clone(),
                features: version.manifest.features.clone(),
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
            parent_image_id: manifest::HOST_IMAGE.into(),
            parent_image_variant: "generic".into(),
            published: self.versions.values().any(|version| version.published),
            versions: versions.collect(),
            addons: Vec::new(),
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
                no_disk_reserve: false,
            },
            abi: String::new(),
            inhibit_auto_updates: self.inhibit_auto_updates,
            node_selector: self.selector(),
            vm: false,
            title: manifest.title,
            description: manifest.description,
            icon: newest.map(|version| version.icon.clone()).unwrap_or_default(),
        }
    }
}

/// The caller's data as the streamer hands it on: JSON where it is JSON, else a text.
pub fn extra_data(user_data: &str) -> Value {
    serde_json::from_str(user_data).unwrap_or_else(|_| Value::String(user_data.to_owned()))
}
