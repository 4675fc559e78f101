//! Nodes: what the engine sees of its machines, together with what operators have set, is what placement may count on.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use fanlight_api::{
    NodeId,
    ams::{
        self,
        nodes::{GpuAllocation, NodeDelete, NodeGpu, NodePatch, NodeStatus, NodesPost},
    },
};
use fanlight_store::{Compare, Handle, Op, StoreError, StoreExt as _, encode};

use crate::{
    config,
    core::{
        model::{NodeRecord, OperationRecord, key},
        placement::{Allocations, GpuOffer, Offer},
    },
    engine::{Engine, EngineError, Machine, MachineJoin},
    events::unix_now,
    manifest,
    operations::Operations,
    settings::Settings,
    size,
};

/// How long what the engine said counts.
const FRESH: Duration = Duration::from_secs(10);
/// How long an engine that does not answer is believed to be as it was.
const PATIENCE: Duration = Duration::from_secs(30);

/// A request about nodes that cannot be met.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// No such node.
    #[error("node not found")]
    NotFound,
    /// The name is taken.
    #[error("node {0} already exists")]
    Exists(String),
    /// A value that is not allowed.
    #[error("argument {argument} is invalid: {reason}")]
    Invalid {
        /// Which.
        argument: &'static str,
        /// What is wrong, with the value.
        reason: String,
    },
    /// Something that must be given.
    #[error("{0} is required")]
    Required(&'static str),
    /// Instances are there.
    #[error("node {node} has {instances} instances: delete them first, or use force")]
    InUse {
        /// Which.
        node: String,
        /// How many.
        instances: usize,
    },
    /// The engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The store.
    #[error("the records of nodes cannot be used")]
    Store(#[from] StoreError),
}

/// A node with everything that is known of it.
#[derive(Clone, Debug)]
pub struct Node {
    /// As the engine sees it; while it is being added, or does not answer, with what is known.
    pub machine: Machine,
    /// What operators have set.
    pub record: NodeRecord,
    /// What it takes part in.
    pub offer: Offer,
    gpus: Vec<NodeGpu>,
    status: NodeStatus,
}

/// All nodes. Clones are handles of the same.
#[derive(Clone)]
pub struct Nodes {
    inner: Arc<Inner>,
}

struct Inner {
    config: config::Node,
    settings: Settings,
    engine: Arc<dyn Engine>,
    store: Handle,
    operations: Operations,
    seen: Mutex<Seen>,
    looking: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Seen {
    machines: BTreeMap<String, Machine>,
    at: Option<Instant>,
}

impl Nodes {
    /// Over this engine.
    pub fn new(
        config: config::Node,
        settings: Settings,
        engine: Arc<dyn Engine>,
        store: Handle,
        operations: Operations,
    ) -> Self {
        let (seen, looking) = (Mutex::default(), tokio::sync::Mutex::default());
        Self { inner: Arc::new(Inner { config, settings, engine, store, operations, seen, looking }) }
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.inner.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the engine sees, at most ten seconds old.
    async fn machines(&self) -> BTreeMap<String, Machine> {
        let fresh =
            |seen: &Seen| seen.at.is_some_and(|at| at.elapsed() < FRESH).then(|| seen.machines.clone());
        if let Some(machines) = fresh(&self.seen()) {
            return machines;
        }
        // One asks, the others have its answer.
        let _one = self.inner.looking.lock().await;
        if let Some(machines) = fresh(&self.seen()) {
            return machines;
        }
        let asked = self.inner.engine.machines().await;
        let mut seen = self.seen();
        match asked {
            Ok(machines) => {
                seen.machines = machines.into_iter().map(|machine| (machine.name.clone(), machine)).collect();
                seen.at = Some(Instant::now());
            }
            Err(error) => {
                tracing::warn!("looking at the nodes: {error}");
                if seen.at.is_none_or(|at| at.elapsed() > PATIENCE) {
                    for machine in seen.machines.values_mut() {
                        machine.online = false;
                        machine.message = error.to_string();
                    }
                }
            }
        }
        seen.machines.clone()
    }

    /// Forgets what the engine said, because something changed.
    pub fn look_again(&self) {
        self.seen().at = None;
    }

    /// All nodes, by name.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn list(&self) -> Result<Vec<Node>, StoreError> {
        let mut machines = self.machines().await;
        let records = self.inner.store.list_json::<NodeRecord>(key::NODES).await?;
        let mut records: BTreeMap<String, NodeRecord> =
            records.into_iter().map(|(_, record)| (record.value.name.clone(), record.value)).collect();
        for (name, machine) in &machines {
            records.entry(name.clone()).or_insert_with(|| NodeRecord::of(&machine.name));
        }
        let nodes = records.into_iter().map(|(name, record)| {
            let machine = machines.remove(&name);
            self.node(record, machine)
        });
        Ok(nodes.collect())
    }

    /// One node.
    ///
    /// # Errors
    /// There is none, or the store cannot be read.
    pub async fn find(&self, name: &str) -> Result<Node, NodeError> {
        self.list().await?.into_iter().find(|node| node.machine.name == name).ok_or(NodeError::NotFound)
    }

    fn node(&self, record: NodeRecord, machine: Option<Machine>) -> Node {
        let config = &self.inner.config;
        let status = match (&machine, &record.failed) {
            (Some(machine), _) if machine.online => NodeStatus::Online,
            (Some(_), _) => NodeStatus::Offline,
            (None, Some(_)) => NodeStatus::Error,
            (None, None) if record.joining => NodeStatus::Initializing,
            (None, None) => NodeStatus::Offline,
        };
        let machine = machine.unwrap_or_else(|| Machine {
            name: record.name.clone(),
            address: record.address.clone(),
            message: record.failed.clone().unwrap_or_else(|| "it is no member of the cluster".into()),
            ..Machine::default()
        });
        let cpus = given(record.cpus).or(given(config.cpus)).unwrap_or(machine.cpus);
        let memory_bytes = record
            .memory_bytes
            .or_else(|| size::parse(&config.memory).ok())
            .filter(|bytes| *bytes > 0)
            .unwrap_or(machine.memory_bytes);
        let values = self.inner.settings.get();
        let cpu_rate = record.cpu_allocation_rate.unwrap_or(values.cpu_allocation_rate);
        let memory_rate = record.memory_allocation_rate.unwrap_or(values.memory_allocation_rate);
        let gpus = self.gpus(&record, &machine);
        let offer = Offer {
            node: record.name.parse().unwrap_or_else(|_| NodeId::generate()),
            online: status == NodeStatus::Online,
            unschedulable: record.unschedulable.unwrap_or(config.unschedulable) || machine.evacuated,
            architecture: machine.architecture.clone(),
            tags: record.tags.clone().unwrap_or_else(|| config.tags.clone()),
            cpus: f64::from(cpus) * cpu_rate,
            memory_bytes: (memory_bytes as f64 * memory_rate) as u64,
            disk_bytes: machine.disk.map(|(all, _)| all).filter(|_| self.inner.engine.has_images()),
            disk_free_percent: machine.disk.map(|(all, free)| free as f64 * 100.0 / all.max(1) as f64),
            gpus: gpus
                .iter()
                .map(|gpu| GpuOffer {
                    id: gpu.id,
                    kind: gpu.kind.clone(),
                    slots: gpu.slots,
                    encoder_slots: gpu.encoder_slots,
                })
                .collect(),
            places: machine.places,
        };
        Node {
            record: NodeRecord { cpus, memory_bytes: Some(memory_bytes), ..record },
            machine,
            offer,
            gpus,
            status,
        }
    }

    /// The GPUs of a machine with their slots: of each GPU as set, else the node's divided among them, else by kind
    /// (ams-model section 6.1).
    fn gpus(&self, record: &NodeRecord, machine: &Machine) -> Vec<NodeGpu> {
        let count = u32::try_from(machine.gpus.len()).unwrap_or(u32::MAX).max(1);
        let divided = |all: u32, id: u32| all / count + u32::from(id < all % count);
        let gpus = machine.gpus.iter().zip(0_u32..).map(|(gpu, id)| {
            let (slots, encodes) = match gpu.kind.as_str() {
                "nvidia" => (32, 32),
                "intel" => (10, 10),
                // Whether these encode depends on the driver; who knows that it does sets it.
                _ => (10, 0),
            };
            let own = record.gpus.get(&id).copied().unwrap_or_default();
            NodeGpu {
                id,
                kind: gpu.kind.clone(),
                pci_address: gpu.pci_address.clone(),
                render_name: gpu.render_name.clone(),
                slots: own.slots.or(record.gpu_slots.map(|all| divided(all, id))).unwrap_or(slots),
                encoder_slots: own
                    .encoder_slots
                    .or(record.gpu_encoder_slots.map(|all| divided(all, id)))
                    .unwrap_or(encodes),
                allocations: BTreeMap::new(),
                numa_node: gpu.numa_node,
            }
        });
        gpus.collect()
    }

    /// A node as answered.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn show(&self, node: &Node) -> Result<ams::Node, StoreError> {
        let allocations = self
            .inner
            .store
            .get_json::<Allocations>(&key::allocations(&node.offer.node))
            .await?
            .map(|record| record.value)
            .unwrap_or_default();
        let used = allocations.used();
        let config = &self.inner.config;
        let values = self.inner.settings.get();
        let (record, machine) = (&node.record, &node.machine);
        let (status_code, status) = node.status.wire();
        let mut gpus = node.gpus.clone();
        for gpu in &mut gpus {
            gpu.allocations = allocations
                .instances
                .iter()
                .filter(|(_, share)| share.gpu == Some(gpu.id))
                .map(|(id, share)| {
                    let allocation = GpuAllocation {
                        gpus: vec![gpu.id],
                        slots: share.gpu_slots,
                        encoder_slots: share.encoder_slots,
                    };
                    (id.clone(), allocation)
                })
                .collect();
        }
        let unschedulable = node.offer.unschedulable;
        Ok(ams::Node {
            name: record.name.clone(),
            address: machine.address.clone(),
            public_address: record.public_address.clone().unwrap_or_else(|| config.public_address.clone()),
            network_bridge_mtu: 0,
            cpus: record.cpus,
            cpu_allocation_rate: record.cpu_allocation_rate.unwrap_or(values.cpu_allocation_rate),
            memory: size::format(record.memory_bytes.unwrap_or(machine.memory_bytes)),
            memory_allocation_rate: record.memory_allocation_rate.unwrap_or(values.memory_allocation_rate),
            status_code,
            status: status.into(),
            is_master: machine.leader,
            disk_size: machine.disk.map(|(all, _)| size::format(all)).unwrap_or_default(),
            gpu_slots: gpus.iter().map(|gpu| gpu.slots).sum(),
            gpu_encoder_slots: gpus.iter().map(|gpu| gpu.encoder_slots).sum(),
            tags: node.offer.tags.clone(),
            unschedulable,
            unscheduable: unschedulable,
            architecture: machine.architecture.clone(),
            storage_pool: machine.storage_pool.clone(),
            managed: record.managed,
            instance_types: vec!["container".into()],
            gpus,
            vpus: Vec::new(),
            used_cpus: used.cpus,
            used_memory_bytes: used.memory_bytes,
            status_message: machine.message.clone(),
        })
    }

    /// Takes a node in. The operation ends when it is online, or with the reason why not.
    ///
    /// # Errors
    /// The name is taken, or something is missing.
    pub async fn add(&self, post: NodesPost) -> Result<OperationRecord, NodeError> {
        let name = post.name.clone();
        if name.is_empty() {
            return Err(NodeError::Required("name"));
        }
        if name.parse::<NodeId>().is_err() {
            return Err(NodeError::Invalid { argument: "name", reason: format!("{:?}", short(&name)) });
        }
        if post.address.is_empty() && !post.unmanaged {
            return Err(NodeError::Required("address"));
        }
        let known = self.list().await?.into_iter().find(|node| node.machine.name == name);
        // A machine of an unmanaged cluster is seen before anybody names it.
        if known.is_some_and(|node| !post.unmanaged || node.record.created_at > 0) {
            return Err(NodeError::Exists(name));
        }
        let mut record = NodeRecord::of(&name);
        record.created_at = unix_now();
        record.address = post.address.clone();
        record.managed = !post.unmanaged;
        record.joining = true;
        apply(
            &mut record,
            &NodePatch {
                public_address: Some(post.public_address.clone()).filter(|text| !text.is_empty()),
                cpus: given(post.cpus),
                cpu_allocation_rate: Some(post.cpu_allocation_rate).filter(|rate| *rate != 0.0),
                memory: Some(post.memory.clone()).filter(|text| !text.is_empty()),
                memory_allocation_rate: Some(post.memory_allocation_rate).filter(|rate| *rate != 0.0),
                gpu_slots: post.gpu_slots,
                gpu_encoder_slots: post.gpu_encoder_slots,
                tags: Some(post.tags.clone()).filter(|tags| !tags.is_empty()),
                ..NodePatch::default()
            },
        )?;
        let url = format!("/1.0/nodes/{name}");
        let (operation, write) = self.inner.operations.prepare("Adding node", "nodes", &url, None);
        let key = key::node(&name);
        let ops = vec![Op::put(&key, encode(&key, &record)?), write];
        match self.inner.store.transact(vec![Compare::absent(&key)], ops).await {
            Ok(_) => {}
            Err(StoreError::Conflict) => return Err(NodeError::Exists(name)),
            Err(error) => return Err(error.into()),
        }
        self.inner.operations.begun(&operation);
        let secret = match post.trust_token.expose().is_empty() {
            true => post.trust_password,
            false => post.trust_token,
        };
        let storage = if post.storage_pool.is_empty() { post.storage_device } else { post.storage_pool };
        let join = MachineJoin { name, address: post.address, secret, unmanaged: post.unmanaged, storage };
        let (nodes, id) = (self.clone(), operation.operation.id.clone());
        tokio::spawn(async move {
            let joined = nodes.inner.engine.add_machine(&join).await;
            if let Err(error) = nodes.joined(&join.name, &id, joined).await {
                tracing::warn!("noting that node {} was added: {error}", join.name);
            }
        });
        Ok(operation)
    }

    async fn joined(
        &self,
        name: &str,
        operation: &fanlight_api::OperationId,
        joined: Result<(), EngineError>,
    ) -> Result<(), StoreError> {
        let failed = joined.err().map(|error| fanlight_service::telemetry::chain(&error));
        match &failed {
            None => tracing::info!("node {name} was added"),
            Some(reason) => tracing::warn!("node {name} could not be added: {reason}"),
        }
        self.inner
            .store
            .update_json::<NodeRecord, _, _>(&key::node(name), |record| {
                let mut record = record?;
                record.joining = false;
                record.failed.clone_from(&failed);
                Some(record)
            })
            .await?;
        self.look_again();
        self.inner.operations.finish(operation, failed.map_or(Ok(()), Err)).await
    }

    /// Changes what operators set.
    ///
    /// # Errors
    /// There is no such node, or a value is not allowed.
    pub async fn patch(&self, name: &str, patch: &NodePatch) -> Result<OperationRecord, NodeError> {
        let node = self.find(name).await?;
        // Looked at before anything is written.
        apply(&mut NodeRecord::of(name), patch)?;
        check_gpus(&node, patch)?;
        let url = format!("/1.0/nodes/{name}");
        let (operation, write) = self.inner.operations.prepare_done("Updating node", "nodes", &url, Ok(()));
        self.inner
            .store
            .update_json::<NodeRecord, _, _>(&key::node(name), |record| {
                let mut record = record.unwrap_or_else(|| NodeRecord::of(name));
                apply(&mut record, patch).ok()?;
                Some(record)
            })
            .await?;
        self.inner.store.transact(Vec::new(), vec![write]).await?;
        self.inner.operations.begun(&operation);
        Ok(operation)
    }

    /// Lets a node go.
    ///
    /// # Errors
    /// There is no such node, or instances are there and it is not forced.
    pub async fn remove(
        &self,
        name: &str,
        delete: &NodeDelete,
        instances: usize,
    ) -> Result<OperationRecord, NodeError> {
        let node = self.find(name).await?;
        if instances > 0 && !delete.force {
            return Err(NodeError::InUse { node: name.to_owned(), instances });
        }
        let is_member = node.status != NodeStatus::Error && node.status != NodeStatus::Initializing;
        if is_member && !delete.keep_in_cluster {
            self.inner.engine.remove_machine(name, delete.force).await?;
        }
        let url = format!("/1.0/nodes/{name}");
        let (operation, write) = self.inner.operations.prepare_done("Removing node", "nodes", &url, Ok(()));
        let ops = vec![Op::delete(key::node(name)), write];
        self.inner.store.transact(Vec::new(), ops).await?;
        self.look_again();
        self.inner.operations.begun(&operation);
        tracing::info!("node {name} was removed");
        Ok(operation)
    }
}

fn given(number: u32) -> Option<u32> {
    Some(number).filter(|number| *number > 0)
}

fn short(text: &str) -> String {
    text.chars().take(64).collect()
}

/// Slots are for GPUs that are there. Of a machine that is not seen, nobody knows which it has.
fn check_gpus(node: &Node, patch: &NodePatch) -> Result<(), NodeError> {
    if node.status != NodeStatus::Online {
        return Ok(());
    }
    let there: Vec<String> = node.gpus.iter().map(|gpu| gpu.id.to_string()).collect();
    let has = match there.is_empty() {
        true => "the node has no GPU".to_owned(),
        false => format!("the node has GPU {}", there.join(", ")),
    };
    let absent = patch.gpus.iter().flatten().find(|given| node.gpus.iter().all(|gpu| gpu.id != given.id));
    if let Some(gpu) = absent {
        return Err(NodeError::Invalid { argument: "gpus", reason: format!("{}: {has}", gpu.id) });
    }
    for (argument, slots) in [("gpu_slots", patch.gpu_slots), ("gpu_encoder_slots", patch.gpu_encoder_slots)]
    {
        if let Some(slots) = slots.filter(|slots| *slots > 0 && there.is_empty()) {
            return Err(NodeError::Invalid { argument, reason: format!("{slots}: {has}") });
        }
    }
    Ok(())
}

/// Applies what is given; everything is looked at first.
fn apply(record: &mut NodeRecord, patch: &NodePatch) -> Result<(), NodeError> {
    let invalid = |argument, reason: String| Err(NodeError::Invalid { argument, reason });
    for (argument, rate) in [
        ("cpu_allocation_rate", patch.cpu_allocation_rate),
        ("memory_allocation_rate", patch.memory_allocation_rate),
    ] {
        if rate.is_some_and(|rate| !(rate.is_finite() && rate >= 0.0)) {
            return invalid(argument, "a number above 0 is needed, or 0 for the default".into());
        }
    }
    let memory_bytes = match patch.memory.as_deref() {
        None => record.memory_bytes,
        Some("") => None,
        Some(text) => match size::parse(text) {
            Ok(bytes) => Some(bytes),
            Err(_) => return invalid("memory", format!("{:?} is not a size such as 3GB", short(text))),
        },
    };
    if let Some(tag) = patch.tags.iter().flatten().find(|tag| !manifest::is_tag(tag)) {
        return invalid("tags", format!("{:?}", short(tag)));
    }
    if patch.subnet.as_ref().is_some_and(|subnet| !subnet.is_empty()) {
        return invalid("subnet", "the addresses of instances are set at the engine's network".into());
    }
    record.memory_bytes = memory_bytes;
    record.public_address = patch.public_address.clone().or(record.public_address.take());
    record.cpus = patch.cpus.unwrap_or(record.cpus);
    for (own, given) in [
        (&mut record.cpu_allocation_rate, patch.cpu_allocation_rate),
        (&mut record.memory_allocation_rate, patch.memory_allocation_rate),
    ] {
        // 0 forgets what was set: from then on the default counts, also when it changes.
        *own = given.map_or(*own, |rate| Some(rate).filter(|rate| *rate != 0.0));
    }
    record.gpu_slots = patch.gpu_slots.or(record.gpu_slots);
    record.gpu_encoder_slots = patch.gpu_encoder_slots.or(record.gpu_encoder_slots);
    record.tags = patch.tags.clone().or(record.tags.take());
    record.unschedulable = patch.unschedulable.or(patch.unscheduable).or(record.unschedulable);
    for gpu in patch.gpus.iter().flatten() {
        let own = record.gpus.entry(gpu.id).or_default();
        own.slots = gpu.slots.or(own.slots);
        own.encoder_slots = gpu.encoder_slots.or(own.encoder_slots);
    }
    Ok(())
}
