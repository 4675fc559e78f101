//! A TURN and STUN server inside the agent, for one machine without a Coturn (design section 4), over UDP.
//!
//! Allocations, permissions, channels and the relaying itself are the `turn` crate's. What it leaves open is settled
//! here before it sees a packet: who may come in and for how long, how much there may be of everything, and where
//! packets may go. No type of that crate leaves this module.

use std::{
    collections::{BTreeSet, HashMap},
    net::{IpAddr, SocketAddr, UdpSocket as StdUdpSocket},
    ops::RangeInclusive,
    panic::AssertUnwindSafe,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use fanlight_api::Secret;
use fanlight_service::{Shutdown, shutdown::panic_text};
use futures_util::FutureExt;
use hmac::{Hmac, Mac};
use sha2::Sha256;
use stun::{
    agent::TransactionId,
    attributes::{
        ATTR_EVEN_PORT, ATTR_MESSAGE_INTEGRITY, ATTR_NONCE, ATTR_REALM, ATTR_RESERVATION_TOKEN,
        ATTR_USERNAME, ATTR_XOR_PEER_ADDRESS, AttrType, Attributes,
    },
    error_code::{
        CODE_ALLOC_MISMATCH, CODE_ALLOC_QUOTA_REACHED, CODE_BAD_REQUEST, CODE_FORBIDDEN,
        CODE_INSUFFICIENT_CAPACITY, CODE_STALE_NONCE, CODE_UNAUTHORIZED, CODE_WRONG_CREDENTIALS, ErrorCode,
        ErrorCodeAttribute,
    },
    integrity::MessageIntegrity,
    message::{
        CLASS_ERROR_RESPONSE, CLASS_INDICATION, CLASS_REQUEST, CLASS_SUCCESS_RESPONSE, Getter,
        METHOD_ALLOCATE, METHOD_BINDING, METHOD_CHANNEL_BIND, METHOD_CREATE_PERMISSION, METHOD_REFRESH,
        METHOD_SEND, Message, MessageType, Setter,
    },
    textattrs::TextAttribute,
    xoraddr::XorMappedAddress,
};
use tokio::{net::UdpSocket, sync::Mutex};
use turn::{
    allocation::{
        allocation_manager::{Manager, ManagerConfig},
        five_tuple::FiveTuple,
    },
    auth::{AuthHandler, generate_auth_key},
    proto::{
        PROTO_UDP,
        chandata::ChannelData,
        lifetime::{DEFAULT_LIFETIME, Lifetime},
        peeraddr::PeerAddress,
        relayaddr::RelayedAddress,
    },
    relay::RelayAddressGenerator,
    server::request::Request,
};
use webrtc_util::Conn;

use crate::{
    turn::{Peers, parse_username, password, read_secret},
    unix_seconds,
};

/// No packet of WebRTC is longer.
const MOST_BYTES: usize = 2048;
/// As RFC 8656 recommends.
const NONCE_LIFETIME: Duration = Duration::from_secs(3600);
/// Longer ones are not granted (RFC 8656 section 7.2).
const LONGEST_LIFETIME: Duration = Duration::from_secs(3600);
const CHANNEL_LIFETIME: Duration = Duration::from_secs(600);
/// A browser asks for each candidate of the instance, of which there are few.
const MOST_PEERS: usize = 32;
const SECRET_BYTES: usize = 32;

/// What the server should be.
#[derive(Clone, Debug)]
pub struct Embedded {
    pub listen: SocketAddr,
    /// What clients are told to reach, relay ports included.
    pub public: IpAddr,
    pub relay_ports: RangeInclusive<u16>,
    pub realm: String,
    pub peers: Peers,
    /// Most allocations.
    pub most: usize,
    pub most_per_session: usize,
}

/// A running server, as the rest of the agent sees it.
pub struct Running {
    /// Where clients reach it.
    pub address: SocketAddr,
    secret: SecretSource,
}

/// Where the secret is.
#[derive(Clone)]
enum SecretSource {
    Memory(Secret),
    File(PathBuf),
}

impl SecretSource {
    fn read(&self) -> Result<Secret, String> {
        match self {
            Self::Memory(secret) => Ok(secret.clone()),
            Self::File(path) => {
                read_secret(path).map_err(|error| format!("the secret {}: {error}", path.display()))
            }
        }
    }
}

impl Running {
    /// For credentials.
    pub fn secret(&self) -> Result<Secret, String> {
        self.secret.read()
    }

    /// For clients that relay.
    pub fn url(&self) -> String {
        format!("turn:{}?transport=udp", self.address)
    }
}

/// Starts the server; it ends with `shutdown`, and with it everything that it relays. Without `secret_file` the
/// secret lives as long as the server: its allocations do not live longer either.
pub fn start(settings: Embedded, secret_file: &Path, shutdown: &Shutdown) -> std::io::Result<Running> {
    let secret = if secret_file.as_os_str().is_empty() {
        SecretSource::Memory(Secret::new(hex::encode(rand::random::<[u8; SECRET_BYTES]>())))
    } else {
        SecretSource::File(secret_file.to_owned())
    };
    let socket = StdUdpSocket::bind(settings.listen)?;
    socket.set_nonblocking(true)?;
    let listen = socket.local_addr()?;
    let address = SocketAddr::new(settings.public, listen.port());
    let relays =
        RelayPorts { listen: listen.ip(), public: settings.public, ports: settings.relay_ports.clone() };
    let mut server = Server {
        socket: Arc::new(UdpSocket::from_std(socket)?),
        listen,
        allocations: Arc::new(Manager::new(ManagerConfig {
            relay_addr_generator: Box::new(relays),
            alloc_close_notify: None,
        })),
        clients: HashMap::new(),
        secret: secret.clone(),
        nonces: Nonces { key: rand::random(), begun: Instant::now() },
        settings,
    };
    let token = shutdown.token().clone();
    shutdown.spawn("TURN", async move {
        token.run_until_cancelled(server.serve()).await;
        // Clients notice by silence and look for another way; there is no farewell in TURN.
        if let Err(error) = server.allocations.close().await {
            tracing::debug!("closing allocations: {error}");
        }
    });
    tracing::info!("TURN over UDP on {listen} for clients that reach {address}");
    Ok(Running { address, secret })
}

struct Server {
    socket: Arc<UdpSocket>,
    listen: SocketAddr,
    allocations: Arc<Manager>,
    /// Those with an allocation, by their address; also some whose allocation has ended since.
    clients: HashMap<SocketAddr, Client>,
    secret: SecretSource,
    nonces: Nonces,
    settings: Embedded,
}

/// Somebody with an allocation. Its credentials hold as long as the allocation: a stream does not break because they
/// expire, or because the secret is changed.
struct Client {
    username: String,
    session: String,
    key: Vec<u8>,
    /// Of the request that made the allocation.
    transaction: TransactionId,
    peers: BTreeSet<IpAddr>,
}

/// A request that is not passed on.
struct Refusal {
    code: ErrorCode,
    /// Sign the answer: the asker has proved who it is.
    key: Option<Vec<u8>>,
}

impl From<ErrorCode> for Refusal {
    fn from(code: ErrorCode) -> Self {
        Self { code, key: None }
    }
}

/// A request that is passed on.
struct Admitted {
    username: String,
    session: String,
    key: Vec<u8>,
    nonce: String,
}

impl Server {
    async fn serve(&mut self) {
        let mut buffer = vec![0; MOST_BYTES];
        loop {
            let (length, from) = match self.socket.recv_from(&mut buffer).await {
                Ok(received) => received,
                Err(error) => {
                    // Nothing that one packet does ends the socket.
                    tracing::debug!("receiving for TURN: {error}");
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    continue;
                }
            };
            let packet = buffer[..length].to_vec();
            match AssertUnwindSafe(self.take(packet, from)).catch_unwind().await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!("a packet for TURN: {error}"),
                Err(panic) => tracing::error!("a packet for TURN: panic: {}", panic_text(&*panic)),
            }
        }
    }

    async fn take(&mut self, packet: Vec<u8>, from: SocketAddr) -> Result<(), turn::Error> {
        if ChannelData::is_channel_data(&packet) {
            // Goes to a peer that was admitted when the channel was bound.
            return self.pass(packet, from, None).await;
        }
        let mut message = Message { raw: packet.clone(), ..Default::default() };
        message.decode()?;
        match (message.typ.class, message.typ.method) {
            (CLASS_REQUEST, METHOD_BINDING) => self.pass(packet, from, None).await,
            // Permissions are for addresses; the port is told only here.
            (CLASS_INDICATION, METHOD_SEND) => match peers(&message)?[..] {
                [peer] if Peers::allow_port(peer.port()) => self.pass(packet, from, None).await,
                _ => Ok(()),
            },
            (
                CLASS_REQUEST,
                METHOD_ALLOCATE | METHOD_REFRESH | METHOD_CREATE_PERMISSION | METHOD_CHANNEL_BIND,
            ) => match self.admit(&message, from).await {
                Ok(admitted) => {
                    if let Some(answer) = self.answer_again(&message, from, &admitted).await? {
                        self.socket.send_to(&answer.raw, from).await?;
                        return Ok(());
                    }
                    let passed = self.pass(packet, from, Some(&admitted)).await;
                    self.note(&message, from, admitted).await;
                    passed
                }
                Err(refusal) => {
                    let answer = self.refusal(&message, from, refusal)?;
                    self.socket.send_to(&answer.raw, from).await?;
                    Ok(())
                }
            },
            _ => Ok(()),
        }
    }

    /// Whether a request may be passed on, and who sent it.
    async fn admit(&mut self, message: &Message, from: SocketAddr) -> Result<Admitted, Refusal> {
        if !message.contains(ATTR_MESSAGE_INTEGRITY) {
            return Err(CODE_UNAUTHORIZED.into());
        }
        let text = |kind: AttrType| match TextAttribute::get_from_as(message, kind) {
            Ok(attribute) => Ok(attribute.text),
            Err(_) => Err(CODE_BAD_REQUEST),
        };
        let (username, realm, nonce) = (text(ATTR_USERNAME)?, text(ATTR_REALM)?, text(ATTR_NONCE)?);
        if realm != self.settings.realm {
            return Err(CODE_UNAUTHORIZED.into());
        }
        if !self.nonces.holds(&nonce, from.ip()) {
            return Err(CODE_STALE_NONCE.into());
        }
        if !self.has_allocation(from).await {
            self.clients.remove(&from);
        }
        let (session, key) = match self.clients.get(&from) {
            Some(client) if client.username == username => (client.session.clone(), client.key.clone()),
            Some(_) => return Err(CODE_WRONG_CREDENTIALS.into()),
            None => {
                let (expires_at, session) = parse_username(&username).ok_or(CODE_UNAUTHORIZED)?;
                if expires_at <= unix_seconds() {
                    return Err(CODE_UNAUTHORIZED.into());
                }
                let secret = self.secret.read().map_err(|error| {
                    tracing::error!("TURN refuses everybody: {error}");
                    CODE_UNAUTHORIZED
                })?;
                let password = password(&secret, &username);
                (session.to_owned(), generate_auth_key(&username, &realm, password.expose()))
            }
        };
        MessageIntegrity(key.clone()).check(&mut message.clone()).map_err(|_| CODE_UNAUTHORIZED)?;
        let signed = |code| Refusal { code, key: Some(key.clone()) };
        match (self.clients.contains_key(&from), message.typ.method) {
            (false, METHOD_ALLOCATE) => self.check_quota(message, &session).await.map_err(signed)?,
            (false, _) => return Err(signed(CODE_ALLOC_MISMATCH)),
            (true, METHOD_ALLOCATE | METHOD_REFRESH) => {}
            (true, _) => self.check_peers(message, from).map_err(signed)?,
        }
        Ok(Admitted { username, session, key, nonce })
    }

    async fn check_quota(&mut self, message: &Message, session: &str) -> Result<(), ErrorCode> {
        // Pairs of ports are for RTP without multiplexing, which browsers no longer do.
        if message.contains(ATTR_EVEN_PORT) || message.contains(ATTR_RESERVATION_TOKEN) {
            return Err(CODE_INSUFFICIENT_CAPACITY);
        }
        let live = self.allocations.get_allocations_info(None).await;
        let live: BTreeSet<SocketAddr> = live.into_keys().map(|tuple| tuple.src_addr).collect();
        self.clients.retain(|address, _| live.contains(address));
        let of_session = self.clients.values().filter(|client| client.session == session).count();
        if of_session >= self.settings.most_per_session {
            tracing::warn!(
                session.id = session,
                "session {session} has {of_session} TURN allocations, no more are given"
            );
            return Err(CODE_ALLOC_QUOTA_REACHED);
        }
        if self.clients.len() >= self.settings.most {
            tracing::warn!(
                "{} TURN allocations are all that are allowed; further ones are refused",
                self.clients.len()
            );
            return Err(CODE_INSUFFICIENT_CAPACITY);
        }
        Ok(())
    }

    fn check_peers(&mut self, message: &Message, from: SocketAddr) -> Result<(), ErrorCode> {
        let wanted = peers(message).map_err(|_| CODE_BAD_REQUEST)?;
        let binds = message.typ.method == METHOD_CHANNEL_BIND;
        for peer in &wanted {
            let port = !binds || Peers::allow_port(peer.port());
            if !port || !self.settings.peers.allow(peer.ip(), is_own) {
                tracing::warn!("TURN does not relay to {peer}");
                return Err(CODE_FORBIDDEN);
            }
        }
        let client = self.clients.get_mut(&from).ok_or(CODE_ALLOC_MISMATCH)?;
        let mut peers = client.peers.clone();
        peers.extend(wanted.iter().map(SocketAddr::ip));
        if peers.len() > MOST_PEERS {
            return Err(CODE_INSUFFICIENT_CAPACITY);
        }
        client.peers = peers;
        Ok(())
    }

    /// Remembers who has got an allocation, forgets who has given it back.
    async fn note(&mut self, message: &Message, from: SocketAddr, admitted: Admitted) {
        if !self.has_allocation(from).await {
            self.clients.remove(&from);
        } else if message.typ.method == METHOD_ALLOCATE {
            let Admitted { username, session, key, .. } = admitted;
            let transaction = message.transaction_id;
            let peers = BTreeSet::new();
            self.clients.entry(from).or_insert(Client { username, session, key, transaction, peers });
        }
    }

    /// Hands a packet to the `turn` crate.
    async fn pass(
        &self,
        packet: Vec<u8>,
        from: SocketAddr,
        admitted: Option<&Admitted>,
    ) -> Result<(), turn::Error> {
        // The crate keeps every nonce that it gives out for ever; ours need not be kept, and it knows the one that
        // was checked.
        let nonces = admitted.map(|admitted| (admitted.nonce.clone(), tokio::time::Instant::now()));
        let mut request = Request {
            conn: self.socket.clone(),
            src_addr: from,
            buff: packet,
            allocation_manager: self.allocations.clone(),
            nonces: Arc::new(Mutex::new(nonces.into_iter().collect())),
            auth_handler: Arc::new(Known(admitted.map(|admitted| admitted.key.clone()))),
            realm: self.settings.realm.clone(),
            channel_bind_timeout: CHANNEL_LIFETIME,
        };
        request.handle_request().await
    }

    /// The answer to a request for an allocation that was answered before, whose first answer was lost. The crate
    /// would say that there is an allocation already, and the client would try somewhere else.
    async fn answer_again(
        &self,
        message: &Message,
        from: SocketAddr,
        admitted: &Admitted,
    ) -> Result<Option<Message>, stun::Error> {
        let again = |client: &Client| client.transaction == message.transaction_id;
        if message.typ.method != METHOD_ALLOCATE || !self.clients.get(&from).is_some_and(again) {
            return Ok(None);
        }
        let tuple = self.listen_tuple(from);
        let found = self.allocations.get_allocations_info(Some(vec![tuple])).await.remove(&tuple);
        found.map(|allocation| allocated(message, from, allocation.relay_addr, &admitted.key)).transpose()
    }

    fn refusal(&self, message: &Message, from: SocketAddr, refusal: Refusal) -> Result<Message, stun::Error> {
        let Refusal { code, key } = refusal;
        let mut parts: Vec<Box<dyn Setter>> = vec![
            Box::new(Message { transaction_id: message.transaction_id, ..Default::default() }),
            Box::new(MessageType::new(message.typ.method, CLASS_ERROR_RESPONSE)),
            Box::new(ErrorCodeAttribute { code, reason: Vec::new() }),
        ];
        if code == CODE_UNAUTHORIZED || code == CODE_STALE_NONCE {
            let nonce = self.nonces.make(from.ip());
            parts.push(Box::new(TextAttribute { attr: ATTR_NONCE, text: nonce }));
            parts.push(Box::new(TextAttribute { attr: ATTR_REALM, text: self.settings.realm.clone() }));
        }
        if let Some(key) = key {
            parts.push(Box::new(MessageIntegrity(key)));
        }
        let mut answer = Message::new();
        answer.build(&parts)?;
        Ok(answer)
    }

    async fn has_allocation(&self, from: SocketAddr) -> bool {
        self.allocations.get_allocation(&self.listen_tuple(from)).await.is_some()
    }

    fn listen_tuple(&self, from: SocketAddr) -> FiveTuple {
        FiveTuple { protocol: PROTO_UDP, src_addr: from, dst_addr: self.listen }
    }
}

