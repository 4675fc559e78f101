//! Items of the configuration that may be changed while gateways run (`GET` and `PATCH /1.0/config`). Pure: texts
//! come in, checked values go out. Where they are kept is the shell's affair; an item that was never set, or was
//! set to the empty text, has the value of the configuration file.

use std::collections::BTreeMap;

use crate::config::{self, Config};

/// Name, and what it is for.
const ITEMS: [(&str, Kind); 7] = [
    ("accounts.token_days", Kind::Number { low: 0, high: 36_500 }),
    ("cors.origins", Kind::Origins),
    ("limits.requests_per_second", Kind::Number { low: 0, high: 1_000_000 }),
    ("sessions.idle_time_min", Kind::Number { low: 0, high: 525_600 }),
    ("shares.default_minutes", Kind::Number { low: 1, high: 525_600 }),
    ("shares.max_days", Kind::Number { low: 1, high: 365 }),
    ("shares.per_session", Kind::Number { low: 1, high: 100 }),
];

#[derive(Clone, Copy)]
enum Kind {
    Number { low: u32, high: u32 },
    Origins,
}

/// Why a change was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SettingError {
    /// There is no such item.
    #[error("there is no config item {name:?}; known are {}", known.join(", "))]
    Unknown {
        /// As asked for.
        name: String,
        /// All names.
        known: Vec<&'static str>,
    },
    /// Not one of its values.
    #[error("config item {name} cannot be {value:?}: {allowed}")]
    Value {
        /// Which.
        name: &'static str,
        /// As given.
        value: String,
        /// In words.
        allowed: String,
    },
}

/// The values in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Lifetime of API tokens for which none is given, days; 0 = they do not expire.
    pub token_days: u32,
    /// Origins whose pages may call the API.
    pub cors_origins: Vec<String>,
    /// Requests per second over all callers of this unit; 0 = unlimited.
    pub requests_per_second: u32,
    /// Minutes without a client, of sessions that do not say.
    pub idle_time_min: u32,
    /// Life of shares that do not say, minutes.
    pub share_minutes: u32,
    /// Longest life of a share, days.
    pub share_max_days: u32,
    /// Most shares of a session.
    pub shares_per_session: u32,
}

impl Settings {
    /// The values that the configuration and the items that were set give together. An item that cannot be read, as a
    /// newer version may have written, is left at its default.
    pub fn new(config: &Config, set: &BTreeMap<String, String>) -> Self {
        let number = |name: &str, default: u32| {
            set.get(name)
                .filter(|text| !text.is_empty())
                .and_then(|text| text.parse().ok())
                .unwrap_or(default)
        };
        Self {
            token_days: number("accounts.token_days", 0),
            cors_origins: match set.get("cors.origins").filter(|text| !text.is_empty()) {
                Some(text) => origins(text).map(String::from).collect(),
                None => config.cors.origins.clone(),
            },
            requests_per_second: number("limits.requests_per_second", config.limits.requests_per_second),
            idle_time_min: number("sessions.idle_time_min", 30),
            share_minutes: number("shares.default_minutes", 12 * 60),
            share_max_days: number("shares.max_days", 30),
            shares_per_session: number("shares.per_session", 5),
        }
    }

    /// Every item with its value.
    pub fn show(&self) -> BTreeMap<String, String> {
        let value = |name: &str| match name {
            "accounts.token_days" => self.token_days.to_string(),
            "cors.origins" => self.cors_origins.join(","),
            "limits.requests_per_second" => self.requests_per_second.to_string(),
            "sessions.idle_time_min" => self.idle_time_min.to_string(),
            "shares.default_minutes" => self.share_minutes.to_string(),
            "shares.max_days" => self.share_max_days.to_string(),
            _ => self.shares_per_session.to_string(),
        };
        ITEMS.iter().map(|(name, _)| ((*name).to_owned(), value(name))).collect()
    }
}

fn origins(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|origin| !origin.is_empty())
}

/// Checks a change before it is written; the empty text stands for the default.
///
/// # Errors
/// The item is unknown or the value is not one of its.
pub fn check(name: &str, value: &str) -> Result<(), SettingError> {
    let Some((name, kind)) = ITEMS.iter().find(|(known, _)| *known == name) else {
        let known = ITEMS.iter().map(|(name, _)| *name).collect();
        return Err(SettingError::Unknown { name: name.chars().take(64).collect(), known });
    };
    let refused =
        |allowed: String| Err(SettingError::Value { name, value: value.chars().take(64).collect(), allowed });
    match kind {
        _ if value.is_empty() => Ok(()),
        Kind::Number { low, high } => match value.parse::<u32>() {
            Ok(number) if (*low..=*high).contains(&number) => Ok(()),
            _ => refused(format!("a number from {low} to {high} is needed")),
        },
        Kind::Origins if value.len() > 4096 => refused("at most 4096 characters are allowed".into()),
        Kind::Origins => match origins(value).find(|origin| !config::is_origin(origin)) {
            Some(origin) => refused(format!(
                "{origin:?} is neither * nor of the form https://host; commas separate origins"
            )),
            None => Ok(()),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_that_are_not_set_have_the_value_of_the_file() {
        let mut config = Config::default();
        config.cors.origins = vec!["https://a".into()];
        config.limits.requests_per_second = 7;
        let settings = Settings::new(&config, &BTreeMap::new());
        assert_eq!(settings.cors_origins, ["https://a"]);
        assert_eq!((settings.requests_per_second, settings.idle_time_min), (7, 30));
        let set = BTreeMap::from([
            ("cors.origins".to_owned(), "https://b, *".to_owned()),
            ("limits.requests_per_second".to_owned(), String::new()),
            ("sessions.idle_time_min".to_owned(), "5".to_owned()),
            ("shares.max_days".to_owned(), "many".to_owned()),
        ]);
        let settings = Settings::new(&config, &set);
        assert_eq!(settings.cors_origins, ["https://b", "*"]);
        assert_eq!((settings.requests_per_second, settings.idle_time_min), (7, 5));
        assert_eq!(settings.share_max_days, 30);
        let shown = settings.show();
        assert_eq!(shown.len(), ITEMS.len());
        assert_eq!(shown["cors.origins"], "https://b,*");
        // What is shown can be written back.
        assert!(shown.iter().all(|(name, value)| check(name, value).is_ok()));
        assert_eq!(Settings::new(&Config::default(), &shown), settings);
    }

    #[test]
    fn wrong_changes_are_refused_by_name() {
        for (name, value, expected) in [
            ("colour", "red", "there is no config item \"colour\"; known are accounts.token_days"),
            ("sessions.idle_time_min", "-1", "a number from 0 to 525600"),
            ("shares.per_session", "0", "a number from 1 to 100"),
            ("shares.max_days", "x", "shares.max_days cannot be \"x\""),
            ("cors.origins", "https://ok,ftp://no", "\"ftp://no\""),
        ] {
            let text = check(name, value).expect_err(name).to_string();
            assert!(text.contains(expected), "{text}");
        }
        assert!(check("cors.origins", "").is_ok(), "the default again");
    }
}
