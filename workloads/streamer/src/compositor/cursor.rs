//! The pointer's picture. It is never drawn into the frame: shape and hot spot go to the viewer, who draws it without
//! delay.

use smithay::{
    backend::renderer::utils::with_renderer_surface_state,
    input::pointer::{CursorIcon, CursorImageStatus, CursorImageSurfaceData},
    reexports::wayland_server::protocol::{wl_shm::Format, wl_surface::WlSurface},
    utils::{IsAlive, Logical, Point},
    wayland::{
        compositor::{SurfaceAttributes, with_states},
        shm::with_buffer_contents,
    },
};

/// Largest side of a cursor image in pixels; a larger one (which browsers refuse) is shown as the default arrow.
const LARGEST: i32 = 256;

/// How the pointer looks now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cursor {
    /// Not at all.
    Hidden,
    /// A shape by its CSS name, as in `cursor: pointer`.
    Named(&'static str),
    /// An image.
    Image(CursorImage),
}

/// The image of a pointer.
#[derive(Clone, PartialEq, Eq)]
pub struct CursorImage {
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// The pixel that points, from the left; inside the image.
    pub hotspot_x: u32,
    /// The pixel that points, from above; inside the image.
    pub hotspot_y: u32,
    /// Red, green, blue, alpha (not premultiplied), row by row.
    pub rgba: Vec<u8>,
}

impl std::fmt::Debug for CursorImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CursorImage({}x{} at {},{})", self.width, self.height, self.hotspot_x, self.hotspot_y)
    }
}

/// Follows what clients ask for and tells what is new.
#[derive(Debug)]
pub struct CursorTracker {
    status: CursorImageStatus,
    shown: Option<Cursor>,
}

impl CursorTracker {
    /// Starts with the default arrow, not told yet.
    pub fn new() -> Self {
        Self { status: CursorImageStatus::default_named(), shown: None }
    }

    /// The client under the pointer asked for `status`.
    pub fn set(&mut self, status: CursorImageStatus) {
        self.status = status;
    }

    /// The surface that is the pointer's image now.
    pub fn surface(&self) -> Option<&WlSurface> {
        match &self.status {
            CursorImageStatus::Surface(surface) => Some(surface),
            _ => None,
        }
    }

    /// The cursor, if it looks different from what the last call returned.
    pub fn changed(&mut self) -> Option<Cursor> {
        if self.surface().is_some_and(|surface| !surface.alive()) {
            self.status = CursorImageStatus::default_named();
        }
        let now = match &self.status {
            CursorImageStatus::Hidden => Cursor::Hidden,
            CursorImageStatus::Named(icon) => Cursor::Named(icon.name()),
            CursorImageStatus::Surface(surface) => read(surface),
        };
        (self.shown.as_ref() != Some(&now)).then(|| {
            self.shown = Some(now.clone());
            now
        })
    }
}

/// A cursor surface was committed with its content moved against the hot spot.
pub fn apply_offset(surface: &WlSurface) {
    with_states(surface, |states| {
        let delta = states.cached_state.get::<SurfaceAttributes>().current().buffer_delta.take();
        if let (Some(delta), Some(cursor)) = (delta, states.data_map.get::<CursorImageSurfaceData>())
            && let Ok(mut cursor) = cursor.lock()
        {
            cursor.hotspot -= delta;
        }
    });
}

fn read(surface: &WlSurface) -> Cursor {
    let hotspot = with_states(surface, |states| {
        let cursor = states.data_map.get::<CursorImageSurfaceData>().and_then(|cursor| cursor.lock().ok());
        cursor.map(|cursor| cursor.hotspot).unwrap_or_default()
    });
    let buffer = with_renderer_surface_state(surface, |state| {
        state.buffer().cloned().map(|buffer| (buffer, state.buffer_scale().max(1)))
    });
    let Some((buffer, scale)) = buffer.flatten() else { return Cursor::Hidden };
    let image = with_buffer_contents(&buffer, |start, length, buffer| {
        // SAFETY: smithay maps `length` bytes at `start` for the time of this call and turns a fault caused by a
        // client that shrinks its file into zeroes. The client may write meanwhile: bytes have no invalid values.
        let memory = unsafe { std::slice::from_raw_parts(start, length) };
        let alpha = match buffer.format {
            Format::Argb8888 => true,
            Format::Xrgb8888 => false,
            _ => return None,
        };
        let source = Source {
            offset: usize::try_from(buffer.offset).ok()?,
            width: buffer.width,
            height: buffer.height,
            stride: usize::try_from(buffer.stride).ok()?,
            alpha,
        };
        source.image(memory, Point::from((hotspot.x.saturating_mul(scale), hotspot.y.saturating_mul(scale))))
    });
    match image {
        Ok(Some(image)) if image.rgba.iter().skip(3).step_by(4).all(|alpha| *alpha == 0) => Cursor::Hidden,
        Ok(Some(image)) => Cursor::Image(image),
        // Single pixel buffers, odd formats, images too large: better an arrow than no pointer.
        _ => Cursor::Named(CursorIcon::Default.name()),
    }
}

/// An image in memory: four bytes a pixel, blue first.
struct Source {
    offset: usize,
    width: i32,
    height: i32,
    stride: usize,
    alpha: bool,
}

impl Source {
    fn image(&self, memory: &[u8], hotspot: Point<i32, Logical>) -> Option<CursorImage> {
        if !(1..=LARGEST).contains(&self.width) || !(1..=LARGEST).contains(&self.height) {
            return None;
        }
        let (width, height) = (self.width as usize, self.height as usize);
        let mut rgba = Vec::with_capacity(width * height * 4);
        for row in 0..height {
            let start = self.offset.checked_add(self.stride.checked_mul(row)?)?;
            let pixels = memory.get(start..start.checked_add(width * 4)?)?;
            for pixel in pixels.chunks_exact(4) {
                let alpha = if self.alpha { pixel[3] } else { 255 };
                let straight = |value: u8| match alpha {
                    0 => 0,
                    alpha => (u32::from(value) * 255 / u32::from(alpha)).min(255) as u8,
                };
                rgba.extend([straight(pixel[2]), straight(pixel[1]), straight(pixel[0]), alpha]);
            }
        }
        Some(CursorImage {
            width: self.width as u32,
            height: self.height as u32,
            hotspot_x: hotspot.x.clamp(0, self.width - 1) as u32,
            hotspot_y: hotspot.y.clamp(0, self.height - 1) as u32,
            rgba,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(width: i32, height: i32) -> Source {
        Source { offset: 0, width, height, stride: 8, alpha: true }
    }

    #[test]
    fn premultiplied_blue_first_becomes_straight_red_first() {
        let memory = [0, 0, 128, 128, 255, 255, 255, 255];
        let image = source(2, 1).image(&memory, Point::from((9, -3))).expect("fits");
        assert_eq!(image.rgba, [255, 0, 0, 128, 255, 255, 255, 255]);
        assert_eq!((image.hotspot_x, image.hotspot_y), (1, 0), "a hot spot outside is brought inside");
    }

    #[test]
    fn images_that_do_not_fit_are_refused() {
        let memory = [0; 16];
        for (name, source) in [
            ("empty", source(0, 1)),
            ("huge", source(i32::MAX, i32::MAX)),
            ("too many rows", source(2, 3)),
            ("beyond the memory", Source { offset: usize::MAX, ..source(2, 1) }),
            ("stride overflows", Source { stride: usize::MAX, ..source(2, 2) }),
        ] {
            assert!(source.image(&memory, Point::from((0, 0))).is_none(), "{name}");
        }
    }
}
