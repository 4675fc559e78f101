//! The supervisor inside a container: it runs the hooks of the application and the streamer, keeps their logs, and
//! writes how far the run is into one file, which AMS reads. A run that has ended never runs a second time.
//!
//! What the container is and when it starts is left to AMS; what it is made of, to the image.

use std::{
    fs, io,
    os::unix::{fs::PermissionsExt as _, process::ExitStatusExt as _},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use fanlight_api::{
    PROTOCOL_VERSION,
    guest::{
        self, ADDONS, EndReason, Ended, GUEST_FILE, GuestPhase, GuestRun, GuestState, RUN_FILE, STATE_FILE,
        conclude,
    },
    notify,
};
use fanlight_service::bounded_log::Log;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixDatagram,
    process::{Child, Command},
    signal::unix::{SignalKind, signal},
    task::JoinSet,
    time::{Instant, sleep_until, timeout},
};

use crate::{claim::SUPERVISED, notify::Notify};

/// Bound of each log, both parts, bytes.
const LOG_BOUND: u64 = 8 << 20;
/// How long to wait for output after the end.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// From the request to end until the streamer is killed. The container itself is given more.
const STOP_GRACE: Duration = Duration::from_secs(8);
/// How often a waiting program looks at the state.
const LOOK: Duration = Duration::from_millis(20);

/// What the supervisor works with.
#[derive(Clone, Debug)]
pub struct Options {
    /// Under which all paths are.
    pub root: PathBuf,
    /// Whose programs the streamer and the application are; none: the supervisor's own user.
    pub user: Option<User>,
    /// The program of the streamer.
    pub streamer: PathBuf,
    /// Whether the container is powered off at the end.
    pub poweroff: bool,
}

/// A user of the container.
#[derive(Clone, Debug)]
pub struct User {
    id: u32,
    group: u32,
}

impl User {
    /// Finds a user in the list of users.
    ///
    /// # Errors
    /// The list cannot be read or lacks the user.
    pub fn find(name: &str) -> Result<Self> {
        let list = fs::read_to_string("/etc/passwd").context("reading /etc/passwd")?;
        let user = list.lines().find_map(|line| {
            let mut fields = line.split(':');
            let (found, _, id, group) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
            (found == name).then_some(())?;
            Some(Self { id: id.parse().ok()?, group: group.parse().ok()? })
        });
        user.with_context(|| format!("the user {name} is not in /etc/passwd; install the package again"))
    }
}

/// Runs what AMS has ordered, to its end.
///
/// # Errors
/// There is no order, or the state of the run cannot be written.
pub fn main(options: Options) -> Result<()> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the runtime")?;
    runtime.block_on(supervise(options))
}

/// Waits until the run, or a later one, is ready or has ended.
///
/// # Errors
/// A state file that cannot be read.
pub fn wait(root: &Path, run: u32) -> Result<GuestState> {
    loop {
        if let Some(state) = state(root)?
            && state.run >= run
            && matches!(state.phase, GuestPhase::Ready | GuestPhase::Ended(_))
        {
            return Ok(state);
        }
        std::thread::sleep(LOOK);
    }
}

/// The state of the run; none before the first one.
///
/// # Errors
/// A state file that cannot be read.
pub fn state(root: &Path) -> Result<Option<GuestState>> {
    read(&below(root, guest::GUEST_DIR).join(STATE_FILE))
}