/// The answer to a request for an allocation, as the crate makes it.
fn allocated(
    message: &Message,
    from: SocketAddr,
    relay: SocketAddr,
    key: &[u8],
) -> Result<Message, stun::Error> {
    let mut wanted = Lifetime::default();
    let lifetime = match wanted.get_from(message) {
        Ok(()) if wanted.0 < LONGEST_LIFETIME => wanted.0,
        _ => DEFAULT_LIFETIME,
    };
    let mut answer = Message::new();
    answer.build(&[
        Box::new(Message { transaction_id: message.transaction_id, ..Default::default() }),
        Box::new(MessageType::new(METHOD_ALLOCATE, CLASS_SUCCESS_RESPONSE)),
        Box::new(RelayedAddress { ip: relay.ip(), port: relay.port() }),
        Box::new(Lifetime(lifetime)),
        Box::new(XorMappedAddress { ip: from.ip(), port: from.port() }),
        Box::new(MessageIntegrity(key.to_vec())),
    ])?;
    Ok(answer)
}

/// All peers that a message names. The crate reads the first alone; what comes after must not be another.
fn peers(message: &Message) -> Result<Vec<SocketAddr>, stun::Error> {
    let named = message.attributes.0.iter().filter(|attribute| attribute.typ == ATTR_XOR_PEER_ADDRESS);
    named
        .map(|attribute| {
            let alone = Message {
                transaction_id: message.transaction_id,
                attributes: Attributes(vec![attribute.clone()]),
                ..Default::default()
            };
            let mut peer = PeerAddress::default();
            peer.get_from(&alone)?;
            Ok(SocketAddr::new(peer.ip, peer.port))
        })
        .collect()
}

