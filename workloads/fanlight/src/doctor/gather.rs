//! Looks at the path of a stream: connections, requests, datagrams. What is seen is put down as facts; nothing is
//! judged here except what may be done next. A token is sent only to a gateway whose certificate is believed.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail};
use fanlight_api::{
    Secret,
    envelope::{GatewayEnvelope, Kind},
    gateway::{Diagnosis, Region, ServiceStatus, StunServer},
};
use futures_util::future::join_all;
use reqwest::{Client, Url, header};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject},
};
use serde::de::DeserializeOwned;
use tokio::{
    net::{TcpStream, lookup_host},
    time::timeout,
};
use tokio_rustls::TlsConnector;
use x509_parser::extensions::GeneralName;

use super::{
    ice::{Credentials, IceUrl, Outcome, try_server},
    judge::{Certificate, Connection, Exchange, Facts, NoConnection, Problem, Rights, Server},
};

/// Where Debian and Ubuntu keep the certificate authorities of the system.
const SYSTEM_AUTHORITIES: &str = "/etc/ssl/certs/ca-certificates.crt";
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);
const TLS_PATIENCE: Duration = Duration::from_secs(5);
const REQUEST_PATIENCE: Duration = Duration::from_secs(10);
/// Servers of one region that are tried, at most.
const MAX_SERVERS: usize = 16;

/// Where to look, and with what.
#[derive(Clone, Debug)]
pub struct Target {
    /// Address of the gateway.
    pub url: String,
    /// Whether it was found by a state folder.
    pub own_stack: bool,
    /// API token, or where it was looked for.
    pub token: Result<Secret, String>,
    /// PEM of the authority of the gateway's certificate; absent: those of the system.
    pub ca: Option<PathBuf>,
    /// Only this region.
    pub region: Option<String>,
    /// This application too.
    pub application: Option<String>,
}

/// Looks at everything that can be looked at.
///
/// # Errors
/// The authority's file cannot be used.
pub async fn gather(target: &Target) -> Result<Facts> {
    let mut facts = Facts {
        url: target.url.clone(),
        own_stack: target.own_stack,
        wanted_region: target.region.clone(),
        wanted_application: target.application.clone(),
        now_s: unix_ms() / 1000,
        connection: Err(NoConnection::Url(String::new())),
        tls: None,
        status: None,
        clock_difference_ms: None,
        token: target.token.as_ref().map(|_| ()).map_err(String::clone),
        rights: None,
        diagnosis: None,
        regions: None,
        applications: None,
        servers: BTreeMap::new(),
    };
    let roots = authorities(target.ca.as_deref().unwrap_or(Path::new(SYSTEM_AUTHORITIES)))?;
    let url = match parse(&target.url) {
        Ok(url) => url,
        Err(reason) => {
            facts.connection = Err(NoConnection::Url(reason));
            return Ok(facts);
        }
    };
    let stream = match connect(&url).await {
        Ok((stream, connection)) => {
            facts.connection = Ok(connection);
            stream
        }
        Err(reason) => {
            facts.connection = Err(reason);
            return Ok(facts);
        }
    };
    let open = Verifier::new(&roots, true)?;
    if url.scheme() == "https" {
        let seen = handshake(&url, stream, &open).await;
        let stop = seen.is_err();
        facts.tls = Some(seen);
        if stop {
            return Ok(facts);
        }
    }
    let believed = !matches!(&facts.tls, Some(Ok(Certificate { problem: Some(_), .. })));
    let anonymous = Gateway::new(&url, open.config()?, None)?;
    let health = anonymous.get::<ServiceStatus>("/1.0/status").await;
    facts.clock_difference_ms = health.clock_difference_ms;
    let alive = matches!(health.exchange, Exchange::Answer(..));
    facts.status = Some(health.exchange.map(|status| status.status));
    if let (true, true, Ok(token)) = (alive, believed, &target.token) {
        let gateway = Gateway::new(&url, Verifier::new(&roots, false)?.config()?, Some(token))?;
        ask(&gateway, &mut facts).await;
        facts.servers = try_servers(&facts, &relay_tls(roots)?).await;
    }
    Ok(facts)
}

