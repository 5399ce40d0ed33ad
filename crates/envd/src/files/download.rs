//! `GET /files`.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime};

use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State as Extract};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use futures::{StreamExt, TryStreamExt, stream};
use http::response::Builder;
use http::{HeaderMap, HeaderName, StatusCode, header};
use rustix::buffer::spare_capacity;
use rustix::fd::AsRawFd;
use rustix::fs::{Advice, FileType as Kind, Mode, OFlags};
use rustix::io::Errno;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::conditions::{self, Verdict, Version};
use super::encoding::{self, Coding};
use super::{FileQuery, HttpError, resolve};
use crate::auth::Operation;
use crate::filesystem::error::FsError;
use crate::filesystem::identity;
use crate::state::State;

/// Read at once for each of the first [`FAST`] downloads, with one more read under way.
const LARGE: usize = 512 << 10;
/// Read at once for all others, one at a time: a thousand stuck clients hold 64 MiB.
const SMALL: usize = 64 << 10;
/// Downloads that get large buffers.
const FAST: usize = 16;
/// Of a file this long at most, the compressed length is known before the answer begins.
const COMPRESSED_AT_ONCE: u64 = 256 << 10;
/// Bytes compressed to see whether compressing a longer file is worth it.
const SAMPLE: usize = 64 << 10;
/// A file changed within this time may change again and keep its times: they are as fine as
/// the kernel's tick.
const FRESH: Duration = Duration::from_secs(1);

static BUFFERS: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Arc::new(Semaphore::new(FAST)));

/// An open regular file.
struct Source {
    file: Arc<File>,
    size: u64,
    version: Version,
}

