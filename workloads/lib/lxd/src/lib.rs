//! A client of LXD's REST API (5.0 and later), over its unix socket and over HTTPS with a client certificate.
//!
//! Small and typed: what an engine of instances needs. What should be is decided by the caller; nothing is repeated
//! here by itself, except the events, which are looked for until they come again.

mod call;
mod cluster;
mod error;
mod events;
mod exec;
mod images;
mod instances;
mod networks;
mod operations;
mod server;

pub use call::Lxd;
pub use cluster::{ClusterMember, Join, JoinToken};
pub use error::LxdError;
pub use events::{Event, Events, Lifecycle, Signal};
pub use exec::{Exec, ExecControls, ExecInput, ExecOptions, ExecOutput};
pub use images::Image;
pub use instances::{
    Address, FileOptions, Instance, InstanceState, InterfaceState, NewInstance, Source, StateAction,
};
pub use networks::{Forward, Lease, Network, NetworkAddress, NetworkState, Port};
pub use operations::{Operation, Outcome};
pub use server::{Card, Cpu, Drm, Environment, Gpu, Memory, Resources, Server, Space};
