//! G18: nothing that something still needs is deleted; G19: nothing is changed in place.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};

use common::*;
use wrenn_snapshot::*;

const NONE: Compression = Compression::None;

fn one(number: u64, seed: u64) -> Writes {
    Writes::from([(number, Some(page(seed)))])
}

#[test]
fn g18_a_parent_of_living_children_is_refused_or_deferred() {
    let (_folder, store) = store();
    let (parent, _) = save(&store, None, None, &one(1, 1), None, 1, NONE).unwrap();
    let (child, _) = save(&store, Some(&parent), None, &one(2, 2), None, 2, NONE).unwrap();
    let expected = content(&child, None).unwrap();
    let (parent, child) = (parent.id(), child.id());

    let error = store.delete(parent, Deletion::Refuse).unwrap_err();
    assert!(error.to_string().contains(&child.to_string()), "{error}");
    assert_eq!(store.collect().unwrap(), Collected::default());

    store.delete(parent, Deletion::Defer).unwrap();
    assert!(matches!(
        store.snapshot(parent),
        Err(SnapshotError::NotFound { .. })
    ));
    let collected = store.collect().unwrap();
    // The parent's name is gone; its generation is the child's too.
    assert_eq!((collected.snapshots, collected.objects), (1, 0));
    assert!(content(&store.snapshot(child).unwrap(), None).unwrap() == expected);

    store.delete(child, Deletion::Refuse).unwrap();
    let collected = store.collect().unwrap();
    assert_eq!((collected.snapshots, collected.objects), (1, 2));
    assert!(collected.bytes > 2 * PAGE as u64);
    assert_eq!(files(store.root()).len(), 1, "the lock");
    assert!(matches!(
        store.delete(child, Deletion::Defer),
        Err(SnapshotError::NotFound { .. })
    ));
}

#[test]
fn g18_a_pinned_snapshot_outlives_its_deletion_also_for_another_process() {
    let (folder, store) = store();
    let (made, _) = save(&store, None, None, &one(1, 1), None, 1, NONE).unwrap();
    let id = made.id();
    let expected = content(&made, None).unwrap();
    drop(made);
    store.pin(id, "sb-1").unwrap();
    store.pin(id, "sb-1").unwrap();
    let error = store.delete(id, Deletion::Refuse).unwrap_err();
    assert!(error.to_string().contains("sb-1"), "{error}");
    store.delete(id, Deletion::Defer).unwrap();
    assert!(store.pin(id, "sb-2").is_err(), "it is deleted");
    store.collect().unwrap();

    let store = Store::open(&folder.path().join("store")).unwrap();
    assert!(store.pinned_snapshot(id, "sb-2").is_err());
    let pinned = store.pinned_snapshot(id, "sb-1").unwrap();
    assert!(content(&pinned, None).unwrap() == expected);
    // The machine that runs on it can be saved again.
    let (child, _) = save(&store, Some(&pinned), None, &one(3, 3), None, 2, NONE).unwrap();
    store.unpin(id, "sb-1").unwrap();
    store.unpin(id, "sb-1").unwrap();
    assert_eq!(store.collect().unwrap().snapshots, 1);
    content(&store.snapshot(child.id()).unwrap(), None).unwrap();
    for owner in ["", "../x", "a/b", "A", ".x"] {
        assert!(store.pin(child.id(), owner).is_err(), "{owner:?}");
    }
}

#[test]
fn g18_what_a_draft_needs_stays_until_it_is_committed() {
    let (_folder, store) = store();
    let (parent, _) = save(&store, None, None, &one(1, 1), None, 1, NONE).unwrap();
    let mut draft = store.draft(&[&parent]).unwrap();
    let mut memory = draft.memory(parent.memory().unwrap(), None, NONE).unwrap();
    memory.write(2, &page(2)).unwrap();
    assert!(store.delete(parent.id(), Deletion::Refuse).is_err());
    store.delete(parent.id(), Deletion::Defer).unwrap();
    assert_eq!(store.collect().unwrap(), Collected::default());
    draft.finish_memory(memory).unwrap();
    draft.device_state(b"state").unwrap();
    assert_eq!(store.collect().unwrap(), Collected::default());
    let made = draft.commit(description(2)).unwrap();
    assert_eq!(store.collect().unwrap().snapshots, 1);
    assert_eq!(
        made.memory()
            .unwrap()
            .reader(None)
            .unwrap()
            .read_page(1)
            .unwrap(),
        page(1)
    );
    assert!(store.fsck().unwrap().damage.is_empty());
    // A parent that is gone is no parent.
    assert!(matches!(
        store.draft(&[&parent]),
        Err(SnapshotError::NotFound { .. })
    ));
}

