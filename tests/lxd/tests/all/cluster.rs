//! A cluster of three: members, placement, emptying, and one whose LXD is killed.

use anyhow::{Context, Result, ensure};
use fanlight_lxd::{Port, Signal};
use fanlight_tests_lxd::{Harness, NETWORK, POOL, SOON};

use crate::calls::{import, map, new_instance, remove, start, trusted};

#[test]
fn a_cluster_is_one_server_with_members() {
    let mut harness = Harness::cluster().expect("LXD runs");
    let lxd = harness.unix(0).expect("a client");
    let test = async {
        let https = trusted(&harness, 1).await?;
        let mut names: Vec<_> = https.members().await?.into_iter().map(|member| member.server_name).collect();
        names.sort();
        ensure!(names == ["m1", "m2", "m3"], "{names:?}");
        ensure!(https.target("m3").resources().await?.cpu.total > 0);
        ensure!(https.target("m3").pool_space(POOL).await?.total > 1 << 30);
        let token = lxd.join_token("m4").await?;
        let (address, certificate) = token.certificate().await?;
        ensure!(token.addresses.contains(&address) && certificate.contains("BEGIN CERTIFICATE"));

        let image = import(&lxd).await?;
        let mut events = https.events();
        ensure!(matches!(events.next().await, Signal::Connected));
        let m2 = lxd.target("m2");
        m2.create(&new_instance("k1", &image, None)).await?.wait(SOON).await?;
        start(&lxd, "k1").await?;
        ensure!(lxd.instance("k1").await?.0.location == "m2");
        let seen = async {
            loop {
                if let Signal::Event(event) = events.next().await
                    && event.lifecycle().is_some_and(|lifecycle| lifecycle.action == "instance-started")
                {
                    return event.location;
                }
            }
        };
        ensure!(tokio::time::timeout(SOON, seen).await.context("no event")? == "m2");

        // Each member has its own addresses that lead to instances.
        m2.ensure_forward(NETWORK, "10.91.0.12").await?;
        let port = Port {
            description: "k1".into(),
            protocol: "tcp".into(),
            listen_port: "10000".into(),
            target_port: "80".into(),
            target_address: "10.155.0.50".into(),
        };
        m2.add_ports(NETWORK, "10.91.0.12", std::slice::from_ref(&port)).await?;
        ensure!(m2.forward(NETWORK, "10.91.0.12").await?.0.ports == [port]);
        m2.remove_forward(NETWORK, "10.91.0.12").await?;

        lxd.patch_config("k1", &map(&[("cluster.evacuate", "stop")]), None).await?;
        lxd.evacuate("m2").await?.wait(SOON).await?;
        ensure!(lxd.member("m2").await?.status == "Evacuated");
        ensure!(lxd.instance("k1").await?.0.status == "Stopped");
        lxd.restore("m2").await?.wait(SOON).await?;
        ensure!(lxd.member("m2").await?.status == "Online");
        remove(&lxd, "k1").await?;
        Result::<()>::Ok(())
    };
    harness.within(test).expect("the cluster works");

    harness.members()[2].kill().expect("LXD runs on m3");
    let lost = async {
        let end = std::time::Instant::now() + SOON;
        loop {
            if lxd.member("m3").await?.status == "Offline" {
                break;
            }
            ensure!(std::time::Instant::now() < end, "m3 stays online");
            tokio::time::sleep(std::time::Duration::from_millis(500)).await;
        }
        lxd.remove_member("m3", true).await?;
        ensure!(lxd.members().await?.len() == 2);
        Ok(())
    };
    harness.within(lost).expect("a lost member can be removed");
}
