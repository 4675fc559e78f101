//! What can be typed about AMS: the verbs of the original's `amc`, and ours.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Subcommand, ValueEnum};
use clap_complete::ArgValueCandidates;

use super::completion;

/// Which AMS is asked.
#[derive(Clone, Debug, Default, Args)]
pub struct Target {
    /// Remote to ask; `local` is the stack of a state folder on this machine. Without it the one switched to
    #[arg(
        long,
        env = "FANLIGHT_REMOTE",
        hide_env_values = true,
        value_name = "NAME",
        add = ArgValueCandidates::new(completion::remotes)
    )]
    pub remote: Option<String>,
    /// State folder of the stack that `local` means [default: .fanlight]; naming one means `local`
    #[arg(long, env = "FANLIGHT_STATE", hide_env_values = true, value_name = "FOLDER")]
    pub state: Option<PathBuf>,
}

/// How answers are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people
    #[default]
    Table,
    /// As the server says it
    Json,
    /// The same as YAML
    Yaml,
}

/// The format of an answer.
#[derive(Clone, Copy, Debug, Default, Args)]
pub struct Output {
    /// How the answer is printed
    #[arg(long, value_enum, default_value = "table")]
    pub format: Format,
}

/// Whether the end of work is waited for.
#[derive(Clone, Copy, Debug, Args)]
pub struct Patience {
    /// Wait until the work is done; so it is without this too
    #[arg(long, overrides_with = "no_wait")]
    pub wait: bool,
    /// Return as soon as the work is accepted
    #[arg(long, overrides_with = "wait")]
    pub no_wait: bool,
    /// How long to wait at most, such as `90s` or `10m`; the work itself goes on
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, default_value = "5m")]
    pub timeout: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { wait: true, no_wait: false, timeout: Duration::from_secs(300) }
    }
}

/// Options of `launch` and `init`.
#[derive(Clone, Debug, Args)]
pub struct Launch {
    /// Which AMS.
    #[command(flatten)]
    pub target: Target,
    /// Id or name of the application
    #[arg(
        required_unless_present = "image",
        conflicts_with = "image",
        add = ArgValueCandidates::new(completion::applications)
    )]
    pub application: Option<String>,
    /// Id or name of an image, for an instance without an application
    #[arg(long, value_name = "NAME", add = ArgValueCandidates::new(completion::images))]
    pub image: Option<String>,
    /// Name of the instance; AMS makes one otherwise
    #[arg(long, short)]
    pub name: Option<String>,
    /// Version of the application; the newest that is published otherwise
    #[arg(long, value_name = "NUMBER")]
    pub app_version: Option<i64>,
    /// Version of the image; the newest otherwise
    #[arg(long, value_name = "NUMBER", conflicts_with = "application")]
    pub image_version: Option<i64>,
    /// Node to run on; AMS chooses one otherwise
    #[arg(long, value_name = "NAME", add = ArgValueCandidates::new(completion::nodes))]
    pub node: Option<String>,
    /// A word to find the instance by; may be given more than once
    #[arg(long = "tag", value_name = "WORD")]
    pub tags: Vec<String>,
    /// Whole CPUs
    #[arg(long, value_name = "NUMBER")]
    pub cpus: Option<i64>,
    /// Memory, such as `3GB`
    #[arg(long, value_name = "SIZE", value_parser = super::size::parse)]
    pub memory: Option<i64>,
    /// Disk, such as `3GB`
    #[arg(long, value_name = "SIZE", value_parser = super::size::parse)]
    pub disk_size: Option<i64>,
    /// Slots of a GPU; 0: none
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    pub gpu_slots: Option<i64>,
    /// Only a GPU of this vendor: `amd`, `intel` or `nvidia`
    #[arg(long, value_name = "VENDOR", value_parser = ["amd", "intel", "nvidia"])]
    pub gpu_type: Option<String>,
    /// A port that is reachable through the node: `[+][NAME:]PROTOCOL[,PROTOCOL]:PORT[-END]`, such as `+web:tcp:80`, or
    /// `ssh` and `adb`; with `+` on the node's public address too. May be given more than once
    #[arg(long = "service", value_name = "SERVICE", value_parser = super::services::parse)]
    pub services: Vec<fanlight_api::ams::Service>,
    /// Text that the application can read, at most 10 240 bytes
    #[arg(long, value_name = "TEXT", conflicts_with = "userdata_path")]
    pub userdata: Option<String>,
    /// File with that text
    #[arg(long, value_name = "FILE")]
    pub userdata_path: Option<PathBuf>,
    /// Make a session for it, so that it can be streamed
    #[arg(long)]
    pub enable_streaming: bool,
    /// Draw, with the platform `webrtc`
    #[arg(long, conflicts_with = "platform")]
    pub enable_graphics: bool,
    /// Platform of the runtime
    #[arg(long, value_name = "NAME")]
    pub platform: Option<String>,
    /// Size of the display, such as `1280x720`
    #[arg(long, value_name = "WIDTHxHEIGHT", value_parser = display_size)]
    pub display_size: Option<(i64, i64)>,
    /// Dots per inch of the display
    #[arg(long, value_name = "NUMBER")]
    pub display_density: Option<i64>,
    /// Frames per second of the display
    #[arg(long, value_name = "NUMBER")]
    pub fps: Option<i64>,
    /// Feature flags, separated by commas
    #[arg(long, value_name = "FLAGS")]
    pub features: Option<String>,
    /// Addon for an instance without an application; may be given more than once
    #[arg(long = "addon", value_name = "NAME", conflicts_with = "application")]
    pub addons: Vec<String>,
    /// Keep the instance when what runs in it ends
    #[arg(long)]
    pub devmode: bool,
    /// Do not end the instance when its application misbehaves
    #[arg(long)]
    pub disable_watchdog: bool,
    /// Refuse to delete it until `set` allows it
    #[arg(long)]
    pub delete_protected: bool,
    /// How it is waited for.
    #[command(flatten)]
    pub patience: Patience,
    /// How the answer is printed: the id, or the whole instance.
    #[command(flatten)]
    pub output: Output,
}

