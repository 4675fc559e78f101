//! Encoders: planar pictures in, coded pictures out, one trait for all of them.
//!
//! The settings are those of live streaming, the same for every encoder: no frame is held back, key frames only on
//! request, every key frame carries its parameter sets, the rate changes without a key frame, and the buffer of the
//! rate control is 33 ms, so that no picture (the first included) takes longer than two frames of 60 Hz on the wire.
//!
//! **Refinement.** A picture coded right after a big change is coarse, because it must fit that buffer. When the
//! screen then stands still, encoding the same picture again improves it: unchanged blocks cost almost nothing, so the
//! whole budget goes into what is still coarse, and the quantiser falls with every repetition until
//! [`FINE_QUANTISER`]. [`AccessUnit::quantiser`] tells when to stop; from a scene cut at 720p and 5 Mbit/s it takes
//! some five to fifteen pictures. After that, repeating the picture adds nothing.
//!
//! What is encoded, and when, is the media loop's to decide; congestion control is the peer's.

pub mod annexb;
mod limits;
#[cfg(feature = "openh264")]
mod openh264;
#[cfg(test)]
mod tests;
#[cfg(feature = "x264")]
mod x264;

use std::time::{Duration, Instant};

use bytes::Bytes;
pub use fanlight_rtc::VideoCodec;

pub use limits::{level_idc, limits};

/// Smallest width and height, pixels: one macroblock.
pub const MIN_SIDE: u32 = 16;
/// Largest width and height, pixels: what H.264 level 5.2 codes, with room for one side.
pub const MAX_SIDE: u32 = 8192;
/// Highest frame rate, pictures per second.
pub const MAX_FPS: u32 = 240;
/// Quantiser (H.264 scale, 0 finest, 51 coarsest) below which a still picture is not improved any further.
pub const FINE_QUANTISER: u8 = 16;

/// One picture in I420, BT.709, limited range.
#[derive(Clone, Copy)]
pub struct PictureRef<'a> {
    /// Width in pixels, even.
    pub width: u32,
    /// Height in pixels, even.
    pub height: u32,
    /// Luma and the two chroma planes, half size each way.
    pub planes: [&'a [u8]; 3],
    /// Bytes from one row to the next, per plane.
    pub strides: [usize; 3],
}

impl PictureRef<'_> {
    /// Width and height of a plane, in samples.
    fn plane_size(&self, plane: usize) -> (usize, usize) {
        let shift = u32::from(plane > 0);
        ((self.width >> shift) as usize, (self.height >> shift) as usize)
    }

    fn check(&self, width: u32, height: u32) -> Result<(), EncodeError> {
        if (self.width, self.height) != (width, height) {
            return Err(EncodeError::OtherSize {
                width: self.width,
                height: self.height,
                expected: (width, height),
            });
        }
        for plane in 0..3 {
            let (columns, rows) = self.plane_size(plane);
            let needed = (rows - 1) * self.strides[plane] + columns;
            if self.strides[plane] < columns || self.planes[plane].len() < needed {
                return Err(EncodeError::ShortPlane { plane, bytes: self.planes[plane].len(), needed });
            }
        }
        Ok(())
    }
}

/// One coded picture.
#[derive(Clone, Debug)]
pub struct AccessUnit {
    /// H.264: Annex B, parameter sets before every IDR, no delimiters and no supplemental information.
    pub data: Bytes,
    /// Decodable without earlier pictures.
    pub key: bool,
    /// The instant given with the picture.
    pub captured: Instant,
    /// How long encoding took.
    pub took: Duration,
    /// Average quantiser on the H.264 scale, where the encoder tells it.
    pub quantiser: Option<u8>,
}

/// Which encoder to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EncoderKind {
    /// The best one of this build.
    #[default]
    Auto,
    /// libx264 through libavcodec (GPL).
    X264,
    /// Cisco's openh264 (BSD).
    OpenH264,
}

/// What an encoder is made for. Nothing but the bit rate changes during its life.
#[derive(Clone, Debug)]
pub struct EncoderConfig {
    /// Width in pixels, even, [`MIN_SIDE`] to [`MAX_SIDE`].
    pub width: u32,
    /// Height in pixels, even, [`MIN_SIDE`] to [`MAX_SIDE`].
    pub height: u32,
    /// Highest picture rate, pictures per second, 1 to [`MAX_FPS`]. Fewer may come; the rate control budgets for this.
    pub fps: u32,
    /// Bit rate to start with, bits per second.
    pub bitrate_bps: u64,
    /// Lowest bit rate, bits per second; lower wishes are raised to it.
    pub min_bps: u64,
    /// Highest bit rate, bits per second; higher wishes are lowered to it.
    pub max_bps: u64,
    /// Which encoder.
    pub kind: EncoderKind,
}

impl EncoderConfig {
    /// A configuration with the default limits for size and rate, starting in their middle.
    pub fn new(width: u32, height: u32, fps: u32) -> EncoderConfig {
        let (min_kbps, max_kbps) = limits(width, height, fps);
        let (min_bps, max_bps) = (u64::from(min_kbps) * 1000, u64::from(max_kbps) * 1000);
        let bitrate_bps = (min_bps + max_bps) / 2;
        EncoderConfig { width, height, fps, bitrate_bps, min_bps, max_bps, kind: EncoderKind::Auto }
    }

