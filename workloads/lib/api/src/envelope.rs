//! The answer envelopes. The gateway and AMS share the shape and differ in details that their clients
//! depend on: the gateway says `"success"` in lower case (gateway-api section 3), AMS says `"Success"`
//! and always carries the key `metadata` (ams-api section 2).

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The kind of answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Done; `metadata` is the result.
    Sync,
    /// Accepted; work goes on.
    Async,
    /// Refused or failed; `error` says why.
    Error,
}

/// An answer of the gateway.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GatewayEnvelope<T = serde_json::Value> {
    /// Kind of answer.
    #[serde(rename = "type")]
    pub kind: Kind,
    /// `success` or `failed`.
    pub status: String,
    /// The HTTP status code again.
    pub status_code: u16,
    /// What went wrong and what to do; only on failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Payload; on failure the machine-readable part, see [`ErrorDetail`].
    #[serde(default = "none", skip_serializing_if = "Option::is_none")]
    pub metadata: Option<T>,
    /// Number of objects before limit and offset; only for lists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_size: Option<u64>,
}

fn none<T>() -> Option<T> {
    None
}

impl<T> GatewayEnvelope<T> {
    /// A successful answer.
    pub fn success(status_code: u16, metadata: Option<T>) -> Self {
        Self {
            kind: Kind::Sync,
            status: "success".into(),
            status_code,
            error: None,
            metadata,
            total_size: None,
        }
    }
}

impl GatewayEnvelope<serde_json::Value> {
    /// A failure, with its machine-readable part.
    pub fn failure(status_code: u16, error: impl Into<String>, detail: &ErrorDetail) -> Self {
        Self {
            kind: Kind::Error,
            status: "failed".into(),
            status_code,
            error: Some(error.into()),
            metadata: serde_json::to_value(detail).ok(),
            total_size: None,
        }
    }
}

/// Our addition to every error: a stable code for programs and an id to find the log line by.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorDetail {
    /// Stable, lower case with dashes, e.g. `session-not-found`.
    pub code: String,
    /// The id under which the request was logged.
    pub request_id: String,
    /// More for programs, e.g. why agents were refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasons: Option<serde_json::Value>,
}

/// An answer of AMS (ams-api section 2). Every key is always written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AmsEnvelope<T = serde_json::Value> {
    /// Kind of answer.
    #[serde(rename = "type")]
    pub kind: Kind,
    /// `Success`, `Operation created`, or empty on errors.
    #[serde(default)]
    pub status: String,
    /// 200 for sync, 100 for async, 0 on errors.
    #[serde(default)]
    pub status_code: u16,
    /// Path of the operation for async answers, else empty.
    #[serde(default)]
    pub operation: String,
    /// The HTTP status on errors, else 0.
    #[serde(default)]
    pub error_code: u16,
    /// What went wrong, else empty.
    #[serde(default)]
    pub error: String,
    /// Payload; `{}` when there is none.
    pub metadata: T,
    /// Number of objects before limit and offset; only for lists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_size: Option<u64>,
}
