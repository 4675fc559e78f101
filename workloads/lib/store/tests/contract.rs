//! What every store does, tried on the one in a file, on the one in memory and on a real `etcd`; and what only a store
//! in a file, or only one on several servers, can get wrong. Fails where there is no `etcd`.

mod cluster;
mod server;

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use fanlight_store::{
    Change, Compare, Embedded, Event, Handle, MAX_KEY_BYTES, MAX_TRANSACTION_OPS, MAX_VALUE_BYTES, Op, Store,
    StoreConfig, StoreError, StoreExt, Watch, open,
};
use serde::{Deserialize, Serialize};

const PATIENCE: Duration = Duration::from_secs(20);

/// Set in the child process of the durability test: the file to write to.
const WRITER: &str = "FANLIGHT_STORE_TEST_WRITER";

/// A store for one test.
struct Place {
    store: Handle,
    /// Whether nobody else writes to it, so that its revisions can be told.
    alone: bool,
    _folder: Option<tempfile::TempDir>,
    _server: Option<Arc<server::Cluster>>,
}

async fn in_file() -> Place {
    let folder = tempfile::tempdir().expect("a folder");
    let store = Arc::new(Embedded::file(folder.path().join("store")).await.expect("opened"));
    Place { store, alone: true, _folder: Some(folder), _server: None }
}

async fn in_memory() -> Place {
    let store = open(&StoreConfig::default()).await.expect("opened");
    Place { store, alone: true, _folder: None, _server: None }
}

/// One server for all tests, each with a prefix of its own.
async fn in_etcd() -> Place {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let server = server::shared();
    let prefix = format!("/test/{}/", NEXT.fetch_add(1, Ordering::Relaxed));
    let store = server.open(&StoreConfig { prefix, ..server.config() }).await;
    Place { store, alone: false, _folder: None, _server: Some(server) }
}

macro_rules! contract {
    ($($name:ident),* $(,)?) => {
        mod file {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() { super::$name(super::in_file().await).await; })*
        }
        mod memory {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() { super::$name(super::in_memory().await).await; })*
        }
        mod etcd {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() { super::$name(super::in_etcd().await).await; })*
        }
    };
}

contract!(
    what_was_written_is_read_and_revisions_grow,
    a_transaction_happens_whole_or_not_at_all,
    of_many_at_the_same_time_exactly_one_wins,
    what_is_out_of_bounds_is_refused_before_it_is_tried,
    ranges_come_in_order_and_in_parts,
    a_range_of_any_size_shows_one_revision,
    a_watch_shows_the_state_and_then_each_change,
    a_watch_shows_values_of_any_size,
    a_watcher_that_falls_behind_gets_the_state_again,
    keys_of_an_expired_lease_vanish,
    a_lease_that_is_kept_alive_stays_and_a_revoked_one_goes,
    records_are_changed_without_losing_anybodys_change,
    a_store_knows_how_many_servers_hold_it,
    a_closed_store_says_so,
);

async fn put(store: &Handle, key: &str, value: &str) -> u64 {
    store.transact(vec![], vec![Op::put(key, value.to_owned())]).await.expect("written").revision
}

async fn next(watch: &mut Watch) -> Event {
    tokio::time::timeout(PATIENCE, watch.next()).await.expect("an event comes").expect("the store is open")
}

/// Folds events until the state is as expected.
async fn until_state(watch: &mut Watch, state: &mut BTreeMap<String, String>, expected: &[(&str, &str)]) {
    let expected: BTreeMap<String, String> =
        expected.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
    while *state != expected {
        fold(state, next(watch).await);
    }
}

fn fold(state: &mut BTreeMap<String, String>, event: Event) {
    let text = |value: bytes::Bytes| String::from_utf8(value.to_vec()).expect("text");
    match event {
        Event::Reset { entries, .. } => {
            *state = entries.into_iter().map(|entry| (entry.key, text(entry.value))).collect();
        }
        Event::Put(entry) => {
            state.insert(entry.key, text(entry.value));
        }
        Event::Delete { key, .. } => {
            state.remove(&key);
        }
    }
}

