//! Certificates and TLS settings: one crypto provider, TLS 1.3 alone on our servers, certificates that are made
//! at first start and kept, and that are read again when their files change.
//!
//! A client certificate is asked for and never required; whether it opens anything is decided by the program,
//! by fingerprint. The handshake only proves that the peer holds its key.

use std::{
    io::Write as _,
    net::IpAddr,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose,
};
use rustls::{
    DigitallySignedStruct, DistinguishedName as RustlsName, ServerConfig, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs},
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject as _},
    server::{
        ClientHello, ResolvesServerCert,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::CertifiedKey,
};
use sha2::{Digest as _, Sha256};

/// Names our own certificates, so that we may make them again.
const OWN_ORGANISATION: &str = "Fanlight self-made";
/// How often files are looked at for changes, at most.
const RELOAD_INTERVAL: Duration = Duration::from_secs(1);

/// Something about certificates or keys failed.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file could not be read or written.
    #[error("{doing} {}", path.display())]
    File {
        /// What was tried.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A file does not hold what it should.
    #[error("{} holds no usable {what}: {reason}", path.display())]
    Content {
        /// `certificate` or `private key`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// Making a certificate failed.
    #[error("making a certificate for {names:?}")]
    Generate {
        /// Names and addresses wanted.
        names: Vec<String>,
        /// Why not.
        #[source]
        source: rcgen::Error,
    },
    /// rustls refused the settings.
    #[error("setting up TLS")]
    Settings(#[from] rustls::Error),
}

/// Makes aws-lc-rs the crypto provider of this process. Every `main` and every test calls it; later calls change
/// nothing.
pub fn install_provider() {
    // An error means that one is installed already.
    let _ = aws_lc_rs::default_provider().install_default();
}

/// SHA-256 of a DER certificate, lower-case hex: how certificates are named and pinned here.
pub fn fingerprint(der: &[u8]) -> String {
    hex::encode(Sha256::digest(der))
}

/// The fingerprint of the first certificate in a PEM file.
///
/// # Errors
/// The file cannot be read or holds no certificate.
pub fn fingerprint_of_file(path: &Path) -> Result<String, TlsError> {
    let chain = read_certificates(path)?;
    Ok(fingerprint(&chain[0]))
}

/// Until when the first certificate in a PEM file is valid, Unix seconds.
///
/// # Errors
/// The file cannot be read or holds no certificate.
pub fn not_after(path: &Path) -> Result<i64, TlsError> {
    let chain = read_certificates(path)?;
    let (_, parsed) = x509_parser::parse_x509_certificate(&chain[0]).map_err(|error| TlsError::Content {
        what: "certificate",
        path: path.to_owned(),
        reason: error.to_string(),
    })?;
    Ok(parsed.validity().not_after.timestamp())
}

/// A certificate and its key as PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyFiles {
    /// The certificate, leaf first.
    pub certificate: PathBuf,
    /// Its private key; mode 0600.
    pub key: PathBuf,
}

impl KeyFiles {
    /// `<folder>/<name>.crt` and `<folder>/<name>.key`.
    pub fn in_folder(folder: &Path, name: &str) -> Self {
        Self { certificate: folder.join(format!("{name}.crt")), key: folder.join(format!("{name}.key")) }
    }

    fn exist(&self) -> bool {
        self.certificate.exists() && self.key.exists()
    }
}

/// What a certificate is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    Ca,
    Leaf,
}

/// Makes sure that there is a certificate for `names` (host names and addresses), self-signed for servers and
/// clients alike. An existing one is kept; one of our own making that lacks a name is made again with the same
/// key and the names of both. Returns its fingerprint.
///
/// # Errors
/// Files cannot be read or written, or a name is no name.
pub fn ensure_self_signed(files: &KeyFiles, common_name: &str, names: &[String]) -> Result<String, TlsError> {
    ensure(files, common_name, names, Purpose::Leaf, None)
}

/// Makes sure that there is a certificate authority of our own. Returns its fingerprint.
///
/// # Errors
/// Files cannot be read or written.
pub fn ensure_ca(files: &KeyFiles, common_name: &str) -> Result<String, TlsError> {
    ensure(files, common_name, &[], Purpose::Ca, None)
}

