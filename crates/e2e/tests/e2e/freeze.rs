//! A freeze that comes in the middle: of a download, an upload, a stream and a terminal.

use std::collections::HashSet;
use std::time::Duration;

use base64::Engine as _;
use futures::stream;
use reqwest::{Body, Method, Response};
use serde_json::json;
use wrenn_e2e::{Api, Server, eventually};

use crate::secured::{Events, Secured};

/// More than all buffers on the way hold, so that its transfer cannot be over early.
const BIG_MIB: usize = 48;

const COUNT: &str = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done";

async fn make_big(api: &Api, sandbox: &Secured<'_>) -> String {
    let line =
        format!("head -c {BIG_MIB}M /dev/urandom > big && sha256sum < big | cut -d ' ' -f 1");
    api.shell(&sandbox.id, &line).await.trim().to_owned()
}

async fn start_download(sandbox: &Secured<'_>) -> (Response, Vec<u8>) {
    let request = sandbox.request(Method::GET, "/files?path=big&username=user");
    let mut answer = request.send().await.expect("an answer");
    assert_eq!(answer.status(), 200);
    let first = answer.chunk().await.expect("bytes").expect("some bytes");
    (answer, first.to_vec())
}

/// Reads to the end; whether the transfer was whole, as HTTP tells it.
async fn finish_download(mut answer: Response, mut bytes: Vec<u8>) -> Result<Vec<u8>, String> {
    loop {
        match answer.chunk().await {
            Ok(Some(more)) => bytes.extend(more),
            Ok(None) => return Ok(bytes),
            Err(error) => return Err(error.to_string()),
        }
    }
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    hex::encode(Sha256::digest(bytes))
}

/// An upload that sends one MiB and then, until `go_on` says so, no more.
fn stalled_upload(
    sandbox: &Secured<'_>,
    go_on: tokio::sync::oneshot::Receiver<()>,
) -> tokio::task::JoinHandle<Result<u16, String>> {
    let parts = stream::unfold((0, Some(go_on)), |(n, mut go_on)| async move {
        if n == 1 {
            // Its sender's end, dropped or used, lets it go on.
            go_on.take()?.await.ok();
        }
        (n < 4).then(|| (Ok::<_, std::io::Error>(vec![n; 1 << 20]), (n + 1, go_on)))
    });
    let request = sandbox
        .request(
            Method::POST,
            "/files?path=/home/user/uploaded&username=user",
        )
        .header("content-type", "application/octet-stream")
        .body(Body::wrap_stream(parts));
    tokio::spawn(async move {
        match request.send().await {
            Ok(answer) => Ok(answer.status().as_u16()),
            Err(error) => Err(error.to_string()),
        }
    })
}

/// Connections that the agent in the guest has open, as the guest's kernel counts them: far
/// addresses and inodes.
async fn agent_sockets(api: &Api, id: &str) -> HashSet<String> {
    // 49983 is C33F; 01 is established, 06 a closed one that waits and has no socket.
    let line =
        "cat /proc/net/tcp /proc/net/tcp6 | awk '$2 ~ /:C33F$/ && $4 == \"01\" {print $3, $10}'";
    api.shell(id, line)
        .await
        .lines()
        .map(str::to_owned)
        .collect()
}

async fn read_lines(events: &mut Events, at_least: usize, into: &mut Vec<u8>) {
    while into.len() < at_least {
        let (missed, bytes) = events.output().await.expect("the counter counts");
        assert_eq!(missed, 0);
        into.extend(bytes);
    }
}

/// What a counter that lost nothing has written.
fn counted(bytes: &[u8]) {
    let all: String = (1..100_000).map(|n| format!("{n}\n")).collect();
    assert_eq!(
        String::from_utf8_lossy(bytes),
        all[..bytes.len()],
        "lost, doubled or mangled"
    );
}