/// Everything that needs the token.
async fn ask(gateway: &Gateway, facts: &mut Facts) {
    let asked = Instant::now();
    let asked_ms = unix_ms();
    let diagnosis = gateway.get::<Diagnosis>("/1.0/doctor").await.exchange;
    if let Exchange::Answer(diagnosis, _) = &diagnosis {
        // Somewhere within the request the gateway read its clock: its middle is the best guess.
        let middle = asked_ms + asked.elapsed().as_millis() as i64 / 2;
        facts.clock_difference_ms = Some(diagnosis.time_ms - middle);
    }
    facts.diagnosis = Some(diagnosis);
    facts.regions = Some(gateway.get::<Vec<Region>>("/1.0/regions?recursion=true").await.exchange);
    if facts.wanted_application.is_some() {
        facts.applications = Some(gateway.get("/1.0/applications").await.exchange);
    }
    // Settings are for accounts with all rights; nothing else tells the two kinds apart without making something.
    facts.rights = match gateway.get::<serde_json::Value>("/1.0/config").await.exchange {
        Exchange::Answer(..) => Some(Rights::Full),
        Exchange::Refused { status: 403, .. } => Some(Rights::Launch),
        _ => None,
    };
}

/// Tries the servers of all regions at once.
async fn try_servers(facts: &Facts, tls: &Arc<ClientConfig>) -> BTreeMap<String, Vec<Server>> {
    let mut offered: BTreeMap<String, Vec<StunServer>> = BTreeMap::new();
    match (&facts.diagnosis, &facts.regions) {
        (Some(Exchange::Answer(diagnosis, _)), _) => offered = diagnosis.stun_servers.clone(),
        // Without credentials, which only the diagnosis brings, STUN can still be tried.
        (_, Some(Exchange::Answer(regions, _))) => {
            for region in regions.iter().filter(|region| !region.stun_servers.is_empty()) {
                let server = StunServer { urls: region.stun_servers.clone(), ..StunServer::default() };
                offered.insert(region.name.clone(), vec![server]);
            }
        }
        _ => {}
    }
    offered.retain(|name, _| facts.wanted_region.as_ref().is_none_or(|wanted| wanted == name));
    let regions = offered.into_iter().map(|(name, servers)| async move {
        let urls = servers.iter().flat_map(|server| server.urls.iter().map(move |url| (server, url)));
        let tried = urls.take(MAX_SERVERS).map(|(server, url)| async move {
            let parsed = IceUrl::parse(url);
            let credentials = server.username.clone().zip(server.password.clone());
            let credentials = credentials.map(|(username, password)| Credentials { username, password });
            let outcome = match &parsed {
                Ok(parsed) => try_server(parsed, credentials.as_ref(), tls).await,
                Err(reason) => Outcome::Unusable((*reason).to_owned()),
            };
            Server { url: url.clone(), parsed, outcome }
        });
        (name, join_all(tried).await)
    });
    join_all(regions).await.into_iter().collect()
}

fn parse(text: &str) -> Result<Url, String> {
    let url = Url::parse(text).map_err(|error| error.to_string())?;
    if !matches!(url.scheme(), "https" | "http") {
        return Err("it does not begin with https:// or http://".into());
    }
    if url.host_str().is_none_or(str::is_empty) {
        return Err("there is no host in it".into());
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("credentials do not belong into it".into());
    }
    Ok(url)
}

/// Host and port; brackets of IPv6 addresses belong to addresses of the web only.
fn place(url: &Url) -> (String, u16) {
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']).to_owned();
    (host, url.port_or_known_default().unwrap_or(443))
}

/// Connects to the first of the host's addresses that answers; the failure is that of the last one.
async fn connect(url: &Url) -> Result<(TcpStream, Connection), NoConnection> {
    let (host, port) = place(url);
    let addresses = match timeout(CONNECT_PATIENCE, lookup_host((host.as_str(), port))).await {
        Err(_) => return Err(NoConnection::Resolve("the name server does not answer".into())),
        Ok(Err(error)) => return Err(NoConnection::Resolve(error.to_string())),
        Ok(Ok(addresses)) => addresses,
    };
    let mut failure = NoConnection::Resolve("there is none".into());
    for address in addresses.take(4) {
        let began = Instant::now();
        match timeout(CONNECT_PATIENCE, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => return Ok((stream, Connection { address, took: began.elapsed() })),
            Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
                failure = NoConnection::Refused(address);
            }
            Ok(Err(error)) => failure = NoConnection::Other(address, error.to_string()),
            Err(_) => failure = NoConnection::Silent(address, CONNECT_PATIENCE),
        }
    }
    Err(failure)
}

