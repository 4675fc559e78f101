//! A pattern with the time in its pixels: whoever decodes the stream reads from the barcode in the corner
//! when the frame was drawn, which one it is, and the last input that had arrived. The rest of the picture
//! moves as told. See [`fanlight_test_apps::barcode`] for the layout.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use fanlight_test_apps::{
    barcode::{self, Reading},
    canvas::{Canvas, Page, Rect},
    sound,
    window::{self, Drawing, Input, Pace},
};

const USAGE: &str =
    "usage: fanlight-pattern [--moving full|desk|none] [--static | --on-input | --fps N] [--tone HERTZ]
  --moving full   the whole picture pans over dense detail
  --moving desk   a scrolling page and a small moving picture (default)
  --moving none   only the barcode changes
  --static        draw once for every size, then never again
  --on-input      draw after input only
  --fps N         draw N times a second by an own clock instead of whenever the compositor asks
  --tone HERTZ    play a sine";

/// What moves besides the barcode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moving {
    Full,
    Desk,
    None,
}

struct Options {
    moving: Moving,
    pace: Pace,
    tone: Option<f64>,
}

fn options(mut arguments: impl Iterator<Item = String>) -> Result<Option<Options>> {
    let mut options = Options { moving: Moving::Desk, pace: Pace::Callback, tone: None };
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().with_context(|| format!("{argument} needs a value\n{USAGE}"));
        match argument.as_str() {
            "--moving" => {
                options.moving = match value()?.as_str() {
                    "full" => Moving::Full,
                    "desk" => Moving::Desk,
                    "none" => Moving::None,
                    other => bail!("--moving is {other:?}: full, desk and none are known\n{USAGE}"),
                }
            }
            "--static" => options.pace = Pace::Once,
            "--on-input" => options.pace = Pace::Input,
            "--fps" => options.pace = Pace::Rate(number(&value()?, 0.1, 1000.0)?),
            "--tone" => options.tone = Some(number(&value()?, 20.0, 20_000.0)?),
            "--help" => return Ok(None),
            other => bail!("unknown argument {other:?}\n{USAGE}"),
        }
    }
    Ok(Some(options))
}

fn number(text: &str, low: f64, high: f64) -> Result<f64> {
    let value = text.parse::<f64>().with_context(|| format!("{text:?} is not a number"))?;
    if !(low..=high).contains(&value) {
        bail!("{value} is not between {low} and {high}");
    }
    Ok(value)
}

fn main() -> Result<()> {
    let Some(options) = options(std::env::args().skip(1))? else {
        println!("{USAGE}");
        return Ok(());
    };
    if let Some(hertz) = options.tone {
        sound::play("fanlight-pattern", sound::tone(hertz));
    }
    window::run("fanlight-pattern", Pattern::new(options.moving), options.pace)
}

/// Gap between the barcode and what moves, in pixels.
const GAP: usize = 16;
const PAPER: u32 = 0x00f4_f1e8;
const DESK: u32 = 0x0024_3b4a;

struct Pattern {
    moving: Moving,
    reading: Reading,
    page: Option<(usize, usize, Page)>,
    waves: Vec<u8>,
}

impl Pattern {
    fn new(moving: Moving) -> Self {
        let waves = (0..1024)
            .map(|index| ((f64::from(index) * std::f64::consts::TAU / 1024.0).sin() * 63.0 + 64.0) as u8)
            .collect();
        Self { moving, reading: Reading::default(), page: None, waves }
    }

    /// The page that belongs to this size of picture.
    fn page(&mut self, width: usize, height: usize) -> &Page {
        let fits = matches!(&self.page, Some((w, h, _)) if (*w, *h) == (width, height));
        if !fits {
            let page = match self.moving {
                // Wider and higher than the picture, so that the repetition is not on the screen twice.
                Moving::Full => Page::new(width + 257, height + 131, 0x0020_2830, None, 7),
                Moving::Desk | Moving::None => Page::new(width, height + 62, PAPER, Some(0x0020_2020), 7),
            };
            self.page = Some((width, height, page));
        }
        match &self.page {
            Some((_, _, page)) => page,
            None => unreachable!("the page was made above"),
        }
    }

    fn draw_desk(&mut self, canvas: &mut Canvas<'_>, top: usize) -> Vec<Rect> {
        let frame = self.reading.frame as usize;
        let (width, height) = (canvas.width, canvas.height);
        if canvas.fresh {
            let all = canvas.all();
            canvas.fill(all, DESK);
        }
        let text =
            Rect { x: GAP, y: top, width: width / 2 - 2 * GAP, height: height.saturating_sub(top + GAP) };
        let video = Rect { x: width / 2, y: top, width: 640, height: 360 }.clipped(width, height);
        self.page(text.width.max(32), height).show(canvas, text, 0, frame * 2);
        for row in 0..video.height {
            let wave = |index: usize| self.waves[index & 1023];
            let down = u32::from(wave(row * 3 + frame * 7));
            let target = canvas.span(video.x, video.y + row, video.width);
            for (column, pixel) in target.iter_mut().enumerate() {
                let across = u32::from(wave(column * 2 + frame * 11));
                let both = u32::from(wave(column + row + frame * 5));
                *pixel = ((across + down) << 16) | ((down + both) << 8) | (across + both);
            }
        }
        let side = 64.min(video.width).min(video.height);
        let there_and_back = |at: usize, room: usize| {
            let room = room.max(1);
            if (at / room).is_multiple_of(2) { at % room } else { room - at % room }
        };
        let (x, y) =
            (there_and_back(frame * 5, video.width - side), there_and_back(frame * 3, video.height - side));
        canvas.fill(Rect { x: video.x + x, y: video.y + y, width: side, height: side }, 0x00ff_ffff);
        vec![text.clipped(width, height), video]
    }

