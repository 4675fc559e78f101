//! A part of the store, kept in memory and up to date: what every request needs, and every unit of AMS must see soon
//! after it changed. What the entries mean is the owner's affair.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use fanlight_service::Shutdown;
use fanlight_store::{Event, Handle, Revision, StoreError, Watch};
use futures_util::FutureExt as _;
use tokio::sync::watch;

/// How long a writer waits until its own change is seen here. The store tells changes at once; more is a fault.
const PATIENCE: Duration = Duration::from_secs(5);

/// The entries of a prefix, by key.
pub type Entries = BTreeMap<String, Bytes>;

/// Makes of the entries what they stand for.
type Build<T> = Box<dyn Fn(&Entries) -> T + Send + Sync>;

/// What a prefix of the store stands for.
pub struct Mirror<T> {
    view: watch::Sender<(Revision, Arc<T>)>,
    build: Build<T>,
    /// Until it is followed.
    source: Mutex<Option<(Watch, Entries)>>,
}

impl<T: Send + Sync + 'static> Mirror<T> {
    /// Reads the prefix.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn open(
        store: &Handle,
        prefix: &str,
        build: impl Fn(&Entries) -> T + Send + Sync + 'static,
    ) -> Result<Arc<Self>, StoreError> {
        let mut watch = store.watch(prefix).await?;
        let mut entries = Entries::new();
        let first = watch.next().await.ok_or(StoreError::Closed)?;
        let revision = apply(&mut entries, first);
        let view = watch::Sender::new((revision, Arc::new(build(&entries))));
        Ok(Arc::new(Self { view, build: Box::new(build), source: Mutex::new(Some((watch, entries))) }))
    }

    /// Follows the changes until the end.
    pub fn follow(self: &Arc<Self>, name: &'static str, shutdown: &Shutdown) {
        let source = self.source.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some((mut watch, mut entries)) = source else { return };
        let mirror = self.clone();
        shutdown.spawn_until_stopped(name, async move {
            while let Some(event) = watch.next().await {
                let mut revision = apply(&mut entries, event);
                // The changes of one transaction come one by one and are shown together.
                while let Some(Some(event)) = watch.next().now_or_never() {
                    revision = revision.max(apply(&mut entries, event));
                }
                let value = Arc::new((mirror.build)(&entries));
                mirror.view.send_replace((revision, value));
            }
        });
    }

    /// As it is now.
    pub fn get(&self) -> Arc<T> {
        self.view.borrow().1.clone()
    }

    /// Waits until a change of this unit's own shows, so that whoever asked for it does not meet the old state.
    pub async fn reached(&self, revision: Revision) {
        let mut view = self.view.subscribe();
        let seen = view.wait_for(|(seen, _)| *seen >= revision);
        if tokio::time::timeout(PATIENCE, seen).await.is_err() {
            tracing::warn!("a change of the store (revision {revision}) was not told within {PATIENCE:?}");
        }
    }
}

fn apply(entries: &mut Entries, event: Event) -> Revision {
    match event {
        Event::Reset { entries: all, revision } => {
            *entries = all.into_iter().map(|entry| (entry.key, entry.value)).collect();
            revision
        }
        Event::Put(entry) => {
            entries.insert(entry.key, entry.value);
            entry.revision
        }
        Event::Delete { key, revision } => {
            entries.remove(&key);
            revision
        }
    }
}

#[cfg(test)]
mod tests {
    use fanlight_store::{Embedded, Op};

    use super::*;

    #[tokio::test]
    async fn a_change_shows_once_it_is_reached_and_nothing_of_other_prefixes() {
        let store: Handle = Arc::new(Embedded::memory());
        store.transact(Vec::new(), vec![Op::put("a/1", "x"), Op::put("b/1", "y")]).await.expect("written");
        let keys = |entries: &Entries| entries.keys().cloned().collect::<Vec<_>>();
        let mirror = Mirror::open(&store, "a/", keys).await.expect("read");
        assert_eq!(*mirror.get(), ["a/1"]);
        let shutdown = Shutdown::new();
        mirror.follow("mirror", &shutdown);
        let committed =
            store.transact(Vec::new(), vec![Op::put("a/2", "z"), Op::delete("a/1")]).await.expect("written");
        mirror.reached(committed.revision).await;
        assert_eq!(*mirror.get(), ["a/2"]);
        shutdown.stop(Duration::from_secs(1)).await;
    }
}
