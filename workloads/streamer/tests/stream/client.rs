//! A client of plain `str0m` and libavcodec: answers (or offers), decodes what it sees, and sends input.

use std::{
    ffi::c_int,
    net::SocketAddr,
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use fanlight_api::link::Frame;
use ffmpeg_sys_next as ff;
use serde_json::json;
use str0m::{
    Candidate, Event, Input, Output, Rtc, RtcConfig,
    change::{SdpAnswer, SdpOffer},
    channel::{ChannelConfig, ChannelId},
    media::{Direction, MediaKind},
    net::{Protocol, Receive},
};
use tokio::net::UdpSocket;

use crate::agent::Agent;

/// One client.
pub struct Client {
    pub generation: u64,
    rtc: Rtc,
    socket: UdpSocket,
    address: SocketAddr,
    decoder: Decoder,
    /// Decoded pictures so far.
    pub pictures: u64,
    /// Luma of the newest one with its size.
    pub picture: Option<(usize, usize, Vec<u8>)>,
    /// Opus packets so far.
    pub sounds: u64,
    pub connected: bool,
    /// The instance ended the connection.
    pub ended: bool,
    pub control: Option<ChannelId>,
    pub fanlight: Option<ChannelId>,
    open: Vec<String>,
    /// Messages of our own channel.
    pub notices: Vec<serde_json::Value>,
}

impl Client {
    /// Goes through signalling of version 2 up to the answer.
    pub async fn join(agent: &mut Agent, generation: u64, screen: Option<(i64, i64)>) -> Self {
        let patch = screen.map(|(width, height)| fanlight_api::gateway::ScreenPatch {
            width: Some(width),
            height: Some(height),
            ..Default::default()
        });
        agent.open(generation, patch);
        agent.text(generation, &json!({"type": "discover"}));
        let discovered = agent.json(generation).await;
        assert_eq!(discovered["type"], "resp:discover");
        assert_eq!(discovered["max_api_version"], 2);
        agent.text(
            generation,
            &json!({"type": "settings", "api_version": 2, "data_channels": ["fanlight"],
                "enable_speaker": true, "enable_video": true, "enable_microphone": false, "enable_camera": false,
                "video": {"preferred_decoder_codecs": ["H264"]}}),
        );
        let mut client = Self::new(generation).await;
        let offer = agent.json(generation).await;
        assert_eq!(offer["type"], "offer", "{offer}");
        let sdp = text_of(&offer["sdp"]);
        let offer = SdpOffer::from_sdp_string(&sdp).expect("an offer");
        let answer = client.rtc.sdp_api().accept_offer(offer).expect("a usable offer").to_sdp_string();
        agent.text(generation, &json!({"type": "answer", "sdp": STANDARD.encode(answer)}));
        client.trickle(agent).await;
        client.open_channels();
        client
    }

    /// Goes through signalling of version 1, where the client offers.
    pub async fn offer(agent: &mut Agent, generation: u64) -> Self {
        let mut client = Self::new(generation).await;
        let mut api = client.rtc.sdp_api();
        api.add_media(MediaKind::Audio, Direction::RecvOnly, None, None, None);
        api.add_media(MediaKind::Video, Direction::RecvOnly, None, None, None);
        client.control = Some(
            api.add_channel_with_config(ChannelConfig { label: "control".into(), ..Default::default() }),
        );
        let (offer, pending) = api.apply().expect("something to offer");
        agent.open(generation, None);
        let sdp = STANDARD.encode(offer.to_sdp_string());
        agent.text(generation, &json!({"type": "offer", "sdp": sdp, "dataChannels": []}));
        let answer = agent.json(generation).await;
        assert_eq!(answer["type"], "answer", "{answer}");
        let answer = SdpAnswer::from_sdp_string(&text_of(&answer["sdp"])).expect("an answer");
        client.rtc.sdp_api().accept_answer(pending, answer).expect("a usable answer");
        client.trickle(agent).await;
        client
    }

    async fn new(generation: u64) -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").await.expect("a port");
        let address = socket.local_addr().expect("an address");
        let mut rtc = RtcConfig::new().build(Instant::now());
        rtc.add_local_candidate(Candidate::host(address, Protocol::Udp).expect("a candidate"));
        Self {
            generation,
            rtc,
            socket,
            address,
            decoder: Decoder::new(),
            pictures: 0,
            picture: None,
            sounds: 0,
            connected: false,
            ended: false,
            control: None,
            fanlight: None,
            open: Vec::new(),
            notices: Vec::new(),
        }
    }

    /// Exchanges candidates: ours go out, the instance's first one is taken.
    async fn trickle(&mut self, agent: &mut Agent) {
        let ours = Candidate::host(self.address, Protocol::Udp).expect("a candidate").to_sdp_string();
        agent.text(
            self.generation,
            &json!({"type": "candidate", "candidate": STANDARD.encode(ours), "sdpMid": "0", "sdpMLineIndex": 0}),
        );
        let theirs = agent.json(self.generation).await;
        assert_eq!(theirs["type"], "candidate", "{theirs}");
        let line = text_of(&theirs["candidate"]);
        self.rtc.add_remote_candidate(Candidate::from_sdp_string(&line).expect("a candidate"));
    }

    fn open_channels(&mut self) {
        let mut open = |label: &str| {
            let mut api = self.rtc.sdp_api();
            let id = api.add_channel_with_config(ChannelConfig { label: label.into(), ..Default::default() });
            assert!(api.apply().is_none(), "a further channel needs no negotiation");
            Some(id)
        };
        self.control = open("control");
        self.fanlight = open("fanlight");
    }

    /// Runs until `done`, at most `within`; tells whether it was reached.
    pub async fn run_until(&mut self, within: Duration, mut done: impl FnMut(&Self) -> bool) -> bool {
        let end = Instant::now() + within;
        let mut buffer = vec![0; 2048];
        loop {
            let wakes = self.drain().await;
            if done(self) {
                return true;
            }
            let now = Instant::now();
            if now >= end {
                return false;
            }
            let pause = wakes.min(end).saturating_duration_since(now).min(Duration::from_millis(20));
            let received = tokio::time::timeout(pause, self.socket.recv_from(&mut buffer)).await;
            if !self.rtc.is_alive() {
                continue;
            }
            let input = match &received {
                Ok(Ok((length, source))) => {
                    match Receive::new(Protocol::Udp, *source, self.address, &buffer[..*length]) {
                        Ok(receive) => Input::Receive(Instant::now(), receive),
                        Err(_) => continue,
                    }
                }
                _ => Input::Timeout(Instant::now()),
            };
            if self.rtc.handle_input(input).is_err() {
                self.ended = true;
            }
        }
    }

    async fn drain(&mut self) -> Instant {
        while self.rtc.is_alive() {
            match self.rtc.poll_output() {
                Ok(Output::Transmit(transmit)) => {
                    let _ = self.socket.send_to(&transmit.contents, transmit.destination).await;
                }
                Ok(Output::Event(event)) => self.event(event),
                Ok(Output::Timeout(at)) => return at,
                Err(_) => {
                    self.ended = true;
                    self.rtc.disconnect();
                }
            }
        }
        self.ended = true;
        Instant::now() + Duration::from_millis(20)
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::Connected => self.connected = true,
            Event::MediaData(data) if data.params.spec().codec.is_video() => {
                if let Some(picture) = self.decoder.decode(&data.data) {
                    self.pictures += 1;
                    self.picture = Some(picture);
                }
            }
            Event::MediaData(_) => self.sounds += 1,
            Event::ChannelOpen(_, label) => self.open.push(label),
            Event::ChannelData(data) if Some(data.id) == self.fanlight => {
                self.notices.push(serde_json::from_slice(&data.data).expect("JSON"));
            }
            Event::ChannelClose(_) => self.ended = true,
            _ => {}
        }
    }

    /// Connects fully: channels open and a first picture decoded.
    pub async fn watch(&mut self) {
        let watching =
            |client: &Self| client.pictures > 0 && client.open.iter().any(|label| label == "control");
        assert!(self.run_until(Duration::from_secs(15), watching).await, "a picture within 15 s");
    }

    pub fn send(&mut self, message: &serde_json::Value) {
        let id = self.control.expect("a control channel");
        let mut channel = self.rtc.channel(id).expect("an open channel");
        assert!(channel.write(false, message.to_string().as_bytes()).expect("written"));
    }

    pub fn tell(&mut self, message: &serde_json::Value) {
        let id = self.fanlight.expect("our channel");
        let mut channel = self.rtc.channel(id).expect("an open channel");
        assert!(channel.write(false, message.to_string().as_bytes()).expect("written"));
    }

    /// Presses and releases a key of the original's table.
    pub fn key(&mut self, code: u32) {
        for pressed in [true, false] {
            self.send(&json!({"type": "input::key", "data": {"code": code, "pressed": pressed}}));
        }
    }

    /// Bright pixels of the newest picture.
    pub fn bright(&self) -> usize {
        self.picture.as_ref().map_or(0, |(_, _, luma)| luma.iter().filter(|value| **value > 120).count())
    }

    /// Waits until no picture came for `pause`.
    pub async fn settle(&mut self, pause: Duration) {
        let mut seen = self.pictures;
        while self.run_until(pause, |client| client.pictures > seen).await {
            seen = self.pictures;
        }
    }
}

