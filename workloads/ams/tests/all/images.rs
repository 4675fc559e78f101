//! Images, and applications that are made on top of them.

use std::{path::PathBuf, sync::Arc};

use fanlight_ams::engine::{Script, SimulatedEngine};
use fanlight_api::ams::{
    InstancesPost,
    images::{ImagePatch, ImageSource, ImagesPost},
};
use fanlight_client::ClientError;
use fanlight_store::{Embedded, Handle};

use crate::{
    api::{Stack, tar_of, terminal},
    stack::PATIENCE,
};

async fn stack() -> Stack {
    let store: Handle = Arc::new(Embedded::memory());
    let folder = tempfile::tempdir().expect("made");
    Stack::beside(folder, SimulatedEngine::new(Script::Run).with_images(), store, |_| {}).await
}

fn file(stack: &Stack, content: &str) -> PathBuf {
    let path = stack.folder.path().join("image.tar");
    std::fs::write(&path, content).expect("written");
    path
}

fn named(name: &str) -> ImagesPost {
    ImagesPost { name: name.into(), ..ImagesPost::default() }
}

async fn image(stack: &Stack, name: &str, content: &str) {
    let operation = stack.client.upload_image(&named(name), &file(stack, content)).await.expect("accepted");
    stack.client.wait(&operation, PATIENCE).await.expect("taken in");
}

