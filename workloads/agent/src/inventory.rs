//! What a cluster offers: applications and free capacity, read from AMS. A plain value.

use std::time::{Duration, Instant};

use fanlight_api::{
    ams::{
        Application, ApplicationVersion, ImageStatus, Instance, InstanceStatus, Node, PoolState,
        SizedResources,
    },
    bus::{Capacity, Needs, ReportedApplication},
    gateway,
};

/// A list this old no longer counts as everything there is.
const FRESH: Duration = Duration::from_secs(15);
/// Most bytes of icons in one report; a message on the bus may have 1 MiB.
const MAX_ICON_BYTES: usize = 512 * 1024;
/// Number of a node that can take instances (ams-api section 12).
const NODE_ONLINE: i32 = 4;
/// Encoders of a manifest (ams-api section 6): the GPU's and no other, the processor's and no other.
const ENCODER_GPU: &str = "gpu";
const ENCODER_SOFTWARE: &str = "software";

/// What AMS said last.
#[derive(Debug, Default)]
pub struct Inventory {
    pub applications: Vec<ReportedApplication>,
    pub capacity: Capacity,
    pub cluster_id: String,
    /// AMS answered the last question.
    pub reachable: bool,
    /// When the last good list of instances was begun.
    pub listed: Option<Instant>,
}

impl Inventory {
    /// Whether what is known of instances is everything there is.
    pub fn is_complete(&self, now: Instant) -> bool {
        self.reachable && self.listed.is_some_and(|begun| now.saturating_duration_since(begun) < FRESH)
    }

    /// Whether a launch of an application can be refused at once.
    pub fn lacks(&self, application: &str) -> bool {
        self.reachable && !self.applications.iter().any(|known| known.application.name == application)
    }
}

/// Applications that can be launched, as gateways are told.
pub fn reported(applications: &[Application]) -> Vec<ReportedApplication> {
    let (active, _) = ImageStatus::Active.wire();
    let mut icon_bytes = 0;
    applications
        .iter()
        .filter_map(|application| {
            let usable = || application.versions.iter().filter(|version| version.status_code == active);
            let versions: Vec<u32> = usable().map(|version| version.number).collect();
            if versions.is_empty() {
                return None;
            }
            let published = usable().filter(|version| version.published).max_by_key(|version| version.number);
            let needs = needs(&application.resources, published);
            let published = published.map(|version| version.number);
            icon_bytes += application.icon.len();
            let icon = if icon_bytes <= MAX_ICON_BYTES { application.icon.clone() } else { String::new() };
            Some(ReportedApplication {
                application: gateway::Application {
                    name: application.name.clone(),
                    title: application.title.clone(),
                    description: application.description.clone(),
                    icon,
                },
                versions,
                published,
                needs,
            })
        })
        .collect()
}

/// What an instance takes as far as AMS tells; the rest is the default of whichever node it comes to.
fn needs(resources: &SizedResources, published: Option<&ApplicationVersion>) -> Needs {
    // AMS gives a version that insists on a hardware encoder a share of a GPU even when it asks for none.
    let encoder_slots = u32::from(published.is_some_and(|version| version.video_encoder == ENCODER_GPU));
    Needs {
        cpus: resources.cpus,
        memory_bytes: parse_size(&resources.memory).unwrap_or(0),
        gpu_slots: gpu_slots(resources.gpu_slots).max(encoder_slots),
        encoder_slots,
    }
}

/// AMS writes -1 for "not set".
fn gpu_slots(told: i32) -> u32 {
    u32::try_from(told).unwrap_or(0)
}

