//! Asking AMS: the list of instances on every event and every 10 s, launches and deletions.

use std::{sync::Arc, time::Duration};

use fanlight_api::{
    InstanceId, SessionId,
    ams::{EVENT_LIFECYCLE, EVENT_OPERATION, Event, InstanceConfig, InstancesPost, Lifecycle, Operation},
    bus::Launch,
};
use fanlight_client::{ClientError, Signal};
use http::StatusCode;
use tokio::time::Instant;

use crate::{
    Agent,
    inventory::{capacity, reported},
    sessions::{LAUNCHED_TAG, LaunchFailure},
};

/// Without events everything is read this often.
const READ_EVERY: Duration = Duration::from_secs(10);
/// Events that come together share one reading.
const READ_PAUSE: Duration = Duration::from_millis(50);
const FIRST_RETRY: Duration = Duration::from_millis(200);
const LAST_RETRY: Duration = Duration::from_secs(5);
/// How long a launch looks for AMS (the gateway gives a session up after 5 min).
const LAUNCH_PATIENCE: Duration = Duration::from_secs(300);
/// How long a launched instance may take to be accepted or refused by AMS.
const PLACE_PATIENCE: Duration = Duration::from_secs(120);

/// What should be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Wanted {
    instances: bool,
    applications: bool,
}

impl Wanted {
    const ALL: Self = Self { instances: true, applications: true };

    fn is_none(self) -> bool {
        self == Self::default()
    }
}

/// Starts following AMS.
pub fn start(agent: &Arc<Agent>) {
    let follower = agent.clone();
    agent.shutdown.spawn_until_stopped("follow AMS", async move { follow(&follower).await });
    let ticker = agent.clone();
    agent.shutdown.spawn_until_stopped("tick", async move {
        let mut ticks = tokio::time::interval(Duration::from_secs(1));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            ticker.with_sessions(|sessions| ((), sessions.tick(std::time::Instant::now())));
        }
    });
}

async fn follow(agent: &Arc<Agent>) {
    let mut events = agent.ams.events();
    let mut wanted = Wanted::ALL;
    let mut next_full = Instant::now() + READ_EVERY;
    let mut retry: Option<Instant> = None;
    let mut pause = FIRST_RETRY;
    loop {
        if !wanted.is_none() && retry.is_none_or(|at| at <= Instant::now()) {
            match read(agent, wanted).await {
                Ok(()) => {
                    wanted = Wanted::default();
                    retry = None;
                    pause = FIRST_RETRY;
                }
                Err(error) => {
                    let was_reachable = std::mem::replace(&mut agent.inventory().reachable, false);
                    if was_reachable {
                        agent.changed.notify_one();
                        tracing::warn!("AMS cannot be read: {}", error.chain());
                    }
                    wanted = Wanted::ALL;
                    retry = Some(Instant::now() + pause);
                    pause = (pause * 2).min(LAST_RETRY);
                }
            }
            // Whatever comes meanwhile is read in one go.
            tokio::time::sleep(READ_PAUSE).await;
        }
        let wake = retry.map_or(next_full, |at| at.min(next_full));
        tokio::select! {
            signal = events.next() => match signal {
                Signal::Connected => wanted = Wanted::ALL,
                Signal::Event(event) => {
                    let news = wanted_by(&event);
                    wanted.instances |= news.instances;
                    wanted.applications |= news.applications;
                }
                Signal::Disconnected(error) => {
                    tracing::debug!("events of AMS are lost: {}", error.chain());
                    wanted.instances = true;
                }
            },
            () = agent.read_ams.notified() => wanted.instances = true,
            () = tokio::time::sleep_until(wake) => {
                if Instant::now() >= next_full {
                    next_full = Instant::now() + READ_EVERY;
                    wanted = Wanted::ALL;
                }
            }
        }
    }
}

