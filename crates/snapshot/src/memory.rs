//! Reading a snapshot's memory, and comparing two.

use std::sync::Arc;

use crate::generation::{Generation, Scratch};
use crate::map::{PageMap, Source};
use crate::page::{Base, PAGE, PageRange};
use crate::{BaseId, Result, SnapshotError};

/// Pages handed over at once: large enough that calls cost nothing, small enough for the
/// processor's cache.
pub(crate) const BATCH_PAGES: u64 = 256;

/// A snapshot's memory: its map, and its generations, open. Cheap to clone and shared by any
/// number of readers.
#[derive(Debug, Clone)]
pub struct Memory {
    map: Arc<PageMap>,
    /// In the map's order.
    generations: Vec<Arc<Generation>>,
}

impl Memory {
    /// Memory that nothing was written to yet: what a machine starts with that was restored
    /// from the base alone. `pages` as [`crate::pages_of`] gives them.
    pub fn untouched(pages: u64, base: Option<BaseId>) -> Memory {
        Memory {
            map: Arc::new(PageMap::untouched(pages, base)),
            generations: Vec::new(),
        }
    }

    /// `generations` are those of the map, in its order.
    pub(crate) fn new(map: PageMap, generations: Vec<Arc<Generation>>) -> Memory {
        Memory {
            map: Arc::new(map),
            generations,
        }
    }

    /// Where each page is.
    pub fn map(&self) -> &PageMap {
        &self.map
    }

    pub(crate) fn generations(&self) -> &[Arc<Generation>] {
        &self.generations
    }

    /// A reader of the memory's content. Inherited pages need `base`; without it, reading one
    /// is an error. One reader per thread.
    pub fn reader<'a>(&self, base: Option<&'a dyn Base>) -> Result<PageReader<'a>> {
        if let Some(base) = base
            && (self.map.base() != Some(base.id()) || base.pages() != self.map.pages())
        {
            return Err(SnapshotError::OtherBase {
                needs: match self.map.base() {
                    Some(id) => format!("{id} of {} pages", self.map.pages()),
                    None => "none".into(),
                },
                given: format!("{} of {} pages", base.id(), base.pages()),
            });
        }
        Ok(PageReader {
            memory: self.clone(),
            base,
            scratch: Scratch::default(),
        })
    }

    /// What differs from the base, ascending: to be written over a private mapping of it.
    /// Zero runs are part of it, inherited pages are not.
    pub fn delta(&self) -> Delta {
        Delta {
            reader: PageReader {
                memory: self.clone(),
                base: None,
                scratch: Scratch::default(),
            },
            next: 0,
            buffer: Vec::new(),
        }
    }

    /// The pages whose content differs between this memory and `other`, joined and
    /// ascending. Pages that both maps find in the same place are not read. `base` is needed
    /// only where an inherited page has to be compared with another.
    pub fn diff(&self, other: &Memory, base: Option<&dyn Base>) -> Result<Vec<PageRange>> {
        if self.map.pages() != other.map.pages() || self.map.base() != other.map.base() {
            let name = |map: &PageMap| match map.base() {
                Some(id) => format!("{id} of {} pages", map.pages()),
                None => format!("none, with {} pages", map.pages()),
            };
            return Err(SnapshotError::OtherBase {
                needs: name(&self.map),
                given: name(&other.map),
            });
        }
        let (mut mine, mut theirs) = (self.reader(base)?, other.reader(base)?);
        let mut found: Vec<PageRange> = Vec::new();
        let mut buffers = (Vec::new(), Vec::new());
        for_common_parts(&self.map, &other.map, |range, left, right| {
            if self.same_place(left, other, right) {
                return Ok(());
            }
            let bytes = range.count as usize * PAGE;
            buffers.0.resize(bytes, 0);
            buffers.1.resize(bytes, 0);
            mine.read(range.first, &mut buffers.0)?;
            theirs.read(range.first, &mut buffers.1)?;
            let pages = buffers.0.chunks(PAGE).zip(buffers.1.chunks(PAGE));
            for (page, _) in (range.first..).zip(pages).filter(|(_, (a, b))| a != b) {
                match found.last_mut() {
                    Some(last) if last.end() == page => last.count += 1,
                    _ => found.push(PageRange {
                        first: page,
                        count: 1,
                    }),
                }
            }
            Ok(())
        })?;
        Ok(found)
    }

    /// Whether two sources of the same page are the same place, so that the content is equal
    /// without being read.
    fn same_place(&self, mine: Source, other: &Memory, theirs: Source) -> bool {
        match (mine, theirs) {
            (Source::Base, Source::Base) | (Source::Zero, Source::Zero) => true,
            (
                Source::Data {
                    generation: a,
                    page: at,
                },
                Source::Data {
                    generation: b,
                    page: other_at,
                },
            ) => {
                let id = |memory: &Memory, index: u32| {
                    let known = memory.map.generations().get(index as usize);
                    known.map(|generation| generation.id)
                };
                at == other_at && id(self, a) == id(other, b)
            }
            (Source::Base | Source::Zero | Source::Data { .. }, _) => false,
        }
    }
}

