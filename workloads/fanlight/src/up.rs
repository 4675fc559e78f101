//! `fanlight up`: a whole stack on one machine.
//!
//! Start: hold the state folder, make the trust, bind the ports, start AMS, agent and gateway (in this process or
//! as programs of their own), register the applications, make sure there is a token, say where everything is.
//! End: end the sessions, stop the instances, stop the programs. After a kill there is no end; the next start adopts
//! the instances that still run.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use fanlight_api::{
    Secret,
    ams::{InstanceStatus, images::ImagesPost},
    gateway::{AccountRights, AccountsPost},
};
use fanlight_client::{AmsClient, Endpoint, GatewayClient, SessionsQuery};
use fanlight_service::{http::bind_tcp, shutdown};
use tokio::time::sleep;

use crate::{
    cli::{Ports, Up},
    detach,
    environment::Environment,
    programs::{self, Ports as BoundPorts, Programs},
    registry,
    state::{State, read_optional, write_private},
    trust::Trust,
};

/// Name of the account whose token is printed.
const ADMIN: &str = "admin";
const GATEWAY_PORT: u16 = 4000;
const PAGE_PORT: u16 = 4080;
const AGENT_PORT: u16 = 8445;
const AMS_PORT: u16 = 8444;
const TURN_PORT: u16 = 3478;
/// How long a part may take to answer after its start.
const START_PATIENCE: Duration = Duration::from_secs(30);
/// How long the end of sessions and instances may take before the programs are ended all the same.
const END_PATIENCE: Duration = Duration::from_secs(20);
const REGISTER_PATIENCE: Duration = Duration::from_secs(120);
const IMAGE_PATIENCE: Duration = Duration::from_secs(600);
/// Name of the image that `--image` brings.
const IMAGE: &str = "default";

/// Everything that is settled before the first program starts.
#[derive(Debug)]
pub struct Plan {
    /// Where files lie.
    pub state: State,
    /// Who trusts whom.
    pub trust: Trust,
    /// Address that clients reach: loopback unless asked otherwise.
    pub address: IpAddr,
    /// Folder of the built page.
    pub ui: Option<PathBuf>,
    /// TURN servers that clients are told of.
    pub turn: fanlight_agent::Turn,
    /// LXD, where instances are its containers.
    pub lxd: Option<fanlight_ams::LxdConfig>,
}

/// Runs a stack until a signal ends it.
///
/// # Errors
/// Which step failed, and what to do.
pub async fn run(options: &Up) -> Result<()> {
    let state = State::open(&options.stack.state)?;
    let started = Instant::now();
    let _hold = state.hold()?;
    if options.lxd.is_none() {
        check_isolation(options)?;
    }
    let address = options.listen.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
    let mut names = if address.is_loopback() { Vec::new() } else { vec![address.to_string()] };
    let lxd = match &options.lxd {
        Some(socket) => Some(lxd(options, socket, address).await?),
        None => None,
    };
    let (lxd, bridge) = lxd.unzip();
    names.extend(bridge.map(|bridge| bridge.to_string()));
    let trust = Trust::ensure(&state.trust(), &names).context("making the certificates")?;
    let ui = options.ui.clone().or_else(installed_page);
    let ports = bind_ports(&state, options.ports, address, bridge)?;
    let (gateway_url, ams_url) =
        (format!("https://{}", ports.gateway_address), format!("https://{}", ports.ams_address));
    let page = match (&ui, address.is_loopback()) {
        (None, _) => None,
        (Some(_), true) => Some(format!("http://{}/ui/", ports.page_address)),
        (Some(_), false) => Some(format!("{gateway_url}/ui/")),
    };
    let plan = Plan { state, trust, address, ui, turn: turn(options)?, lxd };

    progress(if options.separate {
        "starting nats-server, AMS, agent and gateway"
    } else {
        "starting AMS, agent and gateway"
    });
    let programs = programs::start(&plan, ports, options.separate).await?;
    let ready = prepare(&plan, options, &gateway_url, &ams_url, page.as_deref()).await;
    let environment = match ready {
        Ok(environment) => environment,
        Err(error) => {
            programs.stop().await;
            return Err(error);
        }
    };
    announce(&environment, page.is_some(), started);
    if detach::is_child() {
        detach::ready()?;
    }

    let signal = shutdown::signal().await.context("waiting for a signal")?;
    tracing::info!("{signal}: ending the stack");
    if !detach::is_child() {
        progress("ending sessions and instances (again to end at once)");
    }
    tokio::select! {
        () = end(&plan, programs) => {}
        again = shutdown::signal() => {
            again.context("waiting for a signal")?;
        }
    }
    Ok(())
}

