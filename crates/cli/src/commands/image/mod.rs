//! `wrenn image …`: what templates are made of.

mod build;
mod inspect;
mod list;
mod prune;
mod remove;
mod verify;

use std::path::{Path, PathBuf};

use wrenn_image::{ImageError, ImageStore};

pub(crate) use build::ensure;

use super::Context;
use crate::error::Failure;
use crate::exit::Exit;
use crate::settings::Settings;

/// The commands about images. IMAGE: a name, a digest, or the beginning of a digest.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Build an image from Debian packages, unless it is there already
    Build(build::Args),
    /// List the images there are
    #[command(visible_alias = "ls")]
    List(list::Args),
    /// Show what an image is made of
    Inspect(inspect::Args),
    /// Remove an image that nothing uses
    #[command(visible_alias = "rm")]
    Remove(remove::Args),
    /// Remove the images that lost their name to a newer build and that nothing needs
    Prune(prune::Args),
    /// Compare every byte of an image with its manifest
    Verify(verify::Args),
}

impl Command {
    /// Whether errors go out as JSON.
    pub(crate) fn json(&self) -> bool {
        match self {
            Command::Build(args) => args.output.json,
            Command::List(args) => args.output.json,
            Command::Inspect(args) => args.output.json,
            Command::Prune(args) => args.output.json,
            Command::Remove(_) => false,
            Command::Verify(args) => args.output.json,
        }
    }

    /// Does it.
    pub(crate) async fn run(self, context: &Context) -> Result<Exit, Failure> {
        match self {
            Command::Build(args) => build::run(args, context).await,
            Command::List(args) => list::run(&args, context),
            Command::Inspect(args) => inspect::run(&args, context),
            Command::Prune(args) => prune::run(args, context).await,
            Command::Remove(args) => remove::run(&args, context),
            Command::Verify(args) => verify::run(args, context).await,
        }
    }
}

/// Digits of a digest that tables show: enough to tell images apart, and to type.
const SHORT: usize = "sha256-".len() + 12;

fn short_of(digest: &str) -> String {
    digest.chars().take(SHORT).collect()
}

/// Where the images of a data folder are.
fn folder(data_dir: &Path) -> PathBuf {
    data_dir.join("images")
}

/// The images; `None` where none was ever built. Makes no folder: a look leaves no traces.
fn store(settings: &Settings) -> Result<Option<ImageStore>, Failure> {
    let folder = folder(&settings.data_dir);
    match folder.try_exists() {
        Ok(true) => ImageStore::open(folder).map(Some).map_err(failure),
        Ok(false) => Ok(None),
        Err(error) => Err(
            Failure::message(format!("cannot read {}: {error}", folder.display()))
                .hint("try it with sudo"),
        ),
    }
}

/// The images, for a command about the one called `name`.
fn store_of(context: &Context, name: &str) -> Result<ImageStore, Failure> {
    store(&context.settings)?.ok_or_else(|| failure(ImageError::NotFound(name.to_owned())))
}

/// An error of the image store for people and programs.
fn failure(error: ImageError) -> Failure {
    let failure = Failure::from_error(&error);
    match &error {
        ImageError::NotRoot => failure.code("not_root"),
        ImageError::MissingTool { .. } => failure
            .code("missing_tool")
            .hint("`wrenn doctor` lists all that is missing"),
        ImageError::NoSpace { .. } => failure
            .code("no_space")
            .hint("free some space there, or name a data folder on a larger disk with --data-dir"),
        ImageError::Busy(_) => failure.code("busy"),
        ImageError::BadName(_) => failure.code("bad_name"),
        ImageError::NotFound(_) => failure.code("not_found"),
        ImageError::Ambiguous(_) => failure.code("ambiguous"),
        ImageError::InUse(_) => failure.code("in_use"),
        ImageError::Damaged { .. } => failure.code("damaged"),
        ImageError::Cancelled => failure.code("cancelled"),
        ImageError::Io { source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied => {
            failure.code("not_root").hint("try it with sudo")
        }
        ImageError::NoDebianSources
        | ImageError::AptAnswer(_)
        | ImageError::ToolFailed { .. }
        | ImageError::WrongPackage { .. }
        | ImageError::LockMismatch(_)
        | ImageError::Kernel(_)
        | ImageError::Io { .. } => failure.code("image"),
    }
}