    fn draw_full(&mut self, canvas: &mut Canvas<'_>, top: usize) -> Vec<Rect> {
        let frame = self.reading.frame as usize;
        let (width, height) = (canvas.width, canvas.height);
        if canvas.fresh {
            let all = canvas.all();
            canvas.fill(all, DESK);
        }
        let below = Rect { x: 0, y: top, width, height: height.saturating_sub(top) };
        self.page(width, height).show(canvas, below, frame * 5, frame * 3);
        vec![below.clipped(width, height)]
    }

    /// Draws the barcode with the time of now; last, so that the time is that of the commit.
    fn draw_barcode(&mut self, canvas: &mut Canvas<'_>) {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.reading.clock_us = since.as_micros() as u64;
        for (row, word) in self.reading.words().into_iter().enumerate() {
            for column in 0..barcode::COLUMNS {
                let colour = if barcode::cell(word, column) { 0x00ff_ffff } else { 0 };
                let (x, y) = (column * barcode::CELL, row * barcode::CELL);
                canvas.fill(Rect { x, y, width: barcode::CELL, height: barcode::CELL }, colour);
            }
        }
    }
}

impl Drawing for Pattern {
    fn draw(&mut self, canvas: &mut Canvas<'_>) -> Vec<Rect> {
        let readable = canvas.width >= barcode::WIDTH && canvas.height >= barcode::HEIGHT;
        let top = if readable { barcode::HEIGHT + GAP } else { 0 };
        let mut damage = match self.moving {
            Moving::Full => self.draw_full(canvas, top),
            Moving::Desk if canvas.width >= 4 * GAP => self.draw_desk(canvas, top),
            Moving::Desk | Moving::None => {
                if canvas.fresh {
                    let all = canvas.all();
                    let (width, height) = (canvas.width, canvas.height);
                    self.page(width, height).show(canvas, all, 0, 0);
                }
                Vec::new()
            }
        };
        if readable {
            damage.push(Rect { x: 0, y: 0, width: barcode::WIDTH, height: barcode::HEIGHT });
            self.draw_barcode(canvas);
        }
        if self.reading.frame == 0 {
            damage = vec![canvas.all()];
        }
        self.reading.frame = self.reading.frame.wrapping_add(1);
        damage
    }

    fn input(&mut self, input: Input) {
        match input {
            Input::Key { code, pressed: true } => {
                self.reading.key = code as u16;
                self.reading.key_presses = self.reading.key_presses.wrapping_add(1);
            }
            Input::Pointer { x, y } => {
                let pixel = |value: f64| value.clamp(0.0, 65535.0) as u16;
                self.reading.pointer = (pixel(x), pixel(y));
            }
            Input::Button { code, pressed } => {
                let Some(bit) = code.checked_sub(0x110).filter(|bit| *bit < 3) else { return };
                let mask = 1 << bit;
                self.reading.buttons =
                    if pressed { self.reading.buttons | mask } else { self.reading.buttons & !mask };
            }
            Input::Key { .. } | Input::Wheel(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pixels: &[u32], width: usize) -> Option<Reading> {
        Reading::from_luma(|x, y| (pixels[y * width + x] & 0xff) as u8)
    }

    #[test]
    fn every_kind_of_pattern_can_be_read_and_counts_its_frames() {
        for moving in [Moving::Full, Moving::Desk, Moving::None] {
            let mut pattern = Pattern::new(moving);
            let mut pixels = vec![0; 1280 * 720];
            for frame in 0..3 {
                pattern.input(Input::Key { code: 30 + frame, pressed: true });
                pattern.input(Input::Key { code: 99, pressed: false });
                pattern.input(Input::Pointer { x: 12.7, y: -5.0 });
                pattern.input(Input::Button { code: 0x110, pressed: frame == 1 });
                let fresh = frame == 0;
                let damage =
                    pattern.draw(&mut Canvas { pixels: &mut pixels, width: 1280, height: 720, fresh });
                assert!(damage.iter().all(|rect| rect.x + rect.width <= 1280 && rect.y + rect.height <= 720));
                let reading = read(&pixels, 1280).expect("a barcode was drawn");
                assert_eq!(
                    (reading.frame, reading.key, reading.key_presses),
                    (frame, 30 + frame as u16, frame as u16 + 1)
                );
                assert_eq!((reading.pointer, reading.buttons), ((12, 0), u16::from(frame == 1)));
            }
        }
    }

    #[test]
    fn odd_and_tiny_sizes_are_drawn_without_a_barcode() {
        for (width, height) in [(1, 1), (64, 64), (575, 95), (577, 97), (3840, 2160), (601, 113)] {
            for moving in [Moving::Full, Moving::Desk, Moving::None] {
                let mut pattern = Pattern::new(moving);
                let mut pixels = vec![0; width * height];
                for fresh in [true, false] {
                    let damage = pattern.draw(&mut Canvas { pixels: &mut pixels, width, height, fresh });
                    assert!(
                        damage
                            .iter()
                            .all(|rect| rect.x + rect.width <= width && rect.y + rect.height <= height)
                    );
                }
            }
        }
    }

    #[test]
    fn arguments_that_make_no_sense_are_refused_with_the_usage() {
        let parse = |text: &str| options(text.split_whitespace().map(str::to_owned));
        assert!(parse("--moving full --fps 30 --tone 440").is_ok());
        for bad in ["--moving", "--moving up", "--fps 0", "--fps x", "--tone 1", "--wat", "--fps nan"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
