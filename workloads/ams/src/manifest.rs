//! The manifest of an application: read strictly, checked as a whole, turned into what AMS keeps.
//!
//! Keys of the original that only mean something to Android are refused where they would promise an effect
//! that a program of the host does not have; the rest is kept as it is (ams-model section 2.2).

use std::{collections::BTreeMap, path::Path, time::Duration};

use fanlight_api::{
    ams::{Bootstrap, Command, Hooks, Manifest, ManifestResources, Pool, Service, Watchdog, YamlText},
    guest::Restart,
};
use serde::{Deserialize, Serialize};

use crate::size;

/// The image that the process engine stands for: the host's own files, read-only.
pub const HOST_IMAGE: &str = "host";

/// Smallest memory an instance can ask for, bytes.
const LEAST_MEMORY: u64 = 16 << 20;
/// How long a hook may take where nothing is said, and at most (ams-model section 5).
const HOOK_TIME: Duration = Duration::from_secs(300);
const MOST_HOOK_TIME: Duration = Duration::from_secs(900);
/// Most services of an instance, and most ports of one.
const MOST_SERVICES: usize = 32;
const MOST_PORTS: u16 = 100;
/// Most bytes of a manifest.
pub const MAX_MANIFEST_BYTES: u64 = 256 * 1024;

/// Why a manifest was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// Not YAML, an unknown key, or a value of the wrong type; the text names it.
    #[error("manifest.yaml malformed: {0}")]
    Malformed(String),
    /// A key that must be there.
    #[error("manifest.yaml: {0} is required")]
    Required(&'static str),
    /// A value out of range.
    #[error("manifest.yaml: argument {key} is invalid: {reason}")]
    Invalid {
        /// Which key.
        key: &'static str,
        /// What is wrong with it, with the value.
        reason: String,
    },
    /// A key without a meaning for programs of the host.
    #[error("manifest.yaml: {key} not supported by image {HOST_IMAGE}")]
    Unsupported {
        /// Which key.
        key: &'static str,
    },
}

/// What a manifest asks for; absent = not said.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Wanted {
    /// Whole CPUs.
    pub cpus: Option<u32>,
    /// Bytes.
    pub memory_bytes: Option<u64>,
    /// Bytes.
    pub disk_bytes: Option<u64>,
    /// GPU slots.
    pub gpu_slots: Option<u32>,
    /// Vendor.
    pub gpu_type: Option<String>,
    /// Its disk is not counted against that of the node.
    pub no_disk_reserve: bool,
}

/// A manifest that was checked.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Checked {
    /// Unique name.
    pub name: String,
    /// Free text.
    pub version: String,
    /// For people.
    pub title: String,
    /// One sentence.
    pub description: String,
    /// File of the package, relative to its root.
    pub icon: Option<String>,
    /// Program and arguments, at least one.
    pub command: Vec<String>,
    /// Added to the environment.
    pub environment: BTreeMap<String, String>,
    /// Absolute.
    pub working_directory: Option<String>,
    /// What happens when the program ends.
    pub restart: Restart,
    /// Free words.
    pub tags: Vec<String>,
    /// Tags that a node must have.
    pub node_selector: Vec<String>,
    /// Feature flags, passed through.
    pub features: Vec<String>,
    /// `gpu`, `gpu-preferred`, `software`.
    pub video_encoder: String,
    /// Deprecated preset.
    pub instance_type: String,
    /// What an instance takes.
    pub resources: Wanted,
    /// Name or id of the image; empty: the default.
    pub image: String,
    /// Ports that are reached through the node.
    pub services: Vec<Service>,
    /// How long a hook may take, seconds.
    pub hook_time_s: Option<u64>,
    /// Names of addons, whose hooks run before those of the application.
    pub addons: Vec<String>,
    /// Patterns of what survives the making of a version; the manifest and the hooks always do. Empty: everything.
    pub keep: Vec<String>,
    /// Instances that wait for a launch.
    pub pool: Pool,
}

