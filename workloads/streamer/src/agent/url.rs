//! The agent's address in the guest file.

use http::Uri;
use rustls::pki_types::ServerName;

/// Why an agent's URL is no good.
#[derive(Debug, thiserror::Error)]
#[error("streaming.agent_url {url:?} is no address of an agent: {reason}")]
pub struct BadUrl {
    url: String,
    reason: &'static str,
}

/// Where the agent is.
#[derive(Clone, Debug)]
pub struct AgentUrl {
    /// Name or address, without brackets.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// What its certificate would be checked against.
    pub server_name: ServerName<'static>,
}

impl AgentUrl {
    /// Reads `wss://host[:port]/path`.
    ///
    /// # Errors
    /// When it is no such URL. Without TLS the token would travel in clear, so `ws` is refused.
    pub fn parse(text: &str) -> Result<Self, BadUrl> {
        let bad = |reason| BadUrl { url: text.chars().take(200).collect(), reason };
        let uri: Uri = text.parse().map_err(|_| bad("not a URL"))?;
        if uri.scheme_str() != Some("wss") {
            return Err(bad("it must begin with wss://"));
        }
        let host = uri.host().filter(|host| !host.is_empty()).ok_or_else(|| bad("it has no host"))?;
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let server_name = ServerName::try_from(host.clone()).map_err(|_| bad("its host is no name"))?;
        Ok(Self { port: uri.port_u16().unwrap_or(443), host, server_name })
    }

    /// For the `Host` header and for people.
    pub fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_agents_are_read_and_others_refused() {
        for (url, authority) in [
            ("wss://127.0.0.1:4443/internal/1.0/stream", "127.0.0.1:4443"),
            ("wss://agent.example/x", "agent.example:443"),
            ("wss://[::1]:5/x", "[::1]:5"),
        ] {
            assert_eq!(AgentUrl::parse(url).expect("good").authority(), authority);
        }
        for url in ["", "ws://127.0.0.1/x", "https://x/", "wss:///x", "/x", "wss://a b/"] {
            assert!(AgentUrl::parse(url).is_err(), "{url}");
        }
    }
}
