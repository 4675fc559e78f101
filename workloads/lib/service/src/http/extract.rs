//! Extractors whose refusals are [`ApiError`]s that name the field and the place.

use std::time::Duration;

use axum::{
    body::Bytes,
    extract::{FromRequest, FromRequestParts, Request},
    response::{IntoResponse, Response},
};
use http::{
    HeaderValue, StatusCode,
    header::{CONTENT_TYPE, ORIGIN},
    request::Parts,
};
use serde::{Serialize, de::DeserializeOwned};

use crate::ApiError;

/// How long a body may take to arrive.
const BODY_TIME: Duration = Duration::from_secs(30);

/// A JSON body, in requests and answers. A request without `Content-Type` is taken for JSON, because clients of
/// the original leave it out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Json<T>(pub T);

/// Like [`Json`], but an empty body or `null` gives the default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OptionalJson<T>(pub T);

/// Parameters of the query string.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Query<T>(pub T);

impl<T, S> FromRequest<S> for Json<T>
where
    T: DeserializeOwned,
    S: Send + Sync,
{
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let body = body(request, state).await?;
        if body.trim_ascii().is_empty() {
            return Err(ApiError::bad_request("invalid-body", "the body is empty: a JSON object is needed"));
        }
        parse(&body).map(Self)
    }
}

impl<T, S> FromRequest<S> for OptionalJson<T>
where
    T: DeserializeOwned + Default,
    S: Send + Sync,
{
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let body = body(request, state).await?;
        if body.trim_ascii().is_empty() {
            return Ok(Self(T::default()));
        }
        Ok(Self(parse::<Option<T>>(&body)?.unwrap_or_default()))
    }
}

impl<T, S> FromRequestParts<S> for Query<T>
where
    T: DeserializeOwned,
    S: Send + Sync,
{
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        axum::extract::Query::<T>::try_from_uri(&parts.uri).map(|query| Self(query.0)).map_err(|error| {
            // The parser's text names the parameter.
            let source = std::error::Error::source(&error).map(ToString::to_string);
            let text = source.unwrap_or_else(|| error.to_string());
            ApiError::bad_request("invalid-query", format!("the query is not usable: {text}"))
        })
    }
}

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        match serde_json::to_vec(&self.0) {
            Ok(body) => {
                ([(CONTENT_TYPE, HeaderValue::from_static("application/json"))], body).into_response()
            }
            Err(error) => ApiError::internal(error).into_response(),
        }
    }
}

async fn body<S: Send + Sync>(request: Request, state: &S) -> Result<Bytes, ApiError> {
    // A browser says where a request comes from, and a foreign page may send forms but not JSON without being asked
    // first. Other clients, curl's `-d` among them, mean JSON whatever they announce.
    let kind = request.headers().get(CONTENT_TYPE).filter(|_| request.headers().contains_key(ORIGIN));
    if let Some(kind) = kind {
        let kind = kind.to_str().unwrap_or_default();
        let essence = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        if essence != "application/json" && !essence.ends_with("+json") {
            return Err(ApiError::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "unsupported-media-type",
                format!("the body is announced as {kind:?}: application/json is needed"),
            ));
        }
    }
    match tokio::time::timeout(BODY_TIME, Bytes::from_request(request, state)).await {
        Ok(Ok(body)) => Ok(body),
        Ok(Err(rejection)) if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE => Err(ApiError::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "body-too-large",
            "the body of the request is too large",
        )),
        Ok(Err(rejection)) => {
            Err(ApiError::bad_request("invalid-body", format!("reading the body: {}", rejection.body_text())))
        }
        Err(_) => Err(ApiError::new(
            StatusCode::REQUEST_TIMEOUT,
            "body-too-slow",
            format!("the body did not arrive within {} s", BODY_TIME.as_secs()),
        )),
    }
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let refuse = |text: String| ApiError::bad_request("invalid-body", text);
    let mut reader = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
        let path = error.path().to_string();
        match path.as_str() {
            "." => refuse(format!("the body is not usable: {}", error.inner())),
            path => refuse(format!("the body is not usable: {path}: {}", error.inner())),
        }
    })?;
    reader.end().map_err(|error| refuse(format!("the body is not usable: {error}")))?;
    Ok(value)
}
