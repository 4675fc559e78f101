//! Input of the viewer, put straight into the seat.
//!
//! What is held is remembered here, so that repetitions of the viewer's keyboard do not reach clients (which repeat by
//! themselves) and everything can be released when the viewer goes.

use std::collections::{BTreeMap, BTreeSet};

use smithay::{
    backend::input::{Axis, AxisSource, ButtonState, KeyState, Keycode, TouchSlot},
    desktop::PopupManager,
    input::{
        keyboard::{FilterResult, KeyboardHandle, Keysym, XkbConfig, xkb},
        pointer::{AxisFrame, ButtonEvent, MotionEvent, PointerHandle, RelativeMotionEvent},
        touch::{DownEvent, MotionEvent as TouchMotionEvent, TouchHandle, UpEvent},
    },
    reexports::wayland_server::protocol::wl_surface::WlSurface,
    utils::{Logical, Point, SERIAL_COUNTER},
    wayland::{
        compositor::get_parent,
        pointer_constraints::{PointerConstraint, with_pointer_constraint},
    },
};
use tracing::{debug, warn};

use super::{
    Event, layout,
    state::{State, split_layout},
};

/// The offset between the kernel's key codes and xkb's (an X11 inheritance).
const XKB_OFFSET: u32 = 8;
/// Keys that type characters, space and Enter: KEY_1 to KEY_SPACE, and the one beside the left Shift.
const MAIN_BLOCK: std::ops::RangeInclusive<u32> = 2..=57;
const KEY_102ND: u32 = 86;
const KEY_LEFTSHIFT: u32 = 42;
/// The largest evdev key code, KEY_MAX of linux/input-event-codes.h.
const KEY_MAX: u32 = 0x2ff;
/// Touch points at once; more are ignored.
const TOUCHES: usize = 16;
/// Pixels that one click of the wheel scrolls, as libinput has it.
const CLICK: f64 = 15.0;
/// Clicks of the wheel in one event; more are cut off.
const CLICKS: i32 = 100;
/// Characters typed by one [`Input::Text`]; more are cut off.
const TEXT: usize = 1024;

/// One event of the viewer's devices. Positions are pixels of the output from its top left corner; what lies outside is
/// brought to the nearest pixel.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// A key by its evdev code (KEY_* of linux/input-event-codes.h). Repetitions are ignored.
    Key { code: u32, pressed: bool },
    /// The pointer is at a position.
    PointerMotion { x: f64, y: f64 },
    /// The pointer moved by so many pixels.
    PointerRelative { dx: f64, dy: f64 },
    /// A button by its evdev code (BTN_*).
    Button { code: u32, pressed: bool },
    /// Clicks of the wheel as the kernel counts them: +1 up, +1 right.
    Wheel { horizontal: i32, vertical: i32 },
    /// A finger touched.
    TouchDown { slot: u32, x: f64, y: f64 },
    /// A finger that is down moved.
    TouchMotion { slot: u32, x: f64, y: f64 },
    /// A finger was lifted.
    TouchUp { slot: u32 },
    /// All fingers are to be forgotten.
    TouchCancel,
    /// Text is typed as keys, with a keymap of its own for what the layout does not have.
    Text { text: String },
}

/// What the viewer holds.
#[derive(Debug, Default)]
pub struct Held {
    keys: BTreeSet<u32>,
    buttons: BTreeSet<u32>,
    /// Where fingers are.
    touches: BTreeMap<u32, Point<f64, Logical>>,
    /// The last absolute position, to tell movement from it while a client has locked the pointer.
    position: Option<Point<f64, Logical>>,
}

impl State {
    /// The seat's keyboard.
    pub fn keyboard(&self) -> KeyboardHandle<State> {
        self.seat.get_keyboard().expect("the seat has a keyboard from the start")
    }

