//! What can be typed after `fanlight`.

use std::{net::IpAddr, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::amc::cli as amc;

/// What scripts may go by.
const EXIT_CODES: &str = "Exit codes: 0 done; 1 failed; 2 what was typed makes no sense; 3 there is no such object; \
    4 not permitted. exec, shell and logs that run a program in an instance end with the exit code of the program, \
    128 + n where signal n ended it.";

/// Streams graphical applications to browsers.
#[derive(Debug, Parser)]
#[command(name = "fanlight", version, max_term_width = 100, after_help = EXIT_CODES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a whole stack on this machine.
    Up(Up),
    /// End the stack that runs from a state folder.
    Down(Stack),
    /// Print a fresh link to the page; it works once, for ten minutes.
    Code(Stack),
    /// Accounts of the gateway.
    Account {
        /// What to do with them.
        #[command(subcommand)]
        command: AccountCommand,
    },
    /// Sessions of the gateway.
    Session {
        /// What to do with them.
        #[command(subcommand)]
        command: SessionCommand,
    },
    /// Shares of sessions: URLs that open them for somebody without a token.
    Share {
        /// What to do with them.
        #[command(subcommand)]
        command: ShareCommand,
    },
    /// Configuration of the gateways that may be changed while they run.
    Config {
        /// What to do with it.
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Launch an instance, and wait until it runs.
    Launch(amc::Launch),
    /// Make an instance that is not started.
    Init(amc::Launch),
    /// Make an instance with the files of another one.
    Copy(amc::CopyInstance),
    /// List the instances.
    #[command(visible_alias = "list")]
    Ls(amc::FilteredList),
    /// Show an instance.
    Show(amc::ShowInstance),
    /// Wait for an instance.
    Wait(amc::WaitFor),
    /// Start instances that are stopped.
    Start(amc::Change),
    /// Stop instances.
    Stop(amc::Change),
    /// Stop instances and start them again.
    Restart(amc::Change),
    /// Delete instances.
    Delete(amc::DeleteInstances),
    /// Change a setting of an instance.
    Set(amc::Set),
    /// Print what an instance says, as it says it or as it was kept.
    Logs(amc::Logs),
    /// Print a log that is kept of an instance.
    ShowLog(amc::ShowLog),
    /// Run a program in an instance.
    Exec(amc::Exec),
    /// Run a login shell in an instance.
    Shell(amc::Shell),
    /// Copy files into instances and out of them.
    File {
        /// What to do with them.
        #[command(subcommand)]
        command: amc::FileCommand,
    },
    /// Applications of AMS.
    Application {
        /// What to do with them.
        #[command(subcommand)]
        command: amc::ApplicationCommand,
    },
    /// Images of AMS.
    Image {
        /// What to do with them.
        #[command(subcommand)]
        command: amc::ImageCommand,
    },
    /// Addons of AMS.
    Addon {
        /// What to do with them.
        #[command(subcommand)]
        command: amc::AddonCommand,
    },
    /// Machines that host instances.
    Node {
        /// What to do with them.
        #[command(subcommand)]
        command: amc::NodeCommand,
    },
    /// AMS itself: what it is, its configuration, its operations.
    Ams {
        /// What to do with it.
        #[command(subcommand)]
        command: amc::AmsCommand,
    },
    /// Who AMS lets in, and what they may do.
    Auth {
        /// What to do.
        #[command(subcommand)]
        command: amc::AuthCommand,
    },
    /// AMS elsewhere.
    Remote {
        /// What to do with them.
        #[command(subcommand)]
        command: amc::RemoteCommand,
    },
    /// Print the events of AMS as they come.
    Monitor(amc::Monitor),
    /// Measure how long launches take, and print it as JSON.
    Benchmark(amc::Benchmark),
    /// Print what a shell must read to complete commands, options and names: `source <(fanlight completion bash)`.
    Completion {
        /// Which shell
        #[arg(value_parser = ["bash", "elvish", "fish", "powershell", "zsh"])]
        shell: String,
    },
    /// Check the path that a stream takes from here, and name the step that is broken.
    Doctor(Doctor),
    /// Internal: the keeper of one instance, started by AMS.
    #[command(hide = true)]
    Shim {
        /// Folder of the instance.
        folder: PathBuf,
    },
}

/// Which stack is meant.
#[derive(Clone, Debug, Args)]
pub struct Stack {
    /// State folder of the stack.
    #[arg(long, env = "FANLIGHT_STATE", default_value = ".fanlight")]
    pub state: PathBuf,
}

/// How the ports of the services are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Ports {
    /// 4000 (gateway), 4080 (page), 8445 (agent), 8444 (AMS), 3478 over UDP (TURN, with --listen); one in use is an
    /// error.
    Fixed,
    /// Any free ones, for stacks beside others.
    Auto,
}

