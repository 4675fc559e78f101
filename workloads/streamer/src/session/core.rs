//! Signalling with clients, one state machine per generation (signaling sections 5, 8, 10 and 12).
//!
//! Take-over: the newest generation gets the stream when it asks for it (`settings` of version 2, `offer` of
//! older versions), not when it opens a socket, so that a join that never goes on hurts nobody. The closing of
//! a client's socket is not the end of its stream; clients of the original close it as soon as ICE is up.
//!
//! Whoever leaves the machine early is told why with an `error` message before its socket is closed, because
//! those clients do not notice a closed socket.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use base64::{
    Engine as _, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig, general_purpose::STANDARD},
};
use fanlight_api::{
    agent_link::{ClientState, ClientStatus, FunnelStep},
    gateway::{Screen, ScreenPatch},
    link::Frame,
    signal::{API_VERSION, Candidate, ClientMessage, ErrorCode, InstanceMessage, Settings},
};

/// How long a client with an open socket may take to ask for the stream (signaling section 8).
const ASK_LIMIT: Duration = Duration::from_secs(300);
/// How long a client may take to answer our offer (signaling section 8).
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// How long ICE and DTLS may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(30);
/// How long a connected client may be cut off (signaling F11).
const GAP_LIMIT: Duration = Duration::from_secs(30);
/// Most clients that are kept at a time; more than two means that somebody hammers.
const MAX_CLIENTS: usize = 4;
/// Most labels besides `control` (stream-protocol section 11).
const MAX_CHANNELS: usize = 5;
/// Longest label of a data channel, bytes.
const MAX_LABEL_BYTES: usize = 128;

/// Browsers pad, some older clients do not.
const LENIENT: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// What happened.
#[derive(Clone, Debug)]
pub enum Input {
    /// A frame of signalling, in order.
    Frame {
        /// Whose.
        generation: u64,
        /// The frame.
        frame: Frame,
    },
    /// The peer asked for by [`Output::Build`] is there.
    Built {
        /// For whom.
        generation: u64,
        /// Our offer or answer.
        sdp: String,
        /// Where we can be reached.
        candidates: Vec<LocalCandidate>,
    },
    /// Something the core asked for did not work; the peer, if any, is useless.
    Broken {
        /// For whom.
        generation: u64,
        /// For the client.
        code: ErrorCode,
        /// Which step and why.
        message: String,
    },
    /// The client's answer was understood.
    Answered {
        /// Whose.
        generation: u64,
    },
    /// Something happened to a peer.
    Peer {
        /// Whose.
        generation: u64,
        /// What.
        event: PeerEvent,
    },
    /// The session has ended: everybody out.
    End {
        /// For the client.
        message: String,
    },
    /// The deadline passed.
    Tick,
}

/// What happens to a peer after it was built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerEvent {
    /// A path was found.
    IceConnected,
    /// ICE and DTLS are up.
    Connected,
    /// The path is silent; it may come back.
    Interrupted,
    /// The client decoded a frame.
    FirstFrame,
    /// The client left in good order.
    Left,
    /// The connection is beyond repair.
    Failed(String),
    /// The client decodes none of our codecs.
    NoCommonCodec(String),
}

/// One of our candidates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalCandidate {
    /// The line that begins `candidate:`.
    pub line: String,
    /// Media section.
    pub mid: String,
    /// Its index.
    pub index: u32,
}

/// How to build a peer.
#[derive(Clone, Debug, PartialEq)]
pub struct PeerPlan {
    /// Who describes first.
    pub role: PeerRole,
    /// The client wants sound.
    pub speaker: bool,
    /// The client sends sound.
    pub microphone: bool,
    /// The client wants the picture.
    pub video: bool,
    /// The client sends a picture.
    pub camera: bool,
    /// The client's wishes, as it spelled them.
    pub codecs: Vec<String>,
    /// Labels besides `control`.
    pub channels: Vec<String>,
}

/// Who describes first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerRole {
    /// We do.
    Offerer,
    /// The client did, with this SDP.
    Answerer(String),
}

