//! Who may call and what they may do: certificates and their authorities, identities and groups, tokens of a provider,
//! and rights per object.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use axum::{Router, routing::get};
use base64::{
    Engine as _,
    prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD},
};
use fanlight_ams::engine::Script;
use fanlight_client::{AmsClient, Endpoint, Trust};
use fanlight_store::{Embedded, Handle, StoreExt as _};
use futures_util::StreamExt as _;
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode, jwk::Jwk};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use serde_json::{Value, json};

use crate::{
    api::Stack,
    stack::{PATIENCE, until},
};

/// A certificate with its key.
pub struct Card {
    certificate: rcgen::Certificate,
    key: KeyPair,
}

impl Card {
    fn made(name: &str, change: impl FnOnce(&mut CertificateParams)) -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.distinguished_name.push(DnType::CommonName, name);
        change(&mut params);
        let certificate = params.self_signed(&key).expect("signed");
        Self { certificate, key }
    }

    /// Signed by itself.
    pub fn new(name: &str) -> Self {
        Self::made(name, |_| {})
    }

    fn base64(&self) -> String {
        BASE64_STANDARD.encode(self.certificate.der())
    }

    fn fingerprint(&self) -> String {
        fanlight_service::tls::fingerprint(self.certificate.der())
    }
}

/// An authority with a certificate that it signed.
fn authority() -> (Card, Card) {
    let params = || {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.distinguished_name.push(DnType::CommonName, "authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
    };
    let ca_key = KeyPair::generate().expect("a key");
    let ca = params().self_signed(&ca_key).expect("signed");
    let issuer = Issuer::new(params(), &ca_key);
    let key = KeyPair::generate().expect("a key");
    let certificate = CertificateParams::new(vec!["employee".into()])
        .expect("a name")
        .signed_by(&key, &issuer)
        .expect("signed");
    (Card { certificate: ca, key: ca_key }, Card { certificate, key })
}

/// Somebody who calls over HTTPS.
#[derive(Clone)]
pub struct Http {
    client: reqwest::Client,
    base: String,
    token: Option<String>,
}

/// Status, body and headers.
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// Envelope, where it is one.
    pub body: Value,
    /// The body as text.
    pub text: String,
    /// Headers.
    pub headers: reqwest::header::HeaderMap,
}

impl Answer {
    /// The result.
    pub fn metadata(&self) -> &Value {
        assert_eq!(self.status / 100, 2, "{}", self.text);
        &self.body["metadata"]
    }

    /// The object that an operation was about.
    pub fn resource(&self, kind: &str) -> String {
        assert_eq!(self.status, 202, "{}", self.text);
        assert_eq!(self.metadata()["status_code"], 200, "{}", self.text);
        self.metadata()["resources"][kind][0].as_str().expect("a URL").to_owned()
    }
}

impl Http {
    /// With a certificate, or as nobody.
    pub fn new(stack: &Stack, card: Option<&Card>) -> Self {
        // Which server this is was checked by other tests.
        let mut builder = reqwest::Client::builder().no_proxy().tls_danger_accept_invalid_certs(true);
        if let Some(card) = card {
            let pem = format!("{}{}", card.certificate.pem(), card.key.serialize_pem());
            builder = builder.identity(reqwest::Identity::from_pem(pem.as_bytes()).expect("a certificate"));
        }
        let client = builder.build().expect("a client");
        Self { client, base: format!("https://{}", stack.running.address()), token: None }
    }

    fn bearing(&self, token: &str) -> Self {
        Self { token: Some(token.to_owned()), ..self.clone() }
    }

    /// A request with a header more.
    pub async fn send(&self, method: &str, path: &str, body: Value, header: Option<(&str, &str)>) -> Answer {
        let method = reqwest::Method::from_bytes(method.as_bytes()).expect("a method");
        let mut request = self.client.request(method, format!("{}{path}", self.base));
        if !body.is_null() {
            request = request.body(body.to_string());
        }
        if let Some(token) = &self.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        if let Some((name, value)) = header {
            request = request.header(name, value);
        }
        let response = request.send().await.expect("answered");
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let text = response.text().await.expect("a body");
        let body = serde_json::from_str(&text).unwrap_or_default();
        Answer { status, body, text, headers }
    }

