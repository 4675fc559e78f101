//! The connection to the agent: the only way signalling gets in and status gets out.
//!
//! Nothing here may end a stream: while the agent cannot be reached or refuses us, media goes on and the
//! connection is tried again. What must not be lost goes over reliable links ([`links`]), everything else is
//! sent whole and often.

mod links;
mod tls;
mod url;

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use fanlight_api::{
    InstanceId, PROTOCOL_VERSION,
    agent_link::{FunnelStep, StreamerStatus, ToAgent, ToStreamer},
    guest::Streaming,
    link::{Frame, hello},
};
use futures_util::{SinkExt as _, StreamExt as _};
use http::{Request, StatusCode, header};
use tokio::{net::TcpStream, sync::mpsc};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_tungstenite::{
    WebSocketStream, client_async_with_config,
    tungstenite::{self, Message, handshake::client::generate_key, protocol::WebSocketConfig},
};
use tracing::{debug, info, warn};

use self::{links::Links, url::AgentUrl};
pub use self::{tls::TlsError, url::BadUrl};

/// The whole status goes out this often even without a change (design section 1, rule 2).
const STATUS_EVERY: Duration = Duration::from_secs(5);
/// Connecting, TLS and upgrade together.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// Without a message for so long the connection is dead; the agent pings more often than that.
const SILENCE_LIMIT: Duration = Duration::from_secs(45);
/// Our own pings keep middle boxes and the agent's view of us alive.
const PING_EVERY: Duration = Duration::from_secs(15);
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(5);
/// Pause after the agent said that it does not want us; it may learn better.
const REFUSED_PAUSE: Duration = Duration::from_secs(15);
/// How long a closing handshake may hold up the end.
const GOODBYE_LIMIT: Duration = Duration::from_millis(500);
/// Largest message: a link packet with a full frame, as JSON inside JSON.
const MAX_MESSAGE_BYTES: usize = 2 * 1024 * 1024;

/// To the agent.
#[derive(Debug)]
pub enum Outgoing {
    /// A frame for a client.
    Signal {
        /// Whose.
        generation: u64,
        /// The frame.
        frame: Frame,
    },
    /// The status changed.
    Status(StreamerStatus),
    /// A step of the connect funnel.
    Step(FunnelStep),
    /// The instance ends: send this last status and close.
    Last(StreamerStatus),
}

/// From the agent.
#[derive(Debug)]
pub enum Incoming {
    /// A frame of a client, in order.
    Signal {
        /// Whose.
        generation: u64,
        /// The frame.
        frame: Frame,
    },
    /// The session has ended.
    EndStream {
        /// For the client.
        message: String,
    },
}