/// Reads and checks the text of a `manifest.yaml`.
///
/// # Errors
/// Names the first key that is wrong.
pub fn parse(text: &str) -> Result<Checked, ManifestError> {
    let malformed = |error: serde_yaml_ng::Error| ManifestError::Malformed(error.to_string());
    let manifest: Manifest = serde_yaml_ng::from_str(text).map_err(malformed)?;
    // The objects below are also read from clients, who may know more than we do; who writes a manifest may not.
    if let Some(unknown) = unknown_below(&serde_yaml_ng::from_str(text).map_err(malformed)?) {
        return Err(ManifestError::Malformed(unknown));
    }
    check(manifest)
}

/// The first unknown key of an object or list of objects that shares its type with the API.
fn unknown_below(manifest: &serde_yaml_ng::Value) -> Option<String> {
    for (parent, known) in below() {
        let given = &manifest[parent];
        let objects = given.as_sequence().map_or(std::slice::from_ref(given), Vec::as_slice);
        let keys = objects.iter().filter_map(|object| object.as_mapping()).flat_map(|object| object.keys());
        for key in keys {
            // Keys of other types are not text, and so are not known either.
            let key = key.as_str().map_or_else(|| format!("{key:?}"), str::to_owned);
            if !known.contains_key(&key) {
                let known: Vec<&str> = known.keys().map(String::as_str).collect();
                return Some(format!(
                    "{parent}: unknown field `{}`, expected one of {}",
                    short(&key),
                    known.join(", ")
                ));
            }
        }
    }
    None
}