/// Options of `copy`.
#[derive(Clone, Debug, Args)]
pub struct CopyInstance {
    /// Which AMS.
    #[command(flatten)]
    pub target: Target,
    /// Id or name of the instance whose files the new one gets
    #[arg(add = ArgValueCandidates::new(completion::instances))]
    pub instance: String,
    /// Name of the new instance; AMS makes one otherwise
    #[arg(long, short)]
    pub name: Option<String>,
    /// Node to run on; AMS chooses one otherwise
    #[arg(long, value_name = "NAME", add = ArgValueCandidates::new(completion::nodes))]
    pub node: Option<String>,
    /// A word to find the new instance by; may be given more than once
    #[arg(long = "tag", value_name = "WORD")]
    pub tags: Vec<String>,
    /// Start the new instance
    #[arg(long)]
    pub launch: bool,
    /// Stop the source first where it runs
    #[arg(long, short)]
    pub force: bool,
    /// How it is waited for.
    #[command(flatten)]
    pub patience: Patience,
    /// How the answer is printed: the id, or the whole instance.
    #[command(flatten)]
    pub output: Output,
}

/// A list of objects.
#[derive(Clone, Debug, Args)]
pub struct List {
    /// Which AMS.
    #[command(flatten)]
    pub target: Target,
    /// How the answer is printed.
    #[command(flatten)]
    pub output: Output,
}

/// A list of objects that can be narrowed down.
#[derive(Clone, Debug, Args)]
pub struct FilteredList {
    /// Only those with this value; may be given more than once, then all must hold
    #[arg(long = "filter", short, value_name = "KEY=VALUE", value_parser = key_value)]
    pub filters: Vec<(String, String)>,
    /// The rest.
    #[command(flatten)]
    pub list: List,
}

/// One instance to be shown.
#[derive(Clone, Debug, Args)]
pub struct ShowInstance {
    /// Which AMS.
    #[command(flatten)]
    pub target: Target,
    /// Id or name of the instance
    #[arg(add = ArgValueCandidates::new(completion::instances))]
    pub instance: String,
    /// How the answer is printed.
    #[command(flatten)]
    pub output: Output,
}

/// One object to be shown.
#[derive(Clone, Debug, Args)]
pub struct Show {
    /// Which AMS.
    #[command(flatten)]
    pub target: Target,
    /// Its id or name
    pub name: String,
    /// How the answer is printed.
    #[command(flatten)]
    pub output: Output,
}

/// States of instances that can be waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Condition {
    /// There is an instance of this name
    Exists,
    /// It has a node and resources
    Prepared,
    /// It boots
    Started,
    /// It is ready
    Running,
    /// It has ended as it should
    Stopped,
    /// It has failed
    Error,
    /// It is gone
    Deleted,
}