    fn check(&self) -> Result<(), EncodeError> {
        let (width, height, fps) = (self.width, self.height, self.fps);
        let side = MIN_SIDE..=MAX_SIDE;
        if !side.contains(&width) || !side.contains(&height) || width % 2 == 1 || height % 2 == 1 {
            return Err(EncodeError::Size { width, height });
        }
        if !(1..=MAX_FPS).contains(&fps) {
            return Err(EncodeError::Rate { fps });
        }
        if self.min_bps == 0 || self.min_bps > self.max_bps || self.max_bps > MAX_BPS {
            return Err(EncodeError::Limits { min_bps: self.min_bps, max_bps: self.max_bps });
        }
        Ok(())
    }

    fn clamp(&self, bps: u64) -> u64 {
        bps.clamp(self.min_bps, self.max_bps)
    }
}

/// Highest bit rate any encoder is asked for, bits per second; fits the 32 bits some of them count in.
const MAX_BPS: u64 = 1_000_000_000;

/// Why a picture, an encoder or a rate was refused.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// Odd, too small or too large.
    #[error(
        "size {width}x{height} cannot be encoded: width and height must be even, {MIN_SIDE} to {MAX_SIDE} pixels"
    )]
    Size {
        /// Width asked for.
        width: u32,
        /// Height asked for.
        height: u32,
    },
    /// Zero or too high.
    #[error("a frame rate of {fps} cannot be encoded, 1 to {MAX_FPS} can")]
    Rate {
        /// Rate asked for.
        fps: u32,
    },
    /// The rate limits contradict each other.
    #[error("bit rate limits {min_bps} to {max_bps} bit/s are not possible")]
    Limits {
        /// Lower limit.
        min_bps: u64,
        /// Upper limit.
        max_bps: u64,
    },
    /// The picture is not of the size the encoder was made for.
    #[error("picture of {width}x{height}, the encoder was made for {}x{}", expected.0, expected.1)]
    OtherSize {
        /// Width of the picture.
        width: u32,
        /// Height of the picture.
        height: u32,
        /// Width and height of the encoder.
        expected: (u32, u32),
    },
    /// A plane has fewer bytes than its size and stride say.
    #[error("plane {plane} of the picture has {bytes} bytes, {needed} are needed")]
    ShortPlane {
        /// Index of the plane.
        plane: usize,
        /// Its bytes.
        bytes: usize,
        /// What its size needs.
        needed: usize,
    },
    /// This build has no such encoder.
    #[error("encoder {kind:?} is not part of this build")]
    NotBuilt {
        /// The one asked for.
        kind: EncoderKind,
    },
    /// The encoder itself refused.
    #[error("{encoder}: {what}: {reason}")]
    Codec {
        /// Its name.
        encoder: &'static str,
        /// What was tried.
        what: &'static str,
        /// Its own words.
        reason: String,
    },
}

/// A running encoder. Made by [`create`]; one picture in gives at most one coded picture out, at once.
pub trait Encoder: Send {
    /// Encodes a picture captured at `captured`; `force_key` makes it a key frame. The first one always is.
    ///
    /// `None` means that the encoder skipped the picture to hold its rate.
    ///
    /// # Errors
    /// When the picture does not fit the configuration, or the encoder fails; then it should be made anew.
    fn encode(
        &mut self,
        picture: PictureRef<'_>,
        captured: Instant,
        force_key: bool,
    ) -> Result<Option<AccessUnit>, EncodeError>;

    /// Changes the bit rate from the next picture on, without a key frame. Clamped to the configured limits.
    ///
    /// # Errors
    /// When the encoder refuses; the old rate stays.
    fn set_bitrate(&mut self, bps: u64) -> Result<(), EncodeError>;

    /// Name for people and statistics, with the settings that matter.
    fn name(&self) -> &str;

    /// The codec of what comes out.
    fn codec(&self) -> VideoCodec;
}

/// Encoders of this build, best first.
pub fn built() -> &'static [EncoderKind] {
    &[
        #[cfg(feature = "x264")]
        EncoderKind::X264,
        #[cfg(feature = "openh264")]
        EncoderKind::OpenH264,
    ]
}

/// Makes an encoder.
///
/// # Errors
/// When the configuration is impossible, the encoder is not part of this build, or it does not open.
pub fn create(config: &EncoderConfig) -> Result<Box<dyn Encoder>, EncodeError> {
    config.check()?;
    let kind = match config.kind {
        EncoderKind::Auto => built().first().copied().unwrap_or(EncoderKind::Auto),
        kind => kind,
    };
    match kind {
        #[cfg(feature = "x264")]
        EncoderKind::X264 => Ok(Box::new(x264::X264::new(config)?)),
        #[cfg(feature = "openh264")]
        EncoderKind::OpenH264 => Ok(Box::new(openh264::OpenH264::new(config)?)),
        #[allow(unreachable_patterns)]
        kind => Err(EncodeError::NotBuilt { kind }),
    }
}
