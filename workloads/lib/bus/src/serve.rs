//! Answering requests.

use std::sync::Arc;

use serde::{Serialize, de::DeserializeOwned};
use tokio::{sync::Semaphore, task::JoinHandle};

use crate::{Bus, BusError, Message};

/// Most requests of one subject that are worked on at a time; further ones wait in the queue of the
/// subscription.
const MAX_CONCURRENT: usize = 256;

/// A subject that is being served. Dropping it takes no further requests; those begun are finished.
#[must_use = "dropping it ends the service"]
pub struct Serving {
    task: JoinHandle<()>,
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Bus {
    /// Calls `handler` for every message to `subject` that falls to this member of `group`; the handler answers
    /// with [`Message::respond`].
    ///
    /// # Errors
    /// The subject is invalid, or the bus has ended.
    pub async fn serve<H, F>(&self, subject: &str, group: &str, handler: H) -> Result<Serving, BusError>
    where
        H: Fn(Message) -> F + Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let mut messages = self.queue_subscribe(subject, group).await?;
        let permits = Arc::new(Semaphore::new(MAX_CONCURRENT));
        let task = tokio::spawn(async move {
            while let Some(message) = messages.next().await {
                let permit = permits.clone().acquire_owned().await.expect("the semaphore is never closed");
                let work = handler(message);
                tokio::spawn(async move {
                    work.await;
                    drop(permit);
                });
            }
        });
        Ok(Serving { task })
    }

    /// As [`Bus::serve`], with question and answer as JSON. What cannot be read is logged and not answered.
    ///
    /// # Errors
    /// The subject is invalid, or the bus has ended.
    pub async fn serve_json<Q, A, H, F>(
        &self,
        subject: &str,
        group: &str,
        handler: H,
    ) -> Result<Serving, BusError>
    where
        Q: DeserializeOwned + Send + 'static,
        A: Serialize + Send + 'static,
        H: Fn(Q) -> F + Send + Sync + 'static,
        F: Future<Output = A> + Send + 'static,
    {
        let handler = Arc::new(handler);
        self.serve(subject, group, move |message| {
            let handler = handler.clone();
            async move {
                match message.json() {
                    Ok(question) => message.respond_json(&handler(question).await),
                    Err(error) => tracing::warn!(
                        subject = message.subject,
                        error = &error as &dyn std::error::Error,
                        "bus request cannot be read"
                    ),
                }
            }
        })
        .await
    }
}
