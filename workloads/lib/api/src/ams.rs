//! Bodies of the AMS API (ams-api sections 3 to 12): what is answered and what is accepted.
//!
//! Answers carry every documented member, so that strict decoders find what they expect. Requests follow
//! the tolerance rules of ams-api section 1.6: `null`, `""` and `0` mean "not given", members that are not
//! known are ignored, because newer clients send more. Rules about values live in AMS.

pub mod addons;
pub mod auth;
pub mod exec;
pub mod images;
pub mod nodes;

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use crate::{
    ApplicationId, InstanceId, OperationId,
    gateway::Screen,
    guest::{PoolStart, Restart, Streaming},
};

/// Reads `null` as the default of the type.
fn nullable<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// Codes of operations and answers (ams-api section 2.4). Final means 200 or more.
pub mod status {
    /// The operation exists, nothing happened yet.
    pub const CREATED: u16 = 100;
    /// Work goes on.
    pub const RUNNING: u16 = 103;
    /// A cancel request was accepted.
    pub const CANCELLING: u16 = 104;
    /// Waits for something else.
    pub const PENDING: u16 = 105;
    /// Ended well.
    pub const SUCCESS: u16 = 200;
    /// Ended with an error.
    pub const FAILURE: u16 = 400;
    /// Ended because somebody cancelled it.
    pub const CANCELLED: u16 = 401;

    /// The text that goes with a code.
    pub fn text(code: u16) -> &'static str {
        match code {
            CREATED => "Operation created",
            101 => "Started",
            102 => "Stopped",
            RUNNING => "Running",
            CANCELLING => "Cancelling",
            PENDING => "Pending",
            106 => "Starting",
            107 => "Stopping",
            108 => "Aborting",
            109 => "Freezing",
            110 => "Frozen",
            111 => "Thawed",
            112 => "Error",
            SUCCESS => "Success",
            CANCELLED => "Cancelled",
            _ => "Failure",
        }
    }
}

/// Answer of `GET /1.0`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ServiceStatus {
    /// What this server can do beyond version 1.0; only what is implemented.
    pub api_extensions: Vec<String>,
    /// `stable`.
    pub api_status: String,
    /// `1.0`.
    pub api_version: String,
    /// `trusted` or `untrusted`, for this caller.
    pub auth: String,
    /// Ways to get in.
    pub auth_methods: Vec<String>,
    /// Catalogue of entitlements; only for trusted callers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auth_permissions: Option<BTreeMap<String, Vec<auth::Entitlement>>>,
    /// Xid of the cluster; only for trusted callers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster_id: Option<String>,
    /// Name of the cluster; only for trusted callers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster_name: Option<String>,
}

/// Answer of `GET /1.0/version`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// Version of the server.
    pub version: String,
}

/// Long work (ams-api section 3.1).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Operation {
    /// A UUID.
    pub id: OperationId,
    /// `task`, `websocket` or `token`.
    pub class: String,
    /// For people, e.g. `Creating instance`.
    pub description: String,
    /// RFC 3339; never empty.
    pub created_at: Option<String>,
    /// RFC 3339; never empty.
    pub updated_at: Option<String>,
    /// Text of `status_code`.
    pub status: String,
    /// See [`status`].
    pub status_code: u16,
    /// Kind of object → URLs; how clients learn the id of what they created.
    #[serde(default, deserialize_with = "nullable")]
    pub resources: BTreeMap<String, Vec<String>>,
    /// Depends on the class.
    #[serde(default)]
    pub metadata: Option<Value>,
    /// Whether `DELETE` is of use.
    #[serde(default)]
    pub may_cancel: bool,
    /// Why it failed, else empty.
    #[serde(default)]
    pub err: String,
    /// Unit that runs it.
    #[serde(default)]
    pub server_address: String,
}

impl Operation {
    /// Whether nothing more will happen to it.
    pub fn is_final(&self) -> bool {
        self.status_code >= status::SUCCESS
    }

    /// Whether it ended well.
    pub fn succeeded(&self) -> bool {
        self.status_code == status::SUCCESS
    }

    /// Last path segment of the first resource of a kind, e.g. the id behind `instances`.
    pub fn resource(&self, kind: &str) -> Option<&str> {
        self.resources.get(kind)?.first()?.rsplit('/').next()
    }
}

