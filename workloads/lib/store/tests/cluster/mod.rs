//! What only a store on several servers can get wrong: members that are killed, hang, come back, refuse us.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use etcd_client::{Client, Permission, PermissionType};
use fanlight_store::{Compare, Event, Handle, Op, StoreConfig, StoreError, Watch, open};

use crate::{
    fold, next, put,
    server::{Cluster, PATIENCE, certificates},
};

/// Waits for something that happens by itself.
async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let wait = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("this does not happen: {what}"));
}

/// Sets a key, again and again until it is acknowledged.
async fn put_at_last(store: &Handle, key: &str, value: &str) {
    let write = async {
        while let Err(error) = store.transact(vec![], vec![Op::put(key, value.to_owned())]).await {
            assert!(matches!(error, StoreError::Unavailable { .. }), "{error:?}");
        }
    };
    tokio::time::timeout(PATIENCE, write).await.expect("the store comes back");
}

/// Waits until a watch has told a value.
async fn until_told(watch: &mut Watch, key: &str, value: &str) {
    let mut state = BTreeMap::new();
    while state.get(key).map(String::as_str) != Some(value) {
        fold(&mut state, next(watch).await);
    }
}

/// The words of an error with its causes.
fn words(error: &StoreError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

async fn refused(config: &StoreConfig) -> StoreError {
    let opened = tokio::time::timeout(PATIENCE, open(config)).await.expect("there is an answer");
    opened.err().unwrap_or_else(|| panic!("let in with {config:?}"))
}

/// What the writers of a test were told.
#[derive(Default)]
struct Told {
    acknowledged: Mutex<BTreeSet<String>>,
    /// The store said that these were not written.
    not_done: Mutex<BTreeSet<String>>,
    count: AtomicUsize,
    end: AtomicBool,
}

/// Writes keys of its own, each once, until the end.
async fn write(store: Handle, name: String, told: Arc<Told>) {
    for n in 0.. {
        if told.end.load(Ordering::Acquire) {
            return;
        }
        let key = format!("data/{name}/{n}");
        match store.transact(vec![Compare::absent(&key)], vec![Op::put(&key, "x")]).await {
            Ok(_) => {
                told.acknowledged.lock().expect("no panic").insert(key);
                told.count.fetch_add(1, Ordering::AcqRel);
            }
            Err(StoreError::Unavailable { unknown: true, .. }) => {}
            Err(StoreError::Unavailable { unknown: false, .. }) => {
                told.not_done.lock().expect("no panic").insert(key);
            }
            // Each key is tried once: were a request sent twice, it would meet itself here.
            Err(error) => panic!("{key}: {error:?}"),
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Reads without a break; one lost member must not make any of it fail.
async fn read(store: Handle, told: Arc<Told>) -> Vec<String> {
    let mut errors = Vec::new();
    while !told.end.load(Ordering::Acquire) {
        if let Err(error) = store.range("lease/", None, 10).await {
            errors.push(words(&error));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    errors
}

/// Everything that a watch shows, up to the key `end`.
async fn record(mut watch: Watch) -> Vec<Event> {
    let mut events = Vec::new();
    loop {
        let event = tokio::time::timeout(4 * PATIENCE, watch.next()).await.expect("it goes on");
        let event = event.expect("the store is open");
        let last = matches!(&event, Event::Put(entry) if entry.key == "end");
        events.push(event);
        if last {
            return events;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_are_killed_and_come_back_and_nothing_is_lost() {
    let mut cluster = Cluster::start(3, &[]);
    let store = cluster.store().await;
    assert_eq!(store.members().await.expect("counted"), 3);
    let lease = store.grant(Duration::from_secs(6)).await.expect("granted");
    store.transact(vec![], vec![Op::put_leased("lease/kept", "1", lease)]).await.expect("written");
    let told = Arc::new(Told::default());
    let mut writers = Vec::new();
    let mut watches = Vec::new();
    // A store for each, which begin at different members.
    for name in 0..4 {
        let store = cluster.store().await;
        writers.push(tokio::spawn(write(store, name.to_string(), told.clone())));
        let store = cluster.store().await;
        watches.push((tokio::spawn(record(store.watch("").await.expect("watched"))), store));
    }
    let reader = tokio::spawn(read(cluster.store().await, told.clone()));
    let keeper = {
        let (store, told) = (store.clone(), told.clone());
        tokio::spawn(async move {
            while !told.end.load(Ordering::Acquire) {
                match store.keep_alive(lease).await {
                    Ok(()) | Err(StoreError::Unavailable { .. }) => {}
                    Err(error) => panic!("{error:?}"),
                }
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
        })
    };
    let progress = async |much: usize| {
        let goal = told.count.load(Ordering::Acquire) + much;
        until("writers go on", || told.count.load(Ordering::Acquire) >= goal).await;
    };
    for round in 0..4 {
        progress(100).await;
        let leader = cluster.leader().await;
        let victim = if round % 2 == 0 { leader } else { (leader + 1 + round / 2) % 3 };
        cluster.members[victim].kill();
        progress(200).await;
        cluster.members[victim].start();
        // It answers by itself again, and so knows what was written meanwhile.
        let alone = StoreConfig::at(format!("etcd://{}", cluster.members[victim].address));
        let returned = cluster.open(&alone).await;
        assert!(returned.get("lease/kept").await.expect("read").is_some());
    }
    progress(100).await;
    told.end.store(true, Ordering::Release);
    for writer in writers {
        writer.await.expect("a writer ends well");
    }
    keeper.await.expect("the lease was kept");
    assert_eq!(reader.await.expect("the reader ends well"), Vec::<String>::new(), "reads that failed");
    put(&store, "end", "1").await;
    let range = store.range("data/", None, usize::MAX).await.expect("read");
    let there: BTreeSet<String> = range.entries.into_iter().map(|entry| entry.key).collect();
    let acknowledged = told.acknowledged.lock().expect("no panic").clone();
    let not_done = told.not_done.lock().expect("no panic").clone();
    assert!(acknowledged.len() >= 1000);
    assert_eq!(acknowledged.difference(&there).collect::<Vec<_>>(), Vec::<&String>::new(), "lost");
    assert_eq!(not_done.intersection(&there).collect::<Vec<_>>(), Vec::<&String>::new(), "done after all");
    assert!(store.get("lease/kept").await.expect("read").is_some(), "a lease that is kept alive stays");
    for (recorded, _store) in watches {
        let events = recorded.await.expect("the watch ends well");
        let mut state = BTreeMap::new();
        let mut shown = BTreeSet::new();
        for (n, event) in events.into_iter().enumerate() {
            match &event {
                Event::Reset { .. } => assert_eq!(n, 0, "nobody fell behind"),
                Event::Put(entry) => assert!(shown.insert(entry.key.clone()), "{} came twice", entry.key),
                Event::Delete { key, .. } => panic!("{key} was never removed"),
            }
            fold(&mut state, event);
        }
        state.retain(|key, _| key.starts_with("data/"));
        assert!(there.iter().eq(state.keys()), "a watch lost an event");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_majority_calls_fail_by_name_and_everything_works_again_after_it() {
    let mut cluster = Cluster::start(3, &[]);
    let store = cluster.store().await;
    let lease = store.grant(Duration::from_secs(60)).await.expect("granted");
    store.transact(vec![], vec![Op::put_leased("leased", "1", lease)]).await.expect("written");
    let mut watch = store.watch("").await.expect("watched");
    until_told(&mut watch, "leased", "1").await;
    let leader = cluster.leader().await;
    let (first, second) = ((leader + 1) % 3, leader);
    for victim in [first, second] {
        cluster.members[victim].kill();
    }
    let calls = async {
        tokio::join!(
            async { store.get("leased").await.err() },
            async { store.range("", None, 5).await.err() },
            async { store.transact(vec![], vec![Op::put("a", "1")]).await.err() },
            async { store.grant(Duration::from_secs(5)).await.err() },
            async { store.keep_alive(lease).await.err() },
            async { store.revoke(lease).await.err() },
            async { store.watch("").await.err() },
        )
    };
    let errors = tokio::time::timeout(PATIENCE, calls).await.expect("no call hangs");
    let (get, range, transact, grant, keep_alive, revoke, watched) = errors;
    for (call, error) in [
        ("get", get),
        ("range", range),
        ("transact", transact),
        ("grant", grant),
        ("keep_alive", keep_alive),
        ("revoke", revoke),
        ("watch", watched),
    ] {
        let Some(error) = error else { panic!("{call} cannot work") };
        assert!(matches!(error, StoreError::Unavailable { .. }), "{call}: {error:?}");
        let text = error.to_string();
        assert!(text.contains(&cluster.config().url), "the servers are named: {text}");
    }
    // By now the member that is left knows that it is alone, and nothing can have been sent to the others.
    let error = store.transact(vec![], vec![Op::put("b", "1")]).await.expect_err("no majority");
    let text = error.to_string();
    assert!(matches!(error, StoreError::Unavailable { unknown: false, .. }), "{error:?}");
    assert!(text.contains("no leader") && text.contains("Connection refused"), "{text}");
    let text = refused(&cluster.config()).await.to_string();
    assert!(text.contains("is unavailable"), "{text}");
    cluster.members[second].start();
    put_at_last(&store, "after", "1").await;
    until_told(&mut watch, "after", "1").await;
    assert_eq!(store.get("b").await.expect("read"), None, "what was not done is not there");
    // It may have been revoked by the call above, whose outcome was unknown.
    match store.keep_alive(lease).await {
        Ok(()) => assert!(store.get("leased").await.expect("read").is_some()),
        Err(StoreError::NoLease(_)) => assert_eq!(store.get("leased").await.expect("read"), None),
        Err(error) => panic!("{error:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_hangs_is_left_by_calls_and_watches() {
    let cluster = Cluster::start(3, &[]);
    let store = cluster.store().await;
    let mut watch = store.watch("").await.expect("watched");
    put(&store, "before", "x").await;
    for (n, member) in cluster.members.iter().enumerate() {
        member.signal("STOP");
        store.get("before").await.expect("reads go on");
        put_at_last(&store, "hung", &n.to_string()).await;
        until_told(&mut watch, "hung", &n.to_string()).await;
        member.signal("CONT");
        let alone = StoreConfig::at(format!("etcd://{}", member.address));
        let returned = cluster.open(&alone).await;
        let entry = returned.get("hung").await.expect("read").expect("there");
        assert_eq!(entry.value, n.to_string(), "it has caught up");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn time_in_which_the_cluster_was_away_does_not_count_for_leases() {
    let mut cluster = Cluster::start(1, &[]);
    let store = cluster.store().await;
    let lease = store.grant(Duration::from_secs(5)).await.expect("granted");
    store.transact(vec![], vec![Op::put_leased("leased", "1", lease)]).await.expect("written");
    cluster.members[0].kill();
    // Longer than the lease: nobody could keep it alive meanwhile.
    tokio::time::sleep(Duration::from_secs(6)).await;
    cluster.members[0].start();
    let back = cluster.store().await;
    back.keep_alive(lease).await.expect("still there");
    assert!(store.get("leased").await.expect("read").is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_whose_place_was_compacted_away_gets_the_state_again() {
    let mut cluster = Cluster::start(1, &[]);
    let store = cluster.store().await;
    put(&store, "w/gone", "1").await;
    let mut watch = store.watch("w/").await.expect("watched");
    let mut state = BTreeMap::new();
    fold(&mut state, next(&mut watch).await);
    put(&store, "w/stays", "1").await;
    fold(&mut state, next(&mut watch).await);
    assert_eq!(state.len(), 2);
    // At another address, where the watch does not see it, much happens and is forgotten.
    let address = cluster.members[0].address.clone();
    cluster.members[0].kill();
    cluster.members[0].move_to_a_free_port();
    cluster.members[0].start();
    let elsewhere = cluster.store().await;
    elsewhere.transact(vec![], vec![Op::delete("w/gone"), Op::put("w/new", "1")]).await.expect("written");
    let revision = put(&elsewhere, "other", "1").await;
    let mut client = cluster.client(0).await;
    client.compact(i64::try_from(revision).expect("small"), None).await.expect("compacted");
    cluster.members[0].kill();
    cluster.members[0].move_to(&address);
    cluster.members[0].start();
    let event = next(&mut watch).await;
    assert!(matches!(event, Event::Reset { .. }), "{event:?}");
    fold(&mut state, event);
    assert_eq!(state.keys().collect::<Vec<_>>(), ["w/new", "w/stays"]);
    put_at_last(&store, "w/more", "1").await;
    until_told(&mut watch, "w/more", "1").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_with_tls_takes_who_has_a_certificate_of_its_authority() {
    let folder = tempfile::tempdir().expect("a folder");
    certificates(folder.path());
    let path = |name: &str| folder.path().join(name);
    let text = |name: &str| path(name).to_str().expect("text").to_owned();
    let cluster = Cluster::start(
        1,
        &[
            "--cert-file",
            &text("server.pem"),
            "--key-file",
            &text("server.key"),
            "--trusted-ca-file",
            &text("ca.pem"),
            "--client-cert-auth",
        ],
    );
    let good = StoreConfig {
        ca: path("ca.pem"),
        certificate: path("client.pem"),
        key: path("client.key"),
        ..cluster.config()
    };
    let store = cluster.open(&good).await;
    let mut watch = store.watch("").await.expect("watched");
    put(&store, "a", "1").await;
    until_told(&mut watch, "a", "1").await;
    assert!(store.get("a").await.expect("read").is_some());
    let anonymous = StoreConfig { certificate: Default::default(), key: Default::default(), ..good.clone() };
    let stranger =
        StoreConfig { certificate: path("stranger.pem"), key: path("stranger.key"), ..good.clone() };
    let distrustful = StoreConfig { ca: path("other-ca.pem"), ..good.clone() };
    let unencrypted = StoreConfig::at(good.url.replace("etcds://", "etcd://"));
    let no_pem = StoreConfig { certificate: path("client.key"), ..good.clone() };
    let cases = [
        ("no certificate", anonymous, "wants a certificate of ours (store.certificate)"),
        ("a certificate of another authority", stranger, "does not accept our certificate"),
        ("a server of another authority", distrustful, "invalid peer certificate"),
        ("no TLS", unencrypted, "wants TLS"),
        ("a file with something else", no_pem, "store.certificate and store.key cannot be used"),
    ];
    // All at the same time: each is tried for some seconds.
    let refusals = cases.into_iter().map(|(case, config, expected)| async move {
        let error = refused(&config).await;
        assert!(matches!(error, StoreError::Unavailable { .. }), "{case}: {error:?}");
        let text = words(&error);
        assert!(text.contains(expected) && text.contains("127.0.0.1"), "{case}: {text}");
    });
    futures_util::future::join_all(refusals).await;
    let missing = refused(&StoreConfig { ca: "/none/ca.pem".into(), ..good }).await;
    assert!(words(&missing).contains("store.ca \"/none/ca.pem\""), "{}", words(&missing));
}

/// Turns logins on: `root`, and `me`, which may do everything under `/mine/`.
async fn require_logins(client: &mut Client) {
    client.role_add("root").await.expect("a role");
    client.user_add("root", "secret", None).await.expect("a user");
    client.user_grant_role("root", "root").await.expect("granted");
    client.role_add("mine").await.expect("a role");
    let all = Permission::new(PermissionType::Readwrite, "/mine/").with_prefix();
    client.role_grant_permission("mine", all).await.expect("granted");
    client.user_add("me", "hunter2", None).await.expect("a user");
    client.user_grant_role("me", "mine").await.expect("granted");
    client.auth_enable().await.expect("on");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_with_logins_takes_who_has_the_password_and_may_use_the_prefix() {
    let folder = tempfile::tempdir().expect("a folder");
    let secret = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).expect("written");
        path
    };
    let cluster = Cluster::start(1, &[]);
    drop(cluster.store().await);
    require_logins(&mut cluster.client(0).await).await;
    let good = StoreConfig {
        prefix: "/mine/".into(),
        user: "me".into(),
        password_file: secret("right", "hunter2\n"),
        ..cluster.config()
    };
    let store = cluster.open(&good).await;
    let mut watch = store.watch("").await.expect("watched");
    let lease = store.grant(Duration::from_secs(60)).await.expect("granted");
    store.transact(vec![Compare::absent("a")], vec![Op::put_leased("a", "1", lease)]).await.expect("written");
    until_told(&mut watch, "a", "1").await;
    store.keep_alive(lease).await.expect("kept");
    assert_eq!(store.range("", None, usize::MAX).await.expect("read").entries.len(), 1);
    store.revoke(lease).await.expect("revoked");
    assert_eq!(store.members().await.expect("counted"), 1);
    // A change of anybody's rights makes all logins old.
    let mut root = Client::connect(
        [format!("http://{}", cluster.members[0].address)],
        Some(etcd_client::ConnectOptions::new().with_user("root", "secret")),
    )
    .await
    .expect("the administrator");
    root.role_add("another").await.expect("a role");
    put(&store, "a", "2").await;
    until_told(&mut watch, "a", "2").await;
    let nobody = StoreConfig { user: String::new(), password_file: Default::default(), ..good.clone() };
    for (case, config, expected) in [
        (
            "a wrong password",
            StoreConfig { password_file: secret("wrong", "hunter3"), ..good.clone() },
            "invalid user id or password",
        ),
        ("another prefix", StoreConfig { prefix: "/theirs/".into(), ..good.clone() }, "permission denied"),
        ("no login", nobody, "user name is empty"),
    ] {
        let error = refused(&config).await;
        assert!(matches!(error, StoreError::Unavailable { unknown: false, .. }), "{case}: {error:?}");
        let text = words(&error);
        assert!(text.to_lowercase().contains(expected) && !text.contains("hunter"), "{case}: {text}");
    }
    let missing = StoreConfig { password_file: "/none/secret".into(), ..good };
    let text = words(&refused(&missing).await);
    assert!(text.contains("store.password_file \"/none/secret\""), "{text}");
}
