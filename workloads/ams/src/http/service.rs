//! The service itself, operations, events, tasks and metrics.

use std::{collections::BTreeMap, time::Duration};

use axum::{
    extract::{
        Path, State,
        ws::{
            CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code,
            rejection::WebSocketUpgradeRejection,
        },
    },
    response::{IntoResponse as _, Response},
};
use fanlight_api::{
    OperationId,
    ams::{EVENT_LIFECYCLE, EVENT_OPERATION, Event, Operation, ServiceStatus, Task, Version},
};
use fanlight_service::{ApiError, http::Query};
use fanlight_store::StoreExt as _;
use http::{StatusCode, header};
use serde::Deserialize;
use serde_json::json;
use tokio::sync::broadcast::error::RecvError;

use super::{Caller, Listing, done, store_error};
use crate::{
    Ams,
    core::{model::key, placement::Allocations},
    identity::permissions::{Kind, Object, Rights, catalogue},
    metrics::NodeCount,
    tasks,
};

/// What is there beyond version 1.0; nothing else. Names that begin with `fanlight_` are ours.
const EXTENSIONS: &[&str] = &[
    "instance_support",
    "instance_exec",
    "zip_archive_support",
    "bulk_delete.instances",
    "bulk_delete.applications",
    "application_manifest_version",
    "application_manifest_download",
    "application_image_export",
    "application_partial_updates",
    "oidc_support",
    "auth.groups",
    "metrics_api_endpoint",
    "fanlight_application_pool",
];
/// What is there where instances are made of images.
const WITH_IMAGES: &[&str] =
    &["instance_publish", "application_hooks", "addon_restore_hook", "addon_backup_hook"];
/// Between pings on an events socket.
const PING: Duration = Duration::from_secs(30);

pub(super) async fn versions() -> Response {
    done(["/1.0"])
}

pub(super) async fn status(State(ams): State<Ams>, caller: Caller) -> Response {
    let known = caller.is_known();
    let more = if ams.engine.has_images() { WITH_IMAGES } else { &[] };
    let with_agent: &[&str] = if ams.agent.is_some() { &["instance_share_support"] } else { &[] };
    let extensions = EXTENSIONS.iter().chain(more).chain(with_agent);
    let shown = |text: &str| known.then(|| text.to_owned());
    let mut methods = vec!["2waySSL".to_owned()];
    if !ams.settings.get().oidc.issuer.is_empty() {
        methods.push("oidc".into());
    }
    done(ServiceStatus {
        api_extensions: extensions.map(ToString::to_string).collect(),
        api_status: "stable".into(),
        api_version: "1.0".into(),
        auth: if known { "trusted" } else { "untrusted" }.into(),
        auth_methods: methods,
        auth_permissions: known.then(catalogue),
        cluster_id: shown(&ams.cluster.id),
        cluster_name: shown(&ams.cluster.name),
    })
}

pub(super) async fn version() -> Response {
    done(Version { version: env!("CARGO_PKG_VERSION").into() })
}

pub(super) async fn operations(
    State(ams): State<Ams>,
    caller: Caller,
    Query(query): Query<Listing>,
) -> Result<Response, ApiError> {
    let mut map = ams.operations.list().await.map_err(store_error)?;
    map.retain(|_, list| {
        list.retain(|operation| may_see(&caller.rights, operation));
        !list.is_empty()
    });
    if query.recursion == Some(1) {
        return Ok(done(map));
    }
    let urls = |list: Vec<Operation>| -> Vec<String> {
        list.into_iter().map(|operation| format!("/1.0/operations/{}", operation.id)).collect()
    };
    Ok(done(map.into_iter().map(|(status, list)| (status, urls(list))).collect::<BTreeMap<_, _>>()))
}

/// An operation is shown to whoever may see everything that it is about.
fn may_see(rights: &Rights, operation: &Operation) -> bool {
    let mut urls = operation.resources.values().flatten().peekable();
    *rights == Rights::Everything || (urls.peek().is_some() && urls.all(|url| rights.may_see(url)))
}

async fn find(ams: &Ams, caller: &Caller, id: &str) -> Result<Operation, ApiError> {
    let missing = || ApiError::not_found("operation-not-found", "operation not found");
    let id: OperationId = id.parse().map_err(|_| missing())?;
    let operation = ams.operations.get(&id).await.map_err(store_error)?;
    operation.filter(|operation| may_see(&caller.rights, operation)).ok_or_else(missing)
}

pub(super) async fn operation(
    State(ams): State<Ams>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    Ok(done(find(&ams, &caller, &id).await?))
}

