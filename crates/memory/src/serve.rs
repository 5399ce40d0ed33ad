//! A page server's life from its orders to the end of its machine.
//!
//! ```text
//! open and verify ──▶ listening ──monitor connects, sends its memory──▶ serving ──▶ ended
//!       │                 │                      │                        │
//!       ▼                 ▼                      ▼                        ▼
//!     failed        failed: nobody came    failed, and the monitor is killed
//! ```

use std::sync::atomic::Ordering;
use std::sync::mpsc::{Sender, channel, sync_channel};
use std::time::{Duration, Instant};

use rustix::net::SocketType;

use crate::ServeError;
use crate::config::Config;
use crate::feeder::{BATCHES, Feeder};
use crate::handshake::{self, HandshakeError};
use crate::house::{self, Listener, Save};
use crate::kernel::Uffd;
use crate::layers::Layers;
use crate::monitor::Monitor;
use crate::server::{Feed, Recording, Server};
use crate::settled::Settled;
use crate::status::{Counts, Shared, State};
use crate::working_set::WorkingSet;

/// Serves one machine's memory until that machine is gone, and tells what was done. Once a
/// monitor may connect, `listening` is called. Blocking; two more threads live as long as it
/// does. On an error there is no machine any more.
///
/// The status file tells the same, also to who was not there.
pub fn serve(config: &Config, listening: impl FnOnce()) -> Result<Counts, ServeError> {
    let opened = Opened::open(config).inspect_err(|error| {
        house::write_failure(&config.status, error);
    })?;
    let Opened {
        layers,
        shared,
        control,
        socket,
    } = opened;
    listening();
    let (save, saves) = channel();
    let result = std::thread::scope(|scope| {
        // However this ends, the housekeeper must too, or the scope would wait for it.
        let _stop = StopHouse(&shared);
        let (shared, control) = (&shared, &control);
        scope.spawn(move || house::keep(shared, control, &config.status, &saves));
        // While the monitor starts.
        let layers = &layers;
        scope.spawn(move || layers.warm(|| !shared.stop.load(Ordering::Relaxed)));
        let result = connect_and_serve(config, layers, shared, socket, &save);
        match &result {
            Ok(()) => shared.set_state(State::Ended),
            Err(error) => shared.set_failed(error.reason()),
        }
        result
    });
    result.map(|()| shared.counts())
}

/// All that a server needs before a monitor may come.
struct Opened {
    layers: Layers,
    shared: Shared,
    control: Listener,
    socket: Listener,
}

impl Opened {
    fn open(config: &Config) -> Result<Opened, ServeError> {
        let layers = Layers::open(config)?;
        let rate = config.policy.background_bytes_per_second;
        let shared = Shared::new(layers.pages(), rate)
            .map_err(ServeError::system("make the server's descriptors"))?;
        let own = rustix::process::geteuid().as_raw();
        Ok(Opened {
            control: Listener::bind(&config.control, SocketType::SEQPACKET, own)?,
            socket: Listener::bind(&config.socket, SocketType::STREAM, config.uid)?,
            layers,
            shared,
        })
    }
}

/// Ends the housekeeper when it is dropped.
struct StopHouse<'a>(&'a Shared);

impl Drop for StopHouse<'_> {
    fn drop(&mut self) {
        self.0.stop.store(true, Ordering::Release);
        self.0.for_house.ring();
    }
}

