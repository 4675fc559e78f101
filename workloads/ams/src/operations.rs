//! Operations: long work as a resource (ams-api section 3). The final state is in the store before anybody hears
//! of it, and stays there for a while, because clients look twice.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use fanlight_api::{
    InstanceId, OperationId,
    ams::{Operation, status},
};
use fanlight_store::{Handle, Op, StoreError, StoreExt as _, encode};
use serde_json::Value;

use crate::{
    core::{
        life,
        model::{Goal, InstanceRecord, OperationRecord, key},
        units::Units,
    },
    events::{Events, timestamp, unix_now},
    http::End,
};

tokio::task_local! {
    /// How the caller of the request at hand calls instances, where that is not `instances`.
    pub static CALLED: &'static str;
}

/// How long a finished operation is kept at least, seconds.
const KEEP_S: i64 = 600;
/// How long a unit may be away before what it worked on counts as lost, seconds.
const ORPHAN_S: i64 = 60;
/// How many finished operations are kept at least.
const KEEP: usize = 1000;

/// All operations. Clones are handles of the same.
#[derive(Clone)]
pub struct Operations {
    inner: Arc<Inner>,
}

struct Inner {
    unit: String,
    store: Handle,
    events: Events,
    /// Those that wait for something of an instance.
    pending: Mutex<HashMap<InstanceId, Vec<OperationId>>>,
}

impl Operations {
    /// Takes up what is in the store. What this unit was working on by itself when it ended has failed.
    ///
    /// # Errors
    /// The store cannot be read or written.
    pub async fn open(unit: &str, store: Handle, events: Events) -> Result<Self, StoreError> {
        let unit = unit.to_owned();
        let operations = Self { inner: Arc::new(Inner { unit, store, events, pending: Mutex::default() }) };
        for (_, record) in operations.inner.store.list_json::<OperationRecord>(key::OPERATIONS).await? {
            let record = record.value;
            match &record.goal {
                _ if record.operation.is_final() => {}
                Some(goal) => operations.wait_for(&goal.instance, &record.operation.id),
                None if record.unit.is_empty() || record.unit == operations.inner.unit => {
                    operations.finish(&record.operation.id, Err("AMS was restarted".into())).await?;
                }
                None => {}
            }
        }
        Ok(operations)
    }

    /// Ends what units worked on that are there no more.
    ///
    /// # Errors
    /// The store cannot be read or written.
    pub async fn end_orphans(&self, units: &Units, now: i64) -> Result<(), StoreError> {
        for (_, record) in self.inner.store.list_json::<OperationRecord>(key::OPERATIONS).await? {
            let record = record.value;
            let orphan = !record.operation.is_final()
                && record.goal.is_none()
                && !record.unit.is_empty()
                && !units.is_live(&record.unit)
                && record.at + ORPHAN_S < now;
            if orphan && units.is_ours(record.operation.id.as_str()) {
                let text = format!("the unit {} of AMS that worked on it is gone", record.unit);
                self.finish(&record.operation.id, Err(text)).await?;
            }
        }
        Ok(())
    }

    /// The store told of an operation, of this unit or of another: it is told on. Gives the instance that has to be
    /// looked at, because the operation waits for it.
    pub fn learn(&self, record: &OperationRecord) -> Option<InstanceId> {
        let waits = record.goal.as_ref().filter(|_| !record.operation.is_final());
        if let Some(goal) = waits {
            self.wait_for(&goal.instance, &record.operation.id);
        }
        self.inner.events.operation(&record.operation);
        waits.map(|goal| goal.instance.clone())
    }

    /// Instances that operations wait for, whether they are there or not.
    pub fn waited_for(&self) -> Vec<InstanceId> {
        self.pending().keys().cloned().collect()
    }

    fn pending(&self) -> MutexGuard<'_, HashMap<InstanceId, Vec<OperationId>>> {
        self.inner.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_for(&self, instance: &InstanceId, operation: &OperationId) {
        let mut pending = self.pending();
        let list = pending.entry(instance.clone()).or_default();
        if !list.contains(operation) {
            list.push(operation.clone());
        }
    }

