//! What the gateway measures, under the names of the original (gateway-api section 10).

use std::{collections::BTreeMap, sync::Arc};

use fanlight_api::gateway::SessionStatus;
use fanlight_service::{
    http::{Envelope, Finished, GatewayStyle, PublicError},
    metrics::{BYTES, Registry, SECONDS},
};
use serde_json::Value;

use crate::session::Session;

const SESSIONS: &str = "anbox_stream_gateway_sessions_total";
const ACCOUNTS: &str = "anbox_stream_gateway_accounts_total";
const AGENTS: &str = "anbox_stream_gateway_agents_total";
const UNRESPONSIVE: &str = "anbox_stream_gateway_agents_unresponsive";
const IN_FLIGHT: &str = "anbox_stream_gateway_http_in_flight_requests";
const DURATION: &str = "anbox_stream_gateway_http_request_duration_seconds";
const REQUEST_SIZE: &str = "anbox_stream_gateway_http_request_size_bytes";
const REQUESTS: &str = "anbox_stream_gateway_http_requests_total";
const RESPONSE_SIZE: &str = "anbox_stream_gateway_http_response_size_bytes";
const FUNNEL: &str = "fanlight_gateway_connect_step_seconds";
const SOCKETS: &str = "fanlight_gateway_sockets";

/// The gateway's metrics and its envelope.
pub struct Observer {
    registry: Registry,
}

impl Observer {
    /// With everything declared.
    pub fn new() -> Arc<Self> {
        let registry = Registry::new();
        registry.gauge(SESSIONS, "Sessions by status.");
        registry.gauge(ACCOUNTS, "Accounts.");
        registry.gauge(AGENTS, "Agents heard of within the last seconds.");
        registry.gauge(UNRESPONSIVE, "Agents that have fallen silent.");
        registry.gauge(IN_FLIGHT, "Requests being worked on.");
        registry.histogram(DURATION, "Time from a request's header to its answer's.", SECONDS);
        registry.histogram(REQUEST_SIZE, "Bytes of request bodies.", BYTES);
        registry.counter(REQUESTS, "Requests answered.");
        registry.histogram(RESPONSE_SIZE, "Bytes of answer bodies.", BYTES);
        registry.histogram(
            FUNNEL,
            "Steps of connecting a client, since its first frame of signalling.",
            SECONDS,
        );
        registry.gauge(SOCKETS, "Open signalling sockets.");
        Arc::new(Self { registry })
    }

    /// A step of a client's way to its first frame.
    pub fn funnel(&self, step: &str, duration_ms: u64) {
        self.registry.observe(FUNNEL, &[("step", step)], duration_ms as f64 / 1000.0);
    }

    /// A socket was opened (1) or closed (-1).
    pub fn socket(&self, change: f64) {
        self.registry.add(SOCKETS, &[], change);
    }

    /// Everything as text, with what is counted now.
    pub fn render(
        &self,
        sessions: &[Arc<Session>],
        accounts: usize,
        (alive, silent): (usize, usize),
    ) -> String {
        let mut counts: BTreeMap<&str, usize> =
            ["created", "active", "error", "terminating", "terminated"].map(|status| (status, 0)).into();
        for session in sessions {
            let status = match session.status {
                SessionStatus::Created => "created",
                SessionStatus::Active => "active",
                SessionStatus::Error => "error",
                SessionStatus::Terminating => "terminating",
                SessionStatus::Terminated => "terminated",
            };
            *counts.entry(status).or_default() += 1;
        }
        for (status, count) in counts {
            self.registry.set(SESSIONS, &[("status", status)], count as f64);
        }
        self.registry.set(ACCOUNTS, &[], accounts as f64);
        self.registry.set(AGENTS, &[], alive as f64);
        self.registry.set(UNRESPONSIVE, &[], silent as f64);
        self.registry.render()
    }
}

impl Envelope for Observer {
    fn error_body(&self, error: &PublicError<'_>) -> Value {
        GatewayStyle.error_body(error)
    }

    fn started(&self) {
        self.registry.add(IN_FLIGHT, &[], 1.0);
    }

    fn finished(&self, request: &Finished<'_>) {
        self.registry.add(IN_FLIGHT, &[], -1.0);
        let handler = handler(request.method.as_str(), request.route, request.path);
        let labels = [("handler", handler), ("host", request.host), ("method", request.method.as_str())];
        self.registry.add(REQUESTS, &labels, 1.0);
        self.registry.observe(DURATION, &labels, request.duration.as_secs_f64());
        self.registry.observe(REQUEST_SIZE, &labels, request.request_bytes as f64);
        self.registry.observe(RESPONSE_SIZE, &labels, request.response_bytes as f64);
    }
}

/// The label of a route.
fn handler(method: &str, route: Option<&str>, path: &str) -> &'static str {
    match (method, route.unwrap_or_default()) {
        ("GET", "/1.0/status") => "get_service_status",
        ("POST", "/1.0/sessions") => "create_new_session",
        ("GET", "/1.0/sessions") => "get_sessions",
        ("DELETE", "/1.0/sessions") => "delete_sessions",
        ("GET", "/1.0/sessions/{id}") => "get_session",
        ("DELETE", "/1.0/sessions/{id}") => "delete_session",
        ("POST", "/1.0/sessions/{id}/join") => "join_session",
        ("GET", "/1.0/sessions/{id}/sockets/{role}" | "/1.0/session/{id}/sockets/{role}") => {
            match path.trim_end_matches('/').rsplit('/').next() {
                Some("master") => "streaming_websocket_master",
                Some("adb") => "streaming_websocket_adb",
                _ => "streaming_websocket_slave",
            }
        }
        ("POST", "/1.0/sessions/{id}/share") => "share_session",
        ("GET", "/1.0/sessions/{id}/connect") => "connect_session",
        ("GET", "/1.0/shares") => "get_shares",
        ("GET", "/1.0/shares/{id}") => "get_share",
        ("PATCH", "/1.0/shares/{id}") => "update_share",
        ("DELETE", "/1.0/shares/{id}") => "delete_share",
        ("GET", "/1.0/config") => "get_config",
        ("PATCH", "/1.0/config") => "update_config",
        ("GET", "/1.0/doctor") => "diagnose",
        ("GET", "/1.0/applications") => "get_applications",
        ("GET", "/1.0/regions") => "get_regions",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::tests::session;

    #[test]
    fn the_names_of_the_original_are_all_there() {
        let observer = Observer::new();
        observer.started();
        observer.finished(&Finished {
            method: &http::Method::POST,
            route: Some("/1.0/sessions"),
            path: "/1.0/sessions",
            host: "gw",
            status: http::StatusCode::CREATED,
            duration: std::time::Duration::from_millis(3),
            request_bytes: 10,
            response_bytes: 20,
        });
        let text = observer.render(&[Arc::new(session())], 2, (1, 0));
        for line in [
            "anbox_stream_gateway_sessions_total{status=\"created\"} 1",
            "anbox_stream_gateway_accounts_total 2",
            "anbox_stream_gateway_agents_total 1",
            "anbox_stream_gateway_agents_unresponsive 0",
            "anbox_stream_gateway_http_in_flight_requests 0",
            "anbox_stream_gateway_http_requests_total{handler=\"create_new_session\",host=\"gw\",method=\"POST\"} 1",
            "anbox_stream_gateway_http_request_duration_seconds_count{handler=\"create_new_session\",host=\"gw\",method=\"POST\"} 1",
        ] {
            assert!(text.contains(line), "{line} is missing in:\n{text}");
        }
    }
}
