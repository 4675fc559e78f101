//! What it means when a part is away, hangs, or has a wrong clock: one test for each row of the table in
//! docs/explanation/failure.md, with the same words. Each outage is longer than any lease, and no stream may notice it.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, ensure};
use fanlight_tests_stack::{
    BOOT, SOON,
    client::Habits,
    cluster::{Cluster, ETCD, GATEWAYS, NATS, Plan, Stream},
    rest::Answer,
    simulated::{APPLICATION, Simulated},
    stack::{Application, application},
    until,
};
use serde_json::json;
use tokio::time::{Instant, sleep_until};

/// How long each outage lasts at least: leases of units end after 9 s, agents count as silent after 10 s, and a session
/// that complete reports lack for 8 s has vanished.
const OUTAGE: Duration = Duration::from_secs(16);
const EAST: [f64; 2] = [35.7, 139.7];
const AGENT: &str = "agent-north";
const AMS: &str = "ams-north";

fn silent_pattern() -> Application {
    application("pattern", ["fanlight-pattern"])
}

/// Checks that an answer is the refusal that the table tells of: its status, its code, and words of its text.
fn refused(answer: Answer, status: u16, code: &str, words: &str) -> Result<()> {
    let answer = answer.refused(status)?;
    ensure!(answer.metadata()["code"] == code, "the code is not {code}: {}", answer.text);
    ensure!(answer.error().contains(words), "{words:?} is missing in {}", answer.text);
    Ok(())
}

/// A cluster with a cell and a simulated one, a session in each, and a stream of the real one.
struct Scene {
    cluster: Cluster,
    simulated: Simulated,
    session: String,
    /// The session of the simulated cell.
    other: String,
    instance: String,
    stream: Stream,
}

impl Scene {
    async fn start(clocks: &[&str]) -> Result<Self> {
        let plan = Plan { cells: 1, applications: &[silent_pattern()], clocks };
        let cluster = Cluster::start(plan).await?;
        let simulated = cluster.simulate("agent-east", "east", EAST).await?;
        let (session, url) = cluster.create(0, "pattern", json!({})).await?;
        let habits = Habits { closes_socket: false, ..Habits::default() };
        let stream = Stream::open(&cluster.gateways[0], &url, habits).await?;
        let instance = cluster.instance(&session).await?;
        let (other, _) = cluster.create(1, APPLICATION, json!({})).await?;
        cluster.instance(&other).await?;
        Ok(Self { cluster, simulated, session, other, instance, stream })
    }

    async fn join(&self, gateway: usize, session: &str) -> Result<Answer> {
        let path = format!("/1.0/sessions/{session}/join");
        self.cluster.gateways[gateway].post(&path, json!({})).await
    }

    async fn show(&self, gateway: usize, session: &str) -> Result<Answer> {
        self.cluster.gateways[gateway].get(&format!("/1.0/sessions/{session}")).await
    }

    async fn ask_to_end(&self, gateway: usize, session: &str) -> Result<Answer> {
        self.cluster.gateways[gateway].delete(&format!("/1.0/sessions/{session}")).await
    }

    /// Waits until the outage has lasted long enough; the stream goes on all the while.
    async fn lasts(&self, since: Instant) -> Result<()> {
        self.stream.goes_on().await?;
        sleep_until(since + OUTAGE).await;
        self.stream.goes_on().await
    }

    /// Waits until a session is refused because there is no agent for it, with these words.
    async fn until_nobody_takes(&self, app: &str, words: &str) -> Result<()> {
        until(words, SOON, || async {
            refused(self.cluster.ask(0, app, json!({})).await?, 404, "no-agent", words).map(Some)
        })
        .await
    }

