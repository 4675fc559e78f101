//! Programs in the sandbox of a running instance: how they get in, their terminal, and how they end. What may be run by
//! whom is decided above.
//!
//! `nsenter` brings them in rather than the shim: the shim is no part of the sandbox either, so it would have to do the
//! same, and a program that somebody talks to is of no use to anybody once AMS, which carries what is said, is gone.
//! Nothing of what a user names is used before all rights are dropped: the environment goes in under names that mean
//! nothing to the programs on the way, and takes effect in the last of them.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    pin::Pin,
    process::{ExitStatus, Stdio},
    sync::{Arc, Weak},
    task::{Context, Poll, ready},
    time::Duration,
};

use fanlight_api::InstanceId;
use rustix::{
    fs::{Gid, Mode, OFlags, Uid, fchown},
    process::{Pid, Signal, kill_process_group},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf, unix::AsyncFd},
    process::{Child, Command},
    sync::{mpsc, oneshot},
    time::{Instant, timeout},
};

use super::{Control, EngineError, Exec, Running, cgroup::Group};
use crate::{
    isolation::{self, Isolation},
    processes::{self, Identity},
};

/// Names a program and all that it starts, in their environment.
const MARK: &str = "FANLIGHT_EXEC";
/// How long a program may take to go after its user is gone.
const GOODBYE: Duration = Duration::from_secs(2);
/// How long the way into an instance may take.
const BEGIN_TIME: Duration = Duration::from_secs(2);
/// How long the end of what was killed may take.
const KILL_TIME: Duration = Duration::from_secs(10);
/// Most processes of an instance's user, as for the application.
const MAX_PROCESSES: u64 = 4096;
/// Takes the environment of the user and becomes the program. It runs inside, without rights.
const BECOME: &str = r#"fanlight_n=0
while eval "fanlight_v=\${FANLIGHT_V$fanlight_n-}"; [ -n "$fanlight_v" ]; do
unset "FANLIGHT_V$fanlight_n"; export "$fanlight_v"; fanlight_n=$((fanlight_n + 1))
done
unset fanlight_n fanlight_v
exec "$@""#;

/// A running instance, as far as getting in needs it.
pub(super) struct Place<'a> {
    /// Which.
    pub id: &'a InstanceId,
    /// Its outermost process.
    pub sandbox: &'a Identity,
    /// How it is kept apart.
    pub isolation: &'a Isolation,
    /// User and group id inside.
    pub owner: (u32, u32),
    /// The control group that it is kept in.
    pub group: Option<&'a Group>,
    /// What the application has.
    pub environment: BTreeMap<String, String>,
}

/// The spaces of a sandbox, held open: whatever happens to its processes, these are never those of others.
struct Spaces {
    files: Vec<(&'static str, OwnedFd)>,
    /// The first process inside.
    first: Identity,
}

impl Spaces {
    fn open(place: &Place<'_>) -> io::Result<Self> {
        let gone = || io::Error::new(io::ErrorKind::NotFound, "the sandbox is not there");
        let first = processes::children(place.sandbox.pid).into_iter().next().ok_or_else(gone)?;
        // Before the streamer is there the sandbox is still being made.
        if processes::children(first.pid).is_empty() {
            return Err(gone());
        }
        let mut files: Vec<(&str, OwnedFd)> = Vec::new();
        for (option, name) in [("--mount", "mnt"), ("--uts", "uts"), ("--ipc", "ipc"), ("--pid", "pid")] {
            let path = format!("/proc/{}/ns/{name}", first.pid);
            if fs::read_link(&path)? == fs::read_link(format!("/proc/self/ns/{name}"))? {
                return Err(io::Error::other(format!("the sandbox has no {name} space of its own")));
            }
            files.push((option, File::open(&path)?.into()));
        }
        if matches!(place.isolation, Isolation::UserNamespace(_)) {
            // The one that the mounts belong to; the processes inside are in one below it already.
            // SAFETY: the file is open, and this request takes no argument and gives a new descriptor.
            let parent = unsafe { libc::ioctl(files[0].1.as_raw_fd(), libc::NS_GET_USERNS) };
            if parent < 0 {
                return Err(io::Error::last_os_error());
            }
            // SAFETY: the kernel has just made it for us.
            files.push(("--user", unsafe { OwnedFd::from_raw_fd(parent) }));
        }
        // What was opened is of the process that was meant.
        if !first.is_alive() || !place.sandbox.is_alive() {
            return Err(gone());
        }
        Ok(Self { files, first })
    }

