//! Merging generations and layers: the same memory and disk in fewer files, without what newer
//! ones have overwritten.

use std::fs::File;
use std::io;
use std::path::Path;

use super::{Draft, Snapshot, Store};
use crate::generation::{Compression, GenerationWriter, Scratch};
use crate::map::{Extent, Extents, PageMap, Source};
use crate::memory::BATCH_PAGES;
use crate::page::{PAGE, PageRange};
use crate::{DiskLayer, Memory, Result, SnapshotError, SnapshotId};

/// When generations are merged, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MergePolicy {
    /// More generations than this are merged down to it, the smallest first, so that large
    /// old ones are not written again and again.
    pub max_generations: usize,
    /// A generation of which less than this part is still used, in percent, is always merged.
    pub min_live_percent: u64,
    /// More layers of a disk than this are merged down to it or less: the highest, and what is
    /// below them as long as it is no larger than what is merged anyway, so that a large old one
    /// is not written again and again.
    pub max_layers: usize,
    /// How the new generation is stored.
    pub compression: Compression,
}

impl Default for MergePolicy {
    fn default() -> Self {
        MergePolicy {
            max_generations: 8,
            min_live_percent: 50,
            max_layers: 8,
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

    /// From which layer on to merge; `None` if they are good as they are.
    fn choose_layers(&self, layers: &[DiskLayer]) -> Option<usize> {
        let keep = self.max_layers.max(1);
        if layers.len() <= keep {
            return None;
        }
        // One more than there are too many: the merged one counts too.
        let mut from = keep - 1;
        let mut bytes: u64 = layers[from..].iter().map(|layer| layer.bytes).sum();
        while let Some(below) = from.checked_sub(1).filter(|at| layers[*at].bytes <= bytes) {
            bytes += layers[below].bytes;
            from = below;
        }
        // Files of different formats are not merged, and one alone needs not be.
        let same = |at: &usize| {
            layers[*at..]
                .iter()
                .all(|it| it.format == layers[*at].format)
        };
        (from..layers.len() - 1).find(same)
    }
}

/// Writes what several layers of a disk, the lowest first, say together into one new file. It is
/// asked of a function, since only that knows the layers' format. The last argument is `go_on` of
/// [`Store::merge`]; what it says no to ends with an error of the kind `Interrupted`.
pub type LayerMerger<'a> =
    dyn Fn(&[&File], &Path, &mut dyn FnMut(u64) -> bool) -> io::Result<()> + 'a;

impl Store {
    /// Merges generations of a snapshot, and with `layers` the layers of its disk, as `policy`
    /// says: a new snapshot with the same content, whose `merged_from` is `id`, for the caller to
    /// use instead; the old one stays until it is deleted. `None` if there is nothing to merge.
    /// `go_on` is asked after each MiB, or less, of either, with the bytes of it written so far:
    /// to be throttled it may sleep, if it says no the merge is given up. Blocking.
    pub fn merge(
        &self,
        id: SnapshotId,
        policy: MergePolicy,
        layers: Option<&LayerMerger<'_>>,
        go_on: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Option<Snapshot>> {
        let source = self.snapshot(id)?;
        let memory = source.memory().map(|memory| policy.choose(memory.map()));
        let memory = memory.filter(|chosen| chosen.contains(&true));
        let disk = &source.manifest().disk;
        let layers = layers.zip(policy.choose_layers(disk));
        if memory.is_none() && layers.is_none() {
            return Ok(None);
        }
        let mut draft = self.merge_draft(&source)?;
        if let Some(old) = source.memory() {
            merge_memory(&mut draft, old, memory.as_deref(), policy, go_on)?;
            draft.device_state(source.device_state())?;
            for (name, content) in source.parts() {
                draft.part(name.clone(), content)?;
            }
        }
        let kept = layers.map_or(disk.len(), |(_, from)| from);
        for layer in &disk[..kept] {
            draft.inherited_layer(layer);
        }
        if let Some((merge, from)) = layers {
            let files = source.disk_layers_from(from)?;
            draft.merged_layer(&files, merge, go_on)?;
        }
        draft
            .commit(source.manifest().description.clone())
            .map(Some)
    }

    /// Whether [`Store::merge`] would find something to do.
    pub fn wants_merge(&self, snapshot: &Snapshot, policy: MergePolicy) -> bool {
        let memory = snapshot.memory().map(|memory| policy.choose(memory.map()));
        let layers = policy.choose_layers(&snapshot.manifest().disk);
        memory.is_some_and(|chosen| chosen.contains(&true)) || layers.is_some()
    }
}

/// The memory of `old` with the `chosen` generations as one; with none, as it is.
fn merge_memory(
    draft: &mut Draft,
    old: &Memory,
    chosen: Option<&[bool]>,
    policy: MergePolicy,
    go_on: &mut dyn FnMut(u64) -> bool,
) -> Result<()> {
    let mut sink = draft.generation_sink();
    let Some(chosen) = chosen else {
        return draft.set_memory(old.map(), None, sink);
    };
    let mut writer = GenerationWriter::new(policy.compression)?;
    let mut changes = Extents::default();
    for_live_batches(old, chosen, |range, bytes| {
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
    let map = old.map().overlaid(&changes.0, added);
    draft.set_memory(&map, finished, sink)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ObjectId;
    use crate::manifest::LayerDigest;

    fn chosen(max_layers: usize, sizes: &[u64]) -> Option<usize> {
        let layers: Vec<_> = sizes
            .iter()
            .map(|bytes| DiskLayer {
                id: ObjectId([0; 32]),
                bytes: *bytes,
                format: "qcow2".into(),
                digest: LayerDigest::Sparse,
            })
            .collect();
        let policy = MergePolicy {
            max_layers,
            ..MergePolicy::default()
        };
        policy.choose_layers(&layers)
    }

    #[test]
    fn large_old_layers_are_left_alone() {
        assert_eq!(chosen(3, &[1, 1, 1]), None);
        assert_eq!(chosen(3, &[9, 5, 1, 1]), Some(2));
        assert_eq!(chosen(3, &[9, 2, 1, 1]), Some(1));
        assert_eq!(chosen(3, &[4, 2, 1, 1]), Some(0));
        assert_eq!(chosen(1, &[1, 1]), Some(0));
    }

    #[test]
    fn a_byte_is_merged_a_few_times_however_long_the_chain_gets() {
        let (mut sizes, mut written) = (Vec::new(), 0);
        for _ in 0..1000 {
            sizes.push(1);
            if let Some(from) = chosen(8, &sizes) {
                let merged: u64 = sizes.drain(from..).sum();
                written += merged;
                sizes.push(merged);
            }
            assert!(sizes.len() <= 8);
        }
        assert!(written < 12_000, "{written}");
    }
}
