//! Settings, tasks and metrics of AMS, as its clients see them.

use std::sync::Arc;

use fanlight_ams::engine::{Script, SimulatedEngine};
use fanlight_store::{Embedded, Handle};
use serde_json::{Value, json};

use crate::{
    api::Stack,
    auth::{unix, with_admin},
    stack::until,
};

#[tokio::test(flavor = "multi_thread")]
async fn settings_are_shown_with_their_types_changed_and_reset() {
    let (stack, admin) = with_admin().await;
    let shown = admin.get("/1.0/config").await;
    assert!(shown.headers.contains_key("etag"));
    let config = &shown.metadata()["config"];
    for (name, value) in [
        ("application.auto_publish", json!(true)),
        ("application.max_published_versions", json!(3)),
        ("auth.mode", json!("unrestricted")),
        ("core.max_requests_per_second", json!(1000)),
        ("core.trust_password", json!(false)),
        ("instance.default_memory", json!("3GB")),
        ("oidc.allow_insecure", json!(false)),
        ("oidc.issuer_url", json!("")),
        ("scheduler.strategy", json!("spread")),
        ("agent.api.url", json!("")),
        ("core.https_address", json!(stack.running.address().to_string())),
    ] {
        assert_eq!(config[name], value, "{name}");
    }
    for (name, value, status, part) in [
        ("scheduler.strategy", "binpack", 202, "Updating configuration"),
        ("scheduler.strategy", "best", 400, "argument value is invalid: scheduler.strategy"),
        ("application.auto_publish", "perhaps", 400, "true or false"),
        ("colour", "red", 404, "config item colour not found"),
        ("", "", 404, "not found"),
        (
            "openfga.api.url",
            "https://a",
            400,
            "openfga.api.url not supported: rights are checked by AMS itself",
        ),
        ("registry.mode", "push", 400, "there is no registry"),
        ("core.https_address", "1.2.3.4:5", 400, "configuration file"),
        ("core.proxy_https", "http://user:hunter2@proxy:3128", 202, ""),
        ("core.trust_password", "hunter2", 400, "at least 8"),
    ] {
        let answer = admin.call("PATCH", "/1.0/config", json!({"name": name, "value": value})).await;
        assert_eq!(answer.status, status, "{name} {}", answer.text);
        assert!(answer.text.contains(part), "{part}: {}", answer.text);
        assert!(!answer.text.contains("hunter2"), "{}", answer.text);
    }
    let config = admin.get("/1.0/config").await;
    assert_eq!(config.metadata()["config"]["scheduler.strategy"], "binpack");
    assert_eq!(config.metadata()["config"]["core.proxy_https"], "http://proxy:3128/");
    let reset = json!({"name": "scheduler.strategy", "value": ""});
    admin.call("PATCH", "/1.0/config", reset).await.resource("config");
    assert_eq!(admin.get("/1.0/config").await.metadata()["config"]["scheduler.strategy"], "spread");
    stack.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_holds_for_what_comes_next_without_a_restart() {
    let (stack, admin) = with_admin().await;
    for (name, value) in [
        ("application.auto_publish", "false"),
        ("instance.default_disk", "5GB"),
        ("node.cpu_allocation_rate", "0.5"),
    ] {
        let patch = json!({"name": name, "value": value});
        admin.call("PATCH", "/1.0/config", patch).await.resource("config");
    }
    stack.application().await;
    let application = admin.get("/1.0/applications/terminal").await;
    assert_eq!(application.metadata()["versions"][0]["published"], false);
    stack.client.publish_application("terminal", 0, true).await.expect("published");
    let id = stack.launch().await;
    let instance = admin.get(&format!("/1.0/instances/{id}")).await;
    assert_eq!(instance.metadata()["resources"]["disk-size"], json!(5_i64 << 30), "{}", instance.text);
    let nodes = admin.get("/1.0/nodes?recursion=1").await;
    assert_eq!(nodes.metadata()[0]["cpu_allocation_rate"], 0.5, "{}", nodes.text);
    stack.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_set_outlives_a_restart() {
    let store: Handle = Arc::new(Embedded::memory());
    let engine = SimulatedEngine::new(Script::Run);
    let folder = tempfile::tempdir().expect("made");
    let stack = Stack::beside(folder, engine.clone(), store.clone(), |_| {}).await;
    let patch = json!({"name": "instance.default_cpus", "value": "7"});
    let (status, text) = unix(stack.folder.path()).call("PATCH", "/1.0/config", patch).await;
    assert_eq!(status, 202, "{text}");
    stack.running.stop().await;
    let folder = tempfile::tempdir().expect("made");
    let stack = Stack::beside(folder, engine, store, |_| {}).await;
    let (_, text) = unix(stack.folder.path()).call("GET", "/1.0/config", Value::Null).await;
    assert!(text.contains("\"instance.default_cpus\":7"), "{text}");
    stack.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_over_https_are_bounded_and_those_of_the_socket_are_not() {
    let (stack, admin) = with_admin().await;
    let bound = |rate: &str| json!({"name": "core.max_requests_per_second", "value": rate});
    assert_eq!(admin.call("PATCH", "/1.0/config", bound("2")).await.status, 202);
    let refused = until("too many", async || {
        let answer = admin.get("/1.0/version").await;
        (answer.status != 200).then_some(answer)
    })
    .await;
    assert_eq!(refused.status, 429, "{}", refused.text);
    assert_eq!(refused.headers["retry-after"], "1");
    assert_eq!(refused.body["type"], "error", "{}", refused.text);
    let socket = unix(stack.folder.path());
    for _ in 0..20 {
        assert_eq!(socket.call("GET", "/1.0/version", Value::Null).await.0, 200);
    }
    assert_eq!(socket.call("PATCH", "/1.0/config", bound("0")).await.0, 202);
    for _ in 0..20 {
        assert_eq!(admin.get("/1.0/version").await.status, 200);
    }
    stack.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_in_flight_is_a_task_and_a_running_instance_is_none() {
    let stack = Stack::start(Script::Hang, |_| {}).await;
    stack.application().await;
    let operation = stack.client.launch(&crate::api::terminal(), true, None).await.expect("accepted");
    let id = operation.resource("instances").expect("an instance").to_owned();
    let socket = unix(stack.folder.path());
    let task = until("the start is a task", async || {
        let (status, text) = socket.call("GET", "/1.0/tasks?recursion=1", Value::Null).await;
        assert_eq!(status, 200, "{text}");
        let body: Value = serde_json::from_str(&text).expect("JSON");
        Some(body["metadata"][0].clone()).filter(|task| task["status"] == "started")
    })
    .await;
    assert_eq!((&task["object_id"], &task["object_type"]), (&json!(id), &json!("instance")));
    let (_, text) = socket.call("GET", "/1.0/tasks", Value::Null).await;
    assert!(text.contains(&format!("/1.0/tasks/{}", task["id"].as_str().expect("an id"))), "{text}");
    let deletion = stack.client.delete_instance(&id, true).await.expect("accepted");
    stack.client.wait(&deletion, crate::stack::PATIENCE).await.expect("deleted");
    let (_, text) = socket.call("GET", "/1.0/tasks", Value::Null).await;
    assert!(text.contains("\"metadata\":[]"), "{text}");
    stack.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_count_the_cluster_and_the_requests_by_listener() {
    let (stack, admin) = with_admin().await;
    stack.application().await;
    stack.launch().await;
    let (status, _) = unix(stack.folder.path()).call("GET", "/1.0/instances", Value::Null).await;
    assert_eq!(status, 200);
    admin.get("/1.0/instances/none").await;
    let metrics = until("the start was measured", async || {
        let answer = admin.get("/1.0/metrics").await;
        answer.text.contains("ams_cluster_instance_boot_time_seconds_count 1").then_some(answer)
    })
    .await;
    assert_eq!(metrics.headers["content-type"], "text/plain; version=0.0.4");
    for part in [
        "ams_cluster_applications_total 1",
        "ams_cluster_instances_total 1",
        "ams_cluster_instances_per_application_total{application=\"terminal\"} 1",
        "ams_cluster_instances_per_status_total{status=\"running\"} 1",
        "ams_cluster_instances_per_status_total{status=\"error\"} 0",
        "ams_cluster_instances_per_node_total{node=",
        "ams_cluster_used_cpu_total{node=",
        "ams_cluster_available_memory_total{node=",
        "handler=\"unix_instances_GET\",host=\"unix\",method=\"GET\"} 1",
        "handler=\"https_instance_GET\"",
    ] {
        assert!(metrics.text.contains(part), "{part} is missing in:\n{}", metrics.text);
    }
    let used =
        metrics.text.lines().find(|line| line.starts_with("ams_cluster_used_cpu_total")).expect("there");
    assert!(used.ends_with(" 1"), "{used}");
    stack.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_is_there_is_announced() {
    let (stack, admin) = with_admin().await;
    let service = admin.get("/1.0").await;
    let extensions = service.metadata()["api_extensions"].as_array().expect("a list").clone();
    let has = |name: &str| extensions.iter().any(|extension| extension == name);
    for (name, path) in [
        ("oidc_support", "/1.0/auth/identities"),
        ("auth.groups", "/1.0/auth/groups"),
        ("metrics_api_endpoint", "/1.0/metrics"),
        ("instance_support", "/1.0/instances"),
    ] {
        assert!(has(name), "{name}");
        assert_eq!(admin.get(path).await.status, 200, "{path}");
    }
    // Nothing is made of images here.
    assert!(!has("registry") && !has("vm_support") && !has("instance_publish"), "{extensions:?}");
    let catalogue = &service.metadata()["auth_permissions"];
    assert_eq!(catalogue["instance"].as_array().map(Vec::len), Some(5));
    assert_eq!(catalogue["server"][0]["entitlement_name"], "admin");
    stack.running.stop().await;
}
