//! Addons (ams-api section 11).

use axum::{
    extract::{Path, Request, State},
    response::Response,
};
use fanlight_api::ams::{Delete, addons::AddonsPost};
use fanlight_service::{
    ApiError,
    http::{OptionalJson, Query},
};

use super::{
    Caller, Listing, accepted,
    applications::{is_upload, receive, request_of},
    collection, object_for, store_error,
};
use crate::{Ams, catalog::CatalogError};

pub(super) async fn list(
    State(ams): State<Ams>,
    caller: Caller,
    Query(listing): Query<Listing>,
) -> Result<Response, ApiError> {
    let list = ams.addons.list().await.map_err(store_error)?;
    Ok(collection(&caller, &listing, list, |addon| format!("/1.0/addons/{}", addon.name)))
}

pub(super) async fn show(
    State(ams): State<Ams>,
    caller: Caller,
    Path(name): Path<String>,
    Query(query): Query<Listing>,
) -> Result<Response, ApiError> {
    let addon = ams.addons.find(&name).await?;
    Ok(object_for(&caller, &query, &format!("/1.0/addons/{}", addon.name), addon))
}

pub(super) async fn create(State(ams): State<Ams>, request: Request) -> Result<Response, ApiError> {
    only_uploads(&request)?;
    let post: AddonsPost = request_of(request.headers())?;
    let upload = receive(&ams, request).await?;
    Ok(accepted(&ams.addons.create(&post.name, upload).await?))
}

pub(super) async fn update(
    State(ams): State<Ams>,
    Path(name): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    only_uploads(&request)?;
    // Before the upload, so that a wrong name costs nothing.
    ams.addons.find(&name).await?;
    let upload = receive(&ams, request).await?;
    Ok(accepted(&ams.addons.update(&name, upload).await?))
}

pub(super) async fn delete(
    State(ams): State<Ams>,
    Path(name): Path<String>,
    OptionalJson(_): OptionalJson<Delete>,
) -> Result<Response, ApiError> {
    if ams.settings.get().addons.contains(&name) {
        let users = "the setting application.addons".to_owned();
        return Err(CatalogError::AddonInUse { name, users }.into());
    }
    Ok(accepted(&ams.addons.delete(&name).await?))
}

pub(super) async fn delete_version(
    State(ams): State<Ams>,
    Path((name, version)): Path<(String, String)>,
    OptionalJson(_): OptionalJson<Delete>,
) -> Result<Response, ApiError> {
    let number = version
        .parse()
        .map_err(|_| ApiError::not_found("addon-version-not-found", "addon version not found"))?;
    Ok(accepted(&ams.addons.delete_version(&name, number).await?))
}

fn only_uploads(request: &Request) -> Result<(), ApiError> {
    match is_upload(request.headers()) {
        true => Ok(()),
        false => Err(ApiError::bad_request(
            "package-needed",
            "Content-Type: application/octet-stream and a package as the body are needed",
        )),
    }
}
