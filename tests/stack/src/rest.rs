//! Plain HTTPS requests and websockets, as any program would make them.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use reqwest::{Certificate, Client, Identity, Method, header::AUTHORIZATION};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{client::IntoClientRequest, protocol::WebSocketConfig},
};

/// A websocket over TLS.
pub type Socket = WebSocketStream<TlsStream<TcpStream>>;

/// An answer as it came.
#[derive(Clone, Debug)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// Body; `Null` when it is no JSON.
    pub body: Value,
    /// Body as text.
    pub text: String,
}

impl Answer {
    /// `metadata` of the envelope.
    pub fn metadata(&self) -> &Value {
        &self.body["metadata"]
    }

    /// `error` of the envelope.
    pub fn error(&self) -> &str {
        self.body["error"].as_str().unwrap_or_default()
    }

    /// The answer, if it has this status.
    ///
    /// # Errors
    /// Another status.
    pub fn expect(self, status: u16) -> Result<Self> {
        ensure!(self.status == status, "status {} instead of {status}: {}", self.status, self.text);
        Ok(self)
    }

    /// The answer, if it is a refusal with this status in the gateway's envelope that says why.
    ///
    /// # Errors
    /// Something else came.
    pub fn refused(self, status: u16) -> Result<Self> {
        let answer = self.expect(status)?;
        let envelope = &answer.body;
        ensure!(
            envelope["type"] == "error" && !answer.error().is_empty(),
            "no error envelope: {}",
            answer.text
        );
        Ok(answer)
    }
}

/// A server and who we are to it.
#[derive(Clone)]
pub struct Server {
    client: Client,
    url: String,
    token: Option<String>,
    tls: Arc<ClientConfig>,
}

