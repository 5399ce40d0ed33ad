//! E2B's clients' routes: raw requests, and the published client where it is installed.

use serde_json::{Value, json};

use crate::support::{bed, now_ms};

#[tokio::test]
async fn a_sandbox_lives_by_the_e2b_routes() {
    let bed = bed().await;
    let body = json!({"templateID": "base", "timeout": 60, "metadata": {"a b": "c&d"}, "envVars": {"X": "1"},
        "autoPauseMemory": true, "network": {"allowPublicTraffic": true, "allowOut": []}, "mcp": null});
    let (status, made) = bed.call("POST", "/v2/sandboxes", Some(body)).await;
    assert_eq!(status, 201, "{made}");
    for (field, value) in [
        ("templateID", json!("minimal")),
        ("clientID", json!("wrenn")),
        ("envdVersion", json!("0.6.13")),
        ("envdAccessToken", json!("token-of-envd")),
        ("domain", Value::Null),
        ("trafficAccessToken", Value::Null),
    ] {
        assert_eq!(made[field], value, "{field}");
    }
    let id = made["sandboxID"].as_str().unwrap();
    let asked = bed.sim.created.lock().unwrap()[0].clone();
    assert!(asked.secure && asked.allow_internet);
    let left = asked.lifetime.end_at_unix_ms - now_ms();
    assert!((50_000..=60_000).contains(&left), "{left}");

    let (status, detail) = bed.call("GET", &format!("/sandboxes/{id}"), None).await;
    assert_eq!(status, 200);
    for field in [
        "templateID",
        "sandboxID",
        "clientID",
        "startedAt",
        "endAt",
        "envdVersion",
        "cpuCount",
        "memoryMB",
        "diskSizeMB",
    ] {
        assert!(!detail[field].is_null(), "{field}: {detail}");
    }
    assert_eq!(
        (&detail["state"], &detail["lifecycle"]["onTimeout"]),
        (&json!("running"), &json!("kill"))
    );
    for (path, count) in [
        ("/sandboxes", 1),
        ("/v2/sandboxes?state=running,paused", 1),
        ("/v2/sandboxes?state=paused", 0),
        ("/v2/sandboxes?metadata=a%2520b%3Dc%2526d", 1),
        ("/sandboxes?metadata=a%2520b%3Dother", 0),
        ("/v2/sandboxes?template=base", 1),
        ("/v2/sandboxes?order=asc&limit=1", 1),
    ] {
        let (status, list) = bed.call("GET", path, None).await;
        assert_eq!(
            (status, list.as_array().unwrap().len()),
            (200, count),
            "{path}"
        );
    }

    let end = || {
        bed.sim.sandboxes.lock().unwrap()[id]
            .lifetime
            .end_at_unix_ms
            - now_ms()
    };
    let path = format!("/sandboxes/{id}");
    for way in ["/sandboxes", "/v2/sandboxes"] {
        let connect = format!("{way}/{id}/connect");
        let (status, body) = bed
            .call("POST", &connect, Some(json!({"timeout": 5})))
            .await;
        assert_eq!((status, &body["sandboxID"]), (200, &json!(id)));
        assert_eq!(body["envdAccessToken"], "token-of-envd");
    }
    assert!(end() > 45_000, "connecting never shortens");
    assert_eq!(
        bed.call(
            "POST",
            &format!("{path}/timeout"),
            Some(json!({"timeout": 10}))
        )
        .await
        .0,
        204
    );
    assert!(end() <= 10_000, "setting may shorten");
    assert_eq!(
        bed.call(
            "POST",
            &format!("{path}/refreshes"),
            Some(json!({"duration": 100}))
        )
        .await
        .0,
        204
    );
    assert!(end() > 90_000);
    let (_, logs) = bed.call("GET", &format!("{path}/logs"), None).await;
    assert_eq!(
        (&logs["logs"][1]["line"], &logs["logEntries"][1]["message"]),
        (&json!("ready"), &json!("ready"))
    );

    assert_eq!(bed.call("DELETE", &path, None).await.0, 204);
    for (method, path) in [
        ("DELETE", path.clone()),
        ("GET", path.clone()),
        ("POST", format!("{path}/connect")),
    ] {
        let (status, body) = bed.call(method, &path, Some(json!({}))).await;
        assert_eq!(
            (status, &body["code"]),
            (404, &json!(404)),
            "{method} {path}"
        );
    }
}

