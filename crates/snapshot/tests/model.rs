//! G13, G14, G17: whatever is done, memory is what a plain copy of it would be.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;

use common::*;
use proptest::prelude::*;
use wrenn_snapshot::*;

#[derive(Debug, Clone)]
enum Act {
    /// Machine `0` writes pages with seeds; zero stands for clearing, one for "what the
    /// template has there", two for writing the same again.
    Write(usize, Vec<(u64, u64)>),
    /// Machine `0` is saved, compressed or not.
    Save(usize, bool),
    /// A new machine from saved snapshot `0`.
    Fork(usize),
    /// Snapshot `0` is merged down to `1` generations; its users use the new one.
    Merge(usize, usize, bool),
    /// Snapshot `0` is deleted.
    Delete(usize),
    Collect,
    /// A new process opens the store: nothing is known to be verified.
    Reopen,
}

fn act() -> impl Strategy<Value = Act> {
    let writes = proptest::collection::vec((0..PAGES, 0u64..40), 1..40);
    let dense = (0..PAGES - 40, 0u64..40).prop_map(|(first, seed)| {
        (first..first + 40)
            .map(|page| (page, seed + page))
            .collect()
    });
    prop_oneof![
        3 => (any::<usize>(), writes).prop_map(|(machine, writes)| Act::Write(machine, writes)),
        2 => (any::<usize>(), dense).prop_map(|(machine, writes)| Act::Write(machine, writes)),
        4 => (any::<usize>(), any::<bool>()).prop_map(|(machine, zstd)| Act::Save(machine, zstd)),
        2 => any::<usize>().prop_map(Act::Fork),
        2 => (any::<usize>(), 1usize..4, any::<bool>())
            .prop_map(|(snapshot, most, zstd)| Act::Merge(snapshot, most, zstd)),
        2 => any::<usize>().prop_map(Act::Delete),
        1 => Just(Act::Collect),
        1 => Just(Act::Reopen),
    ]
}

struct Machine {
    memory: Vec<u8>,
    dirty: BTreeMap<u64, ()>,
    parent: Option<SnapshotId>,
}

fn compression(zstd: bool) -> Compression {
    match zstd {
        true => Compression::Zstd(1),
        false => Compression::None,
    }
}

fn run(acts: Vec<Act>, with_base: bool) -> Result<()> {
    let (folder, mut store) = store();
    let template = match with_base {
        true => base_content(),
        false => vec![0; PAGES as usize * PAGE],
    };
    let base_bytes = BaseBytes {
        id: BASE,
        bytes: &template,
    };
    let base = with_base.then_some(&base_bytes as &dyn Base);
    let mut machines = vec![Machine {
        memory: template.clone(),
        dirty: BTreeMap::new(),
        parent: None,
    }];
    let mut saved: Vec<(SnapshotId, Vec<u8>)> = Vec::new();
    let mut clock = 0;
    for act in acts {
        match act {
            Act::Write(machine, writes) => {
                let count = machines.len();
                let machine = &mut machines[machine % count];
                for (number, seed) in writes {
                    let at = number as usize * PAGE..(number as usize + 1) * PAGE;
                    let now: Vec<u8> = match seed {
                        0 => vec![0; PAGE],
                        1 => template[at.clone()].to_vec(),
                        2 => machine.memory[at.clone()].to_vec(),
                        seed if seed % 2 == 0 => page(seed).to_vec(),
                        seed => soft_page(seed).to_vec(),
                    };
                    machine.memory[at].copy_from_slice(&now);
                    machine.dirty.insert(number, ());
                }
            }
            Act::Save(machine, zstd) => {
                clock += 1;
                let count = machines.len();
                let machine = &mut machines[machine % count];
                let parent = match machine.parent {
                    Some(id) => Some(store.pinned_snapshot(id, "machine")?),
                    None => None,
                };
                let writes = machine.dirty.keys().map(|number| {
                    let at = *number as usize * PAGE;
                    let bytes = machine.memory[at..at + PAGE].try_into().unwrap();
                    (*number, Some(bytes))
                });
                let (made, counts) = save(
                    &store,
                    parent.as_ref(),
                    base,
                    &writes.collect(),
                    None,
                    clock,
                    compression(zstd),
                )?;
                assert_eq!(
                    counts.unchanged + counts.zero + counts.data,
                    machine.dirty.len() as u64
                );
                saved.push((made.id(), machine.memory.clone()));
                machine.dirty.clear();
                store.pin(made.id(), "machine")?;
                machine.parent = Some(made.id());
            }
            Act::Fork(from) if !saved.is_empty() => {
                let (id, memory) = saved[from % saved.len()].clone();
                store.pin(id, "machine")?;
                machines.push(Machine {
                    memory,
                    dirty: BTreeMap::new(),
                    parent: Some(id),
                });
            }
            Act::Merge(which, max_generations, zstd) if !saved.is_empty() => {
                let which = which % saved.len();
                let policy = MergePolicy {
                    max_generations,
                    min_live_percent: 50,
                    max_layers: 8,
                    compression: compression(zstd),
                };
                let (id, memory) = saved[which].clone();
                if let Some(merged) = store.merge(id, policy, None, &mut |_| true)? {
                    let map = merged.memory().unwrap().map();
                    assert!(map.generations().len() <= max_generations.max(1));
                    let old = store.snapshot(id)?;
                    let diff = old.memory().unwrap().diff(merged.memory().unwrap(), base)?;
                    assert_eq!(diff, []);
                    assert_eq!(old.device_state(), merged.device_state());
                    saved[which] = (merged.id(), memory);
                    store.delete(id, Deletion::Defer)?;
                }
            }
            Act::Delete(which) if !saved.is_empty() => {
                let (id, _) = saved.swap_remove(which % saved.len());
                store.delete(id, Deletion::Defer)?;
            }
            Act::Fork(_) | Act::Merge(..) | Act::Delete(_) => {}
            Act::Collect => {
                store.collect()?;
            }
            Act::Reopen => store = Store::open(&folder.path().join("store"))?,
        }
    }
    store.collect()?;
    let report = store.fsck()?;
    assert!(report.damage.is_empty(), "{:?}", report.damage);
    assert!(report.unused.is_empty(), "{:?}", report.unused);
    let mut listed = store.list()?;
    listed.sort();
    let mut expected: Vec<_> = saved.iter().map(|(id, _)| *id).collect();
    expected.sort();
    assert_eq!(listed, expected);
    for (id, memory) in &saved {
        let snapshot = store.snapshot(*id)?;
        assert!(content(&snapshot, base)? == *memory, "content of {id}");
        assert!(restored(&snapshot, &template)? == *memory, "delta of {id}");
    }
    for (index, (_, memory)) in saved.iter().enumerate() {
        let other = &saved[(index + 1) % saved.len()];
        check_diff(&store, saved[index].0, other.0, base, memory, &other.1)?;
    }
    Ok(())
}