/// One text frame of `GET /1.0/events` (ams-api section 4).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// [`EVENT_OPERATION`] or [`EVENT_LIFECYCLE`].
    #[serde(rename = "type")]
    pub kind: String,
    /// RFC 3339 with fractions of a second.
    pub timestamp: String,
    /// An [`Operation`] or a [`Lifecycle`].
    pub metadata: Value,
}

/// Kind of events that carry an [`Operation`].
pub const EVENT_OPERATION: &str = "operation";
/// Kind of events that carry a [`Lifecycle`].
pub const EVENT_LIFECYCLE: &str = "lifecycle";

/// What happened to an object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lifecycle {
    /// `instance-created`, `-scheduled`, `-started`, `-running`, `-stopped`, `-removed`, `-failed`, the same
    /// with `container-`, and, ours, `application-changed`.
    pub action: String,
    /// URL of the object.
    pub source: String,
}

/// A trusted client certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificate {
    /// Base64 of the DER form, without PEM lines.
    pub certificate: String,
    /// SHA-256 of the DER form, lower-case hex.
    pub fingerprint: String,
}

/// Body of `POST /1.0/certificates`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct CertificatesPost {
    /// Base64 of the DER form; PEM is accepted too.
    #[serde(default, deserialize_with = "nullable")]
    pub certificate: String,
    /// Lets an untrusted caller add itself; empty: not given.
    #[serde(default, rename = "trust-password", deserialize_with = "nullable")]
    pub trust_password: crate::Secret,
}

/// Status of an application (ams-model section 2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ApplicationStatus {
    /// The newest version failed.
    Error,
    /// A version is being made.
    Initializing,
    /// Can be launched.
    Ready,
    /// Being removed.
    Deleted,
}

impl ApplicationStatus {
    /// Number and text on the wire.
    pub fn wire(self) -> (i32, &'static str) {
        match self {
            Self::Error => (-1, "error"),
            Self::Initializing => (1, "initializing"),
            Self::Ready => (2, "ready"),
            Self::Deleted => (3, "deleted"),
        }
    }
}

/// Something that can be run (ams-api section 10).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Application {
    /// Xid.
    pub id: ApplicationId,
    /// Unique name.
    pub name: String,
    /// See [`ApplicationStatus`].
    pub status_code: i32,
    /// Text of `status_code`.
    pub status: String,
    /// Deprecated preset, empty.
    #[serde(default)]
    pub instance_type: String,
    /// Android package, empty for others.
    #[serde(default)]
    pub boot_package: String,
    /// Image that it stands on; `host` for the process engine.
    #[serde(default)]
    pub parent_image_id: String,
    /// `generic` for programs of the host.
    #[serde(default)]
    pub parent_image_variant: String,
    /// Whether at least one version is published.
    #[serde(default)]
    pub published: bool,
    /// Oldest first.
    #[serde(default, deserialize_with = "nullable")]
    pub versions: Vec<ApplicationVersion>,
    /// Names.
    #[serde(default, deserialize_with = "nullable")]
    pub addons: Vec<String>,
    /// Unix seconds.
    #[serde(default)]
    pub created_at: i64,
    /// Came from a registry.
    #[serde(default)]
    pub immutable: bool,
    /// Free words.
    #[serde(default, deserialize_with = "nullable")]
    pub tags: Vec<String>,
    /// What an instance takes.
    #[serde(default)]
    pub resources: SizedResources,
    /// Android only, empty.
    #[serde(default)]
    pub abi: String,
    /// Do not rebuild on changes below.
    #[serde(default)]
    pub inhibit_auto_updates: bool,
    /// Tags that a node must have.
    #[serde(default, deserialize_with = "nullable")]
    pub node_selector: Vec<String>,
    /// Runs in a virtual machine.
    #[serde(default)]
    pub vm: bool,
    /// What people read; our addition.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub title: String,
    /// One sentence; our addition.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// A `data:` URL of a small picture; our addition.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub icon: String,
    /// Instances that wait for a launch; our addition, absent where there are none.
    #[serde(default, skip_serializing_if = "Pool::is_none")]
    pub pool: Pool,
}

/// Instances of an application that are started before anybody asks for them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Pool {
    /// How many wait.
    pub size: u32,
    /// How much of them runs meanwhile.
    pub start: PoolStart,
}

impl Pool {
    /// Most instances that wait for an application.
    pub const MOST: u32 = 100;

