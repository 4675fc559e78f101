//! Where an instance goes: filter, then choose (ams-model sections 6.2 and 6.3). A pure function over what nodes offer
//! and what of it is promised; it also says why nodes were refused.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    fmt,
};

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
    /// Bytes of disk that may be promised; none: not counted.
    pub disk_bytes: Option<u64>,
    /// Percent of the disk that is free; none: not known.
    pub disk_free_percent: Option<f64>,
    /// GPUs, by number.
    pub gpus: Vec<GpuOffer>,
    /// Most instances, by the addresses and ports there are for them.
    pub places: u32,
}

/// A GPU of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuOffer {
    /// Number on the node.
    pub id: u32,
    /// `amd`, `intel`, `nvidia`.
    pub kind: String,
    /// Instances that may share it.
    pub slots: u32,
    /// Parallel encodes.
    pub encoder_slots: u32,
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
    /// Bytes; 0 for those who ask not to be counted.
    #[serde(default)]
    pub disk_bytes: u64,
    /// GPU slots, all of one GPU.
    pub gpu_slots: u32,
    /// Parallel encodes on that GPU.
    #[serde(default)]
    pub encoder_slots: u32,
    /// Number of that GPU.
    #[serde(default)]
    pub gpu: Option<u32>,
    /// Its place on the node, from 0: what addresses and ports are counted by. No other instance of the node has it.
    #[serde(default)]
    pub place: u32,
}

impl Share {
    /// What is kept for an instance that does not run: its disk and its place.
    #[must_use]
    pub fn at_rest(self) -> Self {
        Self { disk_bytes: self.disk_bytes, place: self.place, ..Self::default() }
    }
}

impl Allocations {
    /// The sum of all shares.
    pub fn used(&self) -> Used {
        let mut used = Used::default();
        for share in self.instances.values() {
            used.add(share);
        }
        used
    }

    /// The first place that nobody has.
    pub fn free_place(&self) -> u32 {
        let taken: BTreeSet<u32> = self.instances.values().map(|share| share.place).collect();
        (0..).find(|place| !taken.contains(place)).unwrap_or(u32::MAX)
    }
}

/// The sum of what is promised of a node. Kept up to date with [`Used::add`] and [`Used::remove`], placing costs the
/// same however many instances there are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Used {
    /// Instances, those at rest included.
    pub instances: u32,
    /// Whole CPUs.
    pub cpus: u32,
    /// Bytes.
    pub memory_bytes: u64,
    /// Bytes.
    pub disk_bytes: u64,
    /// Slots and encodes by GPU.
    pub gpus: BTreeMap<u32, (u32, u32)>,
}

impl Used {
    /// One more.
    pub fn add(&mut self, share: &Share) {
        self.instances += 1;
        self.cpus = self.cpus.saturating_add(share.cpus);
        self.memory_bytes = self.memory_bytes.saturating_add(share.memory_bytes);
        self.disk_bytes = self.disk_bytes.saturating_add(share.disk_bytes);
        if let Some(gpu) = share.gpu {
            let (slots, encodes) = self.gpus.entry(gpu).or_default();
            *slots = slots.saturating_add(share.gpu_slots);
            *encodes = encodes.saturating_add(share.encoder_slots);
        }
    }

    /// One less.
    pub fn remove(&mut self, share: &Share) {
        self.instances = self.instances.saturating_sub(1);
        self.cpus = self.cpus.saturating_sub(share.cpus);
        self.memory_bytes = self.memory_bytes.saturating_sub(share.memory_bytes);
        self.disk_bytes = self.disk_bytes.saturating_sub(share.disk_bytes);
        if let Some((slots, encodes)) = share.gpu.and_then(|gpu| self.gpus.get_mut(&gpu)) {
            *slots = slots.saturating_sub(share.gpu_slots);
            *encodes = encodes.saturating_sub(share.encoder_slots);
        }
    }
}

/// How an instance wants to encode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Encoder {
    /// On a GPU, or not at all.
    Gpu,
    /// On a GPU where one is free.
    GpuPreferred,
    /// On the CPU.
    #[default]
    Software,
}