/// What a restore gives: the delta written over the template.
fn restored(snapshot: &Snapshot, template: &[u8]) -> Result<Vec<u8>> {
    let mut memory = template.to_vec();
    let mut delta = snapshot.memory().unwrap().delta();
    let mut next = 0;
    while let Some(run) = delta.next_run()? {
        let (range, bytes) = match run {
            Content::Zero(range) => (range, None),
            Content::Data(range, bytes) => (range, Some(bytes)),
        };
        assert!(range.first >= next && range.count > 0);
        next = range.end();
        let at = range.first as usize * PAGE..range.end() as usize * PAGE;
        match bytes {
            Some(bytes) => memory[at].copy_from_slice(bytes),
            None => memory[at].fill(0),
        }
    }
    Ok(memory)
}

fn check_diff(
    store: &Store,
    left: SnapshotId,
    right: SnapshotId,
    base: Option<&dyn Base>,
    before: &[u8],
    after: &[u8],
) -> Result<()> {
    let (left, right) = (store.snapshot(left)?, store.snapshot(right)?);
    let found = left.memory().unwrap().diff(right.memory().unwrap(), base)?;
    let found: Vec<u64> = found
        .iter()
        .flat_map(|range| range.first..range.end())
        .collect();
    let pages = before.chunks(PAGE).zip(after.chunks(PAGE));
    let expected: Vec<u64> = (0..)
        .zip(pages)
        .filter(|(_, (a, b))| a != b)
        .map(|(number, _)| number)
        .collect();
    assert_eq!(found, expected);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 40, max_shrink_iters: 200, ..ProptestConfig::default()
    })]
    #[test]
    fn g14_any_history_equals_a_plain_model(
        acts in proptest::collection::vec(act(), 1..24), with_base in any::<bool>()
    ) {
        run(acts, with_base).unwrap();
    }
}

#[test]
fn g13_a_cleared_page_comes_back_as_zeros() {
    let (_folder, store) = store();
    let template = base_content();
    let base = BaseBytes {
        id: BASE,
        bytes: &template,
    };
    let (none, write) = (Compression::None, |content| {
        Writes::from([(1, content), (2, content)])
    });
    let (first, _) = save(
        &store,
        None,
        Some(&base),
        &write(Some(page(7))),
        None,
        1,
        none,
    )
    .unwrap();
    // Page 2 is cleared over data, page 4 over the base, page 3 was zero before.
    let cleared = Writes::from([(2, None), (3, None), (4, None)]);
    let (second, counts) =
        save(&store, Some(&first), Some(&base), &cleared, None, 2, none).unwrap();
    assert_eq!((counts.zero, counts.unchanged, counts.data), (2, 1, 0));
    let memory = second.memory().unwrap();
    let mut reader = memory.reader(None).unwrap();
    for number in [2, 4] {
        assert_eq!(memory.map().lookup(number).unwrap().source, Source::Zero);
        assert_eq!(reader.read_page(number).unwrap(), [0; PAGE]);
    }
    assert_eq!(reader.read_page(1).unwrap(), page(7));
    // A page that turns back into what the base has is data: nothing is guessed from bytes.
    let back = Writes::from([(4, Some(template[4 * PAGE..5 * PAGE].try_into().unwrap()))]);
    let (third, counts) = save(&store, Some(&second), Some(&base), &back, None, 3, none).unwrap();
    assert_eq!(counts.data, 1);
    let mut reader = third.memory().unwrap().reader(None).unwrap();
    assert_eq!(reader.read_page(4).unwrap(), template[4 * PAGE..5 * PAGE]);
    assert!(
        second
            .memory()
            .unwrap()
            .delta()
            .next_run()
            .unwrap()
            .is_some()
    );
}

