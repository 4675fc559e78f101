//! What a peer is told before it starts: its role, what travels, and its limits.

use std::net::SocketAddr;
use std::time::SystemTime;

/// Largest description accepted, in bytes. A browser's fullest offer has about 9 kB.
pub const MAX_SDP_BYTES: usize = 256 * 1024;
/// Most remote candidates taken from one client.
pub const MAX_REMOTE_CANDIDATES: usize = 100;
/// Largest data channel message in either direction, in bytes; what browsers announce too.
pub const MAX_MESSAGE_BYTES: usize = 256 * 1024;
/// The channel that every client opens.
pub const CONTROL: &str = "control";

/// Which side describes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// We offer, the client answers (signalling version 2).
    Offerer,
    /// The client offers, we answer (signalling versions 0 and 1).
    Answerer,
}

/// A video codec that can be negotiated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum VideoCodec {
    /// Constrained baseline, packetisation mode 1.
    H264,
    /// VP8.
    Vp8,
    /// AV1, main profile.
    Av1,
}

impl VideoCodec {
    /// The name clients use in `preferred_decoder_codecs`.
    pub fn name(self) -> &'static str {
        match self {
            VideoCodec::H264 => "H264",
            VideoCodec::Vp8 => "VP8",
            VideoCodec::Av1 => "AV1",
        }
    }

    /// Reads a client's spelling of the name, in any case.
    pub fn from_name(name: &str) -> Option<VideoCodec> {
        [VideoCodec::H264, VideoCodec::Vp8, VideoCodec::Av1]
            .into_iter()
            .find(|codec| codec.name().eq_ignore_ascii_case(name))
    }
}

/// Audio or video, in events that concern a section of the description.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MediaKind {
    /// Sound.
    Audio,
    /// Pictures.
    Video,
}

/// Settings of one peer, fixed for its life.
#[derive(Clone, Debug)]
pub struct PeerConfig {
    /// Which side describes first.
    pub role: Role,
    /// Send the application's sound.
    pub speaker: bool,
    /// Receive the client's microphone.
    pub microphone: bool,
    /// Send the application's picture.
    pub video: bool,
    /// Receive the client's camera.
    pub camera: bool,
    /// Video codecs in order of preference.
    pub codecs: Vec<VideoCodec>,
    /// H.264 `level_idc` to announce: ten times the level, 31 for 1280×720 at 30, 42 for 1920×1080 at 60.
    pub h264_level_idc: u8,
    /// Data channel labels accepted besides `control`.
    pub channels: Vec<String>,
    /// Addresses the client can reach, announced as host candidates.
    pub local: Vec<SocketAddr>,
    /// Bandwidth estimate to start from, bits per second.
    pub start_bitrate_bps: u64,
    /// Lowest useful video rate, bits per second. Estimates below it are reported only when packets are lost or
    /// delayed; without such evidence this rate stands in for them.
    pub min_bitrate_bps: u64,
    /// Highest rate worth probing for, bits per second.
    pub max_bitrate_bps: u64,
    /// Wall time at the instant given to `Peer::new`. With it every video packet carries its capture time
    /// (abs-capture-time), from which a client splits the delay into host and network.
    pub wall_clock: Option<SystemTime>,
}

impl Default for PeerConfig {
    fn default() -> Self {
        PeerConfig {
            role: Role::Offerer,
            speaker: true,
            microphone: false,
            video: true,
            camera: false,
            codecs: vec![VideoCodec::H264],
            h264_level_idc: 31,
            channels: Vec::new(),
            local: Vec::new(),
            start_bitrate_bps: 4_000_000,
            min_bitrate_bps: 1_000_000,
            max_bitrate_bps: 8_000_000,
            wall_clock: None,
        }
    }
}