async fn what_was_written_is_read_and_revisions_grow(place: Place) {
    let store = &place.store;
    assert_eq!(store.get("a").await.expect("read"), None);
    let first = put(store, "a", "1").await;
    let second = put(store, "a", "2").await;
    let other = put(store, "b", "1").await;
    assert!(first >= 1 && first < second && second < other);
    let entry = store.get("a").await.expect("read").expect("there");
    assert_eq!((entry.revision, entry.created, entry.value.as_ref()), (second, first, b"2".as_slice()));
    let nothing = store.transact(vec![], vec![Op::delete("none")]).await.expect("fine").revision;
    assert!(nothing >= other);
    if place.alone {
        assert_eq!(nothing, other, "what writes nothing counts nothing");
    }
    store.transact(vec![], vec![Op::delete("a")]).await.expect("deleted");
    assert_eq!(store.get("a").await.expect("read"), None);
    let again = put(store, "a", "3").await;
    let entry = store.get("a").await.expect("read").expect("there");
    assert_eq!((entry.created, entry.revision), (again, again), "a key that comes again is a new one");
    let binary: Vec<u8> = (0..=255).collect();
    store.transact(vec![], vec![Op::put("bytes", binary.clone())]).await.expect("written");
    assert_eq!(store.get("bytes").await.expect("read").expect("there").value, binary);
}

async fn a_transaction_happens_whole_or_not_at_all(place: Place) {
    let store = &place.store;
    let revision = put(store, "a", "1").await;
    let ops = vec![Op::put("a", "2"), Op::put("b", "2"), Op::delete("c")];
    for compares in [
        vec![Compare::revision("a", revision + 1)],
        vec![Compare::revision("b", revision)],
        vec![Compare::absent("a")],
        vec![Compare::value("a", "2")],
        vec![Compare::value("b", "")],
        vec![Compare::revision("a", revision), Compare::absent("a")],
    ] {
        let error = store.transact(compares.clone(), ops.clone()).await.expect_err("does not hold");
        assert!(error.is_conflict(), "{compares:?}: {error:?}");
    }
    assert_eq!(store.get("b").await.expect("read"), None);
    let compares = vec![Compare::revision("a", revision), Compare::absent("b"), Compare::value("a", "1")];
    let committed = store.transact(compares, ops).await.expect("holds");
    let range = store.range("", None, 10).await.expect("read");
    let revisions: Vec<u64> = range.entries.iter().map(|entry| entry.revision).collect();
    assert_eq!(revisions, [committed.revision; 2], "one transaction, one revision");
    let twice = store.transact(vec![], vec![Op::put("x", "1"), Op::delete("x")]).await;
    assert!(matches!(twice, Err(StoreError::Invalid(_))), "{twice:?}");
}

async fn of_many_at_the_same_time_exactly_one_wins(place: Place) {
    let store = &place.store;
    let attempts = (0..50).map(|n| {
        let store = store.clone();
        tokio::spawn(async move {
            store.transact(vec![Compare::absent("lock")], vec![Op::put("lock", n.to_string())]).await.is_ok()
        })
    });
    let won = futures_util::future::join_all(attempts.collect::<Vec<_>>()).await;
    assert_eq!(won.into_iter().filter(|won| *won.as_ref().expect("ended")).count(), 1);
}

