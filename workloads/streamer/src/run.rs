//! One instance from start to end: the supervisor on the main thread.
//!
//! It starts the display, media, sound, the way to the agent and the application, in this order, so that each
//! finds what it needs; then it waits for news and applies the rules of `app` and `session`. When the instance is
//! over, clients are told first.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    fs,
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    rc::Rc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use fanlight_api::{
    agent_link::{ClientState, ClientStatus, StreamerStatus},
    guest::{ClaimAnswer, EXIT_FAILED, EXIT_GRACEFUL, EndReason, Ended, Guest, PoolStart, Streaming},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, oneshot},
    task::JoinHandle,
};
use tracing::{error, info, warn};

use crate::{
    agent::{Agent, Incoming, Outgoing},
    app::{self, Application, Log, Next, Rules, Setting},
    audio::{Capture, Server, ServerConfig},
    claim::{self, Claim},
    compositor::{self, Compositor, Event, Xwayland},
    config::{Config, EncoderName, X11},
    encode::EncoderKind,
    media::{self, Command, MediaSocket, Notice, Video, mailbox},
    notify::Notify,
    session::{Idle, Presence},
};

/// The instance counts as ready this long after its application was started, window or not.
const READY_LIMIT: Duration = Duration::from_secs(3);
/// How long saying goodbye to clients may take.
const GOODBYE_LIMIT: Duration = Duration::from_secs(1);
/// How long telling the agent may take.
const LAST_STATUS_LIMIT: Duration = Duration::from_millis(700);
/// A dead child that nobody has waited for by then is nobody's.
const ORPHAN_PATIENCE: Duration = Duration::from_secs(2);
/// How often what remains of an application is looked for after its program ended.
const FAMILY_EVERY: Duration = Duration::from_secs(1);

/// News for the supervisor.
enum News {
    Display(Event),
    Media(Notice),
    Agent(Incoming),
    Claim(Claim),
}

/// Runs the instance to its end; returns the exit status of the program.
pub fn run(guest: Guest, config: Config) -> i32 {
    let notify = Notify::new(std::env::var_os("NOTIFY_SOCKET"));
    if let Err(error) = rustix::process::set_child_subreaper(Some(rustix::process::getpid())) {
        warn!(%error, "what the application forks away may outlive it");
    }
    let ended = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => {
            let local = tokio::task::LocalSet::new();
            local.block_on(&runtime, supervise(guest, config, &notify))
        }
        Err(error) => failed(format!("starting the runtime: {error}")),
    };
    if ended.reason.is_graceful() {
        info!(reason = ?ended.reason, "instance ended: {}", ended.message);
    } else {
        error!("instance failed: {}", ended.message);
    }
    notify.ended(&ended);
    if ended.reason.is_graceful() { EXIT_GRACEFUL } else { EXIT_FAILED }
}

fn failed(message: String) -> Ended {
    Ended { reason: EndReason::Failed, message }
}

/// An error with its causes on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// Folders of the instance; removed at the end.
struct Folders {
    runtime: PathBuf,
    sound: PathBuf,
    home: PathBuf,
}

impl Folders {
    fn make(guest: &Guest) -> io::Result<Self> {
        let parent = std::env::var_os("XDG_RUNTIME_DIR")
            .map(PathBuf::from)
            .filter(|folder| is_writable(folder))
            .unwrap_or_else(std::env::temp_dir);
        // Process ids make it unique among instances that a test starts with the same id.
        let runtime = parent.join(format!("fanlight-{}-{}", guest.instance_id, std::process::id()));
        let private = |folder: &Path| {
            fs::DirBuilder::new().mode(0o700).recursive(true).create(folder)?;
            fs::set_permissions(folder, fs::Permissions::from_mode(0o700))
        };
        private(&runtime)?;
        let sound = runtime.join("pulse");
        private(&sound)?;
        let home = match std::env::var_os("HOME").map(PathBuf::from).filter(|home| is_writable(home)) {
            Some(home) => home,
            None => {
                let home = runtime.join("home");
                private(&home)?;
                home
            }
        };
        Ok(Self { runtime, sound, home })
    }
}

impl Drop for Folders {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.runtime) {
            warn!(%error, folder = %self.runtime.display(), "the runtime folder is left behind");
        }
    }
}

fn is_writable(folder: &Path) -> bool {
    folder.is_dir() && rustix::fs::access(folder, rustix::fs::Access::WRITE_OK).is_ok()
}

