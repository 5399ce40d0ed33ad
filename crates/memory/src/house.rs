//! The housekeeper: answers on the control socket, and writes the files, so that the thread
//! that answers faults never waits for a disk or for a client.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, recv, send,
    socket_with,
};
use serde::{Deserialize, Serialize};

use crate::ServeError;
use crate::handshake::{readable, timespec};
use crate::status::{Counts, Shared, State, Status};
use crate::working_set::{WorkingSet, replace};

/// How often the counts in the status file are renewed while they change.
const EVERY: Duration = Duration::from_secs(1);

/// Longest message, either way.
const MAX_BYTES: usize = 64 << 10;

/// Clients at a time; the agent is one.
const MAX_CLIENTS: usize = 8;

/// What a page server can be asked, on its control socket: one packet of JSON, answered with
/// a [`Status`] from after it was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    tag = "do",
    rename_all = "camelCase",
    rename_all_fields = "camelCase",
    deny_unknown_fields
)]
pub enum Request {
    /// How it is.
    Status,
    /// Bring nothing more that is not asked for.
    Cancel,
    /// Bring what is not asked for at this rate; `None`: as fast as it goes.
    Throttle {
        /// Bytes of data per second.
        bytes_per_second: Option<u64>,
    },
    /// The working set is complete: write it, and go on.
    FinishRecording,
}

/// What the server has written.
pub(crate) struct Save(pub(crate) WorkingSet, pub(crate) PathBuf);

/// A socket with a name. The name goes when this is dropped.
pub(crate) struct Listener {
    socket: OwnedFd,
    path: PathBuf,
}

impl Listener {
    /// Makes the socket at `path`; only `uid` and root may connect.
    pub(crate) fn bind(path: &Path, kind: SocketType, uid: u32) -> Result<Listener, ServeError> {
        let failed = |doing: &str| ServeError::system(format!("{doing} {}", path.display()));
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, kind, flags, None)
            .map_err(|error| failed("make a socket for")(error))?;
        let address = SocketAddrUnix::new(path)
            .map_err(|error| failed("use as a socket's path (108 bytes at most)")(error))?;
        rustix::net::bind(&socket, &address).map_err(|error| failed("make the socket")(error))?;
        let listener = Listener {
            socket,
            path: path.to_owned(),
        };
        // Nobody can connect before it listens.
        let owner = rustix::fs::Uid::from_raw(uid);
        rustix::fs::chown(path, Some(owner), None)
            .and_then(|()| rustix::fs::chmod(path, rustix::fs::Mode::from_raw_mode(0o600)))
            .and_then(|()| rustix::net::listen(&listener.socket, 16))
            .map_err(|error| failed("listen on")(error))?;
        Ok(listener)
    }

    /// Whoever connects next; `None` if nobody is waiting.
    pub(crate) fn accept(&self) -> io::Result<Option<OwnedFd>> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        match rustix::net::accept_with(&self.socket, flags) {
            Ok(connection) => Ok(Some(connection)),
            Err(
                rustix::io::Errno::AGAIN | rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED,
            ) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for somebody to connect.
    pub(crate) fn accept_within(&self, patience: Duration) -> io::Result<Option<OwnedFd>> {
        let until = Instant::now() + patience;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if !readable(&self.socket, left)? {
                return Ok(None);
            }
            if let Some(connection) = self.accept()? {
                return Ok(Some(connection));
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove a socket");
        }
    }
}

/// The housekeeper's life: until `shared.stop` is set.
pub(crate) fn keep(shared: &Shared, control: &Listener, status: &Path, saves: &Receiver<Save>) {
    let mut clients: Vec<OwnedFd> = Vec::new();
    loop {
        let stop = shared.stop.load(Ordering::Acquire);
        while let Ok(Save(set, path)) = saves.try_recv() {
            if let Err(error) = set.save(&path) {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                shared.note(format!("{error}: {}", cause.unwrap_or_default()));
            }
        }
        let account = shared.status();
        write_status(status, &account, shared);
        if stop {
            return;
        }
        let written = Instant::now();
        // Clients, until there is something to write.
        loop {
            let rang = serve_clients(shared, control, &mut clients).unwrap_or_else(|error| {
                // Memory is served all the same. Not again at once: it would fail again.
                tracing::warn!(%error, "the control socket cannot be served");
                std::thread::sleep(EVERY);
                false
            });
            let changed = account.counts != shared.counts();
            if rang || changed && written.elapsed() >= EVERY {
                break;
            }
        }
    }
}

