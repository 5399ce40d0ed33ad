//! A machine's disk in its jail.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, chown, symlink};
use std::path::{Path, PathBuf};

use super::mapped::MappedDisk;
use super::{CloneWay, Cloning};
use crate::firecracker::launch::{DISK, JAIL};
use crate::machine::DiskChain;
use crate::{LayerFormat, VmmError};

/// Second name of a layer of the device mapper. What is called as a raw image would be is a link
/// to the device then.
const MAPPED: &str = "disk.layer";

/// A machine's disk in its jail. There is always a second name of the layer that is on top: by
/// it is known, also once the machine is dead, which one that is and what it is.
#[derive(Debug)]
pub(in crate::firecracker) struct DiskInJail {
    name: PathBuf,
    new_name: PathBuf,
    device: Option<MappedDisk>,
}

impl DiskInJail {
    fn new(dir: &Path, name: &str, device: Option<MappedDisk>) -> DiskInJail {
        let jail = dir.join(JAIL);
        DiskInJail {
            name: jail.join(name),
            new_name: jail.join(format!("{name}.new")),
            device,
        }
    }

    /// Fills the top layer of a machine in `dir`, whose jail is made, if it is empty, and puts
    /// it into the jail for this user alone. The file that comes with it is to be kept until the
    /// machine has opened its disk. Blocking.
    pub(in crate::firecracker) fn prepare(
        cloning: &Cloning,
        chain: &DiskChain,
        dir: &Path,
        (uid, gid): (u32, u32),
    ) -> Result<(DiskInJail, Option<File>), VmmError> {
        let (image, below) = parts(chain);
        if below.is_none() && cloning.way != CloneWay::DeviceMapper {
            let disk = DiskInJail::new(dir, DISK, None);
            if is_empty(&chain.top)? {
                cloning.fill(image, &chain.top)?;
            }
            disk.set(&chain.top, Some((uid, gid)))?;
            return Ok((disk, None));
        }
        let failed = |what, path: &Path| {
            let path = path.to_owned();
            move |source| VmmError::File { what, path, source }
        };
        if is_empty(&chain.top)? {
            let filled = open_layer(&chain.top).and_then(|top| match below {
                Some(below) => MappedDisk::copy_layer(&File::open(below)?, &top),
                None => MappedDisk::create_layer(fs::metadata(image)?.len(), &top),
            });
            filled.map_err(failed("cannot fill the disk", &chain.top))?;
        }
        let attached = MappedDisk::attach(&cloning.device(dir), image, &chain.top);
        let (device, used) = attached.map_err(failed(
            "cannot make a device of (the device mapper is needed for it) the disk",
            &chain.top,
        ))?;
        let link = dir.join(JAIL).join(DISK);
        symlink(device.node(), &link).map_err(failed("cannot make the link", &link))?;
        let disk = DiskInJail::new(dir, MAPPED, Some(device));
        disk.set(&chain.top, None)?;
        Ok((disk, Some(used)))
    }

    /// The disk of a machine in `dir` that runs. Blocking.
    pub(in crate::firecracker) fn adopt(
        cloning: &Cloning,
        dir: &Path,
    ) -> Result<DiskInJail, VmmError> {
        if layers_in(dir) == LayerFormat::Raw {
            return Ok(DiskInJail::new(dir, DISK, None));
        }
        let found = || {
            let device = MappedDisk::find(&cloning.device(dir))?
                .ok_or_else(|| io::Error::other("its device is gone"))?;
            let layer = device.layer()?;
            Ok((device, layer))
        };
        let (device, layer) = found().map_err(|source| VmmError::File {
            what: "cannot find the disk of the machine in",
            path: dir.to_owned(),
            source,
        })?;
        let disk = DiskInJail::new(dir, MAPPED, Some(device));
        // An agent may have been killed between the two steps of a switch.
        disk.set(&layer, None)?;
        Ok(disk)
    }

    /// The device that the jail is to have.
    pub(in crate::firecracker) fn node(&self) -> Option<PathBuf> {
        Some(self.device.as_ref()?.node().to_owned())
    }

    /// Device and number of the file that is written to, if it is the kernel that writes to it.
    /// Blocking.
    pub(in crate::firecracker) fn written_by_kernel(&self) -> io::Result<Option<(u64, u64)>> {
        let Some(device) = &self.device else {
            return Ok(None);
        };
        let layer = fs::metadata(device.layer()?)?;
        Ok(Some((layer.dev(), layer.ino())))
    }

