//! The Wayland protocols, one handler after the other. They keep the state true and leave what follows (focus, frames,
//! news) to it.

use std::{os::fd::OwnedFd, time::Instant};

use smithay::{
    backend::renderer::utils::on_commit_buffer_handler,
    delegate_compositor, delegate_cursor_shape, delegate_data_device, delegate_fractional_scale,
    delegate_output, delegate_pointer_constraints, delegate_presentation, delegate_primary_selection,
    delegate_relative_pointer, delegate_seat, delegate_shm, delegate_single_pixel_buffer,
    delegate_viewporter, delegate_xdg_activation, delegate_xdg_decoration, delegate_xdg_shell,
    desktop::{
        PopupKeyboardGrab, PopupKind, PopupPointerGrab, PopupUngrabStrategy, find_popup_root_surface,
        get_popup_toplevel_coords,
    },
    input::{
        Seat, SeatHandler, SeatState,
        pointer::{CursorImageStatus, Focus as GrabFocus, PointerHandle},
    },
    reexports::{
        wayland_protocols::xdg::{
            decoration::zv1::server::zxdg_toplevel_decoration_v1::Mode as DecorationMode,
            shell::server::xdg_toplevel::State as ToplevelState,
        },
        wayland_server::{
            Client, Resource,
            backend::DisconnectReason,
            protocol::{
                wl_buffer::WlBuffer, wl_data_source::WlDataSource, wl_output::WlOutput, wl_seat::WlSeat,
                wl_surface::WlSurface,
            },
        },
    },
    utils::{Logical, Point, Rectangle, Serial},
    wayland::{
        buffer::BufferHandler,
        compositor::{
            CompositorClientState, CompositorHandler, CompositorState, get_parent, is_sync_subsurface,
            with_states,
        },
        fractional_scale::{FractionalScaleHandler, with_fractional_scale},
        output::OutputHandler,
        pointer_constraints::{PointerConstraintsHandler, with_pointer_constraint},
        seat::WaylandFocus,
        selection::{
            SelectionHandler, SelectionSource, SelectionTarget,
            data_device::{
                ClientDndGrabHandler, DataDeviceHandler, DataDeviceState, ServerDndGrabHandler,
                set_data_device_focus,
            },
            primary_selection::{PrimarySelectionHandler, PrimarySelectionState, set_primary_focus},
        },
        shell::xdg::{
            PopupSurface, PositionerState, ToplevelSurface, XdgShellHandler, XdgShellState,
            decoration::XdgDecorationHandler,
        },
        shm::{ShmHandler, ShmState},
        tablet_manager::TabletSeatHandler,
        xdg_activation::{
            XdgActivationHandler, XdgActivationState, XdgActivationToken, XdgActivationTokenData,
        },
    },
    xwayland::XWaylandClientData,
};
use tracing::{debug, warn};

use super::{
    cursor,
    focus::Focus,
    state::{ClientState, State},
    window::Window,
};

/// Coordinates of clients beyond this make no sense on any output; within it no sum of a few can overflow.
const FAR: i32 = 1 << 20;

// ---- surfaces ----

impl CompositorHandler for State {
    fn compositor_state(&mut self) -> &mut CompositorState {
        &mut self.compositor_state
    }

    fn client_compositor_state<'a>(&self, client: &'a Client) -> &'a CompositorClientState {
        if let Some(xwayland) = client.get_data::<XWaylandClientData>() {
            return &xwayland.compositor_state;
        }
        &client
            .get_data::<ClientState>()
            .expect("every other client gets this data when it connects")
            .compositor
    }

    fn commit(&mut self, surface: &WlSurface) {
        if self.is_flood() {
            if let Some(client) = surface.client() {
                warn!("a Wayland client sends faster than it can be served and is disconnected");
                self.display.backend_handle().kill_client(client.id(), DisconnectReason::ConnectionClosed);
            }
            return;
        }
        on_commit_buffer_handler::<Self>(surface);
        self.clock.committed();
        self.popups.commit(surface);

        if self.cursor.surface() == Some(surface) {
            cursor::apply_offset(surface);
            return;
        }
        if self.drag_icon.as_ref() == Some(surface) {
            self.clock.changed(Instant::now());
            return;
        }
        if is_sync_subsurface(surface) {
            return;
        }
        let mut root = surface.clone();
        while let Some(parent) = get_parent(&root) {
            root = parent;
        }
        if let Some(window) = self.window_of(&root) {
            self.configure_first(&window);
            self.update_window(&window);
        } else if let Some(popup) = self.popups.find_popup(&root) {
            self.commit_popup(&popup);
        }
    }
}

