//! Applications and their versions (ams-api section 10).

use axum::{
    extract::{FromRequest as _, Path, Request, State},
    response::Response,
};
use fanlight_api::ams::{Application, ApplicationPatch, ApplicationVersionPatch, Delete, DeleteMany};
use fanlight_service::{
    ApiError,
    http::{OptionalJson, Query},
};
use http::{HeaderMap, HeaderName, HeaderValue, header};
use serde::Deserialize;

use super::{Listing, Trusted, accepted, collection, object, raw};
use crate::{Ams, catalog::Upload, core::model::ApplicationRecord};

const FINGERPRINT: &str = "x-ams-fingerprint";
const MANIFEST_SHA256: HeaderName = HeaderName::from_static("x-ams-manifestsha256");

#[derive(Debug, Default, Deserialize)]
pub(super) struct Filters {
    recursion: Option<u8>,
    offset: Option<usize>,
    limit: Option<i64>,
    id: Option<String>,
    name: Option<String>,
    status: Option<String>,
    published: Option<bool>,
    tags: Option<String>,
}

impl Filters {
    fn take(&self, application: &Application) -> bool {
        let equal = |wanted: &Option<String>, is: &str| wanted.as_deref().is_none_or(|wanted| wanted == is);
        equal(&self.id, application.id.as_str())
            && equal(&self.name, &application.name)
            && equal(&self.status, &application.status)
            && self.published.is_none_or(|published| published == application.published)
            && has_all(self.tags.as_deref(), &application.tags)
    }
}

/// Whether every word of a comma list is among the tags.
pub(super) fn has_all(wanted: Option<&str>, tags: &[String]) -> bool {
    let mut words = wanted.unwrap_or("").split(',').map(str::trim).filter(|word| !word.is_empty());
    words.all(|word| tags.iter().any(|tag| tag == word))
}

pub(super) async fn list(
    State(ams): State<Ams>,
    _: Trusted,
    Query(filters): Query<Filters>,
) -> Result<Response, ApiError> {
    let all = ams.catalog.list().await.map_err(ApiError::internal)?;
    let list: Vec<Application> =
        all.iter().map(ApplicationRecord::to_api).filter(|application| filters.take(application)).collect();
    let listing = Listing { recursion: filters.recursion, offset: filters.offset, limit: filters.limit };
    Ok(collection(&listing, list, |application| format!("/1.0/applications/{}", application.id)))
}

pub(super) async fn create(
    State(ams): State<Ams>,
    _: Trusted,
    request: Request,
) -> Result<Response, ApiError> {
    if !is_upload(request.headers()) {
        return Err(ApiError::bad_request(
            "package-needed",
            "Content-Type: application/octet-stream and a package as the body are needed",
        ));
    }
    let upload = receive(&ams, request).await?;
    Ok(accepted(&ams.catalog.create(upload).await?))
}

pub(super) async fn show(
    State(ams): State<Ams>,
    _: Trusted,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    Ok(object(ams.catalog.find(&id).await?.value.to_api()))
}

pub(super) async fn update(
    State(ams): State<Ams>,
    _: Trusted,
    Path(id): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    if is_upload(request.headers()) {
        // Before the upload, so that a wrong name costs nothing.
        ams.catalog.find(&id).await?;
        let upload = receive(&ams, request).await?;
        return Ok(accepted(&ams.catalog.update(&id, upload).await?));
    }
    let limited = request
        .map(|body| axum::body::Body::new(http_body_util::Limited::new(body, ams.config.limits.body_bytes)));
    // An empty body asks for a look at images and addons, of which there are none to look at.
    let OptionalJson(patch) = OptionalJson::<ApplicationPatch>::from_request(limited, &ams).await?;
    Ok(accepted(&ams.catalog.patch(&id, &patch).await?))
}

pub(super) async fn delete(
    State(ams): State<Ams>,
    _: Trusted,
    Path(id): Path<String>,
    OptionalJson(request): OptionalJson<Delete>,
) -> Result<Response, ApiError> {
    Ok(accepted(&ams.catalog.delete(&id, request.force).await?))
}

pub(super) async fn delete_many(
    State(ams): State<Ams>,
    _: Trusted,
    OptionalJson(request): OptionalJson<DeleteMany>,
) -> Result<Response, ApiError> {
    let mut last = None;
    for id in &request.ids {
        last = Some(ams.catalog.delete(id, request.force).await?);
    }
    last.map(|operation| accepted(&operation))
        .ok_or_else(|| ApiError::bad_request("invalid-argument", "ids is required"))
}

pub(super) async fn manifest(
    State(ams): State<Ams>,
    _: Trusted,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let application = ams.catalog.find(&id).await?.value;
    let newest = application.versions.last_key_value().map(|(number, _)| *number);
    send_manifest(&ams, &application, newest.unwrap_or(0))
}

pub(super) async fn version_manifest(
    State(ams): State<Ams>,
    _: Trusted,
    Path((id, version)): Path<(String, String)>,
) -> Result<Response, ApiError> {
    let application = ams.catalog.find(&id).await?.value;
    send_manifest(&ams, &application, number(&version)?)
}

fn send_manifest(ams: &Ams, application: &ApplicationRecord, number: u32) -> Result<Response, ApiError> {
    let version = application.versions.get(&number).ok_or(crate::catalog::CatalogError::NoVersion(number))?;
    let mut response = raw(ams.catalog.manifest(&application.id, number)?);
    if let Ok(digest) = HeaderValue::try_from(&version.manifest_sha256) {
        response.headers_mut().insert(MANIFEST_SHA256, digest);
    }
    Ok(response)
}

pub(super) async fn update_version(
    State(ams): State<Ams>,
    _: Trusted,
    Path((id, version)): Path<(String, String)>,
    OptionalJson(patch): OptionalJson<ApplicationVersionPatch>,
) -> Result<Response, ApiError> {
    Ok(accepted(&ams.catalog.publish(&id, number(&version)?, patch.published).await?))
}

pub(super) async fn delete_version(
    State(ams): State<Ams>,
    _: Trusted,
    Path((id, version)): Path<(String, String)>,
    OptionalJson(request): OptionalJson<Delete>,
) -> Result<Response, ApiError> {
    Ok(accepted(&ams.catalog.delete_version(&id, number(&version)?, request.force).await?))
}

fn number(version: &str) -> Result<u32, ApiError> {
    version
        .parse()
        .map_err(|_| ApiError::not_found("application-version-not-found", "application version not found"))
}

fn is_upload(headers: &HeaderMap) -> bool {
    headers
        .get(header::CONTENT_TYPE)
        .and_then(|kind| kind.to_str().ok())
        .is_some_and(|kind| kind.split(';').next().unwrap_or_default().trim() == "application/octet-stream")
}

async fn receive(ams: &Ams, request: Request) -> Result<Upload, ApiError> {
    let announced =
        request.headers().get(FINGERPRINT).and_then(|value| value.to_str().ok()).map(ToOwned::to_owned);
    let announced = announced.filter(|announced| !announced.is_empty());
    Ok(ams.catalog.receive(request.into_body().into_data_stream(), announced.as_deref()).await?)
}
