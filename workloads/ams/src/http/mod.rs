//! The API (ams-api): the routes, who may use them, and the envelope of every answer.

mod applications;
mod instances;
mod service;

use std::sync::Arc;

use axum::{
    Router,
    extract::{DefaultBodyLimit, FromRequestParts},
    response::{IntoResponse, Response},
    routing::{get, patch, post},
};
use fanlight_api::{
    ams::{Operation, status},
    envelope::{AmsEnvelope, Kind},
};
use fanlight_service::{
    ApiError,
    http::{Edge, Envelope, Json, Peer, PublicError},
};
use fanlight_store::StoreError;
use http::{HeaderValue, StatusCode, header, request::Parts};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::{
    Ams, catalog::CatalogError, core::model::OperationRecord, instances::InstanceError,
    package::PackageError, trust::TrustError,
};

/// The whole API.
pub(crate) fn edge(ams: Ams) -> Arc<Edge> {
    let body_bytes = ams.config.limits.body_bytes;
    // Packages are bounded where they are written to disk.
    let unbounded = DefaultBodyLimit::disable;
    let router = Router::new()
        .route("/", get(service::versions))
        .route("/1.0", get(service::status))
        .route("/1.0/version", get(service::version))
        .route("/1.0/config", get(service::config))
        .route("/1.0/events", get(service::events))
        .route("/1.0/operations", get(service::operations))
        .route("/1.0/operations/{id}", get(service::operation).delete(service::cancel_operation))
        .route("/1.0/operations/{id}/wait", get(service::wait_for_operation))
        .route("/1.0/certificates", get(service::certificates).post(service::add_certificate))
        .route(
            "/1.0/certificates/{fingerprint}",
            get(service::certificate).delete(service::remove_certificate),
        )
        .route("/1.0/nodes", get(service::nodes))
        .route("/1.0/nodes/{name}", get(service::node))
        .route(
            "/1.0/applications",
            get(applications::list)
                .post(applications::create)
                .delete(applications::delete_many)
                .layer(unbounded()),
        )
        .route(
            "/1.0/applications/{id}",
            get(applications::show)
                .patch(applications::update)
                .delete(applications::delete)
                .layer(unbounded()),
        )
        .route("/1.0/applications/{id}/manifest", get(applications::manifest))
        .route(
            "/1.0/applications/{id}/{version}",
            patch(applications::update_version).delete(applications::delete_version),
        )
        .route("/1.0/applications/{id}/{version}/manifest", get(applications::version_manifest))
        .route(
            "/1.0/instances",
            get(instances::list).merge(post(instances::create)).delete(instances::delete_many),
        )
        .route("/1.0/instances/{id}", get(instances::show).patch(instances::update).delete(instances::delete))
        .route("/1.0/instances/{id}/logs", get(instances::logs))
        .route("/1.0/instances/{id}/logs/{name}", get(instances::log))
        .with_state(ams);
    Edge::new(router, Arc::new(AmsStyle), body_bytes)
}

/// Errors in the envelope of AMS, with our code and request id in `metadata`.
struct AmsStyle;

impl Envelope for AmsStyle {
    fn error_body(&self, error: &PublicError<'_>) -> Value {
        let mut metadata = json!({"code": error.code, "request_id": error.request_id});
        if let Some(reasons) = error.reasons {
            metadata["reasons"] = reasons.clone();
        }
        let envelope = AmsEnvelope {
            kind: Kind::Error,
            status: String::new(),
            status_code: 0,
            operation: String::new(),
            error_code: error.status.as_u16(),
            error: error.text.to_owned(),
            metadata,
            total_size: None,
        };
        serde_json::to_value(envelope).expect("texts and numbers always serialise")
    }
}

/// A result.
fn sync<T: Serialize>(metadata: T) -> AmsEnvelope<T> {
    AmsEnvelope {
        kind: Kind::Sync,
        status: "Success".into(),
        status_code: 200,
        operation: String::new(),
        error_code: 0,
        error: String::new(),
        metadata,
        total_size: None,
    }
}

/// A result as an answer.
fn done<T: Serialize>(metadata: T) -> Response {
    Json(sync(metadata)).into_response()
}

/// An object as an answer, with the tag of its content.
fn object<T: Serialize>(metadata: T) -> Response {
    let tag =
        serde_json::to_vec(&metadata).map(|bytes| hex::encode(Sha256::digest(bytes))).unwrap_or_default();
    let mut response = done(metadata);
    if let Ok(tag) = HeaderValue::try_from(tag) {
        response.headers_mut().insert(header::ETAG, tag);
    }
    response
}

/// Objects, or their URLs, as an answer.
fn collection<T: Serialize>(query: &Listing, objects: Vec<T>, url: impl Fn(&T) -> String) -> Response {
    let total = objects.len() as u64;
    let page = objects.into_iter().skip(query.offset.unwrap_or(0)).take(
        query
            .limit
            .and_then(|limit| usize::try_from(limit).ok())
            .filter(|limit| *limit > 0)
            .unwrap_or(usize::MAX),
    );
    let metadata: Vec<Value> = if query.recursion == Some(1) {
        page.map(|object| serde_json::to_value(object).unwrap_or_default()).collect()
    } else {
        page.map(|object| Value::from(url(&object))).collect()
    };
    Json(AmsEnvelope { total_size: Some(total), ..sync(metadata) }).into_response()
}

