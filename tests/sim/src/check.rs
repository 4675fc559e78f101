//! What must always hold, and what is known from above to judge by: who was promised what, who asked for which end,
//! what ended by itself. The cores know nothing of this.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use fanlight_ams::cores::{
    life::{Phase, Seen},
    model::{ApplicationRef, InstanceRecord, Intent, Observed, Session as Streamed, Target},
    placement::Share,
};
use fanlight_api::{
    AgentId, InstanceId, SessionId,
    ams::{InstanceConfig, InstanceStatus, Resources},
    bus::{AgentReport, ReportedApplication},
    gateway::{Screen, SessionStatus},
    guest::Streaming,
};
use fanlight_gateway::cores::{
    agents::{Agents, Candidate, NoAgent, Wanted, Whereabouts},
    session::Session,
};

use crate::{
    rng::Rng,
    world::{Pid, World},
};

/// Least time an instance gets before its session is called failed, milliseconds.
const CREATION_MS: u64 = 300_000;

/// Time without faults after which nothing may be late any more.
const CALM_MS: u64 = 120_000;

/// Why an instance may end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// It died, ended, idled or never became ready.
    Itself,
    /// Somebody asked AMS for it.
    Operator,
    /// A newer attempt took its place.
    Superseded,
}

/// What is known of a session.
#[derive(Clone, Debug, Default)]
struct Facts {
    begun: u64,
    of_ams: bool,
    acknowledged: bool,
    /// Somebody who may asked for its end.
    end_wished: bool,
    /// A gateway gave it up before it was acknowledged, or by force.
    forgotten: bool,
    /// A run of its instance is over, or its instance could not be made.
    over: bool,
    /// Its instance runs, or did.
    ran: bool,
    instances: BTreeSet<InstanceId>,
    /// The cluster that its record named last.
    home: String,
    /// Since when it is active.
    active_since: Option<u64>,
}

/// What is known from above.
#[derive(Default)]
pub struct Ledger {
    sessions: BTreeMap<SessionId, Facts>,
    causes: BTreeMap<InstanceId, BTreeSet<Cause>>,
    owners: BTreeMap<InstanceId, SessionId>,
    repeats: BTreeMap<String, SessionId>,
    keys: BTreeMap<String, SessionId>,
    /// Instances of pools that launches got.
    handed_out: BTreeSet<InstanceId>,
    /// Since when nothing is broken.
    calm_since: Option<u64>,
}

impl Ledger {
    fn facts(&mut self, id: &SessionId) -> &mut Facts {
        self.sessions.entry(id.clone()).or_default()
    }

    /// A session is about to be.
    pub fn begin(&mut self, id: &SessionId, now: u64, of_ams: bool) {
        let facts = self.facts(id);
        facts.begun = now;
        facts.of_ams = of_ams;
    }

    /// Somebody who may asked for its end.
    pub fn end_wished(&mut self, id: &SessionId) {
        self.facts(id).end_wished = true;
    }

    /// A gateway gives it up.
    pub fn forgotten(&mut self, id: &SessionId) {
        self.facts(id).forgotten = true;
    }

    /// AMS has an instance for it. `refused`: there is no room.
    pub fn launched(&mut self, id: &SessionId, instance: &InstanceId, refused: bool) {
        self.owners.insert(instance.clone(), id.clone());
        let facts = self.facts(id);
        facts.instances.insert(instance.clone());
        facts.over |= refused;
    }

    /// A run of its instance has begun.
    pub fn runs(&mut self, id: &SessionId) {
        self.facts(id).ran = true;
    }

    /// A run of its instance is over, or none will be.
    pub fn run_over(&mut self, id: &SessionId) {
        self.facts(id).over = true;
    }

    /// A launch gets an instance of a pool. False: another one has got it already.
    pub fn handed_out(&mut self, instance: &InstanceId) -> bool {
        self.handed_out.insert(instance.clone())
    }

    /// An instance has a reason to end.
    pub fn cause(&mut self, instance: &InstanceId, cause: Cause) {
        self.causes.entry(instance.clone()).or_default().insert(cause);
    }

    /// Nothing is broken from now on.
    pub fn calm(&mut self, now: u64) {
        self.calm_since = Some(now);
    }

    fn is_calm_for(&self, now: u64, milliseconds: u64) -> bool {
        self.calm_since.is_some_and(|since| now >= since + milliseconds)
    }
}

impl World {
    /// A caller is told that it has a session: then the store has it, or somebody ended it meanwhile.
    pub fn judge_acknowledged(&mut self, id: &SessionId) {
        let there = self.store.sessions.contains_key(id);
        let facts = self.ledger.facts(id);
        facts.acknowledged = true;
        if !there && !facts.end_wished && !facts.over {
            self.violate(format!("session {id} is acknowledged and the store does not have it"));
        }
    }

    /// A new session is made for a key: then there is none of an earlier request.
    pub fn judge_key(&mut self, key: &str, id: &SessionId) {
        if let Some(before) = self.ledger.keys.insert(key.to_owned(), id.clone())
            && self.store.sessions.contains_key(&before)
        {
            self.violate(format!("{key} made {before} and, repeated, makes {id}"));
        }
    }