    /// Fills the empty layer `top` with the disk as it is; the machine stands still. Where the
    /// kernel writes to the layer it does to `top` from then on; of a raw one the machine is to
    /// be told, and what was there comes back. Blocking.
    pub(in crate::firecracker) fn switch(
        &self,
        cloning: &Cloning,
        top: &Path,
    ) -> Result<Option<Before>, VmmError> {
        let layer = |why: String| VmmError::DiskLayer {
            path: top.to_owned(),
            why,
        };
        if !is_empty(top)? {
            return Err(layer("it is not empty; the disk is as it was".into()));
        }
        let Some(device) = &self.device else {
            cloning.fill(&self.name, top)?;
            let owner = fs::metadata(&self.name)
                .map_err(|error| layer(format!("the disk is not there: {error}")))?;
            return self
                .replace(top, Some((owner.uid(), owner.gid())))
                .map(Some);
        };
        let filled = device
            .sync()
            .and_then(|()| MappedDisk::copy_layer(&File::open(&self.name)?, &open_layer(top)?));
        filled.map_err(|error| layer(format!("{error}; the disk is as it was")))?;
        let before = self.replace(top, None)?;
        let switched = device.switch(top);
        before.end(switched.is_ok())?;
        switched.map_err(|error| layer(format!("{error}; the disk is as it was")))?;
        Ok(None)
    }

    /// As [`DiskInJail::set`], and keeps what was there.
    fn replace(&self, top: &Path, owner: Option<(u32, u32)>) -> Result<Before, VmmError> {
        let kept = self.name.with_extension("before");
        let keep = match fs::remove_file(&kept) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => fs::hard_link(&self.name, &kept),
        };
        keep.map_err(|source| VmmError::File {
            what: "cannot keep the disk",
            path: self.name.clone(),
            source,
        })?;
        self.set(top, owner)?;
        Ok(Before {
            name: self.name.clone(),
            kept,
        })
    }

    /// Gives `top` its second name, and to its machine's user if that is who writes to it.
    fn set(&self, top: &Path, owner: Option<(u32, u32)>) -> Result<(), VmmError> {
        let failed = |what| {
            let path = top.to_owned();
            move |source: io::Error| VmmError::File { what, path, source }
        };
        if let Some((uid, gid)) = owner {
            chown(top, Some(uid), Some(gid)).map_err(failed("cannot give away the disk"))?;
        }
        let linked = match fs::remove_file(&self.new_name) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => fs::hard_link(top, &self.new_name),
        };
        linked
            .and_then(|()| fs::rename(&self.new_name, &self.name))
            .map_err(failed(
                "cannot put into the jail of its machine (both must be on one file system) the disk",
            ))
    }
}

/// The disk that another has taken the place of, until it is known which of them is used.
#[derive(Debug)]
#[must_use]
pub(in crate::firecracker) struct Before {
    name: PathBuf,
    kept: PathBuf,
}

impl Before {
    /// The other one is used, or this one again. Blocking.
    pub(in crate::firecracker) fn end(self, replaced: bool) -> Result<(), VmmError> {
        match replaced {
            true => fs::remove_file(&self.kept),
            false => fs::rename(&self.kept, &self.name),
        }
        .map_err(|source| VmmError::File {
            what: "cannot put in its place the disk",
            path: self.name,
            source,
        })
    }
}

/// The raw image at the bottom of a chain, and the layer over it if there is one: each raw image
/// is a whole disk, and each layer holds all that differs from the image.
fn parts(chain: &DiskChain) -> (&Path, Option<&Path>) {
    let raw = |format| format == LayerFormat::Raw;
    let image = chain.layers.iter().rfind(|layer| raw(layer.format));
    let below = chain.layers.last().filter(|layer| !raw(layer.format));
    (
        image.map_or(&chain.base, |layer| &layer.path),
        below.map(|layer| &*layer.path),
    )
}

fn is_empty(layer: &Path) -> Result<bool, VmmError> {
    let layer = fs::metadata(layer).map_err(|source| VmmError::File {
        what: "cannot open the disk",
        path: layer.to_owned(),
        source,
    })?;
    Ok(layer.len() == 0)
}

fn open_layer(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).open(path)
}

/// How the layers of a machine in `dir` are written, also of a dead one.
pub(crate) fn layers_in(dir: &Path) -> LayerFormat {
    match dir.join(JAIL).join(MAPPED).exists() {
        true => LayerFormat::DmSnapshot,
        false => LayerFormat::Raw,
    }
}

/// Device and number of the top layer of a machine in `dir`; the error names what is looked for.
pub(in crate::firecracker) fn layer_in(dir: &Path) -> Result<(u64, u64), (PathBuf, io::Error)> {
    let name = match layers_in(dir) {
        LayerFormat::DmSnapshot => MAPPED,
        _ => DISK,
    };
    let name = dir.join(JAIL).join(name);
    match fs::symlink_metadata(&name) {
        Ok(layer) => Ok((layer.dev(), layer.ino())),
        Err(error) => Err((name, error)),
    }
}
