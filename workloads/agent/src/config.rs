//! Settings of the agent, from `agent.toml`, then from `AGENT_*` variables (`AGENT_BUS__URL`).

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use fanlight_api::AgentId;
use fanlight_bus::BusConfig;
use fanlight_client::{Endpoint, Identity, Trust};
use fanlight_service::config::Validate;
use serde::{Deserialize, Serialize};

use crate::{
    embedded_turn::Embedded,
    turn::{Peers, check_url, parse_ports},
};

/// Settings of the agent.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Name of this agent, unique among all agents of the gateways and stable over restarts: 1 to 255 characters
    /// of `A-Z a-z 0-9 - _ : .`
    pub id: String,
    /// Region under which clients find it.
    pub region: String,
    /// Name of the cluster. Empty: asked of AMS.
    pub cluster_id: String,
    /// Where the cluster is: latitude and longitude in degrees (WGS 84). Empty: unknown.
    pub location: Vec<f64>,
    /// Address for streamers and AMS (HTTPS and websockets).
    pub listen: SocketAddr,
    /// Where instances reach that address, `wss://host:port`. Empty: the address itself.
    pub public_url: String,
    /// File of the key that signs the tokens of instances; made if it is not there. When it is lost, running
    /// instances are locked out.
    pub token_key: PathBuf,
    /// Certificate of the agent.
    pub tls: Tls,
    /// Who may ask for sessions: AMS.
    pub clients: Clients,
    /// The AMS of this cluster.
    pub ams: Ams,
    /// The bus to the gateways.
    pub bus: BusConfig,
    /// STUN servers told to clients.
    pub stun: Stun,
    /// TURN servers told to clients.
    pub turn: Turn,
}

/// Certificate of the agent; a self-signed one is made where there is none. Instances pin it, so it must be kept;
/// changed files are read again.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Tls {
    /// PEM file of the certificate, leaf first.
    pub certificate: PathBuf,
    /// PEM file of its private key.
    pub key: PathBuf,
    /// Whether instances are told to accept this certificate alone. Off behind a load balancer that ends TLS;
    /// instances then check names against the authorities of their system.
    pub pin: bool,
}

/// Whose client certificates open the part of the API that AMS uses.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Clients {
    /// SHA-256 of certificates (DER), 64 hexadecimal digits each.
    pub fingerprints: Vec<String>,
    /// PEM files of certificates; read again at each request, so that they may be renewed.
    pub certificates: Vec<PathBuf>,
}

/// Where AMS is and how to get in.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Ams {
    /// `https://host:port`. Empty: `socket` is used.
    pub url: String,
    /// Unix socket of AMS on this machine.
    pub socket: PathBuf,
    /// PEM file of our client certificate, which AMS must trust.
    pub certificate: PathBuf,
    /// PEM file of its key.
    pub key: PathBuf,
    /// PEM file of the authority of AMS's certificate. Empty: `fingerprint` counts.
    pub ca: PathBuf,
    /// SHA-256 of AMS's certificate (DER), 64 hexadecimal digits.
    pub fingerprint: String,
}

/// STUN servers.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Stun {
    /// `stun:host:port`.
    pub urls: Vec<String>,
}

/// TURN servers that take credentials made from a shared secret, as Coturn with `use-auth-secret`, and the one of our
/// own.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Turn {
    /// `turn:host:port?transport=udp`, `turn:host:port?transport=tcp`, `turns:host:port`. Empty: none.
    pub urls: Vec<String>,
    /// File that holds the shared secret; read for each session, so that it may be changed. Without one the embedded
    /// server makes a secret at each start.
    pub secret_file: PathBuf,
    /// How long credentials open new connections. Those that are open go on.
    #[serde(with = "humantime_serde")]
    pub ttl: Duration,
    /// UDP address of a TURN and STUN server inside the agent, `192.0.2.1:3478`. Empty: none.
    pub listen: String,
    /// Address under which clients reach the embedded server and its relay ports. Empty: that of `listen`, which then
    /// must not be a wildcard.
    pub public_address: String,
    /// UDP ports of the embedded server for relaying, `low-high`.
    pub relay_ports: String,
    /// Name that the embedded server gives itself in its answers.
    pub realm: String,
    /// Networks to whose addresses the embedded server relays, `192.0.2.0/24`. Empty: this machine's own addresses.
    /// Loopback and link-local addresses only when named, or when `listen` is on loopback.
    pub allowed_peers: Vec<String>,
    /// Most allocations of the embedded server.
    pub max_allocations: usize,
    /// Most of them for one session. A browser makes one for each of its networks.
    pub max_allocations_per_session: usize,
}

