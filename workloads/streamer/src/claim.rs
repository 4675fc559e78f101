//! The way in which an instance of a pool gets its session: a program in the instance hands the claim over to the
//! streamer that waits.
//!
//! The claim is a guest file as an ordinary start would read it, and holds the token of the session. It comes on the
//! standard input of `fanlight-streamer claim` and goes through a socket in the instance's runtime folder, so no
//! argument, file or environment ever has it. The application may run already, as the same user: both ends look at
//! the process on the other one before a word is said. What a claim changes is the affair of [`crate::run`].

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use fanlight_api::{
    InstanceId,
    guest::{ClaimAnswer, Guest},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    sync::oneshot,
};
use tracing::warn;

use crate::guest::{self, GuestError, MAX_BYTES};

/// Where a supervisor has its streamer make its runtime folder.
pub const SUPERVISED: &str = "/run/fanlight/user";
/// Name of the socket in the runtime folder.
const SOCKET: &str = "claim.sock";
/// How long one side waits for what the other has to say.
const PATIENCE: Duration = Duration::from_secs(10);
/// Most bytes of an answer.
const MAX_ANSWER: u64 = 64 * 1024;
/// No process has more ancestors than this.
const MOST_ANCESTORS: usize = 1000;

impl ClaimError {
    /// The answer that says so.
    pub fn answer(self) -> ClaimAnswer {
        let again = matches!(self, Self::Socket { .. } | Self::Late);
        ClaimAnswer { again, ..refused(format!("{:#}", anyhow::Error::from(self))) }
    }
}

/// A claim, and where its answer goes.
pub type Claim = (Box<Guest>, oneshot::Sender<ClaimAnswer>);

/// Why a claim could not be handed over.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// The claim itself.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// No streamer.
    #[error("no streamer of instance {0} waits to be claimed here")]
    NobodyWaits(InstanceId),
    /// Something else has the socket.
    #[error("the socket {} belongs to a process that is not the streamer", .0.display())]
    NotTheStreamer(PathBuf),
    /// The socket.
    #[error("talking to the streamer over {}", path.display())]
    Socket {
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// No word came back.
    #[error("the streamer did not answer within {} s", PATIENCE.as_secs())]
    Late,
    /// What came back is no answer.
    #[error("the streamer answered something odd")]
    Odd,
}

