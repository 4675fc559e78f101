//! Where an address is, looked up in a database file in MaxMind's format (GeoLite2-City, DB-IP City Lite and others),
//! and which address a request really comes from.

use std::{net::IpAddr, path::Path, str::FromStr};

use fanlight_api::gateway::Location;
use maxminddb::{Reader, path};

/// A database that is open.
pub struct GeoIp {
    reader: Reader<Vec<u8>>,
}

impl GeoIp {
    /// Reads a database into memory.
    ///
    /// # Errors
    /// The file cannot be read or is no such database; in words.
    pub fn open(path: &Path) -> Result<Self, String> {
        let reader = Reader::open_readfile(path).map_err(|error| {
            format!("placement.geoip_database {} cannot be used: {error}", path.display())
        })?;
        Ok(Self { reader })
    }

    /// Where an address is; `None` when the database does not say.
    pub fn locate(&self, address: IpAddr) -> Option<Location> {
        let found = self.reader.lookup(address).ok()?;
        let degrees = |name: &str| found.decode_path::<f64>(&path!["location", name]).ok().flatten();
        let location = Location { latitude: degrees("latitude")?, longitude: degrees("longitude")? };
        is_place(location).then_some(location)
    }
}

/// Whether a location is on Earth.
pub fn is_place(location: Location) -> bool {
    location.latitude.abs() <= 90.0 && location.longitude.abs() <= 180.0
}

/// Addresses that share their first bits, `10.0.0.0/8`; one address is a network of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    bits: u8,
}

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no network: expected an address like 10.0.0.1 or 10.0.0.0/8");
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits.parse::<u8>().map_err(|_| wrong())?)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let all = if address.is_ipv4() { 32 } else { 128 };
        let bits = bits.unwrap_or(all);
        if bits > all { Err(wrong()) } else { Ok(Self { address, bits }) }
    }
}

impl Network {
    fn holds(&self, address: IpAddr) -> bool {
        let same = |a: u128, b: u128, all: u32| {
            let free = all - u32::from(self.bits);
            a.checked_shr(free).unwrap_or(0) == b.checked_shr(free).unwrap_or(0)
        };
        match (self.address, address.to_canonical()) {
            (IpAddr::V4(a), IpAddr::V4(b)) => same(a.to_bits().into(), b.to_bits().into(), 32),
            (IpAddr::V6(a), IpAddr::V6(b)) => same(a.to_bits(), b.to_bits(), 128),
            _ => false,
        }
    }
}

