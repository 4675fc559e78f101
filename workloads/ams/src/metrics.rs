//! What AMS measures, under the names of the original (ams-model section 10). What describes the cluster is counted
//! when somebody asks; what describes requests and starts is collected as it happens.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use fanlight_api::ams::{EVENT_LIFECYCLE, InstanceStatus};
use fanlight_service::{
    http::Finished,
    metrics::{BYTES, Registry, SECONDS},
};
use tokio::sync::broadcast::error::RecvError;

use crate::{core::model::InstanceRecord, events::Events};

const NODES: &str = "ams_cluster_nodes_total";
const APPLICATIONS: &str = "ams_cluster_applications_total";
const CPU: (&str, &str) = ("ams_cluster_available_cpu_total", "ams_cluster_used_cpu_total");
const MEMORY: (&str, &str) = ("ams_cluster_available_memory_total", "ams_cluster_used_memory_total");
const SLOTS: (&str, &str) = ("ams_cluster_available_gpu_slots_total", "ams_cluster_used_gpu_slots_total");
const ENCODES: (&str, &str) =
    ("ams_cluster_available_gpu_encoder_slots_total", "ams_cluster_used_gpu_encoder_slots_total");
/// The newer name and the one that older dashboards have.
const INSTANCES: [&str; 2] = ["ams_cluster_instances_total", "ams_cluster_containers_total"];
const BOOT: [&str; 2] = ["ams_cluster_instance_boot_time_seconds", "ams_cluster_container_boot_time_seconds"];
const PER_APPLICATION: [&str; 2] =
    ["ams_cluster_instances_per_application_total", "ams_cluster_containers_per_application_total"];
const PER_STATUS: [&str; 2] =
    ["ams_cluster_instances_per_status_total", "ams_cluster_containers_per_status_total"];
const PER_NODE: [&str; 2] = ["ams_cluster_instances_per_node_total", "ams_cluster_containers_per_node_total"];
const IN_FLIGHT: &str = "ams_http_in_flight_requests";
const DURATION: &str = "ams_http_request_duration_seconds";
const REQUEST_SIZE: &str = "ams_http_request_size_bytes";
const REQUESTS: &str = "ams_http_requests_total";
const RESPONSE_SIZE: &str = "ams_http_response_size_bytes";

/// Bounds of boot times, seconds.
const BOOT_SECONDS: &[f64] = &[0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 20.0, 30.0, 60.0];
/// Hosts that are told apart; callers can name any.
const MAX_HOSTS: usize = 16;
/// Starts that are waited for at most.
const MAX_STARTS: usize = 100_000;

/// A node, as far as it is counted.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NodeCount {
    /// Its name.
    pub name: String,
    /// CPUs after over-commit, and those promised.
    pub cpus: (f64, u32),
    /// Bytes after over-commit, and those promised.
    pub memory_bytes: (u64, u64),
    /// Slots of all GPUs, and those promised.
    pub gpu_slots: (u32, u32),
    /// Parallel encodes of all GPUs, and those promised.
    pub encoder_slots: (u32, u32),
}

/// The metrics of AMS.
pub struct Metrics {
    registry: Registry,
    hosts: Mutex<BTreeSet<String>>,
    /// Labels that were written, so that what is gone does not stay at its last number.
    labels: Mutex<BTreeSet<(&'static str, &'static str, String)>>,
}

impl Metrics {
    /// With everything declared.
    pub fn new() -> Arc<Self> {
        let registry = Registry::new();
        registry.gauge(NODES, "Nodes.");
        registry.gauge(APPLICATIONS, "Applications.");
        registry.gauge(CPU.0, "CPUs that may be promised, by node.");
        registry.gauge(CPU.1, "CPUs that are promised, by node.");
        registry.gauge(MEMORY.0, "Bytes of memory that may be promised, by node.");
        registry.gauge(MEMORY.1, "Bytes of memory that are promised, by node.");
        registry.gauge(SLOTS.0, "Slots of GPUs, by node.");
        registry.gauge(SLOTS.1, "Slots of GPUs that are promised, by node.");
        registry.gauge(ENCODES.0, "Parallel encodes of GPUs, by node.");
        registry.gauge(ENCODES.1, "Parallel encodes of GPUs that are promised, by node.");
        for name in INSTANCES {
            registry.gauge(name, "Instances.");
        }
        for name in BOOT {
            registry.histogram(name, "From the start of an instance until it is ready.", BOOT_SECONDS);
        }
        for name in PER_APPLICATION {
            registry.gauge(name, "Instances by application.");
        }
        for name in PER_STATUS {
            registry.gauge(name, "Instances by status.");
        }
        for name in PER_NODE {
            registry.gauge(name, "Instances by node.");
        }
        registry.gauge(IN_FLIGHT, "Requests being worked on.");
        registry.histogram(DURATION, "Time from a request's header to its answer's.", SECONDS);
        registry.histogram(REQUEST_SIZE, "Bytes of request bodies.", BYTES);
        registry.counter(REQUESTS, "Requests answered.");
        registry.histogram(RESPONSE_SIZE, "Bytes of answer bodies.", BYTES);
        Arc::new(Self { registry, hosts: Mutex::default(), labels: Mutex::default() })
    }

