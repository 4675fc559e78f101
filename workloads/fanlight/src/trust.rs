//! The trust between the parts on one machine: a certificate authority of its own, a server certificate for
//! each program, client certificates for the agent, AMS and the administrator.
//!
//! Made at first start and kept; a certificate is made anew when it is about to expire or does not cover an
//! address it is to serve. In a cluster certificates come from files that somebody else provides.

use std::{
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType, string::Ia5String,
};
use serde::{Deserialize, Serialize};

use crate::state::write_private;

const CA_DAYS: u64 = 3650;
const LEAF_DAYS: u64 = 397;
/// A certificate with less life left is made anew at start.
const RENEW_DAYS: u64 = 30;
const DAY: Duration = Duration::from_secs(24 * 3600);

/// A certificate and its key, as files.
#[derive(Clone, Debug)]
pub struct Files {
    /// PEM.
    pub certificate: PathBuf,
    /// PEM, mode 0600.
    pub key: PathBuf,
}

/// Everything the programs need to trust each other.
#[derive(Clone, Debug)]
pub struct Trust {
    /// PEM of the authority.
    pub ca: PathBuf,
    /// The gateway's server certificate.
    pub gateway: Files,
    /// The agent's server certificate.
    pub agent: Files,
    /// AMS's server certificate.
    pub ams: Files,
    /// The agent towards AMS.
    pub agent_client: Files,
    /// AMS towards the agent.
    pub ams_client: Files,
    /// The administrator towards AMS.
    pub admin: Files,
}

/// What a certificate was made for, kept beside it.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Made {
    names: Vec<String>,
    server: bool,
    expires_at: u64,
}

impl Trust {
    /// Reads the folder, making what is missing, about to expire, or does not cover `names`.
    ///
    /// `names` are host names and addresses under which the servers are reached, besides the loopback ones.
    ///
    /// # Errors
    /// Names the file that could not be read or written.
    pub fn ensure(folder: &Path, names: &[String]) -> Result<Trust> {
        fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
        let authority = Authority::ensure(folder)?;
        let mut served: Vec<String> = ["localhost", "127.0.0.1", "::1"].map(String::from).to_vec();
        served.extend(names.iter().filter(|name| !served.contains(name)).cloned().collect::<Vec<_>>());
        let server = |name: &str| authority.leaf(folder, name, &served, true);
        let client = |name: &str| authority.leaf(folder, name, &[name.to_owned()], false);
        Ok(Trust {
            gateway: server("gateway")?,
            agent: server("agent")?,
            ams: server("ams")?,
            agent_client: client("agent-client")?,
            ams_client: client("ams-client")?,
            admin: client("admin")?,
            ca: authority.files.certificate,
        })
    }
}

struct Authority {
    files: Files,
    issuer: Issuer<'static, KeyPair>,
    renewed: bool,
}

impl Authority {
    fn ensure(folder: &Path) -> Result<Authority> {
        let files = Files { certificate: folder.join("ca.pem"), key: folder.join("ca.key") };
        let about = folder.join("ca.json");
        let wanted = Made { names: vec!["Fanlight local authority".into()], server: false, expires_at: 0 };
        let renewed = !is_current(&about, &wanted)? || !files.certificate.exists() || !files.key.exists();
        if renewed {
            let key = KeyPair::generate().context("making the key of the local authority")?;
            let mut params = parameters("Fanlight local authority", CA_DAYS)?;
            params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
            let certificate = params.self_signed(&key).context("signing the local authority")?;
            write_private(&files.key, key.serialize_pem().as_bytes())?;
            write_private(&files.certificate, certificate.pem().as_bytes())?;
            record(&about, wanted, CA_DAYS)?;
        }
        let key = KeyPair::from_pem(&read(&files.key)?).with_context(|| unusable(&files.key))?;
        let issuer =
            Issuer::from_ca_cert_pem(&read(&files.certificate)?, key).with_context(|| unusable(&files.certificate))?;
        Ok(Authority { files, issuer, renewed })
    }

