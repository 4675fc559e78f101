//! What each long-running program of Fanlight needs in its `main`: configuration, logs, shutdown, TLS, an
//! HTTP server whose every error wears the program's envelope, metrics, and a ready latch.
//!
//! Knows nothing of sessions, instances or applications. Each program brings its own routes, its
//! [`http::Envelope`] and its configuration type.

pub mod bounded_log;
pub mod config;
pub mod errors;
pub mod health;
pub mod http;
pub mod metrics;
pub mod shutdown;
pub mod telemetry;
pub mod tls;

pub use errors::ApiError;
pub use shutdown::Shutdown;
