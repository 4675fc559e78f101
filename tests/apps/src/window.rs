//! One fullscreen Wayland window drawn by the processor into shared memory, and the loop around it.
//! What is drawn, and when a frame is wanted, is the [`Drawing`]'s business.

use std::{
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    fs::MemfdFlags,
    mm::{MapFlags, ProtFlags},
};
use wayland_client::{
    Connection, Dispatch, EventQueue, QueueHandle, WEnum, delegate_noop,
    protocol::{
        wl_buffer, wl_callback, wl_compositor, wl_keyboard, wl_output, wl_pointer, wl_registry, wl_seat,
        wl_shm, wl_shm_pool, wl_surface,
    },
};
use wayland_protocols::xdg::shell::client::{xdg_surface, xdg_toplevel, xdg_wm_base};

use crate::canvas::{Canvas, Rect};

/// What the seat tells.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Input {
    /// A key by its evdev code.
    Key {
        /// Evdev code.
        code: u32,
        /// Down or up.
        pressed: bool,
    },
    /// Where the pointer is, in pixels of the window.
    Pointer {
        /// Pixels from the left.
        x: f64,
        /// Pixels from the top.
        y: f64,
    },
    /// A pointer button by its evdev code (`BTN_LEFT` is 0x110).
    Button {
        /// Evdev code.
        code: u32,
        /// Down or up.
        pressed: bool,
    },
    /// Vertical wheel movement as Wayland gives it, positive is down.
    Wheel(f64),
}

/// What a program draws.
pub trait Drawing {
    /// Paints the next frame and returns what changed since the frame before. A fresh canvas has to be
    /// painted whole; the changes must still be named as for any other.
    fn draw(&mut self, canvas: &mut Canvas<'_>) -> Vec<Rect>;

    /// Takes input.
    fn input(&mut self, input: Input);
}

/// When the next frame is drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pace {
    /// Whenever the compositor asks for one.
    Callback,
    /// So many times a second by our own clock, but never more than the compositor asks for.
    Rate(f64),
    /// After input only.
    Input,
    /// Once for every size, then never.
    Once,
}

/// Opens the window and runs until it is closed or the compositor goes away.
///
/// # Errors
/// No compositor, one without the globals needed, or memory that cannot be shared.
pub fn run(title: &str, drawing: impl Drawing + 'static, pace: Pace) -> Result<()> {
    let connection =
        Connection::connect_to_env().context("connecting to the Wayland compositor (WAYLAND_DISPLAY)")?;
    let mut queue = connection.new_event_queue();
    let handle = queue.handle();
    connection.display().get_registry(&handle, ());
    let mut window = Window {
        drawing: Box::new(drawing),
        pace,
        compositor: None,
        shm: None,
        shell: None,
        seat_devices: (false, false),
        mode: None,
        surface: None,
        size: None,
        asked: (0, 0),
        buffers: Vec::new(),
        callback_pending: false,
        wanted: true,
        closed: false,
    };
    queue.roundtrip(&mut window).context("reading the compositor's globals")?;
    window.open(title, &handle)?;

    let mut next = Instant::now();
    while !window.closed {
        queue.dispatch_pending(&mut window).context("handling Wayland events")?;
        if let Pace::Rate(rate) = pace {
            let now = Instant::now();
            if !window.wanted && now >= next {
                window.wanted = true;
                // After a pause the rhythm starts anew instead of catching up.
                next = (next + Duration::from_secs_f64(1.0 / rate)).max(now);
            }
        }
        if window.wanted && !window.callback_pending && window.size.is_some() {
            // Without a free buffer the release event of one wakes us up.
            window.draw(&handle)?;
        }
        let timer = match pace {
            Pace::Rate(_) if !window.wanted => Some(next),
            _ => None,
        };
        wait(&connection, &mut queue, timer)?;
    }
    Ok(())
}

