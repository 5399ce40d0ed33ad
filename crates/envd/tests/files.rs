//! `/files` as clients use it: every line of the contract's section 3.1.
#![allow(clippy::unwrap_used)]

mod files_support;

use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use bytes::Bytes;
use files_support::{Answer, Envd, escape, names, shared_dir};
use flate2::Compression;
use http::{Method, StatusCode};
use http_body_util::{BodyExt, Full};

fn path_of(dir: &Path, name: &str) -> String {
    dir.join(name).to_str().unwrap().to_owned()
}

fn gzip(plain: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(plain).unwrap();
    encoder.finish().unwrap()
}

fn gunzip(packed: &[u8]) -> Vec<u8> {
    let mut plain = Vec::new();
    flate2::read::GzDecoder::new(packed)
        .read_to_end(&mut plain)
        .unwrap();
    plain
}

/// Bytes that do not repeat soon.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[0]
        })
        .collect()
}

fn form(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut body = Vec::new();
    for (name, data) in files {
        body.extend_from_slice(
            format!("--bound\r\nContent-Disposition: form-data; name=\"file\"; filename=\"{name}\"\r\n\r\n").as_bytes(),
        );
        body.extend_from_slice(data);
        body.extend_from_slice(b"\r\n");
    }
    body.extend_from_slice(b"--bound--\r\n");
    body
}

const FORM: (&str, &str) = ("content-type", "multipart/form-data; boundary=bound");
const OCTETS: (&str, &str) = ("content-type", "application/octet-stream");

#[tokio::test]
async fn a_download_has_the_headers_that_clients_read() {
    let envd = Envd::start();
    let dir = shared_dir();
    let path = path_of(dir.path(), "a b.txt");
    std::fs::write(&path, "hello").unwrap();
    let query = format!("path={}", escape(&path));
    let answer = envd.get(&query, &[]).await;
    assert_eq!(
        (answer.status, &answer.body[..]),
        (StatusCode::OK, &b"hello"[..])
    );
    assert_eq!(answer.header("content-length"), "5");
    assert_eq!(answer.header("content-disposition"), "inline");
    assert_eq!(answer.header("vary"), "Accept-Encoding");
    assert_eq!(answer.header("content-encoding"), "");
    assert!(answer.headers.contains_key("etag") && answer.headers.contains_key("last-modified"));
    std::fs::write(&path, "").unwrap();
    for accept in ["identity", "gzip"] {
        let empty = envd.get(&query, &[("accept-encoding", accept)]).await;
        assert_eq!(
            (empty.status, empty.header("content-length")),
            (StatusCode::OK, "0")
        );
    }
    let head = envd.request(Method::HEAD, &format!("/files?{query}"), &[]);
    let head = Answer::of(envd.send(head.body(Full::new(Bytes::new())).unwrap()).await).await;
    assert_eq!(
        (head.status, head.header("content-length")),
        (StatusCode::OK, "0")
    );
}

#[tokio::test]
async fn g31_a_download_refuses_what_is_no_regular_file() {
    let envd = Envd::start();
    let dir = shared_dir();
    let fifo = path_of(dir.path(), "fifo");
    let made = std::process::Command::new("mkfifo")
        .arg(&fifo)
        .status()
        .unwrap();
    assert!(made.success());
    let file = path_of(dir.path(), "f");
    std::fs::write(&file, "x").unwrap();
    for (query, status, text) in [
        (
            format!("path={}", escape(&fifo)),
            400,
            "is not a regular file",
        ),
        (
            format!("path={}", escape(dir.path().to_str().unwrap())),
            400,
            "is a directory",
        ),
        ("path=/dev/zero".into(), 400, "is not a regular file"),
        (
            format!("path={}", escape(&path_of(dir.path(), "no"))),
            404,
            "does not exist",
        ),
        (
            format!("path={}", escape(&format!("{file}/x"))),
            404,
            "does not exist",
        ),
        (
            format!("path={}&username=nobody-here", escape(&file)),
            401,
            "invalid username: 'nobody-here'",
        ),
        ("path=%00".into(), 400, "NUL"),
    ] {
        let answer = envd.get(&query, &[]).await;
        assert_eq!(answer.status.as_u16(), status, "{query}");
        assert!(answer.message().contains(text), "{}", answer.message());
    }
    let missing = envd.get("path=/no/such", &[]).await;
    assert_eq!(missing.message(), "path '/no/such' does not exist");
    let none = envd
        .get(
            &format!("path={}", escape(&file)),
            &[("accept-encoding", "identity;q=0")],
        )
        .await;
    assert_eq!(none.status, StatusCode::NOT_ACCEPTABLE);
}

