//! From a client's control messages to input of the compositor's seat.
//!
//! A plain value: it knows the size of the display, which fingers are down, and how much a client may send.
//! Gamepads are understood and ignored: no virtual pad exists yet.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use fanlight_api::control::{self, ClientControl, MAX_TOUCHES};

use crate::compositor::Input;

/// KEY_BACKSPACE of linux/input-event-codes.h.
const KEY_BACKSPACE: u32 = 14;
/// Messages a second that a client may send for long: mice report 1000 times a second at most.
const RATE: f64 = 4000.0;
/// Messages that may come at once.
const BURST: f64 = 4000.0;

/// What a message asks for.
#[derive(Clone, Debug, PartialEq)]
pub enum Asked {
    /// Input for the seat, in order; may be empty.
    Input(Vec<Input>),
    /// The client leaves.
    Disconnect,
}

/// The translation for one client.
#[derive(Debug)]
pub struct Translator {
    width: f64,
    height: f64,
    touches: BTreeMap<i64, u32>,
    allowance: f64,
    refilled: Instant,
    ignored: u64,
}

impl Translator {
    /// For a display of so many pixels.
    pub fn new(now: Instant, width: u32, height: u32) -> Self {
        Self {
            width: f64::from(width),
            height: f64::from(height),
            touches: BTreeMap::new(),
            allowance: BURST,
            refilled: now,
            ignored: 0,
        }
    }

    /// How many messages were set aside.
    pub fn ignored(&self) -> u64 {
        self.ignored
    }

    /// Reads one message of the `control` channel.
    pub fn translate(&mut self, now: Instant, text: &str) -> Asked {
        let passed = now.saturating_duration_since(self.refilled).min(Duration::from_secs(10));
        self.refilled = now;
        self.allowance = (self.allowance + passed.as_secs_f64() * RATE).min(BURST);
        let message = match control::parse(text) {
            Ok(message) => message,
            Err(_) => {
                self.ignored += 1;
                return Asked::Input(Vec::new());
            }
        };
        // Leaving is never too much, and a lost release would leave a key held.
        let releases = matches!(
            message,
            ClientControl::Disconnect
                | ClientControl::Key { pressed: false, .. }
                | ClientControl::MouseButton { pressed: false, .. }
                | ClientControl::TouchEnd { .. }
                | ClientControl::TouchCancel { .. }
        );
        if self.allowance < 1.0 && !releases {
            self.ignored += 1;
            return Asked::Input(Vec::new());
        }
        self.allowance = (self.allowance - 1.0).max(0.0);
        let input = match message {
            ClientControl::Disconnect => return Asked::Disconnect,
            ClientControl::Key { evdev, pressed } => vec![Input::Key { code: evdev, pressed }],
            ClientControl::MouseMove { position: Some(position), .. } => {
                let (x, y) = self.clamp(position);
                vec![Input::PointerMotion { x, y }]
            }
            ClientControl::MouseMove { position: None, relative: (dx, dy) } => {
                // No hand moves further than this between two reports.
                let limit = self.width.max(self.height) * 4.0;
                vec![Input::PointerRelative { dx: dx.clamp(-limit, limit), dy: dy.clamp(-limit, limit) }]
            }
            ClientControl::MouseButton { evdev, pressed } => vec![Input::Button { code: evdev, pressed }],
            ClientControl::MouseWheel { horizontal: 0, vertical: 0 } => Vec::new(),
            ClientControl::MouseWheel { horizontal, vertical } => {
                vec![Input::Wheel { horizontal, vertical }]
            }
            ClientControl::TouchStart { id, position } => self.touch_start(id, position),
            ClientControl::TouchMove { id, position } => {
                let (x, y) = self.clamp(position);
                let slot = self.touches.get(&id).copied();
                slot.map(|slot| Input::TouchMotion { slot, x, y }).into_iter().collect()
            }
            ClientControl::TouchEnd { id, last } => {
                let mut input: Vec<Input> =
                    self.touches.remove(&id).map(|slot| Input::TouchUp { slot }).into_iter().collect();
                if last {
                    input.extend(
                        std::mem::take(&mut self.touches).into_values().map(|slot| Input::TouchUp { slot }),
                    );
                }
                input
            }
            // A seat can only forget all fingers at once.
            ClientControl::TouchCancel { id } if self.touches.contains_key(&id) => {
                self.touches.clear();
                vec![Input::TouchCancel]
            }
            ClientControl::TouchCancel { .. } => Vec::new(),
            ClientControl::Text { text } if text.is_empty() => Vec::new(),
            ClientControl::Text { text } => vec![Input::Text { text }],
            ClientControl::Backspaces { times } => (0..times)
                .flat_map(|_| [true, false].map(|pressed| Input::Key { code: KEY_BACKSPACE, pressed }))
                .collect(),
            ClientControl::GamepadButton { .. } | ClientControl::GamepadAxis { .. } => {
                self.ignored += 1;
                Vec::new()
            }
        };
        Asked::Input(input)
    }

