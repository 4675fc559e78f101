//! A whole agent between a made-up AMS, a bus inside the process, and made-up streamers, over real TLS.

mod parts;

use std::{
    net::{SocketAddr, UdpSocket},
    time::{Duration, SystemTime},
};

use fanlight_api::{
    InstanceId, SessionId,
    agent_link::{ClientState, ClientStatus, FunnelStep, StreamerStatus, ToAgent, ToStreamer},
    ams::InstanceStatus,
    bus::{
        AgentRequest, AgentResponse, GatewayRequest, GatewayResponse, InstanceState, Launch, session_down,
        session_up,
    },
    gateway::Screen,
    link::{Frame, Packet, PacketKind, Side},
};
use fanlight_client::ClientError;
use http::{HeaderMap, StatusCode};
use parts::{PATIENCE, Streamer, World, bearer};

fn launch(session: &SessionId, attempt: u32) -> AgentRequest {
    AgentRequest::Accept(Launch {
        session_id: session.clone(),
        attempt,
        app: "terminal".into(),
        app_version: Some(0),
        screen: Screen { width: 800, height: 600, fps: 30, density: 96 },
        joinable: true,
        ephemeral: true,
        idle_time_min: 7,
        extra_data: serde_json::json!({"color": "red"}),
    })
}

fn end(session: &SessionId, force: bool) -> AgentRequest {
    AgentRequest::End { session_id: session.clone(), message: "time is up".into(), force }
}

