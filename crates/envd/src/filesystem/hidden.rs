//! Names of files that are not there for anybody yet.
//!
//! An upload becomes visible by a rename. What it was before has a name of this form, which
//! watches do not report; the rename itself they report as what it means, and the letter in
//! the name tells them what that is.

use std::ffi::OsString;

const UPLOAD: &str = ".wrenn-upload-";
const MOVE: &str = ".wrenn-move-";
/// Random digits after prefix and letter.
const DIGITS: usize = 16;

/// What the rename of an upload means to those who watch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Appears {
    /// A new file with contents: CREATE, CHMOD, WRITE.
    New,
    /// A new empty file: CREATE, CHMOD.
    NewEmpty,
    /// Other contents of a file that was there: CHMOD, WRITE.
    Replaced,
}

impl Appears {
    /// Whether there was no such file before.
    pub fn is_new(self) -> bool {
        self != Appears::Replaced
    }

    fn letter(self) -> char {
        match self {
            Appears::New => 'n',
            Appears::NewEmpty => 'e',
            Appears::Replaced => 'r',
        }
    }
}

/// A fresh name for an upload that will appear so.
pub fn upload_name(appears: Appears) -> OsString {
    format!("{UPLOAD}{}{}", appears.letter(), digits()).into()
}

/// A fresh name for the copy that a move between file systems makes.
pub fn move_name() -> OsString {
    format!("{MOVE}{}", digits()).into()
}

/// Enough to be alone: names are tried with `O_EXCL` semantics anyway.
fn digits() -> String {
    use std::hash::{BuildHasher, Hasher};
    // The standard library's hasher keys are random per process and differ per call.
    let random = std::collections::hash_map::RandomState::new()
        .build_hasher()
        .finish();
    format!("{random:016x}")
}

/// How a file of that name appears when it gets its own, `None` for all other names.
pub fn upload(name: &[u8]) -> Option<Appears> {
    let rest = name.strip_prefix(UPLOAD.as_bytes())?;
    let (letter, digits) = rest.split_first()?;
    if !are_digits(digits) {
        return None;
    }
    match letter {
        b'n' => Some(Appears::New),
        b'e' => Some(Appears::NewEmpty),
        b'r' => Some(Appears::Replaced),
        _ => None,
    }
}

/// Whether watches pass over that name.
pub fn is_hidden(name: &[u8]) -> bool {
    upload(name).is_some() || name.strip_prefix(MOVE.as_bytes()).is_some_and(are_digits)
}

fn are_digits(text: &[u8]) -> bool {
    text.len() == DIGITS && text.iter().all(u8::is_ascii_hexdigit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn a_hidden_name_tells_how_it_appears() {
        for appears in [Appears::New, Appears::NewEmpty, Appears::Replaced] {
            let name = upload_name(appears);
            assert_eq!(upload(name.as_bytes()), Some(appears));
            assert!(is_hidden(name.as_bytes()));
            assert_ne!(name, upload_name(appears));
        }
        assert!(is_hidden(move_name().as_bytes()) && upload(move_name().as_bytes()).is_none());
        for other in [
            "a",
            ".wrenn-upload-",
            ".wrenn-upload-n12",
            ".wrenn-upload-x0123456789abcdef",
        ] {
            assert!(!is_hidden(other.as_bytes()), "{other}");
        }
    }
}
