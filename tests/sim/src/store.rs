//! The gateways' store: records with revisions, changed by compare-and-set, watched by every unit. It never loses
//! what it has; a unit may lose its way to it, or the answer to a write.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use fanlight_api::{InstanceId, SessionId};
use fanlight_gateway::cores::session::{Origin, Session, Verdict};

use crate::{
    note,
    planted::Planted,
    world::{Message, Pid, World},
};

/// What all units share.
#[derive(Default)]
pub struct Store {
    /// Session records with their revisions.
    pub sessions: BTreeMap<SessionId, (Arc<Session>, u64)>,
    /// Sessions of instances that AMS began.
    pub instances: BTreeMap<InstanceId, SessionId>,
    /// Sessions that may have left something.
    pub ended: BTreeSet<SessionId>,
    /// Idempotency keys: the session and what was asked for.
    pub repeats: BTreeMap<String, (SessionId, u64)>,
    /// Who looks after what waits, and under which lease.
    owner: Option<(usize, u64)>,
    /// When leases end.
    leases: BTreeMap<u64, u64>,
    revision: u64,
}

/// How long after its last sign a unit's part falls to another, milliseconds.
const LEASE_MS: u64 = 9000;

impl Store {
    fn is_alive(&self, lease: u64, now: u64) -> bool {
        self.leases.get(&lease).is_some_and(|ends| *ends > now)
    }

    /// A unit gives a sign under its lease and takes the part when it is free. None: the lease has ended.
    pub fn own(&mut self, unit: usize, lease: u64, fresh: bool, now: u64) -> Option<bool> {
        if !fresh && !self.is_alive(lease, now) {
            return None;
        }
        self.leases.insert(lease, now + LEASE_MS);
        let owner = self.owner.filter(|(_, held)| self.is_alive(*held, now));
        match owner {
            Some((_, held)) if held == lease => return Some(true),
            Some((other, _)) if other != unit => return Some(false),
            // Free, or our own of an earlier life.
            _ => {}
        }
        self.owner = Some((unit, lease));
        Some(true)
    }
}

/// A change, as watchers get it.
#[derive(Clone, Debug)]
pub struct Watched {
    /// Which record.
    pub id: SessionId,
    /// What it is now.
    pub session: Option<Arc<Session>>,
    /// When.
    pub revision: u64,
    /// The whole content instead, after a watch was broken.
    pub reset: Option<Vec<(Arc<Session>, u64)>>,
}

/// A store that could not be used, as its user sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreFailure {
    /// It cannot be reached, or its answer was lost.
    Unusable,
    /// The unit died at this point.
    Died,
}

/// Slowest usual way of a change to a watcher, milliseconds.
const WATCH_MS: u64 = 8;

impl World {
    /// Whether a unit can read.
    pub fn store_read(&self, unit: usize) -> Result<(), StoreFailure> {
        if self.has_store(unit) { Ok(()) } else { Err(StoreFailure::Unusable) }
    }

    /// What a unit learns of a write that was done.
    fn store_written(&mut self, unit: usize) -> Result<(), StoreFailure> {
        if !self.survives_write(Pid::Gateway(unit)) {
            return Err(StoreFailure::Died);
        }
        let unknown = self.weather.unknown;
        if !self.calm && self.rng.chance(unknown) {
            note!(self, "the answer of the store to unit {unit} is lost");
            return Err(StoreFailure::Unusable);
        }
        Ok(())
    }

    /// Other keys of a transaction: written with the session's record or alone.
    pub fn store_other(&mut self, unit: usize, change: impl FnOnce(&mut Store)) -> Result<(), StoreFailure> {
        self.store_read(unit)?;
        change(&mut self.store);
        self.store_written(unit)
    }

