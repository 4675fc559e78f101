//! The load generator: `./dev bench gateway`, `./dev bench placement`, `./dev bench ams` and the suite `load`.
//!
//! It starts the programs as they are built, speaks the agents' side of the bus and the clients' side of the API, and
//! measures from outside. Figures go to standard output, all else to standard error. It ends with 1 when something
//! could not be measured, with 3 when a bound was missed.

mod agents;
mod ams;
mod figures;
mod gateway;
mod machine;
mod pace;
mod placement;
mod quick;
mod servers;
mod sockets;
mod world;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, ValueEnum};

use crate::{figures::Figures, servers::Store};

/// Open files that ten thousand sockets need, with room.
const OPEN_FILES: u64 = 19_000;

/// Loads a gateway and measures it.
#[derive(Debug, Parser)]
struct Arguments {
    /// What to measure.
    #[arg(required_unless_present_any = ["quick", "ams_folder"])]
    bench: Option<Bench>,
    /// Check with a small load that everything works; measure nothing.
    #[arg(long)]
    quick: bool,
    /// Where the gateway keeps its records; both in turn without this.
    #[arg(long)]
    store: Option<StoreArgument>,
    /// Sessions to hold.
    #[arg(long, default_value_t = 10_000)]
    sessions: usize,
    /// Of the times of arrivals.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Instances to hold.
    #[arg(long, default_value_t = 10_000)]
    instances: usize,
    #[command(flatten)]
    server: ams::Server,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Bench {
    Gateway,
    Placement,
    Ams,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum StoreArgument {
    Redb,
    Etcd,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = machine::raise_open_files(OPEN_FILES).and_then(|()| {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        runtime.block_on(run_until_asked(arguments))
    });
    match done {
        Ok(code) => code,
        Err(error) => {
            eprintln!("fanlight-load: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Ends when the work is done or somebody asks for the end; the programs that were started end with it.
async fn run_until_asked(arguments: Arguments) -> Result<ExitCode> {
    let mut terminated = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        done = run(arguments) => done,
        _ = tokio::signal::ctrl_c() => anyhow::bail!("interrupted"),
        _ = terminated.recv() => anyhow::bail!("terminated"),
    }
}

async fn run(arguments: Arguments) -> Result<ExitCode> {
    if let Some(folder) = &arguments.server.ams_folder {
        ams::serve(folder).await?;
        return Ok(ExitCode::SUCCESS);
    }
    let stores = match arguments.store {
        Some(StoreArgument::Redb) => vec![Store::Redb],
        Some(StoreArgument::Etcd) => vec![Store::Etcd],
        None => vec![Store::Redb, Store::Etcd],
    };
    if arguments.quick {
        return quick::run(&stores, arguments.seed).await;
    }
    let load = machine::load();
    if load > 0.5 {
        eprintln!(
            "bench: the machine is busy (load {load:.1} per processor); times will be worse than they could be"
        );
    }
    if arguments.bench == Some(Bench::Placement) {
        let mut figures = Figures::new("placement", arguments.seed);
        placement::run(&mut figures, arguments.seed)?;
        return Ok(end(&figures));
    }
    if arguments.bench == Some(Bench::Ams) {
        let mut figures = Figures::new("ams", arguments.seed);
        ams::run(&mut figures, arguments.instances).await?;
        return Ok(end(&figures));
    }
    let mut figures = Figures::new("gateway", arguments.seed);
    figures.with("nats", machine::says("nats-server", &["--version"]));
    figures.with("etcd", machine::says("etcd", &["--version"]));
    for store in stores {
        figures.set_suffix(if store == Store::Etcd { "_etcd" } else { "" });
        gateway::run(&mut figures, store, arguments.sessions, arguments.seed).await?;
    }
    Ok(end(&figures))
}

fn end(figures: &Figures) -> ExitCode {
    if figures.missed().is_empty() {
        return ExitCode::SUCCESS;
    }
    eprintln!("bench: bounds missed: {}", figures.missed().join(", "));
    ExitCode::from(3)
}
