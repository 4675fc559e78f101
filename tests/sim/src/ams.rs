//! A simulated AMS: what `workloads/ams/src/instances.rs` does with what the cores decide, over a store of its own
//! that survives it.

use std::{cmp::Ordering, collections::BTreeMap, time::Duration};

use fanlight_ams::cores::{
    life::{self, Action, Seen, Watch},
    model::{InstanceRecord, LaunchRecord, Session, Target},
    placement::{self, Allocations, Offer, Strategy, Wish},
    pool::{self, Backoff},
};
use fanlight_api::{
    InstanceId, SessionId,
    ams::{Instance, Node},
    bus::ReportedApplication,
    guest::{PoolStart, Streaming},
};

use crate::{
    check::{self, Cause},
    note,
    planted::Planted,
    rng::Rng,
    world::{Message, Pid, Timer, World},
};

const START: Duration = Duration::from_secs(60);
const STOP: Duration = Duration::from_secs(10);
const END_SESSION: Duration = Duration::from_secs(600);
const TICK_MS: u64 = 30_000;
const ROUND_MS: u64 = 60_000;
/// How long a connection to the agent may be silent before a request over it has failed.
const HTTP_MS: u64 = 5000;
const LAST_PAUSE_MS: u64 = 5000;
/// Pools are looked at this often.
const POOL_MS: u64 = 700;
/// How long a launch waits for the room of instances that were given up, and how often it looks.
const ROOM_MS: u64 = 10_000;
const ROOM_PAUSE_MS: u64 = 100;
/// How long a pool waits when there is no room.
const NO_ROOM: Duration = Duration::from_secs(10);

/// What AMS tells when it is read.
#[derive(Debug)]
pub struct Listing {
    /// All instances.
    pub instances: Vec<Instance>,
    /// The node.
    pub nodes: Vec<Node>,
    /// What can be launched.
    pub applications: Vec<ReportedApplication>,
}

/// A launch of the agent.
#[derive(Clone, Debug)]
pub struct Launched {
    /// Whose.
    pub session: SessionId,
    /// Which attempt.
    pub attempt: u32,
    /// For the streamer.
    pub joinable: bool,
    /// For the streamer.
    pub idle_time_min: u32,
}

/// What an agent is told of its launch: the instance and how its placement went, or a refusal.
type Answer = Result<(InstanceId, Result<(), String>), String>;

/// A launch that is being written.
#[derive(Clone, Debug)]
pub struct Pending {
    /// Whose it is: of an agent, with where its answer goes; none: of AMS itself.
    of: Option<(Pid, u64, Launched)>,
    /// Of the pool, as it was when it was looked at.
    taken: Option<(InstanceId, u64)>,
    /// It waits for room until then.
    room_until: u64,
}

/// An AMS: its store and what it has in memory.
pub struct Ams {
    /// The node.
    pub offer: Offer,
    /// Records with their revisions.
    pub records: BTreeMap<InstanceId, (InstanceRecord, u64)>,
    launches: BTreeMap<String, LaunchRecord>,
    /// What was promised.
    pub allocations: Allocations,
    /// How many instances should wait for a launch.
    pub pool: u32,
    backoff: Backoff,
    /// A launch waits for room; the pool takes none before.
    wanted_until: u64,
    revision: u64,
    tasks: BTreeMap<InstanceId, Task>,
    calls: BTreeMap<u64, InstanceId>,
}

/// What follows one instance.
#[derive(Default)]
struct Task {
    last: Option<(Action, Seen, u64)>,
    watch: Watch,
    watched: Duration,
    pause: u64,
    /// Which planned look counts.
    token: u64,
    /// A question to the agent is open.
    busy: bool,
}

/// Timers of an AMS.
#[derive(Clone, Debug)]
pub enum AmsTimer {
    /// Look at an instance.
    Look(InstanceId, u64),
    /// A question was not answered.
    Late(u64),
    /// Housekeeping.
    Round,
    /// Adopt what is there.
    Adopt,
    /// Look at the pool.
    Pool,
    /// A launch goes on.
    Launch(Box<Pending>),
}