#[tokio::test]
async fn lists_have_pages_in_both_orders() {
    let bed = bed().await;
    let mut ids = Vec::new();
    for _ in 0..5 {
        ids.push(bed.create().await);
    }
    for limit in [1, 2, 5, 100] {
        for order in ["asc", "desc"] {
            let path = format!("/v2/sandboxes?order={order}&limit={limit}");
            let mut seen: Vec<String> = bed
                .pages(&path, "nextToken")
                .await
                .iter()
                .map(|one| one["sandboxID"].as_str().unwrap().to_owned())
                .collect();
            if order == "desc" {
                seen.reverse();
            }
            assert_eq!(seen, ids, "{path}");
        }
    }
    let reply = bed
        .request("GET", "/v2/sandboxes?limit=2")
        .send()
        .await
        .unwrap();
    assert_eq!(reply.headers()["x-total-running"], "5");
    for query in ["nextToken=x", "limit=0", "limit=101"] {
        let path = format!("/v2/sandboxes?{query}");
        let (status, answer) = bed.call("GET", &path, None).await;
        assert_eq!((status, &answer["code"]), (400, &json!(400)), "{query}");
    }
}

#[tokio::test]
async fn what_was_moved_says_where_the_time_went() {
    let bed = bed().await;
    let body = json!({"templateID": "base", "timeout": 60});
    let (_, made) = bed.call("POST", "/v2/sandboxes", Some(body)).await;
    let id = made["sandboxID"].as_str().unwrap();
    let pause = json!({"memory": true, "requireHealthyGuest": true});
    for (verb, body, status, phase) in [
        ("snapshots", json!({}), 201, "frozen;dur=2.500"),
        ("fork", json!({}), 201, "frozen;dur=2.500"),
        ("pause", pause, 204, "frozen;dur=2.500"),
        (
            "resume",
            json!({"autoPause": false}),
            201,
            "verify;dur=2.500",
        ),
        ("pause", json!({}), 204, "frozen;dur=2.500"),
        ("connect", json!({"timeout": 60}), 201, "verify;dur=2.500"),
    ] {
        let path = format!("/sandboxes/{id}/{verb}");
        let reply = bed.request("POST", &path).json(&body).send().await.unwrap();
        assert_eq!(reply.status(), status, "{verb}");
        assert_eq!(reply.headers()["server-timing"], phase, "{verb}");
    }
}

#[tokio::test]
async fn a_resume_may_say_that_it_is_paused_at_its_end_and_else_keeps_what_was_said() {
    let bed = bed().await;
    for (created, asked, at_end) in [
        (false, json!(true), "pause"),
        (false, json!(false), "kill"),
        (false, json!(null), "kill"),
        (true, json!(true), "pause"),
        (true, json!(false), "pause"),
        (true, json!(null), "pause"),
    ] {
        let body = json!({"templateID": "base", "timeout": 60, "autoPause": created});
        let (_, made) = bed.call("POST", "/v2/sandboxes", Some(body)).await;
        let path = format!("/sandboxes/{}", made["sandboxID"].as_str().unwrap());
        let pause = format!("{path}/pause");
        assert_eq!(bed.call("POST", &pause, None).await.0, 204);
        let resume = json!({"timeout": 60, "autoPause": asked});
        let resumed = format!("{path}/resume");
        let (code, answer) = bed.call("POST", &resumed, Some(resume)).await;
        assert_eq!(code, 201, "{created} {asked}: {answer}");
        let (_, seen) = bed.call("GET", &path, None).await;
        assert_eq!(seen["lifecycle"]["onTimeout"], at_end);
        assert_eq!(seen["state"], "running");
    }
}

