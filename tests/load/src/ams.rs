//! The bench `ams`: how long lists take and how much memory they need, how soon everything is known again after a kill,
//! and how fast processes are launched. Lists, memory and reconciliation are measured on a server with an engine that
//! only counts, so that they are AMS's own; launches are of the real streamer on this machine.

use std::{
    collections::BTreeMap,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use clap::Args;
use fanlight_ams::{
    Config, EngineConfig, Parts, Phase, Seen,
    engine::{Script, SimulatedEngine},
};
use fanlight_api::{
    InstanceId,
    ams::InstancesPost,
    guest::{EndReason, Ended},
};
use fanlight_client::{AmsClient, Endpoint};
use fanlight_store::StoreConfig;
use futures_util::{StreamExt as _, stream};
use http::Method;
use serde_json::Value;
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
};

use crate::{
    figures::{Bound, Figures, median},
    machine,
};

/// Nodes of the simulated cluster.
const NODES: usize = 100;
/// Launches that are asked for at a time.
const AT_ONCE: usize = 16;
/// How often a list is asked for.
const LISTS: usize = 9;
/// Launches of processes, one after the other.
const LAUNCHES: usize = 20;
/// Launches of processes for the rate, and how many at a time.
const MANY: (usize, usize) = (30, 4);
const PATIENCE: Duration = Duration::from_secs(120);

/// Of the server that the bench starts as a process of its own.
#[derive(Debug, Args)]
pub struct Server {
    /// Internal: serve from this folder with a simulated engine.
    #[arg(long, hide = true)]
    pub ams_folder: Option<PathBuf>,
}

/// What the engine of the server has before it starts, by instance: true for those that run.
const KNOWN: &str = "known.json";

/// Serves until standard input ends.
///
/// # Errors
/// AMS does not start.
pub async fn serve(folder: &Path) -> Result<()> {
    let engine = SimulatedEngine::new(Script::Run).with_machines(NODES);
    if let Ok(text) = fs::read(folder.join(KNOWN)) {
        let known: BTreeMap<InstanceId, bool> = serde_json::from_slice(&text).context("what is known")?;
        for (id, runs) in known {
            let ended = Ended { reason: EndReason::Failed, message: "it failed meanwhile".into() };
            let phase = if runs { Phase::Ready } else { Phase::Ended(ended) };
            engine.set(&id, Seen { run: 1, phase });
        }
    }
    let parts = Parts { engine: Some(std::sync::Arc::new(engine)), ..Parts::default() };
    let running = fanlight_ams::start(config(folder), parts).await.context("starting AMS")?;
    println!("ready");
    std::io::stdout().flush()?;
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while lines.next_line().await?.is_some() {}
    running.stop().await;
    Ok(())
}

fn config(folder: &Path) -> Config {
    Config {
        listen: ([127, 0, 0, 1], 0).into(),
        socket: folder.join("ams.socket"),
        folder: folder.to_owned(),
        tls: fanlight_ams::Tls {
            certificate: folder.join("ams.crt"),
            key: folder.join("ams.key"),
            names: Vec::new(),
        },
        store: StoreConfig::file(folder.join("ams.redb")),
        ..Config::default()
    }
}

/// AMS in a process of its own.
struct Ams {
    child: Child,
    client: AmsClient,
    started: Instant,
}

impl Ams {
    async fn start(folder: &Path) -> Result<Self> {
        let started = Instant::now();
        let mut child = Command::new(std::env::current_exe()?)
            .arg("--ams-folder")
            .arg(folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(fs::File::options().create(true).append(true).open(folder.join("log"))?)
            .kill_on_drop(true)
            .spawn()
            .context("starting AMS")?;
        let output = child.stdout.take().context("it has no output")?;
        let mut lines = BufReader::new(output).lines();
        let line =
            tokio::time::timeout(PATIENCE, lines.next_line()).await.context("AMS does not start")??;
        let log = || fs::read_to_string(folder.join("log")).unwrap_or_default();
        ensure!(line.as_deref() == Some("ready"), "AMS does not start: {}", log());
        let client = AmsClient::new(Endpoint::unix(folder.join("ams.socket"))?);
        Ok(Self { child, client, started })
    }

    fn pid(&self) -> Result<u32> {
        self.child.id().context("AMS has ended")
    }

    async fn kill(mut self) -> Result<()> {
        self.child.kill().await.context("killing AMS")
    }
}

/// An application that is nothing but its manifest.
fn package(manifest: &str) -> Result<Bytes> {
    let mut archive = tar::Builder::new(bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast()));
    let mut header = tar::Header::new_gnu();
    header.set_size(manifest.len() as u64);
    header.set_mode(0o644);
    header.set_cksum();
    archive.append_data(&mut header, "manifest.yaml", manifest.as_bytes())?;
    Ok(archive.into_inner()?.finish()?.into())
}

