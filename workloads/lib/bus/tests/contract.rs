//! What every bus does, tried on the in-process bus and on a real `nats-server`; and what only a bus with a server
//! can get wrong. Fails where there is no `nats-server`.

mod server;

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use fanlight_bus::{Bus, BusConfig, MAX_PAYLOAD_BYTES, Message, QUEUE_MESSAGES, RequestError, Subscription};
use server::Server;

const PATIENCE: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(200);

/// Two participants of one bus.
struct Pair {
    here: Bus,
    there: Bus,
    _server: Option<Server>,
}

async fn pair(nats: bool) -> Pair {
    if !nats {
        let bus = Bus::local();
        return Pair { here: bus.clone(), there: bus, _server: None };
    }
    let server = Server::start(&[]);
    let (here, there) = (connect(&server).await, connect(&server).await);
    Pair { here, there, _server: Some(server) }
}

async fn connect(server: &Server) -> Bus {
    let bus = Bus::connect(&BusConfig::at(server.url())).await.expect("the configuration is fine");
    until_connected(&bus, true).await;
    bus
}

async fn until_connected(bus: &Bus, wanted: bool) {
    let mut connected = bus.connected();
    tokio::time::timeout(PATIENCE, connected.wait_for(|connected| *connected == wanted))
        .await
        .unwrap_or_else(|_| panic!("connected does not become {wanted}"))
        .expect("the bus lives");
}

async fn next(subscription: &mut Subscription) -> Message {
    tokio::time::timeout(PATIENCE, subscription.next())
        .await
        .expect("a message comes")
        .expect("the bus lives")
}

/// How often a request was answered, or a message arrived.
type Count = Arc<AtomicUsize>;

/// Waits until each of these has grown.
async fn until_grown(what: &str, counts: &[Count], by: usize) {
    let goals: Vec<usize> = counts.iter().map(|count| count.load(Ordering::SeqCst) + by).collect();
    let grown = async {
        while counts.iter().zip(&goals).any(|(count, goal)| count.load(Ordering::SeqCst) < *goal) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, grown).await.unwrap_or_else(|_| panic!("{what}"));
}

fn text(message: &Message) -> String {
    String::from_utf8(message.payload.to_vec()).expect("text")
}

async fn settle(bus: &Bus) {
    assert!(bus.flush(PATIENCE).await);
}

macro_rules! contract {
    ($($name:ident),* $(,)?) => {
        mod in_process {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() { super::$name(super::pair(false).await).await; })*
        }
        mod nats_server {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() { super::$name(super::pair(true).await).await; })*
        }
    };
}

contract!(
    every_subscriber_gets_every_message_in_order,
    wildcards_take_what_they_name,
    each_message_goes_to_one_member_of_a_group,
    requests_are_answered_or_fail_by_name,
    a_slow_subscriber_loses_messages_and_holds_nobody_up,
    a_dropped_subscription_gets_nothing_more,
    a_service_answers_many_at_a_time,
    what_cannot_be_sent_is_lost_and_counted,
);

async fn every_subscriber_gets_every_message_in_order(pair: Pair) {
    let mut first = pair.there.subscribe("a.b").await.expect("subscribed");
    let mut second = pair.there.subscribe("a.b").await.expect("subscribed");
    settle(&pair.there).await;
    for n in 0..100 {
        pair.here.publish("a.b", n.to_string());
    }
    for subscription in [&mut first, &mut second] {
        for n in 0..100 {
            let message = next(subscription).await;
            assert_eq!((message.subject.as_str(), text(&message)), ("a.b", n.to_string()));
        }
    }
}

async fn wildcards_take_what_they_name(pair: Pair) {
    let mut one = pair.there.subscribe("sessions.*.up").await.expect("subscribed");
    let mut all = pair.there.subscribe("sessions.>").await.expect("subscribed");
    settle(&pair.there).await;
    for subject in ["sessions.s1.up", "sessions.s1.down", "sessions.s1.up.more", "sessions", "sessions.s2.up"]
    {
        pair.here.publish(subject, "x");
    }
    assert_eq!(next(&mut one).await.subject, "sessions.s1.up");
    assert_eq!(next(&mut one).await.subject, "sessions.s2.up");
    for expected in ["sessions.s1.up", "sessions.s1.down", "sessions.s1.up.more", "sessions.s2.up"] {
        assert_eq!(next(&mut all).await.subject, expected);
    }
    for bad in ["", "a..b", "a b", "a.>.b", "a.b\r\nPUB c 0"] {
        assert!(pair.there.subscribe(bad).await.is_err(), "{bad:?}");
    }
}

