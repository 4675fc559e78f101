//! Tries from inside an instance what an instance must not be able to do, and prints one JSON line for every
//! attempt: `{"attempt", "target", "denied", "detail"}`, then `{"summary", "attempts", "denied", "allowed"}`.
//! Ends with status 0 only if everything was denied. It judges nothing beyond that: what counts as foreign is
//! said on the command line.

use std::{
    collections::BTreeSet,
    fs,
    io::Write as _,
    net::{SocketAddr, TcpStream},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use rustix::process::Pid;
use serde_json::json;

const USAGE: &str =
    "usage: fanlight-probe [--secret TEXT]... [--read PATH]... [--list DIRECTORY]... [--write PATH]...
       [--connect SOCKET]... [--tcp ADDRESS]... [--kill PID]... [--out FILE] [--wait]
  --secret TEXT      must be found in no environment and no command line of any visible process
  --read PATH        must not be readable
  --list DIRECTORY   must not be listable
  --write PATH       must not be writable, nor may it be created
  --connect SOCKET   this unix socket must not be connectable
  --tcp ADDRESS      this TCP address must not be connectable
  --kill PID         no process outside with this number may be reachable by a signal
  --out FILE         write the verdicts there too
  --wait             stay after the last verdict until killed, so that the window keeps its text
Always tried: memory, descriptors and tracing of every visible program of Fanlight's (ending the own streamer is the
application's own loss and not tried),
mounting, loading a kernel module, raw access to memory and disks, a new name for the machine.";

struct Probe {
    denied: usize,
    allowed: usize,
    out: Option<fs::File>,
}

impl Probe {
    /// Records an attempt. `Ok` is a success of the attempt, so a failure of the isolation.
    fn verdict(&mut self, attempt: &str, target: impl std::fmt::Display, result: Result<String, String>) {
        let (denied, detail) = match result {
            Ok(detail) => (false, detail),
            Err(detail) => (true, detail),
        };
        if denied {
            self.denied += 1;
        } else {
            self.allowed += 1;
        }
        self.line(
            &json!({ "attempt": attempt, "target": target.to_string(), "denied": denied, "detail": detail }),
        );
    }

    fn line(&mut self, value: &serde_json::Value) {
        println!("{value}");
        if let Some(out) = &mut self.out {
            // The verdict is on standard output in any case.
            let _ = writeln!(out, "{value}");
        }
    }
}

#[derive(Default)]
struct Targets {
    secrets: Vec<String>,
    read: Vec<PathBuf>,
    list: Vec<PathBuf>,
    write: Vec<PathBuf>,
    connect: Vec<PathBuf>,
    tcp: Vec<SocketAddr>,
    kill: Vec<i32>,
    out: Option<PathBuf>,
    wait: bool,
}

fn targets(mut arguments: impl Iterator<Item = String>) -> Result<Targets> {
    let mut targets = Targets::default();
    while let Some(argument) = arguments.next() {
        if argument == "--wait" {
            targets.wait = true;
            continue;
        }
        let value = arguments.next().with_context(|| format!("{argument} needs a value\n{USAGE}"))?;
        match argument.as_str() {
            "--secret" => targets.secrets.push(value),
            "--read" => targets.read.push(value.into()),
            "--list" => targets.list.push(value.into()),
            "--write" => targets.write.push(value.into()),
            "--connect" => targets.connect.push(value.into()),
            "--tcp" => {
                targets.tcp.push(value.parse().with_context(|| format!("--tcp {value:?} is no address"))?)
            }
            "--kill" => {
                targets.kill.push(value.parse().with_context(|| format!("--kill {value:?} is no pid"))?)
            }
            "--out" => targets.out = Some(value.into()),
            other => bail!("unknown argument {other:?}\n{USAGE}"),
        }
    }
    Ok(targets)
}

fn main() -> Result<()> {
    let targets = targets(std::env::args().skip(1))?;
    let out = match &targets.out {
        Some(path) => Some(fs::File::create(path).with_context(|| format!("creating {}", path.display()))?),
        None => None,
    };
    let mut probe = Probe { denied: 0, allowed: 0, out };
    let text = |error: std::io::Error| error.to_string();

    for path in &targets.read {
        let result = fs::read(path).map(|bytes| format!("read {} bytes", bytes.len())).map_err(text);
        probe.verdict("read", path.display(), result);
    }
    for path in &targets.list {
        let result = fs::read_dir(path).map(|entries| format!("{} entries", entries.count())).map_err(text);
        probe.verdict("list", path.display(), result);
    }
    for path in &targets.write {
        let result = fs::OpenOptions::new().append(true).create(true).open(path);
        probe.verdict("write", path.display(), result.map(|_| "opened for writing".into()).map_err(text));
    }
    for path in &targets.connect {
        probe.verdict(
            "connect",
            path.display(),
            UnixStream::connect(path).map(|_| "connected".into()).map_err(text),
        );
    }
    for address in &targets.tcp {
        let result = TcpStream::connect_timeout(address, Duration::from_secs(2));
        probe.verdict("connect", address, result.map(|_| "connected".into()).map_err(text));
    }
    for pid in &targets.kill {
        let result = match Pid::from_raw(*pid) {
            // Signal 0 only asks whether one may be sent.
            Some(pid) => rustix::process::test_kill_process(pid).map(|()| "reachable".into()),
            None => Err(rustix::io::Errno::SRCH),
        };
        probe.verdict("kill", pid, result.map_err(|error| error.to_string()));
    }

    processes(&mut probe, &targets.secrets);
    machine(&mut probe);

    let (denied, allowed) = (probe.denied, probe.allowed);
    probe.line(
        &json!({ "summary": true, "attempts": denied + allowed, "denied": denied, "allowed": allowed }),
    );
    if targets.wait {
        loop {
            std::thread::park();
        }
    }
    std::process::exit(i32::from(allowed > 0));
}

/// Our own pid and those of our ancestors that run nothing but a shell or terminal for us: what belongs to the
/// application may look into itself.
fn own(text: &dyn Fn(i32) -> Option<(String, i32)>) -> BTreeSet<i32> {
    const APPLICATION: [&str; 8] = ["fanlight-probe", "sh", "bash", "dash", "zsh", "foot", "env", "timeout"];
    let mut mine = BTreeSet::from([std::process::id() as i32]);
    let mut pid = std::process::id() as i32;
    while let Some((_, parent)) = text(pid) {
        match text(parent) {
            Some((name, _)) if APPLICATION.contains(&name.as_str()) => mine.insert(parent),
            _ => break,
        };
        pid = parent;
    }
    mine
}

/// Name and parent of a process.
fn status(pid: i32) -> Option<(String, i32)> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |name: &str| {
        status.lines().find_map(|line| line.strip_prefix(name)).map(|value| value.trim().to_owned())
    };
    Some((field("Name:")?, field("PPid:")?.parse().ok()?))
}

