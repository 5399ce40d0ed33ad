//! From the path of a request to an absolute one.

use std::path::{Component, Path, PathBuf};

use super::error::FsError;
use crate::users::User;

/// The kernel's limit on a path, its final NUL included (`PATH_MAX`).
const PATH_MAX: usize = 4096;

/// Makes `path` absolute and clean: `~` and `~/…` are the user's home, other relative paths
/// start there, and an empty one is the default working directory, or home where none is
/// set. `.`, `..`, doubled and trailing slashes are resolved by text alone, so that the
/// path in an answer is the one that was asked for.
///
/// # Errors
/// [`FsError::Invalid`] for a NUL, for `~name`, and for what is longer than the kernel takes.
pub fn resolve(path: &str, user: &User, workdir: Option<&Path>) -> Result<PathBuf, FsError> {
    if path.contains('\0') {
        return Err(FsError::Invalid("a path cannot contain a NUL byte".into()));
    }
    let absolute = if path.is_empty() {
        match workdir {
            Some(workdir) => user.home.join(workdir),
            None => user.home.clone(),
        }
    } else if path == "~" {
        user.home.clone()
    } else if let Some(rest) = path.strip_prefix("~/") {
        // `~//etc` is still below home.
        user.home.join(rest.trim_start_matches('/'))
    } else if path.starts_with('~') {
        return Err(FsError::Invalid(format!(
            "path '{path}': only '~' and '~/…' are expanded; for a file of that name write './{path}'"
        )));
    } else {
        user.home.join(path)
    };
    let clean = clean(&absolute);
    if clean.as_os_str().len() >= PATH_MAX {
        return Err(FsError::Invalid(format!(
            "the path is {} bytes long; at most {} are possible",
            clean.as_os_str().len(),
            PATH_MAX - 1
        )));
    }
    Ok(clean)
}

/// Resolves `.` and `..` by text, from the root.
fn clean(path: &Path) -> PathBuf {
    let mut out = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => out.push(name),
            Component::ParentDir => {
                out.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    out
}

/// The directory that holds `path`, and its name in it.
///
/// # Errors
/// [`FsError::IsDirectory`] for the root, which is in no directory.
pub fn split(path: &Path) -> Result<(&Path, &std::ffi::OsStr), FsError> {
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => Ok((parent, name)),
        _ => Err(FsError::IsDirectory(path.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn user() -> User {
        User {
            name: "user".into(),
            uid: 1000,
            gid: 1000,
            groups: vec![1000],
            home: "/home/user".into(),
            shell: "/bin/sh".into(),
        }
    }

    #[test]
    fn paths_start_where_the_contract_says() {
        let work = Path::new("/work");
        for (given, workdir, expected) in [
            ("", None, "/home/user"),
            ("", Some(work), "/work"),
            ("", Some(Path::new("sub")), "/home/user/sub"),
            (".", Some(work), "/home/user"),
            ("a", Some(work), "/home/user/a"),
            ("~", None, "/home/user"),
            ("~/a//b/", None, "/home/user/a/b"),
            ("~//etc", None, "/home/user/etc"),
            ("/a/./b/../c", None, "/a/c"),
            ("/../../x", None, "/x"),
            ("../other", None, "/home/other"),
            ("/", None, "/"),
            ("./~x", None, "/home/user/~x"),
        ] {
            let path = resolve(given, &user(), workdir).unwrap();
            assert_eq!(path, Path::new(expected), "{given:?}");
        }
        for wrong in ["a\0b", "~root", "~root/x", &"x".repeat(5000)] {
            assert!(
                matches!(resolve(wrong, &user(), None), Err(FsError::Invalid(_))),
                "{wrong:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn a_resolved_path_is_absolute_clean_and_stays_the_same(text in "[a-z./~ é]{0,40}") {
            if let Ok(path) = resolve(&text, &user(), None) {
                prop_assert!(path.is_absolute());
                let shown = path.to_str().unwrap();
                prop_assert!(!shown.contains("//"));
                prop_assert!(shown == "/" || !shown.ends_with('/'));
                prop_assert!(shown.split('/').all(|part| part != "." && part != ".."));
                prop_assert_eq!(&resolve(shown, &user(), None).unwrap(), &path);
            }
        }

        #[test]
        fn without_dots_a_path_is_only_joined(parts in prop::collection::vec("[a-z]{1,8}", 1..6)) {
            let joined = parts.join("/");
            let path = resolve(&joined, &user(), None).unwrap();
            prop_assert_eq!(path, Path::new("/home/user").join(&joined));
            let path = resolve(&format!("/{joined}"), &user(), None).unwrap();
            prop_assert_eq!(path, Path::new("/").join(&joined));
        }
    }
}
