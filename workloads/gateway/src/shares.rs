//! Shares: ways into a session that its owner gives away (gateway-api sections 5.4, 6.9 to 6.12 and 8). The shares of a
//! session are one small record, so that their limit holds when several units add at the same time, and the id of a
//! share begins with the id of its session, so that finding one costs the same however many there are.
//!
//! First the rules, as values; then the shell over the store.

use fanlight_api::{
    SessionId, ShareId,
    gateway::{ShareBase, ShareKind, SharePatch, SharePost},
};
use fanlight_service::ApiError;
use fanlight_store::{Change, StoreError, StoreExt as _};
use serde::{Deserialize, Serialize};

use crate::{Gateway, accounts::Caller, sessions::store_error, settings::Settings};

/// Prefix of the records.
const SHARES: &str = "gateway/shares/";
/// Longest description, characters.
const MAX_DESCRIPTION: usize = 1024;

/// Why a share was not made, changed or opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShareError {
    /// Not a kind of share.
    #[error("type is {0:?}: adb is the only kind of share")]
    Kind(String),
    /// Too long.
    #[error("description has {0} characters: at most {MAX_DESCRIPTION} are allowed")]
    Description(usize),
    /// In the past, too far ahead, or no number of minutes.
    #[error("{field} is {value}: {allowed}")]
    Expiry {
        /// `expiry_at` or `expiry_min`.
        field: &'static str,
        /// As given.
        value: i64,
        /// In words.
        allowed: String,
    },
    /// As many as there may be.
    #[error("session {session} has {limit} shares already: delete one first")]
    Limit {
        /// Whose.
        session: SessionId,
        /// How many there may be.
        limit: u32,
    },
    /// There is none, or it has expired.
    #[error("there is no share {0}")]
    Missing(ShareId),
}

impl From<ShareError> for ApiError {
    fn from(error: ShareError) -> Self {
        let text = error.to_string();
        match error {
            ShareError::Kind(_) => Self::bad_request("invalid-type", text),
            ShareError::Description(_) => Self::bad_request("invalid-body", text),
            ShareError::Expiry { .. } => Self::bad_request("invalid-expiry", text),
            ShareError::Limit { .. } => Self::forbidden("too-many-shares", text),
            ShareError::Missing(_) => Self::not_found("share-not-found", text),
        }
    }
}

/// One share, as kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    #[serde(flatten)]
    pub base: ShareBase,
    /// Counts its connections: the newest one counts.
    #[serde(default)]
    pub connection: u64,
}

/// The shares of one session.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shares {
    shares: Vec<Share>,
}

/// A request for a share that was checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    kind: ShareKind,
    description: String,
    expiry_at: i64,
}

fn check_description(text: &str) -> Result<(), ShareError> {
    let length = text.chars().count();
    if length > MAX_DESCRIPTION { Err(ShareError::Description(length)) } else { Ok(()) }
}

fn check_expiry(
    field: &'static str,
    value: i64,
    expiry_at: i64,
    now: i64,
    settings: &Settings,
) -> Result<i64, ShareError> {
    let days = settings.share_max_days;
    if expiry_at <= now || expiry_at > now + i64::from(days) * 86_400 {
        let allowed = match field {
            "expiry_min" => format!("1 to {} minutes are allowed", i64::from(days) * 1440),
            _ => format!("a Unix time in the future is needed, at most {days} days ahead"),
        };
        return Err(ShareError::Expiry { field, value, allowed });
    }
    Ok(expiry_at)
}

/// Checks a request for a share.
///
/// # Errors
/// Names the member that is wrong.
pub fn check(now: i64, post: &SharePost, settings: &Settings) -> Result<Wanted, ShareError> {
    let kind = match post.kind.as_deref() {
        Some("adb") => ShareKind::Adb,
        other => return Err(ShareError::Kind(other.unwrap_or_default().chars().take(64).collect())),
    };
    let description = post.description.clone().unwrap_or_default();
    check_description(&description)?;
    let expiry_at = match (post.expiry_at, post.expiry_min) {
        (Some(at), _) => check_expiry("expiry_at", at, at, now, settings)?,
        (None, Some(minutes)) => {
            let at = now.saturating_add(minutes.saturating_mul(60));
            check_expiry("expiry_min", minutes, at, now, settings)?
        }
        (None, None) => {
            let minutes = i64::from(settings.share_minutes).min(i64::from(settings.share_max_days) * 1440);
            now + minutes * 60
        }
    };
    Ok(Wanted { kind, description, expiry_at })
}

