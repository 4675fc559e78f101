//! A picture in memory and the few ways in which the test applications paint on it.

/// A rectangle in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rect {
    /// Left edge.
    pub x: usize,
    /// Top edge.
    pub y: usize,
    /// Width.
    pub width: usize,
    /// Height.
    pub height: usize,
}

impl Rect {
    /// The part of the rectangle that lies in a picture of the given size.
    pub fn clipped(self, width: usize, height: usize) -> Self {
        let (x, y) = (self.x.min(width), self.y.min(height));
        Self { x, y, width: self.width.min(width - x), height: self.height.min(height - y) }
    }
}

/// Pixels in the order in which they are shown, 0x00RRGGBB each, without padding between rows.
pub struct Canvas<'a> {
    /// `width * height` pixels.
    pub pixels: &'a mut [u32],
    /// Width in pixels.
    pub width: usize,
    /// Height in pixels.
    pub height: usize,
    /// Nothing of an earlier frame is in this picture: everything has to be painted.
    pub fresh: bool,
}

impl Canvas<'_> {
    /// The whole picture.
    pub fn all(&self) -> Rect {
        Rect { x: 0, y: 0, width: self.width, height: self.height }
    }

    /// The visible part of a row, from `x` on.
    pub fn span(&mut self, x: usize, y: usize, width: usize) -> &mut [u32] {
        let start = y * self.width + x;
        &mut self.pixels[start..start + width]
    }

    /// Fills a rectangle; what lies outside the picture is left out.
    pub fn fill(&mut self, rect: Rect, colour: u32) {
        let rect = rect.clipped(self.width, self.height);
        for y in rect.y..rect.y + rect.height {
            self.span(rect.x, y, rect.width).fill(colour);
        }
    }
}

/// Small deterministic generator (xorshift), so that every run paints the same.
#[derive(Clone, Debug)]
pub struct Noise(u32);

impl Noise {
    /// `seed` must not be 0, from which xorshift never leaves.
    pub fn new(seed: u32) -> Self {
        Self(seed.max(1))
    }

    /// The next value.
    pub fn value(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 17;
        self.0 ^= self.0 << 5;
        self.0
    }
}

/// A page of invented writing: what scrolling text looks like to an encoder.
pub struct Page {
    pixels: Vec<u32>,
    width: usize,
    height: usize,
}

impl Page {
    /// Writes a page of the given size. `paper` and `ink` are colours; with `ink` `None` every word gets its own.
    pub fn new(width: usize, height: usize, paper: u32, ink: Option<u32>, seed: u32) -> Self {
        let mut noise = Noise::new(seed);
        let mut pixels = vec![paper; width * height];
        let (advance, line) = (9, 18);
        for top in (3..height.saturating_sub(line)).step_by(line) {
            let mut left = 12;
            while left + 12 < width {
                let letters = 2 + (noise.value() % 9) as usize;
                let colour = ink.unwrap_or_else(|| noise.value() & 0x00ff_ffff);
                for _ in 0..letters {
                    if left + 12 >= width {
                        break;
                    }
                    // A glyph is 3×5 dots of 2×2 pixels with a stem, which gives the strokes of real letters.
                    let dots = noise.value() | 0b001_001_001_001_001;
                    for dot in 0..15 {
                        if (dots >> dot) & 1 == 1 {
                            let (x, y) = (left + (dot % 3) * 2, top + (dot / 3) * 2);
                            for row in 0..2 {
                                let start = (y + row) * width + x;
                                pixels[start..start + 2].fill(colour);
                            }
                        }
                    }
                    left += advance;
                }
                left += advance;
            }
        }
        Self { pixels, width, height }
    }

    /// Shows the page, moved by (`dx`, `dy`) and repeated at its ends, in a rectangle of the canvas.
    pub fn show(&self, canvas: &mut Canvas<'_>, rect: Rect, dx: usize, dy: usize) {
        let rect = rect.clipped(canvas.width, canvas.height);
        let dx = dx % self.width;
        for row in 0..rect.height {
            let source = ((row + dy) % self.height) * self.width;
            let mut target = canvas.span(rect.x, rect.y + row, rect.width);
            let mut from = dx;
            while !target.is_empty() {
                let count = target.len().min(self.width - from);
                let (now, later) = target.split_at_mut(count);
                now.copy_from_slice(&self.pixels[source + from..source + from + count]);
                (target, from) = (later, 0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn painting_outside_the_picture_is_left_out() {
        let mut pixels = vec![0; 12];
        let mut canvas = Canvas { pixels: &mut pixels, width: 4, height: 3, fresh: true };
        canvas.fill(Rect { x: 3, y: 2, width: 10, height: 10 }, 7);
        canvas.fill(Rect { x: 9, y: 9, width: 1, height: 1 }, 9);
        assert_eq!(canvas.pixels.iter().sum::<u32>(), 7);
        assert_eq!(canvas.pixels[11], 7);
    }

    #[test]
    fn a_page_repeats_in_both_directions_and_moves_with_its_offset() {
        let page = Page::new(40, 40, 0, Some(1), 5);
        let mut pixels = vec![9; 100 * 90];
        let mut canvas = Canvas { pixels: &mut pixels, width: 100, height: 90, fresh: true };
        let all = canvas.all();
        page.show(&mut canvas, all, 3, 5);
        assert!(canvas.pixels.iter().all(|pixel| *pixel < 2) && canvas.pixels.contains(&1));
        for (x, y) in [(0, 0), (20, 30), (55, 45)] {
            assert_eq!(canvas.pixels[y * 100 + x], canvas.pixels[(y + 40) * 100 + x + 40]);
            assert_eq!(canvas.pixels[y * 100 + x], page.pixels[((y + 5) % 40) * 40 + (x + 3) % 40]);
        }
    }
}