#[test]
fn g18_objects_of_others_cannot_be_used_without_naming_their_snapshot() {
    let (_folder, store) = store();
    let (other, _) = save(&store, None, None, &one(1, 1), None, 1, NONE).unwrap();
    let mut draft = store.draft(&[]).unwrap();
    let memory = draft.memory(other.memory().unwrap(), None, NONE).unwrap();
    draft.finish_memory(memory).unwrap();
    draft.device_state(b"state").unwrap();
    let error = draft.commit(description(2)).unwrap_err();
    assert!(matches!(error, SnapshotError::Incomplete(_)), "{error}");
    assert_eq!(files(&store.root().join("staging")).len(), 0);
}

#[test]
fn g18_nothing_is_collected_while_a_manifest_cannot_be_read() {
    let (_folder, store) = store();
    let (made, _) = save(&store, None, None, &one(1, 1), None, 1, NONE).unwrap();
    let manifest = store
        .root()
        .join(format!("snapshots/{}/manifest", made.id()));
    let good = std::fs::read(&manifest).unwrap();
    replace(&manifest, b"nonsense");
    let unused = store.root().join(format!("objects/{BASE}.disk"));
    std::fs::write(&unused, "x").unwrap();
    let error = store.collect().unwrap_err();
    assert!(error.to_string().contains("manifest"), "{error}");
    assert!(unused.exists());
    replace(&manifest, &good);
    assert_eq!(store.collect().unwrap().objects, 1);
    content(&store.snapshot(made.id()).unwrap(), None).unwrap();
    // A snapshot that is damaged for good does not block for ever: it can be deleted.
    replace(&manifest, b"nonsense");
    store.delete(made.id(), Deletion::Defer).unwrap();
    assert_eq!(store.collect().unwrap().objects, 1);
}

#[test]
fn references_name_bases_and_images() {
    let (_folder, store) = store();
    let template = base_content();
    let base = BaseBytes {
        id: BASE,
        bytes: &template,
    };
    let (first, _) = save(&store, None, Some(&base), &one(1, 1), None, 1, NONE).unwrap();
    let (second, _) = save(&store, Some(&first), Some(&base), &one(2, 1), None, 2, NONE).unwrap();
    let references = store.references().unwrap();
    let both = [first.id(), second.id()].into();
    assert_eq!(references.bases[&BASE], both);
    assert_eq!(references.images["sha256-image"], both);
    // Both generations hold the same page, so they are the same object, stored once.
    assert_eq!(references.objects.values().collect::<Vec<_>>(), [&both]);
    let memory = second.memory().unwrap();
    assert_eq!(memory.map().generations().len(), 1);
    assert_eq!(memory.map().counts().data, 2);
}

#[test]
fn g18_collecting_beside_saves_merges_and_deletions_loses_nothing() {
    let (_folder, store) = store();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let collector = scope.spawn(|| {
            let mut rounds = 0;
            while !done.load(Ordering::Relaxed) {
                store.collect().unwrap();
                rounds += 1;
                std::thread::yield_now();
            }
            rounds
        });
        let savers: Vec<_> = (0..3u64)
            .map(|saver| {
                let store = store.clone();
                scope.spawn(move || {
                    let mut parent: Option<Snapshot> = None;
                    for round in 0..12u64 {
                        let created = saver * 100 + round;
                        let writes = one(round, created);
                        let (made, _) =
                            save(&store, parent.as_ref(), None, &writes, None, created, NONE)
                                .unwrap();
                        if let Some(parent) = parent {
                            store.delete(parent.id(), Deletion::Defer).unwrap();
                        }
                        let policy = MergePolicy {
                            max_generations: 3,
                            ..MergePolicy::default()
                        };
                        let merged = store.merge(made.id(), policy, None, &mut |_| true).unwrap();
                        parent = Some(match merged {
                            Some(merged) => {
                                store.delete(made.id(), Deletion::Defer).unwrap();
                                merged
                            }
                            None => made,
                        });
                    }
                    let last = store.snapshot(parent.unwrap().id()).unwrap();
                    let mut reader = last.memory().unwrap().reader(None).unwrap();
                    for round in 0..12 {
                        assert_eq!(reader.read_page(round).unwrap(), page(saver * 100 + round));
                    }
                })
            })
            .collect();
        let results: Vec<_> = savers.into_iter().map(|saver| saver.join()).collect();
        // Before any result is looked at: a failure must end the test, not hang it.
        done.store(true, Ordering::Relaxed);
        results.into_iter().for_each(|result| result.unwrap());
        assert!(collector.join().unwrap() > 3);
    });
    store.collect().unwrap();
    assert_eq!(store.list().unwrap().len(), 3);
    let report = store.fsck().unwrap();
    assert!(
        report.damage.is_empty() && report.unused.is_empty(),
        "{report:?}"
    );
}

