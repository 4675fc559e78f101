//! Identities, groups, permissions, certificates and OIDC (ams-api section 8.3).

use std::time::Duration;

use axum::{
    extract::{Path, State},
    response::Response,
};
use fanlight_api::ams::{
    CertificatesPost, Delete,
    auth::{EventsToken, Group, GroupPut, GroupsPost, IdentitiesPost, Identity, IdentityPut, OidcInfo},
};
use fanlight_service::{
    ApiError,
    http::{Json, OptionalJson, Query},
};
use http::HeaderMap;
use serde::Deserialize;

use super::{Caller, Listing, accepted, collection, done, is_unchanged, object, object_for};
use crate::{Ams, events::unix_now, identity::IdentityError, trust};

/// What a provider is asked for.
const SCOPES: [&str; 3] = ["openid", "email", "profile"];
/// Guessing a password must not be fast.
const WRONG_PASSWORD: Duration = Duration::from_millis(500);

#[derive(Debug, Default, Deserialize)]
pub(super) struct Filters {
    recursion: Option<u8>,
    offset: Option<usize>,
    limit: Option<i64>,
    entitlements: Option<u8>,
    id: Option<String>,
    auth_type: Option<String>,
    name: Option<String>,
}

impl Filters {
    fn listing(&self) -> Listing {
        Listing {
            recursion: self.recursion,
            offset: self.offset,
            limit: self.limit,
            entitlements: self.entitlements,
        }
    }
}

pub(super) async fn identities(
    State(ams): State<Ams>,
    caller: Caller,
    Query(filters): Query<Filters>,
) -> Response {
    let equal = |wanted: &Option<String>, is: &str| wanted.as_deref().is_none_or(|wanted| wanted == is);
    let mut list = ams.identities.list();
    list.retain(|identity| {
        equal(&filters.id, &identity.id) && equal(&filters.auth_type, identity.authentication_method.as_str())
    });
    collection(&caller, &filters.listing(), list, identity_url)
}

pub(super) async fn create_identity(
    State(ams): State<Ams>,
    Json(post): Json<IdentitiesPost>,
) -> Result<Response, ApiError> {
    Ok(accepted(&ams.identities.create(&post).await?))
}

pub(super) async fn identity(
    State(ams): State<Ams>,
    caller: Caller,
    Path(id): Path<String>,
    Query(query): Query<Listing>,
) -> Result<Response, ApiError> {
    let identity = ams.identities.get(&id)?;
    let url = identity_url(&identity);
    Ok(object_for(&caller, &query, &url, identity))
}

pub(super) async fn update_identity(
    State(ams): State<Ams>,
    caller: Caller,
    Path(id): Path<String>,
    headers: HeaderMap,
    Json(put): Json<IdentityPut>,
) -> Result<Response, ApiError> {
    let unchanged = |identity: &Identity| is_unchanged(&headers, identity);
    Ok(accepted(&ams.identities.set_groups(&id, &put.groups, &caller.rights, unchanged).await?))
}

pub(super) async fn delete_identity(
    State(ams): State<Ams>,
    Path(id): Path<String>,
    OptionalJson(request): OptionalJson<Delete>,
) -> Result<Response, ApiError> {
    Ok(accepted(&ams.identities.delete(&id, request.force).await?))
}

fn identity_url(identity: &Identity) -> String {
    format!("/1.0/auth/identities/{}", identity.id)
}

pub(super) async fn groups(
    State(ams): State<Ams>,
    caller: Caller,
    Query(filters): Query<Filters>,
) -> Response {
    let mut list = ams.identities.groups();
    // Names are looked for as people remember them.
    if let Some(part) = filters.name.as_deref().map(str::to_lowercase) {
        list.retain(|group| group.name.to_lowercase().contains(&part));
    }
    collection(&caller, &filters.listing(), list, group_url)
}

pub(super) async fn create_group(
    State(ams): State<Ams>,
    Json(post): Json<GroupsPost>,
) -> Result<Response, ApiError> {
    Ok(accepted(&ams.identities.create_group(&post).await?))
}

pub(super) async fn group(
    State(ams): State<Ams>,
    caller: Caller,
    Path(name): Path<String>,
    Query(query): Query<Listing>,
) -> Result<Response, ApiError> {
    let group = ams.identities.group(&name)?;
    let url = group_url(&group);
    Ok(object_for(&caller, &query, &url, group))
}