pub(crate) async fn g26_a_pause_in_the_middle_of_everything(server: &Server) {
    let api = server.api();
    let sandbox = Secured::create(&api).await;
    let sum = make_big(&api, &sandbox).await;
    let (_, mut events) = sandbox.start("counter", COUNT, false).await;
    let mut seen = Vec::new();
    read_lines(&mut events, 40, &mut seen).await;
    let (shell, terminal) = sandbox.start("terminal", "exec bash --norc", true).await;
    let (answer, first) = start_download(&sandbox).await;
    let (_go_on, held) = tokio::sync::oneshot::channel();
    let upload = stalled_upload(&sandbox, held);
    // The upload has begun when the guest holds its first part under no name.
    let began = || async {
        let open = "ls -l /proc/$(pgrep -x envd)/fd | grep -c deleted";
        let count = api
            .exec(&sandbox.id, "/usr/bin/sudo", &["bash", "-c", open])
            .await;
        (count["stdout"] != "0\n").then_some(())
    };
    eventually("the upload has begun", Duration::from_secs(20), began).await;
    let before = agent_sockets(&api, &sandbox.id).await;
    assert!(before.len() >= 4, "{before:?}");

    api.post(&format!("/v1/sandboxes/{}/pause", sandbox.id), &json!({}))
        .await
        .expect(200);
    // Both ends of what was under way are told that it broke.
    let broken = finish_download(answer, first).await;
    assert!(broken.is_err(), "a cut download looked whole");
    let refused = upload.await.expect("it did not panic");
    assert!(
        !matches!(refused, Ok(200..=299)),
        "a cut upload looked whole: {refused:?}"
    );
    while let Some((missed, bytes)) = events.output().await {
        assert_eq!(missed, 0);
        seen.extend(bytes);
    }
    drop(terminal);

    api.post(&format!("/v1/sandboxes/{}/resume", sandbox.id), &json!({}))
        .await
        .expect(200);
    // The very first request, by the same client, goes through.
    let from = seen.len() as u64;
    let follow = |tag: &str| json!({"process": {"tag": tag}});
    let mut again = sandbox
        .stream("Connect", &follow("counter"), Some(from))
        .await;
    let wanted = seen.len() + 200;
    read_lines(&mut again, wanted, &mut seen).await;
    counted(&seen);
    let after = agent_sockets(&api, &sandbox.id).await;
    let old: Vec<_> = before.intersection(&after).collect();
    assert!(old.is_empty(), "sockets from before the freeze: {old:?}");
    let left = "test -e uploaded && echo there; ls -A | sort | tr '\\n' ' '";
    let said = api.shell(&sandbox.id, left).await;
    assert!(!said.contains("uploaded") && said.contains("big"), "{said}");
    // The terminal still has its program.
    let ended = sandbox.stream("Connect", &follow("terminal"), None).await;
    let typed = base64::engine::general_purpose::STANDARD.encode("exit 5\n");
    let input = json!({"process": {"pid": shell}, "input": {"pty": typed}});
    sandbox.call("SendInput", &input).await;
    assert_eq!(ended.end().await["exitCode"], 5);
    let (answer, first) = start_download(&sandbox).await;
    let whole = finish_download(answer, first).await.expect("whole");
    assert_eq!(sha256(&whole), sum);
    let (go_on, held) = tokio::sync::oneshot::channel();
    drop(go_on);
    let upload = stalled_upload(&sandbox, held).await.expect("no panic");
    assert_eq!(upload, Ok(200));
    api.destroy(&sandbox.id).await;
}

/// A checkpoint only stands still for a moment: whoever is in the middle of something notices
/// nothing.
pub(crate) async fn a_checkpoint_in_the_middle_breaks_nothing(server: &Server) {
    let api = server.api();
    let sandbox = Secured::create(&api).await;
    let sum = make_big(&api, &sandbox).await;
    let (_, mut events) = sandbox.start("counter", COUNT, false).await;
    let mut seen = Vec::new();
    read_lines(&mut events, 40, &mut seen).await;
    let (answer, first) = start_download(&sandbox).await;
    let (go_on, held) = tokio::sync::oneshot::channel();
    let upload = stalled_upload(&sandbox, held);
    for name in ["one", "two"] {
        let path = format!("/v1/sandboxes/{}/checkpoints", sandbox.id);
        api.post(&path, &json!({"name": name})).await.expect(201);
        let wanted = seen.len() + 100;
        read_lines(&mut events, wanted, &mut seen).await;
    }
    counted(&seen);
    let whole = finish_download(answer, first).await.expect("whole");
    assert_eq!(sha256(&whole), sum);
    drop(go_on);
    assert_eq!(upload.await.expect("no panic"), Ok(200));
    let length = api.shell(&sandbox.id, "stat -c %s uploaded").await;
    assert_eq!(length, format!("{}\n", 4 << 20));
    api.destroy(&sandbox.id).await;
}