enum Step {
    Gone,
    Again,
    Wait(Option<Duration>),
    Retry,
    /// Goes on when the agent has answered.
    Asked,
}

impl Ams {
    /// One with an empty store.
    pub fn new(rng: &mut Rng) -> Self {
        Self {
            offer: Offer {
                node: "n0".parse().expect("a valid id"),
                online: true,
                unschedulable: false,
                architecture: "x86_64".into(),
                tags: Vec::new(),
                cpus: rng.between(3, 12) as f64,
                memory_bytes: 64 << 30,
                disk_bytes: None,
                disk_free_percent: None,
                gpus: Vec::new(),
                places: 1000,
            },
            records: BTreeMap::new(),
            launches: BTreeMap::new(),
            allocations: Allocations::default(),
            pool: if rng.chance(0.6) { rng.between(1, 3) as u32 } else { 0 },
            backoff: Backoff::default(),
            wanted_until: 0,
            revision: 0,
            tasks: BTreeMap::new(),
            calls: BTreeMap::new(),
        }
    }

    /// It dies: only the store stays.
    pub fn forget(&mut self) {
        self.tasks.clear();
        self.calls.clear();
        self.backoff = Backoff::default();
        self.wanted_until = 0;
    }
}

impl World {
    /// An AMS begins.
    pub fn ams_start(&mut self, cluster: usize) {
        let pid = Pid::Ams(cluster);
        self.ams[cluster].forget();
        let delay = self.rng.between(5, 200);
        self.timer_in(pid, delay, Timer::Ams(AmsTimer::Adopt));
        self.timer_in(pid, ROUND_MS, Timer::Ams(AmsTimer::Round));
        self.timer_in(pid, delay + POOL_MS, Timer::Ams(AmsTimer::Pool));
    }

    fn adopt(&mut self, cluster: usize) {
        if self.has(Planted::DeletedWithoutOwner) {
            self.sweep(cluster, true);
        }
        let ids: Vec<InstanceId> = self.ams[cluster].records.keys().cloned().collect();
        for id in ids {
            self.nudge(cluster, &id, true);
        }
        self.sweep(cluster, false);
    }

    fn sweep(&mut self, cluster: usize, planted: bool) {
        let there: Vec<InstanceId> = self.engines[cluster].instances.keys().cloned().collect();
        for id in there {
            let known = match planted {
                true => self.ams[cluster].tasks.contains_key(&id),
                false => self.ams[cluster].records.contains_key(&id),
            };
            if known {
                self.nudge(cluster, &id, true);
            } else {
                self.engine_delete(cluster, &id);
            }
        }
    }

    /// Something reached an AMS.
    pub fn ams_message(&mut self, cluster: usize, from: Pid, message: Message) {
        let pid = Pid::Ams(cluster);
        match message {
            Message::List(call) => {
                let listing = self.listing(cluster);
                self.http(pid, from, Message::Listed(call, listing.into()));
            }
            Message::Launch(call, launched) => {
                let of = Some((from, call, *launched));
                let room_until = self.now + ROOM_MS;
                self.ams_launch(cluster, Pending { of, taken: None, room_until });
            }
            Message::Delete(call, id, force) => {
                if self.ams_delete(cluster, &id, force) {
                    self.http(pid, from, Message::Deleted(call));
                }
            }
            Message::SessionMade(call, made) => {
                let Some(id) = self.ams[cluster].calls.remove(&call) else { return };
                self.session_made(cluster, &id, Some(made));
            }
            Message::SessionDeleted(call, ended) => {
                let Some(id) = self.ams[cluster].calls.remove(&call) else { return };
                self.session_ended(cluster, &id, Some(ended));
            }
            _ => {}
        }
    }