    /// A new operation and the write that makes it last, for a transaction of the caller. Once that is through,
    /// the caller says so with [`Operations::begun`].
    pub fn prepare(
        &self,
        description: &str,
        kind: &str,
        url: &str,
        goal: Option<Goal>,
    ) -> (OperationRecord, Op) {
        let now = Some(timestamp(SystemTime::now()));
        let (kind, url) = match CALLED.try_with(|called| *called) {
            Ok(called) if kind == "instances" => {
                (called, url.replacen("/1.0/instances/", &format!("/1.0/{called}/"), 1))
            }
            _ => (kind, url.to_owned()),
        };
        let operation = Operation {
            id: uuid(),
            class: "task".into(),
            description: description.into(),
            created_at: now.clone(),
            updated_at: now,
            status: status::text(status::RUNNING).into(),
            status_code: status::RUNNING,
            resources: BTreeMap::from([(kind.to_owned(), vec![url])]),
            metadata: None,
            may_cancel: false,
            err: String::new(),
            server_address: String::new(),
        };
        let record = OperationRecord { operation, goal, unit: self.inner.unit.clone(), at: unix_now() };
        let op = put(&record);
        (record, op)
    }

    /// A new operation that is over already.
    pub fn prepare_done(
        &self,
        description: &str,
        kind: &str,
        url: &str,
        result: Result<(), String>,
    ) -> (OperationRecord, Op) {
        let (mut record, _) = self.prepare(description, kind, url, None);
        end(&mut record, result);
        let op = put(&record);
        (record, op)
    }

    /// The operation is in the store: wait for its goal. Who follows the store tells of it.
    pub fn begun(&self, record: &OperationRecord) {
        if let Some(goal) = record.goal.as_ref().filter(|_| !record.operation.is_final()) {
            self.wait_for(&goal.instance, &record.operation.id);
        }
    }

    /// A new operation of a program that runs in an instance. What opens its streams is no part of it.
    ///
    /// # Errors
    /// The store cannot be written.
    pub(crate) async fn begin_exec(&self, url: &str) -> Result<OperationRecord, StoreError> {
        let (mut record, _) = self.prepare("Running a program", "instances", url, None);
        record.operation.class = "websocket".into();
        record.operation.may_cancel = true;
        self.inner.store.transact(Vec::new(), vec![put(&record)]).await?;
        Ok(record)
    }

    /// The program has ended, or did not run.
    ///
    /// # Errors
    /// The store cannot be written.
    pub(crate) async fn end_exec(&self, id: &OperationId, how: End) -> Result<(), StoreError> {
        self.inner
            .store
            .update_json::<OperationRecord, _, _>(&key::operation(id), |record| {
                let mut record = record?;
                if !record.operation.is_final() {
                    let result = match &how {
                        End::Status(_) => Ok(()),
                        End::Cancelled => Err("Operation cancelled".into()),
                        End::Failed(text) => Err(text.clone()),
                    };
                    end(&mut record, result);
                    record.operation.metadata = how.metadata();
                    record.operation.may_cancel = false;
                    if matches!(how, End::Cancelled) {
                        record.operation.status_code = status::CANCELLED;
                        record.operation.status = status::text(status::CANCELLED).into();
                    }
                }
                Some(record)
            })
            .await?;
        Ok(())
    }

    /// Ends an operation. One that has ended already stays as it is.
    ///
    /// # Errors
    /// The store cannot be written.
    pub async fn finish(&self, id: &OperationId, result: Result<(), String>) -> Result<(), StoreError> {
        self.inner
            .store
            .update_json::<OperationRecord, _, _>(&key::operation(id), |record| {
                let mut record = record?;
                if !record.operation.is_final() {
                    end(&mut record, result.clone());
                }
                Some(record)
            })
            .await?;
        Ok(())
    }