    /// A client waited in vain: then its instance was not there for it.
    pub fn judge_waited(&mut self, client: usize, id: &SessionId) {
        let now = self.now;
        let active = self.ledger.facts(id).active_since.is_some_and(|since| now >= since + 60_000);
        if active && self.ledger.is_calm_for(now, 60_000) {
            self.violate(format!(
                "client {client} of {id} hangs: it waited in vain, and everything was there"
            ));
        }
    }

    /// The same key is the same session, as long as that is there.
    pub fn judge_repeat(&mut self, key: &str, id: &SessionId) {
        if let Some(before) = self.ledger.repeats.insert(key.to_owned(), id.clone())
            && before != *id
            && self.store.sessions.contains_key(&before)
        {
            self.violate(format!("{key} made {before} and, repeated, made {id}"));
        }
        // Only one session of a key may ever be there.
        if let Some((known, _)) = self.store.repeats.get(key)
            && known != id
            && self.store.sessions.contains_key(id)
            && self.store.sessions.contains_key(known)
        {
            self.violate(format!("{key} has the sessions {known} and {id}"));
        }
    }

    /// A record was written: no session that somebody was promised may be lost.
    pub fn judge_record(&mut self, id: &SessionId, before: Option<&Session>, after: Option<&Session>) {
        if let Some(after) = after {
            let now = self.now;
            let facts = self.ledger.facts(id);
            facts.home.clone_from(&after.cluster_id);
            match after.status {
                SessionStatus::Active => facts.active_since = facts.active_since.or(Some(now)),
                _ => facts.active_since = None,
            }
        }
        let Some(before) = before else { return };
        if let Some(after) = after
            && after.used_generation < before.used_generation
        {
            self.violate(format!("{id}: generation {} was used and is not any more", before.used_generation));
        }
        if after.is_some_and(|after| after.generation < before.generation) {
            self.violate(format!("{id}: the token of generation {} would be made twice", before.generation));
        }
        if let Some(after) = after
            && before.ending.is_some()
            && after.is_live()
        {
            self.violate(format!("{id}: the wish to end it was lost"));
        }
        if !before.is_live() {
            return;
        }
        let now = self.now;
        let facts = self.ledger.facts(id);
        let promised = facts.acknowledged || facts.of_ams;
        if !promised || facts.end_wished || facts.forgotten {
            return;
        }
        let (mut over, begun, of_ams) = (facts.over, facts.begun, facts.of_ams);
        let instances = facts.instances.clone();
        over |= instances.iter().any(|id| self.ledger.causes.contains_key(id));
        match after.map(|after| after.status) {
            None | Some(SessionStatus::Terminated) if !over => {
                self.violate(format!("session {id} is lost: nobody ended it and its instance did not end"));
            }
            // Of AMS's own instances AMS may have given up before it heard of the session.
            Some(SessionStatus::Error) if !over && !of_ams && self.ledger.is_calm_for(now, CALM_MS) => {
                self.violate(format!("session {id} was not launched although nothing was broken for long"));
            }
            Some(SessionStatus::Error) if !over && now < begun + CREATION_MS => {
                self.violate(format!(
                    "session {id} is called failed after {} s although nothing failed",
                    (now - begun) / 1000
                ));
            }
            _ => {}
        }
    }

    /// Before the engine ends an instance: it must be somebody's wish.
    pub fn judge_end(&mut self, cluster: usize, instance: &InstanceId) {
        let Some(running) = self.engines[cluster].instances.get(instance) else { return };
        let Some(streamer) =
            running.streamer.as_ref().filter(|_| matches!(running.phase, Phase::Starting | Phase::Ready))
        else {
            return;
        };
        let session = streamer.session.clone();
        let watched = streamer.watcher.is_some();
        let caused = self.ledger.causes.get(instance).is_some_and(|causes| !causes.is_empty());
        let facts = self.ledger.facts(&session);
        let elsewhere = facts.home != cluster_id(cluster);
        // A create that nobody was told of may be undone.
        let undone = !facts.of_ams && (!facts.acknowledged || facts.forgotten);
        if facts.end_wished || caused || undone || elsewhere {
            return;
        }
        self.violate(format!(
            "instance {instance} of {session} is ended and nobody asked for it{}",
            if watched { "; somebody was watching" } else { "" }
        ));
    }

    /// AMS calls an instance failed or stopped: then it is so, or time is up.
    pub fn judge_observed(&mut self, cluster: usize, record: &InstanceRecord, next: &Observed, seen: &Seen) {
        let timed_out = next.status == InstanceStatus::Error && seen.phase.is_live();
        if !timed_out {
            return;
        }
        self.ledger.cause(&record.id, Cause::Itself);
        if let Some(streaming) = record.session.streaming() {
            let session = streaming.session_id.clone();
            self.ledger.run_over(&session);
        }
        // What waits may be ready for ever, and yet not be told in time whose it is.
        if seen.phase == Phase::Ready && !record.is_claimed() {
            self.violate(format!("AMS {cluster} gives up on {}, which is ready", record.id));
        }
    }