/// Sleeps until the compositor says something or the timer is due.
fn wait(connection: &Connection, queue: &mut EventQueue<Window>, timer: Option<Instant>) -> Result<()> {
    connection.flush().context("writing to the compositor")?;
    let Some(guard) = queue.prepare_read() else { return Ok(()) };
    let timeout = timer.map(|at| {
        let left = at.saturating_duration_since(Instant::now());
        Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() }
    });
    let ready = {
        let descriptor = guard.connection_fd();
        let mut polled = [PollFd::new(&descriptor, PollFlags::IN)];
        match rustix::event::poll(&mut polled, timeout.as_ref()) {
            Ok(count) => count > 0,
            Err(rustix::io::Errno::INTR) => false,
            Err(error) => return Err(error).context("waiting for the compositor"),
        }
    };
    if ready {
        match guard.read() {
            // Half a message: the rest is on its way, and wakes us up again.
            Err(wayland_client::backend::WaylandError::Io(error))
                if error.kind() == std::io::ErrorKind::WouldBlock => {}
            outcome => {
                outcome.context("reading from the compositor")?;
            }
        }
    }
    Ok(())
}

/// Shared memory of one frame. Which buffer is free is known from the compositor's release event.
struct Buffer {
    buffer: wl_buffer::WlBuffer,
    memory: *mut u32,
    pixels: usize,
    busy: bool,
    fresh: bool,
    _file: OwnedFd,
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.buffer.destroy();
        // SAFETY: `memory` was mapped with exactly this length and nobody keeps a slice of it.
        let _ = unsafe { rustix::mm::munmap(self.memory.cast(), self.pixels * 4) };
    }
}

struct Window {
    drawing: Box<dyn Drawing>,
    pace: Pace,
    compositor: Option<wl_compositor::WlCompositor>,
    shm: Option<wl_shm::WlShm>,
    shell: Option<xdg_wm_base::XdgWmBase>,
    seat_devices: (bool, bool),
    mode: Option<(usize, usize)>,
    surface: Option<wl_surface::WlSurface>,
    /// Size of the frames, once configured.
    size: Option<(usize, usize)>,
    /// Size in the last toplevel configure, 0 where the choice is ours.
    asked: (usize, usize),
    buffers: Vec<Buffer>,
    callback_pending: bool,
    wanted: bool,
    closed: bool,
}

impl Window {
    fn open(&mut self, title: &str, handle: &QueueHandle<Self>) -> Result<()> {
        let (Some(compositor), Some(shell), true) = (&self.compositor, &self.shell, self.shm.is_some())
        else {
            bail!("the compositor lacks wl_compositor, wl_shm or xdg_wm_base");
        };
        let surface = compositor.create_surface(handle, ());
        let shell_surface = shell.get_xdg_surface(&surface, handle, ());
        let toplevel = shell_surface.get_toplevel(handle, ());
        toplevel.set_title(title.into());
        toplevel.set_app_id(title.into());
        toplevel.set_fullscreen(None);
        surface.commit();
        self.surface = Some(surface);
        Ok(())
    }

    fn draw(&mut self, handle: &QueueHandle<Self>) -> Result<()> {
        let (Some(surface), Some((width, height))) = (self.surface.clone(), self.size) else { return Ok(()) };
        let index = match self.buffers.iter().position(|buffer| !buffer.busy) {
            Some(index) => index,
            None if self.buffers.len() < 3 => {
                let buffer = self.allocate(width, height, handle)?;
                self.buffers.push(buffer);
                self.buffers.len() - 1
            }
            None => return Ok(()),
        };
        let buffer = &mut self.buffers[index];
        // SAFETY: the mapping is `pixels` long, lives as long as the buffer, and the compositor only reads it
        // while `busy` is set.
        let pixels = unsafe { std::slice::from_raw_parts_mut(buffer.memory, buffer.pixels) };
        let mut canvas = Canvas { pixels, width, height, fresh: buffer.fresh };
        let damage = self.drawing.draw(&mut canvas);
        buffer.fresh = false;
        buffer.busy = true;
        surface.attach(Some(&buffer.buffer), 0, 0);
        for rect in damage {
            surface.damage_buffer(rect.x as i32, rect.y as i32, rect.width as i32, rect.height as i32);
        }
        surface.frame(handle, ());
        surface.commit();
        self.callback_pending = true;
        self.wanted = self.pace == Pace::Callback;
        Ok(())
    }

