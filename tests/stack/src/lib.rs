//! What the tests of the whole stack need: starting it as a user would, talking to it as any program would, and
//! a client that shares no code with the streamer's peer.
//!
//! Nothing here uses Fanlight's own libraries: what travels is written down by hand, so that a mistake in them
//! cannot hide on both sides.

pub mod browser;
pub mod client;
pub mod cluster;
pub mod namespaces;
pub mod processes;
pub mod rest;
pub mod simulated;
pub mod stack;

use std::{future::Future, time::Duration};

use anyhow::{Result, bail};
use tokio::time::{Instant, sleep};

/// For what has to follow from something soon, on a machine that is busy.
pub const SOON: Duration = Duration::from_secs(20);
/// For an instance to start on a machine that is busy.
pub const BOOT: Duration = Duration::from_secs(60);

/// Waits until `condition` gives something.
///
/// # Errors
/// It gave nothing in time; the text says what was waited for.
pub async fn until<T, F, Fut>(what: &str, patience: Duration, mut condition: F) -> Result<T>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<Option<T>>>,
{
    let end = Instant::now() + patience;
    loop {
        let found = condition().await;
        match found {
            Ok(Some(value)) => return Ok(value),
            Ok(None) if Instant::now() > end => bail!("not within {patience:?}: {what}"),
            Err(error) if Instant::now() > end => {
                return Err(error.context(format!("not within {patience:?}: {what}")));
            }
            Ok(None) | Err(_) => sleep(Duration::from_millis(50)).await,
        }
    }
}
