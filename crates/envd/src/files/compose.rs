//! `POST /files/compose`: one file from the contents of several, which are then removed. For
//! clients that upload a large file in pieces.

use std::collections::HashSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::Json;
use axum::extract::State as Extract;
use axum::extract::rejection::JsonRejection;
use rustix::fs::{FileType as Kind, Mode, OFlags};
use serde::Deserialize;

use super::metadata::Metadata;
use super::staged::Staged;
use super::{HttpError, Written, resolve};
use crate::auth;
use crate::filesystem::directory::remove;
use crate::filesystem::error::FsError;
use crate::filesystem::identity;
use crate::filesystem::relocate::append;
use crate::state::State;

/// Sources that one request may name.
const MAX_SOURCES: usize = 10_000;

/// The body of a request.
#[derive(Debug, Deserialize)]
pub struct ComposeRequest {
    /// In the order in which they are put together.
    source_paths: Vec<String>,
    destination: String,
    username: Option<String>,
}

/// Puts files together without the bytes leaving the kernel, makes the result visible at
/// once, then removes the sources.
///
/// # Errors
/// 400 for a body that is wrong or sources that are no regular files, 401, 403, 404, 507.
/// The sources are then all still there.
pub async fn compose(
    Extract(state): Extract<Arc<State>>,
    body: Result<Json<ComposeRequest>, JsonRejection>,
) -> Result<Json<Written>, HttpError> {
    let Json(request) = body.map_err(|error| HttpError::BadRequest(error.body_text()))?;
    if request.source_paths.is_empty() || request.source_paths.len() > MAX_SOURCES {
        return Err(HttpError::BadRequest(format!(
            "source_paths must name 1 to {MAX_SOURCES} files"
        )));
    }
    let user = Arc::new(auth::user_from_name(request.username.as_deref(), &state)?);
    let destination = resolve(&request.destination, &user, &state)?;
    let sources = request
        .source_paths
        .iter()
        .map(|path| resolve(path, &user, &state))
        .collect::<Result<Vec<_>, _>>()?;
    let _open = state.enter().await?;
    let written = Written::new(&destination, &Metadata::new());
    identity::run(&user, move || put_together(&sources, &destination)).await?;
    Ok(Json(written))
}

fn put_together(sources: &[PathBuf], destination: &Path) -> Result<(), FsError> {
    let mut staged = Staged::create(destination)?;
    for source in sources {
        let input = open_source(source)?;
        let copied = append(&input, staged.file()?)
            .map_err(|error| FsError::from_io("copy to", destination, &error))?;
        staged.count(copied);
    }
    staged.seal()?;
    let target = staged.target().to_owned();
    staged.commit()?;
    let mut gone = HashSet::new();
    for source in sources {
        // A source that was the destination has been replaced by the result.
        if source != destination && *source != target && gone.insert(source) {
            remove(source)?;
        }
    }
    Ok(())
}

fn open_source(path: &Path) -> Result<File, FsError> {
    let failed = |errno| FsError::from_errno("read", path, errno);
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty()).map_err(failed)?;
    let stat = rustix::fs::fstat(&file).map_err(failed)?;
    match Kind::from_raw_mode(stat.st_mode) {
        Kind::RegularFile => Ok(file.into()),
        Kind::Directory => Err(FsError::IsDirectory(path.to_owned())),
        _ => Err(FsError::NotRegular(path.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_put_together_in_order_and_sources_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for (name, text) in [("1", "one "), ("2", "two "), ("3", "")] {
            std::fs::write(path(name), text).unwrap();
        }
        let missing = put_together(&[path("1"), path("no")], &path("out"));
        assert!(matches!(missing, Err(FsError::Missing(_))));
        assert!(path("1").exists() && !path("out").exists());
        put_together(
            &[path("2"), path("1"), path("3"), path("2")],
            &path("sub/out"),
        )
        .unwrap();
        assert_eq!(
            std::fs::read_to_string(path("sub/out")).unwrap(),
            "two one two "
        );
        assert!(!path("1").exists() && !path("2").exists() && !path("3").exists());
        std::fs::write(path("4"), "!").unwrap();
        put_together(&[path("sub/out"), path("4")], &path("sub/out")).unwrap();
        assert_eq!(
            std::fs::read_to_string(path("sub/out")).unwrap(),
            "two one two !"
        );
        assert!(!path("4").exists());
    }
}
