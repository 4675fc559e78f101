//! The shell around the session core: requests, reports and reconcilers, over the store and the bus. Decides
//! nothing that [`crate::session`] or [`crate::agents`] can decide.
//!
//! Every change is a compare-and-set on the record in the store, so that units do not need to know each other.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use fanlight_api::{
    SessionId,
    bus::{
        AgentReport, AgentRequest, AgentResponse, GATEWAY_GROUP, GatewayRequest, GatewayResponse,
        InstanceState, SessionReport, SessionsReport, agent_requests, agents_report, gateway_sessions,
        sessions_report,
    },
    gateway::{Location, Screen, SessionStatus, SessionsPost, StunServer},
};
use fanlight_service::ApiError;
use fanlight_store::{Compare, Event, Op, StoreError, StoreExt as _, decode, encode};
use futures_util::StreamExt as _;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;

use crate::{
    Gateway,
    absence::Absence,
    accounts::Caller,
    agents::{NoAgent, Refusals, Wanted, Whereabouts},
    geoip::is_place,
    index::{SESSIONS, key},
    session::{Client, Ending, Input, Origin, Session, Verdict, Waiting, Want},
    shares,
};

/// Instances of AMS-made sessions, to find the session of an instance again.
const INSTANCES: &str = "gateway/instances/";
/// Sessions whose record went although an instance may be left: reports of it are answered with its end.
const ENDED: &str = "gateway/ended/";
/// Items of configuration that were set.
const SETTINGS: &str = "gateway/config/";
/// Idempotency keys of creates.
const REPEATS: &str = "gateway/repeats/";
/// How long idempotency keys and ended sessions are remembered, seconds.
const DAY: i64 = 24 * 3600;
/// How often what has expired is taken away.
const SWEEP: Duration = Duration::from_secs(60);
/// Most records that are looked at in one step of that.
const SWEEP_PAGE: usize = 200;
/// Right after the start no agent can be known yet; requests that need one wait so long.
pub const FIRST_REPORTS: Duration = Duration::from_secs(3);
/// For everything asked of an agent but `Accept`.
const AGENT_TIME: Duration = Duration::from_secs(2);
/// How often the reconciler looks.
const RECONCILE: Duration = Duration::from_millis(500);
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LAST_PAUSE: Duration = Duration::from_secs(10);
/// How long `sync=true` waits.
const SYNC_TIME: Duration = Duration::from_secs(60);
/// Largest `extra_data`, bytes of JSON: it travels in one bus message and in the guest file.
const MAX_EXTRA_DATA: usize = 64 * 1024;
const MAX_IDLE_MINUTES: i64 = 365 * 24 * 60;
/// Most regions in the round trips of a request.
const MAX_ROUND_TRIPS: usize = 100;
/// Longest round trip that is believed, milliseconds.
const MAX_ROUND_TRIP: f64 = 60_000.0;
/// Requests to agents and record changes that one report or tick may cause at a time.
const CONCURRENT: usize = 64;
/// How often a change begins again because somebody else was faster.
const CHANGE_ATTEMPTS: u32 = 64;
/// Reports of different agents that are taken at a time.
const LANES: usize = 32;
/// Reports that wait in each lane; then the bus has to wait.
const LANE_REPORTS: usize = 64;

/// State of the shell that is not in the store: only times of this unit.
#[derive(Default)]
pub struct Reconciler {
    /// When to ask the agent about a pending session again, and the pause after that.
    asked: Mutex<HashMap<SessionId, (Instant, Duration)>>,
    /// What complete reports lack.
    absence: Mutex<Absence>,
    /// Since when sessions wait.
    waiting: Mutex<Waiting>,
}

impl Reconciler {
    fn waiting(&self) -> std::sync::MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Repeat {
    session_id: SessionId,
    body: String,
    /// Unix seconds.
    expires_at: i64,
}

/// A session whose record went although an instance may be left.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Ended {
    /// Unix seconds.
    expires_at: i64,
}

/// What is looked at to see whether a record has expired.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Expiring {
    expires_at: i64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct InstanceSession {
    session_id: SessionId,
}

/// A create request that was checked.
struct Checked {
    app: String,
    app_version: Option<u32>,
    region: String,
    ephemeral: bool,
    joinable: bool,
    idle_time_min: u32,
    extra_data: Value,
    screen: Screen,
    location: Option<Location>,
    client_address: Option<IpAddr>,
    round_trips: BTreeMap<String, f64>,
}

