//! Images of the tests, built once and kept in the cache: Debian with systemd and an address from DHCP, the same with a
//! stand-in for the streamer, and one as `fanlight image build` makes it, with the real one.

use std::{
    fs::{self, File},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};
use sha2::{Digest as _, Sha256};

use crate::run;

/// Changes with the recipe, so that an old image is not used.
const NAME: &str = "lxd-bookworm-1";
const METADATA: &str =
    "architecture: x86_64\ncreation_date: 1700000000\nproperties: {os: debian, release: bookworm}\n";
const NETWORK: &str = "printf '[Match]\\nName=eth0\\n[Network]\\nDHCP=ipv4\\n' \
    > \"$1/etc/systemd/network/20-eth.network\"; chmod 0644 \"$1/etc/systemd/network/20-eth.network\"";

/// Files of an image.
pub struct Files {
    /// Archive of its description.
    pub metadata: PathBuf,
    /// Archive of its files.
    pub root: PathBuf,
}

/// The image, built if it is not in the cache.
///
/// # Errors
/// It cannot be built.
pub fn debian() -> Result<Files> {
    let folder = cache()?.join("images");
    fs::create_dir_all(&folder)?;
    let lock = File::create(folder.join(format!("{NAME}.lock")))?;
    flock(&lock, FlockOperation::LockExclusive)?;
    let files = Files {
        metadata: folder.join(format!("{NAME}.meta.tar")),
        root: folder.join(format!("{NAME}.root.tar")),
    };
    if !files.root.exists() {
        metadata(&files.metadata)?;
        let unfinished = folder.join(format!("{NAME}.unfinished.tar"));
        run(Command::new("mmdebstrap")
            .args(["--quiet", "--variant=minbase", "--include=systemd-sysv,dbus,udev,iproute2"])
            .arg(format!("--customize-hook={NETWORK}"))
            .arg("--customize-hook=chroot \"$1\" systemctl enable systemd-networkd")
            .arg("bookworm")
            .arg(&unfinished))?;
        fs::rename(&unfinished, &files.root)?;
    }
    Ok(files)
}

/// What stands in for the streamer in instances of [`with_stand_in`].
const STAND_IN: &str = include_str!("stand-in.pl");
/// Starts it as the real one is started.
const UNIT: &str = "[Unit]\nConditionPathExists=/var/lib/fanlight/guest.json\n\
    [Service]\nExecStart=/usr/bin/fanlight-streamer guest\n[Install]\nWantedBy=multi-user.target\n";

/// The image with a stand-in for the streamer, as one archive, and its SHA-256. Built if it is not in the cache.
///
/// # Errors
/// It cannot be built.
pub fn with_stand_in() -> Result<(PathBuf, String)> {
    let files = debian()?;
    let key = hex::encode(Sha256::digest([NAME, METADATA, STAND_IN, UNIT].concat()));
    let folder = cache()?.join("images");
    let lock = File::create(folder.join(format!("{NAME}.lock")))?;
    flock(&lock, FlockOperation::LockExclusive)?;
    let archive = folder.join(format!("{NAME}.{}.stand-in.tar", &key[..16]));
    if !archive.exists() {
        for old in fs::read_dir(&folder)?.flatten() {
            if old.file_name().to_string_lossy().ends_with(".stand-in.tar") {
                fs::remove_file(old.path())?;
            }
        }
        let work = tempfile::tempdir_in(&folder)?;
        let root = work.path().join("rootfs");
        fs::create_dir(&root)?;
        run(Command::new("tar").args(["--numeric-owner", "-xf"]).arg(&files.root).arg("-C").arg(&root))?;
        let program = root.join("usr/bin/fanlight-streamer");
        fs::write(&program, STAND_IN)?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
        let units = root.join("etc/systemd/system");
        fs::write(units.join("fanlight-streamer.service"), UNIT)?;
        fs::create_dir_all(units.join("multi-user.target.wants"))?;
        let wanted = units.join("multi-user.target.wants/fanlight-streamer.service");
        std::os::unix::fs::symlink("/etc/systemd/system/fanlight-streamer.service", wanted)?;
        fs::write(work.path().join("metadata.yaml"), METADATA)?;
        let unfinished = folder.join(format!("{NAME}.unfinished.tar"));
        run(Command::new("tar")
            .args(["--numeric-owner", "--sort=name", "-cf"])
            .arg(&unfinished)
            .arg("-C")
            .arg(work.path())
            .args(["metadata.yaml", "rootfs"]))?;
        fs::rename(&unfinished, &archive)?;
    }
    let sha256 = hex::encode(Sha256::digest(fs::read(&archive)?));
    Ok((archive, sha256))
}

