//! Who asks, and whether they may: every request passes here before its route. What each route needs stands in one
//! table; a route that is missing there is for administrators.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Instant,
};

use axum::{
    extract::{FromRequestParts, MatchedPath, RawPathParams, Request, State},
    middleware::Next,
    response::{IntoResponse, Response},
};
use fanlight_service::{ApiError, http::Peer};
use fanlight_store::{Handle, StoreError};
use http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header, request::Parts};

use super::store_error;
use crate::{
    Ams,
    catalog::CatalogError,
    identity::{
        Who,
        oidc::{OidcError, Provider},
        permissions::{ADMIN, Kind, Object, Rights},
        tokens::EventTokens,
    },
    images::ImageError,
    instances::InstanceError,
};

/// What a route needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Need {
    /// Nothing: open to callers without credentials, or with a credential of its own.
    Open,
    /// To be somebody.
    Known,
    /// To have some rights; the handler leaves out, or refuses, what the caller has none for.
    Each,
    /// This, for the server as a whole.
    Server(&'static str),
    /// This, for the object that the first part of the path names.
    Object(Kind, &'static str),
}

/// A route with its name in metrics.
pub(super) struct Route {
    pub(super) path: &'static str,
    pub(super) name: &'static str,
    pub(super) methods: &'static [(&'static str, Need)],
}

const VIEW: &str = "can_view";
const EDIT: &str = "can_edit";
const DELETE: &str = "can_delete";

const fn route(path: &'static str, name: &'static str, methods: &'static [(&'static str, Need)]) -> Route {
    Route { path, name, methods }
}

