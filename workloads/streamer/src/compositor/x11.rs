//! X11 applications: Xwayland as a supervised child, and the window manager that it needs.
//!
//! Windows without a frame are treated as Wayland ones are: main windows fill the output, dialogs are centred, and
//! what places itself (menus, tooltips) stays where it is. If Xwayland dies, its applications are gone, but the display
//! number stays and a new server is started after a pause that grows.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs::DirBuilder,
    io::{self, PipeReader, Read as _},
    os::{fd::OwnedFd, unix::fs::DirBuilderExt as _},
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use smithay::{
    delegate_xwayland_shell,
    reexports::{
        calloop::{
            Interest, Mode, PostAction, RegistrationToken,
            generic::Generic,
            timer::{TimeoutAction, Timer},
        },
        wayland_server::{Client, Display, Resource, protocol::wl_surface::WlSurface},
    },
    utils::{Logical, Rectangle},
    wayland::{
        selection::{
            SelectionTarget,
            data_device::{
                clear_data_device_selection, current_data_device_selection_userdata,
                request_data_device_client_selection, set_data_device_selection,
            },
            primary_selection::{
                clear_primary_selection, current_primary_selection_userdata,
                request_primary_client_selection, set_primary_selection,
            },
        },
        xwayland_shell::{XWaylandShellHandler, XWaylandShellState},
    },
    xwayland::{
        X11Surface, X11Wm, XWayland, XwmHandler,
        xwm::{Reorder, ResizeEdge, WmWindowProperty, XwmId},
    },
};
use tracing::{debug, info, warn};

use crate::x11_on_demand;

use super::{
    Event, Xwayland as Wanted,
    layout::{self, Role},
    state::State,
    window::Window,
};

/// Where X servers listen.
const SOCKETS: &str = "/tmp/.X11-unix";
/// Display numbers beyond those that smithay tries by itself (0 to 32).
const MORE_DISPLAYS: std::ops::Range<u32> = 33..1024;
/// First and longest pause before Xwayland is started again.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// A server that ran so long was well; the next pause is short again.
const WELL_AFTER: Duration = Duration::from_secs(60);
/// How long a stopping compositor waits for Xwayland to end.
const PATIENCE: Duration = Duration::from_secs(2);
/// Bits of an X11 id that a client chooses by itself; the rest names the client (Xorg's default, 512 clients at most).
const CLIENT_IDS: u32 = 0x1f_ffff;