fn write_status(path: &Path, status: &Status, shared: &Shared) {
    let result = serde_json::to_vec(status)
        .map_err(io::Error::from)
        .and_then(|bytes| replace(path, &bytes, false));
    if let Err(error) = result {
        shared.note(format!(
            "cannot write the status file {}: {error}",
            path.display()
        ));
    }
}

/// Tells in the status file why nothing was served at all.
pub(crate) fn write_failure(path: &Path, error: &ServeError) {
    let status = Status {
        pid: std::process::id(),
        monitor: None,
        state: State::Failed,
        reason: Some(error.reason()),
        pages: 0,
        counts: Counts::default(),
        notes: Vec::new(),
    };
    let written = serde_json::to_vec(&status)
        .map_err(io::Error::from)
        .and_then(|bytes| replace(path, &bytes, false));
    if let Err(error) = written {
        tracing::warn!(path = %path.display(), %error, "cannot write the status file");
    }
}

/// Waits for clients, not for ever, and answers them; tells whether the bell rang.
fn serve_clients(
    shared: &Shared,
    control: &Listener,
    clients: &mut Vec<OwnedFd>,
) -> io::Result<bool> {
    let mut polled = Vec::with_capacity(clients.len() + 2);
    polled.push(PollFd::new(&shared.for_house, PollFlags::IN));
    let listening = match clients.len() < MAX_CLIENTS {
        true => PollFlags::IN,
        false => PollFlags::empty(),
    };
    polled.push(PollFd::new(&control.socket, listening));
    polled.extend(
        clients
            .iter()
            .map(|client| PollFd::new(client, PollFlags::IN)),
    );
    match rustix::event::poll(&mut polled, Some(&timespec(EVERY))) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    let ready: Vec<bool> = polled
        .iter()
        .map(|polled| !polled.revents().is_empty())
        .collect();
    drop(polled);
    let mut index = 2;
    clients.retain(|client| {
        let keep = !ready.get(index).copied().unwrap_or(false) || answer(shared, client);
        index += 1;
        keep
    });
    if ready[1]
        && let Some(client) = control.accept()?
    {
        clients.push(client);
    }
    if ready[0] {
        shared.for_house.hush();
    }
    Ok(ready[0])
}

/// Answers one request; `false` if the client is gone or does not speak our language.
fn answer(shared: &Shared, client: &OwnedFd) -> bool {
    let mut bytes = vec![MaybeUninit::uninit(); MAX_BYTES];
    let request = match recv(client, &mut bytes[..], RecvFlags::DONTWAIT) {
        Ok((([], _), _)) => return false,
        Ok(((bytes, _), _)) => serde_json::from_slice::<Request>(bytes),
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return true,
        Err(_) => return false,
    };
    let answer = match request {
        Ok(request) => {
            obey(shared, request);
            serde_json::to_vec(&shared.status())
        }
        Err(error) => serde_json::to_vec(&Refusal {
            error: error.to_string(),
        }),
    };
    // A client that does not read its answers is no client.
    answer.is_ok_and(|answer| {
        send(client, &answer, SendFlags::DONTWAIT | SendFlags::NOSIGNAL).is_ok()
    })
}

/// The answer to what is no request.
#[derive(Debug, Serialize, Deserialize)]
struct Refusal {
    error: String,
}

fn obey(shared: &Shared, request: Request) {
    match request {
        Request::Status => {}
        Request::Cancel => shared.cancel(),
        Request::Throttle { bytes_per_second } => {
            let rate = bytes_per_second.unwrap_or(0);
            shared.rate.store(rate, Ordering::Relaxed);
            shared.for_server.ring();
        }
        Request::FinishRecording => {
            shared.finish_recording.store(true, Ordering::Relaxed);
            shared.for_server.ring();
        }
    }
}

/// Asks the page server whose control socket is at `path`. Fails with
/// [`io::ErrorKind::NotFound`] or [`io::ErrorKind::ConnectionRefused`] when there is none any
/// more. Blocking, for at most `patience`.
pub fn ask(path: &Path, request: Request, patience: Duration) -> io::Result<Status> {
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    send(&socket, &serde_json::to_vec(&request)?, SendFlags::NOSIGNAL)?;
    if !readable(&socket, patience)? {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let mut bytes = vec![MaybeUninit::uninit(); MAX_BYTES];
    let ((bytes, _), _) = recv(&socket, &mut bytes[..], RecvFlags::empty())?;
    if bytes.is_empty() {
        return Err(io::ErrorKind::ConnectionReset.into());
    }
    serde_json::from_slice(bytes).map_err(|error| match serde_json::from_slice::<Refusal>(bytes) {
        Ok(refusal) => io::Error::new(io::ErrorKind::InvalidInput, refusal.error),
        Err(_) => error.into(),
    })
}
