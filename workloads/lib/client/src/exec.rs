//! A program that runs in an instance, as its user has it (ams-api section 5): one websocket for each stream and one to
//! tell it of signals and of the size of the terminal.
//!
//! What is done with the bytes is the caller's affair; nothing is kept here beyond one frame of each stream.

use bytes::Bytes;
use fanlight_api::ams::{
    Operation,
    exec::{ExecControl, ExecFds},
};
use futures_util::{
    SinkExt, StreamExt,
    stream::{SplitSink, SplitStream},
};
use http::HeaderMap;
use tokio::task::JoinHandle;
use tokio_tungstenite::tungstenite::Message;

use crate::{ClientError, Endpoint, WebSocket};

/// Largest frame that is sent, bytes.
const FRAME_BYTES: usize = 32 * 1024;

/// A program that runs. Dropping all of it ends the program as closing a terminal does.
pub struct Exec {
    /// The operation; it ends with the program.
    pub operation: Operation,
    /// Its standard input; with a terminal, what is typed.
    pub input: ExecInput,
    /// Its standard output; with a terminal, everything.
    pub output: ExecOutput,
    /// Its standard error; none with a terminal.
    pub errors: Option<ExecOutput>,
    /// What is said to it.
    pub controls: ExecControls,
}

impl Exec {
    /// Opens the websockets of an operation that an exec began.
    pub(crate) async fn connect(
        endpoint: &Endpoint,
        operation: Operation,
        interactive: bool,
    ) -> Result<Self, ClientError> {
        let metadata = operation.metadata.clone().unwrap_or_default();
        let fds: ExecFds = serde_json::from_value(metadata).map_err(|error| ClientError::Answer {
            method: "POST",
            path: format!("/1.0/operations/{}", operation.id),
            server: endpoint.name(),
            status: http::StatusCode::ACCEPTED,
            reason: error.to_string(),
        })?;
        let open = async |fd: &str| {
            let path = format!("/1.0/operations/{}/websocket", operation.id);
            let secret = fds.fds.get(fd).ok_or_else(|| ClientError::Answer {
                method: "POST",
                path: path.clone(),
                server: endpoint.name(),
                status: http::StatusCode::ACCEPTED,
                reason: format!("there is no secret for the stream {fd}"),
            })?;
            let socket = endpoint
                .websocket_with(&path, &[("secret", secret.expose().to_owned())], HeaderMap::new())
                .await?;
            Ok::<_, ClientError>(Socket { socket, endpoint: endpoint.name(), path })
        };
        // In the order in which the original's client dials; the program starts when all streams are there.
        let controls = open("control").await?;
        let first = open("0").await?;
        if interactive {
            let (input, output) = first.both();
            return Ok(Self { controls: controls.controls(), operation, input, output, errors: None });
        }
        let output = open("1").await?.output();
        let errors = open("2").await?.output();
        let input = first.input();
        Ok(Self { controls: controls.controls(), operation, input, output, errors: Some(errors) })
    }
}

struct Socket {
    socket: WebSocket,
    endpoint: String,
    path: String,
}

impl Socket {
    fn both(self) -> (ExecInput, ExecOutput) {
        let (sink, stream) = self.socket.split();
        let name = Name { endpoint: self.endpoint, path: self.path };
        (ExecInput { sink, name: name.clone(), _reader: None }, ExecOutput { stream, name })
    }

    /// Somebody must read, or the server's pings have no answer.
    fn input(self) -> ExecInput {
        let (sink, stream) = self.socket.split();
        let name = Name { endpoint: self.endpoint, path: self.path };
        ExecInput { sink, name, _reader: Some(Reader(tokio::spawn(drain(stream)))) }
    }

    fn output(self) -> ExecOutput {
        let (_, stream) = self.socket.split();
        let name = Name { endpoint: self.endpoint, path: self.path };
        ExecOutput { stream, name }
    }

    fn controls(self) -> ExecControls {
        ExecControls(self.input())
    }
}

async fn drain(mut stream: SplitStream<WebSocket>) {
    while let Some(Ok(_)) = stream.next().await {}
}

struct Reader(JoinHandle<()>);

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Which connection it is, for errors.
#[derive(Clone)]
struct Name {
    endpoint: String,
    path: String,
}

impl Name {
    fn lost(&self, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ClientError {
        ClientError::Unreachable {
            method: "GET",
            path: self.path.clone(),
            server: self.endpoint.clone(),
            source: error.into(),
        }
    }
}

/// The standard input of a program.
pub struct ExecInput {
    sink: SplitSink<WebSocket, Message>,
    name: Name,
    _reader: Option<Reader>,
}

impl ExecInput {
    /// Gives these bytes to the program; waits while it does not take them.
    ///
    /// # Errors
    /// The connection is lost, or the program has ended.
    pub async fn write(&mut self, bytes: &Bytes) -> Result<(), ClientError> {
        let mut at = 0;
        while at < bytes.len() {
            let end = (at + FRAME_BYTES).min(bytes.len());
            let frame = Message::Binary(bytes.slice(at..end));
            self.sink.send(frame).await.map_err(|error| self.name.lost(error))?;
            at = end;
        }
        Ok(())
    }

    /// Tells the program that nothing more comes. Not for terminals, whose one stream carries the output too.
    ///
    /// # Errors
    /// The connection is lost, or the program has ended.
    pub async fn finish(mut self) -> Result<(), ClientError> {
        self.sink.close().await.map_err(|error| self.name.lost(error))
    }
}

/// The standard output or error of a program.
pub struct ExecOutput {
    stream: SplitStream<WebSocket>,
    name: Name,
}

impl ExecOutput {
    /// The next bytes; none when there are no more.
    ///
    /// # Errors
    /// The connection is lost before the end of the stream.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        loop {
            match self.stream.next().await {
                Some(Ok(Message::Binary(bytes))) if bytes.is_empty() => {}
                Some(Ok(Message::Binary(bytes))) => return Ok(Some(bytes)),
                // An empty text is the end of the stream.
                Some(Ok(Message::Text(text))) if text.is_empty() => return Ok(None),
                Some(Ok(Message::Close(_))) | None => return Ok(None),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(self.name.lost(error)),
            }
        }
    }
}

/// What is said to a program beside its input.
pub struct ExecControls(ExecInput);

impl ExecControls {
    /// The terminal has another size.
    ///
    /// # Errors
    /// The connection is lost, or the program has ended.
    pub async fn resize(&mut self, columns: u16, rows: u16) -> Result<(), ClientError> {
        let args = [("width", columns), ("height", rows)];
        let args = args.map(|(name, value)| (name.to_owned(), value.to_string())).into();
        self.say(&ExecControl { command: "window-resize".into(), args, signal: 0 }).await
    }

    /// Sends a signal, by number.
    ///
    /// # Errors
    /// The connection is lost, or the program has ended.
    pub async fn signal(&mut self, number: i32) -> Result<(), ClientError> {
        self.say(&ExecControl { command: "signal".into(), signal: number, ..ExecControl::default() }).await
    }

    async fn say(&mut self, control: &ExecControl) -> Result<(), ClientError> {
        let text = serde_json::to_string(control).expect("texts and numbers always serialise");
        self.0.sink.send(Message::Text(text.into())).await.map_err(|error| self.0.name.lost(error))
    }
}
