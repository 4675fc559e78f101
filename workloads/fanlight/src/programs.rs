//! The programs of a stack, composed in this process or started as programs of their own, with the same settings.

use std::{
    fs,
    net::{SocketAddr, TcpListener},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use fanlight_bus::{Bus, BusConfig};
use fanlight_service::Shutdown;
use fanlight_store::StoreConfig;
use rand::distr::{Alphanumeric, SampleString};
use serde::Serialize;

use crate::{
    children::{self, Program},
    state::write_private,
    up::{Plan, sibling},
};

/// How long programs of their own may take to end.
const STOP_PATIENCE: Duration = Duration::from_secs(30);
/// Name of the only agent of a machine.
const AGENT: &str = "local";
const REGION: &str = "local";

/// The bound ports of a stack.
#[derive(Debug)]
pub struct Ports {
    /// The gateway's API.
    pub gateway: TcpListener,
    /// Where that is.
    pub gateway_address: SocketAddr,
    /// The page on loopback.
    pub page: TcpListener,
    /// Where that is.
    pub page_address: SocketAddr,
    /// The agent.
    pub agent: TcpListener,
    /// Where that is.
    pub agent_address: SocketAddr,
    /// AMS.
    pub ams: TcpListener,
    /// Where that is.
    pub ams_address: SocketAddr,
}

/// The running programs.
#[expect(clippy::large_enum_variant, reason = "there is one of these in a process")]
pub enum Programs {
    /// In this process.
    Here {
        /// The gateway.
        gateway: fanlight_gateway::Running,
        /// The agent.
        agent: fanlight_agent::Running,
        /// AMS.
        ams: fanlight_ams::Running,
    },
    /// As programs of their own.
    Apart(Shutdown),
}

impl Programs {
    /// Ends all of them.
    pub async fn stop(self) {
        match self {
            Self::Here { gateway, agent, ams } => {
                gateway.stop().await;
                agent.stop().await;
                ams.stop().await;
            }
            Self::Apart(shutdown) => {
                shutdown.stop(STOP_PATIENCE).await;
            }
        }
    }
}

/// Starts AMS, agent and gateway.
///
/// # Errors
/// Which of them did not start, and why.
pub async fn start(plan: &Plan, ports: Ports, separate: bool) -> Result<Programs> {
    if separate { apart(plan, ports).await } else { here(plan, ports).await }
}

async fn here(plan: &Plan, ports: Ports) -> Result<Programs> {
    let bus = Bus::local();
    let bus_config = BusConfig::default();
    let settings = Settings::new(plan, &ports, bus_config)?;
    let parts = fanlight_ams::Parts { listener: Some(ports.ams), ..Default::default() };
    let ams = fanlight_ams::start(settings.ams, parts).await.context("starting AMS")?;
    let parts = fanlight_agent::Parts { bus: Some(bus.clone()), listener: Some(ports.agent) };
    let agent = fanlight_agent::start(settings.agent, parts).await.context("starting the agent")?;
    let parts = fanlight_gateway::Parts {
        bus: Some(bus),
        listener: Some(ports.gateway),
        ui_listener: plan.ui.is_some().then_some(ports.page),
        ..Default::default()
    };
    let gateway = fanlight_gateway::start(settings.gateway, parts).await.context("starting the gateway")?;
    Ok(Programs::Here { gateway, agent, ams })
}

async fn apart(plan: &Plan, ports: Ports) -> Result<Programs> {
    let shutdown = Shutdown::new();
    let nats = nats_server()?;
    // The port is free now; nobody else is likely to take it before the server does.
    let port = TcpListener::bind("127.0.0.1:0")
        .and_then(|socket| socket.local_addr())
        .context("finding a free port")?;
    let token = Alphanumeric.sample_string(&mut rand::rng(), 40);
    let token_file = plan.state.run().join("nats-token");
    write_private(&token_file, token.as_bytes())?;
    let nats_config = plan.state.run().join("nats.conf");
    write_private(
        &nats_config,
        format!("listen: \"{port}\"\nauthorization {{ token: \"{token}\" }}\nmax_payload: 1MB\n").as_bytes(),
    )?;
    let bus_config = BusConfig { url: format!("nats://{port}"), token_file, ..BusConfig::default() };
    let settings = Settings::new(plan, &ports, bus_config)?;
    let gateway = write_settings(&plan.state.gateway().join("gateway.toml"), &settings.gateway)?;
    let agent = write_settings(&plan.state.agent().join("agent.toml"), &settings.agent)?;
    let ams = write_settings(&plan.state.run().join("ams.toml"), &settings.ams)?;
    let program = |name: &'static str, settings: String| -> Result<Program> {
        Ok(Program { name, path: sibling(name)?, arguments: vec!["--config".into(), settings] })
    };
    let programs = [
        Program {
            name: "nats-server",
            path: nats,
            arguments: vec!["--config".into(), nats_config.display().to_string()],
        },
        program("fanlight-ams", ams)?,
        program("fanlight-agent", agent)?,
        program("fanlight-gateway", gateway)?,
    ];
    // From here on the ports are theirs.
    drop(ports);
    for program in programs {
        if let Err(error) = children::keep(program, &shutdown) {
            shutdown.stop(STOP_PATIENCE).await;
            return Err(error);
        }
    }
    Ok(Programs::Apart(shutdown))
}