#[tokio::test]
async fn clients_that_connect_at_the_same_time_never_shorten() {
    let bed = bed().await;
    let body = json!({"templateID": "base", "timeout": 30});
    let (_, made) = bed.call("POST", "/v2/sandboxes", Some(body)).await;
    let id = made["sandboxID"].as_str().unwrap();
    let path = format!("/v2/sandboxes/{id}/connect");
    let begun = now_ms();
    // The host is slow, so that all of them read the end that was before.
    bed.sim.slow_to_answer("lifetime", 20);
    let connects = (1..=16u64).map(|n| {
        // The longest in the middle.
        let timeout = if n == 8 { 5000 } else { 100 * n };
        bed.call("POST", &path, Some(json!({ "timeout": timeout })))
    });
    for (status, body) in futures::future::join_all(connects).await {
        assert_eq!(status, 200, "{body}");
    }
    let host = bed.sim.sandboxes.lock().unwrap()[id]
        .lifetime
        .end_at_unix_ms;
    assert!(host - begun >= 5_000_000, "{}", host - begun);
    let (_, seen) = bed.call("GET", &format!("/v1/sandboxes/{id}"), None).await;
    let told = wrenn_store::Timestamp::from_unix_ms(host).to_string();
    assert_eq!(
        seen["end_at"],
        told.as_str(),
        "the row says what the host does"
    );
}

#[tokio::test]
async fn what_is_not_offered_is_refused_by_name() {
    let bed = bed().await;
    for (body, word) in [
        (
            json!({"templateID": "base", "timeout": 0}),
            "greater than 0",
        ),
        (
            json!({"templateID": "base", "timeout": 1u64 << 40}),
            "Timeout",
        ),
        (
            json!({"templateID": "base", "autoPauseMemory": false}),
            "requires autoPause",
        ),
        (
            json!({"templateID": "base", "autoPause": true, "autoPauseMemory": false, "autoResume": {"enabled": true}}),
            "exclude",
        ),
        (
            json!({"templateID": "base", "network": {"allowPublicTraffic": false}}),
            "network.allowPublicTraffic",
        ),
        (
            json!({"templateID": "base", "network": {"rules": {"a.example": [{}, {"transform": {"headers": {"x": "y"}}}]}}}),
            "network.rules",
        ),
        (
            json!({"templateID": "base", "network": {"egressProxy": {"address": "1.2.3.4:80"}}}),
            "network.egressProxy",
        ),
        (
            json!({"templateID": "base", "network": {"dnsServers": ["1.1.1.1"]}}),
            "network.dnsServers",
        ),
        (
            json!({"templateID": "base", "network": {"denyOut": "0.0.0.0/0"}}),
            "network.denyOut",
        ),
        (
            json!({"templateID": "base", "network": {"allowOut": ["pypi.org"]}}),
            "0.0.0.0/0",
        ),
        (
            json!({"templateID": "base", "volumeMounts": [{"name": "a", "path": "/b"}]}),
            "volumeMounts",
        ),
        (json!({"templateID": "base", "tomorrow": 1}), "tomorrow"),
        (json!({}), "templateID"),
    ] {
        let (status, answer) = bed.call("POST", "/v2/sandboxes", Some(body.clone())).await;
        assert_eq!(
            (status, &answer["code"]),
            (400, &json!(400)),
            "{body}: {answer}"
        );
        assert!(
            answer["message"].as_str().unwrap().contains(word),
            "{body}: {answer}"
        );
    }
    let (status, answer) = bed
        .call("POST", "/sandboxes", Some(json!({"templateID": "x:v2"})))
        .await;
    assert_eq!((status, &answer["code"]), (404, &json!(404)));
    for (method, path) in [
        ("GET", "/templates"),
        ("GET", "/templates/aliases/x"),
        ("POST", "/v3/templates"),
        ("GET", "/volumes"),
    ] {
        let reply = bed.request(method, path).send().await.unwrap();
        assert_eq!(reply.status(), 501, "{method} {path}");
        assert_eq!(reply.headers()["should-retry"], "false");
        assert_eq!(reply.json::<Value>().await.unwrap()["code"], 501);
    }
    let (status, answer) = bed.call("GET", "/sandboxes/nonexisting", None).await;
    assert_eq!((status, &answer["code"]), (404, &json!(404)));
    assert_eq!(
        bed.call("GET", "/nothing", None).await,
        (404, bed.call("GET", "/nothing", None).await.1)
    );
    assert!(bed.sim.created.lock().unwrap().is_empty());
}

