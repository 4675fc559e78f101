//! Settings that may be changed while AMS runs (`GET` and `PATCH /1.0/config`, ams-model section 8): which there are,
//! what they may be, and what is in force. A setting that was never set, or was set to the empty text, has the value of
//! the configuration file or its default. Every unit follows the store, so a change holds everywhere at once.

use std::{collections::BTreeMap, sync::Arc};

use fanlight_api::Secret;
use fanlight_service::Shutdown;
use fanlight_store::{Handle, Op, StoreError, decode, encode};
use serde_json::{Value, json};

use crate::{
    config::Config,
    core::{model::OperationRecord, placement::Strategy},
    identity::oidc::{Oidc, Proxies},
    mirror::{Entries, Mirror},
    operations::Operations,
    size,
    trust::{self, PASSWORD_LENGTH},
};

/// Prefix of what was set.
pub const PREFIX: &str = "ams/settings/";
/// Longest value, characters.
const MAX_VALUE: usize = 4096;

/// What a setting may be.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// `true` or `false`.
    Bool,
    /// A whole number from here to there.
    Number(u32, u32),
    /// A factor above 0.
    Rate,
    /// E.g. `3GB`.
    Size,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// Free text on one line.
    Text,
    /// Words with commas between them.
    Words,
    /// `http://` or `https://`, with a host.
    Url,
    /// Kept as a hash, shown as whether there is one.
    Password,
}

/// Settings that can be changed.
const ITEMS: [(&str, Kind); 20] = [
    ("application.addons", Kind::Words),
    ("application.auto_publish", Kind::Bool),
    ("application.auto_update", Kind::Bool),
    ("application.max_published_versions", Kind::Number(1, 1000)),
    ("auth.mode", Kind::Choice(&["unrestricted", "fine-grained"])),
    ("core.max_requests_per_second", Kind::Number(0, 1_000_000)),
    ("core.proxy_http", Kind::Url),
    ("core.proxy_https", Kind::Url),
    ("core.proxy_ignore_hosts", Kind::Words),
    ("core.trust_password", Kind::Password),
    ("instance.default_cpus", Kind::Number(1, 4096)),
    ("instance.default_disk", Kind::Size),
    ("instance.default_memory", Kind::Size),
    ("node.cpu_allocation_rate", Kind::Rate),
    ("node.memory_allocation_rate", Kind::Rate),
    ("oidc.allow_insecure", Kind::Bool),
    ("oidc.audience", Kind::Text),
    ("oidc.client_id", Kind::Text),
    ("oidc.issuer_url", Kind::Url),
    ("scheduler.strategy", Kind::Choice(&["spread", "binpack"])),
];

/// Settings that are shown and belong to the configuration file, with their names there.
const READ_ONLY: [(&str, &str); 3] = [
    ("agent.api.fingerprint", "agent.fingerprint"),
    ("agent.api.url", "agent.url"),
    ("core.https_address", "listen"),
];

/// Settings of the original that have no meaning here, with the reason.
const REFUSED: [(&str, &str); 33] = [
    ("agent.api.token", "AMS shows the agent its certificate (agent.certificate in the configuration file)"),
    ("application.default_abi", "it is about Android"),
    ("container.apt_mirror", "instances are not changed with apt when they are made"),
    ("container.default_platform", "it is about Android"),
    ("container.features", "it is about Android"),
    ("container.network_proxy", "set the proxy in `environment` of the manifest"),
    ("container.security_updates", "instances are not changed with apt when they are made"),
    ("core.debug_address", "there is no debug listener; logs and metrics tell what is needed"),
    ("cpu.limit_mode", "CPUs are always limited by the scheduler, never pinned"),
    ("gpu.allocation_mode", "GPUs are found on the nodes; their slots are set per node"),
    ("gpu.type", "GPUs are found on the nodes"),
    ("images.allow_insecure", "images come from files, not from a server"),
    ("images.auth", "images come from files, not from a server"),
    ("images.update_interval", "images come from files, not from a server"),
    ("images.url", "images come from files, not from a server"),
    ("images.version_lockstep", "images come from files, not from a server"),
    ("instance.apt_mirror", "instances are not changed with apt when they are made"),
    ("instance.default_platform", "it is about Android"),
    ("instance.features", "it is about Android"),
    ("instance.network_proxy", "set the proxy in `environment` of the manifest"),
    ("instance.security_updates", "instances are not changed with apt when they are made"),
    ("load_balancer.url", "instances do not call AMS"),
    ("node.queue_size", "there is no queue: what does not fit is refused at once"),
    ("node.workers_per_queue", "there is no queue: what does not fit is refused at once"),
    ("openfga.api.fingerprint", "rights are checked by AMS itself: see auth.mode"),
    ("openfga.api.token", "rights are checked by AMS itself: see auth.mode"),
    ("openfga.api.url", "rights are checked by AMS itself: see auth.mode"),
    ("openfga.store.id", "rights are checked by AMS itself: see auth.mode"),
    ("registry.filter", "there is no registry"),
    ("registry.fingerprint", "there is no registry"),
    ("registry.mode", "there is no registry"),
    ("registry.update_interval", "there is no registry"),
    ("registry.url", "there is no registry"),
];

