//! Records: values as JSON in an envelope that carries the version of their format.

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::sync::Arc;

use crate::{Compare, Op, Revision, Store, StoreError};

/// Version of the format of records.
pub const RECORD_VERSION: u32 = 1;

/// How often [`StoreExt::update_json`] begins again before it gives up.
const ATTEMPTS: u32 = 64;

#[derive(Serialize)]
struct Written<'a, T> {
    version: u32,
    record: &'a T,
}

#[derive(Deserialize)]
struct Version {
    version: u32,
}

#[derive(Deserialize)]
struct Read<T> {
    record: T,
}

/// A record with what is needed to change it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record<T> {
    /// Content.
    pub value: T,
    /// For [`Compare::revision`].
    pub revision: Revision,
}

/// What to do with a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change<T> {
    /// Leave it as it is.
    Keep,
    /// Write it.
    Put(T),
    /// Remove it.
    Delete,
}

/// `Some` writes, `None` removes.
impl<T> From<Option<T>> for Change<T> {
    fn from(value: Option<T>) -> Self {
        value.map_or(Self::Delete, Self::Put)
    }
}

/// The bytes of a record.
///
/// # Errors
/// The value cannot be written as JSON.
pub fn encode<T: Serialize>(key: &str, record: &T) -> Result<Bytes, StoreError> {
    serde_json::to_vec(&Written { version: RECORD_VERSION, record })
        .map(Bytes::from)
        .map_err(|source| StoreError::Record { key: key.into(), source: Arc::new(source) })
}

/// The record in some bytes.
///
/// # Errors
/// It was written by a newer version, or is of another type.
pub fn decode<T: DeserializeOwned>(key: &str, bytes: &[u8]) -> Result<T, StoreError> {
    let damaged = |source| StoreError::Record { key: key.into(), source: Arc::new(source) };
    // The version first: what else a newer version wrote need not fit our types.
    let Version { version } = serde_json::from_slice(bytes).map_err(damaged)?;
    if version > RECORD_VERSION {
        return Err(StoreError::Newer {
            what: format!("record {key}"),
            found: version,
            known: RECORD_VERSION,
        });
    }
    let read: Read<T> = serde_json::from_slice(bytes).map_err(damaged)?;
    Ok(read.record)
}

/// Records as JSON, on every store.
#[async_trait]
pub trait StoreExt: Store {
    /// The record of a key.
    ///
    /// # Errors
    /// The store cannot be read, or the record does not fit.
    async fn get_json<T: DeserializeOwned + Send>(&self, key: &str) -> Result<Option<Record<T>>, StoreError> {
        let Some(entry) = self.get(key).await? else { return Ok(None) };
        Ok(Some(Record { value: decode(key, &entry.value)?, revision: entry.revision }))
    }

    /// Writes a record, whatever was there.
    ///
    /// # Errors
    /// The store cannot be written.
    async fn put_json<T: Serialize + Sync>(&self, key: &str, value: &T) -> Result<Revision, StoreError> {
        let value = encode(key, value)?;
        Ok(self.transact(Vec::new(), vec![Op::put(key, value)]).await?.revision)
    }

    /// All records of a prefix with their keys, in order.
    ///
    /// # Errors
    /// The store cannot be read, or a record does not fit.
    async fn list_json<T: DeserializeOwned + Send>(
        &self,
        prefix: &str,
    ) -> Result<Vec<(String, Record<T>)>, StoreError> {
        let range = self.range(prefix, None, usize::MAX).await?;
        range
            .entries
            .into_iter()
            .map(|entry| {
                let value = decode(&entry.key, &entry.value)?;
                Ok((entry.key, Record { value, revision: entry.revision }))
            })
            .collect()
    }

    /// Changes a record: `change` gets the current one and says what to do; it is called again with the new
    /// state when somebody else was faster. `change` may answer with an `Option`: `Some` writes, `None`
    /// removes. Returns the record as it then is.
    ///
    /// # Errors
    /// The store cannot be read or written, the record does not fit, or others were faster 64 times.
    async fn update_json<T, C, F>(&self, key: &str, mut change: F) -> Result<Option<Record<T>>, StoreError>
    where
        T: Serialize + DeserializeOwned + Clone + Send + Sync,
        C: Into<Change<T>>,
        F: FnMut(Option<T>) -> C + Send,
    {
        for attempt in 0..ATTEMPTS {
            let current: Option<Record<T>> = self.get_json(key).await?;
            let compare = match &current {
                Some(record) => Compare::revision(key, record.revision),
                None => Compare::absent(key),
            };
            let wanted = change(current.as_ref().map(|record| record.value.clone())).into();
            let (op, value) = match wanted {
                Change::Keep => return Ok(current),
                Change::Delete if current.is_none() => return Ok(None),
                Change::Delete => (Op::delete(key), None),
                Change::Put(value) => {
                    let bytes = encode(key, &value)?;
                    if let Some(current) = &current
                        && encode(key, &current.value)? == bytes
                    {
                        return Ok(Some(Record { value, revision: current.revision }));
                    }
                    (Op::put(key, bytes), Some(value))
                }
            };
            match self.transact(vec![compare], vec![op]).await {
                Ok(committed) => {
                    return Ok(value.map(|value| Record { value, revision: committed.revision }));
                }
                Err(StoreError::Conflict) => {
                    tracing::debug!(key, attempt, "record {key} was changed by somebody else; trying again");
                }
                Err(error) => return Err(error),
            }
        }
        Err(StoreError::Conflict)
    }
}

impl<S: Store + ?Sized> StoreExt for S {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_newer_versions_and_of_other_types_are_refused_by_key() {
        let bytes = encode("a", &7_u32).expect("written");
        assert_eq!(decode::<u32>("a", &bytes).expect("read"), 7);
        let newer = decode::<u32>("a", br#"{"version":2,"something":"else"}"#);
        assert!(matches!(newer, Err(StoreError::Newer { found: 2, .. })), "{newer:?}");
        for bad in [&b""[..], b"{}", b"7", br#"{"version":1}"#, br#"{"version":1,"record":"x"}"#] {
            let error = decode::<u32>("some/key", bad).expect_err("damaged").to_string();
            assert!(error.contains("some/key"), "{error}");
        }
    }
}