/// The address of a client: that of the connection, or, behind proxies that are trusted, the last one in
/// `X-Forwarded-For` that is not one of theirs. What stands before it may be made up by the client.
pub fn client_address(peer: IpAddr, forwarded: &str, trusted: &[Network]) -> IpAddr {
    let is_trusted = |address: IpAddr| trusted.iter().any(|network| network.holds(address));
    let mut client = peer;
    for part in forwarded.rsplit(',').map(str::trim) {
        if !is_trusted(client) {
            break;
        }
        let Ok(address) = part.trim_matches(['[', ']']).parse() else { break };
        client = address;
    }
    client
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_trusted_proxies_say_about_an_address_is_believed() {
        let trusted: Vec<Network> =
            ["10.0.0.0/8", "2001:db8::1"].map(|text| text.parse().expect("network")).into();
        for (peer, forwarded, expected) in [
            ("192.0.2.1", "", "192.0.2.1"),
            ("192.0.2.1", "198.51.100.7", "192.0.2.1"),
            ("10.1.2.3", "198.51.100.7", "198.51.100.7"),
            ("10.1.2.3", "203.0.113.9, 198.51.100.7", "198.51.100.7"),
            ("10.1.2.3", "203.0.113.9, 198.51.100.7, 10.9.9.9", "198.51.100.7"),
            ("2001:db8::1", "[2001:db8::7]", "2001:db8::7"),
            ("10.1.2.3", "nonsense", "10.1.2.3"),
            ("10.1.2.3", "", "10.1.2.3"),
            ("::ffff:10.1.2.3", "198.51.100.7", "198.51.100.7"),
        ] {
            let client = client_address(peer.parse().expect("address"), forwarded, &trusted);
            assert_eq!(client.to_string(), expected, "{peer} {forwarded:?}");
        }
    }

    #[test]
    fn networks_are_read_or_refused_by_name() {
        for bad in ["", "10.0.0.0/33", "10.0.0/8", "::/129", "host", "10.0.0.0/x"] {
            assert!(bad.parse::<Network>().expect_err("no network").contains(&format!("{bad:?}")));
        }
        let all: Network = "0.0.0.0/0".parse().expect("network");
        assert!(all.holds("203.0.113.1".parse().expect("address")));
        assert!(!all.holds("2001:db8::1".parse().expect("address")));
    }

    /// A text or map of the format: its type and size in one byte, then its content.
    fn typed(kind: u8, size: usize, content: &[u8]) -> Vec<u8> {
        assert!(size < 29, "one byte holds smaller sizes only");
        let mut bytes = match kind {
            1..=7 => vec![kind << 5 | size as u8],
            _ => vec![size as u8, kind - 7],
        };
        bytes.extend_from_slice(content);
        bytes
    }

    fn text(text: &str) -> Vec<u8> {
        typed(2, text.len(), text.as_bytes())
    }

    fn map(members: &[(&str, Vec<u8>)]) -> Vec<u8> {
        let content: Vec<u8> =
            members.iter().flat_map(|(name, value)| [text(name), value.clone()].concat()).collect();
        typed(7, members.len(), &content)
    }

    /// A database in which the addresses of IPv4 below 128.0.0.0 are at one place, and others at none.
    fn database(latitude: f64, longitude: f64) -> Vec<u8> {
        let double = |number: f64| typed(3, 8, &number.to_be_bytes());
        let place =
            map(&[("location", map(&[("latitude", double(latitude)), ("longitude", double(longitude))]))]);
        let short = |number: u16| typed(5, 2, &number.to_be_bytes());
        let metadata = map(&[
            ("binary_format_major_version", short(2)),
            ("binary_format_minor_version", short(0)),
            ("build_epoch", typed(9, 1, &[1])),
            ("database_type", text("Test")),
            ("description", map(&[])),
            ("ip_version", short(4)),
            ("languages", typed(11, 0, &[])),
            ("node_count", typed(6, 1, &[1])),
            ("record_size", short(24)),
        ]);
        // One node: to the left the first record of the data, to the right nothing.
        let tree = [0, 0, 1 + 16, 0, 0, 1];
        [&tree[..], &[0; 16], &place, b"\xab\xcd\xefMaxMind.com", &metadata].concat()
    }

    #[test]
    fn addresses_are_found_in_a_database() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("city.mmdb");
        std::fs::write(&path, database(48.9, 2.4)).expect("written");
        let geoip = GeoIp::open(&path).expect("a database");
        let here = geoip.locate("80.1.2.3".parse().expect("address"));
        assert_eq!(here, Some(Location { latitude: 48.9, longitude: 2.4 }));
        assert_eq!(geoip.locate("200.1.2.3".parse().expect("address")), None);
        assert_eq!(geoip.locate("2001:db8::1".parse().expect("address")), None);
        std::fs::write(&path, database(480.9, 2.4)).expect("written");
        let wrong = GeoIp::open(&path).expect("a database");
        assert_eq!(wrong.locate("80.1.2.3".parse().expect("address")), None, "not on Earth");
    }

    #[test]
    fn a_database_that_is_none_is_refused_by_name() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("city.mmdb");
        std::fs::write(&path, "no database").expect("written");
        let text = GeoIp::open(&path).err().expect("refused");
        assert!(text.contains("placement.geoip_database") && text.contains("city.mmdb"), "{text}");
    }
}
