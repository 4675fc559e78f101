//! The verbs of AMS: what the original's `amc` does, for the stack on this machine and for AMS elsewhere.
//!
//! What AMS does with a request is its own affair. Here requests are made of what was typed ([`cli`]), answers become
//! tables or documents ([`output`]), and failures become words and exit codes ([`failure`]).

pub mod cli;

mod addons;
mod applications;
mod archive;
mod auth;
mod benchmark;
mod completion;
mod exec;
mod failure;
mod files;
mod image_build;
mod images;
mod instances;
mod monitor;
mod nodes;
mod output;
mod progress;
mod remotes;
mod services;
mod settings;
mod size;
mod terminal;
mod viewer;

pub use addons::addon;
pub use applications::application;
pub use auth::auth;
pub use benchmark::benchmark;
pub use completion::script as completion;
pub use exec::{exec, logs, shell, show_log};
pub use failure::{exit_code, report};
pub use files::file;
pub use images::image;
pub use instances::{copy, delete, init, launch, list, restart, set, show, start, stop, wait};
pub use monitor::monitor;
pub use nodes::node;
pub use remotes::remote;
pub use settings::ams;
