//! The client of the agent's internal API, for AMS (agent: `/internal/1.0`).

use fanlight_api::{
    SessionId,
    bus::{AgentSessionCreated, AgentSessionsPost},
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