fn check(post: SessionsPost, default_idle_minutes: u32) -> Result<Checked, ApiError> {
    let bad = |text: String| ApiError::bad_request("invalid-body", text);
    let app = post.app.unwrap_or_default();
    if app.is_empty() {
        return Err(bad("app is missing: the name of an application is needed".into()));
    }
    if app.len() > 255 {
        return Err(bad("app is too long: at most 255 characters are allowed".into()));
    }
    let app_version = match post.app_version {
        None | Some(-1) => None,
        Some(version) => Some(u32::try_from(version).map_err(|_| {
            bad(format!("app_version is {version}: a version number, or -1 for the published one, is needed"))
        })?),
    };
    let region = post.region.unwrap_or_default();
    if region.len() > 255 {
        return Err(bad("region is too long: at most 255 characters are allowed".into()));
    }
    let joinable = post.joinable.unwrap_or(false);
    let idle_time_min = match post.idle_time_min {
        // Covers the time before the first client of a non-joinable session too.
        None => default_idle_minutes,
        Some(minutes) if (0..=MAX_IDLE_MINUTES).contains(&minutes) => minutes as u32,
        Some(minutes) => {
            return Err(bad(format!(
                "idle_time_min is {minutes}: 0 to {MAX_IDLE_MINUTES} minutes are allowed"
            )));
        }
    };
    let extra = post.extra_data.to_string().len();
    if extra > MAX_EXTRA_DATA {
        return Err(bad(format!("extra_data has {extra} bytes: at most {MAX_EXTRA_DATA} are allowed")));
    }
    if let Some(location) = post.location.filter(|location| !is_place(*location)) {
        return Err(bad(format!(
            "location is {}, {}: latitudes from -90 to 90 and longitudes from -180 to 180 are needed",
            location.latitude, location.longitude
        )));
    }
    let client_address = match post.client_address.as_deref() {
        None | Some("") => None,
        Some(text) => Some(text.parse().map_err(|_| {
            let text: String = text.chars().take(64).collect();
            bad(format!("client_address is {text:?}: an IPv4 or IPv6 address is needed"))
        })?),
    };
    if post.round_trips.len() > MAX_ROUND_TRIPS {
        return Err(bad(format!(
            "round_trips has {} regions: at most {MAX_ROUND_TRIPS} are allowed",
            post.round_trips.len()
        )));
    }
    if let Some((region, ms)) = post.round_trips.iter().find(|(_, ms)| !(0.0..=MAX_ROUND_TRIP).contains(*ms))
    {
        let region: String = region.chars().take(64).collect();
        return Err(bad(format!(
            "round_trips says {ms} for {region:?}: 0 to {MAX_ROUND_TRIP} milliseconds are allowed"
        )));
    }
    let screen =
        post.screen.unwrap_or_default().apply(Screen::default()).map_err(|error| bad(error.to_string()))?;
    Ok(Checked {
        app,
        app_version,
        region,
        ephemeral: post.ephemeral.unwrap_or(true),
        joinable,
        idle_time_min,
        extra_data: post.extra_data,
        screen,
        location: post.location,
        client_address,
        round_trips: post.round_trips,
    })
}

fn fold_settings(items: &mut BTreeMap<String, String>, event: Event) {
    let put = |items: &mut BTreeMap<String, String>, key: &str, value: &[u8]| match (
        key.strip_prefix(SETTINGS),
        decode::<String>(key, value),
    ) {
        (Some(name), Ok(value)) => drop(items.insert(name.to_owned(), value)),
        (_, Err(error)) => tracing::error!("config item {key} cannot be read and is left out: {error}"),
        (None, Ok(_)) => {}
    };
    match event {
        Event::Reset { entries, .. } => {
            items.clear();
            for entry in entries {
                put(items, &entry.key, &entry.value);
            }
        }
        Event::Put(entry) => put(items, &entry.key, &entry.value),
        Event::Delete { key, .. } => {
            items.remove(key.strip_prefix(SETTINGS).unwrap_or_default());
        }
    }
}

/// Outcome of a delete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deleted {
    /// The session has ended.
    Done,
    /// It is being ended.
    UnderWay,
}

impl From<NoAgent> for ApiError {
    fn from(error: NoAgent) -> Self {
        let text = error.to_string();
        match error {
            NoAgent::NoAgents => Self::not_found("no-agent", text),
            NoAgent::UnknownRegion { known, .. } => {
                Self::not_found("unknown-region", text).with_reasons(serde_json::json!({ "regions": known }))
            }
            NoAgent::UnknownApplication { .. } => Self::bad_request("unknown-application", text),
            NoAgent::Refused { refusals, .. } => {
                let reasons = serde_json::to_value(refusals).unwrap_or_default();
                Self::not_found("no-agent", text).with_reasons(reasons)
            }
        }
    }
}

/// The store's failure, as an answer.
pub fn store_error(error: StoreError) -> ApiError {
    match error {
        StoreError::Full { .. } => ApiError::new(
            http::StatusCode::INSUFFICIENT_STORAGE,
            "store-full",
            "the gateway's disk is full: nothing can be created until there is space",
        )
        .with_source(error),
        StoreError::Unavailable { .. } => ApiError::new(
            http::StatusCode::SERVICE_UNAVAILABLE,
            "store-unavailable",
            "the gateway cannot reach its store: look again at what there is before you try again",
        )
        .with_source(error),
        error => ApiError::internal(error),
    }
}

/// No such session, as an answer.
pub fn no_session(id: &SessionId) -> ApiError {
    ApiError::not_found("session-not-found", format!("there is no session {id}"))
}

