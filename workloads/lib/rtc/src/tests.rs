//! The peer against a client made of plain `str0m`, in simulated time over a simulated network.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use str0m::change::{SdpAnswer, SdpOffer};
use str0m::channel::{ChannelConfig, ChannelId};
use str0m::media::{Direction, KeyframeRequestKind, MediaData, MediaKind as StrMediaKind, MediaTime, Mid};
use str0m::net::{Protocol, Receive};
use str0m::rtp::{Extension, ExtensionMap};
use str0m::{Event as StrEvent, Input, Rtc, RtcConfig};

use crate::*;

const PEER: &str = "192.0.2.1:4000";
const CLIENT: &str = "198.51.100.7:5000";

fn address(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

/// One direction of the network.
struct Path {
    delay: Duration,
    /// Bits per second, with a drop-tail queue of `queue`.
    rate: Option<u64>,
    queue: Duration,
    /// Drops the packets for which it says so; given the number of the packet.
    lose: Box<dyn FnMut(u64) -> bool>,
    /// Every so often nothing arrives for so long, then everything at once: a machine that is busy.
    stall: Option<(Duration, Duration)>,
    start: Instant,
    lost: u64,
    busy_until: Instant,
    count: u64,
    bytes: u64,
    flying: VecDeque<(Instant, Vec<u8>)>,
}

impl Path {
    fn new(now: Instant) -> Path {
        Path {
            delay: ms(10),
            rate: None,
            queue: ms(150),
            lose: Box::new(|_| false),
            stall: None,
            start: now,
            lost: 0,
            busy_until: now,
            count: 0,
            bytes: 0,
            flying: VecDeque::new(),
        }
    }

    fn send(&mut self, now: Instant, data: Vec<u8>) {
        self.count += 1;
        self.bytes += data.len() as u64;
        if (self.lose)(self.count) {
            return;
        }
        let mut leaves = now;
        if let Some(rate) = self.rate {
            let start = self.busy_until.max(now);
            if start - now > self.queue {
                self.lost += 1;
                return;
            }
            leaves = start + Duration::from_secs_f64(data.len() as f64 * 8.0 / rate as f64);
            self.busy_until = leaves;
        }
        let mut arrives = leaves + self.delay;
        if let Some((every, length)) = self.stall {
            let phase = Duration::from_nanos(((arrives - self.start).as_nanos() % every.as_nanos()) as u64);
            arrives += length.saturating_sub(phase);
        }
        self.flying.push_back((arrives, data));
    }

    fn next(&self) -> Option<Instant> {
        self.flying.front().map(|(at, _)| *at)
    }

    fn arrived(&mut self, now: Instant) -> Option<Vec<u8>> {
        self.flying.pop_front_if(|(at, _)| *at <= now).map(|(_, data)| data)
    }
}

/// The peer, a client, and what lies between them.
struct World {
    now: Instant,
    peer: Peer,
    peer_wakes: Instant,
    peer_timeouts: u64,
    client: Rtc,
    client_wakes: Instant,
    down: Path,
    up: Path,
    /// Nothing passes in either direction.
    cut: bool,
    events: Vec<Event>,
    client_events: Vec<StrEvent>,
    media: Vec<MediaData>,
}

fn client_config() -> RtcConfig {
    let mut extensions = ExtensionMap::standard();
    extensions.set(6, Extension::PlayoutDelay);
    RtcConfig::new().set_extension_map(extensions).set_reordering_size_video(200)
}

impl World {
    fn new(config: PeerConfig, client: RtcConfig) -> World {
        let now = Instant::now();
        let peer = Peer::new(PeerConfig { local: vec![address(PEER)], ..config }, now).expect("a peer");
        let mut client = client.build(now);
        client.add_local_candidate(
            str0m::Candidate::host(address(CLIENT), Protocol::Udp).expect("a candidate"),
        );
        World {
            now,
            peer,
            peer_wakes: now,
            peer_timeouts: 0,
            client,
            client_wakes: now,
            down: Path::new(now),
            up: Path::new(now),
            cut: false,
            events: Vec::new(),
            client_events: Vec::new(),
            media: Vec::new(),
        }
    }

    /// A world whose peer offered, with everything connected and the channels open.
    fn connected(config: PeerConfig, labels: &[&str]) -> World {
        let mut world = World::new(config, client_config());
        let offer = world.peer.offer().expect("an offer");
        let answer = world.answer(&offer);
        world.peer.answer(&answer).expect("applies the answer");
        for label in labels {
            world.open(label);
        }
        assert!(world.run_until(ms(5000), |world| world.saw(&Event::Connected)), "connects");
        let open = |world: &World, label: &str| world.saw(&Event::ChannelOpen { label: label.into() });
        assert!(world.run_until(ms(5000), |world| labels.iter().all(|label| open(world, label))), "opens");
        world
    }

    fn answer(&mut self, offer: &str) -> String {
        let offer = SdpOffer::from_sdp_string(offer).expect("parses our offer");
        self.client.sdp_api().accept_offer(offer).expect("accepts our offer").to_sdp_string()
    }

    fn open(&mut self, label: &str) -> ChannelId {
        let mut api = self.client.sdp_api();
        let id =
            api.add_channel_with_config(ChannelConfig { label: label.into(), ..ChannelConfig::default() });
        assert!(api.apply().is_none(), "a further channel needs no negotiation");
        self.client_wakes = self.now;
        id
    }

    fn saw(&self, event: &Event) -> bool {
        self.events.contains(event)
    }

    fn drain(&mut self) {
        loop {
            match self.peer.poll() {
                Output::Transmit { destination, source, data } => {
                    assert_eq!((source, destination), (address(PEER), address(CLIENT)));
                    if !self.cut {
                        self.down.send(self.now, data);
                    }
                }
                Output::Event(event) => self.events.push(event),
                Output::Timeout(at) => {
                    self.peer_wakes = at;
                    break;
                }
            }
        }
        while self.client.is_alive() {
            match self.client.poll_output().expect("the client goes on") {
                str0m::Output::Transmit(transmit) => {
                    if !self.cut {
                        self.up.send(self.now, transmit.contents.into());
                    }
                }
                str0m::Output::Event(StrEvent::MediaData(data)) => self.media.push(data),
                str0m::Output::Event(event) => self.client_events.push(event),
                str0m::Output::Timeout(at) => {
                    self.client_wakes = at;
                    break;
                }
            }
        }
    }

    /// Lets everything happen up to `until`.
    fn run_to(&mut self, until: Instant) {
        loop {
            self.drain();
            let times = [Some(self.peer_wakes), Some(self.client_wakes), self.down.next(), self.up.next()];
            let next = times.into_iter().flatten().min().expect("two of them are there").max(self.now);
            if next > until {
                self.now = until;
                return;
            }
            // The smallest step keeps a timer that fires at once from standing still.
            self.now = next.max(self.now + Duration::from_micros(1)).min(until.max(next));
            if self.peer_wakes <= self.now {
                self.peer_timeouts += 1;
                self.peer.handle_timeout(self.now);
            }
            self.drain();
            if self.client_wakes <= self.now {
                self.client.handle_input(Input::Timeout(self.now)).expect("takes the time");
            }
            self.drain();
            while let Some(data) = self.down.arrived(self.now) {
                let receive =
                    Receive::new(Protocol::Udp, address(PEER), address(CLIENT), &data).expect("a datagram");
                self.client.handle_input(Input::Receive(self.now, receive)).expect("takes a datagram");
                self.drain();
            }
            while let Some(data) = self.up.arrived(self.now) {
                self.peer.handle_datagram(self.now, address(CLIENT), address(PEER), &data);
                self.drain();
            }
        }
    }

    fn run(&mut self, time: Duration) {
        self.run_to(self.now + time);
    }

    fn run_until(&mut self, within: Duration, mut done: impl FnMut(&World) -> bool) -> bool {
        let end = self.now + within;
        while self.now < end {
            if done(self) {
                return true;
            }
            self.run(ms(1));
        }
        done(self)
    }

    /// Sends `frames` pictures of `bytes` at 60 Hz.
    fn stream(&mut self, frames: usize, bytes: usize) {
        for _ in 0..frames {
            self.peer.write_video(self.now, self.now, &picture(bytes, self.media.is_empty()), false);
            self.run(Duration::from_micros(16_667));
        }
    }

    fn sent_bps(&self, since: (Instant, u64)) -> f64 {
        (self.down.bytes - since.1) as f64 * 8.0 / (self.now - since.0).as_secs_f64()
    }
}

/// A byte stream that packetises like a picture: parameters and a slice without emulated start codes.
fn picture(bytes: usize, key: bool) -> Vec<u8> {
    let mut unit = Vec::new();
    if key {
        unit.extend_from_slice(&[
            0, 0, 0, 1, 0x67, 0x42, 0xc0, 0x1f, 0x8c, 0, 0, 0, 1, 0x68, 0xce, 0x3c, 0x80,
        ]);
    }
    unit.extend_from_slice(&[0, 0, 0, 1, if key { 0x65 } else { 0x41 }]);
    unit.extend((0..bytes).map(|index| (index % 250 + 1) as u8));
    unit
}

fn video_only() -> PeerConfig {
    PeerConfig { speaker: false, ..PeerConfig::default() }
}

fn everything() -> PeerConfig {
    PeerConfig { microphone: true, camera: true, channels: vec!["files".into()], ..PeerConfig::default() }
}

#[test]
fn the_offer_is_what_clients_need() {
    let mut world = World::new(everything(), client_config());
    let offer = world.peer.offer().expect("an offer");
    let sections: Vec<&str> = offer.split("\nm=").skip(1).collect();
    let kinds: Vec<&str> = sections.iter().map(|section| section.split(' ').next().unwrap_or("")).collect();
    assert_eq!(kinds, ["audio", "video", "video", "application"], "{offer}");
    for (index, line) in [
        (0, "a=sendrecv"),
        (0, "a=msid:fanlight-audio "),
        (0, "a=rtpmap:111 opus/48000/2"),
        (1, "a=recvonly"),
        (2, "a=sendonly"),
        (2, "a=msid:fanlight-video "),
        (2, "a=rtpmap:102 H264/90000"),
        (2, "a=rtcp-fb:102 transport-cc"),
        (2, "a=rtcp-fb:102 nack\r"),
        (2, "a=rtcp-fb:102 nack pli"),
        (2, "a=rtcp-fb:102 ccm fir"),
        (2, "a=rtpmap:103 rtx/90000"),
        (2, "a=fmtp:103 apt=102"),
        (2, "a=ssrc-group:FID "),
        (2, "http://www.webrtc.org/experiments/rtp-hdrext/playout-delay"),
        (2, "http://www.ietf.org/id/draft-holmer-rmcat-transport-wide-cc-extensions-01"),
        (3, "webrtc-datachannel"),
        (3, "a=max-message-size:262144"),
    ] {
        assert!(sections[index].contains(line), "section {index} lacks {line}: {offer}");
    }
    for section in &sections {
        assert!(section.contains("a=setup:actpass"), "{offer}");
    }
    let fmtp = |pt: &str| {
        let prefix = format!("a=fmtp:{pt} ");
        let line = offer.lines().find_map(|line| line.strip_prefix(&prefix)).expect("parameters");
        let mut words: Vec<&str> = line.trim().split(';').collect();
        words.sort_unstable();
        words.join(";")
    };
    assert_eq!(fmtp("111"), "minptime=10;sprop-stereo=1;stereo=1;useinbandfec=1");
    assert_eq!(fmtp("102"), "level-asymmetry-allowed=1;packetization-mode=1;profile-level-id=42e01f");
    assert!(offer.contains("a=group:BUNDLE"), "{offer}");
    assert!(!offer.contains("a=ice-lite"), "{offer}");
    let candidates = world.peer.local_candidates();
    assert_eq!(candidates.len(), 1);
    assert!(candidates[0].candidate.starts_with("candidate:"), "{candidates:?}");
    assert!(candidates[0].candidate.contains("192.0.2.1 4000 typ host"), "{candidates:?}");
    assert_eq!((candidates[0].index, candidates[0].mid.is_empty()), (0, false));
}

#[test]
fn sections_follow_the_settings() {
    for (config, kinds) in [
        (PeerConfig { speaker: false, video: false, ..PeerConfig::default() }, vec!["application"]),
        (PeerConfig { video: false, ..PeerConfig::default() }, vec!["audio", "application"]),
        (video_only(), vec!["video", "application"]),
        (
            PeerConfig { camera: true, ..PeerConfig::default() },
            vec!["audio", "video", "video", "application"],
        ),
    ] {
        let mut world = World::new(config.clone(), client_config());
        let offer = world.peer.offer().expect("an offer");
        let found: Vec<&str> =
            offer.lines().filter_map(|line| line.strip_prefix("m=")?.split(' ').next()).collect();
        assert_eq!(found, kinds, "{config:?}");
        let answer = world.answer(&offer);
        world.peer.answer(&answer).expect("applies the answer");
        assert!(world.run_until(ms(5000), |world| world.saw(&Event::Connected)), "{config:?}");
    }
}

#[test]
fn media_arrives_unchanged_and_asks_for_no_play_out_delay() {
    let mut world = World::connected(PeerConfig::default(), &[]);
    assert!(world.saw(&Event::Codec(VideoCodec::H264)));
    let sent = picture(20_000, true);
    let start = world.now;
    world.peer.write_video(world.now, start, &sent, true);
    world.peer.write_audio(world.now, start, &[0xfc, 1, 2, 3]);
    world.run(ms(200));
    world.peer.write_video(world.now, start + ms(40), &picture(500, false), false);
    world.run(ms(200));
    let (video, audio): (Vec<_>, Vec<_>) =
        world.media.iter().partition(|data| data.params.spec().codec.is_video());
    assert_eq!((video.len(), audio.len()), (2, 1));
    assert_eq!(&*video[0].data, sent);
    assert_eq!(&*audio[0].data, [0xfc, 1, 2, 3]);
    assert_eq!(video[1].time.numer() - video[0].time.numer(), 3600, "RTP time is capture time");
    for data in video {
        assert_eq!(data.ext_vals.play_delay_min, Some(MediaTime::ZERO));
        assert_eq!(data.ext_vals.play_delay_max, Some(MediaTime::ZERO));
    }
}

#[test]
fn pictures_with_the_same_capture_time_stay_apart() {
    let mut world = World::connected(video_only(), &[]);
    let start = world.now;
    for _ in 0..3 {
        world.peer.write_video(world.now, start, &picture(500, true), true);
        world.run(ms(20));
    }
    world.run(ms(100));
    assert_eq!(world.media.len(), 3);
}

#[test]
fn a_client_that_lost_a_picture_gets_its_request_through() {
    for kind in [KeyframeRequestKind::Pli, KeyframeRequestKind::Fir] {
        let mut world = World::connected(video_only(), &[]);
        world.stream(10, 1000);
        let mid = world.media[0].mid;
        world.client.writer(mid).expect("a section").request_keyframe(None, kind).expect("asks");
        world.client_wakes = world.now;
        assert!(world.run_until(ms(500), |world| world.saw(&Event::KeyframeRequested)), "{kind:?}");
        world.run(ms(3500));
        let stats = world.peer.stats();
        assert_eq!(stats.plis + stats.firs, 1, "{stats:?}");
        assert!(stats.video_acknowledged, "{stats:?}");
    }
}

#[test]
fn the_timer_of_an_idle_browser_makes_no_key_frame_unless_something_was_lost() {
    for lost in [false, true] {
        let mut world = World::connected(video_only(), &[]);
        world.stream(60, 1000);
        world.down.lose = Box::new(move |_| lost);
        world.stream(1, 1000);
        world.run(ms(1500));
        world.down.lose = Box::new(|_| false);
        world.run(ms(1500));
        let mid = world.media[0].mid;
        let kind = KeyframeRequestKind::Pli;
        world.client.writer(mid).expect("a section").request_keyframe(None, kind).expect("asks");
        world.client_wakes = world.now;
        world.run(ms(3000));
        assert_eq!(world.saw(&Event::KeyframeRequested), lost);
        assert_eq!(world.peer.stats().requests_ignored, u64::from(!lost));
    }
}

#[test]
fn channels_carry_text_and_binary_both_ways() {
    let mut world = World::connected(everything(), &[]);
    let control = world.open("control");
    let files = world.open("files");
    let opened = |world: &World| {
        world.client_events.iter().filter(|event| matches!(event, StrEvent::ChannelOpen(..))).count()
    };
    assert!(world.run_until(ms(3000), |world| opened(world) == 2));
    let large: Vec<u8> = (0..200_000).map(|index| (index % 251) as u8).collect();
    for (id, binary, data) in [(control, false, &b"{\"type\":\"x\"}"[..]), (files, true, &large[..])] {
        let mut channel = world.client.channel(id).expect("is open");
        assert!(channel.write(binary, &data[..data.len().min(100_000)]).expect("writes"));
        world.client_wakes = world.now;
        let label = if binary { "files" } else { "control" };
        let expected =
            Event::Channel { label: label.into(), binary, data: data[..data.len().min(100_000)].to_vec() };
        assert!(world.run_until(ms(5000), |world| world.saw(&expected)), "{label}");
    }
    world.peer.send_control("{\"type\":\"hello\"}").expect("sends");
    world.peer.send_channel("files", &large, true).expect("sends");
    let got = |world: &World, id: ChannelId, bytes: usize, binary: bool| {
        world.client_events.iter().any(|event| {
            matches!(event, StrEvent::ChannelData(data)
                if data.id == id && data.data.len() == bytes && data.binary == binary)
        })
    };
    assert!(
        world.run_until(ms(5000), |world| got(world, control, 16, false) && got(world, files, 200_000, true))
    );
}

#[test]
fn messages_that_cannot_travel_are_refused() {
    let mut world = World::connected(everything(), &["control"]);
    let error = world.peer.send_channel("files", b"x", false).expect_err("not open");
    assert!(matches!(error, PeerError::ChannelNotOpen { .. }), "{error}");
    let error =
        world.peer.send_channel("control", &vec![1; MAX_MESSAGE_BYTES + 1], true).expect_err("too large");
    assert!(matches!(error, PeerError::MessageTooLarge { .. }), "{error}");
    // A client that takes nothing fills the buffer, which is bounded.
    world.cut = true;
    let mut taken = 0;
    let error = loop {
        match world.peer.send_channel("control", &vec![1; MAX_MESSAGE_BYTES], true) {
            Ok(()) => taken += 1,
            Err(error) => break error,
        }
        assert!(taken < 100, "the buffer has an end");
    };
    assert!(matches!(error, PeerError::ChannelFull { .. }), "{error}");
}

#[test]
fn channels_that_nobody_announced_are_closed() {
    let mut world = World::connected(everything(), &["control"]);
    let stranger = world.open("stranger");
    let second = world.open("control");
    let closed = |world: &World, id: ChannelId| {
        world
            .client_events
            .iter()
            .any(|event| matches!(event, StrEvent::ChannelClose(closed) if *closed == id))
    };
    assert!(world.run_until(ms(3000), |world| closed(world, stranger) && closed(world, second)));
    assert!(!world.saw(&Event::ChannelOpen { label: "stranger".into() }));
    assert_eq!(world.peer.stats().channels_refused, 2);
    world.peer.send_control("still open").expect("sends");
}

#[test]
fn lost_packets_are_repeated() {
    let mut world = World::connected(video_only(), &[]);
    world.stream(30, 8000);
    // Bursts of two in twenty-five: eight percent.
    world.down.lose = Box::new(|count| count % 25 < 2);
    let before = world.media.len();
    world.stream(300, 8000);
    world.down.lose = Box::new(|_| false);
    world.run(ms(1500));
    let got = world.media.len() - before;
    assert!(got >= 298, "{got} of 300 pictures");
    assert!(world.media.iter().all(|data| data.contiguous), "no gap was left");
    let stats = world.peer.stats();
    assert!(stats.nacks > 0 && stats.retransmitted_packets > 50, "{stats:?}");
}

#[test]
fn the_estimate_follows_a_bottleneck_down_and_up() {
    let mut world = World::connected(video_only(), &[]);
    let drive = |world: &mut World, seconds: u64| {
        for _ in 0..seconds * 60 {
            // What an encoder does that takes most of the estimate.
            let bytes = world.peer.stats().estimate_bps.min(6_000_000) * 85 / 100 / 8 / 60;
            world.peer.write_video(world.now, world.now, &picture(bytes as usize, false), false);
            world.run(Duration::from_micros(16_667));
        }
        world.peer.stats().estimate_bps
    };
    let free = drive(&mut world, 10);
    assert!(free > 4_500_000, "a free path is found: {free}");
    world.down.rate = Some(2_000_000);
    drive(&mut world, 10);
    let narrow = drive(&mut world, 5);
    assert!((900_000..2_600_000).contains(&narrow), "2 Mbit/s are seen as {narrow}");
    world.down.rate = None;
    let wide = drive(&mut world, 30);
    assert!(wide > 3_500_000, "the path is free again, seen as {wide}");
}

/// Streams for `seconds` what an encoder makes that takes 0.85 of the estimate, from `least` to `most` bits per second.
fn follow(world: &mut World, seconds: u64, least: u64, most: u64) -> Vec<u64> {
    let mut estimates = Vec::new();
    for _ in 0..seconds {
        for _ in 0..60 {
            let bytes = (world.peer.stats().estimate_bps * 85 / 100).clamp(least, most) / 8 / 60;
            world.peer.write_video(world.now, world.now, &picture(bytes as usize, false), false);
            world.run(Duration::from_micros(16_667));
        }
        estimates.push(world.peer.stats().estimate_bps);
    }
    estimates
}

#[test]
fn a_busy_machine_on_the_way_does_not_starve_the_picture() {
    let mut world = World::connected(PeerConfig { min_bitrate_bps: 2_500_000, ..video_only() }, &[]);
    // Simple content: what is sent never comes near the estimate, the case in which a collapse would feed itself.
    world.down.stall = Some((ms(310), ms(60)));
    let estimates = follow(&mut world, 60, 0, 600_000);
    let low = estimates[10..].iter().filter(|estimate| **estimate < 600_000).count();
    assert!(low <= 10, "{low} of 50 seconds below what the content needs: {estimates:?}");
}

#[test]
fn a_path_below_the_floor_is_respected() {
    let mut world = World::connected(PeerConfig { min_bitrate_bps: 2_500_000, ..video_only() }, &[]);
    world.down.rate = Some(800_000);
    follow(&mut world, 20, 100_000, 6_000_000);
    let before = (world.down.lost, world.down.count);
    let estimates = follow(&mut world, 60, 100_000, 6_000_000);
    let lost = (world.down.lost - before.0) as f64 / (world.down.count - before.1) as f64;
    assert!(lost < 0.15, "{lost:.3} of the packets did not fit: {estimates:?}");
    let high = estimates.iter().filter(|estimate| **estimate > 1_500_000).count();
    assert!(high <= 10, "{high} of 60 seconds far above the path: {estimates:?}");
}

#[test]
fn a_still_screen_costs_next_to_nothing() {
    let mut world = World::connected(PeerConfig::default(), &["control"]);
    world.stream(120, 8000);
    world.run(ms(4000));
    let since = (world.now, world.down.bytes);
    let wakes = world.peer_timeouts;
    world.run(ms(30_000));
    let rate = world.sent_bps(since);
    let wakes = (world.peer_timeouts - wakes) as f64 / 30.0;
    assert!(rate < 8_000.0, "{rate:.0} bit/s while nothing moves");
    assert!(wakes < 20.0, "{wakes} wake-ups per second");
    // And it wakes up.
    let before = world.media.len();
    world.stream(60, 8000);
    world.run(ms(300));
    assert_eq!(world.media.len() - before, 60);
}

#[test]
fn single_updates_of_a_still_screen_cause_no_probes() {
    let mut world = World::connected(video_only(), &[]);
    world.stream(120, 8000);
    world.run(ms(3000));
    let since = (world.now, world.down.bytes);
    for _ in 0..10 {
        world.stream(1, 800);
        world.run(ms(2900));
    }
    // A second of padding at 50 kbit/s and its headers after each update, and nothing like a probe at megabits.
    let rate = world.sent_bps(since);
    assert!(rate < 50_000.0, "{rate:.0} bit/s");
}

#[test]
fn a_closed_peer_is_noticed_at_once() {
    let mut world = World::connected(PeerConfig::default(), &["control"]);
    world.stream(10, 1000);
    world.peer.close(world.now);
    let closed = |world: &World| world.client_events.iter().any(|event| matches!(event, StrEvent::Closed));
    assert!(world.run_until(ms(100), closed), "the client knows after one path delay");
    assert!(world.peer.is_ended());
    assert!(!world.events.iter().any(|e| matches!(e, Event::Failed { .. } | Event::Disconnected)));
    assert!(matches!(world.peer.send_control("late"), Err(PeerError::ChannelNotOpen { .. })));
    world.peer.write_video(world.now, world.now, &picture(100, true), true);
    assert!(matches!(world.peer.poll(), Output::Timeout(_)), "nothing follows");
}

#[test]
fn the_goodbye_survives_the_loss_of_its_first_copy() {
    let mut world = World::connected(PeerConfig::default(), &["control"]);
    world.run(ms(500));
    let before = world.down.count;
    // One copy is the abort and the DTLS goodbye.
    world.down.lose = Box::new(move |count| count <= before + 2);
    world.peer.close(world.now);
    world.drain();
    let sent = world.down.count - before;
    let closed = |world: &World| world.client_events.iter().any(|event| matches!(event, StrEvent::Closed));
    assert!(world.run_until(ms(100), closed), "{sent} datagrams were sent");
}

#[test]
fn a_client_that_leaves_is_noticed_at_once() {
    let mut world = World::connected(PeerConfig::default(), &["control"]);
    world.client.close().expect("closes");
    world.client_wakes = world.now;
    assert!(world.run_until(ms(200), |world| world.saw(&Event::Disconnected)));
    assert!(world.peer.is_ended());
}

#[test]
fn closing_before_anything_happened_is_harmless() {
    for step in 0..3 {
        let mut world = World::new(PeerConfig::default(), client_config());
        if step > 0 {
            let offer = world.peer.offer().expect("an offer");
            if step > 1 {
                let answer = world.answer(&offer);
                world.peer.answer(&answer).expect("applies");
                world.run(ms(15));
            }
        }
        world.peer.close(world.now);
        world.peer.close(world.now);
        assert!(world.peer.is_ended());
        while !matches!(world.peer.poll(), Output::Timeout(_)) {}
    }
}

#[test]
fn a_lost_client_may_return_and_is_given_up_in_the_end() {
    let mut world = World::connected(PeerConfig::default(), &[]);
    world.cut = true;
    assert!(world.run_until(ms(29_000), |world| world.saw(&Event::Ice(IceState::Disconnected))));
    assert!(!world.peer.is_connected());
    world.cut = false;
    assert!(world.run_until(ms(20_000), |world| world.peer.is_connected()), "returns");
    assert!(world.saw(&Event::KeyframeRequested), "pictures were dropped meanwhile");
    world.events.clear();
    world.cut = true;
    assert!(world.run_until(ms(90_000), |world| world.peer.is_ended()));
    assert!(world.events.iter().any(|event| matches!(event, Event::Failed { .. })), "{:?}", world.events);
}

#[test]
fn a_client_that_never_connects_is_given_up() {
    let mut world = World::new(PeerConfig::default(), client_config());
    let offer = world.peer.offer().expect("an offer");
    let answer = world.answer(&offer);
    world.cut = true;
    world.peer.answer(&answer).expect("applies");
    assert!(world.run_until(ms(31_000), |world| world.peer.is_ended()));
    assert!(world.events.iter().any(|event| matches!(event, Event::Failed { .. })), "{:?}", world.events);
}

/// A client that offers, as old ones do: sound and picture to receive, and what it sends itself.
fn client_offer(world: &mut World, camera: bool) -> (String, str0m::change::SdpPendingOffer, Mid) {
    let mut api = world.client.sdp_api();
    let direction = if camera { Direction::SendRecv } else { Direction::RecvOnly };
    let audio = api.add_media(StrMediaKind::Audio, direction, None, None, None);
    if camera {
        api.add_media(StrMediaKind::Video, Direction::SendOnly, None, None, None);
    }
    api.add_media(StrMediaKind::Video, Direction::RecvOnly, None, None, None);
    api.add_channel("control".into());
    let (offer, pending) = api.apply().expect("needs negotiation");
    (offer.to_sdp_string(), pending, audio)
}

#[test]
fn old_clients_offer_and_are_answered() {
    for camera in [false, true] {
        let config = PeerConfig { role: Role::Answerer, microphone: camera, camera, ..PeerConfig::default() };
        let mut world = World::new(config, client_config());
        assert!(matches!(world.peer.offer(), Err(PeerError::OutOfOrder { .. })));
        let (offer, pending, audio) = client_offer(&mut world, camera);
        let answer = world.peer.accept_offer(&offer).expect("answers");
        assert_eq!(world.peer.local_candidates().len(), 1);
        let answer = SdpAnswer::from_sdp_string(&answer).expect("parses");
        world.client.sdp_api().accept_answer(pending, answer).expect("accepts");
        assert!(
            world.run_until(ms(5000), |world| world.saw(&Event::ChannelOpen { label: "control".into() }))
        );
        assert!(world.saw(&Event::Codec(VideoCodec::H264)));
        world.stream(30, 5000);
        world.run(ms(100));
        assert_eq!(world.media.len(), 30, "camera {camera}");
        if camera {
            let writer = world.client.writer(audio).expect("a section");
            let pt = writer.payload_params().next().expect("a codec").pt();
            let now = world.now;
            world
                .client
                .writer(audio)
                .expect("a section")
                .write(pt, now, MediaTime::ZERO, vec![9, 9])
                .expect("sends");
            world.client_wakes = now;
            let heard = |world: &World| {
                world.events.iter().any(|e| matches!(e, Event::RemoteAudio { data, .. } if data == &[9, 9]))
            };
            assert!(world.run_until(ms(2000), heard), "the microphone is heard");
        }
    }
}

#[test]
fn a_client_without_our_codec_is_reported() {
    let config = PeerConfig { codecs: vec![VideoCodec::Av1], ..PeerConfig::default() };
    let client = client_config().clear_codecs().enable_opus(true, false).enable_h264(true);
    let mut world = World::new(config, client);
    let offer = world.peer.offer().expect("an offer");
    let answer = world.answer(&offer);
    world.peer.answer(&answer).expect("applies");
    world.run(ms(10));
    assert!(world.saw(&Event::NoCommonCodec { kind: MediaKind::Video }), "{:?}", world.events);
}

#[test]
fn codecs_are_offered_in_order_of_preference() {
    let config = PeerConfig {
        codecs: vec![VideoCodec::Av1, VideoCodec::H264, VideoCodec::Vp8],
        ..PeerConfig::default()
    };
    let mut world = World::new(config, client_config());
    let offer = world.peer.offer().expect("an offer");
    let line = offer.lines().find(|line| line.starts_with("m=video")).expect("a section");
    let types: Vec<&str> = line.trim().split(' ').skip(3).collect();
    assert_eq!(types, ["45", "46", "102", "103", "96", "97"]);
    let answer = world.answer(&offer);
    world.peer.answer(&answer).expect("applies");
    world.run(ms(10));
    assert!(world.saw(&Event::Codec(VideoCodec::Av1)), "{:?}", world.events);
}

#[test]
fn candidates_may_come_early_and_useless_ones_are_ignored() {
    let mut world = World::new(PeerConfig::default(), client_config());
    let offer = world.peer.offer().expect("an offer");
    for line in [
        "candidate:1 1 udp 2130706431 203.0.113.9 9 typ host",
        "a=candidate:2 1 UDP 2130706431 203.0.113.9 10 typ host generation 0 ufrag abcd network-cost 999",
        "candidate:3 1 udp 2113937151 0f0f0f0f-0000-4000-8000-000000000000.local 50000 typ host generation 0",
        "candidate:4 1 tcp 1518280447 203.0.113.9 9 typ host tcptype active",
        "",
        "  ",
    ] {
        world.peer.add_remote_candidate(line).unwrap_or_else(|error| panic!("{line}: {error}"));
    }
    for line in [
        "candidate:",
        "candidate:1 1 udp x 203.0.113.9 9 typ host",
        "nonsense",
        "candidate:1 1 udp 1 203.0.113.9 99999 typ host",
    ] {
        assert!(world.peer.add_remote_candidate(line).is_err(), "{line}");
    }
    let long = format!("candidate:1 1 udp 1 203.0.113.9 9 typ host {}", "x".repeat(2000));
    assert!(world.peer.add_remote_candidate(&long).is_err());
    let answer = world.answer(&offer);
    world.peer.answer(&answer).expect("applies");
    let line = "candidate:7 1 udp 2130706431 203.0.113.9 9 typ host";
    let error = (0..200).find_map(|_| world.peer.add_remote_candidate(line).err()).expect("there is a limit");
    assert!(matches!(error, PeerError::TooManyCandidates), "{error}");
}

#[test]
fn garbage_descriptions_are_refused() {
    let huge = "a".repeat(MAX_SDP_BYTES + 1);
    let mut good = World::new(PeerConfig::default(), client_config());
    let offer = good.peer.offer().expect("an offer");
    let answer = good.answer(&offer);
    let no_fingerprint = answer.replace("a=fingerprint", "a=nothing");
    let no_ice = answer.replace("a=ice-ufrag", "a=nothing");
    let fewer = answer.split("m=video").next().unwrap_or_default().to_owned();
    for sdp in
        ["", "\0\0", "v=0", "v=0\r\nm=audio", "not an answer at all", &huge, &no_fingerprint, &no_ice, &fewer]
    {
        let mut world = World::new(PeerConfig::default(), client_config());
        world.peer.offer().expect("an offer");
        let error = world.peer.answer(sdp).expect_err("refused");
        assert!(!error.to_string().is_empty());
        world.run(ms(50));
        let mut world =
            World::new(PeerConfig { role: Role::Answerer, ..PeerConfig::default() }, client_config());
        if sdp != fewer {
            world.peer.accept_offer(sdp).expect_err("refused");
        }
        world.run(ms(50));
    }
    // Every truncation and many mutations of a good answer: an error or not, but never a panic.
    let mut state = 12345u32;
    for round in 0..300 {
        let mut world = World::new(PeerConfig::default(), client_config());
        let offer = world.peer.offer().expect("an offer");
        let mut bytes = world.answer(&offer).into_bytes();
        for _ in 0..=round % 7 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let at = state as usize % bytes.len();
            match round % 3 {
                0 => bytes.truncate(at.max(1)),
                1 => bytes[at] = b'0' + (state >> 24) as u8 % 64,
                _ => drop(bytes.remove(at)),
            }
        }
        if let Ok(text) = String::from_utf8(bytes) {
            let _ = world.peer.answer(&text);
        }
        assert!(
            !world
                .events
                .iter()
                .any(|e| matches!(e, Event::Failed { reason } if reason.contains("internal")))
        );
    }
}