impl Shares {
    /// Without those that have expired.
    pub fn valid(&self, now: i64) -> Self {
        Self { shares: self.shares.iter().filter(|share| now < share.base.expiry_at).cloned().collect() }
    }

    /// With one more.
    ///
    /// # Errors
    /// There are as many as there may be.
    pub fn with(
        &self,
        now: i64,
        session: &SessionId,
        id: ShareId,
        wanted: &Wanted,
        limit: u32,
    ) -> Result<Self, ShareError> {
        let mut next = self.valid(now);
        if next.shares.len() >= limit as usize {
            return Err(ShareError::Limit { session: session.clone(), limit });
        }
        let base = ShareBase {
            id,
            session_id: session.clone(),
            kind: wanted.kind,
            description: wanted.description.clone(),
            created_at: now,
            expiry_at: wanted.expiry_at,
        };
        next.shares.push(Share { base, connection: 0 });
        Ok(next)
    }

    /// A share that has not expired.
    pub fn get(&self, now: i64, id: &ShareId) -> Option<&Share> {
        self.shares.iter().find(|share| share.base.id == *id && now < share.base.expiry_at)
    }

    /// With one changed.
    ///
    /// # Errors
    /// There is no such share.
    pub fn changed(
        &self,
        now: i64,
        id: &ShareId,
        change: impl FnOnce(&mut Share),
    ) -> Result<Self, ShareError> {
        let mut next = self.valid(now);
        let share = next.shares.iter_mut().find(|share| share.base.id == *id);
        change(share.ok_or_else(|| ShareError::Missing(id.clone()))?);
        Ok(next)
    }

    /// Without one.
    ///
    /// # Errors
    /// There is no such share.
    pub fn without(&self, now: i64, id: &ShareId) -> Result<Self, ShareError> {
        let mut next = self.valid(now);
        let before = next.shares.len();
        next.shares.retain(|share| share.base.id != *id);
        if next.shares.len() == before { Err(ShareError::Missing(id.clone())) } else { Ok(next) }
    }
}

/// The session that a share belongs to.
fn session_of(id: &ShareId) -> Result<SessionId, ShareError> {
    let missing = || ShareError::Missing(id.clone());
    let (session, _) = id.as_str().rsplit_once('-').ok_or_else(missing)?;
    session.parse().map_err(|_| missing())
}

/// Key of the record of a session's shares.
pub fn key(session: &SessionId) -> String {
    format!("{SHARES}{session}")
}

impl Gateway {
    /// Changes the shares of a session by compare-and-set.
    async fn change_shares(
        &self,
        session: &SessionId,
        mut change: impl FnMut(&Shares) -> Result<Shares, ShareError> + Send,
    ) -> Result<Shares, ApiError> {
        let mut refused = None;
        let record = self
            .store
            .update_json(&key(session), |current: Option<Shares>| {
                refused = None;
                match change(&current.unwrap_or_default()) {
                    Ok(next) if next.shares.is_empty() => Change::Delete,
                    Ok(next) => Change::Put(next),
                    Err(error) => {
                        refused = Some(error);
                        Change::Keep
                    }
                }
            })
            .await
            .map_err(store_error)?;
        match refused {
            Some(error) => Err(error.into()),
            None => Ok(record.map(|record| record.value).unwrap_or_default()),
        }
    }

    /// Makes a share of a session.
    ///
    /// # Errors
    /// The request is wrong, or the session has as many as it may have.
    pub async fn create_share(&self, session: &SessionId, post: &SharePost) -> Result<Share, ApiError> {
        let settings = self.settings();
        let now = self.now();
        let wanted = check(now, post, &settings)?;
        let id: ShareId = format!("{session}-{}", SessionId::generate())
            .parse()
            .map_err(|error: fanlight_api::InvalidId| ApiError::internal(error))?;
        let limit = settings.shares_per_session;
        let shares = self
            .change_shares(session, |shares| shares.with(now, session, id.clone(), &wanted, limit))
            .await?;
        shares.get(now, &id).cloned().ok_or_else(|| ShareError::Missing(id).into())
    }

