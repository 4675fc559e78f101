//! The `fanlight` command: a whole stack on one machine, and the client commands.
//!
//! It composes the programs and makes the trust between them; what each of them does is theirs.

mod administration;
mod amc;
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

pub use amc::{exit_code, report};
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

/// Runs one command. Returns the exit code: 0, or that of a program which was run in an instance.
///
/// # Errors
/// What went wrong, for people; [`exit_code`] has the code for it and [`report`] the text.
pub fn run(cli: Cli) -> Result<u8> {
    // The keeper of an instance comes first: it must not carry a runtime or anything else it does not need.
    if let Command::Shim { folder } = &cli.command {
        std::process::exit(fanlight_ams::shim::main(folder));
    }
    if let Command::Up(options) = &cli.command {
        if options.detach && !detach::is_child() {
            let state = State::open(&options.stack.state)?;
            return detach::run(&state).map(|()| 0);
        }
        let filter = if detach::is_child() { "info" } else { "warn" };
        telemetry::init(Format::default(), filter).context("preparing the log")?;
    }
    tls::install_provider();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting the runtime")?;
    let result = runtime.block_on(dispatch(cli.command));
    // A read of a terminal that nobody answers must not keep the command from ending.
    runtime.shutdown_background();
    result
}

async fn dispatch(command: Command) -> Result<u8> {
    match command {
        Command::Exec(options) => return amc::exec(options).await,
        Command::Shell(options) => return amc::shell(options).await,
        Command::Logs(options) => return amc::logs(options).await,
        Command::Up(options) => up::run(&options).await,
        Command::Down(stack) => down(&stack),
        Command::Code(stack) => commands::code(&stack).await,
        Command::Account { command } => commands::account(command).await,
        Command::Session { command } => commands::session(command).await,
        Command::Share { command } => administration::share(command).await,
        Command::Config { command } => administration::config(command).await,
        Command::Doctor(options) => doctor::run(&options).await,
        Command::Launch(options) => amc::launch(options).await,
        Command::Copy(options) => amc::copy(options).await,
        Command::Init(options) => amc::init(options).await,
        Command::Ls(options) => amc::list(options).await,
        Command::Show(options) => amc::show(options).await,
        Command::Wait(options) => amc::wait(options).await,
        Command::Start(options) => amc::start(options).await,
        Command::Stop(options) => amc::stop(options).await,
        Command::Restart(options) => amc::restart(options).await,
        Command::Delete(options) => amc::delete(options).await,
        Command::Set(options) => amc::set(options).await,
        Command::ShowLog(options) => amc::show_log(options).await,
        Command::File { command } => amc::file(command).await,
        Command::Application { command } => amc::application(command).await,
        Command::Image { command } => amc::image(command).await,
        Command::Addon { command } => amc::addon(command).await,
        Command::Node { command } => amc::node(command).await,
        Command::Ams { command } => amc::ams(command).await,
        Command::Auth { command } => amc::auth(command).await,
        Command::Remote { command } => amc::remote(command).await,
        Command::Monitor(options) => amc::monitor(options).await,
        Command::Benchmark(options) => amc::benchmark(options).await,
        Command::Completion { shell } => amc::completion(&shell),
        Command::Shim { .. } => Ok(()),
    }
    .map(|()| 0)
}

fn down(stack: &cli::Stack) -> Result<()> {
    if !stack.state.is_dir() || !State::open(&stack.state)?.end(DOWN_PATIENCE)? {
        println!("no stack runs from {}", stack.state.display());
    }
    Ok(())
}
