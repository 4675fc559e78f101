//! The media thread: socket, peer and signalling core under one owner.
//!
//! It sleeps in `ppoll`, whose timeout has nanoseconds, until a datagram, work from another thread, or the
//! earliest deadline comes; socket time-outs would round to the kernel's tick and show as uneven frames
//! (media-stack section 8, 5). After every input the peer is drained before anything else happens.
//!
//! A panic in handling one client ends that client's peer and nothing else.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    panic::{AssertUnwindSafe, catch_unwind},
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use fanlight_api::{
    agent_link::{ClientStatus, FunnelStep},
    control::{CONTROL_CHANNEL, CursorNotice, FANLIGHT_CHANNEL, FanlightNotice, FanlightRequest},
    gateway::Screen,
    link::Frame,
    signal::ErrorCode,
};
use fanlight_rtc::{
    Event, IceState, MediaKind, Output as PeerOutput, Peer, PeerConfig, PeerError, Role, VideoCodec,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use tokio::sync::oneshot;
use tracing::{debug, error, info, warn};

use super::{
    input::{Asked, Translator},
    mailbox::Receiver,
    phase::Phase,
    rate::{KeyLimit, Pace, Rate},
    socket::MediaSocket,
    video::{Encoded, Order, Video},
};
use crate::{
    compositor::{Compositor, Cursor, is_layout_name},
    encode::{self, EncoderKind},
    session::{Core, Input, LocalCandidate, Output, PeerEvent, PeerPlan, PeerRole},
};

/// Bandwidth believed in before there is any measurement (media-stack section 2).
const START_ESTIMATE_BPS: u64 = 4_000_000;
/// What sound takes on the wire with its headers.
const AUDIO_BPS: u64 = 150_000;
/// Probing goes this far beyond what the encoder may use, so that its share of the estimate can reach it.
const HEADROOM: f64 = 1.4;
/// Pictures wait while older ones have not left for so long.
const FULL: Duration = Duration::from_millis(120);
/// How often a full pacer is looked at again.
const FULL_CHECK: Duration = Duration::from_millis(10);
/// Key frames that nobody asked for, counted from the connection, until the client has shown that it sees something.
/// A client may lose the first one because its own side of the handshake is a moment later, and some never ask.
const NUDGES: [Duration; 2] = [Duration::from_millis(300), Duration::from_millis(1500)];
const STATS_EVERY: Duration = Duration::from_secs(1);
/// The goodbye is said again after this: nobody acknowledges it, and losing it costs the client 18 s.
const FAREWELL_AGAIN: Duration = Duration::from_millis(40);
/// Last datagrams of a connection that are repeated.
const FAREWELL_DATAGRAMS: usize = 6;
/// Largest datagram; more than any path carries without fragments.
const DATAGRAM_BYTES: usize = 2048;
/// Datagrams taken before other work gets its turn.
const BATCH: usize = 64;
/// Panics in a row after which something is wrong with us rather than with a client.
const MAX_PANICS: u32 = 20;
/// Largest message with a cursor; clients take 256 KiB.
const MAX_CURSOR_BYTES: usize = 200 * 1024;

/// Work for the media thread.
#[derive(Debug)]
pub enum Command {
    /// A frame of signalling, in order.
    Signal {
        /// Whose.
        generation: u64,
        /// The frame.
        frame: Frame,
    },
    /// From the encoder.
    Encoded(Encoded),
    /// One Opus packet.
    Audio {
        /// When its first sample was captured.
        captured: Instant,
        /// The packet.
        packet: Bytes,
    },
    /// The pointer looks different.
    Cursor(Cursor),
    /// An application holds the pointer, or no longer does.
    PointerLock(bool),
    /// The display has another size; sent before anybody watches.
    Screen(Screen),
    /// The session has ended: say goodbye.
    End {
        /// For the client.
        message: String,
    },
    /// Say goodbye and end the thread.
    Stop {
        /// For the client.
        message: String,
        /// Dropped when the goodbye has been said.
        done: oneshot::Sender<()>,
    },
}

/// News from the media thread.
#[derive(Debug)]
pub enum Notice {
    /// To be sent to the client's socket.
    Signal {
        /// Whose.
        generation: u64,
        /// The frame.
        frame: Frame,
    },
    /// A step of the connect funnel.
    Step(FunnelStep),
    /// Who has the stream.
    Client(Option<ClientStatus>),
    /// The thread cannot go on.
    Broken(String),
}

/// What the media thread works with.
pub struct Config {
    /// Size of the display.
    pub screen: Screen,
    /// Encoder to use.
    pub encoder: EncoderKind,
    /// Gets the input.
    pub compositor: Compositor,
    /// Gives the pictures.
    pub video: Video,
    /// The one socket.
    pub socket: MediaSocket,
    /// Told whether somebody listens to the sound.
    pub listening: Box<dyn Fn(bool) + Send>,
    /// Gets the news.
    pub notices: Box<dyn Fn(Notice) + Send>,
}

/// The media thread.
pub struct Worker {
    config: Config,
    core: Core,
    inputs: VecDeque<Input>,
    active: Option<Active>,
    farewells: Vec<Farewell>,
    cursor: Option<Cursor>,
    locked: bool,
    stopping: Option<oneshot::Sender<()>>,
}

/// The client that has the stream.
struct Active {
    generation: u64,
    peer: Peer,
    plan: PeerPlan,
    translator: Translator,
    rate: Rate,
    limits: (u64, u64),
    keys: KeyLimit,
    phase: Phase,
    /// Key frames that are still to be sent unasked, the next one first.
    nudges: VecDeque<Instant>,
    deadline: Instant,
    connected: bool,
    held: bool,
    fanlight: bool,
    audio_at: Option<Instant>,
    encoder: String,
    seen: Means,
    stats_at: Option<Instant>,
    /// The last datagrams sent.
    last: VecDeque<(SocketAddr, Vec<u8>)>,
    /// What the events so far mean for other parts.
    news: Vec<News>,
}

/// What an event of the peer means for other parts.
enum News {
    Connected,
    Hold(bool),
    Key,
    Pace(Pace),
    Input(crate::compositor::Input),
    Release,
    Layout(String),
    /// Move the frame grid by so many milliseconds.
    Shift(f64),
    Greet,
}

struct Farewell {
    at: Instant,
    destination: SocketAddr,
    data: Vec<u8>,
}

/// Sums of one second.
#[derive(Clone, Copy, Debug, Default)]
struct Means {
    frames: u32,
    waited: u32,
    capture: Duration,
    encode: Duration,
    send: Duration,
}

impl Means {
    fn mean_ms(sum: Duration, count: u32) -> f64 {
        // Hundredths are as exact as it gets.
        (sum.as_secs_f64() * 1e5 / f64::from(count.max(1))).round() / 100.0
    }
}

impl Worker {
    /// Starts the thread.
    ///
    /// # Errors
    /// When no thread can be made.
    pub fn start(config: Config, mailbox: Receiver<Command>) -> std::io::Result<JoinHandle<()>> {
        std::thread::Builder::new().name("media".into()).spawn(move || {
            let core = Core::new(config.screen);
            Worker {
                config,
                core,
                inputs: VecDeque::new(),
                active: None,
                farewells: Vec::new(),
                cursor: None,
                locked: false,
                stopping: None,
            }
            .run(&mailbox);
        })
    }

    fn run(mut self, mailbox: &Receiver<Command>) {
        let mut buffer = [0; DATAGRAM_BYTES];
        let mut panics = 0;
        loop {
            match catch_unwind(AssertUnwindSafe(|| self.turn(mailbox, &mut buffer))) {
                Ok(()) => panics = 0,
                Err(_) => {
                    panics += 1;
                    error!("handling a client panicked; its connection is dropped");
                    if panics > MAX_PANICS {
                        (self.config.notices)(Notice::Broken("the media loop keeps panicking".into()));
                        return;
                    }
                    if let Some(active) = self.active.take() {
                        self.release();
                        let event = PeerEvent::Failed("internal error".into());
                        self.inputs.push_back(Input::Peer { generation: active.generation, event });
                    }
                }
            }
            if self.stopping.is_some() && self.farewells.is_empty() {
                return;
            }
            if !self.sleep(mailbox) {
                (self.config.notices)(Notice::Broken("waiting for datagrams failed".into()));
                return;
            }
        }
    }

    /// One round: everything that is there now, then everything that is due.
    fn turn(&mut self, mailbox: &Receiver<Command>, buffer: &mut [u8]) {
        mailbox.rest();
        while let Some(command) = mailbox.try_recv() {
            self.command(Instant::now(), command);
            self.settle(Instant::now());
        }
        for _ in 0..BATCH {
            let Some((length, source)) = self.config.socket.receive(buffer) else { break };
            let now = Instant::now();
            if let Some(active) = &mut self.active {
                active.peer.handle_datagram(now, source, self.config.socket.bound(), &buffer[..length]);
                self.settle(now);
            }
        }
        self.due(Instant::now());
        self.settle(Instant::now());
    }

    /// Sleeps until there is something to do; `false` if that is impossible.
    fn sleep(&self, mailbox: &Receiver<Command>) -> bool {
        let now = Instant::now();
        let timeout = self.deadline().map(|deadline| {
            let pause = deadline.saturating_duration_since(now);
            Timespec { tv_sec: pause.as_secs() as i64, tv_nsec: i64::from(pause.subsec_nanos()) }
        });
        let socket = self.config.socket.descriptor();
        let wake = mailbox.descriptor();
        let mut wanted =
            [PollFd::from_borrowed_fd(socket, PollFlags::IN), PollFd::from_borrowed_fd(wake, PollFlags::IN)];
        match poll(&mut wanted, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => true,
            Err(errno) => {
                error!(%errno, "poll failed in the media loop");
                false
            }
        }
    }

    fn deadline(&self) -> Option<Instant> {
        let active = self.active.as_ref();
        [
            self.core.deadline(),
            active.map(|active| active.deadline),
            active.and_then(|active| active.keys.deadline()),
            active.and_then(|active| active.nudges.front().copied()),
            active.and_then(|active| active.stats_at),
            active.filter(|active| active.held).map(|_| Instant::now() + FULL_CHECK),
            self.farewells.iter().map(|farewell| farewell.at).min(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    fn due(&mut self, now: Instant) {
        if self.core.deadline().is_some_and(|deadline| deadline <= now) {
            self.inputs.push_back(Input::Tick);
        }
        let socket = &self.config.socket;
        self.farewells.retain(|farewell| {
            let due = farewell.at <= now;
            if due {
                socket.send(farewell.destination, &farewell.data);
            }
            !due
        });
        let Some(active) = &mut self.active else { return };
        if active.deadline <= now {
            active.peer.handle_timeout(now);
        }
        let nudged = active.nudges.front().is_some_and(|at| *at <= now);
        if nudged {
            active.nudges.pop_front();
        }
        if active.keys.due(now) || (nudged && active.keys.ask(now)) {
            self.config.video.key();
        }
        if active.held {
            active.held = active.peer.backlog().age > FULL;
            self.config.video.hold(active.held);
        }
        if active.stats_at.is_some_and(|at| at <= now) {
            active.report(now, &self.config.video);
        }
    }

    fn command(&mut self, now: Instant, command: Command) {
        match command {
            Command::Signal { generation, frame } => {
                self.inputs.push_back(Input::Frame { generation, frame });
            }
            Command::Encoded(encoded) => self.encoded(now, encoded),
            Command::Audio { captured, packet } => {
                let Some(active) = &mut self.active else { return };
                if !active.connected || !active.plan.speaker {
                    return;
                }
                if active.audio_at.replace(now).is_none()
                    && let Some(pace) = active.rate.set_audio(now, AUDIO_BPS)
                {
                    self.config.video.pace(pace);
                }
                active.stats_at.get_or_insert(now + STATS_EVERY);
                active.peer.write_audio(now, captured, &packet);
            }
            Command::Cursor(cursor) => {
                self.cursor = Some(cursor);
                self.tell_cursor();
            }
            Command::PointerLock(locked) => {
                self.locked = locked;
                self.tell_lock();
            }
            Command::Screen(screen) => self.core.set_screen(screen),
            Command::End { message } => self.inputs.push_back(Input::End { message }),
            Command::Stop { message, done } => {
                self.inputs.push_back(Input::End { message });
                self.stopping = Some(done);
            }
        }
    }

    fn encoded(&mut self, now: Instant, encoded: Encoded) {
        let Some(active) = &mut self.active else { return };
        match encoded {
            Encoded::Unit { generation, unit, waited, done, repeated } if generation == active.generation => {
                active.peer.write_video(now, unit.captured, &unit.data, unit.key);
                if !repeated {
                    active.seen.waited += 1;
                    active.seen.capture += waited;
                }
                active.seen.frames += 1;
                active.seen.encode += unit.took;
                active.drain(now, &self.config.socket, &mut self.inputs);
                let backlog = active.peer.backlog();
                active.seen.send += Instant::now().saturating_duration_since(done) + backlog.age;
                if backlog.age > FULL && !active.held {
                    active.held = true;
                    self.config.video.hold(true);
                }
                active.stats_at.get_or_insert(now + STATS_EVERY);
                self.drained(now);
            }
            Encoded::Opened { generation, name } if generation == active.generation => active.encoder = name,
            Encoded::Failed { generation, message } if generation == active.generation => {
                self.inputs.push_back(Input::Broken {
                    generation,
                    code: ErrorCode::Internal,
                    message: format!("step encoder: {message}"),
                });
            }
            // Of a client that has left.
            Encoded::Unit { .. } | Encoded::Opened { .. } | Encoded::Failed { .. } => {}
        }
    }

    /// Lets the peer and the core talk until both are silent.
    fn settle(&mut self, now: Instant) {
        loop {
            if let Some(active) = &mut self.active {
                active.drain(now, &self.config.socket, &mut self.inputs);
            }
            self.drained(now);
            let Some(input) = self.inputs.pop_front() else { return };
            self.core.handle(now, input);
            while let Some(output) = self.core.poll_output() {
                self.perform(now, output);
            }
        }
    }

    /// What follows from events of the peer for the other parts.
    fn drained(&mut self, now: Instant) {
        let Some(active) = &mut self.active else { return };
        for news in std::mem::take(&mut active.news) {
            let Some(active) = &mut self.active else { return };
            match news {
                News::Connected => {
                    active.connected = true;
                    if active.plan.video {
                        active.nudges = NUDGES.iter().map(|after| now + *after).collect();
                        let (min_bps, max_bps) = active.limits;
                        self.config.video.start(Order {
                            generation: active.generation,
                            fps: self.core.screen().fps,
                            min_bps,
                            max_bps,
                            pace: active.rate.pace(),
                            kind: self.config.encoder,
                        });
                        // Becoming active delivers a whole frame at once.
                        self.config.compositor.set_active(true);
                    }
                    if active.plan.speaker {
                        (self.config.listening)(true);
                    }
                }
                News::Hold(hold) => self.config.video.hold(hold),
                News::Key => self.config.video.key(),
                News::Pace(pace) => self.config.video.pace(pace),
                News::Input(input) => self.config.compositor.input(input),
                News::Release => self.config.compositor.release_all(),
                News::Layout(layout) => self.config.compositor.set_keyboard_layout(&layout),
                News::Shift(by_ms) => self.config.compositor.shift(by_ms),
                News::Greet => {
                    self.tell_cursor();
                    self.tell_lock();
                }
            }
        }
    }

    fn perform(&mut self, now: Instant, output: Output) {
        match output {
            Output::Frame { generation, frame } => {
                (self.config.notices)(Notice::Signal { generation, frame });
            }
            Output::Resize(screen) => {
                info!(width = screen.width, height = screen.height, fps = screen.fps, "display resized");
                self.config.compositor.resize(screen.width, screen.height, screen.fps);
            }
            Output::Build { generation, plan } => {
                let input = match self.build(now, generation, plan) {
                    Ok((sdp, candidates)) => Input::Built { generation, sdp, candidates },
                    Err((code, message)) => Input::Broken { generation, code, message },
                };
                self.inputs.push_back(input);
            }
            Output::Answer { generation, sdp } => {
                let Some(active) = self.active.as_mut().filter(|active| active.generation == generation)
                else {
                    return;
                };
                let input = match active.peer.answer(&sdp) {
                    Ok(()) => Input::Answered { generation },
                    Err(error) => Input::Broken {
                        generation,
                        code: ErrorCode::BadRequest,
                        message: format!("step answer: {}", reason(&error)),
                    },
                };
                self.inputs.push_back(input);
            }
            Output::Candidate { generation, line } => {
                let Some(active) = self.active.as_mut().filter(|active| active.generation == generation)
                else {
                    return;
                };
                if let Err(error) = active.peer.add_remote_candidate(&line) {
                    // Others may still work; without any the ICE limit ends this.
                    debug!(%error, generation, "a candidate of the client is not used");
                }
            }
            Output::Close { generation } => {
                if self.active.as_ref().is_some_and(|active| active.generation == generation)
                    && let Some(active) = self.active.take()
                {
                    self.say_goodbye(now, active);
                    self.release();
                }
            }
            Output::Step(step) => {
                match &step.message {
                    None => info!(
                        generation = step.generation,
                        duration_ms = step.duration_ms,
                        "connect step reached: {}",
                        step.step
                    ),
                    Some(message) => warn!(
                        generation = step.generation,
                        duration_ms = step.duration_ms,
                        "client failed: {message}"
                    ),
                }
                (self.config.notices)(Notice::Step(step));
            }
            Output::Client(client) => (self.config.notices)(Notice::Client(client)),
        }
    }

    fn build(
        &mut self,
        now: Instant,
        generation: u64,
        plan: PeerPlan,
    ) -> Result<(String, Vec<LocalCandidate>), (ErrorCode, String)> {
        let Screen { width, height, fps, .. } = self.core.screen();
        let (min_kbps, max_kbps) = encode::limits(width, height, fps);
        let limits = (u64::from(min_kbps) * 1000, u64::from(max_kbps) * 1000);
        let rate = Rate::new(limits.0, limits.1, fps, START_ESTIMATE_BPS);
        let failed = |error: PeerError| {
            let code = match plan.role {
                PeerRole::Offerer => ErrorCode::Internal,
                PeerRole::Answerer(_) => ErrorCode::BadRequest,
            };
            (code, format!("step offer: {}", reason(&error)))
        };
        let mut peer = Peer::new(
            PeerConfig {
                role: match plan.role {
                    PeerRole::Offerer => Role::Offerer,
                    PeerRole::Answerer(_) => Role::Answerer,
                },
                speaker: plan.speaker,
                microphone: plan.microphone,
                video: plan.video,
                camera: plan.camera,
                // The only codec an encoder exists for; what the client would prefer changes nothing yet.
                codecs: vec![VideoCodec::H264],
                h264_level_idc: encode::level_idc(width, height, fps),
                channels: plan.channels.clone(),
                local: self.config.socket.advertised().to_vec(),
                start_bitrate_bps: START_ESTIMATE_BPS,
                min_bitrate_bps: limits.0,
                max_bitrate_bps: (limits.1 as f64 * HEADROOM) as u64,
                wall_clock: Some(SystemTime::now()),
            },
            now,
        )
        .map_err(failed)?;
        let sdp = match &plan.role {
            PeerRole::Offerer => peer.offer(),
            PeerRole::Answerer(sdp) => peer.accept_offer(sdp),
        }
        .map_err(failed)?;
        let candidates = peer
            .local_candidates()
            .into_iter()
            .map(|candidate| LocalCandidate {
                line: candidate.candidate,
                mid: candidate.mid,
                index: candidate.index,
            })
            .collect();
        self.active = Some(Active {
            generation,
            peer,
            plan,
            // The compositor rounds up like this too.
            translator: Translator::new(now, width.max(16), height.max(16)),
            rate,
            limits,
            keys: KeyLimit::default(),
            phase: Phase::default(),
            nudges: VecDeque::new(),
            deadline: now,
            connected: false,
            held: false,
            fanlight: false,
            audio_at: None,
            encoder: String::new(),
            seen: Means::default(),
            stats_at: None,
            last: VecDeque::new(),
            news: Vec::new(),
        });
        Ok((sdp, candidates))
    }

    fn say_goodbye(&mut self, now: Instant, mut active: Active) {
        if active.translator.ignored() > 0 {
            debug!(
                generation = active.generation,
                messages = active.translator.ignored(),
                "control messages were set aside"
            );
        }
        active.last.clear();
        active.peer.close(now);
        let mut ignored = VecDeque::new();
        active.drain(now, &self.config.socket, &mut ignored);
        if active.connected {
            self.farewells.extend(active.last.into_iter().map(|(destination, data)| Farewell {
                at: now + FAREWELL_AGAIN,
                destination,
                data,
            }));
        }
    }

    /// Nobody is there: nothing stays held down, nothing is drawn, encoded or recorded.
    fn release(&mut self) {
        self.config.compositor.release_all();
        self.config.compositor.set_active(false);
        self.config.video.stop();
        (self.config.listening)(false);
    }

    fn tell_cursor(&mut self) {
        let (Some(active), Some(cursor)) = (&mut self.active, &self.cursor) else { return };
        if !active.fanlight {
            return;
        }
        let notice = match cursor {
            Cursor::Hidden => CursorNotice::Hidden,
            Cursor::Named(name) => CursorNotice::Named { name: (*name).to_owned() },
            Cursor::Image(image) if image.rgba.len() * 4 / 3 > MAX_CURSOR_BYTES => {
                CursorNotice::Named { name: "default".into() }
            }
            Cursor::Image(image) => CursorNotice::Image {
                rgba_base64: STANDARD.encode(&image.rgba),
                width: image.width,
                height: image.height,
                hot_x: image.hotspot_x as i32,
                hot_y: image.hotspot_y as i32,
            },
        };
        active.tell(&FanlightNotice::Cursor(notice));
    }

    fn tell_lock(&mut self) {
        let locked = self.locked;
        if let Some(active) = &mut self.active
            && active.fanlight
        {
            active.tell(&FanlightNotice::PointerLock { locked });
        }
    }
}

/// What a client is told. A parser's own words about a description go no further than our log: they have line
/// breaks and addresses of our memory in them.
fn reason(error: &PeerError) -> String {
    match error {
        PeerError::BadSdp { what, reason } => {
            debug!(reason = reason.replace('\n', " "), "{what} is unusable");
            format!("{what} is no session description that can be used")
        }
        other => other.to_string(),
    }
}

impl Active {
    /// Takes everything the peer has to give.
    fn drain(&mut self, now: Instant, socket: &MediaSocket, inputs: &mut VecDeque<Input>) {
        loop {
            match self.peer.poll() {
                PeerOutput::Transmit { destination, data, .. } => {
                    socket.send(destination, &data);
                    if self.last.len() == FAREWELL_DATAGRAMS {
                        self.last.pop_front();
                    }
                    self.last.push_back((destination, data));
                }
                PeerOutput::Event(event) => self.event(now, event, inputs),
                PeerOutput::Timeout(deadline) => {
                    self.deadline = deadline;
                    return;
                }
            }
        }
    }

    fn event(&mut self, now: Instant, event: Event, inputs: &mut VecDeque<Input>) {
        let generation = self.generation;
        let mut tell = |event| inputs.push_back(Input::Peer { generation, event });
        match event {
            Event::Connected => {
                self.news.push(News::Connected);
                tell(PeerEvent::Connected);
            }
            Event::Ice(IceState::Checking) => {}
            Event::Ice(IceState::Connected) => {
                if self.connected {
                    self.news.push(News::Hold(false));
                    self.news.push(News::Key);
                }
                tell(PeerEvent::IceConnected);
            }
            Event::Ice(IceState::Disconnected) => {
                // What is pressed while nobody can let go stays pressed for the length of the gap.
                self.news.push(News::Release);
                self.news.push(News::Hold(true));
                tell(PeerEvent::Interrupted);
            }
            Event::KeyframeRequested => {
                // It knows how to ask.
                self.nudges.clear();
                if self.keys.ask(now) {
                    self.news.push(News::Key);
                }
            }
            Event::BitrateEstimate(bps) => {
                if let Some(pace) = self.rate.set_estimate(now, bps) {
                    self.news.push(News::Pace(pace));
                }
            }
            Event::ChannelOpen { label } => {
                debug!(generation, channel = label, "data channel opened");
                if label == FANLIGHT_CHANNEL {
                    self.fanlight = true;
                    self.news.push(News::Greet);
                }
            }
            Event::Channel { label, data, .. } => match label.as_str() {
                CONTROL_CHANNEL => match self.translator.translate(now, &String::from_utf8_lossy(&data)) {
                    Asked::Input(input) => self.news.extend(input.into_iter().map(News::Input)),
                    Asked::Disconnect => tell(PeerEvent::Left),
                },
                FANLIGHT_CHANNEL => match serde_json::from_slice(&data) {
                    Ok(FanlightRequest::FirstFrame { .. }) => {
                        self.nudges.clear();
                        tell(PeerEvent::FirstFrame);
                    }
                    Ok(FanlightRequest::Shown { low_ms, mid_ms, high_ms, .. }) => {
                        let interval = self.rate.pace().interval;
                        if let Some(by_ms) = self.phase.shown(now, [low_ms, mid_ms, high_ms], interval) {
                            debug!(generation, by_ms, low_ms, high_ms, "frames move to the client's refresh");
                            self.news.push(News::Shift(by_ms));
                        }
                    }
                    Ok(FanlightRequest::Layout { layout }) => {
                        if is_layout_name(&layout) {
                            self.news.push(News::Layout(layout));
                        }
                    }
                    Ok(FanlightRequest::Ping { t }) => {
                        let host_ms = now.elapsed().as_secs_f64() * 1e3;
                        self.tell(&FanlightNotice::Pong { t, host_ms });
                    }
                    Err(_) => debug!(generation, "a message on our own channel is not understood"),
                },
                // No reader exists in the instance for channels of the page.
                _ => {}
            },
            Event::ChannelClosed { label } => match label.as_str() {
                CONTROL_CHANNEL => self.news.push(News::Release),
                FANLIGHT_CHANNEL => self.fanlight = false,
                _ => {}
            },
            Event::Codec(codec) => debug!(generation, codec = codec.name(), "video codec agreed"),
            Event::NoCommonCodec { kind: MediaKind::Video } => {
                let reason = "the client decodes none of our video codecs (H264)".into();
                tell(PeerEvent::NoCommonCodec(reason));
            }
            Event::NoCommonCodec { kind: MediaKind::Audio } => {
                warn!(generation, "the client takes no sound; the stream goes on without");
            }
            Event::Stats => {
                if self.peer.stats().video_acknowledged {
                    tell(PeerEvent::FirstFrame);
                }
            }
            // Nothing in the instance listens or watches yet.
            Event::RemoteAudio { .. } | Event::RemoteVideo { .. } => {}
            Event::Disconnected => tell(PeerEvent::Left),
            Event::Failed { reason } => tell(PeerEvent::Failed(reason)),
        }
    }

    /// Sends on our own channel, if the client has it.
    fn tell(&mut self, notice: &FanlightNotice) {
        if let Err(error) = self.peer.send_channel(FANLIGHT_CHANNEL, notice.to_text().as_bytes(), false) {
            debug!(%error, generation = self.generation, "a message to the client is lost");
        }
    }

    /// Once a second while anything flows.
    fn report(&mut self, now: Instant, video: &Video) {
        let seen = std::mem::take(&mut self.seen);
        self.stats_at = (seen.frames > 0).then_some(now + STATS_EVERY);
        if self.audio_at.is_some_and(|at| now.saturating_duration_since(at) > STATS_EVERY) {
            self.audio_at = None;
            if let Some(pace) = self.rate.set_audio(now, 0) {
                video.pace(pace);
            }
        }
        if self.audio_at.is_some() {
            self.stats_at.get_or_insert(now + STATS_EVERY);
        }
        if seen.frames == 0 || !self.fanlight {
            return;
        }
        self.tell(&FanlightNotice::HostStats {
            capture_ms: Means::mean_ms(seen.capture, seen.waited),
            encode_ms: Means::mean_ms(seen.encode, seen.frames),
            send_ms: Means::mean_ms(seen.send, seen.frames),
            bitrate_kbps: self.rate.pace().bitrate_bps / 1000,
            estimate_kbps: self.rate.estimate_bps() / 1000,
            fps: seen.frames,
            encoder: self.encoder.clone(),
        });
    }
}
