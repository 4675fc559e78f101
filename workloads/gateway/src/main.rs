//! The program of the gateway: parse, load, start, wait, stop.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::Parser;
use fanlight_gateway::{Config, Parts};
use fanlight_service::{config, shutdown, telemetry};

/// The Fanlight stream gateway.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// TOML file with the settings; without it, defaults and GATEWAY_* variables count.
    #[arg(long)]
    config: Option<PathBuf>,
    /// Print all settings with their defaults, and end.
    #[arg(long)]
    print_config: bool,
    /// Log as JSON lines.
    #[arg(long)]
    log_json: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(Arguments::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // For the person who started it: the causes on one line, and no backtrace.
            eprintln!("fanlight-gateway: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> anyhow::Result<()> {
    if arguments.print_config {
        print!("{}", config::example::<Config>());
        return Ok(());
    }
    let format = if arguments.log_json { telemetry::Format::Json } else { telemetry::Format::Text };
    telemetry::init(format, "info")?;
    let config: Config = config::load(arguments.config.as_deref(), "GATEWAY")?;
    let running = fanlight_gateway::start(config, Parts::default()).await?;
    let signal = shutdown::signal().await.context("watching for signals")?;
    tracing::info!("{signal} received, going down");
    running.stop().await;
    Ok(())
}
