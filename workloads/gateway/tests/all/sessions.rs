//! Sessions from POST to the end.

use std::{sync::atomic::Ordering, time::Duration};

use fanlight_api::{
    bus::{GatewayRequest, GatewayResponse, InstanceState, gateway_sessions},
    gateway::Screen,
};
use reqwest::Method;
use serde_json::{Value, json};

use crate::rig::{Agent, Rig, eventually, send};

#[tokio::test]
async fn a_session_is_created_runs_and_ends() {
    let rig = Rig::new().await;
    // The exact default body of the original's SDK, to its path.
    let body = json!({
        "app": "terminal", "region": "", "joinable": false,
        "screen": { "width": 1280, "height": 720, "fps": 60, "density": 240 }, "extra_data": null,
    });
    let created = rig.post("/1.0/sessions/", body).await.expect(201)["metadata"].clone();
    let id = created["id"].as_str().expect("an id");
    assert_eq!(id.len(), 20);
    assert_eq!((&created["region"], &created["status"]), (&json!("here"), &json!("created")));
    assert_eq!(created["stun_servers"], json!([{ "urls": ["stun:127.0.0.1:5349"] }]));
    let start = format!("wss://{}/1.0/sessions/{id}/sockets/slave?token=", rig.address);
    assert!(created["url"].as_str().expect("a url").starts_with(&start), "{created}");
    let launch = &rig.agent.accepted()[0];
    assert_eq!((launch.app.as_str(), launch.attempt, launch.idle_time_min), ("terminal", 1, 30));

    rig.agent.set(id, InstanceState::Running, "");
    rig.until_status(id, Some("active")).await;
    let shown = rig.get(&format!("/1.0/sessions/{id}/")).await.expect(200)["metadata"].clone();
    assert_eq!(
        shown,
        json!({
            "id": id, "app": "terminal", "region": "here", "cluster_id": "cluster-agent0",
            "container_id": format!("i-{id}"), "joinable": false, "status": "active", "status_message": "",
        })
    );
    rig.ask(Method::DELETE, &format!("/1.0/sessions/{id}"), None).await.expect(200);
    rig.until_status(id, None).await;
    assert!(rig.agent.instances().is_empty());
    rig.ask(Method::DELETE, &format!("/1.0/sessions/{id}"), None).await.refused(404, id);
}

#[tokio::test]
async fn bad_requests_are_400_and_name_the_field() {
    let rig = Rig::new().await;
    for (body, part) in [
        (json!({}), "app is missing"),
        (json!({ "app": "" }), "app is missing"),
        (json!({ "app": 7 }), "app: "),
        (json!({ "app": "x".repeat(300) }), "app is too long"),
        (json!({ "app": "unheard-of" }), "unheard-of"),
        (json!({ "app": "terminal", "app_version": 9 }), "version 9"),
        (json!({ "app": "terminal", "app_version": -2 }), "app_version is -2"),
        (json!({ "app": "terminal", "screen": { "width": 0 } }), "screen.width is 0"),
        (json!({ "app": "terminal", "screen": { "height": 99999 } }), "screen.height is 99999"),
        (json!({ "app": "terminal", "screen": { "width": 3840, "height": 3000 } }), "screen.height"),
        (json!({ "app": "terminal", "screen": { "fps": -1 } }), "screen.fps is -1"),
        (json!({ "app": "terminal", "screen": { "density": 7 } }), "screen.density is 7"),
        (json!({ "app": "terminal", "screen": { "width": "wide" } }), "screen.width"),
        (json!({ "app": "terminal", "idle_time_min": -1 }), "idle_time_min is -1"),
        (json!({ "app": "terminal", "joinable": "yes" }), "joinable"),
        (json!({ "app": "terminal", "extra_data": "x".repeat(70_000) }), "extra_data has"),
        (json!([1]), "the body is not usable"),
    ] {
        rig.post("/1.0/sessions", body).await.refused(400, part);
    }
    let raw = |body: Vec<u8>| {
        let request = rig.client.post(rig.url("/1.0/sessions"));
        send(request.header("authorization", format!("macaroon root={}", rig.token)).body(body))
    };
    raw(b"{\"app\": ".to_vec()).await.refused(400, "line 1");
    raw(vec![]).await.refused(400, "empty");
    raw(vec![b' '; 2 * 1024 * 1024]).await.refused(413, "too large");
    rig.post("/1.0/sessions", json!({ "app": "terminal", "region": "moon" })).await.refused(404, "moon");
    assert!(rig.agent.accepted().is_empty());
    let listed = rig.get("/1.0/sessions").await.expect(200);
    assert_eq!((&listed["metadata"], &listed["total_size"]), (&json!([]), &json!(0)));
    let odd =
        json!({ "app": "terminal", "app_version": 0, "screen": { "width": 1279, "height": 719 }, "new": 1 });
    rig.post("/1.0/sessions", odd).await.expect(201);
    let screen = Screen { width: 1280, height: 720, ..Screen::default() };
    assert_eq!((rig.agent.accepted()[0].screen, rig.agent.accepted()[0].app_version), (screen, Some(0)));
}

