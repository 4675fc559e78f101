//! The stream gateway: the public API, the relay of signalling, and the choice of cluster. It owns sessions and
//! accounts, in the store; every unit of it is equal, and none owns a session.
//!
//! ```text
//! api, ui (routes) ──► sessions, relay (shells over store and bus) ──► session, agents, token (plain values)
//! ```
//! It knows nothing of AMS and nodes, and never looks inside a signalling frame.

mod absence;
mod accounts;
mod agents;
mod api;
mod config;
mod doctor;
mod geoip;
mod index;
mod observer;
mod owner;
#[cfg(test)]
mod properties;
mod rate;
mod relay;
mod session;
mod sessions;
mod settings;
mod shares;
mod token;
mod ui;

/// The plain values of this crate, for the simulation in `tests/sim`.
#[doc(hidden)]
pub mod cores {
    pub mod absence {
        pub use crate::absence::*;
    }
    pub mod agents {
        pub use crate::agents::*;
    }
    pub mod session {
        pub use crate::session::*;
    }
}

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    ops::Deref,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::{Duration, Instant, SystemTime},
};

use fanlight_bus::{Bus, BusError};
use fanlight_service::{
    Shutdown,
    health::Ready,
    http::{BindError, Binding, Edge, Limits, bind_tcp, bind_unix, serve},
    tls::{KeyFiles, TlsError, ensure_self_signed, install_provider, public_server_config},
};
use fanlight_store::{Handle, StoreError};
use tokio::sync::Semaphore;

pub use api::openapi;
pub use config::{Config, Cors, Limits as ConfigLimits, Metrics, Placement, Tls, Ui};

/// How long going down may take.
const STOP: Duration = Duration::from_secs(10);

/// What may be given instead of made from the configuration: by `fanlight up`, which shares one bus among its
/// parts, and by tests.
#[derive(Default)]
pub struct Parts {
    /// Instead of `bus.*`.
    pub bus: Option<Bus>,
    /// Instead of `store.*`.
    pub store: Option<Handle>,
    /// Bound already, instead of `listen`.
    pub listener: Option<TcpListener>,
    /// Bound already, instead of `ui.listen`; must be on loopback.
    pub ui_listener: Option<TcpListener>,
    /// Bound already, instead of `metrics.listen`.
    pub metrics_listener: Option<TcpListener>,
}

