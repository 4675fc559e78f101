//! Applications: their records, and their packages on disk.
//!
//! ```text
//! <folder>/packages/<id>/<version>/   an unpacked package, read-only for instances
//! <folder>/uploads/                   what is arriving, and what is being unpacked
//! ```

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use fanlight_api::{ApplicationId, ams::ApplicationPatch};
use fanlight_store::{Compare, Handle, Op, Record, StoreError, StoreExt as _, encode};
use futures_util::{Stream, StreamExt as _};
use rustix::fs::{Mode, OFlags};
use sha2::{Digest as _, Sha256};
use tempfile::{NamedTempFile, TempDir};

use crate::{
    config,
    core::model::{ApplicationRecord, InstanceRecord, OperationRecord, VersionRecord, VersionState, key},
    events::{Events, unix_now},
    manifest::{self, ManifestError},
    operations::Operations,
    package::{self, PackageError},
    size,
};

/// Largest icon, bytes: it travels in every list of applications.
const MAX_ICON_BYTES: u64 = 64 * 1024;
/// How often a change begins again when others were faster.
const ATTEMPTS: u32 = 32;

/// A request about applications that cannot be met.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// No such application.
    #[error("application not found")]
    NotFound,
    /// No such version.
    #[error("application version {0} not found")]
    NoVersion(u32),
    /// The name is taken.
    #[error("application {0} already exists")]
    Exists(String),
    /// An update of another application.
    #[error("argument name is invalid: the package is for {given}, the application is {name}")]
    OtherName {
        /// In the manifest.
        given: String,
        /// Of the application.
        name: String,
    },
    /// Instances run from it.
    #[error("application {0} is in use by instances: delete them first, or use force")]
    InUse(String),
    /// Every application has a version.
    #[error("the last version of an application cannot be deleted: delete the application")]
    LastVersion,
    /// A member of a change that is not possible.
    #[error("changing {0} not supported: update the package instead")]
    Unsupported(String),
    /// A member of a change with a bad value.
    #[error("argument {0} is invalid")]
    Invalid(&'static str),
    /// The bytes are not the announced ones.
    #[error("fingerprint of the upload does not match: announced {announced}, received {received}")]
    Fingerprint {
        /// By the caller.
        announced: String,
        /// Of the bytes.
        received: String,
    },
    /// More than allowed.
    #[error("package too large: more than {0} bytes")]
    TooLarge(u64),
    /// The upload ended early.
    #[error("the upload was cut off: {0}")]
    CutOff(String),
    /// The archive.
    #[error(transparent)]
    Package(#[from] PackageError),
    /// The manifest.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// Files.
    #[error("{doing} {}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The store.
    #[error("the records of applications cannot be used")]
    Store(#[from] StoreError),
}

/// All applications.
pub struct Catalog {
    store: Handle,
    operations: Operations,
    events: Events,
    packages: PathBuf,
    uploads: PathBuf,
    config: config::Applications,
}

/// A package that arrived.
pub struct Upload {
    file: NamedTempFile,
    sha256: String,
}

/// A package that was unpacked and looked at.
struct Unpacked {
    folder: TempDir,
    version: VersionRecord,
}

impl Catalog {
    /// Opens the folders and removes what a crash left half-made.
    ///
    /// # Errors
    /// The folders or the store cannot be used.
    pub async fn open(
        folder: &Path,
        config: config::Applications,
        store: Handle,
        operations: Operations,
        events: Events,
    ) -> Result<Self, CatalogError> {
        let catalog = Self {
            packages: folder.join("packages"),
            uploads: folder.join("uploads"),
            store,
            operations,
            events,
            config,
        };
        let _ = fs::remove_dir_all(&catalog.uploads);
        for path in [&catalog.packages, &catalog.uploads] {
            fs::create_dir_all(path).map_err(|source| io_at("making the folder", path, source))?;
        }
        let known: BTreeMap<String, ApplicationRecord> =
            catalog.list().await?.into_iter().map(|record| (record.id.to_string(), record)).collect();
        for entry in read_dir(&catalog.packages) {
            let name = entry.file_name().to_string_lossy().into_owned();
            let Some(record) = known.get(&name) else {
                remove(&entry.path());
                continue;
            };
            for version in read_dir(&entry.path()) {
                let number = version.file_name().to_string_lossy().parse::<u32>();
                if number.is_ok_and(|number| record.versions.contains_key(&number)) {
                    continue;
                }
                remove(&version.path());
            }
        }
        Ok(catalog)
    }

    /// All applications, oldest first.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn list(&self) -> Result<Vec<ApplicationRecord>, StoreError> {
        let records = self.store.list_json::<ApplicationRecord>(key::APPLICATIONS).await?;
        let mut list: Vec<_> = records.into_iter().map(|(_, record)| record.value).collect();
        list.sort_by(|a, b| (a.created_at, &a.id).cmp(&(b.created_at, &b.id)));
        Ok(list)
    }

    /// One application, by id or name.
    ///
    /// # Errors
    /// There is none, or the store cannot be read.
    pub async fn find(&self, id_or_name: &str) -> Result<Record<ApplicationRecord>, CatalogError> {
        let id = match id_or_name.parse::<ApplicationId>() {
            Ok(id) => id,
            Err(_) => return Err(CatalogError::NotFound),
        };
        if let Some(record) = self.store.get_json(&key::application(&id)).await? {
            return Ok(record);
        }
        let by_name: Option<Record<ApplicationId>> =
            self.store.get_json(&key::application_name(id_or_name)).await?;
        let Some(by_name) = by_name else { return Err(CatalogError::NotFound) };
        self.store.get_json(&key::application(&by_name.value)).await?.ok_or(CatalogError::NotFound)
    }

    /// Where the package of a version lies.
    pub fn package(&self, id: &ApplicationId, version: u32) -> PathBuf {
        self.packages.join(id.as_str()).join(version.to_string())
    }

    /// The text of a manifest as it was uploaded.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn manifest(&self, id: &ApplicationId, version: u32) -> Result<Vec<u8>, CatalogError> {
        let folder = self.package(id, version);
        read_inside(&folder, "manifest.yaml", manifest::MAX_MANIFEST_BYTES)
            .map_err(|source| io_at("reading", &folder.join("manifest.yaml"), source))
    }

    /// Takes a package in, chunk by chunk.
    ///
    /// # Errors
    /// It is too large, cut off, not what was announced, or the disk does not take it.
    pub async fn receive<E: std::fmt::Display>(
        &self,
        mut body: impl Stream<Item = Result<Bytes, E>> + Unpin,
        announced: Option<&str>,
    ) -> Result<Upload, CatalogError> {
        let most = size::parse(&self.config.max_package).unwrap_or(u64::MAX);
        let write_error = |source| io_at("writing", &self.uploads, source);
        let mut file = NamedTempFile::new_in(&self.uploads).map_err(write_error)?;
        let (mut digest, mut bytes) = (Sha256::new(), 0_u64);
        while let Some(chunk) = body.next().await {
            let chunk = chunk.map_err(|error| CatalogError::CutOff(error.to_string()))?;
            bytes += chunk.len() as u64;
            if bytes > most {
                return Err(CatalogError::TooLarge(most));
            }
            digest.update(&chunk);
            // Writes of a chunk go to the page cache; a thread for each would cost more.
            file.write_all(&chunk).map_err(write_error)?;
        }
        let sha256 = hex::encode(digest.finalize());
        match announced {
            Some(announced) if !announced.eq_ignore_ascii_case(&sha256) => Err(CatalogError::Fingerprint {
                announced: announced.chars().take(64).collect(),
                received: sha256,
            }),
            _ => Ok(Upload { file, sha256 }),
        }
    }

    async fn unpack(&self, mut upload: Upload) -> Result<Unpacked, CatalogError> {
        let limits = package::Limits {
            unpacked_bytes: size::parse(&self.config.max_unpacked).unwrap_or(u64::MAX),
            ..package::Limits::default()
        };
        let folder = TempDir::new_in(&self.uploads)
            .map_err(|source| io_at("making a folder", &self.uploads, source))?;
        let auto_publish = self.config.auto_publish;
        tokio::task::spawn_blocking(move || {
            package::unpack(upload.file.as_file_mut(), folder.path(), limits)?;
            let text = read_inside(folder.path(), "manifest.yaml", manifest::MAX_MANIFEST_BYTES).map_err(
                |error| match error.kind() {
                    io::ErrorKind::NotFound => {
                        ManifestError::Required("the file itself, at the root of the package,")
                    }
                    _ => ManifestError::Malformed(error.to_string()),
                },
            )?;
            let manifest_sha256 = hex::encode(Sha256::digest(&text));
            let text =
                String::from_utf8(text).map_err(|_| ManifestError::Malformed("it is not UTF-8".into()))?;
            let checked = manifest::parse(&text)?;
            let icon = match &checked.icon {
                None => String::new(),
                Some(name) => icon(folder.path(), name)?,
            };
            use std::os::unix::fs::PermissionsExt as _;
            // Instances of other users look into it.
            fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))
                .map_err(|source| io_at("opening", folder.path(), source))?;
            let version = VersionRecord {
                created_at: unix_now(),
                published: auto_publish,
                state: VersionState::Active,
                manifest: checked,
                manifest_sha256,
                package_sha256: upload.sha256,
                icon,
            };
            Ok(Unpacked { folder, version })
        })
        .await
        .expect("unpacking does not panic, and the runtime ends after us")
    }

    fn keep(&self, unpacked: TempDir, id: &ApplicationId, version: u32) -> Result<(), CatalogError> {
        let place = self.package(id, version);
        let fail = |source| io_at("moving the package to", &place, source);
        fs::create_dir_all(place.parent().expect("it lies below the packages")).map_err(fail)?;
        // A folder of this number without a record is from a crash.
        let _ = fs::remove_dir_all(&place);
        fs::rename(unpacked.path(), &place).map_err(fail)?;
        // It is no longer where it would be removed.
        let _ = unpacked.keep();
        Ok(())
    }

    /// Makes an application of a package.
    ///
    /// # Errors
    /// The package is refused, or the name is taken.
    pub async fn create(&self, upload: Upload) -> Result<OperationRecord, CatalogError> {
        let Unpacked { folder, version } = self.unpack(upload).await?;
        let id = ApplicationId::generate();
        let name = version.manifest.name.clone();
        let name_key = key::application_name(&name);
        if self.store.get(&name_key).await?.is_some() {
            return Err(CatalogError::Exists(name));
        }
        self.keep(folder, &id, 0)?;
        let record = ApplicationRecord {
            id: id.clone(),
            name: name.clone(),
            created_at: unix_now(),
            inhibit_auto_updates: false,
            tags: None,
            node_selector: None,
            versions: BTreeMap::from([(0, version)]),
            next_version: 1,
            deleted: false,
        };
        let (operation, write) =
            self.operations.prepare_done("Creating application", "applications", &url(&id), Ok(()));
        let ops = vec![
            Op::put(key::application(&id), encode(&key::application(&id), &record)?),
            Op::put(&name_key, encode(&name_key, &id)?),
            write,
        ];
        match self.store.transact(vec![Compare::absent(&name_key)], ops).await {
            Ok(_) => {}
            Err(error) => {
                remove(&self.packages.join(id.as_str()));
                return Err(if error.is_conflict() { CatalogError::Exists(name) } else { error.into() });
            }
        }
        tracing::info!("application {name} was created ({id})");
        self.told(&operation, &id);
        Ok(operation)
    }

    /// Adds a version. The same package as the newest version's changes nothing.
    ///
    /// # Errors
    /// There is no such application, or the package is refused.
    pub async fn update(&self, id_or_name: &str, upload: Upload) -> Result<OperationRecord, CatalogError> {
        let current = self.find(id_or_name).await?;
        let id = current.value.id.clone();
        if current.value.newest().is_some_and(|newest| newest.package_sha256 == upload.sha256) {
            return self.done("Updating application", &id).await;
        }
        let Unpacked { folder, version } = self.unpack(upload).await?;
        if version.manifest.name != current.value.name {
            return Err(CatalogError::OtherName { given: version.manifest.name, name: current.value.name });
        }
        // The number is taken first, so that two updates at a time do not move into the same folder.
        let mut number = 0;
        self.change(&id, |record| {
            number = record.next_version;
            record.next_version += 1;
            Ok(())
        })
        .await?;
        self.keep(folder, &id, number)?;
        let used = self.used_versions(&id).await?;
        let mut removed = Vec::new();
        let most = self.config.max_published_versions;
        let operation = self
            .change_with("Updating application", &id, |record| {
                record.versions.insert(number, version.clone());
                removed = surplus(record, most, &used);
                removed.iter().for_each(|old| drop(record.versions.remove(old)));
                Ok(())
            })
            .await;
        match &operation {
            Ok(_) => removed.iter().for_each(|old| remove(&self.package(&id, *old))),
            Err(_) => remove(&self.package(&id, number)),
        }
        operation
    }

    /// Publishes a version, or revokes it.
    ///
    /// # Errors
    /// There is no such version.
    pub async fn publish(
        &self,
        id_or_name: &str,
        number: u32,
        published: Option<bool>,
    ) -> Result<OperationRecord, CatalogError> {
        let id = self.find(id_or_name).await?.value.id;
        self.change_with("Updating application version", &id, |record| {
            let version = record.versions.get_mut(&number).ok_or(CatalogError::NoVersion(number))?;
            if published == Some(true) && version.state != VersionState::Active {
                return Err(CatalogError::Invalid("published: the version is not active"));
            }
            version.published = published.unwrap_or(version.published);
            Ok(())
        })
        .await
    }

    /// Changes what makes no new version.
    ///
    /// # Errors
    /// There is no such application, or a member cannot be changed.
    pub async fn patch(
        &self,
        id_or_name: &str,
        patch: &ApplicationPatch,
    ) -> Result<OperationRecord, CatalogError> {
        let id = self.find(id_or_name).await?.value.id;
        if let Some((member, _)) = patch.others.iter().find(|(_, value)| !value.is_null()) {
            return Err(CatalogError::Unsupported(member.clone()));
        }
        for tags in [&patch.tags, &patch.node_selector].into_iter().flatten() {
            if !tags.iter().all(|tag| manifest::is_tag(tag)) {
                return Err(CatalogError::Invalid("tags"));
            }
        }
        self.change_with("Updating application", &id, |record| {
            record.tags = patch.tags.clone().or(record.tags.take());
            record.node_selector = patch.node_selector.clone().or(record.node_selector.take());
            record.inhibit_auto_updates = patch.inhibit_auto_updates.unwrap_or(record.inhibit_auto_updates);
            Ok(())
        })
        .await
    }

    /// Removes an application with its packages.
    ///
    /// # Errors
    /// There is no such application, or instances use it and it is not forced.
    pub async fn delete(&self, id_or_name: &str, force: bool) -> Result<OperationRecord, CatalogError> {
        let current = self.find(id_or_name).await?;
        let (id, name) = (current.value.id, current.value.name);
        if !force && !self.used_versions(&id).await?.is_empty() {
            return Err(CatalogError::InUse(name));
        }
        let (operation, write) =
            self.operations.prepare_done("Deleting application", "applications", &url(&id), Ok(()));
        let ops = vec![Op::delete(key::application(&id)), Op::delete(key::application_name(&name)), write];
        match self.store.transact(vec![Compare::revision(key::application(&id), current.revision)], ops).await
        {
            Ok(_) => {}
            Err(StoreError::Conflict) => return Box::pin(self.delete(id_or_name, force)).await,
            Err(error) => return Err(error.into()),
        }
        remove(&self.packages.join(id.as_str()));
        tracing::info!("application {name} was deleted ({id})");
        self.told(&operation, &id);
        Ok(operation)
    }

    /// Removes a version with its package.
    ///
    /// # Errors
    /// There is no such version, it is the last, or instances use it and it is not forced.
    pub async fn delete_version(
        &self,
        id_or_name: &str,
        number: u32,
        force: bool,
    ) -> Result<OperationRecord, CatalogError> {
        let current = self.find(id_or_name).await?.value;
        let id = current.id;
        if !force && self.used_versions(&id).await?.contains(&number) {
            return Err(CatalogError::InUse(current.name));
        }
        let operation = self
            .change_with("Deleting application version", &id, |record| {
                if !record.versions.contains_key(&number) {
                    return Err(CatalogError::NoVersion(number));
                }
                if record.versions.len() == 1 {
                    return Err(CatalogError::LastVersion);
                }
                record.versions.remove(&number);
                Ok(())
            })
            .await?;
        remove(&self.package(&id, number));
        Ok(operation)
    }

    /// Versions that instances run.
    async fn used_versions(&self, id: &ApplicationId) -> Result<Vec<u32>, StoreError> {
        let records = self.store.list_json::<InstanceRecord>(key::INSTANCES).await?;
        let applications = records.into_iter().map(|(_, record)| record.value.application);
        Ok(applications
            .filter(|application| application.id == *id)
            .map(|application| application.version)
            .collect())
    }

    async fn change(
        &self,
        id: &ApplicationId,
        change: impl FnMut(&mut ApplicationRecord) -> Result<(), CatalogError>,
    ) -> Result<(), CatalogError> {
        self.transact(id, Vec::new(), change).await
    }

    async fn change_with(
        &self,
        description: &str,
        id: &ApplicationId,
        change: impl FnMut(&mut ApplicationRecord) -> Result<(), CatalogError>,
    ) -> Result<OperationRecord, CatalogError> {
        let (operation, write) = self.operations.prepare_done(description, "applications", &url(id), Ok(()));
        self.transact(id, vec![write], change).await?;
        self.told(&operation, id);
        Ok(operation)
    }

    async fn transact(
        &self,
        id: &ApplicationId,
        more: Vec<Op>,
        mut change: impl FnMut(&mut ApplicationRecord) -> Result<(), CatalogError>,
    ) -> Result<(), CatalogError> {
        let key = key::application(id);
        for _ in 0..ATTEMPTS {
            let record = self.store.get_json::<ApplicationRecord>(&key).await?;
            let Record { value: mut record, revision } = record.ok_or(CatalogError::NotFound)?;
            change(&mut record)?;
            let mut ops = vec![Op::put(&key, encode(&key, &record)?)];
            ops.extend(more.iter().cloned());
            match self.store.transact(vec![Compare::revision(&key, revision)], ops).await {
                Ok(_) => return Ok(()),
                Err(StoreError::Conflict) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(StoreError::Conflict.into())
    }

    async fn done(&self, description: &str, id: &ApplicationId) -> Result<OperationRecord, CatalogError> {
        let (operation, write) = self.operations.prepare_done(description, "applications", &url(id), Ok(()));
        self.store.transact(Vec::new(), vec![write]).await?;
        self.operations.begun(&operation);
        Ok(operation)
    }

    fn told(&self, operation: &OperationRecord, id: &ApplicationId) {
        self.operations.begun(operation);
        self.events.lifecycle("application-changed", &url(id));
    }
}

fn url(id: &ApplicationId) -> String {
    format!("/1.0/applications/{id}")
}

/// Published versions beyond `most`, oldest first, that no instance uses.
fn surplus(record: &ApplicationRecord, most: usize, used: &[u32]) -> Vec<u32> {
    let published: Vec<u32> =
        record.versions.iter().filter(|(_, version)| version.published).map(|(number, _)| *number).collect();
    let count = published.len().saturating_sub(most);
    published.into_iter().take(count).filter(|number| !used.contains(number)).collect()
}

/// An icon as a `data:` URL.
fn icon(folder: &Path, name: &str) -> Result<String, ManifestError> {
    let invalid = |reason: String| ManifestError::Invalid { key: "icon", reason };
    let kind = manifest::icon_type(name).ok_or_else(|| invalid(format!("{name:?} is no picture")))?;
    let bytes =
        read_inside(folder, name, MAX_ICON_BYTES).map_err(|error| invalid(format!("{name:?}: {error}")))?;
    Ok(format!("data:{kind};base64,{}", BASE64_STANDARD.encode(bytes)))
}

/// A regular file of a package, bounded; links are followed nowhere on the way.
fn read_inside(folder: &Path, name: &str, most: u64) -> io::Result<Vec<u8>> {
    use std::io::Read as _;
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mut at = rustix::fs::open(folder, flags | OFlags::DIRECTORY, Mode::empty())?;
    for part in Path::new(name).components() {
        at = rustix::fs::openat(&at, part.as_os_str(), flags, Mode::empty())?;
    }
    let file = fs::File::from(at);
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("it is no file"));
    }
    if metadata.len() > most {
        return Err(io::Error::other(format!("it has {} bytes, at most {most} are allowed", metadata.len())));
    }
    let mut bytes = Vec::new();
    file.take(most).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn read_dir(path: &Path) -> Vec<fs::DirEntry> {
    fs::read_dir(path).into_iter().flatten().flatten().collect()
}

fn remove(path: &Path) {
    match fs::remove_dir_all(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        // Removed at the next start.
        Err(error) => tracing::warn!("removing {}: {error}", path.display()),
    }
}

fn io_at(doing: &'static str, path: &Path, source: io::Error) -> CatalogError {
    CatalogError::Io { doing, path: path.to_owned(), source }
}
