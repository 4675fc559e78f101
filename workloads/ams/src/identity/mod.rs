//! Identities and groups (ams-api section 8.3): who was let in while AMS runs, and which rights they have. Kept in the
//! store, and in memory for every request. Trusted certificates are TLS identities in the group `admin`.
//!
//! What the rights mean is in [`permissions`]; tokens of a provider are checked in [`oidc`].

pub mod oidc;
pub mod permissions;
pub mod tokens;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use fanlight_api::{
    ApplicationId,
    ams::{
        self,
        auth::{AuthenticationMethod, Group, GroupPut, GroupsPost, IdentitiesPost, Identity, Permission},
    },
};
use fanlight_service::{Shutdown, tls::fingerprint};
use fanlight_store::{Compare, Handle, Op, Record, StoreError, StoreExt as _, decode, encode};
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

use self::permissions::{ADMIN, ADMIN_GROUP, Rights, SERVER};
use crate::{
    core::model::{CertificateRecord, OperationRecord, key},
    events::unix_now,
    mirror::{Entries, Mirror},
    operations::Operations,
    trust::{self, Authorities, TrustError},
};

/// Everything here is below.
const PREFIX: &str = "ams/auth/";
const IDENTITIES: &str = "ams/auth/identities/";
const GROUPS: &str = "ams/auth/groups/";
/// Most groups of an identity; all of them are looked at in one transaction.
const MAX_GROUPS: usize = 50;
/// Most permissions of a group; a record has a largest size.
const MAX_PERMISSIONS: usize = 5000;
/// Members that are taken out of a group in one transaction.
const CHUNK: usize = 100;
/// How often a change begins again because somebody else was faster.
const ATTEMPTS: usize = 16;

