//! `wrenn sandbox cp`: a file in or out, streamed, with progress when it takes long.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures::{Stream, TryStreamExt};
use tokio::io::{AsyncRead, AsyncWriteExt};
use tokio_util::io::ReaderStream;

use crate::client::Client;
use crate::commands::Context;
use crate::error::Failure;
use crate::exit::Exit;
use crate::output::Transfer;

/// Read from disk at a time.
const CHUNK: usize = 128 << 10;
/// What stands for stdin or stdout.
const STANDARD: &str = "-";

/// Options of `wrenn sandbox cp`.
///
/// One of the two is ID:/path/in/the/sandbox, the other a path here, or `-` for stdin or
/// stdout. Into a path that ends in `/`, or a folder here, the file keeps its name.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// What to copy
    source: String,
    /// Where to
    target: String,
}

/// One end of a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    /// Here.
    Local(PathBuf),
    /// stdin or stdout.
    Standard,
    /// In a sandbox.
    Remote {
        /// As it was written.
        id: String,
        /// In the sandbox.
        path: String,
    },
}

/// Why an argument is no place.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
enum PlaceError {
    #[error("`{0}` lacks a path: expected ID:/path")]
    NoPath(String),
    #[error("`{0}` is empty: expected a path or ID:/path")]
    Empty(String),
    #[error("`{0}` has `..` in it: give the path it means")]
    Parent(String),
}

impl Place {
    /// A colon makes it a place in a sandbox, unless a `/` or `.` comes before it: a local
    /// file with a colon in its name is `./a:b`.
    fn parse(text: &str) -> Result<Self, PlaceError> {
        if text == STANDARD {
            return Ok(Place::Standard);
        }
        if text.is_empty() {
            return Err(PlaceError::Empty(text.to_owned()));
        }
        match text.split_once(':') {
            Some((id, path)) if !id.is_empty() && !id.contains(['/', '.']) => {
                if path.is_empty() {
                    return Err(PlaceError::NoPath(text.to_owned()));
                }
                if path.split('/').any(|part| part == "..") {
                    return Err(PlaceError::Parent(path.to_owned()));
                }
                Ok(Place::Remote {
                    id: id.to_owned(),
                    path: path.to_owned(),
                })
            }
            _ => Ok(Place::Local(PathBuf::from(text))),
        }
    }
}

/// Copies.
pub(crate) async fn run(args: &Args, context: &Context) -> Result<Exit, Failure> {
    let place = |text: &str| Place::parse(text).map_err(|error| Failure::usage(error.to_string()));
    match (place(&args.source)?, place(&args.target)?) {
        (Place::Remote { .. }, Place::Remote { .. }) => {
            return Err(Failure::usage("both ends are in a sandbox; one must be here")
                .hint("from one to the other: wrenn sandbox cp A:/file - | wrenn sandbox cp - B:/file"));
        }
        (Place::Remote { id, path }, target) => {
            let client = context.client()?;
            let id = client.find(&id).await?;
            download(&client, context, &id, &path, target).await?;
        }
        (source, Place::Remote { id, path }) => {
            let upload = Upload::open(source, path).await?;
            let client = context.client()?;
            let id = client.find(&id).await?;
            upload.send(&client, context, &id).await?;
        }
        (_, _) => {
            return Err(Failure::usage(
                "neither end is in a sandbox; write one as ID:/path",
            ));
        }
    }
    Ok(Exit::Ok)
}

/// A file on its way in.
struct Upload {
    name: String,
    path: String,
    size: Option<u64>,
    content: Box<dyn AsyncRead + Send + Unpin>,
}

impl Upload {
    async fn open(source: Place, path: String) -> Result<Self, Failure> {
        let Place::Local(local) = source else {
            if path.ends_with('/') {
                return Err(Failure::usage(
                    "stdin has no name to keep: end the target with a file's name",
                ));
            }
            let content = Box::new(tokio::io::stdin());
            return Ok(Upload {
                name: "stdin".to_owned(),
                path,
                size: None,
                content,
            });
        };
        let shown = local.display();
        let file = tokio::fs::File::open(&local)
            .await
            .map_err(|source| cannot("read", &local, &source))?;
        let metadata = file
            .metadata()
            .await
            .map_err(|source| cannot("read", &local, &source))?;
        if metadata.is_dir() {
            return Err(Failure::message(format!("{shown} is a folder; cp copies files")).hint(format!(
                "a whole folder: tar -C {shown} -c . | wrenn sandbox exec ID -- tar -C {path} -x"
            )));
        }
        let path = match path.strip_suffix('/') {
            Some(folder) => format!("{folder}/{}", file_name(&local)?),
            None => path,
        };
        // What is no plain file (a pipe, a device) has no size before its end.
        let size = metadata.is_file().then_some(metadata.len());
        Ok(Upload {
            name: shown.to_string(),
            path,
            size,
            content: Box::new(file),
        })
    }

    async fn send(self, client: &Client, context: &Context, id: &str) -> Result<(), Failure> {
        let transfer = Transfer::new(context.printer, self.name, self.size);
        let transfer = Arc::new(Mutex::new(transfer));
        let content = counted(
            ReaderStream::with_capacity(self.content, CHUNK),
            Arc::clone(&transfer),
        );
        client
            .write_file(id, &self.path, self.size, content)
            .await?;
        finish(transfer);
        Ok(())
    }
}

