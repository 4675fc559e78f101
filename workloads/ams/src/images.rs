//! Images: root file systems that hold the streamer, with numbered versions. The files lie here, the engine has what it
//! makes instances of.
//!
//! ```text
//! <folder>/images/<sha256>   a file as it was uploaded
//! ```

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use fanlight_api::{
    ApplicationId, OperationId,
    ams::{
        self, ImageStatus,
        images::{Image, ImageVersion, ImagesPost},
    },
};
use fanlight_store::{Compare, Handle, Op, Record, StoreError, StoreExt as _, encode};

use crate::{
    catalog::Upload,
    core::model::{
        ApplicationRecord, ImageRecord, ImageRef, ImageState, ImageVersionRecord, InstanceRecord,
        OperationRecord, key,
    },
    engine::Engine,
    events::unix_now,
    manifest,
    operations::Operations,
};

/// How often a change begins again when others were faster.
const ATTEMPTS: u32 = 32;

/// A request about images that cannot be met.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// No such image.
    #[error("image not found")]
    NotFound,
    /// No such version.
    #[error("image version {0} not found")]
    NoVersion(u32),
    /// There is no image, or none was made the default.
    #[error("image not found: name one, or make one the default")]
    NoDefault,
    /// Nothing of it can be used yet.
    #[error("image {name} has no active version{}", if .reason.is_empty() { String::new() } else { format!(": {}", .reason) })]
    NotActive {
        /// Which.
        name: String,
        /// What the newest one says.
        reason: String,
    },
    /// The name or the file is there.
    #[error("image {0} already exists")]
    Exists(String),
    /// A value that is not allowed.
    #[error("argument {argument} is invalid: {reason}")]
    Invalid {
        /// Which.
        argument: &'static str,
        /// What is wrong, with the value.
        reason: String,
    },
    /// Something that must be given.
    #[error("{0} is required")]
    Required(&'static str),
    /// Applications or instances stand on it.
    #[error("image {name} is in use by {users}: delete them first, or use force")]
    InUse {
        /// Which.
        name: String,
        /// By whom.
        users: String,
    },
    /// The default goes last.
    #[error("image {0} is the default: make another one the default first")]
    IsDefault(String),
    /// Every image has a version.
    #[error("the last version of an image cannot be deleted: delete the image")]
    LastVersion,
    /// Something that is not there.
    #[error("{0}")]
    Unsupported(String),
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
    #[error("the records of images cannot be used")]
    Store(#[from] StoreError),
}

/// All images. Clones are handles of the same.
#[derive(Clone)]
pub struct Images {
    inner: Arc<Inner>,
}

struct Inner {
    store: Handle,
    engine: Arc<dyn Engine>,
    operations: Operations,
    files: PathBuf,
}

impl Images {
    /// Opens the folder, removes files that nobody needs, and goes on with what was being taken in.
    ///
    /// # Errors
    /// The folder or the store cannot be used.
    pub async fn open(
        folder: &Path,
        store: Handle,
        engine: Arc<dyn Engine>,
        operations: Operations,
    ) -> Result<Self, ImageError> {
        let files = folder.join("images");
        fs::create_dir_all(&files).map_err(|source| io_at("making the folder", &files, source))?;
        let images = Self { inner: Arc::new(Inner { store, engine, operations, files }) };
        let records = images.records().await?;
        let wanted: BTreeSet<&str> = records
            .iter()
            .flat_map(|record| record.versions.values().map(|version| version.sha256.as_str()))
            .collect();
        for entry in fs::read_dir(&images.inner.files).into_iter().flatten().flatten() {
            if !entry.file_name().to_str().is_some_and(|name| wanted.contains(name)) {
                let _ = fs::remove_file(entry.path());
            }
        }
        for record in &records {
            for (number, version) in &record.versions {
                // At the unit that has the file; another one may be at it just now.
                if version.state == ImageState::Importing && images.path(&version.sha256).is_file() {
                    images.import(record.id.clone(), *number, version.sha256.clone(), None);
                }
            }
        }
        Ok(images)
    }

    async fn records(&self) -> Result<Vec<ImageRecord>, StoreError> {
        let records = self.inner.store.list_json::<ImageRecord>(key::IMAGES).await?;
        let mut list: Vec<_> = records.into_iter().map(|(_, record)| record.value).collect();
        list.sort_by(|a, b| (a.created_at, &a.id).cmp(&(b.created_at, &b.id)));
        Ok(list)
    }

    async fn default_id(&self) -> Result<Option<String>, StoreError> {
        Ok(self.inner.store.get_json::<String>(key::DEFAULT_IMAGE).await?.map(|record| record.value))
    }

    async fn record(&self, id_or_name: &str) -> Result<Record<ImageRecord>, ImageError> {
        // Keys are texts; what cannot be one is nobody's name.
        if !manifest::is_object_name(id_or_name) {
            return Err(ImageError::NotFound);
        }
        if let Some(record) = self.inner.store.get_json(&key::image(id_or_name)).await? {
            return Ok(record);
        }
        let by_name: Option<Record<String>> = self.inner.store.get_json(&key::image_name(id_or_name)).await?;
        let Some(by_name) = by_name else { return Err(ImageError::NotFound) };
        self.inner.store.get_json(&key::image(&by_name.value)).await?.ok_or(ImageError::NotFound)
    }

    /// All images as answered, oldest first.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn list(&self) -> Result<Vec<Image>, StoreError> {
        let default = self.default_id().await?;
        let applications = self.inner.store.list_json::<ApplicationRecord>(key::APPLICATIONS).await?;
        let applications: Vec<ApplicationRecord> =
            applications.into_iter().map(|(_, record)| record.value).collect();
        let mut list = Vec::new();
        if !self.inner.engine.has_images() {
            list.push(host(&applications));
        }
        for record in self.records().await? {
            list.push(to_api(&record, default.as_deref() == Some(record.id.as_str()), &applications));
        }
        Ok(list)
    }

    /// One image as answered, by id or name.
    ///
    /// # Errors
    /// There is none, or the store cannot be read.
    pub async fn find(&self, id_or_name: &str) -> Result<Image, ImageError> {
        let list = self.list().await?;
        let by_id = list.iter().find(|image| image.id == id_or_name);
        by_id
            .or_else(|| list.iter().find(|image| image.name == id_or_name))
            .cloned()
            .ok_or(ImageError::NotFound)
    }

    /// What an instance is made of. Empty: the default; no version, or -1: the newest that can be used.
    ///
    /// # Errors
    /// There is no such image or version, or it cannot be used.
    pub async fn resolve(&self, id_or_name: &str, version: Option<i64>) -> Result<ImageRef, ImageError> {
        if !self.inner.engine.has_images() {
            return match id_or_name {
                "" | manifest::HOST_IMAGE => Ok(ImageRef::default()),
                other => Err(ImageError::Invalid {
                    argument: "image",
                    reason: format!(
                        "{:?} not found: {} is the only image here",
                        short(other),
                        manifest::HOST_IMAGE
                    ),
                }),
            };
        }
        let record = match id_or_name {
            "" => match self.default_id().await? {
                Some(id) => self.record(&id).await.map_err(|_| ImageError::NoDefault)?,
                None => return Err(ImageError::NoDefault),
            },
            given => self.record(given).await?,
        }
        .value;
        let found = match version {
            None | Some(-1) => record.newest().ok_or_else(|| ImageError::NotActive {
                name: record.name.clone(),
                reason: match record.versions.values().next_back().map(|version| &version.state) {
                    Some(ImageState::Importing) => "it is being taken in".into(),
                    Some(ImageState::Failed { error }) => error.clone(),
                    _ => String::new(),
                },
            })?,
            Some(number) => {
                let number = u32::try_from(number).map_err(|_| ImageError::Invalid {
                    argument: "image_version",
                    reason: format!("{number}: a number from 0 is needed"),
                })?;
                let version = record.versions.get(&number).ok_or(ImageError::NoVersion(number))?;
                if version.state != ImageState::Active {
                    let name = format!("{} version {number}", record.name);
                    return Err(ImageError::NotActive { name, reason: String::new() });
                }
                (number, version)
            }
        };
        Ok(ImageRef {
            id: record.id.clone(),
            name: record.name.clone(),
            version: found.0,
            sha256: Some(found.1.sha256.clone()),
        })
    }

    fn path(&self, sha256: &str) -> PathBuf {
        self.inner.files.join(sha256)
    }

    /// Makes an image of a file. The operation ends when the engine has taken it in.
    ///
    /// # Errors
    /// The name is taken or missing, or this engine has no images.
    pub async fn create(&self, upload: Upload, post: &ImagesPost) -> Result<OperationRecord, ImageError> {
        self.only_with_images()?;
        check_kind(&post.kind)?;
        let name = post.name.as_str();
        if name.is_empty() {
            return Err(ImageError::Required("name"));
        }
        if !manifest::is_object_name(name) || name == manifest::HOST_IMAGE {
            return Err(ImageError::Invalid {
                argument: "name",
                reason: format!("{:?}: 3 to 255 characters of A-Z a-z 0-9 - _ : . are allowed", short(name)),
            });
        }
        let id = ApplicationId::generate().to_string();
        let name_key = key::image_name(name);
        let size = self.keep(upload, &id).await?;
        let record = ImageRecord {
            id: id.clone(),
            name: name.to_owned(),
            created_at: unix_now(),
            architecture: std::env::consts::ARCH.into(),
            versions: BTreeMap::from([(0, size.1)]),
            next_version: 1,
        };
        let (operation, write) = self.inner.operations.prepare("Creating image", "images", &url(&id), None);
        let mut compares = vec![Compare::absent(&name_key)];
        let mut ops = vec![
            Op::put(key::image(&id), encode(&key::image(&id), &record)?),
            Op::put(&name_key, encode(&name_key, &id)?),
            write,
        ];
        let default = self.inner.store.get(key::DEFAULT_IMAGE).await?;
        if post.default || default.is_none() {
            // The first one is the default.
            compares.push(match default {
                Some(entry) => Compare::revision(key::DEFAULT_IMAGE, entry.revision),
                None => Compare::absent(key::DEFAULT_IMAGE),
            });
            ops.push(Op::put(key::DEFAULT_IMAGE, encode(key::DEFAULT_IMAGE, &id)?));
        }
        match self.inner.store.transact(compares, ops).await {
            Ok(_) => {}
            Err(StoreError::Conflict) => return Err(ImageError::Exists(name.to_owned())),
            Err(error) => return Err(error.into()),
        }
        self.inner.operations.begun(&operation);
        tracing::info!("image {name} is being taken in ({id})");
        self.import(id, 0, size.0, Some(operation.operation.id.clone()));
        Ok(operation)
    }

    /// Adds a version. The same file as the newest version's changes nothing.
    ///
    /// # Errors
    /// There is no such image.
    pub async fn update(&self, id_or_name: &str, upload: Upload) -> Result<OperationRecord, ImageError> {
        self.only_with_images()?;
        let record = self.record(id_or_name).await?.value;
        let id = record.id;
        let same = record.versions.values().next_back();
        if same.is_some_and(|newest| newest.sha256 == upload.sha256 && newest.state == ImageState::Active) {
            return self.done("Updating image", &id).await;
        }
        let (sha256, version) = self.keep(upload, &id).await?;
        let mut number = 0;
        let (operation, write) = self.inner.operations.prepare("Updating image", "images", &url(&id), None);
        self.change(&id, vec![write], |record| {
            number = record.next_version;
            record.next_version += 1;
            record.versions.insert(number, version.clone());
            Ok(())
        })
        .await?;
        self.inner.operations.begun(&operation);
        self.import(id, number, sha256, Some(operation.operation.id.clone()));
        Ok(operation)
    }

    /// Notes an image that the engine made by itself, of an instance.
    ///
    /// # Errors
    /// The name is taken or missing.
    pub async fn publish(
        &self,
        post: &ImagesPost,
        operation: &OperationId,
        sha256: String,
    ) -> Result<(), ImageError> {
        let id = ApplicationId::generate().to_string();
        let name_key = key::image_name(&post.name);
        let version =
            ImageVersionRecord { sha256, size: 0, created_at: unix_now(), state: ImageState::Active };
        let record = ImageRecord {
            id: id.clone(),
            name: post.name.clone(),
            created_at: unix_now(),
            architecture: std::env::consts::ARCH.into(),
            versions: BTreeMap::from([(0, version)]),
            next_version: 1,
        };
        let mut ops = vec![
            Op::put(key::image(&id), encode(&key::image(&id), &record)?),
            Op::put(&name_key, encode(&name_key, &id)?),
        ];
        if post.default {
            ops.push(Op::put(key::DEFAULT_IMAGE, encode(key::DEFAULT_IMAGE, &id)?));
        }
        match self.inner.store.transact(vec![Compare::absent(&name_key)], ops).await {
            Ok(_) => {}
            Err(StoreError::Conflict) => return Err(ImageError::Exists(post.name.clone())),
            Err(error) => return Err(error.into()),
        }
        self.inner.operations.finish(operation, Ok(())).await?;
        Ok(())
    }

    /// Makes an image the default.
    ///
    /// # Errors
    /// There is no such image.
    pub async fn make_default(&self, id_or_name: &str) -> Result<OperationRecord, ImageError> {
        let id = self.record(id_or_name).await?.value.id;
        let (operation, write) =
            self.inner.operations.prepare_done("Updating image", "images", &url(&id), Ok(()));
        let ops = vec![Op::put(key::DEFAULT_IMAGE, encode(key::DEFAULT_IMAGE, &id)?), write];
        self.inner.store.transact(Vec::new(), ops).await?;
        self.inner.operations.begun(&operation);
        Ok(operation)
    }

    /// Nothing to look for: images here come from files.
    ///
    /// # Errors
    /// There is no such image.
    pub async fn sync(&self, id_or_name: &str) -> Result<OperationRecord, ImageError> {
        let record = self.record(id_or_name).await?.value;
        let failed: Vec<(u32, String)> = record
            .versions
            .iter()
            .filter(|(_, version)| matches!(version.state, ImageState::Failed { .. }))
            .map(|(number, version)| (*number, version.sha256.clone()))
            .collect();
        let operation = self.done("Updating image", &record.id).await?;
        for (number, sha256) in failed.into_iter().filter(|(_, sha256)| self.path(sha256).is_file()) {
            self.import(record.id.clone(), number, sha256, None);
        }
        Ok(operation)
    }

    /// Removes an image with all versions.
    ///
    /// # Errors
    /// There is no such image, it is in use, or it is the default and not the last.
    pub async fn delete(&self, id_or_name: &str, force: bool) -> Result<OperationRecord, ImageError> {
        let Record { value: record, revision } = self.record(id_or_name).await?;
        let is_default = self.default_id().await?.as_deref() == Some(record.id.as_str());
        if is_default && self.records().await?.len() > 1 {
            return Err(ImageError::IsDefault(record.name));
        }
        if !force {
            self.check_unused(&record, None).await?;
        }
        let (operation, write) =
            self.inner.operations.prepare_done("Deleting image", "images", &url(&record.id), Ok(()));
        let mut ops =
            vec![Op::delete(key::image(&record.id)), Op::delete(key::image_name(&record.name)), write];
        if is_default {
            ops.push(Op::delete(key::DEFAULT_IMAGE));
        }
        let compares = vec![Compare::revision(key::image(&record.id), revision)];
        match self.inner.store.transact(compares, ops).await {
            Ok(_) => {}
            Err(StoreError::Conflict) => return Box::pin(self.delete(id_or_name, force)).await,
            Err(error) => return Err(error.into()),
        }
        self.inner.operations.begun(&operation);
        for version in record.versions.values() {
            self.drop_file(&version.sha256).await;
        }
        tracing::info!("image {} was deleted ({})", record.name, record.id);
        Ok(operation)
    }

    /// Removes a version.
    ///
    /// # Errors
    /// There is no such version, it is in use, or it is the last.
    pub async fn delete_version(&self, id_or_name: &str, number: u32) -> Result<OperationRecord, ImageError> {
        let record = self.record(id_or_name).await?.value;
        let sha256 = record.versions.get(&number).ok_or(ImageError::NoVersion(number))?.sha256.clone();
        self.check_unused(&record, Some(number)).await?;
        let (operation, write) =
            self.inner.operations.prepare_done("Deleting image version", "images", &url(&record.id), Ok(()));
        self.change(&record.id, vec![write], |record| {
            if record.versions.len() == 1 {
                return Err(ImageError::LastVersion);
            }
            record.versions.remove(&number).map(drop).ok_or(ImageError::NoVersion(number))
        })
        .await?;
        self.inner.operations.begun(&operation);
        self.drop_file(&sha256).await;
        Ok(operation)
    }

    async fn check_unused(&self, record: &ImageRecord, version: Option<u32>) -> Result<(), ImageError> {
        let uses = |image: &ImageRef| {
            image.id == record.id && version.is_none_or(|version| image.version == version)
        };
        let instances = self.inner.store.list_json::<InstanceRecord>(key::INSTANCES).await?;
        let instances = instances.iter().filter(|(_, instance)| uses(&instance.value.image)).count();
        let applications = self.inner.store.list_json::<ApplicationRecord>(key::APPLICATIONS).await?;
        let applications: Vec<&str> = applications
            .iter()
            .filter(|(_, record)| record.value.versions.values().any(|version| uses(&version.image)))
            .map(|(_, record)| record.value.name.as_str())
            .collect();
        if instances == 0 && applications.is_empty() {
            return Ok(());
        }
        let mut users = Vec::new();
        if !applications.is_empty() {
            users.push(format!("the applications {}", applications.join(", ")));
        }
        if instances > 0 {
            users.push(format!("{instances} instances"));
        }
        Err(ImageError::InUse { name: record.name.clone(), users: users.join(" and ") })
    }

    fn only_with_images(&self) -> Result<(), ImageError> {
        match self.inner.engine.has_images() {
            true => Ok(()),
            false => Err(ImageError::Unsupported(
                "images not supported: instances run the programs of this machine".into(),
            )),
        }
    }

    /// Moves a file to its place.
    async fn keep(&self, upload: Upload, id: &str) -> Result<(String, ImageVersionRecord), ImageError> {
        let path = self.path(&upload.sha256);
        let size = upload.file.as_file().metadata().map(|metadata| metadata.len()).unwrap_or(0);
        upload.file.persist(&path).map_err(|error| io_at("moving the image to", &path, error.error))?;
        tracing::debug!("the file of image {id} lies at {}", path.display());
        let sha256 = upload.sha256;
        let version = ImageVersionRecord {
            sha256: sha256.clone(),
            size,
            created_at: unix_now(),
            state: ImageState::Importing,
        };
        Ok((sha256, version))
    }

    /// Lets the engine take a version in; its state and the operation say how that ended.
    fn import(&self, id: String, number: u32, sha256: String, operation: Option<OperationId>) {
        let images = self.clone();
        tokio::spawn(async move {
            let path = images.path(&sha256);
            let done = images.inner.engine.import_image(&sha256, &path).await;
            let error = done.err().map(|error| fanlight_service::telemetry::chain(&error));
            match &error {
                None => tracing::info!("image {id} version {number} can be used"),
                Some(error) => tracing::warn!("image {id} version {number}: {error}"),
            }
            let noted = images
                .change(&id, Vec::new(), |record| {
                    let version = record.versions.get_mut(&number).ok_or(ImageError::NoVersion(number))?;
                    version.state = match &error {
                        None => ImageState::Active,
                        Some(error) => ImageState::Failed { error: error.clone() },
                    };
                    Ok(())
                })
                .await;
            if let Err(error) = noted {
                tracing::warn!("noting the state of image {id} version {number}: {error}");
            }
            if let Some(operation) = operation
                && let Err(error) =
                    images.inner.operations.finish(&operation, error.map_or(Ok(()), Err)).await
            {
                tracing::warn!("ending the operation of image {id}: {error}");
            }
        });
    }

    /// Removes from the engine what was made for a version of an application.
    pub async fn drop_made(&self, sha256: &str) {
        self.drop_file(sha256).await;
    }

    async fn drop_file(&self, sha256: &str) {
        let Ok(records) = self.records().await else { return };
        let needed =
            records.iter().any(|record| record.versions.values().any(|version| version.sha256 == sha256));
        if needed {
            return;
        }
        let _ = fs::remove_file(self.path(sha256));
        if let Err(error) = self.inner.engine.delete_image(sha256).await {
            tracing::warn!("removing the image {sha256} from the engine: {error}");
        }
    }

    async fn change(
        &self,
        id: &str,
        more: Vec<Op>,
        mut change: impl FnMut(&mut ImageRecord) -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        let key = key::image(id);
        for _ in 0..ATTEMPTS {
            let record = self.inner.store.get_json::<ImageRecord>(&key).await?;
            let Record { value: mut record, revision } = record.ok_or(ImageError::NotFound)?;
            change(&mut record)?;
            let mut ops = vec![Op::put(&key, encode(&key, &record)?)];
            ops.extend(more.iter().cloned());
            match self.inner.store.transact(vec![Compare::revision(&key, revision)], ops).await {
                Ok(_) => return Ok(()),
                Err(StoreError::Conflict) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(StoreError::Conflict.into())
    }

    async fn done(&self, description: &str, id: &str) -> Result<OperationRecord, ImageError> {
        let (operation, write) = self.inner.operations.prepare_done(description, "images", &url(id), Ok(()));
        self.inner.store.transact(Vec::new(), vec![write]).await?;
        self.inner.operations.begun(&operation);
        Ok(operation)
    }
}

/// The programs of the machine, as an image.
fn host(applications: &[ApplicationRecord]) -> Image {
    let (status_code, status) = ImageStatus::Active.wire();
    let version = ImageVersion { status_code, status: status.into(), ..ImageVersion::default() };
    Image {
        id: manifest::HOST_IMAGE.into(),
        name: manifest::HOST_IMAGE.into(),
        versions: vec![version],
        status_code,
        status: status.into(),
        used_by: applications.iter().map(|application| application.id.to_string()).collect(),
        default: true,
        immutable: true,
        architecture: std::env::consts::ARCH.into(),
        kind: "container".into(),
        variant: "generic".into(),
        capabilities: Vec::new(),
    }
}

fn to_api(record: &ImageRecord, default: bool, applications: &[ApplicationRecord]) -> Image {
    let versions: Vec<ImageVersion> = record
        .versions
        .iter()
        .map(|(number, version)| {
            let (state, error) = match &version.state {
                ImageState::Importing => (ImageStatus::Created, ""),
                ImageState::Active => (ImageStatus::Active, ""),
                ImageState::Failed { error } => (ImageStatus::Error, error.as_str()),
            };
            let (status_code, status) = state.wire();
            ImageVersion {
                version: *number,
                fingerprint: version.sha256.clone(),
                size: version.size,
                created_at: version.created_at,
                status_code,
                status: status.into(),
                remote_id: String::new(),
                error_message: error.into(),
            }
        })
        .collect();
    let (unknown, text) = ams::ImageStatus::Initializing.wire();
    let newest = versions.last().map(|version| (version.status_code, version.status.clone()));
    let (status_code, status) = newest.unwrap_or((unknown, text.into()));
    Image {
        id: record.id.clone(),
        name: record.name.clone(),
        versions,
        status_code,
        status,
        used_by: applications
            .iter()
            .filter(|application| application.versions.values().any(|version| version.image.id == record.id))
            .map(|application| application.id.to_string())
            .collect(),
        default,
        immutable: false,
        architecture: record.architecture.clone(),
        kind: "container".into(),
        variant: "generic".into(),
        capabilities: Vec::new(),
    }
}

/// Images are of containers.
pub fn check_kind(kind: &str) -> Result<(), ImageError> {
    match kind {
        "" | "container" => Ok(()),
        "vm" => Err(ImageError::Unsupported("type vm not supported: instances are containers".into())),
        other => {
            let reason = format!("{:?}: container is allowed", short(other));
            Err(ImageError::Invalid { argument: "type", reason })
        }
    }
}

fn url(id: &str) -> String {
    format!("/1.0/images/{id}")
}

fn short(text: &str) -> String {
    text.chars().take(64).collect()
}

fn io_at(doing: &'static str, path: &Path, source: io::Error) -> ImageError {
    ImageError::Io { doing, path: path.to_owned(), source }
}