    /// Time passed for an AMS.
    pub fn ams_timer(&mut self, cluster: usize, timer: AmsTimer) {
        match timer {
            AmsTimer::Adopt => self.adopt(cluster),
            AmsTimer::Launch(pending) => self.ams_launch(cluster, *pending),
            AmsTimer::Pool => {
                self.look_at_pool(cluster);
                self.timer_in(Pid::Ams(cluster), POOL_MS, Timer::Ams(AmsTimer::Pool));
            }
            AmsTimer::Round => {
                self.sweep(cluster, false);
                self.timer_in(Pid::Ams(cluster), ROUND_MS, Timer::Ams(AmsTimer::Round));
            }
            AmsTimer::Look(id, token) => {
                let task = self.ams[cluster].tasks.get(&id);
                if task.is_some_and(|task| task.token == token && !task.busy) {
                    self.look(cluster, &id);
                }
            }
            AmsTimer::Late(call) => {
                let Some(id) = self.ams[cluster].calls.remove(&call) else { return };
                let deleting = self.ams[cluster]
                    .records
                    .get(&id)
                    .is_some_and(|(record, _)| record.session.to_end().is_some());
                match deleting {
                    true => self.session_ended(cluster, &id, None),
                    false => self.session_made(cluster, &id, None),
                }
            }
        }
    }

    fn listing(&self, cluster: usize) -> Listing {
        let ams = &self.ams[cluster];
        let used = ams.allocations.used();
        Listing {
            instances: ams.records.values().map(|(record, _)| record.to_api("", "", Vec::new())).collect(),
            nodes: vec![Node {
                status_code: 4,
                cpus: ams.offer.cpus as u32,
                cpu_allocation_rate: 1.0,
                used_cpus: used.cpus,
                memory: "64GiB".into(),
                memory_allocation_rate: 1.0,
                used_memory_bytes: used.memory_bytes,
                ..Node::default()
            }],
            applications: vec![check::application()],
        }
    }

    // --- requests --------------------------------------------------------------------------------------------

    /// What a launch that was accepted before is answered again; nothing: this one is new.
    fn known_launch(&self, cluster: usize, launched: &Launched) -> Option<Answer> {
        let known = self.ams[cluster].launches.get(launched.session.as_str())?;
        if self.has(Planted::AttemptNotFenced) {
            return None;
        }
        match known.judge(u64::from(launched.attempt)) {
            Ordering::Less => Some(Err("the attempt is too old".into())),
            Ordering::Equal => {
                // The operation of the first request is answered.
                let result = match self.ams[cluster].records.get(&known.instance) {
                    Some((record, _)) if record.node.is_none() => Err(record.observed.error.clone()),
                    Some(_) => Ok(()),
                    None => Err("instance not found".into()),
                };
                Some(Ok((known.instance.clone(), result)))
            }
            Ordering::Greater => None,
        }
    }

