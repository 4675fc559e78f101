//! Which agents there are, and which of them should get a session. Pure: reports and times are given, the
//! choice and its refusals come out.
//!
//! The choice first filters (alive, region, application, free capacity), then prefers what is near the client (its
//! measured round trips, else the distance from its location), and draws among those that are equally near by how
//! much more each could take, so that equal clusters share. Ten thousand agents must cost less than a millisecond,
//! so what a decision looks at is kept in dense tables that reports keep up to date; reasons are only gathered
//! when nobody fits.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet, HashMap},
    time::{Duration, Instant},
};

use fanlight_api::{
    AgentId,
    bus::{AgentReport, Capacity, Needs, ReportedApplication},
    gateway::{Application, Location, Region},
};
use serde::Serialize;

/// An agent unheard of for longer gets no new sessions.
pub const ALIVE: Duration = Duration::from_secs(10);
/// An agent unheard of for longer is forgotten.
const FORGOTTEN: Duration = Duration::from_secs(600);
/// How often the forgotten are looked for.
const FORGET_EVERY: Duration = Duration::from_secs(30);
/// Refusals told by name; the others are counted.
const NAMED_REFUSALS: usize = 10;
/// Most agents that are asked about one session.
const MAX_CANDIDATES: usize = 8;
/// Clusters whose way is longer by no more than this, or by a fifth, are equally near.
const NEAR_MS: f64 = 5.0;
/// Beyond that, clusters are ranked in steps of this many milliseconds.
const STEP_MS: f64 = 10.0;
/// Kilometres of cable there and back in a millisecond: light in fibre, and cables that do not run straight.
const KM_PER_MS: f64 = 70.0;
const EARTH_KM: f64 = 6371.0;

/// The agents heard of.
#[derive(Debug, Default)]
pub struct Agents {
    slots: Vec<Slot>,
    index: HashMap<AgentId, usize>,
    /// Who offers an application, by its name.
    offers: HashMap<String, Vec<Offer>>,
    regions: Vec<String>,
    swept: Option<Instant>,
}

/// One agent. The fields that a decision reads come first.
#[derive(Debug)]
struct Slot {
    at: Instant,
    open: bool,
    region: u32,
    /// Sessions handed over since the last report, which does not show them.
    placed: u32,
    capacity: Capacity,
    place: Option<[f64; 3]>,
    report: AgentReport,
}

/// An application at one agent.
#[derive(Clone, Copy, Debug)]
struct Offer {
    slot: u32,
    published: bool,
    needs: Needs,
}

/// What a launch needs.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// Application name.
    pub app: &'a str,
    /// None: the published one.
    pub version: Option<u32>,
    /// Empty: any.
    pub region: &'a str,
    /// Where the client is.
    pub client: Whereabouts<'a>,
}

/// What is known of the way to a client.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Whereabouts<'a> {
    /// Nothing.
    #[default]
    Unknown,
    /// Milliseconds to regions, as the client measured them. Regions that it left out are far away.
    RoundTrips(&'a BTreeMap<String, f64>),
    /// It is there.
    At(Location),
}

/// An agent that can take a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Who.
    pub agent_id: AgentId,
    /// Its region.
    pub region: String,
    /// Its cluster.
    pub cluster_id: String,
}

/// Why no agent can take a session.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoAgent {
    /// None is connected.
    #[error("no agent is connected: there is no cluster to run anything")]
    NoAgents,
    /// No agent serves the region.
    #[error("there is no region {region:?}; known are {known:?}")]
    UnknownRegion {
        /// As wanted.
        region: String,
        /// Regions of live agents.
        known: Vec<String>,
    },
    /// No cluster has the application or the version.
    #[error("{text}")]
    UnknownApplication {
        /// What is missing.
        text: String,
    },
    /// All agents were refused.
    #[error("no agent can run application {app:?} now: {}", summary(refusals))]
    Refused {
        /// As wanted.
        app: String,
        /// Why each.
        refusals: Refusals,
    },
}

