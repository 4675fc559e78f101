//! The embedded store at work: one thread that takes transactions in order, makes whole batches of them last
//! with one fsync, and only then shows and acknowledges them.

use std::{
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError, RwLock, RwLockReadGuard,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use tokio::sync::{mpsc, oneshot, watch as signal};

use crate::{
    Committed, Compare, Entry, LeaseId, Op, Range, Revision, Store, StoreError,
    disk::Disk,
    state::{Deadlines, Pending, State},
    watch::{self, Watch, Watcher},
};

/// Most transactions that share an fsync.
const BATCH: usize = 256;
/// Least time from the start of one fsync to that of the next: under load, more transactions share one. A lone
/// transaction does not wait.
const FSYNC_PAUSE: Duration = Duration::from_millis(3);
/// Requests that wait for the thread; further callers wait for a place.
const QUEUE: usize = 1024;
/// A timer this late means that this process stood still; its leases then get their time again, because
/// nobody could keep them alive.
const STOOD_STILL: Duration = Duration::from_secs(1);
/// Least time between two looks for expired leases.
const EXPIRY_PAUSE: Duration = Duration::from_millis(100);

/// A store inside this process: in a file, or in memory for tests.
pub struct Embedded {
    shared: Arc<Shared>,
    requests: Mutex<Option<mpsc::Sender<Request>>>,
    ended: signal::Receiver<bool>,
}

struct Shared {
    state: Arc<RwLock<State>>,
    watchers: Mutex<Vec<Watcher>>,
    closed: AtomicBool,
}

type Answer<T> = oneshot::Sender<Result<T, StoreError>>;

enum Request {
    Transact { compares: Vec<Compare>, ops: Vec<Op>, answer: Answer<Revision> },
    Grant { ttl: Duration, answer: Answer<LeaseId> },
    KeepAlive { lease: LeaseId, answer: Answer<()> },
    Revoke { lease: LeaseId, answer: Answer<()> },
    Expire { due: Instant },
}

/// A request that was carried out and waits for the disk.
enum Done {
    Transact(Answer<Revision>, Result<Revision, StoreError>),
    Grant(Answer<LeaseId>, Result<LeaseId, StoreError>),
    Simple(Answer<()>, Result<(), StoreError>),
}

/// The shared state, for reading.
pub fn read(state: &RwLock<State>) -> RwLockReadGuard<'_, State> {
    // Writers change the state only by `State::apply`, which does not panic half-way.
    state.read().unwrap_or_else(PoisonError::into_inner)
}

impl Embedded {
    /// A store in a file, made when it is not there.
    ///
    /// # Errors
    /// The file is in use by another process, damaged, from a newer version, or cannot be written.
    pub async fn file(path: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let (answer, opened) = oneshot::channel();
        let store = Self::start(Some(Disk::new(path.into())), answer);
        opened.await.unwrap_or(Err(StoreError::Closed))?;
        Ok(store)
    }

    /// A store that lasts as long as its handles. Must be called inside a tokio runtime.
    pub fn memory() -> Self {
        Self::start(None, oneshot::channel().0)
    }

    fn start(disk: Option<Disk>, opened: Answer<()>) -> Self {
        let shared = Arc::new(Shared {
            state: Arc::default(),
            watchers: Mutex::default(),
            closed: AtomicBool::new(false),
        });
        let (requests, queue) = mpsc::channel(QUEUE);
        let (next_expiry, expiry) = signal::channel(None);
        let (end, ended) = signal::channel(false);
        tokio::spawn(expire(requests.downgrade(), expiry));
        let worker = Worker { shared: shared.clone(), disk, deadlines: Deadlines::default(), next_expiry };
        thread::Builder::new()
            .name("store".into())
            .spawn(move || {
                worker.run(queue, opened);
                end.send_replace(true);
            })
            .expect("the system can start a thread");
        Self { shared, requests: Mutex::new(Some(requests)), ended }
    }

    fn check_open(&self) -> Result<(), StoreError> {
        if self.shared.closed.load(Ordering::Acquire) { Err(StoreError::Closed) } else { Ok(()) }
    }

    async fn ask<T>(&self, request: impl FnOnce(Answer<T>) -> Request) -> Result<T, StoreError> {
        let requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let requests = requests.ok_or(StoreError::Closed)?;
        let (answer, answered) = oneshot::channel();
        requests.send(request(answer)).await.map_err(|_| StoreError::Closed)?;
        answered.await.unwrap_or(Err(StoreError::Closed))
    }
}

