//! Addons, and the versions that applications get when something below them is newer.

use std::{path::PathBuf, sync::Arc};

use fanlight_ams::engine::{Script, SimulatedEngine};
use fanlight_api::ams::{
    Application, ApplicationPatch, InstancesPost, addons::AddonsPost, images::ImagesPost,
};
use fanlight_client::ClientError;
use fanlight_store::{Embedded, Handle};
use reqwest::Method;

use crate::{
    api::{Stack, terminal},
    stack::{PATIENCE, until},
};

const ADDONS: &str = "/1.0/addons";

async fn stack() -> Stack {
    let store: Handle = Arc::new(Embedded::memory());
    let folder = tempfile::tempdir().expect("made");
    let engine = SimulatedEngine::new(Script::Run).with_images();
    let stack = Stack::beside(folder, engine, store, |_| {}).await;
    let post = ImagesPost { name: "linux".into(), ..ImagesPost::default() };
    let operation = stack.client.upload_image(&post, &file(&stack, b"one")).await.expect("accepted");
    stack.client.wait(&operation, PATIENCE).await.expect("taken in");
    stack
}

fn file(stack: &Stack, content: &[u8]) -> PathBuf {
    let path = stack.folder.path().join("upload");
    std::fs::write(&path, content).expect("written");
    path
}

/// A package of these files; those below `hooks` can be executed.
fn package(files: &[(&str, &str)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(if name.starts_with("hooks/") { 0o755 } else { 0o644 });
        builder.append_data(&mut header, name, content.as_bytes()).expect("appended");
    }
    builder.into_inner().expect("finished")
}

async fn add(stack: &Stack, name: &str, files: &[(&str, &str)]) -> Result<(), ClientError> {
    let post = AddonsPost { name: name.into() };
    let file = file(stack, &package(files));
    let operation = stack.client.send_file(Method::POST, ADDONS, Some(&post), &file).await?;
    stack.client.wait(&operation, PATIENCE).await.map(drop)
}

async fn update(stack: &Stack, name: &str, files: &[(&str, &str)]) -> Result<(), ClientError> {
    let file = file(stack, &package(files));
    let operation = stack.client.update_with_file(ADDONS, name, &file).await?;
    stack.client.wait(&operation, PATIENCE).await.map(drop)
}

async fn create(stack: &Stack, files: &[(&str, &str)]) -> Result<(), ClientError> {
    let operation = stack.client.create_application(package(files).into()).await?;
    stack.client.wait(&operation, PATIENCE).await.map(drop)
}

async fn set(stack: &Stack, name: &str, value: &str) {
    let operation = stack.client.set_config(name, value).await.expect("taken");
    stack.client.wait(&operation, PATIENCE).await.expect("done");
}

async fn patch(stack: &Stack, patch: ApplicationPatch) {
    let operation = stack.client.patch("/1.0/applications", "terminal", &patch).await.expect("accepted");
    stack.client.wait(&operation, PATIENCE).await.expect("done");
}

fn refusal<T: std::fmt::Debug>(result: Result<T, ClientError>) -> String {
    match result {
        Err(ClientError::Refused { text, .. }) => text,
        other => panic!("not refused: {other:?}"),
    }
}

/// Waits until an application has this many versions, all of which can be launched.
async fn versions(stack: &Stack, count: usize) -> Application {
    until(&format!("{count} versions"), async || {
        let application = stack.client.application("terminal").await.expect("there");
        let active = application.versions.iter().all(|version| version.status == "active");
        (active && application.versions.len() == count).then_some(application)
    })
    .await
}

