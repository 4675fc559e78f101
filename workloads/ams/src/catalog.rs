//! Applications: their records, and their packages on disk; and, at the end, what packages of applications and addons share on
//! their way from an upload, or from another unit, to their place.
//!
//! ```text
//! <folder>/packages/<id>/<version>/   an unpacked package, read-only for instances
//! <folder>/uploads/                   what is arriving, and what is being unpacked
//! ```

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Seek as _, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use fanlight_api::{
    ApplicationId,
    ams::{ApplicationPatch, Pool},
};
use fanlight_store::{Compare, Handle, Op, Record, StoreError, StoreExt as _, encode};
use futures_util::{Stream, StreamExt as _};
use rustix::fs::{Mode, OFlags};
use sha2::{Digest as _, Sha256};
use tempfile::{NamedTempFile, TempDir};

use crate::{
    addons::Addons,
    config,
    core::model::{
        ApplicationRecord, ImageRef, InstanceRecord, OperationRecord, VersionRecord, VersionState, key,
    },
    events::unix_now,
    images::{ImageError, Images},
    manifest::{self, ManifestError},
    operations::Operations,
    package::{self, PackageError},
    peers::Peers,
    settings::Settings,
    size,
};

/// Largest icon, bytes: it travels in every list of applications.
const MAX_ICON_BYTES: u64 = 64 * 1024;
/// How long a package may be on its way to its record.
pub(crate) const IN_FLIGHT: Duration = Duration::from_secs(3600);
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
    /// Another version came in between.
    #[error("another version of the application was made meanwhile: look at it, and try again")]
    Overtaken,
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
    /// Only what can be launched can be published.
    #[error("version {0} of the application cannot be published: it is not active")]
    NotActive(u32),
    /// A package that lies at a unit that is not reached.
    #[error("the package {package} does not lie at this unit of AMS, and cannot be fetched: {reason}")]
    Away {
        /// Which.
        package: String,
        /// Why not.
        reason: String,
    },
    /// Something that must be given.
    #[error("{0} is required")]
    Required(&'static str),
    /// No such addon.
    #[error("addon not found")]
    NoAddon,
    /// An addon that is named elsewhere.
    #[error("addon {0} not found")]
    UnknownAddon(String),
    /// No such version of an addon.
    #[error("addon version {0} not found")]
    NoAddonVersion(u32),
    /// The name of an addon is taken.
    #[error("addon {0} already exists")]
    AddonExists(String),
    /// Something stands on it.
    #[error("addon {name} is in use by {users}")]
    AddonInUse {
        /// Which.
        name: String,
        /// By what.
        users: String,
    },
    /// Every addon has a version.
    #[error("the last version of an addon cannot be deleted: delete the addon")]
    LastAddonVersion,
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
    /// The image it asks for.
    #[error("manifest.yaml: {0}")]
    Image(#[from] ImageError),
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
    packages: PathBuf,
    uploads: PathBuf,
    config: config::Applications,
    settings: Settings,
    images: Images,
    addons: Addons,
    peers: Peers,
}

/// What a version is to stand on instead of what it did; what is not given stays.
#[derive(Clone, Debug, Default)]
pub struct Below {
    /// Name or id of an image; empty: the default.
    pub image: Option<String>,
    /// Names of addons.
    pub addons: Option<Vec<String>>,
}

/// A file that arrived.
pub struct Upload {
    /// The bytes.
    pub file: NamedTempFile,
    /// Their SHA-256, hex.
    pub sha256: String,
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
        settings: Settings,
        store: Handle,
        operations: Operations,
        images: Images,
        addons: Addons,
        peers: Peers,
    ) -> Result<Self, CatalogError> {
        let catalog = Self {
            packages: folder.join("packages"),
            uploads: folder.join("uploads"),
            store,
            operations,
            config,
            settings,
            images,
            addons,
            peers,
        };
        let _ = fs::remove_dir_all(&catalog.uploads);
        for path in [&catalog.packages, &catalog.uploads] {
            fs::create_dir_all(path).map_err(|source| io_at("making the folder", path, source))?;
        }
        catalog.tidy(Duration::ZERO).await?;
        Ok(catalog)
    }

    /// Removes packages of at least this age that nobody knows any more: what a crash left half-made, and what was fetched
    /// from another unit for a version that is gone. What is on its way to its record is younger than [`IN_FLIGHT`].
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn tidy(&self, age: Duration) -> Result<(), StoreError> {
        let known: BTreeMap<String, ApplicationRecord> =
            self.list().await?.into_iter().map(|record| (record.id.to_string(), record)).collect();
        sweep(&self.packages, age, |id, version| {
            known.get(id).is_some_and(|record| record.versions.contains_key(&version))
        });
        Ok(())
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

    /// Where the package of a version lies, brought from another unit if it does not lie at this one.
    ///
    /// # Errors
    /// It lies nowhere that is reached.
    pub async fn package_here(&self, id: &ApplicationId, version: u32) -> Result<PathBuf, CatalogError> {
        let place = self.package(id, version);
        let what = format!("applications/{id}/{version}");
        bring(&self.peers, what, &self.uploads, &place).await.map(|()| place)
    }

    /// Where the package of a version lies.
    pub fn package(&self, id: &ApplicationId, version: u32) -> PathBuf {
        self.packages.join(id.as_str()).join(version.to_string())
    }

    /// The text of a manifest as it was uploaded.
    ///
    /// # Errors
    /// It cannot be read.
    pub async fn manifest(&self, id: &ApplicationId, version: u32) -> Result<Vec<u8>, CatalogError> {
        let folder = self.package_here(id, version).await?;
        read_inside(&folder, "manifest.yaml", manifest::MAX_MANIFEST_BYTES)
            .map_err(|source| io_at("reading", &folder.join("manifest.yaml"), source))
    }

    /// A version as an archive (tar, bzip2) with its SHA-256. The archive that was sent is not kept, so this is another one of
    /// the same files.
    ///
    /// # Errors
    /// There is no such version, or the disk does not take the archive.
    pub async fn export(&self, id: &ApplicationId, version: u32) -> Result<(fs::File, String), CatalogError> {
        let (folder, uploads) = (self.package_here(id, version).await?, self.uploads.clone());
        let pack = move || {
            let fail = |source| io_at("packing", &folder, source);
            if !folder.is_dir() {
                return Err(CatalogError::NoVersion(version));
            }
            let mut file = tempfile::tempfile_in(&uploads).map_err(fail)?;
            package::pack(&folder, &mut file).map_err(fail)?;
            let mut digest = Sha256::new();
            file.rewind().map_err(fail)?;
            io::copy(&mut file, &mut digest).map_err(fail)?;
            file.rewind().map_err(fail)?;
            Ok((file, hex::encode(digest.finalize())))
        };
        tokio::task::spawn_blocking(pack)
            .await
            .map_err(|error| io_at("packing", &self.uploads, io::Error::other(error)))?
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

    async fn unpack(&self, upload: Upload) -> Result<Unpacked, CatalogError> {
        let package_sha256 = upload.sha256.clone();
        let (folder, text) = unpack(&self.uploads, &self.config.max_unpacked, upload).await?;
        let checked = manifest::parse(&text)?;
        let icon = match &checked.icon {
            None => String::new(),
            Some(name) => icon(folder.path(), name)?,
        };
        let mut version = VersionRecord {
            created_at: unix_now(),
            published: self.settings.get().auto_publish,
            state: VersionState::Active,
            manifest: checked,
            manifest_sha256: hex::encode(Sha256::digest(&text)),
            package_sha256,
            icon,
            image: ImageRef::default(),
            addons: Vec::new(),
        };
        self.stand(&mut version).await?;
        Ok(Unpacked { folder, version })
    }

    /// Puts a version on the newest of what its manifest and the settings name, and says whether it must be made.
    async fn stand(&self, version: &mut VersionRecord) -> Result<(), CatalogError> {
        version.image = self.images.resolve(&version.manifest.image, None).await?;
        version.state = VersionState::Active;
        version.addons = Vec::new();
        if version.image.sha256.is_some() {
            version.state = VersionState::Building { base: None };
            let mut names = self.settings.get().addons.clone();
            names.extend(version.manifest.addons.iter().cloned());
            version.addons = self.addons.resolve(&names).await?;
        } else if let Some(key) = version.manifest.needs_image() {
            return Err(ManifestError::Unsupported { key }.into());
        }
        Ok(())
    }

    fn keep(&self, unpacked: TempDir, id: &ApplicationId, version: u32) -> Result<(), CatalogError> {
        keep(unpacked, &self.package(id, version))
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
            pool: Default::default(),
            versions: BTreeMap::from([(0, version)]),
            next_version: 1,
            deleted: false,
        };
        let (operation, write) = self.begin("Creating application", &id, &record, 0);
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
        self.operations.begun(&operation);
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
        self.add(&current.value, folder, version, None).await
    }

    /// Makes a version of the newest one's package on the newest image and addons; nothing where it stands on them already.
    ///
    /// # Errors
    /// There is no such application, what it is to stand on is not there, or the disk does not take the package again.
    pub async fn renew(&self, id_or_name: &str, below: &Below) -> Result<OperationRecord, CatalogError> {
        let current = self.find(id_or_name).await?.value;
        let id = current.id.clone();
        let (newest, old) = current.versions.last_key_value().ok_or(CatalogError::NotFound)?;
        let Some(version) = self.renewed(old, below).await? else {
            return self.done("Updating application", &id).await;
        };
        let (from, uploads) = (self.package_here(&id, *newest).await?, self.uploads.clone());
        let copy = tokio::task::spawn_blocking(move || {
            let fail = |source| io_at("copying the package", &from, source);
            let folder = TempDir::new_in(&uploads).map_err(fail)?;
            package::copy(&from, folder.path()).map_err(fail)?;
            open(folder.path())?;
            Ok::<_, CatalogError>(folder)
        });
        let folder = copy.await.map_err(|error| {
            io_at("copying the package of", &self.package(&id, *newest), io::Error::other(error))
        })??;
        tracing::info!(
            "application {} gets a version on {} {}",
            current.name,
            version.image.name,
            version.image.version
        );
        self.add(&current, folder, version, Some(*newest)).await
    }

    /// Whether there is a newer image or addon below the newest version of an application.
    ///
    /// # Errors
    /// There is no such application, or what it stands on is not there any more.
    pub async fn is_behind(&self, id: &str) -> Result<bool, CatalogError> {
        let current = self.find(id).await?.value;
        let newest = current.newest().ok_or(CatalogError::NotFound)?;
        Ok(self.renewed(newest, &Below::default()).await?.is_some())
    }

    /// A version of the same package on the newest there is; none: it stands on that already.
    async fn renewed(
        &self,
        old: &VersionRecord,
        below: &Below,
    ) -> Result<Option<VersionRecord>, CatalogError> {
        let mut version = VersionRecord {
            created_at: unix_now(),
            published: self.settings.get().auto_publish,
            ..old.clone()
        };
        if let Some(image) = &below.image {
            if !image.is_empty() && !manifest::is_object_name(image) {
                return Err(CatalogError::Invalid("image"));
            }
            version.manifest.image = image.clone();
        }
        if let Some(addons) = &below.addons {
            version.manifest.addons = addons.clone();
        }
        self.stand(&mut version).await?;
        let stands_on = |version: &VersionRecord| {
            (version.image.id.clone(), version.image.version, version.addons.clone())
        };
        Ok((stands_on(&version) != stands_on(old)).then_some(version))
    }

    /// Adds a version with its package; after that one only, where one is given.
    async fn add(
        &self,
        current: &ApplicationRecord,
        folder: TempDir,
        version: VersionRecord,
        after: Option<u32>,
    ) -> Result<OperationRecord, CatalogError> {
        let id = current.id.clone();
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
        let most = self.settings.get().max_published_versions;
        let preview =
            ApplicationRecord { versions: BTreeMap::from([(number, version.clone())]), ..current.clone() };
        let (operation, write) = self.begin("Updating application", &id, &preview, number);
        let written = self
            .transact(&id, vec![write], |record| {
                let newest = record.versions.last_key_value().map(|(number, _)| *number);
                if after.is_some() && newest != after {
                    return Err(CatalogError::Overtaken);
                }
                record.versions.insert(number, version.clone());
                removed = surplus(record, most, &used)
                    .into_iter()
                    .filter_map(|old| Some((old, record.versions.remove(&old)?)))
                    .collect();
                Ok(())
            })
            .await;
        if let Err(error) = written {
            remove(&self.package(&id, number));
            return Err(error);
        }
        for (old, version) in &removed {
            self.drop_version(&id, *old, version).await;
        }
        self.operations.begun(&operation);
        Ok(operation)
    }

    /// The operation of a new version: it ends now, or when the version is made.
    fn begin(
        &self,
        description: &str,
        id: &ApplicationId,
        record: &ApplicationRecord,
        number: u32,
    ) -> (OperationRecord, Op) {
        let active =
            record.versions.get(&number).is_some_and(|version| version.state == VersionState::Active);
        match active {
            true => self.operations.prepare_done(description, "applications", &url(id), Ok(())),
            false => self.operations.prepare(description, "applications", &url(id), None),
        }
    }

    /// Versions that are being made.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn unfinished(&self) -> Result<Vec<(ApplicationId, u32)>, StoreError> {
        let list = self.list().await?;
        let versions = list.into_iter().flat_map(|record| {
            let building = |version: &VersionRecord| matches!(version.state, VersionState::Building { .. });
            let numbers: Vec<u32> = record
                .versions
                .iter()
                .filter(|(_, version)| building(version))
                .map(|(number, _)| *number)
                .collect();
            numbers.into_iter().map(move |number| (record.id.clone(), number))
        });
        Ok(versions.collect())
    }

    /// Changes how far a version is, and what it is made of.
    ///
    /// # Errors
    /// There is no such version any more.
    pub async fn set_state(
        &self,
        id: &ApplicationId,
        number: u32,
        state: &VersionState,
        sha256: Option<&str>,
    ) -> Result<(), CatalogError> {
        self.change(id, |record| {
            let version = record.versions.get_mut(&number).ok_or(CatalogError::NoVersion(number))?;
            version.state = state.clone();
            if let Some(sha256) = sha256 {
                version.image.sha256 = Some(sha256.to_owned());
            }
            Ok(())
        })
        .await?;
        Ok(())
    }

    /// Removes what lies on disks for a version.
    async fn drop_version(&self, id: &ApplicationId, number: u32, version: &VersionRecord) {
        remove(&self.package(id, number));
        if version.state == VersionState::Active
            && let Some(sha256) = &version.image.sha256
        {
            self.images.drop_made(sha256).await;
        }
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
                return Err(CatalogError::NotActive(number));
            }
            version.published = published.unwrap_or(version.published);
            Ok(())
        })
        .await
    }

    /// Changes what is set; another image or other addons make a new version.
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
        let pool = patch.pool.unwrap_or_default();
        let size = pool.size.unwrap_or_default();
        if manifest::check_pool(&Pool { size, ..Pool::default() }).is_err() {
            return Err(CatalogError::Invalid("pool.size"));
        }
        let below = Below { image: patch.image.clone(), addons: patch.addons.clone() };
        let changes_below = below.image.is_some() || below.addons.is_some();
        let others = ApplicationPatch { image: None, addons: None, ..patch.clone() };
        if changes_below && others == ApplicationPatch::default() {
            return self.renew(id.as_str(), &below).await;
        }
        if changes_below {
            // Before anything else is changed: a wrong name changes nothing.
            let current = self.find(id.as_str()).await?.value;
            self.renewed(current.newest().ok_or(CatalogError::NotFound)?, &below).await?;
        }
        let changed = self
            .change_with("Updating application", &id, |record| {
                record.pool.size = pool.size.or(record.pool.size);
                record.pool.start = pool.start.or(record.pool.start);
                record.tags = patch.tags.clone().or(record.tags.take());
                record.node_selector = patch.node_selector.clone().or(record.node_selector.take());
                record.inhibit_auto_updates =
                    patch.inhibit_auto_updates.unwrap_or(record.inhibit_auto_updates);
                Ok(())
            })
            .await?;
        match changes_below {
            true => self.renew(id.as_str(), &below).await,
            false => Ok(changed),
        }
    }

    /// Removes an application with its packages.
    ///
    /// # Errors
    /// There is no such application, or instances use it and it is not forced.
    pub async fn delete(&self, id_or_name: &str, force: bool) -> Result<OperationRecord, CatalogError> {
        let current = self.find(id_or_name).await?;
        let (id, name) = (current.value.id.clone(), current.value.name.clone());
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
        for (number, version) in &current.value.versions {
            self.drop_version(&id, *number, version).await;
        }
        remove(&self.packages.join(id.as_str()));
        tracing::info!("application {name} was deleted ({id})");
        self.operations.begun(&operation);
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
        let gone = current.versions.get(&number).cloned();
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
        if let Some(version) = gone {
            self.drop_version(&id, number, &version).await;
        }
        Ok(operation)
    }

    /// Versions that instances run. Those that wait for a launch go with their version.
    async fn used_versions(&self, id: &ApplicationId) -> Result<Vec<u32>, StoreError> {
        let records = self.store.list_json::<InstanceRecord>(key::INSTANCES).await?;
        let records = records.into_iter().map(|(_, record)| record.value);
        let applications =
            records.filter(|record| !record.is_waiting()).filter_map(|record| record.application);
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
        self.operations.begun(&operation);
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
}

