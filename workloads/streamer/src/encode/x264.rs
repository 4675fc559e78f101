//! libx264 through libavcodec.
//!
//! Baseline without arithmetic coding, because that is the profile every browser takes and the description announces.
//! Starts with the preset `superfast` up to 1280×720 at 60 pictures per second and with `ultrafast` above. When
//! pictures keep taking more than half of their time, the encoder is opened again with less to do: first `ultrafast`,
//! then two slice threads. Each such step costs one key frame; there is no way back, so that it cannot swing.

use std::ffi::{CStr, CString, c_int};
use std::ptr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use ffmpeg_sys_next as ff;

use super::{
    AccessUnit, EncodeError, Encoder, EncoderConfig, FINE_QUANTISER, PictureRef, VideoCodec, annexb,
};

const NAME: &str = "libx264";
/// Window of the rate control's buffer: 33 ms, or one picture where pictures are slower.
const BUFFER_HZ: u32 = 30;
/// The buffer has at least so many bits for each macroblock. With less, the encoder mispredicts the size of every
/// row and sends empty pictures one after the other; 8 were too few, 12 were enough (measured at 720p).
const BUFFER_BITS_PER_BLOCK: u64 = 12;
/// Pictures with 1280×720 at 60 Hz per second and fewer start with the better preset.
const SUPERFAST_PIXELS_PER_SECOND: u64 = 1280 * 720 * 60;
/// More pixels than these start with two slice threads.
const ONE_THREAD_PIXELS: u64 = 1280 * 720;
/// A picture may take this long before a second thread helps.
const ONE_THREAD_TIME: Duration = Duration::from_millis(8);
/// Pictures watched before a step is taken.
const WATCHED: u32 = 90;

/// How much work a picture may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Effort {
    preset: &'static CStr,
    threads: c_int,
}

pub(super) struct X264 {
    config: EncoderConfig,
    bitrate_bps: u64,
    effort: Effort,
    codec: Codec,
    name: String,
    next_pts: i64,
    watch: Watch,
    cores: usize,
}

impl X264 {
    pub(super) fn new(config: &EncoderConfig) -> Result<X264, EncodeError> {
        let pixels = u64::from(config.width) * u64::from(config.height);
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
        let effort = Effort {
            preset: if pixels * u64::from(config.fps) <= SUPERFAST_PIXELS_PER_SECOND {
                c"superfast"
            } else {
                c"ultrafast"
            },
            threads: if pixels > ONE_THREAD_PIXELS && cores > 1 { 2 } else { 1 },
        };
        let bitrate_bps = config.clamp(config.bitrate_bps);
        let codec = Codec::open(config, bitrate_bps, effort)?;
        Ok(X264 {
            config: config.clone(),
            bitrate_bps,
            effort,
            codec,
            name: name(effort),
            next_pts: 0,
            watch: Watch::default(),
            cores,
        })
    }

    /// Opens the encoder again with less to do, when pictures take too long and there is a step left.
    ///
    /// `busy` is the share of `took` that this thread really ran. A short crowd on the machine is no reason for a key
    /// frame; a lasting one is, when pictures do not come out in time at all.
    fn ease(&mut self, took: Duration, busy: Duration) -> Result<(), EncodeError> {
        let interval = Duration::from_secs(1) / self.config.fps;
        let half = interval / 2;
        let limit = match self.effort {
            Effort { preset, .. } if preset == c"superfast" => half,
            Effort { threads: 1, .. } if self.cores > 1 => ONE_THREAD_TIME.min(half),
            _ => return Ok(()),
        };
        if !self.watch.slow(busy > limit || took > interval) {
            return Ok(());
        }
        if self.effort.preset == c"superfast" {
            self.effort.preset = c"ultrafast";
        } else {
            self.effort.threads = 2;
        }
        self.codec = Codec::open(&self.config, self.bitrate_bps, self.effort)?;
        self.name = name(self.effort);
        self.next_pts = 0;
        tracing::info!(encoder = self.name, "pictures take too long to encode, continuing with less effort");
        Ok(())
    }
}

impl Encoder for X264 {
    fn encode(
        &mut self,
        picture: PictureRef<'_>,
        captured: Instant,
        force_key: bool,
    ) -> Result<Option<AccessUnit>, EncodeError> {
        picture.check(self.config.width, self.config.height)?;
        let (start, busy) = (Instant::now(), thread_time());
        let pts = self.next_pts;
        self.next_pts += 1;
        let Some(packet) = self.codec.encode(picture, pts, force_key)? else { return Ok(None) };
        let took = start.elapsed();
        self.ease(took, thread_time().saturating_sub(busy))?;
        Ok(Some(AccessUnit {
            data: packet.data,
            key: packet.key,
            captured,
            took,
            quantiser: packet.quantiser,
        }))
    }

