//! The client of AMS (ams-api sections 2, 3, 7 to 12).

use std::time::Duration;

use bytes::Bytes;
use fanlight_api::{
    OperationId,
    ams::{
        Application, ApplicationVersionPatch, Certificate, CertificatesPost, Delete, Instance, InstancePatch,
        InstancesPost, Node, Operation, ServiceStatus, Version,
    },
    envelope::{AmsEnvelope, Kind},
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, header::CONTENT_TYPE};
use serde::{Serialize, de::DeserializeOwned};
use sha2::{Digest, Sha256};

use crate::{ClientError, Endpoint, Events, endpoint::Answer, gateway::segment};

const FINGERPRINT: HeaderName = HeaderName::from_static("x-ams-fingerprint");
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// How long one question after an operation waits at the server, seconds.
const WAIT_STEP_S: u64 = 20;

/// A client of AMS.
#[derive(Clone, Debug)]
pub struct AmsClient {
    endpoint: Endpoint,
}

impl AmsClient {
    /// A client by certificate, or on AMS's own unix socket.
    pub fn new(endpoint: Endpoint) -> Self {
        Self { endpoint }
    }

    /// Where AMS is.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    async fn call<B: Serialize + ?Sized, T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        query: &[(&str, String)],
        body: Option<&B>,
    ) -> Result<T, ClientError> {
        decode(self.endpoint.json(method, path, query, HeaderMap::new(), body).await?)
    }

    async fn get<T: DeserializeOwned>(&self, path: &str, query: &[(&str, String)]) -> Result<T, ClientError> {
        self.call(Method::GET, path, query, None::<&()>).await
    }

    /// A file that comes without envelope.
    async fn read(&self, path: &str) -> Result<Bytes, ClientError> {
        let answer = self.endpoint.json(Method::GET, path, &[], HeaderMap::new(), None::<&()>).await?;
        if answer.status.is_success() {
            return Ok(answer.body);
        }
        Err(answer.about.refused(answer.status, &answer.body))
    }

    /// What the server is and whether it trusts this client; open to everybody.
    ///
    /// # Errors
    /// As of every request: unreachable, timed out, refused, or not understood.
    pub async fn service(&self) -> Result<ServiceStatus, ClientError> {
        self.get("/1.0", &[]).await
    }

    /// Version of the server; open to everybody.
    ///
    /// # Errors
    /// As of every request.
    pub async fn version(&self) -> Result<Version, ClientError> {
        self.get("/1.0/version", &[]).await
    }

    /// All applications.
    ///
    /// # Errors
    /// As of every request.
    pub async fn applications(&self) -> Result<Vec<Application>, ClientError> {
        self.get::<Option<_>>("/1.0/applications", &[("recursion", "1".into())])
            .await
            .map(Option::unwrap_or_default)
    }

    /// One application, by id or name.
    ///
    /// # Errors
    /// As of every request; not found.
    pub async fn application(&self, name: &str) -> Result<Application, ClientError> {
        self.get(&format!("/1.0/applications/{}", segment(name)?), &[]).await
    }

    /// Makes an application of a package (tar, plain or compressed by gzip or bzip2, or zip).
    ///
    /// # Errors
    /// As of every request; the name is taken, or the package is refused. The operation may fail later.
    pub async fn create_application(&self, package: Bytes) -> Result<Operation, ClientError> {
        self.upload(Method::POST, "/1.0/applications", package).await
    }

    /// Adds a version to an application.
    ///
    /// # Errors
    /// As of every request; not found, or the package is refused. The operation may fail later.
    pub async fn update_application(&self, name: &str, package: Bytes) -> Result<Operation, ClientError> {
        self.upload(Method::PATCH, &format!("/1.0/applications/{}", segment(name)?), package).await
    }

    async fn upload(&self, method: Method, path: &str, package: Bytes) -> Result<Operation, ClientError> {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        let fingerprint = hex::encode(Sha256::digest(&package));
        headers
            .insert(FINGERPRINT, HeaderValue::try_from(fingerprint).expect("hexadecimal digits are allowed"));
        decode(self.endpoint.upload(method, path, &[], headers, package).await?)
    }

    /// Publishes a version, or revokes it.
    ///
    /// # Errors
    /// As of every request; not found.
    pub async fn publish_application(
        &self,
        name: &str,
        version: u32,
        published: bool,
    ) -> Result<Operation, ClientError> {
        let path = format!("/1.0/applications/{}/{version}", segment(name)?);
        let body = ApplicationVersionPatch { published: Some(published) };
        self.call(Method::PATCH, &path, &[], Some(&body)).await
    }

    /// Removes an application.
    ///
    /// # Errors
    /// As of every request; not found, or in use.
    pub async fn delete_application(&self, name: &str, force: bool) -> Result<Operation, ClientError> {
        let path = format!("/1.0/applications/{}", segment(name)?);
        self.call(Method::DELETE, &path, &[], Some(&Delete { force })).await
    }

    /// The manifest of the latest version, as it was written.
    ///
    /// # Errors
    /// As of every request; not found.
    pub async fn application_manifest(&self, name: &str) -> Result<Bytes, ClientError> {
        self.read(&format!("/1.0/applications/{}/manifest", segment(name)?)).await
    }

    /// Instances; `filters` as in ams-api section 9.1, e.g. `("tags", "session=…")`.
    ///
    /// # Errors
    /// As of every request.
    pub async fn instances(&self, filters: &[(&str, String)]) -> Result<Vec<Instance>, ClientError> {
        let mut query = vec![("recursion", "1".to_owned())];
        query.extend(filters.iter().cloned());
        self.get::<Option<_>>("/1.0/instances", &query).await.map(Option::unwrap_or_default)
    }

    /// One instance, by id or name.
    ///
    /// # Errors
    /// As of every request; not found.
    pub async fn instance(&self, name: &str) -> Result<Instance, ClientError> {
        self.get(&format!("/1.0/instances/{}", segment(name)?), &[]).await
    }

    /// Makes an instance and starts it. With `no_wait` the operation ends when the launch is accepted, else when
    /// the instance runs. The same `idempotency_key` again is the same instance.
    ///
    /// # Errors
    /// As of every request. The operation may fail later.
    pub async fn launch(
        &self,
        request: &InstancesPost,
        no_wait: bool,
        idempotency_key: Option<&str>,
    ) -> Result<Operation, ClientError> {
        let mut headers = HeaderMap::new();
        if let Some(key) = idempotency_key {
            let value = HeaderValue::try_from(key).map_err(|_| ClientError::Address {
                url: key.chars().take(64).collect(),
                reason: "the idempotency key holds characters that cannot be sent".into(),
            })?;
            headers.insert(IDEMPOTENCY_KEY, value);
        }
        let query = [("no_wait", no_wait.to_string())];
        decode(self.endpoint.json(Method::POST, "/1.0/instances", &query, headers, Some(request)).await?)
    }

    /// Starts a stopped instance.
    ///
    /// # Errors
    /// As of every request; not found.
    pub async fn start_instance(&self, name: &str, no_wait: bool) -> Result<Operation, ClientError> {
        self.set_status(name, "started", no_wait).await
    }

    /// Stops an instance gracefully.
    ///
    /// # Errors
    /// As of every request; not found.
    pub async fn stop_instance(&self, name: &str, no_wait: bool) -> Result<Operation, ClientError> {
        self.set_status(name, "stopped", no_wait).await
    }

    async fn set_status(&self, name: &str, desired: &str, no_wait: bool) -> Result<Operation, ClientError> {
        let path = format!("/1.0/instances/{}", segment(name)?);
        let body = InstancePatch { desired_status: Some(desired.into()), ..InstancePatch::default() };
        self.call(Method::PATCH, &path, &[("no_wait", no_wait.to_string())], Some(&body)).await
    }

    /// Removes an instance, stopping it gracefully before unless `force`.
    ///
    /// # Errors
    /// As of every request; not found, or protected.
    pub async fn delete_instance(&self, name: &str, force: bool) -> Result<Operation, ClientError> {
        let path = format!("/1.0/instances/{}", segment(name)?);
        self.call(Method::DELETE, &path, &[], Some(&Delete { force })).await
    }

    /// Paths of the logs of an instance.
    ///
    /// # Errors
    /// As of every request; not found.
    pub async fn instance_logs(&self, name: &str) -> Result<Vec<String>, ClientError> {
        let path = format!("/1.0/instances/{}/logs", segment(name)?);
        self.get::<Option<_>>(&path, &[]).await.map(Option::unwrap_or_default)
    }

    /// One log of an instance.
    ///
    /// # Errors
    /// As of every request; not found.
    pub async fn instance_log(&self, name: &str, log: &str) -> Result<Bytes, ClientError> {
        self.read(&format!("/1.0/instances/{}/logs/{}", segment(name)?, segment(log)?)).await
    }

    /// Machines that host instances.
    ///
    /// # Errors
    /// As of every request.
    pub async fn nodes(&self) -> Result<Vec<Node>, ClientError> {
        self.get::<Option<_>>("/1.0/nodes", &[("recursion", "1".into())]).await.map(Option::unwrap_or_default)
    }

    /// Trusted client certificates.
    ///
    /// # Errors
    /// As of every request.
    pub async fn certificates(&self) -> Result<Vec<Certificate>, ClientError> {
        self.get::<Option<_>>("/1.0/certificates", &[("recursion", "1".into())])
            .await
            .map(Option::unwrap_or_default)
    }

    /// Trusts a client certificate.
    ///
    /// # Errors
    /// As of every request; it is trusted already, or unusable.
    pub async fn add_certificate(&self, request: &CertificatesPost) -> Result<(), ClientError> {
        let answer: Result<serde_json::Value, _> =
            self.call(Method::POST, "/1.0/certificates", &[], Some(request)).await;
        answer.map(|_| ())
    }

    /// Trusts a client certificate no longer.
    ///
    /// # Errors
    /// As of every request; not found.
    pub async fn delete_certificate(&self, fingerprint: &str) -> Result<(), ClientError> {
        let path = format!("/1.0/certificates/{}", segment(fingerprint)?);
        let answer: Result<serde_json::Value, _> = self.call(Method::DELETE, &path, &[], None::<&()>).await;
        answer.map(|_| ())
    }

    /// An operation as it is now.
    ///
    /// # Errors
    /// As of every request; not found.
    pub async fn operation(&self, id: &OperationId) -> Result<Operation, ClientError> {
        self.get(&format!("/1.0/operations/{id}"), &[]).await
    }

    /// Waits until an operation has ended well, for at most so long.
    ///
    /// # Errors
    /// [`ClientError::Operation`] when it failed or was cancelled, [`ClientError::TimedOut`], or as of every
    /// request.
    pub async fn wait(&self, operation: &Operation, timeout: Duration) -> Result<Operation, ClientError> {
        let deadline = tokio::time::Instant::now() + timeout;
        let mut current = operation.clone();
        let path = format!("/1.0/operations/{}/wait", operation.id);
        loop {
            if current.is_final() {
                if current.succeeded() {
                    return Ok(current);
                }
                let text = if current.err.is_empty() { current.status.clone() } else { current.err.clone() };
                return Err(ClientError::Operation { description: current.description, text });
            }
            let left = deadline.saturating_duration_since(tokio::time::Instant::now());
            if left.is_zero() {
                return Err(ClientError::TimedOut {
                    method: "GET",
                    path,
                    server: self.endpoint.name(),
                    timeout,
                });
            }
            let step = left.as_secs().clamp(1, WAIT_STEP_S);
            current = self.get(&path, &[("timeout", step.to_string())]).await?;
        }
    }

    /// The events of AMS from now on; see [`Events`].
    pub fn events(&self) -> Events {
        Events::follow(self.endpoint.clone(), "/1.0/events".into())
    }
}

fn decode<T: DeserializeOwned>(answer: Answer) -> Result<T, ClientError> {
    let Answer { status, body, about } = answer;
    let envelope: AmsEnvelope = match serde_json::from_slice(&body) {
        Ok(envelope) => envelope,
        Err(_) if !status.is_success() => return Err(about.refused(status, &body)),
        Err(error) => return Err(about.unreadable(status, error)),
    };
    if envelope.kind == Kind::Error || !status.is_success() {
        // Clients of the original go by the type, not by the status (ams-api section 2.3).
        let stated = http::StatusCode::from_u16(envelope.error_code).unwrap_or(status);
        return Err(about.refused(if status.is_success() { stated } else { status }, &body));
    }
    serde_json::from_value(envelope.metadata).map_err(|error| about.unreadable(status, error))
}
