//! Instances as containers of LXD, on one server or on the members of a cluster.
//!
//! LXD is the truth about what runs. What AMS must know again after a restart stands in keys of the container
//! (`user.fanlight.*`): the run that was asked for, that was started, that was ready, that was asked to end. What the
//! streamer says of a run stands in a file that its supervisor writes ([`GUEST_DIR`]/`state.json`). Changes are learned
//! from LXD's events; after a lost connection everything is read once.
//!
//! ```text
//! machines.rs   nodes        network.rs   addresses and ports by place
//! watch.rs      what is known of instances, and how it becomes known
//! exec.rs       programs in instances
//! ```

mod exec;
mod machines;
mod network;
mod watch;

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, Ipv4Addr},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use fanlight_api::{
    InstanceId, PROTOCOL_VERSION,
    guest::{ADDONS, GUEST_DIR, GUEST_FILE, GuestAddon, GuestRun, RUN_FILE, STATE_FILE},
};
use fanlight_client::Identity;
use fanlight_lxd::{FileOptions, Lxd, LxdError, NewInstance, Source, StateAction};
use fanlight_service::tls::{KeyFiles, ensure_self_signed};
use tokio::{sync::broadcast, task::AbortHandle};

use self::{network::Subnet, watch::Entry};
use super::{Engine, EngineError, Exec, Machine, MachineGpu, MachineJoin, Running, Spec, SpecAddon};
use crate::{
    config,
    core::life::{Phase, Seen},
};

/// Says that clients reach instances at their own addresses (`lxd.address`).
const DIRECT: &str = "none";
/// Names of containers begin with it.
const PREFIX: &str = "ams-";
/// Profile of all instances.
const PROFILE: &str = "fanlight";
/// Key that says that a container is ours.
const OURS: &str = "user.fanlight.instance";
/// Key of the run that was asked for.
const RUN: &str = "user.fanlight.run";
/// Key of the run that was started.
const STARTED: &str = "user.fanlight.started";
/// Key of the run that was ready.
const READY: &str = "user.fanlight.ready";
/// Key of the run that was asked to end.
const STOPPED: &str = "user.fanlight.stopped";
/// Key of those in which nothing is run but what is asked for.
const BASE: &str = "user.fanlight.base";
/// Key of the addons whose hooks run, `name:seconds` with commas between them.
const HOOKS_OF: &str = "user.fanlight.addons";
/// Key of the longest time of a hook, seconds.
const HOOK_TIME: &str = "user.fanlight.hook_time";
/// That of those without the key.
const MOST_HOOK_TIME: u64 = 900;

/// How long LXD may take until it answers for the first time.
const PATIENCE: Duration = Duration::from_secs(30);
/// Bound on making a container; the image may have to come from another member first.
const CREATE: Duration = Duration::from_secs(300);
/// Bound on starting one.
const START: Duration = Duration::from_secs(60);
/// Bound on killing one.
const KILL: Duration = Duration::from_secs(30);
/// Bound on deleting one.
const DELETE: Duration = Duration::from_secs(120);
/// Bound on taking an image in, and on making one.
const IMAGE: Duration = Duration::from_secs(900);
/// Between attempts while LXD is busy with the same container.
const BUSY: Duration = Duration::from_millis(100);
/// Most processes of an instance.
const MAX_PROCESSES: u32 = 4096;
/// What LXD must be able to do; all of it is there since 5.0.
const NEEDED: [&str; 4] = ["network_forward", "projects", "clustering", "resources_gpu"];
/// Logs that an instance may have.
const LOGS: [&str; 4] = ["streamer.log", "hooks.log", "console.log", "lxc.log"];
/// Where those of the instance's own lie.
const LOG_DIR: &str = "/var/log/fanlight";

/// The engine. Clones are handles of the same.
#[derive(Clone)]
pub struct LxdEngine {
    inner: Arc<Inner>,
}