    fn set_bitrate(&mut self, bps: u64) -> Result<(), EncodeError> {
        self.bitrate_bps = self.config.clamp(bps);
        self.codec.set_bitrate(self.bitrate_bps, self.config.fps);
        Ok(())
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn codec(&self) -> VideoCodec {
        VideoCodec::H264
    }
}

fn name(effort: Effort) -> String {
    let threads = if effort.threads > 1 { ", 2 threads" } else { "" };
    format!("{NAME} {}{threads}", effort.preset.to_string_lossy())
}

/// Counts slow pictures over a window.
#[derive(Debug, Default)]
struct Watch {
    seen: u32,
    slow: u32,
}

impl Watch {
    /// Whether most pictures of a full window were slow, this one included.
    fn slow(&mut self, this: bool) -> bool {
        self.seen += 1;
        self.slow += u32::from(this);
        if self.seen < WATCHED {
            return false;
        }
        let slow = self.slow * 3 > self.seen * 2;
        *self = Watch::default();
        slow
    }
}

struct Packet {
    data: Bytes,
    key: bool,
    quantiser: Option<u8>,
}

/// The three libavcodec objects of an open encoder.
struct Codec {
    context: *mut ff::AVCodecContext,
    frame: *mut ff::AVFrame,
    packet: *mut ff::AVPacket,
    least_buffer_bits: u64,
}

// SAFETY: the objects are owned by this value alone and libavcodec ties none of them to a thread.
unsafe impl Send for Codec {}

impl Codec {
    fn open(config: &EncoderConfig, bitrate_bps: u64, effort: Effort) -> Result<Codec, EncodeError> {
        quiet_libavcodec();
        // SAFETY: plain look-up by a static name.
        let encoder = unsafe { ff::avcodec_find_encoder_by_name(c"libx264".as_ptr()) };
        if encoder.is_null() {
            let reason = "this libavcodec was built without it".into();
            return Err(EncodeError::Codec { encoder: NAME, what: "looking for the encoder", reason });
        }
        let blocks = u64::from(config.width.div_ceil(16)) * u64::from(config.height.div_ceil(16));
        // SAFETY: `encoder` is a static object of libavcodec; the three allocators need nothing.
        let codec = unsafe {
            Codec {
                context: ff::avcodec_alloc_context3(encoder),
                frame: ff::av_frame_alloc(),
                packet: ff::av_packet_alloc(),
                least_buffer_bits: blocks * BUFFER_BITS_PER_BLOCK,
            }
        };
        if codec.context.is_null() || codec.frame.is_null() || codec.packet.is_null() {
            let reason = "out of memory".into();
            return Err(EncodeError::Codec { encoder: NAME, what: "allocating", reason });
        }
        let (width, height) = (config.width as c_int, config.height as c_int);
        // SAFETY: all three objects were just allocated and are ours; the fields are set before the context is opened,
        // as libavcodec asks.
        unsafe {
            let context = &mut *codec.context;
            context.width = width;
            context.height = height;
            context.pix_fmt = ff::AVPixelFormat::AV_PIX_FMT_YUV420P;
            context.time_base = ff::AVRational { num: 1, den: config.fps as c_int };
            context.framerate = ff::AVRational { num: config.fps as c_int, den: 1 };
            context.color_range = ff::AVColorRange::AVCOL_RANGE_MPEG;
            context.colorspace = ff::AVColorSpace::AVCOL_SPC_BT709;
            context.color_primaries = ff::AVColorPrimaries::AVCOL_PRI_BT709;
            context.color_trc = ff::AVColorTransferCharacteristic::AVCOL_TRC_BT709;
            context.max_b_frames = 0;
            context.thread_count = effort.threads;
            context.thread_type = ff::FF_THREAD_SLICE as c_int;
            context.qmin = c_int::from(FINE_QUANTISER) - 2;
            let frame = &mut *codec.frame;
            frame.width = width;
            frame.height = height;
            frame.format = ff::AVPixelFormat::AV_PIX_FMT_YUV420P as c_int;
        }
        let mut codec = codec;
        codec.set_bitrate(bitrate_bps, config.fps);
        codec.option(c"preset", effort.preset)?;
        codec.option(c"tune", c"zerolatency")?;
        codec.option(c"profile", c"baseline")?;
        codec.option(c"forced-idr", c"1")?;
        // Key frames come on request alone. The open end of the interval must be spelled out here, libavcodec's own
        // field has no word for it.
        let parameters = CString::new("keyint=infinite:scenecut=0:aud=0:nal-hrd=none:repeat-headers=1")
            .expect("the text has no zero byte");
        codec.option(c"x264-params", &parameters)?;
        // SAFETY: context and encoder belong together; the frame has its size and format.
        unsafe {
            check(ff::avcodec_open2(codec.context, encoder, ptr::null_mut()), "opening")?;
            check(ff::av_frame_get_buffer(codec.frame, 0), "allocating a picture")?;
        }
        Ok(codec)
    }

