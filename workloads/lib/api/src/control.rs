//! What travels inside the peer connection: the messages of the `control` channel (stream-protocol sections
//! 5, 7 and 8) and of our own channel `fanlight`.
//!
//! Clients of the original have slips (stream-protocol section 15), so [`parse`] is tolerant: a message with a
//! missing or odd member is set aside by itself and never ends anything. Clamping coordinates to the display
//! and counting touches is left to whoever knows the display.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Label of the channel that every client opens.
pub const CONTROL_CHANNEL: &str = "control";
/// Label of our own channel; a client announces it in `settings.data_channels` and may do without.
pub const FANLIGHT_CHANNEL: &str = "fanlight";
/// Most touches that are down at a time (stream-protocol section 7.5).
pub const MAX_TOUCHES: usize = 10;
/// Highest Linux key code that a keymap can carry: X11 key codes are one byte and start at 8.
const LAST_KEY: u32 = 247;

/// From the client, on the `control` channel.
#[derive(Clone, Debug, PartialEq)]
pub enum ClientControl {
    /// A key; auto-repeat arrives as repeated presses.
    Key {
        /// Linux key code (`KEY_*`), 1 to 247.
        evdev: u32,
        /// Down or up.
        pressed: bool,
    },
    /// The pointer moved.
    MouseMove {
        /// Position in pixels of the frame, may be fractional and one past the last pixel; absent while the
        /// pointer is locked.
        position: Option<(f64, f64)>,
        /// Relative movement in pixels of the frame.
        relative: (f64, f64),
    },
    /// A mouse button.
    MouseButton {
        /// Linux button code (`BTN_*`).
        evdev: u32,
        /// Down or up.
        pressed: bool,
    },
    /// The wheel turned by whole clicks.
    MouseWheel {
        /// Positive is right: the wire has it the other way round.
        horizontal: i32,
        /// Positive is up.
        vertical: i32,
    },
    /// A finger went down.
    TouchStart {
        /// Opaque name of the finger.
        id: i64,
        /// Position in pixels of the frame.
        position: (f64, f64),
    },
    /// A finger moved.
    TouchMove {
        /// Opaque name of the finger.
        id: i64,
        /// Position in pixels of the frame.
        position: (f64, f64),
    },
    /// A finger went up.
    TouchEnd {
        /// Opaque name of the finger.
        id: i64,
        /// No finger is left.
        last: bool,
    },
    /// What the finger did does not count.
    TouchCancel {
        /// Opaque name of the finger.
        id: i64,
    },
    /// A gamepad button by the W3C's standard mapping.
    GamepadButton {
        /// Which pad.
        id: i64,
        /// Button.
        index: i64,
        /// Down or up.
        pressed: bool,
    },
    /// A gamepad axis by the W3C's standard mapping.
    GamepadAxis {
        /// Which pad.
        id: i64,
        /// Axis.
        index: i64,
        /// -1 to 1.
        value: f64,
    },
    /// An input method committed text, at most 4096 characters.
    Text {
        /// The text.
        text: String,
    },
    /// An input method deletes backwards.
    Backspaces {
        /// How often, 1 to 100.
        times: u32,
    },
    /// The client leaves in good order.
    Disconnect,
}

/// Why a message was set aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Ignored {
    /// No JSON object with a text `type`.
    #[error("not a JSON object with a type")]
    Malformed,
    /// A type that is not for us: Android's, a newer version's, or nonsense.
    #[error("unknown type")]
    UnknownType,
    /// A member is missing or out of its range.
    #[error("member {0} is missing or out of range")]
    Member(&'static str),
}

#[derive(Deserialize)]
struct Envelope {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    data: Value,
}

