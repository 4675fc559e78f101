//! Which instances wait for a launch, and which launch may have one. Pure functions: they decide about records, the
//! store decides who was first.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use fanlight_api::{InstanceId, ams::InstanceStatus, ams::PoolState, ams::Service, guest::PoolStart};

use super::{
    model::{InstanceRecord, Intent, Observed, Pooled, Session, Target},
    placement::{self, Allocations, Offer, Strategy, Wish},
};

/// Most instances of one pool that boot at the same time: launches come first.
const BOOTING: usize = 4;
/// Pauses after an instance of a pool failed.
const FIRST_PAUSE: Duration = Duration::from_secs(2);
const LAST_PAUSE: Duration = Duration::from_secs(300);
/// Without a failure for so long after the last pause, the next one is a first one again.
const CALM: Duration = Duration::from_secs(120);

/// What is to be done about the pool of an application.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// These go.
    pub remove: Vec<InstanceId>,
    /// How many of them failed by themselves.
    pub failed: usize,
    /// So many may be made now.
    pub make: usize,
    /// Some are missing, now or later.
    pub missing: bool,
}

/// Compares what waits for an application with what should. `wanted`: as one would be made now, and how many; none:
/// there is nothing to be launched.
pub fn plan(wanted: Option<(&InstanceRecord, u32)>, waiting: &[&InstanceRecord]) -> Plan {
    let mut plan = Plan::default();
    let mut good: Vec<&InstanceRecord> = Vec::new();
    for record in
        waiting.iter().filter(|record| record.is_waiting() && record.intent.target != Target::Deleted)
    {
        let over = record.observed.run == record.intent.run
            && matches!(record.observed.status, InstanceStatus::Error | InstanceStatus::Stopped);
        let failed = over && record.intent.target == Target::Running;
        plan.failed += usize::from(failed);
        let current = wanted.is_some_and(|(template, _)| is_alike(record, template))
            && record.pool == wanted.and_then(|(template, _)| template.pool);
        if current && !failed && record.intent.target == Target::Running {
            good.push(record);
        } else if !record.config.security.delete_protected {
            plan.remove.push(record.id.clone());
        }
    }
    let size = wanted.map_or(0, |(_, size)| size as usize);
    // Those that are ready stay rather than those that boot, the older rather than the younger.
    good.sort_by_key(|record| (!is_ready(record), record.created_at, record.id.clone()));
    let surplus = good.iter().skip(size).filter(|record| !record.config.security.delete_protected);
    plan.remove.extend(surplus.map(|record| record.id.clone()));
    let missing = size.saturating_sub(good.len());
    let booting = good.iter().take(size).filter(|record| !is_ready(record)).count();
    plan.missing = missing > 0;
    plan.make = missing.min(BOOTING.saturating_sub(booting));
    plan
}

fn is_ready(record: &InstanceRecord) -> bool {
    record.observed.status == InstanceStatus::Running && record.observed.run == record.intent.run
}

/// Whether both run the same, in the same room.
fn is_alike(one: &InstanceRecord, other: &InstanceRecord) -> bool {
    one.application == other.application
        && one.program == other.program
        && one.image == other.image
        && one.resources == other.resources
        && one.encoder == other.encoder
        && one.services.iter().map(asked).eq(other.services.iter().map(asked))
}

/// A service without the ports that it was given.
fn asked(service: &Service) -> Service {
    Service { node_port: 0, node_port_end: 0, ..service.clone() }
}

/// Whether a launch can have an instance that waits. `nodes`: where the launch may go.
pub fn can_have(waiting: &InstanceRecord, launch: &InstanceRecord, nodes: &[&Offer]) -> bool {
    let Some(pool) = waiting.pool.filter(|_| waiting.is_waiting()) else { return false };
    let extra_data = launch.session.streaming().is_some_and(|streaming| !streaming.extra_data.is_null());
    let has_data = launch.user_data.is_some() || extra_data;
    waiting.intent.target == Target::Running
        && is_ready(waiting)
        && !waiting.config.security.delete_protected
        && launch.intent.target == Target::Running
        && !launch.base
        && launch.copy_of.is_none()
        && !launch.config.devmode
        && (pool.start == PoolStart::Streamer || !has_data)
        && is_alike(waiting, launch)
        && nodes.iter().any(|offer| waiting.node.as_ref() == Some(&offer.node))
}

/// The nodes on which an instance that runs already can be handed out.
pub fn usable<'a>(wish: &Wish, offers: impl IntoIterator<Item = &'a Offer>) -> Vec<&'a Offer> {
    offers
        .into_iter()
        .filter(|offer| offer.online && !offer.unschedulable)
        .filter(|offer| wish.pin.is_none() && wish.selector.iter().all(|tag| offer.tags.contains(tag)))
        .collect()
}

