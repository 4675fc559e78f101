//! The server over real sockets, asked by packets that are made here one by one, so that wrong ones can be made too.

use std::time::SystemTime;

use stun::{
    attributes::{ATTR_LIFETIME, RawAttribute},
    fingerprint::FINGERPRINT,
    message::{BINDING_REQUEST, METHOD_DATA, Method},
};
use turn::proto::{
    PROTO_TCP, channum::ChannelNumber, data::Data, reqtrans::RequestedTransport, rsrvtoken::ReservationToken,
};

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);

/// A server on loopback.
struct World {
    server: Running,
    shutdown: Shutdown,
    folder: tempfile::TempDir,
}

impl World {
    fn new(change: impl FnOnce(&mut Embedded)) -> Self {
        Self::start(change, false)
    }

    fn with_secret_file() -> Self {
        Self::start(|_| {}, true)
    }

    fn start(change: impl FnOnce(&mut Embedded), secret_file: bool) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let mut settings = Embedded {
            listen: "127.0.0.1:0".parse().expect("valid"),
            public: "127.0.0.1".parse().expect("valid"),
            relay_ports: 20_000..=60_000,
            realm: "test".into(),
            peers: Peers { networks: Vec::new(), on_loopback: true },
            most: 100,
            most_per_session: 100,
        };
        change(&mut settings);
        let path = folder.path().join("secret");
        std::fs::write(&path, "north").expect("written");
        let path = if secret_file { path } else { PathBuf::new() };
        let shutdown = Shutdown::new();
        let server = start(settings, &path, &shutdown).expect("started");
        Self { server, shutdown, folder }
    }

    /// A client with good credentials.
    async fn client(&self) -> Asker {
        self.of(&format!("{}:s1", unix_seconds() + 1000)).await
    }

    /// A client with the credentials of a user.
    async fn of(&self, username: &str) -> Asker {
        let socket = UdpSocket::bind("127.0.0.1:0").await.expect("bound");
        socket.connect(self.server.address).await.expect("connected");
        let password = password(&self.server.secret().expect("there"), username);
        Asker {
            socket,
            username: username.into(),
            password: password.expose().into(),
            realm: "test".into(),
            nonce: String::new(),
        }
    }
}

/// A client that asks one thing after the other.
struct Asker {
    socket: UdpSocket,
    username: String,
    password: String,
    realm: String,
    nonce: String,
}

impl Asker {
    fn message(&self, method: Method, parts: Vec<Box<dyn Setter>>) -> Message {
        let text = |attr, text: &str| Box::new(TextAttribute { attr, text: text.into() });
        let key = MessageIntegrity::new_long_term_integrity(
            self.username.clone(),
            self.realm.clone(),
            self.password.clone(),
        );
        let mut all: Vec<Box<dyn Setter>> =
            vec![Box::new(TransactionId::new()), Box::new(MessageType::new(method, CLASS_REQUEST))];
        all.extend(parts);
        all.push(text(ATTR_USERNAME, &self.username));
        all.push(text(ATTR_REALM, &self.realm));
        all.push(text(ATTR_NONCE, &self.nonce));
        all.push(Box::new(key));
        all.push(Box::new(FINGERPRINT));
        let mut message = Message::new();
        message.build(&all).expect("built");
        message
    }

    async fn receive(&self) -> Vec<u8> {
        let mut buffer = vec![0; 2048];
        let received = tokio::time::timeout(PATIENCE, self.socket.recv(&mut buffer)).await;
        let length = received.expect("something comes").expect("received");
        buffer.truncate(length);
        buffer
    }

    async fn send(&self, message: &Message) -> Message {
        self.socket.send(&message.raw).await.expect("sent");
        loop {
            let mut answer = Message { raw: self.receive().await, ..Default::default() };
            if answer.decode().is_ok() && answer.transaction_id == message.transaction_id {
                return answer;
            }
        }
    }

    /// Takes a nonce from the server.
    async fn begin(&mut self) {
        let mut bare = Message::new();
        let kind = MessageType::new(METHOD_ALLOCATE, CLASS_REQUEST);
        bare.build(&[Box::new(TransactionId::new()), Box::new(kind)]).expect("built");
        let answer = self.send(&bare).await;
        assert_eq!(code(&answer), 401);
        self.nonce = TextAttribute::get_from_as(&answer, ATTR_NONCE).expect("a nonce").text;
        assert_eq!(TextAttribute::get_from_as(&answer, ATTR_REALM).expect("a realm").text, "test");
    }