/// Reads one message of the `control` channel.
///
/// # Errors
/// Says why the message is to be ignored. None of the reasons is a reason to end the stream.
pub fn parse(text: &str) -> Result<ClientControl, Ignored> {
    let Envelope { kind, data } = serde_json::from_str(text).map_err(|_| Ignored::Malformed)?;
    let number = |name: &'static str| {
        let value = data.get(name).and_then(Value::as_f64).filter(|value| value.is_finite());
        value.ok_or(Ignored::Member(name))
    };
    // Whole numbers that JavaScript made may come as `1.0`.
    let integer = |name: &'static str| {
        let value = number(name)?;
        if value.abs() < 1e9 { Ok(value.round() as i64) } else { Err(Ignored::Member(name)) }
    };
    let flag = |name: &'static str| data.get(name).and_then(Value::as_bool).ok_or(Ignored::Member(name));
    let position = || Ok((number("x")?, number("y")?));
    Ok(match kind.as_str() {
        "input::key" => {
            let evdev = match integer("evdev") {
                Ok(evdev) => u32::try_from(evdev).ok().filter(|code| (1..=LAST_KEY).contains(code)),
                Err(_) => key_to_evdev(integer("code")?),
            };
            ClientControl::Key { evdev: evdev.ok_or(Ignored::Member("code"))?, pressed: flag("pressed")? }
        }
        "input::mouse-move" => {
            let position = position().ok();
            let relative = (number("rx").unwrap_or(0.0), number("ry").unwrap_or(0.0));
            if position.is_none() && relative == (0.0, 0.0) {
                return Err(Ignored::Member("x"));
            }
            ClientControl::MouseMove { position, relative }
        }
        "input::mouse-button" => {
            // Clients that know of several displays have changed the numbers of the middle and the right button.
            let button = match (integer("button")?, data.get("display_id").is_some()) {
                (2, true) => 3,
                (3, true) => 2,
                (button, _) => button,
            };
            ClientControl::MouseButton {
                evdev: button_to_evdev(button).ok_or(Ignored::Member("button"))?,
                pressed: flag("pressed")?,
            }
        }
        "input::mouse-wheel" => {
            let clicks = |name| integer(name).unwrap_or(0).clamp(-10, 10) as i32;
            ClientControl::MouseWheel { horizontal: -clicks("x"), vertical: clicks("y") }
        }
        "input::touch-start" => ClientControl::TouchStart { id: integer("id")?, position: position()? },
        "input::touch-move" => ClientControl::TouchMove { id: integer("id")?, position: position()? },
        "input::touch-end" => {
            ClientControl::TouchEnd { id: integer("id")?, last: flag("last").unwrap_or(false) }
        }
        "input::touch-cancel" => ClientControl::TouchCancel { id: integer("id")? },
        "input::gamepad-button" => ClientControl::GamepadButton {
            id: integer("id")?,
            index: integer("index")?,
            pressed: flag("pressed")?,
        },
        "input::gamepad-axes" => ClientControl::GamepadAxis {
            id: integer("id")?,
            index: integer("index")?,
            value: number("value")?.clamp(-1.0, 1.0),
        },
        "input::ime-event" => input_method(&data)?,
        "stream::disconnect" => ClientControl::Disconnect,
        _ => return Err(Ignored::UnknownType),
    })
}

/// Types 1 and 2 of stream-protocol section 7.7. Pre-edit (4, 5) needs an input method in the instance, and
/// actions (3) are Android's.
fn input_method(event: &Value) -> Result<ClientControl, Ignored> {
    let data = event.get("data").unwrap_or(&Value::Null);
    match event.get("type").and_then(Value::as_f64) {
        Some(1.0) => {
            let text = data.get("text").and_then(Value::as_str).ok_or(Ignored::Member("text"))?;
            Ok(ClientControl::Text { text: text.chars().take(4096).collect() })
        }
        Some(2.0) => {
            let times = data.get("times").and_then(Value::as_f64).unwrap_or(1.0);
            Ok(ClientControl::Backspaces { times: times.clamp(1.0, 100.0) as u32 })
        }
        _ => Err(Ignored::UnknownType),
    }
}

/// Linux key code of a key number of the original's client (stream-protocol section 7.1).
pub fn key_to_evdev(code: i64) -> Option<u32> {
    const LETTERS: [u32; 26] = [
        30, 48, 46, 32, 18, 33, 34, 35, 23, 36, 37, 38, 50, 49, 24, 25, 16, 19, 31, 20, 22, 47, 17, 45, 21,
        44,
    ];
    Some(match code {
        4..=29 => LETTERS[(code - 4) as usize],
        // 1 to 9, then 0.
        30..=39 => (code - 30 + 2) as u32,
        40 => 28,
        41 => 1,
        42 => 14,
        43 => 15,
        44 => 57,
        45 => 12,
        46 => 13,
        47 => 26,
        48 => 27,
        49 => 43,
        50 => 40,
        51 => 39,
        54 => 51,
        55 => 52,
        56 => 53,
        57 => 58,
        // F1 to F10, then F11 and F12, which came later to keyboards.
        58..=67 => (code - 58 + 59) as u32,
        68 => 87,
        69 => 88,
        70 => 99,
        71 => 70,
        72 => 119,
        73 => 110,
        74 => 102,
        75 => 104,
        76 => 111,
        77 => 107,
        78 => 109,
        79 => 106,
        80 => 105,
        81 => 108,
        82 => 103,
        83 => 29,
        84 => 42,
        85 => 56,
        86 => 125,
        87 => 100,
        88 => 69,
        89 => 114,
        90 => 115,
        91 => 116,
        92 => 158,
        _ => return None,
    })
}