/// Free capacity. `applications` say which instances encode in hardware.
pub fn capacity(nodes: &[Node], instances: &[Instance], applications: &[Application]) -> Capacity {
    // Those that wait in a pool take nothing from a launch: it gets one of them, or they make room for it.
    let (waiting, running): (Vec<&Instance>, Vec<&Instance>) = instances
        .iter()
        .filter(|instance| {
            matches!(
                instance.status(),
                InstanceStatus::Prepared | InstanceStatus::Started | InstanceStatus::Running
            )
        })
        .partition(|instance| instance.pool == Some(PoolState::Waiting));
    let lent = |node: &Node| -> (u32, u64) {
        waiting.iter().filter(|instance| instance.node == node.name).fold(
            (0, 0),
            |(cpus, memory), instance| {
                let takes = &instance.resources;
                (u32::saturating_add(cpus, takes.cpus), u64::saturating_add(memory, takes.memory))
            },
        )
    };
    let used_cpus = |node: &Node| node.used_cpus.saturating_sub(lent(node).0);
    let used_memory = |node: &Node| node.used_memory_bytes.saturating_sub(lent(node).1);
    let open: Vec<&Node> =
        nodes.iter().filter(|node| node.status_code == NODE_ONLINE && !node.unschedulable).collect();
    // Without nodes nothing is known, which is not the same as nothing being free.
    let known = !nodes.is_empty();
    let rate = |rate: f64| if rate > 0.0 { rate } else { 1.0 };
    let cpus = |node: &Node| f64::from(node.cpus) * rate(node.cpu_allocation_rate);
    // A float beyond the range of the integer becomes its largest value.
    let memory = |node: &Node| {
        (parse_size(&node.memory).unwrap_or(0) as f64 * rate(node.memory_allocation_rate)) as u64
    };
    let sum = |bytes: &dyn Fn(&Node) -> u64| open.iter().map(|node| bytes(node)).fold(0, u64::saturating_add);
    // Node by node, because what one lacks another cannot give.
    let slots = |offered: &dyn Fn(&Node) -> u32, taken: &dyn Fn(&Instance) -> u32| {
        open.iter()
            .map(|node| {
                let here = running.iter().filter(|instance| instance.node == node.name);
                let taken = here.map(|instance| taken(instance)).fold(0, u32::saturating_add);
                offered(node).saturating_sub(taken)
            })
            .fold(0, u32::saturating_add)
    };
    let free_gpu_slots = slots(&|node| node.gpu_slots, &|instance| gpu_slots(instance.resources.gpu_slots));
    let free_encoder_slots = slots(&|node| node.gpu_encoder_slots, &|instance| {
        u32::from(gpu_slots(instance.resources.gpu_slots) > 0 && !in_software(instance, applications))
    });
    let has_encoders = nodes.iter().any(|node| node.gpu_encoder_slots > 0);
    Capacity {
        instances: u32::try_from(running.len()).unwrap_or(u32::MAX),
        // AMS knows no limit of instances as such.
        free_instances: None,
        cpus: known.then(|| open.iter().map(|node| cpus(node)).sum()),
        free_cpus: known
            .then(|| open.iter().map(|node| (cpus(node) - f64::from(used_cpus(node))).max(0.0)).sum()),
        memory_bytes: known.then(|| sum(&memory)),
        free_memory_bytes: known.then(|| sum(&|node| memory(node).saturating_sub(used_memory(node)))),
        free_gpu_slots: known.then_some(free_gpu_slots),
        free_encoder_slots: has_encoders.then_some(free_encoder_slots),
    }
}

/// Whether an instance that has a GPU encodes without it. Every other one does not: it takes the encoder of the GPU
/// as soon as somebody looks.
fn in_software(instance: &Instance, applications: &[Application]) -> bool {
    applications
        .iter()
        .filter(|application| application.name == instance.app_name)
        .flat_map(|application| &application.versions)
        .any(|version| version.number == instance.app_version && version.video_encoder == ENCODER_SOFTWARE)
}