/// What is looked for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Wish {
    /// What it takes; GPU, encodes and place are chosen here.
    pub share: Share,
    /// How it encodes.
    pub encoder: Encoder,
    /// Kind of GPU; empty: any.
    pub gpu_kind: String,
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
    /// No GPU of that kind with enough free slots.
    GpuSlots,
    /// No GPU with a free encoder.
    EncoderSlots,
    /// No address or port left.
    Places,
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
                Reason::EncoderSlots => "without a free encoder",
                Reason::Places => "without a free address or port",
            };
            write!(f, "{}{count} {what}", if position == 0 { " (nodes: " } else { ", " })?;
        }
        f.write_str(")")
    }
}

impl std::error::Error for Refusal {}

/// Where an instance goes, and its share there without a place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Which node.
    pub node: NodeId,
    /// What it takes of it.
    pub share: Share,
}

/// The node for an instance.
///
/// # Errors
/// None fits; the refusal counts the reasons.
pub fn place<'a>(
    wish: &Wish,
    strategy: Strategy,
    nodes: impl IntoIterator<Item = (&'a Offer, &'a Used)>,
) -> Result<Placed, Refusal> {
    let mut refusal = Refusal::default();
    let mut best: Option<(Score<'a>, Share, &'a NodeId)> = None;
    for (offer, used) in nodes {
        let share = match fit(wish, offer, used) {
            Ok(share) => share,
            Err(reason) => {
                refusal.add(&offer.node, reason);
                continue;
            }
        };
        let free = free_permille(offer, used);
        let score = Score {
            // Who prefers a GPU goes where one is free.
            encodes: share.encoder_slots > 0,
            preferred: match strategy {
                Strategy::Spread => free,
                Strategy::Binpack => 1000 - free,
            },
            fewest: Reverse(used.instances),
            name: Reverse(offer.node.as_str()),
        };
        if best.as_ref().is_none_or(|(best, _, _)| score > *best) {
            best = Some((score, share, &offer.node));
        }
    }
    best.map(|(_, share, node)| Placed { node: node.clone(), share }).ok_or(refusal)
}

impl Refusal {
    fn add(&mut self, node: &NodeId, reason: Reason) {
        *self.counts.entry(reason).or_default() += 1;
        if self.named.len() == NAMED {
            // Most of very many nodes are not named: no copy is made of their names.
            if self.named.last_key_value().is_some_and(|(last, _)| last <= node) {
                return;
            }
            self.named.pop_last();
        }
        self.named.insert(node.clone(), reason);
    }
}

/// Compared field by field; the largest wins.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Score<'a> {
    encodes: bool,
    preferred: u32,
    fewest: Reverse<u32>,
    name: Reverse<&'a str>,
}

/// The share an instance would have of a node.
fn fit(wish: &Wish, offer: &Offer, used: &Used) -> Result<Share, Reason> {
    let share = &wish.share;
    let cpus_left = offer.cpus - f64::from(used.cpus);
    let tests = [
        (offer.online, Reason::Offline),
        (!offer.unschedulable, Reason::Unschedulable),
        (wish.pin.as_ref().is_none_or(|pin| *pin == offer.node), Reason::NotPinned),
        (wish.architecture.is_empty() || wish.architecture == offer.architecture, Reason::Architecture),
        (wish.selector.iter().all(|tag| offer.tags.contains(tag)), Reason::Selector),
        (f64::from(share.cpus) <= cpus_left, Reason::Cpus),
        (used.memory_bytes.saturating_add(share.memory_bytes) <= offer.memory_bytes, Reason::Memory),
        (
            offer.disk_bytes.is_none_or(|disk| used.disk_bytes.saturating_add(share.disk_bytes) <= disk)
                && offer.disk_free_percent.is_none_or(|free| free >= LEAST_DISK_PERCENT),
            Reason::Disk,
        ),
        (used.instances < offer.places, Reason::Places),
    ];
    match tests.into_iter().find(|(fits, _)| !fits) {
        Some((_, reason)) => Err(reason),
        None => fit_gpu(wish, offer, used),
    }
}