#[tokio::test]
async fn g31_ranges_and_conditions() {
    let envd = Envd::start();
    let dir = shared_dir();
    let path = path_of(dir.path(), "f");
    std::fs::write(&path, "0123456789").unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000))
        .unwrap();
    // Past the time in which a change could go unnoticed.
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    let query = format!("path={}", escape(&path));
    let part = envd
        .get(
            &query,
            &[("range", "bytes=2-4"), ("accept-encoding", "gzip")],
        )
        .await;
    assert_eq!((part.status.as_u16(), &part.body[..]), (206, &b"234"[..]));
    assert_eq!(part.header("content-range"), "bytes 2-4/10");
    assert_eq!(part.header("content-length"), "3");
    assert_eq!(part.header("content-encoding"), "");
    let tail = envd.get(&query, &[("range", "bytes=-3")]).await;
    assert_eq!(&tail.body[..], b"789");
    let outside = envd.get(&query, &[("range", "bytes=10-")]).await;
    assert_eq!(outside.status.as_u16(), 416);
    assert_eq!(outside.header("content-range"), "bytes */10");
    let several = envd.get(&query, &[("range", "bytes=0-1,3-4")]).await;
    assert_eq!((several.status.as_u16(), several.body.len()), (200, 10));

    let whole = envd.get(&query, &[]).await;
    let etag = whole.header("etag").to_owned();
    let modified = whole.header("last-modified").to_owned();
    assert!(etag.starts_with('"'));
    assert_eq!(modified, "Sun, 09 Sep 2001 01:46:40 GMT");
    for condition in [
        ("if-none-match", etag.as_str()),
        ("if-modified-since", &modified),
    ] {
        let same = envd.get(&query, &[condition]).await;
        assert_eq!(
            (same.status.as_u16(), same.body.len()),
            (304, 0),
            "{condition:?}"
        );
        assert_eq!(same.header("etag"), etag);
    }
    let part = envd
        .get(&query, &[("range", "bytes=0-0"), ("if-range", &etag)])
        .await;
    assert_eq!(part.status.as_u16(), 206);
    std::fs::write(&path, "changed").unwrap();
    let whole = envd
        .get(&query, &[("range", "bytes=0-0"), ("if-range", &etag)])
        .await;
    assert_eq!(
        (whole.status.as_u16(), &whole.body[..]),
        (200, &b"changed"[..])
    );
    let other = envd.get(&query, &[("if-none-match", &etag)]).await;
    assert_eq!(other.status.as_u16(), 200);
    let failed = envd.get(&query, &[("if-match", &etag)]).await;
    assert_eq!(failed.status.as_u16(), 412);
}

