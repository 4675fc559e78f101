//! Instances as processes of this machine: a folder, a shim and a sandbox each.
//!
//! ```text
//! <folder>/<id>/
//!   engine.json   its user id; written last, so that a folder without it is a half-made one
//!   guest.json    for the streamer, 0600
//!   bounds.json   the CPUs and the memory it may take
//!   launch.json   what the shim runs
//!   state.json    what the shim says; the truth about the last run
//!   shim.sock     the shim answers here while it lives
//!   etc/ notify/ logs/             ours
//!   home/ runtime/ guest-logs/     the instance's
//! ```
//!
//! Nothing here is lost with AMS: [`ProcessEngine::open`] looks at the folders, adopts every shim that lives (by
//! pid, start time and boot) and takes the word of `state.json` for the rest.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Seek as _, SeekFrom},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use fanlight_api::{
    InstanceId, PROTOCOL_VERSION,
    guest::{EndReason, Ended},
};
use rustix::{
    fs::{FlockOperation, Mode, OFlags, chown, flock},
    process::{Gid, Signal, Uid},
};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::UnixStream,
    sync::{broadcast, mpsc, watch},
};

use super::{
    Engine, EngineError, Exec, Machine, Running, Spec,
    cgroup::{Bounds, Group, Groups},
    enter,
};
use crate::{
    core::life::{Phase, Seen},
    isolation::{self, Isolation, Sandbox},
    shim::{
        end_sandbox,
        report::{self, Command, Launch, Report},
    },
};

const ENGINE_FILE: &str = "engine.json";
const BOUNDS_FILE: &str = "bounds.json";
/// How long a shim may take until it answers.
const SHIM_START: Duration = Duration::from_secs(10);
/// How long the end of what was killed may take.
const KILL_TIME: Duration = Duration::from_secs(10);
/// Most bytes of a log that are handed out; the newest.
const LOG_BYTES: u64 = 16 << 20;
/// Most logs that are named; an instance can write any number.
const MAX_LOGS: usize = 50;
/// Most processes of an instance that has a user id of its own.
const MAX_PROCESSES: u64 = 4096;

/// How instances are run.
#[derive(Clone, Debug)]
pub struct ProcessConfig {
    /// Name of this machine as a node.
    pub node: String,
    /// Its address, as shown.
    pub address: String,
    /// Holds a folder per instance; made when it is not there.
    pub folder: PathBuf,
    /// Program and arguments of the shim; the folder of the instance is added.
    pub shim: Vec<String>,
    /// Program and arguments of the streamer.
    pub streamer: Vec<String>,
    /// More programs of ours that instances find in their `PATH`.
    pub programs: Vec<PathBuf>,
    /// Folders that instances must not see.
    pub hidden: Vec<PathBuf>,
    /// First user id for instances, when AMS is root.
    pub first_uid: u32,
    /// How many there are.
    pub uids: u32,
    /// Whether instances are kept to what they asked for.
    pub bounds: Bounding,
}

/// Whether instances are kept to the CPUs and the memory that they asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Bounding {
    /// Where the machine can do it; elsewhere a warning says why not.
    #[default]
    Auto,
    /// Or AMS does not start.
    Required,
    /// Not at all.
    Off,
}

/// The engine. Clones are handles of the same.
#[derive(Clone, Debug)]
pub struct ProcessEngine {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: ProcessConfig,
    isolation: Isolation,
    /// Or why there are none.
    groups: Result<Groups, String>,
    entries: Mutex<BTreeMap<InstanceId, Entry>>,
    changes: broadcast::Sender<InstanceId>,
}

#[derive(Debug)]
struct Entry {
    owner: Owner,
    known: watch::Sender<Known>,
    /// To the follower of the live shim.
    commands: Option<mpsc::Sender<Command>>,
}

/// What is known of an instance.
#[derive(Clone, Debug)]
struct Known {
    seen: Seen,
    status: String,
    report: Option<Report>,
}

/// Who the processes of an instance are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Owner {
    uid: u32,
    gid: u32,
    /// Has a user id that nobody else has.
    own: bool,
}

