//! Ending a program: one token that everybody watches, one tracker that knows who still works.

use std::{future::Future, time::Duration};

use tokio::task::JoinHandle;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// The way a program ends. Clones are handles of the same.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    token: CancellationToken,
    tracker: TaskTracker,
}

impl Shutdown {
    /// A fresh one.
    pub fn new() -> Self {
        Self::default()
    }

    /// Starts a task that [`Shutdown::stop`] waits for. The task must watch [`Shutdown::token`]. A panic in it
    /// is logged and ends the task alone.
    pub fn spawn<F>(&self, name: &'static str, future: F) -> JoinHandle<()>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.tracker.spawn(async move {
            let caught = futures_util::FutureExt::catch_unwind(std::panic::AssertUnwindSafe(future)).await;
            if let Err(panic) = caught {
                tracing::error!(task = name, "task {name} panicked: {}", panic_text(&*panic));
            }
        })
    }

    /// Starts a task that ends by itself when asked to stop: it is dropped at its next await.
    pub fn spawn_until_stopped<F>(&self, name: &'static str, future: F) -> JoinHandle<()>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let token = self.token.clone();
        self.spawn(name, async move {
            token.run_until_cancelled_owned(future).await;
        })
    }

    /// Cancelled when the program should end.
    pub fn token(&self) -> &CancellationToken {
        &self.token
    }

    /// Whether the end was asked for.
    pub fn is_stopping(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Resolves when the end is asked for.
    pub async fn stopping(&self) {
        self.token.cancelled().await;
    }

    /// Asks everybody to end and waits for them, at most `patience`. Returns whether all ended.
    pub async fn stop(&self, patience: Duration) -> bool {
        self.token.cancel();
        self.tracker.close();
        let ended = tokio::time::timeout(patience, self.tracker.wait()).await.is_ok();
        if !ended {
            tracing::warn!(tasks = self.tracker.len(), "{} tasks did not end in time", self.tracker.len());
        }
        ended
    }
}

/// Resolves at the first SIGINT or SIGTERM, with its name.
///
/// # Errors
/// The signals cannot be watched.
pub async fn signal() -> std::io::Result<&'static str> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    Ok(tokio::select! {
        _ = interrupt.recv() => "SIGINT",
        _ = terminate.recv() => "SIGTERM",
    })
}

/// What a panic said.
pub fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    if let Some(text) = panic.downcast_ref::<&str>() {
        text
    } else if let Some(text) = panic.downcast_ref::<String>() {
        text
    } else {
        "no text"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn stopping_waits_for_tasks_and_survives_their_panics() {
        let shutdown = Shutdown::new();
        let token = shutdown.token().clone();
        shutdown.spawn("patient", async move { token.cancelled().await });
        shutdown.spawn("broken", async { panic!("on purpose") });
        shutdown.spawn_until_stopped("endless", std::future::pending());
        assert!(shutdown.stop(Duration::from_secs(60)).await);
        assert!(shutdown.is_stopping());
    }

    #[tokio::test]
    async fn a_task_that_does_not_end_is_given_up() {
        let shutdown = Shutdown::new();
        shutdown.spawn("stubborn", std::future::pending());
        assert!(!shutdown.stop(Duration::from_millis(10)).await);
    }
}
