//! Where a server is, and the way there: HTTPS, plain HTTP, or a unix socket; requests and websockets alike.

use std::{
    fmt,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode};
use reqwest::{Client, Url};
use rustls::{ClientConfig, pki_types::ServerName};
use serde::Serialize;
use sha2::{Digest, Sha256};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::{TcpStream, UnixStream},
};
use tokio_rustls::TlsConnector;
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{client::IntoClientRequest, protocol::WebSocketConfig},
};
use tokio_util::io::ReaderStream;

use crate::{
    ClientError,
    tls::{Identity, Trust, client_config},
};

/// As long as the clients of the original wait (ams-api section 1.3).
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Whole transfers of packages and exports.
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(300);
/// Whole transfers of files that may be gigabytes, such as images.
const FILE_TIMEOUT: Duration = Duration::from_secs(3600);
/// Largest frame of a websocket that is taken, bytes.
const MAX_FRAME_BYTES: usize = 4 * 1024 * 1024;

/// How much of a file is read at once.
const FILE_CHUNK_BYTES: usize = 256 * 1024;

/// A websocket to a server.
pub type WebSocket = WebSocketStream<Stream>;

/// A server and how it is reached; clones share connections.
#[derive(Clone)]
pub struct Endpoint {
    base: Url,
    way: Way,
    tls: Option<Arc<ClientConfig>>,
    client: Client,
}

#[derive(Clone)]
enum Way {
    Tcp,
    Unix(PathBuf),
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Endpoint").field(&self.name()).finish()
    }
}

/// An answer as it came.
pub(crate) struct Answer {
    pub status: StatusCode,
    pub body: Bytes,
    pub about: About,
}

/// Which request it was, for errors.
#[derive(Clone)]
pub(crate) struct About {
    pub method: Method,
    pub path: String,
    pub server: String,
}

impl Endpoint {
    /// A server at an `https://` or `http://` address.
    ///
    /// # Errors
    /// The address or a file is wrong.
    pub fn http(url: &str, trust: &Trust, identity: Option<&Identity>) -> Result<Self, ClientError> {
        let invalid = |reason: &str| ClientError::Address { url: url.into(), reason: reason.into() };
        let base = Url::parse(url).map_err(|error| invalid(&error.to_string()))?;
        if !matches!(base.scheme(), "http" | "https") {
            return Err(invalid("expected https://HOST:PORT or http://HOST:PORT"));
        }
        if base.host_str().is_none_or(str::is_empty) {
            return Err(invalid("there is no host in it"));
        }
        if !base.username().is_empty() || base.password().is_some() {
            return Err(invalid("credentials do not belong into it"));
        }
        let tls = match base.scheme() {
            "https" => Some(Arc::new(client_config(trust, identity)?)),
            _ => None,
        };
        Self::new(base, Way::Tcp, tls)
    }

    /// A server behind a unix socket, plain HTTP.
    ///
    /// # Errors
    /// The HTTP library cannot be set up.
    pub fn unix(path: impl Into<PathBuf>) -> Result<Self, ClientError> {
        let base = Url::parse("http://unix/").expect("a valid address");
        Self::new(base, Way::Unix(path.into()), None)
    }

    fn new(base: Url, way: Way, tls: Option<Arc<ClientConfig>>) -> Result<Self, ClientError> {
        // Proxies of the environment are for the web, not for the parts of one system; redirects would lose
        // bodies.
        let mut builder = Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .pool_idle_timeout(Duration::from_secs(20));
        if let Way::Unix(path) = &way {
            // A connection for each request, which costs little here. A pool also opens some that it then has no request
            // for, and they stay silent: LXD takes no other connection of its socket until such a one has spoken.
            builder = builder.unix_socket(path.clone()).pool_max_idle_per_host(0);
        }
        // Plain HTTP as well: the library would otherwise look for authorities of the system.
        let config = match &tls {
            Some(tls) => ClientConfig::clone(tls),
            None => client_config(&Trust::Pinned("0".repeat(64)), None)?,
        };
        let client = builder
            .tls_backend_preconfigured(config)
            .build()
            .map_err(|error| ClientError::Address { url: base.to_string(), reason: error.to_string() })?;
        Ok(Self { base, way, tls, client })
    }

