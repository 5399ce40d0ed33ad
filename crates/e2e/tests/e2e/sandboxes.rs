//! The native API, from a client's view.

use std::time::{Duration, Instant};

use futures::future::join_all;
use reqwest::Method;
use serde_json::json;
use wrenn_e2e::Server;

pub(crate) async fn a_sandbox_from_create_to_delete(server: &Server) {
    let api = server.api();
    let answer = api
        .post(
            "/v1/sandboxes",
            &json!({"metadata": {"purpose": "e2e"}, "env": {"COLOUR": "blue"}}),
        )
        .await;
    let answer = answer.expect(201);
    assert!(
        answer.headers.contains_key("server-timing"),
        "a create says where its time went: {:?}",
        answer.headers
    );
    let created = answer.json();
    let id = created["id"].as_str().expect("an id");
    assert!(id.starts_with("sb-") && id.len() == 39, "{id}");
    assert_eq!(created["status"], "running", "{created}");
    assert_eq!(
        (&created["vcpus"], &created["memory_mb"]),
        (&json!(1), &json!(512)),
        "{created}"
    );

    let seen = api
        .get(&format!("/v1/sandboxes/{id}"))
        .await
        .expect(200)
        .json();
    assert_eq!(
        (&seen["id"], &seen["metadata"]["purpose"]),
        (&created["id"], &json!("e2e"))
    );
    let found = api
        .get("/v1/sandboxes?state=running&metadata.purpose=e2e")
        .await
        .expect(200)
        .json();
    assert!(
        found
            .as_array()
            .is_some_and(|all| all.iter().any(|one| one["id"] == created["id"])),
        "{found}"
    );
    let other = api
        .get("/v1/sandboxes?metadata.purpose=other")
        .await
        .expect(200)
        .json();
    assert_eq!(other, json!([]), "the filter filters");

    // A machine of its own: another kernel than the host's, and the variables it was given.
    let program =
        "import platform, os; print(platform.release(), os.environ['COLOUR'], os.getuid())";
    let ran = api.exec(id, "python3", &["-c", program]).await;
    assert_eq!(ran["exit_code"], 0, "{ran}");
    let said = ran["stdout"].as_str().unwrap_or_default();
    assert!(
        said.contains("cloud") && said.ends_with("blue 1000\n"),
        "{ran}"
    );
    let host =
        std::fs::read_to_string("/proc/sys/kernel/random/boot_id").expect("the host's boot id");
    let guest = api.shell(id, "cat /proc/sys/kernel/random/boot_id").await;
    assert_ne!(guest, host, "the same boot id would mean the same kernel");
    // Root is one word away, as agents expect.
    assert_eq!(api.shell(id, "sudo id -u").await, "0\n");

    api.destroy(id).await;
    assert!(!api.is_running(id).await);
    let gone = api
        .post(&format!("/v1/sandboxes/{id}/exec"), &json!({"cmd": "true"}))
        .await;
    assert!(
        [404, 409].contains(&gone.status),
        "exec in a sandbox that is gone: {}",
        gone.describe()
    );
}

pub(crate) async fn exec_keeps_streams_bytes_and_codes_apart(server: &Server) {
    let api = server.api();
    let id = api.create(&json!({})).await;
    let ran = api
        .exec(
            &id,
            "/bin/sh",
            &["-c", "printf out; printf err >&2; exit 7"],
        )
        .await;
    assert_eq!(
        (&ran["stdout"], &ran["stderr"], &ran["exit_code"]),
        (&json!("out"), &json!("err"), &json!(7)),
        "{ran}"
    );

    let path = format!("/v1/sandboxes/{id}/exec");
    let answer = api
        .post(&path, &json!({"cmd": "pwd", "cwd": "/var/tmp"}))
        .await
        .expect(200)
        .json();
    assert_eq!(answer["stdout"], "/var/tmp\n");
    let answer = api
        .post(
            &path,
            &json!({"cmd": "/bin/sh", "args": ["-c", "echo $A"], "envs": {"A": "1 2"}}),
        )
        .await;
    assert_eq!(answer.expect(200).json()["stdout"], "1 2\n");
    let answer = api
        .post(
            &path,
            &json!({"cmd": "id", "args": ["-un"], "user": "root"}),
        )
        .await;
    assert_eq!(answer.expect(200).json()["stdout"], "root\n");

    // Not UTF-8: base64, and said so.
    let ran = api
        .exec(&id, "/bin/sh", &["-c", r"printf '\377\000\376'"])
        .await;
    assert_eq!(
        (&ran["encoding"], &ran["stdout"]),
        (&json!("base64"), &json!("/wD+")),
        "{ran}"
    );

    // A limit in time ends the program and all it started.
    let start = Instant::now();
    let body =
        json!({"cmd": "/bin/sh", "args": ["-c", "sleep 3141 & sleep 3141"], "timeout_sec": 1});
    let late = api.post(&path, &body).await;
    assert!(
        start.elapsed() < Duration::from_secs(20),
        "took {:?}: {}",
        start.elapsed(),
        late.describe()
    );
    assert!(
        late.status != 200 || late.json()["exit_code"] != 0,
        "{}",
        late.describe()
    );
    assert_eq!(
        api.shell(&id, "pgrep -cf '[s]leep 3141' || true").await,
        "0\n"
    );
    api.destroy(&id).await;
}

