//! Credentials for TURN servers that share a secret with us: user `<expiry>:<session>`, password
//! base64(HMAC-SHA1(secret, user)) (Coturn's "TURN REST API"; signaling section 3).

use base64::{Engine, engine::general_purpose::STANDARD};
use fanlight_api::{Secret, SessionId, gateway::StunServer};
use hmac::{Hmac, Mac};
use sha1::Sha1;

/// The ICE servers for a client of a session. `expires_at` in Unix seconds. Empty when none is configured,
/// never absent.
pub fn servers(
    stun_urls: &[String],
    turn_urls: &[String],
    secret: Option<&Secret>,
    session: &SessionId,
    expires_at: i64,
) -> Vec<StunServer> {
    let mut servers = Vec::new();
    if !stun_urls.is_empty() {
        servers.push(StunServer { urls: stun_urls.to_vec(), username: None, password: None });
    }
    // A TURN entry without credentials would hang clients of the original.
    if let Some(secret) = secret.filter(|secret| !turn_urls.is_empty() && !secret.is_empty()) {
        let username = format!("{expires_at}:{session}");
        let mut mac = Hmac::<Sha1>::new_from_slice(secret.expose().as_bytes())
            .expect("keys of every length are allowed");
        mac.update(username.as_bytes());
        let password = Secret::new(STANDARD.encode(mac.finalize().into_bytes()));
        servers.push(StunServer {
            urls: turn_urls.to_vec(),
            username: Some(username),
            password: Some(password),
        });
    }
    servers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_those_that_coturn_computes() {
        // Computed with: printf '%s' 1433895918:s1 | openssl dgst -sha1 -hmac north -binary | base64
        let session = "s1".parse().expect("valid");
        let secret = Secret::new("north");
        let urls = ["turn:t:3478".to_owned()];
        let servers = servers(&["stun:t:3478".into()], &urls, Some(&secret), &session, 1_433_895_918);
        assert_eq!(servers[0].urls, ["stun:t:3478"]);
        assert_eq!(servers[0].username, None);
        assert_eq!(servers[1].username.as_deref(), Some("1433895918:s1"));
        assert_eq!(servers[1].password.as_ref().map(Secret::expose), Some("5zqHP8c1zLZoulE1ZQKiZedYha4="));
    }

    #[test]
    fn without_servers_or_secret_there_are_no_entries() {
        let session = "s1".parse().expect("valid");
        let urls = ["turn:t".to_owned()];
        assert!(servers(&[], &[], Some(&Secret::new("x")), &session, 1).is_empty());
        assert!(servers(&[], &urls, None, &session, 1).is_empty());
        assert!(servers(&[], &urls, Some(&Secret::default()), &session, 1).is_empty());
    }
}
