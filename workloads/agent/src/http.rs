//! The agent's HTTP API: sessions for AMS by client certificate, the websocket for streamers by instance token.

use std::{collections::BTreeSet, sync::Arc};

use axum::{
    Extension, Router,
    extract::{
        Path, State, WebSocketUpgrade, rejection::PathRejection, ws::rejection::WebSocketUpgradeRejection,
    },
    response::Response,
    routing::{any, delete, get, patch, post},
};
use fanlight_api::{
    SessionId, ShareId,
    bus::{AgentSessionCreated, AgentSessionsPost, GatewayRequest},
    envelope::GatewayEnvelope,
    gateway::{ShareCreated, SharePatch, SharePost},
};
use fanlight_service::{
    ApiError,
    http::{Json, Peer},
    tls::fingerprint_of_file,
};
use http::{HeaderMap, header::AUTHORIZATION};
use serde_json::json;

use crate::{Agent, STREAM_PATH, gateway, stream};

/// All routes.
pub fn router(agent: Arc<Agent>) -> Router {
    Router::new()
        .route("/internal/1.0/health", get(health))
        .route("/internal/1.0/sessions", post(create_session))
        .route("/internal/1.0/sessions/{id}", delete(end_session))
        .route("/internal/1.0/sessions/{id}/shares", post(create_share))
        .route("/internal/1.0/sessions/{id}/shares/{share}", patch(update_share).delete(delete_share))
        .route(STREAM_PATH, any(open_stream))
        .with_state(agent)
}

/// 200 while the process serves; says what it waits for.
async fn health(State(agent): State<Arc<Agent>>) -> Json<GatewayEnvelope> {
    let (reachable, bus) = (agent.inventory().reachable, *agent.bus.connected().borrow());
    let status = if reachable && bus { "healthy" } else { "unhealthy" };
    let body = json!({
        "status": status, "ams_reachable": reachable, "bus_connected": bus, "streamers": agent.streamers.count(),
    });
    Json(GatewayEnvelope::success(200, Some(body)))
}

async fn create_session(
    State(agent): State<Arc<Agent>>,
    Extension(peer): Extension<Peer>,
    Json(request): Json<AgentSessionsPost>,
) -> Result<Json<GatewayEnvelope<AgentSessionCreated>>, ApiError> {
    check_client(&agent, &peer)?;
    let created = gateway::create_session(&agent, request).await?;
    Ok(Json(GatewayEnvelope::success(200, Some(created))))
}

async fn end_session(
    State(agent): State<Arc<Agent>>,
    Extension(peer): Extension<Peer>,
    id: Result<Path<SessionId>, PathRejection>,
) -> Result<Json<GatewayEnvelope>, ApiError> {
    check_client(&agent, &peer)?;
    let Path(id) = id.map_err(|error| ApiError::bad_request("invalid-session-id", error.body_text()))?;
    gateway::end_session(&agent, id).await?;
    Ok(Json(GatewayEnvelope::success(200, None)))
}

async fn create_share(
    State(agent): State<Arc<Agent>>,
    Extension(peer): Extension<Peer>,
    id: Result<Path<SessionId>, PathRejection>,
    Json(share): Json<SharePost>,
) -> Result<Json<GatewayEnvelope<ShareCreated>>, ApiError> {
    check_client(&agent, &peer)?;
    let Path(session_id) = id.map_err(invalid_id)?;
    let request = GatewayRequest::CreateShare { agent_id: agent.id.clone(), session_id, share };
    Ok(Json(GatewayEnvelope::success(200, Some(gateway::share(&agent, &request).await?))))
}

async fn update_share(
    State(agent): State<Arc<Agent>>,
    Extension(peer): Extension<Peer>,
    ids: Result<Path<(SessionId, ShareId)>, PathRejection>,
    Json(patch): Json<SharePatch>,
) -> Result<Json<GatewayEnvelope<ShareCreated>>, ApiError> {
    check_client(&agent, &peer)?;
    let Path((session_id, share_id)) = ids.map_err(invalid_id)?;
    let request = GatewayRequest::UpdateShare { agent_id: agent.id.clone(), session_id, share_id, patch };
    Ok(Json(GatewayEnvelope::success(200, Some(gateway::share(&agent, &request).await?))))
}

async fn delete_share(
    State(agent): State<Arc<Agent>>,
    Extension(peer): Extension<Peer>,
    ids: Result<Path<(SessionId, ShareId)>, PathRejection>,
) -> Result<Json<GatewayEnvelope>, ApiError> {
    check_client(&agent, &peer)?;
    let Path((session_id, share_id)) = ids.map_err(invalid_id)?;
    gateway::end_share(&agent, session_id, share_id).await?;
    Ok(Json(GatewayEnvelope::success(200, None)))
}

fn invalid_id(error: PathRejection) -> ApiError {
    ApiError::bad_request("invalid-id", error.body_text())
}

/// Lets in whoever holds the key of a certificate that the configuration names.
fn check_client(agent: &Agent, peer: &Peer) -> Result<(), ApiError> {
    let Some(fingerprint) = peer.fingerprint() else {
        return Err(ApiError::unauthorized("a client certificate is needed"));
    };
    let clients = &agent.config.clients;
    let mut known: BTreeSet<String> = clients.fingerprints.iter().map(|text| text.to_lowercase()).collect();
    for path in &clients.certificates {
        match fingerprint_of_file(path) {
            Ok(fingerprint) => {
                known.insert(fingerprint);
            }
            Err(error) => {
                tracing::warn!("clients.certificates: {}", fanlight_service::telemetry::chain(&error))
            }
        }
    }
    // Fingerprints are no secrets; what counts is the key, which the handshake has proved.
    if known.contains(&fingerprint) {
        return Ok(());
    }
    Err(ApiError::forbidden(
        "untrusted-certificate",
        format!("client certificate {fingerprint} is not trusted here"),
    ))
}

async fn open_stream(
    State(agent): State<Arc<Agent>>,
    headers: HeaderMap,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    let bearer = headers
        .get(AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .map(|(_, token)| token.trim());
    let Some(token) = bearer else {
        return Err(ApiError::unauthorized("an instance token is needed: Authorization: Bearer TOKEN"));
    };
    let Some(scope) = agent.key.verify(token) else {
        return Err(ApiError::forbidden("invalid-token", "the instance token is not valid here"));
    };
    let upgrade = upgrade.map_err(|error| ApiError::bad_request("websocket-expected", error.body_text()))?;
    Ok(stream::accept(agent, scope, upgrade))
}
