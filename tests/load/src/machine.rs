//! What the kernel tells: time and memory of a process, the machine in words, the limit of open files.

use std::{fs, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};

/// CPU time that a process has used so far, all threads together, those that ended included.
///
/// # Errors
/// There is no such process.
pub fn cpu_time(pid: u32) -> Result<Duration> {
    let mut clock: libc::clockid_t = 0;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // /proc/PID/stat counts the same time in steps of 10 ms, too coarse for a window of a second.
    // SAFETY: both calls only write to the variables they are given, which live here.
    let read = unsafe {
        libc::clock_getcpuclockid(libc::pid_t::try_from(pid)?, &raw mut clock) == 0
            && libc::clock_gettime(clock, &raw mut time) == 0
    };
    ensure!(read, "the CPU time of process {pid} cannot be read");
    Ok(Duration::new(u64::try_from(time.tv_sec)?, u32::try_from(time.tv_nsec)?))
}

/// Resident memory of a process (`Rss`), KiB.
///
/// # Errors
/// There is no such process.
pub fn resident_kib(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Rss:")).context("no Rss in it")?;
    line.trim().trim_end_matches(" kB").parse().context("Rss is no number")
}

/// Lets this process and its children open so many files each.
///
/// # Errors
/// The limit is lower and may not be raised.
pub fn raise_open_files(wanted: u64) -> Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the call writes to the variable only.
    let read = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } == 0;
    ensure!(read, "reading the limit of files");
    if limit.rlim_cur >= wanted {
        return Ok(());
    }
    let raised = libc::rlimit { rlim_cur: wanted, rlim_max: limit.rlim_max.max(wanted) };
    // SAFETY: the call reads the variable only.
    let done = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const raised) } == 0;
    ensure!(done, "{wanted} open files are needed, {} are allowed (ulimit -n)", limit.rlim_max);
    Ok(())
}

/// Processors, memory and kernel in words.
pub fn describe() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let info = read("/proc/cpuinfo");
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let memory = read("/proc/meminfo");
    let kib = memory
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().split(' ').next()?.parse().ok());
    let gib = kib.map_or(0.0, |kib: f64| kib / 1024.0 / 1024.0);
    let kernel = read("/proc/sys/kernel/osrelease");
    let model = model.map_or(std::env::consts::ARCH, |(_, model)| model);
    format!("{cpus} × {model}, {gib:.0} GiB, Linux {}", kernel.trim())
}

/// What a command prints on its first line; empty when it cannot be run.
pub fn says(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    text.lines().next().unwrap_or_default().trim().to_owned()
}

/// Processes that are ready to run, averaged over the last minute, per processor.
pub fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load: f64 = text.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or_default();
    load / std::thread::available_parallelism().map_or(1, usize::from) as f64
}
