//! Where each page of a memory is found: the flattened map of a snapshot.
//!
//! A machine's memory is a stack of generations, each holding what was written since the one
//! below. The stack is looked through once, when a generation is written: the map of a
//! snapshot names for every page directly the one place its content is in, so that a lookup
//! is a binary search however many generations there are.

use std::collections::HashMap;

use crate::page::{MAX_PAGES, PageRange};
use crate::{BaseId, Fault, ObjectId};

/// Where the content of a page is. Said by the map, never guessed from bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Source {
    /// Inherited: what the base has there.
    Base,
    /// All zeros, whatever the base or an older generation has there.
    Zero,
    /// Data of a generation.
    Data {
        /// Which one, as an index into [`PageMap::generations`].
        generation: u32,
        /// The page's position among the pages of that generation.
        page: u32,
    },
}

impl Source {
    /// The source of the page that lies `pages` further in the same extent.
    fn advanced(self, pages: u64) -> Source {
        match self {
            Source::Base | Source::Zero => self,
            Source::Data { generation, page } => Source::Data {
                generation,
                // An extent of a valid map ends inside its generation, whose size is a u32.
                page: page.saturating_add(u32::try_from(pages).unwrap_or(u32::MAX)),
            },
        }
    }
}

/// Consecutive pages from one source; data pages are consecutive in their generation too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// The pages.
    pub range: PageRange,
    /// Where the first of them is.
    pub source: Source,
}

impl Extent {
    /// The part of the extent that lies in `range`, which must overlap it.
    fn cut(self, range: PageRange) -> Extent {
        let first = self.range.first.max(range.first);
        let end = self.range.end().min(range.end());
        Extent {
            range: PageRange {
                first,
                count: end.saturating_sub(first),
            },
            source: self.source.advanced(first - self.range.first),
        }
    }

    /// Whether `next` only continues this one.
    fn is_continued_by(&self, next: &Extent) -> bool {
        self.range.end() == next.range.first
            && self.source.advanced(self.range.count) == next.source
    }
}

/// A generation that a map refers to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GenerationRef {
    /// Its name.
    pub id: ObjectId,
    /// Number of pages it holds.
    pub pages: u32,
}

/// Extents in ascending order without gaps, joined where one continues another: a memory's
/// content has exactly one list for a given layout of its generations.
#[derive(Debug, Default)]
pub(crate) struct Extents(pub(crate) Vec<Extent>);

impl Extents {
    pub(crate) fn push(&mut self, extent: Extent) {
        if extent.range.count == 0 {
            return;
        }
        match self.0.last_mut() {
            Some(last) if last.is_continued_by(&extent) => last.range.count += extent.range.count,
            Some(_) | None => self.0.push(extent),
        }
    }
}

/// The map of one memory: for each page, where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageMap {
    pages: u64,
    base: Option<BaseId>,
    generations: Vec<GenerationRef>,
    extents: Vec<Extent>,
}

impl PageMap {
    /// The map of a memory that nothing was written to: the base's content if there is a
    /// base, else zeros. `pages` must be from 1 to [`MAX_PAGES`] (as [`crate::pages_of`]
    /// gives).
    pub fn untouched(pages: u64, base: Option<BaseId>) -> PageMap {
        let range = PageRange {
            first: 0,
            count: pages,
        };
        let source = match base {
            Some(_) => Source::Base,
            None => Source::Zero,
        };
        PageMap {
            pages,
            base,
            generations: Vec::new(),
            extents: vec![Extent { range, source }],
        }
    }

    /// A map from untrusted parts: every page must be covered exactly once and lie inside
    /// its source. The fault's offset is the index of the extent or generation.
    pub(crate) fn checked(
        pages: u64,
        base: Option<BaseId>,
        generations: Vec<GenerationRef>,
        extents: Vec<Extent>,
    ) -> Result<PageMap, Fault> {
        if pages == 0 || pages > MAX_PAGES {
            return Err(Fault::at(0, format!("{pages} pages of memory")));
        }
        let mut ids = HashMap::with_capacity(generations.len());
        for (index, generation) in generations.iter().enumerate() {
            if generation.pages == 0 || ids.insert(generation.id, ()).is_some() {
                return Err(Fault::at(index as u64, "an empty or repeated generation"));
            }
        }
        let mut used = vec![false; generations.len()];
        let mut next = 0;
        let mut last: Option<&Extent> = None;
        for (index, extent) in extents.iter().enumerate() {
            let wrong = |problem: &str| Err(Fault::at(index as u64, problem));
            if extent.range.first != next {
                return wrong("pages that are not covered, or covered twice");
            }
            if extent.range.count == 0 || extent.range.end() > pages {
                return wrong("an empty extent, or one outside the memory");
            }
            match extent.source {
                Source::Base if base.is_none() => {
                    return wrong("pages inherited from a base that there is not");
                }
                Source::Base | Source::Zero => {}
                Source::Data { generation, page } => {
                    let known = generations.get(generation as usize);
                    let flag = used.get_mut(generation as usize);
                    let (Some(known), Some(flag)) = (known, flag) else {
                        return wrong("data of a generation that there is not");
                    };
                    if u64::from(page) + extent.range.count > u64::from(known.pages) {
                        return wrong("data behind the end of its generation");
                    }
                    *flag = true;
                }
            }
            if last.is_some_and(|last| last.is_continued_by(extent)) {
                return wrong("an extent that continues the one before");
            }
            next = extent.range.end();
            last = Some(extent);
        }
        if next != pages {
            return Err(Fault::at(
                extents.len() as u64,
                "pages at the end that are not covered",
            ));
        }
        if let Some(unused) = used.iter().position(|used| !used) {
            return Err(Fault::at(unused as u64, "a generation that no page is in"));
        }
        Ok(PageMap {
            pages,
            base,
            generations,
            extents,
        })
    }

