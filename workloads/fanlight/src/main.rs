//! The `fanlight` command.

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};
use clap_complete::CompleteEnv;
use fanlight::Cli;

fn main() -> ExitCode {
    // A shell that asks what could be typed is answered here, and nothing else is done.
    CompleteEnv::with_factory(Cli::command).complete();
    match fanlight::run(Cli::parse()) {
        Ok(code) => code.into(),
        Err(error) => {
            eprintln!("{}", fanlight::report(&error));
            fanlight::exit_code(&error).into()
        }
    }
}
