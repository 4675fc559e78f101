//! The state folder of a stack on one machine: where things lie, who holds it, how files are written.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use rustix::{
    fs::{FlockOperation, flock},
    process::{Pid, Signal, kill_process},
};
use serde::{Deserialize, Serialize};

/// Unix socket paths end at 107 bytes; the longest one below the state folder needs this much of it.
const LONGEST_BELOW: usize = 62;

/// A state folder.
#[derive(Clone, Debug)]
pub struct State {
    folder: PathBuf,
}

/// Who runs the stack of a state folder.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Owner {
    /// Process id.
    pub pid: i32,
}

/// Holding this is being the one that runs the stack. The kernel lets go of it however the process ends.
#[derive(Debug)]
pub struct Hold {
    _file: File,
    owner: PathBuf,
}

impl Drop for Hold {
    fn drop(&mut self) {
        // Best effort: a note that stays behind is recognised by the free lock.
        let _ = fs::remove_file(&self.owner);
    }
}

impl State {
    /// Opens the folder, making it if need be. Others may pass through it (instances of another user run from below
    /// it), but not look into it.
    ///
    /// # Errors
    /// The folder cannot be made, or its path is too long for the sockets in it.
    pub fn open(folder: &Path) -> Result<State> {
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o711);
        builder.create(folder).with_context(|| format!("creating the state folder {}", folder.display()))?;
        let folder = folder
            .canonicalize()
            .with_context(|| format!("finding the state folder {}", folder.display()))?;
        if folder.as_os_str().len() + LONGEST_BELOW > 107 {
            bail!(
                "the path of the state folder {} is too long for the sockets in it: at most {} bytes; choose another with --state",
                folder.display(),
                107 - LONGEST_BELOW
            );
        }
        let state = State { folder };
        for private in [state.trust(), state.run(), state.gateway(), state.agent()] {
            let mut builder = fs::DirBuilder::new();
            builder.recursive(true).mode(0o700);
            builder.create(&private).with_context(|| format!("creating {}", private.display()))?;
        }
        Ok(state)
    }

    /// The folder itself, absolute.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Certificates and keys.
    pub fn trust(&self) -> PathBuf {
        self.folder.join("trust")
    }

    /// Sockets.
    pub fn run(&self) -> PathBuf {
        self.folder.join("run")
    }

    /// The gateway's files.
    pub fn gateway(&self) -> PathBuf {
        self.folder.join("gateway")
    }

    /// The agent's files.
    pub fn agent(&self) -> PathBuf {
        self.folder.join("agent")
    }

    /// AMS's files, instances included.
    pub fn ams(&self) -> PathBuf {
        self.folder.join("ams")
    }

    /// The gateway's internal socket.
    pub fn gateway_socket(&self) -> PathBuf {
        self.run().join("gateway.sock")
    }

    /// AMS's socket.
    pub fn ams_socket(&self) -> PathBuf {
        self.run().join("ams.sock")
    }

    /// The administrator's API token.
    pub fn token(&self) -> PathBuf {
        self.folder.join("token")
    }

    /// `FANLIGHT_…` variables of the running stack, to be sourced by a shell.
    pub fn env(&self) -> PathBuf {
        self.folder.join("env")
    }

    /// Address of the page of the stack that ran last.
    pub fn page_note(&self) -> PathBuf {
        self.folder.join("page")
    }

    /// Ports of the stack that ran last.
    pub fn ports_note(&self) -> PathBuf {
        self.folder.join("ports.json")
    }

    /// Digests of the applications registered from folders.
    pub fn applications_note(&self) -> PathBuf {
        self.folder.join("applications.json")
    }

    /// Which file the default image was brought from.
    pub fn image_note(&self) -> PathBuf {
        self.folder.join("image")
    }

    /// Output of a detached stack.
    pub fn log(&self) -> PathBuf {
        self.folder.join("log")
    }

    fn lock(&self) -> PathBuf {
        self.folder.join("lock")
    }

    fn owner_note(&self) -> PathBuf {
        self.folder.join("owner.json")
    }

    /// Becomes the one that runs this stack.
    ///
    /// # Errors
    /// Somebody else does; the text names the process.
    pub fn hold(&self) -> Result<Hold> {
        let file = self.lock_file()?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(error) if error == rustix::io::Errno::WOULDBLOCK => {
                let who = self
                    .owner()
                    .map_or("another process".to_owned(), |owner| format!("process {}", owner.pid));
                bail!(
                    "a stack already runs from {} ({who}); end it with `fanlight down --state {0}`",
                    self.folder.display()
                );
            }
            Err(error) => return Err(error).with_context(|| format!("locking {}", self.lock().display())),
        }
        let owner = Owner { pid: std::process::id() as i32 };
        write_private(&self.owner_note(), &serde_json::to_vec(&owner).context("describing the owner")?)?;
        Ok(Hold { _file: file, owner: self.owner_note() })
    }

    /// Who runs this stack now, if anybody.
    pub fn owner(&self) -> Option<Owner> {
        serde_json::from_slice(&fs::read(self.owner_note()).ok()?).ok()
    }

    /// Whether somebody runs this stack.
    ///
    /// # Errors
    /// The lock file cannot be opened.
    pub fn is_held(&self) -> Result<bool> {
        match flock(&self.lock_file()?, FlockOperation::NonBlockingLockShared) {
            Ok(()) => Ok(false),
            Err(error) if error == rustix::io::Errno::WOULDBLOCK => Ok(true),
            Err(error) => Err(error).with_context(|| format!("locking {}", self.lock().display())),
        }
    }

    /// Asks whoever runs this stack to end it and waits until that is done.
    ///
    /// # Errors
    /// Nobody could be asked, or the time was over.
    pub fn end(&self, patience: Duration) -> Result<bool> {
        if !self.is_held()? {
            return Ok(false);
        }
        let Some(pid) = self.owner().and_then(|owner| Pid::from_raw(owner.pid)) else {
            bail!("a stack runs from {} but does not say as which process", self.folder.display());
        };
        kill_process(pid, Signal::TERM)
            .with_context(|| format!("asking process {} to end", pid.as_raw_nonzero()))?;
        let until = Instant::now() + patience;
        while self.is_held()? {
            if Instant::now() > until {
                bail!("process {} is still there after {} s", pid.as_raw_nonzero(), patience.as_secs());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(true)
    }

    fn lock_file(&self) -> Result<File> {
        OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(self.lock())
            .with_context(|| format!("opening {}", self.lock().display()))
    }
}

/// Writes a file of mode 0600 so that it is either there whole or not at all.
///
/// # Errors
/// Names the file.
pub fn write_private(path: &Path, content: &[u8]) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let temporary = path.with_file_name(name);
    let write = || -> io::Result<()> {
        let _ = fs::remove_file(&temporary);
        let mut file = OpenOptions::new().create_new(true).write(true).mode(0o600).open(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().with_context(|| format!("writing {}", path.display()))
}

/// Reads a small text file if it is there.
///
/// # Errors
/// It is there and cannot be read.
pub fn read_optional(path: &Path) -> Result<Option<String>> {
    let mut text = String::new();
    match File::open(path) {
        Ok(mut file) => {
            file.read_to_string(&mut text).with_context(|| format!("reading {}", path.display()))?
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("opening {}", path.display())),
    };
    Ok(Some(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_folder_has_one_owner_who_is_named_to_the_next() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let state = State::open(folder.path()).expect("opened");
        let hold = state.hold().expect("free");
        assert!(state.is_held().expect("checked"));
        let error = state.hold().expect_err("held").to_string();
        assert!(error.contains(&std::process::id().to_string()), "{error}");
        drop(hold);
        assert!(!state.is_held().expect("checked"));
        assert!(state.hold().is_ok());
    }

    #[test]
    fn a_note_left_by_a_crash_does_not_stop_the_next_start() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let state = State::open(folder.path()).expect("opened");
        write_private(&state.owner_note(), br#"{"pid":1}"#).expect("written");
        assert!(!state.end(Duration::from_secs(1)).expect("nobody to end"));
        assert!(state.hold().is_ok());
    }

    #[test]
    fn a_path_too_long_for_sockets_is_refused_with_the_way_out() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let long = folder.path().join("x".repeat(80));
        let error = State::open(&long).expect_err("too long").to_string();
        assert!(error.contains("--state"), "{error}");
    }
}
