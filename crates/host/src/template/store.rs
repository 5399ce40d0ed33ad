//! Templates on disk and in memory.
//!
//! ```text
//! templates/sha256-…/manifest.json   what it is and what a restore depends on
//!                    memory          sparse; loaded once into a sealed memory file
//!                    state           devices, as QEMU saved them
//!                    disk.qcow2      what the boot wrote over the image's root file system;
//!                    disk.raw        with Firecracker the whole of it, or
//!                    disk.dm-snapshot what differs from the image, by the device mapper
//! ```
//!
//! Immutable: made under another name and renamed at the end, never changed.

use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, MutexGuard};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio::sync::Mutex;
use wrenn_image::{Image, ImageError, ImageStore};
use wrenn_snapshot::BaseId;
use wrenn_types::Shape;
use wrenn_vmm::{Digest, Fingerprint, SealedMemory};

use super::{TemplateError, freeze};
use crate::machine::{Site, kernel_command_line, read_json};

/// Version of the manifest's form.
pub(super) const VERSION: u32 = 1;
pub(super) const MANIFEST: &str = "manifest.json";
pub(super) const MEMORY: &str = "memory";
pub(super) const STATE: &str = "state";

/// The disk's name, by its format.
pub(super) fn disk_name(format: &str) -> String {
    format!("disk.{format}")
}

/// The format of disks from before there was a choice.
fn qcow2() -> String {
    "qcow2".to_owned()
}

/// Other names of `minimal` that published clients use.
const ALIASES: &[&str] = &["base", "minimal-ubuntu"];

/// What a template is.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub(super) version: u32,
    /// Name of the image it was booted from.
    pub name: String,
    /// Digest of that image.
    pub image: String,
    /// Processors and memory, fixed for good.
    pub shape: Shape,
    /// Size of the guest's disk.
    pub disk_bytes: u64,
    /// The format of its disk's layer: `qcow2`, `raw` or `dm-snapshot`.
    #[serde(default = "qcow2")]
    pub disk_format: String,
    /// The command line its kernel was booted with.
    pub cmdline: String,
    /// What a restore depends on.
    pub fingerprint: Fingerprint,
    /// The guest agent's version as E2B's clients read it.
    pub envd_version: String,
    /// From the start of the VMM to a healthy guest agent, in milliseconds.
    pub cold_boot_ms: u64,
    /// Boots that hung before the one that was kept.
    pub stalled_boots: u32,
    pub(super) memory: MemoryDigest,
    pub(super) state: Digest,
    pub(super) disk: Digest,
    /// When it was frozen, in milliseconds since 1970.
    pub created_unix_ms: i64,
}

/// What the memory file holds.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryDigest {
    /// Digest of its content, wherever it has holes.
    pub digest: Digest,
    /// Bytes that are not in zero pages.
    pub data_bytes: u64,
}

/// A template that machines can be restored from.
pub struct LoadedTemplate {
    /// What it is.
    pub manifest: Manifest,
    /// `sha256:` and the digest of its manifest, which names its parts by theirs.
    pub digest: String,
    /// The image its disk lies on.
    pub image: Image,
    /// Its memory, sealed against writing.
    pub memory: Arc<SealedMemory>,
    folder: PathBuf,
}

impl LoadedTemplate {
    /// The saved state of the devices.
    pub fn state(&self) -> PathBuf {
        self.folder.join(STATE)
    }

    /// The name of its memory: what snapshots of its machines are laid over.
    pub fn base_id(&self) -> BaseId {
        BaseId(self.manifest.memory.digest.0)
    }

    /// The disk layer over the image.
    pub fn disk(&self) -> PathBuf {
        self.folder.join(disk_name(&self.manifest.disk_format))
    }
}

/// The templates of this host.
pub struct TemplateStore {
    dir: PathBuf,
    images: Arc<ImageStore>,
    /// By image digest and shape.
    loaded: std::sync::Mutex<HashMap<(String, Shape), Arc<LoadedTemplate>>>,
    /// By their own digest: those that a snapshot asked for.
    by_digest: std::sync::Mutex<HashMap<String, Arc<LoadedTemplate>>>,
    /// Held while one is found or made, so that it is made once, however many ask.
    making: Mutex<()>,
    /// Held while one is loaded, so that it is once. A machine that is saved waits for no boot.
    loading: Mutex<()>,
}

impl TemplateStore {
    /// The templates below `dir`, made from `images`.
    pub fn open(dir: PathBuf, images: ImageStore) -> Self {
        TemplateStore {
            dir,
            images: Arc::new(images),
            loaded: Default::default(),
            by_digest: Default::default(),
            making: Mutex::default(),
            loading: Mutex::default(),
        }
    }

