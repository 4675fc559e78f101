//! Routes of shares (gateway-api sections 6.9 to 6.12) and of the sockets that they lead to, and the same for agents, who ask
//! over the bus on behalf of AMS. What an instance offers
//! through them depends on its image; no image offers ADB so far, and its sockets say so.

use std::sync::Arc;

use axum::extract::{Path, State};
use fanlight_api::{
    AgentId, Secret, SessionId, ShareId,
    bus::{GatewayRequest, GatewayResponse},
    gateway::{SessionStatus, Share, ShareBase, ShareConnected, ShareCreated, SharePatch, SharePost},
};
use fanlight_service::{
    ApiError,
    http::{Json, Query},
};
use http::{HeaderMap, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Answer, Door, Full, authority, flag, number, own, session_id, unauthorized};
use crate::{Gateway, session::Session, shares, token::ShareGrant};

/// How long the socket token of a share can be used, seconds.
const SOCKET_SECONDS: i64 = 600;

impl Gateway {
    /// What AMS asks about shares of sessions of its instances.
    pub async fn share_for_ams(&self, request: GatewayRequest) -> GatewayResponse {
        let answered = match request {
            GatewayRequest::CreateShare { agent_id, session_id, share } => {
                self.create_share_for(&agent_id, &session_id, &share).await
            }
            GatewayRequest::UpdateShare { agent_id, session_id, share_id, patch } => {
                let changed = async {
                    self.share_of(&agent_id, &session_id, &share_id).await?;
                    self.update_share(&share_id, &patch).await
                };
                changed.await.map(|share| GatewayResponse::Shared { share: self.created(share) })
            }
            GatewayRequest::DeleteShare { agent_id, session_id, share_id } => {
                let removed = async {
                    self.share_of(&agent_id, &session_id, &share_id).await?;
                    self.delete_share(&share_id).await
                };
                removed.await.map(|()| GatewayResponse::Ended)
            }
            _ => Err(ApiError::internal("this is not about shares")),
        };
        answered.unwrap_or_else(|error| {
            if error.status.is_server_error() {
                tracing::error!(
                    "a share for an agent failed: {}",
                    fanlight_service::telemetry::chain(&error)
                );
            }
            GatewayResponse::Refused {
                code: error.code.into(),
                message: error.text,
                status: Some(error.status.as_u16()),
            }
        })
    }

    async fn create_share_for(
        &self,
        agent: &AgentId,
        session: &SessionId,
        post: &SharePost,
    ) -> Result<GatewayResponse, ApiError> {
        let session = self.session_of_agent(agent, session).await?;
        if !session.is_live() {
            return Err(ended(&session.id));
        }
        let share = self.create_share(&session.id, post).await?;
        tracing::info!(session.id = %session.id, share.id = %share.base.id, "session {} was shared by its instance's owner", session.id);
        Ok(GatewayResponse::Shared { share: self.created(share) })
    }

    /// A session whose instance is of this agent's cluster.
    async fn session_of_agent(&self, agent: &AgentId, id: &SessionId) -> Result<Arc<Session>, ApiError> {
        match self.find_session(id).await? {
            Some(session) if session.agent_id == *agent => Ok(session),
            _ => Err(crate::sessions::no_session(id)),
        }
    }

    async fn share_of(&self, agent: &AgentId, session: &SessionId, id: &ShareId) -> Result<(), ApiError> {
        self.session_of_agent(agent, session).await?;
        let share = self.find_share(None, id).await?;
        match share.base.session_id == *session {
            true => Ok(()),
            false => Err(shares::ShareError::Missing(id.clone()).into()),
        }
    }

    /// As answered to who did not come by the API, and so names no address of ours.
    fn created(&self, share: shares::Share) -> ShareCreated {
        let url = share_url(self, Door::Internal, &HeaderMap::new(), &share);
        created(share.base, url)
    }
}

fn ended(session: &SessionId) -> ApiError {
    let text = format!("session {session} has ended and cannot be shared");
    ApiError::bad_request("invalid-session-state", text)
}