    async fn ask(&self, method: Method, parts: Vec<Box<dyn Setter>>) -> Message {
        let message = self.message(method, parts);
        self.send(&message).await
    }

    /// Asks for an allocation: its relay address, or the code of the refusal.
    async fn allocate(&mut self) -> Result<SocketAddr, u16> {
        self.begin().await;
        relay(&self.ask(METHOD_ALLOCATE, udp()).await)
    }

    /// Changes the lifetime; the code of the answer.
    async fn refresh(&self, seconds: u64) -> u16 {
        code(&self.ask(METHOD_REFRESH, vec![Box::new(Lifetime(Duration::from_secs(seconds)))]).await)
    }

    async fn permit(&self, peer: &str) -> u16 {
        code(&self.ask(METHOD_CREATE_PERMISSION, vec![at(peer)]).await)
    }

    async fn bind(&self, channel: u16, peer: &str) -> u16 {
        code(&self.ask(METHOD_CHANNEL_BIND, vec![Box::new(ChannelNumber(channel)), at(peer)]).await)
    }
}

fn udp() -> Vec<Box<dyn Setter>> {
    vec![Box::new(RequestedTransport { protocol: PROTO_UDP })]
}

fn at(peer: &str) -> Box<dyn Setter> {
    let peer: SocketAddr = peer.parse().expect("an address");
    Box::new(PeerAddress { ip: peer.ip(), port: peer.port() })
}

/// 0 for a success.
fn code(answer: &Message) -> u16 {
    if answer.typ.class == CLASS_SUCCESS_RESPONSE {
        return 0;
    }
    let mut error = ErrorCodeAttribute::default();
    error.get_from(answer).expect("an error has a code");
    error.code.0
}

fn relay(answer: &Message) -> Result<SocketAddr, u16> {
    match code(answer) {
        0 => {
            let mut relay = RelayedAddress::default();
            relay.get_from(answer).expect("an allocation has an address");
            Ok(SocketAddr::new(relay.ip, relay.port))
        }
        code => Err(code),
    }
}

async fn peer() -> (UdpSocket, String) {
    let peer = UdpSocket::bind("127.0.0.1:0").await.expect("bound");
    let address = peer.local_addr().expect("bound").to_string();
    (peer, address)
}

async fn hear(peer: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut buffer = vec![0; 2048];
    let received = tokio::time::timeout(PATIENCE, peer.recv_from(&mut buffer)).await;
    let (length, from) = received.expect("it is relayed").expect("received");
    buffer.truncate(length);
    (buffer, from)
}

#[tokio::test]
async fn good_credentials_get_an_allocation_that_relays_both_ways() {
    let world = World::new(|settings| settings.relay_ports = 31_000..=31_999);
    assert_eq!(world.server.url(), format!("turn:{}?transport=udp", world.server.address));
    let mut client = world.client().await;
    let relay = client.allocate().await.expect("an allocation");
    assert!(relay.ip().is_loopback() && (31_000..=31_999).contains(&relay.port()), "{relay}");

    let (peer, address) = peer().await;
    // Indications, with a permission.
    assert_eq!(client.permit(&address).await, 0);
    let mut indication = Message::new();
    indication
        .build(&[
            Box::new(TransactionId::new()),
            Box::new(MessageType::new(METHOD_SEND, CLASS_INDICATION)),
            at(&address),
            Box::new(Data(b"there".to_vec())),
        ])
        .expect("built");
    client.socket.send(&indication.raw).await.expect("sent");
    assert_eq!(hear(&peer).await, (b"there".to_vec(), relay));
    peer.send_to(b"back", relay).await.expect("sent");
    let mut back = Message { raw: client.receive().await, ..Default::default() };
    back.decode().expect("an indication");
    let mut data = Data::default();
    data.get_from(&back).expect("with data");
    assert!(back.typ.method == METHOD_DATA && data.0 == b"back", "{}", back.typ);
    // A channel.
    assert_eq!(client.bind(0x4000, &address).await, 0);
    client.socket.send(&[0x40, 0, 0, 2, b'h', b'i']).await.expect("sent");
    assert_eq!(hear(&peer).await.0, b"hi");
    peer.send_to(b"yo", relay).await.expect("sent");
    assert_eq!(client.receive().await[..6], [0x40, 0, 0, 2, b'y', b'o']);
    assert_eq!(client.refresh(600).await, 0);
}

