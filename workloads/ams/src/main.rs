//! `fanlight-ams`: the service, and the shim that it starts for every instance.

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};
use fanlight_service::{config, shutdown, telemetry, tls};

/// Manages applications, instances and the nodes they run on.
#[derive(Debug, Parser)]
#[command(name = "fanlight-ams", version)]
struct Arguments {
    /// Configuration file (TOML); variables AMS_KEY and AMS_TABLE__KEY replace single values.
    #[arg(long, env = "FANLIGHT_AMS_CONFIG")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Print the configuration with all defaults.
    Config,
    /// Run one instance. Started by AMS, not by people.
    #[command(hide = true)]
    Shim {
        /// Folder of the instance.
        folder: PathBuf,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match arguments.command {
        // Its exit status is all that counts.
        Some(Command::Shim { folder }) => std::process::exit(fanlight_ams::shim::main(&folder)),
        Some(Command::Config) => {
            print!("{}", config::example::<fanlight_ams::Config>());
            Ok(())
        }
        None => serve(arguments.config),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fanlight-ams: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(file: Option<PathBuf>) -> Result<()> {
    let config: fanlight_ams::Config = config::load(file.as_deref(), "AMS")?;
    telemetry::init(telemetry::Format::Text, "info")?;
    tls::install_provider();
    let runtime = tokio::runtime::Runtime::new().context("starting the runtime")?;
    runtime.block_on(async {
        let running = fanlight_ams::start(config, fanlight_ams::Parts::default()).await?;
        tracing::info!("AMS is ready on {:?}", running.address());
        let signal = shutdown::signal().await.context("waiting for a signal")?;
        tracing::info!("{signal}: AMS ends; instances go on");
        running.stop().await;
        Ok(())
    })
}
