//! What differs between a sandbox and its past, or between two, in real machines.

use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};
use wrenn_e2e::{Api, HostState, Server};

/// Files, processes and ports that differ, each as sign and name, in order.
async fn diff(api: &Api, id: &str, query: &str) -> (Value, Vec<String>) {
    let start = Instant::now();
    let path = format!("/v1/sandboxes/{id}/diff?{query}");
    let answer = api.get(&path).await.expect(200);
    let timing = answer.headers.get("server-timing").cloned();
    eprintln!("diff {query}: {:?}, {timing:?}", start.elapsed());
    let diff = answer.json();
    assert_eq!(
        (&diff["truncated"], &diff["unread_files"]),
        (&json!(false), &json!(0)),
        "{diff}"
    );
    let sign = |one: &Value| match one["change"].as_str() {
        Some("added") => "+",
        Some("removed") => "-",
        _ => "~",
    };
    let told = |list: &str, name: &str| -> Vec<String> {
        let all = diff[list].as_array().expect("a list").iter();
        let name = |one: &Value| {
            one[name]
                .as_str()
                .map_or_else(|| one[name].to_string(), str::to_owned)
        };
        all.map(|one| format!("{}{}", sign(one), name(one)))
            .collect()
    };
    let all = [
        told("files", "path"),
        told("processes", "command"),
        told("ports", "port"),
    ]
    .concat();
    (diff, all)
}

async fn saved(api: &Api, id: &str, verb: &str, body: Value) -> Value {
    let path = format!("/v1/sandboxes/{id}/{verb}");
    let answer = api.post(&path, &body).await;
    assert!((200..300).contains(&answer.status), "{}", answer.describe());
    answer.json()
}

pub(crate) async fn a_diff_shows_exactly_what_was_done(server: &Server) {
    let api = server.api();
    let id = api.create(&json!({})).await;
    let before = "mkdir -p /home/user/d; cd /home/user/d; echo one > kept; echo one > touched; \
        echo one > written; echo one > gone; echo one > rights; echo one > inside; ln -s kept link; \
        mkdir tree; echo one > tree/leaf; echo one > /tmp/t; \
        (sleep 1234 >/dev/null 2>&1 &) ; sync";
    api.shell(&id, before).await;
    saved(&api, &id, "checkpoints", json!({"name": "before"})).await;
    let (_, nothing) = diff(&api, &id, "against=before").await;
    assert_eq!(nothing, Vec::<String>::new());

    let server_line = "cd /home/user/d; touch touched; echo two > written; rm gone; chmod 600 rights; \
        echo new > new; ln -sfn gone link; rm -r tree; echo two > /tmp/t; echo three > /dev/shm/unseen; \
        pkill -f '^sleep 1234'; \
        setsid python3 -m http.server 8123 >/dev/null 2>&1 < /dev/null & \
        for n in $(seq 200); do (echo > /dev/tcp/127.0.0.1/8123) 2>/dev/null && break; sleep 0.05; done";
    api.shell(&id, server_line).await;
    let expected = [
        "-/home/user/d/gone",
        "~/home/user/d/link",
        "+/home/user/d/new",
        "~/home/user/d/rights",
        "-/home/user/d/tree",
        "-/home/user/d/tree/leaf",
        "~/home/user/d/written",
        "~/tmp/t",
        "+python3 -m http.server 8123",
        "-sleep 1234",
        "+8123",
    ];
    let (found, all) = diff(&api, &id, "against=before").await;
    assert_eq!(all, expected, "{found:#}");
    let written = &found["files"][6];
    assert_eq!(
        (
            &written["type"],
            &written["size"],
            &written["before"]["mode"]
        ),
        (&json!("file"), &json!(4), &json!("0644"))
    );
    let (_, below) = diff(&api, &id, "against=before&path=/home/user/d/tree").await;
    assert_eq!(
        below[..2],
        ["-/home/user/d/tree", "-/home/user/d/tree/leaf"]
    );
    let limited = format!("/v1/sandboxes/{id}/diff?against=before&limit=2");
    let limited = api.get(&limited).await.expect(200).json();
    assert_eq!(limited["truncated"], true);
    assert_eq!(limited["files"].as_array().map(Vec::len), Some(2));

    // A fork has all of its parent; what each does then is its own. Its names are no difference.
    let forked = saved(&api, &id, "fork", json!({})).await;
    let child = forked[0]["id"].as_str().expect("an id").to_owned();
    let (found, all) = diff(&api, &child, &format!("against={id}")).await;
    assert_eq!(all, Vec::<String>::new(), "{found:#}");
    api.shell(
        &child,
        "echo child > /home/user/d/kept; echo x > /home/user/d/child",
    )
    .await;
    api.shell(&id, "echo xxxxx > /home/user/d/kept").await;
    let expected = ["+/home/user/d/child", "~/home/user/d/kept"];
    let (found, all) = diff(&api, &child, &format!("against={id}")).await;
    assert_eq!(all, expected, "{found:#}");
    // The same when the one, the other or both are paused, and they stay so.
    saved(&api, &id, "pause", json!({})).await;
    let (found, all) = diff(&api, &child, &format!("against={id}")).await;
    assert_eq!(all, expected, "{found:#}");
    saved(&api, &child, "pause", json!({})).await;
    let (found, all) = diff(&api, &id, &format!("against={child}")).await;
    assert_eq!(
        all,
        ["-/home/user/d/child", "~/home/user/d/kept"],
        "{found:#}"
    );
    for one in [&id, &child] {
        assert!(
            server.machine_folder(one).is_none(),
            "a diff leaves a machine"
        );
        let state = api.get(&format!("/v1/sandboxes/{one}")).await.json();
        assert_eq!(state["status"], "paused");
    }
    // Whatever was compared goes on as if nobody had looked.
    saved(&api, &id, "resume", json!({})).await;
    let line = "cat /home/user/d/kept; pgrep -cf '^python3 -m http.server 8123'";
    assert_eq!(api.shell(&id, line).await, "xxxxx\n1\n");
    api.get(&format!("/v1/sandboxes/{id}/diff?against=never"))
        .await
        .expect_error(404, "not_found", &["never"]);
    api.get(&format!(
        "/v1/sandboxes/{id}/diff?against=before&path=/proc"
    ))
    .await
    .expect_error(400, "invalid_request", &["compared"]);
    api.destroy(&id).await;
    api.destroy(&child).await;
}

