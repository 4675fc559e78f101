//! What an instance says and what reaches it: readiness, events, packets from outside. Prints how long things take.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use fanlight_lxd::{Events, Lifecycle, Lxd, Port, Signal, StateAction};
use fanlight_tests_lxd::{Harness, NETWORK, SOON};
use tokio::{net::UdpSocket, time::timeout};

use crate::calls::{import, map, new_instance, remove, run, start};

/// A report as a program in an instance makes it; the image has no HTTP client but bash and Perl.
const READY: &str = r#"use IO::Socket::UNIX; my $s = IO::Socket::UNIX->new(Peer => "/dev/lxd/sock") or die $!;
my $b = '{"state":"Ready"}'; print $s "PATCH /1.0 HTTP/1.1\r\nHost: lxd\r\nConnection: close\r\n",
"Content-Type: application/json\r\nContent-Length: ", length $b, "\r\n\r\n$b"; print <$s>;"#;
const ECHO: &str = r#"use IO::Socket::INET; my $s = IO::Socket::INET->new(LocalPort => 7000, Proto => "udp") or die $!;
while ($s->recv(my $m, 1500)) { $s->send($m) }"#;

/// Sent one after the other to measure a way.
const PACKETS: usize = 3000;

async fn next(events: &mut Events, action: &str) -> Result<Lifecycle> {
    let find = async {
        loop {
            if let Signal::Event(event) = events.next().await
                && let Some(lifecycle) = event.lifecycle()
                && lifecycle.action == action
            {
                println!("event: {} {:?}", event.project, event.metadata);
                return lifecycle;
            }
        }
    };
    timeout(SOON, find).await.with_context(|| format!("no event {action}"))
}

