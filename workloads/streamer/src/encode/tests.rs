//! One suite, run over every encoder of this build; an independent decoder looks at what comes out.

use std::ffi::c_int;
use std::time::Instant;

use ffmpeg_sys_next as ff;

use super::*;

/// A picture that owns its planes, rows directly after each other.
#[derive(Clone)]
struct Picture {
    width: u32,
    height: u32,
    planes: [Vec<u8>; 3],
}

impl Picture {
    /// A soft gradient with a bright box at `step`: like a window moving over a desktop.
    fn scene(width: u32, height: u32, step: u32) -> Picture {
        let (columns, rows) = (width as usize, height as usize);
        let mut luma = vec![0; columns * rows];
        for row in 0..rows {
            for column in 0..columns {
                luma[row * columns + column] = (40 + (row + column / 2) % 128) as u8;
            }
        }
        let left = (step as usize * 8) % (columns / 2);
        for row in rows / 4..rows / 2 {
            luma[row * columns + left..][..columns / 4].fill(220);
        }
        let chroma = vec![(100 + step % 40) as u8; columns / 2 * (rows / 2)];
        Picture { width, height, planes: [luma, chroma.clone(), chroma] }
    }

    /// Full of edges that no earlier picture predicts: the worst case for the rate control.
    fn noise(width: u32, height: u32, seed: u32) -> Picture {
        // Tiles rather than pixels, so that a coarse quantiser still has something to save.
        const TILE: usize = 12;
        let mut state = seed.wrapping_mul(2_654_435_761).max(1);
        let mut plane = |columns: usize, rows: usize| -> Vec<u8> {
            let tiles = columns.div_ceil(TILE);
            let mut values = vec![0u8; tiles * rows.div_ceil(TILE)];
            for value in &mut values {
                state ^= state << 13;
                state ^= state >> 17;
                state ^= state << 5;
                *value = (16 + state % 200) as u8;
            }
            let at = |index: usize| values[index / columns / TILE * tiles + index % columns / TILE];
            (0..columns * rows).map(at).collect()
        };
        let (columns, rows) = (width as usize, height as usize);
        let luma = plane(columns, rows);
        Picture { width, height, planes: [luma, plane(columns / 2, rows / 2), plane(columns / 2, rows / 2)] }
    }

    fn borrow(&self) -> PictureRef<'_> {
        let stride = self.width as usize;
        PictureRef {
            width: self.width,
            height: self.height,
            planes: [&self.planes[0], &self.planes[1], &self.planes[2]],
            strides: [stride, stride / 2, stride / 2],
        }
    }

    /// Peak signal to noise ratio of the luma plane, dB.
    fn psnr(&self, other: &Picture) -> f64 {
        let squares: f64 = self.planes[0]
            .iter()
            .zip(&other.planes[0])
            .map(|(a, b)| f64::from(i16::from(*a) - i16::from(*b)).powi(2))
            .sum();
        let mean = squares / self.planes[0].len() as f64;
        10.0 * (255.0f64.powi(2) / mean.max(1e-9)).log10()
    }
}

/// libavcodec's own H.264 decoder.
struct Decoder {
    context: *mut ff::AVCodecContext,
    frame: *mut ff::AVFrame,
    packet: *mut ff::AVPacket,
}

impl Decoder {
    fn new() -> Decoder {
        // SAFETY: look-up by id, then allocation and opening of objects that are ours.
        unsafe {
            let codec = ff::avcodec_find_decoder(ff::AVCodecID::AV_CODEC_ID_H264);
            let context = ff::avcodec_alloc_context3(codec);
            (*context).flags |= ff::AV_CODEC_FLAG_LOW_DELAY as c_int;
            (*context).thread_count = 1;
            assert!(ff::avcodec_open2(context, codec, std::ptr::null_mut()) >= 0);
            Decoder { context, frame: ff::av_frame_alloc(), packet: ff::av_packet_alloc() }
        }
    }