#[tokio::test]
async fn downloads_are_compressed_when_asked_and_worth_it() {
    let envd = Envd::start();
    let dir = shared_dir();
    let text: Vec<u8> = b"all work and no play "
        .iter()
        .copied()
        .cycle()
        .take(3 << 20)
        .collect();
    for (name, plain) in [("short", &text[..1000]), ("long", &text[..])] {
        let path = path_of(dir.path(), name);
        std::fs::write(&path, plain).unwrap();
        let query = format!("path={}", escape(&path));
        let answer = envd
            .get(&query, &[("accept-encoding", "gzip, deflate, br")])
            .await;
        assert_eq!(answer.header("content-encoding"), "gzip", "{name}");
        assert!(answer.header("etag").starts_with("W/"));
        assert!(answer.body.len() < plain.len() / 5);
        assert_eq!(gunzip(&answer.body), plain);
        let etag = answer.header("etag").to_owned();
        let same = envd
            .get(
                &query,
                &[("accept-encoding", "gzip"), ("if-none-match", &etag)],
            )
            .await;
        assert_eq!(same.status.as_u16(), 304);
    }
    let path = path_of(dir.path(), "noise");
    let plain = noise(1 << 20);
    std::fs::write(&path, &plain).unwrap();
    let query = format!("path={}", escape(&path));
    let answer = envd.get(&query, &[("accept-encoding", "gzip")]).await;
    assert_eq!(answer.header("content-encoding"), "");
    assert_eq!(answer.header("content-length"), (1 << 20).to_string());
    assert!(answer.body == plain);
}

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
async fn g31_a_broken_upload_leaves_nothing_and_an_upload_under_way_is_not_seen() {
    let envd = Envd::start();
    let dir = shared_dir();
    let path = path_of(dir.path(), "sub/f");
    let kept = path_of(dir.path(), "kept");
    std::fs::write(&kept, "old").unwrap();
    for target in [&path, &kept] {
        use tokio::io::AsyncWriteExt;
        let mut stream = tokio::net::TcpStream::connect(&envd.address).await.unwrap();
        let head = format!(
            "POST /files?path={} HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\nContent-Length: 5000000\r\n\r\n",
            escape(target)
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(&noise(4_000_000)).await.unwrap();
        while open_files_in(&envd, dir.path()) == 0 {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        assert_eq!(names(dir.path()), ["kept"]);
    }
    // The server sees the end of the connection soon after us.
    for _ in 0..500 {
        if open_files_in(&envd, dir.path()) == 0 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert_eq!(open_files_in(&envd, dir.path()), 0);
    assert_eq!(names(dir.path()), ["kept"]);
    assert_eq!(std::fs::read_to_string(&kept).unwrap(), "old");
}

fn open_files_in(envd: &Envd, dir: &Path) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", envd.pid()))
        .unwrap()
        .filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok())
        .filter(|target| target.starts_with(dir))
        .count()
}

#[tokio::test]
async fn g31_readers_see_the_old_file_or_the_new_one_whole() {
    let envd = Envd::start();
    let dir = shared_dir();
    let path = path_of(dir.path(), "f");
    let versions: Vec<Vec<u8>> = (1..=8u8)
        .map(|v| vec![v; 200_000 + usize::from(v)])
        .collect();
    assert_eq!(
        envd.put(&path, &[], versions[0].clone()).await.status,
        StatusCode::OK
    );
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let reader = {
        let (stop, path) = (stop.clone(), path.clone());
        std::thread::spawn(move || {
            let mut reads = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let seen = std::fs::read(&path).unwrap();
                assert_eq!(seen.len(), 200_000 + usize::from(seen[0]));
                assert!(seen.iter().all(|b| *b == seen[0]));
                reads += 1;
            }
            reads
        })
    };
    for round in 0..40 {
        let answer = envd.put(&path, &[], versions[round % 8].clone()).await;
        assert_eq!(answer.status, StatusCode::OK);
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(reader.join().unwrap() > 0);
    assert_eq!(names(dir.path()), ["f"]);
}

#[tokio::test]
async fn g31_a_full_disk_is_507_and_leaves_nothing() {
    let envd = Envd::start();
    let dir = shared_dir();
    let small = dir.path().join("small");
    std::fs::create_dir(&small).unwrap();
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=1m,mode=777", "tmpfs"])
        .arg(&small)
        .status()
        .unwrap();
    assert!(mounted.success());
    struct Unmount(std::path::PathBuf);
    impl Drop for Unmount {
        fn drop(&mut self) {
            let status = std::process::Command::new("umount")
                .arg("-l")
                .arg(&self.0)
                .status();
            assert!(status.unwrap().success());
        }
    }
    let _unmount = Unmount(small.clone());
    let full = envd.put(&path_of(&small, "f"), &[], noise(3 << 20)).await;
    assert_eq!(full.status.as_u16(), 507, "{:?}", full.body);
    assert!(
        full.message().contains("not enough space"),
        "{}",
        full.message()
    );
    assert_eq!(names(&small), Vec::<String>::new());
    let fits = envd.put(&path_of(&small, "f"), &[], noise(500_000)).await;
    assert_eq!(fits.status, StatusCode::OK);
}

#[tokio::test]
async fn g30_files_are_written_and_read_with_the_users_rights() {
    let envd = Envd::start();
    let dir = shared_dir();
    let mine = path_of(dir.path(), "mine/f");
    let target = format!("/files?path={}&username=nobody", escape(&mine));
    let answer = envd.post(&target, &[OCTETS], "x").await;
    assert_eq!(answer.status, StatusCode::OK, "{:?}", answer.body);
    let nobody = 65_534;
    for path in [dir.path().join("mine"), dir.path().join("mine/f")] {
        let meta = std::fs::metadata(&path).unwrap();
        assert_eq!((meta.uid(), meta.gid()), (nobody, nobody), "{path:?}");
    }
    let secret = path_of(dir.path(), "secret");
    std::fs::write(&secret, "s").unwrap();
    std::fs::set_permissions(&secret, PermissionsExt::from_mode(0o600)).unwrap();
    let closed = dir.path().join("closed");
    std::fs::create_dir(&closed).unwrap();
    std::fs::set_permissions(&closed, PermissionsExt::from_mode(0o755)).unwrap();
    let as_nobody = |path: &str| format!("path={}&username=nobody", escape(path));
    let read = envd.get(&as_nobody(&secret), &[]).await;
    assert_eq!(read.status, StatusCode::FORBIDDEN, "{:?}", read.body);
    // Through a link of the user's, too.
    let link = path_of(dir.path(), "mine/link");
    std::os::unix::fs::symlink(&secret, &link).unwrap();
    assert_eq!(
        envd.get(&as_nobody(&link), &[]).await.status,
        StatusCode::FORBIDDEN
    );
    assert_eq!(
        envd.get(&as_nobody("/etc/shadow"), &[]).await.status,
        StatusCode::FORBIDDEN
    );
    for path in [
        &secret,
        &link,
        &path_of(&closed, "new"),
        &path_of(&closed, "deep/new"),
    ] {
        let target = format!("/files?{}", as_nobody(path));
        let write = envd.post(&target, &[OCTETS], "y").await;
        assert_eq!(
            write.status,
            StatusCode::FORBIDDEN,
            "{path} {:?}",
            write.body
        );
    }
    assert_eq!(std::fs::read_to_string(&secret).unwrap(), "s");
    assert_eq!(names(&closed), Vec::<String>::new());
    let root = envd
        .get(&format!("path={}&username=root", escape(&secret)), &[])
        .await;
    assert_eq!(&root.body[..], b"s");
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

#[tokio::test]
async fn a_file_that_shrinks_during_its_download_breaks_the_transfer() {
    let envd = Envd::start();
    let dir = shared_dir();
    let path = path_of(dir.path(), "f");
    std::fs::File::create(&path)
        .unwrap()
        .set_len(256 << 20)
        .unwrap();
    let request = envd.request(Method::GET, &format!("/files?path={}", escape(&path)), &[]);
    let response = envd
        .send(request.body(Full::new(Bytes::new())).unwrap())
        .await;
    assert_eq!(
        response.headers()["content-length"],
        (256u64 << 20).to_string()
    );
    std::fs::File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(1000)
        .unwrap();
    let body = tokio::time::timeout(files_support::PATIENCE, response.into_body().collect());
    assert!(body.await.expect("an end").is_err());
}

#[tokio::test]
async fn g33_files_are_open_to_the_token_and_to_signatures_made_with_it() {
    use wrenn_envd::auth::{AccessToken, Operation, sign};
    let envd = Envd::start();
    let dir = shared_dir();
    let path = path_of(dir.path(), "f");
    let init = envd
        .post(
            "/init",
            &[("content-type", "application/json")],
            r#"{"accessToken":"secret"}"#,
        )
        .await;
    assert_eq!(init.status, StatusCode::NO_CONTENT, "{:?}", init.body);
    let token = AccessToken::new("secret".into()).unwrap();
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    let soon = i64::try_from(now.as_secs()).unwrap() + 60;
    let signed = |operation, user: &str, at: Option<i64>| {
        let signature = sign(&token, operation, &path, user, at);
        let mut query = format!("path={}&signature={}", escape(&path), escape(&signature));
        if !user.is_empty() {
            query += &format!("&username={user}");
        }
        if let Some(at) = at {
            query += &format!("&signature_expiration={at}");
        }
        query
    };
    let written = envd
        .post(
            &format!("/files?{}", signed(Operation::Write, "", Some(soon))),
            &[OCTETS],
            "x",
        )
        .await;
    assert_eq!(written.status, StatusCode::OK, "{:?}", written.body);
    let plain = format!("path={}", escape(&path));
    for (query, headers, text) in [
        (plain.clone(), vec![], "missing signature query parameter"),
        (
            plain.clone(),
            vec![("x-access-token", "wrong")],
            "access token present in header but does not match",
        ),
        (
            signed(Operation::Write, "", None),
            vec![],
            "invalid signature",
        ),
        (
            signed(Operation::Read, "", None) + "&username=nobody",
            vec![],
            "invalid signature",
        ),
        (
            signed(Operation::Read, "", Some(1000)),
            vec![],
            "signature is already expired",
        ),
    ] {
        let answer = envd.get(&query, &headers).await;
        assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{query}");
        assert_eq!(answer.message(), text);
    }
    for (query, headers) in [
        (plain, vec![("x-access-token", "secret")]),
        (signed(Operation::Read, "", None), vec![]),
        (signed(Operation::Read, "nobody", Some(soon)), vec![]),
    ] {
        let answer = envd.get(&query, &headers).await;
        assert_eq!(
            (answer.status, &answer.body[..]),
            (StatusCode::OK, &b"x"[..]),
            "{query}"
        );
    }
    let json = [("content-type", "application/json")];
    let body = serde_json::json!({"source_paths": [path], "destination": "/tmp/never"}).to_string();
    let answer = envd.post("/files/compose", &json, body).await;
    assert_eq!(answer.status, StatusCode::UNAUTHORIZED);
}
