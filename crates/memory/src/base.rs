//! The memory that snapshots are laid over, as a file that nobody can change.

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::fs::{SealFlags, SeekFrom};
use wrenn_snapshot::{BaseBytes, BaseId, PAGE, PageRange, pages_of};

use crate::ServeError;
use crate::kernel::Mapped;

/// A template's memory: a memfd sealed against every change, so that whoever checked its
/// content against its digest before sealing it (the agent, when it loaded the template) has
/// checked it for all that read it later.
#[derive(Debug)]
pub struct SealedBase {
    id: BaseId,
    content: Mapped,
    pages: u64,
    /// Where the file has data; ascending. The rest are holes, that is, zeros.
    data: Vec<PageRange>,
}

impl SealedBase {
    /// Opens the memfd at `path` (`/proc/self/fd/N`, for one that was inherited).
    pub fn open(path: &Path, id: BaseId) -> Result<SealedBase, ServeError> {
        let wrong = |problem: String| ServeError::Base {
            path: path.to_owned(),
            problem,
        };
        let failed = |error: io::Error| wrong(error.to_string());
        // Opened anew: finding the holes moves the file's position.
        let file = File::open(path).map_err(failed)?;
        let seals = rustix::fs::fcntl_get_seals(&file)
            .map_err(|error| wrong(format!("it is no sealed memory ({error})")))?;
        if !seals.contains(SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW) {
            return Err(wrong(
                "it is not sealed, so its content could change: seal it once it is verified".into(),
            ));
        }
        let bytes = file.metadata().map_err(failed)?.len();
        let pages = pages_of(bytes).map_err(|error| wrong(error.to_string()))?;
        let data = data_of(&file, bytes).map_err(failed)?;
        let length = usize::try_from(bytes).map_err(|_| wrong("it is too large".into()))?;
        Ok(SealedBase {
            id,
            content: Mapped::new(&file, length).map_err(failed)?,
            pages,
            data,
        })
    }

    /// Prepares its data for being copied fast, as long as `wanted`: otherwise the first copy
    /// from each 64 KiB takes as long as a whole fault. Holes are left alone: looking at one
    /// would fill it.
    pub(crate) fn warm(&self, wanted: impl Fn() -> bool) {
        /// Some milliseconds' worth.
        const STEP: u64 = 4096;
        for range in &self.data {
            let mut first = range.first;
            while first < range.end() && wanted() {
                let count = STEP.min(range.end() - first);
                // Both are inside the mapping, whose length is a usize.
                self.content
                    .populate(first as usize * PAGE, count as usize * PAGE);
                first += count;
            }
        }
    }

    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    /// As what snapshots are laid over.
    pub(crate) fn as_base(&self) -> BaseBytes<'_> {
        BaseBytes {
            id: self.id,
            bytes: self.content.bytes(),
        }
    }

    /// The content of pages; nothing if they are outside.
    pub(crate) fn content(&self, range: PageRange) -> &[u8] {
        let at = |page: u64| usize::try_from(page).ok()?.checked_mul(PAGE);
        let bytes = at(range.first).zip(at(range.end()));
        bytes
            .and_then(|(start, end)| self.content.bytes().get(start..end))
            .unwrap_or_default()
    }

    /// Whether page `first` is in a hole, and how many of the `count` pages from it on are
    /// alike.
    pub(crate) fn hole(&self, first: u64, count: u64) -> (bool, u64) {
        let next = self.data.partition_point(|range| range.end() <= first);
        match self.data.get(next) {
            Some(range) if range.first <= first => (false, count.min(range.end() - first)),
            Some(range) => (true, count.min(range.first - first)),
            None => (true, count),
        }
    }
}

/// The pages of a file that are not wholly in holes.
fn data_of(file: &File, bytes: u64) -> io::Result<Vec<PageRange>> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < bytes {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            // No data behind this.
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(file, SeekFrom::Hole(start))?.min(bytes);
        let first = start / PAGE as u64;
        found.push(PageRange {
            first,
            count: end.div_ceil(PAGE as u64) - first,
        });
        at = end.max(at + 1);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::MemfdFlags;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;

    const ID: BaseId = BaseId([1; 32]);

    fn memory(seals: SealFlags) -> (File, std::path::PathBuf) {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(rustix::fs::memfd_create("base", flags).unwrap());
        file.set_len(64 * PAGE as u64).unwrap();
        for page in [3, 4, 9] {
            file.write_all_at(&[page as u8; PAGE], page * PAGE as u64)
                .unwrap();
        }
        rustix::fs::fcntl_add_seals(&file, seals).unwrap();
        let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
        (file, path)
    }

    #[test]
    fn only_sealed_memory_is_a_base() {
        for seals in [SealFlags::empty(), SealFlags::SHRINK | SealFlags::GROW] {
            let (_file, path) = memory(seals);
            let error = SealedBase::open(&path, ID).unwrap_err().to_string();
            assert!(error.contains("not sealed"), "{error}");
        }
        let plain = tempfile::NamedTempFile::new().unwrap();
        let error = SealedBase::open(plain.path(), ID).unwrap_err().to_string();
        assert!(error.contains(plain.path().to_str().unwrap()), "{error}");
    }

    #[test]
    fn holes_are_known_without_reading_them() {
        let (_file, path) = memory(SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW);
        let base = SealedBase::open(&path, ID).unwrap();
        assert_eq!(base.pages(), 64);
        assert_eq!(base.hole(0, 64), (true, 3));
        assert_eq!(base.hole(3, 64), (false, 2));
        assert_eq!(base.hole(4, 64), (false, 1));
        assert_eq!(base.hole(5, 2), (true, 2));
        assert_eq!(base.hole(10, 54), (true, 54));
        let range = |first, count| PageRange { first, count };
        let pages = base.content(range(8, 2));
        assert!(pages[..PAGE].iter().all(|byte| *byte == 0));
        assert!(pages[PAGE..].iter().all(|byte| *byte == 9));
        for outside in [range(64, 1), range(63, 2), range(u64::MAX, 1)] {
            assert!(base.content(outside).is_empty());
        }
    }
}
