//! What a store holds and how transactions change it: a plain value. Where it lasts is the disk's affair, who
//! waits for what the engine's.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Bound,
    time::{Duration, Instant},
};

use bytes::Bytes;

use crate::{
    Compare, Entry, LeaseId, MAX_KEY_BYTES, MAX_TRANSACTION_OPS, MAX_VALUE_BYTES, Op, Range, Revision,
    StoreError,
};

/// The value of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Value {
    pub value: Bytes,
    pub revision: Revision,
    pub created: Revision,
    pub lease: Option<LeaseId>,
}

impl Value {
    pub fn entry(&self, key: &str) -> Entry {
        Entry {
            key: key.to_owned(),
            value: self.value.clone(),
            revision: self.revision,
            created: self.created,
            lease: self.lease,
        }
    }
}

/// Everything in a store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    pub entries: BTreeMap<String, Value>,
    pub leases: BTreeMap<LeaseId, Duration>,
    pub revision: Revision,
    pub last_lease: LeaseId,
}

/// Changes on top of a state that do not last yet. Several transactions gather in one, each seeing those
/// before it, and become durable together.
#[derive(Clone, Debug, Default)]
pub struct Pending {
    /// Revision of the change, and the new value; `None`: removed.
    pub entries: BTreeMap<String, (Revision, Option<Value>)>,
    /// `None`: ended.
    pub leases: BTreeMap<LeaseId, Option<Duration>>,
    pub revision: Revision,
    pub last_lease: LeaseId,
}

impl State {
    /// An empty set of changes.
    pub fn pending(&self) -> Pending {
        Pending { revision: self.revision, last_lease: self.last_lease, ..Pending::default() }
    }

    /// Takes changes over, after they became durable.
    pub fn apply(&mut self, pending: Pending) {
        for (key, (_, value)) in pending.entries {
            match value {
                Some(value) => self.entries.insert(key, value),
                None => self.entries.remove(&key),
            };
        }
        for (lease, ttl) in pending.leases {
            match ttl {
                Some(ttl) => self.leases.insert(lease, ttl),
                None => self.leases.remove(&lease),
            };
        }
        self.revision = pending.revision;
        self.last_lease = pending.last_lease;
    }

    pub fn range(&self, prefix: &str, start_after: Option<&str>, limit: usize) -> Range {
        let start = match start_after {
            Some(after) if after >= prefix => Bound::Excluded(after),
            _ => Bound::Included(prefix),
        };
        let mut found = self
            .entries
            .range::<str, _>((start, Bound::Unbounded))
            .take_while(|(key, _)| key.starts_with(prefix))
            .map(|(key, value)| value.entry(key));
        let entries = found.by_ref().take(limit).collect();
        Range { entries, revision: self.revision, more: found.next().is_some() }
    }
}

