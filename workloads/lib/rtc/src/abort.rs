//! Ends a connection so that the other side knows at once: an SCTP ABORT before the DTLS goodbye.
//!
//! A browser reports the end of a stream immediately only when an ABORT chunk reaches it; an orderly SCTP shutdown
//! or a vanished peer is noticed many seconds later. str0m closes with the orderly form, so this module stands
//! between its SCTP and its DTLS: it remembers the ports and the verification tag of the association that passes
//! through, and when the DTLS connection is closed it sends the ABORT first.
//!
//! It leaves everything else to the DTLS implementation that it wraps.

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use str0m::config::{CryptoProvider, DtlsVersion};
use str0m::crypto::dtls::{DtlsCert, DtlsImplError, DtlsInstance, DtlsOutput, DtlsProvider, ProtocolVersion};
use str0m::crypto::{CryptoError, from_feature_flags};

/// Length of the SCTP common header: ports, verification tag, checksum (RFC 9260 section 3.1).
const COMMON_HEADER: usize = 12;
/// Chunk type ABORT (RFC 9260 section 3.3.7).
const CHUNK_ABORT: u8 = 6;
/// Error cause "User-Initiated Abort" (RFC 9260 section 3.3.10.12).
const CAUSE_USER_INITIATED: u16 = 12;
/// The text browsers show for their own close, so that clients match on one text only.
const REASON: &[u8] = b"Close called";

/// The crypto provider of this build with the DTLS part wrapped.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    static DTLS: AbortingProvider = AbortingProvider;
    PROVIDER.get_or_init(|| Arc::new(CryptoProvider { dtls_provider: &DTLS, ..plain() })).clone()
}

fn plain() -> CryptoProvider {
    from_feature_flags()
}

#[derive(Debug)]
struct AbortingProvider;

impl DtlsProvider for AbortingProvider {
    fn generate_certificate(&self) -> Option<DtlsCert> {
        plain().dtls_provider.generate_certificate()
    }

    fn new_dtls(
        &self,
        cert: &DtlsCert,
        now: Instant,
        version: DtlsVersion,
        mtu: Option<usize>,
    ) -> Result<Box<dyn DtlsInstance>, CryptoError> {
        let inner = plain().dtls_provider.new_dtls(cert, now, version, mtu)?;
        Ok(Box::new(AbortingDtls { inner, association: None, ended: false }))
    }
}

/// What an ABORT needs to be believed by the other side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Association {
    source_port: u16,
    destination_port: u16,
    verification_tag: u32,
}

#[derive(Debug)]
struct AbortingDtls {
    inner: Box<dyn DtlsInstance>,
    association: Option<Association>,
    /// The other side aborted: it must not get an ABORT in return (RFC 9260 section 8.4).
    ended: bool,
}

impl DtlsInstance for AbortingDtls {
    fn set_active(&mut self, active: bool) {
        self.inner.set_active(active);
    }

    fn handle_packet(&mut self, packet: &[u8]) -> Result<(), DtlsImplError> {
        self.inner.handle_packet(packet)
    }

    fn poll_output<'a>(&mut self, buf: &'a mut [u8]) -> DtlsOutput<'a> {
        let output = self.inner.poll_output(buf);
        if let DtlsOutput::ApplicationData(data) = &output {
            self.ended |= data.get(COMMON_HEADER) == Some(&CHUNK_ABORT);
        }
        output
    }

    fn handle_timeout(&mut self, now: Instant) -> Result<(), DtlsImplError> {
        self.inner.handle_timeout(now)
    }

    fn send_application_data(&mut self, data: &[u8]) -> Result<usize, DtlsImplError> {
        if let Some(association) = association_of(data) {
            self.association = Some(association);
        }
        self.inner.send_application_data(data)
    }

    fn is_active(&self) -> bool {
        self.inner.is_active()
    }

    fn protocol_version(&self) -> Option<ProtocolVersion> {
        self.inner.protocol_version()
    }

    fn is_closing(&self) -> bool {
        self.inner.is_closing()
    }

    fn is_closed(&self) -> bool {
        self.inner.is_closed()
    }

    fn close(&mut self) -> Result<(), DtlsImplError> {
        if let Some(association) = self.association.take().filter(|_| !self.ended) {
            // A refusal only means that the connection is gone already; the goodbye below is what remains to try.
            let _ = self.inner.send_application_data(&abort_packet(association));
        }
        self.inner.close()
    }
}

