//! When to render and when to let clients draw: the pacing of the compositor as a plain value.
//!
//! Frames follow commits. A commit is rendered at once unless the session's rate would be exceeded; then it waits
//! for its turn and only the newest content is shown. Frame callbacks are handed out on a grid of one frame
//! interval, never before what was committed is on its way. A client that draws when it is called therefore draws
//! with input that is fresh, and its commit finds the renderer free: no waiting for a tick on either side.
//!
//! Without commits there is no deadline, so nothing wakes up. This module knows no surfaces and no timers; the
//! compositor's loop asks [`FrameClock::deadline`] and calls [`FrameClock::poll`].

use std::time::{Duration, Instant};

/// Pace of frame callbacks while nobody watches, or while the encoder holds every picture: enough for clients
/// that block on them to stay responsive.
const SLOW: Duration = Duration::from_secs(1);

/// So many frames that wait for their turn one after another are no accident.
const EVERY_TIME: u32 = 6;
const NO_WAITS: (u32, Duration) = (0, Duration::MAX);

/// What the compositor should do now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Due {
    /// Render, and report back by [`FrameClock::rendered`], [`FrameClock::unchanged`] or [`FrameClock::starved`].
    pub render: bool,
    /// Send frame callbacks (after rendering), and report back by [`FrameClock::called_back`].
    pub callbacks: bool,
}

/// Paces one output.
#[derive(Clone, Debug)]
pub struct FrameClock {
    interval: Duration,
    active: bool,
    starved: bool,
    /// The first change that is not shown yet.
    dirty: Option<Instant>,
    /// Some surface may wait for a frame callback.
    waiting: bool,
    next_render: Option<Instant>,
    next_callbacks: Option<Instant>,
    last_callbacks: Option<Instant>,
    /// Frames that waited for their turn, one after another, and the shortest of these waits.
    waits: (u32, Duration),
}

impl FrameClock {
    /// A clock for at most `fps` frames a second (at least 1), inactive.
    pub fn new(fps: u32) -> Self {
        Self {
            interval: interval(fps),
            active: false,
            starved: false,
            dirty: None,
            waiting: false,
            next_render: None,
            next_callbacks: None,
            last_callbacks: None,
            waits: NO_WAITS,
        }
    }

    /// Time between two frames at the full rate.
    pub fn interval(&self) -> Duration {
        self.interval
    }

    /// Changes the rate; what is due is due by the new rate.
    pub fn set_rate(&mut self, fps: u32) {
        self.interval = interval(fps);
        self.next_render = None;
        self.next_callbacks = None;
    }

    /// Moves the grid of frame callbacks by `by_ms` milliseconds, at most an interval; later is positive.
    pub fn shift(&mut self, by_ms: f64) {
        let by = Duration::from_secs_f64((by_ms.abs() / 1e3).min(self.interval.as_secs_f64()));
        if by_ms < 0.0 {
            self.next_callbacks = self.next_callbacks.and_then(|next| next.checked_sub(by));
            // Or frames would come earlier and wait for a turn that has not moved.
            self.next_render = self.next_render.and_then(|next| next.checked_sub(by));
        } else {
            self.next_callbacks = self.next_callbacks.map(|next| next + by);
        }
    }

    /// Whether frames are wanted. Becoming active shows the current content at once.
    pub fn set_active(&mut self, active: bool, now: Instant) {
        if active && !self.active {
            self.next_render = None;
            self.dirty = Some(now);
        }
        self.active = active;
    }

    /// Whether frames are wanted.
    pub fn is_active(&self) -> bool {
        self.active
    }

    /// Something visible changed.
    pub fn changed(&mut self, now: Instant) {
        self.dirty.get_or_insert(now);
    }

    /// A client committed and may wait for its frame callback, whether or not anything visible changed.
    pub fn committed(&mut self) {
        self.waiting = true;
    }

    /// When the oldest change that is not shown yet was made.
    pub fn dirty_since(&self) -> Option<Instant> {
        self.dirty
    }

    /// What is due at `now`.
    pub fn poll(&self, now: Instant) -> Due {
        let render = self.render_at().is_some_and(|at| at.is_none_or(|at| at <= now));
        let callbacks = self.callbacks_at().is_some_and(|at| at.is_none_or(|at| at <= now));
        Due { render, callbacks: callbacks && (render || self.render_at().is_none()) }
    }

    /// When something is due next; `None`: only when a client or a caller does something.
    pub fn deadline(&self, now: Instant) -> Option<Instant> {
        let render = self.render_at().map(|at| at.unwrap_or(now));
        let callbacks = self.callbacks_at().map(|at| at.unwrap_or(now));
        match (render, callbacks) {
            // Callbacks wait for the frame before them.
            (Some(render), _) => Some(render),
            (None, callbacks) => callbacks,
        }
    }

