//! Addons: files and hooks that are put below applications and instances (ams-model section 5). Their packages lie here;
//! who puts them into instances is `bootstrap` for applications and the engine for instances without one.
//!
//! ```text
//! <folder>/addons/<name>/<version>/   an unpacked package
//! ```

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use fanlight_api::ams::addons::{Addon, AddonManifest, AddonVersion};
use fanlight_store::{Compare, Handle, Op, Record, StoreError, StoreExt as _, encode};

use crate::{
    catalog::{self, CatalogError, Upload},
    config,
    core::model::{
        AddonRecord, AddonRef, AddonVersionRecord, ApplicationRecord, InstanceRecord, OperationRecord, key,
    },
    events::unix_now,
    manifest::{self, ManifestError},
    operations::Operations,
    peers::Peers,
};

/// How often a change begins again when others were faster.
const ATTEMPTS: u32 = 32;
/// Most addons below one application or instance.
const MOST: usize = 32;

/// All addons. Clones are handles of the same.
#[derive(Clone)]
pub struct Addons {
    inner: Arc<Inner>,
}

struct Inner {
    store: Handle,
    operations: Operations,
    packages: PathBuf,
    uploads: PathBuf,
    config: config::Applications,
    peers: Peers,
}

impl Addons {
    /// Opens the folder and removes what a crash left half-made.
    ///
    /// # Errors
    /// The folder or the store cannot be used.
    pub async fn open(
        folder: &Path,
        config: config::Applications,
        store: Handle,
        operations: Operations,
        peers: Peers,
    ) -> Result<Self, CatalogError> {
        let (packages, uploads) = (folder.join("addons"), folder.join("uploads"));
        fs::create_dir_all(&packages)
            .map_err(|source| catalog::io_at("making the folder", &packages, source))?;
        let addons = Self { inner: Arc::new(Inner { store, operations, packages, uploads, config, peers }) };
        addons.tidy(Duration::ZERO).await?;
        Ok(addons)
    }