    /// Whether nothing waits.
    pub fn is_none(&self) -> bool {
        self.size == 0
    }
}

/// Change of a [`Pool`]: what is not given stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PoolPatch {
    /// How many wait.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<u32>,
    /// How much of them runs meanwhile.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start: Option<PoolStart>,
}

/// Where an instance of a pool stands. A claim that was handed over leaves an instance like any other, without this.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PoolState {
    /// Nobody has it yet.
    Waiting,
    /// A launch has it, and what it asked for is on the way into it.
    Claimed,
}

impl Application {
    /// Number of the version that a launch without a number takes.
    pub fn published_version(&self) -> Option<u32> {
        self.versions.iter().filter(|version| version.published).map(|version| version.number).max()
    }
}

/// Status of an image, and of an application version (ams-model section 4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ImageStatus {
    /// Could not be made.
    Error,
    /// Being made.
    Initializing,
    /// Here, and not on all nodes.
    Created,
    /// On all nodes, usable.
    Active,
    /// Being removed.
    Deleted,
    /// Known on a server, not here.
    Available,
    /// Will be fetched.
    Queued,
}

impl ImageStatus {
    /// Number and text on the wire.
    pub fn wire(self) -> (i32, &'static str) {
        match self {
            Self::Error => (-1, "error"),
            Self::Initializing => (1, "initializing"),
            Self::Created => (2, "created"),
            Self::Active => (3, "active"),
            Self::Deleted => (4, "deleted"),
            Self::Available => (5, "available"),
            Self::Queued => (6, "queued"),
        }
    }
}

/// One version of an application.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ApplicationVersion {
    /// From 0, only grows.
    pub number: u32,
    /// See [`ImageStatus`].
    pub status_code: i32,
    /// Text of `status_code`.
    pub status: String,
    /// Whether a launch without a number may take it.
    #[serde(default)]
    pub published: bool,
    /// Unix seconds.
    #[serde(default)]
    pub created_at: i64,
    /// As of the application.
    #[serde(default)]
    pub parent_image_id: String,
    /// Version of that image.
    #[serde(default)]
    pub parent_image_version: u32,
    /// Android activity, empty for others.
    #[serde(default)]
    pub boot_activity: String,
    /// Android permissions.
    #[serde(default, deserialize_with = "nullable")]
    pub required_permissions: Vec<String>,
    /// Addons with versions.
    #[serde(default, deserialize_with = "nullable")]
    pub addons: Vec<addons::AddonUse>,
    /// Files placed by name.
    #[serde(default, deserialize_with = "nullable")]
    pub extra_data: BTreeMap<String, Value>,
    /// Why it failed, else empty.
    #[serde(default)]
    pub error_message: String,
    /// `gpu`, `gpu-preferred` or `software`.
    #[serde(default)]
    pub video_encoder: String,
    /// Free text of the manifest.
    #[serde(default)]
    pub manifest_version: String,
    /// Exposed ports.
    #[serde(default, deserialize_with = "nullable")]
    pub services: Vec<Service>,
    /// What ends an instance early.
    #[serde(default)]
    pub watchdog: Watchdog,
    /// Feature flags.
    #[serde(default, deserialize_with = "nullable")]
    pub features: Vec<String>,
    /// Limits of hooks.
    #[serde(default)]
    pub hooks: Hooks,
    /// What survives the making of the version.
    #[serde(default)]
    pub bootstrap: Bootstrap,
}

/// Ends an instance whose application misbehaves.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Watchdog {
    /// Off.
    #[serde(default)]
    pub disabled: bool,
    /// Android packages that may be in front.
    #[serde(default, rename = "allowed-packages", deserialize_with = "nullable")]
    pub allowed_packages: Vec<String>,
}

/// Limits of hooks.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Hooks {
    /// Duration, e.g. `5m`.
    #[serde(default)]
    pub timeout: String,
}

/// What survives the making of a version.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Bootstrap {
    /// Patterns.
    #[serde(default, deserialize_with = "nullable")]
    pub keep: Vec<String>,
}

