//! The clients' signalling sockets: a TLS websocket each, as browsers open them. They send probes, which their
//! instance sends back, and check that each comes back once and in order.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use crate::pace::nanos;
use anyhow::{Context as _, Result};
use futures_util::{SinkExt as _, StreamExt as _};
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio::{
    net::TcpStream,
    sync::{mpsc, oneshot},
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, client::IntoClientRequest, protocol::WebSocketConfig},
};

/// Bytes of a probe: between a candidate and a small offer.
const PROBE_BYTES: usize = 1000;
const OPEN_TIME: Duration = Duration::from_secs(30);
/// The run of the first probe of a socket.
const FIRST: u32 = 0;

/// What all sockets share.
pub struct Sockets {
    tls: TlsConnector,
    address: SocketAddr,
    pub tally: Arc<Tally>,
}

/// What came back.
pub struct Tally {
    /// Times by run.
    runs: Mutex<BTreeMap<u32, Vec<Trip>>>,
    /// Probes that came twice, or not in their order.
    pub disorder: AtomicU64,
    /// Texts of errors that the gateway sent, counted.
    errors: Mutex<BTreeMap<String, usize>>,
}

#[derive(Serialize, Deserialize)]
struct Probe<'a> {
    r#type: &'a str,
    run: u32,
    seq: u64,
    /// When it was due, as [`nanos`].
    at: u64,
    /// When its instance sent it back.
    turned: u64,
    padding: &'a str,
}

/// The way of a frame to its instance and back.
#[derive(Clone, Copy, Debug)]
pub struct Trip {
    /// From when it was due, milliseconds.
    pub up_ms: f64,
    pub down_ms: f64,
}

impl Trip {
    /// From the times of [`nanos`].
    pub fn new(due: u64, turned: u64, back: u64) -> Self {
        let ms = |from: u64, to: u64| to.saturating_sub(from) as f64 / 1e6;
        Self { up_ms: ms(due, turned), down_ms: ms(turned, back) }
    }

    /// Both ways.
    pub fn round_ms(&self) -> f64 {
        self.up_ms + self.down_ms
    }
}

/// A client's socket. Dropping it closes it.
pub struct Client {
    orders: mpsc::UnboundedSender<Order>,
    open: Arc<AtomicBool>,
}

struct Order {
    run: u32,
    due: Instant,
}

impl Tally {
    /// What came back of a run; it is taken out.
    pub fn take(&self, run: u32) -> Vec<Trip> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner).remove(&run).unwrap_or_default()
    }

    /// How many came back of a run.
    pub fn count(&self, run: u32) -> usize {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner).get(&run).map_or(0, Vec::len)
    }

    /// Texts of errors with their counts.
    pub fn errors(&self) -> BTreeMap<String, usize> {
        self.errors.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Sockets {
    /// # Errors
    /// TLS cannot be set up.
    pub fn new(address: SocketAddr, fingerprint: &str) -> Result<Self> {
        let fingerprint = fingerprint.to_owned();
        let provider = Arc::new(aws_lc_rs::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Pinned { fingerprint, provider }))
            .with_no_client_auth();
        // Every client is somebody else: none of them has a ticket of an earlier connection.
        config.resumption = Resumption::disabled();
        let tally = Tally { runs: Mutex::default(), disorder: AtomicU64::new(0), errors: Mutex::default() };
        Ok(Self { tls: TlsConnector::from(Arc::new(config)), address, tally: Arc::new(tally) })
    }

    /// Opens the socket of a URL and sends a first probe. The receiver hears when it came back, which is when both
    /// sides of the session are joined.
    ///
    /// # Errors
    /// The gateway does not open it.
    pub async fn open(&self, url: &str) -> Result<(Client, oneshot::Receiver<()>)> {
        let socket = tokio::time::timeout(OPEN_TIME, self.connect(url)).await;
        let socket = socket.context("the socket does not open")??;
        let (orders, queue) = mpsc::unbounded_channel();
        let (joined, when) = oneshot::channel();
        let open = Arc::new(AtomicBool::new(true));
        let client = Client { orders, open: open.clone() };
        client.send(FIRST, Instant::now());
        let tally = self.tally.clone();
        tokio::spawn(async move {
            converse(socket, queue, &tally, joined).await;
            open.store(false, Ordering::Release);
        });
        Ok((client, when))
    }

    async fn connect(&self, url: &str) -> Result<WebSocketStream<TlsStream<TcpStream>>> {
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        let stream = self.tls.connect(ServerName::from(self.address.ip()), stream).await?;
        let request = url.into_client_request()?;
        // Thousands of these live in this process.
        let config = WebSocketConfig::default().read_buffer_size(4096).write_buffer_size(0);
        Ok(tokio_tungstenite::client_async_with_config(request, stream, Some(config)).await?.0)
    }
}