async fn register(client: &AmsClient, manifest: &str) -> Result<()> {
    let operation = client.create_application(package(manifest)?).await.context("adding the application")?;
    client.wait(&operation, PATIENCE).await.context("adding the application")?;
    Ok(())
}

fn post(app: &str) -> InstancesPost {
    InstancesPost { app_id: app.into(), ..InstancesPost::default() }
}

/// Launches so many, and waits until all run.
async fn fill(client: &AmsClient, from: usize, to: usize) -> Result<()> {
    let launches = stream::iter(from..to).map(|_| async {
        let operation = client.launch(&post("app"), false, None).await?;
        client.wait(&operation, PATIENCE).await
    });
    let launched: Vec<_> = launches.buffer_unordered(AT_ONCE).collect().await;
    for launched in launched {
        launched.context("launching")?;
    }
    Ok(())
}

/// The middle time until a list has arrived whole, ms, and its length. Reading it is the client's affair, and not in it.
async fn list(client: &AmsClient, full: bool) -> Result<(f64, usize)> {
    let path = if full { "/1.0/instances?recursion=1" } else { "/1.0/instances" };
    let (mut times, mut length) = (Vec::new(), 0);
    for _ in 0..LISTS {
        let begun = Instant::now();
        let (status, body) = client.endpoint().raw(Method::GET, path, None).await.context("listing")?;
        times.push(begun.elapsed().as_secs_f64() * 1000.0);
        ensure!(status.is_success(), "listing was answered with {status}");
        let answer: Value = serde_json::from_slice(&body).context("reading a list")?;
        length = answer["metadata"].as_array().map_or(0, Vec::len);
    }
    Ok((median(&times), length))
}

/// Measures all figures.
///
/// # Errors
/// Something could not be measured.
pub async fn run(figures: &mut Figures, most: usize) -> Result<()> {
    processes(figures).await?;
    let folder = folder()?;
    let ams = Ams::start(folder.path()).await?;
    register(&ams.client, "name: app\ncommand: [run]\nresources: {cpus: 1, memory: 64MB, disk-size: 64MB}\n")
        .await?;
    let mut there = 0;
    for count in [10, 1000, most] {
        let begun = Instant::now();
        fill(&ams.client, there, count).await?;
        eprintln!("bench: {} launches took {:.1} s", count - there, begun.elapsed().as_secs_f64());
        there = count;
        let (urls, first) = list(&ams.client, false).await?;
        let (full, second) = list(&ams.client, true).await?;
        ensure!(first == count && second == count, "{count} instances were launched, {first} are listed");
        let bound = if count == 10_000 { Bound::AtMost(100.0) } else { Bound::None };
        figures.print(&format!("list_{count}_ms"), full, "ms", bound)?;
        figures.print(&format!("list_{count}_urls_ms"), urls, "ms", Bound::None)?;
        if count == 1000 {
            again(figures, &ams, folder.path()).await?;
        }
    }
    let bound = if most == 10_000 { Bound::AtMost(100.0) } else { Bound::None };
    let memory = machine::resident_kib(ams.pid()?)? / 1024.0;
    figures.print(&format!("rss_{most}_mb"), memory * 1.048_576, "MB", bound)?;
    ams.kill().await
}

