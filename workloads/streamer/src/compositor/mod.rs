//! The display of an instance: a Wayland compositor without a screen, which turns what applications commit into
//! pictures for the encoder, and the viewer's input into input of a seat.
//!
//! [`Compositor::start`] runs it on a thread of its own. Frames follow commits ([`clock`]): an application that draws
//! nothing costs nothing. Windows are laid out as a kiosk ([`layout`]). X11 applications run under Xwayland ([`x11`]).
//! The pointer is not in the pictures; its shape goes out as an event.
//!
//! Starting applications, encoding and the network are left to others.

use std::{
    fmt,
    os::unix::fs::DirBuilderExt as _,
    panic::AssertUnwindSafe,
    path::PathBuf,
    rc::Rc,
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use smithay::{
    backend::renderer::pixman::PixmanError,
    reexports::{
        calloop::{
            self, EventLoop, Interest, Mode, PostAction,
            channel::{Channel, Event as ChannelEvent, Sender, channel},
            generic::Generic,
            ping::make_ping,
        },
        wayland_server::{BindError, Display, ListeningSocket},
    },
};
use tracing::{debug, warn};

mod clock;
mod cursor;
mod focus;
mod handlers;
mod input;
mod layout;
mod picture;
mod screen;
mod stack;
mod state;
mod window;
mod x11;

use self::state::State;
pub use self::{
    cursor::{Cursor, CursorImage},
    input::Input,
    layout::Rect,
    picture::{POOL, Picture},
    state::is_layout_name,
};

/// Names that are tried for the socket: wayland-0 and so on.
const SOCKETS: std::ops::Range<u32> = 0..32;

/// What a compositor needs to start.
#[derive(Clone, Debug)]
pub struct Config {
    /// Width of the output in pixels; odd ones are rounded up, 16 to 8192.
    pub width: u32,
    /// Height of the output in pixels; as the width.
    pub height: u32,
    /// Most frames a second, at least 1.
    pub fps: u32,
    /// Directory for the socket, the applications' `XDG_RUNTIME_DIR`; created with mode 0700 if it is missing.
    pub runtime_dir: PathBuf,
    /// Whether and when Xwayland runs.
    pub xwayland: Xwayland,
    /// xkb layout, with an optional variant: "us", "de(nodeadkeys)". An unknown one is taken as "us".
    pub keyboard_layout: String,
}

/// How X11 applications are served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Xwayland {
    /// Not at all.
    Never,
    /// Xwayland starts with the compositor.
    AtOnce,
    /// The program at this path waits in its place ([`crate::x11_on_demand`]) until an application connects.
    OnDemand(PathBuf),
}

/// What happens in the compositor. Events come from its thread: whoever takes them must not block.
#[derive(Debug)]
pub enum Event {
    /// A picture, because something visible changed or it was asked for.
    Frame(Frame),
    /// The first window has content.
    FirstWindow,
    /// How many applications are connected: Wayland clients, and X11 clients that have windows.
    Clients {
        /// Wayland clients, without Xwayland.
        wayland: usize,
        /// X11 clients with at least one window.
        x11: usize,
    },
    /// The pointer looks different.
    Cursor(Cursor),
    /// An application holds the pointer in place and wants movement only (`true`), or no longer does.
    PointerLock(bool),
    /// Xwayland has ended and took its applications along; it is started again.
    XwaylandExited,
    /// The compositor has ended by a fault of its own; the text says which.
    Failed(String),
}

/// One frame.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Counts frames, from 1.
    pub sequence: u64,
    /// When the oldest commit that this frame shows first was handled.
    pub committed: Instant,
    /// When the picture was complete.
    pub rendered: Instant,
    /// Width of the picture in pixels, even.
    pub width: u32,
    /// Height of the picture in pixels, even.
    pub height: u32,
    /// The pixels. At most [`POOL`] pictures exist; while all are held, no frames come.
    pub picture: Arc<Picture>,
    /// What differs from the frame before; everything for the first one and after [`Compositor::refresh`].
    pub damage: Vec<Rect>,
}