impl Client {
    /// Sends a probe of a run; its latency counts from when it was due.
    pub fn send(&self, run: u32, due: Instant) {
        // A closed socket sends nothing; the probe is then missing in the tally.
        let _ = self.orders.send(Order { run, due });
    }

    /// Whether the socket is open.
    pub fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }
}

async fn converse(
    mut socket: WebSocketStream<TlsStream<TcpStream>>,
    mut orders: mpsc::UnboundedReceiver<Order>,
    tally: &Tally,
    joined: oneshot::Sender<()>,
) {
    let mut joined = Some(joined);
    let (mut next_out, mut next_in) = (0, 0);
    loop {
        tokio::select! {
            order = orders.recv() => {
                let Some(order) = order else {
                    let _ = socket.close(None).await;
                    return;
                };
                let text = probe(order.run, next_out, nanos(order.due));
                if socket.send(Message::Text(text.into())).await.is_err() {
                    return;
                }
                next_out += 1;
            }
            message = socket.next() => match message {
                Some(Ok(Message::Text(text))) => match serde_json::from_str::<Probe<'_>>(&text) {
                    Ok(probe) if probe.r#type == "probe" => {
                        let trip = Trip::new(probe.at, probe.turned, nanos(Instant::now()));
                        if probe.seq != next_in {
                            tally.disorder.fetch_add(1, Ordering::Relaxed);
                        }
                        next_in = probe.seq + 1;
                        let mut runs = tally.runs.lock().unwrap_or_else(PoisonError::into_inner);
                        runs.entry(probe.run).or_default().push(trip);
                        drop(runs);
                        if let Some(joined) = joined.take() {
                            let _ = joined.send(());
                        }
                    }
                    _ => {
                        let text = text.chars().take(200).collect();
                        let mut errors = tally.errors.lock().unwrap_or_else(PoisonError::into_inner);
                        *errors.entry(text).or_default() += 1;
                    }
                },
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return,
            }
        }
    }
}

/// A probe as text, [`PROBE_BYTES`] long.
pub fn probe(run: u32, seq: u64, at: u64) -> String {
    let bare = Probe { r#type: "probe", run, seq, at, turned: 0, padding: "" };
    let bare = serde_json::to_string(&bare).expect("numbers can be written");
    let padding = "x".repeat(PROBE_BYTES.saturating_sub(bare.len()));
    let full = Probe { r#type: "probe", run, seq, at, turned: 0, padding: &padding };
    serde_json::to_string(&full).expect("numbers can be written")
}

/// What an instance sends back: the same with the time.
pub fn turned(text: String) -> String {
    match serde_json::from_str::<Probe<'_>>(&text) {
        Ok(probe) => {
            let back = Probe { turned: nanos(Instant::now()), ..probe };
            serde_json::to_string(&back).expect("numbers can be written")
        }
        Err(_) => text,
    }
}

/// Believes one certificate.
#[derive(Debug)]
struct Pinned {
    fingerprint: String,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if hex::encode(Sha256::digest(end_entity)) == self.fingerprint {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(rustls::Error::General("another certificate than that of the gateway".into()))
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
