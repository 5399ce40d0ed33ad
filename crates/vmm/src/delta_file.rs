//! Changed pages as a sparse file: each at its place in the memory, holes where nothing
//! changed. Firecracker writes its diff snapshots into one, over what earlier ones left there,
//! so that it always holds all that changed since the template.
//!
//! ```text
//! template  ████████████████      compose      ██▒▒████░░██████   the memory of a clone
//! delta         ▒▒    ░░       ────────────▶       ▒▒    ░░       its changes so far
//! ```
//!
//! It is a memfd, see memfd_create(2): the monitor inherits it, so that it lives as long as
//! the machine and is found there by the next agent.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use rustix::fs::{MemfdFlags, SealFlags};

use crate::delta::{CHUNK_PAGES, Course, DeltaError, DeltaPages, PageRange, Run};
use crate::memory::PAGE;
use crate::sparse::data_in;
use crate::{MemoryError, MemoryFile, SealedMemory};

/// What such a file is called among a monitor's descriptors.
pub(crate) const DELTA_NAME: &str = "wrenn-delta";

/// Changes of a memory of a fixed size.
#[derive(Debug)]
pub(crate) struct DeltaFile {
    file: File,
    bytes: u64,
}

impl DeltaFile {
    /// No changes of a memory of `bytes` bytes.
    pub(crate) fn create(bytes: u64) -> Result<DeltaFile, DeltaError> {
        exact().map_err(|why| DeltaError::Inexact(why.to_owned()))?;
        let create = || -> io::Result<File> {
            let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
            let file = File::from(rustix::fs::memfd_create(DELTA_NAME, flags)?);
            file.set_len(bytes)?;
            rustix::fs::fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK)?;
            Ok(file)
        };
        let file = create().map_err(|source| failed("create", bytes, source))?;
        Ok(DeltaFile { file, bytes })
    }

    /// The changes behind a descriptor of a machine that lives on.
    pub(crate) fn from_file(file: File) -> io::Result<DeltaFile> {
        let bytes = file.metadata()?.len();
        Ok(DeltaFile { file, bytes })
    }

    /// A descriptor of its own for a machine.
    pub(crate) fn share(&self) -> io::Result<OwnedFd> {
        Ok(self.file.try_clone()?.into())
    }

    /// The changed pages; ascending, not adjacent.
    pub(crate) fn ranges(&self) -> Result<Vec<PageRange>, DeltaError> {
        data_in(&self.file, 0, self.bytes / PAGE as u64)
            .map_err(|source| failed("scan", self.bytes, source))
    }

    /// All pages, of a file that holds a whole memory.
    pub(crate) fn all(&self) -> Vec<PageRange> {
        let count = self.bytes / PAGE as u64;
        vec![PageRange { first: 0, count }]
    }

    fn write(&self, first: u64, bytes: &[u8]) -> Result<(), DeltaError> {
        self.file
            .write_all_at(bytes, first * PAGE as u64)
            .map_err(|source| failed("write", self.bytes, source))
    }
}

fn failed(doing: &'static str, bytes: u64, source: io::Error) -> DeltaError {
    DeltaError::Template(MemoryError::Memfd {
        doing,
        bytes,
        source,
    })
}

/// The memory that a delta makes of its template, and the delta itself. Blocking; takes time
/// and memory for all that the template holds.
pub(crate) fn compose(
    template: &SealedMemory,
    pages: &mut dyn DeltaPages,
) -> Result<(SealedMemory, DeltaFile), DeltaError> {
    let bytes = template.bytes();
    let count = bytes / PAGE as u64;
    let memory = MemoryFile::create(bytes)?;
    let delta = DeltaFile::create(bytes)?;
    let mut buffer = vec![0; CHUNK_PAGES as usize * PAGE];
    for part in template.data_in(PageRange { first: 0, count })? {
        for_chunks(part, |first, count| {
            let chunk = &mut buffer[..count as usize * PAGE];
            template.read_at(first * PAGE as u64, chunk)?;
            Ok(memory.write_at(first, chunk)?)
        })?;
    }
    buffer.fill(0);
    let mut course = Course::new(count);
    while let Some(run) = pages.next_run()? {
        let range = course.check(&run)?;
        match run {
            Run::Data { first, bytes } => {
                memory.write_at(first, bytes)?;
                delta.write(first, bytes)?;
            }
            // Written out: a page without data would count as one that did not change.
            Run::Zero(_) => for_chunks(range, |first, count| {
                let zeros = &buffer[..count as usize * PAGE];
                delta.write(first, zeros)?;
                Ok(memory.write_at(first, zeros)?)
            })?,
        }
    }
    Ok((memory.seal_unused()?, delta))
}