/// Why agents were refused: counts per reason, and the first ten by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Refusals {
    /// Agents per reason.
    pub counts: BTreeMap<String, usize>,
    /// Agent and reason.
    pub agents: Vec<(String, String)>,
}

impl Refusals {
    /// Adds one.
    pub fn add(&mut self, agent: &AgentId, reason: impl Into<String>) {
        let reason = reason.into();
        if self.agents.len() < NAMED_REFUSALS {
            self.agents.push((agent.to_string(), reason.clone()));
        }
        *self.counts.entry(reason).or_default() += 1;
    }
}

fn summary(refusals: &Refusals) -> String {
    let one = |(reason, count): (&String, &usize)| match count {
        1 => reason.clone(),
        count => format!("{reason} ({count} agents)"),
    };
    refusals.counts.iter().map(one).collect::<Vec<_>>().join("; ")
}

impl Agents {
    /// Takes a report.
    pub fn report(&mut self, now: Instant, report: AgentReport) {
        if self.swept.is_none_or(|swept| now.saturating_duration_since(swept) >= FORGET_EVERY) {
            self.swept = Some(now);
            self.forget(now);
        }
        let region = match self.regions.iter().position(|name| *name == report.region) {
            Some(known) => known,
            None => {
                self.regions.push(report.region.clone());
                self.regions.len() - 1
            }
        };
        let number = self.index.get(&report.agent_id).copied().unwrap_or(self.slots.len());
        let slot = Slot {
            at: now,
            open: report.ams_reachable && !report.leaving,
            region: region as u32,
            placed: 0,
            capacity: report.capacity.clone(),
            place: report.location.map(|(latitude, longitude)| on_sphere(Location { latitude, longitude })),
            report,
        };
        match self.slots.get_mut(number) {
            Some(known) => {
                let same = known.report.applications == slot.report.applications;
                let before = std::mem::replace(known, slot);
                if !same {
                    for application in &before.report.applications {
                        self.withdraw(&application.application.name, number);
                    }
                    self.offer(number);
                }
            }
            None => {
                self.index.insert(slot.report.agent_id.clone(), number);
                self.slots.push(slot);
                self.offer(number);
            }
        }
    }

    /// Notes that an agent took a session, which its last report cannot show.
    pub fn placed(&mut self, agent_id: &AgentId) {
        if let Some(slot) = self.index.get(agent_id).and_then(|number| self.slots.get_mut(*number)) {
            slot.placed += 1;
        }
    }

    fn offer(&mut self, number: usize) {
        for application in &self.slots[number].report.applications {
            let offer = Offer {
                slot: number as u32,
                published: application.published.is_some(),
                needs: application.needs,
            };
            self.offers.entry(application.application.name.clone()).or_default().push(offer);
        }
    }

    fn withdraw(&mut self, application: &str, number: usize) {
        if let Some(offers) = self.offers.get_mut(application) {
            offers.retain(|offer| offer.slot as usize != number);
            if offers.is_empty() {
                self.offers.remove(application);
            }
        }
    }

    fn forget(&mut self, now: Instant) {
        let old = |slot: &Slot| now.saturating_duration_since(slot.at) >= FORGOTTEN;
        if !self.slots.iter().any(old) {
            return;
        }
        self.slots.retain(|slot| !old(slot));
        self.index = self
            .slots
            .iter()
            .enumerate()
            .map(|(number, slot)| (slot.report.agent_id.clone(), number))
            .collect();
        self.offers.clear();
        for number in 0..self.slots.len() {
            self.offer(number);
        }
    }

    /// Agents heard of within [`ALIVE`].
    pub fn alive(&self, now: Instant) -> impl Iterator<Item = &AgentReport> {
        self.slots.iter().filter(move |slot| is_alive(slot, now)).map(|slot| &slot.report)
    }

    /// Agents heard of that are silent now.
    pub fn silent(&self, now: Instant) -> impl Iterator<Item = &AgentReport> {
        self.slots.iter().filter(move |slot| !is_alive(slot, now)).map(|slot| &slot.report)
    }

