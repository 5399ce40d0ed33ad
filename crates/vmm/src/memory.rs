//! Guest memory that machines share.
//!
//! ```text
//! MemoryFile ──(template boots in it, is stopped and killed)──▶ seal ──▶ SealedMemory
//!                                                                          │      ▲
//!                                                             save_sparse  ▼      │ load
//!                                                                          file on disk
//! ```
//!
//! Both are memfds, see memfd_create(2). QEMU before 8.2 opens a memory file for writing even
//! where it maps it privately, so nothing but the kernel's seals keeps a machine's monitor
//! from writing what all clones share.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::runs::{Runs, for_runs};
use crate::sparse::{DataParts, data_in};
use crate::{Digest, PageRange};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, SeekFrom};

/// Granularity at which zeros are told from data: a page.
pub(crate) const PAGE: usize = 4096;

/// What guest memory is called in a monitor's list of mappings, memfd_create(2).
pub(crate) const MEMORY_NAME: &str = "wrenn-memory";

/// How much is read at once: large enough that system calls cost nothing, small enough for
/// the processor's cache.
const CHUNK: usize = 256 << 10;

/// How long [`MemoryFile::seal`] waits for the last mapping of a killed machine to go.
const SEAL_PATIENCE: Duration = Duration::from_secs(2);

/// Why memory could not be made, sealed, saved or loaded.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Memory that cannot be divided into pages.
    #[error("{0} bytes of memory cannot be had: the size must be a positive multiple of 4096")]
    Size(u64),
    /// The kernel refused a memory file.
    #[error("cannot {doing} a memory file of {bytes} bytes")]
    Memfd {
        /// What was being done.
        doing: &'static str,
        /// Size of the memory.
        bytes: u64,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A machine still writes to the memory.
    #[error(
        "the memory cannot be sealed: a machine still has it mapped for writing; kill the machine first"
    )]
    InUse,
    /// A file with saved memory could not be read or written.
    #[error("cannot {doing} saved memory {path}")]
    File {
        /// What was being done.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A file with saved memory is not what was saved.
    #[error(
        "saved memory {path} is damaged: its digest is {found}, not {expected}; make the template again"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The digest it must have.
        expected: Digest,
        /// The digest it has.
        found: Digest,
    },
}

/// Memory of a machine that may become a template: writable by the machine it is given to.
#[derive(Debug)]
pub struct MemoryFile {
    file: File,
    bytes: u64,
}

