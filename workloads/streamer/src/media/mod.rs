//! Media: pictures and sound out, input in, over one UDP port.
//!
//! One thread owns the socket, the peer and the signalling core, so nothing is locked and nothing waits for
//! anything but the next event ([`worker`]). A second one encodes ([`video`]). Both sleep while nobody is there.

mod input;
mod mailbox;
mod phase;
mod rate;
mod socket;
mod video;
mod worker;

pub use self::{
    mailbox::{Sender, mailbox},
    socket::MediaSocket,
    video::Video,
    worker::{Command, Config, Notice, Worker},
};