#[tokio::test]
async fn an_agent_that_refuses_or_is_silent_is_passed_over() {
    let rig = Rig::new().await;
    rig.agent.refuse("no-capacity", "no node has 4 free CPUs");
    rig.post("/1.0/sessions", json!({ "app": "terminal" })).await.refused(404, "no node has 4 free CPUs");
    assert_eq!(rig.get("/1.0/sessions").await.expect(200)["metadata"], json!([]));
    let second = Agent::start(rig.bus.clone(), "agent1", "here").await;
    eventually(|| async { rig.get("/1.0/status").await.expect(200)["metadata"]["agents"] == 2 }).await;
    for _ in 0..5 {
        rig.create(json!({})).await;
    }
    assert_eq!(second.accepted().len(), 5);
    drop(second);
    // The silent one may have launched; what it reports later is ended.
    let third = Agent::start(rig.bus.clone(), "agent2", "there").await;
    let there = json!({ "app": "terminal", "region": "there" });
    eventually(|| async {
        rig.get("/1.0/regions").await.expect(200)["metadata"].to_string().contains("there")
    })
    .await;
    third.swallow(1);
    rig.post("/1.0/sessions", there).await.refused(404, "does not answer");
    let id = third.accepted()[0].session_id.to_string();
    eventually(|| async { third.instances().is_empty() }).await;
    assert!(third.ended(&id) >= 1);
}

#[tokio::test]
async fn lists_are_paged_sorted_and_filtered() {
    let rig = Rig::new().await;
    let mut ids = Vec::new();
    for app in ["terminal", "paint", "terminal"] {
        let created = rig.create(json!({ "app": app })).await;
        ids.push(created["id"].as_str().expect("an id").to_owned());
    }
    rig.agent.set(&ids[1], InstanceState::Running, "");
    rig.until_status(&ids[1], Some("active")).await;
    let list = |query: &'static str| {
        let rig = &rig;
        async move {
            let body = rig.get(&format!("/1.0/sessions?{query}")).await.expect(200);
            (body["metadata"].clone(), body["total_size"].as_u64().expect("a size"))
        }
    };
    assert_eq!(list("").await, (json!(ids), 3));
    assert_eq!(list("limit=1&offset=1").await, (json!([ids[1]]), 3));
    assert_eq!(list("status=active").await, (json!([ids[1]]), 1));
    assert_eq!(list("sort_by=app&limit=1").await.0, json!([ids[1]]));
    assert_eq!(list("sort_by=id&sort_order=desc").await.0, json!([ids[2], ids[1], ids[0]]));
    for recursion in ["recursion=true", "recursive=1"] {
        assert_eq!(list(recursion).await.0[0]["app"], "terminal");
    }
    for bad in ["status=fine", "limit=-1", "offset=x", "sort_by=colour", "sort_order=up", "recursion=perhaps"]
    {
        let name = bad.split('=').next().expect("a name");
        rig.get(&format!("/1.0/sessions?{bad}")).await.refused(400, name);
    }
    rig.get("/1.0/sessions/a%2Fb").await.refused(400, "a/b");
    let applications = rig.get("/1.0/applications").await.expect(200)["metadata"].clone();
    assert_eq!(applications[0]["name"], "paint");
    assert_eq!(rig.get("/1.0/regions/").await.expect(200)["metadata"], json!([{ "name": "here" }]));
}

