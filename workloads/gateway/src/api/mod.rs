//! The routes of the public and the internal API (gateway-api sections 3 to 7): who may call, what a request must
//! look like, and how answers are wrapped. The work is in [`crate::sessions`] and [`crate::relay`].

mod admin;
mod openapi;
mod shares;

use std::{net::IpAddr, sync::Arc};

use axum::{
    Router,
    extract::{
        DefaultBodyLimit, FromRequestParts, Path, Request, State,
        ws::{WebSocketUpgrade, rejection::WebSocketUpgradeRejection},
    },
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{delete, get, post},
};
use fanlight_api::{
    SessionId,
    envelope::GatewayEnvelope,
    gateway::{
        AccountRights, JoinPost, Region, Screen, ServiceStatus, SessionCreated, SessionError, SessionJoined,
        SessionStatus, SessionsDelete, SessionsDeleted, SessionsPost,
    },
};
use fanlight_service::{
    ApiError,
    http::{Json, OptionalJson, Peer, Query},
};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, StatusCode,
    header::{AUTHORIZATION, HOST, ORIGIN, RETRY_AFTER, VARY, WWW_AUTHENTICATE},
    request::Parts,
};
pub use openapi::openapi;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    Gateway,
    accounts::{AccountError, Caller, Proof, SOCKET_TOKEN_SECONDS},
    geoip::client_address,
    rate::Asker,
    relay::{self, MAX_MESSAGE_BYTES, READ_BUFFER_BYTES},
    session::{OpenRefused, Session, Verdict},
    sessions::{Deleted, no_session, store_error},
    token::{SocketGrant, TokenError},
    ui,
};

/// Most sessions of one batch delete.
const MAX_BATCH: usize = 1000;
const REPEAT_HEADER: HeaderName = HeaderName::from_static("idempotency-key");

/// Through which listener a request came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// HTTPS, for everybody.
    Public,
    /// HTTP on loopback, for the page.
    Page {
        /// Its port.
        port: u16,
    },
    /// The unix socket, for the administrator.
    Internal,
}

/// The routes behind a door.
pub fn router(gateway: &Gateway, door: Door) -> Router {
    let mut router = Router::new()
        .route("/1.0", get(describe))
        .route("/1.0/status", get(status))
        .route("/1.0/applications", get(applications))
        .route("/1.0/regions", get(regions))
        .route("/1.0/sessions", get(list).post(create).delete(delete_batch))
        .route("/1.0/sessions/{id}", get(show).delete(delete_one))
        .route("/1.0/sessions/{id}/join", post(join))
        .route("/1.0/sessions/{id}/share", post(shares::create))
        .route("/1.0/sessions/{id}/connect", get(shares::connect))
        .route("/1.0/shares", get(shares::list))
        .route("/1.0/shares/{id}", get(shares::get).patch(shares::update).delete(shares::delete))
        .route("/1.0/config", get(admin::get_config).patch(admin::update_config))
        .route("/1.0/doctor", get(admin::doctor))
        .route("/1.0/sessions/{id}/sockets/{role}", get(socket))
        // The singular spelling is the one of the original's description.
        .route("/1.0/session/{id}/sockets/{role}", get(socket));
    if door == Door::Internal {
        router = router
            .route("/1.0/accounts", get(admin::accounts).post(admin::create_account))
            .route("/1.0/accounts/{name}", delete(admin::delete_account))
            .route("/1.0/ui/codes", post(admin::login_code))
            .route("/1.0/swagger.json", get(admin::description));
    } else {
        router = router.merge(ui::router(gateway));
    }
    router
        .layer(DefaultBodyLimit::max(gateway.config.limits.body_bytes))
        .layer(middleware::from_fn_with_state(gateway.clone(), guard))
        .layer(axum::Extension(door))
        .with_state(gateway.clone())
}