    /// The seat's pointer.
    pub fn pointer(&self) -> PointerHandle<State> {
        self.seat.get_pointer().expect("the seat has a pointer from the start")
    }

    fn touch(&self) -> TouchHandle<State> {
        self.seat.get_touch().expect("the seat has touch from the start")
    }

    /// Puts one event into the seat. Nonsense is ignored.
    pub fn apply(&mut self, input: Input) {
        match input {
            Input::Key { code, pressed } => {
                let known = (1..=KEY_MAX).contains(&code);
                let news = match pressed {
                    true => known && self.held.keys.insert(code),
                    false => self.held.keys.remove(&code),
                };
                if news {
                    self.key(code, pressed);
                }
            }
            Input::PointerMotion { x, y } => {
                let position = layout::clamp_to_output(Point::from((x, y)), self.size);
                let moved =
                    self.held.position.replace(position).map_or(Point::default(), |last| position - last);
                self.move_pointer(Some(position), moved);
            }
            Input::PointerRelative { dx, dy } => {
                if dx.is_finite() && dy.is_finite() {
                    self.held.position = None;
                    self.move_pointer(None, Point::from((dx, dy)));
                }
            }
            Input::Button { code, pressed } => {
                let news = match pressed {
                    true => self.held.buttons.insert(code),
                    false => self.held.buttons.remove(&code),
                };
                if news {
                    self.button(code, pressed);
                }
            }
            Input::Wheel { horizontal, vertical } => self.wheel(horizontal, vertical),
            Input::TouchDown { slot, x, y } => self.touch_down(slot, Point::from((x, y))),
            Input::TouchMotion { slot, x, y } => self.touch_motion(slot, Point::from((x, y))),
            Input::TouchUp { slot } => self.touch_up(slot),
            Input::TouchCancel => self.touch_cancel(),
            Input::Text { text } => self.type_text(&text),
        }
    }

    /// Lets go of every key, button and finger.
    pub fn release_all(&mut self) {
        for code in std::mem::take(&mut self.held.keys) {
            self.key(code, false);
        }
        for code in std::mem::take(&mut self.held.buttons) {
            self.button(code, false);
        }
        self.touch_cancel();
        self.held.position = None;
    }

    fn key(&mut self, code: u32, pressed: bool) {
        let (serial, time) = (SERIAL_COUNTER.next_serial(), self.now_ms());
        let state = if pressed { KeyState::Pressed } else { KeyState::Released };
        let code = Keycode::new(code + XKB_OFFSET);
        self.keyboard().input::<(), _>(self, code, state, serial, time, |_, _, _| FilterResult::Forward);
    }

    /// The pointer moved by `moved`, and to `position` when it is known.
    fn move_pointer(&mut self, position: Option<Point<f64, Logical>>, moved: Point<f64, Logical>) {
        let pointer = self.pointer();
        let utime = self.now_us();
        let focus = pointer.current_focus();
        let constraint = focus.as_ref().and_then(|surface| {
            with_pointer_constraint(surface, &pointer, |constraint| {
                let active = constraint.filter(|constraint| constraint.is_active())?;
                Some(matches!(&*active, PointerConstraint::Locked(_)))
            })
        });
        let here = pointer.current_location();
        let there = layout::clamp_to_output(position.unwrap_or(here + moved), self.size);
        let under = self.under(there).map(|(_, surface, at)| (surface, at));
        let relative = RelativeMotionEvent { delta: moved, delta_unaccel: moved, utime };
        if moved != Point::default() {
            let target = match constraint {
                Some(_) => self.under(here).map(|(_, surface, at)| (surface, at)),
                None => under.clone(),
            };
            pointer.relative_motion(self, target, &relative);
        }
        let locked = constraint == Some(true);
        // A confined pointer stays in the surface that confines it.
        let escapes =
            constraint == Some(false) && under.as_ref().map(|(surface, _)| surface) != focus.as_ref();
        if !locked && !escapes {
            let event =
                MotionEvent { location: there, serial: SERIAL_COUNTER.next_serial(), time: self.now_ms() };
            pointer.motion(self, under, &event);
            self.activate_constraint();
            if self.drag_icon.is_some() {
                self.clock.changed(std::time::Instant::now());
            }
        }
        pointer.frame(self);
    }

