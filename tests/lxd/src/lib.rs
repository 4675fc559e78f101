//! A real LXD for tests: one member or a cluster of three, in namespaces of its own, and a small image. Needs root; the
//! machine's own network, cgroups and LXD are left as they are, and nothing is left behind.
//!
//! ```text
//! hub 10.91.0.1 (tests run here: no route to the instances) ─ bridge ─┬─ m1 10.91.0.11 ─ lxdbr0 10.155.0.1/24
//!                                                                     └─ m2, m3: 10.91.0.12, 10.91.0.13
//! ```

pub mod image;
mod leftovers;
mod member;
pub mod stack;

use std::{
    fs::{self, File},
    future::Future,
    os::fd::AsFd,
    panic::resume_unwind,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use fanlight_client::Identity;
use fanlight_lxd::Lxd;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

pub use member::Member;

/// Programs that are needed, and the packages that hold them.
const PROGRAMS: [(&str, &str); 9] = [
    ("lxd", "lxd"),
    ("lxc", "lxd-client"),
    ("mmdebstrap", "mmdebstrap"),
    ("mkfs.btrfs", "btrfs-progs"),
    ("unsquashfs", "squashfs-tools"),
    ("dnsmasq", "dnsmasq-base"),
    ("nft", "nftables"),
    ("setfacl", "acl"),
    ("newuidmap", "uidmap"),
];
/// Name of the pool that instances are on.
pub const POOL: &str = "bt";
/// Name of the network that instances are in.
pub const NETWORK: &str = "lxdbr0";
/// Bound on whatever LXD does.
pub const SOON: Duration = Duration::from_secs(60);

/// LXD that runs. Dropping it ends and removes all of it.
pub struct Harness {
    members: Vec<Member>,
    hub: Child,
    /// What is thrown away at the end, with the lock that says that it is in use.
    folder: TempDir,
    password: String,
    _lock: File,
}

impl Harness {
    /// One member alone.
    ///
    /// # Errors
    /// Something is missing, or LXD does not start.
    pub fn single() -> Result<Self> {
        let mut harness = Self::hub()?;
        harness.add("m1", 11)?;
        let preseed = harness.preseed("config: {core.https_address: \"10.91.0.11:8443\"");
        harness.members[0].init(&preseed)?;
        Ok(harness)
    }

    /// A cluster of three.
    ///
    /// # Errors
    /// Something is missing, or LXD does not start.
    pub fn cluster() -> Result<Self> {
        let mut harness = Self::hub()?;
        harness.add("m1", 11)?;
        let mut preseed = harness.preseed("config: {core.https_address: \"10.91.0.11:8443\"");
        preseed.push_str("cluster: {server_name: m1, enabled: true}\n");
        harness.members[0].init(&preseed)?;
        let certificate = harness.members[0].folder.join("cluster.crt");
        for (name, host) in [("m2", 12), ("m3", 13)] {
            harness.add(name, host)?;
            let preseed = format!(
                "cluster: {{enabled: true, server_name: {name}, server_address: \"10.91.0.{host}:8443\", \
                 cluster_address: \"10.91.0.11:8443\", cluster_certificate_path: {}, cluster_password: {}, \
                 member_config: [{{entity: storage-pool, name: {POOL}, key: size, value: 3GiB}}]}}\n",
                certificate.display(),
                harness.password
            );
            harness.members.last().context("a member was added")?.init(&preseed)?;
        }
        Ok(harness)
    }

    fn preseed(&self, config: &str) -> String {
        format!(
            "{config}, core.trust_password: {}}}\n\
             networks: [{{name: {NETWORK}, type: bridge, config: {{ipv4.address: 10.155.0.1/24, \
             ipv4.nat: \"true\", ipv6.address: none}}}}]\n\
             storage_pools: [{{name: {POOL}, driver: btrfs, config: {{size: 3GiB}}}}]\n\
             profiles: [{{name: default, devices: {{root: {{type: disk, path: /, pool: {POOL}}}, \
             eth0: {{type: nic, network: {NETWORK}, name: eth0}}}}}}]\n",
            self.password
        )
    }

    fn hub() -> Result<Self> {
        ensure!(rustix::process::geteuid().is_root(), "a real LXD needs root");
        for (program, package) in PROGRAMS {
            find(program).with_context(|| format!("install the package {package}"))?;
        }
        // What the parts under test say, when somebody wants to know; the first of them sets it for all.
        let filter = tracing_subscriber::EnvFilter::from_env("FANLIGHT_LOG");
        let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
        // The hub has no way to the mirrors of Debian, so the image is made before.
        image::debian()?;
        leftovers::clean()?;
        let (folder, lock) = leftovers::folder()?;
        let hub = Command::new("unshare").args(["-n", "sleep", "infinity"]).spawn().context("unshare")?;
        fs::write(folder.path().join("hub.pid"), hub.id().to_string())?;
        let password = hex::encode(Sha256::digest(folder.path().as_os_str().as_encoded_bytes()));
        let harness = Self { members: Vec::new(), hub, folder, password, _lock: lock };
        own_namespace(harness.hub.id())?;
        for line in ["link set lo up", "link add hub0 type bridge", "address add 10.91.0.1/24 dev hub0"] {
            harness.ip(line)?;
        }
        harness.ip("link set hub0 up")?;
        // Peers look for each other by multicast too.
        harness.ip("route add 224.0.0.0/4 dev hub0")?;
        make_identity(harness.folder.path())?;
        Ok(harness)
    }

    fn ip(&self, line: &str) -> Result<()> {
        let hub = self.hub.id().to_string();
        let mut command = Command::new("nsenter");
        run(command.args(["-t", &hub, "-n", "ip"]).args(line.split(' ')))
    }

    fn add(&mut self, name: &str, host: u8) -> Result<()> {
        let member = Member::new(self.folder.path(), name)?;
        self.ip(&format!("link add {name} type veth peer name eth0 netns {}", member.pid()))?;
        self.ip(&format!("link set {name} master hub0 up"))?;
        member.run_line(&format!("ip address add 10.91.0.{host}/24 dev eth0"))?;
        member.run_line("ip link set eth0 up")?;
        self.members.push(member);
        self.members.last_mut().context("a member was added")?.start()
    }

    /// The members, in the order in which they were made.
    pub fn members(&mut self) -> &mut [Member] {
        &mut self.members
    }

    /// The trust password.
    pub fn password(&self) -> &str {
        &self.password
    }

    /// Our certificate and its key.
    pub fn identity(&self) -> Identity {
        Identity { certificate: self.path("client.crt"), key: self.path("client.key") }
    }

    /// A file in the folder that is thrown away.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Process id of what keeps the hub's namespace.
    pub fn hub_pid(&self) -> u32 {
        self.hub.id()
    }

    /// A machine without anything beside the hub, at `10.91.0.HOST`.
    ///
    /// # Errors
    /// Its namespace cannot be made.
    pub fn neighbour(&self, name: &str, host: u8) -> Result<Neighbour> {
        let holder = Command::new("unshare").args(["-n", "sleep", "infinity"]).spawn().context("unshare")?;
        let pid = holder.id();
        fs::write(self.folder.path().join(format!("{name}-hub.pid")), pid.to_string())?;
        let neighbour = Neighbour { holder };
        own_namespace(pid)?;
        self.ip(&format!("link add {name} type veth peer name eth0 netns {pid}"))?;
        self.ip(&format!("link set {name} master hub0 up"))?;
        for line in ["link set lo up", &format!("address add 10.91.0.{host}/24 dev eth0"), "link set eth0 up"]
        {
            run(neighbour.command("ip").args(line.split(' ')))?;
        }
        Ok(neighbour)
    }

    /// Rules of a filter for what the hub sends; the last ones replace those before.
    ///
    /// # Errors
    /// `nft` refuses them.
    pub fn filter(&self, rules: &[&str]) -> Result<()> {
        let hub = self.hub.id().to_string();
        let nft = |text: &str| {
            let mut command = Command::new("nsenter");
            run(command.args(["-t", &hub, "-n", "nft", text]))
        };
        nft("add table inet test; delete table inet test; add table inet test; \
             add chain inet test out { type filter hook output priority 0; }")?;
        rules.iter().try_for_each(|rule| nft(&format!("add rule inet test out {rule}")))
    }

    /// Over the unix socket of a member.
    ///
    /// # Errors
    /// The client cannot be set up.
    pub fn unix(&self, member: usize) -> Result<Lxd> {
        Ok(Lxd::unix(self.members[member].folder.join("unix.socket"))?)
    }

    /// Over HTTPS of a member. Use it within [`Harness::within`].
    ///
    /// # Errors
    /// The client cannot be set up.
    pub fn https(&self, member: usize, fingerprint: &str) -> Result<Lxd> {
        let url = format!("https://10.91.0.{}:8443", 11 + member);
        Ok(Lxd::https(&url, fingerprint, &self.identity())?)
    }

    /// Runs this in the hub, whose network reaches the members but not their instances.
    ///
    /// # Errors
    /// What it returns, or the hub cannot be entered.
    pub fn within<T: Send>(&self, test: impl Future<Output = Result<T>> + Send) -> Result<T> {
        let namespace = File::open(format!("/proc/{}/ns/net", self.hub.id()))?;
        let run = || {
            // The runtime has this thread alone, so that all of its sockets are made here.
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
            tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(test)
        };
        thread::scope(|scope| scope.spawn(run).join()).unwrap_or_else(|panic| resume_unwind(panic))
    }
}

impl Drop for Harness {
    fn drop(&mut self) {
        self.members.clear();
        // It may have ended by itself.
        let _ = self.hub.kill();
        let _ = self.hub.wait();
        leftovers::remove_cgroups(self.folder.path());
    }
}

/// A machine that has an address beside the hub's. Dropping it ends it.
pub struct Neighbour {
    holder: Child,
}

impl Neighbour {
    /// A program in its network.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["-t", &self.holder.id().to_string(), "-n", "--", program]);
        command
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// Waits until a process has a network namespace that is not ours: it makes it a moment after it was started.
fn own_namespace(pid: u32) -> Result<()> {
    let own = fs::read_link("/proc/self/ns/net")?;
    wait("a namespace", || Ok(fs::read_link(format!("/proc/{pid}/ns/net"))? != own))
}

/// A certificate of ours for HTTPS.
fn make_identity(folder: &Path) -> Result<()> {
    let made = rcgen::generate_simple_self_signed(vec!["fanlight".to_owned()])?;
    fs::write(folder.join("client.crt"), made.cert.pem())?;
    fs::write(folder.join("client.key"), made.signing_key.serialize_pem())?;
    Ok(())
}

fn find(program: &str) -> Result<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    let folders = path.split(':').chain(["/usr/sbin", "/sbin"]);
    folders
        .map(|folder| Path::new(folder).join(program))
        .find(|path| path.is_file())
        .with_context(|| format!("{program} is missing"))
}

/// SHA-256 of these bytes, hex.
pub fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// Waits until this is so.
///
/// # Errors
/// It is not within [`SOON`], or finding out fails.
pub fn wait(what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + SOON;
    while !is_so().with_context(|| format!("waiting for {what}"))? {
        ensure!(Instant::now() < end, "{what}: not within {} s", SOON.as_secs());
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

pub(crate) fn run(command: &mut Command) -> Result<()> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("{command:?}"))?;
    if !output.status.success() {
        bail!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
