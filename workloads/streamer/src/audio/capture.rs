//! The listening side: records what the application plays, while it plays and somebody listens.
//!
//! One thread with PulseAudio's own main loop. It learns from subscription events that the sink starts and
//! stops running, so it never polls. Without a listener it sleeps outside of any connection.

use std::{
    cell::Cell,
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use libpulse_binding::{
    callbacks::ListResult,
    context::{Context, FlagSet as ContextFlags, State as ContextState, subscribe::InterestMaskSet},
    def::{BufferAttr, SinkState},
    error::PAErr,
    mainloop::{
        api::Mainloop as _,
        events::io::FlagSet as IoFlags,
        standard::{IterateResult, Mainloop},
    },
    sample::{Format, Spec},
    stream::{FlagSet as StreamFlags, PeekResult, State as StreamState, Stream},
};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use tracing::{debug, warn};

use super::{
    coder::{CHANNELS, Coder, Packet, RATE},
    server::SINK,
};

/// Pause before the server is tried again.
const RETRY: Duration = Duration::from_millis(500);
/// Bytes of 10 ms.
const FRAGMENT_BYTES: u32 = RATE / 100 * CHANNELS as u32 * 2;

/// Tells the thread whether somebody listens. Clones are handles of the same one.
#[derive(Clone, Debug)]
pub struct Listening(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    listening: AtomicBool,
    stop: AtomicBool,
    wake: OwnedFd,
}

impl Listening {
    /// Somebody listens, or nobody does. Never blocks.
    pub fn set(&self, listening: bool) {
        if self.0.listening.swap(listening, Ordering::SeqCst) != listening {
            self.0.wake();
        }
    }
}

impl Shared {
    fn wake(&self) {
        // A full counter means that a wake-up is already under way.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    fn rest(&self) {
        let mut count = [0; 8];
        // Nothing to read is fine.
        let _ = rustix::io::read(&self.wake, &mut count);
    }

    fn wanted(&self) -> bool {
        self.listening.load(Ordering::SeqCst) && !self.stop.load(Ordering::SeqCst)
    }
}

/// The recording thread.
#[derive(Debug)]
pub struct Capture {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Capture {
    /// Starts the thread; `packets` is called from it and must not block.
    ///
    /// # Errors
    /// When the process has no descriptor or thread left.
    pub fn start(address: String, packets: impl Fn(Packet) + Send + 'static) -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let shared =
            Arc::new(Shared { listening: AtomicBool::new(false), stop: AtomicBool::new(false), wake });
        let ours = Arc::clone(&shared);
        let thread =
            std::thread::Builder::new().name("audio".into()).spawn(move || run(&ours, &address, &packets))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// To tell whether somebody listens.
    pub fn listening(&self) -> Listening {
        Listening(Arc::clone(&self.shared))
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.wake();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("the audio thread ended by a panic");
        }
    }
}

fn run(shared: &Arc<Shared>, address: &str, packets: &dyn Fn(Packet)) {
    let mut complained = false;
    while !shared.stop.load(Ordering::SeqCst) {
        shared.rest();
        if !shared.wanted() {
            sleep(shared, None);
            continue;
        }
        match record(shared, address, packets) {
            Ok(()) => complained = false,
            Err(error) => {
                if !std::mem::replace(&mut complained, true) {
                    warn!(error, "no sound for now: the sound server cannot be heard");
                }
                sleep(shared, Some(RETRY));
            }
        }
    }
}

fn sleep(shared: &Shared, limit: Option<Duration>) {
    let limit = limit.map(|limit| Timespec { tv_sec: 0, tv_nsec: i64::from(limit.subsec_nanos()) });
    // Interrupted or failed: the caller looks again in any case.
    let _ = poll(&mut [PollFd::new(&shared.wake, PollFlags::IN)], limit.as_ref());
}

/// Listens over one connection until nobody wants it any more or the server is lost.
fn record(shared: &Arc<Shared>, address: &str, packets: &dyn Fn(Packet)) -> Result<(), String> {
    let mut mainloop = Mainloop::new().ok_or("no main loop")?;
    let waker = Arc::clone(shared);
    let _wake = mainloop
        .new_io_event(shared.wake.as_raw_fd(), IoFlags::INPUT, Box::new(move |_, _, _| waker.rest()))
        .ok_or("no event for the main loop")?;
    let mut context = Context::new(&mainloop, "fanlight").ok_or("no context")?;
    let changed = Rc::new(Cell::new(true));
    let running = Rc::new(Cell::new(false));
    let note = Rc::clone(&changed);
    context.set_subscribe_callback(Some(Box::new(move |_, _, _| note.set(true))));
    context.connect(Some(address), ContextFlags::NOAUTOSPAWN, None).map_err(text)?;

    let mut subscribed = false;
    let mut recording: Option<(Stream, Coder)> = None;
    while shared.wanted() {
        match mainloop.iterate(true) {
            IterateResult::Success(_) => {}
            IterateResult::Quit(_) => return Err("the main loop ended".into()),
            IterateResult::Err(error) => return Err(text(error)),
        }
        match context.get_state() {
            ContextState::Ready => {}
            ContextState::Failed | ContextState::Terminated => {
                return Err(text(context.errno()));
            }
            _ => continue,
        }
        if !subscribed {
            subscribed = true;
            context.subscribe(InterestMaskSet::SINK, |_| {});
        }
        if changed.take() {
            let running = Rc::clone(&running);
            context.introspect().get_sink_info_by_name(SINK, move |answer| {
                if let ListResult::Item(sink) = answer {
                    running.set(sink.state == SinkState::Running);
                }
            });
        }
        match &mut recording {
            None if running.get() => recording = Some(open(&mut context)?),
            None => {}
            Some((stream, _)) if !running.get() => {
                debug!("the application stopped playing");
                // It goes away in any case; the answer of the server matters to nobody.
                let _ = stream.disconnect();
                recording = None;
            }
            Some((stream, coder)) => match stream.get_state() {
                StreamState::Ready => read(stream, coder, packets)?,
                StreamState::Failed | StreamState::Terminated => return Err("the recording was ended".into()),
                _ => {}
            },
        }
    }
    if let Some((mut stream, _)) = recording {
        // As above.
        let _ = stream.disconnect();
    }
    context.disconnect();
    Ok(())
}

fn open(context: &mut Context) -> Result<(Stream, Coder), String> {
    debug!("the application plays");
    let spec = Spec { format: Format::S16le, rate: RATE, channels: CHANNELS as u8 };
    let mut stream = Stream::new(context, "client", &spec, None).ok_or("no stream")?;
    let unset = u32::MAX;
    let buffer = BufferAttr {
        maxlength: unset,
        tlength: unset,
        prebuf: unset,
        minreq: unset,
        fragsize: FRAGMENT_BYTES,
    };
    let flags = StreamFlags::ADJUST_LATENCY | StreamFlags::DONT_MOVE | StreamFlags::DONT_INHIBIT_AUTO_SUSPEND;
    stream.connect_record(Some(&format!("{SINK}.monitor")), Some(&buffer), flags).map_err(text)?;
    let coder = Coder::new().map_err(|error| error.to_string())?;
    Ok((stream, coder))
}

fn read(stream: &mut Stream, coder: &mut Coder, packets: &dyn Fn(Packet)) -> Result<(), String> {
    loop {
        match stream.peek().map_err(text)? {
            PeekResult::Empty => return Ok(()),
            PeekResult::Hole(_) => {}
            PeekResult::Data(data) => {
                let samples: Vec<i16> =
                    data.chunks_exact(2).map(|pair| i16::from_le_bytes([pair[0], pair[1]])).collect();
                coder.push(Instant::now(), &samples, packets);
            }
        }
        stream.discard().map_err(text)?;
    }
}

/// The library has no words for some numbers.
fn text(error: PAErr) -> String {
    error.to_string().unwrap_or_else(|| format!("PulseAudio error {}", error.0))
}
