//! What is told about STUN and TURN: URLs, and credentials for servers that share a secret with us: user
//! `<expiry>:<session>`, password base64(HMAC-SHA1(secret, user)) (Coturn's "TURN REST API"; signaling section 3).
//! Plain values; the server of our own is in [`crate::embedded_turn`].

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::RangeInclusive,
    path::Path,
    str::FromStr,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use fanlight_api::{Secret, SessionId, gateway::StunServer};
use hmac::{Hmac, Mac};
use sha1::Sha1;

/// TURN servers that take the same credentials.
pub struct Relays {
    pub urls: Vec<String>,
    pub secret: Secret,
}

/// The ICE servers for a client of a session. `expires_at` in Unix seconds. Empty when none is configured,
/// never absent.
pub fn servers(
    stun_urls: &[String],
    relays: &[Relays],
    session: &SessionId,
    expires_at: i64,
) -> Vec<StunServer> {
    let mut servers = Vec::new();
    if !stun_urls.is_empty() {
        servers.push(StunServer { urls: stun_urls.to_vec(), username: None, password: None });
    }
    for relays in relays.iter().filter(|relays| !relays.urls.is_empty()) {
        let username = format!("{expires_at}:{session}");
        let password = password(&relays.secret, &username);
        servers.push(StunServer {
            urls: relays.urls.clone(),
            username: Some(username),
            password: Some(password),
        });
    }
    servers
}

/// The password of a user.
pub fn password(secret: &Secret, username: &str) -> Secret {
    let mut mac =
        Hmac::<Sha1>::new_from_slice(secret.expose().as_bytes()).expect("keys of every length are allowed");
    mac.update(username.as_bytes());
    Secret::new(STANDARD.encode(mac.finalize().into_bytes()))
}

/// Expiry (Unix seconds) and session of a user.
pub fn parse_username(username: &str) -> Option<(i64, &str)> {
    let (expires_at, session) = username.split_once(':')?;
    Some((expires_at.parse().ok()?, Some(session).filter(|session| !session.is_empty())?))
}

/// The secret in a file. An empty one is none: everybody could compute its passwords.
pub fn read_secret(path: &Path) -> Result<Secret, String> {
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    match text.trim() {
        "" => Err("it is empty".into()),
        secret => Ok(Secret::new(secret)),
    }
}

/// What is wrong with the URL of a STUN or TURN server, if anything. Browsers refuse a connection altogether because
/// of one bad URL.
pub fn check_url(url: &str, schemes: &[&str]) -> Result<(), String> {
    let problem = |text: &str| Err(format!("{url:?} {text}"));
    let Some((scheme, rest)) = url.split_once(':').filter(|(scheme, _)| schemes.contains(scheme)) else {
        return problem(&format!("does not begin with {}:", schemes.join(": or ")));
    };
    let (server, query) = match rest.split_once('?') {
        Some((server, query)) => (server, Some(query)),
        None => (rest, None),
    };
    match (scheme, query) {
        (_, None) | ("turn", Some("transport=udp")) | ("turn" | "turns", Some("transport=tcp")) => {}
        ("turn", Some(_)) => return problem("ends in something else than ?transport=udp or ?transport=tcp"),
        ("turns", Some(_)) => return problem("ends in something else than ?transport=tcp"),
        _ => return problem("has a transport; STUN goes over UDP"),
    }
    let Some((host, port)) = server.rsplit_once(':') else {
        return problem("has no port");
    };
    if !port.parse::<u16>().is_ok_and(|port| port > 0) {
        return problem("has no valid port");
    }
    let valid = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(address) => address.parse::<Ipv6Addr>().is_ok(),
        None => {
            let name = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
            !host.is_empty() && host.bytes().all(name)
        }
    };
    if valid { Ok(()) } else { problem("has no valid host (an IPv6 address needs brackets)") }
}

/// Addresses that begin alike: `192.0.2.0/24`, `2001:db8::/32`, or one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    bits: u8,
}

