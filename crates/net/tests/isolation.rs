//! What a guest can reach and what not, from a network stack that sits where a guest does.
//! Nothing here sends to an address outside of this machine: every address used is either the
//! host's own or routed into a namespace of the test.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use common::{AT_ONCE, Bed, Guest, Listener, World, host_objects, policy, refused_at_once, run};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use wrenn_net::{Slot, SlotPool};

/// From the host itself: proof that somebody listens.
fn answers_the_host(addr: &str) {
    let addr: SocketAddr = addr.parse().unwrap();
    TcpStream::connect_timeout(&addr, Duration::from_secs(2))
        .unwrap_or_else(|e| panic!("{addr}: {e}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn g35_a_guest_reaches_the_internet_and_nothing_else() {
    let world = World::new(
        "nia",
        11,
        &[
            "203.0.113.11",
            "198.51.100.11",
            "172.31.99.11",
            "192.168.99.11",
            "100.99.99.11",
            "169.254.99.11",
            "198.19.99.11",
        ],
    );
    let bed = Bed::new("nia", 11);
    let mut config = bed.config();
    // Stands for the internet; the documentation range beside it stays closed.
    config.open = vec!["203.0.113.11/32".parse().unwrap()];
    let pool = SlotPool::start(config).await.unwrap();
    let (slot, other) = (pool.take().await.unwrap(), pool.take().await.unwrap());
    let guest = Guest::new("nia-guest", &slot).await;
    let neighbour = Guest::new("nia-neighbour", &other).await;

    let internet = Listener::inside(&world.net, "0.0.0.0:7001");
    let on_host = Listener::on("0.0.0.0:0");
    let in_neighbour = Listener::inside(&neighbour.net, "0.0.0.0:7002");
    let in_slot = common::inside(slot.namespace().to_str().unwrap(), || {
        std::net::TcpListener::bind("0.0.0.0:7003").unwrap()
    });

    // Controls: what is open works, and each closed address would answer if it were not closed.
    let (result, took) = guest.connect("203.0.113.11:7001");
    assert_eq!(result, Ok(()), "the internet");
    eprintln!("connect through both tables: {took:?}");
    for addr in &world.addrs {
        answers_the_host(&format!("{addr}:7001"));
    }
    let port = in_neighbour.addr.port();
    other.guest().connect(port).await.unwrap();

    // The world: private, carrier, link-local, benchmark, documentation.
    for addr in &world.addrs[1..] {
        refused_at_once(&guest, &format!("{addr}:7001"));
    }
    refused_at_once(&guest, "10.250.11.2:7001");
    // The host, by every address it has.
    let port = on_host.addr.port();
    let mut of_host: Vec<String> = run("ip -o -4 addr show")
        .lines()
        .filter_map(|line| {
            Some(
                line.split_whitespace()
                    .nth(3)?
                    .split('/')
                    .next()?
                    .to_owned(),
            )
        })
        .filter(|addr| !addr.starts_with("127."))
        .collect();
    of_host.push(world.host.clone());
    assert!(of_host.len() >= 3, "{of_host:?}");
    for addr in of_host {
        // Other tests' links come and go meanwhile.
        if TcpStream::connect_timeout(&format!("{addr}:{port}").parse().unwrap(), AT_ONCE).is_ok() {
            refused_at_once(&guest, &format!("{addr}:{port}"));
        }
    }
    // The other guest, behind its slot's address, and that slot itself.
    refused_at_once(&guest, &format!("{}:7002", other.outside_addr()));
    refused_at_once(&guest, &format!("{}:53", other.outside_addr()));
    // Its own slot, resolver port aside, by both addresses.
    refused_at_once(&guest, "169.254.0.22:7003");
    refused_at_once(&guest, &format!("{}:7003", slot.outside_addr()));
    // Metadata, multicast, reserved, broadcast.
    for addr in [
        "169.254.169.254:80",
        "168.63.129.16:80",
        "240.0.0.1:80",
        "0.0.0.1:80",
    ] {
        refused_at_once(&guest, addr);
    }
    for addr in ["224.0.0.251:5353", "172.31.99.11:7001", "169.254.0.22:67"] {
        let start = Instant::now();
        let error = guest.ask(addr, b"anybody?").unwrap_err();
        assert!(
            addr.starts_with("224") || start.elapsed() < AT_ONCE,
            "{addr}: {error}"
        );
    }

    drop((guest, neighbour, in_slot, internet));
    pool.give_back(slot).await;
    pool.give_back(other).await;
    pool.shutdown().await;
    drop(world);
    assert_eq!(host_objects("nia"), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn g35_neither_ipv6_nor_a_forged_source_gets_out() {
    let world = World::new("nib", 12, &["203.0.113.12"]);
    let bed = Bed::new("nib", 12);
    let mut config = bed.config();
    config.open = vec!["203.0.113.12/32".parse().unwrap()];
    let pool = SlotPool::start(config).await.unwrap();
    let slot = pool.take().await.unwrap();
    let guest = Guest::new("nib-guest", &slot).await;

    let ear = world
        .net
        .inside(|| UdpSocket::bind("0.0.0.0:7001").unwrap());
    ear.set_read_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    let mut buffer = [0; 64];
    guest.net.ip("addr add 10.77.0.1/32 dev eth0");
    guest.net.ip("addr add 8.8.4.4/32 dev eth0");
    let send = |from: &'static str| {
        guest.net.inside(move || {
            UdpSocket::bind((from, 0))
                .unwrap()
                .send_to(from.as_bytes(), "203.0.113.12:7001")
                .unwrap()
        })
    };
    // The control comes first, and with it the gateway's MAC into the guest's table.
    send("169.254.0.21");
    let (len, from) = ear.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..len], b"169.254.0.21");
    assert_eq!(
        from.ip().to_string(),
        world.host,
        "masqueraded behind the host"
    );
    for forged in ["10.77.0.1", "8.8.4.4"] {
        send(forged);
        assert!(
            ear.recv_from(&mut buffer).is_err(),
            "a packet from {forged} arrived"
        );
    }

    // The guest has IPv6 and knows where to send it; the world answers by IPv6 on the host's
    // side of the slot, if anything does.
    guest.net.ip("addr add fd00:77::21/64 dev eth0 nodad");
    guest
        .net
        .ip("neigh add fd00:77::22 lladdr 02:fc:00:00:00:06 dev eth0");
    guest.net.ip("route add default via fd00:77::22");
    let on_host = Listener::on("[::]:0");
    let port = on_host.addr.port();
    answers_the_host(&format!("[::1]:{port}"));
    for addr in [
        "fd00:77::22",
        "2001:db8::1",
        "::ffff:203.0.113.13",
        "64:ff9b::a00:1",
    ] {
        let (result, _) = guest.connect(&format!("[{addr}]:{port}"));
        assert!(result.is_err(), "{addr} answered");
    }
    let inside = run(&format!("ip -n {} -6 addr", slot.name()));
    assert_eq!(inside, "", "the slot has no IPv6 address");
    assert!(!run(&format!("ip -6 addr show dev {}", slot.name())).contains("inet6"));

    drop((guest, on_host));
    pool.give_back(slot).await;
    pool.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn g35_internet_off_cuts_open_connections_and_names_too() {
    let world = World::new("nic", 13, &["203.0.113.13"]);
    let bed = Bed::new("nic", 13);
    let mut config = bed.config();
    config.open = vec!["203.0.113.13/32".parse().unwrap()];
    let pool = SlotPool::start(config).await.unwrap();
    let slot = pool.take().await.unwrap();
    let guest = Guest::new("nic-guest", &slot).await;
    let internet = world
        .net
        .inside(|| std::net::TcpListener::bind("0.0.0.0:7001").unwrap());

    let mut stream = guest
        .net
        .inside(|| TcpStream::connect("203.0.113.13:7001").unwrap());
    let (mut served, _) = internet.accept().unwrap();
    stream.write_all(b"one").unwrap();
    let mut buffer = [0; 3];
    served.read_exact(&mut buffer).unwrap();

    let start = Instant::now();
    slot.set_policy(&policy(false, &[], &[])).await.unwrap();
    eprintln!("policy change: {:?}", start.elapsed());
    assert!(start.elapsed() < Duration::from_millis(100));
    stream.write_all(b"two").unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(2)))
        .unwrap();
    assert_eq!(
        stream.read(&mut buffer).unwrap_err().kind(),
        ErrorKind::ConnectionReset
    );
    refused_at_once(&guest, "203.0.113.13:7001");
    let start = Instant::now();
    assert!(guest.ask("169.254.0.22:53", b"any name").is_err());
    assert!(start.elapsed() < AT_ONCE);
    // The agent still reaches the guest.
    let in_guest = Listener::inside(&guest.net, "0.0.0.0:7002");
    slot.guest().connect(in_guest.addr.port()).await.unwrap();

    slot.set_policy(&policy(true, &[], &[])).await.unwrap();
    assert_eq!(guest.connect("203.0.113.13:7001").0, Ok(()));
    // A slot that was cut off comes back from the pool with the default.
    slot.set_policy(&policy(false, &[], &[])).await.unwrap();
    let index = slot.index();
    drop((guest, in_guest));
    pool.give_back(slot).await;
    let mut slots = Vec::new();
    let again = loop {
        let slot = pool.take().await.unwrap();
        if slot.index() == index {
            break slot;
        }
        slots.push(slot);
    };
    let guest = Guest::new("nic-guest2", &again).await;
    assert_eq!(guest.connect("203.0.113.13:7001").0, Ok(()));
    drop(guest);
    slots.push(again);
    for slot in slots {
        pool.give_back(slot).await;
    }
    pool.shutdown().await;
}