/// Counts to 200 within some seconds.
const COUNT_UP: &str = "for i in $(seq 200); do echo $i; sleep 0.02; done; exit 3";

/// Whoever waits for a program waits for it through whatever becomes of its machine, but for an
/// end.
pub(crate) async fn g05_a_program_is_followed_through_pauses(server: &Server) {
    let api = server.api();
    let id = api.create(&json!({})).await;
    let path = format!("/v1/sandboxes/{id}");
    let (exec, run) = (api.clone(), format!("{path}/exec"));
    let body = json!({"cmd": "/bin/bash", "args": ["-c", COUNT_UP], "timeout_sec": 120});
    let exec = tokio::spawn(async move { exec.post(&run, &body).await });
    let cli = server.cli();
    let args = ["sandbox", "exec", &id, "--", "/bin/bash", "-c", COUNT_UP].map(str::to_owned);
    let followed = tokio::spawn(async move { cli.run(&args).await });
    let begun = || async {
        let line = "pgrep -c -f 'seq 200' || true";
        let running = api.shell(&id, line).await;
        // The line that asks has it in its own command.
        (running.trim() == "3").then_some(())
    };
    eventually("both run", Duration::from_secs(60), begun).await;
    let point = json!({"name": "point"});
    let checkpoint = api.post(&format!("{path}/checkpoints"), &point).await;
    checkpoint.expect(201);
    for _ in 0..2 {
        api.post(&format!("{path}/pause"), &json!({}))
            .await
            .expect(200);
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(!exec.is_finished() && !followed.is_finished());
        api.post(&format!("{path}/resume"), &json!({}))
            .await
            .expect(200);
    }
    let all: String = (1..=200).map(|n| format!("{n}\n")).collect();
    let ran = exec.await.expect("no panic").expect(200).json();
    assert_eq!(
        (&ran["stdout"], &ran["exit_code"]),
        (&json!(all), &json!(3))
    );
    assert_eq!(ran["timed_out"], false, "{ran}");
    let followed = followed.await.expect("no panic").expect_code(3);
    assert_eq!(followed.stdout, all);
    api.destroy(&id).await;
}

/// What a program wrote is not taken back when its sandbox is, so it is not followed any more.
/// One whose sandbox stays paused is answered for when its time is over.
pub(crate) async fn g05_a_program_that_is_put_back_is_followed_no_more(server: &Server) {
    let api = server.api();
    let id = api.create(&json!({})).await;
    let path = format!("/v1/sandboxes/{id}");
    let point = json!({"name": "point"});
    let checkpoint = api.post(&format!("{path}/checkpoints"), &point).await;
    checkpoint.expect(201);
    let start = |secs: u32| {
        let (api, run) = (api.clone(), format!("{path}/exec"));
        let body = json!({"cmd": "sleep", "args": ["600"], "timeout_sec": secs});
        tokio::spawn(async move { api.post(&run, &body).await })
    };
    let sleeps = || async {
        let running = api.shell(&id, "pgrep -c -x sleep || true").await;
        (running.trim() == "1").then_some(())
    };
    let exec = start(0);
    eventually("it runs", Duration::from_secs(30), sleeps).await;
    let back = json!({"checkpoint": "point"});
    api.post(&format!("{path}/rollback"), &back)
        .await
        .expect(200);
    let ended = exec.await.expect("no panic");
    ended.expect_error(409, "invalid_state", &["put back to another moment"]);

    let exec = start(8);
    eventually("it runs", Duration::from_secs(30), sleeps).await;
    api.post(&format!("{path}/pause"), &json!({}))
        .await
        .expect(200);
    let ended = exec.await.expect("no panic");
    ended.expect_error(409, "invalid_state", &["paused"]);
    api.destroy(&id).await;
}