    /// Removes packages of some age that nobody knows any more.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn tidy(&self, age: Duration) -> Result<(), StoreError> {
        let known: BTreeMap<String, AddonRecord> =
            self.records().await?.into_iter().map(|record| (record.name.clone(), record)).collect();
        catalog::sweep(&self.inner.packages, age, |name, version| {
            known.get(name).is_some_and(|record| record.versions.contains_key(&version))
        });
        Ok(())
    }

    async fn records(&self) -> Result<Vec<AddonRecord>, StoreError> {
        let records = self.inner.store.list_json::<AddonRecord>(key::ADDONS).await?;
        let mut list: Vec<_> = records.into_iter().map(|(_, record)| record.value).collect();
        list.sort_by(|a, b| (a.created_at, &a.name).cmp(&(b.created_at, &b.name)));
        Ok(list)
    }

    async fn record(&self, name: &str) -> Result<Record<AddonRecord>, CatalogError> {
        // Keys are texts; what cannot be one is nobody's name.
        if !manifest::is_name(name) {
            return Err(CatalogError::NoAddon);
        }
        self.inner.store.get_json(&key::addon(name)).await?.ok_or(CatalogError::NoAddon)
    }

    /// All addons as answered, oldest first.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn list(&self) -> Result<Vec<Addon>, StoreError> {
        let applications = self.applications().await?;
        Ok(self.records().await?.iter().map(|record| to_api(record, &applications)).collect())
    }

    /// One addon as answered.
    ///
    /// # Errors
    /// There is none of this name.
    pub async fn find(&self, name: &str) -> Result<Addon, CatalogError> {
        let record = self.record(name).await?.value;
        Ok(to_api(&record, &self.applications().await?))
    }

    async fn applications(&self) -> Result<Vec<ApplicationRecord>, StoreError> {
        let applications = self.inner.store.list_json::<ApplicationRecord>(key::APPLICATIONS).await?;
        Ok(applications.into_iter().map(|(_, record)| record.value).collect())
    }

    /// Where the package of a version lies, brought from another unit if it does not lie at this one.
    ///
    /// # Errors
    /// It lies nowhere that is reached.
    pub async fn package_here(&self, addon: &AddonRef) -> Result<PathBuf, CatalogError> {
        let place = self.package(addon);
        let what = format!("addons/{}/{}", addon.name, addon.version);
        catalog::bring(&self.inner.peers, what, &self.inner.uploads, &place).await.map(|()| place)
    }

    /// Where the package of a version lies.
    pub fn package(&self, addon: &AddonRef) -> PathBuf {
        self.inner.packages.join(&addon.name).join(addon.version.to_string())
    }

    /// The newest versions of these addons, each once, in the order of first mention.
    ///
    /// # Errors
    /// There is no addon of a name, or there are too many.
    pub async fn resolve(&self, names: &[String]) -> Result<Vec<AddonRef>, CatalogError> {
        let mut found: Vec<AddonRef> = Vec::new();
        for name in names {
            if found.iter().any(|addon| addon.name == *name) {
                continue;
            }
            let record = match self.record(name).await {
                Err(CatalogError::NoAddon) => {
                    return Err(CatalogError::UnknownAddon(name.chars().take(64).collect()));
                }
                record => record?.value,
            };
            let newest = record.versions.last_key_value();
            let (version, kept) = newest.ok_or_else(|| CatalogError::UnknownAddon(record.name.clone()))?;
            if found.len() >= MOST {
                return Err(CatalogError::Invalid("addons"));
            }
            found.push(AddonRef { version: *version, hook_time_s: kept.hook_time_s, name: record.name });
        }
        Ok(found)
    }

    /// Makes an addon of a package.
    ///
    /// # Errors
    /// The package or the name is refused, or the name is taken.
    pub async fn create(&self, name: &str, upload: Upload) -> Result<OperationRecord, CatalogError> {
        if name.is_empty() {
            return Err(CatalogError::Required("name"));
        }
        if !manifest::is_name(name) {
            return Err(CatalogError::Invalid("name"));
        }
        if self.inner.store.get(&key::addon(name)).await?.is_some() {
            return Err(CatalogError::AddonExists(name.to_owned()));
        }
        let (folder, version) = self.unpack(upload).await?;
        let record = AddonRecord {
            name: name.to_owned(),
            created_at: version.created_at,
            versions: BTreeMap::from([(0, version)]),
            next_version: 1,
        };
        let place = self.inner.packages.join(name).join("0");
        // Two at a time: the one that wrote the record has its files there last.
        let (operation, write) = self.done_operation("Creating addon", name);
        let key = key::addon(name);
        let ops = vec![Op::put(&key, encode(&key, &record)?), write];
        match self.inner.store.transact(vec![Compare::absent(&key)], ops).await {
            Ok(_) => {}
            Err(StoreError::Conflict) => return Err(CatalogError::AddonExists(name.to_owned())),
            Err(error) => return Err(error.into()),
        }
        if let Err(error) = catalog::keep(folder, &place) {
            // Best effort: a record without files is refused by name where it is used.
            let _ = self.inner.store.transact(Vec::new(), vec![Op::delete(&key)]).await;
            return Err(error);
        }
        tracing::info!("addon {name} was created");
        self.inner.operations.begun(&operation);
        Ok(operation)
    }

    /// Adds a version. The same package as the newest version's changes nothing.
    ///
    /// # Errors
    /// There is no such addon, or the package is refused.
    pub async fn update(&self, name: &str, upload: Upload) -> Result<OperationRecord, CatalogError> {
        let current = self.record(name).await?.value;
        let newest = current.versions.last_key_value().map(|(_, version)| version);
        if newest.is_some_and(|newest| newest.sha256 == upload.sha256) {
            let (operation, write) = self.done_operation("Updating addon", name);
            self.inner.store.transact(Vec::new(), vec![write]).await?;
            self.inner.operations.begun(&operation);
            return Ok(operation);
        }
        let (folder, version) = self.unpack(upload).await?;
        // The number is taken first, so that two updates at a time do not move into the same folder.
        let mut number = 0;
        self.change(name, Vec::new(), |record| {
            number = record.next_version;
            record.next_version += 1;
            Ok(())
        })
        .await?;
        let place = self.inner.packages.join(name).join(number.to_string());
        catalog::keep(folder, &place)?;
        let (operation, write) = self.done_operation("Updating addon", name);
        let written = self
            .change(name, vec![write], |record| {
                record.versions.insert(number, version.clone());
                Ok(())
            })
            .await;
        if let Err(error) = written {
            catalog::remove(&place);
            return Err(error);
        }
        tracing::info!("addon {name} has the version {number}");
        self.inner.operations.begun(&operation);
        Ok(operation)
    }

    /// Removes an addon with all versions.
    ///
    /// # Errors
    /// There is no such addon, or it is in use.
    pub async fn delete(&self, name: &str) -> Result<OperationRecord, CatalogError> {
        let Record { value: record, revision } = self.record(name).await?;
        self.check_unused(name, None).await?;
        let key = key::addon(&record.name);
        let (operation, write) = self.done_operation("Deleting addon", name);
        let compares = vec![Compare::revision(&key, revision)];
        match self.inner.store.transact(compares, vec![Op::delete(&key), write]).await {
            Ok(_) => {}
            Err(StoreError::Conflict) => return Box::pin(self.delete(name)).await,
            Err(error) => return Err(error.into()),
        }
        catalog::remove(&self.inner.packages.join(&record.name));
        tracing::info!("addon {name} was deleted");
        self.inner.operations.begun(&operation);
        Ok(operation)
    }

    /// Removes a version with its package.
    ///
    /// # Errors
    /// There is no such version, it is the last, or it is in use.
    pub async fn delete_version(&self, name: &str, number: u32) -> Result<OperationRecord, CatalogError> {
        if !self.record(name).await?.value.versions.contains_key(&number) {
            return Err(CatalogError::NoAddonVersion(number));
        }
        self.check_unused(name, Some(number)).await?;
        let (operation, write) = self.done_operation("Deleting addon version", name);
        self.change(name, vec![write], |record| {
            if record.versions.len() == 1 {
                return Err(CatalogError::LastAddonVersion);
            }
            record.versions.remove(&number).map(drop).ok_or(CatalogError::NoAddonVersion(number))
        })
        .await?;
        catalog::remove(&self.inner.packages.join(name).join(number.to_string()));
        self.inner.operations.begun(&operation);
        Ok(operation)
    }

    async fn check_unused(&self, name: &str, version: Option<u32>) -> Result<(), CatalogError> {
        let uses = |addons: &[AddonRef]| {
            addons
                .iter()
                .any(|addon| addon.name == name && version.is_none_or(|version| addon.version == version))
        };
        let applications = self.applications().await?;
        let mut users: Vec<String> = applications
            .iter()
            .filter(|record| record.versions.values().any(|version| uses(&version.addons)))
            .map(|record| format!("application {}", record.name))
            .collect();
        let instances = self.inner.store.list_json::<InstanceRecord>(key::INSTANCES).await?;
        // Those of applications have theirs in the image.
        users.extend(
            instances
                .iter()
                .map(|(_, record)| &record.value)
                .filter(|record| record.application.is_none() && uses(&record.addons))
                .map(|record| format!("instance {}", record.id)),
        );
        match users.is_empty() {
            true => Ok(()),
            false => {
                users.truncate(8);
                Err(CatalogError::AddonInUse { name: name.to_owned(), users: users.join(", ") })
            }
        }
    }

    async fn unpack(&self, upload: Upload) -> Result<(tempfile::TempDir, AddonVersionRecord), CatalogError> {
        let size = upload.file.as_file().metadata().map(|metadata| metadata.len()).unwrap_or(0);
        let sha256 = upload.sha256.clone();
        let most = self.inner.config.max_unpacked.clone();
        let (folder, text) = catalog::unpack(&self.inner.uploads, &most, upload).await?;
        let malformed = |error: serde_yaml_ng::Error| ManifestError::Malformed(error.to_string());
        let manifest: AddonManifest = serde_yaml_ng::from_str(&text).map_err(malformed)?;
        let hook_time_s = manifest::hook_time(manifest.hooks.as_ref())?;
        Ok((folder, AddonVersionRecord { created_at: unix_now(), sha256, size, hook_time_s }))
    }

    fn done_operation(&self, description: &str, name: &str) -> (OperationRecord, Op) {
        self.inner.operations.prepare_done(description, "addons", &format!("/1.0/addons/{name}"), Ok(()))
    }

    async fn change(
        &self,
        name: &str,
        more: Vec<Op>,
        mut change: impl FnMut(&mut AddonRecord) -> Result<(), CatalogError>,
    ) -> Result<(), CatalogError> {
        let key = key::addon(name);
        for _ in 0..ATTEMPTS {
            let Record { value: mut record, revision } = self.record(name).await?;
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
}

fn to_api(record: &AddonRecord, applications: &[ApplicationRecord]) -> Addon {
    let uses = |application: &&ApplicationRecord| {
        let mut addons = application.versions.values().flat_map(|version| &version.addons);
        addons.any(|addon| addon.name == record.name)
    };
    Addon {
        name: record.name.clone(),
        versions: record
            .versions
            .iter()
            .map(|(number, version)| AddonVersion {
                version: *number,
                fingerprint: version.sha256.clone(),
                size: version.size,
                created_at: version.created_at,
            })
            .collect(),
        used_by: applications.iter().filter(uses).map(|application| application.id.to_string()).collect(),
    }
}