/// Options of `wait`.
#[derive(Clone, Debug, Args)]
pub struct WaitFor {
    /// Which AMS.
    #[command(flatten)]
    pub target: Target,
    /// Id or name of the instance
    #[arg(add = ArgValueCandidates::new(completion::instances))]
    pub instance: String,
    /// What to wait for
    #[arg(long = "for", short = 'c', value_name = "CONDITION", value_enum, default_value = "running")]
    pub condition: Condition,
    /// How long to wait at most
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, default_value = "5m")]
    pub timeout: Duration,
}

/// Instances to be started, stopped or started again.
#[derive(Clone, Debug, Args)]
pub struct Change {
    /// Which AMS.
    #[command(flatten)]
    pub target: Target,
    /// Ids or names of the instances
    #[arg(required = true, add = ArgValueCandidates::new(completion::instances))]
    pub instances: Vec<String>,
    /// How it is waited for.
    #[command(flatten)]
    pub patience: Patience,
}

/// Options of `delete`.
#[derive(Clone, Debug, Args)]
pub struct DeleteInstances {
    /// Which AMS.
    #[command(flatten)]
    pub target: Target,
    /// Ids or names of the instances
    #[arg(
        required_unless_present = "all",
        conflicts_with = "all",
        add = ArgValueCandidates::new(completion::instances)
    )]
    pub instances: Vec<String>,
    /// All instances that are not protected
    #[arg(long)]
    pub all: bool,
    /// Do not stop them gracefully before
    #[arg(long, short)]
    pub force: bool,
    /// Do not ask
    #[arg(long, short)]
    pub yes: bool,
    /// How it is waited for.
    #[command(flatten)]
    pub patience: Patience,
}

/// Options of `logs`.
#[derive(Clone, Debug, Args)]
pub struct Logs {
    /// Which AMS.
    #[command(flatten)]
    pub target: Target,
    /// Id or name of the instance
    #[arg(add = ArgValueCandidates::new(completion::instances))]
    pub instance: String,
    /// Go on with what comes; the instance must run
    #[arg(long, short)]
    pub follow: bool,
    /// Begin with so many lines of each log
    #[arg(long, short = 'n', value_name = "NUMBER", default_value_t = 100)]
    pub lines: u32,
}

/// Options of `show-log`.
#[derive(Clone, Debug, Args)]
pub struct ShowLog {
    /// Which AMS.
    #[command(flatten)]
    pub target: Target,
    /// Id or name of the instance
    #[arg(add = ArgValueCandidates::new(completion::instances))]
    pub instance: String,
    /// Name of the log; without it the names are printed
    pub log: Option<String>,
}

