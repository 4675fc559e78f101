//! The sandbox of an instance: which program with which arguments makes it, and whether this machine allows it.
//!
//! Bubblewrap does the work (decision 5). What is streamed is somebody else's program: it sees the system
//! read-only, a home, `/tmp`, `/run` and `/dev` of its own, its package under `/app`, and nothing of the state of
//! AMS, of other instances, or of the processes of the host. The network is the host's.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// Home folder inside.
pub const HOME: &str = "/home/fanlight";
/// The application's package inside, read-only.
pub const PACKAGE: &str = "/app";
/// Where the streamer and other programs of ours lie inside; first in `PATH`.
pub const PROGRAMS: &str = "/opt/fanlight/bin";
/// Logs that are written inside.
pub const LOGS: &str = "/var/log/fanlight";
/// Folder of the notify socket inside.
pub const NOTIFY: &str = "/run/fanlight";

/// Files and folders of `/etc` that programs need; whatever else is there stays unseen.
const ETC: &[&str] = &[
    "ImageMagick-6",
    "OpenGL",
    "X11",
    "alsa",
    "alternatives",
    "asound.conf",
    "bash.bashrc",
    "ca-certificates",
    "ca-certificates.conf",
    "debian_version",
    "default/locale",
    "drirc",
    "egl",
    "fanlight/streamer.toml",
    "fonts",
    "gai.conf",
    "glvnd",
    "gtk-2.0",
    "gtk-3.0",
    "host.conf",
    "hosts",
    "inputrc",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "locale.alias",
    "locale.conf",
    "localtime",
    "lsb-release",
    "mailcap",
    "mime.types",
    "openal",
    "os-release",
    "pki",
    "profile",
    "profile.d",
    "protocols",
    "pulse",
    "resolv.conf",
    "services",
    "ssl",
    "terminfo",
    "timezone",
    "vulkan",
    "xdg",
];

/// Files of `/etc` that are made for each instance; see [`etc_files`].
const OWN_ETC: &[&str] = &["passwd", "group", "nsswitch.conf", "machine-id", "hostname"];

/// Whether instances can be kept apart here, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Isolation {
    /// AMS is root: mounts are made as root, then all rights are dropped for a user id of the instance's own.
    OwnUser(Tools),
    /// AMS is an ordinary user: a user namespace makes the mounts possible.
    UserNamespace(Tools),
    /// Not possible.
    Refused {
        /// Why, and what to do.
        reason: String,
    },
}

/// Programs that make the sandbox, by absolute path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tools {
    bwrap: PathBuf,
    setpriv: PathBuf,
    unshare: PathBuf,
}

impl Isolation {
    /// Why instances cannot be kept apart; none when they can.
    pub fn refusal(&self) -> Option<&str> {
        match self {
            Self::Refused { reason } => Some(reason),
            Self::OwnUser(_) | Self::UserNamespace(_) => None,
        }
    }
}

/// One sandbox to be.
#[derive(Clone, Debug)]
pub struct Sandbox<'a> {
    /// Host name inside.
    pub hostname: &'a str,
    /// User and group id inside.
    pub uid: u32,
    /// Group id inside.
    pub gid: u32,
    /// Files made for it ([`etc_files`]).
    pub etc: &'a Path,
    /// Its home; belongs to `uid`.
    pub home: &'a Path,
    /// Its `XDG_RUNTIME_DIR`; belongs to `uid`.
    pub runtime: &'a Path,
    /// Takes the logs that are written inside; belongs to `uid`.
    pub logs: &'a Path,
    /// Holds the notify socket and nothing else.
    pub notify: &'a Path,
    /// The application's package.
    pub package: Option<&'a Path>,
    /// Programs of ours.
    pub programs: &'a [PathBuf],
    /// Folders that must not be seen even where what they lie in is.
    pub hidden: &'a [PathBuf],
}