    /// A launch, from its beginning or from where it waited. Between looking at the pool and writing, others write too:
    /// there may be several units of an AMS.
    fn ams_launch(&mut self, cluster: usize, mut pending: Pending) {
        let pid = Pid::Ams(cluster);
        let now = self.wall(pid);
        if let Some((from, call, launched)) = &pending.of
            && let Some(answer) = self.known_launch(cluster, launched)
        {
            let (from, call) = (*from, *call);
            return self.http(pid, from, Message::LaunchAnswer(call, answer));
        }
        let session = match &pending.of {
            None => Session::Wanted,
            Some((_, _, launched)) => Session::Given {
                streaming: Streaming {
                    joinable: launched.joinable,
                    idle_time_min: launched.idle_time_min,
                    ..check::streaming(&launched.session)
                },
            },
        };
        let mut record = self.new_record(cluster, session);
        if pending.of.is_some() {
            record.tags.push(fanlight_agent::cores::LAUNCHED_TAG.into());
        }
        let mut result = Ok(());
        match pending.taken.take() {
            Some((id, revision)) => {
                let compares = !self.has(Planted::ClaimedWithoutCompare);
                let current = self.ams[cluster].records.get(&id);
                let Some((waiting, _)) = current.filter(|(_, at)| *at == revision || !compares) else {
                    // Somebody was faster.
                    return self.timer_in(pid, 1, Timer::Ams(AmsTimer::Launch(Box::new(pending))));
                };
                record = pool::claim(waiting, &record, now);
                if !self.ledger.handed_out(&id) {
                    self.violate(format!("{id} waited and is handed out for a second time"));
                }
            }
            None => {
                if let Some(taken) = self.find_waiting(cluster, &record) {
                    pending.taken = Some(taken);
                    let delay = self.travel() + self.rng.below(20);
                    return self.timer_in(pid, delay, Timer::Ams(AmsTimer::Launch(Box::new(pending))));
                }
                result = self.place(cluster, &mut record);
                if result.is_err() && self.now < pending.room_until && self.make_room(cluster, &record) {
                    return self.timer_in(
                        pid,
                        ROOM_PAUSE_MS,
                        Timer::Ams(AmsTimer::Launch(Box::new(pending))),
                    );
                }
            }
        }
        let id = record.id.clone();
        let mut superseded = None;
        match &pending.of {
            None => note!(self, "AMS {cluster} makes {id} for a session to come: {result:?}"),
            Some((_, _, launched)) => {
                let scope = launched.session.to_string();
                if let Some(known) = self.ams[cluster].launches.get(&scope).cloned()
                    && let Some((mut old, _)) = self.ams[cluster].records.get(&known.instance).cloned()
                    && old.intent.target != Target::Deleted
                    && !self.has(Planted::AttemptNotFenced)
                {
                    old.intent = old.intent.delete(true, now);
                    self.ledger.cause(&old.id, Cause::Superseded);
                    superseded = Some(old.id.clone());
                    self.write(cluster, old);
                }
                let launch = LaunchRecord {
                    attempt: u64::from(launched.attempt),
                    instance: id.clone(),
                    operation: "op".parse().expect("a valid id"),
                    at: record.created_at,
                };
                self.ams[cluster].launches.insert(scope, launch);
                self.ledger.launched(&launched.session, &id, result.is_err());
            }
        }
        self.write(cluster, record);
        if !self.survives_write(pid) {
            return;
        }
        if let Some(old) = superseded {
            self.nudge(cluster, &old, false);
        }
        self.nudge(cluster, &id, true);
        if let Some((from, call, _)) = pending.of {
            self.http(pid, from, Message::LaunchAnswer(call, Ok((id, result))));
        }
    }

    /// Somebody asks AMS itself for a streamed instance.
    pub fn ams_create(&mut self, cluster: usize) {
        if self.process(Pid::Ams(cluster)).up {
            let room_until = self.now + ROOM_MS;
            self.ams_launch(cluster, Pending { of: None, taken: None, room_until });
        }
    }

    // --- the pool --------------------------------------------------------------------------------------------

    /// The instance that has waited longest, as it is now.
    fn find_waiting(&self, cluster: usize, launch: &InstanceRecord) -> Option<(InstanceId, u64)> {
        let ams = &self.ams[cluster];
        let can_have = |(record, _): &&(InstanceRecord, u64)| pool::can_have(record, launch, &[&ams.offer]);
        let found = ams.records.values().filter(can_have);
        let (record, revision) = found.min_by_key(|(record, _)| (record.created_at, record.id.clone()))?;
        Some((record.id.clone(), *revision))
    }