/// What is to be done, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// Send to the client's socket.
    Frame {
        /// Whose.
        generation: u64,
        /// The frame.
        frame: Frame,
    },
    /// Give the display this size before the next [`Output::Build`].
    Resize(Screen),
    /// Make a peer and answer with [`Input::Built`] or [`Input::Broken`].
    Build {
        /// For whom.
        generation: u64,
        /// How.
        plan: PeerPlan,
    },
    /// Give the client's answer to its peer; answer with [`Input::Answered`] or [`Input::Broken`].
    Answer {
        /// Whose.
        generation: u64,
        /// SDP.
        sdp: String,
    },
    /// Give the peer a candidate of the client.
    Candidate {
        /// Whose.
        generation: u64,
        /// The line that begins `candidate:`.
        line: String,
    },
    /// End this peer so that its client sees it at once, and let go of everything it held down.
    Close {
        /// Whose.
        generation: u64,
    },
    /// A step of the connect funnel was reached or failed.
    Step(FunnelStep),
    /// The client that has the stream, or is getting it, changed.
    Client(Option<ClientStatus>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Has not asked for the stream.
    Waiting,
    /// A peer is being built.
    Building,
    /// Has our offer.
    Offered,
    /// Descriptions are exchanged, ICE or DTLS is going on.
    Connecting,
    /// Media flows.
    Connected,
    /// Media flowed and may again.
    Interrupted,
}

#[derive(Debug)]
struct Client {
    opened: Instant,
    patch: Option<ScreenPatch>,
    stage: Stage,
    deadline: Option<Instant>,
    socket_open: bool,
    discovered: bool,
    settings: Option<Settings>,
    /// It offered, we answer.
    answers: bool,
    was_connected: bool,
    decoded: bool,
    /// Candidates that came before a peer was there to take them.
    early: Vec<String>,
}

/// Signalling with all clients of one streamer.
#[derive(Debug)]
pub struct Core {
    screen: Screen,
    clients: BTreeMap<u64, Client>,
    /// Owns the peer.
    current: Option<u64>,
    outputs: VecDeque<Output>,
    reported: Option<ClientStatus>,
}

impl Core {
    /// Nobody is there yet; the display has the size `screen`.
    pub fn new(screen: Screen) -> Self {
        Self { screen, clients: BTreeMap::new(), current: None, outputs: VecDeque::new(), reported: None }
    }

    /// The size the display has now.
    pub fn screen(&self) -> Screen {
        self.screen
    }

    /// The display has another size, which nobody has seen yet.
    pub fn set_screen(&mut self, screen: Screen) {
        self.screen = screen;
    }

    /// The next thing to do; drain after every [`Core::handle`].
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When to come with [`Input::Tick`].
    pub fn deadline(&self) -> Option<Instant> {
        self.clients.values().filter_map(|client| client.deadline).min()
    }

    /// Takes one change.
    pub fn handle(&mut self, now: Instant, input: Input) {
        match input {
            Input::Frame { generation, frame } => self.frame(now, generation, frame),
            Input::Built { generation, sdp, candidates } => self.built(now, generation, &sdp, candidates),
            Input::Broken { generation, code, message } => self.fail(now, generation, code, message),
            Input::Answered { generation } => {
                if let Some(client) = self.clients.get_mut(&generation)
                    && client.stage == Stage::Offered
                {
                    client.stage = Stage::Connecting;
                    client.deadline = Some(now + CONNECT_LIMIT);
                    self.step(now, generation, "signalled", None);
                }
            }
            Input::Peer { generation, event } => self.peer(now, generation, event),
            Input::End { message } => {
                for generation in self.clients.keys().copied().collect::<Vec<_>>() {
                    self.dismiss(generation, Some((ErrorCode::SessionEnded, message.clone())));
                }
            }
            Input::Tick => self.tick(now),
        }
        let status = self.current.and_then(|generation| {
            let client = self.clients.get(&generation)?;
            let state = match client.stage {
                Stage::Waiting | Stage::Building | Stage::Offered | Stage::Connecting => {
                    ClientState::Signalling
                }
                Stage::Connected | Stage::Interrupted if client.decoded => ClientState::Streaming,
                Stage::Connected | Stage::Interrupted => ClientState::Connected,
            };
            Some(ClientStatus { generation, state })
        });
        if status != self.reported {
            self.reported = status.clone();
            self.outputs.push_back(Output::Client(status));
        }
    }

    fn frame(&mut self, now: Instant, generation: u64, frame: Frame) {
        match frame {
            Frame::Open { screen, .. } => self.open(now, generation, screen),
            Frame::Text { text } => match serde_json::from_str(&text) {
                Ok(message) => self.message(now, generation, message),
                Err(error) => {
                    let message = format!("signalling message not understood: {error}");
                    self.tell_error(generation, ErrorCode::BadRequest, message);
                }
            },
            Frame::Closed => self.socket_closed(now, generation),
        }
    }