fn for_chunks(
    range: PageRange,
    mut each: impl FnMut(u64, u64) -> Result<(), DeltaError>,
) -> Result<(), DeltaError> {
    let mut first = range.first;
    while first < range.end() {
        let count = (range.end() - first).min(CHUNK_PAGES);
        each(first, count)?;
        first += count;
    }
    Ok(())
}

/// A machine's memory at a save: what changed in one file, the rest in its template.
#[derive(Debug)]
pub(crate) struct SavedPages {
    delta: DeltaFile,
    /// `None` where a page server has it.
    template: Option<SealedMemory>,
    ranges: Vec<PageRange>,
}

impl SavedPages {
    pub(crate) fn new(
        delta: DeltaFile,
        template: Option<SealedMemory>,
        ranges: Vec<PageRange>,
    ) -> SavedPages {
        SavedPages {
            delta,
            template,
            ranges,
        }
    }

    /// Pages of the whole memory.
    pub(crate) fn pages(&self) -> u64 {
        self.delta.bytes / PAGE as u64
    }

    /// Fills `into` (whole pages) from page `first` on.
    pub(crate) fn read(&self, first: u64, into: &mut [u8]) -> Result<(), DeltaError> {
        if !into.len().is_multiple_of(PAGE) {
            let bytes = into.len();
            return Err(DeltaError::Ragged { first, bytes });
        }
        let end = first.saturating_add((into.len() / PAGE) as u64);
        if end > self.pages() {
            return Err(DeltaError::Outside {
                first,
                end,
                pages: self.pages(),
            });
        }
        let mut rest = into;
        let mut at = first;
        while at < end {
            let next = self.ranges.partition_point(|range| range.end() <= at);
            let (changed, until) = match self.ranges.get(next) {
                Some(range) if range.first <= at => (true, range.end().min(end)),
                Some(range) => (false, range.first.min(end)),
                None => (false, end),
            };
            // Not more than `into` has, so it fits a usize.
            let (part, others) = rest.split_at_mut((until - at) as usize * PAGE);
            match (changed, &self.template) {
                (true, _) => self
                    .delta
                    .file
                    .read_exact_at(part, at * PAGE as u64)
                    .map_err(|source| failed("read", self.delta.bytes, source))?,
                (false, Some(template)) => template.read_at(at * PAGE as u64, part)?,
                (false, None) => return Err(DeltaError::Elsewhere { page: at }),
            }
            (rest, at) = (others, until);
        }
        Ok(())
    }
}

/// Whether this kernel tells holes from data page by page. It does not where such files get
/// huge pages, and then a page beside a written one would count as written with zeros.
fn exact() -> Result<(), &'static str> {
    static EXACT: OnceLock<Result<(), String>> = OnceLock::new();
    let tried = EXACT.get_or_init(|| match try_exact() {
        Ok(true) => Ok(()),
        Ok(false) => Err("files in memory are kept in huge pages here; write never or advise to /sys/kernel/mm/transparent_hugepage/shmem_enabled".into()),
        Err(error) => Err(format!("a file in memory cannot be tried: {error}")),
    });
    tried.as_ref().copied().map_err(String::as_str)
}