async fn supervise(options: Options) -> Result<()> {
    let folder = below(&options.root, guest::GUEST_DIR);
    let run: GuestRun =
        read(&folder.join(RUN_FILE))?.context("there is nothing to run: run.json is missing")?;
    if run.version != PROTOCOL_VERSION {
        bail!("run.json: version: {} is not known, {PROTOCOL_VERSION} is", run.version);
    }
    let before = state(&options.root).ok().flatten().filter(|state| state.run >= run.run);
    match before {
        None => {
            let mut supervisor = Supervisor::new(&options, folder, run)?;
            let ended = match supervisor.run().await {
                Ok(ended) => ended,
                Err(error) => failed(format!("{error:#}")),
            };
            tracing::info!("the run has ended: {:?}: {}", ended.reason, ended.message);
            supervisor.notify.ended(&ended);
            supervisor.change(|state| state.phase = GuestPhase::Ended(ended))?;
        }
        Some(GuestState { phase: GuestPhase::Ended(_), .. }) => tracing::info!("the run has ended before"),
        // Its supervisor was killed, or the container restarted itself.
        Some(state) => {
            let phase = GuestPhase::Ended(failed("the run was cut off".into()));
            write(&folder.join(STATE_FILE), &GuestState { phase, ..state })
                .context("writing the state of the run")?;
        }
    }
    if options.poweroff {
        let status = Command::new("systemctl").args(["poweroff", "--no-block"]).status().await;
        let status = status.context("powering off")?;
        // It is refused only when the system goes down already.
        tracing::info!("powering off: {status}");
    }
    Ok(())
}

struct Supervisor {
    options: Options,
    folder: PathBuf,
    run: GuestRun,
    state: GuestState,
    notify: Notify,
    terminate: tokio::signal::unix::Signal,
}

impl Supervisor {
    fn new(options: &Options, folder: PathBuf, run: GuestRun) -> Result<Self> {
        let terminate = signal(SignalKind::terminate()).context("listening for signals")?;
        let state = GuestState {
            version: PROTOCOL_VERSION,
            run: run.run,
            phase: GuestPhase::Starting,
            status: String::new(),
        };
        write(&folder.join(STATE_FILE), &state).context("writing the state of the run")?;
        let notify = Notify::new(std::env::var_os("NOTIFY_SOCKET"));
        Ok(Self { options: options.clone(), folder, run, state, notify, terminate })
    }

    async fn run(&mut self) -> Result<Ended> {
        let guest = fs::read(self.folder.join(GUEST_FILE)).context("reading the guest file")?;
        let socket = self.prepare()?;
        if let Some(ended) = self.hook("pre-start", None).await? {
            return Ok(ended);
        }
        let mut logs = JoinSet::new();
        let child = self.start(guest, &mut logs)?;
        let (ended, was_ready) = self.watch(child, &socket).await;
        let _ = timeout(LAST_WORDS, logs.join_all()).await;
        if was_ready {
            let status = if ended.reason.is_graceful() { "0" } else { "1" };
            match self.hook("post-stop", Some(status)).await {
                // The first failure is the one that people must read.
                Err(error) if ended.reason.is_graceful() => return Err(error),
                Err(error) => tracing::warn!("{error:#}"),
                Ok(_) => {}
            }
        }
        Ok(ended)
    }

