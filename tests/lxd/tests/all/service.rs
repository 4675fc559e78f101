//! AMS over LXD, through its API: an image, an application made in a base instance, launches, programs, logs, an end.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use fanlight_ams::{Config, EngineConfig, EngineKind, LxdConfig, Parts};
use fanlight_api::ams::{
    ApplicationPatch, InstancesPost, ResourcesPost, Source,
    addons::AddonsPost,
    images::{ImageSource, ImagesPost},
};
use fanlight_client::{AmsClient, Endpoint};
use fanlight_lxd::{FileOptions, Lxd};
use fanlight_store::StoreConfig;
use fanlight_tests_lxd::{Harness, image};
use futures_util::future::try_join_all;
use reqwest::Method;
use tempfile::TempDir;

use crate::engine::{config as lxd_config, left};

const PATIENCE: Duration = Duration::from_secs(120);
/// Launches that are timed.
const LAUNCHES: usize = 5;

fn config(folder: &TempDir, lxd: LxdConfig) -> Config {
    let path = |name: &str| folder.path().join(name);
    Config {
        listen: ([127, 0, 0, 1], 0).into(),
        socket: path("ams.socket"),
        folder: path("ams"),
        tls: fanlight_ams::Tls { certificate: path("ams.crt"), key: path("ams.key"), names: Vec::new() },
        store: StoreConfig::file(path("ams.redb")),
        engine: EngineConfig { kind: EngineKind::Lxd, ..EngineConfig::default() },
        lxd,
        ..Config::default()
    }
}

/// A package with a manifest, a program and a hook that runs in the base instance.
fn package() -> Result<Bytes> {
    let mut archive = tar::Builder::new(bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast()));
    let manifest = "name: app\ncommand: [run]\nresources: {cpus: 1, memory: 256MB, disk-size: 256MB}\n";
    let hook = "#!/bin/sh\nset -e\n[ \"$INSTANCE_TYPE\" = base ]\necho made > /etc/made-by-hook\n";
    for (name, mode, text) in [
        ("manifest.yaml", 0o644, manifest),
        ("bin/tool", 0o755, "#!/bin/sh\necho a tool\n"),
        ("hooks/pre-start", 0o755, hook),
    ] {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(mode);
        header.set_cksum();
        archive.append_data(&mut header, name, text.as_bytes())?;
    }
    Ok(archive.into_inner()?.finish()?.into())
}

async fn launch(client: &AmsClient) -> Result<String> {
    let post = InstancesPost { app_id: "app".into(), ..InstancesPost::default() };
    let operation = client.launch(&post, false, None).await?;
    client.wait(&operation, PATIENCE).await?;
    Ok(operation.resource("instances").context("an instance")?.to_owned())
}

async fn remove(client: &AmsClient, id: &str) -> Result<()> {
    let operation = client.delete_instance(id, true).await?;
    client.wait(&operation, PATIENCE).await?;
    Ok(())
}