#[async_trait]
impl Store for Embedded {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        self.check_open()?;
        Ok(read(&self.shared.state).entries.get(key).map(|value| value.entry(key)))
    }

    async fn range(
        &self,
        prefix: &str,
        start_after: Option<&str>,
        limit: usize,
    ) -> Result<Range, StoreError> {
        self.check_open()?;
        Ok(read(&self.shared.state).range(prefix, start_after, limit))
    }

    async fn transact(&self, compares: Vec<Compare>, ops: Vec<Op>) -> Result<Committed, StoreError> {
        let revision = self.ask(|answer| Request::Transact { compares, ops, answer }).await?;
        Ok(Committed { revision })
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        self.ask(|answer| Request::Grant { ttl, answer }).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.ask(|answer| Request::KeepAlive { lease, answer }).await
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.ask(|answer| Request::Revoke { lease, answer }).await
    }

    async fn watch(&self, prefix: &str) -> Result<Watch, StoreError> {
        let (watcher, follower) = watch::pair(prefix, self.shared.state.clone());
        let mut watchers = self.shared.watchers.lock().unwrap_or_else(PoisonError::into_inner);
        // Under the lock, so that the end of the store either sees this watcher or is seen here.
        self.check_open()?;
        watchers.push(watcher);
        Ok(Watch::embedded(follower))
    }

    async fn members(&self) -> Result<u64, StoreError> {
        self.check_open()?;
        Ok(1)
    }

    async fn close(&self) {
        drop(self.requests.lock().unwrap_or_else(PoisonError::into_inner).take());
        let mut ended = self.ended.clone();
        // An error means that the thread is gone, which is what is waited for.
        let _ = ended.wait_for(|ended| *ended).await;
    }
}

