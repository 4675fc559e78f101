//! Processes of this machine as `/proc` shows them.

use std::{collections::BTreeMap, fs};

/// A process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Process id.
    pub pid: i32,
    /// Id of the parent.
    pub parent: i32,
    /// Name, at most 15 characters.
    pub name: String,
    /// Command line, words separated by blanks.
    pub command: String,
}

/// All of them by pid. Zombies are left out: they are nothing but a number.
pub fn all() -> BTreeMap<i32, Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
            // The name may hold anything, closing brackets included.
            let (before, after) = stat.rsplit_once(')')?;
            let name = before.split_once('(')?.1.to_owned();
            let mut fields = after.split_whitespace();
            let state = fields.next()?;
            let parent = fields.next()?.parse().ok()?;
            let command = fs::read(entry.path().join("cmdline")).ok()?;
            let command = String::from_utf8_lossy(&command).replace('\0', " ").trim().to_owned();
            (state != "Z").then_some((pid, Process { pid, parent, name, command }))
        })
        .collect()
}

/// Those whose command line holds a text, with everything below them.
pub fn with(text: &str) -> Vec<Process> {
    let all = all();
    let me = std::process::id() as i32;
    let below = |mut pid: i32| {
        // Parents are followed a bounded way: the table may be torn.
        for _ in 0..64 {
            match all.get(&pid) {
                Some(process) if process.pid != me && process.command.contains(text) => return true,
                Some(process) if process.parent > 0 => pid = process.parent,
                _ => return false,
            }
        }
        false
    };
    all.values().filter(|process| below(process.pid)).cloned().collect()
}

/// Kills a process at once.
pub fn kill(pid: i32) {
    if let Some(pid) = rustix::process::Pid::from_raw(pid) {
        // It may have ended by itself.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}