    fn open(&mut self, now: Instant, generation: u64, patch: Option<ScreenPatch>) {
        if self.clients.contains_key(&generation) {
            return;
        }
        while self.clients.len() >= MAX_CLIENTS {
            let oldest = self.clients.keys().copied().find(|known| Some(*known) != self.current);
            let Some(oldest) = oldest else { break };
            self.dismiss(oldest, Some((ErrorCode::Replaced, "a newer client has joined".into())));
        }
        self.clients.insert(
            generation,
            Client {
                opened: now,
                patch,
                stage: Stage::Waiting,
                deadline: Some(now + ASK_LIMIT),
                socket_open: true,
                discovered: false,
                settings: None,
                answers: false,
                was_connected: false,
                decoded: false,
                early: Vec::new(),
            },
        );
    }

    fn message(&mut self, now: Instant, generation: u64, message: ClientMessage) {
        let Some(client) = self.clients.get_mut(&generation) else { return };
        match message {
            ClientMessage::Discover => {
                // A client answers every `resp:discover` with `settings`, so it gets one.
                if std::mem::replace(&mut client.discovered, true) {
                    return;
                }
                let screen = match &client.patch {
                    Some(patch) => patch.apply(self.screen).unwrap_or(self.screen),
                    None => self.screen,
                };
                self.tell(
                    generation,
                    &InstanceMessage::Discovered {
                        max_api_version: API_VERSION,
                        fps: screen.fps,
                        capabilities: Vec::new(),
                    },
                );
            }
            ClientMessage::Settings(settings) => {
                if client.stage != Stage::Waiting {
                    return;
                }
                match settings.api_version {
                    Some(API_VERSION) => self.take_over(now, generation, PeerRole::Offerer, settings),
                    // Older clients go on with their own offer.
                    None | Some(0 | 1) => client.settings = Some(settings),
                    Some(version) => {
                        let message =
                            format!("signalling version {version} is not spoken: at most {API_VERSION} is");
                        self.fail(now, generation, ErrorCode::UnsupportedVersion, message);
                    }
                }
            }
            ClientMessage::Offer { sdp, data_channels } => {
                if client.stage != Stage::Waiting {
                    let message = "an offer came although offer and answer are already being exchanged";
                    self.tell_error(generation, ErrorCode::BadRequest, message.into());
                    return;
                }
                let known = client.settings.take().unwrap_or_default();
                match decode(&sdp) {
                    Ok(sdp) => {
                        // What an older client wants is in its offer.
                        let settings = Settings {
                            data_channels,
                            enable_speaker: receives(&sdp, "audio"),
                            enable_microphone: true,
                            enable_video: receives(&sdp, "video"),
                            enable_camera: true,
                            ..known
                        };
                        self.take_over(now, generation, PeerRole::Answerer(sdp), settings);
                    }
                    Err(error) => {
                        let message = format!("step offer: the client's description is unusable: {error}");
                        self.fail(now, generation, ErrorCode::BadRequest, message);
                    }
                }
            }
            ClientMessage::Answer { sdp } => {
                if client.stage != Stage::Offered {
                    let message = "an answer came although no offer waits for one";
                    self.tell_error(generation, ErrorCode::BadRequest, message.into());
                    return;
                }
                match decode(&sdp) {
                    Ok(sdp) => self.outputs.push_back(Output::Answer { generation, sdp }),
                    Err(error) => {
                        let message = format!("step answer: the client's description is unusable: {error}");
                        self.fail(now, generation, ErrorCode::BadRequest, message);
                    }
                }
            }
            ClientMessage::Candidate(candidate) => match decode(&candidate.candidate) {
                Ok(line) if matches!(client.stage, Stage::Waiting | Stage::Building) => {
                    // A peer takes no more than this either.
                    if client.early.len() < 100 {
                        client.early.push(line);
                    }
                }
                Ok(line) => self.outputs.push_back(Output::Candidate { generation, line }),
                // Others may still work, and the SDK takes every error for the end (signaling.md section 5).
                Err(error) => tracing::debug!(generation, %error, "a candidate of the client is not used"),
            },
        }
    }

