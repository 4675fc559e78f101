//! Several units of everything: any one of them may be killed at any moment, and may be restarted in good order, while
//! streams go on and work is taken by the others.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use fanlight_tests_stack::{
    BOOT, SOON,
    client::Habits,
    cluster::{CELLS, Cluster, ETCD, GATEWAYS, NATS, Plan, Stream, member_of, wish},
    rest::Server,
    simulated::{APPLICATION, Simulated},
    stack::{Application, application},
    until,
};
use serde_json::{Value, json};
use tokio::sync::watch;

const EAST: [f64; 2] = [35.7, 139.7];
const WEST: [f64; 2] = [37.8, -122.4];

/// The pattern that moves, without a tone: these tests have no time for sound.
fn silent_pattern() -> Application {
    application("pattern", ["fanlight-pattern"])
}

/// The same as seen through another gateway: only the authority is another one.
fn through(url: &str, gateway: &str) -> Result<String> {
    let (_, rest) = url.split_once("://").context("an address without a scheme")?;
    let (_, path) = rest.split_once('/').context("an address without a path")?;
    let (_, authority) = gateway.split_once("://").context("a gateway without a scheme")?;
    Ok(format!("wss://{authority}/{path}"))
}

/// What callers of the API were told.
#[derive(Default)]
struct Told {
    /// Sessions that were acknowledged, and are to be there.
    kept: BTreeSet<String>,
    /// Sessions whose end was asked for.
    given_up: BTreeSet<String>,
    created: usize,
    refused: usize,
    /// Answers that nobody should get.
    wrong: Vec<String>,
}

/// Callers that make sessions and end them, through whichever gateway answers, while a test does something else.
struct Callers {
    told: Arc<Mutex<Told>>,
    work: watch::Sender<bool>,
    idle: watch::Receiver<bool>,
    task: tokio::task::JoinHandle<()>,
}

impl Callers {
    fn start(gateways: Vec<Server>) -> Self {
        let told = Arc::new(Mutex::new(Told::default()));
        let (work, wanted) = watch::channel(true);
        let (resting, idle) = watch::channel(false);
        let task = tokio::spawn(call(gateways, told.clone(), wanted, resting));
        Self { told, work, idle, task }
    }

