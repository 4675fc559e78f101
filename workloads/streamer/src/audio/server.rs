//! The private sound server: a PulseAudio daemon of its own for every instance, with one sink that plays into
//! nothing and one socket that only this instance sees.
//!
//! The socket is ours and is handed to the daemon, as systemd does it (sd_listen_fds(3)): an application that is
//! faster than the daemon waits for it instead of running without sound.
//!
//! `norewinds=1` takes 280 ms off the sink's delay; `module-suspend-on-idle` makes an idle one free
//! (media-stack section 5).

use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixListener},
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use tokio::process::{Child, Command};
use tracing::{debug, info, warn};

use crate::app::die_with_us;

/// Name of the sink.
pub const SINK: &str = "fanlight";
/// Hands standard input on as the first passed socket and becomes the program named by the arguments.
const WITH_SOCKET: &str = r#"LISTEN_PID=$$ exec "$@" 3<&0 </dev/null"#;
/// What a shell says when there is no such program.
const NO_PROGRAM: i32 = 127;
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LAST_PAUSE: Duration = Duration::from_secs(30);
/// A daemon that ran this long was all right.
const GOOD_RUN: Duration = Duration::from_secs(60);

/// Where the daemon lives.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Folder of its own, mode 0700.
    pub folder: PathBuf,
}

impl ServerConfig {
    /// Address for `PULSE_SERVER`.
    pub fn address(&self) -> String {
        format!("unix:{}", self.socket().display())
    }

    fn socket(&self) -> PathBuf {
        self.folder.join("native")
    }
}

/// The daemon under supervision.
#[derive(Debug)]
pub struct Server {
    config: ServerConfig,
    child: Option<Child>,
    started: Instant,
    pause: Duration,
    /// There is no such program; nobody tries again.
    missing: bool,
}

impl Server {
    /// Starts the daemon. A missing one is told in the log; streaming goes on without sound.
    pub fn start(config: ServerConfig) -> Self {
        let mut server =
            Self { config, child: None, started: Instant::now(), pause: FIRST_PAUSE, missing: false };
        server.spawn();
        server
    }

    /// No daemon: applications that want sound find nobody.
    pub fn none(config: ServerConfig) -> Self {
        Self { config, child: None, started: Instant::now(), pause: FIRST_PAUSE, missing: true }
    }

    /// Process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().and_then(Child::id)
    }

    fn spawn(&mut self) {
        self.started = Instant::now();
        match spawn(&self.config) {
            Ok(child) => {
                debug!(pid = child.id(), "sound server started");
                self.child = Some(child);
            }
            Err(error) => warn!(%error, "the sound server could not be started"),
        }
    }

    /// Waits until the daemon has ended and starts it again, for ever. Safe to cancel.
    pub async fn supervise(&mut self) {
        loop {
            if self.missing {
                return std::future::pending().await;
            }
            if let Some(child) = &mut self.child {
                let status = child.wait().await;
                self.child = None;
                if self.started.elapsed() >= GOOD_RUN {
                    self.pause = FIRST_PAUSE;
                }
                match status {
                    Ok(status) if status.code() == Some(NO_PROGRAM) => {
                        self.missing = true;
                        warn!("there is no sound: program pulseaudio was not found (package pulseaudio)");
                        continue;
                    }
                    Ok(status) => warn!(%status, "the sound server ended and is started again"),
                    Err(error) => warn!(%error, "the sound server is lost and is started again"),
                }
            }
            tokio::time::sleep(self.pause).await;
            self.pause = (self.pause * 2).min(LAST_PAUSE);
            self.spawn();
        }
    }

    /// Ends the daemon.
    pub async fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It keeps nothing that matters, so there is nothing to wait for.
            if let Err(error) = child.kill().await {
                info!(%error, "the sound server had ended before it was stopped");
            }
        }
    }
}

fn spawn(config: &ServerConfig) -> io::Result<Child> {
    let socket = config.socket();
    // A predecessor's; nobody answers there any more.
    match std::fs::remove_file(&socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&socket)?;
    let mut command = Command::new("/bin/sh");
    command
        .args(["-c", WITH_SOCKET, "sh", "pulseaudio"])
        .args(["-n", "--daemonize=no", "--exit-idle-time=-1", "--use-pid-file=no", "--system=no"])
        .args(["--disallow-exit=yes", "--realtime=no", "--high-priority=no", "--log-target=stderr"])
        .args(["--log-level=error", "--load"])
        .arg(format!("module-null-sink sink_name={SINK} norewinds=1 format=s16le rate=48000 channels=2"))
        .arg("--load")
        .arg(format!("module-native-protocol-unix socket={} auth-anonymous=1", socket.display()))
        .arg("--load=module-suspend-on-idle timeout=2")
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin".into()))
        .env("HOME", &config.folder)
        .env("XDG_RUNTIME_DIR", &config.folder)
        .env("PULSE_RUNTIME_PATH", &config.folder)
        .env("PULSE_STATE_PATH", &config.folder)
        .env("LISTEN_FDS", "1")
        .stdin(OwnedFd::from(listener))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    die_with_us(&mut command);
    check_folder(&config.folder)?;
    command.spawn()
}

fn check_folder(folder: &Path) -> io::Result<()> {
    std::fs::read_dir(folder).map(drop)
}
