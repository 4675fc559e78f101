//! The programs, the agents and the clients together, and what can be done with them: fill, create, join, send.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use fanlight_api::{
    PROTOCOL_VERSION, SessionId,
    gateway::{JoinPost, SessionsPost},
    link::{Frame, Packet, PacketKind, Side},
};
use fanlight_bus::Bus;
use fanlight_client::{ClientError, GatewayClient};
use tokio::{
    sync::{Semaphore, mpsc},
    task::JoinSet,
};

use crate::{
    agents::{self, APPLICATION, Agents},
    machine,
    pace::{arrivals, ms_since, nanos},
    servers::{Servers, Store},
    sockets::{Client, Sockets, Trip, probe},
};

/// How long anything may take that is not measured.
const PATIENCE: Duration = Duration::from_secs(60);
/// From the end of a load until its last effects have passed: launches, reports, deletions.
const SETTLE: Duration = Duration::from_millis(700);
/// From the last create until its instance runs, and that is recorded.
const LAUNCHED: Duration = Duration::from_millis(400);
/// How old a session gets that is only created.
const SHORT_LIFE: Duration = Duration::from_secs(1);

/// Everything.
pub struct World {
    pub servers: Servers,
    pub agents: Agents,
    /// Caller of most requests.
    pub caller: GatewayClient,
    /// Another caller, with an account of its own.
    pub other: GatewayClient,
    pub sockets: Sockets,
    pub held: Vec<Held>,
    /// Resident memory of the gateway when it had no session yet, KiB.
    pub base_kib: f64,
    seed: u64,
    last_run: u32,
}

/// A session with both sockets open.
pub struct Held {
    pub id: SessionId,
    pub client: Client,
}

/// What became of a create.
pub enum Outcome {
    Created(SessionId, f64),
    /// 429.
    Refused,
    Failed(String),
}

/// Outcomes of many, taken apart.
#[derive(Default)]
pub struct Outcomes {
    pub created: Vec<SessionId>,
    /// Of those created, milliseconds.
    pub latencies: Vec<f64>,
    pub refused: usize,
    /// Texts with their counts.
    pub failed: BTreeMap<String, usize>,
    /// From the first due to the last answer, seconds.
    pub seconds: f64,
}

impl Outcomes {
    fn add(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Created(id, latency) => {
                self.created.push(id);
                self.latencies.push(latency);
            }
            Outcome::Refused => self.refused += 1,
            Outcome::Failed(text) => *self.failed.entry(text).or_default() += 1,
        }
    }

    /// Fails unless every create was answered with a session.
    ///
    /// # Errors
    /// Says what the others were answered with.
    pub fn all_created(&self) -> Result<()> {
        ensure!(
            self.failed.is_empty() && self.refused == 0,
            "{} creates were refused, and failed were {:?}",
            self.refused,
            self.failed
        );
        Ok(())
    }
}

/// Latencies of joins in milliseconds.
#[derive(Default)]
pub struct Joins {
    /// To the answer of `POST join`.
    pub answered: Vec<f64>,
    /// To the first frame that came back through the new socket.
    pub connected: Vec<f64>,
}

fn request() -> SessionsPost {
    SessionsPost { app: Some(APPLICATION.into()), joinable: Some(true), ..SessionsPost::default() }
}

