//! What ends a sandbox, and what does not.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use wrenn_e2e::{Server, eventually};

/// Sends a request and hangs up without waiting for a byte of the answer.
async fn ask_and_hang_up(server: &Server, path: &str, body: &Value, after: Duration) {
    let body = body.to_string();
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: {}\r\nX-API-Key: {}\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        server.address(),
        server.key(),
        body.len()
    );
    let mut stream = TcpStream::connect(server.address())
        .await
        .expect("a connection");
    stream
        .write_all(request.as_bytes())
        .await
        .expect("a request");
    tokio::time::sleep(after).await;
}

pub(crate) async fn g01_hanging_up_during_create_harms_nothing(server: &Server) {
    let api = server.api();
    // At once, in the middle, and about when the answer is on its way.
    for (n, millis) in [0, 20, 100].into_iter().enumerate() {
        let mark = format!("hang-up-{n}");
        let body = json!({"metadata": {"mark": mark}});
        ask_and_hang_up(
            server,
            "/v1/sandboxes",
            &body,
            Duration::from_millis(millis),
        )
        .await;
        let path = format!("/v1/sandboxes?state=running&metadata.mark={mark}");
        let id = eventually(
            "a sandbox whose creator hung up",
            Duration::from_secs(60),
            || async {
                let found = api.get(&path).await.expect(200).json();
                found[0]["id"].as_str().map(str::to_owned)
            },
        )
        .await;
        assert_eq!(api.shell(&id, "echo alive").await, "alive\n");
        api.destroy(&id).await;
    }
}

pub(crate) async fn g01_hanging_up_during_exec_harms_nothing(server: &Server) {
    let api = server.api();
    let id = api.create(&json!({})).await;
    let boot = api.shell(&id, "cat /proc/sys/kernel/random/boot_id").await;
    let body = json!({"cmd": "/bin/sh", "args": ["-c", "touch began; sleep 2; touch ended"]});
    let path = format!("/v1/sandboxes/{id}/exec");
    ask_and_hang_up(server, &path, &body, Duration::from_millis(1000)).await;
    // Neither the machine nor the program notices.
    eventually(
        "a program whose caller hung up",
        Duration::from_secs(30),
        || async {
            let ran = api
                .exec(&id, "/bin/sh", &["-c", "test -e began && test -e ended"])
                .await;
            (ran["exit_code"] == 0).then_some(())
        },
    )
    .await;
    assert_eq!(
        api.shell(&id, "cat /proc/sys/kernel/random/boot_id").await,
        boot
    );
    api.destroy(&id).await;
}

pub(crate) async fn g09_an_unused_sandbox_expires_and_a_used_one_does_not(server: &Server) {
    let api = server.api();
    let limit = json!({"timeout_sec": 4, "on_timeout": "kill"});
    let (unused, used) = (api.create(&limit).await, api.create(&limit).await);
    for _ in 0..8 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(api.shell(&used, "echo used").await, "used\n");
    }
    assert!(!api.is_running(&unused).await, "4 s without use are over");
    assert!(api.is_running(&used).await, "it was used every second");
    assert!(
        server.machine_folder(&used).is_some(),
        "control: a machine in use has its folder"
    );
    eventually(
        "the machine of an expired sandbox is gone",
        Duration::from_secs(20),
        || async { server.machine_folder(&unused).is_none().then_some(()) },
    )
    .await;
    api.destroy(&used).await;
}