fn connect_and_serve(
    config: &Config,
    layers: &Layers,
    shared: &Shared,
    socket: Listener,
    save: &Sender<Save>,
) -> Result<(), ServeError> {
    // The order matters: what is declared later is dropped earlier, and the descriptors of
    // the monitor's memory may only be closed once the monitor is dead.
    let mut fds = Vec::new();
    let uffd;
    let (connection, mut monitor) = accept(config, &socket, shared)?;
    // One monitor, once.
    drop(socket);
    let pid = monitor.pid();
    shared.set_monitor(pid);
    let refused = |source| ServeError::Handshake { pid, source };
    let regions = handshake::receive(
        std::os::fd::AsFd::as_fd(&connection),
        layers.pages(),
        config.handshake_patience(),
        &mut fds,
    )
    .map_err(refused)?;
    let fd = fds.pop().ok_or(HandshakeError::Descriptors(0));
    uffd = match Uffd::new(fd.map_err(refused)?) {
        Ok(uffd) => uffd,
        Err((fd, error)) => {
            fds.push(fd);
            return Err(refused(HandshakeError::NotUserfaultfd(error)));
        }
    };
    tracing::info!(
        pid,
        pages = layers.pages(),
        "a monitor has handed over its memory"
    );

    let policy = &config.policy;
    let settled = Settled::none_of(layers.pages());
    let recording = policy.record.map(|record| Recording {
        // No page is recorded twice.
        order: Vec::with_capacity(u64::from(record.pages).min(layers.pages()) as usize),
        most: record.pages as usize,
        until: Instant::now() + Duration::from_millis(record.millis),
    });
    let working_set = match recording {
        None => load_working_set(config, layers.pages(), shared),
        Some(_) => None,
    };
    let mut recorded = |recording: Recording| {
        if let Some(path) = &policy.working_set {
            let set = WorkingSet::new(layers.pages(), recording.order);
            // The housekeeper lives longer than this.
            let _ = save.send(Save(set, path.clone()));
            shared.for_house.ring();
        }
    };
    std::thread::scope(|scope| {
        let mut feed = None;
        if working_set.is_some() || policy.background {
            let (to_server, batches) = sync_channel(BATCHES);
            let (empties, from_server) = channel();
            let (begin, may_begin) = channel();
            let feeder = Feeder::new(layers, &settled, shared, to_server, from_server)?;
            let (set, background) = (working_set.as_ref(), policy.background);
            scope.spawn(move || {
                // An error: the machine was gone before it was time.
                if may_begin.recv().is_ok() {
                    feeder.run(set, background);
                }
            });
            feed = Some(Feed {
                batches,
                empties,
                begin: Some(begin),
            });
        }
        // It owns the channels' ends, so that the feeder ends when it does.
        let server = Server::new(
            &uffd,
            &mut monitor,
            &regions,
            layers,
            &settled,
            shared,
            feed,
            recording,
            &mut recorded,
        )?;
        server.run()
    })
}

/// Waits for the monitor. Others that connect are sent away.
fn accept(
    config: &Config,
    socket: &Listener,
    shared: &Shared,
) -> Result<(std::os::fd::OwnedFd, Monitor), ServeError> {
    let until = Instant::now() + config.connect_patience();
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let doing = || ServeError::system("accept the monitor");
        let Some(connection) = socket.accept_within(left).map_err(|e| doing()(e))? else {
            return Err(ServeError::NobodyCame {
                socket: config.socket.clone(),
                seconds: config.connect_patience().as_secs(),
            });
        };
        match Monitor::of_peer(std::os::fd::AsFd::as_fd(&connection), config.uid) {
            Ok(monitor) => return Ok((connection, monitor)),
            Err(error) => shared.note(format!("a connection was refused: {error}")),
        }
    }
}

/// The working set, if there is one that fits. Without it the machine runs the same.
fn load_working_set(config: &Config, pages: u64, shared: &Shared) -> Option<WorkingSet> {
    let path = config.policy.working_set.as_ref()?;
    match WorkingSet::load(path) {
        Ok(Some(set)) if set.memory_pages() == pages => Some(set),
        Ok(Some(set)) => {
            shared.note(format!(
                "{} is of a memory of {} pages, not of {pages}, so it is not used",
                path.display(),
                set.memory_pages()
            ));
            None
        }
        Ok(None) => None,
        Err(error) => {
            shared.note(error.to_string());
            None
        }
    }
}