pub(crate) async fn twenty_at_once_all_work(server: &Server) {
    let api = server.api();
    let start = Instant::now();
    let creating = (0..20).map(|n| {
        let api = api.clone();
        async move { api.create(&json!({"metadata": {"n": n.to_string()}})).await }
    });
    let ids = join_all(creating).await;
    let created = start.elapsed();
    let distinct: std::collections::HashSet<_> = ids.iter().collect();
    assert_eq!(distinct.len(), 20, "{ids:?}");
    let working = ids.iter().enumerate().map(|(n, id)| {
        let api = api.clone();
        async move {
            api.shell(
                id,
                &format!("echo {n} $WRENN_SANDBOX_ID $(cat /proc/sys/kernel/random/uuid)"),
            )
            .await
        }
    });
    let said = join_all(working).await;
    let mut uuids = std::collections::HashSet::new();
    for ((n, id), said) in ids.iter().enumerate().zip(&said) {
        let words: Vec<_> = said.split_whitespace().collect();
        assert_eq!(words[..2], [&n.to_string(), id], "each answers for itself");
        assert!(
            uuids.insert(words[2].to_owned()),
            "two clones drew the same uuid: {said}"
        );
    }
    eprintln!(
        "20 sandboxes: created in {created:.1?}, all answered after {:.1?}",
        start.elapsed()
    );
    join_all(ids.iter().map(|id| api.destroy(id))).await;
}

pub(crate) async fn create_is_idempotent_by_key(server: &Server) {
    let api = server.api();
    let key = "e2e-idempotency-1";
    let create = |body: serde_json::Value| {
        let request = api
            .request(Method::POST, "/v1/sandboxes")
            .header("Idempotency-Key", key)
            .json(&body);
        let api = &api;
        async move { api.send(request).await }
    };
    let body = json!({"metadata": {"purpose": "idempotency"}});
    let (one, two) = tokio::join!(create(body.clone()), create(body.clone()));
    // The second may be told that the first is under way; asked again it gets the same.
    let ids: std::collections::HashSet<_> = [one, two]
        .iter()
        .filter(|answer| answer.status == 201)
        .map(|answer| answer.json()["id"].clone())
        .collect();
    assert_eq!(ids.len(), 1, "one key makes one sandbox");
    let id = create(body).await.expect(201).json()["id"].clone();
    assert!(ids.contains(&id));
    create(json!({"metadata": {"purpose": "another"}}))
        .await
        .expect_error(409, "conflict", &["key"]);
    api.destroy(id.as_str().expect("an id")).await;
}

pub(crate) async fn the_document_and_its_pages_are_served(server: &Server) {
    // Open to everybody: none of them tells a secret.
    let open = server.api().with_key(None);
    open.get("/health").await.expect(200);
    let document = open.get("/openapi.yaml").await.expect(200);
    let text = String::from_utf8_lossy(&document.body).into_owned();
    assert!(
        text.contains("openapi: 3.1"),
        "{}",
        &text[..200.min(text.len())]
    );
    for path in [
        "/v1/sandboxes:",
        "/v1/sandboxes/{id}:",
        "/v1/sandboxes/{id}/exec:",
    ] {
        assert!(text.contains(path), "{path} is not in the document");
    }
    let page = open.get("/docs/").await.expect(200);
    let html = String::from_utf8_lossy(&page.body).into_owned();
    assert!(html.contains("swagger-ui"), "{html}");
    assert!(
        !html.contains("https://"),
        "the page fetches from elsewhere: {html}"
    );
    let script = open.get("/docs/swagger-ui-bundle.js").await.expect(200);
    assert!(script.body.len() > 100_000, "{} bytes", script.body.len());
}