/// Options of `exec`.
#[derive(Clone, Debug, Args)]
pub struct Exec {
    /// Which AMS.
    #[command(flatten)]
    pub target: Target,
    /// With a terminal; so it is without this where both input and output are terminals
    #[arg(long, short = 't', overrides_with = "no_interactive")]
    pub interactive: bool,
    /// Without a terminal
    #[arg(long, short = 'T', overrides_with = "interactive")]
    pub no_interactive: bool,
    /// A variable of its environment; may be given more than once
    #[arg(long = "env", short, value_name = "NAME=VALUE", value_parser = key_value)]
    pub environment: Vec<(String, String)>,
    /// Id or name of the instance
    #[arg(add = ArgValueCandidates::new(completion::instances))]
    pub instance: String,
    /// Program and arguments, after `--`; no shell looks at them
    #[arg(required = true, last = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// Options of `shell`.
#[derive(Clone, Debug, Args)]
pub struct Shell {
    /// Which AMS.
    #[command(flatten)]
    pub target: Target,
    /// Id or name of the instance
    #[arg(add = ArgValueCandidates::new(completion::instances))]
    pub instance: String,
}

/// Options of `set`.
#[derive(Clone, Debug, Args)]
pub struct Set {
    /// Which AMS.
    #[command(flatten)]
    pub target: Target,
    /// Id or name of the instance
    #[arg(add = ArgValueCandidates::new(completion::instances))]
    pub instance: String,
    /// What to set
    #[arg(value_parser = ["delete-protected", "delete_protected", "security.delete_protected"])]
    pub key: String,
    /// `true` or `false`
    #[arg(action = clap::ArgAction::Set)]
    pub value: bool,
    /// How it is waited for.
    #[command(flatten)]
    pub patience: Patience,
}

/// Commands about files of instances.
#[derive(Debug, Subcommand)]
pub enum FileCommand {
    /// Copy a file or a folder into a running instance.
    Push {
        /// Which AMS.
        #[command(flatten)]
        target: Target,
        /// The file or folder here; `-` for standard input
        file: PathBuf,
        /// Id or name of the instance
        #[arg(add = ArgValueCandidates::new(completion::instances))]
        instance: String,
        /// Where to there: a file, or a folder to put it into
        path: String,
    },
    /// Copy a file or a folder out of a running instance.
    Pull {
        /// Which AMS.
        #[command(flatten)]
        target: Target,
        /// Id or name of the instance
        #[arg(add = ArgValueCandidates::new(completion::instances))]
        instance: String,
        /// The file or folder there
        path: String,
        /// Where to here: a file, or a folder to put it into; `-` for standard output
        #[arg(default_value = ".")]
        file: PathBuf,
        /// A folder with all that is in it
        #[arg(long, short)]
        recursive: bool,
    },
}

/// Commands about applications.
#[derive(Debug, Subcommand)]
pub enum ApplicationCommand {
    /// List the applications.
    Ls(FilteredList),
    /// Show an application.
    Show(Show),
    /// Make an application of a folder, a zip or a tar.bz2 with a manifest.yaml.
    Create {
        /// Which AMS.
        #[command(flatten)]
        target: Target,
        /// The folder or archive
        path: PathBuf,
        /// How it is waited for.
        #[command(flatten)]
        patience: Patience,
    },
    /// Make a new version: of a folder or archive, or, without one, if images or addons below it are newer.
    Update {
        /// Which AMS.
        #[command(flatten)]
        target: Target,
        /// Id or name of the application
        #[arg(add = ArgValueCandidates::new(completion::applications))]
        application: String,
        /// The folder or archive
        path: Option<PathBuf>,
        /// How it is waited for.
        #[command(flatten)]
        patience: Patience,
    },
    /// Change one setting.
    Set {
        /// Which AMS.
        #[command(flatten)]
        target: Target,
        /// Id or name of the application
        #[arg(add = ArgValueCandidates::new(completion::applications))]
        application: String,
        /// What to set, such as `tags` or `inhibit_auto_updates`
        key: String,
        /// Its value; lists are separated by commas
        value: String,
        /// How it is waited for.
        #[command(flatten)]
        patience: Patience,
    },
    /// Let a version be launched.
    Publish(ApplicationVersion),
    /// Let a version be launched no longer.
    Revoke(ApplicationVersion),
    /// Delete an application, or one version of it.
    Delete {
        /// Which AMS.
        #[command(flatten)]
        target: Target,
        /// Id or name of the application
        #[arg(add = ArgValueCandidates::new(completion::applications))]
        application: String,
        /// Only this version
        #[arg(long, value_name = "NUMBER")]
        version: Option<u32>,
        /// Also while instances use it
        #[arg(long, short)]
        force: bool,
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
        /// How it is waited for.
        #[command(flatten)]
        patience: Patience,
    },
    /// Write the package of a version into a file.
    Export {
        /// Which AMS.
        #[command(flatten)]
        target: Target,
        /// Id or name of the application
        #[arg(add = ArgValueCandidates::new(completion::applications))]
        application: String,
        /// Number of the version
        version: u32,
        /// The file; `-` for standard output [default: NAME-VERSION.tar.bz2]
        file: Option<PathBuf>,
    },
    /// Print the manifest of the newest version, or of one.
    Manifest {
        /// Which AMS.
        #[command(flatten)]
        target: Target,
        /// Id or name of the application
        #[arg(add = ArgValueCandidates::new(completion::applications))]
        application: String,
        /// Number of the version
        #[arg(long, value_name = "NUMBER")]
        version: Option<u32>,
    },
}

/// A version of an application.
#[derive(Clone, Debug, Args)]
pub struct ApplicationVersion {
    /// Which AMS.
    #[command(flatten)]
    pub target: Target,
    /// Id or name of the application
    #[arg(add = ArgValueCandidates::new(completion::applications))]
    pub application: String,
    /// Number of the version
    pub version: u32,
    /// How it is waited for.
    #[command(flatten)]
    pub patience: Patience,
}

/// Commands about images.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Build the archive of an image on this machine; AMS is not asked.
    Build(BuildOptions),
    /// List the images.
    Ls(List),
    /// Show an image.
    Show(Show),
    /// Add an image: of a file, from the image server, or of an instance.
    Add {
        /// Which AMS.
        #[command(flatten)]
        target: Target,
        /// Name of the image
        name: String,
        /// Archive with metadata.yaml and rootfs
        #[arg(required_unless_present_any = ["from", "instance"], conflicts_with_all = ["from", "instance"])]
        file: Option<PathBuf>,
        /// Its name on the image server; `NAME@VERSION` is one release
        #[arg(long, value_name = "NAME", conflicts_with = "instance")]
        from: Option<String>,
        /// Stopped instance whose file system becomes the image
        #[arg(long, add = ArgValueCandidates::new(completion::instances))]
        instance: Option<String>,
        /// Although the instance runs: it is stopped before
        #[arg(long, short, requires = "instance")]
        force: bool,
        /// It becomes the default
        #[arg(long)]
        default: bool,
        /// How it is waited for.
        #[command(flatten)]
        patience: Patience,
    },
    /// Add a version to an image.
    Update {
        /// Which AMS.
        #[command(flatten)]
        target: Target,
        /// Id or name of the image
        #[arg(add = ArgValueCandidates::new(completion::images))]
        image: String,
        /// Archive with metadata.yaml and rootfs
        file: PathBuf,
        /// How it is waited for.
        #[command(flatten)]
        patience: Patience,
    },
    /// Make an image the default.
    Switch(OneImage),
    /// Look on the image server for a newer release.
    Sync(OneImage),
    /// Delete an image, or one version of it.
    Delete {
        /// Which AMS.
        #[command(flatten)]
        target: Target,
        /// Id or name of the image
        #[arg(add = ArgValueCandidates::new(completion::images))]
        image: String,
        /// Only this version
        #[arg(long, value_name = "NUMBER")]
        version: Option<u32>,
        /// Although it came from the image server
        #[arg(long, short)]
        force: bool,
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
        /// How it is waited for.
        #[command(flatten)]
        patience: Patience,
    },
}