impl MemoryFile {
    /// Empty memory of `bytes` bytes, which can neither grow nor shrink. Takes room only as
    /// it is written.
    pub fn create(bytes: u64) -> Result<MemoryFile, MemoryError> {
        if bytes == 0 || !bytes.is_multiple_of(PAGE as u64) {
            return Err(MemoryError::Size(bytes));
        }
        let failed = |doing| {
            move |source: rustix::io::Errno| MemoryError::Memfd {
                doing,
                bytes,
                source: source.into(),
            }
        };
        let fd =
            rustix::fs::memfd_create(MEMORY_NAME, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
                .map_err(failed("create"))?;
        rustix::fs::ftruncate(&fd, bytes).map_err(failed("size"))?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::GROW | SealFlags::SHRINK)
            .map_err(failed("fix the size of"))?;
        Ok(MemoryFile {
            file: File::from(fd),
            bytes,
        })
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The memory behind a descriptor, found again after its agent has ended.
    pub(crate) fn from_file(file: File) -> io::Result<MemoryFile> {
        let bytes = file.metadata()?.len();
        Ok(MemoryFile { file, bytes })
    }

    /// Gives back the room of all pages that hold nothing but zeros. Blocking.
    pub(crate) fn drop_zeros(&self) -> Result<(), MemoryError> {
        let failed = |source: io::Error| MemoryError::Memfd {
            doing: "thin out",
            bytes: self.bytes,
            source,
        };
        let mut buffer = vec![0; CHUNK];
        let parts = data_in(&self.file, 0, self.bytes / PAGE as u64).map_err(failed)?;
        for part in parts {
            let (mut at, end) = (part.first * PAGE as u64, part.end() * PAGE as u64);
            while at < end {
                // At most CHUNK, so it fits a usize.
                let chunk = &mut buffer[..(end - at).min(CHUNK as u64) as usize];
                self.file.read_exact_at(chunk, at).map_err(failed)?;
                for_runs(chunk, true, |offset, zeros| {
                    rustix::fs::fallocate(
                        &self.file,
                        FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                        at + offset as u64,
                        zeros.len() as u64,
                    )
                    .map_err(|error| failed(error.into()))
                })?;
                at += chunk.len() as u64;
            }
        }
        Ok(())
    }

    /// Writes whole pages from page `first` on.
    pub(crate) fn write_at(&self, first: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        let written = self.file.write_all_at(bytes, first * PAGE as u64);
        written.map_err(|source| MemoryError::Memfd {
            doing: "write",
            bytes: self.bytes,
            source,
        })
    }

    #[cfg(test)]
    pub(crate) fn write_for_tests(&self, content: &[u8]) {
        let pages = content.chunks(PAGE).enumerate();
        for (index, page) in pages.filter(|(_, page)| !crate::runs::is_zero(page)) {
            self.file.write_all_at(page, (index * PAGE) as u64).unwrap();
        }
    }

    /// Makes the memory immutable for good. All machines in it must have been killed; a
    /// mapping that the kernel is still taking down is waited for (blocking, 2 s at most).
    pub fn seal(&self) -> Result<SealedMemory, MemoryError> {
        let failed = |source: io::Error| MemoryError::Memfd {
            doing: "seal",
            bytes: self.bytes,
            source,
        };
        let began = Instant::now();
        loop {
            match rustix::fs::fcntl_add_seals(
                &self.file,
                SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL,
            ) {
                Ok(()) => break,
                Err(rustix::io::Errno::BUSY) if began.elapsed() < SEAL_PATIENCE => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(rustix::io::Errno::BUSY) => return Err(MemoryError::InUse),
                Err(source) => return Err(failed(source.into())),
            }
        }
        Ok(SealedMemory {
            file: self.file.try_clone().map_err(failed)?,
            bytes: self.bytes,
        })
    }
}

impl MemoryFile {
    /// Makes memory immutable that no machine was ever given. Without the wait of
    /// [`MemoryFile::seal`]: that one has the kernel look for users of each page, and pages
    /// which were just written look used for a tenth of a second. As nobody has this memory
    /// mapped, no later writer is as good as none.
    pub(crate) fn seal_unused(&self) -> Result<SealedMemory, MemoryError> {
        let failed = |source: io::Error| MemoryError::Memfd {
            doing: "seal",
            bytes: self.bytes,
            source,
        };
        let seals = SealFlags::FUTURE_WRITE | SealFlags::SHRINK | SealFlags::GROW;
        rustix::fs::fcntl_add_seals(&self.file, seals | SealFlags::SEAL)
            .map_err(|error| failed(error.into()))?;
        Ok(SealedMemory {
            file: self.file.try_clone().map_err(failed)?,
            bytes: self.bytes,
        })
    }
}

impl AsFd for MemoryFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Memory that nobody can change any more, whoever holds a descriptor of it.
#[derive(Debug)]
pub struct SealedMemory {
    file: File,
    bytes: u64,
}

/// What [`SealedMemory::save_sparse`] wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SavedMemory {
    /// Digest of the content; see [`SealedMemory::digest`].
    pub digest: Digest,
    /// Bytes that are not in zero pages.
    pub data_bytes: u64,
}

impl SealedMemory {
    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// A descriptor of its own for a machine.
    pub fn share(&self) -> io::Result<OwnedFd> {
        self.file.as_fd().try_clone_to_owned()
    }

