//! Tokens of an OIDC provider (ams-api section 8.1): a JWT is checked against the provider's keys, which are fetched
//! through its discovery document and kept. Who the e-mail address in it is, is decided elsewhere.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use jsonwebtoken::{
    Algorithm, DecodingKey, Header, Validation, decode, decode_header,
    errors::ErrorKind,
    jwk::{Jwk, JwkSet, PublicKeyUse},
};
use serde::{Deserialize, de::DeserializeOwned};

/// Signatures that are accepted. Shared secrets are not: the provider's keys are public.
const ALGORITHMS: [Algorithm; 3] = [Algorithm::RS256, Algorithm::ES256, Algorithm::EdDSA];
/// How far clocks may be apart, seconds.
const LEEWAY_S: u64 = 30;
/// Longest token, bytes.
const MAX_TOKEN: usize = 16 * 1024;
/// Longest document of the provider, bytes.
const MAX_DOCUMENT: usize = 256 * 1024;
/// How long the provider may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Keys are asked for again after this time, so that those the provider has withdrawn are forgotten.
const MAX_AGE: Duration = Duration::from_secs(3600);
/// And not more often than this, whatever keys tokens name.
const MIN_AGE: Duration = Duration::from_secs(60);
/// Between attempts while it has not answered yet.
const AGAIN: Duration = Duration::from_secs(5);

/// What the settings say about the provider.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Oidc {
    /// URL of the provider; empty: there is none.
    pub issuer: String,
    /// Of the command-line client and the page.
    pub client_id: String,
    /// Whom tokens must be made for; empty: the client.
    pub audience: String,
    /// HTTP, and certificates that cannot be verified, are accepted.
    pub allow_insecure: bool,
    /// Ways out.
    pub proxies: Proxies,
}

/// Proxies for requests to the outside.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Proxies {
    /// For `http://`; empty: none.
    pub http: String,
    /// For `https://`; empty: none.
    pub https: String,
    /// Hosts that are reached directly.
    pub ignore: Vec<String>,
}

/// Why a token is not accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OidcError {
    /// The token. The text names the reason and nothing of its content.
    #[error("the token is not accepted: {0}")]
    Token(String),
    /// The provider's keys cannot be had.
    #[error("the OIDC provider {issuer} cannot be asked for its keys: {reason}")]
    Provider {
        /// As in the settings.
        issuer: String,
        /// What happened.
        reason: String,
    },
}

/// The provider, as far as it was asked.
#[derive(Default)]
pub struct Provider {
    known: tokio::sync::Mutex<Known>,
}

#[derive(Default)]
struct Known {
    /// What was asked with these settings.
    of: Oidc,
    /// Issuer that tokens must name, and the keys.
    keys: Option<Arc<Keys>>,
    asked: Option<Instant>,
    failed: Option<String>,
}

struct Keys {
    issuer: String,
    set: JwkSet,
}

#[derive(Deserialize)]
struct Discovery {
    issuer: String,
    jwks_uri: String,
}

#[derive(Deserialize)]
struct AnyKeys {
    keys: Vec<serde_json::Value>,
}

#[derive(Deserialize)]
struct Claims {
    #[serde(default)]
    email: Option<String>,
    #[serde(default)]
    email_verified: Option<serde_json::Value>,
}

impl Provider {
    /// The e-mail address that a valid token names.
    ///
    /// # Errors
    /// The token is not valid, or the provider cannot be asked.
    pub async fn email(&self, token: &str, oidc: &Oidc) -> Result<String, OidcError> {
        if oidc.issuer.is_empty() {
            return Err(refused("this AMS has no OIDC provider (oidc.issuer_url)"));
        }
        let header = header(token)?;
        let keys = self.keys(oidc, |keys| find(&keys.set, &header).is_some()).await?;
        let key = find(&keys.set, &header).ok_or_else(|| refused("the provider has no such key"))?;
        let audience = if oidc.audience.is_empty() { &oidc.client_id } else { &oidc.audience };
        check(token, header.alg, key, &keys.issuer, audience)
    }

