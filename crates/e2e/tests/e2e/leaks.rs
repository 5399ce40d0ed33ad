//! Create, use, save, kill, many times: the host is as it was.

use std::path::Path;
use std::time::{Duration, Instant};

use futures::future::join_all;
use serde_json::json;
use wrenn_e2e::{Api, HostState, Server};

/// In `make test`; the long form is the thousand of G7.
const CYCLES: usize = 50;
const LONG_CYCLES: usize = 1000;
/// So many at a time: more than the pool holds, so that both ways to a machine are used.
const AT_ONCE: usize = 5;
const PATIENCE: Duration = Duration::from_secs(90);

pub(crate) async fn g07_cycles_leave_nothing(data_dir: &Path) {
    let cycles = if std::env::var_os("WRENN_TEST_LONG").is_some() {
        LONG_CYCLES
    } else {
        CYCLES
    };
    let server = Server::start(data_dir).await;
    // The first ones open what stays open: connections to the database, for one.
    run(&server, 2 * AT_ONCE).await;
    let before = HostState::settled(data_dir, Some(server.pid()), PATIENCE).await;
    assert!(
        before.count("process wrenn") > 0,
        "the picture shows at least the server:\n{before}"
    );
    let start = Instant::now();
    run(&server, cycles).await;
    eprintln!(
        "{cycles} cycles, {AT_ONCE} at a time: {:.1?}",
        start.elapsed()
    );
    HostState::wait_for_return(&before, data_dir, Some(server.pid()), PATIENCE).await;

    // Control: a sandbox that lives is seen in the picture.
    let id = server.api().create(&json!({})).await;
    let with_one = HostState::settled(data_dir, Some(server.pid()), PATIENCE).await;
    assert!(
        with_one.count("process qemu") > before.count("process qemu"),
        "{}",
        before.difference(&with_one)
    );
    server.api().destroy(&id).await;
    HostState::wait_for_return(&before, data_dir, Some(server.pid()), PATIENCE).await;
    server.destroy().await;
}

async fn run(server: &Server, cycles: usize) {
    for _ in 0..cycles / AT_ONCE {
        // A client of its own, so that its connections are not counted as the server's.
        let api = server.api();
        join_all((0..AT_ONCE).map(|index| {
            let api = &api;
            async move {
                let id = api.create(&json!({})).await;
                assert_eq!(api.shell(&id, "echo x > f; cat f").await, "x\n");
                if index == 0 {
                    save(api, &id).await;
                }
                api.destroy(&id).await;
            }
        }))
        .await;
    }
}

/// Everything that saves a sandbox and goes on from what was saved.
async fn save(api: &Api, id: &str) {
    let path = |verb: &str| format!("/v1/sandboxes/{id}/{verb}");
    for (verb, body, status) in [
        ("checkpoints", json!({"name": "point"}), 201),
        ("pause", json!({}), 200),
        ("resume", json!({}), 200),
        ("rollback", json!({"checkpoint": "point"}), 200),
    ] {
        api.post(&path(verb), &body).await.expect(status);
    }
    let diff = api.get(&path("diff?against=point")).await.expect(200);
    assert_eq!(diff.json()["files"], json!([]), "{}", diff.describe());
    let forked = api.post(&path("fork"), &json!({})).await.expect(201).json();
    let child = forked[0]["id"].as_str().expect("a child");
    assert_eq!(api.shell(child, "cat f").await, "x\n");
    api.destroy(child).await;
}