    /// A frame was rendered and delivered at `now`.
    pub fn rendered(&mut self, now: Instant) {
        let committed = self.dirty.take();
        match (committed, self.next_render) {
            (Some(committed), Some(turn)) if turn > committed && self.waiting => {
                let waited = now.saturating_duration_since(committed);
                self.waits = (self.waits.0 + 1, self.waits.1.min(waited));
            }
            _ => self.waits = NO_WAITS,
        }
        // After one late frame the next may wait. But what is drawn when it is asked for and waits every time comes too
        // early, and always would: ask later.
        if self.waits.0 >= EVERY_TIME {
            let (_, least) = std::mem::replace(&mut self.waits, NO_WAITS);
            self.next_callbacks =
                self.next_callbacks.map(|next| (next + least).min((now + self.interval).max(next)));
        }
        // Nearly an interval of slack: a frame that is late takes no turn from those after it, and the average rate is
        // held all the same.
        let soon = now + self.interval / 8;
        self.next_render = Some(self.next_render.map_or(soon, |next| soon.max(next + self.interval)));
    }

    /// Rendering showed that nothing visible changed; this does not count as a frame.
    pub fn unchanged(&mut self) {
        self.dirty = None;
    }

    /// No picture was free. Nothing is rendered until [`FrameClock::fed`].
    pub fn starved(&mut self) {
        self.starved = true;
    }

    /// A picture is free again.
    pub fn fed(&mut self) {
        self.starved = false;
    }

    /// Frame callbacks were sent at `now`.
    pub fn called_back(&mut self, now: Instant) {
        self.waiting = false;
        self.last_callbacks = Some(now);
        self.next_callbacks = Some(match self.next_callbacks {
            // Stay on the grid: the rate must not sink by the time that a client needs to draw.
            Some(slot) if now < slot + self.interval => slot + self.interval,
            _ => now + self.interval,
        });
    }

    /// `Some(None)`: at once.
    fn render_at(&self) -> Option<Option<Instant>> {
        (self.dirty.is_some() && self.active && !self.starved).then_some(self.next_render)
    }

    fn callbacks_at(&self) -> Option<Option<Instant>> {
        let slow = !self.active || self.starved;
        self.waiting
            .then(|| if slow { self.last_callbacks.map(|last| last + SLOW) } else { self.next_callbacks })
    }
}

