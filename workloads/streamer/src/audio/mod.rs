//! Sound: a private sound server for the application ([`server`]), and its output as Opus packets
//! ([`capture`], [`coder`]).
//!
//! Idle costs nothing: without a listener there is no connection to the server, with one there is only a
//! subscription until the application plays, and digital silence is not sent.

mod capture;
mod coder;
mod server;

pub use self::{
    capture::Capture,
    server::{Server, ServerConfig},
};
