//! Addresses and ports by place: what an instance is reached at follows from its place on its node alone, so nothing
//! has to be asked for and nothing can be given twice.

use std::net::{IpAddr, Ipv4Addr};

use fanlight_api::ams::Service;
use fanlight_lxd::Port;

/// The port that the streamer of every instance takes inside.
pub const MEDIA_PORT: u16 = 7000;
/// The first address of a network is the bridge's own.
const FIRST_HOST: u32 = 2;

/// The network that instances are in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subnet {
    network: u32,
    /// Bits.
    prefix: u32,
    /// The bridge's.
    gateway: Ipv4Addr,
}

impl Subnet {
    /// From `10.1.2.1/24`, as LXD writes the address of a bridge.
    pub fn parse(text: &str) -> Option<Self> {
        let (address, prefix) = text.split_once('/')?;
        let gateway: Ipv4Addr = address.parse().ok()?;
        let prefix: u32 = prefix.parse().ok().filter(|prefix| (8..=29).contains(prefix))?;
        Some(Self { network: u32::from(gateway) & (u32::MAX << (32 - prefix)), prefix, gateway })
    }

    /// How many instances have an address on one node. One is left out for the bridge, wherever it is.
    pub fn places(self) -> u32 {
        (1 << (32 - self.prefix)) - FIRST_HOST - 2
    }

    /// The address of a place; none: there are not so many.
    pub fn address(self, place: u32) -> Option<Ipv4Addr> {
        let own = u32::from(self.gateway) - self.network;
        let host = FIRST_HOST + place;
        // Whoever would have the bridge's own address, or comes after it, moves up by one.
        let host = if own >= FIRST_HOST && host >= own { host + 1 } else { host };
        (place < self.places()).then(|| Ipv4Addr::from(self.network + host))
    }
}

/// The ports of a node that lead to one instance: media, and its services.
pub fn ports(owner: &str, media_port: u16, to: Ipv4Addr, services: &[Service]) -> Vec<Port> {
    let port = |protocol: &str, listen: String, target: String| Port {
        description: owner.into(),
        protocol: protocol.into(),
        listen_port: listen,
        target_port: target,
        target_address: to.to_string(),
    };
    let mut ports = vec![port("udp", media_port.to_string(), MEDIA_PORT.to_string())];
    let range = |first: u16, last: u16| {
        if last > first { format!("{first}-{last}") } else { first.to_string() }
    };
    for service in services.iter().filter(|service| service.node_port > 0) {
        let tcp = vec!["tcp".to_owned()];
        for protocol in if service.protocols.is_empty() { &tcp } else { &service.protocols } {
            ports.push(port(
                protocol,
                range(service.node_port, service.node_port_end),
                range(service.port, service.port_end),
            ));
        }
    }
    ports
}

/// The host of `https://host:port`, where it is an address.
pub fn host(url: &str) -> Option<IpAddr> {
    let rest = url.strip_prefix("https://")?.split('/').next()?;
    let host = match rest.strip_prefix('[') {
        Some(rest) => rest.split(']').next()?,
        None => rest.rsplit_once(':').map_or(rest, |(host, _)| host),
    };
    host.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_place_has_an_address_of_its_own_and_none_has_the_bridges() {
        for text in ["10.155.0.1/24", "10.155.0.77/24", "10.155.0.254/24", "192.168.7.9/29", "10.0.0.1/16"] {
            let subnet = Subnet::parse(text).expect("a subnet");
            let bridge: Ipv4Addr = text.split('/').next().expect("one").parse().expect("an address");
            let all: BTreeSet<_> = (0..subnet.places()).map(|place| subnet.address(place)).collect();
            assert_eq!(all.len() as u32, subnet.places(), "{text}");
            assert!(!all.contains(&None) && !all.contains(&Some(bridge)), "{text}");
            for address in all.into_iter().flatten() {
                let host = u32::from(address) & !(u32::MAX << (32 - subnet.prefix));
                assert_eq!(u32::from(address) - host, subnet.network, "{text}: {address}");
                assert!(host > 0 && host < (1 << (32 - subnet.prefix)) - 1, "{text}: {address}");
            }
            assert_eq!(subnet.address(subnet.places()), None, "{text}");
        }
        for bad in ["none", "", "10.0.0.1", "10.0.0.1/31", "fd00::1/64", "10.0.0.1/x"] {
            assert_eq!(Subnet::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn media_and_services_are_led_to_the_instance() {
        let service = Service {
            port: 80,
            port_end: 82,
            node_port: 10_000,
            node_port_end: 10_002,
            protocols: vec!["tcp".into(), "udp".into()],
            ..Service::default()
        };
        let unplaced = Service { port: 22, ..Service::default() };
        let to = Ipv4Addr::new(10, 0, 0, 9);
        let ports = ports("ams-i1", 20_005, to, &[service, unplaced]);
        let told: Vec<_> = ports
            .iter()
            .map(|port| format!("{} {}>{}", port.protocol, port.listen_port, port.target_port))
            .collect();
        assert_eq!(told, ["udp 20005>7000", "tcp 10000-10002>80-82", "udp 10000-10002>80-82"]);
        assert!(ports.iter().all(|port| port.target_address == "10.0.0.9" && port.description == "ams-i1"));
    }

    #[test]
    fn the_host_of_a_member_is_found() {
        assert_eq!(host("https://10.1.1.11:8443"), "10.1.1.11".parse().ok());
        assert_eq!(host("https://[fd00::1]:8443"), "fd00::1".parse().ok());
        assert_eq!(host("https://name:8443"), None);
        assert_eq!(host("/run/x.socket"), None);
    }
}
