//! G15: whatever step a crash or a full disk comes at, there is the old state or the new one.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeSet, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use common::*;
use wrenn_snapshot::*;

/// A disk that dies at one step, and then, like a real one, has lost whatever was not synced.
#[derive(Debug, Default)]
struct Dying(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Steps that still succeed; `None`: all.
    left: Option<usize>,
    /// Only that one step fails, as on a full disk.
    once: bool,
    /// The one step that failed.
    failed: Option<String>,
    /// Files whose content, and names whose place, may be lost.
    unsynced_files: HashSet<PathBuf>,
    new_names: HashSet<PathBuf>,
    /// Renames, and what they replaced.
    renames: Vec<(PathBuf, PathBuf, Option<Vec<u8>>)>,
}

impl Faults for Dying {
    fn before(&self, step: Step<'_>) -> io::Result<()> {
        let mut state = self.0.lock().unwrap();
        let name = format!("{step:?}");
        match state.left {
            Some(0) if state.once => {
                state.left = None;
                state.failed = Some(name);
                return Err(io::ErrorKind::StorageFull.into());
            }
            Some(0) => return Err(io::Error::other("the power is gone")),
            Some(left) => state.left = Some(left - 1),
            None => {}
        }
        match step {
            Step::CreateFolder(path) | Step::Create(path) | Step::Link(_, path) => {
                state.new_names.insert(path.to_owned());
                state.unsynced_files.insert(path.to_owned());
            }
            Step::Write(path, _) => {
                state.unsynced_files.insert(path.to_owned());
            }
            Step::Sync(path) => {
                state.unsynced_files.remove(path);
            }
            Step::SyncFolder(path) => {
                state.new_names.retain(|name| name.parent() != Some(path));
                state.renames.retain(|(_, to, _)| to.parent() != Some(path));
            }
            Step::Rename(from, to) => state.rename(from, to),
            Step::Remove(path) => {
                state.new_names.retain(|name| !name.starts_with(path));
                state.unsynced_files.retain(|name| !name.starts_with(path));
            }
        }
        Ok(())
    }
}

impl State {
    /// What is known about names below `from` is now about those below `to`.
    fn rename(&mut self, from: &Path, to: &Path) {
        let moved = |path: &PathBuf| match path.strip_prefix(from) {
            Ok(rest) if rest.as_os_str().is_empty() => to.to_owned(),
            Ok(rest) => to.join(rest),
            Err(_) => path.clone(),
        };
        self.unsynced_files = self.unsynced_files.iter().map(moved).collect();
        self.new_names = self.new_names.iter().map(moved).collect();
        self.new_names.remove(to);
        let replaced = to.is_file().then(|| std::fs::read(to).unwrap());
        self.renames
            .push((from.to_owned(), to.to_owned(), replaced));
    }
}

impl Dying {
    fn until(steps: usize) -> Arc<Dying> {
        let state = State {
            left: Some(steps),
            ..State::default()
        };
        Arc::new(Dying(Mutex::new(state)))
    }

    /// Loses what was not synced. Renames may have reached the disk or not: `undo` says.
    fn lose(&self, undo: bool) {
        let state = self.0.lock().unwrap();
        for path in state.unsynced_files.iter().filter(|path| path.is_file()) {
            let content = std::fs::read(path).unwrap();
            replace(path, &content[..content.len() / 2]);
        }
        for path in state.new_names.iter().filter(|path| path.is_file()) {
            std::fs::remove_file(path).unwrap();
        }
        for (from, to, replaced) in state.renames.iter().rev().filter(|_| undo) {
            // The folder it came from may be gone; then the entry is lost altogether.
            if to.exists() && std::fs::rename(to, from).is_err() {
                match to.is_dir() {
                    true => std::fs::remove_dir_all(to).unwrap(),
                    false => std::fs::remove_file(to).unwrap(),
                }
            }
            if let Some(content) = replaced {
                std::fs::write(to, content).unwrap();
            }
        }
    }
}

fn first_writes() -> Writes {
    (0..20).map(|number| (number, Some(page(number)))).collect()
}

/// What is done under the fault: a save, a merge, a deletion and a collection.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Work {
    Save,
    Merge,
    Delete,
    Collect,
}

struct Scene {
    folder: tempfile::TempDir,
    template: Vec<u8>,
    old: Vec<(SnapshotId, Vec<u8>)>,
}

fn scene(work: Work) -> Scene {
    let (folder, store) = store();
    let template = base_content();
    let base = BaseBytes {
        id: BASE,
        bytes: &template,
    };
    let none = Compression::None;
    std::fs::write(folder.path().join("layer"), "a disk's layer").unwrap();
    let layer = folder.path().join("layer");
    let mut old = Vec::new();
    let mut parent: Option<Snapshot> = None;
    for number in 0..3 {
        let writes = match number {
            0 => first_writes(),
            _ => Writes::from([(number, Some(page(70 + number)))]),
        };
        let (made, _) = save(
            &store,
            parent.as_ref(),
            Some(&base),
            &writes,
            Some(&layer),
            number,
            none,
        )
        .unwrap();
        old.push((made.id(), content(&made, Some(&base)).unwrap()));
        parent = Some(made);
    }
    if work == Work::Collect {
        let (gone, _) = old.remove(1);
        store.delete(gone, Deletion::Refuse).unwrap_err();
        store.delete(gone, Deletion::Defer).unwrap();
        // An object that nothing needs.
        std::fs::write(store.root().join(format!("objects/{BASE}.disk")), "x").unwrap();
    }
    Scene {
        folder,
        template,
        old,
    }
}

impl Scene {
    fn root(&self) -> PathBuf {
        self.folder.path().join("store")
    }

