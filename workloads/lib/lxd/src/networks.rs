//! Networks: who has which address, and what comes in from outside.

use std::collections::BTreeMap;

use http::Method;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    Lxd, LxdError,
    call::{Call, part},
    server::nullable,
};

/// How often a change of a forward is tried again when others change it at the same time.
const FORWARD_TRIES: usize = 20;

/// An address that an instance has or had.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Lease {
    /// Name of the instance.
    pub hostname: String,
    /// Of its interface.
    pub hwaddr: String,
    /// The address.
    pub address: String,
    /// `static`, `dynamic`, `gateway`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The member it is on.
    pub location: String,
}

/// A network as it is on a member.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct NetworkState {
    /// `up`.
    pub state: String,
    /// Largest packet.
    pub mtu: u32,
    /// Addresses of the bridge.
    #[serde(deserialize_with = "nullable")]
    pub addresses: Vec<NetworkAddress>,
}

/// An address of a bridge.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct NetworkAddress {
    /// `inet`, `inet6`.
    pub family: String,
    /// The address.
    pub address: String,
    /// Bits of the network.
    pub netmask: String,
    /// `global`, `link`.
    pub scope: String,
}

/// An address of a member that leads to instances.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default)]
pub struct Forward {
    /// The address.
    #[serde(skip_serializing)]
    pub listen_address: String,
    /// For people.
    pub description: String,
    /// Settings.
    #[serde(deserialize_with = "nullable")]
    pub config: BTreeMap<String, String>,
    /// Where the ports lead.
    #[serde(deserialize_with = "nullable")]
    pub ports: Vec<Port>,
}

/// Ports that lead to an instance.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default)]
pub struct Port {
    /// For people, and for whoever cleans up.
    pub description: String,
    /// `tcp` or `udp`.
    pub protocol: String,
    /// `8080`, or `8080-8090`.
    pub listen_port: String,
    /// The same on the other side; empty: the same numbers.
    pub target_port: String,
    /// Where they lead.
    pub target_address: String,
}

/// A network.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Network {
    /// Unique name.
    pub name: String,
    /// `bridge`, `ovn`, …
    #[serde(rename = "type")]
    pub kind: String,
    /// LXD looks after it.
    pub managed: bool,
    /// Settings, such as `ipv4.address`.
    #[serde(deserialize_with = "nullable")]
    pub config: BTreeMap<String, String>,
}

impl Lxd {
    /// A network.
    ///
    /// # Errors
    /// There is none, or the call fails.
    pub async fn network(&self, name: &str) -> Result<Network, LxdError> {
        self.get(&format!("/1.0/networks/{}", part(name))).await
    }

    /// Addresses that instances of the project have in a network.
    ///
    /// # Errors
    /// The call fails.
    pub async fn leases(&self, network: &str) -> Result<Vec<Lease>, LxdError> {
        self.get(&format!("/1.0/networks/{}/leases", part(network))).await
    }

    /// A network as it is on the target.
    ///
    /// # Errors
    /// The call fails.
    pub async fn network_state(&self, network: &str) -> Result<NetworkState, LxdError> {
        self.get(&format!("/1.0/networks/{}/state", part(network))).await
    }

    /// The forwards of an address, and the tag of what was read.
    ///
    /// # Errors
    /// There are none, or the call fails.
    pub async fn forward(&self, network: &str, address: &str) -> Result<(Forward, String), LxdError> {
        let path = forward_path(network, address);
        self.tagged(Call::new(Method::GET, &path)).await
    }

    /// Makes an address of the target one that leads to instances, if it is not.
    ///
    /// # Errors
    /// The call fails.
    pub async fn ensure_forward(&self, network: &str, address: &str) -> Result<(), LxdError> {
        match self.forward(network, address).await {
            Err(error) if error.is_not_found() => {}
            result => return result.map(|_| ()),
        }
        let path = format!("/1.0/networks/{}/forwards", part(network));
        let body = json!({ "listen_address": address });
        match self.done(Call::new(Method::POST, &path).json(&body)).await {
            Err(error) if error.is_exists() => Ok(()),
            result => result,
        }
    }

