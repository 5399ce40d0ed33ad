//! What is under way in a sandbox when its machine dies: a dead guest closes no connection, so
//! each of these would wait as long as it may.

use std::time::{Duration, Instant};

use futures::stream;
use reqwest::{Body, Method};
use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};
use wrenn_e2e::{Answer, Api, Server, eventually};

use crate::secured::Secured;
use crate::server::monitor_of;

/// A program, run to an end that it does not come to.
fn endless_exec(api: &Api, id: &str) -> tokio::task::JoinHandle<Answer> {
    let (api, path) = (api.clone(), format!("/v1/sandboxes/{id}/exec"));
    let body = json!({"cmd": "sleep", "args": ["600"], "timeout_sec": 0});
    tokio::spawn(async move { api.post(&path, &body).await })
}

/// Waits until so many of these run in the guest.
async fn until_running(api: &Api, id: &str, program: &str, count: usize) {
    let line = format!("pgrep -c -x {program} || true");
    eventually("they run", Duration::from_secs(60), || async {
        let running = api.shell(id, &line).await;
        (running.trim() == count.to_string()).then_some(())
    })
    .await;
}

#[track_caller]
fn told_of_its_death(answer: Answer, cause: &str) -> Value {
    let parts = ["died while this was under way"];
    let answer = answer.expect_error(502, "sandbox_died", &parts);
    let error = answer.json()["error"].clone();
    assert_eq!(error["cause"], cause, "{error}");
    assert_eq!(error["state"], "error", "{error}");
    error
}

pub(crate) async fn g06_what_is_under_way_ends_with_its_machine(server: &Server) {
    let api = server.api();
    let sandbox = Secured::create(&api).await;
    let id = &sandbox.id;
    let exec = endless_exec(&api, id);
    // Followed, by the native API.
    let (cli, args) = (server.cli(), ["sandbox", "exec", id, "--", "sleep", "600"]);
    let args = args.map(str::to_owned);
    let followed = tokio::spawn(async move { cli.run(&args).await });
    // Followed through the proxy, as E2B's clients do.
    let (_, mut events) = sandbox.start("sleeper", "exec sleep 600", false).await;
    // An upload that waits for its client.
    let parts = stream::once(async { Ok::<_, std::io::Error>(vec![7u8; 1 << 20]) });
    let parts = stream::StreamExt::chain(parts, stream::pending());
    let (upload, uploader) = (id.clone(), api.clone());
    let upload = tokio::spawn(async move {
        let path = format!("/v1/sandboxes/{upload}/files/write");
        let file = reqwest::multipart::Part::stream(Body::wrap_stream(parts)).file_name("f");
        let form = reqwest::multipart::Form::new().text("path", "/home/user/f");
        let request = uploader.request(Method::POST, &path);
        uploader
            .send(request.multipart(form.part("file", file)))
            .await
    });
    until_running(&api, id, "sleep", 3).await;

    let folder = server.machine_folder(id).expect("its machine's folder");
    let died = Instant::now();
    kill_process(monitor_of(&folder), Signal::KILL).expect("QEMU is there");
    let error = told_of_its_death(exec.await.expect("no panic"), "killed");
    let message = error["message"].as_str().unwrap_or_default();
    assert!(message.contains("signal 9"), "{error}");
    let followed = followed.await.expect("no panic").expect_code(125);
    followed.expect_stderr(&["died while this was under way", "wrenn sandbox why"]);
    told_of_its_death(upload.await.expect("no panic"), "killed");
    while events.output().await.is_some() {}
    let took = died.elapsed();
    assert!(took < Duration::from_secs(10), "told after {took:?}");
    // What comes later meets a sandbox that is over.
    let path = format!("/v1/sandboxes/{id}/exec");
    let late = api.post(&path, &json!({"cmd": "true"})).await;
    late.expect_error(409, "invalid_state", &["not running"]);
}

/// A guest that goes down by itself closes its connections first.
pub(crate) async fn what_is_under_way_ends_with_a_guest_that_is_powered_off(server: &Server) {
    let api = server.api();
    let id = api.create(&json!({})).await;
    let exec = endless_exec(&api, &id);
    until_running(&api, &id, "sleep", 1).await;
    let off = "echo o | sudo tee /proc/sysrq-trigger; sleep 60";
    let body = json!({"cmd": "/bin/bash", "args": ["-c", off]});
    let path = format!("/v1/sandboxes/{id}/exec");
    let asked = Instant::now();
    told_of_its_death(api.post(&path, &body).await, "powered_off");
    told_of_its_death(exec.await.expect("no panic"), "powered_off");
    let took = asked.elapsed();
    assert!(took < Duration::from_secs(20), "told after {took:?}");
}
