//! The WebRTC peer of an instance, as a plain value: datagrams, time and media go in, datagrams, events and the
//! next deadline come out. It owns no socket, no clock and no thread.
//!
//! It decides what the description says, which data channels exist, how media is stamped, when padding and probing
//! pause, and how a connection ends. ICE, DTLS, SRTP, SCTP, congestion control and packetising are `str0m`'s, whose
//! types stay inside this crate. Encoding, sockets and the meaning of messages are left to the streamer.
//!
//! The owner's loop: give one input (`handle_datagram`, `handle_timeout`, `write_video`, …), then call [`Peer::poll`]
//! until it returns [`Output::Timeout`], then sleep until that instant or the next input.

mod abort;
mod config;
mod doubt;
mod peer;
#[cfg(test)]
mod tests;

pub use config::{
    CONTROL, MAX_MESSAGE_BYTES, MAX_REMOTE_CANDIDATES, MAX_SDP_BYTES, MediaKind, PeerConfig, Role, VideoCodec,
};
pub use peer::{Backlog, Candidate, Event, IceState, Output, Peer, PeerError, Stats};
