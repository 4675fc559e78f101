//! The API (ams-api): the routes, who may use them, and the envelope of every answer.

mod access;
mod addons;
mod applications;
mod auth;
mod containers;
mod exec;
mod images;
mod instances;
mod nodes;
mod openapi;
mod packages;
mod service;
mod settings;
mod shares;

use std::sync::Arc;

use axum::{
    Router,
    extract::DefaultBodyLimit,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use fanlight_api::{
    ams::{Operation, status},
    envelope::{AmsEnvelope, Kind},
};
use fanlight_service::{
    ApiError,
    http::{Edge, Envelope, Finished, Json, PublicError},
};
use fanlight_store::StoreError;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

pub(crate) use access::Access;
use access::Caller;
pub(crate) use exec::{End, Execs};
pub use openapi::openapi;

use crate::{
    Ams, catalog::CatalogError, core::model::OperationRecord, engine::EngineError, identity::permissions,
    instances::InstanceError, metrics::Metrics, package::PackageError, trust::TrustError,
};

/// The whole API. `scheme`: of the listener, for metrics.
pub(crate) fn edge(ams: Ams, scheme: &'static str) -> Arc<Edge> {
    let body_bytes = ams.config.limits.body_bytes;
    // Packages are bounded where they are written to disk.
    let unbounded = DefaultBodyLimit::disable;
    let containers = Router::new()
        .route(
            "/1.0/containers",
            get(containers::list).merge(post(containers::create)).delete(instances::delete_many),
        )
        .route(
            "/1.0/containers/{id}",
            get(containers::show).patch(instances::update).delete(instances::delete),
        )
        .route("/1.0/containers/{id}/exec", post(exec::create))
        .route("/1.0/containers/{id}/logs", get(containers::logs))
        .route("/1.0/containers/{id}/logs/{name}", get(instances::log))
        .route_layer(axum::middleware::from_fn(containers::called));
    let router = Router::new()
        .route("/", get(service::versions))
        .route("/1.0", get(service::status))
        .route("/1.0/version", get(service::version))
        .route("/1.0/config", get(settings::show).patch(settings::change))
        .route("/1.0/events", get(service::events))
        .route("/1.0/events/auth", post(auth::events_token))
        .route("/1.0/operations", get(service::operations))
        .route("/1.0/operations/{id}", get(service::operation).delete(service::cancel_operation))
        .route("/1.0/operations/{id}/wait", get(service::wait_for_operation))
        .route("/1.0/operations/{id}/websocket", get(exec::websocket))
        .route("/1.0/certificates", get(auth::certificates).post(auth::add_certificate))
        .route("/1.0/certificates/{fingerprint}", get(auth::certificate).delete(auth::remove_certificate))
        .route("/1.0/auth/oidc", get(auth::oidc))
        .route("/1.0/auth/permissions", get(auth::permissions))
        .route("/1.0/auth/identities", get(auth::identities).post(auth::create_identity))
        .route(
            "/1.0/auth/identities/{id}",
            get(auth::identity).put(auth::update_identity).delete(auth::delete_identity),
        )
        .route("/1.0/auth/groups", get(auth::groups).post(auth::create_group))
        .route("/1.0/auth/groups/{name}", get(auth::group).put(auth::update_group).delete(auth::delete_group))
        .route("/1.0/tasks", get(service::tasks))
        .route("/1.0/metrics", get(service::metrics))
        .route("/1.0/nodes", get(nodes::list).post(nodes::create))
        .route("/1.0/nodes/{name}", get(nodes::show).patch(nodes::update).delete(nodes::delete))
        .route("/1.0/images", get(images::list).post(images::create).layer(unbounded()))
        .route(
            "/1.0/images/{id}",
            get(images::show).patch(images::update).delete(images::delete).layer(unbounded()),
        )
        .route("/1.0/images/{id}/{version}", axum::routing::delete(images::delete_version))
        .route("/1.0/addons", get(addons::list).post(addons::create).layer(unbounded()))
        .route(
            "/1.0/addons/{name}",
            get(addons::show).patch(addons::update).delete(addons::delete).layer(unbounded()),
        )
        .route("/1.0/addons/{name}/{version}", axum::routing::delete(addons::delete_version))
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
            get(applications::show_version)
                .patch(applications::update_version)
                .delete(applications::delete_version),
        )
        .route("/1.0/applications/{id}/{version}/manifest", get(applications::version_manifest))
        .route(
            "/1.0/instances",
            get(instances::list).merge(post(instances::create)).delete(instances::delete_many),
        )
        .route("/1.0/instances/{id}", get(instances::show).patch(instances::update).delete(instances::delete))
        .route("/1.0/instances/{id}/exec", post(exec::create))
        .route("/1.0/instances/{id}/shares", post(shares::create))
        .route(
            "/1.0/instances/{id}/shares/{share}",
            axum::routing::patch(shares::update).delete(shares::delete),
        )
        .route("/1.0/instances/{id}/logs", get(instances::logs))
        .route("/1.0/instances/{id}/logs/{name}", get(instances::log))
        .merge(containers)
        .route_layer(axum::middleware::from_fn_with_state(ams.clone(), access::guard))
        .merge(packages::router(&ams))
        .with_state(ams.clone());
    Edge::new(router, Arc::new(AmsStyle { metrics: ams.metrics.clone(), scheme }), body_bytes)
}

