//! Sessions out of containers, as users have them: the programs as they are installed, an image as `fanlight image
//! build` makes it, real media, a browser that decodes. The client is in a network that has no way to the containers.

use std::{
    fs,
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use fanlight_lxd::Lxd;
use fanlight_tests_lxd::{
    Harness, Neighbour,
    stack::{ADDRESS, Machine, start},
    wait,
};
use fanlight_tests_stack::{
    BOOT,
    browser::watch,
    client::{Client, Habits},
    stack::Stack,
    until,
};
use serde_json::{Value, json};

use crate::engine::left;

const TURN: &str = "10.91.0.2";
const TURN_UDP: &str = "turn:10.91.0.2:3478?transport=udp";
/// Hexadecimal, as `openssl rand -hex 32` makes it.
const SECRET: &str = "0b54c07be6a4b2e1f1a0c8a7f0e2f6f1c0bd2f7e14f0c8a1f1a0c8a7f0e2f6f1";

/// Coturn beside the hub, which is let through to where the nodes listen and to nothing else.
struct Coturn {
    process: Child,
    _place: Neighbour,
}

impl Coturn {
    fn start(harness: &Harness) -> Result<Self> {
        let place = harness.neighbour("turn", 2)?;
        let (config, log) = (harness.path("turnserver.conf"), harness.path("turnserver.log"));
        let folder = config.parent().context("a folder")?.display();
        fs::write(
            &config,
            format!(
                "listening-ip={TURN}\nrelay-ip={TURN}\nrealm=test\nuse-auth-secret\nstatic-auth-secret={SECRET}\n\
                 denied-peer-ip=0.0.0.0-255.255.255.255\nallowed-peer-ip={ADDRESS}\nno-tls\nno-dtls\nno-cli\n\
                 log-file=stdout\npidfile={folder}/turnserver.pid\nuserdb={folder}/turnserver.db\n"
            ),
        )?;
        let mut command = place.command("turnserver");
        command
            .arg("-c")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(fs::File::create(&log)?)
            .stderr(Stdio::null());
        let process = command.spawn().context("turnserver")?;
        let connect = format!("exec 3<>/dev/tcp/{TURN}/3478");
        wait("Coturn", || {
            let mut knock = place.command("bash");
            Ok(knock.args(["-c", &connect]).stderr(Stdio::null()).status()?.success())
        })?;
        Ok(Self { process, _place: place })
    }
}

impl Drop for Coturn {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A session with its address and servers.
struct Session {
    id: String,
    url: String,
    servers: Value,
}

async fn create(stack: &Stack, app: &str) -> Result<Session> {
    let body = json!({ "app": app, "joinable": true, "idle_time_min": 10 });
    told(stack.gateway.post("/1.0/sessions", body).await?.expect(201)?.metadata(), None)
}

async fn join(stack: &Stack, session: &Session) -> Result<Session> {
    let path = format!("/1.0/sessions/{}/join", session.id);
    told(stack.gateway.post(&path, json!({})).await?.expect(200)?.metadata(), Some(&session.id))
}

fn told(answer: &Value, id: Option<&str>) -> Result<Session> {
    let text = |name: &str| answer[name].as_str().map(str::to_owned).context("an incomplete answer");
    let id = id.map_or_else(|| text("id"), |id| Ok(id.to_owned()))?;
    Ok(Session { id, url: text("url")?, servers: answer["stun_servers"].clone() })
}

async fn end(stack: &Stack, session: &Session) -> Result<()> {
    stack.gateway.delete(&format!("/1.0/sessions/{}", session.id)).await?.expect(200)?;
    stack.session_is_gone(&session.id).await
}

/// Streams with the `webrtc` crate from the hub; from the call to the first frame.
async fn first_frame(stack: &Stack, session: &Session, begun: Instant) -> Result<(Client, Duration)> {
    let habits = Habits { address: "10.91.0.1".parse()?, ..Habits::default() };
    let client = Client::connect(&stack.gateway, &session.url, habits).await?;
    client.streaming().await?;
    Ok((client, begun.elapsed()))
}

#[test]
fn a_session_streams_from_a_container_through_its_port_through_coturn_and_from_a_pool() {
    let mut harness = Harness::single().expect("LXD runs");
    let machine = Machine::prepare(&mut harness).expect("image and applications");
    let coturn = Coturn::start(&harness).expect("Coturn runs");
    let secret = harness.path("turn-secret");
    fs::write(&secret, SECRET).expect("written");
    let secret = secret.display().to_string();
    let lxd = harness.unix(0).expect("a client");
    let test = async {
        let stack = start(&machine, &["--turn", TURN_UDP, "--turn-secret", &secret]).await?;
        through_the_port(&stack).await.context("through the port")?;
        harness.filter(&[&format!("ip daddr {ADDRESS} meta l4proto udp drop")])?;
        through_coturn(&stack).await.context("through Coturn")?;
        harness.filter(&[])?;
        as_with_processes(&stack).await.context("the command")?;
        from_the_pool(&stack).await.context("from the pool")?;
        ended(stack, &lxd).await
    };
    harness.within(test).expect("sessions stream from containers");
    drop(coturn);
}

async fn through_the_port(stack: &Stack) -> Result<()> {
    let begun = Instant::now();
    let session = create(stack, "pattern").await?;
    let (client, took) = first_frame(stack, &session, begun).await?;
    println!("first frame of the first session: {took:?}");
    let way = client.way().await?;
    ensure!(way.local != "relay" && way.remote.ip().to_string() == ADDRESS, "{way:?}");
    ensure!((20_000..30_000).contains(&way.remote.port()), "{way:?}");
    client.more_frames(60).await?;
    ensure!(client.seen().video.codec == "video/h264", "{:?}", client.seen().video);
    client.leave().await?;

    let again = join(stack, &session).await?;
    let seen = watch(&again.url, &json!([])).await?;
    ensure!(seen["last"]["way"]["local"] != "relay", "{}", seen["last"]["way"]);
    end(stack, &session).await
}

async fn through_coturn(stack: &Stack) -> Result<()> {
    let session = create(stack, "pattern").await?;
    ensure!(session.servers.to_string().contains(TURN_UDP), "told of {}", session.servers);
    let seen = watch(&session.url, &session.servers).await?;
    let way = &seen["last"]["way"];
    // The node shows containers another address than the server's, so a browser calls its own end reflexive.
    let local = way["local"].as_str().unwrap_or_default();
    ensure!(["relay", "prflx"].contains(&local) && way["relayProtocol"] == "udp", "{way}");
    end(stack, &session).await
}

/// `launch`, `exec`, `ls` and `delete` are the same as with processes.
async fn as_with_processes(stack: &Stack) -> Result<()> {
    let id = stack.command(&["launch"], &["terminal"]).await?;
    let id = id.lines().last().context("the command tells the instance")?.trim().to_owned();
    let listed = stack.command(&["ls"], &["--format", "json"]).await?;
    let listed: Value = serde_json::from_str(&listed).with_context(|| listed.clone())?;
    let shown = listed.as_array().and_then(|all| all.iter().find(|one| one["id"] == id.as_str()));
    ensure!(shown.is_some_and(|shown| shown["status"] == "running"), "{listed}");
    let said = stack.command(&["exec"], &[&id, "--", "cat", "/proc/1/comm"]).await?;
    ensure!(said == "systemd", "{said:?}");
    for command in [&["logs"][..], &["show-log"]] {
        let log = if command[0] == "logs" { vec![id.as_str()] } else { vec![id.as_str(), "streamer.log"] };
        let log = stack.command(command, &log).await?;
        ensure!(log.contains("has shown its first window"), "{command:?}: {log:?}");
    }
    stack.command(&["delete"], &[&id, "--yes"]).await?;
    Ok(())
}

async fn from_the_pool(stack: &Stack) -> Result<()> {
    let mut old = String::new();
    for start in ["streamer", "application"] {
        let body = json!({ "pool": { "size": 1, "start": start } });
        let answer = stack.ams.call(reqwest::Method::PATCH, "/1.0/applications/pattern", Some(body)).await?;
        stack.operation(&answer.expect(202)?).await?;
        // One of the other kind is replaced first.
        let waiting = until("one instance waits", BOOT, || async {
            let answer = stack.ams.get("/1.0/instances?recursion=1").await?.expect(200)?;
            let all = answer.metadata().as_array().cloned().unwrap_or_default();
            let mut waiting = all.iter().filter(|one| one["pool"] == "waiting" && one["status"] == "running");
            let id = waiting.next().and_then(|one| one["id"].as_str()).map(str::to_owned);
            Ok(id.filter(|id| waiting.next().is_none() && *id != old))
        })
        .await?;
        let begun = Instant::now();
        let session = create(stack, "pattern").await?;
        let (client, took) = first_frame(stack, &session, begun).await?;
        println!("first frame from the pool ({start}): {took:?}");
        client.more_frames(30).await?;
        client.leave().await?;
        let instance = stack.instance(&session.id).await?;
        ensure!(waiting == instance, "{instance} is not the one that waited: {waiting}");
        end(stack, &session).await?;
        old = waiting;
    }
    let body = json!({ "pool": { "size": 0 } });
    let answer = stack.ams.call(reqwest::Method::PATCH, "/1.0/applications/pattern", Some(body)).await?;
    stack.operation(&answer.expect(202)?).await
}

/// Nothing is left of the instances that ended, and those that are there go with the stack.
async fn ended(stack: Stack, lxd: &Lxd) -> Result<()> {
    until("all instances are gone", BOOT, || async {
        let answer = stack.ams.get("/1.0/instances").await?.expect(200)?;
        Ok(answer.metadata().as_array().is_some_and(Vec::is_empty).then_some(()))
    })
    .await?;
    stack.end().await?;
    let left = left(lxd, None, ADDRESS).await?;
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}
