//! What the images of a data folder are needed for, and removing those that nothing needs.
//!
//! ```text
//!   image ◀── name                             what is made next starts from it
//!     ▲
//!     ├────── template ◀── machine             its disk lies on both
//!     │          ▲  ◀───── paused sandbox
//!     └──────────┴──◀───── snapshot            so does what is restored from it
//! ```
//!
//! An image is built anew under a new digest and its name moves on; the old one stays for as long
//! as an arrow leads to it. So does a template of an image without a name.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use wrenn_image::{ImageError, ImageStore};
use wrenn_snapshot::{SnapshotError, Store};
use wrenn_types::HostId;

use crate::agent::{AgentError, lock_data_dir};
use crate::config::HostConfig;
use crate::machine::{MachineError, machine_folders, read_json, read_record};
use crate::sandbox::{Journal, Paused};

/// Before the name of a template that is being removed.
const REMOVED: &str = ".removed-";

/// How many need an image.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ImageUse {
    /// Templates on disk.
    pub templates: usize,
    /// Snapshots and checkpoints, and what sandboxes are paused as.
    pub snapshots: usize,
    /// Sandboxes, running or paused.
    pub sandboxes: usize,
}

/// What was removed, or in a rehearsal would be.
#[derive(Debug, Default, Serialize)]
pub struct PruneReport {
    /// Digests of the images, and their bytes.
    pub images: BTreeMap<String, u64>,
    /// Folders of the templates that were made of them.
    pub templates: Vec<PathBuf>,
}

