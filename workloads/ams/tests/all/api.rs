//! The API over TLS with client certificates, as its clients use it.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use axum::{Router, extract::State, routing::post};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use fanlight_ams::{
    AgentConfig, Config, NodeConfig, Parts, Phase, Running, Seen, Tls, TrustConfig,
    engine::{Engine, Script, SimulatedEngine},
};
use fanlight_api::{
    ams::{
        CertificatesPost, InstanceConfig, InstanceConfigPatch, InstancePatch, InstanceStatus, InstancesPost,
        Operation, SecurityPatch,
    },
    guest::{EndReason, Ended},
};
use fanlight_client::{AmsClient, ClientError, Endpoint, Identity, Trust};
use fanlight_service::{
    Shutdown,
    http::{Binding, Edge, GatewayStyle, Json, Limits, Peer, serve},
    tls::{KeyFiles, ensure_self_signed, install_provider, server_config},
};
use fanlight_store::{Embedded, Handle};
use futures_util::StreamExt as _;
use serde_json::{Value, json};

use crate::stack::{PATIENCE, until};

/// A tar that holds a manifest and nothing else.
pub fn tar_of(manifest: &str) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(manifest.len() as u64);
    header.set_mode(0o644);
    builder.append_data(&mut header, "manifest.yaml", manifest.as_bytes()).expect("appended");
    builder.into_inner().expect("finished")
}

const MANIFEST: &str =
    "name: terminal\ncommand: foot\ntitle: Terminal\nresources: {cpus: 1, memory: 64MB}\ntags: [demo]\n";

/// AMS on a free port with a simulated engine.
pub struct Stack {
    /// Its files.
    pub folder: tempfile::TempDir,
    /// The program.
    pub running: Running,
    /// What it runs instances with.
    pub engine: SimulatedEngine,
    /// A trusted client.
    pub client: AmsClient,
}

fn key_files(folder: &Path, name: &str) -> KeyFiles {
    install_provider();
    let files = KeyFiles::in_folder(folder, name);
    ensure_self_signed(&files, name, &["localhost".into(), "127.0.0.1".into()]).expect("made");
    files
}

fn identity(files: &KeyFiles) -> Identity {
    Identity { certificate: files.certificate.clone(), key: files.key.clone() }
}

impl Stack {
    /// With a store of its own.
    pub async fn start(script: Script, change: impl FnOnce(&mut Config)) -> Self {
        let folder = tempfile::tempdir().expect("made");
        let store: Handle = Arc::new(Embedded::memory());
        Self::over(folder, script, store, change).await
    }

    async fn over(
        folder: tempfile::TempDir,
        script: Script,
        store: Handle,
        change: impl FnOnce(&mut Config),
    ) -> Self {
        Self::beside(folder, SimulatedEngine::new(script), store, change).await
    }

    /// On a store and an engine that others use too.
    pub async fn beside(
        folder: tempfile::TempDir,
        engine: SimulatedEngine,
        store: Handle,
        change: impl FnOnce(&mut Config),
    ) -> Self {
        let trusted = key_files(folder.path(), "admin");
        let mut config = Config {
            folder: folder.path().join("state"),
            socket: folder.path().join("ams.sock"),
            tls: Tls {
                certificate: folder.path().join("ams.crt"),
                key: folder.path().join("ams.key"),
                names: Vec::new(),
            },
            trust: TrustConfig { certificates: vec![trusted.certificate.clone()], ..TrustConfig::default() },
            node: NodeConfig { cpus: 8, memory: "16GB".into(), ..NodeConfig::default() },
            ..Config::default()
        };
        change(&mut config);
        let parts = Parts {
            store: Some(store),
            listener: Some(std::net::TcpListener::bind("127.0.0.1:0").expect("bound")),
            engine: Some(Arc::new(engine.clone())),
        };
        let running = fanlight_ams::start(config, parts).await.expect("started");
        let client = Self::client(&running, Some(&identity(&trusted)));
        Self { folder, running, engine, client }
    }

    fn client(running: &Running, identity: Option<&Identity>) -> AmsClient {
        let url = format!("https://{}", running.address());
        AmsClient::new(
            Endpoint::http(&url, &Trust::Pinned(running.fingerprint.clone()), identity).expect("valid"),
        )
    }

    fn stranger(&self) -> (AmsClient, KeyFiles) {
        let files = key_files(self.folder.path(), "stranger");
        (Self::client(&self.running, Some(&identity(&files))), files)
    }

    /// Makes the application of the tests.
    pub async fn application(&self) {
        self.client.create_application(tar_of(MANIFEST).into()).await.expect("created");
    }

    /// Launches it, and gives the instance's id.
    pub async fn launch(&self) -> String {
        let operation = self.client.launch(&terminal(), false, None).await.expect("accepted");
        let done = self.client.wait(&operation, PATIENCE).await.expect("running");
        done.resource("instances").expect("an instance").to_owned()
    }

    async fn until_status(&self, id: &str, status: InstanceStatus) {
        until("the status", async || (self.client.instance(id).await.ok()?.status() == status).then_some(()))
            .await;
    }
}

