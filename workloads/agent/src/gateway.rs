//! The gateways' side: reports to them, requests of them, over the bus.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use fanlight_api::{
    PROTOCOL_VERSION, SessionId, ShareId,
    bus::{
        AgentReport, AgentRequest, AgentResponse, AgentSessionCreated, AgentSessionsPost, GatewayRequest,
        GatewayResponse, SessionReport, SessionsReport, agent_requests, agents_report, gateway_sessions,
        sessions_report,
    },
    gateway::ShareCreated,
};
use fanlight_bus::{BusError, RequestError};
use fanlight_service::ApiError;
use http::StatusCode;

use crate::{Agent, unix_millis};

const REPORT_EVERY: Duration = Duration::from_secs(2);
const REPORT_SESSIONS_EVERY: Duration = Duration::from_secs(5);
/// Changes that come together share one report.
const REPORT_PAUSE: Duration = Duration::from_millis(10);
/// Sessions in one message: few enough that nothing else waits long at a gateway that reads it.
const SESSIONS_PER_REPORT: usize = 200;
const ASK_TIMEOUT: Duration = Duration::from_secs(3);
/// How long the goodbye may take.
const GOODBYE: Duration = Duration::from_millis(500);

/// Starts serving and reporting.
pub async fn start(agent: &Arc<Agent>) -> Result<(), BusError> {
    let server = agent.clone();
    let serving = agent
        .bus
        .serve_json(&agent_requests(&agent.id), "agent", move |request: AgentRequest| {
            let agent = server.clone();
            async move { answer(&agent, request) }
        })
        .await?;
    let holder = agent.shutdown.clone();
    agent.shutdown.spawn("serve gateways", async move {
        holder.stopping().await;
        drop(serving);
    });
    let reporter = agent.clone();
    agent.shutdown.spawn_until_stopped("report", async move { report(&reporter).await });
    Ok(())
}

fn answer(agent: &Arc<Agent>, request: AgentRequest) -> AgentResponse {
    let refused = |code: &str, message: String| AgentResponse::Refused { code: code.into(), message };
    match request {
        AgentRequest::Accept(launch) => {
            // A session that is launched here already is answered for whatever the state of things.
            let known = agent.with_sessions(|sessions| {
                (sessions.wants_launch(&launch.session_id, launch.attempt), vec![])
            });
            if !known {
                if agent.leaving.load(Ordering::Acquire) {
                    return refused("leaving", format!("agent {} is going down", agent.id));
                }
                let inventory = agent.inventory();
                if !inventory.reachable {
                    let name = agent.ams.endpoint().name();
                    return refused(
                        "ams-unreachable",
                        format!("agent {} cannot reach AMS at {name}", agent.id),
                    );
                }
                if inventory.lacks(&launch.app) {
                    let text = format!("application {} is not known to agent {}", launch.app, agent.id);
                    return refused("unknown-application", text);
                }
            }
            let accepted = agent.with_sessions(|sessions| match sessions.accept(Instant::now(), &launch) {
                Ok(work) => (Ok(()), work),
                Err(text) => (Err(text), Vec::new()),
            });
            match accepted {
                Ok(()) => AgentResponse::Accepted { stun_servers: agent.ice_servers(&launch.session_id) },
                Err(text) => refused("session-ended", text),
            }
        }
        AgentRequest::Credentials { session_id } => {
            AgentResponse::Accepted { stun_servers: agent.ice_servers(&session_id) }
        }
        AgentRequest::End { session_id, message, force } => {
            let state =
                agent.with_sessions(|sessions| sessions.end(Instant::now(), &session_id, &message, force));
            AgentResponse::Ending { state }
        }
    }
}

async fn report(agent: &Arc<Agent>) {
    let mut agents = tokio::time::interval(REPORT_EVERY);
    agents.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut sessions = tokio::time::interval(REPORT_SESSIONS_EVERY);
    sessions.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut told = None;
    loop {
        tokio::select! {
            _ = agents.tick() => {
                let report = agent_report(agent);
                agent.bus.publish_json(&agents_report(), &report);
                told = Some(report);
            }
            _ = sessions.tick() => {
                if knows_cluster(agent) {
                    report_all(agent);
                }
            }
            () = agent.changed.notified() => {
                tokio::time::sleep(REPORT_PAUSE).await;
                let changed = match knows_cluster(agent) {
                    true => agent.with_sessions(|sessions| (sessions.report_changed(), Vec::new())),
                    false => Vec::new(),
                };
                for part in changed.chunks(SESSIONS_PER_REPORT) {
                    publish_sessions(agent, part.to_vec(), false, (0, 0, 1));
                }
                let report = agent_report(agent);
                // The time in a report always differs; capacity may wait for the next report.
                let news = told.as_ref().is_none_or(|told: &AgentReport| {
                    told.applications != report.applications || told.ams_reachable != report.ams_reachable
                });
                if news {
                    agent.bus.publish_json(&agents_report(), &report);
                    told = Some(report);
                }
            }
        }
    }
}

/// Gateways take a session that is reported from another cluster for one that runs twice; so nothing is reported
/// before AMS, or the configuration, has named the cluster.
fn knows_cluster(agent: &Agent) -> bool {
    !agent.inventory().cluster_id.is_empty()
}

