//! `fanlight node …`

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use fanlight_api::{
    Secret,
    ams::{
        Instance, InstanceStatus,
        nodes::{NodeDelete, NodeGpuPatch, NodePatch, NodesPost},
    },
};
use fanlight_client::AmsClient;

use super::{
    applications::asks,
    cli::{AddNode, NodeCommand, Patience},
    failure::Usage,
    output::{self, Column, cell, confirm, count, note},
    progress::{Line, finish, follow},
    remotes::{client, read_secret},
    size,
};

const NODES: &str = "/1.0/nodes";
/// How often the instances of a node are looked at while they go away.
const LOOK_EVERY: Duration = Duration::from_secs(1);

const COLUMNS: &[Column] = &[
    ("NAME", |node| cell(node, "/name")),
    ("ADDRESS", |node| cell(node, "/address")),
    ("STATUS", |node| {
        let away = node["unschedulable"] == true;
        format!("{}{}", cell(node, "/status"), if away { ",unschedulable" } else { "" })
    }),
    ("CPUS", |node| of(&cell(node, "/used_cpus"), &cell(node, "/cpus"))),
    ("MEMORY", |node| {
        let used = node["used_memory_bytes"].as_u64().unwrap_or_default();
        of(&size::short(used), &size::shorter(&cell(node, "/memory")))
    }),
    ("GPU SLOTS", |node| cell(node, "/gpu_slots")),
    ("TAGS", |node| cell(node, "/tags")),
    ("MESSAGE", |node| cell(node, "/status_message")),
];

fn of(used: &str, all: &str) -> String {
    format!("{}/{all}", if used.is_empty() { "0" } else { used })
}

/// `fanlight node …`
///
/// # Errors
/// As AMS says.
pub async fn node(command: NodeCommand) -> Result<()> {
    match command {
        NodeCommand::Ls(options) => {
            let ams = client(&options.target)?;
            let nodes = ams.objects(NODES, &[]).await.context("listing the nodes")?;
            output::list(options.output.format, &nodes, COLUMNS)
        }
        NodeCommand::Show(options) => {
            let ams = client(&options.target)?;
            let node = ams.object(NODES, &options.name).await.context("showing the node")?;
            output::object(options.output.format, &node)
        }
        NodeCommand::Add(options) => {
            let patience = options.patience;
            let ams = client(&options.target)?;
            let doing = format!("adding node {}", options.name);
            let operation = ams.add_node(&request(*options)?).await.with_context(|| doing.clone())?;
            follow(&ams, &operation, &doing, &patience).await
        }
        NodeCommand::Set { target, node, key, value, patience } => {
            change(&client(&target)?, &node, &patch(&key, &value)?, "changing", &patience).await
        }
        NodeCommand::Remove { target, node, force, keep_in_cluster, yes, patience } => {
            let ams = client(&target)?;
            let lost = if force { " with all its instances" } else { "" };
            confirm(&format!("Remove node {node}{lost} from {}?", ams.endpoint().name()), yes || !asks())?;
            let doing = format!("removing node {node}");
            let request = NodeDelete { force, keep_in_cluster };
            let operation = ams.remove_node(&node, &request).await.with_context(|| doing.clone())?;
            follow(&ams, &operation, &doing, &patience).await
        }
        NodeCommand::Drain { target, node, stop, patience } => {
            drain(&client(&target)?, &node, stop, &patience).await
        }
        NodeCommand::Undrain { target, node, patience } => {
            change(&client(&target)?, &node, &unschedulable(false), "giving instances again to", &patience)
                .await
        }
    }
}

async fn change(
    ams: &AmsClient,
    node: &str,
    patch: &NodePatch,
    verb: &str,
    patience: &Patience,
) -> Result<()> {
    let doing = format!("{verb} node {node}");
    let operation = ams.update_node(node, patch).await.with_context(|| doing.clone())?;
    follow(ams, &operation, &doing, patience).await
}

fn unschedulable(unschedulable: bool) -> NodePatch {
    NodePatch { unschedulable: Some(unschedulable), ..NodePatch::default() }
}

