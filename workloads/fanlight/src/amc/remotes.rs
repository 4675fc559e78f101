//! AMS elsewhere: which ones this user knows, how they are told apart from impostors, and what this client shows them.
//!
//! Everything is in `fanlight` below the user's configuration folder: `remotes.toml`, and the client's own certificate
//! and key, made at first use. A server is believed by the fingerprint of its certificate and by nothing else. Secrets
//! come from files, the environment or the terminal, never from the command line, which others can read.

use std::{
    collections::BTreeMap,
    io::{IsTerminal as _, Write as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use fanlight_api::{Secret, ams::CertificatesPost};
use fanlight_client::{AmsClient, Endpoint, Identity, Trust};
use fanlight_service::tls::{KeyFiles, ensure_self_signed, fingerprint};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    cli::{RemoteCommand, Target},
    failure::{NotFound, Usage},
    output::{self, ask, cell, note},
    terminal::Raw,
};
use crate::{
    cli::Stack,
    commands,
    state::{read_optional, write_private},
};

/// The stack of a state folder on this machine; always there, never in the file.
pub const LOCAL: &str = "local";
const DEFAULT_STATE: &str = ".fanlight";
const DEFAULT_PORT: u16 = 8444;

/// What `remotes.toml` says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Remotes {
    /// The one that is asked where none is named; none: `local`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    current: Option<String>,
    /// By name.
    #[serde(default)]
    remotes: BTreeMap<String, Remote>,
}

/// One AMS elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Remote {
    /// Its address.
    url: String,
    /// SHA-256 of its certificate, hex.
    fingerprint: String,
    /// File with a token to show in the place of our certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    token_file: Option<PathBuf>,
}

/// Where all of it lies.
struct Folder(PathBuf);

impl Folder {
    fn of_user() -> Result<Self> {
        let variable =
            |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let base = variable("XDG_CONFIG_HOME").or_else(|| variable("HOME").map(|home| home.join(".config")));
        let base =
            base.context("HOME is not set, so there is no place for remotes; set it or XDG_CONFIG_HOME")?;
        Ok(Self(base.join("fanlight")))
    }

    fn file(&self) -> PathBuf {
        self.0.join("remotes.toml")
    }

    fn read(&self) -> Result<Remotes> {
        let Some(text) = read_optional(&self.file())? else { return Ok(Remotes::default()) };
        toml::from_str(&text).with_context(|| format!("reading {}", self.file().display()))
    }

    fn write(&self, remotes: &Remotes) -> Result<()> {
        self.make()?;
        let text = toml::to_string_pretty(remotes).context("describing the remotes")?;
        write_private(&self.file(), text.as_bytes())
    }

    fn make(&self) -> Result<()> {
        use std::os::unix::fs::DirBuilderExt as _;
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(&self.0).with_context(|| format!("making {}", self.0.display()))
    }

    /// Our certificate and key, made if they are not there.
    fn identity(&self) -> Result<Identity> {
        self.make()?;
        let files = KeyFiles::in_folder(&self.0, "client");
        ensure_self_signed(&files, "fanlight client", &["fanlight-client".into()])
            .context("making this client's certificate")?;
        Ok(Identity { certificate: files.certificate, key: files.key })
    }

    fn connect(&self, remote: &Remote) -> Result<AmsClient> {
        let trust = Trust::Pinned(remote.fingerprint.clone());
        match &remote.token_file {
            Some(file) => {
                let endpoint = Endpoint::http(&remote.url, &trust, None)?;
                Ok(AmsClient::with_token(endpoint, &read_secret(file)?)?)
            }
            None => Ok(AmsClient::new(Endpoint::http(&remote.url, &trust, Some(&self.identity()?))?)),
        }
    }
}

/// The client of the AMS that is meant.
///
/// # Errors
/// The remote is not known, or no stack has ever run on this machine.
pub fn client(target: &Target) -> Result<AmsClient> {
    let Some(name) = chosen(target)? else { return commands::ams(&stack(target)) };
    let folder = Folder::of_user()?;
    let remotes = folder.read()?;
    let remote = remotes.remotes.get(&name).ok_or_else(|| unknown(&name, &remotes))?;
    folder.connect(remote)
}

