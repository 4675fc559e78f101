//! AMS: applications, instances, the node they run on, and the operations that change them. It owns what should
//! be (in the store) and what it last saw of the engine; what really runs is the engine's truth.
//!
//! ```text
//! http (routes) ──► catalog, instances, operations (shells over store and engine) ──► core (plain values)
//! ```
//! It knows nothing of gateways and signalling. A streamed instance carries its session as data.

mod catalog;
mod config;
mod core;
pub mod engine;
mod events;
mod http;
mod instances;
pub mod isolation;
mod manifest;
mod node;
mod operations;
mod package;
mod processes;
pub mod shim;
mod size;
mod trust;

/// The plain values of this crate, for the simulation in `tests/sim`.
#[doc(hidden)]
pub mod cores {
    pub use crate::core::{life, model, placement};
}

use std::{
    collections::HashMap,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    ops::Deref,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use fanlight_api::{ApplicationId, InstanceId};
use fanlight_client::{AgentClient, ClientError, Endpoint, Identity, Trust as ServerTrust};
use fanlight_service::{
    Shutdown,
    http::{BindError, Binding, Limits, bind_tcp, bind_unix, serve},
    tls::{KeyFiles, TlsError, ensure_self_signed, install_provider, server_config},
};
use fanlight_store::{Handle, Op, StoreError, StoreExt as _};
use tokio::sync::{Notify, broadcast::error::RecvError};

use crate::core::model::{ClusterRecord, InstanceRecord, LaunchRecord, key};
use crate::{
    catalog::{Catalog, CatalogError},
    engine::{Engine, EngineError, ProcessConfig, ProcessEngine},
    events::{Events, unix_now},
    node::Node,
    operations::Operations,
    trust::{Trust, TrustError},
};

pub use crate::config::{
    Agent as AgentConfig, Applications, Config, Engine as EngineConfig, Limits as ConfigLimits, Media,
    Node as NodeConfig, Tls, Trust as TrustConfig,
};
pub use crate::core::life::{Phase, Seen};

/// How long going down may take.
const STOP: Duration = Duration::from_secs(10);
/// Between looks at everything.
const ROUND: Duration = Duration::from_secs(60);
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
    /// A socket.
    #[error("binding the sockets of AMS")]
    Bind(#[from] BindError),
    /// Trusted certificates.
    #[error("reading whom to trust")]
    Trust(#[from] TrustError),
    /// The engine.
    #[error("opening the instances")]
    Engine(#[from] EngineError),
    /// Packages.
    #[error("opening the applications")]
    Catalog(#[from] CatalogError),
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
    trust: Trust,
    agent: Option<AgentClient>,
    node: Node,
    cluster: ClusterRecord,
    address: SocketAddr,
    /// One launch is written at a time.
    creating: tokio::sync::Mutex<()>,
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
    let cluster = cluster(&store, &config).await?;
    let events = Events::default();
    let operations = Operations::open(store.clone(), events.clone()).await?;
    let catalog = Catalog::open(
        &folder,
        config.applications.clone(),
        store.clone(),
        operations.clone(),
        events.clone(),
    )
    .await?;
    let engine: Arc<dyn Engine> = match parts.engine {
        Some(engine) => engine,
        None => Arc::new(ProcessEngine::open(process_config(&config, &folder)).await?),
    };
    let trust = Trust::new(&config, store.clone())?;
    let agent = agent(&config).map_err(StartError::Agent)?;
    let files = KeyFiles { certificate: config.tls.certificate.clone(), key: config.tls.key.clone() };
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
    let ams = Ams(Arc::new(Inner {
        node: Node::new(&config.node),
        store,
        owns_store,
        engine,
        events,
        operations,
        catalog,
        trust,
        agent,
        cluster,
        address,
        creating: tokio::sync::Mutex::default(),
        tasks: Mutex::default(),
        shutdown: Shutdown::new(),
        config,
    }));
    ams.listen_to_engine();
    ams.adopt().await?;
    ams.shutdown.spawn_until_stopped("rounds", ams.clone().rounds());
    let edge = http::edge(ams.clone());
    let limits = Limits {
        connections: ams.config.limits.connections,
        body_bytes: ams.config.limits.body_bytes,
        ..Limits::default()
    };
    serve(Binding::Tls(listener, tls), edge.clone(), limits, &ams.shutdown)?;
    if let Some(socket) = socket {
        serve(Binding::Unix(socket), edge, limits, &ams.shutdown)?;
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
        let records = self.store.list_json::<InstanceRecord>(key::INSTANCES).await?;
        for (_, record) in records {
            self.reconcile(&record.value.id);
        }
        self.sweep().await
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
            for result in
                [self.sweep().await, self.operations.prune(now).await, self.forget_launches(now).await]
            {
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

fn make_folder(path: &Path) -> Result<PathBuf, StartError> {
    use std::os::unix::fs::DirBuilderExt as _;
    let fail = |source| StartError::Folder { path: path.to_owned(), source };
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(fail)?;
    path.canonicalize().map_err(fail)
}

async fn cluster(store: &Handle, config: &Config) -> Result<ClusterRecord, StoreError> {
    let record = store
        .update_json::<ClusterRecord, _, _>(key::CLUSTER, |record| {
            // Any xid will do.
            let id = record.map_or_else(|| ApplicationId::generate().to_string(), |record| record.id);
            Some(ClusterRecord { id, name: config.cluster_name.clone() })
        })
        .await?;
    Ok(record.expect("it was just written").value)
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
        folder: folder.join("instances"),
        shim,
        streamer,
        programs: config.engine.programs.clone(),
        hidden,
        first_uid: config.engine.first_uid,
        uids: config.engine.uids,
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
