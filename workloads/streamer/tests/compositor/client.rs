//! A small Wayland application for tests: windows in one colour, and a record of what the compositor told it.

use std::{
    io::Write as _,
    os::{fd::AsFd as _, unix::net::UnixStream},
    path::Path,
    time::{Duration, Instant},
};

use wayland_client::{
    Connection, Dispatch, EventQueue, QueueHandle, delegate_noop,
    globals::{GlobalList, GlobalListContents, registry_queue_init},
    protocol::{
        wl_buffer::WlBuffer,
        wl_callback::{self, WlCallback},
        wl_compositor::WlCompositor,
        wl_keyboard::{self, WlKeyboard},
        wl_pointer::{self, WlPointer},
        wl_registry::{self, WlRegistry},
        wl_seat::{self, WlSeat},
        wl_shm::{Format, WlShm},
        wl_shm_pool::WlShmPool,
        wl_subcompositor::WlSubcompositor,
        wl_subsurface::WlSubsurface,
        wl_surface::{self, WlSurface},
        wl_touch::{self, WlTouch},
    },
};
use wayland_protocols::{
    wp::{
        pointer_constraints::zv1::client::{
            zwp_locked_pointer_v1::{self, ZwpLockedPointerV1},
            zwp_pointer_constraints_v1::{Lifetime, ZwpPointerConstraintsV1},
        },
        relative_pointer::zv1::client::{
            zwp_relative_pointer_manager_v1::ZwpRelativePointerManagerV1,
            zwp_relative_pointer_v1::{self, ZwpRelativePointerV1},
        },
    },
    xdg::shell::client::{
        xdg_popup::{self, XdgPopup},
        xdg_positioner::{Anchor, ConstraintAdjustment, Gravity, XdgPositioner},
        xdg_surface::{self, XdgSurface},
        xdg_toplevel::{self, XdgToplevel},
        xdg_wm_base::{self, XdgWmBase},
    },
};

/// What the compositor told.
#[derive(Debug, Default)]
pub struct Seen {
    /// Sizes of toplevels, as configured; 0: to be chosen.
    pub sizes: Vec<(i32, i32)>,
    /// Places of popups relative to their parents, with sizes.
    pub popups: Vec<(i32, i32, i32, i32)>,
    pub popups_done: usize,
    /// evdev codes and whether they were pressed.
    pub keys: Vec<(u32, bool)>,
    pub buttons: Vec<(u32, bool)>,
    /// The last position of the pointer.
    pub pointer: Option<(f64, f64)>,
    pub relative: Vec<(f64, f64)>,
    /// Sums of scrolling, horizontal and vertical.
    pub scrolled: (f64, f64),
    /// Fingers: "down 1 5 6", "motion 1 7 8", "up 1", "cancel".
    pub touches: Vec<String>,
    pub locked: bool,
    pub has_keyboard: bool,
    pub callbacks: usize,
    acknowledged: usize,
}

/// A connection with everything bound that tests need.
pub struct Client {
    pub connection: Connection,
    pub queue: EventQueue<Seen>,
    pub seen: Seen,
    pub compositor: WlCompositor,
    pub shm: WlShm,
    shell: XdgWmBase,
    seat: WlSeat,
    pub globals: GlobalList,
}

/// A toplevel with content.
pub struct Window {
    pub surface: WlSurface,
    pub xdg: XdgSurface,
    pub toplevel: XdgToplevel,
    pub size: (i32, i32),
}

impl Window {
    pub fn destroy(self) {
        self.toplevel.destroy();
        self.xdg.destroy();
        self.surface.destroy();
    }
}

impl Client {
    pub fn connect(runtime_dir: &Path, display: &str) -> Self {
        let socket = UnixStream::connect(runtime_dir.join(display)).expect("the compositor listens");
        let connection = Connection::from_socket(socket).expect("a fresh socket");
        let (globals, queue) = registry_queue_init::<Seen>(&connection).expect("globals are told");
        let handle = queue.handle();
        let seat: WlSeat = globals.bind(&handle, 5..=9, ()).expect("a seat");
        let (_keyboard, _pointer, _touch) =
            (seat.get_keyboard(&handle, ()), seat.get_pointer(&handle, ()), seat.get_touch(&handle, ()));
        Self {
            compositor: globals.bind(&handle, 4..=6, ()).expect("a compositor"),
            shm: globals.bind(&handle, 1..=1, ()).expect("shared memory"),
            shell: globals.bind(&handle, 3..=6, ()).expect("a shell"),
            seat,
            globals,
            connection,
            queue,
            seen: Seen::default(),
        }
    }

    pub fn handle(&self) -> QueueHandle<Seen> {
        self.queue.handle()
    }

    /// Sends everything and reads what was answered; `false` when the compositor closed the connection.
    pub fn roundtrip(&mut self) -> bool {
        self.queue.roundtrip(&mut self.seen).is_ok()
    }