/// Why a compositor did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("creating the runtime directory {}", path.display())]
    RuntimeDir {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("listening on a socket in {}", path.display())]
    Socket {
        path: PathBuf,
        #[source]
        source: BindError,
    },
    #[error("preparing the event loop")]
    Loop(#[from] calloop::Error),
    #[error("preparing the Wayland display: {0}")]
    Display(String),
    #[error("preparing the renderer")]
    Renderer(#[source] PixmanError),
    #[error("neither the keyboard layout {layout:?} nor \"us\" can be loaded: is xkb-data installed?")]
    Keyboard { layout: String },
    #[error("starting the compositor's thread")]
    Thread(#[source] std::io::Error),
    #[error("the compositor's thread ended while it started: {0}")]
    Panic(String),
}

enum Command {
    Input(Input),
    ReleaseAll,
    Resize { width: u32, height: u32, fps: u32 },
    SetActive(bool),
    Refresh,
    Shift(f64),
    SetKeyboardLayout(String),
    Stop,
}

/// A running compositor. Clones are handles of the same one; it stops when the last is dropped, or by
/// [`Compositor::stop`].
#[derive(Clone)]
pub struct Compositor(Arc<Running>);

struct Running {
    commands: Sender<Command>,
    environment: Vec<(String, String)>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Compositor {
    /// Starts a compositor; its sockets listen when this returns. It is inactive: call [`Compositor::set_active`] to
    /// get frames.
    ///
    /// # Errors
    /// When the socket, the event loop, the renderer or the keyboard cannot be prepared. A missing Xwayland is no
    /// error: then there is no `DISPLAY` in [`Compositor::environment`].
    pub fn start(config: Config, events: impl Fn(Event) + Send + 'static) -> Result<Self, StartError> {
        let (commands, receiver) = channel();
        let (ready, started) = mpsc::sync_channel(1);
        let thread = std::thread::Builder::new()
            .name("compositor".into())
            .spawn(move || {
                let events: Rc<dyn Fn(Event)> = Rc::new(events);
                let tell = Rc::clone(&events);
                let ran =
                    std::panic::catch_unwind(AssertUnwindSafe(|| run(&config, events, receiver, &ready)));
                let failure = match ran {
                    Ok(Ok(())) => return,
                    Ok(Err(error)) => format!("the event loop failed: {error}"),
                    Err(panic) => panic_text(&*panic),
                };
                drop(ready);
                tell(Event::Failed(failure));
            })
            .map_err(StartError::Thread)?;
        let environment =
            started.recv().unwrap_or_else(|_| Err(StartError::Panic("see its message in the log".into())))?;
        let thread = Mutex::new(Some(thread));
        Ok(Self(Arc::new(Running { commands, environment, thread })))
    }

    /// What applications need to find this display: `WAYLAND_DISPLAY`, `XDG_RUNTIME_DIR`, `XDG_SESSION_TYPE` and, where
    /// there is Xwayland, `DISPLAY`.
    pub fn environment(&self) -> Vec<(String, String)> {
        self.0.environment.clone()
    }

    /// Hands over an event of the viewer's devices. Never blocks.
    pub fn input(&self, input: Input) {
        self.0.send(Command::Input(input));
    }

    /// Lets go of every key, button and finger that is held.
    pub fn release_all(&self) {
        self.0.send(Command::ReleaseAll);
    }

    /// Changes size and rate of the output; sizes as in [`Config`].
    pub fn resize(&self, width: u32, height: u32, fps: u32) {
        self.0.send(Command::Resize { width, height, fps });
    }

    /// Whether frames are wanted. While they are not, nothing is rendered and applications are called back about once a
    /// second. Becoming active delivers a whole frame at once.
    pub fn set_active(&self, active: bool) {
        self.0.send(Command::SetActive(active));
    }

    /// Asks for a whole frame even if nothing changed; it comes within the rate, while active.
    pub fn refresh(&self) {
        self.0.send(Command::Refresh);
    }

    /// Moves the grid on which applications are asked to draw by `by_ms` milliseconds; later is positive.
    pub fn shift(&self, by_ms: f64) {
        self.0.send(Command::Shift(by_ms));
    }

    /// Changes the keyboard layout; an unknown one changes nothing.
    pub fn set_keyboard_layout(&self, layout: &str) {
        self.0.send(Command::SetKeyboardLayout(layout.to_owned()));
    }

    /// Ends the compositor, Xwayland included, and waits for it. Calling it again is harmless.
    pub fn stop(&self) {
        self.0.stop();
    }
}

impl fmt::Debug for Compositor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compositor").field("environment", &self.0.environment).finish_non_exhaustive()
    }
}

impl Running {
    fn send(&self, command: Command) {
        if self.commands.send(command).is_err() {
            debug!("the compositor has ended already");
        }
    }

    fn stop(&self) {
        self.send(Command::Stop);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // From its own events it can only be asked to end.
            if thread.thread().id() != std::thread::current().id() && thread.join().is_err() {
                warn!("the compositor's thread ended by a panic in its last words");
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop();
    }
}

type Ready = mpsc::SyncSender<Result<Vec<(String, String)>, StartError>>;

/// The compositor's thread.
fn run(
    config: &Config,
    events: Rc<dyn Fn(Event)>,
    commands: Channel<Command>,
    ready: &Ready,
) -> Result<(), calloop::Error> {
    let (mut event_loop, mut display, mut state, environment) = match prepare(config, events, commands) {
        Ok(prepared) => prepared,
        Err(error) => {
            // Nobody listens only if whoever starts us is gone.
            let _ = ready.send(Err(error));
            return Ok(());
        }
    };
    let _ = ready.send(Ok(environment));

    while !state.stopping {
        let now = Instant::now();
        let sleep = match state.readable {
            true => Some(Duration::ZERO),
            false => state.clock.deadline(now).map(|at| at.saturating_duration_since(now)),
        };
        event_loop.dispatch(sleep, &mut state)?;
        if std::mem::take(&mut state.readable) {
            state.serve_clients(&mut display);
        }
        state.settle();
        if let Err(error) = display.flush_clients() {
            debug!(%error, "a Wayland client does not read");
        }
    }
    state.release_all();
    state.stop_x11(&mut display);
    Ok(())
}

type Prepared = (EventLoop<'static, State>, Display<State>, State, Vec<(String, String)>);

fn prepare(
    config: &Config,
    events: Rc<dyn Fn(Event)>,
    commands: Channel<Command>,
) -> Result<Prepared, StartError> {
    let event_loop = EventLoop::<State>::try_new()?;
    let handle = event_loop.handle();
    let mut display = Display::<State>::new().map_err(|error| StartError::Display(error.to_string()))?;

    let (ping, pinged) = make_ping().map_err(calloop::Error::from)?;
    handle.insert_source(pinged, |(), (), state| state.fed()).map_err(|error| error.error)?;
    let wake = Arc::new(move || ping.ping());
    let mut state =
        State::new(display.handle(), handle.clone(), config, Box::new(move |event| events(event)), wake)?;

    handle
        .insert_source(commands, |event, (), state| match event {
            ChannelEvent::Msg(command) => obey(state, command),
            ChannelEvent::Closed => state.stopping = true,
        })
        .map_err(|error| error.error)?;

    let requests = display.backend().poll_fd().try_clone_to_owned().map_err(calloop::Error::from)?;
    handle
        .insert_source(Generic::new(requests, Interest::READ, Mode::Level), |_, _, state| {
            state.readable = true;
            Ok(PostAction::Continue)
        })
        .map_err(|error| error.error)?;

    let (listener, name) = listen(config)?;
    handle
        .insert_source(Generic::new(listener, Interest::READ, Mode::Level), |_, listener, state| {
            accept(listener, state);
            Ok(PostAction::Continue)
        })
        .map_err(|error| error.error)?;

    let mut environment = vec![
        ("WAYLAND_DISPLAY".to_owned(), name),
        ("XDG_RUNTIME_DIR".to_owned(), config.runtime_dir.to_string_lossy().into_owned()),
        ("XDG_SESSION_TYPE".to_owned(), "wayland".to_owned()),
    ];
    if config.xwayland != Xwayland::Never {
        match state.start_x11(&config.runtime_dir, &config.xwayland) {
            Ok(()) => {
                let display = state.x11.as_ref().map(|x11| format!(":{}", x11.display()));
                environment.extend(display.map(|display| ("DISPLAY".to_owned(), display)));
            }
            Err(error) => warn!(%error, "Xwayland cannot be started; X11 applications will find no display"),
        }
    }
    Ok((event_loop, display, state, environment))
}

fn listen(config: &Config) -> Result<(ListeningSocket, String), StartError> {
    let path = config.runtime_dir.clone();
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&path)
        .map_err(|source| StartError::RuntimeDir { path: path.clone(), source })?;
    let mut refused = BindError::AlreadyInUse;
    for number in SOCKETS {
        let name = format!("wayland-{number}");
        match ListeningSocket::bind_absolute(path.join(&name)) {
            Ok(listener) => return Ok((listener, name)),
            Err(BindError::AlreadyInUse) => {}
            Err(error) => {
                refused = error;
                break;
            }
        }
    }
    Err(StartError::Socket { path, source: refused })
}

fn accept(listener: &ListeningSocket, state: &State) {
    loop {
        match listener.accept() {
            Ok(Some(stream)) => {
                let mut display = state.display.clone();
                if let Err(error) = display.insert_client(stream, state.client_data()) {
                    warn!(%error, "a Wayland client could not be taken in");
                }
            }
            Ok(None) => return,
            Err(error) => {
                // Out of descriptors, most likely: the client keeps waiting, so do not spin over it.
                warn!(%error, "a Wayland client could not be accepted");
                std::thread::sleep(Duration::from_millis(10));
                return;
            }
        }
    }
}

fn obey(state: &mut State, command: Command) {
    match command {
        Command::Input(input) => state.apply(input),
        Command::ReleaseAll => state.release_all(),
        Command::Resize { width, height, fps } => state.resize(width, height, fps),
        Command::SetActive(active) => state.set_active(active),
        Command::Refresh => state.refresh(),
        Command::Shift(by_ms) => state.clock.shift(by_ms),
        Command::SetKeyboardLayout(layout) => state.set_keyboard_layout(&layout),
        Command::Stop => state.stopping = true,
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text =
        panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("the compositor panicked: {}", text.unwrap_or("without a message"))
}
