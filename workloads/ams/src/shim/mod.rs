//! The shim: one small process per running instance, in a session of its own, which outlives AMS.
//!
//! It starts the sandbox, feeds the guest file to the streamer, hears its readiness and its result on the notify
//! socket, keeps the logs, writes the state of the run, and answers AMS on a socket: the full state first, then
//! every change, one JSON line each. It decides nothing: when it is asked to stop it asks the streamer, and kills
//! when the grace is over. When the shim itself is killed, the sandbox dies with it.

pub mod report;

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use fanlight_api::{
    PROTOCOL_VERSION,
    guest::{EndReason, Ended, conclude},
    notify,
};
use fanlight_service::{bounded_log::Log, telemetry};
use rustix::{
    fs::{FlockOperation, flock},
    process::{Resource, Rlimit, Signal, WaitOptions, setrlimit, waitpid},
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixDatagram, UnixListener, UnixStream},
    process::Child,
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
    task::JoinSet,
    time::Instant,
};

use self::report::{Command, Launch, Report};
use crate::{
    core::life::Phase,
    engine::Group,
    processes::{self, Identity},
    size,
};

/// Bound of the streamer's log, both parts, bytes.
const LOG_BOUND: u64 = 8 << 20;
/// How long the end of what was killed may take.
const KILL_TIME: Duration = Duration::from_secs(10);
/// How long to wait for output and connections after the end.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// Grace for a stop that came as a signal.
const SIGNAL_GRACE: Duration = Duration::from_secs(10);

/// The program `shim FOLDER`. Returns its exit status: 0 when the run came to an end, however it ended.
pub fn main(folder: &Path) -> i32 {
    // A filter that is not understood is no reason to run nothing.
    let _ = telemetry::init(telemetry::Format::Text, "info");
    match keep(folder) {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("{error:#}");
            1
        }
    }
}

fn keep(folder: &Path) -> Result<()> {
    // Own session: neither a terminal's Ctrl-C nor the end of AMS reaches the instance. Fails only where that
    // is already so.
    let _ = rustix::process::setsid();
    // After that: no terminal is ours, but programs inside have some.
    processes::hear_signals();
    // What a sandbox leaves behind when it is killed comes to this process, and to nobody else.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .context("becoming the parent of what the sandbox leaves behind")?;
    // What is written here is for AMS alone.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    // The one thread is the one that starts the sandbox: the kernel kills that with the thread.
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the runtime")?;
    runtime.block_on(run(folder))
}

async fn run(folder: &Path) -> Result<()> {
    let folder = folder.canonicalize().with_context(|| format!("finding the folder {}", folder.display()))?;
    let lock = File::create(folder.join(report::LOCK_FILE)).context("making the lock")?;
    if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        bail!("another shim runs the instance in {}", folder.display());
    }
    let launch: Launch = report::read(&folder.join(report::LAUNCH_FILE))
        .context("reading what to run")?
        .context("there is nothing to run: no launch.json")?;
    let guest = std::fs::read(folder.join(report::GUEST_FILE)).context("reading the guest file")?;
    let mut run = Run::new(folder, &launch)?;
    let ended = match run.start(&launch, guest) {
        Ok(child) => within(launch.group.as_ref(), run.watch(child).await),
        Err(error) => Ended { reason: EndReason::Failed, message: format!("{error:#}") },
    };
    end_children().await;
    run.end(ended).await;
    drop(lock);
    Ok(())
}

struct Run {
    folder: PathBuf,
    report: watch::Sender<Report>,
    notify: UnixDatagram,
    listener: Option<UnixListener>,
    commands: mpsc::Receiver<Command>,
    commands_from: mpsc::Sender<Command>,
    connections: JoinSet<()>,
    logs: JoinSet<()>,
    result: Option<Ended>,
}

impl Run {
    fn new(folder: PathBuf, launch: &Launch) -> Result<Self> {
        use std::os::unix::fs::PermissionsExt as _;
        let notify_path = folder.join(report::NOTIFY_FOLDER).join(report::NOTIFY_SOCKET);
        let notify = bind(&notify_path, |path| UnixDatagram::bind(path))?;
        // The streamer has another user id; the folder is mounted for it alone.
        std::fs::set_permissions(&notify_path, std::fs::Permissions::from_mode(0o666))
            .context("opening the notify socket")?;
        let first = Report {
            version: PROTOCOL_VERSION,
            run: launch.run,
            shim: Identity::own().context("looking at this process")?,
            sandbox: None,
            phase: Phase::Starting,
            status: String::new(),
        };
        report::write(&folder.join(report::STATE_FILE), &first).context("writing the state of the run")?;
        // Last: who can connect finds the state.
        let listener = bind(&folder.join(report::SOCKET), |path| UnixListener::bind(path))?;
        let (commands_from, commands) = mpsc::channel(8);
        Ok(Self {
            folder,
            report: watch::Sender::new(first),
            notify,
            listener: Some(listener),
            commands,
            commands_from,
            connections: JoinSet::new(),
            logs: JoinSet::new(),
            result: None,
        })
    }