/// Like [`ensure_self_signed`], but signed by the authority in `ca`.
///
/// # Errors
/// Files cannot be read or written, or a name is no name.
pub fn ensure_signed_by(
    ca: &KeyFiles,
    files: &KeyFiles,
    common_name: &str,
    names: &[String],
) -> Result<String, TlsError> {
    ensure(files, common_name, names, Purpose::Leaf, Some(ca))
}

fn ensure(
    files: &KeyFiles,
    common_name: &str,
    names: &[String],
    purpose: Purpose,
    ca: Option<&KeyFiles>,
) -> Result<String, TlsError> {
    let mut wanted = names.to_vec();
    let mut key = None;
    if files.exist() {
        let chain = read_certificates(&files.certificate)?;
        let (own, present) = describe(&chain[0], &files.certificate, ca.is_some())?;
        let missing: Vec<&String> = names.iter().filter(|name| !present.contains(name)).collect();
        if missing.is_empty() {
            return Ok(fingerprint(&chain[0]));
        }
        if !own {
            tracing::warn!(
                "certificate {} does not name {missing:?}: clients that check names will refuse it there",
                files.certificate.display()
            );
            return Ok(fingerprint(&chain[0]));
        }
        wanted.extend(present);
        wanted.sort();
        wanted.dedup();
        key = Some(read_key_pair(&files.key)?);
    }
    let generate = |source| TlsError::Generate { names: wanted.clone(), source };
    let key = match key {
        Some(key) => key,
        None => KeyPair::generate().map_err(generate)?,
    };
    let mut params = CertificateParams::new(wanted.clone()).map_err(generate)?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.distinguished_name.push(DnType::OrganizationName, OWN_ORGANISATION);
    params.not_before = rcgen::date_time_ymd(2024, 1, 1);
    params.not_after = rcgen::date_time_ymd(2054, 1, 1);
    match purpose {
        Purpose::Ca => {
            params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        }
        Purpose::Leaf => {
            params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
            params.extended_key_usages =
                vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        }
    }
    let certificate = match ca {
        None => params.self_signed(&key).map_err(generate)?,
        Some(ca) => {
            params.use_authority_key_identifier_extension = true;
            let ca_chain = read_certificates(&ca.certificate)?;
            let issuer = Issuer::from_ca_cert_der(&ca_chain[0], read_key_pair(&ca.key)?).map_err(generate)?;
            params.signed_by(&key, &issuer).map_err(generate)?
        }
    };
    // The key first: a certificate without key would be taken for somebody else's.
    write_private(&files.key, key.serialize_pem().as_bytes(), 0o600)?;
    write_private(&files.certificate, certificate.pem().as_bytes(), 0o644)?;
    Ok(fingerprint(certificate.der()))
}

/// Whether a certificate is of our own making (and comes from an authority, or from itself), and its names.
fn describe(der: &CertificateDer<'_>, path: &Path, from_ca: bool) -> Result<(bool, Vec<String>), TlsError> {
    let content = |reason: String| TlsError::Content { what: "certificate", path: path.to_owned(), reason };
    let (_, parsed) = x509_parser::parse_x509_certificate(der).map_err(|error| content(error.to_string()))?;
    let made_here = parsed.subject().iter_organization().any(|name| name.as_str() == Ok(OWN_ORGANISATION));
    let own = made_here && (parsed.issuer() != parsed.subject()) == from_ca;
    let mut names = Vec::new();
    if let Ok(Some(extension)) = parsed.subject_alternative_name() {
        for name in &extension.value.general_names {
            match name {
                x509_parser::extensions::GeneralName::DNSName(name) => names.push((*name).to_owned()),
                x509_parser::extensions::GeneralName::IPAddress(bytes) => {
                    let address = match bytes.len() {
                        4 => <[u8; 4]>::try_from(*bytes).ok().map(IpAddr::from),
                        16 => <[u8; 16]>::try_from(*bytes).ok().map(IpAddr::from),
                        _ => None,
                    };
                    names.extend(address.map(|address| address.to_string()));
                }
                _ => {}
            }
        }
    }
    Ok((own, names))
}

fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let bytes = std::fs::read(path).map_err(|source| TlsError::File {
        doing: "reading the certificate",
        path: path.to_owned(),
        source,
    })?;
    let content = |reason: String| TlsError::Content { what: "certificate", path: path.to_owned(), reason };
    let chain: Vec<_> = CertificateDer::pem_slice_iter(&bytes)
        .collect::<Result<_, _>>()
        .map_err(|error| content(error.to_string()))?;
    if chain.is_empty() {
        return Err(content("no PEM block of a certificate".into()));
    }
    Ok(chain)
}

fn read_key_text(path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|source| TlsError::File {
        doing: "reading the private key",
        path: path.to_owned(),
        source,
    })
}

fn read_key_pair(path: &Path) -> Result<KeyPair, TlsError> {
    let text = String::from_utf8_lossy(&read_key_text(path)?).into_owned();
    KeyPair::from_pem(&text).map_err(|error| TlsError::Content {
        what: "private key",
        path: path.to_owned(),
        reason: error.to_string(),
    })
}

/// Writes a file as a whole: a crash leaves the old one or the new one. Makes its folder (mode 0700) if needed.
///
/// # Errors
/// The folder or the file cannot be written.
pub fn write_private(path: &Path, content: &[u8], mode: u32) -> Result<(), TlsError> {
    let fail = |source| TlsError::File { doing: "writing", path: path.to_owned(), source };
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        use std::os::unix::fs::DirBuilderExt as _;
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(fail)?;
    }
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let temporary = path.with_file_name(name);
    let write = || -> std::io::Result<()> {
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(mode)
            .open(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)
    };
    write().map_err(|source| {
        let _ = std::fs::remove_file(&temporary);
        fail(source)
    })
}

/// Server settings: TLS 1.3, HTTP/1.1, the certificate of `files` (read again when the files change), client
/// certificates asked for and not required.
///
/// # Errors
/// The files cannot be read or do not belong together.
pub fn server_config(files: &KeyFiles) -> Result<Arc<ServerConfig>, TlsError> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = AnyClient { algorithms: provider.signature_verification_algorithms };
    configure(files, provider, Some(Arc::new(verifier)))
}

/// Server settings as [`server_config`] for servers that browsers talk to: no client certificate is asked for.
/// Chromium cancels a websocket whose server asks, and shows people a choice of certificates elsewhere.
///
/// # Errors
/// The files cannot be read or do not belong together.
pub fn public_server_config(files: &KeyFiles) -> Result<Arc<ServerConfig>, TlsError> {
    configure(files, Arc::new(aws_lc_rs::default_provider()), None)
}

fn configure(
    files: &KeyFiles,
    provider: Arc<CryptoProvider>,
    clients: Option<Arc<dyn ClientCertVerifier>>,
) -> Result<Arc<ServerConfig>, TlsError> {
    let resolver = Arc::new(Reloading::new(files.clone(), provider.clone())?);
    let builder =
        ServerConfig::builder_with_provider(provider).with_protocol_versions(&[&rustls::version::TLS13])?;
    let builder = match clients {
        Some(verifier) => builder.with_client_cert_verifier(verifier),
        None => builder.with_no_client_auth(),
    };
    let mut config = builder.with_cert_resolver(resolver);
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// Serves the certificate of two files and reads them again when they change.
#[derive(Debug)]
struct Reloading {
    files: KeyFiles,
    provider: Arc<CryptoProvider>,
    state: Mutex<Loaded>,
}

#[derive(Debug)]
struct Loaded {
    key: Arc<CertifiedKey>,
    stamp: Stamp,
    looked_at: Instant,
}

type Stamp = [Option<(SystemTime, u64)>; 2];

impl Reloading {
    fn new(files: KeyFiles, provider: Arc<CryptoProvider>) -> Result<Self, TlsError> {
        let stamp = stamp(&files);
        let key = Arc::new(load_key(&files, &provider)?);
        Ok(Self { files, provider, state: Mutex::new(Loaded { key, stamp, looked_at: Instant::now() }) })
    }

    fn current(&self, now: Instant) -> Arc<CertifiedKey> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if now.saturating_duration_since(state.looked_at) >= RELOAD_INTERVAL {
            state.looked_at = now;
            let stamp = stamp(&self.files);
            if stamp != state.stamp {
                match load_key(&self.files, &self.provider) {
                    Ok(key) => {
                        tracing::info!("certificate {} was read again", self.files.certificate.display());
                        state.key = Arc::new(key);
                        state.stamp = stamp;
                    }
                    // Perhaps only one of the two files is new yet; the next handshake tries again.
                    Err(error) => tracing::warn!(
                        "the changed certificate {} is not usable, the old one stays: {}",
                        self.files.certificate.display(),
                        crate::telemetry::chain(&error)
                    ),
                }
            }
        }
        state.key.clone()
    }
}

