//! News to whoever started the streamer: datagrams to `NOTIFY_SOCKET` as sd_notify(3) defines them, and the result
//! in a field of our own.

use std::{
    ffi::OsString,
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            ffi::OsStrExt as _,
            net::{SocketAddr, UnixDatagram},
        },
    },
};

use fanlight_api::guest::Ended;
use tracing::warn;

/// The way to the supervisor, if there is one.
#[derive(Debug, Default)]
pub struct Notify {
    socket: Option<(UnixDatagram, SocketAddr)>,
}

impl Notify {
    /// Takes the address of `NOTIFY_SOCKET`; without one, all news is dropped.
    pub fn new(address: Option<OsString>) -> Self {
        let Some(address) = address.filter(|address| !address.is_empty()) else { return Self::default() };
        let bytes = address.as_bytes();
        let parsed = match bytes.strip_prefix(b"@") {
            Some(name) => SocketAddr::from_abstract_name(name),
            None => SocketAddr::from_pathname(&address),
        };
        match parsed.and_then(|parsed| Ok((UnixDatagram::unbound()?, parsed))) {
            Ok((socket, parsed)) => {
                // The supervisor reading late must never hold up a stream.
                if let Err(error) = socket.set_nonblocking(true) {
                    warn!(%error, "the notify socket may block");
                }
                Self { socket: Some((socket, parsed)) }
            }
            Err(error) => {
                warn!(%error, "NOTIFY_SOCKET cannot be used; nobody is told that the instance is ready");
                Self::default()
            }
        }
    }

    /// The instance is ready; `status` is for people.
    pub fn ready(&self, status: &str) {
        self.send(&format!("READY=1\nSTATUS={}\n", one_line(status)));
    }

    /// What goes on, for people.
    pub fn status(&self, status: &str) {
        self.send(&format!("STATUS={}\n", one_line(status)));
    }

    /// How the instance ended.
    pub fn ended(&self, ended: &Ended) {
        let result = serde_json::to_string(ended).expect("texts always serialise");
        self.send(&format!("STOPPING=1\nSTATUS={}\nX_FANLIGHT_RESULT={result}\n", one_line(&ended.message)));
    }

    fn send(&self, text: &str) {
        if let Some((socket, address)) = &self.socket
            && let Err(error) = socket.send_to_addr(text.as_bytes(), address)
        {
            warn!(%error, "the supervisor could not be told");
        }
    }
}

/// A line break would end the field.
fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(1000).collect()
}

#[cfg(test)]
mod tests {
    use fanlight_api::guest::EndReason;

    use super::*;

    #[test]
    fn news_arrive_as_fields_of_one_datagram() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("notify");
        let supervisor = UnixDatagram::bind(&path).expect("a socket");
        let notify = Notify::new(Some(path.into_os_string()));
        let receive = || {
            let mut buffer = [0; 4096];
            let length = supervisor.recv(&mut buffer).expect("a datagram");
            String::from_utf8(buffer[..length].to_vec()).expect("text")
        };
        notify.ready("first\nwindow");
        assert_eq!(receive(), "READY=1\nSTATUS=first window\n");
        notify.ended(&Ended { reason: EndReason::Idle, message: "nobody\ncame".into() });
        let text = receive();
        assert!(text.contains(r#"X_FANLIGHT_RESULT={"reason":"idle","message":"nobody\ncame"}"#), "{text}");
        assert_eq!(text.lines().count(), 3);
    }

    #[test]
    fn without_a_supervisor_nothing_happens() {
        Notify::new(None).ready("x");
        Notify::new(Some("".into())).ready("x");
        Notify::new(Some("/no/such/socket".into())).ready("x");
    }
}