/// Unpacks a package into a folder of its own, and gives the text of its manifest.
///
/// # Errors
/// It is no package, or the disk does not take it.
pub(crate) async fn unpack(
    uploads: &Path,
    most: &str,
    mut upload: Upload,
) -> Result<(TempDir, String), CatalogError> {
    let limits = package::Limits {
        unpacked_bytes: size::parse(most).unwrap_or(u64::MAX),
        ..package::Limits::default()
    };
    let folder = TempDir::new_in(uploads).map_err(|source| io_at("making a folder", uploads, source))?;
    tokio::task::spawn_blocking(move || {
        package::unpack(upload.file.as_file_mut(), folder.path(), limits)?;
        let text =
            read_inside(folder.path(), "manifest.yaml", manifest::MAX_MANIFEST_BYTES).map_err(|error| {
                match error.kind() {
                    io::ErrorKind::NotFound => {
                        ManifestError::Required("the file itself, at the root of the package,")
                    }
                    _ => ManifestError::Malformed(error.to_string()),
                }
            })?;
        let text = String::from_utf8(text).map_err(|_| ManifestError::Malformed("it is not UTF-8".into()))?;
        open(folder.path())?;
        Ok((folder, text))
    })
    .await
    .expect("unpacking does not panic, and the runtime ends after us")
}

