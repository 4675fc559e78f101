//! The store on an etcd cluster.
//!
//! One client per member, and one member that all calls go to until it fails; then the next one is taken. So it is
//! known for each failure which member it was and whether the request can have been carried out: what was surely not
//! carried out, and whatever may happen twice, is tried again on the other members for a few seconds; a transaction
//! whose outcome is unknown is not.
//!
//! A watch is a task that follows the cluster from revision to revision, over as many connections as it takes, and
//! fills a queue of bounded length. Rules that all stores share (`state::check`) are checked here too, so that the
//! stores refuse the same things in the same words.

use std::{
    collections::{BTreeMap, hash_map::RandomState},
    error::Error as _,
    fmt::Display,
    future::Future,
    hash::BuildHasher,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use etcd_client::{
    Certificate, Client, ClusterClient, CompareOp, ConnectOptions, Error, EventType, GetOptions, Identity,
    KeyValue, KvClient, LeaseClient, PutOptions, TlsOptions, Txn, TxnOp, WatchClient, WatchOptions,
    WatchResponse, WatchStream,
};
use tokio::{
    sync::{Mutex, mpsc, watch as signal},
    time::Instant,
};
use tonic::{Code, ConnectError, Status};

use crate::{
    Committed, Compare, Entry, Event, LeaseId, Op, Range, Store, StoreConfig, StoreError,
    state::{check, check_ttl},
    watch::{QUEUE, Watch},
};

/// How long a call may take, over all members together.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a member may take before the others are asked instead.
const MEMBER_PATIENCE: Duration = Duration::from_secs(2);
/// How long a member may take to accept a connection.
const CONNECT_PATIENCE: Duration = Duration::from_secs(1);
/// A connection with open calls on which nothing comes for this long is probed. Etcd takes probes more often than every
/// five seconds for an attack.
const PROBE_INTERVAL: Duration = Duration::from_secs(6);
/// How long the answer to a probe may take.
const PROBE_PATIENCE: Duration = Duration::from_secs(2);
/// Pauses after all members were asked in vain.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_PAUSE: Duration = Duration::from_secs(1);
/// Entries that are read at once.
const PAGE: usize = 500;
/// Largest answer that is taken. A page that is larger is read in smaller parts.
const MAX_ANSWER_BYTES: usize = 32 * 1024 * 1024;
/// How often a range is read again from its beginning because its revision was compacted away meanwhile.
const RANGE_ATTEMPTS: usize = 5;

/// A store on the members of an etcd cluster.
pub struct Etcd {
    cluster: Arc<Cluster>,
}

/// What calls and watches share.
struct Cluster {
    /// All keys of ours begin with this.
    root: String,
    access: Access,
    members: Vec<Member>,
    /// Index of the member that calls go to.
    current: AtomicUsize,
    /// `store.url`, for errors.
    url: String,
    closed: signal::Sender<bool>,
}

struct Member {
    url: String,
    /// `None`: to be made, also again after a connection failed, so that renewed certificates are taken.
    clients: Mutex<Option<Arc<Clients>>>,
    /// Whether it ever let us in.
    answered: AtomicBool,
}

struct Clients {
    kv: KvClient,
    lease: LeaseClient,
    watch: WatchClient,
    cluster: ClusterClient,
}

/// How to get in.
struct Access {
    tls: bool,
    ca: PathBuf,
    certificate: PathBuf,
    key: PathBuf,
    user: String,
    password_file: PathBuf,
}

/// Why a call failed.
enum Failure {
    /// The revision that was asked for is gone.
    Compacted,
    /// The answer is larger than what is taken.
    TooLarge,
    NoLease,
    /// The database of the cluster has reached its quota.
    Full,
    Store(StoreError),
}

/// What a failed attempt means.
enum Verdict {
    /// It was surely not carried out; another member, or this one a little later, may do it. In words.
    NotDone(String),
    /// Nobody knows whether it was carried out. In words.
    Unknown(String),
    /// No member would do it.
    Final(Failure),
    /// We are not let in.
    Access(String),
}

/// Whether a request may be carried out twice.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Repeat {
    Yes,
    No,
}