impl Sandbox<'_> {
    /// The command that runs `command` inside, or none where isolation is refused.
    pub fn command(&self, isolation: &Isolation, command: &[String]) -> Option<Vec<String>> {
        let (tools, own_user) = match isolation {
            Isolation::OwnUser(tools) => (tools, true),
            Isolation::UserNamespace(tools) => (tools, false),
            Isolation::Refused { .. } => return None,
        };
        let mut args = Args(vec![text(&tools.bwrap)]);
        args.add([
            "--die-with-parent",
            "--unshare-pid",
            "--unshare-ipc",
            "--unshare-uts",
            "--hostname",
            self.hostname,
        ]);
        if !own_user {
            args.add(["--unshare-user"]);
        }
        args.system();
        args.add(["--proc", "/proc", "--dev", "/dev"]);
        for folder in ["/dev/shm", "/tmp", "/var/tmp"] {
            // `/var` must be there with a mode of its own before what lies in it.
            if folder.starts_with("/var") {
                args.folder("/var");
            }
            args.add(["--perms", "1777", "--tmpfs", folder]);
        }
        for folder in [
            "/var/log",
            "/var/cache",
            "/etc",
            "/etc/default",
            "/etc/fanlight",
            "/run",
            "/run/user",
            "/home",
            "/opt",
            "/opt/fanlight",
        ] {
            args.folder(folder);
        }
        args.folder(PROGRAMS);
        args.add(["--symlink", "/run", "/var/run"]);
        args.add(["--ro-bind-try", "/var/cache/fontconfig", "/var/cache/fontconfig"]);
        args.add(["--ro-bind-try", "/sys/devices/system/cpu", "/sys/devices/system/cpu"]);
        for name in ETC {
            let path = format!("/etc/{name}");
            args.add(["--ro-bind-try", &path, &path]);
        }
        for name in OWN_ETC {
            args.bind("--ro-bind", &self.etc.join(name), &format!("/etc/{name}"));
        }
        args.bind("--bind", self.home, HOME);
        args.bind("--bind", self.runtime, &runtime_dir(self.uid));
        args.bind("--bind", self.logs, LOGS);
        args.bind("--ro-bind", self.notify, NOTIFY);
        if let Some(package) = self.package {
            args.bind("--ro-bind", package, PACKAGE);
        }
        for program in self.programs {
            let name = program.file_name().unwrap_or(program.as_os_str()).to_string_lossy();
            args.bind("--ro-bind", program, &format!("{PROGRAMS}/{name}"));
        }
        for hidden in self.hidden.iter().filter(|path| path.starts_with("/usr") && path.exists()) {
            args.add(["--perms", "0000", "--tmpfs", &text(hidden)]);
        }
        args.add(["--remount-ro", "/"]);
        if own_user {
            // Mounts are done; what goes on has no right but to become the instance's user, and then none.
            args.add(["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--"]);
            args.add([
                &text(&tools.setpriv),
                "--reuid",
                &self.uid.to_string(),
                "--regid",
                &self.gid.to_string(),
            ]);
            args.add(["--clear-groups", "--inh-caps=-all", "--no-new-privs", "--"]);
            // The home is closed to everybody else, so only the user it belongs to can go there.
            args.add(["/usr/bin/env", "-C", HOME]);
            args.add([&text(&tools.unshare), "--user", "--map-current-user", "--"]);
        } else {
            args.add(["--chdir", HOME, "--"]);
        }
        args.0.extend_from_slice(command);
        Some(args.0)
    }
}

struct Args(Vec<String>);

impl Args {
    fn add<const N: usize>(&mut self, args: [&str; N]) {
        self.0.extend(args.map(String::from));
    }

    fn folder(&mut self, path: &str) {
        self.add(["--perms", "0755", "--dir", path]);
    }

    fn bind(&mut self, how: &str, from: &Path, to: &str) {
        self.add([how, &text(from), to]);
    }

    /// Programs and libraries of the host, read-only.
    fn system(&mut self) {
        self.add(["--ro-bind", "/usr", "/usr"]);
        for path in ["/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"] {
            match fs::read_link(path) {
                Ok(target) => self.add(["--symlink", &text(&target), path]),
                Err(_) => self.add(["--ro-bind-try", path, path]),
            }
        }
    }
}

/// `XDG_RUNTIME_DIR` inside.
pub fn runtime_dir(uid: u32) -> String {
    format!("/run/user/{uid}")
}