/// The stack on this machine, for what only it has.
///
/// # Errors
/// A remote is meant.
pub fn local_stack(target: &Target) -> Result<Stack> {
    match chosen(target)? {
        None => Ok(stack(target)),
        Some(name) => Err(Usage(format!(
            "only the stack on this machine can do that, not the remote {name:?}; give --remote {LOCAL}"
        ))
        .into()),
    }
}

fn stack(target: &Target) -> Stack {
    Stack { state: target.state.clone().unwrap_or_else(|| DEFAULT_STATE.into()) }
}

/// The remote that is meant; none: the local stack.
fn chosen(target: &Target) -> Result<Option<String>> {
    let name = match (&target.remote, &target.state) {
        (Some(name), _) => Some(name.clone()),
        (None, Some(_)) => None,
        // Somebody without a home folder, such as a service, can still ask the local stack.
        (None, None) => match Folder::of_user() {
            Ok(folder) => folder.read()?.current,
            Err(_) => None,
        },
    };
    Ok(name.filter(|name| name != LOCAL && !name.is_empty()))
}

fn unknown(name: &str, remotes: &Remotes) -> NotFound {
    let mut known: Vec<&str> = vec![LOCAL];
    known.extend(remotes.remotes.keys().map(String::as_str));
    NotFound(format!(
        "there is no remote {name:?}, only {}; add it with `fanlight remote add`",
        known.join(", ")
    ))
}

/// Names of all remotes.
pub fn names() -> Vec<String> {
    let known = Folder::of_user().and_then(|folder| folder.read()).unwrap_or_default();
    std::iter::once(LOCAL.to_owned()).chain(known.remotes.into_keys()).collect()
}

/// `fanlight remote …`
///
/// # Errors
/// The server cannot be reached or is not the one expected; or the file cannot be read or written.
pub async fn remote(command: RemoteCommand) -> Result<()> {
    let folder = Folder::of_user()?;
    let mut remotes = folder.read()?;
    match command {
        RemoteCommand::Add { name, url, fingerprint, password_file, token_file } => {
            let url = address(&url)?;
            check_name(&name, &remotes)?;
            let certificate =
                Endpoint::certificate_of(&url).await.context("looking at the server's certificate")?;
            let shown = self::fingerprint(&certificate);
            accept(&url, &shown, fingerprint.as_deref())?;
            let token_file = match token_file {
                Some(file) => {
                    Some(file.canonicalize().with_context(|| format!("finding {}", file.display()))?)
                }
                None => None,
            };
            let remote = Remote { url, fingerprint: shown, token_file };
            let ams = folder.connect(&remote)?;
            be_trusted(&folder, &ams, &remote, password_file.as_deref()).await?;
            remotes.remotes.insert(name, remote);
            folder.write(&remotes)
        }
        RemoteCommand::Ls { output } => {
            let current = remotes.current.clone().unwrap_or_else(|| LOCAL.into());
            let row = |name: &str, url: &str, fingerprint: &str| {
                json!({"name": name, "url": url,
                "fingerprint": fingerprint, "current": name == current})
            };
            let mut rows = vec![row(LOCAL, "", "")];
            rows.extend(
                remotes.remotes.iter().map(|(name, remote)| row(name, &remote.url, &remote.fingerprint)),
            );
            let mark = |row: &Value| if row["current"] == true { "yes".into() } else { String::new() };
            output::list(
                output.format,
                &rows,
                &[
                    ("NAME", |row| cell(row, "/name")),
                    ("URL", |row| cell(row, "/url")),
                    ("FINGERPRINT", |row| cell(row, "/fingerprint").chars().take(12).collect()),
                    ("CURRENT", mark),
                ],
            )
        }
        RemoteCommand::Switch { name } => {
            if name != LOCAL && !remotes.remotes.contains_key(&name) {
                return Err(unknown(&name, &remotes).into());
            }
            remotes.current = Some(name).filter(|name| name != LOCAL);
            folder.write(&remotes)
        }
        RemoteCommand::Remove { name } => {
            if name == LOCAL {
                return Err(Usage("the local stack is always there".into()).into());
            }
            if remotes.remotes.remove(&name).is_none() {
                return Err(unknown(&name, &remotes).into());
            }
            remotes.current = remotes.current.filter(|current| *current != name);
            folder.write(&remotes)
        }
        RemoteCommand::Certificate => {
            let file = folder.identity()?.certificate;
            let text = std::fs::read(&file).with_context(|| format!("reading {}", file.display()))?;
            output::print_bytes(&text)
        }
    }
}

