//! The peer itself: one connection to one client, from description to goodbye.
//!
//! Around `str0m` it adds what a streamed desktop needs: the exact order and parameters of the sections, a play-out
//! delay of zero on every packet, only the agreed data channels, silence while nothing moves, limits on everything a
//! client may send, and an end that the client notices at once.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use str0m::bwe::{Bitrate, BweKind};
use str0m::change::{SdpAnswer, SdpOffer, SdpPendingOffer};
use str0m::channel::{ChannelConfig, ChannelId};
use str0m::format::{Codec, FormatParams};
use str0m::media::{Direction, Frequency, MediaKind as StrMediaKind, MediaTime, Mid, Pt};
use str0m::net::{Protocol, Receive};
use str0m::rtp::{AbsCaptureTime, Extension, ExtensionMap};
use str0m::{IceConnectionState, Input, Reason, Rtc, RtcConfig};

use crate::abort;
use crate::config::{
    CONTROL, MAX_MESSAGE_BYTES, MAX_REMOTE_CANDIDATES, MAX_SDP_BYTES, MediaKind, PeerConfig, Role, VideoCodec,
};
use crate::doubt::Doubt;

/// Video idle for this long makes the connection quiet: no padding, no probes.
///
/// Until then the 50 kbit/s of padding repeats recent packets, which repairs a lost last packet of a frame that no
/// later packet would reveal.
const QUIET_AFTER: Duration = Duration::from_secs(1);
/// Video must flow for this long after a quiet time before bandwidth is probed again, so that single updates of an
/// otherwise still screen cost no probe bursts.
const PROBE_AFTER: Duration = Duration::from_secs(1);
/// A longer gap than this between pictures is no flow.
const FLOW_GAP: Duration = Duration::from_millis(150);
/// While quiet, the congestion control's own timer (some 40 per second) is served only so often.
const QUIET_STEP: Duration = Duration::from_millis(200);
/// A connection from which nothing comes for this long counts as lost. Browsers check at least every 2.5 s and call
/// it lost after about as long.
const LOST_AFTER: Duration = Duration::from_secs(7);
/// Connectivity checks without an answer before str0m forgets a pair: more than [`RETURN_WITHIN`] takes, at 3 s each.
const CHECKS: usize = 16;
/// How long ICE may take from the remote description to a connection. Browsers give up earlier.
const CONNECT_WITHIN: Duration = Duration::from_secs(30);
/// How long a lost connection is kept for its return.
const RETURN_WITHIN: Duration = Duration::from_secs(30);
/// Interval of the statistics, and of [`Event::Stats`].
const STATS_EVERY: Duration = Duration::from_secs(1);
/// How long sent packets stay repeatable.
const RESEND_WINDOW: Duration = Duration::from_secs(1);
/// Most packets kept for repetition and pacing: a second at 10 Mbit/s.
const RESEND_PACKETS: usize = 1200;
/// Largest share of repeated packets in the sent traffic before repetition pauses.
const RESEND_SHARE: f32 = 0.5;
/// Bytes all data channels together may hold unacknowledged.
const CHANNEL_BUFFER: usize = 1024 * 1024;
/// Most channels a client may open in the life of a connection, refused ones included.
const MAX_CHANNEL_OPENINGS: usize = 100;
/// A key frame request after video paused for this long is the browser's timer, not a loss it noticed: three seconds
/// without a picture make it ask as long as packets came within the last five.
const IDLE_REQUEST_AFTER: Duration = Duration::from_secs(2);
/// How long such a request waits for a report that the client has everything.
const IDLE_REQUEST_WAITS: Duration = Duration::from_millis(1500);
/// Errors in a row from the transport after which it counts as broken.
const MAX_ERRORS: u32 = 16;
/// SCTP stream of the channel that exists only so that the offer has an application section. It is negotiated out
/// of band and never used: the client opens all real channels, with low numbers.
const PLACEHOLDER_STREAM: u16 = 1023;

/// Payload types of our own choosing; all in the dynamic range (RFC 3551 section 6).
const PT_OPUS: u8 = 111;
const PT_H264: u8 = 102;
const PT_H264_RTX: u8 = 103;
const PT_VP8: u8 = 96;
const PT_VP8_RTX: u8 = 97;
const PT_AV1: u8 = 45;
const PT_AV1_RTX: u8 = 46;

/// What went wrong with a request to the peer. The peer itself stays usable unless it says [`Event::Failed`].
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// There is no address to announce.
    #[error("no address to announce to the client")]
    NoAddress,
    /// An address that cannot be a host candidate (unspecified, multicast, port 0).
    #[error("address {address} cannot be announced: {reason}")]
    BadAddress {
        /// The address.
        address: SocketAddr,
        /// What ICE holds against it.
        reason: String,
    },
    /// The request does not fit the role or came twice.
    #[error("{what} is not possible now")]
    OutOfOrder {
        /// The request.
        what: &'static str,
    },
    /// The description is larger than [`MAX_SDP_BYTES`].
    #[error("a description of {bytes} bytes, at most {MAX_SDP_BYTES} are read")]
    SdpTooLarge {
        /// Its size.
        bytes: usize,
    },
    /// The description does not parse or does not fit ours.
    #[error("{what}: {reason}")]
    BadSdp {
        /// What was being read.
        what: &'static str,
        /// Why it was refused.
        reason: String,
    },
    /// More than [`MAX_REMOTE_CANDIDATES`].
    #[error("more than {MAX_REMOTE_CANDIDATES} candidates")]
    TooManyCandidates,
    /// The candidate line does not parse.
    #[error("candidate line of {bytes} bytes: {reason}")]
    BadCandidate {
        /// Its size; the text holds addresses of people and stays out of messages.
        bytes: usize,
        /// Why it was refused.
        reason: String,
    },
    /// No open channel has this label.
    #[error("channel {label:?} is not open")]
    ChannelNotOpen {
        /// The label.
        label: String,
    },
    /// The message is larger than [`MAX_MESSAGE_BYTES`].
    #[error("message of {bytes} bytes, at most {MAX_MESSAGE_BYTES} travel")]
    MessageTooLarge {
        /// Its size.
        bytes: usize,
    },
    /// The client takes messages more slowly than they are sent; this one was not queued.
    #[error("{bytes} bytes do not fit in the send buffer of the data channels")]
    ChannelFull {
        /// Size of the refused message.
        bytes: usize,
    },
    /// The connection is over.
    #[error("the connection has ended")]
    Ended,
    /// The transport refused; the text is its own.
    #[error("{what}: {reason}")]
    Transport {
        /// What was tried.
        what: &'static str,
        /// The refusal.
        reason: String,
    },
}

