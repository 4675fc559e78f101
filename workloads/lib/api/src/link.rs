//! The reliable link over which signalling frames travel between the gateway unit that holds a client's
//! socket and the streamer of its session.
//!
//! Between the two lie the bus and the agent, and both may lose, repeat, delay and reorder packets. A client of
//! the original never repeats a frame and hangs for minutes when one is lost (signaling section 10, F4 and F7).
//! So the two ends number their frames per (session, generation), acknowledge them, send them again until
//! acknowledged, and put them back in order. The agent forwards packets and knows nothing of this.
//!
//! [`Link`] is one end for one generation: a plain value, driven with the current time.
//!
//! 1. give it work with [`Link::send`] and [`Link::receive`];
//! 2. drain [`Link::poll_transmit`] and [`Link::poll_frame`];
//! 3. sleep until [`Link::deadline`], then drain again.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use crate::{
    InstanceId, SessionId,
    gateway::{ScreenPatch, StunServer},
};

/// Largest signalling frame, bytes (signaling section 2).
pub const MAX_FRAME_BYTES: usize = 256 * 1024;
/// Most frames of one client connection (signaling section 2).
pub const MAX_FRAMES: u64 = 1000;
/// Most bytes that wait for an acknowledgement at one end.
pub const MAX_WAITING_BYTES: usize = 2 * 1024 * 1024;
/// How far ahead of the next expected frame a packet may be.
const WINDOW: u64 = MAX_FRAMES + 8;
const FIRST_RETRY: Duration = Duration::from_millis(250);
const LAST_RETRY: Duration = Duration::from_secs(2);
/// So many retries in a row that were answered with less than was acknowledged before: the other end knows nothing of
/// that any more. A few late acknowledgements do not last so long.
const LOST_ROUNDS: u32 = 6;

/// Which end a packet comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// The gateway unit that holds the client's socket.
    Client,
    /// The streamer.
    Instance,
}

/// One packet on the bus or on a streamer's websocket.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Packet {
    /// [`crate::PROTOCOL_VERSION`].
    pub version: u32,
    /// Session.
    pub session_id: SessionId,
    /// Generation; 0 in a `Hello`.
    pub generation: u64,
    /// Sender.
    pub from: Side,
    /// Instance that the streamer runs in; its agent writes it.
    #[serde(default)]
    pub instance_id: Option<InstanceId>,
    /// What it is.
    pub kind: PacketKind,
}

/// What a packet is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum PacketKind {
    /// A numbered frame.
    Data {
        /// From 0, without gaps.
        seq: u64,
        /// Content.
        frame: Frame,
    },
    /// Everything below `next` was received.
    Ack {
        /// The number expected next.
        next: u64,
    },
    /// The streamer is (again) there: send at once what waits. Not acknowledged.
    Hello,
}

/// What travels in order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Frame {
    /// Client side, always number 0: a client's socket was opened.
    Open {
        /// Changes of the display asked for by the join.
        #[serde(default)]
        screen: Option<ScreenPatch>,
        /// ICE servers of the instance's side, if it needs any.
        #[serde(default)]
        stun_servers: Vec<StunServer>,
    },
    /// A text frame, unchanged.
    Text {
        /// The frame.
        text: String,
    },
    /// Client side: the client's socket is closed. Instance side: done with this client, close its socket.
    Closed,
}

impl Frame {
    fn size(&self) -> usize {
        match self {
            Self::Text { text } => text.len() + 64,
            Self::Open { .. } | Self::Closed => 64,
        }
    }
}

/// More was given to a link than it keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// A frame beyond [`MAX_FRAME_BYTES`].
    #[error("frame of {0} bytes is too large: at most {MAX_FRAME_BYTES} bytes are allowed")]
    FrameTooLarge(usize),
    /// Beyond [`MAX_FRAMES`].
    #[error("more than {MAX_FRAMES} frames on one connection")]
    TooManyFrames,
    /// Beyond [`MAX_WAITING_BYTES`].
    #[error("more than {MAX_WAITING_BYTES} bytes wait for the other side")]
    TooMuchWaiting,
}

/// One end of the link for one generation.
#[derive(Debug)]
pub struct Link {
    session_id: SessionId,
    generation: u64,
    side: Side,
    next_out: u64,
    waiting: VecDeque<(u64, Frame)>,
    waiting_bytes: usize,
    /// Frames below this number were sent since the last retry.
    sent_below: u64,
    retry_at: Option<Instant>,
    retry_after: Duration,
    next_in: u64,
    early: BTreeMap<u64, Frame>,
    early_bytes: usize,
    ready: VecDeque<Frame>,
    ack_due: bool,
    /// The instance at the other end: the one that was heard first, unless somebody knows.
    instance_id: Option<InstanceId>,
    known: bool,
    /// An acknowledgement came since the last retry, and it was of less than one before.
    behind: bool,
    lost_rounds: u32,
    broken: bool,
}