/// How an image is built.
#[derive(Clone, Debug, Args)]
pub struct BuildOptions {
    /// What it is made of: base, terminal, demo, or a file
    #[arg(long, value_name = "NAME|FILE", default_value = "terminal")]
    pub recipe: String,
    /// Archive to be written: .tar, .tar.gz, .tar.xz or .tar.zst [default: NAME.tar.gz]
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Release that the packages are of
    #[arg(long, value_enum, default_value = "bookworm")]
    pub suite: Suite,
    /// The program fanlight-streamer; without it the one beside this program
    #[arg(long, value_name = "PATH")]
    pub streamer: Option<PathBuf>,
}

impl BuildOptions {
    /// The archive to be written.
    pub fn output(&self, name: &str) -> PathBuf {
        self.output.clone().unwrap_or_else(|| format!("{name}.tar.gz").into())
    }
}

/// A release of Debian or Ubuntu.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Suite {
    /// Debian 12.
    Bookworm,
    /// Ubuntu 24.04.
    Noble,
}

impl Suite {
    /// Its name at the mirrors.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::Noble => "noble",
        }
    }
}

/// One image to be changed.
#[derive(Clone, Debug, Args)]
pub struct OneImage {
    /// Which AMS.
    #[command(flatten)]
    pub target: Target,
    /// Id or name of the image
    #[arg(add = ArgValueCandidates::new(completion::images))]
    pub image: String,
    /// How it is waited for.
    #[command(flatten)]
    pub patience: Patience,
}

/// Commands about addons.
#[derive(Debug, Subcommand)]
pub enum AddonCommand {
    /// List the addons.
    Ls(List),
    /// Show an addon.
    Show(Show),
    /// Add an addon of a folder, a zip or a tar.bz2 with a manifest.yaml.
    Add(AddonFile),
    /// Add a version to an addon.
    Update(AddonFile),
    /// Delete an addon, or one version of it.
    Delete {
        /// Which AMS.
        #[command(flatten)]
        target: Target,
        /// Name of the addon
        name: String,
        /// Only this version
        #[arg(long, value_name = "NUMBER")]
        version: Option<u32>,
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
        /// How it is waited for.
        #[command(flatten)]
        patience: Patience,
    },
}

/// An addon and where it comes from.
#[derive(Clone, Debug, Args)]
pub struct AddonFile {
    /// Which AMS.
    #[command(flatten)]
    pub target: Target,
    /// Name of the addon
    pub name: String,
    /// The folder or archive
    pub path: PathBuf,
    /// How it is waited for.
    #[command(flatten)]
    pub patience: Patience,
}

