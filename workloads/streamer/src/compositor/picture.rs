//! Pictures for the encoder: I420 planes, the rows that have to be converted again, and the pool they come from.
//!
//! A picture goes back to its pool when its last owner drops it, from whatever thread. The pool never holds more
//! than [`POOL`] pictures, so an encoder that falls behind costs frames, never memory. A recycled picture still
//! shows what it showed when it was written last; [`History`] knows which rows changed since, and only those are
//! converted. Nothing here knows Wayland.

use std::{
    collections::VecDeque,
    fmt,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use yuv::{BufferStoreMut, YuvConversionMode, YuvPlanarImageMut, YuvRange, YuvStandardMatrix};

/// Most pictures in flight: one being converted, one being encoded, one waiting, one spare.
pub const POOL: usize = 4;

/// Remembered frames of damage; a picture older than this is converted whole.
const REMEMBERED: usize = 16;

/// More separate row ranges than this are merged: every range has a fixed cost.
const RANGES: usize = 8;

/// One picture: I420, BT.709, limited range; planes Y, U, V lie one after the other without padding.
pub struct Picture {
    width: u32,
    height: u32,
    planes: Vec<u8>,
    /// Sequence number of the frame that these planes show; 0: none yet.
    written: u64,
    home: Option<Arc<Shared>>,
}

impl Picture {
    /// A black picture that belongs to no pool.
    ///
    /// # Panics
    /// When `width` or `height` is odd or zero: 4:2:0 has no such pictures.
    pub fn black(width: u32, height: u32) -> Self {
        Self { width, height, planes: black(width, height), written: 0, home: None }
    }

    /// Width in pixels, even.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Height in pixels, even.
    pub fn height(&self) -> u32 {
        self.height
    }

    /// The three planes, one after the other.
    pub fn planes(&self) -> &[u8] {
        &self.planes
    }

    /// Luma, `width` bytes a row.
    pub fn y(&self) -> &[u8] {
        &self.planes[..self.luma()]
    }

    /// First chroma plane, `width / 2` bytes a row.
    pub fn u(&self) -> &[u8] {
        &self.planes[self.luma()..self.luma() + self.luma() / 4]
    }

    /// Second chroma plane, `width / 2` bytes a row.
    pub fn v(&self) -> &[u8] {
        &self.planes[self.luma() + self.luma() / 4..]
    }

    /// Writes over the whole picture, for tests and synthetic sources.
    pub fn planes_mut(&mut self) -> &mut [u8] {
        &mut self.planes
    }

    /// Sequence number of the frame shown; 0: none yet.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Converts `rows` of a BGRX image of the same size into this picture and marks it as showing frame `sequence`.
    ///
    /// `stride` is the number of bytes a row of `source`.
    ///
    /// # Errors
    /// When `source` is smaller than the picture.
    pub fn convert(
        &mut self,
        sequence: u64,
        source: &[u8],
        stride: u32,
        rows: &Rows,
    ) -> Result<(), yuv::YuvError> {
        let (width, luma) = (self.width as usize, self.luma());
        let (y, chroma) = self.planes.split_at_mut(luma);
        let (u, v) = chroma.split_at_mut(luma / 4);
        for range in rows.iter() {
            let (start, end) = (range.start as usize, range.end as usize);
            let half = start / 2 * (width / 2)..end / 2 * (width / 2);
            let mut part = YuvPlanarImageMut {
                y_plane: BufferStoreMut::Borrowed(&mut y[start * width..end * width]),
                y_stride: self.width,
                u_plane: BufferStoreMut::Borrowed(&mut u[half.clone()]),
                u_stride: self.width / 2,
                v_plane: BufferStoreMut::Borrowed(&mut v[half]),
                v_stride: self.width / 2,
                width: self.width,
                height: range.end - range.start,
            };
            let part_of_source = source.get(start * stride as usize..).unwrap_or_default();
            yuv::bgra_to_yuv420(
                &mut part,
                part_of_source,
                stride,
                YuvRange::Limited,
                YuvStandardMatrix::Bt709,
                YuvConversionMode::Fast,
            )?;
        }
        self.written = sequence;
        Ok(())
    }

    fn luma(&self) -> usize {
        self.width as usize * self.height as usize
    }
}

impl Drop for Picture {
    fn drop(&mut self) {
        if let Some(home) = self.home.take() {
            home.give_back((self.width, self.height), std::mem::take(&mut self.planes), self.written);
        }
    }
}

impl fmt::Debug for Picture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Picture({}x{}, frame {})", self.width, self.height, self.written)
    }
}

fn black(width: u32, height: u32) -> Vec<u8> {
    assert!(
        width > 0 && height > 0 && width.is_multiple_of(2) && height.is_multiple_of(2),
        "a 4:2:0 picture of {width}x{height} is impossible"
    );
    let luma = width as usize * height as usize;
    let mut planes = vec![16; luma + luma / 2];
    planes[luma..].fill(128);
    planes
}

/// Lends pictures of one size.
pub struct Pool(Arc<Shared>);

struct Shared {
    size: (u32, u32),
    state: Mutex<PoolState>,
    wake: Box<dyn Fn() + Send + Sync>,
}