fn text_of(base64: &serde_json::Value) -> String {
    let bytes = STANDARD.decode(base64.as_str().expect("a text")).expect("base64");
    String::from_utf8(bytes).expect("text")
}

/// Whether the socket was told of an error with this code, and then closed.
pub fn was_told(frames: &[Frame], code: u64) -> bool {
    let told = frames.iter().any(|frame| match frame {
        Frame::Text { text } => {
            let value: serde_json::Value = serde_json::from_str(text).expect("JSON");
            value["type"] == "error" && value["code"] == code
        }
        _ => false,
    });
    told && frames.contains(&Frame::Closed)
}

/// libavcodec's own H.264 decoder.
struct Decoder {
    context: *mut ff::AVCodecContext,
    frame: *mut ff::AVFrame,
    packet: *mut ff::AVPacket,
}

// SAFETY: the objects belong to this value alone and are only used through `&mut self`.
unsafe impl Send for Decoder {}

impl Decoder {
    fn new() -> Self {
        // SAFETY: look-up by id, then allocation and opening of objects that are ours.
        unsafe {
            let codec = ff::avcodec_find_decoder(ff::AVCodecID::AV_CODEC_ID_H264);
            let context = ff::avcodec_alloc_context3(codec);
            (*context).flags |= ff::AV_CODEC_FLAG_LOW_DELAY as c_int;
            (*context).thread_count = 1;
            assert!(ff::avcodec_open2(context, codec, std::ptr::null_mut()) >= 0);
            Self { context, frame: ff::av_frame_alloc(), packet: ff::av_packet_alloc() }
        }
    }