impl State {
    /// The first commit of a toplevel asks what to do.
    fn configure_first(&mut self, window: &Window) {
        if let Some(toplevel) = window.toplevel().filter(|toplevel| !toplevel.is_initial_configure_sent()) {
            self.configure(window);
            toplevel.send_configure();
        }
    }

    fn commit_popup(&mut self, popup: &PopupKind) {
        if let PopupKind::Xdg(popup) = popup
            && !popup.is_initial_configure_sent()
            && let Err(error) = popup.send_configure()
        {
            // The positioner may not be changed before the first configure; nothing was changed.
            debug!(%error, "a popup could not be configured");
        }
        self.arranged = true;
        self.clock.changed(Instant::now());
    }

    /// Puts a popup where its positioner wants it, but on the output.
    fn place_popup(&self, popup: &PopupSurface, positioner: PositionerState) {
        let positioner = sane(positioner);
        let mut geometry = positioner.get_geometry();
        if let Ok(root) = find_popup_root_surface(&PopupKind::Xdg(popup.clone()))
            && let Some(window) = self.window_of(&root)
        {
            let origin =
                self.windows.get(&window).map_or_else(|| self.place(&window), |entry| entry.location);
            let parent = get_popup_toplevel_coords(&PopupKind::Xdg(popup.clone()));
            let output = Rectangle::new(Point::from((0, 0)) - origin - parent, self.size);
            geometry = positioner.get_unconstrained_geometry(output);
        }
        popup.with_pending_state(|pending| {
            pending.geometry = geometry;
            pending.positioner = positioner;
        });
    }
}

/// The positioner with numbers that can be reckoned with.
fn sane(mut positioner: PositionerState) -> PositionerState {
    let near = |value: i32| value.clamp(-FAR, FAR);
    let point = |point: Point<i32, Logical>| Point::from((near(point.x), near(point.y)));
    positioner.offset = point(positioner.offset);
    positioner.anchor_rect.loc = point(positioner.anchor_rect.loc);
    for size in [&mut positioner.anchor_rect.size, &mut positioner.rect_size] {
        *size = (size.w.clamp(0, FAR), size.h.clamp(0, FAR)).into();
    }
    positioner
}

impl BufferHandler for State {
    fn buffer_destroyed(&mut self, _: &WlBuffer) {}
}

impl ShmHandler for State {
    fn shm_state(&self) -> &ShmState {
        &self.shm_state
    }
}

impl OutputHandler for State {}

impl FractionalScaleHandler for State {
    fn new_fractional_scale(&mut self, surface: WlSurface) {
        with_states(&surface, |states| with_fractional_scale(states, |scale| scale.set_preferred_scale(1.0)));
    }
}

// ---- windows ----

impl XdgShellHandler for State {
    fn xdg_shell_state(&mut self) -> &mut XdgShellState {
        &mut self.xdg_shell_state
    }

    fn new_toplevel(&mut self, toplevel: ToplevelSurface) {
        // Configured with its first commit, when its parent and limits are known.
        toplevel.with_pending_state(|pending| pending.decoration_mode = Some(DecorationMode::ServerSide));
        self.unmapped.push(Window::new_wayland(toplevel));
    }

    fn toplevel_destroyed(&mut self, toplevel: ToplevelSurface) {
        if let Some(window) = self.window_of(toplevel.wl_surface()) {
            self.forget(&window);
        }
    }

    fn parent_changed(&mut self, toplevel: ToplevelSurface) {
        if let Some(window) =
            self.window_of(toplevel.wl_surface()).filter(|_| toplevel.is_initial_configure_sent())
        {
            self.configure(&window);
        }
    }