/// State of the ICE connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IceState {
    /// Looking for a working pair of addresses.
    Checking,
    /// A pair works.
    Connected,
    /// The pair stopped answering; it may come back within 30 seconds.
    Disconnected,
}

/// A local candidate in the form signalling wants it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// `candidate:…`, without `a=`.
    pub candidate: String,
    /// Media section the candidate belongs to.
    pub mid: String,
    /// Index of that section.
    pub index: u32,
}

/// What [`Peer::poll`] hands out.
#[derive(Debug)]
pub enum Output {
    /// A datagram to send now.
    Transmit {
        /// Where to.
        destination: SocketAddr,
        /// The announced address it should come from.
        source: SocketAddr,
        /// Its bytes.
        data: Vec<u8>,
    },
    /// Something happened.
    Event(Event),
    /// Nothing more to do until then, or until the next input.
    Timeout(Instant),
}

/// What happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// ICE and DTLS are up: media flows. Send a key frame.
    Connected,
    /// The ICE state changed.
    Ice(IceState),
    /// The client asked for a key frame (PLI or FIR). Not rate limited here.
    KeyframeRequested,
    /// New estimate of the bandwidth to the client, bits per second, for everything sent.
    BitrateEstimate(u64),
    /// The client opened an agreed channel.
    ChannelOpen {
        /// Its label.
        label: String,
    },
    /// A message arrived.
    Channel {
        /// Label of the channel.
        label: String,
        /// Binary rather than text. Text is not checked for UTF-8.
        binary: bool,
        /// The message.
        data: Vec<u8>,
    },
    /// A channel closed.
    ChannelClosed {
        /// Its label.
        label: String,
    },
    /// The video codec both sides agreed on.
    Codec(VideoCodec),
    /// A section that was to be sent has no codec in common with the client, or the client refused it.
    NoCommonCodec {
        /// Which.
        kind: MediaKind,
    },
    /// A packet of the client's microphone: one Opus frame.
    RemoteAudio {
        /// Media time in 48 kHz samples.
        time: u64,
        /// The frame.
        data: Vec<u8>,
    },
    /// A frame of the client's camera.
    RemoteVideo {
        /// Its codec.
        codec: VideoCodec,
        /// Media time in 90 kHz ticks.
        time: u64,
        /// The frame. H.264 is in Annex B form.
        data: Vec<u8>,
    },
    /// New statistics are ready; see [`Peer::stats`].
    Stats,
    /// The client ended the connection. Nothing follows.
    Disconnected,
    /// The connection broke or never came up. Nothing follows.
    Failed {
        /// Why, for logs and people.
        reason: String,
    },
}

/// Counters and measurements, refreshed once per second.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stats {
    /// Round trip to the client.
    pub rtt: Option<Duration>,
    /// Share of packets lost on the way to the client in the last second, 0 to 1.
    pub loss: Option<f32>,
    /// Latest bandwidth estimate, bits per second.
    pub estimate_bps: u64,
    /// Bytes sent in all, with everything below UDP's payload.
    pub bytes_sent: u64,
    /// Bytes received in all, without STUN.
    pub bytes_received: u64,
    /// Video packets sent, repetitions excluded.
    pub video_packets: u64,
    /// Payload bytes of them.
    pub video_bytes: u64,
    /// Repetitions and padding sent for video.
    pub retransmitted_packets: u64,
    /// Requests for repetition received.
    pub nacks: u64,
    /// Picture loss indications received.
    pub plis: u64,
    /// Full intra requests received.
    pub firs: u64,
    /// Video packets the client reported as lost in all.
    pub packets_lost: u64,
    /// Arrival jitter of video at the client.
    pub jitter: Option<Duration>,
    /// The client reported that video packets arrive.
    pub video_acknowledged: bool,
    /// Video frames given to [`Peer::write_video`] while connected.
    pub frames: u64,
    /// Key frames among them.
    pub key_frames: u64,
    /// Key frame requests of a client that had received everything.
    pub requests_ignored: u64,
    /// Data channels refused because nobody announced them.
    pub channels_refused: u64,
    /// Datagrams that were no valid input.
    pub datagrams_refused: u64,
}

/// Video packets that wait in the pacer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backlog {
    /// How many.
    pub packets: usize,
    /// Their size in bytes.
    pub bytes: usize,
    /// How long the oldest waits.
    pub age: Duration,
}

/// How far the connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// No remote description yet.
    Describing,
    /// Waiting for ICE and DTLS until the deadline.
    Connecting { until: Instant },
    /// Media flows.
    Connected,
    /// ICE lost the client; it may return until the deadline.
    Lost { until: Instant },
    /// Over. Remaining output may be drained.
    Ended,
}

/// Padding and probing of the congestion control.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Probing {
    /// As the desired bitrate says.
    Active,
    /// Video came back; probing waits until it has flowed without a gap since then for a while.
    Waking { since: Instant },
    /// Nothing is sent beyond media and keepalives.
    Quiet,
}

/// One connection to one client. See the crate's text for the contract.
pub struct Peer {
    config: PeerConfig,
    rtc: Rtc,
    phase: Phase,
    ice: Option<IceState>,
    pending: Option<SdpPendingOffer>,
    /// Candidates that came before the description they belong to.
    early: Vec<str0m::Candidate>,
    candidates_seen: usize,
    local: Vec<Candidate>,
    audio: Option<Mid>,
    camera: Option<Mid>,
    video: Option<Mid>,
    audio_pt: Option<Pt>,
    video_pt: Option<Pt>,
    rtx_pt: Option<u8>,
    placeholder: Option<ChannelId>,
    channels: Vec<(ChannelId, String)>,
    channel_openings: usize,
    outputs: VecDeque<Output>,
    /// When str0m wants time next.
    deadline: Instant,
    now: Instant,
    /// Media time zero.
    epoch: Instant,
    last_video_ticks: u64,
    last_audio_ticks: u64,
    last_video: Instant,
    /// When the client was last heard.
    last_heard: Instant,
    probing: Probing,
    desired_bps: u64,
    doubt: Doubt,
    /// Sequence number of the last video packet, and when it was sent.
    last_packet: Option<(u16, Instant)>,
    /// Highest sequence number of video the client reported.
    reported: Option<u16>,
    /// A request of a client that may have everything already.
    idle_request: Option<Instant>,
    errors: u32,
    stats: Stats,
}

