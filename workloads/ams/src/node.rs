//! The one node there is: this machine.

use std::path::Path;

use fanlight_api::{NodeId, ams};

use crate::{
    config,
    core::placement::{Offer, Share},
    size,
};

/// This machine.
#[derive(Clone, Debug)]
pub struct Node {
    name: NodeId,
    config: config::Node,
    cpus: u32,
    memory_bytes: u64,
}

impl Node {
    /// Looks at the machine where the configuration says nothing.
    pub fn new(config: &config::Node) -> Self {
        let cpus = match config.cpus {
            0 => std::thread::available_parallelism()
                .map_or(1, |cpus| u32::try_from(cpus.get()).unwrap_or(u32::MAX)),
            cpus => cpus,
        };
        let memory_bytes = size::parse(&config.memory).unwrap_or_else(|_| memory_bytes());
        Self {
            name: config.name.parse().expect("the configuration was checked"),
            config: config.clone(),
            cpus,
            memory_bytes,
        }
    }

    /// Its name.
    pub fn name(&self) -> &NodeId {
        &self.name
    }

    /// Its address, as shown.
    pub fn address(&self) -> &str {
        &self.config.address
    }

    /// What placement may count on. `folder`: where instances lie.
    pub fn offer(&self, folder: &Path) -> Offer {
        Offer {
            node: self.name.clone(),
            online: true,
            unschedulable: self.config.unschedulable,
            architecture: std::env::consts::ARCH.into(),
            tags: self.config.tags.clone(),
            cpus: f64::from(self.cpus) * self.config.cpu_allocation_rate,
            memory_bytes: (self.memory_bytes as f64 * self.config.memory_allocation_rate) as u64,
            gpu_slots: 0,
            disk_free_percent: disk(folder).map(|(free, all)| free as f64 * 100.0 / all.max(1) as f64),
        }
    }

    /// As answered.
    pub fn to_api(&self, folder: &Path, used: Share) -> ams::Node {
        ams::Node {
            name: self.name.to_string(),
            address: self.config.address.clone(),
            public_address: self.config.public_address.clone(),
            cpus: self.cpus,
            cpu_allocation_rate: self.config.cpu_allocation_rate,
            memory: size::format(self.memory_bytes),
            memory_allocation_rate: self.config.memory_allocation_rate,
            status_code: 4,
            status: "online".into(),
            is_master: true,
            disk_size: disk(folder).map(|(_, all)| size::format(all)).unwrap_or_default(),
            tags: self.config.tags.clone(),
            unschedulable: self.config.unschedulable,
            unscheduable: self.config.unschedulable,
            architecture: std::env::consts::ARCH.into(),
            instance_types: vec!["container".into()],
            used_cpus: used.cpus,
            used_memory_bytes: used.memory_bytes,
            ..ams::Node::default()
        }
    }
}

/// Free and all bytes of the disk a folder lies on.
fn disk(folder: &Path) -> Option<(u64, u64)> {
    let stat = rustix::fs::statvfs(folder).ok()?;
    Some((stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize))
}

fn memory_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
