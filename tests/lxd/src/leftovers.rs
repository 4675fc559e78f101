//! What a run that was killed left behind: found by a folder with our marker whose lock nobody holds.

use std::{
    fs::{self, File},
    path::Path,
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use rustix::{
    fs::{FlockOperation, flock},
    process::{Pid, Signal, kill_process},
};
use tempfile::TempDir;

const PREFIX: &str = "fanlight-lxd-";
const CGROUPS: &str = "/sys/fs/cgroup";

/// A new folder and its lock.
pub fn folder() -> Result<(TempDir, File)> {
    let folder = tempfile::Builder::new().prefix(PREFIX).tempdir().context("a folder")?;
    let lock = File::create(folder.path().join("lock"))?;
    flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
    // Those that are there now are somebody else's.
    fs::write(folder.path().join("cgroups"), lxc_cgroups().join("\n"))?;
    Ok((folder, lock))
}

/// Ends and removes what runs that were killed left behind.
pub fn clean() -> Result<()> {
    for entry in fs::read_dir(std::env::temp_dir())?.flatten() {
        let path = entry.path();
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        let Ok(lock) = File::open(path.join("lock")) else { continue };
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            continue;
        }
        for file in fs::read_dir(&path)?.flatten() {
            if file.path().extension().is_some_and(|extension| extension == "pid") {
                end(&file.path(), &path);
            }
        }
        // The kernel releases the mounts of a namespace a moment after its last process.
        thread::sleep(Duration::from_millis(500));
        remove_cgroups(&path);
        fs::remove_dir_all(&path).with_context(|| format!("removing {}", path.display()))?;
    }
    Ok(())
}

/// Ends the process with the id in this file, if it still is what we started: other ones get old numbers.
fn end(file: &Path, folder: &Path) {
    let Ok(text) = fs::read_to_string(file) else { return };
    let Ok(number) = text.trim().parse::<i32>() else { return };
    let line = fs::read(format!("/proc/{number}/cmdline")).unwrap_or_default();
    let line = String::from_utf8_lossy(&line).replace('\0', " ");
    let is_member = line.contains(&*folder.to_string_lossy());
    let is_hub = line.trim() == "sleep infinity" && file.to_string_lossy().ends_with("hub.pid");
    if let Some(pid) = Pid::from_raw(number).filter(|_| is_member || is_hub) {
        // It takes the first process of its namespace with it.
        let _ = kill_process(pid, Signal::KILL);
    }
}

/// Removes the control groups of containers that were not there before. One with processes in it stays.
pub fn remove_cgroups(folder: &Path) {
    let before = fs::read_to_string(folder.join("cgroups")).unwrap_or_default();
    for path in lxc_cgroups() {
        if !before.lines().any(|line| line == path) {
            remove_tree(Path::new(&path));
        }
    }
}

fn remove_tree(path: &Path) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path());
        }
    }
    // Processes that end now may still be in it.
    for _ in 0..20 {
        match fs::remove_dir(path) {
            Err(error) if error.raw_os_error() == Some(16) => thread::sleep(Duration::from_millis(25)),
            _ => return,
        }
    }
}

fn lxc_cgroups() -> Vec<String> {
    let mut found = Vec::new();
    for controller in fs::read_dir(CGROUPS).into_iter().flatten().flatten() {
        // Links name two controllers that are mounted together.
        if !controller.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        for group in fs::read_dir(controller.path()).into_iter().flatten().flatten() {
            let name = group.file_name().to_string_lossy().into_owned();
            if ["lxc.payload", "lxc.monitor", "lxc.pivot"].iter().any(|prefix| name.starts_with(prefix)) {
                found.push(group.path().to_string_lossy().into_owned());
            }
        }
    }
    found
}
