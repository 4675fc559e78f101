//! `fanlight-streamer`: the thin main of the program inside every instance.

use std::{io::IsTerminal as _, path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use fanlight_api::guest::EXIT_BAD_GUEST;
use fanlight_streamer::x11_on_demand;
use tracing_subscriber::EnvFilter;

/// Ours is told, libraries speak only of trouble; an X server that goes away at the end is none.
const FILTER: &str = "info,str0m=warn,smithay=warn,smithay::utils::x11rb=off,smithay::xwayland::xserver=off";

/// The display, encoder and WebRTC peer of one instance.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs an instance; its guest file (JSON) is read from standard input.
    Run {
        /// Settings for all instances (TOML); without it `/etc/fanlight/streamer.toml`, if that is there.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
}

fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    if x11_on_demand::is_wanted(arguments.next().as_deref()) {
        return x11_on_demand::run(arguments).into();
    }
    // First of all: the application has the same user id and must not read our memory or environment.
    let hidden = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
    let Arguments { command: Command::Run { config } } = Arguments::parse();
    let config = fanlight_streamer::config::load(config);
    // What libraries say first; a more particular filter of the environment wins.
    let asked = config.as_ref().map(|config| config.log.as_str()).unwrap_or_default();
    let wanted = format!("{asked},{}", std::env::var("FANLIGHT_LOG").unwrap_or_default());
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(format!("{FILTER},{wanted}")))
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        // It would say so on standard error too, and panic when nobody can take it.
        .log_internal_errors(false)
        .init();
    if let Err(error) = hidden {
        tracing::warn!(%error, "the application might read the streamer's memory");
    }
    let config = match config {
        Ok(config) => config,
        Err(error) => {
            tracing::error!("{error}");
            return exit(EXIT_BAD_GUEST);
        }
    };
    let guest = match fanlight_streamer::guest::read(std::io::stdin().lock()) {
        Ok(guest) => guest,
        Err(error) => {
            tracing::error!("{:#}", anyhow::Error::from(error));
            return exit(EXIT_BAD_GUEST);
        }
    };
    close_stdin();
    // There is one provider in the program; a second installation would only say so.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    exit(fanlight_streamer::run(guest, config))
}

fn exit(status: i32) -> ExitCode {
    ExitCode::from(u8::try_from(status).unwrap_or(u8::MAX))
}

/// Nothing more comes from there, and whoever holds the other end may close it.
fn close_stdin() {
    match std::fs::File::open("/dev/null") {
        Ok(null) => {
            if let Err(error) = rustix::stdio::dup2_stdin(null) {
                tracing::warn!(%error, "standard input stays open");
            }
        }
        Err(error) => tracing::warn!(%error, "standard input stays open"),
    }
}
