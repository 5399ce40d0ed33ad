//! Names: what the relay resolves for a guest, what that opens in the firewall, and what it
//! never tells. The resolver is one of the test, in a namespace of the test.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod common;

use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::dns::{self, Data, Zone};
use common::{Bed, Guest, Listener, World, policy, refused_at_once, run};
use wrenn_net::relay::{self, RelayFiles, Upstreams};
use wrenn_net::{Destination, Reason, Slot, SlotPool};

const A: u16 = 1;
const AAAA: u16 = 28;

/// The relay of a slot, in a process of its own as in life: it outlives what starts it, and
/// has no rights. Ended when dropped.
struct Relay(std::process::Child);

/// Run by [`Relay::start`] with the descriptors 10 to 14.
#[test]
#[ignore = "started by other tests, as another user"]
fn relay_process() {
    use std::os::fd::{FromRawFd, OwnedFd};
    let upstream = std::env::var("UPSTREAM").unwrap().parse().unwrap();
    // SAFETY: `Relay::start` left these five open for this process, and nobody else has them.
    #[allow(unsafe_code)]
    let files = (10..15).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    let files = RelayFiles::from_descriptors(files.collect()).unwrap();
    panic!("{}", relay::serve(files, Upstreams::fixed([upstream])));
}

impl Relay {
    async fn start(slot: &Slot, upstream: &str) -> Self {
        use std::os::fd::{AsRawFd, OwnedFd};
        let files = slot.relay().await.unwrap().into_descriptors();
        // The shell gives the descriptors their numbers, one after the other, and setpriv takes
        // the rights away. None may have a number that another one is given.
        let files = files.iter().map(|fd| {
            let fd = rustix::io::fcntl_dupfd_cloexec(fd, 100).unwrap();
            rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::empty()).unwrap();
            fd
        });
        let files: Vec<OwnedFd> = files.collect();
        let redirects: Vec<String> = files
            .iter()
            .zip(10..)
            .map(|(fd, to)| format!("{to}<&{}", fd.as_raw_fd()))
            .collect();
        let folder = std::env::temp_dir();
        let exe = std::env::current_exe().unwrap();
        let script = format!(
            "exec setpriv --reuid 65534 --clear-groups --inh-caps=-all --bounding-set=-all \
             /proc/self/fd/9 --exact --ignored --nocapture relay_process 9<{} {}",
            exe.display(),
            redirects.join(" ")
        );
        let child = std::process::Command::new("bash")
            .args(["-c", &script])
            .env("UPSTREAM", upstream)
            .current_dir(folder)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        Self(child)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Asks the guest's resolver; waits for one that is still starting.
fn resolve(guest: &Guest, name: &str, kind: u16) -> Result<(Vec<Ipv4Addr>, u32), u8> {
    let query = dns::query(4711, name, kind);
    let start = Instant::now();
    loop {
        match guest.ask("169.254.0.22:53", &query) {
            Ok(reply) => return dns::read(&reply),
            Err(error) => assert!(start.elapsed() < Duration::from_secs(5), "{name}: {error}"),
        }
    }
}

fn resolve_by_tcp(guest: &Guest, name: &str) -> Result<(Vec<Ipv4Addr>, u32), u8> {
    let query = dns::query(4712, name, A);
    let reply = guest.net.inside(move || {
        let mut stream = TcpStream::connect("169.254.0.22:53").unwrap();
        dns::write_message(&mut stream, &query);
        dns::read_message(&mut stream)
    });
    dns::read(&reply)
}

fn addrs(list: &[&str]) -> Vec<Ipv4Addr> {
    list.iter().map(|addr| addr.parse().unwrap()).collect()
}

/// A zone behind a resolver in the world, at port 5353 of it.
fn serve(world: &World, names: &[(&'static str, Data)]) -> String {
    let zone: Zone = names.iter().cloned().collect();
    let (udp, tcp) = world.net.inside(|| {
        (
            UdpSocket::bind("0.0.0.0:5353").unwrap(),
            TcpListener::bind("0.0.0.0:5353").unwrap(),
        )
    });
    dns::serve(udp, tcp, zone);
    let link = world.host.rsplit_once('.').unwrap().0;
    format!("{link}.2:5353")
}

/// The names that were refused to a slot's guest, how often and why.
async fn refused_names(slot: &Slot) -> Vec<(String, u64, Reason)> {
    let all = slot.denials().await.unwrap().into_iter();
    all.filter_map(|denial| match denial.destination {
        Destination::Name(name) => Some((name, denial.count, denial.reason)),
        Destination::Address(_) => None,
    })
    .collect()
}

async fn pool(bed: &Bed) -> SlotPool {
    let mut config = bed.config();
    config.open = vec!["203.0.113.0/24".parse().unwrap()];
    SlotPool::start(config).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn g35_a_name_opens_its_addresses_and_nothing_else() {
    let world = World::new(
        "nna",
        51,
        &["203.0.113.51", "203.0.113.151", "203.0.113.152"],
    );
    let upstream = serve(
        &world,
        &[
            ("mirror.example", Data::Addrs(addrs(&["203.0.113.51"]))),
            ("www.cdn.example", Data::Alias("edge.elsewhere.example")),
            (
                "edge.elsewhere.example",
                Data::Addrs(addrs(&["203.0.113.151"])),
            ),
            ("evil.example", Data::Addrs(addrs(&["203.0.113.152"]))),
        ],
    );
    let bed = Bed::new("nna", 51);
    let pool = pool(&bed).await;
    let slot = pool.take().await.unwrap();
    let guest = Guest::new("nna-guest", &slot).await;
    let _relay = Relay::start(&slot, &upstream).await;
    let _internet = Listener::inside(&world.net, "0.0.0.0:7001");

    // Everything resolves and is open; nothing is shortened.
    let day = 86_400;
    assert_eq!(
        resolve(&guest, "evil.example", A),
        Ok((addrs(&["203.0.113.152"]), day))
    );
    assert_eq!(guest.connect("203.0.113.152:7001").0, Ok(()));

    // Two names only, one of them a pattern.
    let only = policy(true, &["mirror.example", "*.cdn.example"], &["0.0.0.0/0"]);
    slot.set_policy(&only).await.unwrap();
    for addr in [
        "203.0.113.51:7001",
        "203.0.113.151:7001",
        "203.0.113.152:7001",
    ] {
        refused_at_once(&guest, addr);
    }
    assert_eq!(
        resolve(&guest, "Mirror.Example", A),
        Ok((addrs(&["203.0.113.51"]), 300)),
        "to be asked for again while it is open"
    );
    assert_eq!(guest.connect("203.0.113.51:7001").0, Ok(()));
    refused_at_once(&guest, "203.0.113.151:7001");
    // By way of an alias to a name that is not on the list, and by TCP.
    assert_eq!(
        resolve_by_tcp(&guest, "www.cdn.example"),
        Ok((addrs(&["203.0.113.151"]), 300))
    );
    assert_eq!(guest.connect("203.0.113.151:7001").0, Ok(()));
    // Other names do not exist, so that asking for one carries nothing out; nor do those
    // above, below or beside what is listed.
    for name in [
        "evil.example",
        "cdn.example",
        "edge.elsewhere.example",
        "a.mirror.example",
        "xmirror.example",
    ] {
        assert_eq!(resolve(&guest, name, A), Err(3), "{name}");
        assert_eq!(resolve(&guest, name, AAAA), Err(3), "{name}");
    }
    assert_eq!(resolve(&guest, "evil.example", A), Err(3));
    // The sandbox can be told that it was the policy.
    let names = refused_names(&slot).await;
    assert_eq!(names.len(), 5, "{names:?}");
    assert!(names.contains(&("evil.example".to_owned(), 2, Reason::Denied)));
    assert!(names.contains(&("xmirror.example".to_owned(), 1, Reason::Denied)));
    refused_at_once(&guest, "203.0.113.152:7001");
    // What the relay says from its own port the guest cannot say: its packets never pass there.
    guest.net.inside(|| {
        let socket = UdpSocket::bind("0.0.0.0:5300").unwrap();
        drop(socket.send_to(&[0; 8], "169.254.0.22:9"));
    });

    // More names: what is open stays open.
    let open = guest
        .net
        .inside(|| TcpStream::connect("203.0.113.51:7001").unwrap());
    let more = policy(
        true,
        &["mirror.example", "*.cdn.example", "evil.example"],
        &["0.0.0.0/0"],
    );
    slot.set_policy(&more).await.unwrap();
    assert_eq!(guest.connect("203.0.113.51:7001").0, Ok(()));
    refused_at_once(&guest, "203.0.113.152:7001");
    resolve(&guest, "evil.example", A).unwrap();
    assert_eq!(guest.connect("203.0.113.152:7001").0, Ok(()));
    // Fewer: all is closed until it is resolved again.
    slot.set_policy(&policy(false, &["mirror.example"], &[]))
        .await
        .unwrap();
    for addr in ["203.0.113.51:7001", "203.0.113.152:7001"] {
        refused_at_once(&guest, addr);
    }
    assert_eq!(resolve(&guest, "evil.example", A), Err(3));
    let names = refused_names(&slot).await;
    assert!(names.contains(&("evil.example".to_owned(), 1, Reason::InternetOff)));
    resolve(&guest, "mirror.example", A).unwrap();
    assert_eq!(guest.connect("203.0.113.51:7001").0, Ok(()));
    drop(open);

    // The next guest of the slot hears nothing of it.
    let index = slot.index();
    drop((_relay, guest));
    pool.give_back(slot).await;
    let mut others = Vec::new();
    let next = loop {
        match pool.take().await.unwrap() {
            slot if slot.index() == index => break slot,
            other => others.push(other),
        }
    };
    assert_eq!(next.denials().await.unwrap(), []);
    for slot in others.into_iter().chain([next]) {
        pool.give_back(slot).await;
    }
    pool.shutdown().await;
}

/// A guest, its relay, and one name outside: `mirror.example`, whose address listens at 7001.
struct Stage {
    world: World,
    slot: Slot,
    guest: Guest,
    relay: Relay,
    pool: SlotPool,
    _bed: Bed,
    _internet: Listener,
}

impl Stage {
    async fn new(name: &'static str, third: u8) -> Self {
        let addr = format!("203.0.113.{third}");
        let world = World::new(name, third, &[&addr]);
        let zone = [("mirror.example", Data::Addrs(addrs(&[&addr])))];
        let upstream = serve(&world, &zone);
        let bed = Bed::new(name, third);
        let pool = pool(&bed).await;
        let slot = pool.take().await.unwrap();
        Self {
            guest: Guest::new(&format!("{name}-guest"), &slot).await,
            relay: Relay::start(&slot, &upstream).await,
            _internet: Listener::inside(&world.net, "0.0.0.0:7001"),
            world,
            slot,
            pool,
            _bed: bed,
        }
    }

    async fn end(self) {
        drop((self.relay, self.guest));
        self.pool.give_back(self.slot).await;
        self.pool.shutdown().await;
    }
}

/// A packet that the kernel judges while the rules change is judged by the old ones, and may renew
/// an address that the change has just closed.
#[tokio::test(flavor = "multi_thread")]
async fn g35_what_is_under_way_during_a_change_opens_nothing() {
    let changes = match std::env::var_os("WRENN_TEST_LONG") {
        Some(_) => 5000,
        None => 300,
    };
    let stage = Stage::new("nnc", 53).await;
    let (slot, guest) = (&stage.slot, &stage.guest);
    let echo = Echo::inside(&stage.world.net, "203.0.113.53:7002");
    let flood = flood(&guest.net, "203.0.113.53:7002");

    let by_name = policy(false, &["mirror.example"], &[]);
    let by_another = policy(false, &["other.example"], &[]);
    for change in 0..changes {
        slot.set_policy(&by_name).await.unwrap();
        let resolved = resolve(guest, "mirror.example", A);
        assert!(resolved.is_ok(), "change {change}: {resolved:?}");
        let before = echo.heard();
        let start = Instant::now();
        while echo.heard() < before + 20 {
            assert!(
                start.elapsed() < Duration::from_secs(5),
                "change {change}: nothing passes"
            );
            std::thread::yield_now();
        }
        slot.set_policy(&by_another).await.unwrap();
        let (result, _) = guest.connect("203.0.113.53:7001");
        assert!(result.is_err(), "change {change}: still open");
    }

    drop((flood, echo));
    stage.end().await;
}

/// The slot of a machine that an earlier version of this program has started.
#[tokio::test(flavor = "multi_thread")]
async fn g35_a_table_without_todays_sets_is_made_anew() {
    let stage = Stage::new("nnd", 54).await;
    let (slot, guest) = (&stage.slot, &stage.guest);

    let nft = |what: &str| run(&format!("ip netns exec {} nft {what}", slot.name()));
    for chain in ["egress", "ingress", "resolver", "openings"] {
        nft(&format!("flush chain inet nnd {chain}"));
    }
    nft("delete set inet nnd opened");
    nft("add rule inet nnd egress accept");
    nft("add rule inet nnd ingress accept");
    assert_eq!(guest.connect("203.0.113.54:7001").0, Ok(()));
    slot.set_policy(&policy(false, &["mirror.example"], &[]))
        .await
        .unwrap();
    refused_at_once(guest, "203.0.113.54:7001");
    resolve(guest, "mirror.example", A).unwrap();
    assert_eq!(guest.connect("203.0.113.54:7001").0, Ok(()));
    stage.end().await;
}

/// Answers datagrams and counts them, as long as the value lives.
struct Echo {
    heard: Arc<AtomicU64>,
    _worker: Worker,
}

impl Echo {
    fn inside(net: &common::Netns, addr: &'static str) -> Self {
        let socket = net.inside(move || UdpSocket::bind(addr).unwrap());
        socket
            .set_read_timeout(Some(Duration::from_millis(50)))
            .unwrap();
        let heard = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&heard);
        let worker = Worker::start(move || {
            let mut buffer = [0; 64];
            if let Ok((len, from)) = socket.recv_from(&mut buffer) {
                counter.fetch_add(1, Ordering::Relaxed);
                // Who asked may be cut off by now.
                drop(socket.send_to(&buffer[..len], from));
            }
        });
        Self {
            heard,
            _worker: worker,
        }
    }

    fn heard(&self) -> u64 {
        self.heard.load(Ordering::Relaxed)
    }
}

/// Sends datagrams without end, whatever comes back, as long as the value lives.
fn flood(net: &common::Netns, to: &'static str) -> Worker {
    let socket = net.inside(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    Worker::start(move || {
        drop(socket.send_to(b"packet", to));
        // Room on the cable for what the test asks.
        std::thread::sleep(Duration::from_micros(20));
    })
}

/// A thread that does the same thing again and again. Ended when dropped.
struct Worker(Arc<AtomicBool>, Option<std::thread::JoinHandle<()>>);

impl Worker {
    fn start(mut work: impl FnMut() + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Acquire) {
                work();
            }
        });
        Self(stop, Some(thread))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
        self.1.take().unwrap().join().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn g35_no_answer_points_to_what_is_forbidden() {
    let world = World::new("nnb", 52, &["203.0.113.52", "172.31.99.52"]);
    let inward = [
        "127.0.0.1",
        "10.250.52.1",
        "10.250.52.2",
        "172.31.99.52",
        "192.168.1.1",
        "169.254.169.254",
        "169.254.0.22",
        "100.100.100.200",
        "0.0.0.0",
        // The host's own, in a range that the operator has opened.
        "203.0.113.252",
    ];
    run("ip addr add 203.0.113.252/32 dev nnbw");
    let mut mixed = inward.to_vec();
    mixed.insert(3, "203.0.113.52");
    let upstream = serve(
        &world,
        &[
            ("inward.example", Data::Addrs(addrs(&inward))),
            ("mixed.example", Data::Addrs(addrs(&mixed))),
            ("alias.example", Data::Alias("mixed.example")),
        ],
    );
    let bed = Bed::new("nnb", 52);
    let pool = pool(&bed).await;
    let slot = pool.take().await.unwrap();
    let guest = Guest::new("nnb-guest", &slot).await;
    let relay = Relay::start(&slot, &upstream).await;
    let _internet = Listener::inside(&world.net, "0.0.0.0:7001");

    // Control: the resolver itself tells all of it.
    let query = dns::query(1, "mixed.example", A);
    let told = {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.send_to(&query, &upstream).unwrap();
        let mut buffer = [0; 2048];
        let len = socket.recv(&mut buffer).unwrap();
        dns::read(&buffer[..len]).unwrap().0
    };
    assert_eq!(told, addrs(&mixed));

    let public = addrs(&["203.0.113.52"]);
    for policy in [
        policy(true, &[], &[]),
        policy(true, &["10.0.0.0/8", "127.0.0.0/8"], &[]),
        policy(true, &["*.example", "inward.example"], &["0.0.0.0/0"]),
    ] {
        slot.set_policy(&policy).await.unwrap();
        for (name, expected) in [
            ("inward.example", &[][..]),
            ("mixed.example", &public),
            ("alias.example", &public),
        ] {
            assert_eq!(resolve(&guest, name, A).unwrap().0, expected, "{name}");
            assert_eq!(resolve_by_tcp(&guest, name).unwrap().0, expected, "{name}");
            // No IPv6, and no hints: the name is there and has none.
            for kind in [AAAA, 64, 65] {
                assert!(resolve(&guest, name, kind).unwrap().0.is_empty(), "{name}");
            }
            assert_eq!(resolve(&guest, name, 255), Err(4), "any");
        }
        assert_eq!(guest.connect("203.0.113.52:7001").0, Ok(()));
        refused_at_once(&guest, "172.31.99.52:7001");
    }

    let names = refused_names(&slot).await;
    let mut refused: Vec<&str> = names.iter().map(|(name, ..)| name.as_str()).collect();
    refused.sort_unstable();
    assert_eq!(
        refused,
        ["alias.example", "inward.example", "mixed.example"]
    );
    assert!(names.iter().all(|(_, _, why)| *why == Reason::Forbidden));

    // Nobody can tell what is in force: then nothing resolves.
    let notice = bed.state().join(format!("net/policies/{}", slot.name()));
    std::fs::write(&notice, "torn").unwrap();
    assert_eq!(resolve(&guest, "mixed.example", A), Err(2));

    drop((relay, guest));
    pool.give_back(slot).await;
    pool.shutdown().await;
}
