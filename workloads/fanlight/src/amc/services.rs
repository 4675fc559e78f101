//! Ports of instances as the original's command line writes them: `[+][NAME:]PROTOCOL[,PROTOCOL]:PORT[-END]`.

use fanlight_api::ams::Service;

/// The service that a text means.
///
/// # Errors
/// Says which part is wrong.
pub fn parse(text: &str) -> Result<Service, String> {
    let (expose, rest) = match text.strip_prefix('+') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let tcp = |name: &str, port| Service {
        name: name.into(),
        port,
        protocols: vec!["tcp".into()],
        expose,
        ..Service::default()
    };
    match rest {
        "adb" => return Ok(tcp("adb", 5559)),
        "ssh" => return Ok(tcp("ssh", 22)),
        _ => {}
    }
    let parts: Vec<&str> = rest.split(':').collect();
    let (name, protocols, ports) = match parts[..] {
        [name, protocols, ports] if !name.is_empty() => (name, protocols, ports),
        [protocols, ports] => ("", protocols, ports),
        _ => return Err("expected [+][NAME:]PROTOCOL[,PROTOCOL]:PORT[-END], ssh or adb".into()),
    };
    let protocols: Vec<String> = protocols.split(',').map(str::to_owned).collect();
    if let Some(wrong) = protocols.iter().find(|protocol| !matches!(protocol.as_str(), "tcp" | "udp")) {
        return Err(format!("protocol {wrong:?} is not tcp or udp"));
    }
    let port = |text: &str| {
        let port = text.parse::<u16>().ok().filter(|port| *port > 0);
        port.ok_or_else(|| format!("port {text:?} is not a number from 1 to 65535"))
    };
    let (port, port_end) = match ports.split_once('-') {
        Some((first, last)) => (port(first)?, port(last)?),
        None => (port(ports)?, 0),
    };
    if port_end != 0 && port_end < port {
        return Err(format!("the range {ports} ends before it begins"));
    }
    Ok(Service { name: name.into(), port, port_end, protocols, expose, ..Service::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_are_read_as_the_original_writes_them() {
        let service = parse("+web:tcp,udp:80-90").expect("valid");
        assert_eq!((service.name.as_str(), service.port, service.port_end), ("web", 80, 90));
        assert_eq!(service.protocols, ["tcp", "udp"]);
        assert!(service.expose);
        let service = parse("udp:53").expect("valid");
        assert_eq!((service.name.as_str(), service.port, service.port_end), ("", 53, 0));
        assert!(!service.expose);
        assert_eq!(parse("ssh").expect("known").port, 22);
        assert_eq!(parse("+adb").expect("known").port, 5559);
    }

    #[test]
    fn services_that_make_no_sense_are_refused_with_the_reason() {
        for (text, reason) in [
            ("", "expected"),
            ("tcp", "expected"),
            (":tcp:80", "expected"),
            ("a:b:c:d", "expected"),
            ("sctp:80", "sctp"),
            ("tcp:0", "\"0\""),
            ("tcp:65536", "65536"),
            ("tcp:9-8", "ends before"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.contains(reason), "{text}: {error}");
        }
    }
}
