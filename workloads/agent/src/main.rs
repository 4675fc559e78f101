//! The agent's program: parse, load, start, wait.

use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;
use fanlight_agent::{Config, Parts, start};
use fanlight_service::{
    config, shutdown,
    telemetry::{self, Format},
};

/// Brings the gateways' sessions into the AMS of a cluster.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    /// Configuration file (TOML). `AGENT_*` variables come on top.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Prints the configuration with all defaults and ends.
    #[arg(long)]
    print_config: bool,
    /// Logs as JSON lines.
    #[arg(long)]
    json: bool,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    if arguments.print_config {
        print!("{}", config::example::<Config>());
        return Ok(());
    }
    telemetry::init(if arguments.json { Format::Json } else { Format::Text }, "info")?;
    let config = config::load::<Config>(arguments.config.as_deref(), "AGENT_")?;
    let running = start(config, Parts::default()).await.context("starting the agent")?;
    let signal = shutdown::signal().await.context("watching for signals")?;
    tracing::info!("{signal}: the agent ends");
    running.stop().await;
    Ok(())
}
