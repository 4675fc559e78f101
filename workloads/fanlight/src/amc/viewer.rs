//! A client that waits for the first picture of a stream and shows it to nobody: for measuring.
//!
//! A picture counts when the last packet of a key frame has come; decoding it is a matter of the machine of whoever
//! looks. Media goes directly: a TURN server is not asked.

use std::{
    collections::VecDeque,
    net::{IpAddr, SocketAddr, UdpSocket as StdUdpSocket},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use fanlight_api::signal::{API_VERSION, Candidate, ClientMessage, InstanceMessage, Settings};
use fanlight_client::WebSocket;
use futures_util::{SinkExt as _, StreamExt as _};
use str0m::{
    Event, Input, Output, Rtc, RtcConfig,
    change::SdpOffer,
    crypto::from_feature_flags,
    net::{Protocol, Receive},
};
use tokio::net::UdpSocket;
use tokio_tungstenite::tungstenite::Message;

/// Larger than any datagram of a stream.
const DATAGRAM_BYTES: usize = 2048;

/// When the first picture of a session had come, given the client's websocket of that session.
///
/// # Errors
/// Which step of the way did not happen within `patience`.
pub async fn first_picture(mut socket: WebSocket, patience: Duration) -> Result<Instant> {
    let mut step = "an answer of the instance";
    let looking = look(&mut socket, &mut step);
    match tokio::time::timeout(patience, looking).await {
        Ok(result) => result,
        Err(_) => bail!("{step} did not come within {}", humantime::format_duration(patience)),
    }
}

async fn look(socket: &mut WebSocket, step: &mut &'static str) -> Result<Instant> {
    say(socket, &ClientMessage::Discover).await?;
    while !matches!(hear(socket).await?, InstanceMessage::Discovered { .. }) {}
    *step = "the offer";
    let wanted = Settings { api_version: Some(API_VERSION), enable_video: true, ..Settings::default() };
    say(socket, &ClientMessage::Settings(wanted)).await?;
    let (mut offer, mut remote) = (None, VecDeque::new());
    let (offer, first) = loop {
        match hear(socket).await? {
            InstanceMessage::Offer { sdp } => offer = Some(decode(&sdp)?),
            InstanceMessage::Candidate(candidate) => remote.push_back(decode(&candidate.candidate)?),
            _ => {}
        }
        // The address to bind follows from the way to the other side, so one of its addresses must be known.
        if let Some(sdp) = &offer {
            let described = sdp.lines().filter_map(|line| line.strip_prefix("a=candidate:"));
            let found = described.chain(remote.iter().map(String::as_str)).find_map(address);
            if let Some(found) = found {
                break (sdp.clone(), found);
            }
        }
    };
    *step = "a connection for media";
    let local = local_address(first)?;
    let udp = UdpSocket::bind(SocketAddr::new(local, 0)).await.context("opening a port for media")?;
    let mut rtc = RtcConfig::new().set_crypto_provider(Arc::new(from_feature_flags())).build(Instant::now());
    let own = str0m::Candidate::host(udp.local_addr().context("finding the port for media")?, Protocol::Udp)
        .context("describing the port for media")?;
    rtc.add_local_candidate(own.clone());
    let offer = SdpOffer::from_sdp_string(&offer).context("reading the offer")?;
    let answer = rtc.sdp_api().accept_offer(offer).context("answering the offer")?;
    say(socket, &ClientMessage::Answer { sdp: BASE64_STANDARD.encode(answer.to_sdp_string()) }).await?;
    let own = Candidate {
        candidate: BASE64_STANDARD.encode(own.to_sdp_string()),
        sdp_mid: Some("0".into()),
        sdp_m_line_index: Some(0),
    };
    say(socket, &ClientMessage::Candidate(own)).await?;
    for line in remote {
        add(&mut rtc, &line)?;
    }
    carry(socket, &udp, &mut rtc, step).await
}

async fn carry(
    socket: &mut WebSocket,
    udp: &UdpSocket,
    rtc: &mut Rtc,
    step: &mut &'static str,
) -> Result<Instant> {
    let own = udp.local_addr().context("finding the port for media")?;
    let mut buffer = vec![0; DATAGRAM_BYTES];
    let mut signalling = true;
    loop {
        let until = loop {
            match rtc.poll_output().context("driving the connection")? {
                Output::Timeout(until) => break until,
                Output::Transmit(transmit) => {
                    // Lost on the way is what UDP may do; the protocols above make up for it.
                    let _ = udp.send_to(&transmit.contents, transmit.destination).await;
                }
                Output::Event(Event::Connected) => *step = "a picture",
                Output::Event(Event::MediaData(media)) if media.is_keyframe() => return Ok(Instant::now()),
                Output::Event(_) => {}
            }
        };
        tokio::select! {
            () = tokio::time::sleep_until(until.into()) => {
                rtc.handle_input(Input::Timeout(Instant::now())).context("driving the connection")?;
            }
            received = udp.recv_from(&mut buffer) => {
                let (length, source) = received.context("receiving media")?;
                if let Ok(receive) = Receive::new(Protocol::Udp, source, own, &buffer[..length]) {
                    rtc.handle_input(Input::Receive(Instant::now(), receive)).context("driving the connection")?;
                }
            }
            message = hear(socket), if signalling => match message {
                Ok(InstanceMessage::Candidate(candidate)) => add(rtc, &decode(&candidate.candidate)?)?,
                Ok(_) => {}
                // Closed in good order once nothing more is to be said.
                Err(error) if rtc.is_connected() => {
                    tracing::debug!("signalling has ended: {error:#}");
                    signalling = false;
                }
                Err(error) => return Err(error),
            },
        }
    }
}

fn add(rtc: &mut Rtc, line: &str) -> Result<()> {
    // The line that says that there are no more, and names instead of addresses, are of no use.
    if address(line).is_none() {
        return Ok(());
    }
    let candidate = str0m::Candidate::from_sdp_string(line.trim()).context("reading a candidate")?;
    rtc.add_remote_candidate(candidate);
    Ok(())
}

/// The address in a candidate of UDP (RFC 8839 section 5.1).
fn address(line: &str) -> Option<SocketAddr> {
    let mut words = line.split_ascii_whitespace().skip(2);
    let transport = words.next()?;
    let ip: IpAddr = words.nth(1)?.parse().ok()?;
    let port = words.next()?.parse().ok()?;
    transport.eq_ignore_ascii_case("udp").then(|| SocketAddr::new(ip, port))
}

/// The address of this machine on the way to another.
fn local_address(remote: SocketAddr) -> Result<IpAddr> {
    let any: SocketAddr = if remote.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0_u16; 8], 0).into() };
    let probe = StdUdpSocket::bind(any).context("looking for the way to the instance")?;
    // Nothing is sent by this.
    probe.connect(remote).with_context(|| format!("finding a way to {remote}"))?;
    Ok(probe.local_addr().context("looking for the way to the instance")?.ip())
}