/// Listens for claims in the runtime folder until the runtime ends.
///
/// # Errors
/// The socket cannot be made.
pub fn listen(folder: &Path, deliver: impl Fn(Claim) + 'static) -> io::Result<()> {
    let listener = UnixListener::bind(folder.join(SOCKET))?;
    tokio::task::spawn_local(async move {
        loop {
            match listener.accept().await {
                // One after the other: there is only one claim to be had.
                Ok((stream, _)) => {
                    if tokio::time::timeout(PATIENCE, serve(stream, &deliver)).await.is_err() {
                        warn!("a claim took too long and was dropped");
                    }
                }
                Err(error) => {
                    warn!(%error, "a claim could not be accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    });
    Ok(())
}

async fn serve(mut stream: UnixStream, deliver: &impl Fn(Claim)) {
    let answer = match receive(&mut stream).await {
        Ok(guest) => {
            let (answer, answered) = oneshot::channel();
            deliver((Box::new(guest), answer));
            answered.await.unwrap_or_else(|_| refused("the instance ends".into()))
        }
        Err(reason) => {
            warn!("a claim was refused: {reason}");
            refused(reason)
        }
    };
    let mut line = serde_json::to_vec(&answer).unwrap_or_default();
    line.push(b'\n');
    if let Err(error) = stream.write_all(&line).await {
        warn!(%error, "whoever claimed this instance does not listen to the answer");
    }
}

async fn receive(stream: &mut UnixStream) -> Result<Guest, String> {
    let peer = stream.peer_cred().map_err(|error| format!("who claims is not known: {error}"))?;
    let own = rustix::process::geteuid().as_raw();
    // Process 0 is one that is not seen from here, so it is none of the instance's.
    let inside = peer.pid().and_then(|pid| u32::try_from(pid).ok()).filter(|pid| *pid != 0);
    if peer.uid() != own && peer.uid() != 0 || inside.is_some_and(|pid| is_below(pid, std::process::id())) {
        return Err("the application cannot claim its own instance".into());
    }
    let mut text = Vec::new();
    let read = stream.take(MAX_BYTES + 1).read_to_end(&mut text).await;
    read.map_err(|error| format!("reading the claim: {error}"))?;
    guest::read(&text[..]).map_err(|error| error.to_string())
}

/// An answer that says no.
pub fn refused(error: String) -> ClaimAnswer {
    ClaimAnswer { ok: false, error: Some(error), again: false }
}

/// Hands the claim of standard input over to the streamer of the instance that it names, and gives its answer.
///
/// # Errors
/// The claim is no good, or no streamer takes it.
pub async fn hand_over(from: impl io::Read) -> Result<ClaimAnswer, ClaimError> {
    let guest = guest::read(from)?;
    let text = serde_json::to_vec(&guest).map_err(|_| ClaimError::Odd)?;
    for path in sockets(&guest.instance_id) {
        let Ok(mut stream) = UnixStream::connect(&path).await else { continue };
        let fail = |source| ClaimError::Socket { path: path.clone(), source };
        let peer = stream.peer_cred().map_err(fail)?.pid().and_then(|pid| u32::try_from(pid).ok());
        if !peer.is_some_and(is_streamer) {
            return Err(ClaimError::NotTheStreamer(path));
        }
        let said = async {
            stream.write_all(&text).await?;
            stream.shutdown().await?;
            let mut answer = Vec::new();
            (&mut stream).take(MAX_ANSWER).read_to_end(&mut answer).await?;
            Ok(answer)
        };
        let answer =
            tokio::time::timeout(PATIENCE, said).await.map_err(|_| ClaimError::Late)?.map_err(fail)?;
        return serde_json::from_slice(&answer).map_err(|_| ClaimError::Odd);
    }
    Err(ClaimError::NobodyWaits(guest.instance_id))
}

/// Where the streamer of an instance may listen: below the folders in which it makes its own.
fn sockets(id: &InstanceId) -> Vec<PathBuf> {
    let mut parents: Vec<PathBuf> =
        std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).into_iter().collect();
    parents.push(SUPERVISED.into());
    parents.extend(entries(Path::new("/run/user")));
    parents.push(std::env::temp_dir());
    let prefix = format!("fanlight-{id}-");
    let is_own =
        |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix));
    parents
        .iter()
        .flat_map(|parent| entries(parent))
        .filter(is_own)
        .map(|folder| folder.join(SOCKET))
        .filter(|path| path.exists())
        .collect()
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

/// Whether this is the streamer and not a process of the application that took its socket away: all of those stay
/// below the streamer, which was started by the first process of the instance, by the supervisor of a container, or,
/// outside of an instance, by whoever started us.
fn is_streamer(pid: u32) -> bool {
    let Some(started_by) = parent(pid) else { return false };
    started_by == 1 || Some(started_by) == parent_of_us() || is_supervisor(started_by)
}

/// Whether this is the supervisor of a container: the same program as this one, run as root by the first process.
/// An application is no root, and what it starts never gets the first process for a parent.
fn is_supervisor(pid: u32) -> bool {
    let program = |of: &str| fs::read_link(format!("/proc/{of}/exe")).ok();
    let is_root = fs::metadata(format!("/proc/{pid}")).is_ok_and(|folder| folder.uid() == 0);
    is_root
        && parent(pid) == Some(1)
        && program(&pid.to_string()).is_some_and(|of_it| Some(of_it) == program("self"))
}

fn parent_of_us() -> Option<u32> {
    parent(std::process::id()).filter(|parent| *parent != 0)
}

/// Whether a process is this one, or was started by it or by what it started.
fn is_below(mut pid: u32, ancestor: u32) -> bool {
    for _ in 0..MOST_ANCESTORS {
        if pid == ancestor {
            return true;
        }
        match parent(pid) {
            Some(next) if next != 0 => pid = next,
            // Gone already, or the first of all.
            _ => return false,
        }
    }
    false
}

fn parent(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_was_started_by_us_is_below_us_and_we_are_not_below_it() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("sleep is there");
        let (ours, us) = (child.id(), std::process::id());
        let (below, above) = (is_below(ours, us), is_below(us, ours));
        let named = (parent(ours), is_streamer(ours));
        child.kill().expect("it can be ended");
        child.wait().expect("it ends");
        assert!(below && !above);
        // What the application starts is not taken for its streamer.
        assert_eq!(named, (Some(us), false));
        assert!(is_below(us, us));
    }
}