    /// Reads until `done`.
    pub fn wait(&mut self, what: &str, mut done: impl FnMut(&Seen) -> bool) {
        let deadline = Instant::now() + super::PATIENCE;
        while !done(&self.seen) {
            assert!(Instant::now() < deadline, "waiting for {what}: {:?}", self.seen);
            assert!(self.roundtrip(), "waiting for {what}: the connection is closed: {:?}", self.seen);
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// A buffer of one colour (0xAARRGGBB).
    pub fn buffer(&self, (width, height): (i32, i32), colour: u32) -> WlBuffer {
        let mut file = tempfile::tempfile().expect("a temporary file");
        let pixels: Vec<u8> = (0..width * height).flat_map(|_| colour.to_le_bytes()).collect();
        file.write_all(&pixels).expect("there is room");
        let handle = self.handle();
        let pool = self.shm.create_pool(file.as_fd(), pixels.len() as i32, &handle, ());
        let buffer = pool.create_buffer(0, width, height, width * 4, Format::Argb8888, &handle, ());
        pool.destroy();
        buffer
    }

    /// A toplevel of `colour` in `size`, or in the size that it is given.
    pub fn window(&mut self, colour: u32, size: Option<(i32, i32)>, parent: Option<&Window>) -> Window {
        let handle = self.handle();
        let surface = self.compositor.create_surface(&handle, ());
        let xdg = self.shell.get_xdg_surface(&surface, &handle, ());
        let toplevel = xdg.get_toplevel(&handle, ());
        if let Some(parent) = parent {
            toplevel.set_parent(Some(&parent.toplevel));
        }
        let before = self.seen.acknowledged;
        surface.commit();
        self.wait("a configure", |seen| seen.acknowledged > before);
        let given = *self.seen.sizes.last().expect("configured");
        let size = size.unwrap_or(given);
        self.show(&surface, size, colour);
        Window { surface, xdg, toplevel, size }
    }

    /// Gives `surface` new content.
    pub fn show(&mut self, surface: &WlSurface, size: (i32, i32), colour: u32) {
        let buffer = self.buffer(size, colour);
        surface.attach(Some(&buffer), 0, 0);
        surface.damage_buffer(0, 0, i32::MAX, i32::MAX);
        surface.commit();
        assert!(self.roundtrip(), "the connection is closed");
    }

    /// A popup of `colour` in `size` at the bottom right of `anchor` in `parent`, which may slide.
    pub fn popup(
        &mut self,
        parent: &Window,
        anchor: (i32, i32),
        size: (i32, i32),
        colour: u32,
    ) -> (WlSurface, XdgPopup) {
        let handle = self.handle();
        let surface = self.compositor.create_surface(&handle, ());
        let xdg = self.shell.get_xdg_surface(&surface, &handle, ());
        let positioner = self.shell.create_positioner(&handle, ());
        positioner.set_size(size.0, size.1);
        positioner.set_anchor_rect(anchor.0, anchor.1, 1, 1);
        positioner.set_anchor(Anchor::BottomRight);
        positioner.set_gravity(Gravity::BottomRight);
        positioner.set_constraint_adjustment(ConstraintAdjustment::SlideX | ConstraintAdjustment::SlideY);
        let popup = xdg.get_popup(Some(&parent.xdg), &positioner, &handle, ());
        let before = self.seen.acknowledged;
        surface.commit();
        self.wait("a configure", |seen| seen.acknowledged > before);
        self.show(&surface, size, colour);
        (surface, popup)
    }

    /// A positioner without limits to its numbers.
    pub fn positioner(&self) -> XdgPositioner {
        self.shell.create_positioner(&self.handle(), ())
    }

    pub fn xdg_surface(&self, surface: &WlSurface) -> XdgSurface {
        self.shell.get_xdg_surface(surface, &self.handle(), ())
    }

    /// A part of `parent` in one colour, moving and showing on its own.
    pub fn part(&mut self, parent: &WlSurface, at: (i32, i32), size: (i32, i32), colour: u32) -> WlSurface {
        let handle = self.handle();
        let subcompositor: WlSubcompositor = self.globals.bind(&handle, 1..=1, ()).expect("a subcompositor");
        let surface = self.compositor.create_surface(&handle, ());
        let part = subcompositor.get_subsurface(&surface, parent, &handle, ());
        part.set_position(at.0, at.1);
        part.set_desync();
        parent.commit();
        self.show(&surface, size, colour);
        surface
    }

    /// Locks the pointer in `surface` and listens to its movement.
    pub fn lock_pointer(&mut self, surface: &WlSurface) -> ZwpLockedPointerV1 {
        let handle = self.handle();
        let constraints: ZwpPointerConstraintsV1 =
            self.globals.bind(&handle, 1..=1, ()).expect("constraints");
        let manager: ZwpRelativePointerManagerV1 =
            self.globals.bind(&handle, 1..=1, ()).expect("relative pointers");
        let pointer = self.seat.get_pointer(&handle, ());
        manager.get_relative_pointer(&pointer, &handle, ());
        constraints.lock_pointer(surface, &pointer, None, Lifetime::Persistent, &handle, ())
    }

    /// Asks to be called back when `surface` is shown.
    pub fn ask_callback(&self, surface: &WlSurface) {
        surface.frame(&self.handle(), ());
    }
}

impl Dispatch<WlRegistry, GlobalListContents> for Seen {
    fn event(
        _: &mut Self,
        _: &WlRegistry,
        _: wl_registry::Event,
        _: &GlobalListContents,
        _: &Connection,
        _: &QueueHandle<Self>,
    ) {
    }
}

macro_rules! listen {
    ($interface:ty, $event:ty, |$seen:ident, $proxy:ident, $e:ident| $body:block) => {
        impl Dispatch<$interface, ()> for Seen {
            fn event(
                $seen: &mut Self,
                $proxy: &$interface,
                $e: $event,
                (): &(),
                _: &Connection,
                _: &QueueHandle<Self>,
            ) {
                $body
            }
        }
    };
}

listen!(XdgWmBase, xdg_wm_base::Event, |_seen, base, event| {
    if let xdg_wm_base::Event::Ping { serial } = event {
        base.pong(serial);
    }
});
listen!(XdgSurface, xdg_surface::Event, |seen, surface, event| {
    if let xdg_surface::Event::Configure { serial } = event {
        surface.ack_configure(serial);
        seen.acknowledged += 1;
    }
});
listen!(XdgToplevel, xdg_toplevel::Event, |seen, _toplevel, event| {
    if let xdg_toplevel::Event::Configure { width, height, .. } = event {
        seen.sizes.push((width, height));
    }
});
listen!(XdgPopup, xdg_popup::Event, |seen, _popup, event| {
    match event {
        xdg_popup::Event::Configure { x, y, width, height } => seen.popups.push((x, y, width, height)),
        xdg_popup::Event::PopupDone => seen.popups_done += 1,
        _ => {}
    }
});
listen!(WlKeyboard, wl_keyboard::Event, |seen, _keyboard, event| {
    match event {
        wl_keyboard::Event::Enter { .. } => seen.has_keyboard = true,
        wl_keyboard::Event::Leave { .. } => seen.has_keyboard = false,
        wl_keyboard::Event::Key { key, state, .. } => {
            seen.keys.push((key, u32::from(state) == u32::from(wl_keyboard::KeyState::Pressed)));
        }
        _ => {}
    }
});
listen!(WlPointer, wl_pointer::Event, |seen, _pointer, event| {
    match event {
        wl_pointer::Event::Enter { surface_x: x, surface_y: y, .. }
        | wl_pointer::Event::Motion { surface_x: x, surface_y: y, .. } => seen.pointer = Some((x, y)),
        wl_pointer::Event::Leave { .. } => seen.pointer = None,
        wl_pointer::Event::Button { button, state, .. } => {
            seen.buttons.push((button, u32::from(state) == u32::from(wl_pointer::ButtonState::Pressed)));
        }
        wl_pointer::Event::Axis { axis, value, .. } => match u32::from(axis) {
            0 => seen.scrolled.1 += value,
            _ => seen.scrolled.0 += value,
        },
        _ => {}
    }
});
listen!(WlTouch, wl_touch::Event, |seen, _touch, event| {
    match event {
        wl_touch::Event::Down { id, x, y, .. } => seen.touches.push(format!("down {id} {x} {y}")),
        wl_touch::Event::Motion { id, x, y, .. } => seen.touches.push(format!("motion {id} {x} {y}")),
        wl_touch::Event::Up { id, .. } => seen.touches.push(format!("up {id}")),
        wl_touch::Event::Cancel => seen.touches.push("cancel".into()),
        _ => {}
    }
});
listen!(ZwpLockedPointerV1, zwp_locked_pointer_v1::Event, |seen, _pointer, event| {
    match event {
        zwp_locked_pointer_v1::Event::Locked => seen.locked = true,
        zwp_locked_pointer_v1::Event::Unlocked => seen.locked = false,
        _ => {}
    }
});
listen!(ZwpRelativePointerV1, zwp_relative_pointer_v1::Event, |seen, _pointer, event| {
    if let zwp_relative_pointer_v1::Event::RelativeMotion { dx, dy, .. } = event {
        seen.relative.push((dx, dy));
    }
});
listen!(WlCallback, wl_callback::Event, |seen, _callback, _event| {
    seen.callbacks += 1;
});
listen!(WlSurface, wl_surface::Event, |_seen, _surface, _event| {});
listen!(WlSeat, wl_seat::Event, |_seen, _seat, _event| {});

delegate_noop!(Seen: WlCompositor);
delegate_noop!(Seen: ignore WlShm);
delegate_noop!(Seen: WlShmPool);
delegate_noop!(Seen: ignore WlBuffer);
delegate_noop!(Seen: WlSubcompositor);
delegate_noop!(Seen: WlSubsurface);
delegate_noop!(Seen: XdgPositioner);
delegate_noop!(Seen: ZwpPointerConstraintsV1);
delegate_noop!(Seen: ZwpRelativePointerManagerV1);

/// Whether the compositor ends the connection by a protocol error.
pub fn is_refused(client: &mut Client) -> bool {
    let deadline = Instant::now() + super::PATIENCE;
    while client.roundtrip() && Instant::now() < deadline {}
    client.connection.protocol_error().is_some()
}
