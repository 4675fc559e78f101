//! The manifest of an application: read strictly, checked as a whole, turned into what AMS keeps.
//!
//! Keys of the original that only mean something to Android are refused where they would promise an effect
//! that a program of the host does not have; the rest is kept as it is (ams-model section 2.2).

use std::{collections::BTreeMap, path::Path};

use fanlight_api::{
    ams::{Command, Manifest, ManifestResources, YamlText},
    guest::Restart,
};
use serde::{Deserialize, Serialize};

use crate::size;

/// The image that the process engine stands for: the host's own files, read-only.
pub const HOST_IMAGE: &str = "host";

/// Smallest memory an instance can ask for, bytes.
const LEAST_MEMORY: u64 = 16 << 20;
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
}

/// Reads and checks the text of a `manifest.yaml`.
///
/// # Errors
/// Names the first key that is wrong.
pub fn parse(text: &str) -> Result<Checked, ManifestError> {
    let manifest: Manifest =
        serde_yaml_ng::from_str(text).map_err(|error| ManifestError::Malformed(error.to_string()))?;
    check(manifest)
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
        ("addons", !manifest.addons.is_empty()),
        ("extra-data", !manifest.extra_data.is_empty()),
        ("services", !manifest.services.is_empty()),
        ("hooks", manifest.hooks.is_some()),
        ("bootstrap", manifest.bootstrap.is_some()),
        ("required-permissions", manifest.required_permissions.iter().any(|permission| permission != "*")),
        ("watchdog", manifest.watchdog.as_ref().is_some_and(|watchdog| !watchdog.disabled)),
    ] {
        if given {
            return Err(ManifestError::Unsupported { key });
        }
    }
    if let Some(image) = manifest.image.as_deref().filter(|image| !image.is_empty() && *image != HOST_IMAGE) {
        return Err(invalid(
            "image",
            format!("{:?} not found: {HOST_IMAGE} is the only image here", short(image)),
        ));
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
    })
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
        gpu_type: None,
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
            ("name: abc\ncommand: x\nimage: jammy", "image"),
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
}
