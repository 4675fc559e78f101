//! Tokens as values: version-2 binary macaroons with an HMAC-SHA-256 chain (gateway-api section 2.2), for API
//! accounts and for signalling sockets. Pure; keys, accounts and the clock come from elsewhere.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use fanlight_api::{SessionId, ShareId, gateway::ScreenPatch};
use hmac::{Hmac, Mac as _};
use sha2::Sha256;
use subtle::ConstantTimeEq as _;

/// Location of API tokens, as the original writes it.
const API_LOCATION: &str = "anbox-stream-gateway";
/// Location of socket tokens.
const SOCKET_LOCATION: &str = "fanlight-socket";
/// Location of the tokens in the URLs of shares.
const SHARE_LOCATION: &str = "fanlight-share";
/// Location of the socket tokens that shares are exchanged for.
const ADB_LOCATION: &str = "fanlight-adb";
/// Longest token that is looked at, characters.
const MAX_TOKEN: usize = 4096;

const VERSION: u8 = 2;
const FIELD_END: u64 = 0;
const FIELD_LOCATION: u64 = 1;
const FIELD_IDENTIFIER: u64 = 2;
const FIELD_SIGNATURE: u64 = 6;

/// Why a token was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It is no token.
    #[error("the token is malformed")]
    Malformed,
    /// Its signature is wrong: it was made with another key or changed.
    #[error("the token is not valid here")]
    Signature,
    /// Its time is over.
    #[error("the token expired at {0}")]
    Expired(String),
    /// It carries a condition that we do not know.
    #[error("the token carries an unknown condition")]
    Condition,
}

type Key = [u8; 32];

/// Kinds of tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Of an account.
    Api,
    /// For a signalling socket.
    Socket,
    /// In the URL of a share.
    Share,
    /// For a socket of a share.
    Adb,
}

fn mac(key: &[u8], data: &[u8]) -> Key {
    let mut mac = <Hmac<Sha256> as hmac::Mac>::new_from_slice(key).expect("HMAC takes keys of any length");
    mac.update(data);
    mac.finalize().into_bytes().into()
}

/// A macaroon that was read. Nothing in it may be believed before [`Macaroon::verify`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Macaroon {
    location: String,
    identifier: String,
    caveats: Vec<String>,
    signature: Key,
}

impl Macaroon {
    fn make(location: &str, identifier: &str, caveats: Vec<String>, key: &[u8]) -> Self {
        let mut macaroon =
            Self { location: location.into(), identifier: identifier.into(), caveats, signature: [0; 32] };
        macaroon.signature = macaroon.chain(key);
        macaroon
    }

    fn chain(&self, key: &[u8]) -> Key {
        // The published scheme derives the key with this constant first, padded with zeros to 32 bytes.
        let mut generator = [0; 32];
        let constant = b"macaroons-key-generator";
        generator[..constant.len()].copy_from_slice(constant);
        let start = mac(&mac(&generator, key), self.identifier.as_bytes());
        self.caveats.iter().fold(start, |signature, caveat| mac(&signature, caveat.as_bytes()))
    }

    /// Checks the signature.
    ///
    /// # Errors
    /// It was not made with this key, or was changed.
    pub fn verify(&self, key: &[u8]) -> Result<(), TokenError> {
        if bool::from(self.chain(key).ct_eq(&self.signature)) { Ok(()) } else { Err(TokenError::Signature) }
    }

    /// What it says that it is.
    pub fn kind(&self) -> Option<Kind> {
        match self.location.as_str() {
            API_LOCATION => Some(Kind::Api),
            SOCKET_LOCATION => Some(Kind::Socket),
            SHARE_LOCATION => Some(Kind::Share),
            ADB_LOCATION => Some(Kind::Adb),
            _ => None,
        }
    }

    /// Name of the account, or id of the session.
    pub fn identifier(&self) -> &str {
        &self.identifier
    }