/// Linux button code of a mouse button (stream-protocol section 7.3): 1 left, 2 middle, 3 right. 4, the browser's
/// "back", is sent by ours and by clients that know of several displays.
pub fn button_to_evdev(button: i64) -> Option<u32> {
    Some(match button {
        1 => 0x110,
        2 => 0x112,
        3 => 0x111,
        4 => 0x113,
        5 => 0x114,
        _ => return None,
    })
}

/// From the client, on the channel `fanlight`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum FanlightRequest {
    /// The first frame that is not blank was decoded and shown.
    FirstFrame {
        /// Milliseconds since the client began to connect.
        #[serde(default)]
        ms: f64,
    },
    /// How long decoded pictures waited for the client's display, at most twice a second. With it the instance draws
    /// just before the display's refresh.
    Shown {
        /// 10th percentile, milliseconds.
        low_ms: f64,
        /// Median, milliseconds.
        mid_ms: f64,
        /// 90th percentile, milliseconds.
        high_ms: f64,
        /// Pictures that were counted.
        #[serde(default)]
        frames: u32,
    },
    /// Keyboard layout that the instance shall use.
    Layout {
        /// Name of an XKB layout, such as `us` or `de`.
        layout: String,
    },
    /// To be answered at once.
    Ping {
        /// The client's clock in milliseconds; comes back unchanged.
        t: f64,
    },
}

/// To the client, on the channel `fanlight`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum FanlightNotice {
    /// Answer to a ping.
    Pong {
        /// As asked.
        t: f64,
        /// Milliseconds between receiving the ping and answering it.
        host_ms: f64,
    },
    /// About once a second while frames flow.
    HostStats {
        /// From the application's commit to the start of encoding: mean of the last second.
        capture_ms: f64,
        /// Encoding: mean of the last second.
        encode_ms: f64,
        /// From encoded to handed to the network: mean of the last second.
        send_ms: f64,
        /// Rate the encoder is set to.
        bitrate_kbps: u64,
        /// What the path is believed to carry.
        estimate_kbps: u64,
        /// Frames encoded in the last second.
        fps: u32,
        /// Name of the encoder.
        encoder: String,
    },
    /// The pointer's shape, to be drawn by the client.
    Cursor(CursorNotice),
    /// The application wants the pointer locked to the picture (or no longer).
    PointerLock {
        /// Wanted.
        locked: bool,
    },
}

/// The pointer's shape.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum CursorNotice {
    /// No pointer.
    Hidden,
    /// A shape by its CSS name.
    Named {
        /// CSS `cursor` keyword.
        name: String,
    },
    /// A picture.
    Image {
        /// Standard base64 of the pixels, four bytes each: red, green, blue, alpha (not premultiplied).
        rgba_base64: String,
        /// Pixels.
        width: u32,
        /// Pixels.
        height: u32,
        /// Hot spot from the left, pixels.
        hot_x: i32,
        /// Hot spot from the top, pixels.
        hot_y: i32,
    },
}