/// What every request passes: the host of the page's door, cross-origin rules, and the rate.
async fn guard(State(gateway): State<Gateway>, request: Request, next: Next) -> Response {
    let door = request.extensions().get::<Door>().copied().unwrap_or(Door::Public);
    if let Door::Page { port } = door {
        // A page of another site whose name was made to resolve to this machine must not get in.
        let host = text(request.headers(), HOST).to_ascii_lowercase();
        let names = ["127.0.0.1", "localhost", "[::1]"];
        if !names.iter().any(|name| host == format!("{name}:{port}")) {
            let error = ApiError::new(
                StatusCode::MISDIRECTED_REQUEST,
                "wrong-host",
                format!("host {host:?} is not served here: use 127.0.0.1:{port}"),
            );
            return error.into_response();
        }
    }
    let origin = text(request.headers(), ORIGIN).to_owned();
    let allowed = !origin.is_empty()
        && gateway.settings().cors_origins.iter().any(|known| known == "*" || *known == origin);
    let preflight = request.method() == Method::OPTIONS
        && request.headers().contains_key("access-control-request-method");
    let mut response = if allowed && preflight {
        StatusCode::NO_CONTENT.into_response()
    } else if door != Door::Internal && !gateway.take_turn(asker(&gateway, &request)) {
        ApiError::new(
            StatusCode::TOO_MANY_REQUESTS,
            "too-many-requests",
            "too many requests; try again in a second",
        )
        .with_header(RETRY_AFTER, HeaderValue::from_static("1"))
        .into_response()
    } else {
        next.run(request).await
    };
    if allowed && let Ok(origin) = HeaderValue::from_str(&origin) {
        let headers = response.headers_mut();
        headers.insert("access-control-allow-origin", origin);
        headers.append(VARY, HeaderValue::from_static("origin"));
        if preflight {
            let mut set = |name, value| headers.insert(name, HeaderValue::from_static(value));
            set("access-control-allow-methods", "GET, POST, PATCH, DELETE");
            set("access-control-allow-headers", "authorization, content-type, idempotency-key");
            set("access-control-max-age", "600");
        }
    }
    response
}

/// Who asks, as far as can be told before the request is worked on: for sharing the rate.
fn asker(gateway: &Gateway, request: &Request) -> Asker {
    let header = text(request.headers(), AUTHORIZATION);
    let token = header.split_once("root=").map(|(_, token)| token.trim().to_owned());
    let credential = token
        .or_else(|| query_token(request.uri()))
        .or_else(|| ui::cookie(request.headers()).map(|cookie| cookie.expose().to_owned()));
    let address = request.extensions().get::<Peer>().and_then(|peer| peer.address);
    gateway.callers().who(credential.as_deref(), address.map(|address| address.ip()))
}

/// The API token in a query.
fn query_token(uri: &http::Uri) -> Option<String> {
    #[derive(Deserialize)]
    struct ApiToken {
        api_token: Option<String>,
    }
    axum::extract::Query::<ApiToken>::try_from_uri(uri).ok()?.0.api_token
}

fn text(headers: &HeaderMap, name: HeaderName) -> &str {
    headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

impl From<AccountError> for ApiError {
    fn from(error: AccountError) -> Self {
        let text = error.to_string();
        match error {
            AccountError::Token(TokenError::Expired(_)) => {
                Self { code: "token-expired", ..unauthorized(text) }
            }
            AccountError::Token(_) | AccountError::Deleted => unauthorized(text),
            AccountError::Cookie => Self { code: "login-expired", ..Self::unauthorized(text) },
            AccountError::WrongKind(_) => Self::forbidden("wrong-token-kind", text),
            AccountError::Code => Self::forbidden("invalid-code", text),
            AccountError::Name(_) => Self::bad_request("invalid-name", text),
            AccountError::Expiry(_) => Self::bad_request("invalid-expiry", text),
            AccountError::Exists(_) => Self::conflict("account-exists", text),
            AccountError::Missing(_) => Self::not_found("account-not-found", text),
            AccountError::Store(error) => store_error(error),
        }
    }
}

fn unauthorized(text: impl Into<String>) -> ApiError {
    ApiError::unauthorized(text).with_header(WWW_AUTHENTICATE, HeaderValue::from_static("macaroon"))
}

impl FromRequestParts<Gateway> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, gateway: &Gateway) -> Result<Self, ApiError> {
        identify(parts, gateway).await?.ok_or_else(|| {
            unauthorized(
                "an API token is needed: header `Authorization: macaroon root=TOKEN` or query `api_token=TOKEN`",
            )
        })
    }
}

/// A caller that may do everything.
pub struct Full(pub Caller);