/// No new instances; then those that are there end by themselves or are stopped.
async fn drain(ams: &AmsClient, node: &str, stop: bool, patience: &Patience) -> Result<()> {
    change(
        ams,
        node,
        &unschedulable(true),
        "taking new instances away from",
        &Patience { no_wait: false, ..*patience },
    )
    .await?;
    let end = Instant::now() + patience.timeout;
    if stop {
        for instance in active(ams, node).await? {
            let doing = format!("stopping {}", instance.id);
            let operation = match ams.stop_instance(instance.id.as_str(), patience.no_wait).await {
                // It was gone before it could be stopped.
                Err(error) if error.is_not_found() => continue,
                other => other.with_context(|| doing.clone())?,
            };
            if !patience.no_wait {
                finish(ams, &operation, &doing, end.saturating_duration_since(Instant::now())).await?;
            }
        }
    }
    let mut line = Line::new();
    loop {
        let left = active(ams, node).await?.len();
        if left == 0 {
            return Ok(());
        }
        if patience.no_wait {
            note(&format!("{node} takes no new instances; {} there still", count(left, "instance")));
            return Ok(());
        }
        if Instant::now() >= end {
            drop(line);
            bail!(
                "{} still there on {node} after {}; it goes on taking no new ones; --stop stops them, --timeout waits \
                 longer",
                count(left, "instance"),
                humantime::format_duration(patience.timeout)
            );
        }
        line.say(&format!("draining {node}: {} there still", count(left, "instance")));
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// The instances that take something of a node.
async fn active(ams: &AmsClient, node: &str) -> Result<Vec<Instance>> {
    let found =
        ams.instances(&[("node", node.to_owned())]).await.context("listing the instances of the node")?;
    let takes = |instance: &Instance| {
        matches!(
            instance.status(),
            InstanceStatus::Created
                | InstanceStatus::Prepared
                | InstanceStatus::Started
                | InstanceStatus::Running
        )
    };
    // An older server may not know the filter.
    Ok(found.into_iter().filter(|instance| instance.node == node && takes(instance)).collect())
}

fn request(options: AddNode) -> Result<NodesPost> {
    let secret = |file: Option<std::path::PathBuf>| file.as_deref().map(read_secret).transpose();
    Ok(NodesPost {
        name: options.name,
        address: options.address,
        public_address: options.public_address.unwrap_or_default(),
        trust_password: secret(options.trust_password_file)?.unwrap_or_else(|| Secret::new("")),
        trust_token: secret(options.trust_token_file)?.unwrap_or_else(|| Secret::new("")),
        network_bridge_mtu: options.network_bridge_mtu.unwrap_or_default(),
        network_name: options.network_name.unwrap_or_default(),
        network_subnet: options.network_subnet.unwrap_or_default(),
        network_acl_name: options.network_acl_name.unwrap_or_default(),
        storage_device: options.storage_device.unwrap_or_default(),
        storage_pool: options.storage_pool.unwrap_or_default(),
        cpus: options.cpus.unwrap_or_default(),
        cpu_allocation_rate: options.cpu_allocation_rate.unwrap_or_default(),
        memory: options.memory.unwrap_or_default(),
        memory_allocation_rate: options.memory_allocation_rate.unwrap_or_default(),
        gpu_slots: options.gpu_slots,
        gpu_encoder_slots: options.gpu_encoder_slots,
        tags: options.tags,
        unmanaged: options.unmanaged,
    })
}

/// The body that sets one thing, by its name on the command line or in the API.
fn patch(key: &str, value: &str) -> Result<NodePatch> {
    let wrong = |expected: &str| Usage(format!("{key} is {value:?}; expected {expected}"));
    let count = || value.parse::<u32>().map(Some).map_err(|_| wrong("a whole number"));
    let factor = || {
        let factor = value.parse::<f64>().ok().filter(|factor| factor.is_finite() && *factor >= 0.0);
        factor.map(Some).ok_or_else(|| wrong("a number above 0, or 0 for the default"))
    };
    let text = || Some(value.to_owned());
    let mut patch = NodePatch::default();
    match key.replace('_', "-").as_str() {
        "cpus" => patch.cpus = count()?,
        "cpu-allocation-rate" => patch.cpu_allocation_rate = factor()?,
        "memory" => patch.memory = text(),
        "memory-allocation-rate" => patch.memory_allocation_rate = factor()?,
        "gpu-slots" => patch.gpu_slots = count()?,
        "gpu-encoder-slots" => patch.gpu_encoder_slots = count()?,
        "public-address" => patch.public_address = text(),
        "subnet" => patch.subnet = text(),
        "tags" => {
            let words = value.split(',').map(str::trim).filter(|word| !word.is_empty());
            patch.tags = Some(words.map(str::to_owned).collect());
        }
        "unschedulable" => {
            patch.unschedulable = Some(value.parse().map_err(|_| wrong("true or false"))?);
        }
        other => {
            let parts: Vec<&str> = other.split('.').collect();
            let gpu = match parts[..] {
                ["gpus", id, part] => id.parse::<u32>().ok().map(|id| (id, part)),
                _ => None,
            };
            let gpu = match gpu {
                Some((id, "slots")) => NodeGpuPatch { id, slots: count()?, encoder_slots: None },
                Some((id, "encoder-slots")) => NodeGpuPatch { id, slots: None, encoder_slots: count()? },
                _ => {
                    let known = "cpus, cpu-allocation-rate, memory, memory-allocation-rate, gpu-slots, \
                        gpu-encoder-slots, gpus.N.slots, gpus.N.encoder-slots, tags, public-address, subnet, \
                        unschedulable";
                    return Err(Usage(format!("a node has no setting {key:?}; known are {known}")).into());
                }
            };
            patch.gpus = Some(vec![gpu]);
        }
    }
    Ok(patch)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_of_nodes_go_by_the_names_of_the_command_line_and_of_the_api() {
        for key in ["cpu-allocation-rate", "cpu_allocation_rate"] {
            assert_eq!(patch(key, "2.5").expect(key).cpu_allocation_rate, Some(2.5));
        }
        assert_eq!(patch("tags", "a, b,").expect("a list").tags, Some(vec!["a".into(), "b".into()]));
        assert_eq!(patch("tags", "").expect("none").tags, Some(Vec::new()));
        assert_eq!(patch("unschedulable", "true").expect("a truth").unschedulable, Some(true));
        let gpus = patch("gpus.1.encoder_slots", "4").expect("a slot").gpus.expect("one");
        assert_eq!(gpus, [NodeGpuPatch { id: 1, slots: None, encoder_slots: Some(4) }]);
    }

    #[test]
    fn settings_that_make_no_sense_are_named() {
        for (key, value) in [
            ("colour", "red"),
            ("cpus", "-1"),
            ("cpu-allocation-rate", "-1"),
            ("cpu-allocation-rate", "inf"),
            ("unschedulable", "maybe"),
            ("gpus.x.slots", "1"),
            ("gpus.0.colour", "1"),
        ] {
            let error = patch(key, value).expect_err(key);
            assert!(error.is::<Usage>() && error.to_string().contains(key), "{error}");
        }
    }
}
