//! Files into a sandbox and out of it.

use serde_json::json;
use wrenn_e2e::{Server, noise, sha256};

pub(crate) async fn g31_fifty_mebibytes_arrive_unchanged(server: &Server) {
    let api = server.api();
    let id = api.create(&json!({})).await;
    let content = noise(50, 50 << 20);
    let digest = sha256(&content);
    let path = "/home/user/fifty";
    let written = api.write_file(&id, path, content).await;
    assert!(
        (200..300).contains(&written.status),
        "{}",
        written.describe()
    );
    // Three judges: the guest, the way back, and the owner.
    let inside = api
        .shell(
            &id,
            &format!("sha256sum {path} | cut -d' ' -f1; stat -c '%s %U' {path}"),
        )
        .await;
    assert_eq!(inside, format!("{digest}\n{} user\n", 50 << 20));
    let read = api.read_file(&id, path).await.expect(200);
    assert_eq!((read.body.len(), sha256(&read.body)), (50 << 20, digest));
    api.destroy(&id).await;
}

pub(crate) async fn a_file_is_seen_whole_or_not_at_all(server: &Server) {
    let api = server.api();
    let id = api.create(&json!({})).await;
    // Parents are made, an old file is replaced, and an empty one is a file.
    for content in [&b"first, and longer"[..], b"second", b""] {
        let written = api
            .write_file(&id, "/home/user/a/b/c.txt", content.to_vec())
            .await;
        assert!(
            (200..300).contains(&written.status),
            "{}",
            written.describe()
        );
        assert_eq!(
            api.read_file(&id, "/home/user/a/b/c.txt")
                .await
                .expect(200)
                .body,
            content
        );
    }
    // An upload that breaks off leaves what was there.
    api.write_file(&id, "/home/user/kept", b"old".to_vec())
        .await;
    let broken = futures::stream::iter([
        Ok(vec![b'x'; 100_000]),
        Err(std::io::Error::other("the client gave up")),
    ]);
    let body = reqwest::Body::wrap_stream(broken);
    let file = reqwest::multipart::Part::stream(body).file_name("file");
    let form = reqwest::multipart::Form::new()
        .text("path", "/home/user/kept")
        .part("file", file);
    let request = api
        .request(
            reqwest::Method::POST,
            &format!("/v1/sandboxes/{id}/files/write"),
        )
        .multipart(form);
    assert!(
        request.send().await.is_err(),
        "a broken upload is an error on this side too"
    );
    assert_eq!(
        api.read_file(&id, "/home/user/kept").await.expect(200).body,
        b"old"
    );
    let left = api
        .shell(
            &id,
            "ls -A /home/user | grep -v '^\\.\\(bash\\|profile\\)' | sort",
        )
        .await;
    assert_eq!(left, "a\nkept\n", "no temporary file is left");
    api.destroy(&id).await;
}
