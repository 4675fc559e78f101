//! The websockets of streamers: who is connected, packets to and fro, states.
//!
//! Packets are forwarded and may be lost here as on the bus; their ends send them again.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{
    body::Bytes,
    extract::{
        WebSocketUpgrade,
        ws::{CloseFrame, Message, WebSocket, close_code},
    },
    response::Response,
};
use fanlight_api::{
    InstanceId, SessionId,
    agent_link::{ToAgent, ToStreamer},
    bus::{session_down, session_up},
    link::{Packet, Side},
};
use fanlight_bus::Subscription;
use tokio::sync::mpsc;

use crate::{Agent, token::Scope};

/// Largest message of a streamer: a signalling frame of 256 KiB, quoted, with room.
const MAX_MESSAGE_BYTES: usize = 1024 * 1024;
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
const PING_EVERY: Duration = Duration::from_secs(10);
/// A streamer tells its state every 5 s and answers pings; one that is silent for so long is not there.
const SILENCE: Duration = Duration::from_secs(30);
/// How long one message may take to be taken by the other side.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);

/// The connected streamers.
#[derive(Default)]
pub struct Streamers {
    table: Mutex<HashMap<SessionId, Connected>>,
    next: AtomicU64,
    /// Messages of streamers and gateways that made no sense here.
    dropped: AtomicU64,
}

struct Connected {
    connection: u64,
    orders: mpsc::Sender<Order>,
}

enum Order {
    Send(ToStreamer),
    /// A newer connection has come.
    Replaced,
}

impl Streamers {
    fn table(&self) -> MutexGuard<'_, HashMap<SessionId, Connected>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many are connected.
    pub fn count(&self) -> usize {
        self.table().len()
    }

    /// Tells a streamer that its session has ended; a streamer that is away learns it when it comes back.
    pub fn end_stream(&self, session: &SessionId, message: String) {
        if let Some(connected) = self.table().get(session) {
            // A full queue means a streamer that takes nothing any more.
            let _ = connected.orders.try_send(Order::Send(ToStreamer::EndStream { message }));
        }
    }

    /// The new connection takes the session over.
    fn register(&self, session: &SessionId) -> (u64, mpsc::Receiver<Order>) {
        let connection = self.next.fetch_add(1, Ordering::Relaxed) + 1;
        let (orders, queue) = mpsc::channel(16);
        let old = self.table().insert(session.clone(), Connected { connection, orders });
        if let Some(old) = old {
            let _ = old.orders.try_send(Order::Replaced);
        }
        (connection, queue)
    }

    fn unregister(&self, session: &SessionId, connection: u64) {
        let mut table = self.table();
        if table.get(session).is_some_and(|connected| connected.connection == connection) {
            table.remove(session);
        }
    }

    fn drop_message(&self, session: &SessionId, why: &str) {
        let dropped = self.dropped.fetch_add(1, Ordering::Relaxed) + 1;
        if dropped.is_power_of_two() {
            tracing::warn!(session.id = %session, dropped, "a message was dropped: {why}; {dropped} so far");
        }
    }
}

/// Answers the upgrade and talks with the streamer until either side ends.
pub fn accept(agent: Arc<Agent>, scope: Scope, upgrade: WebSocketUpgrade) -> Response {
    upgrade.max_message_size(MAX_MESSAGE_BYTES).max_frame_size(MAX_MESSAGE_BYTES).on_upgrade(move |socket| {
        let worker = agent.clone();
        let task = agent.shutdown.spawn("streamer", async move { serve(&worker, scope, socket).await });
        async move {
            // A panic of the task was logged by its tracker.
            let _ = task.await;
        }
    })
}

async fn serve(agent: &Arc<Agent>, scope: Scope, mut socket: WebSocket) {
    let session = &scope.session_id;
    let instance = match hello(agent, &scope, &mut socket).await {
        Ok(instance) => instance,
        Err(why) => {
            tracing::warn!(session.id = %session, "the streamer of session {session} was turned away: {why}");
            return close(&mut socket, close_code::POLICY, &why).await;
        }
    };
    // Before the registration: what comes for the session from now on is not lost.
    let packets = match agent.bus.subscribe(&session_up(session)).await {
        Ok(packets) => packets,
        Err(error) => {
            tracing::error!(session.id = %session, "the bus does not take a subscription: {error}");
            return close(&mut socket, close_code::ERROR, "the bus is not available").await;
        }
    };
    let (connection, orders) = agent.streamers.register(session);
    tracing::info!(session.id = %session, instance.id = %instance, "streamer of session {session} is connected");
    agent.with_sessions(|sessions| {
        ((), sessions.streamer_connected(Instant::now(), session, instance.clone(), connection))
    });
    let why = converse(agent, session, &instance, connection, &mut socket, packets, orders).await;
    agent.streamers.unregister(session, connection);
    agent.with_sessions(|sessions| ((), sessions.streamer_gone(session, connection)));
    tracing::info!(session.id = %session, "streamer of session {session} is disconnected: {why}");
    close(&mut socket, close_code::AWAY, &why).await;
}