/// Programs that strangers drive must not run beside this machine's files without walls.
fn check_isolation(options: &Up) -> Result<()> {
    let Err(reason) = fanlight_ams::isolation::probe() else { return Ok(()) };
    match options.listen {
        Some(address) if !address.is_loopback() => bail!(
            "listening on {address} is refused because applications cannot be isolated here: {reason}. \
             Without --listen the stack serves this machine alone"
        ),
        _ => {
            progress(&format!("applications are not isolated from your files: {reason}"));
            Ok(())
        }
    }
}

/// The settings for LXD, and the address of its bridge: containers reach the agent there and nobody else does.
async fn lxd(options: &Up, socket: &Path, address: IpAddr) -> Result<(fanlight_ams::LxdConfig, IpAddr)> {
    let step = || format!("looking at LXD behind {}", socket.display());
    let client = fanlight_lxd::Lxd::unix(socket).with_context(step)?;
    let network = client.network(&options.lxd_network).await.with_context(step)?;
    let bridge = network.config.get("ipv4.address").and_then(|text| text.split('/').next()?.parse().ok());
    let Some(bridge) = bridge else {
        bail!("the network {} of LXD has no IPv4 address of its own (--lxd-network)", options.lxd_network);
    };
    let config = fanlight_ams::LxdConfig {
        url: socket.canonicalize().with_context(step)?.display().to_string(),
        pool: options.lxd_pool.clone(),
        network: options.lxd_network.clone(),
        // Who is on this machine alone reaches the containers themselves.
        address: if address.is_loopback() { "none".into() } else { address.to_string() },
        ..fanlight_ams::LxdConfig::default()
    };
    Ok((config, bridge))
}

/// Clients beyond this machine may sit where UDP to any port does not go; one port often does.
fn turn(options: &Up) -> Result<fanlight_agent::Turn> {
    let mut turn = fanlight_agent::Turn::default();
    if let Some(secret) = &options.turn_secret {
        // Programs of their own may run in another folder.
        turn.secret_file =
            secret.canonicalize().with_context(|| format!("finding the TURN secret {}", secret.display()))?;
        turn.urls.clone_from(&options.turn);
    } else if let Some(address) = options.listen.filter(|address| !address.is_loopback()) {
        let port = if options.ports == Ports::Auto { 0 } else { TURN_PORT };
        turn.listen = SocketAddr::new(address, port).to_string();
    }
    Ok(turn)
}

/// Where a package would put the page.
fn installed_page() -> Option<PathBuf> {
    let program = std::env::current_exe().ok()?;
    let page = program.parent()?.parent()?.join("share/fanlight/ui");
    page.join("index.html").is_file().then_some(page)
}

fn bind_ports(state: &State, choice: Ports, address: IpAddr, bridge: Option<IpAddr>) -> Result<BoundPorts> {
    let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
    // Instances that outlived a kill look for their agent where it was, so free ports are kept from start to start.
    let before: BTreeMap<String, u16> = match choice {
        Ports::Fixed => BTreeMap::new(),
        Ports::Auto => read_optional(&state.ports_note())?
            .and_then(|text| serde_json::from_str(&text).ok())
            .unwrap_or_default(),
    };
    let mut now = BTreeMap::new();
    let mut bind = |what: &str, address: IpAddr, port: u16| -> Result<(TcpListener, SocketAddr)> {
        let kept = before.get(what).and_then(|port| bind_tcp(SocketAddr::new(address, *port)).ok());
        let wanted = SocketAddr::new(address, if choice == Ports::Auto { 0 } else { port });
        let advice = "end what uses it, or choose other ports with --ports auto";
        let listener = match kept {
            Some(listener) => listener,
            None => {
                bind_tcp(wanted).with_context(|| format!("opening the port of {what}, {wanted}; {advice}"))?
            }
        };
        let bound = listener.local_addr().with_context(|| format!("opening the port of {what}"))?;
        now.insert(what.to_owned(), bound.port());
        Ok((listener, bound))
    };
    let (gateway, gateway_address) = bind("the gateway", address, GATEWAY_PORT)?;
    let (page, page_address) = bind("the page", loopback, PAGE_PORT)?;
    let (agent, agent_address) = bind("the agent", bridge.unwrap_or(loopback), AGENT_PORT)?;
    let (ams, ams_address) = bind("AMS", address, AMS_PORT)?;
    write_private(&state.ports_note(), &serde_json::to_vec(&now).context("noting the ports")?)?;
    Ok(BoundPorts { gateway, gateway_address, page, page_address, agent, agent_address, ams, ams_address })
}

