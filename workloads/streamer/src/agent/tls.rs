//! TLS with the agent: its certificate is pinned by the SHA-256 of its DER form (signaling section 1), or checked
//! against the system's roots when no fingerprint was given.

use std::sync::Arc;

use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{
        CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls12_signature, verify_tls13_signature,
    },
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject as _},
};
use sha2::{Digest as _, Sha256};
use tokio_rustls::TlsConnector;

/// Where Debian and Ubuntu keep the roots.
const SYSTEM_ROOTS: &str = "/etc/ssl/certs/ca-certificates.crt";

/// Why there can be no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The guest file's fingerprint.
    #[error("streaming.fingerprint {0:?} is no SHA-256 in hex (64 digits)")]
    Fingerprint(String),
    /// No fingerprint and no roots.
    #[error("no fingerprint of the agent was given and {SYSTEM_ROOTS} has no usable certificates: {0}")]
    Roots(String),
    /// The library refused.
    #[error("preparing TLS: {0}")]
    Library(#[from] rustls::Error),
}

/// A connector that accepts the agent with this fingerprint only.
///
/// # Errors
/// When the fingerprint is malformed, or empty and there are no roots.
pub fn connector(fingerprint: &str) -> Result<TlsConnector, TlsError> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?;
    let config = if fingerprint.is_empty() {
        builder.with_root_certificates(system_roots()?).with_no_client_auth()
    } else {
        let malformed = || TlsError::Fingerprint(fingerprint.chars().take(100).collect());
        let digits = fingerprint.replace(':', "");
        let bytes = hex::decode(digits).map_err(|_| malformed())?;
        let pinned = Pinned::new(bytes.try_into().map_err(|_| malformed())?, &provider);
        builder.dangerous().with_custom_certificate_verifier(Arc::new(pinned)).with_no_client_auth()
    };
    Ok(TlsConnector::from(Arc::new(config)))
}

fn system_roots() -> Result<RootCertStore, TlsError> {
    let unusable = |error: rustls::pki_types::pem::Error| TlsError::Roots(error.to_string());
    let certificates = CertificateDer::pem_file_iter(SYSTEM_ROOTS).map_err(unusable)?.flatten();
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(certificates);
    if added == 0 { Err(TlsError::Roots("none could be read".into())) } else { Ok(roots) }
}

/// Accepts one certificate. Its dates and names do not matter; that the other side holds its key does, so the
/// signature of the handshake is still checked.
#[derive(Debug)]
struct Pinned {
    sha256: [u8; 32],
    algorithms: WebPkiSupportedAlgorithms,
}

impl Pinned {
    fn new(sha256: [u8; 32], provider: &CryptoProvider) -> Self {
        Self { sha256, algorithms: provider.signature_verification_algorithms }
    }
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if <[u8; 32]>::from(Sha256::digest(end_entity)) == self.sha256 {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(rustls::Error::General("the agent's certificate is not the pinned one".into()))
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fingerprints_have_64_digits() {
        assert!(connector(&"ab".repeat(32)).is_ok());
        assert!(connector(&"AB:".repeat(32)[..95]).is_ok(), "with colons, as people copy them");
        for bad in ["ab", &"zz".repeat(32), &"ab".repeat(33)] {
            let error = connector(bad).err().expect("malformed").to_string();
            assert!(error.contains("streaming.fingerprint"), "{error}");
        }
    }

    #[test]
    fn only_the_pinned_certificate_is_accepted() {
        let certificate = CertificateDer::from(vec![1, 2, 3]);
        let right = Sha256::digest(&certificate).into();
        let check = |sha256| {
            let name = ServerName::try_from("x").expect("a name");
            Pinned::new(sha256, &aws_lc_rs::default_provider()).verify_server_cert(
                &certificate,
                &[],
                &name,
                &[],
                UnixTime::now(),
            )
        };
        assert!(check(right).is_ok());
        assert!(check([0; 32]).is_err());
    }
}
