//! What the kernel alone takes to move the same bytes: no agent can be faster on this
//! machine, in this minute. A busy machine slows both.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use bytes::Bytes;

use super::content::{PIECE, continues};

/// Bytes of an event of output.
const EVENT: usize = 32 << 10;

/// Bytes per second of a program's output through its pipe and a socket.
pub(super) async fn output(size: u64) -> io::Result<f64> {
    blocking(move || {
        let mut child = Command::new("/usr/bin/head")
            .args(["-c", &size.to_string(), "/dev/zero"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let pipe = child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
        let rate = through_socket(size, pipe, EVENT, |_, data| {
            match data.iter().all(|byte| *byte == 0) {
                true => Ok(()),
                false => Err(io::Error::other("zeros came out as something else")),
            }
        });
        child.wait()?;
        rate
    })
    .await
}

/// Bytes per second from memory through a socket into the file `path`.
pub(super) async fn upload(size: u64, piece: Bytes, path: PathBuf) -> io::Result<f64> {
    blocking(move || {
        let mut file = std::fs::File::create(path)?;
        let source = Pieces { piece, at: 0 };
        through_socket(size, source, PIECE, |_, data| file.write_all(data))
    })
    .await
}

/// Bytes per second from the file `path` through a socket.
pub(super) async fn download(size: u64, piece: Bytes, path: PathBuf) -> io::Result<f64> {
    blocking(move || {
        let file = std::fs::File::open(path)?;
        through_socket(size, file, PIECE, |at, data| {
            match continues(&piece, at, data) {
                true => Ok(()),
                false => Err(io::Error::other("a file came out as something else")),
            }
        })
    })
    .await
}

async fn blocking(work: impl FnOnce() -> io::Result<f64> + Send + 'static) -> io::Result<f64> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(io::Error::other)?
}

/// The same piece again and again.
struct Pieces {
    piece: Bytes,
    at: usize,
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = (self.piece.len() - self.at).min(buffer.len());
        buffer[..length].copy_from_slice(&self.piece[self.at..self.at + length]);
        self.at = (self.at + length) % self.piece.len();
        Ok(length)
    }
}

/// Sends `size` bytes of `source`, at most `chunk` at a time, to another thread, which shows
/// them to `sink` with their offset. Not by io::copy: the kernel would move them by itself,
/// and no agent may let them pass unseen.
fn through_socket(
    size: u64,
    source: impl Read + Send + 'static,
    chunk: usize,
    mut sink: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<f64> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut sender = TcpStream::connect(listener.local_addr()?)?;
    let (mut receiver, _) = listener.accept()?;
    sender.set_nodelay(true)?;
    let began = Instant::now();
    let sending = std::thread::spawn(move || -> io::Result<()> {
        let mut source = source.take(size);
        let mut buffer = vec![0; chunk];
        loop {
            match source.read(&mut buffer)? {
                0 => return Ok(()),
                length => sender.write_all(&buffer[..length])?,
            }
        }
    });
    let mut buffer = vec![0; PIECE];
    let mut at = 0;
    loop {
        match receiver.read(&mut buffer)? {
            0 => break,
            length => {
                sink(at, &buffer[..length])?;
                at += length as u64;
            }
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    sending
        .join()
        .map_err(|_| io::Error::other("the sending thread broke"))??;
    if at != size {
        return Err(io::Error::other(format!("{at} bytes of {size} came out")));
    }
    Ok(size as f64 / seconds)
}

#[cfg(test)]
mod tests {
    use super::super::content::piece;
    use super::*;

    #[tokio::test]
    async fn every_byte_goes_through() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let size = 3 * PIECE as u64;
        assert!(output(size).await.unwrap() > 0.0);
        assert!(upload(size, piece(), path.clone()).await.unwrap() > 0.0);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), size);
        assert!(download(size, piece(), path.clone()).await.unwrap() > 0.0);
        std::fs::write(&path, vec![1; PIECE]).unwrap();
        assert!(download(size, piece(), path).await.is_err());
    }
}
