//! Tokens of instances: signed, for one session, checked without a database.
//!
//! `<claims>.<signature>`, both base64url without padding; the claims are JSON, the signature is HMAC-SHA-256
//! over the encoded claims. They do not expire (gateway-api section 7.4): the session they are for does.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use fanlight_api::{InstanceId, Secret, SessionId};
use hmac::{Hmac, Mac};
use serde::{Deserialize, Serialize};
use sha2::Sha256;

/// Bytes of a key.
pub const KEY_BYTES: usize = 32;
/// Longer ones are not looked at.
const MAX_TOKEN_BYTES: usize = 2048;

/// The key that signs tokens.
#[derive(Clone)]
pub struct TokenKey([u8; KEY_BYTES]);

/// What a token opens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scope {
    /// The one session.
    #[serde(rename = "s")]
    pub session_id: SessionId,
    /// The one instance, when it was known.
    #[serde(rename = "i", default, skip_serializing_if = "Option::is_none")]
    pub instance_id: Option<InstanceId>,
}

impl TokenKey {
    /// A key.
    pub fn new(bytes: [u8; KEY_BYTES]) -> Self {
        Self(bytes)
    }

    fn mac(&self, claims: &str) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("keys of every length are allowed");
        // Tells these signatures from any other use of the key.
        mac.update(b"fanlight instance token v1\0");
        mac.update(claims.as_bytes());
        mac
    }

    /// A token. The same scope gives the same token.
    pub fn sign(&self, scope: &Scope) -> Secret {
        let claims = serde_json::to_vec(scope).expect("ids can always be written");
        let claims = URL_SAFE_NO_PAD.encode(claims);
        let signature = URL_SAFE_NO_PAD.encode(self.mac(&claims).finalize().into_bytes());
        Secret::new(format!("{claims}.{signature}"))
    }

    /// What a token opens; `None` if it was not signed with this key. Takes the same time wherever the
    /// signature differs.
    pub fn verify(&self, token: &str) -> Option<Scope> {
        if token.len() > MAX_TOKEN_BYTES {
            return None;
        }
        let (claims, signature) = token.split_once('.')?;
        let signature = URL_SAFE_NO_PAD.decode(signature).ok()?;
        self.mac(claims).verify_slice(&signature).ok()?;
        serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).ok()?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scope(instance: bool) -> Scope {
        Scope {
            session_id: "d1s0a4k3pn6a8q46ta10".parse().expect("valid"),
            instance_id: instance.then(|| "cilsreunfpfec9b1ktg0".parse().expect("valid")),
        }
    }

    #[test]
    fn a_token_opens_what_it_was_signed_for_and_nothing_else() {
        let key = TokenKey::new([7; KEY_BYTES]);
        for scope in [scope(false), scope(true)] {
            let token = key.sign(&scope);
            assert_eq!(token, key.sign(&scope), "asked again, the same");
            assert_eq!(key.verify(token.expose()), Some(scope));
            assert_eq!(TokenKey::new([8; KEY_BYTES]).verify(token.expose()), None, "another key");
        }
    }

    #[test]
    fn tokens_that_were_changed_cut_or_made_up_open_nothing() {
        let key = TokenKey::new([7; KEY_BYTES]);
        let token = key.sign(&scope(true));
        let token = token.expose();
        for at in 0..token.len() {
            let mut bytes = token.as_bytes().to_vec();
            bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
            // The last character holds two bits that do not count; decoders refuse them unless they are zero.
            assert_eq!(key.verify(&String::from_utf8(bytes).expect("ascii")), None, "byte {at}");
            assert_eq!(key.verify(&token[..at]), None, "cut at {at}");
        }
        let (claims, signature) = token.split_once('.').expect("two parts");
        let other = key.sign(&scope(false));
        let other = other.expose().split_once('.').expect("two parts").0.to_owned();
        for bad in [
            "",
            ".",
            "x",
            &format!("{claims}."),
            &format!(".{signature}"),
            &format!("{other}.{signature}"),
            &"a".repeat(1 << 20),
        ] {
            assert_eq!(key.verify(bad), None, "{}", &bad[..bad.len().min(40)]);
        }
    }
}
