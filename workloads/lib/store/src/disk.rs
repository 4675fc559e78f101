//! Where the state of an embedded store lasts: a `redb` file. Everything written is on the disk (fsync) before
//! [`Disk::commit`] returns.

use std::{
    error::Error,
    fs, io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, StorageError, TableDefinition};

use crate::{
    StoreError,
    state::{Pending, State, Value},
};

/// Format of the file; a file of a newer one is not touched.
const FORMAT: u64 = 1;
/// The state is held in memory, so the library needs no large cache of its own.
const CACHE_BYTES: usize = 4 * 1024 * 1024;
/// How long an opening waits for a process that is just ending.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);

const ENTRIES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("entries");
const LEASES: TableDefinition<'_, u64, u64> = TableDefinition::new("leases");
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");

type Opener = Box<dyn Fn() -> Result<Database, DatabaseError> + Send>;

/// An open file, or one to be opened again after an error.
pub struct Disk {
    path: PathBuf,
    opener: Opener,
    database: Option<Database>,
    /// Whether something was written since the file was opened.
    written: bool,
}

impl Disk {
    /// A file that is not open yet.
    pub fn new(path: PathBuf) -> Self {
        let opener = {
            let path = path.clone();
            move || redb::Builder::new().set_cache_size(CACHE_BYTES).create(&path)
        };
        Self { path, opener: Box::new(opener), database: None, written: false }
    }

    pub fn is_open(&self) -> bool {
        self.database.is_some()
    }

    /// Opens the file, making it if it is not there, and reads all of it.
    pub fn open(&mut self) -> Result<State, StoreError> {
        self.database = None;
        self.written = false;
        create_file(&self.path).map_err(|error| self.io("creating", error))?;
        let start = Instant::now();
        let database = loop {
            match (self.opener)() {
                Ok(database) => break database,
                Err(DatabaseError::DatabaseAlreadyOpen) if start.elapsed() < LOCK_PATIENCE => {
                    std::thread::sleep(Duration::from_millis(25));
                }
                Err(DatabaseError::DatabaseAlreadyOpen | DatabaseError::LockProtocolMismatch) => {
                    return Err(StoreError::Locked { path: self.path.clone() });
                }
                Err(DatabaseError::Storage(error)) => return Err(self.error("opening", error.into())),
                Err(error) => {
                    return Err(StoreError::Damaged { path: self.path.clone(), reason: error.to_string() });
                }
            }
        };
        let state = load(&database).map_err(|error| self.error("reading", error))?;
        match state {
            Ok(state) => {
                self.database = Some(database);
                Ok(state)
            }
            Err(format) => Err(StoreError::Newer {
                what: format!("the store {:?}", self.path),
                found: u32::try_from(format).unwrap_or(u32::MAX),
                known: FORMAT as u32,
            }),
        }
    }

    /// Makes changes last. After an error the file must be opened again.
    pub fn commit(&mut self, pending: &Pending) -> Result<(), StoreError> {
        let Some(database) = &self.database else { return Err(StoreError::Closed) };
        let result = write(database, pending, !self.written);
        self.written = true;
        result.map_err(|error| {
            self.database = None;
            self.error("writing", error)
        })
    }

    fn io(&self, what: &'static str, error: io::Error) -> StoreError {
        use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
        if matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge) {
            return StoreError::Full { path: self.path.clone() };
        }
        StoreError::Io { what, path: self.path.clone(), source: Arc::new(error) }
    }

    fn error(&self, what: &'static str, error: redb::Error) -> StoreError {
        match error {
            redb::Error::Io(error) => self.io(what, error),
            redb::Error::Corrupted(reason) => StoreError::Damaged { path: self.path.clone(), reason },
            error => StoreError::Io {
                what,
                path: self.path.clone(),
                source: Arc::new(error) as Arc<dyn Error + Send + Sync>,
            },
        }
    }
}

/// Makes the file readable by its owner only, before anything is in it, and its folder if need be.
fn create_file(path: &Path) -> io::Result<()> {
    if path.exists() {
        return Ok(());
    }
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    fs::create_dir_all(folder)?;
    fs::OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
    // The name of the file must last as well.
    fs::File::open(folder)?.sync_all()
}

/// The state in a file, or its format if that is newer than ours.
fn load(database: &Database) -> Result<Result<State, u64>, redb::Error> {
    let read = database.begin_read()?;
    let mut state = State::default();
    let meta = match read.open_table(META) {
        Ok(meta) => meta,
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(Ok(state)),
        Err(error) => return Err(error.into()),
    };
    let number = |key| -> Result<u64, StorageError> { Ok(meta.get(key)?.map_or(0, |value| value.value())) };
    let format = number("format")?;
    if format > FORMAT {
        return Ok(Err(format));
    }
    state.revision = number("revision")?;
    state.last_lease = number("last_lease")?;
    for item in read.open_table(LEASES)?.iter()? {
        let (lease, ttl) = item?;
        state.leases.insert(lease.value(), Duration::from_millis(ttl.value()));
    }
    for item in read.open_table(ENTRIES)?.iter()? {
        let (key, bytes) = item?;
        let value = decode(bytes.value())
            .ok_or_else(|| redb::Error::Corrupted(format!("the value of {:?} is cut off", key.value())))?;
        state.entries.insert(key.value().to_owned(), value);
    }
    Ok(Ok(state))
}

