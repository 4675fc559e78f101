//! Programs in running instances, brought to their users over websockets (ams-api section 5). The engine runs them; here
//! is who may connect, what goes through, and when the operation ends.
//!
//! The secrets are in the answer to who began and in the memory of this unit, never in the store or in an event.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::{
    extract::{
        Path, State,
        ws::{Message, WebSocket, WebSocketUpgrade, rejection::WebSocketUpgradeRejection},
    },
    response::Response,
};
use bytes::Bytes;
use fanlight_api::{
    InstanceId, OperationId, Secret,
    ams::{
        InstanceStatus,
        exec::{ExecControl, ExecFds, ExecPost},
    },
};
use fanlight_service::{
    ApiError,
    http::{Json, Query},
};
use futures_util::{
    SinkExt as _, StreamExt as _,
    stream::{SplitSink, SplitStream},
};
use serde::Deserialize;
use serde_json::json;
use subtle::ConstantTimeEq as _;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    sync::mpsc,
    time::{Instant, Interval, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{accepted, store_error};
use crate::{
    Ams,
    engine::{Control, EngineError, Exec, Running},
};

/// How long the streams may take to be there.
const CONNECT: Duration = Duration::from_secs(30);
/// Between pings.
const PING: Duration = Duration::from_secs(30);
/// Pings without an answer after which nobody is there.
const MOST_PINGS: u32 = 2;
/// How long a program that ended may be silent before its output counts as complete: what it left behind may hold it
/// open for ever.
const SILENCE: Duration = Duration::from_millis(500);
/// How long the last output may take to go out.
const LAST_WORDS: Duration = Duration::from_secs(60);
/// How long the end of a program that was hung up on may take.
const GOODBYE: Duration = Duration::from_secs(15);
/// Most bytes in one frame, and on the way from the program to its user.
const FRAME: usize = 32 * 1024;
/// Most bytes of a frame that comes in.
const MOST_BYTES: usize = 1 << 20;
const CONTROL: &str = "control";

/// The programs that wait for their users, or talk to them. Of this unit alone.
#[derive(Default)]
pub(crate) struct Execs {
    open: Mutex<HashMap<OperationId, Open>>,
}

struct Open {
    /// Those not used yet.
    secrets: BTreeMap<String, Secret>,
    sockets: mpsc::Sender<(String, WebSocket)>,
    cancelled: CancellationToken,
}

impl Execs {
    fn lock(&self) -> MutexGuard<'_, HashMap<OperationId, Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Which stream a secret opens. It opens it once.
    fn take(&self, id: &OperationId, secret: &str) -> Option<(String, mpsc::Sender<(String, WebSocket)>)> {
        let mut open = self.lock();
        let open = open.get_mut(id)?;
        let same = |other: &Secret| bool::from(other.expose().as_bytes().ct_eq(secret.as_bytes()));
        let name = open.secrets.iter().find(|(_, other)| same(other))?.0.clone();
        open.secrets.remove(&name);
        Some((name, open.sockets.clone()))
    }

    /// Ends a program at the wish of somebody. False: there is none.
    pub(super) fn cancel(&self, id: &OperationId) -> bool {
        self.lock().get(id).map(|open| open.cancelled.cancel()).is_some()
    }
}

pub(super) async fn create(
    State(ams): State<Ams>,
    Path(id): Path<String>,
    Json(request): Json<ExecPost>,
) -> Result<Response, ApiError> {
    let record = ams.find_instance(&id).await?.value;
    if !matches!(record.observed.status, InstanceStatus::Started | InstanceStatus::Running) {
        return Err(EngineError::NotRunning(record.id.clone()).into());
    }
    if request.command.first().is_none_or(|program| program.is_empty() || program.starts_with('-')) {
        return Err(ApiError::bad_request(
            "invalid-argument",
            "command is required: a program, then its arguments",
        ));
    }
    let or = |size: u16, usual: u16| if size == 0 { usual } else { size };
    let exec = Exec {
        command: request.command,
        environment: request.environment,
        terminal: request.interactive.then(|| (or(request.width, 80), or(request.height, 24))),
    };
    let data: &[&str] = if request.interactive { &["0"] } else { &["0", "1", "2"] };
    let secrets: BTreeMap<String, Secret> = data
        .iter()
        .chain(&[CONTROL])
        .map(|name| {
            let secret: [u8; 32] = rand::random();
            ((*name).to_owned(), Secret::new(hex::encode(secret)))
        })
        .collect();
    let begun = ams.operations.begin_exec(&record.url()).await.map_err(store_error)?;
    let id = begun.operation.id.clone();
    let (sender, sockets) = mpsc::channel(4);
    let cancelled = CancellationToken::new();
    let open = Open { secrets: secrets.clone(), sockets: sender, cancelled: cancelled.clone() };
    ams.execs.lock().insert(id.clone(), open);
    let mut answer = begun;
    answer.operation.metadata =
        Some(serde_json::to_value(ExecFds { fds: secrets }).map_err(ApiError::internal)?);
    let session = Session { instance: record.id.clone(), exec, data: data.len(), sockets, cancelled };
    let work = ams.clone();
    ams.shutdown.spawn("exec", async move {
        let result = session.run(&work).await;
        work.execs.lock().remove(&id);
        if let Err(error) = work.operations.end_exec(&id, result).await {
            tracing::warn!(
                "writing the end of operation {id}: {}",
                fanlight_service::telemetry::chain(&error)
            );
        }
    });
    Ok(accepted(&answer))
}

#[derive(Deserialize)]
pub(super) struct Key {
    #[serde(default)]
    secret: String,
}

/// One stream of a program. The secret is all that is asked for.
pub(super) async fn websocket(
    State(ams): State<Ams>,
    Path(id): Path<String>,
    Query(key): Query<Key>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    // Before the secret is used up.
    let upgrade = upgrade.map_err(|_| {
        ApiError::bad_request("websocket-needed", "streams of programs are read with a websocket")
    })?;
    let taken = id.parse().ok().and_then(|id| ams.execs.take(&id, &key.secret));
    let (name, sockets) = taken.ok_or_else(|| {
        ApiError::forbidden(
            "invalid-secret",
            "there is no such operation here, or its secret is wrong or was used",
        )
    })?;
    Ok(upgrade.max_message_size(MOST_BYTES).on_upgrade(async move |socket| {
        // The program may have ended meanwhile.
        let _ = sockets.send((name, socket)).await;
    }))
}

/// How a program's operation ends.
pub(crate) enum End {
    /// It ran.
    Status(i32),
    /// Somebody cancelled it.
    Cancelled,
    /// It did not run.
    Failed(String),
}

struct Session {
    instance: InstanceId,
    exec: Exec,
    /// How many streams there must be before it begins.
    data: usize,
    sockets: mpsc::Receiver<(String, WebSocket)>,
    cancelled: CancellationToken,
}

impl Session {
    async fn run(mut self, ams: &Ams) -> End {
        let mut streams = BTreeMap::new();
        let mut control = None;
        let connected = async {
            while streams.len() < self.data {
                let Some((name, socket)) = self.sockets.recv().await else { return };
                match name.as_str() {
                    CONTROL => control = Some(socket),
                    _ => drop(streams.insert(name, socket)),
                }
            }
        };
        tokio::select! {
            connected = timeout(CONNECT, connected) => if connected.is_err() {
                return End::Failed(format!("the streams were not opened within {} s", CONNECT.as_secs()));
            },
            () = self.cancelled.cancelled() => return End::Cancelled,
            () = ams.shutdown.stopping() => return End::Failed("AMS was stopped".into()),
        }
        let running = match ams.engine.exec(&self.instance, self.exec.clone()).await {
            Ok(running) => running,
            Err(error) => return End::Failed(fanlight_service::telemetry::chain(&error)),
        };
        self.serve(ams, running, streams, control).await
    }

    async fn serve(
        mut self,
        ams: &Ams,
        running: Running,
        mut streams: BTreeMap<String, WebSocket>,
        control: Option<WebSocket>,
    ) -> End {
        let Running { stdin, stdout, stderr, control: say, mut ended } = running;
        let interactive = stderr.is_none();
        let over = CancellationToken::new();
        let (Some(first), second, third) = (streams.remove("0"), streams.remove("1"), streams.remove("2"))
        else {
            return End::Failed("the streams are not there".into());
        };
        // Each resolves when its stream is done, and says whether its user is gone.
        let (to_first, from_first) = first.split();
        let input = typed(from_first, stdin);
        let output = async {
            match (second, third, stderr) {
                (Some(second), Some(third), Some(stderr)) => {
                    let alone = typed_pings(to_first);
                    let (to_second, from_second) = second.split();
                    let (to_third, from_third) = third.split();
                    let both = async {
                        let (a, b) = tokio::join!(
                            told(stdout, to_second, Some(from_second), &over),
                            told(stderr, to_third, Some(from_third), &over)
                        );
                        a && b
                    };
                    tokio::select! { gone = both => gone, never = alone => never }
                }
                _ => told(stdout, to_first, None, &over).await,
            }
        };
        let controls = async {
            let socket = match control {
                Some(socket) => Some(socket),
                None => later(&mut self.sockets).await,
            };
            if let Some(socket) = socket {
                listen(socket, &say, interactive).await;
            }
            std::future::pending::<()>().await
        };
        tokio::pin!(input, output, controls);
        let (mut typing, mut telling) = (true, true);
        let mut status = None;
        let mut hung_up = false;
        let mut limit = None;
        let mut cancelled = false;
        loop {
            if status.is_some() && (!telling || hung_up) {
                break;
            }
            tokio::select! {
                code = &mut ended, if status.is_none() => {
                    status = Some(code.unwrap_or(-1));
                    over.cancel();
                    limit = Some(Instant::now() + LAST_WORDS);
                }
                () = &mut input, if typing => {
                    typing = false;
                    // The one stream of a terminal: its user is gone.
                    hung_up |= interactive;
                }
                gone = &mut output, if telling => {
                    telling = false;
                    hung_up |= gone;
                }
                () = &mut controls => {}
                () = self.cancelled.cancelled(), if !cancelled => {
                    cancelled = true;
                    hung_up = true;
                }
                () = ams.shutdown.stopping() => return End::Failed("AMS was stopped".into()),
                () = tokio::time::sleep_until(limit.unwrap_or_else(Instant::now)), if limit.is_some() => break,
            }
            if hung_up && status.is_none() && limit.is_none() {
                // Full: it is being told something already; it is told this when all is dropped.
                let _ = say.try_send(Control::HangUp);
                limit = Some(Instant::now() + GOODBYE);
            }
        }
        match status {
            _ if cancelled => End::Cancelled,
            Some(code) => End::Status(code),
            None => End::Failed("the program does not end".into()),
        }
    }
}

/// The control stream, whenever it comes.
async fn later(sockets: &mut mpsc::Receiver<(String, WebSocket)>) -> Option<WebSocket> {
    loop {
        let (name, socket) = sockets.recv().await?;
        if name == CONTROL {
            return Some(socket);
        }
    }
}

fn pings() -> Interval {
    let mut interval = tokio::time::interval(PING);
    interval.reset();
    interval
}

/// What is typed, until its end. A connection that is lost is the end like any other.
async fn typed(mut from: SplitStream<WebSocket>, mut to: impl AsyncWrite + Unpin) {
    let mut listening = true;
    while let Some(Ok(message)) = from.next().await {
        let bytes = match message {
            Message::Binary(bytes) => bytes,
            Message::Text(text) if !text.is_empty() => Bytes::from(text),
            Message::Text(_) | Message::Close(_) => break,
            Message::Ping(_) | Message::Pong(_) => continue,
        };
        // A program that reads no more may still say something.
        if listening && (to.write_all(&bytes).await.is_err() || to.flush().await.is_err()) {
            listening = false;
        }
    }
    let _ = to.shutdown().await;
}

/// Keeps the connection of the input open. Never resolves.
async fn typed_pings(mut to: SplitSink<WebSocket, Message>) -> bool {
    let mut ping = pings();
    loop {
        ping.tick().await;
        if to.send(Message::Ping(Bytes::new())).await.is_err() {
            return std::future::pending().await;
        }
    }
}

/// Brings output to its user, and gives whether the user is gone. At most one frame is on the way.
async fn told(
    mut from: impl AsyncRead + Unpin,
    mut to: SplitSink<WebSocket, Message>,
    mut back: Option<SplitStream<WebSocket>>,
    over: &CancellationToken,
) -> bool {
    let mut buffer = vec![0; FRAME];
    let mut ping = pings();
    let mut unanswered = 0;
    loop {
        let message = tokio::select! {
            read = from.read(&mut buffer) => match read {
                Ok(length @ 1..) => Message::Binary(Bytes::copy_from_slice(&buffer[..length])),
                Ok(0) | Err(_) => break,
            },
            () = async { over.cancelled().await; tokio::time::sleep(SILENCE).await } => break,
            _ = ping.tick() => {
                unanswered += u32::from(back.is_some());
                if unanswered > MOST_PINGS {
                    return true;
                }
                Message::Ping(Bytes::new())
            }
            answer = answer(&mut back) => match answer {
                Some(Ok(Message::Close(_)) | Err(_)) | None => return true,
                Some(Ok(_)) => {
                    unanswered = 0;
                    continue;
                }
            },
        };
        if to.send(message).await.is_err() {
            return true;
        }
    }
    // An empty text is the end of the stream.
    let _ = to.send(Message::Text("".into())).await;
    let _ = to.send(Message::Close(None)).await;
    false
}

async fn answer(back: &mut Option<SplitStream<WebSocket>>) -> Option<Result<Message, axum::Error>> {
    match back {
        Some(back) => back.next().await,
        None => std::future::pending().await,
    }
}

/// Hears what is said to a program, until the connection is over.
async fn listen(mut socket: WebSocket, say: &mpsc::Sender<Control>, interactive: bool) {
    let mut ping = pings();
    let mut unanswered = 0;
    loop {
        tokio::select! {
            message = socket.recv() => match message {
                Some(Ok(Message::Text(text))) => {
                    let said = serde_json::from_str(&text).ok().and_then(|said| understand(&said));
                    match said {
                        Some(control) if say.send(control).await.is_err() => return,
                        Some(_) => {}
                        None => tracing::debug!("a control message was not understood"),
                    }
                }
                Some(Ok(Message::Close(_)) | Err(_)) | None => break,
                Some(Ok(_)) => unanswered = 0,
            },
            _ = ping.tick() => {
                unanswered += 1;
                if unanswered > MOST_PINGS || socket.send(Message::Ping(Bytes::new())).await.is_err() {
                    break;
                }
            }
        }
    }
    if interactive {
        // As when a terminal is closed; what does not mind goes on.
        let _ = say.send(Control::Signal(1)).await;
    }
}

fn understand(said: &ExecControl) -> Option<Control> {
    let size = |name: &str| said.args.get(name)?.parse::<u16>().ok().filter(|size| *size > 0);
    match said.command.as_str() {
        "window-resize" => Some(Control::Resize(size("width")?, size("height")?)),
        "signal" if (1..=64).contains(&said.signal) => Some(Control::Signal(said.signal)),
        _ => None,
    }
}

impl End {
    /// What the operation says of it.
    pub(crate) fn metadata(&self) -> Option<serde_json::Value> {
        match self {
            Self::Status(code) => Some(json!({"return": code})),
            Self::Cancelled | Self::Failed(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_messages_are_understood_or_refused() {
        let said = |text: &str| understand(&serde_json::from_str(text).expect("JSON"));
        assert_eq!(
            said(r#"{"command":"window-resize","args":{"width":"80","height":"24"},"signal":0}"#),
            Some(Control::Resize(80, 24))
        );
        assert_eq!(said(r#"{"command":"signal","signal":15}"#), Some(Control::Signal(15)));
        for bad in [
            r#"{"command":"window-resize","args":{"width":"80"}}"#,
            r#"{"command":"window-resize","args":{"width":"-1","height":"24"}}"#,
            r#"{"command":"signal","signal":0}"#,
            r#"{"command":"signal","signal":65}"#,
            r#"{"command":"reboot"}"#,
        ] {
            assert_eq!(said(bad), None, "{bad}");
        }
    }
}