    /// Fills `into` with the content from byte `offset` on.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        self.file
            .read_exact_at(into, offset)
            .map_err(|source| self.unreadable(source))
    }

    /// The parts of `range` that may hold something else than zeros.
    pub(crate) fn data_in(&self, range: PageRange) -> Result<Vec<PageRange>, MemoryError> {
        let end = range.end().min(self.bytes / PAGE as u64);
        data_in(&self.file, range.first, end).map_err(|source| self.unreadable(source))
    }

    /// The same for several ranges, in ascending order.
    pub(crate) fn data_parts(&self) -> DataParts<'_> {
        DataParts::of(&self.file)
    }

    /// Another handle of the same memory.
    pub(crate) fn another(&self) -> Result<SealedMemory, MemoryError> {
        let file = self.file.try_clone();
        Ok(SealedMemory {
            file: file.map_err(|source| self.unreadable(source))?,
            bytes: self.bytes,
        })
    }

    /// The memory behind a descriptor, found again after its agent has ended.
    pub(crate) fn from_file(file: File) -> io::Result<SealedMemory> {
        let bytes = file.metadata()?.len();
        Ok(SealedMemory { file, bytes })
    }

    pub(crate) fn unreadable(&self, source: io::Error) -> MemoryError {
        MemoryError::Memfd {
            doing: "read",
            bytes: self.bytes,
            source,
        }
    }

    /// Digest of the content: SHA-256 over the size and then, for each longest run of pages
    /// that are not zero, its offset, its length and the SHA-256 of its bytes (numbers as
    /// 64-bit little endian). It does not depend on where a file has holes.
    pub fn digest(&self) -> Result<SavedMemory, MemoryError> {
        let source = Path::new("in memory");
        copy(&self.file, source, self.bytes, None)
    }

    /// Writes the memory to a new file at `path`, zero pages as holes, and syncs it. The
    /// caller syncs the folder. Blocking.
    pub fn save_sparse(&self, path: &Path) -> Result<SavedMemory, MemoryError> {
        let failed = |doing| {
            let path = path.to_owned();
            move |source| MemoryError::File {
                doing,
                path,
                source,
            }
        };
        let out = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(failed("create"))?;
        out.set_len(self.bytes).map_err(failed("size"))?;
        let saved = copy(&self.file, path, self.bytes, Some(&out))?;
        out.sync_all().map_err(failed("sync"))?;
        Ok(saved)
    }

    /// Brings saved memory back, checking that it is what was saved. Blocking.
    pub fn load(path: &Path, expected: Digest) -> Result<SealedMemory, MemoryError> {
        let failed = |source| MemoryError::File {
            doing: "open",
            path: path.to_owned(),
            source,
        };
        let saved = File::open(path).map_err(failed)?;
        let bytes = saved.metadata().map_err(failed)?.len();
        let memory = MemoryFile::create(bytes)?;
        let found = copy(&saved, path, bytes, Some(&memory.file))?.digest;
        if found != expected {
            return Err(MemoryError::Damaged {
                path: path.to_owned(),
                expected,
                found,
            });
        }
        memory.seal()
    }
}