    /// Gives waiting instances up for a launch. False: that would not help.
    fn make_room(&mut self, cluster: usize, launch: &InstanceRecord) -> bool {
        let ams = &self.ams[cluster];
        let waiting: Vec<&InstanceRecord> =
            ams.records.values().map(|(record, _)| record).filter(|record| record.is_waiting()).collect();
        let wish = Wish { share: launch.share(), ..Wish::default() };
        let nodes = [(ams.offer.clone(), ams.allocations.clone())];
        let Some(going) = pool::make_room(&wish, Strategy::Spread, &nodes, &waiting) else { return false };
        self.ams[cluster].wanted_until = self.now + 2 * ROOM_PAUSE_MS;
        for id in &going {
            self.give_up(cluster, id);
        }
        true
    }

    fn give_up(&mut self, cluster: usize, id: &InstanceId) {
        let Some((mut record, _)) = self.ams[cluster].records.get(id).cloned() else { return };
        if record.intent.target != Target::Deleted {
            record.intent = record.intent.delete(true, self.wall(Pid::Ams(cluster)));
            self.write(cluster, record);
            self.nudge(cluster, id, true);
        }
    }

    /// An instance for the pool.
    fn new_waiting(&mut self, cluster: usize) -> InstanceRecord {
        pool::waiting(self.new_record(cluster, Session::None), PoolStart::Streamer)
    }

    /// Whether the pool is as it should be: full, or there is no room for more.
    pub fn pool_is_settled(&mut self, cluster: usize) -> bool {
        let size = self.ams[cluster].pool as usize;
        let template = self.new_waiting(cluster);
        let ams = &self.ams[cluster];
        let waiting = ams.records.values().filter(|(record, _)| record.is_waiting()).count();
        let wish = Wish { share: template.share(), ..Wish::default() };
        let used = ams.allocations.used();
        let full = placement::place(&wish, Strategy::Spread, [(&ams.offer, &used)]).is_err();
        waiting == size || (waiting < size && full)
    }

    fn look_at_pool(&mut self, cluster: usize) {
        let (now, instant) = (self.now, self.instant());
        let size = self.ams[cluster].pool;
        let template = self.new_waiting(cluster);
        let ams = &self.ams[cluster];
        let waiting: Vec<&InstanceRecord> =
            ams.records.values().map(|(record, _)| record).filter(|record| record.is_waiting()).collect();
        let plan = pool::plan((size > 0).then_some((&template, size)), &waiting);
        for id in &plan.remove {
            self.give_up(cluster, id);
        }
        let ams = &mut self.ams[cluster];
        if plan.failed > 0 {
            ams.backoff.failed(instant);
        }
        if !plan.missing || ams.backoff.wait(instant).is_some() || now < ams.wanted_until {
            return;
        }
        for _ in 0..plan.make {
            let mut record = self.new_waiting(cluster);
            if self.place(cluster, &mut record).is_err() {
                self.ams[cluster].backoff.pause(instant, NO_ROOM);
                return;
            }
            let id = record.id.clone();
            self.write(cluster, record);
            if !self.survives_write(Pid::Ams(cluster)) {
                return;
            }
            self.nudge(cluster, &id, true);
        }
    }

    // --- requests about one instance -----------------------------------------------------------------------

    /// Somebody stops an instance of AMS's, or starts it again.
    pub fn ams_switch(&mut self, cluster: usize, id: &InstanceId, on: bool) {
        let Some((mut record, _)) = self.ams[cluster].records.get(id).cloned() else { return };
        if !self.process(Pid::Ams(cluster)).up || record.intent.target == Target::Deleted {
            return;
        }
        let now = self.wall(Pid::Ams(cluster));
        note!(self, "AMS {cluster} switches {id} {}", if on { "on" } else { "off" });
        if on {
            if record.is_going() || record.session == Session::Over {
                return;
            }
            if !record.holds_resources() && self.place(cluster, &mut record).is_err() {
                return;
            }
            record.start_again(now);
        } else {
            record.intent = record.intent.stop(now);
        }
        self.ledger.cause(id, Cause::Operator);
        self.write(cluster, record);
        if self.survives_write(Pid::Ams(cluster)) {
            self.nudge(cluster, id, true);
        }
    }