    fn decode(&mut self, unit: &AccessUnit) -> Picture {
        // The decoder may read past the end by so much.
        let mut padded = unit.data.to_vec();
        padded.resize(unit.data.len() + ff::AV_INPUT_BUFFER_PADDING_SIZE as usize, 0);
        // SAFETY: the packet borrows `padded`, which outlives the call that reads it; the frame's planes are read
        // within the sizes it states.
        unsafe {
            (*self.packet).data = padded.as_mut_ptr();
            (*self.packet).size = unit.data.len() as c_int;
            assert!(ff::avcodec_send_packet(self.context, self.packet) >= 0);
            assert_eq!(
                ff::avcodec_receive_frame(self.context, self.frame),
                0,
                "one unit in, one picture out"
            );
            let frame = &*self.frame;
            assert_eq!(frame.colorspace, ff::AVColorSpace::AVCOL_SPC_BT709);
            assert_eq!(frame.color_range, ff::AVColorRange::AVCOL_RANGE_MPEG);
            let (width, height) = (frame.width as u32, frame.height as u32);
            let plane = |index: usize| {
                let shift = u32::from(index > 0);
                let (columns, rows) = ((width >> shift) as usize, (height >> shift) as usize);
                let mut out = Vec::with_capacity(columns * rows);
                for row in 0..rows {
                    let start = frame.data[index].offset(row as isize * frame.linesize[index] as isize);
                    out.extend_from_slice(std::slice::from_raw_parts(start, columns));
                }
                out
            };
            Picture { width, height, planes: [plane(0), plane(1), plane(2)] }
        }
    }
}

impl Drop for Decoder {
    fn drop(&mut self) {
        // SAFETY: each object is freed once.
        unsafe {
            ff::av_packet_free(&mut self.packet);
            ff::av_frame_free(&mut self.frame);
            ff::avcodec_free_context(&mut self.context);
        }
    }
}

fn each(mut test: impl FnMut(EncoderKind)) {
    assert!(!built().is_empty(), "a streamer without an encoder is of no use");
    for kind in built() {
        test(*kind);
    }
}

fn config(kind: EncoderKind, width: u32, height: u32) -> EncoderConfig {
    EncoderConfig {
        bitrate_bps: 2_000_000,
        min_bps: 300_000,
        max_bps: 8_000_000,
        kind,
        ..EncoderConfig::new(width, height, 60)
    }
}

fn encode(encoder: &mut dyn Encoder, picture: &Picture, force_key: bool) -> AccessUnit {
    encoder.encode(picture.borrow(), Instant::now(), force_key).expect("encodes").expect("gives a picture")
}

fn kinds(unit: &AccessUnit) -> Vec<u8> {
    annexb::units(&unit.data).map(|(kind, _)| kind).collect()
}

#[test]
fn pictures_come_back_from_the_decoder_as_they_were() {
    each(|kind| {
        for (width, height) in [(640, 360), (1280, 720), (322, 198)] {
            let mut encoder = create(&config(kind, width, height)).expect("opens");
            let mut decoder = Decoder::new();
            for step in 0..20 {
                let picture = Picture::scene(width, height, step);
                let unit = encode(&mut *encoder, &picture, false);
                let decoded = decoder.decode(&unit);
                assert_eq!((decoded.width, decoded.height), (width, height));
                let psnr = picture.psnr(&decoded);
                assert!(step < 10 || psnr > 30.0, "{kind:?} {width}x{height} picture {step}: {psnr:.1} dB");
            }
        }
    });
}

#[test]
fn only_the_first_and_forced_pictures_are_key_frames_and_they_carry_their_parameters() {
    each(|kind| {
        let mut encoder = create(&config(kind, 640, 360)).expect("opens");
        for step in 0..400 {
            let forced = [100, 101, 250].contains(&step);
            // A complete change of scene now and then, which must not make a key frame on its own.
            let picture = Picture::scene(640, 360, step + 1000 * (step / 50));
            let unit = encode(&mut *encoder, &picture, forced);
            let kinds = kinds(&unit);
            assert_eq!(unit.key, step == 0 || forced, "{kind:?} picture {step}");
            assert_eq!(kinds.contains(&5), unit.key, "{kind:?} picture {step}: {kinds:?}");
            assert_eq!(kinds.starts_with(&[7, 8]), unit.key, "{kind:?} picture {step}: {kinds:?}");
            assert!(!kinds.contains(&6) && !kinds.contains(&9), "{kind:?} picture {step}: {kinds:?}");
        }
    });
}