impl FanlightNotice {
    /// The text message.
    pub fn to_text(&self) -> String {
        serde_json::to_string(self).expect("texts and finite numbers always serialise")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_the_original_client_are_understood() {
        let table = [
            (r#"{"type":"input::key","data":{"code":40,"pressed":true}}"#, key(28, true)),
            (r#"{"type":"input::key","data":{"code":4.0,"pressed":false}}"#, key(30, false)),
            (r#"{"type":"input::key","data":{"evdev":41,"pressed":true}}"#, key(41, true)),
            (
                r#"{"type":"input::mouse-move","data":{"rx":1,"ry":-2,"x":10.5,"y":720}}"#,
                ClientControl::MouseMove { position: Some((10.5, 720.0)), relative: (1.0, -2.0) },
            ),
            (
                r#"{"type":"input::mouse-move","data":{"rx":3,"ry":0}}"#,
                ClientControl::MouseMove { position: None, relative: (3.0, 0.0) },
            ),
            (
                r#"{"type":"input::mouse-button","data":{"button":3,"pressed":true}}"#,
                ClientControl::MouseButton { evdev: 0x111, pressed: true },
            ),
            (
                r#"{"type":"input::mouse-button","data":{"pressed":true,"button":2,"display_id":0}}"#,
                ClientControl::MouseButton { evdev: 0x111, pressed: true },
            ),
            (
                r#"{"type":"input::mouse-button","data":{"pressed":false,"button":3,"display_id":0}}"#,
                ClientControl::MouseButton { evdev: 0x112, pressed: false },
            ),
            (
                r#"{"type":"input::mouse-button","data":{"pressed":true,"button":4,"display_id":0}}"#,
                ClientControl::MouseButton { evdev: 0x113, pressed: true },
            ),
            (
                r#"{"type":"input::mouse-wheel","data":{"x":1,"y":1}}"#,
                ClientControl::MouseWheel { horizontal: -1, vertical: 1 },
            ),
            (
                r#"{"type":"input::touch-start","data":{"id":0,"x":1,"y":2.5}}"#,
                ClientControl::TouchStart { id: 0, position: (1.0, 2.5) },
            ),
            (
                r#"{"type":"input::touch-end","data":{"id":0,"last":true}}"#,
                ClientControl::TouchEnd { id: 0, last: true },
            ),
            (r#"{"type":"input::touch-cancel","data":{"id":7}}"#, ClientControl::TouchCancel { id: 7 }),
            (
                r#"{"type":"input::gamepad-axes","data":{"id":0,"index":1,"value":-7}}"#,
                ClientControl::GamepadAxis { id: 0, index: 1, value: -1.0 },
            ),
            (
                r#"{"type":"input::ime-event","data":{"type":1,"data":{"text":"ä"}}}"#,
                ClientControl::Text { text: "ä".into() },
            ),
            (
                r#"{"type":"input::ime-event","data":{"type":2,"data":{"code":67,"times":3}}}"#,
                ClientControl::Backspaces { times: 3 },
            ),
            (r#"{"type":"stream::disconnect","data":{}}"#, ClientControl::Disconnect),
            (r#"{"type":"stream::disconnect"}"#, ClientControl::Disconnect),
        ];
        for (text, expected) in table {
            assert_eq!(parse(text), Ok(expected), "{text}");
        }
    }

    fn key(evdev: u32, pressed: bool) -> ClientControl {
        ClientControl::Key { evdev, pressed }
    }

    #[test]
    fn odd_messages_are_set_aside_with_the_reason() {
        let table = [
            ("", Ignored::Malformed),
            ("[]", Ignored::Malformed),
            ("{}", Ignored::Malformed),
            (r#"{"type":5}"#, Ignored::Malformed),
            (r#"{"type":"dance"}"#, Ignored::UnknownType),
            (r#"{"type":"sensor:event","data":{}}"#, Ignored::UnknownType),
            (r#"{"type":"input::key","data":{"pressed":true}}"#, Ignored::Member("code")),
            (r#"{"type":"input::key","data":{"code":40}}"#, Ignored::Member("pressed")),
            (r#"{"type":"input::key","data":{"code":53,"pressed":true}}"#, Ignored::Member("code")),
            (r#"{"type":"input::key","data":{"code":-1,"pressed":true}}"#, Ignored::Member("code")),
            (r#"{"type":"input::key","data":{"code":1e300,"pressed":true}}"#, Ignored::Member("code")),
            (r#"{"type":"input::key","data":{"evdev":0,"pressed":true}}"#, Ignored::Member("code")),
            (r#"{"type":"input::key","data":{"evdev":272,"pressed":true}}"#, Ignored::Member("code")),
            (r#"{"type":"input::key","data":null}"#, Ignored::Member("code")),
            (r#"{"type":"input::mouse-move","data":{}}"#, Ignored::Member("x")),
            (
                r#"{"type":"input::mouse-button","data":{"button":9,"pressed":true}}"#,
                Ignored::Member("button"),
            ),
            (r#"{"type":"input::touch-start","data":{"id":1,"x":"a","y":2}}"#, Ignored::Member("x")),
            (r#"{"type":"input::ime-event","data":{"type":3,"data":{}}}"#, Ignored::UnknownType),
        ];
        for (text, expected) in table {
            assert_eq!(parse(text), Err(expected), "{text}");
        }
    }

    #[test]
    fn every_key_of_the_table_has_its_own_linux_key() {
        let known: Vec<u32> = (0..200).filter_map(key_to_evdev).collect();
        assert_eq!(known.len(), 92 - 4 + 1 - 2, "4 to 92 without 52 and 53");
        let unique: std::collections::BTreeSet<u32> = known.iter().copied().collect();
        assert_eq!(unique.len(), known.len());
        for (code, evdev) in [(29, 44), (30, 2), (39, 11), (58, 59), (67, 68), (69, 88), (79, 106), (92, 158)]
        {
            assert_eq!(key_to_evdev(code), Some(evdev));
        }
    }

    #[test]
    fn messages_of_our_own_channel_have_the_agreed_form() {
        assert_eq!(
            serde_json::from_str::<FanlightRequest>(r#"{"type":"layout","layout":"de"}"#).expect("layout"),
            FanlightRequest::Layout { layout: "de".into() }
        );
        assert_eq!(
            FanlightNotice::Cursor(CursorNotice::Named { name: "text".into() }).to_text(),
            r#"{"type":"cursor","kind":"named","name":"text"}"#
        );
        assert_eq!(
            FanlightNotice::PointerLock { locked: true }.to_text(),
            r#"{"type":"pointer-lock","locked":true}"#
        );
    }
}
