//! What every request passes on its way to a route and back: an id, one spelling of its path, a guard against
//! panics, and the envelope for everything that went wrong.

use std::{panic::AssertUnwindSafe, sync::Arc, time::Instant};

use axum::{
    Router,
    body::{Body, to_bytes},
    extract::{DefaultBodyLimit, MatchedPath},
    response::Response,
};
use futures_util::FutureExt as _;
use http::{
    HeaderName, HeaderValue, Method, Request, StatusCode, Uri,
    header::{ALLOW, CONTENT_LENGTH, CONTENT_TYPE, HOST},
    uri::PathAndQuery,
};
use tower::ServiceExt as _;
use tracing::Instrument as _;

use super::{Envelope, Finished, Peer, PublicError, RequestId, SentPath};
use crate::{
    ApiError,
    errors::Pending,
    shutdown::panic_text,
    telemetry::{chain, request_id},
};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The routes of a program with everything around them.
pub struct Edge {
    router: Router,
    envelope: Arc<dyn Envelope>,
}

#[derive(Clone)]
struct Matched(MatchedPath);

impl Edge {
    /// Wraps routes. `body_bytes` bounds bodies where a route does not set its own limit.
    pub fn new(router: Router, envelope: Arc<dyn Envelope>, body_bytes: usize) -> Arc<Self> {
        let router = router
            .layer(axum::middleware::from_fn(keep_matched_path))
            .layer(DefaultBodyLimit::max(body_bytes));
        Arc::new(Self { router, envelope })
    }

    /// Answers one request.
    pub async fn call(&self, mut request: Request<Body>, peer: Peer) -> Response {
        let started = Instant::now();
        self.envelope.started();
        let id: Arc<str> = request_id().into();
        let (method, sent_path) = (request.method().clone(), request.uri().path().to_owned());
        let host =
            request.headers().get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default().to_owned();
        let request_bytes = request
            .headers()
            .get(CONTENT_LENGTH)
            .and_then(|length| length.to_str().ok()?.parse().ok())
            .unwrap_or(0);
        let extensions = request.extensions_mut();
        extensions.insert(RequestId(id.clone()));
        extensions.insert(SentPath(sent_path.as_str().into()));
        extensions.insert(peer);
        if let Some(uri) = one_spelling(request.uri()) {
            *request.uri_mut() = uri;
        }
        let span = tracing::info_span!("request", request.id = %id, method = %method);
        let respond = async {
            let answer = AssertUnwindSafe(self.router.clone().oneshot(request)).catch_unwind().await;
            let response = match answer {
                Ok(Ok(response)) => response,
                Err(panic) => axum::response::IntoResponse::into_response(ApiError::internal(format!(
                    "the handler panicked: {}",
                    panic_text(&*panic)
                ))),
            };
            self.finish(response, &id, &method, &sent_path).await
        };
        let mut response = respond.instrument(span).await;
        if let Ok(value) = HeaderValue::from_str(&id) {
            response.headers_mut().insert(REQUEST_ID, value);
        }
        let matched = response.extensions_mut().remove::<Matched>();
        self.envelope.finished(&Finished {
            path: &sent_path,
            method: &method,
            route: matched.as_ref().map(|matched| matched.0.as_str()),
            host: &host,
            status: response.status(),
            duration: started.elapsed(),
            request_bytes,
            response_bytes: hyper::body::Body::size_hint(response.body()).exact().unwrap_or(0),
        });
        response
    }