impl std::fmt::Debug for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Keys, credentials and addresses live in the transport; none of it is printed.
        f.debug_struct("Peer")
            .field("role", &self.config.role)
            .field("phase", &self.phase)
            .finish_non_exhaustive()
    }
}

impl Peer {
    /// Prepares a connection at `now`.
    ///
    /// # Errors
    /// When `config.local` is empty or holds an address that cannot be announced.
    pub fn new(config: PeerConfig, now: Instant) -> Result<Peer, PeerError> {
        if config.local.is_empty() {
            return Err(PeerError::NoAddress);
        }
        let mut rtc = catch_unwind(AssertUnwindSafe(|| rtc_config(&config).build(now)))
            .map_err(|_| PeerError::Transport { what: "preparing the transport", reason: "panic".into() })?;
        for address in &config.local {
            let candidate = str0m::Candidate::host(*address, Protocol::Udp)
                .map_err(|error| PeerError::BadAddress { address: *address, reason: error.to_string() })?;
            rtc.add_local_candidate(candidate);
        }
        rtc.bwe().set_bitrate(Bitrate::ZERO, Bitrate::bps(config.max_bitrate_bps));
        Ok(Peer {
            desired_bps: config.max_bitrate_bps,
            doubt: Doubt::new(now, config.min_bitrate_bps, config.start_bitrate_bps),
            stats: Stats { estimate_bps: config.start_bitrate_bps, ..Stats::default() },
            config,
            rtc,
            phase: Phase::Describing,
            ice: None,
            pending: None,
            early: Vec::new(),
            candidates_seen: 0,
            local: Vec::new(),
            audio: None,
            camera: None,
            video: None,
            audio_pt: None,
            video_pt: None,
            rtx_pt: None,
            placeholder: None,
            channels: Vec::new(),
            channel_openings: 0,
            outputs: VecDeque::new(),
            deadline: now,
            now,
            epoch: now,
            last_video_ticks: 0,
            last_audio_ticks: 0,
            last_video: now,
            last_heard: now,
            probing: Probing::Active,
            last_packet: None,
            reported: None,
            idle_request: None,
            errors: 0,
        })
    }

    /// Makes the one offer of an [`Role::Offerer`]: audio, camera, screen, application, in this order.
    ///
    /// # Errors
    /// In the other role, and when called twice.
    pub fn offer(&mut self) -> Result<String, PeerError> {
        const WHAT: &str = "an offer";
        if self.config.role != Role::Offerer || self.phase != Phase::Describing || self.pending.is_some() {
            return Err(PeerError::OutOfOrder { what: WHAT });
        }
        let config = self.config.clone();
        let made = self
            .guard(WHAT, |rtc| {
                let mut api = rtc.sdp_api();
                let audio = (config.speaker || config.microphone).then(|| {
                    // The section is sent even for a microphone alone: a client without sound to play ignores it.
                    let direction = if config.microphone { Direction::SendRecv } else { Direction::SendOnly };
                    // Sound and picture in different streams, so that the browser does not delay one for the other.
                    api.add_media(StrMediaKind::Audio, direction, Some("fanlight-audio".into()), None, None)
                });
                let camera = config.camera.then(|| {
                    let direction = Direction::RecvOnly;
                    api.add_media(StrMediaKind::Video, direction, Some("fanlight-camera".into()), None, None)
                });
                let video = config.video.then(|| {
                    let direction = Direction::SendOnly;
                    api.add_media(StrMediaKind::Video, direction, Some("fanlight-video".into()), None, None)
                });
                let placeholder = api.add_channel_with_config(ChannelConfig {
                    label: "placeholder".into(),
                    negotiated: Some(PLACEHOLDER_STREAM),
                    ..ChannelConfig::default()
                });
                api.apply().map(|(offer, pending)| (offer, pending, audio, camera, video, placeholder))
            })?
            .ok_or(PeerError::OutOfOrder { what: WHAT })?;
        let (offer, pending, audio, camera, video, placeholder) = made;
        (self.audio, self.camera, self.video) = (audio, camera, video);
        self.placeholder = Some(placeholder);
        self.pending = Some(pending);
        let text = offer.to_sdp_string();
        self.note_local_candidates(&text);
        self.pump();
        Ok(text)
    }

    /// Applies the client's answer to [`Peer::offer`].
    ///
    /// # Errors
    /// When there is no open offer, or the answer does not parse or does not fit it. The connection has ended then.
    pub fn answer(&mut self, sdp: &str) -> Result<(), PeerError> {
        const WHAT: &str = "an answer";
        check_size(sdp)?;
        if self.pending.is_none() {
            return Err(PeerError::OutOfOrder { what: WHAT });
        }
        let bad = |reason: String| PeerError::BadSdp { what: WHAT, reason };
        let answer = self
            .guard(WHAT, |_| SdpAnswer::from_sdp_string(sdp).map_err(|error| error.to_string()))?
            .map_err(bad)?;
        let pending = self.pending.take().ok_or(PeerError::OutOfOrder { what: WHAT })?;
        let applied = self.guard(WHAT, |rtc| {
            rtc.sdp_api().accept_answer(pending, answer).map_err(|error| error.to_string())
        })?;
        if let Err(reason) = applied {
            self.finish(None);
            return Err(bad(reason));
        }
        self.described();
        Ok(())
    }