/// All routes (ams-api sections 1.4, 8.2 and 17).
pub(super) const ROUTES: &[Route] = {
    use Kind::{Addon, Application, Group, Identity, Image, Instance, Node};
    use Need::{Each, Known, Object, Open, Server};
    &[
        route("/", "root", &[("GET", Open)]),
        route("/1.0", "service", &[("GET", Open)]),
        route("/1.0/version", "version", &[("GET", Open)]),
        route(
            "/1.0/config",
            "config",
            &[("GET", Server("can_view_config")), ("PATCH", Server("can_edit_config"))],
        ),
        route("/1.0/events", "events", &[("GET", Each)]),
        route("/1.0/events/auth", "events_auth", &[("POST", Each)]),
        route("/1.0/operations", "operations", &[("GET", Each)]),
        route("/1.0/operations/{id}", "operation", &[("GET", Each), ("DELETE", Each)]),
        route("/1.0/operations/{id}/wait", "operation_wait", &[("GET", Each)]),
        route("/1.0/operations/{id}/websocket", "operation_websocket", &[("GET", Open)]),
        route("/1.0/certificates", "certificates", &[("GET", Server(ADMIN)), ("POST", Open)]),
        route(
            "/1.0/certificates/{fingerprint}",
            "certificate",
            &[("GET", Server(ADMIN)), ("DELETE", Server(ADMIN))],
        ),
        route("/1.0/auth/oidc", "auth_oidc", &[("GET", Open)]),
        route("/1.0/auth/permissions", "auth_permissions", &[("GET", Known)]),
        route(
            "/1.0/auth/identities",
            "auth_identities",
            &[("GET", Each), ("POST", Server("can_register_identities"))],
        ),
        route(
            "/1.0/auth/identities/{id}",
            "auth_identity",
            &[
                ("GET", Object(Identity, VIEW)),
                ("PUT", Object(Identity, EDIT)),
                ("DELETE", Object(Identity, DELETE)),
            ],
        ),
        route("/1.0/auth/groups", "auth_groups", &[("GET", Each), ("POST", Server("can_create_groups"))]),
        route(
            "/1.0/auth/groups/{name}",
            "auth_group",
            &[("GET", Object(Group, VIEW)), ("PUT", Object(Group, EDIT)), ("DELETE", Object(Group, DELETE))],
        ),
        route("/1.0/tasks", "tasks", &[("GET", Server("can_view_tasks"))]),
        route("/1.0/metrics", "metrics", &[("GET", Server("can_view_metrics"))]),
        route("/1.0/nodes", "nodes", &[("GET", Each), ("POST", Server("can_create_nodes"))]),
        route(
            "/1.0/nodes/{name}",
            "node",
            &[("GET", Object(Node, VIEW)), ("PATCH", Object(Node, EDIT)), ("DELETE", Object(Node, DELETE))],
        ),
        route("/1.0/images", "images", &[("GET", Each), ("POST", Server("can_create_images"))]),
        route(
            "/1.0/images/{id}",
            "image",
            &[
                ("GET", Object(Image, VIEW)),
                ("PATCH", Object(Image, EDIT)),
                ("DELETE", Object(Image, DELETE)),
            ],
        ),
        route("/1.0/images/{id}/{version}", "image_version", &[("DELETE", Object(Image, DELETE))]),
        route("/1.0/addons", "addons", &[("GET", Each), ("POST", Server("can_create_addons"))]),
        route(
            "/1.0/addons/{name}",
            "addon",
            &[
                ("GET", Object(Addon, VIEW)),
                ("PATCH", Object(Addon, EDIT)),
                ("DELETE", Object(Addon, DELETE)),
            ],
        ),
        route("/1.0/addons/{name}/{version}", "addon_version", &[("DELETE", Object(Addon, DELETE))]),
        route(
            "/1.0/applications",
            "applications",
            &[("GET", Each), ("POST", Server("can_create_applications")), ("DELETE", Each)],
        ),
        route(
            "/1.0/applications/{id}",
            "application",
            &[
                ("GET", Object(Application, VIEW)),
                ("PATCH", Object(Application, EDIT)),
                ("DELETE", Object(Application, DELETE)),
            ],
        ),
        route(
            "/1.0/applications/{id}/manifest",
            "application_manifest",
            &[("GET", Object(Application, VIEW))],
        ),
        route(
            "/1.0/applications/{id}/{version}",
            "application_version",
            &[
                ("GET", Object(Application, VIEW)),
                ("PATCH", Object(Application, "can_publish")),
                ("DELETE", Object(Application, DELETE)),
            ],
        ),
        route(
            "/1.0/applications/{id}/{version}/manifest",
            "application_version_manifest",
            &[("GET", Object(Application, VIEW))],
        ),
        route(
            "/1.0/instances",
            "instances",
            &[("GET", Each), ("POST", Server("can_create_instances")), ("DELETE", Each)],
        ),
        route(
            "/1.0/instances/{id}",
            "instance",
            &[
                ("GET", Object(Instance, VIEW)),
                ("PATCH", Object(Instance, EDIT)),
                ("DELETE", Object(Instance, DELETE)),
            ],
        ),
        route("/1.0/instances/{id}/exec", "instance_exec", &[("POST", Object(Instance, "can_exec"))]),
        route("/1.0/instances/{id}/logs", "instance_logs", &[("GET", Object(Instance, "can_view_logs"))]),
        route(
            "/1.0/instances/{id}/logs/{name}",
            "instance_log",
            &[("GET", Object(Instance, "can_view_logs"))],
        ),
        route("/1.0/instances/{id}/shares", "instance_shares", &[("POST", Object(Instance, EDIT))]),
        route(
            "/1.0/instances/{id}/shares/{share}",
            "instance_share",
            &[("PATCH", Object(Instance, EDIT)), ("DELETE", Object(Instance, EDIT))],
        ),
        route(
            "/1.0/containers",
            "containers",
            &[("GET", Each), ("POST", Server("can_create_instances")), ("DELETE", Each)],
        ),
        route(
            "/1.0/containers/{id}",
            "container",
            &[
                ("GET", Object(Instance, VIEW)),
                ("PATCH", Object(Instance, EDIT)),
                ("DELETE", Object(Instance, DELETE)),
            ],
        ),
        route("/1.0/containers/{id}/exec", "container_exec", &[("POST", Object(Instance, "can_exec"))]),
        route("/1.0/containers/{id}/logs", "container_logs", &[("GET", Object(Instance, "can_view_logs"))]),
        route(
            "/1.0/containers/{id}/logs/{name}",
            "container_log",
            &[("GET", Object(Instance, "can_view_logs"))],
        ),
    ]
};

/// What a request to a route needs. What is not in the table is for administrators.
fn need(method: &Method, path: &str) -> Need {
    // A library answers HEAD where there is a GET.
    let method = if method == Method::HEAD { "GET" } else { method.as_str() };
    let route = ROUTES.iter().find(|route| route.path == path);
    let methods = route.map(|route| route.methods).unwrap_or_default();
    methods.iter().find(|(known, _)| *known == method).map_or(Need::Server(ADMIN), |(_, need)| *need)
}

