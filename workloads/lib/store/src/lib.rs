//! The store: every durable record of gateway and AMS. Keys are texts, values are bytes; transactions compare
//! and set, leases take their keys along when they expire, watches show a prefix and its changes.
//!
//! One trait, [`Store`], kept to what etcd offers. Here are three implementations: one in a file of this machine
//! (`redb`) and one in memory for tests, which share their rules (`state`), and one on the members of an etcd cluster,
//! for several programs at once. What the records mean is their owners' affair; [`StoreExt`] reads and writes them as
//! JSON with a version.

mod config;
mod disk;
mod engine;
mod etcd;
mod record;
mod state;
mod watch;

use std::{path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;

pub use config::{StoreConfig, open};
pub use engine::Embedded;
pub use record::{Change, RECORD_VERSION, Record, StoreExt, decode, encode};
pub use watch::Watch;

/// A store, shared.
pub type Handle = Arc<dyn Store>;

/// Counts the writing transactions of a store; grows with each, starting at 1. On etcd everybody who writes to the
/// cluster counts, so that it also grows in between.
pub type Revision = u64;

/// A lease of a store; never given out twice.
pub type LeaseId = u64;

/// Largest key, bytes.
pub const MAX_KEY_BYTES: usize = 1024;
/// Largest value, bytes (etcd takes requests of 1.5 MiB).
pub const MAX_VALUE_BYTES: usize = 1024 * 1024;
/// Most comparisons, and most operations, of one transaction (the default of etcd).
pub const MAX_TRANSACTION_OPS: usize = 128;

/// A key with its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Key.
    pub key: String,
    /// Value.
    pub value: Bytes,
    /// Revision of the last change.
    pub revision: Revision,
    /// Revision at which the key appeared.
    pub created: Revision,
    /// The lease it goes with.
    pub lease: Option<LeaseId>,
}

/// Part of the keys of a prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Range {
    /// In order of their keys.
    pub entries: Vec<Entry>,
    /// Revision of the store that this shows.
    pub revision: Revision,
    /// Whether there are more behind the last one.
    pub more: bool,
}

/// What must hold for a transaction to happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compare {
    /// The key was last changed at this revision.
    Revision {
        /// Key.
        key: String,
        /// As read before.
        revision: Revision,
    },
    /// There is no such key.
    Absent {
        /// Key.
        key: String,
    },
    /// The key has this value.
    Value {
        /// Key.
        key: String,
        /// Value.
        value: Bytes,
    },
}

impl Compare {
    /// The key was last changed at this revision.
    pub fn revision(key: impl Into<String>, revision: Revision) -> Self {
        Self::Revision { key: key.into(), revision }
    }

    /// There is no such key.
    pub fn absent(key: impl Into<String>) -> Self {
        Self::Absent { key: key.into() }
    }

    /// The key has this value.
    pub fn value(key: impl Into<String>, value: impl Into<Bytes>) -> Self {
        Self::Value { key: key.into(), value: value.into() }
    }

    pub(crate) fn key(&self) -> &str {
        match self {
            Self::Revision { key, .. } | Self::Absent { key } | Self::Value { key, .. } => key,
        }
    }
}

/// One write of a transaction. No key may be written twice in a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Sets a key.
    Put {
        /// Key.
        key: String,
        /// Value.
        value: Bytes,
        /// The lease it goes with from now on; `None` takes it off its lease.
        lease: Option<LeaseId>,
    },
    /// Removes a key; fine if there is none.
    Delete {
        /// Key.
        key: String,
    },
}

impl Op {
    /// Sets a key.
    pub fn put(key: impl Into<String>, value: impl Into<Bytes>) -> Self {
        Self::Put { key: key.into(), value: value.into(), lease: None }
    }

    /// Sets a key that goes with a lease.
    pub fn put_leased(key: impl Into<String>, value: impl Into<Bytes>, lease: LeaseId) -> Self {
        Self::Put { key: key.into(), value: value.into(), lease: Some(lease) }
    }

    /// Removes a key.
    pub fn delete(key: impl Into<String>) -> Self {
        Self::Delete { key: key.into() }
    }

    pub(crate) fn key(&self) -> &str {
        match self {
            Self::Put { key, .. } | Self::Delete { key } => key,
        }
    }
}

/// A transaction happened and lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Committed {
    /// The revision of its writes; of the store before it when it wrote nothing.
    pub revision: Revision,
}

/// What a watch shows. Folding all events in order gives the state of the prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Everything under the prefix; replaces what was known. The first event of every watch, and again after
    /// the watcher fell too far behind.
    Reset {
        /// In order of their keys.
        entries: Vec<Entry>,
        /// Revision of the store that this shows.
        revision: Revision,
    },
    /// A key was set.
    Put(Entry),
    /// A key was removed.
    Delete {
        /// Key.
        key: String,
        /// Revision of the removal.
        revision: Revision,
    },
}

