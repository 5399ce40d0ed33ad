//! Writing the memory of a snapshot: from page runs that may have changed, one generation and
//! the new map.

use crate::Result;
use crate::SnapshotError;
use crate::generation::{Compression, Finished, GenerationWriter, Sink};
use crate::map::{Extent, Extents, PageMap, Source};
use crate::memory::{BATCH_PAGES, Memory, PageReader};
use crate::page::{Base, PAGE, PageRange, is_zero};

/// What became of the pages that were written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WriteCounts {
    /// Dropped: the parent has the same content.
    pub unchanged: u64,
    /// Recorded as zero.
    pub zero: u64,
    /// Stored.
    pub data: u64,
}

/// Writes what changed since `parent`.
///
/// Give it, in ascending order, the runs that may have changed, with their bytes. Each page
/// is first compared with the parent's and dropped if equal; only then do its bytes decide
/// between zero and data.
pub(crate) struct MemoryWriter<'a, S> {
    parent: &'a Memory,
    reader: PageReader<'a>,
    generation: GenerationWriter,
    number: u32,
    sink: S,
    changes: Extents,
    counts: WriteCounts,
    next: u64,
    before: Vec<u8>,
}

impl<'a, S: Sink> MemoryWriter<'a, S> {
    pub(crate) fn new(
        parent: &'a Memory,
        base: Option<&'a dyn Base>,
        compression: Compression,
        sink: S,
    ) -> Result<Self> {
        Ok(MemoryWriter {
            parent,
            reader: parent.reader(base)?,
            generation: GenerationWriter::new(compression)?,
            // At most one per extent, whose number a u32 holds.
            number: parent.map().generations().len() as u32,
            sink,
            changes: Extents::default(),
            counts: WriteCounts::default(),
            next: 0,
            before: Vec::new(),
        })
    }

    /// The content of the pages from `first` on.
    pub(crate) fn write(&mut self, first: u64, bytes: &[u8]) -> Result<()> {
        let range = PageRange::of_bytes(first, bytes, self.parent.map().pages())?;
        self.advance(range)?;
        let batch = BATCH_PAGES as usize * PAGE;
        let firsts = (first..).step_by(BATCH_PAGES as usize);
        for (first, bytes) in firsts.zip(bytes.chunks(batch)) {
            self.write_batch(first, bytes)?;
        }
        Ok(())
    }

    fn advance(&mut self, range: PageRange) -> Result<()> {
        if range.first < self.next {
            return Err(SnapshotError::Order {
                first: range.first,
                next: self.next,
            });
        }
        self.next = range.end();
        Ok(())
    }

    fn write_batch(&mut self, first: u64, bytes: &[u8]) -> Result<()> {
        let mut before = std::mem::take(&mut self.before);
        before.resize(bytes.len(), 0);
        self.reader.read(first, &mut before)?;
        // Stored pages that follow each other go to the generation in one piece.
        let mut data_from = None;
        for (index, (now, then)) in bytes.chunks(PAGE).zip(before.chunks(PAGE)).enumerate() {
            let page = first + index as u64;
            let change = if now == then {
                self.counts.unchanged += 1;
                None
            } else if is_zero(now) {
                self.counts.zero += 1;
                Some(Source::Zero)
            } else {
                self.counts.data += 1;
                let from = *data_from.get_or_insert(index);
                let position = self.generation.pages() + (index - from) as u64;
                Some(Source::Data {
                    generation: self.number,
                    // Not more pages than the memory has.
                    page: position as u32,
                })
            };
            if !matches!(change, Some(Source::Data { .. }))
                && let Some(from) = data_from.take()
            {
                let stored = &bytes[from * PAGE..index * PAGE];
                self.generation.push(stored, &mut self.sink)?;
            }
            if let Some(source) = change {
                self.changes.push(Extent {
                    range: PageRange {
                        first: page,
                        count: 1,
                    },
                    source,
                });
            }
        }
        if let Some(from) = data_from {
            self.generation
                .push(&bytes[from * PAGE..], &mut self.sink)?;
        }
        self.before = before;
        Ok(())
    }

    /// The pages of `range` are all zero; what the source of dirty pages already knows need
    /// not be read.
    pub(crate) fn clear(&mut self, range: PageRange) -> Result<()> {
        let range = range.inside(self.parent.map().pages())?;
        self.advance(range)?;
        for extent in self.parent.map().within(range) {
            if extent.source == Source::Zero {
                self.counts.unchanged += extent.range.count;
                continue;
            }
            self.counts.zero += extent.range.count;
            self.changes.push(Extent {
                range: extent.range,
                source: Source::Zero,
            });
        }
        Ok(())
    }

    /// Ends the generation (`None` if no page had to be stored) and gives the new map.
    pub(crate) fn finish(mut self) -> Result<(PageMap, Option<Finished>, WriteCounts, S)> {
        let finished = self.generation.finish(&mut self.sink)?;
        let added = finished.map(|finished| finished.generation);
        let map = self.parent.map().overlaid(&self.changes.0, added);
        Ok((map, finished, self.counts, self.sink))
    }
}