#[derive(Default)]
struct PoolState {
    /// Planes that nobody uses, with the frame they show.
    free: Vec<(Vec<u8>, u64)>,
    lent: usize,
    /// Somebody asked in vain: the next picture that comes back wakes them.
    asked: bool,
}

impl Pool {
    /// A pool of pictures of `width` x `height` (both even). `wake` is called, from any thread, when a picture comes
    /// back after [`Pool::take`] returned none.
    pub fn new(width: u32, height: u32, wake: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Arc::new(Shared {
            size: (width, height),
            state: Mutex::new(PoolState::default()),
            wake: Box::new(wake),
        }))
    }

    /// The free picture that was written last, so that least of it has to be converted; `None` while all are in use.
    pub fn take(&self) -> Option<Picture> {
        let (width, height) = self.0.size;
        let mut state = self.0.lock();
        let newest = (0..state.free.len()).max_by_key(|&at| state.free[at].1);
        let (planes, written) = match newest {
            Some(at) => state.free.swap_remove(at),
            None if state.lent < POOL => (black(width, height), 0),
            None => {
                state.asked = true;
                return None;
            }
        };
        state.lent += 1;
        Some(Picture { width, height, planes, written, home: Some(Arc::clone(&self.0)) })
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, PoolState> {
        // Every change below is complete before anything could panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn give_back(&self, size: (u32, u32), planes: Vec<u8>, written: u64) {
        debug_assert_eq!(size, self.size, "a picture returns to the pool it came from");
        let asked = {
            let mut state = self.lock();
            state.lent -= 1;
            state.free.push((planes, written));
            std::mem::take(&mut state.asked)
        };
        if asked {
            (self.wake)();
        }
    }
}

/// Row ranges of a picture, each starting and ending on an even row, sorted, apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rows(Vec<Range<u32>>);

impl Rows {
    /// All rows of a picture of `height`.
    pub fn all(height: u32) -> Self {
        let mut rows = Self::default();
        rows.add(0..height, height);
        rows
    }

    /// Adds `range`, widened to even rows and cut to `height` (even).
    pub fn add(&mut self, range: Range<u32>, height: u32) {
        let mut new = range.start / 2 * 2..range.end.div_ceil(2).saturating_mul(2).min(height);
        if range.is_empty() || new.is_empty() {
            return;
        }
        self.0.retain(|old| {
            let apart = old.end < new.start || new.end < old.start;
            if !apart {
                new = old.start.min(new.start)..old.end.max(new.end);
            }
            apart
        });
        let at = self.0.partition_point(|old| old.start < new.start);
        self.0.insert(at, new);
        while self.0.len() > RANGES {
            // Merge the two neighbours with the smallest gap between them.
            let at = (1..self.0.len())
                .min_by_key(|&at| self.0[at].start - self.0[at - 1].end)
                .expect("there are more than two ranges");
            self.0[at - 1].end = self.0[at].end;
            self.0.remove(at);
        }
    }

    /// Adds all of `other`, rows of a picture of the same `height`.
    pub fn merge(&mut self, other: &Rows, height: u32) {
        for range in &other.0 {
            self.add(range.clone(), height);
        }
    }

    /// The ranges, in order.
    pub fn iter(&self) -> impl Iterator<Item = Range<u32>> + '_ {
        self.0.iter().cloned()
    }
}

/// Which rows changed in which frame, as far back as it is worth knowing.
#[derive(Clone, Debug)]
pub struct History {
    height: u32,
    frames: VecDeque<(u64, Rows)>,
}

impl History {
    /// An empty history for pictures of `height`.
    pub fn new(height: u32) -> Self {
        Self { height, frames: VecDeque::with_capacity(REMEMBERED) }
    }

    /// Frame `sequence` (counted up by one) changed `rows`.
    pub fn record(&mut self, sequence: u64, rows: Rows) {
        if self.frames.len() == REMEMBERED {
            self.frames.pop_front();
        }
        self.frames.push_back((sequence, rows));
    }

    /// The rows in which a picture that shows frame `written` differs from the newest frame.
    pub fn since(&self, written: u64) -> Rows {
        let known = self.frames.front().is_some_and(|(oldest, _)| *oldest <= written + 1);
        if written == 0 || !known {
            return Rows::all(self.height);
        }
        let mut rows = Rows::default();
        for (_, changed) in self.frames.iter().filter(|(sequence, _)| *sequence > written) {
            rows.merge(changed, self.height);
        }
        rows
    }
}