async fn handshake(url: &Url, stream: TcpStream, verifier: &Arc<Verifier>) -> Result<Certificate, String> {
    let (host, _) = place(url);
    let name = ServerName::try_from(host).map_err(|error| error.to_string())?;
    let config = verifier.config().map_err(|error| format!("{error:#}"))?;
    match timeout(TLS_PATIENCE, TlsConnector::from(Arc::new(config)).connect(name, stream)).await {
        Err(_) => Err(format!("no answer within {} s", TLS_PATIENCE.as_secs())),
        Ok(Err(error)) => Err(error.to_string()),
        Ok(Ok(_)) => {
            let seen = verifier.seen.lock().unwrap_or_else(PoisonError::into_inner).take();
            let (der, problem) = seen.ok_or("the server showed no certificate")?;
            describe(&der, problem)
        }
    }
}

fn describe(der: &[u8], problem: Option<Problem>) -> Result<Certificate, String> {
    let (_, parsed) = x509_parser::parse_x509_certificate(der)
        .map_err(|error| format!("the certificate cannot be read: {error}"))?;
    let names = match parsed.subject_alternative_name() {
        Ok(Some(extension)) => extension.value.general_names.iter().filter_map(name_of).collect(),
        _ => Vec::new(),
    };
    let validity = parsed.validity();
    Ok(Certificate {
        names,
        not_before_s: validity.not_before.timestamp(),
        not_after_s: validity.not_after.timestamp(),
        problem,
    })
}

fn name_of(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => match bytes.len() {
            4 => <[u8; 4]>::try_from(*bytes).ok().map(|bytes| std::net::IpAddr::from(bytes).to_string()),
            16 => <[u8; 16]>::try_from(*bytes).ok().map(|bytes| std::net::IpAddr::from(bytes).to_string()),
            _ => None,
        },
        _ => None,
    }
}

fn problem(error: &rustls::Error) -> Problem {
    let rustls::Error::InvalidCertificate(error) = error else { return Problem::Other(error.to_string()) };
    match error {
        CertificateError::UnknownIssuer | CertificateError::BadSignature => Problem::Authority,
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => Problem::Name,
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => Problem::Expired,
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => Problem::NotYet,
        other => Problem::Other(other.to_string()),
    }
}

/// The authorities in a PEM file.
fn authorities(path: &Path) -> Result<RootCertStore> {
    let mut store = RootCertStore::empty();
    let certificates =
        CertificateDer::pem_file_iter(path)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .with_context(|| format!("reading the certificate authorities in {}", path.display()))?;
    let (added, _) = store.add_parsable_certificates(certificates);
    if added == 0 {
        bail!("{} holds no usable certificate of an authority", path.display());
    }
    Ok(store)
}