impl ResolvesServerCert for Reloading {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current(Instant::now()))
    }
}

fn stamp(files: &KeyFiles) -> Stamp {
    [&files.certificate, &files.key].map(|path| {
        let metadata = std::fs::metadata(path).ok()?;
        Some((metadata.modified().ok()?, metadata.len()))
    })
}

fn load_key(files: &KeyFiles, provider: &CryptoProvider) -> Result<CertifiedKey, TlsError> {
    let chain = read_certificates(&files.certificate)?;
    let key = PrivateKeyDer::from_pem_slice(&read_key_text(&files.key)?).map_err(|error| {
        TlsError::Content { what: "private key", path: files.key.clone(), reason: error.to_string() }
    })?;
    Ok(CertifiedKey::from_der(chain, key, provider)?)
}

/// Takes any client certificate whose key the peer holds.
#[derive(Debug)]
struct AnyClient {
    algorithms: WebPkiSupportedAlgorithms,
}

impl ClientCertVerifier for AnyClient {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[RustlsName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, certificate, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| name.to_string()).collect()
    }

    #[test]
    fn a_certificate_is_made_once_and_kept_until_a_name_is_missing() {
        let folder = tempfile::tempdir().expect("folder");
        let files = KeyFiles::in_folder(&folder.path().join("tls"), "server");
        let first = ensure_self_signed(&files, "test", &names(&["localhost", "127.0.0.1"])).expect("made");
        assert_eq!(ensure_self_signed(&files, "test", &names(&["localhost"])).expect("kept"), first);
        assert_eq!(fingerprint_of_file(&files.certificate).expect("read"), first);
        let mode = std::fs::metadata(&files.key).expect("key").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let key = std::fs::read(&files.key).expect("key");
        let second = ensure_self_signed(&files, "test", &names(&["::1"])).expect("made again");
        assert_ne!(second, first);
        assert_eq!(std::fs::read(&files.key).expect("key"), key, "the key stays");
        assert_eq!(
            ensure_self_signed(&files, "test", &names(&["localhost", "127.0.0.1", "::1"])).expect("kept"),
            second
        );
    }

    #[test]
    fn an_authority_signs_and_unusable_files_are_named() {
        let folder = tempfile::tempdir().expect("folder");
        let ca = KeyFiles::in_folder(folder.path(), "ca");
        let leaf = KeyFiles::in_folder(folder.path(), "leaf");
        ensure_ca(&ca, "authority").expect("made");
        ensure_signed_by(&ca, &leaf, "leaf", &names(&["localhost"])).expect("signed");
        server_config(&leaf).expect("usable");
        std::fs::write(&leaf.certificate, "nonsense").expect("write");
        let error = server_config(&leaf).expect_err("nonsense").to_string();
        assert!(error.contains("leaf.crt"), "{error}");
        let error = ensure_self_signed(&ca, "x", &names(&["a b\u{e9}"])).expect_err("no name").to_string();
        assert!(error.contains("a b"), "{error}");
    }

    #[test]
    fn changed_files_are_read_again_and_unusable_ones_leave_the_old_certificate() {
        let folder = tempfile::tempdir().expect("folder");
        let files = KeyFiles::in_folder(folder.path(), "server");
        let first = ensure_self_signed(&files, "test", &names(&["localhost"])).expect("made");
        let resolver = Reloading::new(files.clone(), Arc::new(aws_lc_rs::default_provider())).expect("loads");
        let mut now = Instant::now();
        let mut shown = || {
            now += RELOAD_INTERVAL;
            fingerprint(&resolver.current(now).cert[0])
        };
        assert_eq!(shown(), first);
        std::fs::write(&files.certificate, "half written").expect("write");
        assert_eq!(shown(), first);
        std::fs::remove_file(&files.certificate).expect("remove");
        let second = ensure_self_signed(&files, "test", &names(&["localhost"])).expect("made");
        assert_eq!(shown(), second);
    }
}
