//! Every call, over the unix socket and over HTTPS.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, Result, ensure};
use fanlight_client::Endpoint;
use fanlight_lxd::{ExecOptions, FileOptions, Instance, Lxd, NewInstance, Port, Source, StateAction};
use fanlight_tests_lxd::{Harness, NETWORK, POOL, SOON, image};
use sha2::{Digest, Sha256};

pub const ROOT: FileOptions = FileOptions { uid: 0, gid: 0, mode: 0o644 };
/// Our key, by which our instances are known.
pub const KEY: &str = "user.fanlight";

pub fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// An instance on the pool, with this address.
pub fn new_instance(name: &str, image: &str, address: Option<&str>) -> NewInstance {
    let mut nic = map(&[("type", "nic"), ("network", NETWORK), ("name", "eth0")]);
    nic.extend(address.map(|address| ("ipv4.address".to_owned(), address.to_owned())));
    let root = map(&[("type", "disk"), ("path", "/"), ("pool", POOL)]);
    NewInstance {
        name: name.into(),
        source: Source::Image(image.into()),
        config: map(&[(KEY, "test"), ("limits.memory", "512MiB"), ("limits.cpu", "1")]),
        devices: [("root".to_owned(), root), ("eth0".to_owned(), nic)].into(),
        profiles: Vec::new(),
    }
}

/// Imports the image of the tests; its fingerprint.
pub async fn import(lxd: &Lxd) -> Result<String> {
    let files = image::debian()?;
    let outcome = lxd.import_image(&files.metadata, Some(&files.root), None).await?.wait(SOON).await?;
    let fingerprint = outcome.metadata.as_ref().and_then(|metadata| metadata["fingerprint"].as_str());
    Ok(fingerprint.context("an import tells the fingerprint")?.to_owned())
}

pub async fn start(lxd: &Lxd, name: &str) -> Result<()> {
    lxd.change_state(name, StateAction::Start, SOON, false).await?.wait(SOON).await?;
    Ok(())
}

pub async fn remove(lxd: &Lxd, name: &str) -> Result<()> {
    lxd.change_state(name, StateAction::Stop, SOON, true).await?.wait(SOON).await?;
    lxd.delete(name).await?.wait(SOON).await?;
    Ok(())
}

/// Runs a program; its exit code and what it wrote.
pub async fn run(lxd: &Lxd, name: &str, command: &[&str]) -> Result<(i32, String)> {
    let command = command.iter().map(|word| (*word).to_owned()).collect();
    let mut exec = lxd.exec(name, &ExecOptions { command, ..ExecOptions::default() }).await?;
    // A short program may have ended by now.
    let _ = exec.input.finish().await;
    let mut written = Vec::new();
    while let Some(bytes) = exec.output.next().await? {
        written.extend_from_slice(&bytes);
    }
    Ok((exec.wait(SOON).await?, String::from_utf8(written)?))
}

/// Over HTTPS, trusted by the password.
pub async fn trusted(harness: &Harness, member: usize) -> Result<Lxd> {
    let url = format!("https://10.91.0.{}:8443", 11 + member);
    let certificate = Endpoint::certificate_of(&url).await?;
    let lxd = harness.https(member, &hex::encode(Sha256::digest(certificate)))?;
    ensure!(lxd.server().await?.auth == "untrusted");
    ensure!(lxd.trust_us("test", "wrong").await.is_err(), "a wrong password is refused");
    lxd.trust_us("test", harness.password()).await?;
    ensure!(lxd.server().await?.auth == "trusted");
    Ok(lxd)
}

#[test]
fn every_call_works_over_the_socket_and_over_https() {
    let harness = Harness::single().expect("LXD runs");
    let unix = harness.unix(0).expect("a client");
    let test = async {
        let https = trusted(&harness, 0).await?;
        let image = import(&unix).await?;
        for (name, lxd) in [("socket", &unix), ("https", &https)] {
            server(lxd).await.with_context(|| format!("server over {name}"))?;
            instance(lxd, &image).await.with_context(|| format!("instances over {name}"))?;
            exec(lxd, &image).await.with_context(|| format!("exec over {name}"))?;
            images(lxd, &harness, &image).await.with_context(|| format!("images over {name}"))?;
        }
        Ok(())
    };
    harness.within(test).expect("every call works");
}