/// Addons of the newest version, `name@version`.
fn newest(application: &Application) -> Vec<String> {
    let version = application.versions.last().expect("there is one");
    version.addons.iter().map(|addon| format!("{}@{}", addon.name, addon.version)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn addons_are_added_updated_shown_and_removed() {
    let stack = stack().await;
    let manifest = ("manifest.yaml", "name: Tools\ndescription: what is often needed\n");
    for (name, files, part) in [
        ("", vec![manifest], "name is required"),
        ("a b", vec![manifest], "argument name is invalid"),
        ("../up", vec![manifest], "argument name is invalid"),
        ("tools", vec![("readme", "x")], "manifest.yaml: the file itself"),
        ("tools", vec![("manifest.yaml", "colour: red\n")], "unknown field `colour`"),
        ("tools", vec![("manifest.yaml", "hooks: {timeout: 16m}\n")], "hooks.timeout is invalid: 16m"),
    ] {
        let text = match add(&stack, name, &files).await {
            Err(ClientError::Refused { text, .. }) => text,
            other => panic!("{name}: {other:?}"),
        };
        assert!(text.contains(part), "{name}: {text}");
        assert!(stack.client.objects(ADDONS, &[]).await.expect("listed").is_empty());
    }
    add(&stack, "tools", &[manifest]).await.expect("added");
    assert!(refusal(add(&stack, "tools", &[manifest]).await).contains("addon tools already exists"));
    update(&stack, "tools", &[manifest]).await.expect("the same");
    update(&stack, "tools", &[manifest, ("file", "new")]).await.expect("updated");
    assert!(refusal(stack.client.object(ADDONS, "other").await).contains("addon not found"));
    let shown = stack.client.object(ADDONS, "tools").await.expect("there");
    let numbers: Vec<_> =
        shown["versions"].as_array().expect("a list").iter().map(|v| &v["version"]).collect();
    assert_eq!(format!("{numbers:?}"), "[Number(0), Number(1)]");
    assert!(shown["versions"][1]["size"].as_u64().is_some_and(|size| size > 512));
    assert_eq!(shown["versions"][1]["fingerprint"].as_str().map(str::len), Some(64));
    let packages = stack.folder.path().join("state/addons/tools");
    let there = |number: &str| packages.join(number).join("manifest.yaml").is_file();
    assert!(there("0") && there("1"));

    let operation = stack.client.remove_version(ADDONS, "tools", 0, false).await.expect("accepted");
    stack.client.wait(&operation, PATIENCE).await.expect("done");
    assert!(!there("0") && there("1"));
    assert!(refusal(stack.client.remove_version(ADDONS, "tools", 0, false).await).contains("not found"));
    let last = refusal(stack.client.remove_version(ADDONS, "tools", 1, false).await);
    assert!(last.contains("the last version of an addon"), "{last}");
    let operation = stack.client.remove(ADDONS, "tools", false).await.expect("accepted");
    stack.client.wait(&operation, PATIENCE).await.expect("done");
    assert!(!packages.exists());
    assert!(refusal(stack.client.remove(ADDONS, "tools", false).await).contains("addon not found"));
    stack.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hooks_of_addons_come_first_and_applications_follow_what_is_below_them() {
    let stack = stack().await;
    let of_addon = ("manifest.yaml", "name: addon\nhooks: {timeout: 7s}\n");
    let application = (
        "manifest.yaml",
        "name: terminal\ncommand: foot\nresources: {cpus: 1, memory: 64MB}\naddons: [two, one]\n",
    );
    let hook = "#!/bin/sh\n";
    let refused = refusal(create(&stack, &[application]).await);
    assert!(refused.contains("addon two not found"), "{refused}");
    add(&stack, "one", &[of_addon, ("hooks/pre-start", hook)]).await.expect("added");
    add(&stack, "two", &[of_addon, ("hooks/install", hook), ("hooks/prepare", hook)]).await.expect("added");
    add(&stack, "everywhere", &[of_addon]).await.expect("added");
    let unknown = refusal(stack.client.set_config("application.addons", "one,none").await);
    assert!(unknown.contains("addon none not found"), "{unknown}");
    set(&stack, "application.addons", "everywhere").await;
    set(&stack, "application.max_published_versions", "100").await;
    create(&stack, &[application, ("hooks/pre-start", hook)]).await.expect("made");
    let shown = versions(&stack, 1).await;
    assert_eq!(shown.addons, ["everywhere", "two", "one"]);
    assert_eq!(newest(&shown), ["everywhere@0", "two@0", "one@0"]);
    let hooks: Vec<String> = stack
        .engine
        .ran()
        .into_iter()
        .map(|mut command| command.remove(0))
        .filter(|c| c.contains("hooks"))
        .collect();
    assert_eq!(
        hooks,
        [
            "/var/lib/fanlight/addons/two/hooks/install",
            "/var/lib/fanlight/addons/one/hooks/pre-start",
            "/var/lib/fanlight/app/hooks/pre-start",
            "/var/lib/fanlight/addons/two/hooks/prepare",
        ]
    );
    let id = stack.launch().await;
    let addons = stack.engine.addons(&id.parse().expect("an id"));
    let told: Vec<_> = addons.iter().map(|a| (a.name.as_str(), a.hook_time_s, a.package.is_none())).collect();
    assert_eq!(told, [("everywhere", 7, true), ("two", 7, true), ("one", 7, true)]);
    for (name, part) in
        [("one", "in use by application terminal"), ("everywhere", "setting application.addons")]
    {
        let text = refusal(stack.client.remove(ADDONS, name, false).await);
        assert!(text.contains(part), "{text}");
    }

    // An addon is newer, then the image, then what every application has is another.
    update(&stack, "one", &[of_addon, ("file", "new")]).await.expect("updated");
    assert_eq!(newest(&versions(&stack, 2).await), ["everywhere@0", "two@0", "one@1"]);
    let operation = stack.client.update_image("linux", &file(&stack, b"two")).await.expect("accepted");
    stack.client.wait(&operation, PATIENCE).await.expect("taken in");
    let shown = versions(&stack, 3).await;
    let images: Vec<u32> = shown.versions.iter().map(|version| version.parent_image_version).collect();
    assert_eq!(images, [0, 0, 1]);
    set(&stack, "application.addons", "").await;
    assert_eq!(newest(&versions(&stack, 4).await), ["two@0", "one@1"]);

    // Where it is not wanted it is done when somebody asks.
    patch(&stack, ApplicationPatch { inhibit_auto_updates: Some(true), ..ApplicationPatch::default() }).await;
    update(&stack, "two", &[of_addon]).await.expect("updated");
    tokio::time::sleep(std::time::Duration::from_millis(800)).await;
    versions(&stack, 4).await;
    let operation = stack.client.refresh_application("terminal").await.expect("accepted");
    stack.client.wait(&operation, PATIENCE).await.expect("made");
    assert_eq!(newest(&versions(&stack, 5).await), ["two@1", "one@1"]);
    let operation = stack.client.refresh_application("terminal").await.expect("accepted");
    stack.client.wait(&operation, PATIENCE).await.expect("nothing to do");
    patch(&stack, ApplicationPatch { addons: Some(vec!["one".into()]), ..ApplicationPatch::default() }).await;
    assert_eq!(newest(&versions(&stack, 6).await), ["one@1"]);
    let other = ApplicationPatch { image: Some("other".into()), ..ApplicationPatch::default() };
    assert!(
        refusal(stack.client.patch("/1.0/applications", "terminal", &other).await)
            .contains("image not found")
    );
    // The package of a version is its own, whichever it was made of.
    let application = stack.client.application("terminal").await.expect("there");
    let folder = stack.folder.path().join("state/packages").join(application.id.as_str());
    assert!(folder.join("5/hooks/pre-start").is_file() && folder.join("5/manifest.yaml").is_file());
    stack.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_of_an_image_gets_what_its_addons_bring() {
    let stack = stack().await;
    add(&stack, "tools", &[("manifest.yaml", "name: tools\n")]).await.expect("added");
    let post = |addons: &[&str]| InstancesPost {
        image_id: "linux".into(),
        addons: addons.iter().map(ToString::to_string).collect(),
        ..InstancesPost::default()
    };
    let unknown = refusal(stack.client.launch(&post(&["other"]), true, None).await);
    assert!(unknown.contains("addon other not found"), "{unknown}");
    let operation = stack.client.launch(&post(&["tools", "tools"]), false, None).await.expect("accepted");
    let operation = stack.client.wait(&operation, PATIENCE).await.expect("running");
    let id = operation.resource("instances").expect("named").to_owned();
    let addons = stack.engine.addons(&id.parse().expect("an id"));
    assert_eq!((addons.len(), addons[0].hook_time_s), (1, 300));
    assert!(addons[0].package.as_ref().is_some_and(|package| package.join("manifest.yaml").is_file()));
    let text = refusal(stack.client.remove(ADDONS, "tools", false).await);
    assert!(text.contains(&format!("in use by instance {id}")), "{text}");
    create(&stack, &[("manifest.yaml", "name: terminal\ncommand: foot\n")]).await.expect("made");
    let both = InstancesPost { addons: vec!["tools".into()], ..terminal() };
    let text = refusal(stack.client.launch(&both, true, None).await);
    assert!(text.contains("argument addons is invalid"), "{text}");
    stack.running.stop().await;
}