fn processes(probe: &mut Probe, secrets: &[String]) {
    let mine = own(&status);
    let visible = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids: Vec<i32> = visible.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    for pid in pids {
        // Our own command line, and that of the shell that runs us, say what to look for.
        let kinds: &[&str] = if mine.contains(&pid) { &["environ"] } else { &["environ", "cmdline", "auxv"] };
        let files: Vec<Vec<u8>> =
            kinds.iter().map(|file| fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default()).collect();
        for secret in secrets {
            let found = files.iter().any(|bytes| contains(bytes, secret.as_bytes()));
            let result = if found { Ok("found".to_owned()) } else { Err("not there".to_owned()) };
            probe.verdict("find the secret in the process", pid, result);
        }
        if mine.contains(&pid) {
            continue;
        }
        let name = status(pid).map_or_else(|| "gone".to_owned(), |(name, _)| name);
        // Processes started by the application are its own; only the streamer's are foreign.
        if !name.starts_with("fanlight-") || name == "fanlight-scene" || name == "fanlight-pattern" {
            continue;
        }
        let target = format!("{pid} {name}");
        for file in ["environ", "mem", "maps"] {
            let path = format!("/proc/{pid}/{file}");
            let result = fs::File::open(&path).map(|mut file| {
                use std::io::Read as _;
                // Address 0 of `mem` is never mapped: opening it is the right that counts.
                let mut bytes = [0; 16];
                file.read(&mut bytes).map_or_else(|error| error.to_string(), |count| format!("{count} bytes"))
            });
            let empty = matches!(&result, Ok(detail) if detail == "0 bytes");
            let result =
                if empty { Err("empty".to_owned()) } else { result.map_err(|error| error.to_string()) };
            probe.verdict(&format!("open {file} of"), &target, result);
        }
        let descriptors =
            fs::read_dir(format!("/proc/{pid}/fd")).map(|entries| format!("{} open", entries.count()));
        probe.verdict("list descriptors of", &target, descriptors.map_err(|error| error.to_string()));
        probe.verdict("trace", &target, trace(pid));
    }
}

