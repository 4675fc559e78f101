//! The service itself, operations, events, certificates and nodes.

use std::{collections::BTreeMap, time::Duration};

use axum::{
    extract::{
        Path, State,
        ws::{
            CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code,
            rejection::WebSocketUpgradeRejection,
        },
    },
    response::Response,
};
use fanlight_api::{
    OperationId,
    ams::{CertificatesPost, EVENT_LIFECYCLE, EVENT_OPERATION, Operation, ServiceStatus, Version},
};
use fanlight_service::{
    ApiError,
    http::{Json, Query},
    tls::fingerprint,
};
use fanlight_store::StoreExt as _;
use serde::Deserialize;
use serde_json::json;
use tokio::sync::broadcast::error::RecvError;

use super::{Caller, Listing, Trusted, accepted, collection, done, object};
use crate::{
    Ams,
    core::{model::key, placement::Allocations},
    trust,
};

/// What is there beyond version 1.0; nothing else.
const EXTENSIONS: &[&str] = &[
    "instance_support",
    "zip_archive_support",
    "bulk_delete.instances",
    "bulk_delete.applications",
    "application_manifest_version",
    "application_manifest_download",
    "application_partial_updates",
];
/// Between pings on an events socket.
const PING: Duration = Duration::from_secs(30);

pub(super) async fn versions() -> Response {
    done(["/1.0"])
}

pub(super) async fn status(State(ams): State<Ams>, caller: Caller) -> Response {
    let shown = |text: &str| caller.trusted.then(|| text.to_owned());
    done(ServiceStatus {
        api_extensions: EXTENSIONS.iter().map(ToString::to_string).collect(),
        api_status: "stable".into(),
        api_version: "1.0".into(),
        auth: if caller.trusted { "trusted" } else { "untrusted" }.into(),
        auth_methods: vec!["2waySSL".into()],
        auth_permissions: caller.trusted.then(BTreeMap::new),
        cluster_id: shown(&ams.cluster.id),
        cluster_name: shown(&ams.cluster.name),
    })
}

pub(super) async fn version() -> Response {
    done(Version { version: env!("CARGO_PKG_VERSION").into() })
}

/// The keys of the original that have a meaning here, as they are.
pub(super) async fn config(State(ams): State<Ams>, _: Trusted) -> Response {
    let config = &ams.config;
    done(json!({"config": {
        "agent.api.fingerprint": config.agent.fingerprint,
        "agent.api.url": config.agent.url,
        "application.auto_publish": config.applications.auto_publish,
        "application.max_published_versions": config.applications.max_published_versions,
        "core.https_address": ams.address.to_string(),
        "core.trust_password": !config.trust.password_file.as_os_str().is_empty(),
        "scheduler.strategy": config.node.strategy,
    }}))
}

pub(super) async fn operations(
    State(ams): State<Ams>,
    _: Trusted,
    Query(query): Query<Listing>,
) -> Result<Response, ApiError> {
    let map = ams.operations.list().await.map_err(ApiError::internal)?;
    if query.recursion == Some(1) {
        return Ok(done(map));
    }
    let urls = |list: Vec<Operation>| -> Vec<String> {
        list.into_iter().map(|operation| format!("/1.0/operations/{}", operation.id)).collect()
    };
    Ok(done(map.into_iter().map(|(status, list)| (status, urls(list))).collect::<BTreeMap<_, _>>()))
}

async fn find(ams: &Ams, id: &str) -> Result<Operation, ApiError> {
    let missing = || ApiError::not_found("operation-not-found", "operation not found");
    let id: OperationId = id.parse().map_err(|_| missing())?;
    ams.operations.get(&id).await.map_err(ApiError::internal)?.ok_or_else(missing)
}

pub(super) async fn operation(
    State(ams): State<Ams>,
    _: Trusted,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    Ok(done(find(&ams, &id).await?))
}

pub(super) async fn cancel_operation(
    State(ams): State<Ams>,
    _: Trusted,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    find(&ams, &id).await?;
    Err(ApiError::bad_request("not-cancellable", "operation cannot be cancelled"))
}

