//! Sound through PulseAudio, written by a thread of its own. An application without a sound server stays
//! silent and goes on: it says so once and tries again for a while, because the server may start after it.

use std::{thread, time::Duration};

use anyhow::{Context as _, Result, anyhow};
use libpulse_binding::{
    context::{self, Context},
    def::BufferAttr,
    mainloop::standard::{IterateResult, Mainloop},
    sample::{Format, Spec},
    stream::{self, SeekMode, Stream},
};

/// Frames per second.
pub const RATE: u32 = 48_000;

/// Fills a buffer of interleaved stereo samples.
pub type Source = Box<dyn FnMut(&mut [i16]) + Send>;

/// Plays `source` for as long as the process lives.
pub fn play(name: &'static str, mut source: Source) {
    thread::spawn(move || {
        for _ in 0..60 {
            if let Err(error) = session(name, &mut source) {
                eprintln!("{name}: no sound yet: {error:#}");
            }
            thread::sleep(Duration::from_secs(1));
        }
    });
}

/// One connection to the server; ends only when that is lost.
fn session(name: &str, source: &mut Source) -> Result<()> {
    let spec = Spec { format: Format::S16NE, channels: 2, rate: RATE };
    let mut mainloop = Mainloop::new().context("making a PulseAudio main loop")?;
    let mut context = Context::new(&mainloop, name).context("making a PulseAudio context")?;
    context
        .connect(None, context::FlagSet::NOAUTOSPAWN, None)
        .map_err(|error| anyhow!("connecting to PulseAudio: {error}"))?;
    loop {
        turn(&mut mainloop)?;
        match context.get_state() {
            context::State::Ready => break,
            context::State::Failed | context::State::Terminated => {
                return Err(anyhow!("connecting to PulseAudio: {}", context.errno()));
            }
            _ => {}
        }
    }
    let mut stream = Stream::new(&mut context, name, &spec, None).context("making a PulseAudio stream")?;
    // 80 ms ahead, refilled every 20 ms: few wake-ups and still prompt.
    let bytes = |milliseconds: u32| RATE / 1000 * milliseconds * 4;
    let attributes = BufferAttr {
        maxlength: u32::MAX,
        tlength: bytes(80),
        prebuf: bytes(40),
        minreq: bytes(20),
        fragsize: u32::MAX,
    };
    stream
        .connect_playback(None, Some(&attributes), stream::FlagSet::ADJUST_LATENCY, None, None)
        .map_err(|error| anyhow!("opening a playback stream: {error}"))?;
    let mut samples = Vec::new();
    let mut raw = Vec::new();
    loop {
        turn(&mut mainloop)?;
        match stream.get_state() {
            stream::State::Ready => {}
            stream::State::Failed | stream::State::Terminated => {
                return Err(anyhow!("the playback stream ended"));
            }
            _ => continue,
        }
        let writable = stream.writable_size().unwrap_or(0) / 4 * 2;
        if writable == 0 {
            continue;
        }
        samples.resize(writable, 0);
        source(&mut samples);
        raw.clear();
        raw.extend(samples.iter().flat_map(|sample| sample.to_ne_bytes()));
        stream
            .write_copy(&raw, 0, SeekMode::Relative)
            .map_err(|error| anyhow!("writing samples: {error}"))?;
    }
}

fn turn(mainloop: &mut Mainloop) -> Result<()> {
    match mainloop.iterate(true) {
        IterateResult::Success(_) => Ok(()),
        IterateResult::Quit(_) => Err(anyhow!("the PulseAudio main loop ended")),
        IterateResult::Err(error) => Err(anyhow!("the PulseAudio main loop failed: {error}")),
    }
}

/// A sine at half of full scale.
pub fn tone(hertz: f64) -> Source {
    let step = std::f64::consts::TAU * hertz / f64::from(RATE);
    let mut phase = 0.0_f64;
    Box::new(move |samples| {
        for frame in samples.chunks_exact_mut(2) {
            frame.fill((phase.sin() * 16_000.0) as i16);
            phase = (phase + step) % std::f64::consts::TAU;
        }
    })
}

/// A small endless tune: a melody over a bass, both plucked.
pub fn tune() -> Source {
    // Steps of an eighth at 132 beats a minute; notes are semitones above A3, bass two octaves lower.
    const STEP: u64 = RATE as u64 * 60 / 132 / 2;
    const REST: i32 = i32::MIN;
    const MELODY: [i32; 32] = [
        0, 3, 7, 12, 10, 7, 3, 7, 8, 12, 15, 12, 10, 8, 7, REST, 5, 8, 12, 17, 15, 12, 8, 12, 7, 11, 14, 17,
        14, 11, 7, REST,
    ];
    const BASS: [i32; 8] = [0, 0, 8, 8, 5, 5, 7, 7];
    let pitch = |semitones: i32| 220.0 * 2.0_f64.powf(f64::from(semitones) / 12.0);
    let triangle = |turns: f64| 4.0 * (turns - (turns + 0.5).floor()).abs() - 1.0;
    let mut at = 0_u64;
    Box::new(move |samples| {
        for frame in samples.chunks_exact_mut(2) {
            let step = (at / STEP) as usize;
            let within = (at % STEP) as f64 / f64::from(RATE);
            let beat = (at % (STEP * 4)) as f64 / f64::from(RATE);
            let note = MELODY[step % MELODY.len()];
            let melody = if note == REST {
                0.0
            } else {
                triangle(within * pitch(note)) * (-within * 6.0).exp() * (within * 400.0).min(1.0)
            };
            let low = pitch(BASS[step / 4 % BASS.len()] - 24);
            let bass = triangle(beat * low) * (-beat * 2.5).exp() * (beat * 200.0).min(1.0);
            let (left, right) = (melody * 0.30 + bass * 0.30, melody * 0.22 + bass * 0.30);
            frame[0] = (left * 32_000.0) as i16;
            frame[1] = (right * 32_000.0) as i16;
            at += 1;
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tone_has_its_frequency_and_a_tune_is_never_silent_for_a_second() {
        let mut samples = vec![0_i16; RATE as usize * 2];
        tone(440.0)(&mut samples);
        let left: Vec<i16> = samples.iter().copied().step_by(2).collect();
        let rising = left.windows(2).filter(|pair| pair[0] < 0 && pair[1] >= 0).count();
        assert!((438..=441).contains(&rising), "{rising} rising edges a second");

        let mut music = tune();
        for second in 0..16 {
            music(&mut samples);
            let loudest = samples.iter().map(|sample| sample.unsigned_abs()).max().unwrap_or(0);
            assert!((3_000..32_000).contains(&loudest), "second {second} peaks at {loudest}");
        }
    }
}
