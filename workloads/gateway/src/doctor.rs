//! What this unit sees of the path that a stream takes, step by step and in words, for `fanlight doctor` and the page.
//! What only a client can see (its own network, its decoder) is looked at there.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use fanlight_api::{
    SessionId,
    bus::{AgentReport, AgentRequest, AgentResponse, Needs, agent_requests},
    gateway::{Check, CheckStatus, Diagnosis, StunServer},
};

use crate::{Gateway, agents, sessions::usable};

/// How long an agent may take to answer.
const AGENT_TIME: Duration = Duration::from_secs(2);
/// Clocks that differ by more make tokens and TURN credentials expire at the wrong time.
const CLOCK_MS: i64 = 30_000;
/// A certificate that ends sooner should be renewed now.
const CERTIFICATE_DAYS: i64 = 14;
/// Most agents whose credentials are asked for.
const ASKED: usize = 20;

fn check(step: &str, status: CheckStatus, text: impl Into<String>, advice: &str) -> Check {
    Check { step: step.into(), status, text: text.into(), advice: advice.into() }
}

fn ok(step: &str, text: impl Into<String>) -> Check {
    check(step, CheckStatus::Ok, text, "")
}

/// What agents say, judged.
fn judge_agents(alive: &[&AgentReport], silent: &[&AgentReport], now_ms: i64) -> Vec<Check> {
    let names = |reports: &[&AgentReport]| {
        let shown: Vec<&str> = reports.iter().take(10).map(|report| report.agent_id.as_str()).collect();
        match reports.len() - shown.len() {
            0 => shown.join(", "),
            more => format!("{} and {more} more", shown.join(", ")),
        }
    };
    let mut checks = Vec::new();
    checks.push(match (alive.len(), silent.len()) {
        (0, 0) => check(
            "agents",
            CheckStatus::Failed,
            "no agent was ever heard of",
            "start an agent and check its bus.url and its login; it must reach the same bus as the gateway",
        ),
        (0, _) => check(
            "agents",
            CheckStatus::Failed,
            format!("no agent is alive; silent are {}", names(silent)),
            "look whether these agents run and reach the bus",
        ),
        (_, 0) => ok("agents", format!("alive: {}", names(alive))),
        _ => check(
            "agents",
            CheckStatus::Warning,
            format!("alive: {}; silent: {}", names(alive), names(silent)),
            "look whether the silent agents run and reach the bus",
        ),
    });
    if alive.is_empty() {
        let skipped = |step| check(step, CheckStatus::Skipped, "no agent is alive", "");
        checks.extend(["ams", "clocks", "applications", "capacity"].map(skipped));
        return checks;
    }
    let cut: Vec<&AgentReport> = alive.iter().copied().filter(|report| !report.ams_reachable).collect();
    let status = if cut.len() == alive.len() { CheckStatus::Failed } else { CheckStatus::Warning };
    checks.push(match cut.is_empty() {
        true => ok("ams", "every agent reaches its AMS"),
        false => check(
            "ams",
            status,
            format!("cannot reach their AMS: {}", names(&cut)),
            "look whether AMS runs, and check ams.url and ams.certificate of the agent and that AMS trusts it",
        ),
    });
    let apart = |report: &AgentReport| match report.sent_ms {
        0 => 0,
        sent => (now_ms - sent).abs(),
    };
    let wrong: Vec<&AgentReport> = alive.iter().copied().filter(|report| apart(report) > CLOCK_MS).collect();
    checks.push(match wrong.is_empty() {
        true => ok("clocks", "the clocks of gateway and agents agree"),
        false => check(
            "clocks",
            CheckStatus::Warning,
            format!("clocks differ from the gateway's by more than {} s: {}", CLOCK_MS / 1000, names(&wrong)),
            "synchronise the clocks; TURN credentials of these agents may already have expired when clients use them",
        ),
    });
    let applications: usize = alive.iter().map(|report| report.applications.len()).sum();
    let published =
        alive.iter().flat_map(|report| &report.applications).filter(|one| one.published.is_some()).count();
    checks.push(match (applications, published) {
        (0, _) => check(
            "applications",
            CheckStatus::Failed,
            "no cluster has an application",
            "create one, for example with `fanlight` and a manifest",
        ),
        (_, 0) => check(
            "applications",
            CheckStatus::Warning,
            "no application has a published version",
            "publish a version, or name one in app_version",
        ),
        _ => {
            let clusters = if alive.len() == 1 { "cluster" } else { "clusters" };
            ok("applications", format!("{published} published in {} {clusters}", alive.len()))
        }
    });
    let refusals: Vec<(&AgentReport, String)> = alive
        .iter()
        .filter_map(|report| Some((*report, agents::refusal(report, Needs::default())?)))
        .collect();
    checks.push(if refusals.is_empty() {
        ok("capacity", "every cluster has room")
    } else {
        let texts: Vec<String> = refusals
            .iter()
            .take(10)
            .map(|(report, reason)| format!("{} {reason}", report.agent_id))
            .collect();
        let all = refusals.len() == alive.len();
        check(
            "capacity",
            if all { CheckStatus::Failed } else { CheckStatus::Warning },
            texts.join("; "),
            "end sessions that nobody needs, or add nodes",
        )
    });
    checks
}