    fn fullscreen_request(&mut self, toplevel: ToplevelSurface, _: Option<WlOutput>) {
        toplevel.with_pending_state(|pending| {
            pending.states.set(ToplevelState::Fullscreen);
            pending.size = Some(self.size);
        });
        answer(&toplevel);
    }

    fn unfullscreen_request(&mut self, toplevel: ToplevelSurface) {
        toplevel.with_pending_state(|pending| pending.states.unset(ToplevelState::Fullscreen));
        if let Some(window) = self.window_of(toplevel.wl_surface()) {
            self.configure(&window);
        }
        answer(&toplevel);
    }

    fn maximize_request(&mut self, toplevel: ToplevelSurface) {
        // Main windows are maximised already, dialogs do not get larger.
        answer(&toplevel);
    }

    fn unmaximize_request(&mut self, toplevel: ToplevelSurface) {
        answer(&toplevel);
    }

    fn new_popup(&mut self, popup: PopupSurface, positioner: PositionerState) {
        self.place_popup(&popup, positioner);
        if let Err(error) = self.popups.track_popup(PopupKind::Xdg(popup)) {
            debug!(%error, "a popup was gone before it came");
        }
    }

    fn popup_destroyed(&mut self, _: PopupSurface) {
        self.arranged = true;
        self.clock.changed(Instant::now());
    }

    fn reposition_request(&mut self, popup: PopupSurface, positioner: PositionerState, token: u32) {
        self.place_popup(&popup, positioner);
        popup.send_repositioned(token);
    }

    fn grab(&mut self, popup: PopupSurface, seat: WlSeat, serial: Serial) {
        let Some(seat) = Seat::<Self>::from_resource(&seat) else { return };
        let popup = PopupKind::Xdg(popup);
        let root = find_popup_root_surface(&popup).ok().and_then(|root| self.window_of(&root));
        let Some(root) = root.as_ref().and_then(Focus::of) else { return };
        let mut grab = match self.popups.grab_popup(root, popup, &seat, serial) {
            Ok(grab) => grab,
            Err(error) => {
                debug!(%error, "a popup's grab was refused");
                return;
            }
        };
        let (keyboard, pointer) = (self.keyboard(), self.pointer());
        let other_grab = |has_grab: &dyn Fn(Serial) -> bool| {
            !(has_grab(serial) || grab.previous_serial().is_some_and(has_grab))
        };
        if (keyboard.is_grabbed() && other_grab(&|serial| keyboard.has_grab(serial)))
            || (pointer.is_grabbed() && other_grab(&|serial| pointer.has_grab(serial)))
        {
            grab.ungrab(PopupUngrabStrategy::All);
            return;
        }
        keyboard.set_focus(self, grab.current_grab(), serial);
        keyboard.set_grab(self, PopupKeyboardGrab::new(&grab), serial);
        pointer.set_grab(self, PopupPointerGrab::new(&grab), serial, GrabFocus::Keep);
    }
}

/// A request for a state has to be answered even if nothing changes; one before the first commit is answered with it.
fn answer(toplevel: &ToplevelSurface) {
    if toplevel.is_initial_configure_sent() {
        toplevel.send_configure();
    }
}

impl XdgDecorationHandler for State {
    fn new_decoration(&mut self, toplevel: ToplevelSurface) {
        self.request_mode(toplevel, DecorationMode::ServerSide);
    }

    fn request_mode(&mut self, toplevel: ToplevelSurface, _: DecorationMode) {
        // The server decorates, and draws nothing: a kiosk has no title bars.
        toplevel.with_pending_state(|pending| pending.decoration_mode = Some(DecorationMode::ServerSide));
        answer(&toplevel);
    }

    fn unset_mode(&mut self, toplevel: ToplevelSurface) {
        self.request_mode(toplevel, DecorationMode::ServerSide);
    }
}

impl XdgActivationHandler for State {
    fn activation_state(&mut self) -> &mut XdgActivationState {
        &mut self.activation_state
    }

