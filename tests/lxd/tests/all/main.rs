//! The client against a real LXD: every call, over the unix socket and over HTTPS, and a cluster of three.

mod calls;
mod cluster;
#[path = "../../../../workloads/ams/tests/all/contract.rs"]
mod contract;
mod engine;
mod guest;
mod service;
mod streaming;
