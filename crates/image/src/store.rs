//! The folder of images: finding, listing, checking, removing.

use crate::digest::Digest;
use crate::error::{ImageError, at};
use crate::files;
use crate::manifest::Manifest;
use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Fewest digits of a digest that may stand for all of it.
const SHORTEST_DIGEST: usize = 6;

/// The folder `images` of a data folder.
#[derive(Debug, Clone)]
pub struct ImageStore {
    root: PathBuf,
}

/// One image, known to have all its files in their sizes.
#[derive(Debug, Clone)]
pub struct Image {
    folder: PathBuf,
    /// Names that point to it, sorted.
    pub names: Vec<String>,
    /// What it is made of.
    pub manifest: Manifest,
}

impl Image {
    pub(crate) const MANIFEST: &str = "manifest.json";
    pub(crate) const ROOTFS: &str = "rootfs.ext4";
    pub(crate) const VMLINUZ: &str = "vmlinuz";
    pub(crate) const VMLINUX: &str = "vmlinux";
    pub(crate) const INITRAMFS: &str = "initramfs.cpio";
    pub(crate) const FILES: [&str; 4] =
        [Self::ROOTFS, Self::VMLINUZ, Self::VMLINUX, Self::INITRAMFS];

    /// Its name for ever: the digest of what it was made of.
    pub fn digest(&self) -> Digest {
        self.manifest.digest
    }

    /// Its folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The root file system: ext4, never to be written.
    pub fn rootfs(&self) -> PathBuf {
        self.folder.join(Self::ROOTFS)
    }

    /// The kernel as bzImage, for QEMU.
    pub fn vmlinuz(&self) -> PathBuf {
        self.folder.join(Self::VMLINUZ)
    }

    /// The kernel as ELF, for Firecracker.
    pub fn vmlinux(&self) -> PathBuf {
        self.folder.join(Self::VMLINUX)
    }

    /// The initramfs for both.
    pub fn initramfs(&self) -> PathBuf {
        self.folder.join(Self::INITRAMFS)
    }

    /// Bytes of all files; the root file system counts in full although it has holes.
    pub fn size(&self) -> u64 {
        self.manifest.files.values().map(|file| file.size).sum()
    }

    fn damaged(&self, name: &str, what: String) -> ImageError {
        ImageError::Damaged {
            image: self.digest(),
            file: self.folder.join(name),
            what,
        }
    }

    /// Compares sizes with the manifest: costs nothing and finds files that are missing or cut.
    fn check_sizes(&self) -> Result<(), ImageError> {
        for name in Self::FILES {
            let entry = self.manifest.files.get(name);
            let entry = entry
                .ok_or_else(|| self.damaged(Self::MANIFEST, format!("does not list {name}")))?;
            let metadata = fs::metadata(self.folder.join(name));
            let size = metadata
                .map_err(|error| self.damaged(name, format!("cannot be read ({error})")))?
                .len();
            if size != entry.size {
                let what = format!("has {size} bytes instead of {}", entry.size);
                return Err(self.damaged(name, what));
            }
        }
        Ok(())
    }
}

