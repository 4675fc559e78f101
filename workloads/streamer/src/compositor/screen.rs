//! The output's pixels: rendering of what changed with pixman, and conversion of the changed rows for the encoder.
//!
//! The image is kept from frame to frame, so only damage is drawn. Conversion reads the image's memory directly.

use std::sync::Arc;

use smithay::{
    backend::{
        allocator::Fourcc,
        renderer::{
            Bind, Color32F, Offscreen,
            damage::OutputDamageTracker,
            element::surface::WaylandSurfaceRenderElement,
            pixman::{PixmanError, PixmanRenderer},
        },
    },
    reexports::pixman::Image,
    utils::{Logical, Size, Transform},
};

use super::{
    layout::Rect,
    picture::{History, Picture, Pool, Rows},
};

/// One render element of a window, popup or subsurface.
pub type Element = WaylandSurfaceRenderElement<PixmanRenderer>;

/// Where nothing is drawn.
const BACKGROUND: Color32F = Color32F::BLACK;

/// What one rendering brought.
pub struct Rendered {
    /// The picture of the whole output.
    pub picture: Arc<Picture>,
    /// What changed since the last one; never empty.
    pub damage: Vec<Rect>,
    /// Counts delivered pictures, from 1.
    pub sequence: u64,
}

/// Why there is no picture.
#[derive(Debug, thiserror::Error)]
pub enum RenderError {
    #[error("drawing the windows")]
    Draw(#[source] smithay::backend::renderer::damage::Error<PixmanError>),
    #[error("binding the output's image")]
    Bind(#[source] PixmanError),
    #[error("converting the output's image")]
    Convert(#[source] yuv::YuvError),
}

/// The image of the output and everything that has its size.
pub struct Screen {
    size: Size<i32, Logical>,
    image: Image<'static, 'static>,
    tracker: OutputDamageTracker,
    pool: Pool,
    history: History,
    sequence: u64,
    /// The next picture is delivered whole even if nothing changed.
    whole: bool,
}

impl Screen {
    /// A black screen of `size` (even). Numbers of frames go on from `sequence`. `wake` is called when a picture is
    /// free again after [`Screen::picture`] found none.
    ///
    /// # Errors
    /// When there is no memory for the image.
    pub fn new(
        renderer: &mut PixmanRenderer,
        size: Size<i32, Logical>,
        sequence: u64,
        wake: impl Fn() + Send + Sync + 'static,
    ) -> Result<Self, PixmanError> {
        let image = renderer.create_buffer(Fourcc::Xrgb8888, (size.w, size.h).into())?;
        Ok(Self {
            size,
            image,
            tracker: tracker(size),
            pool: Pool::new(size.w as u32, size.h as u32, wake),
            history: History::new(size.h as u32),
            sequence,
            whole: true,
        })
    }

    /// Number of the last delivered picture; 0: none yet.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The next picture is delivered even if nothing changes, marked as changed everywhere.
    pub fn deliver_whole(&mut self) {
        self.whole = true;
    }

    /// A picture to render into; `None` while the encoder holds them all.
    pub fn picture(&self) -> Option<Picture> {
        self.pool.take()
    }

    /// Draws what changed in `elements` (front to back) and converts it; `None` when nothing visible changed.
    ///
    /// # Errors
    /// When a client's memory cannot be read or the image cannot be used; the next call draws everything.
    pub fn render(
        &mut self,
        renderer: &mut PixmanRenderer,
        elements: &[Element],
        mut picture: Picture,
    ) -> Result<Option<Rendered>, RenderError> {
        let drawn = {
            let mut target = renderer.bind(&mut self.image).map_err(RenderError::Bind)?;
            // The image still holds the last frame.
            self.tracker.render_output(renderer, &mut target, 1, elements, BACKGROUND).map(|drawn| {
                let damage = drawn.damage.into_iter().flatten();
                damage.filter_map(|rectangle| Rect::on_output(*rectangle, self.size)).collect::<Vec<_>>()
            })
        };
        let mut damage = drawn.map_err(|error| {
            // What of the damage was drawn is unknown now.
            self.tracker = tracker(self.size);
            RenderError::Draw(error)
        })?;
        if damage.is_empty() && !self.whole {
            return Ok(None);
        }
        let (width, height) = (self.size.w as u32, self.size.h as u32);
        let mut changed = Rows::default();
        for rect in &damage {
            changed.add(rect.y..rect.y + rect.height, height);
        }
        self.sequence += 1;
        self.history.record(self.sequence, changed);
        if std::mem::take(&mut self.whole) {
            damage = vec![Rect { x: 0, y: 0, width, height }];
        }

        let rows = self.history.since(picture.written());
        let stride = self.image.stride();
        // SAFETY: pixman allocated `stride` bytes for each of `height` rows for this image, which lives as long as
        // `self` and is only written through `&mut self`, so nothing writes while this slice exists.
        let pixels = unsafe {
            std::slice::from_raw_parts(
                self.image.data().cast_const().cast::<u8>(),
                stride * self.image.height(),
            )
        };
        picture.convert(self.sequence, pixels, stride as u32, &rows).map_err(RenderError::Convert)?;
        Ok(Some(Rendered { picture: Arc::new(picture), damage, sequence: self.sequence }))
    }
}

fn tracker(size: Size<i32, Logical>) -> OutputDamageTracker {
    OutputDamageTracker::new((size.w, size.h), 1.0, Transform::Normal)
}