    /// Whether an agent was heard of within [`ALIVE`].
    pub fn is_alive(&self, now: Instant, agent_id: &AgentId) -> bool {
        self.index
            .get(agent_id)
            .and_then(|number| self.slots.get(*number))
            .is_some_and(|slot| is_alive(slot, now))
    }

    /// The agent to ask about a session: its own, or another live one of its cluster.
    pub fn of_session(&self, now: Instant, agent_id: &AgentId, cluster_id: &str) -> AgentId {
        if self.is_alive(now, agent_id) {
            return agent_id.clone();
        }
        self.alive(now)
            .find(|report| report.cluster_id == cluster_id)
            .map_or_else(|| agent_id.clone(), |report| report.agent_id.clone())
    }

    /// Live agents, and those heard of that are silent now.
    pub fn counts(&self, now: Instant) -> (usize, usize) {
        let alive = self.alive(now).count();
        (alive, self.slots.len() - alive)
    }

    /// What can be streamed anywhere, by name. The first agent's description counts.
    pub fn applications(&self, now: Instant) -> Vec<Application> {
        let mut all = BTreeMap::new();
        for application in self.alive(now).flat_map(|report| &report.applications) {
            if application.published.is_some() || !application.versions.is_empty() {
                all.entry(application.application.name.clone())
                    .or_insert_with(|| application.application.clone());
            }
        }
        all.into_values().collect()
    }

    /// Regions with a live agent, by name, with what a client needs to measure its way there.
    pub fn regions(&self, now: Instant) -> Vec<Region> {
        let mut all: BTreeMap<&str, (BTreeSet<&String>, Option<Location>)> = BTreeMap::new();
        for report in self.alive(now) {
            let (urls, location) = all.entry(report.region.as_str()).or_default();
            urls.extend(&report.stun_urls);
            if let (None, Some((latitude, longitude))) = (&location, report.location) {
                *location = Some(Location { latitude, longitude });
            }
        }
        let region = |(name, (urls, location)): (&str, (BTreeSet<&String>, Option<Location>))| Region {
            name: name.into(),
            stun_servers: urls.into_iter().cloned().collect(),
            location,
        };
        all.into_iter().map(region).collect()
    }

    /// The agents that can take a session, in the order in which they should be asked. `random` gives numbers
    /// from 0 to 1.
    ///
    /// # Errors
    /// Nobody can, and why.
    pub fn choose(
        &self,
        now: Instant,
        wanted: Wanted<'_>,
        mut random: impl FnMut() -> f64,
    ) -> Result<Vec<Candidate>, NoAgent> {
        let region = match wanted.region {
            "" => None,
            name => match self.regions.iter().position(|known| known == name) {
                Some(number) => Some(number as u32),
                None => return Err(self.explain(now, wanted)),
            },
        };
        let way = self.way(wanted.client);
        let mut fitting: Vec<(f64, f64, u32)> = Vec::new();
        let mut nearest = f64::INFINITY;
        for offer in self.offers.get(wanted.app).map(Vec::as_slice).unwrap_or_default() {
            let slot = &self.slots[offer.slot as usize];
            if !slot.open
                || !is_alive(slot, now)
                || region.is_some_and(|region| region != slot.region)
                || !has_version(slot, offer, wanted)
            {
                continue;
            }
            let room = room(&slot.capacity, offer.needs);
            if room < 1.0 {
                continue;
            }
            let ms = way.to(slot);
            nearest = nearest.min(ms);
            fitting.push((ms, (room - f64::from(slot.placed)).max(0.01), offer.slot));
        }
        if fitting.is_empty() {
            return Err(self.explain(now, wanted));
        }
        let near = if nearest.is_finite() { nearest + NEAR_MS.max(nearest / 5.0) } else { f64::INFINITY };
        let mut best: Vec<(u32, f64, u32)> = fitting
            .into_iter()
            .map(|(ms, room, slot)| {
                let rank = if ms <= near { 0 } else { 1 + ((ms - near) / STEP_MS).min(1e6) as u32 };
                // Weighted order without replacement: the smallest -ln(u)/weight first.
                (rank, -random().clamp(1e-12, 1.0).ln() / room, slot)
            })
            .collect();
        let order = |a: &(u32, f64, u32), b: &(u32, f64, u32)| -> Ordering {
            a.0.cmp(&b.0).then_with(|| a.1.total_cmp(&b.1)).then_with(|| a.2.cmp(&b.2))
        };
        if best.len() > MAX_CANDIDATES {
            best.select_nth_unstable_by(MAX_CANDIDATES - 1, order);
            best.truncate(MAX_CANDIDATES);
        }
        best.sort_unstable_by(order);
        let candidate = |(_, _, slot): (u32, f64, u32)| {
            let report = &self.slots[slot as usize].report;
            Candidate {
                agent_id: report.agent_id.clone(),
                region: report.region.clone(),
                cluster_id: report.cluster_id.clone(),
            }
        };
        Ok(best.into_iter().map(candidate).collect())
    }

