//! Files that are read.

use bytes::Bytes;
use http::{Method, StatusCode};
use http_body_util::{BodyExt, Full};

use crate::files_support::{Answer, Envd, PATIENCE, escape, shared_dir};
use crate::{gunzip, noise, path_of};

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
    let body = tokio::time::timeout(PATIENCE, response.into_body().collect());
    assert!(body.await.expect("an end").is_err());
}
