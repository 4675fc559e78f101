//! The real streamer program, with a real application, against an agent and clients that share no code with it
//! beyond the wire types.

mod agent;
mod client;

use std::{
    os::unix::net::UnixDatagram,
    process::Stdio,
    time::{Duration, Instant},
};

use fanlight_api::{agent_link::ClientState, guest::EndReason, link::Frame};
use serde_json::json;
use tokio::{io::AsyncWriteExt as _, process::Child};

use crate::{
    agent::Agent,
    client::{Client, was_told},
};

/// A dark terminal without decoration or blinking.
const TERMINAL: [&str; 5] =
    ["foot", "--config=/dev/null", "--override=colors.background=101010", "--font=monospace:size=14", "sh"];

/// A running streamer.
struct Streamer {
    child: Child,
    folder: tempfile::TempDir,
    notify: UnixDatagram,
    news: String,
}

impl Streamer {
    async fn start(agent: Option<&Agent>, application: serde_json::Value) -> Self {
        let streaming = agent.map(|agent| {
            json!({"session_id": agent.session_id, "agent_url": agent.url, "token": agent.token,
                "fingerprint": agent.fingerprint, "joinable": true, "idle_time_min": 0})
        });
        let guest = json!({"version": 1, "instance_id": "test", "application": application,
            "display": {"width": 800, "height": 600, "fps": 60, "density": 96}, "streaming": streaming});
        Self::start_with(&guest.to_string()).await
    }

