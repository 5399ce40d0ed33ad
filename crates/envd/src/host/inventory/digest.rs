//! What a file holds, in 32 bytes.

use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;
use sha2::{Digest, Sha256};

const BUFFER: usize = 128 << 10;

/// SHA-256 of a regular file's bytes or a symbolic link's target, in hexadecimal; `None` for
/// what is neither or cannot be read.
pub(super) fn of(path: &Path) -> Option<String> {
    if let Ok(target) = std::fs::read_link(path) {
        return Some(hex::encode(Sha256::digest(target.as_os_str().as_bytes())));
    }
    // Nothing waits for the other end of a pipe, and no link leads elsewhere.
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
    let mut file = OpenOptions::new()
        .read(true)
        .custom_flags(i32::try_from(flags.bits()).ok()?)
        .open(path)
        .ok()?;
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut hash = Sha256::new();
    let mut buffer = vec![0; BUFFER];
    loop {
        match file.read(&mut buffer).ok()? {
            0 => return Some(hex::encode(hash.finalize())),
            read => hash.update(&buffer[..read]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_and_links_have_digests_and_pipes_have_none() {
        let dir = std::env::temp_dir().join(format!("envd-digest-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("a"), "target").unwrap();
        std::os::unix::fs::symlink("target", dir.join("b")).unwrap();
        let pipe = std::ffi::CString::new(dir.join("pipe").as_os_str().as_bytes()).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &pipe,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR,
            0,
        )
        .unwrap();
        assert_eq!(
            of(&dir.join("a")),
            Some(hex::encode(Sha256::digest("target")))
        );
        assert_eq!(of(&dir.join("a")), of(&dir.join("b")));
        assert_eq!(
            (of(&dir.join("pipe")), of(&dir), of(&dir.join("none"))),
            (None, None, None)
        );
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