/// Whether an address is one of this machine: the kernel sends from it to itself. No packet leaves.
fn is_own(ip: IpAddr) -> bool {
    let any: IpAddr = if ip.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    let way = StdUdpSocket::bind((any, 0)).and_then(|socket| {
        socket.connect((ip, 9))?;
        socket.local_addr()
    });
    way.is_ok_and(|way| way.ip() == ip)
}

/// The key of a request that was admitted.
struct Known(Option<Vec<u8>>);

impl AuthHandler for Known {
    fn auth_handle(&self, _: &str, _: &str, _: SocketAddr) -> Result<Vec<u8>, turn::Error> {
        self.0.clone().ok_or(turn::Error::ErrNoSuchUser)
    }
}

/// Sockets for allocations.
struct RelayPorts {
    listen: IpAddr,
    public: IpAddr,
    ports: RangeInclusive<u16>,
}

#[async_trait::async_trait]
impl RelayAddressGenerator for RelayPorts {
    fn validate(&self) -> Result<(), turn::Error> {
        Ok(())
    }

    /// From a random port on, so that strangers cannot tell the next one.
    async fn allocate_conn(
        &self,
        use_ipv4: bool,
        _requested_port: u16,
    ) -> Result<(Arc<dyn Conn + Send + Sync>, SocketAddr), turn::Error> {
        if !use_ipv4 && self.listen.is_ipv4() {
            return Err(turn::Error::Other("there are no relay ports with IPv6".into()));
        }
        let (low, high) = (u32::from(*self.ports.start()), u32::from(*self.ports.end()));
        let count = high - low + 1;
        let first = rand::random_range(0..count);
        for step in 0..count {
            let port = u16::try_from(low + (first + step) % count).unwrap_or(u16::MAX);
            if let Ok(socket) = UdpSocket::bind((self.listen, port)).await {
                return Ok((Arc::new(socket), SocketAddr::new(self.public, port)));
            }
        }
        tracing::warn!("all TURN relay ports from {low} to {high} are in use");
        Err(turn::Error::Other("all relay ports are in use".into()))
    }
}

