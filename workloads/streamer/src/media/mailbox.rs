//! Work for the media thread from other threads: a queue, and a descriptor that wakes the thread's `poll`.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, mpsc},
};

use rustix::event::{EventfdFlags, eventfd};

/// The sending end.
#[derive(Debug)]
pub struct Sender<T> {
    queue: mpsc::Sender<T>,
    wake: Arc<OwnedFd>,
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Self { queue: self.queue.clone(), wake: Arc::clone(&self.wake) }
    }
}

impl<T> Sender<T> {
    /// Never blocks. What is sent after the receiver has ended is dropped.
    pub fn send(&self, item: T) {
        if self.queue.send(item).is_ok() {
            // A full counter means that a wake-up is already under way.
            let _ = rustix::io::write(&*self.wake, &1_u64.to_ne_bytes());
        }
    }
}

/// The receiving end.
#[derive(Debug)]
pub struct Receiver<T> {
    queue: mpsc::Receiver<T>,
    wake: Arc<OwnedFd>,
}

impl<T> Receiver<T> {
    /// The next item, if there is one.
    pub fn try_recv(&self) -> Option<T> {
        self.queue.try_recv().ok()
    }

    /// Readable while something was sent since [`Receiver::rest`].
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Forgets wake-ups so far; call before draining with [`Receiver::try_recv`].
    pub fn rest(&self) {
        let mut count = [0; 8];
        // Nothing to read is fine.
        let _ = rustix::io::read(&*self.wake, &mut count);
    }
}

/// A new queue.
///
/// # Errors
/// When the process has no descriptor left.
pub fn mailbox<T>() -> io::Result<(Sender<T>, Receiver<T>)> {
    let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
    let (sender, receiver) = mpsc::channel();
    Ok((Sender { queue: sender, wake: Arc::clone(&wake) }, Receiver { queue: receiver, wake }))
}