    fn allocate(&self, width: usize, height: usize, handle: &QueueHandle<Self>) -> Result<Buffer> {
        let shm = self.shm.as_ref().context("wl_shm is gone")?;
        let bytes = width * height * 4;
        let file = rustix::fs::memfd_create("fanlight-frame", MemfdFlags::CLOEXEC)
            .context("creating a memory file")?;
        rustix::fs::ftruncate(&file, bytes as u64)
            .with_context(|| format!("reserving {bytes} bytes for a frame"))?;
        // SAFETY: a new mapping of a file of at least this length, at an address the kernel chooses.
        let memory = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &file,
                0,
            )
        }
        .with_context(|| format!("mapping {bytes} bytes for a frame"))?;
        let pool = shm.create_pool(file.as_fd(), bytes as i32, handle, ());
        let (width_px, height_px) = (width as i32, height as i32);
        let buffer =
            pool.create_buffer(0, width_px, height_px, width_px * 4, wl_shm::Format::Xrgb8888, handle, ());
        pool.destroy();
        Ok(Buffer {
            buffer,
            memory: memory.cast(),
            pixels: width * height,
            busy: false,
            fresh: true,
            _file: file,
        })
    }

    fn take(&mut self, input: Input) {
        self.drawing.input(input);
        self.wanted |= self.pace == Pace::Input;
    }
}

impl Dispatch<wl_registry::WlRegistry, ()> for Window {
    fn event(
        window: &mut Self,
        registry: &wl_registry::WlRegistry,
        event: wl_registry::Event,
        _: &(),
        _: &Connection,
        handle: &QueueHandle<Self>,
    ) {
        let wl_registry::Event::Global { name, interface, version } = event else { return };
        match interface.as_str() {
            // Version 4 has damage in buffer coordinates.
            "wl_compositor" => window.compositor = Some(registry.bind(name, version.min(4), handle, ())),
            "wl_shm" => window.shm = Some(registry.bind(name, 1, handle, ())),
            "xdg_wm_base" => window.shell = Some(registry.bind(name, 1, handle, ())),
            "wl_seat" => {
                registry.bind::<wl_seat::WlSeat, _, _>(name, version.min(5), handle, ());
            }
            "wl_output" => {
                registry.bind::<wl_output::WlOutput, _, _>(name, 1, handle, ());
            }
            _ => {}
        }
    }
}

impl Dispatch<wl_output::WlOutput, ()> for Window {
    fn event(
        window: &mut Self,
        _: &wl_output::WlOutput,
        event: wl_output::Event,
        _: &(),
        _: &Connection,
        _: &QueueHandle<Self>,
    ) {
        if let wl_output::Event::Mode { flags: WEnum::Value(flags), width, height, .. } = event
            && flags.contains(wl_output::Mode::Current)
        {
            window.mode = Some((width.max(1) as usize, height.max(1) as usize));
        }
    }
}

impl Dispatch<xdg_wm_base::XdgWmBase, ()> for Window {
    fn event(
        _: &mut Self,
        shell: &xdg_wm_base::XdgWmBase,
        event: xdg_wm_base::Event,
        _: &(),
        _: &Connection,
        _: &QueueHandle<Self>,
    ) {
        if let xdg_wm_base::Event::Ping { serial } = event {
            shell.pong(serial);
        }
    }
}

impl Dispatch<xdg_toplevel::XdgToplevel, ()> for Window {
    fn event(
        window: &mut Self,
        _: &xdg_toplevel::XdgToplevel,
        event: xdg_toplevel::Event,
        _: &(),
        _: &Connection,
        _: &QueueHandle<Self>,
    ) {
        match event {
            xdg_toplevel::Event::Configure { width, height, .. } => {
                window.asked = (width.max(0) as usize, height.max(0) as usize);
            }
            xdg_toplevel::Event::Close => window.closed = true,
            _ => {}
        }
    }
}

