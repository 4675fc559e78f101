//! Which sessions have no instance any more, concluded from what the complete reports of agents lack. Pure: reports
//! and times are given. A single report may have been sent before its agent heard of a session, so a session must be
//! lacking for a while; and only the unit that hears every report may conclude anything.

use std::{
    collections::{HashMap, HashSet},
    time::{Duration, Instant},
};

use fanlight_api::{AgentId, SessionId, bus::SessionsReport};

/// A session that complete reports lack for so long has no instance; late messages cannot explain it.
const MISSING: Duration = Duration::from_secs(8);

/// What reports lack so far.
#[derive(Debug, Default)]
pub struct Absence {
    /// Parts of a report in the making, by agent.
    gathering: HashMap<AgentId, Gathering>,
    missing: HashMap<SessionId, Instant>,
}

#[derive(Debug)]
struct Gathering {
    series: u64,
    parts: HashSet<u32>,
    reported: HashSet<SessionId>,
}

impl Absence {
    /// Takes a report; `known` lists the sessions of its agent and cluster. Returns those that have vanished.
    pub fn take(
        &mut self,
        now: Instant,
        report: &SessionsReport,
        known: impl FnOnce() -> Vec<SessionId>,
    ) -> Vec<SessionId> {
        for session in &report.sessions {
            self.missing.remove(&session.session_id);
        }
        if !report.complete {
            return Vec::new();
        }
        let ids = report.sessions.iter().map(|session| session.session_id.clone());
        let reported: HashSet<SessionId> = if report.parts <= 1 {
            self.gathering.remove(&report.agent_id);
            ids.collect()
        } else {
            let fresh =
                || Gathering { series: report.series, parts: HashSet::new(), reported: HashSet::new() };
            let gathering = self.gathering.entry(report.agent_id.clone()).or_insert_with(fresh);
            if gathering.series != report.series {
                *gathering = fresh();
            }
            gathering.parts.insert(report.part);
            gathering.reported.extend(ids);
            if gathering.parts.len() < report.parts as usize {
                return Vec::new();
            }
            self.gathering.remove(&report.agent_id).map(|gathering| gathering.reported).unwrap_or_default()
        };
        let mut vanished = Vec::new();
        for id in known() {
            if reported.contains(&id) {
                continue;
            }
            let since = *self.missing.entry(id.clone()).or_insert(now);
            if now.saturating_duration_since(since) >= MISSING {
                vanished.push(id);
            }
        }
        vanished
    }

    /// Forgets sessions that `is_known` does not know, so that nothing grows.
    pub fn forget(&mut self, is_known: impl Fn(&SessionId) -> bool) {
        self.missing.retain(|id, _| is_known(id));
    }

    /// Forgets everything: reports may have passed unseen.
    pub fn reset(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use fanlight_api::bus::{InstanceState, SessionReport};

    use super::*;

    fn report(ids: &[&str], series: u64, part: u32, parts: u32) -> SessionsReport {
        let session = |id: &&str| SessionReport {
            session_id: id.parse().expect("id"),
            instance_id: None,
            state: InstanceState::Running,
            message: None,
            streamer_connected: true,
            client: None,
            idle_since: None,
            steps: vec![],
        };
        SessionsReport {
            version: 1,
            agent_id: "a".parse().expect("id"),
            cluster_id: "c".into(),
            complete: true,
            series,
            part,
            parts,
            sessions: ids.iter().map(session).collect(),
        }
    }

    fn ids(ids: &[&str]) -> Vec<SessionId> {
        ids.iter().map(|id| id.parse().expect("id")).collect()
    }

    #[test]
    fn what_is_lacking_for_a_while_has_vanished() {
        let start = Instant::now();
        let mut absence = Absence::default();
        let known = || ids(&["s1", "s2"]);
        assert_eq!(absence.take(start, &report(&["s1"], 1, 0, 1), known), []);
        let later = start + MISSING;
        let parts_only = SessionsReport { complete: false, ..report(&["s1"], 0, 0, 1) };
        assert_eq!(absence.take(later, &parts_only, || panic!("nothing to conclude")), []);
        assert_eq!(absence.take(later, &report(&["s1"], 2, 0, 1), known), ids(&["s2"]));
        // Seen again, it is missed from the beginning.
        assert_eq!(absence.take(later, &report(&["s1", "s2"], 3, 0, 1), known), []);
        assert_eq!(absence.take(later + MISSING / 2, &report(&["s1"], 4, 0, 1), known), []);
        absence.reset();
        assert_eq!(absence.take(later + MISSING * 2, &report(&["s1"], 5, 0, 1), known), []);
        absence.forget(|_| false);
        assert!(absence.missing.is_empty());
    }

    #[test]
    fn a_report_in_parts_counts_once_all_parts_are_there() {
        let start = Instant::now();
        let mut absence = Absence::default();
        let known = || ids(&["s1", "s2", "s3"]);
        for (at, series) in [(start, 1), (start + MISSING, 3)] {
            assert_eq!(absence.take(at, &report(&["s1"], series, 0, 2), || panic!("half")), []);
            // A lost part leaves nothing behind.
            assert_eq!(absence.take(at, &report(&["s2"], series + 1, 1, 2), || panic!("half")), []);
            assert_eq!(absence.take(at, &report(&["s2"], series + 1, 1, 2), || panic!("the same half")), []);
            let vanished = absence.take(at, &report(&["s1"], series + 1, 0, 2), known);
            assert_eq!(vanished, if series == 1 { vec![] } else { ids(&["s3"]) });
        }
    }
}