pub(super) async fn update_group(
    State(ams): State<Ams>,
    caller: Caller,
    Path(name): Path<String>,
    headers: HeaderMap,
    Json(put): Json<GroupPut>,
) -> Result<Response, ApiError> {
    let unchanged = |group: &Group| is_unchanged(&headers, group);
    Ok(accepted(&ams.identities.update_group(&name, &put, &caller.rights, unchanged).await?))
}

pub(super) async fn delete_group(
    State(ams): State<Ams>,
    Path(name): Path<String>,
    OptionalJson(request): OptionalJson<Delete>,
) -> Result<Response, ApiError> {
    Ok(accepted(&ams.identities.delete_group(&name, request.force).await?))
}

fn group_url(group: &Group) -> String {
    format!("/1.0/auth/groups/{}", group.name)
}

/// With and without `recursion`: a permission has no address of its own.
pub(super) async fn permissions(caller: Caller) -> Response {
    done(caller.rights.permissions())
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct Grant {
    grant_type: Option<String>,
}

pub(super) async fn oidc(State(ams): State<Ams>, Query(query): Query<Grant>) -> Result<Response, ApiError> {
    let settings = ams.settings.get();
    let oidc = &settings.oidc;
    if oidc.issuer.is_empty() {
        return Err(ApiError::not_found(
            "oidc-not-configured",
            "OIDC provider not found: oidc.issuer_url is not set",
        ));
    }
    // Grants with a secret of their own have another client.
    let public = !matches!(query.grant_type.as_deref(), Some("client_credentials"));
    let shown = |text: &str| if public { text.to_owned() } else { String::new() };
    Ok(done(OidcInfo {
        issuer: oidc.issuer.clone(),
        required_scopes: SCOPES.map(ToOwned::to_owned).to_vec(),
        client_id: shown(&oidc.client_id),
        audience: shown(&oidc.audience),
    }))
}

pub(super) async fn events_token(State(ams): State<Ams>, caller: Caller) -> Result<Response, ApiError> {
    let who = caller.who.ok_or_else(|| ApiError::unauthorized("somebody must ask for it"))?;
    let token = ams.access.tokens.make(&who, unix_now()).map_err(ApiError::internal)?;
    Ok(done(EventsToken { token }))
}

pub(super) async fn certificates(
    State(ams): State<Ams>,
    caller: Caller,
    Query(query): Query<Listing>,
) -> Response {
    let url = |certificate: &fanlight_api::ams::Certificate| {
        format!("/1.0/certificates/{}", certificate.fingerprint)
    };
    collection(&caller, &query, ams.identities.certificates(), url)
}

pub(super) async fn certificate(
    State(ams): State<Ams>,
    Path(fingerprint): Path<String>,
) -> Result<Response, ApiError> {
    Ok(object(ams.identities.certificate(&fingerprint)?))
}

pub(super) async fn add_certificate(
    State(ams): State<Ams>,
    caller: Caller,
    Json(request): Json<CertificatesPost>,
) -> Result<Response, ApiError> {
    let hash = ams.settings.get().trust_password.clone();
    if !caller.is_administrator() && !ams.trust.is_password(&request.trust_password, hash.as_ref()).await {
        tokio::time::sleep(WRONG_PASSWORD).await;
        return Err(ApiError::forbidden("not-trusted", "Not Authorized: the trust password is wrong"));
    }
    let der = trust::certificate(&request.certificate).map_err(IdentityError::from)?;
    Ok(accepted(&ams.identities.trust(&der).await?))
}

pub(super) async fn remove_certificate(
    State(ams): State<Ams>,
    Path(fingerprint): Path<String>,
) -> Result<Response, ApiError> {
    Ok(accepted(&ams.identities.distrust(&fingerprint).await?))
}

impl From<IdentityError> for ApiError {
    fn from(error: IdentityError) -> Self {
        use IdentityError as E;
        let text = error.to_string();
        match error {
            E::NotFound => Self::not_found("identity-not-found", text),
            E::NoCertificate => Self::not_found("certificate-not-found", text),
            E::NoGroup(_) => Self::not_found("group-not-found", text),
            E::Exists(_) => Self::conflict("already-exists", text),
            E::Invalid { .. } | E::Required(_) => Self::bad_request("invalid-argument", text),
            E::Immutable => Self::bad_request("immutable", text),
            E::InGroups { .. } | E::HasMembers { .. } => Self::bad_request("in-use", text),
            E::Beyond(_) => Self::forbidden("not-permitted", text),
            E::Changed => Self::new(http::StatusCode::PRECONDITION_FAILED, "changed", text),
            E::Certificate(error) => error.into(),
            E::Store(error) => super::store_error(error),
        }
    }
}
