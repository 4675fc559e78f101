//! All instances in memory, as the store has them: lists come from here, and whoever follows the store hears from here
//! what changed. It is never written to but by what the store told.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use fanlight_api::{InstanceId, ams::InstanceStatus};
use fanlight_store::{
    Committed, Compare, Entry, Event, Handle, LeaseId, Op, Range, Revision, Store, StoreError, Watch, decode,
};
use tokio::sync::watch;

use crate::{
    core::{
        life,
        model::{InstanceRecord, key},
    },
    fault,
};

/// How long a list waits for what this unit wrote before. The store tells changes at once; more is a fault.
const PATIENCE: Duration = Duration::from_secs(2);

/// What changed about an instance.
#[derive(Clone, Debug)]
pub struct Changed {
    /// Which.
    pub id: InstanceId,
    /// As it was; none: new.
    pub before: Option<Arc<InstanceRecord>>,
    /// As it is; none: gone.
    pub after: Option<Arc<InstanceRecord>>,
}

impl Changed {
    /// What has happened, in words of the events of the API.
    pub fn events(&self) -> Vec<&'static str> {
        let after = self.after.as_ref().map(|record| record.observed.status);
        let Some(before) = &self.before else {
            let later = after.and_then(|after| life::events(InstanceStatus::Created, after));
            return std::iter::once("instance-created").chain(later).collect();
        };
        let Some(after) = after else { return vec!["instance-removed"] };
        life::events(before.observed.status, after).into_iter().collect()
    }

    /// URL of the instance.
    pub fn url(&self) -> String {
        format!("/1.0/instances/{}", self.id)
    }
}

/// The instances.
#[derive(Debug)]
pub struct Index {
    records: RwLock<BTreeMap<InstanceId, Arc<InstanceRecord>>>,
    seen: watch::Sender<Revision>,
    /// Of the newest change of an instance that this unit made.
    written: AtomicU64,
}

impl Default for Index {
    fn default() -> Self {
        Self { records: RwLock::default(), seen: watch::Sender::new(0), written: AtomicU64::new(0) }
    }
}

impl Index {
    /// Takes in what the store told; gives what changed by it.
    pub fn apply(&self, event: Event) -> Vec<Changed> {
        let (changed, revision) = match event {
            Event::Reset { entries, revision } => (self.reset(entries), revision),
            Event::Put(entry) => {
                let revision = entry.revision;
                (read(&entry).map(|record| self.put(record)).into_iter().collect(), revision)
            }
            Event::Delete { key, revision } => (self.delete(&key).into_iter().collect(), revision),
        };
        self.seen.send_if_modified(|seen| {
            let newer = revision > *seen;
            *seen = revision.max(*seen);
            newer
        });
        changed
    }

    fn put(&self, record: InstanceRecord) -> Changed {
        let (id, record) = (record.id.clone(), Arc::new(record));
        let before = self.lock().insert(id.clone(), record.clone());
        Changed { id, before, after: Some(record) }
    }

    fn delete(&self, key: &str) -> Option<Changed> {
        let id: InstanceId = key.strip_prefix(key::INSTANCES)?.parse().ok()?;
        let before = self.lock().remove(&id)?;
        Some(Changed { id, before: Some(before), after: None })
    }

    fn reset(&self, entries: Vec<Entry>) -> Vec<Changed> {
        let there: BTreeMap<InstanceId, Arc<InstanceRecord>> =
            entries.iter().filter_map(read).map(|record| (record.id.clone(), Arc::new(record))).collect();
        let before = std::mem::replace(&mut *self.lock(), there.clone());
        let gone = before.iter().filter(|(id, _)| !there.contains_key(*id)).map(|(id, record)| Changed {
            id: id.clone(),
            before: Some(record.clone()),
            after: None,
        });
        let now = there.iter().filter(|(id, record)| before.get(*id) != Some(*record)).map(|(id, record)| {
            Changed { id: id.clone(), before: before.get(id).cloned(), after: Some(record.clone()) }
        });
        gone.chain(now).collect()
    }

    fn lock(&self) -> std::sync::RwLockWriteGuard<'_, BTreeMap<InstanceId, Arc<InstanceRecord>>> {
        self.records.write().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// All instances, by id, with everything that this unit wrote before.
    pub async fn list(&self) -> Vec<Arc<InstanceRecord>> {
        let written = self.written.load(Ordering::Acquire);
        let mut seen = self.seen.subscribe();
        let caught_up = seen.wait_for(|seen| *seen >= written);
        if tokio::time::timeout(PATIENCE, caught_up).await.is_err() {
            tracing::warn!(
                "the store has not told of a change of its own within {PATIENCE:?}: the list may be old"
            );
        }
        let records = self.records.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        records.values().cloned().collect()
    }

    /// The ids of all instances.
    pub fn ids(&self) -> Vec<InstanceId> {
        let records = self.records.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        records.keys().cloned().collect()
    }
}

/// The store, which notes what this unit writes about instances, so that a list after that shows it.
pub struct Noting {
    /// The store itself.
    pub store: Handle,
    /// Where it is noted.
    pub index: Arc<Index>,
}

#[async_trait]
impl Store for Noting {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        self.store.get(key).await
    }

    async fn range(
        &self,
        prefix: &str,
        start_after: Option<&str>,
        limit: usize,
    ) -> Result<Range, StoreError> {
        self.store.range(prefix, start_after, limit).await
    }

    async fn transact(&self, compares: Vec<Compare>, ops: Vec<Op>) -> Result<Committed, StoreError> {
        let of_instances = ops.iter().any(|op| {
            let (Op::Put { key, .. } | Op::Delete { key }) = op;
            key.starts_with(key::INSTANCES)
        });
        fault::step();
        let committed = self.store.transact(compares, ops).await?;
        fault::step();
        if of_instances {
            self.index.written.fetch_max(committed.revision, Ordering::AcqRel);
        }
        Ok(committed)
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        self.store.grant(ttl).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.store.keep_alive(lease).await
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.store.revoke(lease).await
    }

    async fn watch(&self, prefix: &str) -> Result<Watch, StoreError> {
        self.store.watch(prefix).await
    }

    async fn members(&self) -> Result<u64, StoreError> {
        self.store.members().await
    }

    async fn close(&self) {
        self.store.close().await;
    }
}

fn read(entry: &Entry) -> Option<InstanceRecord> {
    match decode(&entry.key, &entry.value) {
        Ok(record) => Some(record),
        Err(error) => {
            tracing::warn!("an instance cannot be read: {error}");
            None
        }
    }
}