    /// Writes down that an instance should go. False when AMS died over it.
    pub fn ams_delete(&mut self, cluster: usize, id: &InstanceId, force: bool) -> bool {
        let Some((mut record, _)) = self.ams[cluster].records.get(id).cloned() else { return true };
        record.intent = record.intent.delete(force, self.wall(Pid::Ams(cluster)));
        if self.has(Planted::ShareGivenBackEarly) {
            self.ams[cluster].allocations.instances.remove(id);
        }
        self.write(cluster, record);
        if !self.survives_write(Pid::Ams(cluster)) {
            return false;
        }
        self.nudge(cluster, id, true);
        true
    }

    fn new_record(&mut self, cluster: usize, session: Session) -> InstanceRecord {
        let number = self.fresh();
        let now = self.wall(Pid::Ams(cluster));
        check::blank_record(format!("i{number}").parse().expect("a valid id"), now, session)
    }

    /// Finds room, and reserves it in the transaction of the record.
    fn place(&mut self, cluster: usize, record: &mut InstanceRecord) -> Result<(), String> {
        let now = self.wall(Pid::Ams(cluster));
        let forgets = self.has(Planted::PlacedTwice);
        let ams = &mut self.ams[cluster];
        let wish = Wish { share: record.share(), ..Wish::default() };
        let kept = ams.allocations.instances.remove(&record.id);
        let used = ams.allocations.used();
        match placement::place(&wish, Strategy::Spread, [(&ams.offer, &used)]) {
            Ok(mut placed) => {
                let place = kept.map(|share| share.place);
                placed.share.place = place.unwrap_or_else(|| ams.allocations.free_place());
                record.put(placed.node, placed.share);
                if !forgets {
                    ams.allocations.instances.insert(record.id.clone(), placed.share);
                }
                Ok(())
            }
            Err(refusal) => {
                record.observed = life::failed(record, refusal.to_string(), now);
                Err(refusal.to_string())
            }
        }
    }

    /// A transaction: the record and, with it, what its node has promised.
    fn write(&mut self, cluster: usize, record: InstanceRecord) -> u64 {
        let ams = &mut self.ams[cluster];
        ams.revision += 1;
        let revision = ams.revision;
        let id = record.id.clone();
        let before = ams.records.get(&id).map(|(record, _)| record.clone());
        if before.as_ref().is_some_and(InstanceRecord::holds_resources)
            && !record.holds_resources()
            && let Some(share) = ams.allocations.instances.get_mut(&id)
        {
            *share = share.at_rest();
        }
        note!(
            self,
            "AMS {cluster} writes {id}: {:?} run {} seen {:?} run {}",
            record.intent.target,
            record.intent.run,
            record.observed.status,
            record.observed.run
        );
        let changed = before.is_none_or(|before| before.observed.status != record.observed.status);
        self.ams[cluster].records.insert(id, (record, revision));
        self.judge_ams(cluster);
        if changed {
            self.http(Pid::Ams(cluster), Pid::Agent(cluster), Message::AmsEvent);
        }
        revision
    }

    // --- the task of an instance -------------------------------------------------------------------------

    /// Something about an instance changed. `make`: it gets a task if it has none.
    pub fn nudge(&mut self, cluster: usize, id: &InstanceId, make: bool) {
        if !self.process(Pid::Ams(cluster)).up {
            return;
        }
        let tasks = &mut self.ams[cluster].tasks;
        if make {
            tasks.entry(id.clone()).or_insert_with(|| Task { pause: 50, ..Task::default() });
        }
        if tasks.get(id).is_some_and(|task| !task.busy) {
            self.look_in(cluster, id, 1);
        }
    }

    fn look_in(&mut self, cluster: usize, id: &InstanceId, delay: u64) {
        let token = self.fresh();
        if let Some(task) = self.ams[cluster].tasks.get_mut(id) {
            task.token = token;
            self.timer_in(Pid::Ams(cluster), delay, Timer::Ams(AmsTimer::Look(id.clone(), token)));
        }
    }

