//! Merging generations: the same memory in fewer files, without what newer ones have
//! overwritten.

use super::{Snapshot, Store};
use crate::generation::{Compression, GenerationWriter, Scratch};
use crate::map::{Extent, Extents, PageMap, Source};
use crate::memory::BATCH_PAGES;
use crate::page::{PAGE, PageRange};
use crate::{Memory, Result, SnapshotError, SnapshotId};

/// When generations are merged, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MergePolicy {
    /// More generations than this are merged down to it, the smallest first, so that large
    /// old ones are not written again and again.
    pub max_generations: usize,
    /// A generation of which less than this part is still used, in percent, is always merged.
    pub min_live_percent: u64,
    /// How the new generation is stored.
    pub compression: Compression,
}

impl Default for MergePolicy {
    fn default() -> Self {
        MergePolicy {
            max_generations: 8,
            min_live_percent: 50,
            compression: Compression::None,
        }
    }
}

impl MergePolicy {
    /// Which of the map's generations to merge into one; none if it is good as it is.
    fn choose(&self, map: &PageMap) -> Vec<bool> {
        let live = map.live_pages();
        let mut chosen: Vec<bool> = live
            .iter()
            .zip(map.generations())
            .map(|(live, all)| live * 100 < u64::from(all.pages) * self.min_live_percent)
            .collect();
        let keep = self.max_generations.max(1);
        if live.len() > keep {
            let mut by_size: Vec<usize> = (0..live.len()).collect();
            by_size.sort_by_key(|index| live[*index]);
            // One more than there are too many: the merged one counts too.
            for index in by_size.into_iter().take(live.len() - keep + 1) {
                chosen[index] = true;
            }
        }
        chosen
    }
}

impl Store {
    /// Merges generations of a snapshot as `policy` says: a new snapshot with the same
    /// content, whose `merged_from` is `id`, for the caller to use instead; the old one stays
    /// until it is deleted. `None` if there is nothing to merge. `go_on` is asked after each
    /// MiB, with the bytes written so far: to be throttled it may sleep, if it says no the
    /// merge is given up. Blocking.
    pub fn merge(
        &self,
        id: SnapshotId,
        policy: MergePolicy,
        go_on: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Option<Snapshot>> {
        let source = self.snapshot(id)?;
        let Some(memory) = source.memory() else {
            return Ok(None);
        };
        let chosen = policy.choose(memory.map());
        if !chosen.contains(&true) {
            return Ok(None);
        }
        let mut draft = self.merge_draft(&source)?;
        let mut sink = draft.generation_sink();
        let mut writer = GenerationWriter::new(policy.compression)?;
        let mut changes = Extents::default();
        for_live_batches(memory, &chosen, |range, bytes| {
            changes.push(Extent {
                range,
                source: Source::Data {
                    // As in a write: the new one is behind all there are, and no generation
                    // has more pages than the memory.
                    generation: chosen.len() as u32,
                    page: writer.pages() as u32,
                },
            });
            writer.push(bytes, &mut sink)?;
            match go_on(writer.pages() * PAGE as u64) {
                true => Ok(()),
                false => Err(SnapshotError::Cancelled),
            }
        })?;
        let finished = writer.finish(&mut sink)?;
        let added = finished.map(|finished| finished.generation);
        let map = memory.map().overlaid(&changes.0, added);
        draft.set_memory(&map, finished, sink)?;
        draft.device_state(source.device_state())?;
        for (name, content) in source.parts() {
            draft.part(name.clone(), content)?;
        }
        for layer in &source.manifest().disk {
            draft.inherited_layer(layer);
        }
        draft
            .commit(source.manifest().description.clone())
            .map(Some)
    }
}

/// Reads, in the order of the guest's pages, what is still used of the `chosen` generations.
fn for_live_batches(
    memory: &Memory,
    chosen: &[bool],
    mut visit: impl FnMut(PageRange, &[u8]) -> Result<()>,
) -> Result<()> {
    let mut scratch = Scratch::default();
    let mut buffer = vec![0; BATCH_PAGES as usize * PAGE];
    for extent in memory.map().extents() {
        let Source::Data { generation, page } = extent.source else {
            continue;
        };
        let generation = generation as usize;
        let (Some(true), Some(open)) =
            (chosen.get(generation), memory.generations().get(generation))
        else {
            continue;
        };
        let mut done = 0;
        while done < extent.range.count {
            let count = (extent.range.count - done).min(BATCH_PAGES);
            let bytes = &mut buffer[..count as usize * PAGE];
            open.read(u64::from(page) + done, bytes, &mut scratch)?;
            let range = PageRange {
                first: extent.range.first + done,
                count,
            };
            visit(range, bytes)?;
            done += count;
        }
    }
    Ok(())
}