    /// The provider's keys; asked for again when they are old, or are not `enough` and were not asked for just now.
    async fn keys(&self, oidc: &Oidc, enough: impl Fn(&Keys) -> bool) -> Result<Arc<Keys>, OidcError> {
        // One asks, the others wait for its answer.
        let mut known = self.known.lock().await;
        if known.of != *oidc {
            *known = Known { of: oidc.clone(), ..Known::default() };
        }
        let age = known.asked.map(|asked| asked.elapsed());
        if is_due(known.keys.as_deref().map(enough), age) {
            known.asked = Some(Instant::now());
            match fetch(oidc).await {
                Ok(keys) => {
                    known.keys = Some(Arc::new(keys));
                    known.failed = None;
                }
                Err(reason) => {
                    tracing::warn!(
                        "the OIDC provider {} cannot be asked for its keys: {reason}",
                        oidc.issuer
                    );
                    known.failed = Some(reason);
                }
            }
        }
        // Keys that were good stay good while the provider is away.
        known.keys.clone().ok_or_else(|| OidcError::Provider {
            issuer: oidc.issuer.clone(),
            reason: known.failed.clone().unwrap_or_default(),
        })
    }
}

/// Whether the provider is asked (again). `enough`: whether the keys that are there will do; none: there are none.
/// `age`: since it was asked last.
fn is_due(enough: Option<bool>, age: Option<Duration>) -> bool {
    match (enough, age) {
        (_, None) => true,
        (None, Some(age)) => age > AGAIN,
        (Some(true), Some(age)) => age > MAX_AGE,
        (Some(false), Some(age)) => age > MIN_AGE,
    }
}

fn refused(reason: impl Into<String>) -> OidcError {
    OidcError::Token(reason.into())
}

/// The head of a token that may be worth a look at its signature.
fn header(token: &str) -> Result<Header, OidcError> {
    if token.len() > MAX_TOKEN {
        return Err(refused("it is too long"));
    }
    let header = decode_header(token).map_err(|_| refused("it is no JWT"))?;
    if !ALGORITHMS.contains(&header.alg) {
        return Err(refused(format!(
            "its algorithm is {:?}; RS256, ES256 and EdDSA are accepted",
            header.alg
        )));
    }
    Ok(header)
}

/// The key that a token names; a token that names none needs a provider with one key for its algorithm.
fn find<'a>(set: &'a JwkSet, header: &Header) -> Option<&'a Jwk> {
    let fits = |jwk: &&Jwk| {
        jwk.common.key_algorithm.is_none_or(|algorithm| algorithm.to_string() == format!("{:?}", header.alg))
            && jwk.common.public_key_use.as_ref().is_none_or(|usage| *usage == PublicKeyUse::Signature)
            && DecodingKey::from_jwk(jwk).is_ok_and(|key| key.family().algorithms().contains(&header.alg))
    };
    let mut keys =
        set.keys.iter().filter(|jwk| header.kid.is_none() || jwk.common.key_id == header.kid).filter(fits);
    let first = keys.next()?;
    (header.kid.is_some() || keys.next().is_none()).then_some(first)
}

fn check(
    token: &str,
    algorithm: Algorithm,
    key: &Jwk,
    issuer: &str,
    audience: &str,
) -> Result<String, OidcError> {
    let mut validation = Validation::new(algorithm);
    validation.leeway = LEEWAY_S;
    validation.validate_nbf = true;
    validation.set_issuer(&[issuer]);
    validation.set_audience(&[audience]);
    validation.set_required_spec_claims(&["exp", "iss", "aud"]);
    let key = DecodingKey::from_jwk(key).map_err(|_| refused("the provider's key cannot be used"))?;
    let claims =
        decode::<Claims>(token, &key, &validation).map_err(|error| refused(reason(error.kind())))?.claims;
    let email = claims.email.filter(|email| !email.is_empty());
    let email = email.ok_or_else(|| refused("it names no e-mail address (ask for the scope email)"))?;
    let unverified = |value: &serde_json::Value| *value == false || *value == "false";
    if claims.email_verified.as_ref().is_some_and(unverified) {
        return Err(refused("the provider has not verified the e-mail address"));
    }
    Ok(email)
}

fn reason(kind: &ErrorKind) -> String {
    match kind {
        ErrorKind::ExpiredSignature => "it has expired".into(),
        ErrorKind::ImmatureSignature => "it is not valid yet".into(),
        ErrorKind::InvalidIssuer => "another provider made it".into(),
        ErrorKind::InvalidAudience => "it was made for another audience".into(),
        ErrorKind::InvalidSignature => "its signature is wrong".into(),
        ErrorKind::MissingRequiredClaim(claim) => format!("the claim {claim} is missing"),
        _ => "it cannot be read".into(),
    }
}