/// Everything that runs.
struct Instance {
    guest: Guest,
    compositor: Compositor,
    video: Video,
    media: media::Sender<Command>,
    sound: Server,
    /// Records until it is dropped.
    _capture: Option<Capture>,
    agent: Option<(mpsc::UnboundedSender<Outgoing>, JoinHandle<()>)>,
    setting: Setting,
    log: Rc<RefCell<Log>>,
    status: StreamerStatus,
    /// Our part of the runtime folder.
    runtime: PathBuf,
    news: mpsc::UnboundedSender<News>,
    /// Waits for a session, or has got one that way.
    pool: Option<Waiting>,
}

/// An instance of a pool.
struct Waiting {
    start: PoolStart,
    claimed: bool,
}

async fn supervise(guest: Guest, config: Config, notify: &Notify) -> Ended {
    let folders = match Folders::make(&guest) {
        Ok(folders) => folders,
        Err(error) => return failed(format!("making the instance's runtime folder: {error}")),
    };
    let (news, mut inbox) = mpsc::unbounded_channel();
    let mut signals = match [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::child()]
        .map(signal)
        .into_iter()
        .collect::<io::Result<Vec<_>>>()
    {
        Ok(signals) => signals,
        Err(error) => return failed(format!("listening to signals: {error}")),
    };
    let [terminate, interrupt, child] = &mut signals[..] else {
        return failed("listening to signals: some are missing".into());
    };
    let mut instance = match Instance::start(guest, &config, &folders, &news) {
        Ok(instance) => instance,
        Err(message) => return failed(message),
    };
    let ended = tokio::select! {
        ended = instance.watch(&mut inbox, child, notify) => ended,
        _ = terminate.recv() => stopped("asked to stop"),
        _ = interrupt.recv() => stopped("interrupted"),
    };
    let grace = Duration::from_secs(config.stop.grace_s);
    instance.end(&mut inbox, &ended, grace, terminate).await;
    ended
}

fn stopped(how: &str) -> Ended {
    Ended { reason: EndReason::Stopped, message: how.into() }
}

impl Instance {
    fn start(
        guest: Guest,
        config: &Config,
        folders: &Folders,
        news: &mpsc::UnboundedSender<News>,
    ) -> Result<Self, String> {
        let (media, media_inbox) =
            mailbox().map_err(|error| format!("making the media thread's queue: {error}"))?;
        let socket = MediaSocket::bind(&guest.media).map_err(|error| chain(&error))?;
        info!(port = socket.bound().port(), "media socket bound");

        let video = Video::new();
        let to_video = video.clone();
        let to_media = media.clone();
        let to_us = news.clone();
        let display = compositor::Config {
            width: guest.display.width,
            height: guest.display.height,
            fps: guest.display.fps,
            runtime_dir: folders.runtime.clone(),
            xwayland: xwayland(config.display.x11),
            keyboard_layout: config.display.keyboard_layout.clone(),
        };
        let compositor = Compositor::start(display, move |event| match event {
            Event::Frame(frame) => to_video.frame(frame),
            Event::Cursor(cursor) => to_media.send(Command::Cursor(cursor)),
            Event::PointerLock(locked) => to_media.send(Command::PointerLock(locked)),
            // At the very end nobody is left to be told.
            event => drop(to_us.send(News::Display(event))),
        })
        .map_err(|error| format!("starting the display: {}", chain(&error)))?;

        let server = ServerConfig { folder: folders.sound.clone() };
        let pulse_server = server.address();
        let to_media = media.clone();
        let sound = if config.sound.enabled { Server::start(server) } else { Server::none(server) };
        let capture = config.sound.enabled.then(|| {
            Capture::start(pulse_server.clone(), move |packet| {
                to_media.send(Command::Audio { captured: packet.captured, packet: packet.data });
            })
        });
        let capture = match capture.transpose() {
            Ok(capture) => capture,
            Err(error) => {
                warn!(%error, "there is no sound: its thread could not be started");
                None
            }
        };
        let listening = capture.as_ref().map(Capture::listening);

        video
            .run(media.clone(), Command::Encoded)
            .map_err(|error| format!("starting the encoder's thread: {error}"))?;
        let to_us = news.clone();
        let media_config = media::Config {
            screen: guest.display,
            encoder: encoder(guest.media.encoder.as_deref(), config.encoder.kind),
            compositor: compositor.clone(),
            video: video.clone(),
            socket,
            listening: Box::new(move |wanted| {
                if let Some(listening) = &listening {
                    listening.set(wanted);
                }
            }),
            notices: Box::new(move |notice| drop(to_us.send(News::Media(notice)))),
        };
        media::Worker::start(media_config, media_inbox)
            .map_err(|error| format!("starting the media thread: {error}"))?;

        let logs = std::env::var_os("FANLIGHT_LOG_DIR").map(PathBuf::from);
        let log = Log::open(logs.as_deref()).or_else(|error| {
            warn!(%error, "the application's log goes to ours: its file cannot be opened");
            Log::open(None)
        });
        let log = log.map_err(|error| format!("opening the application's log: {error}"))?;
        let setting = Setting {
            home: folders.home.clone(),
            display: compositor.environment(),
            pulse_server,
            extra_data: None,
        };
        let mut instance = Self {
            sound,
            pool: guest.pool.map(|start| Waiting { start, claimed: false }),
            guest,
            compositor,
            video,
            media,
            _capture: capture,
            agent: None,
            setting,
            log: Rc::new(RefCell::new(log)),
            status: StreamerStatus { idle_since: Some(unix_now()), ..StreamerStatus::default() },
            runtime: folders.runtime.clone(),
            news: news.clone(),
        };
        if instance.pool.is_some() {
            let to_us = news.clone();
            claim::listen(&folders.runtime, move |claim| drop(to_us.send(News::Claim(claim))))
                .map_err(|error| format!("making the socket for claims: {error}"))?;
        } else if let Some(streaming) = instance.guest.streaming.clone() {
            instance.enter_session(streaming)?;
        }
        Ok(instance)
    }