    fn leaf(&self, folder: &Path, name: &str, names: &[String], server: bool) -> Result<Files> {
        let files =
            Files { certificate: folder.join(format!("{name}.pem")), key: folder.join(format!("{name}.key")) };
        let about = folder.join(format!("{name}.json"));
        let wanted = Made { names: names.to_vec(), server, expires_at: 0 };
        if !self.renewed && files.certificate.exists() && files.key.exists() && is_current(&about, &wanted)? {
            return Ok(files);
        }
        let key = KeyPair::generate().with_context(|| format!("making the key of {name}"))?;
        let mut params = parameters(&format!("fanlight {name}"), LEAF_DAYS)?;
        params.subject_alt_names = names.iter().map(|name| alternative(name)).collect::<Result<_>>()?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![if server { ExtendedKeyUsagePurpose::ServerAuth } else { ExtendedKeyUsagePurpose::ClientAuth }];
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, &self.issuer).with_context(|| format!("signing {name}"))?;
        write_private(&files.key, key.serialize_pem().as_bytes())?;
        write_private(&files.certificate, certificate.pem().as_bytes())?;
        record(&about, wanted, LEAF_DAYS)?;
        Ok(files)
    }
}

fn parameters(name: &str, days: u64) -> Result<CertificateParams> {
    let mut params = CertificateParams::new(Vec::new()).context("preparing a certificate")?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    let now = SystemTime::now();
    // A clock that is a little behind must not see a certificate from the future.
    params.not_before = (now - DAY).into();
    params.not_after = (now + DAY * days as u32).into();
    Ok(params)
}

fn alternative(name: &str) -> Result<SanType> {
    if let Ok(address) = name.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(address));
    }
    let Ok(host) = Ia5String::try_from(name) else { bail!("{name:?} is no host name or address") };
    Ok(SanType::DnsName(host))
}

fn now_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn is_current(about: &Path, wanted: &Made) -> Result<bool> {
    let text = match fs::read(about) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error).with_context(|| format!("reading {}", about.display())),
    };
    // A damaged note only means a new certificate.
    let Ok(made) = serde_json::from_slice::<Made>(&text) else { return Ok(false) };
    let covers = wanted.names.iter().all(|name| made.names.contains(name));
    Ok(covers && made.server == wanted.server && made.expires_at > now_seconds() + RENEW_DAYS * DAY.as_secs())
}

fn record(about: &Path, made: Made, days: u64) -> Result<()> {
    let made = Made { expires_at: now_seconds() + days * DAY.as_secs(), ..made };
    write_private(about, &serde_json::to_vec_pretty(&made).context("describing a certificate")?)
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))
}

fn unusable(path: &Path) -> String {
    format!("{} is damaged; remove the folder it is in and start again", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificates_are_kept_over_restarts_and_made_anew_for_a_new_address() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let first = Trust::ensure(folder.path(), &[]).expect("made");
        let text = fs::read(&first.gateway.certificate).expect("written");
        Trust::ensure(folder.path(), &[]).expect("kept");
        assert_eq!(fs::read(&first.gateway.certificate).expect("kept"), text);
        Trust::ensure(folder.path(), &["192.0.2.7".into()]).expect("made anew");
        let renewed = fs::read(&first.gateway.certificate).expect("written");
        assert_ne!(renewed, text);
        Trust::ensure(folder.path(), &[]).expect("kept");
        assert_eq!(fs::read(&first.gateway.certificate).expect("kept"), renewed, "it covers more than is asked");
    }

    #[test]
    fn keys_are_readable_by_their_owner_alone() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().expect("temporary folder");
        let trust = Trust::ensure(folder.path(), &[]).expect("made");
        for files in [&trust.gateway, &trust.agent, &trust.ams, &trust.admin] {
            let mode = fs::metadata(&files.key).expect("there").permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{}", files.key.display());
        }
    }

    #[test]
    fn a_damaged_authority_is_named() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let trust = Trust::ensure(folder.path(), &[]).expect("made");
        fs::write(&trust.ca, "nonsense").expect("written");
        let error = format!("{:#}", Trust::ensure(folder.path(), &[]).expect_err("damaged"));
        assert!(error.contains("ca.pem"), "{error}");
    }
}