    async fn start_with(guest: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("notify");
        let notify = UnixDatagram::bind(&path).expect("a socket");
        notify.set_nonblocking(true).expect("a flag");
        let mut child = tokio::process::Command::new(env!("CARGO_BIN_EXE_fanlight-streamer"))
            .arg("run")
            .env("NOTIFY_SOCKET", &path)
            .env("XDG_RUNTIME_DIR", folder.path())
            .env("HOME", folder.path())
            .env("FANLIGHT_LOG_DIR", folder.path())
            .env("FANLIGHT_LOG", "info,fanlight_streamer=debug")
            .stdin(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("the streamer starts");
        let mut stdin = child.stdin.take().expect("a pipe");
        stdin.write_all(guest.as_bytes()).await.expect("the streamer reads");
        drop(stdin);
        Self { child, folder, notify, news: String::new() }
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid =
            self.child.id().and_then(|pid| rustix::process::Pid::from_raw(pid as i32)).expect("it runs");
        rustix::process::kill_process(pid, signal).expect("it can be told");
    }

    fn read_news(&mut self) {
        let mut buffer = [0; 8192];
        while let Ok(length) = self.notify.recv(&mut buffer) {
            self.news.push_str(&String::from_utf8_lossy(&buffer[..length]));
        }
    }

    /// The supervisor's view of the end: exit status, reason and words.
    async fn ended(&mut self) -> (i32, Option<(EndReason, String)>) {
        let status = tokio::time::timeout(Duration::from_secs(20), self.child.wait()).await;
        let status = status.expect("it ends").expect("a status").code().expect("no signal");
        self.read_news();
        let result = self.news.lines().find_map(|line| line.strip_prefix("X_FANLIGHT_RESULT="));
        let ended = result.map(|text| {
            let ended: fanlight_api::guest::Ended = serde_json::from_str(text).expect("a result");
            (ended.reason, ended.message)
        });
        (status, ended)
    }

    async fn ready(&mut self) {
        let end = Instant::now() + Duration::from_secs(15);
        while !self.news.contains("READY=1") {
            assert!(Instant::now() < end, "ready within 15 s");
            tokio::time::sleep(Duration::from_millis(10)).await;
            self.read_news();
        }
    }
}

fn terminal() -> serde_json::Value {
    json!({"name": "terminal", "command": TERMINAL})
}

async fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < end, "{what} within 10 s");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_sees_the_terminal_types_leaves_and_joins_again() {
    let mut agent = Agent::start().await;
    let mut streamer = Streamer::start(Some(&agent), terminal()).await;
    streamer.ready().await;
    let mut client = Client::join(&mut agent, 1, Some((1024, 578))).await;
    client.watch().await;
    client.settle(Duration::from_millis(500)).await;
    assert_eq!(client.picture.as_ref().map(|(width, height, _)| (*width, *height)), Some((1024, 578)));
    let before = client.bright();
    assert!(before > 0, "there is a prompt");
    for code in [4, 5, 6, 7, 8] {
        client.key(code);
    }
    assert!(client.run_until(Duration::from_secs(5), |client| client.bright() > before + 100).await, "typed");

    client.tell(&json!({"type": "first-frame", "ms": 12.5}));
    client.tell(&json!({"type": "ping", "t": 7.0}));
    let pong =
        |client: &Client| client.notices.iter().any(|notice| notice["type"] == "pong" && notice["t"] == 7.0);
    assert!(client.run_until(Duration::from_secs(5), pong).await, "an answer to the ping");
    let host = |client: &Client| client.notices.iter().any(|notice| notice["type"] == "host-stats");
    let mut keys = 0;
    while !host(&client) {
        keys += 1;
        assert!(keys < 100, "statistics while frames flow");
        client.key(9);
        client.run_until(Duration::from_millis(50), host).await;
    }
    assert!(client.notices.iter().any(|notice| notice["type"] == "cursor"));
    {
        let status = agent.status.borrow().clone();
        assert!(status.ready);
        assert_eq!(status.client.map(|client| client.state), Some(ClientState::Streaming));
        assert_eq!(*agent.steps.borrow(), ["signalled", "ice", "dtls", "first-frame"]);
    }

    client.settle(Duration::from_millis(500)).await;
    let typed = client.bright();
    client.send(&json!({"type": "stream::disconnect", "data": {}}));
    assert!(client.run_until(Duration::from_secs(3), |client| client.ended).await, "the end is seen at once");
    let status = agent.status.clone();
    until("nobody is connected", || status.borrow().client.is_none()).await;
    assert!(agent.status.borrow().idle_since.is_some());

    let mut again = Client::join(&mut agent, 2, None).await;
    again.watch().await;
    // This client never says that it sees something, so it gets a second key frame 1.5 s after it has connected.
    again.settle(Duration::from_millis(1800)).await;
    assert!(again.bright() > typed / 2, "what was typed is still there");

    // An idle screen sends nothing.
    let still = again.pictures;
    again.run_until(Duration::from_secs(2), |_| false).await;
    assert_eq!(again.pictures, still);

    streamer.signal(rustix::process::Signal::TERM);
    assert!(again.run_until(Duration::from_secs(3), |client| client.ended).await, "told at once");
    let (status, ended) = streamer.ended().await;
    assert_eq!((status, ended.map(|(reason, _)| reason)), (0, Some(EndReason::Stopped)));
    let status = agent.status.clone();
    until("the agent was told of the end", || status.borrow().ended.is_some()).await;
    let left: Vec<_> = std::fs::read_dir(streamer.folder.path())
        .expect("a folder")
        .flatten()
        .map(|entry| entry.file_name())
        .filter(|name| name.to_string_lossy().starts_with("fanlight-"))
        .collect();
    assert!(left.is_empty(), "the runtime folder is removed: {left:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newer_client_takes_over_and_a_lost_agent_hurts_nobody() {
    let mut agent = Agent::start().await;
    let _streamer = Streamer::start(Some(&agent), terminal()).await;
    let mut first = Client::join(&mut agent, 1, None).await;
    first.watch().await;

    // The stream goes on while the agent is away.
    let connections = *agent.connections.borrow();
    agent.drop_connection();
    first.settle(Duration::from_millis(300)).await;
    let seen = first.pictures;
    first.key(4);
    assert!(first.run_until(Duration::from_secs(5), |client| client.pictures > seen).await, "still streams");
    let counter = agent.connections.clone();
    until("the streamer is back", || *counter.borrow() > connections).await;

    let mut second = Client::join(&mut agent, 2, None).await;
    assert!(first.run_until(Duration::from_secs(3), |client| client.ended).await, "the first is cut at once");
    assert!(was_told(&agent.take_frames(1), 8), "and told why");
    second.watch().await;

    // A client of version 1 offers itself.
    let mut third = Client::offer(&mut agent, 3).await;
    third.watch().await;
    assert!(second.run_until(Duration::from_secs(3), |client| client.ended).await);

    // The end of the session.
    agent.end_stream("session deleted");
    assert!(third.run_until(Duration::from_secs(3), |client| client.ended).await);
    let told = async {
        loop {
            if let Frame::Closed = agent.frame(3).await {
                return;
            }
        }
    };
    told.await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_signalling_is_answered_in_words_and_harms_nobody() {
    let mut agent = Agent::start().await;
    let _streamer = Streamer::start(Some(&agent), terminal()).await;
    let mut client = Client::join(&mut agent, 1, None).await;
    client.watch().await;
    for (generation, message, code, closes) in [
        (2, json!({"type": "dance"}), 5, false),
        (3, json!({"type": "settings", "api_version": 9}), 6, true),
        (4, json!({"type": "offer", "sdp": "AAAA"}), 5, true),
    ] {
        agent.open(generation, None);
        agent.text(generation, &message);
        let error = agent.json(generation).await;
        assert_eq!((&error["type"], &error["code"]), (&json!("error"), &json!(code)), "{message}");
        if closes {
            assert_eq!(agent.frame(generation).await, Frame::Closed);
        }
    }
    // Garbage on the control channel, then a key.
    let mut client = Client::join(&mut agent, 10, None).await;
    client.watch().await;
    for message in [json!({"type": "input::key", "data": {"pressed": true}}), json!([]), json!({"type": "x"})]
    {
        client.send(&message);
    }
    let before = client.bright();
    client.key(4);
    assert!(client.run_until(Duration::from_secs(5), |client| client.bright() > before).await);
    // An answer that is none ends this client, in words.
    agent.open(11, None);
    agent.text(11, &json!({"type": "settings", "api_version": 2, "enable_video": true}));
    assert_eq!(agent.json(11).await["type"], "offer");
    agent.text(11, &json!({"type": "answer", "sdp": "AAAA"}));
    loop {
        let message = agent.json(11).await;
        if message["type"] == "error" {
            assert!(message["message"].as_str().expect("a text").contains("step answer"), "{message}");
            break;
        }
    }
    assert_eq!(agent.frame(11).await, Frame::Closed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sound_of_the_application_is_heard() {
    let mut agent = Agent::start().await;
    let application = json!({"name": "noise", "command": ["foot", "--config=/dev/null", "sh", "-c",
        "while true; do head -c 600000 /dev/urandom | pacat --raw --latency-msec=20; done"]});
    let _streamer = Streamer::start(Some(&agent), application).await;
    let mut client = Client::join(&mut agent, 1, None).await;
    let heard = |client: &Client| client.sounds >= 100;
    assert!(
        client.run_until(Duration::from_secs(20), heard).await,
        "sound within 20 s, heard {}",
        client.sounds
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn applications_that_end_end_the_instance_with_the_reason() {
    let run = |command: serde_json::Value| async move {
        let mut streamer = Streamer::start(None, json!({"name": "demo", "command": command})).await;
        let (status, ended) = streamer.ended().await;
        let (reason, message) = ended.expect("a result");
        (status, reason, message)
    };
    let (status, reason, message) = run(json!(["no-such-program"])).await;
    assert_eq!((status, reason), (70, EndReason::Failed));
    assert!(message.contains("program no-such-program was not found"), "{message}");
    let (status, _, message) = run(json!(["sh", "-c", "exit 3"])).await;
    assert_eq!(status, 70);
    assert!(message.contains("application demo ended with status 3"), "{message}");
    let (status, _, message) = run(json!(["true"])).await;
    assert_eq!(status, 70);
    assert!(message.contains("ended with status 0 before it showed a window"), "{message}");
    let (status, reason, _) = run(json!(["foot", "--config=/dev/null", "sh", "-c", "sleep 1"])).await;
    assert_eq!((status, reason), (0, EndReason::Finished));
    // It forks its real self away and that one ends later.
    let away = "foot --config=/dev/null sh -c 'sleep 2' & sleep 0.2";
    let (status, reason, _) = run(json!(["sh", "-c", away])).await;
    assert_eq!((status, reason), (0, EndReason::Finished));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_guest_file_is_refused_with_its_own_status() {
    for guest in
        ["", "{}", r#"{"version":1,"instance_id":"x","application":{"name":"x","command":[]},"display":{}}"#]
    {
        let mut streamer = Streamer::start_with(guest).await;
        assert_eq!(streamer.ended().await.0, 78, "{guest}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stubborn_and_forked_processes_are_ended_with_the_instance() {
    let marker = format!("{}", 86_400 + std::process::id() % 10_000);
    let script =
        format!("trap '' TERM; setsid sleep {marker} & foot --config=/dev/null sh -c 'sleep {marker}'");
    let mut streamer =
        Streamer::start(None, json!({"name": "stubborn", "command": ["sh", "-c", script]})).await;
    streamer.ready().await;
    streamer.signal(rustix::process::Signal::TERM);
    assert_eq!(streamer.ended().await.0, 0);
    let alive = std::fs::read_dir("/proc").expect("proc").flatten().any(|entry| {
        let line = std::fs::read_to_string(entry.path().join("cmdline")).unwrap_or_default();
        line.starts_with("sleep") && line.contains(&marker)
    });
    assert!(!alive, "no process is left");
}

/// Hands a claim over as AMS does, and gives the answer.
async fn claim(streamer: &Streamer, claim: &serde_json::Value) -> fanlight_api::guest::ClaimAnswer {
    let mut child = tokio::process::Command::new(env!("CARGO_BIN_EXE_fanlight-streamer"))
        .arg("claim")
        .env("XDG_RUNTIME_DIR", streamer.folder.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("it starts");
    let mut stdin = child.stdin.take().expect("a pipe");
    stdin.write_all(claim.to_string().as_bytes()).await.expect("it reads");
    drop(stdin);
    let output = child.wait_with_output().await.expect("it ends");
    let answer: fanlight_api::guest::ClaimAnswer = serde_json::from_slice(&output.stdout).expect("an answer");
    assert_eq!(output.status.success(), answer.ok);
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_instance_that_waits_is_claimed_and_has_its_new_size_before_the_first_frame() {
    for (id, start) in [("early", "application"), ("late", "streamer")] {
        let mut agent = Agent::start().await;
        let guest = |session: Option<(&str, bool)>, width: u32, height: u32| {
            let streaming = session.map(|(session, data)| {
                json!({"session_id": session, "agent_url": agent.url, "token": agent.token,
                    "fingerprint": agent.fingerprint, "joinable": true, "idle_time_min": 0,
                    "extra_data": data.then_some("hello")})
            });
            json!({"version": 1, "instance_id": id, "application": terminal(), "streaming": streaming,
                "display": {"width": width, "height": height, "fps": 60, "density": 96},
                "pool": session.is_none().then_some(start)})
        };
        let session = agent.session_id.to_string();
        let (waiting, wanted) = (guest(None, 800, 600), guest(Some((&session, false)), 1024, 578));
        let (with_data, other) =
            (guest(Some((&session, true)), 1024, 578), guest(Some(("other", false)), 64, 64));

        let mut streamer = Streamer::start_with(&waiting.to_string()).await;
        streamer.ready().await;
        assert_eq!(*agent.connections.borrow(), 0, "it has no session to connect for");
        let mut elsewhere = wanted.clone();
        elsewhere["instance_id"] = json!("nobody");
        assert!(claim(&streamer, &elsewhere).await.error.is_some_and(|error| error.contains("nobody")));
        if start == "application" {
            let error = claim(&streamer, &with_data).await.error.expect("it runs already");
            assert!(error.contains("started already"), "{error}");
        }
        let answer = claim(&streamer, &wanted).await;
        assert!(answer.ok, "{answer:?}");
        assert!(claim(&streamer, &wanted).await.ok, "the same again");
        let error = claim(&streamer, &other).await.error.expect("it is taken");
        assert!(error.contains("another session"), "{error}");

        let mut client = Client::join(&mut agent, 1, None).await;
        client.watch().await;
        assert!(client.run_until(Duration::from_secs(5), |client| client.bright() > 0).await, "a prompt");
        assert_eq!(client.picture.as_ref().map(|(width, height, _)| (*width, *height)), Some((1024, 578)));
        streamer.signal(rustix::process::Signal::TERM);
        assert_eq!(streamer.ended().await.0, 0);
        let log = std::fs::read_dir(streamer.folder.path()).expect("a folder").flatten().any(|entry| {
            std::fs::read(entry.path()).is_ok_and(|text| {
                text.windows(agent.token.len()).any(|window| window == agent.token.as_bytes())
            })
        });
        assert!(!log, "no file has the token");
    }
}
