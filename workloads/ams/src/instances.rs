//! Instances: requests write down what should be, one task per instance makes it so.
//!
//! A task looks at the record and at the engine, asks [`life`] what follows, writes it, does it, and looks again
//! when something changed. It holds no state that matters: killed at any point and started again, it goes on.

use std::{
    cmp::Ordering,
    sync::Arc,
    time::{Duration, Instant},
};

use fanlight_api::{
    InstanceId, NodeId, PROTOCOL_VERSION,
    ams::{InstancePatch, InstanceStatus, InstancesPost, Resources},
    bus::AgentSessionsPost,
    gateway::{Screen, ScreenPatch},
    guest::{Guest, GuestApplication, Media},
};
use fanlight_store::{Compare, Op, Record, Revision, StoreError, StoreExt as _, encode};
use tokio::sync::Notify;

use crate::{
    Ams,
    catalog::CatalogError,
    core::{
        life::{self, Action, Seen, Watch},
        model::{
            ApplicationRef, Goal, InstanceRecord, Intent, LaunchRecord, Observed, OperationRecord, Reach,
            Session, Target, VersionRecord, extra_data, key, session_tag,
        },
        placement::{self, Allocations, Refusal, Wish},
    },
    engine::{EngineError, Spec},
    events::unix_now,
    manifest, size,
};

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
    /// No room.
    #[error(transparent)]
    NoRoom(#[from] Refusal),
    /// The store.
    #[error("the records of instances cannot be used")]
    Store(#[from] StoreError),
}

/// What was asked for at launch, checked.
struct Checked {
    record: InstanceRecord,
    wish: Wish,
}

impl Ams {
    /// All instances, oldest first.
    pub(crate) async fn list_instances(&self) -> Result<Vec<InstanceRecord>, StoreError> {
        let records = self.store.list_json::<InstanceRecord>(key::INSTANCES).await?;
        let mut list: Vec<_> = records.into_iter().map(|(_, record)| record.value).collect();
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
        let mut shown = record.to_api(self.node.address(), self.engine.logs(&record.id).await);
        if shown.status_message.is_empty() && record.observed.status == InstanceStatus::Started {
            shown.status_message = self.engine.status(&record.id).await;
        }
        shown
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
        let url = checked.url();
        // Other launches of this process would only make each other begin again.
        let _one = self.creating.lock().await;
        for _ in 0..ATTEMPTS {
            let mut record = checked.clone();
            let (mut compares, mut ops) = (Vec::new(), Vec::new());
            let name_key = key::instance_name(&record.name);
            if self.store.get(&name_key).await?.is_some() {
                return Err(InstanceError::Exists(record.name));
            }
            compares.push(Compare::absent(&name_key));
            ops.push(Op::put(&name_key, encode(&name_key, &record.id)?));
            match self.reserve(&wish, &record.id, &mut compares, &mut ops).await? {
                Ok(node) => record.node = Some(node),
                Err(refusal) => record.observed = life::failed(&record, refusal.to_string(), unix_now()),
            }
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
            compares.push(Compare::absent(&key));
            ops.push(Op::put(&key, encode(&key, &record)?));
            match self.store.transact(compares, ops).await {
                Ok(_) => {}
                Err(StoreError::Conflict) => continue,
                Err(error) => return Err(error.into()),
            }
            tracing::info!(
                instance.id = %record.id,
                "instance {} of {} version {} was created", record.id, record.application.name, record.application.version
            );
            self.events.lifecycle("instance-created", &url);
            if record.node.is_none() {
                self.events.lifecycle("instance-failed", &url);
            }
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

    /// Finds a node and adds the share to what it has promised.
    async fn reserve(
        &self,
        wish: &Wish,
        id: &InstanceId,
        compares: &mut Vec<Compare>,
        ops: &mut Vec<Op>,
    ) -> Result<Result<NodeId, Refusal>, InstanceError> {
        let key = key::allocations(self.node.name());
        let stored = self.store.get_json::<Allocations>(&key).await?;
        let (mut allocations, compare) = match stored {
            Some(stored) => (stored.value, Compare::revision(&key, stored.revision)),
            None => (Allocations::default(), Compare::absent(&key)),
        };
        allocations.instances.remove(id);
        let offer = self.node.offer(&self.config.folder);
        let placed = placement::place(wish, self.config.node.strategy, [(&offer, &allocations)]).cloned();
        if placed.is_ok() {
            allocations.instances.insert(id.clone(), wish.share);
            compares.push(compare);
            ops.push(Op::put(&key, encode(&key, &allocations)?));
        }
        Ok(placed)
    }

    async fn check_launch(&self, post: InstancesPost) -> Result<Checked, InstanceError> {
        let invalid = |argument, reason: String| InstanceError::Invalid { argument, reason };
        let unsupported = |what: &str| {
            Err(InstanceError::Unsupported(format!("{what} not supported by image {}", manifest::HOST_IMAGE)))
        };
        if post.source.as_ref().is_some_and(|source| !source.id.is_empty() || !source.kind.is_empty()) {
            return Err(InstanceError::Unsupported(
                "source not supported: instances cannot be copied".into(),
            ));
        }
        if !post.image_id.is_empty() && !post.app_id.is_empty() {
            return Err(invalid("image_id", "it excludes app_id".into()));
        }
        if !post.image_id.is_empty() {
            return Err(InstanceError::Unsupported(
                "image_id not supported: an instance needs an application".into(),
            ));
        }
        if post.app_id.is_empty() {
            return Err(InstanceError::Required("app_id"));
        }
        match post.kind.as_str() {
            "" | "container" => {}
            "vm" => return unsupported("type vm"),
            other => return Err(invalid("type", format!("{:?}: container is allowed", short(other)))),
        }
        for (given, what) in [
            (!post.addons.is_empty(), "addons"),
            (!post.services.is_empty(), "services"),
            (!post.config.boot_package.is_empty(), "config.boot_package"),
            (!post.config.boot_activity.is_empty(), "config.boot_activity"),
            (!post.config.metrics_server.is_empty(), "config.metrics_server"),
            (post.config.devmode, "config.devmode"),
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
        let application = self.catalog.find(&post.app_id).await?.value;
        let number = match post.app_version {
            None | Some(-1) => None,
            Some(number) => Some(
                u32::try_from(number)
                    .map_err(|_| invalid("app_version", format!("{number}: a number from 0 is needed")))?,
            ),
        };
        let (number, version) = application.launchable(number).map_err(InstanceError::Missing)?;
        let pin = match post.node.as_str() {
            "" => None,
            name if name == self.node.name().as_str() => Some(self.node.name().clone()),
            name => return Err(InstanceError::Missing(format!("node {} not found", short(name)))),
        };
        let resources = self.resources(&post, version)?;
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
            application: ApplicationRef {
                id: application.id.clone(),
                name: application.name.clone(),
                version: number,
            },
            program: GuestApplication {
                name: application.name.clone(),
                command: version.manifest.command.clone(),
                environment: version.manifest.environment.clone(),
                working_directory: version.manifest.working_directory.clone(),
                restart: version.manifest.restart,
            },
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
        let wish = Wish {
            share: record.share(),
            pin,
            selector: application.selector(),
            architecture: String::new(),
        };
        Ok(Checked { record, wish })
    }

    /// Request > application > default, each value by itself.
    fn resources(&self, post: &InstancesPost, version: &VersionRecord) -> Result<Resources, InstanceError> {
        let invalid = |argument, value: i64| InstanceError::Invalid { argument, reason: format!("{value}") };
        let asked = &post.resources;
        let wanted = &version.manifest.resources;
        let node = &self.config.node;
        // 0 is how some clients leave a value out.
        let positive = |argument, value: Option<i64>| match value {
            None | Some(0) => Ok(None),
            Some(value) => u64::try_from(value).map(Some).map_err(|_| invalid(argument, value)),
        };
        let cpus = positive("resources.cpus", asked.cpus)?;
        let cpus = match cpus {
            Some(cpus) => u32::try_from(cpus).map_err(|_| invalid("resources.cpus", i64::MAX))?,
            None => wanted.cpus.unwrap_or(node.default_cpus),
        };
        let default = |text: &str| size::parse(text).unwrap_or(0);
        let memory = positive("resources.memory", asked.memory)?
            .or(wanted.memory_bytes)
            .unwrap_or_else(|| default(&node.default_memory));
        let disk_size = positive("resources.disk_size", asked.disk_size)?
            .or(wanted.disk_bytes)
            .unwrap_or_else(|| default(&node.default_disk));
        let gpu_slots = match asked.gpu_slots {
            None | Some(-1) => wanted.gpu_slots.unwrap_or(0),
            Some(slots) => u32::try_from(slots).map_err(|_| invalid("resources.gpu-slots", slots))?,
        };
        let encoder_wants_gpu = u32::from(version.manifest.video_encoder == "gpu");
        Ok(Resources {
            cpus,
            memory,
            disk_size,
            gpu_slots: i32::try_from(gpu_slots.max(encoder_wants_gpu)).unwrap_or(i32::MAX),
            gpu_type: if asked.gpu_type.is_empty() {
                wanted.gpu_type.clone().unwrap_or_default()
            } else {
                asked.gpu_type.clone()
            },
            vpu_slots: 0,
            no_disk_reserve: asked.no_disk_reserve,
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
        let package = self.catalog.package(&record.application.id, record.application.version);
        if !package.is_dir() {
            return Err(InstanceError::Missing(format!(
                "version {} of application {} not found",
                record.application.version, record.application.name
            )));
        }
        if record.session == Session::Over {
            return Err(InstanceError::Unsupported(
                "starting an instance whose session is over is not supported".into(),
            ));
        }
        if !record.holds_resources() {
            let wish = Wish { share: record.share(), pin: record.node.clone(), ..Wish::default() };
            record.node = Some(self.reserve(&wish, &record.id, compares, ops).await??);
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

    /// Makes sure that an instance has its task.
    pub(crate) fn reconcile(&self, id: &InstanceId) {
        let notify = {
            let mut tasks = self.tasks();
            if tasks.contains_key(id) {
                drop(tasks);
                return self.nudge(id);
            }
            let notify = Arc::new(Notify::new());
            tasks.insert(id.clone(), notify.clone());
            notify
        };
        let (ams, id) = (self.clone(), id.clone());
        self.shutdown.clone().spawn_until_stopped("instance", async move {
            ams.run_instance(&id, &notify).await;
            ams.tasks().remove(&id);
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
            let step = self.step(id, &mut last, &mut watch).await;
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
            Action::Create => self.engine.create(&self.spec(record)).await,
            Action::Start { run } => {
                // Made again with every start: an instance that was prepared before it had a session has one now.
                match self.engine.create(&self.spec(record)).await {
                    Ok(()) => self.engine.start(id, run).await,
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
        let Err(error) = done else { return Ok(Step::Again) };
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

    fn spec(&self, record: &InstanceRecord) -> Spec {
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
        };
        Spec {
            guest,
            package: Some(self.catalog.package(&record.application.id, record.application.version)),
        }
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
            self.release(after, &mut compares, &mut ops).await?;
        }
        let committed = match self.store.transact(compares, ops).await {
            Ok(committed) => committed,
            Err(StoreError::Conflict) => return Ok(None),
            Err(error) => return Err(error),
        };
        if let Some(event) = life::events(before.observed.status, after.observed.status) {
            let took = after.observed.since - after.intent.since;
            tracing::info!(
                instance.id = %after.id, status = after.observed.status.as_str(), since_request_s = took,
                "instance {} is {}{}{}", after.id, after.observed.status.as_str(),
                if after.observed.error.is_empty() { "" } else { ": " }, after.observed.error
            );
            self.events.lifecycle(event, &after.url());
        }
        Ok(Some(committed.revision))
    }

    async fn release(
        &self,
        record: &InstanceRecord,
        compares: &mut Vec<Compare>,
        ops: &mut Vec<Op>,
    ) -> Result<(), StoreError> {
        let Some(node) = &record.node else { return Ok(()) };
        let key = key::allocations(node);
        let Some(mut stored) = self.store.get_json::<Allocations>(&key).await? else { return Ok(()) };
        if stored.value.instances.remove(&record.id).is_some() {
            compares.push(Compare::revision(&key, stored.revision));
            ops.push(Op::put(&key, encode(&key, &stored.value)?));
        }
        Ok(())
    }

    async fn forget(&self, record: &InstanceRecord, revision: Revision) -> Result<Step, StoreError> {
        let key = key::instance(&record.id);
        let mut compares = vec![Compare::revision(&key, revision)];
        let mut ops = vec![Op::delete(&key), Op::delete(key::instance_name(&record.name))];
        self.release(record, &mut compares, &mut ops).await?;
        match self.store.transact(compares, ops).await {
            Ok(_) | Err(StoreError::Conflict) => {}
            Err(error) => return Err(error),
        }
        if self.store.get(&key).await?.is_none() {
            tracing::info!(instance.id = %record.id, "instance {} was removed", record.id);
            self.operations.settle(&record.id, None).await?;
            self.events.lifecycle("instance-removed", &record.url());
            return Ok(Step::Gone);
        }
        Ok(Step::Again)
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
            app: record.application.name.clone(),
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
    use super::*;

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
