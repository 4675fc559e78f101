//! A client of the stream that shares no code with the streamer: signalling by hand, the `webrtc` crate as the peer.
//!
//! It decodes nothing. That packets are H.264 pictures and Opus is seen from their headers; pixels are the browser
//! tests' business.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::{
    sync::{Notify, mpsc},
    task::JoinHandle,
};
use tokio_tungstenite::tungstenite::Message;
use webrtc::{
    data_channel::{DataChannel, DataChannelEvent},
    media_stream::track_remote::{TrackRemote, TrackRemoteEvent},
    peer_connection::{
        MediaEngine, PeerConnection, PeerConnectionBuilder, PeerConnectionEventHandler,
        RTCConfigurationBuilder, RTCIceCandidateInit, RTCIceServer, RTCPeerConnectionIceEvent,
        RTCPeerConnectionState, RTCSessionDescription, Registry, SettingEngineBuilder,
        register_default_interceptors,
    },
    runtime::default_runtime,
};

use crate::rest::{Server, Socket};

/// What a client has seen so far.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// `type` of every signalling message from the other side.
    pub signals: Vec<String>,
    /// Messages of type `error`.
    pub errors: Vec<Value>,
    /// The signalling socket was closed by the other side.
    pub socket_closed: bool,
    /// The offer as SDP.
    pub offer: String,
    /// States of the peer connection.
    pub states: Vec<String>,
    /// Labels of channels that are open.
    pub open: Vec<String>,
    /// Labels of channels that ended.
    pub ended: Vec<String>,
    /// Text messages by channel.
    pub messages: Vec<(String, String)>,
    /// Video packets.
    pub video: Video,
    /// Audio packets.
    pub audio_packets: u64,
    /// Bytes in audio packets.
    pub audio_bytes: u64,
}

/// Video packets, by their headers.
#[derive(Clone, Debug, Default)]
pub struct Video {
    /// Packets.
    pub packets: u64,
    /// Frames: packets that end one.
    pub frames: u64,
    /// Key frames: sequence parameter sets (NAL unit type 7).
    pub key_frames: u64,
    /// RTP time of the last packet.
    pub timestamp: u32,
    /// When the last packet came.
    pub last: Option<Instant>,
    /// Codec that was agreed.
    pub codec: String,
}

#[derive(Default)]
struct Shared {
    seen: Mutex<Seen>,
    changed: Notify,
}

impl Shared {
    fn change(&self, what: impl FnOnce(&mut Seen)) {
        what(&mut self.seen.lock().expect("nobody panics while holding it"));
        self.changed.notify_waiters();
    }

    fn now(&self) -> Seen {
        self.seen.lock().expect("nobody panics while holding it").clone()
    }
}

/// How a client behaves.
#[derive(Clone, Debug)]
pub struct Habits {
    /// Wants sound.
    pub speaker: bool,
    /// Channels besides `control`.
    pub channels: Vec<&'static str>,
    /// Closes the signalling socket when connected, as the original's browser client does.
    pub closes_socket: bool,
    /// Time for the instance to answer `discover`.
    pub boot: Duration,
    /// Address of this machine for media.
    pub address: IpAddr,
    /// `stun_servers` of the gateway's answer, or none.
    pub servers: Value,
}

/// The way that media takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Way {
    /// Kind of our own candidate: `host`, `srflx`, `prflx` or `relay`.
    pub local: String,
    /// Address of the other side.
    pub remote: SocketAddr,
}

impl Default for Habits {
    fn default() -> Self {
        Self {
            speaker: true,
            channels: Vec::new(),
            closes_socket: true,
            boot: crate::BOOT,
            address: IpAddr::from([127, 0, 0, 1]),
            servers: Value::Null,
        }
    }
}

/// A client.
pub struct Client {
    shared: Arc<Shared>,
    peer: Arc<dyn PeerConnection>,
    control: Arc<dyn DataChannel>,
    to_socket: mpsc::UnboundedSender<Option<Message>>,
    tasks: Vec<JoinHandle<()>>,
}

struct Handler {
    shared: Arc<Shared>,
    candidates: mpsc::UnboundedSender<RTCIceCandidateInit>,
}

#[async_trait::async_trait]
impl PeerConnectionEventHandler for Handler {
    async fn on_ice_candidate(&self, event: RTCPeerConnectionIceEvent) {
        if let Ok(candidate) = event.candidate.to_json() {
            // The client may be gone already.
            let _ = self.candidates.send(candidate);
        }
    }

    async fn on_connection_state_change(&self, state: RTCPeerConnectionState) {
        self.shared.change(|seen| seen.states.push(state.to_string()));
    }

