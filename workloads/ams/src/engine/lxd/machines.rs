//! Nodes: the members of LXD's cluster, or the one server there is.

use std::time::Duration;

use fanlight_client::Endpoint;
use fanlight_lxd::{Card, ClusterMember, Join, Lxd, LxdError, Resources, Space};
use futures_util::{StreamExt as _, stream};
use sha2::{Digest as _, Sha256};

use super::{Inner, LxdEngine, network, trouble};
use crate::engine::{EngineError, Machine, MachineGpu, MachineJoin};

/// Members that are asked at a time.
const AT_ONCE: usize = 16;
/// How long joining may take.
const JOIN: Duration = Duration::from_secs(180);
/// Until a member that has joined must be seen.
const APPEAR: Duration = Duration::from_secs(30);

impl LxdEngine {
    pub(super) async fn look_at_machines(&self) -> Result<Vec<Machine>, EngineError> {
        let inner = &self.inner;
        if !inner.is_clustered() {
            let server = inner.root.server().await.map_err(|error| trouble("looking at LXD", error))?;
            let mut machine = inner.machine(&inner.root, &server.environment.server_name).await?;
            machine.address =
                inner.listen_address(&machine.name).map(|ip| ip.to_string()).unwrap_or_default();
            machine.leader = true;
            return Ok(vec![machine]);
        }
        let members = inner.root.members().await.map_err(|error| trouble("looking at the cluster", error))?;
        inner.learn_members(&members);
        let machines = stream::iter(members).map(|member| inner.member(member)).buffered(AT_ONCE);
        Ok(machines.collect().await)
    }

    pub(super) async fn join(&self, join: &MachineJoin) -> Result<(), EngineError> {
        let refused = |reason: String| EngineError::Refused { doing: "adding the node", reason };
        let inner = &self.inner;
        if !inner.is_clustered() {
            return Err(refused(
                "LXD is no cluster yet: make it one with `lxc cluster enable NAME`, then start AMS again"
                    .into(),
            ));
        }
        if inner.root.member(&join.name).await.is_ok() {
            return Ok(());
        }
        if join.unmanaged {
            return Err(refused(format!("LXD has no member {}", join.name)));
        }
        let Some(identity) = &inner.identity else {
            return Err(refused(
                "AMS needs a certificate to get into the new node: give lxd.url as an https:// address"
                    .into(),
            ));
        };
        let url = match join.address.contains(':') && !join.address.contains("]") {
            true => format!("https://{}", join.address),
            false => format!("https://{}:8443", join.address),
        };
        let step = |error: LxdError| trouble("adding the node", error);
        let seen = Endpoint::certificate_of(&url).await.map_err(|error| step(error.into()))?;
        // Nothing but the operator's word says who that is: what is seen first is what is talked to.
        let fingerprint = hex::encode(Sha256::digest(&seen));
        let node = Lxd::https(&url, &fingerprint, identity).map_err(step)?;
        if node.server().await.map_err(step)?.auth != "trusted" {
            if join.secret.expose().is_empty() {
                return Err(refused("trust_password is required: the node does not know AMS".into()));
            }
            node.trust_us("fanlight", join.secret.expose()).await.map_err(step)?;
        }
        let token = inner.root.join_token(&join.name).await.map_err(step)?;
        let (cluster_address, cluster_certificate) = token.certificate().await.map_err(step)?;
        let mut member_config = Vec::new();
        if !join.storage.is_empty() {
            let of_pool =
                ("storage-pool".into(), inner.config.pool.clone(), "source".into(), join.storage.clone());
            member_config.push(of_pool);
        }
        let wanted = Join {
            name: join.name.clone(),
            address: url.trim_start_matches("https://").to_owned(),
            cluster_address,
            cluster_certificate,
            secret: token.secret.clone(),
            member_config,
        };
        node.join_cluster(&wanted).await.map_err(step)?.wait(JOIN).await.map_err(step)?;
        let appeared = async {
            while inner.root.member(&join.name).await.is_err() {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        };
        tokio::time::timeout(APPEAR, appeared)
            .await
            .map_err(|_| refused(format!("{} has joined and is not seen in the cluster", join.name)))
    }

    pub(super) async fn leave(&self, name: &str, force: bool) -> Result<(), EngineError> {
        let inner = &self.inner;
        if !inner.is_clustered() {
            return Err(EngineError::Unsupported(
                "removing nodes",
                "LXD is no cluster: it has this node alone",
            ));
        }
        match inner.root.remove_member(name, force).await {
            Err(error) if error.is_not_found() => Ok(()),
            result => result.map_err(|error| trouble("removing the node", error)),
        }
    }
}

impl Inner {
    async fn member(&self, member: ClusterMember) -> Machine {
        let mut machine = Machine {
            name: member.server_name.clone(),
            message: member.message.clone(),
            architecture: member.architecture.clone(),
            ..Machine::default()
        };
        let online = matches!(member.status.as_str(), "Online" | "Evacuated");
        if online {
            match self.machine(&self.root.target(&member.server_name), &member.server_name).await {
                Ok(seen) => machine = Machine { message: member.message, ..seen },
                Err(error) => {
                    machine.online = false;
                    machine.message = fanlight_service::telemetry::chain(&error);
                }
            }
        }
        machine.address = network::host(&member.url).map(|ip| ip.to_string()).unwrap_or_default();
        machine.evacuated = member.status == "Evacuated";
        machine.leader = member.roles.iter().any(|role| role == "database-leader");
        machine
    }