#[test]
fn g19_the_files_of_a_snapshot_are_never_changed() {
    let (_folder, store) = store();
    let (first, _) = save(&store, None, None, &one(1, 1), None, 1, NONE).unwrap();
    let before = files(store.root());
    let (second, _) = save(&store, Some(&first), None, &one(1, 2), None, 2, NONE).unwrap();
    let policy = MergePolicy {
        max_generations: 1,
        min_live_percent: 101,
        ..MergePolicy::default()
    };
    store
        .merge(second.id(), policy, None, &mut |_| true)
        .unwrap();
    store.pin(first.id(), "x").unwrap();
    let after = files(store.root());
    for (name, content) in &before {
        assert_eq!(after.get(name), Some(content), "{name:?}");
        if name.as_os_str() != "lock" {
            let mode = std::os::unix::fs::PermissionsExt::mode(
                &store.root().join(name).metadata().unwrap().permissions(),
            );
            assert_eq!(mode & 0o777, 0o400, "{name:?}");
        }
    }
}

#[test]
fn g17_layers_of_a_disk_are_merged_and_say_the_same() {
    let (folder, store) = store();
    let mut parent: Option<Snapshot> = None;
    for number in 0..4u64 {
        let layer = folder.path().join("layer");
        // The lowest is large, so it is left alone.
        let text = format!("layer {number};").repeat(if number == 0 { 100 } else { 1 });
        std::fs::write(&layer, text).unwrap();
        let writes = one(number, number);
        let before = parent.as_ref();
        let saved = save(&store, before, None, &writes, Some(&layer), number, NONE);
        parent = Some(saved.unwrap().0);
    }
    let last = parent.unwrap();
    let policy = MergePolicy {
        max_layers: 2,
        ..MergePolicy::default()
    };
    assert!(store.wants_merge(&last, policy));
    let text_of = |layer: &DiskFile| std::fs::read_to_string(&layer.path).unwrap();
    let before: Vec<_> = last.disk_layers().unwrap().iter().map(text_of).collect();
    let given_up = store.merge(last.id(), policy, Some(&join), &mut |_| false);
    assert!(matches!(given_up, Err(SnapshotError::Cancelled)));
    let merged = store.merge(last.id(), policy, Some(&join), &mut |_| true);
    let merged = merged.unwrap().unwrap();
    let after: Vec<_> = merged.disk_layers().unwrap().iter().map(text_of).collect();
    assert_eq!(after, [before[0].clone(), before[1..].concat()]);
    assert_eq!(
        content(&merged, None).unwrap(),
        content(&last, None).unwrap()
    );
    assert!(!store.wants_merge(&merged, policy));
    store.delete(last.id(), Deletion::Refuse).unwrap();
    store.collect().unwrap();
    assert!(store.fsck().unwrap().damage.is_empty());
    store.snapshot(merged.id()).unwrap().disk_layers().unwrap();
}

#[test]
fn a_merge_can_be_given_up_and_leaves_nothing() {
    let (_folder, store) = store();
    let (first, _) = save(&store, None, None, &one(1, 1), None, 1, NONE).unwrap();
    let (second, _) = save(&store, Some(&first), None, &one(2, 2), None, 2, NONE).unwrap();
    let before = files(store.root());
    let policy = MergePolicy {
        max_generations: 1,
        ..MergePolicy::default()
    };
    let result = store.merge(second.id(), policy, None, &mut |_| false);
    assert!(matches!(result, Err(SnapshotError::Cancelled)));
    assert_eq!(files(store.root()), before);
    let good = MergePolicy {
        max_generations: 2,
        ..policy
    };
    assert!(
        store
            .merge(second.id(), good, None, &mut |_| true)
            .unwrap()
            .is_none()
    );
}

#[test]
fn a_disk_alone_can_be_saved_and_linked_in() {
    let (folder, store) = store();
    let layer = folder.path().join("layer");
    // Larger than a piece, with a hole.
    let content = [vec![7; 300 << 10], vec![0; 600 << 10], vec![9; 5]].concat();
    std::fs::write(&layer, &content).unwrap();
    let mut ids = Vec::new();
    for import in [Import::Copy, Import::Link] {
        let mut draft = store.draft(&[]).unwrap();
        draft.disk_layer(&layer, "raw", import).unwrap();
        let made = draft.commit(description(1)).unwrap();
        assert!(made.memory().is_none());
        let layers = made.disk_layers().unwrap();
        assert_eq!(std::fs::read(&layers[0].path).unwrap(), content);
        ids.push(made.id());
    }
    assert_eq!(ids[0], ids[1], "the same content has the same name");
    assert!(store.draft(&[]).unwrap().commit(description(1)).is_err());
}