    /// Keeps the way to the agent of this session from now on, and hands its data on to the application.
    fn enter_session(&mut self, streaming: Streaming) -> Result<(), String> {
        let (to_agent, from_us) = mpsc::unbounded_channel();
        let to_us = self.news.clone();
        let extra_data = Some(streaming.extra_data.clone()).filter(|data| !data.is_null());
        let agent = Agent::new(streaming, self.guest.instance_id.clone(), move |incoming| {
            drop(to_us.send(News::Agent(incoming)));
        })
        .map_err(|error| chain(&error))?;
        if let Some(data) = extra_data {
            let path = write_extra_data(&self.runtime, &data)
                .map_err(|error| format!("writing the application's extra data: {error}"))?;
            self.setting.extra_data = Some(path);
        }
        self.agent = Some((to_agent, tokio::task::spawn_local(agent.run(from_us))));
        Ok(())
    }

    /// Takes a claim. `Ok(false)`: it is the one that was taken before.
    fn claim(&mut self, claim: Guest) -> Result<bool, String> {
        let Some(pool) = &self.pool else { return Err("this instance is not of a pool".into()) };
        check_claim(&self.guest, pool.start, pool.claimed, &claim)?;
        if pool.claimed {
            return Ok(false);
        }
        // Before anybody can ask for a picture, and before the application asks how large the display is.
        let screen = claim.display;
        self.compositor.resize(screen.width, screen.height, screen.fps);
        self.media.send(Command::Screen(screen));
        self.status.idle_since = Some(unix_now());
        if let Some(streaming) = claim.streaming.clone() {
            self.enter_session(streaming)?;
        }
        self.guest = claim;
        if let Some(pool) = &mut self.pool {
            pool.claimed = true;
        }
        Ok(true)
    }