    /// Removes an address with all its ports; none is fine.
    ///
    /// # Errors
    /// The call fails.
    pub async fn remove_forward(&self, network: &str, address: &str) -> Result<(), LxdError> {
        let path = forward_path(network, address);
        match self.done(Call::new(Method::DELETE, &path)).await {
            Err(error) if error.is_not_found() => Ok(()),
            result => result,
        }
    }

    /// Changes the ports of an address in one step: `change` gets what is there, and is called again when somebody
    /// else was quicker. Nothing is sent when it changes nothing.
    ///
    /// # Errors
    /// The call fails, or others change it all the time.
    pub async fn change_ports(
        &self,
        network: &str,
        address: &str,
        mut change: impl FnMut(&mut Vec<Port>),
    ) -> Result<(), LxdError> {
        let path = forward_path(network, address);
        for attempt in 1.. {
            let (mut forward, tag) = self.forward(network, address).await?;
            let before = forward.clone();
            change(&mut forward.ports);
            if forward == before {
                return Ok(());
            }
            let call = Call::new(Method::PUT, &path).header("if-match", &tag)?.json(&forward);
            match self.done(call).await {
                Err(error) if error.is_precondition() && attempt < FORWARD_TRIES => {}
                // LXD takes two changes at the same moment for good, and keeps one: it is looked at again.
                Ok(()) if attempt < FORWARD_TRIES => {}
                result => return result,
            }
        }
        unreachable!("the loop ends by returning")
    }

    /// Adds these ports; those that are there already are left alone.
    ///
    /// # Errors
    /// As [`Lxd::change_ports`]; a port that leads elsewhere is refused by LXD.
    pub async fn add_ports(&self, network: &str, address: &str, ports: &[Port]) -> Result<(), LxdError> {
        self.change_ports(network, address, |there| {
            for port in ports {
                if !there.iter().any(|other| other.same(port)) {
                    there.push(port.clone());
                }
            }
        })
        .await
    }

    /// Removes all ports with this description; none is fine, and so is no such address.
    ///
    /// # Errors
    /// As [`Lxd::change_ports`].
    pub async fn remove_ports(
        &self,
        network: &str,
        address: &str,
        description: &str,
    ) -> Result<(), LxdError> {
        let changed = self.change_ports(network, address, |there| {
            there.retain(|port| port.description != description);
        });
        match changed.await {
            Err(error) if error.is_not_found() => Ok(()),
            result => result,
        }
    }
}

impl Port {
    /// Leads from the same ports to the same ones. LXD may leave out numbers that are the same on both sides.
    fn same(&self, other: &Self) -> bool {
        let target = |port: &Self| {
            let port = if port.target_port.is_empty() { &port.listen_port } else { &port.target_port };
            port.clone()
        };
        (&self.protocol, &self.listen_port, &self.target_address)
            == (&other.protocol, &other.listen_port, &other.target_address)
            && target(self) == target(other)
    }
}

fn forward_path(network: &str, address: &str) -> String {
    format!("/1.0/networks/{}/forwards/{}", part(network), part(address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forward_is_read_and_written_without_its_address() {
        let text = r#"{"description":"","config":{},"ports":[{"description":"i1","protocol":"udp",
            "listen_port":"10000","target_port":"7000","target_address":"10.155.0.20"}],
            "listen_address":"192.0.2.1","location":"none"}"#;
        let forward: Forward = serde_json::from_str(text).expect("as LXD writes it");
        assert_eq!(forward.ports[0].target_port, "7000");
        let json = serde_json::to_value(&forward).expect("it serialises");
        assert!(json.get("listen_address").is_none() && json["ports"][0]["listen_port"] == "10000");
    }

    #[test]
    fn ports_that_lead_to_the_same_are_the_same() {
        let port = |listen: &str, target: &str, address: &str| Port {
            protocol: "tcp".into(),
            listen_port: listen.into(),
            target_port: target.into(),
            target_address: address.into(),
            ..Port::default()
        };
        assert!(port("80", "", "10.0.0.2").same(&port("80", "80", "10.0.0.2")));
        assert!(!port("80", "81", "10.0.0.2").same(&port("80", "80", "10.0.0.2")));
        assert!(!port("80", "80", "10.0.0.2").same(&port("80", "80", "10.0.0.3")));
    }
}