/// Commands about nodes.
#[derive(Debug, Subcommand)]
pub enum NodeCommand {
    /// List the nodes.
    Ls(List),
    /// Show a node.
    Show(Show),
    /// Add a machine with LXD.
    Add(Box<AddNode>),
    /// Change one setting.
    Set {
        /// Which AMS.
        #[command(flatten)]
        target: Target,
        /// Name of the node
        #[arg(add = ArgValueCandidates::new(completion::nodes))]
        node: String,
        /// `cpus`, `cpu-allocation-rate`, `memory`, `memory-allocation-rate`, `gpu-slots`, `gpu-encoder-slots`,
        /// `gpus.N.slots`, `gpus.N.encoder-slots`, `tags`, `public-address`, `subnet` or `unschedulable`
        key: String,
        /// Its value; lists are separated by commas
        value: String,
        /// How it is waited for.
        #[command(flatten)]
        patience: Patience,
    },
    /// Remove a node that has no instances.
    Remove {
        /// Which AMS.
        #[command(flatten)]
        target: Target,
        /// Name of the node
        #[arg(add = ArgValueCandidates::new(completion::nodes))]
        node: String,
        /// Although instances are there; they are lost
        #[arg(long, short)]
        force: bool,
        /// Leave the machine in LXD's cluster
        #[arg(long)]
        keep_in_cluster: bool,
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
        /// How it is waited for.
        #[command(flatten)]
        patience: Patience,
    },
    /// Give a node no new instances, and wait until those that it has are gone.
    Drain {
        /// Which AMS.
        #[command(flatten)]
        target: Target,
        /// Name of the node
        #[arg(add = ArgValueCandidates::new(completion::nodes))]
        node: String,
        /// Stop its instances instead of waiting for their users
        #[arg(long)]
        stop: bool,
        /// How it is waited for.
        #[command(flatten)]
        patience: Patience,
    },
    /// Give a node instances again.
    Undrain {
        /// Which AMS.
        #[command(flatten)]
        target: Target,
        /// Name of the node
        #[arg(add = ArgValueCandidates::new(completion::nodes))]
        node: String,
        /// How it is waited for.
        #[command(flatten)]
        patience: Patience,
    },
}

/// Options of `node add`.
#[derive(Clone, Debug, Args)]
pub struct AddNode {
    /// Which AMS.
    #[command(flatten)]
    pub target: Target,
    /// Name of the node
    pub name: String,
    /// Where its LXD answers: HOST or HOST:PORT
    pub address: String,
    /// File with the token that lets AMS in (LXD 5.21 and later)
    #[arg(long, value_name = "FILE")]
    pub trust_token_file: Option<PathBuf>,
    /// File with the password that lets AMS in (LXD before 5.21)
    #[arg(long, value_name = "FILE", conflicts_with = "trust_token_file")]
    pub trust_password_file: Option<PathBuf>,
    /// Where clients reach it
    #[arg(long, value_name = "ADDRESS")]
    pub public_address: Option<String>,
    /// CPUs offered to instances; all otherwise
    #[arg(long, value_name = "NUMBER")]
    pub cpus: Option<u32>,
    /// How many times each CPU may be given away
    #[arg(long, value_name = "FACTOR")]
    pub cpu_allocation_rate: Option<f64>,
    /// Memory offered to instances, such as `32GB`; all otherwise
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<String>,
    /// How many times the memory may be given away
    #[arg(long, value_name = "FACTOR")]
    pub memory_allocation_rate: Option<f64>,
    /// Instances that may share the GPUs
    #[arg(long, value_name = "NUMBER")]
    pub gpu_slots: Option<u32>,
    /// Parallel encodes of the GPUs
    #[arg(long, value_name = "NUMBER")]
    pub gpu_encoder_slots: Option<u32>,
    /// Name of the bridge of the instances
    #[arg(long, value_name = "NAME")]
    pub network_name: Option<String>,
    /// Address and prefix of the bridge
    #[arg(long, value_name = "SUBNET")]
    pub network_subnet: Option<String>,
    /// Name of a network ACL for the bridge
    #[arg(long, value_name = "NAME")]
    pub network_acl_name: Option<String>,
    /// Largest packet on the bridge, bytes
    #[arg(long, value_name = "BYTES")]
    pub network_bridge_mtu: Option<u32>,
    /// Block device for the storage pool
    #[arg(long, value_name = "DEVICE")]
    pub storage_device: Option<String>,
    /// Storage pool that is there
    #[arg(long, value_name = "NAME", conflicts_with = "storage_device")]
    pub storage_pool: Option<String>,
    /// A word for selectors; may be given more than once
    #[arg(long = "tag", value_name = "WORD")]
    pub tags: Vec<String>,
    /// The machine is a member of LXD's cluster already
    #[arg(long)]
    pub unmanaged: bool,
    /// How it is waited for.
    #[command(flatten)]
    pub patience: Patience,
}