    /// Makes the folders, and the socket for the streamer's news.
    fn prepare(&self) -> Result<UnixDatagram> {
        let root = &self.options.root;
        let (logs, runtime) = (below(root, "/var/log/fanlight"), below(root, "/run/fanlight"));
        for (path, mode, owned) in [
            // The sticky bit keeps the application away from the logs that are not its own.
            (&logs, 0o1777, false),
            (&runtime, 0o755, false),
            (&runtime.join("user"), 0o700, true),
        ] {
            let step = || format!("making the folder {}", path.display());
            fs::create_dir_all(path).with_context(step)?;
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).with_context(step)?;
            if let Some(user) = self.options.user.as_ref().filter(|_| owned) {
                std::os::unix::fs::chown(path, Some(user.id), Some(user.group)).with_context(step)?;
            }
        }
        let path = self.socket();
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).context("removing the old notify socket");
            }
            _ => {}
        }
        let socket = UnixDatagram::bind(&path).context("making the notify socket")?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).context("opening the notify socket")?;
        Ok(socket)
    }

    fn socket(&self) -> PathBuf {
        below(&self.options.root, "/run/fanlight").join("notify")
    }

    /// A program with an environment of its own, none of it from systemd.
    fn command(&self, program: &Path, as_user: bool) -> Command {
        let root = &self.options.root;
        let app = self.folder.join("app");
        let mut paths = "/usr/local/bin:/usr/bin:/bin:/usr/games".to_owned();
        let mut command = Command::new(program);
        command.env_clear();
        if app.is_dir() {
            paths = format!("{}:{paths}", app.join("bin").display());
            command.env("APP_DIR", &app);
        }
        command
            .env("PATH", paths)
            .env("LANG", "C.UTF-8")
            .env("INSTANCE_TYPE", "regular")
            .env("FANLIGHT_LOG_DIR", below(root, "/var/log/fanlight"));
        if as_user {
            command
                .env("HOME", below(root, "/home/fanlight"))
                .env("XDG_RUNTIME_DIR", below(root, SUPERVISED));
            if let Some(user) = &self.options.user {
                command.uid(user.id).gid(user.group);
            }
        } else {
            command.env("HOME", "/root");
        }
        command
    }

    /// Runs a hook of every addon, then that of the application, as root. Some: the run ended meanwhile.
    async fn hook(&mut self, name: &str, status: Option<&str>) -> Result<Option<Ended>> {
        if !self.run.hooks {
            return Ok(None);
        }
        for addon in self.run.addons.clone() {
            let folder = self.folder.join(ADDONS).join(&addon.name);
            // What older addons call it (ams-model section 5).
            let older = match name {
                "pre-start" => "restore",
                "post-stop" => "backup",
                _ => name,
            };
            let program = [name, older].map(|name| folder.join("hooks").join(name));
            let Some(program) = program.iter().find(|program| is_executable(program)) else { continue };
            let mut command = self.command(program, false);
            command.env("ADDON_DIR", &folder);
            let what = format!("hook {name} of addon {}", addon.name);
            let ended = self.run_hook(command, &what, addon.hook_time_s, status).await?;
            if ended.is_some() {
                return Ok(ended);
            }
        }
        let program = self.folder.join("app/hooks").join(name);
        if !is_executable(&program) {
            return Ok(None);
        }
        let command = self.command(&program, false);
        self.run_hook(command, &format!("hook {name}"), self.run.hook_time_s, status).await
    }

    async fn run_hook(
        &mut self,
        mut command: Command,
        what: &str,
        bound_s: u64,
        status: Option<&str>,
    ) -> Result<Option<Ended>> {
        if let Some(status) = status {
            command.env("ANBOX_EXIT_CODE", status);
        }
        let mut logs = JoinSet::new();
        let mut child = spawn(&mut command, Stdio::null(), self.log("hooks.log"), &mut logs)
            .with_context(|| format!("{what} failed"))?;
        let bound = Duration::from_secs(bound_s);
        let ended = tokio::select! {
            ended = timeout(bound, child.wait()) => ended,
            // Post-stop goes on while the system goes down, as long as that lets it.
            _ = self.terminate.recv(), if status.is_none() => {
                kill_group(&mut child).await;
                return Ok(Some(stopped("stopped while a hook ran")));
            }
        };
        let Ok(ended) = ended else {
            kill_group(&mut child).await;
            bail!("{what} failed: it took more than {} s", bound.as_secs());
        };
        let _ = timeout(LAST_WORDS, logs.join_all()).await;
        let ended = ended.with_context(|| format!("{what} failed"))?;
        if !ended.success() {
            bail!("{what} failed: {}; hooks.log may say why", told(ended));
        }
        Ok(None)
    }

    fn log(&self, name: &str) -> Log {
        Log::new(below(&self.options.root, "/var/log/fanlight").join(name), LOG_BOUND)
    }

    fn start(&self, guest: Vec<u8>, logs: &mut JoinSet<()>) -> Result<Child> {
        let mut command = self.command(&self.options.streamer, true);
        let wanted = |name: &str| name == "FANLIGHT_LOG" || name.starts_with("STREAMER_");
        command.arg("run").env("NOTIFY_SOCKET", self.socket());
        command.envs(self.run.environment.iter().filter(|(name, _)| wanted(name)));
        let mut child = spawn(&mut command, Stdio::piped(), self.log("streamer.log"), logs)
            .context("starting the streamer")?;
        let mut stdin = child.stdin.take().expect("it was piped");
        logs.spawn(async move {
            // A program that ends without reading says why in its log.
            let _ = stdin.write_all(&guest).await;
        });
        Ok(child)
    }

    /// Until the streamer has ended; and whether it was ready before.
    async fn watch(&mut self, mut child: Child, socket: &UnixDatagram) -> (Ended, bool) {
        let mut datagram = vec![0; 64 * 1024];
        let (mut result, mut was_ready, mut failure) = (None, false, None);
        let mut stop: Option<Instant> = None;
        let mut asked = false;
        let status = loop {
            tokio::select! {
                status = child.wait() => break status,
                received = socket.recv(&mut datagram) => {
                    let Ok(length) = received else { continue };
                    let notice = notify::parse(&datagram[..length]);
                    result = notice.result.or(result);
                    if let Some(status) = notice.status {
                        self.told(|state| state.status = status);
                    }
                    if notice.ready && !was_ready && stop.is_none() {
                        match self.hook("post-start", None).await {
                            Ok(None) => {
                                was_ready = true;
                                self.told(|state| state.phase = GuestPhase::Ready);
                                self.notify.ready(&self.state.status);
                            }
                            Ok(Some(_)) => { (asked, stop) = (true, Some(self.stop(&child))) }
                            Err(error) => {
                                failure = Some(failed(format!("{error:#}")));
                                stop = Some(self.stop(&child));
                            }
                        }
                    }
                }
                _ = self.terminate.recv() => {
                    asked = true;
                    if stop.is_none() {
                        stop = Some(self.stop(&child));
                    }
                }
                () = sleep_until(stop.unwrap_or_else(Instant::now)), if stop.is_some() => {
                    // What the streamer started goes with it.
                    kill_group(&mut child).await;
                    stop = Some(Instant::now() + STOP_GRACE);
                }
            }
        };
        // The result may still lie in the socket.
        while let Ok(length) = socket.try_recv(&mut datagram) {
            result = notify::parse(&datagram[..length]).result.or(result);
        }
        let ended = failure.unwrap_or_else(|| conclude(status, asked.then_some(true), result));
        (ended, was_ready)
    }

    /// Asks the streamer to end, and says until when it may take.
    fn stop(&mut self, child: &Child) -> Instant {
        self.told(|state| state.phase = GuestPhase::Stopping);
        if let Some(pid) = pid(child) {
            let _ = kill_process(pid, Signal::TERM);
        }
        Instant::now() + STOP_GRACE
    }

    fn told(&mut self, change: impl FnOnce(&mut GuestState)) {
        if let Err(error) = self.change(change) {
            tracing::error!("{error:#}");
        }
    }

    fn change(&mut self, change: impl FnOnce(&mut GuestState)) -> Result<()> {
        let before = self.state.clone();
        change(&mut self.state);
        if self.state == before {
            return Ok(());
        }
        write(&self.folder.join(STATE_FILE), &self.state).context("writing the state of the run")
    }
}

