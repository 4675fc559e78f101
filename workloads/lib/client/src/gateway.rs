//! The client of the gateway (gateway-api section 6).

use fanlight_api::{
    Secret, SessionId, ShareId,
    envelope::{GatewayEnvelope, Kind},
    gateway::{
        Account, AccountCreated, AccountsPost, Application, ConfigItems, ConfigPatch, JoinPost, LoginCode,
        Region, ServiceStatus, Session, SessionCreated, SessionJoined, SessionStatus, SessionsPost, Share,
        ShareBase, ShareCreated, SharePatch, SharePost,
    },
};
use http::{HeaderMap, HeaderValue, Method, header::AUTHORIZATION};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{ClientError, Endpoint, WebSocket, endpoint::Answer};

/// A client of the gateway.
#[derive(Clone, Debug)]
pub struct GatewayClient {
    endpoint: Endpoint,
    token: Option<Secret>,
}

/// Which sessions to list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SessionsQuery {
    /// Only those in this state.
    pub status: Option<SessionStatus>,
    /// At most so many.
    pub limit: Option<u32>,
    /// Skip so many.
    pub offset: Option<u32>,
}

/// Result of a deletion of many sessions.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deleted {
    /// Gone, or going.
    #[serde(default)]
    pub deleted_sessions: Vec<SessionId>,
    /// The others.
    #[serde(default)]
    pub errors: Vec<NotDeleted>,
}

/// A session that could not be deleted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotDeleted {
    /// Which.
    pub session_id: String,
    /// Why not.
    #[serde(default)]
    pub error_message: String,
    /// As HTTP status.
    #[serde(default)]
    pub status_code: u16,
}

impl GatewayClient {
    /// A client with an API token, or without one on the gateway's own unix socket.
    pub fn new(endpoint: Endpoint, token: Option<Secret>) -> Self {
        Self { endpoint, token }
    }

    /// Where the gateway is.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    fn headers(&self) -> Result<HeaderMap, ClientError> {
        let mut headers = HeaderMap::new();
        if let Some(token) = &self.token {
            let text = format!("macaroon root={}", token.expose());
            let mut value = HeaderValue::try_from(text).map_err(|_| ClientError::Address {
                url: self.endpoint.name(),
                reason: "the API token holds characters that cannot be sent".into(),
            })?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        Ok(headers)
    }

