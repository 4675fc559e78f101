//! STUN and TURN servers as a client meets them: one binding, one allocation that is given back at once.
//!
//! What an outcome means for a stream is judged elsewhere. RFC 8489 (STUN) and RFC 8656 (TURN).

use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use fanlight_api::Secret;
use futures_util::future::join_all;
use rustls::{ClientConfig, pki_types::ServerName};
use stun::{
    agent::TransactionId,
    attributes::{
        ATTR_LIFETIME, ATTR_NONCE, ATTR_REALM, ATTR_REQUESTED_TRANSPORT, ATTR_USERNAME,
        ATTR_XOR_RELAYED_ADDRESS, ATTR_XORMAPPED_ADDRESS, AttrType,
    },
    error_code::{CODE_STALE_NONCE, CODE_UNAUTHORIZED, ErrorCodeAttribute},
    fingerprint::FINGERPRINT,
    integrity::MessageIntegrity,
    message::{
        CLASS_ERROR_RESPONSE, CLASS_REQUEST, CLASS_SUCCESS_RESPONSE, Getter, METHOD_ALLOCATE, METHOD_BINDING,
        METHOD_REFRESH, Message, MessageType, Method, Setter,
    },
    textattrs::TextAttribute,
    xoraddr::XorMappedAddress,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpStream, UdpSocket, lookup_host},
    time::{sleep_until, timeout, timeout_at},
};
use tokio_rustls::TlsConnector;

/// For everything with one address of a server.
const PATIENCE: Duration = Duration::from_secs(4);
/// The first repetition of a lost datagram; each further one waits twice as long.
const FIRST_REPETITION: Duration = Duration::from_millis(250);
/// Addresses of one name that are tried, at most.
const MAX_ADDRESSES: usize = 4;
/// IANA's number of UDP, which is what relays of TURN carry.
const UDP: [u8; 4] = [17, 0, 0, 0];

/// What a server is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// Our own address as others see it.
    Stun,
    /// A relay.
    Turn,
}

/// How a server is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// Datagrams.
    Udp,
    /// A connection.
    Tcp,
    /// An encrypted connection.
    Tls,
    /// Encrypted datagrams.
    Dtls,
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Udp => "UDP",
            Self::Tcp => "TCP",
            Self::Tls => "TLS",
            Self::Dtls => "DTLS",
        })
    }
}

/// An ICE URL (RFC 7064, RFC 7065) taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IceUrl {
    /// What the server gives.
    pub service: Service,
    /// Name or address.
    pub host: String,
    /// Port.
    pub port: u16,
    /// Way there.
    pub transport: Transport,
}

impl IceUrl {
    /// Reads `stun:`, `stuns:`, `turn:` and `turns:` URLs.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn parse(url: &str) -> Result<Self, &'static str> {
        let (scheme, rest) =
            url.split_once(':').ok_or("it does not begin with stun:, stuns:, turn: or turns:")?;
        let (service, secure) = match scheme.to_ascii_lowercase().as_str() {
            "stun" => (Service::Stun, false),
            "stuns" => (Service::Stun, true),
            "turn" => (Service::Turn, false),
            "turns" => (Service::Turn, true),
            _ => return Err("it does not begin with stun:, stuns:, turn: or turns:"),
        };
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        let transport = match (query, secure) {
            ("" | "transport=udp", false) => Transport::Udp,
            ("transport=tcp", false) => Transport::Tcp,
            ("" | "transport=tcp", true) => Transport::Tls,
            ("transport=udp", true) => Transport::Dtls,
            _ => return Err("after the question mark only transport=udp or transport=tcp is known"),
        };
        let (host, port) = match place.strip_prefix('[') {
            Some(bracketed) => {
                let (host, after) = bracketed.split_once(']').ok_or("a bracket is not closed")?;
                host.parse::<std::net::Ipv6Addr>().map_err(|_| "there is no IPv6 address in the brackets")?;
                (host, after.strip_prefix(':').or(after.is_empty().then_some("")).ok_or("its port is wrong")?)
            }
            None => place.split_once(':').unwrap_or((place, "")),
        };
        if host.is_empty() {
            return Err("there is no host in it");
        }
        let port = match port {
            "" if secure => 5349,
            "" => 3478,
            port => port
                .parse()
                .ok()
                .filter(|port| *port > 0)
                .ok_or("its port is not a number from 1 to 65535")?,
        };
        Ok(Self { service, host: host.to_owned(), port, transport })
    }
}