/// The name of a route in metrics.
pub(super) fn name(path: Option<&str>) -> &'static str {
    let route = path.and_then(|path| ROUTES.iter().find(|route| route.path == path));
    route.map_or("other", |route| route.name)
}

/// What checking callers keeps between requests.
pub(crate) struct Access {
    pub(super) provider: Provider,
    pub(super) tokens: EventTokens,
    bucket: Mutex<Bucket>,
}

impl Access {
    /// With the keys of the cluster.
    ///
    /// # Errors
    /// The store cannot be read or written.
    pub(crate) async fn open(store: &Handle) -> Result<Self, StoreError> {
        Ok(Self {
            provider: Provider::default(),
            tokens: EventTokens::open(store).await?,
            bucket: Mutex::new(Bucket { level: 1.0, at: Instant::now() }),
        })
    }
}

/// A bound on requests per second: a bucket that fills evenly and holds one second's worth.
#[derive(Debug)]
struct Bucket {
    /// Part of a second's worth that is there.
    level: f64,
    at: Instant,
}

impl Bucket {
    /// Whether there is room for one more at this rate; 0: always.
    fn take(&mut self, now: Instant, per_second: u32) -> bool {
        if per_second == 0 {
            return true;
        }
        let one = 1.0 / f64::from(per_second);
        self.level = (self.level + now.saturating_duration_since(self.at).as_secs_f64()).min(1.0);
        self.at = now;
        // As much as rounding may have taken.
        let room = self.level + one * 1e-6 >= one;
        if room {
            self.level -= one;
        }
        room
    }
}

/// Who asks, and what they may do. Every request that reaches a handler has one, and the table of routes has been
/// obeyed.
#[derive(Clone, Debug)]
pub(super) struct Caller {
    /// None: nobody we know, on an open route.
    pub(super) who: Option<Who>,
    pub(super) rights: Rights,
}

impl Caller {
    fn nobody() -> Self {
        Self { who: None, rights: Rights::nothing() }
    }

    /// Whether this is somebody we know.
    pub(super) fn is_known(&self) -> bool {
        self.who.is_some()
    }

    /// Whether this is somebody who may do everything.
    pub(super) fn is_administrator(&self) -> bool {
        self.rights == Rights::Everything
    }

    /// Whether what an address stands for may be seen.
    pub(super) fn may_see(&self, url: &str) -> bool {
        self.rights.may_see(url)
    }

    /// Refuses a caller who does not have this for that object.
    pub(super) fn require(&self, entitlement: &str, object: &Object) -> Result<(), ApiError> {
        if self.rights.may(entitlement, object) {
            return Ok(());
        }
        Err(ApiError::forbidden(
            "not-permitted",
            format!("Not Authorized: {entitlement} of {object} is needed"),
        ))
    }
}

impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let caller = parts.extensions.get::<Self>().cloned();
        caller.ok_or_else(|| ApiError::internal("the request did not pass the check of its caller"))
    }
}

/// Lets a request pass to its route, or not.
pub(super) async fn guard(
    State(ams): State<Ams>,
    params: RawPathParams,
    request: Request,
    next: Next,
) -> Response {
    let first = params.iter().next().map(|(_, value)| value.to_owned());
    let (mut parts, body) = request.into_parts();
    match judge(&ams, first.as_deref(), &parts).await {
        Ok(caller) => {
            parts.extensions.insert(caller);
            next.run(Request::from_parts(parts, body)).await
        }
        Err(error) => error.into_response(),
    }
}

