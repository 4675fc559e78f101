//! The HTTP/1.1 server of every program: TLS, plain TCP or a unix socket, bounded in connections and time, ended
//! gracefully, and never answering anything but the program's envelope when something is wrong.
//!
//! Handlers return [`ApiError`]; the server writes the envelope that the program's [`Envelope`] makes of it, and
//! one log line. The same happens to panics, unknown paths and methods, and whatever a library refuses. Paths
//! are served in every spelling: doubled and trailing slashes count as one and none, without a redirect.

mod edge;
mod extract;

use std::{
    io,
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use http::{Method, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::ServerConfig;
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::Semaphore,
};
use tokio_rustls::TlsAcceptor;

use crate::Shutdown;

pub use edge::Edge;
pub use extract::{Json, OptionalJson, Query};

/// Writes the errors of a program, and hears of every request.
pub trait Envelope: Send + Sync + 'static {
    /// The body of an error answer.
    fn error_body(&self, error: &PublicError<'_>) -> Value;

    /// A request begins.
    fn started(&self) {}

    /// A request was answered.
    fn finished(&self, _request: &Finished<'_>) {}
}

/// What a caller learns of an error.
#[derive(Clone, Copy, Debug)]
pub struct PublicError<'a> {
    /// HTTP status.
    pub status: StatusCode,
    /// Stable, lower case with dashes.
    pub code: &'a str,
    /// For people.
    pub text: &'a str,
    /// The id under which the request was logged.
    pub request_id: &'a str,
    /// More for programs.
    pub reasons: Option<&'a Value>,
}

/// A request that was answered, for metrics.
#[derive(Clone, Copy, Debug)]
pub struct Finished<'a> {
    /// Method.
    pub method: &'a Method,
    /// The route as declared, e.g. `/1.0/sessions/{id}`; none when no route matched.
    pub route: Option<&'a str>,
    /// The path as it was sent.
    pub path: &'a str,
    /// Header `Host`.
    pub host: &'a str,
    /// Status of the answer.
    pub status: StatusCode,
    /// From the request's header to the answer's.
    pub duration: Duration,
    /// Bytes of the request's body, as announced.
    pub request_bytes: u64,
    /// Bytes of the answer's body, where known.
    pub response_bytes: u64,
}

/// Errors in the gateway's envelope, which agents use too.
#[derive(Clone, Copy, Debug, Default)]
pub struct GatewayStyle;

impl Envelope for GatewayStyle {
    fn error_body(&self, error: &PublicError<'_>) -> Value {
        let detail = fanlight_api::envelope::ErrorDetail {
            code: error.code.to_owned(),
            request_id: error.request_id.to_owned(),
            reasons: error.reasons.cloned(),
        };
        let envelope =
            fanlight_api::envelope::GatewayEnvelope::failure(error.status.as_u16(), error.text, &detail);
        serde_json::to_value(envelope).expect("texts and numbers always serialise")
    }
}

/// Who sent a request; in the request's extensions.
#[derive(Clone, Debug, Default)]
pub struct Peer {
    /// Address of the TCP peer.
    pub address: Option<SocketAddr>,
    /// Whether the connection is encrypted.
    pub tls: bool,
    /// The client's certificate (DER) whose key it holds. Nothing else about it was checked.
    pub certificate: Option<Arc<[u8]>>,
    /// Of the peer on a unix socket.
    pub credentials: Option<PeerCred>,
}

impl Peer {
    /// Fingerprint of the client's certificate.
    pub fn fingerprint(&self) -> Option<String> {
        self.certificate.as_deref().map(crate::tls::fingerprint)
    }
}

/// The process at the other end of a unix socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerCred {
    /// Its user.
    pub uid: u32,
    /// Its process id.
    pub pid: Option<i32>,
}

/// Id of a request; in the request's extensions, the answer's header `x-request-id` and the log.
#[derive(Clone, Debug)]
pub struct RequestId(pub Arc<str>);

/// The path as it was sent, before doubled and trailing slashes were taken out; in the request's extensions.
#[derive(Clone, Debug)]
pub struct SentPath(pub Arc<str>);

