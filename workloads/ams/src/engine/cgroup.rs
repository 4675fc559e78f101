//! Control groups of instances: what keeps an instance to the memory, the CPUs and the number of processes that it was
//! given, and says so when it wanted more memory.
//!
//! ```text
//! <base>/                   given to AMS: by systemd, or the whole hierarchy where AMS is root
//!   fanlight-ams/           AMS itself and the shims: a group with bounds for others has no processes of its own
//!   fanlight-<folder>/      one for each folder of instances
//!     <id>/                 the sandbox of an instance with everything in it
//! ```
//!
//! A shim stays outside: it must live to tell how the run ended.

use std::{
    fs::{self, File, OpenOptions},
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use fanlight_api::InstanceId;
use serde::{Deserialize, Serialize};
use sha2::Digest as _;

/// Group of AMS itself; also the name for `DelegateSubgroup=` of a systemd unit.
const OWN: &str = "fanlight-ams";
/// Who bounds what.
const CONTROLLERS: [&str; 3] = ["memory", "cpu", "pids"];
/// Most processes and threads of an instance.
const MAX_PROCESSES: u64 = 4096;
/// Microseconds in which an instance may use its CPUs.
const CPU_PERIOD: u64 = 100_000;
/// How long the end of what was killed may take.
const KILL_TIME: Duration = Duration::from_secs(10);

/// Groups can be made for instances.
#[derive(Clone, Debug)]
pub struct Groups {
    /// Holds the groups of instances.
    home: PathBuf,
    /// Those of [`CONTROLLERS`] that are there.
    controllers: Vec<&'static str>,
}

/// What an instance may take. 0: no bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bounds {
    /// Whole CPUs.
    pub cpus: u32,
    /// Bytes.
    pub memory_bytes: u64,
}

/// The group of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// Its folder.
    pub path: PathBuf,
    /// What it was given.
    pub bounds: Bounds,
}

impl Groups {
    /// Finds or makes the place for groups of the instances in `folder`.
    ///
    /// # Errors
    /// Why there is none, and what to do.
    pub fn open(folder: &Path) -> Result<Self, String> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let Some((top, own)) = locate(&mounts, &own) else {
            return Err("no control groups of version 2 are mounted: mount cgroup2 at /sys/fs/cgroup".into());
        };
        Self::below(&top, &own, folder, rustix::process::geteuid().is_root())
    }

    fn below(top: &Path, own: &Path, folder: &Path, is_root: bool) -> Result<Self, String> {
        let name = format!(
            "fanlight-{}",
            &hex::encode(sha2::Sha256::digest(folder.as_os_str().as_encoded_bytes()))[..16]
        );
        let mut reasons = Vec::new();
        let mut bases = Vec::new();
        if own.ends_with(OWN) {
            bases.extend(own.parent().map(Path::to_owned));
        } else if own != top {
            match is_ours_alone(own) {
                true => bases.push(own.to_owned()),
                false => reasons.push(format!("{} has other processes", own.display())),
            }
        }
        if is_root {
            bases.push(top.to_owned());
        }
        for base in bases {
            match Self::prepare(&base, own, &name) {
                Ok(groups) => return Ok(groups),
                Err(reason) => reasons.push(reason),
            }
        }
        Err(format!(
            "{}. Run AMS as a unit of systemd with Delegate=yes and DelegateSubgroup={OWN}, or begin it with \
             `systemd-run --user --scope --property=Delegate=yes`",
            reasons.join("; ")
        ))
    }

    fn prepare(base: &Path, own: &Path, name: &str) -> Result<Self, String> {
        let fail =
            |doing: &str, path: &Path, error: io::Error| format!("{doing} {}: {error}", path.display());
        let there = words(&base.join("cgroup.controllers"));
        let controllers: Vec<&'static str> =
            CONTROLLERS.into_iter().filter(|name| there.iter().any(|there| there == name)).collect();
        if controllers.is_empty() {
            return Err(format!(
                "{} has none of the controllers {} of version 2",
                base.display(),
                CONTROLLERS.join(", ")
            ));
        }
        if base == own {
            let leaf = base.join(OWN);
            make(&leaf).map_err(|error| fail("making", &leaf, error))?;
            write(&leaf, "cgroup.procs", &std::process::id().to_string())
                .map_err(|error| fail("moving AMS into", &leaf, error))?;
        }
        let home = base.join(name);
        make(&home).map_err(|error| fail("making", &home, error))?;
        for group in [base, &home] {
            let given = words(&group.join("cgroup.subtree_control"));
            for controller in controllers.iter().filter(|name| !given.iter().any(|given| given == *name)) {
                write(group, "cgroup.subtree_control", &format!("+{controller}")).map_err(|error| {
                    fail(&format!("giving the controller {controller} to what is below"), group, error)
                })?;
            }
        }
        Ok(Self { home, controllers })
    }

    /// What is not bounded although it was asked for, in words; none: everything is.
    pub fn missing(&self) -> Option<String> {
        let missing: Vec<&str> =
            CONTROLLERS.into_iter().filter(|name| !self.controllers.contains(name)).collect();
        (!missing.is_empty()).then(|| missing.join(", "))
    }

    /// An empty group with these bounds.
    ///
    /// # Errors
    /// A file of it cannot be written.
    pub fn make(&self, id: &InstanceId, bounds: Bounds) -> io::Result<Group> {
        self.remove(id)?;
        let path = self.home.join(id.as_str());
        make(&path)?;
        for (controller, file, value) in settings(bounds) {
            if !self.controllers.contains(&controller) {
                continue;
            }
            match write(&path, file, &value) {
                // A kernel that does not count swap, or an older one.
                Err(error) if error.kind() == io::ErrorKind::NotFound && file != "memory.max" => {}
                Err(error) => {
                    return Err(io::Error::new(error.kind(), format!("writing {value} to {file}: {error}")));
                }
                Ok(()) => {}
            }
        }
        Ok(Group { path, bounds })
    }

    /// Ends what is in the group of an instance, and removes it.
    ///
    /// # Errors
    /// It goes on to be there.
    pub fn remove(&self, id: &InstanceId) -> io::Result<()> {
        remove(&self.home.join(id.as_str()))
    }

    /// The instances that have a group.
    pub fn list(&self) -> Vec<InstanceId> {
        let entries = fs::read_dir(&self.home).into_iter().flatten().flatten();
        entries
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect()
    }
}

