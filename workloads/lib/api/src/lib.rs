//! Every type that travels between the parts of Fanlight or to its clients: ids, REST bodies, signalling
//! and control messages, bus messages, the guest file, and the reliable link over which signalling frames
//! go. No I/O, no clock, no runtime: whoever needs time passes it in.
//!
//! Records on the bus and in files carry a version from the first day; readers ignore fields they do not
//! know, because another version of us may have written them. Bodies that a person types are strict.

pub mod agent_link;
pub mod ams;
pub mod bus;
pub mod control;
pub mod envelope;
pub mod gateway;
pub mod guest;
mod ids;
pub mod link;
pub mod notify;
pub mod secret;
pub mod signal;

pub use ids::{
    AgentId, ApplicationId, ImageId, InstanceId, InvalidId, NodeId, OperationId, SessionId, ShareId,
};
pub use secret::Secret;

/// Version written into bus messages, guest files and link packets.
pub const PROTOCOL_VERSION: u32 = 1;
