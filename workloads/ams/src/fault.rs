//! Ends this program between two steps of its work, where a test asks for it: as a power cut would, without a word to
//! anybody. A step is a write to the store or something done by the engine. Without [`FILE`] in the environment nothing
//! is counted.

use std::{
    fs,
    path::PathBuf,
    sync::{Mutex, OnceLock, PoisonError},
};

use rustix::process::{Signal, getpid, kill_process};

/// Names a file. From when it is there, as many steps are done as it says.
const FILE: &str = "FANLIGHT_FAULT";

/// Something is about to be done, or was done a moment ago.
pub fn step() {
    static FAULT: OnceLock<Option<Mutex<Fault>>> = OnceLock::new();
    let fault =
        FAULT.get_or_init(|| Some(Mutex::new(Fault { file: std::env::var_os(FILE)?.into(), left: None })));
    let Some(fault) = fault else { return };
    if fault.lock().unwrap_or_else(PoisonError::into_inner).is_due() {
        let _ = kill_process(getpid(), Signal::KILL);
    }
}

struct Fault {
    file: PathBuf,
    left: Option<u64>,
}

impl Fault {
    fn is_due(&mut self) -> bool {
        if self.left.is_none() {
            self.left = fs::read_to_string(&self.file).ok().and_then(|text| text.trim().parse().ok());
        }
        let Some(left) = &mut self.left else { return false };
        *left = left.saturating_sub(1);
        *left == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_counted_from_when_the_file_is_there() {
        let folder = tempfile::tempdir().expect("made");
        let mut fault = Fault { file: folder.path().join("fault"), left: None };
        assert!(!fault.is_due() && !fault.is_due());
        fs::write(&fault.file, "2\n").expect("written");
        assert!(!fault.is_due());
        assert!(fault.is_due());
    }
}
