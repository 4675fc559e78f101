//! Settings of AMS.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use fanlight_api::NodeId;
use fanlight_service::config::Validate;
use fanlight_store::StoreConfig;
use http::uri::Authority;
use serde::{Deserialize, Serialize};

use crate::{core::placement::Strategy, engine::Bounding, manifest, size};

/// Settings of AMS, from a TOML file, then from `AMS_*` variables (`AMS_STORE__URL`).
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Name of this unit among the units of AMS, stable over restarts: 1 to 255 characters of
    /// `a-z A-Z 0-9 - _ .`; each unit has another one.
    pub unit: String,
    /// Address of the API (HTTPS).
    pub listen: SocketAddr,
    /// `host:port` where the other units of AMS reach this one. Empty: `listen`, if that is one address.
    pub advertise: String,
    /// Unix socket of the API. Empty: none.
    pub socket: PathBuf,
    /// Users who may use the socket, besides root and the user AMS runs as.
    pub socket_uids: Vec<u32>,
    /// Folder of instances and packages.
    pub folder: PathBuf,
    /// Name of the cluster.
    pub cluster_name: String,
    /// Certificate of the API; a self-signed one is made where there is none.
    pub tls: Tls,
    /// Who may call.
    pub trust: Trust,
    /// Where records are kept.
    pub store: StoreConfig,
    /// The agent, for sessions of instances that AMS was asked for first.
    pub agent: Agent,
    /// How instances are run.
    pub engine: Engine,
    /// LXD, where `engine.kind` is `lxd`.
    pub lxd: Lxd,
    /// This machine as a node.
    pub node: Node,
    /// Where media of instances goes.
    pub media: Media,
    /// Applications and their packages.
    pub applications: Applications,
    /// Bounds.
    pub limits: Limits,
}

/// Certificate of the API. Changed files are read again.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Tls {
    /// PEM file of the certificate, leaf first.
    pub certificate: PathBuf,
    /// PEM file of its private key.
    pub key: PathBuf,
    /// Names and addresses for a certificate that is made here, besides the ones of loopback.
    pub names: Vec<String>,
}

/// Who may call, besides the certificates of the trust store.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Trust {
    /// PEM files of client certificates, or of authorities whose certificates are all trusted.
    pub certificates: Vec<PathBuf>,
    /// File with the password with which a client may add its own certificate. Empty: none may.
    pub password_file: PathBuf,
}

/// The agent.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Agent {
    /// `https://host:port`. Empty: no agent; instances cannot ask for streaming.
    pub url: String,
    /// SHA-256 of its certificate, hex; or `ca`.
    pub fingerprint: String,
    /// PEM file of the authority of its certificate; or `fingerprint`.
    pub ca: PathBuf,
    /// PEM file of the certificate that AMS shows.
    pub certificate: PathBuf,
    /// PEM file of its private key.
    pub key: PathBuf,
}

/// What runs instances.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineKind {
    /// Processes of this machine, running its programs.
    #[default]
    Process,
    /// Containers of LXD, made of images.
    Lxd,
}

/// How instances are run.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Engine {
    /// `process`: programs of this machine. `lxd`: containers, see `lxd`.
    pub kind: EngineKind,
    /// Program and arguments of the shim; the folder of the instance is added. Empty: this program, `shim`.
    pub shim: Vec<String>,
    /// Program and arguments of the streamer. Empty: `fanlight-streamer run`, beside this program or in `PATH`.
    pub streamer: Vec<String>,
    /// Files of more programs that instances find in their `PATH`.
    pub programs: Vec<PathBuf>,
    /// First user id for instances when AMS runs as root; each instance has its own.
    pub first_uid: u32,
    /// How many user ids there are.
    pub uids: u32,
    /// Whether instances that are programs of this machine are kept to the CPUs and the memory that they ask for, by
    /// control groups. `auto`: where the machine can do it, with a warning elsewhere. `required`: or AMS does not
    /// start. `off`: not at all.
    pub bounds: Bounding,
    /// From the start of an instance until it must be ready.
    #[serde(with = "humantime_serde")]
    pub start_time: Duration,
    /// From a request to stop until an instance is killed.
    #[serde(with = "humantime_serde")]
    pub stop_time: Duration,
}

/// This machine as a node.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its address, as shown.
    pub address: String,
    /// Where clients reach it, as shown.
    pub public_address: String,
    /// CPUs offered. 0: all.
    pub cpus: u32,
    /// How often each CPU is promised.
    pub cpu_allocation_rate: f64,
    /// Memory offered, e.g. `8GB`. Empty: all.
    pub memory: String,
    /// How often each byte is promised.
    pub memory_allocation_rate: f64,
    /// Words that applications select nodes by.
    pub tags: Vec<String>,
    /// Takes no new instances.
    pub unschedulable: bool,
    /// Ports of a node that services of instances are reached at.
    pub service_ports: Ports,
    /// How nodes are chosen: `spread` or `binpack`.
    pub strategy: Strategy,
    /// CPUs of an instance that does not ask for another number.
    pub default_cpus: u32,
    /// Memory of an instance that does not ask for another size.
    pub default_memory: String,
    /// Disk of an instance that does not ask for another size.
    pub default_disk: String,
}

