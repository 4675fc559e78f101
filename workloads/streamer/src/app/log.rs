//! The log of the application: what it prints, in a file of limited size with one predecessor.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use tokio::io::{AsyncRead, AsyncReadExt as _};
use tracing::warn;

/// Largest log file, bytes; with its predecessor twice as much is kept.
const MAX_BYTES: u64 = 10 * 1024 * 1024;

/// Where the application's output goes.
#[derive(Debug)]
pub struct Log {
    target: Target,
}

#[derive(Debug)]
enum Target {
    File {
        path: PathBuf,
        file: File,
        bytes: u64,
    },
    /// Without a folder for logs: our own.
    Stderr {
        line_start: bool,
    },
}

impl Log {
    /// `application.log` in `folder`, or our standard error when there is none.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn open(folder: Option<&Path>) -> io::Result<Self> {
        let Some(folder) = folder else { return Ok(Self { target: Target::Stderr { line_start: true } }) };
        let path = folder.join("application.log");
        let (file, bytes) = open(&path)?;
        Ok(Self { target: Target::File { path, file, bytes } })
    }

    fn write(&mut self, data: &[u8]) -> io::Result<()> {
        match &mut self.target {
            Target::File { path, file, bytes } => {
                if *bytes + data.len() as u64 > MAX_BYTES {
                    std::fs::rename(&*path, path.with_extension("log.1"))?;
                    (*file, *bytes) = open(path)?;
                }
                file.write_all(data)?;
                *bytes += data.len() as u64;
            }
            Target::Stderr { line_start } => {
                let mut out = Vec::with_capacity(data.len() + 64);
                for byte in data {
                    if std::mem::replace(line_start, *byte == b'\n') {
                        out.extend_from_slice(b"application: ");
                    }
                    out.push(*byte);
                }
                io::stderr().write_all(&out)?;
            }
        }
        Ok(())
    }
}

fn open(path: &Path) -> io::Result<(File, u64)> {
    let file = OpenOptions::new().create(true).append(true).mode(0o640).open(path)?;
    let bytes = file.metadata()?.len();
    Ok((file, bytes))
}

/// Copies a program's output into the log until it ends. When the log cannot be written, a full disk for
/// example, the output is still read: the program must not hang on it.
pub async fn copy(mut from: impl AsyncRead + Unpin, log: std::rc::Rc<std::cell::RefCell<Log>>) {
    let mut buffer = vec![0; 16 * 1024];
    let mut complained = false;
    loop {
        match from.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(length) => {
                let written = log.borrow_mut().write(&buffer[..length]);
                if let Err(error) = written
                    && !std::mem::replace(&mut complained, true)
                {
                    warn!(%error, "output of the application is lost: its log cannot be written");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_log_is_kept_once_and_a_new_one_begins() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut log = Log::open(Some(folder.path())).expect("a log");
        let block = vec![b'x'; 1024 * 1024];
        for _ in 0..25 {
            log.write(&block).expect("written");
        }
        let size = |name: &str| std::fs::metadata(folder.path().join(name)).expect("a file").len();
        assert_eq!(size("application.log.1"), MAX_BYTES);
        assert_eq!(size("application.log"), 5 * 1024 * 1024);
        let mut again = Log::open(Some(folder.path())).expect("a log");
        again.write(&vec![b'x'; 6 * 1024 * 1024]).expect("written");
        assert_eq!(size("application.log"), 6 * 1024 * 1024, "what was there counts");
    }

    #[test]
    fn a_missing_folder_is_an_error() {
        assert!(Log::open(Some(Path::new("/proc/nowhere"))).is_err());
    }
}