/// Packets the guest's interface has received.
fn received(guest: &Guest) -> u64 {
    guest.net.inside(|| {
        let table = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
        let line = table
            .lines()
            .find(|line| line.trim().starts_with("eth0:"))
            .unwrap();
        line.split_whitespace().nth(2).unwrap().parse().unwrap()
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn g35_open_flows_of_one_tenant_do_not_reach_the_next() {
    let world = World::new("nid", 14, &["203.0.113.14"]);
    let bed = Bed::new("nid", 14);
    let mut config = bed.config();
    config.open = vec!["203.0.113.14/32".parse().unwrap()];
    (config.ready, config.max_slots) = (1, 1);
    let pool = SlotPool::start(config).await.unwrap();
    let slot = pool.take().await.unwrap();
    let guest = Guest::new("nid-guest1", &slot).await;
    // The guest's connection outwards, and the agent's connection inwards.
    let internet = world
        .net
        .inside(|| std::net::TcpListener::bind("0.0.0.0:7001").unwrap());
    let outward = guest
        .net
        .inside(|| TcpStream::connect("203.0.113.14:7001").unwrap());
    let (mut served, _) = internet.accept().unwrap();
    let in_guest = guest
        .net
        .inside(|| std::net::TcpListener::bind("0.0.0.0:7002").unwrap());
    let dialer = slot.guest();
    let mut inward = dialer.connect(7002).await.unwrap();
    let (mut accepted, _) = in_guest.accept().unwrap();
    inward.write_all(b"hello").await.unwrap();
    let mut buffer = [0; 5];
    accepted.read_exact(&mut buffer).unwrap();
    assert!(received(&guest) > 0, "the counter counts");
    // The machine is gone without a word.
    drop(guest);
    inward
        .write_all(b"a secret of the first tenant")
        .await
        .unwrap();
    served.write_all(b"another").unwrap();
    pool.give_back(slot).await;
    assert_eq!(
        dialer.connect(7002).await.unwrap_err().kind(),
        ErrorKind::NotConnected
    );

    let slot = pool.take().await.unwrap();
    let guest = Guest::new("nid-guest2", &slot).await;
    served.write_all(b"more").unwrap();
    inward.write_all(b"and more").await.unwrap();
    // Several retransmissions of both.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert_eq!(
        received(&guest),
        0,
        "packets of the first tenant's connections"
    );
    drop((guest, outward, inward, accepted, in_guest));
    pool.give_back(slot).await;
    pool.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_dials_into_the_guest() {
    let bed = Bed::new("nie", 15);
    let pool = SlotPool::start(bed.config()).await.unwrap();
    let slot: Slot = pool.take().await.unwrap();
    let guest = Guest::new("nie-guest", &slot).await;
    let in_guest = Listener::inside(&guest.net, "0.0.0.0:7001");
    let dialer = slot.guest();
    let mut times = Vec::new();
    for _ in 0..50 {
        let start = Instant::now();
        let mut stream = dialer.connect(in_guest.addr.port()).await.unwrap();
        times.push(start.elapsed());
        let mut who = String::new();
        stream.read_to_string(&mut who).await.unwrap();
        assert_eq!(who, "169.254.0.22", "the guest sees its gateway");
    }
    times.sort();
    eprintln!("dial: median {:?}, worst {:?}", times[25], times[49]);
    assert_eq!(
        dialer.connect(7999).await.unwrap_err().kind(),
        ErrorKind::ConnectionRefused
    );
    // From the host there is no way in but this one.
    let addr = SocketAddr::from((slot.outside_addr(), in_guest.addr.port()));
    assert!(TcpStream::connect_timeout(&addr, Duration::from_millis(300)).is_err());
    drop(guest);
    pool.give_back(slot).await;
    pool.shutdown().await;
}

/// A mistake in one table opens nothing: each is tried without the other's denials.
#[tokio::test(flavor = "multi_thread")]
async fn g35_each_of_the_two_tables_is_enough() {
    let world = World::new(
        "nif",
        16,
        &["203.0.113.16", "198.51.100.16", "172.31.99.16"],
    );
    let bed = Bed::new("nif", 16);
    let mut config = bed.config();
    config.open = vec!["203.0.113.16/32".parse().unwrap()];
    let pool = SlotPool::start(config).await.unwrap();
    let (slot, other) = (pool.take().await.unwrap(), pool.take().await.unwrap());
    let guest = Guest::new("nif-guest", &slot).await;
    let internet = Listener::inside(&world.net, "0.0.0.0:7001");
    let on_host = Listener::on("0.0.0.0:0");
    let host = format!("{}:{}", world.host, on_host.addr.port());
    answers_the_host(&host);

    // The host's table alone.
    let netns = slot.name();
    run(&format!(
        "ip netns exec {netns} nft flush chain inet nif egress"
    ));
    run(&format!(
        "ip netns exec {netns} nft add rule inet nif egress accept"
    ));
    assert_eq!(guest.connect("203.0.113.16:7001").0, Ok(()));
    for addr in ["198.51.100.16:7001", "172.31.99.16:7001", &host] {
        refused_at_once(&guest, addr);
    }
    refused_at_once(&guest, &format!("{}:53", other.outside_addr()));

    // Proof that the tables are what refuses: without both, it answers.
    run("nft flush chain inet nif forward");
    run("nft flush chain inet nif input");
    for addr in ["198.51.100.16:7001", "172.31.99.16:7001", &host] {
        assert_eq!(guest.connect(addr).0, Ok(()), "{addr}");
    }

    // The slot's table alone.
    slot.set_policy(&policy(false, &[], &[])).await.unwrap();
    slot.set_policy(&policy(true, &[], &[])).await.unwrap();
    assert_eq!(guest.connect("203.0.113.16:7001").0, Ok(()));
    for addr in ["198.51.100.16:7001", "172.31.99.16:7001", &host] {
        refused_at_once(&guest, addr);
    }
    refused_at_once(&guest, &format!("{}:53", other.outside_addr()));

    drop((guest, internet, on_host));
    pool.give_back(slot).await;
    pool.give_back(other).await;
    pool.shutdown().await;
}