/// Calls `visit` for each longest run (of at most [`BATCH_PAGES`]) that lies in one extent of
/// either map, with the sources of its first page.
fn for_common_parts(
    left: &PageMap,
    right: &PageMap,
    mut visit: impl FnMut(PageRange, Source, Source) -> Result<()>,
) -> Result<()> {
    for extent in left.extents() {
        for part in right.within(extent.range) {
            let mut first = part.range.first;
            while first < part.range.end() {
                let count = (part.range.end() - first).min(BATCH_PAGES);
                // Both are inside: the maps have the same number of pages.
                if let (Some(a), Some(b)) = (left.lookup(first), right.lookup(first)) {
                    visit(PageRange { first, count }, a.source, b.source)?;
                }
                first += count;
            }
        }
    }
    Ok(())
}

/// Reads a memory's content page by page or in batches. What is read was checked.
pub struct PageReader<'a> {
    memory: Memory,
    base: Option<&'a dyn Base>,
    scratch: Scratch,
}

impl PageReader<'_> {
    /// Fills `into`, whole pages, with the content from page `first` on.
    pub fn read(&mut self, first: u64, into: &mut [u8]) -> Result<()> {
        let map = &self.memory.map;
        let range = PageRange::of_bytes(first, into, map.pages())?;
        let mut rest = into;
        for extent in map.within(range) {
            let (now, later) = rest.split_at_mut(extent.range.count as usize * PAGE);
            rest = later;
            match extent.source {
                Source::Zero => now.fill(0),
                Source::Base => self.read_base(extent.range.first, now)?,
                Source::Data { generation, page } => {
                    // A valid map names only generations it has, which are all open.
                    let open = &self.memory.generations[generation as usize];
                    open.read(u64::from(page), now, &mut self.scratch)?;
                }
            }
        }
        Ok(())
    }

    fn read_base(&self, page: u64, into: &mut [u8]) -> Result<()> {
        // Only a map with a base has inherited pages.
        let id = self.memory.map.base().unwrap_or(BaseId([0; 32]));
        let base = self.base.ok_or(SnapshotError::NoBase { page, base: id })?;
        base.read(page, into).map_err(|source| SnapshotError::Base {
            base: id,
            page,
            source,
        })
    }

    /// The content of one page.
    pub fn read_page(&mut self, page: u64) -> Result<[u8; PAGE]> {
        let mut content = [0; PAGE];
        self.read(page, &mut content)?;
        Ok(content)
    }
}

/// What some consecutive pages hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content<'a> {
    /// Zeros, in all of these pages.
    Zero(PageRange),
    /// These bytes, from this page on.
    Data(PageRange, &'a [u8]),
}

/// Walks over what differs from the base; see [`Memory::delta`]. Not an [`Iterator`], because
/// what it gives lies in its own buffer.
pub struct Delta {
    reader: PageReader<'static>,
    next: u64,
    buffer: Vec<u8>,
}

impl Delta {
    /// The next run: data in runs of at most 1 MiB, zeros of any length. `None` at the end.
    pub fn next_run(&mut self) -> Result<Option<Content<'_>>> {
        let map = Arc::clone(&self.reader.memory.map);
        while let Some(extent) = map.lookup(self.next) {
            match extent.source {
                Source::Base => self.next = extent.range.end(),
                Source::Zero => {
                    self.next = extent.range.end();
                    return Ok(Some(Content::Zero(extent.range)));
                }
                Source::Data { .. } => {
                    // Data that lies in several places is still one run for the reader.
                    let wanted = PageRange {
                        first: self.next,
                        count: BATCH_PAGES.min(map.pages() - self.next),
                    };
                    let end = map
                        .within(wanted)
                        .take_while(|part| matches!(part.source, Source::Data { .. }))
                        .last()
                        .map_or(extent.range.end(), |part| part.range.end());
                    let range = PageRange {
                        first: self.next,
                        count: end - self.next,
                    };
                    self.buffer.resize(range.count as usize * PAGE, 0);
                    self.reader.read(range.first, &mut self.buffer)?;
                    self.next = end;
                    return Ok(Some(Content::Data(range, &self.buffer)));
                }
            }
        }
        Ok(None)
    }
}