/// Errors in the envelope of AMS, with our code and request id in `metadata`.
struct AmsStyle {
    metrics: Arc<Metrics>,
    scheme: &'static str,
}

impl Envelope for AmsStyle {
    fn started(&self) {
        self.metrics.started();
    }

    fn finished(&self, request: &Finished<'_>) {
        self.metrics.finished(self.scheme, access::name(request.route), request);
    }

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

/// The tag of an object's content.
fn tag<T: Serialize>(object: &T) -> String {
    serde_json::to_vec(object).map(|bytes| hex::encode(Sha256::digest(bytes))).unwrap_or_default()
}

/// Whether an object still is as the caller believes, who may name its tag in `If-Match`.
fn is_unchanged<T: Serialize>(headers: &HeaderMap, object: &T) -> bool {
    let Some(wanted) = headers.get(header::IF_MATCH) else { return true };
    let tag = tag(object);
    let mut tags = wanted.to_str().unwrap_or_default().split(',').map(|tag| tag.trim().trim_matches('"'));
    tags.any(|wanted| wanted == "*" || wanted == tag)
}

/// An object as an answer, with the tag of its content.
fn object<T: Serialize>(metadata: T) -> Response {
    let tag = tag(&metadata);
    tagged(done(metadata), tag)
}

/// An object as an answer, with what the caller may do with it where that was asked for.
fn object_for<T: Serialize>(caller: &Caller, query: &Listing, url: &str, metadata: T) -> Response {
    if query.entitlements != Some(1) {
        return object(metadata);
    }
    let tag = tag(&metadata);
    tagged(done(with_entitlements(caller, url, &metadata)), tag)
}

fn tagged(mut response: Response, tag: String) -> Response {
    if let Ok(tag) = HeaderValue::try_from(tag) {
        response.headers_mut().insert(header::ETAG, tag);
    }
    response
}

fn with_entitlements<T: Serialize>(caller: &Caller, url: &str, object: &T) -> Value {
    let mut value = serde_json::to_value(object).unwrap_or_default();
    if let Some(members) = value.as_object_mut() {
        let held = caller.rights.entitlements(&permissions::to_see(url).object);
        members.insert("entitlements".into(), json!(held));
    }
    value
}

/// Objects, or their URLs, as an answer: those that the caller may see.
fn collection<T: Serialize>(
    caller: &Caller,
    query: &Listing,
    objects: Vec<T>,
    url: impl Fn(&T) -> String,
) -> Response {
    let page = Page::of(caller, query, objects, &url);
    page.answer(caller, query, url, |object| object)
}

/// The part of a list that was asked for.
struct Page<T> {
    objects: Vec<T>,
    /// How many there are in all that the caller may see.
    total: usize,
}

impl<T> Page<T> {
    fn of(caller: &Caller, query: &Listing, mut objects: Vec<T>, url: impl Fn(&T) -> String) -> Self {
        objects.retain(|object| caller.may_see(&url(object)));
        let total = objects.len();
        let most = query.limit.and_then(|limit| usize::try_from(limit).ok()).filter(|limit| *limit > 0);
        objects.drain(..query.offset.unwrap_or(0).min(total));
        objects.truncate(most.unwrap_or(usize::MAX));
        Self { objects, total }
    }