    /// Gives the stream to `generation`, unless a newer client has it.
    fn take_over(&mut self, now: Instant, generation: u64, role: PeerRole, settings: Settings) {
        if self.current.is_some_and(|current| current > generation) {
            self.dismiss(generation, Some((ErrorCode::Replaced, "a newer client has the stream".into())));
            return;
        }
        let Some(client) = self.clients.get_mut(&generation) else { return };
        let screen = match client.patch.take().map(|patch| patch.apply(self.screen)).transpose() {
            Ok(screen) => screen.unwrap_or(self.screen),
            Err(error) => {
                self.fail(now, generation, ErrorCode::BadRequest, format!("step display: {error}"));
                return;
            }
        };
        if let Some(older) = self.current.filter(|current| *current != generation) {
            self.dismiss(older, Some((ErrorCode::Replaced, "another client took over the stream".into())));
        }
        if screen != self.screen {
            self.screen = screen;
            self.outputs.push_back(Output::Resize(screen));
        }
        let Some(client) = self.clients.get_mut(&generation) else { return };
        client.stage = Stage::Building;
        client.answers = matches!(role, PeerRole::Answerer(_));
        // Building is immediate; the limit only guards against an answer that got lost inside.
        client.deadline = Some(now + ANSWER_LIMIT);
        self.current = Some(generation);
        let mut channels: Vec<String> = Vec::new();
        for label in settings.data_channels {
            let usable = !label.is_empty() && label.len() <= MAX_LABEL_BYTES && !channels.contains(&label);
            if usable && channels.len() < MAX_CHANNELS {
                channels.push(label);
            }
        }
        let plan = PeerPlan {
            role,
            speaker: settings.enable_speaker,
            microphone: settings.enable_microphone,
            video: settings.enable_video,
            camera: settings.enable_camera,
            codecs: settings.video.preferred_decoder_codecs,
            channels,
        };
        self.outputs.push_back(Output::Build { generation, plan });
    }

    fn built(&mut self, now: Instant, generation: u64, sdp: &str, candidates: Vec<LocalCandidate>) {
        let Some(client) = self.clients.get_mut(&generation) else { return };
        if client.stage != Stage::Building {
            return;
        }
        let early = std::mem::take(&mut client.early);
        for line in early {
            self.outputs.push_back(Output::Candidate { generation, line });
        }
        self.describe(now, generation, sdp);
        for candidate in candidates {
            self.tell(
                generation,
                &InstanceMessage::Candidate(Candidate {
                    candidate: STANDARD.encode(candidate.line),
                    sdp_mid: Some(candidate.mid),
                    sdp_m_line_index: Some(candidate.index),
                }),
            );
        }
    }

    fn describe(&mut self, now: Instant, generation: u64, sdp: &str) {
        let sdp = STANDARD.encode(sdp);
        let Some(client) = self.clients.get_mut(&generation) else { return };
        let message = if client.answers {
            client.stage = Stage::Connecting;
            client.deadline = Some(now + CONNECT_LIMIT);
            InstanceMessage::Answer { sdp }
        } else {
            client.stage = Stage::Offered;
            client.deadline = Some(now + ANSWER_LIMIT);
            InstanceMessage::Offer { sdp }
        };
        let answered = client.stage == Stage::Connecting;
        self.tell(generation, &message);
        if answered {
            self.step(now, generation, "signalled", None);
        }
    }

    fn peer(&mut self, now: Instant, generation: u64, event: PeerEvent) {
        let Some(client) = self.clients.get_mut(&generation) else { return };
        match event {
            PeerEvent::IceConnected => {
                // The same news comes again when a gap ends.
                if client.stage == Stage::Interrupted {
                    client.stage = Stage::Connected;
                    client.deadline = None;
                } else if !client.was_connected {
                    self.step(now, generation, "ice", None);
                }
            }
            PeerEvent::Connected => {
                let first = !std::mem::replace(&mut client.was_connected, true);
                client.stage = Stage::Connected;
                client.deadline = None;
                if first {
                    self.step(now, generation, "dtls", None);
                }
            }
            PeerEvent::Interrupted => {
                if client.stage == Stage::Connected {
                    client.stage = Stage::Interrupted;
                    client.deadline = Some(now + GAP_LIMIT);
                }
            }
            PeerEvent::FirstFrame => {
                if !std::mem::replace(&mut client.decoded, true) {
                    self.step(now, generation, "first-frame", None);
                }
            }
            PeerEvent::Left => self.dismiss(generation, None),
            PeerEvent::Failed(reason) => {
                let step = step_of(client.stage);
                self.fail(now, generation, ErrorCode::Internal, format!("step {step}: {reason}"));
            }
            PeerEvent::NoCommonCodec(reason) => {
                self.fail(now, generation, ErrorCode::NoCommonCodec, format!("step answer: {reason}"));
            }
        }
    }

    fn socket_closed(&mut self, now: Instant, generation: u64) {
        let Some(client) = self.clients.get_mut(&generation) else { return };
        client.socket_open = false;
        match client.stage {
            // Nothing more can come from this client.
            Stage::Waiting => self.dismiss(generation, None),
            Stage::Building | Stage::Offered => {
                let message = "step answer: the client closed its socket before it answered";
                self.fail(now, generation, ErrorCode::Internal, message.into());
            }
            Stage::Connecting | Stage::Connected | Stage::Interrupted => {}
        }
    }