async fn server(lxd: &Lxd) -> Result<()> {
    let server = lxd.server().await?;
    ensure!(server.has("network_forward") && server.environment.server == "lxd", "{server:?}");
    let resources = lxd.resources().await?;
    ensure!(resources.cpu.total > 0 && resources.memory.total > resources.memory.used, "{resources:?}");
    ensure!(lxd.pool_space(POOL).await?.total > 1 << 30);
    for description in ["1", "2"] {
        let keys = [("user.test", description), ("features.images", "false"), ("features.profiles", "true")];
        lxd.ensure_project("ours", &map(&keys)).await?;
        let ours = lxd.project("ours");
        ours.ensure_profile("p", &map(&[("user.test", description)]), &BTreeMap::new()).await?;
    }
    let state = lxd.network_state(NETWORK).await?;
    ensure!(state.addresses.iter().any(|address| address.address == "10.155.0.1"), "{state:?}");
    let missing = lxd.instance("none").await.expect_err("there is none");
    ensure!(missing.is_not_found() && missing.to_string().contains("none"), "{missing}");
    ensure!(lxd.members().await.is_err(), "a server alone has no members");

    // The same port twice is one; a change that another one overtook is made again.
    let address = "10.91.0.11";
    lxd.ensure_forward(NETWORK, address).await?;
    lxd.ensure_forward(NETWORK, address).await?;
    let port = |number: u16, description: &str| Port {
        description: description.into(),
        protocol: "udp".into(),
        listen_port: number.to_string(),
        target_port: "7000".into(),
        target_address: "10.155.0.30".into(),
    };
    let (a, b) = ([port(10000, "a")], [port(10001, "b")]);
    let both = tokio::join!(lxd.add_ports(NETWORK, address, &a), lxd.add_ports(NETWORK, address, &b));
    both.0.and(both.1)?;
    lxd.add_ports(NETWORK, address, &a).await?;
    ensure!(lxd.forward(NETWORK, address).await?.0.ports.len() == 2);
    lxd.remove_ports(NETWORK, address, "a").await?;
    ensure!(lxd.forward(NETWORK, address).await?.0.ports == [port(10001, "b")]);
    lxd.remove_forward(NETWORK, address).await?;
    lxd.remove_forward(NETWORK, address).await?;
    Ok(())
}

async fn instance(lxd: &Lxd, image: &str) -> Result<()> {
    lxd.create(&new_instance("c1", image, None)).await?.wait(SOON).await?;
    let taken = async { lxd.create(&new_instance("c1", image, None)).await?.wait(SOON).await };
    ensure!(taken.await.is_err_and(|error| error.is_exists()), "the name is taken");
    let (instance, tag) = lxd.instance("c1").await?;
    ensure!(instance.status == "Stopped" && instance.config["limits.cpu"] == "1", "{instance:?}");
    lxd.patch_config("c1", &map(&[("user.more", "1")]), Some(&tag)).await?;
    let old = lxd.patch_config("c1", &map(&[("user.more", "2")]), Some(&tag)).await;
    ensure!(old.is_err_and(|error| error.is_precondition()), "the tag is an old one");

    // Files go in before the start.
    let folder = FileOptions { mode: 0o755, ..ROOT };
    lxd.make_folder("c1", "/opt/ours", folder).await?;
    lxd.push_file("c1", "/opt/ours/a", "hello", FileOptions { mode: 0o640, gid: 5, ..ROOT }).await?;
    ensure!(lxd.read_file("c1", "/opt/ours/a").await? == "hello");
    ensure!(lxd.read_file("c1", "/opt").await.is_err(), "a folder is no file");

    start(lxd, "c1").await?;
    let state = lxd.instance_state("c1").await?;
    ensure!(state.status == "Running" && state.pid > 0, "{state:?}");
    let owner = run(lxd, "c1", &["stat", "-c", "%u:%g %a", "/opt/ours/a"]).await?;
    ensure!(owner == (0, "0:5 640\n".into()), "{owner:?}");
    let names = |all: Vec<Instance>| all.into_iter().map(|instance| instance.name).collect::<Vec<_>>();
    ensure!(names(lxd.instances(KEY).await?) == ["c1"]);
    ensure!(lxd.instances("user.other").await?.is_empty());
    ensure!(!lxd.logs("c1").await?.is_empty());
    ensure!(lxd.log("c1", "lxc.conf").await?.starts_with(b"lxc."));
    lxd.console_log("c1").await?;

    let copy = NewInstance { source: Source::Instance("c1".into()), ..new_instance("c2", image, None) };
    lxd.create(&copy).await?.wait(SOON).await?;
    ensure!(lxd.read_file("c2", "/opt/ours/a").await? == "hello");
    lxd.delete("c2").await?.wait(SOON).await?;
    remove(lxd, "c1").await?;
    ensure!(lxd.instance("c1").await.is_err_and(|error| error.is_not_found()));
    Ok(())
}

