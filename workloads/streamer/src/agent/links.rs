//! The streamer's ends of the reliable links, one per generation. A plain value.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use fanlight_api::{
    SessionId,
    link::{Frame, Link, LinkError, Packet, PacketKind, Side},
};

/// Most generations that are kept: the one that streams, and newer ones that may come or go.
const MAX_LINKS: usize = 4;
/// After this the other end is gone, and what it did not acknowledge is nobody's.
const SILENCE: Duration = Duration::from_secs(120);

/// All links of one session.
#[derive(Debug)]
pub struct Links {
    session_id: SessionId,
    links: BTreeMap<u64, (Link, Instant)>,
    /// Generations up to this one that have no link any more are over.
    over: Option<u64>,
}

impl Links {
    /// None yet.
    pub fn new(session_id: SessionId) -> Self {
        Self { session_id, links: BTreeMap::new(), over: None }
    }

    /// Takes a packet; returns the frames that are now in order.
    pub fn receive(&mut self, now: Instant, packet: Packet) -> Vec<(u64, Frame)> {
        if packet.session_id != self.session_id || packet.from != Side::Client {
            return Vec::new();
        }
        let generation = packet.generation;
        // Only a frame opens a link: what else comes for an unknown generation is late.
        if !self.links.contains_key(&generation) {
            let late = self.over.is_some_and(|over| generation <= over);
            if late || !matches!(packet.kind, PacketKind::Data { .. }) {
                return Vec::new();
            }
            self.links
                .insert(generation, (Link::new(self.session_id.clone(), generation, Side::Instance), now));
            while self.links.len() > MAX_LINKS {
                let oldest = self.links.pop_first().map(|(oldest, _)| oldest);
                self.over = self.over.max(oldest);
            }
        }
        let Some((link, heard)) = self.links.get_mut(&generation) else { return Vec::new() };
        *heard = now;
        link.receive(packet);
        std::iter::from_fn(|| link.poll_frame()).map(|frame| (generation, frame)).collect()
    }

    /// Takes a frame for a client; one whose generation is over is dropped.
    ///
    /// # Errors
    /// When too much waits already.
    pub fn send(&mut self, generation: u64, frame: Frame) -> Result<(), LinkError> {
        self.links.get_mut(&generation).map_or(Ok(()), |(link, _)| link.send(frame))
    }

    /// Everything to be sent now.
    pub fn take_packets(&mut self, now: Instant) -> Vec<Packet> {
        let silent = |link: &Link, heard: Instant| {
            !link.is_settled() && now.saturating_duration_since(heard) > SILENCE
        };
        let gone: Vec<u64> = self
            .links
            .iter()
            .filter(|(_, (link, heard))| silent(link, *heard))
            .map(|(key, _)| *key)
            .collect();
        for generation in gone {
            self.links.remove(&generation);
            self.over = self.over.max(Some(generation));
        }
        let mut packets = Vec::new();
        for (link, _) in self.links.values_mut() {
            packets.extend(std::iter::from_fn(|| link.poll_transmit(now)));
        }
        packets
    }

    /// When to take packets again.
    pub fn deadline(&self) -> Option<Instant> {
        self.links.values().filter_map(|(link, _)| link.deadline()).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Gateway {
        session_id: SessionId,
        links: Links,
        now: Instant,
    }

    impl Gateway {
        fn new() -> Self {
            let session_id = SessionId::generate();
            Self { links: Links::new(session_id.clone()), session_id, now: Instant::now() }
        }

        fn packet(&self, generation: u64, seq: u64) -> Packet {
            let frame = Frame::Text { text: format!("{generation}.{seq}") };
            Packet {
                version: 1,
                session_id: self.session_id.clone(),
                generation,
                from: Side::Client,
                instance_id: None,
                kind: PacketKind::Data { seq, frame },
            }
        }

        fn receive(&mut self, generation: u64, seq: u64) -> usize {
            let packet = self.packet(generation, seq);
            self.links.receive(self.now, packet).len()
        }
    }

    #[test]
    fn frames_come_once_and_in_order_for_every_generation() {
        let mut gateway = Gateway::new();
        assert_eq!(gateway.receive(1, 1), 0);
        assert_eq!(gateway.receive(1, 0), 2);
        assert_eq!(gateway.receive(1, 0), 0);
        assert_eq!(gateway.receive(2, 0), 1);
        let packets = gateway.links.take_packets(gateway.now);
        assert_eq!(packets.len(), 2, "both are acknowledged");
    }

    #[test]
    fn only_a_few_generations_are_kept_and_old_ones_do_not_begin_again() {
        let mut gateway = Gateway::new();
        for generation in 1..=10 {
            assert_eq!(gateway.receive(generation, 0), 1);
        }
        assert_eq!(gateway.links.links.len(), MAX_LINKS);
        assert_eq!(gateway.receive(3, 0), 0);
        assert_eq!(gateway.links.send(3, Frame::Closed), Ok(()));
        assert_eq!(gateway.receive(10, 1), 1);
    }

    #[test]
    fn foreign_and_late_packets_open_nothing() {
        let mut gateway = Gateway::new();
        let mut packet = gateway.packet(1, 0);
        packet.session_id = SessionId::generate();
        assert!(gateway.links.receive(gateway.now, packet).is_empty());
        let mut packet = gateway.packet(1, 0);
        packet.from = Side::Instance;
        assert!(gateway.links.receive(gateway.now, packet).is_empty());
        let mut packet = gateway.packet(1, 0);
        packet.kind = PacketKind::Ack { next: 4 };
        assert!(gateway.links.receive(gateway.now, packet).is_empty());
        assert!(gateway.links.links.is_empty());
    }

    #[test]
    fn frames_for_a_gateway_that_is_gone_are_given_up() {
        let mut gateway = Gateway::new();
        gateway.receive(1, 0);
        gateway.links.send(1, Frame::Closed).expect("little waits");
        while let Some(deadline) = gateway.links.deadline().or_else(|| {
            let packets = gateway.links.take_packets(gateway.now);
            (!packets.is_empty()).then_some(gateway.now)
        }) {
            gateway.now = gateway.now.max(deadline) + Duration::from_millis(1);
            gateway.links.take_packets(gateway.now);
            if gateway.links.links.is_empty() {
                break;
            }
        }
        assert!(gateway.links.links.is_empty());
        assert_eq!(gateway.receive(1, 0), 0, "it does not begin again");
    }
}