fn nats_server() -> Result<PathBuf> {
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let known =
        std::env::split_paths(&folders).chain([PathBuf::from("/usr/sbin"), PathBuf::from("/usr/local/sbin")]);
    let Some(path) = known.map(|folder| folder.join("nats-server")).find(|path| path.is_file()) else {
        bail!("nats-server is not installed; install the package nats-server, or leave out --separate");
    };
    Ok(path)
}

fn write_settings<T: Serialize>(path: &std::path::Path, settings: &T) -> Result<String> {
    let text = toml::to_string(settings).with_context(|| format!("writing {}", path.display()))?;
    write_private(path, text.as_bytes())?;
    Ok(path.display().to_string())
}

/// The settings of the three programs.
struct Settings {
    gateway: fanlight_gateway::Config,
    agent: fanlight_agent::Config,
    ams: fanlight_ams::Config,
}

impl Settings {
    fn new(plan: &Plan, ports: &Ports, bus: BusConfig) -> Result<Settings> {
        let (state, trust) = (&plan.state, &plan.trust);
        fs::create_dir_all(state.ams()).with_context(|| format!("creating {}", state.ams().display()))?;
        let gateway = fanlight_gateway::Config {
            listen: ports.gateway_address,
            internal_socket: state.gateway_socket(),
            tls: fanlight_gateway::Tls {
                certificate: trust.gateway.certificate.clone(),
                key: trust.gateway.key.clone(),
            },
            ui: fanlight_gateway::Ui {
                listen: if plan.ui.is_some() { ports.page_address.to_string() } else { String::new() },
                path: plan.ui.clone().unwrap_or_default(),
            },
            bus: bus.clone(),
            store: StoreConfig::file(state.gateway().join("gateway.redb")),
            ..Default::default()
        };
        let agent = fanlight_agent::Config {
            id: AGENT.into(),
            region: REGION.into(),
            cluster_id: AGENT.into(),
            listen: ports.agent_address,
            token_key: state.agent().join("token.key"),
            tls: fanlight_agent::Tls {
                certificate: trust.agent.certificate.clone(),
                key: trust.agent.key.clone(),
                ..Default::default()
            },
            clients: fanlight_agent::Clients {
                certificates: vec![trust.ams_client.certificate.clone()],
                ..Default::default()
            },
            ams: fanlight_agent::Ams {
                url: format!("https://{}", ports.ams_address),
                certificate: trust.agent_client.certificate.clone(),
                key: trust.agent_client.key.clone(),
                ca: trust.ca.certificate.clone(),
                ..Default::default()
            },
            bus,
            turn: plan.turn.clone(),
            ..Default::default()
        };
        let media = if plan.address.is_loopback() { String::new() } else { plan.address.to_string() };
        let ams = fanlight_ams::Config {
            listen: ports.ams_address,
            socket: state.ams_socket(),
            folder: state.ams(),
            tls: fanlight_ams::Tls {
                certificate: trust.ams.certificate.clone(),
                key: trust.ams.key.clone(),
                ..Default::default()
            },
            trust: fanlight_ams::TrustConfig {
                certificates: vec![trust.admin.certificate.clone(), trust.agent_client.certificate.clone()],
                ..Default::default()
            },
            store: StoreConfig::file(state.ams().join("ams.redb")),
            agent: fanlight_ams::AgentConfig {
                url: format!("https://{}", ports.agent_address),
                ca: trust.ca.certificate.clone(),
                certificate: trust.ams_client.certificate.clone(),
                key: trust.ams_client.key.clone(),
                ..Default::default()
            },
            engine: fanlight_ams::EngineConfig {
                shim: vec![this_program()?, "shim".into()],
                streamer: vec![sibling("fanlight-streamer")?.display().to_string(), "run".into()],
                programs: own_applications(),
                kind: match plan.lxd {
                    Some(_) => fanlight_ams::EngineKind::Lxd,
                    None => fanlight_ams::EngineKind::Process,
                },
                ..Default::default()
            },
            lxd: plan.lxd.clone().unwrap_or_default(),
            media: fanlight_ams::Media { bind: media, ..Default::default() },
            ..Default::default()
        };
        Ok(Settings { gateway, agent, ams })
    }
}

fn this_program() -> Result<String> {
    Ok(std::env::current_exe().context("finding this program")?.display().to_string())
}

/// Applications of our own that lie beside this program, where they were built.
fn own_applications() -> Vec<PathBuf> {
    ["fanlight-pattern", "fanlight-scene", "fanlight-probe"]
        .iter()
        .filter_map(|name| sibling(name).ok())
        .collect()
}
