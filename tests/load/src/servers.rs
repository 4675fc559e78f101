//! The real programs under load: `nats-server`, `etcd` where it is wanted, and the gateway, each with a folder for its
//! log. Dropping them kills them.

use std::{
    fs,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use fanlight_api::{
    Secret,
    gateway::{AccountRights, AccountsPost},
};
use fanlight_client::{Endpoint, GatewayClient, Trust};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;
use tokio::{
    net::TcpStream,
    process::{Child, Command},
};

/// How long a program may take to serve, and to end.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where the gateway keeps its records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    Redb,
    Etcd,
}

/// The programs that run.
pub struct Servers {
    folder: TempDir,
    children: Vec<(&'static str, Child)>,
    gateway: Child,
    /// Settings of the bus for whoever takes part.
    pub bus: fanlight_bus::BusConfig,
    /// The public API.
    pub address: SocketAddr,
    /// Fingerprint of its certificate.
    pub fingerprint: String,
    /// The gateway's own unix socket.
    pub internal: GatewayClient,
    /// Where its records are.
    pub store_url: String,
}

/// The folder of the built programs: that of this one, unless said otherwise.
pub fn programs() -> Result<PathBuf> {
    match std::env::var_os("FANLIGHT_BIN_DIR") {
        Some(folder) => Ok(folder.into()),
        None => Ok(std::env::current_exe()?.parent().context("this program has no folder")?.to_owned()),
    }
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

fn spawn(folder: &Path, name: &str, mut command: Command) -> Result<Child> {
    let log = fs::File::create(folder.join(format!("{name}.log")))?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).kill_on_drop(true);
    command.spawn().with_context(|| format!("starting {name}"))
}

async fn until_listening(name: &str, child: &mut Child, address: SocketAddr) -> Result<()> {
    let start = Instant::now();
    while TcpStream::connect(address).await.is_err() {
        if let Some(status) = child.try_wait()? {
            bail!("{name} ended at its start: {status}");
        }
        ensure!(start.elapsed() < PATIENCE, "{name} does not listen on {address}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

impl Servers {
    /// Starts everything; the gateway takes so many requests per second.
    ///
    /// # Errors
    /// A program is not there or does not start.
    pub async fn start(store: Store, requests_per_second: u32) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("fanlight-load-").tempdir()?;
        let path = folder.path().to_owned();
        let started = Self::start_in(folder, store, requests_per_second).await;
        started.with_context(|| format!("the logs were in {}", path.display()))
    }

    async fn start_in(folder: TempDir, store: Store, requests_per_second: u32) -> Result<Self> {
        let here = folder.path();
        let loopback = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let mut children = Vec::new();

        let nats = loopback(free_port()?);
        let mut command = Command::new("nats-server");
        command.args(["-a", "127.0.0.1", "-p", &nats.port().to_string()]);
        let mut child = spawn(here, "nats-server", command)?;
        until_listening("nats-server", &mut child, nats).await?;
        children.push(("nats-server", child));

        let store_url = match store {
            Store::Redb => format!("file:{}", here.join("gateway.redb").display()),
            Store::Etcd => {
                let (client, peer) = (loopback(free_port()?), loopback(free_port()?));
                let mut command = Command::new("etcd");
                let (client_url, peer_url) = (format!("http://{client}"), format!("http://{peer}"));
                command
                    .arg("--data-dir")
                    .arg(here.join("etcd"))
                    .args(["--listen-client-urls", &client_url, "--advertise-client-urls", &client_url])
                    .args(["--listen-peer-urls", &peer_url, "--initial-advertise-peer-urls", &peer_url])
                    .args(["--initial-cluster", &format!("default={peer_url}"), "--log-level", "warn"]);
                let mut child = spawn(here, "etcd", command)?;
                until_listening("etcd", &mut child, client).await?;
                children.push(("etcd", child));
                format!("etcd://{client}")
            }
        };

        let address = loopback(free_port()?);
        let config = here.join("gateway.toml");
        let text = |path: &Path| toml_text(&path.display().to_string());
        fs::write(
            &config,
            format!(
                "listen = '{address}'\ninternal_socket = {}\n[tls]\ncertificate = {}\nkey = {}\n\
                 [bus]\nurl = 'nats://{nats}'\n[store]\nurl = {}\n\
                 [limits]\nrequests_per_second = {requests_per_second}\n",
                text(&here.join("internal.sock")),
                text(&here.join("gateway.crt")),
                text(&here.join("gateway.key")),
                toml_text(&store_url),
            ),
        )?;
        let mut command = Command::new(programs()?.join("fanlight-gateway"));
        command.arg("--config").arg(&config);
        let mut gateway = spawn(here, "gateway", command)?;
        let internal = GatewayClient::new(Endpoint::unix(here.join("internal.sock"))?, None);
        let start = Instant::now();
        // Its address is taken before it serves.
        while internal.status().await.is_err() {
            let ended = gateway.try_wait()?;
            if ended.is_some() || start.elapsed() > PATIENCE {
                let log = fs::read_to_string(here.join("gateway.log")).unwrap_or_default();
                bail!("fanlight-gateway does not serve ({ended:?}): {log}");
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let certificate = CertificateDer::from_pem_file(here.join("gateway.crt"))
            .map_err(|error| anyhow::anyhow!("the gateway's certificate cannot be read: {error}"))?;
        Ok(Self {
            internal,
            bus: fanlight_bus::BusConfig::at(format!("nats://{nats}")),
            fingerprint: hex::encode(Sha256::digest(&certificate)),
            store_url,
            address,
            folder,
            children,
            gateway,
        })
    }

    /// Process id of the gateway.
    ///
    /// # Errors
    /// It has ended.
    pub fn gateway_pid(&self) -> Result<u32> {
        self.gateway.id().context("the gateway has ended")
    }

    /// Fails when one of the programs has ended.
    ///
    /// # Errors
    /// Says which.
    pub fn check(&mut self) -> Result<()> {
        let gateway = ("fanlight-gateway", &mut self.gateway);
        let others = self.children.iter_mut().map(|(name, child)| (*name, child));
        for (name, child) in others.chain([gateway]) {
            if let Some(status) = child.try_wait()? {
                bail!("{name} ended: {status}");
            }
        }
        Ok(())
    }

    /// Makes an account with all rights, and a client that uses its token.
    ///
    /// # Errors
    /// The gateway refuses.
    pub async fn account(&self, name: &str) -> Result<GatewayClient> {
        let post = AccountsPost { name: name.into(), rights: AccountRights::Full, expiry_at: None };
        let account = self.internal.create_account(&post).await?;
        let trust = Trust::Pinned(self.fingerprint.clone());
        let endpoint = Endpoint::http(&format!("https://{}", self.address), &trust, None)?;
        let token: Secret = account.token;
        Ok(GatewayClient::new(endpoint, Some(token)))
    }

    /// Ends the gateway as its service manager would, and waits until it is gone.
    ///
    /// # Errors
    /// It does not end, or not well.
    pub async fn end_gateway(&mut self) -> Result<()> {
        let pid = libc::pid_t::try_from(self.gateway_pid()?)?;
        // SAFETY: a signal to a child that was not waited for yet, so the id is still its own.
        unsafe { libc::kill(pid, libc::SIGTERM) };
        let ended = tokio::time::timeout(PATIENCE, self.gateway.wait()).await;
        let status = ended.context("the gateway does not end")??;
        ensure!(status.success(), "the gateway ended with {status}");
        Ok(())
    }

    /// Lines of the gateway's log that hold a text.
    ///
    /// # Errors
    /// The log cannot be read.
    pub fn logged(&self, text: &str) -> Result<Vec<String>> {
        let log = fs::read_to_string(self.folder.path().join("gateway.log"))?;
        Ok(log.lines().filter(|line| line.contains(text)).map(str::to_owned).collect())
    }

    /// Keeps the folder with the logs, and says where it is.
    pub fn keep_logs(self) -> PathBuf {
        self.folder.keep()
    }
}

fn toml_text(text: &str) -> String {
    serde_json::to_string(text).expect("a text can be written")
}
