//! From samples to Opus packets: frames of 10 ms, a steady clock, nothing for silence.

use std::time::{Duration, Instant};

use bytes::Bytes;
use opus::{Application, Bitrate, Channels, Encoder};

/// Samples a second, per channel; WebRTC's Opus knows no other (RFC 7587).
pub const RATE: u32 = 48_000;
/// Left and right.
pub const CHANNELS: usize = 2;
/// Samples of one frame, per channel: 10 ms.
const FRAME: usize = RATE as usize / 100;
const FRAME_TIME: Duration = Duration::from_millis(10);
/// Bits per second.
const BITRATE: i32 = 128_000;
/// Largest packet, bytes; 128 kbit/s fill 160.
const PACKET_BYTES: usize = 1275;
/// So many silent frames are still sent, so that the sound fades out and does not break off.
const FADE_FRAMES: u32 = 20;
/// When the clock of the samples is this far from ours, samples were lost or held up, and it is set anew.
const DRIFT: Duration = Duration::from_millis(60);

/// One packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// When its first sample was captured.
    pub captured: Instant,
    /// Opus.
    pub data: Bytes,
}

/// The coder of one recording.
#[derive(Debug)]
pub struct Coder {
    encoder: Encoder,
    waiting: Vec<i16>,
    /// Capture time of the first sample in `waiting`.
    clock: Option<Instant>,
    silent: u32,
}

impl Coder {
    /// A coder for 48 kHz stereo.
    ///
    /// # Errors
    /// When libopus refuses, which it does not for these settings.
    pub fn new() -> Result<Self, opus::Error> {
        let mut encoder = Encoder::new(RATE, Channels::Stereo, Application::LowDelay)?;
        encoder.set_bitrate(Bitrate::Bits(BITRATE))?;
        encoder.set_inband_fec(true)?;
        encoder.set_packet_loss_perc(5)?;
        Ok(Self {
            encoder,
            waiting: Vec::with_capacity(FRAME * CHANNELS * 4),
            clock: None,
            silent: FADE_FRAMES,
        })
    }

    /// Takes samples (left, right, left, …) of which the last was captured at `now`.
    pub fn push(&mut self, now: Instant, samples: &[i16], mut packet: impl FnMut(Packet)) {
        self.waiting.extend_from_slice(samples);
        let length = Duration::from_secs(1) * (self.waiting.len() / CHANNELS) as u32 / RATE;
        let measured = now.checked_sub(length).unwrap_or(now);
        let kept = self.clock.filter(|clock| {
            let early = measured.saturating_duration_since(*clock);
            let late = clock.saturating_duration_since(measured);
            early.max(late) < DRIFT
        });
        let mut clock = kept.unwrap_or(measured);
        let mut taken = 0;
        while self.waiting.len() - taken >= FRAME * CHANNELS {
            let frame = &self.waiting[taken..taken + FRAME * CHANNELS];
            taken += FRAME * CHANNELS;
            let silent = frame.iter().all(|sample| *sample == 0);
            self.silent = if silent { self.silent.saturating_add(1) } else { 0 };
            if self.silent <= FADE_FRAMES {
                let mut data = vec![0; PACKET_BYTES];
                // A frame that cannot be coded is one that was lost; Opus conceals it.
                if let Ok(length) = self.encoder.encode(frame, &mut data) {
                    data.truncate(length);
                    packet(Packet { captured: clock, data: data.into() });
                }
            }
            clock += FRAME_TIME;
        }
        self.waiting.drain(..taken);
        self.clock = Some(clock);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tone(frames: usize) -> Vec<i16> {
        (0..frames * FRAME * CHANNELS).map(|n| ((n as f64 / 30.0).sin() * 9000.0) as i16).collect()
    }

    #[test]
    fn sound_becomes_packets_of_10_ms_on_a_steady_clock() {
        let mut coder = Coder::new().expect("libopus");
        let start = Instant::now();
        let mut packets = Vec::new();
        let samples = tone(10);
        let mut given = 0;
        // In odd pieces that arrive a little early and late.
        for (n, piece) in samples.chunks(700).enumerate() {
            given += piece.len() / CHANNELS;
            let jitter = Duration::from_millis(if n % 2 == 0 { 5 } else { 0 });
            let now = start + Duration::from_secs(1) * given as u32 / RATE + jitter;
            coder.push(now, piece, |packet| packets.push(packet));
        }
        assert_eq!(packets.len(), 10);
        for pair in packets.windows(2) {
            assert_eq!(pair[1].captured - pair[0].captured, FRAME_TIME);
        }
        assert!(packets.iter().all(|packet| packet.data.len() > 20 && packet.data.len() < 400));
        let mut decoder = opus::Decoder::new(RATE, Channels::Stereo).expect("libopus");
        let mut heard = vec![0; FRAME * CHANNELS];
        for packet in &packets {
            assert_eq!(decoder.decode(&packet.data, &mut heard, false).expect("decodes"), FRAME);
        }
        assert!(heard.iter().any(|sample| sample.abs() > 3000));
    }

    #[test]
    fn silence_is_not_sent_and_sound_after_it_is() {
        let mut coder = Coder::new().expect("libopus");
        let mut now = Instant::now();
        let mut sent = 0;
        let mut push = |coder: &mut Coder, samples: &[i16]| {
            sent = 0;
            now += Duration::from_millis(10);
            coder.push(now, samples, |_| sent += 1);
            sent
        };
        let silence = vec![0; FRAME * CHANNELS];
        assert_eq!((0..50).map(|_| push(&mut coder, &silence)).sum::<u32>(), 0, "silent from the start");
        assert_eq!(push(&mut coder, &tone(1)), 1);
        assert_eq!((0..50).map(|_| push(&mut coder, &silence)).sum::<u32>(), FADE_FRAMES);
    }

    #[test]
    fn a_hole_sets_the_clock_anew() {
        let mut coder = Coder::new().expect("libopus");
        let start = Instant::now();
        let mut times = Vec::new();
        coder.push(start + FRAME_TIME, &tone(1), |packet| times.push(packet.captured));
        coder.push(start + Duration::from_secs(3) + FRAME_TIME, &tone(1), |packet| {
            times.push(packet.captured)
        });
        assert_eq!(times, [start, start + Duration::from_secs(3)]);
    }
}