    /// As an answer, with each object as `show` makes it, one at a time: a long list is held as its text only.
    fn answer<'a, U: Serialize>(
        &'a self,
        caller: &Caller,
        query: &Listing,
        url: impl Fn(&T) -> String,
        show: impl Fn(&'a T) -> U,
    ) -> Response {
        let objects = &self.objects;
        match (query.shows_objects(), query.entitlements) {
            (true, Some(1)) => {
                self.listed(Each(objects, |object| with_entitlements(caller, &url(object), &show(object))))
            }
            (true, _) => self.listed(Each(objects, show)),
            (false, _) => self.listed(Each(objects, url)),
        }
    }

    fn listed(&self, metadata: impl Serialize) -> Response {
        Json(AmsEnvelope { total_size: Some(self.total as u64), ..sync(metadata) }).into_response()
    }
}

/// A list whose members are made one at a time, while it is written.
struct Each<'a, T, F>(&'a [T], F);

impl<'a, T, U: Serialize, F: Fn(&'a T) -> U> Serialize for Each<'a, T, F> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().map(&self.1))
    }
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
    entitlements: Option<u8>,
}

impl Listing {
    /// Whether the objects themselves were asked for, or their URLs.
    fn shows_objects(&self) -> bool {
        self.recursion == Some(1)
    }
}

impl From<TrustError> for ApiError {
    fn from(error: TrustError) -> Self {
        match error {
            TrustError::Certificate(_) => Self::bad_request("invalid-certificate", error.to_string()),
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
            E::Image(_) => match error {
                E::Image(error) => error.into(),
                other => Self::internal(other),
            },
            E::NotFound => Self::not_found("application-not-found", text),
            E::NoVersion(_) => Self::not_found("application-version-not-found", text),
            E::Exists(_) => Self::conflict("application-exists", text),
            E::NoAddon | E::UnknownAddon(_) => Self::not_found("addon-not-found", text),
            E::NoAddonVersion(_) => Self::not_found("addon-version-not-found", text),
            E::AddonExists(_) => Self::conflict("addon-exists", text),
            E::AddonInUse { .. } => Self::bad_request("addon-in-use", text),
            E::Away { .. } => Self::unavailable("package-away", text),
            E::LastAddonVersion => Self::bad_request("last-version", text),
            E::OtherName { .. } | E::Invalid(_) | E::Required(_) | E::Unsupported(_) => {
                Self::bad_request("invalid-argument", text)
            }
            E::InUse(_) => Self::bad_request("application-in-use", text),
            E::Overtaken => Self::conflict("overtaken", text),
            E::LastVersion => Self::bad_request("last-version", text),
            E::NotActive(_) => Self::bad_request("application-version-not-active", text),
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
            E::Image(error) => error.into(),
            E::Store(error) => store_error(error),
        }
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        use EngineError as E;
        let text = error.to_string();
        match &error {
            E::Absent(_) => Self::not_found("instance-not-found", text),
            E::NoLog(_) => Self::not_found("log-not-found", text),
            E::Unsupported(..) => Self::bad_request("not-supported", text),
            E::NotRunning(_) => Self::bad_request("not-running", text),
            E::Refused { .. } => Self::bad_request("refused", text),
            E::Away { .. } => Self::new(StatusCode::SERVICE_UNAVAILABLE, "engine-away", text),
            E::DiskFull { .. } => Self::new(StatusCode::INSUFFICIENT_STORAGE, "disk-full", text),
            _ => Self::internal(error),
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