#[test]
fn garbage_datagrams_change_nothing() {
    let mut world = World::connected(PeerConfig::default(), &["control"]);
    let mut state = 99u32;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state
    };
    for round in 0..20_000u32 {
        let length = random() as usize % 1500;
        let mut data: Vec<u8> = (0..length).map(|_| random() as u8).collect();
        if let Some(first) = data.first_mut() {
            // A fair share for each of STUN, DTLS, and RTP with RTCP, told apart by the first byte (RFC 7983).
            *first = match round % 4 {
                0 => (random() % 4) as u8,
                1 => 20 + (random() % 44) as u8,
                2 => 128 + (random() % 64) as u8,
                _ => *first,
            };
        }
        let source = if round % 2 == 0 { address(CLIENT) } else { address("203.0.113.66:6") };
        world.peer.accepts(source, &data);
        world.peer.handle_datagram(world.now, source, address(PEER), &data);
        world.drain();
        assert!(world.peer.is_connected(), "round {round}: {:02x?}", &data[..data.len().min(32)]);
    }
    world.stream(60, 4000);
    world.run(ms(200));
    assert_eq!(world.media.len(), 60);
    world.peer.send_control("still there").expect("sends");
    assert!(world.peer.stats().datagrams_refused > 0);
}

#[test]
fn changed_datagrams_of_the_client_change_nothing() {
    let mut world = World::connected(PeerConfig::default(), &["control"]);
    let mut state = 7u32;
    for _ in 0..2000 {
        world.stream(1, 3000);
        // Besides the true ones, copies with one byte changed arrive.
        let copies: Vec<Vec<u8>> = world.up.flying.iter().map(|(_, data)| data.clone()).collect();
        for mut data in copies {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let at = state as usize % data.len();
            data[at] ^= (state >> 24) as u8 | 1;
            world.peer.handle_datagram(world.now, address(CLIENT), address(PEER), &data);
            world.drain();
        }
        assert!(!world.peer.is_ended(), "{:?}", world.events.last());
    }
    assert!(world.peer.is_connected());
}

