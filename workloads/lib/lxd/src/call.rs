//! One call: its envelope, its bounds and its errors.

use std::{path::PathBuf, time::Duration};

use fanlight_client::{Endpoint, Identity, Trust};
use http::{HeaderMap, Method, StatusCode, header::ETAG};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::{LxdError, Operation};

/// Bound on calls that LXD answers at once.
pub(crate) const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// Bound on whole transfers of files and images.
pub(crate) const TRANSFER_TIMEOUT: Duration = Duration::from_secs(600);

/// A server or cluster of LXD; clones share connections.
#[derive(Clone, Debug)]
pub struct Lxd {
    pub(crate) endpoint: Endpoint,
    pub(crate) project: Option<String>,
    pub(crate) target: Option<String>,
}

/// What a call sends.
pub(crate) struct Call<'a> {
    pub method: Method,
    pub path: &'a str,
    pub query: Vec<(&'a str, String)>,
    pub headers: HeaderMap,
    pub body: Option<reqwest::Body>,
    pub timeout: Duration,
}

impl<'a> Call<'a> {
    pub fn new(method: Method, path: &'a str) -> Self {
        let headers = HeaderMap::new();
        Self { method, path, query: Vec::new(), headers, body: None, timeout: CALL_TIMEOUT }
    }

    pub fn query(mut self, name: &'a str, value: impl ToString) -> Self {
        self.query.push((name, value.to_string()));
        self
    }

    pub fn header(mut self, name: &'static str, value: &str) -> Result<Self, LxdError> {
        let value = value
            .parse()
            .map_err(|_| LxdError::Invalid { what: name, reason: "it does not fit into a header".into() })?;
        self.headers.insert(name, value);
        Ok(self)
    }

    pub fn json(mut self, body: &impl Serialize) -> Self {
        let bytes = serde_json::to_vec(body).expect("texts, numbers and maps always serialise");
        self.headers.insert("content-type", http::HeaderValue::from_static("application/json"));
        self.body = Some(bytes.into());
        self
    }

    pub fn body(mut self, body: impl Into<reqwest::Body>) -> Self {
        self.headers.insert("content-type", http::HeaderValue::from_static("application/octet-stream"));
        self.body = Some(body.into());
        self.timeout = TRANSFER_TIMEOUT;
        self
    }

    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }
}

/// What LXD puts around each answer.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Envelope {
    pub operation: String,
    pub error: String,
    pub metadata: Value,
}

impl Lxd {
    /// LXD behind its unix socket.
    ///
    /// # Errors
    /// The HTTP library cannot be set up.
    pub fn unix(socket: impl Into<PathBuf>) -> Result<Self, LxdError> {
        Ok(Self { endpoint: Endpoint::unix(socket)?, project: None, target: None })
    }

    /// LXD at an `https://HOST:8443` address whose certificate has this SHA-256 fingerprint; we show our own.
    ///
    /// # Errors
    /// The address, the fingerprint or a file is wrong.
    pub fn https(url: &str, fingerprint: &str, identity: &Identity) -> Result<Self, LxdError> {
        let trust = Trust::Pinned(fingerprint.into());
        Ok(Self { endpoint: Endpoint::http(url, &trust, Some(identity))?, project: None, target: None })
    }

    /// The same server, in this project.
    #[must_use]
    pub fn project(&self, name: impl Into<String>) -> Self {
        Self { project: Some(name.into()), ..self.clone() }
    }

    /// The same cluster, this member of it.
    #[must_use]
    pub fn target(&self, member: impl Into<String>) -> Self {
        Self { target: Some(member.into()), ..self.clone() }
    }

    /// The address, for logs.
    pub fn name(&self) -> String {
        self.endpoint.name()
    }

