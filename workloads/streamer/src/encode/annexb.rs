//! H.264 byte streams (ITU-T H.264 Annex B): finding units and dropping those a browser has no use for.

/// Supplemental enhancement information.
const SEI: u8 = 6;
/// Access unit delimiter.
const DELIMITER: u8 = 9;
/// Coded slices, of other pictures and of IDR pictures.
const SLICES: [u8; 2] = [1, 5];

/// Iterates over the units of a byte stream: type and bytes with their start code.
///
/// Bytes before the first start code are skipped.
pub fn units(stream: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    let mut rest = stream;
    std::iter::from_fn(move || {
        loop {
            let start = start_code(rest)?;
            let unit = &rest[start..];
            let header = 3 + usize::from(unit[2] == 0);
            // The next start code may share its leading zero with nothing: zero_byte belongs to what follows.
            let end = start_code(&unit[header..]).map_or(unit.len(), |next| header + next);
            let (unit, after) = unit.split_at(end);
            rest = after;
            if let Some(byte) = unit.get(header) {
                return Some((byte & 0x1f, unit));
            }
        }
    })
}

/// Position of the next start code, its optional leading zero included.
fn start_code(bytes: &[u8]) -> Option<usize> {
    let at = bytes.windows(3).position(|window| window == [0, 0, 1])?;
    Some(if at > 0 && bytes[at - 1] == 0 { at - 1 } else { at })
}

/// Appends an access unit to `out` without delimiters and supplemental information.
///
/// Those come before the first slice, so only that much is searched.
pub fn strip(stream: &[u8], out: &mut Vec<u8>) {
    out.reserve(stream.len());
    let mut at = 0;
    for (kind, unit) in units_lazily(stream) {
        if SLICES.contains(&kind) {
            break;
        }
        at += unit.len();
        if kind != SEI && kind != DELIMITER {
            out.extend_from_slice(unit);
        }
    }
    out.extend_from_slice(&stream[at..]);
}

/// As [`units`], but the end of a slice is not searched: a slice comes with everything after it.
fn units_lazily(stream: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    let mut rest = stream;
    std::iter::from_fn(move || {
        let header = match rest {
            [0, 0, 1, ..] => 3,
            [0, 0, 0, 1, ..] => 4,
            _ => return None,
        };
        let kind = rest.get(header)? & 0x1f;
        let end = if SLICES.contains(&kind) {
            rest.len()
        } else {
            start_code(&rest[header..]).map_or(rest.len(), |next| header + next)
        };
        let (unit, after) = rest.split_at(end);
        rest = after;
        Some((kind, unit))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stripped(stream: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        strip(stream, &mut out);
        out
    }

    #[test]
    fn units_are_found_with_both_start_codes() {
        let stream = [0, 0, 0, 1, 0x67, 1, 2, 0, 0, 1, 0x68, 3, 0, 0, 0, 1, 0x65, 4, 0, 0, 3, 1];
        let found: Vec<_> = units(&stream).map(|(kind, unit)| (kind, unit.len())).collect();
        assert_eq!(found, [(7, 7), (8, 5), (5, 10)]);
    }

    #[test]
    fn delimiters_and_supplemental_information_go_and_the_rest_stays() {
        let stream = [
            0, 0, 0, 1, 9, 0xf0, 0, 0, 0, 1, 0x67, 1, 0, 0, 0, 1, 0x68, 2, 0, 0, 1, 6, 5, 5, 0, 0, 1, 0x65,
            9, 0, 0, 1, 0x65, 8,
        ];
        let expected = [0, 0, 0, 1, 0x67, 1, 0, 0, 0, 1, 0x68, 2, 0, 0, 1, 0x65, 9, 0, 0, 1, 0x65, 8];
        assert_eq!(stripped(&stream), expected);
    }

    #[test]
    fn what_is_no_byte_stream_passes_unchanged_and_gives_no_units() {
        for stream in [&[][..], &[1, 2, 3], &[0, 0], &[0, 0, 1], &[0, 0, 0, 1]] {
            assert_eq!(stripped(stream), stream);
            assert_eq!(units(stream).count(), 0, "{stream:?}");
        }
    }
}