#[test]
fn the_profile_is_constrained_baseline_and_a_decoder_can_join_at_a_forced_key_frame() {
    each(|kind| {
        let mut encoder = create(&config(kind, 640, 360)).expect("opens");
        let first = encode(&mut *encoder, &Picture::scene(640, 360, 0), false);
        let (_, parameters) = annexb::units(&first.data).find(|(kind, _)| *kind == 7).expect("parameters");
        // After start code and unit header: the profile, then its constraints, of which the second is set.
        let header = parameters.iter().position(|byte| *byte == 1).expect("start code") + 2;
        assert_eq!(parameters[header], 66, "{kind:?}: baseline");
        assert_ne!(parameters[header + 1] & 0x40, 0, "{kind:?}: constrained");
        for step in 1..10 {
            encode(&mut *encoder, &Picture::scene(640, 360, step), false);
        }
        let mut decoder = Decoder::new();
        let joined = encode(&mut *encoder, &Picture::scene(640, 360, 10), true);
        assert_eq!(decoder.decode(&joined).width, 640);
    });
}

#[test]
fn a_new_rate_is_followed_within_ten_pictures_and_without_a_key_frame() {
    each(|kind| {
        let mut encoder = create(&config(kind, 320, 180)).expect("opens");
        encoder.set_bitrate(3_000_000).expect("takes the rate");
        let mut seed = 0;
        let mut average = |encoder: &mut dyn Encoder, pictures: usize| {
            let mut bytes = 0;
            for _ in 0..pictures {
                seed += 1;
                let picture = Picture::noise(320, 180, seed);
                if let Some(unit) = encoder.encode(picture.borrow(), Instant::now(), false).expect("encodes")
                {
                    assert!(!unit.key || seed == 1, "{kind:?} picture {seed} is a key frame");
                    bytes += unit.data.len();
                }
            }
            bytes * 8 * 60 / pictures
        };
        average(&mut *encoder, 30);
        let before = average(&mut *encoder, 30);
        encoder.set_bitrate(750_000).expect("takes the rate");
        average(&mut *encoder, 10);
        let after = average(&mut *encoder, 30);
        assert!(after < before / 2, "{kind:?}: {before} then {after} bit/s");
        encoder.set_bitrate(3_000_000).expect("takes the rate");
        average(&mut *encoder, 10);
        let again = average(&mut *encoder, 30);
        assert!(again * 10 > after * 13, "{kind:?}: {after} then {again} bit/s");
    });
}

#[test]
fn the_lowest_rates_still_give_a_moving_picture() {
    each(|kind| {
        let mut encoder = create(&config(kind, 1280, 720)).expect("opens");
        let mut decoder = Decoder::new();
        let mut worst = f64::MAX;
        for step in 0..240 {
            if step % 30 == 0 {
                encoder
                    .set_bitrate([3_000_000, 1_000_000, 600_000, 300_000][(step as usize / 30).min(3)])
                    .expect("takes it");
            }
            let picture = Picture::scene(1280, 720, step * 3);
            let psnr = picture.psnr(&decoder.decode(&encode(&mut *encoder, &picture, false)));
            if step >= 180 {
                worst = worst.min(psnr);
            }
        }
        // A box of one sixteenth of the picture that stays where it was 30 pictures ago gives some 17 dB.
        assert!(worst > 20.0, "{kind:?}: {worst:.1} dB");
    });
}

#[test]
fn a_still_picture_gets_finer_when_it_is_repeated() {
    each(|kind| {
        let mut encoder = create(&config(kind, 640, 360)).expect("opens");
        let mut decoder = Decoder::new();
        let picture = Picture::noise(640, 360, 7);
        let first = picture.psnr(&decoder.decode(&encode(&mut *encoder, &picture, false)));
        let mut last = first;
        for _ in 0..40 {
            last = picture.psnr(&decoder.decode(&encode(&mut *encoder, &picture, false)));
        }
        // An encoder without a rate buffer is fine from the start.
        assert!(
            last > first + 3.0 || first > 35.0,
            "{kind:?}: {first:.1} dB at first, {last:.1} dB in the end"
        );
    });
}