    /// Grants the constraint that the surface under the pointer asked for, if the pointer is where it may start.
    pub fn activate_constraint(&mut self) {
        let pointer = self.pointer();
        let Some(surface) = pointer.current_focus() else { return };
        let location = pointer.current_location();
        let Some((_, under, origin)) = self.under(location) else { return };
        if under != surface {
            return;
        }
        with_pointer_constraint(&surface, &pointer, |constraint| {
            if let Some(constraint) = constraint.filter(|constraint| !constraint.is_active()) {
                let inside = (location - origin).to_i32_floor::<i32>();
                if constraint.region().is_none_or(|region| region.contains(inside)) {
                    constraint.activate();
                }
            }
        });
    }

    /// Tells when a client locked the pointer or let it go.
    pub fn check_pointer_lock(&mut self) {
        let pointer = self.pointer();
        let locked = pointer.current_focus().is_some_and(|surface| {
            with_pointer_constraint(&surface, &pointer, |constraint| {
                constraint.is_some_and(|constraint| {
                    constraint.is_active() && matches!(&*constraint, PointerConstraint::Locked(_))
                })
            })
        });
        if locked != self.pointer_locked {
            self.pointer_locked = locked;
            (self.events)(Event::PointerLock(locked));
        }
    }

    fn button(&mut self, code: u32, pressed: bool) {
        let pointer = self.pointer();
        let serial = SERIAL_COUNTER.next_serial();
        if pressed && !pointer.is_grabbed() {
            self.focus_under(pointer.current_location());
        }
        let state = if pressed { ButtonState::Pressed } else { ButtonState::Released };
        let event = ButtonEvent { serial, time: self.now_ms(), button: code, state };
        pointer.button(self, &event);
        pointer.frame(self);
    }

    /// A press at `point` brings the window there to the front.
    fn focus_under(&mut self, point: Point<f64, Logical>) {
        let Some((window, ..)) = self.under(point) else { return };
        let overlay = self.windows.get(&window).is_some_and(|entry| entry.overlay);
        let focused = super::focus::Focus::of(&window)
            .is_some_and(|focus| self.keyboard().current_focus() == Some(focus));
        if !overlay && !focused && !self.keyboard().is_grabbed() {
            self.focus(&window);
        }
    }

    fn wheel(&mut self, horizontal: i32, vertical: i32) {
        let mut frame = AxisFrame::new(self.now_ms()).source(AxisSource::Wheel);
        // Wayland counts down and right as positive.
        for (axis, clicks) in [(Axis::Horizontal, horizontal), (Axis::Vertical, vertical.saturating_neg())] {
            let clicks = clicks.clamp(-CLICKS, CLICKS);
            if clicks != 0 {
                frame = frame.v120(axis, clicks * 120).value(axis, f64::from(clicks) * CLICK);
            }
        }
        let pointer = self.pointer();
        pointer.axis(self, frame);
        pointer.frame(self);
    }

    fn touch_down(&mut self, slot: u32, point: Point<f64, Logical>) {
        if self.held.touches.len() >= TOUCHES || self.held.touches.contains_key(&slot) {
            return;
        }
        let location = layout::clamp_to_output(point, self.size);
        self.held.touches.insert(slot, location);
        let touch = self.touch();
        let under = self.under(location).map(|(_, surface, at)| (surface, at));
        self.dismiss_popups(under.as_ref().map(|(surface, _)| surface));
        if !touch.is_grabbed() {
            self.focus_under(location);
        }
        let event = DownEvent {
            slot: Some(slot).into(),
            location,
            serial: SERIAL_COUNTER.next_serial(),
            time: self.now_ms(),
        };
        touch.down(self, under, &event);
        touch.frame(self);
    }