    /// Watches the instance until it is over.
    async fn watch(
        &mut self,
        inbox: &mut mpsc::UnboundedReceiver<News>,
        child: &mut tokio::signal::unix::Signal,
        notify: &Notify,
    ) -> Ended {
        let started = Instant::now();
        let name = self.guest.application.name.clone();
        let mut idle = self.idle(started);
        let (mut application, mut rules, mut ready_at) = (None, None, None);
        if self.pool.as_ref().is_some_and(|pool| pool.start == PoolStart::Streamer) {
            info!("{name} is not started before somebody claims this instance");
            notify.ready("waits to be claimed");
        } else {
            application = match self.start_application() {
                Ok(application) => Some(application),
                Err(ended) if self.guest.devmode => {
                    stays(&ended, notify, true);
                    None
                }
                Err(ended) => return ended,
            };
            if application.is_some() {
                rules = Some(Rules::new(started, &name, self.guest.application.restart));
                ready_at = Some(started + READY_LIMIT);
            }
        }
        let mut orphans = BTreeMap::new();
        let mut orphans_at: Option<Instant> = None;
        let mut family_at: Option<Instant> = None;
        self.tell_status();
        loop {
            let deadline = [
                ready_at,
                orphans_at,
                family_at,
                rules.as_ref().and_then(Rules::deadline),
                idle.as_ref().and_then(Idle::deadline),
            ]
            .into_iter()
            .flatten()
            .min();
            let mut next = Next::Wait;
            tokio::select! {
                Some(item) = inbox.recv() => match item {
                    News::Display(Event::FirstWindow) => {
                        rules.iter_mut().for_each(Rules::window_shown);
                        let shown = format!("{name} has shown its first window");
                        match ready_at.take() {
                            Some(_) => notify.ready(&shown),
                            None => notify.status(&shown),
                        }
                        if !std::mem::replace(&mut self.status.ready, true) {
                            info!(duration_ms = started.elapsed().as_millis() as u64, "{name} has shown its first window");
                            self.tell_status();
                        }
                    }
                    News::Display(Event::Clients { wayland, x11 }) => {
                        if let Some(rules) = &mut rules {
                            rules.set_clients(wayland + x11);
                            next = rules.check(Instant::now());
                        }
                    }
                    News::Display(Event::XwaylandExited) => warn!("the X server ended and is started again"),
                    News::Display(Event::Failed(message)) => return failed(message),
                    News::Display(Event::Frame(_) | Event::Cursor(_) | Event::PointerLock(_)) => {}
                    News::Media(notice) => {
                        if let Some(ended) = self.media_notice(notice, idle.as_mut()) {
                            return ended;
                        }
                    }
                    News::Agent(incoming) => self.agent_news(incoming),
                    News::Claim((claim, answer)) => {
                        let taken = self.claim(*claim);
                        let mut failure = None;
                        if taken == Ok(true) {
                            info!("this instance was claimed");
                            notify.status("was claimed");
                            let now = Instant::now();
                            idle = self.idle(now);
                            if rules.is_none() {
                                match self.start_application() {
                                    Ok(started) => application = Some(started),
                                    Err(ended) => failure = Some(ended),
                                }
                                rules = Some(Rules::new(now, &name, self.guest.application.restart));
                            }
                            self.tell_status();
                        }
                        let error = taken.err().or(failure.as_ref().map(|ended| ended.message.clone()));
                        // Who does not wait for the answer asks again.
                        let _ = answer.send(ClaimAnswer { ok: error.is_none(), error, again: false });
                        if let Some(ended) = failure {
                            return ended;
                        }
                    }
                },
                exit = ended(&mut application) => {
                    application = None;
                    info!(?exit, "the program of application {name} ended");
                    family_at = Some(Instant::now() + FAMILY_EVERY);
                    if let Some(rules) = &mut rules {
                        rules.set_family(app::is_family_left(&self.spared()));
                        next = rules.exited(Instant::now(), exit);
                    }
                }
                () = self.sound.supervise() => {}
                _ = child.recv() => orphans_at = Some(Instant::now()),
                () = until(deadline) => {}
            }
            let now = Instant::now();
            if orphans_at.is_some_and(|at| at <= now) {
                let mut spared = self.spared();
                spared.extend(application.as_ref().map(Application::pid));
                let watching = app::reap_orphans(&mut orphans, ORPHAN_PATIENCE, &spared);
                orphans_at = watching.then_some(now + ORPHAN_PATIENCE);
            }
            if ready_at.is_some_and(|at| at <= now) {
                ready_at = None;
                notify.ready(&format!("{name} runs and has not shown a window yet"));
            }
            if family_at.is_some_and(|at| at <= now) {
                family_at = None;
                if application.is_none()
                    && let Some(rules) = &mut rules
                {
                    let left = app::is_family_left(&self.spared());
                    rules.set_family(left);
                    family_at = left.then_some(now + FAMILY_EVERY);
                }
            }
            if next == Next::Wait
                && let Some(rules) = &mut rules
            {
                next = rules.check(now);
            }
            let over = match next {
                Next::Wait => None,
                Next::Start => match self.start_application() {
                    Ok(started) => {
                        rules.iter_mut().for_each(|rules| rules.started(now));
                        application = Some(started);
                        None
                    }
                    Err(ended) => Some(ended),
                },
                Next::End(ended) => Some(ended),
            };
            if let Some(ended) = over {
                if !self.guest.devmode {
                    return ended;
                }
                stays(&ended, notify, ready_at.take().is_some());
                rules = None;
            }
            if let Some(message) = idle.as_ref().and_then(|idle| idle.verdict(now)) {
                return Ended { reason: EndReason::Idle, message };
            }
        }
    }