/// What became of trying a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It gave an address: ours as it sees it, or that of a relay.
    Given {
        /// The address.
        address: SocketAddr,
        /// Round trip of the request that gave it.
        took: Duration,
    },
    /// It answers and refuses.
    Refused {
        /// STUN error code; 0 when the answer makes no sense.
        code: u16,
        /// In its words, or ours.
        reason: String,
    },
    /// Nothing came back.
    Silent,
    /// The system or a machine on the way says that there is no way, or nobody there.
    Unreachable(String),
    /// The name has no address.
    Unresolved(String),
    /// It was not tried, because of what the gateway told about it.
    Unusable(String),
}

impl Outcome {
    /// Whether the server gave what it was asked for.
    pub fn is_good(&self) -> bool {
        matches!(self, Self::Given { .. })
    }

    /// Whether the server answered, be it with a refusal.
    pub fn is_answer(&self) -> bool {
        matches!(self, Self::Given { .. } | Self::Refused { .. })
    }

    /// Later ones say more about a server that has several addresses.
    fn weight(&self) -> u8 {
        match self {
            Self::Unusable(_) | Self::Unresolved(_) => 0,
            Self::Unreachable(_) => 1,
            Self::Silent => 2,
            Self::Refused { .. } => 3,
            Self::Given { .. } => 4,
        }
    }
}

/// User and password of a TURN server.
#[derive(Clone, Debug)]
pub struct Credentials {
    /// User.
    pub username: String,
    /// Password.
    pub password: Secret,
}

/// Tries a server on all its addresses at once; the best outcome of them.
pub async fn try_server(url: &IceUrl, credentials: Option<&Credentials>, tls: &Arc<ClientConfig>) -> Outcome {
    if url.transport == Transport::Dtls {
        return Outcome::Unusable("TURN over DTLS cannot be tried from here".into());
    }
    if url.service == Service::Turn && credentials.is_none() {
        return Outcome::Unusable("the gateway gave no user and password for it".into());
    }
    let addresses = match timeout(PATIENCE, lookup_host((url.host.as_str(), url.port))).await {
        Err(_) => return Outcome::Unresolved("the name server does not answer".into()),
        Ok(Err(error)) => return Outcome::Unresolved(error.to_string()),
        Ok(Ok(addresses)) => addresses.take(MAX_ADDRESSES).collect::<Vec<_>>(),
    };
    let outcomes = join_all(addresses.into_iter().map(|address| async move {
        let end = tokio::time::Instant::now() + PATIENCE;
        match timeout_at(end, try_address(url, address, credentials, tls)).await {
            Err(_) => Outcome::Silent,
            Ok(Ok(outcome)) => outcome,
            Ok(Err(Failure::Link(error))) if error.kind() == io::ErrorKind::ConnectionRefused => {
                Outcome::Unreachable(format!("nothing listens at {address}"))
            }
            Ok(Err(Failure::Link(error))) => Outcome::Unreachable(error.to_string()),
            Ok(Err(Failure::Talk(reason))) => Outcome::Refused { code: 0, reason },
        }
    }))
    .await;
    outcomes
        .into_iter()
        .max_by_key(Outcome::weight)
        .unwrap_or_else(|| Outcome::Unresolved("the name has no address".into()))
}

/// Why an exchange has no outcome.
#[derive(Debug)]
enum Failure {
    /// The way there.
    Link(io::Error),
    /// What came makes no sense.
    Talk(String),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Link(error)
    }
}

impl From<stun::Error> for Failure {
    fn from(error: stun::Error) -> Self {
        Self::Talk(format!("its answer cannot be understood: {error}"))
    }
}

async fn try_address(
    url: &IceUrl,
    address: SocketAddr,
    credentials: Option<&Credentials>,
    tls: &Arc<ClientConfig>,
) -> Result<Outcome, Failure> {
    let mut link = Link::open(url, address, tls).await?;
    match (url.service, credentials) {
        (Service::Turn, Some(credentials)) => allocate(&mut link, credentials).await,
        _ => bind(&mut link).await,
    }
}

