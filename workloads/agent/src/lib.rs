//! The agent: the one way from the gateways into the AMS of a cluster.
//!
//! It owns nothing durable. Which sessions there are is asked of AMS and folded in [`sessions`]; which streamers
//! are connected is what their websockets say. Reports to the gateways are whole states, sent again and again;
//! requests of the gateways are idempotent. Packets of signalling are forwarded and not looked at.
//!
//! After a restart streamers connect again and the list of AMS fills the rest.

mod ams;
mod config;
mod embedded_turn;
mod gateway;
mod http;
mod inventory;
mod sessions;
mod stream;
mod token;
mod turn;

/// The plain values of this crate, for the simulation in `tests/sim`.
#[doc(hidden)]
pub mod cores {
    pub use crate::{inventory::*, sessions::*};
}

use std::{
    io::Read,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use fanlight_api::{AgentId, InstanceId, Secret, SessionId, gateway::StunServer, guest::Streaming};
use fanlight_bus::{Bus, BusError};
use fanlight_client::{AmsClient, ClientError};
use fanlight_service::{
    Shutdown,
    http::{BindError, Binding, Edge, GatewayStyle, Limits, bind_tcp, serve},
    tls::{self, KeyFiles, TlsError},
};
use serde_json::Value;
use tokio::sync::Notify;

pub use config::{Ams, Clients, Config, Stun, Tls, Turn};

use inventory::Inventory;
use sessions::{Sessions, Work};
use stream::Streamers;
use token::{KEY_BYTES, Scope, TokenKey};
use turn::Relays;

/// Path of the streamers' websocket.
pub const STREAM_PATH: &str = "/internal/1.0/stream";
/// How long the end of the agent may take.
const STOP_PATIENCE: Duration = Duration::from_secs(8);

/// What an agent is composed of besides its configuration.
#[derive(Default)]
pub struct Parts {
    /// The bus to the gateways; `None`: made from the configuration.
    pub bus: Option<Bus>,
    /// An already bound socket in the place of `listen`.
    pub listener: Option<TcpListener>,
}

/// Why an agent did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration contradicts itself.
    #[error("the configuration is not usable: {}", .0.join("; "))]
    Config(Vec<String>),
    /// The bus.
    #[error("preparing the bus")]
    Bus(#[from] BusError),
    /// The socket.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The certificate.
    #[error("preparing the certificate")]
    Tls(#[from] TlsError),
    /// The way to AMS.
    #[error("preparing the connection to AMS")]
    Ams(#[from] ClientError),
    /// The embedded TURN server.
    #[error("opening the UDP port of the TURN server, turn.listen {listen}")]
    Turn {
        /// Where it should listen.
        listen: SocketAddr,
        /// Why it cannot.
        source: std::io::Error,
    },
    /// The key of tokens.
    #[error("the key of tokens {path:?} cannot be used: {reason}")]
    TokenKey {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
}

/// A running agent.
pub struct Running {
    /// Where streamers and AMS reach it.
    pub address: SocketAddr,
    agent: Arc<Agent>,
}

impl Running {
    /// Ends the agent: gateways are told that it leaves, connections are closed. Instances go on.
    pub async fn stop(self) {
        self.agent.leaving.store(true, Ordering::Release);
        gateway::say_goodbye(&self.agent).await;
        self.agent.shutdown.stop(STOP_PATIENCE).await;
    }

    /// Whether AMS was read at least once and the bus is connected.
    pub fn is_ready(&self) -> bool {
        *self.agent.bus.connected().borrow() && self.agent.inventory().is_complete(Instant::now())
    }
}

/// What all tasks share.
struct Agent {
    config: Config,
    id: AgentId,
    /// Changes with every start.
    incarnation: String,
    bus: Bus,
    ams: AmsClient,
    sessions: Mutex<Sessions>,
    /// Something changed in `sessions` that the gateways should hear of.
    changed: Notify,
    inventory: Mutex<Inventory>,
    /// AMS's list should be read.
    read_ams: Notify,
    streamers: Streamers,
    key: TokenKey,
    agent_url: String,
    /// STUN servers by which clients measure their way to this region.
    stun_urls: Vec<String>,
    embedded_turn: Option<embedded_turn::Running>,
    files: KeyFiles,
    leaving: AtomicBool,
    /// Number of the next complete report.
    series: AtomicU64,
    shutdown: Shutdown,
}

/// Starts an agent. AMS and the bus need not be there yet.
///
/// # Errors
/// The configuration, a file or the socket cannot be used.
pub async fn start(config: Config, parts: Parts) -> Result<Running, StartError> {
    let problems = fanlight_service::config::Validate::problems(&config);
    if !problems.is_empty() {
        return Err(StartError::Config(problems));
    }
    tls::install_provider();
    let id = config.id.parse().map_err(|error| StartError::Config(vec![format!("id: {error}")]))?;
    let listener = match parts.listener {
        Some(listener) => listener,
        None => bind_tcp(config.listen)?,
    };
    let address = listener.local_addr().map_err(BindError::Use)?;
    let files = KeyFiles { certificate: config.tls.certificate.clone(), key: config.tls.key.clone() };
    if !files.certificate.exists() && !files.key.exists() {
        let names =
            ["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned(), address.ip().to_string()];
        tls::ensure_self_signed(&files, "fanlight agent", &names)?;
    }
    let server = tls::server_config(&files)?;
    let key = load_key(&config.token_key)?;
    let ams = AmsClient::new(config.ams.endpoint()?);
    let bus = match parts.bus {
        Some(bus) => bus,
        None => Bus::connect(&config.bus).await?,
    };
    let shutdown = Shutdown::new();
    let embedded_turn = match config.turn.embedded().map_err(StartError::Config)? {
        Some(settings) => {
            let listen = settings.listen;
            let started = embedded_turn::start(settings, &config.turn.secret_file, &shutdown);
            Some(started.map_err(|source| StartError::Turn { listen, source })?)
        }
        None => None,
    };
    let of_embedded = embedded_turn.iter().map(embedded_turn::Running::url);
    let turn_urls: Vec<String> = of_embedded.chain(config.turn.urls.iter().cloned()).collect();
    let agent = Arc::new(Agent {
        id,
        incarnation: SessionId::generate().to_string(),
        bus,
        ams,
        sessions: Mutex::default(),
        changed: Notify::new(),
        inventory: Mutex::default(),
        read_ams: Notify::new(),
        streamers: Streamers::default(),
        key,
        agent_url: agent_url(&config.public_url, address),
        stun_urls: turn::stun_urls(&config.stun.urls, &turn_urls),
        embedded_turn,
        files,
        leaving: AtomicBool::new(false),
        series: AtomicU64::new(1),
        shutdown,
        config,
    });
    let limits = Limits { body_bytes: 64 * 1024, ..Limits::default() };
    let edge = Edge::new(http::router(agent.clone()), Arc::new(GatewayStyle), limits.body_bytes);
    serve(Binding::Tls(listener, server), edge, limits, &agent.shutdown)?;
    gateway::start(&agent).await?;
    ams::start(&agent);
    tracing::info!(
        agent.id = %agent.id,
        region = agent.config.region,
        "agent {} of region {} listens on {address} for {}",
        agent.id,
        agent.config.region,
        agent.ams.endpoint().name()
    );
    Ok(Running { address, agent })
}

/// Where instances reach an agent that listens on `address`.
fn agent_url(public_url: &str, address: SocketAddr) -> String {
    let base = if public_url.is_empty() {
        let ip = match address.ip() {
            ip if !ip.is_unspecified() => ip,
            std::net::IpAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
            std::net::IpAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        };
        format!("wss://{}", SocketAddr::new(ip, address.port()))
    } else {
        public_url.trim_end_matches('/').to_owned()
    };
    if base.ends_with(STREAM_PATH) { base } else { base + STREAM_PATH }
}

/// The key in a file; a new file is made for its owner alone.
fn load_key(path: &Path) -> Result<TokenKey, StartError> {
    let failed = |reason: String| StartError::TokenKey { path: path.to_owned(), reason };
    match std::fs::File::open(path) {
        Ok(mut file) => {
            let mut text = String::new();
            file.read_to_string(&mut text).map_err(|error| failed(error.to_string()))?;
            let bytes = hex::decode(text.trim()).ok().and_then(|bytes| bytes.try_into().ok());
            let bytes: [u8; KEY_BYTES] =
                bytes.ok_or_else(|| failed("64 hexadecimal digits are expected".into()))?;
            Ok(TokenKey::new(bytes))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let bytes: [u8; KEY_BYTES] = rand::random();
            tls::write_private(path, format!("{}\n", hex::encode(bytes)).as_bytes(), 0o600)
                .map_err(|error| failed(error.to_string()))?;
            Ok(TokenKey::new(bytes))
        }
        Err(error) => Err(failed(error.to_string())),
    }
}

impl Agent {
    fn inventory(&self) -> MutexGuard<'_, Inventory> {
        self.inventory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes sessions, tells the reporter, and does the work that follows.
    fn with_sessions<R>(self: &Arc<Self>, change: impl FnOnce(&mut Sessions) -> (R, Vec<Work>)) -> R {
        let (result, work, changes) = {
            let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
            let (result, work) = change(&mut sessions);
            (result, work, sessions.has_changes())
        };
        if changes {
            self.changed.notify_one();
        }
        for work in work {
            self.perform(work);
        }
        result
    }

    fn perform(self: &Arc<Self>, work: Work) {
        match work {
            Work::Launch(launch) => {
                let agent = self.clone();
                self.shutdown
                    .spawn_until_stopped("launch", async move { ams::launch(&agent, *launch).await });
            }
            Work::Delete { instance_id, session_id, force } => {
                let agent = self.clone();
                self.shutdown.spawn_until_stopped("delete", async move {
                    ams::delete(&agent, &instance_id, &session_id, force).await;
                });
            }
            Work::EndStream { session_id, message } => self.streamers.end_stream(&session_id, message),
            Work::ReadAms => self.read_ams.notify_one(),
        }
    }

    /// What an instance of a session needs to find its way back to us.
    fn streaming(
        &self,
        session_id: &SessionId,
        instance_id: Option<&InstanceId>,
        joinable: bool,
        idle_time_min: u32,
        extra_data: Value,
    ) -> Result<Streaming, TlsError> {
        let scope = Scope { session_id: session_id.clone(), instance_id: instance_id.cloned() };
        // Read each time, because the certificate may have been renewed.
        let fingerprint = if self.config.tls.pin {
            tls::fingerprint_of_file(&self.files.certificate)?
        } else {
            String::new()
        };
        Ok(Streaming {
            session_id: session_id.clone(),
            agent_url: self.agent_url.clone(),
            token: self.key.sign(&scope),
            fingerprint,
            joinable,
            idle_time_min,
            extra_data,
        })
    }

    /// ICE servers for a client of a session.
    fn ice_servers(&self, session_id: &SessionId) -> Vec<StunServer> {
        let turn = &self.config.turn;
        let mut relays = Vec::new();
        let mut offer = |urls: Vec<String>, secret: Result<Secret, String>| match secret {
            Ok(secret) => relays.push(Relays { urls, secret }),
            // A TURN entry without credentials would hang clients of the original.
            Err(error) => tracing::error!("clients are told of no TURN servers {urls:?}: {error}"),
        };
        if let Some(embedded) = &self.embedded_turn {
            offer(vec![embedded.url()], embedded.secret());
        }
        if !turn.urls.is_empty() {
            let secret = turn::read_secret(&turn.secret_file);
            let named = |error| format!("the secret {}: {error}", turn.secret_file.display());
            offer(turn.urls.clone(), secret.map_err(named));
        }
        let expires_at = unix_seconds().saturating_add_unsigned(turn.ttl.as_secs());
        turn::servers(&self.config.stun.urls, &relays, session_id, expires_at)
    }
}

fn unix_seconds() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

/// For people and other machines to compare; nothing is decided by it here.
fn unix_millis() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instances_are_told_an_address_that_they_can_reach() {
        for (public, listen, expected) in [
            ("", "127.0.0.1:8445", "wss://127.0.0.1:8445/internal/1.0/stream"),
            ("", "0.0.0.0:8445", "wss://127.0.0.1:8445/internal/1.0/stream"),
            ("", "[::]:8445", "wss://[::1]:8445/internal/1.0/stream"),
            ("wss://agent.example:1/", "0.0.0.0:8445", "wss://agent.example:1/internal/1.0/stream"),
            ("wss://a/internal/1.0/stream", "0.0.0.0:1", "wss://a/internal/1.0/stream"),
        ] {
            assert_eq!(agent_url(public, listen.parse().expect("valid")), expected);
        }
    }

    #[test]
    fn a_key_is_made_once_for_its_owner_alone_and_a_damaged_one_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("token.key");
        let scope = Scope { session_id: "s1".parse().expect("valid"), instance_id: None };
        let first = load_key(&path).expect("made").sign(&scope);
        assert_eq!(load_key(&path).expect("read").sign(&scope), first);
        assert_eq!(std::fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
        std::fs::write(&path, "abc").expect("written");
        let error = load_key(&path).err().expect("damaged").to_string();
        assert!(error.contains("token.key"), "{error}");
    }
}