impl Etcd {
    /// # Errors
    /// A file of the settings cannot be read, the members cannot be reached, or they do not let us in.
    pub async fn connect(config: &StoreConfig, members: &[String], tls: bool) -> Result<Self, StoreError> {
        // The library takes the process-wide provider; where a main has installed one already, that one stays.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let access = Access {
            tls,
            ca: config.ca.clone(),
            certificate: config.certificate.clone(),
            key: config.key.clone(),
            user: config.user.clone(),
            password_file: config.password_file.clone(),
        };
        // Read again for each connection; a first look here makes a wrong path an error of the start.
        access.options()?;
        let scheme = if tls { "https" } else { "http" };
        let members: Vec<Member> = members
            .iter()
            .map(|member| Member {
                url: format!("{scheme}://{member}"),
                clients: Mutex::default(),
                answered: AtomicBool::new(false),
            })
            .collect();
        // Somewhere, so that many programs with the same settings do not all go to the same member.
        let first = RandomState::new().hash_one(std::process::id()) as usize % members.len();
        let cluster = Arc::new(Cluster {
            root: config.prefix.clone(),
            access,
            members,
            current: AtomicUsize::new(first),
            url: config.url.clone(),
            closed: signal::Sender::new(false),
        });
        let store = Self { cluster };
        // Whether we are let in, and may read what is ours.
        store.get("").await?;
        Ok(store)
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        // Else the watches that somebody still holds would go on.
        self.cluster.closed.send_replace(true);
    }
}

impl Access {
    fn options(&self) -> Result<ConnectOptions, StoreError> {
        let given = |path: &Path| !path.as_os_str().is_empty();
        // With a leader required, a member that is cut off from the others says so instead of waiting.
        let mut options = ConnectOptions::new()
            .with_connect_timeout(CONNECT_PATIENCE)
            .with_keep_alive(PROBE_INTERVAL, PROBE_PATIENCE)
            .with_keep_alive_while_idle(false)
            .with_require_leader(true);
        if self.tls {
            let mut tls = TlsOptions::new();
            tls = if given(&self.ca) {
                tls.ca_certificate(Certificate::from_pem(read_file("store.ca", &self.ca)?))
            } else {
                tls.with_native_roots()
            };
            if given(&self.certificate) {
                let certificate = read_file("store.certificate", &self.certificate)?;
                let key = read_file("store.key", &self.key)?;
                tls = tls.identity(Identity::from_pem(certificate, key));
            }
            options = options.with_tls(tls);
        }
        if !self.user.is_empty() {
            let password = read_file("store.password_file", &self.password_file)?;
            options = options
                .with_user(self.user.clone(), String::from_utf8_lossy(&password).trim())
                .with_auto_token_refresh(true);
        }
        Ok(options)
    }
}

fn read_file(key: &'static str, path: &Path) -> Result<Vec<u8>, StoreError> {
    std::fs::read(path).map_err(|source| StoreError::File {
        key,
        path: path.to_owned(),
        source: Arc::new(source),
    })
}

impl Cluster {
    fn check_open(&self) -> Result<(), StoreError> {
        if *self.closed.borrow() { Err(StoreError::Closed) } else { Ok(()) }
    }

    fn unavailable(&self, reason: impl Into<String>, unknown: bool) -> StoreError {
        StoreError::Unavailable { endpoints: self.url.clone(), reason: reason.into(), unknown }
    }

    /// The failure of a call whose failures mean nothing in particular.
    fn error(&self, failure: Failure) -> StoreError {
        match failure {
            Failure::Store(error) => error,
            Failure::NoLease => StoreError::NoLease(0),
            Failure::Full => StoreError::Full { path: PathBuf::from(&self.url) },
            Failure::Compacted => {
                self.unavailable("what was read was compacted away at the same time, again and again", false)
            }
            Failure::TooLarge => {
                self.unavailable(format!("an entry is larger than {MAX_ANSWER_BYTES} bytes"), false)
            }
        }
    }

    /// The clients of a member; made when there are none.
    async fn clients(&self, index: usize) -> Result<Arc<Clients>, Verdict> {
        let member = &self.members[index];
        let mut slot = member.clients.lock().await;
        if let Some(clients) = &*slot {
            return Ok(clients.clone());
        }
        let words = |error: StoreError| {
            Verdict::NotDone(error.source().map_or(error.to_string(), |source| format!("{error}: {source}")))
        };
        let options = self.access.options().map_err(words)?;
        let client =
            Client::connect([&member.url], Some(options)).await.map_err(|error| match verdict(&error) {
                // Nothing but a login was sent.
                Verdict::Unknown(reason) => Verdict::NotDone(reason),
                verdict => verdict,
            })?;
        let clients = Arc::new(Clients {
            kv: client.kv_client().max_decoding_message_size(MAX_ANSWER_BYTES),
            lease: client.lease_client(),
            watch: client.watch_client().max_decoding_message_size(MAX_ANSWER_BYTES),
            cluster: client.cluster_client(),
        });
        *slot = Some(clients.clone());
        Ok(clients)
    }