    /// A request begins.
    pub fn started(&self) {
        self.registry.add(IN_FLIGHT, &[], 1.0);
    }

    /// A request was answered. `scheme`: the listener's; `object`: the route's name.
    pub fn finished(&self, scheme: &str, object: &str, request: &Finished<'_>) {
        self.registry.add(IN_FLIGHT, &[], -1.0);
        let method = match request.method.as_str() {
            known @ ("GET" | "POST" | "PUT" | "PATCH" | "DELETE" | "HEAD") => known,
            _ => "OTHER",
        };
        let host = self.host(request.host);
        let handler = format!("{scheme}_{object}_{method}");
        let labels = [("handler", handler.as_str()), ("host", host.as_str()), ("method", method)];
        self.registry.add(REQUESTS, &labels, 1.0);
        self.registry.observe(DURATION, &labels, request.duration.as_secs_f64());
        self.registry.observe(REQUEST_SIZE, &labels, request.request_bytes as f64);
        self.registry.observe(RESPONSE_SIZE, &labels, request.response_bytes as f64);
    }

    /// The first hosts that were named, and `other` for all after them: whoever makes names up must not push the
    /// others out.
    fn host(&self, host: &str) -> String {
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        if hosts.contains(host) || (hosts.len() < MAX_HOSTS && hosts.insert(host.to_owned())) {
            return host.to_owned();
        }
        "other".into()
    }

    /// Measures how long starts take, for ever.
    pub async fn follow(self: Arc<Self>, events: Events) {
        let mut events = events.subscribe();
        let mut begun: HashMap<String, Instant> = HashMap::new();
        loop {
            let event = match events.recv().await {
                Ok(event) if event.kind == EVENT_LIFECYCLE => event,
                Ok(_) => continue,
                // Whatever began in between is not measured.
                Err(RecvError::Lagged(_)) => {
                    begun.clear();
                    continue;
                }
                Err(RecvError::Closed) => return,
            };
            let text = |name: &str| event.metadata.get(name).and_then(|value| value.as_str());
            let (Some(action), Some(source)) = (text("action"), text("source")) else { continue };
            match action {
                "instance-started" if begun.len() < MAX_STARTS => {
                    begun.insert(source.to_owned(), Instant::now());
                }
                "instance-running" => {
                    if let Some(begun) = begun.remove(source) {
                        self.booted(begun.elapsed().as_secs_f64());
                    }
                }
                "instance-stopped" | "instance-failed" | "instance-removed" => {
                    begun.remove(source);
                }
                _ => {}
            }
        }
    }

    fn booted(&self, seconds: f64) {
        for name in BOOT {
            self.registry.observe(name, &[], seconds);
        }
    }