    /// The templates that are loaded.
    pub fn list(&self) -> Vec<Arc<LoadedTemplate>> {
        self.loaded().values().cloned().collect()
    }

    fn loaded(&self) -> MutexGuard<'_, HashMap<(String, Shape), Arc<LoadedTemplate>>> {
        // Templates are only added, each whole.
        self.loaded.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Names that can be asked for.
    pub fn names(&self) -> Vec<String> {
        let images = self.images.list().unwrap_or_else(|error| {
            tracing::error!(%error, "the images cannot be listed");
            Vec::new()
        });
        // A damaged one cannot be started, so it is not on offer.
        images
            .into_iter()
            .flatten()
            .flat_map(|image| image.names)
            .collect()
    }

    /// The template of this name and shape (none: the default), loaded, booted and frozen
    /// first if it must be.
    pub async fn get(
        &self,
        site: &Arc<Site>,
        name: &str,
        shape: Option<Shape>,
    ) -> Result<Arc<LoadedTemplate>, TemplateError> {
        let name = canonical(name);
        let shape = shape.unwrap_or(Shape::DEFAULT);
        let image = self.image(name)?;
        let key = (image.digest().to_string(), shape);
        let there = |key| self.loaded().get(key).cloned();
        if let Some(template) = there(&key) {
            return Ok(template);
        }
        let _turn = self.making.lock().await;
        // Somebody else may have made it meanwhile.
        if let Some(template) = there(&key) {
            return Ok(template);
        }
        let keep = |template| {
            let template = Arc::new(template);
            self.loaded().insert(key, Arc::clone(&template));
            template
        };
        {
            let _loading = self.loading.lock().await;
            if let Some(template) = self.find(site, name, &image, shape).await? {
                return Ok(keep(template));
            }
        }
        self.check_image(name, &image).await?;
        let folder = freeze::freeze(site, &self.dir, name, &image, shape).await?;
        let _loading = self.loading.lock().await;
        Ok(keep(self.load(name, &image, folder).await?))
    }

    /// The template that a snapshot was made over, also when its name means another by now.
    ///
    /// Also of another monitor's, whose states cannot be loaded here: the snapshot says so
    /// itself, and its disk can still be booted.
    pub async fn of_snapshot(&self, digest: &str) -> Result<Arc<LoadedTemplate>, TemplateError> {
        let others = || self.by_digest.lock().unwrap_or_else(|e| e.into_inner());
        let there = || {
            let loaded = self.loaded();
            let found = loaded.values().find(|t| t.digest == digest);
            found.cloned().or_else(|| others().get(digest).cloned())
        };
        if let Some(template) = there() {
            return Ok(template);
        }
        let _loading = self.loading.lock().await;
        // Somebody else may have loaded it meanwhile.
        if let Some(template) = there() {
            return Ok(template);
        }
        let folder = self.dir.join(digest.replace(':', "-"));
        let manifest = read_manifest(&folder)?;
        let image = self.image(&manifest.image)?;
        self.check_image(&manifest.name, &image).await?;
        let template = Arc::new(self.load(&manifest.name, &image, folder).await?);
        others().insert(digest.to_owned(), template.clone());
        Ok(template)
    }

    fn image(&self, name: &str) -> Result<Image, TemplateError> {
        self.images.get(name).map_err(|error| match error {
            ImageError::NotFound(_) => TemplateError::Unknown {
                name: name.to_owned(),
                known: self.names(),
            },
            source => TemplateError::image(name, source),
        })
    }

    /// Reads every byte of the image once for each agent, before the first guest does.
    async fn check_image(&self, name: &str, image: &Image) -> Result<(), TemplateError> {
        let (images, digest) = (self.images.clone(), image.digest().to_string());
        let check = move || images.verify(&digest).map(drop);
        let checked = match tokio::task::spawn_blocking(check).await {
            Ok(checked) => checked,
            Err(join) => return Err(damaged(image.folder(), join.to_string())),
        };
        checked.map_err(|source| TemplateError::image(name, source))
    }