/// A copy of a stopped instance has its files, and a life of its own.
async fn copies(client: &AmsClient, lxd: &Lxd, id: &str) -> Result<()> {
    let container = |id: &str| format!("ams-{id}");
    let lxd = lxd.project("fanlight");
    let owner = FileOptions { uid: 0, gid: 0, mode: 0o644 };
    lxd.push_file(&container(id), "/etc/note", b"mine".to_vec(), owner).await?;
    let begun = Instant::now();
    let post = InstancesPost {
        source: Some(Source { kind: "instance".into(), id: id.into() }),
        ..InstancesPost::default()
    };
    let operation = client.launch(&post, false, None).await?;
    client.wait(&operation, PATIENCE).await?;
    println!("copy to running: {:?}", begun.elapsed());
    let copy = operation.resource("instances").context("an instance")?.to_owned();
    let (code, said) = crate::calls::run(&lxd, &container(&copy), &["cat", "/etc/note"]).await?;
    ensure!(code == 0 && said == "mine", "{code} {said:?}");
    ensure!(client.instance(id).await?.status == "stopped");
    remove(client, &copy).await?;

    let extensions = client.service().await?.api_extensions;
    ensure!(extensions.iter().any(|name| name == "instance_publish"), "{extensions:?}");
    let source = ImageSource { kind: "instance".into(), instance: id.into(), ..ImageSource::default() };
    let post = ImagesPost { name: "noted".into(), source: Some(source), ..ImagesPost::default() };
    let begun = Instant::now();
    let operation = client.import_image(&post).await?;
    client.wait(&operation, PATIENCE).await.context("publishing it")?;
    println!("publish: {:?}", begun.elapsed());
    let resources = ResourcesPost { disk_size: Some(512 << 20), ..ResourcesPost::default() };
    let post = InstancesPost { image_id: "noted".into(), resources, ..InstancesPost::default() };
    let operation = client.launch(&post, false, None).await?;
    client.wait(&operation, PATIENCE).await.context("launching what was published")?;
    let instance = operation.resource("instances").context("an instance")?.to_owned();
    let (code, said) = crate::calls::run(&lxd, &container(&instance), &["cat", "/etc/note"]).await?;
    ensure!(code == 0 && said == "mine", "{code} {said:?}");
    remove(client, &instance).await?;
    let operation = client.remove("/1.0/images", "noted", false).await?;
    client.wait(&operation, PATIENCE).await?;
    Ok(())
}

/// What an addon brings is in the image of an application, made by its hook too, and in an instance of an image.
async fn addons(client: &AmsClient, lxd: &Lxd, folder: &TempDir) -> Result<()> {
    let lxd = lxd.project("fanlight");
    let mut archive = tar::Builder::new(Vec::new());
    for (name, mode, text) in [
        ("manifest.yaml", 0o644, "name: tools\n"),
        ("data/file", 0o600, "of the addon"),
        ("hooks/pre-start", 0o755, "#!/bin/sh\nexec cp \"$ADDON_DIR/link\" /etc/by-addon\n"),
    ] {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(mode);
        header.set_cksum();
        archive.append_data(&mut header, name, text.as_bytes())?;
    }
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    archive.append_link(&mut header, "link", "data/file")?;
    let file = folder.path().join("addon.tar");
    std::fs::write(&file, archive.into_inner()?)?;
    let post = AddonsPost { name: "tools".into() };
    let operation = client.send_file(Method::POST, "/1.0/addons", Some(&post), &file).await?;
    client.wait(&operation, PATIENCE).await.context("adding the addon")?;

    let patch = ApplicationPatch { addons: Some(vec!["tools".into()]), ..ApplicationPatch::default() };
    let operation = client.patch("/1.0/applications", "app", &patch).await?;
    client.wait(&operation, PATIENCE).await.context("putting the addon below the application")?;
    let of_application = launch(client).await?;
    let post = InstancesPost {
        image_id: "base".into(),
        addons: vec!["tools".into()],
        resources: ResourcesPost { disk_size: Some(512 << 20), ..ResourcesPost::default() },
        ..InstancesPost::default()
    };
    let operation = client.launch(&post, false, None).await?;
    client.wait(&operation, PATIENCE).await.context("launching an image with the addon")?;
    let of_image = operation.resource("instances").context("an instance")?.to_owned();
    let root = "/var/lib/fanlight";
    for (id, script, told) in [
        (&of_application, "cat /etc/by-addon /etc/made-by-hook".to_owned(), "of the addonmade\n"),
        (
            &of_image,
            format!("cat {root}/addons/tools/link && test -x {root}/addons/tools/hooks/pre-start"),
            "of the addon",
        ),
        (&of_image, format!("stat -c %a:%U {root}/addons/tools/data/file"), "644:root\n"),
        (
            &of_image,
            format!("grep -o '\"addons\":.*]' {root}/run.json"),
            "\"addons\":[{\"name\":\"tools\",\"hook_time_s\":300}]\n",
        ),
    ] {
        let (code, said) = crate::calls::run(&lxd, &format!("ams-{id}"), &["sh", "-c", &script]).await?;
        ensure!(code == 0 && said == told, "{script}: {code} {said:?}");
    }
    for id in [&of_application, &of_image] {
        remove(client, id).await?;
    }
    Ok(())
}