impl ProcessEngine {
    /// Opens the folder and adopts what lives there.
    ///
    /// # Errors
    /// The folder cannot be used.
    pub async fn open(config: ProcessConfig) -> Result<Self, EngineError> {
        let folder = config.folder.clone();
        make_folder(&folder, 0o700)?;
        let scratch = folder.clone();
        let isolation = blocking(move || isolation::detect(&scratch)).await;
        if let Some(reason) = isolation.refusal() {
            tracing::warn!("instances cannot be isolated on this machine: {reason}");
        }
        let groups = groups(&config).await?;
        let (entries, changes) = (Mutex::default(), broadcast::Sender::new(1024));
        let inner = Inner { config, isolation, groups, entries, changes };
        let engine = Self { inner: Arc::new(inner) };
        let entries = fs::read_dir(&folder).map_err(|error| EngineError::io("reading", &folder, error))?;
        for entry in entries.flatten() {
            let Some(id) = entry.file_name().to_str().and_then(|name| name.parse::<InstanceId>().ok()) else {
                continue;
            };
            engine.adopt(id, entry.path()).await?;
        }
        engine.drop_left_groups().await;
        Ok(engine)
    }

    /// Removes groups of instances that are not there any more: AMS ended between their two removals.
    async fn drop_left_groups(&self) {
        let Ok(groups) = &self.inner.groups else { return };
        let left: Vec<InstanceId> = {
            let entries = self.lock();
            groups.list().into_iter().filter(|id| !entries.contains_key(id)).collect()
        };
        for id in left {
            tracing::info!("removing the control group of instance {id}, which is gone");
            self.drop_group(&id).await;
        }
    }

    /// Removes the group of an instance, with what may still be in it.
    async fn drop_group(&self, id: &InstanceId) {
        let Ok(groups) = self.inner.groups.clone() else { return };
        let of = id.clone();
        if let Err(error) = blocking(move || groups.remove(&of)).await {
            // The next start of AMS tries again.
            tracing::warn!("the control group of instance {id}: {error}");
        }
    }

    /// Why instances are not kept to what they asked for; none: they are.
    pub fn unbounded(&self) -> Option<String> {
        match &self.inner.groups {
            Ok(groups) => groups.missing().map(|missing| format!("not bounded here: {missing}")),
            Err(reason) => Some(format!("memory, cpu, pids are not bounded here: {reason}")),
        }
    }

    /// Whether and how instances are kept apart here.
    pub fn isolation(&self) -> &Isolation {
        &self.inner.isolation
    }

