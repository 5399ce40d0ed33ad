//! What a sandbox's own policy lets through, with real packets: lists of addresses, changed
//! while connections are open, and what is told about refusals. Nothing here leaves this
//! machine.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod common;

use std::collections::HashSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant, SystemTime};

use common::{Bed, Guest, Listener, World, policy, refused_at_once, run};
use wrenn_net::{AT_WITHIN, Denial, Limits, NetConfig, Reason, Slot, SlotPool};

/// A pool that opens these addresses of a [`World`], which stand for the internet.
async fn pool(bed: &Bed, open: &[&str], change: impl FnOnce(&mut NetConfig)) -> SlotPool {
    let mut config = bed.config();
    config.open = open.iter().map(|net| net.parse().unwrap()).collect();
    change(&mut config);
    SlotPool::start(config).await.unwrap()
}

/// A connection of the guest and its other end.
fn connected(guest: &Guest, listener: &TcpListener, addr: &str) -> (TcpStream, TcpStream) {
    let addr = addr.to_owned();
    let near = guest.net.inside(move || TcpStream::connect(addr).unwrap());
    let (far, _) = listener.accept().unwrap();
    for stream in [&near, &far] {
        let patience = Some(Duration::from_secs(2));
        stream.set_read_timeout(patience).unwrap();
    }
    (near, far)
}

fn works(near: &mut TcpStream, far: &mut TcpStream) {
    let mut buffer = [0; 4];
    near.write_all(b"ping").unwrap();
    far.read_exact(&mut buffer).unwrap();
    far.write_all(b"pong").unwrap();
    near.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"pong");
}

