//! What ends a sandbox, and what does not.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use wrenn_e2e::{Server, eventually};

/// Sends a request and waits for no byte of the answer. Who drops the connection hangs up.
async fn ask(server: &Server, path: &str, key: &str, body: &Value) -> TcpStream {
    let body = body.to_string();
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: {}\r\nX-API-Key: {}\r\nIdempotency-Key: {key}\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
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
    stream
}

/// A label that no run has used before: keys are remembered for a day, and the data folder of
/// the tests is used again.
fn mark(what: &str) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    format!("{what}-{}", now.expect("after 1970").as_nanos())
}

pub(crate) async fn g01_hanging_up_during_create_harms_nothing(server: &Server) {
    let api = server.api();
    // As soon as the order is taken, in the middle, and about when the answer is on its way.
    for millis in [0, 20, 100] {
        let mark = mark("hang-up");
        let body = json!({"metadata": {"mark": mark}});
        let asking = ask(server, "/v1/sandboxes", &mark, &body).await;
        let path = format!("/v1/sandboxes?state=all&metadata.mark={mark}");
        let known = || async { api.get(&path).await.expect(200).json()[0].clone() };
        eventually(
            "an order that is taken",
            Duration::from_secs(60),
            || async { known().await.is_object().then_some(()) },
        )
        .await;
        tokio::time::sleep(Duration::from_millis(millis)).await;
        drop(asking);
        let id = eventually(
            "a sandbox whose creator hung up",
            Duration::from_secs(60),
            || async {
                let found = known().await;
                (found["status"] == "running").then(|| found["id"].as_str().map(str::to_owned))?
            },
        )
        .await;
        assert_eq!(api.shell(&id, "echo alive").await, "alive\n");
        api.destroy(&id).await;
    }
}

/// Whoever hangs up before the server has taken the order cannot know whether it did. The same
/// request once more gives a sandbox that runs, and one only.
pub(crate) async fn g01_who_hung_up_at_once_asks_again(server: &Server) {
    let api = server.api();
    for _ in 0..4 {
        let mark = mark("hang-up-at-once");
        let body = json!({"metadata": {"mark": mark}});
        drop(ask(server, "/v1/sandboxes", &mark, &body).await);
        let id = eventually(
            "a sandbox asked for twice",
            Duration::from_secs(60),
            || async {
                let again = api
                    .request(Method::POST, "/v1/sandboxes")
                    .header("Idempotency-Key", &mark)
                    .json(&body);
                let answer = api.send(again).await;
                if answer.status == 409 {
                    return None;
                }
                let made = answer.expect(201).json();
                made["id"].as_str().map(str::to_owned)
            },
        )
        .await;
        assert_eq!(api.shell(&id, "echo alive").await, "alive\n");
        let path = format!("/v1/sandboxes?state=all&metadata.mark={mark}");
        let made = api.get(&path).await.expect(200).json();
        assert_eq!(made.as_array().map(Vec::len), Some(1), "{made}");
        api.destroy(&id).await;
    }
}

pub(crate) async fn g01_hanging_up_during_exec_harms_nothing(server: &Server) {
    let api = server.api();
    let id = api.create(&json!({})).await;
    let boot = api.shell(&id, "cat /proc/sys/kernel/random/boot_id").await;
    let body = json!({"cmd": "/bin/sh", "args": ["-c", "touch began; sleep 2; touch ended"]});
    let path = format!("/v1/sandboxes/{id}/exec");
    let asking = ask(server, &path, &mark("exec"), &body).await;
    let has = |file: &'static str| {
        let (api, id) = (&api, &id);
        async move {
            let ran = api.exec(id, "test", &["-e", file]).await;
            (ran["exit_code"] == 0).then_some(())
        }
    };
    let patience = Duration::from_secs(30);
    eventually("a program that began", patience, || has("began")).await;
    drop(asking);
    // Neither the machine nor the program notices.
    eventually("a program whose caller hung up", patience, || has("ended")).await;
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
