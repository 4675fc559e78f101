//! What can go wrong with a call. Errors name the call and carry LXD's own text.

use std::time::Duration;

use fanlight_client::ClientError;
use http::StatusCode;

/// Why a call has no good answer.
#[derive(Debug, thiserror::Error)]
pub enum LxdError {
    /// What the call is about does not exist.
    #[error("LXD: {call}: {text}")]
    NotFound {
        /// Method and path.
        call: String,
        /// What LXD says.
        text: String,
    },
    /// What should be made exists already.
    #[error("LXD: {call}: {text}")]
    Exists {
        /// Method and path.
        call: String,
        /// What LXD says.
        text: String,
    },
    /// It was changed by somebody else since it was read.
    #[error("LXD: {call}: {text}")]
    Precondition {
        /// Method and path.
        call: String,
        /// What LXD says.
        text: String,
    },
    /// LXD refused, or failed at once.
    #[error("LXD: {call}: {text} ({status})")]
    Refused {
        /// Method and path.
        call: String,
        /// HTTP status.
        status: StatusCode,
        /// What LXD says.
        text: String,
    },
    /// Work in the background failed or was cancelled.
    #[error("LXD: {call}: {text}")]
    Failed {
        /// What was to be done.
        call: String,
        /// What LXD says.
        text: String,
    },
    /// Nothing came in time.
    #[error("LXD: {call}: no answer within {} s", .timeout.as_secs())]
    TimedOut {
        /// Method and path.
        call: String,
        /// How long an answer was waited for.
        timeout: Duration,
    },
    /// The answer is not what it should be.
    #[error("LXD: {call}: the answer cannot be understood: {reason}")]
    Answer {
        /// Method and path.
        call: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A file of ours cannot be read.
    #[error("reading {path}")]
    File {
        /// The file.
        path: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// What the caller gave cannot be used.
    #[error("{what}: {reason}")]
    Invalid {
        /// Which value.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The server cannot be reached, or went away before it had answered.
    #[error("LXD: {call}")]
    Unreachable {
        /// Method and path.
        call: String,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The connection cannot be set up.
    #[error("connecting to LXD")]
    Client(#[from] ClientError),
}

impl LxdError {
    /// The refusal with this status and text, by kind. Releases differ in the status of names that are taken, so the
    /// text decides too.
    pub(crate) fn refused(call: String, status: StatusCode, text: String) -> Self {
        match status {
            StatusCode::NOT_FOUND => Self::NotFound { call, text },
            StatusCode::PRECONDITION_FAILED => Self::Precondition { call, text },
            _ if status == StatusCode::CONFLICT || is_taken(&text) => Self::Exists { call, text },
            _ => Self::Refused { call, status, text },
        }
    }

    /// The failure of work in the background, by kind.
    pub(crate) fn failed(call: String, text: String) -> Self {
        if is_taken(&text) { Self::Exists { call, text } } else { Self::Failed { call, text } }
    }

    /// What the call is about does not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }

    /// What should be made exists already.
    pub fn is_exists(&self) -> bool {
        matches!(self, Self::Exists { .. })
    }

    /// LXD does something else with the same instance; a moment later it may go.
    pub fn is_busy(&self) -> bool {
        match self {
            Self::Refused { text, .. } | Self::Failed { text, .. } => text.contains("is busy running"),
            _ => false,
        }
    }

    /// The system in a container was not begun, whatever it holds: liblxc, or a hook of LXD itself, did not get that far.
    pub fn is_failed_start(&self) -> bool {
        matches!(self, Self::Failed { text, .. } if text.contains("forkstart"))
    }

    /// It was changed by somebody else since it was read.
    pub fn is_precondition(&self) -> bool {
        matches!(self, Self::Precondition { .. })
    }
}

fn is_taken(text: &str) -> bool {
    text.contains("already exists") || text.contains("same fingerprint")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_told_apart_by_status_and_text() {
        let kind = |status, text: &str| {
            LxdError::refused(
                "GET /1.0/x".into(),
                StatusCode::from_u16(status).expect("a status"),
                text.into(),
            )
        };
        assert!(kind(404, "Instance not found").is_not_found());
        assert!(kind(412, "Precondition failed").is_precondition());
        assert!(kind(409, "whatever").is_exists());
        assert!(kind(400, "Instance \"c1\" already exists").is_exists());
        let other = kind(400, "Bad name");
        assert!(matches!(&other, LxdError::Refused { .. }));
        assert_eq!(other.to_string(), "LXD: GET /1.0/x: Bad name (400 Bad Request)");
        assert!(
            LxdError::failed("x".into(), "Image with same fingerprint already exists".into()).is_exists()
        );
    }
}
