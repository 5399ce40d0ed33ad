//! Whose files they are, and who may ask for them.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use http::StatusCode;

use crate::files_support::{Envd, escape, names, shared_dir};
use crate::{OCTETS, path_of};

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
