//! openh264, the encoder for builds that must be free of the GPL.
//!
//! It has no rate buffer: its key frames are several times larger than the average picture allows, and a sudden
//! change overshoots for some pictures. Pictures are never skipped, because on a screen that stands still afterwards
//! the skipped one would be missing for good. It does not tell its quantiser.

use std::ffi::c_int;
use std::ptr;
use std::time::Instant;

use bytes::Bytes;
use openh264::OpenH264API;
use openh264::encoder::{
    BitRate, Complexity, EncoderConfig as Settings, FrameRate, FrameType, IntraFramePeriod, Level, Profile,
    QpRange, RateControlMode, SpsPpsStrategy, UsageType, VuiConfig,
};
use openh264::formats::YUVSource;
use openh264_sys2::{ENCODER_OPTION_BITRATE, ENCODER_OPTION_MAX_BITRATE, SBitrateInfo, SPATIAL_LAYER_ALL};

use super::{
    AccessUnit, EncodeError, Encoder, EncoderConfig, FINE_QUANTISER, PictureRef, VideoCodec, annexb,
    level_idc,
};

const NAME: &str = "openh264";
/// Largest sides it codes, the longer and the shorter one.
const LARGEST: (u32, u32) = (3840, 2160);

pub(super) struct OpenH264 {
    config: EncoderConfig,
    encoder: openh264::encoder::Encoder,
    /// The rate for the next picture, when it changed.
    pending_bps: Option<u64>,
    /// The library sets itself up with the first picture, and takes rates only after that.
    started: bool,
}

impl OpenH264 {
    pub(super) fn new(config: &EncoderConfig) -> Result<OpenH264, EncodeError> {
        let (width, height) = (config.width, config.height);
        if width.max(height) > LARGEST.0 || width.min(height) > LARGEST.1 {
            let reason = format!("{width}x{height} is larger than {}x{}", LARGEST.0, LARGEST.1);
            return Err(EncodeError::Codec { encoder: NAME, what: "opening", reason });
        }
        let settings = Settings::new()
            .bitrate(BitRate::from_bps(config.clamp(config.bitrate_bps) as u32))
            .max_frame_rate(FrameRate::from_hz(config.fps as f32))
            .rate_control_mode(RateControlMode::Bitrate)
            .skip_frames(false)
            .usage_type(UsageType::CameraVideoRealTime)
            .profile(Profile::Baseline)
            .level(level(config))
            .complexity(Complexity::Low)
            .sps_pps_strategy(SpsPpsStrategy::ConstantId)
            .intra_frame_period(IntraFramePeriod::auto())
            .scene_change_detect(false)
            .adaptive_quantization(false)
            .background_detection(true)
            .qp(QpRange::new(FINE_QUANTISER - 2, 51))
            .num_threads(1)
            .vui(VuiConfig::bt709());
        let encoder = openh264::encoder::Encoder::with_api_config(OpenH264API::from_source(), settings)
            .map_err(|error| failed("opening", error))?;
        Ok(OpenH264 { config: config.clone(), encoder, pending_bps: None, started: false })
    }

    /// Tells the library the rate. A refusal leaves the old rate, which the next change may mend.
    fn apply_bitrate(&mut self, bps: u64) {
        let mut rate = SBitrateInfo { iLayer: SPATIAL_LAYER_ALL, iBitrate: bps as c_int };
        // Its limit must never be below the target: raise it first, and lower it last.
        for option in [ENCODER_OPTION_MAX_BITRATE, ENCODER_OPTION_BITRATE, ENCODER_OPTION_MAX_BITRATE] {
            // SAFETY: the encoder is initialised, and both options read one SBitrateInfo.
            let code = unsafe { self.encoder.raw_api().set_option(option, ptr::from_mut(&mut rate).cast()) };
            if code != 0 && option == ENCODER_OPTION_BITRATE {
                tracing::warn!(encoder = NAME, bps, code, "rate refused, the old one stays");
            }
        }
    }
}

impl Encoder for OpenH264 {
    fn encode(
        &mut self,
        picture: PictureRef<'_>,
        captured: Instant,
        force_key: bool,
    ) -> Result<Option<AccessUnit>, EncodeError> {
        picture.check(self.config.width, self.config.height)?;
        let start = Instant::now();
        if self.started {
            if let Some(bps) = self.pending_bps.take() {
                self.apply_bitrate(bps);
            }
            if force_key {
                self.encoder.force_intra_frame();
            }
        }
        let coded = self.encoder.encode(&Source(picture)).map_err(|error| failed("encoding", error))?;
        self.started = true;
        let key = matches!(coded.frame_type(), FrameType::IDR | FrameType::I);
        let stream = coded.to_vec();
        if stream.is_empty() {
            return Ok(None);
        }
        let mut data = Vec::new();
        annexb::strip(&stream, &mut data);
        Ok(Some(AccessUnit {
            data: Bytes::from(data),
            key,
            captured,
            took: start.elapsed(),
            quantiser: None,
        }))
    }

    fn set_bitrate(&mut self, bps: u64) -> Result<(), EncodeError> {
        self.pending_bps = Some(self.config.clamp(bps));
        Ok(())
    }

    fn name(&self) -> &str {
        NAME
    }

    fn codec(&self) -> VideoCodec {
        VideoCodec::H264
    }
}

/// A picture as the library wants to read it.
struct Source<'a>(PictureRef<'a>);

impl YUVSource for Source<'_> {
    fn dimensions(&self) -> (usize, usize) {
        (self.0.width as usize, self.0.height as usize)
    }

    fn strides(&self) -> (usize, usize, usize) {
        (self.0.strides[0], self.0.strides[1], self.0.strides[2])
    }

    fn y(&self) -> &[u8] {
        self.0.planes[0]
    }

    fn u(&self) -> &[u8] {
        self.0.planes[1]
    }

    fn v(&self) -> &[u8] {
        self.0.planes[2]
    }
}

/// The level to code for; the library picks the lowest that fits the picture otherwise, and then refuses rates.
fn level(config: &EncoderConfig) -> Level {
    match level_idc(config.width, config.height, config.fps) {
        ..=31 => Level::Level_3_1,
        32 => Level::Level_3_2,
        33..=40 => Level::Level_4_0,
        41..=42 => Level::Level_4_2,
        43..=50 => Level::Level_5_0,
        51 => Level::Level_5_1,
        _ => Level::Level_5_2,
    }
}

fn failed(what: &'static str, error: openh264::Error) -> EncodeError {
    EncodeError::Codec { encoder: NAME, what, reason: error.to_string() }
}
