//! Settings of the streamer that hold for all instances of a node: from `streamer.toml`, then from `STREAMER_*` variables
//! (`STREAMER_DISPLAY__X11`). What belongs to one instance is in its guest file ([`crate::guest`]).

use std::path::{Path, PathBuf};

use fanlight_service::config::{ConfigErrors, Validate};
use serde::{Deserialize, Serialize};

use crate::compositor::is_layout_name;

/// Read when no other file is named, if it is there.
pub const FILE: &str = "/etc/fanlight/streamer.toml";
/// Longest time that an application may be given to end, seconds: whoever stops an instance waits for it.
const LONGEST_GRACE_S: u64 = 8;

/// Settings of the streamer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// What is logged beyond the usual, as a filter of `tracing` (`fanlight_streamer=debug`). `FANLIGHT_LOG` goes before it.
    pub log: String,
    /// The display that applications see.
    pub display: Display,
    /// How pictures are encoded.
    pub encoder: Encoder,
    /// The sound server.
    pub sound: Sound,
    /// The end of the application.
    pub stop: Stop,
}

/// The display that applications see; its size is the session's.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Display {
    /// When Xwayland runs: `on-demand` (from the first X11 application on), `at-start` or `never`.
    pub x11: X11,
    /// Keyboard layout until a client names its own: an XKB layout with an optional variant, `de` or `de(nodeadkeys)`.
    pub keyboard_layout: String,
}

/// When Xwayland runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum X11 {
    /// From the first X11 application on.
    #[default]
    OnDemand,
    /// With the display.
    AtStart,
    /// Not at all: X11 applications find no display.
    Never,
}

/// How pictures are encoded.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Encoder {
    /// `auto` (the best of this build), `x264` or `openh264`. An encoder that AMS chose for the node goes before it.
    pub kind: EncoderName,
}

/// An encoder by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum EncoderName {
    /// The best one of this build.
    #[default]
    Auto,
    /// libx264.
    X264,
    /// OpenH264.
    OpenH264,
}

/// The sound server.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sound {
    /// Whether there is one; without it instances are silent.
    pub enabled: bool,
}

/// The end of the application.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Stop {
    /// Seconds between asking the application to end and ending it, 0 to 8.
    pub grace_s: u64,
}

impl Default for Display {
    fn default() -> Self {
        Self { x11: X11::default(), keyboard_layout: "us".into() }
    }
}

impl Default for Sound {
    fn default() -> Self {
        Self { enabled: true }
    }
}

impl Default for Stop {
    fn default() -> Self {
        Self { grace_s: 5 }
    }
}

impl Validate for Config {
    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let layout = &self.display.keyboard_layout;
        if layout.is_empty() || !is_layout_name(layout) {
            problems.push(format!("display.keyboard_layout: {layout:?} is no name of an XKB layout"));
        }
        if self.stop.grace_s > LONGEST_GRACE_S {
            problems.push(format!("stop.grace_s: {} is more than {LONGEST_GRACE_S}", self.stop.grace_s));
        }
        problems
    }
}

/// Reads the settings; `file` must exist when it is named.
///
/// # Errors
/// Everything that is wrong, in one error.
pub fn load(file: Option<PathBuf>) -> Result<Config, ConfigErrors> {
    let usual = Path::new(FILE);
    let file = file.or_else(|| usual.exists().then(|| usual.to_owned()));
    fanlight_service::config::load(file.as_deref(), "STREAMER")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_and_variables_are_read_and_everything_wrong_is_told_at_once() {
        let variable = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let text = "log = 'smithay=debug'\n[display]\nx11 = 'never'\n[encoder]\nkind = 'openh264'\n";
        let variables =
            [variable("STREAMER_SOUND__ENABLED", "false"), variable("STREAMER_DISPLAY__X11", "at-start")];
        let config: Config = fanlight_service::config::parse(text, "STREAMER", variables).expect("settings");
        assert_eq!((config.display.x11, config.encoder.kind), (X11::AtStart, EncoderName::OpenH264));
        assert!(!config.sound.enabled);
        assert_eq!(config.display.keyboard_layout, "us");

        let text = "sounds = 1\n[display]\nx11 = 'maybe'\nkeyboard_layout = '../us'\n[stop]\ngrace_s = 100\n";
        let problems = fanlight_service::config::parse::<Config>(text, "STREAMER", []).expect_err("problems");
        for part in ["sounds", "display.x11", "keyboard_layout", "grace_s"] {
            assert!(problems.iter().any(|problem| problem.contains(part)), "{part}: {problems:?}");
        }
    }
}