    /// After an outage everything is as before: the same session with the same instance and the stream of the first
    /// second; sessions are made again, and a new client comes through each gateway.
    async fn heals(mut self, gone: &[&str]) -> Result<()> {
        let mut kept = BTreeSet::from([self.session.clone(), self.other.clone()]);
        for gone in gone {
            kept.remove(*gone);
        }
        for gateway in 0..GATEWAYS.len() {
            let made = until("sessions are made again", BOOT, || async {
                Ok(Some(self.cluster.create(gateway, APPLICATION, json!({})).await?.0))
            })
            .await?;
            kept.insert(made);
        }
        self.cluster.agree(&[&self.simulated], &kept).await?;
        let all: BTreeMap<_, _> = self.cluster.sessions(0).await?;
        for gone in gone {
            ensure!(!all.contains_key(*gone), "session {gone} was ended, and is there");
        }
        self.stream.goes_on().await?;
        for gateway in 0..GATEWAYS.len() {
            let url = until("the session is joined", SOON, || async {
                self.cluster.join(gateway, &self.session).await.map(Some)
            })
            .await?;
            let habits = Habits { boot: SOON, ..Habits::default() };
            let next = Stream::open(&self.cluster.gateways[gateway], &url, habits).await?;
            std::mem::replace(&mut self.stream, next).ended().await?;
        }
        self.stream.goes_on().await?;
        ensure!(self.cluster.instance(&self.session).await? == self.instance, "the instance is another one");
        self.cluster.end(&[&self.simulated]).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_nats_nothing_new_begins_and_everything_else_goes_on() -> Result<()> {
    let mut scene = Scene::start(&[]).await?;
    let begin = Instant::now();
    for server in NATS {
        scene.cluster.kill(server).await?;
    }
    for gateway in 0..GATEWAYS.len() {
        let server = &scene.cluster.gateways[gateway];
        until("the gateway says that it is not well", SOON, || async {
            let answer = server.get("/1.0/status").await?.expect(200)?;
            Ok((answer.metadata()["status"] == "unhealthy").then_some(()))
        })
        .await?;
        let answer = scene.cluster.ask(gateway, APPLICATION, json!({})).await?.refused(404)?;
        ensure!(
            answer.body["metadata"]["code"] == "no-agent" || answer.error().contains("agent"),
            "{answer:?}"
        );
        let answer = scene.join(gateway, &scene.session).await?.refused(503)?;
        ensure!(answer.error().contains("does not answer"), "{}", answer.text);
        let answer = scene.show(gateway, &scene.session).await?.expect(200)?;
        ensure!(answer.metadata()["status"] == "active", "{}", answer.text);
    }
    // The wish to end a session is kept.
    let ended = scene.other.clone();
    scene.ask_to_end(0, &ended).await?.expect(200)?;
    let answer = scene.show(1, &ended).await?.expect(200)?;
    ensure!(answer.metadata()["status"] == "terminating", "{}", answer.text);
    scene.until_nobody_takes("pattern", "no agent is connected").await?;
    scene.lasts(begin).await?;
    for server in NATS {
        scene.cluster.start_again(server).await?;
    }
    scene.heals(&[&ended]).await
}

/// With the store gone every request is answered in words, by either gateway, and none of them ends.
async fn every_call_names_the_store(scene: &Scene) -> Result<()> {
    for gateway in 0..GATEWAYS.len() {
        // Each looks for the store for some seconds, so all ask at once.
        let (created, joined, shown, ended, status) = tokio::join!(
            scene.cluster.ask(gateway, APPLICATION, json!({})),
            scene.join(gateway, &scene.session),
            scene.show(gateway, &scene.session),
            scene.ask_to_end(gateway, &scene.other),
            scene.cluster.gateways[gateway].get("/1.0/status"),
        );
        for answer in [created?, joined?, shown?, ended?] {
            refused(answer, 503, "store-unavailable", "cannot reach its store")?;
        }
        let status = status?.expect(200)?;
        ensure!(status.metadata()["status"] == "unhealthy", "{}", status.text);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn without_etcd_calls_are_refused_and_streams_go_on() -> Result<()> {
    let mut scene = Scene::start(&[]).await?;
    let begin = Instant::now();
    for member in ETCD {
        scene.cluster.kill(member).await?;
    }
    every_call_names_the_store(&scene).await?;
    // A gateway that is started now ends, and says why; whoever supervises it starts it again.
    scene.cluster.kill(GATEWAYS[1]).await?;
    scene.cluster.spawn(GATEWAYS[1])?;
    let status = scene.cluster.ended(GATEWAYS[1]).await?;
    ensure!(!status.success(), "it started without its store");
    let said = scene.cluster.log(GATEWAYS[1]);
    ensure!(said.contains("etcds://"), "it does not name its store: {said}");
    scene.lasts(begin).await?;
    for member in ETCD {
        scene.cluster.spawn(member)?;
    }
    for member in ETCD {
        scene.cluster.works(member).await?;
    }
    scene.cluster.start_again(GATEWAYS[1]).await?;
    scene.heals(&[]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_quorum_of_etcd_calls_are_refused_and_streams_go_on() -> Result<()> {
    let mut scene = Scene::start(&[]).await?;
    let leader = scene.cluster.etcd_leader().await?;
    let (rest, victims): (Vec<&str>, Vec<&str>) = {
        let follower = ETCD.into_iter().find(|member| *member != leader).context("there are three")?;
        ETCD.into_iter().partition(|member| *member != leader && *member != follower)
    };
    ensure!(rest.len() == 1);
    let begin = Instant::now();
    for member in &victims {
        scene.cluster.kill(member).await?;
    }
    every_call_names_the_store(&scene).await?;
    scene.lasts(begin).await?;
    // Two of three are enough.
    scene.cluster.start_again(victims[0]).await?;
    until("sessions are made with two of three", BOOT, || async {
        scene.cluster.create(0, APPLICATION, json!({})).await.map(Some)
    })
    .await?;
    scene.cluster.start_again(victims[1]).await?;
    scene.heals(&[]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_agent_a_cluster_gets_nothing_new_and_its_streams_go_on() -> Result<()> {
    let mut scene = Scene::start(&[]).await?;
    let begin = Instant::now();
    scene.cluster.kill(AGENT).await?;
    // At first it is asked in vain, then it counts as silent; the other cluster is not concerned.
    refused(scene.cluster.ask(0, "pattern", json!({})).await?, 404, "no-agent", "does not answer")?;
    scene.cluster.ask(1, APPLICATION, json!({})).await?.expect(201)?;
    refused(scene.join(1, &scene.session).await?, 503, "agent-unreachable", AGENT)?;
    scene.until_nobody_takes("pattern", "has fallen silent").await?;
    for gateway in 0..GATEWAYS.len() {
        let answer = scene.show(gateway, &scene.session).await?.expect(200)?;
        ensure!(answer.metadata()["status"] == "active", "{}", answer.text);
    }
    scene.lasts(begin).await?;
    scene.cluster.start_again(AGENT).await?;
    scene.heals(&[]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_ams_a_cluster_gets_nothing_new_and_its_sessions_can_be_joined() -> Result<()> {
    let mut scene = Scene::start(&[]).await?;
    let begin = Instant::now();
    scene.cluster.kill(AMS).await?;
    scene.until_nobody_takes("pattern", "cannot reach its AMS").await?;
    scene.cluster.ask(1, APPLICATION, json!({})).await?.expect(201)?;
    // A new client needs the agent and the streamer, not AMS.
    let url = scene.cluster.join(1, &scene.session).await?;
    let habits = Habits { closes_socket: false, ..Habits::default() };
    let next = Stream::open(&scene.cluster.gateways[1], &url, habits).await?;
    std::mem::replace(&mut scene.stream, next).ended().await?;
    scene.lasts(begin).await?;
    let answer = scene.show(0, &scene.session).await?.expect(200)?;
    ensure!(answer.metadata()["status"] == "active", "{}", answer.text);
    scene.cluster.start_again(AMS).await?;
    scene.heals(&[]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn without_any_gateway_nobody_comes_in_and_streams_go_on() -> Result<()> {
    let mut scene = Scene::start(&[]).await?;
    let begin = Instant::now();
    for gateway in GATEWAYS {
        scene.cluster.kill(gateway).await?;
    }
    for gateway in 0..GATEWAYS.len() {
        ensure!(scene.show(gateway, &scene.session).await.is_err(), "a gateway that was killed answers");
    }
    scene.stream.client().wait("the signalling socket is closed", SOON, |seen| seen.socket_closed).await?;
    scene.lasts(begin).await?;
    for gateway in GATEWAYS {
        scene.cluster.start_again(gateway).await?;
    }
    scene.heals(&[]).await
}

/// Seconds until the TURN credentials in an answer end.
fn credentials_last(answer: &Answer) -> Result<i64> {
    let servers = answer.metadata()["stun_servers"].as_array().context("no ICE servers")?;
    let user = servers.iter().find_map(|server| server["username"].as_str()).context("no TURN server")?;
    let end: i64 =
        user.split(':').next().unwrap_or_default().parse().context("no time in the user's name")?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    Ok(end - i64::try_from(now)?)
}

#[tokio::test(flavor = "multi_thread")]
async fn clocks_that_jump_by_an_hour_end_nothing() -> Result<()> {
    let scene = Scene::start(&[GATEWAYS[0], AGENT]).await?;
    let begin = Instant::now();
    for (of_gateway, of_agent) in [("+1h", "-1h"), ("-1h", "+1h")] {
        scene.cluster.set_clock(GATEWAYS[0], of_gateway)?;
        scene.cluster.set_clock(AGENT, of_agent)?;
        for gateway in 0..GATEWAYS.len() {
            // Sessions are made and ended; the sign that the clock is another one is in the credentials.
            let (made, _) = scene.cluster.create(gateway, APPLICATION, json!({})).await?;
            scene.cluster.delete(gateway, &made).await?;
            let answer = scene.join(gateway, &scene.session).await?.expect(200)?;
            let hours = credentials_last(&answer)? as f64 / 3600.0;
            let expected = if of_agent == "-1h" { 23.0 } else { 25.0 };
            ensure!((hours - expected).abs() < 0.1, "the agent's clock did not jump: {hours} hours");
        }
        // An address is good at the unit that made it, and at any other whose clock is less than ten minutes away.
        let url = scene.cluster.join(0, &scene.session).await?;
        let (_, path) = url.split_once("/1.0/").context("an address without a path")?;
        let elsewhere = scene.cluster.gateways[1].url().replace("https://", "wss://") + "/1.0/" + path;
        let there = scene.cluster.gateways[1].websocket(&elsewhere).await?;
        if of_gateway == "-1h" {
            refused(there.refused()?, 401, "token-expired", "expired")?;
            scene.cluster.gateways[0].websocket(&url).await?.open()?;
        } else {
            there.open()?;
        }
        sleep_until(Instant::now() + OUTAGE / 2).await;
        scene.stream.goes_on().await?;
        let answer = scene.show(0, &scene.session).await?.expect(200)?;
        ensure!(answer.metadata()["status"] == "active", "{}", answer.text);
    }
    scene.lasts(begin).await?;
    for program in [GATEWAYS[0], AGENT] {
        scene.cluster.set_clock(program, "+0")?;
    }
    scene.heals(&[]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_hangs_gets_nothing_new_and_makes_nothing_late() -> Result<()> {
    let scene = Scene::start(&[]).await?;
    let begin = Instant::now();
    scene.cluster.freeze(AGENT)?;
    // These reach it when it goes on, and must then come to nothing.
    for gateway in 0..GATEWAYS.len() {
        refused(scene.cluster.ask(gateway, "pattern", json!({})).await?, 404, "no-agent", "does not answer")?;
    }
    scene.cluster.ask(0, APPLICATION, json!({})).await?.expect(201)?;
    scene.until_nobody_takes("pattern", "has fallen silent").await?;
    scene.lasts(begin).await?;
    scene.cluster.thaw(AGENT)?;
    scene.heals(&[]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_and_the_leader_of_etcd_that_hang_are_left_by_the_others() -> Result<()> {
    let mut scene = Scene::start(&[]).await?;
    let leader = scene.cluster.etcd_leader().await?;
    scene.cluster.freeze(leader)?;
    let (made, _) = until("sessions are made without the leader", SOON, || async {
        scene.cluster.create(0, APPLICATION, json!({})).await.map(Some)
    })
    .await?;
    let begin = Instant::now();
    scene.cluster.freeze(GATEWAYS[1])?;
    // The other unit takes over whatever the one that hangs was to look after: a session ends and one begins.
    until("a session is ended", SOON, || async {
        scene.ask_to_end(0, &made).await?;
        let answer = scene.show(0, &made).await?;
        Ok((answer.status == 404).then_some(()))
    })
    .await?;
    let (second, url) = scene.cluster.create(0, "pattern", json!({})).await?;
    let stream = Stream::open(&scene.cluster.gateways[0], &url, Habits::default()).await?;
    scene.lasts(begin).await?;
    stream.goes_on().await?;
    scene.cluster.thaw(leader)?;
    scene.cluster.thaw(GATEWAYS[1])?;
    stream.goes_on().await?;
    let answer = scene.show(0, &second).await?.expect(200)?;
    ensure!(answer.metadata()["status"] == "active", "{}", answer.text);
    for gateway in GATEWAYS {
        scene.cluster.works(gateway).await?;
    }
    scene.heals(&[]).await
}