impl FromRequestParts<Gateway> for Full {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, gateway: &Gateway) -> Result<Self, ApiError> {
        let caller = Caller::from_request_parts(parts, gateway).await?;
        if caller.rights != AccountRights::Full {
            let text =
                "this account may only launch and join sessions; an account with full rights is needed";
            return Err(ApiError::forbidden("missing-right", text));
        }
        Ok(Self(caller))
    }
}

/// Who calls; `None` when the request carries no credential at all.
async fn identify(parts: &Parts, gateway: &Gateway) -> Result<Option<Caller>, ApiError> {
    if parts.extensions.get::<Door>() == Some(&Door::Internal) {
        let rights = AccountRights::Full;
        return Ok(Some(Caller { account: String::new(), rights, by: Proof::Socket }));
    }
    let now = gateway.now();
    let header = text(&parts.headers, AUTHORIZATION);
    if !header.is_empty() {
        let (scheme, rest) = header.split_once(' ').unwrap_or((header, ""));
        let token = rest.trim().strip_prefix("root=");
        let (true, Some(token)) = (scheme.eq_ignore_ascii_case("macaroon"), token) else {
            return Err(unauthorized("the header Authorization is not of the form `macaroon root=TOKEN`"));
        };
        let caller = gateway.accounts.authenticate(token, now).await?;
        gateway.callers().learn(token);
        return Ok(Some(caller));
    }
    if let Some(token) = query_token(&parts.uri) {
        let caller = gateway.accounts.authenticate(&token, now).await?;
        gateway.callers().learn(&token);
        return Ok(Some(caller));
    }
    let Some(cookie) = ui::cookie(&parts.headers) else { return Ok(None) };
    let (caller, _) = gateway.accounts.cookie(&cookie, now).await?;
    gateway.callers().learn(cookie.expose());
    if parts.method != Method::GET && parts.method != Method::HEAD {
        check_origin(parts, gateway)?;
    }
    Ok(Some(caller))
}

/// Whether a request of the page comes from our page and not from another site's.
///
/// # Errors
/// It does not, or does not say.
pub fn check_origin(parts: &Parts, gateway: &Gateway) -> Result<(), ApiError> {
    let origin = text(&parts.headers, ORIGIN);
    let host = text(&parts.headers, HOST);
    let tls = parts.extensions.get::<Peer>().is_some_and(|peer| peer.tls);
    let own = format!("{}://{host}", if tls { "https" } else { "http" });
    let public = gateway.config.public_url.trim_end_matches('/');
    if !origin.is_empty()
        && (origin.eq_ignore_ascii_case(&own) || (tls && origin.eq_ignore_ascii_case(public)))
    {
        return Ok(());
    }
    Err(ApiError::forbidden("wrong-origin", format!("origin {origin:?} may not do this: only this page may")))
}

impl Caller {
    /// Whether the caller may see a session.
    pub fn may_see(&self, session: &Session) -> bool {
        self.rights == AccountRights::Full || session.account == self.account
    }
}

/// A session that the caller may see; to others it is not there.
async fn own(gateway: &Gateway, caller: &Caller, id: &SessionId) -> Result<Arc<Session>, ApiError> {
    match gateway.find_session(id).await? {
        Some(session) if caller.may_see(&session) => Ok(session),
        _ => Err(no_session(id)),
    }
}

fn session_id(text: &str) -> Result<SessionId, ApiError> {
    text.parse().map_err(|error: fanlight_api::InvalidId| {
        ApiError::bad_request("invalid-id", format!("the session's {error}"))
    })
}

/// A successful answer.
pub struct Answer<T> {
    status: StatusCode,
    metadata: Option<T>,
    total_size: Option<u64>,
}

impl<T> Answer<T> {
    /// 200 with a payload.
    pub fn ok(metadata: T) -> Self {
        Self { status: StatusCode::OK, metadata: Some(metadata), total_size: None }
    }

    fn created(metadata: T) -> Self {
        Self { status: StatusCode::CREATED, ..Self::ok(metadata) }
    }
}

impl Answer<Value> {
    /// 200 without a payload.
    pub fn empty() -> Self {
        Self { status: StatusCode::OK, metadata: None, total_size: None }
    }
}

