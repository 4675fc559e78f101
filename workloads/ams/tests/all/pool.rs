//! Pools of applications over the simulated engine: filled in the background, handed out once, with the lowest
//! priority, by any unit.

use std::{sync::Arc, time::Duration};

use fanlight_ams::{
    Config, Seen,
    engine::{Script, SimulatedEngine},
};
use fanlight_api::{
    InstanceId,
    ams::{Instance, InstanceStatus, InstancesPost, PoolState},
    guest::{PoolStart, Streaming},
};
use fanlight_store::{Embedded, Handle};
use serde_json::json;

use crate::{
    api::{Stack, terminal},
    stack::{PATIENCE, until},
};

fn streaming(session: &str) -> Streaming {
    serde_json::from_value(json!({
        "session_id": session, "agent_url": "wss://agent/internal/1.0/stream", "token": "hunter2", "joinable": true
    }))
    .expect("valid")
}

fn streamed(session: &str) -> InstancesPost {
    InstancesPost { streaming: Some(streaming(session)), ..terminal() }
}

async fn listed(stack: &Stack) -> Vec<Instance> {
    stack.client.instances(&[]).await.expect("listed")
}

async fn set_pool(stack: &Stack, pool: serde_json::Value) {
    stack.client.patch("/1.0/applications", "terminal", &json!({ "pool": pool })).await.expect("set");
}

/// Waits until so many instances wait and are ready, and nothing else waits; their ids.
async fn until_waiting(stack: &Stack, count: usize) -> Vec<InstanceId> {
    until("the pool is filled", async || {
        let all = listed(stack).await;
        let waiting: Vec<_> = all.iter().filter(|one| one.pool == Some(PoolState::Waiting)).collect();
        let ready = waiting.iter().all(|one| one.status() == InstanceStatus::Running);
        (ready && waiting.len() == count).then(|| waiting.iter().map(|one| one.id.clone()).collect())
    })
    .await
}

async fn stack(script: Script, change: impl FnOnce(&mut Config)) -> Stack {
    let stack = Stack::start(script, change).await;
    stack.application().await;
    stack
}