fn try_exact() -> io::Result<bool> {
    const PAGES: u64 = 4096;
    let file = File::from(rustix::fs::memfd_create("wrenn-try", MemfdFlags::CLOEXEC)?);
    file.set_len(PAGES * PAGE as u64)?;
    // Runs of several lengths, apart from each other and from the boundaries of huge pages.
    let written = [(1, 1), (130, 3), (700, 16), (1500, 64), (2600, 700)];
    let written = written.map(|(first, count)| PageRange { first, count });
    for range in written {
        let bytes = vec![1; range.count as usize * PAGE];
        file.write_all_at(&bytes, range.first * PAGE as u64)?;
    }
    Ok(data_in(&file, 0, PAGES)? == written)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PageBuffer;
    use proptest::prelude::*;
    use std::sync::Arc;

    const COUNT: usize = 200;

    /// Pages of a template: a byte that fills them, or nothing.
    fn template(content: &[u8]) -> SealedMemory {
        let memory = MemoryFile::create((content.len() * PAGE) as u64).unwrap();
        let bytes: Vec<u8> = content.iter().flat_map(|byte| [*byte; PAGE]).collect();
        memory.write_for_tests(&bytes);
        memory.seal().unwrap()
    }

    struct Pages(Vec<(u64, u8)>, usize, Vec<u8>);

    impl DeltaPages for Pages {
        fn next_run(&mut self) -> Result<Option<Run<'_>>, DeltaError> {
            let Some((first, byte)) = self.0.get(self.1).copied() else {
                return Ok(None);
            };
            self.1 += 1;
            self.2 = vec![byte; PAGE];
            Ok(Some(match byte {
                0 => Run::Zero(PageRange { first, count: 1 }),
                _ => Run::Data {
                    first,
                    bytes: &self.2,
                },
            }))
        }
    }

    fn all(memory: &SealedMemory) -> Vec<u8> {
        let mut bytes = vec![0xEE; memory.bytes() as usize];
        memory.read_at(0, &mut bytes).unwrap();
        bytes
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn g13_g14_what_is_composed_is_the_template_with_the_changes(
            below in proptest::collection::vec(0u8..3, COUNT),
            changes in proptest::collection::btree_map(0..COUNT as u64, 0u8..5, 0..60),
        ) {
            let template = template(&below);
            let mut model = below.clone();
            for (page, byte) in &changes {
                model[*page as usize] = *byte;
            }
            let model: Vec<u8> = model.iter().flat_map(|byte| [*byte; PAGE]).collect();
            let list: Vec<(u64, u8)> = changes.iter().map(|(page, byte)| (*page, *byte)).collect();
            let mut pages = Pages(list, 0, Vec::new());
            let (memory, delta) = compose(&template, &mut pages).unwrap();
            prop_assert!(all(&memory) == model);
            // Every change is known as one, cleared pages too, and nothing else is.
            let ranges = delta.ranges().unwrap();
            let found: Vec<u64> = ranges.iter().flat_map(|range| range.first..range.end()).collect();
            prop_assert_eq!(found, changes.keys().copied().collect::<Vec<_>>());
            let saved = SavedPages::new(delta, Some(template), ranges.clone());
            let mut read = vec![0xEE; COUNT * PAGE];
            saved.read(0, &mut read).unwrap();
            prop_assert!(read == model);
            let mut one = [0; PAGE];
            for page in [0, COUNT / 2, COUNT - 1] {
                saved.read(page as u64, &mut one).unwrap();
                prop_assert!(one[..] == model[page * PAGE..(page + 1) * PAGE]);
            }
            let served = SavedPages::new(
                DeltaFile::from_file(saved.delta.file.try_clone().unwrap()).unwrap(), None, ranges,
            );
            for page in 0..COUNT as u64 {
                match served.read(page, &mut one) {
                    Ok(()) => prop_assert!(changes.contains_key(&page)),
                    Err(DeltaError::Elsewhere { page: told }) => {
                        prop_assert!(told == page && !changes.contains_key(&page));
                    }
                    Err(error) => prop_assert!(false, "{error}"),
                }
            }
        }
    }

    #[test]
    fn bad_runs_and_reads_are_refused() {
        let below = template(&[1, 2]);
        let mut outside = Pages(vec![(2, 1)], 0, Vec::new());
        assert!(matches!(
            compose(&below, &mut outside),
            Err(DeltaError::Outside { end: 3, .. })
        ));
        let mut backwards = Pages(vec![(1, 1), (0, 1)], 0, Vec::new());
        let error = compose(&below, &mut backwards).unwrap_err();
        assert!(matches!(error, DeltaError::Order { .. }));
        let none: Arc<PageBuffer> = Arc::default();
        let (_, delta) = compose(&below, &mut *none.stream()).unwrap();
        let saved = SavedPages::new(delta, None, Vec::new());
        assert!(matches!(
            saved.read(1, &mut [0; 2 * PAGE]),
            Err(DeltaError::Outside { end: 3, .. })
        ));
        assert!(matches!(
            saved.read(0, &mut [0; 5]),
            Err(DeltaError::Ragged { bytes: 5, .. })
        ));
    }
}
