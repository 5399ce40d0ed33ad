//! What can go wrong with images, each with the remedy.

use std::io;
use std::path::PathBuf;

/// An image could not be built, found, checked or removed.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A build writes root-owned files and changes root (chroot).
    #[error("building an image needs root: run it with sudo")]
    NotRoot,
    /// A program that builds need.
    #[error("`{program}` is missing: install the Debian package with `apt-get install {package}`")]
    MissingTool {
        /// The program.
        program: &'static str,
        /// The Debian package that has it.
        package: &'static str,
    },
    /// Too little room, found before anything was written.
    #[error(
        "not enough room in {folder}: {free_mib} MiB free, an image build needs {needed_mib} MiB"
    )]
    NoSpace {
        /// Folder of the images.
        folder: PathBuf,
        /// What is free there.
        free_mib: u64,
        /// What a build takes at most.
        needed_mib: u64,
    },
    /// Another build runs in the same folder.
    #[error("another image build is running in {0}: wait until it is done")]
    Busy(PathBuf),
    /// The host does not know Debian's packages.
    #[error(
        "apt knows no Debian package lists on this host (it must be Debian 12 with its usual sources); \
         run `apt-get update` and see what it says"
    )]
    NoDebianSources,
    /// apt answered something that is not understood.
    #[error("cannot make sense of apt's answer `{0}`")]
    AptAnswer(String),
    /// A program failed; for apt mostly the network.
    #[error("{program} failed ({status}){hint}; the end of its output:\n{tail}")]
    ToolFailed {
        /// The program.
        program: &'static str,
        /// Its exit status.
        status: String,
        /// What to look at.
        hint: &'static str,
        /// The last lines it wrote.
        tail: String,
    },
    /// A downloaded package is not the one that apt announced.
    #[error(
        "the package {file} has the digest {found} where apt announced {expected}: try again, or check the mirror"
    )]
    WrongPackage {
        /// File name of the package.
        file: String,
        /// Digest by apt's lists.
        expected: crate::Digest,
        /// Digest of what came.
        found: crate::Digest,
    },
    /// The installed packages differ from the lock.
    #[error(
        "the installed packages differ from the resolved ones: {0}; try again, the archive may have changed meanwhile"
    )]
    LockMismatch(String),
    /// The kernel package does not hold what an image needs.
    #[error("the kernel package cannot be used: {0}")]
    Kernel(String),
    /// The build was told to stop.
    #[error("the image build was cancelled; nothing was left behind")]
    Cancelled,
    /// A name that cannot be one.
    #[error(
        "`{0}` cannot be an image name: 1 to 63 of a-z, 0-9, `-` and `.`, starting with a letter, not `sha256-`"
    )]
    BadName(String),
    /// No such image.
    #[error(
        "there is no image `{0}`: `wrenn image list` shows what there is, `wrenn image build` makes one"
    )]
    NotFound(String),
    /// A short digest that fits more than one image.
    #[error("`{0}` fits more than one image: give more digits")]
    Ambiguous(String),
    /// The image is needed.
    #[error("the image `{0}` is in use by sandboxes or templates: remove those first")]
    InUse(String),
    /// An image file is not what the manifest says.
    #[error("the image {image} is damaged: {file} {what}; remove the image and build it again")]
    Damaged {
        /// Digest of the image.
        image: crate::Digest,
        /// The damaged file.
        file: PathBuf,
        /// In what way.
        what: String,
    },
    /// The operating system refused something.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// Shapes an I/O error: `.map_err(at("read", path))`.
pub(crate) fn at(
    what: &'static str,
    path: impl Into<PathBuf>,
) -> impl FnOnce(io::Error) -> ImageError {
    move |source| {
        let path = path.into();
        ImageError::Io { what, path, source }
    }
}