    /// Makes the next connection to a member a new one altogether: with the certificates as they are then, and a
    /// new login.
    async fn forget(&self, index: usize, clients: &Arc<Clients>) {
        let mut slot = self.members[index].clients.lock().await;
        if slot.as_ref().is_some_and(|current| Arc::ptr_eq(current, clients)) {
            *slot = None;
        }
    }

    /// Has the calls after this one go to the next member, unless they do already.
    fn leave(&self, index: usize) {
        let next = (index + 1) % self.members.len();
        let left = self.current.compare_exchange(index, next, Ordering::AcqRel, Ordering::Acquire).is_ok()
            && next != index;
        if left {
            tracing::info!(
                from = self.members[index].url,
                to = self.members[next].url,
                "the store goes on with its member {}",
                self.members[next].url
            );
        }
    }

    /// Carries out a request on some member.
    async fn call<T, F, R>(&self, repeat: Repeat, request: F) -> Result<T, Failure>
    where
        F: Fn(Arc<Clients>) -> R,
        R: Future<Output = Result<T, Error>>,
    {
        self.check_open().map_err(Failure::Store)?;
        let deadline = Instant::now() + PATIENCE;
        let mut reasons = Reasons::default();
        let mut pause = FIRST_PAUSE;
        for attempt in 1.. {
            let index = self.current.load(Ordering::Acquire);
            let reason = match self.attempt(index, repeat, deadline, &request).await {
                Ok(value) => return Ok(value),
                Err(Verdict::Final(failure)) => return Err(failure),
                Err(Verdict::Access(reason)) => {
                    reasons.add(&self.members[index].url, reason);
                    return Err(Failure::Store(self.unavailable(reasons.text(), false)));
                }
                Err(Verdict::Unknown(reason)) if repeat == Repeat::No => {
                    self.leave(index);
                    reasons.add(&self.members[index].url, reason);
                    return Err(Failure::Store(self.unavailable(reasons.text(), true)));
                }
                Err(Verdict::NotDone(reason) | Verdict::Unknown(reason)) => reason,
            };
            self.leave(index);
            reasons.add(&self.members[index].url, reason);
            if attempt % self.members.len() == 0 {
                tokio::time::sleep_until((Instant::now() + pause).min(deadline)).await;
                pause = (pause * 2).min(LAST_PAUSE);
            }
            if Instant::now() >= deadline {
                break;
            }
            self.check_open().map_err(Failure::Store)?;
        }
        Err(Failure::Store(self.unavailable(reasons.text(), false)))
    }

    async fn attempt<T, F, R>(
        &self,
        index: usize,
        repeat: Repeat,
        deadline: Instant,
        request: &F,
    ) -> Result<T, Verdict>
    where
        F: Fn(Arc<Clients>) -> R,
        R: Future<Output = Result<T, Error>>,
    {
        let started = Instant::now();
        let slow = deadline.min(started + MEMBER_PATIENCE);
        let waited = || format!("no answer within {:.1} s", started.elapsed().as_secs_f64());
        let clients = tokio::time::timeout_at(slow, self.clients(index))
            .await
            .unwrap_or_else(|_| Err(Verdict::NotDone(waited())))?;
        let mut answer = std::pin::pin!(request(clients.clone()));
        let answered = match tokio::time::timeout_at(slow, &mut answer).await {
            Ok(answered) => answered,
            Err(_) if repeat == Repeat::Yes => return Err(Verdict::Unknown(waited())),
            Err(_) => {
                // Others need not wait for this member; this request does, because only its answer says whether
                // it was carried out.
                self.leave(index);
                tokio::time::timeout_at(deadline, answer).await.map_err(|_| Verdict::Unknown(waited()))?
            }
        };
        let member = &self.members[index];
        match answered {
            Ok(value) => {
                member.answered.store(true, Ordering::Relaxed);
                Ok(value)
            }
            Err(error) => {
                if needs_new_client(&error) {
                    self.forget(index, &clients).await;
                }
                Err(match verdict(&error) {
                    // A refused certificate shows only after the connection was made, as its end.
                    Verdict::Unknown(reason) if !member.answered.load(Ordering::Relaxed) => {
                        let what = match (self.access.tls, self.access.certificate.as_os_str().is_empty()) {
                            (false, _) => "wants TLS (`etcds://`)",
                            (true, true) => "wants a certificate of ours (store.certificate)",
                            (true, false) => "does not accept our certificate (store.certificate)",
                        };
                        Verdict::Unknown(format!("{reason}; this is what a member does that {what}"))
                    }
                    verdict => verdict,
                })
            }
        }
    }

    fn key(&self, key: &str) -> Vec<u8> {
        format!("{}{key}", self.root).into_bytes()
    }

