//! Instances and their logs (ams-api section 9).

use axum::{
    extract::{Path, State},
    response::Response,
};
use fanlight_api::{
    NodeId,
    ams::{Delete, DeleteMany, Instance, InstancePatch, InstancesPost},
};
use fanlight_service::{
    ApiError,
    http::{Json, OptionalJson, Query},
};
use http::HeaderMap;
use serde::{Deserialize, Serialize};

use super::{Caller, Listing, Page, accepted, access::resolve, applications::has_all, done, object_for, raw};
use crate::{
    Ams,
    core::model::{InstanceRecord, KIND},
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

    fn take(&self, instance: &InstanceRecord) -> bool {
        let equal = |wanted: &Option<String>, is: &str| wanted.as_deref().is_none_or(|wanted| wanted == is);
        let application = instance.application.as_ref();
        equal(&self.id, instance.id.as_str())
            && equal(&self.name, &instance.name)
            && self.base.is_none_or(|base| base == instance.base)
            && equal(&self.kind, KIND)
            && equal(&self.status, instance.status().as_str())
            && equal(&self.node, instance.node.as_ref().map_or("", NodeId::as_str))
            && equal(&self.app_id, application.map_or("", |application| application.id.as_str()))
            && equal(&self.app_name, application.map_or("", |application| &application.name))
            && self
                .app_version
                .is_none_or(|version| version == application.map_or(0, |application| application.version))
            && equal(&self.image_id, &instance.image.id)
            && self.image_version.is_none_or(|version| version == instance.image.version)
            && (self.tags.is_none() || has_all(self.tags.as_deref(), &instance.all_tags()))
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
    list_as(&ams, &caller, &filters, |record| record.url(), |instance| instance).await
}

/// Those that the filters let through, under these URLs and in this shape.
pub(super) async fn list_as<S: Serialize>(
    ams: &Ams,
    caller: &Caller,
    filters: &Filters,
    url: impl Fn(&InstanceRecord) -> String,
    shape: impl Fn(Instance) -> S,
) -> Result<Response, ApiError> {
    let query = filters.listing();
    let mut records = ams.list_instances().await.map_err(super::store_error)?;
    records.retain(|record| filters.take(record));
    let page = Page::of(caller, &query, records, |record| url(record));
    if !query.shows_objects() {
        return Ok(page.answer(caller, &query, |record| url(record), |_| ()));
    }
    let nodes = ams.nodes.list().await.map_err(super::store_error)?;
    let mut looks = Vec::with_capacity(page.objects.len());
    for record in page.objects {
        let look = ams.look(&record, &nodes).await;
        looks.push((record, look));
    }
    let page = Page { objects: looks, total: page.total };
    Ok(page.answer(caller, &query, |(record, _)| url(record), |(record, look)| shape(look.show(record))))
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