/// Those objects, with the keys that their types have.
fn below() -> [(&'static str, serde_json::Map<String, serde_json::Value>); 4] {
    fn keys(object: impl Serialize) -> serde_json::Map<String, serde_json::Value> {
        match serde_json::to_value(object) {
            Ok(serde_json::Value::Object(members)) => members,
            _ => serde_json::Map::new(),
        }
    }
    [
        ("services", keys(Service::default())),
        ("hooks", keys(Hooks::default())),
        ("bootstrap", keys(Bootstrap::default())),
        ("watchdog", keys(Watchdog::default())),
    ]
}

fn check(manifest: Manifest) -> Result<Checked, ManifestError> {
    let invalid = |key, reason: String| ManifestError::Invalid { key, reason };
    if manifest.name.is_empty() {
        return Err(ManifestError::Required("name"));
    }
    if !is_name(&manifest.name) {
        return Err(invalid(
            "name",
            format!(
                "{:?}: 3 to 255 characters of A-Z a-z 0-9 - _ . are allowed, beginning with a letter or digit",
                short(&manifest.name)
            ),
        ));
    }
    for (key, given) in [
        ("boot-package", manifest.boot_package.is_some()),
        ("boot-activity", manifest.boot_activity.is_some()),
        ("extra-data", !manifest.extra_data.is_empty()),
        ("required-permissions", manifest.required_permissions.iter().any(|permission| permission != "*")),
        ("watchdog", manifest.watchdog.as_ref().is_some_and(|watchdog| !watchdog.disabled)),
    ] {
        if given {
            return Err(ManifestError::Unsupported { key });
        }
    }
    let image = manifest.image.unwrap_or_default();
    if !image.is_empty() && !is_object_name(&image) {
        return Err(invalid("image", format!("{:?} is no name of an image", short(&image))));
    }
    let services = check_services(manifest.services).map_err(|reason| invalid("services", reason))?;
    if let Some(addon) = manifest.addons.iter().find(|addon| !is_name(addon)) {
        return Err(invalid("addons", format!("{:?} is no name of an addon", short(addon))));
    }
    let hook_time_s = match &manifest.hooks {
        None => None,
        Some(hooks) => Some(hook_time(Some(hooks))?),
    };
    let keep = manifest.bootstrap.map(|bootstrap| bootstrap.keep).unwrap_or_default();
    if let Some(pattern) = keep.iter().find(|pattern| pattern.starts_with('/') || pattern.contains("..")) {
        return Err(invalid("bootstrap.keep", format!("{:?} leaves the package", short(pattern))));
    }
    let version = manifest.version.as_ref().map(YamlText::to_string).unwrap_or_default();
    if version.chars().count() > 50 {
        return Err(invalid("version", "at most 50 characters are allowed".into()));
    }
    let command = match manifest.command {
        Command::List(list) => list,
        Command::Text(text) => split(&text).map_err(|reason| invalid("command", reason.into()))?,
    };
    if command.first().is_none_or(String::is_empty) {
        return Err(ManifestError::Required("command"));
    }
    if command.iter().any(|word| word.contains('\0')) {
        return Err(invalid("command", "holds a NUL".into()));
    }
    let mut environment = BTreeMap::new();
    for (name, value) in manifest.environment {
        let value = value.to_string();
        let is_variable = !name.is_empty()
            && !name.starts_with(|c: char| c.is_ascii_digit())
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        if !is_variable || value.contains('\0') {
            return Err(invalid("environment", format!("{:?} is no variable", short(&name))));
        }
        environment.insert(name, value);
    }
    if let Some(folder) = &manifest.working_directory
        && (!folder.starts_with('/') || folder.contains('\0'))
    {
        return Err(invalid("working-directory", format!("{:?} is not absolute", short(folder))));
    }
    if let Some(icon) = &manifest.icon {
        let inside = Path::new(icon).components().all(|part| matches!(part, std::path::Component::Normal(_)));
        if !inside || icon_type(icon).is_none() {
            return Err(invalid(
                "icon",
                format!("{:?}: a .png, .svg, .jpg or .webp file of the package is needed", short(icon)),
            ));
        }
    }
    for tag in manifest.tags.iter().chain(&manifest.node_selector) {
        if !is_tag(tag) {
            return Err(invalid("tags", format!("{:?}: at most 255 characters, no commas", short(tag))));
        }
    }
    let video_encoder = manifest.video_encoder.unwrap_or_else(|| "gpu-preferred".into());
    if !["gpu", "gpu-preferred", "software"].contains(&video_encoder.as_str()) {
        return Err(invalid(
            "video-encoder",
            format!("{:?}: gpu, gpu-preferred or software is allowed", short(&video_encoder)),
        ));
    }
    let instance_type = manifest.instance_type.unwrap_or_default();
    let mut resources = match instance_type.as_str() {
        "" => Wanted::default(),
        preset => preset_resources(preset)
            .ok_or_else(|| invalid("instance-type", format!("{:?} not found", short(preset))))?,
    };
    if let Some(given) = manifest.resources {
        overlay(&mut resources, &given)?;
    }
    check_pool(&manifest.pool).map_err(|reason| invalid("pool.size", reason))?;
    let title = manifest.title.unwrap_or_else(|| manifest.name.clone());
    Ok(Checked {
        name: manifest.name,
        version,
        title: limited("title", title, 100)?,
        description: limited("description", manifest.description.unwrap_or_default(), 1000)?,
        icon: manifest.icon,
        command,
        environment,
        working_directory: manifest.working_directory,
        restart: manifest.restart,
        tags: manifest.tags,
        node_selector: manifest.node_selector,
        features: manifest.features,
        video_encoder,
        instance_type,
        resources,
        image,
        services,
        hook_time_s,
        addons: manifest.addons,
        keep,
        pool: manifest.pool,
    })
}

/// How long a hook may take, seconds.
///
/// # Errors
/// It is no duration, or too long.
pub fn hook_time(hooks: Option<&Hooks>) -> Result<u64, ManifestError> {
    let invalid = |reason: String| ManifestError::Invalid { key: "hooks.timeout", reason };
    let time = match hooks.map(|hooks| hooks.timeout.as_str()).unwrap_or_default() {
        "" => HOOK_TIME,
        text => match humantime::parse_duration(text) {
            Ok(time) if !time.is_zero() && time <= MOST_HOOK_TIME => time,
            Ok(_) => return Err(invalid(format!("{text}: at most 15m is allowed"))),
            Err(error) => return Err(invalid(format!("{:?}: {error}", short(text)))),
        },
    };
    Ok(time.as_secs().max(1))
}

impl Checked {
    /// How long a hook may take.
    pub fn hook_time(&self) -> Duration {
        self.hook_time_s.map_or(HOOK_TIME, Duration::from_secs)
    }

    /// The first thing asked for that programs of the host cannot have.
    pub fn needs_image(&self) -> Option<&'static str> {
        [
            ("services", !self.services.is_empty()),
            ("hooks", self.hook_time_s.is_some()),
            ("addons", !self.addons.is_empty()),
            ("bootstrap", !self.keep.is_empty()),
            ("image", !self.image.is_empty() && self.image != HOST_IMAGE),
        ]
        .into_iter()
        .find_map(|(key, given)| given.then_some(key))
    }
}

