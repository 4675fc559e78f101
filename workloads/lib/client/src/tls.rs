//! TLS of the clients: whom to believe, and who we are.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex},
};

use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
};
use sha2::{Digest, Sha256};

use crate::ClientError;

/// Where Debian and Ubuntu keep the certificate authorities of the system.
const SYSTEM_AUTHORITIES: &str = "/etc/ssl/certs/ca-certificates.crt";

/// Which servers are believed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trust {
    /// Those whose certificate one of the authorities of the system has signed.
    System,
    /// Those whose certificate an authority in this PEM file has signed.
    Authority(PathBuf),
    /// The one with this certificate: SHA-256 of its DER form in hex. Names and dates do not matter then.
    Pinned(String),
}

/// Our certificate and its key, PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Certificate.
    pub certificate: PathBuf,
    /// Key.
    pub key: PathBuf,
}

/// The settings of a client.
pub fn client_config(trust: &Trust, identity: Option<&Identity>) -> Result<ClientConfig, ClientError> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(ClientError::Tls)?;
    let builder = match trust {
        Trust::System => builder.with_root_certificates(authorities(&SYSTEM_AUTHORITIES.into())?),
        Trust::Authority(path) => builder.with_root_certificates(authorities(path)?),
        Trust::Pinned(fingerprint) => {
            let pinned = Pinned { fingerprint: parse_fingerprint(fingerprint)?, provider };
            builder.dangerous().with_custom_certificate_verifier(Arc::new(pinned))
        }
    };
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some(identity) => {
            let chain = certificates("certificate", &identity.certificate)?;
            let key = PrivateKeyDer::from_pem_file(&identity.key).map_err(|error| ClientError::File {
                what: "key",
                path: identity.key.clone(),
                reason: error.to_string(),
            })?;
            builder.with_client_auth_cert(chain, key).map_err(ClientError::Tls)?
        }
    };
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

fn certificates(what: &'static str, path: &PathBuf) -> Result<Vec<CertificateDer<'static>>, ClientError> {
    let failed = |reason: String| ClientError::File { what, path: path.clone(), reason };
    let found: Vec<_> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|error| failed(error.to_string()))?;
    if found.is_empty() {
        return Err(failed("there is no certificate in it".into()));
    }
    Ok(found)
}

fn authorities(path: &PathBuf) -> Result<RootCertStore, ClientError> {
    let mut store = RootCertStore::empty();
    let (added, _) = store.add_parsable_certificates(certificates("CA certificate", path)?);
    if added == 0 {
        let reason = "there is no usable certificate in it".into();
        return Err(ClientError::File { what: "CA certificate", path: path.clone(), reason });
    }
    Ok(store)
}

fn parse_fingerprint(text: &str) -> Result<[u8; 32], ClientError> {
    let digits: String = text.chars().filter(|character| *character != ':').collect();
    let bytes = hex::decode(digits).ok().and_then(|bytes| bytes.try_into().ok());
    bytes.ok_or_else(|| ClientError::Address {
        url: text.into(),
        reason: "a certificate fingerprint is 64 hexadecimal digits".into(),
    })
}

/// Settings that believe every certificate and keep it: for looking at who answers before anything is said.
pub fn config_that_looks(seen: Arc<Mutex<Option<Vec<u8>>>>) -> Result<ClientConfig, ClientError> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(ClientError::Tls)?;
    let mut config = builder
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Looking { seen, provider }))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

/// Keeps the certificate. Signatures are checked all the same: whoever shows it must have its key.
#[derive(Debug)]
struct Looking {
    seen: Arc<Mutex<Option<Vec<u8>>>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Looking {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let mut seen = self.seen.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        *seen = Some(certificate.as_ref().to_vec());
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Believes one certificate.
#[derive(Debug)]
struct Pinned {
    fingerprint: [u8; 32],
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if Sha256::digest(certificate.as_ref()).as_slice() == self.fingerprint {
            return Ok(ServerCertVerified::assertion());
        }
        Err(rustls::Error::InvalidCertificate(rustls::CertificateError::ApplicationVerificationFailure))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(
            message,
            certificate,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_and_fingerprints_that_cannot_be_used_are_named() {
        let error = client_config(&Trust::Authority("/none/ca.pem".into()), None).expect_err("no file");
        assert!(error.to_string().contains("/none/ca.pem"), "{error}");
        let error =
            client_config(&Trust::Authority("/etc/hostname".into()), None).expect_err("no certificate");
        assert!(error.to_string().contains("/etc/hostname"), "{error}");
        for bad in ["", "abcd", "zz", &"g".repeat(64)] {
            let error = client_config(&Trust::Pinned(bad.into()), None).expect_err("no fingerprint");
            assert!(error.to_string().contains("64 hexadecimal digits"), "{error}");
        }
        assert!(client_config(&Trust::Pinned("ab:".repeat(31) + "ab"), None).is_ok());
        let identity = Identity { certificate: "/none/c".into(), key: "/none/k".into() };
        assert!(client_config(&Trust::Pinned("0".repeat(64)), Some(&identity)).is_err());
    }
}