/// A range of ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Ports {
    /// The first.
    pub first: u16,
    /// The last.
    pub last: u16,
}

/// LXD, where instances are its containers.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Lxd {
    /// Unix socket of LXD, or `https://host:port` of a member of its cluster.
    pub url: String,
    /// PEM file of the certificate that AMS shows LXD; made where there is none.
    pub certificate: PathBuf,
    /// PEM file of its private key.
    pub key: PathBuf,
    /// SHA-256 of LXD's certificate, hex. Empty with a socket.
    pub fingerprint: String,
    /// File with LXD's trust password, or with a token of `lxc config trust add`; read when LXD does not know AMS yet.
    pub secret_file: PathBuf,
    /// Project of our own.
    pub project: String,
    /// Storage pool of instances.
    pub pool: String,
    /// Bridge of instances; LXD manages it.
    pub network: String,
    /// Where the one server listens for its instances. Empty: the host of `lxd.url`, else the first that LXD tells. `none`:
    /// nowhere, all clients are on the server itself and reach instances at their own addresses.
    /// Members of a cluster listen where the cluster knows them.
    pub address: String,
    /// UDP ports of a node that media of instances is reached at, one each.
    pub media_ports: Ports,
}

impl Default for Lxd {
    fn default() -> Self {
        Self {
            url: "/var/snap/lxd/common/lxd/unix.socket".into(),
            certificate: "lxd-client.crt".into(),
            key: "lxd-client.key".into(),
            fingerprint: String::new(),
            secret_file: PathBuf::new(),
            project: "fanlight".into(),
            pool: "default".into(),
            network: "lxdbr0".into(),
            address: String::new(),
            media_ports: Ports { first: 20_000, last: 29_999 },
        }
    }
}

/// Where media of instances goes.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Media {
    /// Address that instances bind their UDP socket to. Empty: 127.0.0.1.
    pub bind: String,
    /// Addresses that clients reach, `ip:port`; port 0 means the bound one. Empty: the bound address.
    pub advertise: Vec<SocketAddr>,
    /// Encoder for all instances. Empty: the best that works.
    pub encoder: String,
}

/// Applications and their packages.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Applications {
    /// New versions are published at once.
    pub auto_publish: bool,
    /// Published versions kept; older ones that no instance uses are removed.
    pub max_published_versions: usize,
    /// Most bytes of an uploaded package, e.g. `10GB`.
    pub max_package: String,
    /// Most bytes of an unpacked package.
    pub max_unpacked: String,
}

/// Bounds.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// HTTP connections at a time, per listener.
    pub connections: usize,
    /// Bytes of a request's body that is no package.
    pub body_bytes: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            unit: "ams-0".into(),
            advertise: String::new(),
            listen: ([127, 0, 0, 1], 8444).into(),
            socket: PathBuf::new(),
            socket_uids: Vec::new(),
            folder: "ams".into(),
            cluster_name: "fanlight".into(),
            tls: Tls::default(),
            trust: Trust::default(),
            store: StoreConfig::file("ams.redb"),
            agent: Agent::default(),
            engine: Engine::default(),
            lxd: Lxd::default(),
            node: Node::default(),
            media: Media::default(),
            applications: Applications::default(),
            limits: Limits::default(),
        }
    }
}

impl Default for Tls {
    fn default() -> Self {
        Self { certificate: "ams.crt".into(), key: "ams.key".into(), names: Vec::new() }
    }
}

impl Default for Engine {
    fn default() -> Self {
        Self {
            kind: EngineKind::Process,
            shim: Vec::new(),
            streamer: Vec::new(),
            programs: Vec::new(),
            first_uid: 200_000,
            uids: 10_000,
            bounds: Bounding::Auto,
            start_time: Duration::from_secs(60),
            stop_time: Duration::from_secs(10),
        }
    }
}

impl Default for Node {
    fn default() -> Self {
        Self {
            name: "local".into(),
            address: "127.0.0.1".into(),
            public_address: String::new(),
            cpus: 0,
            cpu_allocation_rate: 4.0,
            memory: String::new(),
            memory_allocation_rate: 2.0,
            tags: Vec::new(),
            unschedulable: false,
            service_ports: Ports { first: 10_000, last: 11_000 },
            strategy: Strategy::Spread,
            default_cpus: 2,
            default_memory: "3GB".into(),
            default_disk: "3GB".into(),
        }
    }
}

