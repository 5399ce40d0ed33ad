//! Writing a "newc" cpio archive, the format of an initramfs
//! (Documentation/driver-api/early-userspace/buffer-format.rst).

/// An archive under construction.
pub struct Archive {
    bytes: Vec<u8>,
    next_inode: u32,
}

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER: u32 = 0o020_000;
/// Name that ends an archive.
const TRAILER: &str = "TRAILER!!!";

impl Archive {
    /// An empty one.
    pub fn new() -> Self {
        Archive {
            bytes: Vec::new(),
            next_inode: 1,
        }
    }

    /// Adds a folder.
    pub fn directory(&mut self, name: &str, mode: u32) {
        self.entry(name, DIRECTORY | mode, (0, 0), &[]);
    }

    /// Adds a file.
    pub fn file(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entry(name, REGULAR | mode, (0, 0), content);
    }

    /// Adds a character device.
    pub fn character_device(&mut self, name: &str, mode: u32, major: u32, minor: u32) {
        self.entry(name, CHARACTER | mode, (major, minor), &[]);
    }

    /// Ends the archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.next_inode = 0;
        self.entry(TRAILER, 0, (0, 0), &[]);
        // Boot loaders hand over whole blocks.
        let length = self.bytes.len().next_multiple_of(512);
        self.bytes.resize(length, 0);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        // A content beyond 4 GiB cannot occur: everything here was read into memory from a
        // package of some 30 MB.
        let size = u32::try_from(content.len()).unwrap_or(u32::MAX);
        let name_size = u32::try_from(name.len() + 1).unwrap_or(u32::MAX);
        let (major, minor) = device;
        // Owner, group and time are 0: the same inputs give the same bytes.
        let fields = [
            self.next_inode,
            mode,
            0,
            0,
            links,
            0,
            size,
            0,
            0,
            major,
            minor,
            name_size,
            0,
        ];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08X}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
        self.next_inode += 1;
    }

    fn pad(&mut self) {
        let length = self.bytes.len().next_multiple_of(4);
        self.bytes.resize(length, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A reader of its own, from the format's description.
    fn read(bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut at = 0;
        let mut out = Vec::new();
        loop {
            let header = std::str::from_utf8(&bytes[at..at + 110]).unwrap();
            assert_eq!(&header[..6], "070701");
            let field = |n: usize| u32::from_str_radix(&header[6 + 8 * n..14 + 8 * n], 16).unwrap();
            let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
            let name = std::str::from_utf8(&bytes[at + 110..at + 110 + name_size - 1]).unwrap();
            at = (at + 110 + name_size).next_multiple_of(4);
            if name == TRAILER {
                return out;
            }
            out.push((name.to_owned(), mode, bytes[at..at + size].to_vec()));
            at = (at + size).next_multiple_of(4);
        }
    }

    proptest! {
        #[test]
        fn what_was_put_in_comes_out(
            files in prop::collection::vec(("[a-z/]{1,20}", prop::collection::vec(any::<u8>(), 0..50)), 0..8)
        ) {
            let mut archive = Archive::new();
            for (name, content) in &files {
                archive.file(name, 0o644, content);
            }
            let told = read(&archive.finish());
            let expected: Vec<_> = files.into_iter().map(|(n, c)| (n, 0o100_644, c)).collect();
            prop_assert_eq!(told, expected);
        }
    }
}