    fn arguments(&self) -> Vec<String> {
        let own = std::process::id();
        self.files
            .iter()
            .map(|(option, file)| format!("{option}=/proc/{own}/fd/{}", file.as_raw_fd()))
            .collect()
    }

    /// A new terminal of the sandbox: our end and the program's.
    fn terminal(&self, owner: (u32, u32), size: (u16, u16)) -> io::Result<(OwnedFd, OwnedFd)> {
        // Of the sandbox's own, so that its name means the same inside. Nobody inside can put another file there.
        let path = format!("/proc/{}/root/dev/pts/ptmx", self.first.pid);
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOFOLLOW;
        let ours = rustix::fs::open(path, flags, Mode::empty())?;
        let locked: libc::c_int = 0;
        // SAFETY: the descriptor is open and the argument points to an int, as tty_ioctl(4) says.
        if unsafe { libc::ioctl(ours.as_raw_fd(), libc::TIOCSPTLCK, &raw const locked) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
        // SAFETY: the descriptor is open; the argument is a number, and the answer a new descriptor.
        let theirs = unsafe { libc::ioctl(ours.as_raw_fd(), libc::TIOCGPTPEER, flags) };
        if theirs < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made it for us.
        let theirs = unsafe { OwnedFd::from_raw_fd(theirs) };
        if rustix::process::geteuid().is_root() {
            fchown(&theirs, Some(Uid::from_raw(owner.0)), Some(Gid::from_raw(owner.1)))?;
        }
        resize(&ours, size)?;
        Ok((ours, theirs))
    }
}

fn resize(terminal: &OwnedFd, (columns, rows): (u16, u16)) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the descriptor is open and the argument points to what tty_ioctl(4) asks for.
    match unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Runs a program inside.
pub(super) async fn run(place: Place<'_>, exec: Exec) -> Result<Running, EngineError> {
    let doing = "running a program in the instance";
    let refused = |reason: String| EngineError::Refused { doing, reason };
    match exec.command.first() {
        Some(program) if !program.is_empty() && !program.starts_with('-') => {}
        _ => return Err(refused("command must begin with the name of a program".into())),
    }
    if let Some(name) = exec.environment.keys().find(|name| !is_variable(name)) {
        let name: String = name.chars().take(64).collect();
        return Err(refused(format!("{name:?} in environment is no name of a variable")));
    }
    if exec.command.iter().chain(exec.environment.values()).any(|text| text.contains('\0')) {
        return Err(refused("command and environment must not hold a NUL character".into()));
    }
    let spaces = Spaces::open(&place).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => EngineError::NotRunning(place.id.clone()),
        _ => refused(error.to_string()),
    })?;
    let fail = |error: io::Error| refused(error.to_string());
    let line = line(&place, &spaces.arguments(), &exec).map_err(refused)?;
    let random: [u8; 16] = rand::random();
    let mark = format!("{MARK}={}-{}", place.id, hex::encode(random));
    let mut command = Command::new(&line[0]);
    // SAFETY: it only sets signals to their defaults, which is allowed between fork and exec.
    unsafe {
        command.pre_exec(|| {
            processes::hear_signals();
            Ok(())
        });
    }
    if let Some(group) = place.group {
        // What is run counts as what the instance takes.
        group.receive(command.as_std_mut()).map_err(fail)?;
    }
    command.args(&line[1..]).current_dir("/").env_clear().envs(&place.environment);
    // It speaks for the streamer alone.
    command.env_remove("NOTIFY_SOCKET");
    command.env(MARK, mark.split_once('=').map_or("", |(_, value)| value));
    if exec.terminal.is_some() {
        command.env("TERM", "xterm-256color");
    }
    for (number, (name, value)) in exec.environment.iter().enumerate() {
        command.env(format!("FANLIGHT_V{number}"), format!("{name}={value}"));
    }
    let (control, controls) = mpsc::channel(16);
    let (end, ended) = oneshot::channel();
    let Some(size) = exec.terminal else {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(fail)?;
        let piped = "it was piped";
        let stdin = Box::pin(child.stdin.take().expect(piped));
        let stdout = Box::pin(child.stdout.take().expect(piped));
        let stderr = Box::pin(child.stderr.take().expect(piped));
        tokio::spawn(keep(child, spaces, Weak::new(), mark, controls, end));
        return Ok(Running { stdin, stdout, stderr: Some(stderr), control, ended });
    };
    let (ours, theirs) = spaces.terminal(place.owner, size).map_err(fail)?;
    let again = || theirs.try_clone().map(Stdio::from);
    command.stdin(again().map_err(fail)?).stdout(again().map_err(fail)?).stderr(again().map_err(fail)?);
    // SAFETY: what is registered owns the descriptor, and nothing takes it out or replaces it.
    let ours = unsafe { AsyncFd::register(ours) }.map_err(|error| fail(error.into()))?;
    let terminal = Terminal(Arc::new(ours));
    let child = command.spawn().map_err(fail)?;
    // Also the ends that the command holds: the end of the program must be the end of its output.
    drop((command, theirs));
    tokio::spawn(keep(child, spaces, Arc::downgrade(&terminal.0), mark, controls, end));
    Ok(Running {
        stdin: Box::pin(Terminal(terminal.0.clone())),
        stdout: Box::pin(terminal),
        stderr: None,
        control,
        ended,
    })
}

