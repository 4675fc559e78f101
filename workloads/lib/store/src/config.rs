//! Settings of the store, a section of the configuration of gateway and AMS.

use std::{path::PathBuf, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::{Embedded, Handle, StoreError, etcd::Etcd};

/// Port of etcd where `store.url` names none.
const ETCD_PORT: u16 = 2379;

/// Where the store is and how to get in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StoreConfig {
    /// `file:PATH`: a file of this program alone, made when it is not there. `etcd://HOST:2379,HOST2:2379`: the
    /// members of an etcd cluster, for several programs at once; `etcds://…` with TLS. `memory:`: nothing lasts, for
    /// tests.
    pub url: String,
    /// Etcd: what all keys of this program begin with. Programs with the same prefix share their records.
    pub prefix: String,
    /// Etcd: PEM file of the certificate authorities that the servers' certificates may come from. Empty: those of the
    /// system.
    pub ca: PathBuf,
    /// Etcd: PEM file of our certificate, when the servers want one. Empty: none.
    pub certificate: PathBuf,
    /// Etcd: PEM file of the key of our certificate. Empty: none.
    pub key: PathBuf,
    /// Etcd: user name. Empty: none.
    pub user: String,
    /// Etcd: file that holds the password of the user. Empty: none.
    pub password_file: PathBuf,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self {
            url: "memory:".into(),
            prefix: "/fanlight/".into(),
            ca: PathBuf::new(),
            certificate: PathBuf::new(),
            key: PathBuf::new(),
            user: String::new(),
            password_file: PathBuf::new(),
        }
    }
}

/// What `store.url` names.
#[derive(Debug, PartialEq, Eq)]
enum Kind {
    Memory,
    File(PathBuf),
    /// Members as `HOST:PORT`, and whether with TLS.
    Etcd(Vec<String>, bool),
}

impl StoreConfig {
    /// A store at an address, with nothing else set.
    pub fn at(url: impl Into<String>) -> Self {
        Self { url: url.into(), ..Self::default() }
    }

    /// A store in a file.
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self::at(format!("file:{}", path.into().display()))
    }

    /// Everything that is wrong with the settings, in words; files are not looked at.
    /// Whether several programs may use the store at the same time.
    pub fn is_shared(&self) -> bool {
        self.url.starts_with("etcd://") || self.url.starts_with("etcds://")
    }

    /// Whether the records are there at the next start too.
    pub fn lasts(&self) -> bool {
        self.url != "memory:"
    }

    /// What is wrong with the settings, in words.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let tls = match self.kind() {
            Ok(Kind::Etcd(_, tls)) => tls,
            Ok(Kind::Memory | Kind::File(_)) => return problems,
            Err(error) => {
                problems.push(error.to_string());
                return problems;
            }
        };
        let given = |path: &PathBuf| !path.as_os_str().is_empty();
        if self.prefix.is_empty() {
            problems.push("store.prefix must not be empty".into());
        }
        if !tls && (given(&self.ca) || given(&self.certificate) || given(&self.key)) {
            problems.push("store.ca, store.certificate and store.key are only valid with `etcds://`".into());
        }
        if given(&self.certificate) != given(&self.key) {
            problems.push("store.certificate and store.key are only valid together".into());
        }
        if self.user.is_empty() == given(&self.password_file) {
            problems.push("store.user and store.password_file are only valid together".into());
        }
        problems
    }

    fn kind(&self) -> Result<Kind, StoreError> {
        let invalid = |reason: &str| {
            Err(StoreError::Url { url: without_credentials(&self.url), reason: reason.to_owned() })
        };
        if self.url == "memory:" {
            return Ok(Kind::Memory);
        }
        if let Some(path) = self.url.strip_prefix("file:").filter(|path| !path.is_empty()) {
            return Ok(Kind::File(path.into()));
        }
        let (tls, members) = match (self.url.strip_prefix("etcd://"), self.url.strip_prefix("etcds://")) {
            (Some(members), _) => (false, members),
            (None, Some(members)) => (true, members),
            (None, None) => {
                return invalid(
                    "expected `file:PATH`, `etcd://HOST:PORT[,HOST:PORT…]`, `etcds://HOST:PORT[,HOST:PORT…]` or \
                     `memory:`",
                );
            }
        };
        if members.contains('@') {
            return invalid("credentials belong into store.user and store.password_file");
        }
        let mut parsed = Vec::new();
        for member in members.split(',').map(str::trim) {
            match with_port(member) {
                Some(member) => parsed.push(member),
                None => return invalid(&format!("{member:?} is not `HOST:PORT`")),
            }
        }
        Ok(Kind::Etcd(parsed, tls))
    }
}