impl Group {
    /// Lets a program begin in the group, with everything that it starts.
    ///
    /// # Errors
    /// The group is not there.
    pub fn receive(&self, command: &mut std::process::Command) -> io::Result<()> {
        use std::os::unix::process::CommandExt as _;
        let processes = OpenOptions::new().write(true).open(self.path.join("cgroup.procs"))?;
        // SAFETY: it only writes a constant to a descriptor that is open, which is allowed between fork and exec.
        unsafe {
            command.pre_exec(move || {
                // The writer itself.
                rustix::io::write(&processes, b"0")?;
                Ok(())
            });
        }
        Ok(())
    }

    /// Whether the kernel ended the run because it wanted more memory than it may have.
    pub fn ran_out_of_memory(&self) -> bool {
        fs::read_to_string(self.path.join("memory.events")).is_ok_and(|events| kills(&events) > 0)
    }
}

/// Controller, file and value of each bound.
fn settings(bounds: Bounds) -> Vec<(&'static str, &'static str, String)> {
    let mut settings =
        vec![("memory", "memory.oom.group", "1".to_owned()), ("pids", "pids.max", MAX_PROCESSES.to_string())];
    if bounds.memory_bytes > 0 {
        settings.push(("memory", "memory.max", bounds.memory_bytes.to_string()));
        // Otherwise the bound would only move what is beyond it to the disk, for everybody to wait for.
        settings.push(("memory", "memory.swap.max", "0".to_owned()));
    }
    if bounds.cpus > 0 {
        let quota = u64::from(bounds.cpus) * CPU_PERIOD;
        settings.push(("cpu", "cpu.max", format!("{quota} {CPU_PERIOD}")));
        // Where more CPUs are given away than there are, they are shared by what was asked for.
        settings.push(("cpu", "cpu.weight", (u64::from(bounds.cpus) * 100).min(10_000).to_string()));
    }
    settings
}

/// The mount of version 2 and the group of this process in it, by the texts of the kernel.
fn locate(mounts: &str, groups: &str) -> Option<(PathBuf, PathBuf)> {
    let own = Path::new(groups.lines().find_map(|line| line.strip_prefix("0::"))?);
    mounts.lines().find_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        if kind.split(' ').next() != Some("cgroup2") {
            return None;
        }
        let mut fields = mount.split(' ').skip(3);
        let (root, top) = (fields.next()?, PathBuf::from(fields.next()?));
        // Above what is mounted here, or beside it: not to be reached.
        let inside = own.strip_prefix(root).ok()?;
        let climbs = inside.components().any(|part| part == std::path::Component::ParentDir);
        (!climbs).then(|| (top.clone(), if inside.as_os_str().is_empty() { top } else { top.join(inside) }))
    })
}

/// How many processes of a group were killed for want of memory.
fn kills(events: &str) -> u64 {
    let count = events.lines().find_map(|line| line.strip_prefix("oom_kill "));
    count.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
}

fn is_ours_alone(group: &Path) -> bool {
    let own = std::process::id().to_string();
    let processes = words(&group.join("cgroup.procs"));
    !processes.is_empty() && processes.iter().all(|pid| *pid == own)
}

fn words(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.split_whitespace().map(str::to_owned).collect()
}