pub fn terminal() -> InstancesPost {
    InstancesPost { app_id: "terminal".into(), ..InstancesPost::default() }
}

/// Status and text of a refusal.
fn refusal<T: std::fmt::Debug>(result: Result<T, ClientError>) -> (u16, String) {
    match result {
        Err(ClientError::Refused { status, text, .. }) => (status.as_u16(), text),
        other => panic!("not refused: {other:?}"),
    }
}

/// A request as curl would send it, over the unix socket: status and body.
pub async fn raw(socket: &Path, request: &str) -> (u16, Value) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::UnixStream::connect(socket).await.expect("connected");
    // A server that refuses a body closes before all of it was sent; its answer is there all the same.
    let _ = stream.write_all(request.as_bytes()).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let status = answer.split_whitespace().nth(1).expect("a status").parse().expect("a number");
    let body = answer.split_once("\r\n\r\n").expect("a body").1;
    (status, serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {answer}")))
}

pub fn request(method: &str, path: &str, body: &str) -> String {
    format!(
        "{method} {path} HTTP/1.1\r\nHost: unix\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn only_trusted_callers_get_beyond_the_open_paths() {
    let password = "correct horse battery";
    let stack = Stack::start(Script::Run, |config| {
        let file = config.folder.with_file_name("password");
        std::fs::write(&file, format!("{password}\n")).expect("written");
        config.trust.password_file = file;
    })
    .await;
    let (stranger, files) = stack.stranger();
    let nobody = Stack::client(&stack.running, None);
    assert_eq!(stack.client.service().await.expect("open").auth, "trusted");
    for client in [&stranger, &nobody] {
        let service = client.service().await.expect("open to all");
        assert_eq!((service.auth.as_str(), service.cluster_id), ("untrusted", None));
        client.version().await.expect("open to all");
        assert_eq!(refusal(client.instances(&[]).await).0, 403);
        assert_eq!(refusal(client.launch(&terminal(), true, None).await).0, 403);
        assert_eq!(refusal(client.create_application(tar_of(MANIFEST).into()).await).0, 403);
        assert_eq!(refusal(client.certificates().await).0, 403);
    }

    let pem = std::fs::read_to_string(&files.certificate).expect("read");
    let der: String = pem.lines().filter(|line| !line.starts_with("-----")).collect();
    for (certificate, given, status) in [
        (der.as_str(), "", 403),
        (der.as_str(), "wrong", 403),
        ("rubbish", password, 400),
        ("", password, 400),
        (&BASE64_STANDARD.encode("rubbish"), password, 400),
    ] {
        let post = CertificatesPost {
            certificate: certificate.into(),
            trust_password: fanlight_api::Secret::new(given),
        };
        assert_eq!(refusal(stranger.add_certificate(&post).await).0, status, "{certificate:.20} {given}");
    }
    let post = CertificatesPost { certificate: der, trust_password: fanlight_api::Secret::new(password) };
    stranger.add_certificate(&post).await.expect("the password is right");
    stranger.instances(&[]).await.expect("trusted now");
    assert_eq!(refusal(stranger.add_certificate(&post).await).0, 409);
    let known = stack.client.certificates().await.expect("listed");
    assert_eq!(known.len(), 1);
    stack.client.delete_certificate(&known[0].fingerprint).await.expect("removed");
    assert_eq!(refusal(stranger.instances(&[]).await).0, 403);
    assert_eq!(refusal(stack.client.delete_certificate(&known[0].fingerprint).await).0, 404);
    stack.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_paths_and_bad_bodies_wear_the_envelope() {
    let stack = Stack::start(Script::Run, |_| {}).await;
    stack.application().await;
    let socket = stack.folder.path().join("ams.sock");
    for (method, path, body, status, needle) in [
        ("GET", "/1.0/nothing", "", 404, "/1.0/nothing"),
        ("GET", "/2.0", "", 404, "/2.0"),
        ("GET", "/1.0/registry/nothing", "", 404, "/1.0/registry/nothing"),
        ("POST", "/1.0/nodes", "{}", 400, "name is required"),
        ("PATCH", "/1.0/nodes/local", r#"{"cpu_allocation_rate":-1}"#, 400, "cpu_allocation_rate"),
        ("PATCH", "/1.0/nodes/nowhere", r#"{"cpus":2}"#, 404, "node not found"),
        ("PUT", "/1.0/nodes", "{}", 405, "PUT"),
        ("GET", "/1.0/events", "", 400, "websocket"),
        ("GET", "/1.0/instances?limit=x", "", 400, "limit"),
        ("GET", "/1.0/instances/none", "", 404, "instance not found"),
        ("GET", "/1.0/instances/..%2f..", "", 404, "instance not found"),
        ("GET", "/1.0/operations/none", "", 404, "operation not found"),
        ("GET", "/1.0/applications/none", "", 404, "application not found"),
        ("GET", "/1.0/nodes/none", "", 404, "node not found"),
        ("POST", "/1.0/instances", "", 400, "empty"),
        ("POST", "/1.0/instances", "{", 400, "EOF"),
        ("POST", "/1.0/instances", r#"{"app_id":7}"#, 400, "app_id"),
        ("POST", "/1.0/instances", r#"{"app_id":"none"}"#, 404, "application not found"),
        ("POST", "/1.0/instances", "{}", 400, "app_id is required"),
        ("POST", "/1.0/instances", r#"{"app_id":"terminal","app_version":7}"#, 404, "version 7 not found"),
        ("POST", "/1.0/instances", r#"{"app_id":"terminal","name":"-x"}"#, 400, "name"),
        ("POST", "/1.0/instances", r#"{"app_id":"terminal","node":"mars"}"#, 404, "node mars not found"),
        ("POST", "/1.0/instances", r#"{"app_id":"terminal","type":"vm"}"#, 400, "vm not supported"),
        ("POST", "/1.0/instances", r#"{"app_id":"terminal","tags":["session=x"]}"#, 400, "session="),
        ("POST", "/1.0/instances", r#"{"app_id":"terminal","resources":{"cpus":-1}}"#, 400, "cpus"),
        (
            "POST",
            "/1.0/instances",
            r#"{"app_id":"terminal","config":{"display":{"width":100000}}}"#,
            400,
            "width",
        ),
        (
            "POST",
            "/1.0/instances",
            r#"{"app_id":"terminal","config":{"metrics_server":"x"}}"#,
            400,
            "metrics_server",
        ),
        (
            "POST",
            "/1.0/instances",
            r#"{"app_id":"terminal","config":{"enable_streaming":true}}"#,
            400,
            "agent",
        ),
        ("POST", "/1.0/instances", r#"{"image_id":"jammy"}"#, 400, "image_id"),
        ("POST", "/1.0/applications", "{}", 400, "octet-stream"),
        ("PATCH", "/1.0/applications/terminal", r#"{"services":[]}"#, 400, "services"),
        ("PATCH", "/1.0/applications/terminal/9", r#"{"published":true}"#, 404, "version 9"),
        ("DELETE", "/1.0/applications/terminal/0", "", 400, "last version"),
        ("DELETE", "/1.0/instances", "", 400, "ids"),
    ] {
        let (answered, envelope) = raw(&socket, &request(method, path, body)).await;
        assert_eq!(answered, status, "{method} {path} {body}: {envelope}");
        assert_eq!(
            (&envelope["type"], &envelope["error_code"]),
            (&json!("error"), &json!(status)),
            "{method} {path}"
        );
        let text = envelope["error"].as_str().expect("a text");
        assert!(text.contains(needle), "{method} {path} {body}: {text}");
        assert!(envelope["metadata"]["request_id"].is_string(), "{envelope}");
    }
    let large = format!(r#"{{"app_id":"terminal","user_data":"{}"}}"#, "x".repeat(20_000));
    assert_eq!(raw(&socket, &request("POST", "/1.0/instances", &large)).await.0, 400);
    let huge = format!(r#"{{"app_id":"{}"}}"#, "x".repeat(2 << 20));
    assert_eq!(raw(&socket, &request("POST", "/1.0/instances", &huge)).await.0, 413);
    for path in ["/1.0/", "//1.0", "/1.0//instances/", "/"] {
        let (status, envelope) = raw(&socket, &request("GET", path, "")).await;
        assert_eq!((status, &envelope["type"]), (200, &json!("sync")), "{path}");
    }
    let (_, map) = raw(&socket, &request("GET", "/1.0/operations?recursion=1", "")).await;
    assert!(map["metadata"]["success"].is_array(), "{map}");
    assert!(stack.client.instances(&[]).await.expect("listed").is_empty(), "a refused launch left something");
    stack.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn applications_are_made_updated_published_and_deleted() {
    let stack = Stack::start(Script::Run, |config| config.applications.max_published_versions = 2).await;
    let client = &stack.client;
    for (bytes, status, needle) in [
        (b"rubbish".to_vec(), 400, "package malformed"),
        (Vec::new(), 400, "package malformed"),
        (tar_of("name: x y\ncommand: z"), 400, "name"),
        (tar_of("name: abc\ncommand: z\ncolour: red"), 400, "colour"),
        (tar_of("name: abc"), 400, "command is required"),
        (tar_of("name: abc\ncommand: z\nicon: there.png"), 400, "icon"),
    ] {
        let (code, text) = refusal(client.create_application(bytes.into()).await);
        assert!(code == status && text.contains(needle), "{code} {text}");
    }
    let operation = client.create_application(tar_of(MANIFEST).into()).await.expect("created");
    let id = operation.resource("applications").expect("an application").to_owned();
    assert_eq!(refusal(client.create_application(tar_of(MANIFEST).into()).await).0, 409);
    let application = client.application("terminal").await.expect("by name");
    assert_eq!(application, client.application(&id).await.expect("by id"));
    assert_eq!((application.title.as_str(), application.published_version()), ("Terminal", Some(0)));
    assert_eq!((application.status.as_str(), application.resources.memory.as_str()), ("ready", "64MB"));
    assert_eq!(client.application_manifest("terminal").await.expect("there"), MANIFEST.as_bytes());

    // The same package again is no new version.
    client.update_application("terminal", tar_of(MANIFEST).into()).await.expect("accepted");
    assert_eq!(client.application(&id).await.expect("there").versions.len(), 1);
    let other = MANIFEST.replace("terminal", "other");
    assert_eq!(refusal(client.update_application("terminal", tar_of(&other).into()).await).0, 400);
    for title in ["Second", "Third", "Fourth"] {
        let manifest = MANIFEST.replace("Terminal", title);
        client.update_application("terminal", tar_of(&manifest).into()).await.expect("accepted");
    }
    let application = client.application(&id).await.expect("there");
    let numbers: Vec<u32> = application.versions.iter().map(|version| version.number).collect();
    assert_eq!((numbers, application.title.as_str()), (vec![2, 3], "Fourth"), "old ones are cleaned up");
    client.publish_application("terminal", 3, false).await.expect("revoked");
    assert_eq!(client.application(&id).await.expect("there").published_version(), Some(2));
    client.publish_application("terminal", 2, false).await.expect("revoked");
    let (code, text) = refusal(client.launch(&terminal(), true, None).await);
    assert_eq!((code, text.as_str()), (404, "published application version not found"));
    let post = InstancesPost { app_version: Some(3), ..terminal() };
    let operation = client.launch(&post, false, None).await.expect("an explicit number is enough");
    client.wait(&operation, PATIENCE).await.expect("running");
    let (code, text) = refusal(client.delete_application("terminal", false).await);
    assert!(code == 400 && text.contains("in use"), "{text}");
    let instance = operation.resource("instances").expect("an instance").to_owned();
    let deletion = client.delete_instance(&instance, false).await.expect("accepted");
    client.wait(&deletion, PATIENCE).await.expect("deleted");
    client.delete_application("terminal", false).await.expect("deleted");
    assert!(client.applications().await.expect("listed").is_empty());
    let left = std::fs::read_dir(stack.folder.path().join("state/packages")).expect("there").count();
    let uploads = std::fs::read_dir(stack.folder.path().join("state/uploads")).expect("there").count();
    assert_eq!((left, uploads), (0, 0), "files are left");
    stack.application().await;
    stack.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn instances_are_launched_stopped_started_and_deleted() {
    let stack = Stack::start(Script::Run, |_| {}).await;
    stack.application().await;
    let client = &stack.client;
    let post = InstancesPost {
        name: "mine".into(),
        tags: vec!["a".into(), "b".into()],
        user_data: Some("hello".into()),
        ..terminal()
    };
    let operation = client.launch(&post, false, None).await.expect("accepted");
    assert_eq!(operation.description, "Creating instance");
    let id = operation.resource("instances").expect("known at once").to_owned();
    client.wait(&operation, PATIENCE).await.expect("running");
    let instance = client.instance("mine").await.expect("by name");
    assert_eq!(
        (instance.id.as_str(), instance.status(), instance.node.as_str()),
        (id.as_str(), InstanceStatus::Running, "local")
    );
    assert_eq!((instance.resources.cpus, instance.resources.memory), (1, 64 << 20));
    assert_eq!((instance.config.display.width, instance.config.display.fps), (1280, 60));
    assert_eq!(refusal(client.launch(&post, true, None).await).0, 409);
    for (filters, count) in [
        (vec![("tags", "a,b")], 1),
        (vec![("tags", "a,c")], 0),
        (vec![("status", "running"), ("app_name", "terminal")], 1),
        (vec![("status", "stopped")], 0),
        (vec![("node", "local"), ("name", "mine"), ("base", "false"), ("type", "container")], 1),
        (vec![("something", "unknown")], 1),
    ] {
        let filters: Vec<(&str, String)> =
            filters.into_iter().map(|(key, value)| (key, value.to_owned())).collect();
        assert_eq!(client.instances(&filters).await.expect("listed").len(), count, "{filters:?}");
    }
    assert_eq!(client.nodes().await.expect("listed")[0].used_cpus, 1);
    let logs = client.instance_logs("mine").await.expect("listed");
    assert_eq!(logs, [format!("/1.0/instances/{id}/logs/streamer.log")]);
    assert_eq!(client.instance_log("mine", "streamer.log").await.expect("read"), "simulated\n");
    assert_eq!(refusal(client.instance_log("mine", "other.log").await).0, 404);

    let protect = |protected| InstancePatch {
        desired_status: None,
        config: Some(InstanceConfigPatch {
            security: Some(SecurityPatch { delete_protected: Some(protected) }),
        }),
    };
    let socket = stack.folder.path().join("ams.sock");
    let patch = async |patch: &InstancePatch| {
        let body = serde_json::to_string(patch).expect("JSON");
        raw(&socket, &request("PATCH", "/1.0/instances/mine", &body)).await.0
    };
    assert_eq!(patch(&protect(true)).await, 202);
    let (code, text) = refusal(client.delete_instance("mine", true).await);
    assert!(code == 400 && text.contains("delete protected"), "{text}");
    assert_eq!(patch(&protect(false)).await, 202);
    let bad = InstancePatch { desired_status: Some("frozen".into()), config: None };
    assert_eq!(patch(&bad).await, 400);

    let operation = client.stop_instance("mine", false).await.expect("accepted");
    client.wait(&operation, PATIENCE).await.expect("stopped");
    assert_eq!(client.instance("mine").await.expect("there").status(), InstanceStatus::Stopped);
    assert_eq!(client.nodes().await.expect("listed")[0].used_cpus, 0, "a stopped instance holds nothing");
    let operation = client.stop_instance("mine", false).await.expect("accepted");
    client.wait(&operation, PATIENCE).await.expect("stopped already");
    for _ in 0..2 {
        let operation = client.start_instance("mine", false).await.expect("accepted");
        client.wait(&operation, PATIENCE).await.expect("running, again or still");
    }
    assert_eq!(client.nodes().await.expect("listed")[0].used_cpus, 1);
    let operation = client.delete_instance("mine", false).await.expect("accepted");
    client.wait(&operation, PATIENCE).await.expect("deleted");
    assert_eq!(refusal(client.instance("mine").await).0, 404);
    assert_eq!(refusal(client.delete_instance("mine", false).await).0, 404);
    assert_eq!(client.nodes().await.expect("listed")[0].used_cpus, 0);
    // The operation is still there for who asks late.
    assert!(client.operation(&operation.id).await.expect("kept").succeeded());
    stack.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_fails_says_why_and_gives_its_resources_back() {
    let stack = Stack::start(Script::Crash, |_| {}).await;
    stack.application().await;
    let operation = stack.client.launch(&terminal(), true, None).await.expect("accepted");
    assert!(operation.succeeded(), "without waiting it is over when it is accepted");
    let id = operation.resource("instances").expect("an instance").to_owned();
    stack.until_status(&id, InstanceStatus::Error).await;
    let failed = stack.client.instance(&id).await.expect("kept");
    assert_eq!(failed.error_message, "crashed as the script says");
    assert_eq!(stack.client.nodes().await.expect("listed")[0].used_cpus, 0);
    stack.running.stop().await;

    let slow =
        Stack::start(Script::Hang, |config| config.engine.start_time = std::time::Duration::from_secs(1))
            .await;
    slow.application().await;
    let operation = slow.client.launch(&terminal(), false, None).await.expect("accepted");
    let error = slow.client.wait(&operation, PATIENCE).await.expect_err("never ready").to_string();
    assert!(error.contains("timed out"), "{error}");
    let id: fanlight_api::InstanceId =
        operation.resource("instances").expect("an instance").parse().expect("an id");
    until("it is killed", async || {
        matches!(slow.engine.seen(&id).await.phase, Phase::Ended(_)).then_some(())
    })
    .await;
    slow.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_node_refuses_with_the_documented_text_and_its_reasons() {
    let stack = Stack::start(Script::Run, |config| {
        config.node.cpus = 2;
        config.node.cpu_allocation_rate = 1.0;
    })
    .await;
    stack.application().await;
    let first = stack.launch().await;
    stack.launch().await;
    // Several at a time on the last place: one gets it.
    let operation = stack.client.launch(&terminal(), true, None).await.expect("accepted");
    assert!(
        operation.is_final()
            && operation.err.starts_with("No suitable node to satisfy instance requirement available")
    );
    assert!(operation.err.contains("CPUs"), "{}", operation.err);
    let refused = operation.resource("instances").expect("an instance").to_owned();
    assert_eq!(stack.client.instance(&refused).await.expect("kept").status(), InstanceStatus::Error);
    let deletion = stack.client.delete_instance(&first, false).await.expect("accepted");
    stack.client.wait(&deletion, PATIENCE).await.expect("deleted");
    let post = terminal();
    let all = (0..4).map(|_| stack.client.launch(&post, true, None));
    let all: Vec<Operation> = futures_util::future::join_all(all)
        .await
        .into_iter()
        .map(|result| result.expect("accepted"))
        .collect();
    assert_eq!(all.iter().filter(|operation| operation.succeeded()).count(), 1, "{all:?}");
    assert_eq!(stack.client.nodes().await.expect("listed")[0].used_cpus, 2);
    stack.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_launch_again_is_the_same_instance_and_older_attempts_are_refused() {
    let stack = Stack::start(Script::Run, |_| {}).await;
    stack.application().await;
    let client = &stack.client;
    let post = terminal();
    let again = (0..8).map(|_| client.launch(&post, true, Some("s1/1")));
    let again: Vec<Operation> = futures_util::future::join_all(again)
        .await
        .into_iter()
        .map(|result| result.expect("accepted"))
        .collect();
    let first = again[0].resource("instances").expect("an instance").to_owned();
    assert!(again.iter().all(|operation| operation.resource("instances") == Some(&first)));
    assert_eq!(client.instances(&[]).await.expect("listed").len(), 1);

    let second = client.launch(&post, false, Some("s1/2")).await.expect("a newer attempt");
    let second_id = second.resource("instances").expect("an instance").to_owned();
    assert_ne!(second_id, first);
    client.wait(&second, PATIENCE).await.expect("running");
    let (code, text) = refusal(client.launch(&post, true, Some("s1/1")).await);
    assert!(code == 409 && text.contains("attempt 1"), "{text}");
    until("the instance of the older attempt is gone", async || {
        client.instance(&first).await.is_err().then_some(())
    })
    .await;

    let deletion = client.delete_instance(&second_id, false).await.expect("accepted");
    client.wait(&deletion, PATIENCE).await.expect("deleted");
    // Late repetitions make nothing new.
    let late = client.launch(&post, true, Some("s1/2")).await.expect("answered");
    assert_eq!(late.resource("instances"), Some(second_id.as_str()));
    assert!(client.instances(&[]).await.expect("listed").is_empty());
    assert_eq!(refusal(client.launch(&post, true, Some("s1/0")).await).0, 409);
    stack.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_tell_every_step_in_order() {
    let stack = Stack::start(Script::Run, |_| {}).await;
    stack.application().await;
    let socket = stack
        .client
        .endpoint()
        .websocket("/1.0/events?type=lifecycle", Default::default())
        .await
        .expect("open");
    let id = stack.launch().await;
    let deletion = stack.client.delete_instance(&id, false).await.expect("accepted");
    stack.client.wait(&deletion, PATIENCE).await.expect("deleted");
    let mut actions: Vec<String> = Vec::new();
    let mut socket = std::pin::pin!(socket);
    while actions.last().is_none_or(|action| action != "instance-removed") {
        let message = tokio::time::timeout(PATIENCE, socket.next())
            .await
            .expect("in time")
            .expect("open")
            .expect("a frame");
        let Ok(text) = message.into_text() else { continue };
        let event: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(event["type"], "lifecycle");
        if event["metadata"]["action"] == "application-changed" {
            continue;
        }
        assert_eq!(event["metadata"]["source"], format!("/1.0/instances/{id}"));
        let action = event["metadata"]["action"].as_str().expect("an action").to_owned();
        if action.starts_with("instance-") {
            actions.push(action);
        }
    }
    assert_eq!(
        actions,
        [
            "instance-created",
            "instance-scheduled",
            "instance-started",
            "instance-running",
            "instance-stopped",
            "instance-removed"
        ]
    );
    let (stranger, _) = stack.stranger();
    let refused = stranger.endpoint().websocket("/1.0/events", Default::default()).await;
    assert_eq!(refused.err().and_then(|error| error.status()).map(|status| status.as_u16()), Some(403));
    stack.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_takes_up_what_was_written_down() {
    let store: Handle = Arc::new(Embedded::memory());
    let folder = tempfile::tempdir().expect("made");
    let path: PathBuf = folder.path().to_owned();
    let stack = Stack::over(folder, Script::Run, store.clone(), |_| {}).await;
    stack.application().await;
    let id: fanlight_api::InstanceId = stack.launch().await.parse().expect("an id");
    let Stack { running, folder, .. } = stack;
    running.stop().await;

    // The engine of the next one has it as ended, and something that nobody knows.
    let stack = {
        let engine_has = |engine: &SimulatedEngine| {
            let ended = Ended { reason: EndReason::Finished, message: "done".into() };
            engine.set(&id, Seen { run: 1, phase: Phase::Ended(ended) });
            engine.set(&"orphan".parse().expect("an id"), Seen { run: 1, phase: Phase::Ready });
        };
        let engine = SimulatedEngine::new(Script::Run);
        engine_has(&engine);
        let trusted = key_files(&path, "admin");
        let config = Config {
            folder: path.join("state"),
            tls: Tls { certificate: path.join("ams.crt"), key: path.join("ams.key"), names: Vec::new() },
            trust: TrustConfig { certificates: vec![trusted.certificate.clone()], ..TrustConfig::default() },
            ..Config::default()
        };
        let parts = Parts {
            store: Some(store),
            listener: Some(std::net::TcpListener::bind("127.0.0.1:0").expect("bound")),
            engine: Some(Arc::new(engine.clone())),
        };
        let running = fanlight_ams::start(config, parts).await.expect("started");
        let client = Stack::client(&running, Some(&identity(&trusted)));
        Stack { folder, running, engine, client }
    };
    stack.until_status(id.as_str(), InstanceStatus::Stopped).await;
    assert_eq!(stack.client.instance(id.as_str()).await.expect("there").status_message, "done");
    assert_eq!(stack.engine.list().await.expect("listed"), [id]);
    assert_eq!(stack.client.application("terminal").await.expect("there").versions.len(), 1);
    stack.running.stop().await;
}

/// What an agent was asked.
#[derive(Clone, Default)]
struct Asked(Arc<Mutex<Vec<String>>>);

/// An agent that makes a session for every instance, after it was away for a moment.
async fn agent(folder: &Path, shutdown: &Shutdown) -> (String, String, Asked) {
    let asked = Asked::default();
    let fail_first = Arc::new(Mutex::new(1));
    async fn create(
        State((asked, fail_first)): State<(Asked, Arc<Mutex<u32>>)>,
        axum::Extension(peer): axum::Extension<Peer>,
        Json(request): Json<Value>,
    ) -> Result<Json<Value>, fanlight_service::ApiError> {
        assert!(peer.certificate.is_some(), "AMS shows its certificate");
        let mut left = fail_first.lock().expect("not poisoned");
        if *left > 0 {
            *left -= 1;
            return Err(fanlight_service::ApiError::unavailable("away", "away for a moment"));
        }
        asked
            .0
            .lock()
            .expect("not poisoned")
            .push(format!("create {}", request["app"].as_str().expect("a name")));
        let streaming = json!({"session_id": format!("s-{}", request["instance_id"].as_str().expect("an id")),
            "agent_url": "wss://agent", "token": "secret"});
        Ok(Json(
            json!({"type": "sync", "status": "success", "status_code": 200, "metadata": {"streaming": streaming}}),
        ))
    }
    async fn delete(
        State((asked, _)): State<(Asked, Arc<Mutex<u32>>)>,
        axum::extract::Path(id): axum::extract::Path<String>,
    ) -> Json<Value> {
        asked.0.lock().expect("not poisoned").push(format!("delete {id}"));
        Json(json!({"type": "sync", "status": "success", "status_code": 200, "metadata": {}}))
    }
    let router = Router::new()
        .route("/internal/1.0/sessions", post(create))
        .route("/internal/1.0/sessions/{id}", axum::routing::delete(delete))
        .with_state((asked.clone(), fail_first));
    let files = key_files(folder, "agent");
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bound");
    let binding = Binding::Tls(listener, server_config(&files).expect("usable"));
    let edge = Edge::new(router, Arc::new(GatewayStyle), 1 << 20);
    let address = serve(binding, edge, Limits::default(), shutdown).expect("served").expect("TCP");
    let fingerprint = fanlight_service::tls::fingerprint_of_file(&files.certificate).expect("read");
    (format!("https://{address}"), fingerprint, asked)
}

#[tokio::test(flavor = "multi_thread")]
async fn streaming_instances_get_a_session_from_the_agent_and_end_it() {
    let shutdown = Shutdown::new();
    let folder = tempfile::tempdir().expect("made");
    let (url, fingerprint, asked) = agent(folder.path(), &shutdown).await;
    let own = key_files(folder.path(), "ams-client");
    let stack = Stack::start(Script::Run, |config| {
        config.agent = AgentConfig {
            url,
            fingerprint,
            certificate: own.certificate.clone(),
            key: own.key.clone(),
            ..AgentConfig::default()
        };
    })
    .await;
    stack.application().await;
    let streamed = InstancesPost {
        config: InstanceConfig { enable_streaming: true, ..Default::default() },
        ..terminal()
    };
    let operation = stack.client.launch(&streamed, false, None).await.expect("accepted");
    let done = stack.client.wait(&operation, PATIENCE).await.expect("running");
    let id = done.resource("instances").expect("an instance").to_owned();
    let instance = stack.client.instance(&id).await.expect("there");
    assert_eq!(instance.session().map(String::from), Some(format!("s-{id}")));
    let tagged = stack.client.instances(&[("tags", format!("session=s-{id}"))]).await.expect("listed");
    assert_eq!(tagged.len(), 1);

    // Who brings a session along gets no other, and it is not AMS's to end.
    let given = json!({"session_id": "given", "agent_url": "wss://agent", "token": "secret-token"});
    let brought = InstancesPost {
        streaming: Some(serde_json::from_value(given).expect("valid")),
        tags: vec!["session=given".into()],
        ..streamed
    };
    let operation = stack.client.launch(&brought, false, None).await.expect("accepted");
    let done = stack.client.wait(&operation, PATIENCE).await.expect("running");
    let other = done.resource("instances").expect("an instance").to_owned();
    let instance = stack.client.instance(&other).await.expect("there");
    assert_eq!(instance.tags, ["session=given"]);
    assert!(!serde_json::to_string(&instance).expect("JSON").contains("secret"));
    for id in [&id, &other] {
        let deletion = stack.client.delete_instance(id, false).await.expect("accepted");
        stack.client.wait(&deletion, PATIENCE).await.expect("deleted");
    }
    assert_eq!(
        *asked.0.lock().expect("not poisoned"),
        ["create terminal".to_owned(), format!("delete s-{id}")]
    );
    stack.running.stop().await;
    shutdown.stop(PATIENCE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_in_use_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("bound");
    let address = taken.local_addr().expect("bound");
    let folder = tempfile::tempdir().expect("made");
    let config = Config { listen: address, folder: folder.path().join("state"), ..Config::default() };
    let error = fanlight_ams::start(config, Parts::default()).await.err().expect("in use");
    let text = fanlight_service::telemetry::chain(&error);
    assert!(text.contains(&address.to_string()) && text.contains("another process uses it"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn packages_are_not_removed_for_a_store_that_does_not_know_them() {
    let stack = Stack::start(Script::Run, |_| {}).await;
    stack.application().await;
    let Stack { folder, running, .. } = stack;
    running.stop().await;
    let state = folder.path().join("state");
    let packages = || std::fs::read_dir(state.join("packages")).expect("there").count();
    assert_eq!(packages(), 1);
    let config = Config {
        folder: state.clone(),
        tls: Tls {
            certificate: folder.path().join("ams.crt"),
            key: folder.path().join("ams.key"),
            names: Vec::new(),
        },
        ..Config::default()
    };
    let parts = Parts {
        store: Some(Arc::new(Embedded::memory())),
        listener: Some(std::net::TcpListener::bind("127.0.0.1:0").expect("bound")),
        engine: Some(Arc::new(SimulatedEngine::new(Script::Run))),
    };
    let refused = fanlight_ams::start(config, parts).await.err().expect("it does not start");
    let text = fanlight_service::telemetry::chain(&refused);
    assert!(text.contains("the store has no cluster") && text.contains("store.url"), "{text}");
    assert_eq!(packages(), 1, "nothing was removed");
}

#[tokio::test(flavor = "multi_thread")]
async fn older_clients_find_instances_under_the_name_of_containers() {
    let stack = Stack::start(Script::Run, |_| {}).await;
    stack.application().await;
    let socket = stack.folder.path().join("ams.sock");
    let call = async |method: &str, path: &str, body: &str| raw(&socket, &request(method, path, body)).await;
    let body =
        r#"{"app_id":"terminal","name":"old","cpus":2,"memory":134217728,"disk_size":null,"tags":["a"]}"#;
    let (status, answer) = call("POST", "/1.0/containers", body).await;
    assert_eq!(status, 202, "{answer}");
    let operation = answer["operation"].as_str().expect("named").to_owned();
    let url = answer["metadata"]["resources"]["containers"][0].as_str().expect("named at once").to_owned();
    assert!(answer["metadata"]["resources"]["instances"].is_null(), "{answer}");
    let (_, ended) = call("GET", &format!("{operation}/wait?timeout=30"), "").await;
    assert_eq!(
        (&ended["metadata"]["status_code"], &ended["metadata"]["resources"]["containers"][0]),
        (&json!(200), &json!(url))
    );

    let (status, shown) = call("GET", &url, "").await;
    assert_eq!(status, 200, "{shown}");
    let shown = &shown["metadata"];
    assert_eq!(
        (&shown["name"], &shown["type"], &shown["status"]),
        (&json!("old"), &json!("regular"), &json!("running"))
    );
    assert_eq!((&shown["resources"]["cpus"], &shown["resources"]["memory"]), (&json!(2), &json!("128MB")));
    assert!(shown["base"].is_null() && shown["config"]["display"].is_null(), "{shown}");
    for (query, count) in [("", 1), ("?type=regular", 1), ("?type=base", 0), ("?type=vm", 0), ("?tags=b", 0)]
    {
        let (_, listed) = call("GET", &format!("/1.0/containers{query}"), "").await;
        assert_eq!(listed["metadata"].as_array().map(Vec::len), Some(count), "{query}: {listed}");
        assert!(
            listed["metadata"].as_array().into_iter().flatten().all(|listed| *listed == json!(url)),
            "{listed}"
        );
    }
    let (_, logs) = call("GET", &format!("{url}/logs"), "").await;
    assert_eq!(logs["metadata"], json!([format!("{url}/logs/streamer.log")]));

    let (status, stopped) = call("PATCH", &url, r#"{"desired_status":"stopped"}"#).await;
    assert_eq!((status, &stopped["metadata"]["resources"]["containers"][0]), (202, &json!(url)));
    let (_, ended) =
        call("GET", &format!("{}/wait?timeout=30", stopped["operation"].as_str().expect("named")), "").await;
    assert_eq!(ended["metadata"]["status_code"], 200, "{ended}");
    let (status, deleted) = call("DELETE", &url, r#"{"force":true}"#).await;
    assert_eq!((status, &deleted["metadata"]["resources"]["containers"][0]), (202, &json!(url)));
    // The same instance under the new name goes with it.
    until("it is gone", async || stack.client.instances(&[]).await.expect("listed").is_empty().then_some(()))
        .await;
    stack.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_comes_back_as_an_archive_of_its_files() {
    let stack = Stack::start(Script::Run, |_| {}).await;
    stack.application().await;
    let socket = stack.folder.path().join("ams.sock");
    for (path, expected) in [("terminal/1", 404), ("terminal/x", 404), ("nobody/0", 404)] {
        let (status, answer) = raw(&socket, &request("GET", &format!("/1.0/applications/{path}"), "")).await;
        assert_eq!(status, expected, "{path}: {answer}");
    }
    let mut archive = Vec::new();
    let intact = stack.client.export_application("terminal", 0, &mut archive).await.expect("exported");
    assert!(intact, "the fingerprint is not that of the archive");
    let mut archive = tar::Archive::new(bzip2::read::BzDecoder::new(&archive[..]));
    let mut names = Vec::new();
    for entry in archive.entries().expect("an archive") {
        let mut entry = entry.expect("an entry");
        let path = entry.path().expect("a path").display().to_string();
        if path == "manifest.yaml" {
            let mut text = String::new();
            std::io::Read::read_to_string(&mut entry, &mut text).expect("a text");
            assert!(text.contains("command: foot"), "{text}");
        }
        names.push(path);
    }
    assert!(names.iter().any(|name| name == "manifest.yaml"), "{names:?}");
    stack.running.stop().await;
}
