//! What is in a guest, as its agent lists it for a comparison. A guest's user may be root and
//! its agent say anything: what does not hold is an error here, and nothing is without a bound.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use base64::Engine as _;
use bytes::Bytes;
use http::{Method, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde::{Deserialize, Serialize};

use super::{
    Guest, GuestError, INIT_ATTEMPT, NON_ALPHANUMERIC, RETRY_PAUSE, full, utf8_percent_encode,
};

/// The longest line: a path of 4096 bytes that are all escaped, and the rest.
const LONGEST_LINE: usize = 64 << 10;
/// The first line: programs and ports.
const LONGEST_FIRST_LINE: usize = 16 << 20;
/// An answer about the digests of one batch.
const LONGEST_DIGESTS: usize = 1 << 20;
const LISTING: &str = "to list what is in it (/snapshot/inventory)";
const DIGESTS: &str = "to read files (/snapshot/digests)";

/// A path of a guest, which may be no UTF-8.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GuestPath {
    /// As it is.
    Path(String),
    /// In base64.
    Raw(String),
}

impl GuestPath {
    fn bytes(&self) -> Option<Vec<u8>> {
        match self {
            GuestPath::Path(text) => Some(text.as_bytes().to_vec()),
            GuestPath::Raw(text) => base64::engine::general_purpose::STANDARD.decode(text).ok(),
        }
    }
}

/// What a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileKind {
    /// A regular one.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
    /// A block device.
    BlockDevice,
    /// A character device.
    CharacterDevice,
}

impl FileKind {
    /// As the API says it.
    pub fn word(self) -> &'static str {
        match self {
            FileKind::File => "file",
            FileKind::Directory => "directory",
            FileKind::Symlink => "symlink",
            FileKind::Fifo => "fifo",
            FileKind::Socket => "socket",
            FileKind::BlockDevice => "block_device",
            FileKind::CharacterDevice => "character_device",
        }
    }
}

/// A file of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct GuestFile {
    /// Where it is.
    #[serde(flatten)]
    pub name: GuestPath,
    /// What it is.
    pub kind: FileKind,
    /// Permission bits.
    pub mode: u32,
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Bytes.
    pub size: u64,
    /// When its content was changed, in nanoseconds since 1970.
    pub modified: i64,
    /// When anything of it was changed; programs cannot set it.
    pub changed: i64,
    /// Its number on the disk.
    pub inode: u64,
    /// The path in an order in which what is in a directory comes right behind it.
    #[serde(skip)]
    pub key: Vec<u8>,
}

impl GuestFile {
    /// The path for people.
    pub fn path(&self) -> String {
        let bytes = self.name.bytes().unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Fills in the key.
    pub fn with_key(mut self) -> Option<GuestFile> {
        let mut key = self
            .name
            .bytes()
            .filter(|path| path.first() == Some(&b'/'))?;
        // Below every byte that a name can have.
        key.iter_mut()
            .filter(|byte| **byte == b'/')
            .for_each(|byte| *byte = 0);
        self.key = key;
        Some(self)
    }
}

/// A program that runs in a guest.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Deserialize)]
pub struct GuestProcess {
    /// Its number.
    pub pid: u32,
    /// When it was started, in ticks of its kernel.
    pub started: u64,
    /// Whose it is.
    pub uid: u32,
    /// Program and arguments.
    pub command: String,
}

/// A port that is listened on in a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
pub struct GuestPort {
    /// Its number.
    pub port: u16,
    /// On which address.
    pub address: IpAddr,
}

/// What runs in a guest.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Running {
    /// Programs, by number.
    pub processes: Vec<GuestProcess>,
    /// Ports, by number.
    pub ports: Vec<GuestPort>,
}

#[derive(Deserialize)]
struct End {
    end: bool,
    truncated: bool,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Line {
    File(GuestFile),
    End(End),
}

/// A listing on its way.
pub struct Inventory {
    /// What ran when it began.
    pub running: Running,
    lines: Lines,
    last: Vec<u8>,
    ended: Option<bool>,
}

impl Inventory {
    /// The next file, in the order of [`GuestFile::key`].
    pub async fn next(&mut self) -> Result<Option<GuestFile>, GuestError> {
        if self.ended.is_some() {
            return Ok(None);
        }
        let line = self.lines.next(LONGEST_LINE).await?;
        let line = line.ok_or_else(|| broken(LISTING, "the listing broke off"))?;
        match serde_json::from_slice(&line).map_err(|e| broken(LISTING, e))? {
            Line::End(End { end, truncated }) => {
                self.ended = Some(truncated || !end);
                Ok(None)
            }
            Line::File(file) => {
                let file = file.with_key().filter(|file| file.key > self.last);
                let file = file.ok_or_else(|| broken(LISTING, "its files are in no order"))?;
                self.last.clone_from(&file.key);
                Ok(Some(file))
            }
        }
    }