    /// When the session ends by itself; without one, never.
    fn idle(&self, now: Instant) -> Option<Idle> {
        let streaming = self.guest.streaming.as_ref()?;
        Some(Idle::new(now, streaming.joinable, streaming.idle_time_min))
    }

    fn start_application(&self) -> Result<Application, Ended> {
        Application::start(&self.guest.application, &self.setting, &self.log)
            .map_err(|error| failed(error.to_string()))
    }

    /// Processes below us that are not the application's.
    fn spared(&self) -> Vec<u32> {
        self.sound.pid().into_iter().collect()
    }

    fn media_notice(&mut self, notice: Notice, idle: Option<&mut Idle>) -> Option<Ended> {
        match notice {
            Notice::Signal { generation, frame } => self.tell_agent(Outgoing::Signal { generation, frame }),
            Notice::Step(step) => self.tell_agent(Outgoing::Step(step)),
            Notice::Client(client) => {
                let presence = presence(client.as_ref());
                let connected = presence == Presence::Connected;
                if let Some(idle) = idle {
                    idle.set_presence(Instant::now(), presence);
                }
                self.status.idle_since = match (connected, self.status.idle_since) {
                    (true, _) => None,
                    (false, Some(since)) => Some(since),
                    (false, None) => Some(unix_now()),
                };
                self.status.client = client;
                self.tell_status();
            }
            Notice::Broken(message) => return Some(failed(message)),
        }
        None
    }

    fn agent_news(&mut self, incoming: Incoming) {
        self.media.send(match incoming {
            Incoming::Signal { generation, frame } => Command::Signal { generation, frame },
            Incoming::EndStream { message } => Command::End { message },
        });
    }

    fn tell_status(&self) {
        self.tell_agent(Outgoing::Status(self.status.clone()));
    }

    fn tell_agent(&self, outgoing: Outgoing) {
        if let Some((to_agent, _)) = &self.agent {
            // The task ends only after its last message.
            let _ = to_agent.send(outgoing);
        }
    }

    /// Ends everything: clients are told at once, then the application may put its things in order.
    async fn end(
        mut self,
        inbox: &mut mpsc::UnboundedReceiver<News>,
        ended: &Ended,
        grace: Duration,
        terminate: &mut tokio::signal::unix::Signal,
    ) {
        info!("ending: {}", ended.message);
        let (done, goodbye) = oneshot::channel();
        self.media.send(Command::Stop { message: ended.message.clone(), done });
        if tokio::time::timeout(GOODBYE_LIMIT, goodbye).await.is_err() {
            warn!("saying goodbye to the client took too long");
        }
        while let Ok(item) = inbox.try_recv() {
            if let News::Media(notice) = item {
                // The end is under way, whatever it is.
                let _ = self.media_notice(notice, None);
            }
        }
        self.status.client = None;
        self.status.ended = Some(ended.clone());
        self.tell_agent(Outgoing::Last(self.status.clone()));
        let spared = self.spared();
        let told = async {
            if let Some((_, task)) = &mut self.agent {
                // Without an agent nobody can be told.
                let _ = tokio::time::timeout(LAST_STATUS_LIMIT, task).await;
            }
        };
        let application = async {
            tokio::select! {
                () = app::end_everything(&spared, grace) => {}
                // Asked a second time: no more patience.
                _ = terminate.recv() => app::end_everything(&spared, Duration::ZERO).await,
            }
        };
        tokio::join!(told, application);
        self.video.end();
        self.compositor.stop();
        self.sound.stop().await;
        app::end_everything(&[], Duration::ZERO).await;
    }
}

/// Whether an instance can get what a claim brings. `claimed`: `own` is what an earlier claim brought.
fn check_claim(own: &Guest, start: PoolStart, claimed: bool, claim: &Guest) -> Result<(), String> {
    let session = |guest: &Guest| guest.streaming.as_ref().map(|streaming| streaming.session_id.clone());
    if claim.instance_id != own.instance_id {
        return Err(format!("this is instance {}, not {}", own.instance_id, claim.instance_id));
    }
    if claim.pool.is_some() {
        return Err("member pool: a claim takes an instance out of its pool".into());
    }
    if claimed {
        return match session(own) == session(claim) {
            true => Ok(()),
            false => Err("this instance was claimed for another session".into()),
        };
    }
    if start == PoolStart::Application {
        let has_data = claim.streaming.as_ref().is_some_and(|streaming| !streaming.extra_data.is_null());
        if has_data || claim.application != own.application {
            return Err(
                "the application was started already: it cannot get other data or another program".into()
            );
        }
    }
    Ok(())
}