pub(super) async fn cancel_operation(
    State(ams): State<Ams>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let operation = find(&ams, &caller, &id).await?;
    if operation.class == "websocket" && !operation.is_final() {
        for url in operation.resources.values().flatten() {
            let instance = url.rsplit('/').next().unwrap_or_default().to_owned();
            caller.require("can_exec", &Object::One(Kind::Instance, instance))?;
        }
        if ams.execs.cancel(&operation.id) {
            return Ok((StatusCode::ACCEPTED, done(json!({}))).into_response());
        }
    }
    Err(ApiError::bad_request("not-cancellable", "operation cannot be cancelled"))
}

#[derive(Debug, Deserialize)]
pub(super) struct Wait {
    timeout: Option<i64>,
}

pub(super) async fn wait_for_operation(
    State(ams): State<Ams>,
    caller: Caller,
    Path(id): Path<String>,
    Query(query): Query<Wait>,
) -> Result<Response, ApiError> {
    let operation = find(&ams, &caller, &id).await?;
    // Negative or absent: for ever, but not longer than the server runs.
    let timeout = query.timeout.and_then(|seconds| u64::try_from(seconds).ok()).map(Duration::from_secs);
    let waited = tokio::select! {
        waited = ams.operations.wait(&operation.id, timeout) => waited.map_err(store_error)?,
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
    caller: Caller,
    Query(filter): Query<EventFilter>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    let upgrade =
        upgrade.map_err(|_| ApiError::bad_request("websocket-needed", "events are read with a websocket"))?;
    let who = caller.who.ok_or_else(|| ApiError::internal("a caller without a name passed the check"))?;
    let kinds = kinds(filter.kinds.as_deref().unwrap_or(""));
    // From before the answer: nothing that happens after the client sees the socket open is missed.
    let receiver = ams.events.subscribe();
    let shutdown = ams.shutdown.clone();
    Ok(upgrade.on_upgrade(async move |socket| {
        let token = shutdown.token().clone();
        // Asked for each event: rights change while a socket is open.
        let rights = move || ams.identities.rights(&who, ams.settings.get().fine_grained);
        shutdown.spawn("events", async move { tell(socket, receiver, kinds, rights, token).await });
    }))
}

/// Whether somebody with these rights hears of an event.
fn may_hear(rights: &Rights, event: &Event) -> bool {
    match event.kind.as_str() {
        _ if *rights == Rights::Everything => true,
        EVENT_OPERATION => {
            let operation = serde_json::from_value::<Operation>(event.metadata.clone());
            operation.is_ok_and(|operation| may_see(rights, &operation))
        }
        EVENT_LIFECYCLE => {
            event.metadata.get("source").and_then(|url| url.as_str()).is_some_and(|url| rights.may_see(url))
        }
        _ => false,
    }
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
    mut events: tokio::sync::broadcast::Receiver<Event>,
    kinds: Vec<&'static str>,
    rights: impl Fn() -> Option<Rights> + Send,
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
                let Some(rights) = rights() else { break "the caller's identity was removed" };
                if !may_hear(&rights, &event) {
                    continue;
                }
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

/// Starts, stops and removals of instances that are going on; work of the scheduler, as the original calls it.
pub(super) async fn tasks(
    State(ams): State<Ams>,
    caller: Caller,
    Query(query): Query<Listing>,
) -> Result<Response, ApiError> {
    let records = ams.list_instances().await.map_err(store_error)?;
    let mut tasks: Vec<Task> = records.iter().filter_map(|record| tasks::of(record)).collect();
    tasks.retain(|task| caller.may_see(&format!("/1.0/instances/{}", task.object_id)));
    // Not `collection`: the tasks were looked through by what they are about.
    if query.recursion == Some(1) {
        return Ok(done(tasks));
    }
    Ok(done(tasks.into_iter().map(|task| format!("/1.0/tasks/{}", task.id)).collect::<Vec<_>>()))
}

pub(super) async fn metrics(State(ams): State<Ams>) -> Result<Response, ApiError> {
    let mut nodes = Vec::new();
    for node in ams.nodes.list().await.map_err(store_error)? {
        let used = ams.store.get_json::<Allocations>(&key::allocations(&node.offer.node)).await;
        let used = used.map_err(store_error)?.map(|record| record.value.used()).unwrap_or_default();
        let of_gpus = |part: fn(&(u32, u32)) -> u32| used.gpus.values().map(part).sum();
        nodes.push(NodeCount {
            name: node.machine.name.clone(),
            cpus: (node.offer.cpus, used.cpus),
            memory_bytes: (node.offer.memory_bytes, used.memory_bytes),
            gpu_slots: (node.offer.gpus.iter().map(|gpu| gpu.slots).sum(), of_gpus(|gpu| gpu.0)),
            encoder_slots: (node.offer.gpus.iter().map(|gpu| gpu.encoder_slots).sum(), of_gpus(|gpu| gpu.1)),
        });
    }
    let applications = ams.catalog.list().await.map_err(store_error)?.len();
    let instances = ams.list_instances().await.map_err(store_error)?;
    let text = ams.metrics.render(&nodes, applications, instances.iter().map(|record| &**record));
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response())
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