async fn judge(ams: &Ams, first: Option<&str>, request: &Parts) -> Result<Caller, ApiError> {
    let peer = request.extensions.get::<Peer>().cloned().unwrap_or_default();
    let settings = ams.settings.get();
    if peer.credentials.is_none() {
        let mut bucket = ams.access.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        if !bucket.take(Instant::now(), settings.max_requests_per_second) {
            let text = "too many requests (core.max_requests_per_second): try again in a second";
            return Err(ApiError::new(StatusCode::TOO_MANY_REQUESTS, "too-many-requests", text)
                .with_header(header::RETRY_AFTER, HeaderValue::from_static("1")));
        }
    }
    let path = request.extensions.get::<MatchedPath>().map(MatchedPath::as_str).unwrap_or_default();
    let need = need(&request.method, path);
    let found = identify(ams, &peer, &request.headers, &request.uri, path).await;
    let who = match (need, found) {
        (_, Ok(Some(who))) => who,
        // Whoever shows a token that is worth nothing is a stranger here as well.
        (Need::Open, _) => return Ok(Caller::nobody()),
        (_, Err(error)) => return Err(error),
        (_, Ok(None)) => {
            return Err(ApiError::forbidden(
                "not-trusted",
                "Not Authorized: the client's certificate is not trusted",
            ));
        }
    };
    let Some(rights) = ams.identities.rights(&who, settings.fine_grained) else {
        // Removed at this moment.
        return if need == Need::Open { Ok(Caller::nobody()) } else { Err(no_identity()) };
    };
    let caller = Caller { who: Some(who), rights };
    if caller.is_administrator() {
        return Ok(caller);
    }
    match need {
        Need::Open | Need::Known => {}
        _ if !settings.fine_grained => {
            return Err(ApiError::forbidden(
                "not-permitted",
                "Not Authorized: only members of the group admin may do anything (auth.mode is unrestricted)",
            ));
        }
        Need::Each => {}
        Need::Server(entitlement) => caller.require(entitlement, &Object::Server)?,
        Need::Object(kind, entitlement) => {
            // What is not there is answered by its handler, so that scripts can tell.
            if let Some(id) = resolve(ams, kind, first.unwrap_or_default()).await? {
                caller.require(entitlement, &Object::One(kind, id))?;
            }
        }
    }
    Ok(caller)
}