fn interval(fps: u32) -> Duration {
    Duration::from_secs(1) / fps.max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn frames_do_not_wait_for_their_turn_for_ever() {
        let start = Instant::now();
        let mut clock = FrameClock::new(100);
        clock.set_active(true, start);
        let (mut now, mut commit_at, mut committed, mut waits) = (start, Some(start), start, Vec::new());
        // Two commits that nobody asked for take turns away from those that follow.
        let mut extra = vec![start + 203 * MS, start + 207 * MS];
        while now < start + 600 * MS {
            if commit_at.is_some_and(|at| at <= now) {
                (commit_at, committed) = (None, now);
                clock.changed(now);
                clock.committed();
            }
            extra.retain(|at| {
                let due = *at <= now;
                if due {
                    clock.changed(now);
                }
                !due
            });
            let due = clock.poll(now);
            if due.render {
                clock.rendered(now);
                waits.push(now - committed);
            }
            if due.callbacks {
                clock.called_back(now);
                commit_at = Some(now + 2 * MS);
            }
            now = [clock.deadline(now), commit_at]
                .into_iter()
                .flatten()
                .chain(extra.iter().copied())
                .min()
                .expect("more");
        }
        assert!(waits.iter().any(|wait| *wait > MS), "the extra commits were felt");
        assert!(waits.iter().rev().take(20).all(|wait| *wait < MS), "{waits:?}");
        assert!(waits.len() > 55, "and the rate is held: {}", waits.len());
    }

    #[test]
    fn a_shift_moves_the_grid_and_never_makes_frames_wait() {
        for (by_ms, expected) in [(5.0, 15 * MS), (-5.0, 5 * MS), (1e9, 20 * MS), (-1e9, Duration::ZERO)] {
            let start = Instant::now();
            let mut clock = FrameClock::new(100);
            clock.set_active(true, start);
            clock.rendered(start);
            clock.called_back(start);
            clock.committed();
            assert_eq!(clock.deadline(start), Some(start + 10 * MS));
            clock.shift(by_ms);
            assert_eq!(clock.deadline(start), Some(start + expected), "{by_ms}");
            // Drawn as soon as it is asked for.
            clock.changed(start + expected);
            assert!(clock.poll(start + expected.max(5 * MS)).render, "{by_ms}");
        }
    }

    /// Runs `clock` for `span` with a client that commits `draw` after every callback; returns the times of frames.
    fn run_paced_client(
        clock: &mut FrameClock,
        start: Instant,
        span: Duration,
        mut draw: impl FnMut(u32) -> Duration,
    ) -> Vec<Instant> {
        let mut frames = Vec::new();
        let (mut now, mut commit_at, mut drawn) = (start, Some(start), 0);
        while now < start + span {
            if commit_at.is_some_and(|at| at <= now) {
                commit_at = None;
                clock.changed(now);
                clock.committed();
            }
            let due = clock.poll(now);
            if due.render {
                clock.rendered(now);
                frames.push(now);
            }
            if due.callbacks {
                clock.called_back(now);
                drawn += 1;
                commit_at = Some(now + draw(drawn));
            }
            now = match (clock.deadline(now), commit_at) {
                (Some(a), Some(b)) => a.min(b),
                (Some(at), None) | (None, Some(at)) => at,
                (None, None) => break,
            };
        }
        frames
    }

    #[test]
    fn an_idle_clock_has_no_deadline() {
        let now = Instant::now();
        let mut clock = FrameClock::new(60);
        assert_eq!(clock.deadline(now), None);
        clock.set_active(true, now);
        assert!(clock.poll(now).render, "becoming active shows the content at once");
        clock.rendered(now);
        assert_eq!(clock.deadline(now), None);
        assert_eq!(clock.poll(now + Duration::from_secs(60)), Due::default());
    }

    #[test]
    fn a_commit_after_a_pause_is_rendered_at_once_and_called_back_at_once() {
        let now = Instant::now();
        let mut clock = FrameClock::new(60);
        clock.set_active(true, now);
        clock.rendered(now);
        clock.called_back(now);
        let later = now + Duration::from_secs(3);
        clock.changed(later);
        clock.committed();
        assert_eq!(clock.poll(later), Due { render: true, callbacks: true });
        assert_eq!(clock.dirty_since(), Some(later));
    }

    #[test]
    fn a_client_that_keeps_pace_is_shown_without_waiting_and_at_the_full_rate() {
        for (fps, draw_ms) in [(60, 3), (60, 0), (30, 12), (120, 5)] {
            let start = Instant::now();
            let mut clock = FrameClock::new(fps);
            clock.set_active(true, start);
            let frames = run_paced_client(&mut clock, start, Duration::from_secs(2), |_| draw_ms * MS);
            let expected = 2 * fps as usize;
            assert!(
                frames.len().abs_diff(expected) <= 2,
                "{} frames at {fps} fps, drawing {draw_ms} ms",
                frames.len()
            );
        }
    }

    #[test]
    fn jitter_of_a_client_costs_neither_rate_nor_extra_frames() {
        let start = Instant::now();
        let mut clock = FrameClock::new(60);
        clock.set_active(true, start);
        let frames = run_paced_client(&mut clock, start, Duration::from_secs(2), |n| {
            Duration::from_millis([2, 6, 3, 7][n as usize % 4])
        });
        assert!(frames.len().abs_diff(120) <= 2, "{} frames", frames.len());
    }

    #[test]
    fn a_client_that_ignores_callbacks_is_limited_to_the_rate() {
        let start = Instant::now();
        let mut clock = FrameClock::new(60);
        clock.set_active(true, start);
        let mut frames = 0;
        for tick in 0..10_000 {
            let now = start + tick * MS / 10;
            clock.changed(now);
            if clock.poll(now).render {
                clock.rendered(now);
                frames += 1;
            }
        }
        assert!((59..=62).contains(&frames), "{frames} frames in one second");
    }

    #[test]
    fn callbacks_wait_for_the_frame_before_them() {
        let now = Instant::now();
        let mut clock = FrameClock::new(60);
        clock.set_active(true, now);
        clock.rendered(now);
        clock.changed(now + MS);
        clock.committed();
        let due = clock.poll(now + MS);
        assert_eq!(due, Due::default(), "too early to render, so no callback either");
        let at = clock.deadline(now + MS).expect("a render is pending");
        assert_eq!(clock.poll(at), Due { render: true, callbacks: true });
    }

    #[test]
    fn nobody_watching_means_no_frames_and_one_callback_a_second() {
        let now = Instant::now();
        let mut clock = FrameClock::new(60);
        clock.changed(now);
        clock.committed();
        assert_eq!(clock.poll(now), Due { render: false, callbacks: true });
        clock.called_back(now);
        clock.committed();
        assert_eq!(clock.deadline(now), Some(now + SLOW));
        assert_eq!(clock.poll(now + SLOW - MS), Due::default());
        assert_eq!(clock.poll(now + SLOW), Due { render: false, callbacks: true });
    }

    #[test]
    fn a_starved_clock_waits_to_be_fed_and_keeps_the_change() {
        let now = Instant::now();
        let mut clock = FrameClock::new(60);
        clock.set_active(true, now);
        clock.starved();
        assert_eq!(clock.poll(now), Due::default());
        assert_eq!(clock.deadline(now), None, "a returned picture wakes the loop, not a timer");
        clock.fed();
        assert!(clock.poll(now).render);
    }

    #[test]
    fn a_rate_of_zero_is_taken_as_one() {
        assert_eq!(FrameClock::new(0).interval(), Duration::from_secs(1));
    }
}
