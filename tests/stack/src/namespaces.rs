//! A network of its own for a test, made of network namespaces: a server, a TURN server and, behind a router that
//! translates addresses, a client. Nothing of this machine's own network is touched, and nothing is left.
//!
//! ```text
//! server 10.77.1.2 ─┐
//! turn   10.77.1.3 ─┼─ bridge ─ 10.77.1.4 router 192.168.77.1 ─ 192.168.77.2 client
//! ```

use std::{
    io::Write,
    net::{IpAddr, Ipv4Addr},
    panic::resume_unwind,
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::SOON;

/// Where the stack runs.
pub const SERVER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 1, 2));
/// Where the TURN server runs.
pub const TURN: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 1, 3));
/// The router, as the servers see it.
pub const ROUTER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 1, 4));
/// The client, as it sees itself.
pub const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 168, 77, 2));

/// Programs that are needed, and the packages that hold them.
const PROGRAMS: [(&str, &str); 3] = [("ip", "iproute2"), ("nft", "nftables"), ("turnserver", "coturn")];
const NAMES: [&str; 5] = ["bridge", "server", "turn", "router", "client"];

/// Counts the networks of this process.
static MADE: AtomicU32 = AtomicU32::new(0);

/// The network. Dropping it removes it; [`Network::end`] also looks for what is left in it.
pub struct Network {
    prefix: String,
}

/// A place in the network. Cheap to copy around.
#[derive(Clone, Debug)]
pub struct Place {
    namespace: String,
}

impl Network {
    /// Makes the network.
    ///
    /// # Errors
    /// A program is missing, or we may not do that.
    pub fn new() -> Result<Self> {
        for (program, package) in PROGRAMS {
            find(program).with_context(|| format!("install the package {package}"))?;
        }
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let network = Self { prefix: format!("fl{}n{number}", std::process::id()) };
        for name in NAMES {
            let namespace = network.place(name).namespace;
            run("ip", &["netns", "add", &namespace])?;
            run("ip", &["-n", &namespace, "link", "set", "lo", "up"])?;
        }
        let bridge = network.place("bridge").namespace;
        run("ip", &["-n", &bridge, "link", "add", "br0", "type", "bridge"])?;
        run("ip", &["-n", &bridge, "link", "set", "br0", "up"])?;
        for (name, address) in [("server", SERVER), ("turn", TURN), ("router", ROUTER)] {
            let place = network.place(name);
            place.link("eth0", &network.place("bridge"), name, &format!("{address}/24"))?;
            run("ip", &["-n", &bridge, "link", "set", name, "master", "br0"])?;
        }
        let (router, client) = (network.router(), network.client());
        client.link("eth0", &router, "lan0", &format!("{CLIENT}/24"))?;
        run("ip", &["-n", &router.namespace, "address", "add", "192.168.77.1/24", "dev", "lan0"])?;
        run("ip", &["-n", &client.namespace, "route", "add", "default", "via", "192.168.77.1"])?;
        router.within(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").context("routing"))?;
        // A port of its own for each destination: the strictest kind of NAT.
        router.nft(&[
            "add table ip nat",
            "add chain ip nat out { type nat hook postrouting priority srcnat; }",
            "add rule ip nat out oifname eth0 masquerade fully-random",
            "add table ip media",
            "add chain ip media through { type filter hook forward priority filter; }",
        ])?;
        Ok(network)
    }

    fn place(&self, name: &str) -> Place {
        Place { namespace: format!("{}-{name}", self.prefix) }
    }

    /// Where the stack runs.
    pub fn server(&self) -> Place {
        self.place("server")
    }

    /// Where the TURN server runs.
    pub fn turn(&self) -> Place {
        self.place("turn")
    }

    /// Between the client and the others.
    pub fn router(&self) -> Place {
        self.place("router")
    }

    /// Behind the router.
    pub fn client(&self) -> Place {
        self.place("client")
    }

    /// Removes the network.
    ///
    /// # Errors
    /// Something still runs in it.
    pub fn end(self) -> Result<()> {
        let end = Instant::now() + SOON;
        for name in NAMES {
            let namespace = self.place(name).namespace;
            loop {
                let left = output(Command::new("ip").args(["netns", "pids", &namespace]))?;
                if left.trim().is_empty() {
                    break;
                }
                // What was ended a moment ago may not be gone.
                ensure!(Instant::now() < end, "processes are left in {name}: {left:?}");
                thread::sleep(Duration::from_millis(50));
            }
        }
        Ok(())
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in NAMES {
            let namespace = self.place(name).namespace;
            // Those that were never made are not there.
            let _ = Command::new("ip").args(["netns", "delete", &namespace]).stderr(Stdio::null()).status();
        }
    }
}

impl Place {
    /// Joins an interface here to one there.
    fn link(&self, own: &str, other: &Place, theirs: &str, address: &str) -> Result<()> {
        let (here, there) = (&self.namespace, &other.namespace);
        run("ip", &["-n", here, "link", "add", own, "type", "veth", "peer", "name", theirs, "netns", there])?;
        run("ip", &["-n", here, "address", "add", address, "dev", own])?;
        run("ip", &["-n", here, "link", "set", own, "up"])?;
        run("ip", &["-n", there, "link", "set", theirs, "up"])
    }

