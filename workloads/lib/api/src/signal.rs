//! Signalling messages between client and instance (signaling section 5). The gateway relays them unseen.

use serde::{Deserialize, Serialize};

/// Highest signalling version we speak.
pub const API_VERSION: u32 = 2;

/// From the client.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum ClientMessage {
    /// First message of current clients.
    Discover,
    /// What the client wants.
    Settings(Settings),
    /// Version 2: answer to our offer.
    Answer {
        /// Standard base64 of the SDP.
        sdp: String,
    },
    /// Versions 0 and 1: the client offers.
    Offer {
        /// Standard base64 of the SDP.
        sdp: String,
        /// Labels of the channels besides `control`.
        #[serde(default, rename = "dataChannels")]
        data_channels: Vec<String>,
    },
    /// A trickled candidate.
    Candidate(Candidate),
}

/// What a client wants; absent members are off for version 2 and unknown for older ones.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Settings {
    /// 0 to 2.
    pub api_version: Option<u32>,
    /// Labels of the channels besides `control`, at most 5.
    pub data_channels: Vec<String>,
    /// Wants sound.
    pub enable_speaker: bool,
    /// Will send sound.
    pub enable_microphone: bool,
    /// Wants the picture.
    pub enable_video: bool,
    /// Will send a picture.
    pub enable_camera: bool,
    /// Free text of the page.
    pub device_type: String,
    /// Android only.
    pub foreground_activity: String,
    /// Wishes for the picture.
    pub video: VideoSettings,
}

/// Wishes for the picture.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct VideoSettings {
    /// Of AV1, H264, VP8, VP9; compared without case.
    pub preferred_decoder_codecs: Vec<String>,
}

/// A candidate, in both directions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    /// Standard base64 of the line that begins `candidate:`.
    pub candidate: String,
    /// Media section.
    #[serde(default, rename = "sdpMid", skip_serializing_if = "Option::is_none")]
    pub sdp_mid: Option<String>,
    /// Its index.
    #[serde(default, rename = "sdpMLineIndex", skip_serializing_if = "Option::is_none")]
    pub sdp_m_line_index: Option<u32>,
}

/// From the instance (`error` also from the gateway).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum InstanceMessage {
    /// Answer to `discover`, exactly one.
    #[serde(rename = "resp:discover")]
    Discovered {
        /// 2.
        max_api_version: u32,
        /// Frames per second of the display.
        fps: u32,
        /// None of our images has any.
        capabilities: Vec<String>,
    },
    /// Version 2.
    Offer {
        /// Standard base64 of the SDP.
        sdp: String,
    },
    /// Versions 0 and 1.
    Answer {
        /// Standard base64 of the SDP.
        sdp: String,
    },
    /// A trickled candidate.
    Candidate(Candidate),
    /// The end, with the reason.
    Error {
        /// See [`ErrorCode`].
        code: u32,
        /// For people.
        message: String,
    },
}

impl InstanceMessage {
    /// An `error` message.
    pub fn error(code: ErrorCode, message: impl Into<String>) -> Self {
        Self::Error { code: code as u32, message: message.into() }
    }

    /// The text frame.
    pub fn to_text(&self) -> String {
        serde_json::to_string(self).expect("strings and numbers always serialise")
    }
}

/// Codes of `error` messages (signaling section 5.2; 5 is the original's, the others are ours).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum ErrorCode {
    /// Our fault.
    Internal = 1,
    /// No such session.
    SessionNotFound = 2,
    /// The session ended.
    SessionEnded = 3,
    /// No codec in common.
    NoCommonCodec = 4,
    /// Message not understood.
    BadRequest = 5,
    /// Version not spoken.
    UnsupportedVersion = 6,
    /// The instance cannot be reached.
    InstanceNotReachable = 7,
    /// Another client took over.
    Replaced = 8,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_have_the_fields_that_clients_of_the_original_send_and_expect() {
        let settings: ClientMessage = serde_json::from_str(
            r#"{"type":"settings","api_version":2,"data_channels":["foo"],"enable_speaker":true,
                "enable_video":true,"device_type":"mobile","video":{"preferred_decoder_codecs":["av1"]},"new":1}"#,
        )
        .expect("settings");
        let ClientMessage::Settings(settings) = settings else { panic!("{settings:?}") };
        assert_eq!((settings.api_version, settings.data_channels.len()), (Some(2), 1));
        let offer: ClientMessage =
            serde_json::from_str(r#"{"type":"offer","sdp":"eA==","dataChannels":["a"]}"#).expect("offer");
        assert!(matches!(offer, ClientMessage::Offer { data_channels, .. } if data_channels == ["a"]));
        assert_eq!(
            InstanceMessage::Discovered { max_api_version: 2, fps: 60, capabilities: vec![] }.to_text(),
            r#"{"type":"resp:discover","max_api_version":2,"fps":60,"capabilities":[]}"#
        );
        assert_eq!(
            InstanceMessage::error(ErrorCode::Replaced, "x").to_text(),
            r#"{"type":"error","code":8,"message":"x"}"#
        );
        assert!(serde_json::from_str::<ClientMessage>(r#"{"type":"dance"}"#).is_err());
    }
}