fn created(base: ShareBase, url: Secret) -> ShareCreated {
    let expiry_min = (base.expiry_at - base.created_at + 59) / 60;
    ShareCreated { id: base.id, kind: base.kind, url, expiry_at: base.expiry_at, expiry_min }
}

fn share_id(text: &str) -> Result<ShareId, ApiError> {
    text.parse().map_err(|error: fanlight_api::InvalidId| {
        ApiError::bad_request("invalid-id", format!("the share's {error}"))
    })
}

fn share_url(gateway: &Gateway, door: Door, headers: &HeaderMap, share: &shares::Share) -> Secret {
    let (scheme, authority) = authority(gateway, door, headers, false);
    let scheme = if scheme == "ws" { "http" } else { "https" };
    let token = gateway.accounts.share_token(&share.base.id);
    let session = &share.base.session_id;
    Secret::new(format!(
        "{scheme}://{authority}/1.0/sessions/{session}/connect?type=adb&token={}",
        token.expose()
    ))
}

fn show(gateway: &Gateway, door: Door, headers: &HeaderMap, share: shares::Share) -> Share {
    let url = share_url(gateway, door, headers, &share);
    Share { base: share.base, url }
}

pub async fn create(
    State(gateway): State<Gateway>,
    Full(caller): Full,
    axum::Extension(door): axum::Extension<Door>,
    Path(id): Path<String>,
    headers: HeaderMap,
    Json(request): Json<SharePost>,
) -> Result<Answer<ShareCreated>, ApiError> {
    let session = own(&gateway, &caller, &session_id(&id)?).await?;
    if !session.is_live() {
        return Err(ended(&session.id));
    }
    let share = gateway.create_share(&session.id, &request).await?;
    tracing::info!(session.id = %session.id, share.id = %share.base.id, account = caller.account, "session {} was shared", session.id);
    let url = share_url(&gateway, door, &headers, &share);
    Ok(Answer::ok(created(share.base, url)))
}

#[derive(Debug, Deserialize)]
pub struct Connecting {
    #[serde(rename = "type")]
    kind: Option<String>,
    token: Option<String>,
}

pub async fn connect(
    State(gateway): State<Gateway>,
    axum::Extension(door): axum::Extension<Door>,
    Path(id): Path<String>,
    headers: HeaderMap,
    Query(query): Query<Connecting>,
) -> Result<Answer<ShareConnected>, ApiError> {
    let id = session_id(&id)?;
    let kind = query.kind.unwrap_or_default();
    if kind != "adb" {
        let kind: String = kind.chars().take(64).collect();
        let text = format!("type is {kind:?}: adb is the only kind of share");
        return Err(ApiError::bad_request("invalid-type", text));
    }
    let token = query.token.unwrap_or_default();
    if token.is_empty() {
        return Err(unauthorized("the token of a share is needed: use its URL as it was given"));
    }
    let share_id = gateway.accounts.check_share(&token, gateway.now()).await?;
    let share = gateway.find_share(None, &share_id).await?;
    check_session(&share, &id)?;
    let Some(session) = gateway.find_session(&id).await? else {
        return Err(crate::sessions::no_session(&id));
    };
    if session.status != SessionStatus::Active {
        let text = format!("session {id} is not active");
        return Err(ApiError::bad_request("invalid-session-state", text));
    }
    let stun_servers = gateway.credentials(&session).await?;
    let share = gateway.connect_share(&share_id).await?;
    let grant = ShareGrant {
        share_id,
        connection: share.connection,
        expires_at: share.base.expiry_at.min(gateway.now() + SOCKET_SECONDS),
    };
    let token = gateway.accounts.grant_share(&grant);
    let (scheme, authority) = authority(&gateway, door, &headers, false);
    let url =
        Secret::new(format!("{scheme}://{authority}/1.0/sessions/{id}/sockets/adb?token={}", token.expose()));
    Ok(Answer::ok(ShareConnected { url, stun_servers }))
}

