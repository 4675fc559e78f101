//! Sizes as people write them: `3GB`, `512MB`, `1.5GiB`, plain bytes.

const UNITS: [(&str, u64); 9] = [
    ("kib", 1 << 10),
    ("mib", 1 << 20),
    ("gib", 1 << 30),
    ("tib", 1 << 40),
    ("kb", 1000),
    ("mb", 1_000_000),
    ("gb", 1_000_000_000),
    ("tb", 1_000_000_000_000),
    ("b", 1),
];

/// The bytes that a text means.
///
/// # Errors
/// It is no size, or larger than can be said.
pub fn parse(text: &str) -> Result<i64, String> {
    let wrong = || format!("{text:?} is no size; expected a number with B, KB, MB, GB or TB, or KiB to TiB");
    let lower = text.trim().to_ascii_lowercase();
    let (number, factor) = UNITS
        .iter()
        .find_map(|(unit, factor)| Some((lower.strip_suffix(unit)?, *factor)))
        .unwrap_or((lower.as_str(), 1));
    let number = number.trim();
    if let Ok(whole) = number.parse::<u64>() {
        let bytes = whole.checked_mul(factor).and_then(|bytes| i64::try_from(bytes).ok());
        return bytes.ok_or_else(|| format!("{text:?} is too large"));
    }
    let plain = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    let number: f64 = number.parse().ok().filter(|_| plain).ok_or_else(wrong)?;
    let bytes = number * factor as f64;
    if bytes > (1_u64 << 62) as f64 { Err(format!("{text:?} is too large")) } else { Ok(bytes as i64) }
}

/// Bytes as people read them: the largest unit of AMS (factor 1024) that leaves 1 or more, with a fraction where it
/// says something.
pub fn short(bytes: u64) -> String {
    const NAMES: [(&str, u64); 4] = [("TB", 1 << 40), ("GB", 1 << 30), ("MB", 1 << 20), ("kB", 1 << 10)];
    let Some((name, factor)) = NAMES.into_iter().find(|(_, factor)| bytes >= *factor) else {
        return format!("{bytes}B");
    };
    let text = format!("{:.1}", bytes as f64 / factor as f64);
    format!("{}{name}", text.strip_suffix(".0").unwrap_or(&text))
}

/// An exact size as AMS writes it (`16369924kB`) as people read it; other texts stay.
pub fn shorter(text: &str) -> String {
    let bytes = text.find(|c: char| !c.is_ascii_digit()).and_then(|at| {
        let (number, unit) = text.split_at(at);
        let power = ["B", "kB", "MB", "GB", "TB"].iter().position(|name| *name == unit)?;
        number.parse::<u64>().ok()?.checked_mul(1 << (10 * power))
    });
    bytes.map_or_else(|| text.to_owned(), short)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_shown_in_the_unit_that_people_read() {
        for (exact, shown) in [
            ("0B", "0B"),
            ("1023B", "1023B"),
            ("1kB", "1kB"),
            ("16369924kB", "15.6GB"),
            ("16GB", "16GB"),
            ("3072GB", "3TB"),
            ("", ""),
            ("much", "much"),
            ("99999999999999999999GB", "99999999999999999999GB"),
        ] {
            assert_eq!(shorter(exact), shown, "{exact}");
        }
        assert_eq!(short(3 << 29), "1.5GB");
    }

    #[test]
    fn sizes_are_read_with_units_of_both_kinds() {
        for (text, bytes) in [
            ("0", 0),
            ("17", 17),
            ("17B", 17),
            ("3GB", 3_000_000_000),
            ("3 GB", 3_000_000_000),
            ("3GiB", 3 << 30),
            ("512mb", 512_000_000),
            ("1.5KiB", 1536),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for bad in ["", "GB", "-1", "-1GB", "1e3", "inf", "nan", "3XB", "9999999999TB", "99999999.5TB"] {
            let error = parse(bad).expect_err(bad);
            assert!(error.contains(&format!("{bad:?}")), "{error}");
        }
    }
}
