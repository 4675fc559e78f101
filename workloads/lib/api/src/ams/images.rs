//! Bodies about images (ams-api section 11, ams-model section 4).

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::nullable;

/// A root file system that holds the streamer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Image {
    /// Xid; `host` for the programs of the machine itself.
    pub id: String,
    /// Unique name.
    pub name: String,
    /// Oldest first.
    #[serde(deserialize_with = "nullable")]
    pub versions: Vec<ImageVersion>,
    /// Of the newest version; see [`super::ImageStatus`].
    pub status_code: i32,
    /// Text of `status_code`.
    pub status: String,
    /// Ids of applications that stand on it.
    #[serde(deserialize_with = "nullable")]
    pub used_by: Vec<String>,
    /// Taken where no image is named.
    pub default: bool,
    /// Comes from a server, or belongs to the machine.
    pub immutable: bool,
    /// `x86_64` or `aarch64`.
    pub architecture: String,
    /// `container`.
    #[serde(rename = "type")]
    pub kind: String,
    /// `generic`.
    pub variant: String,
    /// What it can do beyond running programs.
    #[serde(deserialize_with = "nullable")]
    pub capabilities: Vec<String>,
}

/// One version of an image.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageVersion {
    /// From 0, only grows.
    pub version: u32,
    /// SHA-256 of the file, hex.
    pub fingerprint: String,
    /// Bytes of the file.
    pub size: u64,
    /// Unix seconds.
    pub created_at: i64,
    /// See [`super::ImageStatus`].
    pub status_code: i32,
    /// Text of `status_code`.
    pub status: String,
    /// Name on the server it came from.
    pub remote_id: String,
    /// Why it cannot be used, else empty.
    pub error_message: String,
}

/// Body of `POST /1.0/images`, and, for uploads, of the header `X-AMS-Request`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct ImagesPost {
    /// Unique name.
    #[serde(deserialize_with = "nullable")]
    pub name: String,
    /// Name on the server to import from; `name@version` is one release.
    #[serde(deserialize_with = "nullable")]
    pub path: String,
    /// Becomes the default.
    #[serde(deserialize_with = "nullable")]
    pub default: bool,
    /// `container` or empty.
    #[serde(rename = "type", deserialize_with = "nullable")]
    pub kind: String,
    /// Made of an instance.
    pub source: Option<ImageSource>,
}

/// The instance that an image is made of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct ImageSource {
    /// `instance`.
    #[serde(rename = "type", deserialize_with = "nullable")]
    pub kind: String,
    /// Id or name.
    #[serde(deserialize_with = "nullable")]
    pub instance: String,
    /// Although it runs: it is stopped first.
    #[serde(deserialize_with = "nullable")]
    pub force: bool,
}

/// Body of `PATCH /1.0/images/{id}` as JSON.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct ImagePatch {
    /// `true`: becomes the default.
    pub default: Option<bool>,
    /// Looks for a newer release at once.
    #[serde(deserialize_with = "nullable")]
    pub force_sync: bool,
}
