//! Configuration at run time, the diagnosis, regions, and the description of the API.

use std::{collections::BTreeMap, path::Path};

use reqwest::Method;
use serde_json::{Value, json};

use crate::rig::{Agent, Rig, eventually, send};

#[tokio::test]
async fn items_of_configuration_are_shown_changed_and_refused_by_name() {
    let mut rig = Rig::new().await;
    let shown = rig.get("/1.0/config").await.expect(200)["metadata"]["config"].clone();
    assert_eq!(shown["sessions.idle_time_min"], "30");
    let set = |name: &str, value: &str| json!({ "name": name, "value": value });
    for (body, part) in [
        (set("colour", "red"), "no config item \"colour\""),
        (set("sessions.idle_time_min", "soon"), "a number from 0"),
        (json!({ "name": "colour" }), "value"),
    ] {
        rig.ask(Method::PATCH, "/1.0/config", Some(body)).await.refused(400, part);
    }
    let idle = set("sessions.idle_time_min", "7");
    rig.ask(Method::PATCH, "/1.0/config", Some(idle)).await.expect(200);
    rig.create(json!({})).await;
    assert_eq!(rig.agent.accepted().last().map(|launch| launch.idle_time_min), Some(7));
    let page = "https://page.example";
    let preflight = || {
        let request = rig.client.request(Method::OPTIONS, rig.url("/1.0/sessions"));
        request.header("origin", page).header("access-control-request-method", "POST").send()
    };
    assert_ne!(preflight().await.expect("answered").status(), 204);
    let origins = set("cors.origins", page);
    rig.ask(Method::PATCH, "/1.0/config", Some(origins)).await.expect(200);
    let answer = preflight().await.expect("answered");
    assert_eq!(answer.status(), 204);
    assert_eq!(answer.headers()["access-control-allow-origin"], page);
    // Kept, and taken back.
    rig.stop().await;
    rig.start().await;
    let shown = rig.get("/1.0/config").await.expect(200)["metadata"]["config"].clone();
    assert_eq!((&shown["sessions.idle_time_min"], &shown["cors.origins"]), (&json!("7"), &json!(page)));
    let default = set("sessions.idle_time_min", "");
    rig.ask(Method::PATCH, "/1.0/config", Some(default)).await.expect(200);
    let shown = rig.get("/1.0/config").await.expect(200)["metadata"]["config"].clone();
    assert_eq!(shown["sessions.idle_time_min"], "30");
}

#[tokio::test]
async fn a_rate_set_at_run_time_is_kept_and_excess_is_429() {
    let rig = Rig::new().await;
    let set = json!({ "name": "limits.requests_per_second", "value": "5" });
    rig.ask(Method::PATCH, "/1.0/config", Some(set)).await.expect(200);
    let answers = futures_util::future::join_all((0..40).map(|_| rig.get("/1.0/regions"))).await;
    let refused: Vec<_> = answers.into_iter().filter(|answer| answer.status == 429).collect();
    assert!(refused.len() >= 20, "{} of 40", refused.len());
    assert!(refused.iter().all(|answer| answer.headers["retry-after"] == "1"));
}

#[tokio::test]
async fn accounts_that_may_only_launch_change_nothing_else() {
    let rig = Rig::new().await;
    let launcher = json!({ "name": "launcher", "rights": "launch" });
    let made = rig.internal(Method::POST, "/1.0/accounts", Some(launcher)).await.expect(201);
    let header = format!("macaroon root={}", made["metadata"]["token"].as_str().expect("a token"));
    let ask = |method: Method, path: &str| {
        send(rig.client.request(method, rig.url(path)).header("authorization", &header))
    };
    ask(Method::GET, "/1.0/regions").await.expect(200);
    for (method, path) in [
        (Method::GET, "/1.0/config"),
        (Method::PATCH, "/1.0/config"),
        (Method::GET, "/1.0/shares"),
        (Method::GET, "/1.0/shares/x-y"),
        (Method::DELETE, "/1.0/shares/x-y"),
    ] {
        ask(method, path).await.refused(403, "only launch and join");
    }
}

#[tokio::test]
async fn tokens_of_new_accounts_expire_when_the_configuration_says_so() {
    let rig = Rig::new().await;
    let set = json!({ "name": "accounts.token_days", "value": "365" });
    rig.ask(Method::PATCH, "/1.0/config", Some(set)).await.expect(200);
    rig.internal(Method::POST, "/1.0/accounts", Some(json!({ "name": "yearly" }))).await.expect(201);
    let accounts = rig.internal(Method::GET, "/1.0/accounts", None).await.expect(200)["metadata"].clone();
    let of = |name: &str| {
        accounts
            .as_array()
            .expect("list")
            .iter()
            .find(|account| account["name"] == name)
            .expect("there")
            .clone()
    };
    let (yearly, tests) = (of("yearly"), of("tests"));
    let days = yearly["expiry_at"].as_i64().expect("set") - yearly["created_at"].as_i64().expect("set");
    assert_eq!(days, 365 * 86_400);
    assert!(tests.get("expiry_at").is_none());
}

