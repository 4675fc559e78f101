//! HTTP clients of the gateway and of AMS, for the agent, the command line and tests.
//!
//! Bodies are the types of `fanlight_api`; answers come out of their envelopes, errors keep status, code and
//! text of the server. What an answer means is decided by the caller: nothing here is repeated by itself,
//! except the events of AMS, which are looked for until they come again.

mod agent;
mod ams;
mod endpoint;
mod error;
mod events;
mod exec;
mod gateway;
mod tls;

pub use agent::AgentClient;
pub use ams::AmsClient;
pub use endpoint::{Endpoint, WebSocket};
pub use error::ClientError;
pub use events::{Events, Signal};
pub use exec::{Exec, ExecControls, ExecInput, ExecOutput};
pub use gateway::{Deleted, GatewayClient, NotDeleted, SessionsQuery};
pub use tls::{Identity, Trust};
