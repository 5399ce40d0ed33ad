//! The resolver's relay between a guest's network stack and resolvers of the test on loopback.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use common::{Bed, Guest};
use wrenn_net::SlotPool;
use wrenn_net::relay::{self, RelayFiles, Upstreams};

/// A query for `name`.
fn query(id: u16, name: &str) -> Vec<u8> {
    let mut bytes = id.to_be_bytes().to_vec();
    bytes.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.split('.') {
        bytes.push(u8::try_from(label.len()).unwrap());
        bytes.extend(label.bytes());
    }
    bytes.extend([0, 0, 1, 0, 1]);
    bytes
}

/// The answer a resolver of the test gives: the query, marked, with `tag` as its one address.
fn answer(query: &[u8], tag: u8) -> Vec<u8> {
    let mut bytes = query.to_vec();
    bytes[2] |= 0x80;
    bytes[7] = 1;
    bytes.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 9, 9, 9, tag]);
    bytes
}

/// A resolver on loopback by UDP and TCP. Before each true answer by UDP it sends what a forger
/// might: another number, and another name.
fn resolver(tag: u8) -> SocketAddr {
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = tcp.local_addr().unwrap();
    let udp = UdpSocket::bind(addr).unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok((len, from)) = udp.recv_from(&mut buffer) {
            let asked = &buffer[..len];
            let mut forged = answer(asked, 66);
            forged[0] ^= 0xff;
            udp.send_to(&forged, from).unwrap();
            let mut forged = answer(asked, 66);
            forged[13] ^= 1;
            udp.send_to(&forged, from).unwrap();
            udp.send_to(&answer(asked, tag), from).unwrap();
        }
    });
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = tcp.accept() {
            let asked = read_message(&mut stream);
            write_message(&mut stream, &answer(&asked, tag));
        }
    });
    addr
}

fn read_message(stream: &mut TcpStream) -> Vec<u8> {
    let mut len = [0; 2];
    stream.read_exact(&mut len).unwrap();
    let mut message = vec![0; usize::from(u16::from_be_bytes(len))];
    stream.read_exact(&mut message).unwrap();
    message
}

fn write_message(stream: &mut TcpStream, message: &[u8]) {
    let mut bytes = u16::try_from(message.len()).unwrap().to_be_bytes().to_vec();
    bytes.extend_from_slice(message);
    stream.write_all(&bytes).unwrap();
}

/// A relay on loopback; its thread ends with the process.
fn relay_on_loopback(upstreams: Upstreams) -> SocketAddr {
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = tcp.local_addr().unwrap();
    let udp = UdpSocket::bind(addr).unwrap();
    let openings = UdpSocket::bind("127.0.0.1:0").unwrap();
    let notice = common::notice("generation 1\ninternet on\n");
    let refused = tempfile::tempfile().unwrap();
    let files = vec![
        udp.into(),
        tcp.into(),
        openings.into(),
        notice.into(),
        refused.into(),
    ];
    let files = RelayFiles::from_descriptors(files).unwrap();
    std::thread::spawn(move || relay::serve(files, upstreams));
    addr
}

fn ask(addr: SocketAddr, message: &[u8]) -> std::io::Result<Vec<u8>> {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(6)))
        .unwrap();
    socket.connect(addr).unwrap();
    socket.send(message).unwrap();
    let mut buffer = [0; 2048];
    let len = socket.recv(&mut buffer)?;
    Ok(buffer[..len].to_vec())
}