impl Dispatch<xdg_surface::XdgSurface, ()> for Window {
    fn event(
        window: &mut Self,
        surface: &xdg_surface::XdgSurface,
        event: xdg_surface::Event,
        _: &(),
        _: &Connection,
        _: &QueueHandle<Self>,
    ) {
        let xdg_surface::Event::Configure { serial } = event else { return };
        surface.ack_configure(serial);
        let size = match window.asked {
            (0, _) | (_, 0) => window.mode.unwrap_or((1280, 720)),
            asked => asked,
        };
        if window.size != Some(size) {
            window.size = Some(size);
            window.buffers.clear();
            window.callback_pending = false;
            window.wanted = true;
        }
    }
}

impl Dispatch<wl_buffer::WlBuffer, ()> for Window {
    fn event(
        window: &mut Self,
        released: &wl_buffer::WlBuffer,
        event: wl_buffer::Event,
        _: &(),
        _: &Connection,
        _: &QueueHandle<Self>,
    ) {
        if let wl_buffer::Event::Release = event
            && let Some(buffer) = window.buffers.iter_mut().find(|buffer| buffer.buffer == *released)
        {
            buffer.busy = false;
        }
    }
}

impl Dispatch<wl_callback::WlCallback, ()> for Window {
    fn event(
        window: &mut Self,
        _: &wl_callback::WlCallback,
        event: wl_callback::Event,
        _: &(),
        _: &Connection,
        _: &QueueHandle<Self>,
    ) {
        if let wl_callback::Event::Done { .. } = event {
            window.callback_pending = false;
        }
    }
}

impl Dispatch<wl_seat::WlSeat, ()> for Window {
    fn event(
        window: &mut Self,
        seat: &wl_seat::WlSeat,
        event: wl_seat::Event,
        _: &(),
        _: &Connection,
        handle: &QueueHandle<Self>,
    ) {
        let wl_seat::Event::Capabilities { capabilities: WEnum::Value(capabilities) } = event else { return };
        let (keyboard, pointer) = &mut window.seat_devices;
        if capabilities.contains(wl_seat::Capability::Keyboard) && !std::mem::replace(keyboard, true) {
            seat.get_keyboard(handle, ());
        }
        if capabilities.contains(wl_seat::Capability::Pointer) && !std::mem::replace(pointer, true) {
            seat.get_pointer(handle, ());
        }
    }
}

impl Dispatch<wl_keyboard::WlKeyboard, ()> for Window {
    fn event(
        window: &mut Self,
        _: &wl_keyboard::WlKeyboard,
        event: wl_keyboard::Event,
        _: &(),
        _: &Connection,
        _: &QueueHandle<Self>,
    ) {
        if let wl_keyboard::Event::Key { key, state: WEnum::Value(state), .. } = event {
            window.take(Input::Key { code: key, pressed: state == wl_keyboard::KeyState::Pressed });
        }
    }
}

impl Dispatch<wl_pointer::WlPointer, ()> for Window {
    fn event(
        window: &mut Self,
        _: &wl_pointer::WlPointer,
        event: wl_pointer::Event,
        _: &(),
        _: &Connection,
        _: &QueueHandle<Self>,
    ) {
        match event {
            wl_pointer::Event::Enter { surface_x: x, surface_y: y, .. }
            | wl_pointer::Event::Motion { surface_x: x, surface_y: y, .. } => {
                window.take(Input::Pointer { x, y })
            }
            wl_pointer::Event::Button { button, state: WEnum::Value(state), .. } => {
                window
                    .take(Input::Button { code: button, pressed: state == wl_pointer::ButtonState::Pressed });
            }
            wl_pointer::Event::Axis {
                axis: WEnum::Value(wl_pointer::Axis::VerticalScroll), value, ..
            } => {
                window.take(Input::Wheel(value));
            }
            _ => {}
        }
    }
}

delegate_noop!(Window: ignore wl_compositor::WlCompositor);
delegate_noop!(Window: ignore wl_surface::WlSurface);
delegate_noop!(Window: ignore wl_shm::WlShm);
delegate_noop!(Window: ignore wl_shm_pool::WlShmPool);