/// Commands about AMS itself.
#[derive(Debug, Subcommand)]
pub enum AmsCommand {
    /// Say what AMS is, which version, what it can do, and whether it trusts this client.
    Info(List),
    /// Configuration of AMS.
    Config {
        /// What to do with it.
        #[command(subcommand)]
        command: AmsConfigCommand,
    },
    /// List the operations.
    Operations(List),
    /// Ask for the end of an operation.
    Cancel {
        /// Which AMS.
        #[command(flatten)]
        target: Target,
        /// Id of the operation
        operation: String,
    },
    /// List the tasks of the scheduler.
    Tasks(List),
}

/// Commands about the configuration of AMS.
#[derive(Debug, Subcommand)]
pub enum AmsConfigCommand {
    /// Print every item with its value, or one.
    Show {
        /// Which AMS.
        #[command(flatten)]
        target: Target,
        /// Name of the item
        name: Option<String>,
        /// How the answer is printed.
        #[command(flatten)]
        output: Output,
    },
    /// Change an item.
    Set {
        /// Which AMS.
        #[command(flatten)]
        target: Target,
        /// Name of the item
        name: String,
        /// Its value; empty for the default; `-` reads it from standard input, as is right for secrets
        value: String,
        /// How it is waited for.
        #[command(flatten)]
        patience: Patience,
    },
}

/// Commands about who may do what.
#[derive(Debug, Subcommand)]
pub enum AuthCommand {
    /// Who is let in.
    Identity {
        /// What to do with them.
        #[command(subcommand)]
        command: IdentityCommand,
    },
    /// Groups of identities.
    Group {
        /// What to do with them.
        #[command(subcommand)]
        command: GroupCommand,
    },
    /// What this client may do.
    Permission {
        /// What to do with them.
        #[command(subcommand)]
        command: PermissionCommand,
    },
}

/// Commands about identities.
#[derive(Debug, Subcommand)]
pub enum IdentityCommand {
    /// List the identities.
    Ls(List),
    /// Show an identity.
    Show(Show),
    /// Let somebody in: the owner of a certificate, or of an address at the OIDC provider.
    Create {
        /// Which AMS.
        #[command(flatten)]
        target: Target,
        /// Name of the identity
        name: String,
        /// PEM file with the certificate
        #[arg(long, value_name = "FILE", required_unless_present = "email", conflicts_with = "email")]
        certificate: Option<PathBuf>,
        /// E-mail address at the OIDC provider
        #[arg(long, value_name = "ADDRESS")]
        email: Option<String>,
        /// A group to put it into; may be given more than once
        #[arg(long = "group", value_name = "NAME")]
        groups: Vec<String>,
        /// How it is waited for.
        #[command(flatten)]
        patience: Patience,
    },
    /// Put an identity into these groups and no others.
    Groups {
        /// Which AMS.
        #[command(flatten)]
        target: Target,
        /// Id of the identity
        id: String,
        /// Names of the groups; none takes it out of all
        groups: Vec<String>,
        /// How it is waited for.
        #[command(flatten)]
        patience: Patience,
    },
    /// Let somebody in no longer.
    Delete(DeleteAuth),
}

/// Something of [`AuthCommand`] to be deleted.
#[derive(Clone, Debug, Args)]
pub struct DeleteAuth {
    /// Which AMS.
    #[command(flatten)]
    pub target: Target,
    /// Its id or name
    pub name: String,
    /// Although it is in use
    #[arg(long, short)]
    pub force: bool,
    /// How it is waited for.
    #[command(flatten)]
    pub patience: Patience,
}

/// Commands about groups.
#[derive(Debug, Subcommand)]
pub enum GroupCommand {
    /// List the groups.
    Ls(List),
    /// Show a group.
    Show(Show),
    /// Make a group.
    Create {
        /// Which AMS.
        #[command(flatten)]
        target: Target,
        /// Name of the group
        name: String,
        /// What it is for
        #[arg(long, default_value = "")]
        description: String,
        /// How it is waited for.
        #[command(flatten)]
        patience: Patience,
    },
    /// Change the description of a group.
    Describe {
        /// Which AMS.
        #[command(flatten)]
        target: Target,
        /// Name of the group
        name: String,
        /// What it is for
        description: String,
        /// How it is waited for.
        #[command(flatten)]
        patience: Patience,
    },
    /// Give a group a permission.
    Grant(GroupPermission),
    /// Take a permission from a group.
    Revoke(GroupPermission),
    /// Delete a group.
    Delete(DeleteAuth),
}

