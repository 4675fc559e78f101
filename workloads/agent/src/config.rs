//! Settings of the agent, from `agent.toml`, then from `AGENT_*` variables (`AGENT_BUS__URL`).

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use fanlight_api::AgentId;
use fanlight_bus::BusConfig;
use fanlight_client::{Endpoint, Identity, Trust};
use fanlight_service::config::Validate;
use serde::{Deserialize, Serialize};

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

/// TURN servers that take credentials made from a shared secret, as Coturn with `use-auth-secret`.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Turn {
    /// `turn:host:port?transport=udp`, `turns:host:port`. Empty: none.
    pub urls: Vec<String>,
    /// File that holds the shared secret; read for each session, so that it may be changed.
    pub secret_file: PathBuf,
    /// How long credentials are valid.
    #[serde(with = "humantime_serde")]
    pub ttl: Duration,
}

impl Default for Turn {
    fn default() -> Self {
        Self { urls: Vec::new(), secret_file: PathBuf::new(), ttl: Duration::from_secs(24 * 60 * 60) }
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
            check(url.starts_with("stun:"), format!("stun.urls: {url:?} does not begin with stun:"));
        }
        for url in &self.turn.urls {
            let turn = url.starts_with("turn:") || url.starts_with("turns:");
            check(turn, format!("turn.urls: {url:?} does not begin with turn: or turns:"));
        }
        check(
            self.turn.urls.is_empty() || given(&self.turn.secret_file),
            "turn.secret_file is needed with turn.urls".into(),
        );
        check(
            self.turn.ttl >= Duration::from_secs(60),
            format!("turn.ttl is {:?}: at least 60 s are needed", self.turn.ttl),
        );
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
    fn the_example_is_the_default() {
        let text = fanlight_service::config::example::<Config>();
        let variables = [("AGENT_AMS__SOCKET".to_owned(), "/run/ams.sock".to_owned())];
        let config: Config = fanlight_service::config::parse(&text, "AGENT_", variables).expect("usable");
        assert_eq!(config.listen, Config::default().listen);
        assert_eq!(config.ams.socket, PathBuf::from("/run/ams.sock"));
    }
}