    fn to_text(&self) -> String {
        let mut out = vec![VERSION];
        let mut field = |kind: u64, data: &[u8]| {
            write_number(&mut out, kind);
            if kind != FIELD_END {
                write_number(&mut out, data.len() as u64);
                out.extend_from_slice(data);
            }
        };
        field(FIELD_LOCATION, self.location.as_bytes());
        field(FIELD_IDENTIFIER, self.identifier.as_bytes());
        field(FIELD_END, &[]);
        for caveat in &self.caveats {
            field(FIELD_IDENTIFIER, caveat.as_bytes());
            field(FIELD_END, &[]);
        }
        field(FIELD_END, &[]);
        field(FIELD_SIGNATURE, &self.signature);
        URL_SAFE_NO_PAD.encode(out)
    }

    /// Reads a token.
    ///
    /// # Errors
    /// It is no macaroon of the form that we write.
    pub fn parse(text: &str) -> Result<Self, TokenError> {
        if text.len() > MAX_TOKEN {
            return Err(TokenError::Malformed);
        }
        let bytes = URL_SAFE_NO_PAD.decode(text.trim_end_matches('=')).map_err(|_| TokenError::Malformed)?;
        Self::read(&bytes).ok_or(TokenError::Malformed)
    }

    fn read(bytes: &[u8]) -> Option<Self> {
        let (version, mut rest) = bytes.split_first()?;
        if *version != VERSION {
            return None;
        }
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).ok();
        let location = text(read_field(&mut rest, FIELD_LOCATION)?)?;
        let identifier = text(read_field(&mut rest, FIELD_IDENTIFIER)?)?;
        read_field(&mut rest, FIELD_END)?;
        let mut caveats = Vec::new();
        while rest.first() == Some(&(FIELD_IDENTIFIER as u8)) {
            caveats.push(text(read_field(&mut rest, FIELD_IDENTIFIER)?)?);
            read_field(&mut rest, FIELD_END)?;
        }
        read_field(&mut rest, FIELD_END)?;
        let signature = read_field(&mut rest, FIELD_SIGNATURE)?.try_into().ok()?;
        rest.is_empty().then_some(Self { location, identifier, caveats, signature })
    }
}

