//! When to draw, as seen from the viewer's display: frames that come just before its refresh are shown at once, others
//! wait up to a whole interval. The client reports how long pictures waited; this value says how to move the frame
//! grid of the compositor. Pure: the media thread brings reports and carries the answers.

use std::time::{Duration, Instant};

/// What the latest frames should wait: room for the jitter of drawing, encoding and the path.
const MARGIN_MS: f64 = 3.0;
/// Smaller errors are left alone.
const TOLERANCE_MS: f64 = 1.2;
/// Waits that spread more than this do not have one phase: the rates differ, or the application draws as it likes.
const SPREAD_MS: f64 = 7.0;
/// A frame that waits less than this may as well have missed its refresh.
const EDGE_MS: f64 = 2.0;
/// Reports this soon after a move still tell of the time before it.
const SETTLES: Duration = Duration::from_millis(900);

/// Keeps the frame grid in step with one client's display.
#[derive(Clone, Copy, Debug, Default)]
pub struct Phase {
    moved: Option<Instant>,
}

impl Phase {
    /// Takes a report: how many milliseconds pictures waited for the display, as the 10th, 50th and 90th percentile.
    /// Tells by how many milliseconds to move the grid of frames that are `interval` apart; later is positive.
    pub fn shown(&mut self, now: Instant, [low, mid, high]: [f64; 3], interval: Duration) -> Option<f64> {
        let interval_ms = interval.as_secs_f64() * 1e3;
        // Outside input: anything may be in it.
        if !(low >= 0.0 && low <= mid && mid <= high && high <= 3.0 * interval_ms) {
            return None;
        }
        if self.moved.is_some_and(|moved| now.saturating_duration_since(moved) < SETTLES) {
            return None;
        }
        let split = low < EDGE_MS && high > interval_ms - 2.0 * EDGE_MS;
        let by = if high - low <= SPREAD_MS {
            low - MARGIN_MS
        } else if split && (mid < SPREAD_MS || mid > interval_ms - SPREAD_MS) {
            // Some just make it and some just do not.
            -MARGIN_MS
        } else {
            return None;
        };
        if by.abs() < TOLERANCE_MS {
            return None;
        }
        self.moved = Some(now);
        Some(by)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAME: Duration = Duration::from_nanos(16_666_667);

    #[test]
    fn the_grid_moves_until_frames_come_just_in_time() {
        let start = Instant::now();
        // Any phase, a display of nearly the same rate, and a path with some jitter.
        for first in 0..17 {
            let (mut phase, mut wait) = (Phase::default(), f64::from(first));
            let mut moves = 0;
            for report in 0..60 {
                let at = start + Duration::from_millis(500) * report;
                wait = (wait - 0.02).rem_euclid(16.67);
                let around = |by: f64| (wait + by).rem_euclid(16.67);
                let mut waits = [around(-0.8), around(0.0), around(0.8)];
                waits.sort_by(f64::total_cmp);
                if let Some(by) = phase.shown(at, waits, FRAME) {
                    moves += 1;
                    wait = (wait - by).rem_euclid(16.67);
                }
            }
            assert!((1.5..=7.0).contains(&wait), "from {first}: {wait}");
            assert!(moves <= 4, "from {first}: {moves} moves");
        }
    }

    #[test]
    fn what_has_no_phase_is_left_alone() {
        let now = Instant::now();
        for waits in [
            [0.5, 8.0, 16.0],
            [1.0, 6.0, 9.0],
            [f64::NAN, 1.0, 1.0],
            [-1.0, 0.0, 1.0],
            [9.0, 8.0, 7.0],
            [1e9, 1e9, 1e9],
            [3.0, 3.5, 4.0],
        ] {
            assert_eq!(Phase::default().shown(now, waits, FRAME), None, "{waits:?}");
        }
    }

    #[test]
    fn a_move_is_judged_by_later_reports_only() {
        let now = Instant::now();
        let mut phase = Phase::default();
        assert_eq!(phase.shown(now, [13.5, 14.0, 14.5], FRAME), Some(10.5));
        assert_eq!(phase.shown(now + Duration::from_millis(500), [10.0, 12.0, 14.0], FRAME), None);
        assert_eq!(phase.shown(now + Duration::from_secs(1), [3.0, 3.5, 4.5], FRAME), None);
        assert_eq!(phase.shown(now + Duration::from_secs(2), [0.5, 1.0, 1.5], FRAME), Some(-2.5));
    }
}