    fn look(&mut self, cluster: usize, id: &InstanceId) {
        let step = self.step(cluster, id);
        if let Some(step) = step {
            self.stepped(cluster, id, step);
        }
    }

    fn stepped(&mut self, cluster: usize, id: &InstanceId, step: Step) {
        let Some(task) = self.ams[cluster].tasks.get_mut(id) else { return };
        let delay = match step {
            Step::Gone => {
                self.ams[cluster].tasks.remove(id);
                return;
            }
            Step::Asked => {
                task.busy = true;
                return;
            }
            Step::Again => {
                task.pause = 50;
                1
            }
            Step::Wait(wake_in) => {
                let until = wake_in.map(|wait| wait.as_millis() as u64);
                until.unwrap_or(TICK_MS).clamp(200, TICK_MS)
            }
            Step::Retry => {
                task.pause = (task.pause * 2).min(LAST_PAUSE_MS);
                task.pause
            }
        };
        self.look_in(cluster, id, delay);
    }

    /// Looks once, writes once, acts once. None: AMS died.
    fn step(&mut self, cluster: usize, id: &InstanceId) -> Option<Step> {
        let pid = Pid::Ams(cluster);
        let Some((mut record, mut revision)) = self.ams[cluster].records.get(id).cloned() else {
            return Some(Step::Gone);
        };
        let seen = self.engines[cluster].seen(id);
        let now = self.wall(pid);
        let instant = self.instant();
        let task = self.ams[cluster].tasks.get_mut(id)?;
        let watched = task.watch.see(instant, &record);
        task.watched = watched;
        let limits = life::Limits { start: START, stop: STOP };
        let decision = life::decide(&record, &seen, now, watched, limits);
        let early = self.has(Planted::StartedBeforeWritten);
        if early && let Some(Action::Start { run }) = decision.action {
            self.engine_start(cluster, id, run, record.session.streaming());
            if !self.survives_write(pid) {
                return None;
            }
        }
        if decision.observed != record.observed {
            if record.observed.status != decision.observed.status {
                self.judge_observed(cluster, &record, &decision.observed, &seen);
            }
            record.observed = decision.observed;
            revision = self.write(cluster, record.clone());
            if !self.survives_write(pid) {
                return None;
            }
        }
        let Some(action) = decision.action else {
            if let Some(task) = self.ams[cluster].tasks.get_mut(id) {
                task.last = None;
            }
            return Some(Step::Wait(decision.wake_in));
        };
        let this = (action.clone(), seen, revision);
        let task = self.ams[cluster].tasks.get_mut(id)?;
        let repeated = task.last.as_ref() == Some(&this);
        if repeated && action == Action::Stop {
            return Some(Step::Wait(decision.wake_in));
        }
        task.last = Some(this);
        let step = self.act(cluster, &record, action)?;
        Some(if repeated && matches!(step, Step::Again) { Step::Retry } else { step })
    }