async fn download(
    client: &Client,
    context: &Context,
    id: &str,
    path: &str,
    target: Place,
) -> Result<(), Failure> {
    let mut target = Target::prepare(target, path)?;
    let file = client.read_file(id, path).await?;
    let transfer = Transfer::new(context.printer, path.to_owned(), file.size);
    let transfer = Arc::new(Mutex::new(transfer));
    let mut chunks = std::pin::pin!(counted(file.chunks(), Arc::clone(&transfer)));
    while let Some(chunk) = chunks.try_next().await? {
        target.write(&chunk).await?;
    }
    target.commit().await?;
    finish(transfer);
    Ok(())
}

/// Where a file comes to. Under its name it is there whole or not at all.
enum Target {
    Standard(tokio::io::Stdout),
    File {
        path: PathBuf,
        file: tokio::fs::File,
        temporary: tempfile::TempPath,
    },
}

impl Target {
    fn prepare(target: Place, source: &str) -> Result<Self, Failure> {
        let Place::Local(mut path) = target else {
            return Ok(Target::Standard(tokio::io::stdout()));
        };
        let folder_is_meant = path.as_os_str().as_encoded_bytes().ends_with(b"/");
        if folder_is_meant || path.is_dir() {
            path.push(file_name(Path::new(source))?);
        }
        if path.is_dir() {
            return Err(Failure::message(format!("{} is a folder", path.display())));
        }
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        // A file made by tempfile is readable by its owner only; this one is the person's
        // own, so the umask decides, as for cp.
        let temporary = tempfile::Builder::new()
            .prefix(".wrenn-cp-")
            .permissions(fs::Permissions::from_mode(0o666))
            .tempfile_in(folder)
            .map_err(|source| cannot("write into", folder, &source))?;
        let (file, temporary) = temporary.into_parts();
        Ok(Target::File {
            path,
            file: tokio::fs::File::from_std(file),
            temporary,
        })
    }

    async fn write(&mut self, chunk: &Bytes) -> Result<(), Failure> {
        match self {
            Target::Standard(stdout) => stdout
                .write_all(chunk)
                .await
                .map_err(|error| Failure::message(format!("cannot write to stdout: {error}"))),
            Target::File { path, file, .. } => file
                .write_all(chunk)
                .await
                .map_err(|source| cannot("write", path, &source)),
        }
    }

    async fn commit(self) -> Result<(), Failure> {
        match self {
            Target::Standard(mut stdout) => stdout
                .flush()
                .await
                .map_err(|error| Failure::message(format!("cannot write to stdout: {error}"))),
            Target::File {
                path,
                mut file,
                temporary,
            } => {
                file.flush()
                    .await
                    .map_err(|source| cannot("write", &path, &source))?;
                temporary
                    .persist(&path)
                    .map_err(|error| cannot("write", &path, &error.error))
            }
        }
    }
}

fn file_name(path: &Path) -> Result<String, Failure> {
    match path.file_name() {
        Some(name) => Ok(name.to_string_lossy().into_owned()),
        None => Err(Failure::usage(format!(
            "`{}` has no file name",
            path.display()
        ))),
    }
}

fn cannot(what: &str, path: &Path, error: &io::Error) -> Failure {
    Failure::message(format!("cannot {what} {}: {error}", path.display())).code("local_file")
}

fn counted<E>(
    chunks: impl Stream<Item = Result<Bytes, E>>,
    transfer: Arc<Mutex<Transfer>>,
) -> impl Stream<Item = Result<Bytes, E>> {
    chunks.inspect_ok(move |chunk| {
        // Nobody panics with it in hand; and a count is not worth a panic.
        if let Ok(mut transfer) = transfer.lock() {
            transfer.advance(chunk.len() as u64);
        }
    })
}

fn finish(transfer: Arc<Mutex<Transfer>>) {
    if let Ok(transfer) = transfer.lock() {
        transfer.finish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn remote(id: &str, path: &str) -> Result<Place, PlaceError> {
        Ok(Place::Remote {
            id: id.to_owned(),
            path: path.to_owned(),
        })
    }

    #[test]
    fn a_colon_makes_a_place_in_a_sandbox() {
        assert_eq!(Place::parse("sb-0192:/tmp/x"), remote("sb-0192", "/tmp/x"));
        assert_eq!(Place::parse("0192:x.txt"), remote("0192", "x.txt"));
        assert_eq!(Place::parse("0192:/a:b"), remote("0192", "/a:b"));
        assert_eq!(Place::parse("-"), Ok(Place::Standard));
        for local in ["a", "/a:b", "./a:b", "a.b:c", ":x"] {
            assert_eq!(
                Place::parse(local),
                Ok(Place::Local(PathBuf::from(local))),
                "{local}"
            );
        }
    }

    #[test]
    fn incomplete_or_climbing_places_are_refused() {
        assert_eq!(
            Place::parse("0192:"),
            Err(PlaceError::NoPath("0192:".to_owned()))
        );
        assert_eq!(Place::parse(""), Err(PlaceError::Empty(String::new())));
        assert_eq!(
            Place::parse("0192:/a/../b"),
            Err(PlaceError::Parent("/a/../b".to_owned()))
        );
        assert_eq!(Place::parse("0192:/a..b"), remote("0192", "/a..b"));
    }

    #[tokio::test]
    async fn a_download_is_there_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let place = || Place::Local(folder.path().to_path_buf());
        let mut target = Target::prepare(place(), "/etc/name").unwrap();
        target.write(&Bytes::from_static(b"half")).await.unwrap();
        drop(target);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        let mut target = Target::prepare(place(), "/etc/name").unwrap();
        target.write(&Bytes::from_static(b"whole")).await.unwrap();
        target.commit().await.unwrap();
        assert_eq!(fs::read(folder.path().join("name")).unwrap(), b"whole");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
