//! What can go wrong with a snapshot.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use wrenn_types::Shape;

use crate::{BaseId, SnapshotId};

/// What is wrong with bytes that were read, before it is known which file they are from.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// Bytes that are not what was written.
    #[error("at byte {offset}: {problem}")]
    Damaged {
        /// Where in the file.
        offset: u64,
        /// What is wrong there.
        problem: String,
    },
    /// A format of another program version.
    #[error("has format version {found}, this program knows {known}")]
    Version {
        /// The version it has.
        found: u32,
        /// The version this program reads.
        known: u32,
    },
}

impl Fault {
    /// Damage at byte `offset`.
    pub(crate) fn at(offset: u64, problem: impl Into<String>) -> Fault {
        Fault::Damaged {
            offset,
            problem: problem.into(),
        }
    }

    /// The same, in the file `path`.
    pub(crate) fn in_file(self, path: &Path) -> SnapshotError {
        let path = path.to_owned();
        match self {
            Fault::Damaged { offset, problem } => SnapshotError::Damaged {
                path,
                offset,
                problem,
            },
            Fault::Version { found, known } => SnapshotError::Version { path, found, known },
        }
    }
}

/// Who needs a snapshot that was to be deleted.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Need {
    /// A snapshot that was made from it.
    Child(SnapshotId),
    /// Whoever pinned it, by the name they gave.
    Pin(String),
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Need::Child(id) => write!(f, "snapshot {id}"),
            Need::Pin(owner) => f.write_str(owner),
        }
    }
}

/// Why a snapshot could not be written, read or deleted.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The operating system refused something.
    #[error("cannot {doing} {path}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To which file or folder.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A file is not what was written: bytes changed, cut, or another file in its place.
    #[error(
        "{path} is damaged at byte {offset}: {problem}; restore it from a copy or delete the snapshots that use it"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where in it.
        offset: u64,
        /// What is wrong there.
        problem: String,
    },
    /// A file that a snapshot consists of is gone.
    #[error(
        "{path} is missing: a snapshot needs it; restore it from a copy or delete the snapshots that use it"
    )]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// A file was written by another version of the format.
    #[error(
        "{path} has format version {found}, this program knows {known}: use the version of wrenn that wrote it"
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// The version it has.
        found: u32,
        /// The version this program reads.
        known: u32,
    },
    /// There is no such snapshot.
    #[error("there is no snapshot {id}")]
    NotFound {
        /// Its name.
        id: SnapshotId,
    },
    /// Something still needs a snapshot that was to be deleted.
    #[error("snapshot {id} cannot be deleted: {} still needs it; delete that first, or ask for it to be deleted once nothing does", list(.by))]
    InUse {
        /// The snapshot.
        id: SnapshotId,
        /// What needs it.
        by: Vec<Need>,
    },
    /// Another size of machine was asked for than the snapshot has.
    #[error(
        "a snapshot of {has} cannot become a machine of {asked}: the shape of a snapshot is fixed; boot an image template with that shape instead"
    )]
    Shape {
        /// What was asked for.
        asked: Shape,
        /// What the snapshot has.
        has: Shape,
    },
    /// Memory that is not whole pages, or more than the format can hold.
    #[error(
        "memory of {0} bytes cannot be saved: it must be a positive multiple of 4096 and below 16 TiB"
    )]
    Size(u64),
    /// Pages written outside the memory.
    #[error("pages {first} to {end} are outside a memory of {pages} pages")]
    Range {
        /// First page.
        first: u64,
        /// The page behind the last.
        end: u64,
        /// Pages of the memory.
        pages: u64,
    },
    /// Page runs that do not ascend.
    #[error(
        "page {first} was written after page {next} was expected: write page runs in ascending order, each page once"
    )]
    Order {
        /// First page of the run.
        first: u64,
        /// The lowest page that may still be written.
        next: u64,
    },
    /// The content of the base is needed, and was not given.
    #[error("page {page} comes from base {base}, which was not given: load that template first")]
    NoBase {
        /// The page.
        page: u64,
        /// The base it comes from.
        base: BaseId,
    },
    /// Another base was given than the snapshot is laid over.
    #[error("the snapshot is laid over base {needs}, not over {given}")]
    OtherBase {
        /// What the snapshot needs (`none`, or a digest).
        needs: String,
        /// What was given.
        given: String,
    },
    /// Reading the base failed.
    #[error("cannot read page {page} of base {base}")]
    Base {
        /// The base.
        base: BaseId,
        /// First page that was read.
        page: u64,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A snapshot that is not complete was to be committed.
    #[error("the snapshot cannot be saved: {0}")]
    Incomplete(String),
    /// A name that cannot be a file name.
    #[error("{0:?} cannot be a name here: use 1 to 64 of a-z, 0-9, '-', '_', and '.' inside")]
    Name(String),
    /// Compression failed.
    #[error("cannot compress memory")]
    Compression(#[source] io::Error),
    /// The caller stopped a merge.
    #[error("stopped before the end, nothing was changed")]
    Cancelled,
}

/// The first few of what needs a snapshot, as a sentence's subject.
fn list(by: &[Need]) -> String {
    const SHOWN: usize = 3;
    let mut text = by
        .iter()
        .take(SHOWN)
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(", ");
    if by.len() > SHOWN {
        text.push_str(&format!(" and {} more", by.len() - SHOWN));
    }
    text
}

impl SnapshotError {
    /// Wraps what the operating system said about `path`.
    pub(crate) fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SnapshotError {
        let path = path.to_owned();
        move |source| SnapshotError::Io {
            doing,
            path,
            source,
        }
    }

    /// As [`SnapshotError::io`], for a file that must be there.
    pub(crate) fn needed(
        doing: &'static str,
        path: &Path,
    ) -> impl FnOnce(io::Error) -> SnapshotError {
        let path = path.to_owned();
        move |source| match source.kind() {
            io::ErrorKind::NotFound => SnapshotError::Missing { path },
            // A file that grew shorter while it was read.
            io::ErrorKind::UnexpectedEof => SnapshotError::Damaged {
                path,
                offset: 0,
                problem: "the file ends too early".into(),
            },
            _ => SnapshotError::Io {
                doing,
                path,
                source,
            },
        }
    }
}

/// Result of this crate's operations.
pub type Result<T, E = SnapshotError> = std::result::Result<T, E>;
