//! Images of instances, known by the SHA-256 of their files.

use std::{collections::BTreeMap, path::Path};

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::Method;
use serde::Deserialize;
use serde_json::json;
use tokio::fs::File;
use tokio_util::io::ReaderStream;

use crate::{
    Lxd, LxdError, Operation,
    call::{Call, part},
};

/// How much of a file is read at once.
const CHUNK_BYTES: usize = 256 * 1024;
/// Between the parts of a split image. The header of LXD's archives and file systems never begins with it, and
/// archives that hold this very line are not to be expected.
const BOUNDARY: &str = "fanlight-7c1a4dd29f0f4c3e8d1b2f5a6e90c7b3";

/// An image.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Image {
    /// SHA-256 of its files, hex.
    pub fingerprint: String,
    /// Bytes.
    pub size: u64,
    /// `x86_64`, `aarch64`.
    pub architecture: String,
    /// Free keys.
    pub properties: Option<BTreeMap<String, String>>,
}

impl Lxd {
    /// An image.
    ///
    /// # Errors
    /// There is none, or the call fails.
    pub async fn image(&self, fingerprint: &str) -> Result<Image, LxdError> {
        self.get(&format!("/1.0/images/{}", part(fingerprint))).await
    }

    /// Whether there is this image.
    ///
    /// # Errors
    /// The call fails.
    pub async fn has_image(&self, fingerprint: &str) -> Result<bool, LxdError> {
        match self.image(fingerprint).await {
            Ok(_) => Ok(true),
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Imports an image from one archive, or from an archive of its description and one of its files. The archives
    /// are read while they are sent. LXD refuses it when the SHA-256 (of both, one after the other) is another; the
    /// operation tells it as `fingerprint`.
    ///
    /// # Errors
    /// A file cannot be read, or the call fails.
    pub async fn import_image(
        &self,
        archive: &Path,
        root: Option<&Path>,
        fingerprint: Option<&str>,
    ) -> Result<Operation, LxdError> {
        let mut call = Call::new(Method::POST, "/1.0/images");
        if let Some(fingerprint) = fingerprint {
            call = call.header("x-lxd-fingerprint", fingerprint)?;
        }
        let archive = open(archive).await?;
        let Some(root) = root else {
            return self.begin(call.body(reqwest::Body::wrap_stream(archive))).await;
        };
        let root = open(root).await?;
        let text = |text: String| stream::iter([Ok::<_, std::io::Error>(Bytes::from(text))]);
        let head = |name: &str| {
            format!(
                "--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"{name}\"; filename=\"{name}\"\r\n\
                 Content-Type: application/octet-stream\r\n\r\n"
            )
        };
        let body = text(head("metadata"))
            .chain(archive)
            .chain(text(format!("\r\n{}", head("rootfs"))))
            .chain(root)
            .chain(text(format!("\r\n--{BOUNDARY}--\r\n")));
        let call = call
            .body(reqwest::Body::wrap_stream(body))
            .header("content-type", &format!("multipart/form-data; boundary={BOUNDARY}"))?;
        self.begin(call).await
    }

    /// Makes an image of a stopped instance, without compressing it.
    ///
    /// # Errors
    /// The call fails.
    pub async fn publish(
        &self,
        instance: &str,
        properties: &BTreeMap<String, String>,
    ) -> Result<Operation, LxdError> {
        let body = json!({
            "source": { "type": "instance", "name": instance },
            "compression_algorithm": "none",
            "properties": properties,
        });
        self.begin(Call::new(Method::POST, "/1.0/images").json(&body)).await
    }

    /// Deletes an image.
    ///
    /// # Errors
    /// There is none, or the call fails.
    pub async fn delete_image(&self, fingerprint: &str) -> Result<Operation, LxdError> {
        let path = format!("/1.0/images/{}", part(fingerprint));
        self.begin(Call::new(Method::DELETE, &path)).await
    }
}

pub(crate) async fn open(path: &Path) -> Result<ReaderStream<File>, LxdError> {
    let failed = |source| LxdError::File { path: path.display().to_string(), source };
    let file = File::open(path).await.map_err(failed)?;
    Ok(ReaderStream::with_capacity(file, CHUNK_BYTES))
}
