//! Applications and their versions (ams-api section 10).

use axum::{
    extract::{FromRequest as _, Path, Request, State},
    response::{IntoResponse as _, Response},
};
use fanlight_api::ams::{Application, ApplicationPatch, ApplicationVersionPatch, Delete, DeleteMany};
use fanlight_service::{
    ApiError,
    http::{OptionalJson, Query},
};
use http::{HeaderMap, HeaderName, HeaderValue, header};
use serde::{Deserialize, de::DeserializeOwned};

use super::{Caller, Listing, accepted, access::resolve, collection, object, object_for, raw};
use crate::{
    Ams,
    catalog::{Below, Upload},
    core::model::ApplicationRecord,
    identity::permissions::{Kind, Object},
};

/// Metadata of an upload.
const REQUEST: &str = "x-ams-request";
pub(super) const FINGERPRINT: &str = "x-ams-fingerprint";
const MANIFEST_SHA256: HeaderName = HeaderName::from_static("x-ams-manifestsha256");

#[derive(Debug, Default, Deserialize)]
pub(super) struct Filters {
    recursion: Option<u8>,
    offset: Option<usize>,
    limit: Option<i64>,
    entitlements: Option<u8>,
    id: Option<String>,
    name: Option<String>,
    status: Option<String>,
    published: Option<bool>,
    tags: Option<String>,
    addons: Option<String>,
    inhibit_auto_updates: Option<bool>,
}

impl Filters {
    fn take(&self, application: &Application) -> bool {
        let equal = |wanted: &Option<String>, is: &str| wanted.as_deref().is_none_or(|wanted| wanted == is);
        equal(&self.id, application.id.as_str())
            && equal(&self.name, &application.name)
            && equal(&self.status, &application.status)
            && self.published.is_none_or(|published| published == application.published)
            && has_all(self.tags.as_deref(), &application.tags)
            && has_all(self.addons.as_deref(), &application.addons)
            && self.inhibit_auto_updates.is_none_or(|inhibit| inhibit == application.inhibit_auto_updates)
    }
}

/// Whether every word of a comma list is among the tags.
pub(super) fn has_all(wanted: Option<&str>, tags: &[String]) -> bool {
    let mut words = wanted.unwrap_or("").split(',').map(str::trim).filter(|word| !word.is_empty());
    words.all(|word| tags.iter().any(|tag| tag == word))
}

pub(super) async fn list(
    State(ams): State<Ams>,
    caller: Caller,
    Query(filters): Query<Filters>,
) -> Result<Response, ApiError> {
    let all = ams.catalog.list().await.map_err(ApiError::internal)?;
    let list: Vec<Application> =
        all.iter().map(ApplicationRecord::to_api).filter(|application| filters.take(application)).collect();
    let listing = Listing {
        recursion: filters.recursion,
        offset: filters.offset,
        limit: filters.limit,
        entitlements: filters.entitlements,
    };
    Ok(collection(&caller, &listing, list, |application| format!("/1.0/applications/{}", application.id)))
}

pub(super) async fn create(State(ams): State<Ams>, request: Request) -> Result<Response, ApiError> {
    if !is_upload(request.headers()) {
        return Err(ApiError::bad_request(
            "package-needed",
            "Content-Type: application/octet-stream and a package as the body are needed",
        ));
    }
    let upload = receive(&ams, request).await?;
    let operation = ams.catalog.create(upload).await?;
    ams.make_new_versions(&operation).await.map_err(super::store_error)?;
    Ok(accepted(&operation))
}

pub(super) async fn show(
    State(ams): State<Ams>,
    caller: Caller,
    Path(id): Path<String>,
    Query(query): Query<Listing>,
) -> Result<Response, ApiError> {
    let record = ams.catalog.find(&id).await?.value;
    Ok(object_for(&caller, &query, &format!("/1.0/applications/{}", record.id), record.to_api()))
}

pub(super) async fn update(
    State(ams): State<Ams>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    if is_upload(request.headers()) {
        // Before the upload, so that a wrong name costs nothing.
        ams.catalog.find(&id).await?;
        let upload = receive(&ams, request).await?;
        let operation = ams.catalog.update(&id, upload).await?;
        ams.make_new_versions(&operation).await.map_err(super::store_error)?;
        return Ok(accepted(&operation));
    }
    let limited = request
        .map(|body| axum::body::Body::new(http_body_util::Limited::new(body, ams.config.limits.body_bytes)));
    let OptionalJson(patch) = OptionalJson::<ApplicationPatch>::from_request(limited, &ams).await?;
    let operation = match patch == ApplicationPatch::default() {
        // An empty body asks for a look at the image and the addons.
        true => ams.catalog.renew(&id, &Below::default()).await?,
        false => ams.catalog.patch(&id, &patch).await?,
    };
    ams.make_new_versions(&operation).await.map_err(super::store_error)?;
    Ok(accepted(&operation))
}