    fn nft(&self, lines: &[&str]) -> Result<()> {
        let rules = lines.join("\n");
        let mut nft = self
            .command("nft")
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("starting nft")?;
        nft.stdin.take().context("nft has no input")?.write_all(rules.as_bytes())?;
        let ended = nft.wait_with_output()?;
        ensure!(ended.status.success(), "nft {rules}: {}", String::from_utf8_lossy(&ended.stderr));
        Ok(())
    }

    /// Adds rules for what a router lets through, such as `udp dport 53 drop`.
    ///
    /// # Errors
    /// They are not understood.
    pub fn filter(&self, rules: &[&str]) -> Result<()> {
        let lines: Vec<String> =
            rules.iter().map(|rule| format!("add rule ip media through {rule}")).collect();
        self.nft(&lines.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Packets that rules with a `counter` have met.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn counted(&self) -> Result<u64> {
        let listed = self.output("nft", &["--json", "list", "chain", "ip", "media", "through"])?;
        let listed: serde_json::Value = serde_json::from_str(&listed).context("reading what nft lists")?;
        let rules = listed["nftables"].as_array().context("nft lists no rules")?;
        let parts = rules.iter().filter_map(|rule| rule["rule"]["expr"].as_array()).flatten();
        Ok(parts.filter_map(|part| part["counter"]["packets"].as_u64()).sum())
    }

    /// A program that will run here.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace, program]);
        command
    }

    /// Runs a program here; what it prints.
    ///
    /// # Errors
    /// It fails.
    pub fn output(&self, program: &str, arguments: &[&str]) -> Result<String> {
        output(self.command(program).args(arguments))
    }

    /// Does something in a thread that is here.
    ///
    /// # Errors
    /// As the work, or there is no such place.
    pub fn within<T: Send + 'static>(&self, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
        let path = format!("/run/netns/{}", self.namespace);
        let entered = move || {
            let namespace = std::fs::File::open(&path).with_context(|| format!("opening {path}"))?;
            move_into_link_name_space(std::os::fd::AsFd::as_fd(&namespace), Some(LinkNameSpaceType::Network))
                .context("entering a network namespace")?;
            work()
        };
        thread::spawn(entered).join().unwrap_or_else(|panic| resume_unwind(panic))
    }

    /// The same for work that waits. Threads and programs that it starts are here too.
    ///
    /// # Errors
    /// As the work, or there is no such place.
    pub fn run<T, F>(&self, work: impl FnOnce() -> F + Send + 'static) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>>,
    {
        self.within(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .context("making a runtime")?;
            let result = runtime.block_on(work());
            runtime.shutdown_background();
            result
        })
    }

    /// The same from within other work, which goes on meanwhile.
    ///
    /// # Errors
    /// As the work, or there is no such place.
    pub async fn visit<T, F>(&self, work: impl FnOnce() -> F + Send + 'static) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>>,
    {
        let place = self.clone();
        match tokio::task::spawn_blocking(move || place.run(work)).await {
            Ok(result) => result,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => resume_unwind(panic),
                Err(error) => Err(error).context("visiting another place"),
            },
        }
    }
}

/// A program, also where only the administrator looks.
///
/// # Errors
/// It is not installed.
fn find(program: &str) -> Result<()> {
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let mut known = std::env::split_paths(&folders).chain(["/usr/sbin".into(), "/sbin".into()]);
    ensure!(known.any(|folder| folder.join(program).is_file()), "{program} is not installed");
    Ok(())
}

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    output(Command::new(program).args(arguments)).map(|_| ())
}

fn output(command: &mut Command) -> Result<String> {
    let ended = command.stdin(Stdio::null()).output().with_context(|| format!("running {command:?}"))?;
    if !ended.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&ended.stderr));
    }
    String::from_utf8(ended.stdout).context("reading its output")
}