async fn prepare(
    plan: &Plan,
    options: &Up,
    gateway_url: &str,
    ams_url: &str,
    page: Option<&str>,
) -> Result<Environment> {
    let ams = AmsClient::new(Endpoint::unix(plan.state.ams_socket()).context("preparing to speak with AMS")?);
    let gateway = GatewayClient::new(
        Endpoint::unix(plan.state.gateway_socket()).context("preparing to speak with the gateway")?,
        None,
    );
    until_answers("AMS", || async { ams.service().await.map(|_| ()) }).await?;
    until_answers("the gateway", || async { gateway.status().await.map(|_| ()) }).await?;
    if let Some(file) = &options.image {
        bring_image(plan, file, &ams).await?;
    }
    register(plan, options, &ams).await?;
    let token = ensure_token(plan, &gateway).await?;
    wait_for_agent(&gateway, &ams).await?;
    let page_url = match page {
        Some(page) => {
            write_private(&plan.state.page_note(), page.as_bytes())?;
            let code = gateway.login_code().await.context("asking the gateway for a code of the page")?;
            format!("{page}#code={}", code.code.expose())
        }
        None => String::new(),
    };
    let environment = Environment {
        gateway_url: gateway_url.into(),
        ams_url: ams_url.into(),
        token,
        ca: plan.trust.ca.certificate.display().to_string(),
        ams_certificate: plan.trust.admin.certificate.display().to_string(),
        ams_key: plan.trust.admin.key.display().to_string(),
        page_url,
    };
    environment.write(&plan.state.env())?;
    if let Some(file) = &options.env_file {
        environment.write(file)?;
    }
    Ok(environment)
}

async fn until_answers<F, Fut>(what: &str, ask: F) -> Result<()>
where
    F: Fn() -> Fut,
    Fut: Future<Output = Result<(), fanlight_client::ClientError>>,
{
    let until = Instant::now() + START_PATIENCE;
    loop {
        match ask().await {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() > until => {
                return Err(error).with_context(|| format!("waiting for {what} to answer"));
            }
            Err(_) => sleep(Duration::from_millis(20)).await,
        }
    }
}

/// Makes a file the default image; one that is there already is left alone.
async fn bring_image(plan: &Plan, file: &Path, ams: &AmsClient) -> Result<()> {
    let step = || format!("bringing the image {} to AMS", file.display());
    let note = plan.state.image_note();
    let metadata = std::fs::metadata(file).with_context(step)?;
    let modified = metadata.modified().ok().and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
    let print = format!("{} {} {:?}", file.display(), metadata.len(), modified);
    let images = ams.objects("/1.0/images", &[]).await.with_context(step)?;
    let there = images.iter().any(|image| image["name"] == IMAGE);
    if there && read_optional(&note)?.as_deref() == Some(print.as_str()) {
        return Ok(());
    }
    progress(&format!("importing the image {}", file.display()));
    let operation = if there {
        ams.update_image(IMAGE, file).await
    } else {
        let request = ImagesPost { name: IMAGE.into(), default: true, ..ImagesPost::default() };
        ams.upload_image(&request, file).await
    };
    let operation = operation.with_context(step)?;
    ams.wait(&operation, IMAGE_PATIENCE).await.with_context(step)?;
    write_private(&note, print.as_bytes())
}

/// Registers applications from folders; one whose files did not change since is left alone.
async fn register(plan: &Plan, options: &Up, ams: &AmsClient) -> Result<()> {
    let note = plan.state.applications_note();
    let mut known: BTreeMap<String, String> =
        read_optional(&note)?.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default();
    let present: Vec<String> = ams
        .applications()
        .await
        .context("asking AMS for its applications")?
        .into_iter()
        .map(|application| application.name)
        .collect();
    for folder in &options.applications {
        for package in registry::find(folder)? {
            let there = present.contains(&package.name);
            if there && known.get(&package.name) == Some(&package.digest) {
                continue;
            }
            progress(&format!("registering {}", package.name));
            let step = || format!("registering the application in {}", package.folder.display());
            let operation = if there {
                ams.update_application(&package.name, package.archive.clone().into()).await
            } else {
                ams.create_application(package.archive.clone().into()).await
            }
            .with_context(step)?;
            ams.wait(&operation, REGISTER_PATIENCE).await.with_context(step)?;
            known.insert(package.name.clone(), package.digest.clone());
            write_private(&note, &serde_json::to_vec_pretty(&known).context("noting the applications")?)?;
        }
    }
    Ok(())
}