    async fn adopt(&self, id: InstanceId, folder: PathBuf) -> Result<(), EngineError> {
        let engine_file = folder.join(ENGINE_FILE);
        let owner: Option<Owner> =
            report::read(&engine_file).map_err(|error| EngineError::io("reading", &engine_file, error))?;
        let Some(owner) = owner else {
            tracing::info!("removing the half-made instance {id}");
            return remove(folder).await;
        };
        let report = settled_state(&folder).await;
        let (known, live) = match report {
            None => (
                Known { seen: Seen { run: 0, phase: Phase::Idle }, status: String::new(), report: None },
                false,
            ),
            Some(report) => {
                let live = report.phase.is_live();
                (Known::from(report), live)
            }
        };
        tracing::info!("found the instance {id}: run {}, {:?}", known.seen.run, known.seen.phase);
        let entry = Entry { owner, known: watch::Sender::new(known), commands: None };
        self.lock().insert(id.clone(), entry);
        if live {
            // Who talked to them did so through the AMS that is gone.
            let of = id.clone();
            blocking(move || enter::sweep_all(&of)).await;
            self.follow(id, folder, None);
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<InstanceId, Entry>> {
        self.inner.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn folder(&self, id: &InstanceId) -> PathBuf {
        self.inner.config.folder.join(id.as_str())
    }

    fn learn(&self, id: &InstanceId, known: Known) {
        let entries = self.lock();
        let Some(entry) = entries.get(id) else { return };
        entry.known.send_replace(known);
        drop(entries);
        // Nobody listening is fine.
        let _ = self.inner.changes.send(id.clone());
    }

    /// Follows a shim until its run has ended.
    fn follow(&self, id: InstanceId, folder: PathBuf, stream: Option<UnixStream>) {
        let (sender, commands) = mpsc::channel(16);
        if let Some(entry) = self.lock().get_mut(&id) {
            entry.commands = Some(sender);
        }
        let engine = self.clone();
        tokio::spawn(async move { engine.follower(id, folder, stream, commands).await });
    }

    async fn follower(
        &self,
        id: InstanceId,
        folder: PathBuf,
        mut stream: Option<UnixStream>,
        mut commands: mpsc::Receiver<Command>,
    ) {
        let mut kill = false;
        loop {
            let connection = match stream.take() {
                Some(stream) => Some(stream),
                None => UnixStream::connect(folder.join(report::SOCKET)).await.ok(),
            };
            if let Some(stream) = connection {
                self.converse(&id, stream, &mut commands, &mut kill).await;
            }
            match state(&folder).await {
                Some(report) if !report.phase.is_live() => return self.learn(&id, report.into()),
                Some(report) if report.shim.is_alive() => {}
                Some(report) => {
                    // It may have written its last state between our reading and its end.
                    let last = state(&folder).await.filter(|report| !report.phase.is_live());
                    let report = match last {
                        Some(last) => last,
                        None => lost(&folder, report).await,
                    };
                    return self.learn(&id, report.into());
                }
                // Deleted behind our back.
                None => return self.learn(&id, Known::absent()),
            }
            // Lives, but does not answer: it is about to end, or just begins. Commands wait meanwhile.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// One connection to a shim.
    async fn converse(
        &self,
        id: &InstanceId,
        stream: UnixStream,
        commands: &mut mpsc::Receiver<Command>,
        kill: &mut bool,
    ) {
        let (read, mut write) = stream.into_split();
        let mut lines = BufReader::new(read).lines();
        if std::mem::take(kill) && write.write_all(&line(Command::Kill)).await.is_err() {
            return;
        }
        loop {
            tokio::select! {
                line = lines.next_line() => match line {
                    Ok(Some(line)) => match serde_json::from_str::<Report>(&line) {
                        Ok(report) => self.learn(id, report.into()),
                        Err(error) => tracing::warn!("the shim of instance {id} said something odd: {error}"),
                    },
                    Ok(None) | Err(_) => return,
                },
                Some(command) = commands.recv() => {
                    if write.write_all(&line(command)).await.is_err() {
                        *kill |= command == Command::Kill;
                        return;
                    }
                }
            }
        }
    }

    /// A user id that no instance has.
    fn owner(&self, entries: &BTreeMap<InstanceId, Entry>) -> Result<Owner, EngineError> {
        let config = &self.inner.config;
        if !matches!(self.inner.isolation, Isolation::OwnUser(_)) {
            let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
            return Ok(Owner { uid, gid, own: false });
        }
        (config.first_uid..config.first_uid.saturating_add(config.uids))
            .find(|uid| entries.values().all(|entry| entry.owner.uid != *uid))
            .map(|uid| Owner { uid, gid: uid, own: true })
            .ok_or(EngineError::NoUserId(config.uids))
    }

    /// A group for a run, with the bounds of the instance; none where groups cannot be made.
    async fn group(&self, id: &InstanceId, folder: &Path) -> Result<Option<Group>, EngineError> {
        let Ok(groups) = self.inner.groups.clone() else { return Ok(None) };
        let path = folder.join(BOUNDS_FILE);
        // Instances that were made before there were bounds have none.
        let bounds: Option<Bounds> =
            report::read(&path).map_err(|error| EngineError::io("reading", path, error))?;
        let of = id.clone();
        let made = blocking(move || groups.make(&of, bounds.unwrap_or_default())).await;
        made.map(Some)
            .map_err(|error| EngineError::io("making the control group of the instance for", folder, error))
    }

    fn launch(
        &self,
        id: &InstanceId,
        run: u32,
        owner: Owner,
        package: Option<PathBuf>,
        group: Option<Group>,
    ) -> Result<Launch, EngineError> {
        let config = &self.inner.config;
        let folder = self.folder(id);
        let [streamer, arguments @ ..] = config.streamer.as_slice() else {
            return Err(EngineError::Shim("engine.streamer is empty".into()));
        };
        let streamer = resolve(streamer);
        if !streamer.is_file() {
            return Err(EngineError::MissingProgram {
                path: streamer,
                advice: "build it, or name it in engine.streamer",
            });
        }
        let mut programs = vec![streamer.clone()];
        programs.extend(config.programs.iter().filter(|program| program.is_file()).cloned());
        let mut path = "/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games".to_owned();
        if package.is_some() {
            path = format!("{}/bin:{path}", isolation::PACKAGE);
        }
        let mut environment: BTreeMap<String, String> = [
            ("PATH", format!("{}:{path}", isolation::PROGRAMS)),
            ("HOME", isolation::HOME.into()),
            ("USER", "fanlight".into()),
            ("LOGNAME", "fanlight".into()),
            ("SHELL", "/bin/bash".into()),
            ("LANG", "C.UTF-8".into()),
            ("XDG_RUNTIME_DIR", isolation::runtime_dir(owner.uid)),
            ("NOTIFY_SOCKET", format!("{}/{}", isolation::NOTIFY, report::NOTIFY_SOCKET)),
            ("FANLIGHT_LOG_DIR", isolation::LOGS.into()),
            ("INSTANCE_TYPE", "regular".into()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into();
        if package.is_some() {
            environment.insert("APP_DIR".into(), isolation::PACKAGE.into());
        }
        // Settings for the streamers of this node; no secret is among them.
        environment.extend(
            std::env::vars_os()
                .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
                .filter(|(name, _)| name.starts_with("STREAMER_")),
        );
        environment
            .extend(std::env::var("FANLIGHT_LOG").ok().map(|filter| ("FANLIGHT_LOG".to_owned(), filter)));
        let name = streamer.file_name().unwrap_or_default().to_string_lossy();
        let mut command = vec![format!("{}/{name}", isolation::PROGRAMS)];
        command.extend_from_slice(arguments);
        let sandbox = Sandbox {
            hostname: id.as_str(),
            uid: owner.uid,
            gid: owner.gid,
            etc: &folder.join("etc"),
            home: &folder.join("home"),
            runtime: &folder.join("runtime"),
            logs: &folder.join(report::GUEST_LOGS),
            notify: &folder.join(report::NOTIFY_FOLDER),
            package: package.as_deref(),
            programs: &programs,
            hidden: &config.hidden,
        };
        let command = sandbox.command(&self.inner.isolation, &command).ok_or_else(|| {
            EngineError::NotIsolated(self.inner.isolation.refusal().unwrap_or_default().to_owned())
        })?;
        Ok(Launch {
            version: PROTOCOL_VERSION,
            run,
            command,
            environment,
            // Of a user id that others use too, a bound would count their processes as well.
            processes: owner.own.then_some(MAX_PROCESSES),
            group,
        })
    }
}

impl From<Report> for Known {
    fn from(report: Report) -> Self {
        Self {
            seen: Seen { run: report.run, phase: report.phase.clone() },
            status: report.status.clone(),
            report: Some(report),
        }
    }
}

impl Known {
    fn absent() -> Self {
        Self { seen: Seen::ABSENT, status: String::new(), report: None }
    }
}

#[async_trait]
impl Engine for ProcessEngine {
    async fn machines(&self) -> Result<Vec<Machine>, EngineError> {
        let config = &self.inner.config;
        let cpus = std::thread::available_parallelism();
        Ok(vec![Machine {
            name: config.node.clone(),
            address: config.address.clone(),
            online: true,
            leader: true,
            architecture: std::env::consts::ARCH.into(),
            cpus: cpus.map_or(1, |cpus| u32::try_from(cpus.get()).unwrap_or(u32::MAX)),
            memory_bytes: memory_bytes(),
            disk: disk(&config.folder),
            places: config.uids,
            message: self.unbounded().filter(|_| config.bounds != Bounding::Off).unwrap_or_default(),
            ..Machine::default()
        }])
    }

    async fn exec(&self, id: &InstanceId, exec: Exec) -> Result<Running, EngineError> {
        let (owner, report) = {
            let entries = self.lock();
            let entry = entries.get(id).ok_or_else(|| EngineError::Absent(id.clone()))?;
            let report = entry.known.borrow().report.clone();
            (entry.owner, report)
        };
        let report = report.filter(|report| matches!(report.phase, Phase::Starting | Phase::Ready));
        let Some(sandbox) = report.and_then(|report| report.sandbox) else {
            return Err(EngineError::NotRunning(id.clone()));
        };
        let path = self.folder(id).join(report::LAUNCH_FILE);
        let launch: Option<Launch> =
            report::read(&path).map_err(|error| EngineError::io("reading", path, error))?;
        let place = enter::Place {
            id,
            sandbox: &sandbox,
            isolation: &self.inner.isolation,
            owner: (owner.uid, owner.gid),
            group: launch.as_ref().and_then(|launch| launch.group.as_ref()),
            environment: launch.as_ref().map(|launch| launch.environment.clone()).unwrap_or_default(),
        };
        enter::run(place, exec).await
    }

    async fn create(&self, spec: &Spec) -> Result<(), EngineError> {
        let id = spec.id().clone();
        let folder = self.folder(&id);
        let (owner, known_before) = {
            let mut entries = self.lock();
            match entries.get(&id) {
                Some(entry) => (entry.owner, true),
                None => {
                    let owner = self.owner(&entries)?;
                    // Absent until the files are there, but the user id is taken from now on.
                    let entry = Entry { owner, known: watch::Sender::new(Known::absent()), commands: None };
                    entries.insert(id.clone(), entry);
                    (owner, false)
                }
            }
        };
        let source = spec.copy_of.as_ref().map(|source| (source.clone(), self.folder(source)));
        let (spec, at) = (spec.clone(), folder.clone());
        let made = blocking(move || {
            if let Some((source, from)) = source.filter(|_| !at.join(ENGINE_FILE).exists()) {
                copy_home(&source, &from, &at, owner)?;
            }
            make(&spec, &at, owner)
        })
        .await;
        if let Err(error) = made {
            if !known_before {
                let _ = remove(folder).await;
                self.lock().remove(&id);
            }
            return Err(error);
        }
        let absent = self.lock().get(&id).is_some_and(|entry| entry.known.borrow().seen == Seen::ABSENT);
        if absent {
            let idle = Seen { run: 0, phase: Phase::Idle };
            self.learn(&id, Known { seen: idle, status: String::new(), report: None });
        }
        Ok(())
    }

    async fn start(&self, id: &InstanceId, run: u32) -> Result<(), EngineError> {
        let folder = self.folder(id);
        let (owner, seen) = {
            let entries = self.lock();
            let entry = entries.get(id).ok_or_else(|| EngineError::Absent(id.clone()))?;
            let seen = entry.known.borrow().seen.clone();
            (entry.owner, seen)
        };
        if seen.run >= run {
            return Ok(());
        }
        let package: Option<PathBuf> = report::read(&folder.join("package.json"))
            .map_err(|error| EngineError::io("reading", folder.join("package.json"), error))?
            .flatten();
        let group = self.group(id, &folder).await?;
        let launch = self.launch(id, run, owner, package, group)?;
        let at = folder.clone();
        let shim = self.inner.config.shim.clone();
        let child = blocking(move || start_shim(&at, &shim, &launch)).await?;
        let (stream, child) = await_shim(&folder, child).await?;
        // Its parent has to take note of its end.
        tokio::spawn(async move {
            let mut child = child;
            let _ = child.wait().await;
        });
        if let Some(report) = state(&folder).await {
            self.learn(id, report.into());
        }
        self.follow(id.clone(), folder, Some(stream));
        Ok(())
    }

    async fn stop(&self, id: &InstanceId, grace: Duration) {
        let commands = self.lock().get(id).and_then(|entry| entry.commands.clone());
        let Some(commands) = commands else { return };
        let command = match grace.as_secs() {
            0 => Command::Kill,
            grace_s => Command::Stop { grace_s },
        };
        // Closed: the run has ended, which is what was asked for. Full: as many stops are on their way.
        let _ = commands.try_send(command);
    }

    async fn delete(&self, id: &InstanceId) -> Result<(), EngineError> {
        let known = self.lock().get(id).map(|entry| entry.known.subscribe());
        if let Some(mut known) = known {
            self.stop(id, Duration::ZERO).await;
            let ended = known.wait_for(|known| !known.seen.phase.is_live());
            if tokio::time::timeout(KILL_TIME, ended).await.is_err() {
                let report = known.borrow().report.clone();
                if let Some(report) = report {
                    tracing::warn!("the shim of instance {id} does not end: killing it");
                    report.shim.signal(Signal::KILL);
                    lost(&self.folder(id), report).await;
                }
            }
        }
        self.drop_group(id).await;
        remove(self.folder(id)).await?;
        self.lock().remove(id);
        let _ = self.inner.changes.send(id.clone());
        Ok(())
    }

    async fn seen(&self, id: &InstanceId) -> Seen {
        self.lock().get(id).map_or(Seen::ABSENT, |entry| entry.known.borrow().seen.clone())
    }

    async fn status(&self, id: &InstanceId) -> String {
        self.lock().get(id).map(|entry| entry.known.borrow().status.clone()).unwrap_or_default()
    }

    async fn list(&self) -> Result<Vec<InstanceId>, EngineError> {
        Ok(self.lock().keys().cloned().collect())
    }

    async fn logs(&self, id: &InstanceId) -> Vec<String> {
        let folder = self.folder(id);
        blocking(move || {
            let mut names: Vec<String> = [report::LOGS, report::GUEST_LOGS]
                .iter()
                .flat_map(|part| fs::read_dir(folder.join(part)).into_iter().flatten().flatten())
                .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()))
                .filter_map(|entry| entry.file_name().into_string().ok())
                .filter(|name| is_log_name(name))
                .take(MAX_LOGS)
                .collect();
            names.sort();
            names.dedup();
            names
        })
        .await
    }

    async fn read_log(&self, id: &InstanceId, name: &str) -> Result<Vec<u8>, EngineError> {
        let missing = || EngineError::NoLog(name.chars().take(100).collect());
        if !is_log_name(name) || !self.lock().contains_key(id) {
            return Err(missing());
        }
        let paths = [report::LOGS, report::GUEST_LOGS].map(|part| self.folder(id).join(part).join(name));
        blocking(move || {
            for path in paths {
                match read_end(&path) {
                    Ok(Some(bytes)) => return Ok(Some(bytes)),
                    Ok(None) => {}
                    Err(error) => return Err(EngineError::io("reading", path, error)),
                }
            }
            Ok(None)
        })
        .await?
        .ok_or_else(missing)
    }

    fn changes(&self) -> broadcast::Receiver<InstanceId> {
        self.inner.changes.subscribe()
    }
}

/// What the settings and the machine allow.
async fn groups(config: &ProcessConfig) -> Result<Result<Groups, String>, EngineError> {
    if config.bounds == Bounding::Off {
        return Ok(Err("engine.bounds is off".into()));
    }
    let folder = config.folder.clone();
    let groups = blocking(move || Groups::open(&folder)).await;
    let missing = match &groups {
        Ok(groups) => groups.missing(),
        Err(reason) => Some(reason.clone()),
    };
    match missing {
        Some(reason) if config.bounds == Bounding::Required => return Err(EngineError::Unbounded(reason)),
        Some(reason) => tracing::warn!(
            "instances are not kept to the memory and the CPUs that they ask for, or not to all of it: {reason}"
        ),
        None => {}
    }
    Ok(groups)
}

/// All and free bytes of the disk a folder lies on.
fn disk(folder: &Path) -> Option<(u64, u64)> {
    let stat = rustix::fs::statvfs(folder).ok()?;
    Some((stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize))
}

fn memory_bytes() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

fn line(command: Command) -> Vec<u8> {
    let mut line = serde_json::to_vec(&command).expect("a command is JSON");
    line.push(b'\n');
    line
}

/// Makes the files of an instance. Safe to repeat; what the instance wrote so far stays.
fn make(spec: &Spec, folder: &Path, owner: Owner) -> Result<(), EngineError> {
    make_folder(folder, 0o700)?;
    for (name, mode) in [("etc", 0o755), (report::NOTIFY_FOLDER, 0o755), (report::LOGS, 0o700)] {
        make_folder(&folder.join(name), mode)?;
    }
    for name in ["home", "runtime", report::GUEST_LOGS] {
        let path = folder.join(name);
        make_folder(&path, 0o700)?;
        if owner.own {
            chown(&path, Some(Uid::from_raw(owner.uid)), Some(Gid::from_raw(owner.gid)))
                .map_err(|error| EngineError::io("handing over", &path, error.into()))?;
        }
    }
    for (name, content) in isolation::etc_files(spec.id().as_str(), owner.uid, owner.gid) {
        let path = folder.join("etc").join(name);
        fs::write(&path, content)
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o644)))
            .map_err(|error| EngineError::io("writing", &path, error))?;
    }
    let write = |name: &str, result: io::Result<()>| {
        result.map_err(|error| EngineError::io("writing", folder.join(name), error))
    };
    write(report::GUEST_FILE, report::write(&folder.join(report::GUEST_FILE), &spec.guest))?;
    write("package.json", report::write(&folder.join("package.json"), &spec.package))?;
    let bounds = Bounds { cpus: spec.share.cpus, memory_bytes: spec.share.memory_bytes };
    write(BOUNDS_FILE, report::write(&folder.join(BOUNDS_FILE), &bounds))?;
    write(ENGINE_FILE, report::write(&folder.join(ENGINE_FILE), &owner))
}

/// Brings the home of an instance into the folder of another one that is being made.
fn copy_home(source: &InstanceId, from: &Path, to: &Path, owner: Owner) -> Result<(), EngineError> {
    let (from, home) = (from.join("home"), to.join("home"));
    if !from.is_dir() {
        return Err(EngineError::Absent(source.clone()));
    }
    make_folder(to, 0o700)?;
    make_folder(&home, 0o700)?;
    let run = |doing: &'static str, command: &mut std::process::Command| {
        let output = command.stdin(Stdio::null()).output();
        let output = output.map_err(|error| EngineError::io(doing, &home, error))?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let reason = said.trim().lines().last().unwrap_or("it did not say why").to_owned();
        Err(EngineError::Refused { doing, reason })
    };
    // Links stay links, so nothing outside is read.
    let mut copy = std::process::Command::new("cp");
    copy.args(["--archive", "--reflink=auto", "--"]).arg(from.join(".")).arg(&home);
    run("copying the files of the instance", &mut copy)?;
    if owner.own {
        let mut chown = std::process::Command::new("chown");
        chown
            .args(["--recursive", "--no-dereference", "--", &format!("{0}:{1}", owner.uid, owner.gid)])
            .arg(&home);
        run("handing the copied files over", &mut chown)?;
    }
    Ok(())
}

fn make_folder(path: &Path, mode: u32) -> Result<(), EngineError> {
    fs::create_dir_all(path)
        // Not left to the umask: an instance's user must be able to look into some.
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(mode)))
        .map_err(|error| EngineError::io("making the folder", path, error))
}