async fn exec(lxd: &Lxd, image: &str) -> Result<()> {
    lxd.create(&new_instance("e1", image, None)).await?.wait(SOON).await?;
    start(lxd, "e1").await?;
    let shell = |script: &str| ExecOptions {
        command: ["sh", "-c", script].map(str::to_owned).into(),
        environment: map(&[("WORD", "w")]),
        folder: Some("/tmp".into()),
        ..ExecOptions::default()
    };
    // Input, output and errors are streams of their own.
    let mut program = lxd.exec("e1", &shell("cat; echo $WORD $PWD >&2; exit 7")).await?;
    let large = vec![b'x'; 300_000];
    let write = async {
        program.input.write(&large.clone().into()).await?;
        program.input.finish().await
    };
    let read = async {
        let mut all = Vec::new();
        while let Some(bytes) = program.output.next().await? {
            all.extend_from_slice(&bytes);
        }
        Ok::<_, fanlight_lxd::LxdError>(all)
    };
    let (written, all) = tokio::join!(write, read);
    written?;
    ensure!(all? == large, "the program got all of its input");
    let errors = program.errors.as_mut().context("a stream of errors")?;
    let mut text = Vec::new();
    while let Some(bytes) = errors.next().await? {
        text.extend_from_slice(&bytes);
    }
    ensure!(text == b"w /tmp\n", "{text:?}");
    ensure!(program.wait(SOON).await? == 7);

    // A terminal has a size, which changes, and its program gets signals.
    let script = "stty size; trap 'stty size; exit 3' WINCH; echo go; while :; do sleep 0.1; done";
    let options = ExecOptions { terminal: Some((81, 25)), ..shell(script) };
    let mut program = lxd.exec("e1", &options).await?;
    let mut seen = String::new();
    while !seen.contains("go") {
        let bytes = program.output.next().await?.context("the terminal is open")?;
        seen.push_str(&String::from_utf8_lossy(&bytes));
    }
    ensure!(seen.contains("25 81"), "{seen:?}");
    program.controls.resize(100, 30).await?;
    while let Some(bytes) = program.output.next().await? {
        seen.push_str(&String::from_utf8_lossy(&bytes));
    }
    ensure!(seen.contains("30 100"), "{seen:?}");
    ensure!(program.wait(SOON).await? == 3);

    let mut program = lxd.exec("e1", &shell("echo go; exec sleep 600")).await?;
    program.output.next().await?.context("it has started")?;
    program.controls.signal(15).await?;
    ensure!(program.wait(SOON).await? == 143, "it was ended by the signal");
    let waited = lxd.exec("e1", &shell("exec sleep 600")).await?;
    ensure!(waited.wait(Duration::from_secs(1)).await.is_err(), "waiting ends");
    remove(lxd, "e1").await
}

async fn images(lxd: &Lxd, harness: &Harness, image: &str) -> Result<()> {
    ensure!(lxd.image(image).await?.size > 1 << 20);
    let files = image::debian()?;
    let again = async { lxd.import_image(&files.metadata, Some(&files.root), None).await?.wait(SOON).await };
    ensure!(again.await.is_err_and(|error| error.is_exists()), "the image is there already");
    // One archive, and one that is not what it is said to be.
    let archive = harness.path("unified.tar");
    image::unified(&archive)?;
    let bytes = std::fs::read(&archive)?;
    let fingerprint = hex::encode(Sha256::digest(&bytes));
    let wrong = async { lxd.import_image(&archive, None, Some(&"0".repeat(64))).await?.wait(SOON).await };
    ensure!(wrong.await.is_err(), "another fingerprint is refused");
    lxd.import_image(&archive, None, Some(&fingerprint)).await?.wait(SOON).await?;
    ensure!(lxd.has_image(&fingerprint).await?);
    lxd.delete_image(&fingerprint).await?.wait(SOON).await?;
    ensure!(!lxd.has_image(&fingerprint).await?);
    Ok(())
}