/// The token of the administrator's account: the one on file while its account exists, else a new one.
async fn ensure_token(plan: &Plan, gateway: &GatewayClient) -> Result<Secret> {
    let exists =
        gateway.accounts().await.context("listing the accounts")?.iter().any(|account| account.name == ADMIN);
    if let Some(token) = read_optional(&plan.state.token())?.filter(|_| exists) {
        return Ok(Secret::new(token.trim()));
    }
    if exists {
        gateway.delete_account(ADMIN).await.context("replacing the account whose token is lost")?;
    }
    let request = AccountsPost { name: ADMIN.into(), expiry_at: None, rights: AccountRights::Full };
    let created = gateway.create_account(&request).await.context("making the first account")?;
    write_private(&plan.state.token(), created.token.expose().as_bytes())?;
    Ok(created.token)
}

/// Ready means that a session can be made: the gateway has heard of every application that AMS has.
async fn wait_for_agent(gateway: &GatewayClient, ams: &AmsClient) -> Result<()> {
    let wanted: Vec<String> = ams
        .applications()
        .await
        .context("asking AMS for its applications")?
        .into_iter()
        .filter(|application| application.published)
        .map(|application| application.name)
        .collect();
    let until = Instant::now() + START_PATIENCE;
    loop {
        let known = gateway.applications().await.context("asking the gateway for its applications")?;
        let missing: Vec<&String> =
            wanted.iter().filter(|name| !known.iter().any(|known| known.name == **name)).collect();
        let regions = gateway.regions().await.context("asking the gateway for its regions")?;
        if missing.is_empty() && !regions.is_empty() {
            return Ok(());
        }
        if Instant::now() > until {
            bail!(
                "the agent did not report to the gateway in {} s; missing: {missing:?}",
                START_PATIENCE.as_secs()
            );
        }
        sleep(Duration::from_millis(50)).await;
    }
}

async fn end(plan: &Plan, programs: Programs) {
    if tokio::time::timeout(END_PATIENCE, end_instances(plan)).await.is_err() {
        tracing::warn!("sessions and instances did not all end in {} s", END_PATIENCE.as_secs());
    }
    programs.stop().await;
}

async fn end_instances(plan: &Plan) {
    let ended = async {
        let gateway = GatewayClient::new(Endpoint::unix(plan.state.gateway_socket())?, None);
        let sessions = gateway.sessions(&SessionsQuery::default()).await?;
        let ids: Vec<_> = sessions.into_iter().map(|session| session.id).collect();
        if !ids.is_empty() {
            gateway.delete_sessions(&ids, true).await?;
        }
        anyhow::Ok(())
    };
    if let Err(error) = ended.await {
        tracing::warn!("ending the sessions: {error:#}");
    }
    let stopped = async {
        let ams = AmsClient::new(Endpoint::unix(plan.state.ams_socket())?);
        let mut operations = Vec::new();
        for instance in ams.instances(&[]).await? {
            if matches!(instance.status(), InstanceStatus::Started | InstanceStatus::Running) {
                operations.push(ams.stop_instance(instance.id.as_str(), false).await?);
            }
        }
        for operation in operations {
            ams.wait(&operation, END_PATIENCE).await?;
        }
        anyhow::Ok(())
    };
    if let Err(error) = stopped.await {
        tracing::warn!("stopping the instances: {error:#}");
    }
}

fn progress(what: &str) {
    println!("… {what}");
}

fn announce(environment: &Environment, page: bool, started: Instant) {
    println!("ready after {:.1} s", started.elapsed().as_secs_f64());
    println!();
    if page {
        println!("page     {}", environment.page_url);
    }
    println!("gateway  {}", environment.gateway_url);
    println!("ams      {}", environment.ams_url);
    println!("token    {}", environment.token.expose());
    println!("ca       {}", environment.ca);
}

/// A program beside this one.
///
/// # Errors
/// It is not there.
pub fn sibling(name: &str) -> Result<PathBuf> {
    let here = std::env::current_exe().context("finding this program")?;
    let folder = here.parent().unwrap_or(Path::new("/"));
    let path = folder.join(name);
    if !path.is_file() {
        bail!("{} is missing: it must lie beside {}", path.display(), here.display());
    }
    Ok(path)
}