fn check_session(share: &shares::Share, session: &SessionId) -> Result<(), ApiError> {
    if share.base.session_id == *session {
        return Ok(());
    }
    Err(ApiError::forbidden("foreign-token", "this token is for another session"))
}

/// A socket of role `adb`: the token is checked as for an image that offers ADB, and then the image says no.
pub async fn socket(gateway: &Gateway, id: &SessionId, token: &str) -> ApiError {
    let checked = async {
        if token.is_empty() {
            return Err(unauthorized("a socket token is needed: query `token=TOKEN` from connect"));
        }
        let grant = gateway.accounts.check_share_socket(token, gateway.now()).await?;
        let share = gateway.find_share(None, &grant.share_id).await?;
        check_session(&share, id)?;
        if share.connection != grant.connection {
            let text = "somebody connected through this share later; connect again";
            return Err(ApiError::new(StatusCode::GONE, "token-outdated", text));
        }
        Ok(())
    };
    match checked.await {
        Err(error) => error,
        Ok(()) => ApiError::bad_request("unsupported-by-image", "ADB is not supported by this image"),
    }
}

#[derive(Debug, Deserialize)]
pub struct Listing {
    recursion: Option<String>,
    recursive: Option<String>,
    limit: Option<String>,
    offset: Option<String>,
    session_id: Option<String>,
}

pub async fn list(
    State(gateway): State<Gateway>,
    Full(caller): Full,
    Query(query): Query<Listing>,
) -> Result<Answer<Value>, ApiError> {
    let recursion =
        flag("recursion", query.recursion.as_deref())? || flag("recursive", query.recursive.as_deref())?;
    let (limit, offset) =
        (number("limit", query.limit.as_deref())?, number("offset", query.offset.as_deref())?);
    let session = query.session_id.filter(|id| !id.is_empty()).map(|id| session_id(&id)).transpose()?;
    let shares = gateway.list_shares(&caller, session.as_ref()).await?;
    let limit = if limit == 0 { usize::MAX } else { limit };
    let page: Vec<Value> = shares
        .iter()
        .skip(offset)
        .take(limit)
        .map(|share| if recursion { json!(share) } else { json!(share.id) })
        .collect();
    Ok(Answer { total_size: Some(shares.len() as u64), ..Answer::ok(json!(page)) })
}

pub async fn get(
    State(gateway): State<Gateway>,
    Full(caller): Full,
    axum::Extension(door): axum::Extension<Door>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Answer<Share>, ApiError> {
    let share = gateway.find_share(Some(&caller), &share_id(&id)?).await?;
    Ok(Answer::ok(show(&gateway, door, &headers, share)))
}

pub async fn update(
    State(gateway): State<Gateway>,
    Full(caller): Full,
    axum::Extension(door): axum::Extension<Door>,
    Path(id): Path<String>,
    headers: HeaderMap,
    Json(request): Json<SharePatch>,
) -> Result<Answer<Share>, ApiError> {
    let id = share_id(&id)?;
    gateway.find_share(Some(&caller), &id).await?;
    let share = gateway.update_share(&id, &request).await?;
    Ok(Answer::ok(show(&gateway, door, &headers, share)))
}

#[derive(Debug, Deserialize)]
pub struct Deleting {
    sync: Option<String>,
}

pub async fn delete(
    State(gateway): State<Gateway>,
    Full(caller): Full,
    Path(id): Path<String>,
    Query(query): Query<Deleting>,
) -> Result<Answer<Value>, ApiError> {
    // A share is gone at once, so that there is nothing to wait for either way.
    flag("sync", query.sync.as_deref())?;
    let id = share_id(&id)?;
    gateway.find_share(Some(&caller), &id).await?;
    gateway.delete_share(&id).await?;
    tracing::info!(share.id = %id, account = caller.account, "share {id} was deleted");
    Ok(Answer::empty())
}