#[test]
fn datagrams_are_told_apart_between_peers() {
    let mut first = World::connected(PeerConfig::default(), &[]);
    let second = World::connected(PeerConfig::default(), &[]);
    // The first client's connectivity checks carry its own user name.
    let until = first.now + ms(10_000);
    let stun = loop {
        first.run(ms(10));
        if let Some((_, data)) = first.up.flying.iter().find(|(_, data)| data[0] < 4 && data[1] == 1) {
            break data.clone();
        }
        assert!(first.now < until, "a connectivity check is sent");
    };
    let elsewhere = address("203.0.113.5:77");
    assert!(first.peer.accepts(elsewhere, &stun));
    assert!(!second.peer.accepts(elsewhere, &stun));
    assert!(!first.peer.accepts(elsewhere, b""));
}

#[test]
fn behind_a_port_forward_the_socket_has_another_address() {
    let mut world = World::new(PeerConfig::default(), client_config());
    let offer = world.peer.offer().expect("an offer");
    let answer = world.answer(&offer);
    world.peer.answer(&answer).expect("applies");
    let end = world.now + ms(3000);
    while world.now < end && !world.saw(&Event::Connected) {
        world.run(ms(1));
        let copies: Vec<_> = world.up.flying.drain(..).collect();
        for (_, data) in copies {
            world.peer.handle_datagram(world.now, address(CLIENT), address("10.1.2.3:4000"), &data);
            world.drain();
        }
    }
    assert!(world.saw(&Event::Connected));
}

