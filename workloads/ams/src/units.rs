//! This unit among the units of AMS: it keeps a lease, and follows who else is there and where. What it may look after
//! follows from that (`core::units`).

use std::{collections::BTreeMap, time::Duration};

use fanlight_service::Shutdown;
use fanlight_store::{Entry, Event, Handle, LeaseId, Op, StoreError, decode, encode};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::core::{model::key, units::Units};

/// How long after its last sign a unit's part falls to the others.
const LEASE: Duration = Duration::from_secs(9);
/// How often a unit gives a sign.
const RENEW: Duration = Duration::from_secs(2);
/// How long between attempts when the store does not answer.
const AGAIN: Duration = Duration::from_secs(1);

/// What a unit says of itself to the others.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sign {
    /// `host:port` of its API; empty: the others do not reach it.
    #[serde(default)]
    pub address: String,
    /// SHA-256 of the certificate that it shows there, and with which it comes to the others; hex.
    #[serde(default)]
    pub fingerprint: String,
}

/// The units that are there, by name.
pub type Signs = BTreeMap<String, Sign>;

/// What is written of a unit; one of an older version says only that it is there.
fn read(entry: &Entry) -> Sign {
    decode(&entry.key, &entry.value).unwrap_or_default()
}

/// Gives signs of this unit until the end, and takes them back then.
pub async fn keep(store: Handle, unit: String, own: Sign, mut lease: Option<LeaseId>, shutdown: Shutdown) {
    loop {
        if let Err(error) = sign(&store, &unit, &own, &mut lease).await {
            tracing::debug!(unit, "keeping the lease of this unit failed: {error}");
            if matches!(error, StoreError::NoLease(_)) {
                // Ended while we were cut off: begin again at once with a new one.
                lease = None;
                continue;
            }
        }
        tokio::select! {
            () = tokio::time::sleep(RENEW) => {}
            () = shutdown.stopping() => break,
        }
    }
    if let Some(lease) = lease {
        // Should it fail, the lease ends by itself.
        let _ = tokio::time::timeout(Duration::from_secs(1), store.revoke(lease)).await;
    }
}

/// One sign of this unit.
///
/// # Errors
/// The store does not take it, or the lease has ended.
pub async fn sign(
    store: &Handle,
    unit: &str,
    own: &Sign,
    lease: &mut Option<LeaseId>,
) -> Result<(), StoreError> {
    if let Some(lease) = *lease {
        return store.keep_alive(lease).await;
    }
    let granted = store.grant(LEASE).await?;
    *lease = Some(granted);
    let key = format!("{}{unit}", key::UNITS);
    let here = Op::put_leased(&key, encode(&key, own)?, granted);
    store.transact(Vec::new(), vec![here]).await.map(drop)
}

/// Follows who is there, until the end.
pub async fn follow(store: Handle, units: watch::Sender<Units>, signs: watch::Sender<Signs>) {
    let mut live = Signs::new();
    loop {
        let mut events = match store.watch(key::UNITS).await {
            Ok(events) => events,
            Err(StoreError::Closed) => return,
            Err(error) => {
                tracing::debug!("following the units: {error}");
                tokio::time::sleep(AGAIN).await;
                continue;
            }
        };
        while let Some(event) = events.next().await {
            let name = |key: &str| key.strip_prefix(key::UNITS).unwrap_or(key).to_owned();
            match event {
                Event::Reset { entries, .. } => {
                    live = entries.iter().map(|entry| (name(&entry.key), read(entry))).collect();
                }
                Event::Put(entry) => drop(live.insert(name(&entry.key), read(&entry))),
                Event::Delete { key, .. } => drop(live.remove(&name(&key))),
            }
            signs.send_replace(live.clone());
            let changed = units.send_if_modified(|units| {
                let next = units.with(live.keys().cloned().collect());
                let changed = *units != next;
                *units = next;
                changed
            });
            if changed {
                tracing::info!(
                    "units of AMS that are there: {}",
                    live.keys().cloned().collect::<Vec<_>>().join(", ")
                );
            }
        }
        if store.get(key::UNITS).await.is_err_and(|error| matches!(error, StoreError::Closed)) {
            return;
        }
    }
}