    fn way(&self, client: Whereabouts<'_>) -> Way {
        match client {
            Whereabouts::Unknown => Way::Unknown,
            Whereabouts::At(location) => Way::From(on_sphere(location)),
            Whereabouts::RoundTrips(trips) => {
                let of = |name: &String| trips.get(name).copied().filter(|ms| ms.is_finite() && *ms >= 0.0);
                Way::Regions(self.regions.iter().map(|name| of(name).unwrap_or(f64::INFINITY)).collect())
            }
        }
    }

    /// Why nobody can take a session.
    fn explain(&self, now: Instant, wanted: Wanted<'_>) -> NoAgent {
        let alive: Vec<&AgentReport> = self.alive(now).collect();
        if alive.is_empty() {
            return NoAgent::NoAgents;
        }
        // What only a silent agent has is not unknown: it is away for now.
        let silent: Vec<&AgentReport> = self.silent(now).collect();
        let serves = |report: &&AgentReport| wanted.region.is_empty() || report.region == wanted.region;
        if !alive.iter().chain(&silent).any(serves) {
            let known = self.regions(now).into_iter().map(|region| region.name).collect();
            return NoAgent::UnknownRegion { region: wanted.region.into(), known };
        }
        let away: Vec<&AgentReport> = silent
            .into_iter()
            .filter(|report| serves(report) && find_application(report, wanted).is_ok())
            .collect();
        let fitting: Vec<Result<&ReportedApplication, String>> =
            alive.iter().map(|report| find_application(report, wanted)).collect();
        if let Some(Err(text)) = fitting.first()
            && fitting.iter().all(Result::is_err)
            && away.is_empty()
        {
            // Of several texts the one about a version says more than the one about the name.
            let of_version =
                fitting.iter().filter_map(|fit| fit.as_ref().err()).find(|text| text.contains("version"));
            return NoAgent::UnknownApplication { text: of_version.unwrap_or(text).clone() };
        }
        let mut refusals = Refusals::default();
        for report in away {
            refusals.add(&report.agent_id, "has fallen silent");
        }
        for (report, fits) in alive.into_iter().zip(fitting) {
            let reason = if !serves(&report) {
                format!("serves another region than {:?}", wanted.region)
            } else {
                match fits {
                    Err(text) => text,
                    Ok(application) => refusal(report, application.needs)
                        .unwrap_or_else(|| "was not free a moment ago".into()),
                }
            };
            refusals.add(&report.agent_id, reason);
        }
        NoAgent::Refused { app: wanted.app.into(), refusals }
    }
}

fn is_alive(slot: &Slot, now: Instant) -> bool {
    now.saturating_duration_since(slot.at) <= ALIVE
}

/// How far agents are from a client, in milliseconds there and back; infinite where nobody knows.
enum Way {
    Unknown,
    /// By the number of the region.
    Regions(Vec<f64>),
    From([f64; 3]),
}

impl Way {
    fn to(&self, slot: &Slot) -> f64 {
        match self {
            Self::Unknown => 0.0,
            Self::Regions(ms) => ms.get(slot.region as usize).copied().unwrap_or(f64::INFINITY),
            Self::From(client) => slot.place.map_or(f64::INFINITY, |place| {
                let cosine = client.iter().zip(place).map(|(a, b)| a * b).sum::<f64>();
                cosine.clamp(-1.0, 1.0).acos() * EARTH_KM / KM_PER_MS
            }),
        }
    }
}