/// An instance that waited, as the launch has it from now on.
pub fn claim(waiting: &InstanceRecord, launch: &InstanceRecord, now: i64) -> InstanceRecord {
    // A name that nobody chose says nothing.
    let unnamed = launch.name.ends_with(launch.id.as_str());
    InstanceRecord {
        name: if unnamed { waiting.name.clone() } else { launch.name.clone() },
        created_at: now,
        config: launch.config.clone(),
        display: launch.display,
        tags: launch.tags.clone(),
        user_data: launch.user_data.clone(),
        session: launch.session.clone(),
        pool: waiting.pool.map(|pool| Pooled { state: PoolState::Claimed, ..pool }),
        intent: Intent { since: now, ..waiting.intent.clone() },
        // It runs for its owner only when it has been told.
        observed: Observed {
            status: InstanceStatus::Started,
            message: String::new(),
            error: String::new(),
            since: now,
            ..waiting.observed.clone()
        },
        ..waiting.clone()
    }
}

/// Which waiting instances make room for a launch when they go: as few as possible, all of one node. None: there would
/// be no room without all of them either. Empty: enough of them are going already.
pub fn make_room(
    wish: &Wish,
    strategy: Strategy,
    nodes: &[(Offer, Allocations)],
    waiting: &[&InstanceRecord],
) -> Option<Vec<InstanceId>> {
    let mut best: Option<Vec<InstanceId>> = None;
    for (offer, allocations) in nodes {
        let mut left = allocations.clone();
        let mut here: Vec<&&InstanceRecord> = waiting
            .iter()
            .filter(|record| record.is_waiting() && left.instances.contains_key(&record.id))
            .collect();
        // Those that go anyway cost nothing; of the others the youngest has been of least use so far.
        here.sort_by_key(|record| {
            (record.intent.target != Target::Deleted, std::cmp::Reverse(record.created_at), record.id.clone())
        });
        let mut going = Vec::new();
        for record in here {
            left.instances.remove(&record.id);
            if record.intent.target != Target::Deleted {
                going.push(record.id.clone());
            }
            if placement::place(wish, strategy, [(offer, &left.used())]).is_ok() {
                if best.as_ref().is_none_or(|best| going.len() < best.len()) {
                    best = Some(going);
                }
                break;
            }
        }
    }
    best
}

/// A record for a pool: like a launch of nobody.
pub fn waiting(mut record: InstanceRecord, start: PoolStart) -> InstanceRecord {
    record.session = Session::None;
    record.pool = Some(Pooled { state: PoolState::Waiting, start });
    record
}

/// When instances of a pool may be made again after some failed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Backoff {
    failures: u32,
    until: Option<Instant>,
}

impl Backoff {
    /// Some failed.
    pub fn failed(&mut self, now: Instant) {
        if self.until.is_some_and(|until| now >= until + CALM) {
            self.failures = 0;
        }
        let pause = FIRST_PAUSE.saturating_mul(1 << self.failures.min(16)).min(LAST_PAUSE);
        self.failures += 1;
        self.until = Some(now + pause);
    }

    /// Nothing is made for this time; it is nobody's failure.
    pub fn pause(&mut self, now: Instant, pause: Duration) {
        self.until = self.until.max(Some(now + pause));
    }

    /// How long nothing is to be made.
    pub fn wait(&self, now: Instant) -> Option<Duration> {
        self.until.and_then(|until| until.checked_duration_since(now)).filter(|wait| !wait.is_zero())
    }
}

