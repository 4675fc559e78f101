//! Processes of this machine by pid and start time, so that a pid that was given to another process is never
//! taken for the one that was meant.

use std::{fs, io};

use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

/// A process, told apart from all others there ever were on this machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Process id.
    pub pid: i32,
    /// Start, in clock ticks since boot (`proc(5)`, field 22 of `stat`).
    pub started: u64,
    /// Id of the boot.
    pub boot: String,
}

/// What `stat` says of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    /// `R`, `S`, `Z`, ….
    pub state: char,
    /// Process id of the parent.
    pub parent: i32,
    /// Start, in clock ticks since boot.
    pub started: u64,
}

impl Identity {
    /// The process with this pid; none when there is none.
    pub fn of(pid: i32) -> Option<Self> {
        Some(Self { pid, started: stat(pid)?.started, boot: boot_id() })
    }

    /// This process.
    pub fn own() -> io::Result<Self> {
        Self::of(std::process::id().cast_signed())
            .ok_or_else(|| io::Error::other("/proc is not there: this process is not in it"))
    }

    /// Whether it still runs. A zombie does not.
    pub fn is_alive(&self) -> bool {
        self.boot == boot_id()
            && stat(self.pid)
                .is_some_and(|stat| stat.started == self.started && !matches!(stat.state, 'Z' | 'X'))
    }

    /// Sends a signal, if it still runs.
    pub fn signal(&self, signal: Signal) {
        if let Some(pid) = Pid::from_raw(self.pid).filter(|_| self.is_alive()) {
            // Gone in between is what was wanted, or will be noticed by whoever waits for it.
            let _ = kill_process(pid, signal);
        }
    }
}

/// Children of a process, oldest first.
pub fn children(parent: i32) -> Vec<Identity> {
    let boot = boot_id();
    let mut found: Vec<Identity> = all()
        .filter_map(|pid| Some((pid, stat(pid)?)))
        .filter(|(_, stat)| stat.parent == parent)
        .map(|(pid, stat)| Identity { pid, started: stat.started, boot: boot.clone() })
        .collect();
    found.sort_by_key(|process| (process.started, process.pid));
    found
}

/// Processes that were started with exactly this command line.
pub fn with_command(command: &[String]) -> Vec<Identity> {
    let line: Vec<u8> = command.iter().flat_map(|word| word.bytes().chain([0])).collect();
    all()
        .filter(|pid| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|found| found == line))
        .filter_map(Identity::of)
        .collect()
}

/// Every process id there is.
fn all() -> impl Iterator<Item = i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn stat(pid: i32) -> Option<Stat> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

fn parse_stat(text: &str) -> Option<Stat> {
    // The name in brackets may hold blanks and brackets itself, so fields are counted from its end.
    let (_, rest) = text.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    Some(Stat {
        state: fields.first()?.chars().next()?,
        parent: fields.get(1)?.parse().ok()?,
        started: fields.get(19)?.parse().ok()?,
    })
}

fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// Makes this process, and what it starts, end by the keys and by the end of a terminal again. What a script starts in
/// its background ignores these signals, and hands that on to everything below it.
pub fn hear_signals() {
    for number in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT] {
        // SAFETY: no handler of ours is replaced that anybody waits for: this is called before there are any, or between
        // fork and exec, where it is allowed.
        unsafe { libc::signal(number, libc::SIG_DFL) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_blanks_and_brackets_do_not_shift_the_fields() {
        let line = "42 (a) b) (c) S 7 42 42 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 123456 1 2 3";
        assert_eq!(parse_stat(line), Some(Stat { state: 'S', parent: 7, started: 123_456 }));
        for bad in ["", "42", "42 (a", "42 (a) S", "42 (a) S x 1"] {
            assert_eq!(parse_stat(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_process_is_alive_until_it_ends_and_its_pid_alone_is_not_enough() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().expect("sleep is there");
        let identity = Identity::of(child.id().cast_signed()).expect("runs");
        assert!(identity.is_alive());
        assert!(!Identity { started: identity.started + 1, ..identity.clone() }.is_alive());
        assert!(!Identity { boot: "another".into(), ..identity.clone() }.is_alive());
        assert!(children(std::process::id().cast_signed()).contains(&identity));
        identity.signal(Signal::KILL);
        child.wait().expect("waited");
        assert!(!identity.is_alive());
    }
}