fn on_sphere(location: Location) -> [f64; 3] {
    let (latitude, longitude) = (location.latitude.to_radians(), location.longitude.to_radians());
    [latitude.cos() * longitude.cos(), latitude.cos() * longitude.sin(), latitude.sin()]
}

/// How many such instances a cluster could still take, as far as it tells; at most a million.
fn room(capacity: &Capacity, needs: Needs) -> f64 {
    let mut room = 1e6_f64;
    let mut limit = |free: Option<f64>, need: f64| {
        if let Some(free) = free {
            room = room.min(free / need);
        }
    };
    limit(capacity.free_instances.map(f64::from), 1.0);
    limit(capacity.free_cpus, f64::from(needs.cpus.max(1)));
    limit(capacity.free_memory_bytes.map(|bytes| bytes as f64), needs.memory_bytes.max(1) as f64);
    if needs.gpu_slots > 0 {
        limit(capacity.free_gpu_slots.map(f64::from), f64::from(needs.gpu_slots));
    }
    if needs.encoder_slots > 0 {
        limit(capacity.free_encoder_slots.map(f64::from), f64::from(needs.encoder_slots));
    }
    // Without a word about anything all clusters count the same.
    if room >= 1e6 { 1.0 } else { room }
}

fn has_version(slot: &Slot, offer: &Offer, wanted: Wanted<'_>) -> bool {
    match wanted.version {
        None => offer.published,
        Some(_) => find_application(&slot.report, wanted).is_ok(),
    }
}

fn find_application<'a>(
    report: &'a AgentReport,
    wanted: Wanted<'_>,
) -> Result<&'a ReportedApplication, String> {
    let find = |application: &&ReportedApplication| application.application.name == wanted.app;
    let Some(application) = report.applications.iter().find(find) else {
        return Err(format!("there is no application {:?}", wanted.app));
    };
    match (wanted.version, application.published) {
        (None, None) => Err(format!("application {:?} has no published version", wanted.app)),
        (Some(version), _) if !application.versions.contains(&version) => {
            Err(format!("application {:?} has no version {version}", wanted.app))
        }
        _ => Ok(application),
    }
}