/// Resources with sizes as text (`3GB`), as applications show them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SizedResources {
    /// Whole CPUs.
    #[serde(default)]
    pub cpus: u32,
    /// Size.
    #[serde(default)]
    pub memory: String,
    /// Size.
    #[serde(default, rename = "disk-size", alias = "disk_size")]
    pub disk_size: String,
    /// -1: not set, 0: none.
    #[serde(default, rename = "gpu-slots")]
    pub gpu_slots: i32,
    /// `amd`, `intel`, `nvidia` or empty.
    #[serde(default, rename = "gpu-type")]
    pub gpu_type: String,
    /// Slots of video cards.
    #[serde(default, rename = "vpu-slots")]
    pub vpu_slots: i32,
    /// Skip the logical disk quota.
    #[serde(default)]
    pub no_disk_reserve: bool,
}

/// Body of `PATCH /1.0/applications/{id}/{version}`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct ApplicationVersionPatch {
    /// Publish or revoke.
    #[serde(default)]
    pub published: Option<bool>,
}

/// Body of `PATCH /1.0/applications/{id}` as JSON.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ApplicationPatch {
    /// Replaces the tags.
    #[serde(default)]
    pub tags: Option<Vec<String>>,
    /// Do not rebuild on changes below.
    #[serde(default)]
    pub inhibit_auto_updates: Option<bool>,
    /// Replaces the node selector.
    #[serde(default)]
    pub node_selector: Option<Vec<String>>,
    /// Makes a version with another image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Makes a version with these addons.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addons: Option<Vec<String>>,
    /// Changes the pool; our addition.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<PoolPatch>,
    /// Members that AMS does not change (yet); they are refused by name instead of being dropped.
    #[serde(flatten)]
    #[schema(ignore)]
    pub others: BTreeMap<String, Value>,
}

/// Body of `POST` of a share of an instance (ams-api section 9.4).
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct SharePost {
    /// `adb`.
    #[serde(rename = "type", deserialize_with = "nullable")]
    pub kind: String,
    /// For people.
    pub description: Option<String>,
    /// Unix seconds.
    pub expiry_at: Option<i64>,
}

/// Work of the scheduler that is going on (ams-model section 7).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// Unique.
    pub id: String,
    /// E.g. `prepared`, `started`.
    pub status: String,
    /// What it is about.
    pub object_id: String,
    /// `instance`.
    pub object_type: String,
}

/// Body of the `DELETE` calls; may be absent.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct Delete {
    /// Skip what would be done gracefully.
    #[serde(default, deserialize_with = "nullable")]
    pub force: bool,
}

/// Status of an instance (ams-model section 3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InstanceStatus {
    /// Failed; `error_message` says why, logs are kept.
    Error,
    /// Not known.
    Unknown,
    /// Stored, not placed.
    Created,
    /// Node and resources assigned.
    Prepared,
    /// Starting.
    Started,
    /// Ready.
    Running,
    /// Ended as it should.
    Stopped,
    /// Being removed.
    Deleted,
}

impl InstanceStatus {
    /// Every status.
    pub const ALL: [Self; 8] = [
        Self::Error,
        Self::Unknown,
        Self::Created,
        Self::Prepared,
        Self::Started,
        Self::Running,
        Self::Stopped,
        Self::Deleted,
    ];

    /// Number on the wire.
    pub fn code(self) -> i32 {
        match self {
            Self::Error => -1,
            Self::Unknown => 0,
            Self::Created => 1,
            Self::Prepared => 2,
            Self::Started => 3,
            Self::Running => 4,
            Self::Stopped => 5,
            Self::Deleted => 6,
        }
    }

    /// Text on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Unknown => "unknown",
            Self::Created => "created",
            Self::Prepared => "prepared",
            Self::Started => "started",
            Self::Running => "running",
            Self::Stopped => "stopped",
            Self::Deleted => "deleted",
        }
    }

    /// The status behind a number; unknown numbers are [`Self::Unknown`].
    pub fn from_code(code: i32) -> Self {
        Self::ALL.into_iter().find(|status| status.code() == code).unwrap_or(Self::Unknown)
    }
}

