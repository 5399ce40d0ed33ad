//! Queries by TCP (RFC 7766): a thread per connection, few connections, short lives.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::guard::Guard;
use super::message::Query;
use super::upstreams::Upstreams;

/// Connections of a guest at the same time; more are closed at once.
const MOST_CONNECTIONS: usize = 16;
/// How long a connection may last, idle or not.
const LIFETIME: Duration = Duration::from_secs(30);
/// How long one resolver is waited for.
const PATIENCE: Duration = Duration::from_secs(3);
const STACK: usize = 128 * 1024;
/// Keeps an error that does not go away (no descriptors left) from becoming a busy loop.
const BREATHER: Duration = Duration::from_millis(50);

pub(super) fn serve(listener: &TcpListener, guard: &Guard, upstreams: Upstreams) {
    let open = Arc::new(AtomicUsize::new(0));
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(%error, "a connection to the resolver could not be accepted");
                std::thread::sleep(BREATHER);
                continue;
            }
        };
        let place = Place::take(&open);
        let upstreams = upstreams.clone();
        let guard = match guard.try_clone() {
            Ok(guard) => guard,
            Err(error) => {
                tracing::debug!(%error, "a connection to the resolver could not be served");
                std::thread::sleep(BREATHER);
                continue;
            }
        };
        if let Some(place) = place {
            let started = std::thread::Builder::new()
                .stack_size(STACK)
                .spawn(move || {
                    if let Err(error) = converse(stream, guard, upstreams) {
                        tracing::debug!(%error, "a connection to the resolver ended early");
                    }
                    drop(place);
                });
            if let Err(error) = started {
                tracing::warn!(%error, "no thread for a connection to the resolver");
            }
        }
    }
}

/// One of the places for connections; given back when dropped.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(open: &Arc<AtomicUsize>) -> Option<Self> {
        if open.fetch_add(1, Ordering::AcqRel) < MOST_CONNECTIONS {
            return Some(Self(Arc::clone(open)));
        }
        open.fetch_sub(1, Ordering::AcqRel);
        None
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

fn converse(mut guest: TcpStream, mut guard: Guard, mut upstreams: Upstreams) -> io::Result<()> {
    let end = Instant::now() + LIFETIME;
    guest.set_write_timeout(Some(PATIENCE))?;
    loop {
        let Some(message) = read_message(&mut guest, end)? else {
            return Ok(());
        };
        // Unlike a datagram, a stream has no next message to wait for after nonsense.
        let Some(query) = Query::read(&message) else {
            return Ok(());
        };
        let answer = guard.judge(&query).unwrap_or_else(|| {
            upstreams
                .current()
                .iter()
                .find_map(|upstream| ask(&query, *upstream).ok().flatten())
                .map_or_else(|| query.failure(), |answer| guard.admit(&query, answer))
        });
        write_message(&mut guest, &answer)?;
    }
}

fn ask(query: &Query, upstream: SocketAddr) -> io::Result<Option<Vec<u8>>> {
    let end = Instant::now() + PATIENCE;
    let mut stream = TcpStream::connect_timeout(&upstream, PATIENCE)?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let id = crate::sys::random()?;
    write_message(&mut stream, &query.numbered(id))?;
    Ok(read_message(&mut stream, end)?.and_then(|reply| query.answer(&reply, id)))
}

/// A message with its length in front; `None` at the end of the stream.
fn read_message(stream: &mut TcpStream, end: Instant) -> io::Result<Option<Vec<u8>>> {
    let mut len = [0; 2];
    if !read_by(stream, &mut len, end)? {
        return Ok(None);
    }
    let mut message = vec![0; usize::from(u16::from_be_bytes(len))];
    if !read_by(stream, &mut message, end)? {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Some(message))
}

/// Fills `buffer`, however slowly the bytes come, until `end`; false if the stream ends first.
fn read_by(stream: &mut TcpStream, buffer: &mut [u8], end: Instant) -> io::Result<bool> {
    let mut filled = 0;
    while filled < buffer.len() {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut buffer[filled..]) {
            Ok(0) => return Ok(false),
            Ok(len) => filled += len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

fn write_message(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let len = u16::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidData)?;
    let mut bytes = len.to_be_bytes().to_vec();
    bytes.extend_from_slice(message);
    stream.write_all(&bytes)
}