    async fn on_track(&self, track: Arc<dyn TrackRemote>) {
        let shared = self.shared.clone();
        // The driver calls this; reading must not hold it up.
        tokio::spawn(async move { listen(&*track, &shared).await });
    }
}

async fn listen(track: &dyn TrackRemote, shared: &Shared) {
    let mut codec = String::new();
    while let Some(event) = track.poll().await {
        let TrackRemoteEvent::OnRtpPacket(packet) = event else { continue };
        if codec.is_empty() {
            let known = track.codec(packet.header.ssrc).await;
            codec = known.map(|codec| codec.mime_type.to_lowercase()).unwrap_or_default();
        }
        if packet.payload.is_empty() {
            continue;
        }
        if codec.starts_with("audio/") {
            shared.change(|seen| {
                seen.audio_packets += 1;
                seen.audio_bytes += packet.payload.len() as u64;
            });
            continue;
        }
        shared.change(|seen| {
            let video = &mut seen.video;
            video.packets += 1;
            video.frames += u64::from(packet.header.marker);
            video.key_frames += u64::from(begins_key_frame(&packet.payload));
            video.timestamp = packet.header.timestamp;
            video.last = Some(Instant::now());
            video.codec.clone_from(&codec);
        });
    }
}

/// Whether an H.264 payload (RFC 6184) holds a sequence parameter set, as every key frame does.
fn begins_key_frame(payload: &[u8]) -> bool {
    const SEQUENCE_PARAMETERS: u8 = 7;
    const AGGREGATE: u8 = 24;
    match payload[0] & 0x1f {
        SEQUENCE_PARAMETERS => true,
        AGGREGATE => {
            let mut rest = &payload[1..];
            while let [high, low, tail @ ..] = rest {
                let length = usize::from(u16::from_be_bytes([*high, *low]));
                if tail.first().is_some_and(|header| header & 0x1f == SEQUENCE_PARAMETERS) {
                    return true;
                }
                rest = tail.get(length..).unwrap_or_default();
            }
            false
        }
        _ => false,
    }
}

impl Client {
    /// Connects to a session by its websocket's address and waits until media may flow.
    ///
    /// # Errors
    /// Which step failed, with everything that was seen.
    pub async fn connect(server: &Server, url: &str, habits: Habits) -> Result<Self> {
        let socket = server.websocket(url).await?.open()?;
        let shared = Arc::new(Shared::default());
        let (to_socket, from_client) = mpsc::unbounded_channel();
        let (to_client, mut signals) = mpsc::unbounded_channel();
        let mut tasks = vec![tokio::spawn(carry(socket, from_client, to_client, shared.clone()))];

        let (to_candidates, mut candidates) = mpsc::unbounded_channel();
        let handler = Handler { shared: shared.clone(), candidates: to_candidates };
        let peer = peer(handler, &habits).await.context("making a peer connection")?;
        let control =
            peer.create_data_channel("control", None).await.context("opening the control channel")?;
        let mut channels = vec![("control", control.clone())];
        for label in &habits.channels {
            channels.push((label, peer.create_data_channel(label, None).await.context("opening a channel")?));
        }
        for (label, channel) in channels {
            tasks.push(tokio::spawn(hear(label, channel, shared.clone())));
        }
        let client = Self { shared, peer, control, to_socket, tasks };

        client.signal(&json!({ "type": "discover" }));
        expect(&mut signals, "resp:discover", habits.boot).await.with_context(|| client.story())?;
        client.signal(&json!({
            "type": "settings", "api_version": 2, "data_channels": habits.channels, "enable_speaker": habits.speaker,
            "enable_microphone": false, "enable_video": true, "enable_camera": false,
        }));
        let mut early = Vec::new();
        let offer = loop {
            let message = next(&mut signals, "offer", crate::SOON).await.with_context(|| client.story())?;
            match message["type"].as_str() {
                Some("offer") => break message,
                Some("candidate") => early.push(message),
                Some("error") => bail!("instead of an offer: {message}"),
                _ => {}
            }
        };
        let sdp = decode(&offer["sdp"])?;
        client.shared.change(|seen| seen.offer.clone_from(&sdp));
        client
            .peer
            .set_remote_description(RTCSessionDescription::offer(sdp)?)
            .await
            .context("applying the offer")?;
        let answer = client.peer.create_answer(None).await.context("answering")?;
        client.peer.set_local_description(answer.clone()).await.context("applying the answer")?;
        client.signal(&json!({ "type": "answer", "sdp": STANDARD.encode(&answer.sdp) }));
        for message in early {
            client.add(&message).await?;
        }
        {
            let connected = client.wait("ICE and DTLS are connected", crate::SOON, |seen| {
                seen.states.iter().any(|s| s == "connected")
            });
            tokio::pin!(connected);
            loop {
                tokio::select! {
                    result = &mut connected => { result?; break }
                    Some(candidate) = candidates.recv() => client.signal(&json!({
                        "type": "candidate", "candidate": STANDARD.encode(&candidate.candidate), "sdpMid": candidate.sdp_mid.unwrap_or_default(),
                        "sdpMLineIndex": candidate.sdp_mline_index.unwrap_or_default(),
                    })),
                    Some(message) = signals.recv() => match message["type"].as_str() {
                        Some("candidate") => client.add(&message).await?,
                        Some("error") => bail!("while connecting: {message}"),
                        _ => {}
                    },
                }
            }
        }
        if habits.closes_socket {
            // No code, as a browser does when nobody gives one.
            let _ = client.to_socket.send(None);
        }
        Ok(client)
    }