fn is_executable(program: &Path) -> bool {
    fs::metadata(program).is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

/// Starts a program in a process group of its own, its output in a log.
fn spawn(command: &mut Command, stdin: Stdio, mut log: Log, logs: &mut JoinSet<()>) -> Result<Child> {
    let (output, output_of_child) = io::pipe().context("making a pipe")?;
    let program = command.as_std().get_program().display().to_string();
    command.stdin(stdin).stdout(output_of_child.try_clone().context("making a pipe")?);
    command.stderr(output_of_child).process_group(0).kill_on_drop(true);
    let child = command.spawn().with_context(|| format!("starting {program}"));
    // The command keeps its end of the pipe, which would then never end.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let child = child?;
    let mut output =
        tokio::net::unix::pipe::Receiver::from_owned_fd(output.into()).context("reading the output")?;
    logs.spawn(async move {
        let mut buffer = vec![0; 16 * 1024];
        while let Ok(length) = output.read(&mut buffer).await
            && length > 0
        {
            log.write(&buffer[..length]);
        }
    });
    Ok(child)
}

fn pid(child: &Child) -> Option<Pid> {
    Pid::from_raw(child.id()?.cast_signed())
}

async fn kill_group(child: &mut Child) {
    if let Some(pid) = pid(child) {
        let _ = kill_process_group(pid, Signal::KILL);
    }
    let _ = child.wait().await;
}

fn told(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("status {code}"),
        (None, signal) => format!("signal {}", signal.unwrap_or_default()),
    }
}