#[test]
fn rows_may_be_longer_than_the_picture() {
    each(|kind| {
        let picture = Picture::scene(320, 180, 3);
        let stride = 512;
        let planes: Vec<Vec<u8>> = picture
            .planes
            .iter()
            .enumerate()
            .map(|(index, plane)| {
                let columns = if index == 0 { 320 } else { 160 };
                plane
                    .chunks(columns)
                    .flat_map(|row| row.iter().copied().chain(vec![255; stride - columns]))
                    .collect()
            })
            .collect();
        let padded = PictureRef {
            width: 320,
            height: 180,
            planes: [&planes[0], &planes[1], &planes[2]],
            strides: [stride; 3],
        };
        let mut encoder = create(&config(kind, 320, 180)).expect("opens");
        let unit = encoder.encode(padded, Instant::now(), false).expect("encodes").expect("gives a picture");
        assert!(picture.psnr(&Decoder::new().decode(&unit)) > 25.0, "{kind:?}");
    });
}

#[test]
fn impossible_configurations_are_refused_in_words() {
    each(|kind| {
        for (width, height) in [(641, 360), (640, 361), (0, 0), (8, 360), (640, 8194), (u32::MAX, 2)] {
            let error =
                create(&EncoderConfig { width, height, ..config(kind, 640, 360) }).err().expect("refused");
            assert!(error.to_string().contains(&format!("{width}x{height}")), "{error}");
        }
        for fps in [0, MAX_FPS + 1, u32::MAX] {
            let error = create(&EncoderConfig { fps, ..config(kind, 640, 360) }).err().expect("refused");
            assert!(matches!(error, EncodeError::Rate { .. }), "{error}");
        }
        for (min_bps, max_bps) in [(0, 1), (2, 1), (1, u64::MAX)] {
            let error = create(&EncoderConfig { min_bps, max_bps, ..config(kind, 640, 360) }).err();
            assert!(matches!(error, Some(EncodeError::Limits { .. })), "{min_bps} {max_bps}");
        }
    });
}

#[test]
fn pictures_that_do_not_fit_are_refused_and_the_encoder_goes_on() {
    each(|kind| {
        let mut encoder = create(&config(kind, 640, 360)).expect("opens");
        let right = Picture::scene(640, 360, 0);
        let other = Picture::scene(320, 180, 0);
        let error = encoder.encode(other.borrow(), Instant::now(), false).expect_err("another size");
        assert!(matches!(error, EncodeError::OtherSize { width: 320, .. }), "{error}");
        for plane in 0..3 {
            let mut short = right.borrow();
            short.planes[plane] = &short.planes[plane][1..];
            let error = encoder.encode(short, Instant::now(), false).expect_err("a short plane");
            assert!(matches!(error, EncodeError::ShortPlane { .. }), "{error}");
            let mut narrow = right.borrow();
            narrow.strides[plane] = 1;
            assert!(encoder.encode(narrow, Instant::now(), false).is_err(), "a stride below the width");
        }
        assert!(encode(&mut *encoder, &right, false).key);
    });
}

#[test]
fn rates_outside_the_limits_are_clamped() {
    each(|kind| {
        let mut encoder = create(&config(kind, 640, 360)).expect("opens");
        for bps in [0, 1, u64::MAX] {
            encoder.set_bitrate(bps).expect("takes any wish");
            encode(&mut *encoder, &Picture::noise(640, 360, 1), false);
        }
    });
}

#[test]
fn an_encoder_that_was_not_built_is_named() {
    for kind in [EncoderKind::X264, EncoderKind::OpenH264] {
        if !built().contains(&kind) {
            let error = create(&config(kind, 640, 360)).err().expect("not built");
            assert!(matches!(error, EncodeError::NotBuilt { .. }), "{error}");
        }
    }
}
