//! What a guest can reach. The targets are this host's own: its addresses, addresses from
//! ranges that must be closed, given to an interface of the test's, and another sandbox.
//! No packet leaves this machine.

use std::io::Read;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use wrenn_e2e::Server;

/// One address of each range that must be closed, chosen so that no real network is likely
/// to use it; an interface of the host answers at all of them while the test runs.
const CLOSED: [Ipv4Addr; 5] = [
    Ipv4Addr::new(10, 213, 77, 1),
    Ipv4Addr::new(172, 30, 77, 1),
    Ipv4Addr::new(192, 168, 213, 1),
    Ipv4Addr::new(169, 254, 77, 1),
    Ipv4Addr::new(100, 100, 77, 1),
];

/// Tries TCP and UDP to each `host:port` on standard input at once; prints which answered.
const PROBE: &str = r#"
import json, socket, sys, threading
answered, lock = [], threading.Lock()
def tcp(host, port):
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as s:
        s.settimeout(3)
        s.connect((host, port))
        return s.recv(16).decode()
def udp(host, port):
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as s:
        s.settimeout(3)
        s.sendto(b'ping', (host, port))
        return s.recv(16).decode()
def probe(kind, host, port):
    try:
        said = kind(host, port)
    except OSError:
        return
    with lock:
        answered.append([kind.__name__, host, port, said])
threads = [threading.Thread(target=probe, args=(kind, host, port))
           for host, port in json.load(sys.stdin) for kind in (tcp, udp)]
for t in threads: t.start()
for t in threads: t.join()
print(json.dumps(sorted(answered)))
"#;

pub(crate) async fn g35_a_guest_reaches_neither_host_nor_guest_nor_private_ranges(server: &Server) {
    let api = server.api();
    let closed = Closed::with(&CLOSED);
    let host = Answering::start();
    let own = own_addresses();
    assert!(
        own.len() > CLOSED.len(),
        "the host has the test's addresses and its own: {own:?}"
    );

    // Control: whatever is tried from the guest answers when the host asks.
    for address in own.iter().chain([&Ipv4Addr::LOCALHOST]) {
        let mut said = String::new();
        let stream = std::net::TcpStream::connect((*address, host.port));
        stream
            .and_then(|mut s| s.read_to_string(&mut said))
            .unwrap_or_else(|e| panic!("{address}: {e}"));
        assert_eq!(said, "reached");
    }
    host.hits.store(0, Ordering::SeqCst);

    let (from, other) = (api.create(&json!({})).await, api.create(&json!({})).await);
    let listener = "import socket; s = socket.create_server(('0.0.0.0', 4321))\n\
                    while True: s.accept()[0].sendall(b'reached')";
    let body = json!({"cmd": "python3", "args": ["-c", listener], "background": true});
    api.post(&format!("/v1/sandboxes/{other}/exec"), &body)
        .await
        .expect(202);
    let told = "python3 -c \"import socket,time\nfor _ in range(100):\n  try: print(socket.create_connection(\
                ('169.254.0.21', 4321), 1).recv(9)); break\n  except OSError: time.sleep(0.1)\"";
    assert!(
        api.shell(&other, told).await.contains("reached"),
        "control: the other guest listens"
    );

    let mut targets: Vec<(String, u16)> = Vec::new();
    for address in own.iter().copied().chain([Ipv4Addr::new(169, 254, 0, 22)]) {
        for port in [host.port, server.address().port()] {
            targets.push((address.to_string(), port));
            targets.push((format!("::ffff:{address}"), port));
        }
    }
    // The other guest, by every address that leads to a slot, and the metadata service.
    for address in slot_addresses() {
        for port in [4321, 49983] {
            targets.push((address.to_string(), port));
        }
    }
    targets.push(("169.254.169.254".to_owned(), 80));
    targets.push(("fd00:ec2::254".to_owned(), 80));

    let answered = probe(server, &from, &targets).await;
    assert_eq!(answered, json!([]), "reached from a guest");
    assert_eq!(
        host.hits.load(Ordering::SeqCst),
        0,
        "packets from a guest arrived at the host's listeners"
    );
    // Control: the probe can succeed, at the one service that a guest has.
    let resolver =
        "import socket; socket.create_connection(('169.254.0.22', 53), 3); print('open')";
    assert_eq!(
        api.exec(&from, "python3", &["-c", resolver]).await["stdout"],
        "open\n"
    );
    let itself = probe(server, &other, &[("169.254.0.21".to_owned(), 4321)]).await;
    assert_eq!(itself, json!([["tcp", "169.254.0.21", 4321, "reached"]]));

    // A guest that is root tries to help itself: another address, a route of its own.
    let helped = "sudo ip addr add 10.212.0.77/8 dev eth0; sudo ip addr add 169.254.0.23/16 dev eth0; \
                  sudo ip route replace 192.168.0.0/16 via 169.254.0.22; \
                  sudo sysctl -qw net.ipv4.conf.all.rp_filter=0";
    api.exec(&from, "/bin/bash", &["-c", helped]).await;
    assert_eq!(
        probe(server, &from, &targets).await,
        json!([]),
        "reached by a guest that changed its addresses"
    );
    assert_eq!(
        host.hits.load(Ordering::SeqCst),
        0,
        "packets of such a guest arrived"
    );

    api.destroy(&from).await;
    api.destroy(&other).await;
    drop(closed);
}