async fn what_is_out_of_bounds_is_refused_before_it_is_tried(place: Place) {
    let store = &place.store;
    let revision = put(store, "a", "1").await;
    for (compares, ops) in [
        (vec![], vec![Op::put("", "1")]),
        (vec![], vec![Op::put("k".repeat(MAX_KEY_BYTES + 1), "1")]),
        (vec![], vec![Op::put("b", vec![0; MAX_VALUE_BYTES + 1])]),
        (vec![], (0..=MAX_TRANSACTION_OPS).map(|n| Op::put(n.to_string(), "1")).collect()),
        (
            (0..=MAX_TRANSACTION_OPS).map(|n| Compare::absent(n.to_string())).collect(),
            vec![Op::put("b", "1")],
        ),
        (vec![], vec![Op::put("b", "1"), Op::delete("b")]),
        // Also when a comparison would not hold.
        (vec![Compare::absent("a")], vec![Op::put("", "1")]),
    ] {
        let error = store.transact(compares, ops).await.expect_err("out of bounds");
        assert!(matches!(error, StoreError::Invalid(_)), "{error:?}");
    }
    let most = (0..MAX_TRANSACTION_OPS).map(|n| Op::put(format!("most/{n}"), "1")).collect();
    let absent = (0..MAX_TRANSACTION_OPS).map(|n| Compare::absent(format!("most/{n}"))).collect();
    store.transact(absent, most).await.expect("as many as are allowed");
    let longest = Op::put("k".repeat(MAX_KEY_BYTES), vec![7; MAX_VALUE_BYTES]);
    store.transact(vec![], vec![longest]).await.expect("as long as is allowed");
    let entry = store.get(&"k".repeat(MAX_KEY_BYTES)).await.expect("read").expect("there");
    assert_eq!(entry.value.len(), MAX_VALUE_BYTES);
    for ttl in [Duration::ZERO, Duration::from_millis(999), Duration::from_secs(86_401)] {
        let error = store.grant(ttl).await.expect_err("out of bounds");
        assert!(matches!(error, StoreError::Invalid(_)), "{error:?}");
    }
    // A key that was never there has no revision, not even 0; and there is no lease 0.
    let error = store.transact(vec![Compare::revision("none", 0)], vec![Op::put("none", "1")]).await;
    assert!(error.expect_err("does not hold").is_conflict());
    for lease in [0, 1_u64 << 62] {
        let error =
            store.transact(vec![], vec![Op::put_leased("b", "1", lease)]).await.expect_err("no lease");
        assert!(matches!(error, StoreError::NoLease(id) if id == lease), "{error:?}");
        let error = store.keep_alive(lease).await.expect_err("no lease");
        assert!(matches!(error, StoreError::NoLease(id) if id == lease), "{error:?}");
    }
    let compares = vec![Compare::revision("a", revision + 1)];
    let error = store.transact(compares, vec![Op::put_leased("b", "1", 1 << 62)]).await.expect_err("both");
    assert!(error.is_conflict(), "comparisons come first: {error:?}");
    let lease = store.grant(Duration::from_secs(60)).await.expect("granted");
    let ops = vec![Op::put_leased("b", "1", lease), Op::put_leased("c", "1", 1 << 62)];
    let error = store.transact(vec![], ops).await.expect_err("one of two");
    assert!(matches!(error, StoreError::NoLease(id) if id == 1 << 62), "{error:?}");
    assert_eq!(store.get("b").await.expect("read"), None, "nothing of what was refused is there");
}

async fn ranges_come_in_order_and_in_parts(place: Place) {
    let store = &place.store;
    for n in (0..25).rev() {
        put(store, &format!("list/{n:02}"), "x").await;
    }
    put(store, "lisu", "outside").await;
    let mut keys = Vec::new();
    let mut after: Option<String> = None;
    loop {
        let range = store.range("list/", after.as_deref(), 10).await.expect("read");
        keys.extend(range.entries.iter().map(|entry| entry.key.clone()));
        after = keys.last().cloned();
        if !range.more {
            break;
        }
    }
    assert_eq!(keys, (0..25).map(|n| format!("list/{n:02}")).collect::<Vec<_>>());
    for (prefix, after, limit, found, more) in [
        ("list/", None, 25, 25, false),
        ("list/", None, 24, 24, true),
        ("list/", None, 0, 0, true),
        ("list/", Some("list/24"), 5, 0, false),
        ("list/", Some("lisu"), 5, 0, false),
        ("list/", Some("a"), 3, 3, true),
        ("none/", None, 0, 0, false),
        ("", None, usize::MAX, 26, false),
    ] {
        let range = store.range(prefix, after, limit).await.expect("read");
        let case = (prefix, after, limit);
        assert_eq!((range.entries.len(), range.more), (found, more), "{case:?}");
        assert!(range.revision > 0, "{case:?}");
    }
}