fn write_number(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn read_number(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0_u64;
    // Lengths of tokens fit into three groups of seven bits.
    for shift in [0, 7, 14] {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

fn read_field<'a>(bytes: &mut &'a [u8], kind: u64) -> Option<&'a [u8]> {
    if read_number(bytes)? != kind {
        return None;
    }
    if kind == FIELD_END {
        return Some(&[]);
    }
    let length = usize::try_from(read_number(bytes)?).ok()?;
    let (data, rest) = bytes.split_at_checked(length)?;
    *bytes = rest;
    Some(data)
}

/// RFC 3339 in UTC; none for times that cannot be written.
fn write_time(unix_seconds: i64) -> Option<String> {
    let seconds = u64::try_from(unix_seconds).ok().filter(|seconds| *seconds < 253_402_300_800)?;
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
    Some(humantime::format_rfc3339_seconds(time).to_string())
}

fn read_time(text: &str) -> Option<i64> {
    let time = humantime::parse_rfc3339(text).ok()?;
    i64::try_from(time.duration_since(std::time::UNIX_EPOCH).ok()?.as_secs()).ok()
}

/// Latest expiry that a token can carry, Unix seconds (the end of the year 9999).
pub const LATEST_EXPIRY: i64 = 253_402_300_799;

/// The key of one account. The salt is new with every account, so that the tokens of a deleted account stay
/// invalid when its name is used again.
pub fn account_key(root: &[u8], salt: &[u8]) -> Key {
    mac(&mac(root, b"account"), salt)
}

/// The key of all socket tokens.
pub fn socket_key(root: &[u8]) -> Key {
    mac(root, b"socket")
}

/// The key of everything about shares.
pub fn share_key(root: &[u8]) -> Key {
    mac(root, b"share")
}

/// Makes an API token. `expiry_at` in Unix seconds, at most [`LATEST_EXPIRY`]; none: never.
pub fn api_token(key: &Key, account: &str, expiry_at: Option<i64>) -> String {
    let caveats = expiry_at.and_then(write_time).into_iter().collect();
    Macaroon::make(API_LOCATION, account, caveats, key).to_text()
}

/// Checks the signature and expiry of an API token.
///
/// # Errors
/// Made with another key, changed, or over.
pub fn check_api_token(token: &Macaroon, key: &Key, now: i64) -> Result<(), TokenError> {
    token.verify(key)?;
    token.caveats.iter().try_for_each(|caveat| {
        let until = read_time(caveat).ok_or(TokenError::Condition)?;
        if now < until { Ok(()) } else { Err(TokenError::Expired(caveat.clone())) }
    })
}

/// What a socket token allows.
#[derive(Clone, Debug, PartialEq)]
pub struct SocketGrant {
    /// The only session.
    pub session_id: SessionId,
    /// The only generation.
    pub generation: u64,
    /// Unix seconds until which it may be used for the first time.
    pub expires_at: i64,
    /// Changes of the display that the join asked for.
    pub screen: Option<ScreenPatch>,
    /// Given to the page: the socket needs a matching `Origin`.
    pub page: bool,
}

impl SocketGrant {
    /// Makes the token of role `slave`.
    pub fn to_token(&self, key: &Key) -> String {
        let mut caveats = vec!["role = slave".to_owned(), format!("generation = {}", self.generation)];
        caveats.extend(write_time(self.expires_at).map(|time| format!("time < {time}")));
        if let Some(screen) = &self.screen {
            let screen = serde_json::to_string(screen).expect("numbers always serialise");
            caveats.push(format!("screen = {screen}"));
        }
        if self.page {
            caveats.push("page = true".to_owned());
        }
        Macaroon::make(SOCKET_LOCATION, self.session_id.as_str(), caveats, key).to_text()
    }

    /// Checks a socket token.
    ///
    /// # Errors
    /// Made with another key, changed, or over.
    pub fn check(token: &Macaroon, key: &Key, now: i64) -> Result<Self, TokenError> {
        if token.kind() != Some(Kind::Socket) {
            return Err(TokenError::Signature);
        }
        token.verify(key)?;
        let session_id = token.identifier.parse().map_err(|_| TokenError::Malformed)?;
        let mut grant = Self { session_id, generation: 0, expires_at: 0, screen: None, page: false };
        for caveat in &token.caveats {
            if let Some(generation) = caveat.strip_prefix("generation = ") {
                grant.generation = generation.parse().map_err(|_| TokenError::Condition)?;
            } else if let Some(time) = caveat.strip_prefix("time < ") {
                grant.expires_at = read_time(time).ok_or(TokenError::Condition)?;
                if now >= grant.expires_at {
                    return Err(TokenError::Expired(time.to_owned()));
                }
            } else if let Some(screen) = caveat.strip_prefix("screen = ") {
                grant.screen = Some(serde_json::from_str(screen).map_err(|_| TokenError::Condition)?);
            } else if caveat == "page = true" {
                grant.page = true;
            } else if caveat != "role = slave" {
                return Err(TokenError::Condition);
            }
        }
        Ok(grant)
    }
}

/// The token in the URL of a share. It is valid as long as the share is.
pub fn share_token(key: &Key, share: &ShareId) -> String {
    Macaroon::make(SHARE_LOCATION, share.as_str(), Vec::new(), key).to_text()
}

/// The share that a token opens.
///
/// # Errors
/// Made with another key, changed, or of another kind.
pub fn check_share_token(token: &Macaroon, key: &Key) -> Result<ShareId, TokenError> {
    if token.kind() != Some(Kind::Share) {
        return Err(TokenError::Signature);
    }
    token.verify(key)?;
    if !token.caveats.is_empty() {
        return Err(TokenError::Condition);
    }
    token.identifier.parse().map_err(|_| TokenError::Malformed)
}

/// What the socket token of a share allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShareGrant {
    /// Which share, and with it which session.
    pub share_id: ShareId,
    /// Counts the connections of the share: a later one takes over.
    pub connection: u64,
    /// Unix seconds until which it may be used.
    pub expires_at: i64,
}

