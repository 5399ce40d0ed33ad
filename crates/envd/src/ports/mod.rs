//! Ports that programs open, made reachable.
//!
//! Once a second the kernel's tables of listening sockets are read. What listens on
//! loopback only gets a relay on the guest's address with the same port; the relay goes
//! when its listener does. [`Ports::stop`] joins everything, for a freeze must find nothing
//! of this under way.

mod relay;
pub mod table;

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::relay::Relay;
use self::table::{Listener, Tables};

/// The guest's address in every slot; see docs/architecture.md.
pub const GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 21);
const INTERVAL: Duration = Duration::from_secs(1);
/// More relays than this are not started; each holds a socket and a task.
const MAX_RELAYS: usize = 512;

/// What listens in the sandbox, as the dashboard shows it.
#[derive(Debug, Clone, Serialize, PartialEq, Eq)]
pub struct OpenPort {
    /// The port.
    pub port: u16,
    /// Where it listens.
    pub address: IpAddr,
    /// Whether it can be reached from outside: by itself or by a relay of ours.
    pub reachable: bool,
    /// Whether that is by a relay.
    pub relayed: bool,
}

/// Which ports are looked at and where relays listen.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where relays listen; `None`: ports are listed only.
    pub address: Option<Ipv4Addr>,
    /// The agent's own port.
    pub own_port: u16,
}

#[derive(Debug)]
struct Running {
    stop: CancellationToken,
    /// Says whether it had relays when it was stopped.
    task: JoinHandle<bool>,
}

#[derive(Debug, Default)]
struct Life {
    running: Option<Running>,
    /// Whether there were relays when it stood last.
    relayed: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Ports {
    settings: Settings,
    life: tokio::sync::Mutex<Life>,
    open: Arc<Mutex<Vec<OpenPort>>>,
}

impl Ports {
    /// A port subsystem that stands.
    pub fn new(settings: Settings) -> Arc<Ports> {
        Arc::new(Ports {
            settings,
            life: tokio::sync::Mutex::default(),
            open: Arc::default(),
        })
    }

    /// Starts it, with a look at once. Again is harmless.
    pub async fn start(&self) {
        self.start_after(&mut *self.life.lock().await, Duration::ZERO);
    }

    fn start_after(&self, life: &mut Life, wait: Duration) {
        if life.running.is_none() {
            let stop = CancellationToken::new();
            let scanner = Scanner {
                settings: self.settings.clone(),
                open: Arc::clone(&self.open),
                tables: Tables::default(),
                relays: HashMap::new(),
            };
            let task = tokio::spawn(scanner.run(wait, stop.clone()));
            life.running = Some(Running { stop, task });
        }
    }

    /// Stops it, and returns when scanner, relays and their connections are gone. Again is
    /// harmless.
    pub async fn stop(&self) {
        Self::stand(&mut *self.life.lock().await).await;
    }

    async fn stand(life: &mut Life) {
        if let Some(Running { stop, task }) = life.running.take() {
            stop.cancel();
            match task.await {
                Ok(relayed) => life.relayed = relayed,
                Err(error) => tracing::error!(%error, "the port scanner broke"),
            }
        }
    }

    /// Stops and starts it: no connection from before stays. What was relayed is so again at
    /// once. Where nothing was, the first look waits for its time: whoever had the machine
    /// restored waits for something else.
    pub async fn restart(&self) {
        let mut life = self.life.lock().await;
        Self::stand(&mut life).await;
        let wait = if life.relayed {
            Duration::ZERO
        } else {
            INTERVAL
        };
        self.start_after(&mut life, wait);
    }

    /// What was open at the last look, by port.
    pub fn list(&self) -> Vec<OpenPort> {
        self.open
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

struct Scanner {
    settings: Settings,
    open: Arc<Mutex<Vec<OpenPort>>>,
    tables: Tables,
    /// By inode of the listening socket: a port that is closed and opened again between two
    /// looks is another listener.
    relays: HashMap<u64, Relay>,
}

impl Scanner {
    /// Looks after `wait`, and then time and again until it is stopped.
    async fn run(mut self, wait: Duration, stop: CancellationToken) -> bool {
        let mut ticks = tokio::time::interval_at(Instant::now() + wait, INTERVAL);
        // After a freeze of an hour one look is enough.
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                _ = ticks.tick() => self.look().await,
            }
        }
        let relayed = !self.relays.is_empty();
        for (_, relay) in self.relays.drain() {
            relay.stop().await;
        }
        relayed
    }

    async fn look(&mut self) {
        let own: Vec<u64> = self.relays.values().map(Relay::inode).collect();
        let port = self.settings.own_port;
        let listeners: Vec<Listener> = match self.tables.read() {
            Ok(all) => all
                .filter(|l| l.address.port() != port && !own.contains(&l.inode))
                .collect(),
            Err(error) => {
                tracing::warn!(%error, "cannot read the tables of sockets");
                return;
            }
        };
        let wanted: Vec<&Listener> = match self.settings.address {
            Some(at) => wanted(&listeners, at),
            None => Vec::new(),
        };
        let gone: Vec<u64> = self
            .relays
            .keys()
            .copied()
            .filter(|inode| !wanted.iter().any(|l| l.inode == *inode))
            .collect();
        for inode in gone {
            if let Some(relay) = self.relays.remove(&inode) {
                relay.close().await;
            }
        }
        if let Some(at) = self.settings.address {
            for listener in wanted {
                if self.relays.len() >= MAX_RELAYS || self.relays.contains_key(&listener.inode) {
                    continue;
                }
                match Relay::start(
                    SocketAddr::new(at.into(), listener.address.port()),
                    listener.address,
                ) {
                    Ok(relay) => {
                        self.relays.insert(listener.inode, relay);
                    }
                    // Taken in the meantime: the next look sees by whom.
                    Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
                    Err(error) => {
                        tracing::warn!(address = %listener.address, %error, "cannot relay a port");
                    }
                }
            }
        }
        let mut open: Vec<OpenPort> = listeners.iter().map(|l| self.describe(l)).collect();
        open.sort_by_key(|p| (p.port, p.address));
        open.dedup();
        *self.open.lock().unwrap_or_else(PoisonError::into_inner) = open;
    }

