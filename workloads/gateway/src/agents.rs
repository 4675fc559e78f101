//! Which agents there are, and which of them should get a session. Pure: reports and times are given, the
//! choice and its refusals come out.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use fanlight_api::{
    AgentId,
    bus::{AgentReport, ReportedApplication},
    gateway::{Application, Region},
};
use serde::Serialize;

/// An agent unheard of for longer gets no new sessions.
pub const ALIVE: Duration = Duration::from_secs(10);
/// An agent unheard of for longer is forgotten.
const FORGOTTEN: Duration = Duration::from_secs(600);
/// Refusals told by name; the others are counted.
const NAMED_REFUSALS: usize = 10;

/// The agents heard of, by id.
#[derive(Debug, Default)]
pub struct Agents {
    known: BTreeMap<AgentId, Heard>,
}

#[derive(Debug)]
struct Heard {
    report: AgentReport,
    at: Instant,
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
        self.known.insert(report.agent_id.clone(), Heard { report, at: now });
        self.known.retain(|_, heard| now.saturating_duration_since(heard.at) < FORGOTTEN);
    }

    /// Agents heard of within [`ALIVE`].
    pub fn alive(&self, now: Instant) -> impl Iterator<Item = &AgentReport> {
        self.known
            .values()
            .filter(move |heard| now.saturating_duration_since(heard.at) <= ALIVE)
            .map(|heard| &heard.report)
    }

    /// Whether an agent was heard of within [`ALIVE`].
    pub fn is_alive(&self, now: Instant, agent_id: &AgentId) -> bool {
        self.alive(now).any(|report| report.agent_id == *agent_id)
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
        (alive, self.known.len() - alive)
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

    /// Regions with a live agent, by name.
    pub fn regions(&self, now: Instant) -> Vec<Region> {
        let names: BTreeSet<&str> = self.alive(now).map(|report| report.region.as_str()).collect();
        names.into_iter().map(|name| Region { name: name.into() }).collect()
    }

    /// The agents that can take a session, in the order in which they should be asked: drawn by free capacity,
    /// so that equal clusters share the load. `random` gives numbers from 0 to 1.
    ///
    /// # Errors
    /// Nobody can, and why.
    pub fn choose(
        &self,
        now: Instant,
        wanted: Wanted<'_>,
        mut random: impl FnMut() -> f64,
    ) -> Result<Vec<Candidate>, NoAgent> {
        let alive: Vec<&AgentReport> = self.alive(now).collect();
        if alive.is_empty() {
            return Err(NoAgent::NoAgents);
        }
        if !wanted.region.is_empty() && alive.iter().all(|report| report.region != wanted.region) {
            let known = self.regions(now).into_iter().map(|region| region.name).collect();
            return Err(NoAgent::UnknownRegion { region: wanted.region.into(), known });
        }
        let fitting: Vec<Result<(), String>> =
            alive.iter().map(|report| has_application(report, wanted)).collect();
        if let Some(Err(text)) = fitting.first()
            && fitting.iter().all(Result::is_err)
        {
            // Of several texts the one about a version says more than the one about the name.
            let of_version =
                fitting.iter().filter_map(|fit| fit.as_ref().err()).find(|text| text.contains("version"));
            return Err(NoAgent::UnknownApplication { text: of_version.unwrap_or(text).clone() });
        }
        let mut refusals = Refusals::default();
        let mut ranked = Vec::new();
        for (report, fits) in alive.into_iter().zip(fitting) {
            let refusal = if !wanted.region.is_empty() && report.region != wanted.region {
                Some(format!("serves another region than {:?}", wanted.region))
            } else if let Err(text) = fits {
                Some(text)
            } else {
                refusal(report)
            };
            match refusal {
                Some(reason) => refusals.add(&report.agent_id, reason),
                None => {
                    // Weighted order without replacement: the largest u^(1/weight) first.
                    let weight = report.capacity.free_cpus.unwrap_or(1.0).clamp(0.01, 1e6);
                    let key = random().clamp(1e-9, 1.0).powf(1.0 / weight);
                    ranked.push((key, report));
                }
            }
        }
        if ranked.is_empty() {
            return Err(NoAgent::Refused { app: wanted.app.into(), refusals });
        }
        ranked.sort_by(|(a, first), (b, second)| {
            b.total_cmp(a).then_with(|| first.agent_id.cmp(&second.agent_id))
        });
        let candidate = |report: &AgentReport| Candidate {
            agent_id: report.agent_id.clone(),
            region: report.region.clone(),
            cluster_id: report.cluster_id.clone(),
        };
        Ok(ranked.into_iter().map(|(_, report)| candidate(report)).collect())
    }
}