/// Takes slots of one GPU, the least used one that has them.
fn fit_gpu(wish: &Wish, offer: &Offer, used: &Used) -> Result<Share, Reason> {
    let must_encode = wish.encoder == Encoder::Gpu;
    let slots = wish.share.gpu_slots.max(u32::from(must_encode));
    let plain = Share { gpu_slots: 0, encoder_slots: 0, gpu: None, ..wish.share };
    if slots == 0 && wish.encoder == Encoder::Software {
        return Ok(plain);
    }
    // A GPU slot goes with an encoder (ams-model section 6.3), also for those who only prefer one.
    let wanted = slots.max(u32::from(wish.encoder != Encoder::Software));
    let free = |gpu: &GpuOffer| {
        let (slots, encodes) = used.gpus.get(&gpu.id).copied().unwrap_or_default();
        (gpu.slots.saturating_sub(slots), gpu.encoder_slots.saturating_sub(encodes))
    };
    let of_kind = || offer.gpus.iter().filter(|gpu| wish.gpu_kind.is_empty() || gpu.kind == wish.gpu_kind);
    let least_used = |encodes: bool, slots: u32| {
        of_kind()
            .filter(|gpu| free(gpu).0 >= slots && (!encodes || free(gpu).1 > 0))
            .max_by_key(|gpu| (free(gpu), Reverse(gpu.id)))
    };
    if wish.encoder != Encoder::Software
        && let Some(gpu) = least_used(true, wanted)
    {
        return Ok(Share { gpu_slots: wanted, encoder_slots: 1, gpu: Some(gpu.id), ..plain });
    }
    if slots == 0 {
        return Ok(plain);
    }
    match least_used(false, slots) {
        None => Err(Reason::GpuSlots),
        Some(_) if must_encode => Err(Reason::EncoderSlots),
        Some(gpu) => Ok(Share { gpu_slots: slots, gpu: Some(gpu.id), ..plain }),
    }
}