    async fn add(&self, message: &Value) -> Result<()> {
        let candidate = RTCIceCandidateInit {
            candidate: decode(&message["candidate"])?,
            sdp_mid: message["sdpMid"].as_str().map(str::to_owned),
            sdp_mline_index: message["sdpMLineIndex"].as_u64().map(|index| index as u16),
            ..Default::default()
        };
        self.peer.add_ice_candidate(candidate).await.context("adding a candidate")
    }

    /// Sends a signalling message.
    pub fn signal(&self, message: &Value) {
        // A socket that is closed is noticed by what does not come.
        let _ = self.to_socket.send(Some(Message::text(message.to_string())));
    }

    /// Sends a control message.
    ///
    /// # Errors
    /// The channel is not open.
    pub async fn control(&self, kind: &str, data: Value) -> Result<()> {
        self.control
            .send_text(&json!({ "type": kind, "data": data }).to_string())
            .await
            .context("sending a control message")
    }

    /// Sends a text on the control channel as it is.
    ///
    /// # Errors
    /// The channel is not open.
    pub async fn control_text(&self, text: &str) -> Result<()> {
        self.control.send_text(text).await.context("sending a text on the control channel")
    }

    /// Presses and releases a key by its number in the protocol.
    ///
    /// # Errors
    /// The channel is not open.
    pub async fn key(&self, code: u32) -> Result<()> {
        for pressed in [true, false] {
            self.control("input::key", json!({ "code": code, "pressed": pressed })).await?;
        }
        Ok(())
    }

    /// The way that media takes now.
    ///
    /// # Errors
    /// There is none.
    pub async fn way(&self) -> Result<Way> {
        let sctp = self.peer.sctp().await.context("there is no SCTP transport")?;
        let pair = sctp.transport().ice_transport().get_selected_candidate_pair().await?;
        let pair = pair.context("no pair of candidates is selected")?;
        let remote = pair.remote();
        let ip: IpAddr = remote.address.parse().context("reading the other side's address")?;
        let local = pair.local().typ.to_string();
        Ok(Way { local, remote: SocketAddr::new(ip, remote.port) })
    }

    /// What was seen so far.
    pub fn seen(&self) -> Seen {
        self.shared.now()
    }

    fn story(&self) -> String {
        format!("{:?}", Seen { offer: String::new(), ..self.seen() })
    }

    /// Waits for something to be seen.
    ///
    /// # Errors
    /// It was not in time; the text says what was.
    pub async fn wait(
        &self,
        what: &str,
        patience: Duration,
        condition: impl Fn(&Seen) -> bool,
    ) -> Result<Seen> {
        let end = tokio::time::Instant::now() + patience;
        loop {
            let changed = self.shared.changed.notified();
            tokio::pin!(changed);
            // From here on a change wakes us even if it comes before we wait.
            changed.as_mut().enable();
            let seen = self.seen();
            if condition(&seen) {
                return Ok(seen);
            }
            if tokio::time::timeout_at(end, changed).await.is_err() {
                bail!("not within {patience:?}: {what}; seen: {}", self.story());
            }
        }
    }

    /// Waits until video and the control channel are there.
    ///
    /// # Errors
    /// They do not come.
    pub async fn streaming(&self) -> Result<Seen> {
        self.wait("a key frame and the control channel", crate::SOON, |seen| {
            seen.video.key_frames > 0 && seen.open.iter().any(|label| label == "control")
        })
        .await
    }

    /// Waits for this many more frames.
    ///
    /// # Errors
    /// They do not come.
    pub async fn more_frames(&self, count: u64) -> Result<Seen> {
        let wanted = self.seen().video.frames + count;
        self.wait(&format!("{count} more frames"), crate::SOON, |seen| seen.video.frames >= wanted).await
    }

    /// Leaves in good order.
    ///
    /// # Errors
    /// The connection was closed before.
    pub async fn leave(self) -> Result<()> {
        self.control("stream::disconnect", json!({})).await?;
        // The message has to get away before the connection ends.
        tokio::time::sleep(Duration::from_millis(200)).await;
        self.peer.close().await.context("closing the peer connection")
    }

