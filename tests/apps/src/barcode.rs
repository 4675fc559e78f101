//! The barcode in the top left corner of the pattern: what a decoder at the far end of the stream reads to
//! know when a frame was drawn, which one it is, and what the application had received by then.
//!
//! Cells are 16×16 pixels, so that every cell is one H.264 macroblock and survives any quality. Six rows of
//! 36 cells: white, black, 32 data bits (most significant first, white is 1), even parity of the data,
//! white. The six 32-bit words are, each as two 16-bit halves:
//!
//! | row | high half | low half |
//! |---|---|---|
//! | 0 | clock bits 47–32 | clock bits 31–16 |
//! | 1 | clock bits 15–0 | frame number bits 15–0 |
//! | 2 | frame number bits 31–16 | last key pressed (evdev code) |
//! | 3 | number of key presses | held pointer buttons: bit 0 left, 1 right, 2 middle |
//! | 4 | pointer x | pointer y |
//! | 5 | `MAGIC` | CRC-16/CCITT-FALSE of the eleven halves before it, big endian |
//!
//! The clock is the Unix time in microseconds modulo 2⁴⁸.

/// Side of a cell in pixels.
pub const CELL: usize = 16;
/// Cells in a row.
pub const COLUMNS: usize = 36;
/// Rows of cells.
pub const ROWS: usize = 6;
/// Width of the barcode in pixels; a narrower picture shows none.
pub const WIDTH: usize = COLUMNS * CELL;
/// Height of the barcode in pixels.
pub const HEIGHT: usize = ROWS * CELL;
/// Marks the pattern of this layout.
pub const MAGIC: u16 = 0xfa91;

const CLOCK_MASK: u64 = (1 << 48) - 1;

/// What the barcode says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// Unix time in microseconds modulo 2⁴⁸ at which the frame was drawn.
    pub clock_us: u64,
    /// Number of the frame, from 0.
    pub frame: u32,
    /// Evdev code of the last key pressed, 0 before the first.
    pub key: u16,
    /// Number of key presses seen, modulo 2¹⁶.
    pub key_presses: u16,
    /// Held pointer buttons: bit 0 left, 1 right, 2 middle.
    pub buttons: u16,
    /// Pointer position in pixels.
    pub pointer: (u16, u16),
}

impl Reading {
    /// The six words that are drawn.
    pub fn words(&self) -> [u32; ROWS] {
        let clock = self.clock_us & CLOCK_MASK;
        let pair = |high: u64, low: u64| ((high as u32 & 0xffff) << 16) | (low as u32 & 0xffff);
        let mut words = [
            pair(clock >> 32, clock >> 16),
            pair(clock, self.frame.into()),
            pair((self.frame >> 16).into(), self.key.into()),
            pair(self.key_presses.into(), self.buttons.into()),
            pair(self.pointer.0.into(), self.pointer.1.into()),
            u32::from(MAGIC) << 16,
        ];
        words[5] |= u32::from(checksum(&words));
        words
    }

    /// Reads six words back; `None` if magic or checksum do not fit.
    pub fn from_words(words: &[u32; ROWS]) -> Option<Self> {
        if (words[5] >> 16) as u16 != MAGIC || words[5] as u16 != checksum(words) {
            return None;
        }
        let high = |row: usize| (words[row] >> 16) as u16;
        let low = |row: usize| words[row] as u16;
        Some(Self {
            clock_us: (u64::from(words[0]) << 16) | u64::from(high(1)),
            frame: (u32::from(high(2)) << 16) | u32::from(low(1)),
            key: low(2),
            key_presses: high(3),
            buttons: low(3),
            pointer: (high(4), low(4)),
        })
    }

    /// Reads a barcode from the luma of a picture: `luma(x, y)` in pixels, 0 to 255. `None` where there is
    /// no valid barcode.
    pub fn from_luma(luma: impl Fn(usize, usize) -> u8) -> Option<Self> {
        let mut words = [0u32; ROWS];
        for (row, word) in words.iter_mut().enumerate() {
            let bit = |column: usize| luma(column * CELL + CELL / 2, row * CELL + CELL / 2) >= 128;
            if !bit(0) || bit(1) || !bit(COLUMNS - 1) {
                return None;
            }
            for column in 2..34 {
                *word = (*word << 1) | u32::from(bit(column));
            }
            if bit(34) != (word.count_ones() % 2 == 1) {
                return None;
            }
        }
        Self::from_words(&words)
    }
}

/// Whether a cell of a row that holds `word` is white.
pub fn cell(word: u32, column: usize) -> bool {
    match column {
        0 | 35 => true,
        1 => false,
        34 => word.count_ones() % 2 == 1,
        _ => (word >> (33 - column)) & 1 == 1,
    }
}

/// Checksum of the eleven halves before it.
fn checksum(words: &[u32; ROWS]) -> u16 {
    crc16(words.iter().flat_map(|word| word.to_be_bytes()).take(ROWS * 4 - 2))
}

/// CRC-16/CCITT-FALSE.
fn crc16(bytes: impl Iterator<Item = u8>) -> u16 {
    let mut crc = 0xffff_u16;
    for byte in bytes {
        crc ^= u16::from(byte) << 8;
        for _ in 0..8 {
            crc = if crc & 0x8000 == 0 { crc << 1 } else { (crc << 1) ^ 0x1021 };
        }
    }
    crc
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Reading {
        Reading {
            clock_us: 0x1234_5678_9abc,
            frame: 0xdead_beef,
            key: 30,
            key_presses: 65535,
            buttons: 5,
            pointer: (1279, 719),
        }
    }

    #[test]
    fn what_is_drawn_is_read_back_and_the_clock_is_cut_to_48_bits() {
        let long = Reading { clock_us: 0xffff_0000_0000_0001, ..example() };
        assert_eq!(Reading::from_words(&long.words()).map(|reading| reading.clock_us), Some(1));
        for reading in [example(), Reading::default()] {
            let words = reading.words();
            assert_eq!(Reading::from_words(&words), Some(reading));
            let luma = |x: usize, y: usize| if cell(words[y / CELL], x / CELL) { 200 } else { 40 };
            assert_eq!(Reading::from_luma(luma), Some(reading));
        }
    }

    #[test]
    fn a_single_wrong_cell_and_blank_pictures_are_not_read() {
        let words = example().words();
        for row in 0..ROWS {
            for bit in 0..32 {
                let mut wrong = words;
                wrong[row] ^= 1 << bit;
                assert_eq!(Reading::from_words(&wrong), None, "row {row} bit {bit}");
            }
        }
        assert_eq!(Reading::from_luma(|_, _| 0), None);
        assert_eq!(Reading::from_luma(|_, _| 255), None);
    }

    #[test]
    fn the_checksum_is_the_published_one() {
        assert_eq!(crc16(b"123456789".iter().copied()), 0x29b1);
    }
}
