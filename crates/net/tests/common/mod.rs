//! What the tests share: a configuration per test, a guest without a machine, and a look at
//! the host's objects.
#![allow(dead_code)]

pub mod dns;
mod tap;

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use wrenn_net::{NetConfig, NetworkPolicy, Slot};

/// A policy of these lists.
pub fn policy(internet: bool, allow: &[&str], deny: &[&str]) -> NetworkPolicy {
    NetworkPolicy::read(internet, allow, deny).unwrap()
}

/// A test's own name prefix, subnet and folder, so that tests run side by side.
pub struct Bed {
    prefix: &'static str,
    subnet: String,
    folder: tempfile::TempDir,
}

impl Bed {
    pub fn new(prefix: &'static str, third: u8) -> Self {
        let subnet = format!("10.251.{third}.0/24");
        Self {
            prefix,
            subnet,
            folder: tempfile::tempdir().unwrap(),
        }
    }

    /// Where the pool keeps its notes.
    pub fn state(&self) -> &std::path::Path {
        self.folder.path()
    }

    pub fn config(&self) -> NetConfig {
        let mut config = NetConfig::new(self.folder.path());
        config.name_prefix = self.prefix.to_owned();
        config.subnet = self.subnet.parse().unwrap();
        config.max_slots = 60;
        config.ready = 2;
        config
    }
}