fn report_all(agent: &Arc<Agent>) {
    let complete = agent.inventory().is_complete(Instant::now());
    let all = agent.with_sessions(|sessions| (sessions.report_all(), Vec::new()));
    let series = agent.series.fetch_add(1, Ordering::Relaxed);
    let mut parts: Vec<&[SessionReport]> = all.chunks(SESSIONS_PER_REPORT).collect();
    if parts.is_empty() {
        parts.push(&[]);
    }
    for (part, sessions) in parts.iter().enumerate() {
        let numbers = (series, part as u32, parts.len() as u32);
        publish_sessions(agent, sessions.to_vec(), complete, numbers);
    }
}

/// `numbers`: series, part and parts of a complete report.
fn publish_sessions(agent: &Agent, sessions: Vec<SessionReport>, complete: bool, numbers: (u64, u32, u32)) {
    if sessions.is_empty() && !complete {
        return;
    }
    let (series, part, parts) = numbers;
    let report = SessionsReport {
        version: PROTOCOL_VERSION,
        agent_id: agent.id.clone(),
        cluster_id: agent.inventory().cluster_id.clone(),
        complete,
        series,
        part,
        parts,
        sessions,
    };
    agent.bus.publish_json(&sessions_report(), &report);
}

fn agent_report(agent: &Agent) -> AgentReport {
    let inventory = agent.inventory();
    AgentReport {
        version: PROTOCOL_VERSION,
        agent_id: agent.id.clone(),
        incarnation: agent.incarnation.clone(),
        region: agent.config.region.clone(),
        cluster_id: inventory.cluster_id.clone(),
        sent_ms: unix_millis(),
        location: match agent.config.location[..] {
            [latitude, longitude] => Some((latitude, longitude)),
            _ => None,
        },
        stun_urls: agent.stun_urls.clone(),
        applications: inventory.applications.clone(),
        capacity: inventory.capacity.clone(),
        ams_reachable: inventory.reachable,
        leaving: agent.leaving.load(Ordering::Acquire),
    }
}

/// Tells the gateways that no new sessions are wanted here.
pub async fn say_goodbye(agent: &Agent) {
    agent.bus.publish_json(&agents_report(), &agent_report(agent));
    agent.bus.flush(GOODBYE).await;
}

/// Asks a gateway for a session for an instance that AMS is about to start. The same instance again is the same
/// session.
pub async fn create_session(
    agent: &Arc<Agent>,
    post: AgentSessionsPost,
) -> Result<AgentSessionCreated, ApiError> {
    let cluster_id = agent.inventory().cluster_id.clone();
    if cluster_id.is_empty() {
        let text = format!("agent {} has not reached AMS yet and does not know its cluster", agent.id);
        return Err(ApiError::unavailable("ams-unreachable", text));
    }
    let request = GatewayRequest::CreateSession {
        agent_id: agent.id.clone(),
        region: agent.config.region.clone(),
        cluster_id,
        instance_id: post.instance_id.clone(),
        app: post.app,
        screen: post.display,
    };
    match ask(agent, &request).await? {
        GatewayResponse::Created { session_id, joinable, idle_time_min } => {
            // The caller's data is AMS's to add: it has it from its own caller.
            let streaming = agent
                .streaming(
                    &session_id,
                    Some(&post.instance_id),
                    joinable,
                    idle_time_min,
                    serde_json::Value::Null,
                )
                .map_err(ApiError::internal)?;
            tracing::info!(
                session.id = %session_id, instance.id = %post.instance_id,
                "session {session_id} for instance {} of AMS", post.instance_id
            );
            Ok(AgentSessionCreated { streaming })
        }
        other => Err(other_answer(other)),
    }
}

/// Makes or changes a share at a gateway.
pub async fn share(agent: &Arc<Agent>, request: &GatewayRequest) -> Result<ShareCreated, ApiError> {
    match ask(agent, request).await? {
        GatewayResponse::Shared { share } => Ok(share),
        other => Err(other_answer(other)),
    }
}

/// Takes a share away at a gateway.
pub async fn end_share(agent: &Arc<Agent>, session_id: SessionId, share_id: ShareId) -> Result<(), ApiError> {
    let request = GatewayRequest::DeleteShare { agent_id: agent.id.clone(), session_id, share_id };
    match ask(agent, &request).await? {
        GatewayResponse::Ended => Ok(()),
        other => Err(other_answer(other)),
    }
}

/// Tells a gateway that the instance of a session is gone.
pub async fn end_session(agent: &Arc<Agent>, session_id: SessionId) -> Result<(), ApiError> {
    match ask(agent, &GatewayRequest::EndSession { session_id }).await? {
        GatewayResponse::Ended => Ok(()),
        other => Err(other_answer(other)),
    }
}

/// An answer that is not the one that was asked for.
fn other_answer(answer: GatewayResponse) -> ApiError {
    let GatewayResponse::Refused { code, message, status } = answer else {
        return ApiError::internal("the gateway answered another question");
    };
    let status = status.and_then(|status| StatusCode::from_u16(status).ok()).unwrap_or(StatusCode::CONFLICT);
    ApiError::new(status, "refused-by-gateway", format!("the gateway refused: {message}"))
        .with_reasons(serde_json::json!({ "gateway": code }))
}

async fn ask(agent: &Agent, request: &GatewayRequest) -> Result<GatewayResponse, ApiError> {
    agent.bus.request_json(&gateway_sessions(), request, ASK_TIMEOUT).await.map_err(|error| match error {
        RequestError::NoResponders(_) | RequestError::TimedOut { .. } | RequestError::NotConnected { .. } => {
            ApiError::unavailable("gateway-unreachable", format!("no gateway answers: {error}"))
        }
        error => ApiError::internal(error),
    })
}