/// Ends every program that was run in an instance and is still there.
pub(super) fn sweep_all(id: &InstanceId) {
    sweep(&format!("{MARK}={id}-"));
}

fn is_variable(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes.next().is_some_and(|first| first == b'_' || first.is_ascii_alphabetic())
        && bytes.all(|byte| byte == b'_' || byte.is_ascii_alphanumeric())
}

fn tool(name: &str) -> Result<String, String> {
    let path: Option<PathBuf> = isolation::find(name);
    path.map(|path| path.display().to_string())
        .ok_or_else(|| format!("the program {name} is missing: install the package util-linux"))
}

/// The programs on the way in, each of which becomes the next.
fn line(place: &Place<'_>, spaces: &[String], exec: &Exec) -> Result<Vec<String>, String> {
    let (uid, gid) = place.owner;
    let mut line = vec![tool("nsenter")?];
    line.extend_from_slice(spaces);
    let mut add = |texts: &[&str]| line.extend(texts.iter().map(ToString::to_string));
    let (nsenter, setpriv, prlimit) = (tool("nsenter")?, tool("setpriv")?, tool("prlimit")?);
    let (setsid, unshare) = (tool("setsid")?, tool("unshare")?);
    let (uid, gid) = (uid.to_string(), gid.to_string());
    let processes = format!("--nproc={MAX_PROCESSES}:{MAX_PROCESSES}");
    let session = |add: &mut dyn FnMut(&[&str])| {
        add(&["/usr/bin/env", "-C", isolation::HOME, &setsid]);
        if exec.terminal.is_some() {
            add(&["--ctty"]);
        }
    };
    match place.isolation {
        Isolation::OwnUser(_) => {
            add(&["--", &prlimit, "--core=0:0", &processes]);
            add(&[&setpriv, "--reuid", &uid, "--regid", &gid, "--clear-groups"]);
            add(&["--inh-caps=-all", "--bounding-set=-all", "--no-new-privs", "--"]);
            session(&mut add);
            add(&[&unshare, "--user", "--map-current-user", "--"]);
        }
        Isolation::UserNamespace(_) => {
            add(&["--preserve-credentials", "--", &prlimit, "--core=0:0"]);
            // Where the processes inside are; becoming another program there takes all rights away.
            add(&[&nsenter, "--user=/proc/1/ns/user", "--preserve-credentials", "--"]);
            add(&[&setpriv, "--inh-caps=-all", "--no-new-privs", "--"]);
            session(&mut add);
        }
        Isolation::Refused { reason } => return Err(reason.clone()),
    }
    add(&["/bin/sh", "-c", BECOME, "sh"]);
    line.extend(exec.command.iter().cloned());
    Ok(line)
}

/// Until the program has ended.
async fn keep(
    mut child: Child,
    spaces: Spaces,
    terminal: Weak<AsyncFd<OwnedFd>>,
    mark: String,
    mut controls: mpsc::Receiver<Control>,
    mut end: oneshot::Sender<i32>,
) {
    let nsenter = child.id().and_then(|pid| i32::try_from(pid).ok());
    let mut open = true;
    let code = loop {
        tokio::select! {
            status = child.wait() => break code(status),
            said = controls.recv(), if open => match said {
                Some(Control::Resize(columns, rows)) => {
                    if let Some(terminal) = terminal.upgrade() {
                        // A terminal that is gone has no size.
                        let _ = resize(terminal.get_ref(), (columns, rows));
                    }
                }
                Some(Control::Signal(number)) => {
                    begun(nsenter).await;
                    signal(nsenter, number);
                }
                Some(Control::HangUp) => break finish(&mut child, nsenter, &mark).await,
                None => open = false,
            },
            () = end.closed(), if !open => break finish(&mut child, nsenter, &mark).await,
        }
    };
    drop(spaces);
    // Nobody waiting is fine.
    let _ = end.send(code);
}