/// Checks how many instances are to wait.
///
/// # Errors
/// They are too many.
pub fn check_pool(pool: &Pool) -> Result<(), String> {
    if pool.size > Pool::MOST {
        return Err(format!("{}: 0 to {} are allowed", pool.size, Pool::MOST));
    }
    Ok(())
}

/// Checks ports that are to be reached through the node (ams-model section 3.7).
///
/// # Errors
/// What is wrong with which.
pub fn check_services(mut services: Vec<Service>) -> Result<Vec<Service>, String> {
    if services.len() > MOST_SERVICES {
        return Err(format!("{}: at most {MOST_SERVICES} are allowed", services.len()));
    }
    for service in &mut services {
        if service.port == 0 {
            return Err(format!("{:?}: a port from 1 to 65535 is needed", short(&service.name)));
        }
        if service.port_end != 0 && service.port_end < service.port {
            return Err(format!("{} to {}: the last port comes first", service.port, service.port_end));
        }
        if service.port_end.saturating_sub(service.port) >= MOST_PORTS && service.port_end != 0 {
            return Err(format!("{} to {}: at most {MOST_PORTS} ports", service.port, service.port_end));
        }
        if service.protocols.is_empty() {
            service.protocols.push("tcp".into());
        }
        if let Some(other) = service.protocols.iter().find(|name| !["tcp", "udp"].contains(&name.as_str())) {
            return Err(format!("protocol {:?}: tcp or udp is allowed", short(other)));
        }
        service.node_port = 0;
        service.node_port_end = 0;
    }
    Ok(services)
}

fn limited(key: &'static str, text: String, most: usize) -> Result<String, ManifestError> {
    if text.chars().count() > most {
        return Err(ManifestError::Invalid { key, reason: format!("at most {most} characters are allowed") });
    }
    Ok(text)
}

fn overlay(resources: &mut Wanted, given: &ManifestResources) -> Result<(), ManifestError> {
    let invalid = |key, reason: String| ManifestError::Invalid { key, reason };
    if let Some(cpus) = given.cpus {
        if cpus == 0 {
            return Err(invalid("resources.cpus", "0: at least 1 is needed".into()));
        }
        resources.cpus = Some(cpus);
    }
    if let Some(memory) = &given.memory {
        let bytes = size::parse(&memory.to_string())
            .map_err(|error| invalid("resources.memory", error.to_string()))?;
        if bytes < LEAST_MEMORY {
            return Err(invalid("resources.memory", format!("{memory}: at least 16MB is needed")));
        }
        resources.memory_bytes = Some(bytes);
    }
    if let Some(disk) = &given.disk_size {
        let bytes = size::parse(&disk.to_string())
            .map_err(|error| invalid("resources.disk-size", error.to_string()))?;
        resources.disk_bytes = Some(bytes);
    }
    if let Some(slots) = given.gpu_slots {
        // -1 is how the original writes "not said".
        resources.gpu_slots = u32::try_from(slots).ok();
    }
    if let Some(kind) = given.gpu_type.as_ref().filter(|kind| !kind.is_empty()) {
        if !["amd", "intel", "nvidia"].contains(&kind.as_str()) {
            return Err(invalid(
                "resources.gpu-type",
                format!("{:?}: amd, intel or nvidia is allowed", short(kind)),
            ));
        }
        resources.gpu_type = Some(kind.clone());
    }
    resources.no_disk_reserve = given.no_disk_reserve;
    if given.vpu_slots.is_some_and(|slots| slots > 0) {
        return Err(ManifestError::Unsupported { key: "resources.vpu-slots" });
    }
    Ok(())
}