    fn touch_motion(&mut self, slot: u32, point: Point<f64, Logical>) {
        let location = layout::clamp_to_output(point, self.size);
        let Some(held) = self.held.touches.get_mut(&slot) else { return };
        *held = location;
        let under = self.under(location).map(|(_, surface, at)| (surface, at));
        let touch = self.touch();
        let event = TouchMotionEvent { slot: Some(slot).into(), location, time: self.now_ms() };
        touch.motion(self, under, &event);
        touch.frame(self);
    }

    fn touch_up(&mut self, slot: u32) {
        if self.held.touches.remove(&slot).is_some() {
            let touch = self.touch();
            let slot: TouchSlot = Some(slot).into();
            touch.up(self, &UpEvent { slot, serial: SERIAL_COUNTER.next_serial(), time: self.now_ms() });
            touch.frame(self);
        }
    }

    fn touch_cancel(&mut self) {
        let held = std::mem::take(&mut self.held.touches);
        let (touch, time) = (self.touch(), self.now_ms());
        for (slot, location) in &held {
            // smithay cancels only what it was told since the last frame; a finger that rests is told again.
            let event = TouchMotionEvent { slot: Some(*slot).into(), location: *location, time };
            touch.motion(self, None, &event);
        }
        if !held.is_empty() {
            touch.cancel(self);
        }
    }

    /// Changes the keyboard layout; an unknown one is refused and the old one stays.
    pub fn set_keyboard_layout(&mut self, layout: &str) {
        if layout == self.layout {
            return;
        }
        match self.load_layout(layout) {
            Ok(()) => self.layout = layout.to_owned(),
            Err(error) => {
                warn!(layout, %error, "this keyboard layout cannot be loaded");
                let old = self.layout.clone();
                if let Err(error) = self.load_layout(&old) {
                    warn!(layout = old, %error, "the old keyboard layout cannot be loaded again");
                }
            }
        }
    }

    fn load_layout(&mut self, layout: &str) -> Result<(), smithay::input::keyboard::Error> {
        let (name, variant) = split_layout(layout);
        let config = XkbConfig { rules: "evdev", model: "pc105", layout: name, variant, options: None };
        self.keyboard().set_xkb_config(self, config)
    }

    /// Types `text`: with the keys of the layout what it has, the rest with a keymap made for it, after which the
    /// layout's comes back. (X11 applications look up a changed keymap late and may miss such characters.)
    fn type_text(&mut self, text: &str) {
        // What is held would change what is typed, or be released under another keymap than it was pressed.
        for code in std::mem::take(&mut self.held.keys) {
            self.key(code, false);
        }
        let keysyms: Vec<Keysym> = text.chars().take(TEXT).filter_map(keysym).collect();
        if self.typing.as_ref().is_none_or(|(layout, _)| *layout != self.layout) {
            self.typing = Some((self.layout.clone(), plain_keys(&self.layout)));
        }
        // With caps lock the keys of the layout do not type what they say.
        let caps = self.keyboard().modifier_state().caps_lock;
        let known = self.typing.as_ref().map(|(_, keys)| keys.clone()).filter(|_| !caps).unwrap_or_default();
        for run in keysyms.chunk_by(|a, b| known.contains_key(&a.raw()) == known.contains_key(&b.raw())) {
            if known.contains_key(&run[0].raw()) {
                for (code, shift) in run.iter().filter_map(|keysym| known.get(&keysym.raw())) {
                    self.press(*code, *shift);
                }
            } else {
                self.type_foreign(run);
            }
        }
        debug!(characters = keysyms.len(), "typed text");
    }

    fn press(&mut self, code: u32, shift: bool) {
        if shift {
            self.key(KEY_LEFTSHIFT, true);
        }
        self.key(code, true);
        self.key(code, false);
        if shift {
            self.key(KEY_LEFTSHIFT, false);
        }
    }

