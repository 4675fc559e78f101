//! Who may call: users of the unix socket, and owners of a trusted client certificate (ams-api sections 1.4
//! and 8).

use std::{collections::BTreeSet, path::Path, sync::Arc};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use fanlight_api::{Secret, ams};
use fanlight_service::{http::Peer, tls::fingerprint};
use fanlight_store::{Compare, Handle, Op, StoreError, StoreExt as _, encode};
use rustls::{
    RootCertStore,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, UnixTime, pem::PemObject as _},
    server::{WebPkiClientVerifier, danger::ClientCertVerifier},
};
use subtle::ConstantTimeEq as _;

use crate::{
    config::Config,
    core::model::{CertificateRecord, key},
    events::unix_now,
};

/// A text was no certificate, or a file could not be used.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// Not a certificate.
    #[error("argument certificate is invalid: {0}")]
    Certificate(&'static str),
    /// In the trust store already.
    #[error("certificate already exists")]
    Exists,
    /// A file of the configuration.
    #[error("{} cannot be used: {reason}", path.display())]
    File {
        /// Which.
        path: std::path::PathBuf,
        /// Why not.
        reason: String,
    },
    /// The store.
    #[error("the trust store cannot be used")]
    Store(#[from] StoreError),
}

/// Decides who is trusted.
pub struct Trust {
    store: Handle,
    /// Of the configuration.
    fingerprints: BTreeSet<String>,
    authorities: Option<Arc<dyn ClientCertVerifier>>,
    uids: Vec<u32>,
    password: Secret,
}

impl Trust {
    /// Reads the files that the configuration names.
    ///
    /// # Errors
    /// A file cannot be read or holds something else.
    pub fn new(config: &Config, store: Handle) -> Result<Self, TrustError> {
        let mut fingerprints = BTreeSet::new();
        let mut roots = RootCertStore::empty();
        for path in &config.trust.certificates {
            let wrong = |reason: String| TrustError::File { path: path.clone(), reason };
            let bytes = std::fs::read(path).map_err(|error| wrong(error.to_string()))?;
            for certificate in CertificateDer::pem_slice_iter(&bytes) {
                let certificate = certificate.map_err(|error| wrong(error.to_string()))?;
                fingerprints.insert(fingerprint(&certificate));
                if is_authority(&certificate) {
                    roots.add(certificate).map_err(|error| wrong(error.to_string()))?;
                }
            }
            if CertificateDer::pem_slice_iter(&bytes).next().is_none() {
                return Err(wrong("it holds no certificate".into()));
            }
        }
        let authorities = if roots.is_empty() {
            None
        } else {
            let provider = Arc::new(aws_lc_rs::default_provider());
            let verifier =
                WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build().map_err(
                    |error| TrustError::File { path: "trust.certificates".into(), reason: error.to_string() },
                )?;
            Some(verifier)
        };
        let own = rustix::process::geteuid().as_raw();
        let mut uids = vec![0, own];
        uids.extend_from_slice(&config.socket_uids);
        Ok(Self { store, fingerprints, authorities, uids, password: password(&config.trust.password_file)? })
    }

    /// Whether this caller may do everything.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn is_trusted(&self, peer: &Peer) -> Result<bool, StoreError> {
        if let Some(credentials) = peer.credentials {
            return Ok(self.uids.contains(&credentials.uid));
        }
        let Some(certificate) = &peer.certificate else { return Ok(false) };
        let fingerprint = fingerprint(certificate);
        if self.fingerprints.contains(&fingerprint) || self.get(&fingerprint).await?.is_some() {
            return Ok(true);
        }
        let signed = self.authorities.as_ref().is_some_and(|authorities| {
            let certificate = CertificateDer::from(certificate.to_vec());
            authorities.verify_client_cert(&certificate, &[], UnixTime::now()).is_ok()
        });
        Ok(signed)
    }

    /// Whether this is the trust password; never without one.
    pub fn is_password(&self, given: &Secret) -> bool {
        !self.password.is_empty()
            && bool::from(self.password.expose().as_bytes().ct_eq(given.expose().as_bytes()))
    }

    /// All certificates of the trust store.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn list(&self) -> Result<Vec<ams::Certificate>, StoreError> {
        let records = self.store.list_json::<CertificateRecord>(key::CERTIFICATES).await?;
        Ok(records
            .into_iter()
            .map(|(key, record)| ams::Certificate {
                certificate: record.value.certificate,
                fingerprint: key.trim_start_matches(key::CERTIFICATES).to_owned(),
            })
            .collect())
    }

    /// One certificate of the trust store.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn get(&self, fingerprint: &str) -> Result<Option<ams::Certificate>, StoreError> {
        if fingerprint.len() != 64 || !fingerprint.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Ok(None);
        }
        let record = self.store.get_json::<CertificateRecord>(&key::certificate(fingerprint)).await?;
        Ok(record.map(|record| ams::Certificate {
            certificate: record.value.certificate,
            fingerprint: fingerprint.to_owned(),
        }))
    }

    /// Adds a certificate, with `more` writes in the same transaction.
    ///
    /// # Errors
    /// It is there already, or the store cannot be written.
    pub async fn add(&self, der: &[u8], more: Vec<Op>) -> Result<(), TrustError> {
        let key = key::certificate(&fingerprint(der));
        let record = CertificateRecord { certificate: BASE64_STANDARD.encode(der), added_at: unix_now() };
        let mut ops = vec![Op::put(&key, encode(&key, &record)?)];
        ops.extend(more);
        match self.store.transact(vec![Compare::absent(key)], ops).await {
            Ok(_) => Ok(()),
            Err(StoreError::Conflict) => Err(TrustError::Exists),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes a certificate, with `more` writes in the same transaction.
    ///
    /// # Errors
    /// The store cannot be written.
    pub async fn remove(&self, fingerprint: &str, more: Vec<Op>) -> Result<(), TrustError> {
        let mut ops = vec![Op::delete(key::certificate(fingerprint))];
        ops.extend(more);
        self.store.transact(Vec::new(), ops).await?;
        Ok(())
    }
}

/// The DER form of a certificate given as base64 or PEM.
///
/// # Errors
/// It is none.
pub fn certificate(text: &str) -> Result<Vec<u8>, TrustError> {
    let der = if text.contains("-----BEGIN") {
        CertificateDer::from_pem_slice(text.as_bytes())
            .map_err(|_| TrustError::Certificate("it is no PEM block of a certificate"))?
            .to_vec()
    } else {
        let compact: String = text.split_whitespace().collect();
        BASE64_STANDARD.decode(compact).map_err(|_| TrustError::Certificate("it is not base64"))?
    };
    match x509_parser::parse_x509_certificate(&der) {
        Ok(([], _)) => Ok(der),
        _ => Err(TrustError::Certificate("it is no certificate in DER form")),
    }
}

fn is_authority(der: &[u8]) -> bool {
    x509_parser::parse_x509_certificate(der).is_ok_and(|(_, certificate)| certificate.is_ca())
}

fn password(path: &Path) -> Result<Secret, TrustError> {
    if path.as_os_str().is_empty() {
        return Ok(Secret::default());
    }
    let wrong = |reason: String| TrustError::File { path: path.to_owned(), reason };
    let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
    if text.trim().len() < 8 {
        return Err(wrong("a trust password has at least 8 characters".into()));
    }
    Ok(Secret::new(text.trim()))
}