async fn address(lxd: &Lxd, name: &str) -> Result<String> {
    let end = Instant::now() + SOON;
    loop {
        if let Some(address) = lxd.instance_state(name).await?.address("inet") {
            return Ok(address.to_owned());
        }
        ensure!(Instant::now() < end, "{name} has no address");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[test]
fn an_instance_reports_itself_and_is_reached_from_outside() {
    let harness = Harness::single().expect("LXD runs");
    let lxd = harness.unix(0).expect("a client");
    let test = async {
        let begun = Instant::now();
        let image = import(&lxd).await?;
        println!("import: {:?}", begun.elapsed());
        let mut events = lxd.events();
        ensure!(matches!(events.next().await, Signal::Connected));

        // The first start on a pool unpacks the image.
        for name in ["g1", "g2", "g3"] {
            let begun = Instant::now();
            lxd.create(&new_instance(name, &image, None)).await?.wait(SOON).await?;
            let created = begun.elapsed();
            start(&lxd, name).await?;
            let started = begun.elapsed();
            let address = address(&lxd, name).await?;
            println!(
                "launch {name}: created {created:?}, running {started:?}, {address} {:?}",
                begun.elapsed()
            );
        }
        ensure!(next(&mut events, "instance-started").await?.instance() == Some("g1"));
        let leases = lxd.leases(NETWORK).await?;
        ensure!(leases.iter().any(|lease| lease.hostname == "g1"), "{leases:?}");
        let begun = Instant::now();
        for _ in 0..10 {
            ensure!(run(&lxd, "g1", &["true"]).await?.0 == 0);
        }
        println!("exec: {:?} each of 10", begun.elapsed() / 10);

        let (code, answer) = run(&lxd, "g1", &["perl", "-e", READY]).await?;
        ensure!(code == 0 && answer.starts_with("HTTP/1.1 200"), "{answer}");
        // LXD 5.0.2 answers a report as it answers a question, and tells nobody.
        if lxd.server().await?.has("instance_ready_state") {
            ensure!(next(&mut events, "instance-ready").await?.instance() == Some("g1"));
            ensure!(lxd.instance("g1").await?.0.status == "Ready");
        } else {
            ensure!(lxd.instance("g1").await?.0.status == "Running");
        }
        for name in ["g2", "g3"] {
            remove(&lxd, name).await?;
        }

        packets(&lxd, &image).await?;

        lxd.change_state("g1", StateAction::Stop, SOON, true).await?.wait(SOON).await?;
        let begun = Instant::now();
        let published = lxd.publish("g1", &Default::default()).await?.wait(SOON).await?;
        println!("publish: {:?}", begun.elapsed());
        let fingerprint = published.metadata.as_ref().and_then(|metadata| metadata["fingerprint"].as_str());
        let fingerprint = fingerprint.context("a fingerprint")?.to_owned();
        ensure!(lxd.has_image(&fingerprint).await?);
        lxd.delete_image(&fingerprint).await?.wait(SOON).await?;
        lxd.delete("g1").await?.wait(SOON).await?;
        Ok(())
    };
    harness.within(test).expect("it reports itself and is reached");
}

/// From the hub, which has no route to the instances, through an address of the member: the kernel's translation, and
/// for comparison a proxy device, which is a process of LXD for each port.
async fn packets(lxd: &Lxd, image: &str) -> Result<()> {
    let mut instance = new_instance("u1", image, Some("10.155.0.77"));
    let proxy = [("type", "proxy"), ("listen", "udp:10.91.0.11:11000"), ("connect", "udp:127.0.0.1:7000")];
    instance.devices.insert("proxy".to_owned(), map(&proxy));
    lxd.create(&instance).await?.wait(SOON).await?;
    start(lxd, "u1").await?;
    ensure!(address(lxd, "u1").await? == "10.155.0.77");
    let program = format!("perl -e '{ECHO}' >/dev/null 2>&1 &");
    ensure!(run(lxd, "u1", &["sh", "-c", &program]).await?.0 == 0);
    lxd.ensure_forward(NETWORK, "10.91.0.11").await?;
    for number in 0..5 {
        let port = Port {
            description: "u1".into(),
            protocol: "udp".into(),
            listen_port: (10000 + number).to_string(),
            target_port: "7000".into(),
            target_address: "10.155.0.77".into(),
        };
        let begun = Instant::now();
        lxd.add_ports(NETWORK, "10.91.0.11", &[port]).await?;
        println!("forward: {:?}", begun.elapsed());
    }
    let socket = UdpSocket::bind("10.91.0.1:0").await?;
    ensure!(socket.connect("10.155.0.77:7000").await.is_err(), "there must be no route to the instances");
    for (way, target) in [("a forward", "10.91.0.11:10004"), ("a proxy device", "10.91.0.11:11000")] {
        let socket = UdpSocket::bind("10.91.0.1:0").await?;
        socket.connect(target).await?;
        comes_back(&socket).await.with_context(|| format!("through {way}"))?;
        let busy = busy_time()?;
        let mut times = Vec::new();
        for _ in 0..PACKETS {
            let begun = Instant::now();
            socket.send(&[7; 1200]).await?;
            let mut buffer = [0; 1500];
            timeout(SOON, socket.recv(&mut buffer)).await.with_context(|| format!("through {way}"))??;
            times.push(begun.elapsed());
        }
        times.sort();
        println!(
            "there and back through {way}: p50 {:?}, p99 {:?}, {:.0} µs of processors for each",
            times[PACKETS / 2],
            times[PACKETS * 99 / 100],
            (busy_time()? - busy) * 1e6 / PACKETS as f64
        );
    }
    remove(lxd, "u1").await?;
    lxd.remove_forward(NETWORK, "10.91.0.11").await?;
    Ok(())
}

/// The program needs a moment to begin.
async fn comes_back(socket: &UdpSocket) -> Result<()> {
    let mut buffer = [0; 1500];
    for _ in 0..100 {
        socket.send(b"hello").await?;
        if let Ok(Ok(length)) = timeout(Duration::from_millis(100), socket.recv(&mut buffer)).await {
            ensure!(&buffer[..length] == b"hello");
            return Ok(());
        }
    }
    bail!("no packet came back")
}

/// Seconds for which processors of this machine did something (`proc(5)`, `stat`).
fn busy_time() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/stat")?;
    let first = text.lines().next().context("a line of all processors")?;
    let ticks: Vec<f64> = first.split_whitespace().skip(1).map_while(|field| field.parse().ok()).collect();
    // Without idling and waiting for disks.
    let idle: f64 = ticks.iter().skip(3).take(2).sum();
    Ok((ticks.iter().take(8).sum::<f64>() - idle) / 100.0)
}