#[tokio::test]
async fn several_sessions_are_deleted_at_once() {
    let rig = Rig::new().await;
    let mut ids = Vec::new();
    for _ in 0..3 {
        ids.push(rig.create(json!({})).await["id"].as_str().expect("an id").to_owned());
    }
    let delete = |query: &'static str, body: Value| {
        let path = format!("/1.0/sessions{query}");
        let rig = &rig;
        async move { rig.ask(Method::DELETE, &path, Some(body)).await }
    };
    delete("", json!({ "ids": ["unknown"] })).await.refused(404, "none of these");
    delete("", json!({ "ids": [] })).await.refused(400, "ids");
    delete("", json!({})).await.refused(400, "ids");
    let mixed =
        delete("?sync=true", json!({ "ids": [ids[0], "unknown"] })).await.expect(207)["metadata"].clone();
    assert_eq!(mixed["deleted_sessions"], json!([ids[0]]));
    assert_eq!(
        (&mixed["errors"][0]["session_id"], &mixed["errors"][0]["status_code"]),
        (&json!("unknown"), &json!(404))
    );
    assert_eq!(rig.status_of(&ids[0]).await, None, "sync waits");
    delete("?sync=false", json!({ "ids": [ids[1]] })).await.expect(202);
    rig.until_status(&ids[1], None).await;
    delete("?sync=true", json!({ "ids": [ids[2]] })).await.expect(200);
}

#[tokio::test]
async fn statuses_and_the_record_follow_the_instance() {
    let rig = Rig::new().await;
    let kept = rig.create(json!({ "ephemeral": false })).await;
    let kept = kept["id"].as_str().expect("an id");
    let gone = rig.create(json!({})).await;
    let gone = gone["id"].as_str().expect("an id");
    for id in [kept, gone] {
        rig.agent.set(id, InstanceState::Failed, "the application ended with status 3");
        rig.until_status(id, Some("error")).await;
        let shown = rig.get(&format!("/1.0/sessions/{id}")).await.expect(200);
        assert_eq!(shown["metadata"]["status_message"], "the application ended with status 3");
        rig.post(&format!("/1.0/sessions/{id}/join"), json!({})).await.refused(400, "ended with status 3");
        rig.agent.set(id, InstanceState::Running, "");
        rig.until_status(id, Some("active")).await;
        rig.agent.set(id, InstanceState::Stopped, "");
    }
    rig.until_status(kept, Some("terminated")).await;
    rig.until_status(gone, None).await;
    rig.ask(Method::DELETE, &format!("/1.0/sessions/{kept}"), None).await.expect(200);
    assert_eq!(rig.status_of(kept).await, None);
}

#[tokio::test]
async fn a_session_whose_instance_vanished_does_not_hang() {
    let rig = Rig::new().await;
    let created = rig.create(json!({})).await;
    let id = created["id"].as_str().expect("an id");
    rig.agent.set(id, InstanceState::Running, "");
    rig.until_status(id, Some("active")).await;
    rig.agent.remove(id);
    rig.until_status(id, None).await;
}

#[tokio::test]
async fn what_was_lost_on_the_way_is_asked_again() {
    let rig = Rig::new().await;
    let created = rig.create(json!({})).await;
    let id = created["id"].as_str().expect("an id");
    // The agent forgets the launch, as by a restart: it is given again, as the same attempt.
    rig.agent.remove(id);
    eventually(|| async { rig.agent.accepted().len() > 1 || rig.agent.instances().len() == 1 }).await;
    assert!(rig.agent.accepted().iter().all(|launch| launch.attempt == 1));
    rig.agent.set(id, InstanceState::Running, "");
    rig.until_status(id, Some("active")).await;
    // The end is asked for until the instance is gone.
    rig.agent.stick(Some(InstanceState::Ending));
    rig.ask(Method::DELETE, &format!("/1.0/sessions/{id}"), None).await.expect(200);
    eventually(|| async { rig.agent.ended(id) >= 2 }).await;
    assert_eq!(rig.status_of(id).await.as_deref(), Some("terminating"));
    rig.agent.stick(None);
    rig.until_status(id, None).await;
}

#[tokio::test]
async fn force_removes_a_session_whose_agent_is_silent_and_ends_it_when_the_agent_is_back() {
    let rig = Rig::new().await;
    let created = rig.create(json!({})).await;
    let id = created["id"].as_str().expect("an id");
    rig.agent.set(id, InstanceState::Running, "");
    rig.until_status(id, Some("active")).await;
    rig.agent.silent.store(true, Ordering::SeqCst);
    rig.ask(Method::DELETE, &format!("/1.0/sessions/{id}?force=true"), None).await.expect(200);
    assert_eq!(rig.status_of(id).await, None);
    assert_eq!(rig.agent.instances(), [id]);
    rig.agent.silent.store(false, Ordering::SeqCst);
    eventually(|| async { rig.agent.instances().is_empty() }).await;
}

