//! An agent and a gateway unit in one: a TLS websocket server that speaks to the streamer as both would.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use fanlight_api::{
    SessionId,
    agent_link::{StreamerStatus, ToAgent, ToStreamer},
    gateway::ScreenPatch,
    link::{Frame, Link, Side},
};
use futures_util::{SinkExt as _, StreamExt as _};
use sha2::{Digest as _, Sha256};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
};
use tokio_rustls::{TlsAcceptor, rustls};
use tokio_tungstenite::tungstenite::{
    Message,
    handshake::server::{ErrorResponse, Request, Response},
};

/// What the agent is told.
enum Order {
    Send(u64, Frame),
    End(String),
    /// Close the connection.
    Drop,
}

/// The running agent.
pub struct Agent {
    pub url: String,
    pub fingerprint: String,
    pub session_id: SessionId,
    orders: mpsc::UnboundedSender<Order>,
    frames: mpsc::UnboundedReceiver<(u64, Frame)>,
    waiting: Vec<(u64, Frame)>,
    pub status: watch::Receiver<StreamerStatus>,
    pub steps: watch::Receiver<Vec<String>>,
    pub connections: watch::Receiver<u32>,
    pub token: String,
}

impl Agent {
    pub async fn start() -> Self {
        let key = rcgen::generate_simple_self_signed(vec!["localhost".into()]).expect("a certificate");
        let der = key.cert.der().clone();
        let fingerprint = hex::encode(Sha256::digest(&der));
        let private = rustls::pki_types::PrivatePkcs8KeyDer::from(key.signing_key.serialize_der());
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(vec![der], private.into())
            .expect("a server");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("wss://{}/internal/1.0/stream", listener.local_addr().expect("an address"));
        let session_id = SessionId::generate();
        let (orders, for_task) = mpsc::unbounded_channel();
        let (to_us, frames) = mpsc::unbounded_channel();
        let (status_to, status) = watch::channel(StreamerStatus::default());
        let (steps_to, steps) = watch::channel(Vec::new());
        let (connections_to, connections) = watch::channel(0);
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let server = Server {
            session_id: session_id.clone(),
            links: BTreeMap::new(),
            orders: for_task,
            frames: to_us,
            status: status_to,
            steps: steps_to,
            connections: connections_to,
        };
        tokio::spawn(server.run(listener, acceptor));
        Self {
            url,
            fingerprint,
            session_id,
            orders,
            frames,
            waiting: Vec::new(),
            status,
            steps,
            connections,
            token: "a-token-for-one-instance".into(),
        }
    }

    pub fn open(&self, generation: u64, screen: Option<ScreenPatch>) {
        self.send(generation, Frame::Open { screen, stun_servers: Vec::new() });
    }

    pub fn text(&self, generation: u64, value: &serde_json::Value) {
        self.send(generation, Frame::Text { text: value.to_string() });
    }

    pub fn send(&self, generation: u64, frame: Frame) {
        assert!(self.orders.send(Order::Send(generation, frame)).is_ok(), "the agent runs");
    }

    pub fn end_stream(&self, message: &str) {
        assert!(self.orders.send(Order::End(message.into())).is_ok(), "the agent runs");
    }

    pub fn drop_connection(&self) {
        assert!(self.orders.send(Order::Drop).is_ok(), "the agent runs");
    }

    /// The next frame for a generation.
    pub async fn frame(&mut self, generation: u64) -> Frame {
        if let Some(index) = self.waiting.iter().position(|(of, _)| *of == generation) {
            return self.waiting.remove(index).1;
        }
        loop {
            let next = tokio::time::timeout(Duration::from_secs(10), self.frames.recv());
            let (of, frame) = next.await.expect("a frame within 10 s").expect("the agent runs");
            if of == generation {
                return frame;
            }
            self.waiting.push((of, frame));
        }
    }

    /// The next text frame for a generation, as JSON.
    pub async fn json(&mut self, generation: u64) -> serde_json::Value {
        match self.frame(generation).await {
            Frame::Text { text } => serde_json::from_str(&text).expect("JSON"),
            other => panic!("{other:?} is no text"),
        }
    }

