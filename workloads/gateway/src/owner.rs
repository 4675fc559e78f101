//! Work that must happen once among all units (looking after sessions that wait, taking away what has expired) belongs
//! to the unit that holds a key in the store under its own lease. Every change that the work makes is a
//! compare-and-set besides, so that a moment with two owners costs time and nothing else.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use fanlight_service::Shutdown;
use fanlight_store::{Compare, Handle, LeaseId, Op, StoreError};

/// The key that the owner holds.
const OWNER: &str = "gateway/owner";
/// Units that are there.
pub const UNITS: &str = "gateway/units/";
/// How long after its last sign a unit's part falls to another.
const LEASE: Duration = Duration::from_secs(9);
/// How often a unit gives a sign, and looks whether the part is free.
const RENEW: Duration = Duration::from_secs(2);
/// An owner that could not give a sign for so long stops before another may begin.
const TRUST: Duration = Duration::from_secs(6);

/// Whether this unit is the owner.
#[derive(Default)]
pub struct Ownership {
    owned: AtomicBool,
}

impl Ownership {
    /// Whether this unit is the owner now.
    pub fn is_owner(&self) -> bool {
        self.owned.load(Ordering::Acquire)
    }

    fn set(&self, owned: bool, unit: &str) {
        if self.owned.swap(owned, Ordering::AcqRel) != owned {
            match owned {
                true => tracing::info!(unit, "this unit looks after sessions that wait"),
                false => tracing::info!(unit, "another unit looks after sessions that wait"),
            }
        }
    }

    /// Keeps the lease of this unit and takes the part whenever it is free. Ends with the program, giving both up at
    /// once.
    pub async fn keep(&self, store: &Handle, unit: &str, shutdown: &Shutdown) {
        let mut lease: Option<LeaseId> = None;
        let mut sign = Instant::now();
        loop {
            match self.round(store, unit, &mut lease).await {
                Ok(owned) => {
                    sign = Instant::now();
                    self.set(owned, unit);
                }
                Err(error) => {
                    tracing::debug!(unit, "keeping the lease of this unit failed: {error}");
                    if matches!(error, StoreError::NoLease(_)) {
                        // Ended while we were cut off: begin again at once with a new one.
                        lease = None;
                        self.set(false, unit);
                        continue;
                    }
                    if sign.elapsed() >= TRUST {
                        self.set(false, unit);
                    }
                }
            }
            tokio::select! {
                () = tokio::time::sleep(RENEW) => {}
                () = shutdown.stopping() => break,
            }
        }
        self.set(false, unit);
        if let Some(lease) = lease {
            // Should it fail, the lease ends by itself.
            let _ = tokio::time::timeout(Duration::from_secs(1), store.revoke(lease)).await;
        }
    }

    async fn round(
        &self,
        store: &Handle,
        unit: &str,
        lease: &mut Option<LeaseId>,
    ) -> Result<bool, StoreError> {
        let held = match *lease {
            Some(held) => {
                store.keep_alive(held).await?;
                held
            }
            None => {
                let granted = store.grant(LEASE).await?;
                *lease = Some(granted);
                let here = Op::put_leased(format!("{UNITS}{unit}"), "here", granted);
                store.transact(vec![], vec![here]).await?;
                granted
            }
        };
        let compare = match store.get(OWNER).await? {
            Some(entry) if entry.lease == Some(held) => return Ok(true),
            // Our own, of an earlier life.
            Some(entry) if entry.value == unit.as_bytes() => Compare::revision(OWNER, entry.revision),
            Some(_) => return Ok(false),
            None => Compare::absent(OWNER),
        };
        match store.transact(vec![compare], vec![Op::put_leased(OWNER, unit.to_owned(), held)]).await {
            Ok(_) => Ok(true),
            Err(StoreError::Conflict) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use fanlight_store::Embedded;

    use super::*;

    async fn until(what: &str, holds: impl Fn() -> bool) {
        for _ in 0..2000 {
            if holds() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{what} does not happen");
    }

    struct Unit {
        ownership: Arc<Ownership>,
        shutdown: Shutdown,
    }

    fn unit(store: &Handle, name: &'static str) -> Unit {
        let ownership = Arc::new(Ownership::default());
        let shutdown = Shutdown::new();
        let (kept, store, signal) = (ownership.clone(), store.clone(), shutdown.clone());
        shutdown.spawn("own", async move { kept.keep(&store, name, &signal).await });
        Unit { ownership, shutdown }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn one_unit_owns_the_part_and_another_takes_over_when_it_stops_or_loses_its_lease() {
        let store: Handle = Arc::new(Embedded::memory());
        let first = unit(&store, "first");
        until("the first takes it", || first.ownership.is_owner()).await;
        let second = unit(&store, "second");
        tokio::time::sleep(RENEW * 2).await;
        assert!(first.ownership.is_owner() && !second.ownership.is_owner());
        first.shutdown.stop(Duration::from_secs(5)).await;
        assert!(!first.ownership.is_owner());
        until("the second takes over", || second.ownership.is_owner()).await;
        // Its lease ends behind its back.
        let entry = store.get(OWNER).await.expect("read").expect("there");
        store.revoke(entry.lease.expect("leased")).await.expect("revoked");
        tokio::time::sleep(RENEW * 2).await;
        until("it takes a new one", || second.ownership.is_owner()).await;
        second.shutdown.stop(Duration::from_secs(5)).await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_unit_that_was_killed_takes_its_own_part_back_at_once() {
        let store: Handle = Arc::new(Embedded::memory());
        let ownership = Ownership::default();
        assert!(ownership.round(&store, "unit", &mut None).await.expect("taken"));
        // Killed: nobody revokes. The next life has another lease.
        let mut lease = None;
        assert!(ownership.round(&store, "unit", &mut lease).await.expect("taken again"));
        let entry = store.get(OWNER).await.expect("read").expect("there");
        assert_eq!(entry.lease, lease);
        assert!(!ownership.round(&store, "other", &mut None).await.expect("asked"));
    }
}