/// One running application with its resources (ams-api section 9.2).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Instance {
    /// Xid.
    pub id: InstanceId,
    /// Unique name; default `ams-<id>`.
    pub name: String,
    /// Helper of an application that is being made.
    #[serde(default)]
    pub base: bool,
    /// `container` or `vm`.
    #[serde(rename = "type")]
    pub kind: String,
    /// See [`InstanceStatus`].
    pub status_code: i32,
    /// Text of `status_code`.
    pub status: String,
    /// What it waits for, else empty.
    #[serde(default)]
    pub status_message: String,
    /// Why it failed, else empty.
    #[serde(default)]
    pub error_message: String,
    /// Empty until placed.
    #[serde(default)]
    pub node: String,
    /// Empty for raw instances.
    #[serde(default)]
    pub app_id: String,
    /// Empty for raw instances.
    #[serde(default)]
    pub app_name: String,
    /// Version of the application.
    #[serde(default)]
    pub app_version: u32,
    /// `host` for the process engine.
    #[serde(default)]
    pub image_id: String,
    /// Version of the image.
    #[serde(default)]
    pub image_version: u32,
    /// Unix seconds.
    #[serde(default)]
    pub created_at: i64,
    /// Address of the instance.
    #[serde(default)]
    pub address: String,
    /// Public address of its node.
    #[serde(default)]
    pub public_address: String,
    /// Exposed ports.
    #[serde(default, deserialize_with = "nullable")]
    pub services: Vec<Service>,
    /// Names of the logs that can be read.
    #[serde(default, deserialize_with = "nullable")]
    pub stored_logs: Vec<String>,
    /// How it was launched.
    #[serde(default)]
    pub config: InstanceConfig,
    /// What it takes.
    #[serde(default)]
    pub resources: Resources,
    /// `x86_64` or `aarch64`.
    #[serde(default)]
    pub architecture: String,
    /// Free words; `session=<id>` is set by AMS.
    #[serde(default, deserialize_with = "nullable")]
    pub tags: Vec<String>,
    /// It waits for a launch, or was just taken by one; our addition, absent for all others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<PoolState>,
}

impl Instance {
    /// The status behind `status_code`.
    pub fn status(&self) -> InstanceStatus {
        InstanceStatus::from_code(self.status_code)
    }

    /// The session that owns it: the value of the tag `session=<id>`.
    pub fn session(&self) -> Option<crate::SessionId> {
        self.tags.iter().find_map(|tag| tag.strip_prefix("session=")?.parse().ok())
    }
}

/// Settings of an instance.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct InstanceConfig {
    /// Platform of the runtime.
    #[serde(deserialize_with = "nullable")]
    pub platform: String,
    /// Android only.
    #[serde(deserialize_with = "nullable")]
    pub boot_package: String,
    /// Android only.
    #[serde(deserialize_with = "nullable")]
    pub boot_activity: String,
    /// Where the runtime sends metrics.
    #[serde(deserialize_with = "nullable")]
    pub metrics_server: String,
    /// No watchdog.
    #[serde(deserialize_with = "nullable")]
    pub disable_watchdog: bool,
    /// The instance stays when the runtime ends.
    #[serde(deserialize_with = "nullable")]
    pub devmode: bool,
    /// Streamed; cannot be switched on later.
    #[serde(deserialize_with = "nullable")]
    pub enable_streaming: bool,
    /// Comma list of feature flags.
    #[serde(deserialize_with = "nullable")]
    pub features: String,
    /// Display; 0 = default.
    #[serde(deserialize_with = "nullable")]
    pub display: Display,
    /// Protections.
    #[serde(deserialize_with = "nullable")]
    pub security: Security,
}

/// A display as AMS writes it: 0 = default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Display {
    /// Pixels.
    #[serde(deserialize_with = "nullable")]
    pub width: i64,
    /// Pixels.
    #[serde(deserialize_with = "nullable")]
    pub height: i64,
    /// Frames per second.
    #[serde(deserialize_with = "nullable")]
    pub fps: i64,
    /// Dots per inch.
    #[serde(deserialize_with = "nullable")]
    pub density: i64,
}

impl From<Screen> for Display {
    fn from(screen: Screen) -> Self {
        Self {
            width: screen.width.into(),
            height: screen.height.into(),
            fps: screen.fps.into(),
            density: screen.density.into(),
        }
    }
}

/// Protections of an instance.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Security {
    /// `DELETE` is refused.
    #[serde(deserialize_with = "nullable")]
    pub delete_protected: bool,
}