    /// Whatever is there for a generation, without waiting.
    pub fn take_frames(&mut self, generation: u64) -> Vec<Frame> {
        while let Ok(item) = self.frames.try_recv() {
            self.waiting.push(item);
        }
        let (ours, others) =
            std::mem::take(&mut self.waiting).into_iter().partition(|(of, _)| *of == generation);
        self.waiting = others;
        let ours: Vec<(u64, Frame)> = ours;
        ours.into_iter().map(|(_, frame)| frame).collect()
    }
}

struct Server {
    session_id: SessionId,
    links: BTreeMap<u64, Link>,
    orders: mpsc::UnboundedReceiver<Order>,
    frames: mpsc::UnboundedSender<(u64, Frame)>,
    status: watch::Sender<StreamerStatus>,
    steps: watch::Sender<Vec<String>>,
    connections: watch::Sender<u32>,
}

impl Server {
    async fn run(mut self, listener: TcpListener, acceptor: TlsAcceptor) {
        while let Ok((tcp, _)) = listener.accept().await {
            if self.serve(tcp, &acceptor).await.is_none() {
                return;
            }
        }
    }

    /// One connection; `None` when the test is over.
    async fn serve(&mut self, tcp: TcpStream, acceptor: &TlsAcceptor) -> Option<()> {
        let Ok(tls) = acceptor.accept(tcp).await else { return Some(()) };
        // The library's own type is this large.
        #[allow(clippy::result_large_err)]
        let check = |request: &Request, response: Response| -> Result<Response, ErrorResponse> {
            assert_eq!(request.uri().path(), "/internal/1.0/stream");
            let bearer = request.headers().get("authorization").and_then(|value| value.to_str().ok());
            assert_eq!(bearer, Some("Bearer a-token-for-one-instance"));
            Ok(response)
        };
        let Ok(mut socket) = tokio_tungstenite::accept_hdr_async(tls, check).await else { return Some(()) };
        self.connections.send_modify(|count| *count += 1);
        let mut tick = tokio::time::interval(Duration::from_millis(20));
        loop {
            let now = Instant::now();
            for link in self.links.values_mut() {
                while let Some(packet) = link.poll_transmit(now) {
                    let text = serde_json::to_string(&ToStreamer::Link(packet)).expect("JSON");
                    // A streamer that has said its last word may be gone; its words are still to be read.
                    let _ = socket.send(Message::text(text)).await;
                }
            }
            tokio::select! {
                _ = tick.tick() => {}
                order = self.orders.recv() => match order? {
                    Order::Send(generation, frame) => {
                        let session_id = self.session_id.clone();
                        let link = self.links.entry(generation)
                            .or_insert_with(|| Link::new(session_id, generation, Side::Client));
                        link.send(frame).expect("little waits");
                    }
                    Order::End(message) => {
                        let text = serde_json::to_string(&ToStreamer::EndStream { message }).expect("JSON");
                        socket.send(Message::text(text)).await.ok()?;
                    }
                    Order::Drop => return Some(()),
                },
                message = socket.next() => match message {
                    Some(Ok(Message::Text(text))) => {
                        self.received(serde_json::from_str(&text).expect("a message for the agent"))
                    }
                    Some(Ok(_)) => {}
                    Some(Err(_)) | None => return Some(()),
                },
            }
        }
    }

    fn received(&mut self, message: ToAgent) {
        match message {
            ToAgent::Hello { session_id, .. } => assert_eq!(session_id, self.session_id),
            ToAgent::Link(packet) if packet.generation == 0 => {
                for link in self.links.values_mut() {
                    link.receive(packet.clone());
                }
            }
            ToAgent::Link(packet) => {
                let generation = packet.generation;
                let Some(link) = self.links.get_mut(&generation) else { return };
                link.receive(packet);
                while let Some(frame) = link.poll_frame() {
                    // Nobody reads any more when the test is over.
                    let _ = self.frames.send((generation, frame));
                }
            }
            ToAgent::Status(status) => drop(self.status.send(status)),
            ToAgent::Step(step) => self.steps.send_modify(|steps| steps.push(step.step)),
        }
    }
}