#[cfg(test)]
// A list of one range is meant as such.
#[expect(clippy::single_range_in_vec_init)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn rows(ranges: &[Range<u32>]) -> Rows {
        let mut rows = Rows::default();
        for range in ranges {
            rows.add(range.clone(), 100);
        }
        rows
    }

    #[test]
    fn damage_becomes_even_sorted_separate_rows() {
        for (added, expected) in [
            (vec![], vec![]),
            (vec![3..4], vec![2..4]),
            (vec![3..3], vec![]),
            (vec![0..1000], vec![0..100]),
            (vec![98..u32::MAX], vec![98..100]),
            (vec![200..300], vec![]),
            (vec![20..30, 2..4], vec![2..4, 20..30]),
            (vec![2..4, 4..8], vec![2..8]),
            (vec![2..4, 10..12, 3..11], vec![2..12]),
        ] {
            assert_eq!(rows(&added).iter().collect::<Vec<_>>(), expected, "{added:?}");
        }
    }

    #[test]
    fn many_ranges_are_merged_where_the_gap_is_smallest() {
        let scattered: Vec<_> = (0..20).map(|n| n * 5..n * 5 + 2).collect();
        let merged = rows(&scattered);
        assert!(merged.0.len() <= RANGES);
        for range in scattered {
            assert!(merged.iter().any(|m| m.start <= range.start && m.end >= range.end), "{range:?} is lost");
        }
    }

    #[test]
    fn a_recycled_picture_needs_the_rows_of_the_frames_it_missed() {
        let mut history = History::new(100);
        assert_eq!(history.since(0), Rows::all(100));
        for sequence in 1..=3u64 {
            history.record(sequence, rows(&[sequence as u32 * 10..sequence as u32 * 10 + 2]));
        }
        assert_eq!(history.since(3), Rows::default());
        assert_eq!(history.since(2), rows(&[30..32]));
        assert_eq!(history.since(1), rows(&[20..22, 30..32]));
        assert_eq!(history.since(0), Rows::all(100), "a new picture has everything to learn");
        for sequence in 4..40 {
            history.record(sequence, rows(&[0..2]));
        }
        assert_eq!(history.since(3), Rows::all(100), "too long ago to know");
        assert_eq!(history.since(38), rows(&[0..2]));
    }

    #[test]
    fn the_pool_lends_a_few_pictures_and_says_when_one_is_back() {
        let woken = Arc::new(AtomicUsize::new(0));
        let pool = Pool::new(4, 2, {
            let woken = Arc::clone(&woken);
            move || {
                woken.fetch_add(1, Ordering::Relaxed);
            }
        });
        let mut lent: Vec<_> = (0..POOL).map(|_| pool.take().expect("still some")).collect();
        lent.pop();
        assert_eq!(woken.load(Ordering::Relaxed), 0, "nobody had asked");
        lent.push(pool.take().expect("one came back"));
        assert!(pool.take().is_none());
        assert!(pool.take().is_none());
        lent.clear();
        assert_eq!(woken.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn the_pool_prefers_the_picture_that_was_written_last() {
        let pool = Pool::new(4, 2, || ());
        let (mut old, mut new) = (pool.take().expect("first"), pool.take().expect("second"));
        old.written = 1;
        new.written = 2;
        drop(new);
        drop(old);
        assert_eq!(pool.take().expect("free").written(), 2);
    }

    #[test]
    fn a_picture_outlives_its_pool() {
        let pool = Pool::new(4, 2, || ());
        let picture = pool.take().expect("first");
        drop(pool);
        assert_eq!(picture.planes().len(), 12);
    }

    #[test]
    fn colours_are_bt709_limited_range() {
        // Values from ITU-R BT.709-6, items 3.4 and 3.5, for eight bits.
        for (name, bgr, expected) in [
            ("black", [0, 0, 0], (16, 128, 128)),
            ("white", [255, 255, 255], (235, 128, 128)),
            ("red", [0, 0, 255], (63, 102, 240)),
            ("green", [0, 255, 0], (173, 42, 26)),
            ("blue", [255, 0, 0], (32, 240, 118)),
        ] {
            let (width, height) = (32, 4);
            let source: Vec<u8> = (0..width * height).flat_map(|_| [bgr[0], bgr[1], bgr[2], 0]).collect();
            let mut picture = Picture::black(width, height);
            picture.convert(1, &source, width * 4, &Rows::all(height)).expect("sizes match");
            let got = (picture.y()[40], picture.u()[20], picture.v()[20]);
            for (got, want) in [(got.0, expected.0), (got.1, expected.1), (got.2, expected.2)] {
                assert!(u8::abs_diff(got, want) <= 3, "{name}: {got} instead of {want}");
            }
        }
    }

    #[test]
    fn only_the_given_rows_are_converted() {
        let (width, height) = (16, 8);
        let source = vec![255; (width * height * 4) as usize];
        let mut picture = Picture::black(width, height);
        let mut rows = Rows::default();
        rows.add(2..4, height);
        picture.convert(7, &source, width * 4, &rows).expect("sizes match");
        let bright: Vec<_> = picture.y().chunks(width as usize).map(|row| row[0] > 200).collect();
        assert_eq!(bright, [false, false, true, true, false, false, false, false]);
        assert_eq!(picture.written(), 7);
    }

    #[test]
    fn a_short_source_is_an_error() {
        let mut picture = Picture::black(16, 8);
        assert!(picture.convert(1, &[0; 100], 64, &Rows::all(8)).is_err());
        let mut rows = Rows::default();
        rows.add(6..8, 8);
        assert!(picture.convert(1, &[0; 100], 64, &rows).is_err());
    }
}