    /// Writes or removes a session's record. The unit's own index follows when it learns that it worked.
    pub fn store_session(
        &mut self,
        unit: usize,
        id: &SessionId,
        after: Option<Session>,
    ) -> Result<Option<Arc<Session>>, StoreFailure> {
        self.store_read(unit)?;
        let before = self.store.sessions.get(id).map(|(session, _)| session.clone());
        self.store.revision += 1;
        let revision = self.store.revision;
        let after = after.map(Arc::new);
        note!(
            self,
            "store r{revision}: {id} {:?} -> {:?}",
            before.as_ref().map(|session| session.status),
            after.as_ref().map(|session| (session.status, session.cluster_id.clone(), session.seen))
        );
        match &after {
            Some(session) => {
                self.store.sessions.insert(id.clone(), (session.clone(), revision));
            }
            None => {
                self.store.sessions.remove(id);
                if let Some(Session { origin: Origin::Ams, instance_id: Some(instance), .. }) =
                    before.as_deref()
                {
                    self.store.instances.remove(instance);
                }
            }
        }
        self.judge_record(id, before.as_deref(), after.as_deref());
        for watcher in 0..self.units.len() {
            if !self.process(Pid::Gateway(watcher)).up || self.units[watcher].watch_broken {
                continue;
            }
            let delay = 1 + self.rng.below(WATCH_MS);
            let watched = Watched { id: id.clone(), session: after.clone(), revision, reset: None };
            self.watch(watcher, delay, watched);
        }
        self.store_written(unit)?;
        match &after {
            Some(session) => {
                let session = session.clone();
                self.units[unit].index_put(session, revision);
            }
            None => self.units[unit].index_remove(id),
        }
        self.relays_follow(unit, id);
        Ok(after)
    }

    /// Tells a watcher, after everything that it was told before.
    fn watch(&mut self, unit: usize, delay: u64, watched: Watched) {
        let at = (self.now + delay).max(self.units[unit].watch_at).max(self.units[unit].watch_stalled_until);
        self.units[unit].watch_at = at;
        let delay = at - self.now;
        self.deliver(delay, Pid::Fate, Pid::Gateway(unit), Message::Watch(Box::new(watched)));
    }

    /// A watch that was broken is there again, and begins with everything.
    pub fn store_watch_again(&mut self, unit: usize) {
        if !self.units[unit].watch_broken || !self.has_store(unit) {
            return;
        }
        self.units[unit].watch_broken = false;
        let all = self.store.sessions.values().cloned().collect();
        let revision = self.store.revision;
        let id = "reset".parse().expect("a valid id");
        let delay = self.travel();
        self.watch(unit, delay, Watched { id, session: None, revision, reset: Some(all) });
    }

    /// A unit takes note of a change.
    pub fn store_watched(&mut self, unit: usize, watched: Watched) {
        let index = &mut self.units[unit];
        if let Some(all) = watched.reset {
            let mut gone: BTreeSet<SessionId> = index.index.keys().cloned().collect();
            let mut touched = gone.clone();
            for (session, revision) in all {
                gone.remove(&session.id);
                touched.insert(session.id.clone());
                index.index_put(session, revision);
            }
            for id in gone {
                index.index_remove(&id);
            }
            index.ready = true;
            for id in touched {
                self.relays_follow(unit, &id);
            }
            return;
        }
        match watched.session {
            Some(session) => index.index_put(session, watched.revision),
            None => index.index_remove(&watched.id),
        }
        self.relays_follow(unit, &watched.id);
    }

    /// Changes a record by compare-and-set; gives it as it then is.
    pub fn store_change(
        &mut self,
        unit: usize,
        id: &SessionId,
        change: impl FnOnce(&Session) -> Verdict,
    ) -> Result<Option<Arc<Session>>, StoreFailure> {
        self.store_read(unit)?;
        let mut current = self.store.sessions.get(id).cloned();
        if self.has(Planted::WrittenWithoutCompare) {
            current = self.units[unit].index.get(id).cloned().or(current);
        }
        let Some((current, revision)) = current else {
            self.units[unit].index_remove(id);
            self.relays_follow(unit, id);
            return Ok(None);
        };
        match change(&current) {
            Verdict::Keep => {
                self.units[unit].index_put(current.clone(), revision);
                Ok(Some(current))
            }
            Verdict::Put(next) => self.store_session(unit, id, Some(*next)),
            Verdict::Remove => self.store_session(unit, id, None),
        }
    }
}