struct Inner {
    config: config::Lxd,
    /// Shown over HTTPS.
    identity: Option<Identity>,
    /// Everything of the server.
    root: Lxd,
    /// Our project.
    lxd: Lxd,
    clustered: AtomicBool,
    subnet: Subnet,
    /// Address of the one server, where it is no cluster.
    address: Option<IpAddr>,
    /// Clients are on the server itself, so instances need no ports of it.
    direct: bool,
    /// Addresses of the members of a cluster.
    members: Mutex<HashMap<String, watch::Member>>,
    gpus: Mutex<HashMap<String, Vec<MachineGpu>>>,
    entries: Mutex<BTreeMap<InstanceId, Entry>>,
    /// Containers that were removed, by the look that saw it.
    removed: Mutex<HashMap<InstanceId, u64>>,
    looks: AtomicU64,
    /// Ports of a node are changed one after the other: LXD reads and writes all of them at once.
    forwards: tokio::sync::Mutex<()>,
    changes: broadcast::Sender<InstanceId>,
    tasks: Mutex<Vec<AbortHandle>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        for task in self.tasks.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            task.abort();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An error of LXD as one of the engine.
fn trouble(doing: &'static str, error: LxdError) -> EngineError {
    let reason = fanlight_service::telemetry::chain(&error);
    match error {
        LxdError::Unreachable { .. } | LxdError::TimedOut { .. } => EngineError::Away { doing, reason },
        // A daemon that is just starting or ending.
        LxdError::Refused { status, .. } if status == http::StatusCode::SERVICE_UNAVAILABLE => {
            EngineError::Away { doing, reason }
        }
        _ => EngineError::Refused { doing, reason },
    }
}

fn name(id: &InstanceId) -> String {
    format!("{PREFIX}{id}")
}

fn map<const N: usize>(pairs: [(&str, String); N]) -> BTreeMap<String, String> {
    pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

/// Tries again while LXD does something else with the same container.
async fn unless_busy<T, F>(call: impl Fn() -> F) -> Result<T, LxdError>
where
    F: Future<Output = Result<T, LxdError>>,
{
    let deadline = tokio::time::Instant::now() + KILL;
    loop {
        match call().await {
            Err(error) if error.is_busy() && tokio::time::Instant::now() < deadline => {
                tokio::time::sleep(BUSY).await;
            }
            result => return result,
        }
    }
}

impl LxdEngine {
    /// Connects, makes sure of project and profile, and learns what is there.
    ///
    /// # Errors
    /// LXD does not answer or does not trust us, or what the configuration names is not there.
    pub async fn open(config: config::Lxd) -> Result<Self, EngineError> {
        let (root, identity) = connect(&config)?;
        let deadline = tokio::time::Instant::now() + PATIENCE;
        let server = loop {
            match root.server().await {
                Ok(server) => break server,
                Err(error) if tokio::time::Instant::now() > deadline => {
                    return Err(trouble("connecting to LXD (lxd.url)", error));
                }
                Err(error) => {
                    tracing::info!("waiting for LXD: {}", fanlight_service::telemetry::chain(&error));
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        };
        if server.auth != "trusted" {
            introduce(&root, &config).await?;
        }
        // What an untrusted client is told is not all.
        let server = root.server().await.map_err(|error| trouble("connecting to LXD", error))?;
        if let Some(missing) = NEEDED.iter().find(|extension| !server.has(extension)) {
            return Err(EngineError::Refused {
                doing: "connecting to LXD",
                reason: format!(
                    "version {} lacks {missing}; 5.0 or later is needed",
                    server.environment.server_version
                ),
            });
        }
        let clustered = server.environment.server_clustered;
        let direct = config.address == DIRECT;
        let address = given_address(&config)?.or_else(|| network::host(&config.url)).or_else(|| {
            let addresses = server.environment.addresses.iter();
            addresses.filter_map(|address| network::host(&format!("https://{address}"))).find(IpAddr::is_ipv4)
        });
        if direct && clustered {
            return Err(EngineError::Refused {
                doing: "reading lxd.address",
                reason: format!("{DIRECT:?} is for one server; members of a cluster need their ports"),
            });
        }
        let lxd = root.project(&config.project);
        let project = map([
            ("features.images", "true".into()),
            ("features.profiles", "true".into()),
            ("features.storage.volumes", "true".into()),
            // The bridge and its forwards are those of the host.
            ("features.networks", "false".into()),
        ]);
        root.ensure_project(&config.project, &project)
            .await
            .map_err(|error| trouble("making the project of LXD (lxd.project)", error))?;
        let profile = map([
            ("security.privileged", "false".into()),
            ("security.nesting", "false".into()),
            ("limits.processes", MAX_PROCESSES.to_string()),
            // AMS starts what should run.
            ("boot.autostart", "false".into()),
            // An instance is at home where its ports are.
            ("cluster.evacuate", "stop".into()),
        ]);
        lxd.ensure_profile(PROFILE, &profile, &BTreeMap::new())
            .await
            .map_err(|error| trouble("making the profile of LXD", error))?;
        let network = root
            .network(&config.network)
            .await
            .map_err(|error| trouble("looking at the bridge (lxd.network)", error))?;
        let text = network.config.get("ipv4.address").map_or("", String::as_str);
        let subnet = Subnet::parse(text).ok_or_else(|| EngineError::Refused {
            doing: "looking at the bridge (lxd.network)",
            reason: format!(
                "{} has no IPv4 network that LXD manages (ipv4.address: {text:?})",
                config.network
            ),
        })?;
        let pool_at = match clustered {
            true => root.target(&server.environment.server_name),
            false => root.clone(),
        };
        pool_at.pool_space(&config.pool).await.map_err(|error| trouble("looking at lxd.pool", error))?;
        let engine = Self {
            inner: Arc::new(Inner {
                config,
                identity,
                root,
                lxd,
                clustered: AtomicBool::new(clustered),
                subnet,
                address: address.filter(|_| !direct),
                direct,
                members: Mutex::default(),
                gpus: Mutex::default(),
                entries: Mutex::default(),
                removed: Mutex::default(),
                looks: AtomicU64::new(1),
                forwards: tokio::sync::Mutex::default(),
                changes: broadcast::Sender::new(4096),
                tasks: Mutex::default(),
            }),
        };
        engine.look_at_machines().await?;
        // Events first: what happens after the list was read is told.
        let events = engine.inner.lxd.events();
        engine.inner.look_at_all().await.map_err(|error| trouble("listing the containers of LXD", error))?;
        engine.inner.follow(events);
        Ok(engine)
    }
}

fn addons_text(addons: &[SpecAddon]) -> String {
    let words: Vec<String> =
        addons.iter().map(|addon| format!("{}:{}", addon.name, addon.hook_time_s)).collect();
    words.join(",")
}

fn addons_of(text: &str) -> Vec<GuestAddon> {
    let words = text.split(',').filter_map(|word| word.split_once(':'));
    words
        .map(|(name, seconds)| GuestAddon {
            name: name.to_owned(),
            hook_time_s: seconds.parse().unwrap_or(MOST_HOOK_TIME),
        })
        .collect()
}

fn given_address(config: &config::Lxd) -> Result<Option<IpAddr>, EngineError> {
    match config.address.as_str() {
        "" | DIRECT => Ok(None),
        text => text.parse().map(Some).map_err(|_| EngineError::Refused {
            doing: "reading lxd.address",
            reason: format!("{text:?} is no IP address"),
        }),
    }
}

fn connect(config: &config::Lxd) -> Result<(Lxd, Option<Identity>), EngineError> {
    let step = |error| trouble("connecting to LXD (lxd.url)", error);
    if !config.url.starts_with("https://") {
        return Ok((Lxd::unix(&config.url).map_err(step)?, None));
    }
    let files = KeyFiles { certificate: config.certificate.clone(), key: config.key.clone() };
    ensure_self_signed(&files, "Fanlight AMS", &["fanlight".to_owned()]).map_err(|error| {
        EngineError::Refused {
            doing: "preparing the certificate for LXD (lxd.certificate)",
            reason: fanlight_service::telemetry::chain(&error),
        }
    })?;
    let identity = Identity { certificate: files.certificate, key: files.key };
    let lxd = Lxd::https(&config.url, &config.fingerprint, &identity).map_err(step)?;
    Ok((lxd, Some(identity)))
}

/// Becomes known to LXD with its trust password or a token.
async fn introduce(root: &Lxd, config: &config::Lxd) -> Result<(), EngineError> {
    let doing = "becoming known to LXD";
    if config.secret_file.as_os_str().is_empty() {
        return Err(EngineError::Refused {
            doing,
            reason: format!(
                "LXD does not trust AMS: run `lxc config trust add {}`, or give a token in lxd.secret_file",
                config.certificate.display()
            ),
        });
    }
    let secret = tokio::fs::read_to_string(&config.secret_file)
        .await
        .map_err(|error| EngineError::io("reading lxd.secret_file", &config.secret_file, error))?;
    root.trust_us("fanlight-ams", secret.trim()).await.map_err(|error| trouble(doing, error))
}

impl Inner {
    fn is_clustered(&self) -> bool {
        self.clustered.load(Ordering::Relaxed)
    }

    /// The same project, at a member.
    fn at(&self, node: &str) -> Lxd {
        if self.is_clustered() { self.lxd.target(node) } else { self.lxd.clone() }
    }

    /// The bridges and forwards of a member.
    fn networks_at(&self, node: &str) -> Lxd {
        if self.is_clustered() { self.root.target(node) } else { self.root.clone() }
    }

    /// Where a node listens for its instances.
    fn listen_address(&self, node: &str) -> Option<IpAddr> {
        if !self.is_clustered() {
            return self.address;
        }
        lock(&self.members).get(node).and_then(|member| member.address)
    }

    /// The nodes there are; the name of one server alone does not matter.
    fn nodes(&self) -> Vec<String> {
        if !self.is_clustered() {
            return vec![String::new()];
        }
        lock(&self.members)
            .iter()
            .filter(|(_, member)| member.is_there())
            .map(|(name, _)| name.clone())
            .collect()
    }

    fn learn_gpus(&self, node: &str, gpus: &[MachineGpu]) {
        lock(&self.gpus).insert(node.to_owned(), gpus.to_vec());
    }

    fn media_port(&self, place: u32) -> Option<u16> {
        let ports = self.config.media_ports;
        let port = u32::from(ports.first).checked_add(place)?;
        u16::try_from(port).ok().filter(|port| *port <= ports.last)
    }

    /// Settings and devices of a new container.
    fn describe(&self, spec: &Spec, address: Ipv4Addr) -> Result<NewInstance, EngineError> {
        let doing = "making the container";
        let refused = |reason: String| EngineError::Refused { doing, reason };
        let image = spec.image.clone().ok_or_else(|| refused("the instance has no image".into()))?;
        let share = &spec.share;
        let mut config = map([(OURS, spec.id().to_string()), (RUN, "0".into())]);
        if share.cpus > 0 {
            config.insert("limits.cpu".into(), share.cpus.to_string());
        }
        if share.memory_bytes > 0 {
            config.insert("limits.memory".into(), share.memory_bytes.to_string());
        }
        if let Some(seconds) = spec.guest.application.hook_time_s {
            config.insert(HOOK_TIME.into(), seconds.to_string());
        }
        if !spec.addons.is_empty() {
            config.insert(HOOKS_OF.into(), addons_text(&spec.addons));
        }
        if spec.base {
            config.insert(BASE.into(), "true".into());
        }
        if spec.copy_of.is_some() {
            // A copy has the keys of its source where it is not told otherwise.
            config.extend([STARTED, READY, STOPPED].map(|key| (key.to_owned(), "0".to_owned())));
        }
        let mut root =
            map([("type", "disk".into()), ("path", "/".into()), ("pool", self.config.pool.clone())]);
        if spec.disk_bytes > 0 {
            root.insert("size".into(), spec.disk_bytes.to_string());
        }
        let nic = map([
            ("type", "nic".into()),
            ("name", "eth0".into()),
            ("network", self.config.network.clone()),
            ("ipv4.address", address.to_string()),
            ("security.mac_filtering", "true".into()),
            ("security.ipv4_filtering", "true".into()),
        ]);
        let mut devices = BTreeMap::from([("root".to_owned(), root), ("eth0".to_owned(), nic)]);
        if spec.copy_of.is_some() {
            devices.insert("gpu".to_owned(), map([("type", "none".into())]));
        }
        if let Some(number) = share.gpu {
            let gpus = lock(&self.gpus);
            let gpu = usize::try_from(number)
                .ok()
                .and_then(|number| gpus.get(spec.node.as_str())?.get(number))
                .ok_or_else(|| refused(format!("node {} has no GPU {number} any more", spec.node)))?;
            let device = map([
                ("type", "gpu".into()),
                ("gputype", "physical".into()),
                ("pci", gpu.pci_address.clone()),
                // Readable by the instance's own user, who is no member of groups of the host.
                ("mode", "0666".into()),
            ]);
            devices.insert("gpu".into(), device);
            if gpu.kind == "nvidia" {
                config.insert("nvidia.runtime".into(), "true".into());
                config.insert("nvidia.driver.capabilities".into(), "all".into());
            }
        }
        Ok(NewInstance {
            name: name(spec.id()),
            source: match &spec.copy_of {
                Some(source) => Source::Instance(name(source)),
                None => Source::Image(image),
            },
            config,
            devices,
            profiles: vec![PROFILE.into()],
        })
    }

    async fn put(&self, id: &InstanceId, file: &str, bytes: Vec<u8>) -> Result<(), EngineError> {
        let owner = FileOptions { uid: 0, gid: 0, mode: 0o600 };
        let path = format!("{GUEST_DIR}/{file}");
        self.lxd
            .push_file(&name(id), &path, bytes, owner)
            .await
            .map_err(|error| trouble("writing the files of the instance", error))
    }

    /// Puts what an addon brings into a container that does not run yet.
    async fn put_addon(&self, id: &InstanceId, addon: &str, package: PathBuf) -> Result<(), EngineError> {
        let step = |error| trouble("putting an addon into the instance", error);
        let (container, root) = (name(id), format!("{GUEST_DIR}/{ADDONS}"));
        let folder = FileOptions { uid: 0, gid: 0, mode: 0o755 };
        self.lxd.make_folder(&container, &root, folder).await.map_err(step)?;
        let mut folders = vec![(package, format!("{root}/{addon}"))];
        while let Some((from, to)) = folders.pop() {
            self.lxd.make_folder(&container, &to, folder).await.map_err(step)?;
            let fail = |error| EngineError::io("reading the addon", &from, error);
            let mut entries = tokio::fs::read_dir(&from).await.map_err(fail)?;
            while let Some(entry) = entries.next_entry().await.map_err(fail)? {
                let metadata = entry.metadata().await.map_err(fail)?;
                // The names were checked when the package was unpacked.
                let place = format!("{to}/{}", entry.file_name().to_string_lossy());
                if metadata.is_dir() {
                    folders.push((entry.path(), place));
                } else if metadata.is_symlink() {
                    let target = tokio::fs::read_link(entry.path()).await.map_err(fail)?;
                    let target = target.to_string_lossy();
                    self.lxd.push_link(&container, &place, &target).await.map_err(step)?;
                } else {
                    let options = FileOptions { uid: 0, gid: 0, mode: metadata.mode() & 0o777 };
                    self.lxd.push_path(&container, &place, &entry.path(), options).await.map_err(step)?;
                }
            }
        }
        Ok(())
    }

    async fn open_ports(&self, spec: &Spec, address: Ipv4Addr, media_port: u16) -> Result<(), EngineError> {
        let doing = "opening the ports of the instance";
        let node = spec.node.as_str();
        if self.direct {
            let named = spec.services.iter().find(|service| service.node_port > 0);
            return named.map_or(Ok(()), |service| {
                Err(EngineError::Refused {
                    doing,
                    reason: format!(
                        "service {:?} wants a port of the node, and lxd.address is {DIRECT:?}: set it to an address",
                        service.name
                    ),
                })
            });
        }
        let listen = self.listen_address(node).ok_or_else(|| EngineError::Refused {
            doing,
            reason: "it is not known at which address: set lxd.address".into(),
        })?;
        let networks = self.networks_at(node);
        let ports = network::ports(&name(spec.id()), media_port, address, &spec.services);
        let _one = self.forwards.lock().await;
        let (network, listen) = (self.config.network.as_str(), listen.to_string());
        networks.ensure_forward(network, &listen).await.map_err(|error| trouble(doing, error))?;
        networks.add_ports(network, &listen, &ports).await.map_err(|error| trouble(doing, error))
    }

    async fn close_ports(&self, id: &InstanceId, node: &str) -> Result<(), LxdError> {
        let Some(listen) = self.listen_address(node) else { return Ok(()) };
        let _one = self.forwards.lock().await;
        let networks = self.networks_at(node);
        networks.remove_ports(&self.config.network, &listen.to_string(), &name(id)).await
    }

    /// Notes a run in keys of the container.
    async fn note(&self, id: &InstanceId, key: &str, run: u32) -> Result<(), LxdError> {
        let (name, keys) = (name(id), map([(key, run.to_string())]));
        // LXD reads all keys and writes all keys: of two at a time one would be lost.
        let one = lock(&self.entries).get(id).map(|entry| entry.notes.clone()).unwrap_or_default();
        let _one = one.lock().await;
        unless_busy(|| self.lxd.patch_config(&name, &keys, None)).await
    }

    /// Ends a container, by force after `grace`. Nothing to end is fine.
    async fn end(&self, id: &InstanceId, grace: Duration) -> Result<(), LxdError> {
        let name = name(id);
        if !grace.is_zero() {
            let asked = match self.lxd.change_state(&name, StateAction::Stop, grace, false).await {
                Ok(operation) => operation.wait(grace + Duration::from_secs(5)).await.map(drop),
                Err(error) => Err(error),
            };
            if let Err(error) = asked {
                tracing::debug!(instance.id = %id, "stopping gracefully: {error}");
            }
        }
        let deadline = tokio::time::Instant::now() + KILL;
        loop {
            match self.lxd.instance(&name).await {
                Ok((instance, _)) if instance.status == "Stopped" => return Ok(()),
                Ok(_) => {}
                Err(error) if error.is_not_found() => return Ok(()),
                Err(error) => return Err(error),
            }
            let killed = match self.lxd.change_state(&name, StateAction::Stop, Duration::ZERO, true).await {
                Ok(operation) => operation.wait(KILL).await.map(drop),
                Err(error) => Err(error),
            };
            match killed {
                Ok(()) => return Ok(()),
                Err(error) if error.is_not_found() => return Ok(()),
                // Busy, or it has just ended by itself: both show at the next look.
                Err(error) if tokio::time::Instant::now() > deadline => return Err(error),
                Err(_) => tokio::time::sleep(BUSY).await,
            }
        }
    }
}

#[async_trait]
impl Engine for LxdEngine {
    fn is_shared(&self) -> bool {
        true
    }

    fn has_images(&self) -> bool {
        true
    }

    async fn machines(&self) -> Result<Vec<Machine>, EngineError> {
        self.look_at_machines().await
    }

    async fn add_machine(&self, join: &MachineJoin) -> Result<(), EngineError> {
        self.join(join).await
    }

    async fn remove_machine(&self, name: &str, force: bool) -> Result<(), EngineError> {
        self.leave(name, force).await
    }

    async fn import_image(&self, sha256: &str, file: &Path) -> Result<(), EngineError> {
        let step = |error| trouble("importing the image into LXD", error);
        let lxd = &self.inner.lxd;
        if lxd.has_image(sha256).await.map_err(step)? {
            return Ok(());
        }
        let begun = lxd.import_image(file, None, Some(sha256)).await.map_err(step)?;
        match begun.wait(IMAGE).await {
            Err(error) if error.is_exists() => Ok(()),
            result => result.map(drop).map_err(step),
        }
    }

    async fn delete_image(&self, sha256: &str) -> Result<(), EngineError> {
        let step = |error| trouble("deleting the image from LXD", error);
        match self.inner.lxd.delete_image(sha256).await {
            Ok(begun) => match begun.wait(DELETE).await {
                Err(error) if error.is_not_found() => Ok(()),
                result => result.map(drop).map_err(step),
            },
            Err(error) if error.is_not_found() => Ok(()),
            Err(error) => Err(step(error)),
        }
    }

    async fn publish(&self, id: &InstanceId) -> Result<String, EngineError> {
        let doing = "making an image of the container";
        let step = |error| trouble(doing, error);
        let lxd = &self.inner.lxd;
        // What belongs to one instance is not of the image, its token least of all.
        for file in [GUEST_FILE, RUN_FILE, STATE_FILE] {
            lxd.delete_file(&name(id), &format!("{GUEST_DIR}/{file}")).await.map_err(step)?;
        }
        let none = map([("description", format!("made of instance {id}"))]);
        let outcome = lxd.publish(&name(id), &none).await.map_err(step)?.wait(IMAGE).await.map_err(step)?;
        let fingerprint = outcome.metadata.as_ref().and_then(|metadata| metadata["fingerprint"].as_str());
        fingerprint.map(str::to_owned).ok_or_else(|| EngineError::Refused {
            doing,
            reason: "LXD does not say which image it made".into(),
        })
    }

    async fn address(&self, id: &InstanceId) -> Option<IpAddr> {
        lock(&self.inner.entries).get(id).and_then(|entry| entry.address).map(IpAddr::V4)
    }

    async fn exec(&self, id: &InstanceId, exec: Exec) -> Result<Running, EngineError> {
        let live = match lock(&self.inner.entries).get(id) {
            None => return Err(EngineError::Absent(id.clone())),
            Some(entry) => matches!(entry.seen.phase, Phase::Starting | Phase::Ready | Phase::Stopping),
        };
        if !live {
            return Err(EngineError::NotRunning(id.clone()));
        }
        exec::run(&self.inner.lxd, &name(id), exec).await.map_err(|error| match &error {
            LxdError::Refused { text, .. } if text.contains("not running") => {
                EngineError::NotRunning(id.clone())
            }
            _ => trouble("running a program in the instance", error),
        })
    }

    async fn create(&self, spec: &Spec) -> Result<(), EngineError> {
        let inner = &self.inner;
        let id = spec.id();
        let place = spec.share.place;
        let none_left = || EngineError::Refused {
            doing: "making the container",
            reason: format!("there is no address or port for place {place} (lxd.network, lxd.media_ports)"),
        };
        let address = inner.subnet.address(place).ok_or_else(none_left)?;
        let media_port = inner.media_port(place).ok_or_else(none_left)?;
        let step = |error| trouble("making the container", error);
        let there = match inner.lxd.instance(&name(id)).await {
            Ok((instance, _)) => Some(instance),
            Err(error) if error.is_not_found() => None,
            Err(error) => return Err(step(error)),
        };
        if there.is_none() {
            let new = inner.describe(spec, address)?;
            let made = match inner.at(spec.node.as_str()).create(&new).await {
                Ok(operation) => operation.wait(CREATE).await.map(drop),
                Err(error) => Err(error),
            };
            match made {
                Ok(()) => {}
                // Another attempt of ours was cut off and LXD went on with it.
                Err(error) if error.is_exists() => {}
                Err(error) => return Err(step(error)),
            }
        }
        inner.open_ports(spec, address, media_port).await?;
        let running = there.as_ref().is_some_and(|instance| instance.status != "Stopped");
        if !spec.base && !running {
            let folder = FileOptions { uid: 0, gid: 0, mode: 0o755 };
            inner
                .lxd
                .make_folder(&name(id), GUEST_DIR, folder)
                .await
                .map_err(|error| trouble("writing the files of the instance", error))?;
            let mut guest = spec.guest.clone();
            guest.media.bind = Some(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
            guest.media.port = network::MEDIA_PORT;
            guest.media.advertise = self.advertised(spec, media_port);
            let bytes = serde_json::to_vec(&guest).map_err(|error| EngineError::Refused {
                doing: "writing the files of the instance",
                reason: error.to_string(),
            })?;
            inner.put(id, GUEST_FILE, bytes).await?;
            let fresh =
                there.as_ref().is_none_or(|there| there.config.get(STARTED).is_none_or(|run| run == "0"));
            for addon in spec.addons.iter().filter(|_| fresh) {
                if let Some(package) = &addon.package {
                    inner.put_addon(id, &addon.name, package.clone()).await?;
                }
            }
            if spec.copy_of.is_some() && fresh {
                // What the source said of its last run is not said of this one.
                inner.put(id, STATE_FILE, b"{}".to_vec()).await?;
            }
        }
        inner.look(id).await;
        Ok(())
    }

    async fn start(&self, id: &InstanceId, run: u32) -> Result<(), EngineError> {
        let inner = &self.inner;
        let step = |error| trouble("starting the container", error);
        let (instance, _) = match inner.lxd.instance(&name(id)).await {
            Err(error) if error.is_not_found() => return Err(EngineError::Absent(id.clone())),
            result => result.map_err(step)?,
        };
        let known =
            |key: &str| instance.config.get(key).and_then(|run| run.parse::<u32>().ok()).unwrap_or_default();
        if known(STARTED) >= run || known(RUN) > run {
            return Ok(());
        }
        let is_base = instance.config.contains_key(BASE);
        if instance.status == "Stopped" {
            inner.note(id, RUN, run).await.map_err(step)?;
            if !is_base {
                let of_run = GuestRun {
                    version: PROTOCOL_VERSION,
                    run,
                    environment: settings_for_streamers(),
                    hook_time_s: instance
                        .config
                        .get(HOOK_TIME)
                        .and_then(|seconds| seconds.parse().ok())
                        .unwrap_or(MOST_HOOK_TIME),
                    hooks: true,
                    addons: instance.config.get(HOOKS_OF).map(|text| addons_of(text)).unwrap_or_default(),
                };
                let bytes = serde_json::to_vec(&of_run).map_err(|error| EngineError::Refused {
                    doing: "writing the files of the instance",
                    reason: error.to_string(),
                })?;
                inner.put(id, RUN_FILE, bytes).await?;
            }
            let name = name(id);
            let start = || async {
                let begun = inner.lxd.change_state(&name, StateAction::Start, START, false).await?;
                begun.wait(START).await
            };
            let mut begun = unless_busy(start).await;
            if let Err(error) = &begun
                && error.is_failed_start()
            {
                // LXD gives its own hooks 30 s, which a machine that is busy with its disk may miss.
                tracing::warn!(instance.id = %id, "starting the container of instance {id} once more: {error}");
                begun = unless_busy(start).await;
            }
            begun.map_err(step)?;
        } else if known(RUN) < run {
            return Err(EngineError::Refused {
                doing: "starting the container",
                reason: format!("it is {}", instance.status),
            });
        }
        inner.note(id, STARTED, run).await.map_err(step)?;
        inner.look(id).await;
        Ok(())
    }

    async fn stop(&self, id: &InstanceId, grace: Duration) {
        let run = {
            let mut entries = lock(&self.inner.entries);
            let Some(entry) = entries.get_mut(id).filter(|entry| entry.seen.phase.is_live()) else { return };
            if entry.ending == Some(grace.is_zero()) || entry.ending == Some(true) {
                return;
            }
            entry.ending = Some(grace.is_zero());
            entry.seen.run
        };
        let (inner, id) = (self.inner.clone(), id.clone());
        tokio::spawn(async move {
            if let Err(error) = inner.note(&id, STOPPED, run).await {
                tracing::debug!(instance.id = %id, "noting that instance {id} should end: {error}");
            }
            if let Err(error) = inner.end(&id, grace).await {
                tracing::warn!(instance.id = %id, "stopping instance {id}: {error}");
            }
            if let Some(entry) = lock(&inner.entries).get_mut(&id) {
                entry.ending = None;
            }
            inner.look(&id).await;
        });
    }

    async fn delete(&self, id: &InstanceId) -> Result<(), EngineError> {
        let inner = &self.inner;
        let step = |error| trouble("deleting the container", error);
        let there = match inner.lxd.instance(&name(id)).await {
            Ok((instance, _)) => Some(instance),
            Err(error) if error.is_not_found() => None,
            Err(error) => return Err(step(error)),
        };
        let node = there.as_ref().map(|instance| instance.location.clone()).or_else(|| {
            let entries = lock(&inner.entries);
            entries.get(id).map(|entry| entry.node.clone())
        });
        // First the ports: a container without a record is found again, ports without one are not. Of a container that
        // somebody else removed nobody knows where it was.
        let nodes = node.map_or_else(|| inner.nodes(), |node| vec![node]);
        for node in nodes {
            inner.close_ports(id, &node).await.map_err(step)?;
        }
        if let Some(instance) = there {
            if instance.status != "Stopped" {
                inner.end(id, Duration::ZERO).await.map_err(step)?;
            }
            let deadline = tokio::time::Instant::now() + DELETE;
            loop {
                let deleted = match inner.lxd.delete(&name(id)).await {
                    Ok(operation) => operation.wait(DELETE).await.map(drop),
                    Err(error) => Err(error),
                };
                match deleted {
                    Ok(()) => break,
                    Err(error) if error.is_not_found() => break,
                    Err(error) if tokio::time::Instant::now() > deadline => return Err(step(error)),
                    Err(error @ (LxdError::Unreachable { .. } | LxdError::TimedOut { .. })) => {
                        return Err(step(error));
                    }
                    // LXD ends what it does with the container first.
                    Err(_) => tokio::time::sleep(BUSY).await,
                }
            }
        }
        inner.gone(id, inner.begin_look());
        Ok(())
    }

    async fn seen(&self, id: &InstanceId) -> Seen {
        self.inner.seen(id)
    }

    async fn status(&self, id: &InstanceId) -> String {
        lock(&self.inner.entries).get(id).map(|entry| entry.status.clone()).unwrap_or_default()
    }

    async fn list(&self) -> Result<Vec<InstanceId>, EngineError> {
        self.inner.look_at_all().await.map_err(|error| trouble("listing the containers of LXD", error))?;
        Ok(lock(&self.inner.entries).keys().cloned().collect())
    }

    async fn logs(&self, id: &InstanceId) -> Vec<String> {
        let there = lock(&self.inner.entries).contains_key(id);
        LOGS.iter().filter(|_| there).map(|log| (*log).to_owned()).collect()
    }

    async fn read_log(&self, id: &InstanceId, log: &str) -> Result<Vec<u8>, EngineError> {
        let no_log = || EngineError::NoLog(log.to_owned());
        if !LOGS.contains(&log) {
            return Err(no_log());
        }
        let (lxd, name) = (&self.inner.lxd, name(id));
        let read = match log {
            "console.log" => lxd.console_log(&name).await,
            "lxc.log" => lxd.log(&name, log).await,
            _ => lxd.read_file(&name, &format!("{LOG_DIR}/{log}")).await,
        };
        match read {
            Ok(bytes) => Ok(bytes.to_vec()),
            Err(error) if error.is_not_found() => Err(no_log()),
            // A file that is not there is a failure of no particular kind to some releases.
            Err(LxdError::Refused { text, .. } | LxdError::Failed { text, .. })
                if text.contains("no such file") || text.contains("does not exist") =>
            {
                Err(no_log())
            }
            Err(error) => Err(trouble("reading the log", error)),
        }
    }

    fn changes(&self) -> broadcast::Receiver<InstanceId> {
        self.inner.changes.subscribe()
    }
}

impl LxdEngine {
    /// Where clients reach the media of an instance: at its own address where they are on the same machine, else as configured, else the node's public address, else where the
    /// node listens.
    fn advertised(&self, spec: &Spec, media_port: u16) -> Vec<std::net::SocketAddr> {
        if self.inner.direct {
            let own = self.inner.subnet.address(spec.share.place);
            return own.map(|own| (IpAddr::V4(own), network::MEDIA_PORT).into()).into_iter().collect();
        }
        let mut all: Vec<_> = spec.guest.media.advertise.iter().map(|address| address.ip()).collect();
        if all.is_empty() {
            all.extend(spec.public_address);
        }
        if all.is_empty() {
            all.extend(self.inner.listen_address(spec.node.as_str()));
        }
        all.into_iter().map(|ip| (ip, media_port).into()).collect()
    }
}

/// Settings for the streamers of all instances; no secret is among them.
fn settings_for_streamers() -> BTreeMap<String, String> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .filter(|(name, _)| name.starts_with("STREAMER_") || name == "FANLIGHT_LOG")
        .collect()
}
