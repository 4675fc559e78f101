//! Who may call: accounts and their tokens, one-time codes and cookies of the page. All of it lives in the store;
//! codes and cookies only as hashes, tokens not at all.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use fanlight_api::{
    Secret, ShareId,
    gateway::{Account, AccountCreated, AccountRights, AccountsPost, LoginCode},
};
use fanlight_store::{Change, Compare, Handle, Op, StoreError, StoreExt as _, encode};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::token::{self, Kind, LATEST_EXPIRY, Macaroon, ShareGrant, SocketGrant, TokenError};

const ROOT_KEY: &str = "gateway/root-key";
const ACCOUNTS: &str = "gateway/accounts/";
const CODES: &str = "gateway/ui/codes/";
const COOKIES: &str = "gateway/ui/cookies/";
/// Account of the page: may launch, and see and end what it launched.
pub const PAGE_ACCOUNT: &str = "ui";
/// How long a record serves that was read. So long, at most, the token of an account goes on working that another unit
/// deleted.
const FRESH: Duration = Duration::from_secs(1);
/// Most records that are kept for that.
const MAX_READ: usize = 4096;
/// How long a one-time code can be used.
pub const CODE_TIME: Duration = Duration::from_secs(600);
/// How long a cookie can be used.
pub const COOKIE_TIME: Duration = Duration::from_secs(12 * 3600);
/// How long a socket token can be used for the first time, seconds.
pub const SOCKET_TOKEN_SECONDS: i64 = 600;

/// An authenticated caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Account; empty on the internal socket.
    pub account: String,
    /// What it may do.
    pub rights: AccountRights,
    /// How it proved itself.
    pub by: Proof,
}

/// How a caller proved itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proof {
    /// API token.
    Token,
    /// The page's cookie.
    Cookie,
    /// Access to the internal socket.
    Socket,
}

