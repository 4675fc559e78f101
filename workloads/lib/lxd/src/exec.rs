//! A program that is run in an instance: one websocket for each stream, and one to tell it of signals and of the size
//! of the terminal.

use std::{collections::BTreeMap, io::ErrorKind, sync::Arc, time::Duration};

use bytes::Bytes;
use fanlight_client::WebSocket;
use futures_util::{
    SinkExt, StreamExt,
    stream::{SplitSink, SplitStream},
};
use http::{HeaderMap, Method};
use serde_json::{Value, json};
use tokio::{
    sync::{Mutex, mpsc},
    task::JoinHandle,
};
use tokio_tungstenite::tungstenite::{Error, Message};

use crate::{
    Lxd, LxdError, Operation,
    call::{Call, part},
};

/// Largest frame that is sent, bytes.
const FRAME_BYTES: usize = 32 * 1024;

/// How many frames of an output are read before somebody takes them.
const FRAMES_AHEAD: usize = 64;

/// How a program is run.
#[derive(Clone, Debug, Default)]
pub struct ExecOptions {
    /// The program and its arguments.
    pub command: Vec<String>,
    /// Its environment, beside what LXD gives it.
    pub environment: BTreeMap<String, String>,
    /// The folder it starts in; none: the home of its user.
    pub folder: Option<String>,
    /// Its user in the instance.
    pub uid: u32,
    /// Its group in the instance.
    pub gid: u32,
    /// With a terminal of so many columns and rows; then there is one stream for everything.
    pub terminal: Option<(u16, u16)>,
}

/// A program that runs. Dropping all of it ends its streams.
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

/// The standard input of a program.
pub struct ExecInput {
    sink: Sink,
    call: String,
    _reader: Option<Reader>,
}

/// Shared with the reader of the same stream.
type Sink = Arc<Mutex<SplitSink<WebSocket, Message>>>;

/// The standard output or error of a program.
pub struct ExecOutput {
    frames: mpsc::Receiver<Result<Bytes, LxdError>>,
    _reader: Reader,
}

/// What is said to a program beside its input.
pub struct ExecControls(ExecInput);

/// Somebody must read, or the server's pings have no answer.
struct Reader(JoinHandle<()>);

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Lxd {
    /// Runs a program in a running instance.
    ///
    /// # Errors
    /// The call fails. A program that is not there shows as the exit code 127 later.
    pub async fn exec(&self, instance: &str, options: &ExecOptions) -> Result<Exec, LxdError> {
        let path = format!("/1.0/instances/{}/exec", part(instance));
        let (width, height) = options.terminal.unwrap_or_default();
        let body = json!({
            "command": options.command,
            "environment": options.environment,
            "cwd": options.folder.as_deref().unwrap_or_default(),
            "user": options.uid,
            "group": options.gid,
            "wait-for-websocket": true,
            "record-output": false,
            "interactive": options.terminal.is_some(),
            "width": width,
            "height": height,
        });
        let operation = self.begin(Call::new(Method::POST, &path).json(&body)).await?;
        let fds = operation.metadata["metadata"]["fds"].clone();
        // The program starts when all streams are there.
        let controls = ExecControls(self.stream(&operation, &fds, "control").await?.input());
        let first = self.stream(&operation, &fds, "0").await?;
        if options.terminal.is_some() {
            let (input, output) = first.both();
            return Ok(Exec { operation, input, output, errors: None, controls });
        }
        let output = self.stream(&operation, &fds, "1").await?.output();
        let errors = Some(self.stream(&operation, &fds, "2").await?.output());
        Ok(Exec { operation, input: first.input(), output, errors, controls })
    }

    async fn stream(&self, operation: &Operation, fds: &Value, fd: &str) -> Result<Socket, LxdError> {
        let Some(secret) = fds[fd].as_str() else {
            let reason = format!("there is no secret for the stream {fd}");
            return Err(LxdError::Answer { call: operation.call.clone(), reason });
        };
        let path = format!("/1.0/operations/{}/websocket", part(&operation.id));
        let query = [("secret", secret.to_owned())];
        let socket = self.endpoint.websocket_with(&path, &query, HeaderMap::new()).await?;
        Ok(Socket { socket, call: operation.call.clone() })
    }
}

impl Exec {
    /// Waits until the program has ended; its exit code.
    ///
    /// # Errors
    /// It goes on after this time, or LXD could not run it.
    pub async fn wait(&self, timeout: Duration) -> Result<i32, LxdError> {
        let outcome = self.operation.wait(timeout).await?;
        let code = outcome.metadata.as_ref().and_then(|metadata| metadata["return"].as_i64());
        code.and_then(|code| i32::try_from(code).ok()).ok_or_else(|| LxdError::Answer {
            call: self.operation.call.clone(),
            reason: "there is no exit code in it".into(),
        })
    }
}