    /// Writes the envelope where an answer is an error that is not in it yet, and the log line.
    async fn finish(&self, mut response: Response, id: &str, method: &Method, path: &str) -> Response {
        let status = response.status();
        let error = match response.extensions_mut().remove::<Pending>() {
            Some(Pending(error)) => error,
            None if status.is_client_error() || status.is_server_error() => {
                let json = response
                    .headers()
                    .get(CONTENT_TYPE)
                    .is_some_and(|value| value.as_bytes().starts_with(b"application/json"));
                if json {
                    tracing::debug!(status = status.as_u16(), "{method} {path} was answered with {status}");
                    return response;
                }
                Arc::new(foreign(&mut response, method, path).await)
            }
            None => {
                tracing::debug!(status = status.as_u16(), "{method} {path} was answered with {status}");
                return response;
            }
        };
        let cause = error.source.as_deref().map(|source| chain(source)).unwrap_or_default();
        let code = error.code;
        if status.is_server_error() {
            tracing::error!(status = status.as_u16(), code, cause, "{method} {path} failed: {error}");
        } else {
            tracing::info!(status = status.as_u16(), code, cause, "{method} {path} was refused: {error}");
        }
        let body = self.envelope.error_body(&PublicError {
            status: error.status,
            code: error.code,
            text: &error.text,
            request_id: id,
            reasons: error.reasons.as_ref(),
        });
        let mut written = Response::new(Body::from(body.to_string()));
        *written.status_mut() = error.status;
        *written.extensions_mut() = std::mem::take(response.extensions_mut());
        // Headers of layers (CORS) stay; those that described the old body do not.
        *written.headers_mut() = std::mem::take(response.headers_mut());
        written.headers_mut().remove(CONTENT_LENGTH);
        for (name, value) in &error.headers {
            written.headers_mut().insert(name, value.clone());
        }
        written.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        written
    }
}

/// The error for an answer that some library made.
async fn foreign(response: &mut Response, method: &Method, path: &str) -> ApiError {
    let status = response.status();
    // Bounded: libraries answer with one line.
    let body = to_bytes(std::mem::take(response.body_mut()), 4096).await.unwrap_or_default();
    let said = String::from_utf8_lossy(&body).trim().to_owned();
    let (code, text) = match status {
        StatusCode::NOT_FOUND => ("not-found", format!("there is nothing at {path}")),
        StatusCode::METHOD_NOT_ALLOWED => {
            let allowed = response
                .headers()
                .get(ALLOW)
                .and_then(|allow| allow.to_str().ok())
                .unwrap_or("other methods");
            ("method-not-allowed", format!("{method} is not possible on {path}: {allowed} is"))
        }
        StatusCode::PAYLOAD_TOO_LARGE => {
            ("body-too-large", "the body of the request is too large".to_owned())
        }
        status if status.is_server_error() => {
            return ApiError { status, ..ApiError::internal(said) };
        }
        _ if said.is_empty() => ("refused", status.canonical_reason().unwrap_or("refused").to_lowercase()),
        _ => ("bad-request", said),
    };
    ApiError::new(status, code, text)
}

/// The URI without doubled and trailing slashes; none when it has neither.
fn one_spelling(uri: &Uri) -> Option<Uri> {
    let path = uri.path();
    if !path.contains("//") && (path.len() == 1 || !path.ends_with('/')) {
        return None;
    }
    let joined: Vec<&str> = path.split('/').filter(|segment| !segment.is_empty()).collect();
    let mut text = format!("/{}", joined.join("/"));
    if let Some(query) = uri.query() {
        text.push('?');
        text.push_str(query);
    }
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(PathAndQuery::try_from(text).ok()?);
    Uri::from_parts(parts).ok()
}

async fn keep_matched_path(request: axum::extract::Request, next: axum::middleware::Next) -> Response {
    let matched = request.extensions().get::<MatchedPath>().cloned();
    let mut response = next.run(request).await;
    if let Some(matched) = matched {
        response.extensions_mut().insert(Matched(matched));
    }
    response
}

#[cfg(test)]
mod tests {
    use axum::routing::{get, post};
    use http_body_util::BodyExt as _;
    use serde_json::Value;

    use super::*;
    use crate::http::{GatewayStyle, Json, OptionalJson, Query};

    #[derive(Debug, serde::Deserialize, serde::Serialize)]
    struct Body1 {
        screen: Screen,
    }

    #[derive(Debug, Default, serde::Deserialize, serde::Serialize)]
    struct Screen {
        width: u32,
    }

    #[derive(Debug, serde::Deserialize)]
    struct Paging {
        limit: Option<u32>,
    }

