//! The client of AMS (ams-api sections 2, 3, 5 to 13).

use std::{collections::BTreeMap, path::Path, time::Duration};

use bytes::Bytes;
use fanlight_api::{
    OperationId, Secret,
    ams::{
        Application, ApplicationVersionPatch, Certificate, CertificatesPost, Delete, DeleteMany, Instance,
        InstanceConfigPatch, InstancePatch, InstancesPost, Node, Operation, SecurityPatch, ServiceStatus,
        Version,
        exec::ExecPost,
        images::{ImagePatch, ImagesPost},
        nodes::{NodeDelete, NodePatch, NodesPost},
    },
    envelope::{AmsEnvelope, Kind},
};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method,
    header::{AUTHORIZATION, CONTENT_TYPE},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWrite};

use crate::{ClientError, Endpoint, Events, endpoint::Answer, exec::Exec, gateway::segment};

const FINGERPRINT: HeaderName = HeaderName::from_static("x-ams-fingerprint");
const REQUEST: HeaderName = HeaderName::from_static("x-ams-request");
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// How long one question after an operation waits at the server, seconds.
const WAIT_STEP_S: u64 = 20;

/// A client of AMS.
#[derive(Clone, Debug)]
pub struct AmsClient {
    endpoint: Endpoint,
    /// Sent with everything.
    headers: HeaderMap,
}

impl AmsClient {
    /// A client by certificate, or on AMS's own unix socket.
    pub fn new(endpoint: Endpoint) -> Self {
        Self { endpoint, headers: HeaderMap::new() }
    }

    /// A client that shows a token of an OIDC provider.
    ///
    /// # Errors
    /// The token holds characters that cannot be sent.
    pub fn with_token(endpoint: Endpoint, token: &Secret) -> Result<Self, ClientError> {
        let value = HeaderValue::try_from(format!("Bearer {}", token.expose()));
        let mut value = value.map_err(|_| ClientError::Address {
            url: endpoint.name(),
            reason: "the token holds characters that cannot be sent".into(),
        })?;
        value.set_sensitive(true);
        Ok(Self { endpoint, headers: HeaderMap::from_iter([(AUTHORIZATION, value)]) })
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
        decode(self.endpoint.json(method, path, query, self.headers.clone(), body).await?)
    }

    async fn get<T: DeserializeOwned>(&self, path: &str, query: &[(&str, String)]) -> Result<T, ClientError> {
        self.call(Method::GET, path, query, None::<&()>).await
    }