impl Turn {
    /// The embedded server, if there is one to be, or everything that is wrong with it.
    pub(crate) fn embedded(&self) -> Result<Option<Embedded>, Vec<String>> {
        if self.listen.is_empty() {
            return Ok(None);
        }
        let mut problems = Vec::new();
        let listen = self.listen.parse::<SocketAddr>().ok();
        if listen.is_none() {
            problems.push(format!("turn.listen: {:?} is no address such as 192.0.2.1:3478", self.listen));
        }
        let public: Option<IpAddr> = if self.public_address.is_empty() {
            listen.map(|listen| listen.ip())
        } else {
            self.public_address.parse().ok()
        };
        match (public, listen) {
            (None, None) => {}
            (None, _) => {
                problems.push(format!("turn.public_address: {:?} is no IP address", self.public_address));
            }
            (Some(public), _) if public.is_unspecified() => {
                problems.push(format!("turn.public_address is needed: clients cannot reach {public}"))
            }
            (Some(public), Some(listen)) if public.is_ipv4() != listen.is_ipv4() => problems.push(format!(
                "turn.public_address {public} and turn.listen {listen} are of different families"
            )),
            (Some(_), _) => {}
        }
        let relay_ports = parse_ports(&self.relay_ports)
            .map_err(|problem| problems.push(format!("turn.relay_ports: {problem}")));
        let mut networks = Vec::new();
        for network in &self.allowed_peers {
            match network.parse() {
                Ok(network) => networks.push(network),
                Err(problem) => problems.push(format!("turn.allowed_peers: {problem}")),
            }
        }
        let printable = self.realm.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'"');
        if !(1..=127).contains(&self.realm.len()) || !printable {
            problems.push(format!("turn.realm: {:?} is not 1 to 127 letters without spaces", self.realm));
        }
        for (name, value) in [
            ("max_allocations", self.max_allocations),
            ("max_allocations_per_session", self.max_allocations_per_session),
        ] {
            if value == 0 {
                problems.push(format!("turn.{name} is 0"));
            }
        }
        match (listen, public, relay_ports) {
            (Some(listen), Some(public), Ok(relay_ports)) if problems.is_empty() => Ok(Some(Embedded {
                listen,
                public,
                relay_ports,
                realm: self.realm.clone(),
                peers: Peers { networks, on_loopback: listen.ip().is_loopback() },
                most: self.max_allocations,
                most_per_session: self.max_allocations_per_session,
            })),
            _ => Err(problems),
        }
    }
}

impl Default for Turn {
    fn default() -> Self {
        Self {
            urls: Vec::new(),
            secret_file: PathBuf::new(),
            ttl: Duration::from_secs(24 * 60 * 60),
            listen: String::new(),
            public_address: String::new(),
            relay_ports: "50000-50999".into(),
            realm: "fanlight".into(),
            allowed_peers: Vec::new(),
            max_allocations: 1000,
            max_allocations_per_session: 16,
        }
    }
}

impl Default for Tls {
    fn default() -> Self {
        Self { certificate: "agent.crt".into(), key: "agent.key".into(), pin: true }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            id: "agent-0".into(),
            region: "default".into(),
            cluster_id: String::new(),
            location: Vec::new(),
            listen: SocketAddr::from(([127, 0, 0, 1], 8445)),
            public_url: String::new(),
            token_key: "agent-token.key".into(),
            tls: Tls::default(),
            clients: Clients::default(),
            ams: Ams::default(),
            bus: BusConfig::default(),
            stun: Stun::default(),
            turn: Turn::default(),
        }
    }
}

impl Validate for Config {
    fn problems(&self) -> Vec<String> {
        let mut problems = self.bus.problems();
        let mut check = |holds: bool, text: String| {
            if !holds {
                problems.push(text);
            }
        };
        if let Err(error) = self.id.parse::<AgentId>() {
            check(false, format!("id: {error}"));
        }
        check(!self.region.is_empty(), "region is empty".into());
        check(
            self.location.is_empty()
                || matches!(self.location[..], [latitude, longitude]
                    if (-90.0..=90.0).contains(&latitude) && (-180.0..=180.0).contains(&longitude)),
            format!("location {:?} is not [latitude, longitude] in degrees", self.location),
        );
        check(
            self.public_url.is_empty() || self.public_url.starts_with("wss://"),
            format!("public_url {:?} does not begin with wss://", self.public_url),
        );
        for fingerprint in &self.clients.fingerprints {
            let digits = fingerprint.bytes().all(|byte| byte.is_ascii_hexdigit());
            check(
                fingerprint.len() == 64 && digits,
                format!("clients.fingerprints: {fingerprint:?} is not 64 hexadecimal digits"),
            );
        }
        let given = |path: &PathBuf| !path.as_os_str().is_empty();
        check(
            self.ams.url.is_empty() == given(&self.ams.socket),
            "ams: exactly one of ams.url and ams.socket is needed".into(),
        );
        check(
            self.ams.url.is_empty() || given(&self.ams.ca) == self.ams.fingerprint.is_empty(),
            "ams: exactly one of ams.ca and ams.fingerprint is needed with ams.url".into(),
        );
        check(
            given(&self.ams.certificate) == given(&self.ams.key),
            "ams.certificate and ams.key are only valid together".into(),
        );
        for url in &self.stun.urls {
            let checked = check_url(url, &["stun"]);
            check(checked.is_ok(), format!("stun.urls: {}", checked.err().unwrap_or_default()));
        }
        for url in &self.turn.urls {
            let checked = check_url(url, &["turn", "turns"]);
            check(checked.is_ok(), format!("turn.urls: {}", checked.err().unwrap_or_default()));
        }
        check(
            self.turn.urls.is_empty() || given(&self.turn.secret_file),
            "turn.secret_file is needed with turn.urls".into(),
        );
        check(
            self.turn.ttl >= Duration::from_secs(60),
            format!("turn.ttl is {:?}: at least 60 s are needed", self.turn.ttl),
        );
        problems.extend(self.turn.embedded().err().into_iter().flatten());
        problems
    }
}