fn judge_certificate(not_after: Result<i64, String>, now: i64) -> Check {
    match not_after {
        Err(reason) => check(
            "certificate",
            CheckStatus::Warning,
            format!("the gateway's certificate cannot be read: {reason}"),
            "check tls.certificate",
        ),
        Ok(until) if until <= now => check(
            "certificate",
            CheckStatus::Failed,
            "the gateway's certificate has expired",
            "renew the file in tls.certificate; it is taken without a restart",
        ),
        Ok(until) => {
            let days = (until - now) / 86_400;
            if days < CERTIFICATE_DAYS {
                let advice = "renew the file in tls.certificate; it is taken without a restart";
                let text = format!("the gateway's certificate ends in {days} days");
                check("certificate", CheckStatus::Warning, text, advice)
            } else {
                ok("certificate", format!("the gateway's certificate is valid for {days} days"))
            }
        }
    }
}

/// `alone`: nobody but this machine reaches us, so that nothing needs a relay.
fn judge_turn(servers: &BTreeMap<String, Vec<StunServer>>, silent: &[String], alone: bool) -> Check {
    let with_turn = |servers: &Vec<StunServer>| {
        servers.iter().flat_map(|server| &server.urls).any(|url| url.starts_with("turn"))
    };
    let without: Vec<&str> = servers
        .iter()
        .filter(|(_, servers)| !with_turn(servers))
        .map(|(region, _)| region.as_str())
        .collect();
    if !silent.is_empty() {
        check(
            "turn",
            CheckStatus::Warning,
            format!("no ICE servers from {}", silent.join(", ")),
            "look into the log of these agents",
        )
    } else if without.is_empty() {
        ok("turn", "every region has a TURN server")
    } else if alone {
        check("turn", CheckStatus::Skipped, "everything is on this machine, which needs no TURN server", "")
    } else {
        check(
            "turn",
            CheckStatus::Warning,
            format!("no TURN server in {}", without.join(", ")),
            "clients that cannot reach the instances by UDP will see nothing; set turn.urls or turn.listen of the agent",
        )
    }
}

impl Gateway {
    /// Looks at everything.
    pub async fn diagnose(&self) -> Diagnosis {
        let now = self.now();
        let mut checks = Vec::new();
        checks.push(match self.store.get("gateway/root-key").await {
            Ok(_) => ok("store", "the store answers"),
            Err(error) => check(
                "store",
                CheckStatus::Failed,
                format!("the store does not answer: {error}"),
                "running streams go on; new sessions need the store",
            ),
        });
        checks.push(if *self.bus.connected().borrow() {
            ok("bus", "the bus is connected")
        } else {
            let advice = "running streams go on; check bus.url and whether its server runs";
            check("bus", CheckStatus::Failed, "the bus is not connected", advice)
        });
        let files = &self.config.tls;
        checks.push(judge_certificate(
            fanlight_service::tls::not_after(&files.certificate).map_err(|error| error.to_string()),
            now,
        ));
        let asked = {
            let agents = self.agents();
            let moment = Instant::now();
            let alive: Vec<&AgentReport> = agents.alive(moment).collect();
            let silent: Vec<&AgentReport> = agents.silent(moment).collect();
            checks.extend(judge_agents(&alive, &silent, self.now_ms()));
            alive
                .iter()
                .take(ASKED)
                .map(|report| (report.agent_id.clone(), report.region.clone()))
                .collect::<Vec<_>>()
        };
        let questions = asked.into_iter().map(|(agent_id, region)| async move {
            let request = AgentRequest::Credentials { session_id: SessionId::generate() };
            let answer = self
                .bus
                .request_json::<_, AgentResponse>(&agent_requests(&agent_id), &request, AGENT_TIME)
                .await;
            (agent_id, region, answer)
        });
        let mut stun_servers: BTreeMap<String, Vec<StunServer>> = BTreeMap::new();
        let mut silent = Vec::new();
        for (agent_id, region, answer) in futures_util::future::join_all(questions).await {
            match answer {
                Ok(AgentResponse::Accepted { stun_servers: servers }) => {
                    let known = stun_servers.entry(region).or_default();
                    // Agents of one region usually share their servers: one set of credentials is enough.
                    let new = usable(servers)
                        .into_iter()
                        .filter(|server| !known.iter().any(|one| one.urls == server.urls));
                    let new: Vec<StunServer> = new.collect();
                    known.extend(new);
                }
                _ => silent.push(format!("agent {agent_id}")),
            }
        }
        checks.push(if stun_servers.is_empty() && silent.is_empty() {
            check("turn", CheckStatus::Skipped, "no agent is alive", "")
        } else {
            judge_turn(&stun_servers, &silent, self.public_address.ip().is_loopback())
        });
        Diagnosis { time_ms: self.now_ms(), checks, stun_servers }
    }
}

