//! Packages for the other units of AMS, and for nobody else. Not part of the API.

use axum::{
    Router,
    extract::{Path, Request, State},
    middleware::{self, Next},
    response::{IntoResponse as _, Response},
    routing::get,
};
use fanlight_service::{ApiError, http::Peer};
use http::{HeaderName, header};
use tokio_util::io::ReaderStream;

use super::applications::FINGERPRINT;
use crate::{Ams, catalog::CatalogError, core::model::AddonRef, package};

pub(super) fn router(ams: &Ams) -> Router<Ams> {
    Router::new()
        .route("/internal/1.0/packages/applications/{id}/{version}", get(of_application))
        .route("/internal/1.0/packages/addons/{name}/{version}", get(of_addon))
        .route_layer(middleware::from_fn_with_state(ams.clone(), only_units))
}

async fn only_units(State(ams): State<Ams>, request: Request, next: Next) -> Response {
    let peer = request.extensions().get::<Peer>().cloned().unwrap_or_default();
    match ams.peers.is_one(&peer) {
        true => next.run(request).await,
        false => ApiError::forbidden("not-a-unit", "Not Authorized: only units of this cluster are answered")
            .into_response(),
    }
}

async fn of_application(
    State(ams): State<Ams>,
    Path((id, version)): Path<(String, u32)>,
) -> Result<Response, ApiError> {
    let record = ams.catalog.find(&id).await?.value;
    if !record.versions.contains_key(&version) {
        return Err(CatalogError::NoVersion(version).into());
    }
    send(ams.catalog.package(&record.id, version), ams.config.folder.clone()).await
}

async fn of_addon(
    State(ams): State<Ams>,
    Path((name, version)): Path<(String, u32)>,
) -> Result<Response, ApiError> {
    let addon = ams.addons.find(&name).await?;
    if !addon.versions.iter().any(|known| known.version == version) {
        return Err(CatalogError::NoAddonVersion(version).into());
    }
    let addon = AddonRef { name: addon.name, version, hook_time_s: 0 };
    send(ams.addons.package(&addon), ams.config.folder.clone()).await
}

async fn send(folder: std::path::PathBuf, place: std::path::PathBuf) -> Result<Response, ApiError> {
    if !folder.is_dir() {
        return Err(ApiError::not_found("package-not-found", "the package does not lie at this unit"));
    }
    let packed = tokio::task::spawn_blocking(move || package::tar(&folder, &place)).await;
    let (file, sha256) = packed.map_err(ApiError::internal)?.map_err(ApiError::internal)?;
    let headers = [
        (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
        (HeaderName::from_static(FINGERPRINT), sha256),
    ];
    let stream = ReaderStream::new(tokio::fs::File::from_std(file));
    Ok((headers, axum::body::Body::from_stream(stream)).into_response())
}
