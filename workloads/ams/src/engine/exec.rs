//! A program that runs in an instance beside the application, as the engine hands it out. How it is brought to the
//! client is the affair of the API.

use std::{collections::BTreeMap, pin::Pin};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{mpsc, oneshot},
};

/// What to run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exec {
    /// Program and arguments; no shell.
    pub command: Vec<String>,
    /// Added to the environment.
    pub environment: BTreeMap<String, String>,
    /// Columns and rows of its terminal; none: no terminal.
    pub terminal: Option<(u16, u16)>,
}

/// What can be said to a program that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// The terminal has another size: columns and rows.
    Resize(u16, u16),
    /// A signal, by number.
    Signal(i32),
    /// Its user is gone.
    HangUp,
}

/// A program that runs. Dropping all of it ends the program as closing a terminal does.
pub struct Running {
    /// Its standard input; with a terminal, what is typed. Dropping it is the end of the input.
    pub stdin: Pin<Box<dyn AsyncWrite + Send>>,
    /// Its standard output; with a terminal, everything.
    pub stdout: Pin<Box<dyn AsyncRead + Send>>,
    /// Its standard error; none with a terminal.
    pub stderr: Option<Pin<Box<dyn AsyncRead + Send>>>,
    /// What is said to it.
    pub control: mpsc::Sender<Control>,
    /// Its exit status, 128 + n for the end by signal n; an error when nobody knows any more.
    pub ended: oneshot::Receiver<i32>,
}
