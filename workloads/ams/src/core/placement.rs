//! Where an instance goes: filter, then score (ams-model section 6.2). One node today; the rules are for many.

use std::{cmp::Reverse, collections::BTreeMap, fmt};

use fanlight_api::{InstanceId, NodeId};
use serde::{Deserialize, Serialize};

/// What is offered by a node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Offer {
    /// Which.
    pub node: NodeId,
    /// Takes instances at all.
    pub online: bool,
    /// Takes no new ones.
    pub unschedulable: bool,
    /// `x86_64`, `aarch64`.
    pub architecture: String,
    /// Free words.
    pub tags: Vec<String>,
    /// CPUs after over-commit.
    pub cpus: f64,
    /// Bytes after over-commit.
    pub memory_bytes: u64,
    /// GPU slots.
    pub gpu_slots: u32,
    /// Percent of the disk that is free; none: not known.
    pub disk_free_percent: Option<f64>,
}

/// What instances of a node have been promised. Written in the transaction that changes an instance.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allocations {
    /// By instance.
    pub instances: BTreeMap<InstanceId, Share>,
}

/// What one instance has been promised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// Whole CPUs.
    pub cpus: u32,
    /// Bytes.
    pub memory_bytes: u64,
    /// GPU slots.
    pub gpu_slots: u32,
}

impl Allocations {
    /// Sum of all shares.
    pub fn used(&self) -> Share {
        self.instances.values().fold(Share::default(), |sum, share| Share {
            cpus: sum.cpus.saturating_add(share.cpus),
            memory_bytes: sum.memory_bytes.saturating_add(share.memory_bytes),
            gpu_slots: sum.gpu_slots.saturating_add(share.gpu_slots),
        })
    }
}

/// What is looked for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Wish {
    /// What it takes.
    pub share: Share,
    /// This node and no other.
    pub pin: Option<NodeId>,
    /// Tags that the node must have.
    pub selector: Vec<String>,
    /// Empty: any.
    pub architecture: String,
}

/// How to choose among the nodes that fit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// The emptiest.
    #[default]
    Spread,
    /// The fullest that fits.
    Binpack,
}

/// Least free space on a node's disk, percent.
const LEAST_DISK_PERCENT: f64 = 5.0;
/// Nodes named in a refusal.
const NAMED: usize = 10;

/// Why a node was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// Not online.
    Offline,
    /// Takes no new instances.
    Unschedulable,
    /// Another node was asked for.
    NotPinned,
    /// Another architecture.
    Architecture,
    /// A tag is missing.
    Selector,
    /// Not enough CPUs.
    Cpus,
    /// Not enough memory.
    Memory,
    /// Not enough free disk.
    Disk,
    /// Not enough GPU slots.
    GpuSlots,
}

/// Nothing fits.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// Nodes per reason.
    pub counts: BTreeMap<Reason, usize>,
    /// The first ten by name.
    pub named: BTreeMap<NodeId, Reason>,
}

impl fmt::Display for Refusal {
    /// The documented text first, because scripts look for it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("No suitable node to satisfy instance requirement available")?;
        if self.counts.is_empty() {
            return f.write_str(" (there is no node)");
        }
        for (position, (reason, count)) in self.counts.iter().enumerate() {
            let what = match reason {
                Reason::Offline => "offline",
                Reason::Unschedulable => "unschedulable",
                Reason::NotPinned => "not the node asked for",
                Reason::Architecture => "of another architecture",
                Reason::Selector => "without the tags asked for",
                Reason::Cpus => "without enough free CPUs",
                Reason::Memory => "without enough free memory",
                Reason::Disk => "without enough free disk",
                Reason::GpuSlots => "without enough free GPU slots",
            };
            write!(f, "{}{count} {what}", if position == 0 { " (nodes: " } else { ", " })?;
        }
        f.write_str(")")
    }
}

impl std::error::Error for Refusal {}

/// The node for an instance.
///
/// # Errors
/// None fits; the refusal counts the reasons.
pub fn place<'a>(
    wish: &Wish,
    strategy: Strategy,
    nodes: impl IntoIterator<Item = (&'a Offer, &'a Allocations)>,
) -> Result<&'a NodeId, Refusal> {
    let mut refusal = Refusal::default();
    let mut best: Option<(Score<'a>, &'a NodeId)> = None;
    for (offer, allocations) in nodes {
        let used = allocations.used();
        if let Some(reason) = refuse(wish, offer, used) {
            *refusal.counts.entry(reason).or_default() += 1;
            refusal.named.insert(offer.node.clone(), reason);
            if refusal.named.len() > NAMED {
                refusal.named.pop_last();
            }
            continue;
        }
        let free = free_permille(offer, used);
        let score = Score {
            preferred: match strategy {
                Strategy::Spread => free,
                Strategy::Binpack => 1000 - free,
            },
            fewest: Reverse(allocations.instances.len()),
            name: Reverse(offer.node.as_str()),
        };
        if best.as_ref().is_none_or(|(best, _)| score > *best) {
            best = Some((score, &offer.node));
        }
    }
    best.map(|(_, node)| node).ok_or(refusal)
}

/// Compared field by field; the largest wins.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Score<'a> {
    preferred: u32,
    fewest: Reverse<usize>,
    name: Reverse<&'a str>,
}