async fn a_range_of_any_size_shows_one_revision(place: Place) {
    let store = &place.store;
    // More than a server tells at once, by number and by size.
    let key = |n: usize| format!("many/{n:04}");
    for chunk in 0..20 {
        let ops = (0..100).map(|n| Op::put(key(chunk * 100 + n), "x")).collect();
        store.transact(vec![], ops).await.expect("written");
    }
    for n in 0..40 {
        let large = Op::put(format!("large/{n:02}"), vec![b'x'; MAX_VALUE_BYTES]);
        store.transact(vec![], vec![large]).await.expect("written");
    }
    let writing = {
        let store = store.clone();
        tokio::spawn(async move {
            // The first and the last key always change together.
            for n in 0.. {
                let ops = vec![Op::put(key(0), n.to_string()), Op::put(key(1999), n.to_string())];
                if store.transact(vec![], ops).await.is_err() {
                    return;
                }
            }
        })
    };
    for _ in 0..10 {
        let range = store.range("many/", None, usize::MAX).await.expect("read");
        assert_eq!((range.entries.len(), range.more), (2000, false));
        assert_eq!(range.entries[0].value, range.entries[1999].value, "one revision");
        assert!(range.entries.iter().all(|entry| entry.revision <= range.revision));
    }
    writing.abort();
    let range = store.range("large/", None, usize::MAX).await.expect("read");
    assert_eq!(range.entries.len(), 40);
    assert!(range.entries.iter().all(|entry| entry.value.len() == MAX_VALUE_BYTES));
    for n in 0..40 {
        store.transact(vec![], vec![Op::delete(format!("large/{n:02}"))]).await.expect("removed");
    }
}

async fn a_watch_shows_the_state_and_then_each_change(place: Place) {
    let store = &place.store;
    put(store, "w/a", "1").await;
    put(store, "other", "1").await;
    let mut watch = store.watch("w/").await.expect("watched");
    let Event::Reset { entries, revision } = next(&mut watch).await else { panic!("the state comes first") };
    assert_eq!(entries.iter().map(|entry| entry.key.as_str()).collect::<Vec<_>>(), ["w/a"]);
    let mut last = revision;
    put(store, "other", "2").await;
    put(store, "w/b", "1").await;
    store
        .transact(vec![], vec![Op::put("w/a", "2"), Op::delete("w/b"), Op::put("other", "3")])
        .await
        .expect("written");
    let mut state = BTreeMap::from([("w/a".to_owned(), "1".to_owned())]);
    let mut changes = 0;
    while state != BTreeMap::from([("w/a".to_owned(), "2".to_owned())]) {
        let event = next(&mut watch).await;
        let revision = match &event {
            Event::Put(entry) => entry.revision,
            Event::Delete { revision, .. } => *revision,
            Event::Reset { .. } => panic!("nobody fell behind"),
        };
        assert!(revision >= last, "in order");
        last = revision;
        changes += 1;
        fold(&mut state, event);
    }
    assert!(changes <= 3);
}

async fn a_watch_shows_values_of_any_size(place: Place) {
    let store = &place.store;
    let mut watch = store.watch("w/").await.expect("watched");
    next(&mut watch).await;
    for n in 0..12_u8 {
        let op = Op::put(format!("w/{n}"), vec![n; MAX_VALUE_BYTES]);
        store.transact(vec![], vec![op]).await.expect("written");
    }
    for n in 0..12_u8 {
        let Event::Put(entry) = next(&mut watch).await else { panic!("nobody fell behind") };
        assert_eq!(entry.key, format!("w/{n}"));
        assert!(entry.value.len() == MAX_VALUE_BYTES && entry.value.iter().all(|byte| *byte == n));
    }
}