/// The bytes of a regular file: all, compressed, or a part of them.
///
/// # Errors
/// 400 for anything but a regular file, 401, 403, 404, 406.
pub async fn download(
    Extract(state): Extract<Arc<State>>,
    query: Result<Query<FileQuery>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Response, HttpError> {
    let Query(query) = query?;
    let user = query.admit(&state, &headers, Operation::Read)?;
    let path = resolve(query.path.as_deref().unwrap_or(""), &user, &state)?;
    let opened = path.clone();
    let source = {
        let _open = state.enter().await?;
        identity::run(&user, move || open(&opened)).await?
    };
    let conditional = conditions::is_conditional(&headers);
    let coding = encoding::negotiate(&headers).ok_or(HttpError::NotAcceptable)?;
    let verdict = conditions::judge(&headers, &source.version, source.size);
    let size = source.size;
    let (first, last) = match verdict {
        Verdict::NotModified => {
            return finish(head(StatusCode::NOT_MODIFIED, &source), Body::empty());
        }
        Verdict::Failed => {
            let message = "the file is not in the state that the request's conditions ask for";
            let status = StatusCode::PRECONDITION_FAILED;
            return Ok(crate::server::error_response(status, message));
        }
        Verdict::Unsatisfiable => {
            let message = format!("the range is outside the file, which has {size} bytes");
            let status = StatusCode::RANGE_NOT_SATISFIABLE;
            let range = [(header::CONTENT_RANGE, format!("bytes */{size}"))];
            return Ok((range, crate::server::error_response(status, &message)).into_response());
        }
        Verdict::Partial { first, last } => (first, last),
        Verdict::Full if coding == Coding::Gzip && !conditional && size > 0 => {
            return compressed(source, &path).await;
        }
        Verdict::Full => {
            return finish(
                plain(StatusCode::OK, &source, &path, size),
                body(source.file, 0, size),
            );
        }
    };
    let length = last - first + 1;
    let head = plain(StatusCode::PARTIAL_CONTENT, &source, &path, length).header(
        header::CONTENT_RANGE,
        format!("bytes {first}-{last}/{size}"),
    );
    finish(head, body(source.file, first, length))
}

/// Opens `path` for reading if it is a regular file. What it is is seen on a descriptor that
/// cannot yet read (`O_PATH`), so that no device is opened and no pipe's writer woken; that
/// same file is then opened.
fn open(path: &Path) -> Result<Source, FsError> {
    let failed = |errno| match errno {
        Errno::NOTDIR => FsError::Missing(path.to_owned()),
        other => FsError::from_errno("read", path, other),
    };
    let seen =
        rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(failed)?;
    let stat = rustix::fs::fstat(&seen).map_err(failed)?;
    match Kind::from_raw_mode(stat.st_mode) {
        Kind::RegularFile => {}
        Kind::Directory => return Err(FsError::IsDirectory(path.to_owned())),
        _ => return Err(FsError::NotRegular(path.to_owned())),
    }
    let by_descriptor = format!("/proc/self/fd/{}", seen.as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file: File = rustix::fs::open(by_descriptor, flags, Mode::empty())
        .map_err(|errno| FsError::from_errno("read", path, errno))?
        .into();
    // Only advice.
    let _advised = rustix::fs::fadvise(&file, 0, None, Advice::Sequential).is_ok();
    let modified = file
        .metadata()
        .and_then(|meta| meta.modified())
        .map_err(|e| FsError::from_io("read", path, &e))?;
    let changed = SystemTime::UNIX_EPOCH
        + Duration::new(
            u64::try_from(stat.st_ctime).unwrap_or(0),
            u32::try_from(stat.st_ctime_nsec).unwrap_or(0),
        );
    let age = SystemTime::now().duration_since(changed);
    Ok(Source {
        file: Arc::new(file),
        size: u64::try_from(stat.st_size).unwrap_or(0),
        version: Version {
            tag: format!(
                "{:x}-{:x}-{:x}.{:x}-{:x}.{:x}",
                stat.st_ino,
                stat.st_size,
                stat.st_mtime,
                stat.st_mtime_nsec,
                stat.st_ctime,
                stat.st_ctime_nsec
            ),
            fresh: age.is_ok_and(|age| age < FRESH),
            modified,
        },
    })
}

fn head(status: StatusCode, source: &Source) -> Builder {
    Response::builder()
        .status(status)
        .header(header::VARY, "Accept-Encoding")
        .header(header::ACCEPT_RANGES, "bytes")
        .header(header::ETAG, source.version.etag())
        .header(
            header::LAST_MODIFIED,
            httpdate::fmt_http_date(source.version.modified),
        )
}

fn plain(status: StatusCode, source: &Source, path: &Path, length: u64) -> Builder {
    described(head(status, source), path).header(header::CONTENT_LENGTH, length)
}

fn described(head: Builder, path: &Path) -> Builder {
    head.header(header::CONTENT_TYPE, content_type(path))
        .header(header::CONTENT_DISPOSITION, "inline")
        .header(HeaderName::from_static("x-content-type-options"), "nosniff")
}

fn finish(head: Builder, body: Body) -> Result<Response, HttpError> {
    head.body(body)
        .map_err(|error| FsError::Internal(format!("cannot answer: {error}")).into())
}

/// Streams `length` bytes from `first`.
fn body(file: Arc<File>, first: u64, length: u64) -> Body {
    // A short file fits one small buffer anyway.
    let permit = (length > SMALL as u64)
        .then(|| Arc::clone(&BUFFERS).try_acquire_owned().ok())
        .flatten();
    let (step, ahead) = if permit.is_some() {
        (LARGE, 2)
    } else {
        (SMALL, 1)
    };
    let end = first + length;
    let reads = stream::iter((first..end).step_by(step)).map(move |at| {
        let file = Arc::clone(&file);
        let wanted = step.min(usize::try_from(end - at).unwrap_or(step));
        read_exactly(file, at, wanted)
    });
    Body::from_stream(reads.buffered(ahead).inspect_ok(move |_| keep(&permit)))
}

/// Ties the permit's life to the stream's.
fn keep(_permit: &Option<OwnedSemaphorePermit>) {}

async fn read_exactly(file: Arc<File>, at: u64, wanted: usize) -> std::io::Result<Bytes> {
    let read = move || {
        let mut buffer = Vec::with_capacity(wanted);
        read_at(&file, at, wanted, &mut buffer)?;
        if buffer.len() < wanted {
            // The length is promised already: the client must see that this is not it.
            return Err(std::io::Error::new(
                std::io::ErrorKind::UnexpectedEof,
                "the file became shorter while it was read",
            ));
        }
        Ok(Bytes::from(buffer))
    };
    tokio::task::spawn_blocking(read).await?
}

/// Reads up to `wanted` bytes into the spare capacity of `buffer`.
fn read_at(file: &File, at: u64, wanted: usize, buffer: &mut Vec<u8>) -> std::io::Result<()> {
    let before = buffer.len();
    buffer.reserve_exact(wanted);
    while buffer.len() - before < wanted {
        let position = at + (buffer.len() - before) as u64;
        match rustix::io::pread(file, spare_capacity(buffer), position) {
            Ok(0) => break,
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    // An allocation may be larger than was asked for.
    buffer.truncate(before + wanted);
    Ok(())
}

/// Compresses while sending. A short file is compressed before, so that its length is known;
/// a long one that does not become smaller goes out as it is.
async fn compressed(source: Source, path: &Path) -> Result<Response, HttpError> {
    let file = Arc::clone(&source.file);
    let size = source.size;
    let begin = move || -> std::io::Result<(Vec<u8>, u64)> {
        let amount = if size <= COMPRESSED_AT_ONCE {
            size
        } else {
            SAMPLE as u64
        };
        let mut plain = Vec::new();
        read_at(
            &file,
            0,
            usize::try_from(amount).unwrap_or(SAMPLE),
            &mut plain,
        )?;
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(&plain)?;
        Ok((encoder.finish()?, plain.len() as u64))
    };
    let (packed, taken) = tokio::task::spawn_blocking(begin)
        .await
        .map_err(|error| FsError::Internal(format!("file work broke off: {error}")))?
        .map_err(|error| FsError::from_io("read", path, &error))?;
    let whole = size <= COMPRESSED_AT_ONCE;
    if !whole && packed.len() as u64 > taken / 10 * 9 {
        let head = plain(StatusCode::OK, &source, path, size);
        return finish(head, body(source.file, 0, size));
    }
    let mut head =
        described(head(StatusCode::OK, &source), path).header(header::CONTENT_ENCODING, "gzip");
    if let Some(headers) = head.headers_mut()
        && let Ok(tag) = source.version.etag_gzip().parse()
    {
        headers.insert(header::ETAG, tag);
    }
    if whole {
        return finish(head, Body::from(packed));
    }
    finish(head, packing(source.file))
}

struct Packing {
    file: Arc<File>,
    at: u64,
    encoder: GzEncoder<Vec<u8>>,
}

/// The gzip stream of a file, up to wherever it ends.
fn packing(file: Arc<File>) -> Body {
    let start = Packing {
        file,
        at: 0,
        encoder: GzEncoder::new(Vec::new(), Compression::fast()),
    };
    let chunks = stream::try_unfold(Some(start), |state| async move {
        let Some(state) = state else { return Ok(None) };
        tokio::task::spawn_blocking(move || state.next()).await?
    });
    Body::from_stream(chunks)
}

impl Packing {
    fn next(mut self) -> std::io::Result<Option<(Bytes, Option<Packing>)>> {
        let mut plain = Vec::with_capacity(SMALL);
        loop {
            plain.clear();
            read_at(&self.file, self.at, SMALL, &mut plain)?;
            if plain.is_empty() {
                return Ok(Some((Bytes::from(self.encoder.finish()?), None)));
            }
            self.at += plain.len() as u64;
            self.encoder.write_all(&plain)?;
            let packed = std::mem::take(self.encoder.get_mut());
            if !packed.is_empty() {
                return Ok(Some((Bytes::from(packed), Some(self))));
            }
        }
    }
}

/// For browsers that open a signed address; programs go by the bytes.
fn content_type(path: &Path) -> &'static str {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("");
    match extension.to_ascii_lowercase().as_str() {
        "txt" | "log" | "md" | "py" | "rs" | "go" | "c" | "h" | "sh" | "toml" | "yaml" | "yml"
        | "ts" | "tsx" | "jsx" | "ini" | "cfg" => "text/plain; charset=utf-8",
        "html" | "htm" => "text/html; charset=utf-8",
        "css" => "text/css; charset=utf-8",
        "csv" => "text/csv; charset=utf-8",
        "js" | "mjs" => "text/javascript; charset=utf-8",
        "json" => "application/json",
        "xml" => "application/xml",
        "pdf" => "application/pdf",
        "png" => "image/png",
        "jpg" | "jpeg" => "image/jpeg",
        "gif" => "image/gif",
        "webp" => "image/webp",
        "svg" => "image/svg+xml",
        "ico" => "image/x-icon",
        "mp3" => "audio/mpeg",
        "wav" => "audio/wav",
        "mp4" => "video/mp4",
        "webm" => "video/webm",
        "zip" => "application/zip",
        "gz" | "tgz" => "application/gzip",
        "wasm" => "application/wasm",
        _ => "application/octet-stream",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn g31_only_regular_files_are_opened() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        std::fs::write(&file, "hello").unwrap();
        assert_eq!(open(&file).unwrap().size, 5);
        assert!(matches!(open(dir.path()), Err(FsError::IsDirectory(_))));
        assert!(matches!(open(&file.join("x")), Err(FsError::Missing(_))));
        assert!(matches!(
            open(Path::new("/dev/zero")),
            Err(FsError::NotRegular(_))
        ));
        let fifo = dir.path().join("fifo");
        let mode = Mode::from_raw_mode(0o600);
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, mode).unwrap();
        assert!(matches!(open(&fifo), Err(FsError::NotRegular(_))));
    }

    #[test]
    fn reading_stops_at_what_was_wanted_or_at_the_end() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 1000]).unwrap();
        for (at, wanted, expected) in [(0, 10, 10), (990, 100, 10), (2000, 5, 0), (0, 1000, 1000)] {
            let mut buffer = Vec::new();
            read_at(&file, at, wanted, &mut buffer).unwrap();
            assert_eq!(buffer.len(), expected);
        }
    }
}