    /// A request.
    pub async fn call(&self, method: &str, path: &str, body: Value) -> Answer {
        self.send(method, path, body, None).await
    }

    /// A request without a body.
    pub async fn get(&self, path: &str) -> Answer {
        self.call("GET", path, Value::Null).await
    }

    async fn status(&self, method: &str, path: &str, body: Value) -> u16 {
        self.call(method, path, body).await.status
    }
}

fn permission(entitlement: &str, resource: &str) -> Value {
    json!({"entitlement": entitlement, "resource": resource})
}

/// AMS with an administrator whom it knows by a certificate of the trust store.
pub async fn with_admin() -> (Stack, Http) {
    let stack = Stack::start(Script::Run, |_| {}).await;
    let card = Card::new("admin");
    let post = fanlight_api::ams::CertificatesPost { certificate: card.base64(), ..Default::default() };
    stack.client.add_certificate(&post).await.expect("trusted");
    let admin = Http::new(&stack, Some(&card));
    (stack, admin)
}

/// An identity of a certificate, in these groups.
async fn identity(stack: &Stack, admin: &Http, name: &str, groups: &[&str]) -> (String, Http) {
    let card = Card::new(name);
    let post = json!({"authentication_method": "tls", "name": name, "certificate": card.base64()});
    let url = admin.call("POST", "/1.0/auth/identities", post).await.resource("identities");
    let put = admin.call("PUT", &url, json!({"groups": groups})).await;
    assert_eq!(put.resource("identities"), url);
    (url.rsplit('/').next().expect("an id").to_owned(), Http::new(stack, Some(&card)))
}