#[test]
fn addresses_that_cannot_be_announced_are_named() {
    let now = Instant::now();
    let error = Peer::new(PeerConfig::default(), now).expect_err("none");
    assert!(matches!(error, PeerError::NoAddress), "{error}");
    for text in ["0.0.0.0:1", "[::]:1", "224.0.0.1:1"] {
        let config = PeerConfig { local: vec![address(text)], ..PeerConfig::default() };
        let error = Peer::new(config, now).expect_err("refused");
        assert!(error.to_string().contains(text), "{error}");
    }
}

#[test]
fn a_second_description_is_refused() {
    let mut world = World::connected(PeerConfig::default(), &[]);
    assert!(matches!(world.peer.offer(), Err(PeerError::OutOfOrder { .. })));
    assert!(matches!(world.peer.answer("v=0"), Err(PeerError::OutOfOrder { .. })));
    assert!(matches!(world.peer.accept_offer("v=0"), Err(PeerError::OutOfOrder { .. })));
}

#[test]
fn codec_names_are_read_in_any_case() {
    for (name, codec) in [
        ("h264", Some(VideoCodec::H264)),
        ("AV1", Some(VideoCodec::Av1)),
        ("Vp8", Some(VideoCodec::Vp8)),
        ("VP9", None),
        ("", None),
    ] {
        assert_eq!(VideoCodec::from_name(name), codec, "{name}");
    }
}

#[test]
fn bitrates_can_be_wished_at_any_time() {
    let mut world = World::connected(video_only(), &[]);
    for bps in [0, 1, 50_000_000, u64::MAX / 16] {
        world.peer.set_desired_bitrate(bps);
        world.stream(10, 1000);
    }
    assert_eq!(world.peer.backlog().packets, 0);
}
