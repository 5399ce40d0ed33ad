use std::collections::HashMap;

use super::*;

const PARTED: i64 = 1_000;

/// A tree with known contents.
#[derive(Default, Clone)]
struct Known {
    files: VecDeque<GuestFile>,
    contents: HashMap<String, String>,
    truncated: bool,
}

impl Known {
    fn with(mut self, path: &str, content: &str, change: impl FnOnce(&mut GuestFile)) -> Known {
        let mut file = GuestFile {
            name: GuestPath::Path(path.to_owned()),
            kind: FileKind::File,
            mode: 0o644,
            uid: 0,
            gid: 0,
            size: content.len() as u64,
            modified: 5,
            changed: 5,
            inode: 1,
            key: Vec::new(),
        };
        change(&mut file);
        self.files.push_back(file.with_key().unwrap());
        self.contents.insert(path.to_owned(), content.to_owned());
        self
    }

    fn file(self, path: &str, content: &str) -> Known {
        self.with(path, content, |_| {})
    }
}

impl Tree for Known {
    async fn next(&mut self) -> Result<Option<GuestFile>, GuestError> {
        Ok(self.files.pop_front())
    }

    fn truncated(&self) -> bool {
        self.truncated && self.files.is_empty()
    }

    async fn digests(&self, paths: &[&GuestPath]) -> Result<Vec<Option<String>>, GuestError> {
        let one = |path: &&GuestPath| match path {
            GuestPath::Path(path) => self.contents.get(path).cloned(),
            GuestPath::Raw(_) => None,
        };
        Ok(paths.iter().map(one).collect())
    }
}

struct Told {
    paths: Vec<String>,
    truncated: bool,
    unread: u32,
}

fn told(now: Known, before: Known, limit: usize, two_sandboxes: bool) -> Told {
    let asked = Asked {
        path: "/".into(),
        limit,
        doubt_from: PARTED,
        two_sandboxes,
    };
    let mut files = Files {
        asked: &asked,
        room: Room(TEXT_BUDGET),
        found: Vec::new(),
        waiting: VecDeque::new(),
        budget: 1000,
        unread: 0,
        truncated: false,
    };
    let (mut now, mut before) = (now, before);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    runtime
        .block_on(files.compare(&mut now, &mut before))
        .unwrap();
    let sign = |change: &FileChange| match (&change.now, &change.before) {
        (Some(now), None) => format!("+{}", now.path()),
        (None, Some(before)) => format!("-{}", before.path()),
        (Some(now), Some(_)) => format!("~{}", now.path()),
        (None, None) => unreachable!(),
    };
    Told {
        paths: files.found.iter().map(sign).collect(),
        truncated: files.truncated,
        unread: files.unread,
    }
}

fn paths(now: Known, before: Known) -> Vec<String> {
    let told = told(now, before, 1000, false);
    assert!(!told.truncated);
    told.paths
}

#[test]
fn what_is_added_removed_and_changed_is_told_in_the_tree_s_order() {
    let before = Known::default()
        .file("/a", "same")
        .file("/a/b", "gone")
        .file("/a.c", "longer")
        .with("/d", "", |file| file.mode = 0o600);
    let now = Known::default()
        .file("/a", "same")
        .file("/a.c", "short")
        .file("/d", "")
        .file("/e", "new");
    assert_eq!(paths(now, before), ["-/a/b", "~/a.c", "~/d", "+/e"]);
}

#[test]
fn content_decides_where_times_leave_doubt() {
    let touched = |file: &mut GuestFile| (file.modified, file.changed) = (7, 7);
    let late = |file: &mut GuestFile| (file.modified, file.changed) = (PARTED, PARTED);
    let before = Known::default()
        // Trusted, so nobody reads that they differ.
        .file("/early", "1")
        .file("/touched", "1")
        .file("/written", "1")
        .with("/late", "1", late)
        .with("/late-same", "1", late)
        .with("/link", "1", |file| file.kind = FileKind::Symlink);
    let now = Known::default()
        .file("/early", "2")
        .with("/touched", "1", touched)
        .with("/written", "2", touched)
        .with("/late", "2", late)
        .with("/late-same", "1", late)
        .with("/link", "2", |file| {
            touched(file);
            file.kind = FileKind::Symlink;
        });
    assert_eq!(paths(now, before), ["~/written", "~/late", "~/link"]);
}