/// What an event makes worth reading.
fn wanted_by(event: &Event) -> Wanted {
    let about = |text: &str| Wanted {
        instances: text.contains("/instances/") || text.contains("/containers/"),
        applications: text.contains("/applications/"),
    };
    match event.kind.as_str() {
        EVENT_LIFECYCLE => match serde_json::from_value::<Lifecycle>(event.metadata.clone()) {
            Ok(lifecycle) => about(&lifecycle.source),
            Err(_) => Wanted::ALL,
        },
        // Instances tell their life by themselves; of applications only operations may.
        EVENT_OPERATION => match serde_json::from_value::<Operation>(event.metadata.clone()) {
            Ok(operation) => Wanted {
                instances: false,
                applications: operation.is_final() && operation.resources.contains_key("applications"),
            },
            Err(_) => Wanted::ALL,
        },
        _ => Wanted::default(),
    }
}

async fn read(agent: &Arc<Agent>, wanted: Wanted) -> Result<(), ClientError> {
    let mut all = None;
    if wanted.applications {
        if agent.inventory().cluster_id.is_empty() {
            let configured = agent.config.cluster_id.clone();
            let cluster_id = if configured.is_empty() {
                // Gateways tell clusters apart by it, so it must not be empty.
                let told = agent.ams.service().await?.cluster_id.filter(|id| !id.is_empty());
                told.unwrap_or_else(|| agent.id.to_string())
            } else {
                configured
            };
            agent.inventory().cluster_id = cluster_id;
        }
        let listed = agent.ams.applications().await?;
        let applications = reported(&listed);
        all = Some(listed);
        let changed = {
            let mut inventory = agent.inventory();
            let changed = inventory.applications != applications;
            inventory.applications = applications;
            changed
        };
        if changed {
            // Gateways should not wait for the next report.
            agent.changed.notify_one();
        }
    }
    let begun = std::time::Instant::now();
    let instances = agent.ams.instances(&[]).await?;
    agent.with_sessions(|sessions| ((), sessions.synced(std::time::Instant::now(), begun, &instances)));
    if let Some(applications) = all {
        // An AMS without nodes in its API is one whose capacity is not known.
        let nodes = match agent.ams.nodes().await {
            Ok(nodes) => nodes,
            Err(error) if error.is_not_found() => Vec::new(),
            Err(error) => return Err(error),
        };
        agent.inventory().capacity = capacity(&nodes, &instances, &applications);
    }
    let mut inventory = agent.inventory();
    if !std::mem::replace(&mut inventory.reachable, true) {
        agent.changed.notify_one();
        tracing::info!("AMS at {} answers", agent.ams.endpoint().name());
    }
    inventory.listed = Some(begun);
    Ok(())
}

/// Asks AMS for the instance of a session until AMS answers, or nobody wants it any more.
pub async fn launch(agent: &Arc<Agent>, launch: Launch) {
    let (session, attempt) = (launch.session_id.clone(), launch.attempt);
    let began = Instant::now();
    let result = match ask(agent, &launch).await {
        Ok(operation) => {
            let instance = operation.resource("instances").and_then(|id| id.parse::<InstanceId>().ok());
            match instance {
                Some(instance) => {
                    tracing::info!(
                        session.id = %session, instance.id = %instance,
                        duration_ms = began.elapsed().as_millis() as u64,
                        "AMS launches instance {instance} for session {session}"
                    );
                    told(agent, &session, attempt, Ok(instance));
                    // Placing may fail later, and then perhaps leaves no instance to tell why.
                    match agent.ams.wait(&operation, PLACE_PATIENCE).await {
                        Err(ClientError::Operation { text, .. }) => {
                            Err(LaunchFailure { text, certain: false })
                        }
                        Ok(_) | Err(_) => return,
                    }
                }
                None => Err(LaunchFailure {
                    text: format!("AMS launched something without an id: {:?}", operation.resources),
                    certain: false,
                }),
            }
        }
        Err(failure) => Err(failure),
    };
    if let Err(failure) = &result {
        tracing::warn!(session.id = %session, "launching session {session} failed: {}", failure.text);
    }
    told(agent, &session, attempt, result);
}

fn told(agent: &Arc<Agent>, session: &SessionId, attempt: u32, result: Result<InstanceId, LaunchFailure>) {
    agent.with_sessions(|sessions| {
        ((), sessions.launched(std::time::Instant::now(), session, attempt, result))
    });
}