fn packet(session: &SessionId, from: Side, text: &str) -> Packet {
    Packet {
        version: 1,
        session_id: session.clone(),
        generation: 1,
        from,
        instance_id: None,
        kind: PacketKind::Data { seq: 0, frame: Frame::Text { text: text.into() } },
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_is_launched_streamed_and_ended() {
    let mut world = World::new().await;
    let report = world.until_agent(|_| true).await;
    assert_eq!((report.region.as_str(), report.cluster_id.as_str()), ("here", "cluster-7"));
    assert_eq!(report.applications[0].application.title, "Terminal");
    assert_eq!(report.applications[0].published, Some(0));
    assert_eq!(report.capacity.free_cpus, Some(16.0));

    let session = SessionId::generate();
    for _ in 0..3 {
        let answer = world.ask(&launch(&session, 1)).await;
        assert_eq!(answer, AgentResponse::Accepted { stun_servers: vec![] });
    }
    let streaming = world.streaming(&session).await;
    assert_eq!((streaming.joinable, streaming.idle_time_min), (true, 7));
    assert_eq!(streaming.extra_data["color"], "red");
    assert!(streaming.agent_url.ends_with("/internal/1.0/stream"), "{}", streaming.agent_url);
    {
        let inner = world.ams.inner();
        let (key, post) = &inner.launches[0];
        assert_eq!(*key, format!("{session}/1"));
        assert_eq!((post.app_id.as_str(), post.app_version), ("terminal", Some(0)));
        assert_eq!(post.config.display.width, 800);
        assert!(post.config.enable_streaming && post.tags.contains(&format!("session={session}")));
    }
    let report = world.until_state(&session, InstanceState::Starting).await;
    assert!(!report.streamer_connected);
    assert_eq!(world.ams.inner().launches.len(), 1, "asked three times, launched once");
    world.ams.status(&session, InstanceStatus::Running, "");
    world.until_state(&session, InstanceState::Running).await;

    let mut down = world.bus.subscribe(&session_down(&session)).await.expect("subscribed");
    let mut streamer = Streamer::connect(&streaming, "i1").await;
    let client = ClientStatus { generation: 1, state: ClientState::Streaming };
    let status = StreamerStatus { ready: true, client: Some(client.clone()), ..Default::default() };
    streamer.send(&ToAgent::Status(status)).await;
    let step = FunnelStep { generation: 1, step: "first-frame".into(), duration_ms: 250, message: None };
    streamer.send(&ToAgent::Step(step.clone())).await;
    let report = world.until_session(&session, |report| !report.steps.is_empty()).await;
    assert_eq!((report.streamer_connected, report.client, report.steps), (true, Some(client), vec![step]));

    let from_client = packet(&session, Side::Client, "discover");
    world.bus.publish_json(&session_up(&session), &from_client);
    assert_eq!(streamer.next().await, Some(ToStreamer::Link(from_client)));
    let from_instance = packet(&session, Side::Instance, "settings");
    streamer.send(&ToAgent::Link(from_instance.clone())).await;
    let got = tokio::time::timeout(PATIENCE, down.next()).await.expect("comes").expect("open");
    let of_instance = Packet { instance_id: Some("i1".parse().expect("valid")), ..from_instance };
    assert_eq!(got.json::<Packet>().expect("a packet"), of_instance);

    assert_eq!(
        world.ask(&end(&session, false)).await,
        AgentResponse::Ending { state: InstanceState::Ending }
    );
    assert_eq!(streamer.next().await, Some(ToStreamer::EndStream { message: "time is up".into() }));
    world.until_state(&session, InstanceState::Gone).await;
    assert_eq!(world.ams.inner().deletions, [("i1".to_owned(), false)]);
    assert_eq!(world.ask(&end(&session, false)).await, AgentResponse::Ending { state: InstanceState::Gone });
    let AgentResponse::Refused { code, .. } = world.ask(&launch(&session, 2)).await else {
        panic!("it ended")
    };
    assert_eq!(code, "session-ended");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_launch_whose_answers_are_lost_makes_one_instance() {
    let mut world = World::new().await;
    world.ams.inner().lose_answers = 2;
    let session = SessionId::generate();
    world.ask(&launch(&session, 1)).await;
    world.until_state(&session, InstanceState::Starting).await;
    let retried = async {
        while world.ams.inner().lose_answers > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    // Either the launch is repeated until it is answered, or the list has shown the instance before.
    let _ = tokio::time::timeout(Duration::from_secs(2), retried).await;
    assert_eq!(world.ams.inner().instances.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_ams_refuses_is_told_in_its_words() {
    let mut world = World::new().await;
    world.ams.inner().refuse = Some((400, "argument display is invalid".into()));
    let session = SessionId::generate();
    world.ask(&launch(&session, 1)).await;
    let report = world.until_state(&session, InstanceState::Failed).await;
    assert_eq!(report.message.as_deref(), Some("argument display is invalid"));
    assert_eq!(world.ask(&end(&session, false)).await, AgentResponse::Ending { state: InstanceState::Gone });

    world.ams.inner().refuse = None;
    world.ams.inner().fail = Some("No suitable node to satisfy instance requirement available".into());
    let session = SessionId::generate();
    world.ask(&launch(&session, 1)).await;
    let report = world.until_state(&session, InstanceState::Failed).await;
    assert!(report.message.expect("a text").starts_with("No suitable node"));

    world.ams.inner().fail = None;
    let session = SessionId::generate();
    world.ask(&launch(&session, 1)).await;
    world.until_state(&session, InstanceState::Starting).await;
    world.ams.status(&session, InstanceStatus::Error, "application exited with status 1");
    let report = world.until_state(&session, InstanceState::Failed).await;
    assert_eq!(report.message.as_deref(), Some("application exited with status 1"));
    assert!(world.ams.inner().deletions.is_empty(), "kept for its logs");

    let unknown = AgentRequest::Accept(match launch(&SessionId::generate(), 1) {
        AgentRequest::Accept(launch) => Launch { app: "nothing".into(), ..launch },
        _ => unreachable!("made above"),
    });
    let AgentResponse::Refused { code, message } = world.ask(&unknown).await else { panic!("unknown") };
    assert_eq!(code, "unknown-application");
    assert!(message.contains("nothing"), "{message}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_ams_launches_wait_new_sessions_are_refused_and_nothing_is_declared_gone() {
    let mut world = World::new().await;
    let (running, waiting) = (SessionId::generate(), SessionId::generate());
    world.ask(&launch(&running, 1)).await;
    world.until_state(&running, InstanceState::Starting).await;
    world.ams.status(&running, InstanceStatus::Running, "");
    world.until_state(&running, InstanceState::Running).await;

    world.ams.stop().await;
    // Accepted while the loss was not noticed, or refused because it was; both are fine.
    let early = world.ask(&launch(&waiting, 1)).await;
    world.until_agent(|report| !report.ams_reachable).await;
    let AgentResponse::Refused { code, .. } = world.ask(&launch(&SessionId::generate(), 1)).await else {
        panic!("AMS is away")
    };
    assert_eq!(code, "ams-unreachable");
    assert_eq!(
        world.ask(&end(&running, false)).await,
        AgentResponse::Ending { state: InstanceState::Ending }
    );
    let state = world.until_session(&running, |_| true).await.state;
    assert_ne!(state, InstanceState::Gone, "nobody knows");

    world.ams.restart();
    world.until_agent(|report| report.ams_reachable).await;
    world.until_state(&running, InstanceState::Gone).await;
    if matches!(early, AgentResponse::Accepted { .. }) {
        world.until_state(&waiting, InstanceState::Starting).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_restart_sessions_are_read_from_ams_and_streamers_come_back() {
    let mut world = World::new().await;
    let session = SessionId::generate();
    world.ask(&launch(&session, 1)).await;
    world.until_state(&session, InstanceState::Starting).await;
    world.ams.status(&session, InstanceStatus::Running, "");
    let streaming = world.streaming(&session).await;
    let mut streamer = Streamer::connect(&streaming, "i1").await;
    world.until_session(&session, |report| report.streamer_connected).await;

    world.agent.take().expect("running").stop().await;
    world.until_agent(|report| report.leaving).await;
    assert_eq!(streamer.next().await, None, "closed");
    world.start_agent().await;
    let report = world.until_state(&session, InstanceState::Running).await;
    assert_eq!(report.instance_id, Some("i1".parse::<InstanceId>().expect("valid")));
    let found = async { while !world.report().await.complete {} };
    tokio::time::timeout(PATIENCE, found).await.expect("everything is told");

    // The port is another one here; key and certificate are the same.
    let mut streaming = streaming;
    streaming.agent_url = world.address().replace("https://", "wss://") + "/internal/1.0/stream";
    let _streamer = Streamer::connect(&streaming, "i1").await;
    world.until_session(&session, |report| report.streamer_connected).await;
    world.ask(&launch(&session, 1)).await;
    assert_eq!(world.ams.inner().launches.len(), 1, "not launched again");
    world.ask(&end(&session, true)).await;
    world.until_state(&session, InstanceState::Gone).await;
    assert_eq!(world.ams.inner().deletions, [("i1".to_owned(), true)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn instances_of_ams_get_their_session_from_a_gateway_and_are_never_removed_by_the_agent() {
    let mut world = World::new().await;
    let path = "/internal/1.0/sessions";
    let body = serde_json::json!({"instance_id": "i9", "app": "terminal",
        "display": {"width": 640, "height": 480, "fps": 60, "density": 96}});
    for (certificate, expected) in [
        (None, StatusCode::UNAUTHORIZED),
        (Some("stranger"), StatusCode::FORBIDDEN),
        (Some("ams-client"), StatusCode::SERVICE_UNAVAILABLE),
    ] {
        let (status, answer) = post(&world, certificate, path, &body).await;
        assert_eq!(status, expected, "{certificate:?} {answer}");
        assert_eq!(answer["type"], "error", "in the envelope");
    }
    let session = SessionId::generate();
    let (made, asked) = (session.clone(), std::sync::Arc::new(std::sync::Mutex::new(Vec::new())));
    let log = asked.clone();
    let _gateway = world
        .bus
        .serve_json("gateway.sessions", "gateway", move |request: GatewayRequest| {
            log.lock().expect("whole").push(request.clone());
            let made = made.clone();
            async move {
                match request {
                    GatewayRequest::CreateSession { .. } => {
                        GatewayResponse::Created { session_id: made, joinable: true, idle_time_min: 0 }
                    }
                    GatewayRequest::EndSession { .. } => GatewayResponse::Ended,
                    other => GatewayResponse::Refused {
                        code: "too-many-shares".into(),
                        message: format!("{other:?}"),
                        status: Some(403),
                    },
                }
            }
        })
        .await
        .expect("served");
    let (status, first) = post(&world, Some("ams-client"), path, &body).await;
    assert_eq!(status, StatusCode::OK, "{first}");
    let (_, second) = post(&world, Some("ams-client"), path, &body).await;
    assert_eq!(first, second, "the same instance, the same answer");
    let streaming: fanlight_api::guest::Streaming =
        serde_json::from_value(first["metadata"]["streaming"].clone()).expect("a streaming part");
    assert_eq!((&streaming.session_id, streaming.idle_time_min), (&session, 0));
    let GatewayRequest::CreateSession { instance_id, region, cluster_id, .. } =
        asked.lock().expect("whole")[0].clone()
    else {
        panic!("a session is asked for")
    };
    assert_eq!((instance_id.as_str(), region.as_str(), cluster_id.as_str()), ("i9", "here", "cluster-7"));

    world.ams.set("i9", session.as_str(), InstanceStatus::Running, false);
    world.until_state(&session, InstanceState::Running).await;
    let mut other = Streamer::connect(&streaming, "i8").await;
    assert_eq!(other.next().await, None, "the token is for i9 alone");
    let _streamer = Streamer::connect(&streaming, "i9").await;
    world.until_session(&session, |report| report.streamer_connected).await;

    world.ams.set("i9", session.as_str(), InstanceStatus::Stopped, false);
    world.until_state(&session, InstanceState::Stopped).await;
    let shares = format!("{path}/{session}/shares");
    let (status, answer) =
        post(&world, Some("ams-client"), &shares, &serde_json::json!({"type": "adb", "expiry_min": 5})).await;
    let text = answer["error"].as_str().unwrap_or_default();
    assert_eq!(
        (status, text.contains("the gateway refused: CreateShare")),
        (StatusCode::FORBIDDEN, true),
        "{answer}"
    );
    let (status, _) = post(&world, None, &shares, &serde_json::json!({"type": "adb"})).await;
    assert_eq!(status, StatusCode::UNAUTHORIZED);
    let (status, answer) = delete(&world, &format!("{shares}/s-1")).await;
    assert_eq!(status, StatusCode::FORBIDDEN, "{answer}");
    let (status, _) = delete(&world, &format!("{path}/{session}")).await;
    assert_eq!(status, StatusCode::OK);
    assert!(matches!(asked.lock().expect("whole").last(), Some(GatewayRequest::EndSession { .. })));
    assert!(world.ams.inner().deletions.is_empty());

    for bad in [serde_json::json!({}), serde_json::json!({"instance_id": "a/b", "display": body["display"]})]
    {
        let (status, answer) = post(&world, Some("ams-client"), path, &bad).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{answer}");
    }
    let (status, answer) = delete(&world, &format!("{path}/a%2Fb")).await;
    assert_eq!((status, answer["type"].as_str()), (StatusCode::BAD_REQUEST, Some("error")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streamers_without_a_valid_token_are_turned_away_and_garbage_ends_nothing() {
    let mut world = World::new().await;
    let path = "/internal/1.0/stream";
    let endpoint = world.endpoint(None);
    for (headers, expected) in [
        (HeaderMap::new(), StatusCode::UNAUTHORIZED),
        (bearer("nonsense"), StatusCode::FORBIDDEN),
        (bearer("e30.AAAA"), StatusCode::FORBIDDEN),
    ] {
        let error = endpoint.websocket(path, headers).await.err().expect("refused");
        assert_eq!(error.status(), Some(expected), "{error}");
        assert!(!error.code().is_empty(), "in the envelope: {error:?}");
    }
    let session = SessionId::generate();
    world.ask(&launch(&session, 1)).await;
    let streaming = world.streaming(&session).await;
    let mut foreign = streaming.clone();
    foreign.session_id = SessionId::generate();
    assert_eq!(Streamer::connect(&foreign, "i1").await.next().await, None, "a token of another session");

    let mut first = Streamer::connect(&streaming, "i1").await;
    world.until_session(&session, |report| report.streamer_connected).await;
    let mut second = Streamer::connect(&streaming, "i1").await;
    assert_eq!(first.next().await, None, "the newer connection takes over");

    let other = SessionId::generate();
    let mut foreign_down = world.bus.subscribe(&session_down(&other)).await.expect("subscribed");
    let mut own_down = world.bus.subscribe(&session_down(&session)).await.expect("subscribed");
    second.send_text("{".into()).await;
    second.send_text("x".repeat(300 * 1024)).await;
    second.send(&ToAgent::Link(packet(&other, Side::Instance, "x"))).await;
    second.send(&ToAgent::Link(packet(&session, Side::Client, "x"))).await;
    world.bus.publish(&session_up(&session), "garbage");
    world.bus.publish_json(&session_up(&session), &packet(&session, Side::Instance, "my own"));
    world.bus.publish_json(&session_up(&session), &packet(&session, Side::Client, "good"));
    assert_eq!(second.next().await, Some(ToStreamer::Link(packet(&session, Side::Client, "good"))));
    let good = packet(&session, Side::Instance, "good");
    second.send(&ToAgent::Link(good.clone())).await;
    let got = tokio::time::timeout(PATIENCE, own_down.next()).await.expect("comes").expect("open");
    let good = Packet { instance_id: Some("i1".parse().expect("valid")), ..good };
    assert_eq!(got.json::<Packet>().expect("a packet"), good, "and nothing before it");
    let nothing = tokio::time::timeout(Duration::from_millis(100), foreign_down.next()).await;
    assert!(nothing.is_err(), "nobody speaks for another session");
    let report = world.until_session(&session, |report| report.streamer_connected).await;
    assert_eq!(report.session_id, session);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_are_told_of_turn_servers_with_credentials_of_their_session_and_instances_of_none() {
    let mut world = World::without_agent().await;
    let secret = world.folder.path().join("turn-secret");
    std::fs::write(&secret, "north").expect("written");
    let coturn = ["turn:turn.example.org:3478?transport=tcp", "turn:turn.example.org:3478"].map(String::from);
    let (file, urls) = (secret.clone(), coturn.to_vec());
    world
        .start_agent_with(|config| {
            config.stun.urls = vec!["stun:stun.example.org:3478".into()];
            config.turn.urls = urls;
            config.turn.secret_file = file;
            config.turn.ttl = Duration::from_secs(600);
            config.turn.listen = "127.0.0.1:0".into();
        })
        .await;
    let report = world.until_agent(|report| report.ams_reachable).await;
    assert!(report.sent_ms > 0);
    let [stun, embedded, measured] = &report.stun_urls[..] else { panic!("{:?}", report.stun_urls) };
    assert_eq!(
        (stun.as_str(), measured.as_str()),
        ("stun:stun.example.org:3478", "stun:turn.example.org:3478")
    );
    let embedded: SocketAddr = embedded.strip_prefix("stun:").expect("STUN").parse().expect("an address");

    let session = SessionId::generate();
    let AgentResponse::Accepted { stun_servers: first } = world.ask(&launch(&session, 1)).await else {
        panic!("accepted")
    };
    assert_eq!(first[0].urls, ["stun:stun.example.org:3478"]);
    assert_eq!(first[1].urls, [format!("turn:{embedded}?transport=udp")]);
    assert_eq!(first[2].urls, coturn);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_secs();
    for server in &first[1..] {
        let username = server.username.as_deref().expect("with a user");
        let (expires_at, of) = username.split_once(':').expect("expiry and session");
        assert_eq!(of, session.as_str());
        let left = expires_at.parse::<u64>().expect("a time").saturating_sub(now);
        assert!((500..=700).contains(&left), "the time that is configured: {left}");
    }
    assert_eq!(first[1].password, first[2].password, "one secret for both");
    // Another client of the session; another session.
    let of = async |session: &SessionId| match world
        .ask(&AgentRequest::Credentials { session_id: session.clone() })
        .await
    {
        AgentResponse::Accepted { stun_servers } => stun_servers,
        other => panic!("{other:?}"),
    };
    assert_eq!(of(&session).await.len(), 3);
    let other = of(&SessionId::generate()).await;
    assert_ne!((&other[1].username, &other[1].password), (&first[1].username, &first[1].password));
    // The instance needs none: it is no client of TURN.
    let streaming = serde_json::to_string(&world.streaming(&session).await).expect("JSON");
    assert!(!streaming.contains("turn:") && !streaming.contains("stun:"), "{streaming}");
    // Without the secret there are no credentials, and no entries that would need them.
    std::fs::remove_file(&secret).expect("there");
    assert_eq!(of(&session).await, first[..1]);
    // The port is the agent's, and it gives it back.
    assert!(UdpSocket::bind(embedded).is_err());
    world.agent.take().expect("runs").stop().await;
    UdpSocket::bind(embedded).expect("free again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_turn_port_that_is_in_use_is_named() {
    let taken = UdpSocket::bind("127.0.0.1:0").expect("bound");
    let address = taken.local_addr().expect("bound");
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name);
    let mut config = fanlight_agent::Config {
        listen: "127.0.0.1:0".parse().expect("valid"),
        token_key: path("token.key"),
        ..Default::default()
    };
    (config.tls.certificate, config.tls.key) = (path("agent.crt"), path("agent.key"));
    config.ams.socket = path("ams.sock");
    config.turn.listen = address.to_string();
    let error = fanlight_agent::start(config, fanlight_agent::Parts::default()).await.err().expect("in use");
    assert!(error.to_string().contains(&format!("turn.listen {address}")), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deletion_that_does_nothing_is_repeated() {
    let mut world = World::new().await;
    let session = SessionId::generate();
    world.ask(&launch(&session, 1)).await;
    world.until_state(&session, InstanceState::Starting).await;
    world.ams.inner().keep_deleted = true;
    world.ask(&end(&session, false)).await;
    let repeated = async {
        while world.ams.inner().deletions.len() < 2 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, repeated).await.expect("asked again");
    world.ams.inner().keep_deleted = false;
    world.until_state(&session, InstanceState::Gone).await;
}

async fn post(
    world: &World,
    certificate: Option<&str>,
    path: &str,
    body: &serde_json::Value,
) -> (StatusCode, serde_json::Value) {
    answer(world.endpoint(certificate).raw(http::Method::POST, path, Some(body)).await)
}

async fn delete(world: &World, path: &str) -> (StatusCode, serde_json::Value) {
    answer(world.endpoint(Some("ams-client")).raw(http::Method::DELETE, path, None).await)
}

fn answer(result: Result<(StatusCode, bytes::Bytes), ClientError>) -> (StatusCode, serde_json::Value) {
    let (status, body) = result.expect("answered");
    (status, serde_json::from_slice(&body).expect("JSON"))
}