    /// Types what the layout does not have.
    fn type_foreign(&mut self, keysyms: &[Keysym]) {
        for part in keysyms.chunks(text_keymap::KEYS) {
            let (keymap, codes) = text_keymap::build(part);
            if let Err(error) = self.keyboard().set_keymap_from_string(self, keymap) {
                warn!(%error, "no keymap for typed text");
                break;
            }
            for code in codes {
                self.press(code, false);
            }
        }
        let layout = self.layout.clone();
        if let Err(error) = self.load_layout(&layout) {
            warn!(layout, %error, "the keyboard layout cannot be loaded again");
        }
    }

    /// A finger outside of open popups closes them, as a click does by smithay's grab.
    fn dismiss_popups(&mut self, touched: Option<&WlSurface>) {
        let (keyboard, pointer) = (self.keyboard(), self.pointer());
        if !keyboard.is_grabbed() {
            return;
        }
        let root = |surface: &WlSurface| {
            let mut root = surface.clone();
            while let Some(parent) = get_parent(&root) {
                root = parent;
            }
            root
        };
        if touched.is_some_and(|surface| self.popups.find_popup(&root(surface)).is_some()) {
            return;
        }
        for window in self.windows.items().filter(|window| window.toplevel().is_some()) {
            let Some(surface) = window.surface() else { continue };
            for (popup, _) in PopupManager::popups_for_surface(&surface) {
                if let Err(error) = PopupManager::dismiss_popup(&surface, &popup) {
                    debug!(%error, "a popup was gone already");
                }
            }
        }
        keyboard.unset_grab(self);
        pointer.unset_grab(self, SERIAL_COUNTER.next_serial(), self.now_ms());
    }
}

/// The keys of `layout`'s main block that type a character alone or with Shift: keysym to evdev code and Shift.
fn plain_keys(layout: &str) -> BTreeMap<u32, (u32, bool)> {
    let (name, variant) = split_layout(layout);
    let context = xkb::Context::new(xkb::CONTEXT_NO_FLAGS);
    let flags = xkb::KEYMAP_COMPILE_NO_FLAGS;
    let mut keys = BTreeMap::new();
    let keymap = xkb::Keymap::new_from_names(&context, "evdev", "pc105", name, variant, None, flags);
    let Some(keymap) = keymap else { return keys };
    for (level, shift) in [(0, false), (1, true)] {
        for code in MAIN_BLOCK.chain([KEY_102ND]) {
            if let [keysym] = keymap.key_get_syms_by_level((code + XKB_OFFSET).into(), 0, level) {
                keys.entry(keysym.raw()).or_insert((code, shift));
            }
        }
    }
    keys
}

/// The key symbol that types `character`; none for control characters that no key has.
fn keysym(character: char) -> Option<Keysym> {
    let keysym = match character {
        '\n' | '\r' => Keysym::Return,
        '\t' => Keysym::Tab,
        '\u{8}' => Keysym::BackSpace,
        '\u{7f}' => Keysym::Delete,
        control if control.is_control() => return None,
        other => xkb::utf32_to_keysym(u32::from(other)),
    };
    (keysym != Keysym::NoSymbol).then_some(keysym)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_keys_are_those_of_the_layout() {
        for (layout, character, expected) in [
            ("us", 'a', Some((30, false))),
            ("us", 'Z', Some((44, true))),
            ("de", 'z', Some((21, false))),
            ("us", ' ', Some((57, false))),
            ("us", '\n', Some((28, false))),
            ("us", 'ß', None),
            ("de", 'ß', Some((12, false))),
            ("de", '@', None),
            ("no such layout", 'a', None),
        ] {
            let keysym = keysym(character).expect("a character");
            assert_eq!(plain_keys(layout).get(&keysym.raw()).copied(), expected, "{character:?} on {layout}");
        }
    }
}