/// Its user is gone: it is told, and what does not listen is killed, with all that it has started.
async fn finish(child: &mut Child, nsenter: Option<i32>, mark: &str) -> i32 {
    signal(nsenter, Signal::HUP.as_raw());
    let _ = timeout(GOODBYE, child.wait()).await;
    let deadline = Instant::now() + KILL_TIME;
    loop {
        let mark = mark.to_owned();
        let killed = tokio::task::spawn_blocking(move || sweep(&mark)).await.unwrap_or_default();
        let over = match timeout(Duration::from_millis(50), child.wait()).await {
            Ok(status) => Some(code(status)),
            Err(_) => None,
        };
        match over {
            Some(code) if killed == 0 => return code,
            _ if Instant::now() > deadline => {
                tracing::warn!("a program in an instance does not end");
                return over.unwrap_or(128 + Signal::KILL.as_raw());
            }
            _ => {}
        }
    }
}

fn code(status: io::Result<ExitStatus>) -> i32 {
    use std::os::unix::process::ExitStatusExt as _;
    let Ok(status) = status else { return 128 + Signal::KILL.as_raw() };
    status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(-1)
}

/// Waits until the program is there, for a while: who says something right after the start means it, too.
async fn begun(nsenter: Option<i32>) {
    let deadline = Instant::now() + BEGIN_TIME;
    let is_there = || nsenter.is_some_and(|pid| !processes::children(pid).is_empty());
    while !is_there() && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Sends a signal to the program, and to those that it works together with.
fn signal(nsenter: Option<i32>, number: i32) {
    let Some(signal) = Signal::from_named_raw(number) else { return };
    let Some(program) = nsenter.and_then(|pid| processes::children(pid).into_iter().next()) else { return };
    let group = Pid::from_raw(program.pid).filter(|_| program.is_alive());
    let told = group.is_some_and(|group| kill_process_group(group, signal).is_ok());
    if !told {
        program.signal(signal);
    }
}

/// Kills every process whose environment holds a mark, and gives their number.
fn sweep(mark: &str) -> usize {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter_map(Identity::of)
        .filter(|process| process.is_alive() && is_marked(process.pid, mark))
        .map(|process| process.signal(Signal::KILL))
        .count()
}

fn is_marked(pid: i32, mark: &str) -> bool {
    let environment = fs::read(Path::new("/proc").join(pid.to_string()).join("environ")).unwrap_or_default();
    environment.split(|byte| *byte == 0).any(|variable| variable.starts_with(mark.as_bytes()))
}

/// Our end of a terminal. All of them closed is the hang-up.
struct Terminal(Arc<AsyncFd<OwnedFd>>);

impl AsyncRead for Terminal {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(cx))?;
            let read =
                guard.try_io(|file| Ok(rustix::io::read(file.get_ref(), buffer.initialize_unfilled())?));
            match read {
                Ok(Ok(length)) => {
                    buffer.advance(length);
                    return Poll::Ready(Ok(()));
                }
                // So says a terminal whose last program is gone.
                Ok(Err(error)) if error.raw_os_error() == Some(libc::EIO) => return Poll::Ready(Ok(())),
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_) => {}
            }
        }
    }
}

impl AsyncWrite for Terminal {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(cx))?;
            if let Ok(written) = guard.try_io(|file| Ok(rustix::io::write(file.get_ref(), bytes)?)) {
                return Poll::Ready(written);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_variables_are_checked() {
        assert!(["A", "_a1", "LD_PRELOAD"].iter().all(|name| is_variable(name)));
        assert!(["", "1A", "A B", "A=B", "A;rm", "ä"].iter().all(|name| !is_variable(name)));
    }

    #[test]
    fn the_end_by_a_signal_is_told_apart_from_an_exit() {
        use std::os::unix::process::ExitStatusExt as _;
        assert_eq!(code(Ok(ExitStatus::from_raw(3 << 8))), 3);
        assert_eq!(code(Ok(ExitStatus::from_raw(15))), 143);
    }
}