    fn decode(&mut self, unit: &[u8]) -> Option<(usize, usize, Vec<u8>)> {
        // The decoder may read past the end by so much.
        let mut padded = unit.to_vec();
        padded.resize(unit.len() + ff::AV_INPUT_BUFFER_PADDING_SIZE as usize, 0);
        // SAFETY: the packet borrows `padded`, which outlives the call that reads it; the plane is read within the
        // size it states.
        unsafe {
            (*self.packet).data = padded.as_mut_ptr();
            (*self.packet).size = unit.len() as c_int;
            if ff::avcodec_send_packet(self.context, self.packet) < 0
                || ff::avcodec_receive_frame(self.context, self.frame) != 0
            {
                return None;
            }
            let frame = &*self.frame;
            let (width, height) = (frame.width as usize, frame.height as usize);
            let mut luma = Vec::with_capacity(width * height);
            for row in 0..height {
                let start = frame.data[0].add(row * frame.linesize[0] as usize);
                luma.extend_from_slice(std::slice::from_raw_parts(start, width));
            }
            Some((width, height, luma))
        }
    }
}

impl Drop for Decoder {
    fn drop(&mut self) {
        // SAFETY: freed once, each by its own function, which also clears the pointer.
        unsafe {
            ff::av_packet_free(&mut self.packet);
            ff::av_frame_free(&mut self.frame);
            ff::avcodec_free_context(&mut self.context);
        }
    }
}
