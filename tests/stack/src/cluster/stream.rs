//! A stream that is watched.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use tokio::task::JoinHandle;

use crate::{
    SOON,
    client::{Client, Habits},
    rest::Server,
};

/// A stream that shows nothing new for so long has stopped. It is less than any outage in these tests lasts, and more
/// than a machine that is busy takes for a frame.
const STANDSTILL: Duration = Duration::from_secs(8);
/// Frames that show that a stream goes on.
const FRAMES: u64 = 20;

/// A client that is watched all the time for its picture to stop.
pub struct Stream {
    client: Arc<Client>,
    longest: Arc<Mutex<Duration>>,
    watcher: JoinHandle<()>,
}

impl Stream {
    /// Connects to a session and waits for pictures.
    ///
    /// # Errors
    /// As of [`Client::connect`].
    pub async fn open(server: &Server, url: &str, habits: Habits) -> Result<Self> {
        let client = Arc::new(Client::connect(server, url, Habits { speaker: false, ..habits }).await?);
        client.streaming().await?;
        let longest = Arc::new(Mutex::default());
        let watcher = tokio::spawn(watch(client.clone(), longest.clone()));
        Ok(Self { client, longest, watcher })
    }

    /// Checks that the stream goes on, and that it never stopped.
    ///
    /// # Errors
    /// It stops, or did.
    pub async fn goes_on(&self) -> Result<()> {
        self.client.more_frames(FRAMES).await.context("the stream has stopped")?;
        let longest = *self.longest.lock().unwrap_or_else(PoisonError::into_inner);
        ensure!(longest < STANDSTILL, "the stream stood still for {longest:?}");
        Ok(())
    }

    /// Waits until the other side ends the stream.
    ///
    /// # Errors
    /// It goes on.
    pub async fn ended(self) -> Result<()> {
        self.watcher.abort();
        self.client.ended(SOON).await.map(drop)
    }

    /// The client.
    pub fn client(&self) -> &Client {
        &self.client
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.watcher.abort();
    }
}

async fn watch(client: Arc<Client>, longest: Arc<Mutex<Duration>>) {
    let (mut frames, mut since) = (0, Instant::now());
    loop {
        let now = client.seen().video.frames;
        if now != frames {
            (frames, since) = (now, Instant::now());
        }
        {
            let mut longest = longest.lock().unwrap_or_else(PoisonError::into_inner);
            *longest = since.elapsed().max(*longest);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