#[tokio::test(flavor = "multi_thread")]
async fn g35_a_deny_list_cuts_what_it_closes_and_nothing_else() {
    let world = World::new("npa", 41, &["203.0.113.41", "203.0.113.141"]);
    let bed = Bed::new("npa", 41);
    let pool = pool(&bed, &["203.0.113.0/24"], |_| {}).await;
    let slot = pool.take().await.unwrap();
    let guest = Guest::new("npa-guest", &slot).await;
    let internet = world
        .net
        .inside(|| TcpListener::bind("0.0.0.0:7001").unwrap());
    let (mut kept, mut kept_far) = connected(&guest, &internet, "203.0.113.41:7001");
    let (mut cut, mut cut_far) = connected(&guest, &internet, "203.0.113.141:7001");
    let (mut silent, mut silent_far) = connected(&guest, &internet, "203.0.113.141:7001");
    for (near, far) in [
        (&mut kept, &mut kept_far),
        (&mut cut, &mut cut_far),
        (&mut silent, &mut silent_far),
    ] {
        works(near, far);
    }

    slot.set_policy(&policy(true, &[], &["203.0.113.128/25"]))
        .await
        .unwrap();
    works(&mut kept, &mut kept_far);
    cut.write_all(b"more").unwrap();
    let mut buffer = [0; 8];
    let error = cut.read(&mut buffer).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    // Who only listens gets nothing either.
    silent_far.write_all(b"still there?").unwrap();
    let heard = silent.read(&mut buffer);
    assert!(heard.is_err(), "{heard:?} of what was sent after the cut");
    refused_at_once(&guest, "203.0.113.141:7001");
    assert_eq!(guest.connect("203.0.113.41:7001").0, Ok(()));

    // Allowed is allowed, whatever is denied beside it; replaced is replaced.
    slot.set_policy(&policy(true, &["203.0.113.141"], &["203.0.113.128/25"]))
        .await
        .unwrap();
    assert_eq!(guest.connect("203.0.113.141:7001").0, Ok(()));
    slot.set_policy(&policy(true, &[], &["203.0.113.41"]))
        .await
        .unwrap();
    assert_eq!(guest.connect("203.0.113.141:7001").0, Ok(()));
    refused_at_once(&guest, "203.0.113.41:7001");
    // Nothing but one address, and the internet off beside one address, is the same.
    for only in [
        policy(true, &["203.0.113.41"], &["0.0.0.0/0"]),
        policy(false, &["203.0.113.41"], &[]),
    ] {
        slot.set_policy(&only).await.unwrap();
        assert_eq!(guest.connect("203.0.113.41:7001").0, Ok(()));
        refused_at_once(&guest, "203.0.113.141:7001");
        assert!(guest.ask("169.254.0.22:53", b"a name").is_err());
    }

    // How long a change takes until it is in force.
    let mut times = Vec::new();
    for round in 0..50 {
        let deny = if round % 2 == 0 {
            "203.0.113.41"
        } else {
            "203.0.113.141"
        };
        let start = Instant::now();
        slot.set_policy(&policy(
            true,
            &["203.0.113.0/28"],
            &[deny, "198.51.100.0/24"],
        ))
        .await
        .unwrap();
        times.push(start.elapsed());
    }
    times.sort();
    eprintln!(
        "policy change: median {:?}, worst {:?}",
        times[25], times[49]
    );
    assert!(times[25] < Duration::from_millis(20), "{:?}", times[25]);

    drop(guest);
    pool.give_back(slot).await;
    pool.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn g35_no_policy_opens_what_the_host_forbids() {
    let forbidden = [
        "198.51.100.42",
        "172.31.99.42",
        "192.168.99.42",
        "169.254.99.42",
    ];
    let world = World::new("npb", 42, &[&["203.0.113.42"], &forbidden[..]].concat());
    let bed = Bed::new("npb", 42);
    let pool = pool(&bed, &["203.0.113.42/32"], |_| {}).await;
    let (slot, other) = (pool.take().await.unwrap(), pool.take().await.unwrap());
    let guest = Guest::new("npb-guest", &slot).await;
    let neighbour = Guest::new("npb-other", &other).await;
    let internet = Listener::inside(&world.net, "0.0.0.0:7001");
    let _in_neighbour = Listener::inside(&neighbour.net, "0.0.0.0:7001");
    let on_host = Listener::on("0.0.0.0:0");
    let port = on_host.addr.port();
    let mut closed: Vec<String> = forbidden
        .iter()
        .map(|addr| format!("{addr}:7001"))
        .collect();
    closed.extend([
        "10.250.42.2:7001".to_owned(),
        format!("{}:{port}", world.host),
        format!("{}:7001", other.outside_addr()),
        "169.254.169.254:80".to_owned(),
        "127.0.0.1:1".to_owned(),
    ]);
    // By IPv4 mapped into IPv6, as programs do it that know IPv6 only.
    let mapped: Vec<String> = closed
        .iter()
        .map(|addr| {
            format!(
                "[::ffff:{}]:{}",
                addr.split(':').next().unwrap(),
                &addr[addr.find(':').unwrap() + 1..]
            )
        })
        .collect();

    let all = &["0.0.0.0/0", "10.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"];
    for policy in [
        policy(true, &[], &[]),
        policy(true, all, &[]),
        policy(false, all, &["0.0.0.0/0"]),
        policy(true, &["198.51.100.42", &world.host], &[]),
    ] {
        slot.set_policy(&policy).await.unwrap();
        assert_eq!(guest.connect("203.0.113.42:7001").0, Ok(()), "{policy:?}");
        for addr in closed.iter().chain(&mapped) {
            refused_at_once(&guest, addr);
        }
        // The guest has no route by IPv6; with one of its own making nothing answers either.
        for addr in ["[fd00:77::22]:7001", "[fe80::1]:7001", "[2001:db8::1]:80"] {
            assert!(guest.connect(addr).0.is_err(), "{addr}");
        }
        assert_eq!(guest.connect("[::ffff:203.0.113.42]:7001").0, Ok(()));
    }
    drop((guest, neighbour, internet));
    pool.give_back(slot).await;
    pool.give_back(other).await;
    pool.shutdown().await;
}

/// The one denial of that destination and reason.
#[track_caller]
fn denial(of: &[Denial], destination: &str, reason: Reason) -> Denial {
    let found: Vec<&Denial> = of
        .iter()
        .filter(|denial| denial.destination.to_string() == destination && denial.reason == reason)
        .collect();
    assert_eq!(found.len(), 1, "{destination} {reason:?} in {of:?}");
    found[0].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn g35_refusals_are_counted_and_listed_with_their_reason() {
    let world = World::new("npc", 43, &["203.0.113.43", "203.0.113.143"]);
    let bed = Bed::new("npc", 43);
    let pool = pool(&bed, &["203.0.113.0/24"], |config| {
        (config.ready, config.max_slots) = (1, 2);
    })
    .await;
    let slot = pool.take().await.unwrap();
    let other = pool.take().await.unwrap();
    let guest = Guest::new("npc-guest", &slot).await;
    let internet = Listener::inside(&world.net, "0.0.0.0:7001");
    let on_host = Listener::on("0.0.0.0:0");
    assert_eq!(slot.denials().await.unwrap(), []);

    let begun = SystemTime::now();
    slot.set_policy(&policy(true, &[], &["203.0.113.143"]))
        .await
        .unwrap();
    assert_eq!(guest.connect("203.0.113.43:7001").0, Ok(()));
    for _ in 0..3 {
        refused_at_once(&guest, "203.0.113.143:7001");
    }
    refused_at_once(&guest, "10.9.9.9:443");
    for _ in 0..2 {
        assert!(guest.ask("203.0.113.143:123", b"what time is it?").is_err());
    }
    guest.net.inside(|| {
        use rustix::net::{AddressFamily, SendFlags, SocketType, ipproto, sendto, socket};
        let raw = socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::ICMP)).unwrap();
        // An echo request without number or content, which is its own checksum.
        let echo = [8, 0, 0xf7, 0xff, 0, 0, 0, 0];
        let to: SocketAddr = "203.0.113.143:0".parse().unwrap();
        sendto(&raw, &echo, SendFlags::empty(), &to).unwrap();
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    // Refused by the host and not by the slot: it has public addresses that no slot knows.
    run("ip addr add 203.0.113.243/32 dev npcw");
    refused_at_once(&guest, &format!("203.0.113.243:{}", on_host.addr.port()));
    let denials = slot.denials().await.unwrap();
    let of = |protocol: &str| -> Vec<Denial> {
        let by_name = |denial: &&Denial| denial.protocol_name() == protocol;
        denials.iter().filter(by_name).cloned().collect()
    };
    let tcp = denial(&of("tcp"), "203.0.113.143", Reason::Denied);
    assert_eq!((tcp.count, tcp.port), (3, Some(7001)));
    let udp = denial(&of("udp"), "203.0.113.143", Reason::Denied);
    assert_eq!((udp.count, udp.port), (2, Some(123)));
    let icmp = denial(&of("icmp"), "203.0.113.143", Reason::Denied);
    assert_eq!((icmp.count, icmp.port), (1, None));
    let private = denial(&denials, "10.9.9.9", Reason::Forbidden);
    assert_eq!((private.count, private.port), (1, Some(443)));
    let host = denial(&denials, "203.0.113.243", Reason::Forbidden);
    assert_eq!((host.count, host.port), (1, Some(on_host.addr.port())));
    assert_eq!(denials.len(), 5, "{denials:?}");
    for denial in &denials {
        let now = SystemTime::now() + AT_WITHIN;
        assert!(
            denial.at >= begun - AT_WITHIN && denial.at <= now,
            "{denial:?}"
        );
    }
    assert!(denials.is_sorted_by(|a, b| a.at >= b.at), "{denials:?}");
    assert_eq!(other.denials().await.unwrap(), [], "of another guest");

    // They stay through a change, and the same destination may be refused for another reason.
    slot.set_policy(&policy(false, &[], &[])).await.unwrap();
    refused_at_once(&guest, "203.0.113.143:7001");
    let denials = slot.denials().await.unwrap();
    denial(&denials, "203.0.113.143", Reason::InternetOff);
    assert_eq!(denials.len(), 6, "{denials:?}");

    // The next tenant of the slot sees none of them.
    let index = slot.index();
    drop((guest, internet));
    pool.give_back(other).await;
    pool.give_back(slot).await;
    let slots = [pool.take().await.unwrap(), pool.take().await.unwrap()];
    assert!(slots.iter().any(|slot| slot.index() == index));
    for slot in slots {
        assert_eq!(slot.denials().await.unwrap(), []);
        pool.give_back(slot).await;
    }
    pool.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn g35_more_refusals_than_are_remembered_are_refused_all_the_same() {
    let bed = Bed::new("npd", 44);
    let pool = pool(&bed, &[], |_| {}).await;
    let slot = pool.take().await.unwrap();
    let guest = Guest::new("npd-guest", &slot).await;
    guest.net.inside(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        for n in 0..3000_u16 {
            let [high, low] = n.to_be_bytes();
            // Refusals of earlier datagrams come back as errors of later ones.
            drop(socket.send_to(b"scan", (format!("10.99.{high}.{low}"), 9)));
            if n % 100 == 0 {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    });
    // As many as a slot remembers; the last ones had no room left.
    let listed = slot.denials().await.unwrap();
    assert_eq!(listed.len(), 1024);
    refused_at_once(&guest, "10.99.255.1:9");
    drop(guest);
    pool.give_back(slot).await;
    pool.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn g35_an_agent_that_follows_cuts_nothing_and_knows_the_policy() {
    let world = World::new("npe", 45, &["203.0.113.45", "203.0.113.145"]);
    let bed = Bed::new("npe", 45);
    let first = pool(&bed, &["203.0.113.0/24"], |_| {}).await;
    let slot = first.take().await.unwrap();
    let guest = Guest::new("npe-guest", &slot).await;
    let internet = world
        .net
        .inside(|| TcpListener::bind("0.0.0.0:7001").unwrap());
    let only = policy(false, &["203.0.113.45"], &[]);
    slot.set_policy(&only).await.unwrap();
    let (mut near, mut far) = connected(&guest, &internet, "203.0.113.45:7001");
    works(&mut near, &mut far);
    refused_at_once(&guest, "203.0.113.145:7001");

    // The agent is gone without a word, and with it everything it held.
    let index = slot.index();
    drop(slot);
    while first.stats().working > 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    drop(first);
    works(&mut near, &mut far);
    refused_at_once(&guest, "203.0.113.145:7001");

    let second = pool(&bed, &["203.0.113.0/24"], |_| {}).await;
    let slot: Slot = second.adopt(index).await.unwrap();
    let table = || {
        run(&format!(
            "ip netns exec npe-{index} nft list chain inet npe openings"
        ))
    };
    let before = table();
    slot.set_policy(&only).await.unwrap();
    assert_eq!(
        table(),
        before,
        "set again, the same policy changes nothing"
    );
    works(&mut near, &mut far);
    let denials = slot.denials().await.unwrap();
    assert_eq!(
        denial(&denials, "203.0.113.145", Reason::InternetOff).count,
        2
    );
    // A notice that is not whole: what is in force is unknown, so it is set anew.
    drop(slot);
    drop(second);
    let notice = bed.state().join(format!("net/policies/npe-{index}"));
    std::fs::write(&notice, "torn").unwrap();
    let third = pool(&bed, &["203.0.113.0/24"], |_| {}).await;
    let slot = third.adopt(index).await.unwrap();
    slot.set_policy(&only).await.unwrap();
    assert_ne!(table(), before);
    assert!(
        std::fs::read_to_string(&notice)
            .unwrap()
            .contains("203.0.113.45")
    );
    works(&mut near, &mut far);

    drop(guest);
    third.give_back(slot).await;
    third.sweep(&HashSet::new()).await.unwrap();
    third.shutdown().await;
    assert!(!notice.exists(), "the notice goes with its slot");
}

#[tokio::test(flavor = "multi_thread")]
async fn g35_connections_are_limited_in_number_and_rate() {
    let world = World::new("npf", 46, &["203.0.113.46"]);
    let bed = Bed::new("npf", 46);
    let pool = pool(&bed, &["203.0.113.46/32"], |config| {
        (config.ready, config.max_slots) = (1, 1);
        config.limits = Limits {
            connections: Some(8),
            connections_per_sec: Some(20),
            bytes_per_sec: None,
        };
    })
    .await;
    let slot = pool.take().await.unwrap();
    let guest = Guest::new("npf-guest", &slot).await;
    let internet = world
        .net
        .inside(|| TcpListener::bind("0.0.0.0:7001").unwrap());
    let mut open: Vec<_> = (0..8)
        .map(|_| connected(&guest, &internet, "203.0.113.46:7001"))
        .collect();
    refused_at_once(&guest, "203.0.113.46:7001");
    let denials = slot.denials().await.unwrap();
    let full = denial(&denials, "203.0.113.46", Reason::ConnectionLimit);
    assert_eq!(full.count, 1);
    // A change of policy neither forgets the open ones nor counts them again.
    slot.set_policy(&policy(true, &["203.0.113.46"], &["0.0.0.0/0"]))
        .await
        .unwrap();
    refused_at_once(&guest, "203.0.113.46:7001");
    for (near, far) in &mut open {
        works(near, far);
    }
    // The agent's own connections are none of the guest's.
    let in_guest = Listener::inside(&guest.net, "0.0.0.0:7002");
    slot.guest().connect(in_guest.addr.port()).await.unwrap();
    // Reset at both ends, so that nothing lingers.
    for (near, far) in open {
        for stream in [&near, &far] {
            rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO)).unwrap();
        }
    }
    let start = Instant::now();
    while guest.connect("203.0.113.46:7001").0.is_err() {
        assert!(start.elapsed() < Duration::from_secs(15), "none comes free");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    drop(internet);

    // The rate: 40 at once, less what the last tenant used a moment ago, then 20 per second.
    drop((guest, in_guest));
    pool.give_back(slot).await;
    let slot = pool.take().await.unwrap();
    let guest = Guest::new("npf-second", &slot).await;
    let refused = guest.net.inside(|| {
        let attempt = |_| TcpStream::connect("203.0.113.46:7009").is_err();
        (0..100).map(attempt).filter(|refused| *refused).count()
    });
    assert_eq!(refused, 100, "nobody listens there");
    let denials = slot.denials().await.unwrap();
    let fast = denial(&denials, "203.0.113.46", Reason::ConnectionRate);
    assert!((40..=90).contains(&fast.count), "{fast:?}");
    drop(guest);
    pool.give_back(slot).await;
    pool.shutdown().await;
}

/// Bytes per second in one direction, over two seconds after the first burst.
fn rate(from: &mut TcpStream, to: &mut TcpStream) -> f64 {
    let mut from = from.try_clone().unwrap();
    from.set_write_timeout(Some(Duration::from_secs(1)))
        .unwrap();
    let end = Instant::now() + Duration::from_secs(4);
    let sender = std::thread::spawn(move || {
        let block = vec![7; 64 * 1024];
        while Instant::now() < end {
            // A full buffer that nobody empties in time is no failure.
            drop(from.write(&block));
        }
    });
    let mut buffer = vec![0; 256 * 1024];
    let (mut received, mut begun) = (0, None);
    while Instant::now() < end {
        let len = to.read(&mut buffer).unwrap();
        match begun {
            None if Instant::now() + Duration::from_secs(2) >= end => begun = Some(Instant::now()),
            None => {}
            Some(_) => received += len,
        }
    }
    sender.join().unwrap();
    // What is still under way.
    to.set_read_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    while to.read(&mut buffer).is_ok_and(|len| len > 0) {}
    to.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    f64::from(u32::try_from(received).unwrap()) / begun.unwrap().elapsed().as_secs_f64()
}

#[tokio::test(flavor = "multi_thread")]
async fn g35_bandwidth_is_limited_both_ways() {
    const LIMIT: u64 = 2_000_000;
    let world = World::new("npg", 47, &["203.0.113.47"]);
    let bed = Bed::new("npg", 47);
    let pool = pool(&bed, &["203.0.113.47/32"], |config| {
        config.limits.bytes_per_sec = Some(LIMIT);
    })
    .await;
    let slot = pool.take().await.unwrap();
    let guest = Guest::new("npg-guest", &slot).await;
    let internet = world
        .net
        .inside(|| TcpListener::bind("0.0.0.0:7001").unwrap());
    let (mut near, mut far) = connected(&guest, &internet, "203.0.113.47:7001");
    works(&mut near, &mut far);
    let up = rate(&mut near, &mut far);
    let down = rate(&mut far, &mut near);
    eprintln!("limit {LIMIT} bytes/s: up {up:.0}, down {down:.0}");
    for rate in [up, down] {
        let share = rate / LIMIT as f64;
        assert!((0.25..1.15).contains(&share), "{share:.2} of the limit");
    }
    drop(guest);
    pool.give_back(slot).await;
    pool.shutdown().await;
}
