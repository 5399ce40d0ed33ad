//! Paths of requests: whatever is asked for, what comes out is absolute, clean and stable.

use std::path::{Path, PathBuf};

use wrenn_envd::filesystem::path::resolve;
use wrenn_envd::users::User;

/// A path, and the working directory on a second line.
pub fn check(data: &[u8]) {
    let Ok(data) = std::str::from_utf8(data) else {
        return;
    };
    let (text, workdir) = match data.split_once('\n') {
        Some((text, workdir)) => (text, Some(workdir)),
        None => (data, None),
    };
    let user = User {
        name: "user".into(),
        uid: 1000,
        gid: 1000,
        groups: vec![1000],
        home: "/home/user".into(),
        shell: "/bin/sh".into(),
    };
    // The host sets it, and has looked at it.
    let workdir = workdir
        .filter(|text| !text.contains('\0'))
        .map(PathBuf::from);
    let Ok(path) = resolve(text, &user, workdir.as_deref()) else {
        return;
    };
    assert!(path.is_absolute() && path.as_os_str().len() < 4096);
    let shown = path.to_str().expect("text in, text out");
    assert!(!shown.contains('\0') && !shown.contains("//"), "{shown:?}");
    assert!(shown == "/" || !shown.ends_with('/'), "{shown:?}");
    assert!(
        shown.split('/').all(|part| part != "." && part != ".."),
        "{shown:?}"
    );
    let again = resolve(shown, &user, workdir.as_deref()).expect("a clean path is one");
    assert_eq!(again, path);
    // Nothing but ".." leads out of home, and an absolute path never depends on it.
    if text.starts_with('/') {
        let other = User {
            home: "/".into(),
            ..user
        };
        assert_eq!(resolve(text, &other, None).ok(), Some(path));
    } else if !text.is_empty() && !text.split('/').any(|part| part == "..") {
        assert!(path.starts_with(Path::new("/home/user")), "{shown:?}");
    }
}