async fn a_watcher_that_falls_behind_gets_the_state_again(place: Place) {
    let store = &place.store;
    let mut watch = store.watch("w/").await.expect("watched");
    next(&mut watch).await;
    let writes = (0..3000).map(|n| {
        let store = store.clone();
        async move { put(&store, &format!("w/{}", n % 7), &n.to_string()).await }
    });
    futures_util::future::join_all(writes).await;
    put(store, "w/last", "x").await;
    let mut state = BTreeMap::new();
    while !state.contains_key("w/last") {
        fold(&mut state, next(&mut watch).await);
    }
    let range = store.range("w/", None, 100).await.expect("read");
    assert_eq!(state.len(), range.entries.len());
    for entry in range.entries {
        assert_eq!(state[&entry.key].as_bytes(), entry.value);
    }
}

async fn keys_of_an_expired_lease_vanish(place: Place) {
    let store = &place.store;
    let mut watch = store.watch("").await.expect("watched");
    let mut state = BTreeMap::new();
    let lease = store.grant(Duration::from_secs(1)).await.expect("granted");
    let ops = vec![Op::put_leased("unit/1", "here", lease), Op::put("session", "stays")];
    store.transact(vec![], ops).await.expect("written");
    assert_eq!(store.get("unit/1").await.expect("read").expect("there").lease, Some(lease));
    until_state(&mut watch, &mut state, &[("session", "stays"), ("unit/1", "here")]).await;
    until_state(&mut watch, &mut state, &[("session", "stays")]).await;
    let error = store.keep_alive(lease).await.expect_err("too late");
    assert!(matches!(error, StoreError::NoLease(id) if id == lease), "{error:?}");
    let error = store.transact(vec![], vec![Op::put_leased("x", "1", lease)]).await.expect_err("too late");
    assert!(matches!(error, StoreError::NoLease(_)), "{error:?}");
}