/// Cut off by whoever asked nothing ends early, and by the server's end, however it comes, no
/// machine and no pin stays.
pub(crate) async fn g07_a_diff_that_is_cut_off_leaves_nothing(data_dir: &Path) {
    const PATIENCE: Duration = Duration::from_secs(60);
    let mut server = Server::start(data_dir).await;
    let api = server.api();
    let id = api.create(&json!({})).await;
    saved(&api, &id, "checkpoints", json!({"name": "point"})).await;
    drop(api);
    // A server that has saved nothing has no monitor standing by, as those after it.
    server.signal(Signal::TERM);
    server.wait().await;
    server = Server::start(data_dir).await;
    let pid = server.pid();
    let before = HostState::settled(data_dir, Some(pid), PATIENCE).await;
    let machines = before.count("process qemu");
    let path = format!("/v1/sandboxes/{id}/diff?against=point");
    for signal in [None, Some(Signal::KILL), Some(Signal::TERM)] {
        let (api, path) = (server.api(), path.clone());
        let asked = tokio::spawn(async move {
            let request = api.request(reqwest::Method::GET, &path);
            // Nobody waits for the answer.
            drop(request.send().await);
        });
        wrenn_e2e::eventually("it is being compared", PATIENCE, || async {
            let now = HostState::read(data_dir, Some(server.pid()));
            (now.count("process qemu") > machines).then_some(())
        })
        .await;
        asked.abort();
        if let Some(signal) = signal {
            server.signal(signal);
            server.wait().await;
            if signal == Signal::TERM {
                let left = HostState::read(data_dir, None);
                assert_eq!(left.count("process qemu"), 1, "only the sandbox's stays");
            }
            server = Server::start(data_dir).await;
        }
        let pid = server.pid();
        HostState::wait_for_return(&before, data_dir, Some(pid), PATIENCE).await;
    }
    assert_eq!(server.api().shell(&id, "echo there").await, "there\n");
    server.destroy().await;
    HostState::read(data_dir, None).expect_nothing_alive();
}
