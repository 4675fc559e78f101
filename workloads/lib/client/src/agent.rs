//! The client of the agent's internal API, for AMS (agent: `/internal/1.0`).

use fanlight_api::{
    SessionId, ShareId,
    bus::{AgentSessionCreated, AgentSessionsPost},
    gateway::{ShareCreated, SharePatch, SharePost},
};
use http::{HeaderMap, Method};
use serde_json::Value;

use crate::{ClientError, Endpoint, gateway::decode};

/// A client of an agent.
#[derive(Clone, Debug)]
pub struct AgentClient {
    endpoint: Endpoint,
}

impl AgentClient {
    /// A client that shows a certificate which the agent knows.
    pub fn new(endpoint: Endpoint) -> Self {
        Self { endpoint }
    }

    /// A session for an instance to be. The same instance again is the same session.
    ///
    /// # Errors
    /// As of every request: unreachable, timed out, refused, or not understood.
    pub async fn create_session(
        &self,
        request: &AgentSessionsPost,
    ) -> Result<AgentSessionCreated, ClientError> {
        let path = "/internal/1.0/sessions";
        decode(self.endpoint.json(Method::POST, path, &[], HeaderMap::new(), Some(request)).await?)
    }

    /// A way into a session that is given away.
    ///
    /// # Errors
    /// As of every request; the gateway refuses it.
    pub async fn create_share(
        &self,
        session: &SessionId,
        share: &SharePost,
    ) -> Result<ShareCreated, ClientError> {
        let path = format!("/internal/1.0/sessions/{session}/shares");
        decode(self.endpoint.json(Method::POST, &path, &[], HeaderMap::new(), Some(share)).await?)
    }

    /// Changes a share of a session.
    ///
    /// # Errors
    /// As of every request; the gateway refuses it.
    pub async fn update_share(
        &self,
        session: &SessionId,
        share: &ShareId,
        patch: &SharePatch,
    ) -> Result<ShareCreated, ClientError> {
        let path = format!("/internal/1.0/sessions/{session}/shares/{share}");
        decode(self.endpoint.json(Method::PATCH, &path, &[], HeaderMap::new(), Some(patch)).await?)
    }

    /// Takes a share of a session away.
    ///
    /// # Errors
    /// As of every request; not found.
    pub async fn delete_share(&self, session: &SessionId, share: &ShareId) -> Result<(), ClientError> {
        let path = format!("/internal/1.0/sessions/{session}/shares/{share}");
        let answer = self.endpoint.json(Method::DELETE, &path, &[], HeaderMap::new(), None::<&()>).await?;
        decode::<Value>(answer).map(drop)
    }

    /// Ends a session whose instance is gone. One that is not there (any more) is fine.
    ///
    /// # Errors
    /// As of every request.
    pub async fn delete_session(&self, session: &SessionId) -> Result<(), ClientError> {
        let path = format!("/internal/1.0/sessions/{session}");
        let answer = self.endpoint.json(Method::DELETE, &path, &[], HeaderMap::new(), None::<&()>).await?;
        match decode::<Value>(answer) {
            Err(error) if error.is_not_found() => Ok(()),
            other => other.map(drop),
        }
    }
}
