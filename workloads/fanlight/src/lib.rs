//! The `fanlight` command: a whole stack on one machine, and the client commands.
//!
//! It composes the programs and makes the trust between them; what each of them does is theirs.

pub mod state;
pub mod trust;