async fn probe(server: &Server, id: &str, targets: &[(String, u16)]) -> Value {
    let body = json!({
        "cmd": "python3", "args": ["-c", PROBE], "timeout_sec": 60,
        "stdin": serde_json::to_string(targets).expect("JSON"),
    });
    let path = format!("/v1/sandboxes/{id}/exec");
    let ran = server.api().post(&path, &body).await.expect(200).json();
    assert_eq!(ran["exit_code"], 0, "{ran}");
    serde_json::from_str(ran["stdout"].as_str().unwrap_or_default())
        .unwrap_or_else(|e| panic!("{e}: {ran}"))
}

/// Something on this host that answers at every address and counts.
struct Answering {
    port: u16,
    hits: Arc<AtomicUsize>,
}

impl Answering {
    fn start() -> Self {
        let hits = Arc::new(AtomicUsize::new(0));
        let tcp = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a listener");
        let port = tcp.local_addr().expect("its address").port();
        let udp = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).expect("a socket");
        let (a, b) = (hits.clone(), hits.clone());
        // Both end with the test program.
        std::thread::spawn(move || {
            for mut stream in tcp.incoming().flatten() {
                a.fetch_add(1, Ordering::SeqCst);
                let _ = std::io::Write::write_all(&mut stream, b"reached");
            }
        });
        std::thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok((_, from)) = udp.recv_from(&mut buffer) {
                b.fetch_add(1, Ordering::SeqCst);
                let _ = udp.send_to(b"reached", from);
            }
        });
        std::thread::sleep(Duration::from_millis(50));
        Answering { port, hits }
    }
}

/// An interface of the test's own with addresses from closed ranges. A veth pair, since
/// every kernel that can run Wrenn has those.
struct Closed;

impl Closed {
    const NAME: &str = "e2e-closed";
    const PEER: &str = "e2e-peer";

    fn with(addresses: &[Ipv4Addr]) -> Self {
        // One may be left from a run that was killed.
        let _ = Command::new("ip")
            .args(["link", "delete", Self::NAME])
            .output();
        ip(&[
            "link",
            "add",
            Self::NAME,
            "type",
            "veth",
            "peer",
            "name",
            Self::PEER,
        ]);
        let closed = Closed;
        for address in addresses {
            ip(&[
                "address",
                "add",
                &format!("{address}/32"),
                "dev",
                Self::NAME,
            ]);
        }
        ip(&["link", "set", Self::PEER, "up"]);
        ip(&["link", "set", Self::NAME, "up"]);
        closed
    }
}

impl Drop for Closed {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["link", "delete", Self::NAME])
            .output();
    }
}

fn ip(args: &[&str]) -> String {
    let output = Command::new("ip").args(args).output().expect("ip runs");
    assert!(
        output.status.success(),
        "ip {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn addresses_in(listing: &str) -> Vec<Ipv4Addr> {
    let listing: Value = serde_json::from_str(listing).unwrap_or_else(|e| panic!("{e}: {listing}"));
    let links = listing.as_array().expect("a list of links").iter();
    let infos = links.flat_map(|link| link["addr_info"].as_array().cloned().unwrap_or_default());
    infos
        .filter_map(|info| info["local"].as_str()?.parse().ok())
        .filter(|a: &Ipv4Addr| !a.is_loopback())
        .collect()
}

/// Every IPv4 address of the host but loopback: its own, the test's, the slots' outer ends.
fn own_addresses() -> Vec<Ipv4Addr> {
    addresses_in(&ip(&["-json", "-4", "address", "show"]))
}

/// Every address inside the slots' namespaces, by which other guests might be reached.
fn slot_addresses() -> Vec<Ipv4Addr> {
    let names: Value = serde_json::from_str(&ip(&["-json", "netns", "list"])).expect("JSON");
    let names = names.as_array().cloned().unwrap_or_default();
    let ours = names
        .iter()
        .filter_map(|one| one["name"].as_str())
        .filter(|name| name.starts_with("wr"));
    let mut all: Vec<_> = ours
        .flat_map(|name| addresses_in(&ip(&["-json", "-netns", name, "-4", "address", "show"])))
        .collect();
    all.sort();
    all.dedup();
    // The guest's own gateway is tried with the host's addresses.
    all.retain(|address| *address != Ipv4Addr::new(169, 254, 0, 22));
    assert!(
        !all.is_empty(),
        "no namespace has an address: is the naming another now?"
    );
    all
}

/// The host has one version of control groups and the guest's kernel the other, or the same.
pub(crate) async fn g38_limits_hold_in_either_version_of_control_groups(server: &Server) {
    let here = wrenn_host::cgroups::self_check().await;
    println!("on the host: {here:?}");
    assert!(here.is_ok(), "{here:?}");
    // Where the file system is on no device there is nothing to limit, and that is said.
    let disk = wrenn_host::cgroups::disk_self_check(&std::env::temp_dir()).await;
    println!("its disk: {disk:?}");
    let cannot = |why: &String| why.contains("no block device") || why.contains("without the");
    assert!(disk.as_ref().err().is_none_or(cannot), "{disk:?}");
    let api = server.api();
    let id = api.create(&json!({})).await;
    let own = std::env::current_exe().expect("this program");
    let own = std::fs::read(own).expect("its bytes");
    let put = api.write_file(&id, "/home/user/check", own).await;
    assert!(put.status < 300, "{}", put.describe());
    let line = "chmod +x check && sudo ./check check-cgroups 2>&1";
    let said = api.shell(&id, line).await;
    assert!(said.starts_with("v2: cpu, memory, pids"), "{said}");
    println!("in a guest: {said}");
    api.destroy(&id).await;
}