/// Keymaps in which every key types one character, with no modifiers.
mod text_keymap {
    use std::fmt::Write as _;

    use smithay::input::keyboard::{Keysym, xkb};

    /// Characters in one keymap. They are put on the evdev codes from 2 (KEY_1) on, which every client, X11 ones
    /// included, takes for ordinary keys.
    pub const KEYS: usize = 40;

    const FIRST: u32 = 2;

    /// A keymap for `keysyms` (at most [`KEYS`]) and the evdev codes to press for them, in order.
    pub fn build(keysyms: &[Keysym]) -> (String, Vec<u32>) {
        let mut distinct: Vec<Keysym> = Vec::new();
        let codes = keysyms
            .iter()
            .map(|keysym| {
                let at = distinct.iter().position(|known| known == keysym).unwrap_or_else(|| {
                    distinct.push(*keysym);
                    distinct.len() - 1
                });
                FIRST + at as u32
            })
            .collect();
        let (mut keycodes, mut symbols) = (String::new(), String::new());
        for (at, keysym) in distinct.iter().enumerate() {
            let code = FIRST + super::XKB_OFFSET + at as u32;
            // Writing to a string cannot fail.
            let _ = write!(keycodes, "<K{at}> = {code}; ");
            let _ = write!(symbols, "key <K{at}> {{ [ {} ] }}; ", name(*keysym));
        }
        let keymap = format!(
            "xkb_keymap {{ \
             xkb_keycodes {{ minimum = 8; maximum = 255; {keycodes}}}; \
             xkb_types {{ virtual_modifiers NumLock; \
               type \"ONE_LEVEL\" {{ modifiers = none; map[none] = Level1; level_name[Level1] = \"Any\"; }}; \
               type \"TWO_LEVEL\" {{ modifiers = Shift; map[Shift] = Level2; level_name[Level1] = \"Base\"; \
                 level_name[Level2] = \"Shift\"; }}; \
               type \"ALPHABETIC\" {{ modifiers = Shift; map[Shift] = Level2; level_name[Level1] = \"Base\"; \
                 level_name[Level2] = \"Caps\"; }}; \
               type \"KEYPAD\" {{ modifiers = Shift; map[Shift] = Level2; level_name[Level1] = \"Base\"; \
                 level_name[Level2] = \"Number\"; }}; }}; \
             xkb_compatibility {{ interpret Any + AnyOf(all) {{ repeat = False; }}; }}; \
             xkb_symbols {{ {symbols}}}; }};"
        );
        (keymap, codes)
    }

    fn name(keysym: Keysym) -> String {
        match xkb::keysym_get_name(keysym) {
            name if name.is_empty() || name == "NoSymbol" => format!("{:#x}", keysym.raw()),
            name => name,
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn every_character_is_found_under_its_code() {
            let text = "aZ ß€ 漢🙂\n\tä";
            let keysyms: Vec<_> = text.chars().filter_map(super::super::keysym).collect();
            let (keymap, codes) = build(&keysyms);
            let context = xkb::Context::new(xkb::CONTEXT_NO_FLAGS);
            let keymap = xkb::Keymap::new_from_string(
                &context,
                keymap,
                xkb::KEYMAP_FORMAT_TEXT_V1,
                xkb::KEYMAP_COMPILE_NO_FLAGS,
            )
            .expect("the keymap compiles");
            let state = xkb::State::new(&keymap);
            let typed: String = codes
                .iter()
                .map(|code| state.key_get_utf8((code + super::super::XKB_OFFSET).into()))
                .collect();
            assert_eq!(typed, text.replace('\n', "\r"));
        }

        #[test]
        fn control_characters_type_nothing() {
            assert_eq!("\0\u{1b}\u{9f}".chars().filter_map(super::super::keysym).count(), 0);
        }
    }
}