    /// After each write of AMS: shares are promised once and within what there is, and a session has one instance.
    pub fn judge_ams(&mut self, cluster: usize) {
        let ams = &self.ams[cluster];
        let mut wrong = None;
        let mut sessions: BTreeSet<&SessionId> = BTreeSet::new();
        let mut used = Share::default();
        let mut places = BTreeSet::new();
        for (record, _) in ams.records.values() {
            let holds = record.holds_resources();
            if holds {
                used.cpus += record.share().cpus;
            }
            let share = ams.allocations.instances.get(&record.id);
            if share.is_some_and(|share| !places.insert(share.place)) {
                wrong = Some(format!("AMS {cluster}: {} has the place of another instance", record.id));
            }
            if holds != share.is_some_and(|share| share.cpus > 0) {
                wrong = Some(format!(
                    "AMS {cluster}: {} holds a share: {holds}, its node says otherwise",
                    record.id
                ));
            }
            if let Some(streaming) = record.session.streaming()
                && record.intent.target != Target::Deleted
                && !sessions.insert(&streaming.session_id)
            {
                wrong = Some(format!("AMS {cluster} has two instances of {}", streaming.session_id));
            }
        }
        if f64::from(used.cpus) > ams.offer.cpus {
            wrong = Some(format!("AMS {cluster} promised {} CPUs of {}", used.cpus, ams.offer.cpus));
        }
        if let Some(wrong) = wrong {
            self.violate(wrong);
        }
    }
}

// --- values that the cores want, with as little in them as they need -----------------------------------------

/// The agent of a cluster.
pub fn agent_id(cluster: usize) -> AgentId {
    format!("a{cluster}").parse().expect("a valid id")
}

/// The name of a cluster.
pub fn cluster_id(cluster: usize) -> String {
    format!("c{cluster}")
}

thread_local! {
    // Made from JSON, so that fields that do not matter here need not be named here.
    static SESSION: Session = serde_json::from_value(serde_json::json!({
        "id": "s0", "app": "app", "region": "here", "cluster_id": "c0", "agent_id": "a0",
        "screen": Screen::default(), "joinable": true, "ephemeral": true, "idle_time_min": 0,
        "attempt": 1, "status": "created", "created_at": 0, "generation": 0,
    })).expect("the fields of a session");
    static AGENT_REPORT: AgentReport = serde_json::from_value(serde_json::json!({
        "version": 1, "agent_id": "a0", "incarnation": "x", "region": "here", "cluster_id": "c0",
        "applications": [], "ams_reachable": false,
    })).expect("the fields of a report");
    static APPLICATION: ReportedApplication = serde_json::from_value(serde_json::json!({
        "name": "app", "versions": [0], "published": 0,
    })).expect("the fields of an application");
    static STREAMING: Streaming = serde_json::from_value(serde_json::json!({
        "session_id": "s0", "agent_url": "", "token": "", "joinable": true,
    })).expect("the fields of a guest file");
}

/// A session record to be filled.
pub fn blank_session() -> Session {
    SESSION.with(Session::clone)
}

/// A report to be filled.
pub fn blank_agent_report() -> AgentReport {
    AGENT_REPORT.with(AgentReport::clone)
}

/// The one application.
pub fn application() -> ReportedApplication {
    APPLICATION.with(ReportedApplication::clone)
}

/// What an instance gets of a session that waits for clients for ever.
pub fn streaming(session: &SessionId) -> Streaming {
    Streaming { session_id: session.clone(), ..STREAMING.with(Streaming::clone) }
}

/// A new instance of one CPU that should run.
pub fn blank_record(id: InstanceId, now: i64, session: Streamed) -> InstanceRecord {
    InstanceRecord {
        name: id.to_string(),
        id,
        created_at: now,
        application: Some(ApplicationRef {
            id: "app".parse().expect("a valid id"),
            name: "app".into(),
            version: 0,
        }),
        program: Default::default(),
        config: InstanceConfig::default(),
        display: Screen::default(),
        resources: Resources { cpus: 1, memory: 1 << 30, ..Resources::default() },
        tags: Vec::new(),
        user_data: None,
        image: Default::default(),
        services: Vec::new(),
        base: false,
        copy_of: None,
        addons: Vec::new(),
        pool: None,
        encoder: Default::default(),
        place: 0,
        gpu: None,
        node: None,
        architecture: String::new(),
        session,
        intent: Intent { target: Target::Running, run: 1, force: false, since: now },
        observed: Observed {
            status: InstanceStatus::Created,
            run: 0,
            message: String::new(),
            error: String::new(),
            since: now,
        },
    }
}

/// The choice of agents, as a create asks for it.
pub fn choose(agents: &Agents, now: Instant, rng: &mut Rng) -> Result<Vec<Candidate>, NoAgent> {
    agents.choose(now, Wanted { app: "app", version: None, region: "", client: Whereabouts::Unknown }, || {
        rng.float()
    })
}

/// Whether a process is one that may be ended.
pub fn is_program(pid: Pid) -> bool {
    matches!(pid, Pid::Gateway(_) | Pid::Agent(_) | Pid::Ams(_))
}
