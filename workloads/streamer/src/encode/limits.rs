//! Bit rate limits and H.264 levels by picture size and rate: plain tables.

/// Default limits of the video bit rate: pixels up to, pictures per second, kbit/s from, kbit/s to. Sorted by size,
/// then by descending rate, which decides between rates that are equally near.
const LIMITS: [(u64, u32, u32, u32); 4] = [
    (921_600, 60, 2500, 5000),
    (921_600, 30, 1000, 3000),
    (2_073_600, 60, 3000, 7000),
    (2_073_600, 30, 3000, 6000),
];

/// Lowest and highest video bit rate in kbit/s for a picture size and rate.
///
/// The row with the next higher number of pixels, among those the nearest rate; larger pictures scale the largest
/// rows by their pixels.
pub fn limits(width: u32, height: u32, fps: u32) -> (u32, u32) {
    let pixels = u64::from(width) * u64::from(height);
    let largest = LIMITS[LIMITS.len() - 1].0;
    let class = LIMITS.iter().map(|row| row.0).find(|limit| pixels <= *limit).unwrap_or(largest);
    let (_, _, min, max) = LIMITS
        .into_iter()
        .filter(|row| row.0 == class)
        // The first of equally near rows wins, which is the faster one.
        .min_by_key(|row| row.1.abs_diff(fps))
        .expect("every size class of the table has rows");
    let scale = |kbps: u32| {
        let scaled = u128::from(kbps) * u128::from(pixels.max(largest)) / u128::from(largest);
        u32::try_from(scaled).unwrap_or(u32::MAX)
    };
    if pixels > largest { (scale(min), scale(max)) } else { (min, max) }
}

/// H.264 levels that matter here: `level_idc`, macroblocks per second, macroblocks per picture (H.264 table A-1).
const LEVELS: [(u8, u64, u64); 9] = [
    (31, 108_000, 3_600),
    (32, 216_000, 5_120),
    (40, 245_760, 8_192),
    (42, 522_240, 8_704),
    (50, 589_824, 22_080),
    (51, 983_040, 36_864),
    (52, 2_073_600, 36_864),
    (60, 4_177_920, 139_264),
    (62, 16_711_680, 139_264),
];

/// The lowest H.264 `level_idc` that covers a picture size and rate, 31 at least; what a description should announce.
pub fn level_idc(width: u32, height: u32, fps: u32) -> u8 {
    let blocks = u64::from(width.div_ceil(16)) * u64::from(height.div_ceil(16));
    let per_second = blocks * u64::from(fps);
    LEVELS
        .into_iter()
        .find(|(_, rate, size)| per_second <= *rate && blocks <= *size)
        .map_or(LEVELS[LEVELS.len() - 1].0, |(level, _, _)| level)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_follow_the_table_of_the_protocol() {
        for ((width, height, fps), expected) in [
            ((1280, 720, 30), (1000, 3000)),
            ((1280, 720, 60), (2500, 5000)),
            ((1920, 1080, 30), (3000, 6000)),
            ((1920, 1080, 60), (3000, 7000)),
            // Smaller sizes take the next higher class, however small.
            ((640, 480, 60), (2500, 5000)),
            ((2, 2, 1), (1000, 3000)),
            // One pixel row more leaves the class.
            ((1280, 722, 60), (3000, 7000)),
            // The nearest rate, the faster one when both are equally near.
            ((1280, 720, 44), (1000, 3000)),
            ((1280, 720, 45), (2500, 5000)),
            ((1280, 720, 120), (2500, 5000)),
            // Larger pictures scale by pixels.
            ((3840, 2160, 60), (12000, 28000)),
            ((3840, 2160, 30), (12000, 24000)),
            ((2560, 1440, 60), (5333, 12444)),
        ] {
            assert_eq!(limits(width, height, fps), expected, "{width}x{height} at {fps}");
        }
    }

    #[test]
    fn limits_do_not_overflow() {
        let (min, max) = limits(u32::MAX, u32::MAX, u32::MAX);
        assert!(min <= max);
    }

    #[test]
    fn levels_cover_size_and_rate() {
        for ((width, height, fps), expected) in [
            ((320, 240, 30), 31),
            ((1280, 720, 30), 31),
            ((1280, 720, 60), 32),
            ((1920, 1080, 30), 40),
            ((1920, 1080, 60), 42),
            ((3840, 2160, 30), 51),
            ((3840, 2160, 60), 52),
            ((8192, 8192, 240), 62),
        ] {
            assert_eq!(level_idc(width, height, fps), expected, "{width}x{height} at {fps}");
        }
    }
}