async fn fetch(oidc: &Oidc) -> Result<Keys, String> {
    let client = client(oidc)?;
    let base = oidc.issuer.trim_end_matches('/');
    let discovery: Discovery =
        get(&client, oidc, &format!("{base}/.well-known/openid-configuration")).await?;
    if discovery.issuer.trim_end_matches('/') != base {
        return Err("its discovery document is of another issuer".into());
    }
    let any: AnyKeys = get(&client, oidc, &discovery.jwks_uri).await?;
    // One by one: a key of a kind that is not known here does not make the others useless.
    let keys = any.keys.into_iter().filter_map(|key| serde_json::from_value::<Jwk>(key).ok()).collect();
    Ok(Keys { issuer: discovery.issuer, set: JwkSet { keys } })
}

fn client(oidc: &Oidc) -> Result<reqwest::Client, String> {
    let text = |error: reqwest::Error| chain(&error);
    let mut builder = reqwest::Client::builder()
        .no_proxy()
        .timeout(PATIENCE)
        .https_only(!oidc.allow_insecure)
        .redirect(reqwest::redirect::Policy::limited(3))
        .tls_danger_accept_invalid_certs(oidc.allow_insecure);
    let ignored = reqwest::NoProxy::from_string(&oidc.proxies.ignore.join(","));
    if !oidc.proxies.http.is_empty() {
        let proxy = reqwest::Proxy::http(&oidc.proxies.http).map_err(text)?;
        builder = builder.proxy(proxy.no_proxy(ignored.clone()));
    }
    if !oidc.proxies.https.is_empty() {
        let proxy = reqwest::Proxy::https(&oidc.proxies.https).map_err(text)?;
        builder = builder.proxy(proxy.no_proxy(ignored));
    }
    builder.build().map_err(text)
}

async fn get<T: DeserializeOwned>(client: &reqwest::Client, oidc: &Oidc, url: &str) -> Result<T, String> {
    if !oidc.allow_insecure && !url.starts_with("https://") {
        return Err(format!("{url} is not HTTPS, and oidc.allow_insecure is off"));
    }
    let mut response = client.get(url).send().await.map_err(|error| chain(&error))?;
    if !response.status().is_success() {
        return Err(format!("{url} was answered with {}", response.status()));
    }
    let mut body = Vec::new();
    while let Some(part) = response.chunk().await.map_err(|error| chain(&error))? {
        if body.len() + part.len() > MAX_DOCUMENT {
            return Err(format!("{url} was answered with more than {MAX_DOCUMENT} bytes"));
        }
        body.extend_from_slice(&part);
    }
    serde_json::from_slice(&body).map_err(|error| format!("{url} was answered with something else: {error}"))
}

fn chain(error: &reqwest::Error) -> String {
    fanlight_service::telemetry::chain(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_of_other_kinds_are_refused_before_anybody_is_asked() {
        // {"alg":"none"}, {"alg":"HS256"}, and nothing at all.
        for token in ["", "a.b.c", "eyJhbGciOiJub25lIn0.e30.", "eyJhbGciOiJIUzI1NiJ9.e30.AA"] {
            assert!(matches!(header(token), Err(OidcError::Token(_))), "{token}");
        }
        assert_eq!(header(&"x".repeat(MAX_TOKEN + 1)).expect_err("long"), refused("it is too long"));
    }

    #[test]
    fn the_provider_is_asked_for_unknown_keys_and_after_an_hour_but_not_all_the_time() {
        let s = Duration::from_secs;
        for (enough, age, due) in [
            (None, None, true),
            (None, Some(s(1)), false),
            (None, Some(s(6)), true),
            (Some(true), Some(s(61)), false),
            (Some(true), Some(s(3601)), true),
            (Some(false), Some(s(59)), false),
            (Some(false), Some(s(61)), true),
        ] {
            assert_eq!(is_due(enough, age), due, "{enough:?} {age:?}");
        }
    }

    #[tokio::test]
    async fn without_a_provider_no_token_is_accepted() {
        let error = Provider::default().email("a.b.c", &Oidc::default()).await.expect_err("none");
        assert!(error.to_string().contains("oidc.issuer_url"), "{error}");
    }
}
