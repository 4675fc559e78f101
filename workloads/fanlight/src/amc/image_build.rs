//! `image build`: makes the archive of an image out of a recipe: a small Debian or Ubuntu, the streamer as a package,
//! and the packages of the recipe. Two builds from the same packages give the same bytes.
//!
//! Fetching and unpacking is left to mmdebstrap; adding the archive to AMS, to `image add`.

use std::{
    fs, io,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;

use super::cli::BuildOptions;

/// Recipes that come with the program.
const RECIPES: [(&str, &str); 3] = [
    ("base", include_str!("../../images/base.toml")),
    ("terminal", include_str!("../../images/terminal.toml")),
    ("demo", include_str!("../../images/demo.toml")),
];
/// Programs that a build needs, and the packages that hold them.
const PROGRAMS: [(&str, &str); 6] = [
    ("mmdebstrap", "mmdebstrap"),
    ("dpkg-deb", "dpkg"),
    ("dpkg-shlibdeps", "dpkg-dev"),
    ("strip", "binutils"),
    ("tar", "tar"),
    ("sha256sum", "coreutils"),
];
/// What every image holds besides the streamer and what it is linked with.
const PACKAGES: &str = "systemd-sysv,systemd-resolved,dbus,udev,iproute2,ca-certificates,xwayland,x11-xkb-utils,xkb-data,\
    pulseaudio,pulseaudio-utils,fonts-dejavu-core,libgl1-mesa-dri,libegl1";
/// The time of whatever a build makes, unless SOURCE_DATE_EPOCH says another: the day of Debian 12.
const EPOCH: u64 = 1_686_355_200;
/// Units that slow the start of a container and that nobody needs in it.
const MASKED: &str = "apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
    e2scrub_reap.service fstrim.timer man-db.timer systemd-networkd-wait-online.service systemd-journal-flush.service \
    console-getty.service getty@.service getty.target \
    systemd-timesyncd.service systemd-logind.service systemd-update-utmp.service \
    systemd-update-utmp-runlevel.service sys-kernel-debug.mount sys-kernel-tracing.mount dev-hugepages.mount";
const UNIT: &str = include_str!("../../images/fanlight-streamer.service");
const NETWORK: &str = "[Match]\nName=eth0\n\n[Network]\nDHCP=ipv4\nLinkLocalAddressing=no\nIPv6AcceptRA=no\n\n\
    [DHCPv4]\nClientIdentifier=mac\n";
const SETTLE: &str = r#"#!/bin/sh
set -e
root=$1
cp "$FANLIGHT_PACKAGE" "$root/tmp/streamer.deb"
chroot "$root" dpkg -i /tmp/streamer.deb
rm "$root/tmp/streamer.deb"
printf '%s' "$FANLIGHT_NETWORK" > "$root/etc/systemd/network/20-eth0.network"
chmod 0644 "$root/etc/systemd/network/20-eth0.network"
chroot "$root" systemctl -q enable systemd-networkd systemd-resolved
# After the enabling, which refuses what is masked.
for unit in $FANLIGHT_MASKED; do ln -sfn /dev/null "$root/etc/systemd/system/$unit"; done
# Sound is started by the streamer, not by sessions of users, which there are none of.
rm -f "$root"/etc/systemd/user/*.wants/pulseaudio.*
mkdir -p "$root/etc/systemd/journald.conf.d"
printf '[Journal]\nStorage=volatile\nRuntimeMaxUse=8M\n' > "$root/etc/systemd/journald.conf.d/fanlight.conf"
# What differs from build to build.
rm -rf "$root"/var/lib/dbus/machine-id "$root"/var/cache/ldconfig "$root"/var/cache/fontconfig/* \
    "$root"/var/lib/systemd/random-seed "$root"/var/lib/systemd/catalog/database "$root"/var/cache/debconf/* \
    "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/* "$root"/etc/apt/sources.list.d/* \
    "$root"/etc/*- "$root"/var/lib/dpkg/*-old "$root"/root/.cache
: > "$root/etc/apt/sources.list"
find "$root/var/log" -type f -delete
# What is mounted there may hold this very tree.
find "$root" -xdev \( -path "$root/dev" -o -path "$root/proc" -o -path "$root/sys" \) -prune -o \
    -name __pycache__ -prune -exec rm -rf {} +
chroot "$root" dpkg-query -W -f '${Package} ${Version} ${Architecture}\n' > "$FANLIGHT_LIST"
"#;

/// The file with this ending more.
fn beside(file: &Path, ending: &str) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".");
    name.push(ending);
    name.into()
}

/// What an image is made of.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Recipe {
    description: String,
    packages: Vec<String>,
}

/// Builds the archive.
///
/// # Errors
/// Names the step that failed, and a program that is missing with its package.
pub fn build(options: &BuildOptions) -> Result<()> {
    let began = Instant::now();
    let (name, recipe) = recipe(&options.recipe)?;
    for (program, package) in PROGRAMS.into_iter().chain(compressor(&options.output(&name))?) {
        let there = std::env::var_os("PATH")
            .is_some_and(|paths| std::env::split_paths(&paths).any(|path| path.join(program).is_file()));
        ensure!(there, "program {program} was not found: install the package {package}");
    }
    ensure!(rustix::process::geteuid().is_root(), "an image has files of many owners: build it as root");
    let streamer = match &options.streamer {
        Some(streamer) => streamer.clone(),
        None => std::env::current_exe()
            .context("finding this program")?
            .canonicalize()
            .context("finding this program")?
            .with_file_name("fanlight-streamer"),
    };
    ensure!(streamer.is_file(), "--streamer: {} is not there; name the program", streamer.display());
    let epoch = match std::env::var("SOURCE_DATE_EPOCH") {
        Ok(text) => text.parse().context("SOURCE_DATE_EPOCH: seconds are wanted")?,
        Err(_) => EPOCH,
    };
    let work = tempfile::tempdir().context("making a folder to work in")?;
    let build = Build { work: work.path(), epoch, suite: options.suite.name() };
    let output = options.output(&name);
    eprintln!("packing the streamer");
    let (package, needed) = build.package(&streamer)?;
    eprintln!("fetching and unpacking the packages of {}", build.suite);
    build.root(&recipe, &package, &needed)?;
    eprintln!("packing the image");
    build.pack(&name, &recipe, &output)?;
    let list = beside(&output, "packages");
    fs::copy(work.path().join("list"), &list).with_context(|| format!("writing {}", list.display()))?;
    let size = fs::metadata(&output).context("looking at the image")?.len();
    eprintln!("{} bytes in {:.0} s", size, began.elapsed().as_secs_f64());
    println!("{}", output.display());
    Ok(())
}

fn recipe(wanted: &str) -> Result<(String, Recipe)> {
    let (name, text) = match RECIPES.iter().find(|(name, _)| *name == wanted) {
        Some((name, text)) => ((*name).to_owned(), (*text).to_owned()),
        None => {
            let path = Path::new(wanted);
            let text = fs::read_to_string(path).with_context(|| {
                format!("--recipe: {wanted} is neither base, terminal, demo nor a file that can be read")
            })?;
            let name = path.file_stem().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            (name, text)
        }
    };
    let recipe: Recipe = toml::from_str(&text).with_context(|| format!("--recipe: {wanted}"))?;
    for package in &recipe.packages {
        // Anything else would be an option or a path for apt.
        let good = package.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
            && package
                .chars()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '+' | '-' | '.' | ':'));
        ensure!(good, "--recipe: {wanted}: packages: {package:?} is not the name of a package");
    }
    Ok((name, recipe))
}

/// The program that compresses, and its package, from the name of the archive.
fn compressor(output: &Path) -> Result<Option<(&'static str, &'static str)>> {
    let name = output.to_string_lossy();
    Ok(if name.ends_with(".tar") {
        None
    } else if name.ends_with(".tar.gz") {
        Some(("gzip", "gzip"))
    } else if name.ends_with(".tar.xz") {
        Some(("xz", "xz-utils"))
    } else if name.ends_with(".tar.zst") {
        Some(("zstd", "zstd"))
    } else {
        bail!("--output: {name} must end in .tar, .tar.gz, .tar.xz or .tar.zst")
    })
}

struct Build<'a> {
    work: &'a Path,
    epoch: u64,
    suite: &'static str,
}

impl Build<'_> {
    /// Makes the package of the streamer. Returns it, and the packages that it needs.
    fn package(&self, streamer: &Path) -> Result<(PathBuf, Vec<String>)> {
        let tree = self.work.join("package");
        let (program, units) = (tree.join("usr/bin/fanlight-streamer"), tree.join("usr/lib/systemd/system"));
        let step = "making the package of the streamer";
        (|| -> Result<()> {
            for folder in ["DEBIAN", "usr/bin", "usr/lib/sysusers.d"] {
                fs::create_dir_all(tree.join(folder))?;
            }
            fs::create_dir_all(units.join("multi-user.target.wants"))?;
            fs::write(units.join("fanlight-streamer.service"), UNIT)?;
            symlink(
                "../fanlight-streamer.service",
                units.join("multi-user.target.wants/fanlight-streamer.service"),
            )?;
            let user = "u fanlight 990 \"Applications of Fanlight\" /home/fanlight /bin/sh\n";
            fs::write(tree.join("usr/lib/sysusers.d/fanlight.conf"), user)?;
            let script = "#!/bin/sh\nset -e\nsystemd-sysusers fanlight.conf\n\
                install -d -m 0700 -o fanlight -g fanlight /home/fanlight\n\
                install -d -m 0755 /var/lib/fanlight\n";
            fs::write(tree.join("DEBIAN/postinst"), script)?;
            fs::set_permissions(tree.join("DEBIAN/postinst"), fs::Permissions::from_mode(0o755))?;
            // dpkg-shlibdeps reads it.
            fs::create_dir_all(self.work.join("debian"))?;
            fs::write(
                self.work.join("debian/control"),
                "Source: fanlight\n\nPackage: fanlight-streamer\nArchitecture: any\n",
            )?;
            Ok(())
        })()
        .context(step)?;
        self.run("removing symbols", Command::new("strip").arg("-o").arg(&program).arg(streamer))?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).context(step)?;
        let needed = self.run(
            "finding the libraries of the streamer",
            Command::new("dpkg-shlibdeps").arg("-O").arg(&program),
        )?;
        let needed =
            needed.trim().strip_prefix("shlibs:Depends=").context("dpkg-shlibdeps told no packages")?;
        let architecture =
            self.run("asking for the architecture", Command::new("dpkg").arg("--print-architecture"))?;
        let control = format!(
            "Package: fanlight-streamer\nVersion: {}\nArchitecture: {}\nDepends: {needed}, systemd\n\
             Section: x11\nPriority: optional\nMaintainer: Fanlight <fanlight@localhost>\n\
             Description: display, encoder and WebRTC peer of one instance\n",
            env!("CARGO_PKG_VERSION"),
            architecture.trim(),
        );
        fs::write(tree.join("DEBIAN/control"), control).context(step)?;
        let package = self.work.join("fanlight-streamer.deb");
        self.run(
            step,
            Command::new("dpkg-deb").args(["--root-owner-group", "-Znone", "-b"]).arg(&tree).arg(&package),
        )?;
        // Of alternatives the first is taken; versions are checked when the package is installed.
        let names = needed.split(',').filter_map(|part| part.split(['(', '|']).next());
        Ok((package, names.map(|name| name.trim().to_owned()).collect()))
    }

    /// Makes the root file system.
    fn root(&self, recipe: &Recipe, package: &Path, needed: &[String]) -> Result<()> {
        let script = self.work.join("settle");
        fs::write(&script, SETTLE).context("writing a script")?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).context("writing a script")?;
        let mut include = PACKAGES.to_owned();
        for package in needed.iter().chain(&recipe.packages) {
            include.push(',');
            include.push_str(package);
        }
        let mut command = Command::new("mmdebstrap");
        command.args(["--quiet", "--mode=root", "--variant=minbase", "--format=directory"]);
        for kept_out in ["/usr/share/doc/*", "/usr/share/man/*", "/usr/share/info/*", "/usr/share/locale/*"] {
            command.arg(format!("--dpkgopt=path-exclude={kept_out}"));
        }
        command
            .arg("--aptopt=Apt::Install-Recommends \"false\"")
            .arg(format!("--include={include}"))
            .arg(format!("--customize-hook={}", script.display()))
            .arg(self.suite)
            .arg(self.work.join("rootfs"))
            .env("FANLIGHT_PACKAGE", package)
            .env("FANLIGHT_MASKED", MASKED)
            .env("FANLIGHT_NETWORK", NETWORK)
            .env("FANLIGHT_LIST", self.work.join("list"));
        self.run("making the root file system", &mut command)?;
        // mmdebstrap has filled these from this machine. An empty machine-id is made new in every container, at start.
        let etc = self.work.join("rootfs/etc");
        let step = "settling the root file system";
        for name in ["resolv.conf", "hostname", "machine-id"] {
            match fs::remove_file(etc.join(name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error).context(step),
                _ => {}
            }
        }
        symlink("../run/systemd/resolve/stub-resolv.conf", etc.join("resolv.conf")).context(step)?;
        fs::write(etc.join("hostname"), "fanlight\n").context(step)?;
        fs::write(etc.join("machine-id"), "").context(step)
    }

    /// Packs it with its description.
    fn pack(&self, name: &str, recipe: &Recipe, output: &Path) -> Result<()> {
        let architecture = std::env::consts::ARCH;
        let description = serde_json::to_string(&recipe.description).expect("text is JSON");
        let metadata = format!(
            "architecture: {architecture}\ncreation_date: {}\nproperties:\n  os: fanlight\n  release: {}\n  \
             variant: {}\n  description: {description}\n",
            self.epoch,
            self.suite,
            serde_json::to_string(name).expect("text is JSON"),
        );
        fs::write(self.work.join("metadata.yaml"), metadata).context("writing metadata.yaml")?;
        let compress = compressor(output)?.map(|(program, _)| match program {
            "gzip" => "gzip -n -6",
            "zstd" => "zstd -q -10 -T0",
            // Blocks of one size, so that the number of processors does not show.
            _ => "xz -6 -T0 --block-size=16MiB",
        });
        // An archive that is whole or not there.
        let unfinished = beside(output, "unfinished");
        let mut command = Command::new("tar");
        command
            .args(["--create", "--sort=name", "--numeric-owner", "--clamp-mtime", "--format=posix"])
            .args(["--xattrs", "--xattrs-include=*"])
            .arg("--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime")
            .arg(format!("--mtime=@{}", self.epoch));
        if let Some(program) = compress {
            command.arg(format!("--use-compress-program={program}"));
        }
        command.arg("--file").arg(&unfinished).arg("-C").arg(self.work).args(["metadata.yaml", "rootfs"]);
        self.run("packing the image", &mut command)?;
        fs::rename(&unfinished, output).with_context(|| format!("writing {}", output.display()))
    }

    /// Runs a program; what it says on standard error is shown when it fails.
    fn run(&self, step: &str, command: &mut Command) -> Result<String> {
        command
            .env("SOURCE_DATE_EPOCH", self.epoch.to_string())
            .env("LC_ALL", "C.UTF-8")
            .stdin(Stdio::null());
        if command.get_program() == "dpkg-shlibdeps" {
            command.current_dir(self.work);
        }
        let program = command.get_program().display().to_string();
        let output = command.output().with_context(|| format!("{step}: starting {program}"))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let lines: Vec<_> = said.lines().collect();
            let last = lines[lines.len().saturating_sub(20)..].join("\n");
            bail!("{step}: {program} failed ({}):\n{last}", output.status);
        }
        String::from_utf8(output.stdout).with_context(|| format!("{step}: {program} said what is no text"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_recipe_that_comes_along_is_good() {
        for (name, _) in RECIPES {
            recipe(name).expect(name);
        }
    }

    #[test]
    fn a_recipe_that_would_be_an_option_or_has_odd_members_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("mine.toml");
        let text = path.to_str().expect("text");
        for (bad, says) in [
            ("description = 'x'\npackages = ['--force']", "--force"),
            ("description = 'x'\npackages = ['a,b']", "a,b"),
            ("description = 'x'\npackages = ['']", "packages"),
            ("description = 'x'\npackages = []\nhook = 1", "hook"),
            ("packages = []", "description"),
        ] {
            fs::write(&path, bad).expect("written");
            let error = format!("{:#}", recipe(text).expect_err(bad));
            assert!(error.contains(says), "{error}");
        }
        fs::write(&path, "description = 'x'\npackages = ['libc6:i386', 'g++-12']").expect("written");
        assert_eq!(recipe(text).expect("good").0, "mine");
        assert!(recipe("/no/such/recipe").is_err());
    }

    #[test]
    fn the_name_of_the_archive_says_how_it_is_compressed() {
        for (name, program) in [("a.tar", None), ("a.tar.gz", Some("gzip")), ("a.tar.zst", Some("zstd"))] {
            assert_eq!(compressor(Path::new(name)).expect(name).map(|found| found.0), program);
        }
        assert!(compressor(Path::new("a.zip")).is_err());
    }
}