/// Bounds of a listener.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at a time; more wait in the kernel's queue. Upgraded websockets are not counted.
    pub connections: usize,
    /// For the TLS handshake, and for the header of a request, also while a kept connection is idle.
    pub header_time: Duration,
    /// Bytes of a request's body, where a route does not set its own limit.
    pub body_bytes: usize,
    /// How long requests may go on after the end was asked for.
    pub grace: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 4096,
            header_time: Duration::from_secs(30),
            body_bytes: 1024 * 1024,
            grace: Duration::from_secs(5),
        }
    }
}

/// A bound socket and how to speak on it.
#[derive(Debug)]
pub enum Binding {
    /// HTTP.
    Tcp(std::net::TcpListener),
    /// HTTPS.
    Tls(std::net::TcpListener, Arc<ServerConfig>),
    /// HTTP on a unix socket, made by [`bind_unix`].
    Unix(std::os::unix::net::UnixListener),
}

/// A socket could not be bound or used.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// TCP.
    #[error("listening on {address}{}", hint(source))]
    Tcp {
        /// Where.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Unix.
    #[error("listening on the socket {}{}", path.display(), hint(source))]
    Unix {
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The bound socket could not be handed to the runtime.
    #[error("using a bound socket")]
    Use(#[source] io::Error),
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => ": another process uses it; stop that one or choose another address",
        io::ErrorKind::PermissionDenied => ": not permitted for this user",
        io::ErrorKind::AddrNotAvailable => ": this machine has no such address",
        _ => "",
    }
}

/// Binds a TCP listener.
///
/// # Errors
/// Says which address, and what to do when it is in use.
pub fn bind_tcp(address: SocketAddr) -> Result<std::net::TcpListener, BindError> {
    std::net::TcpListener::bind(address).map_err(|source| BindError::Tcp { address, source })
}

/// Binds a unix socket with the mode given (0600 or 0660). A socket left over by a dead process is replaced; one
/// that somebody answers on is not.
///
/// # Errors
/// The socket is in use, or the file cannot be made.
pub fn bind_unix(path: &Path, mode: u32) -> Result<std::os::unix::net::UnixListener, BindError> {
    let fail = |source| BindError::Unix { path: path.to_owned(), source };
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(fail(io::ErrorKind::AddrInUse.into()));
    }
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder).map_err(fail)?;
    }
    // Bound under another name and renamed, so that the socket is never there with a wider mode.
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}", std::process::id()));
    let temporary = path.with_file_name(name);
    let _ = std::fs::remove_file(&temporary);
    let bind = || {
        let listener = std::os::unix::net::UnixListener::bind(&temporary)?;
        std::fs::set_permissions(&temporary, std::fs::Permissions::from_mode(mode))?;
        std::fs::rename(&temporary, path)?;
        Ok(listener)
    };
    bind().map_err(|source| {
        let _ = std::fs::remove_file(&temporary);
        fail(source)
    })
}

/// Serves an application on a bound socket until `shutdown` ends. Returns the address of a TCP socket.
///
/// # Errors
/// The socket cannot be handed to the runtime.
pub fn serve(
    binding: Binding,
    edge: Arc<Edge>,
    limits: Limits,
    shutdown: &Shutdown,
) -> Result<Option<SocketAddr>, BindError> {
    let server = Server {
        edge,
        limits,
        permits: Arc::new(Semaphore::new(limits.connections.max(1))),
        shutdown: shutdown.clone(),
    };
    match binding {
        Binding::Tcp(listener) => {
            let (listener, address) = tcp(listener)?;
            shutdown.spawn("http", server.accept_tcp(listener, None));
            Ok(Some(address))
        }
        Binding::Tls(listener, config) => {
            let (listener, address) = tcp(listener)?;
            shutdown.spawn("https", server.accept_tcp(listener, Some(TlsAcceptor::from(config))));
            Ok(Some(address))
        }
        Binding::Unix(listener) => {
            listener.set_nonblocking(true).map_err(BindError::Use)?;
            let listener = tokio::net::UnixListener::from_std(listener).map_err(BindError::Use)?;
            shutdown.spawn("unix socket", server.accept_unix(listener));
            Ok(None)
        }
    }
}