fn refusal<T: std::fmt::Debug>(result: Result<T, ClientError>) -> String {
    match result {
        Err(ClientError::Refused { text, .. }) => text,
        other => panic!("not refused: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn images_are_taken_in_updated_made_the_default_and_deleted() {
    let stack = stack().await;
    let missing = stack.client.create_application(tar_of("name: app\ncommand: x\n").into()).await;
    assert!(refusal(missing).contains("image not found"));
    image(&stack, "first", "one").await;
    image(&stack, "second", "two").await;
    let again = stack.client.upload_image(&named("first"), &file(&stack, "x")).await;
    assert!(refusal(again).contains("already exists"));
    let unnamed = stack.client.upload_image(&named(""), &file(&stack, "x")).await;
    assert!(refusal(unnamed).contains("name is required"));

    let list = stack.client.objects("/1.0/images", &[]).await.expect("listed");
    let defaults: Vec<_> = list.iter().map(|image| (&image["name"], &image["default"])).collect();
    assert_eq!(
        format!("{defaults:?}"),
        r#"[(String("first"), Bool(true)), (String("second"), Bool(false))]"#
    );
    let patch = ImagePatch { default: Some(true), ..ImagePatch::default() };
    let operation = stack.client.patch_image("second", &patch).await.expect("accepted");
    stack.client.wait(&operation, PATIENCE).await.expect("done");
    let only = stack.client.value("/1.0/images?default=true").await.expect("answered");
    assert_eq!((only[0]["name"].as_str(), only.as_array().map(Vec::len)), (Some("second"), Some(1)));

    let operation = stack.client.update_image("first", &file(&stack, "three")).await.expect("accepted");
    stack.client.wait(&operation, PATIENCE).await.expect("taken in");
    let operation = stack.client.update_image("first", &file(&stack, "broken")).await.expect("accepted");
    let error = stack.client.wait(&operation, PATIENCE).await.expect_err("damaged").to_string();
    assert!(error.contains("it is damaged"), "{error}");
    let shown = stack.client.object("/1.0/images", "first").await.expect("there");
    let states: Vec<_> = shown["versions"].as_array().expect("a list").iter().map(|v| &v["status"]).collect();
    assert_eq!(format!("{states:?}"), r#"[String("active"), String("active"), String("error")]"#);
    assert_eq!(stack.engine.images().len(), 3);

    assert!(refusal(stack.client.remove("/1.0/images", "second", false).await).contains("is the default"));
    let operation = stack.client.remove("/1.0/images", "first", false).await.expect("accepted");
    stack.client.wait(&operation, PATIENCE).await.expect("done");
    assert_eq!(stack.engine.images().len(), 1, "the engine keeps what is needed and nothing else");
    let operation = stack.client.remove("/1.0/images", "second", false).await.expect("accepted");
    stack.client.wait(&operation, PATIENCE).await.expect("done");
    assert!(stack.engine.images().is_empty());
    stack.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_application_is_made_in_a_base_instance_that_is_thrown_away() {
    let stack = stack().await;
    image(&stack, "linux", "one").await;
    let manifest = "name: terminal\ncommand: foot\nresources: {cpus: 1, memory: 64MB}\n\
                    services: [{name: web, port: 80, port_end: 81}]\n";
    let operation = stack.client.create_application(tar_of(manifest).into()).await.expect("accepted");
    stack.client.wait(&operation, PATIENCE).await.expect("made");
    let application = stack.client.application("terminal").await.expect("there");
    assert_eq!((application.status.as_str(), application.versions[0].status.as_str()), ("ready", "active"));
    assert!(stack.engine.ran().iter().any(|command| command.join(" ").contains("tar -x")));
    let base_is_gone = async || stack.client.instances(&[]).await.expect("listed").is_empty().then_some(());
    crate::stack::until("the base instance is gone", base_is_gone).await;
    assert_eq!(stack.engine.images().len(), 2, "the image, and the application's");

    let (first, second) = (stack.launch().await, stack.launch().await);
    let ports = async |id: &str| {
        let instance = stack.client.instance(id).await.expect("there");
        let service = instance.services[0].clone();
        (service.node_port, service.node_port_end)
    };
    assert_eq!((ports(&first).await, ports(&second).await), ((10_000, 10_001), (10_002, 10_003)));
    assert!(refusal(stack.client.remove("/1.0/images", "linux", false).await).contains("in use"));
    for id in [first, second] {
        let operation = stack.client.delete_instance(&id, true).await.expect("accepted");
        stack.client.wait(&operation, PATIENCE).await.expect("done");
    }
    let operation = stack.client.delete_application("terminal", false).await.expect("accepted");
    stack.client.wait(&operation, PATIENCE).await.expect("done");
    assert_eq!(stack.engine.images().len(), 1, "what was made for the application went with it");
    stack.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hook_that_fails_fails_the_version_with_its_words() {
    let stack = stack().await;
    image(&stack, "linux", "one").await;
    let mut builder = tar::Builder::new(Vec::new());
    for (name, mode, content) in [
        ("manifest.yaml", 0o644, "name: terminal\ncommand: foot\nresources: {cpus: 1, memory: 64MB}\n"),
        ("hooks/pre-start", 0o755, "#!/bin/sh\n"),
        ("hooks/post-start", 0o755, "#!/bin/sh\n"),
    ] {
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(mode);
        builder.append_data(&mut header, name, content.as_bytes()).expect("appended");
    }
    let package = builder.into_inner().expect("finished");
    let operation = stack.client.create_application(package.into()).await.expect("accepted");
    let error = stack.client.wait(&operation, PATIENCE).await.expect_err("fails").to_string();
    assert!(error.contains("hook post-start failed: it ended with 3: it fails"), "{error}");
    let application = stack.client.application("terminal").await.expect("there");
    assert_eq!(application.status, "error");
    assert!(application.versions[0].error_message.contains("post-start"));
    let refused = stack.client.launch(&terminal(), true, None).await;
    assert!(refusal(refused).contains("published application version not found"));
    let left = stack.client.instances(&[("base", "true".into())]).await.expect("listed");
    assert_eq!(left.len(), 1, "the base instance stays for whoever looks for the cause");
    stack.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_runs_by_itself_and_an_instance_becomes_an_image() {
    let stack = stack().await;
    image(&stack, "linux", "one").await;
    let post = InstancesPost { image_id: "linux".into(), ..InstancesPost::default() };
    let operation = stack.client.launch(&post, false, None).await.expect("accepted");
    let operation = stack.client.wait(&operation, PATIENCE).await.expect("running");
    let id = operation.resource("instances").expect("named").to_owned();
    let instance = stack.client.instance(&id).await.expect("there");
    assert_eq!((instance.app_id.as_str(), instance.image_version), ("", 0));
    let source = |force| ImagesPost {
        source: Some(ImageSource { kind: "instance".into(), instance: id.clone(), force }),
        ..named("copy")
    };
    assert!(refusal(stack.client.import_image(&source(false)).await).contains("instance must be stopped"));
    let operation = stack.client.import_image(&source(true)).await.expect("accepted");
    stack.client.wait(&operation, PATIENCE).await.expect("published");
    let shown = stack.client.object("/1.0/images", "copy").await.expect("there");
    assert_eq!(shown["status"], "active");
    stack.running.stop().await;
}
