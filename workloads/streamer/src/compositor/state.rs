//! The compositor's state: windows, focus and frames. One value, owned by the compositor's thread.
//!
//! Protocol handlers are in [`super::handlers`] and [`super::x11`]; they change this state, and [`State::settle`]
//! does what follows from it once per turn of the loop.

use std::{
    collections::BTreeMap,
    io,
    panic::AssertUnwindSafe,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use smithay::{
    backend::renderer::{
        element::{Kind, surface::render_elements_from_surface_tree},
        pixman::PixmanRenderer,
    },
    desktop::{
        PopupManager,
        utils::{OutputPresentationFeedback, send_frames_surface_tree},
    },
    input::{Seat, SeatState, keyboard::XkbConfig, pointer::MotionEvent},
    output::{Mode, Output, PhysicalProperties, Subpixel},
    reexports::{
        calloop::LoopHandle,
        wayland_protocols::{
            wp::presentation_time::server::wp_presentation_feedback,
            xdg::shell::server::xdg_toplevel::State as ToplevelState,
        },
        wayland_server::{
            Display, DisplayHandle,
            backend::{ClientData, ClientId, DisconnectReason},
            protocol::wl_surface::WlSurface,
        },
    },
    utils::{Clock, IsAlive, Logical, Monotonic, Point, Rectangle, SERIAL_COUNTER, Size, Transform},
    wayland::{
        compositor::{CompositorClientState, CompositorState},
        cursor_shape::CursorShapeManagerState,
        fractional_scale::FractionalScaleManagerState,
        output::OutputManagerState,
        pointer_constraints::PointerConstraintsState,
        presentation::{PresentationState, Refresh},
        relative_pointer::RelativePointerManagerState,
        selection::{
            SelectionTarget, data_device::DataDeviceState, primary_selection::PrimarySelectionState,
        },
        shell::xdg::{SurfaceCachedState, XdgShellState, decoration::XdgDecorationState},
        shm::ShmState,
        single_pixel_buffer::SinglePixelBufferState,
        viewporter::ViewporterState,
        xdg_activation::XdgActivationState,
        xwayland_shell::XWaylandShellState,
    },
    xwayland::{X11Surface, xwm::WmWindowType},
};
use tracing::{debug, error, warn};

use super::{
    Event, Frame, StartError,
    clock::FrameClock,
    cursor::CursorTracker,
    focus::Focus,
    input::Held,
    layout::{self, Hints, Role},
    screen::{Element, Screen},
    stack::Stack,
    window::Window,
    x11::Xwayland,
};

/// Milliseconds a key is held before clients repeat it.
const REPEAT_DELAY_MS: i32 = 400;
/// Longest name of a layout with its variant.
const LAYOUT_BYTES: usize = 64;
/// Repetitions a second.
const REPEAT_RATE: i32 = 30;

/// Commits of one client in one turn, and how long the turn may take with them, before the client is taken for
/// hostile: it writes faster than it is served and nobody else would ever have a turn again.
const FLOOD_COMMITS: u32 = 2_000;
const FLOOD_TIME: Duration = Duration::from_millis(500);

/// Attempts at a frame that fails before the next commit is waited for.
const RETRIES: u32 = 5;

/// Globals that only have to exist.
#[allow(dead_code)]
struct Globals {
    decoration: XdgDecorationState,
    viewporter: ViewporterState,
    presentation: PresentationState,
    relative_pointer: RelativePointerManagerState,
    pointer_constraints: PointerConstraintsState,
    fractional_scale: FractionalScaleManagerState,
    cursor_shape: CursorShapeManagerState,
    single_pixel: SinglePixelBufferState,
    output_manager: OutputManagerState,
}

pub(super) struct State {
    pub display: DisplayHandle,
    pub handle: LoopHandle<'static, State>,
    pub events: Box<dyn Fn(Event)>,
    pub stopping: bool,
    /// Some client has sent something.
    pub readable: bool,

    pub compositor_state: CompositorState,
    pub shm_state: ShmState,
    pub xdg_shell_state: XdgShellState,
    pub seat_state: SeatState<State>,
    pub data_device_state: DataDeviceState,
    pub primary_selection_state: PrimarySelectionState,
    pub activation_state: XdgActivationState,
    pub xwayland_shell_state: XWaylandShellState,
    _globals: Globals,

    pub seat: Seat<State>,
    pub held: Held,
    pub layout: String,
    /// The keys that type characters in the layout named with them.
    pub typing: Option<(String, BTreeMap<u32, (u32, bool)>)>,
    pub cursor: CursorTracker,
    pub pointer_locked: bool,
    pub drag_icon: Option<WlSurface>,

    pub output: Output,
    pub size: Size<i32, Logical>,
    pub windows: Stack<Window>,
    /// Known, but without content.
    pub unmapped: Vec<Window>,
    pub popups: PopupManager,
    /// What is under the pointer may have changed without the pointer moving.
    pub arranged: bool,

    pub clock: FrameClock,
    time: Clock<Monotonic>,
    renderer: PixmanRenderer,
    screen: Screen,
    wake: Arc<dyn Fn() + Send + Sync>,
    first_window: bool,
    /// Renderings in a row that failed.
    failures: u32,

    pub x11: Option<Xwayland>,
    /// Selections of Wayland clients, for an X server that starts later.
    pub offered: Vec<(SelectionTarget, Vec<String>)>,
    clients: Arc<AtomicUsize>,
    told_clients: (usize, usize),
    /// Clients of the last turn.
    served: Vec<ClientId>,
    turn: Turn,
}

/// The turn of one client, as seen by the guard against floods.
struct Turn {
    started: Instant,
    commits: u32,
}

/// What is kept for every Wayland client but Xwayland.
pub(super) struct ClientState {
    pub compositor: CompositorClientState,
    connected: Arc<AtomicUsize>,
}

impl ClientData for ClientState {
    fn initialized(&self, _: ClientId) {
        self.connected.fetch_add(1, Ordering::Relaxed);
    }

    fn disconnected(&self, _: ClientId, reason: DisconnectReason) {
        self.connected.fetch_sub(1, Ordering::Relaxed);
        if let DisconnectReason::ProtocolError(error) = reason {
            debug!(%error, "a Wayland client was disconnected");
        }
    }
}

impl State {
    /// Creates the globals on `display`. `wake` is called from other threads to make the loop turn.
    pub fn new(
        display: DisplayHandle,
        handle: LoopHandle<'static, State>,
        config: &super::Config,
        events: Box<dyn Fn(Event)>,
        wake: Arc<dyn Fn() + Send + Sync>,
    ) -> Result<Self, StartError> {
        let dh = &display;
        let size = layout::output_size(config.width, config.height);
        let mut renderer = PixmanRenderer::new().map_err(StartError::Renderer)?;
        let screen = Screen::new(&mut renderer, size, 0, {
            let wake = Arc::clone(&wake);
            move || wake()
        })
        .map_err(StartError::Renderer)?;

        let output_manager = OutputManagerState::new_with_xdg_output::<State>(dh);
        let output = Output::new(
            "fanlight".into(),
            PhysicalProperties {
                size: (0, 0).into(),
                subpixel: Subpixel::None,
                make: "Fanlight".into(),
                model: "stream".into(),
            },
        );
        output.create_global::<State>(dh);

        let mut seat_state = SeatState::new();
        let mut seat = seat_state.new_wl_seat(dh, "seat0");
        let layout = add_keyboard(&mut seat, &config.keyboard_layout)?;
        seat.add_pointer();
        seat.add_touch();

        let mut state = Self {
            compositor_state: CompositorState::new_v6::<State>(dh),
            shm_state: ShmState::new::<State>(dh, []),
            xdg_shell_state: XdgShellState::new::<State>(dh),
            data_device_state: DataDeviceState::new::<State>(dh),
            primary_selection_state: PrimarySelectionState::new::<State>(dh),
            activation_state: XdgActivationState::new::<State>(dh),
            xwayland_shell_state: XWaylandShellState::new::<State>(dh),
            _globals: Globals {
                decoration: XdgDecorationState::new::<State>(dh),
                viewporter: ViewporterState::new::<State>(dh),
                presentation: PresentationState::new::<State>(dh, libc::CLOCK_MONOTONIC as u32),
                relative_pointer: RelativePointerManagerState::new::<State>(dh),
                pointer_constraints: PointerConstraintsState::new::<State>(dh),
                fractional_scale: FractionalScaleManagerState::new::<State>(dh),
                cursor_shape: CursorShapeManagerState::new::<State>(dh),
                single_pixel: SinglePixelBufferState::new::<State>(dh),
                output_manager,
            },
            seat_state,
            seat,
            held: Held::default(),
            layout,
            typing: None,
            cursor: CursorTracker::new(),
            pointer_locked: false,
            drag_icon: None,
            output,
            size,
            windows: Stack::default(),
            unmapped: Vec::new(),
            popups: PopupManager::default(),
            arranged: false,
            clock: FrameClock::new(config.fps),
            time: Clock::new(),
            renderer,
            screen,
            wake,
            first_window: false,
            failures: 0,
            x11: None,
            offered: Vec::new(),
            clients: Arc::default(),
            told_clients: (0, 0),
            served: Vec::new(),
            turn: Turn { started: Instant::now(), commits: 0 },
            display,
            handle,
            events,
            stopping: false,
            readable: false,
        };
        state.announce_mode(config.fps);
        let centre = Point::from((f64::from(size.w / 2), f64::from(size.h / 2)));
        state.pointer().set_location(centre);
        Ok(state)
    }

    /// Data for a Wayland client that connects.
    pub fn client_data(&self) -> Arc<ClientState> {
        Arc::new(ClientState {
            compositor: CompositorClientState::default(),
            connected: Arc::clone(&self.clients),
        })
    }

    /// Milliseconds on the clock of input events.
    pub fn now_ms(&self) -> u32 {
        self.time.now().as_millis()
    }

    /// Microseconds on the clock of input events.
    pub fn now_us(&self) -> u64 {
        self.time.now().as_micros()
    }

    // ---- turns of the loop ----

    /// Reads what the clients have sent. One that makes the handling panic is disconnected; the others go on.
    pub fn serve_clients(&mut self, display: &mut Display<State>) {
        // Those of the last time as well: what a client had that is gone now is destroyed with its turn.
        let mut clients = std::mem::take(&mut self.served);
        display.handle().backend_handle().with_all_clients(|client| {
            if !clients.contains(&client) {
                clients.push(client.clone());
            }
            self.served.push(client);
        });
        for client in clients {
            self.turn = Turn { started: Instant::now(), commits: 0 };
            let mut serve = |state: &mut State| {
                let served =
                    AssertUnwindSafe(|| display.backend().dispatch_single_client(state, client.clone()));
                // What goes wrong between a client and us ends that client by itself.
                std::panic::catch_unwind(served).map(|_: io::Result<usize>| ()).is_ok()
            };
            if !serve(self) {
                error!("handling a Wayland client panicked; it is disconnected");
                self.display.backend_handle().kill_client(client.clone(), DisconnectReason::ConnectionClosed);
                // Its objects are destroyed now, under the same guard.
                if !serve(self) {
                    error!("destroying what it had panicked as well");
                }
            }
        }
    }

    /// Counts a commit of the client that is being served; whether it floods and has to be cut off.
    pub fn is_flood(&mut self) -> bool {
        self.turn.commits += 1;
        self.turn.commits > FLOOD_COMMITS && self.turn.started.elapsed() > FLOOD_TIME
    }

    /// Does what follows from everything that happened in this turn: focus, frame, callbacks, news.
    pub fn settle(&mut self) {
        self.popups.cleanup();
        self.forget_dead_windows();
        self.match_x11();
        if std::mem::take(&mut self.arranged) {
            self.refresh_outputs();
            self.refresh_pointer();
        }
        self.tell_cursor();
        self.check_pointer_lock();

        let due = self.clock.poll(Instant::now());
        let shown = !due.render || self.render();
        if due.callbacks && shown {
            self.send_callbacks();
        }
        self.tell_clients();
    }

    /// Shows what changed; `false` when the encoder holds all pictures.
    fn render(&mut self) -> bool {
        let committed = self.clock.dirty_since().unwrap_or_else(Instant::now);
        let Some(picture) = self.screen.picture() else {
            self.clock.starved();
            return false;
        };
        let elements = self.elements();
        let rendered = self.screen.render(&mut self.renderer, &elements, picture);
        drop(elements);
        let now = Instant::now();
        match rendered {
            Ok(Some(rendered)) => {
                self.clock.rendered(now);
                (self.events)(Event::Frame(Frame {
                    sequence: rendered.sequence,
                    committed,
                    rendered: now,
                    width: self.size.w as u32,
                    height: self.size.h as u32,
                    picture: rendered.picture,
                    damage: rendered.damage,
                }));
                self.tell_presented(rendered.sequence);
            }
            Ok(None) => {
                self.clock.unchanged();
                self.tell_presented(self.screen.sequence());
            }
            Err(error) => {
                // The rate limit applies to failures too, or a client could keep the thread busy with them.
                self.clock.rendered(now);
                if self.failures == 0 {
                    warn!(error = &error as &dyn std::error::Error, "a frame could not be rendered");
                }
                // Usually a client took its memory away and is cut off with the next turn; without it all is well.
                self.readable = true;
                self.failures += 1;
                if self.failures < RETRIES {
                    self.clock.changed(now);
                }
                return true;
            }
        }
        self.failures = 0;
        true
    }

    /// All that is visible, front to back.
    fn elements(&mut self) -> Vec<Element> {
        let mut elements = Vec::new();
        for entry in self.windows.iter().rev() {
            let at = (entry.location - entry.item.geometry().loc).to_physical(1);
            elements.extend(entry.item.elements(&mut self.renderer, at));
        }
        if let Some(icon) = self.drag_icon.as_ref().filter(|icon| icon.alive()) {
            let at = self.pointer().current_location().to_i32_round::<i32>().to_physical(1);
            let dragged =
                render_elements_from_surface_tree(&mut self.renderer, icon, at, 1.0, 1.0, Kind::Unspecified);
            elements.splice(0..0, dragged);
        }
        elements
    }

    fn send_callbacks(&mut self) {
        let time = Duration::from(self.time.now());
        let everywhere = |_: &WlSurface, _: &_| Some(self.output.clone());
        for window in self.windows.items().chain(&self.unmapped) {
            window.send_frame(&self.output, time);
        }
        for surface in self.cursor.surface().into_iter().chain(&self.drag_icon) {
            if surface.alive() {
                send_frames_surface_tree(surface, &self.output, time, None, everywhere);
            }
        }
        self.clock.called_back(Instant::now());
    }

    fn tell_presented(&mut self, sequence: u64) {
        let mut feedback = OutputPresentationFeedback::new(&self.output);
        for window in self.windows.items() {
            window.take_feedback(&self.output, &mut feedback);
        }
        feedback.presented(
            self.time.now(),
            Refresh::variable(self.clock.interval()),
            sequence,
            wp_presentation_feedback::Kind::empty(),
        );
    }

    fn tell_clients(&mut self) {
        let x11 = self.x11_clients();
        let now = (self.clients.load(Ordering::Relaxed), x11);
        if now != self.told_clients {
            self.told_clients = now;
            (self.events)(Event::Clients { wayland: now.0, x11: now.1 });
        }
    }

    fn tell_cursor(&mut self) {
        if let Some(cursor) = self.cursor.changed() {
            (self.events)(Event::Cursor(cursor));
        }
    }

    // ---- windows ----

    /// The window of `surface`, which may be one of its subsurfaces' or popups' roots.
    pub fn window_of(&self, surface: &WlSurface) -> Option<Window> {
        let is_root = |window: &&Window| window.surface().as_deref() == Some(surface);
        self.windows.items().chain(&self.unmapped).find(is_root).cloned()
    }

    /// How `window` is to be shown.
    pub fn role(&self, window: &Window) -> Role {
        layout::role(&hints(window), self.size)
    }

    /// Tells `window` its size and states, without sending them to a Wayland window that has not asked yet.
    pub fn configure(&self, window: &Window) {
        let role = self.role(window);
        if let Some(toplevel) = window.toplevel() {
            toplevel.with_pending_state(|pending| {
                pending.bounds = Some(self.size);
                if role == Role::Fill {
                    pending.size = Some(self.size);
                    pending.states.set(ToplevelState::Maximized);
                } else if !pending.states.contains(ToplevelState::Fullscreen) {
                    pending.size = None;
                    pending.states.unset(ToplevelState::Maximized);
                }
            });
            if toplevel.is_initial_configure_sent() {
                toplevel.send_pending_configure();
            }
        } else if let Some(x11) = window.x11().filter(|x11| !x11.is_override_redirect()) {
            let rectangle = match role {
                Role::Fill => Rectangle::from_size(self.size),
                Role::Float => {
                    let size = layout::float_size(x11.geometry().size, self.size);
                    Rectangle::new(self.place_x11(x11, size), size)
                }
            };
            let configured = x11.configure(rectangle);
            let maximized = x11.set_maximized(role == Role::Fill);
            if configured.is_err() || maximized.is_err() {
                debug!(window = x11.window_id(), "an X11 window could not be configured");
            }
        }
    }

    /// Where `window` belongs on the output.
    pub fn place(&self, window: &Window) -> Point<i32, Logical> {
        match window.x11() {
            // X11 knows where its windows are, and so must we.
            Some(x11) => x11.geometry().loc,
            None => layout::place(window.geometry().size, self.size),
        }
    }

    /// Where a floating X11 window of `size` goes: dialogs in the middle, tool windows where they want to be, or out of
    /// the way if they do not know.
    pub fn place_x11(&self, x11: &X11Surface, size: Size<i32, Logical>) -> Point<i32, Logical> {
        let wanted = x11.geometry().loc;
        match (is_tool(x11), wanted == Point::default()) {
            (true, true) => layout::keep_on_output(Point::from((i32::MAX, i32::MAX)), size, self.size),
            (true, false) => layout::keep_on_output(wanted, size, self.size),
            (false, _) => layout::place(size, self.size),
        }
    }

    /// A window or something in it was committed: shows it, moves it or takes it off.
    pub fn update_window(&mut self, window: &Window) {
        window.on_commit();
        let has_content = window.has_content();
        let shown = self.windows.get(window).is_some();
        if has_content && !shown && window.toplevel().is_some_and(|toplevel| !toplevel.ensure_configured()) {
            return;
        }
        match (has_content, shown) {
            (true, false) => self.show(window),
            (false, true) => self.hide(window),
            (true, true) => {
                let place = self.place(window);
                self.arranged |= self.windows.relocate(window, place);
                self.clock.changed(Instant::now());
            }
            (false, false) => {}
        }
    }

    fn show(&mut self, window: &Window) {
        self.unmapped.retain(|other| other != window);
        let overlay = window.x11().is_some_and(|x11| x11.is_override_redirect());
        self.windows.insert(window.clone(), self.place(window), overlay);
        self.arranged = true;
        self.clock.changed(Instant::now());
        if !overlay {
            let is_tool = window.x11().is_some_and(is_tool);
            if !is_tool || self.keyboard().current_focus().is_none() {
                self.focus(window);
            }
            if !std::mem::replace(&mut self.first_window, true) {
                (self.events)(Event::FirstWindow);
            }
        }
    }

    /// Takes `window` off the screen; it may come back.
    pub fn hide(&mut self, window: &Window) {
        if self.windows.remove(window) {
            window.leave(&self.output);
            if window.alive() {
                self.unmapped.push(window.clone());
            }
            self.after_loss();
        }
    }

    /// Forgets `window` for good.
    pub fn forget(&mut self, window: &Window) {
        self.unmapped.retain(|other| other != window);
        if self.windows.remove(window) {
            self.after_loss();
        }
    }

    fn forget_dead_windows(&mut self) {
        self.unmapped.retain(Window::alive);
        if self.windows.retain(Window::alive) {
            self.after_loss();
        }
    }

    fn after_loss(&mut self) {
        self.arranged = true;
        self.clock.changed(Instant::now());
        let focused = self.keyboard().current_focus();
        let still_there = focused.is_some_and(|focus| {
            focus.alive() && self.windows.items().any(|window| Focus::of(window).as_ref() == Some(&focus))
        });
        if !still_there {
            match self.windows.top().cloned() {
                Some(window) => self.focus(&window),
                None => self.keyboard().set_focus(self, None, SERIAL_COUNTER.next_serial()),
            }
        }
    }

    /// Lifts `window` and its dialogs to the front and gives it the keyboard.
    pub fn focus(&mut self, window: &Window) {
        let mut lifted = vec![window.clone()];
        // A dialog stays above the window that it belongs to.
        let mut at = 0;
        while at < lifted.len() {
            let parent = lifted[at].clone();
            let children: Vec<_> = self
                .windows
                .items()
                .filter(|child| is_child_of(child, &parent) && !lifted.contains(child))
                .cloned()
                .collect();
            lifted.extend(children);
            at += 1;
        }
        let tools =
            self.windows.items().filter(|other| other.x11().is_some_and(is_tool) && !lifted.contains(other));
        let tools: Vec<_> = tools.cloned().collect();
        if window.x11().is_some() {
            lifted.extend(tools);
        }
        for window in &lifted {
            self.windows.raise(window);
            self.raise_x11(window);
        }
        self.arranged = true;
        self.clock.changed(Instant::now());
        for other in self.windows.items() {
            other.set_activated(other == window);
            if let Some(toplevel) = other.toplevel() {
                toplevel.send_pending_configure();
            }
        }
        if let Some(focus) = Focus::of(window) {
            self.keyboard().set_focus(self, Some(focus), SERIAL_COUNTER.next_serial());
        }
    }

    /// The window at `point` and the surface in it that takes input there, with the place of the surface.
    pub fn under(&self, point: Point<f64, Logical>) -> Option<(Window, WlSurface, Point<f64, Logical>)> {
        self.windows.iter().rev().find_map(|entry| {
            let origin = entry.location - entry.item.geometry().loc;
            let (surface, at) = entry.item.surface_under(point - origin.to_f64())?;
            Some((entry.item.clone(), surface, (at + origin).to_f64()))
        })
    }

    fn refresh_outputs(&self) {
        for entry in self.windows.iter() {
            // All windows are taken for visible: what is covered is not worth the bookkeeping on one output.
            let overlap = Rectangle::from_size(self.size);
            entry.item.enter(&self.output, overlap);
        }
    }

    fn refresh_pointer(&mut self) {
        let pointer = self.pointer();
        let location = pointer.current_location();
        let under = self.under(location).map(|(_, surface, at)| (surface, at));
        if under.as_ref().map(|(surface, _)| surface) != pointer.current_focus().as_ref() {
            let event = MotionEvent { location, serial: SERIAL_COUNTER.next_serial(), time: self.now_ms() };
            pointer.motion(self, under, &event);
            pointer.frame(self);
        }
    }

    // ---- output ----

    /// A viewer wants the whole picture, changed or not.
    pub fn refresh(&mut self) {
        self.screen.deliver_whole();
        self.clock.changed(Instant::now());
    }

    /// Whether anybody wants frames.
    pub fn set_active(&mut self, active: bool) {
        if active && !self.clock.is_active() {
            self.screen.deliver_whole();
        }
        self.clock.set_active(active, Instant::now());
    }

    /// A picture came back from the encoder.
    pub fn fed(&mut self) {
        self.clock.fed();
    }

    /// Changes size and rate of the output; windows follow.
    pub fn resize(&mut self, width: u32, height: u32, fps: u32) {
        let size = layout::output_size(width, height);
        self.clock.set_rate(fps);
        if size != self.size {
            let wake = Arc::clone(&self.wake);
            match Screen::new(&mut self.renderer, size, self.screen.sequence(), move || wake()) {
                Ok(screen) => self.screen = screen,
                Err(error) => {
                    warn!(width = size.w, height = size.h, %error, "there is no memory for the new size");
                    return;
                }
            }
            self.size = size;
            self.clock.fed();
        }
        self.announce_mode(fps);
        for window in self.windows.items().chain(&self.unmapped) {
            self.configure(window);
        }
        let places: Vec<_> =
            self.windows.items().map(|window| (window.clone(), self.place(window))).collect();
        for (window, place) in places {
            self.windows.relocate(&window, place);
        }
        let pointer = self.pointer();
        pointer.set_location(layout::clamp_to_output(pointer.current_location(), size));
        self.arranged = true;
        self.clock.changed(Instant::now());
    }

    fn announce_mode(&mut self, fps: u32) {
        let mode =
            Mode { size: (self.size.w, self.size.h).into(), refresh: (fps.clamp(1, 1000) * 1000) as i32 };
        for old in self.output.modes().into_iter().filter(|old| *old != mode) {
            self.output.delete_mode(old);
        }
        let here = Some(Point::from((0, 0)));
        self.output.change_current_state(Some(mode), Some(Transform::Normal), None, here);
        self.output.set_preferred(mode);
    }
}

/// Whether it is a tool window: it helps a main window and does not take the keyboard from it.
fn is_tool(x11: &X11Surface) -> bool {
    matches!(x11.window_type(), Some(WmWindowType::Utility | WmWindowType::Toolbar))
}

/// What the client of `window` said about it.
fn hints(window: &Window) -> Hints {
    if let Some(toplevel) = window.toplevel() {
        let (min, max) = smithay::wayland::compositor::with_states(toplevel.wl_surface(), |states| {
            let mut cached = states.cached_state.get::<SurfaceCachedState>();
            let current = cached.current();
            (current.min_size, current.max_size)
        });
        return Hints { has_parent: toplevel.parent().is_some(), dialog: false, min, max };
    }
    let Some(x11) = window.x11() else { return Hints::default() };
    let dialog = match x11.window_type() {
        None | Some(WmWindowType::Normal) => x11.is_popup(),
        Some(_) => true,
    };
    Hints {
        has_parent: x11.is_transient_for().is_some(),
        dialog,
        min: x11.min_size().unwrap_or_default(),
        max: x11.max_size().unwrap_or_default(),
    }
}

fn is_child_of(child: &Window, parent: &Window) -> bool {
    if let (Some(child), Some(parent)) = (child.toplevel(), parent.toplevel()) {
        return child.parent().as_ref() == Some(parent.wl_surface());
    }
    if let (Some(child), Some(parent)) = (child.x11(), parent.x11()) {
        return child.is_transient_for() == Some(parent.window_id());
    }
    false
}

/// Gives `seat` a keyboard with `layout` ("us", "de(nodeadkeys)"), or with "us" when there is no such layout; the layout
/// it has now.
fn add_keyboard(seat: &mut Seat<State>, layout: &str) -> Result<String, StartError> {
    for layout in [layout, "us"] {
        let (name, variant) = split_layout(layout);
        let config = XkbConfig { rules: "evdev", model: "pc105", layout: name, variant, options: None };
        match seat.add_keyboard(config, REPEAT_DELAY_MS, REPEAT_RATE) {
            Ok(_) => return Ok(layout.to_owned()),
            Err(error) => warn!(layout, %error, "this keyboard layout cannot be loaded"),
        }
    }
    Err(StartError::Keyboard { layout: layout.to_owned() })
}

/// Whether `layout` can be the name of an xkb layout with an optional variant; the empty one is xkb's default.
pub fn is_layout_name(layout: &str) -> bool {
    let usable = |c: char| c.is_ascii_alphanumeric() || "_-()".contains(c);
    layout.len() <= LAYOUT_BYTES && layout.chars().all(usable)
}

/// "de(nodeadkeys)" is layout "de", variant "nodeadkeys".
pub fn split_layout(layout: &str) -> (&str, &str) {
    match layout.split_once('(') {
        Some((name, rest)) => (name.trim(), rest.trim_end_matches(')').trim()),
        None => (layout.trim(), ""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_may_have_a_variant() {
        for (text, expected) in [
            ("us", ("us", "")),
            (" de ", ("de", "")),
            ("de(nodeadkeys)", ("de", "nodeadkeys")),
            ("us (intl)", ("us", "intl")),
            ("(", ("", "")),
            ("", ("", "")),
        ] {
            assert_eq!(split_layout(text), expected, "{text:?}");
        }
    }
}
