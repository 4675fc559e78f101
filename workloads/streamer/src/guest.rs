//! Reading the guest file from standard input.

use std::io::Read;

use fanlight_api::{PROTOCOL_VERSION, guest::Guest};

/// Largest guest file, bytes.
pub(crate) const MAX_BYTES: u64 = 1024 * 1024;

/// Why the guest file is no good.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// It did not come.
    #[error("reading the guest file from standard input")]
    Read(#[source] std::io::Error),
    /// Larger than we read.
    #[error("the guest file has more than {MAX_BYTES} bytes")]
    TooLarge,
    /// Not JSON, or a member is missing or odd.
    #[error("guest file: member {member}: {reason}")]
    Member {
        /// Path of the member, `.` for the whole file.
        member: String,
        /// What is wrong.
        reason: String,
    },
    /// Newer than we are.
    #[error("guest file: member version: {0} is not known, {PROTOCOL_VERSION} is")]
    Version(u32),
}

/// Reads the guest file to its end.
///
/// # Errors
/// Names the member that is missing or wrong. Values are not repeated: one of them is a token.
pub fn read(from: impl Read) -> Result<Guest, GuestError> {
    let mut text = Vec::new();
    from.take(MAX_BYTES + 1).read_to_end(&mut text).map_err(GuestError::Read)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(GuestError::TooLarge);
    }
    let value: serde_json::Value = serde_json::from_slice(&text).map_err(|error| GuestError::Member {
        member: ".".into(),
        reason: format!("not JSON at line {} column {}", error.line(), error.column()),
    })?;
    for member in ["version", "instance_id", "application", "display"] {
        if value.get(member).is_none() {
            return Err(GuestError::Member { member: member.into(), reason: "missing".into() });
        }
    }
    let guest: Guest = serde_json::from_value(value.clone()).map_err(|_| bad_member(&value))?;
    if guest.version != PROTOCOL_VERSION {
        return Err(GuestError::Version(guest.version));
    }
    if guest.application.command.first().is_none_or(String::is_empty) {
        return Err(GuestError::Member { member: "application.command".into(), reason: "empty".into() });
    }
    let display = guest.display;
    let sides = 1..=3840;
    if !sides.contains(&display.width)
        || !sides.contains(&display.height)
        || !(1..=240).contains(&display.fps)
    {
        return Err(GuestError::Member {
            member: "display".into(),
            reason: format!(
                "{}x{} at {} per second is impossible",
                display.width, display.height, display.fps
            ),
        });
    }
    Ok(guest)
}

/// Finds the first member that does not read by itself; serde's own text may repeat a value.
fn bad_member(value: &serde_json::Value) -> GuestError {
    use fanlight_api::{InstanceId, gateway::Screen, guest};
    fn reads<T: serde::de::DeserializeOwned>(value: &serde_json::Value, name: &str) -> bool {
        value.get(name).is_none_or(|value| serde_json::from_value::<T>(value.clone()).is_ok())
    }
    let checks = [
        ("version", reads::<u32>(value, "version")),
        ("instance_id", reads::<InstanceId>(value, "instance_id")),
        ("application", reads::<guest::GuestApplication>(value, "application")),
        ("display", reads::<Screen>(value, "display")),
        ("streaming", reads::<Option<guest::Streaming>>(value, "streaming")),
        ("media", reads::<guest::Media>(value, "media")),
        ("pool", reads::<Option<guest::PoolStart>>(value, "pool")),
    ];
    let member = checks.iter().find(|(_, good)| !good).map_or(".", |(name, _)| name);
    GuestError::Member {
        member: member.into(),
        reason: "a part of it is missing or of the wrong kind".into(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn guest() -> serde_json::Value {
        json!({
            "version": 1, "instance_id": "i1",
            "application": {"name": "terminal", "command": ["foot"]},
            "display": {"width": 1280, "height": 720, "fps": 60, "density": 240},
        })
    }

    #[test]
    fn a_guest_file_with_what_is_needed_is_read() {
        let read = read(guest().to_string().as_bytes()).expect("good");
        assert_eq!(read.application.command, ["foot"]);
        assert!(read.streaming.is_none());
    }

    #[test]
    fn the_member_that_is_wrong_is_named_and_no_token_shows() {
        let mut table = vec![
            ("application", json!(null)),
            ("application", json!({"name": "x", "command": "foot"})),
            ("application.command", json!({"name": "x", "command": []})),
            ("display", json!({"width": "wide"})),
            ("display", json!({"width": 0, "height": 720, "fps": 60, "density": 240})),
            ("instance_id", json!("../x")),
            ("version", json!(2)),
            ("version", json!("one")),
            ("streaming", json!({"session_id": "s", "token": "hunter2"})),
            ("media", json!({"bind": "hunter2"})),
            ("pool", json!("hunter2")),
        ];
        for (member, value) in table.drain(..) {
            let mut guest = guest();
            guest[member.split('.').next().expect("one")] = value;
            let error = read(guest.to_string().as_bytes()).expect_err(member).to_string();
            assert!(error.contains(&format!("member {member}")), "{error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
        for text in ["", "{", "[]", "null"] {
            assert!(read(text.as_bytes()).is_err(), "{text}");
        }
        let large = vec![b' '; MAX_BYTES as usize + 1];
        assert!(matches!(read(&large[..]), Err(GuestError::TooLarge)));
    }
}