/// Resources of an instance; sizes in bytes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Resources {
    /// Whole CPUs.
    #[serde(deserialize_with = "nullable")]
    pub cpus: u32,
    /// Bytes.
    #[serde(deserialize_with = "nullable")]
    pub memory: u64,
    /// Bytes.
    #[serde(rename = "disk-size", deserialize_with = "nullable")]
    pub disk_size: u64,
    /// GPU slots.
    #[serde(rename = "gpu-slots", deserialize_with = "nullable")]
    pub gpu_slots: i32,
    /// `amd`, `intel`, `nvidia` or empty.
    #[serde(rename = "gpu-type", deserialize_with = "nullable")]
    pub gpu_type: String,
    /// Slots of video cards.
    #[serde(rename = "vpu-slots", deserialize_with = "nullable")]
    pub vpu_slots: i32,
    /// Skip the logical disk quota.
    #[serde(deserialize_with = "nullable")]
    pub no_disk_reserve: bool,
}

/// A port of an instance that is reachable through its node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Service {
    /// Port inside.
    pub port: u16,
    /// Last port of a range, 0 = one port.
    #[serde(deserialize_with = "nullable")]
    pub port_end: u16,
    /// Port of the node.
    #[serde(deserialize_with = "nullable")]
    pub node_port: u16,
    /// Last port of a range of the node.
    #[serde(deserialize_with = "nullable")]
    pub node_port_end: u16,
    /// `tcp`, `udp`.
    #[serde(deserialize_with = "nullable")]
    pub protocols: Vec<String>,
    /// On the public address too.
    #[serde(deserialize_with = "nullable")]
    pub expose: bool,
    /// Name.
    #[serde(deserialize_with = "nullable")]
    pub name: String,
}

/// Body of `POST /1.0/instances` (ams-api section 9.3).
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct InstancesPost {
    /// Default `ams-<id>`.
    #[serde(deserialize_with = "nullable")]
    pub name: String,
    /// `container`, `vm` or empty.
    #[serde(rename = "type", deserialize_with = "nullable")]
    pub kind: String,
    /// Id or name of an application.
    #[serde(deserialize_with = "nullable")]
    pub app_id: String,
    /// Absent or -1: latest published.
    pub app_version: Option<i64>,
    /// Id or name of an image.
    #[serde(deserialize_with = "nullable")]
    pub image_id: String,
    /// Absent or -1: latest.
    pub image_version: Option<i64>,
    /// Copy of another instance.
    pub source: Option<Source>,
    /// Node to run on; empty: any.
    #[serde(deserialize_with = "nullable")]
    pub node: String,
    /// At most 10 240 bytes.
    pub user_data: Option<String>,
    /// Only for raw instances.
    #[serde(deserialize_with = "nullable")]
    pub addons: Vec<String>,
    /// Ports to expose.
    #[serde(deserialize_with = "nullable")]
    pub services: Vec<Service>,
    /// What it takes.
    #[serde(deserialize_with = "nullable")]
    pub resources: ResourcesPost,
    /// Free words.
    #[serde(deserialize_with = "nullable")]
    pub tags: Vec<String>,
    /// Settings.
    #[serde(deserialize_with = "nullable")]
    pub config: InstanceConfig,
    /// Prepare only.
    #[serde(deserialize_with = "nullable")]
    pub no_start: bool,
    /// The session that the caller already has for this instance; our addition, sent by the agent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub streaming: Option<Streaming>,
}

/// What to copy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Source {
    /// `instance`, or empty: no copy.
    #[serde(rename = "type", deserialize_with = "nullable")]
    pub kind: String,
    /// Its id.
    #[serde(deserialize_with = "nullable")]
    pub id: String,
}

/// Resources asked for at launch. Both spellings of the disk size are read.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct ResourcesPost {
    /// Whole CPUs.
    pub cpus: Option<i64>,
    /// Bytes.
    pub memory: Option<i64>,
    /// Bytes.
    #[serde(alias = "disk-size")]
    pub disk_size: Option<i64>,
    /// -1 = the application's.
    #[serde(rename = "gpu-slots")]
    pub gpu_slots: Option<i64>,
    /// `amd`, `intel`, `nvidia` or empty.
    #[serde(rename = "gpu-type", deserialize_with = "nullable")]
    pub gpu_type: String,
    /// Slots of video cards.
    #[serde(rename = "vpu-slots")]
    pub vpu_slots: Option<i64>,
    /// Skip the logical disk quota.
    #[serde(deserialize_with = "nullable")]
    pub no_disk_reserve: bool,
}