/// One X server and its window manager.
pub(super) struct Xwayland {
    display: u32,
    environment: Vec<(&'static str, OsString)>,
    server: Option<Server>,
    /// Kept after its server is gone, for events that are still on their way; replaced by the next one.
    manager: Option<X11Wm>,
    started: Instant,
    pause: Duration,
}

struct Server {
    xwayland: XWayland,
    client: Client,
    /// Xwayland's standard error; its end is the end of the process.
    log: PipeReader,
    sources: Vec<RegistrationToken>,
}

/// What Xwayland needs to know; with a stand-in, also where that is found first.
fn environment(runtime_dir: &Path, wanted: &Wanted) -> io::Result<Vec<(&'static str, OsString)>> {
    let mut environment = vec![("XDG_RUNTIME_DIR", runtime_dir.into())];
    if let Wanted::OnDemand(program) = wanted {
        let folder = runtime_dir.join("xwayland");
        DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
        let link = folder.join(x11_on_demand::NAME);
        match std::os::unix::fs::symlink(program, &link) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin".into());
        let folders = std::iter::once(folder).chain(std::env::split_paths(&path));
        environment.push(("PATH", std::env::join_paths(folders).map_err(io::Error::other)?));
    }
    Ok(environment)
}

impl Xwayland {
    /// The display number, which stays the same over restarts.
    pub fn display(&self) -> u32 {
        self.display
    }
}

impl State {
    /// Starts Xwayland; its socket listens when this returns.
    ///
    /// # Errors
    /// When there is no `Xwayland` or no display number is free.
    pub fn start_x11(&mut self, runtime_dir: &Path, wanted: &Wanted) -> io::Result<()> {
        // The directory belongs to all users of the machine, like /tmp itself; it may be there already.
        match DirBuilder::new().mode(0o1777).create(SOCKETS) {
            Ok(()) => {
                // The process's umask has cut the mode.
                let all = std::os::unix::fs::PermissionsExt::from_mode(0o1777);
                std::fs::set_permissions(SOCKETS, all)?;
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
        let environment = environment(runtime_dir, wanted)?;
        let server = self.spawn_server(&environment, None).or_else(|error| {
            if error.kind() == io::ErrorKind::NotFound {
                return Err(error);
            }
            let mut others = MORE_DISPLAYS.map(|display| self.spawn_server(&environment, Some(display)));
            others.find_map(Result::ok).ok_or(error)
        })?;
        let display = server.xwayland.display_number();
        self.x11 = Some(Xwayland {
            display,
            environment,
            server: Some(server),
            manager: None,
            started: Instant::now(),
            pause: PAUSE.0,
        });
        self.watch_server()
    }

    fn spawn_server(
        &self,
        environment: &[(&'static str, OsString)],
        display: Option<u32>,
    ) -> io::Result<Server> {
        let (log, log_end) = io::pipe()?;
        let (xwayland, client) = XWayland::spawn(
            &self.display,
            display,
            environment.iter().map(|(name, value)| (name, value)),
            false,
            Stdio::null(),
            log_end,
            |_| (),
        )?;
        Ok(Server { xwayland, client, log, sources: Vec::new() })
    }

    fn watch_server(&mut self) -> io::Result<()> {
        let Some(server) = self.x11.as_mut().and_then(|x11| x11.server.as_mut()) else { return Ok(()) };
        rustix::io::ioctl_fionbio(&server.log, true)?;
        let log = Generic::new(server.log.try_clone()?, Interest::READ, Mode::Level);
        let ready =
            Generic::new(server.xwayland.poll_fd().try_clone_to_owned()?, Interest::READ, Mode::Level);
        let log = self.handle.insert_source(log, |_, log, state| Ok(state.read_server_log(log)));
        let ready = self.handle.insert_source(ready, |_, ready, state| Ok(state.start_manager(ready)));
        let sources = [log.map_err(|error| error.error), ready.map_err(|error| error.error)];
        for source in sources {
            server.sources.push(source.map_err(io::Error::other)?);
        }
        Ok(())
    }

    fn read_server_log(&mut self, log: &PipeReader) -> PostAction {
        let mut text = [0; 4096];
        let mut reader: &PipeReader = log;
        match reader.read(&mut text) {
            Ok(0) => {
                self.server_gone();
                PostAction::Remove
            }
            Ok(length) => {
                for line in
                    String::from_utf8_lossy(&text[..length]).lines().filter(|line| !line.trim().is_empty())
                {
                    debug!(line, "Xwayland says");
                }
                PostAction::Continue
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => PostAction::Continue,
            Err(error) => {
                warn!(%error, "Xwayland's messages cannot be read");
                self.server_gone();
                PostAction::Remove
            }
        }
    }

    /// Xwayland said something on `ready`: its display number, once it serves clients.
    fn start_manager(&mut self, ready: &OwnedFd) -> PostAction {
        let Some(x11) = &mut self.x11 else { return PostAction::Remove };
        let Some(server) = &mut x11.server else { return PostAction::Remove };
        let socket = match server.xwayland.take_socket() {
            Ok(Some(socket)) => socket,
            // Half of the number, or the end; the log's end says that it has died.
            Ok(None) if is_hung_up(ready) => return PostAction::Remove,
            Ok(None) => return PostAction::Continue,
            Err(error) => {
                warn!(%error, "Xwayland does not start");
                return PostAction::Remove;
            }
        };
        match X11Wm::start_wm(self.handle.clone(), socket, server.client.clone()) {
            Ok(manager) => {
                info!(display = x11.display, "Xwayland is ready");
                x11.manager = Some(manager);
                // What was copied before it ran.
                for (target, mime_types) in self.offered.clone() {
                    self.offer_to_x11(target, Some(mime_types));
                }
            }
            Err(error) => warn!(%error, "the X11 window manager does not start"),
        }
        PostAction::Remove
    }

    /// Xwayland has ended.
    fn server_gone(&mut self) {
        let Some(x11) = &mut self.x11 else { return };
        let Some(server) = x11.server.take() else { return };
        // After a good run the socket is there again at once: an application may be about to connect.
        let was_well = x11.started.elapsed() > WELL_AFTER;
        let pause = if was_well { Duration::ZERO } else { x11.pause };
        x11.pause = if was_well { PAUSE.0 } else { (pause * 2).min(PAUSE.1) };
        let (number, pause_ms) = (x11.display, pause.as_millis() as u64);
        if was_well {
            info!(display = number, "Xwayland has ended; it can be started again");
        } else {
            warn!(display = number, pause_ms, "Xwayland has ended; it is started again");
        }
        let gone: Vec<_> = self
            .windows
            .items()
            .chain(&self.unmapped)
            .filter(|window| window.x11().is_some())
            .cloned()
            .collect();
        for window in gone {
            self.forget(&window);
        }
        for source in server.sources {
            // The log's source removes itself: it is the one that is running.
            self.handle.remove(source);
        }
        drop(server.xwayland);
        (self.events)(Event::XwaylandExited);
        let timer = Timer::from_duration(pause);
        let again = self.handle.insert_source(timer, |_, (), state| {
            state.restart_server();
            TimeoutAction::Drop
        });
        if let Err(error) = again {
            warn!(error = %error.error, "Xwayland cannot be started again");
        }
    }

    fn restart_server(&mut self) {
        let Some(x11) = &self.x11 else { return };
        match self.spawn_server(&x11.environment, Some(x11.display)) {
            Ok(server) => {
                if let Some(x11) = &mut self.x11 {
                    x11.server = Some(server);
                    x11.started = Instant::now();
                }
                if let Err(error) = self.watch_server() {
                    warn!(%error, "Xwayland cannot be watched");
                }
            }
            Err(error) => warn!(%error, "Xwayland cannot be started again"),
        }
    }

    /// Ends Xwayland and waits until it is gone.
    pub fn stop_x11(&mut self, display: &mut Display<State>) {
        let Some(mut x11) = self.x11.take() else { return };
        let Some(server) = x11.server.take() else { return };
        for source in server.sources {
            self.handle.remove(source);
        }
        drop(x11.manager);
        drop(server.xwayland);
        // Its connection is closed with its next turn, and without it Xwayland ends.
        if let Err(error) = display.backend().dispatch_single_client(self, server.client.id()) {
            debug!(%error, "Xwayland's connection is closed");
        }
        let deadline = Instant::now() + PATIENCE;
        let mut text = [0; 4096];
        let mut log = &server.log;
        loop {
            match log.read(&mut text) {
                Ok(0) => return,
                Ok(_) => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return,
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(left) = rustix::time::Timespec::try_from(left) else { return };
            let mut fds = [rustix::event::PollFd::new(&server.log, rustix::event::PollFlags::IN)];
            if !matches!(rustix::event::poll(&mut fds, Some(&left)), Ok(1..)) {
                warn!("Xwayland has not ended in time");
                return;
            }
        }
    }

    /// How many X11 applications have windows.
    pub fn x11_clients(&self) -> usize {
        let windows = self.windows.items().chain(&self.unmapped);
        let clients: BTreeSet<u32> =
            windows.filter_map(Window::x11).map(|x11| x11.window_id() & !CLIENT_IDS).collect();
        clients.len()
    }

    /// Keeps the X server's stacking in step; it decides by it which window gets the pointer.
    pub fn raise_x11(&mut self, window: &Window) {
        if let (Some(surface), Some(manager)) = (window.x11(), self.manager())
            && let Err(error) = manager.raise_window(surface)
        {
            debug!(%error, "an X11 window could not be raised");
        }
    }

    /// Tells X11 clients that a Wayland client has a selection (`None`: has none any more).
    pub fn offer_to_x11(&mut self, target: SelectionTarget, mime_types: Option<Vec<String>>) {
        if let Some(manager) = self.manager()
            && let Err(error) = manager.new_selection(target, mime_types)
        {
            debug!(%error, "a selection could not be offered to X11 clients");
        }
    }

    /// A Wayland client reads the selection of an X11 client.
    pub fn send_from_x11(&mut self, target: SelectionTarget, mime_type: String, fd: OwnedFd) {
        let handle = self.handle.clone();
        if let Some(manager) = self.manager()
            && let Err(error) = manager.send_selection(target, mime_type, fd, handle)
        {
            debug!(%error, "a selection could not be read from an X11 client");
        }
    }

    fn manager(&mut self) -> Option<&mut X11Wm> {
        let x11 = self.x11.as_mut()?;
        x11.server.as_ref()?;
        x11.manager.as_mut()
    }

    /// Finds the surfaces of X11 windows that an Xwayland before 23.1 names by object id.
    pub fn match_x11(&mut self) {
        let Some(server) = self.x11.as_ref().and_then(|x11| x11.server.as_ref()) else { return };
        let matched: Vec<_> = self
            .windows
            .items()
            .chain(&self.unmapped)
            .filter_map(|window| {
                let id = window.unmatched_id(|surface| surface.id().protocol_id())?;
                let surface = server.client.object_from_protocol_id::<WlSurface>(&self.display, id).ok()?;
                // An id may be used again: a surface that another window has is not this one's.
                self.window_of(&surface).is_none().then(|| (window.clone(), surface))
            })
            .collect();
        for (window, surface) in matched {
            window.set_matched(surface);
            self.update_window(&window);
        }
    }

    fn window_of_x11(&self, x11: &X11Surface) -> Option<Window> {
        self.windows.items().chain(&self.unmapped).find(|window| window.x11() == Some(x11)).cloned()
    }

    /// Notes an X11 window that is being mapped; it is shown with its first content.
    fn add_x11(&mut self, x11: X11Surface) {
        if let Some(old) = self.window_of_x11(&x11) {
            self.forget(&old);
        }
        let window = Window::new_x11(x11);
        self.unmapped.push(window.clone());
        self.configure(&window);
        self.update_window(&window);
    }

    fn fill(&self, x11: &X11Surface) {
        if let Err(error) = x11.configure(Rectangle::from_size(self.size)) {
            debug!(%error, window = x11.window_id(), "an X11 window could not be configured");
        }
    }
}

fn is_hung_up(fd: &OwnedFd) -> bool {
    let mut fds = [rustix::event::PollFd::new(fd, rustix::event::PollFlags::empty())];
    let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut fds, Some(&now)).is_err()
        || fds[0].revents().contains(rustix::event::PollFlags::HUP)
}

/// What a window manager tells Xwayland is best effort: a window may be gone at any moment.
fn best_effort<E: std::fmt::Display>(result: Result<(), E>) {
    if let Err(error) = result {
        debug!(%error, "an X11 window did not take a change");
    }
}

impl XwmHandler for State {
    fn xwm_state(&mut self, _: XwmId) -> &mut X11Wm {
        let manager = self.x11.as_mut().and_then(|x11| x11.manager.as_mut());
        manager.expect("only a window manager that was started calls back, and the last one is kept")
    }

    fn new_window(&mut self, _: XwmId, _: X11Surface) {}

    fn new_override_redirect_window(&mut self, _: XwmId, _: X11Surface) {}

    fn map_window_request(&mut self, _: XwmId, x11: X11Surface) {
        best_effort(x11.set_mapped(true));
        self.add_x11(x11);
    }

    fn mapped_override_redirect_window(&mut self, _: XwmId, x11: X11Surface) {
        self.add_x11(x11);
    }

    fn unmapped_window(&mut self, _: XwmId, x11: X11Surface) {
        if let Some(window) = self.window_of_x11(&x11) {
            self.forget(&window);
        }
        if !x11.is_override_redirect() {
            best_effort(x11.set_mapped(false));
        }
    }

    fn destroyed_window(&mut self, _: XwmId, x11: X11Surface) {
        if let Some(window) = self.window_of_x11(&x11) {
            self.forget(&window);
        }
    }

    fn configure_request(
        &mut self,
        _: XwmId,
        x11: X11Surface,
        x: Option<i32>,
        y: Option<i32>,
        w: Option<u32>,
        h: Option<u32>,
        _: Option<Reorder>,
    ) {
        let mut geometry = x11.geometry();
        geometry.size.w = w.map_or(geometry.size.w, |w| w.min(i32::from(i16::MAX) as u32) as i32);
        geometry.size.h = h.map_or(geometry.size.h, |h| h.min(i32::from(i16::MAX) as u32) as i32);
        match self.window_of_x11(&x11) {
            Some(window) if self.role(&window) == Role::Fill || x11.is_fullscreen() => return,
            Some(_) => {
                geometry.size = layout::float_size(geometry.size, self.size);
                geometry.loc = self.place_x11(&x11, geometry.size);
            }
            // Not mapped yet: it may prepare itself as it likes.
            None => geometry.loc = (x.unwrap_or(geometry.loc.x), y.unwrap_or(geometry.loc.y)).into(),
        }
        best_effort(x11.configure(geometry));
    }

    fn configure_notify(
        &mut self,
        _: XwmId,
        x11: X11Surface,
        geometry: Rectangle<i32, Logical>,
        _: Option<u32>,
    ) {
        if let Some(window) = self.window_of_x11(&x11)
            && self.windows.relocate(&window, geometry.loc)
        {
            self.arranged = true;
            self.clock.changed(Instant::now());
        }
    }

    fn property_notify(&mut self, _: XwmId, x11: X11Surface, property: WmWindowProperty) {
        let matters = matches!(
            property,
            WmWindowProperty::NormalHints | WmWindowProperty::TransientFor | WmWindowProperty::WindowType
        );
        if let Some(window) = self.window_of_x11(&x11).filter(|_| matters && !x11.is_fullscreen()) {
            self.configure(&window);
        }
    }

    fn maximize_request(&mut self, _: XwmId, x11: X11Surface) {
        best_effort(x11.set_maximized(true));
        self.fill(&x11);
    }

    fn unmaximize_request(&mut self, _: XwmId, x11: X11Surface) {
        if let Some(window) = self.window_of_x11(&x11) {
            self.configure(&window);
        }
    }

    fn fullscreen_request(&mut self, _: XwmId, x11: X11Surface) {
        best_effort(x11.set_fullscreen(true));
        self.fill(&x11);
    }

    fn unfullscreen_request(&mut self, _: XwmId, x11: X11Surface) {
        best_effort(x11.set_fullscreen(false));
        if let Some(window) = self.window_of_x11(&x11) {
            self.configure(&window);
        }
    }

    fn resize_request(&mut self, _: XwmId, _: X11Surface, _: u32, _: ResizeEdge) {}

    fn move_request(&mut self, _: XwmId, _: X11Surface, _: u32) {}

    fn allow_selection_access(&mut self, _: XwmId, _: SelectionTarget) -> bool {
        // As for Wayland clients: whoever has the keyboard.
        self.keyboard().current_focus().is_some_and(|focus| focus.x11().is_some())
    }

    fn send_selection(&mut self, _: XwmId, target: SelectionTarget, mime_type: String, fd: OwnedFd) {
        let sent = match target {
            SelectionTarget::Clipboard => request_data_device_client_selection(&self.seat, mime_type, fd)
                .map_err(|error| error.to_string()),
            SelectionTarget::Primary => {
                request_primary_client_selection(&self.seat, mime_type, fd).map_err(|error| error.to_string())
            }
        };
        if let Err(error) = sent {
            debug!(error, "a selection could not be sent to an X11 client");
        }
    }

    fn new_selection(&mut self, _: XwmId, target: SelectionTarget, mime_types: Vec<String>) {
        match target {
            SelectionTarget::Clipboard => {
                set_data_device_selection(&self.display, &self.seat, mime_types, ())
            }
            SelectionTarget::Primary => set_primary_selection(&self.display, &self.seat, mime_types, ()),
        }
    }

    fn cleared_selection(&mut self, _: XwmId, target: SelectionTarget) {
        match target {
            SelectionTarget::Clipboard if current_data_device_selection_userdata(&self.seat).is_some() => {
                clear_data_device_selection(&self.display, &self.seat);
            }
            SelectionTarget::Primary if current_primary_selection_userdata(&self.seat).is_some() => {
                clear_primary_selection(&self.display, &self.seat);
            }
            _ => {}
        }
    }

    fn disconnected(&mut self, _: XwmId) {
        debug!("the connection to Xwayland is closed");
    }
}

impl XWaylandShellHandler for State {
    fn xwayland_shell_state(&mut self) -> &mut XWaylandShellState {
        &mut self.xwayland_shell_state
    }

    fn surface_associated(&mut self, _: XwmId, _: WlSurface, x11: X11Surface) {
        // The content may have come first.
        if let Some(window) = self.window_of_x11(&x11) {
            self.update_window(&window);
        }
    }
}

delegate_xwayland_shell!(State);
