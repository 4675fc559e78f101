//! Whom the configuration trusts: users of the unix socket, certificates in files, and whoever knows the trust
//! password (ams-api sections 1.1, 1.4 and 8.1). Identities that were added while AMS runs are in
//! [`crate::identity`].

use std::{collections::BTreeSet, path::Path, sync::Arc};

use argon2::{
    Argon2,
    password_hash::{PasswordHasher as _, PasswordVerifier as _, phc::PasswordHash},
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use fanlight_api::Secret;
use fanlight_service::{http::Peer, tls::fingerprint};
use rustls::{
    RootCertStore,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, UnixTime, pem::PemObject as _},
    server::{WebPkiClientVerifier, danger::ClientCertVerifier},
};
use subtle::ConstantTimeEq as _;
use tokio::sync::Semaphore;

use crate::{config::Config, events::unix_now};

/// Fewest characters of a trust password.
pub const PASSWORD_LENGTH: usize = 8;

/// A text was no certificate, or a file could not be used.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// Not a certificate.
    #[error("argument certificate is invalid: {0}")]
    Certificate(&'static str),
    /// A file of the configuration.
    #[error("{} cannot be used: {reason}", path.display())]
    File {
        /// Which.
        path: std::path::PathBuf,
        /// Why not.
        reason: String,
    },
}

/// What the configuration says about who may do everything.
pub struct Trust {
    fingerprints: BTreeSet<String>,
    authorities: Option<Authorities>,
    uids: Vec<u32>,
    password: Secret,
    /// Hashes of passwords are expensive on purpose, and whoever guesses must not take all the memory for them.
    hashing: Semaphore,
}

impl Trust {
    /// Reads the files that the configuration names.
    ///
    /// # Errors
    /// A file cannot be read or holds something else.
    pub fn new(config: &Config) -> Result<Self, TrustError> {
        let mut fingerprints = BTreeSet::new();
        let mut roots = Vec::new();
        for path in &config.trust.certificates {
            let wrong = |reason: String| TrustError::File { path: path.clone(), reason };
            let bytes = std::fs::read(path).map_err(|error| wrong(error.to_string()))?;
            for certificate in CertificateDer::pem_slice_iter(&bytes) {
                let certificate = certificate.map_err(|error| wrong(error.to_string()))?;
                fingerprints.insert(fingerprint(&certificate));
                if is_authority(&certificate) {
                    roots.push(certificate);
                }
            }
            if CertificateDer::pem_slice_iter(&bytes).next().is_none() {
                return Err(wrong("it holds no certificate".into()));
            }
        }
        let authorities = match roots.is_empty() {
            true => None,
            false => Some(
                Authorities::new(roots)
                    .map_err(|reason| TrustError::File { path: "trust.certificates".into(), reason })?,
            ),
        };
        let own = rustix::process::geteuid().as_raw();
        let mut uids = vec![0, own];
        uids.extend_from_slice(&config.socket_uids);
        Ok(Self {
            fingerprints,
            authorities,
            uids,
            password: password(&config.trust.password_file)?,
            hashing: Semaphore::new(1),
        })
    }

    /// Whether the configuration lets this caller do everything.
    pub fn is_administrator(&self, peer: &Peer) -> bool {
        if let Some(credentials) = peer.credentials {
            return self.uids.contains(&credentials.uid);
        }
        let Some(certificate) = &peer.certificate else { return false };
        (self.fingerprints.contains(&fingerprint(certificate)) && is_current(certificate))
            || self.authorities.as_ref().is_some_and(|authorities| authorities.signed(certificate))
    }

    /// Whether this is the trust password: the one of the configuration's file, or the one whose hash the settings
    /// have. Never without one.
    pub async fn is_password(&self, given: &Secret, hash: Option<&Secret>) -> bool {
        if !self.password.is_empty()
            && bool::from(self.password.expose().as_bytes().ct_eq(given.expose().as_bytes()))
        {
            return true;
        }
        let Some(hash) = hash.filter(|hash| !hash.is_empty() && !given.is_empty()) else { return false };
        let Ok(_turn) = self.hashing.acquire().await else { return false };
        let (given, hash) = (given.clone(), hash.clone());
        let verify = move || {
            PasswordHash::new(hash.expose())
                .is_ok_and(|hash| Argon2::default().verify_password(given.expose().as_bytes(), &hash).is_ok())
        };
        tokio::task::spawn_blocking(verify).await.unwrap_or(false)
    }
}

/// What is kept of a trust password: its hash with a salt (Argon2id), in the PHC form.
///
/// # Errors
/// The system gives no random bytes.
pub async fn hash(password: &Secret) -> Result<Secret, String> {
    let password = password.clone();
    let make = move || {
        let hash = Argon2::default().hash_password(password.expose().as_bytes());
        hash.map(|hash| Secret::new(hash.to_string())).map_err(|error| error.to_string())
    };
    tokio::task::spawn_blocking(make).await.map_err(|error| error.to_string())?
}

/// Authorities whose certificates are all trusted.
pub struct Authorities(Arc<dyn ClientCertVerifier>);

impl Authorities {
    /// With these certificates.
    ///
    /// # Errors
    /// One of them is none of an authority.
    pub fn new(certificates: Vec<CertificateDer<'static>>) -> Result<Self, String> {
        let mut roots = RootCertStore::empty();
        for certificate in certificates {
            roots.add(certificate).map_err(|error| error.to_string())?;
        }
        let provider = Arc::new(aws_lc_rs::default_provider());
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
            .build()
            .map(Self)
            .map_err(|error| error.to_string())
    }

    /// Whether one of them signed a certificate that is valid now.
    pub fn signed(&self, certificate: &[u8]) -> bool {
        let certificate = CertificateDer::from(certificate.to_vec());
        self.0.verify_client_cert(&certificate, &[], UnixTime::now()).is_ok()
    }
}

/// The DER form of a certificate that was sent as base64, or as PEM.
///
/// # Errors
/// It is neither.
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

/// Whether a certificate may sign others.
pub fn is_authority(der: &[u8]) -> bool {
    x509_parser::parse_x509_certificate(der).is_ok_and(|(_, certificate)| certificate.is_ca())
}

/// Whether a certificate has begun and not ended. TLS proves that the client has the key, nothing else.
pub fn is_current(der: &[u8]) -> bool {
    let Ok(now) = x509_parser::time::ASN1Time::from_timestamp(unix_now()) else { return false };
    x509_parser::parse_x509_certificate(der)
        .is_ok_and(|(_, certificate)| certificate.validity().is_valid_at(now))
}

/// The common name of whom a certificate was made for.
pub fn common_name(der: &[u8]) -> Option<String> {
    let (_, certificate) = x509_parser::parse_x509_certificate(der).ok()?;
    let name = certificate.subject().iter_common_name().next()?.as_str().ok()?;
    Some(name.to_owned()).filter(|name| !name.is_empty())
}

fn password(path: &Path) -> Result<Secret, TrustError> {
    if path.as_os_str().is_empty() {
        return Ok(Secret::default());
    }
    let wrong = |reason: String| TrustError::File { path: path.to_owned(), reason };
    let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
    if text.trim().len() < PASSWORD_LENGTH {
        return Err(wrong(format!("a trust password has at least {PASSWORD_LENGTH} characters")));
    }
    Ok(Secret::new(text.trim()))
}
