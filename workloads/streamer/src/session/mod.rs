//! The session of a streamer: who may have the stream, how far they are, and when nobody is left.
//!
//! Everything here is a plain value: no sockets, no clock, no threads. `media` owns a [`Core`] and does what
//! it says; the program owns an [`Idle`].

mod core;
mod idle;

pub use self::{
    core::{Core, Input, LocalCandidate, Output, PeerEvent, PeerPlan, PeerRole},
    idle::{Idle, Presence},
};