/// Bytes of a size as AMS writes it (`3GB`, `512MB`, `1.5GiB`, `1024`). Units of AMS are powers of 1000 unless
/// they have an `i`.
fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim();
    let split =
        text.find(|character: char| !character.is_ascii_digit() && character != '.').unwrap_or(text.len());
    let number: f64 = text[..split].parse().ok()?;
    let factor = match text[split..].trim() {
        "" | "B" => 1.0,
        "kB" | "KB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "TB" => 1e12,
        "KiB" => 1024.0,
        "MiB" => 1024.0 * 1024.0,
        "GiB" => 1024.0 * 1024.0 * 1024.0,
        "TiB" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        _ => return None,
    };
    Some((number * factor) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_all_units_and_nonsense_is_not() {
        for (text, expected) in [
            ("3GB", Some(3_000_000_000)),
            ("512MB", Some(512_000_000)),
            ("1.5GiB", Some(1_610_612_736)),
            ("1024", Some(1024)),
            (" 2 kB ", Some(2000)),
            ("", None),
            ("GB", None),
            ("3XB", None),
            ("-3GB", None),
            ("1.2.3GB", None),
        ] {
            assert_eq!(parse_size(text), expected, "{text:?}");
        }
    }

    #[test]
    fn only_active_versions_of_applications_are_reported() {
        let version = |number: u32, status: i32, published: bool| serde_json::json!({"number": number, "status_code": status, "status": "", "published": published});
        let application = |name: &str, versions: Vec<serde_json::Value>| -> Application {
            let value = serde_json::json!({"id": "a", "name": name, "status_code": 2, "status": "ready",
                "versions": versions, "title": "T", "icon": "x".repeat(MAX_ICON_BYTES / 2 + 1)});
            serde_json::from_value(value).expect("valid")
        };
        let applications = [
            application(
                "a",
                vec![version(0, 3, true), version(1, 3, true), version(2, -1, true), version(3, 3, false)],
            ),
            application("b", vec![version(0, 1, false)]),
            application("c", vec![version(0, 3, false)]),
        ];
        let reported = reported(&applications);
        let told: Vec<_> = reported
            .iter()
            .map(|known| (known.application.name.as_str(), known.versions.clone(), known.published))
            .collect();
        assert_eq!(told, [("a", vec![0, 1, 3], Some(1)), ("c", vec![0], None)]);
        assert!(!reported[0].application.icon.is_empty());
        assert!(reported[1].application.icon.is_empty(), "the report must fit into a message");
    }

    #[test]
    fn what_an_application_takes_is_told_and_nothing_is_guessed() {
        let application = |resources: serde_json::Value, encoder: &str| -> Application {
            let value = serde_json::json!({"id": "a", "name": "a", "status_code": 2, "status": "ready",
                "resources": resources,
                "versions": [
                    {"number": 0, "status_code": 3, "status": "", "published": true, "video_encoder": "software"},
                    {"number": 1, "status_code": 3, "status": "", "published": true, "video_encoder": encoder},
                    {"number": 2, "status_code": 3, "status": "", "video_encoder": "gpu"}]});
            serde_json::from_value(value).expect("valid")
        };
        let needs = |resources, encoder| reported(&[application(resources, encoder)])[0].needs;
        assert_eq!(needs(serde_json::json!({"gpu-slots": -1}), "gpu-preferred"), Needs::default());
        assert_eq!(
            needs(serde_json::json!({"cpus": 2, "memory": "3GB", "gpu-slots": 2}), "gpu-preferred"),
            Needs { cpus: 2, memory_bytes: 3_000_000_000, gpu_slots: 2, encoder_slots: 0 }
        );
        assert_eq!(
            needs(serde_json::json!({"cpus": 1, "gpu-slots": 0}), "gpu"),
            Needs { cpus: 1, gpu_slots: 1, encoder_slots: 1, ..Needs::default() },
            "who insists on a hardware encoder gets a share of a GPU"
        );
    }

    #[test]
    fn capacity_is_what_open_nodes_have_left() {
        let node = |status: i32, unschedulable: bool| Node {
            status_code: status,
            unschedulable,
            cpus: 4,
            cpu_allocation_rate: 2.0,
            used_cpus: 3,
            memory: "2GB".into(),
            memory_allocation_rate: 1.0,
            used_memory_bytes: 500_000_000,
            ..Node::default()
        };
        assert_eq!(capacity(&[], &[], &[]), Capacity::default(), "unknown");
        let some = capacity(&[node(NODE_ONLINE, false), node(5, false), node(NODE_ONLINE, true)], &[], &[]);
        assert_eq!((some.free_cpus, some.free_memory_bytes), (Some(5.0), Some(1_500_000_000)));
        assert_eq!((some.cpus, some.memory_bytes), (Some(8.0), Some(2_000_000_000)));
        assert_eq!(some.free_gpu_slots, Some(0), "there is no GPU");
        assert_eq!(some.free_encoder_slots, None, "streams are encoded in software");
        let full = Node { used_cpus: 99, used_memory_bytes: u64::MAX, ..node(NODE_ONLINE, false) };
        let none = capacity(&[full], &[], &[]);
        assert_eq!((none.free_cpus, none.free_memory_bytes), (Some(0.0), Some(0)));
    }

    #[test]
    fn what_waits_in_a_pool_counts_as_free() {
        let node = Node {
            name: "n".into(),
            status_code: NODE_ONLINE,
            cpus: 4,
            used_cpus: 4,
            memory: "4GB".into(),
            used_memory_bytes: 4_000_000_000,
            ..Node::default()
        };
        let instance = |pool: Option<&str>, cpus: u32| -> Instance {
            let value = serde_json::json!({"id": "i", "name": "i", "type": "container", "node": "n",
                "status_code": InstanceStatus::Running.code(), "status": "", "pool": pool,
                "resources": {"cpus": cpus, "memory": 1_000_000_000}});
            serde_json::from_value(value).expect("valid")
        };
        let all = [instance(Some("waiting"), 1), instance(Some("claimed"), 1), instance(None, 2)];
        let told = capacity(&[node], &all, &[]);
        assert_eq!(
            (told.free_cpus, told.free_memory_bytes, told.instances),
            (Some(1.0), Some(1_000_000_000), 2)
        );
    }

    #[test]
    fn slots_of_gpus_are_counted_node_by_node() {
        let node = |name: &str, gpu_slots, gpu_encoder_slots| Node {
            name: name.into(),
            status_code: NODE_ONLINE,
            gpu_slots,
            gpu_encoder_slots,
            ..Node::default()
        };
        let instance = |node: &str, status: InstanceStatus, slots: i32, app: &str| -> Instance {
            let value = serde_json::json!({"id": "i", "name": "i", "type": "container", "node": node,
                "status_code": status.code(), "status": "", "app_name": app, "app_version": 0,
                "resources": {"gpu-slots": slots}});
            serde_json::from_value(value).expect("valid")
        };
        let soft: Application = serde_json::from_value(serde_json::json!({"id": "a", "name": "soft",
            "status_code": 2, "status": "ready", "versions": [
                {"number": 0, "status_code": 3, "status": "", "video_encoder": "software"}]}))
        .expect("valid");
        let instances = [
            instance("a", InstanceStatus::Running, 3, "x"),
            // More than there is: another node cannot pay for it.
            instance("a", InstanceStatus::Started, 3, "x"),
            instance("b", InstanceStatus::Running, 1, "soft"),
            instance("b", InstanceStatus::Running, 1, "x"),
            instance("b", InstanceStatus::Running, -1, "x"),
            instance("b", InstanceStatus::Stopped, 1, "x"),
            instance("", InstanceStatus::Prepared, 1, "x"),
        ];
        let told = capacity(&[node("a", 4, 1), node("b", 8, 2)], &instances, &[soft]);
        assert_eq!((told.free_gpu_slots, told.free_encoder_slots), (Some(6), Some(1)));
    }
}
