//! Settings of the bus, a section of the configuration of gateway and agent.

use std::{fs, path::PathBuf};

use serde::{Deserialize, Serialize};

use crate::BusError;

/// Where the bus is and how to get in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BusConfig {
    /// `local:` (inside this process), or one or more servers separated by commas: `nats://host:4222`,
    /// `tls://host:4222` (TLS required).
    pub url: String,
    /// File that holds the token of the server. Empty: none.
    pub token_file: PathBuf,
    /// User name. Empty: none.
    pub user: String,
    /// File that holds the password of the user. Empty: none.
    pub password_file: PathBuf,
    /// PEM file of the certificate authorities that the server's certificate may come from. Empty: those of
    /// the system.
    pub ca: PathBuf,
    /// PEM file of our certificate, when the server wants one. Empty: none.
    pub certificate: PathBuf,
    /// PEM file of the key of our certificate. Empty: none.
    pub key: PathBuf,
}

impl Default for BusConfig {
    fn default() -> Self {
        Self {
            url: "local:".into(),
            token_file: PathBuf::new(),
            user: String::new(),
            password_file: PathBuf::new(),
            ca: PathBuf::new(),
            certificate: PathBuf::new(),
            key: PathBuf::new(),
        }
    }
}

impl BusConfig {
    /// The settings of a server without credentials.
    pub fn at(url: impl Into<String>) -> Self {
        Self { url: url.into(), ..Self::default() }
    }

    /// Everything that is wrong with the settings, in words; files are not looked at.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.url != "local:"
            && let Err(error) = self.servers()
        {
            problems.push(error.to_string());
        }
        let given = |path: &PathBuf| !path.as_os_str().is_empty();
        if given(&self.token_file) && !self.user.is_empty() {
            problems.push("bus.token_file and bus.user exclude each other".into());
        }
        if self.user.is_empty() == given(&self.password_file) {
            problems.push("bus.user and bus.password_file are only valid together".into());
        }
        if given(&self.certificate) != given(&self.key) {
            problems.push("bus.certificate and bus.key are only valid together".into());
        }
        problems
    }

    /// Addresses of the servers, and whether TLS is required.
    pub(crate) fn servers(&self) -> Result<(Vec<async_nats::ServerAddr>, bool), BusError> {
        let invalid = |url: &str, reason: String| BusError::Url { url: without_credentials(url), reason };
        let mut servers = Vec::new();
        let mut tls = false;
        for url in self.url.split(',').map(str::trim) {
            if !url.starts_with("nats://") && !url.starts_with("tls://") {
                return Err(invalid(
                    url,
                    "expected `local:`, `nats://HOST:PORT` or `tls://HOST:PORT`".into(),
                ));
            }
            if url.contains('@') {
                return Err(invalid(
                    url,
                    "credentials belong into bus.token_file or bus.user and bus.password_file".into(),
                ));
            }
            tls |= url.starts_with("tls://");
            let server: async_nats::ServerAddr =
                url.parse().map_err(|error: std::io::Error| invalid(url, error.to_string()))?;
            if server.host().is_empty() {
                return Err(invalid(url, "there is no host in it".into()));
            }
            servers.push(server);
        }
        Ok((servers, tls))
    }
}

fn without_credentials(url: &str) -> String {
    match (url.find("://"), url.rfind('@')) {
        (Some(scheme), Some(at)) if at > scheme => format!("{}://…{}", &url[..scheme], &url[at..]),
        _ => url.to_owned(),
    }
}

/// The one line that a file of a secret holds.
pub(crate) fn read_secret(key: &'static str, path: &PathBuf) -> Result<String, BusError> {
    let text =
        fs::read_to_string(path).map_err(|source| BusError::File { key, path: path.clone(), source })?;
    Ok(text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_settings_are_named_and_credentials_in_urls_do_not_show() {
        assert!(BusConfig::default().problems().is_empty());
        assert!(BusConfig::at("nats://a:4222, nats://b:4222").problems().is_empty());
        for (url, expected) in [
            ("", "bus.url \"\""),
            ("http://host", "expected `local:`"),
            ("nats://me:hunter2@host:4222", "bus.token_file"),
            ("nats://", "bus.url"),
        ] {
            let problems = BusConfig::at(url).problems();
            assert!(problems.iter().any(|text| text.contains(expected)), "{url}: {problems:?}");
            assert!(!problems.concat().contains("hunter2"));
        }
        let both =
            BusConfig { token_file: "t".into(), user: "u".into(), key: "k".into(), ..Default::default() };
        assert_eq!(both.problems().len(), 3, "{:?}", both.problems());
    }
}