/// Why an agent cannot take an instance with these needs now.
pub fn refusal(report: &AgentReport, needs: Needs) -> Option<String> {
    let capacity = &report.capacity;
    let lacks = |free: Option<f64>, need: f64| free.is_some_and(|free| free < need);
    if report.leaving {
        Some("is going down".into())
    } else if !report.ams_reachable {
        Some("cannot reach its AMS".into())
    } else if capacity.free_instances == Some(0) {
        Some("has as many instances as it may have".into())
    } else if lacks(capacity.free_cpus, f64::from(needs.cpus.max(1))) {
        Some("has not enough free CPU".into())
    } else if lacks(capacity.free_memory_bytes.map(|bytes| bytes as f64), needs.memory_bytes.max(1) as f64) {
        Some("has not enough free memory".into())
    } else if lacks(capacity.free_gpu_slots.map(f64::from), f64::from(needs.gpu_slots)) {
        Some("has not enough free GPU slots".into())
    } else if lacks(capacity.free_encoder_slots.map(f64::from), f64::from(needs.encoder_slots)) {
        Some("has not enough free encoder slots".into())
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(id: &str, region: &str, apps: &[&str]) -> AgentReport {
        AgentReport {
            version: 1,
            agent_id: id.parse().expect("id"),
            incarnation: "x".into(),
            region: region.into(),
            cluster_id: format!("cluster-{id}"),
            sent_ms: 0,
            location: None,
            stun_urls: vec![format!("stun:{region}:3478")],
            applications: apps
                .iter()
                .map(|name| ReportedApplication {
                    application: Application { name: name.to_string(), ..Default::default() },
                    versions: vec![0, 1],
                    published: Some(1),
                    needs: Needs { cpus: 2, memory_bytes: 1000, ..Needs::default() },
                })
                .collect(),
            capacity: Capacity { free_cpus: Some(4.0), ..Capacity::default() },
            ams_reachable: true,
            leaving: false,
        }
    }

    fn wanted(app: &str) -> Wanted<'_> {
        Wanted { app, version: None, region: "", client: Whereabouts::Unknown }
    }

    fn names(chosen: &[Candidate]) -> Vec<&str> {
        chosen.iter().map(|one| one.agent_id.as_str()).collect()
    }

    #[test]
    fn only_agents_that_fit_are_chosen_and_the_others_say_why_not() {
        let now = Instant::now();
        let mut agents = Agents::default();
        assert_eq!(agents.choose(now, wanted("x"), || 0.5), Err(NoAgent::NoAgents));
        agents.report(now, report("good", "east", &["x"]));
        agents.report(now, AgentReport { leaving: true, ..report("leaving", "east", &["x"]) });
        agents.report(now, AgentReport { ams_reachable: false, ..report("cut", "west", &["x"]) });
        agents.report(now, report("other", "west", &["y"]));
        let mut full = report("full", "west", &["x"]);
        full.capacity.free_cpus = Some(1.9);
        agents.report(now, full);
        let chosen = agents.choose(now, wanted("x"), || 0.5).expect("one fits");
        assert_eq!(names(&chosen), ["good"]);

        let west = agents.choose(now, Wanted { region: "west", ..wanted("x") }, || 0.5);
        let Err(NoAgent::Refused { refusals, .. }) = &west else { panic!("{west:?}") };
        assert_eq!(refusals.agents.len(), 5);
        let text = west.expect_err("refused").to_string();
        for part in ["cannot reach its AMS", "not enough free CPU", "another region", "2 agents"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let nowhere = agents.choose(now, Wanted { region: "moon", ..wanted("x") }, || 0.5);
        assert!(matches!(nowhere, Err(NoAgent::UnknownRegion { .. })), "{nowhere:?}");
        let unknown = agents.choose(now, wanted("z"), || 0.5);
        assert!(matches!(unknown, Err(NoAgent::UnknownApplication { .. })), "{unknown:?}");
        let version = agents.choose(now, Wanted { version: Some(7), ..wanted("x") }, || 0.5);
        assert!(version.expect_err("no such version").to_string().contains("no version 7"));
        let version = agents.choose(now, Wanted { version: Some(0), ..wanted("x") }, || 0.5);
        assert!(version.is_ok());
    }

    #[test]
    fn every_kind_of_capacity_that_lacks_is_a_reason_by_name() {
        let now = Instant::now();
        let needs = Needs { cpus: 2, memory_bytes: 1000, gpu_slots: 1, encoder_slots: 1 };
        let plenty = Capacity {
            instances: 3,
            free_instances: Some(1),
            free_cpus: Some(2.0),
            free_memory_bytes: Some(1000),
            free_gpu_slots: Some(1),
            free_encoder_slots: Some(1),
            ..Capacity::default()
        };
        let try_with = |capacity: Capacity| {
            let mut agents = Agents::default();
            let mut report = report("one", "east", &["x"]);
            report.applications[0].needs = needs;
            report.capacity = capacity;
            agents.report(now, report);
            agents.choose(now, wanted("x"), || 0.5)
        };
        assert!(try_with(plenty.clone()).is_ok());
        assert!(try_with(Capacity::default()).is_ok(), "what is unknown counts as free");
        for (capacity, reason) in [
            (Capacity { free_instances: Some(0), ..plenty.clone() }, "as many instances"),
            (Capacity { free_cpus: Some(1.5), ..plenty.clone() }, "free CPU"),
            (Capacity { free_memory_bytes: Some(999), ..plenty.clone() }, "free memory"),
            (Capacity { free_gpu_slots: Some(0), ..plenty.clone() }, "GPU slots"),
            (Capacity { free_encoder_slots: Some(0), ..plenty.clone() }, "encoder slots"),
        ] {
            let text = try_with(capacity).expect_err("refused").to_string();
            assert!(text.contains(reason), "{reason}: {text}");
        }
    }

    #[test]
    fn silent_agents_get_nothing_but_stay_known_for_a_while() {
        let start = Instant::now();
        let mut agents = Agents::default();
        agents.report(start, report("one", "east", &["x"]));
        let late = start + ALIVE + Duration::from_millis(1);
        assert_eq!(agents.choose(late, wanted("x"), || 0.5), Err(NoAgent::NoAgents));
        assert_eq!(agents.counts(late), (0, 1));
        assert!(agents.regions(late).is_empty());
        agents.report(late, report("two", "east", &["x"]));
        assert_eq!(agents.counts(late), (1, 1));
        let one: AgentId = "one".parse().expect("id");
        assert_eq!(agents.of_session(late, &one, "cluster-two").as_str(), "two");
        assert_eq!(agents.of_session(late, &one, "cluster-one").as_str(), "one");
        let later = start + FORGOTTEN + ALIVE;
        agents.report(later, report("two", "east", &["x"]));
        assert_eq!(agents.counts(later), (1, 0));
        let chosen = agents.choose(later, wanted("x"), || 0.5).expect("the other is left");
        assert_eq!(names(&chosen), ["two"]);
    }

    #[test]
    fn what_only_a_silent_agent_has_is_away_and_not_unknown() {
        let start = Instant::now();
        let mut agents = Agents::default();
        agents.report(start, report("one", "east", &["x"]));
        let late = start + ALIVE + Duration::from_millis(1);
        agents.report(late, report("two", "west", &["y"]));
        for region in ["", "east"] {
            let away = agents.choose(late, Wanted { region, ..wanted("x") }, || 0.5);
            let text = away.clone().expect_err("away").to_string();
            assert!(matches!(away, Err(NoAgent::Refused { .. })) && text.contains("fallen silent"), "{text}");
        }
        let unknown = agents.choose(late, wanted("z"), || 0.5);
        assert!(matches!(unknown, Err(NoAgent::UnknownApplication { .. })), "{unknown:?}");
        let nowhere = agents.choose(late, Wanted { region: "moon", ..wanted("x") }, || 0.5);
        assert!(matches!(nowhere, Err(NoAgent::UnknownRegion { .. })), "{nowhere:?}");
        let forgotten = start + FORGOTTEN + ALIVE;
        agents.report(forgotten, report("two", "west", &["y"]));
        let unknown = agents.choose(forgotten, wanted("x"), || 0.5);
        assert!(matches!(unknown, Err(NoAgent::UnknownApplication { .. })), "{unknown:?}");
    }

    #[test]
    fn an_agent_whose_applications_change_is_chosen_by_the_new_ones() {
        let now = Instant::now();
        let mut agents = Agents::default();
        agents.report(now, report("one", "east", &["x", "y"]));
        agents.report(now, report("two", "east", &["x"]));
        agents.report(now, report("one", "east", &["y", "z"]));
        assert_eq!(names(&agents.choose(now, wanted("x"), || 0.5).expect("fits")), ["two"]);
        assert_eq!(names(&agents.choose(now, wanted("z"), || 0.5).expect("fits")), ["one"]);
        agents.report(now, report("one", "east", &[]));
        assert!(agents.choose(now, wanted("y"), || 0.5).is_err());
    }

    /// Numbers from 0 to 1 that are the same in each run.
    fn numbers() -> impl FnMut() -> f64 {
        let mut state = 42_u64;
        move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 11) as f64 / (1_u64 << 53) as f64
        }
    }

    #[test]
    fn more_free_capacity_is_asked_first_more_often_and_nobody_is_left_out() {
        let now = Instant::now();
        let mut agents = Agents::default();
        let mut small = report("small", "east", &["x"]);
        small.capacity.free_cpus = Some(2.0);
        let mut large = report("large", "east", &["x"]);
        large.capacity.free_cpus = Some(18.0);
        agents.report(now, small);
        agents.report(now, large);
        let mut random = numbers();
        let first_large = (0..1000)
            .filter(|_| {
                let order = agents.choose(now, wanted("x"), &mut random).expect("both fit");
                assert_eq!(order.len(), 2);
                order[0].agent_id.as_str() == "large"
            })
            .count();
        assert!((850..950).contains(&first_large), "{first_large} of 1000");
    }

    #[test]
    fn sessions_handed_over_since_the_last_report_count_as_taken() {
        let now = Instant::now();
        let mut agents = Agents::default();
        for id in ["one", "two"] {
            let mut full = report(id, "east", &["x"]);
            full.capacity.free_cpus = Some(20.0);
            agents.report(now, full);
        }
        let mut random = numbers();
        let mut taken: HashMap<AgentId, u32> = HashMap::new();
        for _ in 0..20 {
            let chosen = agents.choose(now, wanted("x"), &mut random).expect("fits").remove(0).agent_id;
            agents.placed(&chosen);
            *taken.entry(chosen).or_default() += 1;
        }
        assert!(taken.values().all(|count| (7..=13).contains(count)), "{taken:?}");
    }

    #[test]
    fn the_nearest_region_is_asked_first_and_equally_near_ones_share() {
        let now = Instant::now();
        let mut agents = Agents::default();
        for (id, region, location) in [
            ("paris", "paris", (48.9, 2.4)),
            ("london", "london", (51.5, -0.1)),
            ("tokyo", "tokyo", (35.7, 139.7)),
            ("somewhere", "somewhere", (0.0, 0.0)),
        ] {
            let place = (id != "somewhere").then_some(location);
            agents.report(now, AgentReport { location: place, ..report(id, region, &["x"]) });
        }
        let mut random = numbers();
        let mut first = |client| {
            let mut first: BTreeMap<String, u32> = BTreeMap::new();
            let mut last = String::new();
            for _ in 0..200 {
                let order = agents.choose(now, Wanted { client, ..wanted("x") }, &mut random).expect("fits");
                assert_eq!(order.len(), 4);
                *first.entry(order[0].region.clone()).or_default() += 1;
                last.clone_from(&order[3].region);
            }
            (first, last)
        };
        let osaka = Location { latitude: 34.7, longitude: 135.5 };
        let (from_osaka, last) = first(Whereabouts::At(osaka));
        assert_eq!(from_osaka.keys().collect::<Vec<_>>(), ["tokyo"]);
        assert_eq!(last, "somewhere", "nobody knows how far that is");
        let lille = Location { latitude: 50.6, longitude: 3.1 };
        let (from_lille, _) = first(Whereabouts::At(lille));
        assert!(from_lille["paris"] > 60 && from_lille["london"] > 60, "{from_lille:?}");
        let trips = BTreeMap::from([("paris".into(), 80.0), ("london".into(), 30.0), ("tokyo".into(), 33.0)]);
        let (measured, last) = first(Whereabouts::RoundTrips(&trips));
        assert!(measured["london"] > 60 && measured["tokyo"] > 60, "{measured:?}");
        assert!(!measured.contains_key("paris") && last == "somewhere", "{measured:?} {last}");
        let nonsense = BTreeMap::from([("paris".into(), f64::NAN), ("london".into(), -5.0)]);
        let (spread, _) = first(Whereabouts::RoundTrips(&nonsense));
        assert_eq!(spread.len(), 4, "nonsense is no measure");
    }

    #[test]
    fn regions_tell_how_to_measure_the_way_there() {
        let now = Instant::now();
        let mut agents = Agents::default();
        agents.report(now, AgentReport { location: Some((1.0, 2.0)), ..report("a", "east", &["x"]) });
        agents.report(now, report("b", "east", &["x"]));
        agents.report(now, report("c", "west", &["x"]));
        let regions = agents.regions(now);
        assert_eq!(regions.len(), 2);
        assert_eq!(regions[0].stun_servers, ["stun:east:3478"]);
        assert_eq!(regions[0].location, Some(Location { latitude: 1.0, longitude: 2.0 }));
        assert_eq!(regions[1].location, None);
    }
}
