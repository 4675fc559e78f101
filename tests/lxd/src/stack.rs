//! A whole stack over LXD, as `fanlight up --lxd` starts it, on the machine of the first member.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use fanlight_tests_stack::stack::{Stack, programs};

use crate::{Harness, NETWORK, POOL, image, run};

/// Address of the first member, which clients reach.
pub const ADDRESS: &str = "10.91.0.11";

/// Where the applications of [`applications`] are.
fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Makes a folder of applications: a terminal and the moving pattern, each with the programs it needs.
///
/// # Errors
/// They cannot be copied.
pub fn applications(folder: &Path) -> Result<()> {
    let from = repository();
    for (path, program) in [
        ("workloads/fanlight/applications/terminal", None),
        ("tests/apps/applications/pattern", Some("fanlight-pattern")),
    ] {
        let from = from.join(path);
        let own = folder.join(from.file_name().context("a name")?);
        fs::create_dir_all(own.join("bin"))?;
        for file in fs::read_dir(&from)?.flatten().filter(|file| file.path().is_file()) {
            fs::copy(file.path(), own.join(file.file_name()))?;
        }
        if let Some(program) = program {
            let copy = own.join("bin").join(program);
            run(Command::new("strip").arg("-o").arg(&copy).arg(programs()?.join(program)))?;
            fs::set_permissions(&copy, fs::Permissions::from_mode(0o755))?;
        }
    }
    Ok(())
}

/// Starts it with a terminal and the pattern. Use it within [`Harness::within`].
///
/// # Errors
/// It does not start.
pub async fn start(machine: &Machine, options: &[&str]) -> Result<Stack> {
    let wrapper = ["nsenter", "-t", &machine.pid, "-n", "--"];
    let mut all =
        vec!["--listen", ADDRESS, "--lxd", &machine.socket, "--lxd-pool", POOL, "--lxd-network", NETWORK];
    all.extend(["--image", &machine.image, "--applications", &machine.applications]);
    let page = repository().join("workloads/web/dist").display().to_string();
    all.extend(["--ui", &page]);
    all.extend(options);
    Stack::start_by(&wrapper, &all).await
}

/// What a stack needs to know of where it runs.
#[derive(Debug)]
pub struct Machine {
    pid: String,
    socket: String,
    image: String,
    applications: String,
}

impl Machine {
    /// Prepares image and applications.
    ///
    /// # Errors
    /// They cannot be made.
    pub fn prepare(harness: &mut Harness) -> Result<Self> {
        let image = image::with_streamer(&programs()?)?.display().to_string();
        let folder = harness.path("applications");
        applications(&folder)?;
        let member = &harness.members()[0];
        Ok(Self {
            pid: member.pid().to_string(),
            socket: member.folder.join("unix.socket").display().to_string(),
            image,
            applications: folder.display().to_string(),
        })
    }
}
