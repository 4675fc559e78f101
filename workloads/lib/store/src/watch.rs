//! Watches: the state of a prefix, then its changes. A watcher that falls behind is given the state again
//! instead of a queue without bounds.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{
        Arc, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use futures_util::Stream;
use tokio::sync::mpsc;

use crate::{
    Event, Revision,
    engine::read,
    state::{State, Value},
};

/// Most commits that wait for one watcher. What was written together is told together, so that nobody takes a part of it
/// for the whole.
pub const QUEUE: usize = 1024;

/// Events of one prefix, a [`Stream`]; ends when the store is closed.
pub struct Watch {
    inner: Inner,
}

enum Inner {
    Embedded(Follower),
    /// Events in order, told by a task that follows the store, and those that were told and not taken yet.
    Queue(mpsc::Receiver<Vec<Event>>, VecDeque<Event>),
}

impl Watch {
    pub(crate) fn embedded(follower: Follower) -> Self {
        Self { inner: Inner::Embedded(follower) }
    }

    pub(crate) fn queue(events: mpsc::Receiver<Vec<Event>>) -> Self {
        Self { inner: Inner::Queue(events, VecDeque::new()) }
    }

    /// The next event; `None` when the store is closed.
    pub async fn next(&mut self) -> Option<Event> {
        std::future::poll_fn(|cx| Pin::new(&mut *self).poll_next(cx)).await
    }
}

impl Stream for Watch {
    type Item = Event;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        match &mut self.inner {
            Inner::Embedded(follower) => follower.poll_next(cx),
            Inner::Queue(events, ready) => loop {
                if let Some(event) = ready.pop_front() {
                    return Poll::Ready(Some(event));
                }
                match events.poll_recv(cx) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(None) => return Poll::Ready(None),
                    Poll::Ready(Some(told)) => ready.extend(told),
                }
            },
        }
    }
}

/// The engine's end of a watch.
pub struct Watcher {
    prefix: String,
    queue: mpsc::Sender<Vec<Event>>,
    behind: Arc<AtomicBool>,
}

/// The reader's end of a watch.
pub struct Follower {
    prefix: String,
    queue: mpsc::Receiver<Vec<Event>>,
    /// Changes were left out: the state must be read again.
    behind: Arc<AtomicBool>,
    /// Changes up to here are known already.
    known: Revision,
    ready: VecDeque<Event>,
    state: Arc<RwLock<State>>,
}

/// Both ends of a watch; the reader's begins with the state.
pub fn pair(prefix: &str, state: Arc<RwLock<State>>) -> (Watcher, Follower) {
    let (sender, queue) = mpsc::channel(QUEUE);
    let behind = Arc::new(AtomicBool::new(true));
    let watcher = Watcher { prefix: prefix.into(), queue: sender, behind: behind.clone() };
    let follower = Follower { prefix: prefix.into(), queue, behind, known: 0, ready: VecDeque::new(), state };
    (watcher, follower)
}

impl Watcher {
    /// Tells changes that the shared state already shows, in the order of their revisions. Returns whether anybody listens.
    pub fn tell(&self, changes: &[(String, (Revision, Option<Value>))]) -> bool {
        if self.behind.load(Ordering::Acquire) {
            return !self.queue.is_closed();
        }
        let ours = changes.iter().filter(|(key, _)| key.starts_with(&self.prefix));
        let events: Vec<Event> = ours
            .map(|(key, (revision, value))| match value {
                Some(value) => Event::Put(value.entry(key)),
                None => Event::Delete { key: key.clone(), revision: *revision },
            })
            .collect();
        if !events.is_empty() {
            match self.queue.try_send(events) {
                Ok(()) => {}
                // The queue is not empty, so the reader will come by and see this.
                Err(mpsc::error::TrySendError::Full(_)) => self.behind.store(true, Ordering::Release),
                Err(mpsc::error::TrySendError::Closed(_)) => return false,
            }
        }
        !self.queue.is_closed()
    }

    /// Makes the reader read the state again.
    pub fn reset(&self) {
        self.behind.store(true, Ordering::Release);
        // Only to wake it; a full queue wakes it as well.
        let _ = self.queue.try_send(Vec::new());
    }
}

impl Follower {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Poll::Ready(Some(event));
            }
            if self.behind.load(Ordering::Acquire) {
                return Poll::Ready(Some(self.read_again()));
            }
            match self.queue.poll_recv(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Ready(Some(events)) => {
                    let revision = |event: &Event| match event {
                        Event::Put(entry) => entry.revision,
                        Event::Delete { revision, .. } | Event::Reset { revision, .. } => *revision,
                    };
                    self.ready.extend(events.into_iter().filter(|event| revision(event) > self.known));
                }
            }
        }
    }

    fn read_again(&mut self) -> Event {
        // In this order: what is queued already is part of the state, and what is told after the flag is
        // down either is part of it too, and known by its revision, or comes behind it.
        while self.queue.try_recv().is_ok() {}
        self.behind.store(false, Ordering::Release);
        let range = read(&self.state).range(&self.prefix, None, usize::MAX);
        self.known = range.revision;
        Event::Reset { entries: range.entries, revision: range.revision }
    }
}