    /// The address, for logs.
    pub fn name(&self) -> String {
        match &self.way {
            Way::Tcp => self.base.origin().ascii_serialization(),
            Way::Unix(path) => format!("unix:{}", path.display()),
        }
    }

    fn url(&self, path: &str, query: &[(&str, String)]) -> Result<Url, ClientError> {
        let mut url = self
            .base
            .join(path)
            .map_err(|error| ClientError::Address { url: path.into(), reason: error.to_string() })?;
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        Ok(url)
    }

    /// A request with a JSON body, or none.
    pub(crate) async fn json<B: Serialize + ?Sized>(
        &self,
        method: Method,
        path: &str,
        query: &[(&str, String)],
        headers: HeaderMap,
        body: Option<&B>,
    ) -> Result<Answer, ClientError> {
        let mut request = self.client.request(method.clone(), self.url(path, query)?).headers(headers);
        if let Some(body) = body {
            request = request.json(body);
        }
        self.send(method, path, request, REQUEST_TIMEOUT).await
    }

    /// A request with bytes as its body.
    pub(crate) async fn upload(
        &self,
        method: Method,
        path: &str,
        query: &[(&str, String)],
        headers: HeaderMap,
        body: Bytes,
    ) -> Result<Answer, ClientError> {
        let request = self.client.request(method.clone(), self.url(path, query)?).headers(headers).body(body);
        self.send(method, path, request, TRANSFER_TIMEOUT).await
    }

    /// A request with a file as its body, which is read while it is sent.
    pub(crate) async fn upload_file(
        &self,
        method: Method,
        path: &str,
        headers: HeaderMap,
        file: &Path,
    ) -> Result<Answer, ClientError> {
        let opened = tokio::fs::File::open(file).await.map_err(|error| ClientError::File {
            what: "file",
            path: file.into(),
            reason: error.to_string(),
        })?;
        let body = reqwest::Body::wrap_stream(ReaderStream::with_capacity(opened, FILE_CHUNK_BYTES));
        let request = self.client.request(method.clone(), self.url(path, &[])?).headers(headers).body(body);
        self.send(method, path, request, FILE_TIMEOUT).await
    }

    /// Writes the body of an answer into `sink` as it comes. Returns its headers and the SHA-256 of the body, hex.
    pub(crate) async fn download(
        &self,
        path: &str,
        headers: HeaderMap,
        sink: &mut (dyn AsyncWrite + Send + Unpin),
    ) -> Result<(HeaderMap, String), ClientError> {
        let about = About { method: Method::GET, path: path.into(), server: self.name() };
        let request = self.client.get(self.url(path, &[])?).headers(headers).timeout(FILE_TIMEOUT);
        let failed = |error| about.failed(error, FILE_TIMEOUT);
        let mut response = request.send().await.map_err(failed)?;
        if response.status() != StatusCode::OK {
            let status = response.status();
            let body = response.bytes().await.map_err(failed)?;
            return Err(about.refused(status, &body));
        }
        let mut digest = Sha256::new();
        while let Some(chunk) = response.chunk().await.map_err(failed)? {
            digest.update(&chunk);
            sink.write_all(&chunk).await.map_err(|error| about.unwritten(error))?;
        }
        sink.flush().await.map_err(|error| about.unwritten(error))?;
        Ok((std::mem::take(response.headers_mut()), hex::encode(digest.finalize())))
    }

