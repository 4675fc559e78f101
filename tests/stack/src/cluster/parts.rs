//! The settings of each part of a cluster, with the files that they name.

use std::{
    fs,
    net::{SocketAddr, TcpListener},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use serde_json::{Value, json};
use tokio::process::Child;

use super::{ETCD, NATS};
use crate::{rest::Server, stack::programs};

/// Who may use the bus.
pub const USER: &str = "fanlight";
/// The password.
pub const PASSWORD: &str = "a password of the test";

/// A program.
pub struct Part {
    /// Its file.
    pub program: PathBuf,
    /// What it is started with.
    pub arguments: Vec<String>,
    /// Variables besides our own.
    pub environment: Vec<(String, String)>,
    /// What shows that it works.
    pub sign: Sign,
    /// Its process, while it runs.
    pub child: Option<Child>,
}

/// What shows that a part works.
pub enum Sign {
    /// It accepts connections.
    Listens(SocketAddr),
    /// It answers a request of this path with status 200 and this text.
    Answers(Server, &'static str, &'static str),
}

/// The certificates of a cluster, all of one authority.
pub struct Certificates {
    folder: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl Certificates {
    pub fn new(folder: PathBuf) -> Result<Self> {
        fs::create_dir_all(&folder)?;
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "the authority of a test");
        fs::write(folder.join("ca.crt"), params.self_signed(&key)?.pem())?;
        Ok(Self { folder, issuer: Issuer::new(params, key) })
    }

    pub fn ca(&self) -> PathBuf {
        self.folder.join("ca.crt")
    }

    /// Files of a certificate and its key, made when they are not there.
    pub fn of(&self, name: &str) -> Result<(PathBuf, PathBuf)> {
        let files = (self.folder.join(format!("{name}.crt")), self.folder.join(format!("{name}.key")));
        if !files.0.exists() {
            let key = KeyPair::generate()?;
            let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()])?;
            params.distinguished_name.push(DnType::CommonName, name);
            params.extended_key_usages =
                vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
            fs::write(&files.0, params.signed_by(&key, &self.issuer)?.pem())?;
            fs::write(&files.1, key.serialize_pem())?;
        }
        Ok(files)
    }
}

/// Ports of loopback that are free and that no connection is ever made from, so that a part finds its own again.
pub fn free_ports(count: usize) -> Result<Vec<SocketAddr>> {
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")?;
    let first: u16 = range.split_whitespace().next().context("the range of ports is empty")?.parse()?;
    // Tests that run at the same time begin elsewhere.
    let seed = std::process::id() as usize * 977
        + std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.subsec_micros() as usize;
    let low = 10_000_u16;
    ensure!(first > low + 1000, "ports from {first} on are for connections: too few are left");
    let width = usize::from(first - low);
    let mut held = Vec::new();
    for step in 0..width {
        let port = low + ((seed + step) % width) as u16;
        if let Ok(socket) = TcpListener::bind(("127.0.0.1", port)) {
            held.push(socket);
        }
        if held.len() == count {
            return held.iter().map(|socket| socket.local_addr().map_err(Into::into)).collect();
        }
    }
    bail!("{count} free ports were not found")
}

pub fn text(path: &Path) -> String {
    path.display().to_string()
}

/// A program of the system.
fn program(name: &str, package: &str) -> Result<PathBuf> {
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let known =
        std::env::split_paths(&folders).chain([PathBuf::from("/usr/sbin"), PathBuf::from("/usr/bin")]);
    known
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("{name} is needed: install the package {package}"))
}

/// The library that gives a program another clock.
pub fn clock_library() -> Result<PathBuf> {
    let folders = fs::read_dir("/usr/lib").context("reading /usr/lib")?.flatten();
    folders
        .map(|entry| entry.path().join("faketime/libfaketimeMT.so.1"))
        .find(|path| path.is_file())
        .context("libfaketime is needed: install the package faketime")
}

pub fn nats_server(
    folder: &Path,
    certificates: &Certificates,
    number: usize,
    address: SocketAddr,
    routes: &[SocketAddr],
) -> Result<Part> {
    let name = NATS[number];
    let (certificate, key) = certificates.of(name)?;
    let tls = format!(
        r#"cert_file: "{}", key_file: "{}", ca_file: "{}""#,
        certificate.display(),
        key.display(),
        certificates.ca().display()
    );
    let all: Vec<String> = routes.iter().map(|route| format!("\"nats-route://{route}\"")).collect();
    let settings = format!(
        r#"
            server_name: "{name}"
            listen: "{address}"
            max_payload: 1MB
            tls {{ {tls} }}
            authorization {{ user: "{USER}", password: "{PASSWORD}" }}
            cluster {{
                name: "test"
                listen: "{}"
                tls {{ {tls}, verify: true }}
                routes: [{}]
            }}
        "#,
        routes[number],
        all.join(", ")
    );
    let file = folder.join(format!("{name}.conf"));
    fs::write(&file, settings)?;
    Ok(Part {
        program: program("nats-server", "nats-server")?,
        arguments: vec!["--config".to_owned(), text(&file)],
        environment: Vec::new(),
        sign: Sign::Listens(address),
        child: None,
    })
}