    /// Everything as text, with what is counted now.
    pub fn render<'a>(
        &self,
        nodes: &[NodeCount],
        applications: usize,
        instances: impl IntoIterator<Item = &'a InstanceRecord>,
    ) -> String {
        let mut counts: BTreeMap<(&'static str, &'static str, String), f64> = BTreeMap::new();
        let mut labels = self.labels.lock().unwrap_or_else(PoisonError::into_inner);
        for known in labels.iter() {
            counts.insert(known.clone(), 0.0);
        }
        for status in InstanceStatus::ALL {
            for name in PER_STATUS {
                counts.insert((name, "status", status.as_str().to_owned()), 0.0);
            }
        }
        let mut all = 0_u32;
        for record in instances {
            all += 1;
            let shown = record.observed.status.as_str();
            let application = record.application.as_ref().map_or("", |application| &application.name);
            let node = record.node.as_ref().map(ToString::to_string).unwrap_or_default();
            for (names, label, value) in [
                (PER_STATUS, "status", shown),
                (PER_APPLICATION, "application", application),
                (PER_NODE, "node", &node),
            ] {
                for name in names.into_iter().filter(|_| !value.is_empty()) {
                    *counts.entry((name, label, value.to_owned())).or_default() += 1.0;
                }
            }
        }
        for node in nodes {
            for ((available, used), (most, taken)) in [
                (CPU, (node.cpus.0, f64::from(node.cpus.1))),
                (MEMORY, (node.memory_bytes.0 as f64, node.memory_bytes.1 as f64)),
                (SLOTS, (f64::from(node.gpu_slots.0), f64::from(node.gpu_slots.1))),
                (ENCODES, (f64::from(node.encoder_slots.0), f64::from(node.encoder_slots.1))),
            ] {
                counts.insert((available, "node", node.name.clone()), (most - taken).max(0.0));
                counts.insert((used, "node", node.name.clone()), taken);
            }
            for name in PER_NODE {
                counts.entry((name, "node", node.name.clone())).or_default();
            }
        }
        for ((name, label, value), count) in &counts {
            self.registry.set(name, &[(label, value)], *count);
        }
        labels.extend(counts.into_keys());
        drop(labels);
        self.registry.set(NODES, &[], nodes.len() as f64);
        self.registry.set(APPLICATIONS, &[], applications as f64);
        for name in INSTANCES {
            self.registry.set(name, &[], f64::from(all));
        }
        self.registry.render()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_names_of_the_original_are_all_there() {
        let metrics = Metrics::new();
        let request = |host: &'static str| Finished {
            method: &http::Method::GET,
            route: Some("/1.0/instances"),
            path: "/1.0/instances",
            host,
            status: http::StatusCode::OK,
            duration: Duration::from_millis(3),
            request_bytes: 10,
            response_bytes: 20,
        };
        metrics.started();
        metrics.finished("https", "instances", &request("ams"));
        metrics.booted(1.5);
        let node = NodeCount {
            name: "n0".into(),
            cpus: (8.0, 3),
            memory_bytes: (100, 30),
            gpu_slots: (4, 1),
            encoder_slots: (2, 2),
        };
        let text = metrics.render(&[node], 2, []);
        for line in [
            "ams_cluster_nodes_total 1",
            "ams_cluster_applications_total 2",
            "ams_cluster_instances_total 0",
            "ams_cluster_containers_total 0",
            "ams_cluster_instances_per_status_total{status=\"running\"} 0",
            "ams_cluster_containers_per_status_total{status=\"error\"} 0",
            "ams_cluster_instances_per_node_total{node=\"n0\"} 0",
            "ams_cluster_available_cpu_total{node=\"n0\"} 5",
            "ams_cluster_used_cpu_total{node=\"n0\"} 3",
            "ams_cluster_available_memory_total{node=\"n0\"} 70",
            "ams_cluster_used_memory_total{node=\"n0\"} 30",
            "ams_cluster_available_gpu_slots_total{node=\"n0\"} 3",
            "ams_cluster_used_gpu_encoder_slots_total{node=\"n0\"} 2",
            "ams_cluster_instance_boot_time_seconds_bucket{le=\"2\"} 1",
            "ams_cluster_container_boot_time_seconds_count 1",
            "ams_http_in_flight_requests 0",
            "ams_http_requests_total{handler=\"https_instances_GET\",host=\"ams\",method=\"GET\"} 1",
            "ams_http_request_size_bytes_sum{handler=\"https_instances_GET\",host=\"ams\",method=\"GET\"} 10",
        ] {
            assert!(text.contains(line), "{line} is missing in:\n{text}");
        }
        // A node that is gone is not shown with what it had.
        let text = metrics.render(&[], 0, []);
        assert!(text.contains("ams_cluster_used_cpu_total{node=\"n0\"} 0"), "{text}");
    }

    #[test]
    fn hosts_that_callers_make_up_are_counted_together() {
        let metrics = Metrics::new();
        let hosts: BTreeSet<String> = (0..100).map(|number| metrics.host(&number.to_string())).collect();
        assert_eq!(hosts.len(), MAX_HOSTS + 1);
        assert_eq!((metrics.host("0"), metrics.host("new")), ("0".into(), "other".into()));
    }
}
