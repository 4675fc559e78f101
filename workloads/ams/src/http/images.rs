//! Images (ams-api section 11).

use axum::{
    extract::{FromRequest as _, Path, Request, State},
    response::Response,
};
use fanlight_api::ams::{
    Delete,
    images::{ImagePatch, ImagesPost},
};
use fanlight_service::{
    ApiError,
    http::{OptionalJson, Query},
};
use http::StatusCode;
use serde::Deserialize;

use super::{
    Caller, Listing, accepted,
    applications::{is_upload, receive, request_of},
    collection, done, is_full, object_for, store_error,
};
use crate::{
    Ams,
    images::{ImageError, check_kind},
};

#[derive(Debug, Default, Deserialize)]
pub(super) struct Filters {
    recursion: Option<u8>,
    entitlements: Option<u8>,
    default: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct Kind {
    #[serde(rename = "type")]
    kind: Option<String>,
}

pub(super) async fn list(
    State(ams): State<Ams>,
    caller: Caller,
    Query(filters): Query<Filters>,
) -> Result<Response, ApiError> {
    let mut list = ams.images.list().await.map_err(store_error)?;
    if filters.default == Some(true) {
        // The original's client asks without recursion and wants the whole object (ams-api section 11).
        list.retain(|image| image.default && caller.may_see(&format!("/1.0/images/{}", image.id)));
        return Ok(done(list));
    }
    let listing =
        Listing { recursion: filters.recursion, entitlements: filters.entitlements, ..Listing::default() };
    Ok(collection(&caller, &listing, list, |image| format!("/1.0/images/{}", image.id)))
}

pub(super) async fn show(
    State(ams): State<Ams>,
    caller: Caller,
    Path(id): Path<String>,
    Query(kind): Query<Kind>,
    Query(query): Query<Listing>,
) -> Result<Response, ApiError> {
    match check_kind(kind.kind.as_deref().unwrap_or_default()) {
        // Other kinds are known and there are none of them.
        Err(ImageError::Unsupported(_)) => Err(ImageError::NotFound.into()),
        Err(error) => Err(error.into()),
        Ok(()) => {
            let image = ams.images.find(&id).await?;
            Ok(object_for(&caller, &query, &format!("/1.0/images/{}", image.id), image))
        }
    }
}

pub(super) async fn create(State(ams): State<Ams>, request: Request) -> Result<Response, ApiError> {
    if is_upload(request.headers()) {
        let post: ImagesPost = request_of(request.headers())?;
        let upload = receive(&ams, request).await?;
        return Ok(accepted(&ams.images.create(upload, &post).await?));
    }
    let limited = request
        .map(|body| axum::body::Body::new(http_body_util::Limited::new(body, ams.config.limits.body_bytes)));
    let OptionalJson(post) = OptionalJson::<ImagesPost>::from_request(limited, &ams).await?;
    check_kind(&post.kind)?;
    match &post.source {
        Some(source) if source.kind == "instance" || !source.instance.is_empty() => {
            Ok(accepted(&ams.publish_instance(&post, source).await?))
        }
        _ => Err(ApiError::bad_request(
            "not-supported",
            "importing from an image server not supported: upload the file (Content-Type: application/octet-stream)",
        )),
    }
}

pub(super) async fn update(
    State(ams): State<Ams>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    if is_upload(request.headers()) {
        // Before the upload, so that a wrong name costs nothing.
        ams.images.find(&id).await?;
        let upload = receive(&ams, request).await?;
        return Ok(accepted(&ams.images.update(&id, upload).await?));
    }
    let limited = request
        .map(|body| axum::body::Body::new(http_body_util::Limited::new(body, ams.config.limits.body_bytes)));
    let OptionalJson(patch) = OptionalJson::<ImagePatch>::from_request(limited, &ams).await?;
    let operation = match patch.default {
        Some(true) => ams.images.make_default(&id).await?,
        Some(false) => {
            let text = "argument default is invalid: make another image the default instead";
            return Err(ApiError::bad_request("invalid-argument", text));
        }
        None => ams.images.sync(&id).await?,
    };
    Ok(accepted(&operation))
}

pub(super) async fn delete(
    State(ams): State<Ams>,
    Path(id): Path<String>,
    OptionalJson(request): OptionalJson<Delete>,
) -> Result<Response, ApiError> {
    Ok(accepted(&ams.images.delete(&id, request.force).await?))
}

pub(super) async fn delete_version(
    State(ams): State<Ams>,
    Path((id, version)): Path<(String, String)>,
) -> Result<Response, ApiError> {
    let number = version
        .parse()
        .map_err(|_| ApiError::not_found("image-version-not-found", "image version not found"))?;
    Ok(accepted(&ams.images.delete_version(&id, number).await?))
}

impl From<ImageError> for ApiError {
    fn from(error: ImageError) -> Self {
        use ImageError as E;
        let text = error.to_string();
        match &error {
            E::NotFound | E::NoDefault => Self::not_found("image-not-found", text),
            E::NoVersion(_) => Self::not_found("image-version-not-found", text),
            E::Exists(_) => Self::conflict("image-exists", text),
            E::NotActive { .. } => Self::bad_request("image-not-active", text),
            E::Invalid { .. } | E::Required(_) => Self::bad_request("invalid-argument", text),
            E::InUse { .. } => Self::bad_request("image-in-use", text),
            E::IsDefault(_) => Self::bad_request("image-is-default", text),
            E::LastVersion => Self::bad_request("last-version", text),
            E::Unsupported(_) => Self::bad_request("not-supported", text),
            E::Io { .. } if is_full(&error) => Self::new(
                StatusCode::INSUFFICIENT_STORAGE,
                "disk-full",
                format!("{text}: no space left on the disk"),
            ),
            E::Io { .. } => Self::internal(error),
            E::Store(_) => match error {
                E::Store(error) => store_error(error),
                other => Self::internal(other),
            },
        }
    }
}