/// Why a change was refused.
#[derive(Debug, thiserror::Error)]
pub enum SettingError {
    /// There is no such setting.
    #[error("config item {0} not found")]
    Unknown(String),
    /// It has no meaning here.
    #[error("config item {name} not supported: {reason}")]
    Refused {
        /// Which.
        name: &'static str,
        /// Why not.
        reason: &'static str,
    },
    /// It belongs to the configuration file.
    #[error("config item {name} not allowed: it is {key} of the configuration file")]
    ReadOnly {
        /// Which.
        name: &'static str,
        /// Its name there.
        key: &'static str,
    },
    /// Not one of its values. The value itself is left out, because it may be a secret in the wrong place.
    #[error("argument value is invalid: {name} needs {allowed}")]
    Value {
        /// Which.
        name: &'static str,
        /// In words.
        allowed: String,
    },
    /// A password could not be hashed.
    #[error("the password could not be hashed: {0}")]
    Hash(String),
    /// The store.
    #[error("the settings cannot be written")]
    Store(#[from] StoreError),
}

/// What is in force.
#[derive(Clone, Debug, PartialEq)]
pub struct Values {
    /// Addons of every application.
    pub addons: Vec<String>,
    /// New versions are published at once.
    pub auto_publish: bool,
    /// Applications get a version when the image or an addon below them is newer.
    pub auto_update: bool,
    /// Published versions kept.
    pub max_published_versions: usize,
    /// Rights are checked per object; otherwise members of the group `admin` may do everything and others nothing.
    pub fine_grained: bool,
    /// Requests per second over HTTPS; 0: unlimited.
    pub max_requests_per_second: u32,
    /// Hash of the trust password.
    pub trust_password: Option<Secret>,
    /// CPUs of an instance that does not ask for another number.
    pub default_cpus: u32,
    /// Bytes of memory of an instance that does not ask for another size.
    pub default_memory: u64,
    /// Bytes of disk of an instance that does not ask for another size.
    pub default_disk: u64,
    /// How often each CPU is promised, on nodes that do not say.
    pub cpu_allocation_rate: f64,
    /// How often each byte is promised, on nodes that do not say.
    pub memory_allocation_rate: f64,
    /// The provider of tokens.
    pub oidc: Oidc,
    /// How nodes are chosen.
    pub strategy: Strategy,
}

impl Values {
    /// What the configuration and the settings give together. A setting that cannot be read, as a newer version may
    /// have written, is left at its default.
    fn new(config: &Config, set: &BTreeMap<String, Secret>) -> Self {
        let set = |name: &str| {
            let value = set.get(name).map(Secret::expose).filter(|value| !value.is_empty())?;
            let (_, kind) = ITEMS.iter().find(|(known, _)| *known == name)?;
            // What a password was is not known any more.
            (*kind == Kind::Password || allowed(*kind, value).is_ok()).then(|| value.to_owned())
        };
        let text = |name: &str| set(name).unwrap_or_default();
        let flag = |name: &str, default: bool| set(name).map_or(default, |value| value == "true");
        let number =
            |name: &str, default: u32| set(name).and_then(|value| value.parse().ok()).unwrap_or(default);
        let rate =
            |name: &str, default: f64| set(name).and_then(|value| value.parse().ok()).unwrap_or(default);
        let bytes = |name: &str, default: &str| {
            let set = set(name).and_then(|value| size::parse(&value).ok());
            set.or_else(|| size::parse(default).ok()).unwrap_or_default()
        };
        let (node, applications) = (&config.node, &config.applications);
        let most = u32::try_from(applications.max_published_versions).unwrap_or(u32::MAX);
        Self {
            addons: words(&text("application.addons")),
            auto_publish: flag("application.auto_publish", applications.auto_publish),
            auto_update: flag("application.auto_update", true),
            max_published_versions: number("application.max_published_versions", most) as usize,
            fine_grained: text("auth.mode") == "fine-grained",
            max_requests_per_second: number("core.max_requests_per_second", 1000),
            trust_password: set("core.trust_password").map(Secret::new),
            default_cpus: number("instance.default_cpus", node.default_cpus),
            default_memory: bytes("instance.default_memory", &node.default_memory),
            default_disk: bytes("instance.default_disk", &node.default_disk),
            cpu_allocation_rate: rate("node.cpu_allocation_rate", node.cpu_allocation_rate),
            memory_allocation_rate: rate("node.memory_allocation_rate", node.memory_allocation_rate),
            oidc: Oidc {
                issuer: text("oidc.issuer_url"),
                client_id: text("oidc.client_id"),
                audience: text("oidc.audience"),
                allow_insecure: flag("oidc.allow_insecure", false),
                proxies: Proxies {
                    http: text("core.proxy_http"),
                    https: text("core.proxy_https"),
                    ignore: words(&text("core.proxy_ignore_hosts")),
                },
            },
            strategy: match set("scheduler.strategy").as_deref() {
                Some("spread") => Strategy::Spread,
                Some("binpack") => Strategy::Binpack,
                _ => node.strategy,
            },
        }
    }