#[test]
fn g17_a_save_costs_what_was_written_and_lookups_do_not_grow_with_the_chain() {
    let (_folder, store) = store();
    let template = base_content();
    let base = BaseBytes {
        id: BASE,
        bytes: &template,
    };
    let written = |snapshot: &Snapshot| -> u64 {
        let machine = snapshot.manifest().machine.clone().unwrap();
        machine
            .memory
            .generations
            .last()
            .map_or(0, |last| last.bytes)
            + machine.memory.index.bytes
    };
    let everything: Writes = (0..PAGES)
        .map(|number| (number, Some(page(number))))
        .collect();
    let none = Compression::None;
    let (full, _) = save(&store, None, Some(&base), &everything, None, 1, none).unwrap();
    assert!(written(&full) > PAGES * PAGE as u64);
    let mut parent = full;
    for generation in 0..12u64 {
        let before = files(store.root());
        let changed = Writes::from([
            (generation * 4, Some(page(500 + generation))),
            (200, Some(page(600 + generation))),
        ]);
        let (child, _) = save(
            &store,
            Some(&parent),
            Some(&base),
            &changed,
            None,
            2 + generation,
            none,
        )
        .unwrap();
        let after = files(store.root());
        let new: usize = after
            .iter()
            .filter(|(name, _)| !before.contains_key(*name))
            .map(|(_, content)| content.len())
            .sum();
        // Two pages, a header, a table entry, and some KiB of manifest, index and state.
        assert!(new < 2 * PAGE + 4096 + 40 + 4096 + 16 * 1024, "{new} bytes");
        // A save that changed nothing adds no generation.
        let (idle, counts) = save(
            &store,
            Some(&child),
            Some(&base),
            &changed,
            None,
            90 + generation,
            none,
        )
        .unwrap();
        assert_eq!((counts.data, counts.unchanged), (0, 2));
        let generations =
            |snapshot: &Snapshot| snapshot.memory().unwrap().map().generations().len();
        assert_eq!(generations(&idle), generations(&child));
        // The generation whose only live page was overwritten leaves the map.
        assert!(generations(&child) as u64 <= generation + 2);
        parent = child;
    }
    assert!(parent.memory().unwrap().map().extents().len() < 40);
}

#[test]
fn runs_must_ascend_and_lie_inside() {
    let (_folder, store) = store();
    let untouched = Memory::untouched(PAGES, None);
    let draft = store.draft(&[]).unwrap();
    let mut memory = draft.memory(&untouched, None, Compression::None).unwrap();
    memory.write(5, &page(1)).unwrap();
    assert!(matches!(
        memory.write(5, &page(1)),
        Err(SnapshotError::Order { first: 5, next: 6 })
    ));
    assert!(
        memory
            .write(PAGES - 1, &[page(1), page(2)].concat())
            .is_err()
    );
    assert!(memory.write(7, &page(1)[1..]).is_err());
    let outside = PageRange {
        first: 9,
        count: u64::MAX,
    };
    assert!(memory.clear(outside).is_err());
}

#[test]
fn another_base_than_the_snapshots_is_refused() {
    let (_folder, store) = store();
    let template = base_content();
    let base = BaseBytes {
        id: BASE,
        bytes: &template,
    };
    let writes = Writes::from([(1, Some(page(1)))]);
    let (made, _) = save(
        &store,
        None,
        Some(&base),
        &writes,
        None,
        1,
        Compression::None,
    )
    .unwrap();
    let memory = made.memory().unwrap();
    let other = BaseBytes {
        id: BaseId([1; 32]),
        bytes: &template,
    };
    assert!(matches!(
        memory.reader(Some(&other)),
        Err(SnapshotError::OtherBase { .. })
    ));
    let short = BaseBytes {
        id: BASE,
        bytes: &template[PAGE..],
    };
    assert!(matches!(
        memory.reader(Some(&short)),
        Err(SnapshotError::OtherBase { .. })
    ));
    let error = memory
        .reader(None)
        .unwrap()
        .read_page(2)
        .map(|_| ())
        .unwrap_err();
    assert!(
        matches!(error, SnapshotError::NoBase { page: 2, .. }),
        "{error}"
    );
}