/// `first`: nothing was written since the file was opened; all tables are made, and the format is told.
fn write(database: &Database, pending: &Pending, first: bool) -> Result<(), redb::Error> {
    // The default durability of the library is `Immediate`: on the disk when the commit returns.
    let write = database.begin_write()?;
    {
        let mut entries = write.open_table(ENTRIES)?;
        for (key, (_, value)) in &pending.entries {
            match value {
                Some(value) => entries.insert(key.as_str(), encode(value).as_slice())?,
                None => entries.remove(key.as_str())?,
            };
        }
        let mut meta = write.open_table(META)?;
        meta.insert("revision", pending.revision)?;
        // Every table that is opened and every key that is written costs pages, and leases change rarely.
        if first || !pending.leases.is_empty() {
            let mut leases = write.open_table(LEASES)?;
            for (lease, ttl) in &pending.leases {
                match ttl {
                    Some(ttl) => leases.insert(lease, u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX))?,
                    None => leases.remove(lease)?,
                };
            }
            meta.insert("format", FORMAT)?;
            meta.insert("last_lease", pending.last_lease)?;
        }
    }
    write.commit()?;
    Ok(())
}

/// Revision, revision of creation and lease (0 = none), 8 bytes each, little endian; then the value.
fn encode(value: &Value) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(24 + value.value.len());
    for number in [value.revision, value.created, value.lease.unwrap_or(0)] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    bytes.extend_from_slice(&value.value);
    bytes
}

fn decode(bytes: &[u8]) -> Option<Value> {
    let number = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    let lease = number(16)?;
    Some(Value {
        revision: number(0)?,
        created: number(8)?,
        lease: (lease != 0).then_some(lease),
        value: Bytes::copy_from_slice(bytes.get(24..)?),
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use redb::{StorageBackend, backends::FileBackend};

    use super::*;
    use crate::{Op, state::State};

    /// A disk that is full while its switch says so.
    #[derive(Debug)]
    struct Flaky {
        file: FileBackend,
        full: Arc<AtomicBool>,
    }

    impl Flaky {
        fn check(&self) -> io::Result<()> {
            if self.full.load(Ordering::SeqCst) { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
        }
    }

    impl StorageBackend for Flaky {
        fn len(&self) -> Result<u64, io::Error> {
            self.file.len()
        }
        fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), io::Error> {
            self.file.read(offset, out)
        }
        fn set_len(&self, len: u64) -> Result<(), io::Error> {
            self.check()?;
            self.file.set_len(len)
        }
        fn sync_data(&self) -> Result<(), io::Error> {
            self.check()?;
            self.file.sync_data()
        }
        fn write(&self, offset: u64, data: &[u8]) -> Result<(), io::Error> {
            self.check()?;
            self.file.write(offset, data)
        }
        fn close(&self) -> Result<(), io::Error> {
            self.file.close()
        }
    }

    fn pending(state: &State, key: &str) -> Pending {
        let mut pending = state.pending();
        pending.transact(state, &[], vec![Op::put(key, "x")]).expect("written");
        pending
    }

    #[test]
    fn a_full_disk_is_named_and_the_store_works_again_once_there_is_space() {
        let folder = tempfile::tempdir().expect("a folder");
        let full = Arc::new(AtomicBool::new(false));
        let mut disk = Disk::new(folder.path().join("store"));
        let (path, switch) = (disk.path.clone(), full.clone());
        disk.opener = Box::new(move || {
            let file = fs::OpenOptions::new().read(true).write(true).open(&path)?;
            let backend = Flaky { file: FileBackend::new(file)?, full: switch.clone() };
            redb::Builder::new().create_with_backend(backend)
        });
        let mut state = disk.open().expect("opened");
        let first = pending(&state, "a");
        disk.commit(&first).expect("written");
        state.apply(first);
        full.store(true, Ordering::SeqCst);
        let error = disk.commit(&pending(&state, "b")).expect_err("full");
        assert!(matches!(error, StoreError::Full { .. }), "{error:?}");
        assert!(!disk.is_open());
        full.store(false, Ordering::SeqCst);
        assert_eq!(disk.open().expect("opened again"), state, "nothing of the failed change is there");
        disk.commit(&pending(&state, "c")).expect("written");
    }

    #[test]
    fn files_of_a_newer_version_and_files_that_are_no_store_are_refused_by_name() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("newer");
        {
            let database = Database::create(&path).expect("created");
            let write = database.begin_write().expect("begun");
            write.open_table(META).expect("opened").insert("format", FORMAT + 1).expect("written");
            write.commit().expect("committed");
        }
        let error = Disk::new(path).open().expect_err("newer").to_string();
        assert!(error.contains("newer") && error.contains("format 2"), "{error}");
        let path = folder.path().join("text");
        fs::write(&path, "this is a text and no store ".repeat(1000)).expect("written");
        let error = Disk::new(path.clone()).open().expect_err("a text").to_string();
        assert!(error.contains("text"), "{error}");
        let kept = fs::read_to_string(path).expect("read");
        assert!(kept.starts_with("this is a text"), "a foreign file is not written to");
        let error = Disk::new("/proc/none/store".into()).open().expect_err("no such folder").to_string();
        assert!(error.contains("/proc/none/store"), "{error}");
    }

    #[test]
    fn a_new_file_is_readable_by_its_owner_only() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("new/folder/store");
        Disk::new(path.clone()).open().expect("opened");
        assert_eq!(fs::metadata(path).expect("there").permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn values_cut_off_are_noticed() {
        let value = Value { value: "abc".into(), revision: 7, created: 3, lease: None };
        let bytes = encode(&value);
        assert_eq!(decode(&bytes), Some(value));
        assert_eq!(decode(&bytes[..23]), None);
        assert_eq!(decode(&[]), None);
    }
}
