//! Metadata of files, and where there can be none.
#![allow(clippy::unwrap_used)]

mod files_support;

use std::path::Path;

use files_support::{Envd, names};
use http::StatusCode;

fn path_of(dir: &Path, name: &str) -> String {
    dir.join(name).to_str().unwrap().to_owned()
}

#[tokio::test]
async fn metadata_is_replaced_as_a_whole() {
    let envd = Envd::start();
    // The system's own file system keeps user attributes; a tmpfs may not.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = path_of(dir.path(), "f");
    let headers = [("X-Metadata-Author", "me"), ("X-Metadata-Two", "a b;c")];
    let answer = envd.put(&path, &headers, "1").await;
    let metadata = serde_json::json!({"author": "me", "two": "a b;c"});
    assert_eq!(answer.json()[0]["metadata"], metadata, "{:?}", answer.body);
    let value = |name: &str| {
        let mut buffer = [0u8; 100];
        let length = rustix::fs::getxattr(&path, name, &mut buffer).ok()?;
        Some(String::from_utf8(buffer[..length].to_vec()).unwrap())
    };
    assert_eq!(value("user.e2b.two").as_deref(), Some("a b;c"));
    rustix::fs::setxattr(&path, "user.own", b"kept", rustix::fs::XattrFlags::empty()).unwrap();
    envd.put(&path, &[("x-metadata-two", "2")], "2").await;
    assert_eq!(
        (value("user.e2b.author"), value("user.e2b.two")),
        (None, Some("2".into()))
    );
    let answer = envd.put(&path, &[], "3").await;
    assert!(answer.json()[0].get("metadata").is_none());
    assert_eq!(value("user.e2b.two"), None);
    assert_eq!(value("user.own").as_deref(), Some("kept"));
}

/// A file system without attributes for users, as a tmpfs is before Linux 6.6. Which kernel
/// this is must not matter, so it is a ramfs: in a mount namespace of the agent's own.
#[tokio::test]
async fn where_metadata_cannot_be_kept_the_file_system_is_named_and_nothing_left() {
    if !rustix::process::geteuid().is_root() {
        println!("only root may mount");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mount = "mount -t ramfs -o mode=1777 ramfs \"$0\" && exec \"$@\"";
    let mut command = std::process::Command::new("unshare");
    command
        .args(["--mount", "--propagation", "private", "sh", "-c", mount])
        .arg(dir.path());
    let envd = Envd::start_by(command);
    let path = path_of(dir.path(), "new/f");
    let headers = [("x-metadata-author", "me")];
    // As long as the host wants: it is refused before the body is needed.
    let answer = envd.put(&path, &headers, "contents").await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{:?}", answer.body);
    let message = answer.json()["message"].as_str().unwrap().to_owned();
    assert!(
        message.contains(&path) && message.contains("ramfs") && message.contains("X-Metadata"),
        "{message}"
    );
    let inside = format!("/proc/{}/root{}", envd.pid(), dir.path().display());
    let inside = Path::new(&inside);
    assert_eq!(names(inside), Vec::<String>::new());
    // A file that is there stays as it was.
    let answer = envd.put(&path, &[], "without").await;
    assert_eq!(answer.status, StatusCode::OK, "{:?}", answer.body);
    let answer = envd.put(&path, &headers, "again").await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{:?}", answer.body);
    assert_eq!(names(&inside.join("new")), ["f"]);
    let contents = std::fs::read_to_string(inside.join("new/f")).unwrap();
    assert_eq!(contents, "without");
    // On another file system of the same machine it works.
    let disk = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let answer = envd.put(&path_of(disk.path(), "f"), &headers, "x").await;
    assert_eq!(answer.status, StatusCode::OK, "{:?}", answer.body);
}