    fn act(&mut self, cluster: usize, record: &InstanceRecord, action: Action) -> Option<Step> {
        let pid = Pid::Ams(cluster);
        let id = &record.id;
        note!(self, "AMS {cluster} on {id}: {action:?}");
        let failed = match action {
            Action::AskSession => {
                let call = self.fresh();
                self.ams[cluster].calls.insert(call, id.clone());
                self.http(pid, Pid::Agent(cluster), Message::SessionPost(call, id.clone()));
                self.timer_in(pid, HTTP_MS, Timer::Ams(AmsTimer::Late(call)));
                return Some(Step::Asked);
            }
            Action::EndSession => {
                let Some(session) = record.session.to_end().cloned() else { return Some(Step::Again) };
                let call = self.fresh();
                self.ams[cluster].calls.insert(call, id.clone());
                self.http(pid, Pid::Agent(cluster), Message::SessionDelete(call, session));
                self.timer_in(pid, HTTP_MS, Timer::Ams(AmsTimer::Late(call)));
                return Some(Step::Asked);
            }
            Action::Forget => {
                self.ams[cluster].records.remove(id);
                self.ams[cluster].allocations.instances.remove(id);
                self.judge_ams(cluster);
                self.http(pid, Pid::Agent(cluster), Message::AmsEvent);
                return self.survives_write(pid).then_some(Step::Gone);
            }
            Action::Claim => return self.claim(cluster, record),
            Action::Create => !self.engine_create(cluster, id),
            Action::Start { run } => {
                !(self.engine_create(cluster, id)
                    && self.engine_start(cluster, id, run, record.session.streaming()))
            }
            Action::Stop => {
                self.engine_stop(cluster, id, STOP.as_millis() as u64);
                false
            }
            Action::Kill => {
                self.engine_stop(cluster, id, 0);
                false
            }
            Action::Destroy => {
                self.engine_delete(cluster, id);
                false
            }
        };
        if failed {
            self.fail(cluster, record, "the engine failed".into());
        }
        Some(Step::Again)
    }

    fn claim(&mut self, cluster: usize, record: &InstanceRecord) -> Option<Step> {
        let Some(streaming) = record.session.streaming() else { return Some(Step::Again) };
        match self.engine_claim(cluster, &record.id, streaming) {
            None => return Some(Step::Retry),
            Some(false) => self.fail(cluster, record, "the claim was refused".into()),
            Some(true) => {
                if !self.survives_write(Pid::Ams(cluster)) {
                    return None;
                }
                self.write(cluster, InstanceRecord { pool: None, ..record.clone() });
            }
        }
        self.survives_write(Pid::Ams(cluster)).then_some(Step::Again)
    }

    fn fail(&mut self, cluster: usize, record: &InstanceRecord, text: String) {
        let observed = life::failed(record, text, self.wall(Pid::Ams(cluster)));
        if let Some(session) = record.session.streaming() {
            let session = session.session_id.clone();
            self.ledger.run_over(&session);
        }
        self.write(cluster, InstanceRecord { observed, ..record.clone() });
    }

    fn session_made(&mut self, cluster: usize, id: &InstanceId, made: Option<Result<SessionId, bool>>) {
        let Some(task) = self.ams[cluster].tasks.get_mut(id) else { return };
        task.busy = false;
        let watched = task.watched;
        let Some((record, _)) = self.ams[cluster].records.get(id).cloned() else {
            return self.stepped(cluster, id, Step::Again);
        };
        let step = match made {
            Some(Ok(session)) => {
                self.ledger.launched(&session, id, false);
                let next = record.with_session(check::streaming(&session));
                self.write(cluster, next);
                Step::Again
            }
            Some(Err(true)) | None if watched < START => Step::Retry,
            _ => {
                self.fail(cluster, &record, "no session for the instance".into());
                Step::Again
            }
        };
        if self.survives_write(Pid::Ams(cluster)) {
            self.stepped(cluster, id, step);
        }
    }

    fn session_ended(&mut self, cluster: usize, id: &InstanceId, ended: Option<Result<(), bool>>) {
        let Some(task) = self.ams[cluster].tasks.get_mut(id) else { return };
        task.busy = false;
        let watched = task.watched;
        let Some((mut record, _)) = self.ams[cluster].records.get(id).cloned() else {
            return self.stepped(cluster, id, Step::Again);
        };
        let transient = matches!(ended, None | Some(Err(true)));
        let step = if transient && watched < END_SESSION {
            Step::Retry
        } else {
            record.session = Session::Over;
            self.write(cluster, record);
            Step::Again
        };
        if self.survives_write(Pid::Ams(cluster)) {
            self.stepped(cluster, id, step);
        }
    }
}
