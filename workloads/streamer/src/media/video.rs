//! The encoder's thread: takes the newest picture of the compositor, encodes it, hands it on.
//!
//! Between the compositor and the encoder there is one slot, not a queue: while a picture is being encoded the
//! next ones replace each other, so a slow encoder costs frames and never delay. The encoder exists only while
//! a client wants pictures. When pictures stop coming, the last one is repeated until its quality is good
//! (media-stack section 8, 18), then nothing happens any more.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use tracing::{error, info, warn};

use super::{mailbox::Sender, rate::Pace};
use crate::{
    compositor::Frame,
    encode::{
        self, AccessUnit, EncodeError, Encoder, EncoderConfig, EncoderKind, FINE_QUANTISER, PictureRef,
    },
};

/// Pause between repetitions of a picture that stands still.
const REFINE_EVERY: Duration = Duration::from_millis(60);
/// Most repetitions, about a second of them; quality is good long before.
const REFINE_TIMES: u32 = 15;
/// Pause after an encoder broke.
const RETRY: Duration = Duration::from_millis(500);
/// So often it may break in a row.
const RETRIES: u32 = 5;

/// Which stream to encode.
#[derive(Clone, Debug)]
pub struct Order {
    /// Generation of the client; comes back with every unit.
    pub generation: u64,
    /// Pictures per second at most.
    pub fps: u32,
    /// Lowest bit rate, bits per second.
    pub min_bps: u64,
    /// Highest bit rate, bits per second.
    pub max_bps: u64,
    /// Rate to begin with.
    pub pace: Pace,
    /// Which encoder.
    pub kind: EncoderKind,
}

/// What comes out.
#[derive(Debug)]
pub enum Encoded {
    /// A coded picture.
    Unit {
        /// For whom.
        generation: u64,
        /// The picture.
        unit: AccessUnit,
        /// From commit to the start of encoding; zero for repetitions.
        waited: Duration,
        /// When encoding ended.
        done: Instant,
        /// A repetition of a picture that stands still.
        repeated: bool,
    },
    /// An encoder was opened; its name.
    Opened {
        /// For whom.
        generation: u64,
        /// For people.
        name: String,
    },
    /// Pictures cannot be encoded; the text says why.
    Failed {
        /// For whom.
        generation: u64,
        /// For people.
        message: String,
    },
}

#[derive(Debug, Default)]
struct Slot {
    frame: Option<Frame>,
    order: Option<Order>,
    key: bool,
    pace: Option<Pace>,
    hold: bool,
    stop: bool,
}

#[derive(Debug, Default)]
struct Shared {
    slot: Mutex<Slot>,
    wake: Condvar,
}

/// Handle of the encoder's thread. Clones are handles of the same one.
#[derive(Clone, Debug)]
pub struct Video {
    shared: Arc<Shared>,
}

impl Video {
    /// A handle; its thread starts with [`Video::run`].
    pub fn new() -> Self {
        Self { shared: Arc::default() }
    }

    /// Starts the thread.
    ///
    /// # Errors
    /// When no thread can be made.
    pub fn run<T: Send + 'static>(
        &self,
        to: Sender<T>,
        wrap: impl Fn(Encoded) -> T + Send + 'static,
    ) -> std::io::Result<JoinHandle<()>> {
        let shared = Arc::clone(&self.shared);
        std::thread::Builder::new().name("encoder".into()).spawn(move || {
            Worker { shared, send: Box::new(move |encoded| to.send(wrap(encoded))), encoder: None }.run();
        })
    }

    /// The newest picture; the one that still waits is dropped.
    pub fn frame(&self, frame: Frame) {
        let mut slot = self.lock();
        let old = if slot.order.is_some() { slot.frame.replace(frame) } else { Some(frame) };
        drop(slot);
        self.shared.wake.notify_one();
        drop(old);
    }

    /// Begins to encode for a client, with a key frame.
    pub fn start(&self, order: Order) {
        self.change(|slot| {
            slot.order = Some(order);
            slot.frame = None;
            slot.key = true;
            slot.pace = None;
            slot.hold = false;
        });
    }

    /// Nobody wants pictures any more.
    pub fn stop(&self) {
        self.change(|slot| {
            slot.order = None;
            slot.frame = None;
        });
    }

    /// The next picture is to be a key frame; the last one is repeated if none comes.
    pub fn key(&self) {
        self.change(|slot| slot.key = true);
    }

    /// Changes rates.
    pub fn pace(&self, pace: Pace) {
        self.change(|slot| slot.pace = Some(pace));
    }

    /// While held, nothing is encoded: what was sent has not left yet.
    pub fn hold(&self, hold: bool) {
        if self.lock().hold != hold {
            self.change(|slot| slot.hold = hold);
        }
    }

    /// Ends the thread.
    pub fn end(&self) {
        self.change(|slot| slot.stop = true);
    }

    fn lock(&self) -> MutexGuard<'_, Slot> {
        self.shared.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Slot)) {
        change(&mut self.lock());
        self.shared.wake.notify_one();
    }
}

