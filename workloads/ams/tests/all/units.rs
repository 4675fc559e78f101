//! Several units of AMS over one store and one engine: each instance is looked after by one of them, all answer for all,
//! and the part of one that ends is taken over.

use std::sync::Arc;

use fanlight_ams::{
    Phase,
    engine::{Engine as _, Script, SimulatedEngine},
};
use fanlight_api::{
    InstanceId,
    ams::{ApplicationPatch, InstanceStatus, addons::AddonsPost, images::ImagesPost},
};
use fanlight_store::{Embedded, Handle};
use futures_util::StreamExt as _;
use reqwest::Method;
use serde_json::Value;

use crate::{
    api::{Stack, tar_of, terminal},
    stack::{PATIENCE, until},
};

async fn units(script: Script, names: &[&str]) -> (Vec<Stack>, SimulatedEngine) {
    units_on(SimulatedEngine::new(script), names).await
}

async fn units_on(engine: SimulatedEngine, names: &[&str]) -> (Vec<Stack>, SimulatedEngine) {
    let store: Handle = Arc::new(Embedded::memory());
    let mut units = Vec::new();
    for name in names {
        let folder = tempfile::tempdir().expect("made");
        let unit = Stack::beside(folder, engine.clone(), store.clone(), |config| {
            config.unit = (*name).to_owned();
            config.node.cpus = 1000;
            config.node.memory = "1000GB".into();
        });
        units.push(unit.await);
    }
    (units, engine)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_one_unit_accepts_is_carried_out_whoever_owns_it_and_every_unit_tells_of_it() {
    let (units, engine) = units(Script::Run, &["a", "b", "c"]).await;
    units[0].application().await;
    let endpoint = units[2].client.endpoint();
    let events = endpoint.websocket("/1.0/events?type=lifecycle", Default::default()).await.expect("open");
    let mut events = std::pin::pin!(events);
    let mut ids = Vec::new();
    for number in 0..12 {
        // Waited for at a unit that mostly does not own it.
        let unit = &units[number % 2].client;
        let operation = unit.launch(&terminal(), false, None).await.expect("accepted");
        let operation = unit.wait(&operation, PATIENCE).await.expect("ends");
        assert!(operation.succeeded(), "{operation:?}");
        ids.push(operation.resource("instances").expect("named").to_owned());
    }
    for unit in &units {
        let list = unit.client.instances(&[]).await.expect("listed");
        assert_eq!(list.len(), ids.len());
        assert!(list.iter().all(|instance| instance.status() == InstanceStatus::Running), "{list:?}");
    }
    let mut running = std::collections::BTreeSet::new();
    while running.len() < ids.len() {
        let message = tokio::time::timeout(PATIENCE, events.next()).await.expect("in time");
        let Ok(text) = message.expect("open").expect("a frame").into_text() else { continue };
        let event: Value = serde_json::from_str(&text).expect("JSON");
        if event["metadata"]["action"] == "instance-running" {
            assert!(running.insert(event["metadata"]["source"].to_string()), "told twice: {event}");
        }
    }
    for (number, id) in ids.iter().enumerate() {
        let unit = &units[number % 3].client;
        let operation = unit.delete_instance(id, false).await.expect("accepted");
        assert!(unit.wait(&operation, PATIENCE).await.expect("ends").succeeded());
    }
    assert!(engine.list().await.expect("listed").is_empty());
    for unit in units {
        unit.running.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_uploaded_to_one_unit_is_fetched_by_the_others_and_by_nobody_else() {
    let engine = SimulatedEngine::new(Script::Run).with_images();
    let (mut units, _) = units_on(engine, &["a", "b"]).await;
    let first = &units[0];
    let file = first.folder.path().join("upload");
    let upload = |content: &[u8]| std::fs::write(&file, content).expect("written");
    let wait = async |unit: &Stack, operation| {
        unit.client.wait(&operation, PATIENCE).await.expect("done");
    };
    upload(b"an image");
    let post = ImagesPost { name: "linux".into(), ..ImagesPost::default() };
    wait(first, first.client.upload_image(&post, &file).await.expect("accepted")).await;
    upload(&tar_of("name: tools\n"));
    let post = AddonsPost { name: "tools".into() };
    let operation = first.client.send_file(Method::POST, "/1.0/addons", Some(&post), &file).await;
    wait(first, operation.expect("accepted")).await;
    let manifest = "name: terminal\ncommand: foot\nresources: {cpus: 1, memory: 64MB}\n";
    wait(first, first.client.create_application(tar_of(manifest).into()).await.expect("accepted")).await;

    // The other unit says and makes what lies at the first one.
    let second = &units[1];
    let told = second.client.application_manifest("terminal").await.expect("fetched");
    assert_eq!(told, manifest);
    let patch = ApplicationPatch { addons: Some(vec!["tools".into()]), ..ApplicationPatch::default() };
    let operation = second.client.patch("/1.0/applications", "terminal", &patch).await.expect("accepted");
    wait(second, operation).await;
    let application = second.client.application("terminal").await.expect("there");
    assert_eq!((application.versions.len(), application.versions[1].status.as_str()), (2, "active"));
    let lies = |unit: &Stack, path: &str| unit.folder.path().join("state").join(path).is_dir();
    let package = |version: u32| format!("packages/{}/{version}", application.id);
    assert!(lies(second, &package(0)) && lies(second, &package(1)) && lies(second, "addons/tools/0"));
    assert!(lies(first, &package(0)) && !lies(first, &package(1)));
    let mut archive = Vec::new();
    assert!(first.client.export_application("terminal", 1, &mut archive).await.expect("fetched"));
    assert!(lies(first, &package(1)));

    // Administrators are no units.
    let internal = format!("applications/{}/0", application.id);
    let refused = first.client.unit_package(&internal, &mut Vec::new()).await.expect_err("refused");
    assert!(refused.to_string().contains("only units"), "{refused}");

    // Where the one that has it is gone, it is said.
    let operation = second.client.refresh_application("terminal").await.expect("accepted");
    wait(second, operation).await;
    upload(&tar_of("name: tools\ndescription: newer\n"));
    let inhibit = ApplicationPatch { inhibit_auto_updates: Some(true), ..ApplicationPatch::default() };
    wait(second, second.client.patch("/1.0/applications", "terminal", &inhibit).await.expect("accepted"))
        .await;
    wait(second, second.client.update_with_file("/1.0/addons", "tools", &file).await.expect("accepted"))
        .await;
    units.remove(1).running.stop().await;
    let first = &units[0];
    let operation = first.client.refresh_application("terminal").await.expect("accepted");
    let error = first.client.wait(&operation, PATIENCE).await.expect_err("it is away").to_string();
    assert!(error.contains("addons/tools/1 does not lie at this unit"), "{error}");
    units.remove(0).running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_part_of_a_unit_that_ends_is_taken_over() {
    let (mut units, engine) = units(Script::Run, &["a", "b"]).await;
    units[0].application().await;
    let mut ids = Vec::new();
    for _ in 0..10 {
        ids.push(units[0].launch().await);
    }
    // It gives its lease back; one that is killed loses it after some seconds.
    units.remove(1).running.stop().await;
    for id in &ids {
        let operation = units[0].client.stop_instance(id, false).await.expect("accepted");
        let operation = units[0].client.wait(&operation, PATIENCE).await.expect("ends");
        assert!(operation.succeeded(), "{operation:?}");
    }
    for id in ids {
        let id: InstanceId = id.parse().expect("an id");
        let seen = until("it has ended", async || {
            let seen = engine.seen(&id).await;
            matches!(seen.phase, Phase::Ended(_)).then_some(seen)
        });
        assert_eq!(seen.await.run, 1);
    }
    units.remove(0).running.stop().await;
}