impl Link {
    /// A fresh end.
    pub fn new(session_id: SessionId, generation: u64, side: Side) -> Self {
        Self {
            session_id,
            generation,
            side,
            next_out: 0,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            sent_below: 0,
            retry_at: None,
            retry_after: FIRST_RETRY,
            next_in: 0,
            early: BTreeMap::new(),
            early_bytes: 0,
            ready: VecDeque::new(),
            ack_due: false,
            instance_id: None,
            known: false,
            behind: false,
            lost_rounds: 0,
            broken: false,
        }
    }

    /// Generation of this end.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Takes a frame to be delivered.
    ///
    /// # Errors
    /// The frame is too large, or too much waits already; nothing was taken.
    pub fn send(&mut self, frame: Frame) -> Result<(), LinkError> {
        let size = frame.size();
        if size > MAX_FRAME_BYTES + 64 {
            return Err(LinkError::FrameTooLarge(size - 64));
        }
        // `Open` and `Closed` are not counted: a full connection can still be closed.
        if matches!(frame, Frame::Text { .. }) {
            if self.next_out > MAX_FRAMES {
                return Err(LinkError::TooManyFrames);
            }
            if self.waiting_bytes + size > MAX_WAITING_BYTES {
                return Err(LinkError::TooMuchWaiting);
            }
        }
        self.waiting_bytes += size;
        self.waiting.push_back((self.next_out, frame));
        self.next_out += 1;
        Ok(())
    }

    /// Takes a packet of the other end. Packets of other sessions, generations or sides are ignored.
    pub fn receive(&mut self, packet: Packet) {
        if packet.session_id != self.session_id || packet.from == self.side {
            return;
        }
        if packet.instance_id.is_some() {
            let other = self.instance_id.is_some() && self.instance_id != packet.instance_id;
            if other && self.known {
                // What is left of an instance that the session went away from.
                return;
            }
            self.broken |= other;
            self.instance_id = self.instance_id.take().or(packet.instance_id);
        }
        if self.broken {
            return;
        }
        match packet.kind {
            PacketKind::Hello => {
                self.sent_below = self.waiting.front().map_or(self.next_out, |(seq, _)| *seq);
                self.retry_after = FIRST_RETRY;
            }
            _ if packet.generation != self.generation => {}
            PacketKind::Ack { next } => {
                self.behind |= self.waiting.front().is_some_and(|(seq, _)| next < *seq);
                while self.waiting.front().is_some_and(|(seq, _)| *seq < next) {
                    if let Some((_, frame)) = self.waiting.pop_front() {
                        self.waiting_bytes -= frame.size();
                    }
                    self.retry_after = FIRST_RETRY;
                    self.retry_at = None;
                    self.behind = false;
                    self.lost_rounds = 0;
                }
            }
            PacketKind::Data { seq, frame } => {
                self.ack_due = true;
                let size = frame.size();
                let fits = seq < self.next_in + WINDOW
                    && size <= MAX_FRAME_BYTES + 64
                    && self.early_bytes + size <= MAX_WAITING_BYTES;
                if seq >= self.next_in && fits && !self.early.contains_key(&seq) {
                    self.early_bytes += size;
                    self.early.insert(seq, frame);
                }
                while let Some(frame) = self.early.remove(&self.next_in) {
                    self.early_bytes -= frame.size();
                    self.ready.push_back(frame);
                    self.next_in += 1;
                }
            }
        }
    }

    /// The next frame from the other end, in order, each once.
    pub fn poll_frame(&mut self) -> Option<Frame> {
        self.ready.pop_front()
    }

    /// The next packet to send now.
    pub fn poll_transmit(&mut self, now: Instant) -> Option<Packet> {
        if self.ack_due {
            self.ack_due = false;
            return Some(self.packet(PacketKind::Ack { next: self.next_in }));
        }
        if self.retry_at.is_some_and(|at| at <= now) {
            self.lost_rounds = if std::mem::take(&mut self.behind) { self.lost_rounds + 1 } else { 0 };
            self.broken |= self.lost_rounds >= LOST_ROUNDS;
            self.sent_below = self.waiting.front().map_or(self.next_out, |(seq, _)| *seq);
            self.retry_after = (self.retry_after * 2).min(LAST_RETRY);
            self.retry_at = None;
        }
        let due = self.waiting.iter().find(|(seq, _)| *seq >= self.sent_below).cloned();
        match due {
            Some((seq, frame)) => {
                self.sent_below = seq + 1;
                self.retry_at.get_or_insert(now + self.retry_after);
                Some(self.packet(PacketKind::Data { seq, frame }))
            }
            None => {
                if self.waiting.is_empty() {
                    self.retry_at = None;
                } else {
                    self.retry_at.get_or_insert(now + self.retry_after);
                }
                None
            }
        }
    }