impl Network {
    /// Whether an address is one of them.
    pub fn contains(self, ip: IpAddr) -> bool {
        match (self.address, ip) {
            (IpAddr::V4(network), IpAddr::V4(ip)) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.bits)).unwrap_or(0);
                network.to_bits() & mask == ip.to_bits() & mask
            }
            (IpAddr::V6(network), IpAddr::V6(ip)) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.bits)).unwrap_or(0);
                network.to_bits() & mask == ip.to_bits() & mask
            }
            _ => false,
        }
    }
}

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let problem = || format!("{text:?} is no network such as 192.0.2.0/24 or 2001:db8::/32");
        let (address, bits) = text.split_once('/').unwrap_or((text, ""));
        let address: IpAddr = address.parse().map_err(|_| problem())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let bits = match bits {
            "" if !text.contains('/') => most,
            bits => bits.parse().ok().filter(|bits| *bits <= most).ok_or_else(problem)?,
        };
        Ok(Self { address, bits })
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.bits)
    }
}

/// To whom a TURN server of our own relays. Whoever has credentials would otherwise reach every UDP service that
/// this machine reaches.
#[derive(Clone, Debug, Default)]
pub struct Peers {
    /// Empty: the addresses of this machine, where its instances stream from.
    pub networks: Vec<Network>,
    /// Whether the server itself is there for this machine alone.
    pub on_loopback: bool,
}

/// Services of a system have lower ports; streamers never have.
const LEAST_PORT: u16 = 1024;

impl Peers {
    /// Whether packets may go there. `is_own` tells the addresses of this machine.
    pub fn allow(&self, ip: IpAddr, is_own: impl Fn(IpAddr) -> bool) -> bool {
        let ip = ip.to_canonical();
        let this_network = matches!(ip, IpAddr::V4(ip) if ip.octets()[0] == 0);
        let nobody = ip.is_unspecified() || this_network || ip == IpAddr::V4(Ipv4Addr::BROADCAST);
        if nobody || ip.is_multicast() {
            return false;
        }
        if self.networks.is_empty() {
            return match is_narrow(ip) {
                true => self.on_loopback && ip.is_loopback(),
                false => is_own(ip),
            };
        }
        // `0.0.0.0/0` is said by those who mean the world, not this machine's inside.
        self.networks
            .iter()
            .any(|network| network.contains(ip) && (!is_narrow(ip) || is_narrow(network.address)))
    }

    /// Whether packets may go to this port.
    pub fn allow_port(port: u16) -> bool {
        port >= LEAST_PORT
    }
}

/// Loopback and link-local addresses, among them those where clouds tell machines their secrets.
fn is_narrow(ip: IpAddr) -> bool {
    ip.is_loopback()
        || match ip {
            IpAddr::V4(ip) => ip.is_link_local(),
            IpAddr::V6(ip) => ip.is_unicast_link_local(),
        }
}

/// The ports `low-high`.
pub fn parse_ports(text: &str) -> Result<RangeInclusive<u16>, String> {
    let ports = || {
        let (low, high) = text.split_once('-')?;
        let (low, high) = (low.trim().parse().ok()?, high.trim().parse().ok()?);
        (LEAST_PORT <= low && low <= high).then_some(low..=high)
    };
    ports().ok_or_else(|| format!("{text:?} is no range of ports from {LEAST_PORT} on, such as 50000-50999"))
}

/// STUN servers of a region: those that are configured, and the TURN servers, which answer STUN too. Without TCP
/// and TLS, which browsers do not take for STUN.
pub fn stun_urls(stun: &[String], turn: &[String]) -> Vec<String> {
    let of_turn = turn.iter().filter_map(|url| {
        let (server, query) =
            url.strip_prefix("turn:")?.split_once('?').unwrap_or((&url["turn:".len()..], ""));
        (query.is_empty() || query == "transport=udp").then(|| format!("stun:{server}"))
    });
    let mut urls: Vec<String> = Vec::new();
    for url in stun.iter().cloned().chain(of_turn) {
        if !urls.contains(&url) {
            urls.push(url);
        }
    }
    urls
}

