//! The page under `/ui`: its files, with a policy that lets it talk to us alone, and its login. The page never
//! holds an API token: a one-time code becomes a cookie that scripts cannot read.

use axum::{
    Router,
    extract::{Request, State},
    middleware::{self, Next},
    response::{IntoResponse, Redirect, Response},
    routing::{get, post},
};
use fanlight_api::{Secret, gateway::LoginPost};
use fanlight_service::{
    ApiError,
    http::{Json, Peer, SentPath},
};
use http::{
    HeaderMap, HeaderValue,
    header::{CACHE_CONTROL, COOKIE, ORIGIN, SET_COOKIE},
    request::Parts,
};
use serde_json::{Value, json};
use tower_http::services::{ServeDir, ServeFile};

use crate::{
    Gateway,
    accounts::COOKIE_TIME,
    api::{Answer, check_origin},
};

const NAME: &str = "fanlight";
/// The page loads and talks to nothing but its own origin; sockets are named because older browsers do not count
/// them as `'self'`.
const POLICY: &str = "default-src 'self'; connect-src 'self' ws: wss:; img-src 'self' data: blob:; \
                      media-src 'self' blob:; worker-src 'self' blob:; object-src 'none'; base-uri 'none'; \
                      form-action 'self'; frame-ancestors 'none'";

/// Routes of the page.
pub fn router(gateway: &Gateway) -> Router<Gateway> {
    let mut router = Router::new()
        .route("/ui/login", post(login))
        .route("/ui/logout", post(logout))
        .route("/ui/session", get(session));
    let folder = &gateway.config.ui.path;
    if !folder.as_os_str().is_empty() {
        let index = folder.join("index.html");
        let files = ServeDir::new(folder).append_index_html_on_directories(true);
        let page = Router::new()
            .route("/", get(|| async { Redirect::temporary("/ui/") }))
            .route_service("/ui", ServeFile::new(index))
            .nest_service("/ui/", files)
            .layer(middleware::from_fn(dress));
        router = router.merge(page);
    }
    router
}

/// Headers of the page's files.
async fn dress(request: Request, next: Next) -> Response {
    let sent = request.extensions().get::<SentPath>().map(|sent| sent.0.to_string()).unwrap_or_default();
    if sent == "/ui" {
        // Relative addresses in the page count from `/ui/`.
        return Redirect::permanent("/ui/").into_response();
    }
    let mut response = next.run(request).await;
    // Names of assets carry a hash of their content.
    let cache = if sent.starts_with("/ui/assets/") && response.status().is_success() {
        "public, max-age=31536000, immutable"
    } else {
        "no-cache"
    };
    let headers = response.headers_mut();
    let mut set = |name, value| headers.insert(name, HeaderValue::from_static(value));
    set("content-security-policy", POLICY);
    set("x-content-type-options", "nosniff");
    set("referrer-policy", "same-origin");
    set("cross-origin-opener-policy", "same-origin");
    headers.insert(CACHE_CONTROL, HeaderValue::from_static(cache));
    response
}

/// The page's cookie in a request.
pub fn cookie(headers: &HeaderMap) -> Option<Secret> {
    headers
        .get_all(COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(';'))
        .filter_map(|pair| pair.trim().split_once('='))
        .find(|(name, value)| *name == NAME && !value.is_empty())
        .map(|(_, value)| Secret::new(value))
}

fn set_cookie(parts: &Parts, value: &str, seconds: u64) -> (http::HeaderName, String) {
    let secure = if parts.extensions.get::<Peer>().is_some_and(|peer| peer.tls) { "; Secure" } else { "" };
    let text = format!("{NAME}={value}; Path=/; HttpOnly; SameSite=Strict; Max-Age={seconds}{secure}");
    (SET_COOKIE, text)
}

async fn login(
    State(gateway): State<Gateway>,
    parts: Parts,
    Json(request): Json<LoginPost>,
) -> Result<Response, ApiError> {
    // Browsers always say where a POST comes from; other programs need not.
    if parts.headers.contains_key(ORIGIN) {
        check_origin(&parts, &gateway)?;
    }
    let (cookie, expires_at) = gateway.accounts.login(&request.code, gateway.now()).await?;
    let header = set_cookie(&parts, cookie.expose(), COOKIE_TIME.as_secs());
    Ok(([header], Answer::ok(json!({ "expires_at": expires_at }))).into_response())
}

async fn logout(State(gateway): State<Gateway>, parts: Parts) -> Result<Response, ApiError> {
    if let Some(cookie) = cookie(&parts.headers) {
        check_origin(&parts, &gateway)?;
        gateway.accounts.logout(&cookie).await?;
    }
    Ok(([set_cookie(&parts, "", 0)], Answer::empty()).into_response())
}

async fn session(State(gateway): State<Gateway>, parts: Parts) -> Result<Answer<Value>, ApiError> {
    let cookie = cookie(&parts.headers)
        .ok_or_else(|| ApiError::unauthorized("this page is not logged in; open a new link"))?;
    let (caller, expires_at) = gateway.accounts.cookie(&cookie, gateway.now()).await?;
    Ok(Answer::ok(json!({ "account": caller.account, "rights": caller.rights, "expires_at": expires_at })))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cookie_is_found_among_others() {
        for (text, want) in [
            ("fanlight=abc", Some("abc")),
            ("a=b; fanlight=abc; c=d", Some("abc")),
            ("xfanlight=abc", None),
            ("fanlight=", None),
            ("fanlight", None),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(COOKIE, HeaderValue::from_static(text));
            assert_eq!(cookie(&headers).as_ref().map(Secret::expose), want, "{text}");
        }
    }
}