impl Server {
    /// A server whose certificate was signed by the authority in a file; with the token of an account, or a client
    /// certificate and its key.
    ///
    /// # Errors
    /// A file cannot be used.
    pub fn new(
        url: &str,
        authority: &Path,
        token: Option<&str>,
        identity: Option<(&Path, &Path)>,
    ) -> Result<Self> {
        // The crates below would each choose another; the first test that comes here settles it.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let read = |path: &Path| std::fs::read(path).with_context(|| format!("reading {}", path.display()));
        let pem = read(authority)?;
        let mut builder = Client::builder()
            .tls_certs_only([Certificate::from_pem(&pem)?])
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .timeout(Duration::from_secs(60));
        if let Some((certificate, key)) = identity {
            let mut both = read(certificate)?;
            both.extend(read(key)?);
            builder = builder.identity(Identity::from_pem(&both)?);
        }
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(&pem).context("reading the authority")?)?;
        let tls =
            ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
                .with_safe_default_protocol_versions()?
                .with_root_certificates(roots)
                .with_no_client_auth();
        let token = token.map(str::to_owned);
        Ok(Self {
            client: builder.build()?,
            url: url.trim_end_matches('/').into(),
            token,
            tls: Arc::new(tls),
        })
    }

    /// The same server for somebody with another token.
    pub fn with_token(&self, token: Option<&str>) -> Self {
        Self { token: token.map(str::to_owned), ..self.clone() }
    }

    /// Where it is, `https://host:port`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// One request.
    ///
    /// # Errors
    /// No answer. A refusal is an answer.
    pub async fn call(&self, method: Method, path: &str, body: Option<Value>) -> Result<Answer> {
        self.send(method, path, body.map(|body| body.to_string().into_bytes())).await
    }

    /// One request with a JSON body as it is.
    ///
    /// # Errors
    /// No answer. A refusal is an answer.
    pub async fn send(&self, method: Method, path: &str, body: Option<Vec<u8>>) -> Result<Answer> {
        self.request(method, path, "application/json", body, None).await
    }

    /// `POST` with an `Idempotency-Key`.
    ///
    /// # Errors
    /// No answer. A refusal is an answer.
    pub async fn post_once(&self, path: &str, body: Value, key: &str) -> Result<Answer> {
        let body = body.to_string().into_bytes();
        self.request(Method::POST, path, "application/json", Some(body), Some(key)).await
    }

    /// `POST` of a file.
    ///
    /// # Errors
    /// No answer. A refusal is an answer.
    pub async fn upload(&self, path: &str, file: Vec<u8>) -> Result<Answer> {
        self.request(Method::POST, path, "application/octet-stream", Some(file), None).await
    }

    async fn request(
        &self,
        method: Method,
        path: &str,
        kind: &str,
        body: Option<Vec<u8>>,
        key: Option<&str>,
    ) -> Result<Answer> {
        let mut request = self.client.request(method.clone(), format!("{}{path}", self.url));
        if let Some(token) = &self.token {
            request = request.header(AUTHORIZATION, format!("macaroon root={token}"));
        }
        if let Some(key) = key {
            request = request.header("Idempotency-Key", key);
        }
        if let Some(body) = body {
            request = request.header("Content-Type", kind).body(body);
        }
        let response = request.send().await.with_context(|| format!("{method} {path}"))?;
        let status = response.status().as_u16();
        let text = response.text().await.with_context(|| format!("{method} {path}: reading the answer"))?;
        Ok(Answer { status, body: serde_json::from_str(&text).unwrap_or_default(), text })
    }

    /// `GET`.
    ///
    /// # Errors
    /// No answer.
    pub async fn get(&self, path: &str) -> Result<Answer> {
        self.call(Method::GET, path, None).await
    }

    /// `POST`.
    ///
    /// # Errors
    /// No answer.
    pub async fn post(&self, path: &str, body: Value) -> Result<Answer> {
        self.call(Method::POST, path, Some(body)).await
    }

    /// `DELETE`.
    ///
    /// # Errors
    /// No answer.
    pub async fn delete(&self, path: &str) -> Result<Answer> {
        self.call(Method::DELETE, path, None).await
    }

    /// Opens a websocket at a full address.
    ///
    /// # Errors
    /// The server cannot be reached.
    pub async fn websocket(&self, url: &str) -> Result<Upgrade> {
        let request = url.into_client_request().with_context(|| "reading the websocket's address")?;
        let host = request.uri().host().context("an address without a host")?.to_owned();
        let port = request.uri().port_u16().context("an address without a port")?;
        let socket =
            TcpStream::connect((host.as_str(), port)).await.context("connecting to the websocket")?;
        let name = ServerName::try_from(host).context("the websocket's host")?;
        let socket = TlsConnector::from(self.tls.clone())
            .connect(name, socket)
            .await
            .context("TLS of the websocket")?;
        let config = WebSocketConfig::default().max_message_size(Some(4 << 20)).max_frame_size(Some(4 << 20));
        match tokio_tungstenite::client_async_with_config(request, socket, Some(config)).await {
            Ok((socket, _)) => Ok(Upgrade::Open(Box::new(socket))),
            Err(tokio_tungstenite::tungstenite::Error::Http(response)) => {
                let status = response.status().as_u16();
                let text =
                    String::from_utf8_lossy(response.body().as_deref().unwrap_or_default()).into_owned();
                Ok(Upgrade::Refused(Answer {
                    status,
                    body: serde_json::from_str(&text).unwrap_or_default(),
                    text,
                }))
            }
            Err(error) => Err(error).context("opening the websocket"),
        }
    }
}

/// What came of asking for a websocket.
pub enum Upgrade {
    /// It is open.
    Open(Box<Socket>),
    /// The server said no.
    Refused(Answer),
}

impl Upgrade {
    /// The open socket.
    ///
    /// # Errors
    /// It was refused.
    pub fn open(self) -> Result<Socket> {
        match self {
            Self::Open(socket) => Ok(*socket),
            Self::Refused(answer) => {
                bail!("the websocket was refused: status {}: {}", answer.status, answer.text)
            }
        }
    }

    /// The refusal.
    ///
    /// # Errors
    /// It was opened.
    pub fn refused(self) -> Result<Answer> {
        match self {
            Self::Open(_) => bail!("the websocket was opened"),
            Self::Refused(answer) => Ok(answer),
        }
    }
}