#[derive(Debug, Deserialize)]
pub(super) struct Wait {
    timeout: Option<i64>,
}

pub(super) async fn wait_for_operation(
    State(ams): State<Ams>,
    _: Trusted,
    Path(id): Path<String>,
    Query(query): Query<Wait>,
) -> Result<Response, ApiError> {
    let operation = find(&ams, &id).await?;
    // Negative or absent: for ever, but not longer than the server runs.
    let timeout = query.timeout.and_then(|seconds| u64::try_from(seconds).ok()).map(Duration::from_secs);
    let waited = tokio::select! {
        waited = ams.operations.wait(&operation.id, timeout) => waited.map_err(ApiError::internal)?,
        () = ams.shutdown.stopping() => return Err(ApiError::unavailable("stopping", "AMS is shutting down")),
    };
    waited.map(done).ok_or_else(|| ApiError::not_found("operation-not-found", "operation not found"))
}

#[derive(Debug, Deserialize)]
pub(super) struct EventFilter {
    #[serde(rename = "type")]
    kinds: Option<String>,
}

pub(super) async fn events(
    State(ams): State<Ams>,
    _: Trusted,
    Query(filter): Query<EventFilter>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    let upgrade =
        upgrade.map_err(|_| ApiError::bad_request("websocket-needed", "events are read with a websocket"))?;
    let kinds = kinds(filter.kinds.as_deref().unwrap_or(""));
    // From before the answer: nothing that happens after the client sees the socket open is missed.
    let receiver = ams.events.subscribe();
    let shutdown = ams.shutdown.clone();
    Ok(upgrade.on_upgrade(async move |socket| {
        let token = shutdown.token().clone();
        shutdown.spawn("events", async move { tell(socket, receiver, kinds, token).await });
    }))
}

/// Kinds of events that a filter lets through; empty: all.
fn kinds(filter: &str) -> Vec<&'static str> {
    let words: Vec<&str> = filter.split(',').map(str::trim).filter(|word| !word.is_empty()).collect();
    if words.contains(&"all") {
        return Vec::new();
    }
    words
        .into_iter()
        .map(|word| match word {
            "operation" | "operations" => EVENT_OPERATION,
            EVENT_LIFECYCLE => EVENT_LIFECYCLE,
            // Accepted, never sent.
            _ => "logging",
        })
        .collect()
}

async fn tell(
    mut socket: WebSocket,
    mut events: tokio::sync::broadcast::Receiver<fanlight_api::ams::Event>,
    kinds: Vec<&'static str>,
    stopping: tokio_util::sync::CancellationToken,
) {
    let mut ping = tokio::time::interval(PING);
    ping.reset();
    let mut unanswered = 0;
    let reason = loop {
        tokio::select! {
            event = events.recv() => {
                let event = match event {
                    Ok(event) if kinds.is_empty() || kinds.contains(&event.kind.as_str()) => event,
                    Ok(_) => continue,
                    // The client must know that it missed something; it looks at everything when it is back.
                    Err(RecvError::Lagged(_)) => break "events were lost, because they were read too slowly",
                    Err(RecvError::Closed) => break "AMS is shutting down",
                };
                let text = serde_json::to_string(&event).expect("an event is JSON");
                if socket.send(Message::Text(text.into())).await.is_err() {
                    return;
                }
            }
            _ = ping.tick() => {
                unanswered += 1;
                if unanswered > 2 || socket.send(Message::Ping(Vec::new().into())).await.is_err() {
                    return;
                }
            }
            message = socket.recv() => match message {
                Some(Ok(Message::Close(_))) | None | Some(Err(_)) => return,
                // Anything that arrives shows that somebody is there.
                Some(Ok(_)) => unanswered = 0,
            },
            () = stopping.cancelled() => break "AMS is shutting down",
        }
    };
    let close = CloseFrame { code: close_code::AWAY, reason: reason.into() };
    let _ = socket.send(Message::Close(Some(close))).await;
}