/// `a4.3` = 4 CPUs, 3 GB of memory, 3 GB of disk; `g4.3` = the same and one GPU slot.
fn preset_resources(name: &str) -> Option<Wanted> {
    let (gpu, rest) = match name.split_at_checked(1)? {
        ("a", rest) => (0, rest),
        ("g", rest) => (1, rest),
        _ => return None,
    };
    let cpus = match rest {
        "2.3" => 2,
        "4.3" => 4,
        "6.3" => 6,
        "8.3" => 8,
        "10.3" => 10,
        _ => return None,
    };
    Some(Wanted {
        cpus: Some(cpus),
        memory_bytes: Some(3 << 30),
        disk_bytes: Some(3 << 30),
        gpu_slots: Some(gpu),
        ..Wanted::default()
    })
}

/// Media type of an icon by the name of its file.
pub fn icon_type(name: &str) -> Option<&'static str> {
    let (_, extension) = name.rsplit_once('.')?;
    Some(match extension.to_ascii_lowercase().as_str() {
        "png" => "image/png",
        "svg" => "image/svg+xml",
        "jpg" | "jpeg" => "image/jpeg",
        "webp" => "image/webp",
        _ => return None,
    })
}

/// Whether a text can be the name of an application (ams-model section 1, the stricter form).
pub fn is_name(name: &str) -> bool {
    (3..=255).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
}

/// Whether a text can name an object, an image for example (ams-model section 1).
pub fn is_object_name(name: &str) -> bool {
    (3..=255).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b':'))
}

/// Whether a text can be a tag: 1 to 255 characters, no commas, no control characters.
pub fn is_tag(tag: &str) -> bool {
    !tag.is_empty() && tag.chars().count() <= 255 && !tag.contains(|c: char| c == ',' || c.is_control())
}

fn short(text: &str) -> String {
    text.chars().take(64).collect()
}