    /// The entry that etcd tells; `None` when its key is not one that a program of ours wrote.
    fn entry(&self, pair: KeyValue) -> Option<Entry> {
        let (revision, created, lease) = (pair.mod_revision(), pair.create_revision(), pair.lease());
        let (key, value) = pair.into_key_value();
        let key = self.own_key(key)?;
        Some(Entry {
            key,
            value: Bytes::from(value),
            revision: number(revision),
            created: number(created),
            lease: (lease != 0).then_some(lease as u64),
        })
    }

    fn own_key(&self, key: Vec<u8>) -> Option<String> {
        let text = String::from_utf8(key).ok();
        let own = text.as_deref().and_then(|text| text.strip_prefix(&self.root)).map(str::to_owned);
        if own.is_none() {
            tracing::warn!("a key under {} is no text and therefore not ours; it is left alone", self.root);
        }
        own
    }

    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        let answer = self.call(Repeat::Yes, |clients| async move {
            let mut kv = clients.kv.clone();
            kv.get(self.key(key), None).await
        });
        let mut answer = answer.await.map_err(|failure| self.error(failure))?;
        Ok(answer.take_kvs().pop().and_then(|pair| self.entry(pair)))
    }

    async fn range(
        &self,
        prefix: &str,
        start_after: Option<&str>,
        limit: usize,
    ) -> Result<Shown, StoreError> {
        for _ in 0..RANGE_ATTEMPTS {
            match self.range_once(prefix, start_after, limit).await {
                Err(Failure::Compacted) => {}
                other => return other.map_err(|failure| self.error(failure)),
            }
        }
        Err(self.error(Failure::Compacted))
    }

    /// Reads page by page, all of them at the revision of the first.
    async fn range_once(
        &self,
        prefix: &str,
        start_after: Option<&str>,
        limit: usize,
    ) -> Result<Shown, Failure> {
        let end = end_of(self.key(prefix));
        let mut start = match start_after {
            Some(after) if after >= prefix => behind(self.key(after)),
            _ => self.key(prefix),
        };
        // Behind the last key of the prefix there is nothing; etcd would take such a range for a mistake.
        let outside = start >= end;
        if outside {
            start = self.key(prefix);
        }
        let mut shown = Shown::default();
        let mut page = PAGE;
        loop {
            // Etcd takes 0 for "all", so that of nothing one is read and left out.
            let wanted = (limit - shown.entries.len()).clamp(1, page);
            let mut options = GetOptions::new()
                .with_range(end.clone())
                .with_limit(i64::try_from(wanted).unwrap_or(i64::MAX))
                .with_revision(shown.revision);
            if limit == 0 || outside {
                options = options.with_keys_only();
            }
            let answer = self
                .call(Repeat::Yes, |clients| {
                    let (start, options) = (start.clone(), options.clone());
                    async move {
                        let mut kv = clients.kv.clone();
                        kv.get(start, Some(options)).await
                    }
                })
                .await;
            let mut answer = match answer {
                Err(Failure::TooLarge) if page > 1 => {
                    page = (page / 8).max(1);
                    continue;
                }
                answer => answer?,
            };
            if let Some(header) = answer.header().filter(|_| shown.revision == 0) {
                shown.revision = header.revision();
                shown.cluster = header.cluster_id();
            }
            let more = answer.more();
            let pairs = answer.take_kvs();
            if limit == 0 || outside {
                shown.more = !outside && !pairs.is_empty();
                return Ok(shown);
            }
            let last = pairs.last().map(|pair| pair.key().to_vec());
            shown.entries.extend(pairs.into_iter().filter_map(|pair| self.entry(pair)));
            shown.more = more;
            match last {
                Some(last) if more && shown.entries.len() < limit => start = behind(last),
                _ => return Ok(shown),
            }
        }
    }
}

/// Part of the keys of a prefix, as one member shows it.
#[derive(Default)]
struct Shown {
    entries: Vec<Entry>,
    revision: i64,
    more: bool,
    /// Which cluster this is: one that was restored from a backup is another one.
    cluster: u64,
}

/// Etcd counts with signed numbers that are never negative.
fn number(revision: i64) -> u64 {
    u64::try_from(revision).unwrap_or(0)
}

/// The first key that does not begin with this one.
fn end_of(mut key: Vec<u8>) -> Vec<u8> {
    // No byte of a text is 255.
    if let Some(last) = key.last_mut() {
        *last += 1;
    }
    key
}

/// The first key behind this one.
fn behind(mut key: Vec<u8>) -> Vec<u8> {
    key.push(0);
    key
}

