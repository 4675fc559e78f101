//! Nodes (ams-api section 12).

use axum::{
    extract::{Path, State},
    response::Response,
};
use fanlight_api::ams::nodes::{NodeDelete, NodePatch, NodesPost};
use fanlight_service::{
    ApiError,
    http::{Json, OptionalJson, Query},
};

use super::{Caller, Listing, accepted, collection, object_for, store_error};
use crate::{Ams, nodes::NodeError};

pub(super) async fn list(
    State(ams): State<Ams>,
    caller: Caller,
    Query(query): Query<Listing>,
) -> Result<Response, ApiError> {
    let mut list = Vec::new();
    for node in ams.nodes.list().await.map_err(store_error)? {
        list.push(ams.nodes.show(&node).await.map_err(store_error)?);
    }
    Ok(collection(&caller, &query, list, |node| format!("/1.0/nodes/{}", node.name)))
}

pub(super) async fn show(
    State(ams): State<Ams>,
    caller: Caller,
    Path(name): Path<String>,
    Query(query): Query<Listing>,
) -> Result<Response, ApiError> {
    let node = ams.nodes.find(&name).await?;
    let shown = ams.nodes.show(&node).await.map_err(store_error)?;
    Ok(object_for(&caller, &query, &format!("/1.0/nodes/{}", shown.name), shown))
}

pub(super) async fn create(
    State(ams): State<Ams>,
    Json(post): Json<NodesPost>,
) -> Result<Response, ApiError> {
    Ok(accepted(&ams.nodes.add(post).await?))
}

pub(super) async fn update(
    State(ams): State<Ams>,
    Path(name): Path<String>,
    OptionalJson(patch): OptionalJson<NodePatch>,
) -> Result<Response, ApiError> {
    Ok(accepted(&ams.nodes.patch(&name, &patch).await?))
}

pub(super) async fn delete(
    State(ams): State<Ams>,
    Path(name): Path<String>,
    OptionalJson(request): OptionalJson<NodeDelete>,
) -> Result<Response, ApiError> {
    let instances = ams.list_instances().await.map_err(store_error)?;
    let there =
        instances.iter().filter(|record| record.node.as_ref().is_some_and(|node| node.as_str() == name));
    let ids: Vec<_> = there.map(|record| record.id.clone()).collect();
    let operation = ams.nodes.remove(&name, &request, ids.len()).await?;
    for id in ids {
        // Forced: they are lost with their node.
        if let Err(error) = ams.delete_instance(id.as_str(), true).await {
            tracing::warn!(instance.id = %id, "deleting instance {id} of the removed node {name}: {error}");
        }
    }
    Ok(accepted(&operation))
}

impl From<NodeError> for ApiError {
    fn from(error: NodeError) -> Self {
        use NodeError as E;
        let text = error.to_string();
        match error {
            E::NotFound => Self::not_found("node-not-found", text),
            E::Exists(_) => Self::conflict("node-exists", text),
            E::Invalid { .. } | E::Required(_) => Self::bad_request("invalid-argument", text),
            E::InUse { .. } => Self::bad_request("node-in-use", text),
            E::Engine(error) => error.into(),
            E::Store(error) => store_error(error),
        }
    }
}
