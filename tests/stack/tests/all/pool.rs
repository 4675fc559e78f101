//! A warm pool over real processes: what waits is handed out, shows its first picture at once, and is replaced.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use fanlight_tests_stack::{
    BOOT, SOON,
    client::{Client, Habits},
    stack::{Stack, pattern},
    until,
};
use reqwest::Method;
use serde_json::{Value, json};

async fn set_pool(stack: &Stack, pool: Value) -> Result<()> {
    let body = json!({ "pool": pool });
    let answer = stack.ams.call(Method::PATCH, "/1.0/applications/pattern", Some(body)).await?.expect(202)?;
    stack.operation(&answer).await
}

/// Waits until exactly one instance waits, ready; its id.
async fn waiting(stack: &Stack) -> Result<String> {
    until("one instance waits", BOOT, || async {
        let list = stack.ams.get("/1.0/instances?recursion=1").await?.expect(200)?;
        let all = list.metadata().as_array().context("a list")?.clone();
        let waiting: Vec<&Value> = all.iter().filter(|one| one["pool"] == "waiting").collect();
        Ok(match waiting[..] {
            [one] if one["status"] == "running" => one["id"].as_str().map(str::to_owned),
            _ => None,
        })
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_waiting_instance_is_claimed_by_a_session_and_by_a_launch_and_streams() -> Result<()> {
    let stack = Stack::start(&[pattern()], &[]).await?;
    let mut old = String::new();
    for start in ["streamer", "application"] {
        set_pool(&stack, json!({ "size": 1, "start": start })).await?;
        // One of the other kind is replaced first.
        let one = until("the pool is of this kind", BOOT, || async {
            Ok(Some(waiting(&stack).await?).filter(|one| *one != old))
        })
        .await?;
        let runs = stack.processes_of(&one).iter().any(|process| process.name == "fanlight-patter");
        ensure!(runs == (start == "application"), "its application runs: {runs}");

        let asked = Instant::now();
        let (session, url) =
            stack.create("pattern", json!({ "screen": { "width": 1024, "height": 578 } })).await?;
        let client = Client::connect(&stack.gateway, &url, Habits::default()).await?;
        client.streaming().await?;
        println!("from the create to a picture with start {start}: {:?}", asked.elapsed());
        ensure!(stack.instance(&session).await? == one, "the session has an instance of its own");
        client.more_frames(10).await?;
        // Nothing of the session is where the application could read it.
        let shown = stack.ams.get(&format!("/1.0/instances/{one}")).await?.expect(200)?;
        let shown = shown.metadata();
        ensure!(shown["pool"].is_null() && shown["config"]["display"]["width"] == 1024, "{shown}");

        old = waiting(&stack).await?;
        ensure!(old != one, "the pool is filled again");
        client.leave().await?;
        stack.gateway.delete(&format!("/1.0/sessions/{session}")).await?.expect(200)?;
        stack.session_is_gone(&session).await?;
    }

    // A launch through AMS gets one too, with a session that the agent makes.
    let one = waiting(&stack).await?;
    let body = json!({ "app_id": "pattern", "config": { "enable_streaming": true } });
    let answer = stack.ams.post("/1.0/instances", body).await?.expect(202)?;
    ensure!(answer.text.contains(&one), "the operation names another instance: {}", answer.text);
    stack.operation(&answer).await.context("launching")?;
    let shown = stack.ams.get(&format!("/1.0/instances/{one}")).await?.expect(200)?;
    ensure!(shown.text.contains("session="), "{}", shown.text);
    stack
        .ams
        .call(Method::DELETE, &format!("/1.0/instances/{one}"), Some(json!({ "force": true })))
        .await?
        .expect(202)?;

    set_pool(&stack, json!({ "size": 0 })).await?;
    stack.no_instances().await?;
    until("their processes have ended", SOON, || async {
        Ok(stack.processes_of(&one).is_empty().then_some(()))
    })
    .await?;
    stack.end().await
}