/// A request about identities and groups that cannot be met.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// No such identity.
    #[error("identity not found")]
    NotFound,
    /// No such certificate.
    #[error("certificate not found")]
    NoCertificate,
    /// No such group.
    #[error("group {0} not found")]
    NoGroup(String),
    /// The certificate, the address or the name is taken.
    #[error("{0} already exists")]
    Exists(&'static str),
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
    /// The built-in group.
    #[error("group {ADMIN_GROUP} is built in: it can be neither changed nor deleted")]
    Immutable,
    /// An identity that is in groups.
    #[error("identity {identity} is in the groups {}: take it out of them first, or use force", groups.join(", "))]
    InGroups {
        /// Which.
        identity: String,
        /// Their names.
        groups: Vec<String>,
    },
    /// A group with members.
    #[error("group {group} has {members} members: take them out first, or use force")]
    HasMembers {
        /// Which.
        group: String,
        /// How many.
        members: usize,
    },
    /// Somebody would give what they do not have.
    #[error("Not Authorized: only who has {0} can give it or take it away")]
    Beyond(String),
    /// It is not as the caller believes.
    #[error("it was changed by somebody else: look at it again")]
    Changed,
    /// Not a certificate.
    #[error(transparent)]
    Certificate(#[from] TrustError),
    /// The store.
    #[error("the records of identities cannot be used")]
    Store(#[from] StoreError),
}

/// Who calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Who {
    /// Somebody whom the configuration lets do everything.
    Administrator,
    /// An identity, by id.
    Identity(String),
}

impl Who {
    /// As a text, for a token.
    pub fn subject(&self) -> String {
        match self {
            Self::Administrator => "administrator".into(),
            Self::Identity(id) => format!("identity:{id}"),
        }
    }

    /// From the text of a token.
    pub fn from_subject(text: &str) -> Option<Self> {
        match text.strip_prefix("identity:") {
            Some(id) => Some(Self::Identity(id.to_owned())),
            None => (text == "administrator").then_some(Self::Administrator),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct IdentityRecord {
    id: String,
    name: String,
    groups: BTreeSet<String>,
    method: AuthenticationMethod,
    /// Fingerprint of the certificate, or the e-mail address in lower case; unique.
    proof: String,
    /// Base64 of the DER form.
    #[serde(default)]
    certificate: String,
    created_at: i64,
    updated_at: i64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct GroupRecord {
    name: String,
    description: String,
    permissions: BTreeSet<Permission>,
    created_at: i64,
    updated_at: i64,
}

fn identity_key(id: &str) -> String {
    format!("{IDENTITIES}{id}")
}

fn group_key(name: &str) -> String {
    format!("{GROUPS}{name}")
}

/// Keeps proofs unique.
fn proof_key(method: AuthenticationMethod, proof: &str) -> String {
    format!("{PREFIX}proofs/{}/{proof}", method.as_str())
}

impl IdentityRecord {
    fn to_api(&self) -> Identity {
        let tls = self.method == AuthenticationMethod::Tls;
        Identity {
            id: self.id.clone(),
            name: self.name.clone(),
            groups: self.groups.iter().cloned().collect(),
            authentication_method: self.method,
            created_at: self.created_at,
            updated_at: self.updated_at,
            fingerprint: if tls { self.proof.clone() } else { String::new() },
            email: if tls { String::new() } else { self.proof.clone() },
            certificate: self.certificate.clone(),
        }
    }

    fn url(&self) -> String {
        format!("/1.0/auth/identities/{}", self.id)
    }
}

/// All of it, as requests need it.
#[derive(Default)]
struct Directory {
    identities: BTreeMap<String, IdentityRecord>,
    groups: BTreeMap<String, GroupRecord>,
    by_proof: HashMap<(AuthenticationMethod, String), String>,
    /// What the groups of an identity allow together.
    rights: HashMap<String, Rights>,
    authorities: Vec<(Authorities, String)>,
}

impl Directory {
    fn of(entries: &Entries) -> Self {
        let mut directory = Self::default();
        for (key, bytes) in entries {
            let read = if key.starts_with(IDENTITIES) {
                decode::<IdentityRecord>(key, bytes).map(|record| {
                    directory.identities.insert(record.id.clone(), record);
                })
            } else if key.starts_with(GROUPS) {
                decode::<GroupRecord>(key, bytes).map(|record| {
                    directory.groups.insert(record.name.clone(), record);
                })
            } else {
                Ok(())
            };
            // Whoever it was about has no rights, and all others keep theirs.
            if let Err(error) = read {
                tracing::error!("{}", fanlight_service::telemetry::chain(&error));
            }
        }
        for record in directory.identities.values() {
            let permissions = record.groups.iter().filter_map(|name| directory.groups.get(name));
            let rights = match record.groups.contains(ADMIN_GROUP) {
                true => Rights::Everything,
                false => Rights::of(permissions.flat_map(|group| group.permissions.iter().cloned())),
            };
            directory.rights.insert(record.id.clone(), rights);
            directory.by_proof.insert((record.method, record.proof.clone()), record.id.clone());
            let der = BASE64_STANDARD.decode(&record.certificate).unwrap_or_default();
            if trust::is_authority(&der) {
                match Authorities::new(vec![CertificateDer::from(der)]) {
                    Ok(authority) => directory.authorities.push((authority, record.id.clone())),
                    Err(reason) => tracing::warn!("identity {} is no usable authority: {reason}", record.id),
                }
            }
        }
        directory
    }

    fn members(&self, group: &str) -> Vec<String> {
        let members = self.identities.values().filter(|record| record.groups.contains(group));
        members.map(|record| record.id.clone()).collect()
    }

    fn group(&self, name: &str) -> Option<Group> {
        let identities = self.members(name);
        if name == ADMIN_GROUP {
            return Some(Group {
                name: ADMIN_GROUP.into(),
                description: "Administrators".into(),
                created_at: 0,
                updated_at: 0,
                identities,
                permissions: vec![Permission { entitlement: ADMIN.into(), resource: SERVER.into() }],
                immutable: true,
            });
        }
        self.groups.get(name).map(|record| Group { identities, ..record.to_api() })
    }
}

impl GroupRecord {
    /// Without its members.
    fn to_api(&self) -> Group {
        Group {
            name: self.name.clone(),
            description: self.description.clone(),
            created_at: self.created_at,
            updated_at: self.updated_at,
            identities: Vec::new(),
            permissions: self.permissions.iter().cloned().collect(),
            immutable: false,
        }
    }
}

/// All identities and groups. Clones are handles of the same.
#[derive(Clone)]
pub struct Identities {
    store: Handle,
    operations: Operations,
    mirror: Arc<Mirror<Directory>>,
}

impl Identities {
    /// Reads all, and makes identities of certificates that an older version kept.
    ///
    /// # Errors
    /// The store cannot be read or written.
    pub async fn open(store: Handle, operations: Operations) -> Result<Self, StoreError> {
        take_over(&store).await?;
        let mirror = Mirror::open(&store, PREFIX, Directory::of).await?;
        Ok(Self { store, operations, mirror })
    }

    /// Sees changes of all units from now on.
    pub fn follow(&self, shutdown: &Shutdown) {
        self.mirror.follow("identities", shutdown);
    }

    /// Who has a client certificate: its identity, or the one of the authority that signed it.
    pub fn by_certificate(&self, der: &[u8]) -> Option<Who> {
        let directory = self.mirror.get();
        let known = directory.by_proof.get(&(AuthenticationMethod::Tls, fingerprint(der)));
        let known = known.filter(|_| trust::is_current(der)).or_else(|| {
            let signer = directory.authorities.iter().find(|(authority, _)| authority.signed(der));
            signer.map(|(_, id)| id)
        });
        known.map(|id| Who::Identity(id.clone()))
    }

    /// Who has an e-mail address that a provider vouches for.
    pub fn by_email(&self, email: &str) -> Option<Who> {
        let proof = (AuthenticationMethod::Oidc, email.to_lowercase());
        self.mirror.get().by_proof.get(&proof).map(|id| Who::Identity(id.clone()))
    }

    /// What a caller may do now; none: it is no identity any more. Without fine-grained rights, members of the group
    /// `admin` may do everything and others nothing.
    pub fn rights(&self, who: &Who, fine_grained: bool) -> Option<Rights> {
        let id = match who {
            Who::Administrator => return Some(Rights::Everything),
            Who::Identity(id) => id,
        };
        let directory = self.mirror.get();
        let rights = directory.rights.get(id)?;
        let admin = directory.identities.get(id).is_some_and(|record| record.groups.contains(ADMIN_GROUP));
        Some(if fine_grained || admin { rights.clone() } else { Rights::nothing() })
    }

    /// All identities, the oldest first.
    pub fn list(&self) -> Vec<Identity> {
        let directory = self.mirror.get();
        let mut list: Vec<Identity> = directory.identities.values().map(IdentityRecord::to_api).collect();
        list.sort_by(|a, b| (a.created_at, &a.id).cmp(&(b.created_at, &b.id)));
        list
    }

    /// One identity.
    ///
    /// # Errors
    /// There is none.
    pub fn get(&self, id: &str) -> Result<Identity, IdentityError> {
        let directory = self.mirror.get();
        directory.identities.get(id).map(IdentityRecord::to_api).ok_or(IdentityError::NotFound)
    }

    /// All groups, the built-in one first, then the oldest.
    pub fn groups(&self) -> Vec<Group> {
        let directory = self.mirror.get();
        let names = std::iter::once(ADMIN_GROUP).chain(directory.groups.keys().map(String::as_str));
        let mut list: Vec<Group> = names.filter_map(|name| directory.group(name)).collect();
        list.sort_by(|a, b| (a.created_at, &a.name).cmp(&(b.created_at, &b.name)));
        list
    }

    /// One group.
    ///
    /// # Errors
    /// There is none.
    pub fn group(&self, name: &str) -> Result<Group, IdentityError> {
        self.mirror.get().group(name).ok_or_else(|| no_group(name))
    }

    /// All trusted certificates.
    pub fn certificates(&self) -> Vec<ams::Certificate> {
        let tls =
            self.list().into_iter().filter(|one| one.authentication_method == AuthenticationMethod::Tls);
        tls.map(to_certificate).collect()
    }

    /// One trusted certificate.
    ///
    /// # Errors
    /// There is none.
    pub fn certificate(&self, fingerprint: &str) -> Result<ams::Certificate, IdentityError> {
        Ok(to_certificate(self.get(&self.owner_of(fingerprint)?)?))
    }

    fn owner_of(&self, fingerprint: &str) -> Result<String, IdentityError> {
        let proof = (AuthenticationMethod::Tls, fingerprint.to_lowercase());
        self.mirror.get().by_proof.get(&proof).cloned().ok_or(IdentityError::NoCertificate)
    }

    /// Lets somebody in, without any rights yet.
    ///
    /// # Errors
    /// Something is missing or wrong, or the certificate or address is known already.
    pub async fn create(&self, post: &IdentitiesPost) -> Result<OperationRecord, IdentityError> {
        let record = match post.authentication_method.as_str() {
            "tls" if !post.email.is_empty() => {
                return Err(invalid("email", "an identity of kind tls has a certificate instead".into()));
            }
            "tls" if post.certificate.is_empty() => return Err(IdentityError::Required("certificate")),
            "tls" => of_certificate(&trust::certificate(&post.certificate)?, &post.name, BTreeSet::new())?,
            "oidc" if !post.certificate.is_empty() => {
                return Err(invalid("certificate", "an identity of kind oidc has an email instead".into()));
            }
            "oidc" => of_email(&post.email, &post.name)?,
            "" => return Err(IdentityError::Required("authentication_method")),
            other => {
                let reason = format!("{:?} is neither tls nor oidc", short(other));
                return Err(invalid("authentication_method", reason));
            }
        };
        let url = record.url();
        self.add(record, "Creating identity", "identities", &url, "identity").await
    }

    /// Trusts a certificate: its owner may do everything.
    ///
    /// # Errors
    /// It is trusted already, or the store cannot be written.
    pub async fn trust(&self, der: &[u8]) -> Result<OperationRecord, IdentityError> {
        let record = of_certificate(der, "", BTreeSet::from([ADMIN_GROUP.to_owned()]))?;
        let url = format!("/1.0/certificates/{}", record.proof);
        self.add(record, "Adding certificate", "certificates", &url, "certificate").await
    }

    async fn add(
        &self,
        record: IdentityRecord,
        description: &str,
        kind: &str,
        url: &str,
        what: &'static str,
    ) -> Result<OperationRecord, IdentityError> {
        let (key, proof) = (identity_key(&record.id), proof_key(record.method, &record.proof));
        let (operation, write) = self.operations.prepare_done(description, kind, url, Ok(()));
        let ops =
            vec![Op::put(&key, encode(&key, &record)?), Op::put(&proof, encode(&proof, &record.id)?), write];
        match self.store.transact(vec![Compare::absent(proof)], ops).await {
            Ok(committed) => self.mirror.reached(committed.revision).await,
            Err(StoreError::Conflict) => return Err(IdentityError::Exists(what)),
            Err(error) => return Err(error.into()),
        }
        self.operations.begun(&operation);
        tracing::info!("identity {} ({}) was added", record.id, record.method.as_str());
        Ok(operation)
    }

    /// Replaces the groups of an identity, for somebody with these rights. `unchanged`: whether it still is as that
    /// caller believes.
    ///
    /// # Errors
    /// There is no such identity or group, or the caller has less than a group gives.
    pub async fn set_groups(
        &self,
        id: &str,
        groups: &[String],
        giver: &Rights,
        unchanged: impl Fn(&Identity) -> bool,
    ) -> Result<OperationRecord, IdentityError> {
        let wanted: BTreeSet<String> = groups.iter().cloned().collect();
        if wanted.len() > MAX_GROUPS {
            return Err(invalid("groups", format!("{} are more than {MAX_GROUPS}", wanted.len())));
        }
        for _ in 0..ATTEMPTS {
            let Record { value: mut record, revision } = self.identity_record(id).await?;
            if !unchanged(&record.to_api()) {
                return Err(IdentityError::Changed);
            }
            let key = identity_key(id);
            let mut compares = vec![Compare::revision(&key, revision)];
            let mut ops = Vec::new();
            for name in wanted.symmetric_difference(&record.groups) {
                let joins = wanted.contains(name);
                if name == ADMIN_GROUP {
                    if *giver != Rights::Everything {
                        return Err(IdentityError::Beyond(format!("{ADMIN} of the {SERVER}")));
                    }
                    continue;
                }
                let stored = match permissions::is_name(name, 63) {
                    true => self.store.get_json::<GroupRecord>(&group_key(name)).await?,
                    false => None,
                };
                let Some(stored) = stored.filter(|_| joins) else {
                    if joins {
                        return Err(no_group(name));
                    }
                    continue;
                };
                may_give(giver, stored.value.permissions.iter())?;
                // Written again, so that a removal of the group at the same time does not miss this member.
                compares.push(Compare::revision(group_key(name), stored.revision));
                ops.push(Op::put(group_key(name), encode(&group_key(name), &stored.value)?));
            }
            record.groups = wanted.clone();
            record.updated_at = unix_now();
            ops.push(Op::put(&key, encode(&key, &record)?));
            let (operation, write) =
                self.operations.prepare_done("Updating identity", "identities", &record.url(), Ok(()));
            ops.push(write);
            if self.write(compares, ops).await? {
                self.operations.begun(&operation);
                return Ok(operation);
            }
        }
        Err(StoreError::Conflict.into())
    }

    /// Locks an identity out.
    ///
    /// # Errors
    /// There is none, or it is in groups and it is not forced.
    pub async fn delete(&self, id: &str, force: bool) -> Result<OperationRecord, IdentityError> {
        let record = self.identity_record(id).await?.value;
        if !force && !record.groups.is_empty() {
            let groups = record.groups.into_iter().collect();
            return Err(IdentityError::InGroups { identity: record.id, groups });
        }
        let url = record.url();
        self.remove(&record, "Deleting identity", "identities", &url).await
    }

    /// Trusts a certificate no longer.
    ///
    /// # Errors
    /// There is none.
    pub async fn distrust(&self, fingerprint: &str) -> Result<OperationRecord, IdentityError> {
        let id = self.owner_of(fingerprint)?;
        let record = self.identity_record(&id).await.map_err(|error| match error {
            IdentityError::NotFound => IdentityError::NoCertificate,
            error => error,
        })?;
        let url = format!("/1.0/certificates/{}", record.value.proof);
        self.remove(&record.value, "Removing certificate", "certificates", &url).await
    }

    async fn remove(
        &self,
        record: &IdentityRecord,
        description: &str,
        kind: &str,
        url: &str,
    ) -> Result<OperationRecord, IdentityError> {
        let (operation, write) = self.operations.prepare_done(description, kind, url, Ok(()));
        let ops = vec![
            Op::delete(identity_key(&record.id)),
            Op::delete(proof_key(record.method, &record.proof)),
            write,
        ];
        let committed = self.store.transact(Vec::new(), ops).await?;
        self.mirror.reached(committed.revision).await;
        self.operations.begun(&operation);
        tracing::info!("identity {} was removed", record.id);
        Ok(operation)
    }

    /// Makes a group without rights.
    ///
    /// # Errors
    /// The name is missing, wrong or taken.
    pub async fn create_group(&self, post: &GroupsPost) -> Result<OperationRecord, IdentityError> {
        if post.name.is_empty() {
            return Err(IdentityError::Required("name"));
        }
        if !permissions::is_name(&post.name, 63) {
            let reason = format!("{:?}: letters, digits, '-', '_' and '.', at most 63", short(&post.name));
            return Err(invalid("name", reason));
        }
        if post.name == ADMIN_GROUP {
            return Err(IdentityError::Exists("group"));
        }
        let now = unix_now();
        let record = GroupRecord {
            name: post.name.clone(),
            description: text("description", &post.description)?,
            permissions: BTreeSet::new(),
            created_at: now,
            updated_at: now,
        };
        let key = group_key(&record.name);
        let (operation, write) =
            self.operations.prepare_done("Creating group", "groups", &group_url(&record.name), Ok(()));
        let ops = vec![Op::put(&key, encode(&key, &record)?), write];
        if !self.write(vec![Compare::absent(key)], ops).await? {
            return Err(IdentityError::Exists("group"));
        }
        self.operations.begun(&operation);
        Ok(operation)
    }

    /// Changes a group, for somebody with these rights. `unchanged`: whether it still is as that caller believes.
    ///
    /// # Errors
    /// There is none, it is built in, a permission is wrong, or the caller does not have it.
    pub async fn update_group(
        &self,
        name: &str,
        put: &GroupPut,
        giver: &Rights,
        unchanged: impl Fn(&Group) -> bool,
    ) -> Result<OperationRecord, IdentityError> {
        for _ in 0..ATTEMPTS {
            let Record { value: mut record, revision } = self.group_record(name).await?;
            let members = self.mirror.get().members(name);
            if !unchanged(&Group { identities: members, ..record.to_api() }) {
                return Err(IdentityError::Changed);
            }
            if let Some(description) = &put.description {
                record.description = text("description", description)?;
            }
            if let Some(wanted) = &put.permissions {
                if wanted.len() > MAX_PERMISSIONS {
                    let reason = format!("{} are more than {MAX_PERMISSIONS}", wanted.len());
                    return Err(invalid("permissions", reason));
                }
                for permission in wanted {
                    permissions::check(permission).map_err(|reason| invalid("permissions", reason))?;
                }
                let wanted: BTreeSet<Permission> = wanted.iter().cloned().collect();
                may_give(giver, wanted.symmetric_difference(&record.permissions))?;
                record.permissions = wanted;
            }
            record.updated_at = unix_now();
            let key = group_key(name);
            let (operation, write) =
                self.operations.prepare_done("Updating group", "groups", &group_url(name), Ok(()));
            let ops = vec![Op::put(&key, encode(&key, &record)?), write];
            if self.write(vec![Compare::revision(key, revision)], ops).await? {
                self.operations.begun(&operation);
                return Ok(operation);
            }
        }
        Err(StoreError::Conflict.into())
    }

    /// Removes a group; its members are in it no more.
    ///
    /// # Errors
    /// There is none, it is built in, or it has members and it is not forced.
    pub async fn delete_group(&self, name: &str, force: bool) -> Result<OperationRecord, IdentityError> {
        for _ in 0..ATTEMPTS {
            // Before the members: whoever joins from here on changes the group, and we look again.
            let revision = self.group_record(name).await?.revision;
            let all = self.store.list_json::<IdentityRecord>(IDENTITIES).await?;
            let members: Vec<_> =
                all.into_iter().filter(|(_, record)| record.value.groups.contains(name)).collect();
            if !force && !members.is_empty() {
                return Err(IdentityError::HasMembers { group: name.to_owned(), members: members.len() });
            }
            let mut out = true;
            for chunk in members.chunks(CHUNK) {
                let (mut compares, mut ops) = (Vec::new(), Vec::new());
                for (key, stored) in chunk {
                    let mut record = stored.value.clone();
                    record.groups.remove(name);
                    record.updated_at = unix_now();
                    compares.push(Compare::revision(key, stored.revision));
                    ops.push(Op::put(key, encode(key, &record)?));
                }
                out &= self.write(compares, ops).await?;
            }
            let (operation, write) =
                self.operations.prepare_done("Deleting group", "groups", &group_url(name), Ok(()));
            let key = group_key(name);
            if out
                && self.write(vec![Compare::revision(&key, revision)], vec![Op::delete(&key), write]).await?
            {
                self.operations.begun(&operation);
                return Ok(operation);
            }
        }
        Err(StoreError::Conflict.into())
    }

    async fn identity_record(&self, id: &str) -> Result<Record<IdentityRecord>, IdentityError> {
        if !permissions::is_name(id, 64) {
            return Err(IdentityError::NotFound);
        }
        self.store.get_json(&identity_key(id)).await?.ok_or(IdentityError::NotFound)
    }

    async fn group_record(&self, name: &str) -> Result<Record<GroupRecord>, IdentityError> {
        if name == ADMIN_GROUP {
            return Err(IdentityError::Immutable);
        }
        if !permissions::is_name(name, 63) {
            return Err(no_group(name));
        }
        self.store.get_json(&group_key(name)).await?.ok_or_else(|| no_group(name))
    }

    /// Writes, and waits until it shows. False: somebody else was faster.
    async fn write(&self, compares: Vec<Compare>, ops: Vec<Op>) -> Result<bool, StoreError> {
        match self.store.transact(compares, ops).await {
            Ok(committed) => {
                self.mirror.reached(committed.revision).await;
                Ok(true)
            }
            Err(StoreError::Conflict) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// Makes identities of the certificates that an older version kept by themselves.
async fn take_over(store: &Handle) -> Result<(), StoreError> {
    for (old, stored) in store.list_json::<CertificateRecord>(key::CERTIFICATES).await? {
        let mut ops = vec![Op::delete(&old)];
        let der = BASE64_STANDARD.decode(&stored.value.certificate).unwrap_or_default();
        match of_certificate(&der, "", BTreeSet::from([ADMIN_GROUP.to_owned()])) {
            Ok(record) => {
                let (key, proof) = (identity_key(&record.id), proof_key(record.method, &record.proof));
                ops.push(Op::put(&key, encode(&key, &record)?));
                ops.push(Op::put(&proof, encode(&proof, &record.id)?));
            }
            Err(error) => tracing::warn!("{old} is dropped: {error}"),
        }
        match store.transact(vec![Compare::revision(&old, stored.revision)], ops).await {
            // Another unit does the same.
            Ok(_) | Err(StoreError::Conflict) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn of_certificate(der: &[u8], name: &str, groups: BTreeSet<String>) -> Result<IdentityRecord, IdentityError> {
    let now = unix_now();
    let name = match name {
        "" => trust::common_name(der).map(|name| name.chars().take(255).collect()).unwrap_or_default(),
        name => text("name", name)?,
    };
    Ok(IdentityRecord {
        id: ApplicationId::generate().to_string(),
        name,
        groups,
        method: AuthenticationMethod::Tls,
        proof: fingerprint(der),
        certificate: BASE64_STANDARD.encode(der),
        created_at: now,
        updated_at: now,
    })
}

fn of_email(email: &str, name: &str) -> Result<IdentityRecord, IdentityError> {
    if email.is_empty() {
        return Err(IdentityError::Required("email"));
    }
    let strange = |c: char| c.is_whitespace() || c.is_control() || c == '/';
    let parts = email.split_once('@');
    if email.len() > 254
        || email.contains(strange)
        || !parts
            .is_some_and(|(user, domain)| !user.is_empty() && !domain.is_empty() && !domain.contains('@'))
    {
        return Err(invalid("email", format!("{:?} is no e-mail address", short(email))));
    }
    let now = unix_now();
    Ok(IdentityRecord {
        id: ApplicationId::generate().to_string(),
        name: text("name", if name.is_empty() { email } else { name })?,
        groups: BTreeSet::new(),
        method: AuthenticationMethod::Oidc,
        proof: email.to_lowercase(),
        certificate: String::new(),
        created_at: now,
        updated_at: now,
    })
}

fn may_give<'a>(
    giver: &Rights,
    permissions: impl IntoIterator<Item = &'a Permission>,
) -> Result<(), IdentityError> {
    match permissions.into_iter().find(|permission| !giver.covers(permission)) {
        None => Ok(()),
        Some(beyond) => Err(IdentityError::Beyond(format!("{} of {}", beyond.entitlement, beyond.resource))),
    }
}

fn text(argument: &'static str, given: &str) -> Result<String, IdentityError> {
    if given.chars().count() > 255 || given.chars().any(char::is_control) {
        let reason = format!("{:?}: at most 255 characters on one line", short(given));
        return Err(invalid(argument, reason));
    }
    Ok(given.to_owned())
}

fn to_certificate(identity: Identity) -> ams::Certificate {
    ams::Certificate { certificate: identity.certificate, fingerprint: identity.fingerprint }
}

fn group_url(name: &str) -> String {
    format!("/1.0/auth/groups/{name}")
}

fn no_group(name: &str) -> IdentityError {
    IdentityError::NoGroup(short(name))
}

fn invalid(argument: &'static str, reason: String) -> IdentityError {
    IdentityError::Invalid { argument, reason }
}

fn short(text: &str) -> String {
    text.chars().take(64).collect()
}

#[cfg(test)]
mod tests {
    use fanlight_store::Embedded;

    use super::*;
    use crate::events::Events;

    async fn open(store: &Handle) -> (Identities, Shutdown) {
        let operations = Operations::open("test", store.clone(), Events::default()).await.expect("opened");
        let identities = Identities::open(store.clone(), operations).await.expect("opened");
        let shutdown = Shutdown::new();
        identities.follow(&shutdown);
        (identities, shutdown)
    }

    fn of_mail(email: &str) -> IdentitiesPost {
        IdentitiesPost { authentication_method: "oidc".into(), email: email.into(), ..Default::default() }
    }

    #[tokio::test]
    async fn certificates_of_older_versions_become_identities_once() {
        let store: Handle = Arc::new(Embedded::memory());
        let key = rcgen::KeyPair::generate().expect("a key");
        let params = rcgen::CertificateParams::new(vec!["old".into()]).expect("a name");
        let der = params.self_signed(&key).expect("signed").der().to_vec();
        let old = key::certificate(&fingerprint(&der));
        let record = CertificateRecord { certificate: BASE64_STANDARD.encode(&der), added_at: 7 };
        store.put_json(&old, &record).await.expect("written");
        let (first, _one) = open(&store).await;
        let who = first.by_certificate(&der).expect("known");
        assert_eq!(first.rights(&who, false), Some(Rights::Everything));
        assert!(store.get(&old).await.expect("read").is_none());
        let (second, _two) = open(&store).await;
        assert_eq!(second.by_certificate(&der), Some(who));
        assert_eq!(second.list().len(), 1);
    }

    #[tokio::test]
    async fn a_record_that_cannot_be_read_takes_nobody_else_along() {
        let store: Handle = Arc::new(Embedded::memory());
        let (identities, _running) = open(&store).await;
        identities.create(&of_mail("a@example.com")).await.expect("made");
        let spoilt = vec![Op::put(identity_key("b"), "rubbish"), Op::put(group_key("g"), "{}")];
        let committed = store.transact(Vec::new(), spoilt).await.expect("written");
        identities.mirror.reached(committed.revision).await;
        assert_eq!(identities.list().len(), 1);
        assert_eq!(identities.groups().len(), 1, "the built-in one");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_group_that_is_deleted_while_somebody_joins_leaves_no_member_behind() {
        let store: Handle = Arc::new(Embedded::memory());
        let (identities, _running) = open(&store).await;
        identities.create(&of_mail("a@example.com")).await.expect("made");
        let id = identities.list()[0].id.clone();
        for _ in 0..50 {
            let post = GroupsPost { name: "team".into(), ..Default::default() };
            identities.create_group(&post).await.expect("made");
            let (joining, leaving, own) = (identities.clone(), identities.clone(), id.clone());
            let join = tokio::spawn(async move {
                joining.set_groups(&own, &["team".into()], &Rights::Everything, |_| true).await
            });
            leaving.delete_group("team", true).await.expect("deleted");
            // Too late is fine.
            let _ = join.await.expect("ended");
            assert_eq!(identities.get(&id).expect("there").groups, Vec::<String>::new());
        }
    }
}