    fn start(&mut self, launch: &Launch, guest: Vec<u8>) -> Result<Child> {
        // Memory of somebody's session does not belong on the disk.
        let none = Rlimit { current: Some(0), maximum: Some(0) };
        setrlimit(Resource::Core, none).context("switching core dumps off")?;
        if let Some(most) = launch.processes {
            let limit = Rlimit { current: Some(most), maximum: Some(most) };
            setrlimit(Resource::Nproc, limit).context("bounding the number of processes")?;
        }
        let [program, arguments @ ..] = launch.command.as_slice() else {
            bail!("there is no program to run")
        };
        let (output, output_of_child) = io::pipe().context("making a pipe")?;
        let mut command = tokio::process::Command::new(program);
        if let Some(group) = &launch.group {
            group.receive(command.as_std_mut()).context("entering the control group of the instance")?;
        }
        let mut child = command
            .args(arguments)
            .env_clear()
            .envs(&launch.environment)
            .stdin(Stdio::piped())
            .stdout(output_of_child.try_clone().context("making a pipe")?)
            .stderr(output_of_child)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("starting {program}"))?;
        let sandbox = child.id().and_then(|pid| Identity::of(pid.cast_signed()));
        self.change(|report| report.sandbox = sandbox);
        let mut stdin = child.stdin.take().expect("it was piped");
        self.logs.spawn(async move {
            // A program that ends without reading says why in its log.
            let _ = stdin.write_all(&guest).await;
        });
        let output =
            tokio::net::unix::pipe::Receiver::from_owned_fd(output.into()).context("reading the log")?;
        let log = Log::new(self.folder.join(report::LOGS).join("streamer.log"), LOG_BOUND);
        self.logs.spawn(copy(output, log));
        Ok(child)
    }

    /// Until the sandbox has ended.
    async fn watch(&mut self, mut child: Child) -> Ended {
        let mut terminate = signal(SignalKind::terminate()).ok();
        let mut datagram = vec![0; 64 * 1024];
        let mut stop: Option<Stop> = None;
        let status = loop {
            let due = stop.as_ref().map(|stop| stop.next);
            tokio::select! {
                status = child.wait() => break status,
                received = self.notify.recv(&mut datagram) => {
                    if let Ok(length) = received {
                        self.hear(&datagram[..length]);
                    }
                }
                Some(command) = self.commands.recv() => {
                    let now = Instant::now();
                    let deadline = match command {
                        Command::Stop { grace_s } => now + Duration::from_secs(grace_s.min(3600)),
                        Command::Kill => now,
                    };
                    // A shorter grace counts, a longer one does not.
                    let stop = stop.get_or_insert(Stop { deadline, next: now, asked: false });
                    stop.deadline = stop.deadline.min(deadline);
                    stop.next = stop.next.min(now);
                    self.phase(Phase::Stopping);
                }
                _ = async { terminate.as_mut().expect("checked").recv().await }, if terminate.is_some() => {
                    let _ = self.commands_from.try_send(Command::Stop { grace_s: SIGNAL_GRACE.as_secs() });
                }
                accepted = accept(&self.listener) => {
                    let (reports, commands) = (self.report.subscribe(), self.commands_from.clone());
                    self.connections.spawn(converse(accepted, reports, commands));
                }
                () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                    let stop = stop.as_mut().expect("it is due");
                    stop.act(&mut child);
                }
            }
        };
        // The result may still lie in the socket.
        while let Ok(length) = self.notify.try_recv(&mut datagram) {
            self.hear(&datagram[..length]);
        }
        conclude(status, stop.map(|stop| stop.asked), self.result.take())
    }

    fn hear(&mut self, datagram: &[u8]) {
        let notice = notify::parse(datagram);
        if notice.result.is_some() {
            self.result = notice.result;
        }
        if let Some(status) = notice.status {
            self.report.send_modify(|report| report.status = status);
        }
        if notice.ready && self.report.borrow().phase == Phase::Starting {
            self.phase(Phase::Ready);
        }
    }

    fn phase(&self, phase: Phase) {
        self.change(|report| report.phase = phase);
    }

    fn change(&self, change: impl FnOnce(&mut Report)) {
        let before = self.report.borrow().clone();
        let mut report = before.clone();
        change(&mut report);
        if report == before {
            return;
        }
        // First the file, then whoever listens: what was told is never taken back by a crash.
        if let Err(error) = report::write(&self.folder.join(report::STATE_FILE), &report) {
            tracing::error!("writing the state of the run: {error}");
        }
        self.report.send_replace(report);
    }

    async fn end(mut self, ended: Ended) {
        tracing::info!("the run has ended: {:?}: {}", ended.reason, ended.message);
        let logs = std::mem::take(&mut self.logs);
        let _ = tokio::time::timeout(LAST_WORDS, logs.join_all()).await;
        self.phase(Phase::Ended(ended));
        self.listener = None;
        let _ = std::fs::remove_file(self.folder.join(report::SOCKET));
        // Without a sender the connections say the last state and end.
        let connections = std::mem::take(&mut self.connections);
        drop(self);
        let _ = tokio::time::timeout(LAST_WORDS, connections.join_all()).await;
    }
}