/// The gateway could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A value of the configuration.
    #[error("{0}")]
    Config(String),
    /// The bus.
    #[error("connecting the gateway's bus")]
    Bus(#[from] BusError),
    /// The store.
    #[error("opening the gateway's store")]
    Store(#[from] StoreError),
    /// The certificate.
    #[error("preparing the gateway's certificate")]
    Tls(#[from] TlsError),
    /// A socket.
    #[error("binding the gateway's sockets")]
    Bind(#[from] BindError),
    /// The database of addresses.
    #[error("{0}")]
    GeoIp(String),
}

/// A gateway that runs. Dropping it does not stop it; [`Running::stop`] does.
pub struct Running {
    /// Address of the public API.
    pub public_address: SocketAddr,
    /// Address of the page's plain listener.
    pub ui_address: Option<SocketAddr>,
    /// Address of the metrics.
    pub metrics_address: Option<SocketAddr>,
    /// The internal API's socket.
    pub internal_socket: Option<PathBuf>,
    /// Fingerprint of the public API's certificate.
    pub fingerprint: String,
    gateway: Gateway,
}

impl Running {
    /// Resolves when the gateway has been asked to stop.
    pub async fn wait(&self) {
        self.gateway.shutdown.stopping().await;
    }

    /// Tells clients, ends all requests and tasks, and frees sockets and store.
    pub async fn stop(self) {
        self.gateway.shutdown.stop(STOP).await;
        if self.gateway.owns_store {
            self.gateway.store.close().await;
        }
        if let Some(path) = &self.internal_socket {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Everything the shells share; a handle.
#[derive(Clone)]
struct Gateway(Arc<Inner>);

struct Inner {
    config: Config,
    bus: Bus,
    store: Handle,
    owns_store: bool,
    accounts: accounts::Accounts,
    agents: Mutex<agents::Agents>,
    geoip: Option<geoip::GeoIp>,
    index: index::Index,
    reconciler: sessions::Reconciler,
    ownership: owner::Ownership,
    settings: RwLock<Arc<settings::Settings>>,
    observer: Arc<observer::Observer>,
    bucket: Mutex<rate::Bucket>,
    callers: Mutex<rate::Callers>,
    sockets: Arc<Semaphore>,
    ready: Ready,
    shutdown: Shutdown,
    started: Instant,
    public_address: SocketAddr,
}

impl Deref for Gateway {
    type Target = Inner;
    fn deref(&self) -> &Inner {
        &self.0
    }
}

impl Inner {
    fn agents(&self) -> MutexGuard<'_, agents::Agents> {
        self.agents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Unix seconds.
    fn now(&self) -> i64 {
        self.now_ms() / 1000
    }

    /// Unix milliseconds.
    fn now_ms(&self) -> i64 {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        i64::try_from(now.as_millis()).unwrap_or(i64::MAX)
    }

    /// The settings in force now.
    fn settings(&self) -> Arc<settings::Settings> {
        self.settings.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes over the items that were set.
    fn set_settings(&self, set: &BTreeMap<String, String>) {
        let next = settings::Settings::new(&self.config, set);
        let rate = next.requests_per_second;
        let before = std::mem::replace(
            &mut *self.settings.write().unwrap_or_else(PoisonError::into_inner),
            Arc::new(next),
        );
        if before.requests_per_second != rate {
            *self.bucket.lock().unwrap_or_else(PoisonError::into_inner) =
                rate::Bucket::new(rate, Instant::now());
        }
    }

    fn take_turn(&self, asker: rate::Asker) -> bool {
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner).take(Instant::now(), asker)
    }

    fn callers(&self) -> MutexGuard<'_, rate::Callers> {
        self.callers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Right after the start no agent was heard of yet: waits until one was, or until one should have been.
    async fn first_reports(&self) {
        while self.started.elapsed() < sessions::FIRST_REPORTS && self.agents().counts(Instant::now()).0 == 0
        {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// The public listener as callers on this machine reach it.
    fn reachable_address(&self) -> SocketAddr {
        let mut address = self.public_address;
        if address.ip().is_unspecified() {
            address.set_ip(match address.ip() {
                IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
                IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
            });
        }
        address
    }
}

/// Starts a gateway. It serves when this returns.
///
/// # Errors
/// Says which part could not be started; nothing is left running.
pub async fn start(config: Config, parts: Parts) -> Result<Running, StartError> {
    install_provider();
    // Sockets first: an address in use should be told before anything is opened or changed.
    let listener = match parts.listener {
        Some(listener) => listener,
        None => bind_tcp(config.listen)?,
    };
    let public_address = listener.local_addr().map_err(BindError::Use)?;
    let bind_optional =
        |given: Option<TcpListener>, address: Result<Option<SocketAddr>, String>| match (given, address) {
            (Some(listener), _) => Ok(Some(listener)),
            (None, Err(problem)) => Err(StartError::Config(problem)),
            (None, Ok(None)) => Ok(None),
            (None, Ok(Some(address))) => Ok(Some(bind_tcp(address)?)),
        };
    let ui_listener = bind_optional(parts.ui_listener, config.ui_address())?;
    let metrics_listener = bind_optional(parts.metrics_listener, config.metrics_address())?;
    let ui_address = ui_listener.as_ref().map(TcpListener::local_addr).transpose().map_err(BindError::Use)?;
    if let Some(address) = ui_address.filter(|address| !address.ip().is_loopback()) {
        return Err(StartError::Config(format!(
            "the page's plain listener is at {address}, not on loopback"
        )));
    }
    let internal_socket = Some(config.internal_socket.clone()).filter(|path| !path.as_os_str().is_empty());
    let internal_listener = internal_socket.as_deref().map(|path| bind_unix(path, 0o600)).transpose()?;

    let files = KeyFiles { certificate: config.tls.certificate.clone(), key: config.tls.key.clone() };
    let fingerprint = ensure_self_signed(&files, "Fanlight gateway", &names(&config, public_address))?;
    let tls = public_server_config(&files)?;

    let owns_store = parts.store.is_none();
    let geoip = match config.placement.geoip_database.as_os_str().is_empty() {
        true => None,
        false => Some(geoip::GeoIp::open(&config.placement.geoip_database).map_err(StartError::GeoIp)?),
    };
    let store = match parts.store {
        Some(store) => store,
        None => fanlight_store::open(&config.store).await?,
    };
    let bus = match parts.bus {
        Some(bus) => bus,
        None => Bus::connect(&config.bus).await?,
    };
    let accounts = accounts::Accounts::open(store.clone()).await?;
    let ready = Ready::new();
    let starting = ready.hold("the session records");
    let shutdown = Shutdown::new();
    let limits = Limits {
        connections: config.limits.connections,
        body_bytes: config.limits.body_bytes,
        ..Limits::default()
    };
    let settings = settings::Settings::new(&config, &BTreeMap::new());
    let gateway = Gateway(Arc::new(Inner {
        bucket: Mutex::new(rate::Bucket::new(config.limits.requests_per_second, Instant::now())),
        callers: Mutex::default(),
        sockets: Arc::new(Semaphore::new(config.limits.sockets.min(Semaphore::MAX_PERMITS))),
        config,
        bus,
        store,
        owns_store,
        accounts,
        agents: Mutex::default(),
        geoip,
        settings: RwLock::new(Arc::new(settings)),
        ownership: owner::Ownership::default(),
        index: index::Index::default(),
        reconciler: sessions::Reconciler::default(),
        observer: observer::Observer::new(),
        ready,
        shutdown: shutdown.clone(),
        started: Instant::now(),
        public_address,
    }));
    let running = Running {
        public_address,
        ui_address,
        metrics_address: metrics_listener.as_ref().and_then(|listener| listener.local_addr().ok()),
        internal_socket,
        fingerprint,
        gateway: gateway.clone(),
    };
    let serve_all = async {
        gateway.start_settings().await?;
        gateway.start_sessions().await?;
        drop(starting);
        let edge = |door| {
            Edge::new(api::router(&gateway, door), gateway.observer.clone(), gateway.config.limits.body_bytes)
        };
        serve(Binding::Tls(listener, tls), edge(api::Door::Public), limits, &shutdown)?;
        if let (Some(listener), Some(address)) = (ui_listener, ui_address) {
            let door = api::Door::Page { port: address.port() };
            serve(Binding::Tcp(listener), edge(door), limits, &shutdown)?;
        }
        if let Some(listener) = internal_listener {
            serve(Binding::Unix(listener), edge(api::Door::Internal), limits, &shutdown)?;
        }
        if let Some(listener) = metrics_listener {
            let edge = Edge::new(metrics_router(&gateway), gateway.observer.clone(), 1024);
            serve(Binding::Tcp(listener), edge, limits, &shutdown)?;
        }
        Ok::<_, StartError>(())
    };
    if let Err(error) = serve_all.await {
        running.stop().await;
        return Err(error);
    }
    tracing::info!(
        address = %public_address,
        fingerprint = running.fingerprint,
        "the gateway serves https://{}",
        gateway.reachable_address()
    );
    Ok(running)
}

/// Names and addresses that a self-made certificate should carry.
fn names(config: &Config, address: SocketAddr) -> Vec<String> {
    let mut names: Vec<String> = ["localhost", "127.0.0.1", "::1"].map(String::from).into();
    if !address.ip().is_unspecified() {
        names.push(address.ip().to_string());
    }
    if let Ok(authority) = config.public_authority().parse::<http::uri::Authority>() {
        names.push(authority.host().trim_matches(['[', ']']).to_owned());
    }
    names.sort();
    names.dedup();
    names
}

fn metrics_router(gateway: &Gateway) -> axum::Router {
    let gateway = gateway.clone();
    let render = move || {
        let gateway = gateway.clone();
        async move {
            let accounts = gateway.accounts.list().await.map_or(0, |accounts| accounts.len());
            let agents = gateway.agents().counts(Instant::now());
            let text = gateway.observer.render(&gateway.index.all(), accounts, agents);
            ([(http::header::CONTENT_TYPE, "text/plain; version=0.0.4")], text)
        }
    };
    axum::Router::new().route("/metrics", axum::routing::get(render))
}
