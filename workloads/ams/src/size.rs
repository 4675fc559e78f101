//! Sizes as people write them: a whole number and a unit, factor 1024, no fractions (ams-model section 1).

const UNITS: [(&str, u64); 5] =
    [("TB", 1 << 40), ("GB", 1 << 30), ("MB", 1 << 20), ("kB", 1 << 10), ("B", 1)];

/// A text that is no size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a size: a whole number and B, kB, MB, GB or TB are needed, e.g. 512MB")]
pub struct InvalidSize {
    /// What was given, cut to 64 characters.
    pub text: String,
}

/// Bytes behind a size such as `3GB`.
///
/// # Errors
/// The text is no size, or more than 2⁶⁴ bytes.
pub fn parse(text: &str) -> Result<u64, InvalidSize> {
    let invalid = || InvalidSize { text: text.chars().take(64).collect() };
    let split = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(invalid)?;
    let (number, unit) = text.split_at(split);
    let number: u64 = number.parse().map_err(|_| invalid())?;
    let (_, factor) = UNITS
        .iter()
        // `KB` and `kB` are both written.
        .find(|(name, _)| *name == unit || (unit == "KB" && *name == "kB"))
        .ok_or_else(invalid)?;
    number.checked_mul(*factor).ok_or_else(invalid)
}

/// The shortest exact form of a number of bytes.
pub fn format(bytes: u64) -> String {
    let (name, factor) =
        UNITS.into_iter().find(|(_, factor)| bytes != 0 && bytes.is_multiple_of(*factor)).unwrap_or(("B", 1));
    format!("{}{name}", bytes / factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_written_back() {
        for (text, bytes) in [
            ("0B", 0),
            ("1B", 1),
            ("3kB", 3 << 10),
            ("512MB", 512 << 20),
            ("3GB", 3 << 30),
            ("2TB", 2 << 40),
            ("1025kB", 1025 << 10),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
            assert_eq!(format(bytes), text);
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for bad in
            ["", "3", "GB", "3.5GB", "-3GB", "3 GB", "3gb", "3PB", "99999999TB", "99999999999999999999B"]
        {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }
}