impl<T: Serialize> IntoResponse for Answer<T> {
    fn into_response(self) -> Response {
        let mut envelope = GatewayEnvelope::success(self.status.as_u16(), self.metadata);
        envelope.total_size = self.total_size;
        if self.status == StatusCode::ACCEPTED {
            envelope.kind = fanlight_api::envelope::Kind::Async;
        }
        (self.status, Json(envelope)).into_response()
    }
}

async fn describe(State(gateway): State<Gateway>, parts: Parts) -> Answer<Value> {
    let trusted = matches!(identify(&parts, &gateway).await, Ok(Some(_)));
    Answer::ok(json!({
        "api_status": "stable",
        "api_version": "1.0",
        "api_extensions": [
            "account_rights", "application_details", "client_location", "doctor", "idempotency_key", "region_details",
            "request_id", "round_trips",
        ],
        "auth": if trusted { "trusted" } else { "untrusted" },
        "auth_methods": ["macaroon"],
    }))
}

async fn status(State(gateway): State<Gateway>, parts: Parts) -> Result<Answer<ServiceStatus>, ApiError> {
    if !gateway.ready.is_ready() {
        let text = format!("the gateway is starting: waiting for {}", gateway.ready.waiting_for().join(", "));
        return Err(ApiError::unavailable("starting", text));
    }
    let healthy = *gateway.bus.connected().borrow() && gateway.store.get("gateway/root-key").await.is_ok();
    let full =
        matches!(identify(&parts, &gateway).await, Ok(Some(Caller { rights: AccountRights::Full, .. })));
    let members = match full {
        true => gateway.store.members().await.ok(),
        false => None,
    };
    let (agents, _) = gateway.agents().counts(std::time::Instant::now());
    Ok(Answer::ok(ServiceStatus {
        status: if healthy { "healthy" } else { "unhealthy" }.into(),
        agents: full.then_some(agents as u64),
        database_nodes: members,
    }))
}

async fn applications(State(gateway): State<Gateway>, _: Caller) -> Answer<Value> {
    gateway.first_reports().await;
    let applications = gateway.agents().applications(std::time::Instant::now());
    Answer::ok(json!(applications))
}

#[derive(Debug, Deserialize)]
struct Detailed {
    recursion: Option<String>,
    recursive: Option<String>,
}

async fn regions(
    State(gateway): State<Gateway>,
    _: Caller,
    Query(query): Query<Detailed>,
) -> Result<Answer<Value>, ApiError> {
    let details =
        flag("recursion", query.recursion.as_deref())? || flag("recursive", query.recursive.as_deref())?;
    gateway.first_reports().await;
    let mut regions = gateway.agents().regions(std::time::Instant::now());
    if !details {
        for region in &mut regions {
            *region = Region { name: std::mem::take(&mut region.name), ..Region::default() };
        }
    }
    Ok(Answer::ok(json!(regions)))
}

#[derive(Debug, Deserialize)]
struct Listing {
    status: Option<String>,
    recursion: Option<String>,
    recursive: Option<String>,
    limit: Option<String>,
    offset: Option<String>,
    sort_by: Option<String>,
    sort_order: Option<String>,
}

fn flag(name: &str, value: Option<&str>) -> Result<bool, ApiError> {
    match value {
        None => Ok(false),
        Some("true" | "1") => Ok(true),
        Some("false" | "0" | "") => Ok(false),
        Some(other) => {
            let other: String = other.chars().take(32).collect();
            Err(ApiError::bad_request(
                "invalid-query",
                format!("{name} is {other:?}: true or false is needed"),
            ))
        }
    }
}

fn number(name: &str, value: Option<&str>) -> Result<usize, ApiError> {
    let Some(value) = value.filter(|value| !value.is_empty()) else { return Ok(0) };
    value.parse().map_err(|_| {
        let value: String = value.chars().take(32).collect();
        ApiError::bad_request("invalid-query", format!("{name} is {value:?}: a number from 0 is needed"))
    })
}