#[cfg(test)]
mod tests {
    use fanlight_api::{
        bus::{Capacity, ReportedApplication},
        gateway::Application,
    };

    use super::*;

    const NOW_MS: i64 = 1_800_000_000_000;

    fn report() -> AgentReport {
        AgentReport {
            version: 1,
            agent_id: "a1".parse().expect("id"),
            incarnation: "x".into(),
            region: "here".into(),
            cluster_id: "c".into(),
            sent_ms: NOW_MS,
            location: None,
            stun_urls: vec![],
            applications: vec![ReportedApplication {
                application: Application { name: "x".into(), ..Application::default() },
                versions: vec![0],
                published: Some(0),
                needs: Needs::default(),
            }],
            capacity: Capacity::default(),
            ams_reachable: true,
            leaving: false,
        }
    }

    fn status(checks: &[Check], step: &str) -> CheckStatus {
        checks.iter().find(|check| check.step == step).expect(step).status
    }

    #[test]
    fn each_broken_step_is_named_with_advice() {
        use CheckStatus::*;
        let fine = judge_agents(&[&report()], &[], NOW_MS);
        assert!(fine.iter().all(|check| check.status == Ok), "{fine:?}");
        let none = judge_agents(&[], &[], NOW_MS);
        assert_eq!((status(&none, "agents"), status(&none, "capacity")), (Failed, Skipped));
        let silent = judge_agents(&[], &[&report()], NOW_MS);
        assert!(silent[0].status == Failed && silent[0].text.contains("a1"), "{silent:?}");
        let full = Capacity { free_cpus: Some(0.0), ..Capacity::default() };
        for (broken, step, expected) in [
            (AgentReport { ams_reachable: false, ..report() }, "ams", Failed),
            (AgentReport { sent_ms: NOW_MS - 60_000, ..report() }, "clocks", Warning),
            (AgentReport { applications: vec![], ..report() }, "applications", Failed),
            (AgentReport { capacity: full.clone(), ..report() }, "capacity", Failed),
            (AgentReport { leaving: true, ..report() }, "capacity", Failed),
        ] {
            let checks = judge_agents(&[&broken], &[], NOW_MS);
            let found = checks.iter().find(|check| check.step == step).expect(step);
            assert_eq!(found.status, expected, "{step}");
            assert!(!found.advice.is_empty(), "{step}");
            // With another that is fine it is not as bad.
            let both = judge_agents(&[&broken, &report()], &[], NOW_MS);
            assert!(status(&both, step) < Failed, "{step}");
        }
    }

    #[test]
    fn certificates_and_turn_servers_are_judged() {
        use CheckStatus::*;
        assert_eq!(judge_certificate(Result::Ok(100), 100).status, Failed);
        assert_eq!(judge_certificate(Result::Ok(100 + 86_400), 100).status, Warning);
        assert_eq!(judge_certificate(Result::Ok(100 + 365 * 86_400), 100).status, Ok);
        assert_eq!(judge_certificate(Err("gone".into()), 100).status, Warning);
        let servers = |url: &str| {
            let server = StunServer { urls: vec![url.into()], ..StunServer::default() };
            BTreeMap::from([("here".to_owned(), vec![server])])
        };
        assert_eq!(judge_turn(&servers("turn:t:3478"), &[], false).status, Ok);
        assert_eq!(judge_turn(&servers("stun:t:3478"), &[], false).status, Warning);
        assert_eq!(judge_turn(&servers("stun:t:3478"), &[], true).status, Skipped);
        assert_eq!(judge_turn(&servers("turn:t:3478"), &["agent a".into()], true).status, Warning);
    }
}
