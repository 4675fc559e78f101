//! Instances and their logs (ams-api section 9).

use axum::{
    extract::{Path, State},
    response::Response,
};
use fanlight_api::ams::{Delete, DeleteMany, Instance, InstancePatch, InstancesPost};
use fanlight_service::{
    ApiError,
    http::{Json, OptionalJson, Query},
};
use http::HeaderMap;
use serde::Deserialize;

use super::{
    Caller, Listing, accepted, access::resolve, applications::has_all, collection, done, object_for, raw,
};
use crate::{
    Ams,
    engine::EngineError,
    identity::permissions::{Kind, Object},
};

const IDEMPOTENCY_KEY: &str = "idempotency-key";

/// Which of them are listed.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Filters {
    recursion: Option<u8>,
    offset: Option<usize>,
    limit: Option<i64>,
    entitlements: Option<u8>,
    id: Option<String>,
    name: Option<String>,
    pub(super) base: Option<bool>,
    #[serde(rename = "type")]
    pub(super) kind: Option<String>,
    status: Option<String>,
    node: Option<String>,
    app_id: Option<String>,
    app_name: Option<String>,
    app_version: Option<u32>,
    image_id: Option<String>,
    image_version: Option<u32>,
    tags: Option<String>,
}

impl Filters {
    pub(super) fn listing(&self) -> Listing {
        Listing {
            recursion: self.recursion,
            offset: self.offset,
            limit: self.limit,
            entitlements: self.entitlements,
        }
    }

    fn take(&self, instance: &Instance) -> bool {
        let equal = |wanted: &Option<String>, is: &str| wanted.as_deref().is_none_or(|wanted| wanted == is);
        equal(&self.id, instance.id.as_str())
            && equal(&self.name, &instance.name)
            && self.base.is_none_or(|base| base == instance.base)
            && equal(&self.kind, &instance.kind)
            && equal(&self.status, &instance.status)
            && equal(&self.node, &instance.node)
            && equal(&self.app_id, &instance.app_id)
            && equal(&self.app_name, &instance.app_name)
            && self.app_version.is_none_or(|version| version == instance.app_version)
            && equal(&self.image_id, &instance.image_id)
            && self.image_version.is_none_or(|version| version == instance.image_version)
            && has_all(self.tags.as_deref(), &instance.tags)
    }
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct Wait {
    no_wait: Option<bool>,
}

pub(super) async fn list(
    State(ams): State<Ams>,
    caller: Caller,
    Query(filters): Query<Filters>,
) -> Result<Response, ApiError> {
    let list = find(&ams, &filters).await?;
    Ok(collection(&caller, &filters.listing(), list, |instance| format!("/1.0/instances/{}", instance.id)))
}

/// Those that the filters let through.
pub(super) async fn find(ams: &Ams, filters: &Filters) -> Result<Vec<Instance>, ApiError> {
    let mut list = Vec::new();
    let nodes = ams.nodes.list().await.map_err(super::store_error)?;
    for record in ams.list_instances().await.map_err(super::store_error)? {
        let instance = ams.show_among(&record, &nodes).await;
        if filters.take(&instance) {
            list.push(instance);
        }
    }
    Ok(list)
}

pub(super) async fn create(
    State(ams): State<Ams>,
    Query(query): Query<Wait>,
    headers: HeaderMap,
    Json(request): Json<InstancesPost>,
) -> Result<Response, ApiError> {
    let key = match headers.get(IDEMPOTENCY_KEY) {
        None => None,
        Some(key) => Some(key.to_str().map_err(|_| {
            ApiError::bad_request("invalid-argument", "argument Idempotency-Key is invalid: it is not ASCII")
        })?),
    };
    Ok(accepted(&ams.create_instance(request, query.no_wait.unwrap_or(false), key).await?))
}

pub(super) async fn show(
    State(ams): State<Ams>,
    caller: Caller,
    Path(id): Path<String>,
    Query(query): Query<Listing>,
) -> Result<Response, ApiError> {
    let record = ams.find_instance(&id).await?.value;
    Ok(object_for(&caller, &query, &record.url(), ams.show_instance(&record).await))
}

pub(super) async fn update(
    State(ams): State<Ams>,
    Path(id): Path<String>,
    Query(query): Query<Wait>,
    Json(request): Json<InstancePatch>,
) -> Result<Response, ApiError> {
    Ok(accepted(&ams.patch_instance(&id, &request, query.no_wait.unwrap_or(false)).await?))
}

pub(super) async fn delete(
    State(ams): State<Ams>,
    Path(id): Path<String>,
    OptionalJson(request): OptionalJson<Delete>,
) -> Result<Response, ApiError> {
    Ok(accepted(&ams.delete_instance(&id, request.force).await?))
}

pub(super) async fn delete_many(
    State(ams): State<Ams>,
    caller: Caller,
    OptionalJson(request): OptionalJson<DeleteMany>,
) -> Result<Response, ApiError> {
    // All of them, before the first is gone.
    for id in &request.ids {
        if let Some(id) = resolve(&ams, Kind::Instance, id).await? {
            caller.require("can_delete", &Object::One(Kind::Instance, id))?;
        }
    }
    let mut last = None;
    for id in &request.ids {
        last = Some(ams.delete_instance(id, request.force).await?);
    }
    last.map(|operation| accepted(&operation))
        .ok_or_else(|| ApiError::bad_request("invalid-argument", "ids is required"))
}

pub(super) async fn logs(State(ams): State<Ams>, Path(id): Path<String>) -> Result<Response, ApiError> {
    let record = ams.find_instance(&id).await?.value;
    let names = ams.engine.logs(&record.id).await;
    let urls: Vec<String> = names.into_iter().map(|name| format!("{}/logs/{name}", record.url())).collect();
    Ok(done(urls))
}

pub(super) async fn log(
    State(ams): State<Ams>,
    Path((id, name)): Path<(String, String)>,
) -> Result<Response, ApiError> {
    let record = ams.find_instance(&id).await?.value;
    match ams.engine.read_log(&record.id, &name).await {
        Ok(bytes) => Ok(raw(bytes)),
        Err(error @ EngineError::NoLog(_)) => Err(ApiError::not_found("log-not-found", error.to_string())),
        Err(error) => Err(ApiError::internal(error)),
    }
}
