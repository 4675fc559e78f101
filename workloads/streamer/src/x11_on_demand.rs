//! Stands in for Xwayland until the first X11 application connects, then becomes it.
//!
//! Xwayland costs some 65 MB, and most applications never ask for it. The compositor finds this program under the name `Xwayland` first; it inherits the listening sockets, waits with
//! them, and replaces itself by the real one when somebody knocks. The connection waits in the socket's queue
//! meanwhile, so the application notices nothing. When the last X11 application has been gone for a while, Xwayland
//! ends, and the compositor starts the next stand-in.

use std::{
    ffi::{OsStr, OsString},
    os::{
        fd::{BorrowedFd, RawFd},
        unix::process::CommandExt as _,
    },
    path::Path,
    process::Command,
};

use rustix::event::{PollFd, PollFlags, poll};

/// The name of the program that is stood in for.
pub const NAME: &str = "Xwayland";
/// Seconds that Xwayland stays after its last application: helpers that run before an application must not end it.
const LINGER_S: &str = "60";

/// Whether this process was started as the stand-in: its program's name says so.
pub fn is_wanted(program: Option<&OsStr>) -> bool {
    program.map(Path::new).and_then(Path::file_name) == Some(OsStr::new(NAME))
}

/// Waits, then becomes Xwayland; returns the exit status when that is impossible or no longer wanted.
/// `arguments` are those for Xwayland, without the program's name.
pub fn run(arguments: impl Iterator<Item = OsString>) -> u8 {
    let arguments: Vec<OsString> = arguments.collect();
    let listening = descriptors(&arguments);
    let display = std::env::var("WAYLAND_SOCKET").ok().and_then(|text| text.parse().ok());
    if !wait(&listening, display) {
        return 0;
    }
    let mut command = Command::new(NAME);
    command.args(with_linger(arguments));
    if let Some(path) = std::env::var_os("PATH") {
        command.env("PATH", without_first(&path));
    }
    let error = command.exec();
    // The compositor reads this as Xwayland's own words.
    eprintln!("starting Xwayland: {error}");
    1
}

/// The sockets that X11 applications connect to.
fn descriptors(arguments: &[OsString]) -> Vec<RawFd> {
    let after = arguments.iter().zip(arguments.iter().skip(1)).filter(|(flag, _)| *flag == "-listenfd");
    after.filter_map(|(_, value)| value.to_str()?.parse().ok()).collect()
}

/// Until somebody connects: `true`; or the compositor is gone: `false`.
fn wait(listening: &[RawFd], display: Option<RawFd>) -> bool {
    let borrow = |descriptor: RawFd| {
        // SAFETY: these are the descriptors that the compositor passed on for our lifetime; nobody here closes them,
        // and a number that is none makes `poll` say so.
        unsafe { BorrowedFd::borrow_raw(descriptor) }
    };
    let usable = |descriptor: &&RawFd| **descriptor >= 0;
    let mut wanted: Vec<PollFd<'_>> = listening
        .iter()
        .filter(usable)
        .map(|descriptor| PollFd::from_borrowed_fd(borrow(*descriptor), PollFlags::IN))
        .collect();
    let knocks = wanted.len();
    // Only its end is of interest, which needs no asking.
    wanted.extend(
        display
            .iter()
            .filter(usable)
            .map(|descriptor| PollFd::from_borrowed_fd(borrow(*descriptor), PollFlags::empty())),
    );
    if knocks == 0 {
        return true;
    }
    loop {
        match poll(&mut wanted, None) {
            Ok(_) if wanted[..knocks].iter().any(|knock| !knock.revents().is_empty()) => return true,
            Ok(_) if wanted[knocks..].iter().any(|end| !end.revents().is_empty()) => return false,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            // Without a way to wait the real one starts at once.
            Err(_) => return true,
        }
    }
}

fn with_linger(arguments: Vec<OsString>) -> Vec<OsString> {
    let mut changed = Vec::with_capacity(arguments.len() + 1);
    for argument in arguments {
        let is_terminate = argument == "-terminate";
        changed.push(argument);
        if is_terminate {
            changed.push(LINGER_S.into());
        }
    }
    changed
}

/// The search path without the folder that leads to ourselves.
fn without_first(path: &OsStr) -> OsString {
    std::env::join_paths(std::env::split_paths(path).skip(1)).unwrap_or_else(|_| "/usr/bin:/bin".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<OsString> {
        text.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn arguments_are_understood_and_passed_on() {
        let given = words(":3 -rootless -terminate -wm 25 -displayfd 31 -listenfd 29 -listenfd 30");
        assert_eq!(descriptors(&given), [29, 30]);
        let expected = words(":3 -rootless -terminate 60 -wm 25 -displayfd 31 -listenfd 29 -listenfd 30");
        assert_eq!(with_linger(given), expected);
        assert!(descriptors(&words(":3 -listenfd")).is_empty());
        assert!(is_wanted(Some(OsStr::new("/run/x/Xwayland"))));
        assert!(!is_wanted(Some(OsStr::new("/opt/fanlight/bin/fanlight-streamer"))));
        assert!(!is_wanted(None));
    }

    #[test]
    fn the_real_program_is_found_behind_the_stand_in() {
        assert_eq!(without_first(OsStr::new("/run/x:/usr/bin:/bin")), "/usr/bin:/bin");
        assert_eq!(without_first(OsStr::new("/run/x")), "");
    }

    #[test]
    fn it_waits_for_a_connection_or_the_end_of_the_display() {
        use std::os::{
            fd::AsRawFd as _,
            unix::net::{UnixListener, UnixStream},
        };
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("X0");
        let listener = UnixListener::bind(&path).expect("a socket");
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let connection = UnixStream::connect(&path).expect("a connection");
        assert!(wait(&[listener.as_raw_fd()], Some(theirs.as_raw_fd())));
        drop((connection, listener.accept().expect("it waited in the queue")));
        drop(ours);
        assert!(!wait(&[listener.as_raw_fd()], Some(theirs.as_raw_fd())));
    }
}
