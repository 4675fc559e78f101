//! The terminal of this end: its size, and handing it to a program elsewhere.

use std::{
    io::{self, IsTerminal as _},
    mem::MaybeUninit,
};

/// Columns and rows; none where neither output is a terminal.
pub fn size() -> Option<(u16, u16)> {
    [libc::STDOUT_FILENO, libc::STDERR_FILENO, libc::STDIN_FILENO].into_iter().find_map(|fd| {
        let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: the descriptor is one of the three standard ones, and the kernel writes into `size` only.
        let answered = unsafe { libc::ioctl(fd, libc::TIOCGWINSZ, &mut size) } == 0;
        (answered && size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
    })
}

/// Every key goes through as it is. As it was before when this is dropped, however that comes about.
pub struct Raw {
    before: libc::termios,
}

impl Raw {
    /// Hands the keys of standard input through; nothing happens where that is no terminal.
    ///
    /// # Errors
    /// The terminal refuses.
    pub fn enter() -> io::Result<Option<Self>> {
        change(|settings| {
            // SAFETY: it only changes the settings given to it.
            unsafe { libc::cfmakeraw(settings) };
        })
    }

    /// Keys are not shown, for passwords.
    ///
    /// # Errors
    /// The terminal refuses.
    pub fn silent() -> io::Result<Option<Self>> {
        change(|settings| settings.c_lflag &= !libc::ECHO)
    }
}

fn change(how: impl FnOnce(&mut libc::termios)) -> io::Result<Option<Raw>> {
    if !io::stdin().is_terminal() {
        return Ok(None);
    }
    let mut settings = MaybeUninit::<libc::termios>::uninit();
    // SAFETY: the kernel fills in the settings or fails; they are read only if it did not.
    let before = unsafe {
        if libc::tcgetattr(libc::STDIN_FILENO, settings.as_mut_ptr()) != 0 {
            return Err(io::Error::last_os_error());
        }
        settings.assume_init()
    };
    let mut changed = before;
    how(&mut changed);
    apply(&changed)?;
    Ok(Some(Raw { before }))
}

fn apply(settings: &libc::termios) -> io::Result<()> {
    // SAFETY: the settings are whole, and the kernel only reads them.
    match unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSADRAIN, settings) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // A terminal that is gone needs no settings.
        let _ = apply(&self.before);
    }
}