async fn say(socket: &mut WebSocket, message: &ClientMessage) -> Result<()> {
    let text = serde_json::to_string(message).context("writing a message")?;
    socket.send(Message::text(text)).await.context("the signalling connection is lost")
}

async fn hear(socket: &mut WebSocket) -> Result<InstanceMessage> {
    loop {
        match socket.next().await {
            Some(Ok(Message::Text(text))) => match serde_json::from_str(&text) {
                Ok(InstanceMessage::Error { message, .. }) => bail!("the other side says: {message}"),
                Ok(message) => return Ok(message),
                // Newer instances may say more.
                Err(error) => tracing::debug!(%error, "a message of the instance cannot be understood"),
            },
            Some(Ok(Message::Close(_))) | None => bail!("the signalling connection was closed"),
            Some(Ok(_)) => {}
            Some(Err(error)) => return Err(error).context("the signalling connection is lost"),
        }
    }
}

fn decode(text: &str) -> Result<String> {
    let bytes = BASE64_STANDARD.decode(text).context("reading a message of the instance")?;
    String::from_utf8(bytes).context("reading a message of the instance")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_from_candidates_that_can_be_used() {
        let host = "candidate:1 1 udp 2130706431 192.0.2.1 5000 typ host";
        assert_eq!(address(host), Some("192.0.2.1:5000".parse().expect("one")));
        for other in [
            "",
            "candidate:1 1 tcp 2130706431 192.0.2.1 9 typ host tcptype active",
            "candidate:1 1 udp 2130706431 x.local 5000 typ host",
            "candidate:1 1 udp",
        ] {
            assert_eq!(address(other), None, "{other}");
        }
        let local = local_address("127.0.0.1:9".parse().expect("one")).expect("loopback");
        assert!(local.is_loopback());
    }
}
