//! What can go wrong with files, and how each border says it.

use std::path::{Path, PathBuf};

use connectrpc::ConnectError;
use http::StatusCode;
use rustix::io::Errno;

/// Why file work failed. The text names the path and is meant for the caller.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// Nothing is at the path.
    #[error("path '{}' does not exist", .0.display())]
    Missing(PathBuf),
    /// Something is at the path already.
    #[error("path '{}' already exists", .0.display())]
    Exists(PathBuf),
    /// A directory was asked for.
    #[error("path '{}' is not a directory", .0.display())]
    NotDirectory(PathBuf),
    /// A file was asked for.
    #[error("path '{}' is a directory", .0.display())]
    IsDirectory(PathBuf),
    /// A device, socket or pipe, where only a regular file will do.
    #[error("path '{}' is not a regular file", .0.display())]
    NotRegular(PathBuf),
    /// The request itself is wrong.
    #[error("{0}")]
    Invalid(String),
    /// The user may not.
    #[error("permission denied: cannot {action} '{}'", path.display())]
    Denied {
        /// What was tried, as a verb.
        action: &'static str,
        /// On what.
        path: PathBuf,
    },
    /// The file system is full, or the user's quota.
    #[error("not enough space: cannot {action} '{}'", path.display())]
    NoSpace {
        /// What was tried, as a verb.
        action: &'static str,
        /// On what.
        path: PathBuf,
    },
    /// A limit of ours or of the kernel's was reached.
    #[error("{0}")]
    Exhausted(String),
    /// Events of a watch are missing.
    #[error(
        "events were lost: the directory changed faster than they were read; list it and watch again"
    )]
    EventsLost,
    /// No such watcher.
    #[error("watcher with id '{0}' not found")]
    NoWatcher(String),
    /// Any other answer of the kernel.
    #[error("cannot {action} '{}': {source}", path.display())]
    System {
        /// What was tried, as a verb.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        source: Errno,
    },
    /// The thread could not become the user.
    #[error("cannot act as the requested user: {0}")]
    Identity(Errno),
    /// Something of ours broke.
    #[error("{0}")]
    Internal(String),
}

impl FsError {
    /// Sorts the kernel's answer to `action` (a verb) on `path`.
    pub fn from_errno(action: &'static str, path: &Path, errno: Errno) -> FsError {
        let path = path.to_owned();
        match errno {
            Errno::NOENT => FsError::Missing(path),
            Errno::EXIST => FsError::Exists(path),
            Errno::NOTDIR => FsError::NotDirectory(path),
            Errno::ISDIR => FsError::IsDirectory(path),
            Errno::ACCESS | Errno::PERM => FsError::Denied { action, path },
            Errno::NOSPC | Errno::DQUOT => FsError::NoSpace { action, path },
            source => FsError::System {
                action,
                path,
                source,
            },
        }
    }

    /// The same for `std::io`.
    pub fn from_io(action: &'static str, path: &Path, error: &std::io::Error) -> FsError {
        match Errno::from_io_error(error) {
            Some(errno) => FsError::from_errno(action, path, errno),
            None => FsError::Internal(format!("cannot {action} '{}': {error}", path.display())),
        }
    }

    pub(super) fn identity(errno: Errno) -> FsError {
        FsError::Identity(errno)
    }

    /// HTTP status of the plain routes.
    pub fn status(&self) -> StatusCode {
        match self {
            FsError::Missing(_) | FsError::NoWatcher(_) => StatusCode::NOT_FOUND,
            FsError::NotDirectory(_)
            | FsError::IsDirectory(_)
            | FsError::NotRegular(_)
            | FsError::Invalid(_) => StatusCode::BAD_REQUEST,
            FsError::Exists(_) => StatusCode::CONFLICT,
            FsError::Denied { .. } => StatusCode::FORBIDDEN,
            FsError::NoSpace { .. } => StatusCode::INSUFFICIENT_STORAGE,
            FsError::Exhausted(_) | FsError::EventsLost => StatusCode::TOO_MANY_REQUESTS,
            FsError::System { source, .. } => match *source {
                Errno::NAMETOOLONG | Errno::LOOP | Errno::INVAL => StatusCode::BAD_REQUEST,
                Errno::BUSY | Errno::NOTEMPTY | Errno::ROFS | Errno::TXTBSY => StatusCode::CONFLICT,
                Errno::FBIG => StatusCode::PAYLOAD_TOO_LARGE,
                _ => StatusCode::INTERNAL_SERVER_ERROR,
            },
            FsError::Identity(_) | FsError::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

impl From<FsError> for ConnectError {
    fn from(error: FsError) -> Self {
        let text = error.to_string();
        match error {
            FsError::Missing(_) | FsError::NoWatcher(_) => ConnectError::not_found(text),
            FsError::Exists(_) => ConnectError::already_exists(text),
            FsError::NotDirectory(_)
            | FsError::IsDirectory(_)
            | FsError::NotRegular(_)
            | FsError::Invalid(_) => ConnectError::invalid_argument(text),
            FsError::Denied { .. } => ConnectError::permission_denied(text),
            FsError::NoSpace { .. } | FsError::Exhausted(_) => {
                ConnectError::resource_exhausted(text)
            }
            FsError::EventsLost => ConnectError::data_loss(text),
            FsError::System { source, .. } => match source {
                Errno::NAMETOOLONG | Errno::LOOP | Errno::INVAL => {
                    ConnectError::invalid_argument(text)
                }
                Errno::BUSY | Errno::NOTEMPTY | Errno::ROFS | Errno::TXTBSY => {
                    ConnectError::failed_precondition(text)
                }
                Errno::MFILE | Errno::NFILE => ConnectError::resource_exhausted(text),
                _ => ConnectError::internal(text),
            },
            FsError::Identity(_) | FsError::Internal(_) => ConnectError::internal(text),
        }
    }
}