    /// Number of pages of the memory.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// What inherited pages are inherited from.
    pub fn base(&self) -> Option<BaseId> {
        self.base
    }

    /// The generations that hold pages of this memory, older ones first.
    pub fn generations(&self) -> &[GenerationRef] {
        &self.generations
    }

    /// All extents, ascending, covering every page exactly once.
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// Where `page` is, and how many pages follow it in the same place: the rest of its
    /// extent. `None` outside the memory. O(log n) in the number of extents.
    pub fn lookup(&self, page: u64) -> Option<Extent> {
        let index = self.index_of(page);
        let extent = self.extents.get(index).filter(|_| page < self.pages)?;
        Some(extent.cut(PageRange {
            first: page,
            count: extent.range.end() - page,
        }))
    }

    /// Index of the extent with `page` (the last one for pages outside).
    fn index_of(&self, page: u64) -> usize {
        self.extents
            .partition_point(|extent| extent.range.first <= page)
            .saturating_sub(1)
    }

    /// The extents of the pages in `range`, cut to it.
    pub fn within(&self, range: PageRange) -> impl Iterator<Item = Extent> + '_ {
        let from = self.index_of(range.first);
        self.extents[from..]
            .iter()
            .take_while(move |extent| extent.range.first < range.end())
            .map(move |extent| extent.cut(range))
            .filter(|extent| extent.range.count > 0)
    }

    /// Pages that are data, and pages that are zero by the map's word.
    pub fn counts(&self) -> PageCounts {
        let mut counts = PageCounts::default();
        for extent in &self.extents {
            match extent.source {
                Source::Base => counts.inherited += extent.range.count,
                Source::Zero => counts.zero += extent.range.count,
                Source::Data { .. } => counts.data += extent.range.count,
            }
        }
        counts
    }

    /// Pages of this memory in each of [`PageMap::generations`].
    pub fn live_pages(&self) -> Vec<u64> {
        let mut live = vec![0; self.generations.len()];
        for extent in &self.extents {
            if let Source::Data { generation, .. } = extent.source
                && let Some(count) = live.get_mut(generation as usize)
            {
                *count += extent.range.count;
            }
        }
        live
    }

    /// This map with `changes` (ascending, inside the memory) laid over it. In them,
    /// generation `self.generations().len()` is `added`. Generations that no page is in any
    /// more are left out. Cost: O(extents + changes), no page is read.
    pub(crate) fn overlaid(&self, changes: &[Extent], added: Option<GenerationRef>) -> PageMap {
        let mut flat = Extents::default();
        let mut at = 0;
        for change in changes {
            let kept = PageRange {
                first: at,
                count: change.range.first.saturating_sub(at),
            };
            self.within(kept).for_each(|extent| flat.push(extent));
            flat.push(*change);
            at = change.range.end();
        }
        let kept = PageRange {
            first: at,
            count: self.pages.saturating_sub(at),
        };
        self.within(kept).for_each(|extent| flat.push(extent));

        // Number the generations that are still used anew, each once.
        let all: Vec<GenerationRef> = self.generations.iter().copied().chain(added).collect();
        let mut used = vec![false; all.len()];
        for extent in &flat.0 {
            if let Source::Data { generation, .. } = extent.source
                && let Some(flag) = used.get_mut(generation as usize)
            {
                *flag = true;
            }
        }
        let mut generations: Vec<GenerationRef> = Vec::new();
        let mut places = HashMap::new();
        let numbers: Vec<u32> = all
            .iter()
            .zip(&used)
            .map(|(generation, used)| {
                if !used {
                    return 0;
                }
                *places.entry(generation.id).or_insert_with(|| {
                    generations.push(*generation);
                    // Bounded by the number of extents, which a u32 holds.
                    (generations.len() - 1) as u32
                })
            })
            .collect();
        let mut extents = Extents::default();
        for mut extent in flat.0 {
            if let Source::Data { generation, .. } = &mut extent.source {
                *generation = numbers[*generation as usize];
            }
            extents.push(extent);
        }
        PageMap {
            pages: self.pages,
            base: self.base,
            generations,
            extents: extents.0,
        }
    }
}