/// Ends what is left of the sandbox below this process. Its inner process ends with its outer one only from when it has
/// made its mounts, and has ended only when every process of its namespace has: then their ports are free.
async fn end_children() {
    let own = rustix::process::getpid().as_raw_nonzero().get();
    let deadline = Instant::now() + KILL_TIME;
    loop {
        loop {
            match waitpid(None, WaitOptions::NOHANG) {
                Ok(Some(_)) => {}
                Ok(None) => break,
                // There are no children any more.
                Err(_) => return,
            }
        }
        for child in processes::children(own) {
            child.signal(Signal::KILL);
        }
        if Instant::now() > deadline {
            tracing::error!("a process of the instance does not end {KILL_TIME:?} after it was killed");
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Ends what is left of a sandbox whose shim is gone. Its inner process ends with its outer one only from when it has made its mounts; it
/// has the outer one's command line.
pub async fn end_sandbox(command: &[String]) {
    let deadline = Instant::now() + KILL_TIME;
    loop {
        let left = processes::with_command(command);
        for process in &left {
            process.signal(Signal::KILL);
        }
        if left.is_empty() || Instant::now() > deadline {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The end of a run whose group may have ended it: the kernel does that with a signal that says nothing.
fn within(group: Option<&Group>, ended: Ended) -> Ended {
    match group {
        Some(group) if ended.reason == EndReason::Failed && group.ran_out_of_memory() => Ended {
            reason: EndReason::Failed,
            message: format!(
                "out of memory: the instance wanted more than its {} (resources.memory)",
                size::format(group.bounds.memory_bytes)
            ),
        },
        _ => ended,
    }
}

/// A stop that is under way.
struct Stop {
    deadline: Instant,
    next: Instant,
    asked: bool,
}

impl Stop {
    fn act(&mut self, child: &mut Child) {
        let now = Instant::now();
        if now >= self.deadline {
            // The sandbox ends with its outer process.
            let _ = child.start_kill();
            self.next = now + Duration::from_secs(1);
            return;
        }
        self.next = self.deadline;
        if self.asked {
            return;
        }
        match streamer(child) {
            Some(streamer) => {
                streamer.signal(Signal::TERM);
                self.asked = true;
            }
            // The sandbox is still being made.
            None => self.next = (now + Duration::from_millis(20)).min(self.deadline),
        }
    }
}

/// The streamer: the first child of the sandbox's first process, which is the child of the one we started.
fn streamer(child: &Child) -> Option<Identity> {
    let outer = i32::try_from(child.id()?).ok()?;
    let first = processes::children(outer).into_iter().next()?;
    processes::children(first.pid).into_iter().next()
}

fn bind<T>(path: &Path, bind: impl FnOnce(&Path) -> io::Result<T>) -> Result<T> {
    // We hold the lock, so nobody answers there any more.
    let _ = std::fs::remove_file(path);
    bind(path).with_context(|| format!("making the socket {}", path.display()))
}

async fn accept(listener: &Option<UnixListener>) -> UnixStream {
    loop {
        match listener {
            None => std::future::pending().await,
            Some(listener) => match listener.accept().await {
                Ok((stream, _)) => return stream,
                Err(error) => {
                    tracing::warn!("accepting a connection: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
        }
    }
}

/// One connection: states out, commands in.
async fn converse(stream: UnixStream, mut reports: watch::Receiver<Report>, commands: mpsc::Sender<Command>) {
    let (read, mut write) = stream.into_split();
    let mut lines = BufReader::new(read).lines();
    loop {
        let mut line = serde_json::to_vec(&*reports.borrow_and_update()).expect("a report is JSON");
        line.push(b'\n');
        if write.write_all(&line).await.is_err() {
            return;
        }
        loop {
            tokio::select! {
                changed = reports.changed() => match changed {
                    Ok(()) => break,
                    Err(_) => return,
                },
                line = lines.next_line() => match line {
                    Ok(Some(line)) => match serde_json::from_str(&line) {
                        Ok(command) => {
                            if commands.send(command).await.is_err() {
                                return;
                            }
                        }
                        Err(error) => tracing::warn!("a command that is none: {error}"),
                    },
                    Ok(None) | Err(_) => return,
                },
            }
        }
    }
}

async fn copy(mut from: tokio::net::unix::pipe::Receiver, mut log: Log) {
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(length) = from.read(&mut buffer).await
        && length > 0
    {
        log.write(&buffer[..length]);
    }
}