    fn touch_start(&mut self, id: i64, position: (f64, f64)) -> Vec<Input> {
        let (x, y) = self.clamp(position);
        if let Some(slot) = self.touches.get(&id).copied() {
            return vec![Input::TouchMotion { slot, x, y }];
        }
        let free = (0..MAX_TOUCHES as u32).find(|slot| !self.touches.values().any(|used| used == slot));
        let Some(slot) = free else {
            self.ignored += 1;
            return Vec::new();
        };
        self.touches.insert(id, slot);
        vec![Input::TouchDown { slot, x, y }]
    }

    /// Clients may send one past the last pixel, and anything else too (stream-protocol section 6).
    fn clamp(&self, (x, y): (f64, f64)) -> (f64, f64) {
        (x.clamp(0.0, self.width - 1.0), y.clamp(0.0, self.height - 1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn translator() -> (Translator, Instant) {
        let now = Instant::now();
        (Translator::new(now, 1280, 720), now)
    }

    fn one(translator: &mut Translator, now: Instant, text: &str) -> Vec<Input> {
        match translator.translate(now, text) {
            Asked::Input(input) => input,
            Asked::Disconnect => panic!("{text} does not ask to leave"),
        }
    }

    #[test]
    fn positions_are_clamped_to_the_display() {
        let (mut translator, now) = translator();
        for (text, x, y) in [
            (r#"{"type":"input::mouse-move","data":{"x":1280,"y":720,"rx":1,"ry":1}}"#, 1279.0, 719.0),
            (r#"{"type":"input::mouse-move","data":{"x":-3,"y":1e12}}"#, 0.0, 719.0),
            (r#"{"type":"input::mouse-move","data":{"x":0.25,"y":10.5}}"#, 0.25, 10.5),
        ] {
            assert_eq!(one(&mut translator, now, text), [Input::PointerMotion { x, y }], "{text}");
        }
        let relative = r#"{"type":"input::mouse-move","data":{"rx":-3,"ry":1000000}}"#;
        assert_eq!(one(&mut translator, now, relative), [Input::PointerRelative { dx: -3.0, dy: 5120.0 }]);
    }

    #[test]
    fn fingers_get_slots_and_never_more_than_ten() {
        let (mut translator, now) = translator();
        let start = |id| format!(r#"{{"type":"input::touch-start","data":{{"id":{id},"x":5,"y":6}}}}"#);
        for id in 100..110 {
            let slot = id - 100;
            assert_eq!(one(&mut translator, now, &start(id)), [Input::TouchDown { slot, x: 5.0, y: 6.0 }]);
        }
        assert!(one(&mut translator, now, &start(110)).is_empty());
        assert_eq!(
            one(&mut translator, now, &start(101)),
            [Input::TouchMotion { slot: 1, x: 5.0, y: 6.0 }],
            "down already"
        );
        let end = r#"{"type":"input::touch-end","data":{"id":104,"last":false}}"#;
        assert_eq!(one(&mut translator, now, end), [Input::TouchUp { slot: 4 }]);
        assert_eq!(one(&mut translator, now, &start(7)), [Input::TouchDown { slot: 4, x: 5.0, y: 6.0 }]);
        let unknown = r#"{"type":"input::touch-move","data":{"id":999,"x":1,"y":1}}"#;
        assert!(one(&mut translator, now, unknown).is_empty());
        let last = r#"{"type":"input::touch-end","data":{"id":100,"last":true}}"#;
        assert_eq!(one(&mut translator, now, last).len(), 10, "the last one lifts all");
        let cancel = r#"{"type":"input::touch-cancel","data":{"id":100}}"#;
        assert!(one(&mut translator, now, cancel).is_empty());
    }

    #[test]
    fn a_flood_is_thinned_but_what_is_held_is_always_released() {
        let (mut translator, now) = translator();
        let press = r#"{"type":"input::key","data":{"code":4,"pressed":true}}"#;
        let release = r#"{"type":"input::key","data":{"code":4,"pressed":false}}"#;
        let passed = (0..10_000).filter(|_| !one(&mut translator, now, press).is_empty()).count();
        assert_eq!(passed, 4000);
        assert_eq!(one(&mut translator, now, release), [Input::Key { code: 30, pressed: false }]);
        assert_eq!(translator.translate(now, r#"{"type":"stream::disconnect"}"#), Asked::Disconnect);
        let later = now + Duration::from_secs(1);
        assert!(!one(&mut translator, later, press).is_empty());
    }

    #[test]
    fn what_is_not_understood_is_counted_and_does_nothing() {
        let (mut translator, now) = translator();
        for text in [
            "",
            "{",
            r#"{"type":"x"}"#,
            r#"{"type":"input::gamepad-button","data":{"id":0,"index":1,"pressed":true}}"#,
        ] {
            assert!(one(&mut translator, now, text).is_empty());
        }
        assert_eq!(translator.ignored(), 4);
        let text = r#"{"type":"input::ime-event","data":{"type":2,"data":{"times":2}}}"#;
        assert_eq!(one(&mut translator, now, text).len(), 4);
    }
}
