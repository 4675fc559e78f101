//! Processes of the application: how they start, how they end, and who is left.
//!
//! The streamer is a child subreaper, so whatever the application forks away stays below it and is found and
//! ended here. In an instance of the process engine the pid namespace gives the same guarantee again.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    ffi::{OsStr, OsString},
    io,
    os::unix::process::ExitStatusExt as _,
    path::PathBuf,
    process::Stdio,
    rc::Rc,
    time::{Duration, Instant},
};

use fanlight_api::guest::GuestApplication;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use tokio::process::{Child, Command};
use tracing::info;

use super::{
    log::{Log, copy},
    rules::Exit,
};

/// What is handed on from our environment: where programs, their data and the package lie, the language, and how to
/// draw.
const PASSED: &[&str] = &[
    "PATH",
    "LANG",
    "LANGUAGE",
    "TZ",
    "USER",
    "LOGNAME",
    "SHELL",
    "APP_DIR",
    "INSTANCE_TYPE",
    "XDG_DATA_DIRS",
    "XDG_CONFIG_DIRS",
    "LD_LIBRARY_PATH",
    "LIBGL_ALWAYS_SOFTWARE",
    "GALLIUM_DRIVER",
    "FONTCONFIG_FILE",
    "XCURSOR_PATH",
];
/// Where programs are looked for when nobody says.
const DEFAULT_PATH: &str = "/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games";
/// How often the process table is read while processes are being ended.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Why a program did not start.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The manifest names none.
    #[error("application {name}: its command is empty")]
    NoCommand {
        /// Application.
        name: String,
    },
    /// It is not there.
    #[error("application {name}: program {program} was not found (looked in {path})")]
    Missing {
        /// Application.
        name: String,
        /// First word of the command.
        program: String,
        /// The search path.
        path: String,
    },
    /// Its folder is not there.
    #[error("application {name}: working directory {folder}: {source}")]
    Folder {
        /// Application.
        name: String,
        /// The folder.
        folder: String,
        /// Why not.
        source: io::Error,
    },
    /// The kernel refused.
    #[error("application {name}: starting {program}: {source}")]
    Refused {
        /// Application.
        name: String,
        /// First word of the command.
        program: String,
        /// Why.
        source: io::Error,
    },
}

/// What surrounds the application.
#[derive(Clone, Debug)]
pub struct Setting {
    /// Writable.
    pub home: PathBuf,
    /// From the compositor.
    pub display: Vec<(String, String)>,
    /// Address of the sound server.
    pub pulse_server: String,
    /// File with the caller's data.
    pub extra_data: Option<PathBuf>,
}

/// The program of the application.
#[derive(Debug)]
pub struct Application {
    child: Child,
    pid: u32,
}

impl Application {
    /// Starts the program.
    ///
    /// # Errors
    /// When there is no such program, or it cannot be started.
    pub fn start(
        application: &GuestApplication,
        setting: &Setting,
        log: &Rc<RefCell<Log>>,
    ) -> Result<Self, SpawnError> {
        let name = application.name.clone();
        let Some((program, arguments)) =
            application.command.split_first().filter(|(program, _)| !program.is_empty())
        else {
            return Err(SpawnError::NoCommand { name });
        };
        let environment = environment(application, setting);
        let folder =
            application.working_directory.clone().map_or_else(|| setting.home.clone(), PathBuf::from);
        if let Err(source) = std::fs::read_dir(&folder) {
            return Err(SpawnError::Folder { name, folder: folder.display().to_string(), source });
        }
        let path = environment
            .get(OsStr::new("PATH"))
            .map_or_else(|| DEFAULT_PATH.to_owned(), |path| path.to_string_lossy().into_owned());
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env_clear()
            .envs(&environment)
            .current_dir(&folder)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        die_with_us(&mut command);
        let mut child = command.spawn().map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => {
                SpawnError::Missing { name: name.clone(), program: program.clone(), path }
            }
            _ => SpawnError::Refused { name: name.clone(), program: program.clone(), source },
        })?;
        if let Some(stdout) = child.stdout.take() {
            tokio::task::spawn_local(copy(stdout, Rc::clone(log)));
        }
        if let Some(stderr) = child.stderr.take() {
            tokio::task::spawn_local(copy(stderr, Rc::clone(log)));
        }
        let pid = child.id().unwrap_or_default();
        info!(application.name = name, pid, "application {name} started");
        Ok(Self { child, pid })
    }

    /// Process id of the program.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits for the program's end. Safe to cancel.
    pub async fn wait(&mut self) -> Exit {
        match self.child.wait().await {
            Ok(status) => match (status.code(), status.signal()) {
                (Some(code), _) => Exit::Status(code),
                (None, Some(signal)) => Exit::Signal(signal),
                (None, None) => Exit::Status(0),
            },
            // Nobody else waits for it, so this cannot happen; the process is gone in any case.
            Err(_) => Exit::Status(0),
        }
    }
}

