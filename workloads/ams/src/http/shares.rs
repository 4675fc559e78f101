//! Shares of instances (ams-api section 9.4, ams-model section 3.10): shares of their sessions, made at a gateway through
//! the agent. What a share leads to is the image's to offer.

use axum::{
    extract::{Path, State},
    response::Response,
};
use fanlight_api::{SessionId, ShareId, ams::SharePost, gateway};
use fanlight_client::{AgentClient, ClientError};
use fanlight_service::{
    ApiError,
    http::{Json, OptionalJson},
};
use http::StatusCode;
use serde_json::json;

use super::{accepted, done, store_error};
use crate::{Ams, core::model::InstanceRecord};

pub(super) async fn create(
    State(ams): State<Ams>,
    Path(id): Path<String>,
    Json(request): Json<SharePost>,
) -> Result<Response, ApiError> {
    let record = ams.find_instance(&id).await?.value;
    let (agent, session) = way(&ams, &record)?;
    let share = gateway::SharePost {
        kind: Some(request.kind),
        description: request.description,
        // 0 is how some clients leave a value out.
        expiry_at: request.expiry_at.filter(|at| *at != 0),
        expiry_min: None,
    };
    let created = agent.create_share(session, &share).await.map_err(refused)?;
    tracing::info!(instance.id = %record.id, session.id = %session, share.id = %created.id, "instance {} was shared", record.id);
    let flat = json!({
        "id": created.id, "type": created.kind, "url": created.url, "expiry_at": created.expiry_at,
    });
    // The original's client looks inside a second `metadata` (ams-api section 9.4).
    let mut both = flat.clone();
    both["metadata"] = flat;
    Ok(done(both))
}

pub(super) async fn update(
    State(ams): State<Ams>,
    Path((id, share)): Path<(String, String)>,
    OptionalJson(request): OptionalJson<gateway::SharePatch>,
) -> Result<Response, ApiError> {
    let record = ams.find_instance(&id).await?.value;
    let (agent, session) = way(&ams, &record)?;
    let patch = gateway::SharePatch {
        description: request.description,
        expiry_at: request.expiry_at.filter(|at| *at != 0),
    };
    agent.update_share(session, &share_id(&share)?, &patch).await.map_err(refused)?;
    Ok(done(json!({})))
}

pub(super) async fn delete(
    State(ams): State<Ams>,
    Path((id, share)): Path<(String, String)>,
) -> Result<Response, ApiError> {
    let record = ams.find_instance(&id).await?.value;
    let (agent, session) = way(&ams, &record)?;
    agent.delete_share(session, &share_id(&share)?).await.map_err(refused)?;
    tracing::info!(instance.id = %record.id, session.id = %session, share.id = %share, "share {share} was deleted");
    let url = format!("{}/shares/{share}", record.url());
    let (operation, write) = ams.operations.prepare_done("Deleting share", "shares", &url, Ok(()));
    ams.store.transact(Vec::new(), vec![write]).await.map_err(store_error)?;
    ams.operations.begun(&operation);
    Ok(accepted(&operation))
}

/// Who makes the shares of an instance, and of which session.
fn way<'a>(ams: &'a Ams, record: &'a InstanceRecord) -> Result<(&'a AgentClient, &'a SessionId), ApiError> {
    let not_supported = |text: &str| Err(ApiError::bad_request("not-supported", text));
    let Some(agent) = &ams.agent else {
        return not_supported("shares not supported: no agent is configured (agent.url)");
    };
    let Some(streaming) = record.session.streaming() else {
        return not_supported("shares not supported: the instance does not stream (config.enable_streaming)");
    };
    Ok((agent, &streaming.session_id))
}

fn share_id(text: &str) -> Result<ShareId, ApiError> {
    text.parse().map_err(|_| ApiError::not_found("share-not-found", "share not found"))
}

/// What the gateway said, or that it said nothing.
fn refused(error: ClientError) -> ApiError {
    match &error {
        ClientError::Refused { status, text, .. } => {
            let known = [StatusCode::BAD_REQUEST, StatusCode::FORBIDDEN, StatusCode::NOT_FOUND];
            let status = known.into_iter().find(|known| known == status);
            ApiError::new(status.unwrap_or(StatusCode::SERVICE_UNAVAILABLE), "share-refused", text.clone())
        }
        _ => ApiError::unavailable(
            "agent-unreachable",
            format!("the agent does not answer: {}", error.chain()),
        )
        .with_source(error),
    }
}
