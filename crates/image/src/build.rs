//! Building an image, step by step, into a folder of its own that is renamed at the end.

use crate::apt::{self, Apt, Resolved};
use crate::digest::Digest;
use crate::error::{ImageError, at};
use crate::files::{self, BuildFolder};
use crate::kernel::{self, Kernel};
use crate::manifest::{FORMAT, FileEntry, InputLock, Manifest};
use crate::progress::{Progress, Running, Step};
use crate::recipe;
use crate::rootfs;
use crate::store::{Image, ImageStore};
use crate::tool;
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Room that a build takes at most: packages, tree, kernel and the image.
const NEEDED_BYTES: u64 = 3 << 30;

/// The programs of ours inside a guest.
#[derive(Clone, Copy)]
pub struct GuestPrograms<'a> {
    /// The static `wrenn-init`.
    pub init: &'a [u8],
    /// The static `envd`.
    pub envd: &'a [u8],
}

/// What to build.
#[derive(Clone, Copy)]
pub struct BuildRequest<'a> {
    /// Name that shall point to the image, for example `minimal`.
    pub name: &'a str,
    /// Programs to put in.
    pub programs: GuestPrograms<'a>,
}

/// apt's answer, kept for as long as the host's lists stay the same.
#[derive(Serialize, Deserialize)]
struct CachedAnswer {
    fingerprint: Digest,
    resolved: Resolved,
}

impl ImageStore {
    /// Builds an image, or finds that it is there already, and points `request.name` to it.
    ///
    /// Blocks for up to a minute; ends early when `progress` says so. Whatever happens,
    /// nothing half-made is left behind.
    pub fn build(
        &self,
        request: BuildRequest<'_>,
        progress: &dyn Progress,
    ) -> Result<Image, ImageError> {
        crate::store::check_name(request.name)?;
        let programs = ProgramDigests::of(request.programs);
        if let Some(resolved) = self.cached_answer()?
            && let Ok(image) = self.get(&programs.lock(&resolved).digest().to_string())
        {
            return self.name_image(request.name, image);
        }
        if !rustix::process::geteuid().is_root() {
            return Err(ImageError::NotRoot);
        }
        tool::check_tools()?;
        let lock = self.lock()?;
        files::remove_stale(self.root())?;
        self.check_space()?;
        let folder = BuildFolder::new(self.root())?;
        let digest = Build {
            store: self,
            folder: &folder,
            progress,
        }
        .run(request, &programs)?;
        let image = self.name_image(request.name, self.get(&digest.to_string())?)?;
        drop(lock);
        Ok(image)
    }

    fn cache(&self) -> PathBuf {
        self.root().join("cache")
    }

    /// What apt answered when the host's lists were as they are now.
    fn cached_answer(&self) -> Result<Option<Resolved>, ImageError> {
        let Ok(bytes) = fs::read(self.cache().join("resolved.json")) else {
            return Ok(None);
        };
        let fingerprint = apt::fingerprint()?;
        // A cache that cannot be read is as good as none.
        let cached = serde_json::from_slice::<CachedAnswer>(&bytes).ok();
        Ok(cached
            .filter(|cached| cached.fingerprint == fingerprint)
            .map(|cached| cached.resolved))
    }

    /// Held while something is built or removed; given back when dropped.
    pub(crate) fn lock(&self) -> Result<File, ImageError> {
        let path = self.root().join("lock");
        let file = File::options()
            .create(true)
            .write(true)
            .truncate(false)
            .open(&path)
            .map_err(at("open", &path))?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(ImageError::Busy(self.root().to_owned())),
            Err(error) => Err(at("lock", &path)(error.into())),
        }
    }

    fn check_space(&self) -> Result<(), ImageError> {
        let state = rustix::fs::statvfs(self.root())
            .map_err(|error| at("look at", self.root())(error.into()))?;
        let free = state.f_bavail.saturating_mul(state.f_frsize);
        if free < NEEDED_BYTES {
            return Err(ImageError::NoSpace {
                folder: self.root().to_owned(),
                free_mib: free >> 20,
                needed_mib: NEEDED_BYTES >> 20,
            });
        }
        Ok(())
    }
}

struct ProgramDigests {
    init: Digest,
    envd: Digest,
}