#[cfg(test)]
mod tests {
    use super::*;

    fn relays(urls: &[&str], secret: &str) -> Relays {
        Relays { urls: urls.iter().map(|url| (*url).to_owned()).collect(), secret: Secret::new(secret) }
    }

    #[test]
    fn credentials_are_those_that_coturn_computes() {
        // Computed with: printf '%s' 1433895918:s1 | openssl dgst -sha1 -hmac north -binary | base64
        let session = "s1".parse().expect("valid");
        let relays = [relays(&["turn:t:3478"], "north"), relays(&["turn:u:3478"], "south")];
        let servers = servers(&["stun:t:3478".into()], &relays, &session, 1_433_895_918);
        assert_eq!(servers[0].urls, ["stun:t:3478"]);
        assert_eq!(servers[0].username, None);
        assert_eq!(servers[1].urls, ["turn:t:3478"]);
        assert_eq!(servers[1].username.as_deref(), Some("1433895918:s1"));
        assert_eq!(servers[1].password.as_ref().map(Secret::expose), Some("5zqHP8c1zLZoulE1ZQKiZedYha4="));
        assert_eq!(servers[2].username, servers[1].username);
        assert_ne!(servers[2].password, servers[1].password, "another secret");
        assert_eq!(parse_username("1433895918:s1"), Some((1_433_895_918, "s1")));
        for wrong in ["", "1433895918", "1433895918:", ":s1", "soon:s1"] {
            assert_eq!(parse_username(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn without_servers_there_are_no_entries_and_an_empty_secret_is_none() {
        let session = "s1".parse().expect("valid");
        assert!(servers(&[], &[], &session, 1).is_empty());
        assert!(servers(&[], &[relays(&[], "x")], &session, 1).is_empty());
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("secret");
        assert!(read_secret(&path).is_err());
        std::fs::write(&path, " \n").expect("written");
        assert!(read_secret(&path).is_err());
        std::fs::write(&path, "north\n").expect("written");
        assert_eq!(read_secret(&path).expect("there").expose(), "north");
    }

    #[test]
    fn urls_that_browsers_would_refuse_are_named() {
        let turn = ["turn", "turns"];
        for good in [
            "turn:turn.example.org:3478",
            "turn:192.0.2.1:3478?transport=udp",
            "turn:[2001:db8::1]:3478?transport=tcp",
            "turns:turn.example.org:5349",
            "turns:turn.example.org:443?transport=tcp",
        ] {
            assert_eq!(check_url(good, &turn), Ok(()), "{good}");
        }
        assert_eq!(check_url("stun:192.0.2.1:3478", &["stun"]), Ok(()));
        for (bad, why) in [
            ("https://turn.example.org", "does not begin with turn: or turns:"),
            ("stun:turn.example.org:3478", "does not begin"),
            ("turn:turn.example.org", "has no port"),
            ("turn:turn.example.org:0", "no valid port"),
            ("turn:turn.example.org:99999", "no valid port"),
            ("turn://turn.example.org:3478", "no valid host"),
            ("turn:2001:db8::1:3478", "no valid host"),
            ("turn:[turn.example.org]:3478", "no valid host"),
            ("turn::3478", "no valid host"),
            ("turn:a b:3478", "no valid host"),
            ("turn:t:3478?transport=sctp", "transport=udp or"),
            ("turns:t:3478?transport=udp", "transport=tcp"),
            ("turn:t:3478?", "transport=udp or"),
        ] {
            let problem = check_url(bad, &turn).expect_err(bad);
            assert!(problem.contains(why) && problem.contains(bad), "{bad}: {problem}");
        }
        assert!(check_url("stun:t:3478?transport=tcp", &["stun"]).is_err());
    }

    #[test]
    fn networks_hold_the_addresses_that_begin_alike() {
        let holds = |network: &str, ip: &str| {
            network.parse::<Network>().expect(network).contains(ip.parse().expect(ip))
        };
        assert!(holds("192.0.2.0/24", "192.0.2.255") && !holds("192.0.2.0/24", "192.0.3.0"));
        assert!(holds("192.0.2.7", "192.0.2.7") && !holds("192.0.2.7", "192.0.2.6"));
        assert!(holds("0.0.0.0/0", "8.8.8.8") && !holds("0.0.0.0/0", "::1"));
        assert!(holds("2001:db8::/32", "2001:db8:1::1") && !holds("2001:db8::/32", "2001:db9::1"));
        assert!(holds("::/0", "::1") && holds("10.1.2.3/8", "10.200.0.1"));
        for bad in ["", "x", "192.0.2.0/33", "::/129", "192.0.2.0/", "192.0.2.0/-1", "192.0.2/24"] {
            let problem = bad.parse::<Network>().expect_err(bad);
            assert!(problem.contains("192.0.2.0/24"), "{problem}");
        }
        assert_eq!("10.0.0.0/8".parse::<Network>().expect("valid").to_string(), "10.0.0.0/8");
    }

    #[test]
    fn relaying_goes_to_this_machine_or_to_named_networks_and_never_inside() {
        let own = |ip: IpAddr| {
            ["192.0.2.1", "127.0.0.1", "169.254.1.1", "::1"].map(String::from).contains(&ip.to_string())
        };
        let allows = |peers: &Peers, ip: &str| peers.allow(ip.parse().expect(ip), own);
        let never = ["0.0.0.0", "224.0.0.1", "255.255.255.255", "ff02::1", "::", "0.1.2.3"];

        let default = Peers::default();
        assert!(allows(&default, "192.0.2.1") && allows(&default, "::ffff:192.0.2.1"));
        for ip in ["192.0.2.2", "127.0.0.1", "::1", "::ffff:127.0.0.1", "169.254.1.1", "fe80::1"]
            .iter()
            .chain(&never)
        {
            assert!(!allows(&default, ip), "{ip}");
        }
        let local = Peers { on_loopback: true, ..Peers::default() };
        assert!(allows(&local, "127.0.0.1") && allows(&local, "::1") && allows(&local, "192.0.2.1"));
        assert!(!allows(&local, "169.254.169.254") && !allows(&local, "192.0.2.2"));

        let world = Peers { networks: vec!["0.0.0.0/0".parse().expect("valid")], on_loopback: false };
        assert!(allows(&world, "198.51.100.7"));
        for ip in ["127.0.0.1", "169.254.169.254", "::ffff:127.0.0.1"].iter().chain(&never) {
            assert!(!allows(&world, ip), "{ip}");
        }
        let named = Peers { networks: vec!["127.0.0.0/8".parse().expect("valid")], on_loopback: false };
        assert!(allows(&named, "127.0.0.1") && !allows(&named, "192.0.2.1"));
        assert!(Peers::allow_port(1024) && !Peers::allow_port(53) && !Peers::allow_port(0));
    }

    #[test]
    fn ranges_of_ports_begin_above_those_of_the_system() {
        assert_eq!(parse_ports("50000-50999"), Ok(50000..=50999));
        assert_eq!(parse_ports("2000 - 2000"), Ok(2000..=2000));
        for bad in ["", "50000", "50001-50000", "80-90", "50000-70000", "a-b"] {
            assert!(parse_ports(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn turn_servers_are_measured_by_stun_where_udp_goes() {
        let stun = ["stun:s:3478".to_owned(), "stun:t:3478".to_owned()];
        let turn = [
            "turn:t:3478?transport=udp",
            "turn:u:3478",
            "turn:u:3478?transport=tcp",
            "turn:v:80?transport=tcp",
            "turns:t:5349",
        ]
        .map(String::from);
        assert_eq!(stun_urls(&stun, &turn), ["stun:s:3478", "stun:t:3478", "stun:u:3478"]);
        assert!(stun_urls(&[], &[]).is_empty());
    }
}
