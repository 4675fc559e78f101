//! The one error of HTTP handlers: a status, a stable code, a text for the caller, and what only the log should
//! see. The server turns it into the program's envelope and one log line ([`crate::http`]).

use std::sync::Arc;

use axum::response::{IntoResponse, Response};
use http::{HeaderName, HeaderValue, StatusCode};
use serde_json::Value;

/// A request that was refused or failed.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub struct ApiError {
    /// HTTP status.
    pub status: StatusCode,
    /// Stable, lower case with dashes.
    pub code: &'static str,
    /// What the caller reads: what went wrong, with values, and what to do.
    pub text: String,
    /// More for programs.
    pub reasons: Option<Value>,
    /// Headers of the answer.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// The cause, for the log alone.
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl ApiError {
    /// An error with a status and code of its own.
    pub fn new(status: StatusCode, code: &'static str, text: impl Into<String>) -> Self {
        Self { status, code, text: text.into(), reasons: None, headers: Vec::new(), source: None }
    }

    /// 400.
    pub fn bad_request(code: &'static str, text: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, text)
    }

    /// 401.
    pub fn unauthorized(text: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "unauthorized", text)
    }

    /// 403.
    pub fn forbidden(code: &'static str, text: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, code, text)
    }

    /// 404.
    pub fn not_found(code: &'static str, text: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, code, text)
    }

    /// 409.
    pub fn conflict(code: &'static str, text: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, code, text)
    }

    /// 503.
    pub fn unavailable(code: &'static str, text: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, code, text)
    }

    /// 500; the caller learns nothing but that it was not their fault.
    pub fn internal(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        let text = "internal error; the log has it under the request id";
        let mut error = Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", text);
        error.source = Some(source.into());
        error
    }

    /// With a part for programs.
    pub fn with_reasons(mut self, reasons: Value) -> Self {
        self.reasons = Some(reasons);
        self
    }

    /// With a cause for the log.
    pub fn with_source(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// With a header in the answer.
    pub fn with_header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }
}

/// Carried by a response until the server writes the envelope.
#[derive(Clone, Debug)]
pub(crate) struct Pending(pub(crate) Arc<ApiError>);

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = self.status.into_response();
        response.extensions_mut().insert(Pending(Arc::new(self)));
        response
    }
}
