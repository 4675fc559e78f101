//! Settings of the store, a section of the configuration of gateway and AMS.

use std::{path::PathBuf, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::{Embedded, Handle, StoreError};

/// Where the store is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StoreConfig {
    /// `file:PATH`: a file of this program alone, made when it is not there. `memory:`: nothing lasts, for
    /// tests.
    pub url: String,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self { url: "memory:".into() }
    }
}

impl StoreConfig {
    /// A store in a file.
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self { url: format!("file:{}", path.into().display()) }
    }

    /// Everything that is wrong with the settings, in words; the file is not looked at.
    pub fn problems(&self) -> Vec<String> {
        match self.kind() {
            Ok(_) => Vec::new(),
            Err(error) => vec![error.to_string()],
        }
    }

    /// `None`: in memory.
    fn kind(&self) -> Result<Option<PathBuf>, StoreError> {
        match self.url.strip_prefix("file:") {
            Some(path) if !path.is_empty() => Ok(Some(path.into())),
            _ if self.url == "memory:" => Ok(None),
            _ => Err(StoreError::Url { url: self.url.clone() }),
        }
    }
}

/// Opens the store of a configuration.
///
/// # Errors
/// The settings are wrong, or the file is in use, damaged, or from a newer version.
pub async fn open(config: &StoreConfig) -> Result<Handle, StoreError> {
    Ok(match config.kind()? {
        Some(path) => Arc::new(Embedded::file(path).await?),
        None => Arc::new(Embedded::memory()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_unknown_kinds_are_refused_by_name() {
        assert!(StoreConfig::default().problems().is_empty());
        assert!(StoreConfig::file("/var/lib/x.redb").problems().is_empty());
        for bad in ["", "file:", "/var/lib/x", "etcd:", "memory"] {
            let problems = StoreConfig { url: bad.into() }.problems();
            assert!(problems[0].contains(&format!("{bad:?}")), "{problems:?}");
        }
    }
}