fn check_name(name: &str, remotes: &Remotes) -> Result<()> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if name.is_empty() || !name.bytes().all(allowed) {
        return Err(Usage(format!("the name {name:?} has other characters than A-Z a-z 0-9 - _ .")).into());
    }
    if name == LOCAL || remotes.remotes.contains_key(name) {
        bail!("there is a remote {name:?} already; take another name, or remove it before");
    }
    Ok(())
}

/// The address with scheme and port, and nothing behind them.
fn address(text: &str) -> Result<String> {
    let wrong = || Usage(format!("{text:?} is no address of AMS; expected https://HOST:PORT"));
    let whole = if text.contains("://") { text.to_owned() } else { format!("https://{text}") };
    let mut url = reqwest::Url::parse(&whole).map_err(|_| wrong())?;
    if url.scheme() != "https"
        || url.host_str().is_none()
        || !url.username().is_empty()
        || url.password().is_some()
    {
        return Err(wrong().into());
    }
    // A host alone, as it is typed without a scheme, means AMS's own port.
    if url.port().is_none() && !text.contains("://") {
        url.set_port(Some(DEFAULT_PORT)).map_err(|()| wrong())?;
    }
    Ok(url.origin().ascii_serialization())
}

/// Lets the certificate of a server be, or not.
fn accept(url: &str, shown: &str, expected: Option<&str>) -> Result<()> {
    if let Some(expected) = expected {
        let plain: String = expected.chars().filter(|c| *c != ':').collect::<String>().to_ascii_lowercase();
        if plain != shown {
            bail!(
                "the certificate of {url} has the fingerprint {shown}, not {plain}: this is not the server you expect"
            );
        }
        return Ok(());
    }
    note(&format!("The certificate of {url} has the SHA-256 fingerprint\n  {shown}"));
    if !std::io::stdin().is_terminal() {
        let text =
            format!("whether {url} is the right server must be known; give --fingerprint {shown} if it is");
        return Err(Usage(text).into());
    }
    if ask("Is it the one that the server's administrator names?")? {
        Ok(())
    } else {
        bail!("nothing was done")
    }
}

/// Has the server trust us, by the trust password where it does not yet.
async fn be_trusted(folder: &Folder, ams: &AmsClient, remote: &Remote, file: Option<&Path>) -> Result<()> {
    let trusted =
        async || Ok::<_, anyhow::Error>(ams.service().await.context("asking who we are")?.auth == "trusted");
    if trusted().await? {
        return Ok(());
    }
    if remote.token_file.is_some() {
        bail!(
            "{} does not accept the token; is it for that server, and does its user exist there?",
            remote.url
        );
    }
    let Some(password) = password(file)? else {
        note(&format!(
            "{} does not know this client yet. Give its administrator the output of `fanlight remote certificate`,\nto be \
             let in with `fanlight auth identity create NAME --certificate FILE --group GROUP`.",
            remote.url
        ));
        return Ok(());
    };
    let request = CertificatesPost { certificate: own_certificate(folder)?, trust_password: password };
    ams.add_certificate(&request).await.context("showing the trust password")?;
    if !trusted().await? {
        bail!("{} took the trust password, but does not trust this client", remote.url);
    }
    Ok(())
}

fn own_certificate(folder: &Folder) -> Result<String> {
    certificate_text(&folder.identity()?.certificate)
}

/// The certificate in a PEM file as AMS takes it: base64 of its DER form.
///
/// # Errors
/// The file cannot be read or holds none.
pub fn certificate_text(file: &Path) -> Result<String> {
    let bytes = std::fs::read(file).with_context(|| format!("reading {}", file.display()))?;
    let certificate = CertificateDer::from_pem_slice(&bytes)
        .map_err(|error| anyhow::anyhow!("{} holds no certificate in PEM form: {error}", file.display()))?;
    Ok(BASE64_STANDARD.encode(certificate))
}