    /// When [`Link::poll_transmit`] has something again; `None` while nothing waits.
    pub fn deadline(&self) -> Option<Instant> {
        self.retry_at
    }

    /// Says which instance is at the other end. Another one is not listened to from now on.
    pub fn expect(&mut self, instance_id: &InstanceId) {
        self.broken |= self.instance_id.as_ref().is_some_and(|heard| heard != instance_id);
        if !self.broken && !self.known {
            self.instance_id = Some(instance_id.clone());
            self.known = true;
        }
    }

    /// Whether the other end is not the one of the beginning: another instance answers, as when a session went to
    /// another cluster, or the same one was started again. What was acknowledged before is not known there, so this
    /// link will not deliver any more.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Whether everything sent was acknowledged.
    pub fn is_settled(&self) -> bool {
        self.waiting.is_empty()
    }

    fn packet(&self, kind: PacketKind) -> Packet {
        Packet {
            version: crate::PROTOCOL_VERSION,
            session_id: self.session_id.clone(),
            generation: self.generation,
            from: self.side,
            instance_id: None,
            kind,
        }
    }
}

/// The packet that a streamer sends when it has (again) reached its agent.
pub fn hello(session_id: SessionId) -> Packet {
    Packet {
        version: crate::PROTOCOL_VERSION,
        session_id,
        generation: 0,
        from: Side::Instance,
        instance_id: None,
        kind: PacketKind::Hello,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Link, Link) {
        let session = SessionId::generate();
        (Link::new(session.clone(), 3, Side::Client), Link::new(session, 3, Side::Instance))
    }

    fn text(text: &str) -> Frame {
        Frame::Text { text: text.into() }
    }

    fn drain(link: &mut Link, now: Instant) -> Vec<Packet> {
        std::iter::from_fn(|| link.poll_transmit(now)).collect()
    }

    fn frames(link: &mut Link) -> Vec<Frame> {
        std::iter::from_fn(|| link.poll_frame()).collect()
    }

    #[test]
    fn frames_arrive_once_and_in_order_over_a_path_that_loses_repeats_and_reorders() {
        let (mut client, mut instance) = pair();
        let mut now = Instant::now();
        // A small generator is enough here: the seed makes each run the same.
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let sent: Vec<Frame> = (0..200).map(|n| text(&n.to_string())).collect();
        for frame in &sent {
            client.send(frame.clone()).expect("fits");
        }
        let mut got = Vec::new();
        for _ in 0..2000 {
            let mut packets = drain(&mut client, now);
            if packets.len() > 1 && random() % 2 == 0 {
                packets.reverse();
            }
            for packet in packets {
                let copies = random() % 3;
                for _ in 0..copies {
                    instance.receive(packet.clone());
                }
            }
            got.extend(frames(&mut instance));
            for packet in drain(&mut instance, now) {
                if random() % 2 == 0 {
                    client.receive(packet);
                }
            }
            if client.is_settled() {
                break;
            }
            now += Duration::from_millis(300);
        }
        assert_eq!(got, sent);
        assert!(client.is_settled());
        assert_eq!(client.deadline(), None);
    }

    #[test]
    fn frames_kept_for_an_absent_instance_go_at_once_when_it_says_hello() {
        let (mut client, mut instance) = pair();
        let now = Instant::now();
        client.send(text("discover")).expect("fits");
        assert_eq!(drain(&mut client, now).len(), 1, "sent once, nobody there");
        assert!(drain(&mut client, now).is_empty());
        client.receive(hello(client.session_id.clone()));
        let again = drain(&mut client, now);
        assert_eq!(again.len(), 1);
        instance.receive(again[0].clone());
        assert_eq!(frames(&mut instance), [text("discover")]);
    }

    #[test]
    fn a_link_whose_other_end_is_another_instance_is_broken() {
        let (mut client, mut instance) = pair();
        let now = Instant::now();
        let of = |instance: &str, packet: &Packet| Packet {
            instance_id: Some(instance.parse().expect("valid")),
            ..packet.clone()
        };
        client.receive(hello(client.session_id.clone()));
        client.send(text("settings")).expect("fits");
        instance.receive(drain(&mut client, now).remove(0));
        let acknowledged = drain(&mut instance, now).remove(0);
        client.receive(of("i1", &acknowledged));
        client.receive(of("i1", &hello(client.session_id.clone())));
        assert!(client.is_settled() && !client.is_broken());
        instance.send(text("offer")).expect("fits");
        client.receive(of("i2", &drain(&mut instance, now).remove(0)));
        assert!(client.is_broken());
        assert_eq!(frames(&mut client), []);
    }

    #[test]
    fn a_link_whose_other_end_was_started_again_is_broken_and_late_acknowledgements_break_nothing() {
        let (mut client, mut instance) = pair();
        let mut now = Instant::now();
        for _ in 0..20 {
            client.send(text("early")).expect("fits");
        }
        let mut late = Vec::new();
        for packet in drain(&mut client, now) {
            instance.receive(packet);
            late.extend(drain(&mut instance, now));
        }
        client.receive(late.pop().expect("the last one"));
        assert!(client.is_settled());
        client.send(text("settings")).expect("fits");
        for packet in late {
            client.receive(packet);
            drain(&mut client, now);
        }
        assert!(!client.is_broken());
        let mut again = Link::new(client.session_id.clone(), 3, Side::Instance);
        let mut rounds = 0;
        while !client.is_broken() {
            now = client.deadline().expect("it waits");
            for packet in drain(&mut client, now) {
                again.receive(packet);
            }
            for packet in drain(&mut again, now) {
                client.receive(packet);
            }
            rounds += 1;
            assert!(rounds < 10, "it goes on for ever");
        }
        assert!(rounds >= 5, "{rounds}");
    }

    #[test]
    fn a_link_that_knows_its_instance_listens_to_no_other() {
        let (mut client, mut instance) = pair();
        let now = Instant::now();
        let of = |instance: &str, packet: Packet| Packet {
            instance_id: Some(instance.parse().expect("valid")),
            ..packet
        };
        let (first, second) = ("i1".parse().expect("valid"), "i2".parse().expect("valid"));
        client.expect(&second);
        client.receive(of("i1", hello(client.session_id.clone())));
        instance.send(text("offer")).expect("fits");
        let offer = drain(&mut instance, now).remove(0);
        client.receive(of("i1", offer.clone()));
        assert!(!client.is_broken() && frames(&mut client).is_empty());
        client.receive(of("i2", offer));
        assert_eq!(frames(&mut client), [text("offer")]);
        client.expect(&second);
        assert!(!client.is_broken());
        client.expect(&first);
        assert!(client.is_broken(), "the session went on");
    }

    #[test]
    fn unanswered_frames_are_sent_again_with_growing_pauses() {
        let (mut client, _) = pair();
        let start = Instant::now();
        client.send(text("discover")).expect("fits");
        let mut now = start;
        let mut pauses = Vec::new();
        for _ in 0..6 {
            assert_eq!(drain(&mut client, now).len(), 1);
            let next = client.deadline().expect("a retry is planned");
            pauses.push((next - now).as_millis());
            now = next;
        }
        assert_eq!(pauses, [250, 500, 1000, 2000, 2000, 2000]);
    }

    #[test]
    fn too_much_is_refused_by_name_and_takes_nothing() {
        let (mut client, _) = pair();
        let large = "x".repeat(MAX_FRAME_BYTES + 1);
        assert_eq!(client.send(text(&large)), Err(LinkError::FrameTooLarge(large.len())));
        let big = "x".repeat(MAX_FRAME_BYTES);
        let mut taken = 0;
        while client.send(text(&big)).is_ok() {
            taken += 1;
        }
        assert_eq!(taken, 7, "2 MiB less overhead");
        let (mut client, _) = pair();
        let mut last = Ok(());
        for _ in 0..=MAX_FRAMES + 1 {
            last = client.send(text("x"));
        }
        assert_eq!(last, Err(LinkError::TooManyFrames));
        assert_eq!(client.send(Frame::Closed), Ok(()), "a full connection can still be closed");
    }

    #[test]
    fn packets_of_another_generation_session_or_of_its_own_side_are_ignored() {
        let (mut client, mut instance) = pair();
        instance.send(text("offer")).expect("fits");
        let packet = instance.poll_transmit(Instant::now()).expect("one");
        let mut other = packet.clone();
        other.generation = 2;
        client.receive(other);
        let mut other = packet.clone();
        other.session_id = SessionId::generate();
        client.receive(other);
        let mut other = packet.clone();
        other.from = Side::Client;
        client.receive(other);
        let mut other = packet.clone();
        other.kind = PacketKind::Data { seq: u64::MAX, frame: Frame::Closed };
        client.receive(other);
        assert!(frames(&mut client).is_empty());
        client.receive(packet);
        assert_eq!(frames(&mut client), [text("offer")]);
    }
}
