//! A log file that does not grow for ever: at half of its bound it is put aside as `NAME.1`, which replaces the
//! one before.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::PathBuf,
};

use rustix::fs::OFlags;

/// The file.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    bound: u64,
    file: Option<File>,
    size: u64,
}

impl Log {
    /// Goes on with the file at `path`; both parts together stay below about `bound` bytes.
    pub fn new(path: PathBuf, bound: u64) -> Self {
        Self { path, bound, file: None, size: 0 }
    }

    /// Appends. A disk that is full loses lines, not instances.
    pub fn write(&mut self, bytes: &[u8]) {
        if let Err(error) = self.try_write(bytes) {
            self.file = None;
            tracing::debug!("writing the log {}: {error}", self.path.display());
        }
    }

    fn try_write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.size > self.bound / 2 {
            self.file = None;
            let mut older = self.path.clone().into_os_string();
            older.push(".1");
            std::fs::rename(&self.path, older)?;
        }
        let file = match &mut self.file {
            Some(file) => file,
            None => {
                let file = OpenOptions::new()
                    .append(true)
                    .create(true)
                    .mode(0o600)
                    // Others may write into the folder: neither their link is followed nor their pipe waited for.
                    .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed())
                    .open(&self.path)?;
                self.size = file.metadata()?.len();
                self.file.insert(file)
            }
        };
        file.write_all(bytes)?;
        self.size += bytes.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_stays_within_its_bound_and_keeps_the_newest_lines() {
        let folder = tempfile::tempdir().expect("made");
        let path = folder.path().join("x.log");
        let mut log = Log::new(path.clone(), 1000);
        for line in 0..500 {
            log.write(format!("line {line}\n").as_bytes());
        }
        let (new, old) = (std::fs::read_to_string(&path).expect("there"), path.with_added_extension("1"));
        let old = std::fs::read_to_string(old).expect("there");
        assert!(new.len() + old.len() < 1100, "{} {}", new.len(), old.len());
        assert!(new.ends_with("line 499\n"));
        assert!(format!("{old}{new}").contains("line 450\n"));
    }
}
