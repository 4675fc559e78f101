//! Bad input gets a clear error, and loses or leaks nothing.

use anyhow::{Context, Result, bail, ensure};
use fanlight_tests_stack::{
    BOOT, SOON,
    client::{Client, Habits},
    rest::Socket,
    stack::{Stack, pattern},
    until,
};
use futures_util::{SinkExt, StreamExt};
use reqwest::Method;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

/// The next signalling message of a type.
async fn receive(socket: &mut Socket, kind: &str) -> Result<Value> {
    let wait = async {
        while let Some(message) = socket.next().await {
            let Message::Text(text) = message? else { continue };
            let message: Value = serde_json::from_str(&text)?;
            if message["type"] == kind {
                return Ok(message);
            }
            if message["type"] == "error" {
                bail!("instead of {kind}: {message}");
            }
        }
        bail!("the socket was closed before {kind} came")
    };
    tokio::time::timeout(BOOT, wait).await.with_context(|| format!("no {kind} in time"))?
}

async fn say(socket: &mut Socket, message: Value) -> Result<()> {
    Ok(socket.send(Message::text(message.to_string())).await?)
}

/// A socket on which the instance has made its offer.
async fn offered(stack: &Stack, url: &str) -> Result<Socket> {
    let mut socket = stack.gateway.websocket(url).await?.open()?;
    say(&mut socket, json!({ "type": "discover" })).await?;
    receive(&mut socket, "resp:discover").await?;
    say(&mut socket, json!({ "type": "settings", "api_version": 2, "data_channels": [], "enable_speaker": true, "enable_video": true })).await?;
    receive(&mut socket, "offer").await?;
    Ok(socket)
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_make_no_sense_are_refused_by_name() -> Result<()> {
    let stack = Stack::start(&[pattern()], &[]).await?;
    let gateway = &stack.gateway;
    let create = |body: Value| gateway.post("/1.0/sessions", body);

    // Bodies.
    for body in
        ["", "{", "[]", "\"x\"", "{\"app\":", "\u{0}", "{\"app\": 5}", "{\"app\":\"pattern\",\"screen\":7}"]
    {
        gateway
            .send(Method::POST, "/1.0/sessions", Some(body.into()))
            .await?
            .refused(400)
            .with_context(|| format!("{body:?}"))?;
    }
    gateway.send(Method::POST, "/1.0/sessions", Some(vec![0xff, 0xfe, 0x00])).await?.refused(400)?;
    let huge = format!("{{\"app\":\"{}\"}}", "x".repeat(2 << 20));
    gateway.send(Method::POST, "/1.0/sessions", Some(huge.into())).await?.refused(413)?;
    let deep = format!("{{\"app\":\"pattern\",\"extra_data\":{}{}}}", "[".repeat(20_000), "]".repeat(20_000));
    gateway.send(Method::POST, "/1.0/sessions", Some(deep.into())).await?.refused(400)?;

    // Applications and regions.
    let answer = create(json!({ "app": "no-such-application" })).await?.refused(400)?;
    ensure!(answer.error().contains("no-such-application"), "{}", answer.text);
    create(json!({})).await?.refused(400)?;
    create(json!({ "app": "" })).await?.refused(400)?;
    let answer = create(json!({ "app": "pattern", "app_version": 99 })).await?;
    ensure!(
        [400, 404].contains(&answer.status) && !answer.error().is_empty(),
        "version 99: {} {}",
        answer.status,
        answer.text
    );
    let answer = create(json!({ "app": "pattern", "region": "atlantis" })).await?.refused(404)?;
    ensure!(answer.error().contains("atlantis"), "{}", answer.text);

    // Resolutions.
    for (screen, field) in [
        (json!({ "width": 0 }), "width"),
        (json!({ "width": -1280 }), "width"),
        (json!({ "width": 100_000, "height": 100_000 }), "width"),
        (json!({ "width": 9_223_372_036_854_775_807_i64 }), "width"),
        (json!({ "height": 3841 }), "height"),
        (json!({ "width": 3840, "height": 3840 }), "height"),
        (json!({ "fps": 0 }), "fps"),
        (json!({ "fps": 100_000 }), "fps"),
        (json!({ "density": 1 }), "density"),
    ] {
        let answer = create(json!({ "app": "pattern", "screen": screen })).await?.refused(400)?;
        ensure!(answer.error().contains(field), "{screen}: {}", answer.error());
    }
    create(json!({ "app": "pattern", "screen": { "width": "wide" } })).await?.refused(400)?;
    create(json!({ "app": "pattern", "idle_time_min": -5 })).await?.refused(400)?;

    // Paths and methods.
    for path in ["/", "/1.0/nonsense", "/1.0/sessions/x/y/z", "/1.0/sessions/%2e%2e/x", "/2.0/sessions"] {
        gateway.get(path).await?.refused(404).with_context(|| path.to_owned())?;
    }
    gateway.call(Method::PUT, "/1.0/sessions", Some(json!({}))).await?.refused(405)?;
    gateway.get("/1.0/sessions/no-such-session").await?.refused(404)?;
    gateway.delete("/1.0/sessions/no-such-session").await?.refused(404)?;
    gateway.post("/1.0/sessions/no-such-session/join", json!({})).await?.refused(404)?;
    gateway.get("/1.0/sessions?limit=-1").await?.refused(400)?;
    gateway.get("/1.0/sessions?sort_by=colour").await?.refused(400)?;

    // AMS, in its own envelope.
    for (method, path, body, status) in [
        (Method::GET, "/1.0/nonsense", None, 404),
        (Method::POST, "/1.0/instances", Some("{"), 400),
        (Method::POST, "/1.0/instances", Some("{\"app_id\":\"no-such-application\"}"), 404),
        (Method::POST, "/1.0/applications", Some("not an archive"), 400),
        (Method::GET, "/1.0/instances/no-such-instance", None, 404),
    ] {
        let answer = stack.ams.send(method.clone(), path, body.map(Into::into)).await?;
        ensure!(
            answer.status == status && answer.body["type"] == "error" && !answer.error().is_empty(),
            "{method} {path} {body:?}: {} {}",
            answer.status,
            answer.text
        );
    }

    // Nothing of all that made anything.
    let sessions = gateway.get("/1.0/sessions").await?.expect(200)?;
    ensure!(sessions.metadata() == &json!([]), "{}", sessions.text);
    stack.no_instances().await?;
    stack.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_sizes_are_rounded_up_and_served() -> Result<()> {
    let stack = Stack::start(&[pattern()], &[]).await?;
    for (width, height) in [(1, 1), (641, 479), (1081, 1921)] {
        let screen = json!({ "width": width, "height": height });
        let (session, url) = stack.create("pattern", json!({ "screen": screen })).await?;
        let client = Client::connect(&stack.gateway, &url, Habits::default())
            .await
            .with_context(|| screen.to_string())?;
        client.streaming().await.with_context(|| screen.to_string())?;
        client.leave().await?;
        stack.gateway.delete(&format!("/1.0/sessions/{session}")).await?.expect(200)?;
        stack.session_is_gone(&session).await?;
    }
    stack.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_that_are_wrong_foreign_or_used_open_nothing() -> Result<()> {
    let stack = Stack::start(&[pattern()], &[]).await?;
    let good = stack.variables["FANLIGHT_TOKEN"].clone();
    let (session, url) = stack.create("pattern", json!({})).await?;
    let (other, other_url) = stack.create("pattern", json!({})).await?;
    let token_of = |url: &str| {
        url.split_once("token=").map(|(_, token)| token.to_owned()).context("the address has no token")
    };
    let (socket_token, other_token) = (token_of(&url)?, token_of(&other_url)?);

    // The API.
    let mut flipped = good.clone();
    let last = flipped.pop().context("the token is empty")?;
    flipped.push(if last == 'A' { 'B' } else { 'A' });
    let cut = good[..good.len() / 2].to_owned();
    for bad in [
        None,
        Some(""),
        Some("nonsense"),
        Some(flipped.as_str()),
        Some(cut.as_str()),
        Some(&"x".repeat(5000)),
    ] {
        let stranger = stack.gateway.with_token(bad);
        for path in ["/1.0/sessions", "/1.0/applications", &format!("/1.0/sessions/{session}")] {
            stranger.get(path).await?.refused(401).with_context(|| format!("{path} with {:.20?}", bad))?;
        }
        stranger.delete(&format!("/1.0/sessions/{session}")).await?.refused(401)?;
    }
    let wrong_kind = stack.gateway.with_token(Some(&socket_token));
    let answer = wrong_kind.get("/1.0/sessions").await?;
    ensure!([401, 403].contains(&answer.status), "a socket's token got {}", answer.text);

    // Sockets.
    let at = |session: &str, token: &str| {
        let base = url.split_once("/1.0/").map(|(base, _)| base.to_owned()).unwrap_or_default();
        format!("{base}/1.0/sessions/{session}/sockets/slave?token={token}")
    };
    for (address, statuses) in [
        (at(&session, ""), [401, 401]),
        (at(&session, "nonsense"), [401, 403]),
        (at(&session, &good), [401, 403]),
        (at(&session, &other_token), [401, 403]),
        (at("no-such-session", &socket_token), [403, 404]),
    ] {
        let answer = stack.gateway.websocket(&address).await?.refused()?;
        ensure!(
            statuses.contains(&answer.status) && !answer.error().is_empty(),
            "{} {}",
            answer.status,
            answer.text
        );
    }

    // A socket can be opened once.
    let first = stack.gateway.websocket(&url).await?.open()?;
    let answer = stack.gateway.websocket(&url).await?.refused()?;
    ensure!(answer.status == 403, "the second socket got {} {}", answer.status, answer.text);
    drop(first);

    // AMS knows only those whose certificate it trusts.
    let variable = |name: &str| std::path::PathBuf::from(&stack.variables[name]);
    let stranger = fanlight_tests_stack::rest::Server::new(
        &stack.variables["FANLIGHT_AMS_URL"],
        &variable("FANLIGHT_CA"),
        None,
        None,
    )?;
    let answer = stranger.get("/1.0/instances").await?;
    ensure!([401, 403].contains(&answer.status), "AMS told a stranger {}", answer.text);

    for id in [session, other] {
        stack.gateway.delete(&format!("/1.0/sessions/{id}")).await?.expect(200)?;
        stack.session_is_gone(&id).await?;
    }
    stack.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn accounts_end_with_their_time_or_deletion_and_may_do_what_they_are_for() -> Result<()> {
    let stack = Stack::start(&[pattern()], &[]).await?;
    let refused = |token: String, what: &'static str| {
        let server = stack.gateway.with_token(Some(&token));
        async move {
            until(what, SOON, || async {
                let answer = server.get("/1.0/applications").await?;
                Ok((answer.status == 401).then_some(()))
            })
            .await
        }
    };

    let brief = stack.command(&["account", "create"], &["brief", "--expires-in", "1s"]).await?;
    refused(brief, "an expired token is refused").await?;

    let gone = stack.command(&["account", "create"], &["gone"]).await?;
    stack.gateway.with_token(Some(&gone)).get("/1.0/applications").await?.expect(200)?;
    stack.command(&["account", "delete"], &["gone"]).await?;
    refused(gone, "the token of a deleted account is refused").await?;

    // An account that may only launch has its own sessions and sees no others.
    let token = stack.command(&["account", "create"], &["page", "--launch-only"]).await?;
    let page = stack.gateway.with_token(Some(&token));
    let (other, _) = stack.create("pattern", json!({})).await?;
    let created = page.post("/1.0/sessions", json!({ "app": "pattern" })).await?.expect(201)?;
    let own = created.metadata()["id"].as_str().context("no id")?.to_owned();
    let list = page.get("/1.0/sessions").await?.expect(200)?;
    ensure!(list.metadata() == &json!([own]), "it sees {}", list.text);
    let others = format!("/1.0/sessions/{other}");
    for answer in [
        page.get(&others).await?,
        page.delete(&others).await?,
        page.post(&format!("{others}/join"), json!({})).await?,
    ] {
        ensure!([403, 404].contains(&answer.status), "somebody else's session: {}", answer.text);
    }
    stack.session_is(&other, "active", BOOT).await?;
    page.delete(&format!("/1.0/sessions/{own}")).await?.expect(200)?;
    stack.session_is_gone(&own).await?;
    stack.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_and_descriptions_that_make_no_sense_end_one_client_and_nothing_else() -> Result<()> {
    let stack = Stack::start(&[pattern()], &[]).await?;
    let (session, url) = stack.create("pattern", json!({})).await?;
    let first = Client::connect(&stack.gateway, &url, Habits::default()).await?;
    first.streaming().await?;
    first.leave().await?;
    let instance = stack.instance(&session).await?;

    // Frames that are none: told, then closed.
    for frame in [
        Message::binary(vec![0_u8; 100]),
        Message::text("x".repeat(1 << 20)),
        Message::binary(vec![1_u8; 1 << 20]),
    ] {
        let url = stack.join(&session).await?;
        let mut socket = stack.gateway.websocket(&url).await?.open()?;
        // The server may close while we still send.
        let _ = socket.send(frame).await;
        let mut told = false;
        let closed = tokio::time::timeout(SOON, async {
            while let Some(Ok(message)) = socket.next().await {
                told |= message.to_text().is_ok_and(|text| text.contains("\"error\""));
            }
        })
        .await;
        ensure!(closed.is_ok() && told, "told: {told}, closed: {}", closed.is_ok());
    }

    // Texts that are no messages: told or ignored, but the socket serves on or says why it ends.
    let url = stack.join(&session).await?;
    let mut socket = stack.gateway.websocket(&url).await?.open()?;
    for text in ["", "{", "null", "[1,2]", "{\"type\":7}", "{\"type\":\"dance\"}", "\u{0}\u{1}"] {
        socket.send(Message::text(text)).await?;
    }
    drop(socket);

    // Descriptions and candidates.
    for bad in ["", "%%%", "bm90IGFuIHNkcA==", "dj0wDQo=", &"QUJD".repeat(20_000)] {
        let url = stack.join(&session).await?;
        let mut socket = offered(&stack, &url).await?;
        for _ in 0..3 {
            say(
                &mut socket,
                json!({ "type": "candidate", "candidate": bad, "sdpMid": "x", "sdpMLineIndex": 77 }),
            )
            .await?;
        }
        say(&mut socket, json!({ "type": "answer", "sdp": bad })).await?;
        let error = receive(&mut socket, "error").await.with_context(|| format!("answer {:.20?}", bad))?;
        ensure!(error["message"].as_str().is_some_and(|text| !text.is_empty()), "{error}");
    }

    // A client that gets an offer and never answers does not stop the next one.
    let url = stack.join(&session).await?;
    let silent = offered(&stack, &url).await?;
    let url = stack.join(&session).await?;
    let client = Client::connect(&stack.gateway, &url, Habits::default()).await?;
    client.streaming().await?;
    drop(silent);

    // Control messages without sense.
    for text in [
        "",
        "{",
        "null",
        "[]",
        "{\"type\":1}",
        "{\"type\":\"input::key\"}",
        "{\"type\":\"input::key\",\"data\":{\"code\":1e99,\"pressed\":1}}",
        "{\"type\":\"input::mouse-move\",\"data\":{\"x\":1e300,\"y\":-1e300}}",
        "{\"type\":\"input::touch-start\",\"data\":{\"id\":-1}}",
    ] {
        client.control_text(text).await?;
    }
    client.control_text(&"y".repeat(60_000)).await?;
    for slot in 0..50 {
        client.control("input::touch-start", json!({ "id": slot, "x": 5, "y": 5 })).await?;
    }
    client.more_frames(30).await?;
    ensure!(stack.instance(&session).await? == instance, "the instance did not survive");
    client.leave().await?;
    stack.gateway.delete(&format!("/1.0/sessions/{session}")).await?.expect(200)?;
    stack.session_is_gone(&session).await?;
    stack.no_instances().await?;
    stack.end().await
}
