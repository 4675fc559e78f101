//! The gateway as its callers see it: real HTTP, TLS and websockets on free ports, with an agent and a streamer of
//! our own on the in-process bus.

mod accounts;
mod admin;
mod page;
mod relay;
mod rig;
mod sessions;
mod shares;