async fn each_message_goes_to_one_member_of_a_group(pair: Pair) {
    let (sender, mut got) = tokio::sync::mpsc::unbounded_channel();
    for member in 0..3 {
        let mut subscription = pair.there.queue_subscribe("work", "group").await.expect("subscribed");
        let sender = sender.clone();
        tokio::spawn(async move {
            while let Some(message) = subscription.next().await {
                let _ = sender.send((member, text(&message)));
            }
        });
    }
    settle(&pair.there).await;
    for n in 0..90 {
        pair.here.publish("work", n.to_string());
    }
    let (mut members, mut texts) = (BTreeSet::new(), BTreeSet::new());
    for _ in 0..90 {
        let (member, text) = tokio::time::timeout(PATIENCE, got.recv()).await.expect("comes").expect("open");
        members.insert(member);
        assert!(texts.insert(text), "no message came twice");
    }
    assert_eq!(members.len(), 3, "everybody got some");
}

async fn requests_are_answered_or_fail_by_name(pair: Pair) {
    let error = pair.here.request("nobody", "x", PATIENCE).await.expect_err("nobody is there");
    assert!(matches!(error, RequestError::NoResponders(_)), "{error:?}");
    let mut silent = pair.there.subscribe("silent").await.expect("subscribed");
    let serving = pair
        .there
        .serve("echo", "group", |message: Message| async move { message.respond(message.payload.clone()) })
        .await
        .expect("served");
    settle(&pair.there).await;
    let answer = pair.here.request("echo", "hello", PATIENCE).await.expect("answered");
    assert_eq!(answer, "hello");
    let error = pair.here.request("silent", "x", SHORT).await.expect_err("no answer");
    assert!(matches!(error, RequestError::TimedOut { .. }), "{error:?}");
    // An answer that is too late goes nowhere.
    next(&mut silent).await.respond("late");
    assert_eq!(pair.here.request("echo", "again", PATIENCE).await.expect("answered"), "again");
    for bad in ["", "a.*", "a b"] {
        let error = pair.here.request(bad, "x", PATIENCE).await.expect_err("invalid");
        assert!(matches!(error, RequestError::Subject(_)), "{error:?}");
    }
    let error =
        pair.here.request("echo", vec![0; MAX_PAYLOAD_BYTES + 1], PATIENCE).await.expect_err("too large");
    assert!(matches!(error, RequestError::TooLarge { .. }), "{error:?}");
    let error =
        pair.here.request_json::<_, u32>("echo", "no number", PATIENCE).await.expect_err("another type");
    assert!(matches!(error, RequestError::Codec { .. }), "{error:?}");
    drop(serving);
    // The end of a subscription reaches the server a moment later.
    let gone = async {
        while !matches!(pair.here.request("echo", "x", SHORT).await, Err(RequestError::NoResponders(_))) {}
    };
    tokio::time::timeout(PATIENCE, gone).await.expect("the service ends with its handle");
}

async fn a_slow_subscriber_loses_messages_and_holds_nobody_up(pair: Pair) {
    let mut slow = pair.there.subscribe("flood").await.expect("subscribed");
    let mut quick = pair.there.subscribe("flood").await.expect("subscribed");
    settle(&pair.there).await;
    let rounds = 3 * QUEUE_MESSAGES;
    for n in 0..rounds {
        pair.here.publish("flood", n.to_string());
        if n % 256 == 255 {
            settle(&pair.here).await;
            for expected in n - 255..=n {
                assert_eq!(text(&next(&mut quick).await), expected.to_string());
            }
        }
    }
    let lost = async {
        while pair.there.lost() == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, lost).await.expect("losses are counted");
    assert_eq!(text(&next(&mut slow).await), "0", "what it has is the beginning");
    let mut kept = 1;
    while let Ok(Some(_)) = tokio::time::timeout(SHORT, slow.next()).await {
        kept += 1;
    }
    assert!(kept <= QUEUE_MESSAGES + 1, "{kept} messages were kept");
    pair.here.publish("flood", "after");
    assert_eq!(text(&next(&mut slow).await), "after", "a subscriber recovers");
}