/// What each member did, in words; the latest only.
#[derive(Default)]
struct Reasons(BTreeMap<String, String>);

impl Reasons {
    fn add(&mut self, member: &str, reason: impl Display) {
        self.0.insert(member.to_owned(), reason.to_string());
    }

    fn text(&self) -> String {
        let all: Vec<String> = self.0.iter().map(|(member, reason)| format!("{member}: {reason}")).collect();
        all.join("; ")
    }
}

fn status(error: &Error) -> Option<&Status> {
    match error {
        Error::GRpcStatus(status) => Some(status),
        _ => None,
    }
}

/// No connection could be made, so that nothing was sent.
fn not_connected(status: &Status) -> bool {
    let mut source = status.source();
    while let Some(error) = source {
        if error.is::<ConnectError>() {
            return true;
        }
        source = error.source();
    }
    status.message().starts_with("Service was not ready")
}

/// Rights changed since the login: what was sent was refused, and a new login is needed.
fn outdated_login(status: &Status) -> bool {
    ["etcdserver: revision of auth store is old", "etcdserver: invalid auth token"]
        .contains(&status.message())
}

fn needs_new_client(error: &Error) -> bool {
    status(error).is_some_and(|status| not_connected(status) || outdated_login(status))
}

/// The innermost cause, which is what says something.
fn cause(error: &(dyn std::error::Error + 'static)) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}

fn words(status: &Status) -> String {
    let text = match status.source() {
        Some(source) => cause(source),
        None => status.message().to_owned(),
    };
    match text.as_str() {
        "" => format!("the request ended with code {:?}", status.code()),
        "etcdserver: no leader" => "this member has no leader: too few members can reach each other".into(),
        text => text.strip_prefix("etcdserver: ").unwrap_or(text).to_owned(),
    }
}

/// Etcd's errors are known by their texts: several share a code, and the texts are part of its interface.
fn verdict(error: &Error) -> Verdict {
    let status = match error {
        Error::GRpcStatus(status) => status,
        // The library says it in this way when the time left is none.
        Error::LeaseKeepAliveError(_) => return Verdict::Final(Failure::NoLease),
        // Made before anything is sent: the certificates or addresses are not usable.
        Error::TransportError(error) => {
            let text = "store.ca, store.certificate and store.key cannot be used";
            return Verdict::NotDone(format!("{text}: {}", cause(error)));
        }
        Error::InvalidArgs(_) | Error::InvalidUri(_) => return Verdict::NotDone(error.to_string()),
        other => return Verdict::Unknown(other.to_string()),
    };
    if not_connected(status) {
        return Verdict::NotDone(words(status));
    }
    let text = status.message();
    match text {
        "etcdserver: no leader" | "etcdserver: too many requests" | "raft proposal dropped" => {
            return Verdict::NotDone(words(status));
        }
        "etcdserver: requested lease not found" => return Verdict::Final(Failure::NoLease),
        "etcdserver: mvcc: required revision has been compacted" => {
            return Verdict::Final(Failure::Compacted);
        }
        "etcdserver: mvcc: database space exceeded" => {
            return Verdict::Final(Failure::Full);
        }
        "etcdserver: request is too large" | "etcdserver: too many operations in txn request" => {
            return Verdict::Final(Failure::Store(StoreError::Invalid(words(status))));
        }
        _ if text.contains("decoded message length too large") => return Verdict::Final(Failure::TooLarge),
        _ if outdated_login(status) => return Verdict::NotDone(words(status)),
        _ => {}
    }
    match status.code() {
        // Also a missing or wrong login is an invalid argument for etcd.
        Code::PermissionDenied
        | Code::Unauthenticated
        | Code::InvalidArgument
        | Code::FailedPrecondition
        | Code::Unimplemented => Verdict::Access(words(status)),
        _ => Verdict::Unknown(words(status)),
    }
}

#[async_trait]
impl Store for Etcd {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        self.cluster.get(key).await
    }

    async fn range(
        &self,
        prefix: &str,
        start_after: Option<&str>,
        limit: usize,
    ) -> Result<Range, StoreError> {
        let shown = self.cluster.range(prefix, start_after, limit).await?;
        Ok(Range { entries: shown.entries, revision: number(shown.revision), more: shown.more })
    }

    async fn transact(&self, compares: Vec<Compare>, ops: Vec<Op>) -> Result<Committed, StoreError> {
        let cluster = &self.cluster;
        cluster.check_open()?;
        check(&compares, &ops)?;
        let mut leases: Vec<LeaseId> = ops
            .iter()
            .filter_map(|op| match op {
                Op::Put { lease, .. } => *lease,
                Op::Delete { .. } => None,
            })
            .collect();
        leases.dedup();
        // Etcd takes 0 for "none" in both places.
        if compares.iter().any(|compare| matches!(compare, Compare::Revision { revision: 0, .. })) {
            return Err(StoreError::Conflict);
        }
        if leases.contains(&0) {
            return Err(StoreError::NoLease(0));
        }
        let compares: Vec<_> = compares
            .into_iter()
            .map(|compare| {
                let key = cluster.key(compare.key());
                match compare {
                    Compare::Revision { revision, .. } => etcd_client::Compare::mod_revision(
                        key,
                        CompareOp::Equal,
                        i64::try_from(revision).unwrap_or(i64::MAX),
                    ),
                    Compare::Absent { .. } => etcd_client::Compare::create_revision(key, CompareOp::Equal, 0),
                    Compare::Value { value, .. } => {
                        etcd_client::Compare::value(key, CompareOp::Equal, value.to_vec())
                    }
                }
            })
            .collect();
        let ops: Vec<_> = ops
            .into_iter()
            .map(|op| {
                let key = cluster.key(op.key());
                match op {
                    Op::Put { value, lease, .. } => {
                        let options = lease.map(|lease| PutOptions::new().with_lease(lease as i64));
                        TxnOp::put(key, value.to_vec(), options)
                    }
                    Op::Delete { .. } => TxnOp::delete(key, None),
                }
            })
            .collect();
        let transaction = Txn::new().when(compares).and_then(ops);
        let answer = cluster
            .call(Repeat::No, |clients| {
                let transaction = transaction.clone();
                async move {
                    let mut kv = clients.kv.clone();
                    kv.txn(transaction).await
                }
            })
            .await;
        let answer = match answer {
            Ok(answer) => answer,
            Err(Failure::NoLease) => return Err(self.missing_lease(&leases).await),
            Err(failure) => return Err(cluster.error(failure)),
        };
        if !answer.succeeded() {
            return Err(StoreError::Conflict);
        }
        Ok(Committed { revision: number(answer.header().map_or(0, |header| header.revision())) })
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        self.cluster.check_open()?;
        check_ttl(ttl)?;
        let seconds = i64::try_from(ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0)).unwrap_or(i64::MAX);
        // A lease that was granted and whose answer was lost is held by nobody and expires.
        let granted = self.cluster.call(Repeat::Yes, |clients| async move {
            let mut lease = clients.lease.clone();
            lease.grant(seconds, None).await
        });
        let granted = granted.await.map_err(|failure| self.cluster.error(failure))?;
        Ok(granted.id() as u64)
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        let kept = self.cluster.call(Repeat::Yes, |clients| async move {
            let mut client = clients.lease.clone();
            client.keep_alive(lease as i64).await
        });
        match kept.await {
            Ok(_) => Ok(()),
            Err(Failure::NoLease) => Err(StoreError::NoLease(lease)),
            Err(failure) => Err(self.cluster.error(failure)),
        }
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        let revoked = self.cluster.call(Repeat::Yes, |clients| async move {
            let mut client = clients.lease.clone();
            client.revoke(lease as i64).await
        });
        match revoked.await {
            Ok(_) | Err(Failure::NoLease) => Ok(()),
            Err(failure) => Err(self.cluster.error(failure)),
        }
    }

    async fn watch(&self, prefix: &str) -> Result<Watch, StoreError> {
        let shown = self.cluster.range(prefix, None, usize::MAX).await?;
        let (queue, events) = mpsc::channel(QUEUE);
        let closed = self.cluster.closed.subscribe();
        let mut follower =
            Follower { cluster: self.cluster.clone(), prefix: prefix.into(), queue, place: Place::default() };
        follower.reset(shown);
        tokio::spawn(async move { follower.run(closed).await });
        Ok(Watch::queue(events))
    }

    async fn members(&self) -> Result<u64, StoreError> {
        let answer = self.cluster.call(Repeat::Yes, |clients| async move {
            let mut cluster = clients.cluster.clone();
            cluster.member_list().await
        });
        let answer = answer.await.map_err(|failure| self.cluster.error(failure))?;
        Ok(answer.members().len() as u64)
    }

    async fn close(&self) {
        self.cluster.closed.send_replace(true);
        for member in &self.cluster.members {
            // Connections end with their last clients; calls under way end by themselves.
            *member.clients.lock().await = None;
        }
    }
}

