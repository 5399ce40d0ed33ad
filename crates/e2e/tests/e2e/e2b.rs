//! E2B's published clients, unmodified, against our server.

use std::path::Path;
use std::time::Duration;

use tokio::process::Command;
use wrenn_e2e::{Ran, Server, data_root, eventually, repository};

pub(crate) async fn the_published_python_client_works(server: &Server) {
    let python = data_root().with_file_name("python").join("bin/python");
    let script = repository().join("tests/python/test_e2b.py");
    run(server, &python, "make python", &script).await;
}

pub(crate) async fn the_published_node_client_works(server: &Server) {
    let folder = data_root().with_file_name("node");
    let node = folder.join("python/bin/node");
    // Node looks for packages from the script's own folder upwards.
    let script = folder.join("test_e2b.mjs");
    if folder.is_dir() {
        std::fs::copy(repository().join("tests/node/test_e2b.mjs"), &script)
            .expect("the script can be copied");
    }
    run(server, &node, "make node", &script).await;
}

/// Runs a script that makes a sandbox, says `ok` for each part that works, and kills it.
async fn run(server: &Server, program: &Path, made_by: &str, script: &Path) {
    assert!(
        program.exists(),
        "{} is not there: `{made_by}` makes it",
        program.display()
    );
    let mut command = Command::new(program);
    command
        .arg(script)
        .env("E2B_API_URL", server.api().base())
        .env("E2B_SANDBOX_URL", server.api().base())
        .env("E2B_API_KEY", server.key().replacen("wrn_", "e2b_", 1))
        .env("PYTHONUNBUFFERED", "1");
    for name in [
        "http_proxy",
        "HTTP_PROXY",
        "https_proxy",
        "HTTPS_PROXY",
        "all_proxy",
        "ALL_PROXY",
    ] {
        command.env_remove(name);
    }
    let ran = Ran::of(command, b"").await.expect_code(0);
    // A script that asserts nothing would exit with 0 too.
    let passed = ran
        .stdout
        .lines()
        .filter(|line| line.starts_with("ok "))
        .count();
    assert!(
        passed >= 10 && ran.stdout.contains(&format!("{passed} of {passed} passed")),
        "{}",
        ran.stdout
    );
    // It killed its sandbox; whatever else runs belongs to tests beside this one.
    let api = server.api();
    let id = ran
        .stdout
        .lines()
        .find_map(|line| line.strip_prefix("sandbox "))
        .expect("the script names its sandbox");
    eventually(
        "the client's sandbox is gone",
        Duration::from_secs(10),
        || async { (!api.is_running(id).await).then_some(()) },
    )
    .await;
}
