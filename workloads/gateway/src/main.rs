//! The program of the gateway: parse, load, start, wait, stop.

use std::path::PathBuf;

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
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
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