#[test]
fn applications_are_made_and_launched_over_lxd() {
    let mut harness = Harness::single().expect("LXD runs");
    let lxd_config = lxd_config(&mut harness, "10.91.0.11");
    let lxd = harness.unix(0).expect("a client");
    let folder = tempfile::tempdir().expect("made");
    let config = config(&folder, lxd_config);
    let test = async {
        let running = fanlight_ams::start(config.clone(), Parts::default()).await?;
        let client = AmsClient::new(Endpoint::unix(&config.socket)?);
        let nodes = client.nodes().await?;
        ensure!(nodes.len() == 1 && nodes[0].status == "online", "{nodes:?}");

        let (archive, _) = image::with_stand_in()?;
        let post = ImagesPost { name: "base".into(), default: true, ..ImagesPost::default() };
        let begun = Instant::now();
        let operation = client.upload_image(&post, &archive).await?;
        client.wait(&operation, PATIENCE).await.context("adding the image")?;
        println!("image: {:?}", begun.elapsed());
        let begun = Instant::now();
        let operation = client.create_application(package()?).await?;
        client.wait(&operation, PATIENCE).await.context("adding the application")?;
        println!("application: {:?}", begun.elapsed());

        let mut times = Vec::new();
        for _ in 0..LAUNCHES {
            let begun = Instant::now();
            let id = launch(&client).await?;
            times.push(begun.elapsed());
            remove(&client, &id).await?;
        }
        println!("launch to running: {times:?}");

        // What the hook made and what the package brought are in every instance.
        let id = launch(&client).await?;
        for (program, text) in
            [(&["cat", "/etc/made-by-hook"][..], "made\n"), (&["/var/lib/fanlight/app/bin/tool"], "a tool\n")]
        {
            let (code, said) =
                crate::calls::run(&lxd.project("fanlight"), &format!("ams-{id}"), program).await?;
            ensure!(code == 0 && said == text, "{program:?}: {code} {said:?}");
        }
        let shown = client.instance(&id).await?;
        ensure!(shown.address.starts_with("10.155.0."), "{}", shown.address);
        let log = client.instance_log(&id, "streamer.log").await?;
        ensure!(log.starts_with(b"run 1: run"), "{log:?}");

        // AMS ends and comes back; the instance goes on.
        running.stop().await;
        let running = fanlight_ams::start(config.clone(), Parts::default()).await?;
        ensure!(client.instance(&id).await?.status == "running");
        for (status, reached) in [("stopped", "stopped"), ("started", "running")] {
            let operation = match status {
                "stopped" => client.stop_instance(&id, false).await?,
                _ => client.start_instance(&id, false).await?,
            };
            client.wait(&operation, PATIENCE).await.with_context(|| format!("until it is {reached}"))?;
            ensure!(client.instance(&id).await?.status == reached);
            if status == "stopped" {
                copies(&client, &lxd, &id).await.context("copying it")?;
            }
        }

        addons(&client, &lxd, &folder).await.context("with an addon")?;
        let more = try_join_all((0..4).map(|_| launch(&client))).await.context("four at a time")?;
        for id in more.iter().chain([&id]) {
            remove(&client, id).await?;
        }
        let left = left(&lxd, None, "10.91.0.11").await?;
        ensure!(left.is_empty(), "{left:?}");
        running.stop().await;
        Ok(())
    };
    harness.within(test).expect("AMS runs over LXD");
}
