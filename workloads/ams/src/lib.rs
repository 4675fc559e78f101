//! AMS: applications, instances, the node they run on, and the operations that change them. It owns what should
//! be (in the store) and what it last saw of the engine; what really runs is the engine's truth.
//!
//! ```text
//! http (routes) ──► catalog, instances, operations (shells over store and engine) ──► core (plain values)
//! ```
//! It knows nothing of gateways and signalling. A streamed instance carries its session as data.

mod addons;
mod bootstrap;
mod catalog;
mod cluster;
mod config;
mod core;
pub mod engine;
mod events;
mod fault;
mod http;
mod identity;
mod images;
mod index;
mod instances;
pub mod isolation;
mod manifest;
mod metrics;
mod mirror;
mod nodes;
mod operations;
mod package;
mod peers;
mod pools;
mod processes;
mod settings;
pub mod shim;
mod size;
mod tasks;
mod trust;
mod units;
mod updates;

/// The plain values of this crate, for the simulation in `tests/sim`.
#[doc(hidden)]
pub mod cores {
    pub use crate::core::{life, model, placement, pool};
}

use std::{
    collections::{BTreeSet, HashMap},
    net::{Ipv4Addr, SocketAddr, TcpListener},
    ops::Deref,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use fanlight_api::InstanceId;
use fanlight_client::{AgentClient, ClientError, Endpoint, Identity, Trust as ServerTrust};
use fanlight_service::{
    Shutdown,
    http::{BindError, Binding, Limits, bind_tcp, bind_unix, serve},
    tls::{KeyFiles, TlsError, ensure_self_signed, install_provider, server_config},
};
use fanlight_store::{Event, Handle, LeaseId, Op, StoreError, StoreExt as _, Watch, decode};
use tokio::sync::{Notify, broadcast::error::RecvError, watch};

use crate::core::{
    model::{ClusterRecord, LaunchRecord, OperationRecord, key},
    units::Units,
};
use crate::{
    addons::Addons,
    catalog::{Catalog, CatalogError, IN_FLIGHT},
    cluster::ClusterError,
    engine::{Engine, EngineError, LxdEngine, ProcessConfig, ProcessEngine},
    events::{Events, unix_now},
    identity::Identities,
    images::{ImageError, Images},
    index::{Changed, Index, Noting},
    metrics::Metrics,
    nodes::Nodes,
    operations::Operations,
    peers::Peers,
    pools::Pools,
    settings::Settings,
    trust::{Trust, TrustError},
};

pub use crate::config::{
    Agent as AgentConfig, Applications, Config, Engine as EngineConfig, EngineKind, Limits as ConfigLimits,
    Lxd as LxdConfig, Media, Node as NodeConfig, Ports as PortsConfig, Tls, Trust as TrustConfig,
};
pub use crate::core::life::{Phase, Seen};
pub use crate::http::openapi;

/// How long going down may take.
const STOP: Duration = Duration::from_secs(10);
/// Between looks at everything.
const ROUND: Duration = Duration::from_secs(60);
/// More units than anybody runs.
const MOST_UNITS: usize = 100;
/// How long a launch is remembered by its key, seconds.
const REMEMBER_S: i64 = 24 * 3600;

/// What may be given instead of made from the configuration, by tests and by `fanlight up`.
#[derive(Default)]
pub struct Parts {
    /// Instead of `store.*`.
    pub store: Option<Handle>,
    /// Bound already, instead of `listen`.
    pub listener: Option<TcpListener>,
    /// Instead of processes of this machine.
    pub engine: Option<Arc<dyn Engine>>,
}

/// AMS could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A folder.
    #[error("making the folder {}", path.display())]
    Folder {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The store.
    #[error("opening the store of AMS")]
    Store(#[from] StoreError),
    /// The certificate.
    #[error("preparing the certificate of AMS")]
    Tls(#[from] TlsError),
    /// Whose the folder is.
    #[error("looking whether folder and store belong together")]
    Cluster(#[from] ClusterError),
    /// A socket.
    #[error("binding the sockets of AMS")]
    Bind(#[from] BindError),
    /// Trusted certificates.
    #[error("reading whom to trust")]
    Trust(#[from] TrustError),
    /// The engine.
    #[error("opening the instances")]
    Engine(#[from] EngineError),
    /// Images.
    #[error("opening the images")]
    Images(#[from] ImageError),
    /// Packages.
    #[error("opening the applications")]
    Catalog(#[from] CatalogError),
    /// Several units where each would see its own instances only.
    #[error(
        "unit {own}: the unit {other} uses the same store; it runs instances of its own machine, which this one cannot see"
    )]
    Units {
        /// This unit.
        own: String,
        /// That is there.
        other: String,
    },
    /// The agent's settings.
    #[error("preparing the way to the agent")]
    Agent(#[source] ClientError),
}

/// AMS that runs. Dropping it does not stop it; [`Running::stop`] does. Instances go on either way.
pub struct Running {
    /// Fingerprint of the API's certificate.
    pub fingerprint: String,
    ams: Ams,
}

impl Running {
    /// Address of the API.
    pub fn address(&self) -> SocketAddr {
        self.ams.address
    }

    /// Resolves when AMS has been asked to stop.
    pub async fn wait(&self) {
        self.ams.shutdown.stopping().await;
    }

    /// Ends all requests and tasks, and frees sockets and store.
    pub async fn stop(self) {
        self.ams.shutdown.stop(STOP).await;
        if self.ams.owns_store {
            self.ams.store.close().await;
        }
        if !self.ams.config.socket.as_os_str().is_empty() {
            let _ = std::fs::remove_file(&self.ams.config.socket);
        }
    }
}

/// Everything the shells share; a handle.
#[derive(Clone)]
struct Ams(Arc<Inner>);

struct Inner {
    config: Config,
    store: Handle,
    owns_store: bool,
    engine: Arc<dyn Engine>,
    events: Events,
    operations: Operations,
    catalog: Catalog,
    addons: Addons,
    peers: Peers,
    trust: Trust,
    identities: Identities,
    settings: Settings,
    access: http::Access,
    execs: http::Execs,
    metrics: Arc<Metrics>,
    agent: Option<AgentClient>,
    images: Images,
    nodes: Nodes,
    index: Arc<Index>,
    /// The units that are there, and which of them looks after what.
    units: watch::Sender<Units>,
    cluster: ClusterRecord,
    address: SocketAddr,
    /// One launch is written at a time.
    creating: tokio::sync::Mutex<()>,
    pools: Pools,
    /// The task of every instance.
    tasks: Mutex<HashMap<InstanceId, Arc<Notify>>>,
    shutdown: Shutdown,
}

impl Deref for Ams {
    type Target = Inner;
    fn deref(&self) -> &Inner {
        &self.0
    }
}

impl Inner {
    fn tasks(&self) -> MutexGuard<'_, HashMap<InstanceId, Arc<Notify>>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Starts AMS: takes up what is in the store, adopts the instances that run, and serves the API.
///
/// # Errors
/// Which part could not be started.
pub async fn start(config: Config, parts: Parts) -> Result<Running, StartError> {
    install_provider();
    let folder = make_folder(&config.folder)?;
    let config = Config { folder: folder.clone(), ..config };
    // First of all: who cannot have the port should not touch anything.
    let listener = match parts.listener {
        Some(listener) => listener,
        None => bind_tcp(config.listen)?,
    };
    let address = listener.local_addr().map_err(BindError::Use)?;
    let owns_store = parts.store.is_none();
    let store = match parts.store {
        Some(store) => store,
        None => fanlight_store::open(&config.store).await?,
    };
    let index = Arc::new(Index::default());
    let store: Handle = Arc::new(Noting { store, index: index.clone() });
    // Before anything that removes what has no record.
    let lasts = !owns_store || config.store.lasts();
    let cluster = cluster::open(&store, &folder, &config.cluster_name, lasts).await?;
    let events = Events::default();
    let operations = Operations::open(&config.unit, store.clone(), events.clone()).await?;
    let settings = Settings::open(&config, store.clone(), operations.clone()).await?;
    let engine: Arc<dyn Engine> = match parts.engine {
        Some(engine) => engine,
        None => match config.engine.kind {
            EngineKind::Process => Arc::new(ProcessEngine::open(process_config(&config, &folder)).await?),
            EngineKind::Lxd => Arc::new(LxdEngine::open(config.lxd.clone()).await?),
        },
    };
    let images = Images::open(&folder, store.clone(), engine.clone(), operations.clone()).await?;
    let files = KeyFiles { certificate: config.tls.certificate.clone(), key: config.tls.key.clone() };
    let signs = watch::Sender::new(units::Signs::new());
    let identity = Identity { certificate: files.certificate.clone(), key: files.key.clone() };
    let peers = Peers::new(&config.unit, identity, signs.subscribe());
    let addons =
        Addons::open(&folder, config.applications.clone(), store.clone(), operations.clone(), peers.clone())
            .await?;
    let catalog = Catalog::open(
        &folder,
        config.applications.clone(),
        settings.clone(),
        store.clone(),
        operations.clone(),
        images.clone(),
        addons.clone(),
        peers.clone(),
    )
    .await?;
    let trust = Trust::new(&config)?;
    let identities = Identities::open(store.clone(), operations.clone()).await?;
    let access = http::Access::open(&store).await?;
    let agent = agent(&config).map_err(StartError::Agent)?;
    let mut names = vec!["localhost".to_owned(), Ipv4Addr::LOCALHOST.to_string(), "::1".to_owned()];
    if !address.ip().is_unspecified() {
        names.push(address.ip().to_string());
    }
    names.extend(config.tls.names.iter().cloned());
    names.sort();
    names.dedup();
    let fingerprint = ensure_self_signed(&files, "Fanlight AMS", &names)?;
    let tls = server_config(&files)?;
    let socket = match config.socket.as_os_str().is_empty() {
        true => None,
        // Who may use it is checked by user id.
        false => Some(bind_unix(&config.socket, if config.socket_uids.is_empty() { 0o600 } else { 0o666 })?),
    };
    let mut lease: Option<LeaseId> = None;
    let advertise = match config.advertise.as_str() {
        "" if address.ip().is_unspecified() => String::new(),
        "" => address.to_string(),
        given => given.to_owned(),
    };
    let sign = units::Sign { address: advertise, fingerprint: fingerprint.clone() };
    units::sign(&store, &config.unit, &sign, &mut lease).await?;
    let live = live_units(&store).await?;
    if let Some(other) = live.iter().find(|unit| **unit != config.unit)
        && !engine.is_shared()
    {
        return Err(StartError::Units { own: config.unit.clone(), other: other.clone() });
    }
    let (instances, first) = watch_first(&store, key::INSTANCES).await?;
    index.apply(first);
    let (operations_told, _) = watch_first(&store, key::OPERATIONS).await?;
    let (applications_told, _) = watch_first(&store, key::APPLICATIONS).await?;
    let ams = Ams(Arc::new(Inner {
        index,
        units: watch::Sender::new(Units::new(&config.unit).with(live)),
        nodes: Nodes::new(
            config.node.clone(),
            settings.clone(),
            engine.clone(),
            store.clone(),
            operations.clone(),
        ),
        images,
        store,
        owns_store,
        engine,
        events,
        operations,
        catalog,
        addons,
        peers,
        trust,
        identities,
        settings,
        access,
        execs: http::Execs::default(),
        metrics: Metrics::new(),
        agent,
        cluster,
        address,
        creating: tokio::sync::Mutex::default(),
        pools: Pools::default(),
        tasks: Mutex::default(),
        shutdown: Shutdown::new(),
        config,
    }));
    ams.settings.follow(&ams.shutdown);
    ams.identities.follow(&ams.shutdown);
    ams.shutdown.spawn_until_stopped("metrics", ams.metrics.clone().follow(ams.events.clone()));
    ams.listen_to_engine();
    ams.adopt().await?;
    let unit = ams.config.unit.clone();
    ams.shutdown.spawn("unit", units::keep(ams.store.clone(), unit, sign, lease, ams.shutdown.clone()));
    ams.shutdown.spawn_until_stopped("units", units::follow(ams.store.clone(), ams.units.clone(), signs));
    ams.shutdown.spawn_until_stopped("parts", ams.clone().follow_units());
    ams.shutdown.spawn_until_stopped("instances", ams.clone().follow_instances(instances));
    ams.shutdown.spawn_until_stopped("operations", ams.clone().follow_operations(operations_told));
    ams.shutdown.spawn_until_stopped("applications", ams.clone().follow_applications(applications_told));
    ams.shutdown.spawn_until_stopped("rounds", ams.clone().rounds());
    ams.shutdown.spawn_until_stopped("updates", ams.clone().keep_applications_new());
    ams.shutdown.spawn_until_stopped("pools", ams.clone().keep_pools());
    let (edge, local) = (http::edge(ams.clone(), "https"), http::edge(ams.clone(), "unix"));
    let limits = Limits {
        connections: ams.config.limits.connections,
        body_bytes: ams.config.limits.body_bytes,
        ..Limits::default()
    };
    serve(Binding::Tls(listener, tls), edge, limits, &ams.shutdown)?;
    if let Some(socket) = socket {
        serve(Binding::Unix(socket), local, limits, &ams.shutdown)?;
    }
    Ok(Running { fingerprint, ams })
}

impl Ams {
    /// Wakes the task of an instance when the engine has news of it.
    fn listen_to_engine(&self) {
        let mut changes = self.engine.changes();
        let ams = self.clone();
        self.shutdown.spawn_until_stopped("engine", async move {
            loop {
                match changes.recv().await {
                    Ok(id) => ams.nudge(&id),
                    Err(RecvError::Lagged(_)) => ams.tasks().values().for_each(|notify| notify.notify_one()),
                    Err(RecvError::Closed) => return,
                }
            }
        });
    }

    /// Gives every record its task, and removes what the engine has without a record.
    async fn adopt(&self) -> Result<(), StoreError> {
        self.reconcile_all();
        self.adopt_versions().await?;
        self.sweep().await
    }

    /// Gives a task to every instance that is this unit's, and to those that are gone while an operation waits for that.
    fn reconcile_all(&self) {
        for id in self.index.ids().into_iter().chain(self.operations.waited_for()) {
            self.reconcile(&id);
        }
    }

    /// Goes on with the versions of applications that were being made.
    async fn adopt_versions(&self) -> Result<(), StoreError> {
        for (application, number) in self.catalog.unfinished().await? {
            if self.is_ours(application.as_str()) {
                self.make_version(application, number, None);
            }
        }
        Ok(())
    }

    /// Whether something is this unit's to look after.
    fn is_ours(&self, id: &str) -> bool {
        self.units.borrow().is_ours(id)
    }

    /// Takes over what becomes ours when a unit comes or goes.
    async fn follow_units(self) {
        let mut units = self.units.subscribe();
        while units.changed().await.is_ok() {
            units.borrow_and_update();
            // Those that are no longer ours end at their next look.
            self.tasks().values().for_each(|notify| notify.notify_one());
            self.reconcile_all();
            self.pools.wake();
            if let Err(error) = self.adopt_versions().await {
                tracing::warn!("taking over versions that are being made: {error}");
            }
        }
    }

    /// Tells what happens to instances, whichever unit did it, and looks at those that are ours.
    async fn follow_instances(self, mut told: Watch) {
        loop {
            while let Some(event) = told.next().await {
                for changed in self.index.apply(event) {
                    self.tell(&changed);
                }
            }
            told = match self.watch_again(key::INSTANCES).await {
                Some(told) => told,
                None => return,
            };
        }
    }

    fn tell(&self, changed: &Changed) {
        for event in changed.events() {
            self.events.lifecycle(event, &changed.url());
        }
        // What was seen is written by who looks after it; what is wanted may come from any unit.
        let wants = |record: &Option<Arc<_>>| {
            record.as_ref().map(|record: &Arc<core::model::InstanceRecord>| {
                (record.intent.clone(), record.session.clone(), record.pool)
            })
        };
        if wants(&changed.before) != wants(&changed.after) {
            self.reconcile(&changed.id);
        }
        if [&changed.before, &changed.after].into_iter().flatten().any(|record| record.pool.is_some()) {
            self.pools.wake();
        }
    }

    /// Tells of operations, whichever unit works on them.
    async fn follow_operations(self, mut told: Watch) {
        loop {
            while let Some(event) = told.next().await {
                let entries = match event {
                    Event::Reset { entries, .. } => entries,
                    Event::Put(entry) => vec![entry],
                    Event::Delete { .. } => Vec::new(),
                };
                for entry in entries {
                    let Ok(record) = decode::<OperationRecord>(&entry.key, &entry.value) else { continue };
                    if let Some(instance) = self.operations.learn(&record) {
                        // Also one that is gone already: its task says so.
                        self.reconcile(&instance);
                    }
                }
            }
            told = match self.watch_again(key::OPERATIONS).await {
                Some(told) => told,
                None => return,
            };
        }
    }

    /// Tells of changed applications, whichever unit changed them.
    async fn follow_applications(self, mut told: Watch) {
        loop {
            while let Some(event) = told.next().await {
                let keys = match event {
                    Event::Reset { entries, .. } => entries.into_iter().map(|entry| entry.key).collect(),
                    Event::Put(entry) => vec![entry.key],
                    Event::Delete { key, .. } => vec![key],
                };
                for key in keys {
                    if let Some(id) = key.strip_prefix(key::APPLICATIONS) {
                        self.pools.wake();
                        self.events.lifecycle("application-changed", &format!("/1.0/applications/{id}"));
                    }
                }
            }
            told = match self.watch_again(key::APPLICATIONS).await {
                Some(told) => told,
                None => return,
            };
        }
    }

    /// Follows a prefix again after the store ended a watch; none: the store is closed.
    async fn watch_again(&self, prefix: &str) -> Option<Watch> {
        loop {
            match self.store.watch(prefix).await {
                Ok(watch) => return Some(watch),
                Err(StoreError::Closed) => return None,
                Err(error) => {
                    tracing::debug!("following {prefix}: {error}");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        }
    }

    async fn sweep(&self) -> Result<(), StoreError> {
        let there = match self.engine.list().await {
            Ok(there) => there,
            Err(error) => {
                tracing::warn!("listing the instances of the engine: {error}");
                return Ok(());
            }
        };
        for id in there {
            if !self.is_ours(id.as_str()) {
                continue;
            }
            // The record is always written first and removed last, so what has none is nobody's.
            if self.store.get(&key::instance(&id)).await?.is_none() {
                tracing::warn!(instance.id = %id, "instance {id} has no record: removing it");
                if let Err(error) = self.engine.delete(&id).await {
                    tracing::warn!(instance.id = %id, "removing instance {id}: {error}");
                }
            } else {
                self.reconcile(&id);
            }
        }
        Ok(())
    }

    /// Housekeeping, for ever.
    async fn rounds(self) {
        let mut interval = tokio::time::interval(ROUND);
        interval.tick().await;
        loop {
            interval.tick().await;
            let now = unix_now();
            let units = self.units.borrow().clone();
            for result in [
                self.sweep().await,
                self.operations.end_orphans(&units, now).await,
                self.operations.prune(now).await,
                self.forget_launches(now).await,
                self.catalog.tidy(IN_FLIGHT).await,
                self.addons.tidy(IN_FLIGHT).await,
            ] {
                if let Err(error) = result {
                    tracing::warn!("housekeeping: {}", fanlight_service::telemetry::chain(&error));
                }
            }
        }
    }

    /// Launches are remembered longer than anybody repeats them.
    async fn forget_launches(&self, now: i64) -> Result<(), StoreError> {
        let records = self.store.list_json::<LaunchRecord>(key::LAUNCHES).await?;
        let old: Vec<Op> = records
            .into_iter()
            .filter(|(_, record)| record.value.at + REMEMBER_S < now)
            .map(|(key, _)| Op::delete(key))
            .collect();
        for part in old.chunks(fanlight_store::MAX_TRANSACTION_OPS) {
            self.store.transact(Vec::new(), part.to_vec()).await?;
        }
        Ok(())
    }
}

async fn live_units(store: &Handle) -> Result<BTreeSet<String>, StoreError> {
    let range = store.range(key::UNITS, None, MOST_UNITS).await?;
    let name = |entry: &fanlight_store::Entry| Some(entry.key.strip_prefix(key::UNITS)?.to_owned());
    Ok(range.entries.iter().filter_map(name).collect())
}

/// Begins to follow a prefix; gives what is there now apart, because nothing of that has just happened.
async fn watch_first(store: &Handle, prefix: &str) -> Result<(Watch, Event), StoreError> {
    let mut watch = store.watch(prefix).await?;
    let first = watch.next().await.ok_or(StoreError::Closed)?;
    Ok((watch, first))
}

fn make_folder(path: &Path) -> Result<PathBuf, StartError> {
    use std::os::unix::fs::DirBuilderExt as _;
    let fail = |source| StartError::Folder { path: path.to_owned(), source };
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(fail)?;
    path.canonicalize().map_err(fail)
}

fn process_config(config: &Config, folder: &Path) -> ProcessConfig {
    let own = std::env::current_exe().unwrap_or_default();
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let mut shim = config.engine.shim.clone();
    if shim.is_empty() {
        shim = vec![text(&own), "shim".into()];
    }
    let mut streamer = config.engine.streamer.clone();
    if streamer.is_empty() {
        let name = "fanlight-streamer";
        let beside = own.with_file_name(name);
        streamer = vec![if beside.is_file() { text(&beside) } else { name.into() }, "run".into()];
    }
    let mut hidden = vec![folder.to_owned()];
    if let Some(parent) =
        config.socket.parent().filter(|parent| parent.is_absolute() && parent.components().count() > 2)
    {
        hidden.push(parent.to_owned());
    }
    ProcessConfig {
        node: config.node.name.clone(),
        address: config.node.address.clone(),
        folder: folder.join("instances"),
        shim,
        streamer,
        programs: config.engine.programs.clone(),
        hidden,
        first_uid: config.engine.first_uid,
        uids: config.engine.uids,
        bounds: config.engine.bounds,
    }
}

fn agent(config: &Config) -> Result<Option<AgentClient>, ClientError> {
    let agent = &config.agent;
    if agent.url.is_empty() {
        return Ok(None);
    }
    let trust = match agent.fingerprint.as_str() {
        "" => ServerTrust::Authority(agent.ca.clone()),
        fingerprint => ServerTrust::Pinned(fingerprint.to_owned()),
    };
    let identity = Identity { certificate: agent.certificate.clone(), key: agent.key.clone() };
    Ok(Some(AgentClient::new(Endpoint::http(&agent.url, &trust, Some(&identity))?)))
}