    /// Ends what waited for the state an instance now has. None: it is gone.
    ///
    /// # Errors
    /// The store cannot be read or written; called again, it goes on.
    pub async fn settle(
        &self,
        instance: &InstanceId,
        record: Option<&InstanceRecord>,
    ) -> Result<(), StoreError> {
        let waiting = self.pending().get(instance).cloned().unwrap_or_default();
        for id in waiting {
            let stored = self.inner.store.get_json::<OperationRecord>(&key::operation(&id)).await?;
            let goal = stored.and_then(|stored| stored.value.goal);
            let result = match &goal {
                None => Some(Ok(())),
                Some(goal) => life::outcome(goal, record),
            };
            let Some(result) = result else { continue };
            self.finish(&id, result).await?;
            let mut pending = self.pending();
            if let Some(list) = pending.get_mut(instance) {
                list.retain(|other| *other != id);
                if list.is_empty() {
                    pending.remove(instance);
                }
            }
        }
        Ok(())
    }

    /// One operation.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn get(&self, id: &OperationId) -> Result<Option<Operation>, StoreError> {
        let record = self.inner.store.get_json::<OperationRecord>(&key::operation(id)).await?;
        Ok(record.map(|record| record.value.operation))
    }

    /// All operations, by lower-case status.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn list(&self) -> Result<BTreeMap<String, Vec<Operation>>, StoreError> {
        let mut map: BTreeMap<String, Vec<Operation>> = BTreeMap::new();
        for (_, record) in self.inner.store.list_json::<OperationRecord>(key::OPERATIONS).await? {
            let operation = record.value.operation;
            map.entry(operation.status.to_lowercase()).or_default().push(operation);
        }
        Ok(map)
    }

    /// Waits until an operation is final, at most `timeout` (none: for ever), and gives its state then.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn wait(
        &self,
        id: &OperationId,
        timeout: Option<Duration>,
    ) -> Result<Option<Operation>, StoreError> {
        let mut events = self.inner.events.subscribe();
        let deadline = timeout.map(|timeout| tokio::time::Instant::now() + timeout);
        loop {
            match self.get(id).await? {
                Some(operation) if !operation.is_final() => {}
                other => return Ok(other),
            }
            let relevant = async {
                loop {
                    match events.recv().await {
                        Ok(event) if event.metadata.get("id") == Some(&Value::from(id.as_str())) => return,
                        Ok(_) => {}
                        // Perhaps it was among what was missed.
                        Err(_) => return,
                    }
                }
            };
            match deadline {
                None => relevant.await,
                Some(deadline) => {
                    if tokio::time::timeout_at(deadline, relevant).await.is_err() {
                        return self.get(id).await;
                    }
                }
            }
        }
    }

    /// Removes old finished operations, but never the newest thousand.
    ///
    /// # Errors
    /// The store cannot be read or written.
    pub async fn prune(&self, now: i64) -> Result<(), StoreError> {
        let mut finished: Vec<(i64, String)> = self
            .inner
            .store
            .list_json::<OperationRecord>(key::OPERATIONS)
            .await?
            .into_iter()
            .filter(|(_, record)| record.value.operation.is_final())
            .map(|(key, record)| (record.value.at, key))
            .collect();
        finished.sort();
        let surplus = finished.len().saturating_sub(KEEP);
        let old: Vec<Op> = finished
            .into_iter()
            .take(surplus)
            .filter(|(at, _)| *at + KEEP_S < now)
            .map(|(_, key)| Op::delete(key))
            .collect();
        for part in old.chunks(fanlight_store::MAX_TRANSACTION_OPS) {
            self.inner.store.transact(Vec::new(), part.to_vec()).await?;
        }
        Ok(())
    }
}

fn put(record: &OperationRecord) -> Op {
    let key = key::operation(&record.operation.id);
    let bytes = encode(&key, record).expect("an operation is JSON");
    Op::put(key, bytes)
}

fn end(record: &mut OperationRecord, result: Result<(), String>) {
    let operation = &mut record.operation;
    let code = if result.is_ok() { status::SUCCESS } else { status::FAILURE };
    operation.status_code = code;
    operation.status = status::text(code).into();
    operation.err = result.err().unwrap_or_default();
    operation.updated_at = Some(timestamp(SystemTime::now()));
    record.at = unix_now();
}

/// A random UUID (RFC 9562, version 4).
fn uuid() -> OperationId {
    let mut bytes: [u8; 16] = rand::random();
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex = hex::encode(bytes);
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
        .parse()
        .expect("hexadecimal digits and dashes are allowed")
}