    fn edge() -> Arc<Edge> {
        let router = Router::new()
            .route("/1.0", get(|| async { "root" }))
            .route(
                "/1.0/things",
                get(|Query(paging): Query<Paging>| async move { format!("{:?}", paging.limit) }),
            )
            .route("/1.0/things", post(|Json(body): Json<Body1>| async { Json(body) }))
            .route("/1.0/optional", post(|OptionalJson(body): OptionalJson<Screen>| async { Json(body) }))
            .route(
                "/1.0/panic",
                get(|| async {
                    if true {
                        panic!("on purpose")
                    }
                }),
            )
            .route(
                "/1.0/secret",
                get(|| async {
                    Err::<(), _>(ApiError::internal(std::io::Error::other("password file is broken")))
                }),
            );
        Edge::new(router, Arc::new(GatewayStyle), 1024)
    }

    async fn ask(method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> (u16, String) {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Body::from(body.to_owned())).expect("request");
        let response = edge().call(request, Peer::default()).await;
        assert!(response.headers().contains_key("x-request-id"));
        let status = response.status().as_u16();
        let bytes = response.into_body().collect().await.expect("body").to_bytes();
        (status, String::from_utf8(bytes.to_vec()).expect("text"))
    }

    #[tokio::test]
    async fn every_error_wears_the_envelope_and_names_what_is_wrong() {
        let large = format!(r#"{{"screen":{{"width":1}},"x":"{}"}}"#, "x".repeat(2000));
        let json = &[("content-type", "application/json")][..];
        // What curl announces by itself, and a form of somebody's page.
        let form = &[("content-type", "application/x-www-form-urlencoded")][..];
        let page = &[("content-type", "text/plain"), ("origin", "https://elsewhere.example")][..];
        for (method, path, headers, body, status, part) in [
            ("GET", "/nowhere", &[][..], "", 404, "/nowhere"),
            ("PUT", "/1.0/things", &[], "", 405, "PUT"),
            ("POST", "/1.0/things", json, "{", 400, "line 1"),
            ("POST", "/1.0/things", json, "", 400, "empty"),
            ("POST", "/1.0/things", &[], r#"{"screen":{"width":"a"}}"#, 400, "screen.width"),
            ("POST", "/1.0/things", json, r#"{"screen":{"width":-1}}"#, 400, "screen.width"),
            ("POST", "/1.0/things", json, r#"{"screen":{"width":1}} x"#, 400, "trailing"),
            ("POST", "/1.0/things", form, r#"{"screen":{"width":-1}}"#, 400, "screen.width"),
            ("POST", "/1.0/things", page, "{}", 415, "application/json"),
            ("POST", "/1.0/things", json, &large, 413, "too large"),
            ("GET", "/1.0/things?limit=many", &[], "", 400, "limit"),
            ("GET", "/1.0/panic", &[], "", 500, "internal error"),
            ("GET", "/1.0/secret", &[], "", 500, "internal error"),
        ] {
            let (got, text) = ask(method, path, headers, body).await;
            assert_eq!(got, status, "{method} {path} {text}");
            let envelope: Value = serde_json::from_str(&text).expect("JSON");
            assert_eq!(envelope["type"], "error", "{text}");
            assert_eq!(envelope["status_code"], status, "{text}");
            assert!(envelope["error"].as_str().expect("error").contains(part), "{part}: {text}");
            assert_eq!(envelope["metadata"]["request_id"].as_str().expect("id").len(), 20);
            assert!(!text.contains("password"), "{text}");
        }
    }

    #[tokio::test]
    async fn every_spelling_of_a_path_is_served_directly() {
        for path in ["/1.0", "/1.0/", "//1.0", "//1.0//"] {
            assert_eq!(ask("GET", path, &[], "").await, (200, "root".into()), "{path}");
        }
        assert_eq!(ask("GET", "/1.0//things/?limit=3", &[], "").await, (200, "Some(3)".into()));
        let body = r#"{"screen":{"width":1}}"#;
        assert_eq!(ask("POST", "/1.0/things/", &[], body).await, (200, body.into()));
    }

    #[tokio::test]
    async fn an_optional_body_may_be_missing_empty_or_null() {
        for (body, want) in [("", 0), ("  ", 0), ("null", 0), (r#"{"width":7}"#, 7)] {
            let (status, text) = ask("POST", "/1.0/optional", &[], body).await;
            assert_eq!((status, text), (200, format!(r#"{{"width":{want}}}"#)));
        }
    }
}