/// A permission of a group.
#[derive(Clone, Debug, Args)]
pub struct GroupPermission {
    /// Which AMS.
    #[command(flatten)]
    pub target: Target,
    /// Name of the group
    pub group: String,
    /// What is permitted, such as `can_view`
    pub entitlement: String,
    /// On what: `server`, or an object such as `instance:ID` or `instance:*`
    pub resource: String,
    /// How it is waited for.
    #[command(flatten)]
    pub patience: Patience,
}

/// Commands about permissions.
#[derive(Debug, Subcommand)]
pub enum PermissionCommand {
    /// List the permissions of this client.
    Ls(List),
}

/// Commands about remotes.
#[derive(Debug, Subcommand)]
pub enum RemoteCommand {
    /// Get to know an AMS elsewhere, and have it trust this client.
    Add {
        /// Name for it
        name: String,
        /// Its address, such as `https://ams.example:8444`
        url: String,
        /// SHA-256 fingerprint that its certificate must have; without it the certificate's is shown and asked about
        #[arg(long, value_name = "HEX")]
        fingerprint: Option<String>,
        /// File with the trust password; without it FANLIGHT_TRUST_PASSWORD is looked at, then it is asked for
        #[arg(long, value_name = "FILE")]
        password_file: Option<PathBuf>,
        /// File with a token of the OIDC provider, read anew at each use; this client's certificate is not shown then
        #[arg(long, value_name = "FILE", conflicts_with = "password_file")]
        token_file: Option<PathBuf>,
    },
    /// List the remotes.
    Ls {
        /// How the answer is printed.
        #[command(flatten)]
        output: Output,
    },
    /// Ask this remote from now on where none is named.
    Switch {
        /// Name of the remote; `local` is the stack of a state folder on this machine
        #[arg(add = ArgValueCandidates::new(completion::remotes))]
        name: String,
    },
    /// Forget a remote. AMS there goes on trusting this client until it is told otherwise.
    Remove {
        /// Name of the remote
        #[arg(add = ArgValueCandidates::new(completion::remotes))]
        name: String,
    },
    /// Print the certificate that this client shows, for an administrator to let it in.
    Certificate,
}

/// Kinds of events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EventKind {
    /// Changes of operations
    Operation,
    /// What happens to objects
    Lifecycle,
    /// Lines of the server's log
    Logging,
}

/// Options of `monitor`.
#[derive(Clone, Debug, Args)]
pub struct Monitor {
    /// Which AMS.
    #[command(flatten)]
    pub target: Target,
    /// Only events of this kind; may be given more than once
    #[arg(long = "type", value_enum, value_name = "KIND")]
    pub kinds: Vec<EventKind>,
    /// How events are printed: a line each, a line of JSON each, or a YAML document each.
    #[command(flatten)]
    pub output: Output,
}

/// Options of `benchmark`.
#[derive(Clone, Debug, Args)]
pub struct Benchmark {
    /// Which AMS.
    #[command(flatten)]
    pub target: Target,
    /// Id or name of the application
    #[arg(add = ArgValueCandidates::new(completion::applications))]
    pub application: String,
    /// How many instances are launched
    #[arg(long, short = 'n', value_name = "NUMBER", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub count: u32,
    /// How many launches may go on at the same time
    #[arg(long, short, value_name = "NUMBER", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pub parallel: u32,
    /// Begin at most so many launches a second
    #[arg(long, value_name = "NUMBER")]
    pub rate: Option<f64>,
    /// Launch through the gateway of the local stack, and also measure until the first picture has come
    #[arg(long)]
    pub streamed: bool,
    /// Leave the instances there
    #[arg(long, conflicts_with = "streamed")]
    pub keep: bool,
    /// Node to run on; AMS chooses otherwise
    #[arg(long, value_name = "NAME", conflicts_with = "streamed")]
    pub node: Option<String>,
    /// How long one launch may take
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, default_value = "5m")]
    pub timeout: Duration,
}

/// `KEY=VALUE`
fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("expected KEY=VALUE".into()),
    }
}

/// `WIDTHxHEIGHT`
fn display_size(text: &str) -> Result<(i64, i64), String> {
    let sides =
        text.split_once('x').and_then(|(width, height)| Some((width.parse().ok()?, height.parse().ok()?)));
    sides
        .filter(|(width, height)| *width > 0 && *height > 0)
        .ok_or_else(|| "expected WIDTHxHEIGHT, such as 1280x720".into())
}