    /// A share of a session that is there and that the caller may see; without a caller, of any.
    ///
    /// # Errors
    /// There is none.
    pub async fn find_share(&self, caller: Option<&Caller>, id: &ShareId) -> Result<Share, ApiError> {
        let missing = || ApiError::from(ShareError::Missing(id.clone()));
        let session = session_of(id)?;
        let record = self.store.get_json::<Shares>(&key(&session)).await.map_err(store_error)?;
        let share =
            record.as_ref().and_then(|record| record.value.get(self.now(), id)).ok_or_else(missing)?;
        let Some(session) = self.find_session(&session).await? else { return Err(missing()) };
        if caller.is_some_and(|caller| !caller.may_see(&session)) {
            return Err(missing());
        }
        Ok(share.clone())
    }

    /// All shares, or those of one session, that the caller may see, in order of their ids.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn list_shares(
        &self,
        caller: &Caller,
        session: Option<&SessionId>,
    ) -> Result<Vec<ShareBase>, ApiError> {
        let records = match session {
            Some(session) => {
                let record = self.store.get_json::<Shares>(&key(session)).await.map_err(store_error)?;
                record.into_iter().map(|record| record.value).collect()
            }
            None => {
                let all = self.store.list_json::<Shares>(SHARES).await.map_err(store_error)?;
                all.into_iter().map(|(_, record)| record.value).collect::<Vec<_>>()
            }
        };
        let now = self.now();
        let visible = |share: &ShareBase| {
            self.index.get(&share.session_id).is_some_and(|session| caller.may_see(&session))
        };
        let mut shares: Vec<ShareBase> = records
            .into_iter()
            .flat_map(|shares| shares.valid(now).shares)
            .map(|share| share.base)
            .filter(visible)
            .collect();
        shares.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(shares)
    }

    /// Changes description or expiry.
    ///
    /// # Errors
    /// The change is wrong, or there is no such share.
    pub async fn update_share(&self, id: &ShareId, patch: &SharePatch) -> Result<Share, ApiError> {
        let now = self.now();
        if let Some(text) = &patch.description {
            check_description(text)?;
        }
        if let Some(at) = patch.expiry_at {
            check_expiry("expiry_at", at, at, now, &self.settings())?;
        }
        let change = |share: &mut Share| {
            if let Some(text) = &patch.description {
                share.base.description.clone_from(text);
            }
            if let Some(at) = patch.expiry_at {
                share.base.expiry_at = at;
            }
        };
        let shares = self.change_shares(&session_of(id)?, |shares| shares.changed(now, id, change)).await?;
        shares.get(now, id).cloned().ok_or_else(|| ShareError::Missing(id.clone()).into())
    }

    /// Counts a connection through a share, which takes over from older ones.
    ///
    /// # Errors
    /// There is no such share.
    pub async fn connect_share(&self, id: &ShareId) -> Result<Share, ApiError> {
        let now = self.now();
        let count = |share: &mut Share| share.connection += 1;
        let shares = self.change_shares(&session_of(id)?, |shares| shares.changed(now, id, count)).await?;
        shares.get(now, id).cloned().ok_or_else(|| ShareError::Missing(id.clone()).into())
    }

    /// Removes a share; its tokens open nothing from now on.
    ///
    /// # Errors
    /// There is none.
    pub async fn delete_share(&self, id: &ShareId) -> Result<(), ApiError> {
        let now = self.now();
        self.change_shares(&session_of(id)?, |shares| shares.without(now, id)).await?;
        Ok(())
    }

    /// Takes away shares that have expired and those of sessions that are gone.
    ///
    /// # Errors
    /// The store cannot be used.
    pub async fn sweep_shares(&self) -> Result<(), StoreError> {
        let now = self.now();
        for (_, record) in self.store.list_json::<Shares>(SHARES).await? {
            let Some(session) = record.value.shares.first().map(|share| share.base.session_id.clone()) else {
                continue;
            };
            let gone = self.index.get(&session).is_none();
            if gone || record.value.valid(now) != record.value {
                self.store
                    .update_json(&key(&session), |current: Option<Shares>| {
                        let left =
                            current.map(|shares| shares.valid(now)).filter(|left| !left.shares.is_empty());
                        if gone { None } else { left }
                    })
                    .await?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::config::Config;

    const NOW: i64 = 1_800_000_000;
    const DAY: i64 = 86_400;

    fn settings() -> Settings {
        Settings::new(&Config::default(), &BTreeMap::new())
    }

    fn post() -> SharePost {
        SharePost { kind: Some("adb".into()), ..SharePost::default() }
    }

    #[test]
    fn requests_get_their_defaults_and_wrong_ones_a_name() {
        let wanted = check(NOW, &post(), &settings()).expect("valid");
        assert_eq!(wanted.expiry_at, NOW + 12 * 3600);
        let minutes = SharePost { expiry_min: Some(5), ..post() };
        assert_eq!(check(NOW, &minutes, &settings()).expect("valid").expiry_at, NOW + 300);
        let both = SharePost { expiry_at: Some(NOW + 30 * DAY), ..minutes };
        assert_eq!(check(NOW, &both, &settings()).expect("valid").expiry_at, NOW + 30 * DAY);
        for (wrong, name) in [
            (SharePost { kind: None, ..post() }, "type is \"\""),
            (SharePost { kind: Some("video".into()), ..post() }, "type is \"video\""),
            (SharePost { expiry_at: Some(NOW), ..post() }, "expiry_at is"),
            (SharePost { expiry_at: Some(NOW + 30 * DAY + 1), ..post() }, "at most 30 days"),
            (SharePost { expiry_at: Some(i64::MIN), ..post() }, "expiry_at is"),
            (SharePost { expiry_min: Some(0), ..post() }, "expiry_min is 0"),
            (SharePost { expiry_min: Some(i64::MAX), ..post() }, "1 to 43200 minutes"),
            (SharePost { description: Some("x".repeat(1025)), ..post() }, "description has 1025"),
        ] {
            let text = check(NOW, &wrong, &settings()).expect_err(name).to_string();
            assert!(text.contains(name), "{text}");
        }
    }

    #[test]
    fn a_session_has_five_shares_and_expired_ones_do_not_count() {
        let session: SessionId = "s1".parse().expect("id");
        let wanted = check(NOW, &post(), &settings()).expect("valid");
        let id = |number: u32| -> ShareId { format!("s1-{number}").parse().expect("id") };
        let mut shares = Shares::default();
        for number in 0..5 {
            shares = shares.with(NOW, &session, id(number), &wanted, 5).expect("room");
        }
        let full = shares.with(NOW, &session, id(5), &wanted, 5);
        assert!(matches!(full, Err(ShareError::Limit { limit: 5, .. })));
        let later = wanted.expiry_at;
        assert_eq!(shares.get(later, &id(0)), None);
        let after = shares.with(later, &session, id(6), &wanted, 5).expect("all have expired");
        assert_eq!(after.shares.len(), 1);
        let fewer = shares.without(NOW, &id(2)).expect("there");
        assert_eq!(fewer.without(NOW, &id(2)), Err(ShareError::Missing(id(2))));
        let renamed = fewer.changed(NOW, &id(1), |share| share.connection += 1).expect("there");
        assert_eq!(renamed.get(NOW, &id(1)).map(|share| share.connection), Some(1));
        assert!(renamed.changed(later, &id(1), |_| {}).is_err());
    }

    #[test]
    fn the_id_of_a_share_leads_to_its_session() {
        let of = |id: &str| session_of(&id.parse().expect("id"));
        assert_eq!(of("abc-x").expect("ours").as_str(), "abc");
        assert_eq!(of("a-b-x").expect("ours").as_str(), "a-b");
        for foreign in ["abc", "-x"] {
            assert!(matches!(of(foreign), Err(ShareError::Missing(_))), "{foreign}");
        }
    }
}