async fn launched(stack: &Stack, post: &InstancesPost) -> Instance {
    let operation = stack.client.launch(post, false, None).await.expect("accepted");
    let operation = stack.client.wait(&operation, PATIENCE).await.expect("ends");
    assert!(operation.succeeded(), "{operation:?}");
    stack.client.instance(operation.resource("instances").expect("named")).await.expect("there")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_launch_takes_what_waits_and_the_pool_is_filled_again() {
    let stack = stack(Script::Run, |_| {}).await;
    set_pool(&stack, json!({"size": 2})).await;
    let waiting = until_waiting(&stack, 2).await;
    let told = stack.client.application("terminal").await.expect("there").pool;
    assert_eq!((told.size, told.start), (2, PoolStart::Streamer));

    let mut post = streamed("s1");
    post.name = "mine".into();
    post.user_data = Some("hello".into());
    post.config.display.width = 640;
    let got = launched(&stack, &post).await;
    assert!(waiting.contains(&got.id), "{got:?}");
    assert_eq!((got.name.as_str(), got.status(), got.pool), ("mine", InstanceStatus::Running, None));
    assert!(got.tags.contains(&"session=s1".to_owned()), "{:?}", got.tags);
    assert_eq!(stack.client.instance("mine").await.expect("by its name").id, got.id);
    let old_name = format!("ams-{}", got.id);
    assert!(stack.client.instance(&old_name).await.is_err(), "its old name is free");
    let claim = stack.engine.claim(&got.id).expect("it was told");
    let told = claim.streaming.expect("of a session");
    assert_eq!((told.session_id.as_str(), told.extra_data, claim.display.width), ("s1", json!("hello"), 640));
    assert_eq!(claim.pool, None);
    for words in stack.engine.ran() {
        assert!(!words.concat().contains("hunter2"), "the token is in nobody's arguments: {words:?}");
    }

    let again = until_waiting(&stack, 2).await;
    assert!(!again.contains(&got.id));
    let nodes = stack.client.nodes().await.expect("listed");
    assert_eq!(nodes[0].used_cpus, 3, "what waits is counted");
    // A smaller pool gives back what is too much; none leaves the launched one alone.
    set_pool(&stack, json!({"size": 0})).await;
    until_waiting(&stack, 0).await;
    until("only the launched one is left", async || (listed(&stack).await.len() == 1).then_some(())).await;
    stack.running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_two_launches_get_the_same_instance_whichever_unit_they_ask() {
    let store: Handle = Arc::new(Embedded::memory());
    let engine = SimulatedEngine::new(Script::Run);
    let mut units = Vec::new();
    for name in ["a", "b"] {
        let folder = tempfile::tempdir().expect("made");
        let unit = Stack::beside(folder, engine.clone(), store.clone(), |config| {
            config.unit = name.to_owned();
            config.node.cpus = 100;
            config.node.memory = "100GB".into();
        });
        units.push(unit.await);
    }
    units[0].application().await;
    set_pool(&units[0], json!({"size": 4})).await;
    let waiting = until_waiting(&units[1], 4).await;
    let launches = (0..8).map(|number| {
        let unit = &units[number % 2];
        async move { launched(unit, &streamed(&format!("s{number}"))).await }
    });
    let got = futures_util::future::join_all(launches).await;
    let mut ids: Vec<_> = got.iter().map(|instance| instance.id.clone()).collect();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 8, "each launch has one of its own");
    assert!(waiting.iter().all(|id| ids.contains(id)), "all that waited were taken");
    for (number, instance) in got.iter().enumerate() {
        assert_eq!(instance.session().map(|id| id.to_string()), Some(format!("s{number}")));
        if let Some(claim) = engine.claim(&instance.id) {
            assert_eq!(claim.streaming.map(|told| told.session_id.to_string()), Some(format!("s{number}")));
        }
    }
    until_waiting(&units[0], 4).await;
    for unit in units {
        unit.running.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_asks_for_something_else_gets_an_instance_of_its_own() {
    let stack = stack(Script::Run, |_| {}).await;
    set_pool(&stack, json!({"size": 1, "start": "application"})).await;
    let waiting = until_waiting(&stack, 1).await;
    let mut more = streamed("s1");
    more.resources.cpus = Some(2);
    let mut data = streamed("s2");
    data.user_data = Some("late".into());
    let mut pinned = streamed("s3");
    pinned.node = "local".into();
    for post in [more, data, pinned] {
        let got = launched(&stack, &post).await;
        assert!(!waiting.contains(&got.id), "{got:?}");
        stack.client.delete_instance(got.id.as_str(), true).await.expect("accepted");
    }
    let got = launched(&stack, &streamed("s4")).await;
    assert_eq!(waiting, [got.id]);
    stack.running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_makes_room_for_a_launch() {
    let stack = stack(Script::Run, |config| {
        config.node.cpus = 4;
        config.node.cpu_allocation_rate = 1.0;
    })
    .await;
    set_pool(&stack, json!({"size": 3})).await;
    let waiting = until_waiting(&stack, 3).await;
    let mut large = terminal();
    large.resources.cpus = Some(3);
    let got = launched(&stack, &large).await;
    assert!(!waiting.contains(&got.id));
    let used = || async { stack.client.nodes().await.expect("listed")[0].used_cpus };
    until("the rest is the pool's", async || (used().await == 4).then_some(())).await;
    let left = listed(&stack).await;
    assert_eq!(left.iter().filter(|one| one.pool.is_some()).count(), 1);
    // More than there is without all of them too: nothing is given up for it.
    let operation = stack.client.launch(&large, false, None).await.expect("accepted");
    let error = stack.client.wait(&operation, PATIENCE).await.expect_err("no room").to_string();
    assert!(error.contains("No suitable node"), "{error}");
    assert!(listed(&stack).await.iter().any(|one| one.pool == Some(PoolState::Waiting)));
    stack.running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failing_application_is_tried_less_and_less_often() {
    let stack = stack(Script::Crash, |_| {}).await;
    set_pool(&stack, json!({"size": 2})).await;
    let mut seen = std::collections::BTreeSet::new();
    // The pauses are 2 s, 4 s, …: in this time there are two attempts at two instances, not hundreds.
    let end = tokio::time::Instant::now() + Duration::from_secs(4);
    while tokio::time::Instant::now() < end {
        seen.extend(listed(&stack).await.into_iter().map(|one| one.id));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!((1..=8).contains(&seen.len()), "{} were made", seen.len());
    stack.running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_instance_that_does_not_take_its_claim_fails_with_the_reason() {
    let stack = stack(Script::Refuse, |_| {}).await;
    set_pool(&stack, json!({"size": 1})).await;
    let waiting = until_waiting(&stack, 1).await;
    let operation = stack.client.launch(&streamed("s1"), false, None).await.expect("accepted");
    assert_eq!(operation.resource("instances"), Some(waiting[0].as_str()));
    let error = stack.client.wait(&operation, PATIENCE).await.expect_err("refused").to_string();
    assert!(error.contains("refused as the script says"), "{error}");
    let failed = stack.client.instance(waiting[0].as_str()).await.expect("there");
    assert_eq!(failed.status(), InstanceStatus::Error);
    until_waiting(&stack, 1).await;
    stack.running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_died_while_it_waited_is_no_launchs_and_a_pool_goes_with_its_application() {
    let stack = stack(Script::Run, |_| {}).await;
    set_pool(&stack, json!({"size": 1})).await;
    let dead = until_waiting(&stack, 1).await;
    let ended = fanlight_api::guest::Ended {
        reason: fanlight_api::guest::EndReason::Failed,
        message: "it crashed".into(),
    };
    stack.engine.set(&dead[0], Seen { run: 1, phase: fanlight_ams::Phase::Ended(ended) });
    let got = launched(&stack, &streamed("s1")).await;
    assert_ne!(got.id, dead[0]);
    stack.client.delete_instance(got.id.as_str(), true).await.expect("accepted");
    let waiting = until_waiting(&stack, 1).await;
    assert_ne!(waiting, dead);
    until("the launched one is gone", async || (listed(&stack).await.len() == 1).then_some(())).await;
    // What waits does not keep an application from being deleted.
    stack.client.delete_application("terminal", false).await.expect("deleted");
    until("nothing is left", async || listed(&stack).await.is_empty().then_some(())).await;
    stack.running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_a_pool_is_refused_by_name() {
    let stack = stack(Script::Run, |_| {}).await;
    for (pool, needle) in [(json!({"size": 101}), "pool.size"), (json!({"start": "later"}), "later")] {
        let refused = stack.client.patch("/1.0/applications", "terminal", &json!({ "pool": pool })).await;
        let text = format!("{:?}", refused.expect_err(needle));
        assert!(text.contains(needle), "{text}");
    }
    set_pool(&stack, json!({"start": "application"})).await;
    set_pool(&stack, json!({"size": 0})).await;
    let record = stack.client.application("terminal").await.expect("there");
    assert!(record.pool.is_none(), "nothing waits");
    stack.running.stop().await;
}