impl Etcd {
    /// Which of the leases of a refused transaction is gone; etcd does not say.
    async fn missing_lease(&self, leases: &[LeaseId]) -> StoreError {
        for lease in leases.iter().filter(|_| leases.len() > 1) {
            let left = self.cluster.call(Repeat::Yes, |clients| async move {
                let mut client = clients.lease.clone();
                client.time_to_live(*lease as i64, None).await
            });
            match left.await {
                Ok(left) if left.ttl() > 0 => {}
                Ok(_) | Err(Failure::NoLease) => return StoreError::NoLease(*lease),
                Err(failure) => return self.cluster.error(failure),
            }
        }
        StoreError::NoLease(leases.first().copied().unwrap_or(0))
    }
}

/// The task behind a watch.
struct Follower {
    cluster: Arc<Cluster>,
    prefix: String,
    queue: mpsc::Sender<Vec<Event>>,
    place: Place,
}

/// How far a watch has come: `told` events of `revision`, and all before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Place {
    cluster: u64,
    revision: i64,
    told: usize,
}

/// Why a watch must begin anew.
enum Break {
    /// The connection is gone; the next one goes on where this one ended.
    Connection(String),
    /// Changes are missing: the state must be read again.
    State(String),
    /// The reader does not keep up.
    Behind,
}