impl ImageStore {
    /// Opens the folder, making it if needed.
    pub fn open(root: PathBuf) -> Result<Self, ImageError> {
        // Absolute, because names are links that must not depend on who follows them.
        let root = std::path::absolute(&root).map_err(at("find", &root))?;
        for folder in [&root, &root.join("names"), &root.join("cache")] {
            files::folder(folder)?;
        }
        Ok(ImageStore { root })
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// All images, newest first. One that is damaged is an error in its place.
    pub fn list(&self) -> Result<Vec<Result<Image, ImageError>>, ImageError> {
        let names = self.names()?;
        let mut images: Vec<_> = self
            .digests()?
            .into_iter()
            .map(|digest| self.load(digest, &names))
            .collect();
        images.sort_by_key(|image| {
            std::cmp::Reverse(image.as_ref().map_or(0, |image| image.manifest.created))
        });
        Ok(images)
    }

    /// The image of that name, digest, or beginning of a digest. Its files are there in the
    /// right sizes; their content is checked by [`ImageStore::verify`].
    pub fn get(&self, name_or_digest: &str) -> Result<Image, ImageError> {
        let names = self.names()?;
        self.load(self.find(name_or_digest, &names)?, &names)
    }

    /// Alias of [`ImageStore::get`] under the name of the command.
    pub fn inspect(&self, name_or_digest: &str) -> Result<Image, ImageError> {
        self.get(name_or_digest)
    }

    /// Reads every file of an image and compares it with the manifest. Takes seconds.
    pub fn verify(&self, name_or_digest: &str) -> Result<Image, ImageError> {
        let image = self.get(name_or_digest)?;
        for (name, entry) in &image.manifest.files {
            let path = image.folder.join(name);
            let found = Digest::of_file(&path).map_err(at("read", &path))?;
            if found != entry.sha256 {
                return Err(image.damaged(
                    name,
                    format!("has the digest {found} instead of {}", entry.sha256),
                ));
            }
        }
        Ok(image)
    }

    /// Removes an image, or only a name if others point to the same image. Damaged images can
    /// be removed too. Refused while the digest is in `in_use` (G18).
    pub fn remove(&self, name_or_digest: &str, in_use: &HashSet<Digest>) -> Result<(), ImageError> {
        let _lock = self.lock()?;
        let names = self.names()?;
        let digest = self.find(name_or_digest, &names)?;
        let others = names
            .iter()
            .any(|(name, of)| *of == digest && name != name_or_digest);
        if names.contains_key(name_or_digest) && others {
            return files::remove(&self.root.join("names").join(name_or_digest));
        }
        if in_use.contains(&digest) {
            return Err(ImageError::InUse(name_or_digest.to_owned()));
        }
        for (name, _) in names.iter().filter(|(_, of)| **of == digest) {
            files::remove(&self.root.join("names").join(name))?;
        }
        // Out of sight in one step; a crash from here on leaves a folder that the next build
        // clears away.
        let folder = self.root.join(digest.to_string());
        let gone = self.root.join(format!(
            "{}removed-{}",
            files::BUILD_PREFIX,
            std::process::id()
        ));
        fs::rename(&folder, &gone).map_err(at("remove", &folder))?;
        files::set_mode(&gone, 0o700)?;
        files::remove(&gone)
    }

    /// Points a name to an image, in one step.
    pub(crate) fn name_image(&self, name: &str, image: Image) -> Result<Image, ImageError> {
        if !image.names.iter().any(|known| known == name) {
            let folder = self.root.join("names");
            let new = folder.join(format!(".{name}.{}", std::process::id()));
            let target = Path::new("..").join(image.digest().to_string());
            files::remove(&new)?;
            std::os::unix::fs::symlink(target, &new).map_err(at("make the link", &new))?;
            fs::rename(&new, folder.join(name)).map_err(at("name the image", folder.join(name)))?;
            files::sync(&folder)?;
        }
        self.get(name)
    }

    /// Every name and where it points. A link that points to no digest is none of ours.
    fn names(&self) -> Result<BTreeMap<String, Digest>, ImageError> {
        let folder = self.root.join("names");
        let mut names = BTreeMap::new();
        for entry in fs::read_dir(&folder).map_err(at("read", &folder))? {
            let entry = entry.map_err(at("read", &folder))?;
            let target = fs::read_link(entry.path()).ok();
            let digest = target
                .as_deref()
                .and_then(Path::file_name)
                .and_then(|name| name.to_str()?.parse().ok());
            if let (Ok(name), Some(digest)) = (entry.file_name().into_string(), digest)
                && check_name(&name).is_ok()
            {
                names.insert(name, digest);
            }
        }
        Ok(names)
    }

    fn digests(&self) -> Result<Vec<Digest>, ImageError> {
        let mut digests = Vec::new();
        for entry in fs::read_dir(&self.root).map_err(at("read", &self.root))? {
            let entry = entry.map_err(at("read", &self.root))?;
            digests.extend(
                entry
                    .file_name()
                    .to_str()
                    .and_then(|name| name.parse::<Digest>().ok()),
            );
        }
        digests.sort();
        Ok(digests)
    }

    fn find(&self, wanted: &str, names: &BTreeMap<String, Digest>) -> Result<Digest, ImageError> {
        let missing = || ImageError::NotFound(wanted.to_owned());
        let digests = self.digests()?;
        if let Some(digest) = names.get(wanted) {
            return digests
                .contains(digest)
                .then_some(*digest)
                .ok_or_else(missing);
        }
        let digits = wanted.strip_prefix("sha256-").unwrap_or(wanted);
        if digits.len() < SHORTEST_DIGEST {
            return Err(missing());
        }
        let full = format!("sha256-{digits}");
        let mut fitting = digests
            .into_iter()
            .filter(|digest| digest.to_string().starts_with(&full));
        match (fitting.next(), fitting.next()) {
            (Some(digest), None) => Ok(digest),
            (Some(_), Some(_)) => Err(ImageError::Ambiguous(wanted.to_owned())),
            (None, _) => Err(missing()),
        }
    }

    fn load(&self, digest: Digest, names: &BTreeMap<String, Digest>) -> Result<Image, ImageError> {
        let folder = self.root.join(digest.to_string());
        let file = folder.join(Image::MANIFEST);
        let damaged = |what| ImageError::Damaged {
            image: digest,
            file: file.clone(),
            what,
        };
        let bytes =
            fs::read(&file).map_err(|error| damaged(format!("cannot be read ({error})")))?;
        let manifest = Manifest::from_bytes(&bytes).map_err(damaged)?;
        if manifest.digest != digest {
            return Err(damaged(format!("belongs to the image {}", manifest.digest)));
        }
        let names = names
            .iter()
            .filter(|(_, of)| **of == digest)
            .map(|(name, _)| name.clone())
            .collect();
        let image = Image {
            folder,
            names,
            manifest,
        };
        image.check_sizes()?;
        Ok(image)
    }
}

/// Names are one path component, and never look like a digest.
pub(crate) fn check_name(name: &str) -> Result<(), ImageError> {
    let good = (1..=63).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.')
        && !name.starts_with("sha256-");
    if good {
        Ok(())
    } else {
        Err(ImageError::BadName(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::{FileEntry, tests::sample};

    /// An image with small files, as a build would leave it.
    fn store_with_image(folder: &Path) -> (ImageStore, Image) {
        let store = ImageStore::open(folder.join("images")).unwrap();
        let mut manifest = sample();
        let place = store.root().join(manifest.digest.to_string());
        fs::create_dir(&place).unwrap();
        manifest.files.clear();
        for name in Image::FILES {
            fs::write(place.join(name), name).unwrap();
            let entry = FileEntry {
                size: name.len() as u64,
                sha256: Digest::of(name.as_bytes()),
            };
            manifest.files.insert(name.into(), entry);
        }
        fs::write(place.join(Image::MANIFEST), manifest.to_bytes().unwrap()).unwrap();
        let image = store.get(&manifest.digest.to_string()).unwrap();
        let image = store.name_image("minimal", image).unwrap();
        (store, image)
    }

    #[test]
    fn an_image_is_found_by_name_and_digest_and_start_of_digest() {
        let folder = tempfile::tempdir().unwrap();
        let (store, image) = store_with_image(folder.path());
        let digest = image.digest().to_string();
        for wanted in [
            "minimal",
            &digest,
            &digest["sha256-".len()..],
            &digest[..15],
        ] {
            assert_eq!(
                store.get(wanted).unwrap().digest(),
                image.digest(),
                "{wanted}"
            );
        }
        for wanted in ["maximal", "", "sha256-", "..", "../images", "sha256-zz"] {
            assert!(
                matches!(store.get(wanted), Err(ImageError::NotFound(_))),
                "{wanted}"
            );
        }
        assert_eq!(store.list().unwrap().len(), 1);
        assert_eq!(image.names, ["minimal"]);
    }

    #[test]
    fn g16_verify_names_the_damaged_file() {
        let folder = tempfile::tempdir().unwrap();
        let (store, image) = store_with_image(folder.path());
        store.verify("minimal").unwrap();
        for name in Image::FILES {
            let path = image.folder().join(name);
            let whole = fs::read(&path).unwrap();
            let mut damaged = whole.clone();
            damaged[0] ^= 0x40;
            fs::write(&path, &damaged).unwrap();
            let told = store.verify("minimal").unwrap_err().to_string();
            assert!(told.contains("damaged") && told.contains(name), "{told}");
            fs::write(&path, &whole[1..]).unwrap();
            let told = store.get("minimal").unwrap_err().to_string();
            assert!(told.contains("damaged") && told.contains(name), "{told}");
            fs::write(&path, &whole).unwrap();
        }
        // Two files swapped.
        let (a, b) = (image.vmlinuz(), image.vmlinux());
        fs::rename(&a, image.folder().join("x")).unwrap();
        fs::rename(&b, &a).unwrap();
        fs::rename(image.folder().join("x"), &b).unwrap();
        assert!(store.verify("minimal").is_err());
    }

    #[test]
    fn g18_an_image_in_use_is_not_removed() {
        let folder = tempfile::tempdir().unwrap();
        let (store, image) = store_with_image(folder.path());
        let in_use = HashSet::from([image.digest()]);
        assert!(matches!(
            store.remove("minimal", &in_use),
            Err(ImageError::InUse(_))
        ));
        store.name_image("second", image.clone()).unwrap();
        store.remove("second", &in_use).unwrap();
        assert_eq!(store.get("minimal").unwrap().names, ["minimal"]);
        store.remove("minimal", &HashSet::new()).unwrap();
        assert!(store.list().unwrap().is_empty());
        let left: Vec<_> = fs::read_dir(store.root().join("names")).unwrap().collect();
        assert!(left.is_empty());
    }

    #[test]
    fn a_damaged_image_can_be_removed() {
        let folder = tempfile::tempdir().unwrap();
        let (store, image) = store_with_image(folder.path());
        fs::write(image.folder().join(Image::MANIFEST), "{}").unwrap();
        assert!(matches!(
            store.get("minimal"),
            Err(ImageError::Damaged { .. })
        ));
        assert!(store.list().unwrap()[0].is_err());
        store.remove("minimal", &HashSet::new()).unwrap();
    }

    #[test]
    fn names_are_one_plain_component() {
        for name in ["minimal", "a", "python3.11-dev"] {
            check_name(name).unwrap();
        }
        for name in [
            "",
            "../x",
            "a/b",
            ".x",
            "A",
            "sha256-1",
            "1a",
            &"a".repeat(64),
        ] {
            assert!(check_name(name).is_err(), "{name}");
        }
    }

    #[test]
    fn two_builds_at_once_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let store = ImageStore::open(folder.path().join("images")).unwrap();
        let first = store.lock().unwrap();
        assert!(matches!(store.lock(), Err(ImageError::Busy(_))));
        drop(first);
        store.lock().unwrap();
    }
}