async fn set(admin: &Http, name: &str, value: &str) {
    let answer = admin.call("PATCH", "/1.0/config", json!({"name": name, "value": value})).await;
    assert_eq!(answer.status, 202, "{}", answer.text);
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_tls_identities_and_an_authority_vouches_for_what_it_signed() {
    let (stack, admin) = with_admin().await;
    let (ca, employee) = authority();
    let worker = Http::new(&stack, Some(&employee));
    assert_eq!(worker.status("GET", "/1.0/instances", Value::Null).await, 403);
    let url = admin
        .call("POST", "/1.0/certificates", json!({"certificate": ca.base64()}))
        .await
        .resource("certificates");
    assert_eq!(url, format!("/1.0/certificates/{}", ca.fingerprint()));
    assert_eq!(worker.get("/1.0").await.metadata()["auth"], "trusted");
    assert_eq!(worker.status("GET", "/1.0/instances", Value::Null).await, 200);

    // Both views show the same.
    let list = admin.get("/1.0/auth/identities?recursion=1&auth_type=tls").await;
    assert_eq!(list.body["total_size"], 2);
    let of_ca = list.metadata().as_array().expect("a list").iter();
    let of_ca = of_ca.clone().find(|one| one["fingerprint"] == ca.fingerprint()).expect("the authority");
    assert_eq!((&of_ca["groups"], &of_ca["name"]), (&json!(["admin"]), &json!("authority")));
    let id = of_ca["id"].as_str().expect("an id");
    assert_eq!(id.len(), 20);
    let shown = admin.get(&url).await;
    assert!(shown.headers.contains_key("etag"));
    assert_eq!(shown.metadata()["certificate"], ca.base64());
    let again = admin.call("POST", "/1.0/certificates", json!({"certificate": ca.base64()})).await;
    assert_eq!((again.status, again.body["error"].as_str()), (409, Some("certificate already exists")));

    // Taken away in one view, it is gone in the other, and so is whom it vouched for.
    assert_eq!(admin.status("DELETE", &format!("/1.0/auth/identities/{id}"), Value::Null).await, 400);
    let forced = json!({"force": true});
    assert_eq!(admin.status("DELETE", &format!("/1.0/auth/identities/{id}"), forced).await, 202);
    assert_eq!(admin.status("GET", &url, Value::Null).await, 404);
    assert_eq!(worker.status("GET", "/1.0/instances", Value::Null).await, 403);

    // One that is over is not accepted, though it is known.
    let old = Card::made("old", |params| {
        params.not_before = rcgen::date_time_ymd(2001, 1, 1);
        params.not_after = rcgen::date_time_ymd(2002, 1, 1);
    });
    admin
        .call("POST", "/1.0/certificates", json!({"certificate": old.base64()}))
        .await
        .resource("certificates");
    let late = Http::new(&stack, Some(&old));
    assert_eq!(late.status("GET", "/1.0/instances", Value::Null).await, 403);
    stack.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn identities_and_groups_are_made_changed_and_deleted() {
    let (stack, admin) = with_admin().await;
    for (post, status, part) in [
        (json!({}), 400, "authentication_method is required"),
        (json!({"authentication_method": "magic"}), 400, "neither tls nor oidc"),
        (json!({"authentication_method": "tls"}), 400, "certificate is required"),
        (json!({"authentication_method": "tls", "certificate": "rubbish"}), 400, "certificate is invalid"),
        (json!({"authentication_method": "oidc"}), 400, "email is required"),
        (json!({"authentication_method": "oidc", "email": "nobody"}), 400, "no e-mail address"),
        (json!({"authentication_method": "oidc", "email": "A.B@example.com"}), 202, ""),
        (
            json!({"authentication_method": "oidc", "email": "a.b@EXAMPLE.com"}),
            409,
            "identity already exists",
        ),
    ] {
        let answer = admin.call("POST", "/1.0/auth/identities", post).await;
        assert_eq!(answer.status, status, "{}", answer.text);
        assert!(answer.text.contains(part), "{part}: {}", answer.text);
    }
    let list = admin.get("/1.0/auth/identities?auth_type=oidc").await;
    let url = list.metadata()[0].as_str().expect("a URL").to_owned();
    assert_eq!(list.body["total_size"], 1);
    assert_eq!(admin.get(&url).await.metadata()["email"], "a.b@example.com");
    let page = admin.get("/1.0/auth/identities?offset=1&limit=1").await;
    assert_eq!((page.metadata(), &page.body["total_size"]), (&json!([url]), &json!(2)));

    for (post, status) in [
        (json!({"name": "viewers", "description": "They look."}), 202),
        (json!({"name": "viewers"}), 409),
        (json!({"name": "admin"}), 409),
        (json!({"name": ""}), 400),
        (json!({"name": "a/b"}), 400),
    ] {
        assert_eq!(admin.status("POST", "/1.0/auth/groups", post.clone()).await, status, "{post}");
    }
    let found = admin.get("/1.0/auth/groups?name=VIEW&recursion=1&entitlements=1").await;
    assert_eq!(found.metadata().as_array().map(Vec::len), Some(1));
    assert_eq!(found.metadata()[0]["entitlements"], json!(["can_view", "can_edit", "can_delete"]));
    let builtin = admin.get("/1.0/auth/groups/admin").await;
    assert_eq!(builtin.metadata()["immutable"], true);
    assert_eq!(builtin.metadata()["description"], "Administrators");
    assert_eq!(builtin.metadata()["identities"].as_array().map(Vec::len), Some(1));
    for method in ["PUT", "DELETE"] {
        assert_eq!(admin.status(method, "/1.0/auth/groups/admin", json!({"force": true})).await, 400);
    }

    let group = "/1.0/auth/groups/viewers";
    let before = admin.get(group).await;
    let etag = before.headers["etag"].to_str().expect("text").to_owned();
    let wanted = json!({"permissions": [permission("can_view", "instance:*")]});
    let changed = admin.send("PUT", group, wanted, Some(("if-match", &etag))).await;
    assert_eq!(changed.resource("groups"), group);
    let late = admin.send("PUT", group, json!({"description": "x"}), Some(("if-match", &etag))).await;
    assert_eq!(late.status, 412, "{}", late.text);
    let shown = admin.get(group).await;
    assert_eq!(shown.metadata()["description"], "They look.", "what is absent stays");
    assert_eq!(shown.metadata()["permissions"], json!([permission("can_view", "instance:*")]));
    let wrong = json!({"permissions": [permission("can_fly", "instance:*")]});
    assert_eq!(admin.status("PUT", group, wrong).await, 400);
    assert_eq!(admin.status("PUT", "/1.0/auth/groups/none", json!({})).await, 404);

    // Membership, and what is in use is not deleted by accident.
    assert_eq!(admin.status("PUT", &url, json!({"groups": ["none"]})).await, 404);
    assert_eq!(admin.status("PUT", &url, json!({"groups": ["viewers"]})).await, 202);
    let id = url.rsplit('/').next().expect("an id");
    assert_eq!(admin.get(group).await.metadata()["identities"], json!([id]));
    assert_eq!(admin.status("DELETE", &url, Value::Null).await, 400);
    assert_eq!(admin.status("DELETE", group, Value::Null).await, 400);
    assert_eq!(admin.status("DELETE", group, json!({"force": true})).await, 202);
    assert_eq!(admin.get(&url).await.metadata()["groups"], json!([]), "it is in no group any more");
    assert_eq!(admin.status("DELETE", &url, Value::Null).await, 202);
    assert_eq!(admin.status("GET", &url, Value::Null).await, 404);
    stack.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_fine_grained_rights_only_administrators_may_act() {
    let (stack, admin) = with_admin().await;
    admin.call("POST", "/1.0/auth/groups", json!({"name": "viewers"})).await.resource("groups");
    let all = json!({"permissions": [permission("can_view", "instance:*")]});
    assert_eq!(admin.status("PUT", "/1.0/auth/groups/viewers", all).await, 202);
    let (_, viewer) = identity(&stack, &admin, "viewer", &["viewers"]).await;
    assert_eq!(viewer.get("/1.0").await.metadata()["auth"], "trusted");
    assert_eq!(viewer.get("/1.0/auth/permissions").await.metadata(), &json!([]));
    for path in
        ["/1.0/instances", "/1.0/operations", "/1.0/config", "/1.0/metrics", "/1.0/tasks", "/1.0/nodes"]
    {
        let answer = viewer.get(path).await;
        assert_eq!(answer.status, 403, "{path}");
        assert!(answer.text.contains("Not Authorized"), "{}", answer.text);
        assert_eq!(admin.status("GET", path, Value::Null).await, 200, "{path}");
    }
    assert_eq!(admin.get("/1.0/auth/permissions").await.metadata(), &json!([permission("admin", "server")]));
    set(&admin, "auth.mode", "fine-grained").await;
    assert_eq!(viewer.status("GET", "/1.0/instances", Value::Null).await, 200);
    assert_eq!(viewer.status("GET", "/1.0/config", Value::Null).await, 403);
    assert_eq!(
        viewer.get("/1.0/auth/permissions").await.metadata(),
        &json!([permission("can_view", "instance:*")])
    );
    stack.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fine_grained_rights_are_checked_per_object_in_lists_operations_and_events() {
    let (stack, admin) = with_admin().await;
    set(&admin, "auth.mode", "fine-grained").await;
    stack.application().await;
    let (one, two) = (stack.launch().await, stack.launch().await);
    admin.call("POST", "/1.0/auth/groups", json!({"name": "team"})).await.resource("groups");
    let held = json!({"permissions": [
        permission("can_view", &format!("instance:{one}")),
        permission("can_edit", &format!("instance:{one}")),
        permission("can_create_groups", "server"),
        permission("can_view", "group:*"),
        permission("can_edit", "group:*"),
        permission("can_view_tasks", "server"),
    ]});
    assert_eq!(admin.status("PUT", "/1.0/auth/groups/team", held).await, 202);
    let (id, member) = identity(&stack, &admin, "member", &["team"]).await;

    // Lists show what may be seen, and count only that.
    let list = member.get("/1.0/instances?recursion=1&entitlements=1").await;
    assert_eq!(list.body["total_size"], 1);
    assert_eq!(list.metadata()[0]["id"], one);
    assert_eq!(list.metadata()[0]["entitlements"], json!(["can_view", "can_edit"]));
    assert_eq!(member.get("/1.0/applications").await.metadata(), &json!([]));

    // Objects, by id and by name; what is not there is not found, whoever asks.
    let name = stack.client.instance(&one).await.expect("there").name;
    let other = stack.client.instance(&two).await.expect("there").name;
    for (method, path, body, status) in [
        ("GET", format!("/1.0/instances/{one}"), Value::Null, 200),
        ("GET", format!("/1.0/instances/{name}"), Value::Null, 200),
        ("GET", format!("/1.0/instances/{two}"), Value::Null, 403),
        ("GET", format!("/1.0/instances/{other}"), Value::Null, 403),
        ("GET", format!("/1.0/instances/{one}/logs"), Value::Null, 403),
        ("DELETE", format!("/1.0/instances/{one}"), Value::Null, 403),
        ("DELETE", "/1.0/instances/none".into(), Value::Null, 404),
        ("DELETE", "/1.0/instances".into(), json!({"ids": [one]}), 403),
        ("POST", "/1.0/instances".into(), json!({"app_id": "terminal"}), 403),
        ("PATCH", format!("/1.0/instances/{two}"), json!({"desired_status": "stopped"}), 403),
        ("GET", "/1.0/certificates".into(), Value::Null, 403),
        ("GET", "/1.0/config".into(), Value::Null, 403),
        ("GET", "/1.0/tasks".into(), Value::Null, 200),
        ("GET", "/1.0/nodes/local".into(), Value::Null, 403),
        ("GET", format!("/1.0/auth/identities/{id}"), Value::Null, 403),
        ("GET", "/1.0/auth/groups/team".into(), Value::Null, 200),
    ] {
        let answer = member.call(method, &path, body).await;
        assert_eq!(answer.status, status, "{method} {path} {}", answer.text);
    }

    // Nobody hands on more than they have.
    member.call("POST", "/1.0/auth/groups", json!({"name": "mine"})).await;
    for (wanted, status) in [
        (permission("can_view", &format!("instance:{one}")), 202),
        (permission("can_view", &format!("instance:{two}")), 403),
        (permission("admin", "server"), 403),
    ] {
        let put = json!({"permissions": [wanted]});
        assert_eq!(member.status("PUT", "/1.0/auth/groups/mine", put).await, status, "{wanted}");
    }

    // Events and operations of one instance are heard, those of the other are not.
    let token = member.call("POST", "/1.0/events/auth", Value::Null).await.metadata()["token"].clone();
    let path = format!("/1.0/events?token={}", token.as_str().expect("a token"));
    let nobody = nobody(&stack);
    let mut socket = nobody.endpoint().websocket(&path, Default::default()).await.expect("open");
    let stop = json!({"desired_status": "stopped"});
    let hidden = admin.call("PATCH", &format!("/1.0/instances/{two}"), stop.clone()).await;
    let seen = member.call("PATCH", &format!("/1.0/instances/{one}"), stop).await;
    let operation = |answer: &Answer| answer.metadata()["id"].as_str().expect("an id").to_owned();
    let (hidden, seen) = (operation(&hidden), operation(&seen));
    assert_eq!(member.status("GET", &format!("/1.0/operations/{hidden}"), Value::Null).await, 404);
    assert_eq!(member.status("GET", &format!("/1.0/operations/{seen}/wait"), Value::Null).await, 200);
    let map = member.get("/1.0/operations").await;
    assert!(map.text.contains(&seen) && !map.text.contains(&hidden), "{}", map.text);
    assert_eq!(admin.status("GET", &format!("/1.0/operations/{hidden}/wait"), Value::Null).await, 200);
    let mut heard = String::new();
    while !heard.contains("instance-stopped") {
        let message = tokio::time::timeout(PATIENCE, socket.next()).await.expect("in time");
        heard.push_str(&message.expect("open").expect("a frame").into_text().expect("text"));
    }
    assert!(heard.contains(&one) && !heard.contains(&two), "{heard}");

    // Who is locked out hears nothing more, and learns why.
    let forced = json!({"force": true});
    assert_eq!(admin.status("DELETE", &format!("/1.0/auth/identities/{id}"), forced).await, 202);
    assert_eq!(member.status("GET", "/1.0/instances", Value::Null).await, 403);
    admin.call("PATCH", &format!("/1.0/instances/{one}"), json!({"desired_status": "running"})).await;
    let end = async {
        while let Some(Ok(message)) = socket.next().await {
            if message.is_close() {
                return message.to_string();
            }
        }
        String::new()
    };
    let end = tokio::time::timeout(PATIENCE, end).await.expect("closed");
    assert!(end.contains("identity was removed"), "{end}");
    assert!(
        nobody.endpoint().websocket(&path, Default::default()).await.is_err(),
        "the token is of no use now"
    );
    stack.running.stop().await;
}

fn nobody(stack: &Stack) -> AmsClient {
    let url = format!("https://{}", stack.running.address());
    let trust = Trust::Pinned(stack.running.fingerprint.clone());
    AmsClient::new(Endpoint::http(&url, &trust, None).expect("valid"))
}

/// A provider on this machine with a key of each kind.
struct Provider {
    issuer: String,
    keys: Vec<(Algorithm, String, EncodingKey)>,
    asked: Arc<AtomicUsize>,
    server: tokio::task::JoinHandle<()>,
}

impl Provider {
    async fn start() -> Self {
        let rsa =
            KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, rcgen::RsaKeySize::_2048).expect("a key");
        let ec = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).expect("a key");
        let ed = KeyPair::generate_for(&rcgen::PKCS_ED25519).expect("a key");
        let keys = vec![
            // The library wants the inner form of an RSA key: what follows the header of 26 bytes.
            (Algorithm::RS256, "r".to_owned(), EncodingKey::from_rsa_der(&rsa.serialize_der()[26..])),
            (Algorithm::ES256, "e".to_owned(), EncodingKey::from_ec_der(&ec.serialize_der())),
            (Algorithm::EdDSA, "d".to_owned(), EncodingKey::from_ed_der(&ed.serialize_der())),
        ];
        // The library makes no public form of an Ed25519 key that has its public half beside it.
        let x = BASE64_URL_SAFE_NO_PAD.encode(ed.public_key_raw());
        let of_ed = json!({"kty": "OKP", "crv": "Ed25519", "alg": "EdDSA", "use": "sig", "kid": "d", "x": x});
        let public: Vec<Value> = keys
            .iter()
            .take(2)
            .map(|(algorithm, id, key)| {
                let mut jwk = Jwk::from_encoding_key(key, *algorithm).expect("a key");
                jwk.common.key_id = Some(id.clone());
                serde_json::to_value(jwk).expect("JSON")
            })
            .chain([of_ed])
            // Keys of kinds that are not known here do no harm.
            .chain([json!({"kty": "future", "kid": "f"})])
            .collect();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let issuer = format!("http://{}", listener.local_addr().expect("bound"));
        let asked = Arc::new(AtomicUsize::new(0));
        let discovery = json!({"issuer": issuer, "jwks_uri": format!("{issuer}/keys")}).to_string();
        let set = json!({"keys": public}).to_string();
        let count = asked.clone();
        let router =
            Router::new().route("/.well-known/openid-configuration", get(async move || discovery)).route(
                "/keys",
                get(move || {
                    count.fetch_add(1, Ordering::SeqCst);
                    let set = set.clone();
                    async move { set }
                }),
            );
        let server = tokio::spawn(async move { axum::serve(listener, router).await.expect("served") });
        Self { issuer, keys, asked, server }
    }

    fn token(&self, key: usize, change: impl FnOnce(&mut Value, &mut Header)) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
        let (algorithm, id, key) = &self.keys[key];
        let mut header = Header::new(*algorithm);
        header.kid = Some(id.clone());
        let mut claims = json!({
            "iss": self.issuer, "aud": ["ams", "other"], "exp": now + 300, "nbf": now - 5, "sub": "7",
            "email": "Jane@example.com", "email_verified": true,
        });
        change(&mut claims, &mut header);
        encode(&header, &claims, key).expect("signed")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_of_the_provider_let_its_users_in_and_no_others() {
    let (stack, admin) = with_admin().await;
    let provider = Provider::start().await;
    let user = Http::new(&stack, None);
    let good = provider.token(0, |_, _| {});
    assert_eq!(
        user.bearing(&good).status("GET", "/1.0/instances", Value::Null).await,
        401,
        "no provider yet"
    );
    assert_eq!(user.status("GET", "/1.0/auth/oidc", Value::Null).await, 404);
    set(&admin, "oidc.issuer_url", &provider.issuer).await;
    set(&admin, "oidc.client_id", "cli").await;
    set(&admin, "oidc.audience", "ams").await;
    let answer = user.bearing(&good).get("/1.0/instances").await;
    assert_eq!(answer.status, 503, "HTTP is not accepted unless it is allowed: {}", answer.text);
    assert_eq!(provider.asked.load(Ordering::SeqCst), 0);
    set(&admin, "oidc.allow_insecure", "true").await;

    let info = user.get("/1.0/auth/oidc?grant_type=device_code").await;
    assert_eq!(
        info.metadata(),
        &json!({"issuer": provider.issuer, "required_scopes": ["openid", "email", "profile"],
                "client_id": "cli", "audience": "ams"})
    );
    assert_eq!(user.get("/1.0").await.metadata()["auth_methods"], json!(["2waySSL", "oidc"]));

    // The token is good; whoever it names must be known, and in a group.
    assert_eq!(user.bearing(&good).status("GET", "/1.0/instances", Value::Null).await, 403);
    let post = json!({"authentication_method": "oidc", "email": "jane@example.com", "name": "Jane"});
    let url = admin.call("POST", "/1.0/auth/identities", post).await.resource("identities");
    assert_eq!(user.bearing(&good).status("GET", "/1.0/instances", Value::Null).await, 403);
    assert_eq!(user.bearing(&good).get("/1.0").await.metadata()["auth"], "trusted");
    assert_eq!(admin.status("PUT", &url, json!({"groups": ["admin"]})).await, 202);

    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
    for key in 0..3 {
        let token = provider.token(key, |_, _| {});
        let answer = user.bearing(&token).get("/1.0/instances").await;
        assert_eq!(answer.status, 200, "{:?} {}", provider.keys[key].0, answer.text);
    }
    type Spoil = fn(&mut Value, &mut Header, u64);
    let wrong: [(&str, Spoil); 9] = [
        ("it has expired", |claims, _, now| claims["exp"] = json!(now - 60)),
        ("it is not valid yet", |claims, _, now| claims["nbf"] = json!(now + 60)),
        ("another provider made it", |claims, _, _| claims["iss"] = json!("https://elsewhere")),
        ("another audience", |claims, _, _| claims["aud"] = json!("other")),
        ("claim exp is missing", |claims, _, _| drop(claims.as_object_mut().expect("claims").remove("exp"))),
        ("claim aud is missing", |claims, _, _| drop(claims.as_object_mut().expect("claims").remove("aud"))),
        ("no e-mail address", |claims, _, _| claims["email"] = json!("")),
        ("not verified", |claims, _, _| claims["email_verified"] = json!(false)),
        ("no such key", |_, header, _| header.kid = Some("unknown".into())),
    ];
    for (part, spoil) in wrong {
        let token = provider.token(1, |claims, header| spoil(claims, header, now));
        let answer = user.bearing(&token).get("/1.0/instances").await;
        assert_eq!(answer.status, 401, "{part}: {}", answer.text);
        assert!(answer.text.contains(part), "{part}: {}", answer.text);
        assert_eq!(answer.headers["www-authenticate"], "Bearer");
        assert!(!answer.text.contains(&token), "the token is not repeated");
    }
    // A clock that is a little wrong does no harm.
    let skewed = provider.token(1, |claims, _| claims["exp"] = json!(now - 10));
    assert_eq!(user.bearing(&skewed).status("GET", "/1.0/instances", Value::Null).await, 200);
    // Signed by a key that has another name, or by nobody, or changed on the way.
    let swapped = provider.token(1, |_, header| header.kid = Some("r".into()));
    let mut changed = provider.token(1, |_, _| {});
    changed.replace_range(changed.len() - 8..changed.len() - 4, "AAAA");
    let unsigned = format!("eyJhbGciOiJub25lIn0.{}.", good.split('.').nth(1).expect("claims"));
    for token in [swapped.as_str(), &changed, &unsigned, "", "rubbish"] {
        assert_eq!(user.bearing(token).status("GET", "/1.0/instances", Value::Null).await, 401, "{token}");
    }
    // Whatever keys tokens name, the provider is asked once in a while.
    assert_eq!(provider.asked.load(Ordering::SeqCst), 1);
    // An open path stays open to somebody whose token has expired.
    let expired = provider.token(0, |claims, _| claims["exp"] = json!(now - 60));
    assert_eq!(user.bearing(&expired).get("/1.0").await.metadata()["auth"], "untrusted");

    // Whoever is deleted is out at once, though the token is still good.
    assert_eq!(admin.status("DELETE", &url, json!({"force": true})).await, 202);
    assert_eq!(user.bearing(&good).status("GET", "/1.0/instances", Value::Null).await, 403);
    provider.server.abort();
    stack.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_trust_password_of_the_settings_is_kept_as_a_hash_and_lets_clients_in() {
    let store: Handle = Arc::new(Embedded::memory());
    let engine = fanlight_ams::engine::SimulatedEngine::new(Script::Run);
    let folder = tempfile::tempdir().expect("made");
    let stack = Stack::beside(folder, engine, store.clone(), |_| {}).await;
    let card = Card::new("new");
    let client = Http::new(&stack, Some(&card));
    let post = |password: &str| json!({"certificate": card.base64(), "trust-password": password});
    assert_eq!(client.status("POST", "/1.0/certificates", post("open sesame")).await, 403, "there is none");
    let socket = unix(stack.folder.path());
    let patch = |value: &str| json!({"name": "core.trust_password", "value": value});
    let (status, text) = socket.call("PATCH", "/1.0/config", patch("open sesame")).await;
    assert_eq!(status, 202, "{text}");
    let (_, text) = socket.call("GET", "/1.0/config", Value::Null).await;
    assert!(text.contains("\"core.trust_password\":true") && !text.contains("sesame"), "{text}");
    for entry in store.range("", None, usize::MAX).await.expect("read").entries {
        assert!(!String::from_utf8_lossy(&entry.value).contains("sesame"), "{}", entry.key);
    }
    let kept =
        store.get_json::<String>("ams/settings/core.trust_password").await.expect("read").expect("kept");
    assert!(kept.value.starts_with("$argon2id$"), "{}", kept.value);
    for wrong in ["", "open", "$argon2id$", &kept.value] {
        assert_eq!(client.status("POST", "/1.0/certificates", post(wrong)).await, 403, "{wrong}");
    }
    client.call("POST", "/1.0/certificates", post("open sesame")).await.resource("certificates");
    assert_eq!(client.status("GET", "/1.0/instances", Value::Null).await, 200);
    let (status, _) = socket.call("PATCH", "/1.0/config", patch("")).await;
    assert_eq!(status, 202);
    assert_eq!(client.get("/1.0/config").await.metadata()["config"]["core.trust_password"], false);
    stack.running.stop().await;
}

/// The unix socket, whose owner may do everything.
pub struct Unix(std::path::PathBuf);

/// The socket below a folder.
pub fn unix(folder: &Path) -> Unix {
    Unix(folder.join("ams.sock"))
}

impl Unix {
    /// Status and body.
    pub async fn call(&self, method: &str, path: &str, body: Value) -> (u16, String) {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let request = crate::api::request(method, path, &body);
        let (status, body) = crate::api::raw(&self.0, &request).await;
        (status, body.to_string())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_unit_sees_identities_and_settings_of_the_first() {
    let store: Handle = Arc::new(Embedded::memory());
    let engine = fanlight_ams::engine::SimulatedEngine::new(Script::Run);
    let start = async |unit: &'static str| {
        let folder = tempfile::tempdir().expect("made");
        Stack::beside(folder, engine.clone(), store.clone(), |config| config.unit = unit.into()).await
    };
    let (one, two) = (start("one").await, start("two").await);
    let card = Card::new("shared");
    let post = fanlight_api::ams::CertificatesPost { certificate: card.base64(), ..Default::default() };
    one.client.add_certificate(&post).await.expect("trusted");
    let there = Http::new(&two, Some(&card));
    until("the other unit trusts it", async || {
        (there.status("GET", "/1.0/instances", Value::Null).await == 200).then_some(())
    })
    .await;
    set(&Http::new(&one, Some(&card)), "core.max_requests_per_second", "777").await;
    until("the other unit has the setting", async || {
        let config = there.get("/1.0/config").await;
        (config.metadata()["config"]["core.max_requests_per_second"] == 777).then_some(())
    })
    .await;
    let token = there.call("POST", "/1.0/events/auth", Value::Null).await.metadata()["token"].clone();
    let path = format!("/1.0/events?token={}", token.as_str().expect("a token"));
    nobody(&one).endpoint().websocket(&path, Default::default()).await.expect("a token of any unit will do");
    let spoilt = format!("{path}x");
    assert!(nobody(&one).endpoint().websocket(&spoilt, Default::default()).await.is_err());
    let seen = one.client.certificates().await.expect("listed");
    assert_eq!(seen, two.client.certificates().await.expect("listed"));
    two.running.stop().await;
    one.running.stop().await;
}