    /// Whether there was more than it has told of.
    pub fn truncated(&self) -> bool {
        self.ended == Some(true)
    }
}

/// The lines of a body.
struct Lines {
    body: Incoming,
    waiting: Vec<u8>,
    /// Where in `waiting` the next line begins.
    from: usize,
}

impl Lines {
    async fn next(&mut self, longest: usize) -> Result<Option<Vec<u8>>, GuestError> {
        let mut looked = self.from;
        loop {
            let rest = &self.waiting[looked..];
            if let Some(at) = rest.iter().position(|byte| *byte == b'\n') {
                let line = self.waiting[self.from..looked + at].to_vec();
                self.from = looked + at + 1;
                return Ok(Some(line));
            }
            self.waiting.drain(..self.from);
            self.from = 0;
            looked = self.waiting.len();
            if looked > longest {
                return Err(broken(LISTING, "a line has no end"));
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(Err(error)) => return Err(broken(LISTING, super::chain(&error))),
                Some(Ok(frame)) => {
                    let data = frame.into_data().unwrap_or_else(|_| Bytes::new());
                    self.waiting.extend_from_slice(&data);
                }
            }
        }
    }
}

fn broken(what: &'static str, cause: impl ToString) -> GuestError {
    GuestError::Broken {
        what,
        cause: cause.to_string(),
    }
}

impl Guest {
    /// Begins a listing of what is at and below `path`: tries until the agent answers or
    /// `patience` is over, for it may be one that has just been restored.
    pub async fn inventory(&self, path: &str, patience: Duration) -> Result<Inventory, GuestError> {
        let started = Instant::now();
        loop {
            let last = match tokio::time::timeout(INIT_ATTEMPT, self.inventory_once(path)).await {
                Ok(Ok(inventory)) => return Ok(inventory),
                Ok(Err(refused @ GuestError::Refused { .. })) => return Err(refused),
                Ok(Err(other)) => other.to_string(),
                Err(_) => format!("no answer within {INIT_ATTEMPT:?}"),
            };
            let waited = started.elapsed();
            if waited >= patience {
                let what = LISTING;
                return Err(GuestError::Unreachable { what, waited, last });
            }
            tokio::time::sleep(RETRY_PAUSE).await;
        }
    }

    async fn inventory_once(&self, path: &str) -> Result<Inventory, GuestError> {
        let path = utf8_percent_encode(path, NON_ALPHANUMERIC);
        let request = self
            .request(Method::POST, &format!("/snapshot/inventory?path={path}"))
            .body(full(""))
            .map_err(|e| broken(LISTING, e))?;
        let answer = self.send(LISTING, request).await?;
        let mut lines = Lines {
            body: answer.into_body(),
            waiting: Vec::new(),
            from: 0,
        };
        let first = lines.next(LONGEST_FIRST_LINE).await?;
        let first = first.ok_or_else(|| broken(LISTING, "the listing broke off"))?;
        Ok(Inventory {
            running: serde_json::from_slice(&first).map_err(|e| broken(LISTING, e))?,
            lines,
            last: Vec::new(),
            ended: None,
        })
    }

    /// Digests of what these files hold; `None` where one cannot be read any more.
    pub async fn digests(&self, paths: &[&GuestPath]) -> Result<Vec<Option<String>>, GuestError> {
        #[derive(Deserialize)]
        struct Digests {
            digests: Vec<Option<String>>,
        }
        let body = serde_json::json!({ "paths": paths });
        let request = self
            .request(Method::POST, "/snapshot/digests")
            .header("content-type", "application/json")
            .body(full(body.to_string()))
            .map_err(|e| broken(DIGESTS, e))?;
        let answer = self.send(DIGESTS, request).await?;
        let body = http_body_util::Limited::new(answer.into_body(), LONGEST_DIGESTS);
        let body = body.collect().await.map_err(|e| broken(DIGESTS, e))?;
        let Digests { digests } =
            serde_json::from_slice(&body.to_bytes()).map_err(|e| broken(DIGESTS, e))?;
        match digests.len() == paths.len() {
            true => Ok(digests),
            false => Err(broken(DIGESTS, "it answers for other files")),
        }
    }
}

/// Whether a guest agent said that it knows no listings: it is of an earlier version.
pub fn lists_nothing(error: &GuestError) -> bool {
    matches!(error, GuestError::Refused { what, status, .. }
        if *what == LISTING && *status == StatusCode::NOT_FOUND)
}
