//! Files that are written: in all forms, and those that are refused.

use std::os::unix::fs::MetadataExt;

use http::StatusCode;

use crate::files_support::{Envd, escape, names, shared_dir};
use crate::{FORM, OCTETS, form, gzip, noise, path_of};

#[tokio::test]
async fn uploads_in_every_form_arrive_and_come_back() {
    let envd = Envd::start();
    let dir = shared_dir();
    let data = noise(3_000_000);
    for (index, (headers, body)) in [
        (vec![OCTETS], data.clone()),
        (vec![OCTETS, ("content-encoding", "gzip")], gzip(&data)),
        (vec![OCTETS, ("content-encoding", "identity")], data.clone()),
        (vec![FORM], form(&[("ignored name", &data)])),
        (
            vec![FORM, ("content-encoding", "gzip")],
            gzip(&form(&[("x", &data)])),
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let path = path_of(dir.path(), &format!("new/dirs {index}/f.bin"));
        let answer = envd
            .post(&format!("/files?path={}", escape(&path)), &headers, body)
            .await;
        assert_eq!(
            answer.status,
            StatusCode::OK,
            "{headers:?} {:?}",
            answer.body
        );
        let expected = serde_json::json!([{"path": path, "name": "f.bin", "type": "file"}]);
        assert_eq!(answer.json(), expected);
        assert!(std::fs::read(&path).unwrap() == data, "{headers:?}");
        let meta = std::fs::metadata(&path).unwrap();
        assert_eq!(meta.mode() & 0o7777, 0o644);
        let parent = std::fs::metadata(dir.path().join("new")).unwrap();
        assert_eq!(parent.mode() & 0o7777, 0o755);
        let back = envd.get(&format!("path={}", escape(&path)), &[]).await;
        assert!(back.body == data);
    }
    let empty = envd.put(&path_of(dir.path(), "empty"), &[], "").await;
    assert_eq!(empty.status, StatusCode::OK);
    assert_eq!(
        std::fs::metadata(dir.path().join("empty")).unwrap().len(),
        0
    );
}

#[tokio::test]
async fn several_files_in_one_request_take_their_paths_from_their_names() {
    let envd = Envd::start();
    let dir = shared_dir();
    let count = 150;
    let paths: Vec<String> = (0..count)
        .map(|i| path_of(dir.path(), &format!("d{}/ž {i}", i % 3)))
        .collect();
    let contents: Vec<Vec<u8>> = (0..count).map(|i| noise(i * 37)).collect();
    let files: Vec<(&str, &[u8])> = paths
        .iter()
        .zip(&contents)
        .map(|(p, c)| (p.as_str(), c.as_slice()))
        .collect();
    let answer = envd.post("/files", &[FORM], form(&files)).await;
    assert_eq!(answer.status, StatusCode::OK, "{:?}", answer.body);
    let listed: Vec<String> = answer
        .json()
        .as_array()
        .unwrap()
        .iter()
        .map(|f| f["path"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(listed, paths);
    for (path, content) in paths.iter().zip(&contents) {
        assert!(std::fs::read(path).unwrap() == *content);
    }
    assert_eq!(names(dir.path()), ["d0", "d1", "d2"]);

    let twice = [
        (paths[0].as_str(), &b"1"[..]),
        (paths[0].as_str(), &b"2"[..]),
    ];
    let answer = envd.post("/files", &[FORM], form(&twice)).await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    assert!(answer.message().contains("more than once"));
    assert!(std::fs::read(&paths[0]).unwrap() == contents[0]);
}

#[tokio::test]
async fn uploads_that_are_wrong_are_refused_by_name() {
    let envd = Envd::start();
    let dir = shared_dir();
    let path = escape(&path_of(dir.path(), "f"));
    let target = format!("/files?path={path}");
    let long = "v".repeat(4097);
    let bad_gzip = gzip(b"some text that is long enough to be cut");
    for (target, headers, body, status, text) in [
        (
            "/files",
            vec![OCTETS],
            &b"x"[..],
            400,
            "needs the query's path",
        ),
        (&target, vec![], b"x", 400, "unsupported Content-Type"),
        (
            &target,
            vec![("content-type", "text/plain")],
            b"x",
            400,
            "unsupported Content-Type 'text/plain'",
        ),
        (
            &target,
            vec![("content-type", "multipart/form-data")],
            b"x",
            400,
            "no valid boundary",
        ),
        (
            &target,
            vec![FORM],
            b"nothing",
            400,
            "ends before its closing boundary",
        ),
        (
            &target,
            vec![FORM],
            b"--bound--\r\n",
            400,
            "no part named 'file'",
        ),
        (
            "/files",
            vec![FORM],
            &form(&[("", b"x")]),
            400,
            "has no filename",
        ),
        (
            &target,
            vec![OCTETS, ("content-encoding", "br")],
            b"x",
            415,
            "Content-Encoding 'br'",
        ),
        (
            &target,
            vec![OCTETS, ("content-encoding", "gzip")],
            b"not gzip",
            400,
            "not valid gzip",
        ),
        (
            &target,
            vec![OCTETS, ("content-encoding", "gzip")],
            &bad_gzip[..20],
            400,
            "not valid gzip",
        ),
        (
            &target,
            vec![OCTETS, ("x-metadata-k", &long)],
            b"x",
            400,
            "metadata of 4098 bytes",
        ),
        (
            &target,
            vec![OCTETS, ("x-metadata-", "v")],
            b"x",
            400,
            "no key",
        ),
        (
            "/files?path=/dev/null",
            vec![OCTETS],
            b"x",
            400,
            "not a regular file",
        ),
        (
            "/files?path=/tmp",
            vec![OCTETS],
            b"x",
            400,
            "is a directory",
        ),
        (
            "/files?path=/proc/version/x",
            vec![OCTETS],
            b"x",
            400,
            "is not a directory",
        ),
        ("/files?path=~root/x", vec![OCTETS], b"x", 400, "only '~'"),
        (
            "/files?path=/tmp/x&username=nobody-here",
            vec![OCTETS],
            b"x",
            401,
            "invalid username",
        ),
    ] {
        let answer = envd.post(target, &headers, body.to_vec()).await;
        assert_eq!(
            answer.status.as_u16(),
            status,
            "{target} {headers:?} {:?}",
            answer.body
        );
        assert!(
            answer.message().contains(text),
            "{} / {text}",
            answer.message()
        );
    }
    assert_eq!(names(dir.path()), Vec::<String>::new());
}

#[tokio::test]
async fn files_are_composed_and_their_sources_removed() {
    let envd = Envd::start();
    let dir = shared_dir();
    let data = noise(2_500_000);
    let mut sources = Vec::new();
    for (index, piece) in data.chunks(1_000_000).enumerate() {
        let path = path_of(dir.path(), &format!("part{index}"));
        assert_eq!(
            envd.put(&path, &[], piece.to_vec()).await.status,
            StatusCode::OK
        );
        sources.push(path);
    }
    let json = ("content-type", "application/json");
    let destination = path_of(dir.path(), "out/whole");
    let ask = |sources: &[String]| {
        serde_json::json!({"source_paths": sources, "destination": destination, "username": "root"})
            .to_string()
    };
    let missing = envd
        .post(
            "/files/compose",
            &[json],
            ask(&[sources[0].clone(), "/no/such".into()]),
        )
        .await;
    assert_eq!(
        (missing.status.as_u16(), missing.message().as_str()),
        (404, "path '/no/such' does not exist")
    );
    let answer = envd.post("/files/compose", &[json], ask(&sources)).await;
    assert_eq!(
        answer.json(),
        serde_json::json!({"path": destination, "name": "whole", "type": "file"})
    );
    assert!(std::fs::read(&destination).unwrap() == data);
    assert_eq!(names(dir.path()), ["out"]);
    for (body, status) in [
        ("{}", 400),
        ("", 400),
        (r#"{"source_paths":[],"destination":"/tmp/x"}"#, 400),
    ] {
        let answer = envd.post("/files/compose", &[json], body).await;
        assert_eq!(answer.status.as_u16(), status, "{body}");
        assert!(!answer.message().is_empty());
    }
}
