//! What the tests share: folders, a stand-in for the streamer, and waiting for a condition.

use std::{
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use fanlight_ams::engine::{Bounding, ProcessConfig, Spec};
use fanlight_api::{
    InstanceId, PROTOCOL_VERSION,
    guest::{Guest, GuestApplication},
};

pub use crate::contract::until_phase;

/// Longer than anything here takes; a test that needs it has failed.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The program under test.
pub const AMS: &str = env!("CARGO_BIN_EXE_fanlight-ams");

/// The stand-in for the streamer, as a file that can be run.
pub fn streamer(folder: &Path) -> PathBuf {
    let path = folder.join("streamer.pl");
    std::fs::write(&path, include_str!("streamer.pl")).expect("written");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("set");
    path
}

/// A package with nothing but its manifest.
pub fn package(folder: &Path) -> PathBuf {
    let path = folder.join("package");
    std::fs::create_dir_all(&path).expect("made");
    std::fs::write(path.join("manifest.yaml"), "name: test\ncommand: run\n").expect("written");
    for path in [&path, &path.join("manifest.yaml")] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).expect("set");
    }
    path
}

/// Settings of a process engine below `folder`.
pub fn process_config(folder: &Path) -> ProcessConfig {
    ProcessConfig {
        node: "local".into(),
        address: "127.0.0.1".into(),
        folder: folder.join("instances"),
        shim: vec![AMS.into(), "shim".into()],
        streamer: vec![streamer(folder).display().to_string(), "run".into()],
        programs: Vec::new(),
        hidden: vec![folder.to_owned()],
        first_uid: 200_000,
        uids: 100,
        bounds: Bounding::Auto,
    }
}

/// An instance whose streamer does `command`.
pub fn spec(folder: &Path, command: &[&str]) -> Spec {
    let guest = Guest {
        version: PROTOCOL_VERSION,
        instance_id: InstanceId::generate(),
        application: GuestApplication {
            name: "test".into(),
            command: command.iter().map(ToString::to_string).collect(),
            ..GuestApplication::default()
        },
        display: Default::default(),
        streaming: None,
        media: Default::default(),
        pool: None,
        devmode: false,
    };
    Spec {
        guest,
        package: Some(package(folder)),
        node: "local".parse().expect("valid"),
        image: None,
        share: Default::default(),
        disk_bytes: 0,
        services: Vec::new(),
        public_address: None,
        base: false,
        copy_of: None,
        addons: Vec::new(),
    }
}

/// Waits until a condition holds.
pub async fn until<T>(what: &str, mut condition: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = condition().await {
            return value;
        }
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Processes on this machine whose command line holds a text.
pub fn processes_with(text: &str) -> Vec<i32> {
    let own = std::process::id().cast_signed();
    std::fs::read_dir("/proc")
        .expect("there")
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| *pid != own)
        .filter(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).replace('\0', " ").contains(text)
        })
        .collect()
}