fn is_failure(reply: &[u8], asked: &[u8]) -> bool {
    reply[..2] == asked[..2] && reply[3] & 15 == 2
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_resolves_names_by_udp_and_tcp() {
    let bed = Bed::new("nra", 31);
    let pool = SlotPool::start(bed.config()).await.unwrap();
    let slot = pool.take().await.unwrap();
    let guest = Guest::new("nra-guest", &slot).await;
    let files = slot.relay().await.unwrap();
    let upstreams = Upstreams::fixed([resolver(7)]);
    std::thread::spawn(move || relay::serve(files, upstreams));

    let asked = query(4711, "example.org");
    assert_eq!(
        guest.ask("169.254.0.22:53", &asked).unwrap(),
        answer(&asked, 7)
    );
    let by_tcp = asked.clone();
    let replies = guest.net.inside(move || {
        let mut stream = TcpStream::connect("169.254.0.22:53").unwrap();
        // Two on one connection.
        [0, 1].map(|_| {
            write_message(&mut stream, &by_tcp);
            read_message(&mut stream)
        })
    });
    assert_eq!(replies, [answer(&asked, 7), answer(&asked, 7)]);
    let mut times = Vec::new();
    for _ in 0..50 {
        let start = Instant::now();
        guest.ask("169.254.0.22:53", &asked).unwrap();
        times.push(start.elapsed());
    }
    times.sort();
    eprintln!("a name: median {:?}, worst {:?}", times[25], times[49]);

    // This relay has no end, so the slot must not be handed on when it comes back.
    let index = slot.index();
    drop(guest);
    pool.give_back(slot).await;
    let next = pool.take().await.unwrap();
    assert_ne!(next.index(), index);
    pool.give_back(next).await;
    pool.shutdown().await;
}

#[test]
fn without_a_resolver_the_answer_is_failure_at_once() {
    let relay = relay_on_loopback(Upstreams::fixed([]));
    let asked = query(1, "example.org");
    let start = Instant::now();
    assert!(is_failure(&ask(relay, &asked).unwrap(), &asked));
    let mut stream = TcpStream::connect(relay).unwrap();
    write_message(&mut stream, &asked);
    assert!(is_failure(&read_message(&mut stream), &asked));
    assert!(start.elapsed() < Duration::from_secs(1));
}

#[test]
fn a_resolver_that_refuses_or_is_silent_is_passed_over() {
    let closed = UdpSocket::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
    let relay = relay_on_loopback(Upstreams::fixed([closed, resolver(8)]));
    let asked = query(2, "example.org");
    let start = Instant::now();
    assert_eq!(ask(relay, &asked).unwrap(), answer(&asked, 8));
    assert!(
        start.elapsed() < Duration::from_millis(500),
        "a refusal needs no time-out"
    );
    let relay = relay_on_loopback(Upstreams::fixed([
        silent.local_addr().unwrap(),
        resolver(9),
    ]));
    assert_eq!(ask(relay, &asked).unwrap(), answer(&asked, 9));
    let relay = relay_on_loopback(Upstreams::fixed([silent.local_addr().unwrap()]));
    let start = Instant::now();
    assert!(is_failure(&ask(relay, &asked).unwrap(), &asked));
    assert!(
        start.elapsed() < Duration::from_secs(5),
        "before the guest gives up"
    );
}

#[test]
fn a_flood_and_nonsense_leave_the_relay_working() {
    let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
    let relay = relay_on_loopback(Upstreams::fixed([silent.local_addr().unwrap()]));
    let flood = UdpSocket::bind("127.0.0.1:0").unwrap();
    flood
        .set_read_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    flood.connect(relay).unwrap();
    for len in 0..32 {
        flood.send(&vec![0xff; len]).unwrap();
    }
    // The kernel holds some 250 small datagrams for a socket, and drops the rest.
    std::thread::sleep(Duration::from_millis(100));
    // More than may be in flight: those beyond are answered with a failure at once.
    for id in 0..200 {
        flood.send(&query(id, "example.org")).unwrap();
    }
    let mut buffer = [0; 512];
    let mut failures = 0;
    while failures < 72 && flood.recv(&mut buffer).is_ok() {
        failures += 1;
    }
    assert_eq!(failures, 72, "200 queries, 128 of them in flight");
    let idle: Vec<_> = (0..40)
        .map(|_| TcpStream::connect(relay).unwrap())
        .collect();
    drop(idle);
    // All places are still taken by queries to a silent resolver: failure, but an answer.
    let asked = query(7, "example.org");
    assert!(is_failure(&ask(relay, &asked).unwrap(), &asked));
}