    async fn call<B: Serialize + ?Sized, T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        query: &[(&str, String)],
        body: Option<&B>,
    ) -> Result<T, ClientError> {
        decode(self.endpoint.json(method, path, query, self.headers()?, body).await?)
    }

    async fn get<T: DeserializeOwned>(&self, path: &str, query: &[(&str, String)]) -> Result<T, ClientError> {
        self.call(Method::GET, path, query, None::<&()>).await
    }

    /// Health; open to everybody.
    ///
    /// # Errors
    /// As of every request: unreachable, timed out, refused, or not understood.
    pub async fn status(&self) -> Result<ServiceStatus, ClientError> {
        self.get("/1.0/status", &[]).await
    }

    /// What can be streamed.
    ///
    /// # Errors
    /// As of every request.
    pub async fn applications(&self) -> Result<Vec<Application>, ClientError> {
        self.get("/1.0/applications", &[]).await
    }

    /// Where it can be streamed from.
    ///
    /// # Errors
    /// As of every request.
    pub async fn regions(&self) -> Result<Vec<Region>, ClientError> {
        self.get("/1.0/regions", &[]).await
    }

    /// Sessions.
    ///
    /// # Errors
    /// As of every request.
    pub async fn sessions(&self, query: &SessionsQuery) -> Result<Vec<Session>, ClientError> {
        let mut pairs = vec![("recursion", "true".to_owned())];
        if let Some(status) = query.status {
            let text = serde_json::to_value(status).ok().and_then(|text| text.as_str().map(str::to_owned));
            pairs.push(("status", text.unwrap_or_default()));
        }
        pairs.extend(query.limit.map(|limit| ("limit", limit.to_string())));
        pairs.extend(query.offset.map(|offset| ("offset", offset.to_string())));
        self.get("/1.0/sessions", &pairs).await
    }

    /// Creates and starts a session.
    ///
    /// # Errors
    /// As of every request.
    pub async fn create_session(&self, request: &SessionsPost) -> Result<SessionCreated, ClientError> {
        self.call(Method::POST, "/1.0/sessions", &[], Some(request)).await
    }

    /// One session.
    ///
    /// # Errors
    /// As of every request; not found.
    pub async fn session(&self, id: &SessionId) -> Result<Session, ClientError> {
        self.get(&format!("/1.0/sessions/{id}"), &[]).await
    }

    /// Another client for a session.
    ///
    /// # Errors
    /// As of every request; not found, or ended.
    pub async fn join(&self, id: &SessionId, request: &JoinPost) -> Result<SessionJoined, ClientError> {
        self.call(Method::POST, &format!("/1.0/sessions/{id}/join"), &[], Some(request)).await
    }

    /// Ends a session; `wait`: answers when it is gone.
    ///
    /// # Errors
    /// As of every request; not found.
    pub async fn delete_session(&self, id: &SessionId, wait: bool) -> Result<(), ClientError> {
        let query = [("sync", wait.to_string())];
        let answer: Result<serde_json::Value, _> =
            self.call(Method::DELETE, &format!("/1.0/sessions/{id}"), &query, None::<&()>).await;
        answer.map(|_| ())
    }

    /// Ends many sessions.
    ///
    /// # Errors
    /// As of every request; none of them exists.
    pub async fn delete_sessions(&self, ids: &[SessionId], wait: bool) -> Result<Deleted, ClientError> {
        let body = serde_json::json!({ "ids": ids });
        self.call(Method::DELETE, "/1.0/sessions", &[("sync", wait.to_string())], Some(&body)).await
    }

    /// Shares, of one session or of all.
    ///
    /// # Errors
    /// As of every request.
    pub async fn shares(&self, session: Option<&SessionId>) -> Result<Vec<ShareBase>, ClientError> {
        let mut query = vec![("recursion", "true".to_owned())];
        query.extend(session.map(|id| ("session_id", id.to_string())));
        self.get("/1.0/shares", &query).await
    }

    /// Makes a share of a session.
    ///
    /// # Errors
    /// As of every request; not found, or as many as there may be.
    pub async fn create_share(
        &self,
        session: &SessionId,
        request: &SharePost,
    ) -> Result<ShareCreated, ClientError> {
        self.call(Method::POST, &format!("/1.0/sessions/{session}/share"), &[], Some(request)).await
    }

    /// Changes a share.
    ///
    /// # Errors
    /// As of every request; not found.
    pub async fn update_share(&self, id: &ShareId, request: &SharePatch) -> Result<Share, ClientError> {
        self.call(Method::PATCH, &format!("/1.0/shares/{id}"), &[], Some(request)).await
    }

    /// Takes a share back.
    ///
    /// # Errors
    /// As of every request; not found.
    pub async fn delete_share(&self, id: &ShareId) -> Result<(), ClientError> {
        let answer: Result<serde_json::Value, _> =
            self.call(Method::DELETE, &format!("/1.0/shares/{id}"), &[], None::<&()>).await;
        answer.map(|_| ())
    }

    /// Items of configuration that may be changed while gateways run.
    ///
    /// # Errors
    /// As of every request.
    pub async fn config(&self) -> Result<ConfigItems, ClientError> {
        self.get("/1.0/config", &[]).await
    }

    /// Changes an item of configuration; the empty value is the default again.
    ///
    /// # Errors
    /// As of every request; an unknown item or a value that is not one of its.
    pub async fn set_config(&self, name: &str, value: &str) -> Result<(), ClientError> {
        let request = ConfigPatch { name: name.into(), value: value.into() };
        let answer: Result<serde_json::Value, _> =
            self.call(Method::PATCH, "/1.0/config", &[], Some(&request)).await;
        answer.map(|_| ())
    }

    /// Accounts; on the unix socket only.
    ///
    /// # Errors
    /// As of every request.
    pub async fn accounts(&self) -> Result<Vec<Account>, ClientError> {
        self.get("/1.0/accounts", &[]).await
    }

    /// Makes an account; on the unix socket only.
    ///
    /// # Errors
    /// As of every request; the name is taken.
    pub async fn create_account(&self, request: &AccountsPost) -> Result<AccountCreated, ClientError> {
        self.call(Method::POST, "/1.0/accounts", &[], Some(request)).await
    }

    /// Removes an account and so revokes its token; on the unix socket only.
    ///
    /// # Errors
    /// As of every request; not found.
    pub async fn delete_account(&self, name: &str) -> Result<(), ClientError> {
        let path = format!("/1.0/accounts/{}", segment(name)?);
        let answer: Result<serde_json::Value, _> = self.call(Method::DELETE, &path, &[], None::<&()>).await;
        answer.map(|_| ())
    }

    /// A one-time code for the page; on the unix socket only.
    ///
    /// # Errors
    /// As of every request.
    pub async fn login_code(&self) -> Result<LoginCode, ClientError> {
        self.call(Method::POST, "/1.0/ui/codes", &[], None::<&()>).await
    }

    /// Opens a signalling websocket, given the URL that a create or join answered with. Only its path and query
    /// count: it is looked for where this client has the gateway.
    ///
    /// # Errors
    /// The URL is invalid, or the gateway does not open it.
    pub async fn signalling(&self, url: &str) -> Result<WebSocket, ClientError> {
        let parsed = reqwest::Url::parse(url).map_err(|error| ClientError::Address {
            // Without the query, which holds the token.
            url: url.split('?').next().unwrap_or_default().into(),
            reason: error.to_string(),
        })?;
        let mut path = parsed.path().to_owned();
        if let Some(query) = parsed.query() {
            path.push('?');
            path.push_str(query);
        }
        self.endpoint.websocket(&path, HeaderMap::new()).await
    }
}

/// A name as one segment of a path.
pub(crate) fn segment(name: &str) -> Result<&str, ClientError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b':' | b'.');
    if name.is_empty() || name == "." || name == ".." || !name.bytes().all(allowed) {
        return Err(ClientError::Address {
            url: name.chars().take(64).collect(),
            reason: "a name has characters of A-Z a-z 0-9 - _ : . only".into(),
        });
    }
    Ok(name)
}

pub(crate) fn decode<T: DeserializeOwned>(answer: Answer) -> Result<T, ClientError> {
    let Answer { status, body, about } = answer;
    if !status.is_success() {
        return Err(about.refused(status, &body));
    }
    let envelope: GatewayEnvelope =
        serde_json::from_slice(&body).map_err(|error| about.unreadable(status, error))?;
    if envelope.kind == Kind::Error {
        return Err(about.refused(status, &body));
    }
    let metadata = envelope.metadata.unwrap_or_default();
    serde_json::from_value(metadata).map_err(|error| about.unreadable(status, error))
}