/// Tells the thread when leases expire.
async fn expire(requests: mpsc::WeakSender<Request>, mut expiry: signal::Receiver<Option<Instant>>) {
    let mut asked: Option<Instant> = None;
    loop {
        let next = *expiry.borrow_and_update();
        let due = async {
            match next {
                Some(due) => {
                    // An expiry that the disk refuses is tried again, but not all the time.
                    let earliest = asked.map_or(due, |asked| due.max(asked + EXPIRY_PAUSE));
                    tokio::time::sleep_until(earliest.into()).await;
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = due => {
                let Some(requests) = requests.upgrade() else { return };
                let Some(due) = next else { continue };
                if requests.send(Request::Expire { due }).await.is_err() {
                    return;
                }
                drop(requests);
                asked = Some(Instant::now());
                // The thread always names a next time when it has expired something.
                if expiry.changed().await.is_err() {
                    return;
                }
            }
            changed = expiry.changed() => {
                if changed.is_err() {
                    return;
                }
            }
        }
    }
}

/// What the thread owns.
struct Worker {
    shared: Arc<Shared>,
    /// `None`: in memory.
    disk: Option<Disk>,
    deadlines: Deadlines,
    next_expiry: signal::Sender<Option<Instant>>,
}

impl Worker {
    fn run(mut self, mut queue: mpsc::Receiver<Request>, opened: Answer<()>) {
        let open = self.ensure_open();
        let failed = open.is_err();
        // Nobody listens when the store is in memory.
        let _ = opened.send(open);
        if !failed {
            self.next_expiry.send_replace(self.deadlines.next());
            let mut last: Option<Instant> = None;
            while let Some(first) = queue.blocking_recv() {
                if let Some(last) = last.filter(|_| self.disk.is_some()) {
                    thread::sleep(FSYNC_PAUSE.saturating_sub(last.elapsed()));
                }
                last = Some(Instant::now());
                let mut batch = vec![first];
                while batch.len() < BATCH
                    && let Ok(request) = queue.try_recv()
                {
                    batch.push(request);
                }
                self.work(batch);
            }
        }
        self.shared.closed.store(true, Ordering::Release);
        self.shared.watchers.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Opens the file if it is not open, and takes over what is in it: after a failed write nobody knows
    /// what of it lasts.
    fn ensure_open(&mut self) -> Result<(), StoreError> {
        let Some(disk) = self.disk.as_mut().filter(|disk| !disk.is_open()) else { return Ok(()) };
        let loaded = disk.open()?;
        let now = Instant::now();
        self.deadlines = Deadlines::default();
        for (lease, ttl) in &loaded.leases {
            self.deadlines.set(*lease, now + *ttl);
        }
        let mut state = self.shared.state.write().unwrap_or_else(PoisonError::into_inner);
        let changed = *state != loaded;
        *state = loaded;
        drop(state);
        if changed {
            for watcher in self.shared.watchers.lock().unwrap_or_else(PoisonError::into_inner).iter() {
                watcher.reset();
            }
        }
        Ok(())
    }

    fn work(&mut self, batch: Vec<Request>) {
        let done = match self.ensure_open() {
            Ok(()) => self.carry_out(batch),
            Err(error) => {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "the store cannot be opened again: {error}"
                );
                batch.into_iter().filter_map(|request| request.refuse(&error)).collect()
            }
        };
        self.next_expiry.send_replace(self.deadlines.next());
        for done in done {
            done.tell();
        }
    }

    fn carry_out(&mut self, batch: Vec<Request>) -> Vec<Done> {
        let state = read(&self.shared.state);
        let mut pending = state.pending();
        let mut done = Vec::with_capacity(batch.len());
        let now = Instant::now();
        for request in batch {
            match request {
                Request::Transact { compares, ops, answer } => {
                    done.push(Done::Transact(answer, pending.transact(&state, &compares, ops)));
                }
                Request::Grant { ttl, answer } => done.push(Done::Grant(answer, pending.grant(ttl))),
                Request::KeepAlive { lease, answer } => {
                    let ttl = pending.leases.get(&lease).copied();
                    let ttl = ttl.unwrap_or_else(|| state.leases.get(&lease).copied());
                    if let Some(ttl) = ttl {
                        self.deadlines.set(lease, now + ttl);
                    }
                    done.push(Done::Simple(answer, ttl.map(|_| ()).ok_or(StoreError::NoLease(lease))));
                }
                Request::Revoke { lease, answer } => {
                    pending.end_leases(&state, &[lease]);
                    done.push(Done::Simple(answer, Ok(())));
                }
                Request::Expire { due } if now.saturating_duration_since(due) > STOOD_STILL => {
                    tracing::warn!("this process stood still; all leases of the store get their time again");
                    for (lease, ttl) in &state.leases {
                        self.deadlines.set(*lease, now + *ttl);
                    }
                }
                Request::Expire { .. } => pending.end_leases(&state, &self.deadlines.expired(now)),
            }
        }
        drop(state);
        if pending.is_empty() {
            return done;
        }
        if let Some(disk) = &mut self.disk
            && let Err(error) = disk.commit(&pending)
        {
            tracing::error!(error = &error as &dyn std::error::Error, "the store cannot be written: {error}");
            return done.into_iter().map(|done| done.failed(&error)).collect();
        }
        self.show(pending, now);
        done
    }

    /// Shows changes that last.
    fn show(&mut self, pending: Pending, now: Instant) {
        for (lease, ttl) in &pending.leases {
            match ttl {
                Some(ttl) => self.deadlines.set(*lease, now + *ttl),
                None => self.deadlines.remove(*lease),
            }
        }
        let mut changes: Vec<_> = pending.entries.clone().into_iter().collect();
        changes.sort_by_key(|(_, (revision, _))| *revision);
        self.shared.state.write().unwrap_or_else(PoisonError::into_inner).apply(pending);
        let mut watchers = self.shared.watchers.lock().unwrap_or_else(PoisonError::into_inner);
        watchers.retain(|watcher| watcher.tell(&changes));
    }
}

impl Request {
    fn refuse(self, error: &StoreError) -> Option<Done> {
        let error = error.clone();
        Some(match self {
            Self::Transact { answer, .. } => Done::Transact(answer, Err(error)),
            Self::Grant { answer, .. } => Done::Grant(answer, Err(error)),
            Self::KeepAlive { answer, .. } | Self::Revoke { answer, .. } => Done::Simple(answer, Err(error)),
            Self::Expire { .. } => return None,
        })
    }
}

impl Done {
    /// The disk failed: whatever would have been the answer, this is it. Also for those that were refused,
    /// because they may have been refused for something that now did not happen.
    fn failed(self, error: &StoreError) -> Self {
        let error = error.clone();
        match self {
            Self::Transact(answer, _) => Self::Transact(answer, Err(error)),
            Self::Grant(answer, _) => Self::Grant(answer, Err(error)),
            Self::Simple(answer, _) => Self::Simple(answer, Err(error)),
        }
    }

    fn tell(self) {
        // Whoever asked may have gone.
        match self {
            Self::Transact(answer, result) => drop(answer.send(result)),
            Self::Grant(answer, result) => drop(answer.send(result)),
            Self::Simple(answer, result) => drop(answer.send(result)),
        }
    }
}