/// Why the store did not do something.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    /// A comparison of the transaction did not hold; nothing was written.
    #[error("the record was changed by somebody else at the same time")]
    Conflict,
    /// There is no such lease (any more).
    #[error("lease {0} has expired")]
    NoLease(LeaseId),
    /// The request itself is wrong.
    #[error("the request to the store is invalid: {0}")]
    Invalid(String),
    /// `store.url` is of no known kind, or wrong.
    #[error("store.url {url:?} is invalid: {reason}")]
    Url {
        /// As configured, without credentials.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The settings contradict each other.
    #[error("{0}")]
    Settings(String),
    /// A file of the settings cannot be read.
    #[error("{key} {path:?} cannot be read")]
    File {
        /// The setting.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Arc<std::io::Error>,
    },
    /// No server of the store can be reached, or those that can do not agree (no quorum), or they refuse us. Where
    /// `unknown` is set, a transaction may have taken place all the same: whoever asked must read before trying
    /// again. Otherwise nothing was written.
    #[error("the store at {endpoints} is unavailable: {reason}{}", if *.unknown { "; whether the change was made is unknown" } else { "" })]
    Unavailable {
        /// The servers, as configured.
        endpoints: String,
        /// What each of them did, in words.
        reason: String,
        /// Whether the change may have been made.
        unknown: bool,
    },
    /// Another process has the file.
    #[error("the store {path:?} is in use by another process")]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// The file or a record was written by a newer version.
    #[error(
        "{what} has format {found}; this version of Fanlight knows formats up to {known}: use a newer version"
    )]
    Newer {
        /// The file, or the key of the record.
        what: String,
        /// Format found.
        found: u32,
        /// Newest format known here.
        known: u32,
    },
    /// The file is no store, or damaged.
    #[error("the store {path:?} cannot be read: {reason}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What the library says.
        reason: String,
    },
    /// No space left, on the disk or within the quota of etcd. Nothing was written; works again once there is space.
    #[error("no space left for the store {path:?}")]
    Full {
        /// The file, or the address of etcd.
        path: PathBuf,
    },
    /// The file cannot be written or read. Whether a transaction took place is unknown.
    #[error("{what} the store {path:?}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// A record cannot be read or written as what it should be.
    #[error("record {key} does not fit its type")]
    Record {
        /// Key.
        key: String,
        /// Why not.
        #[source]
        source: Arc<serde_json::Error>,
    },
    /// The store was closed.
    #[error("the store is closed")]
    Closed,
}

impl StoreError {
    /// Whether reading again and trying again is the answer.
    pub fn is_conflict(&self) -> bool {
        matches!(self, Self::Conflict)
    }
}

/// A store of keys and values. Whatever is acknowledged lasts.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// The entry of a key.
    ///
    /// # Errors
    /// The store cannot be read.
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError>;

    /// At most `limit` entries whose keys begin with `prefix`, in order, those behind `start_after`.
    ///
    /// # Errors
    /// The store cannot be read.
    async fn range(&self, prefix: &str, start_after: Option<&str>, limit: usize)
    -> Result<Range, StoreError>;

    /// Does all of `ops` if all of `compares` hold, else nothing.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] when a comparison does not hold; [`StoreError::NoLease`]; or the store cannot be
    /// written.
    async fn transact(&self, compares: Vec<Compare>, ops: Vec<Op>) -> Result<Committed, StoreError>;

    /// A lease that expires when it is not kept alive for `ttl` (1 s to 1 day). Time in which the store itself was
    /// away does not count: after a restart of an embedded store, and after a change of the leader of etcd, all leases
    /// have their full time again. Time in which only the holder was cut off does count; what the end of a lease means
    /// is for its readers to judge. Etcd knows whole seconds and a least time of its own (about 2 s), so that a lease
    /// may last longer there.
    ///
    /// # Errors
    /// The time is out of range, or the store cannot be written.
    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError>;

    /// Gives a lease its full time again.
    ///
    /// # Errors
    /// [`StoreError::NoLease`] when it has expired.
    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError>;

    /// Ends a lease now; its keys vanish. Fine if there is none.
    ///
    /// # Errors
    /// The store cannot be written.
    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError>;

    /// What is under a prefix, and then its changes in order; see [`Event`].
    ///
    /// # Errors
    /// The store cannot be read.
    async fn watch(&self, prefix: &str) -> Result<Watch, StoreError>;

    /// How many servers hold the store: 1 for an embedded one, the members of the cluster of etcd, whether they are
    /// well or not.
    ///
    /// # Errors
    /// The store cannot be reached.
    async fn members(&self) -> Result<u64, StoreError>;

    /// Ends the store and waits until its file is free for another process. Everything after answers
    /// [`StoreError::Closed`].
    async fn close(&self);
}
