//! One client's signalling socket: text frames between the websocket and the reliable link over the bus, unchanged
//! and in order (signaling section 6). Never looks inside a frame.
//!
//! A client of the original has no handler for a closed socket, so whoever ends it says `error` first
//! (signaling section 10, F4).

use std::{sync::Arc, time::Duration};

use axum::{
    body::Bytes,
    extract::ws::{CloseFrame, Message, Utf8Bytes, WebSocket},
};
use fanlight_api::{
    bus::{session_down, session_up},
    gateway::SessionStatus,
    link::{Frame, Link, LinkError, Packet, Side},
    signal::{ErrorCode, InstanceMessage},
};
use fanlight_bus::{MAX_PAYLOAD_BYTES, Subscription};
use tokio::{sync::watch, time::Instant};

use crate::{Gateway, session::Session, token::SocketGrant};

const PING: Duration = Duration::from_secs(30);
/// A client that answers none of two pings is gone.
const MISSED_PINGS: u32 = 2;
/// How long a frame may take to be written to a client.
const WRITE: Duration = Duration::from_secs(10);
/// How long last frames of a client that closed are still delivered.
const LINGER: Duration = Duration::from_secs(30);
/// Largest websocket message that is read, so that one beyond the limit of the link can be refused in words.
pub const MAX_MESSAGE_BYTES: usize = 2 * 1024 * 1024;
/// What a socket reads at a time. Each has this much for as long as it is open; frames are mostly smaller, and there may be
/// thousands of sockets.
pub const READ_BUFFER_BYTES: usize = 4096;

/// Why a relay ended.
#[derive(Debug)]
enum End {
    /// The client closed its socket, or vanished.
    Client(&'static str),
    /// The instance is done with this client.
    Instance,
    /// We have to tell the client why.
    Error(ErrorCode, String),
}

/// Relays one client's frames until either side is done.
pub async fn relay(gateway: Gateway, socket: WebSocket, grant: SocketGrant) {
    let id = grant.session_id.clone();
    let generation = grant.generation;
    let started = Instant::now();
    let mut socket = Socket { socket, pings: 0 };
    let subject = session_down(&id);
    let packets = match gateway.bus.subscribe(&subject).await {
        Ok(packets) => packets,
        Err(error) => {
            tracing::error!(session.id = %id, "subscribing for a client failed: {error}");
            socket.close(Some((ErrorCode::Internal, "the gateway cannot reach its bus".into()))).await;
            return;
        }
    };
    let mut link = Link::new(id.clone(), generation, Side::Client);
    link.send(Frame::Open { screen: grant.screen, stun_servers: Vec::new() })
        .expect("the first frame of a link is small and fits");
    let follower = gateway.index.follow(&id);
    let mut relay =
        Relay { gateway, packets, follower, link, subject: session_up(&id), generation, heard: false };
    tracing::info!(session.id = %id, generation, "client of session {id} opened its socket");
    let end = relay.run(&mut socket).await;
    let reason = match &end {
        End::Client(reason) => (*reason).to_owned(),
        End::Instance => "the instance is done with it".into(),
        End::Error(code, text) => format!("{code:?}: {text}"),
    };
    tracing::info!(
        session.id = %id,
        generation,
        duration_ms = started.elapsed().as_millis() as u64,
        heard = relay.heard,
        "socket of session {id} closed: {reason}"
    );
    match end {
        End::Client(_) => {}
        End::Instance => socket.close(None).await,
        End::Error(code, text) => socket.close(Some((code, text))).await,
    }
    relay.linger().await;
}

struct Relay {
    gateway: Gateway,
    packets: Subscription,
    follower: watch::Receiver<Option<Arc<Session>>>,
    link: Link,
    subject: String,
    generation: u64,
    /// Whether the instance ever said anything.
    heard: bool,
}

impl Relay {
    async fn run(&mut self, socket: &mut Socket) -> End {
        let patience = self.gateway.config.limits.instance_time;
        let give_up = Instant::now() + patience;
        let mut ping = tokio::time::interval_at(Instant::now() + PING, PING);
        let shutdown = self.gateway.shutdown.clone();
        // Made once: each of these enters a list that all sockets share.
        let mut stopping = std::pin::pin!(shutdown.stopping());
        let mut unheard = std::pin::pin!(tokio::time::sleep_until(give_up));
        loop {
            if let Some(end) = self.session_ended() {
                return end;
            }
            if self.link.is_broken() {
                let text = "the session went to another instance, or its own was started again; join again";
                return End::Error(ErrorCode::InstanceNotReachable, text.into());
            }
            while let Some(frame) = self.link.poll_frame() {
                match frame {
                    Frame::Text { text } => {
                        if !socket.send(Message::Text(Utf8Bytes::from(text))).await {
                            return End::Client("it does not take frames");
                        }
                    }
                    Frame::Closed => return End::Instance,
                    Frame::Open { .. } => {}
                }
            }
            self.transmit();
            let retry = self.link.deadline().map(Instant::from_std);
            tokio::select! {
                message = socket.socket.recv() => {
                    if let Some(end) = self.take(socket, message) {
                        return end;
                    }
                }
                packet = self.packets.next() => match packet {
                    Some(packet) => self.take_packet(&packet),
                    None => return End::Error(ErrorCode::Internal, "the gateway lost its bus".into()),
                },
                () = until(retry) => {}
                changed = self.follower.changed() => {
                    if changed.is_err() {
                        // Nobody tells us any more; following again shows the state.
                        let id = self.follower.borrow().as_ref().map(|session| session.id.clone());
                        let Some(id) = id else {
                            return End::Error(ErrorCode::SessionEnded, "the session has ended".into());
                        };
                        self.follower = self.gateway.index.follow(&id);
                    }
                }
                _ = ping.tick() => {
                    if socket.pings >= MISSED_PINGS {
                        return End::Client("it answers no ping");
                    }
                    socket.pings += 1;
                    if !socket.send(Message::Ping(Bytes::new())).await {
                        return End::Client("it does not take frames");
                    }
                }
                () = &mut unheard, if !self.heard => {
                    return End::Error(
                        ErrorCode::InstanceNotReachable,
                        format!("the instance did not answer within {} s", patience.as_secs()),
                    );
                }
                () = &mut stopping => {
                    return End::Error(ErrorCode::Internal, "the gateway is going down; join again".into());
                }
            }
        }
    }