/// Lets a child end when the streamer is killed.
pub fn die_with_us(command: &mut Command) {
    // SAFETY: between fork and exec only this one system call is made; it allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(|| {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(io::Error::from)
        });
    }
}

/// The environment of the application.
fn environment(application: &GuestApplication, setting: &Setting) -> BTreeMap<OsString, OsString> {
    let mut environment: BTreeMap<OsString, OsString> = BTreeMap::new();
    for &name in PASSED {
        if let Some(value) = std::env::var_os(name) {
            environment.insert(name.into(), value);
        }
    }
    for (name, value) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("LC_") {
            environment.insert(name, value);
        }
    }
    environment.entry("PATH".into()).or_insert_with(|| DEFAULT_PATH.into());
    environment.entry("LANG".into()).or_insert_with(|| "C.UTF-8".into());
    let mut set = |name: &str, value: &str| environment.insert(name.into(), value.into());
    set("HOME", &setting.home.to_string_lossy());
    set("XDG_CURRENT_DESKTOP", "Fanlight");
    set("PULSE_SERVER", &setting.pulse_server);
    // Wayland where a toolkit can, X11 else.
    set("GDK_BACKEND", "wayland,x11");
    set("QT_QPA_PLATFORM", "wayland;xcb");
    set("SDL_VIDEODRIVER", "wayland,x11");
    set("CLUTTER_BACKEND", "wayland");
    set("MOZ_ENABLE_WAYLAND", "1");
    set("ELECTRON_OZONE_PLATFORM_HINT", "auto");
    set("SDL_AUDIODRIVER", "pulseaudio");
    set("ALSOFT_DRIVERS", "pulse");
    set("NO_AT_BRIDGE", "1");
    if !std::path::Path::new("/dev/dri").exists() {
        set("LIBGL_ALWAYS_SOFTWARE", "1");
    }
    if let Some(file) = &setting.extra_data {
        set("FANLIGHT_EXTRA_DATA", &file.to_string_lossy());
    }
    for (name, value) in &setting.display {
        set(name, value);
    }
    for (name, value) in &application.environment {
        set(name, value);
    }
    environment
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Process {
    parent: u32,
    name: String,
    zombie: bool,
}

/// The process table, as far as it can be read.
fn processes() -> BTreeMap<u32, Process> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return BTreeMap::new() };
    entries
        .flatten()
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
            Some((pid, parse_stat(&stat)?))
        })
        .collect()
}

/// Reads `/proc/PID/stat` (proc(5)): the name is in parentheses and may hold anything, parentheses included.
fn parse_stat(stat: &str) -> Option<Process> {
    let (start, end) = (stat.find('(')?, stat.rfind(')')?);
    let mut rest = stat.get(end + 1..)?.split_ascii_whitespace();
    let state = rest.next()?;
    let parent = rest.next()?.parse().ok()?;
    Some(Process { parent, name: stat.get(start + 1..end)?.to_owned(), zombie: matches!(state, "Z" | "X") })
}

/// Everything below us that runs, except what lies below `spared` and the X server, which ends with its display.
fn family(spared: &[u32]) -> BTreeSet<u32> {
    let table = processes();
    let mut found = BTreeSet::new();
    let mut look_at = vec![std::process::id()];
    while let Some(parent) = look_at.pop() {
        for (pid, process) in table.iter().filter(|(_, process)| process.parent == parent) {
            let ours = parent == std::process::id() && process.name == "Xwayland";
            if ours || spared.contains(pid) || process.zombie || !found.insert(*pid) {
                continue;
            }
            look_at.push(*pid);
        }
    }
    found
}

/// Whether processes of the application are left, `spared` and what lies below them not counted.
pub fn is_family_left(spared: &[u32]) -> bool {
    !family(spared).is_empty()
}

