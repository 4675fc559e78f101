//! `fanlight-streamer`: the thin main of the program inside every instance.

use std::{
    io::IsTerminal as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Parser, Subcommand};
use fanlight_api::guest::EXIT_BAD_GUEST;
use fanlight_streamer::{
    supervisor::{self, Options, User},
    x11_on_demand,
};
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
    /// Gives a session to the instance of a pool that waits here; its guest file (JSON) is read from standard input.
    /// Prints one line of JSON.
    Claim,
    /// Supervises the run of a container, or tells how far it is.
    Guest {
        /// Folder under which all paths are
        #[arg(long, value_name = "DIR", default_value = "/", global = true)]
        root: PathBuf,
        /// Whose programs the streamer and the application are
        #[arg(long, value_name = "NAME", default_value = "fanlight")]
        user: String,
        /// Program to run as the streamer; without it this one
        #[arg(long, value_name = "FILE")]
        streamer: Option<PathBuf>,
        /// Leave the container on at the end
        #[arg(long)]
        no_poweroff: bool,
        /// What is asked; without it, the run is supervised.
        #[command(subcommand)]
        question: Option<Question>,
    },
}

#[derive(Subcommand)]
enum Question {
    /// Waits until a run is ready or has ended, then prints its state
    Wait {
        /// Number of the run; a later one counts as well
        #[arg(long, value_name = "NUMBER")]
        run: u32,
    },
    /// Prints the state of the run
    State,
}

fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    if x11_on_demand::is_wanted(arguments.next().as_deref()) {
        return x11_on_demand::run(arguments).into();
    }
    // First of all: the application has the same user id and must not read our memory or environment.
    let hidden = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
    match Arguments::parse().command {
        Command::Run { config } => run(config, hidden),
        Command::Claim => claim(),
        Command::Guest { root, question: Some(question), .. } => answer(&root, &question),
        Command::Guest { root, user, streamer, no_poweroff, question: None } => {
            tracing_subscriber::fmt()
                .with_env_filter(EnvFilter::new("info"))
                // systemd notes the time.
                .without_time()
                .with_ansi(false)
                .with_writer(std::io::stderr)
                .log_internal_errors(false)
                .init();
            let supervised = User::find(&user).and_then(|user| {
                let streamer = match streamer {
                    Some(streamer) => streamer,
                    None => std::env::current_exe()?,
                };
                supervisor::main(Options { root, user: Some(user), streamer, poweroff: !no_poweroff })
            });
            match supervised {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    tracing::error!("{error:#}");
                    ExitCode::FAILURE
                }
            }
        }
    }
}

/// Prints the state of the run in one line.
fn answer(root: &Path, question: &Question) -> ExitCode {
    let state = match question {
        Question::Wait { run } => supervisor::wait(root, *run).map(Some),
        Question::State => supervisor::state(root),
    };
    match state {
        Ok(Some(state)) => {
            println!("{}", serde_json::to_string(&state).expect("a state is JSON"));
            ExitCode::SUCCESS
        }
        Ok(None) => {
            eprintln!("nothing was run yet: there is no state.json");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(config: Option<PathBuf>, hidden: rustix::io::Result<()>) -> ExitCode {
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

/// Hands a claim over. The answer is the only output, so that whoever reads it needs to look at nothing else.
fn claim() -> ExitCode {
    let answer = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => {
            let claim = fanlight_streamer::claim::hand_over(std::io::stdin().lock());
            runtime.block_on(claim).unwrap_or_else(|error| error.answer())
        }
        Err(error) => fanlight_streamer::claim::refused(format!("starting the runtime: {error}")),
    };
    println!("{}", serde_json::json!(answer));
    if answer.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE }
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