/// Accepted work as an answer.
fn accepted(record: &OperationRecord) -> Response {
    let path = format!("/1.0/operations/{}", record.operation.id);
    let envelope: AmsEnvelope<&Operation> = AmsEnvelope {
        kind: Kind::Async,
        status: status::text(status::CREATED).into(),
        status_code: status::CREATED,
        operation: path.clone(),
        ..sync(&record.operation)
    };
    let mut response = (StatusCode::ACCEPTED, Json(envelope)).into_response();
    if let Ok(location) = HeaderValue::try_from(path) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    response
}

/// Bytes as an answer.
fn raw(bytes: Vec<u8>) -> Response {
    ([(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"))], bytes).into_response()
}

/// Parameters of lists.
#[derive(Debug, Default, Deserialize)]
struct Listing {
    recursion: Option<u8>,
    offset: Option<usize>,
    limit: Option<i64>,
}

/// A caller who may do everything. Needing it as an argument is the check.
struct Trusted;

/// Whether the caller may do everything.
struct Caller {
    trusted: bool,
}

impl FromRequestParts<Ams> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, ams: &Ams) -> Result<Self, ApiError> {
        let peer = parts.extensions.get::<Peer>().cloned().unwrap_or_default();
        let trusted = ams.trust.is_trusted(&peer).await.map_err(ApiError::internal)?;
        Ok(Self { trusted })
    }
}

impl FromRequestParts<Ams> for Trusted {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, ams: &Ams) -> Result<Self, ApiError> {
        match Caller::from_request_parts(parts, ams).await?.trusted {
            true => Ok(Self),
            false => Err(ApiError::forbidden(
                "not-trusted",
                "Not Authorized: the client's certificate is not trusted",
            )),
        }
    }
}

impl From<TrustError> for ApiError {
    fn from(error: TrustError) -> Self {
        match error {
            TrustError::Certificate(_) => Self::bad_request("invalid-certificate", error.to_string()),
            TrustError::Exists => Self::conflict("certificate-exists", error.to_string()),
            TrustError::Store(error) => store_error(error),
            TrustError::File { .. } => Self::internal(error),
        }
    }
}

/// The store's failure, as an answer.
fn store_error(error: StoreError) -> ApiError {
    match error {
        StoreError::Full { .. } => ApiError::new(
            StatusCode::INSUFFICIENT_STORAGE,
            "store-full",
            "the disk of AMS is full: nothing can be changed until there is space",
        )
        .with_source(error),
        StoreError::Unavailable { .. } => ApiError::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "store-unavailable",
            "AMS cannot reach its store: look again at what there is before you try again",
        )
        .with_source(error),
        error => ApiError::internal(error),
    }
}

impl From<CatalogError> for ApiError {
    fn from(error: CatalogError) -> Self {
        use CatalogError as E;
        if let E::Store(error) = error {
            return store_error(error);
        }
        let text = error.to_string();
        match &error {
            E::NotFound => Self::not_found("application-not-found", text),
            E::NoVersion(_) => Self::not_found("application-version-not-found", text),
            E::Exists(_) => Self::conflict("application-exists", text),
            E::OtherName { .. } | E::Invalid(_) | E::Unsupported(_) => {
                Self::bad_request("invalid-argument", text)
            }
            E::InUse(_) => Self::bad_request("application-in-use", text),
            E::LastVersion => Self::bad_request("last-version", text),
            E::Fingerprint { .. } => Self::bad_request("fingerprint-mismatch", text),
            E::TooLarge(_) => Self::new(StatusCode::PAYLOAD_TOO_LARGE, "package-too-large", text),
            E::CutOff(_) => Self::bad_request("upload-cut-off", text),
            E::Manifest(_) => Self::bad_request("invalid-manifest", text),
            E::Package(PackageError::Io { .. }) | E::Io { .. } if is_full(&error) => Self::new(
                StatusCode::INSUFFICIENT_STORAGE,
                "disk-full",
                format!("{text}: no space left on the disk"),
            ),
            E::Package(PackageError::Io { .. }) | E::Io { .. } | E::Store(_) => Self::internal(error),
            E::Package(_) => Self::bad_request("invalid-package", text),
        }
    }
}

impl From<InstanceError> for ApiError {
    fn from(error: InstanceError) -> Self {
        use InstanceError as E;
        let text = error.to_string();
        match error {
            E::NotFound => Self::not_found("instance-not-found", text),
            E::Missing(_) => Self::not_found("not-found", text),
            E::Invalid { .. } | E::Required(_) => Self::bad_request("invalid-argument", text),
            E::Unsupported(_) => Self::bad_request("not-supported", text),
            E::Exists(_) => Self::conflict("instance-exists", text),
            E::OldAttempt { .. } => Self::conflict("old-attempt", text),
            E::Protected(_) => Self::bad_request("delete-protected", text),
            E::NoRoom(refusal) => {
                let reasons = serde_json::to_value(&refusal).unwrap_or_default();
                Self::bad_request("no-suitable-node", text).with_reasons(reasons)
            }
            E::Catalog(error) => error.into(),
            E::Store(error) => store_error(error),
        }
    }
}

/// Whether a full disk is behind an error.
fn is_full(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut error = Some(error);
    while let Some(this) = error {
        if let Some(io) = this.downcast_ref::<std::io::Error>() {
            return matches!(io.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded);
        }
        error = this.source();
    }
    false
}