#[tokio::test]
async fn without_good_credentials_nobody_comes_in() {
    let world = World::new(|_| {});
    let soon = unix_seconds() + 1000;
    let try_with = async |username: &str, change: fn(&mut Asker)| {
        let mut client = world.of(username).await;
        client.begin().await;
        change(&mut client);
        relay(&client.ask(METHOD_ALLOCATE, udp()).await)
    };
    let good = format!("{soon}:s1");
    assert!(try_with(&good, |_| {}).await.is_ok());
    assert_eq!(try_with(&good, |client| client.password.push('x')).await, Err(401));
    assert_eq!(try_with(&good, |client| client.username.push('x')).await, Err(401), "another's password");
    assert_eq!(try_with(&good, |client| client.realm.push('x')).await, Err(401));
    assert_eq!(try_with(&good, |client| client.nonce = "0".repeat(48)).await, Err(438));
    assert_eq!(try_with(&good, |client| client.nonce.clear()).await, Err(438));
    for expired in [soon - 2000, 0, -1] {
        assert_eq!(try_with(&format!("{expired}:s1"), |_| {}).await, Err(401), "{expired}");
    }
    for nonsense in [format!("{soon}"), format!("{soon}:"), "s1".into(), ":s1".into()] {
        assert_eq!(try_with(&nonsense, |_| {}).await, Err(401), "{nonsense:?}");
    }
    // Without an allocation there is nothing to change.
    let mut stranger = world.client().await;
    stranger.begin().await;
    assert_eq!(stranger.refresh(600).await, 437);
    assert_eq!(stranger.permit("127.0.0.1:2000").await, 437);
    assert_eq!(stranger.bind(0x4000, "127.0.0.1:2000").await, 437);
}

#[tokio::test]
async fn credentials_that_expire_open_nothing_more_and_break_nothing() {
    let world = World::new(|_| {});
    let username = format!("{}:s1", unix_seconds() + 2);
    let mut early = world.of(&username).await;
    early.allocate().await.expect("still valid");
    let (expires_at, _) = parse_username(&username).expect("ours");
    let end = SystemTime::UNIX_EPOCH + Duration::from_secs(expires_at.unsigned_abs());
    tokio::time::sleep(end.duration_since(SystemTime::now()).unwrap_or_default()).await;
    let mut late = world.of(&username).await;
    assert_eq!(late.allocate().await, Err(401));
    assert_eq!(early.refresh(600).await, 0, "a stream goes on");
    assert_eq!(early.permit("127.0.0.1:2000").await, 0);
    // Nobody else steps in on the same way, and who gives it back is out.
    early.username = format!("{}:s2", unix_seconds() + 1000);
    assert_eq!(early.refresh(600).await, 441);
    early.username = username;
    assert_eq!(early.refresh(0).await, 0);
    assert_eq!(early.allocate().await, Err(401));
}

#[tokio::test]
async fn a_changed_secret_counts_for_newcomers_alone() {
    let world = World::with_secret_file();
    let mut old = world.client().await;
    old.allocate().await.expect("an allocation");
    let mut late = world.client().await;
    let path = world.folder.path().join("secret");
    std::fs::write(&path, "south").expect("written");
    assert_eq!(late.allocate().await, Err(401), "a password of the old secret");
    world.client().await.allocate().await.expect("a password of the new one");
    assert_eq!(old.refresh(600).await, 0);
    let mut without = world.client().await;
    std::fs::write(&path, "\n").expect("written");
    assert_eq!(without.allocate().await, Err(401), "an empty secret is none");
    assert!(world.server.secret().is_err());
}

