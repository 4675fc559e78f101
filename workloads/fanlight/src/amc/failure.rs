//! What a failure means for the caller: an exit code for scripts, and advice for people.

use fanlight_client::ClientError;

/// Everything that is none of the others.
pub const FAILED: u8 = 1;
/// What was typed makes no sense; as the parser of the command line has it.
pub const USAGE: u8 = 2;
/// There is no such object.
pub const NOT_FOUND: u8 = 3;
/// The caller may not do that.
pub const REFUSED: u8 = 4;

/// What was typed makes no sense, which only showed later.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// There is no such object, found out without a server.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct NotFound(pub String);

/// The exit code that stands for an error.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    for cause in error.chain() {
        if cause.is::<Usage>() {
            return USAGE;
        }
        if cause.is::<NotFound>() {
            return NOT_FOUND;
        }
        if let Some(status) = cause.downcast_ref::<ClientError>().and_then(ClientError::status) {
            return match status.as_u16() {
                404 => NOT_FOUND,
                401 | 403 => REFUSED,
                _ => FAILED,
            };
        }
    }
    FAILED
}

/// The error and what can be done about it, for standard error.
pub fn report(error: &anyhow::Error) -> String {
    let mut text = format!("fanlight: {}", chain(error));
    if let Some(advice) = error.chain().find_map(|cause| advice(cause.downcast_ref::<ClientError>()?)) {
        text.push_str("\nhint: ");
        text.push_str(advice);
    }
    text
}

/// All causes in one line, none of them twice.
fn chain(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1) {
        let part = cause.to_string();
        if !text.contains(&part) {
            text.push_str(": ");
            text.push_str(&part);
        }
    }
    text
}

fn advice(error: &ClientError) -> Option<&'static str> {
    match error {
        ClientError::Unreachable { server, .. } if server.starts_with("unix:") => Some(
            "does the stack run? `fanlight up` starts one; --state names another, --remote one elsewhere",
        ),
        ClientError::Unreachable { .. } if error.chain().contains("invalid peer certificate") => Some(
            "the server shows another certificate than the one that is trusted; if that is right, remove the remote \
             and add it again",
        ),
        ClientError::Unreachable { .. } => {
            Some("is the address right, and does AMS run there? `fanlight remote ls`")
        }
        ClientError::Refused { status, .. } => match status.as_u16() {
            401 => {
                Some("the token is missing, expired or for another server; get a new one from the provider")
            }
            403 => Some(
                "an administrator can let this client in with `fanlight remote certificate` here and `fanlight auth \
                 identity create` there, or permit more with `fanlight auth group grant`",
            ),
            429 => Some("too many requests; try again in a moment"),
            _ => None,
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    fn refused(status: u16) -> anyhow::Error {
        let error: Result<(), ClientError> = Err(ClientError::Refused {
            method: "GET",
            path: "/1.0/x".into(),
            status: reqwest::StatusCode::from_u16(status).expect("a status"),
            code: String::new(),
            text: "no".into(),
            request_id: String::new(),
        });
        error.context("showing the instance").expect_err("it is one")
    }

    #[test]
    fn codes_tell_scripts_what_kind_of_failure_it_was() {
        for (error, code) in [
            (refused(404), NOT_FOUND),
            (refused(403), REFUSED),
            (refused(401), REFUSED),
            (refused(500), FAILED),
            (refused(409), FAILED),
            (anyhow::anyhow!("something"), FAILED),
            (Usage("no such key".into()).into(), USAGE),
            (NotFound("no such remote".into()).into(), NOT_FOUND),
        ] {
            assert_eq!(exit_code(&error), code, "{error:#}");
        }
    }

    #[test]
    fn a_report_says_each_cause_once_and_what_to_do() {
        let text = report(&refused(403));
        assert!(text.starts_with("fanlight: showing the instance: no (GET /1.0/x: 403"), "{text}");
        assert!(text.contains("hint: an administrator"), "{text}");
        assert!(!report(&refused(404)).contains("hint"));
    }
}