impl Pending {
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.leases.is_empty()
    }

    fn value<'a>(&'a self, state: &'a State, key: &str) -> Option<&'a Value> {
        match self.entries.get(key) {
            Some((_, changed)) => changed.as_ref(),
            None => state.entries.get(key),
        }
    }

    fn has_lease(&self, state: &State, lease: LeaseId) -> bool {
        match self.leases.get(&lease) {
            Some(changed) => changed.is_some(),
            None => state.leases.contains_key(&lease),
        }
    }

    /// One transaction; returns the revision of its writes. Changes nothing when it fails.
    pub fn transact(
        &mut self,
        state: &State,
        compares: &[Compare],
        ops: Vec<Op>,
    ) -> Result<Revision, StoreError> {
        check(compares, &ops)?;
        for compare in compares {
            let current = self.value(state, compare.key());
            let holds = match compare {
                Compare::Revision { revision, .. } => {
                    current.is_some_and(|value| value.revision == *revision)
                }
                Compare::Absent { .. } => current.is_none(),
                Compare::Value { value, .. } => current.is_some_and(|current| current.value == *value),
            };
            if !holds {
                return Err(StoreError::Conflict);
            }
        }
        for op in &ops {
            if let Op::Put { lease: Some(lease), .. } = op
                && !self.has_lease(state, *lease)
            {
                return Err(StoreError::NoLease(*lease));
            }
        }
        let revision = self.revision + 1;
        let mut wrote = false;
        for op in ops {
            match op {
                Op::Put { key, value, lease } => {
                    let created = self.value(state, &key).map_or(revision, |current| current.created);
                    self.entries.insert(key, (revision, Some(Value { value, revision, created, lease })));
                    wrote = true;
                }
                Op::Delete { key } => {
                    if self.value(state, &key).is_some() {
                        self.entries.insert(key, (revision, None));
                        wrote = true;
                    }
                }
            }
        }
        if wrote {
            self.revision = revision;
        }
        Ok(self.revision)
    }

    pub fn grant(&mut self, ttl: Duration) -> Result<LeaseId, StoreError> {
        check_ttl(ttl)?;
        self.last_lease += 1;
        self.leases.insert(self.last_lease, Some(ttl));
        Ok(self.last_lease)
    }

    /// Ends leases together with their keys.
    pub fn end_leases(&mut self, state: &State, ended: &[LeaseId]) {
        let ended: BTreeSet<LeaseId> =
            ended.iter().copied().filter(|lease| self.has_lease(state, *lease)).collect();
        if ended.is_empty() {
            return;
        }
        let leased = |value: &Value| value.lease.is_some_and(|lease| ended.contains(&lease));
        // Leases are few and expire rarely, so that a walk over all keys is cheaper than an index.
        let mut keys: Vec<String> = state
            .entries
            .iter()
            .filter(|(key, value)| !self.entries.contains_key(*key) && leased(value))
            .map(|(key, _)| key.clone())
            .collect();
        keys.extend(
            self.entries
                .iter()
                .filter(|(_, (_, value))| value.as_ref().is_some_and(leased))
                .map(|(key, _)| key.clone()),
        );
        if !keys.is_empty() {
            self.revision += 1;
        }
        for key in keys {
            self.entries.insert(key, (self.revision, None));
        }
        for lease in ended {
            self.leases.insert(lease, None);
        }
    }
}

/// Whether a lease may be granted for this time.
pub fn check_ttl(ttl: Duration) -> Result<(), StoreError> {
    if (Duration::from_secs(1)..=Duration::from_secs(86_400)).contains(&ttl) {
        return Ok(());
    }
    Err(StoreError::Invalid(format!("the time of a lease is 1 s to 1 day, not {ttl:?}")))
}

/// Whether a transaction keeps within the limits of every store.
pub fn check(compares: &[Compare], ops: &[Op]) -> Result<(), StoreError> {
    let invalid = |text: String| Err(StoreError::Invalid(text));
    if compares.len() > MAX_TRANSACTION_OPS || ops.len() > MAX_TRANSACTION_OPS {
        return invalid(format!(
            "more than {MAX_TRANSACTION_OPS} comparisons or operations in one transaction"
        ));
    }
    for key in compares.iter().map(Compare::key).chain(ops.iter().map(Op::key)) {
        if key.is_empty() || key.len() > MAX_KEY_BYTES {
            return invalid(format!("a key of {} bytes; 1 to {MAX_KEY_BYTES} are allowed", key.len()));
        }
    }
    let mut written = BTreeSet::new();
    for op in ops {
        if let Op::Put { key, value, .. } = op
            && value.len() > MAX_VALUE_BYTES
        {
            return invalid(format!(
                "the value of {key} has {} bytes; at most {MAX_VALUE_BYTES} are allowed",
                value.len()
            ));
        }
        if !written.insert(op.key()) {
            return invalid(format!("{} is written twice in one transaction", op.key()));
        }
    }
    Ok(())
}

/// Deadlines of leases. Not durable: a store that starts gives every lease its full time.
#[derive(Debug, Default)]
pub struct Deadlines {
    at: HashMap<LeaseId, Instant>,
}

impl Deadlines {
    pub fn set(&mut self, lease: LeaseId, at: Instant) {
        self.at.insert(lease, at);
    }

    pub fn remove(&mut self, lease: LeaseId) {
        self.at.remove(&lease);
    }

    pub fn next(&self) -> Option<Instant> {
        self.at.values().min().copied()
    }