/// Runs a program and returns what it printed; panics if it fails.
pub fn run(line: &str) -> String {
    let mut words = line.split_whitespace();
    let output = Command::new(words.next().unwrap())
        .args(words)
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{line}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

/// Everything on the host that carries a prefix: namespaces, links, tables, mounts.
pub fn host_objects(prefix: &str) -> Vec<String> {
    let lists = [
        run("ip netns list"),
        run("ip -o link"),
        run("nft list tables"),
        std::fs::read_to_string("/proc/self/mounts").unwrap(),
    ];
    lists
        .iter()
        .flat_map(|list| list.lines())
        .filter(|line| {
            line.contains(&format!("{prefix}-")) || line.ends_with(&format!(" {prefix}"))
        })
        .map(str::to_owned)
        .collect()
}

/// What an agent tells a relay, as `docs/architecture.md` has it: a line about the rest, which
/// says its length and checksum (FNV-1a), then the rest.
pub fn notice(body: &str) -> File {
    let sum = body.bytes().fold(0x811c_9dc5_u32, |sum, byte| {
        (sum ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    let mut file = tempfile::tempfile().unwrap();
    let len = body.len();
    write!(file, "wrenn-network-policy 1 {len:08x} {sum:08x}\n{body}").unwrap();
    file
}

/// The world outside: a namespace behind a link of the host.
pub struct World {
    pub net: Netns,
    /// The host's address on that link.
    pub host: String,
    /// What the host routes there.
    pub addrs: Vec<String>,
}

impl World {
    pub fn new(name: &str, third: u8, addrs: &[&str]) -> Self {
        let net = Netns::new(&format!("{name}-world"));
        let host = format!("10.250.{third}.1");
        run(&format!(
            "ip link add {name}w type veth peer name eth0 netns {name}-world"
        ));
        run(&format!("ip addr add {host}/30 dev {name}w"));
        run(&format!("ip link set {name}w up"));
        net.ip(&format!("addr add 10.250.{third}.2/30 dev eth0"));
        net.ip("link set lo up");
        net.ip("link set eth0 up");
        net.ip(&format!("route add default via {host}"));
        for addr in addrs {
            net.ip(&format!("addr add {addr}/32 dev lo"));
            run(&format!("ip route add {addr}/32 via 10.250.{third}.2"));
        }
        Self {
            net,
            host,
            addrs: addrs.iter().map(ToString::to_string).collect(),
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // The link and the routes through it go with the namespace, but not at once.
        self.net.ip("link del eth0");
    }
}

/// Longer than an answer takes, far shorter than a time-out.
pub const AT_ONCE: Duration = Duration::from_millis(500);

#[track_caller]
pub fn refused_at_once(guest: &Guest, addr: &str) {
    let (result, took) = guest.connect(addr);
    assert!(result.is_err(), "{addr} answered the guest");
    assert!(took < AT_ONCE, "{addr}: {result:?} only after {took:?}");
}

/// A named namespace that goes with the value.
pub struct Netns(pub String);

impl Netns {
    pub fn new(name: &str) -> Self {
        run(&format!("ip netns add {name}"));
        Self(name.to_owned())
    }

    /// Runs `ip` inside.
    pub fn ip(&self, line: &str) -> String {
        run(&format!("ip -n {} {line}", self.0))
    }

    /// Runs `work` on a thread inside.
    pub fn inside<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        inside(&format!("/run/netns/{}", self.0), work)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        run(&format!("ip netns del {}", self.0));
    }
}

/// Runs `work` on a thread in the namespace at `path`.
pub fn inside<T: Send + 'static>(path: &str, work: impl FnOnce() -> T + Send + 'static) -> T {
    let namespace = File::open(path).unwrap();
    std::thread::spawn(move || {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        work()
    })
    .join()
    .unwrap()
}

/// A guest without a machine: a namespace with a Linux network stack of its own, whose frames a
/// thread carries to the slot's tap and back, as QEMU would.
pub struct Guest {
    pub net: Netns,
    stop: Arc<AtomicBool>,
    cable: Option<JoinHandle<()>>,
}

impl Guest {
    pub async fn new(name: &str, slot: &Slot) -> Self {
        let tap = slot.open_tap().await.unwrap();
        let net = Netns::new(name);
        let other = net.inside(|| tap::open("eth0"));
        net.ip("link set lo up");
        net.ip("link set eth0 address 02:fc:00:00:00:05 up");
        net.ip("addr add 169.254.0.21/30 dev eth0");
        net.ip("route add default via 169.254.0.22");
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let cable = std::thread::spawn(move || carry(&tap.into(), &other.into(), &stopped));
        Self {
            net,
            stop,
            cable: Some(cable),
        }
    }

    /// Connects by TCP: how it went, and how long it took.
    pub fn connect(&self, addr: &str) -> (Result<(), io::ErrorKind>, Duration) {
        let addr: SocketAddr = addr.parse().unwrap();
        // IPv6 is dropped without an answer.
        let patience = Duration::from_millis(if addr.is_ipv4() { 3000 } else { 500 });
        self.net.inside(move || {
            let start = Instant::now();
            let result = TcpStream::connect_timeout(&addr, patience);
            (
                result.map(drop).map_err(|error| error.kind()),
                start.elapsed(),
            )
        })
    }

    /// Sends a datagram and waits for one: what came, or what the kernel said.
    pub fn ask(&self, addr: &str, message: &[u8]) -> io::Result<Vec<u8>> {
        let addr: SocketAddr = addr.parse().unwrap();
        let message = message.to_vec();
        self.net.inside(move || {
            let any: IpAddr = if addr.is_ipv4() {
                Ipv4Addr::UNSPECIFIED.into()
            } else {
                "::".parse().unwrap()
            };
            let socket = UdpSocket::bind((any, 0))?;
            socket.set_read_timeout(Some(Duration::from_secs(1)))?;
            socket.connect(addr)?;
            socket.send(&message)?;
            let mut buffer = [0; 2048];
            let len = socket.recv(&mut buffer)?;
            Ok(buffer[..len].to_vec())
        })
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(cable) = self.cable.take() {
            cable.join().unwrap();
        }
    }
}

fn carry(a: &File, b: &File, stop: &AtomicBool) {
    let mut frame = vec![0; 70_000];
    while !stop.load(Ordering::Acquire) {
        let mut fds = [PollFd::new(a, PollFlags::IN), PollFd::new(b, PollFlags::IN)];
        poll(
            &mut fds,
            Some(&Timespec {
                tv_sec: 0,
                tv_nsec: 10_000_000,
            }),
        )
        .unwrap();
        let ready = fds.map(|fd| fd.revents().contains(PollFlags::IN));
        for (is_ready, mut from, mut to) in [(ready[0], a, b), (ready[1], b, a)] {
            if is_ready {
                let len = from.read(&mut frame).unwrap();
                // The other end may be down; then the frame is lost, as on a real cable.
                drop(to.write(&frame[..len]));
            }
        }
    }
}

/// A TCP listener that accepts and forgets, as long as the value lives.
pub struct Listener {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    pub addr: SocketAddr,
}

impl Listener {
    /// On the host.
    pub fn on(addr: &str) -> Self {
        Self::start(std::net::TcpListener::bind(addr).unwrap())
    }

    /// Inside a namespace.
    pub fn inside(net: &Netns, addr: &str) -> Self {
        let addr = addr.to_owned();
        Self::start(net.inside(move || std::net::TcpListener::bind(addr).unwrap()))
    }

    fn start(listener: std::net::TcpListener) -> Self {
        let addr = listener.local_addr().unwrap();
        listener.set_nonblocking(true).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Acquire) {
                match listener.accept() {
                    // Who is asked tells who asks.
                    Ok((mut stream, from)) => {
                        drop(stream.write_all(from.ip().to_string().as_bytes()))
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(2)),
                }
            }
        });
        Self {
            stop,
            thread: Some(thread),
            addr,
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}