pub(super) async fn certificates(
    State(ams): State<Ams>,
    _: Trusted,
    Query(query): Query<Listing>,
) -> Result<Response, ApiError> {
    let list = ams.trust.list().await.map_err(ApiError::internal)?;
    Ok(collection(&query, list, |certificate| certificate_url(&certificate.fingerprint)))
}

pub(super) async fn certificate(
    State(ams): State<Ams>,
    _: Trusted,
    Path(fingerprint): Path<String>,
) -> Result<Response, ApiError> {
    ams.trust.get(&fingerprint).await.map_err(ApiError::internal)?.map(object).ok_or_else(no_certificate)
}

pub(super) async fn add_certificate(
    State(ams): State<Ams>,
    caller: Caller,
    Json(request): Json<CertificatesPost>,
) -> Result<Response, ApiError> {
    if !caller.trusted && !ams.trust.is_password(&request.trust_password) {
        // Guessing must not be fast.
        tokio::time::sleep(Duration::from_millis(500)).await;
        return Err(ApiError::forbidden("not-trusted", "Not Authorized: the trust password is wrong"));
    }
    let der = trust::certificate(&request.certificate)?;
    let fingerprint = fingerprint(&der);
    let url = certificate_url(&fingerprint);
    let (operation, write) = ams.operations.prepare_done("Adding certificate", "certificates", &url, Ok(()));
    ams.trust.add(&der, vec![write]).await?;
    ams.operations.begun(&operation);
    tracing::info!("certificate {fingerprint} is trusted now");
    Ok(accepted(&operation))
}

pub(super) async fn remove_certificate(
    State(ams): State<Ams>,
    _: Trusted,
    Path(fingerprint): Path<String>,
) -> Result<Response, ApiError> {
    if ams.trust.get(&fingerprint).await.map_err(ApiError::internal)?.is_none() {
        return Err(no_certificate());
    }
    let url = certificate_url(&fingerprint);
    let (operation, write) =
        ams.operations.prepare_done("Removing certificate", "certificates", &url, Ok(()));
    ams.trust.remove(&fingerprint, vec![write]).await?;
    ams.operations.begun(&operation);
    tracing::info!("certificate {fingerprint} is not trusted any more");
    Ok(accepted(&operation))
}

fn certificate_url(fingerprint: &str) -> String {
    format!("/1.0/certificates/{fingerprint}")
}

fn no_certificate() -> ApiError {
    ApiError::not_found("certificate-not-found", "certificate not found")
}

pub(super) async fn nodes(
    State(ams): State<Ams>,
    _: Trusted,
    Query(query): Query<Listing>,
) -> Result<Response, ApiError> {
    let node = local(&ams).await?;
    Ok(collection(&query, vec![node], |node| format!("/1.0/nodes/{}", node.name)))
}

pub(super) async fn node(
    State(ams): State<Ams>,
    _: Trusted,
    Path(name): Path<String>,
) -> Result<Response, ApiError> {
    if name != ams.node.name().as_str() {
        return Err(ApiError::not_found("node-not-found", "node not found"));
    }
    Ok(object(local(&ams).await?))
}

async fn local(ams: &Ams) -> Result<fanlight_api::ams::Node, ApiError> {
    let allocations = ams.store.get_json::<Allocations>(&key::allocations(ams.node.name())).await;
    let used = allocations.map_err(ApiError::internal)?.map(|record| record.value.used()).unwrap_or_default();
    Ok(ams.node.to_api(&ams.config.folder, used))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_of_events_are_read_in_every_spelling() {
        assert!(kinds("").is_empty() && kinds("all").is_empty() && kinds("operation,all").is_empty());
        assert_eq!(kinds("operations"), [EVENT_OPERATION]);
        assert_eq!(kinds("operation, lifecycle"), [EVENT_OPERATION, EVENT_LIFECYCLE]);
        assert_eq!(kinds("logging"), ["logging"]);
    }
}