/// `HOST`, `HOST:PORT`, `[V6]` or `[V6]:PORT` as `HOST:PORT`.
fn with_port(member: &str) -> Option<String> {
    let (host, port) = match member.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']')?;
            host.parse::<std::net::Ipv6Addr>().ok()?;
            (format!("[{host}]"), if port.is_empty() { None } else { Some(port.strip_prefix(':')?) })
        }
        None => match member.split_once(':') {
            Some((host, port)) => (host.to_owned(), Some(port)),
            None => (member.to_owned(), None),
        },
    };
    let port = port.map_or(Ok(ETCD_PORT), str::parse).ok()?;
    let name = |c: char| c.is_ascii_alphanumeric() || "-._[]:".contains(c);
    (!host.is_empty() && host.chars().all(name)).then(|| format!("{host}:{port}"))
}

fn without_credentials(url: &str) -> String {
    match (url.find("://"), url.rfind('@')) {
        (Some(scheme), Some(at)) if at > scheme => format!("{}://…{}", &url[..scheme], &url[at..]),
        _ => url.to_owned(),
    }
}

/// Opens the store of a configuration.
///
/// # Errors
/// The settings are wrong; the file is in use, damaged, or from a newer version; or etcd cannot be reached or does not
/// let us in.
pub async fn open(config: &StoreConfig) -> Result<Handle, StoreError> {
    let kind = config.kind()?;
    if let Some(problem) = config.problems().into_iter().next() {
        return Err(StoreError::Settings(problem));
    }
    Ok(match kind {
        Kind::File(path) => Arc::new(Embedded::file(path).await?),
        Kind::Memory => Arc::new(Embedded::memory()),
        Kind::Etcd(members, tls) => Arc::new(Etcd::connect(config, &members, tls).await?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_unknown_kinds_are_refused_by_name() {
        assert!(StoreConfig::default().problems().is_empty());
        assert!(StoreConfig::file("/var/lib/x.redb").problems().is_empty());
        for bad in [
            "",
            "file:",
            "/var/lib/x",
            "etcd:",
            "memory",
            "etcd://",
            "etcd://a,,b",
            "etcds://a:1:2",
            "etcd://a/b",
        ] {
            let problems = StoreConfig::at(bad).problems();
            assert!(problems[0].contains(&format!("{bad:?}")), "{problems:?}");
        }
    }

    #[test]
    fn members_of_etcd_are_read_with_their_ports() {
        let kind = |url: &str| StoreConfig::at(url).kind().expect("valid");
        let members = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
        assert_eq!(kind("etcd://a:1, b-1.c:2,d"), Kind::Etcd(members(&["a:1", "b-1.c:2", "d:2379"]), false));
        assert_eq!(
            kind("etcds://[::1],[fe80::1]:7"),
            Kind::Etcd(members(&["[::1]:2379", "[fe80::1]:7"]), true)
        );
    }

    #[test]
    fn settings_that_contradict_each_other_are_named_and_credentials_in_urls_do_not_show() {
        let problems = StoreConfig::at("etcd://me:hunter2@host:2379").problems();
        assert!(problems[0].contains("store.password_file"), "{problems:?}");
        assert!(!problems.concat().contains("hunter2"), "{problems:?}");
        let plain = StoreConfig { ca: "ca.pem".into(), ..StoreConfig::at("etcd://host") };
        assert!(plain.problems()[0].contains("etcds://"), "{:?}", plain.problems());
        let all = StoreConfig {
            prefix: String::new(),
            key: "k".into(),
            user: "u".into(),
            ..StoreConfig::at("etcds://host")
        };
        assert_eq!(all.problems().len(), 3, "{:?}", all.problems());
        let whole = StoreConfig {
            ca: "ca".into(),
            certificate: "c".into(),
            key: "k".into(),
            user: "u".into(),
            password_file: "p".into(),
            ..StoreConfig::at("etcds://host")
        };
        assert!(whole.problems().is_empty(), "{:?}", whole.problems());
    }
}
