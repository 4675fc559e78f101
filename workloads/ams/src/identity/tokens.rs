//! Tokens for opening the socket of events where no header can be sent (ams-api section 4): signed by the cluster, so
//! that every unit accepts them, and of use for a minute.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use fanlight_api::Secret;
use fanlight_store::{Handle, StoreError, StoreExt as _};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation, decode, encode};
use serde::{Deserialize, Serialize};

use super::Who;

/// Where the cluster's key is kept.
const KEY: &str = "ams/events-key";
/// How long a token is of use, seconds.
const LIFE_S: i64 = 60;
/// What a token is for.
const AUDIENCE: &str = "events";

#[derive(Serialize, Deserialize)]
struct Claims {
    sub: String,
    aud: String,
    exp: i64,
}

/// Makes and checks tokens.
pub struct EventTokens {
    signs: EncodingKey,
    checks: DecodingKey,
}

impl EventTokens {
    /// With the cluster's key, which is made where there is none.
    ///
    /// # Errors
    /// The store cannot be read or written.
    pub async fn open(store: &Handle) -> Result<Self, StoreError> {
        let fresh: [u8; 32] = rand::random();
        let stored = store
            .update_json::<String, _, _>(KEY, |key| {
                Some(key.unwrap_or_else(|| BASE64_STANDARD.encode(fresh)))
            })
            .await?;
        let text = stored.map(|stored| stored.value).unwrap_or_default();
        let secret = BASE64_STANDARD.decode(text).ok().filter(|secret| secret.len() >= 32);
        // A key that somebody spoilt is not used: tokens of this unit are then good for this unit.
        let secret = secret.unwrap_or_else(|| fresh.to_vec());
        Ok(Self { signs: EncodingKey::from_secret(&secret), checks: DecodingKey::from_secret(&secret) })
    }

    /// A token for this caller.
    ///
    /// # Errors
    /// It cannot be signed.
    pub fn make(&self, who: &Who, now: i64) -> Result<Secret, jsonwebtoken::errors::Error> {
        let claims = Claims { sub: who.subject(), aud: AUDIENCE.into(), exp: now + LIFE_S };
        encode(&Header::new(Algorithm::HS256), &claims, &self.signs).map(Secret::new)
    }

    /// For whom a token was made, while it is of use.
    pub fn check(&self, token: &str) -> Option<Who> {
        let mut validation = Validation::new(Algorithm::HS256);
        validation.leeway = 0;
        validation.set_audience(&[AUDIENCE]);
        validation.set_required_spec_claims(&["exp", "aud", "sub"]);
        let data = decode::<Claims>(token, &self.checks, &validation).ok()?;
        Who::from_subject(&data.claims.sub)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use fanlight_store::Embedded;

    use super::*;
    use crate::events::unix_now;

    #[tokio::test]
    async fn every_unit_accepts_a_token_for_a_minute_and_nobody_elses() {
        fanlight_service::tls::install_provider();
        let store: Handle = Arc::new(Embedded::memory());
        let (one, two) = (EventTokens::open(&store).await, EventTokens::open(&store).await);
        let (one, two) = (one.expect("opened"), two.expect("opened"));
        let other: Handle = Arc::new(Embedded::memory());
        let other = EventTokens::open(&other).await.expect("opened");
        for who in [Who::Administrator, Who::Identity("abc".into())] {
            let token = one.make(&who, unix_now()).expect("signed");
            assert_eq!(two.check(token.expose()), Some(who.clone()));
            assert_eq!(other.check(token.expose()), None);
            let old = one.make(&who, unix_now() - LIFE_S - 1).expect("signed");
            assert_eq!(two.check(old.expose()), None);
        }
        assert_eq!(one.check("a.b.c"), None);
    }
}