/// What an image of `fanlight image build` follows from, besides the packages of the day.
const BUILDER: [&str; 3] = [
    include_str!("../../../workloads/fanlight/src/amc/image_build.rs"),
    include_str!("../../../workloads/fanlight/images/terminal.toml"),
    include_str!("../../../workloads/fanlight/images/fanlight-streamer.service"),
];

/// The image with a terminal and the streamer from this folder of programs, as `fanlight image build` makes it. Of one that is in the
/// cache only the streamer is replaced.
///
/// # Errors
/// It cannot be built.
pub fn with_streamer(programs: &Path) -> Result<PathBuf> {
    let streamer = programs.join("fanlight-streamer");
    let folder = cache()?.join("images");
    fs::create_dir_all(&folder)?;
    let lock = File::create(folder.join("terminal.lock"))?;
    flock(&lock, FlockOperation::LockExclusive)?;
    let libraries = Command::new("readelf").arg("-d").arg(&streamer).output().context("readelf")?;
    let libraries = String::from_utf8_lossy(&libraries.stdout);
    let libraries: Vec<_> =
        libraries.lines().filter_map(|line| line.split_once("(NEEDED)")).map(|(_, name)| name).collect();
    let base_key = hex::encode(Sha256::digest([BUILDER.concat(), libraries.concat()].concat()));
    let base = folder.join(format!("terminal.{}.base.tar", &base_key[..16]));
    if !base.exists() {
        remove_others(&folder, "terminal.", ".base.tar")?;
        let unfinished = folder.join("terminal.unfinished.tar");
        run(Command::new(programs.join("fanlight"))
            .args(["image", "build", "--recipe", "terminal", "--output"])
            .arg(&unfinished)
            .arg("--streamer")
            .arg(&streamer))?;
        fs::rename(&unfinished, &base)?;
    }
    let key = hex::encode(Sha256::digest([base_key.as_bytes(), &fs::read(&streamer)?].concat()));
    let archive = folder.join(format!("terminal.{}.image.tar", &key[..16]));
    if !archive.exists() {
        remove_others(&folder, "terminal.", ".image.tar")?;
        let work = tempfile::tempdir_in(&folder)?;
        let program = work.path().join("rootfs/usr/bin/fanlight-streamer");
        fs::create_dir_all(work.path().join("rootfs/usr/bin"))?;
        run(Command::new("strip").arg("-o").arg(&program).arg(&streamer))?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
        let unfinished = folder.join("terminal.unfinished.tar");
        fs::copy(&base, &unfinished)?;
        // Of two files with one name the last one counts.
        run(Command::new("tar")
            .args(["--owner=0", "--group=0", "--numeric-owner", "--append", "-f"])
            .arg(&unfinished)
            .arg("-C")
            .arg(work.path())
            .arg("rootfs/usr/bin/fanlight-streamer"))?;
        fs::rename(&unfinished, &archive)?;
    }
    Ok(archive)
}

/// Removes what an older recipe made.
fn remove_others(folder: &Path, begins: &str, ends: &str) -> Result<()> {
    for old in fs::read_dir(folder)?.flatten() {
        let name = old.file_name().to_string_lossy().into_owned();
        if name.starts_with(begins) && name.ends_with(ends) {
            fs::remove_file(old.path())?;
        }
    }
    Ok(())
}

/// Writes the archive that describes an image.
///
/// # Errors
/// It cannot be written.
pub fn metadata(archive: &Path) -> Result<()> {
    let folder = tempfile::tempdir()?;
    fs::write(folder.path().join("metadata.yaml"), METADATA)?;
    run(Command::new("tar").arg("-cf").arg(archive).arg("-C").arg(folder.path()).arg("metadata.yaml"))
}

/// An archive with metadata and an empty root file system.
///
/// # Errors
/// It cannot be written.
pub fn unified(archive: &Path) -> Result<()> {
    let folder = tempfile::tempdir()?;
    fs::write(folder.path().join("metadata.yaml"), METADATA)?;
    fs::create_dir(folder.path().join("rootfs"))?;
    run(Command::new("tar")
        .arg("-cf")
        .arg(archive)
        .arg("-C")
        .arg(folder.path())
        .args(["metadata.yaml", "rootfs"]))
}

fn cache() -> Result<PathBuf> {
    if let Some(folder) = std::env::var_os("FANLIGHT_CACHE") {
        return Ok(folder.into());
    }
    let home = std::env::var_os("HOME").context("HOME says where the cache is")?;
    Ok(Path::new(&home).join(".cache/fanlight"))
}