    /// Sends a call with project and member, and gives the answer as it comes.
    pub(crate) async fn send(&self, mut call: Call<'_>) -> Result<(reqwest::Response, String), LxdError> {
        let name = format!("{} {}", call.method, call.path);
        if let Some(project) = &self.project {
            call.query.push(("project", project.clone()));
        }
        if let Some(target) = &self.target {
            call.query.push(("target", target.clone()));
        }
        let mut request = self.endpoint.request(call.method, call.path, &call.query)?.headers(call.headers);
        if let Some(body) = call.body {
            request = request.body(body);
        }
        let response = request.timeout(call.timeout).send().await;
        let response = response.map_err(|error| failed(&name, error, call.timeout))?;
        if response.status().is_success() {
            return Ok((response, name));
        }
        let status = response.status();
        let bytes = response.bytes().await.map_err(|error| failed(&name, error, call.timeout))?;
        let envelope: Envelope = serde_json::from_slice(&bytes).unwrap_or_default();
        let reason = || status.canonical_reason().unwrap_or("refused").to_owned();
        let text = if envelope.error.is_empty() { reason() } else { envelope.error };
        Err(LxdError::refused(name, status, text))
    }

    async fn envelope(&self, call: Call<'_>) -> Result<(Envelope, String, String, StatusCode), LxdError> {
        let timeout = call.timeout;
        let (response, name) = self.send(call).await?;
        let status = response.status();
        let etag = response.headers().get(ETAG).and_then(|value| value.to_str().ok());
        let etag = etag.unwrap_or_default().to_owned();
        let bytes = response.bytes().await.map_err(|error| failed(&name, error, timeout))?;
        match serde_json::from_slice(&bytes) {
            Ok(envelope) => Ok((envelope, etag, name, status)),
            Err(error) => Err(LxdError::Answer { call: name, reason: error.to_string() }),
        }
    }

    /// A call with a typed answer, and the tag of what was read.
    pub(crate) async fn tagged<T: DeserializeOwned>(&self, call: Call<'_>) -> Result<(T, String), LxdError> {
        let (envelope, etag, call, _) = self.envelope(call).await?;
        let value = serde_json::from_value(envelope.metadata)
            .map_err(|error| LxdError::Answer { call, reason: error.to_string() })?;
        Ok((value, etag))
    }

    /// A call with a typed answer.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, LxdError> {
        Ok(self.tagged(Call::new(Method::GET, path)).await?.0)
    }

    /// A call of which only success matters.
    pub(crate) async fn done(&self, call: Call<'_>) -> Result<(), LxdError> {
        self.envelope(call).await.map(|_| ())
    }

    /// A call that begins work in the background.
    pub(crate) async fn begin(&self, call: Call<'_>) -> Result<Operation, LxdError> {
        let (envelope, _, call, status) = self.envelope(call).await?;
        let path = envelope.operation.split('?').next().unwrap_or_default();
        let id = path.rsplit('/').next().unwrap_or_default().to_owned();
        if status != StatusCode::ACCEPTED || id.is_empty() {
            return Err(LxdError::Answer { call, reason: "there is no operation in it".into() });
        }
        // No target: the server that answers finds the member that works on it by the id.
        let lxd = Self { target: None, ..self.clone() };
        Ok(Operation { lxd, call, id, metadata: envelope.metadata })
    }
}

pub(crate) fn failed(call: &str, error: reqwest::Error, timeout: Duration) -> LxdError {
    if error.is_timeout() && !error.is_connect() {
        return LxdError::TimedOut { call: call.into(), timeout };
    }
    LxdError::Unreachable { call: call.into(), source: error.without_url().into() }
}

/// A name as one part of a path.
pub(crate) fn part(name: &str) -> String {
    let mut text = String::with_capacity(name.len());
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte) {
            text.push(char::from(byte));
        } else {
            text.push_str(&format!("%{byte:02X}"));
        }
    }
    // Two names mean other folders to whoever resolves paths.
    match text.as_str() {
        "." => "%2E".into(),
        ".." => "%2E%2E".into(),
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_one_part_of_a_path() {
        assert_eq!(part("c1-x_y.z"), "c1-x_y.z");
        assert_eq!(part("a/b?c d"), "a%2Fb%3Fc%20d");
        assert_eq!(part("10.0.0.1"), "10.0.0.1");
        assert!(!part("../x").contains('/'));
    }

    #[test]
    fn an_error_in_its_envelope_is_read() {
        let text = r#"{"error":"Instance not found","error_code":404,"metadata":null,"type":"error"}"#;
        let envelope: Envelope = serde_json::from_str(text).expect("as LXD writes it");
        assert_eq!(envelope.error, "Instance not found");
    }
}