/// Tells of the end of an application whose instance stays. `first`: the instance was not ready before.
fn stays(ended: &Ended, notify: &Notify, first: bool) {
    let message = format!("{}; the instance stays (devmode)", ended.message);
    warn!("{message}");
    match first {
        true => notify.ready(&message),
        false => notify.status(&message),
    }
}

/// The end of the application's program, if one runs.
async fn ended(application: &mut Option<Application>) -> app::Exit {
    match application {
        Some(application) => application.wait().await,
        None => std::future::pending().await,
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}

fn presence(client: Option<&ClientStatus>) -> Presence {
    match client.map(|client| client.state) {
        None => Presence::Nobody,
        Some(ClientState::Signalling) => Presence::Arriving,
        Some(ClientState::Connected | ClientState::Streaming) => Presence::Connected,
    }
}

fn unix_now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64)
}

fn xwayland(when: X11) -> Xwayland {
    match (when, std::env::current_exe()) {
        (X11::Never, _) => Xwayland::Never,
        (X11::AtStart, _) => Xwayland::AtOnce,
        (X11::OnDemand, Ok(program)) => Xwayland::OnDemand(program),
        (X11::OnDemand, Err(error)) => {
            warn!(%error, "Xwayland runs from the beginning: our own program is not found");
            Xwayland::AtOnce
        }
    }
}

/// The encoder chosen for the node, else the configured one.
fn encoder(name: Option<&str>, configured: EncoderName) -> EncoderKind {
    match name {
        None | Some("auto") => match configured {
            EncoderName::Auto => EncoderKind::Auto,
            EncoderName::X264 => EncoderKind::X264,
            EncoderName::OpenH264 => EncoderKind::OpenH264,
        },
        Some("x264") => EncoderKind::X264,
        Some("openh264") => EncoderKind::OpenH264,
        Some(other) => {
            warn!("encoder {other:?} of the guest file is not known; the best one is used");
            EncoderKind::Auto
        }
    }
}

fn write_extra_data(folder: &Path, data: &serde_json::Value) -> io::Result<PathBuf> {
    let path = folder.join("extra-data.json");
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
    file.write_all(data.to_string().as_bytes())?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn guest(more: serde_json::Value) -> Guest {
        let mut guest = json!({
            "version": 1, "instance_id": "i1",
            "application": {"name": "terminal", "command": ["foot"]},
            "display": {"width": 1280, "height": 720, "fps": 60, "density": 240},
        });
        for (name, value) in more.as_object().into_iter().flatten() {
            guest[name] = value.clone();
        }
        serde_json::from_value(guest).expect("a guest file")
    }

    fn session(id: &str, extra_data: serde_json::Value) -> serde_json::Value {
        json!({"streaming": {"session_id": id, "agent_url": "wss://a", "token": "t", "extra_data": extra_data}})
    }

    #[test]
    fn an_instance_is_claimed_once_and_the_same_claim_again_is_no_other() {
        let waiting = guest(json!({"pool": "streamer"}));
        let claim = |id: &str| guest(session(id, json!("data")));
        let check =
            |own: &Guest, claimed, claim: &Guest| check_claim(own, PoolStart::Streamer, claimed, claim);
        assert_eq!(check(&waiting, false, &claim("s1")), Ok(()));
        assert_eq!(check(&claim("s1"), true, &claim("s1")), Ok(()));
        for (own, claimed, wrong, why) in [
            (claim("s1"), true, claim("s2"), "another session"),
            (claim("s1"), true, guest(json!({})), "another session"),
            (waiting.clone(), false, guest(json!({"instance_id": "i2"})), "not i2"),
            (waiting.clone(), false, waiting, "member pool"),
        ] {
            let error = check(&own, claimed, &wrong).expect_err(why);
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn an_application_that_runs_already_gets_no_data_and_stays_the_same() {
        let waiting = guest(json!({"pool": "application"}));
        let check = |claim: &Guest| check_claim(&waiting, PoolStart::Application, false, claim);
        assert_eq!(check(&guest(session("s1", json!(null)))), Ok(()));
        let other = guest(json!({"application": {"name": "terminal", "command": ["top"]}}));
        for claim in [guest(session("s1", json!({"a": 1}))), other] {
            assert!(check(&claim).is_err_and(|error| error.contains("started already")));
        }
    }
}
