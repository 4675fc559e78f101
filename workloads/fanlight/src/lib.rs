//! The `fanlight` command: a whole stack on one machine, and the client commands.
//!
//! It composes the programs and makes the trust between them; what each of them does is theirs.

mod administration;
mod children;
mod cli;
mod commands;
mod detach;
mod doctor;
mod environment;
mod programs;
mod registry;
mod state;
mod trust;
mod up;

pub use cli::{Cli, Command};

use std::time::Duration;

use anyhow::{Context, Result};
use fanlight_service::{
    telemetry::{self, Format},
    tls,
};
use state::State;

/// How long `down` waits.
const DOWN_PATIENCE: Duration = Duration::from_secs(60);

/// Runs one command.
///
/// # Errors
/// What went wrong, for people.
pub fn run(cli: Cli) -> Result<()> {
    // The keeper of an instance comes first: it must not carry a runtime or anything else it does not need.
    if let Command::Shim { folder } = &cli.command {
        std::process::exit(fanlight_ams::shim::main(folder));
    }
    if let Command::Up(options) = &cli.command {
        if options.detach && !detach::is_child() {
            let state = State::open(&options.stack.state)?;
            return detach::run(&state);
        }
        let filter = if detach::is_child() { "info" } else { "warn" };
        telemetry::init(Format::default(), filter).context("preparing the log")?;
    }
    tls::install_provider();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting the runtime")?;
    runtime.block_on(async {
        match cli.command {
            Command::Up(options) => up::run(&options).await,
            Command::Down(stack) => down(&stack),
            Command::Code(stack) => commands::code(&stack).await,
            Command::Account { command } => commands::account(command).await,
            Command::Session { command } => commands::session(command).await,
            Command::Share { command } => administration::share(command).await,
            Command::Config { command } => administration::config(command).await,
            Command::Instance { command } => commands::instance(command).await,
            Command::Doctor(options) => doctor::run(&options).await,
            Command::Shim { .. } => Ok(()),
        }
    })
}

fn down(stack: &cli::Stack) -> Result<()> {
    if !stack.state.is_dir() || !State::open(&stack.state)?.end(DOWN_PATIENCE)? {
        println!("no stack runs from {}", stack.state.display());
    }
    Ok(())
}