/// Who asks, by what they show. None: nobody that we know.
async fn identify(
    ams: &Ams,
    peer: &Peer,
    headers: &HeaderMap,
    uri: &Uri,
    path: &str,
) -> Result<Option<Who>, ApiError> {
    if ams.trust.is_administrator(peer) && (peer.credentials.is_some() || bearer(headers).is_none()) {
        return Ok(Some(Who::Administrator));
    }
    if peer.credentials.is_some() {
        return Ok(None);
    }
    if let Some(token) = bearer(headers) {
        let email =
            ams.access.provider.email(token, &ams.settings.get().oidc).await.map_err(
                |error| match &error {
                    OidcError::Token(_) => unauthorized(error.to_string()),
                    OidcError::Provider { .. } => {
                        ApiError::unavailable("provider-unavailable", error.to_string())
                    }
                },
            )?;
        return match ams.identities.by_email(&email) {
            Some(who) => Ok(Some(who)),
            None => Err(no_identity()),
        };
    }
    if path == "/1.0/events"
        && let Ok(query) = axum::extract::Query::<HashMap<String, String>>::try_from_uri(uri)
        && let Some(token) = query.0.get("token").filter(|token| !token.is_empty())
    {
        return match ams.access.tokens.check(token) {
            Some(who) => Ok(Some(who)),
            None => Err(unauthorized("the token for events is not accepted: ask for a new one")),
        };
    }
    Ok(peer.certificate.as_deref().and_then(|certificate| ams.identities.by_certificate(certificate)))
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ').unwrap_or((value, ""));
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

fn unauthorized(text: impl Into<String>) -> ApiError {
    ApiError::unauthorized(text).with_header(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"))
}

fn no_identity() -> ApiError {
    ApiError::forbidden("not-trusted", "Not Authorized: there is no identity for this caller")
}

/// The id behind a name, as permissions have it; none: there is no such object.
pub(super) async fn resolve(ams: &Ams, kind: Kind, name: &str) -> Result<Option<String>, ApiError> {
    Ok(match kind {
        Kind::Identity | Kind::Group | Kind::Node | Kind::Addon => Some(name.to_owned()),
        Kind::Instance => match ams.find_instance(name).await {
            Ok(record) => Some(record.value.id.to_string()),
            Err(InstanceError::Store(error)) => return Err(store_error(error)),
            Err(_) => None,
        },
        Kind::Application => match ams.catalog.find(name).await {
            Ok(record) => Some(record.value.id.to_string()),
            Err(CatalogError::Store(error)) => return Err(store_error(error)),
            Err(_) => None,
        },
        Kind::Image => match ams.images.find(name).await {
            Ok(image) => Some(image.id.to_string()),
            Err(ImageError::Store(error)) => return Err(store_error(error)),
            Err(_) => None,
        },
    })
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, time::Duration};

    use super::*;

    #[test]
    fn every_route_of_the_router_stands_in_the_table_with_its_methods() {
        let source = include_str!("mod.rs");
        let mut paths = BTreeSet::new();
        for part in source.split(".route(").skip(1) {
            let part = part.trim_start();
            let Some((path, handlers)) = part.strip_prefix('"').and_then(|rest| rest.split_once('"')) else {
                continue;
            };
            let route = ROUTES.iter().find(|route| route.path == path);
            let route =
                route.unwrap_or_else(|| panic!("{path} is not in the table: only administrators may use it"));
            paths.insert(path);
            let known = |method: &str| route.methods.iter().any(|(known, _)| *known == method);
            let handlers = handlers.split(".route_layer(").next().unwrap_or_default();
            for (word, method) in [
                ("get(", "GET"),
                ("post(", "POST"),
                ("put(", "PUT"),
                ("patch(", "PATCH"),
                ("delete(", "DELETE"),
            ] {
                assert!(!handlers.contains(word) || known(method), "{method} {path} is not in the table");
            }
        }
        assert!(paths.len() > 20, "the routes were found");
        let all: BTreeSet<&str> = ROUTES.iter().map(|route| route.path).collect();
        assert_eq!(all.len(), ROUTES.len(), "no route stands there twice");
    }

    #[test]
    fn the_reference_names_what_each_request_needs() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/reference/ams-access.md");
        let text = std::fs::read_to_string(path).expect("the reference is in the repository");
        let table = text.split("## What each request needs").nth(1).expect("the section");
        let rows = ROUTES.iter().flat_map(|route| route.methods.iter().map(|one| (route.path, one)));
        let rows: Vec<String> = rows
            .map(|(path, (method, need))| {
                let need = match need {
                    Need::Open => "open".into(),
                    Need::Known => "an identity".into(),
                    Need::Each => "what its objects need".into(),
                    Need::Server(entitlement) => format!("`{entitlement}` of the server"),
                    Need::Object(kind, entitlement) => format!("`{entitlement}` of the {}", kind.as_str()),
                };
                format!("| {method} | `{path}` | {need} |")
            })
            .collect();
        let written: Vec<&str> = table.lines().filter(|line| line.contains("| `/")).collect();
        assert_eq!(written, rows);
    }

    #[test]
    fn the_open_routes_are_the_documented_ones() {
        let open: Vec<String> = ROUTES
            .iter()
            .flat_map(|route| route.methods.iter().map(move |(method, need)| (route.path, method, *need)))
            .filter(|(_, _, need)| *need == Need::Open)
            .map(|(path, method, _)| format!("{method} {path}"))
            .collect();
        assert_eq!(
            open,
            [
                "GET /",
                "GET /1.0",
                "GET /1.0/version",
                "GET /1.0/operations/{id}/websocket",
                "POST /1.0/certificates",
                "GET /1.0/auth/oidc",
            ]
        );
        assert_eq!(need(&Method::GET, "/1.0/nowhere"), Need::Server(ADMIN));
        assert_eq!(need(&Method::PUT, "/1.0/instances/{id}"), Need::Server(ADMIN));
        assert_eq!(need(&Method::HEAD, "/1.0/version"), Need::Open);
    }

    #[test]
    fn entitlements_in_the_table_are_of_their_kind() {
        use crate::identity::permissions::SERVER_ENTITLEMENTS;
        for (_, need) in ROUTES.iter().flat_map(|route| route.methods) {
            let (entitlement, known) = match need {
                Need::Server(entitlement) => (entitlement, SERVER_ENTITLEMENTS),
                Need::Object(kind, entitlement) => (entitlement, kind.entitlements()),
                _ => continue,
            };
            assert!(known.iter().any(|(name, _)| name == entitlement), "{need:?}");
        }
    }

    #[test]
    fn a_bucket_gives_one_seconds_worth_at_once_and_then_the_rate() {
        let start = Instant::now();
        let mut bucket = Bucket { level: 1.0, at: start };
        assert_eq!((0..100).filter(|_| bucket.take(start, 10)).count(), 10);
        let later = start + Duration::from_millis(500);
        assert_eq!((0..100).filter(|_| bucket.take(later, 10)).count(), 5);
        assert!(!bucket.take(later, 10) && bucket.take(later, 0), "0 means unlimited");
        // An hour of silence is worth one second.
        let much_later = start + Duration::from_secs(3600);
        assert_eq!((0..100).filter(|_| bucket.take(much_later, 10)).count(), 10);
    }
}