async fn a_dropped_subscription_gets_nothing_more(pair: Pair) {
    let dropped = pair.there.queue_subscribe("a", "group").await.expect("subscribed");
    let mut kept = pair.there.queue_subscribe("a", "group").await.expect("subscribed");
    drop(dropped);
    settle(&pair.there).await;
    // The client library ends a subscription from a task of its own; what goes there until then is lost, which is
    // within the rules of the bus.
    let arrived = async {
        let mut in_a_row = 0;
        while in_a_row < 10 {
            pair.here.publish("a", "x");
            match tokio::time::timeout(SHORT, kept.next()).await {
                Ok(Some(_)) => in_a_row += 1,
                _ => in_a_row = 0,
            }
        }
    };
    tokio::time::timeout(PATIENCE, arrived).await.expect("all messages go to who is left");
}

async fn a_service_answers_many_at_a_time(pair: Pair) {
    let together = Arc::new(AtomicUsize::new(0));
    let barrier = Arc::new(tokio::sync::Barrier::new(20));
    let seen = together.clone();
    let _serving = pair
        .there
        .serve_json("add", "group", move |(a, b): (u32, u32)| {
            let (barrier, seen) = (barrier.clone(), seen.clone());
            async move {
                // All twenty must be there at the same time for any to go on.
                barrier.wait().await;
                seen.fetch_add(1, Ordering::SeqCst);
                a + b
            }
        })
        .await
        .expect("served");
    settle(&pair.there).await;
    pair.here.publish("add", "what is not JSON is not answered");
    let requests = (0..20).map(|n| {
        let bus = pair.here.clone();
        async move {
            let sum: u32 = bus.request_json("add", &(n, 1), PATIENCE).await.expect("answered");
            assert_eq!(sum, n + 1);
        }
    });
    futures_util::future::join_all(requests).await;
    assert_eq!(together.load(Ordering::SeqCst), 20);
}