/// An encoder with what it is working on.
struct Running {
    order: Order,
    pace: Pace,
    encoder: Option<Box<dyn Encoder>>,
    size: (u32, u32),
    last: Option<Frame>,
    /// When the last picture was encoded.
    encoded: Option<Instant>,
    refined: u32,
    refining: bool,
    failures: u32,
    retry_at: Option<Instant>,
}

struct Worker {
    shared: Arc<Shared>,
    send: Box<dyn Fn(Encoded) + Send>,
    encoder: Option<Running>,
}

/// What to do next.
enum Step {
    Encode { frame: Frame, key: bool, repeated: bool },
    Sleep(Option<Instant>),
    Stop,
}

impl Worker {
    fn run(mut self) {
        loop {
            let step = self.next();
            match step {
                Step::Encode { frame, key, repeated } => self.encode(frame, key, repeated),
                Step::Stop => return,
                Step::Sleep(_) => {}
            }
        }
    }

    /// Waits for something to do.
    fn next(&mut self) -> Step {
        let shared = Arc::clone(&self.shared);
        let mut slot = shared.slot.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match self.decide(&mut slot, Instant::now()) {
                Step::Sleep(None) => {
                    slot = shared.wake.wait(slot).unwrap_or_else(PoisonError::into_inner);
                }
                Step::Sleep(Some(until)) => {
                    let pause = until.saturating_duration_since(Instant::now());
                    slot = shared.wake.wait_timeout(slot, pause).unwrap_or_else(PoisonError::into_inner).0;
                }
                step => return step,
            }
        }
    }

    fn decide(&mut self, slot: &mut Slot, now: Instant) -> Step {
        if slot.stop {
            return Step::Stop;
        }
        let Some(order) = &slot.order else {
            if self.encoder.take().is_some() {
                slot.key = false;
            }
            return Step::Sleep(None);
        };
        if self.encoder.as_ref().is_none_or(|running| running.order.generation != order.generation) {
            self.encoder = Some(Running::new(order.clone()));
        }
        let Some(running) = &mut self.encoder else { return Step::Sleep(None) };
        if let Some(pace) = slot.pace.take() {
            running.set_pace(pace);
        }
        if slot.hold {
            return Step::Sleep(None);
        }
        if let Some(retry_at) = running.retry_at {
            if retry_at > now {
                return Step::Sleep(Some(retry_at));
            }
            running.retry_at = None;
        }
        // A whole interval after the last one less a little: commits of a 60 Hz application jitter.
        let free = running.encoded.map(|encoded| encoded + running.pace.interval.mul_f64(0.9));
        let free = free.filter(|_| running.pace.interval > Duration::from_secs(1) / running.order.fps.max(1));
        if let Some(free) = free.filter(|free| *free > now) {
            let something = slot.frame.is_some() || slot.key || running.refining;
            return Step::Sleep(something.then_some(free));
        }
        if let Some(frame) = slot.frame.take() {
            return Step::Encode { frame, key: std::mem::take(&mut slot.key), repeated: false };
        }
        let Some(last) = &running.last else { return Step::Sleep(None) };
        if std::mem::take(&mut slot.key) {
            return Step::Encode { frame: last.clone(), key: true, repeated: true };
        }
        if running.refining
            && let Some(encoded) = running.encoded
        {
            let due = encoded + REFINE_EVERY;
            if due <= now {
                return Step::Encode { frame: last.clone(), key: false, repeated: true };
            }
            return Step::Sleep(Some(due));
        }
        Step::Sleep(None)
    }

    fn encode(&mut self, frame: Frame, key: bool, repeated: bool) {
        let Some(running) = &mut self.encoder else { return };
        let generation = running.order.generation;
        let started = Instant::now();
        let waited =
            if repeated { Duration::ZERO } else { started.saturating_duration_since(frame.committed) };
        let captured = if repeated { started } else { frame.committed };
        match running.encode(&frame, captured, key) {
            Ok((unit, opened)) => {
                if let Some(name) = opened {
                    (self.send)(Encoded::Opened { generation, name });
                }
                running.finished(frame, unit.as_ref(), repeated);
                if let Some(unit) = unit {
                    (self.send)(Encoded::Unit { generation, unit, waited, done: Instant::now(), repeated });
                }
            }
            Err(error) => {
                running.encoder = None;
                running.failures += 1;
                running.last = Some(frame);
                running.retry_at = Some(Instant::now() + RETRY);
                let message = format!("encoding pictures of {}x{}: {error}", running.size.0, running.size.1);
                if running.failures > RETRIES {
                    error!(%message, "the encoder keeps failing");
                    // Nothing more can be shown to this client.
                    let mut slot = self.shared.slot.lock().unwrap_or_else(PoisonError::into_inner);
                    slot.order = None;
                    drop(slot);
                    (self.send)(Encoded::Failed { generation, message });
                } else {
                    warn!(%message, "the encoder failed and is opened again");
                    let mut slot = self.shared.slot.lock().unwrap_or_else(PoisonError::into_inner);
                    slot.key = true;
                }
            }
        }
    }
}

