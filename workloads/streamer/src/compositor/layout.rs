//! Where windows go: a kiosk. Main windows fill the output; dialogs and windows of a fixed size are centred.
//!
//! Pure geometry in pixels; who is a main window is decided by what a client told about it.

use smithay::utils::{Logical, Point, Rectangle, Size};

/// Smallest and largest side of an output in pixels.
pub const SIDES: std::ops::RangeInclusive<u32> = 16..=8192;

/// An output size that can be encoded: within [`SIDES`] and even, odd sizes rounded up.
pub fn output_size(width: u32, height: u32) -> Size<i32, Logical> {
    let side = |side: u32| side.clamp(*SIDES.start(), *SIDES.end()).next_multiple_of(2) as i32;
    Size::from((side(width), side(height)))
}

/// How a window is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Takes the whole output.
    Fill,
    /// Keeps its own size, in the middle.
    Float,
}

/// What a client said about a window.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hints {
    /// It belongs to another window.
    pub has_parent: bool,
    /// It called itself a dialog, splash screen or the like.
    pub dialog: bool,
    /// Smallest size it accepts; 0: any.
    pub min: Size<i32, Logical>,
    /// Largest size it accepts; 0: any.
    pub max: Size<i32, Logical>,
}

/// How a window with these hints is shown on an output of size `output`.
pub fn role(hints: &Hints, output: Size<i32, Logical>) -> Role {
    let fixed = |min: i32, max: i32, full: i32| max > 0 && min == max && max < full;
    let fixed_size = fixed(hints.min.w, hints.max.w, output.w) && fixed(hints.min.h, hints.max.h, output.h);
    if hints.has_parent || hints.dialog || fixed_size { Role::Float } else { Role::Fill }
}

/// Where the top left corner of a window of `size` goes. What fits is centred; of what does not, the top left part
/// is shown.
pub fn place(size: Size<i32, Logical>, output: Size<i32, Logical>) -> Point<i32, Logical> {
    let centre = |size: i32, full: i32| (full.saturating_sub(size.max(0)) / 2).max(0);
    Point::from((centre(size.w, output.w), centre(size.h, output.h)))
}

/// The position nearest to `wanted` at which a window of `size` is wholly on the output, if it fits.
pub fn keep_on_output(
    wanted: Point<i32, Logical>,
    size: Size<i32, Logical>,
    output: Size<i32, Logical>,
) -> Point<i32, Logical> {
    let keep = |wanted: i32, size: i32, full: i32| wanted.clamp(0, full.saturating_sub(size.max(0)).max(0));
    Point::from((keep(wanted.x, size.w, output.w), keep(wanted.y, size.h, output.h)))
}

/// The size of a floating window that asked for `wanted`: not larger than the output, not empty.
pub fn float_size(wanted: Size<i32, Logical>, output: Size<i32, Logical>) -> Size<i32, Logical> {
    Size::from((wanted.w.clamp(1, output.w), wanted.h.clamp(1, output.h)))
}

/// The nearest position on the output: [0, size - 1] in both directions. What is not a number becomes 0.
pub fn clamp_to_output(point: Point<f64, Logical>, output: Size<i32, Logical>) -> Point<f64, Logical> {
    let clamp =
        |value: f64, full: i32| if value.is_nan() { 0.0 } else { value.clamp(0.0, f64::from(full - 1)) };
    Point::from((clamp(point.x, output.w), clamp(point.y, output.h)))
}

/// A rectangle of pixels inside the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rect {
    /// Left edge.
    pub x: u32,
    /// Upper edge.
    pub y: u32,
    /// Width, at least 1.
    pub width: u32,
    /// Height, at least 1.
    pub height: u32,
}