    /// As shown, without what belongs to the configuration file.
    fn show(&self) -> BTreeMap<&'static str, Value> {
        let value = |name: &str| match name {
            "application.addons" => json!(self.addons.join(",")),
            "application.auto_publish" => json!(self.auto_publish),
            "application.auto_update" => json!(self.auto_update),
            "application.max_published_versions" => json!(self.max_published_versions),
            "auth.mode" => json!(if self.fine_grained { "fine-grained" } else { "unrestricted" }),
            "core.max_requests_per_second" => json!(self.max_requests_per_second),
            "core.proxy_http" => json!(without_credentials(&self.oidc.proxies.http)),
            "core.proxy_https" => json!(without_credentials(&self.oidc.proxies.https)),
            "core.proxy_ignore_hosts" => json!(self.oidc.proxies.ignore.join(",")),
            "core.trust_password" => json!(self.trust_password.is_some()),
            "instance.default_cpus" => json!(self.default_cpus),
            "instance.default_disk" => json!(size::format(self.default_disk)),
            "instance.default_memory" => json!(size::format(self.default_memory)),
            "node.cpu_allocation_rate" => json!(self.cpu_allocation_rate),
            "node.memory_allocation_rate" => json!(self.memory_allocation_rate),
            "oidc.allow_insecure" => json!(self.oidc.allow_insecure),
            "oidc.audience" => json!(self.oidc.audience),
            "oidc.client_id" => json!(self.oidc.client_id),
            "oidc.issuer_url" => json!(self.oidc.issuer),
            _ => json!(self.strategy),
        };
        ITEMS.iter().map(|(name, _)| (*name, value(name))).collect()
    }
}

/// The settings. Clones are handles of the same.
#[derive(Clone)]
pub struct Settings {
    store: Handle,
    operations: Operations,
    mirror: Arc<Mirror<Values>>,
}

impl Settings {
    /// Reads what was set.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn open(config: &Config, store: Handle, operations: Operations) -> Result<Self, StoreError> {
        let config = config.clone();
        let build = move |entries: &Entries| Values::new(&config, &read(entries));
        let mirror = Mirror::open(&store, PREFIX, build).await?;
        Ok(Self { store, operations, mirror })
    }

    /// Sees changes of all units from now on.
    pub fn follow(&self, shutdown: &Shutdown) {
        self.mirror.follow("settings", shutdown);
    }

    /// What is in force now.
    pub fn get(&self) -> Arc<Values> {
        self.mirror.get()
    }

    /// Every setting with its value; secrets as whether they are set.
    pub fn show(&self, config: &Config, address: &str) -> BTreeMap<&'static str, Value> {
        let mut shown = self.get().show();
        let trusted_by_file = !config.trust.password_file.as_os_str().is_empty();
        if trusted_by_file {
            shown.insert("core.trust_password", json!(true));
        }
        for (name, _) in READ_ONLY {
            let value = match name {
                "agent.api.fingerprint" => json!(config.agent.fingerprint),
                "agent.api.url" => json!(config.agent.url),
                _ => json!(address),
            };
            shown.insert(name, value);
        }
        shown
    }

    /// Changes one; empty: the default again. In force here when this is back.
    ///
    /// # Errors
    /// It cannot be changed, or not to this.
    pub async fn set(&self, name: &str, value: &Secret) -> Result<OperationRecord, SettingError> {
        let (name, kind) = check(name, value.expose())?;
        let key = format!("{PREFIX}{name}");
        let (operation, write) =
            self.operations.prepare_done("Updating configuration", "config", "/1.0/config", Ok(()));
        let op = match value.is_empty() {
            true => Op::delete(&key),
            false => {
                let kept = match kind {
                    Kind::Password => trust::hash(value).await.map_err(SettingError::Hash)?,
                    _ => value.clone(),
                };
                Op::put(&key, encode(&key, &kept)?)
            }
        };
        let committed = self.store.transact(Vec::new(), vec![op, write]).await?;
        self.mirror.reached(committed.revision).await;
        self.operations.begun(&operation);
        tracing::info!("config item {name} was {}", if value.is_empty() { "reset" } else { "changed" });
        Ok(operation)
    }
}

