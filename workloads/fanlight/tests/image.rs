//! Builds an image for real, twice. Needs root, mmdebstrap and the mirrors of Debian; LXD is not asked.

use std::{path::Path, process::Command};

use sha2::{Digest as _, Sha256};

/// Builds the smallest image. A shell stands in for the streamer: it is a program with libraries, and every Debian
/// has it.
fn build(output: &Path) {
    let built = Command::new(env!("CARGO_BIN_EXE_fanlight"))
        .args(["image", "build", "--recipe", "base", "--streamer", "/bin/dash", "--output"])
        .arg(output)
        .output()
        .expect("fanlight starts");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
}

/// Names, and contents where they are small.
fn contents(archive: &Path) -> Vec<(String, String)> {
    let file = std::fs::File::open(archive).expect("was built");
    let mut archive = tar::Archive::new(file);
    let mut found = Vec::new();
    for entry in archive.entries().expect("an archive") {
        let mut entry = entry.expect("an entry");
        let path = entry.path().expect("a path").display().to_string();
        let mut text = Vec::new();
        if entry.size() < 100_000 {
            std::io::Read::read_to_end(&mut entry, &mut text).expect("readable");
        }
        found.push((path, String::from_utf8_lossy(&text).into_owned()));
    }
    found
}

#[test]
#[ignore = "needs root, mmdebstrap and the mirrors of Debian; `./dev test lxd` runs it"]
fn two_builds_make_the_same_bytes_and_hold_what_a_container_needs() {
    let folder = tempfile::tempdir().expect("a folder");
    let archives = [folder.path().join("one.tar"), folder.path().join("two.tar")];
    let sums = archives.each_ref().map(|archive| {
        build(archive);
        let bytes = std::fs::read(archive).expect("was built");
        println!("{} bytes", bytes.len());
        hex::encode(Sha256::digest(&bytes))
    });
    let found = contents(&archives[0]);
    let text = |name: &str| found.iter().find(|(path, _)| path == name).map(|(_, text)| text.as_str());
    assert!(text("metadata.yaml").expect("there").contains("release: bookworm"));
    assert!(text("rootfs/usr/bin/fanlight-streamer").is_some());
    assert!(
        text("rootfs/usr/lib/systemd/system/multi-user.target.wants/fanlight-streamer.service").is_some()
    );
    assert_eq!(text("rootfs/etc/machine-id"), Some(""));
    assert!(text("rootfs/etc/passwd").expect("there").contains("fanlight:x:990:990:"));
    assert!(text("rootfs/etc/systemd/network/20-eth0.network").expect("there").contains("DHCP=ipv4"));
    assert!(!found.iter().any(|(path, _)| path.starts_with("rootfs/usr/share/man/man")));
    let packages = std::fs::read_to_string(folder.path().join("one.tar.packages")).expect("written");
    assert!(packages.contains("systemd-sysv ") && packages.contains("fanlight-streamer "), "{packages}");
    let other = contents(&archives[1]);
    let different: Vec<_> = found.iter().zip(&other).filter(|(one, two)| one != two).collect();
    assert!(different.is_empty(), "{different:?}");
    assert_eq!(sums[0], sums[1]);
}