    fn tick(&mut self, now: Instant) {
        let due = |client: &Client| client.deadline.is_some_and(|deadline| deadline <= now);
        let late: Vec<(u64, Stage)> = self
            .clients
            .iter()
            .filter(|(_, client)| due(client))
            .map(|(generation, client)| (*generation, client.stage))
            .collect();
        for (generation, stage) in late {
            let message = match stage {
                Stage::Waiting => "step settings: the client did not ask for the stream within 5 minutes",
                Stage::Building | Stage::Offered => {
                    "step answer: the client did not answer our offer within 60 s"
                }
                Stage::Connecting => {
                    "step ICE: no connection within 30 s; is the UDP port of the instance reachable from the client?"
                }
                Stage::Connected | Stage::Interrupted => {
                    "step connected: nothing was heard from the client for 30 s"
                }
            };
            self.fail(now, generation, ErrorCode::InstanceNotReachable, message.into());
        }
    }

    /// Ends a client because something went wrong.
    fn fail(&mut self, now: Instant, generation: u64, code: ErrorCode, message: String) {
        if self.clients.contains_key(&generation) {
            self.step(now, generation, "failed", Some(message.clone()));
            self.dismiss(generation, Some((code, message)));
        }
    }

    /// Ends a client; its peer, if it has one, too.
    fn dismiss(&mut self, generation: u64, reason: Option<(ErrorCode, String)>) {
        if self.current == Some(generation) {
            self.current = None;
            self.outputs.push_back(Output::Close { generation });
        }
        let open = self.clients.get(&generation).is_some_and(|client| client.socket_open);
        if open {
            if let Some((code, message)) = reason {
                self.tell_error(generation, code, message);
            }
            self.outputs.push_back(Output::Frame { generation, frame: Frame::Closed });
        }
        self.clients.remove(&generation);
    }

    fn tell(&mut self, generation: u64, message: &InstanceMessage) {
        if self.clients.get(&generation).is_some_and(|client| client.socket_open) {
            let frame = Frame::Text { text: message.to_text() };
            self.outputs.push_back(Output::Frame { generation, frame });
        }
    }

    fn tell_error(&mut self, generation: u64, code: ErrorCode, message: String) {
        self.tell(generation, &InstanceMessage::error(code, message));
    }

    fn step(&mut self, now: Instant, generation: u64, step: &str, message: Option<String>) {
        let Some(client) = self.clients.get(&generation) else { return };
        let duration_ms = now.saturating_duration_since(client.opened).as_millis() as u64;
        self.outputs.push_back(Output::Step(FunnelStep {
            generation,
            step: step.into(),
            duration_ms,
            message,
        }));
    }
}

fn step_of(stage: Stage) -> &'static str {
    match stage {
        Stage::Waiting => "settings",
        Stage::Building => "offer",
        Stage::Offered => "answer",
        Stage::Connecting => "ICE",
        Stage::Connected | Stage::Interrupted => "connected",
    }
}

/// Whether the offer `sdp` has a section of this kind in which its client receives. A section without a direction
/// goes both ways (RFC 8866 section 6.7).
fn receives(sdp: &str, kind: &str) -> bool {
    sdp.split("\nm=").skip(1).any(|section| {
        let mut lines = section.lines().map(str::trim_end);
        let named = lines.next().and_then(|line| line.split(' ').next()) == Some(kind);
        named && !lines.any(|line| matches!(line, "a=inactive" | "a=sendonly"))
    })
}