/// TLS towards TURN servers, which may have certificates of the gateway's authority or of one of the system's.
fn relay_tls(mut roots: RootCertStore) -> Result<Arc<ClientConfig>> {
    // A system without authorities is no reason to look at nothing.
    if let Ok(system) = authorities(Path::new(SYSTEM_AUTHORITIES)) {
        roots.extend(system.roots);
    }
    let provider = Arc::new(aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .context("setting up TLS")?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

/// Puts down what a careful client thinks of a server's certificate.
#[derive(Debug)]
struct Verifier {
    careful: Arc<WebPkiServerVerifier>,
    /// Lets every server in all the same, so that more of the path can be looked at. Nothing secret goes that way.
    open: bool,
    seen: Mutex<Option<(Vec<u8>, Option<Problem>)>>,
}

impl Verifier {
    fn new(roots: &RootCertStore, open: bool) -> Result<Arc<Self>> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let careful = WebPkiServerVerifier::builder_with_provider(Arc::new(roots.clone()), provider)
            .build()
            .context("setting up the check of certificates")?;
        Ok(Arc::new(Self { careful, open, seen: Mutex::new(None) }))
    }

    fn config(self: &Arc<Self>) -> Result<ClientConfig> {
        let mut config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .context("setting up TLS")?
            .dangerous()
            .with_custom_certificate_verifier(self.clone())
            .with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(config)
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let verdict = self.careful.verify_server_cert(certificate, chain, name, ocsp, now);
        let seen = (certificate.to_vec(), verdict.as_ref().err().map(problem));
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = Some(seen);
        if self.open { Ok(ServerCertVerified::assertion()) } else { verdict }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.careful.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.careful.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.careful.supported_verify_schemes()
    }
}

/// The gateway's API.
struct Gateway {
    base: Url,
    client: Client,
    token: Option<Secret>,
}

/// An exchange, and what its answer says about the gateway's clock.
struct Heard<T> {
    exchange: Exchange<T>,
    clock_difference_ms: Option<i64>,
}

impl Gateway {
    fn new(base: &Url, tls: ClientConfig, token: Option<&Secret>) -> Result<Self> {
        let client = Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT_PATIENCE)
            .timeout(REQUEST_PATIENCE)
            .tls_backend_preconfigured(tls)
            .build()
            .context("setting up HTTP")?;
        Ok(Self { base: base.clone(), client, token: token.cloned() })
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Heard<T> {
        let unheard = |exchange| Heard { exchange, clock_difference_ms: None };
        let Ok(url) = self.base.join(path) else {
            return unheard(Exchange::Failed("its address cannot be extended".into()));
        };
        let mut request = self.client.get(url);
        if let Some(token) = &self.token {
            let text = format!("macaroon root={}", token.expose());
            let Ok(mut value) = header::HeaderValue::from_str(&text) else {
                let text = Some("it holds characters that no token has".into());
                return unheard(Exchange::Refused { status: 401, text });
            };
            value.set_sensitive(true);
            request = request.header(header::AUTHORIZATION, value);
        }
        let (began, began_ms) = (Instant::now(), unix_ms());
        let answer = async {
            let response = request.send().await?;
            let (status, headers) = (response.status().as_u16(), response.headers().clone());
            Ok::<_, reqwest::Error>((status, headers, response.bytes().await?))
        };
        let (status, headers, body) = match answer.await {
            Ok(answer) => answer,
            Err(error) => return unheard(Exchange::Failed(reason(error))),
        };
        let took = began.elapsed();
        let middle = began_ms + took.as_millis() as i64 / 2;
        let date = headers.get(header::DATE).and_then(|date| date.to_str().ok()).and_then(http_date);
        Heard {
            exchange: open_envelope(status, &body, took),
            // The header counts whole seconds, and the gateway's clock is half a second further on average.
            clock_difference_ms: date.map(|seconds| seconds * 1000 + 500 - middle),
        }
    }
}

/// The causes of a failed request, without its address.
fn reason(error: reqwest::Error) -> String {
    if error.is_timeout() {
        return format!("no answer within {} s", REQUEST_PATIENCE.as_secs());
    }
    format!("{:#}", anyhow::Error::new(error.without_url()))
}

/// Takes an answer apart.
fn open_envelope<T: DeserializeOwned>(status: u16, body: &[u8], took: Duration) -> Exchange<T> {
    let envelope: Option<GatewayEnvelope> = serde_json::from_slice(body).ok();
    let success = (200..300).contains(&status);
    match envelope {
        Some(envelope) if success && envelope.kind != Kind::Error => {
            match serde_json::from_value(envelope.metadata.unwrap_or_default()) {
                Ok(metadata) => Exchange::Answer(metadata, took),
                Err(error) => Exchange::NotUnderstood(error.to_string()),
            }
        }
        Some(envelope) => {
            let text = envelope.error.unwrap_or_else(|| format!("HTTP status {status}"));
            Exchange::Refused { status, text: Some(text) }
        }
        None if success => Exchange::NotUnderstood("its answer is not a gateway's".into()),
        None => Exchange::Refused { status, text: None },
    }
}

/// Unix seconds of a date as HTTP writes it: `Sun, 06 Nov 1994 08:49:37 GMT` (RFC 9110, section 5.6.7).
fn http_date(text: &str) -> Option<i64> {
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let rest = text.split_once(", ")?.1.strip_suffix(" GMT")?;
    let mut parts = rest.split(' ');
    let day = parts.next()?;
    let name = parts.next()?;
    let month = MONTHS.iter().position(|month| *month == name)? + 1;
    let (year, time) = (parts.next()?, parts.next()?);
    let written = format!("{year}-{month:02}-{day}T{time}Z");
    let time = humantime::parse_rfc3339(&written).ok()?;
    Some(time.duration_since(UNIX_EPOCH).ok()?.as_secs() as i64)
}

fn unix_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64)
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, date_time_ymd};
    use rustls::{ServerConfig, pki_types::PrivateKeyDer};
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };
    use tokio_rustls::TlsAcceptor;

    use super::*;

    /// An authority, and a gateway made of cardboard with a certificate of it: healthy, with a clock of the year 1994,
    /// and refusing every token.
    struct Cardboard {
        folder: tempfile::TempDir,
        address: SocketAddr,
        requests: Arc<Mutex<Vec<String>>>,
        server: tokio::task::JoinHandle<()>,
    }

    impl Cardboard {
        async fn start(change: impl FnOnce(&mut CertificateParams)) -> Self {
            let key = || KeyPair::generate().expect("a key");
            let mut authority = CertificateParams::new(vec![]).expect("parameters");
            authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            let authority = CertifiedIssuer::self_signed(authority, key()).expect("an authority");
            let folder = tempfile::tempdir().expect("temporary folder");
            std::fs::write(folder.path().join("ca.crt"), authority.pem()).expect("written");
            let mut own = CertificateParams::new(vec!["127.0.0.1".into()]).expect("parameters");
            change(&mut own);
            let own_key = key();
            let certificate = own.signed_by(&own_key, &authority).expect("a certificate");
            let tls = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
                .with_safe_default_protocol_versions()
                .expect("usable")
                .with_no_client_auth()
                .with_single_cert(
                    vec![certificate.der().clone()],
                    PrivateKeyDer::try_from(own_key.serialize_der()).expect("a key"),
                )
                .expect("they belong together");
            let acceptor = TlsAcceptor::from(Arc::new(tls));
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
            let address = listener.local_addr().expect("bound");
            let requests = Arc::new(Mutex::new(Vec::new()));
            let seen = requests.clone();
            let server = tokio::spawn(async move {
                loop {
                    let (stream, _) = listener.accept().await.expect("a connection");
                    // Clients that do not believe the certificate go away.
                    let Ok(mut stream) = acceptor.accept(stream).await else { continue };
                    let mut request = vec![0; 8192];
                    let Ok(length @ 1..) = stream.read(&mut request).await else { continue };
                    let request = String::from_utf8_lossy(&request[..length]).into_owned();
                    let (status, body) = if request.starts_with("GET /1.0/status ") {
                        (
                            "200 OK",
                            r#"{"type":"sync","status":"success","status_code":200,"metadata":{"status":"healthy"}}"#,
                        )
                    } else {
                        (
                            "401 Unauthorized",
                            r#"{"type":"error","status":"failed","status_code":401,"error":"not this one"}"#,
                        )
                    };
                    seen.lock().expect("not poisoned").push(request);
                    let answer = format!(
                        "HTTP/1.1 {status}\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\nConnection: close\r\n\
                         Content-Length: {}\r\n\r\n{body}",
                        body.len()
                    );
                    stream.write_all(answer.as_bytes()).await.expect("written");
                    // The client may have gone already.
                    let _ = stream.shutdown().await;
                }
            });
            Self { folder, address, requests, server }
        }

        fn target(&self) -> Target {
            Target {
                url: format!("https://{}", self.address),
                own_stack: false,
                token: Ok(Secret::new("a-secret")),
                ca: Some(self.folder.path().join("ca.crt")),
                region: None,
                application: None,
            }
        }

        /// The certificate as it was seen, and whether the token was sent.
        async fn seen(&self, target: &Target) -> (Certificate, bool, Facts) {
            let facts = gather(target).await.expect("gathered");
            let certificate = match &facts.tls {
                Some(Ok(certificate)) => certificate.clone(),
                other => panic!("no certificate: {other:?}"),
            };
            let requests = self.requests.lock().expect("not poisoned");
            assert!(requests[0].starts_with("GET /1.0/status ") && !requests[0].contains("a-secret"));
            let sent = requests.iter().any(|request| request.contains("a-secret"));
            (certificate, sent, facts)
        }
    }

    impl Drop for Cardboard {
        fn drop(&mut self) {
            self.server.abort();
        }
    }

    #[tokio::test]
    async fn the_token_goes_to_a_gateway_that_is_believed_and_what_it_says_is_put_down() {
        let gateway = Cardboard::start(|_| {}).await;
        let (certificate, sent, facts) = gateway.seen(&gateway.target()).await;
        assert_eq!((certificate.problem, certificate.names), (None, vec!["127.0.0.1".to_owned()]));
        assert!(sent);
        assert!(matches!(&facts.status, Some(Exchange::Answer(health, _)) if health == "healthy"));
        assert!(facts.clock_difference_ms.is_some_and(|difference| difference < -1_000_000_000));
        assert!(
            matches!(&facts.diagnosis, Some(Exchange::Refused { status: 401, text: Some(text) }) if text == "not this one"),
            "{:?}",
            facts.diagnosis
        );
        assert_eq!(facts.rights, None);
    }

    #[tokio::test]
    async fn the_token_stays_here_when_the_certificate_is_not_believed() {
        let other_name = Cardboard::start(|own| {
            *own = CertificateParams::new(vec!["gateway.example".into()]).expect("parameters");
        })
        .await;
        let (certificate, sent, _) = other_name.seen(&other_name.target()).await;
        assert_eq!((certificate.problem, sent), (Some(Problem::Name), false));
        assert_eq!(certificate.names, ["gateway.example"]);

        let ended = Cardboard::start(|own| {
            own.not_before = date_time_ymd(2001, 1, 1);
            own.not_after = date_time_ymd(2002, 1, 1);
        })
        .await;
        let (certificate, sent, _) = ended.seen(&ended.target()).await;
        assert_eq!((certificate.problem, sent), (Some(Problem::Expired), false));
        assert_eq!(certificate.not_after_s, 1_009_843_200);

        let early = Cardboard::start(|own| own.not_before = date_time_ymd(3001, 1, 1)).await;
        let (certificate, sent, _) = early.seen(&early.target()).await;
        assert_eq!((certificate.problem, sent), (Some(Problem::NotYet), false));

        let fine = Cardboard::start(|_| {}).await;
        let target = Target { ca: other_name.target().ca, ..fine.target() };
        let (certificate, sent, facts) = fine.seen(&target).await;
        assert_eq!((certificate.problem, sent), (Some(Problem::Authority), false));
        assert!(facts.diagnosis.is_none() && facts.status.is_some());
    }

    #[tokio::test]
    async fn a_port_without_tls_and_a_port_without_anybody_are_told_apart() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let gateway = Cardboard::start(|_| {}).await;
        let url = format!("https://{}", listener.local_addr().expect("bound"));
        let target = Target { url, ..gateway.target() };
        let mute = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("a connection");
            stream.write_all(b"SSH-2.0-nothing of ours\r\n").await.expect("written");
        });
        let facts = gather(&target).await.expect("gathered");
        assert!(matches!(facts.tls, Some(Err(_))) && facts.status.is_none(), "{facts:?}");
        mute.await.expect("ended");
        let facts = gather(&target).await.expect("gathered");
        assert!(matches!(facts.connection, Err(NoConnection::Refused(_))), "{facts:?}");
    }

    #[test]
    fn dates_of_http_are_read_and_others_are_not() {
        assert_eq!(http_date("Sun, 06 Nov 1994 08:49:37 GMT"), Some(784_111_777));
        for bad in ["", "now", "Sun, 06 Nov 1994 08:49:37", "Sun, 6 Foo 1994 08:49:37 GMT", "Sunday, GMT"] {
            assert_eq!(http_date(bad), None, "{bad}");
        }
    }

    #[test]
    fn answers_of_gateways_proxies_and_strangers_are_told_apart() {
        let open =
            |status, body: &str| open_envelope::<ServiceStatus>(status, body.as_bytes(), Duration::ZERO);
        let good = r#"{"type":"sync","status":"success","status_code":200,"metadata":{"status":"healthy"}}"#;
        assert!(matches!(open(200, good), Exchange::Answer(status, _) if status.status == "healthy"));
        let refused = r#"{"type":"error","status":"failed","status_code":401,"error":"no token"}"#;
        let seen = open(401, refused);
        assert!(
            matches!(&seen, Exchange::Refused { status: 401, text: Some(text) } if text == "no token"),
            "{seen:?}"
        );
        assert!(matches!(open(502, "<html>Bad Gateway"), Exchange::Refused { status: 502, text: None }));
        assert!(matches!(open(200, "<html>Welcome"), Exchange::NotUnderstood(_)));
        let other = r#"{"type":"sync","status":"success","status_code":200,"metadata":[]}"#;
        assert!(matches!(open(200, other), Exchange::NotUnderstood(_)));
    }

    #[test]
    fn addresses_that_are_none_of_a_gateway_are_named() {
        for (bad, why) in [
            ("gateway.example", "relative URL"),
            ("ftp://gateway.example", "https://"),
            ("https://user:word@gateway.example", "credentials"),
        ] {
            let error = parse(bad).expect_err("not usable");
            assert!(error.contains(why), "{bad}: {error}");
        }
        let url = parse("https://[::1]:4000").expect("usable");
        assert_eq!(place(&url), ("::1".to_owned(), 4000));
    }
}