    /// Answers the client's offer in the role [`Role::Answerer`].
    ///
    /// # Errors
    /// In the other role, when called twice, or when the offer does not parse or has no application section. The
    /// peer can be given another offer only after a parse error.
    pub fn accept_offer(&mut self, sdp: &str) -> Result<String, PeerError> {
        const WHAT: &str = "an offer of the client";
        check_size(sdp)?;
        if self.config.role != Role::Answerer || self.phase != Phase::Describing {
            return Err(PeerError::OutOfOrder { what: WHAT });
        }
        let bad = |reason: String| PeerError::BadSdp { what: WHAT, reason };
        let offer = self
            .guard(WHAT, |_| SdpOffer::from_sdp_string(sdp).map_err(|error| error.to_string()))?
            .map_err(bad)?;
        let answer = match self
            .guard(WHAT, |rtc| rtc.sdp_api().accept_offer(offer).map_err(|error| error.to_string()))?
        {
            Ok(answer) => answer,
            Err(reason) => {
                self.finish(None);
                return Err(bad(reason));
            }
        };
        // Which section is which follows from the direction the client gave it, seen from our side.
        let text = answer.to_sdp_string();
        for mid in section_mids(&text) {
            let mid = Mid::from(mid);
            let Some(media) = self.rtc.media(mid) else { continue };
            match (media.kind(), media.direction()) {
                (_, Direction::Inactive) => {}
                (StrMediaKind::Audio, _) => self.audio = self.audio.or(Some(mid)),
                (StrMediaKind::Video, Direction::RecvOnly) => self.camera = self.camera.or(Some(mid)),
                (StrMediaKind::Video, _) => self.video = self.video.or(Some(mid)),
            }
        }
        self.note_local_candidates(&text);
        self.described();
        Ok(text)
    }

    /// The candidates to send to the client; known once the local description is made.
    pub fn local_candidates(&self) -> Vec<Candidate> {
        self.local.clone()
    }

    /// Takes a candidate of the client, `candidate:…` with or without `a=`. It may come before the description.
    ///
    /// Lines that cannot matter here are ignored: empty ones (the end marker), host names that hide addresses
    /// (`.local`), and anything but UDP.
    ///
    /// # Errors
    /// When the line does not parse, or there are too many.
    pub fn add_remote_candidate(&mut self, line: &str) -> Result<(), PeerError> {
        let line = line.trim();
        let line = line.strip_prefix("a=").unwrap_or(line);
        if line.is_empty() {
            return Ok(());
        }
        self.candidates_seen += 1;
        if self.candidates_seen > MAX_REMOTE_CANDIDATES {
            return Err(PeerError::TooManyCandidates);
        }
        let bad = |reason: String| PeerError::BadCandidate { bytes: line.len(), reason };
        if line.len() > 1024 {
            return Err(bad("longer than 1024 bytes".into()));
        }
        // RFC 8839 section 5.1: foundation, component, transport, priority, address, port, "typ", type.
        let mut words = line.split_ascii_whitespace();
        let (transport, address) = (words.nth(2), words.nth(1));
        if address.is_some_and(|address| address.ends_with(".local"))
            || transport.is_some_and(|transport| !transport.eq_ignore_ascii_case("udp"))
        {
            return Ok(());
        }
        let candidate = self
            .guard("a candidate", |_| {
                str0m::Candidate::from_sdp_string(line).map_err(|error| error.to_string())
            })?
            .map_err(bad)?;
        if self.phase == Phase::Describing {
            self.early.push(candidate);
            return Ok(());
        }
        self.guard("adding a candidate", |rtc| rtc.add_remote_candidate(candidate))?;
        self.pump();
        Ok(())
    }

    /// Whether a datagram belongs to this peer, for a socket that several peers share.
    pub fn accepts(&self, source: SocketAddr, data: &[u8]) -> bool {
        if self.phase == Phase::Ended {
            return false;
        }
        let destination = self.config.local[0];
        catch_unwind(AssertUnwindSafe(|| {
            Receive::new(Protocol::Udp, source, destination, data)
                .is_ok_and(|receive| self.rtc.accepts(&Input::Receive(self.now, receive)))
        }))
        .unwrap_or(false)
    }

    /// Takes a datagram that arrived at `now`. What is no valid input is counted and dropped.
    ///
    /// `destination` is the socket's own address; behind a port forward, where it is none of the announced ones,
    /// the first announced address of the same family stands for it.
    pub fn handle_datagram(
        &mut self,
        now: Instant,
        source: SocketAddr,
        destination: SocketAddr,
        data: &[u8],
    ) {
        self.advance(now);
        if self.phase == Phase::Ended {
            return;
        }
        let now = self.now;
        let destination = self.announced(destination);
        let taken = self.guard("a datagram", |rtc| {
            let receive =
                Receive::new(Protocol::Udp, source, destination, data).map_err(|e| e.to_string())?;
            let input = Input::Receive(now, receive);
            if !rtc.accepts(&input) {
                return Err("from somebody else".into());
            }
            rtc.handle_input(input).map_err(|e| e.to_string())
        });
        match taken {
            Ok(Ok(())) => self.heard(),
            // Anybody can send anything to the port; that must not end a connection.
            Ok(Err(reason)) => {
                self.stats.datagrams_refused += 1;
                tracing::trace!(bytes = data.len(), reason, "datagram refused");
            }
            Err(_) => {}
        }
        self.pump();
    }

