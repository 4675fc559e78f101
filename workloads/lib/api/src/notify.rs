//! Datagrams of `sd_notify(3)`: lines of `KEY=VALUE`. Anybody in the instance can send them, so they are bounded
//! and say nothing that could hurt anybody else.

use crate::guest::Ended;

/// Longest text that is kept, characters.
const MAX_TEXT: usize = 1000;

/// What a datagram said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Notice {
    /// `READY=1`.
    pub ready: bool,
    /// `STATUS=…`.
    pub status: Option<String>,
    /// `X_FANLIGHT_RESULT=…`.
    pub result: Option<Ended>,
}

/// Reads a datagram; what is not understood is passed over.
pub fn parse(datagram: &[u8]) -> Notice {
    let text = String::from_utf8_lossy(datagram);
    let mut notice = Notice::default();
    for (key, value) in text.lines().filter_map(|line| line.split_once('=')) {
        match key {
            "READY" => notice.ready = value == "1",
            "STATUS" => notice.status = Some(bounded(value)),
            "X_FANLIGHT_RESULT" => {
                let ended: Option<Ended> = serde_json::from_str(value).ok();
                notice.result = ended.map(|ended| Ended { message: bounded(&ended.message), ..ended });
            }
            _ => {}
        }
    }
    notice
}

fn bounded(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(MAX_TEXT).collect()
}

#[cfg(test)]
mod tests {
    use crate::guest::EndReason;

    use super::*;

    #[test]
    fn known_lines_are_read_and_others_passed_over() {
        let notice = parse(b"READY=1\nMAINPID=1\nSTATUS=at work\nnonsense\n\xff\xff=x\n");
        assert_eq!(notice, Notice { ready: true, status: Some("at work".into()), result: None });
        let notice = parse(br#"X_FANLIGHT_RESULT={"reason":"idle","message":"nobody came"}"#);
        assert_eq!(notice.result, Some(Ended { reason: EndReason::Idle, message: "nobody came".into() }));
    }

    #[test]
    fn bad_and_huge_lines_do_no_harm() {
        for bad in
            [&b""[..], b"READY=2", b"X_FANLIGHT_RESULT={", b"X_FANLIGHT_RESULT={\"reason\":\"x\"}", b"="]
        {
            assert_eq!(parse(bad), Notice::default(), "{bad:?}");
        }
        let long = format!("STATUS={}", "x".repeat(100_000));
        assert_eq!(parse(long.as_bytes()).status.map(|status| status.len()), Some(MAX_TEXT));
    }
}
