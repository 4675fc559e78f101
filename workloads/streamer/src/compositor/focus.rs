//! What can have the keyboard: a surface, and for X11 windows the window as well, because X11 has a focus of its own
//! that must follow.

use std::borrow::Cow;

use smithay::{
    backend::input::KeyState,
    desktop::PopupKind,
    input::{
        Seat,
        keyboard::{KeyboardTarget, KeysymHandle, ModifiersState},
    },
    reexports::wayland_server::protocol::wl_surface::WlSurface,
    utils::{IsAlive, Serial},
    wayland::seat::WaylandFocus,
    xwayland::X11Surface,
};

use super::{state::State, window::Window};

/// A target of the keyboard.
#[derive(Clone, Debug)]
pub struct Focus {
    surface: WlSurface,
    x11: Option<X11Surface>,
}

impl Focus {
    /// The focus for `window`, once it has a surface.
    pub fn of(window: &Window) -> Option<Self> {
        let surface = window.surface()?.into_owned();
        Some(Self { surface, x11: window.x11().cloned() })
    }

    /// The X11 window, if it is one.
    pub fn x11(&self) -> Option<&X11Surface> {
        self.x11.as_ref()
    }
}

impl PartialEq for Focus {
    fn eq(&self, other: &Self) -> bool {
        self.surface == other.surface
    }
}

impl From<PopupKind> for Focus {
    fn from(popup: PopupKind) -> Self {
        Self { surface: popup.wl_surface().clone(), x11: None }
    }
}

impl From<Focus> for WlSurface {
    fn from(focus: Focus) -> Self {
        focus.surface
    }
}

impl IsAlive for Focus {
    fn alive(&self) -> bool {
        self.surface.alive()
    }
}

impl WaylandFocus for Focus {
    fn wl_surface(&self) -> Option<Cow<'_, WlSurface>> {
        Some(Cow::Borrowed(&self.surface))
    }
}

impl Focus {
    /// The X11 window, and whether it passes events on to its surface by itself: it does where it knows it.
    fn x11_with_surface(&self) -> Option<(&X11Surface, bool)> {
        self.x11.as_ref().map(|x11| (x11, x11.wl_surface().is_some()))
    }
}

impl KeyboardTarget<State> for Focus {
    fn enter(&self, seat: &Seat<State>, state: &mut State, keys: Vec<KeysymHandle<'_>>, serial: Serial) {
        match self.x11_with_surface() {
            Some((x11, true)) => return KeyboardTarget::enter(x11, seat, state, keys, serial),
            Some((x11, false)) => KeyboardTarget::enter(x11, seat, state, Vec::new(), serial),
            None => {}
        }
        KeyboardTarget::enter(&self.surface, seat, state, keys, serial);
    }

    fn leave(&self, seat: &Seat<State>, state: &mut State, serial: Serial) {
        let passed_on = self.x11_with_surface().is_some_and(|(x11, passes_on)| {
            KeyboardTarget::leave(x11, seat, state, serial);
            passes_on
        });
        if !passed_on {
            KeyboardTarget::leave(&self.surface, seat, state, serial);
        }
    }

    fn key(
        &self,
        seat: &Seat<State>,
        state: &mut State,
        key: KeysymHandle<'_>,
        pressed: KeyState,
        serial: Serial,
        time: u32,
    ) {
        match self.x11_with_surface() {
            Some((x11, true)) => KeyboardTarget::key(x11, seat, state, key, pressed, serial, time),
            _ => KeyboardTarget::key(&self.surface, seat, state, key, pressed, serial, time),
        }
    }

    fn modifiers(&self, seat: &Seat<State>, state: &mut State, modifiers: ModifiersState, serial: Serial) {
        match self.x11_with_surface() {
            Some((x11, true)) => KeyboardTarget::modifiers(x11, seat, state, modifiers, serial),
            _ => KeyboardTarget::modifiers(&self.surface, seat, state, modifiers, serial),
        }
    }
}