/// The first message must say who it is, and fit the token.
async fn hello(agent: &Agent, scope: &Scope, socket: &mut WebSocket) -> Result<InstanceId, String> {
    let first = tokio::time::timeout(HELLO_TIMEOUT, async {
        loop {
            match socket.recv().await {
                Some(Ok(Message::Text(text))) => return Ok(text),
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                Some(Ok(_)) => return Err("the first message is not a hello".to_owned()),
                Some(Err(error)) => return Err(error.to_string()),
                None => return Err("it went away".to_owned()),
            }
        }
    });
    let text = tokio::select! {
        first = first => first.map_err(|_| "it said nothing".to_owned())??,
        () = agent.shutdown.stopping() => return Err("the agent ends".into()),
    };
    let Ok(ToAgent::Hello { session_id, instance_id, .. }) = serde_json::from_str(&text) else {
        return Err("the first message is not a hello".into());
    };
    if session_id != scope.session_id {
        return Err(format!("its token is for another session than {session_id}"));
    }
    if scope.instance_id.as_ref().is_some_and(|allowed| *allowed != instance_id) {
        return Err(format!("its token is for another instance than {instance_id}"));
    }
    Ok(instance_id)
}

/// Returns why it ended.
async fn converse(
    agent: &Arc<Agent>,
    session: &SessionId,
    instance: &InstanceId,
    connection: u64,
    socket: &mut WebSocket,
    mut packets: Subscription,
    mut orders: mpsc::Receiver<Order>,
) -> String {
    let down = session_down(session);
    let mut pings = tokio::time::interval(PING_EVERY);
    pings.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut heard = Instant::now();
    loop {
        let outgoing = tokio::select! {
            received = socket.recv() => {
                heard = Instant::now();
                match received {
                    Some(Ok(Message::Text(text))) => {
                        received_text(agent, session, instance, connection, &down, &text);
                        None
                    }
                    Some(Ok(Message::Binary(_))) => {
                        agent.streamers.drop_message(session, "a binary frame of a streamer");
                        None
                    }
                    Some(Ok(Message::Ping(_) | Message::Pong(_))) => None,
                    Some(Ok(Message::Close(_))) | None => return "it closed".into(),
                    Some(Err(error)) => return error.to_string(),
                }
            }
            packet = packets.next() => match packet.map(|packet| packet.json::<Packet>()) {
                Some(Ok(packet)) if packet.session_id == *session && packet.from == Side::Client => {
                    Some(ToStreamer::Link(packet))
                }
                Some(_) => {
                    agent.streamers.drop_message(session, "a packet of a gateway that is none");
                    None
                }
                None => return "the bus has ended".into(),
            },
            order = orders.recv() => match order {
                Some(Order::Send(message)) => Some(message),
                Some(Order::Replaced) | None => return "a newer connection has taken over".into(),
            },
            _ = pings.tick() => {
                if heard.elapsed() > SILENCE {
                    return "it is silent".into();
                }
                if let Err(why) = send(socket, Message::Ping(Bytes::new())).await {
                    return why;
                }
                None
            }
            () = agent.shutdown.stopping() => return "the agent ends".into(),
        };
        if let Some(message) = outgoing {
            let text = serde_json::to_string(&message).expect("texts and numbers can always be written");
            if let Err(why) = send(socket, Message::Text(text.into())).await {
                return why;
            }
        }
    }
}

fn received_text(
    agent: &Arc<Agent>,
    session: &SessionId,
    instance: &InstanceId,
    connection: u64,
    down: &str,
    text: &str,
) {
    match serde_json::from_str(text) {
        Ok(ToAgent::Link(packet)) if packet.session_id == *session && packet.from == Side::Instance => {
            agent.bus.publish_json(down, &Packet { instance_id: Some(instance.clone()), ..packet });
        }
        Ok(ToAgent::Link(_)) => agent.streamers.drop_message(session, "a packet for another session"),
        Ok(ToAgent::Status(status)) => {
            agent.with_sessions(|sessions| {
                sessions.streamer_status(session, connection, status);
                ((), Vec::new())
            });
        }
        Ok(ToAgent::Step(step)) => {
            // The gateway says it to people.
            tracing::debug!(
                session.id = %session, generation = step.generation, step = step.step,
                duration_ms = step.duration_ms, message = step.message,
                "session {session}, client {}: {} after {} ms", step.generation, step.step, step.duration_ms
            );
            agent.with_sessions(|sessions| {
                sessions.streamer_step(session, connection, step);
                ((), Vec::new())
            });
        }
        Ok(ToAgent::Hello { .. }) => agent.streamers.drop_message(session, "a second hello"),
        Err(error) => {
            tracing::debug!(session.id = %session, %error, "a message of a streamer cannot be understood");
            agent.streamers.drop_message(session, "a message of a streamer cannot be understood");
        }
    }
}

async fn send(socket: &mut WebSocket, message: Message) -> Result<(), String> {
    match tokio::time::timeout(SEND_TIMEOUT, socket.send(message)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("it takes no messages".into()),
    }
}

async fn close(socket: &mut WebSocket, code: u16, reason: &str) {
    // The reason of a close frame has at most 123 bytes.
    let mut end = reason.len().min(120);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    let frame = CloseFrame { code, reason: reason[..end].to_owned().into() };
    let _ = tokio::time::timeout(Duration::from_secs(1), socket.send(Message::Close(Some(frame)))).await;
}
