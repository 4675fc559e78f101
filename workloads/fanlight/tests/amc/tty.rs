//! A terminal with a program on it, as a person has one.

use std::{
    ffi::OsStr,
    fs::File,
    io::{Read as _, Write as _},
    mem::MaybeUninit,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
    process::{Child, Command},
    sync::mpsc,
    time::{Duration, Instant},
};

const PATIENCE: Duration = Duration::from_secs(30);

pub struct Terminal {
    /// The side of the person.
    person: File,
    /// The side of the program; kept, so that settings can be read when the program is gone.
    program: OwnedFd,
    shown: mpsc::Receiver<Vec<u8>>,
    text: String,
}

/// Settings, as far as a raw terminal differs from another.
#[derive(Debug, PartialEq, Eq)]
pub struct Settings([libc::tcflag_t; 4]);

impl Terminal {
    pub fn open(columns: u16, rows: u16) -> Self {
        let (mut person, mut program) = (0, 0);
        let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: both descriptors are written by the call, the name and the settings are not wanted, and the size lives
        // as long as the call.
        let opened = unsafe {
            libc::openpty(&mut person, &mut program, std::ptr::null_mut(), std::ptr::null(), &size)
        };
        assert_eq!(opened, 0, "a terminal can be opened");
        // SAFETY: both were just opened and belong to nobody else.
        let (person, program) = unsafe { (File::from_raw_fd(person), OwnedFd::from_raw_fd(program)) };
        let mut reading = person.try_clone().expect("cloned");
        let (sender, shown) = mpsc::channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(read) = reading.read(&mut buffer) {
                if read == 0 || sender.send(buffer[..read].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self { person, program, shown, text: String::new() }
    }

    /// Starts a program on it, alone in a session of its own.
    pub fn run(&self, program: &str, words: &[&str], environment: &[(&str, &OsStr)]) -> Child {
        let side = || self.program.try_clone().expect("cloned");
        let mut command = Command::new(program);
        command
            .args(words)
            .env_clear()
            .envs(environment.iter().copied())
            .stdin(side())
            .stdout(side())
            .stderr(side());
        // SAFETY: between fork and exec only two system calls are made, on descriptor 0, which is the terminal by then.
        unsafe {
            command.pre_exec(|| {
                if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        command.spawn().expect("it starts")
    }

    /// Waits until this is shown.
    pub fn expect(&mut self, wanted: &str) {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.text.find(wanted) {
                self.text.drain(..at + wanted.len());
                return;
            }
            let left = end.saturating_duration_since(Instant::now());
            let bytes = self.shown.recv_timeout(left);
            let bytes = bytes.unwrap_or_else(|_| panic!("{wanted:?} is not shown; shown is {:?}", self.text));
            self.text.push_str(&String::from_utf8_lossy(&bytes));
        }
    }

    pub fn type_in(&mut self, keys: &[u8]) {
        self.person.write_all(keys).expect("typed");
    }

    pub fn resize(&self, columns: u16, rows: u16) {
        let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: the descriptor is open and the kernel only reads the size.
        assert_eq!(unsafe { libc::ioctl(self.person.as_raw_fd(), libc::TIOCSWINSZ, &size) }, 0);
    }

    pub fn settings(&self) -> Settings {
        let settings = self.read();
        Settings([settings.c_iflag, settings.c_oflag, settings.c_cflag, settings.c_lflag])
    }

    /// Whether lines are edited and keys like interrupt mean something.
    pub fn is_cooked(&self) -> bool {
        self.read().c_lflag & (libc::ICANON | libc::ISIG | libc::ECHO)
            == libc::ICANON | libc::ISIG | libc::ECHO
    }

    fn read(&self) -> libc::termios {
        let mut settings = MaybeUninit::uninit();
        // SAFETY: the kernel fills the settings in; they are read only if it did.
        unsafe {
            assert_eq!(libc::tcgetattr(self.program.as_raw_fd(), settings.as_mut_ptr()), 0);
            settings.assume_init()
        }
    }
}
