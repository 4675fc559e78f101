//! Laws of what travels, tried on made-up input: nothing that anybody sends makes a reader panic, and what is written is
//! read back. `PROPTEST_CASES` makes a longer run of it.

use std::time::{Duration, Instant};

use fanlight_api::{
    SessionId, ShareId,
    bus::{AgentReport, AgentRequest, AgentResponse, GatewayRequest, SessionsReport},
    gateway::{JoinPost, Screen, ScreenPatch, SessionsPost, SharePatch, SharePost},
    link::{Frame, Link, Packet, Side},
    signal::{ClientMessage, InstanceMessage},
};
use proptest::{collection::vec, prelude::*};
use serde_json::{Value, json};

fn cases() -> ProptestConfig {
    ProptestConfig::with_cases(
        std::env::var("PROPTEST_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(1000),
    )
}

/// Any JSON of a bounded size.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(|number| json!(number)),
        ".{0,20}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 6, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..5).prop_map(Value::from),
            vec(("[a-z_]{1,12}", inner), 0..5)
                .prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    })
}

/// An object with some of these members, whatever their values.
fn with_members(names: &'static [&'static str]) -> impl Strategy<Value = Value> {
    vec((proptest::sample::select(names), any_json()), 0..6).prop_map(|members| {
        Value::Object(members.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
    })
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn no_text_makes_a_reader_panic(text in ".{0,200}") {
        let _ = text.parse::<SessionId>();
        let _ = serde_json::from_str::<ClientMessage>(&text);
        let _ = serde_json::from_str::<InstanceMessage>(&text);
        let _ = serde_json::from_str::<Packet>(&text);
        let _ = serde_json::from_str::<SessionsPost>(&text);
    }

    #[test]
    fn signalling_frames_are_read_or_refused_and_written_back(
        message in with_members(&["type", "sdp", "candidate", "sdpMid", "sdpMLineIndex", "api_version", "data_channels", "video"]),
        kind in proptest::sample::select(&["discover", "settings", "answer", "offer", "candidate", "moon"][..]),
    ) {
        let mut message = message;
        message["type"] = json!(kind);
        if let Ok(read) = serde_json::from_value::<ClientMessage>(message) {
            let written = serde_json::to_value(&read).expect("written");
            prop_assert_eq!(serde_json::from_value::<ClientMessage>(written).expect("read back"), read);
        }
    }

    #[test]
    fn bodies_and_bus_messages_are_read_or_refused(body in with_members(&[
        "type", "app", "app_version", "screen", "width", "joinable", "idle_time_min", "extra_data", "location",
        "round_trips", "expiry_at", "expiry_min", "description", "session_id", "agent_id", "sessions", "capacity",
        "applications", "stun_servers", "message", "force",
    ])) {
        let _ = serde_json::from_value::<SessionsPost>(body.clone());
        let _ = serde_json::from_value::<JoinPost>(body.clone());
        let _ = serde_json::from_value::<SharePost>(body.clone());
        let _ = serde_json::from_value::<SharePatch>(body.clone());
        let _ = serde_json::from_value::<AgentReport>(body.clone());
        let _ = serde_json::from_value::<SessionsReport>(body.clone());
        let _ = serde_json::from_value::<AgentRequest>(body.clone());
        let _ = serde_json::from_value::<AgentResponse>(body.clone());
        let _ = serde_json::from_value::<GatewayRequest>(body);
    }

    #[test]
    fn screens_are_within_their_bounds_or_refused(
        width in any::<Option<i64>>(), height in any::<Option<i64>>(),
        fps in any::<Option<i64>>(), density in any::<Option<i64>>(),
        near in (-10..5000_i64, -10..5000_i64),
    ) {
        for patch in [
            ScreenPatch { width, height, fps, density },
            ScreenPatch { width: Some(near.0), height: Some(near.1), fps: None, density: None },
        ] {
            if let Ok(screen) = patch.apply(Screen::default()) {
                prop_assert!(screen.width % 2 == 0 && screen.height % 2 == 0);
                prop_assert!((2..=3840).contains(&screen.width.max(screen.height)));
                prop_assert!(screen.width.min(screen.height) <= 2160);
                prop_assert!((1..=240).contains(&screen.fps) && screen.density >= 72);
            }
        }
    }

    #[test]
    fn ids_that_are_accepted_cannot_leave_their_place(text in ".{0,300}") {
        if let Ok(id) = text.parse::<ShareId>() {
            prop_assert!(!id.as_str().is_empty() && id.as_str().len() <= 255);
            prop_assert!(!id.as_str().contains(['/', '?', '#', '%', ' ', '\0']) && id.as_str() != "." && id.as_str() != "..");
        }
    }

    /// Each number decides what happens to one packet: lost, doubled, or kept back for later.
    #[test]
    fn frames_arrive_once_and_in_order_whatever_the_path_does(
        up in vec("[a-z]{0,8}", 0..12), down in vec("[a-z]{0,8}", 0..12), fates in vec(0..6_u8, 0..200),
    ) {
        let session: SessionId = "s1".parse().expect("id");
        let mut ends = [
            Link::new(session.clone(), 1, Side::Client),
            Link::new(session, 1, Side::Instance),
        ];
        let sent = [up, down];
        for (end, texts) in ends.iter_mut().zip(&sent) {
            for text in texts {
                end.send(Frame::Text { text: text.clone() }).expect("room");
            }
        }
        let mut got: [Vec<String>; 2] = Default::default();
        let mut kept: Vec<(usize, Packet)> = Vec::new();
        let mut fates = fates.into_iter();
        let mut now = Instant::now();
        for _ in 0..400 {
            for from in [0, 1] {
                while let Some(packet) = ends[from].poll_transmit(now) {
                    match fates.next() {
                        Some(0 | 1) => {}
                        Some(2) => kept.push((1 - from, packet)),
                        Some(3) => {
                            ends[1 - from].receive(packet.clone());
                            ends[1 - from].receive(packet);
                        }
                        _ => ends[1 - from].receive(packet),
                    }
                }
                if fates.len() % 3 == 0 {
                    for (to, packet) in kept.drain(..) {
                        ends[to].receive(packet);
                    }
                }
            }
            for (end, got) in ends.iter_mut().zip(&mut got) {
                while let Some(frame) = end.poll_frame() {
                    if let Frame::Text { text } = frame {
                        got.push(text);
                    }
                }
            }
            if ends.iter().all(Link::is_settled) && fates.len() == 0 && kept.is_empty() {
                break;
            }
            now += Duration::from_millis(500);
        }
        prop_assert_eq!(&got[1], &sent[0]);
        prop_assert_eq!(&got[0], &sent[1]);
    }

    #[test]
    fn packets_of_strangers_break_no_link(packets in vec(any_json(), 0..20), number in any::<u64>()) {
        let mut link = Link::new("s1".parse().expect("id"), 1, Side::Client);
        link.send(Frame::Text { text: "hello".into() }).expect("room");
        let template = serde_json::to_value(link.poll_transmit(Instant::now()).expect("a packet")).expect("JSON");
        for strange in packets {
            for name in template.as_object().expect("object").keys() {
                let mut packet = template.clone();
                packet[name] = strange.clone();
                if let Ok(packet) = serde_json::from_value::<Packet>(packet) {
                    link.receive(packet);
                }
                let mut packet = template.clone();
                packet[name] = json!(number);
                if let Ok(packet) = serde_json::from_value::<Packet>(packet) {
                    link.receive(packet);
                }
            }
        }
        while link.poll_frame().is_some() {}
        let _ = link.poll_transmit(Instant::now());
        prop_assert!(!link.is_settled() || link.deadline().is_none());
    }
}