impl Rect {
    /// The part of `rectangle` that lies on an output of `size`; `None` when nothing does.
    pub fn on_output<Kind>(rectangle: Rectangle<i32, Kind>, size: Size<i32, Logical>) -> Option<Self> {
        let edge = |loc: i32, side: i32, full: i32| {
            let start = loc.clamp(0, full);
            (start, loc.saturating_add(side.max(0)).clamp(start, full))
        };
        let (left, right) = edge(rectangle.loc.x, rectangle.size.w, size.w);
        let (top, bottom) = edge(rectangle.loc.y, rectangle.size.h, size.h);
        (left < right && top < bottom).then(|| Self {
            x: left as u32,
            y: top as u32,
            width: (right - left) as u32,
            height: (bottom - top) as u32,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(w: i32, h: i32) -> Size<i32, Logical> {
        Size::from((w, h))
    }

    const OUTPUT: (i32, i32) = (1280, 720);

    #[test]
    fn output_sizes_are_even_and_bounded() {
        for ((width, height), expected) in [
            ((1280, 720), (1280, 720)),
            ((1279, 719), (1280, 720)),
            ((0, 1), (16, 16)),
            ((u32::MAX, 8191), (8192, 8192)),
        ] {
            assert_eq!(output_size(width, height), size(expected.0, expected.1));
        }
    }

    #[test]
    fn main_windows_fill_and_the_others_float() {
        let any = Hints::default();
        for (name, hints, expected) in [
            ("main window", any, Role::Fill),
            ("child", Hints { has_parent: true, ..any }, Role::Float),
            ("dialog", Hints { dialog: true, ..any }, Role::Float),
            ("fixed", Hints { min: size(300, 200), max: size(300, 200), ..any }, Role::Float),
            ("fixed in one direction", Hints { min: size(300, 0), max: size(300, 0), ..any }, Role::Fill),
            ("fixed at full size", Hints { min: size(1280, 720), max: size(1280, 720), ..any }, Role::Fill),
            ("fixed and larger", Hints { min: size(4000, 4000), max: size(4000, 4000), ..any }, Role::Fill),
            ("only a smallest size", Hints { min: size(300, 200), ..any }, Role::Fill),
            ("nonsense", Hints { min: size(-1, -1), max: size(-1, -1), ..any }, Role::Fill),
        ] {
            assert_eq!(role(&hints, OUTPUT.into()), expected, "{name}");
        }
    }

    #[test]
    fn windows_are_centred_or_shown_from_their_corner() {
        for (window, expected) in [
            ((1280, 720), (0, 0)),
            ((280, 120), (500, 300)),
            ((2000, 100), (0, 310)),
            ((i32::MAX, i32::MAX), (0, 0)),
            ((0, -5), (640, 360)),
        ] {
            assert_eq!(place(window.into(), OUTPUT.into()), Point::from(expected), "{window:?}");
        }
    }

    #[test]
    fn tool_windows_stay_on_the_output() {
        for (wanted, window, expected) in [
            ((100, 50), (200, 100), (100, 50)),
            ((-5, 700), (200, 100), (0, 620)),
            ((i32::MAX, i32::MIN), (200, 100), (1080, 0)),
            ((30, 30), (5000, i32::MAX), (0, 0)),
        ] {
            let kept = keep_on_output(wanted.into(), window.into(), OUTPUT.into());
            assert_eq!(kept, Point::from(expected), "{wanted:?}");
        }
    }

    #[test]
    fn positions_are_brought_onto_the_output() {
        for ((x, y), expected) in [
            ((5.5, 7.25), (5.5, 7.25)),
            ((1280.0, 720.0), (1279.0, 719.0)),
            ((-3.0, 1e300), (0.0, 719.0)),
            ((f64::NAN, f64::INFINITY), (0.0, 719.0)),
        ] {
            assert_eq!(clamp_to_output(Point::from((x, y)), OUTPUT.into()), Point::from(expected));
        }
    }

    #[test]
    fn damage_is_cut_to_the_output() {
        for (rectangle, expected) in [
            ((0, 0, 1280, 720), Some((0, 0, 1280, 720))),
            ((-10, -10, 20, 20), Some((0, 0, 10, 10))),
            ((1270, 700, i32::MAX, i32::MAX), Some((1270, 700, 10, 20))),
            ((1280, 0, 5, 5), None),
            ((5, 5, 0, 9), None),
            ((i32::MIN, 0, 5, 5), None),
        ] {
            let (x, y, w, h) = rectangle;
            let rectangle: Rectangle<i32, Logical> =
                Rectangle { loc: Point::from((x, y)), size: Size::from((w, h)) };
            let expected = expected.map(|(x, y, width, height)| Rect { x, y, width, height });
            assert_eq!(Rect::on_output(rectangle, OUTPUT.into()), expected, "{rectangle:?}");
        }
    }
}