struct Socket {
    socket: WebSocket,
    call: String,
}

impl Socket {
    fn both(self) -> (ExecInput, ExecOutput) {
        let (sink, stream) = self.socket.split();
        let (sink, call) = (Arc::new(Mutex::new(sink)), self.call);
        let answers = Some(sink.clone());
        (ExecInput { sink, call: call.clone(), _reader: None }, ExecOutput::new(stream, call, answers))
    }

    fn input(self) -> ExecInput {
        let (sink, mut stream) = self.socket.split();
        let reader = tokio::spawn(async move { while let Some(Ok(_)) = stream.next().await {} });
        ExecInput { sink: Arc::new(Mutex::new(sink)), call: self.call, _reader: Some(Reader(reader)) }
    }

    fn output(self) -> ExecOutput {
        let (_, stream) = self.socket.split();
        ExecOutput::new(stream, self.call, None)
    }
}

/// What ends a stream to LXD: an empty text.
fn end() -> Message {
    Message::Text("".into())
}

fn lost(call: &str, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> LxdError {
    LxdError::Unreachable { call: call.into(), source: error.into() }
}

impl ExecInput {
    /// Gives these bytes to the program; waits while it does not take them.
    ///
    /// # Errors
    /// The connection is lost, or the program has ended.
    pub async fn write(&mut self, bytes: &Bytes) -> Result<(), LxdError> {
        let mut at = 0;
        while at < bytes.len() {
            let end = (at + FRAME_BYTES).min(bytes.len());
            let frame = Message::Binary(bytes.slice(at..end));
            self.sink.lock().await.send(frame).await.map_err(|error| lost(&self.call, error))?;
            at = end;
        }
        Ok(())
    }

    /// Tells the program that nothing more comes. Not for terminals, whose one stream carries the output too.
    ///
    /// # Errors
    /// The connection is lost, or the program has ended.
    pub async fn finish(&mut self) -> Result<(), LxdError> {
        self.sink.lock().await.send(end()).await.map_err(|error| lost(&self.call, error))
    }
}

impl ExecOutput {
    /// Reads ahead: LXD pings, and closes without waiting for answers, so that what is read late may be lost. `answers`: of
    /// a stream that goes both ways. LXD ends the program only when it has heard of both ends.
    fn new(mut stream: SplitStream<WebSocket>, call: String, answers: Option<Sink>) -> Self {
        let (sender, frames) = mpsc::channel(FRAMES_AHEAD);
        let read = async move {
            while let Some(message) = stream.next().await {
                let result = match message {
                    Ok(Message::Binary(bytes)) if bytes.is_empty() => continue,
                    Ok(Message::Binary(bytes)) => Ok(bytes),
                    Ok(Message::Text(text)) if text.is_empty() => break,
                    Ok(Message::Close(_)) => break,
                    Ok(_) => continue,
                    // LXD said that it closes the stream and did not wait for our answer to that.
                    Err(Error::Io(error)) if error.kind() == ErrorKind::BrokenPipe => break,
                    Err(error) => Err(lost(&call, error)),
                };
                if sender.send(result).await.is_err() {
                    break;
                }
            }
            if let Some(answers) = answers {
                // A stream that is closed needs no answer.
                let _ = answers.lock().await.send(end()).await;
            }
        };
        Self { frames, _reader: Reader(tokio::spawn(read)) }
    }

    /// The next bytes; none when there are no more. All outputs of a program are to be read at the same time.
    ///
    /// # Errors
    /// The connection is lost before the end of the stream.
    pub async fn next(&mut self) -> Result<Option<Bytes>, LxdError> {
        self.frames.recv().await.transpose()
    }
}

impl ExecControls {
    /// The terminal has another size.
    ///
    /// # Errors
    /// The connection is lost, or the program has ended.
    pub async fn resize(&mut self, columns: u16, rows: u16) -> Result<(), LxdError> {
        let args = json!({ "width": columns.to_string(), "height": rows.to_string() });
        self.say(json!({ "command": "window-resize", "args": args })).await
    }

    /// Sends a signal, by number.
    ///
    /// # Errors
    /// The connection is lost, or the program has ended.
    pub async fn signal(&mut self, number: i32) -> Result<(), LxdError> {
        self.say(json!({ "command": "signal", "signal": number })).await
    }

    async fn say(&mut self, words: Value) -> Result<(), LxdError> {
        let frame = Message::Text(words.to_string().into());
        self.0.sink.lock().await.send(frame).await.map_err(|error| lost(&self.0.call, error))
    }
}