async fn what_cannot_be_sent_is_lost_and_counted(pair: Pair) {
    // Not `>`: that shows what the library sends to itself as well.
    let mut all = pair.there.subscribe("*").await.expect("subscribed");
    settle(&pair.there).await;
    let before = pair.here.lost();
    pair.here.publish("a.*", "x");
    pair.here.publish("a\r\nPUB b 0\r\n", "x");
    pair.here.publish("a", vec![0; MAX_PAYLOAD_BYTES + 1]);
    pair.here.publish("a", vec![0; MAX_PAYLOAD_BYTES]);
    assert_eq!(next(&mut all).await.payload.len(), MAX_PAYLOAD_BYTES);
    assert_eq!(pair.here.lost() - before, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bus_survives_the_end_and_the_return_of_its_server() {
    let mut server = Server::start(&[]);
    let (here, there) = (connect(&server).await, connect(&server).await);
    let mut subscription = there.subscribe("a").await.expect("subscribed");
    let _serving = there
        .serve("echo", "group", |message: Message| async move { message.respond(message.payload.clone()) })
        .await
        .expect("served");
    for round in 0..2 {
        settle(&there).await;
        here.publish("a", format!("before {round}"));
        assert_eq!(text(&next(&mut subscription).await), format!("before {round}"));
        server.kill();
        until_connected(&here, false).await;
        until_connected(&there, false).await;
        let before = here.lost();
        for _ in 0..3 * QUEUE_MESSAGES {
            here.publish("a", "into the void");
        }
        let lost = async {
            while here.lost() < before + 3 * QUEUE_MESSAGES as u64 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, lost).await.expect("lost at once, not kept");
        let error = here.request("echo", "x", SHORT).await.expect_err("no server");
        assert!(matches!(error, RequestError::NotConnected { .. }), "{error:?}");
        server.restart();
        until_connected(&here, true).await;
        until_connected(&there, true).await;
        settle(&there).await;
        let answer = here.request("echo", "back", PATIENCE).await.expect("services are back");
        assert_eq!(answer, "back");
        here.publish("a", format!("after {round}"));
        assert_eq!(text(&next(&mut subscription).await), format!("after {round}"), "nothing old arrives");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bus_can_be_started_before_its_server() {
    let mut server = Server::prepare(&[]);
    let bus = Bus::connect(&BusConfig::at(server.url())).await.expect("no server is no error");
    assert!(!*bus.connected().borrow());
    let mut subscription = bus.subscribe("a").await.expect("subscribed ahead");
    server.restart();
    until_connected(&bus, true).await;
    settle(&bus).await;
    bus.publish("a", "x");
    assert_eq!(text(&next(&mut subscription).await), "x");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_with_tokens_or_passwords_takes_who_has_the_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("secret");
    std::fs::write(&file, "hunter2\n").expect("written");
    let wrong = folder.path().join("wrong");
    std::fs::write(&wrong, "hunter3\n").expect("written");
    let by_token = Server::start(&["--auth", "hunter2"]);
    let by_password = Server::start(&["--user", "me", "--pass", "hunter2"]);
    let token = BusConfig { token_file: file.clone(), ..BusConfig::at(by_token.url()) };
    let password =
        BusConfig { user: "me".into(), password_file: file.clone(), ..BusConfig::at(by_password.url()) };
    for config in [token, password] {
        let bus = Bus::connect(&config).await.expect("connects");
        until_connected(&bus, true).await;
        settle(&bus).await;
    }
    for config in [
        BusConfig { token_file: wrong.clone(), ..BusConfig::at(by_token.url()) },
        BusConfig { user: "me".into(), password_file: wrong, ..BusConfig::at(by_password.url()) },
        BusConfig::at(by_token.url()),
    ] {
        let bus = Bus::connect(&config).await.expect("the server may change its mind");
        assert!(!bus.flush(SHORT).await);
        let error = bus.request("a", "x", SHORT).await.expect_err("not let in");
        assert!(!error.to_string().contains("hunter"), "{error}");
    }
    let missing = BusConfig { token_file: "/none/secret".into(), ..BusConfig::at(by_token.url()) };
    let error = Bus::connect(&missing).await.err().expect("no file").to_string();
    assert!(error.contains("/none/secret"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_with_tls_takes_who_has_a_certificate_of_its_authority() {
    let folder = tempfile::tempdir().expect("a folder");
    let files = server::certificates(folder.path());
    let path = |name: &str| folder.path().join(name);
    let server = Server::start(&[
        "--tlsverify",
        "--tlscert",
        &files.server_certificate,
        "--tlskey",
        &files.server_key,
        "--tlscacert",
        &files.ca,
    ]);
    let url = server.url().replace("nats://", "tls://");
    let good = BusConfig {
        ca: path("ca.pem"),
        certificate: path("client.pem"),
        key: path("client.key"),
        ..BusConfig::at(url.clone())
    };
    let bus = Bus::connect(&good).await.expect("connects");
    until_connected(&bus, true).await;
    settle(&bus).await;
    let without = BusConfig { ca: path("ca.pem"), ..BusConfig::at(url.clone()) };
    let foreign = BusConfig { ca: path("other-ca.pem"), ..good.clone() };
    let stranger = BusConfig { certificate: path("stranger.pem"), key: path("stranger.key"), ..good.clone() };
    for config in [without, foreign, stranger] {
        let bus = Bus::connect(&config).await.expect("looked for until it works");
        assert!(!bus.flush(SHORT).await, "{config:?}");
    }
    let missing = BusConfig { ca: "/none/ca.pem".into(), ..good };
    let error = Bus::connect(&missing).await.err().expect("no file").to_string();
    assert!(error.contains("/none/ca.pem"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_is_a_login_where_the_server_takes_it_for_one() {
    let folder = tempfile::tempdir().expect("a folder");
    server::certificates(folder.path());
    let path = |name: &str| folder.path().join(name);
    let at = folder.path().display();
    let settings = path("server.conf");
    let text = format!(
        r#"
            tls {{
                cert_file: "{at}/server.pem", key_file: "{at}/server.key", ca_file: "{at}/ca.pem"
                verify_and_map: true
            }}
            authorization {{ users: [ {{ user: "CN=client" }} ] }}
        "#
    );
    std::fs::write(&settings, text).expect("written");
    let server = Server::start(&["--config", settings.to_str().expect("text")]);
    let url = server.url().replace("nats://", "tls://");
    let config = |name: &str| BusConfig {
        ca: path("ca.pem"),
        certificate: path(&format!("{name}.pem")),
        key: path(&format!("{name}.key")),
        ..BusConfig::at(url.clone())
    };
    let bus = Bus::connect(&config("client")).await.expect("connects");
    until_connected(&bus, true).await;
    settle(&bus).await;
    for name in ["guest", "stranger"] {
        let bus = Bus::connect(&config(name)).await.expect("the server may change its mind");
        assert!(!bus.flush(SHORT).await, "{name} is let in");
        let error = bus.request("a", "x", SHORT).await.expect_err("not let in");
        assert!(matches!(error, RequestError::NotConnected { .. }), "{name}: {error:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bus_of_three_servers_survives_the_loss_of_each() {
    let folder = tempfile::tempdir().expect("a folder");
    server::certificates(folder.path());
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("password"), "hunter2\n").expect("written");
    let mut servers = server::cluster(folder.path(), 3);
    let urls: Vec<String> = servers.iter().map(|server| server.url().replace("nats://", "tls://")).collect();
    let config = |urls: &[String]| BusConfig {
        user: "me".into(),
        password_file: path("password"),
        ca: path("ca.pem"),
        certificate: path("client.pem"),
        key: path("client.key"),
        ..BusConfig::at(urls.join(","))
    };
    let mut buses = Vec::new();
    for _ in 0..6 {
        let bus = Bus::connect(&config(&urls)).await.expect("connects");
        until_connected(&bus, true).await;
        buses.push(bus);
    }
    // Each does everything, so that wherever one is connected, all of it is hit by the end of a server.
    let mut serving = Vec::new();
    let (mut answered, mut arrived): (Vec<Count>, Vec<Count>) = (Vec::new(), Vec::new());
    for bus in &buses {
        let echo = |message: Message| async move { message.respond(message.payload.clone()) };
        serving.push(bus.serve("echo", "group", echo).await.expect("served"));
        let count = Count::default();
        arrived.push(count.clone());
        let mut subscription = bus.subscribe("news").await.expect("subscribed");
        tokio::spawn(async move {
            while subscription.next().await.is_some() {
                count.fetch_add(1, Ordering::SeqCst);
            }
        });
        settle(bus).await;
    }
    for (n, bus) in buses.iter().enumerate() {
        let count = Count::default();
        answered.push(count.clone());
        let bus = bus.clone();
        tokio::spawn(async move {
            for round in 0.. {
                let text = format!("{n} {round}");
                // What is lost is asked again, as everybody on this bus does.
                if let Ok(answer) = bus.request("echo", text.clone(), 5 * SHORT).await {
                    assert_eq!(answer, text, "the answer to something else");
                    count.fetch_add(1, Ordering::SeqCst);
                }
                bus.publish("news", text);
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
    }
    until_grown("requests are answered", &answered, 20).await;
    until_grown("news arrive", &arrived, 20).await;
    for server in 0..3 {
        servers[server].kill();
        until_grown("requests go on without a server", &answered, 50).await;
        until_grown("subscriptions survive a server", &arrived, 50).await;
        servers[server].restart();
        // One that knows this server only is answered by those at the others again.
        let returned = Bus::connect(&config(&urls[server..=server])).await.expect("connects");
        until_connected(&returned, true).await;
        let back = async { while returned.request("echo", "back", SHORT).await.is_err() {} };
        tokio::time::timeout(PATIENCE, back).await.expect("it belongs to the cluster again");
    }
    until_grown("requests are answered at last", &answered, 20).await;
    until_grown("news arrive at last", &arrived, 20).await;
    for bus in &buses {
        assert!(*bus.connected().borrow());
    }
}