    /// Lets time pass. Calling it early or late is fine.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.advance(now);
        self.tick();
        self.pump();
    }

    /// The next thing to do. Call until it returns [`Output::Timeout`].
    pub fn poll(&mut self) -> Output {
        match self.outputs.pop_front() {
            Some(output) => output,
            None => Output::Timeout(self.next_deadline()),
        }
    }

    /// Sends one coded picture, captured at `captured`, the RTP time being that instant. H.264 is one access unit in
    /// Annex B form. Dropped while not connected.
    pub fn write_video(&mut self, now: Instant, captured: Instant, access_unit: &[u8], key: bool) {
        self.advance(now);
        let (Phase::Connected, Some(mid), Some(pt)) = (self.phase, self.video, self.video_pt) else { return };
        if access_unit.is_empty() {
            return;
        }
        self.wake(mid);
        // Two pictures with one time would be taken for one; a clock that stands still moves by a tick.
        let ticks = ticks(self.epoch, captured, 90_000).max(self.last_video_ticks + 1);
        self.last_video_ticks = ticks;
        self.last_video = self.now;
        self.stats.frames += 1;
        self.stats.key_frames += u64::from(key);
        let taken = self.config.wall_clock.map(|wall| {
            let capture_time = match captured.checked_duration_since(self.epoch) {
                Some(after) => wall + after,
                None => wall,
            };
            AbsCaptureTime { capture_time, clock_offset: None }
        });
        let written = self.guard("a picture", |rtc| {
            let Some(writer) = rtc.writer(mid) else { return Ok(()) };
            let mut writer = writer.playout_delay(MediaTime::ZERO, MediaTime::ZERO);
            if let Some(taken) = taken {
                writer = writer.abs_capture_time(taken);
            }
            let time = MediaTime::new(ticks, Frequency::NINETY_KHZ);
            writer.write(pt, captured, time, access_unit).map_err(|error| error.to_string())
        });
        if let Ok(Err(reason)) = written {
            tracing::debug!(bytes = access_unit.len(), reason, "picture not sent");
            // The next one refers to it, and the client cannot know that it existed.
            self.event(Event::KeyframeRequested);
        }
        self.packetise();
    }

    /// Sends one Opus packet whose first sample was captured at `captured`. Dropped while not connected.
    pub fn write_audio(&mut self, now: Instant, captured: Instant, packet: &[u8]) {
        self.advance(now);
        let (Phase::Connected, Some(mid), Some(pt)) = (self.phase, self.audio, self.audio_pt) else { return };
        if packet.is_empty() {
            return;
        }
        let ticks = ticks(self.epoch, captured, 48_000).max(self.last_audio_ticks + 1);
        self.last_audio_ticks = ticks;
        let written = self.guard("sound", |rtc| {
            let Some(writer) = rtc.writer(mid) else { return Ok(()) };
            let time = MediaTime::new(ticks, Frequency::FORTY_EIGHT_KHZ);
            writer.write(pt, captured, time, packet).map_err(|error| error.to_string())
        });
        if let Ok(Err(reason)) = written {
            tracing::debug!(bytes = packet.len(), reason, "sound not sent");
        }
        self.packetise();
    }

    /// Sends a text message on the control channel.
    ///
    /// # Errors
    /// As [`Peer::send_channel`].
    pub fn send_control(&mut self, text: &str) -> Result<(), PeerError> {
        self.send_channel(CONTROL, text.as_bytes(), false)
    }

    /// Sends a message on an open channel.
    ///
    /// # Errors
    /// When the channel is not open, the message is too large, or the client is too slow to take it. Nothing was
    /// queued then.
    pub fn send_channel(&mut self, label: &str, data: &[u8], binary: bool) -> Result<(), PeerError> {
        if data.len() > MAX_MESSAGE_BYTES {
            return Err(PeerError::MessageTooLarge { bytes: data.len() });
        }
        let id = self.channels.iter().find(|(_, open)| open == label).map(|(id, _)| *id);
        let id = id.ok_or_else(|| PeerError::ChannelNotOpen { label: label.into() })?;
        let written = self.guard("a message", |rtc| {
            let mut channel = rtc.channel(id)?;
            Some(channel.write(binary, data).map_err(|error| error.to_string()))
        })?;
        let result = match written {
            None => Err(PeerError::ChannelNotOpen { label: label.into() }),
            Some(Ok(true)) => Ok(()),
            Some(Ok(false)) => Err(PeerError::ChannelFull { bytes: data.len() }),
            Some(Err(reason)) => Err(PeerError::Transport { what: "sending a message", reason }),
        };
        self.pump();
        result
    }

    /// Sets the rate worth probing for, bits per second; usually the session's upper limit and some headroom.
    pub fn set_desired_bitrate(&mut self, bps: u64) {
        self.desired_bps = bps;
        if self.probing == Probing::Active {
            self.apply_desired();
            self.pump();
        }
    }

    /// Video packets waiting to be paced out. A growing age says that the encoder sends more than the path takes.
    pub fn backlog(&mut self) -> Backlog {
        let (Some(mid), now) = (self.video, self.now) else { return Backlog::default() };
        self.guard("the queue", |rtc| {
            let mut api = rtc.direct_api();
            let info = api.stream_tx_by_mid(mid, None)?.queue_info()?;
            Some(Backlog {
                packets: info.packet_count(),
                bytes: info.byte_size(),
                age: info.first_unsent().map_or(Duration::ZERO, |first| now.saturating_duration_since(first)),
            })
        })
        .ok()
        .flatten()
        .unwrap_or_default()
    }

    /// Ends the connection so that the client knows at once. What remains to be sent comes out of [`Peer::poll`];
    /// no event follows.
    pub fn close(&mut self, now: Instant) {
        self.advance(now);
        if self.phase == Phase::Ended {
            return;
        }
        // Before the association stands, str0m refuses an orderly end; dropping the peer is all that is left then.
        if let Ok(Err(error)) = self.guard("closing", |rtc| rtc.close()) {
            tracing::debug!(%error, "closed without a goodbye");
        }
        self.pump();
        self.finish(None);
        // The goodbye is not acknowledged by anybody: repeat it, a copy that arrives second is dropped as a replay.
        let copies: Vec<_> = self
            .outputs
            .iter()
            .filter_map(|output| match output {
                Output::Transmit { destination, source, data } => {
                    Some(Output::Transmit { destination: *destination, source: *source, data: data.clone() })
                }
                _ => None,
            })
            .collect();
        self.outputs.extend(copies);
    }

    /// Whether media can be sent now.
    pub fn is_connected(&self) -> bool {
        self.phase == Phase::Connected
    }

    /// Whether the connection is over; the peer can be dropped once [`Peer::poll`] is drained.
    pub fn is_ended(&self) -> bool {
        self.phase == Phase::Ended
    }

    /// The statistics of the last full second.
    pub fn stats(&self) -> Stats {
        self.stats.clone()
    }

    // Time never runs backwards for the transport.
    fn advance(&mut self, now: Instant) {
        self.now = self.now.max(now);
    }

    /// Runs one call into the transport; a panic inside it ends this connection and nothing else.
    fn guard<T>(&mut self, what: &'static str, call: impl FnOnce(&mut Rtc) -> T) -> Result<T, PeerError> {
        if self.phase == Phase::Ended {
            return Err(PeerError::Ended);
        }
        match catch_unwind(AssertUnwindSafe(|| call(&mut self.rtc))) {
            Ok(value) => Ok(value),
            Err(_) => {
                tracing::error!(what, "the transport panicked; the connection is given up");
                self.finish(Some(Event::Failed { reason: format!("internal error at {what}") }));
                Err(PeerError::Ended)
            }
        }
    }

    fn finish(&mut self, last: Option<Event>) {
        if self.phase == Phase::Ended {
            return;
        }
        self.phase = Phase::Ended;
        self.channels.clear();
        self.early.clear();
        self.outputs.extend(last.map(Output::Event));
    }

    fn announced(&self, destination: SocketAddr) -> SocketAddr {
        let local = &self.config.local;
        if local.contains(&destination) {
            return destination;
        }
        *local.iter().find(|address| address.is_ipv4() == destination.is_ipv4()).unwrap_or(&local[0])
    }

    /// Both descriptions are there: read what was agreed, release what waited.
    fn described(&mut self) {
        self.phase = Phase::Connecting { until: self.now + CONNECT_WITHIN };
        let (speaker, audio, video) = (self.config.speaker, self.audio, self.video);
        self.audio_pt = audio.and_then(|mid| self.chosen(mid)).map(|(pt, _, _)| pt);
        if speaker && self.audio_pt.is_none() {
            self.event(Event::NoCommonCodec { kind: MediaKind::Audio });
        }
        match video.and_then(|mid| self.chosen(mid)) {
            Some((pt, resend, Some(codec))) => {
                self.video_pt = Some(pt);
                self.rtx_pt = resend.map(|pt| *pt);
                self.event(Event::Codec(codec));
            }
            _ if self.config.video => self.event(Event::NoCommonCodec { kind: MediaKind::Video }),
            _ => {}
        }
        if let Some(mid) = video {
            let _ = self.guard("the resend cache", |rtc| {
                if let Some(stream) = rtc.direct_api().stream_tx_by_mid(mid, None) {
                    stream.set_rtx_cache(RESEND_PACKETS, RESEND_WINDOW, Some(RESEND_SHARE));
                }
            });
        }
        for candidate in std::mem::take(&mut self.early) {
            let _ = self.guard("adding a candidate", |rtc| rtc.add_remote_candidate(candidate));
        }
        self.tick();
        self.pump();
    }

    /// The payload type we send with in a section, its resend type, and the codec.
    fn chosen(&mut self, mid: Mid) -> Option<(Pt, Option<Pt>, Option<VideoCodec>)> {
        self.guard("the agreed codec", |rtc| {
            if !rtc.media(mid).is_some_and(|media| media.direction().is_sending() && !media.disabled()) {
                return None;
            }
            let writer = rtc.writer(mid)?;
            let params = writer.payload_params().next()?;
            Some((params.pt(), params.resend(), codec_of(params.spec().codec)))
        })
        .ok()
        .flatten()
    }

    fn note_local_candidates(&mut self, sdp: &str) {
        let Some(first) = section_mids(sdp).next() else { return };
        self.local = sdp
            .lines()
            .filter_map(|line| line.strip_prefix("a=candidate:"))
            .map(|rest| Candidate {
                candidate: format!("candidate:{}", rest.trim_end()),
                mid: first.to_owned(),
                index: 0,
            })
            .collect();
        // Bundled sections repeat the same addresses.
        self.local.dedup();
    }

    /// Our own deadlines.
    fn tick(&mut self) {
        match self.phase {
            Phase::Connecting { until } if self.now >= until => {
                let reason = format!("no connection to the client within {} s", CONNECT_WITHIN.as_secs());
                self.finish(Some(Event::Failed { reason }));
                return;
            }
            Phase::Lost { until } if self.now >= until => {
                let reason = format!("the client was gone for {} s", RETURN_WITHIN.as_secs());
                self.finish(Some(Event::Failed { reason }));
                return;
            }
            Phase::Connected if self.now >= self.last_heard + LOST_AFTER => {
                self.phase = Phase::Lost { until: self.now + RETURN_WITHIN };
                self.event(Event::Ice(IceState::Disconnected));
            }
            _ => {}
        }
        let quiet_at = self.last_video + QUIET_AFTER;
        match (self.probing, self.video) {
            (Probing::Active | Probing::Waking { .. }, Some(mid))
                if self.phase == Phase::Connected && self.now >= quiet_at =>
            {
                self.probing = Probing::Quiet;
                // A section that sends nothing gets neither padding nor probes. The direction is only changed here,
                // never signalled: the client keeps waiting for pictures.
                let _ = self.guard("going quiet", |rtc| {
                    rtc.sdp_api().set_direction(mid, Direction::Inactive);
                    rtc.bwe().set_bitrate(Bitrate::ZERO, Bitrate::ZERO);
                });
            }
            _ => {}
        }
        let now = self.now;
        let _ = self.guard("the time", |rtc| rtc.handle_input(Input::Timeout(now)));
    }

    /// Ends a quiet time because a picture is about to be sent.
    fn wake(&mut self, mid: Mid) {
        let gap = self.now.saturating_duration_since(self.last_video);
        match self.probing {
            Probing::Quiet => {
                self.probing = Probing::Waking { since: self.now };
                let _ = self.guard("waking", |rtc| {
                    rtc.sdp_api().set_direction(mid, Direction::SendOnly);
                    // Without a desired rate nothing is probed yet; the call makes the pacer count padding again.
                    rtc.bwe().set_bitrate(Bitrate::ZERO, Bitrate::ZERO);
                });
                self.pump();
            }
            Probing::Waking { .. } if gap > FLOW_GAP => self.probing = Probing::Waking { since: self.now },
            Probing::Waking { since } if self.now >= since + PROBE_AFTER => {
                self.probing = Probing::Active;
                self.apply_desired();
                self.pump();
            }
            _ => {}
        }
    }

    fn apply_desired(&mut self) {
        let desired = Bitrate::bps(self.desired_bps);
        let _ = self.guard("the desired rate", |rtc| rtc.bwe().set_bitrate(Bitrate::ZERO, desired));
    }

    /// After a write: hand the queued media to the packetiser in the same instant.
    fn packetise(&mut self) {
        self.pump();
        self.tick();
        self.pump();
    }

    fn next_deadline(&self) -> Instant {
        let mut next = self.deadline;
        // Feedback on a client's own media must be prompt, so it keeps the exact timer.
        let receives = self.config.microphone || self.config.camera;
        if self.probing == Probing::Quiet
            && !receives
            && self.rtc.last_timeout_reason() == Reason::BweDelayControl
        {
            next = next.max(self.now + QUIET_STEP);
        }
        match self.phase {
            // A far instant: the owner may sleep as long as it likes.
            Phase::Ended => return self.now + Duration::from_secs(3600),
            Phase::Connecting { until } | Phase::Lost { until } => next = next.min(until),
            Phase::Connected => {
                next = next.min(self.last_heard + LOST_AFTER);
                if self.video.is_some() && self.probing != Probing::Quiet {
                    next = next.min(self.last_video + QUIET_AFTER);
                }
            }
            Phase::Describing => {}
        }
        next.max(self.now)
    }

    fn event(&mut self, event: Event) {
        self.outputs.push_back(Output::Event(event));
    }

    /// Drains the transport into our own queue, and gives it the time it asks for if that is already past.
    fn pump(&mut self) {
        // Every round hands the transport the present; more rounds than these mean it wants the past.
        for _ in 0..64 {
            loop {
                let polled =
                    self.guard("polling", |rtc| rtc.poll_output().map_err(|error| error.to_string()));
                match polled {
                    Err(_) => return,
                    Ok(Err(reason)) => {
                        self.errors += 1;
                        tracing::debug!(reason, "transport error");
                        if !self.rtc.is_alive() || self.errors >= MAX_ERRORS {
                            self.finish(Some(Event::Failed { reason }));
                            return;
                        }
                    }
                    Ok(Ok(str0m::Output::Timeout(at))) => {
                        self.deadline = at;
                        break;
                    }
                    Ok(Ok(str0m::Output::Transmit(transmit))) => {
                        self.errors = 0;
                        let data: Vec<u8> = transmit.contents.into();
                        // RTP has its version in the first two bits and the payload type in the second byte.
                        let is_rtp = data.len() > 12 && data[0] >> 6 == 2;
                        let pt = data.get(1).map(|byte| byte & 0x7f).filter(|_| is_rtp);
                        if pt.is_some() && pt == self.rtx_pt {
                            self.stats.retransmitted_packets += 1;
                        } else if pt.is_some() && pt == self.video_pt.map(|pt| *pt) {
                            self.last_packet = Some((u16::from_be_bytes([data[2], data[3]]), self.now));
                        }
                        self.outputs.push_back(Output::Transmit {
                            destination: transmit.destination,
                            source: transmit.source,
                            data,
                        });
                    }
                    Ok(Ok(str0m::Output::Event(event))) => self.translate(event),
                }
            }
            if self.deadline > self.now {
                return;
            }
            let now = self.now;
            let _ = self.guard("the time", |rtc| rtc.handle_input(Input::Timeout(now)));
        }
        // Ask again a moment later rather than spin.
        self.deadline = self.now + Duration::from_millis(1);
    }

    fn translate(&mut self, event: str0m::Event) {
        use str0m::Event as Str;
        match event {
            Str::Connected => {
                self.phase = Phase::Connected;
                self.last_video = self.now;
                self.last_heard = self.now;
                self.event(Event::Connected);
            }
            Str::IceConnectionStateChange(state) => self.ice_changed(state),
            Str::KeyframeRequest(_) => self.key_frame_requested(),
            // Without probing, as while quiet, the estimate is only repeated to say that probing stopped.
            Str::EgressBitrateEstimate(BweKind::Twcc { estimate, can_probe: true }) => {
                self.doubt.estimate_bps = estimate.as_u64();
                self.report_estimate();
            }
            Str::ChannelOpen(id, label) => self.channel_opened(id, label),
            Str::ChannelData(message) => {
                if let Some((_, label)) = self.channels.iter().find(|(id, _)| *id == message.id) {
                    let label = label.clone();
                    self.event(Event::Channel { label, binary: message.binary, data: message.data });
                }
            }
            Str::ChannelClose(id) => {
                if let Some(at) = self.channels.iter().position(|(open, _)| *open == id) {
                    let (_, label) = self.channels.swap_remove(at);
                    self.event(Event::ChannelClosed { label });
                }
            }
            Str::MediaData(media) => {
                let data = media.data.to_vec();
                if Some(media.mid) == self.audio && self.config.microphone {
                    let time = media.time.rebase(Frequency::FORTY_EIGHT_KHZ).numer();
                    self.event(Event::RemoteAudio { time, data });
                } else if Some(media.mid) == self.camera
                    && let Some(codec) = codec_of(media.params.spec().codec)
                {
                    let time = media.time.rebase(Frequency::NINETY_KHZ).numer();
                    self.event(Event::RemoteVideo { codec, time, data });
                }
            }
            Str::PeerStats(stats) => {
                self.stats.bytes_sent = stats.peer_bytes_tx;
                self.stats.bytes_received = stats.peer_bytes_rx;
                let pair = stats.selected_candidate_pair;
                self.stats.rtt =
                    stats.rtt.or(pair.and_then(|pair| pair.current_round_trip_time)).or(self.stats.rtt);
                self.stats.loss = stats.egress_loss_fraction;
                self.doubt_estimate();
                self.judge_idle_request();
                self.event(Event::Stats);
            }
            Str::MediaEgressStats(stats) if Some(stats.mid) == self.video => {
                self.stats.video_packets = stats.packets;
                self.stats.video_bytes = stats.bytes;
                self.stats.nacks = stats.nacks;
                self.stats.plis = stats.plis;
                self.stats.firs = stats.firs;
                if let Some(remote) = stats.remote {
                    self.stats.video_acknowledged = true;
                    // Reports count in extended numbers, whose low half is the packet's own.
                    self.reported = Some((*remote.maximum_sequence_number & 0xffff) as u16);
                    self.stats.packets_lost = remote.packets_lost;
                    self.stats.jitter = Some(Duration::from_secs_f64(f64::from(remote.jitter) / 90_000.0));
                }
            }
            Str::Closed => self.finish(Some(Event::Disconnected)),
            _ => {}
        }
    }

    /// A key frame costs a still screen more than a minute of silence, so it is not sent to a client whose timer ran
    /// out although it has everything.
    fn key_frame_requested(&mut self) {
        let idle = self.last_packet.is_some_and(|(_, sent)| self.now >= sent + IDLE_REQUEST_AFTER);
        if idle {
            self.idle_request.get_or_insert(self.now);
            self.judge_idle_request();
        } else {
            self.idle_request = None;
            self.event(Event::KeyframeRequested);
        }
    }

    fn judge_idle_request(&mut self) {
        let Some(since) = self.idle_request else { return };
        if self.reported.is_some() && self.reported == self.last_packet.map(|(number, _)| number) {
            self.idle_request = None;
            self.stats.requests_ignored += 1;
        } else if self.now >= since + IDLE_REQUEST_WAITS {
            self.idle_request = None;
            self.event(Event::KeyframeRequested);
        }
    }

    fn doubt_estimate(&mut self) {
        if self.phase != Phase::Connected || self.probing == Probing::Quiet {
            return;
        }
        let doubted = self.doubt.estimate_bps;
        if let Some(afresh) = self.doubt.judge(self.now, self.stats.rtt, self.stats.loss) {
            tracing::debug!(estimate_bps = doubted, "estimate not believed, starting it afresh");
            let _ = self.guard("the estimator", |rtc| rtc.bwe().reset(Bitrate::bps(afresh)));
        }
        self.report_estimate();
    }

    fn report_estimate(&mut self) {
        let bps = self.doubt.reported();
        if bps != self.stats.estimate_bps {
            self.stats.estimate_bps = bps;
            self.event(Event::BitrateEstimate(bps));
        }
    }

    fn ice_changed(&mut self, state: IceConnectionState) {
        let state = match state {
            IceConnectionState::New => return,
            IceConnectionState::Checking => IceState::Checking,
            IceConnectionState::Connected | IceConnectionState::Completed => IceState::Connected,
            IceConnectionState::Disconnected => IceState::Disconnected,
        };
        // Loss and return are told by what is heard; see `tick` and `heard`.
        let new = self.ice != Some(state);
        self.ice = Some(state);
        if new && matches!(self.phase, Phase::Describing | Phase::Connecting { .. }) {
            self.event(Event::Ice(state));
        }
    }

    /// Something authentic came from the client.
    fn heard(&mut self) {
        self.last_heard = self.now;
        if matches!(self.phase, Phase::Lost { .. }) {
            self.phase = Phase::Connected;
            self.event(Event::Ice(IceState::Connected));
            // Pictures were dropped meanwhile, which the numbers of the packets do not show.
            self.event(Event::KeyframeRequested);
        }
    }

    fn channel_opened(&mut self, id: ChannelId, label: String) {
        if Some(id) == self.placeholder {
            return;
        }
        self.channel_openings += 1;
        if self.channel_openings > MAX_CHANNEL_OPENINGS {
            let reason = format!("the client opened more than {MAX_CHANNEL_OPENINGS} channels");
            self.finish(Some(Event::Failed { reason }));
            return;
        }
        let agreed = label == CONTROL || self.config.channels.contains(&label);
        let taken = self.channels.iter().any(|(_, open)| *open == label);
        if agreed && !taken {
            self.channels.push((id, label.clone()));
            self.event(Event::ChannelOpen { label });
        } else {
            self.stats.channels_refused += 1;
            let _ = self.guard("refusing a channel", |rtc| rtc.direct_api().close_data_channel(id));
        }
    }
}

