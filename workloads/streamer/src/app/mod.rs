//! The application of an instance: started, watched, started again if asked for, and ended with everything it
//! started itself.
//!
//! [`Rules`] decides what an exit means; [`process`] starts and ends processes; [`log`] keeps what they print.

mod log;
mod process;
mod rules;

pub use self::{
    log::Log,
    process::{Application, Setting, die_with_us, end_everything, is_family_left, reap_orphans},
    rules::{Exit, Next, Rules},
};
