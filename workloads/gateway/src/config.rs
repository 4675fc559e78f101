//! Settings of the gateway.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use fanlight_bus::BusConfig;
use fanlight_service::config::Validate;
use fanlight_store::StoreConfig;
use serde::{Deserialize, Serialize};

use crate::geoip::Network;

/// Settings of the gateway, from a TOML file, then from `GATEWAY_*` variables (`GATEWAY_BUS__URL`).
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Name of this unit among the units of the gateway, stable over restarts: 1 to 255 characters of
    /// `A-Z a-z 0-9 - _ : .` Units that share a store need different ones.
    pub unit: String,
    /// Address of the public API (HTTPS and websockets).
    pub listen: SocketAddr,
    /// Where callers reach the public API, `https://host:port`; goes into the socket URLs that they are given.
    /// Empty: the `Host` of their request.
    pub public_url: String,
    /// Unix socket of the internal API, mode 0600. Empty: none.
    pub internal_socket: PathBuf,
    /// Certificate of the public API.
    pub tls: Tls,
    /// The page.
    pub ui: Ui,
    /// Prometheus metrics.
    pub metrics: Metrics,
    /// The bus to the agents.
    pub bus: BusConfig,
    /// Where sessions and accounts are kept.
    pub store: StoreConfig,
    /// Choosing a cluster near the client.
    pub placement: Placement,
    /// Pages of other origins.
    pub cors: Cors,
    /// Bounds.
    pub limits: Limits,
}

/// Certificate of the public API; a self-signed one is made where there is none. Changed files are read again.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Tls {
    /// PEM file of the certificate, leaf first.
    pub certificate: PathBuf,
    /// PEM file of its private key.
    pub key: PathBuf,
}

/// The page under `/ui`.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Ui {
    /// Loopback address that serves page, API and sockets without TLS, `127.0.0.1:port`. Empty: none; the page is
    /// then served by the public API alone.
    pub listen: String,
    /// Folder with the built page. Empty: there is no page.
    pub path: PathBuf,
}

/// Prometheus metrics.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Metrics {
    /// Address that serves `/metrics` (plain HTTP). Empty: none.
    pub listen: String,
}

/// Where clients are, for choosing a cluster near them. Round trips that a client measured count first, then the
/// location that a caller gives.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Placement {
    /// Database file in MaxMind's format that tells where addresses are (GeoLite2-City, DB-IP City Lite). Empty: addresses
    /// tell nothing.
    pub geoip_database: PathBuf,
    /// Addresses or networks of proxies whose `X-Forwarded-For` is believed, `10.0.0.0/8`.
    pub trusted_proxies: Vec<String>,
}

impl Placement {
    /// The proxies; what cannot be read was told by [`Validate::problems`] and is left out.
    pub fn trusted(&self) -> Vec<Network> {
        self.trusted_proxies.iter().filter_map(|text| text.parse().ok()).collect()
    }
}

/// Cross-origin requests.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Cors {
    /// Origins whose pages may call the API, as browsers write them (`https://host`), or `*`. Empty: none.
    pub origins: Vec<String>,
}

/// Bounds of what callers can use up.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// HTTP connections at a time, per listener.
    pub connections: usize,
    /// Signalling sockets at a time. The next one is answered 503.
    pub sockets: usize,
    /// Bytes of a request's body.
    pub body_bytes: usize,
    /// Requests per second over all callers; 0 = unlimited. An excess is answered 429. Sockets that are open are
    /// not counted.
    pub requests_per_second: u32,
    /// How long an agent may take to accept a session before the next one is asked.
    #[serde(with = "humantime_serde")]
    pub accept_time: Duration,
    /// How long a client's socket waits for its instance.
    #[serde(with = "humantime_serde")]
    pub instance_time: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            unit: "gateway-0".into(),
            listen: ([127, 0, 0, 1], 4000).into(),
            public_url: String::new(),
            internal_socket: PathBuf::new(),
            tls: Tls::default(),
            ui: Ui::default(),
            metrics: Metrics::default(),
            bus: BusConfig::default(),
            store: StoreConfig::file("gateway.redb"),
            placement: Placement::default(),
            cors: Cors::default(),
            limits: Limits::default(),
        }
    }
}