fn check_size(sdp: &str) -> Result<(), PeerError> {
    if sdp.len() > MAX_SDP_BYTES { Err(PeerError::SdpTooLarge { bytes: sdp.len() }) } else { Ok(()) }
}

/// Ticks of a media clock between the epoch and an instant; zero before the epoch.
fn ticks(epoch: Instant, at: Instant, hertz: u64) -> u64 {
    let nanos = at.saturating_duration_since(epoch).as_nanos();
    (nanos * u128::from(hertz) / 1_000_000_000) as u64
}

fn codec_of(codec: Codec) -> Option<VideoCodec> {
    match codec {
        Codec::H264 => Some(VideoCodec::H264),
        Codec::Vp8 => Some(VideoCodec::Vp8),
        Codec::Av1 => Some(VideoCodec::Av1),
        _ => None,
    }
}

/// The identifiers of a description's sections, in order.
fn section_mids(sdp: &str) -> impl Iterator<Item = &str> {
    sdp.lines().filter_map(|line| line.strip_prefix("a=mid:")).map(str::trim)
}

fn rtc_config(config: &PeerConfig) -> RtcConfig {
    let mut extensions = ExtensionMap::empty();
    extensions.set(2, Extension::AbsoluteSendTime);
    extensions.set(3, Extension::TransportSequenceNumber);
    extensions.set(4, Extension::RtpMid);
    // Without it, and without 0/0 on the packets, browsers hold pictures back for some 30 ms.
    extensions.set(5, Extension::PlayoutDelay);
    if config.wall_clock.is_some() {
        extensions.set(6, Extension::AbsoluteCaptureTime);
    }

    let mut rtc = RtcConfig::new()
        .set_crypto_provider(abort::provider())
        .clear_codecs()
        .set_extension_map(extensions)
        .set_stats_interval(Some(STATS_EVERY))
        .set_send_buffer_video(RESEND_PACKETS)
        .set_sctp_max_buffered_amount(CHANNEL_BUFFER)
        .set_sctp_max_message_size(MAX_MESSAGE_BYTES as u32)
        .enable_bwe(Some(Bitrate::bps(config.start_bitrate_bps)));
    rtc.set_max_stun_retransmits(CHECKS);

    let codecs = rtc.codec_config();
    codecs.add_config(
        PT_OPUS.into(),
        None,
        Codec::Opus,
        Frequency::FORTY_EIGHT_KHZ,
        Some(2),
        FormatParams {
            min_p_time: Some(10),
            use_inband_fec: Some(true),
            stereo: Some(true),
            sprop_stereo: Some(true),
            ..FormatParams::default()
        },
    );
    for codec in &config.codecs {
        let (pt, rtx, codec, format) = match codec {
            VideoCodec::H264 => {
                let format = FormatParams {
                    level_asymmetry_allowed: Some(true),
                    packetization_mode: Some(1),
                    profile_level_id: Some(0x42_e000 | u32::from(config.h264_level_idc)),
                    ..FormatParams::default()
                };
                (PT_H264, PT_H264_RTX, Codec::H264, format)
            }
            VideoCodec::Vp8 => (PT_VP8, PT_VP8_RTX, Codec::Vp8, FormatParams::default()),
            VideoCodec::Av1 => (PT_AV1, PT_AV1_RTX, Codec::Av1, FormatParams::default()),
        };
        codecs.add_config(pt.into(), Some(rtx.into()), codec, Frequency::NINETY_KHZ, None, format);
    }
    for params in codecs.iter_mut() {
        // Our estimator is the only one in use.
        params.set_fb_remb(false);
        if params.spec().codec.is_audio() {
            // Sound is small and constant. Left out of the estimate, it does not keep padding and probes alive
            // while the picture stands still.
            params.set_fb_transport_cc(false);
        }
    }
    rtc
}