/// Why images could not be looked at or removed. Nothing is removed then, for what cannot be
/// read may need any of them.
#[derive(Debug, thiserror::Error)]
pub enum PruneError {
    /// The data folder cannot be used, or an agent runs on it.
    #[error(transparent)]
    Agent(#[from] Box<AgentError>),
    /// What a machine is made of is not known.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// What a snapshot is made of is not known.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The images themselves.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A file could not be read or removed.
    #[error("cannot {action} {path}: {source}")]
    File {
        /// What was tried.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PruneError {
    let path = path.to_owned();
    move |source| PruneError::File {
        action,
        path,
        source,
    }
}

/// A template on disk.
struct Template {
    folder: PathBuf,
    /// As records and snapshots name it.
    digest: String,
    image: String,
}

/// A template's manifest, as far as it is needed here: of any version.
#[derive(Deserialize)]
struct OfImage {
    image: String,
}

/// Everything that needs something.
#[derive(Default)]
struct Needs {
    templates: Vec<Template>,
    /// Digests of templates that machines, paused sandboxes and snapshots need.
    needed: HashSet<String>,
    /// Digests of images that snapshots name.
    images: HashMap<String, ImageUse>,
}

impl Needs {
    fn read(config: &HostConfig) -> Result<Needs, PruneError> {
        let mut needs = Needs {
            templates: templates(&config.templates_dir())?,
            ..Needs::default()
        };
        for template in &needs.templates {
            let of = needs.images.entry(template.image.clone()).or_default();
            of.templates += 1;
        }
        needs.machines(config)?;
        needs.snapshots(&config.snapshots_dir())?;
        Ok(needs)
    }

    fn template(&mut self, digest: &str, count: impl FnOnce(&mut ImageUse)) {
        self.needed.insert(digest.to_owned());
        let image = self.templates.iter().find(|one| one.digest == digest);
        if let Some(image) = image.map(|one| one.image.clone()) {
            count(self.images.entry(image).or_default());
        }
    }

    fn machines(&mut self, config: &HostConfig) -> Result<(), PruneError> {
        let machines = config.machines_dir();
        let folders = match machines.is_dir() {
            true => machine_folders(&machines)?,
            false => Vec::new(),
        };
        for folder in folders {
            let record = read_record(&folder);
            let record = record.map_err(file("read what is written about", &folder))?;
            // Without one it is half made or half gone.
            let Some(record) = record else { continue };
            // One that waits in the pool is no sandbox.
            let of_sandbox = Journal::read(&folder).ok().flatten().is_some();
            self.template(&record.template_digest, |image| {
                image.sandboxes += usize::from(of_sandbox);
            });
        }
        let dir = config.paused_dir();
        if !dir.is_dir() {
            return Ok(());
        }
        for paused in Paused::read_all(&dir).map_err(file("read", &dir))? {
            let paused = paused.map_err(file("read a paused sandbox in", &dir))?;
            self.template(&paused.template_digest, |image| image.sandboxes += 1);
        }
        Ok(())
    }

    fn snapshots(&mut self, dir: &Path) -> Result<(), PruneError> {
        if !dir.is_dir() {
            return Ok(());
        }
        let store = Store::open(dir)?;
        for id in store.list()? {
            let snapshot = match store.snapshot(id) {
                // An agent has deleted it since.
                Err(SnapshotError::NotFound { .. }) => continue,
                snapshot => snapshot?,
            };
            let origin = &snapshot.manifest().description.origin;
            self.needed.extend(origin.template.clone());
            self.images
                .entry(origin.image.clone())
                .or_default()
                .snapshots += 1;
        }
        Ok(())
    }
}

fn templates(dir: &Path) -> Result<Vec<Template>, PruneError> {
    let mut found = Vec::new();
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
        Err(error) => return Err(file("read", dir)(error)),
    };
    for entry in entries {
        let entry = entry.map_err(file("read", dir))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(digits) = name.strip_prefix("sha256-") else {
            continue;
        };
        let folder = entry.path();
        let manifest: Option<OfImage> =
            read_json(&folder, "manifest.json").map_err(file("read", &folder))?;
        // Without one it was being made or removed when its agent died.
        if let Some(OfImage { image }) = manifest {
            found.push(Template {
                digest: format!("sha256:{digits}"),
                folder,
                image,
            });
        }
    }
    Ok(found)
}

/// What needs each image of a data folder, by its digest; also while an agent runs. Blocking.
pub fn image_uses(data_dir: &Path) -> Result<BTreeMap<String, ImageUse>, PruneError> {
    // Where things are depends on nothing else.
    let config = HostConfig::new(data_dir.to_owned(), HostId::new(), PathBuf::new());
    Ok(Needs::read(&config)?.images.into_iter().collect())
}

/// Removes the images without a name that no machine, sandbox or snapshot needs, and the
/// templates made of them, on a data folder on which no agent runs. With `rehearse`, nothing is
/// changed and the report says what would be. Blocking.
pub fn prune_images(config: &HostConfig, rehearse: bool) -> Result<PruneReport, PruneError> {
    // An agent may start a sandbox from any of them at any time.
    let _lock = lock_data_dir(config).map_err(Box::new)?;
    let images = ImageStore::open(config.images_dir())?;
    prune(config, &images, rehearse)
}

fn prune(
    config: &HostConfig,
    images: &ImageStore,
    rehearse: bool,
) -> Result<PruneReport, PruneError> {
    let needs = Needs::read(config)?;
    // One that is damaged has no name that can be read; it is the operator's to remove.
    let all: Vec<_> = images.list()?.into_iter().flatten().collect();
    let named: HashSet<String> = all
        .iter()
        .filter(|image| !image.names.is_empty())
        .map(|image| image.digest().to_string())
        .collect();
    let unnamed: HashSet<String> = all
        .iter()
        .map(|image| image.digest().to_string())
        .filter(|digest| !named.contains(digest))
        .collect();
    let (unneeded, kept): (Vec<_>, Vec<_>) = needs.templates.into_iter().partition(|template| {
        unnamed.contains(&template.image) && !needs.needed.contains(&template.digest)
    });
    let mut in_use: HashSet<String> = kept.into_iter().map(|template| template.image).collect();
    let of_snapshots = needs.images.iter().filter(|(_, used)| used.snapshots > 0);
    in_use.extend(of_snapshots.map(|(image, _)| image.clone()));
    let mut report = PruneReport::default();
    // First the templates: one without its image is of no use, an image without them is.
    if !rehearse {
        finish_removing(&config.templates_dir())?;
    }
    for template in unneeded {
        if !rehearse {
            remove_template(&template.folder)?;
        }
        report.templates.push(template.folder);
    }
    let in_use_digests = all
        .iter()
        .map(|image| image.digest())
        .filter(|digest| in_use.contains(&digest.to_string()))
        .collect();
    for image in &all {
        let digest = image.digest().to_string();
        if !unnamed.contains(&digest) || in_use.contains(&digest) {
            continue;
        }
        if !rehearse {
            images.remove(&digest, &in_use_digests)?;
        }
        report.images.insert(digest, image.size());
    }
    Ok(report)
}

/// Removes a template: out of sight in one step, so that a crash leaves no half of it.
fn remove_template(folder: &Path) -> Result<(), PruneError> {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let gone = folder.with_file_name(format!("{REMOVED}{name}"));
    std::fs::rename(folder, &gone).map_err(file("remove", folder))?;
    std::fs::remove_dir_all(&gone).map_err(file("remove", &gone))
}

/// Removes what a crash left of templates that were being removed.
fn finish_removing(dir: &Path) -> Result<(), PruneError> {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return Ok(());
    };
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with(REMOVED) {
            let path = entry.path();
            std::fs::remove_dir_all(&path).map_err(file("remove", &path))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