/// Body of `PATCH /1.0/instances/{id}`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct InstancePatch {
    /// `started` or `running`, `stopped`; absent or empty: as it is.
    pub desired_status: Option<String>,
    /// Settings that can be changed.
    pub config: Option<InstanceConfigPatch>,
}

/// Settings that can be changed on an instance.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct InstanceConfigPatch {
    /// Protections.
    pub security: Option<SecurityPatch>,
}

/// Protections that can be changed on an instance.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct SecurityPatch {
    /// `DELETE` is refused.
    pub delete_protected: Option<bool>,
}

/// Body of `DELETE /1.0/instances` and `DELETE /1.0/applications`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct DeleteMany {
    /// Ids or names.
    #[serde(deserialize_with = "nullable")]
    pub ids: Vec<String>,
    /// Skip what would be done gracefully.
    #[serde(deserialize_with = "nullable")]
    pub force: bool,
}

/// A machine that hosts instances (ams-api section 12).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Node {
    /// Unique name.
    pub name: String,
    /// Where it is.
    #[serde(default)]
    pub address: String,
    /// Where clients reach it.
    #[serde(default)]
    pub public_address: String,
    /// Bytes, 0 = not known.
    #[serde(default)]
    pub network_bridge_mtu: u32,
    /// CPUs offered.
    #[serde(default)]
    pub cpus: u32,
    /// Over-commit factor.
    #[serde(default)]
    pub cpu_allocation_rate: f64,
    /// Size offered, e.g. `8GB`.
    #[serde(default)]
    pub memory: String,
    /// Over-commit factor.
    #[serde(default)]
    pub memory_allocation_rate: f64,
    /// 4 = online, 5 = offline.
    #[serde(default)]
    pub status_code: i32,
    /// Text of `status_code`.
    #[serde(default)]
    pub status: String,
    /// Leader of the database.
    #[serde(default)]
    pub is_master: bool,
    /// Size.
    #[serde(default)]
    pub disk_size: String,
    /// Instances that may share the GPUs.
    #[serde(default)]
    pub gpu_slots: u32,
    /// Parallel encodes.
    #[serde(default)]
    pub gpu_encoder_slots: u32,
    /// Free words for selectors.
    #[serde(default, deserialize_with = "nullable")]
    pub tags: Vec<String>,
    /// No new instances.
    #[serde(default)]
    pub unschedulable: bool,
    /// The same, misspelled as old clients expect it.
    #[serde(default)]
    pub unscheduable: bool,
    /// `x86_64` or `aarch64`.
    #[serde(default)]
    pub architecture: String,
    /// Storage pool.
    #[serde(default)]
    pub storage_pool: String,
    /// AMS prepared the machine itself.
    #[serde(default)]
    pub managed: bool,
    /// `container`.
    #[serde(default, deserialize_with = "nullable")]
    pub instance_types: Vec<String>,
    /// GPUs.
    #[serde(default, deserialize_with = "nullable")]
    pub gpus: Vec<nodes::NodeGpu>,
    /// Video cards.
    #[serde(default, deserialize_with = "nullable")]
    pub vpus: Vec<nodes::NodeVpu>,
    /// CPUs assigned to instances; our addition.
    #[serde(default)]
    pub used_cpus: u32,
    /// Bytes assigned to instances; our addition.
    #[serde(default)]
    pub used_memory_bytes: u64,
    /// What is wrong with it, for people; our addition.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub status_message: String,
}

/// What `manifest.yaml` of an application says (ams-model section 2.2; the last seven are ours).
///
/// Unknown keys are refused, because a person typed them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Manifest {
    /// Unique name.
    pub name: String,
    /// At most 50 characters.
    pub version: Option<YamlText>,
    /// Deprecated preset, e.g. `a4.3`.
    pub instance_type: Option<String>,
    /// Name or id of an image.
    pub image: Option<String>,
    /// Android permissions.
    pub required_permissions: Vec<String>,
    /// Names.
    pub addons: Vec<String>,
    /// Free words.
    pub tags: Vec<String>,
    /// Android package.
    pub boot_package: Option<String>,
    /// Android activity.
    pub boot_activity: Option<String>,
    /// `gpu`, `gpu-preferred`, `software`.
    pub video_encoder: Option<String>,
    /// What ends an instance early.
    pub watchdog: Option<Watchdog>,
    /// Ports to expose.
    pub services: Vec<Service>,
    /// What an instance takes.
    pub resources: Option<ManifestResources>,
    /// Files placed by name.
    pub extra_data: BTreeMap<String, Value>,
    /// Limits of hooks.
    pub hooks: Option<Hooks>,
    /// What survives the making of a version.
    pub bootstrap: Option<Bootstrap>,
    /// Feature flags.
    pub features: Vec<String>,
    /// Tags that a node must have.
    pub node_selector: Vec<String>,
    /// Program and arguments: a list, or a text that is split like a shell does, without any expansion.
    pub command: Command,
    /// Added to the environment.
    pub environment: BTreeMap<String, YamlText>,
    /// Absolute; default: the home folder of the instance.
    pub working_directory: Option<String>,
    /// What people read.
    pub title: Option<String>,
    /// One sentence.
    pub description: Option<String>,
    /// A file of the package: PNG, SVG, JPEG or WebP.
    pub icon: Option<String>,
    /// What happens when the program ends.
    pub restart: Restart,
    /// Instances that wait for a launch.
    pub pool: Pool,
}