    fn option(&mut self, key: &CStr, value: &CStr) -> Result<(), EncodeError> {
        // SAFETY: the private options of the unopened context, two terminated strings.
        let set = unsafe { ff::av_opt_set((*self.context).priv_data, key.as_ptr(), value.as_ptr(), 0) };
        check(set, "setting an option")
    }

    /// libavcodec compares these fields with the encoder's before every picture and reconfigures it in place.
    fn set_bitrate(&mut self, bps: u64, fps: u32) {
        let buffer = (bps / u64::from(fps.min(BUFFER_HZ))).max(self.least_buffer_bits);
        // SAFETY: the context is ours, and these are plain numbers that may change while it is open.
        let context = unsafe { &mut *self.context };
        context.bit_rate = bps as i64;
        context.rc_max_rate = bps as i64;
        context.rc_buffer_size = buffer as c_int;
    }

    fn encode(
        &mut self,
        picture: PictureRef<'_>,
        pts: i64,
        force_key: bool,
    ) -> Result<Option<Packet>, EncodeError> {
        // SAFETY: the frame has buffers for the size `picture` was checked against; `make_writable` gives it new ones
        // if the encoder still holds the old. Every row copied lies inside both planes: the picture's by its check,
        // the frame's because its line size covers its width.
        unsafe {
            check(ff::av_frame_make_writable(self.frame), "preparing a picture")?;
            let frame = &mut *self.frame;
            for plane in 0..3 {
                let (columns, rows) = picture.plane_size(plane);
                let stride = picture.strides[plane];
                for row in 0..rows {
                    let source = &picture.planes[plane][row * stride..][..columns];
                    let target = frame.data[plane].offset(row as isize * frame.linesize[plane] as isize);
                    ptr::copy_nonoverlapping(source.as_ptr(), target, columns);
                }
            }
            frame.pts = pts;
            frame.pict_type = if force_key {
                ff::AVPictureType::AV_PICTURE_TYPE_I
            } else {
                ff::AVPictureType::AV_PICTURE_TYPE_NONE
            };
            check(ff::avcodec_send_frame(self.context, self.frame), "taking a picture")?;
            match ff::avcodec_receive_packet(self.context, self.packet) {
                again if again == ff::AVERROR(libc::EAGAIN) => return Ok(None),
                code => check(code, "giving a coded picture")?,
            }
        }
        // SAFETY: a packet was just received: its data is valid for its size until it is unreferenced below.
        unsafe {
            let packet = &*self.packet;
            let coded = std::slice::from_raw_parts(packet.data, packet.size as usize);
            let mut data = Vec::new();
            annexb::strip(coded, &mut data);
            let key = packet.flags & ff::AV_PKT_FLAG_KEY as c_int != 0;
            let quantiser = quantiser(self.packet);
            ff::av_packet_unref(self.packet);
            Ok(Some(Packet { data: Bytes::from(data), key, quantiser }))
        }
    }
}

impl Drop for Codec {
    fn drop(&mut self) {
        // SAFETY: each object is freed once; null is allowed.
        unsafe {
            ff::av_packet_free(&mut self.packet);
            ff::av_frame_free(&mut self.frame);
            ff::avcodec_free_context(&mut self.context);
        }
    }
}

/// The average quantiser the encoder noted beside a packet: the first 32 bits, in units of lambda.
///
/// # Safety
/// `packet` must hold a received packet.
unsafe fn quantiser(packet: *mut ff::AVPacket) -> Option<u8> {
    let mut size = 0;
    // SAFETY: the caller's packet; `size` is an out parameter of the type this version of libavcodec has.
    let stats = unsafe {
        let kind = ff::AVPacketSideDataType::AV_PKT_DATA_QUALITY_STATS;
        let data = ff::av_packet_get_side_data(packet, kind, &mut size);
        if data.is_null() || size < 4 {
            return None;
        }
        std::slice::from_raw_parts(data, 4)
    };
    let lambda = u32::from_le_bytes([stats[0], stats[1], stats[2], stats[3]]);
    u8::try_from(lambda / ff::FF_QP2LAMBDA as u32).ok()
}

/// How long the calling thread has run.
fn thread_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec; the clock exists on every Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// libavcodec prints to standard error on its own, statistics at every close included; errors are enough.
fn quiet_libavcodec() {
    // SAFETY: sets one number inside libavutil.
    unsafe { ff::av_log_set_level(ff::AV_LOG_ERROR as c_int) };
}

fn check(code: c_int, what: &'static str) -> Result<(), EncodeError> {
    if code >= 0 {
        return Ok(());
    }
    let mut text = [0; 128];
    // SAFETY: the buffer is as long as said; the function terminates what it writes.
    let reason = unsafe {
        ff::av_strerror(code, text.as_mut_ptr(), text.len());
        CStr::from_ptr(text.as_ptr()).to_string_lossy().into_owned()
    };
    Err(EncodeError::Codec { encoder: NAME, what, reason })
}