#[tokio::test]
async fn the_proxy_is_in_front_of_the_api() {
    let bed = bed().await;
    let id = bed.create().await;
    let guest = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    *bed.dialer.guest.lock().unwrap() = Some(guest.local_addr().unwrap());
    let echo = |headers: http::HeaderMap| async move { format!("{headers:?}") };
    let app = axum::Router::new().fallback(axum::routing::any(echo));
    let server = tokio::spawn(async move { axum::serve(guest, app).await.unwrap() });
    for headers in [
        [("host", format!("8080-{id}.localhost")), ("x", "1".into())],
        [
            ("e2b-sandbox-id", id.clone()),
            ("e2b-sandbox-port", "49983".into()),
        ],
    ] {
        let mut request = bed.request("GET", "/v1/sandboxes");
        for (name, value) in headers {
            request = request.header(name, value);
        }
        let reply = request.send().await.unwrap();
        assert_eq!(reply.status(), 200);
        let seen = reply.text().await.unwrap();
        assert!(!seen.contains(&bed.key.reveal()[..12]), "G37: {seen}");
    }
    let used = bed.sim.uses.load(std::sync::atomic::Ordering::SeqCst);
    assert!(used >= 1, "proxied traffic counts as use");
    assert_eq!(
        bed.call("DELETE", &format!("/sandboxes/{id}"), None)
            .await
            .0,
        204
    );
    let reply = bed
        .http
        .get(bed.url("/health"))
        .header("e2b-sandbox-id", &id)
        .header("e2b-sandbox-port", "49983");
    let reply = reply.send().await.unwrap();
    assert_eq!(reply.status(), 502);
    assert_eq!(
        reply.json::<Value>().await.unwrap(),
        json!({"sandboxId": id, "message": "The sandbox was not found", "code": 502})
    );
    server.abort();
}

/// The published client, if `WRENN_E2B_PYTHON` names a Python that has it.
#[tokio::test]
async fn the_python_client_creates_lists_and_kills() {
    let Some(python) = std::env::var_os("WRENN_E2B_PYTHON") else {
        println!("skipped: WRENN_E2B_PYTHON names no Python with the package e2b");
        return;
    };
    let bed = bed().await;
    let script = r#"
from e2b import Sandbox, SandboxQuery
import e2b
s = Sandbox.create("base", timeout=120, metadata={"who": "py test"}, envs={"A": "1"})
i = s.get_info()
assert i.sandbox_id == s.sandbox_id and i.template_id == "minimal" and i.metadata == {"who": "py test"}, i
assert 100 < (i.end_at - i.started_at).total_seconds() < 125, i
page = Sandbox.list(query=SandboxQuery(metadata={"who": "py test"})).next_items()
assert [x.sandbox_id for x in page] == [s.sandbox_id], page
s.set_timeout(30)
assert (s.get_info().end_at - i.end_at).total_seconds() < -60
assert Sandbox.connect(s.sandbox_id, timeout=200).sandbox_id == s.sandbox_id
assert s.kill() is True
assert Sandbox.kill(s.sandbox_id) is False
assert s.is_running() is False
for bad in (lambda: Sandbox.create("no-such-template"), lambda: Sandbox.connect(s.sandbox_id)):
    try:
        bad()
    except e2b.SandboxException as e:
        print(type(e).__name__, e)
    else:
        raise AssertionError("was not refused")
print("all fine")
"#;
    let out = tokio::process::Command::new(python)
        .args(["-c", script])
        .env("E2B_API_URL", bed.url(""))
        .env("E2B_SANDBOX_URL", bed.url(""))
        .env("E2B_API_KEY", bed.key.reveal_e2b())
        .output()
        .await
        .unwrap();
    let text =
        String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    println!("{text}");
    assert!(out.status.success() && text.contains("all fine"), "{text}");
}