/// Text from standard base64 with or without padding.
fn decode(base64: &str) -> Result<String, String> {
    let bytes = LENIENT.decode(base64.trim()).map_err(|error| format!("not base64: {error}"))?;
    String::from_utf8(bytes).map_err(|_| "not text".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bench {
        core: Core,
        now: Instant,
    }

    impl Bench {
        fn new() -> Self {
            Self { core: Core::new(Screen::default()), now: Instant::now() }
        }

        fn handle(&mut self, input: Input) -> Vec<Output> {
            self.core.handle(self.now, input);
            std::iter::from_fn(|| self.core.poll_output()).collect()
        }

        fn open(&mut self, generation: u64) {
            let frame = Frame::Open { screen: None, stun_servers: Vec::new() };
            assert!(self.handle(Input::Frame { generation, frame }).is_empty());
        }

        fn text(&mut self, generation: u64, text: &str) -> Vec<Output> {
            self.handle(Input::Frame { generation, frame: Frame::Text { text: text.into() } })
        }

        fn later(&mut self, by: Duration) -> Vec<Output> {
            self.now += by;
            self.handle(Input::Tick)
        }

        fn offered(&mut self, generation: u64) {
            self.open(generation);
            self.text(generation, r#"{"type":"discover"}"#);
            let outputs = self.text(generation, SETTINGS);
            assert!(outputs.iter().any(|output| matches!(output, Output::Build { .. })), "{outputs:?}");
            self.handle(Input::Built { generation, sdp: "v=0".into(), candidates: vec![] });
        }

        fn connected(&mut self, generation: u64) {
            self.offered(generation);
            self.text(generation, r#"{"type":"answer","sdp":"dj0w"}"#);
            self.handle(Input::Answered { generation });
            self.peer(generation, PeerEvent::IceConnected);
            self.peer(generation, PeerEvent::Connected);
        }

        fn peer(&mut self, generation: u64, event: PeerEvent) -> Vec<Output> {
            self.handle(Input::Peer { generation, event })
        }
    }

    const SETTINGS: &str = r#"{"type":"settings","api_version":2,"data_channels":["a","a","","b","c","d","e","f"],
        "enable_speaker":true,"enable_video":true}"#;

    fn errors(outputs: &[Output]) -> Vec<(u64, u32)> {
        let error = |output: &Output| match output {
            Output::Frame { generation, frame: Frame::Text { text } } => {
                let value: serde_json::Value = serde_json::from_str(text).expect("JSON");
                (value["type"] == "error")
                    .then(|| (*generation, value["code"].as_u64().expect("a code") as u32))
            }
            _ => None,
        };
        outputs.iter().filter_map(error).collect()
    }

    fn closed(outputs: &[Output], generation: u64) -> bool {
        outputs.contains(&Output::Frame { generation, frame: Frame::Closed })
    }

    fn ends_peer(outputs: &[Output], generation: u64) -> bool {
        outputs.contains(&Output::Close { generation })
    }

    #[test]
    fn a_client_of_version_2_gets_one_discovery_one_offer_and_our_candidates() {
        let mut bench = Bench::new();
        bench.open(1);
        let outputs = bench.text(1, r#"{"type":"discover"}"#);
        let text = r#"{"type":"resp:discover","max_api_version":2,"fps":60,"capabilities":[]}"#.to_owned();
        assert_eq!(outputs, [Output::Frame { generation: 1, frame: Frame::Text { text } }]);
        assert!(bench.text(1, r#"{"type":"discover"}"#).is_empty(), "once");
        let outputs = bench.text(1, SETTINGS);
        let Some(Output::Build { plan, .. }) = outputs.first() else { panic!("{outputs:?}") };
        assert_eq!(plan.channels, ["a", "b", "c", "d", "e"]);
        assert_eq!((plan.speaker, plan.microphone, plan.video), (true, false, true));
        let candidate = LocalCandidate { line: "candidate:1".into(), mid: "a".into(), index: 0 };
        let outputs =
            bench.handle(Input::Built { generation: 1, sdp: "v=0".into(), candidates: vec![candidate] });
        let texts: Vec<&str> = outputs
            .iter()
            .filter_map(|output| match output {
                Output::Frame { frame: Frame::Text { text }, .. } => Some(text.as_str()),
                _ => None,
            })
            .collect();
        assert_eq!(
            texts,
            [
                r#"{"type":"offer","sdp":"dj0w"}"#,
                r#"{"type":"candidate","candidate":"Y2FuZGlkYXRlOjE=","sdpMid":"a","sdpMLineIndex":0}"#,
            ]
        );
        assert_eq!(
            bench.text(1, r#"{"type":"answer","sdp":"dj0w"}"#),
            [Output::Answer { generation: 1, sdp: "v=0".into() }]
        );
        bench.handle(Input::Answered { generation: 1 });
        bench.peer(1, PeerEvent::IceConnected);
        // The client closes its socket now, and the stream goes on.
        assert!(bench.handle(Input::Frame { generation: 1, frame: Frame::Closed }).is_empty());
        let outputs = bench.peer(1, PeerEvent::Connected);
        assert!(matches!(
            &outputs[..],
            [
                Output::Step(FunnelStep { step, .. }),
                Output::Client(Some(ClientStatus { state: ClientState::Connected, .. }))
            ] if step == "dtls"
        ));
        let outputs = bench.peer(1, PeerEvent::FirstFrame);
        assert!(outputs.iter().any(
            |output| matches!(output, Output::Client(Some(status)) if status.state == ClientState::Streaming)
        ));
        assert_eq!(bench.core.deadline(), None);
    }

    #[test]
    fn older_clients_offer_with_or_without_what_comes_before_and_get_an_answer() {
        for before in [
            &[][..],
            &[r#"{"type":"discover"}"#, r#"{"type":"settings","api_version":1}"#][..],
            &[r#"{"type":"settings","device_type":"x"}"#][..],
        ] {
            let mut bench = Bench::new();
            bench.open(1);
            for text in before {
                bench.text(1, text);
            }
            bench.text(1, r#"{"type":"candidate","candidate":"Y2FuZGlkYXRlOjE"}"#);
            let outputs = bench.text(1, r#"{"type":"offer","sdp":"dj0w","dataChannels":["x"]}"#);
            let Some(Output::Build { plan, .. }) = outputs.first() else { panic!("{outputs:?}") };
            assert_eq!(plan.role, PeerRole::Answerer("v=0".into()));
            assert_eq!(plan.channels, ["x"]);
            let outputs = bench.handle(Input::Built { generation: 1, sdp: "v=0".into(), candidates: vec![] });
            assert_eq!(outputs[0], Output::Candidate { generation: 1, line: "candidate:1".into() });
            let text = r#"{"type":"answer","sdp":"dj0w"}"#.to_owned();
            assert_eq!(outputs[1], Output::Frame { generation: 1, frame: Frame::Text { text } });
            bench.peer(1, PeerEvent::IceConnected);
            bench.peer(1, PeerEvent::Connected);
            assert_eq!(bench.core.deadline(), None);
        }
    }

    #[test]
    fn an_older_client_gets_of_picture_and_sound_what_its_offer_receives() {
        let section = |kind: &str, direction: &str| {
            format!("m={kind} 9 UDP/TLS/RTP/SAVPF 96\r\na=mid:0\r\n{direction}")
        };
        let both = ["", "a=recvonly\r\n", "a=sendrecv\r\n"];
        let neither = ["a=inactive\r\n", "a=sendonly\r\n"];
        for (audio, speaker) in
            both.map(|line| (line, true)).into_iter().chain(neither.map(|line| (line, false)))
        {
            for (video, picture) in
                both.map(|line| (line, true)).into_iter().chain(neither.map(|line| (line, false)))
            {
                let mut bench = Bench::new();
                bench.open(1);
                // A camera has its own section, which says nothing about the picture.
                let camera = section("video", "a=sendonly\r\n");
                let sdp = format!("v=0\r\n{}{camera}{}", section("audio", audio), section("video", video));
                let offer = format!(r#"{{"type":"offer","sdp":"{}"}}"#, STANDARD.encode(sdp));
                let outputs = bench.text(1, &offer);
                let Some(Output::Build { plan, .. }) = outputs.first() else { panic!("{outputs:?}") };
                assert_eq!((plan.speaker, plan.video), (speaker, picture), "{audio:?} {video:?}");
            }
        }
    }

    #[test]
    fn the_newest_client_takes_over_when_it_asks_and_not_before() {
        let mut bench = Bench::new();
        bench.connected(1);
        bench.open(2);
        assert!(!ends_peer(&bench.text(2, r#"{"type":"discover"}"#), 1));
        let outputs = bench.text(2, SETTINGS);
        assert!(ends_peer(&outputs, 1));
        assert_eq!(errors(&outputs), [(1, ErrorCode::Replaced as u32)]);
        assert!(closed(&outputs, 1));
        let build = outputs.iter().position(|output| matches!(output, Output::Build { generation: 2, .. }));
        let close = outputs.iter().position(|output| matches!(output, Output::Close { .. }));
        assert!(close < build, "the port is free before the next peer is built");
        // An older one does not get it back.
        bench.open(0);
        let outputs = bench.text(0, SETTINGS);
        assert_eq!(errors(&outputs), [(0, ErrorCode::Replaced as u32)]);
        assert!(closed(&outputs, 0) && !ends_peer(&outputs, 2));
        // Late news of the first does nothing.
        assert!(bench.peer(1, PeerEvent::Failed("x".into())).is_empty());
    }

    #[test]
    fn the_display_follows_the_join_before_the_offer() {
        let mut bench = Bench::new();
        let patch = |width| ScreenPatch { width: Some(width), fps: Some(30), ..Default::default() };
        let frame = Frame::Open { screen: Some(patch(801)), stun_servers: vec![] };
        bench.handle(Input::Frame { generation: 1, frame });
        let outputs = bench.text(1, r#"{"type":"discover"}"#);
        assert!(
            matches!(&outputs[0], Output::Frame { frame: Frame::Text { text }, .. } if text.contains("\"fps\":30"))
        );
        let outputs = bench.text(1, SETTINGS);
        assert!(matches!(outputs[0], Output::Resize(Screen { width: 802, height: 720, fps: 30, .. })));
        assert!(matches!(outputs[1], Output::Build { .. }));
        let frame = Frame::Open { screen: Some(patch(-1)), stun_servers: vec![] };
        bench.handle(Input::Frame { generation: 2, frame });
        let outputs = bench.text(2, SETTINGS);
        assert_eq!(errors(&outputs).last(), Some(&(2, ErrorCode::BadRequest as u32)));
        assert!(closed(&outputs, 2));
        assert_eq!(bench.core.screen().width, 802);
    }

    #[test]
    fn bad_messages_get_an_error_that_names_the_step() {
        let table = [
            ("not json", 5, false),
            (r#"{"type":"dance"}"#, 5, false),
            (r#"{"sdp":"x"}"#, 5, false),
            (r#"{"type":"answer","sdp":"dj0w"}"#, 5, false),
            (r#"{"type":"settings","api_version":3}"#, 6, true),
            (r#"{"type":"offer","sdp":"%%"}"#, 5, true),
            (r#"{"type":"offer","sdp":"//79"}"#, 5, true),
        ];
        for (text, code, ends) in table {
            let mut bench = Bench::new();
            bench.open(7);
            let outputs = bench.text(7, text);
            assert_eq!(errors(&outputs), [(7, code)], "{text}");
            assert_eq!(closed(&outputs, 7), ends, "{text}");
        }
        let mut bench = Bench::new();
        bench.offered(1);
        let outputs = bench.text(1, r#"{"type":"answer","sdp":"***"}"#);
        assert_eq!(errors(&outputs), [(1, 5)]);
        assert!(ends_peer(&outputs, 1));
        assert!(bench.text(9, SETTINGS).is_empty(), "nobody opened this one");
        // The SDK takes every error for the end, and other candidates may work.
        let outputs = bench.text(1, r#"{"type":"candidate","candidate":"%%"}"#);
        assert!(outputs.is_empty(), "{outputs:?}");
    }

    #[test]
    fn clients_that_never_answer_or_vanish_are_cleaned_up() {
        let mut bench = Bench::new();
        bench.open(1);
        assert!(bench.later(Duration::from_secs(299)).is_empty());
        assert!(closed(&bench.later(Duration::from_secs(1)), 1));

        bench.offered(2);
        assert!(bench.later(Duration::from_secs(59)).is_empty());
        let outputs = bench.later(Duration::from_secs(1));
        assert!(ends_peer(&outputs, 2) && closed(&outputs, 2));
        assert_eq!(errors(&outputs).len(), 1);

        bench.offered(3);
        bench.text(3, r#"{"type":"answer","sdp":"dj0w"}"#);
        bench.handle(Input::Answered { generation: 3 });
        let outputs = bench.later(Duration::from_secs(30));
        assert!(outputs.iter().any(|output| matches!(output, Output::Step(step) if step.step == "failed"
            && step.message.as_deref().is_some_and(|message| message.contains("step ICE")))));
        assert!(outputs.contains(&Output::Client(None)));

        bench.offered(4);
        let outputs = bench.handle(Input::Frame { generation: 4, frame: Frame::Closed });
        assert!(ends_peer(&outputs, 4), "without a socket no answer can come");
        assert_eq!(bench.core.deadline(), None);
    }

    #[test]
    fn a_gap_of_less_than_30_seconds_is_survived() {
        let mut bench = Bench::new();
        bench.connected(1);
        bench.peer(1, PeerEvent::Interrupted);
        assert!(bench.later(Duration::from_secs(29)).is_empty());
        bench.peer(1, PeerEvent::IceConnected);
        assert_eq!(bench.core.deadline(), None);
        bench.peer(1, PeerEvent::Interrupted);
        assert!(ends_peer(&bench.later(Duration::from_secs(30)), 1));
    }

    #[test]
    fn leaving_and_the_end_of_the_session_close_at_once() {
        let mut bench = Bench::new();
        bench.connected(1);
        let outputs = bench.peer(1, PeerEvent::Left);
        assert!(ends_peer(&outputs, 1) && closed(&outputs, 1));
        assert!(errors(&outputs).is_empty());
        bench.connected(2);
        bench.open(3);
        let outputs = bench.handle(Input::End { message: "session deleted".into() });
        assert!(ends_peer(&outputs, 2) && closed(&outputs, 3));
        assert_eq!(errors(&outputs).len(), 2);
    }

    #[test]
    fn sockets_opened_over_and_over_do_not_pile_up() {
        let mut bench = Bench::new();
        bench.connected(1);
        for generation in 2..50 {
            bench.handle(Input::Frame {
                generation,
                frame: Frame::Open { screen: None, stun_servers: vec![] },
            });
        }
        assert_eq!(bench.core.clients.len(), MAX_CLIENTS);
        assert!(bench.core.clients.contains_key(&1), "the one that streams is kept");
    }
}