async fn list(
    State(gateway): State<Gateway>,
    caller: Caller,
    Query(query): Query<Listing>,
) -> Result<Answer<Value>, ApiError> {
    let bad = |text: String| ApiError::bad_request("invalid-query", text);
    let recursion =
        flag("recursion", query.recursion.as_deref())? || flag("recursive", query.recursive.as_deref())?;
    let (limit, offset) =
        (number("limit", query.limit.as_deref())?, number("offset", query.offset.as_deref())?);
    let status: Option<SessionStatus> = match query.status.as_deref() {
        None | Some("") => None,
        Some(status) => Some(serde_json::from_value(json!(status)).map_err(|_| {
            bad(format!("status is {status:?}: created, active, error, terminating or terminated is needed"))
        })?),
    };
    let descending = match query.sort_order.as_deref() {
        None | Some("" | "asc") => false,
        Some("desc") => true,
        Some(other) => return Err(bad(format!("sort_order is {other:?}: asc or desc is needed"))),
    };
    let sort: fn(&Session) -> String = match query.sort_by.as_deref() {
        None | Some("" | "id") => |session| session.id.to_string(),
        Some("app") => |session| session.app.clone(),
        Some("region") => |session| session.region.clone(),
        Some("status") => |session| format!("{:?}", session.status).to_lowercase(),
        Some("container_id") => |session| session.show().container_id,
        Some(other) => {
            return Err(bad(format!(
                "sort_by is {other:?}: id, app, region, status or container_id is needed"
            )));
        }
    };
    let mut sessions = gateway.index.all();
    sessions
        .retain(|session| caller.may_see(session) && status.is_none_or(|status| session.status == status));
    // Ids are unique: the order is the same in every page of a listing.
    sessions.sort_by_cached_key(|session| (sort(session), session.id.clone()));
    if descending {
        sessions.reverse();
    }
    let total = sessions.len() as u64;
    let limit = if limit == 0 { usize::MAX } else { limit };
    let page = sessions.iter().skip(offset).take(limit);
    let metadata: Vec<Value> =
        page.map(|session| if recursion { json!(session.show()) } else { json!(session.id) }).collect();
    Ok(Answer { total_size: Some(total), ..Answer::ok(json!(metadata)) })
}

async fn create(
    State(gateway): State<Gateway>,
    caller: Caller,
    axum::Extension(door): axum::Extension<Door>,
    axum::Extension(peer): axum::Extension<Peer>,
    headers: HeaderMap,
    Json(request): Json<SessionsPost>,
) -> Result<Answer<SessionCreated>, ApiError> {
    let repeat = headers.get(REPEAT_HEADER).map(|value| value.to_str().unwrap_or_default());
    if repeat.is_some_and(|repeat| repeat.is_empty() || repeat.len() > 255) {
        let text = "the header Idempotency-Key must have 1 to 255 printable characters";
        return Err(ApiError::bad_request("invalid-idempotency-key", text));
    }
    // Who calls with a token is usually somebody's backend: its own address says nothing about the client.
    let from = peer.address.filter(|_| caller.by == Proof::Cookie).map(|address| {
        let forwarded = text(&headers, HeaderName::from_static("x-forwarded-for"));
        client_address(address.ip(), forwarded, &gateway.config.placement.trusted())
    });
    let from = from.filter(|address: &IpAddr| !address.is_loopback());
    let (session, stun_servers) = gateway.create_session(&caller, request, repeat, from).await?;
    let generation = session.generation;
    Ok(Answer::created(SessionCreated {
        id: session.id.clone(),
        region: session.region.clone(),
        joinable: session.joinable,
        status: session.status,
        url: socket_url(&gateway, &caller, door, &headers, &session, generation, None),
        stun_servers,
    }))
}

/// Scheme (of sockets) and authority under which a caller finds us.
fn authority(gateway: &Gateway, door: Door, headers: &HeaderMap, page: bool) -> (&'static str, String) {
    let public = gateway.config.public_authority();
    let host = text(headers, HOST);
    match door {
        Door::Page { .. } => ("ws", host.to_owned()),
        // The page must stay on its own origin.
        Door::Public if page && !host.is_empty() => ("wss", host.to_owned()),
        _ if !public.is_empty() => ("wss", public.to_owned()),
        Door::Public if !host.is_empty() => ("wss", host.to_owned()),
        _ => ("wss", gateway.reachable_address().to_string()),
    }
}

