//! What a session is there for: start, stream, drive, leave, come back, take over, end.

use anyhow::{Context, Result, ensure};
use fanlight_tests_stack::{
    BOOT, SOON,
    client::{Client, Habits},
    stack::{Stack, pattern},
    until,
};
use serde_json::json;

#[tokio::test(flavor = "multi_thread")]
async fn a_session_streams_is_driven_left_joined_taken_over_and_ended() -> Result<()> {
    let stack = Stack::start(&[pattern()], &[]).await?;

    // Picture, sound and the control channel.
    let (session, url) = stack.create("pattern", json!({})).await?;
    let client = Client::connect(&stack.gateway, &url, Habits::default()).await?;
    let seen = client.streaming().await?;
    ensure!(seen.video.codec == "video/h264", "the codec is {}", seen.video.codec);
    let begin = seen.video.timestamp;
    let later = client.more_frames(60).await?;
    ensure!(later.video.timestamp.wrapping_sub(begin) < 90_000 * 20, "the video's clock runs with time");
    client.wait("sound", SOON, |seen| seen.audio_packets > 50).await?;
    let found = stack.session_is(&session, "active", BOOT).await?;
    ensure!(found["app"] == "pattern" && found["joinable"] == true, "{found}");
    let instance = found["container_id"].as_str().context("the session names no instance")?.to_owned();
    client.key(4).await?;
    client.leave().await?;

    // The session outlives its client; the next one finds the same instance.
    let url = stack.join(&session).await?;
    let client = Client::connect(&stack.gateway, &url, Habits::default()).await?;
    client.streaming().await?;
    client.more_frames(10).await?;
    ensure!(stack.instance(&session).await? == instance, "the instance is another one");

    // The newest client takes over; the one before is ended at once.
    let url = stack.join(&session).await?;
    let newer = Client::connect(&stack.gateway, &url, Habits::default()).await?;
    newer.streaming().await?;
    client.ended(SOON).await?;
    newer.more_frames(10).await?;

    // The end reaches the client, and everything goes.
    stack.gateway.delete(&format!("/1.0/sessions/{session}")).await?.expect(200)?;
    newer.ended(SOON).await?;
    stack.session_is_gone(&session).await?;
    stack.no_instances().await?;
    until("its processes have ended", SOON, || async {
        Ok(stack.processes_of(&instance).is_empty().then_some(()))
    })
    .await?;
    stack.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_cannot_be_joined_ends_with_its_client() -> Result<()> {
    let stack = Stack::start(&[pattern()], &[]).await?;
    let (session, url) = stack.create("pattern", json!({ "joinable": false, "idle_time_min": 0 })).await?;
    let client = Client::connect(&stack.gateway, &url, Habits::default()).await?;
    client.streaming().await?;
    client.leave().await?;
    stack.session_is_gone(&session).await?;
    stack.no_instances().await?;
    stack.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_made_by_ams_has_a_session_that_can_be_joined_again_and_again() -> Result<()> {
    let stack = Stack::start(&[pattern()], &[]).await?;
    let body = json!({ "app_id": "pattern", "config": { "enable_streaming": true } });
    let answer = stack.ams.post("/1.0/instances", body).await?.expect(202)?;
    stack.operation(&answer).await.context("launching")?;
    let list = stack.ams.get("/1.0/instances?recursion=1").await?.expect(200)?;
    let instance = &list.metadata()[0];
    let session = instance["tags"]
        .as_array()
        .and_then(|tags| {
            tags.iter().find_map(|tag| tag.as_str()?.strip_prefix("session=").map(str::to_owned))
        })
        .with_context(|| format!("no session among the tags: {}", list.text))?;
    for _ in 0..2 {
        let url = stack.join(&session).await?;
        let client = Client::connect(&stack.gateway, &url, Habits::default()).await?;
        client.streaming().await?;
        client.more_frames(5).await?;
        client.leave().await?;
    }
    let id = instance["id"].as_str().context("no id")?;
    shares(&stack, id, &session).await.context("sharing it")?;
    stack
        .ams
        .call(reqwest::Method::DELETE, &format!("/1.0/instances/{id}"), Some(json!({})))
        .await?
        .expect(202)?;
    stack.session_is_gone(&session).await?;
    stack.no_instances().await?;
    stack.end().await
}

/// A share of an instance is made by AMS at the gateway, changed there and taken back.
async fn shares(stack: &Stack, instance: &str, session: &str) -> Result<()> {
    use reqwest::Method;
    let path = format!("/1.0/instances/{instance}/shares");
    let made =
        stack.ams.post(&path, json!({ "type": "adb", "description": "for Eva" })).await?.expect(200)?;
    let made = made.metadata().clone();
    ensure!(made["metadata"]["id"] == made["id"] && made["type"] == "adb", "{made}");
    let url = made["url"].as_str().context("no url")?;
    ensure!(url.contains(&format!("/1.0/sessions/{session}/connect?type=adb&token=")), "{url}");
    let share = made["id"].as_str().context("no id")?;
    let listed = stack.gateway.get("/1.0/shares").await?.expect(200)?;
    ensure!(listed.metadata()[0] == share, "{}", listed.text);
    let one = format!("{path}/{share}");
    stack.ams.call(Method::PATCH, &one, Some(json!({ "description": "for Max" }))).await?.expect(200)?;
    let shown = stack.gateway.get(&format!("/1.0/shares/{share}")).await?.expect(200)?;
    ensure!(shown.metadata()["description"] == "for Max", "{}", shown.text);
    stack.ams.post(&path, json!({ "type": "video" })).await?.expect(400)?;
    stack.ams.call(Method::DELETE, &one, None).await?.expect(202)?;
    stack.ams.call(Method::DELETE, &one, None).await?.expect(404)?;
    stack.gateway.get(&format!("/1.0/shares/{share}")).await?.expect(404)?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_stack_works_as_separate_programs_over_a_real_nats_server() -> Result<()> {
    let stack = Stack::start(&[pattern()], &["--separate"]).await?;
    let (session, url) = stack.create("pattern", json!({})).await?;
    let client = Client::connect(&stack.gateway, &url, Habits::default()).await?;
    client.streaming().await?;
    client.more_frames(30).await?;
    client.leave().await?;
    stack.gateway.delete(&format!("/1.0/sessions/{session}")).await?.expect(200)?;
    stack.session_is_gone(&session).await?;
    stack.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_keeps_its_socket_wants_no_sound_and_has_own_channels_is_served() -> Result<()> {
    let stack = Stack::start(&[pattern()], &[]).await?;
    let (_, url) = stack
        .create("pattern", json!({ "screen": { "width": 641, "height": 481, "fps": 30, "density": 96 } }))
        .await?;
    let habits = Habits {
        speaker: false,
        channels: vec!["fanlight", "other"],
        closes_socket: false,
        ..Habits::default()
    };
    let client = Client::connect(&stack.gateway, &url, habits).await?;
    let seen = client.streaming().await?;
    ensure!(!seen.offer.contains("m=audio"), "sound was offered to a client that wants none");
    client.wait("our own channel", SOON, |seen| seen.open.iter().any(|label| label == "fanlight")).await?;
    client.more_frames(20).await?;
    ensure!(client.seen().audio_packets == 0, "sound came to a client that wants none");
    stack.end().await
}
