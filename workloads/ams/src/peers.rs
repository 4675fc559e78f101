//! The other units of AMS, and what they have that this one lacks: packages that were uploaded there. Units know each
//! other's addresses and certificates from the store ([`crate::units`]), and nobody else is answered.

use std::{path::Path, sync::Arc};

use fanlight_client::{AmsClient, Endpoint, Identity, Trust};
use fanlight_service::{http::Peer, telemetry::chain, tls::fingerprint};
use tempfile::{NamedTempFile, TempDir};
use tokio::sync::watch;

use crate::{
    catalog,
    package::{self, Limits},
    units::{Sign, Signs},
};

/// The other units. Clones are handles of the same.
#[derive(Clone)]
pub struct Peers {
    inner: Arc<Inner>,
}

struct Inner {
    own: String,
    identity: Identity,
    signs: watch::Receiver<Signs>,
    /// One package is fetched at a time: who waits finds it there.
    turn: tokio::sync::Mutex<()>,
}

impl Peers {
    /// As this unit, with the certificate of its API.
    pub fn new(own: &str, identity: Identity, signs: watch::Receiver<Signs>) -> Self {
        let turn = tokio::sync::Mutex::default();
        Self { inner: Arc::new(Inner { own: own.to_owned(), identity, signs, turn }) }
    }

    /// Whether who asks is another unit.
    pub fn is_one(&self, peer: &Peer) -> bool {
        let Some(certificate) = &peer.certificate else { return false };
        let shown = fingerprint(certificate);
        let signs = self.inner.signs.borrow();
        signs.iter().any(|(unit, sign)| *unit != self.inner.own && sign.fingerprint == shown)
    }

    /// Brings a package to its place from the first unit that has it. `package` is what follows
    /// `/internal/1.0/packages/`.
    ///
    /// # Errors
    /// What each unit said.
    pub async fn fetch(&self, package: &str, uploads: &Path, place: &Path) -> Result<(), String> {
        let _turn = self.inner.turn.lock().await;
        if place.is_dir() {
            return Ok(());
        }
        let signs = self.inner.signs.borrow().clone();
        let mut reasons = Vec::new();
        for (unit, sign) in signs.iter().filter(|(unit, _)| **unit != self.inner.own) {
            match self.fetch_from(sign, package, uploads, place).await {
                Ok(()) => {
                    tracing::info!("the package {package} was fetched from unit {unit}");
                    return Ok(());
                }
                Err(reason) => reasons.push(format!("unit {unit}: {reason}")),
            }
        }
        Err(match reasons.is_empty() {
            true => "there is no other unit to ask".into(),
            false => reasons.join("; "),
        })
    }

    async fn fetch_from(
        &self,
        sign: &Sign,
        package: &str,
        uploads: &Path,
        place: &Path,
    ) -> Result<(), String> {
        if sign.address.is_empty() {
            return Err("it does not say where it is reached (advertise)".into());
        }
        let trust = Trust::Pinned(sign.fingerprint.clone());
        let endpoint =
            Endpoint::http(&format!("https://{}", sign.address), &trust, Some(&self.inner.identity));
        let client = AmsClient::new(endpoint.map_err(|error| error.chain())?);
        let text = |error: std::io::Error| error.to_string();
        let file = NamedTempFile::new_in(uploads).map_err(text)?;
        let mut sink = tokio::fs::File::from_std(file.reopen().map_err(text)?);
        let whole = client.unit_package(package, &mut sink).await.map_err(|error| error.chain())?;
        if !whole {
            return Err("what came is not what it sent".into());
        }
        let (uploads, place) = (uploads.to_owned(), place.to_owned());
        let unpack = move || {
            let folder = TempDir::new_in(&uploads).map_err(text)?;
            // It was checked where it was uploaded.
            let limits = Limits { unpacked_bytes: u64::MAX, ..Limits::default() };
            package::unpack(&mut file.reopen().map_err(text)?, folder.path(), limits)
                .map_err(|error| chain(&error))?;
            catalog::open(folder.path())
                .and_then(|()| catalog::keep(folder, &place))
                .map_err(|error| chain(&error))
        };
        tokio::task::spawn_blocking(unpack).await.map_err(|error| error.to_string())?
    }
}