pub fn member(
    folder: &Path,
    certificates: &Certificates,
    number: usize,
    clients: &[SocketAddr],
    peers: &[SocketAddr],
    sign: Sign,
) -> Result<Part> {
    let name = ETCD[number];
    let (certificate, key) = certificates.of(name)?;
    let (certificate, key, ca) = (text(&certificate), text(&key), text(&certificates.ca()));
    let all: Vec<String> =
        peers.iter().zip(ETCD).map(|(peer, name)| format!("{name}=https://{peer}")).collect();
    let (client, peer) = (format!("https://{}", clients[number]), format!("https://{}", peers[number]));
    let with_value = [
        ("--name", name.to_owned()),
        ("--data-dir", text(&folder.join(name))),
        ("--listen-client-urls", client.clone()),
        ("--advertise-client-urls", client),
        ("--listen-peer-urls", peer.clone()),
        ("--initial-advertise-peer-urls", peer),
        ("--initial-cluster", all.join(",")),
        ("--initial-cluster-state", "new".to_owned()),
        ("--cert-file", certificate.clone()),
        ("--key-file", key.clone()),
        ("--trusted-ca-file", ca.clone()),
        ("--peer-cert-file", certificate),
        ("--peer-key-file", key),
        ("--peer-trusted-ca-file", ca),
        ("--logger", "zap".to_owned()),
        ("--log-level", "warn".to_owned()),
    ];
    let mut arguments: Vec<String> =
        with_value.into_iter().flat_map(|(name, value)| [name.to_owned(), value]).collect();
    arguments.extend(["--client-cert-auth", "--peer-client-cert-auth"].map(str::to_owned));
    Ok(Part {
        program: program("etcd", "etcd-server")?,
        arguments,
        environment: Vec::new(),
        sign,
        child: None,
    })
}

/// One of our own programs, with its settings in a file.
pub fn ours(program: &str, folder: &Path, name: &str, settings: &Value, sign: Sign) -> Result<Part> {
    let file = folder.join(format!("{name}.toml"));
    fs::write(&file, toml::to_string(settings)?)?;
    Ok(Part {
        program: programs()?.join(program),
        arguments: vec!["--config".to_owned(), text(&file)],
        environment: Vec::new(),
        sign,
        child: None,
    })
}

/// AMS and agent of a cell, and AMS for an administrator. `addresses`: of AMS and of the agent.
pub fn cell_of(
    folder: &Path,
    certificates: &Certificates,
    number: usize,
    cell: &str,
    addresses: [SocketAddr; 2],
    bus: &Value,
) -> Result<(Server, Vec<(String, Part)>)> {
    let programs = programs()?;
    let [ams_address, agent_address] = addresses;
    let (ams, agent) = (format!("ams-{cell}"), format!("agent-{cell}"));
    let files = |name: &str| -> Result<(String, String)> {
        let (certificate, key) = certificates.of(name)?;
        Ok((text(&certificate), text(&key)))
    };
    let (ams_files, agent_files) = (files(&ams)?, files(&agent)?);
    let (ams_client, agent_client) = (files(&format!("{ams}-client"))?, files(&format!("{agent}-client"))?);
    let ca = text(&certificates.ca());
    let home = folder.join(&ams);
    fs::create_dir_all(&home)?;
    fs::set_permissions(&home, fs::Permissions::from_mode(0o711))?;
    let own: Vec<String> = ["fanlight-pattern"].map(|name| text(&programs.join(name))).into();
    let settings = json!({
        "listen": ams_address.to_string(), "folder": text(&home), "cluster_name": cell,
        "tls": { "certificate": ams_files.0, "key": ams_files.1 },
        "trust": { "certificates": [files("admin")?.0, agent_client.0] },
        "store": { "url": format!("file:{}", home.join("ams.redb").display()) },
        "agent": {
            "url": format!("https://{agent_address}"), "ca": ca, "certificate": ams_client.0, "key": ams_client.1,
        },
        "engine": {
            "streamer": [text(&programs.join("fanlight-streamer")), "run"], "programs": own,
            // Each cell has users of its own.
            "first_uid": 300_000 + 10_000 * number,
        },
    });
    let (certificate, key) = certificates.of("admin")?;
    let server = Server::new(
        &format!("https://{ams_address}"),
        &certificates.ca(),
        None,
        Some((certificate.as_path(), key.as_path())),
    )?;
    let sign = Sign::Answers(server.clone(), "/1.0", "\"trusted\"");
    let mut parts = vec![(ams.clone(), ours("fanlight-ams", folder, &ams, &settings, sign)?)];
    let secret = folder.join("turn-secret");
    fs::write(&secret, "a secret of the test")?;
    let settings = json!({
        "id": agent, "region": cell, "cluster_id": cell, "listen": agent_address.to_string(),
        "token_key": text(&folder.join(format!("{agent}.token-key"))),
        "tls": { "certificate": agent_files.0, "key": agent_files.1 },
        "clients": { "certificates": [ams_client.0] },
        "ams": {
            "url": format!("https://{ams_address}"), "ca": ca, "certificate": agent_client.0, "key": agent_client.1,
        },
        // Nobody is there: only the credentials matter.
        "turn": { "urls": ["turn:127.0.0.1:9?transport=udp"], "secret_file": text(&secret) },
        "bus": bus,
    });
    let sign = Sign::Listens(agent_address);
    parts.push((agent.clone(), ours("fanlight-agent", folder, &agent, &settings, sign)?));
    Ok((server, parts))
}