    /// The certificate that a server shows, as DER, whoever it is: for a person to decide whether to trust it.
    ///
    /// # Errors
    /// The address is not one of HTTPS, or the server cannot be reached.
    pub async fn certificate_of(url: &str) -> Result<Vec<u8>, ClientError> {
        let seen = Arc::new(Mutex::new(None));
        let config = crate::tls::config_that_looks(seen.clone())?;
        let base = Url::parse(url)
            .map_err(|error| ClientError::Address { url: url.into(), reason: error.to_string() })?;
        if base.scheme() != "https" {
            return Err(ClientError::Address {
                url: url.into(),
                reason: "expected https://HOST:PORT".into(),
            });
        }
        let endpoint = Self::new(base, Way::Tcp, Some(Arc::new(config)))?;
        let about = About { method: Method::GET, path: "/".into(), server: endpoint.name() };
        let connected = tokio::time::timeout(CONNECT_TIMEOUT, endpoint.connect(&about)).await;
        let result = connected.map_err(|_| ClientError::TimedOut {
            method: about.method(),
            path: about.path.clone(),
            server: about.server.clone(),
            timeout: CONNECT_TIMEOUT,
        })?;
        // The certificate may have come although the connection failed afterwards; then that is what matters.
        let certificate = seen.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
        match (certificate, result) {
            (Some(certificate), Ok(_)) => Ok(certificate),
            (_, Err(error)) => Err(error),
            (None, Ok(_)) => Err(about.unreachable("the server showed no certificate")),
        }
    }

    /// A request as it is, and the answer as it comes: for what the typed clients do not have.
    ///
    /// # Errors
    /// The server cannot be reached or does not answer; a refusal is an answer.
    pub async fn raw(
        &self,
        method: Method,
        path: &str,
        body: Option<&serde_json::Value>,
    ) -> Result<(StatusCode, Bytes), ClientError> {
        let answer = self.json(method, path, &[], HeaderMap::new(), body).await?;
        Ok((answer.status, answer.body))
    }

    /// A request to fill in and send, for typed clients of servers that this crate does not know. It has no bound on
    /// its time but that for connecting.
    ///
    /// # Errors
    /// The path is wrong.
    pub fn request(
        &self,
        method: Method,
        path: &str,
        query: &[(&str, String)],
    ) -> Result<reqwest::RequestBuilder, ClientError> {
        Ok(self.client.request(method, self.url(path, query)?))
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        request: reqwest::RequestBuilder,
        timeout: Duration,
    ) -> Result<Answer, ClientError> {
        let about = About { method, path: path.into(), server: self.name() };
        let exchange = async {
            let response = request.timeout(timeout).send().await?;
            Ok((response.status(), response.bytes().await?))
        };
        match exchange.await {
            Ok((status, body)) => Ok(Answer { status, body, about }),
            Err(error) => Err(about.failed(error, timeout)),
        }
    }

    /// Opens a websocket.
    ///
    /// # Errors
    /// The server cannot be reached, or does not open it; a refusal carries its status and text.
    pub async fn websocket(&self, path: &str, headers: HeaderMap) -> Result<WebSocket, ClientError> {
        self.websocket_with(path, &[], headers).await
    }

    /// Opens a websocket with a query, which stays out of errors: it may be a secret.
    ///
    /// # Errors
    /// As [`Endpoint::websocket`].
    pub async fn websocket_with(
        &self,
        path: &str,
        query: &[(&str, String)],
        headers: HeaderMap,
    ) -> Result<WebSocket, ClientError> {
        let about = About { method: Method::GET, path: path.into(), server: self.name() };
        match tokio::time::timeout(CONNECT_TIMEOUT, self.open(path, query, headers, &about)).await {
            Ok(result) => result,
            Err(_) => Err(ClientError::TimedOut {
                method: about.method(),
                path: about.path,
                server: about.server,
                timeout: CONNECT_TIMEOUT,
            }),
        }
    }

    async fn open(
        &self,
        path: &str,
        query: &[(&str, String)],
        headers: HeaderMap,
        about: &About,
    ) -> Result<WebSocket, ClientError> {
        let mut url = self.url(path, query)?;
        let scheme = if self.tls.is_some() { "wss" } else { "ws" };
        url.set_scheme(scheme).map_err(|()| ClientError::Address {
            url: url.to_string(),
            reason: "not a web address".into(),
        })?;
        let mut request = url.as_str().into_client_request().map_err(|error| about.unreachable(error))?;
        request.headers_mut().extend(headers);
        let stream = self.connect(about).await?;
        let config = WebSocketConfig::default()
            .max_message_size(Some(MAX_FRAME_BYTES))
            .max_frame_size(Some(MAX_FRAME_BYTES));
        match tokio_tungstenite::client_async_with_config(request, stream, Some(config)).await {
            Ok((socket, _)) => Ok(socket),
            Err(tokio_tungstenite::tungstenite::Error::Http(response)) => {
                let status = response.status();
                let body = response.into_body().unwrap_or_default();
                Err(about.refused(status, &body))
            }
            Err(error) => Err(about.unreachable(error)),
        }
    }