/// Why there can be no connection at all.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The guest file's URL.
    #[error(transparent)]
    Url(#[from] BadUrl),
    /// The guest file's fingerprint, or the system's certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

#[derive(Debug, thiserror::Error)]
enum ConnectError {
    #[error("connecting to {0}: {1}")]
    Tcp(String, std::io::Error),
    #[error("TLS with {0}: {1}")]
    Tls(String, std::io::Error),
    #[error("the agent refuses this instance with status {0}")]
    Refused(StatusCode),
    #[error("websocket with the agent: {0}")]
    Websocket(Box<tungstenite::Error>),
    #[error("the agent did not answer within {} s", CONNECT_LIMIT.as_secs())]
    Late,
}

type Socket = WebSocketStream<TlsStream<TcpStream>>;

/// The task that keeps the connection.
pub struct Agent {
    streaming: Streaming,
    instance_id: InstanceId,
    url: AgentUrl,
    tls: TlsConnector,
    links: Links,
    status: StreamerStatus,
    /// Steps that were being sent when the connection broke.
    steps: Vec<FunnelStep>,
    deliver: Box<dyn Fn(Incoming)>,
}

impl Agent {
    /// Prepares the connection. `deliver` gets what the agent sends.
    ///
    /// # Errors
    /// When the guest file's URL or fingerprint is no good.
    pub fn new(
        streaming: Streaming,
        instance_id: InstanceId,
        deliver: impl Fn(Incoming) + 'static,
    ) -> Result<Self, AgentError> {
        Ok(Self {
            url: AgentUrl::parse(&streaming.agent_url)?,
            tls: tls::connector(&streaming.fingerprint)?,
            links: Links::new(streaming.session_id.clone()),
            streaming,
            instance_id,
            status: StreamerStatus::default(),
            steps: Vec::new(),
            deliver: Box::new(deliver),
        })
    }

    /// Keeps the connection until [`Outgoing::Last`] went out or the other end of `outgoing` is dropped. While the
    /// agent is away, what is given to it waits in the channel.
    pub async fn run(mut self, mut outgoing: mpsc::UnboundedReceiver<Outgoing>) {
        let mut pause = FIRST_PAUSE;
        let mut complained = false;
        loop {
            let connected = tokio::time::timeout(CONNECT_LIMIT, self.connect()).await;
            let wait = match connected.unwrap_or(Err(ConnectError::Late)) {
                Ok(mut socket) => {
                    info!("connected to the agent");
                    complained = false;
                    let since = Instant::now();
                    match self.talk(&mut socket, &mut outgoing).await {
                        Ok(()) => {
                            // Without an answer to wait for there is nothing more to do about it.
                            let _ = tokio::time::timeout(GOODBYE_LIMIT, say_goodbye(&mut socket)).await;
                            return;
                        }
                        Err(reason) => warn!(reason, "the connection to the agent is lost"),
                    }
                    if since.elapsed() > LAST_PAUSE {
                        pause = FIRST_PAUSE;
                    }
                    pause
                }
                Err(error) => {
                    let refused = matches!(error, ConnectError::Refused(status) if status.is_client_error());
                    if std::mem::replace(&mut complained, true) {
                        debug!(%error, "the agent cannot be reached");
                    } else {
                        warn!(%error, "the agent cannot be reached; trying on");
                    }
                    if refused { REFUSED_PAUSE } else { pause }
                }
            };
            pause = (pause * 2).min(LAST_PAUSE);
            // Many streamers lose their agent at the same moment; they should not all come back at the same one.
            let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.subsec_nanos());
            let jitter = (nanos / 1000 + std::process::id()) % 256;
            tokio::time::sleep(wait.mul_f64(0.75 + f64::from(jitter) / 512.0)).await;
        }
    }

    /// Speaks over one connection; ends well after the last status.
    async fn talk(
        &mut self,
        socket: &mut Socket,
        outgoing: &mut mpsc::UnboundedReceiver<Outgoing>,
    ) -> Result<(), String> {
        let session_id = self.streaming.session_id.clone();
        let greeting = ToAgent::Hello {
            version: PROTOCOL_VERSION,
            session_id: session_id.clone(),
            instance_id: self.instance_id.clone(),
        };
        send(socket, &greeting).await?;
        send(socket, &ToAgent::Link(hello(session_id))).await?;
        send(socket, &ToAgent::Status(self.status.clone())).await?;
        for step in std::mem::take(&mut self.steps) {
            send(socket, &ToAgent::Step(step)).await?;
        }
        let mut status_at = tokio::time::Instant::now() + STATUS_EVERY;
        let mut ping_at = tokio::time::Instant::now() + PING_EVERY;
        let mut heard = Instant::now();
        loop {
            for packet in self.links.take_packets(Instant::now()) {
                send(socket, &ToAgent::Link(packet)).await?;
            }
            let mut next = status_at.min(ping_at);
            if let Some(deadline) = self.links.deadline() {
                next = next.min(deadline.into());
            }
            tokio::select! {
                message = socket.next() => {
                    heard = Instant::now();
                    self.received(message)?;
                }
                item = outgoing.recv() => match item {
                    None => return Ok(()),
                    Some(Outgoing::Signal { generation, frame }) => {
                        if let Err(error) = self.links.send(generation, frame) {
                            warn!(%error, generation, "a frame for a client is lost");
                        }
                    }
                    Some(Outgoing::Status(status)) => {
                        self.status = status;
                        send(socket, &ToAgent::Status(self.status.clone())).await?;
                        status_at = tokio::time::Instant::now() + STATUS_EVERY;
                    }
                    Some(Outgoing::Step(step)) => {
                        if let Err(error) = send(socket, &ToAgent::Step(step.clone())).await {
                            self.steps.push(step);
                            return Err(error);
                        }
                    }
                    Some(Outgoing::Last(status)) => {
                        // What clients are to be told goes out before; there is no time to repeat it.
                        for packet in self.links.take_packets(Instant::now()) {
                            send(socket, &ToAgent::Link(packet)).await?;
                        }
                        return send(socket, &ToAgent::Status(status)).await;
                    }
                },
                () = tokio::time::sleep_until(next) => {
                    let now = tokio::time::Instant::now();
                    if status_at <= now {
                        status_at = now + STATUS_EVERY;
                        send(socket, &ToAgent::Status(self.status.clone())).await?;
                    }
                    if ping_at <= now {
                        ping_at = now + PING_EVERY;
                        if heard.elapsed() > SILENCE_LIMIT {
                            return Err(format!("nothing was heard for {} s", heard.elapsed().as_secs()));
                        }
                        socket.send(Message::Ping(Default::default())).await.map_err(|error| error.to_string())?;
                    }
                }
            }
        }
    }

    fn received(&mut self, message: Option<Result<Message, tungstenite::Error>>) -> Result<(), String> {
        match message {
            None => Err("closed by the agent".into()),
            Some(Err(error)) => Err(error.to_string()),
            Some(Ok(Message::Text(text))) => {
                match serde_json::from_str(&text) {
                    Ok(ToStreamer::Link(packet)) => {
                        for (generation, frame) in self.links.receive(Instant::now(), packet) {
                            (self.deliver)(Incoming::Signal { generation, frame });
                        }
                    }
                    Ok(ToStreamer::EndStream { message }) => (self.deliver)(Incoming::EndStream { message }),
                    // A newer agent may say more than we know.
                    Err(error) => debug!(%error, "a message of the agent is not understood"),
                }
                Ok(())
            }
            Some(Ok(Message::Close(_))) => Err("closed by the agent".into()),
            Some(Ok(_)) => Ok(()),
        }
    }

    async fn connect(&self) -> Result<Socket, ConnectError> {
        let place = self.url.authority();
        let tcp = TcpStream::connect((self.url.host.as_str(), self.url.port))
            .await
            .map_err(|error| ConnectError::Tcp(place.clone(), error))?;
        // Signalling is small messages that somebody waits for.
        let _ = tcp.set_nodelay(true);
        let tls = self
            .tls
            .connect(self.url.server_name.clone(), tcp)
            .await
            .map_err(|error| ConnectError::Tls(place.clone(), error))?;
        let request = Request::get(&self.streaming.agent_url)
            .header(header::HOST, &place)
            .header(header::CONNECTION, "Upgrade")
            .header(header::UPGRADE, "websocket")
            .header(header::SEC_WEBSOCKET_VERSION, "13")
            .header(header::SEC_WEBSOCKET_KEY, generate_key())
            .header(header::AUTHORIZATION, format!("Bearer {}", self.streaming.token.expose()))
            .body(())
            .map_err(|error| ConnectError::Websocket(Box::new(error.into())))?;
        let config = WebSocketConfig::default()
            .max_message_size(Some(MAX_MESSAGE_BYTES))
            .max_frame_size(Some(MAX_MESSAGE_BYTES));
        match client_async_with_config(request, tls, Some(config)).await {
            Ok((socket, _)) => Ok(socket),
            Err(tungstenite::Error::Http(response)) => Err(ConnectError::Refused(response.status())),
            Err(error) => Err(ConnectError::Websocket(Box::new(error))),
        }
    }
}

async fn send(socket: &mut Socket, message: &ToAgent) -> Result<(), String> {
    let text = serde_json::to_string(message).expect("messages of ours always serialise");
    // An agent that does not read must not hold us for ever.
    let sent = tokio::time::timeout(CONNECT_LIMIT, socket.send(Message::text(text))).await;
    sent.map_err(|_| "the agent does not read".to_owned())?.map_err(|error| error.to_string())
}

/// Closes the connection from both sides. Leaving while something is unread would reset the connection, and the
/// agent could lose the last status with it.
async fn say_goodbye(socket: &mut Socket) {
    if socket.close(None).await.is_ok() {
        while let Some(Ok(_)) = socket.next().await {}
    }
}