async fn bind(link: &mut Link) -> Result<Outcome, Failure> {
    let (answer, took) = link.ask(&request(METHOD_BINDING, &[])?).await?;
    Ok(match refusal(&answer) {
        Some((code, reason)) => Outcome::Refused { code, reason },
        None => Outcome::Given { address: address_in(&answer, ATTR_XORMAPPED_ADDRESS)?, took },
    })
}

/// Asks for a relay, first without credentials to learn realm and nonce, then with them.
async fn allocate(link: &mut Link, credentials: &Credentials) -> Result<Outcome, Failure> {
    let wanted = (ATTR_REQUESTED_TRANSPORT, UDP.to_vec());
    let (mut answer, mut took) =
        link.ask(&request(METHOD_ALLOCATE, &[Attribute::Raw(wanted.clone())])?).await?;
    let mut login = None;
    // A nonce may go stale between two requests, but not for ever.
    for _ in 0..2 {
        match refusal(&answer) {
            Some((code, _))
                if code == CODE_STALE_NONCE.0 || (code == CODE_UNAUTHORIZED.0 && login.is_none()) =>
            {
                let current = Login::new(credentials, &answer)?;
                let message =
                    request(METHOD_ALLOCATE, &[Attribute::Raw(wanted.clone()), Attribute::Login(&current)])?;
                (answer, took) = link.ask(&message).await?;
                login = Some(current);
            }
            _ => break,
        }
    }
    if let Some((code, reason)) = refusal(&answer) {
        return Ok(Outcome::Refused { code, reason });
    }
    if let Some(login) = &login
        && login.integrity.check(&mut answer).is_err()
    {
        return Ok(Outcome::Refused {
            code: 0,
            reason: "its answer is not signed with this password".into(),
        });
    }
    let address = address_in(&answer, ATTR_XOR_RELAYED_ADDRESS)?;
    give_back(link, login.as_ref()).await;
    Ok(Outcome::Given { address, took })
}

/// Ends the allocation. It would end by itself after ten minutes, so nobody minds when this fails.
async fn give_back(link: &mut Link, login: Option<&Login>) {
    let mut attributes = vec![Attribute::Raw((ATTR_LIFETIME, vec![0; 4]))];
    attributes.extend(login.map(Attribute::Login));
    if let Ok(message) = request(METHOD_REFRESH, &attributes) {
        let _ = timeout(Duration::from_millis(500), link.ask(&message)).await;
    }
}

/// Long-term credentials in the realm of a server.
struct Login {
    username: TextAttribute,
    realm: TextAttribute,
    nonce: TextAttribute,
    integrity: MessageIntegrity,
}

impl Login {
    fn new(credentials: &Credentials, refusal: &Message) -> Result<Self, Failure> {
        let realm = TextAttribute::get_from_as(refusal, ATTR_REALM)?;
        let nonce = TextAttribute::get_from_as(refusal, ATTR_NONCE)?;
        let integrity = MessageIntegrity::new_long_term_integrity(
            credentials.username.clone(),
            realm.text.clone(),
            credentials.password.expose().to_owned(),
        );
        let username = TextAttribute::new(ATTR_USERNAME, credentials.username.clone());
        Ok(Self { username, realm, nonce, integrity })
    }
}

enum Attribute<'a> {
    Raw((AttrType, Vec<u8>)),
    Login(&'a Login),
}