/// How free a node is: the scarcer of CPU and memory, 0 to 1000.
fn free_permille(offer: &Offer, used: &Used) -> u32 {
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
            disk_bytes: None,
            disk_free_percent: Some(50.0),
            gpus: Vec::new(),
            places: 1000,
        }
    }

    fn wish() -> Wish {
        Wish { share: Share { cpus: 2, memory_bytes: 3 << 30, ..Share::default() }, ..Wish::default() }
    }

    fn gpu(id: u32, kind: &str, slots: u32, encoder_slots: u32) -> GpuOffer {
        GpuOffer { id, kind: kind.into(), slots, encoder_slots }
    }

    fn fill(offer: &Offer, most: usize) -> (Used, usize) {
        let mut used = Used::default();
        let mut count = 0;
        while count < most
            && let Ok(placed) = place(&wish(), Strategy::Spread, [(offer, &used)])
        {
            used.add(&placed.share);
            count += 1;
        }
        (used, count)
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
            (
                asking(|wish| wish.share.disk_bytes = 2),
                node(|offer| offer.disk_bytes = Some(1)),
                Reason::Disk,
            ),
            (asking(|wish| wish.share.gpu_slots = 1), node(|_| {}), Reason::GpuSlots),
            (asking(|wish| wish.encoder = Encoder::Gpu), node(|_| {}), Reason::GpuSlots),
            (
                asking(|wish| wish.encoder = Encoder::Gpu),
                node(|offer| offer.gpus = vec![gpu(0, "amd", 4, 0)]),
                Reason::EncoderSlots,
            ),
            (
                asking(|wish| {
                    wish.share.gpu_slots = 1;
                    wish.gpu_kind = "nvidia".into();
                }),
                node(|offer| offer.gpus = vec![gpu(0, "amd", 4, 4)]),
                Reason::GpuSlots,
            ),
            (wish(), node(|offer| offer.places = 0), Reason::Places),
        ] {
            let empty = Used::default();
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
    fn a_slot_is_taken_of_the_least_used_gpu_and_an_encoder_where_one_is_free() {
        let offer = Offer { gpus: vec![gpu(0, "nvidia", 2, 1), gpu(1, "nvidia", 2, 1)], ..offer("n1") };
        let mut used = Used::default();
        let mut take = |encoder: Encoder, slots: u32| {
            let share = Share { gpu_slots: slots, ..Share::default() };
            let wish = Wish { share, encoder, ..Wish::default() };
            let placed = place(&wish, Strategy::Spread, [(&offer, &used)]).ok()?;
            used.add(&placed.share);
            Some((placed.share.gpu, placed.share.gpu_slots, placed.share.encoder_slots))
        };
        assert_eq!(take(Encoder::Gpu, 0), Some((Some(0), 1, 1)));
        assert_eq!(take(Encoder::GpuPreferred, 1), Some((Some(1), 1, 1)));
        // No encoder is left: who prefers one goes without, who needs one does not fit.
        assert_eq!(take(Encoder::Gpu, 1), None);
        assert_eq!(take(Encoder::GpuPreferred, 1), Some((Some(0), 1, 0)));
        assert_eq!(take(Encoder::GpuPreferred, 0), Some((None, 0, 0)));
        assert_eq!(take(Encoder::Software, 1), Some((Some(1), 1, 0)));
        assert_eq!(take(Encoder::Software, 1), None);
        assert_eq!(take(Encoder::Software, 0), Some((None, 0, 0)));
    }

    #[test]
    fn spread_takes_the_emptiest_and_binpack_the_fullest_and_names_break_ties() {
        let (empty, half, full) = (offer("b"), offer("a"), offer("c"));
        let (half_used, _) = fill(&half, 5);
        let (full_used, _) = fill(&full, 100);
        let none = Used::default();
        let nodes = [(&empty, &none), (&half, &half_used), (&full, &full_used)];
        let chosen = |strategy| place(&wish(), strategy, nodes).expect("fits").node.to_string();
        assert_eq!(chosen(Strategy::Spread), "b");
        assert_eq!(chosen(Strategy::Binpack), "a");
        let other = offer("a");
        assert_eq!(
            place(&wish(), Strategy::Spread, [(&empty, &none), (&other, &none)]).expect("fits").node.as_str(),
            "a"
        );
    }

    #[test]
    fn a_refusal_names_ten_nodes_and_counts_all() {
        let nodes: Vec<Offer> =
            (0..30).rev().map(|n| Offer { online: false, ..offer(&format!("n{n:02}")) }).collect();
        let empty = Used::default();
        let refusal =
            place(&wish(), Strategy::Spread, nodes.iter().map(|node| (node, &empty))).expect_err("offline");
        assert_eq!(refusal.counts.get(&Reason::Offline), Some(&30));
        assert_eq!(refusal.named.len(), 10);
        assert!(refusal.named.contains_key(&"n09".parse::<NodeId>().expect("valid")));
    }

    #[test]
    fn an_instance_at_rest_keeps_its_disk_and_its_place_and_sums_go_up_and_down() {
        let share = Share {
            cpus: 2,
            memory_bytes: 5,
            disk_bytes: 7,
            gpu_slots: 1,
            encoder_slots: 1,
            gpu: Some(3),
            place: 4,
        };
        let rest = share.at_rest();
        assert_eq!(rest, Share { disk_bytes: 7, place: 4, ..Share::default() });
        let mut used = Used::default();
        used.add(&share);
        assert_eq!((used.instances, used.cpus, used.disk_bytes, used.gpus[&3]), (1, 2, 7, (1, 1)));
        used.remove(&share);
        used.add(&rest);
        assert_eq!((used.instances, used.cpus, used.disk_bytes, used.gpus[&3]), (1, 0, 7, (0, 0)));
        let ids = ["i0", "i1", "i3"].map(|id| id.parse::<InstanceId>().expect("valid"));
        let shares = [0, 1, 3].map(|place| Share { place, ..Share::default() });
        let allocations = Allocations { instances: ids.into_iter().zip(shares).collect() };
        assert_eq!(allocations.free_place(), 2);
    }
}
