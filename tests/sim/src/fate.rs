//! What happens to the world: faults, people, and at last the rest in which everything must agree.

use std::collections::BTreeMap;

use fanlight_ams::cores::{
    life::Phase,
    model::{Session as Streamed, Target},
};
use fanlight_api::{InstanceId, SessionId, ams::InstanceStatus, bus::InstanceState, gateway::SessionStatus};
use fanlight_gateway::cores::session::Origin;

use crate::{
    check,
    client::Stage,
    note,
    world::{Pid, Timer, Weather, World},
};

/// Fewest events before the rest, timers not counted.
pub const LEAST_EVENTS: u64 = 500;
const LEAST_MS: u64 = 90_000;
const MOST_MS: u64 = 240_000;
/// How long everything may take to agree once nothing is broken: a session that was never launched is given up
/// after 300 s.
const AGREE_MS: u64 = 420_000;
/// How long everything may take to be gone once everybody was asked to go.
const GONE_MS: u64 = 150_000;
/// How long nothing may change at rest.
const STILL_MS: u64 = 12_000;

impl World {
    /// Lives through a seed. The result is what is broken, if anything.
    pub fn live(&mut self) -> Result<(), String> {
        let mut until = LEAST_MS;
        while self.violation().is_none() && until <= MOST_MS {
            self.run_until(until);
            if self.events >= LEAST_EVENTS {
                break;
            }
            until += 5000;
        }
        self.calm_down();
        self.rest("agree", AGREE_MS, Self::disagreements);
        self.everybody_goes();
        self.rest("be gone", GONE_MS, Self::leftovers);
        match self.violation() {
            Some(text) => Err(text.to_owned()),
            None => Ok(()),
        }
    }

    /// Nothing is broken from now on.
    fn calm_down(&mut self) {
        note!(self, "--- nothing is broken from now on");
        self.calm = true;
        let now = self.now;
        self.ledger.calm(now);
        self.weather = Weather::FAIR;
        for (a, b) in self.cuts() {
            self.block(a, b, false);
        }
        for pid in self.everybody() {
            self.start(pid);
        }
    }

    /// Waits until nothing is wrong any more, and that for a while.
    fn rest(&mut self, what: &str, most: u64, wrong: fn(&mut World) -> Vec<String>) {
        let deadline = self.now + most;
        let mut good_since = None;
        while self.violation().is_none() {
            let until = self.now + 1000;
            self.run_until(until);
            if (self.now / 1000).is_multiple_of(15) && what == "be gone" {
                // Records of what has ended are kept for people to read; they remove them when they have.
                self.sweep_records();
            }
            let list = wrong(self);
            if list.is_empty() {
                let since = *good_since.get_or_insert(self.now);
                if self.now >= since + STILL_MS {
                    return;
                }
            } else {
                good_since = None;
                if self.now >= deadline {
                    return self.violate(format!("at rest not all views {what}: {}", list.join("; ")));
                }
            }
        }
    }

    /// Owners end all their sessions, and operators their instances.
    fn everybody_goes(&mut self) {
        if self.violation().is_some() {
            return;
        }
        note!(self, "--- everybody goes");
        for ams in &mut self.ams {
            ams.pool = 0;
        }
        self.sweep_out();
    }

    fn sweep_out(&mut self) {
        let sessions: Vec<(SessionId, Origin)> =
            self.store.sessions.iter().map(|(id, (session, _))| (id.clone(), session.origin)).collect();
        for (id, origin) in sessions {
            if origin == Origin::Gateway {
                self.person_deletes(id);
            }
        }
        for cluster in 0..self.ams.len() {
            let ids: Vec<InstanceId> = self.ams[cluster]
                .records
                .values()
                .filter(|(record, _)| !matches!(record.session, Streamed::Given { .. }))
                .map(|(record, _)| record.id.clone())
                .collect();
            for id in ids {
                self.operator_deletes(cluster, &id);
            }
        }
    }

