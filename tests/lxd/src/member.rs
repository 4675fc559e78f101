//! One member: a process namespace that holds everything it starts, with its own network, mounts and LXD folder.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::{run, wait};

/// Makes the mounts of a member. LXD reads the interfaces of its network namespace below `/sys`, and a new `/sys` has
/// no control groups. Then it waits for whatever ends without a parent, as the first process of a machine does: LXD
/// takes a container whose monitor nobody waited for as one that still runs.
const MOUNTS: &str = "set -e; mkdir -p \"$1/cgroup\"; mount --rbind /sys/fs/cgroup \"$1/cgroup\"; \
    mount -t sysfs sysfs /sys; mount --rbind \"$1/cgroup\" /sys/fs/cgroup; ip link set lo up; \
    touch \"$1/mounted\"; sleep infinity & wait";

/// A machine with LXD. Dropping it ends everything in it.
pub struct Member {
    /// Its name.
    pub name: String,
    /// LXD's folder.
    pub folder: PathBuf,
    /// Keeps the namespaces; what it started is process 1 of them.
    holder: Child,
    pid: i32,
    daemon: Option<Child>,
}

impl Member {
    pub(crate) fn new(root: &Path, name: &str) -> Result<Self> {
        let folder = root.join(name);
        fs::create_dir(&folder)?;
        let mut command = Command::new("unshare");
        command.args([
            "-n",
            "-m",
            "-p",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "--propagation",
            "private",
        ]);
        command.args(["sh", "-c", MOUNTS, "sh"]).arg(&folder);
        // It complains when it is ended, which is no news.
        command.stdin(Stdio::null()).stderr(fs::File::create(folder.join("holder.log"))?);
        let holder = command.spawn().context("unshare")?;
        let mut member = Self { name: name.into(), folder, holder, pid: 0, daemon: None };
        fs::write(root.join(format!("{name}.pid")), member.holder.id().to_string())?;
        wait("the namespaces of a member", || Ok(member.folder.join("mounted").exists()))?;
        member.pid = child_of(member.holder.id()).context("there is no first process")?;
        Ok(member)
    }

    /// First process of its namespaces, as this machine sees it.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// A program within the member.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["-t", &self.pid.to_string(), "-m", "-n", "-p", "--", program]);
        command.env("LXD_DIR", &self.folder);
        command
    }

    pub(crate) fn run_line(&self, line: &str) -> Result<()> {
        let mut words = line.split(' ');
        run(self.command(words.next().unwrap_or_default()).args(words))
    }

    /// Starts LXD and waits until it answers.
    ///
    /// # Errors
    /// It does not.
    pub fn start(&mut self) -> Result<()> {
        let mut command = self.command("lxd");
        if std::env::var_os("FANLIGHT_LXD_LOGS").is_some() {
            command.arg("--debug");
        }
        command.args(["--group", "root", "--logfile"]).arg(self.folder.join("lxd.log"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.daemon = Some(command.spawn().context("lxd")?);
        run(self.command("lxd").args(["waitready", "--timeout", "60"]))
    }

    /// Kills LXD, and leaves its instances.
    ///
    /// # Errors
    /// It does not run.
    pub fn kill(&mut self) -> Result<()> {
        let mut daemon = self.daemon.take().context("LXD does not run")?;
        let pid = child_of(daemon.id()).context("LXD does not run")?;
        kill_process(Pid::from_raw(pid).context("a process id")?, Signal::KILL)?;
        daemon.wait()?;
        Ok(())
    }

    pub(crate) fn init(&self, preseed: &str) -> Result<()> {
        let mut command = self.command("lxd");
        command.args(["init", "--preseed"]);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().context("lxd init")?;
        child.stdin.take().context("its input")?.write_all(preseed.as_bytes())?;
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("lxd init on {}: {}", self.name, String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        // With the first process of its namespace everything in it ends, its mounts and loop devices too.
        if let Some(pid) = Pid::from_raw(self.pid).filter(|_| self.pid > 1) {
            let _ = kill_process(pid, Signal::KILL);
        }
        if self.pid == 0 {
            let _ = self.holder.kill();
        }
        let _ = self.holder.wait();
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.wait();
        }
        // For whoever looks for the reason of a failure.
        if let Some(kept) = std::env::var_os("FANLIGHT_LXD_LOGS") {
            let _ =
                fs::copy(self.folder.join("lxd.log"), PathBuf::from(kept).join(format!("{}.log", self.name)));
        }
    }
}

/// The only child of a process.
fn child_of(pid: u32) -> Option<i32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    children.split_whitespace().next()?.parse().ok()
}