    fn request_activation(
        &mut self,
        token: XdgActivationToken,
        _: XdgActivationTokenData,
        surface: WlSurface,
    ) {
        self.activation_state.remove_token(&token);
        if let Some(window) = self.window_of(&surface).filter(|window| self.windows.get(window).is_some()) {
            self.focus(&window);
        }
    }
}

// ---- seat ----

impl SeatHandler for State {
    type KeyboardFocus = Focus;
    type PointerFocus = WlSurface;
    type TouchFocus = WlSurface;

    fn seat_state(&mut self) -> &mut SeatState<Self> {
        &mut self.seat_state
    }

    fn focus_changed(&mut self, seat: &Seat<Self>, focus: Option<&Focus>) {
        let client = focus.and_then(|focus| focus.wl_surface()).and_then(|surface| surface.client());
        set_data_device_focus(&self.display, seat, client.clone());
        set_primary_focus(&self.display, seat, client);
    }

    fn cursor_image(&mut self, _: &Seat<Self>, image: CursorImageStatus) {
        self.cursor.set(image);
    }
}

impl TabletSeatHandler for State {}

impl PointerConstraintsHandler for State {
    fn new_constraint(&mut self, surface: &WlSurface, pointer: &PointerHandle<Self>) {
        if pointer.current_focus().as_ref() == Some(surface) {
            self.activate_constraint();
        }
    }

    fn cursor_position_hint(
        &mut self,
        surface: &WlSurface,
        pointer: &PointerHandle<Self>,
        hint: Point<f64, Logical>,
    ) {
        let active = with_pointer_constraint(surface, pointer, |constraint| {
            constraint.is_some_and(|constraint| constraint.is_active())
        });
        let here = pointer.current_location();
        if let Some((_, under, origin)) = self.under(here).filter(|_| active)
            && under == *surface
        {
            pointer.set_location(super::layout::clamp_to_output(origin + hint, self.size));
        }
    }
}

// ---- selections ----

impl SelectionHandler for State {
    type SelectionUserData = ();

    fn new_selection(&mut self, target: SelectionTarget, source: Option<SelectionSource>, _: Seat<Self>) {
        let mime_types = source.map(|source| source.mime_types());
        self.offered.retain(|(other, _)| *other != target);
        self.offered.extend(mime_types.clone().map(|mime_types| (target, mime_types)));
        self.offer_to_x11(target, mime_types);
    }

    fn send_selection(
        &mut self,
        target: SelectionTarget,
        mime_type: String,
        fd: OwnedFd,
        _: Seat<Self>,
        (): &(),
    ) {
        self.send_from_x11(target, mime_type, fd);
    }
}

impl DataDeviceHandler for State {
    fn data_device_state(&self) -> &DataDeviceState {
        &self.data_device_state
    }
}

impl ClientDndGrabHandler for State {
    fn started(&mut self, _: Option<WlDataSource>, icon: Option<WlSurface>, _: Seat<Self>) {
        self.drag_icon = icon;
        self.clock.changed(Instant::now());
    }

    fn dropped(&mut self, _: Option<WlSurface>, _: bool, _: Seat<Self>) {
        self.drag_icon = None;
        self.clock.changed(Instant::now());
    }
}

impl ServerDndGrabHandler for State {
    fn send(&mut self, _: String, _: OwnedFd, _: Seat<Self>) {}
}

impl PrimarySelectionHandler for State {
    fn primary_selection_state(&self) -> &PrimarySelectionState {
        &self.primary_selection_state
    }
}

delegate_compositor!(State);
delegate_shm!(State);
delegate_output!(State);
delegate_fractional_scale!(State);
delegate_viewporter!(State);
delegate_presentation!(State);
delegate_single_pixel_buffer!(State);
delegate_xdg_shell!(State);
delegate_xdg_decoration!(State);
delegate_xdg_activation!(State);
delegate_seat!(State);
delegate_cursor_shape!(State);
delegate_relative_pointer!(State);
delegate_pointer_constraints!(State);
delegate_data_device!(State);
delegate_primary_selection!(State);