fn read(entries: &Entries) -> BTreeMap<String, Secret> {
    let mut set = BTreeMap::new();
    for (key, bytes) in entries {
        match decode::<Secret>(key, bytes) {
            Ok(value) => drop(set.insert(key.trim_start_matches(PREFIX).to_owned(), value)),
            Err(error) => tracing::error!("{}", fanlight_service::telemetry::chain(&error)),
        }
    }
    set
}

/// Checks a change before it is written; the empty text stands for the default.
fn check(name: &str, value: &str) -> Result<(&'static str, Kind), SettingError> {
    if let Some((name, reason)) = REFUSED.into_iter().find(|(refused, _)| *refused == name) {
        return Err(SettingError::Refused { name, reason });
    }
    if let Some((name, key)) = READ_ONLY.into_iter().find(|(known, _)| *known == name) {
        return Err(SettingError::ReadOnly { name, key });
    }
    let Some((name, kind)) = ITEMS.into_iter().find(|(known, _)| *known == name) else {
        return Err(SettingError::Unknown(name.chars().take(64).collect()));
    };
    if !value.is_empty() {
        allowed(kind, value).map_err(|allowed| SettingError::Value { name, allowed })?;
    }
    Ok((name, kind))
}

/// Whether a setting of this kind may have this value; otherwise what it may have.
fn allowed(kind: Kind, value: &str) -> Result<(), String> {
    if value.len() > MAX_VALUE || value.chars().any(char::is_control) {
        return Err(format!("at most {MAX_VALUE} characters on one line"));
    }
    let (good, needed) = match kind {
        Kind::Bool => (matches!(value, "true" | "false"), "true or false".into()),
        Kind::Number(low, high) => (
            value.parse::<u32>().is_ok_and(|number| (low..=high).contains(&number)),
            format!("a number from {low} to {high}"),
        ),
        Kind::Rate => (
            value.parse::<f64>().is_ok_and(|rate| rate.is_finite() && rate > 0.0 && rate <= 1000.0),
            "a factor above 0 and up to 1000".into(),
        ),
        Kind::Size => (
            size::parse(value).is_ok_and(|bytes| bytes > 0 && i64::try_from(bytes).is_ok()),
            "a size such as 3GB".into(),
        ),
        Kind::Choice(words) => (words.contains(&value), words.join(" or ")),
        Kind::Text | Kind::Words => (true, String::new()),
        Kind::Url => (
            reqwest::Url::parse(value)
                .is_ok_and(|url| matches!(url.scheme(), "http" | "https") && url.host_str().is_some()),
            "a URL such as https://host".into(),
        ),
        Kind::Password => {
            (value.chars().count() >= PASSWORD_LENGTH, format!("at least {PASSWORD_LENGTH} characters"))
        }
    };
    if good { Ok(()) } else { Err(needed) }
}

/// Words of a list with commas between them.
pub fn words(text: &str) -> Vec<String> {
    text.split(',').map(str::trim).filter(|word| !word.is_empty()).map(ToOwned::to_owned).collect()
}