/// A program as a path; names without a slash are looked for in `PATH`.
fn resolve(program: &str) -> PathBuf {
    let path = if program.contains('/') { None } else { isolation::find(program) };
    let path = path.unwrap_or_else(|| PathBuf::from(program));
    path.canonicalize().unwrap_or(path)
}

fn start_shim(folder: &Path, shim: &[String], launch: &Launch) -> Result<tokio::process::Child, EngineError> {
    // Sockets and locks of the run before mean nothing to this one.
    for name in ["runtime", report::NOTIFY_FOLDER] {
        empty(&folder.join(name))?;
    }
    let launch_file = folder.join(report::LAUNCH_FILE);
    report::write(&launch_file, launch).map_err(|error| EngineError::io("writing", &launch_file, error))?;
    let log_path = folder.join(report::LOGS).join("shim.log");
    let log = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&log_path)
        .map_err(|error| EngineError::io("writing", &log_path, error))?;
    let second = log.try_clone().map_err(|error| EngineError::io("writing", &log_path, error))?;
    let [program, arguments @ ..] = shim else {
        return Err(EngineError::Shim("engine.shim is empty".into()));
    };
    let mut command = std::process::Command::new(program);
    command.args(arguments).arg(folder).current_dir("/").env_clear();
    for name in ["PATH", "FANLIGHT_LOG"] {
        command.envs(std::env::var(name).ok().map(|value| (name, value)));
    }
    command.stdin(Stdio::null()).stdout(log).stderr(second);
    // Not killed when it is dropped: it is to outlive us.
    tokio::process::Command::from(command).spawn().map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => EngineError::MissingProgram {
            path: program.into(),
            advice: "it is the shim of instances, named in engine.shim",
        },
        _ => EngineError::Shim(format!("starting {program}: {source}")),
    })
}