    pub fn expired(&self, now: Instant) -> Vec<LeaseId> {
        self.at.iter().filter(|(_, at)| **at <= now).map(|(lease, _)| *lease).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(key: &str, value: &'static str) -> Op {
        Op::put(key, value)
    }

    #[test]
    fn transactions_of_one_batch_see_those_before_them() {
        let mut state = State::default();
        let mut pending = state.pending();
        assert_eq!(
            pending.transact(&state, &[Compare::absent("a")], vec![put("a", "1")]).expect("absent"),
            1
        );
        let again = pending.transact(&state, &[Compare::absent("a")], vec![put("a", "2")]);
        assert!(matches!(again, Err(StoreError::Conflict)));
        let delete = pending.transact(&state, &[Compare::revision("a", 1)], vec![Op::delete("a")]);
        assert_eq!(delete.expect("revision 1"), 2);
        assert_eq!(pending.transact(&state, &[Compare::absent("a")], vec![put("a", "3")]).expect("gone"), 3);
        assert!(state.entries.is_empty(), "nothing happens before it lasts");
        state.apply(pending);
        assert_eq!(state.entries["a"].value, "3");
        assert_eq!(state.entries["a"].created, 3);
        assert_eq!(state.revision, 3);
    }

    #[test]
    fn a_transaction_that_fails_or_writes_nothing_leaves_no_trace() {
        let state = State::default();
        let mut pending = state.pending();
        for (compares, ops) in [
            (vec![Compare::value("a", "x")], vec![put("b", "1")]),
            (vec![], vec![put("", "1")]),
            (vec![], vec![put("b", "1"), Op::delete("b")]),
            (vec![], vec![put("b", "1"), Op::put_leased("c", "1", 7)]),
            (vec![], vec![put(&"k".repeat(MAX_KEY_BYTES + 1), "1")]),
            (vec![], vec![Op::put("b", vec![0; MAX_VALUE_BYTES + 1])]),
            (vec![], (0..=MAX_TRANSACTION_OPS).map(|n| put(&n.to_string(), "1")).collect()),
        ] {
            assert!(pending.transact(&state, &compares, ops.clone()).is_err(), "{ops:?}");
        }
        assert_eq!(pending.transact(&state, &[], vec![Op::delete("b")]).expect("fine"), 0);
        assert!(pending.is_empty());
        assert_eq!(pending.revision, 0);
    }

    #[test]
    fn ranges_are_cut_by_prefix_start_and_limit() {
        let mut state = State::default();
        let mut pending = state.pending();
        for key in ["a/1", "a/2", "a/3", "b/1", "a"] {
            pending.transact(&state, &[], vec![put(key, "x")]).expect("written");
        }
        state.apply(pending);
        let keys = |prefix, after, limit| {
            let range = state.range(prefix, after, limit);
            (range.entries.into_iter().map(|entry| entry.key).collect::<Vec<_>>(), range.more)
        };
        assert_eq!(keys("a/", None, 10), (vec!["a/1".into(), "a/2".into(), "a/3".into()], false));
        assert_eq!(keys("a/", Some("a/1"), 1), (vec!["a/2".into()], true));
        assert_eq!(keys("a/", Some("a/3"), 1), (vec![], false));
        assert_eq!(keys("a/", Some("a"), 1), (vec!["a/1".into()], true), "a start before the prefix");
        assert_eq!(keys("", None, 0), (vec![], true));
        assert_eq!(keys("c", None, 5), (vec![], false));
    }

    #[test]
    fn keys_go_with_their_lease_unless_they_were_taken_off_it() {
        let mut state = State::default();
        let mut pending = state.pending();
        let lease = pending.grant(Duration::from_secs(5)).expect("in range");
        for op in
            [Op::put_leased("a", "1", lease), Op::put_leased("b", "1", lease), put("b", "2"), put("c", "1")]
        {
            pending.transact(&state, &[], vec![op]).expect("written");
        }
        state.apply(pending);
        let mut pending = state.pending();
        pending.transact(&state, &[], vec![Op::put_leased("d", "1", lease)]).expect("written");
        pending.end_leases(&state, &[lease, 99]);
        state.apply(pending);
        assert_eq!(state.entries.keys().collect::<Vec<_>>(), ["b", "c"]);
        assert!(state.leases.is_empty());
        assert_eq!(state.last_lease, lease, "a lease is never given out twice");
        for bad in [Duration::ZERO, Duration::from_secs(86_401)] {
            assert!(state.pending().grant(bad).is_err());
        }
    }
}