impl ShareGrant {
    /// Makes the token.
    pub fn to_token(&self, key: &Key) -> String {
        let mut caveats = vec![format!("connection = {}", self.connection)];
        caveats.extend(write_time(self.expires_at).map(|time| format!("time < {time}")));
        Macaroon::make(ADB_LOCATION, self.share_id.as_str(), caveats, key).to_text()
    }

    /// Checks a token.
    ///
    /// # Errors
    /// Made with another key, changed, or over.
    pub fn check(token: &Macaroon, key: &Key, now: i64) -> Result<Self, TokenError> {
        if token.kind() != Some(Kind::Adb) {
            return Err(TokenError::Signature);
        }
        token.verify(key)?;
        let share_id = token.identifier.parse().map_err(|_| TokenError::Malformed)?;
        let [connection, time] = token.caveats.as_slice() else { return Err(TokenError::Condition) };
        let connection = connection.strip_prefix("connection = ").and_then(|text| text.parse().ok());
        let until = time.strip_prefix("time < ").and_then(read_time);
        let (Some(connection), Some(expires_at)) = (connection, until) else {
            return Err(TokenError::Condition);
        };
        if now >= expires_at {
            return Err(TokenError::Expired(time.trim_start_matches("time < ").to_owned()));
        }
        Ok(Self { share_id, connection, expires_at })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_800_000_000;

    #[test]
    fn the_published_example_has_the_form_that_we_read() {
        let key = account_key(b"root", b"salt");
        let token = api_token(&key, "asdf", Some(1_592_897_539));
        let bytes = URL_SAFE_NO_PAD.decode(&token).expect("base64url without padding");
        assert_eq!(bytes[..2], [2, 1]);
        assert_eq!(&bytes[3..23], b"anbox-stream-gateway");
        assert_eq!(&bytes[23..30], [2, 4, b'a', b's', b'd', b'f', 0]);
        let macaroon = Macaroon::parse(&token).expect("ours");
        assert_eq!(macaroon.identifier(), "asdf");
        assert_eq!(macaroon.caveats, ["2020-06-23T07:32:19Z"]);
    }

    #[test]
    fn the_chain_agrees_with_the_published_example_of_the_scheme() {
        // The tutorial of the macaroon libraries: location, identifier, key, one caveat, and their signatures.
        let location = "http://mybank/";
        let key = b"this is our super secret key; only we should know it";
        let plain = Macaroon::make(location, "we used our secret key", vec![], key);
        assert_eq!(
            hex::encode(plain.signature),
            "e3d9e02908526c4c0039ae15114115d97fdd68bf2ba379b342aaf0f617d0552f"
        );
        let limited =
            Macaroon::make(location, "we used our secret key", vec!["account = 3735928559".into()], key);
        assert_eq!(
            hex::encode(limited.signature),
            "1efe4763f290dbce0c1d08477367e11f4eee456a64933cf662d79772dbb82128"
        );
    }

    #[test]
    fn api_tokens_open_until_they_expire_and_never_with_another_key() {
        let key = account_key(b"root", b"salt");
        let check = |token: &str, key: &Key, now| check_api_token(&Macaroon::parse(token)?, key, now);
        let token = api_token(&key, "me", Some(NOW + 10));
        assert_eq!(check(&token, &key, NOW), Ok(()));
        assert_eq!(check(&format!("{token}=="), &key, NOW), Ok(()), "padding does no harm");
        assert!(matches!(check(&token, &key, NOW + 10), Err(TokenError::Expired(_))));
        assert_eq!(check(&api_token(&key, "me", None), &key, i64::MAX), Ok(()));
        for other in [account_key(b"root", b"other"), account_key(b"other", b"salt"), socket_key(b"root")] {
            assert_eq!(check(&token, &other, NOW), Err(TokenError::Signature));
        }
    }

    #[test]
    fn no_flipped_bit_and_no_cut_token_is_accepted() {
        let key = account_key(b"root", b"salt");
        let token = api_token(&key, "me", Some(NOW + 10));
        let bytes = URL_SAFE_NO_PAD.decode(&token).expect("ours");
        for position in 0..bytes.len() {
            for bit in 0..8 {
                let mut changed = bytes.clone();
                changed[position] ^= 1 << bit;
                if let Some(macaroon) = Macaroon::read(&changed) {
                    // The location is not signed in this scheme; changing it makes another kind of token.
                    let accepted =
                        macaroon.kind() == Some(Kind::Api) && check_api_token(&macaroon, &key, NOW).is_ok();
                    assert!(!accepted, "bit {bit} of byte {position}");
                }
            }
            assert_eq!(Macaroon::read(&bytes[..position]), None, "cut at {position}");
        }
        for bad in ["", "x", "!!!!", "Ag", &"A".repeat(10_000)] {
            assert_eq!(Macaroon::parse(bad), Err(TokenError::Malformed), "{bad:.20}");
        }
    }

    #[test]
    fn socket_tokens_carry_their_grant_and_expire() {
        let key = socket_key(b"root");
        let grant = SocketGrant {
            session_id: "s1".parse().expect("id"),
            generation: 7,
            expires_at: NOW + 600,
            screen: Some(ScreenPatch { width: Some(800), ..Default::default() }),
            page: true,
        };
        let token = Macaroon::parse(&grant.to_token(&key)).expect("ours");
        assert_eq!(SocketGrant::check(&token, &key, NOW), Ok(grant.clone()));
        assert!(matches!(SocketGrant::check(&token, &key, NOW + 600), Err(TokenError::Expired(_))));
        assert_eq!(SocketGrant::check(&token, &socket_key(b"other"), NOW), Err(TokenError::Signature));
        let api = Macaroon::parse(&api_token(&key, "s1", None)).expect("ours");
        assert_eq!(SocketGrant::check(&api, &key, NOW), Err(TokenError::Signature), "another kind");
        let strange = Macaroon::make(SOCKET_LOCATION, "s1", vec!["moon = full".into()], &key);
        assert_eq!(SocketGrant::check(&strange, &key, NOW), Err(TokenError::Condition));
    }

    #[test]
    fn tokens_of_shares_open_their_share_alone() {
        let key = share_key(b"root");
        let share_id: ShareId = "s1-x".parse().expect("id");
        let token = Macaroon::parse(&share_token(&key, &share_id)).expect("ours");
        assert_eq!(check_share_token(&token, &key), Ok(share_id.clone()));
        assert_eq!(check_share_token(&token, &share_key(b"other")), Err(TokenError::Signature));
        let grant = ShareGrant { share_id, connection: 3, expires_at: NOW + 60 };
        let socket = Macaroon::parse(&grant.to_token(&key)).expect("ours");
        assert_eq!(ShareGrant::check(&socket, &key, NOW), Ok(grant));
        assert!(matches!(ShareGrant::check(&socket, &key, NOW + 60), Err(TokenError::Expired(_))));
        assert_eq!(check_share_token(&socket, &key), Err(TokenError::Signature), "another kind");
        assert_eq!(ShareGrant::check(&token, &key, NOW), Err(TokenError::Signature), "another kind");
        let bare = Macaroon::make(ADB_LOCATION, "s1-x", vec![], &key);
        assert_eq!(ShareGrant::check(&bare, &key, NOW), Err(TokenError::Condition));
    }
}