fn request(method: Method, attributes: &[Attribute<'_>]) -> Result<Message, Failure> {
    let mut message = Message::new();
    message.build(&[
        Box::new(TransactionId::new()) as Box<dyn Setter>,
        Box::new(MessageType::new(method, CLASS_REQUEST)),
    ])?;
    for attribute in attributes {
        match attribute {
            Attribute::Raw((kind, value)) => message.add(*kind, value),
            // The integrity covers what stands before it and comes last for that.
            Attribute::Login(login) => {
                let parts: [&dyn Setter; 4] = [&login.username, &login.realm, &login.nonce, &login.integrity];
                for part in parts {
                    part.add_to(&mut message)?;
                }
            }
        }
    }
    FINGERPRINT.add_to(&mut message)?;
    Ok(message)
}

/// Code and words of an error response.
fn refusal(answer: &Message) -> Option<(u16, String)> {
    if answer.typ.class == CLASS_SUCCESS_RESPONSE {
        return None;
    }
    let mut error = ErrorCodeAttribute::default();
    Some(match error.get_from(answer) {
        // Words of a stranger: what could move a terminal's cursor is left out.
        Ok(()) => {
            let words = String::from_utf8_lossy(&error.reason);
            (error.code.0, words.chars().filter(|c| !c.is_control()).take(80).collect())
        }
        Err(_) => (0, "it refuses without a reason".into()),
    })
}

fn address_in(answer: &Message, kind: AttrType) -> Result<SocketAddr, Failure> {
    let mut found = XorMappedAddress { ip: IpAddr::from([0, 0, 0, 0]), port: 0 };
    found.get_from_as(answer, kind)?;
    Ok(SocketAddr::new(found.ip, found.port))
}

trait Connection: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Connection for T {}

/// The way to one address of a server.
enum Link {
    Datagrams(UdpSocket),
    Stream(Box<dyn Connection>),
}

impl Link {
    async fn open(url: &IceUrl, address: SocketAddr, tls: &Arc<ClientConfig>) -> io::Result<Self> {
        if url.transport == Transport::Udp {
            let any: SocketAddr =
                if address.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
            let socket = UdpSocket::bind(any).await?;
            // Connected, so that the system tells when nobody listens there.
            socket.connect(address).await?;
            return Ok(Self::Datagrams(socket));
        }
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        if url.transport == Transport::Tcp {
            return Ok(Self::Stream(Box::new(stream)));
        }
        let name = ServerName::try_from(url.host.clone())
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        Ok(Self::Stream(Box::new(TlsConnector::from(tls.clone()).connect(name, stream).await?)))
    }

    /// Sends a request, again and again where datagrams may be lost, until its answer is there. Whoever calls limits
    /// the time.
    async fn ask(&mut self, message: &Message) -> Result<(Message, Duration), Failure> {
        match self {
            Self::Datagrams(socket) => {
                let mut pause = FIRST_REPETITION;
                let mut buffer = vec![0; 2048];
                loop {
                    let sent = Instant::now();
                    socket.send(&message.raw).await?;
                    let next = tokio::time::Instant::now() + pause;
                    pause *= 2;
                    loop {
                        let length = tokio::select! {
                            length = socket.recv(&mut buffer) => length?,
                            () = sleep_until(next) => break,
                        };
                        if let Some(answer) = answer_to(message, &buffer[..length]) {
                            return Ok((answer, sent.elapsed()));
                        }
                    }
                }
            }
            Self::Stream(stream) => {
                let sent = Instant::now();
                stream.write_all(&message.raw).await?;
                stream.flush().await?;
                loop {
                    let mut bytes = vec![0; 20];
                    stream.read_exact(&mut bytes).await?;
                    if !stun::message::is_message(&bytes) {
                        return Err(Failure::Talk("what answers there is no STUN or TURN server".into()));
                    }
                    let length = usize::from(u16::from_be_bytes([bytes[2], bytes[3]]));
                    bytes.resize(20 + length, 0);
                    stream.read_exact(&mut bytes[20..]).await?;
                    if let Some(answer) = answer_to(message, &bytes) {
                        return Ok((answer, sent.elapsed()));
                    }
                }
            }
        }
    }
}

/// The answer in these bytes, if they are one to this request. Anything else on the port is somebody else's.
fn answer_to(request: &Message, bytes: &[u8]) -> Option<Message> {
    let mut message = Message::new();
    message.unmarshal_binary(bytes).ok()?;
    let answers = matches!(message.typ.class, CLASS_SUCCESS_RESPONSE | CLASS_ERROR_RESPONSE);
    (answers && message.typ.method == request.typ.method && message.transaction_id == request.transaction_id)
        .then_some(message)
}

#[cfg(test)]
mod tests {
    use std::{
        process::{Child, Command, Stdio},
        sync::atomic::{AtomicU32, Ordering},
    };

    use super::*;

    #[test]
    fn ice_urls_are_read_as_the_rfcs_write_them() {
        use Service::{Stun, Turn};
        use Transport::{Dtls, Tcp, Tls, Udp};
        for (text, service, host, port, transport) in [
            ("stun:s.example", Stun, "s.example", 3478, Udp),
            ("STUN:s.example:3479", Stun, "s.example", 3479, Udp),
            ("turn:192.0.2.1:443?transport=tcp", Turn, "192.0.2.1", 443, Tcp),
            ("turn:[2001:db8::1]?transport=udp", Turn, "2001:db8::1", 3478, Udp),
            ("turns:[2001:db8::1]:443", Turn, "2001:db8::1", 443, Tls),
            ("turns:t.example?transport=udp", Turn, "t.example", 5349, Dtls),
        ] {
            let read = IceUrl::parse(text).expect(text);
            assert_eq!(read, IceUrl { service, host: host.into(), port, transport }, "{text}");
        }
        for (bad, why) in [
            ("", "begin with"),
            ("http://t.example", "begin with"),
            ("turn:", "no host"),
            ("turn:t:0", "port"),
            ("turn:t:x", "port"),
            ("turn:t:70000", "port"),
            ("turn:[::1", "bracket"),
            ("turn:[t]:1", "IPv6"),
            ("turn:[::1]1", "port"),
            ("turn:t?transport=sctp", "transport="),
        ] {
            let error = IceUrl::parse(bad).expect_err(bad);
            assert!(error.contains(why), "{bad}: {error}");
        }
    }

    /// Coturn on loopback, ended with the test.
    struct Coturn {
        process: Child,
        port: u16,
        folder: tempfile::TempDir,
    }

    impl Coturn {
        async fn start() -> Self {
            let folder = tempfile::tempdir().expect("temporary folder");
            let port = std::net::UdpSocket::bind("127.0.0.1:0")
                .and_then(|socket| socket.local_addr())
                .expect("a free port")
                .port();
            let in_folder = |name: &str| folder.path().join(name).display().to_string();
            let process = Command::new("turnserver")
                .args(["-n", "--listening-ip=127.0.0.1", "--relay-ip=127.0.0.1", "--no-tls", "--no-dtls"])
                .args([
                    "--no-cli",
                    "--lt-cred-mech",
                    "--user=u:right",
                    "--realm=test",
                    "--allow-loopback-peers",
                ])
                .args(["--verbose", "--simple-log"])
                .arg(format!("--log-file={}", in_folder("log")))
                .arg(format!("--listening-port={port}"))
                .arg(format!("--pidfile={}", in_folder("pid")))
                .arg(format!("--userdb={}", in_folder("db")))
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .expect("turnserver is installed (package coturn)");
            let this = Self { process, port, folder };
            let end = Instant::now() + Duration::from_secs(20);
            while TcpStream::connect(("127.0.0.1", port)).await.is_err() {
                assert!(Instant::now() < end, "turnserver does not listen");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            this
        }

        /// Relays that were ended by their client.
        fn given_back(&self) -> usize {
            let log = std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
            log.lines().filter(|line| line.contains("refreshed") && line.contains("lifetime=0")).count()
        }

        async fn tried(&self, url: &str, password: &str) -> Outcome {
            let url = IceUrl::parse(&url.replace("PORT", &self.port.to_string())).expect("valid");
            let credentials = Credentials { username: "u".into(), password: Secret::new(password) };
            try_server(&url, Some(&credentials), &no_tls()).await
        }
    }

    impl Drop for Coturn {
        fn drop(&mut self) {
            // It may have ended by itself.
            let _ = self.process.kill();
            let _ = self.process.wait();
        }
    }

    fn no_tls() -> Arc<ClientConfig> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("usable")
            .with_root_certificates(rustls::RootCertStore::empty())
            .with_no_client_auth();
        Arc::new(config)
    }

    #[tokio::test]
    async fn coturn_gives_addresses_and_relays_over_udp_and_tcp_and_refuses_a_wrong_password() {
        let coturn = Coturn::start().await;
        for url in [
            "stun:127.0.0.1:PORT",
            "turn:127.0.0.1:PORT",
            "turn:127.0.0.1:PORT?transport=tcp",
            "turn:localhost:PORT?transport=udp",
        ] {
            let outcome = coturn.tried(url, "right").await;
            assert!(
                matches!(&outcome, Outcome::Given { address, .. } if address.ip().is_loopback() && address.port() > 0),
                "{url}: {outcome:?}"
            );
            assert!(outcome.is_good() && outcome.is_answer());
        }
        let end = Instant::now() + Duration::from_secs(20);
        while coturn.given_back() < 3 {
            assert!(Instant::now() < end, "{} of 3 relays were given back", coturn.given_back());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        for url in ["turn:127.0.0.1:PORT", "turn:127.0.0.1:PORT?transport=tcp"] {
            let outcome = coturn.tried(url, "wrong").await;
            assert!(matches!(outcome, Outcome::Refused { code: 401, .. }), "{url}: {outcome:?}");
            assert!(!outcome.is_good() && outcome.is_answer());
        }
    }

    #[tokio::test]
    async fn servers_that_are_silent_away_or_something_else_are_told_apart() {
        // Nobody reads from this socket, so nothing ever comes back.
        let mute = UdpSocket::bind("127.0.0.1:0").await.expect("bound");
        let port = mute.local_addr().expect("bound").port();
        let stun = |port: u16| IceUrl::parse(&format!("stun:127.0.0.1:{port}")).expect("valid");
        assert_eq!(try_server(&stun(port), None, &no_tls()).await, Outcome::Silent);
        drop(mute);
        let away = try_server(&stun(port), None, &no_tls()).await;
        assert!(
            matches!(&away, Outcome::Unreachable(reason) if reason.contains("nothing listens")),
            "{away:?}"
        );

        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let port = listener.local_addr().expect("bound").port();
        let web = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("connected");
            stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.expect("written");
        });
        let turn = IceUrl::parse(&format!("turn:127.0.0.1:{port}?transport=tcp")).expect("valid");
        let credentials = Credentials { username: "u".into(), password: Secret::new("p") };
        let other = try_server(&turn, Some(&credentials), &no_tls()).await;
        assert!(
            matches!(&other, Outcome::Refused { code: 0, reason } if reason.contains("no STUN or TURN")),
            "{other:?}"
        );
        web.await.expect("ended");

        let without = try_server(&turn, None, &no_tls()).await;
        assert!(
            matches!(&without, Outcome::Unusable(reason) if reason.contains("user and password")),
            "{without:?}"
        );
        let nowhere = IceUrl::parse("stun:nowhere.invalid").expect("valid");
        assert!(matches!(try_server(&nowhere, None, &no_tls()).await, Outcome::Unresolved(_)));
    }

    #[tokio::test]
    async fn a_lost_datagram_is_sent_again_and_strangers_are_not_believed() {
        let server = UdpSocket::bind("127.0.0.1:0").await.expect("bound");
        let port = server.local_addr().expect("bound").port();
        let seen = Arc::new(AtomicU32::new(0));
        let counted = seen.clone();
        let task = tokio::spawn(async move {
            let mut buffer = [0; 1500];
            loop {
                let (length, from) = server.recv_from(&mut buffer).await.expect("received");
                if counted.fetch_add(1, Ordering::Relaxed) == 0 {
                    // Lost; what comes in its place is noise.
                    server.send_to(b"noise", from).await.expect("sent");
                    continue;
                }
                let mut request = Message::new();
                request.unmarshal_binary(&buffer[..length]).expect("a STUN message");
                for id in [TransactionId::new(), request.transaction_id] {
                    let mut answer = Message::new();
                    let kind = MessageType::new(METHOD_BINDING, CLASS_SUCCESS_RESPONSE);
                    answer.build(&[Box::new(id) as Box<dyn Setter>, Box::new(kind)]).expect("built");
                    let port = if id == request.transaction_id { from.port() } else { 1 };
                    XorMappedAddress { ip: from.ip(), port }.add_to(&mut answer).expect("added");
                    server.send_to(&answer.raw, from).await.expect("sent");
                }
            }
        });
        let url = IceUrl::parse(&format!("stun:127.0.0.1:{port}")).expect("valid");
        let outcome = try_server(&url, None, &no_tls()).await;
        task.abort();
        assert!(matches!(&outcome, Outcome::Given { address, .. } if address.port() != 1), "{outcome:?}");
        assert!(seen.load(Ordering::Relaxed) >= 2);
    }
}