/// Copies what is not zero from `from` to `to` (of the same size, all holes), if there is
/// one, and digests it. `path` names the file in errors.
fn copy(
    from: &File,
    path: &Path,
    bytes: u64,
    to: Option<&File>,
) -> Result<SavedMemory, MemoryError> {
    let failed = |doing| {
        move |source: io::Error| MemoryError::File {
            doing,
            path: path.to_owned(),
            source,
        }
    };
    let mut runs = Runs::new(bytes);
    let mut buffer = vec![0; CHUNK];
    let mut at = 0;
    while at < bytes {
        // An unfilled hole reads as zeros; skip to where there may be something else.
        let data = match rustix::fs::seek(from, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(failed("read")(error.into())),
        };
        let hole = rustix::fs::seek(from, SeekFrom::Hole(data))
            .map_err(|error| failed("read")(error.into()))?;
        let end = hole.next_multiple_of(PAGE as u64).min(bytes);
        at = data - data % PAGE as u64;
        while at < end {
            // At most CHUNK, so it fits a usize.
            let chunk = &mut buffer[..(end - at).min(CHUNK as u64) as usize];
            from.read_exact_at(chunk, at).map_err(failed("read"))?;
            for_runs(chunk, false, |offset, data| {
                let offset = at + offset as u64;
                if let Some(to) = to {
                    to.write_all_at(data, offset).map_err(failed("write"))?;
                }
                runs.add(offset, data);
                Ok(())
            })?;
            at += chunk.len() as u64;
        }
    }
    Ok(runs.finish())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn filled(pages: u64, content: &BTreeMap<u64, u8>) -> MemoryFile {
        let memory = MemoryFile::create(pages * PAGE as u64).unwrap();
        for (page, byte) in content {
            memory
                .file
                .write_all_at(&[*byte; PAGE], page * PAGE as u64)
                .unwrap();
        }
        memory
    }

    #[test]
    fn g43_sealed_memory_cannot_be_written_through_any_descriptor() {
        for seal in [MemoryFile::seal, MemoryFile::seal_unused] {
            let memory = filled(4, &BTreeMap::from([(1, 7)]));
            let sealed = seal(&memory).unwrap();
            let before = sealed.digest().unwrap();
            assert!(memory.file.write_all_at(b"x", 0).is_err());
            let again = format!(
                "/proc/self/fd/{}",
                std::os::fd::AsRawFd::as_raw_fd(&sealed.file)
            );
            let reopened = OpenOptions::new().write(true).open(again).unwrap();
            assert!(reopened.write_all_at(b"x", 0).is_err());
            assert!(reopened.set_len(0).is_err());
            let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            assert!(rustix::fs::fallocate(&reopened, punch, 0, 4096).is_err());
            assert_eq!(sealed.digest().unwrap(), before);
            assert_eq!(before.data_bytes, 4096);
        }
    }

    #[test]
    fn zeros_are_given_back_and_nothing_else() {
        let content = [2, 3, 9, 100, 127].map(|page| (page, 1));
        let memory = filled(128, &BTreeMap::from(content));
        let before = memory.seal_unused().unwrap().digest().unwrap();
        let memory = MemoryFile::create(128 * PAGE as u64).unwrap();
        // All of it is there now, as Firecracker writes it.
        for page in 0..128 {
            let byte = u8::from(content.contains(&(page, 1)));
            memory.write_at(page, &[byte; PAGE]).unwrap();
        }
        memory.drop_zeros().unwrap();
        let parts = data_in(&memory.file, 0, 128).unwrap();
        let parts: Vec<_> = parts.iter().map(|part| (part.first, part.count)).collect();
        assert_eq!(parts, [(2, 2), (9, 1), (100, 1), (127, 1)]);
        assert_eq!(memory.seal().unwrap().digest().unwrap(), before);
    }

    #[test]
    fn data_is_found_between_holes() {
        let content = [2, 3, 9, 20].map(|page| (page, 1));
        let sealed = filled(64, &BTreeMap::from(content)).seal().unwrap();
        let data = |first, count| {
            let found = sealed.data_in(PageRange { first, count }).unwrap();
            let pages = found.iter().map(|part| (part.first, part.count));
            pages.collect::<Vec<_>>()
        };
        assert_eq!(data(0, 64), [(2, 2), (9, 1), (20, 1)]);
        assert_eq!(data(3, 7), [(3, 1), (9, 1)]);
        assert_eq!(data(10, 10), []);
        assert_eq!(data(21, 43), []);
        let mut page = [0; PAGE];
        sealed.read_at(9 * PAGE as u64, &mut page).unwrap();
        assert_eq!(page, [1; PAGE]);
        assert!(sealed.read_at(63 * PAGE as u64 + 1, &mut page).is_err());
    }

    #[test]
    fn the_digest_does_not_see_holes() {
        let holes = filled(512, &BTreeMap::from([(3, 1), (300, 2)]));
        let all: BTreeMap<u64, u8> = (0..512)
            .map(|page| {
                (
                    page,
                    if page == 3 {
                        1
                    } else if page == 300 {
                        2
                    } else {
                        0
                    },
                )
            })
            .collect();
        let zeros = filled(512, &all);
        assert_eq!(
            holes.seal().unwrap().digest().unwrap(),
            zeros.seal().unwrap().digest().unwrap()
        );
    }

    #[test]
    fn damaged_and_cut_files_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        let sealed = filled(64, &BTreeMap::from([(5, 9)])).seal().unwrap();
        let saved = sealed.save_sparse(&path).unwrap();
        for flip in [0u64, 5 * 4096 + 17, 63 * 4096] {
            let bytes = std::fs::read(&path).unwrap();
            let mut damaged = bytes.clone();
            damaged[flip as usize] ^= 1;
            std::fs::write(&path, &damaged).unwrap();
            let error = SealedMemory::load(&path, saved.digest).unwrap_err();
            assert!(error.to_string().contains("memory is damaged"), "{error}");
            std::fs::write(&path, &bytes).unwrap();
        }
        SealedMemory::load(&path, saved.digest).unwrap();
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(63 * 4096).unwrap();
        assert!(SealedMemory::load(&path, saved.digest).is_err());
        assert!(sealed.save_sparse(&path).is_err(), "never overwrites");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn what_is_saved_is_what_is_loaded(
            content in proptest::collection::btree_map(0u64..400, any::<u8>(), 0..200)
        ) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("memory");
            let sealed = filled(400, &content).seal().unwrap();
            let saved = sealed.save_sparse(&path).unwrap();
            let data = content.values().filter(|byte| **byte != 0).count() as u64 * PAGE as u64;
            prop_assert_eq!(saved.data_bytes, data);
            let loaded = SealedMemory::load(&path, saved.digest).unwrap();
            prop_assert_eq!(loaded.digest().unwrap(), saved);
            let mut page = [0; PAGE];
            for index in 0..400 {
                loaded.file.read_exact_at(&mut page, index * PAGE as u64).unwrap();
                prop_assert_eq!(page, [*content.get(&index).unwrap_or(&0); PAGE]);
            }
        }
    }
}
