//! What can go wrong with a request.

use std::{path::PathBuf, time::Duration};

use http::StatusCode;

/// Why a request has no good answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The address of the server is wrong.
    #[error("address {url:?} is invalid: {reason}")]
    Address {
        /// As given.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A file of a certificate or key cannot be read or used.
    #[error("{what} {path:?} cannot be used: {reason}")]
    File {
        /// `certificate`, `key` or `CA certificate`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// Settings of TLS that do not go together.
    #[error("setting up TLS")]
    Tls(#[source] rustls::Error),
    /// The server cannot be reached, or went away before it had answered.
    #[error("{method} {path}: {server} cannot be reached")]
    Unreachable {
        /// HTTP method.
        method: &'static str,
        /// Path.
        path: String,
        /// Address of the server.
        server: String,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No answer in time.
    #[error("{method} {path}: no answer from {server} within {} s", .timeout.as_secs())]
    TimedOut {
        /// HTTP method.
        method: &'static str,
        /// Path.
        path: String,
        /// Address of the server.
        server: String,
        /// How long an answer was waited for.
        timeout: Duration,
    },
    /// The server refused or failed, in its own words.
    #[error("{text} ({method} {path}: {status})")]
    Refused {
        /// HTTP method.
        method: &'static str,
        /// Path.
        path: String,
        /// HTTP status.
        status: StatusCode,
        /// Stable code, if the server gave one.
        code: String,
        /// What the server says.
        text: String,
        /// Id of the request in the server's log, if it gave one.
        request_id: String,
    },
    /// The answer is not what it should be.
    #[error("{method} {path}: the answer of {server} ({status}) cannot be understood: {reason}")]
    Answer {
        /// HTTP method.
        method: &'static str,
        /// Path.
        path: String,
        /// Address of the server.
        server: String,
        /// HTTP status.
        status: StatusCode,
        /// What is wrong with it.
        reason: String,
    },
    /// An operation of AMS ended with an error.
    #[error("{description}: {text}")]
    Operation {
        /// What the operation does.
        description: String,
        /// Why it failed.
        text: String,
    },
}

impl ClientError {
    /// The HTTP status of a refusal.
    pub fn status(&self) -> Option<StatusCode> {
        match self {
            Self::Refused { status, .. } | Self::Answer { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// The server's stable code of a refusal; empty otherwise.
    pub fn code(&self) -> &str {
        match self {
            Self::Refused { code, .. } => code,
            _ => "",
        }
    }

    /// Whether the object does not exist.
    pub fn is_not_found(&self) -> bool {
        self.status() == Some(StatusCode::NOT_FOUND)
    }

    /// Whether the same request may succeed later: nothing says that it is wrong. Whether it was carried out
    /// is not known.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::TimedOut { .. } | Self::Answer { .. } => true,
            Self::Refused { status, .. } => {
                status.is_server_error()
                    || matches!(*status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT)
            }
            _ => false,
        }
    }

    /// The error with all its causes in one line.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            let part = error.to_string();
            if !text.contains(&part) {
                text.push_str(": ");
                text.push_str(&part);
            }
            cause = error.source();
        }
        text
    }
}