/// A secret in a file of its own.
///
/// # Errors
/// The file cannot be read, or is empty.
pub fn read_secret(file: &Path) -> Result<Secret> {
    let text = std::fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
    let text = text.trim();
    if text.is_empty() {
        bail!("{} is empty; a secret is expected in it", file.display());
    }
    Ok(Secret::new(text))
}

/// The trust password, from wherever it may come; none where nobody can be asked or nothing is typed.
fn password(file: Option<&Path>) -> Result<Option<Secret>> {
    if let Some(file) = file {
        return read_secret(file).map(Some);
    }
    if let Some(text) = std::env::var("FANLIGHT_TRUST_PASSWORD").ok().filter(|text| !text.is_empty()) {
        return Ok(Some(Secret::new(text)));
    }
    if !std::io::stdin().is_terminal() {
        return Ok(None);
    }
    let mut out = std::io::stderr();
    let _ = write!(out, "Trust password (empty: an administrator lets this client in): ");
    let _ = out.flush();
    let silent = Raw::silent().context("hiding what is typed")?;
    let mut text = String::new();
    std::io::stdin().read_line(&mut text).context("reading the password")?;
    drop(silent);
    note("");
    let text = text.trim();
    Ok((!text.is_empty()).then(|| Secret::new(text)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_get_a_scheme_and_a_port_and_lose_what_is_behind() {
        for (text, url) in [
            ("ams.example", "https://ams.example:8444"),
            ("ams.example:9000", "https://ams.example:9000"),
            ("[::1]:9000", "https://[::1]:9000"),
            ("https://ams.example:8444/1.0/", "https://ams.example:8444"),
            ("https://ams.example", "https://ams.example"),
        ] {
            assert_eq!(address(text).expect(text), url);
        }
        for bad in ["", "http://ams.example", "unix:///x", "https://user:pw@ams.example", "https://"] {
            assert!(address(bad).expect_err(bad).is::<Usage>(), "{bad}");
        }
    }

    #[test]
    fn fingerprints_are_compared_whatever_way_they_are_written() {
        let shown = "ab".repeat(32);
        assert!(accept("https://a", &shown, Some(&"AB:".repeat(32))).is_ok());
        let error = accept("https://a", &shown, Some(&"cd".repeat(32))).expect_err("another").to_string();
        assert!(error.contains("not the server you expect"), "{error}");
    }

    #[test]
    fn remotes_are_written_so_that_only_their_owner_reads_them() {
        use std::os::unix::fs::PermissionsExt as _;
        let home = tempfile::tempdir().expect("temporary folder");
        let folder = Folder(home.path().join("fanlight"));
        assert_eq!(folder.read().expect("nothing yet"), Remotes::default());
        let remote =
            Remote { url: "https://a:1".into(), fingerprint: "ab".repeat(32), token_file: Some("/t".into()) };
        let remotes = Remotes { current: Some("a".into()), remotes: BTreeMap::from([("a".into(), remote)]) };
        folder.write(&remotes).expect("written");
        assert_eq!(folder.read().expect("readable"), remotes);
        let identity = folder.identity().expect("made");
        let certificate = std::fs::read(&identity.certificate).expect("there");
        assert_eq!(folder.identity().expect("kept").certificate, identity.certificate);
        assert_eq!(std::fs::read(&identity.certificate).expect("there"), certificate);
        for private in [&folder.file(), &identity.key] {
            let mode = std::fs::metadata(private).expect("there").permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{}", private.display());
        }
        assert!(certificate_text(&identity.key).is_err(), "a key is no certificate");
    }

    #[test]
    fn names_of_remotes_are_their_own() {
        let remote = Remote { url: String::new(), fingerprint: String::new(), token_file: None };
        let remotes = Remotes { current: None, remotes: BTreeMap::from([("a".into(), remote)]) };
        assert!(check_name("b-1", &remotes).is_ok());
        for bad in ["", "a", LOCAL, "a b", "../x"] {
            assert!(check_name(bad, &remotes).is_err(), "{bad}");
        }
        let error = unknown("c", &remotes).to_string();
        assert!(error.contains("local, a"), "{error}");
    }
}