impl Default for Tls {
    fn default() -> Self {
        Self { certificate: "gateway.crt".into(), key: "gateway.key".into() }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 4096,
            sockets: 20_000,
            body_bytes: 1024 * 1024,
            requests_per_second: 0,
            accept_time: Duration::from_secs(1),
            instance_time: Duration::from_secs(300),
        }
    }
}

impl Config {
    /// Address of the plain listener, if there is one.
    ///
    /// # Errors
    /// Says what is wrong with `ui.listen`.
    pub fn ui_address(&self) -> Result<Option<SocketAddr>, String> {
        let Some(address) = optional_address("ui.listen", &self.ui.listen)? else { return Ok(None) };
        if !address.ip().is_loopback() {
            return Err(format!(
                "ui.listen is {address}: only a loopback address is served without TLS; other machines use `listen`"
            ));
        }
        Ok(Some(address))
    }

    /// Address of the metrics, if they are served.
    ///
    /// # Errors
    /// Says what is wrong with `metrics.listen`.
    pub fn metrics_address(&self) -> Result<Option<SocketAddr>, String> {
        optional_address("metrics.listen", &self.metrics.listen)
    }

    /// `host:port` of [`Config::public_url`]; empty when there is none.
    pub fn public_authority(&self) -> &str {
        self.public_url.strip_prefix("https://").unwrap_or_default().trim_end_matches('/')
    }
}

/// Whether a text is an origin as browsers write it, or stands for all.
pub fn is_origin(text: &str) -> bool {
    text == "*"
        || text
            .strip_prefix("https://")
            .or_else(|| text.strip_prefix("http://"))
            .is_some_and(|rest| rest.parse::<http::uri::Authority>().is_ok())
}

fn optional_address(key: &str, text: &str) -> Result<Option<SocketAddr>, String> {
    match text {
        "" => Ok(None),
        text => text
            .parse()
            .map(Some)
            .map_err(|_| format!("{key} is {text:?}: expected an address with a port like 127.0.0.1:8080")),
    }
}

impl Validate for Config {
    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        problems.extend(self.ui_address().err());
        problems.extend(self.metrics_address().err());
        problems.extend(self.bus.problems());
        problems.extend(self.store.problems());
        let authority = self.public_authority();
        let usable = authority.parse::<http::uri::Authority>().is_ok();
        if !self.public_url.is_empty() && !usable {
            problems.push(format!("public_url is {:?}: expected https://host:port", self.public_url));
        }
        if let Err(error) = self.unit.parse::<fanlight_api::AgentId>() {
            problems.push(format!("unit: {error}"));
        }
        for text in &self.placement.trusted_proxies {
            problems.extend(
                text.parse::<Network>().err().map(|text| format!("placement.trusted_proxies: {text}")),
            );
        }
        for origin in &self.cors.origins {
            if !is_origin(origin) {
                problems.push(format!("cors.origins holds {origin:?}: expected https://host or *"));
            }
        }
        for (key, path) in [("tls.certificate", &self.tls.certificate), ("tls.key", &self.tls.key)] {
            if path.as_os_str().is_empty() {
                problems.push(format!("{key} is empty: a file name is needed"));
            }
        }
        if self.limits.body_bytes == 0 || self.limits.connections == 0 {
            problems.push("limits.body_bytes and limits.connections must be at least 1".into());
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config, Vec<String>> {
        fanlight_service::config::parse(text, "", [])
    }

    #[test]
    fn the_example_is_read_back() {
        let example = fanlight_service::config::example::<Config>();
        let config = read(&example).expect("valid");
        assert_eq!(config.listen, Config::default().listen);
        assert!(example.contains("accept_time = \"1s\""), "{example}");
    }

    #[test]
    fn every_bad_value_is_named() {
        let problems = read(
            "public_url = 'gw'\nlisten = 'x'\n[ui]\nlisten = '0.0.0.0:80'\n[metrics]\nlisten = 'here'\n\
             [cors]\norigins = ['a b']\n[bus]\nurl = 'ftp://x'\n[store]\nurl = 'x'\n[tls]\nkey = ''",
        )
        .expect_err("all wrong")
        .join("\n");
        for key in [
            "public_url",
            "listen",
            "ui.listen",
            "metrics.listen",
            "cors.origins",
            "bus.url",
            "store.url",
            "tls.key",
        ] {
            assert!(problems.contains(key), "{key} is missing in:\n{problems}");
        }
    }
}