#[test]
fn a_directory_is_changed_by_its_rights_and_not_by_what_is_in_it() {
    let directory = |mode: u32, modified: i64| {
        move |file: &mut GuestFile| {
            (file.kind, file.mode) = (FileKind::Directory, mode);
            (file.modified, file.changed) = (modified, modified);
        }
    };
    let before =
        Known::default()
            .with("/a", "", directory(0o755, 5))
            .with("/b", "", directory(0o755, 5));
    let now =
        Known::default()
            .with("/a", "", directory(0o755, 9))
            .with("/b", "", directory(0o700, 9));
    assert_eq!(paths(now, before), ["~/b"]);
}

#[test]
fn what_names_a_sandbox_is_no_difference_between_two() {
    let before = Known::default()
        .file("/etc/hostname", "a")
        .file("/etc/z", "a");
    let now = Known::default()
        .file("/etc/hostname", "bb")
        .file("/etc/z", "bb");
    let told = told(now.clone(), before.clone(), 10, true);
    assert_eq!(told.paths, ["~/etc/z"]);
    assert_eq!(paths(now, before), ["~/etc/hostname", "~/etc/z"]);
}

#[test]
fn an_answer_ends_at_its_limit_and_says_so() {
    let many = |n: usize| {
        (0..n).fold(Known::default(), |tree, n| {
            tree.file(&format!("/{n:05}"), "")
        })
    };
    for (n, limit, truncated) in [
        (5, 5, false),
        (6, 5, true),
        (1000, 300, true),
        (0, 0, false),
    ] {
        let told = told(many(n), Known::default(), limit, false);
        assert_eq!(
            (told.paths.len(), told.truncated),
            (n.min(limit), truncated)
        );
    }
    // What a list that was cut short does not have may be there.
    let cut = Known {
        truncated: true,
        ..many(3)
    };
    let told = told(many(10), cut, 100, false);
    assert_eq!((told.paths.len(), told.truncated), (0, true));
}

#[test]
fn what_is_too_much_to_read_is_judged_by_its_time() {
    let large = "x".repeat(600);
    let at =
        |modified: i64| move |file: &mut GuestFile| (file.modified, file.changed) = (modified, 9);
    let tree = |modified: i64| {
        Known::default()
            .with("/a", &large, at(modified))
            .with("/b", &large, at(modified))
            .with("/c", &large, at(5))
    };
    let mut before = tree(6);
    before.files.iter_mut().for_each(|file| file.changed = 8);
    let told = told(tree(7), before, 100, false);
    // The first is read and the same; the others are not, and only one has another time.
    assert_eq!((told.paths, told.unread), (vec!["~/b".to_owned()], 2));
}

#[test]
fn programs_are_the_same_by_number_start_and_command() {
    let process = |pid: u32, started: u64, command: &str| GuestProcess {
        pid,
        started,
        uid: 1000,
        command: command.to_owned(),
    };
    let before = [process(7, 1, "a"), process(8, 1, "b"), process(9, 1, "c")];
    let now = [process(7, 1, "a"), process(8, 2, "b"), process(9, 1, "d")];
    let (differ, more) = only(&now, &before, 10, |_| true);
    assert_eq!((differ.added.as_slice(), more), (&now[1..], false));
    assert_eq!(differ.removed, before[1..]);
    let (differ, more) = only(&now, &before, 3, |_| true);
    assert_eq!(
        (differ.added.len(), differ.removed.len(), more),
        (2, 1, true)
    );
    let (differ, more) = only(&now, &before, 10, |_| false);
    assert_eq!((differ.added.len(), more), (0, true));
}
