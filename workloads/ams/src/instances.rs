//! Instances: requests write down what should be, one task per instance makes it so.
//!
//! A task looks at the record and at the engine, asks [`life`] what follows, writes it, does it, and looks again
//! when something changed. It holds no state that matters: killed at any point and started again, it goes on.

use std::{
    cmp::Ordering,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use fanlight_api::{
    InstanceId, NodeId, OperationId, PROTOCOL_VERSION,
    ams::{
        InstancePatch, InstanceStatus, InstancesPost, Resources,
        images::{ImageSource, ImagesPost},
    },
    bus::AgentSessionsPost,
    gateway::{Screen, ScreenPatch},
    guest::{Guest, GuestApplication, Media},
};
use fanlight_store::{Compare, Op, Record, Revision, StoreError, StoreExt as _, encode};
use futures_util::FutureExt as _;
use tokio::sync::Notify;

use crate::{
    Ams,
    catalog::CatalogError,
    core::{
        life::{self, Action, Seen, Watch},
        model::{
            AddonRef, ApplicationRef, Goal, ImageRef, InstanceRecord, Intent, LaunchRecord, Observed,
            OperationRecord, Reach, Session, Target, VersionRecord, extra_data, key, session_tag,
        },
        placement::{self, Allocations, Encoder, Placed, Refusal, Wish},
        pool,
    },
    engine::{EngineError, Spec, SpecAddon},
    events::unix_now,
    fault,
    images::{self, ImageError},
    manifest,
    pools::{Claimed, Wanting},
};

/// What an image runs by itself; every image has it.
const IMAGE_PROGRAM: &str = "/usr/lib/fanlight/session";
/// Most bytes of `user_data`.
const MAX_USER_DATA: usize = 10_240;
/// Most tags of an instance.
const MAX_TAGS: usize = 100;
/// Longest idempotency key, bytes.
const MAX_KEY: usize = 255;
/// How often a change begins again when others were faster.
const ATTEMPTS: u32 = 64;
/// How long an agent is asked to end a session of an instance that is gone.
const END_SESSION: Duration = Duration::from_secs(600);
/// How long a launch waits for the room of instances that were given up for it, and how often it looks.
const ROOM_TIME: Duration = Duration::from_secs(10);
const ROOM_PAUSE: Duration = Duration::from_millis(100);
/// How often an instance is looked at when nothing happens.
const TICK: Duration = Duration::from_secs(30);

/// A request about instances that cannot be met.
#[derive(Debug, thiserror::Error)]
pub enum InstanceError {
    /// No such instance.
    #[error("instance not found")]
    NotFound,
    /// A value that is not allowed.
    #[error("argument {argument} is invalid: {reason}")]
    Invalid {
        /// Which.
        argument: &'static str,
        /// What is wrong, with the value.
        reason: String,
    },
    /// Something that this image, or this version, does not have.
    #[error("{0}")]
    Unsupported(String),
    /// Something that must be given.
    #[error("{0} is required")]
    Required(&'static str),
    /// The name is taken.
    #[error("instance {0} already exists")]
    Exists(String),
    /// Something named does not exist.
    #[error("{0}")]
    Missing(String),
    /// A newer launch under the same key was accepted.
    #[error("attempt {attempt} of launch {scope} is too old: attempt {newest} was accepted")]
    OldAttempt {
        /// Of the key.
        scope: String,
        /// Of this request.
        attempt: u64,
        /// That counts.
        newest: u64,
    },
    /// Protected by its settings.
    #[error("instance {0} is delete protected")]
    Protected(String),
    /// The application.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// The image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// No room.
    #[error(transparent)]
    NoRoom(#[from] Refusal),
    /// The store.
    #[error("the records of instances cannot be used")]
    Store(#[from] StoreError),
}

/// What was asked for at launch, checked.
pub(crate) struct Checked {
    pub record: InstanceRecord,
    pub wish: Wish,
}

impl Ams {
    /// All instances, oldest first.
    pub(crate) async fn list_instances(&self) -> Result<Vec<Arc<InstanceRecord>>, StoreError> {
        let mut list = match self.config.store.is_shared() {
            // Others write too, and what is told may be late: who reads a list to find out what is gone must not
            // be told an old one.
            true => {
                let records = self.store.list_json::<InstanceRecord>(key::INSTANCES).await?;
                records.into_iter().map(|(_, record)| Arc::new(record.value)).collect()
            }
            false => self.index.list().await,
        };
        list.sort_by(|a, b| (a.created_at, &a.id).cmp(&(b.created_at, &b.id)));
        Ok(list)
    }

    /// One instance, by id or name.
    pub(crate) async fn find_instance(
        &self,
        id_or_name: &str,
    ) -> Result<Record<InstanceRecord>, InstanceError> {
        let id: InstanceId = id_or_name.parse().map_err(|_| InstanceError::NotFound)?;
        if let Some(record) = self.store.get_json(&key::instance(&id)).await? {
            return Ok(record);
        }
        let by_name: Option<Record<InstanceId>> =
            self.store.get_json(&key::instance_name(id_or_name)).await?;
        let Some(by_name) = by_name else { return Err(InstanceError::NotFound) };
        self.store.get_json(&key::instance(&by_name.value)).await?.ok_or(InstanceError::NotFound)
    }

    /// An instance as answered.
    pub(crate) async fn show_instance(&self, record: &InstanceRecord) -> fanlight_api::ams::Instance {
        let nodes = self.nodes.list().await.unwrap_or_default();
        self.look(record, &nodes).await.show(record)
    }

    /// What the engine and these nodes know of an instance.
    pub(crate) async fn look(&self, record: &InstanceRecord, nodes: &[crate::nodes::Node]) -> Look {
        let (address, public_address) = self.addresses(record, nodes).await;
        let tells = match record.observed.status {
            InstanceStatus::Started => true,
            // Where it stays without its application, this says why that ended.
            InstanceStatus::Running => record.config.devmode,
            _ => false,
        };
        let status_message = match record.observed.message.is_empty() && tells {
            true => self.engine.status(&record.id).await,
            false => record.observed.message.clone(),
        };
        Look { address, public_address, status_message, logs: self.engine.logs(&record.id).await }
    }

    /// The address of an instance, and the public one of its node.
    async fn addresses(&self, record: &InstanceRecord, nodes: &[crate::nodes::Node]) -> (String, String) {
        let Some(node) = &record.node else { return Default::default() };
        let node = nodes.iter().find(|known| known.offer.node == *node);
        let shown = node.map(|node| {
            let public = node.record.public_address.as_ref().unwrap_or(&self.config.node.public_address);
            (node.machine.address.clone(), public.clone())
        });
        let (of_node, public_address) = shown.unwrap_or_default();
        let own = self.engine.address(&record.id).await.map(|address| address.to_string());
        (own.unwrap_or(of_node), public_address)
    }

    /// Writes down a launch. The same `idempotency_key` again is the same instance.
    pub(crate) async fn create_instance(
        &self,
        post: InstancesPost,
        no_wait: bool,
        idempotency_key: Option<&str>,
    ) -> Result<OperationRecord, InstanceError> {
        let launch = idempotency_key.map(parse_key).transpose()?;
        // Known launches first: what they named may be gone by now.
        if let Some((scope, attempt)) = &launch
            && let Some(known) = self.store.get_json::<LaunchRecord>(&key::launch(scope)).await?
            && let Some(operation) = self.known_launch(scope, *attempt, &known.value).await?
        {
            return Ok(operation);
        }
        let Checked { record: checked, wish } = self.check_launch(post).await?;
        // Other launches of this process would only make each other begin again.
        let mut one = Some(self.creating.lock().await);
        let room_until = Instant::now() + ROOM_TIME;
        let mut wanting: Option<Wanting> = None;
        let mut conflicts = 0;
        while conflicts < ATTEMPTS {
            let mut record = checked.clone();
            let (mut compares, mut ops) = (Vec::new(), Vec::new());
            // What waits and can be had has its share already.
            let waiting = self.find_waiting(&checked, &wish).await?;
            if let Some(Record { value: waiting, revision }) = &waiting {
                record = pool::claim(waiting, &checked, unix_now());
                compares.push(Compare::revision(key::instance(&record.id), *revision));
            } else {
                compares.push(Compare::absent(key::instance(&record.id)));
            }
            let name_before = waiting.as_ref().map(|waiting| &waiting.value.name);
            if name_before != Some(&record.name) {
                let name_key = key::instance_name(&record.name);
                if self.store.get(&name_key).await?.is_some() {
                    return Err(InstanceError::Exists(record.name));
                }
                compares.push(Compare::absent(&name_key));
                ops.push(Op::put(&name_key, encode(&name_key, &record.id)?));
                ops.extend(name_before.map(|name| Op::delete(key::instance_name(name))));
            }
            if waiting.is_none() {
                match self.reserve(&wish, &record.id, &mut compares, &mut ops).await? {
                    Ok(placed) => {
                        record.put(placed.node, placed.share);
                        if let Err(reason) = self.give_ports(&mut record).await? {
                            record.node = None;
                            record.observed = life::failed(&record, reason, unix_now());
                        }
                    }
                    Err(refusal) => {
                        if Instant::now() < room_until
                            && let Some(wanted) = self.make_room(&wish).await?
                        {
                            // The room is there when they are gone; until then others may go on.
                            wanting = Some(wanted);
                            drop(one.take());
                            tokio::time::sleep(ROOM_PAUSE).await;
                            one = Some(self.creating.lock().await);
                            continue;
                        }
                        record.observed = life::failed(&record, refusal.to_string(), unix_now());
                    }
                }
            }
            let url = record.url();
            let reach = match record.intent.target {
                Target::Prepared => Reach::Prepared,
                _ => Reach::Running { run: record.intent.run },
            };
            let description = "Creating instance";
            let (operation, write) = if record.node.is_none() {
                let result = Err(record.observed.error.clone());
                self.operations.prepare_done(description, "instances", &url, result)
            } else if no_wait {
                self.operations.prepare_done(description, "instances", &url, Ok(()))
            } else {
                let goal = Goal { instance: record.id.clone(), reach };
                self.operations.prepare(description, "instances", &url, Some(goal))
            };
            ops.push(write);
            let mut superseded = None;
            if let Some((scope, attempt)) = &launch {
                let launch_key = key::launch(scope);
                let known = self.store.get_json::<LaunchRecord>(&launch_key).await?;
                match &known {
                    None => compares.push(Compare::absent(&launch_key)),
                    Some(known) => {
                        if let Some(operation) = self.known_launch(scope, *attempt, &known.value).await? {
                            return Ok(operation);
                        }
                        compares.push(Compare::revision(&launch_key, known.revision));
                        superseded = self.supersede(&known.value.instance, &mut compares, &mut ops).await?;
                    }
                }
                let launch = LaunchRecord {
                    attempt: *attempt,
                    instance: record.id.clone(),
                    operation: operation.operation.id.clone(),
                    at: unix_now(),
                };
                ops.push(Op::put(&launch_key, encode(&launch_key, &launch)?));
            }
            let key = key::instance(&record.id);
            ops.push(Op::put(&key, encode(&key, &record)?));
            match self.store.transact(compares, ops).await {
                Ok(_) => {}
                Err(StoreError::Conflict) => {
                    conflicts += 1;
                    continue;
                }
                Err(error) => return Err(error.into()),
            }
            drop((one, wanting));
            let how = if waiting.is_some() { "taken from the pool" } else { "created" };
            tracing::info!(
                instance.id = %record.id,
                "instance {} of {} was {how}", record.id, record.program_name()
            );
            self.operations.begun(&operation);
            if let Some(old) = superseded {
                self.nudge(&old);
            }
            self.reconcile(&record.id);
            return Ok(operation);
        }
        Err(StoreError::Conflict.into())
    }

    /// What a launch that was accepted before is answered again; none: this one is newer.
    async fn known_launch(
        &self,
        scope: &str,
        attempt: u64,
        known: &LaunchRecord,
    ) -> Result<Option<OperationRecord>, InstanceError> {
        match known.judge(attempt) {
            Ordering::Greater => return Ok(None),
            Ordering::Less => {
                return Err(InstanceError::OldAttempt {
                    scope: scope.to_owned(),
                    attempt,
                    newest: known.attempt,
                });
            }
            Ordering::Equal => {}
        }
        let stored = self.store.get_json::<OperationRecord>(&key::operation(&known.operation)).await?;
        if let Some(stored) = stored {
            return Ok(Some(stored.value));
        }
        let there = self.store.get(&key::instance(&known.instance)).await?.is_some();
        let result = if there { Ok(()) } else { Err("instance not found".to_owned()) };
        let url = format!("/1.0/instances/{}", known.instance);
        let (operation, write) = self.operations.prepare_done("Creating instance", "instances", &url, result);
        self.store.transact(Vec::new(), vec![write]).await?;
        self.operations.begun(&operation);
        Ok(Some(operation))
    }

    /// The instance of an older attempt ends with the newer one: nobody else would end it.
    async fn supersede(
        &self,
        id: &InstanceId,
        compares: &mut Vec<Compare>,
        ops: &mut Vec<Op>,
    ) -> Result<Option<InstanceId>, InstanceError> {
        let key = key::instance(id);
        let Some(Record { value: mut old, revision }) = self.store.get_json::<InstanceRecord>(&key).await?
        else {
            return Ok(None);
        };
        if old.intent.target == Target::Deleted {
            return Ok(None);
        }
        old.intent = old.intent.delete(true, unix_now());
        compares.push(Compare::revision(&key, revision));
        ops.push(Op::put(&key, encode(&key, &old)?));
        Ok(Some(id.clone()))
    }

    /// Finds a node and adds the share to what it has promised, with a place of its own.
    pub(crate) async fn reserve(
        &self,
        wish: &Wish,
        id: &InstanceId,
        compares: &mut Vec<Compare>,
        ops: &mut Vec<Op>,
    ) -> Result<Result<Placed, Refusal>, InstanceError> {
        let mut nodes = Vec::new();
        for node in self.nodes.list().await? {
            let key = key::allocations(&node.offer.node);
            let stored = self.store.get_json::<Allocations>(&key).await?;
            let (mut allocations, compare) = match stored {
                Some(stored) => (stored.value, Compare::revision(&key, stored.revision)),
                None => (Allocations::default(), Compare::absent(&key)),
            };
            // What it has already, at rest, does not count against itself, and its place stays its own.
            let kept = allocations.instances.remove(id);
            let used = allocations.used();
            nodes.push((node.offer, used, allocations, compare, key, kept));
        }
        let offers = nodes.iter().map(|(offer, used, ..)| (offer, used));
        let mut placed = match placement::place(wish, self.settings.get().strategy, offers) {
            Ok(placed) => placed,
            Err(refusal) => return Ok(Err(refusal)),
        };
        for (offer, _, mut allocations, compare, key, kept) in nodes {
            if offer.node != placed.node {
                continue;
            }
            placed.share.place = kept.map_or_else(|| allocations.free_place(), |share| share.place);
            allocations.instances.insert(id.clone(), placed.share);
            compares.push(compare);
            ops.push(Op::put(&key, encode(&key, &allocations)?));
        }
        Ok(Ok(placed))
    }

    /// Gives the services of an instance ports of its node that no other instance there has. The transaction that
    /// changes the node's shares makes sure that nobody takes them at the same time.
    pub(crate) async fn give_ports(
        &self,
        record: &mut InstanceRecord,
    ) -> Result<Result<(), String>, StoreError> {
        if record.services.is_empty() {
            return Ok(Ok(()));
        }
        let mut taken = std::collections::BTreeSet::new();
        for (_, other) in self.store.list_json::<InstanceRecord>(key::INSTANCES).await? {
            let other = other.value;
            if other.node == record.node && other.id != record.id {
                for service in &other.services {
                    taken.extend(service.node_port..=service.node_port_end.max(service.node_port));
                }
            }
        }
        let ports = &self.config.node.service_ports;
        for service in &mut record.services {
            let more = service.port_end.saturating_sub(service.port);
            let found = (ports.first..=ports.last.saturating_sub(more))
                .find(|first| (*first..=first + more).all(|port| !taken.contains(&port)));
            let Some(first) = found else {
                return Ok(Err(format!(
                    "No suitable node to satisfy instance requirement available (no free ports for service {:?} of \
                     {} to {})",
                    service.name, ports.first, ports.last
                )));
            };
            taken.extend(first..=first + more);
            service.node_port = first;
            service.node_port_end = if service.port_end == 0 { 0 } else { first + more };
        }
        Ok(Ok(()))
    }

    pub(crate) async fn check_launch(&self, post: InstancesPost) -> Result<Checked, InstanceError> {
        let invalid = |argument, reason: String| InstanceError::Invalid { argument, reason };
        let unsupported = |what: &str| {
            Err(InstanceError::Unsupported(format!("{what} not supported: no image here has it")))
        };
        let source = self.source(&post).await?;
        if !post.image_id.is_empty() && !post.app_id.is_empty() {
            return Err(invalid("image_id", "it excludes app_id".into()));
        }
        if !post.image_id.is_empty() && !self.engine.has_images() {
            return Err(InstanceError::Unsupported(
                "image_id not supported: an instance needs an application where it runs the programs of the machine"
                    .into(),
            ));
        }
        if post.app_id.is_empty() && post.image_id.is_empty() && source.is_none() {
            return Err(InstanceError::Required("app_id"));
        }
        images::check_kind(&post.kind)?;
        for (given, what) in [
            (!post.addons.is_empty() && !self.engine.has_images(), "addons"),
            (!post.services.is_empty() && !self.engine.has_images(), "services"),
            (!post.config.boot_package.is_empty(), "config.boot_package"),
            (!post.config.boot_activity.is_empty(), "config.boot_activity"),
            (!post.config.metrics_server.is_empty(), "config.metrics_server"),
            (post.resources.vpu_slots.is_some_and(|slots| slots > 0), "resources.vpu-slots"),
        ] {
            if given {
                return unsupported(what);
            }
        }
        let platform = &post.config.platform;
        let is_platform =
            |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b':' | b'.');
        if !platform.is_empty()
            && (!(3..=255).contains(&platform.len()) || !platform.bytes().all(is_platform))
        {
            return Err(invalid("config.platform", format!("{:?}", short(platform))));
        }
        if !post.addons.is_empty() && post.image_id.is_empty() {
            return Err(invalid("addons", "an application names its addons in its manifest".into()));
        }
        let what = match &source {
            Some(source) => self.what_it_ran(source).await?,
            None => self.what_to_run(&post).await?,
        };
        let pin = match post.node.as_str() {
            "" => None,
            name => match self.nodes.find(name).await {
                Ok(node) => Some(node.offer.node),
                Err(_) => return Err(InstanceError::Missing(format!("node {} not found", short(name)))),
            },
        };
        let mut resources = self.resources(&post, &what.manifest)?;
        if let Some(source) = &source {
            // Its files must fit.
            resources.disk_size = resources.disk_size.max(source.resources.disk_size);
        }
        let services = match post.services.is_empty() {
            true => what.manifest.services.clone(),
            false => manifest::check_services(post.services.clone())
                .map_err(|reason| invalid("services", reason))?,
        };
        let encoder = match what.manifest.video_encoder.as_str() {
            "gpu" => Encoder::Gpu,
            // Who wants no slot has no share of a GPU, and so none of its encoders.
            "gpu-preferred" if !wants_no_gpu(&post, &what.manifest) => Encoder::GpuPreferred,
            _ => Encoder::Software,
        };
        if encoder == Encoder::Gpu {
            resources.gpu_slots = resources.gpu_slots.max(1);
        }
        if post.user_data.as_ref().is_some_and(|data| data.len() > MAX_USER_DATA) {
            return Err(invalid("user_data", format!("at most {MAX_USER_DATA} bytes are allowed")));
        }
        let id = InstanceId::generate();
        let name = match post.name.as_str() {
            "" => format!("ams-{id}"),
            name if is_instance_name(name) => name.to_owned(),
            name => {
                return Err(invalid(
                    "name",
                    format!("{:?}: 3 to 63 letters, digits and - are allowed, no - at the ends", short(name)),
                ));
            }
        };
        let display = display(&post)?;
        let mut tags = post.tags;
        let own_tag = post.streaming.as_ref().map(|streaming| session_tag(&streaming.session_id));
        for tag in &tags {
            if !manifest::is_tag(tag) || tags.len() > MAX_TAGS {
                return Err(invalid(
                    "tags",
                    format!("{:?}: at most {MAX_TAGS} of at most 255 characters, no commas", short(tag)),
                ));
            }
            if tag.starts_with("session=") && Some(tag) != own_tag.as_ref() {
                return Err(invalid("tags", "session= is set by AMS".into()));
            }
        }
        let mut config = post.config;
        let session = match post.streaming {
            Some(mut streaming) => {
                if let Some(data) = post.user_data.as_deref().filter(|_| streaming.extra_data.is_null()) {
                    streaming.extra_data = extra_data(data);
                }
                config.enable_streaming = true;
                Session::Given { streaming }
            }
            None if config.enable_streaming && self.agent.is_none() => {
                return Err(InstanceError::Unsupported(
                    "config.enable_streaming not supported: no agent is configured (agent.url)".into(),
                ));
            }
            None if config.enable_streaming => Session::Wanted,
            None => Session::None,
        };
        // The tag of its own session is shown from the session.
        tags.retain(|tag| Some(tag) != own_tag.as_ref());
        config.display = display.into();
        let now = unix_now();
        let target = if post.no_start { Target::Prepared } else { Target::Running };
        let record = InstanceRecord {
            id,
            name,
            created_at: now,
            application: what.application,
            program: what.program,
            image: what.image,
            services,
            base: false,
            copy_of: source.map(|source| source.id),
            addons: what.addons,
            pool: None,
            encoder,
            place: 0,
            gpu: None,
            config,
            display,
            resources,
            tags,
            user_data: post.user_data,
            node: None,
            architecture: std::env::consts::ARCH.into(),
            session,
            intent: Intent { target, run: u32::from(!post.no_start), force: false, since: now },
            observed: Observed {
                status: InstanceStatus::Created,
                run: 0,
                message: String::new(),
                error: String::new(),
                since: now,
            },
        };
        let wish = wish(&record, pin, what.selector);
        Ok(Checked { record, wish })
    }

    /// The instance that is to be copied; none: the new one begins afresh.
    async fn source(&self, post: &InstancesPost) -> Result<Option<InstanceRecord>, InstanceError> {
        let Some(source) =
            post.source.as_ref().filter(|source| !source.id.is_empty() || !source.kind.is_empty())
        else {
            return Ok(None);
        };
        let invalid = |argument, reason: String| InstanceError::Invalid { argument, reason };
        if source.kind != "instance" {
            return Err(invalid(
                "source.type",
                format!("{:?}: only instance is allowed", short(&source.kind)),
            ));
        }
        for (given, argument) in
            [(!post.app_id.is_empty(), "app_id"), (!post.image_id.is_empty(), "image_id")]
        {
            if given {
                return Err(invalid(argument, "a copy runs what its source ran".into()));
            }
        }
        let record = self.find_instance(&source.id).await?.value;
        if record.base || record.intent.target == Target::Deleted {
            return Err(InstanceError::Unsupported("this instance cannot be copied".into()));
        }
        match record.observed.status {
            InstanceStatus::Stopped | InstanceStatus::Error => Ok(Some(record)),
            _ => Err(InstanceError::Unsupported("instance must be stopped".into())),
        }
    }

    /// What a copy runs: the same as its source, whatever became of the application and the image since.
    async fn what_it_ran(&self, source: &InstanceRecord) -> Result<What, InstanceError> {
        let mut what = What {
            application: source.application.clone(),
            program: source.program.clone(),
            image: source.image.clone(),
            manifest: manifest::Checked { video_encoder: "gpu-preferred".into(), ..Default::default() },
            selector: Vec::new(),
            addons: source.addons.clone(),
        };
        if let Some(of) = &source.application {
            let application = self.catalog.find(of.id.as_str()).await?.value;
            let (_, version) = application.launchable(Some(of.version)).map_err(InstanceError::Missing)?;
            what.manifest = version.manifest.clone();
            what.selector = application.selector();
        }
        Ok(what)
    }

    /// What an instance runs: a version of an application, or what its image runs by itself.
    async fn what_to_run(&self, post: &InstancesPost) -> Result<What, InstanceError> {
        if post.app_id.is_empty() {
            let image = self.images.resolve(&post.image_id, post.image_version).await?;
            let program = GuestApplication {
                name: image.name.clone(),
                command: vec![IMAGE_PROGRAM.into()],
                ..GuestApplication::default()
            };
            let manifest = manifest::Checked { video_encoder: "gpu-preferred".into(), ..Default::default() };
            let addons = self.addons.resolve(&post.addons).await?;
            return Ok(What { application: None, program, image, manifest, selector: Vec::new(), addons });
        }
        let application = self.catalog.find(&post.app_id).await?.value;
        let number = match post.app_version {
            None | Some(-1) => None,
            Some(number) => Some(u32::try_from(number).map_err(|_| InstanceError::Invalid {
                argument: "app_version",
                reason: format!("{number}: a number from 0 is needed"),
            })?),
        };
        let (number, version) = application.launchable(number).map_err(InstanceError::Missing)?;
        let manifest = version.manifest.clone();
        Ok(What {
            program: program(&application.name, version),
            image: version.image.clone(),
            addons: version.addons.clone(),
            selector: application.selector(),
            application: Some(ApplicationRef {
                id: application.id.clone(),
                name: application.name.clone(),
                version: number,
            }),
            manifest,
        })
    }

    /// Makes the helper in which a version of an application is made; see [`crate::bootstrap`].
    pub(crate) async fn create_base(
        &self,
        application: &ApplicationRef,
        version: &VersionRecord,
        selector: Vec<String>,
    ) -> Result<InstanceId, InstanceError> {
        let id = InstanceId::generate();
        let now = unix_now();
        let mut record = InstanceRecord {
            name: format!("ams-{id}"),
            id: id.clone(),
            created_at: now,
            application: Some(application.clone()),
            program: program(&application.name, version),
            image: version.image.clone(),
            services: Vec::new(),
            base: true,
            copy_of: None,
            addons: version.addons.clone(),
            pool: None,
            encoder: Encoder::Software,
            place: 0,
            gpu: None,
            config: Default::default(),
            display: Screen::default(),
            resources: self.resources(&InstancesPost::default(), &version.manifest)?,
            tags: Vec::new(),
            user_data: None,
            node: None,
            architecture: std::env::consts::ARCH.into(),
            session: Session::None,
            intent: Intent { target: Target::Running, run: 1, force: false, since: now },
            observed: Observed {
                status: InstanceStatus::Created,
                run: 0,
                message: String::new(),
                error: String::new(),
                since: now,
            },
        };
        record.resources.gpu_slots = 0;
        let wish = wish(&record, None, selector);
        let _one = self.creating.lock().await;
        for _ in 0..ATTEMPTS {
            let (key, name_key) = (key::instance(&id), key::instance_name(&record.name));
            let mut compares = vec![Compare::absent(&key), Compare::absent(&name_key)];
            let mut ops = vec![Op::put(&name_key, encode(&name_key, &id)?)];
            let placed = self.reserve(&wish, &id, &mut compares, &mut ops).await??;
            record.put(placed.node, placed.share);
            ops.push(Op::put(&key, encode(&key, &record)?));
            match self.store.transact(compares, ops).await {
                Ok(_) => {}
                Err(StoreError::Conflict) => continue,
                Err(error) => return Err(error.into()),
            }
            self.reconcile(&id);
            return Ok(id);
        }
        Err(StoreError::Conflict.into())
    }

    /// Request > application > default, each value by itself.
    fn resources(
        &self,
        post: &InstancesPost,
        manifest: &manifest::Checked,
    ) -> Result<Resources, InstanceError> {
        let invalid = |argument, value: i64| InstanceError::Invalid { argument, reason: format!("{value}") };
        let asked = &post.resources;
        let wanted = &manifest.resources;
        let defaults = self.settings.get();
        // 0 is how some clients leave a value out.
        let positive = |argument, value: Option<i64>| match value {
            None | Some(0) => Ok(None),
            Some(value) => u64::try_from(value).map(Some).map_err(|_| invalid(argument, value)),
        };
        let cpus = positive("resources.cpus", asked.cpus)?;
        let cpus = match cpus {
            Some(cpus) => u32::try_from(cpus).map_err(|_| invalid("resources.cpus", i64::MAX))?,
            None => wanted.cpus.unwrap_or(defaults.default_cpus),
        };
        let memory = positive("resources.memory", asked.memory)?
            .or(wanted.memory_bytes)
            .unwrap_or(defaults.default_memory);
        let disk_size = positive("resources.disk_size", asked.disk_size)?
            .or(wanted.disk_bytes)
            .unwrap_or(defaults.default_disk);
        let gpu_slots = match asked.gpu_slots {
            None | Some(-1) => wanted.gpu_slots.unwrap_or(0),
            Some(slots) => u32::try_from(slots).map_err(|_| invalid("resources.gpu-slots", slots))?,
        };
        Ok(Resources {
            cpus,
            memory,
            disk_size,
            gpu_slots: i32::try_from(gpu_slots).unwrap_or(i32::MAX),
            gpu_type: if asked.gpu_type.is_empty() {
                wanted.gpu_type.clone().unwrap_or_default()
            } else {
                asked.gpu_type.clone()
            },
            vpu_slots: 0,
            no_disk_reserve: asked.no_disk_reserve || wanted.no_disk_reserve,
        })
    }

    /// Starts or stops an instance, or changes its protection.
    pub(crate) async fn patch_instance(
        &self,
        id_or_name: &str,
        patch: &InstancePatch,
        no_wait: bool,
    ) -> Result<OperationRecord, InstanceError> {
        let wanted = match patch.desired_status.as_deref() {
            None | Some("") => None,
            Some("started" | "running") => Some(Target::Running),
            Some("stopped") => Some(Target::Stopped),
            Some(other) => {
                return Err(InstanceError::Invalid {
                    argument: "desired_status",
                    reason: format!("{:?}: started or stopped is allowed", short(other)),
                });
            }
        };
        let protect = patch
            .config
            .as_ref()
            .and_then(|config| config.security.as_ref())
            .and_then(|security| security.delete_protected);
        for _ in 0..ATTEMPTS {
            let Record { value: before, revision } = self.find_instance(id_or_name).await?;
            if before.intent.target == Target::Deleted {
                return Err(InstanceError::NotFound);
            }
            let mut record = before.clone();
            record.config.security.delete_protected =
                protect.unwrap_or(record.config.security.delete_protected);
            let (mut compares, mut ops) = (Vec::new(), Vec::new());
            let (description, reach) = match wanted {
                None => ("Updating instance", None),
                Some(Target::Running) => {
                    self.start_again(&mut record, &mut compares, &mut ops).await?;
                    ("Starting instance", Some(Reach::Running { run: record.intent.run }))
                }
                Some(_) => {
                    record.intent = record.intent.stop(unix_now());
                    ("Stopping instance", Some(Reach::Stopped))
                }
            };
            let goal = reach.filter(|_| !no_wait).map(|reach| Goal { instance: record.id.clone(), reach });
            let (operation, write) = match goal {
                Some(goal) => self.operations.prepare(description, "instances", &record.url(), Some(goal)),
                None => self.operations.prepare_done(description, "instances", &record.url(), Ok(())),
            };
            ops.push(write);
            let key = key::instance(&record.id);
            compares.push(Compare::revision(&key, revision));
            if record != before {
                ops.push(Op::put(&key, encode(&key, &record)?));
            }
            match self.store.transact(compares, ops).await {
                Ok(_) => {}
                Err(StoreError::Conflict) => continue,
                Err(error) => return Err(error.into()),
            }
            self.operations.begun(&operation);
            self.nudge(&record.id);
            return Ok(operation);
        }
        Err(StoreError::Conflict.into())
    }

    async fn start_again(
        &self,
        record: &mut InstanceRecord,
        compares: &mut Vec<Compare>,
        ops: &mut Vec<Op>,
    ) -> Result<(), InstanceError> {
        if record.is_going() {
            return Ok(());
        }
        if record.base {
            return Err(InstanceError::Unsupported("starting a base instance is not supported".into()));
        }
        // Where there are images, what it needs is in its own.
        if let Some(application) = &record.application
            && record.image.sha256.is_none()
            && !self.catalog.package(&application.id, application.version).is_dir()
        {
            return Err(InstanceError::Missing(format!(
                "version {} of application {} not found",
                application.version, application.name
            )));
        }
        if record.session == Session::Over {
            return Err(InstanceError::Unsupported(
                "starting an instance whose session is over is not supported".into(),
            ));
        }
        if !record.holds_resources() {
            let wish = wish(record, record.node.clone(), Vec::new());
            let placed = self.reserve(&wish, &record.id, compares, ops).await??;
            record.put(placed.node, placed.share);
        }
        record.start_again(unix_now());
        Ok(())
    }

    /// Writes down that an instance should go.
    pub(crate) async fn delete_instance(
        &self,
        id_or_name: &str,
        force: bool,
    ) -> Result<OperationRecord, InstanceError> {
        for _ in 0..ATTEMPTS {
            let Record { value: mut record, revision } = self.find_instance(id_or_name).await?;
            if record.config.security.delete_protected {
                return Err(InstanceError::Protected(record.name));
            }
            record.intent = record.intent.delete(force, unix_now());
            let goal = Goal { instance: record.id.clone(), reach: Reach::Deleted };
            let (operation, write) =
                self.operations.prepare("Deleting instance", "instances", &record.url(), Some(goal));
            let key = key::instance(&record.id);
            let ops = vec![write, Op::put(&key, encode(&key, &record)?)];
            match self.store.transact(vec![Compare::revision(&key, revision)], ops).await {
                Ok(_) => {}
                Err(StoreError::Conflict) => continue,
                Err(error) => return Err(error.into()),
            }
            self.operations.begun(&operation);
            self.nudge(&record.id);
            return Ok(operation);
        }
        Err(StoreError::Conflict.into())
    }

    /// Makes sure that an instance has its task, where it is this unit's to look after.
    pub(crate) fn reconcile(&self, id: &InstanceId) {
        if !self.is_ours(id.as_str()) {
            return;
        }
        let notify = {
            let mut tasks = self.tasks();
            if let Some(notify) = tasks.get(id) {
                return notify.notify_one();
            }
            let notify = Arc::new(Notify::new());
            tasks.insert(id.clone(), notify.clone());
            notify
        };
        let (ams, id) = (self.clone(), id.clone());
        self.shutdown.clone().spawn_until_stopped("instance", async move {
            loop {
                ams.run_instance(&id, &notify).await;
                let mut tasks = ams.tasks();
                // Who asked for a look since the last one found this task, and nobody else will take it.
                if notify.notified().now_or_never().is_none() {
                    tasks.remove(&id);
                    return;
                }
            }
        });
    }

    /// Something about an instance changed.
    pub(crate) fn nudge(&self, id: &InstanceId) {
        if let Some(notify) = self.tasks().get(id) {
            notify.notify_one();
        }
    }

    async fn run_instance(&self, id: &InstanceId, notify: &Notify) {
        // What was done last, for what: the same is not done twice in a row without a pause.
        let mut last: Option<(Action, Seen, Revision)> = None;
        let mut watch = Watch::default();
        let mut pause = Duration::from_millis(50);
        loop {
            // On the heap while it goes on, so that ten thousand instances at rest do not hold what a look needs.
            let step = Box::pin(self.step(id, &mut last, &mut watch)).await;
            let wait = match step {
                Ok(Step::Gone) => return,
                Ok(Step::Again) => {
                    pause = Duration::from_millis(50);
                    continue;
                }
                Ok(Step::Wait(wake_in)) => wake_in.unwrap_or(TICK).clamp(Duration::from_millis(200), TICK),
                Ok(Step::Retry) => {
                    pause = (pause * 2).min(Duration::from_secs(5));
                    pause
                }
                Err(error) => {
                    tracing::warn!(instance.id = %id, "instance {id}: {}", fanlight_service::telemetry::chain(&error));
                    pause = (pause * 2).min(Duration::from_secs(5));
                    pause
                }
            };
            // A timer that fires early, or a change that says nothing new, costs one look.
            let _ = tokio::time::timeout(wait, notify.notified()).await;
        }
    }

    /// Looks once, writes once, acts once.
    async fn step(
        &self,
        id: &InstanceId,
        last: &mut Option<(Action, Seen, Revision)>,
        watch: &mut Watch,
    ) -> Result<Step, StoreError> {
        if !self.is_ours(id.as_str()) {
            // Another unit looks after it now.
            return Ok(Step::Gone);
        }
        let Some(stored) = self.store.get_json::<InstanceRecord>(&key::instance(id)).await? else {
            self.operations.settle(id, None).await?;
            return Ok(Step::Gone);
        };
        let seen = self.engine.seen(id).await;
        let limits =
            life::Limits { start: self.config.engine.start_time, stop: self.config.engine.stop_time };
        let watched = watch.see(Instant::now(), &stored.value);
        let decision = life::decide(&stored.value, &seen, unix_now(), watched, limits);
        let mut revision = stored.revision;
        let mut record = stored.value;
        if decision.observed != record.observed {
            let next = InstanceRecord { observed: decision.observed, ..record.clone() };
            match self.write_observed(&record, revision, &next).await? {
                Some(written) => (record, revision) = (next, written),
                None => return Ok(Step::Again),
            }
        }
        self.operations.settle(id, Some(&record)).await?;
        let Some(action) = decision.action else {
            *last = None;
            return Ok(Step::Wait(decision.wake_in));
        };
        let this = (action.clone(), seen, revision);
        if last.as_ref() == Some(&this) && action == Action::Stop {
            // Asked already; the engine takes it from here.
            return Ok(Step::Wait(decision.wake_in));
        }
        let repeated = last.as_ref() == Some(&this);
        *last = Some(this);
        let step = self.act(&record, revision, action, watched).await?;
        Ok(if repeated && matches!(step, Step::Again) { Step::Retry } else { step })
    }

    async fn act(
        &self,
        record: &InstanceRecord,
        revision: Revision,
        action: Action,
        watched: Duration,
    ) -> Result<Step, StoreError> {
        let id = &record.id;
        let done = match action {
            Action::AskSession => return self.ask_session(record, watched).await,
            Action::EndSession => return self.end_session(record, watched).await,
            Action::Forget => return self.forget(record, revision).await,
            Action::Claim => {
                return match self.claim(record, revision, watched).await? {
                    Claimed::Done => Ok(Step::Again),
                    Claimed::Again => Ok(Step::Retry),
                    Claimed::Refused(text) => self.fail_with(record, revision, text).await,
                };
            }
            Action::Create => self.engine.create(&self.spec(record).await).await,
            Action::Start { run } => {
                // Made again with every start: an instance that was prepared before it had a session has one now.
                match self.engine.create(&self.spec(record).await).await {
                    Ok(()) => {
                        fault::step();
                        self.engine.start(id, run).await
                    }
                    Err(error) => Err(error),
                }
            }
            Action::Stop => {
                self.engine.stop(id, self.config.engine.stop_time).await;
                Ok(())
            }
            Action::Kill => {
                self.engine.stop(id, Duration::ZERO).await;
                Ok(())
            }
            Action::Destroy => {
                if let Err(error) = self.engine.delete(id).await {
                    tracing::warn!(instance.id = %id, "removing instance {id}: {}", fanlight_service::telemetry::chain(&error));
                    return Ok(Step::Retry);
                }
                Ok(())
            }
        };
        fault::step();
        let Err(error) = done else { return Ok(Step::Again) };
        if let EngineError::Away { .. } = &error
            && watched < self.config.engine.start_time
        {
            // What cannot be asked has refused nothing.
            tracing::info!(instance.id = %id, "trying again: {}", fanlight_service::telemetry::chain(&error));
            return Ok(Step::Retry);
        }
        self.fail(record, revision, &error).await
    }

    async fn fail(
        &self,
        record: &InstanceRecord,
        revision: Revision,
        error: &EngineError,
    ) -> Result<Step, StoreError> {
        let text = fanlight_service::telemetry::chain(error);
        self.fail_with(record, revision, text).await
    }

    async fn fail_with(
        &self,
        record: &InstanceRecord,
        revision: Revision,
        text: String,
    ) -> Result<Step, StoreError> {
        tracing::warn!(instance.id = %record.id, "instance {} failed: {text}", record.id);
        let next = InstanceRecord { observed: life::failed(record, text, unix_now()), ..record.clone() };
        self.write_observed(record, revision, &next).await?;
        Ok(Step::Again)
    }

    pub(crate) async fn spec(&self, record: &InstanceRecord) -> Spec {
        let public_address = self.public_address(record).await;
        let media = &self.config.media;
        let guest = Guest {
            version: PROTOCOL_VERSION,
            instance_id: record.id.clone(),
            application: record.program.clone(),
            display: record.display,
            streaming: record.session.streaming().cloned(),
            media: Media {
                bind: media.bind_address(),
                port: 0,
                advertise: media.advertise.clone(),
                encoder: Some(media.encoder.clone()).filter(|encoder| !encoder.is_empty()),
            },
            pool: record.pool.filter(|_| record.is_waiting()).map(|pool| pool.start),
            devmode: record.config.devmode,
        };
        let mut addons = Vec::new();
        for addon in &record.addons {
            addons.push(self.spec_addon(record, addon).await);
        }
        let package = record.application.as_ref();
        Spec {
            guest,
            package: package.map(|application| self.catalog.package(&application.id, application.version)),
            node: record.node.clone().unwrap_or_else(NodeId::generate),
            image: record.image.sha256.clone(),
            share: record.share(),
            disk_bytes: record.resources.disk_size,
            services: record.services.clone(),
            public_address,
            base: record.base,
            copy_of: record.copy_of.clone(),
            addons,
        }
    }

    async fn spec_addon(&self, record: &InstanceRecord, addon: &AddonRef) -> SpecAddon {
        // Where there is an application they were put into its image, and a copy has what its source had.
        let is_there = record.application.is_some() || record.copy_of.is_some();
        let place = self.addons.package(addon);
        let package = match is_there {
            true => None,
            // A later start finds what the first one brought, wherever the package lies by now.
            false if record.intent.run > 1 => Some(place).filter(|place| place.is_dir()),
            false => {
                if let Err(error) = self.addons.package_here(addon).await {
                    tracing::warn!(instance.id = %record.id, "{error}");
                }
                // What is missing is missed by the engine, with its place.
                Some(place)
            }
        };
        SpecAddon { name: addon.name.clone(), hook_time_s: addon.hook_time_s, package }
    }

    /// Where clients reach the node of an instance, if that is set and is an address.
    async fn public_address(&self, record: &InstanceRecord) -> Option<IpAddr> {
        let nodes = self.nodes.list().await.unwrap_or_default();
        self.addresses(record, &nodes).await.1.parse().ok()
    }

    /// Writes what was seen, and gives resources back in the same transaction. None: somebody else was faster.
    async fn write_observed(
        &self,
        before: &InstanceRecord,
        revision: Revision,
        after: &InstanceRecord,
    ) -> Result<Option<Revision>, StoreError> {
        let key = key::instance(&after.id);
        let mut compares = vec![Compare::revision(&key, revision)];
        let mut ops = vec![Op::put(&key, encode(&key, after)?)];
        if before.holds_resources() && !after.holds_resources() {
            self.release(after, true, &mut compares, &mut ops).await?;
        }
        let committed = match self.store.transact(compares, ops).await {
            Ok(committed) => committed,
            Err(StoreError::Conflict) => return Ok(None),
            Err(error) => return Err(error),
        };
        if life::events(before.observed.status, after.observed.status).is_some() {
            let took = after.observed.since - after.intent.since;
            tracing::info!(
                instance.id = %after.id, status = after.observed.status.as_str(), since_request_s = took,
                "instance {} is {}{}{}", after.id, after.observed.status.as_str(),
                if after.observed.error.is_empty() { "" } else { ": " }, after.observed.error
            );
        }
        Ok(Some(committed.revision))
    }

    /// Gives back what an instance was promised; at rest it keeps its disk and its place.
    async fn release(
        &self,
        record: &InstanceRecord,
        rest: bool,
        compares: &mut Vec<Compare>,
        ops: &mut Vec<Op>,
    ) -> Result<(), StoreError> {
        let Some(node) = &record.node else { return Ok(()) };
        let key = key::allocations(node);
        let Some(mut stored) = self.store.get_json::<Allocations>(&key).await? else { return Ok(()) };
        let instances = &mut stored.value.instances;
        let Some(share) = instances.remove(&record.id) else { return Ok(()) };
        if rest {
            instances.insert(record.id.clone(), share.at_rest());
        }
        compares.push(Compare::revision(&key, stored.revision));
        ops.push(Op::put(&key, encode(&key, &stored.value)?));
        Ok(())
    }

    async fn forget(&self, record: &InstanceRecord, revision: Revision) -> Result<Step, StoreError> {
        let key = key::instance(&record.id);
        let mut compares = vec![Compare::revision(&key, revision)];
        let mut ops = vec![Op::delete(&key), Op::delete(key::instance_name(&record.name))];
        self.release(record, false, &mut compares, &mut ops).await?;
        match self.store.transact(compares, ops).await {
            Ok(_) | Err(StoreError::Conflict) => {}
            Err(error) => return Err(error),
        }
        if self.store.get(&key).await?.is_none() {
            tracing::info!(instance.id = %record.id, "instance {} was removed", record.id);
            self.operations.settle(&record.id, None).await?;
            return Ok(Step::Gone);
        }
        Ok(Step::Again)
    }

    /// Makes an image of a stopped instance; one that runs is stopped first where that is forced.
    pub(crate) async fn publish_instance(
        &self,
        post: &ImagesPost,
        source: &ImageSource,
    ) -> Result<OperationRecord, InstanceError> {
        use InstanceStatus as S;
        let record = self.find_instance(&source.instance).await?.value;
        let name = if post.name.is_empty() { record.id.to_string() } else { post.name.clone() };
        if !manifest::is_object_name(&name) {
            return Err(InstanceError::Required("name"));
        }
        let post = ImagesPost { name, ..post.clone() };
        if !matches!(record.observed.status, S::Stopped | S::Error) {
            if !source.force {
                return Err(InstanceError::Unsupported("instance must be stopped".into()));
            }
            let stop = InstancePatch { desired_status: Some("stopped".into()), ..InstancePatch::default() };
            self.patch_instance(record.id.as_str(), &stop, false).await?;
        }
        let (operation, write) =
            self.operations.prepare("Publishing instance", "instances", &record.url(), None);
        self.store.transact(Vec::new(), vec![write]).await?;
        self.operations.begun(&operation);
        let (ams, id) = (self.clone(), operation.operation.id.clone());
        self.shutdown.spawn_until_stopped("publish", async move {
            let published = ams.publish_stopped(&record.id, &post, &id).await;
            if let Err(error) = published
                && let Err(error) = ams.operations.finish(&id, Err(error)).await
            {
                tracing::warn!("ending the operation of image {}: {error}", post.name);
            }
        });
        Ok(operation)
    }

    async fn publish_stopped(
        &self,
        id: &InstanceId,
        post: &ImagesPost,
        operation: &OperationId,
    ) -> Result<(), String> {
        let deadline = tokio::time::Instant::now() + self.config.engine.stop_time + Duration::from_secs(30);
        while self.engine.seen(id).await.phase.is_live() {
            if tokio::time::Instant::now() > deadline {
                return Err("the instance does not stop".into());
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        let sha256 =
            self.engine.publish(id).await.map_err(|error| fanlight_service::telemetry::chain(&error))?;
        self.images.publish(post, operation, sha256).await.map_err(|error| error.to_string())
    }

    async fn ask_session(&self, record: &InstanceRecord, watched: Duration) -> Result<Step, StoreError> {
        let Some(stored) = self.store.get_json::<InstanceRecord>(&key::instance(&record.id)).await? else {
            return Ok(Step::Again);
        };
        let Some(agent) = &self.agent else {
            return self
                .fail_with(record, stored.revision, "no agent is configured (agent.url)".into())
                .await;
        };
        let request = AgentSessionsPost {
            instance_id: record.id.clone(),
            app: record.program_name().to_owned(),
            display: record.display,
        };
        match agent.create_session(&request).await {
            Ok(created) => {
                let mut streaming = created.streaming;
                if let Some(data) = &record.user_data {
                    streaming.extra_data = extra_data(data);
                }
                tracing::info!(
                    instance.id = %record.id, session.id = %streaming.session_id,
                    "instance {} has the session {}", record.id, streaming.session_id
                );
                self.store
                    .update_json::<InstanceRecord, _, _>(&key::instance(&record.id), |stored| {
                        Some(stored?.with_session(streaming.clone()))
                    })
                    .await?;
                Ok(Step::Again)
            }
            Err(error) => {
                let text = format!("no session for the instance: {}", error.chain());
                if error.is_transient() && watched < self.config.engine.start_time {
                    tracing::warn!(instance.id = %record.id, "instance {}: {text}", record.id);
                    return Ok(Step::Retry);
                }
                self.fail_with(record, stored.revision, text).await
            }
        }
    }

    async fn end_session(&self, record: &InstanceRecord, watched: Duration) -> Result<Step, StoreError> {
        if let (Some(session), Some(agent)) = (record.session.to_end(), &self.agent)
            && let Err(error) = agent.delete_session(session).await
        {
            let text = error.chain();
            if error.is_transient() && watched < END_SESSION {
                tracing::warn!(instance.id = %record.id, session.id = %session, "ending the session {session}: {text}");
                return Ok(Step::Retry);
            }
            // The gateway notices by itself that the session has no instance.
            tracing::warn!(instance.id = %record.id, session.id = %session, "session {session} could not be ended: {text}");
        }
        self.store
            .update_json::<InstanceRecord, _, _>(&key::instance(&record.id), |stored| {
                let mut stored = stored?;
                stored.session = Session::Over;
                Some(stored)
            })
            .await?;
        Ok(Step::Again)
    }
}

/// What a launch asked for.
struct What {
    application: Option<ApplicationRef>,
    program: GuestApplication,
    image: ImageRef,
    manifest: manifest::Checked,
    selector: Vec<String>,
    addons: Vec<AddonRef>,
}

/// Whether it was said that no slot of a GPU is to be taken, which is more than not asking for one.
fn wants_no_gpu(post: &InstancesPost, manifest: &manifest::Checked) -> bool {
    match post.resources.gpu_slots {
        None | Some(-1) => manifest.resources.gpu_slots == Some(0),
        Some(slots) => slots == 0,
    }
}

fn program(name: &str, version: &VersionRecord) -> GuestApplication {
    GuestApplication {
        name: name.to_owned(),
        command: version.manifest.command.clone(),
        environment: version.manifest.environment.clone(),
        working_directory: version.manifest.working_directory.clone(),
        restart: version.manifest.restart,
        hook_time_s: Some(version.manifest.hook_time().as_secs()),
    }
}

fn wish(record: &InstanceRecord, pin: Option<NodeId>, selector: Vec<String>) -> Wish {
    Wish {
        share: record.share(),
        encoder: record.encoder,
        gpu_kind: record.resources.gpu_type.clone(),
        pin,
        selector,
        // That of the image; all images are of the architecture of AMS.
        architecture: if record.image.sha256.is_some() { record.architecture.clone() } else { String::new() },
    }
}

/// What is shown of an instance beside its record.
pub(crate) struct Look {
    address: String,
    public_address: String,
    status_message: String,
    logs: Vec<String>,
}

impl Look {
    /// The instance as answered.
    pub(crate) fn show(&self, record: &InstanceRecord) -> fanlight_api::ams::Instance {
        let mut shown = record.to_api(&self.address, &self.public_address, self.logs.clone());
        shown.status_message.clone_from(&self.status_message);
        shown
    }
}

/// What a look at an instance led to.
enum Step {
    /// Its record is gone.
    Gone,
    /// Look again at once.
    Again,
    /// Look again when something changes, or after this time.
    Wait(Option<Duration>),
    /// It did not work; look again after a pause.
    Retry,
}

/// `<scope>/<attempt>`; without a number it is attempt 0.
fn parse_key(text: &str) -> Result<(String, u64), InstanceError> {
    let printable = text.bytes().all(|byte| byte.is_ascii_graphic());
    if text.is_empty() || text.len() > MAX_KEY || !printable {
        return Err(InstanceError::Invalid {
            argument: "Idempotency-Key",
            reason: format!("1 to {MAX_KEY} printable characters are allowed"),
        });
    }
    let split = text.rsplit_once('/').and_then(|(scope, attempt)| Some((scope, attempt.parse().ok()?)));
    Ok(match split {
        Some((scope, attempt)) if !scope.is_empty() => (scope.to_owned(), attempt),
        _ => (text.to_owned(), 0),
    })
}

fn display(post: &InstancesPost) -> Result<Screen, InstanceError> {
    // 0 is "not given".
    let given = |value: i64| Some(value).filter(|value| *value != 0);
    let wanted = post.config.display;
    let patch = ScreenPatch {
        width: given(wanted.width),
        height: given(wanted.height),
        fps: given(wanted.fps),
        density: given(wanted.density),
    };
    patch
        .apply(Screen::default())
        .map_err(|error| InstanceError::Invalid { argument: "config.display", reason: error.to_string() })
}

fn is_instance_name(name: &str) -> bool {
    (3..=63).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-')
}

fn short(text: &str) -> String {
    text.chars().take(64).collect()
}

#[cfg(test)]
mod tests {
    use fanlight_api::ams::ResourcesPost;

    use super::*;

    #[test]
    fn no_slot_of_a_gpu_is_wanted_only_where_that_was_said_and_a_launch_says_it_last() {
        for (launch, application, wants_none) in [
            (None, None, false),
            (Some(-1), None, false),
            (Some(0), None, true),
            (Some(0), Some(1), true),
            (None, Some(0), true),
            (Some(-1), Some(0), true),
            (Some(1), Some(0), false),
            (None, Some(1), false),
        ] {
            let resources = ResourcesPost { gpu_slots: launch, ..ResourcesPost::default() };
            let post = InstancesPost { resources, ..InstancesPost::default() };
            let wanted = manifest::Wanted { gpu_slots: application, ..manifest::Wanted::default() };
            let manifest = manifest::Checked { resources: wanted, ..manifest::Checked::default() };
            assert_eq!(wants_no_gpu(&post, &manifest), wants_none, "{launch:?} {application:?}");
        }
    }

    #[test]
    fn idempotency_keys_are_a_scope_and_an_attempt() {
        for (text, scope, attempt) in
            [("s1/3", "s1", 3), ("s1", "s1", 0), ("a/b/7", "a/b", 7), ("a/b", "a/b", 0), ("/3", "/3", 0)]
        {
            assert_eq!(parse_key(text).expect(text), (scope.to_owned(), attempt), "{text}");
        }
        for bad in ["", "a b", "ä", &"x".repeat(256)] {
            assert!(parse_key(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn names_of_instances_keep_to_the_reference() {
        for (name, good) in [
            ("abc", true),
            ("a-1", true),
            ("ab", false),
            ("-ab", false),
            ("ab-", false),
            ("a_b", false),
            ("a.b", false),
        ] {
            assert_eq!(is_instance_name(name), good, "{name}");
        }
        assert!(!is_instance_name(&"a".repeat(64)));
    }
}
