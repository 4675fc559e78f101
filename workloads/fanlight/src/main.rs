//! The `fanlight` command.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match fanlight::run(fanlight::Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fanlight: {error:#}");
            ExitCode::FAILURE
        }
    }
}