/// Waits until a shim that was just started answers.
async fn await_shim(
    folder: &Path,
    mut child: tokio::process::Child,
) -> Result<(UnixStream, tokio::process::Child), EngineError> {
    let deadline = Instant::now() + SHIM_START;
    loop {
        if let Ok(stream) = UnixStream::connect(folder.join(report::SOCKET)).await {
            return Ok((stream, child));
        }
        let exited = matches!(child.try_wait(), Ok(Some(_)));
        if exited || Instant::now() > deadline {
            let _ = child.start_kill();
            let log = fs::read_to_string(folder.join(report::LOGS).join("shim.log")).unwrap_or_default();
            let last = log.trim().lines().last().unwrap_or("it said nothing").to_owned();
            return Err(EngineError::Shim(if exited {
                last
            } else {
                format!("no answer in {SHIM_START:?}: {last}")
            }));
        }
        tokio::time::sleep(Duration::from_millis(3)).await;
    }
}

/// The state of the last run. A file that cannot be read counts as none: the run is then over.
async fn state(folder: &Path) -> Option<Report> {
    let path = folder.join(report::STATE_FILE);
    blocking(move || {
        report::read(&path).unwrap_or_else(|error| {
            tracing::warn!("the state of a run cannot be read: {error}");
            None
        })
    })
    .await
}