/// Nonces that are recognised without being kept: their time, signed together with the address that they are for.
struct Nonces {
    key: [u8; SECRET_BYTES],
    begun: Instant,
}

impl Nonces {
    fn make(&self, ip: IpAddr) -> String {
        self.made_at(self.begun.elapsed().as_secs(), ip)
    }

    fn made_at(&self, seconds: u64, ip: IpAddr) -> String {
        format!("{seconds:016x}{}", hex::encode(&self.sign(seconds, ip).finalize().into_bytes()[..16]))
    }

    fn holds(&self, nonce: &str, ip: IpAddr) -> bool {
        self.holds_at(nonce, ip, self.begun.elapsed().as_secs())
    }

    fn holds_at(&self, nonce: &str, ip: IpAddr, now: u64) -> bool {
        let Some((seconds, signature)) = nonce.split_at_checked(16) else { return false };
        let (Ok(seconds), Ok(signature)) = (u64::from_str_radix(seconds, 16), hex::decode(signature)) else {
            return false;
        };
        let age = now.checked_sub(seconds);
        signature.len() == 16
            && age.is_some_and(|age| age < NONCE_LIFETIME.as_secs())
            && self.sign(seconds, ip).verify_truncated_left(&signature).is_ok()
    }

    fn sign(&self, seconds: u64, ip: IpAddr) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.key).expect("keys of every length are allowed");
        mac.update(format!("{seconds} {ip}").as_bytes());
        mac
    }
}

#[cfg(test)]
mod tests;
