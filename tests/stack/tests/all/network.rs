//! The ways that media takes through networks that do not let everything through: a router that gives every
//! destination another port, closed ports, no UDP at all, lost packets. The stack, a TURN server and the client are
//! in network namespaces of their own.
//!
//! The way is proved by the selected pair of candidates, the stream by frames that advance. The client is the
//! `webrtc` crate where it can be; it neither decodes nor speaks TURN over TCP, so the cases with loss and without UDP
//! are those of a browser.

use std::{
    fs,
    net::{SocketAddr, UdpSocket},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use fanlight_tests_stack::{
    SOON,
    browser::{during, watch},
    client::{Client, Habits, Way},
    namespaces::{CLIENT, Network, Place, ROUTER, SERVER, TURN},
    rest::Server,
    stack::{Stack, pattern},
    until,
};
use serde_json::{Value, json};
use tokio::process::{Child, Command};

/// Hexadecimal, as `openssl rand -hex 32` makes it.
const SECRET: &str = "6f1c0bd2f7e14f0c8a1f1a0c8a7f0e2f6f1c0bd2f7e14f0c8a1f1a0c8a7f0e2f";
/// Where the documentation has its TURN server.
const DOCUMENTED: &str = "192.0.2.20";
const TURN_UDP: &str = "turn:10.77.1.3:3478?transport=udp";
const TURN_TCP: &str = "turn:10.77.1.3:3478?transport=tcp";
/// Coturn, as the documentation sets it up.
struct Coturn {
    process: Child,
    _folder: tempfile::TempDir,
}

impl Coturn {
    async fn start() -> Result<Self> {
        let page = include_str!("../../../../docs/how-to/use-turn.md");
        let config = page
            .split("```ini\n")
            .nth(1)
            .and_then(|rest| rest.split("```").next())
            .context("the page has no configuration of Coturn")?;
        ensure!(config.contains(DOCUMENTED) && config.contains("=SECRET\n"), "the page has other names");
        let folder = tempfile::tempdir().context("making a folder")?;
        let config =
            config.replace(DOCUMENTED, &TURN.to_string()).replace("=SECRET\n", &format!("={SECRET}\n"));
        let path = folder.path().join("turnserver.conf");
        // As documented for a server on the internet: it relays to the instances and nowhere else.
        let config = config + &format!("denied-peer-ip=0.0.0.0-255.255.255.255\nallowed-peer-ip={SERVER}\n");
        // Where it writes to is not the documentation's: there may be another on this machine.
        let files = format!("log-file=stdout\npidfile={0}/pid\nuserdb={0}/db\n", folder.path().display());
        fs::write(&path, config + &files).context("writing Coturn's configuration")?;
        let process = Command::new("turnserver")
            .arg("-c")
            .arg(&path)
            .stdin(Stdio::null())
            .stdout(fs::File::create(folder.path().join("log"))?)
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .context("starting turnserver")?;
        until("Coturn answers", SOON, || async {
            Ok(Some(tokio::net::TcpStream::connect((TURN, 3478)).await.map(drop)?))
        })
        .await?;
        Ok(Self { process, _folder: folder })
    }

    async fn end(mut self) -> Result<()> {
        self.process.kill().await.context("ending turnserver")
    }
}

/// What the gateway told about a session for a client.
struct Invitation {
    gateway: Server,
    session: String,
    url: String,
    servers: Value,
}

impl Invitation {
    async fn new(stack: &Stack) -> Result<Self> {
        let body = json!({ "app": "pattern", "joinable": true, "idle_time_min": 10 });
        let answer = stack.gateway.post("/1.0/sessions", body).await?.expect(201)?;
        let told = answer.metadata();
        let text = |name: &str| told[name].as_str().map(str::to_owned).context("an incomplete answer");
        let (session, url) = (text("id")?, text("url")?);
        Ok(Self { gateway: stack.gateway.clone(), session, url, servers: told["stun_servers"].clone() })
    }

    /// For another client of the session.
    async fn again(&self) -> Result<Self> {
        let path = format!("/1.0/sessions/{}/join", self.session);
        let answer = self.gateway.post(&path, json!({})).await?.expect(200)?;
        let told = answer.metadata();
        let url = told["url"].as_str().context("an incomplete answer")?.to_owned();
        let (gateway, session) = (self.gateway.clone(), self.session.clone());
        Ok(Self { gateway, session, url, servers: told["stun_servers"].clone() })
    }

    fn urls(&self) -> Vec<&str> {
        let servers = self.servers.as_array().into_iter().flatten();
        let lists = servers.filter_map(|server| server["urls"].as_array());
        lists.flatten().filter_map(Value::as_str).collect()
    }
}

/// Starts a stack that others reach, invites to a session, does the rest, and ends all in good order.
async fn with_stack<F>(options: &[&str], rest: impl FnOnce(Invitation) -> F) -> Result<()>
where
    F: Future<Output = Result<()>>,
{
    let address = SERVER.to_string();
    let options: Vec<&str> = ["--listen", &address].into_iter().chain(options.iter().copied()).collect();
    let stack = Stack::start(&[pattern()], &options).await?;
    let invitation = Invitation::new(&stack).await?;
    let session = invitation.session.clone();
    rest(invitation).await?;
    stack.gateway.delete(&format!("/1.0/sessions/{session}")).await?.expect(200)?;
    stack.session_is_gone(&session).await?;
    stack.end().await
}

/// The same with Coturn in its place.
fn with_coturn<F>(network: &Network, rest: impl FnOnce(Place, Invitation) -> F + Send + 'static) -> Result<()>
where
    F: Future<Output = Result<()>>,
{
    let folder = tempfile::tempdir().context("making a folder")?;
    let secret = folder.path().join("turn-secret");
    fs::write(&secret, SECRET)?;
    let secret = secret.display().to_string();
    let (server, client) = (network.server(), network.client());
    network.turn().run(move || async move {
        let coturn = Coturn::start().await?;
        server
            .visit(move || async move {
                let options = ["--turn", TURN_UDP, "--turn", TURN_TCP, "--turn-secret", &secret];
                with_stack(&options, |invitation| async {
                    ensure!(invitation.urls() == [TURN_UDP, TURN_TCP], "told of {}", invitation.servers);
                    rest(client, invitation).await
                })
                .await
            })
            .await?;
        coturn.end().await
    })
}

/// Streams with the `webrtc` crate; the way that media took.
async fn stream(client: &Place, invitation: Invitation) -> Result<Way> {
    let way = client
        .visit(move || async move {
            let Invitation { gateway, url, servers, .. } = invitation;
            let habits = Habits { address: CLIENT, servers, ..Habits::default() };
            let client = Client::connect(&gateway, &url, habits).await?;
            client.streaming().await?;
            for _ in 0..5 {
                client.more_frames(30).await?;
                // A way that holds for the beginning alone would not do.
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            let way = client.way().await?;
            client.leave().await?;
            Ok(way)
        })
        .await?;
    println!("media took the way {way:?}");
    Ok(way)
}

/// Streams with a browser that decodes; what it saw while frames went on without a long pause.
async fn browse(client: &Place, invitation: Invitation) -> Result<Value> {
    let Invitation { url, servers, .. } = invitation;
    client.visit(move || async move { watch(&url, &servers).await }).await
}

/// The port under which the client is seen by a place, out of one and the same socket for all of them.
fn ports_behind_the_router(network: &Network) -> Result<Vec<u16>> {
    let (to_test, addresses) = std::sync::mpsc::channel();
    let mut listeners = Vec::new();
    for (place, ip) in [(network.server(), SERVER), (network.turn(), TURN)] {
        let to_test = to_test.clone();
        listeners.push(std::thread::spawn(move || {
            place.within(move || {
                let socket = UdpSocket::bind((ip, 0))?;
                socket.set_read_timeout(Some(SOON))?;
                to_test.send(socket.local_addr()?)?;
                let (_, from) = socket.recv_from(&mut [0; 8]).context("nothing comes through the router")?;
                ensure!(from.ip() == ROUTER, "it comes from {from}");
                Ok(from.port())
            })
        }));
    }
    let addresses: Vec<SocketAddr> = addresses.iter().take(listeners.len()).collect();
    network.client().within(move || {
        let socket = UdpSocket::bind((CLIENT, 0))?;
        // The first packets on a new link may be lost.
        for _ in 0..20 {
            for address in &addresses {
                socket.send_to(b"hello", address)?;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    })?;
    let panicked = |_| anyhow::anyhow!("a listener panicked");
    listeners.into_iter().map(|listener| listener.join().map_err(panicked)?).collect()
}

#[test]
fn behind_a_symmetric_nat_media_goes_straight_to_the_server() -> Result<()> {
    let network = Network::new()?;
    let ports = ports_behind_the_router(&network)?;
    ensure!(ports.len() == 2 && ports[0] != ports[1], "the router is no symmetric NAT: {ports:?}");
    with_coturn(&network, |client, invitation| async move {
        let way = stream(&client, invitation).await?;
        ensure!(way.local != "relay" && way.remote.ip() == SERVER, "{way:?}");
        Ok(())
    })?;
    network.end()
}

#[test]
fn where_the_server_is_blocked_media_goes_through_coturn_over_udp() -> Result<()> {
    let network = Network::new()?;
    network.router().filter(&[
        "ip daddr 10.77.1.2 meta l4proto udp counter drop",
        "ip saddr 10.77.1.2 meta l4proto udp counter drop",
    ])?;
    with_coturn(&network, |client, invitation| async move {
        let way = stream(&client, invitation).await?;
        ensure!(way.local == "relay" && way.remote.ip() == SERVER, "{way:?}");
        Ok(())
    })?;
    ensure!(network.router().counted()? > 0, "nothing was blocked");
    network.end()
}

#[test]
fn without_any_udp_media_goes_through_coturn_over_tcp() -> Result<()> {
    let network = Network::new()?;
    network.router().filter(&["meta l4proto udp counter drop"])?;
    with_coturn(&network, |client, invitation| async move {
        let seen = browse(&client, invitation).await?;
        let way = &seen["last"]["way"];
        ensure!(way["local"] == "relay" && way["relayProtocol"] == "tcp", "{way}");
        Ok(())
    })?;
    ensure!(network.router().counted()? > 0, "nothing was blocked");
    network.end()
}

#[test]
fn where_only_the_embedded_turn_server_is_open_media_goes_through_it() -> Result<()> {
    let network = Network::new()?;
    let (router, client) = (network.router(), network.client());
    network.server().run(move || async move {
        with_stack(&[], |invitation| async {
            let [url] = invitation.urls()[..] else { bail!("told of {}", invitation.servers) };
            let open = url.strip_prefix("turn:").and_then(|url| url.strip_suffix("?transport=udp"));
            let open: SocketAddr =
                open.context("no TURN over UDP")?.parse().context("reading its address")?;
            ensure!(open.ip() == SERVER, "the client is told of {open}");
            let port = open.port();
            router.filter(&[
                &format!("meta l4proto udp ip daddr {SERVER} udp dport != {port} counter drop"),
                &format!("meta l4proto udp ip saddr {SERVER} udp sport != {port} counter drop"),
            ])?;
            let another = invitation.again().await?;
            let way = stream(&client, invitation).await?;
            ensure!(way.local == "relay" && way.remote.ip() == SERVER, "{way:?}");
            let seen = browse(&client, another).await?;
            let way = &seen["last"]["way"];
            ensure!(way["local"] == "relay" && way["relayProtocol"] == "udp", "{way}");
            ensure!(router.counted()? > 0, "nothing was blocked");
            Ok(())
        })
        .await
    })?;
    network.end()
}

/// Pictures go on although of 100 packets this many are lost, each way.
fn with_loss(percent: u32) -> Result<()> {
    let network = Network::new()?;
    network
        .router()
        .filter(&[&format!("meta l4proto udp numgen random mod 100 < {percent} counter drop")])?;
    let client = network.client();
    network.server().run(move || async move {
        with_stack(&[], |invitation| async {
            // No way but the lossy one.
            let invitation = Invitation { servers: json!([]), ..invitation };
            let seen = browse(&client, invitation).await?;
            ensure!(seen["last"]["way"]["local"] != "relay", "{}", seen["last"]["way"]);
            // What was lost was asked for again, and came. Some packets come twice without being asked for, when the
            // sender looks how much the network carries.
            let (asked, came) = (during(&seen, "nackCount"), during(&seen, "retransmittedPacketsReceived"));
            ensure!(asked > 10.0 && came > 0.8 * asked, "{asked} were asked for again, {came} came");
            Ok(())
        })
        .await
    })?;
    let lost = network.router().counted()?;
    println!("{lost} packets were lost");
    ensure!(lost > 10, "hardly anything was lost: {lost}");
    network.end()
}

#[test]
fn pictures_go_on_with_two_percent_loss() -> Result<()> {
    with_loss(2)
}

#[test]
fn pictures_go_on_with_five_percent_loss() -> Result<()> {
    with_loss(5)
}