impl Follower {
    async fn run(mut self, mut closed: signal::Receiver<bool>) {
        let queue = self.queue.clone();
        tokio::select! {
            // In this order: what is told after the end is of no use.
            biased;
            // An error means that the store itself is gone.
            _ = closed.wait_for(|closed| *closed) => {}
            () = queue.closed() => {}
            () = self.follow() => {}
        }
    }

    async fn follow(&mut self) {
        let mut pause = FIRST_PAUSE;
        loop {
            let before = self.place;
            let index = self.cluster.current.load(Ordering::Acquire);
            let broken = match self.stream(index).await {
                Ok(stream) => self.follow_stream(stream).await,
                Err(broken) => broken,
            };
            if self.place != before {
                pause = FIRST_PAUSE;
            }
            let read_again = match broken {
                Break::Connection(reason) => {
                    let (prefix, member) = (&self.prefix, &self.cluster.members[index].url);
                    tracing::info!(prefix, "a watch of the store lost its member {member}: {reason}");
                    self.cluster.leave(index);
                    false
                }
                Break::State(reason) => {
                    tracing::info!(self.prefix, "a watch of the store reads its state again: {reason}");
                    true
                }
                Break::Behind => true,
            };
            if read_again {
                // All places: once the reader has taken everything, so that it is not behind again at once. There is
                // no error while `self` holds the queue, other than that nobody reads any more.
                if self.queue.reserve_many(QUEUE).await.is_err() {
                    return;
                }
                while let Err(error) = self.read_again().await {
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        "a watch of the store cannot read its state: {error}"
                    );
                    tokio::time::sleep(LAST_PAUSE).await;
                }
            } else {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LAST_PAUSE);
            }
        }
    }

    async fn read_again(&mut self) -> Result<(), StoreError> {
        let shown = self.cluster.range(&self.prefix, None, usize::MAX).await?;
        self.reset(shown);
        Ok(())
    }

    /// Only called while the queue is empty.
    fn reset(&mut self, shown: Shown) {
        self.place = Place { cluster: shown.cluster, revision: shown.revision, told: 0 };
        // An error means that nobody reads any more, which the task notices by itself.
        let reset = Event::Reset { entries: shown.entries, revision: number(shown.revision) };
        let _ = self.queue.try_send(vec![reset]);
    }

    async fn stream(&self, index: usize) -> Result<WatchStream, Break> {
        let connection = |verdict: Verdict| match verdict {
            Verdict::NotDone(reason) | Verdict::Unknown(reason) | Verdict::Access(reason) => {
                Break::Connection(reason)
            }
            Verdict::Final(Failure::Compacted) => Break::State("its revision was compacted away".into()),
            Verdict::Final(_) => Break::Connection("the member refuses it".into()),
        };
        let open = async {
            let clients = self.cluster.clients(index).await.map_err(connection)?;
            // Of a revision that was told in part the rest is missing.
            let start = if self.place.told > 0 { self.place.revision } else { self.place.revision + 1 };
            let key = self.cluster.key(&self.prefix);
            let options = WatchOptions::new()
                .with_range(end_of(key.clone()))
                .with_start_revision(start)
                // Else one transaction could be more than an answer holds.
                .with_fragment();
            let mut client = clients.watch.clone();
            let opened = async {
                let mut stream = client.watch(key, Some(options)).await?;
                let first = stream.message().await?;
                Ok((stream, first))
            };
            match opened.await {
                Ok((stream, Some(first))) => self.check(&first).map(|()| stream),
                Ok((_, None)) => Err(Break::Connection("the member ended it".into())),
                Err(error) => {
                    if needs_new_client(&error) {
                        self.cluster.forget(index, &clients).await;
                    }
                    Err(connection(verdict(&error)))
                }
            }
        };
        tokio::time::timeout(MEMBER_PATIENCE, open)
            .await
            .unwrap_or_else(|_| Err(Break::Connection("no answer in time".into())))
    }

    /// Whether the watch goes on after this answer, and belongs to the state that was told.
    fn check(&self, answer: &WatchResponse) -> Result<(), Break> {
        if answer.compact_revision() > 0 {
            return Err(Break::State("its revision was compacted away".into()));
        }
        if answer.canceled() {
            let reason = match answer.cancel_reason() {
                "" => "the member cancelled it",
                reason => reason,
            };
            return Err(Break::Connection(reason.into()));
        }
        match answer.header() {
            Some(header) if header.cluster_id() != self.place.cluster => {
                Err(Break::State("the cluster is another one, restored from a backup".into()))
            }
            _ => Ok(()),
        }
    }

    /// Tells what comes until it ends.
    async fn follow_stream(&mut self, mut stream: WatchStream) -> Break {
        let mut known = self.place.told;
        loop {
            let answer = match stream.message().await {
                Ok(Some(answer)) => answer,
                Ok(None) => return Break::Connection("the member ended it".into()),
                Err(error) => {
                    return Break::Connection(status(&error).map_or_else(|| error.to_string(), words));
                }
            };
            if let Err(broken) = self.check(&answer) {
                return broken;
            }
            let mut all = Vec::new();
            for event in answer.events() {
                let Some(pair) = event.kv() else { continue };
                let revision = pair.mod_revision();
                if revision == self.place.revision && known > 0 {
                    known -= 1;
                    continue;
                }
                let told = match event.event_type() {
                    EventType::Put => self.cluster.entry(pair.clone()).map(Event::Put),
                    EventType::Delete => {
                        let key = self.cluster.own_key(pair.key().to_vec());
                        key.map(|key| Event::Delete { key, revision: number(revision) })
                    }
                };
                all.extend(told);
                known = 0;
                self.place.told = if revision == self.place.revision { self.place.told + 1 } else { 1 };
                self.place.revision = revision;
            }
            // A reader that is behind reads the state, whatever place is noted.
            if !all.is_empty() && self.queue.try_send(all).is_err() {
                return Break::Behind;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_end_behind_the_last_key_of_their_prefix() {
        assert_eq!(end_of(b"/a/".to_vec()), b"/a0");
        assert_eq!(end_of("/ü".into()), [b'/', 0xc3, 0xbd]);
        assert!(behind(b"/a/b".to_vec()) > b"/a/b".to_vec() && behind(b"/a/b".to_vec()) < b"/a/b!".to_vec());
    }

    #[test]
    fn only_what_was_surely_not_carried_out_counts_as_such() {
        let refused = |status: Status| matches!(verdict(&Error::GRpcStatus(status)), Verdict::NotDone(_));
        assert!(refused(Status::unavailable("etcdserver: no leader")));
        assert!(refused(Status::resource_exhausted("etcdserver: too many requests")));
        let connect = ConnectError(std::io::Error::from(std::io::ErrorKind::ConnectionRefused).into());
        assert!(refused(Status::from_error(Box::new(connect))));
        for unknown in [
            Status::unavailable("etcdserver: request timed out, possibly due to previous leader failure"),
            Status::unavailable("etcdserver: leader changed"),
            Status::unknown("transport error"),
            Status::from_error(std::io::Error::from(std::io::ErrorKind::ConnectionReset).into()),
            Status::cancelled("operation was canceled"),
        ] {
            let text = unknown.to_string();
            assert!(matches!(verdict(&Error::GRpcStatus(unknown)), Verdict::Unknown(_)), "{text}");
        }
    }

    #[test]
    fn refusals_are_told_from_failures() {
        let of = |status: Status| verdict(&Error::GRpcStatus(status));
        let lease = of(Status::not_found("etcdserver: requested lease not found"));
        assert!(matches!(lease, Verdict::Final(Failure::NoLease)));
        let full = of(Status::resource_exhausted("etcdserver: mvcc: database space exceeded"));
        assert!(matches!(full, Verdict::Final(Failure::Full)));
        let large = of(Status::invalid_argument("etcdserver: request is too large"));
        assert!(matches!(large, Verdict::Final(Failure::Store(StoreError::Invalid(_)))));
        let login =
            of(Status::invalid_argument("etcdserver: authentication failed, invalid user ID or password"));
        assert!(matches!(login, Verdict::Access(reason) if reason.starts_with("authentication failed")));
    }
}