    fn told<R>(&self, look: impl FnOnce(&Told) -> R) -> R {
        look(&self.told.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Lets nothing happen any more; returns when nothing is under way.
    async fn rest(&mut self) -> Result<()> {
        self.work.send_replace(false);
        tokio::time::timeout(BOOT, self.idle.wait_for(|idle| *idle)).await.context("callers hang")??;
        Ok(())
    }

    fn go_on(&self) {
        self.work.send_replace(true);
    }
}

impl Drop for Callers {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn call(
    gateways: Vec<Server>,
    told: Arc<Mutex<Told>>,
    mut wanted: watch::Receiver<bool>,
    resting: watch::Sender<bool>,
) {
    let mut mine: Vec<String> = Vec::new();
    for turn in 0.. {
        if !*wanted.borrow() {
            resting.send_replace(true);
            if wanted.wait_for(|wanted| *wanted).await.is_err() {
                return;
            }
            resting.send_replace(false);
        }
        let gateway = &gateways[turn % gateways.len()];
        let created = gateway.post("/1.0/sessions", wish(APPLICATION, &json!({}))).await;
        {
            let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
            match created {
                Ok(answer) if answer.status == 201 => match member_of(&answer, "id") {
                    Ok(id) => {
                        told.created += 1;
                        told.kept.insert(id.clone());
                        mine.push(id);
                    }
                    Err(error) => told.wrong.push(error.to_string()),
                },
                // Nobody answers, or nobody can be asked now.
                Ok(answer) if answer.status == 404 || answer.status >= 500 => told.refused += 1,
                Err(_) => told.refused += 1,
                Ok(answer) => told.wrong.push(format!("{}: {}", answer.status, answer.text)),
            }
        }
        if mine.len() > 5 {
            let id = mine.remove(0);
            {
                let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
                told.kept.remove(&id);
                told.given_up.insert(id.clone());
            }
            let other = &gateways[(turn + 1) % gateways.len()];
            let ended = other.delete(&format!("/1.0/sessions/{id}")).await;
            if let Ok(answer) = ended
                && answer.status != 200
                && answer.status < 500
            {
                let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
                told.wrong.push(format!("ending {id}: {}: {}", answer.status, answer.text));
            }
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Makes a session through whichever gateway takes it, as a client that tries the other one; its id and address.
async fn create_somewhere(cluster: &Cluster, app: &str) -> Result<(String, String)> {
    let mut last = None;
    for gateway in 0..GATEWAYS.len() {
        match cluster.create(gateway, app, json!({})).await {
            Ok(session) => return Ok(session),
            Err(error) => last = Some(error),
        }
    }
    Err(last.context("there are no gateways")?.context("no gateway takes a session"))
}

/// What a cell that is away had to do is done by the other one: real sessions begin there.
async fn elsewhere(cluster: &Cluster, away: &str) -> Result<()> {
    until(&format!("sessions begin elsewhere than in {away}"), SOON, || async {
        let mut regions = Vec::new();
        for gateway in [0, 1, 0] {
            let answer = cluster.ask(gateway, "pattern", json!({})).await?.expect(201)?;
            cluster.delete(gateway, &member_of(&answer, "id")?).await?;
            regions.push(member_of(&answer, "region")?);
        }
        Ok(regions.iter().all(|region| region != away).then_some(()))
    })
    .await
}

async fn two_cells() -> Result<Cluster> {
    let plan = Plan { cells: 2, applications: &[silent_pattern()], clocks: &[] };
    Cluster::start(plan).await
}

#[tokio::test(flavor = "multi_thread")]
async fn each_part_is_killed_in_turn_and_no_session_is_lost_and_no_stream_stops() -> Result<()> {
    let mut cluster = two_cells().await?;
    let east = cluster.simulate("agent-east", "east", EAST).await?;
    let west = cluster.simulate("agent-west", "west", WEST).await?;
    let simulated = [&east, &west];
    let mut kept = BTreeSet::new();
    let mut streams = Vec::new();
    for (number, cell) in CELLS.into_iter().enumerate() {
        let (session, url) = cluster.create(number, "pattern", json!({ "region": cell })).await?;
        // One client stays on its signalling socket, which ends with its gateway; the stream must not.
        let habits = Habits { closes_socket: number == 0, ..Habits::default() };
        streams.push((session.clone(), Stream::open(&cluster.gateways[number], &url, habits).await?));
        kept.insert(session);
    }
    for number in 0..50 {
        kept.insert(cluster.create(number % GATEWAYS.len(), APPLICATION, json!({})).await?.0);
    }
    cluster.agree(&simulated, &kept).await?;

    let mut callers = Callers::start(cluster.gateways.clone());
    let agents = CELLS.map(|cell| format!("agent-{cell}"));
    let ams = CELLS.map(|cell| format!("ams-{cell}"));
    let parts = GATEWAYS.into_iter().chain(NATS).chain(ETCD);
    let parts = parts.chain(agents.iter().map(String::as_str)).chain(ams.iter().map(String::as_str));
    for victim in parts {
        let step = async {
            cluster.kill(victim).await?;
            // Whoever is left goes on, without waiting for the one that is away.
            let before = callers.told(|told| told.created);
            until("sessions are made while it is away", SOON, || async {
                Ok((callers.told(|told| told.created) >= before + 3).then_some(()))
            })
            .await?;
            for (number, server) in cluster.gateways.iter().enumerate() {
                if GATEWAYS[number] != victim {
                    until("a gateway lists sessions", SOON, || async {
                        server.get("/1.0/sessions").await?.expect(200).map(Some)
                    })
                    .await?;
                }
            }
            for (_, stream) in &streams {
                stream.goes_on().await?;
            }
            if let Some(cell) = CELLS.into_iter().find(|cell| victim.ends_with(cell)) {
                elsewhere(&cluster, cell).await?;
            }
            cluster.start_again(victim).await?;
            callers.rest().await?;
            let kept: BTreeSet<String> = callers.told(|told| told.kept.union(&kept).cloned().collect());
            cluster.agree(&simulated, &kept).await?;
            callers.go_on();
            for (_, stream) in &streams {
                stream.goes_on().await?;
            }
            anyhow::Ok(())
        };
        step.await.with_context(|| format!("{victim} was killed"))?;
    }
    callers.rest().await?;
    callers.told(|told| {
        ensure!(told.wrong.is_empty(), "callers got {:#?}", told.wrong);
        eprintln!("{} sessions were made and {} refused meanwhile", told.created, told.refused);
        Ok(())
    })?;
    // The streams are still those of the first second; and whoever comes anew finds the way through either gateway.
    for (number, (session, stream)) in streams.into_iter().enumerate() {
        stream.goes_on().await?;
        let gateway = 1 - number;
        let url = cluster.join(gateway, &session).await?;
        let next = Stream::open(&cluster.gateways[gateway], &url, Habits::default()).await?;
        stream.ended().await?;
        next.goes_on().await?;
    }
    cluster.end(&simulated).await
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_reach_their_session_through_any_unit_and_the_newest_takes_over() -> Result<()> {
    let cluster = two_cells().await?;
    let east = cluster.simulate("agent-east", "east", EAST).await?;
    let (session, url) = cluster.create(0, "pattern", json!({})).await?;
    // The socket of a session of the first gateway, opened at the second.
    let second = &cluster.gateways[1];
    let url = through(&url, second.url())?;
    let habits = Habits { closes_socket: false, ..Habits::default() };
    let first_client = Stream::open(second, &url, habits.clone()).await?;
    first_client.goes_on().await?;
    let instance = cluster.instance(&session).await?;

    // Who comes through the first gateway takes over from who came through the second, who is told why.
    let url = cluster.join(0, &session).await?;
    let next = Stream::open(&cluster.gateways[0], &url, habits.clone()).await?;
    let seen = first_client.client().wait("the socket is closed", SOON, |seen| seen.socket_closed).await?;
    ensure!(!seen.errors.is_empty(), "nobody said why: {:?}", seen.signals);
    first_client.ended().await?;
    next.goes_on().await?;

    // And back; the address was made by the first gateway again.
    let url = through(&cluster.join(0, &session).await?, second.url())?;
    let newest = Stream::open(second, &url, habits).await?;
    next.ended().await?;
    newest.goes_on().await?;
    ensure!(cluster.instance(&session).await? == instance, "the instance is another one");
    cluster.agree(&[&east], &BTreeSet::from([session.clone()])).await?;

    // Its end, asked of either, reaches it.
    cluster.delete(0, &session).await?;
    newest.ended().await?;
    cluster.end(&[&east]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rolling_restart_of_all_gateways_loses_no_session_and_cuts_no_stream() -> Result<()> {
    let mut cluster = two_cells().await?;
    let east = cluster.simulate("agent-east", "east", EAST).await?;
    let mut kept = BTreeSet::new();
    let mut streams = Vec::new();
    for gateway in 0..GATEWAYS.len() {
        let (session, url) = cluster.create(gateway, "pattern", json!({})).await?;
        let habits = Habits { closes_socket: false, ..Habits::default() };
        streams.push(Stream::open(&cluster.gateways[gateway], &url, habits).await?);
        kept.insert(session);
    }
    for _ in 0..5 {
        kept.insert(create_somewhere(&cluster, APPLICATION).await?.0);
    }
    for (number, unit) in GATEWAYS.into_iter().enumerate() {
        cluster.terminate(unit).await?;
        let seen = streams[number].client().wait("the socket is closed", SOON, |seen| seen.socket_closed);
        let seen = seen.await.with_context(|| format!("{unit} went down"))?;
        ensure!(!seen.errors.is_empty(), "{unit} left without a word: {:?}", seen.signals);
        for _ in 0..5 {
            kept.insert(create_somewhere(&cluster, APPLICATION).await?.0);
        }
        for stream in &streams {
            stream.goes_on().await?;
        }
        cluster.start_again(unit).await?;
        for _ in 0..5 {
            kept.insert(create_somewhere(&cluster, APPLICATION).await?.0);
        }
    }
    cluster.agree(&[&east], &kept).await?;
    ensure!(east.sessions().len() == 25 && kept.len() == 27, "{} of {}", east.sessions().len(), kept.len());
    for stream in &streams {
        stream.goes_on().await?;
    }
    cluster.end(&[&east]).await
}

/// Sends the same request to both gateways at once, again and again, until both have acknowledged it; the one session.
async fn create_once(cluster: &Cluster, app: &str, key: &str) -> Result<String> {
    let body = wish(app, &json!({}));
    until(&format!("both gateways acknowledge {key}"), BOOT, || async {
        let [first, second] = [0, 1].map(|gateway| {
            let (server, body) = (&cluster.gateways[gateway], body.clone());
            async move { server.post_once("/1.0/sessions", body, key).await?.expect(201) }
        });
        let (first, second) = tokio::join!(first, second);
        let (first, second) = (member_of(&first?, "id")?, member_of(&second?, "id")?);
        ensure!(first == second, "{key} made two sessions: {first} and {second}");
        Ok(Some(first))
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_that_is_repeated_through_both_units_and_over_a_kill_is_one_session() -> Result<()> {
    let mut cluster = two_cells().await?;
    let east = cluster.simulate("agent-east", "east", EAST).await?;
    let west = cluster.simulate("agent-west", "west", WEST).await?;
    // Both at once, while nothing goes wrong: one answer may be that the other is at work.
    let mut sessions = BTreeSet::from([create_once(&cluster, "pattern", "real").await?]);
    for number in 0..5 {
        sessions.insert(create_once(&cluster, APPLICATION, &format!("quiet-{number}")).await?);
    }
    // A gateway is killed in the middle of many; what it acknowledged is what the repeats say.
    for (round, victim) in GATEWAYS.into_iter().enumerate() {
        let servers = cluster.gateways.clone();
        let keys: Vec<String> = (0..20).map(|number| format!("round-{round}-{number}")).collect();
        let mut asked = tokio::task::JoinSet::new();
        for (key, server) in keys.iter().flat_map(|key| servers.iter().map(move |server| (key, server))) {
            let (key, server) = (key.clone(), server.clone());
            asked.spawn(async move {
                let body = wish(APPLICATION, &json!({}));
                let answer = server.post_once("/1.0/sessions", body, &key).await.ok()?;
                (answer.status == 201).then(|| Some((key, member_of(&answer, "id").ok()?)))?
            });
        }
        tokio::time::sleep(Duration::from_millis(30 + 40 * round as u64)).await;
        cluster.kill(victim).await?;
        let first: Vec<(String, String)> = asked.join_all().await.into_iter().flatten().collect();
        cluster.start_again(victim).await?;
        for key in &keys {
            let session = create_once(&cluster, APPLICATION, key).await?;
            for (_, told) in first.iter().filter(|(known, _)| known == key) {
                ensure!(*told == session, "{key} was {told}, and is {session}");
            }
            sessions.insert(session);
        }
    }
    ensure!(sessions.len() == 46, "46 keys made {} sessions", sessions.len());
    cluster.agree(&[&east, &west], &sessions).await?;
    let all: BTreeSet<String> = cluster.sessions(0).await?.into_keys().collect();
    ensure!(all == sessions, "more sessions than keys: {all:?}");
    let simulated = east.sessions().len() + west.sessions().len();
    ensure!(simulated == 45, "{simulated} instances for 45 simulated sessions");
    cluster.end(&[&east, &west]).await
}

async fn regions_of(cluster: &Cluster, count: usize, more: Value) -> Result<Vec<String>> {
    let mut regions = Vec::new();
    for number in 0..count {
        let answer = cluster.ask(number % GATEWAYS.len(), APPLICATION, more.clone()).await?.expect(201)?;
        regions.push(member_of(&answer, "region")?);
    }
    Ok(regions)
}

#[tokio::test(flavor = "multi_thread")]
async fn equal_clusters_share_and_region_and_location_choose() -> Result<()> {
    let plan = Plan { cells: 0, applications: &[], clocks: &[] };
    let cluster = Cluster::start(plan).await?;
    let east = cluster.simulate("agent-east", "east", EAST).await?;
    let west = cluster.simulate("agent-west", "west", WEST).await?;
    regions_of(&cluster, 40, json!({})).await?;
    let shares: Vec<usize> = [&east, &west].map(Simulated::made).into();
    ensure!(shares.iter().sum::<usize>() == 40, "{shares:?}");
    // Fair draws give one of them less than eight of forty once in thirty thousand runs.
    ensure!(shares.iter().all(|share| *share >= 8), "{shares:?}");

    for (wanted, more) in [
        ("east", json!({ "region": "east" })),
        ("west", json!({ "region": "west" })),
        // Osaka and Seattle.
        ("east", json!({ "location": { "latitude": 34.7, "longitude": 135.5 } })),
        ("west", json!({ "location": { "latitude": 47.6, "longitude": -122.3 } })),
        // What was measured counts more than where somebody is.
        (
            "west",
            json!({ "location": { "latitude": 34.7, "longitude": 135.5 }, "round_trips": { "east": 90.0, "west": 20.0 } }),
        ),
    ] {
        let regions = regions_of(&cluster, 6, more.clone()).await?;
        ensure!(regions.iter().all(|region| region == wanted), "{more}: {regions:?}");
    }
    let answer = cluster.ask(0, APPLICATION, json!({ "region": "south" })).await?.refused(404)?;
    ensure!(answer.error().contains("south"), "{}", answer.text);
    cluster.end(&[&east, &west]).await
}
