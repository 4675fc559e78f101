//! The one UDP socket of an instance: bound once, kept for all clients.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    os::fd::{AsFd, BorrowedFd},
};

use fanlight_api::guest::Media;

/// Kernel buffer for each direction: a key frame and a burst of repetitions at 1080p.
const BUFFER_BYTES: usize = 1024 * 1024;

/// Why media has no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The port is taken, the address is not ours, and so on.
    #[error("binding UDP {address} for media: {source}")]
    Bind {
        /// What was tried.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// Clients would be told an address that is none.
    #[error("media.advertise must name an address clients can reach, because media.bind is {bind}")]
    NothingToAdvertise {
        /// The unspecified address.
        bind: IpAddr,
    },
    /// An address that nobody can send to.
    #[error("media.advertise: {address} is no address that clients can send to")]
    Advertise {
        /// The address.
        address: SocketAddr,
    },
}

/// The socket with what clients are told about it.
#[derive(Debug)]
pub struct MediaSocket {
    socket: UdpSocket,
    bound: SocketAddr,
    advertised: Vec<SocketAddr>,
}

impl MediaSocket {
    /// Binds as the guest file says.
    ///
    /// # Errors
    /// When the port cannot be bound or there is nothing to tell clients.
    pub fn bind(media: &Media) -> Result<Self, SocketError> {
        let bind = media.bind.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
        let address = SocketAddr::new(bind, media.port);
        let refused = |source| SocketError::Bind { address, source };
        let socket = UdpSocket::bind(address).map_err(refused)?;
        socket.set_nonblocking(true).map_err(refused)?;
        // Less than asked for is what the kernel's limits may give; that works too.
        let _ = rustix::net::sockopt::set_socket_send_buffer_size(&socket, BUFFER_BYTES);
        let _ = rustix::net::sockopt::set_socket_recv_buffer_size(&socket, BUFFER_BYTES);
        let bound = socket.local_addr().map_err(refused)?;
        let mut advertised = media.advertise.clone();
        if advertised.is_empty() {
            if bind.is_unspecified() {
                return Err(SocketError::NothingToAdvertise { bind });
            }
            advertised.push(bound);
        }
        for address in &mut advertised {
            if address.port() == 0 {
                address.set_port(bound.port());
            }
            if address.ip().is_unspecified() || address.ip().is_multicast() {
                return Err(SocketError::Advertise { address: *address });
            }
        }
        Ok(Self { socket, bound, advertised })
    }

    /// Where it is bound.
    pub fn bound(&self) -> SocketAddr {
        self.bound
    }

    /// What clients are told.
    pub fn advertised(&self) -> &[SocketAddr] {
        &self.advertised
    }

    /// For `poll`.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// The next datagram, if there is one.
    pub fn receive(&self, buffer: &mut [u8]) -> Option<(usize, SocketAddr)> {
        loop {
            match self.socket.recv_from(buffer) {
                Ok(received) => return Some(received),
                // The answer of a host that has closed its port comes as an error of the next call.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return None,
            }
        }
    }

    /// Sends a datagram. A full buffer or an unreachable host loses it, as the network would.
    pub fn send(&self, destination: SocketAddr, data: &[u8]) -> bool {
        self.socket.send_to(data, destination).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_port_is_announced_unless_other_addresses_are_given() {
        let socket = MediaSocket::bind(&Media::default()).expect("loopback");
        assert_eq!(socket.advertised(), [socket.bound()]);
        assert_ne!(socket.bound().port(), 0);
        let advertise =
            vec!["192.0.2.1:0".parse().expect("address"), "192.0.2.1:7".parse().expect("address")];
        let media = Media { bind: Some(Ipv4Addr::UNSPECIFIED.into()), advertise, ..Media::default() };
        let socket = MediaSocket::bind(&media).expect("any");
        assert_eq!(socket.advertised()[0].port(), socket.bound().port());
        assert_eq!(socket.advertised()[1].port(), 7);
    }

    #[test]
    fn impossible_addresses_and_taken_ports_are_refused_by_name() {
        let first = MediaSocket::bind(&Media::default()).expect("loopback");
        let taken = Media { port: first.bound().port(), ..Media::default() };
        let error = MediaSocket::bind(&taken).expect_err("taken").to_string();
        assert!(error.contains(&first.bound().to_string()), "{error}");
        let foreign = Media { bind: Some("192.0.2.1".parse().expect("address")), ..Media::default() };
        assert!(MediaSocket::bind(&foreign).is_err());
        let unspecified = Media { bind: Some(Ipv4Addr::UNSPECIFIED.into()), ..Media::default() };
        let error = MediaSocket::bind(&unspecified).expect_err("nothing to tell").to_string();
        assert!(error.contains("media.advertise"), "{error}");
        let odd = Media { advertise: vec!["0.0.0.0:9".parse().expect("address")], ..Media::default() };
        assert!(MediaSocket::bind(&odd).is_err());
    }
}