#[tokio::test]
async fn packets_go_to_permitted_peers_alone() {
    let world = World::new(|_| {});
    let mut client = world.client().await;
    let relay = client.allocate().await.expect("an allocation");
    for forbidden in
        ["192.0.2.1:5000", "169.254.169.254:8000", "0.0.0.0:5000", "224.0.0.1:5000", "255.255.255.255:5000"]
    {
        assert_eq!(client.permit(forbidden).await, 403, "{forbidden}");
        assert_eq!(client.bind(0x4001, forbidden).await, 403, "{forbidden}");
    }
    assert_eq!(client.bind(0x4001, "127.0.0.1:53").await, 403, "a port of the system");
    let two = vec![at("127.0.0.1:2000"), at("192.0.2.1:2000")];
    assert_eq!(code(&client.ask(METHOD_CREATE_PERMISSION, two).await), 403, "one of several");
    // What was refused left nothing behind: neither way.
    let (peer, address) = peer().await;
    peer.send_to(b"unasked", relay).await.expect("sent");
    client.socket.send(&[0x40, 1, 0, 2, b'n', b'o']).await.expect("sent");
    assert_eq!(client.bind(0x4002, &address).await, 0);
    client.socket.send(&[0x40, 2, 0, 3, b'y', b'e', b's']).await.expect("sent");
    assert_eq!(hear(&peer).await.0, b"yes");
    peer.send_to(b"asked", relay).await.expect("sent");
    assert_eq!(client.receive().await[4..9], *b"asked");

    let network = "198.51.100.0/24".parse().expect("valid");
    let named = World::new(|settings| settings.peers.networks = vec![network]);
    let mut client = named.client().await;
    client.allocate().await.expect("an allocation");
    assert_eq!(client.permit("198.51.100.7:2000").await, 0);
    assert_eq!(client.permit(&address).await, 403);
}

#[tokio::test]
async fn a_client_has_a_bounded_number_of_peers() {
    let world = World::new(|_| {});
    let mut client = world.client().await;
    client.allocate().await.expect("an allocation");
    for peer in 1..=MOST_PEERS {
        assert_eq!(client.permit(&format!("127.0.0.{peer}:2000")).await, 0);
    }
    assert_eq!(client.permit("127.0.0.200:2000").await, 508);
    assert_eq!(client.permit("127.0.0.1:2000").await, 0, "known ones are renewed");
}

#[tokio::test]
async fn allocations_are_bounded_for_each_session_and_in_all_and_come_free_again() {
    let world = World::new(|settings| (settings.most, settings.most_per_session) = (3, 2));
    let user = |n: i64, session: &str| format!("{}:{session}", unix_seconds() + 1000 + n);
    let mut clients = Vec::new();
    for n in 0..2 {
        let mut client = world.of(&user(n, "s1")).await;
        client.allocate().await.expect("an allocation");
        clients.push(client);
    }
    assert_eq!(world.of(&user(2, "s1")).await.allocate().await, Err(486), "the same session again");
    world.of(&user(0, "s2")).await.allocate().await.expect("another session");
    let mut full = world.of(&user(0, "s3")).await;
    assert_eq!(full.allocate().await, Err(508));
    assert_eq!(clients[0].refresh(0).await, 0);
    full.allocate().await.expect("one has come free");
}

#[tokio::test]
async fn what_is_not_offered_is_refused() {
    let world = World::new(|_| {});
    let mut client = world.client().await;
    client.begin().await;
    let mut pair = udp();
    pair.push(Box::new(ReservationToken(vec![1; 8])));
    assert_eq!(code(&client.ask(METHOD_ALLOCATE, pair).await), 508);
    let tcp: Vec<Box<dyn Setter>> = vec![Box::new(RequestedTransport { protocol: PROTO_TCP })];
    assert_eq!(code(&client.ask(METHOD_ALLOCATE, tcp).await), 442);
    client.allocate().await.expect("as usual");
}

#[tokio::test]
async fn an_answer_that_was_lost_is_given_again() {
    let world = World::new(|settings| settings.most_per_session = 1);
    let mut client = world.client().await;
    client.begin().await;
    let request = client.message(METHOD_ALLOCATE, udp());
    let first = client.send(&request).await;
    let again = client.send(&request).await;
    assert!(relay(&first).is_ok());
    assert_eq!(relay(&first), relay(&again));
    let lifetime = |answer: &Message| answer.get(ATTR_LIFETIME).expect("a lifetime");
    assert_eq!(lifetime(&first), lifetime(&again));
    assert_eq!(relay(&client.ask(METHOD_ALLOCATE, udp()).await), Err(437), "another request");
}

#[tokio::test]
async fn relay_ports_that_are_in_use_are_passed_over() {
    let taken = StdUdpSocket::bind("127.0.0.1:0").expect("bound");
    let port = taken.local_addr().expect("bound").port();
    let world = World::new(|settings| settings.relay_ports = port..=port);
    let mut client = world.client().await;
    assert_eq!(client.allocate().await, Err(508));
    drop(taken);
    assert_eq!(client.allocate().await.map(|relay| relay.port()), Ok(port));
}