fn failed(message: String) -> Ended {
    Ended { reason: EndReason::Failed, message }
}

fn stopped(message: &str) -> Ended {
    Ended { reason: EndReason::Stopped, message: message.into() }
}

/// An absolute path under another root.
fn below(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}

fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let step = || format!("reading {}", path.display());
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).with_context(step).map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(step),
    }
}

/// Writes the state as a whole and makes it last: whoever reads finds the old one or the new one.
fn write(path: &Path, state: &GuestState) -> io::Result<()> {
    use std::{io::Write as _, os::unix::fs::OpenOptionsExt as _};
    let temporary = path.with_extension("new");
    let mut file =
        fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(&serde_json::to_vec(state)?)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    if let Some(folder) = path.parent() {
        fs::File::open(folder)?.sync_all()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tells the supervisor something, from a shell.
    const TELL: &str = "tell() { python3 -c 'import os, socket, sys; \
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(sys.argv[1].encode(), \
        os.environ[\"NOTIFY_SOCKET\"])' \"$1\"; }";

    struct Bench {
        folder: tempfile::TempDir,
    }

    impl Bench {
        fn new(streamer: &str) -> Self {
            let folder = tempfile::tempdir().expect("a folder");
            let bench = Self { folder };
            fs::create_dir_all(bench.guest().join("app/hooks")).expect("made");
            bench.script("streamer", streamer);
            fs::write(bench.guest().join(GUEST_FILE), "the guest file").expect("written");
            fs::write(
                bench.guest().join(RUN_FILE),
                r#"{"version":1,"run":2,"hooks":true,"hook_time_s":60,
                    "environment":{"STREAMER_X":"given","LD_PRELOAD":"refused"}}"#,
            )
            .expect("written");
            bench
        }

        fn guest(&self) -> PathBuf {
            below(self.folder.path(), guest::GUEST_DIR)
        }

        fn script(&self, path: &str, text: &str) {
            let path = self.folder.path().join(path);
            fs::write(&path, format!("#!/bin/sh\n{TELL}\n{text}\n")).expect("written");
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("executable");
        }

        fn hook(&self, name: &str, text: &str) {
            self.script(&format!("var/lib/fanlight/app/hooks/{name}"), text);
        }

        fn options(&self) -> Options {
            let root = self.folder.path().to_owned();
            Options { streamer: root.join("streamer"), root, user: None, poweroff: false }
        }

        fn text(&self, path: &str) -> String {
            fs::read_to_string(self.folder.path().join(path)).unwrap_or_default()
        }

        fn run(&self) -> (EndReason, String) {
            main(self.options()).expect("an order was there");
            match state(self.folder.path()).expect("readable").expect("written").phase {
                GuestPhase::Ended(ended) => (ended.reason, ended.message),
                other => panic!("not at its end: {other:?}"),
            }
        }
    }

    #[test]
    fn a_run_is_ready_after_its_hook_ends_with_its_words_and_never_runs_twice() {
        let bench = Bench::new(
            "cat > $APP_DIR/given; env > $APP_DIR/environment; echo hello; tell 'READY=1\nSTATUS=at work'
             until grep -q ready $APP_DIR/../state.json; do sleep 0.05; done
             cp $APP_DIR/../state.json $APP_DIR/seen
             tell 'X_FANLIGHT_RESULT={\"reason\":\"idle\",\"message\":\"nobody came\"}'"
                .replace("\\n", "\n")
                .as_str(),
        );
        bench.hook("pre-start", "echo pre");
        bench.hook("post-start", "grep -q starting $APP_DIR/../state.json && echo post");
        bench.hook("post-stop", "echo over $ANBOX_EXIT_CODE");
        assert_eq!(bench.run(), (EndReason::Idle, "nobody came".into()));
        assert_eq!(bench.text("var/lib/fanlight/app/given"), "the guest file");
        assert_eq!(bench.text("var/log/fanlight/hooks.log"), "pre\npost\nover 0\n");
        assert_eq!(bench.text("var/log/fanlight/streamer.log"), "hello\n");
        assert!(bench.text("var/lib/fanlight/app/seen").contains(r#""phase":"ready","status":"at work""#));
        let environment = bench.text("var/lib/fanlight/app/environment");
        assert!(
            environment.contains("STREAMER_X=given\n") && environment.contains("INSTANCE_TYPE=regular\n")
        );
        assert!(!environment.contains("refused"), "{environment}");
        bench.run();
        assert_eq!(bench.text("var/log/fanlight/streamer.log"), "hello\n");
        assert_eq!(wait(bench.folder.path(), 1).expect("there").run, 2);
    }

    #[test]
    fn a_streamer_that_crashes_or_never_reads_fails_the_run() {
        let bench = Bench::new("kill -SEGV $$");
        fs::write(bench.guest().join(GUEST_FILE), vec![b' '; 300_000]).expect("written");
        let (reason, message) = bench.run();
        assert!(reason == EndReason::Failed && message.contains("signal 11"), "{message}");
        let bench = Bench::new("exit 78");
        assert!(bench.run().1.contains("guest file"));
        let bench = Bench::new("exit 0");
        fs::remove_file(bench.guest().join(GUEST_FILE)).expect("was there");
        assert!(bench.run().1.contains("reading the guest file"));
    }

    #[test]
    fn hooks_of_addons_run_before_those_of_the_application_by_either_name() {
        let bench = Bench::new("tell READY=1; sleep 0.2");
        fs::write(
            bench.guest().join(RUN_FILE),
            r#"{"version":1,"run":2,"hooks":true,"addons":[{"name":"two"},{"name":"one","hook_time_s":5}]}"#,
        )
        .expect("written");
        for (addon, hook) in
            [("one", "pre-start"), ("one", "post-stop"), ("two", "restore"), ("two", "backup")]
        {
            fs::create_dir_all(bench.guest().join("addons").join(addon).join("hooks")).expect("made");
            let path = format!("var/lib/fanlight/addons/{addon}/hooks/{hook}");
            bench.script(&path, &format!("echo {hook} ${{ADDON_DIR##*/}} $ANBOX_EXIT_CODE"));
        }
        // Not a program: nobody's hook.
        fs::write(bench.guest().join("addons/one/hooks/post-start"), "exit 1").expect("written");
        bench.hook("pre-start", "echo application");
        bench.run();
        let told = "restore two\npre-start one\napplication\nbackup two 0\npost-stop one 0\n";
        assert_eq!(bench.text("var/log/fanlight/hooks.log"), told);

        bench.script("var/lib/fanlight/addons/one/hooks/pre-start", "exit 5");
        let again = fs::read_to_string(bench.guest().join(RUN_FILE)).expect("there");
        fs::write(bench.guest().join(RUN_FILE), again.replace(r#""run":2"#, r#""run":3"#)).expect("written");
        let (reason, message) = bench.run();
        assert!(
            reason == EndReason::Failed
                && message.starts_with("hook pre-start of addon one failed: status 5"),
            "{message}"
        );
    }

    #[test]
    fn a_hook_that_fails_ends_the_run_and_names_itself() {
        let bench = Bench::new("touch $APP_DIR/started");
        bench.hook("pre-start", "exit 3");
        let (reason, message) = bench.run();
        assert!(
            reason == EndReason::Failed && message.starts_with("hook pre-start failed: status 3"),
            "{message}"
        );
        assert!(!bench.guest().join("app/started").exists());
        let bench = Bench::new("tell READY=1; exec sleep 60");
        bench.hook("post-start", "exit 4");
        let (reason, message) = bench.run();
        assert!(
            reason == EndReason::Failed && message.starts_with("hook post-start failed: status 4"),
            "{message}"
        );
    }

    #[test]
    fn a_run_that_was_cut_off_has_failed_and_is_not_run_again() {
        let bench = Bench::new("touch $APP_DIR/started");
        let phase = GuestPhase::Ready;
        let state = GuestState { version: 1, run: 2, phase, status: String::new() };
        write(&bench.guest().join(STATE_FILE), &state).expect("written");
        assert_eq!(bench.run(), (EndReason::Failed, "the run was cut off".into()));
        assert!(!bench.guest().join("app/started").exists());
    }
}
