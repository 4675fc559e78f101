//! What can have the keyboard: a surface, and for X11 windows the window as well, because X11 has a focus of its own
//! that must follow.

use std::borrow::Cow;

use smithay::{
    backend::input::KeyState,
    desktop::{PopupKind, Window},
    input::{
        Seat,
        keyboard::{KeyboardTarget, KeysymHandle, ModifiersState},
    },
    reexports::wayland_server::protocol::wl_surface::WlSurface,
    utils::{IsAlive, Serial},
    wayland::seat::WaylandFocus,
    xwayland::X11Surface,
};

use super::state::State;

/// A target of the keyboard.
#[derive(Clone, Debug)]
pub struct Focus {
    surface: WlSurface,
    x11: Option<X11Surface>,
}

impl Focus {
    /// The focus for `window`, once it has a surface.
    pub fn of(window: &Window) -> Option<Self> {
        let surface = window.wl_surface()?.into_owned();
        Some(Self { surface, x11: window.x11_surface().cloned() })
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

impl KeyboardTarget<State> for Focus {
    fn enter(&self, seat: &Seat<State>, state: &mut State, keys: Vec<KeysymHandle<'_>>, serial: Serial) {
        match &self.x11 {
            Some(window) => KeyboardTarget::enter(window, seat, state, keys, serial),
            None => KeyboardTarget::enter(&self.surface, seat, state, keys, serial),
        }
    }

    fn leave(&self, seat: &Seat<State>, state: &mut State, serial: Serial) {
        match &self.x11 {
            Some(window) => KeyboardTarget::leave(window, seat, state, serial),
            None => KeyboardTarget::leave(&self.surface, seat, state, serial),
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
        match &self.x11 {
            Some(window) => KeyboardTarget::key(window, seat, state, key, pressed, serial, time),
            None => KeyboardTarget::key(&self.surface, seat, state, key, pressed, serial, time),
        }
    }

    fn modifiers(&self, seat: &Seat<State>, state: &mut State, modifiers: ModifiersState, serial: Serial) {
        match &self.x11 {
            Some(window) => KeyboardTarget::modifiers(window, seat, state, modifiers, serial),
            None => KeyboardTarget::modifiers(&self.surface, seat, state, modifiers, serial),
        }
    }
}