fn make(group: &Path) -> io::Result<()> {
    match fs::create_dir(group) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// The kernel takes one value with one write.
fn write(group: &Path, file: &str, value: &str) -> io::Result<()> {
    use io::Write as _;
    let mut file: File = OpenOptions::new().write(true).open(group.join(file))?;
    file.write_all(value.as_bytes())
}

fn remove(group: &Path) -> io::Result<()> {
    let deadline = Instant::now() + KILL_TIME;
    loop {
        match fs::remove_dir(group) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if Instant::now() > deadline => {
                return Err(io::Error::new(error.kind(), format!("removing {}: {error}", group.display())));
            }
            Err(_) => {
                // Kernels before 5.14 cannot; there the processes end with their sandbox.
                let _ = write(group, "cgroup.kill", "1");
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
24 1 0:22 / /proc rw,nosuid - proc proc rw
31 24 0:27 / /sys/fs/cgroup rw,nosuid,nodev shared:9 - cgroup2 cgroup2 rw,nsdelegate
";

    #[test]
    fn the_group_of_a_process_is_found_where_version_2_is_mounted() {
        for (mounts, groups, found) in [
            (MOUNTS, "0::/", Some(("/sys/fs/cgroup", "/sys/fs/cgroup"))),
            (
                MOUNTS,
                "4:memory:/x\n0::/system.slice/ams.service\n",
                Some(("/sys/fs/cgroup", "/sys/fs/cgroup/system.slice/ams.service")),
            ),
            ("31 24 0:27 /pod /mnt rw - cgroup2 x rw", "0::/pod/a", Some(("/mnt", "/mnt/a"))),
            ("31 24 0:27 /pod /mnt rw - cgroup2 x rw", "0::/other", None),
            (MOUNTS, "0::/../other", None),
            (MOUNTS, "4:memory:/x", None),
            ("31 24 0:27 / /sys/fs/cgroup rw - cgroup cgroup rw,memory", "0::/", None),
            ("", "", None),
        ] {
            let expected = found.map(|(top, own)| (PathBuf::from(top), PathBuf::from(own)));
            assert_eq!(locate(mounts, groups), expected, "{mounts} {groups}");
        }
    }

    #[test]
    fn bounds_are_written_as_the_kernel_reads_them() {
        let settings = settings(Bounds { cpus: 2, memory_bytes: 512 << 20 });
        for expected in [
            ("memory", "memory.max", "536870912"),
            ("memory", "memory.swap.max", "0"),
            ("memory", "memory.oom.group", "1"),
            ("cpu", "cpu.max", "200000 100000"),
            ("cpu", "cpu.weight", "200"),
            ("pids", "pids.max", "4096"),
        ] {
            let is_there = settings
                .iter()
                .any(|(controller, file, value)| (*controller, *file, value.as_str()) == expected);
            assert!(is_there, "{expected:?} in {settings:?}");
        }
        let unbounded = super::settings(Bounds::default());
        assert!(
            !unbounded.iter().any(|(_, file, _)| ["memory.max", "cpu.max"].contains(file)),
            "{unbounded:?}"
        );
        let most = super::settings(Bounds { cpus: 500, memory_bytes: 0 });
        assert!(most.contains(&("cpu", "cpu.weight", "10000".into())), "the kernel takes no more: {most:?}");
    }

    #[test]
    fn only_kills_count_as_out_of_memory() {
        for (events, count) in [
            ("low 0\nhigh 0\nmax 812\noom 1\noom_kill 3\noom_group_kill 1\n", 3),
            ("low 0\nhigh 0\nmax 812\noom 1\noom_kill 0\n", 0),
            ("", 0),
        ] {
            assert_eq!(kills(events), count, "{events}");
        }
    }

    /// A hierarchy as files of an ordinary folder: what is written can be read, nothing is enforced.
    fn hierarchy(own: &str, controllers: &str, processes: &str) -> (tempfile::TempDir, PathBuf) {
        let top = tempfile::tempdir().expect("made");
        let own = top.path().join(own);
        fs::create_dir_all(&own).expect("made");
        for group in [top.path(), &own, own.parent().expect("below the top")] {
            for (file, text) in [
                ("cgroup.controllers", controllers),
                ("cgroup.subtree_control", ""),
                ("cgroup.procs", processes),
            ] {
                fs::write(group.join(file), text).expect("written");
            }
        }
        (top, own)
    }

    #[test]
    fn where_no_group_can_be_made_it_is_said_why_and_what_to_do() {
        for (own, controllers, processes, is_root, needle) in [
            ("user.slice/shell", "cpu memory pids", "1\n2\n", false, "has other processes"),
            ("unit/fanlight-ams", "cpuset hugetlb", "", false, "none of the controllers memory, cpu, pids"),
            ("user.slice/shell", "", "1\n", true, "none of the controllers memory, cpu, pids"),
        ] {
            let (top, own) = hierarchy(own, controllers, processes);
            let refused = Groups::below(top.path(), &own, Path::new("/state"), is_root).expect_err(needle);
            assert!(refused.contains(needle) && refused.contains("Delegate=yes"), "{refused}");
        }
    }

    #[test]
    fn what_is_not_there_to_bound_with_is_named() {
        let groups = |controllers| Groups { home: PathBuf::new(), controllers };
        assert_eq!(groups(vec!["memory", "cpu", "pids"]).missing(), None);
        assert_eq!(groups(vec!["memory"]).missing().as_deref(), Some("cpu, pids"));
    }
}