    fn sweep_records(&mut self) {
        let over: Vec<SessionId> = self
            .store
            .sessions
            .values()
            .filter(|(session, _)| {
                session.origin == Origin::Gateway
                    && matches!(session.status, SessionStatus::Terminated | SessionStatus::Error)
            })
            .map(|(session, _)| session.id.clone())
            .collect();
        for id in over {
            self.person_deletes(id);
        }
    }

    fn operator_deletes(&mut self, cluster: usize, id: &InstanceId) {
        if self.process(Pid::Ams(cluster)).up {
            self.ledger.cause(id, check::Cause::Operator);
            if let Some((record, _)) = self.ams[cluster].records.get(id)
                && let Some(streaming) = record.session.streaming()
            {
                let session = streaming.session_id.clone();
                self.ledger.end_wished(&session);
            }
            self.ams_delete(cluster, id, false);
        }
    }

    // --- the rest --------------------------------------------------------------------------------------------

    /// Where the views of store, units, agents, AMS and engines differ.
    fn disagreements(&mut self) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut live: BTreeMap<&SessionId, Vec<(usize, &InstanceId)>> = BTreeMap::new();
        for (cluster, engine) in self.engines.iter().enumerate() {
            for (id, running) in &engine.instances {
                if !running.phase.is_live() {
                    continue;
                }
                let waits = match self.ams[cluster].records.get(id) {
                    Some((record, _)) if record.intent.target != Target::Deleted => record.is_waiting(),
                    _ => {
                        wrong.push(format!("instance {id} runs and AMS does not want it"));
                        false
                    }
                };
                if running.phase != Phase::Ready {
                    wrong.push(format!("instance {id} is {:?}", running.phase));
                }
                match &running.streamer {
                    Some(_) if waits => wrong.push(format!("instance {id} waits and has a session")),
                    Some(streamer) => {
                        live.entry(&streamer.session).or_default().push((cluster, id));
                        if streamer.connection.is_none() {
                            wrong.push(format!("the streamer of {id} is not connected"));
                        }
                    }
                    None if waits => {}
                    None => wrong.push(format!("instance {id} runs for nobody")),
                }
            }
        }
        for (session, instances) in &live {
            let record = self.store.sessions.get(*session).map(|(record, _)| record);
            match (record, &instances[..]) {
                (None, _) => wrong.push(format!("{session} runs and nobody owns it: {instances:?}")),
                (Some(record), [(cluster, id)]) => {
                    if record.status != SessionStatus::Active {
                        wrong.push(format!("{session} runs and is {:?}: {}", record.status, record.message));
                    }
                    if record.cluster_id != check::cluster_id(*cluster)
                        || record.instance_id.as_ref() != Some(*id)
                    {
                        wrong.push(format!(
                            "{session} runs as {id} and its record has {:?}",
                            record.instance_id
                        ));
                    }
                }
                (Some(_), several) => wrong.push(format!("{session} runs several times: {several:?}")),
            }
        }
        for (id, (session, revision)) in &self.store.sessions {
            match session.status {
                SessionStatus::Active if !live.contains_key(id) => {
                    wrong.push(format!("{id} is active and does not run"));
                }
                SessionStatus::Created | SessionStatus::Terminating => {
                    wrong.push(format!("{id} is still {:?}: {}", session.status, session.message));
                }
                _ => {}
            }
            for (unit, one) in self.units.iter().enumerate() {
                if one.index.get(id).map(|(_, revision)| revision) != Some(revision) {
                    wrong.push(format!("unit {unit} does not know {id} as it is"));
                }
            }
        }
        for (unit, one) in self.units.iter().enumerate() {
            if one.index.len() != self.store.sessions.len() {
                wrong.push(format!("unit {unit} knows sessions that are gone"));
            }
        }
        for cluster in 0..self.ams.len() {
            if !self.pool_is_settled(cluster) {
                wrong.push(format!("the pool of AMS {cluster} is not filled, or has too many"));
            }
        }
        for (cluster, ams) in self.ams.iter().enumerate() {
            for (record, _) in ams.records.values() {
                let phase = self.engines[cluster].seen(&record.id).phase;
                let agrees = match record.observed.status {
                    InstanceStatus::Running => phase == Phase::Ready,
                    InstanceStatus::Stopped | InstanceStatus::Error => !phase.is_live(),
                    _ => false,
                };
                if !agrees || record.intent.target == Target::Deleted {
                    wrong.push(format!(
                        "AMS has {} as {:?}, wants it {:?}, and it is {phase:?}",
                        record.id, record.observed.status, record.intent.target
                    ));
                }
                if let Streamed::Given { streaming } = &record.session
                    && !self.store.sessions.contains_key(&streaming.session_id)
                {
                    wrong.push(format!("AMS keeps {} of {}, which is over", record.id, streaming.session_id));
                }
            }
        }
        for (number, client) in self.clients.iter().enumerate() {
            if !matches!(client.stage, Stage::Owner | Stage::Watching | Stage::Away) {
                wrong.push(format!("client {number} of {:?} hangs: {:?}", client.session, client.stage));
            }
        }
        // Asking an agent is a whole report of it, so it is asked only when everything else is settled.
        if wrong.is_empty() { self.agents_disagree() } else { wrong }
    }

    /// What is left although everybody went.
    fn leftovers(&mut self) -> Vec<String> {
        let mut wrong = Vec::new();
        for (cluster, engine) in self.engines.iter().enumerate() {
            wrong.extend(engine.instances.keys().map(|id| format!("the engine of {cluster} has {id}")));
            wrong.extend(self.ams[cluster].records.keys().map(|id| format!("AMS {cluster} has {id}")));
            if !self.ams[cluster].allocations.instances.is_empty() {
                wrong.push(format!("AMS {cluster} has promised shares"));
            }
        }
        wrong.extend(self.store.sessions.values().map(|(session, _)| {
            format!("the store has {} as {:?}: {}", session.id, session.status, session.message)
        }));
        for (unit, one) in self.units.iter().enumerate() {
            wrong.extend(one.index.keys().map(|id| format!("unit {unit} has {id}")));
        }
        wrong
    }

    /// Agents see each session of the store that runs, as it is, and no other.
    fn agents_disagree(&mut self) -> Vec<String> {
        let mut wrong = Vec::new();
        for cluster in 0..self.agents.len() {
            let mut running = BTreeMap::new();
            for report in self.agents[cluster].sessions.report_all() {
                if !matches!(
                    report.state,
                    InstanceState::Gone | InstanceState::Failed | InstanceState::Stopped
                ) {
                    running.insert(report.session_id, (report.state, report.instance_id));
                }
            }
            let name = check::cluster_id(cluster);
            let active: Vec<_> = self
                .store
                .sessions
                .values()
                .filter(|(session, _)| session.cluster_id == name && session.status == SessionStatus::Active)
                .map(|(session, _)| (session.id.clone(), session.instance_id.clone()))
                .collect();
            for (id, instance) in active {
                let seen = running.remove(&id);
                if seen != Some((InstanceState::Running, instance)) {
                    wrong.push(format!("{id} is active and agent {cluster} sees {seen:?}"));
                }
            }
            if let Some((id, seen)) = running.first_key_value() {
                wrong.push(format!("agent {cluster} sees {id} as {seen:?}, and it is not active"));
            }
        }
        wrong
    }

    // --- faults and people -----------------------------------------------------------------------------------

    /// A timer of fate.
    pub fn fate(&mut self, timer: Timer) {
        match timer {
            Timer::Restart(pid) => self.start(pid),
            Timer::Heal(a, b) => {
                note!(self, "places {a} and {b} reach each other again");
                self.block(a, b, false);
            }
            Timer::Fault if !self.calm => {
                self.fault();
                let next = self.rng.between(500, 8000);
                self.timer_in(Pid::Fate, next, Timer::Fault);
            }
            Timer::Person if !self.calm => {
                self.person();
                let next = self.rng.between(200, 4000);
                self.timer_in(Pid::Fate, next, Timer::Person);
            }
            _ => {}
        }
    }

    fn fault(&mut self) {
        let all = self.everybody();
        let Some(pid) = self.rng.pick(&all).copied() else { return };
        match self.rng.below(13) {
            0 | 1 => self.crash(pid),
            12 => {
                // The machine of a cluster's programs starts anew, and AMS takes its time.
                let cluster = self.rng.below(self.ams.len() as u64) as usize;
                self.crash(Pid::Agent(cluster));
                self.crash(Pid::Ams(cluster));
                let long = self.rng.between(1000, 25_000);
                self.freeze_next(Pid::Ams(cluster), long);
            }
            2..=4 => {
                let cuts = self.cuts();
                if let Some((a, b)) = self.rng.pick(&cuts).copied() {
                    note!(self, "places {a} and {b} are cut off from each other");
                    self.block(a, b, true);
                    let long = if self.rng.chance(0.2) { 40_000 } else { 8000 };
                    let heal = 200 + self.rng.below(long);
                    self.timer_in(Pid::Fate, heal, Timer::Heal(a, b));
                }
            }
            5 => {
                let jump = [-3600, -60, -5, 5, 60, 400, 3600][self.rng.below(7) as usize];
                note!(self, "the clock of {pid:?} jumps by {jump} s");
                self.jump(pid, jump);
            }
            6 => {
                let long = self.rng.between(200, 12_000);
                note!(self, "{pid:?} does nothing for {long} ms");
                self.freeze(pid, long);
            }
            7 | 8 => {
                // An instance dies, or its application ends.
                let live: Vec<(usize, InstanceId)> = self
                    .engines
                    .iter()
                    .enumerate()
                    .flat_map(|(cluster, engine)| {
                        engine.instances.iter().map(move |(id, running)| (cluster, id, running))
                    })
                    .filter(|(_, _, running)| running.phase.is_live())
                    .map(|(cluster, id, _)| (cluster, id.clone()))
                    .collect();
                if let Some((cluster, id)) = self.rng.pick(&live).cloned() {
                    let gracefully = self.rng.chance(0.5);
                    self.instance_dies(cluster, &id, gracefully);
                }
            }
            9 => {
                if let Pid::Agent(cluster) = pid
                    && self.process(pid).up
                {
                    self.agent_leaves(cluster);
                }
            }
            10 => {
                if let Pid::Gateway(unit) = pid {
                    let long = self.rng.between(500, 12_000);
                    note!(self, "the watch of unit {unit} tells nothing for {long} ms");
                    self.units[unit].watch_stalled_until = self.now + long;
                }
            }
            _ => {
                let connections: Vec<u64> = self.connections.keys().copied().collect();
                if let Some(number) = self.rng.pick(&connections).copied() {
                    self.doom_connection(number, 5000);
                }
                let sockets: Vec<u64> = self.sockets.keys().copied().collect();
                if let Some(number) = self.rng.pick(&sockets).copied() {
                    self.doom_socket(number, 5000);
                }
            }
        }
    }

    fn person(&mut self) {
        let sessions: Vec<SessionId> = self.store.sessions.keys().cloned().collect();
        let cluster = self.rng.below(self.ams.len() as u64) as usize;
        match self.rng.below(20) {
            0..=9 => self.person_creates(),
            10..=12 => {
                if let Some(session) = self.rng.pick(&sessions).cloned() {
                    self.person_joins(session);
                }
            }
            13..=15 => {
                if let Some(session) = self.rng.pick(&sessions).cloned() {
                    self.person_deletes(session);
                }
            }
            16 => {
                self.ams_create(cluster);
            }
            _ => {
                let own: Vec<InstanceId> = self.ams[cluster]
                    .records
                    .values()
                    .filter(|(record, _)| !matches!(record.session, Streamed::Given { .. }))
                    .map(|(record, _)| record.id.clone())
                    .collect();
                if let Some(id) = self.rng.pick(&own).cloned() {
                    match self.rng.below(3) {
                        0 => self.operator_deletes(cluster, &id),
                        1 => self.ams_switch(cluster, &id, false),
                        _ => self.ams_switch(cluster, &id, true),
                    }
                }
            }
        }
    }
}