impl Gateway {
    /// Creates a session: chooses an agent, writes the record, has the agent accept it.
    ///
    /// `from`: the address of the client, where the caller is the client.
    ///
    /// # Errors
    /// The request is wrong, or nobody can take it; nothing is left behind.
    pub async fn create_session(
        &self,
        caller: &Caller,
        post: SessionsPost,
        repeat: Option<&str>,
        from: Option<IpAddr>,
    ) -> Result<(Arc<Session>, Vec<StunServer>), ApiError> {
        let started = Instant::now();
        let body = hex::encode(Sha256::digest(serde_json::to_vec(&post).unwrap_or_default()));
        let repeat_key = repeat.map(|text| {
            let name = format!("{}\n{text}", caller.account);
            format!("{REPEATS}{}", hex::encode(Sha256::digest(name)))
        });
        let known = match &repeat_key {
            Some(key) => self.store.get_json::<Repeat>(key).await.map_err(store_error)?,
            None => None,
        };
        if let Some(known) = &known {
            if known.value.body != body {
                return Err(ApiError::conflict(
                    "idempotency-key-reused",
                    "this Idempotency-Key was used for another request before",
                ));
            }
            // The request that made it may still be looking for an agent, and must not take back what is said here.
            let promised = self.change(&known.value.session_id, Session::promise).await;
            if let Some(session) = promised.map_err(store_error)? {
                let stun_servers = self.credentials(&session).await?;
                return Ok((session, stun_servers));
            }
        }
        let wanted = check(post, self.settings().idle_time_min)?;
        let located = || {
            let address = wanted.client_address.or(from)?;
            self.geoip.as_ref()?.locate(address)
        };
        let client = match wanted.location {
            _ if !wanted.round_trips.is_empty() => Whereabouts::RoundTrips(&wanted.round_trips),
            Some(location) => Whereabouts::At(location),
            None => located().map_or(Whereabouts::Unknown, Whereabouts::At),
        };
        let want = Wanted { app: &wanted.app, version: wanted.app_version, region: &wanted.region, client };
        let candidates = loop {
            match self.agents().choose(Instant::now(), want, rand::random::<f64>) {
                Ok(candidates) => break candidates,
                Err(_) if self.started.elapsed() < FIRST_REPORTS => {}
                Err(error) => {
                    tracing::warn!(
                        app = wanted.app,
                        region = wanted.region,
                        "no cluster for a session: {error}"
                    );
                    return Err(error.into());
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        let first = &candidates[0];
        let mut session = Session {
            id: SessionId::generate(),
            origin: Origin::Gateway,
            account: caller.account.clone(),
            app: wanted.app,
            app_version: wanted.app_version,
            region: first.region.clone(),
            cluster_id: first.cluster_id.clone(),
            agent_id: first.agent_id.clone(),
            instance_id: None,
            seen: false,
            screen: wanted.screen,
            joinable: wanted.joinable,
            ephemeral: wanted.ephemeral,
            idle_time_min: wanted.idle_time_min,
            extra_data: wanted.extra_data,
            attempt: 1,
            status: SessionStatus::Created,
            message: String::new(),
            created_at: self.now(),
            created_ms: self.now_ms(),
            generation: 1,
            used_generation: 0,
            client: Client::Never,
            ending: None,
            promised: false,
        };
        let id = session.id.clone();
        let mut compares = vec![Compare::absent(key(&id))];
        let mut ops = vec![Op::put(key(&id), encode(&key(&id), &session).map_err(store_error)?)];
        if let Some(key) = &repeat_key {
            let repeat = Repeat { session_id: id.clone(), body, expires_at: self.now() + DAY };
            ops.push(Op::put(key, encode(key, &repeat).map_err(store_error)?));
            // What was read at first counts: the same request at another unit may have been acknowledged since.
            compares.push(match &known {
                Some(known) => Compare::revision(key, known.revision),
                None => Compare::absent(key),
            });
        }
        // This request asks the agents itself; the reconciler comes later.
        let later = Instant::now() + self.config.limits.accept_time * candidates.len() as u32 + FIRST_PAUSE;
        self.asked().insert(id.clone(), (later, FIRST_PAUSE));
        let committed = self.store.transact(compares, ops).await.map_err(|error| match error {
            StoreError::Conflict => {
                ApiError::conflict("repeated-at-once", "the same request is being worked on right now")
            }
            error => store_error(error),
        })?;
        self.index.put(session.clone(), committed.revision);
        let mut refusals = Refusals::default();
        for (number, candidate) in candidates.iter().enumerate() {
            if number > 0 {
                let moved = self.leave(&session, |current| current.move_to(candidate)).await;
                match moved.map_err(store_error)? {
                    Some(current)
                        if current.cluster_id == candidate.cluster_id && current.ending.is_none() =>
                    {
                        session = (*current).clone();
                    }
                    left => return self.taken_after_all(&id, left).await,
                }
            }
            match self.accept(&session).await {
                Ok(stun_servers) => {
                    self.agents().placed(&candidate.agent_id);
                    let current = self.index.get(&id).unwrap_or_else(|| Arc::new(session));
                    tracing::info!(
                        session.id = %id,
                        agent.id = %candidate.agent_id,
                        app = current.app,
                        duration_ms = started.elapsed().as_millis() as u64,
                        "session {id} was created"
                    );
                    return Ok((current, stun_servers));
                }
                Err(Refused::Said { code, message }) => {
                    tracing::info!(session.id = %id, agent.id = %candidate.agent_id, code, "agent refused: {message}");
                    refusals.add(&candidate.agent_id, message);
                }
                Err(Refused::Silent(reason)) => {
                    tracing::warn!(session.id = %id, agent.id = %candidate.agent_id, "agent did not accept: {reason}");
                    refusals.add(&candidate.agent_id, "does not answer");
                }
            }
        }
        let left = self.leave(&session, Session::give_up).await.map_err(store_error)?;
        if left.as_ref().is_some_and(|left| left.status == SessionStatus::Active) {
            return self.taken_after_all(&id, left).await;
        }
        let error = NoAgent::Refused { app: session.app, refusals };
        tracing::warn!(session.id = %id, "no cluster for a session: {error}");
        Err(error.into())
    }

    /// Takes a session away from an agent that refused it or did not answer. It may have taken it all the same, and
    /// may still hear an earlier question of another unit: what it has of it is ended, now or when it is reported.
    async fn leave(
        &self,
        session: &Session,
        change: impl FnMut(&Session) -> Verdict + Send,
    ) -> Result<Option<Arc<Session>>, StoreError> {
        self.remember_ended(&session.id).await?;
        let after = self.change(&session.id, change).await?;
        if after.as_ref().is_none_or(|after| after.cluster_id != session.cluster_id) {
            let end = AgentRequest::End {
                session_id: session.id.clone(),
                message: "the session went elsewhere".into(),
                force: true,
            };
            self.bus.publish_json(&agent_requests(&session.agent_id), &end);
        }
        if after.is_none() {
            self.asked().remove(&session.id);
        }
        Ok(after)
    }

    /// What a create that found its session changed by others answers.
    async fn taken_after_all(
        &self,
        id: &SessionId,
        session: Option<Arc<Session>>,
    ) -> Result<(Arc<Session>, Vec<StunServer>), ApiError> {
        match session {
            Some(session) if session.is_live() => {
                let stun_servers = self.credentials(&session).await?;
                Ok((session, stun_servers))
            }
            _ => Err(no_session(id)),
        }
    }

    async fn accept(&self, session: &Session) -> Result<Vec<StunServer>, Refused> {
        let request = AgentRequest::Accept(session.launch());
        match self.ask(session, &request, self.config.limits.accept_time).await? {
            AgentResponse::Accepted { stun_servers } => Ok(usable(stun_servers)),
            other => Err(Refused::Silent(format!("unexpected answer {other:?}"))),
        }
    }

    async fn ask(
        &self,
        session: &Session,
        request: &AgentRequest,
        time: Duration,
    ) -> Result<AgentResponse, Refused> {
        let agent = self.agents().of_session(Instant::now(), &session.agent_id, &session.cluster_id);
        match self.bus.request_json::<_, AgentResponse>(&agent_requests(&agent), request, time).await {
            Ok(AgentResponse::Refused { code, message }) => Err(Refused::Said { code, message }),
            Ok(answer) => Ok(answer),
            Err(error) => Err(Refused::Silent(fanlight_service::telemetry::chain(&error))),
        }
    }

    /// ICE servers for another client of a session.
    ///
    /// # Errors
    /// Its agent does not answer.
    pub async fn credentials(&self, session: &Session) -> Result<Vec<StunServer>, ApiError> {
        let request = AgentRequest::Credentials { session_id: session.id.clone() };
        let mut last = String::new();
        for _ in 0..2 {
            match self.ask(session, &request, AGENT_TIME).await {
                Ok(AgentResponse::Accepted { stun_servers }) => return Ok(usable(stun_servers)),
                Ok(other) => last = format!("unexpected answer {other:?}"),
                Err(Refused::Said { message, .. }) => {
                    return Err(ApiError::unavailable("agent-refused", message));
                }
                Err(Refused::Silent(reason)) => {
                    last = reason;
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            }
        }
        let text =
            format!("the agent {} of session {} does not answer; try again", session.agent_id, session.id);
        Err(ApiError::unavailable("agent-unreachable", text).with_source(last))
    }

    /// A session as the store has it.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn find_session(&self, id: &SessionId) -> Result<Option<Arc<Session>>, ApiError> {
        match self.store.get_json::<Session>(&key(id)).await.map_err(store_error)? {
            Some(record) => Ok(Some(self.index.put(record.value, record.revision))),
            None => {
                self.index.remove(id);
                Ok(None)
            }
        }
    }

    /// Changes a record by compare-and-set. Returns it as it then is; `None` when there is none (any more).
    ///
    /// `change` first gets the record as this unit knows it, which saves a reading, and is called again with what the
    /// store has when that is newer, or when it would leave an old one as it is.
    ///
    /// # Errors
    /// The store cannot be used.
    pub async fn change(
        &self,
        id: &SessionId,
        mut change: impl FnMut(&Session) -> Verdict + Send,
    ) -> Result<Option<Arc<Session>>, StoreError> {
        let key = key(id);
        let mut known = self.index.record(id);
        let mut attempt = 0;
        let (before, after) = loop {
            let read = known.is_none();
            let (before, revision) = match known.take() {
                Some(known) => known,
                None => match self.store.get_json::<Session>(&key).await? {
                    Some(record) => (Arc::new(record.value), record.revision),
                    None => {
                        self.index.remove(id);
                        return Ok(None);
                    }
                },
            };
            let (ops, after) = match change(&before) {
                Verdict::Keep if read => {
                    return Ok(Some(self.index.put(Arc::unwrap_or_clone(before), revision)));
                }
                Verdict::Keep => continue,
                Verdict::Put(next) => (vec![Op::put(&key, encode(&key, &next)?)], Some(next)),
                Verdict::Remove => {
                    let mut ops = vec![Op::delete(&key), Op::delete(shares::key(id))];
                    if let (Origin::Ams, Some(instance_id)) = (before.origin, &before.instance_id) {
                        ops.push(Op::delete(format!("{INSTANCES}{instance_id}")));
                    }
                    (ops, None)
                }
            };
            match self.store.transact(vec![Compare::revision(&key, revision)], ops).await {
                Ok(committed) => {
                    let after = after.map(|after| self.index.put(*after, committed.revision));
                    if after.is_none() {
                        self.index.remove(id);
                    }
                    break (before, after);
                }
                // Somebody else was faster: again with what they made of it.
                Err(StoreError::Conflict) if attempt < CHANGE_ATTEMPTS => attempt += 1,
                Err(error) => return Err(error),
            }
        };
        let (was, is) = (before.status, after.as_ref().map(|session| session.status));
        if Some(was) != is {
            let session = &before;
            let message = after.as_ref().map(|session| session.message.as_str()).unwrap_or_default();
            let age_ms = u64::try_from(self.now_ms() - session.created_ms).unwrap_or(0);
            if was == SessionStatus::Created && is == Some(SessionStatus::Active) {
                self.observer.funnel("active", age_ms);
            }
            tracing::info!(
                session.id = %id,
                agent.id = %session.agent_id,
                duration_ms = age_ms,
                message,
                "session {id} is now {}",
                is.map_or("gone".into(), |is| format!("{is:?}").to_lowercase())
            );
        }
        Ok(after)
    }

    async fn handle(&self, id: &SessionId, input: &Input<'_>) -> Result<Option<Arc<Session>>, StoreError> {
        self.change(id, |session| session.handle(input)).await
    }

    /// The same for what the agent of a cluster told.
    async fn handle_from(
        &self,
        id: &SessionId,
        cluster_id: &str,
        input: &Input<'_>,
    ) -> Result<Option<Arc<Session>>, StoreError> {
        self.change(id, |session| session.handle_from(cluster_id, input)).await
    }

    /// Remembers that nothing may be left of a session once its record is gone: reports of it will be answered with
    /// its end.
    async fn remember_ended(&self, id: &SessionId) -> Result<(), StoreError> {
        let key = format!("{ENDED}{id}");
        let value = encode(&key, &Ended { expires_at: self.now() + DAY })?;
        self.store.transact(vec![], vec![Op::put(key, value)]).await?;
        Ok(())
    }

    /// Removes a record although an instance may be left.
    async fn forget(&self, id: &SessionId) -> Result<(), StoreError> {
        self.remember_ended(id).await?;
        let ops = vec![Op::delete(key(id)), Op::delete(shares::key(id))];
        self.store.transact(vec![], ops).await?;
        self.index.remove(id);
        self.asked().remove(id);
        Ok(())
    }

    /// Ends a session. `force`: also when its agent cannot be reached. `sync`: wait until it has ended.
    ///
    /// # Errors
    /// There is no such session, or it did not end in time.
    pub async fn delete_session(&self, id: &SessionId, force: bool, sync: bool) -> Result<Deleted, ApiError> {
        let Some(found) = self.find_session(id).await? else { return Err(no_session(id)) };
        if !found.seen {
            // A launch may still be on its way when the agent says that there is nothing.
            self.remember_ended(id).await.map_err(store_error)?;
        }
        let mut follower = self.index.follow(id);
        let ending = Ending { message: "the session was ended by its owner".into(), force };
        let Some(session) = self.handle(id, &Input::End(ending)).await.map_err(store_error)? else {
            return Ok(Deleted::Done);
        };
        let over = |session: &Option<Arc<Session>>| {
            session.as_ref().is_none_or(|session| session.status == SessionStatus::Terminated)
        };
        if force || sync {
            if !self.end(&session).await && force {
                self.forget(id).await.map_err(store_error)?;
                tracing::warn!(session.id = %id, "session {id} was removed by force: its agent does not answer");
                return Ok(Deleted::Done);
            }
        } else {
            let (gateway, session) = (self.clone(), session.clone());
            self.shutdown.spawn_until_stopped("end session", async move {
                gateway.end(&session).await;
            });
        }
        if !sync {
            let done = over(&follower.borrow());
            return Ok(if done { Deleted::Done } else { Deleted::UnderWay });
        }
        match tokio::time::timeout(SYNC_TIME, follower.wait_for(over)).await {
            Ok(_) => Ok(Deleted::Done),
            Err(_) => Err(ApiError::new(
                http::StatusCode::INTERNAL_SERVER_ERROR,
                "still-ending",
                format!("session {id} did not end within {} s; it is still being ended", SYNC_TIME.as_secs()),
            )),
        }
    }

    /// Asks the agent to end a session once. Returns whether it answered.
    async fn end(&self, session: &Session) -> bool {
        let Some(ending) = &session.ending else { return true };
        let request = AgentRequest::End {
            session_id: session.id.clone(),
            message: ending.message.clone(),
            force: ending.force,
        };
        self.asked().insert(session.id.clone(), (Instant::now() + AGENT_TIME + FIRST_PAUSE, FIRST_PAUSE));
        match self.ask(session, &request, AGENT_TIME).await {
            Ok(AgentResponse::Ending { state: InstanceState::Gone }) => {
                let gone = self.handle_from(&session.id, &session.cluster_id, &Input::Gone).await;
                if let Err(error) = gone {
                    tracing::error!(session.id = %session.id, "noting the end of a session failed: {error}");
                }
                true
            }
            Ok(_) => true,
            Err(Refused::Said { code, message }) => {
                tracing::warn!(session.id = %session.id, code, "agent refused to end a session: {message}");
                true
            }
            Err(Refused::Silent(reason)) => {
                tracing::debug!(session.id = %session.id, "agent did not answer to an end: {reason}");
                false
            }
        }
    }

    fn asked(&self) -> std::sync::MutexGuard<'_, HashMap<SessionId, (Instant, Duration)>> {
        self.reconciler.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts everything that runs beside requests: reports, requests of agents, the watch, the reconciler.
    ///
    /// # Errors
    /// Subscribing or watching fails.
    pub async fn start_sessions(&self) -> Result<(), crate::StartError> {
        let mut watch = self.store.watch(SESSIONS).await?;
        // The first event is the state: no request is served before it is known.
        if let Some(event) = watch.next().await {
            self.index.fold(event);
        }
        let gateway = self.clone();
        self.shutdown.spawn_until_stopped("watch sessions", async move {
            while let Some(event) = watch.next().await {
                gateway.index.fold(event);
            }
        });

        let mut reports = self.bus.subscribe(&agents_report()).await?;
        let gateway = self.clone();
        self.shutdown.spawn_until_stopped("agent reports", async move {
            while let Some(message) = reports.next().await {
                match message.json::<AgentReport>() {
                    Ok(report) => gateway.agents().report(Instant::now(), report),
                    Err(error) => tracing::warn!("a report of an agent cannot be read: {error}"),
                }
            }
        });

        let mut reports = self.bus.queue_subscribe(&sessions_report(), GATEWAY_GROUP).await?;
        let lanes = self.report_lanes();
        self.shutdown.spawn_until_stopped("session reports", async move {
            while let Some(message) = reports.next().await {
                match message.json::<SessionsReport>() {
                    Ok(report) => {
                        let lane = lane(report.agent_id.as_str(), lanes.len());
                        // A lane ends with this task only.
                        let _ = lanes[lane].send(report).await;
                    }
                    Err(error) => tracing::warn!("a report of sessions cannot be read: {error}"),
                }
            }
        });

        // Every report reaches every unit a second time, but only the owner looks.
        let mut reports = self.bus.subscribe(&sessions_report()).await?;
        let gateway = self.clone();
        self.shutdown.spawn_until_stopped("absent sessions", async move {
            while let Some(message) = reports.next().await {
                if gateway.ownership.is_owner() {
                    // What cannot be read was told by whoever took it for its states.
                    if let Ok(report) = message.json::<SessionsReport>() {
                        gateway.look_for_absent(report).await;
                    }
                } else {
                    gateway.reconciler.absence.lock().unwrap_or_else(PoisonError::into_inner).reset();
                }
            }
        });

        let gateway = self.clone();
        let serving = self
            .bus
            .serve_json(&gateway_sessions(), GATEWAY_GROUP, move |request: GatewayRequest| {
                let gateway = gateway.clone();
                async move { gateway.serve_agent(request).await }
            })
            .await?;
        let gateway = self.clone();
        self.shutdown.spawn_until_stopped("reconcile sessions", async move {
            let _serving = serving;
            let mut swept = Instant::now();
            loop {
                tokio::time::sleep(RECONCILE).await;
                if !*gateway.bus.connected().borrow() || !gateway.ownership.is_owner() {
                    // While we see nothing, or another unit is responsible, nothing is anybody's fault.
                    gateway.reconciler.waiting().reset();
                    gateway.reconciler.absence.lock().unwrap_or_else(PoisonError::into_inner).reset();
                    continue;
                }
                gateway.reconcile().await;
                gateway.forget_absent();
                if swept.elapsed() >= SWEEP {
                    swept = Instant::now();
                    if let Err(error) = gateway.sweep().await {
                        tracing::warn!("taking away what has expired failed: {error}");
                    }
                }
            }
        });
        let gateway = self.clone();
        self.shutdown.spawn("own the reconciler", async move {
            gateway.ownership.keep(&gateway.store, &gateway.config.unit, &gateway.shutdown).await;
        });
        Ok(())
    }

    /// Reads the items of configuration, and follows their changes.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn start_settings(&self) -> Result<(), StoreError> {
        let mut watch = self.store.watch(SETTINGS).await?;
        let mut items = BTreeMap::new();
        if let Some(event) = watch.next().await {
            fold_settings(&mut items, event);
        }
        self.set_settings(&items);
        let gateway = self.clone();
        self.shutdown.spawn_until_stopped("watch configuration", async move {
            while let Some(event) = watch.next().await {
                fold_settings(&mut items, event);
                gateway.set_settings(&items);
            }
        });
        Ok(())
    }

    /// Changes an item; this unit knows it when this returns.
    ///
    /// # Errors
    /// The store cannot be used.
    pub async fn change_setting(&self, name: &str, value: &str) -> Result<(), StoreError> {
        let key = format!("{SETTINGS}{name}");
        if value.is_empty() {
            self.store.transact(vec![], vec![Op::delete(&key)]).await?;
        } else {
            self.store.put_json(&key, &value.to_owned()).await?;
        }
        let items = self.store.list_json::<String>(SETTINGS).await?;
        let name = |key: String| key.strip_prefix(SETTINGS).unwrap_or_default().to_owned();
        self.set_settings(&items.into_iter().map(|(key, record)| (name(key), record.value)).collect());
        Ok(())
    }

    /// Takers of reports: those of one agent are taken in their order, those of many side by side, because each
    /// waits for the store, and the store makes many changes last at once.
    fn report_lanes(&self) -> Vec<mpsc::Sender<SessionsReport>> {
        let lane = || {
            let (sender, mut queue) = mpsc::channel(LANE_REPORTS);
            let gateway = self.clone();
            self.shutdown.spawn_until_stopped("session states", async move {
                while let Some(report) = queue.recv().await {
                    gateway.take_report(report).await;
                }
            });
            sender
        };
        std::iter::repeat_with(lane).take(LANES).collect()
    }

    /// Takes away records whose time is over.
    async fn sweep(&self) -> Result<(), StoreError> {
        let now = self.now();
        for prefix in [REPEATS, ENDED] {
            let mut after: Option<String> = None;
            loop {
                let page = self.store.range(prefix, after.as_deref(), SWEEP_PAGE).await?;
                let mut removals = Vec::new();
                for entry in &page.entries {
                    // What cannot be read is somebody else's.
                    let over = decode::<Expiring>(&entry.key, &entry.value);
                    if over.is_ok_and(|record| record.expires_at <= now) {
                        removals
                            .push((Compare::revision(&entry.key, entry.revision), Op::delete(&entry.key)));
                    }
                }
                for part in removals.chunks(fanlight_store::MAX_TRANSACTION_OPS) {
                    let (compares, ops) = part.iter().cloned().unzip();
                    match self.store.transact(compares, ops).await {
                        // Used again meanwhile; the next sweep looks again.
                        Ok(_) | Err(StoreError::Conflict) => {}
                        Err(error) => return Err(error),
                    }
                }
                after = page.entries.last().map(|entry| entry.key.clone());
                if !page.more {
                    break;
                }
            }
        }
        self.sweep_shares().await
    }

    async fn reconcile(&self) {
        let pending = self.index.pending();
        let now = Instant::now();
        {
            let ids: HashSet<&SessionId> = pending.iter().map(|session| &session.id).collect();
            self.asked().retain(|id, (at, _)| ids.contains(id) || *at > now);
            self.reconciler.waiting().see(now, ids);
        }
        futures_util::stream::iter(pending)
            .for_each_concurrent(CONCURRENT, |session| async move {
                let tick = Input::Tick { waited: self.reconciler.waiting().waited(now, &session.id) };
                if session.handle(&tick) != Verdict::Keep
                    && let Err(error) = self.handle(&session.id, &tick).await
                {
                    tracing::error!(session.id = %session.id, "writing a session failed: {error}");
                }
                if session.wants() == Want::Nothing || !self.is_due(&session.id, now) {
                    return;
                }
                match session.wants() {
                    Want::Nothing => {}
                    Want::End => {
                        self.end_again(&session).await;
                    }
                    Want::Accept => match self.accept(&session).await {
                        Ok(_) => tracing::debug!(session.id = %session.id, "agent accepted again"),
                        Err(Refused::Said { code, message }) => {
                            tracing::warn!(session.id = %session.id, code, "agent refuses now: {message}");
                            let note = |current: &Session| {
                                let message = message.clone();
                                Verdict::Put(Box::new(Session { message, ..current.clone() }))
                            };
                            if let Err(error) = self.change(&session.id, note).await {
                                tracing::error!(session.id = %session.id, "writing a session failed: {error}");
                            }
                        }
                        Err(Refused::Silent(reason)) => {
                            tracing::debug!(session.id = %session.id, "agent did not accept again: {reason}");
                        }
                    },
                }
            })
            .await;
    }

    async fn end_again(&self, session: &Session) {
        // `end` resets the pause; the growing one is kept here.
        let pause = self.asked().get(&session.id).copied();
        self.end(session).await;
        if let Some(pause) = pause {
            self.asked().insert(session.id.clone(), pause);
        }
    }

    /// Whether to ask about a session now; if so, plans the next time.
    fn is_due(&self, id: &SessionId, now: Instant) -> bool {
        let mut asked = self.asked();
        let (at, pause) = asked.get(id).copied().unwrap_or((now, FIRST_PAUSE));
        if at > now {
            return false;
        }
        asked.insert(id.clone(), (now + pause, (pause * 2).min(LAST_PAUSE)));
        true
    }

    /// Folds a report of an agent into the records.
    async fn take_report(&self, report: SessionsReport) {
        futures_util::stream::iter(&report.sessions)
            .for_each_concurrent(CONCURRENT, |session| async {
                // Most reports change nothing and wait for nothing; frames must not wait for all of them.
                tokio::task::consume_budget().await;
                self.take_session(&report, session).await;
            })
            .await;
    }

    fn forget_absent(&self) {
        let mut absence = self.reconciler.absence.lock().unwrap_or_else(PoisonError::into_inner);
        absence.forget(|id| self.index.get(id).is_some());
    }

    /// Looks for sessions that the complete reports of their agents lack.
    async fn look_for_absent(&self, report: SessionsReport) {
        let vanished = {
            let mut absence = self.reconciler.absence.lock().unwrap_or_else(PoisonError::into_inner);
            absence.take(Instant::now(), &report, || {
                let mut known = self.index.of_agent(&report.agent_id, &report.cluster_id);
                known.retain(|id| self.index.get(id).is_some_and(|session| session.can_be_missed()));
                known
            })
        };
        for id in vanished {
            if let Err(error) = self.handle_from(&id, &report.cluster_id, &Input::Missing).await {
                tracing::error!(session.id = %id, "writing a session failed: {error}");
            }
        }
    }

    async fn take_session(&self, from: &SessionsReport, report: &SessionReport) {
        let id = &report.session_id;
        for step in &report.steps {
            self.observer.funnel(&step.step, step.duration_ms);
            tracing::info!(
                session.id = %id,
                generation = step.generation,
                step = step.step,
                duration_ms = step.duration_ms,
                message = step.message.as_deref().unwrap_or_default(),
                "session {id}: {} after {} ms",
                step.step,
                step.duration_ms
            );
        }
        // What has stopped or failed is still there, too.
        let remains = !matches!(report.state, InstanceState::Ending | InstanceState::Gone);
        let end = |message: &str| {
            let end = AgentRequest::End { session_id: id.clone(), message: message.into(), force: true };
            self.bus.publish_json(&agent_requests(&from.agent_id), &end);
        };
        let mut session = self.index.get(id);
        if remains && session.as_ref().is_none_or(|session| session.cluster_id != from.cluster_id) {
            // The index may lag behind the store, and an end cannot be taken back.
            session = match self.find_session(id).await {
                Ok(session) => session,
                Err(error) => {
                    tracing::warn!(session.id = %id, "a report waits for the store: {error}");
                    return;
                }
            };
        }
        let Some(session) = session else {
            // Only a session that is recorded as ended is ended: an unknown one may be a newer unit's.
            if remains && matches!(self.store.get(&format!("{ENDED}{id}")).await, Ok(Some(_))) {
                tracing::warn!(session.id = %id, agent.id = %from.agent_id, "ending what is left of session {id}");
                end("the session has ended");
            }
            return;
        };
        if session.cluster_id != from.cluster_id {
            if remains {
                tracing::warn!(session.id = %id, agent.id = %from.agent_id, "session {id} runs in a second cluster");
                end("the session runs elsewhere");
            }
            return;
        }
        // Several agents of a cluster may report the same session; its record follows one that lives.
        let keeps = self.agents().is_alive(Instant::now(), &session.agent_id);
        let agent_id = if keeps { &session.agent_id } else { &from.agent_id };
        let input = Input::Report { agent_id, report };
        if session.handle(&input) == Verdict::Keep {
            return;
        }
        if let Err(error) = self.handle_from(id, &from.cluster_id, &input).await {
            // The next report says it again.
            tracing::error!(session.id = %id, "writing a session failed: {error}");
        }
    }

    async fn serve_agent(&self, request: GatewayRequest) -> GatewayResponse {
        let answer = match request {
            GatewayRequest::CreateSession { .. } => self.create_for_ams(request).await,
            GatewayRequest::EndSession { session_id } => {
                let gone = async {
                    self.handle(&session_id, &Input::Gone).await?;
                    Ok(GatewayResponse::Ended)
                };
                gone.await
            }
            GatewayRequest::CreateShare { .. }
            | GatewayRequest::UpdateShare { .. }
            | GatewayRequest::DeleteShare { .. } => return self.share_for_ams(request).await,
        };
        answer.unwrap_or_else(|error: StoreError| {
            tracing::error!("a request of an agent failed: {}", fanlight_service::telemetry::chain(&error));
            let message = "the gateway's store failed".into();
            GatewayResponse::Refused { code: "internal".into(), message, status: None }
        })
    }

    async fn create_for_ams(&self, request: GatewayRequest) -> Result<GatewayResponse, StoreError> {
        let GatewayRequest::CreateSession { agent_id, region, cluster_id, instance_id, app, screen } =
            request
        else {
            return Ok(GatewayResponse::Ended);
        };
        let instance_key = format!("{INSTANCES}{instance_id}");
        // Once more when another unit is answering the same request.
        for _ in 0..8 {
            let known = self.store.get_json::<InstanceSession>(&instance_key).await?;
            if let Some(known) = &known
                && let Some(record) = self.store.get_json::<Session>(&key(&known.value.session_id)).await?
            {
                let session = record.value;
                return Ok(GatewayResponse::Created {
                    session_id: session.id,
                    joinable: session.joinable,
                    idle_time_min: session.idle_time_min,
                });
            }
            let session = Session {
                id: SessionId::generate(),
                origin: Origin::Ams,
                account: String::new(),
                app: app.clone(),
                app_version: None,
                region: region.clone(),
                cluster_id: cluster_id.clone(),
                agent_id: agent_id.clone(),
                instance_id: Some(instance_id.clone()),
                seen: false,
                screen,
                joinable: true,
                ephemeral: true,
                idle_time_min: 0,
                extra_data: Value::Null,
                attempt: 1,
                status: SessionStatus::Created,
                message: String::new(),
                created_at: self.now(),
                created_ms: self.now_ms(),
                generation: 0,
                used_generation: 0,
                client: Client::Never,
                ending: None,
                promised: false,
            };
            let id = session.id.clone();
            let compare = match &known {
                Some(known) => Compare::revision(&instance_key, known.revision),
                None => Compare::absent(&instance_key),
            };
            let link = InstanceSession { session_id: id.clone() };
            let ops = vec![
                Op::put(&instance_key, encode(&instance_key, &link)?),
                Op::put(key(&id), encode(&key(&id), &session)?),
            ];
            match self.store.transact(vec![compare, Compare::absent(key(&id))], ops).await {
                Ok(committed) => {
                    self.index.put(session, committed.revision);
                    tracing::info!(session.id = %id, instance.id = %instance_id, "session {id} was created for AMS");
                    return Ok(GatewayResponse::Created { session_id: id, joinable: true, idle_time_min: 0 });
                }
                Err(StoreError::Conflict) => {}
                Err(error) => return Err(error),
            }
        }
        Err(StoreError::Conflict)
    }
}

/// The lane of an agent's reports.
fn lane(agent_id: &str, lanes: usize) -> usize {
    let mut hasher = DefaultHasher::new();
    agent_id.hash(&mut hasher);
    hasher.finish() as usize % lanes
}

/// Why an agent did not do what it was asked.
enum Refused {
    /// It said no.
    Said { code: String, message: String },
    /// It did not answer, or not what was asked.
    Silent(String),
}

/// ICE servers that browsers take: one bad entry makes clients of the original hang (signaling section 3).
pub fn usable(servers: Vec<StunServer>) -> Vec<StunServer> {
    let known =
        |url: &String| ["stun:", "stuns:", "turn:", "turns:"].iter().any(|scheme| url.starts_with(scheme));
    servers
        .into_iter()
        .filter(|server| {
            let needs_credentials = server.urls.iter().any(|url| url.starts_with("turn"));
            let has_credentials = server.username.is_some() && server.password.is_some();
            let usable = !server.urls.is_empty()
                && server.urls.iter().all(known)
                && (has_credentials || !needs_credentials);
            if !usable {
                tracing::warn!(
                    "an ICE server of the agent is not usable and was left out: {:?}",
                    server.urls
                );
            }
            usable
        })
        .collect()
}
