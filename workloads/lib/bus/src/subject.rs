//! Subjects: parts separated by dots, in the characters that NATS servers and clients agree on.

/// Whether messages can be sent to it: no empty parts, no wildcards, no blanks or control characters.
pub fn is_valid(subject: &str) -> bool {
    subject.len() <= 1024 && subject.split('.').all(|part| is_plain(part) && part != "*" && part != ">")
}

/// Whether it can be subscribed to: as [`is_valid`], and `*` for any one part, `>` for all that follow.
pub fn is_valid_filter(filter: &str) -> bool {
    let parts: Vec<&str> = filter.split('.').collect();
    filter.len() <= 1024
        && parts
            .iter()
            .enumerate()
            .all(|(index, part)| is_plain(part) && (*part != ">" || index + 1 == parts.len()))
}

fn is_plain(part: &str) -> bool {
    !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_graphic())
}

/// Whether a filter has wildcards.
pub fn is_wild(filter: &str) -> bool {
    filter.split('.').any(|part| part == "*" || part == ">")
}

/// Whether a filter takes a subject.
pub fn matches(filter: &str, subject: &str) -> bool {
    let mut subject = subject.split('.');
    for part in filter.split('.') {
        match (part, subject.next()) {
            (_, None) => return false,
            (">", Some(_)) => return true,
            ("*", Some(_)) => {}
            (part, Some(given)) if part == given => {}
            _ => return false,
        }
    }
    subject.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_take_the_subjects_they_name() {
        for (filter, subject, expected) in [
            ("a.b", "a.b", true),
            ("a.b", "a.c", false),
            ("a.b", "a.b.c", false),
            ("a.b.c", "a.b", false),
            ("a.*", "a.b", true),
            ("a.*", "a", false),
            ("a.*", "a.b.c", false),
            ("*.b", "a.b", true),
            ("a.>", "a.b.c", true),
            ("a.>", "a", false),
            (">", "a", true),
            ("a.*.c", "a.b.c", true),
        ] {
            assert_eq!(matches(filter, subject), expected, "{filter} {subject}");
        }
    }

    #[test]
    fn subjects_that_would_confuse_a_server_are_refused() {
        for bad in ["", ".", "a.", ".a", "a..b", "a b", "a\r\nPUB x 0", "ä", "a\0"] {
            assert!(!is_valid(bad), "{bad:?}");
            assert!(!is_valid_filter(bad), "{bad:?}");
        }
        assert!(!is_valid("a.*") && is_valid_filter("a.*"));
        assert!(!is_valid("a.>") && is_valid_filter("a.>"));
        assert!(!is_valid_filter("a.>.b"));
        assert!(is_valid("agents.eu~west:1.requests"));
        assert!(!is_valid(&"x".repeat(1025)));
    }
}