#[tokio::test]
async fn stun_is_answered_without_credentials() {
    let world = World::new(|_| {});
    let client = world.client().await;
    let mut request = Message::new();
    request.build(&[Box::new(TransactionId::new()), Box::new(BINDING_REQUEST)]).expect("built");
    let answer = client.send(&request).await;
    let mut mapped = XorMappedAddress::default();
    mapped.get_from(&answer).expect("an address");
    let own = client.socket.local_addr().expect("bound");
    assert_eq!(SocketAddr::new(mapped.ip, mapped.port), own);
}

/// An attribute as it is, whatever it should look like.
struct Raw(RawAttribute);

impl Setter for Raw {
    fn add_to(&self, message: &mut Message) -> Result<(), stun::Error> {
        message.add(self.0.typ, &self.0.value);
        Ok(())
    }
}

#[tokio::test]
async fn garbage_is_survived() {
    let world = World::new(|_| {});
    let mut client = world.client().await;
    client.allocate().await.expect("an allocation");
    let mut packets: Vec<Vec<u8>> = vec![
        client.message(METHOD_ALLOCATE, udp()).raw,
        client.message(METHOD_CREATE_PERMISSION, vec![at("127.0.0.1:2000")]).raw,
        client.message(METHOD_CHANNEL_BIND, vec![Box::new(ChannelNumber(0x4000)), at("[::1]:2000")]).raw,
        vec![0x40, 0, 0, 4, 1, 2, 3, 4],
    ];
    // Well signed, with attributes that are cut off.
    for (kind, length) in [(ATTR_XOR_PEER_ADDRESS, 5), (ATTR_LIFETIME, 1), (ATTR_RESERVATION_TOKEN, 3)] {
        for method in [METHOD_ALLOCATE, METHOD_REFRESH, METHOD_CREATE_PERMISSION, METHOD_CHANNEL_BIND] {
            let value = vec![0, 1, 2, 3, 4][..length].to_vec();
            let attribute = RawAttribute { typ: kind, length: length as u16, value };
            packets.push(client.message(method, vec![Box::new(Raw(attribute))]).raw);
        }
    }
    let mut sent = 0;
    for packet in &packets {
        client.socket.send(packet).await.expect("sent");
        for at in 0..packet.len() {
            let mut changed = packet.clone();
            changed[at] ^= 1 << (at % 8);
            let mut full = packet.clone();
            full[at] = 0xff;
            for garbage in [&packet[..at], &changed, &full, &rand::random::<[u8; 32]>()] {
                client.socket.send(garbage).await.expect("sent");
                sent += 1;
            }
            // The server is in this thread; it has to read before the socket is full.
            tokio::task::yield_now().await;
        }
    }
    assert!(sent > 5000, "{sent}");
    world.client().await.allocate().await.expect("the server lives");
}

#[tokio::test]
async fn at_the_end_all_ports_are_free_again() {
    let world = World::new(|_| {});
    let mut client = world.client().await;
    let relay = client.allocate().await.expect("an allocation");
    assert!(StdUdpSocket::bind(relay).is_err() && StdUdpSocket::bind(world.server.address).is_err());
    assert!(world.shutdown.stop(PATIENCE).await);
    let until = Instant::now() + PATIENCE;
    while StdUdpSocket::bind(relay).is_err() || StdUdpSocket::bind(world.server.address).is_err() {
        assert!(Instant::now() < until, "ports are still in use");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[test]
fn this_machines_addresses_are_known_without_sending_anything() {
    assert!(is_own(IpAddr::from([127, 0, 0, 1])));
    for other in ["192.0.2.1", "255.255.255.255", "2001:db8::1"] {
        assert!(!is_own(other.parse().expect("valid")), "{other}");
    }
}

#[test]
fn nonces_hold_for_an_hour_and_one_address() {
    let nonces = |key| Nonces { key: [key; SECRET_BYTES], begun: Instant::now() };
    let (here, there) = (IpAddr::from([192, 0, 2, 1]), IpAddr::from([192, 0, 2, 2]));
    let ours = nonces(7);
    assert!(ours.holds(&ours.make(here), here) && !ours.holds(&ours.make(here), there));
    assert!(!ours.holds(&ours.made_at(20_000, here), here), "of the future");
    assert!(!nonces(8).holds(&ours.make(here), here), "of another server");
    for nonsense in ["", "é", "0123456789abcdef", &"x".repeat(48), &ours.make(here)[..40]] {
        assert!(!ours.holds(nonsense, here), "{nonsense:?}");
    }
    assert!(ours.holds_at(&ours.made_at(6500, here), here, 10_000));
    assert!(!ours.holds_at(&ours.made_at(6300, here), here, 10_000), "old");
}