/// Ends every process below us but `spared`: politely, then after `grace` by force. Returns when none is left, and
/// at the latest a second after the grace.
pub async fn end_everything(spared: &[u32], grace: Duration) {
    let started = Instant::now();
    let mut asked = BTreeSet::new();
    loop {
        let left = family(spared);
        let passed = started.elapsed();
        if left.is_empty() || passed > grace + Duration::from_secs(1) {
            return;
        }
        for pid in left {
            let Some(target) = Pid::from_raw(pid as i32) else { continue };
            // A process that has just gone is what we want.
            if passed >= grace {
                let _ = kill_process(target, Signal::KILL);
            } else if asked.insert(pid) {
                let _ = kill_process(target, Signal::TERM);
                // A stopped process would never hear it.
                let _ = kill_process(target, Signal::CONT);
            }
        }
        reap_orphans(&mut BTreeMap::new(), Duration::ZERO, spared);
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// Takes the status of processes that came to us because their parents ended.
///
/// Children that somebody here waits for are taken by them within moments, so a child that stays dead for
/// `patience` is nobody's. `seen` remembers between calls; returns whether somebody is still being watched.
pub fn reap_orphans(seen: &mut BTreeMap<u32, Instant>, patience: Duration, spared: &[u32]) -> bool {
    let now = Instant::now();
    let ours = std::process::id();
    let dead: BTreeSet<u32> = processes()
        .into_iter()
        .filter(|(pid, process)| process.parent == ours && process.zombie && !spared.contains(pid))
        .map(|(pid, _)| pid)
        .collect();
    seen.retain(|pid, _| dead.contains(pid));
    for pid in dead {
        let since = *seen.entry(pid).or_insert(now);
        if now.saturating_duration_since(since) >= patience
            && let Some(target) = Pid::from_raw(pid as i32)
        {
            let _ = waitpid(Some(target), WaitOptions::NOHANG);
            seen.remove(&pid);
        }
    }
    !seen.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_names_may_hold_anything() {
        for (stat, expected) in [
            ("12 (bash) S 3 12 12 0", Some((3, "bash", false))),
            ("12 (a) b (c)) Z 7 1 1", Some((7, "a) b (c)", true))),
            ("12 () R 1", Some((1, "", false))),
            ("12 (x", None),
            (") (", None),
            ("", None),
        ] {
            let found = parse_stat(stat);
            let found = found.as_ref().map(|process| (process.parent, process.name.as_str(), process.zombie));
            assert_eq!(found, expected, "{stat}");
        }
    }

    #[test]
    fn the_applications_own_environment_wins_over_ours_and_nothing_secret_is_passed() {
        let application = GuestApplication {
            name: "x".into(),
            command: vec!["x".into()],
            environment: [("GDK_BACKEND".to_owned(), "x11".to_owned())].into(),
            ..GuestApplication::default()
        };
        let setting = Setting {
            home: "/home/x".into(),
            display: vec![("WAYLAND_DISPLAY".into(), "wayland-0".into())],
            pulse_server: "unix:/x".into(),
            extra_data: None,
        };
        let environment = environment(&application, &setting);
        let get = |name: &str| environment.get(OsStr::new(name)).and_then(|value| value.to_str());
        assert_eq!(get("GDK_BACKEND"), Some("x11"));
        assert_eq!(get("WAYLAND_DISPLAY"), Some("wayland-0"));
        assert_eq!(get("HOME"), Some("/home/x"));
        assert_eq!(get("NOTIFY_SOCKET"), None);
        assert!(get("PATH").is_some());
        assert!(!environment.keys().any(|name| name.to_string_lossy().starts_with("CARGO")));
    }

    #[tokio::test(flavor = "current_thread")]
    async fn programs_that_do_not_exist_are_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let log = Rc::new(RefCell::new(Log::open(Some(folder.path())).expect("a log")));
        let setting = Setting {
            home: folder.path().to_owned(),
            display: Vec::new(),
            pulse_server: String::new(),
            extra_data: None,
        };
        let run = |command: &[&str], working_directory: Option<&str>| {
            let application = GuestApplication {
                name: "demo".into(),
                command: command.iter().map(|word| (*word).to_owned()).collect(),
                working_directory: working_directory.map(str::to_owned),
                ..GuestApplication::default()
            };
            Application::start(&application, &setting, &log).map(drop).expect_err("impossible").to_string()
        };
        assert!(run(&["no-such-program-here"], None).contains("program no-such-program-here was not found"));
        assert!(run(&["/no/such"], None).contains("/no/such"));
        assert!(run(&[], None).contains("command is empty"));
        assert!(run(&["true"], Some("/no/such/folder")).contains("/no/such/folder"));
    }
}