fn refuse(wish: &Wish, offer: &Offer, used: Share) -> Option<Reason> {
    let cpus_left = offer.cpus - f64::from(used.cpus);
    let tests = [
        (offer.online, Reason::Offline),
        (!offer.unschedulable, Reason::Unschedulable),
        (wish.pin.as_ref().is_none_or(|pin| *pin == offer.node), Reason::NotPinned),
        (wish.architecture.is_empty() || wish.architecture == offer.architecture, Reason::Architecture),
        (wish.selector.iter().all(|tag| offer.tags.contains(tag)), Reason::Selector),
        (f64::from(wish.share.cpus) <= cpus_left, Reason::Cpus),
        (used.memory_bytes.saturating_add(wish.share.memory_bytes) <= offer.memory_bytes, Reason::Memory),
        (offer.disk_free_percent.is_none_or(|free| free >= LEAST_DISK_PERCENT), Reason::Disk),
        (used.gpu_slots.saturating_add(wish.share.gpu_slots) <= offer.gpu_slots, Reason::GpuSlots),
    ];
    tests.into_iter().find(|(fits, _)| !fits).map(|(_, reason)| reason)
}

/// How free a node is: the scarcer of CPU and memory, 0 to 1000.
fn free_permille(offer: &Offer, used: Share) -> u32 {
    let part = |used: f64, all: f64| if all > 0.0 { (1.0 - used / all).clamp(0.0, 1.0) } else { 0.0 };
    let cpus = part(f64::from(used.cpus), offer.cpus);
    let memory = part(used.memory_bytes as f64, offer.memory_bytes as f64);
    (cpus.min(memory) * 1000.0) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(name: &str) -> Offer {
        Offer {
            node: name.parse().expect("valid"),
            online: true,
            unschedulable: false,
            architecture: "x86_64".into(),
            tags: vec!["ssd".into()],
            cpus: 32.0,
            memory_bytes: 32 << 30,
            gpu_slots: 0,
            disk_free_percent: Some(50.0),
        }
    }

    fn wish() -> Wish {
        Wish { share: Share { cpus: 2, memory_bytes: 3 << 30, gpu_slots: 0 }, ..Wish::default() }
    }

    fn fill(offer: &Offer, most: usize) -> (Allocations, usize) {
        let mut allocations = Allocations::default();
        let mut count = 0;
        while count < most && place(&wish(), Strategy::Spread, [(offer, &allocations)]).is_ok() {
            allocations.instances.insert(format!("i{count:04}").parse().expect("valid"), wish().share);
            count += 1;
        }
        (allocations, count)
    }

    #[test]
    fn as_many_instances_fit_as_the_reference_counts() {
        // 8 cores and 16 GB at the default rates: 10 instances, bound by memory; 4 without over-commit.
        assert_eq!(fill(&offer("n1"), 100).1, 10);
        assert_eq!(fill(&Offer { cpus: 8.0, memory_bytes: 16 << 30, ..offer("n1") }, 100).1, 4);
    }

    #[test]
    fn every_reason_is_given_where_it_applies() {
        let node = |change: fn(&mut Offer)| {
            let mut offer = offer("n1");
            change(&mut offer);
            offer
        };
        let asking = |change: fn(&mut Wish)| {
            let mut wish = wish();
            change(&mut wish);
            wish
        };
        for (wish, offer, reason) in [
            (wish(), node(|offer| offer.online = false), Reason::Offline),
            (wish(), node(|offer| offer.unschedulable = true), Reason::Unschedulable),
            (asking(|wish| wish.pin = "n2".parse().ok()), node(|_| {}), Reason::NotPinned),
            (asking(|wish| wish.architecture = "aarch64".into()), node(|_| {}), Reason::Architecture),
            (asking(|wish| wish.selector = vec!["gpu".into()]), node(|_| {}), Reason::Selector),
            (asking(|wish| wish.share.cpus = 33), node(|_| {}), Reason::Cpus),
            (asking(|wish| wish.share.memory_bytes = u64::MAX), node(|_| {}), Reason::Memory),
            (wish(), node(|offer| offer.disk_free_percent = Some(4.9)), Reason::Disk),
            (asking(|wish| wish.share.gpu_slots = 1), node(|_| {}), Reason::GpuSlots),
        ] {
            let empty = Allocations::default();
            let refusal = place(&wish, Strategy::Spread, [(&offer, &empty)]).expect_err("does not fit");
            assert_eq!(refusal.counts.get(&reason), Some(&1), "{refusal:?}");
            assert!(
                refusal
                    .to_string()
                    .starts_with("No suitable node to satisfy instance requirement available (")
            );
        }
    }

    #[test]
    fn spread_takes_the_emptiest_and_binpack_the_fullest_and_names_break_ties() {
        let (empty, half, full) = (offer("b"), offer("a"), offer("c"));
        let (half_used, _) = fill(&half, 5);
        let (full_used, _) = fill(&full, 100);
        let none = Allocations::default();
        let nodes = [(&empty, &none), (&half, &half_used), (&full, &full_used)];
        let chosen = |strategy| place(&wish(), strategy, nodes).expect("fits").as_str().to_owned();
        assert_eq!(chosen(Strategy::Spread), "b");
        assert_eq!(chosen(Strategy::Binpack), "a");
        let other = offer("a");
        assert_eq!(
            place(&wish(), Strategy::Spread, [(&empty, &none), (&other, &none)]).expect("fits").as_str(),
            "a"
        );
    }

    #[test]
    fn a_refusal_names_ten_nodes_and_counts_all() {
        let nodes: Vec<Offer> =
            (0..30).map(|n| Offer { online: false, ..offer(&format!("n{n:02}")) }).collect();
        let empty = Allocations::default();
        let refusal =
            place(&wish(), Strategy::Spread, nodes.iter().map(|node| (node, &empty))).expect_err("offline");
        assert_eq!(refusal.counts.get(&Reason::Offline), Some(&30));
        assert_eq!(refusal.named.len(), 10);
        assert!(refusal.named.contains_key(&"n09".parse::<NodeId>().expect("valid")));
    }
}