fn contains(bytes: &[u8], wanted: &[u8]) -> bool {
    !wanted.is_empty() && bytes.windows(wanted.len()).any(|window| window == wanted)
}

/// Attaches to a process as a debugger and lets go again.
fn trace(pid: i32) -> Result<String, String> {
    let nothing = std::ptr::null_mut::<libc::c_void>();
    // SAFETY: attaching takes no pointers; the process may refuse.
    if unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, nothing, nothing) } != 0 {
        return Err(std::io::Error::last_os_error().to_string());
    }
    // A seized process goes on running and is let go when we end.
    Ok("attached".into())
}

/// What only the machine's own administrator may do.
fn machine(probe: &mut Probe) {
    let errno = || std::io::Error::last_os_error().to_string();
    let result = |code: libc::c_int| if code == 0 { Ok("done".to_owned()) } else { Err(errno()) };

    let place = Path::new("/tmp/fanlight-probe-mount");
    let _ = fs::create_dir_all(place);
    let target = std::ffi::CString::new("/tmp/fanlight-probe-mount").expect("no zero byte in a constant");
    // SAFETY: all pointers are zero-terminated constants, no data is passed.
    let mounted =
        unsafe { libc::mount(c"none".as_ptr(), target.as_ptr(), c"tmpfs".as_ptr(), 0, std::ptr::null()) };
    probe.verdict("mount", place.display(), result(mounted));
    if mounted == 0 {
        // SAFETY: as above.
        unsafe { libc::umount(target.as_ptr()) };
    }
    let _ = fs::remove_dir(place);

    // SAFETY: the name is a constant with its length. Ours is set again, so nothing changes even where it may.
    let renamed = unsafe {
        let mut name = [0_u8; 256];
        libc::gethostname(name.as_mut_ptr().cast(), name.len());
        let length = name.iter().position(|byte| *byte == 0).unwrap_or(0);
        libc::sethostname(name.as_ptr().cast(), length)
    };
    probe.verdict("rename", "the machine", result(renamed));

    // SAFETY: an empty module image of length 0 can load nothing; a missing right is reported before it is read.
    let loaded =
        unsafe { libc::syscall(libc::SYS_init_module, std::ptr::null::<u8>(), 0_usize, c"".as_ptr()) };
    let loaded = match std::io::Error::last_os_error().raw_os_error() {
        _ if loaded == 0 => Ok("loaded".to_owned()),
        Some(libc::EPERM | libc::ENOSYS) => Err(errno()),
        _ => Ok(format!("the right is there: {}", errno())),
    };
    probe.verdict("load a kernel module", "init_module", loaded);

    for device in ["/dev/mem", "/dev/kmem", "/dev/port", "/dev/vda", "/dev/sda", "/dev/nvme0n1"] {
        let result = fs::File::open(device).map(|_| "opened".to_owned()).map_err(|error| error.to_string());
        probe.verdict("open", device, result);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_processes_are_those_up_to_the_first_that_is_no_shell() {
        let me = std::process::id() as i32;
        let tree = move |pid: i32| match pid {
            _ if pid == me => Some(("fanlight-probe".to_owned(), 30)),
            30 => Some(("sh".to_owned(), 20)),
            20 => Some(("foot".to_owned(), 10)),
            10 => Some(("fanlight-streamer".to_owned(), 1)),
            _ => None,
        };
        assert_eq!(own(&tree), BTreeSet::from([me, 30, 20]));
    }

    #[test]
    fn secrets_are_found_anywhere_and_arguments_need_values() {
        assert!(contains(b"A=1\0TOKEN=abc\0", b"abc") && !contains(b"ab", b"abc") && !contains(b"x", b""));
        assert!(targets(["--read".to_owned()].into_iter()).is_err());
        assert!(targets(["--tcp".to_owned(), "nowhere".to_owned()].into_iter()).is_err());
        assert!(targets(["--list".to_owned(), "/x".to_owned(), "--wait".to_owned()].into_iter()).is_ok());
    }
}