async fn create(api: &GatewayClient, due: Instant) -> Outcome {
    match api.create_session(&request()).await {
        Ok(created) => Outcome::Created(created.id, ms_since(due)),
        Err(ClientError::Refused { status, .. }) if status.as_u16() == 429 => Outcome::Refused,
        Err(error) => Outcome::Failed(chain(&error)),
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

impl World {
    /// Starts everything.
    ///
    /// # Errors
    /// Something does not start.
    pub async fn start(store: Store, requests_per_second: u32, agents: usize, seed: u64) -> Result<Self> {
        let servers = Servers::start(store, requests_per_second).await?;
        let caller = servers.account("caller").await?;
        let other = servers.account("other").await?;
        let sockets = Sockets::new(servers.address, &servers.fingerprint)?;
        let agents = Agents::start(&servers.bus, agents).await?;
        let start = Instant::now();
        while !servers.internal.applications().await?.iter().any(|known| known.name == APPLICATION) {
            ensure!(start.elapsed() < PATIENCE, "the gateway hears nothing of its agents");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        // At rest: what the start itself needs has been given back.
        tokio::time::sleep(Duration::from_secs(3)).await;
        let base_kib = machine::resident_kib(servers.gateway_pid()?)?;
        let held = Vec::new();
        Ok(Self { servers, agents, caller, other, sockets, held, base_kib, seed, last_run: 0 })
    }

    fn next_seed(&mut self) -> u64 {
        self.seed += 1;
        self.seed
    }

    /// Holds so many sessions, both sockets of each open.
    ///
    /// # Errors
    /// One of them cannot be created or joined.
    pub async fn fill(&mut self, target: usize, rate: f64) -> Result<()> {
        let count = target.saturating_sub(self.held.len());
        let mut due = arrivals(self.next_seed(), rate, count);
        let (done, mut results) = mpsc::unbounded_channel();
        // Filling is not measured; a machine that is slow now is not made slower.
        let permits = Arc::new(Semaphore::new(100));
        let sockets = &self.sockets;
        let held = &mut self.held;
        let opening = futures_util::stream::FuturesUnordered::new();
        tokio::pin!(opening);
        let mut arrived = 0;
        while held.len() < target {
            tokio::select! {
                Some(_) = due.recv(), if arrived < count => {
                    arrived += 1;
                    let (api, done, permits) = (self.servers.internal.clone(), done.clone(), permits.clone());
                    tokio::spawn(async move {
                        let permit = permits.acquire_owned().await;
                        let created = api.create_session(&request()).await;
                        let _ = done.send((created, permit));
                    });
                }
                Some((created, permit)) = results.recv() => {
                    let created = created.context("filling: creating a session")?;
                    opening.push(async move {
                        let opened = sockets.open(&created.url).await.context("filling: opening a socket")?;
                        let (client, joined) = opened;
                        let joined = tokio::time::timeout(PATIENCE, joined).await;
                        joined.context("filling: an instance did not answer")?.context("a socket was closed")?;
                        drop(permit);
                        anyhow::Ok(Held { id: created.id, client })
                    });
                }
                Some(opened) = futures_util::StreamExt::next(&mut opening) => held.push(opened?),
            }
        }
        self.servers.check()
    }

    /// Creates sessions at a rate and leaves them.
    pub async fn creates(&mut self, api: &GatewayClient, rate: f64, count: usize) -> Outcomes {
        let seed = self.next_seed();
        creates(api, seed, rate, count, None).await
    }

    /// Creates sessions at a rate; each is ended a second later, so that the number held stays.
    ///
    /// # Errors
    /// Deleting fails.
    pub async fn churn(&mut self, api: &GatewayClient, rate: f64, count: usize) -> Result<Outcomes> {
        let (created, ids) = mpsc::unbounded_channel();
        let seed = self.next_seed();
        let deleting = delete_later(self.servers.internal.clone(), ids);
        let (outcomes, deleted) = tokio::join!(creates(api, seed, rate, count, Some(created)), deleting);
        deleted?;
        tokio::time::sleep(SETTLE).await;
        Ok(outcomes)
    }

    /// Ends sessions, and waits until nothing is left of them.
    ///
    /// # Errors
    /// The gateway refuses.
    pub async fn delete(&self, ids: &[SessionId]) -> Result<()> {
        delete(&self.servers.internal, ids).await?;
        tokio::time::sleep(SETTLE).await;
        Ok(())
    }

    /// CPU time of the gateway per create, microseconds: bursts of creates, with all that follows from them until the
    /// instances run. The deletions between the bursts are not counted.
    ///
    /// # Errors
    /// A create fails.
    pub async fn cpu_per_create(&mut self, rate: f64, bursts: usize, burst: usize) -> Result<f64> {
        let pid = self.servers.gateway_pid()?;
        let mut spent = Duration::ZERO;
        for _ in 0..bursts {
            let before = machine::cpu_time(pid)?;
            let api = self.caller.clone();
            let outcomes = self.creates(&api, rate, burst).await;
            tokio::time::sleep(LAUNCHED).await;
            spent += machine::cpu_time(pid)? - before;
            outcomes.all_created()?;
            self.delete(&outcomes.created).await?;
        }
        Ok(spent.as_secs_f64() * 1e6 / (bursts * burst) as f64)
    }

    /// CPU of the gateway while nobody asks anything, percent of one core.
    ///
    /// # Errors
    /// The gateway has ended.
    pub async fn idle_cpu(&self, time: Duration) -> Result<f64> {
        let pid = self.servers.gateway_pid()?;
        let (before, start) = (machine::cpu_time(pid)?, Instant::now());
        tokio::time::sleep(time).await;
        let spent = machine::cpu_time(pid)? - before;
        Ok(spent.as_secs_f64() / start.elapsed().as_secs_f64() * 100.0)
    }

    /// Resident memory of the gateway per session held, kB, above what it had before the first.
    ///
    /// # Errors
    /// The gateway has ended.
    pub fn kb_per_session(&self) -> Result<f64> {
        let kib = machine::resident_kib(self.servers.gateway_pid()?)? - self.base_kib;
        Ok(kib * 1.024 / self.held.len() as f64)
    }

    /// New clients for sessions that are held, at a rate: each joins, opens its socket and takes over.
    ///
    /// # Errors
    /// One of them cannot.
    pub async fn joins(&mut self, rate: f64, count: usize) -> Result<Joins> {
        ensure!(count <= self.held.len(), "more joins than sessions");
        let mut due = arrivals(self.next_seed(), rate, count);
        let api = &self.caller;
        let (sockets, held) = (&self.sockets, &self.held);
        let step = held.len() / count;
        let joining = futures_util::stream::FuturesUnordered::new();
        tokio::pin!(joining);
        let mut arrived = 0;
        let mut joins = Joins::default();
        let mut replaced = Vec::new();
        while replaced.len() < count {
            tokio::select! {
                biased;
                Some((number, due)) = due.recv(), if arrived < count => {
                    arrived += 1;
                    let index = number * step;
                    let id = held[index].id.clone();
                    joining.push(async move {
                        let joined = api.join(&id, &JoinPost::default()).await.context("joining")?;
                        let answered = ms_since(due);
                        let (client, first) = sockets.open(&joined.url).await.context("opening the socket of a join")?;
                        let first = tokio::time::timeout(PATIENCE, first).await;
                        first.context("an instance did not answer to a join")?.context("a socket was closed")?;
                        anyhow::Ok((index, client, answered, ms_since(due)))
                    });
                }
                Some(joined) = futures_util::StreamExt::next(&mut joining) => {
                    let (index, client, answered, connected) = joined?;
                    joins.answered.push(answered);
                    joins.connected.push(connected);
                    replaced.push((index, client));
                }
            }
        }
        for (index, client) in replaced {
            self.held[index].client = client;
        }
        Ok(joins)
    }

    /// Sends frames over the sessions in turn, and waits until each came back. Returns the times of their ways.
    ///
    /// # Errors
    /// A frame was lost, came twice, or not in its order.
    pub async fn round_trips(&mut self, rate: f64, count: usize) -> Result<Vec<Trip>> {
        self.last_run += 1;
        let run = self.last_run;
        let seed = self.next_seed();
        let offset = seed as usize * count;
        send_frames(&self.sockets, &self.held, run, seed, rate, count, offset).await
    }

    /// Sends one frame over each session; those whose frame came back are joined.
    ///
    /// # Errors
    /// A frame came twice, or not in its order.
    pub async fn count_joined(&mut self, rate: f64) -> Result<usize> {
        self.last_run += 1;
        let seed = self.next_seed();
        let count = self.held.len();
        send_frames(&self.sockets, &self.held, self.last_run, seed, rate, count, 0).await?;
        Ok(self.held.iter().filter(|held| held.client.is_open()).count())
    }

    /// The same way without the gateway: as [`Self::round_trips`], over the bus alone.
    ///
    /// # Errors
    /// The bus is not there, or lost a message.
    pub async fn direct_round_trips(&mut self, rate: f64, count: usize) -> Result<Vec<Trip>> {
        let (near, far) =
            (agents::connect(&self.servers.bus).await?, agents::connect(&self.servers.bus).await?);
        let mut requests = far.subscribe("load.up.*").await?;
        let mut answers = near.subscribe("load.down.*.*").await?;
        let settled = |bus: Bus| async move { bus.flush(PATIENCE).await };
        ensure!(settled(near.clone()).await && settled(far.clone()).await, "the bus takes no subscription");
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            while let Some(message) = requests.next().await {
                let number = message.subject.rsplit('.').next().unwrap_or_default();
                // The time goes along in the subject, so that the payload stays as it is.
                far.publish(&format!("load.down.{number}.{}", nanos(Instant::now())), message.payload);
            }
        });
        let mut due = arrivals(self.next_seed(), rate, count);
        let session_id = SessionId::generate();
        let mut dues = Vec::new();
        let mut trips = Vec::new();
        let give_up = tokio::time::sleep(Duration::from_secs_f64(count as f64 / rate) + PATIENCE);
        tokio::pin!(give_up);
        while trips.len() < count {
            tokio::select! {
                biased;
                Some(answer) = answers.next() => {
                    let mut words = answer.subject.rsplit('.');
                    let turned: u64 = words.next().unwrap_or_default().parse()?;
                    let number: usize = words.next().unwrap_or_default().parse()?;
                    let due: &Instant = dues.get(number).context("an answer to nothing")?;
                    trips.push(Trip::new(nanos(*due), turned, nanos(Instant::now())));
                }
                Some((number, at)) = due.recv() => {
                    dues.push(at);
                    // As large as the packet in which the frame travels.
                    let packet = Packet {
                        version: PROTOCOL_VERSION,
                        session_id: session_id.clone(),
                        generation: 1,
                        from: Side::Client,
                        instance_id: None,
                        kind: PacketKind::Data { seq: 1, frame: Frame::Text { text: probe(1, 1, 1_000_000_000) } },
                    };
                    near.publish_json(&format!("load.up.{number}"), &packet);
                }
                () = &mut give_up => bail!("the bus lost {} of {count} messages", count - trips.len()),
            }
        }
        Ok(trips)
    }

    /// Twice the load: one caller creates at `rate`, another at `honest`, while frames are relayed.
    ///
    /// # Errors
    /// A frame was lost, or deleting fails.
    pub async fn overload(&mut self, rate: f64, honest: f64, frames: f64, seconds: f64) -> Result<Overload> {
        let count = |rate: f64| (rate * seconds) as usize;
        let (greedy_ids, ids) = mpsc::unbounded_channel();
        let honest_ids = greedy_ids.clone();
        self.last_run += 1;
        let run = self.last_run;
        let seeds = [self.next_seed(), self.next_seed(), self.next_seed()];
        let deleting = delete_later(self.servers.internal.clone(), ids);
        let (greedy, honest, frames, deleted) = tokio::join!(
            creates(&self.caller, seeds[0], rate, count(rate), Some(greedy_ids)),
            creates(&self.other, seeds[1], honest, count(honest), Some(honest_ids)),
            send_frames(&self.sockets, &self.held, run, seeds[2], frames, count(frames), 0),
            deleting,
        );
        deleted?;
        tokio::time::sleep(SETTLE).await;
        Ok(Overload { greedy, honest, frames: frames? })
    }

    /// Ends all sessions that are held, closes their sockets, and waits until the agents have nothing left.
    ///
    /// # Errors
    /// Something stays.
    pub async fn clear(&mut self) -> Result<()> {
        let ids: Vec<SessionId> = self.held.iter().map(|held| held.id.clone()).collect();
        delete(&self.servers.internal, &ids).await?;
        let start = Instant::now();
        while self.agents.known() > 0 {
            ensure!(start.elapsed() < PATIENCE, "{} sessions are left at the agents", self.agents.known());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        self.held.clear();
        Ok(())
    }
}

/// What a gateway under twice its load did.
pub struct Overload {
    /// Creates of the caller that asks too much.
    pub greedy: Outcomes,
    /// Creates of the one that does not.
    pub honest: Outcomes,
    /// Frames that were relayed meanwhile.
    pub frames: Vec<Trip>,
}

async fn creates(
    api: &GatewayClient,
    seed: u64,
    rate: f64,
    count: usize,
    ids: Option<mpsc::UnboundedSender<SessionId>>,
) -> Outcomes {
    let mut due = arrivals(seed, rate, count);
    let mut tasks = JoinSet::new();
    let mut outcomes = Outcomes::default();
    let mut take = |outcome| {
        if let (Outcome::Created(id, _), Some(ids)) = (&outcome, &ids) {
            let _ = ids.send(id.clone());
        }
        outcomes.add(outcome);
    };
    let mut first = None;
    loop {
        tokio::select! {
            biased;
            arrival = due.recv() => {
                let Some((_, due)) = arrival else { break };
                first.get_or_insert(due);
                let api = api.clone();
                tasks.spawn(async move { create(&api, due).await });
            }
            Some(outcome) = tasks.join_next() => take(outcome.expect("a create does not panic")),
        }
    }
    while let Some(outcome) = tasks.join_next().await {
        take(outcome.expect("a create does not panic"));
    }
    outcomes.seconds = first.map_or(f64::NAN, |first| first.elapsed().as_secs_f64());
    outcomes
}

async fn delete(api: &GatewayClient, ids: &[SessionId]) -> Result<()> {
    for part in ids.chunks(200) {
        let deleted = api.delete_sessions(part, false).await.context("deleting")?;
        ensure!(deleted.errors.is_empty(), "deleting failed: {:?}", deleted.errors.first());
    }
    Ok(())
}

/// Ends each session a while after its id came, in batches; until no more ids come.
async fn delete_later(api: GatewayClient, mut ids: mpsc::UnboundedReceiver<SessionId>) -> Result<()> {
    let mut waiting: Vec<(Instant, SessionId)> = Vec::new();
    let mut tick = tokio::time::interval(Duration::from_millis(250));
    let mut open = true;
    while open || !waiting.is_empty() {
        tokio::select! {
            id = ids.recv(), if open => match id {
                Some(id) => waiting.push((Instant::now(), id)),
                None => open = false,
            },
            _ = tick.tick() => {
                let ready = waiting.partition_point(|(at, _)| at.elapsed() >= SHORT_LIFE);
                let ready: Vec<SessionId> = waiting.drain(..ready).map(|(_, id)| id).collect();
                delete(&api, &ready).await?;
            }
        }
    }
    Ok(())
}

async fn send_frames(
    sockets: &Sockets,
    held: &[Held],
    run: u32,
    seed: u64,
    rate: f64,
    count: usize,
    offset: usize,
) -> Result<Vec<Trip>> {
    ensure!(!held.is_empty(), "there is no session to send over");
    let mut due = arrivals(seed, rate, count);
    while let Some((number, due)) = due.recv().await {
        held[(offset + number) % held.len()].client.send(run, due);
    }
    let start = Instant::now();
    let tally = &sockets.tally;
    while tally.count(run) < count && start.elapsed() < Duration::from_secs(10) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let trips = tally.take(run);
    let disorder = tally.disorder.load(std::sync::atomic::Ordering::Relaxed);
    ensure!(trips.len() == count, "{} of {count} frames came back", trips.len());
    ensure!(disorder == 0, "{disorder} frames came twice or not in their order");
    Ok(trips)
}

/// The ids of the sessions that the gateway lists.
///
/// # Errors
/// It does not answer.
pub async fn listed(api: &GatewayClient) -> Result<HashSet<SessionId>> {
    let sessions = api.sessions(&fanlight_client::SessionsQuery::default()).await?;
    Ok(sessions.into_iter().map(|session| session.id).collect())
}