/// The state of the last run after a restart of AMS, with the gaps closed: a shim that was started and has not
/// written anything yet, and one that died without a word.
async fn settled_state(folder: &Path) -> Option<Report> {
    let deadline = Instant::now() + SHIM_START;
    loop {
        let report = state(folder).await;
        let alive = report.as_ref().is_some_and(|report| report.phase.is_live() && report.shim.is_alive());
        if alive || !is_locked(folder) || Instant::now() > deadline {
            return match report {
                Some(report) if report.phase.is_live() && !report.shim.is_alive() => {
                    // Read again: it may have ended properly just now.
                    match state(folder).await {
                        Some(last) if !last.phase.is_live() => Some(last),
                        _ => Some(lost(folder, report).await),
                    }
                }
                other => other,
            };
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Whether a shim holds its lock.
fn is_locked(folder: &Path) -> bool {
    let Ok(file) = File::open(folder.join(report::LOCK_FILE)) else { return false };
    flock(&file, FlockOperation::NonBlockingLockExclusive).is_err()
}

/// The end of a run whose shim died: nothing of it is left behind.
async fn lost(folder: &Path, mut report: Report) -> Report {
    let path = folder.join(report::LAUNCH_FILE);
    let launch: Option<Launch> = blocking(move || report::read(&path)).await.unwrap_or_default();
    if let Some(launch) = launch {
        end_sandbox(&launch.command).await;
    }
    report.phase = Phase::Ended(Ended {
        reason: EndReason::Failed,
        message: "the shim of the instance was killed, or the machine was restarted".into(),
    });
    report
}

fn empty(folder: &Path) -> Result<(), EngineError> {
    let fail = |error| EngineError::io("emptying", folder, error);
    for entry in fs::read_dir(folder).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        // Links are removed, not followed.
        match entry.file_type().map_err(fail)?.is_dir() {
            true => fs::remove_dir_all(entry.path()).map_err(fail)?,
            false => fs::remove_file(entry.path()).map_err(fail)?,
        }
    }
    Ok(())
}

async fn remove(folder: PathBuf) -> Result<(), EngineError> {
    blocking(move || {
        // Processes that were just killed may still hold on to a file for a moment.
        let mut attempts = 0;
        loop {
            match fs::remove_dir_all(&folder) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(error) if attempts >= 50 => return Err(EngineError::io("removing", &folder, error)),
                Err(_) => {
                    // An application of our own user may have taken the right to look into its folders away.
                    make_removable(&folder);
                    attempts += 1;
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        }
    })
    .await
}

/// Gives the owner the right to list and change every folder below.
fn make_removable(folder: &Path) {
    let Ok(metadata) = fs::symlink_metadata(folder) else { return };
    if !metadata.is_dir() {
        return;
    }
    let _ = fs::set_permissions(folder, fs::Permissions::from_mode(metadata.permissions().mode() | 0o700));
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            make_removable(&entry.path());
        }
    }
}

fn is_log_name(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && !name.starts_with('.')
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'))
}

/// The last bytes of a regular file; none when there is no such file. Links are not followed and pipes not
/// waited for, because an instance may have put them there.
fn read_end(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mut file = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::LOOP | rustix::io::Errno::NXIO) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Ok(None);
    }
    file.seek(SeekFrom::Start(metadata.len().saturating_sub(LOG_BYTES)))?;
    let mut bytes = Vec::new();
    file.take(LOG_BYTES).read_to_end(&mut bytes)?;
    Ok(Some(bytes))
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.expect("the work does not panic, and the runtime ends after us")
}