    /// One machine that answers.
    async fn machine(&self, lxd: &Lxd, name: &str) -> Result<Machine, EngineError> {
        let asked = tokio::join!(lxd.resources(), lxd.pool_space(&self.config.pool));
        let resources: Resources = asked.0.map_err(|error| trouble("looking at a node", error))?;
        let space: Space = asked.1.map_err(|error| trouble("looking at lxd.pool", error))?;
        let gpus = gpus(&resources.gpu.cards);
        self.learn_gpus(name, &gpus);
        let ports = self.config.media_ports;
        let places = self.subnet.places().min(u32::from(ports.last - ports.first) + 1);
        Ok(Machine {
            name: name.to_owned(),
            online: true,
            architecture: resources.cpu.architecture.clone(),
            cpus: resources.cpu.total,
            memory_bytes: resources.memory.total,
            disk: Some((space.total, space.total.saturating_sub(space.used))).filter(|(all, _)| *all > 0),
            storage_pool: self.config.pool.clone(),
            gpus,
            places,
            ..Machine::default()
        })
    }
}

/// The cards that can render or encode for instances, in LXD's order.
fn gpus(cards: &[Card]) -> Vec<MachineGpu> {
    let gpus = cards.iter().filter_map(|card| {
        let kind = match card.vendor_id.as_str() {
            "10de" => "nvidia",
            "8086" => "intel",
            "1002" => "amd",
            _ => return None,
        };
        Some(MachineGpu {
            kind: kind.into(),
            pci_address: card.pci_address.clone(),
            render_name: card.drm.as_ref().map(|drm| drm.render_name.clone()).unwrap_or_default(),
            numa_node: card.numa_node,
        })
    });
    gpus.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_cards_of_known_vendors_are_gpus() {
        let card = |vendor: &str| Card {
            vendor_id: vendor.into(),
            pci_address: format!("0000:{vendor}"),
            ..Card::default()
        };
        let found = gpus(&[card("1a03"), card("10de"), card("1002"), card("8086"), card("1af4")]);
        let kinds: Vec<_> = found.iter().map(|gpu| gpu.kind.as_str()).collect();
        assert_eq!(kinds, ["nvidia", "amd", "intel"]);
        assert_eq!(found[0].pci_address, "0000:10de");
    }
}