/// From the start of AMS after a kill until every instance is shown as it is; half of them failed meanwhile.
async fn again(figures: &mut Figures, ams: &Ams, folder: &Path) -> Result<()> {
    let copy = self::folder()?;
    // A copy, as of another machine: the first one goes on.
    let ids: Vec<InstanceId> = ams.client.instances(&[]).await?.into_iter().map(|known| known.id).collect();
    let known: BTreeMap<&InstanceId, bool> = ids.iter().zip([true, false].into_iter().cycle()).collect();
    fs::write(copy.path().join(KNOWN), serde_json::to_vec(&known)?)?;
    for part in ["ams.redb", "cluster", "packages"] {
        copy_part(&folder.join(part), &copy.path().join(part))?;
    }
    let second = Ams::start(copy.path()).await?;
    let failed = known.values().filter(|runs| !**runs).count();
    loop {
        let all = second.client.objects("/1.0/instances", &[]).await.context("listing")?;
        let count = |status: &str| all.iter().filter(|instance| instance["status"] == status).count();
        let (error, running) = (count("error"), count("running"));
        if (error, running) == (failed, known.len() - failed) {
            break;
        }
        ensure!(second.started.elapsed() < PATIENCE, "{error} failed and {running} run of {}", known.len());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let took = second.started.elapsed().as_secs_f64() * 1000.0;
    figures.print("reconcile_1000_ms", took, "ms", Bound::AtMost(5000.0))?;
    second.kill().await
}

fn copy_part(from: &Path, to: &Path) -> Result<()> {
    let status = std::process::Command::new("cp").arg("-a").arg(from).arg(to).status().context("cp")?;
    ensure!(status.success(), "copying {}", from.display());
    Ok(())
}

fn folder() -> Result<TempDir> {
    use std::os::unix::fs::PermissionsExt as _;
    let folder = tempfile::Builder::new().prefix("fl-ams-").tempdir().context("making a folder")?;
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o711))?;
    Ok(folder)
}

/// Launches of the real streamer as processes of this machine.
async fn processes(figures: &mut Figures) -> Result<()> {
    let programs = match std::env::var_os("FANLIGHT_BIN_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => std::env::current_exe()?.parent().context("this program has no folder")?.to_owned(),
    };
    let folder = folder()?;
    let program = |name: &str| programs.join(name).display().to_string();
    let config = Config {
        engine: EngineConfig {
            shim: vec![program("fanlight-ams"), "shim".into()],
            streamer: vec![program("fanlight-streamer"), "run".into()],
            programs: vec![programs.join("fanlight-pattern")],
            ..EngineConfig::default()
        },
        ..config(folder.path())
    };
    let running = fanlight_ams::start(config, Parts::default()).await.context("starting AMS")?;
    let client = AmsClient::new(Endpoint::unix(folder.path().join("ams.socket"))?);
    register(&client, "name: pattern\ncommand: [fanlight-pattern]\nresources: {cpus: 1, memory: 64MB}\n")
        .await?;
    let launch = async || {
        let operation = client.launch(&post("pattern"), false, None).await.context("launching")?;
        client.wait(&operation, PATIENCE).await.context("launching")?;
        let id = operation.resource("instances").context("which one was launched")?.to_owned();
        anyhow::Ok(id)
    };
    let remove = async |id: String| {
        let operation = client.delete_instance(&id, true).await.context("deleting")?;
        client.wait(&operation, PATIENCE).await.context("deleting")?;
        anyhow::Ok(())
    };
    let mut times = Vec::new();
    for _ in 0..LAUNCHES {
        let begun = Instant::now();
        let id = launch().await?;
        times.push(begun.elapsed().as_secs_f64() * 1000.0);
        remove(id).await?;
    }
    figures.print("process_running_p50_ms", median(&times), "ms", Bound::None)?;
    let begun = Instant::now();
    let (many, at_once) = MANY;
    let launches = stream::iter(0..many).map(|_| async {
        let id = launch().await?;
        remove(id).await
    });
    let done: Vec<Result<()>> = launches.buffer_unordered(at_once).collect().await;
    done.into_iter().collect::<Result<Vec<()>>>()?;
    let rate = many as f64 * 60.0 / begun.elapsed().as_secs_f64();
    figures.print("launches_per_min", rate, "1/min", Bound::None)?;
    running.stop().await;
    Ok(())
}
