//! What a cluster offers: applications and free capacity, read from AMS. A plain value.

use std::time::{Duration, Instant};

use fanlight_api::{
    ams::{Application, ImageStatus, Instance, InstanceStatus, Node},
    bus::{Capacity, ReportedApplication},
    gateway,
};

/// A list this old no longer counts as everything there is.
const FRESH: Duration = Duration::from_secs(15);
/// Most bytes of icons in one report; a message on the bus may have 1 MiB.
const MAX_ICON_BYTES: usize = 512 * 1024;
/// Number of a node that can take instances (ams-api section 12).
const NODE_ONLINE: i32 = 4;

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
            let published = usable().filter(|version| version.published).map(|version| version.number).max();
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
            })
        })
        .collect()
}

/// Free capacity.
pub fn capacity(nodes: &[Node], instances: &[Instance]) -> Capacity {
    let running = instances.iter().filter(|instance| {
        matches!(
            instance.status(),
            InstanceStatus::Prepared | InstanceStatus::Started | InstanceStatus::Running
        )
    });
    let open: Vec<&Node> =
        nodes.iter().filter(|node| node.status_code == NODE_ONLINE && !node.unschedulable).collect();
    // Without nodes nothing is known, which is not the same as nothing being free.
    let known = !nodes.is_empty();
    let rate = |rate: f64| if rate > 0.0 { rate } else { 1.0 };
    let free_cpus = open
        .iter()
        .map(|node| {
            (f64::from(node.cpus) * rate(node.cpu_allocation_rate) - f64::from(node.used_cpus)).max(0.0)
        })
        .sum();
    let free_memory_bytes = open
        .iter()
        .map(|node| {
            let offered = parse_size(&node.memory).unwrap_or(0) as f64 * rate(node.memory_allocation_rate);
            // A float beyond the range of the integer becomes its largest value.
            (offered as u64).saturating_sub(node.used_memory_bytes)
        })
        .fold(0, u64::saturating_add);
    Capacity {
        instances: u32::try_from(running.count()).unwrap_or(u32::MAX),
        free_cpus: known.then_some(free_cpus),
        free_memory_bytes: known.then_some(free_memory_bytes),
    }
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
        assert_eq!(capacity(&[], &[]), Capacity::default(), "unknown");
        let some = capacity(&[node(NODE_ONLINE, false), node(5, false), node(NODE_ONLINE, true)], &[]);
        assert_eq!((some.free_cpus, some.free_memory_bytes), (Some(5.0), Some(1_500_000_000)));
        let full = Node { used_cpus: 99, used_memory_bytes: u64::MAX, ..node(NODE_ONLINE, false) };
        let none = capacity(&[full], &[]);
        assert_eq!((none.free_cpus, none.free_memory_bytes), (Some(0.0), Some(0)));
    }
}