/// A URL as it may be shown: a proxy may have a password.
fn without_credentials(text: &str) -> String {
    match reqwest::Url::parse(text) {
        Ok(mut url) if !url.username().is_empty() || url.password().is_some() => {
            // Neither can fail for a URL with a host.
            let _ = url.set_username("");
            let _ = url.set_password(None);
            url.to_string()
        }
        _ => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(list: &[(&str, &str)]) -> BTreeMap<String, Secret> {
        list.iter().map(|(name, value)| ((*name).to_owned(), Secret::new(*value))).collect()
    }

    #[test]
    fn settings_that_are_not_set_have_the_value_of_the_file() {
        let mut config = Config::default();
        config.applications.max_published_versions = 7;
        config.node.strategy = Strategy::Binpack;
        let values = Values::new(&config, &BTreeMap::new());
        assert_eq!((values.max_published_versions, values.strategy), (7, Strategy::Binpack));
        assert_eq!((values.max_requests_per_second, values.fine_grained), (1000, false));
        assert_eq!(values.default_memory, 3 << 30);
        let changed = set(&[
            ("application.max_published_versions", "2"),
            ("scheduler.strategy", "spread"),
            ("auth.mode", "fine-grained"),
            ("instance.default_memory", "512MB"),
            ("node.cpu_allocation_rate", "1.5"),
            ("core.proxy_ignore_hosts", "a, b,"),
            // What cannot be read is left at its default.
            ("core.max_requests_per_second", "many"),
            ("oidc.allow_insecure", "perhaps"),
            ("from.the.future", "1"),
        ]);
        let values = Values::new(&config, &changed);
        assert_eq!((values.max_published_versions, values.strategy), (2, Strategy::Spread));
        assert_eq!((values.max_requests_per_second, values.fine_grained), (1000, true));
        assert_eq!((values.default_memory, values.cpu_allocation_rate), (512 << 20, 1.5));
        assert_eq!(
            (values.oidc.proxies.ignore.join("|").as_str(), values.oidc.allow_insecure),
            ("a|b", false)
        );
    }

    #[test]
    fn what_is_shown_can_be_written_back_and_has_the_type_of_the_setting() {
        let shown = Values::new(&Config::default(), &BTreeMap::new()).show();
        assert_eq!(shown.len(), ITEMS.len());
        for (name, kind) in ITEMS {
            let value = &shown[name];
            let fits = match kind {
                Kind::Bool | Kind::Password => value.is_boolean(),
                Kind::Number(..) => value.is_u64(),
                Kind::Rate => value.is_f64(),
                _ => value.is_string(),
            };
            assert!(fits, "{name}: {value}");
            let text = value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned);
            assert!(kind == Kind::Password || check(name, &text).is_ok(), "{name}: {text}");
        }
    }

    #[test]
    fn wrong_changes_are_refused_by_name_and_the_value_is_not_repeated() {
        for (name, value, part) in [
            ("colour", "red", "colour not found"),
            ("openfga.api.url", "https://a", "auth.mode"),
            ("core.https_address", "1.2.3.4:5", "listen of the configuration file"),
            ("application.auto_publish", "yes", "true or false"),
            ("application.max_published_versions", "0", "from 1 to 1000"),
            ("core.max_requests_per_second", "-1", "from 0 to"),
            ("instance.default_memory", "much", "3GB"),
            ("instance.default_memory", "0B", "3GB"),
            ("node.cpu_allocation_rate", "0", "above 0"),
            ("node.cpu_allocation_rate", "inf", "above 0"),
            ("oidc.issuer_url", "ftp://x", "https://host"),
            ("scheduler.strategy", "best", "spread or binpack"),
            ("core.trust_password", "hunter2", "at least 8"),
            ("oidc.client_id", "a\nb", "one line"),
        ] {
            let text = check(name, value).expect_err(name).to_string();
            assert!(text.contains(part) && text.contains(name), "{text}");
            assert!(!text.contains("hunter2"), "{text}");
        }
        for (name, _) in ITEMS {
            assert!(check(name, "").is_ok(), "{name}: the default again");
        }
        let with = "http://user:word@proxy:3128/";
        assert_eq!(without_credentials(with), "http://proxy:3128/");
    }

    #[test]
    fn every_name_is_in_one_table_and_in_the_reference() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/reference/ams-settings.md");
        let text = std::fs::read_to_string(path).expect("the reference is in the repository");
        // Rows begin with the name in code marks; the headings say which table they are of.
        let mut tables: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        let mut heading = "";
        for line in text.lines() {
            if let Some(title) = line.strip_prefix("## ") {
                heading = title;
            } else if let Some((name, _)) = line.strip_prefix("| `").and_then(|row| row.split_once('`')) {
                tables.entry(heading).or_default().push(name);
            }
        }
        let names = |list: &[&'static str]| list.to_vec();
        assert_eq!(tables["Settings"], names(&ITEMS.map(|(name, _)| name)));
        assert_eq!(tables["Shown only"], names(&READ_ONLY.map(|(name, _)| name)));
        assert_eq!(tables["Not offered"], names(&REFUSED.map(|(name, _)| name)));
        for (name, reason) in REFUSED {
            let row = format!("| `{name}` | {reason} |");
            assert!(text.contains(&row), "{row} is missing");
        }
    }
}