async fn a_lease_that_is_kept_alive_stays_and_a_revoked_one_goes(place: Place) {
    let store = &place.store;
    let kept = store.grant(Duration::from_secs(2)).await.expect("granted");
    let other = store.grant(Duration::from_secs(600)).await.expect("granted");
    assert_ne!(kept, other);
    let ops = vec![Op::put_leased("kept", "1", kept), Op::put_leased("revoked", "1", other)];
    store.transact(vec![], ops).await.expect("written");
    // Longer than the lease would last by itself.
    for _ in 0..12 {
        tokio::time::sleep(Duration::from_millis(250)).await;
        store.keep_alive(kept).await.expect("alive");
    }
    assert!(store.get("kept").await.expect("read").is_some());
    store.revoke(other).await.expect("revoked");
    store.revoke(other).await.expect("again is fine");
    assert_eq!(store.get("revoked").await.expect("read"), None);
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Counter {
    count: u32,
}

async fn records_are_changed_without_losing_anybodys_change(place: Place) {
    let store = &place.store;
    let raise = |store: Handle| async move {
        store
            .update_json("counter", |counter: Option<Counter>| {
                let counter = counter.unwrap_or_default();
                Some(Counter { count: counter.count + 1 })
            })
            .await
    };
    let raised = futures_util::future::join_all((0..20).map(|_| tokio::spawn(raise(store.clone())))).await;
    assert!(raised.iter().all(|result| matches!(result, Ok(Ok(_)))));
    let record = store.get_json::<Counter>("counter").await.expect("read").expect("there");
    assert_eq!(record.value.count, 20);
    let kept = store.update_json("counter", |_: Option<Counter>| Change::Keep).await.expect("fine");
    assert_eq!(kept, Some(record.clone()));
    let same = store.update_json("counter", |counter: Option<Counter>| counter).await.expect("fine");
    assert_eq!(same, Some(record), "what stays the same is not written");
    store.put_json("list/b", &Counter { count: 2 }).await.expect("written");
    store.put_json("list/a", &Counter { count: 1 }).await.expect("written");
    let list = store.list_json::<Counter>("list/").await.expect("read");
    let list: Vec<_> = list.iter().map(|(key, record)| (key.as_str(), record.value.count)).collect();
    assert_eq!(list, [("list/a", 1), ("list/b", 2)]);
    let gone = store.update_json("counter", |_: Option<Counter>| Change::Delete).await.expect("fine");
    assert_eq!(gone, None);
    assert!(store.get("counter").await.expect("read").is_none());
    put(store, "foreign", "not ours").await;
    let error = store.get_json::<Counter>("foreign").await.expect_err("not ours").to_string();
    assert!(error.contains("foreign"), "{error}");
}

async fn a_store_knows_how_many_servers_hold_it(place: Place) {
    assert_eq!(place.store.members().await.expect("counted"), 1);
}

async fn a_closed_store_says_so(place: Place) {
    let store = &place.store;
    let mut watch = store.watch("").await.expect("watched");
    next(&mut watch).await;
    put(store, "a", "1").await;
    store.close().await;
    assert!(matches!(store.get("a").await, Err(StoreError::Closed)));
    assert!(matches!(store.transact(vec![], vec![Op::put("a", "2")]).await, Err(StoreError::Closed)));
    assert!(store.watch("").await.is_err());
    assert!(matches!(store.members().await, Err(StoreError::Closed)));
    let end = async { while watch.next().await.is_some() {} };
    tokio::time::timeout(PATIENCE, end).await.expect("watches end");
    store.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_keeps_everything_and_gives_leases_their_time_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = StoreConfig::file(folder.path().join("store"));
    let store = open(&config).await.expect("opened");
    let lease = store.grant(Duration::from_secs(1)).await.expect("granted");
    store.transact(vec![], vec![Op::put_leased("leased", "1", lease)]).await.expect("written");
    let revision = put(&store, "a", "1").await;
    store.close().await;
    // Longer than the lease: nobody could keep it alive meanwhile.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let store = open(&config).await.expect("opened again");
    assert!(store.get("leased").await.expect("read").is_some());
    store.keep_alive(lease).await.expect("still there");
    let entry = store.get("a").await.expect("read").expect("there");
    assert_eq!((entry.revision, entry.value.as_ref()), (revision, b"1".as_slice()));
    assert!(put(&store, "a", "2").await > revision, "revisions go on");
    let other = store.grant(Duration::from_secs(5)).await.expect("granted");
    assert_ne!(other, lease, "a lease is never given out twice");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_belongs_to_one_process() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("store");
    let store = Embedded::file(&path).await.expect("opened");
    let error = Embedded::file(&path).await.err().expect("in use");
    assert!(error.to_string().contains("in use by another process"), "{error}");
    assert!(error.to_string().contains("store"), "{error}");
    store.close().await;
    Embedded::file(&path).await.expect("free again");
}

/// The child of the test below: writes until it is killed and says what was acknowledged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writer_of_the_durability_test() {
    let Some(path) = std::env::var_os(WRITER) else { return };
    let store: Handle = Arc::new(Embedded::file(path).await.expect("opened"));
    let writers = (0..4).map(|writer| {
        let store = store.clone();
        async move {
            for n in 0.. {
                let key = format!("{writer}/{n}");
                put(&store, &key, &"x".repeat(n % 5000)).await;
                println!("acknowledged {key}");
            }
        }
    });
    futures_util::future::join_all(writers).await;
}

#[test]
fn what_was_acknowledged_survives_a_kill() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("store");
    let mut acknowledged = Vec::new();
    for round in 1..=3 {
        let mut child = Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "writer_of_the_durability_test", "--nocapture"])
            .env(WRITER, &path)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("started");
        let output = BufReader::new(child.stdout.take().expect("piped"));
        let wanted = acknowledged.len() + 150 * round;
        for line in output.lines() {
            let line = line.expect("text");
            if let Some((_, key)) = line.split_once("acknowledged ") {
                acknowledged.push(key.to_owned());
            }
            if acknowledged.len() == wanted {
                // SIGKILL, in the middle of whatever it does.
                child.kill().expect("killed");
            }
        }
        child.wait().expect("ended");
        check(&path, &acknowledged);
    }
}

#[tokio::main(flavor = "current_thread")]
async fn check(path: &Path, acknowledged: &[String]) {
    let store = Embedded::file(path).await.expect("opened after a kill");
    assert!(!acknowledged.is_empty());
    for key in acknowledged {
        assert!(store.get(key).await.expect("read").is_some(), "{key} was acknowledged");
    }
    store.close().await;
}
