//! Bodies about addons (ams-api section 11, ams-model section 5).

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Hooks, nullable};

/// Files and hooks that are added to applications.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Addon {
    /// Unique.
    pub name: String,
    /// Oldest first.
    #[serde(deserialize_with = "nullable")]
    pub versions: Vec<AddonVersion>,
    /// Ids of the applications that have a version with it.
    #[serde(deserialize_with = "nullable")]
    pub used_by: Vec<String>,
}

/// One version of an addon.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AddonVersion {
    /// From 0, only grows.
    pub version: u32,
    /// SHA-256 of the package, hex.
    pub fingerprint: String,
    /// Bytes of the package.
    pub size: u64,
    /// Unix seconds.
    pub created_at: i64,
}

/// A version of an addon that something stands on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct AddonUse {
    /// Which addon.
    pub name: String,
    /// Which of its versions.
    pub version: u32,
}

/// What comes with a new addon, in the header `X-AMS-Request` of the upload.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct AddonsPost {
    /// Unique name.
    #[serde(deserialize_with = "nullable")]
    pub name: String,
}

/// `manifest.yaml` of an addon.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AddonManifest {
    /// For people; the addon is known by the name it was added with.
    pub name: String,
    /// One sentence.
    pub description: String,
    /// What it brings.
    pub provides: Provides,
    /// About its hooks.
    pub hooks: Option<Hooks>,
}

/// What an addon brings.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct Provides {
    /// Processors whose programs it makes run.
    pub abi_support: Vec<String>,
}