fn tcp(listener: std::net::TcpListener) -> Result<(tokio::net::TcpListener, SocketAddr), BindError> {
    listener.set_nonblocking(true).map_err(BindError::Use)?;
    let address = listener.local_addr().map_err(BindError::Use)?;
    Ok((tokio::net::TcpListener::from_std(listener).map_err(BindError::Use)?, address))
}

#[derive(Clone)]
struct Server {
    edge: Arc<Edge>,
    limits: Limits,
    permits: Arc<Semaphore>,
    shutdown: Shutdown,
}

impl Server {
    async fn accept_tcp(self, listener: tokio::net::TcpListener, tls: Option<TlsAcceptor>) {
        while let Some((permit, (stream, address))) = self.next(|| listener.accept()).await {
            // Answers and signalling frames are small and should not wait for more.
            let _ = stream.set_nodelay(true);
            let (server, tls) = (self.clone(), tls.clone());
            self.shutdown.spawn("connection", async move {
                let mut peer = Peer { address: Some(address), ..Peer::default() };
                match tls {
                    None => server.converse(stream, peer, permit).await,
                    Some(tls) => {
                        let handshake = tokio::time::timeout(server.limits.header_time, tls.accept(stream));
                        let stream = tokio::select! {
                            done = handshake => match done {
                                Ok(Ok(stream)) => stream,
                                Ok(Err(error)) => return tracing::debug!("TLS handshake failed: {error}"),
                                Err(_) => return tracing::debug!("TLS handshake took too long"),
                            },
                            () = server.shutdown.stopping() => return,
                        };
                        peer.tls = true;
                        let chain = stream.get_ref().1.peer_certificates();
                        peer.certificate =
                            chain.and_then(|chain| chain.first()).map(|leaf| leaf.as_ref().into());
                        server.converse(stream, peer, permit).await;
                    }
                }
            });
        }
    }

    async fn accept_unix(self, listener: tokio::net::UnixListener) {
        while let Some((permit, (stream, _))) = self.next(|| listener.accept()).await {
            let credentials =
                stream.peer_cred().ok().map(|peer| PeerCred { uid: peer.uid(), pid: peer.pid() });
            let server = self.clone();
            self.shutdown.spawn("connection", async move {
                server.converse(stream, Peer { credentials, ..Peer::default() }, permit).await;
            });
        }
    }

    /// The next connection and its permit; none when the end was asked for.
    async fn next<T, F>(&self, accept: impl Fn() -> F) -> Option<(tokio::sync::OwnedSemaphorePermit, T)>
    where
        F: Future<Output = io::Result<T>>,
    {
        loop {
            let permit = tokio::select! {
                permit = self.permits.clone().acquire_owned() => permit.ok()?,
                () = self.shutdown.stopping() => return None,
            };
            tokio::select! {
                accepted = accept() => match accepted {
                    Ok(accepted) => return Some((permit, accepted)),
                    Err(error) => {
                        // Most likely no file descriptor is free: a pause lets others end.
                        tracing::warn!("accepting a connection failed: {error}");
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                },
                () = self.shutdown.stopping() => return None,
            }
        }
    }

    async fn converse<S>(self, stream: S, peer: Peer, permit: tokio::sync::OwnedSemaphorePermit)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let edge = self.edge.clone();
        let service = hyper::service::service_fn(move |request: http::Request<hyper::body::Incoming>| {
            let (edge, peer) = (edge.clone(), peer.clone());
            async move {
                Ok::<_, std::convert::Infallible>(edge.call(request.map(axum::body::Body::new), peer).await)
            }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.limits.header_time)
            .max_buf_size(64 * 1024)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        let mut connection = std::pin::pin!(connection);
        tokio::select! {
            done = connection.as_mut() => {
                if let Err(error) = done {
                    tracing::debug!("connection ended: {error}");
                }
            }
            () = self.shutdown.stopping() => {
                connection.as_mut().graceful_shutdown();
                let _ = tokio::time::timeout(self.limits.grace, connection).await;
            }
        }
        drop(permit);
    }
}
