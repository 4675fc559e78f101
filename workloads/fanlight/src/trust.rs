//! The trust between the parts on one machine: a certificate authority of its own, a server certificate for
//! each program, client certificates for the agent, AMS and the administrator.
//!
//! Made at first start and kept, so that clients that pin a certificate go on working. In a cluster certificates
//! come from files that somebody else provides.

use std::path::Path;

use fanlight_service::tls::{KeyFiles, TlsError, ensure_ca, ensure_signed_by};

/// Everything the programs need to trust each other.
#[derive(Clone, Debug)]
pub struct Trust {
    /// The authority.
    pub ca: KeyFiles,
    /// The gateway's server certificate.
    pub gateway: KeyFiles,
    /// The agent's server certificate.
    pub agent: KeyFiles,
    /// AMS's server certificate.
    pub ams: KeyFiles,
    /// The agent towards AMS.
    pub agent_client: KeyFiles,
    /// AMS towards the agent.
    pub ams_client: KeyFiles,
    /// The administrator towards AMS.
    pub admin: KeyFiles,
}

impl Trust {
    /// Reads the folder, making what is missing or does not name all of `names` (host names and addresses under
    /// which the servers are reached, besides those of loopback).
    ///
    /// # Errors
    /// Names the file that could not be read or written.
    pub fn ensure(folder: &Path, names: &[String]) -> Result<Trust, TlsError> {
        let mut served = ["localhost", "127.0.0.1", "::1"].map(String::from).to_vec();
        served.extend(names.iter().cloned());
        let ca = KeyFiles::in_folder(folder, "ca");
        ensure_ca(&ca, "Fanlight local authority")?;
        let make = |name: &str, names: &[String]| {
            let files = KeyFiles::in_folder(folder, name);
            ensure_signed_by(&ca, &files, &format!("fanlight {name}"), names).map(|_| files)
        };
        Ok(Trust {
            gateway: make("gateway", &served)?,
            agent: make("agent", &served)?,
            ams: make("ams", &served)?,
            agent_client: make("agent-client", &["agent-client".into()])?,
            ams_client: make("ams-client", &["ams-client".into()])?,
            admin: make("admin", &["admin".into()])?,
            ca,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

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
        assert_eq!(
            fs::read(&first.gateway.certificate).expect("kept"),
            renewed,
            "it covers more than is asked"
        );
    }

    #[test]
    fn keys_are_readable_by_their_owner_alone() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().expect("temporary folder");
        let trust = Trust::ensure(folder.path(), &[]).expect("made");
        for files in [&trust.ca, &trust.gateway, &trust.agent, &trust.ams, &trust.admin] {
            let mode = fs::metadata(&files.key).expect("there").permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{}", files.key.display());
        }
    }

    #[test]
    fn a_damaged_authority_is_named() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let trust = Trust::ensure(folder.path(), &[]).expect("made");
        fs::write(&trust.ca.certificate, "nonsense").expect("written");
        let error = Trust::ensure(folder.path(), &[]).expect_err("damaged").to_string();
        assert!(error.contains("ca.crt"), "{error}");
    }
}