/// Names and contents of the files of `/etc` that are made for an instance.
pub fn etc_files(hostname: &str, uid: u32, gid: u32) -> [(&'static str, String); 5] {
    use sha2::Digest as _;
    let machine = hex::encode(sha2::Sha256::digest(hostname));
    [
        (
            "passwd",
            format!(
                "root:x:0:0:root:/nonexistent:/usr/sbin/nologin\n\
                 fanlight:x:{uid}:{gid}:Fanlight:{HOME}:/bin/bash\n\
                 nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
            ),
        ),
        ("group", format!("root:x:0:\nfanlight:x:{gid}:\nnogroup:x:65534:\n")),
        ("nsswitch.conf", "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\n".into()),
        ("machine-id", format!("{}\n", &machine[..32])),
        ("hostname", format!("{hostname}\n")),
    ]
}

/// Whether instances can be kept apart on this machine.
///
/// # Errors
/// Why not, and what to do.
pub fn probe() -> Result<(), String> {
    match detect(&std::env::temp_dir()) {
        Isolation::Refused { reason } => Err(reason),
        Isolation::OwnUser(_) | Isolation::UserNamespace(_) => Ok(()),
    }
}

/// Tries what an instance will need, with a program that does nothing.
///
/// `scratch` is a folder that exists and can be written to.
pub fn detect(scratch: &Path) -> Isolation {
    let refused = |reason: String| Isolation::Refused { reason };
    let root = rustix::process::geteuid().is_root();
    let mut tools = Vec::new();
    for (name, package) in [("bwrap", "bubblewrap"), ("setpriv", "util-linux"), ("unshare", "util-linux")] {
        match find(name) {
            Some(path) => tools.push(path),
            None => return refused(format!("the program {name} is missing: install the package {package}")),
        }
    }
    let [bwrap, setpriv, unshare] = <[PathBuf; 3]>::try_from(tools).expect("three were looked for");
    let tools = Tools { bwrap, setpriv, unshare };
    let isolation = if root { Isolation::OwnUser(tools) } else { Isolation::UserNamespace(tools) };
    let outcome = tempfile::tempdir_in(scratch)
        .map_err(|error| format!("making a folder: {error}"))
        .and_then(|folder| {
            let uid = if root { 65533 } else { rustix::process::geteuid().as_raw() };
            let gid = if root { 65533 } else { rustix::process::getegid().as_raw() };
            let below = |name: &str| {
                let path = folder.path().join(name);
                fs::create_dir(&path)
                    // Whatever the umask says: the probe's user must get in.
                    .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o755)))
                    .map_err(|error| format!("making a folder: {error}"))?;
                Ok::<_, String>(path)
            };
            let (etc, home, runtime, logs, notify) =
                (below("etc")?, below("home")?, below("runtime")?, below("logs")?, below("notify")?);
            for (name, content) in etc_files("probe", uid, gid) {
                fs::write(etc.join(name), content).map_err(|error| format!("writing a file: {error}"))?;
            }
            let sandbox = Sandbox {
                hostname: "probe",
                uid,
                gid,
                etc: &etc,
                home: &home,
                runtime: &runtime,
                logs: &logs,
                notify: &notify,
                package: None,
                programs: &[],
                hidden: &[],
            };
            let argv = sandbox.command(&isolation, &["/bin/true".into()]).expect("not refused so far");
            let output = Command::new(&argv[0])
                .args(&argv[1..])
                .stdin(Stdio::null())
                .output()
                .map_err(|error| format!("running {}: {error}", argv[0]))?;
            if output.status.success() {
                return Ok(());
            }
            let said = String::from_utf8_lossy(&output.stderr);
            Err(format!(
                "namespaces are refused here: {}; the kernel must allow user, mount and pid namespaces \
             (sysctl kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0)",
                said.trim().lines().last().unwrap_or("no reason given")
            ))
        });
    match outcome {
        Ok(()) => isolation,
        Err(reason) => refused(reason),
    }
}

/// A program in `PATH`, or in the usual places that `PATH` may lack.
pub fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/bin", "/usr/sbin", "/bin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .filter(|folder| folder.is_absolute())
        .chain(usual)
        .map(|folder| folder.join(name))
        .find(|path| rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok() && path.is_file())
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tools() -> Tools {
        Tools {
            bwrap: "/usr/bin/bwrap".into(),
            setpriv: "/usr/bin/setpriv".into(),
            unshare: "/usr/bin/unshare".into(),
        }
    }

    fn command(isolation: &Isolation) -> Option<Vec<String>> {
        let folder = Path::new("/state");
        Sandbox {
            hostname: "i1",
            uid: 200_001,
            gid: 200_001,
            etc: folder,
            home: folder,
            runtime: folder,
            logs: folder,
            notify: folder,
            package: None,
            programs: &[],
            hidden: &[],
        }
        .command(isolation, &["prog".into(), "--flag".into()])
    }

    #[test]
    fn as_root_rights_are_dropped_after_the_mounts_and_before_the_program() {
        let argv = command(&Isolation::OwnUser(tools())).expect("possible");
        let at = |what: &str| {
            argv.iter().position(|arg| arg == what).unwrap_or_else(|| panic!("{what} is missing"))
        };
        assert!(at("--cap-drop") < at("/usr/bin/setpriv") && at("/usr/bin/setpriv") < at("--no-new-privs"));
        assert!(at("--no-new-privs") < at("/usr/bin/unshare") && at("/usr/bin/unshare") < at("prog"));
        assert!(!argv.contains(&"--unshare-user".to_owned()));
        assert_eq!(argv.last().map(String::as_str), Some("--flag"));
    }

    #[test]
    fn an_ordinary_user_gets_a_user_namespace() {
        let argv = command(&Isolation::UserNamespace(tools())).expect("possible");
        assert!(
            argv.contains(&"--unshare-user".to_owned()) && !argv.iter().any(|arg| arg.contains("setpriv"))
        );
    }

    #[test]
    fn where_isolation_is_refused_there_is_no_command() {
        assert_eq!(command(&Isolation::Refused { reason: "because".into() }), None);
    }

    #[test]
    fn nothing_of_the_host_but_the_system_is_named() {
        let argv = command(&Isolation::UserNamespace(tools())).expect("possible");
        for secret in ["/", "/root", "/home", "/etc/shadow", "/etc/passwd", "/var/lib", "/proc", "/run"] {
            let bound = argv.windows(2).any(|pair| pair[0].contains("bind") && pair[1] == secret);
            assert!(!bound, "{secret} is mounted");
        }
    }
}
