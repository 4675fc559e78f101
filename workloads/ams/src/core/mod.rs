//! What AMS decides, as plain values: no runtime, no clock, no sockets.

pub mod life;
pub mod model;
pub mod placement;
pub mod pool;
pub mod units;