    async fn connect(&self, about: &About) -> Result<Stream, ClientError> {
        if let Way::Unix(path) = &self.way {
            let socket = UnixStream::connect(path).await.map_err(|error| about.unreachable(error))?;
            return Ok(Stream(Box::pin(socket)));
        }
        let port = self.base.port_or_known_default().unwrap_or(443);
        // Brackets of IPv6 addresses belong to addresses of the web only.
        let host = self.base.host_str().unwrap_or_default().trim_matches(['[', ']']).to_owned();
        let socket =
            TcpStream::connect((host.as_str(), port)).await.map_err(|error| about.unreachable(error))?;
        // Signalling frames are small and wanted at once.
        socket.set_nodelay(true).map_err(|error| about.unreachable(error))?;
        let Some(tls) = &self.tls else { return Ok(Stream(Box::pin(socket))) };
        let name = ServerName::try_from(host).map_err(|error| about.unreachable(error))?;
        let socket = TlsConnector::from(tls.clone())
            .connect(name, socket)
            .await
            .map_err(|error| about.unreachable(error))?;
        Ok(Stream(Box::pin(socket)))
    }
}

impl About {
    /// The method as a constant, which keeps errors small.
    fn method(&self) -> &'static str {
        match self.method {
            Method::GET => "GET",
            Method::POST => "POST",
            Method::PUT => "PUT",
            Method::PATCH => "PATCH",
            Method::DELETE => "DELETE",
            _ => "request",
        }
    }

    fn unreachable(&self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ClientError {
        ClientError::Unreachable {
            method: self.method(),
            path: self.path.clone(),
            server: self.server.clone(),
            source: source.into(),
        }
    }

    fn failed(&self, error: reqwest::Error, timeout: Duration) -> ClientError {
        if error.is_timeout() && !error.is_connect() {
            return ClientError::TimedOut {
                method: self.method(),
                path: self.path.clone(),
                server: self.server.clone(),
                timeout,
            };
        }
        // Without the address, which may carry a token and is in our own text anyway.
        self.unreachable(error.without_url())
    }

    fn unwritten(&self, error: std::io::Error) -> ClientError {
        self.unreadable(StatusCode::OK, format!("it cannot be written: {error}"))
    }

    /// The refusal in an answer, in either envelope or without one.
    pub fn refused(&self, status: StatusCode, body: &[u8]) -> ClientError {
        #[derive(serde::Deserialize)]
        struct Envelope {
            #[serde(default)]
            error: String,
            #[serde(default)]
            metadata: Option<serde_json::Value>,
        }
        let envelope: Option<Envelope> = serde_json::from_slice(body).ok();
        let (text, metadata) = match envelope {
            Some(envelope) => (envelope.error, envelope.metadata.unwrap_or_default()),
            None => (String::new(), serde_json::Value::Null),
        };
        let detail =
            |name: &str| metadata.get(name).and_then(|value| value.as_str()).unwrap_or_default().to_owned();
        let text =
            if text.is_empty() { status.canonical_reason().unwrap_or("refused").to_owned() } else { text };
        ClientError::Refused {
            method: self.method(),
            path: self.path.clone(),
            status,
            code: detail("code"),
            text,
            request_id: detail("request_id"),
        }
    }

    /// An answer that cannot be read.
    pub fn unreadable(&self, status: StatusCode, reason: impl fmt::Display) -> ClientError {
        ClientError::Answer {
            method: self.method(),
            path: self.path.clone(),
            server: self.server.clone(),
            status,
            reason: reason.to_string(),
        }
    }
}

/// A connection of any kind.
pub struct Stream(Pin<Box<dyn Connection>>);

trait Connection: AsyncRead + AsyncWrite + Send + Sync {}
impl<T: AsyncRead + AsyncWrite + Send + Sync> Connection for T {}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        self.0.as_mut().poll_read(cx, buffer)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        self.0.as_mut().poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        self.0.as_mut().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        self.0.as_mut().poll_shutdown(cx)
    }
}