impl Running {
    fn new(order: Order) -> Self {
        Self {
            pace: order.pace,
            order,
            encoder: None,
            size: (0, 0),
            last: None,
            encoded: None,
            refined: 0,
            refining: false,
            failures: 0,
            retry_at: None,
        }
    }

    fn set_pace(&mut self, pace: Pace) {
        self.pace = pace;
        if let Some(encoder) = &mut self.encoder
            && let Err(error) = encoder.set_bitrate(pace.bitrate_bps)
        {
            warn!(%error, bitrate_bps = pace.bitrate_bps, "the encoder keeps its bit rate");
        }
    }

    /// Opens an encoder if there is none of this size; tells its name then.
    fn encode(
        &mut self,
        frame: &Frame,
        captured: Instant,
        key: bool,
    ) -> Result<(Option<AccessUnit>, Option<String>), EncodeError> {
        let size = (frame.width, frame.height);
        let mut opened = None;
        if self.size != size {
            self.encoder = None;
            self.size = size;
        }
        let encoder = match &mut self.encoder {
            Some(encoder) => encoder,
            none => {
                let encoder = encode::create(&EncoderConfig {
                    width: size.0,
                    height: size.1,
                    fps: self.order.fps.clamp(1, encode::MAX_FPS),
                    bitrate_bps: self.pace.bitrate_bps,
                    min_bps: self.order.min_bps,
                    max_bps: self.order.max_bps,
                    kind: self.order.kind,
                })?;
                info!(encoder = encoder.name(), width = size.0, height = size.1, "encoder opened");
                opened = Some(encoder.name().to_owned());
                none.insert(encoder)
            }
        };
        let (width, half) = (size.0 as usize, size.0 as usize / 2);
        let picture = PictureRef {
            width: size.0,
            height: size.1,
            planes: [frame.picture.y(), frame.picture.u(), frame.picture.v()],
            strides: [width, half, half],
        };
        let unit = encoder.encode(picture, captured, key)?;
        self.failures = 0;
        Ok((unit, opened))
    }

    fn finished(&mut self, frame: Frame, unit: Option<&AccessUnit>, repeated: bool) {
        self.encoded = Some(Instant::now());
        self.refined = if repeated { self.refined + 1 } else { 0 };
        let fine = unit.and_then(|unit| unit.quantiser).is_some_and(|quantiser| quantiser <= FINE_QUANTISER);
        self.refining = !fine && self.refined < REFINE_TIMES;
        self.last = Some(frame);
    }
}
