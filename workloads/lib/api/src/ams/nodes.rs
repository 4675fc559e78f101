//! Bodies about nodes (ams-api section 12). The object is shaped after LXD; other engines fill in what they have.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::nullable;
use crate::InstanceId;

/// Status of a node (ams-model section 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NodeStatus {
    /// Could not be added.
    Error,
    /// Being added.
    Initializing,
    /// Takes instances.
    Online,
    /// Does not answer.
    Offline,
    /// Being removed.
    Deleted,
}

impl NodeStatus {
    /// Number and text on the wire.
    pub fn wire(self) -> (i32, &'static str) {
        match self {
            Self::Error => (-1, "error"),
            Self::Initializing => (2, "initializing"),
            Self::Online => (4, "online"),
            Self::Offline => (5, "offline"),
            Self::Deleted => (6, "deleted"),
        }
    }
}

/// A GPU of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeGpu {
    /// Number on the node, from 0.
    pub id: u32,
    /// `amd`, `intel` or `nvidia`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Address on the bus, e.g. `0000:01:00.0`.
    pub pci_address: String,
    /// Name of the render node, e.g. `renderD128`; empty: none.
    pub render_name: String,
    /// Instances that may share it.
    pub slots: u32,
    /// Parallel encodes.
    pub encoder_slots: u32,
    /// What is taken, by instance.
    #[serde(deserialize_with = "nullable")]
    pub allocations: BTreeMap<InstanceId, GpuAllocation>,
    /// Where it is in the machine.
    pub numa_node: u32,
}

/// What an instance has of a GPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GpuAllocation {
    /// Numbers of GPUs.
    pub gpus: Vec<u32>,
    /// Slots.
    pub slots: u32,
    /// Parallel encodes.
    pub encoder_slots: u32,
}

/// Body of `POST /1.0/nodes`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct NodesPost {
    /// Unique name.
    #[serde(deserialize_with = "nullable")]
    pub name: String,
    /// Where its engine answers, host or `host:port`.
    #[serde(deserialize_with = "nullable")]
    pub address: String,
    /// Where clients reach it.
    #[serde(deserialize_with = "nullable")]
    pub public_address: String,
    /// Lets AMS in (older LXD).
    #[serde(deserialize_with = "nullable")]
    pub trust_password: crate::Secret,
    /// Lets AMS in (LXD 5.21 and later).
    #[serde(deserialize_with = "nullable")]
    pub trust_token: crate::Secret,
    /// Bytes; 0 = the engine's default.
    #[serde(deserialize_with = "nullable")]
    pub network_bridge_mtu: u32,
    /// Name of the bridge.
    #[serde(deserialize_with = "nullable")]
    pub network_name: String,
    /// Address and prefix of the bridge.
    #[serde(deserialize_with = "nullable")]
    pub network_subnet: String,
    /// Rules of the bridge.
    #[serde(deserialize_with = "nullable")]
    pub network_acl_name: String,
    /// Block device for the storage pool.
    #[serde(deserialize_with = "nullable")]
    pub storage_device: String,
    /// Name of a storage pool that is there.
    #[serde(deserialize_with = "nullable")]
    pub storage_pool: String,
    /// CPUs offered; 0 = all.
    #[serde(deserialize_with = "nullable")]
    pub cpus: u32,
    /// Over-commit factor; 0 = default.
    #[serde(deserialize_with = "nullable")]
    pub cpu_allocation_rate: f64,
    /// Size offered; empty = all.
    #[serde(deserialize_with = "nullable")]
    pub memory: String,
    /// Over-commit factor; 0 = default.
    #[serde(deserialize_with = "nullable")]
    pub memory_allocation_rate: f64,
    /// Instances that may share the GPUs; absent = by the GPUs there are.
    pub gpu_slots: Option<u32>,
    /// Parallel encodes; absent = by the GPUs there are.
    pub gpu_encoder_slots: Option<u32>,
    /// Words for selectors.
    #[serde(deserialize_with = "nullable")]
    pub tags: Vec<String>,
    /// The machine is a member already; AMS does not set it up.
    #[serde(deserialize_with = "nullable")]
    pub unmanaged: bool,
}

/// Body of `PATCH /1.0/nodes/{name}`. The original's client sends every member, unset ones as `null`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct NodePatch {
    /// Where clients reach it.
    pub public_address: Option<String>,
    /// CPUs offered; 0 = all.
    pub cpus: Option<u32>,
    /// Over-commit factor; 0 = default.
    pub cpu_allocation_rate: Option<f64>,
    /// Size offered; empty = all.
    pub memory: Option<String>,
    /// Over-commit factor; 0 = default.
    pub memory_allocation_rate: Option<f64>,
    /// Instances that may share the GPUs.
    pub gpu_slots: Option<u32>,
    /// Parallel encodes.
    pub gpu_encoder_slots: Option<u32>,
    /// Words for selectors.
    pub tags: Option<Vec<String>>,
    /// No new instances.
    pub unschedulable: Option<bool>,
    /// The same, misspelled as old clients send it.
    pub unscheduable: Option<bool>,
    /// Single GPUs.
    pub gpus: Option<Vec<NodeGpuPatch>>,
    /// Addresses of instances.
    pub subnet: Option<String>,
}

/// Slots of a single GPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct NodeGpuPatch {
    /// Number on the node.
    pub id: u32,
    /// Instances that may share it.
    pub slots: Option<u32>,
    /// Parallel encodes.
    pub encoder_slots: Option<u32>,
}

/// Body of `DELETE /1.0/nodes/{name}`; may be absent.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct NodeDelete {
    /// Although instances are there; they are lost.
    #[serde(deserialize_with = "nullable")]
    pub force: bool,
    /// Leaves the machine in the engine's cluster.
    #[serde(deserialize_with = "nullable")]
    pub keep_in_cluster: bool,
}

/// A video card; none is supported, so the list is always empty.
pub type NodeVpu = Value;