    /// A file that comes without envelope.
    async fn read(&self, path: &str) -> Result<Bytes, ClientError> {
        let answer = self.endpoint.json(Method::GET, path, &[], self.headers.clone(), None::<&()>).await?;
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
        let mut headers = self.headers.clone();
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
        let mut headers = self.headers.clone();
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

    /// The objects of a collection as the server shows them, such as `/1.0/auth/groups`; filters as ams-api section 15
    /// says. For the types that this crate has no words of its own for.
    ///
    /// # Errors
    /// As of every request.
    pub async fn objects(
        &self,
        collection: &str,
        filters: &[(&str, String)],
    ) -> Result<Vec<Value>, ClientError> {
        let mut query = vec![("recursion", "1".to_owned())];
        query.extend(filters.iter().cloned());
        self.get::<Option<_>>(collection, &query).await.map(Option::unwrap_or_default)
    }

    /// One object of a collection as the server shows it.
    ///
    /// # Errors
    /// As of every request; not found.
    pub async fn object(&self, collection: &str, name: &str) -> Result<Value, ClientError> {
        self.get(&format!("{collection}/{}", segment(name)?), &[]).await
    }

    /// What is at a path, as the server shows it.
    ///
    /// # Errors
    /// As of every request; not found.
    pub async fn value(&self, path: &str) -> Result<Value, ClientError> {
        self.get(path, &[]).await
    }

    /// Makes an object of a collection.
    ///
    /// # Errors
    /// As of every request; it exists, or is refused. The operation may fail later.
    pub async fn create(
        &self,
        collection: &str,
        body: &(impl Serialize + ?Sized),
    ) -> Result<Operation, ClientError> {
        self.call(Method::POST, collection, &[], Some(body)).await
    }

    /// Changes an object of a collection; what the body does not name stays.
    ///
    /// # Errors
    /// As of every request; not found, or refused. The operation may fail later.
    pub async fn patch(
        &self,
        collection: &str,
        name: &str,
        body: &(impl Serialize + ?Sized),
    ) -> Result<Operation, ClientError> {
        self.call(Method::PATCH, &format!("{collection}/{}", segment(name)?), &[], Some(body)).await
    }

    /// Replaces members of an object of a collection.
    ///
    /// # Errors
    /// As of every request; not found, or refused. The operation may fail later.
    pub async fn put(
        &self,
        collection: &str,
        name: &str,
        body: &(impl Serialize + ?Sized),
    ) -> Result<Operation, ClientError> {
        self.call(Method::PUT, &format!("{collection}/{}", segment(name)?), &[], Some(body)).await
    }

    /// Removes an object of a collection.
    ///
    /// # Errors
    /// As of every request; not found, in use, or protected. The operation may fail later.
    pub async fn remove(&self, collection: &str, name: &str, force: bool) -> Result<Operation, ClientError> {
        let path = format!("{collection}/{}", segment(name)?);
        self.call(Method::DELETE, &path, &[], Some(&Delete { force })).await
    }

    /// Removes one version of an object of a collection.
    ///
    /// # Errors
    /// As of every request; not found, in use, or the only one. The operation may fail later.
    pub async fn remove_version(
        &self,
        collection: &str,
        name: &str,
        version: u32,
        force: bool,
    ) -> Result<Operation, ClientError> {
        let path = format!("{collection}/{}/{version}", segment(name)?);
        self.call(Method::DELETE, &path, &[], Some(&Delete { force })).await
    }

    /// Makes an object of a collection (`POST`), or a new version of one (`PATCH`), of a file. The file is read twice:
    /// once for its fingerprint, once to be sent; it is never in memory as a whole.
    ///
    /// # Errors
    /// The file cannot be read; or as of every request. The operation may fail later.
    pub async fn send_file(
        &self,
        method: Method,
        path: &str,
        request: Option<&(impl Serialize + ?Sized)>,
        file: &Path,
    ) -> Result<Operation, ClientError> {
        let mut headers = self.headers.clone();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        let digest = digest(file).await?;
        headers.insert(FINGERPRINT, HeaderValue::try_from(digest).expect("hexadecimal digits are allowed"));
        let request = match request {
            Some(request) => serde_json::to_string(request).unwrap_or_default(),
            None => String::new(),
        };
        let request = HeaderValue::try_from(request).map_err(|_| ClientError::Address {
            url: path.into(),
            reason: "names have characters of A-Z a-z 0-9 - _ : . only".into(),
        })?;
        headers.insert(REQUEST, request);
        decode(self.endpoint.upload_file(method, path, headers, file).await?)
    }

    /// Adds an image from a file.
    ///
    /// # Errors
    /// As of [`Self::send_file`]; the name is taken.
    pub async fn upload_image(&self, request: &ImagesPost, file: &Path) -> Result<Operation, ClientError> {
        self.send_file(Method::POST, "/1.0/images", Some(request), file).await
    }

    /// Adds a version to an object of a collection from a file.
    ///
    /// # Errors
    /// As of [`Self::send_file`]; not found.
    pub async fn update_with_file(
        &self,
        collection: &str,
        name: &str,
        file: &Path,
    ) -> Result<Operation, ClientError> {
        let path = format!("{collection}/{}", segment(name)?);
        self.send_file(Method::PATCH, &path, None::<&()>, file).await
    }

    /// Adds a version to an image from a file.
    ///
    /// # Errors
    /// As of [`Self::send_file`]; not found.
    pub async fn update_image(&self, name: &str, file: &Path) -> Result<Operation, ClientError> {
        let path = format!("/1.0/images/{}", segment(name)?);
        self.send_file(Method::PATCH, &path, Some(&ImagePatch::default()), file).await
    }

    /// Adds an image from the image server, or of an instance.
    ///
    /// # Errors
    /// As of every request; the name is taken. The operation may fail later.
    pub async fn import_image(&self, request: &ImagesPost) -> Result<Operation, ClientError> {
        self.create("/1.0/images", request).await
    }

    /// Makes an image the default, or looks for a newer release of it.
    ///
    /// # Errors
    /// As of every request; not found. The operation may fail later.
    pub async fn patch_image(&self, name: &str, patch: &ImagePatch) -> Result<Operation, ClientError> {
        self.patch("/1.0/images", name, patch).await
    }

    /// Adds a machine.
    ///
    /// # Errors
    /// As of every request; the name is taken. The operation may fail later.
    pub async fn add_node(&self, request: &NodesPost) -> Result<Operation, ClientError> {
        self.create("/1.0/nodes", request).await
    }

    /// Changes settings of a machine.
    ///
    /// # Errors
    /// As of every request; not found. The operation may fail later.
    pub async fn update_node(&self, name: &str, patch: &NodePatch) -> Result<Operation, ClientError> {
        self.patch("/1.0/nodes", name, patch).await
    }

    /// Removes a machine.
    ///
    /// # Errors
    /// As of every request; not found, or instances are there. The operation may fail later.
    pub async fn remove_node(&self, name: &str, request: &NodeDelete) -> Result<Operation, ClientError> {
        let path = format!("/1.0/nodes/{}", segment(name)?);
        self.call(Method::DELETE, &path, &[], Some(request)).await
    }

    /// The settings of AMS; secrets come as whether there is one.
    ///
    /// # Errors
    /// As of every request.
    pub async fn config(&self) -> Result<BTreeMap<String, Value>, ClientError> {
        #[derive(serde::Deserialize)]
        struct Items {
            #[serde(default)]
            config: BTreeMap<String, Value>,
        }
        self.get::<Items>("/1.0/config", &[]).await.map(|items| items.config)
    }

    /// Changes one setting of AMS; an empty value is the default.
    ///
    /// # Errors
    /// As of every request; the key is unknown, or the value is no good. The operation may fail later.
    pub async fn set_config(&self, name: &str, value: &str) -> Result<Operation, ClientError> {
        let body = BTreeMap::from([("name", name), ("value", value)]);
        self.call(Method::PATCH, "/1.0/config", &[], Some(&body)).await
    }

    /// Looks whether newer images or addons are there for an application, and makes a version of them.
    ///
    /// # Errors
    /// As of every request; not found. The operation may fail later.
    pub async fn refresh_application(&self, name: &str) -> Result<Operation, ClientError> {
        self.patch("/1.0/applications", name, &BTreeMap::<String, Value>::new()).await
    }

    /// The manifest of one version, as it was written.
    ///
    /// # Errors
    /// As of every request; not found.
    pub async fn version_manifest(&self, name: &str, version: u32) -> Result<Bytes, ClientError> {
        self.read(&format!("/1.0/applications/{}/{version}/manifest", segment(name)?)).await
    }

    /// Writes the package of one version into `sink`, and returns whether its fingerprint is the one that the server
    /// stated; a server that states none is believed.
    ///
    /// # Errors
    /// As of every request; not found; or `sink` takes no more.
    pub async fn export_application(
        &self,
        name: &str,
        version: u32,
        sink: &mut (dyn AsyncWrite + Send + Unpin),
    ) -> Result<bool, ClientError> {
        let path = format!("/1.0/applications/{}/{version}", segment(name)?);
        let (headers, digest) = self.endpoint.download(&path, self.headers.clone(), sink).await?;
        Ok(headers.get(FINGERPRINT).is_none_or(|stated| stated.as_bytes() == digest.as_bytes()))
    }

    /// Writes a package of another unit of AMS into `sink`, for units alone; and returns whether it has the fingerprint
    /// that was stated. `package`: what follows `/internal/1.0/packages/`.
    ///
    /// # Errors
    /// As of every request; it does not lie there; or `sink` takes no more.
    pub async fn unit_package(
        &self,
        package: &str,
        sink: &mut (dyn AsyncWrite + Send + Unpin),
    ) -> Result<bool, ClientError> {
        let path = format!("/internal/1.0/packages/{package}");
        let (headers, digest) = self.endpoint.download(&path, self.headers.clone(), sink).await?;
        Ok(headers.get(FINGERPRINT).is_some_and(|stated| stated.as_bytes() == digest.as_bytes()))
    }

    /// Removes instances, one after the other; stops at the first that cannot be.
    ///
    /// # Errors
    /// As of every request; one is not found, or protected. The operation may fail later.
    pub async fn delete_instances(&self, ids: Vec<String>, force: bool) -> Result<Operation, ClientError> {
        self.call(Method::DELETE, "/1.0/instances", &[], Some(&DeleteMany { ids, force })).await
    }

    /// Protects an instance from being removed, or protects it no longer.
    ///
    /// # Errors
    /// As of every request; not found. The operation may fail later.
    pub async fn protect_instance(&self, name: &str, protected: bool) -> Result<Operation, ClientError> {
        let security = Some(SecurityPatch { delete_protected: Some(protected) });
        let patch =
            InstancePatch { config: Some(InstanceConfigPatch { security }), ..InstancePatch::default() };
        self.patch("/1.0/instances", name, &patch).await
    }

    /// Runs a program in an instance; see [`Exec`].
    ///
    /// # Errors
    /// As of every request; not found, or it does not run.
    pub async fn exec(&self, instance: &str, request: &ExecPost) -> Result<Exec, ClientError> {
        let path = format!("/1.0/instances/{}/exec", segment(instance)?);
        let operation: Operation = self.call(Method::POST, &path, &[], Some(request)).await?;
        Exec::connect(&self.endpoint, operation, request.interactive).await
    }

    /// Asks for the end of an operation.
    ///
    /// # Errors
    /// As of every request; not found, or it cannot be cancelled.
    pub async fn cancel(&self, id: &OperationId) -> Result<(), ClientError> {
        let path = format!("/1.0/operations/{id}");
        let answer: Result<Value, _> = self.call(Method::DELETE, &path, &[], None::<&()>).await;
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
        Events::follow(self.endpoint.clone(), "/1.0/events".into(), self.headers.clone())
    }

    /// The events of these kinds from now on (`operation`, `lifecycle`, `logging`); of all kinds where none is named.
    pub fn events_of(&self, kinds: &[String]) -> Events {
        let path = match kinds {
            [] => "/1.0/events".to_owned(),
            kinds => format!("/1.0/events?type={}", kinds.join(",")),
        };
        Events::follow(self.endpoint.clone(), path, self.headers.clone())
    }
}

/// SHA-256 of a file, hex.
async fn digest(file: &Path) -> Result<String, ClientError> {
    let unreadable = |error: std::io::Error| ClientError::File {
        what: "file",
        path: file.into(),
        reason: error.to_string(),
    };
    let mut reader = tokio::fs::File::open(file).await.map_err(unreadable)?;
    let mut digest = Sha256::new();
    let mut buffer = vec![0; 256 * 1024];
    loop {
        let read = reader.read(&mut buffer).await.map_err(unreadable)?;
        if read == 0 {
            return Ok(hex::encode(digest.finalize()));
        }
        digest.update(&buffer[..read]);
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