async fn ask(agent: &Arc<Agent>, launch: &Launch) -> Result<Operation, LaunchFailure> {
    let session = &launch.session_id;
    let streaming = agent
        .streaming(session, None, launch.joinable, launch.idle_time_min, launch.extra_data.clone())
        .map_err(|error| LaunchFailure {
            text: format!("the agent's certificate: {error}"),
            certain: true,
        })?;
    let request = InstancesPost {
        app_id: launch.app.clone(),
        app_version: launch.app_version.map(i64::from),
        tags: vec![format!("session={session}"), LAUNCHED_TAG.to_owned()],
        config: InstanceConfig {
            platform: "webrtc".into(),
            enable_streaming: true,
            display: launch.screen.into(),
            ..InstanceConfig::default()
        },
        streaming: Some(streaming),
        ..InstancesPost::default()
    };
    let key = format!("{session}/{}", launch.attempt);
    let deadline = Instant::now() + LAUNCH_PATIENCE;
    let mut pause = FIRST_RETRY;
    let mut reached = false;
    loop {
        let wanted =
            agent.with_sessions(|sessions| (sessions.wants_launch(session, launch.attempt), Vec::new()));
        if !wanted {
            return Err(LaunchFailure { text: "the session was ended".into(), certain: !reached });
        }
        reached = true;
        match agent.ams.launch(&request, true, Some(&key)).await {
            Ok(operation) => return Ok(operation),
            // A full disk is not emptied within a user's patience; another cluster may have room.
            Err(ClientError::Refused { status, text, .. })
                if status.is_client_error() || status == StatusCode::INSUFFICIENT_STORAGE =>
            {
                return Err(LaunchFailure { text, certain: true });
            }
            Err(error) if error.is_transient() && Instant::now() < deadline => {
                tracing::warn!(session.id = %session, "launching session {session} is tried again: {}", error.chain());
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LAST_RETRY);
            }
            Err(error) => return Err(LaunchFailure { text: error.chain(), certain: false }),
        }
    }
}

/// Asks AMS once to remove an instance; who wants it gone asks again.
pub async fn delete(agent: &Arc<Agent>, instance: &InstanceId, session: &SessionId, force: bool) {
    match agent.ams.delete_instance(instance.as_str(), force).await {
        Ok(_) => {
            tracing::info!(session.id = %session, instance.id = %instance, "AMS removes instance {instance}");
        }
        Err(error) if error.is_not_found() => {}
        Err(error) => {
            tracing::warn!(
                session.id = %session, instance.id = %instance,
                "removing instance {instance} is tried again: {}", error.chain()
            );
        }
    }
    agent.read_ams.notify_one();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_make_read_what_they_are_about() {
        let event = |kind: &str, metadata: serde_json::Value| Event {
            kind: kind.into(),
            timestamp: String::new(),
            metadata,
        };
        let lifecycle =
            |source: &str| event(EVENT_LIFECYCLE, serde_json::json!({"action": "x", "source": source}));
        let operation = |code: u16, kind: &str| {
            event(
                EVENT_OPERATION,
                serde_json::json!({"id": "o", "class": "task", "description": "", "created_at": null,
                    "updated_at": null, "status": "", "status_code": code, "resources": {kind: ["/1.0/x/1"]}}),
            )
        };
        let instances = Wanted { instances: true, applications: false };
        let applications = Wanted { instances: false, applications: true };
        for (event, expected) in [
            (lifecycle("/1.0/instances/i1"), instances),
            (lifecycle("/1.0/containers/i1"), instances),
            (lifecycle("/1.0/applications/a1"), applications),
            (lifecycle("/1.0/nodes/n"), Wanted::default()),
            (operation(200, "applications"), applications),
            (operation(103, "applications"), Wanted::default()),
            (operation(200, "instances"), Wanted::default()),
            (event(EVENT_LIFECYCLE, serde_json::json!(7)), Wanted::ALL),
            (event("logging", serde_json::json!({})), Wanted::default()),
        ] {
            assert_eq!(wanted_by(&event), expected, "{event:?}");
        }
    }
}