/// Resources in a manifest.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ManifestResources {
    /// Whole CPUs, at least 1.
    pub cpus: Option<u32>,
    /// Size, e.g. `512MB`.
    pub memory: Option<YamlText>,
    /// Size.
    #[serde(rename = "disk-size", alias = "disk_size")]
    pub disk_size: Option<YamlText>,
    /// GPU slots.
    #[serde(rename = "gpu-slots")]
    pub gpu_slots: Option<i32>,
    /// `amd`, `intel`, `nvidia`.
    #[serde(rename = "gpu-type")]
    pub gpu_type: Option<String>,
    /// Slots of video cards.
    #[serde(rename = "vpu-slots")]
    pub vpu_slots: Option<i32>,
    /// Skip the logical disk quota.
    pub no_disk_reserve: bool,
}

/// A command as it may be written in a manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Command {
    /// Program and arguments.
    List(Vec<String>),
    /// To be split.
    Text(String),
}

impl Default for Command {
    fn default() -> Self {
        Self::List(Vec::new())
    }
}

/// A text that YAML may have read as a number or a truth value (`version: 1.0`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum YamlText {
    /// As written.
    Text(String),
    /// A whole number.
    Integer(i64),
    /// A number with a fraction.
    Number(f64),
    /// `true` or `false`.
    Truth(bool),
}

impl std::fmt::Display for YamlText {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Text(text) => f.write_str(text),
            Self::Integer(number) => number.fmt(f),
            // `1.0` was meant as it was written; without this it would come out as `1`.
            Self::Number(number) => write!(f, "{number:?}"),
            Self::Truth(truth) => truth.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_smallest_launch_of_the_original_client_is_understood() {
        let body = json!({
            "type": "", "app_id": "foo", "app_version": null, "image_id": "", "image_version": null,
            "node": "", "services": null, "resources": {"disk_size": null},
            "config": {"display": {"width": 0, "height": 0, "fps": 0, "density": 0}, "security": {}},
            "source": {"type": "", "id": ""}, "something_newer": [1, 2]
        });
        let post: InstancesPost = serde_json::from_value(body).expect("nulls, blanks and unknown members");
        assert_eq!(post.app_id, "foo");
        assert_eq!(post.source, Some(Source::default()));
        assert!(!post.config.enable_streaming);
    }

    #[test]
    fn both_spellings_of_the_disk_size_are_read() {
        for key in ["disk_size", "disk-size"] {
            let post: ResourcesPost = serde_json::from_value(json!({key: 5})).expect("valid");
            assert_eq!(post.disk_size, Some(5), "{key}");
        }
    }

    #[test]
    fn codes_and_statuses_of_instances_map_both_ways() {
        for status in InstanceStatus::ALL {
            assert_eq!(InstanceStatus::from_code(status.code()), status);
        }
        assert_eq!(InstanceStatus::from_code(99), InstanceStatus::Unknown);
    }

    #[test]
    fn the_session_of_an_instance_is_read_from_its_tags() {
        let instance = json!({"id": "i1", "name": "ams-i1", "type": "container", "status_code": 4,
            "status": "running", "tags": ["x", "session=s1"], "services": null});
        let instance: Instance = serde_json::from_value(instance).expect("lenient");
        assert_eq!(instance.session().map(String::from), Some("s1".into()));
        assert_eq!(instance.status(), InstanceStatus::Running);
    }
}