    /// What the record of the session says to this socket.
    fn session_ended(&mut self) -> Option<End> {
        let session = self.follower.borrow_and_update().clone();
        let ended = |text: String| Some(End::Error(ErrorCode::SessionEnded, text));
        let Some(session) = session else { return ended("the session has ended".into()) };
        if session.used_generation > self.generation {
            return Some(End::Error(ErrorCode::Replaced, "another client took over the session".into()));
        }
        if let Some(instance_id) = &session.instance_id {
            self.link.expect(instance_id);
        }
        match session.status {
            SessionStatus::Created | SessionStatus::Active => None,
            _ if session.message.is_empty() => ended("the session has ended".into()),
            _ => ended(format!("the session has ended: {}", session.message)),
        }
    }

    fn take(&mut self, socket: &mut Socket, message: Option<Result<Message, axum::Error>>) -> Option<End> {
        let bad = |text: String| Some(End::Error(ErrorCode::BadRequest, text));
        let message = match message {
            Some(Ok(message)) => message,
            Some(Err(error)) => {
                let text = error.to_string();
                // A message beyond `MAX_MESSAGE_BYTES` is not read, but the socket can still be written.
                return if text.to_lowercase().contains("too long")
                    || text.to_lowercase().contains("too large")
                {
                    bad(format!("frame is too large: {text}"))
                } else {
                    Some(End::Client("it vanished"))
                };
            }
            None => return Some(End::Client("it closed")),
        };
        match message {
            // Escapes count on the bus: a frame that would not fit would be sent again for ever.
            Message::Text(text) if !fits_the_bus(&text) => {
                bad("frame is too large: it holds too many characters that need escapes".into())
            }
            Message::Text(text) => match self.link.send(Frame::Text { text: text.as_str().to_owned() }) {
                Ok(()) => None,
                Err(error @ (LinkError::FrameTooLarge(_) | LinkError::TooManyFrames)) => {
                    bad(error.to_string())
                }
                Err(error @ LinkError::TooMuchWaiting) => {
                    Some(End::Error(ErrorCode::InstanceNotReachable, error.to_string()))
                }
            },
            Message::Binary(_) => bad("binary frames are not understood: signalling is JSON text".into()),
            Message::Pong(_) => {
                socket.pings = 0;
                None
            }
            // The library answers pings by itself.
            Message::Ping(_) => None,
            Message::Close(_) => Some(End::Client("it closed")),
        }
    }

    fn take_packet(&mut self, message: &fanlight_bus::Message) {
        match message.json::<Packet>() {
            Ok(packet) => {
                self.heard |= packet.from == Side::Instance
                    && (packet.generation == self.generation || packet.generation == 0);
                self.link.receive(packet);
            }
            Err(error) => tracing::debug!("a packet for a client cannot be read: {error}"),
        }
    }

    fn transmit(&mut self) {
        while let Some(packet) = self.link.poll_transmit(Instant::now().into_std()) {
            self.gateway.bus.publish_json(&self.subject, &packet);
        }
    }

    /// Delivers the client's last frames and its end.
    async fn linger(mut self) {
        // Its counterpart is the same on a link that is full.
        let _ = self.link.send(Frame::Closed);
        let give_up = Instant::now() + LINGER;
        while !self.link.is_settled() && !self.link.is_broken() {
            while self.link.poll_frame().is_some() {}
            self.transmit();
            if self.follower.borrow().is_none() {
                return;
            }
            tokio::select! {
                packet = self.packets.next() => match packet {
                    Some(packet) => self.take_packet(&packet),
                    None => return,
                },
                () = until(self.link.deadline().map(Instant::from_std)) => {}
                () = tokio::time::sleep_until(give_up) => return,
                () = self.gateway.shutdown.stopping() => return,
            }
        }
        self.transmit();
    }
}

/// Whether a frame fits into one bus message once it is written as JSON.
fn fits_the_bus(text: &str) -> bool {
    // Each byte may become six; the packet around it is small.
    let room = MAX_PAYLOAD_BYTES - 4096;
    text.len() <= room / 6 || serde_json::to_string(text).is_ok_and(|written| written.len() <= room)
}

struct Socket {
    socket: WebSocket,
    /// Pings without an answer.
    pings: u32,
}

impl Socket {
    async fn send(&mut self, message: Message) -> bool {
        matches!(tokio::time::timeout(WRITE, self.socket.send(message)).await, Ok(Ok(())))
    }

    async fn close(&mut self, error: Option<(ErrorCode, String)>) {
        if let Some((code, text)) = error {
            self.send(Message::Text(InstanceMessage::error(code, text).to_text().into())).await;
        }
        self.send(Message::Close(Some(CloseFrame { code: 1000, reason: Utf8Bytes::default() }))).await;
        // The client's own close, so that nothing sent before is lost to a reset.
        let answered = async { while let Some(Ok(_)) = self.socket.recv().await {} };
        let _ = tokio::time::timeout(Duration::from_secs(2), answered).await;
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