fn has_application(report: &AgentReport, wanted: Wanted<'_>) -> Result<(), String> {
    let find = |application: &&ReportedApplication| application.application.name == wanted.app;
    let Some(application) = report.applications.iter().find(find) else {
        return Err(format!("there is no application {:?}", wanted.app));
    };
    match (wanted.version, application.published) {
        (None, None) => Err(format!("application {:?} has no published version", wanted.app)),
        (Some(version), _) if !application.versions.contains(&version) => {
            Err(format!("application {:?} has no version {version}", wanted.app))
        }
        _ => Ok(()),
    }
}

fn refusal(report: &AgentReport) -> Option<String> {
    if report.leaving {
        Some("is going down".into())
    } else if !report.ams_reachable {
        Some("cannot reach its AMS".into())
    } else if report.capacity.free_cpus.is_some_and(|cpus| cpus <= 0.0) {
        Some("has no free CPU".into())
    } else if report.capacity.free_memory_bytes == Some(0) {
        Some("has no free memory".into())
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use fanlight_api::bus::Capacity;

    use super::*;

    fn report(id: &str, region: &str, apps: &[&str]) -> AgentReport {
        AgentReport {
            version: 1,
            agent_id: id.parse().expect("id"),
            incarnation: "x".into(),
            region: region.into(),
            cluster_id: format!("cluster-{id}"),
            location: None,
            applications: apps
                .iter()
                .map(|name| ReportedApplication {
                    application: Application { name: name.to_string(), ..Default::default() },
                    versions: vec![0, 1],
                    published: Some(1),
                })
                .collect(),
            capacity: Capacity { instances: 0, free_cpus: Some(4.0), free_memory_bytes: None },
            ams_reachable: true,
            leaving: false,
        }
    }

    fn wanted(app: &str) -> Wanted<'_> {
        Wanted { app, version: None, region: "" }
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
        full.capacity.free_cpus = Some(0.0);
        agents.report(now, full);
        let chosen = agents.choose(now, wanted("x"), || 0.5).expect("one fits");
        assert_eq!(chosen.iter().map(|one| one.agent_id.as_str()).collect::<Vec<_>>(), ["good"]);

        let west = agents.choose(now, Wanted { region: "west", ..wanted("x") }, || 0.5);
        let Err(NoAgent::Refused { refusals, .. }) = &west else { panic!("{west:?}") };
        assert_eq!(refusals.agents.len(), 5);
        let text = west.expect_err("refused").to_string();
        for part in ["cannot reach its AMS", "no free CPU", "another region", "2 agents"] {
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
        agents.report(start + FORGOTTEN + ALIVE, report("two", "east", &["x"]));
        assert_eq!(agents.counts(start + FORGOTTEN + ALIVE), (1, 0));
    }

    #[test]
    fn more_free_capacity_is_asked_first_more_often_and_nobody_is_left_out() {
        let now = Instant::now();
        let mut agents = Agents::default();
        let mut small = report("small", "east", &["x"]);
        small.capacity.free_cpus = Some(1.0);
        let mut large = report("large", "east", &["x"]);
        large.capacity.free_cpus = Some(9.0);
        agents.report(now, small);
        agents.report(now, large);
        let mut state = 42_u64;
        let mut random = move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 11) as f64 / (1_u64 << 53) as f64
        };
        let first_large = (0..1000)
            .filter(|_| {
                let order = agents.choose(now, wanted("x"), &mut random).expect("both fit");
                assert_eq!(order.len(), 2);
                order[0].agent_id.as_str() == "large"
            })
            .count();
        assert!((850..950).contains(&first_large), "{first_large} of 1000");
    }
}