/// Why somebody was not let in, or an account could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum AccountError {
    /// The token itself.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// A valid token of another kind.
    #[error("this is a valid token of another kind: {0} is needed here")]
    WrongKind(&'static str),
    /// The account is gone, or was made anew since.
    #[error("the account of this token was deleted")]
    Deleted,
    /// The cookie is unknown or over.
    #[error("the login of this page is over; open a new link")]
    Cookie,
    /// The code is unknown, used, or over.
    #[error("the code was used already or is too old; open a new link")]
    Code,
    /// A name that cannot be used.
    #[error(
        "name {0:?} is invalid: 1 to 255 characters of A-Z a-z 0-9 - _ : . are allowed, and not {PAGE_ACCOUNT:?}"
    )]
    Name(String),
    /// A name in use.
    #[error("account {0:?} exists already; delete it first to make a new token")]
    Exists(String),
    /// A name not in use.
    #[error("there is no account {0:?}")]
    Missing(String),
    /// An expiry in the past or beyond what can be written.
    #[error("expiry_at is {0}: a Unix time in the future is needed, at most {LATEST_EXPIRY}")]
    Expiry(i64),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct RootKey {
    key: Secret,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct AccountRecord {
    #[serde(flatten)]
    account: Account,
    /// New with every account: older tokens of the same name stay invalid.
    salt: Secret,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Timed {
    expires_at: i64,
}

/// Accounts, codes and cookies.
pub struct Accounts {
    store: Handle,
    root: Vec<u8>,
    /// Records read within [`FRESH`], by key: most requests are of few callers.
    read: Mutex<HashMap<String, (Instant, AccountRecord)>>,
}

/// Texts with this many random bytes cannot be guessed.
fn random_text(bytes: usize) -> String {
    let mut buffer = vec![0; bytes];
    rand::RngCore::fill_bytes(&mut rand::rng(), &mut buffer);
    URL_SAFE_NO_PAD.encode(buffer)
}

fn hashed(prefix: &str, text: &Secret) -> String {
    format!("{prefix}{}", hex::encode(Sha256::digest(text.expose())))
}

impl Accounts {
    /// Opens them; the first unit makes the root key.
    ///
    /// # Errors
    /// The store cannot be used.
    pub async fn open(store: Handle) -> Result<Self, StoreError> {
        let fresh = RootKey { key: Secret::new(random_text(64)) };
        let record = store
            .update_json(ROOT_KEY, |known: Option<RootKey>| match known {
                Some(_) => Change::Keep,
                None => Change::Put(fresh.clone()),
            })
            .await?;
        let key = record.map_or(fresh.key, |record| record.value.key);
        let root = URL_SAFE_NO_PAD.decode(key.expose()).unwrap_or_else(|_| key.expose().as_bytes().to_vec());
        Ok(Self { store, root, read: Mutex::default() })
    }

    /// Makes an account and its token.
    ///
    /// `lifetime`: seconds that the token is valid when the request does not say; none: for ever.
    ///
    /// # Errors
    /// Name or expiry are not usable, or the name is in use.
    pub async fn create(
        &self,
        post: &AccountsPost,
        now: i64,
        lifetime: Option<i64>,
    ) -> Result<AccountCreated, AccountError> {
        if post.name.parse::<fanlight_api::AgentId>().is_err() || post.name == PAGE_ACCOUNT {
            return Err(AccountError::Name(post.name.chars().take(64).collect()));
        }
        if let Some(expiry) = post.expiry_at.filter(|expiry| *expiry <= now || *expiry > LATEST_EXPIRY) {
            return Err(AccountError::Expiry(expiry));
        }
        let expiry_at = post.expiry_at.or_else(|| Some(now.saturating_add(lifetime?).min(LATEST_EXPIRY)));
        let record = AccountRecord {
            account: Account { name: post.name.clone(), rights: post.rights, created_at: now, expiry_at },
            salt: Secret::new(random_text(32)),
        };
        let key = format!("{ACCOUNTS}{}", post.name);
        let put = Op::put(&key, encode(&key, &record)?);
        let made = self.store.transact(vec![Compare::absent(&key)], vec![put]).await;
        // One of an earlier account of this name, deleted by another unit.
        self.read().remove(&key);
        match made {
            Ok(_) => {}
            Err(StoreError::Conflict) => return Err(AccountError::Exists(post.name.clone())),
            Err(error) => return Err(error.into()),
        }
        let key = token::account_key(&self.root, record.salt.expose().as_bytes());
        let token = Secret::new(token::api_token(&key, &post.name, expiry_at));
        Ok(AccountCreated { name: post.name.clone(), token })
    }

    /// All accounts, by name.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn list(&self) -> Result<Vec<Account>, AccountError> {
        let records = self.store.list_json::<AccountRecord>(ACCOUNTS).await?;
        Ok(records.into_iter().map(|(_, record)| record.value.account).collect())
    }

    /// Deletes an account; its token stops working at once here, and within a second at the other units.
    ///
    /// # Errors
    /// There is none.
    pub async fn delete(&self, name: &str) -> Result<(), AccountError> {
        let key = format!("{ACCOUNTS}{name}");
        let Some(entry) = self.store.get(&key).await? else {
            return Err(AccountError::Missing(name.chars().take(64).collect()));
        };
        let compare = Compare::revision(&key, entry.revision);
        let deleted = self.store.transact(vec![compare], vec![Op::delete(&key)]).await;
        self.read().remove(&key);
        match deleted {
            Ok(_) | Err(StoreError::Conflict) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Who a token belongs to.
    ///
    /// # Errors
    /// It is not valid (any more), or of another kind.
    pub async fn authenticate(&self, token: &str, now: i64) -> Result<Caller, AccountError> {
        let macaroon = Macaroon::parse(token)?;
        match macaroon.kind() {
            Some(Kind::Api) => {}
            Some(Kind::Socket) => {
                macaroon.verify(&token::socket_key(&self.root))?;
                return Err(AccountError::WrongKind("an API token"));
            }
            Some(Kind::Share | Kind::Adb) => {
                macaroon.verify(&token::share_key(&self.root))?;
                return Err(AccountError::WrongKind("an API token"));
            }
            None => return Err(TokenError::Signature.into()),
        }
        let key = format!("{ACCOUNTS}{}", macaroon.identifier());
        let Some(record) = self.record(key).await? else {
            return Err(AccountError::Deleted);
        };
        let account_key = token::account_key(&self.root, record.salt.expose().as_bytes());
        token::check_api_token(&macaroon, &account_key, now)?;
        let Account { name, rights, .. } = record.account;
        Ok(Caller { account: name, rights, by: Proof::Token })
    }

    fn read(&self) -> MutexGuard<'_, HashMap<String, (Instant, AccountRecord)>> {
        self.read.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The record of an account, at most [`FRESH`] old.
    async fn record(&self, key: String) -> Result<Option<AccountRecord>, StoreError> {
        let known =
            self.read().get(&key).filter(|(at, _)| at.elapsed() < FRESH).map(|(_, known)| known.clone());
        if known.is_some() {
            return Ok(known);
        }
        // From before the reading: what is deleted meanwhile is not known for longer.
        let at = Instant::now();
        let record = self.store.get_json::<AccountRecord>(&key).await?.map(|record| record.value);
        let mut read = self.read();
        if read.len() >= MAX_READ {
            read.clear();
        }
        match &record {
            Some(record) => drop(read.insert(key, (at, record.clone()))),
            None => drop(read.remove(&key)),
        }
        Ok(record)
    }

    /// Makes a socket token.
    pub fn grant(&self, grant: &SocketGrant) -> String {
        grant.to_token(&token::socket_key(&self.root))
    }

    /// What a socket token allows.
    ///
    /// # Errors
    /// It is not valid (any more), or of another kind.
    pub async fn check_socket(&self, token: &str, now: i64) -> Result<SocketGrant, AccountError> {
        let macaroon = self.of_kind(token, Kind::Socket, "a socket token", now).await?;
        Ok(SocketGrant::check(&macaroon, &token::socket_key(&self.root), now)?)
    }

    /// A token that says it is of a kind; its signature was not looked at.
    async fn of_kind(
        &self,
        token: &str,
        kind: Kind,
        needed: &'static str,
        now: i64,
    ) -> Result<Macaroon, AccountError> {
        let macaroon = Macaroon::parse(token)?;
        match macaroon.kind() {
            Some(given) if given == kind => return Ok(macaroon),
            // Whether it is one of ours at all: only then it is of the wrong kind.
            Some(Kind::Api) => drop(self.authenticate(token, now).await?),
            Some(Kind::Socket) => macaroon.verify(&token::socket_key(&self.root))?,
            Some(Kind::Share | Kind::Adb) => macaroon.verify(&token::share_key(&self.root))?,
            None => return Err(TokenError::Signature.into()),
        }
        Err(AccountError::WrongKind(needed))
    }

    /// The token in the URL of a share.
    pub fn share_token(&self, share: &ShareId) -> Secret {
        Secret::new(token::share_token(&token::share_key(&self.root), share))
    }

    /// The share that a token opens.
    ///
    /// # Errors
    /// It is not valid, or of another kind.
    pub async fn check_share(&self, token: &str, now: i64) -> Result<ShareId, AccountError> {
        let macaroon = self.of_kind(token, Kind::Share, "the token of a share", now).await?;
        Ok(token::check_share_token(&macaroon, &token::share_key(&self.root))?)
    }

    /// The token of a socket that a share is exchanged for.
    pub fn grant_share(&self, grant: &ShareGrant) -> Secret {
        Secret::new(grant.to_token(&token::share_key(&self.root)))
    }

    /// What the socket token of a share allows.
    ///
    /// # Errors
    /// It is not valid (any more), or of another kind.
    pub async fn check_share_socket(&self, token: &str, now: i64) -> Result<ShareGrant, AccountError> {
        let macaroon = self.of_kind(token, Kind::Adb, "a socket token of a share", now).await?;
        Ok(ShareGrant::check(&macaroon, &token::share_key(&self.root), now)?)
    }

    async fn remember(&self, prefix: &str, time: Duration, now: i64) -> Result<(Secret, i64), AccountError> {
        let text = Secret::new(random_text(32));
        let expires_at = now + time.as_secs() as i64;
        let lease = self.store.grant(time).await?;
        let key = hashed(prefix, &text);
        let value = encode(&key, &Timed { expires_at })?;
        self.store.transact(vec![], vec![Op::put_leased(key, value, lease)]).await?;
        Ok((text, expires_at))
    }

    async fn recall(&self, prefix: &str, text: &Secret, now: i64) -> Result<Option<i64>, AccountError> {
        let record = self.store.get_json::<Timed>(&hashed(prefix, text)).await?;
        Ok(record.map(|record| record.value.expires_at).filter(|expires_at| now < *expires_at))
    }

    /// Makes a one-time code for the page.
    ///
    /// # Errors
    /// The store cannot be written.
    pub async fn login_code(&self, now: i64) -> Result<LoginCode, AccountError> {
        let (code, expires_at) = self.remember(CODES, CODE_TIME, now).await?;
        Ok(LoginCode { code, expires_at })
    }

    /// Exchanges a one-time code for a cookie and its expiry.
    ///
    /// # Errors
    /// The code is unknown, used, or over.
    pub async fn login(&self, code: &Secret, now: i64) -> Result<(Secret, i64), AccountError> {
        let key = hashed(CODES, code);
        let Some(record) = self.store.get_json::<Timed>(&key).await? else { return Err(AccountError::Code) };
        // Whoever removes the code has used it: two at once cannot both.
        match self
            .store
            .transact(vec![Compare::revision(&key, record.revision)], vec![Op::delete(&key)])
            .await
        {
            Ok(_) => {}
            Err(StoreError::Conflict) => return Err(AccountError::Code),
            Err(error) => return Err(error.into()),
        }
        if now >= record.value.expires_at {
            return Err(AccountError::Code);
        }
        self.remember(COOKIES, COOKIE_TIME, now).await
    }

    /// Who a cookie belongs to, and until when.
    ///
    /// # Errors
    /// It is unknown or over.
    pub async fn cookie(&self, cookie: &Secret, now: i64) -> Result<(Caller, i64), AccountError> {
        let expires_at = self.recall(COOKIES, cookie, now).await?.ok_or(AccountError::Cookie)?;
        let caller =
            Caller { account: PAGE_ACCOUNT.into(), rights: AccountRights::Launch, by: Proof::Cookie };
        Ok((caller, expires_at))
    }

    /// Makes a cookie invalid.
    ///
    /// # Errors
    /// The store cannot be written.
    pub async fn logout(&self, cookie: &Secret) -> Result<(), AccountError> {
        self.store.transact(vec![], vec![Op::delete(hashed(COOKIES, cookie))]).await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use fanlight_store::Embedded;

    use super::*;

    const NOW: i64 = 1_800_000_000;

    async fn accounts() -> Accounts {
        Accounts::open(Arc::new(Embedded::memory())).await.expect("opens")
    }

    fn post(name: &str) -> AccountsPost {
        AccountsPost { name: name.into(), expiry_at: None, rights: AccountRights::Full }
    }

    #[tokio::test]
    async fn tokens_work_until_their_account_is_deleted_also_when_its_name_is_used_again() {
        let accounts = accounts().await;
        let created = accounts.create(&post("me"), NOW, None).await.expect("made");
        let caller = accounts.authenticate(created.token.expose(), NOW).await.expect("valid");
        assert_eq!((caller.account.as_str(), caller.by), ("me", Proof::Token));
        assert!(matches!(accounts.create(&post("me"), NOW, None).await, Err(AccountError::Exists(_))));
        accounts.delete("me").await.expect("there");
        let refused = accounts.authenticate(created.token.expose(), NOW).await;
        assert!(matches!(refused, Err(AccountError::Deleted)), "{refused:?}");
        accounts.create(&post("me"), NOW, None).await.expect("made again");
        let refused = accounts.authenticate(created.token.expose(), NOW).await;
        assert!(matches!(refused, Err(AccountError::Token(TokenError::Signature))), "{refused:?}");
        assert!(matches!(accounts.delete("you").await, Err(AccountError::Missing(_))));
        for bad in ["", "a b", "a/b", PAGE_ACCOUNT, &"x".repeat(256)] {
            assert!(
                matches!(accounts.create(&post(bad), NOW, None).await, Err(AccountError::Name(_))),
                "{bad}"
            );
        }
        let late = AccountsPost { expiry_at: Some(NOW), ..post("late") };
        assert!(matches!(accounts.create(&late, NOW, None).await, Err(AccountError::Expiry(_))));
    }

    #[tokio::test]
    async fn an_account_that_another_unit_deleted_is_known_for_a_second_at_most() {
        let store: Handle = Arc::new(Embedded::memory());
        let (here, there) = (Accounts::open(store.clone()).await, Accounts::open(store).await);
        let (here, there) = (here.expect("opens"), there.expect("opens"));
        let token = here.create(&post("me"), NOW, None).await.expect("made").token;
        assert!(there.authenticate(token.expose(), NOW).await.is_ok());
        here.delete("me").await.expect("there");
        assert!(matches!(here.authenticate(token.expose(), NOW).await, Err(AccountError::Deleted)));
        let deleted = Instant::now();
        while there.authenticate(token.expose(), NOW).await.is_ok() {
            assert!(deleted.elapsed() < 3 * FRESH, "the token works on");
            tokio::time::sleep(FRESH / 10).await;
        }
        here.create(&post("me"), NOW, None).await.expect("made again");
        assert!(there.authenticate(token.expose(), NOW).await.is_err(), "another account of this name");
    }

    #[tokio::test]
    async fn the_root_key_stays_and_another_store_has_another() {
        let store: Handle = Arc::new(Embedded::memory());
        let first = Accounts::open(store.clone()).await.expect("opens");
        let token = first.create(&post("me"), NOW, None).await.expect("made").token;
        let again = Accounts::open(store).await.expect("opens");
        assert!(again.authenticate(token.expose(), NOW).await.is_ok());
        let other = accounts().await;
        other.create(&post("me"), NOW, None).await.expect("made");
        assert!(other.authenticate(token.expose(), NOW).await.is_err());
    }

    #[tokio::test]
    async fn each_kind_of_token_opens_its_own_door_only() {
        let accounts = accounts().await;
        let api = accounts.create(&post("me"), NOW, None).await.expect("made").token;
        let grant = SocketGrant {
            session_id: "s1".parse().expect("id"),
            generation: 1,
            expires_at: NOW + SOCKET_TOKEN_SECONDS,
            screen: None,
            page: false,
        };
        let socket = accounts.grant(&grant);
        assert_eq!(accounts.check_socket(&socket, NOW).await.expect("valid"), grant);
        assert!(matches!(accounts.authenticate(&socket, NOW).await, Err(AccountError::WrongKind(_))));
        assert!(matches!(accounts.check_socket(api.expose(), NOW).await, Err(AccountError::WrongKind(_))));
        assert!(matches!(accounts.check_socket("x", NOW).await, Err(AccountError::Token(_))));
    }

    #[tokio::test]
    async fn a_code_gives_one_cookie_and_the_cookie_ends() {
        let accounts = accounts().await;
        let code = accounts.login_code(NOW).await.expect("made").code;
        let (cookie, expires_at) = accounts.login(&code, NOW).await.expect("first use");
        assert!(matches!(accounts.login(&code, NOW).await, Err(AccountError::Code)));
        let (caller, _) = accounts.cookie(&cookie, NOW).await.expect("valid");
        assert_eq!(caller.rights, AccountRights::Launch);
        assert!(matches!(accounts.cookie(&cookie, expires_at).await, Err(AccountError::Cookie)));
        accounts.logout(&cookie).await.expect("written");
        assert!(matches!(accounts.cookie(&cookie, NOW).await, Err(AccountError::Cookie)));
        let old = accounts.login_code(NOW).await.expect("made").code;
        let late = NOW + CODE_TIME.as_secs() as i64;
        assert!(matches!(accounts.login(&old, late).await, Err(AccountError::Code)));
        assert!(matches!(accounts.login(&Secret::new("x"), NOW).await, Err(AccountError::Code)));
    }
}
