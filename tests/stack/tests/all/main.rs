//! Tests of the whole stack: the real programs as a user starts them, an independent client, and everything that may
//! go wrong around them.

mod bad_input;
mod cluster;
mod doctor;
mod failures;
mod isolation;
mod life;
mod network;
mod outages;
mod pool;