/// The waiting instances among these, by application.
pub fn by_application<'a>(
    records: impl IntoIterator<Item = &'a InstanceRecord>,
) -> BTreeMap<fanlight_api::ApplicationId, Vec<&'a InstanceRecord>> {
    let mut found: BTreeMap<_, Vec<&InstanceRecord>> = BTreeMap::new();
    for record in records.into_iter().filter(|record| record.is_waiting()) {
        if let Some(application) = &record.application {
            found.entry(application.id.clone()).or_default().push(record);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::core::placement::{Share, Used};

    /// A waiting instance that is ready.
    fn ready(id: &str) -> InstanceRecord {
        serde_json::from_value(json!({
            "id": id, "name": format!("ams-{id}"), "created_at": 100,
            "application": {"id": "a1", "name": "terminal", "version": 3},
            "program": {"name": "terminal", "command": ["foot"]}, "config": {},
            "display": {"width": 1280, "height": 720, "fps": 60, "density": 240},
            "resources": {"cpus": 1, "memory": 1}, "tags": [], "node": "n1", "architecture": "",
            "pool": {"state": "waiting", "start": "streamer"},
            "session": {"state": "none"},
            "intent": {"target": "running", "run": 1, "since": 100},
            "observed": {"status": "running", "run": 1, "since": 101},
        }))
        .expect("a record")
    }

    fn with(id: &str, change: impl FnOnce(&mut InstanceRecord)) -> InstanceRecord {
        let mut record = ready(id);
        change(&mut record);
        record
    }

    fn booting(id: &str) -> InstanceRecord {
        with(id, |record| record.observed.status = InstanceStatus::Started)
    }

    fn failed(id: &str) -> InstanceRecord {
        with(id, |record| record.observed.status = InstanceStatus::Error)
    }

    fn planned(size: u32, waiting: &[InstanceRecord]) -> Plan {
        plan(Some((&ready("template"), size)), &waiting.iter().collect::<Vec<_>>())
    }

    fn ids(ids: &[&str]) -> Vec<InstanceId> {
        ids.iter().map(|id| id.parse().expect("valid")).collect()
    }

    #[test]
    fn what_is_missing_is_made_a_few_at_a_time() {
        assert_eq!(planned(0, &[]), Plan::default());
        assert_eq!((planned(2, &[]).make, planned(100, &[]).make), (2, BOOTING));
        let boots: Vec<_> = (0..3).map(|number| booting(&format!("i{number}"))).collect();
        assert_eq!(planned(100, &boots).make, BOOTING - 3);
        let one = planned(2, &[ready("i1")]);
        assert_eq!((one.make, one.missing, one.remove.len()), (1, true, 0));
        let full = planned(2, &[ready("i1"), booting("i2")]);
        assert_eq!(full, Plan::default());
    }

    #[test]
    fn what_is_too_much_or_of_another_version_goes_and_what_is_ready_stays_longest() {
        let all = [booting("i1"), ready("i2"), ready("i3")];
        assert_eq!(planned(2, &all).remove, ids(&["i1"]));
        assert_eq!(planned(0, &all).remove.len(), 3);
        let old = with("i4", |record| {
            record.application.iter_mut().for_each(|application| application.version = 2);
        });
        let plan_of = planned(1, std::slice::from_ref(&old));
        assert_eq!((plan_of.remove, plan_of.make, plan_of.failed), (ids(&["i4"]), 1, 0));
        let other_start = with("i5", |record| {
            record.pool.iter_mut().for_each(|pool| pool.start = PoolStart::Application);
        });
        assert_eq!(planned(1, &[other_start]).remove, ids(&["i5"]));
        // Without anything to be launched nothing waits, and what somebody protects stays.
        let kept = with("i6", |record| record.config.security.delete_protected = true);
        assert_eq!(plan(None, &[&old, &kept]).remove, ids(&["i4"]));
    }

    #[test]
    fn what_failed_goes_and_is_counted_and_what_was_stopped_is_not() {
        let stopped = with("i2", |record| {
            record.intent.target = Target::Stopped;
            record.observed.status = InstanceStatus::Stopped;
        });
        let going = with("i3", |record| record.intent.target = Target::Deleted);
        let plan = planned(3, &[failed("i1"), stopped, going, ready("i4")]);
        assert_eq!((plan.remove, plan.failed, plan.make), (ids(&["i1", "i2"]), 1, 2));
    }

    #[test]
    fn pauses_grow_with_failures_and_are_forgotten_when_all_is_well() {
        let start = Instant::now();
        let mut backoff = Backoff::default();
        assert_eq!(backoff.wait(start), None);
        let mut pauses = Vec::new();
        let mut now = start;
        for _ in 0..12 {
            backoff.failed(now);
            let pause = backoff.wait(now).expect("a pause");
            pauses.push(pause.as_secs());
            now += pause;
            assert_eq!(backoff.wait(now), None);
        }
        assert_eq!(pauses[..4], [2, 4, 8, 16]);
        assert_eq!(pauses.last(), Some(&300));
        backoff.failed(now + CALM);
        assert_eq!(backoff.wait(now + CALM), Some(FIRST_PAUSE));
    }

    fn offer() -> Offer {
        Offer {
            node: "n1".parse().expect("valid"),
            online: true,
            unschedulable: false,
            architecture: String::new(),
            tags: vec!["ssd".into()],
            cpus: 4.0,
            memory_bytes: 1 << 40,
            disk_bytes: None,
            disk_free_percent: None,
            gpus: Vec::new(),
            places: 100,
        }
    }

    #[test]
    fn a_launch_gets_only_what_is_ready_and_the_same_in_all_that_it_asked_for() {
        let offer = offer();
        let launch = with("l1", |record| record.pool = None);
        assert!(can_have(&ready("i1"), &launch, &[&offer]));
        let claimed = claim(&ready("i1"), &launch, 200);
        for (why, waiting) in [
            ("it boots", booting("i1")),
            ("it was claimed", claimed),
            ("it is no pool's", with("i1", |record| record.pool = None)),
            ("it goes", with("i1", |record| record.intent.target = Target::Deleted)),
            ("it is protected", with("i1", |record| record.config.security.delete_protected = true)),
            ("it is elsewhere", with("i1", |record| record.node = "n2".parse().ok())),
        ] {
            assert!(!can_have(&waiting, &launch, &[&offer]), "{why}");
        }
        for (why, other) in [
            ("more CPUs", with("l1", |record| record.resources.cpus = 2)),
            ("not started", with("l1", |record| record.intent.target = Target::Prepared)),
            ("another program", with("l1", |record| record.program.command = vec!["top".into()])),
        ] {
            assert!(!can_have(&ready("i1"), &other, &[&offer]), "{why}");
        }
    }

    #[test]
    fn data_of_the_caller_reaches_an_application_only_before_it_starts() {
        let offer = offer();
        let started = with("i1", |record| {
            record.pool.iter_mut().for_each(|pool| pool.start = PoolStart::Application);
        });
        let data = with("l1", |record| record.user_data = Some("x".into()));
        assert!(can_have(&ready("i1"), &data, &[&offer]));
        assert!(!can_have(&started, &data, &[&offer]));
        assert!(can_have(&started, &ready("l1"), &[&offer]));
        let streaming = serde_json::from_value(json!({
            "session_id": "s1", "agent_url": "wss://a", "token": "t", "extra_data": {"a": 1}
        }))
        .expect("valid");
        let given = with("l1", |record| record.session = Session::Given { streaming });
        assert!(!can_have(&started, &given, &[&offer]));
    }

    #[test]
    fn only_nodes_that_the_launch_may_use_are_looked_at() {
        let offer = offer();
        let (closed, away) =
            (Offer { unschedulable: true, ..offer.clone() }, Offer { online: false, ..offer.clone() });
        let all = [offer.clone(), closed, away];
        assert_eq!(usable(&Wish::default(), &all), [&offer]);
        let ssd = Wish { selector: vec!["ssd".into()], ..Wish::default() };
        let gpu = Wish { selector: vec!["gpu".into()], ..Wish::default() };
        assert_eq!((usable(&ssd, &all).len(), usable(&gpu, &all).len()), (1, 0));
        let pinned = Wish { pin: Some(offer.node.clone()), ..Wish::default() };
        assert!(usable(&pinned, &all).is_empty(), "who names a node wants an instance of its own there");
    }

    #[test]
    fn a_claim_gives_the_instance_to_the_launch_and_keeps_where_it_is() {
        let launch = with("l1", |record| {
            record.pool = None;
            record.name = "mine".into();
            record.tags = vec!["a".into()];
            record.node = None;
            record.display.width = 640;
            record.session = Session::Wanted;
        });
        let got = claim(&ready("i1"), &launch, 200);
        assert_eq!((got.id.as_str(), got.name.as_str(), got.node.is_some()), ("i1", "mine", true));
        assert_eq!((got.display.width, &got.session, got.tags.len()), (640, &Session::Wanted, 1));
        assert!(got.is_claimed() && got.observed.status == InstanceStatus::Started);
        assert_eq!((got.intent.run, got.intent.since), (1, 200));
        let unnamed = with("l1", |record| record.name = "ams-l1".into());
        assert_eq!(claim(&ready("i1"), &unnamed, 200).name, "ams-i1");
    }

    #[test]
    fn room_is_made_by_as_few_as_possible_and_by_none_where_it_does_not_help() {
        let share = |cpus| Share { cpus, memory_bytes: 1, ..Share::default() };
        let node = |name: &str, shares: &[(&str, u32)]| {
            let mut allocations = Allocations::default();
            for (id, cpus) in shares {
                allocations.instances.insert(id.parse().expect("valid"), share(*cpus));
            }
            (Offer { node: name.parse().expect("valid"), ..offer() }, allocations)
        };
        let wish = |cpus| Wish { share: share(cpus), ..Wish::default() };
        let nodes = [node("n1", &[("i1", 1), ("i2", 1), ("x", 2)]), node("n2", &[("i3", 2), ("y", 2)])];
        let all = [ready("i1"), ready("i2"), ready("i3")];
        let waiting: Vec<_> = all.iter().collect();
        let room = |cpus| make_room(&wish(cpus), Strategy::Spread, &nodes, &waiting);
        assert_eq!(room(2), Some(ids(&["i3"])));
        assert_eq!(room(3), None);
        assert!(nodes.iter().all(|(offer, allocations)| {
            placement::place(&wish(1), Strategy::Spread, [(offer, &allocations.used() as &Used)]).is_err()
        }));
        let going = with("i3", |record| record.intent.target = Target::Deleted);
        let waiting = [&all[0], &all[1], &going];
        assert_eq!(make_room(&wish(2), Strategy::Spread, &nodes, &waiting), Some(Vec::new()));
    }
}