/// How many pages of a memory are what.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PageCounts {
    /// Pages the base has.
    pub inherited: u64,
    /// Pages that are zero by the map's word.
    pub zero: u64,
    /// Pages in generations.
    pub data: u64,
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    fn id(number: u8) -> ObjectId {
        ObjectId([number; 32])
    }

    fn extent(first: u64, count: u64, source: Source) -> Extent {
        Extent {
            range: PageRange { first, count },
            source,
        }
    }

    /// A map made by laying random changes over an untouched memory, and what each page is.
    pub(crate) fn arbitrary() -> impl Strategy<Value = (PageMap, Vec<(Source, Option<ObjectId>)>)> {
        let layer = proptest::collection::vec((0u64..4, 1u64..6, 0u8..3), 0..12);
        (proptest::collection::vec(layer, 0..6), any::<bool>()).prop_map(|(layers, with_base)| {
            let base = with_base.then_some(BaseId([9; 32]));
            let mut map = PageMap::untouched(64, base);
            let start = if with_base {
                Source::Base
            } else {
                Source::Zero
            };
            let mut model = vec![(start, None); 64];
            for (number, layer) in layers.into_iter().enumerate() {
                let added = GenerationRef {
                    id: id(number as u8),
                    pages: 200,
                };
                let (mut at, mut position) = (0, 0);
                let mut changes = Extents::default();
                for (gap, count, kind) in layer {
                    at += gap;
                    if at + count > 64 {
                        break;
                    }
                    let source = match kind {
                        0 => Source::Zero,
                        _ => Source::Data {
                            generation: map.generations().len() as u32,
                            page: position,
                        },
                    };
                    changes.push(extent(at, count, source));
                    for page in at..at + count {
                        model[page as usize] = match kind {
                            0 => (Source::Zero, None),
                            _ => (
                                Source::Data {
                                    generation: 0,
                                    page: position + (page - at) as u32,
                                },
                                Some(id(number as u8)),
                            ),
                        };
                    }
                    position += count as u32;
                    at += count;
                }
                map = map.overlaid(&changes.0, Some(added));
            }
            (map, model)
        })
    }

    proptest! {
        #[test]
        fn lookups_find_what_was_laid_over_last((map, model) in arbitrary()) {
            for (page, (source, object)) in model.iter().enumerate() {
                let found = map.lookup(page as u64).unwrap();
                match (found.source, source) {
                    (Source::Data { generation, page: at }, Source::Data { page: expected, .. }) => {
                        prop_assert_eq!(Some(map.generations()[generation as usize].id), *object);
                        prop_assert_eq!(at, *expected);
                    }
                    (found, expected) => prop_assert_eq!(found, *expected),
                }
                prop_assert_eq!(found.range.first, page as u64);
            }
            prop_assert_eq!(map.lookup(64), None);
            let again = PageMap::checked(
                map.pages(), map.base(), map.generations().to_vec(), map.extents().to_vec());
            prop_assert_eq!(again, Ok(map));
        }
    }

    #[test]
    fn maps_that_do_not_cover_every_page_once_are_refused() {
        let one = GenerationRef {
            id: id(1),
            pages: 4,
        };
        let data = |page| Source::Data {
            generation: 0,
            page,
        };
        let check = |base: bool, generations: &[GenerationRef], extents: &[Extent]| {
            PageMap::checked(
                8,
                base.then_some(BaseId([0; 32])),
                generations.to_vec(),
                extents.to_vec(),
            )
        };
        let zero = Source::Zero;
        assert!(check(false, &[], &[extent(0, 8, zero)]).is_ok());
        assert!(check(false, &[one], &[extent(0, 4, data(0)), extent(4, 4, zero)]).is_ok());
        let bad: &[(bool, &[GenerationRef], &[Extent])] = &[
            (false, &[], &[]),
            (false, &[], &[extent(0, 7, zero)]),
            (false, &[], &[extent(0, 9, zero)]),
            (false, &[], &[extent(1, 7, zero)]),
            (false, &[], &[extent(0, 8, Source::Base)]),
            (false, &[], &[extent(0, 4, zero), extent(4, 4, zero)]),
            (true, &[], &[extent(0, 5, zero), extent(4, 4, Source::Base)]),
            (true, &[], &[extent(0, 3, zero), extent(4, 4, Source::Base)]),
            (true, &[], &[extent(0, 0, zero), extent(0, 8, Source::Base)]),
            (false, &[one], &[extent(0, 8, zero)]),
            (false, &[one], &[extent(0, 4, data(1)), extent(4, 4, zero)]),
            (false, &[one], &[extent(0, 8, data(0))]),
            (
                false,
                &[one, one],
                &[extent(0, 4, data(0)), extent(4, 4, zero)],
            ),
            (
                false,
                &[],
                &[extent(0, u64::MAX, zero), extent(u64::MAX, 9, zero)],
            ),
        ];
        for (base, generations, extents) in bad {
            assert!(check(*base, generations, extents).is_err(), "{extents:?}");
        }
    }
}