    fn describe(&self, listener: &Listener) -> OpenPort {
        let relayed = self.relays.contains_key(&listener.inode);
        let address = listener.address.ip();
        OpenPort {
            port: listener.address.port(),
            address,
            reachable: relayed || !address.is_loopback(),
            relayed,
        }
    }
}

/// Loopback listeners whose port nothing serves on the guest's address; one per port.
fn wanted(listeners: &[Listener], at: Ipv4Addr) -> Vec<&Listener> {
    let mut wanted: Vec<&Listener> = Vec::new();
    for listener in listeners
        .iter()
        .filter(|l| l.address.ip().is_loopback() && l.address.ip() != IpAddr::V4(at))
    {
        let port = listener.address.port();
        let served = |l: &Listener| {
            let ip = l.address.ip();
            l.address.port() == port && (ip.is_unspecified() || ip == IpAddr::V4(at))
        };
        if !listeners.iter().any(served) && !wanted.iter().any(|w| w.address.port() == port) {
            wanted.push(listener);
        }
    }
    wanted
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};

    /// An address of loopback that plays the guest's.
    const AT: Ipv4Addr = Ipv4Addr::new(127, 83, 17, 9);
    /// Of its own: a scanner relays what all tests of the process listen on.
    const AT_TOO: Ipv4Addr = Ipv4Addr::new(127, 83, 17, 10);

    #[test]
    fn g32_only_what_is_on_loopback_alone_is_relayed() {
        let listener = |text: &str, inode| Listener {
            address: text.parse().unwrap(),
            inode,
        };
        let all = [
            listener("127.0.0.1:80", 1),
            listener("[::1]:80", 2),
            listener("0.0.0.0:81", 3),
            listener("127.0.0.1:81", 4),
            listener("127.0.0.5:82", 5),
            listener("127.83.17.9:82", 6),
            listener("[::1]:83", 7),
            listener("10.0.0.1:84", 8),
        ];
        let ports: Vec<_> = wanted(&all, AT).iter().map(|l| l.inode).collect();
        assert_eq!(ports, [1, 7]);
    }

    async fn reachable(at: Ipv4Addr, port: u16) -> bool {
        TcpStream::connect((at, port)).await.is_ok()
    }

    async fn until(at: Ipv4Addr, port: u16, wanted: bool) {
        for _ in 0..60 {
            if reachable(at, port).await == wanted {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("port {port} reachable must become {wanted}");
    }

    #[tokio::test]
    async fn g32_a_loopback_listener_is_reachable_as_long_as_it_is_there() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let ports = Ports::new(Settings {
            address: Some(AT),
            own_port: 1,
        });
        assert!(!reachable(AT, port).await);
        ports.start().await;
        until(AT, port, true).await;
        let echo = tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut bytes = Vec::new();
                stream.read_to_end(&mut bytes).await.unwrap();
                stream.write_all(&bytes).await.unwrap();
            }
        });
        let mut client = TcpStream::connect((AT, port)).await.unwrap();
        client.write_all(&[7; 100_000]).await.unwrap();
        client.shutdown().await.unwrap();
        let mut back = Vec::new();
        client.read_to_end(&mut back).await.unwrap();
        assert_eq!(back, [7; 100_000]);
        let found = ports.list().into_iter().find(|p| p.port == port).unwrap();
        assert!(found.relayed && found.reachable);
        echo.abort();
        until(AT, port, false).await;
        ports.stop().await;
    }

    #[tokio::test]
    async fn g25_stop_joins_relays_and_their_connections() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let ports = Ports::new(Settings {
            address: Some(AT_TOO),
            own_port: 1,
        });
        ports.start().await;
        until(AT_TOO, port, true).await;
        let mut client = TcpStream::connect((AT_TOO, port)).await.unwrap();
        let _server = listener.accept().await.unwrap();
        ports.stop().await;
        assert!(!reachable(AT_TOO, port).await);
        let mut byte = [0];
        let ended = tokio::time::timeout(Duration::from_secs(1), client.read(&mut byte)).await;
        assert!(
            matches!(ended, Ok(Ok(0) | Err(_))),
            "the connection must be gone"
        );
        ports.restart().await;
        // What was relayed does not wait for the next look's time.
        let soon = tokio::time::timeout(INTERVAL / 2, until(AT_TOO, port, true)).await;
        assert!(soon.is_ok(), "relayed again at once");
        ports.stop().await;
        ports.stop().await;
    }

    #[tokio::test]
    async fn g25_after_a_restore_the_first_look_waits_where_nothing_was_relayed() {
        let ports = Ports::new(Settings {
            address: None,
            own_port: 1,
        });
        ports.start().await;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let seen = || ports.list().iter().any(|open| open.port == port);
        let seen_within = async |time| {
            let until = Instant::now() + time;
            while !seen() && Instant::now() < until {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            seen()
        };
        assert!(seen_within(3 * INTERVAL).await);
        ports.stop().await;
        drop(listener);
        ports.restart().await;
        tokio::time::sleep(INTERVAL / 3).await;
        assert!(seen(), "it is as it was until it is looked at");
        let gone = Instant::now();
        while seen() {
            assert!(gone.elapsed() < 3 * INTERVAL, "never looked at again");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        ports.stop().await;
    }
}