/// Options of `up`.
#[derive(Clone, Debug, Args)]
pub struct Up {
    /// Which stack.
    #[command(flatten)]
    pub stack: Stack,
    /// Address of this machine to serve others on; without it everything stays on loopback.
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Option<IpAddr>,
    /// How ports are chosen.
    #[arg(long, value_enum, default_value = "fixed")]
    pub ports: Ports,
    /// TURN server in the place of the embedded one that comes with --listen, such as
    /// `turn:turn.example:3478?transport=udp`; may be given more than once.
    #[arg(long, value_name = "URL", requires = "turn_secret")]
    pub turn: Vec<String>,
    /// File with the secret shared with these TURN servers (Coturn: static-auth-secret).
    #[arg(long, value_name = "FILE", requires = "turn")]
    pub turn_secret: Option<PathBuf>,
    /// Run instances as containers of LXD and not as processes: the unix socket of LXD.
    #[arg(long, value_name = "SOCKET")]
    pub lxd: Option<PathBuf>,
    /// Storage pool of LXD for instances.
    #[arg(long, value_name = "POOL", requires = "lxd", default_value = "default")]
    pub lxd_pool: String,
    /// Bridge of LXD for instances.
    #[arg(long, value_name = "NETWORK", requires = "lxd", default_value = "lxdbr0")]
    pub lxd_network: String,
    /// Image that instances are made of, as `fanlight image build` makes it; without it the default image that AMS
    /// has already.
    #[arg(long, value_name = "FILE", requires = "lxd")]
    pub image: Option<PathBuf>,
    /// Return when everything is ready; `down` ends it.
    #[arg(long)]
    pub detach: bool,
    /// Run gateway, agent and AMS as programs of their own over a NATS server.
    #[arg(long)]
    pub separate: bool,
    /// Folder with applications, or of one; may be given more than once.
    #[arg(long, value_name = "FOLDER")]
    pub applications: Vec<PathBuf>,
    /// Folder with the built page.
    #[arg(long, value_name = "FOLDER")]
    pub ui: Option<PathBuf>,
    /// Also write the variables of `<state>/env` into this file.
    #[arg(long, value_name = "FILE")]
    pub env_file: Option<PathBuf>,
}

/// Options of `doctor`.
#[derive(Clone, Debug, Args)]
pub struct Doctor {
    /// Which stack.
    #[command(flatten)]
    pub stack: Stack,
    /// Address of a gateway elsewhere, such as `https://gateway.example:4000`; no state folder is looked at then. Its
    /// token and authority come from FANLIGHT_TOKEN and FANLIGHT_CA unless files are named.
    #[arg(long, value_name = "URL")]
    pub url: Option<String>,
    /// File with the API token; without it the stack's own token is used.
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// PEM file with the authority of the gateway's certificate; without it that of the stack, or those of the system.
    #[arg(long, value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// Look at this region only.
    #[arg(long)]
    pub region: Option<String>,
    /// Also look whether this application can be launched.
    #[arg(long)]
    pub app: Option<String>,
    /// Print the checks as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Commands about accounts.
#[derive(Debug, Subcommand)]
pub enum AccountCommand {
    /// Make an account and print its token; it is shown only this once.
    Create {
        /// Which stack.
        #[command(flatten)]
        stack: Stack,
        /// Name of the account.
        name: String,
        /// How long the token is good, for example `12h` or `30d`; without it until the account is deleted.
        #[arg(long, value_parser = humantime::parse_duration)]
        expires_in: Option<Duration>,
        /// May only launch, join and end its own sessions.
        #[arg(long)]
        launch_only: bool,
    },
    /// List the accounts.
    List {
        /// Which stack.
        #[command(flatten)]
        stack: Stack,
    },
    /// Delete an account; its tokens stop working at once.
    Delete {
        /// Which stack.
        #[command(flatten)]
        stack: Stack,
        /// Name of the account.
        name: String,
    },
}

/// Commands about sessions.
#[derive(Debug, Subcommand)]
pub enum SessionCommand {
    /// List the sessions.
    List {
        /// Which stack.
        #[command(flatten)]
        stack: Stack,
    },
    /// End a session and its instance.
    Delete {
        /// Which stack.
        #[command(flatten)]
        stack: Stack,
        /// Id of the session.
        id: String,
    },
}

/// Commands about shares.
#[derive(Debug, Subcommand)]
pub enum ShareCommand {
    /// Make a share and print its URL.
    Create {
        /// Which stack.
        #[command(flatten)]
        stack: Stack,
        /// Id of the session.
        session: String,
        /// What it is for.
        #[arg(long, default_value = "")]
        description: String,
        /// Until when: a time from now (`24h`, `30m`), `YYYY-MM-DD`, or `YYYY-MM-DD HH:MM:SS` in UTC.
        #[arg(long)]
        expiry: Option<String>,
    },
    /// List the shares.
    List {
        /// Which stack.
        #[command(flatten)]
        stack: Stack,
        /// Only those of this session.
        #[arg(long)]
        session_id: Option<String>,
    },
    /// Change description or expiry.
    Update {
        /// Which stack.
        #[command(flatten)]
        stack: Stack,
        /// Id of the share.
        id: String,
        /// What it is for.
        #[arg(long)]
        description: Option<String>,
        /// Until when, as for `create`.
        #[arg(long)]
        expiry: Option<String>,
    },
    /// Take a share back; its URL opens nothing from then on.
    Delete {
        /// Which stack.
        #[command(flatten)]
        stack: Stack,
        /// Id of the share.
        id: String,
    },
}

/// Commands about configuration.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Print every item with its value.
    Show {
        /// Which stack.
        #[command(flatten)]
        stack: Stack,
    },
    /// Change an item for all gateways.
    Set {
        /// Which stack.
        #[command(flatten)]
        stack: Stack,
        /// Name of the item.
        name: String,
        /// Its value; empty for the default.
        value: String,
    },
}