/// Reads the association from an outgoing packet; `None` for an INIT, which carries no tag yet.
fn association_of(packet: &[u8]) -> Option<Association> {
    let header = packet.get(..COMMON_HEADER)?;
    let tag = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
    (tag != 0).then(|| Association {
        source_port: u16::from_be_bytes([header[0], header[1]]),
        destination_port: u16::from_be_bytes([header[2], header[3]]),
        verification_tag: tag,
    })
}

/// An SCTP packet with one ABORT chunk that says "User-Initiated Abort".
fn abort_packet(association: Association) -> Vec<u8> {
    let cause_length = 4 + REASON.len();
    let chunk_length = 4 + cause_length;
    let mut packet = Vec::with_capacity(COMMON_HEADER + chunk_length);
    packet.extend_from_slice(&association.source_port.to_be_bytes());
    packet.extend_from_slice(&association.destination_port.to_be_bytes());
    packet.extend_from_slice(&association.verification_tag.to_be_bytes());
    packet.extend_from_slice(&[0; 4]); // the checksum is computed over zeros, then filled in
    packet.push(CHUNK_ABORT);
    packet.push(0); // T bit clear: the tag is the receiver's own
    packet.extend_from_slice(&(chunk_length as u16).to_be_bytes());
    packet.extend_from_slice(&CAUSE_USER_INITIATED.to_be_bytes());
    packet.extend_from_slice(&(cause_length as u16).to_be_bytes());
    packet.extend_from_slice(REASON);
    // Chunks are padded to four bytes; the length excludes the padding.
    packet.resize(packet.len().next_multiple_of(4), 0);
    let checksum = crc32c(&packet);
    // RFC 9260 appendix A: the checksum travels with its least significant byte first.
    packet[8..12].copy_from_slice(&checksum.to_le_bytes());
    packet
}

/// CRC-32C (Castagnoli, reflected), bit by bit: it runs once in the life of a connection.
fn crc32c(data: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    let mut crc = u32::MAX;
    for byte in data {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ POLYNOMIAL } else { crc >> 1 };
        }
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_matches_the_check_values_of_rfc_3720() {
        for (data, expected) in [
            (vec![0u8; 32], 0x8a91_36aa),
            (vec![0xff; 32], 0x62a8_ab43),
            ((0..32).collect(), 0x46dd_794e),
            (b"123456789".to_vec(), 0xe306_9283),
        ] {
            assert_eq!(crc32c(&data), expected, "{data:?}");
        }
    }

    #[test]
    fn an_abort_names_the_association_and_the_cause() {
        let association =
            Association { source_port: 5000, destination_port: 5001, verification_tag: 0xdead_beef };
        let packet = abort_packet(association);
        assert_eq!(association_of(&packet), Some(association));
        assert_eq!(packet.len() % 4, 0);
        assert_eq!(packet[12], CHUNK_ABORT);
        assert_eq!(&packet[16..18], &12u16.to_be_bytes());
        let mut zeroed = packet.clone();
        zeroed[8..12].fill(0);
        assert_eq!(packet[8..12], crc32c(&zeroed).to_le_bytes());
    }

    #[test]
    fn packets_without_a_tag_tell_nothing() {
        assert_eq!(association_of(&[]), None);
        assert_eq!(association_of(&[1; 11]), None);
        assert_eq!(association_of(&[0x13, 0x88, 0x13, 0x88, 0, 0, 0, 0, 1, 2, 3, 4, 1]), None);
    }
}