/// The URL of a signalling socket, with a token for one generation.
fn socket_url(
    gateway: &Gateway,
    caller: &Caller,
    door: Door,
    headers: &HeaderMap,
    session: &Session,
    generation: u64,
    screen: Option<fanlight_api::gateway::ScreenPatch>,
) -> String {
    let page = caller.by == Proof::Cookie;
    let token = gateway.accounts.grant(&SocketGrant {
        session_id: session.id.clone(),
        generation,
        expires_at: gateway.now() + SOCKET_TOKEN_SECONDS,
        screen,
        page,
    });
    let (scheme, authority) = authority(gateway, door, headers, page);
    format!("{scheme}://{authority}/1.0/sessions/{}/sockets/slave?token={token}", session.id)
}

async fn show(
    State(gateway): State<Gateway>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Answer<fanlight_api::gateway::Session>, ApiError> {
    let session = own(&gateway, &caller, &session_id(&id)?).await?;
    Ok(Answer::ok(session.show()))
}

#[derive(Debug, Deserialize)]
struct Deleting {
    force: Option<String>,
    sync: Option<String>,
}

async fn delete_one(
    State(gateway): State<Gateway>,
    caller: Caller,
    Path(id): Path<String>,
    Query(query): Query<Deleting>,
) -> Result<Answer<Value>, ApiError> {
    let (force, sync) = (flag("force", query.force.as_deref())?, flag("sync", query.sync.as_deref())?);
    let session = own(&gateway, &caller, &session_id(&id)?).await?;
    gateway.delete_session(&session.id, force, sync).await?;
    Ok(Answer::empty())
}

async fn delete_batch(
    State(gateway): State<Gateway>,
    caller: Caller,
    Query(query): Query<Deleting>,
    Json(batch): Json<SessionsDelete>,
) -> Result<Answer<SessionsDeleted>, ApiError> {
    let (force, sync) = (flag("force", query.force.as_deref())?, flag("sync", query.sync.as_deref())?);
    if batch.ids.is_empty() || batch.ids.len() > MAX_BATCH {
        let text = format!("ids has {} entries: 1 to {MAX_BATCH} are allowed", batch.ids.len());
        return Err(ApiError::bad_request("invalid-body", text));
    }
    let work = batch.ids.clone().into_iter().map(|text| {
        let (gateway, caller) = (gateway.clone(), caller.clone());
        async move {
            let session = own(&gateway, &caller, &session_id(&text)?).await?;
            gateway.delete_session(&session.id, force, sync).await
        }
    });
    let results: Vec<Result<Deleted, ApiError>> = futures_util::StreamExt::collect(
        futures_util::StreamExt::buffered(futures_util::stream::iter(work), 32),
    )
    .await;
    let mut deleted = Vec::new();
    let mut errors = Vec::new();
    let mut under_way = false;
    for (id, result) in batch.ids.iter().zip(results) {
        match result {
            Ok(done) => {
                under_way |= done == Deleted::UnderWay;
                deleted.push(id.clone());
            }
            Err(error) => errors.push(SessionError {
                session_id: id.chars().take(255).collect(),
                error_message: error.text,
                status_code: error.status.as_u16(),
            }),
        }
    }
    if deleted.is_empty() && errors.iter().all(|error| error.status_code == 404) {
        return Err(ApiError::not_found("session-not-found", "none of these sessions exists")
            .with_reasons(json!({ "errors": errors })));
    }
    let status = match (errors.is_empty(), sync || !under_way) {
        (false, _) => StatusCode::MULTI_STATUS,
        (true, false) => StatusCode::ACCEPTED,
        (true, true) => StatusCode::OK,
    };
    Ok(Answer { status, ..Answer::ok(SessionsDeleted { deleted_sessions: deleted, errors }) })
}

async fn join(
    State(gateway): State<Gateway>,
    caller: Caller,
    axum::Extension(door): axum::Extension<Door>,
    Path(id): Path<String>,
    headers: HeaderMap,
    OptionalJson(request): OptionalJson<JoinPost>,
) -> Result<Answer<SessionJoined>, ApiError> {
    let session = own(&gateway, &caller, &session_id(&id)?).await?;
    if let Some(screen) = request.screen {
        // Members that are absent keep what the display has now; those given must be possible with any.
        let narrow = Screen { width: 2, height: 2, ..session.screen };
        screen.apply(narrow).map_err(|error| ApiError::bad_request("invalid-body", error.to_string()))?;
    }
    let mut refused = None;
    // Called again when what was known is old: the last answer counts.
    let counted = |current: &Session| match current.join() {
        Ok(next) => {
            refused = None;
            Verdict::Put(Box::new(next))
        }
        Err(reason) => {
            refused = Some(reason);
            Verdict::Keep
        }
    };
    let joined = gateway.change(&session.id, counted).await.map_err(store_error)?;
    if let Some(reason) = refused {
        return Err(ApiError::bad_request("invalid-session-state", reason));
    }
    let Some(session) = joined else { return Err(no_session(&session.id)) };
    let stun_servers = gateway.credentials(&session).await?;
    let url = socket_url(&gateway, &caller, door, &headers, &session, session.generation, request.screen);
    Ok(Answer::ok(SessionJoined { id: session.id.clone(), url, stun_servers }))
}

#[derive(Debug, Deserialize)]
struct SocketQuery {
    token: Option<String>,
}

async fn socket(
    State(gateway): State<Gateway>,
    Path((id, role)): Path<(String, String)>,
    Query(query): Query<SocketQuery>,
    request: Request,
) -> Result<Response, ApiError> {
    let (mut parts, _) = request.into_parts();
    match role.as_str() {
        "slave" => {}
        "master" => {
            let text = "instances connect to their agent, not to the gateway";
            return Err(ApiError::bad_request("unsupported-role", text));
        }
        "adb" => {
            return Err(shares::socket(&gateway, &session_id(&id)?, &query.token.unwrap_or_default()).await);
        }
        _ => return Err(ApiError::not_found("not-found", "sockets have the roles slave, master and adb")),
    }
    let id = session_id(&id)?;
    let token = query.token.unwrap_or_default();
    if token.is_empty() {
        return Err(unauthorized("a socket token is needed: query `token=TOKEN` from create or join"));
    }
    let grant = gateway.accounts.check_socket(&token, gateway.now()).await?;
    if grant.session_id != id {
        return Err(ApiError::forbidden("foreign-token", "this token is for another session"));
    }
    if grant.page {
        check_origin(&parts, &gateway)?;
    }
    let upgrade = WebSocketUpgrade::from_request_parts(&mut parts, &gateway).await.map_err(
        |rejection: WebSocketUpgradeRejection| {
            ApiError::new(StatusCode::UPGRADE_REQUIRED, "websocket-needed", rejection.body_text())
        },
    )?;
    let Ok(permit) = gateway.sockets.clone().try_acquire_owned() else {
        let text = "too many signalling sockets are open; try again in a moment";
        return Err(ApiError::unavailable("too-many-sockets", text));
    };
    let mut refused = None;
    let opened = gateway
        .change(&id, |current: &Session| match current.open(grant.generation) {
            Ok(next) => {
                refused = None;
                Verdict::Put(Box::new(next))
            }
            Err(reason) => {
                refused = Some((reason, current.message.clone()));
                Verdict::Keep
            }
        })
        .await
        .map_err(store_error)?;
    if let Some((reason, message)) = refused {
        return Err(match reason {
            OpenRefused::Ended => {
                let text = match message.as_str() {
                    "" => format!("session {id} has ended"),
                    message => format!("session {id} has ended: {message}"),
                };
                ApiError::new(StatusCode::GONE, "session-ended", text)
            }
            OpenRefused::Older => {
                let text = "another client joined with a newer token; join again";
                ApiError::new(StatusCode::GONE, "token-outdated", text)
            }
            OpenRefused::Used => ApiError::forbidden("token-used", "this token was used before; join again"),
        });
    }
    if opened.is_none() {
        return Err(no_session(&id));
    }
    let task = gateway.clone();
    let upgrade = upgrade.read_buffer_size(READ_BUFFER_BYTES);
    Ok(upgrade.max_message_size(MAX_MESSAGE_BYTES).max_frame_size(MAX_MESSAGE_BYTES).on_upgrade(
        move |socket| async move {
            let observer = task.observer.clone();
            observer.socket(1.0);
            // Tracked, so that going down waits until the client was told.
            let shutdown = task.shutdown.clone();
            let _ = shutdown.spawn("signalling socket", relay::relay(task, socket, grant)).await;
            observer.socket(-1.0);
            drop(permit);
        },
    ))
}