impl Default for Applications {
    fn default() -> Self {
        Self {
            auto_publish: true,
            max_published_versions: 3,
            max_package: "10GB".into(),
            max_unpacked: "20GB".into(),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self { connections: 1024, body_bytes: 1024 * 1024 }
    }
}

impl Media {
    /// Address of the UDP sockets.
    pub fn bind_address(&self) -> Option<IpAddr> {
        self.bind.parse().ok()
    }
}

impl Validate for Config {
    fn problems(&self) -> Vec<String> {
        let mut problems = self.store.problems();
        let mut check = |wrong: bool, text: String| {
            if wrong {
                problems.push(text);
            }
        };
        check(
            self.unit.parse::<NodeId>().is_err(),
            format!("unit: {:?}: 1 to 255 characters of a-z A-Z 0-9 - _ . are allowed", self.unit),
        );
        check(
            !self.advertise.is_empty() && self.advertise.parse::<Authority>().is_err(),
            format!("advertise: {:?} is no host:port", self.advertise),
        );
        check(
            self.folder.as_os_str().is_empty(),
            "folder is empty: a folder for instances and packages is needed".into(),
        );
        for (key, text) in [
            ("node.default_memory", &self.node.default_memory),
            ("node.default_disk", &self.node.default_disk),
            ("applications.max_package", &self.applications.max_package),
            ("applications.max_unpacked", &self.applications.max_unpacked),
        ] {
            check(size::parse(text).is_err(), format!("{key}: {text:?} is not a size such as 3GB"));
        }
        check(
            !self.node.memory.is_empty() && size::parse(&self.node.memory).is_err(),
            format!("node.memory: {:?} is not a size such as 3GB", self.node.memory),
        );
        for (key, rate) in [
            ("node.cpu_allocation_rate", self.node.cpu_allocation_rate),
            ("node.memory_allocation_rate", self.node.memory_allocation_rate),
        ] {
            check(!(rate.is_finite() && rate > 0.0), format!("{key}: {rate} is not above 0"));
        }
        check(
            self.node.name.parse::<NodeId>().is_err(),
            format!("node.name: {:?} is invalid", self.node.name),
        );
        for (key, ports) in
            [("node.service_ports", self.node.service_ports), ("lxd.media_ports", self.lxd.media_ports)]
        {
            check(
                ports.first == 0 || ports.last < ports.first,
                format!("{key}: {} to {} is no range of ports", ports.first, ports.last),
            );
        }
        if self.engine.kind == EngineKind::Lxd {
            check(
                self.lxd.url.starts_with("https://") && self.lxd.fingerprint.is_empty(),
                "lxd.fingerprint: the SHA-256 of LXD's certificate is needed with an https:// lxd.url".into(),
            );
            check(self.lxd.url.is_empty(), "lxd.url: a socket or an https:// address is needed".into());
        }
        check(self.node.default_cpus == 0, "node.default_cpus: at least 1 is needed".into());
        for tag in &self.node.tags {
            check(!manifest::is_tag(tag), format!("node.tags: {tag:?} is invalid"));
        }
        check(
            !self.media.bind.is_empty() && self.media.bind_address().is_none(),
            format!("media.bind: {:?} is no IP address", self.media.bind),
        );
        check(
            self.engine.first_uid < 1000,
            format!("engine.first_uid: {} belongs to the system, take 1000 or more", self.engine.first_uid),
        );
        check(self.engine.uids == 0, "engine.uids: at least 1 is needed".into());
        check(self.engine.start_time.is_zero(), "engine.start_time: instances need some time".into());
        let given = |path: &PathBuf| !path.as_os_str().is_empty();
        if !self.agent.url.is_empty() {
            check(
                self.agent.fingerprint.is_empty() != given(&self.agent.ca),
                "agent: exactly one of agent.ca and agent.fingerprint is needed with agent.url".into(),
            );
            check(
                !given(&self.agent.certificate) || !given(&self.agent.key),
                "agent: agent.certificate and agent.key are needed with agent.url".into(),
            );
        }
        check(
            self.applications.max_published_versions == 0,
            "applications.max_published_versions: at least 1 is needed".into(),
        );
        problems
    }
}

#[cfg(test)]
mod tests {
    use fanlight_service::config;

    use super::*;

    #[test]
    fn the_defaults_are_a_valid_file_of_their_own() {
        let example = config::example::<Config>();
        let read: Config = config::parse(&example, "", []).expect("valid");
        assert_eq!(config::example::<Config>(), example);
        assert!(read.problems().is_empty());
    }

    #[test]
    fn everything_that_is_wrong_is_reported_at_once() {
        let text = "folder = ''\nnonsense = 1\n[node]\nmemory = 'much'\ncpu_allocation_rate = 0.0\n\
                    [agent]\nurl = 'https://a'\n[media]\nbind = 'here'\n[engine]\nfirst_uid = 0\nuids = 0\n";
        let problems = config::parse::<Config>(text, "", []).expect_err("wrong").join("\n");
        for needle in [
            "nonsense",
            "folder",
            "node.memory",
            "node.cpu_allocation_rate",
            "agent.ca",
            "agent.certificate",
            "media.bind",
            "engine.first_uid",
            "engine.uids",
        ] {
            assert!(problems.contains(needle), "{needle} is missing in {problems}");
        }
    }
}