#[tokio::test]
async fn regions_tell_more_when_asked_and_the_nearest_one_gets_the_session() {
    let rig = Rig::with(|config| config.placement.trusted_proxies = vec!["10.0.0.0/8".into()]).await;
    let tokyo = Agent::start_at(rig.bus.clone(), "agent1", "tokyo", Some((35.7, 139.7))).await;
    let paris = Agent::start_at(rig.bus.clone(), "agent2", "paris", Some((48.9, 2.4))).await;
    let regions = || async { rig.get("/1.0/regions").await.expect(200)["metadata"].clone() };
    eventually(|| async { regions().await.as_array().map(Vec::len) == Some(3) }).await;
    assert_eq!(regions().await, json!([{ "name": "here" }, { "name": "paris" }, { "name": "tokyo" }]));
    let detailed = rig.get("/1.0/regions?recursion=true").await.expect(200)["metadata"].clone();
    assert_eq!(detailed[1]["stun_servers"], json!(["stun:paris.example:3478"]));
    assert_eq!(detailed[1]["location"], json!({ "latitude": 48.9, "longitude": 2.4 }));
    rig.get("/1.0/regions?recursion=maybe").await.refused(400, "recursion is \"maybe\"");

    let lyon = json!({ "latitude": 45.8, "longitude": 4.8 });
    for _ in 0..5 {
        let near = rig.create(json!({ "location": lyon })).await;
        assert_eq!(near["region"], "paris");
        let measured =
            rig.create(json!({ "location": lyon, "round_trips": { "tokyo": 8.5, "paris": 200 } })).await;
        assert_eq!(measured["region"], "tokyo");
    }
    assert!(tokyo.accepted().len() == 5 && paris.accepted().len() == 5);
    for (more, part) in [
        (json!({ "location": { "latitude": 91.0, "longitude": 0.0 } }), "location is 91"),
        (json!({ "location": { "latitude": 1.0 } }), "longitude"),
        (json!({ "client_address": "nowhere" }), "client_address is \"nowhere\""),
        (json!({ "round_trips": { "paris": -1 } }), "round_trips says -1"),
        (json!({ "round_trips": { "paris": "fast" } }), "round_trips"),
    ] {
        let mut body = json!({ "app": "terminal" });
        body.as_object_mut().expect("object").extend(more.as_object().expect("object").clone());
        rig.post("/1.0/sessions", body).await.refused(400, part);
    }
    // Without a database an address tells nothing and hurts nothing.
    rig.create(json!({ "client_address": "192.0.2.1" })).await;
}

#[tokio::test]
async fn the_diagnosis_names_what_is_broken() {
    let rig = Rig::new().await;
    let diagnose = || async { rig.get("/1.0/doctor").await.expect(200)["metadata"].clone() };
    let status = |diagnosis: &Value, step: &str| {
        let checks = diagnosis["checks"].as_array().expect("checks").clone();
        checks.into_iter().find(|check| check["step"] == step).expect("a step")["status"].clone()
    };
    let fine = diagnose().await;
    for step in ["store", "bus", "certificate", "agents", "ams", "clocks", "applications", "capacity"] {
        assert_eq!(status(&fine, step), "ok", "{step}: {fine}");
    }
    assert_eq!(status(&fine, "turn"), "skipped", "nothing but this machine");
    assert_eq!(fine["stun_servers"]["here"][0]["urls"], json!(["stun:127.0.0.1:5349"]));
    send(rig.client.get(rig.url("/1.0/doctor"))).await.refused(401, "API token");
}

#[tokio::test]
async fn the_description_lists_every_route_and_no_other() {
    let rig = Rig::new().await;
    let request = rig.local.get("http://gateway/1.0/swagger.json");
    let document: Value = request.send().await.expect("answered").json().await.expect("JSON");
    assert_eq!(document, fanlight_gateway::openapi(true));
    send(rig.client.get(rig.url("/1.0/swagger.json"))).await.refused(404, "");
    let mut known: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (path, operations) in document["paths"].as_object().expect("paths") {
        for method in operations.as_object().expect("operations").keys() {
            known.entry(path).or_default().push(method);
        }
    }
    for (path, methods) in known {
        let at = path.replace("{id}", "x-y").replace("{role}", "slave").replace("{name}", "x");
        for method in ["get", "post", "put", "patch", "delete"] {
            let asked = Method::from_bytes(method.to_uppercase().as_bytes()).expect("a method");
            // Through the unix socket, where everything is.
            let answer =
                rig.local.request(asked, format!("http://gateway{at}")).send().await.expect("answered");
            let refused = answer.status() == 405;
            assert_eq!(refused, !methods.contains(&method), "{method} {path}: {}", answer.status());
        }
    }
}

#[test]
fn the_description_in_the_documentation_is_the_one_that_is_served() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/reference/api/gateway.json");
    let document = serde_json::to_string_pretty(&fanlight_gateway::openapi(true)).expect("JSON") + "\n";
    if std::env::var_os("FANLIGHT_GENERATE").is_some() {
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("made");
        std::fs::write(&path, &document).expect("written");
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(written == document, "docs/reference/api/gateway.json is not up to date: run `./dev generate`");
}
