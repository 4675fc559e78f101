//! `/1.0/containers`: instances under the name and in the shapes that clients before 1.20 know (ams-api section 9.5).
//! What is done is the same as under `/1.0/instances`; addresses and operations name what was asked for.

use axum::{
    extract::{Path, Request, State},
    middleware::Next,
    response::Response,
};
use fanlight_api::ams::{Instance, InstanceConfig, InstancesPost, ResourcesPost, Service};
use fanlight_service::{
    ApiError,
    http::{Json, Query},
};
use http::HeaderMap;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::{
    Caller, Listing, collection, done,
    instances::{self, Filters, Wait},
    object_for,
};
use crate::{Ams, core::model::InstanceRecord, operations::CALLED, size};

/// How the callers of these routes call instances.
const CONTAINERS: &str = "containers";

/// Lets operations of a request name containers.
pub(super) async fn called(request: Request, next: Next) -> Response {
    CALLED.scope(CONTAINERS, next.run(request)).await
}

/// Body of `POST /1.0/containers`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub(super) struct ContainersPost {
    /// Default `ams-<id>`.
    name: Option<String>,
    /// Id or name of an application.
    app_id: Option<String>,
    /// Absent or -1: latest published.
    app_version: Option<i64>,
    /// Id or name of an image.
    image_id: Option<String>,
    /// Absent or -1: latest.
    image_version: Option<i64>,
    /// Node to run on; empty: any.
    node: Option<String>,
    /// At most 10 240 bytes.
    user_data: Option<String>,
    /// Only without an application.
    addons: Option<Vec<String>>,
    /// Ports to expose.
    services: Option<Vec<Service>>,
    /// Free words.
    tags: Option<Vec<String>>,
    /// Settings.
    config: Option<InstanceConfig>,
    /// Prepare only.
    no_start: Option<bool>,
    /// Whole CPUs.
    cpus: Option<i64>,
    /// Bytes.
    memory: Option<i64>,
    /// Bytes.
    disk_size: Option<i64>,
    /// -1 = the application's.
    #[serde(rename = "gpu-slots")]
    gpu_slots: Option<i64>,
    /// Slots of video cards.
    #[serde(rename = "vpu-slots")]
    vpu_slots: Option<i64>,
}

impl From<ContainersPost> for InstancesPost {
    fn from(post: ContainersPost) -> Self {
        Self {
            name: post.name.unwrap_or_default(),
            app_id: post.app_id.unwrap_or_default(),
            app_version: post.app_version,
            image_id: post.image_id.unwrap_or_default(),
            image_version: post.image_version,
            node: post.node.unwrap_or_default(),
            user_data: post.user_data,
            addons: post.addons.unwrap_or_default(),
            services: post.services.unwrap_or_default(),
            tags: post.tags.unwrap_or_default(),
            config: post.config.unwrap_or_default(),
            no_start: post.no_start.unwrap_or_default(),
            resources: ResourcesPost {
                cpus: post.cpus,
                memory: post.memory,
                disk_size: post.disk_size,
                gpu_slots: post.gpu_slots,
                vpu_slots: post.vpu_slots,
                ..ResourcesPost::default()
            },
            ..Self::default()
        }
    }
}

pub(super) async fn list(
    State(ams): State<Ams>,
    caller: Caller,
    Query(mut filters): Query<Filters>,
) -> Result<Response, ApiError> {
    // The kind of an instance is none of a container's; its type says whether applications are made in it.
    filters.base = match filters.kind.take().as_deref() {
        None | Some("") => None,
        Some("base") => Some(true),
        Some("regular") => Some(false),
        Some(_) => {
            return Ok(collection(&caller, &filters.listing(), Vec::<Value>::new(), |_| String::new()));
        }
    };
    let url = |record: &InstanceRecord| url(record.id.as_str());
    instances::list_as(&ams, &caller, &filters, url, |instance| container(&instance)).await
}

pub(super) async fn create(
    state: State<Ams>,
    query: Query<Wait>,
    headers: HeaderMap,
    Json(request): Json<ContainersPost>,
) -> Result<Response, ApiError> {
    instances::create(state, query, headers, Json(request.into())).await
}

pub(super) async fn show(
    State(ams): State<Ams>,
    caller: Caller,
    Path(id): Path<String>,
    Query(query): Query<Listing>,
) -> Result<Response, ApiError> {
    let record = ams.find_instance(&id).await?.value;
    Ok(object_for(&caller, &query, &record.url(), container(&ams.show_instance(&record).await)))
}

pub(super) async fn logs(State(ams): State<Ams>, Path(id): Path<String>) -> Result<Response, ApiError> {
    let record = ams.find_instance(&id).await?.value;
    let names = ams.engine.logs(&record.id).await;
    let urls: Vec<String> =
        names.into_iter().map(|name| format!("{}/logs/{name}", url(record.id.as_str()))).collect();
    Ok(done(urls))
}

fn url(id: &str) -> String {
    format!("/1.0/{CONTAINERS}/{id}")
}

/// An instance in the older shape: sizes as texts, and nothing of display, streaming and protection.
fn container(instance: &Instance) -> Value {
    let resources = &instance.resources;
    let config = &instance.config;
    json!({
        "id": instance.id,
        "name": instance.name,
        "type": if instance.base { "base" } else { "regular" },
        "status_code": instance.status_code,
        "status": instance.status,
        "status_message": instance.status_message,
        "error_message": instance.error_message,
        "node": instance.node,
        "app_id": instance.app_id,
        "app_name": instance.app_name,
        "app_version": instance.app_version,
        "image_id": instance.image_id,
        "image_version": instance.image_version,
        "created_at": instance.created_at,
        "address": instance.address,
        "public_address": instance.public_address,
        "services": instance.services,
        "stored_logs": instance.stored_logs,
        "config": {
            "platform": config.platform,
            "boot_package": config.boot_package,
            "boot_activity": config.boot_activity,
            "metrics_server": config.metrics_server,
            "disable_watchdog": config.disable_watchdog,
            "devmode": config.devmode,
        },
        "resources": {
            "cpus": resources.cpus,
            "memory": size::format(resources.memory),
            "disk-size": size::format(resources.disk_size),
            "gpu-slots": resources.gpu_slots,
            "vpu-slots": resources.vpu_slots,
        },
        "architecture": instance.architecture,
        "tags": instance.tags,
    })
}