/// Brings a package from another unit, if it does not lie here.
///
/// # Errors
/// It lies nowhere that is reached.
pub(crate) async fn bring(
    peers: &Peers,
    package: String,
    uploads: &Path,
    place: &Path,
) -> Result<(), CatalogError> {
    if place.is_dir() {
        return Ok(());
    }
    peers.fetch(&package, uploads, place).await.map_err(|reason| CatalogError::Away { package, reason })
}

/// Lets instances of other users look into a package.
///
/// # Errors
/// It is not ours.
pub(crate) fn open(folder: &Path) -> Result<(), CatalogError> {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755))
        .map_err(|source| io_at("opening", folder, source))
}

/// Moves an unpacked package to its place.
///
/// # Errors
/// The disk does not take it.
pub(crate) fn keep(unpacked: TempDir, place: &Path) -> Result<(), CatalogError> {
    let fail = |source| io_at("moving the package to", place, source);
    fs::create_dir_all(place.parent().expect("it lies below the packages")).map_err(fail)?;
    // A folder of this number without a record is from a crash.
    let _ = fs::remove_dir_all(place);
    fs::rename(unpacked.path(), place).map_err(fail)?;
    // It is no longer where it would be removed.
    let _ = unpacked.keep();
    Ok(())
}

/// Removes the packages of some age that nobody knows, by the name of their folder and their number.
pub(crate) fn sweep(packages: &Path, age: Duration, known: impl Fn(&str, u32) -> bool) {
    let is_old = |entry: &fs::DirEntry| {
        let changed = entry.metadata().and_then(|metadata| metadata.modified()).ok();
        changed.is_none_or(|changed| changed.elapsed().is_ok_and(|passed| passed >= age))
    };
    for entry in read_dir(packages) {
        let name = entry.file_name().to_string_lossy().into_owned();
        for version in read_dir(&entry.path()) {
            let number = version.file_name().to_string_lossy().parse::<u32>();
            if is_old(&version) && !number.is_ok_and(|number| known(&name, number)) {
                remove(&version.path());
            }
        }
        // Stays where something is in it.
        let _ = fs::remove_dir(entry.path());
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

/// Removes a folder, now or at the next start.
pub(crate) fn remove(path: &Path) {
    match fs::remove_dir_all(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        // Removed at the next start.
        Err(error) => tracing::warn!("removing {}: {error}", path.display()),
    }
}

pub(crate) fn io_at(doing: &'static str, path: &Path, source: io::Error) -> CatalogError {
    CatalogError::Io { doing, path: path.to_owned(), source }
}