impl Ams {
    /// The way to AMS.
    pub(crate) fn endpoint(&self) -> Result<Endpoint, fanlight_client::ClientError> {
        if self.url.is_empty() {
            return Endpoint::unix(&self.socket);
        }
        let trust = if self.fingerprint.is_empty() {
            Trust::Authority(self.ca.clone())
        } else {
            Trust::Pinned(self.fingerprint.clone())
        };
        let identity = Identity { certificate: self.certificate.clone(), key: self.key.clone() };
        let given = !self.certificate.as_os_str().is_empty();
        Endpoint::http(&self.url, &trust, given.then_some(&identity))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_that_is_wrong_is_said_at_once() {
        let mut good = Config::default();
        good.ams.socket = "/run/ams.sock".into();
        assert_eq!(good.problems(), Vec::<String>::new());
        let mut bad = Config {
            id: "a/b".into(),
            region: String::new(),
            location: vec![91.0, 0.0],
            public_url: "https://x".into(),
            ..Config::default()
        };
        bad.clients.fingerprints = vec!["xyz".into()];
        bad.ams.key = "k".into();
        bad.stun.urls = vec!["https://stun".into()];
        bad.turn.urls = vec!["stun:x".into()];
        bad.turn.ttl = Duration::ZERO;
        bad.bus.url = "http://x".into();
        let problems = bad.problems();
        for expected in [
            "id:",
            "region",
            "location",
            "public_url",
            "fingerprints",
            "ams.url",
            "ams.certificate",
            "stun.urls",
            "turn.urls",
            "turn.secret_file",
            "turn.ttl",
            "bus.url",
        ] {
            assert!(problems.iter().any(|text| text.contains(expected)), "{expected}: {problems:?}");
        }
    }

    #[test]
    fn what_the_embedded_turn_server_cannot_be_is_said_by_name() {
        let problems = |change: &dyn Fn(&mut Turn)| {
            let mut turn = Turn { listen: "192.0.2.1:3478".into(), ..Turn::default() };
            change(&mut turn);
            turn.embedded().err().unwrap_or_default().join("; ")
        };
        assert_eq!(problems(&|_| {}), "");
        assert_eq!(problems(&|turn| turn.listen.clear()), "", "off");
        let change: [(&dyn Fn(&mut Turn), &str); 9] = [
            (&|turn| turn.listen = "3478".into(), "turn.listen"),
            (&|turn| turn.listen = "0.0.0.0:3478".into(), "turn.public_address is needed"),
            (&|turn| turn.public_address = "turn.example.org".into(), "turn.public_address: \"turn"),
            (&|turn| turn.public_address = "2001:db8::1".into(), "different families"),
            (&|turn| turn.relay_ports = "9".into(), "turn.relay_ports"),
            (&|turn| turn.allowed_peers = vec!["10/8".into()], "turn.allowed_peers: \"10/8\""),
            (&|turn| turn.realm.clear(), "turn.realm"),
            (&|turn| turn.max_allocations = 0, "turn.max_allocations is 0"),
            (&|turn| turn.max_allocations_per_session = 0, "turn.max_allocations_per_session is 0"),
        ];
        for (change, expected) in change {
            let text = problems(change);
            assert!(text.contains(expected), "{expected}: {text}");
        }
        let mut config = Config::default();
        config.ams.socket = "/run/ams.sock".into();
        config.turn.listen = "nowhere".into();
        assert_eq!(config.problems().len(), 1, "it is a problem of the whole");
    }

    #[test]
    fn the_example_is_the_default() {
        let text = fanlight_service::config::example::<Config>();
        let variables = [("AGENT_AMS__SOCKET".to_owned(), "/run/ams.sock".to_owned())];
        let config: Config = fanlight_service::config::parse(&text, "AGENT_", variables).expect("usable");
        assert_eq!(config.listen, Config::default().listen);
        assert_eq!(config.ams.socket, PathBuf::from("/run/ams.sock"));
    }
}