#[tokio::test]
async fn a_restart_of_the_gateway_loses_nothing() {
    let mut rig = Rig::new().await;
    let running = rig.create(json!({})).await;
    let running = running["id"].as_str().expect("an id");
    let ending = rig.create(json!({})).await;
    let ending = ending["id"].as_str().expect("an id");
    rig.agent.set(running, InstanceState::Running, "");
    rig.until_status(running, Some("active")).await;
    rig.agent.stick(Some(InstanceState::Ending));
    rig.ask(Method::DELETE, &format!("/1.0/sessions/{ending}"), None).await.expect(200);
    rig.stop().await;
    rig.agent.stick(None);
    rig.start().await;
    assert_eq!(rig.status_of(running).await.as_deref(), Some("active"));
    rig.until_status(ending, None).await;
    rig.create(json!({})).await;
}

#[tokio::test]
async fn a_repeated_create_with_a_key_is_the_same_session() {
    let rig = Rig::new().await;
    let create = |key: &'static str, app: &'static str| {
        let request = rig.client.post(rig.url("/1.0/sessions")).header("idempotency-key", key);
        let request = request.header("authorization", format!("macaroon root={}", rig.token));
        send(request.body(json!({ "app": app }).to_string()))
    };
    let first = create("k1", "terminal").await.expect(201)["metadata"]["id"].clone();
    assert_eq!(create("k1", "terminal").await.expect(201)["metadata"]["id"], first);
    assert_ne!(create("k2", "terminal").await.expect(201)["metadata"]["id"], first);
    // Also after a client has used the socket of the first answer.
    let url = |created: &Value| created["metadata"]["url"].as_str().expect("a url").to_owned();
    let used = create("k1", "terminal").await.expect(201);
    drop(crate::relay::open(&rig, &url(&used), None).await.expect("opens"));
    let again = create("k1", "terminal").await.expect(201);
    assert_eq!(again["metadata"]["id"], first);
    drop(crate::relay::open(&rig, &url(&again), None).await.expect("opens as well"));
    create("k1", "paint").await.refused(409, "Idempotency-Key");
    create("", "paint").await.refused(400, "Idempotency-Key");
}

#[tokio::test]
async fn ams_gets_one_session_per_instance() {
    let rig = Rig::new().await;
    let request = |instance: &str| GatewayRequest::CreateSession {
        agent_id: "agent0".parse().expect("id"),
        region: "here".into(),
        cluster_id: "cluster-agent0".into(),
        instance_id: instance.parse().expect("id"),
        app: "paint".into(),
        screen: Screen::default(),
    };
    let ask = |request: GatewayRequest| {
        let bus = rig.bus.clone();
        async move {
            let answer = bus.request_json(&gateway_sessions(), &request, Duration::from_secs(10)).await;
            answer.expect("an answer")
        }
    };
    let (first, again) = tokio::join!(ask(request("i1")), ask(request("i1")));
    let GatewayResponse::Created { session_id, joinable: true, idle_time_min: 0 } = first else {
        panic!("{first:?}")
    };
    assert!(
        matches!(&again, GatewayResponse::Created { session_id: same, .. } if *same == session_id),
        "{again:?}"
    );
    let id = session_id.as_str();
    assert_eq!(rig.get(&format!("/1.0/sessions/{id}")).await.expect(200)["metadata"]["container_id"], "i1");
    assert_eq!(rig.agent.accepted(), [], "AMS starts the instance by itself");
    rig.agent.set(id, InstanceState::Running, "");
    rig.until_status(id, Some("active")).await;
    rig.post(&format!("/1.0/sessions/{id}/join"), json!({ "disconnect_clients": true })).await.expect(200);
    rig.agent.remove(id);
    let ended: GatewayResponse = ask(GatewayRequest::EndSession { session_id: session_id.clone() }).await;
    assert_eq!(ended, GatewayResponse::Ended);
    assert_eq!(rig.status_of(id).await, None);
    let anew = ask(request("i1")).await;
    assert!(
        matches!(&anew, GatewayResponse::Created { session_id: other, .. } if *other != session_id),
        "{anew:?}"
    );
}
