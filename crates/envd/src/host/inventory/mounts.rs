//! Which parts of the tree are compared: what users keep in files, on disks and in memory.

use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// Kinds of file systems that hold what was written to them, and answer without anybody's
/// help: one in a user's program would wait for that, and it may be frozen.
const KEEPS_FILES: [&str; 8] = [
    "btrfs", "ext2", "ext3", "ext4", "overlay", "ramfs", "tmpfs", "xfs",
];
/// What is mounted at or below these is left out unless it is asked for: devices, and the state
/// of programs that run.
const NOT_KEPT: [&str; 2] = ["/dev", "/run"];

/// Where file systems are mounted, and whether they keep files.
#[derive(Debug, Default)]
pub(super) struct Mounts(Vec<(PathBuf, bool)>);

impl Mounts {
    /// Those there are now.
    pub(super) fn read() -> io::Result<Mounts> {
        Ok(Mounts::parse(&std::fs::read("/proc/self/mountinfo")?))
    }

    /// Of lines of mountinfo; see proc_pid_mountinfo(5).
    fn parse(table: &[u8]) -> Mounts {
        let line = |line: &[u8]| {
            let text = String::from_utf8_lossy(line);
            let kind = text.split_once(" - ")?.1.split(' ').next()?.to_owned();
            let target = line.split(|byte| *byte == b' ').nth(4)?;
            let keeps = KEEPS_FILES.contains(&kind.as_str());
            Some((unescaped(target), keeps))
        };
        Mounts(
            table
                .split(|byte| *byte == b'\n')
                .filter_map(line)
                .collect(),
        )
    }

    /// Whether a listing may begin at `path`.
    pub(super) fn keeps(&self, path: &Path) -> bool {
        let below = self.0.iter().filter(|(target, _)| path.starts_with(target));
        // Of several at one place the last is on top.
        let nearest = below.max_by_key(|(target, _)| target.components().count());
        nearest.is_none_or(|(_, keeps)| *keeps)
    }

    /// Whether a listing that meets `path` on its way down passes it over.
    pub(super) fn passes_over(&self, path: &Path) -> bool {
        let mut here = self.0.iter().filter(|(target, _)| target == path);
        match here.next_back() {
            None => false,
            Some((_, false)) => true,
            Some((_, true)) => NOT_KEPT.iter().any(|not| path.starts_with(not)),
        }
    }
}

/// A path in which blanks, line ends and backslashes are three octal digits each.
fn unescaped(text: &[u8]) -> PathBuf {
    let mut path = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, after)) = rest.split_first() {
        let octal = after.get(..3).filter(|_| *first == b'\\');
        let byte =
            octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match byte {
            Some(byte) => {
                path.push(byte);
                rest = &after[3..];
            }
            None => {
                path.push(*first);
                rest = after;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn what_keeps_files_is_listed_and_the_rest_passed_over() {
        let mounts = Mounts::parse(
            b"21 1 254:0 / / rw - ext4 /dev/vda rw\n\
              22 21 0:20 / /proc rw - proc proc rw\n\
              23 21 0:21 / /run rw shared:1 - tmpfs tmpfs rw\n\
              24 21 0:22 / /tmp rw - tmpfs tmpfs rw\n\
              25 21 0:23 / /home/user/my\\040disk rw - fuse.sshfs x rw\n\
              26 21 0:24 / /dev/shm rw - tmpfs tmpfs rw\n\
              nonsense\n",
        );
        for (path, passed) in [
            ("/", false),
            ("/proc", true),
            ("/run", true),
            ("/dev/shm", true),
            ("/tmp", false),
            ("/home", false),
            ("/home/user/my disk", true),
            ("/procession", false),
        ] {
            assert_eq!(mounts.passes_over(Path::new(path)), passed, "{path}");
        }
        for (path, keeps) in [
            ("/", true),
            ("/proc/self", false),
            ("/run/user", true),
            ("/tmp/x", true),
            ("/home/user/my disk/x", false),
            ("/home/user", true),
        ] {
            assert_eq!(mounts.keeps(Path::new(path)), keeps, "{path}");
        }
        assert!(Mounts::read().unwrap().passes_over(Path::new("/proc")));
    }

    #[test]
    fn an_escape_that_is_none_stays() {
        for (text, path) in [("a\\040b", "a b"), ("a\\", "a\\"), ("a\\9zz", "a\\9zz")] {
            assert_eq!(
                unescaped(text.as_bytes()).as_os_str().as_bytes(),
                path.as_bytes()
            );
        }
    }
}