    /// A template on disk that was made from this image in this shape and can be restored
    /// by the monitor of this host.
    async fn find(
        &self,
        site: &Site,
        name: &str,
        image: &Image,
        shape: Shape,
    ) -> Result<Option<LoadedTemplate>, TemplateError> {
        let here = &site.vmm.info().fingerprint;
        for folder in folders(&self.dir)? {
            let manifest = match read_manifest(&folder) {
                Ok(manifest) => manifest,
                Err(error) => {
                    tracing::warn!(%error, "a template is passed over");
                    continue;
                }
            };
            if manifest.image != image.digest().to_string() || manifest.shape != shape {
                continue;
            }
            if without_clock(&manifest.cmdline) != without_clock(&kernel_command_line(site)) {
                continue;
            }
            if let Err(differences) = here.accepts(&manifest.fingerprint) {
                tracing::info!(folder = %folder.display(), %differences, "a template is passed over");
                continue;
            }
            self.check_image(name, image).await?;
            return self.load(name, image, folder).await.map(Some);
        }
        Ok(None)
    }

    /// Brings a template into memory; every byte is checked against its digest.
    async fn load(
        &self,
        name: &str,
        image: &Image,
        folder: PathBuf,
    ) -> Result<LoadedTemplate, TemplateError> {
        let (name, image) = (name.to_owned(), image.clone());
        let load = move || {
            let manifest = read_manifest(&folder)?;
            let path = folder.join(MANIFEST);
            let digest = file_digest(&path).map_err(|e| damaged(&path, e.to_string()))?;
            let disk = disk_name(&manifest.disk_format);
            for (file, expected) in [(STATE, manifest.state), (&disk, manifest.disk)] {
                let path = folder.join(file);
                let found = file_digest(&path).map_err(|e| damaged(&path, e.to_string()))?;
                if found != expected {
                    return Err(damaged(&path, "its content is not what was written".into()));
                }
            }
            let memory = SealedMemory::load(&folder.join(MEMORY), manifest.memory.digest)
                .map_err(|source| TemplateError::Memory { name, source })?;
            let digest = format!("sha256:{digest}");
            Ok(LoadedTemplate {
                manifest,
                digest,
                image,
                memory: Arc::new(memory),
                folder,
            })
        };
        match tokio::task::spawn_blocking(load).await {
            Ok(loaded) => loaded,
            Err(join) => Err(damaged(&self.dir, join.to_string())),
        }
    }
}

/// The name behind the other names that published clients use for it.
fn canonical(name: &str) -> &str {
    let name = name.strip_suffix(":default").unwrap_or(name);
    if ALIASES.contains(&name) {
        "minimal"
    } else {
        name
    }
}

/// A kernel command line without the rate of the host's clock, which is measured anew at
/// each start and compared, with its tolerance, as part of the fingerprint.
fn without_clock(cmdline: &str) -> Vec<&str> {
    let words = cmdline.split_ascii_whitespace();
    words
        .filter(|word| !word.starts_with("tsc_early_khz="))
        .collect()
}

fn folders(dir: &Path) -> Result<Vec<PathBuf>, TemplateError> {
    let read = || -> std::io::Result<Vec<PathBuf>> {
        let mut folders = Vec::new();
        for entry in std::fs::read_dir(dir)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with("sha256-") {
                folders.push(entry.path());
            }
        }
        folders.sort();
        Ok(folders)
    };
    read().map_err(|e| damaged(dir, e.to_string()))
}

fn read_manifest(folder: &Path) -> Result<Manifest, TemplateError> {
    let path = folder.join(MANIFEST);
    let manifest: Option<Manifest> =
        read_json(folder, MANIFEST).map_err(|e| damaged(&path, e.to_string()))?;
    let manifest = manifest.ok_or_else(|| damaged(&path, "it is missing".to_owned()))?;
    if manifest.version != VERSION {
        let why = format!(
            "it has version {}, this agent reads {VERSION}",
            manifest.version
        );
        return Err(damaged(&path, why));
    }
    Ok(manifest)
}

fn damaged(path: &Path, why: String) -> TemplateError {
    TemplateError::Damaged {
        path: path.to_owned(),
        why,
    }
}

/// SHA-256 of a file's content.
pub(super) fn file_digest(path: &Path) -> std::io::Result<Digest> {
    let mut file = std::fs::File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0u8; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(Digest(hasher.finalize().into())),
            n => hasher.update(&buffer[..n]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_measurement_of_the_clock_is_no_other_command_line() {
        assert_eq!(
            without_clock("a tsc_early_khz=1 b"),
            without_clock("a tsc_early_khz=2 b")
        );
        assert_ne!(without_clock("a b"), without_clock("a"));
    }

    #[test]
    fn published_clients_names_mean_minimal() {
        for name in [
            "minimal",
            "base",
            "minimal-ubuntu",
            "base:default",
            "minimal:default",
        ] {
            assert_eq!(canonical(name), "minimal", "{name}");
        }
        assert_eq!(canonical("mine"), "mine");
        assert_eq!(canonical("base:other"), "base:other");
    }
}