/// Splits a command line as a shell does: blanks separate, `'…'`, `"…"` and `\` keep together. Nothing is
/// expanded.
fn split(text: &str) -> Result<Vec<String>, &'static str> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            c if c.is_whitespace() => words.extend(word.take()),
            '\'' => {
                let word = word.get_or_insert_default();
                loop {
                    match chars.next() {
                        Some('\'') => break,
                        Some(c) => word.push(c),
                        None => return Err("a ' is not closed"),
                    }
                }
            }
            '"' => {
                let word = word.get_or_insert_default();
                loop {
                    match chars.next() {
                        Some('"') => break,
                        Some('\\') => match chars.next() {
                            Some(c @ ('"' | '\\' | '$' | '`')) => word.push(c),
                            Some(c) => word.extend(['\\', c]),
                            None => return Err("a \" is not closed"),
                        },
                        Some(c) => word.push(c),
                        None => return Err("a \" is not closed"),
                    }
                }
            }
            '\\' => word.get_or_insert_default().push(chars.next().ok_or("a \\ stands at the end")?),
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_manifest_gets_its_defaults() {
        let checked = parse("name: terminal\ncommand: foot --font 'DejaVu Sans:size=11'\nversion: 1.0\n")
            .expect("valid");
        assert_eq!(checked.command, ["foot", "--font", "DejaVu Sans:size=11"]);
        assert_eq!((checked.title.as_str(), checked.version.as_str()), ("terminal", "1.0"));
        assert_eq!(checked.video_encoder, "gpu-preferred");
        assert_eq!(checked.restart, Restart::Never);
        assert_eq!(checked.resources, Wanted::default());
    }

    #[test]
    fn resources_overlay_the_preset_value_by_value() {
        let text = "name: abc\ncommand: [x]\ninstance-type: g4.3\nresources: {memory: 512MB, gpu-slots: 0}\n";
        let wanted = parse(text).expect("valid").resources;
        assert_eq!((wanted.cpus, wanted.memory_bytes, wanted.gpu_slots), (Some(4), Some(512 << 20), Some(0)));
    }

    #[test]
    fn a_disk_that_is_not_to_be_counted_is_said_in_the_resources() {
        for (text, is_free) in
            [("{no_disk_reserve: true}", true), ("{no_disk_reserve: false}", false), ("{}", false)]
        {
            let wanted = parse(&format!("name: abc\ncommand: x\nresources: {text}")).expect(text).resources;
            assert_eq!(wanted.no_disk_reserve, is_free, "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn a_key_that_an_object_of_the_manifest_does_not_have_is_refused_by_name(
            parent in proptest::sample::select(&["services", "hooks", "bootstrap", "watchdog", "resources", "pool"]),
            key in "[a-z][a-z_-]{0,30}",
        ) {
            let known = keys();
            let dotted = [format!("{parent}.{key}"), format!("{parent}[].{key}")];
            proptest::prop_assume!(!dotted.iter().any(|name| known.contains(name)));
            // The other spelling of one that is known.
            proptest::prop_assume!(key != "disk_size");
            let object = match parent {
                "services" => format!("[{{name: web, port: 80, '{key}': 1}}]"),
                _ => format!("{{'{key}': 1}}"),
            };
            let error = parse(&format!("name: abc\ncommand: x\n{parent}: {object}")).expect_err(&object);
            proptest::prop_assert!(matches!(error, ManifestError::Malformed(_)), "{error}");
            proptest::prop_assert!(error.to_string().contains(&format!("unknown field `{key}`")), "{error}");
        }
    }

    #[test]
    fn a_pool_is_empty_unless_it_is_asked_for_and_its_instances_wait_without_their_application() {
        use fanlight_api::guest::PoolStart;
        for (text, size, start) in [
            ("name: abc\ncommand: x", 0, PoolStart::Streamer),
            ("name: abc\ncommand: x\npool: {size: 2}", 2, PoolStart::Streamer),
            ("name: abc\ncommand: x\npool: {size: 100, start: application}", 100, PoolStart::Application),
        ] {
            assert_eq!(parse(text).expect(text).pool, Pool { size, start }, "{text}");
        }
    }

    #[test]
    fn what_programs_of_the_host_cannot_have_is_named() {
        for (text, needs) in [
            ("name: abc\ncommand: x", None),
            ("name: abc\ncommand: x\nimage: host", None),
            ("name: abc\ncommand: x\nimage: jammy", Some("image")),
            ("name: abc\ncommand: x\nservices: [{name: web, port: 80}]", Some("services")),
            ("name: abc\ncommand: x\nhooks: {timeout: 1m}", Some("hooks")),
            ("name: abc\ncommand: x\nbootstrap: {keep: [bin]}", Some("bootstrap")),
        ] {
            assert_eq!(parse(text).expect(text).needs_image(), needs, "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, needle) in [
            ("", "name"),
            ("name: abc", "command"),
            ("name: abc\ncommand: []", "command"),
            ("name: abc\ncommand: ''", "command"),
            ("name: abc\ncommand: \"foot 'x\"", "command"),
            ("name: a b\ncommand: x", "name"),
            ("name: ../x\ncommand: x", "name"),
            ("name: abc\ncommand: x\ncolour: red", "colour"),
            ("name: abc\ncommand: x\nboot-package: a.b", "boot-package not supported by image host"),
            ("name: abc\ncommand: x\nimage: 'a b'", "image"),
            ("name: abc\ncommand: x\npool: {size: 101}", "pool.size"),
            ("name: abc\ncommand: x\npool: {size: -1}", "pool.size"),
            ("name: abc\ncommand: x\npool: {start: later}", "pool.start"),
            ("name: abc\ncommand: x\npool: {colour: 1}", "colour"),
            (
                "name: abc\ncommand: x\nwatchdog: {disabled: true, colour: 1}",
                "watchdog: unknown field `colour`",
            ),
            (
                "name: abc\ncommand: x\nhooks: {timout: 1m}",
                "hooks: unknown field `timout`, expected one of timeout",
            ),
            ("name: abc\ncommand: x\nbootstrap: {kept: []}", "bootstrap: unknown field `kept`"),
            (
                "name: abc\ncommand: x\nservices: [{name: web, port: 9}, {port: 8, 7: x}]",
                "services: unknown field",
            ),
            ("name: abc\ncommand: x\nservices: [{name: web, port: 0}]", "services"),
            ("name: abc\ncommand: x\nservices: [{name: web, port: 9, port_end: 8}]", "services"),
            ("name: abc\ncommand: x\nservices: [{name: web, port: 9, protocols: [sctp]}]", "sctp"),
            ("name: abc\ncommand: x\nhooks: {timeout: 16m}", "hooks.timeout"),
            ("name: abc\ncommand: x\nbootstrap: {keep: [../x]}", "bootstrap.keep"),
            ("name: abc\ncommand: x\nicon: ../i.png", "icon"),
            ("name: abc\ncommand: x\nicon: i.exe", "icon"),
            ("name: abc\ncommand: x\nworking-directory: here", "working-directory"),
            ("name: abc\ncommand: x\nenvironment: {A=B: c}", "environment"),
            ("name: abc\ncommand: x\nresources: {cpus: 0}", "resources.cpus"),
            ("name: abc\ncommand: x\nresources: {memory: 3}", "resources.memory"),
            ("name: abc\ncommand: x\nresources: {speed: 3}", "speed"),
            ("name: abc\ncommand: x\ninstance-type: z9", "instance-type"),
            ("name: abc\ncommand: x\nvideo-encoder: fast", "video-encoder"),
            ("name: abc\ncommand: x\ntags: ['a,b']", "tags"),
            ("[1, 2", "malformed"),
            ("name: abc\nname: def\ncommand: x", "name"),
        ] {
            let error = parse(text).expect_err(text).to_string();
            assert!(error.contains(needle), "{text:?}: {error}");
        }
    }

    #[test]
    fn command_lines_are_split_like_a_shell_does_without_expansion() {
        for (text, words) in [
            ("a b  c", vec!["a", "b", "c"]),
            (r#"a "b c" 'd "e' f\ g"#, vec!["a", "b c", "d \"e", "f g"]),
            (r#"sh -c "echo \"$HOME\" \n""#, vec!["sh", "-c", "echo \"$HOME\" \\n"]),
            ("a '' b", vec!["a", "", "b"]),
            ("a'b'c", vec!["abc"]),
            ("$HOME/x *", vec!["$HOME/x", "*"]),
        ] {
            assert_eq!(split(text), Ok(words.into_iter().map(String::from).collect()), "{text}");
        }
        for bad in ["'a", "\"a", "a\\", "\"a\\"] {
            assert!(split(bad).is_err(), "{bad}");
        }
    }

    /// The reference of the manifest, as people read it.
    fn page() -> String {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/reference/application-manifest.md");
        std::fs::read_to_string(path).expect("the page is there")
    }

    /// Keys in code marks in the first cells of the rows of its tables.
    fn first_cells(page: &str) -> Vec<String> {
        let rows = page.lines().filter_map(|line| line.strip_prefix("| `")?.split(" | ").next());
        rows.flat_map(|cell| cell.split('`').step_by(2).map(str::to_owned).collect::<Vec<_>>()).collect()
    }

    /// All keys of the manifest, those of nested objects with dots.
    fn keys() -> Vec<String> {
        let names = |value: serde_json::Value| -> Vec<String> {
            value.as_object().expect("an object").keys().cloned().collect()
        };
        let json = |value| serde_json::to_value(value).expect("it is written as an object");
        let mut keys = names(json(Manifest::default()));
        for (parent, object) in [
            ("resources", serde_json::to_value(ManifestResources::default())),
            ("services[]", serde_json::to_value(Service::default())),
            ("hooks", serde_json::to_value(fanlight_api::ams::Hooks::default())),
            ("bootstrap", serde_json::to_value(fanlight_api::ams::Bootstrap::default())),
            ("watchdog", serde_json::to_value(fanlight_api::ams::Watchdog::default())),
            ("pool", serde_json::to_value(fanlight_api::ams::Pool::default())),
        ] {
            let object = object.expect("it is written as an object");
            // A list stands for itself as well: its bound is its own.
            keys.retain(|key| key != parent);
            keys.extend(names(object).into_iter().map(|key| format!("{parent}.{key}")));
        }
        keys
    }

    #[test]
    fn the_page_about_the_manifest_names_every_key_and_no_other() {
        let page = page();
        let named = first_cells(&page);
        let keys = keys();
        for key in &keys {
            assert!(named.contains(key), "{key} is not in docs/reference/application-manifest.md");
        }
        let before = page.split("## What is refused").next().expect("the tables of keys come first");
        for key in first_cells(before) {
            let is_preset = preset_resources(&key).is_some();
            assert!(is_preset || keys.contains(&key), "{key} is in the page, and is no key of the manifest");
        }
    }

    #[test]
    fn the_examples_of_the_page_about_the_manifest_are_accepted() {
        let page = page();
        let examples: Vec<&str> = page
            .split("```yaml\n")
            .skip(1)
            .map(|rest| rest.split("```").next().expect("a block ends"))
            .collect();
        assert!(examples.len() >= 5, "the page has examples");
        let needs_image = examples.iter().filter(|text| {
            let checked = parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
            checked.needs_image().is_some()
        });
        assert_eq!(needs_image.count(), 1, "one of them is for images, the others are for every engine");
    }

    #[test]
    fn the_page_about_the_manifest_has_the_texts_of_refusals() {
        let page = page();
        let table = page.split("## What is refused").nth(1).expect("the part about refusals");
        let rows: Vec<(&str, &str)> = table
            .lines()
            .filter_map(|line| line.strip_prefix("| `")?.strip_suffix("` |")?.split_once("` | `"))
            .collect();
        assert!(rows.len() >= 20, "the table of refusals is there");
        for (given, told) in rows {
            let mut manifest: serde_yaml_ng::Mapping = serde_yaml_ng::from_str(given).expect(given);
            for required in ["name", "command"] {
                manifest.entry(required.into()).or_insert_with(|| "demo".into());
            }
            let error = parse(&serde_yaml_ng::to_string(&manifest).expect("written")).expect_err(given);
            let error = error.to_string();
            match told.strip_suffix('…') {
                Some(begin) => assert!(error.starts_with(begin), "{given}: {error}"),
                None => assert_eq!(error, told, "{given}"),
            }
        }
    }

    #[test]
    fn the_presets_of_the_page_about_the_manifest_are_those_there_are() {
        for name in first_cells(&page()).iter().filter(|cell| cell.ends_with(".3")) {
            let wanted = preset_resources(name).unwrap_or_else(|| panic!("{name} is no preset"));
            assert_eq!((wanted.memory_bytes, wanted.disk_bytes), (Some(3 << 30), Some(3 << 30)), "{name}");
            assert_eq!(wanted.gpu_slots, Some(u32::from(name.starts_with('g'))), "{name}");
            assert_eq!(name[1..].strip_suffix(".3"), wanted.cpus.map(|cpus| cpus.to_string()).as_deref());
        }
    }
}