pub(super) async fn delete(
    State(ams): State<Ams>,
    Path(id): Path<String>,
    OptionalJson(request): OptionalJson<Delete>,
) -> Result<Response, ApiError> {
    Ok(accepted(&ams.catalog.delete(&id, request.force).await?))
}

pub(super) async fn delete_many(
    State(ams): State<Ams>,
    caller: Caller,
    OptionalJson(request): OptionalJson<DeleteMany>,
) -> Result<Response, ApiError> {
    // All of them, before the first is gone.
    for id in &request.ids {
        if let Some(id) = resolve(&ams, Kind::Application, id).await? {
            caller.require("can_delete", &Object::One(Kind::Application, id))?;
        }
    }
    let mut last = None;
    for id in &request.ids {
        last = Some(ams.catalog.delete(id, request.force).await?);
    }
    last.map(|operation| accepted(&operation))
        .ok_or_else(|| ApiError::bad_request("invalid-argument", "ids is required"))
}

pub(super) async fn manifest(State(ams): State<Ams>, Path(id): Path<String>) -> Result<Response, ApiError> {
    let application = ams.catalog.find(&id).await?.value;
    let newest = application.versions.last_key_value().map(|(number, _)| *number);
    send_manifest(&ams, &application, newest.unwrap_or(0)).await
}

pub(super) async fn version_manifest(
    State(ams): State<Ams>,
    Path((id, version)): Path<(String, String)>,
) -> Result<Response, ApiError> {
    let application = ams.catalog.find(&id).await?.value;
    send_manifest(&ams, &application, number(&version)?).await
}

async fn send_manifest(
    ams: &Ams,
    application: &ApplicationRecord,
    number: u32,
) -> Result<Response, ApiError> {
    let version = application.versions.get(&number).ok_or(crate::catalog::CatalogError::NoVersion(number))?;
    let mut response = raw(ams.catalog.manifest(&application.id, number).await?);
    if let Ok(digest) = HeaderValue::try_from(&version.manifest_sha256) {
        response.headers_mut().insert(MANIFEST_SHA256, digest);
    }
    Ok(response)
}

/// A version as an archive, or what is known of it for callers that accept JSON alone.
pub(super) async fn show_version(
    State(ams): State<Ams>,
    Path((id, version)): Path<(String, String)>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let application = ams.catalog.find(&id).await?.value;
    let number = number(&version)?;
    let shown = application.to_api();
    let known = shown.versions.into_iter().find(|known| known.number == number);
    let known = known.ok_or(crate::catalog::CatalogError::NoVersion(number))?;
    if headers.get(header::ACCEPT).is_some_and(|accept| accept == "application/json") {
        return Ok(object(known));
    }
    let (file, sha256) = ams.catalog.export(&application.id, number).await?;
    let stream = tokio_util::io::ReaderStream::new(tokio::fs::File::from_std(file));
    let name = format!("attachment; filename=\"{}-{number}.tar.bz2\"", application.name.replace('.', "-"));
    let kind = (header::CONTENT_TYPE, "application/octet-stream".to_owned());
    let fingerprint = (HeaderName::from_static(FINGERPRINT), sha256);
    let headers = [kind, (header::CONTENT_DISPOSITION, name), fingerprint];
    Ok((headers, axum::body::Body::from_stream(stream)).into_response())
}

pub(super) async fn update_version(
    State(ams): State<Ams>,
    Path((id, version)): Path<(String, String)>,
    OptionalJson(patch): OptionalJson<ApplicationVersionPatch>,
) -> Result<Response, ApiError> {
    Ok(accepted(&ams.catalog.publish(&id, number(&version)?, patch.published).await?))
}

pub(super) async fn delete_version(
    State(ams): State<Ams>,
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

pub(super) fn is_upload(headers: &HeaderMap) -> bool {
    headers
        .get(header::CONTENT_TYPE)
        .and_then(|kind| kind.to_str().ok())
        .is_some_and(|kind| kind.split(';').next().unwrap_or_default().trim() == "application/octet-stream")
}

/// What comes with an upload; nothing where there is no such header.
pub(super) fn request_of<T: DeserializeOwned + Default>(headers: &HeaderMap) -> Result<T, ApiError> {
    match headers.get(REQUEST).map(HeaderValue::as_bytes).unwrap_or_default() {
        b"" => Ok(T::default()),
        text => serde_json::from_slice(text).map_err(|error| {
            ApiError::bad_request("invalid-argument", format!("X-AMS-Request malformed: {error}"))
        }),
    }
}

pub(super) async fn receive(ams: &Ams, request: Request) -> Result<Upload, ApiError> {
    let announced =
        request.headers().get(FINGERPRINT).and_then(|value| value.to_str().ok()).map(ToOwned::to_owned);
    let announced = announced.filter(|announced| !announced.is_empty());
    Ok(ams.catalog.receive(request.into_body().into_data_stream(), announced.as_deref()).await?)
}