    /// Waits until the other side has ended the stream.
    ///
    /// # Errors
    /// It goes on.
    pub async fn ended(&self, patience: Duration) -> Result<Seen> {
        self.wait("the stream is ended by the instance", patience, |seen| {
            seen.ended.iter().any(|label| label == "control")
                || seen
                    .states
                    .last()
                    .is_some_and(|state| ["closed", "failed", "disconnected"].contains(&state.as_str()))
        })
        .await
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

async fn peer(handler: Handler, habits: &Habits) -> Result<Arc<dyn PeerConnection>> {
    let servers = habits.servers.as_array().into_iter().flatten().map(|server| {
        let text = |name: &str| server[name].as_str().unwrap_or_default().to_owned();
        let urls = server["urls"].as_array().into_iter().flatten().filter_map(Value::as_str);
        RTCIceServer {
            urls: urls.map(str::to_owned).collect(),
            username: text("username"),
            credential: text("password"),
        }
    });
    let mut media = MediaEngine::default();
    media.register_default_codecs()?;
    let registry = register_default_interceptors(Registry::new(), &mut media)?;
    let runtime = default_runtime().context("the crate was built without a runtime")?;
    let settings = SettingEngineBuilder::new().with_include_loopback_candidate(true).build();
    let peer = PeerConnectionBuilder::new()
        .with_configuration(RTCConfigurationBuilder::new().with_ice_servers(servers.collect()).build())
        .with_media_engine(media)
        .with_setting_engine(settings)
        .with_interceptor_registry(registry)
        .with_handler(Arc::new(handler))
        .with_runtime(runtime)
        .with_udp_addrs(vec![SocketAddr::new(habits.address, 0).to_string()])
        .build()
        .await?;
    Ok(Arc::new(peer))
}

/// Carries messages between the socket and the client.
async fn carry(
    mut socket: Socket,
    mut from_client: mpsc::UnboundedReceiver<Option<Message>>,
    to_client: mpsc::UnboundedSender<Value>,
    shared: Arc<Shared>,
) {
    loop {
        tokio::select! {
            message = from_client.recv() => match message {
                Some(Some(message)) => {
                    if socket.send(message).await.is_err() {
                        return;
                    }
                }
                Some(None) | None => {
                    let _ = socket.close(None).await;
                    return;
                }
            },
            message = socket.next() => match message {
                Some(Ok(Message::Text(text))) => {
                    let message: Value = serde_json::from_str(&text).unwrap_or_default();
                    shared.change(|seen| {
                        seen.signals.push(message["type"].as_str().unwrap_or_default().to_owned());
                        if message["type"] == "error" {
                            seen.errors.push(message.clone());
                        }
                    });
                    // Nobody listens any more once connected.
                    let _ = to_client.send(message);
                }
                Some(Ok(Message::Close(_)) | Err(_)) | None => {
                    shared.change(|seen| seen.socket_closed = true);
                    return;
                }
                Some(Ok(_)) => {}
            },
        }
    }
}

async fn hear(label: &'static str, channel: Arc<dyn DataChannel>, shared: Arc<Shared>) {
    while let Some(event) = channel.poll().await {
        match event {
            DataChannelEvent::OnOpen => shared.change(|seen| seen.open.push(label.into())),
            DataChannelEvent::OnMessage(message) if message.is_string => {
                let text = String::from_utf8_lossy(&message.data).into_owned();
                shared.change(|seen| seen.messages.push((label.into(), text)));
            }
            DataChannelEvent::OnClose => break,
            _ => {}
        }
    }
    shared.change(|seen| seen.ended.push(label.into()));
}

async fn next(
    signals: &mut mpsc::UnboundedReceiver<Value>,
    wanted: &str,
    patience: Duration,
) -> Result<Value> {
    match tokio::time::timeout(patience, signals.recv()).await {
        Ok(Some(message)) => Ok(message),
        Ok(None) => bail!("the signalling socket ended before {wanted:?} came"),
        Err(_) => bail!("no {wanted:?} within {patience:?}"),
    }
}

async fn expect(
    signals: &mut mpsc::UnboundedReceiver<Value>,
    wanted: &str,
    patience: Duration,
) -> Result<Value> {
    let message = next(signals, wanted, patience).await?;
    if message["type"] != wanted {
        bail!("{message} instead of {wanted:?}");
    }
    Ok(message)
}

fn decode(value: &Value) -> Result<String> {
    let text = value.as_str().with_context(|| format!("{value} is no text"))?;
    Ok(String::from_utf8(STANDARD.decode(text).context("reading base64")?)?)
}