    fn base(&self) -> BaseBytes<'_> {
        BaseBytes {
            id: BASE,
            bytes: &self.template,
        }
    }

    fn perform(&self, work: Work, faults: Arc<Dying>) -> Result<Option<SnapshotId>> {
        let store = Store::open_with(&self.root(), faults)?;
        let last = self.old.last().unwrap().0;
        match work {
            Work::Save => {
                let parent = store.snapshot(last)?;
                let layer = self.folder.path().join("layer");
                let writes = Writes::from([(30, Some(page(30))), (2, None)]);
                let none = Compression::None;
                let base = self.base();
                let made = save(
                    &store,
                    Some(&parent),
                    Some(&base),
                    &writes,
                    Some(&layer),
                    9,
                    none,
                )?;
                Ok(Some(made.0.id()))
            }
            Work::Merge => {
                let policy = MergePolicy {
                    max_generations: 1,
                    max_layers: 1,
                    ..MergePolicy::default()
                };
                let merged = store.merge(last, policy, Some(&join), &mut |_| true)?;
                Ok(merged.map(|merged| merged.id()))
            }
            Work::Delete => store.delete(last, Deletion::Refuse).map(|()| None),
            Work::Collect => store.collect().map(|_| None),
        }
    }

    /// Old snapshots are whole; a new one is whole or absent; nothing is damaged; collecting
    /// garbage leaves nothing unused.
    fn check(&self, work: Work, at: &str) -> BTreeSet<SnapshotId> {
        let store = Store::open(&self.root()).unwrap();
        let base = self.base();
        let check = |store: &Store| -> BTreeSet<SnapshotId> {
            let report = store.fsck().unwrap();
            assert!(report.damage.is_empty(), "{at}: {:?}", report.damage);
            let listed: BTreeSet<_> = store.list().unwrap().into_iter().collect();
            for (id, memory) in &self.old {
                if work == Work::Delete && !listed.contains(id) {
                    assert_eq!(*id, self.old.last().unwrap().0, "{at}");
                    continue;
                }
                let snapshot = store.snapshot(*id).unwrap();
                assert!(content(&snapshot, Some(&base)).unwrap() == *memory, "{at}");
                snapshot.disk_layers().unwrap();
            }
            for id in &listed {
                store.snapshot(*id).unwrap().disk_layers().unwrap();
            }
            listed
        };
        let before = check(&store);
        store.collect().unwrap();
        assert_eq!(check(&store), before);
        let report = store.fsck().unwrap();
        assert!(report.unused.is_empty(), "{at}: {:?}", report.unused);
        for folder in ["staging", "deleted"] {
            assert_eq!(files(&store.root().join(folder)).len(), 0, "{at}: {folder}");
        }
        before
    }
}

const ALL: [Work; 4] = [Work::Save, Work::Merge, Work::Delete, Work::Collect];

#[test]
fn g15_a_crash_at_any_step_leaves_the_old_or_the_new_whole() {
    for work in ALL {
        let mut outcomes = BTreeSet::new();
        for steps in 0.. {
            let mut finished = false;
            for undo in [false, true] {
                let scene = scene(work);
                let old: BTreeSet<_> = scene.old.iter().map(|(id, _)| *id).collect();
                let faults = Dying::until(steps);
                let result = scene.perform(work, faults.clone());
                let at = format!("{work:?} after {steps} steps, undo {undo}");
                faults.lose(undo);
                let listed = scene.check(work, &at);
                outcomes.insert(listed.len() as i64 - old.len() as i64);
                if let Ok(made) = result {
                    // What was reported done survives.
                    let expected = match work {
                        Work::Delete => old.len() - 1,
                        Work::Save | Work::Merge => old.len() + 1,
                        Work::Collect => old.len(),
                    };
                    assert_eq!(listed.len(), expected, "{at}");
                    assert!(made.is_none_or(|made| listed.contains(&made)));
                    // The cleaning up at the end may still be missing.
                    finished = faults.0.lock().unwrap().left != Some(0);
                }
            }
            if finished {
                println!("{work:?}: crashed at each of {steps} steps, outcomes {outcomes:?}");
                assert!(steps > 2);
                break;
            }
            assert!(steps < 200, "{work:?} never ends");
        }
        let both = match work {
            Work::Save | Work::Merge => BTreeSet::from([0, 1]),
            Work::Delete => BTreeSet::from([-1, 0]),
            Work::Collect => BTreeSet::from([0]),
        };
        assert_eq!(outcomes, both, "{work:?}");
    }
}

#[test]
fn g15_a_full_disk_at_any_step_is_an_error_and_leaves_nothing() {
    for work in [Work::Save, Work::Merge] {
        let mut failures = 0;
        for steps in 0.. {
            let scene = scene(work);
            let faults = Dying::until(steps);
            faults.0.lock().unwrap().once = true;
            let before = files(&scene.root());
            let result = scene.perform(work, faults.clone());
            let Some(failed) = faults.0.lock().unwrap().failed.clone() else {
                assert!(result.is_ok());
                break;
            };
            failures += 1;
            if failed.starts_with("Remove") {
                continue;
            }
            assert!(result.is_err(), "{failed}");
            let staged = files(&scene.root().join("staging"));
            assert!(staged.is_empty(), "{failed}: {staged:?}");
            let store = Store::open(&scene.root()).unwrap();
            assert!(store.fsck().unwrap().damage.is_empty());
            store.collect().unwrap();
            let renamed = failed.contains("/snapshots\")");
            if !renamed {
                assert_eq!(files(&scene.root()), before, "{failed}");
            }
        }
        assert!(failures > 10, "{failures}");
    }
}