impl ProgramDigests {
    fn of(programs: GuestPrograms<'_>) -> Self {
        ProgramDigests {
            init: Digest::of(programs.init),
            envd: Digest::of(programs.envd),
        }
    }

    fn lock(&self, resolved: &Resolved) -> InputLock {
        InputLock {
            recipe: recipe::digest(),
            packages: resolved.packages.clone(),
            kernel: resolved.kernel.clone(),
            init: self.init,
            envd: self.envd,
        }
    }
}

/// One build under way; the store is locked.
struct Build<'a> {
    store: &'a ImageStore,
    folder: &'a BuildFolder,
    progress: &'a dyn Progress,
}

impl Build<'_> {
    fn run(
        &self,
        request: BuildRequest<'_>,
        programs: &ProgramDigests,
    ) -> Result<Digest, ImageError> {
        let mut resolved = self.resolve()?;
        let found = programs.lock(&resolved).digest();
        if self.store.get(&found.to_string()).is_ok() {
            return Ok(found);
        }
        if !base_path(self.store, &resolved).exists() && self.download(&resolved).is_err() {
            // Lists that are older than the archive name packages that are gone: once
            // refreshed, what is still missing is a real failure.
            self.check_cancelled()?;
            resolved = self.refresh()?;
            self.download(&resolved)?;
        }
        let tree = self.base_tree(&resolved)?;
        let kernel = self.kernel(&resolved)?;
        let lock = programs.lock(&resolved);
        let image = self.assemble(&tree, &kernel, request.programs)?;
        self.commit(&image, resolved.suite, kernel.release, lock)
    }

    fn check_cancelled(&self) -> Result<(), ImageError> {
        if self.progress.cancelled() {
            Err(ImageError::Cancelled)
        } else {
            Ok(())
        }
    }

    fn debs(&self) -> PathBuf {
        self.store.cache().join("packages")
    }

    fn apt_work(&self) -> PathBuf {
        self.folder.join("apt")
    }

    fn resolve(&self) -> Result<Resolved, ImageError> {
        let running = Running::start(self.progress, Step::Resolve);
        let resolved = match self.store.cached_answer()? {
            Some(resolved) => resolved,
            None => {
                let resolved = Apt::new(&self.apt_work(), &self.debs(), &running)?.resolve()?;
                self.remember(&resolved)?;
                resolved
            }
        };
        running.finish();
        Ok(resolved)
    }

    /// Refreshes the host's lists and resolves again.
    fn refresh(&self) -> Result<Resolved, ImageError> {
        let running = Running::start(self.progress, Step::Resolve);
        let apt = Apt::new(&self.apt_work(), &self.debs(), &running)?;
        apt.update()?;
        let resolved = apt.resolve()?;
        self.remember(&resolved)?;
        running.finish();
        Ok(resolved)
    }

    fn remember(&self, resolved: &Resolved) -> Result<(), ImageError> {
        let path = self.store.cache().join("resolved.json");
        let answer = CachedAnswer {
            fingerprint: apt::fingerprint()?,
            resolved: resolved.clone(),
        };
        let bytes =
            serde_json::to_vec(&answer).map_err(|error| at("write", &path)(error.into()))?;
        let new = self.folder.join("resolved.json");
        files::write(&new, 0o644, &bytes)?;
        fs::rename(&new, &path).map_err(at("write", &path))
    }

    fn download(&self, resolved: &Resolved) -> Result<(), ImageError> {
        let running = Running::start(self.progress, Step::Download);
        Apt::new(&self.apt_work(), &self.debs(), &running)?.download(resolved)?;
        running.finish();
        Ok(())
    }

    /// The tree of these packages without our programs, made once and kept: a new envd needs
    /// only a new file system.
    fn base_tree(&self, resolved: &Resolved) -> Result<PathBuf, ImageError> {
        let base = base_path(self.store, resolved);
        if base.exists() {
            return Ok(base.join("tree"));
        }
        let running = Running::start(self.progress, Step::Install);
        let new = self.folder.join("base");
        files::folder(&new)?;
        files::set_mode(&new, 0o700)?;
        let kernel = self.debs().join(resolved.kernel.file_name());
        fs::rename(&kernel, new.join("kernel.deb")).map_err(at("move", &kernel))?;
        rootfs::build_tree(
            &new.join("tree"),
            &self.apt_work(),
            &self.debs(),
            resolved,
            &running,
        )?;
        for entry in fs::read_dir(self.store.cache()).map_err(at("read", self.store.cache()))? {
            let path = entry.map_err(at("read", self.store.cache()))?.path();
            if path
                .file_name()
                .and_then(|name| name.to_str())
                .is_some_and(|name| name.starts_with("base-"))
            {
                files::remove(&path)?;
            }
        }
        // Half a tree after a power failure would be taken for a whole one.
        let opened = File::open(&new).map_err(at("open", &new))?;
        rustix::fs::syncfs(opened).map_err(|error| at("sync", &new)(error.into()))?;
        fs::rename(&new, &base).map_err(at("store", &base))?;
        files::remove(&self.debs())?;
        running.finish();
        Ok(base.join("tree"))
    }

    fn kernel(&self, resolved: &Resolved) -> Result<Kernel, ImageError> {
        let running = Running::start(self.progress, Step::Kernel);
        let package = base_path(self.store, resolved).join("kernel.deb");
        let work = self.folder.join("kernel");
        files::folder(&work)?;
        let kernel = kernel::read(&package, &work, &running)?;
        running.finish();
        Ok(kernel)
    }

    /// Makes the image's files in a folder.
    fn assemble(
        &self,
        tree: &Path,
        kernel: &Kernel,
        programs: GuestPrograms<'_>,
    ) -> Result<PathBuf, ImageError> {
        let running = Running::start(self.progress, Step::FileSystem);
        let image = self.folder.join("image");
        files::folder(&image)?;
        rootfs::add_programs(tree, programs.init, programs.envd)?;
        rootfs::make_ext4(
            tree,
            &image.join(Image::ROOTFS),
            &self.folder.join("mke2fs.log"),
            &running,
        )?;
        files::write(&image.join(Image::VMLINUZ), 0o444, &kernel.vmlinuz)?;
        files::write(&image.join(Image::VMLINUX), 0o444, &kernel.vmlinux)?;
        let initramfs = kernel::initramfs(programs.init, &kernel.modules);
        files::write(&image.join(Image::INITRAMFS), 0o444, &initramfs)?;
        running.finish();
        Ok(image)
    }

    fn commit(
        &self,
        image: &Path,
        suite: String,
        kernel_release: String,
        lock: InputLock,
    ) -> Result<Digest, ImageError> {
        let running = Running::start(self.progress, Step::Commit);
        let mut entries = BTreeMap::new();
        for (done, name) in Image::FILES.into_iter().enumerate() {
            running.fraction(Some(done as f32 / Image::FILES.len() as f32));
            self.check_cancelled()?;
            let path = image.join(name);
            files::set_mode(&path, 0o444)?;
            files::sync(&path)?;
            let size = fs::metadata(&path).map_err(at("look at", &path))?.len();
            let sha256 = Digest::of_file(&path).map_err(at("read", &path))?;
            entries.insert(name.to_owned(), FileEntry { size, sha256 });
        }
        let digest = lock.digest();
        let created = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map(|time| time.as_secs())
            .unwrap_or_default();
        let manifest = Manifest {
            format: FORMAT,
            digest,
            created,
            suite,
            kernel_release,
            lock,
            files: entries,
        };
        let path = image.join(Image::MANIFEST);
        let bytes = manifest
            .to_bytes()
            .map_err(|error| at("write", &path)(error.into()))?;
        files::write(&path, 0o444, &bytes)?;
        files::sync(&path)?;
        files::set_mode(image, 0o555)?;
        files::sync(image)?;
        let place = self.store.root().join(digest.to_string());
        fs::rename(image, &place).map_err(at("store", &place))?;
        files::sync(self.store.root())?;
        running.finish();
        Ok(digest)
    }
}

/// Where the tree of these packages is kept.
fn base_path(store: &ImageStore, resolved: &Resolved) -> PathBuf {
    let text: String = resolved
        .packages
        .iter()
        .chain([&resolved.kernel])
        .map(|package| format!("{} {}\n", package.file_name(), package.sha256))
        .collect();
    let digest = Digest::of(format!("{}\n{}\n{text}", recipe::digest(), resolved.suite).as_bytes());
    store.cache().join(format!("base-{digest}"))
}
