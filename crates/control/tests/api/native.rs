//! The native API over a real connection, on a host without machines.

use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::{bed, bed_in};

#[tokio::test]
async fn a_sandbox_is_created_seen_used_and_ended() {
    let bed = bed().await;
    let body = json!({"template": "minimal-ubuntu", "metadata": {"who": "me"}, "timeout_sec": 60,
        "env": {"A": "1"}, "network": {"allow_internet": false}});
    let reply = bed
        .request("POST", "/v1/sandboxes")
        .json(&body)
        .send()
        .await
        .unwrap();
    assert_eq!(reply.status(), 201);
    let timing = reply.headers()["server-timing"]
        .to_str()
        .unwrap()
        .to_owned();
    assert!(
        timing.contains("restore;dur=1.500") && timing.contains("total;dur="),
        "{timing}"
    );
    let made: Value = reply.json().await.unwrap();
    assert_eq!(made["status"], "running");
    assert_eq!(
        (&made["template"], &made["vcpus"], &made["memory_mb"]),
        (&json!("minimal"), &json!(1), &json!(512))
    );
    let id = made["id"].as_str().unwrap();

    let asked = bed.sim.created.lock().unwrap()[0].clone();
    assert_eq!(asked.sandbox_id, id);
    assert_eq!(
        (asked.allow_internet, asked.secure, asked.vcpus),
        (false, true, 0)
    );
    assert_eq!(asked.lifetime.idle_timeout_secs, 60);
    assert_eq!(asked.envs["A"], "1");

    let (status, seen) = bed.call("GET", &format!("/v1/capsules/{id}"), None).await;
    assert_eq!((status, &seen["id"]), (200, &made["id"]));
    let (_, list) = bed.call("GET", "/v1/sandboxes?metadata.who=me", None).await;
    assert_eq!(list.as_array().unwrap().len(), 1);
    let (_, list) = bed.call("GET", "/v1/capsules?metadata.who=you", None).await;
    assert_eq!(list, json!([]));
    assert_eq!(
        bed.call("POST", &format!("/v1/sandboxes/{id}/ping"), None)
            .await
            .0,
        204
    );
    assert_eq!(bed.sim.uses.load(Ordering::SeqCst), 1);
    let logs = bed
        .request("GET", &format!("/v1/sandboxes/{id}/logs"))
        .send()
        .await
        .unwrap();
    assert_eq!(logs.text().await.unwrap(), "boot\nready\n");

    assert_eq!(
        bed.call("DELETE", &format!("/v1/sandboxes/{id}"), None)
            .await
            .0,
        204
    );
    assert!(bed.sim.sandboxes.lock().unwrap().is_empty());
    let (status, seen) = bed.call("GET", &format!("/v1/sandboxes/{id}"), None).await;
    assert_eq!((status, &seen["status"]), (200, &json!("stopped")));
    assert_eq!(
        bed.call("DELETE", &format!("/v1/sandboxes/{id}"), None)
            .await
            .0,
        204,
        "already so"
    );
    assert_eq!(bed.call("GET", "/v1/sandboxes", None).await.1, json!([]));
    assert_eq!(
        bed.call("GET", "/v1/sandboxes?state=all", None)
            .await
            .1
            .as_array()
            .unwrap()
            .len(),
        1
    );
    let error = bed
        .refused("POST", &format!("/v1/sandboxes/{id}/ping"), None, 409)
        .await;
    assert_eq!(
        (&error["code"], &error["state"]),
        (&json!("invalid_state"), &json!("stopped"))
    );
}

#[tokio::test]
async fn bad_input_is_refused_by_name_and_leaves_nothing() {
    let bed = bed().await;
    let unknown = bed
        .refused(
            "POST",
            "/v1/sandboxes",
            Some(json!({"template": "nope"})),
            404,
        )
        .await;
    assert_eq!(unknown["code"], "not_found");
    assert_eq!(unknown["templates"], json!(["minimal", "other"]));
    assert!(unknown["message"].as_str().unwrap().contains("`nope`"));
    for (body, word) in [
        (json!({"vcpus": 0}), "vCPU"),
        (json!({"vcpus": 3}), "1 to 2"),
        (json!({"vcpus": -1}), "vCPU"),
        (json!({"vcpus": "two"}), "expected"),
        (json!({"memory_mb": 1}), "memory"),
        (json!({"memory_mb": 513}), "even"),
        (json!({"memory_mb": 1u64 << 40}), "memory"),
        (json!({"timeout_sec": -1}), "timeout_sec"),
        (json!({"on_timeout": "dance"}), "on_timeout"),
        (json!({"metadata": {"": "x"}}), "metadata"),
        (json!({"metadata": {"a": "x".repeat(65)}}), "metadata"),
        (json!({"env": {"A=B": "x"}}), "A=B"),
        (json!({"memroy_mb": 512}), "memroy_mb"),
        (json!({"on_timeout": "explode"}), "explode"),
        (json!({"network": {"allow": true}}), "sequence"),
        (json!({"network": {"allowed": []}}), "allowed"),
        (json!([1]), "expected"),
    ] {
        let error = bed
            .refused("POST", "/v1/sandboxes", Some(body.clone()), 400)
            .await;
        assert_eq!(error["code"], "invalid_request", "{body}");
        assert!(
            error["message"].as_str().unwrap().contains(word),
            "{body}: {error}"
        );
    }
    let raw = |body: Vec<u8>| bed.request("POST", "/v1/sandboxes").body(body).send();
    let reply = raw(b"{\"template\":".to_vec()).await.unwrap();
    assert_eq!(reply.status(), 400);
    assert_eq!(
        reply.json::<Value>().await.unwrap()["error"]["code"],
        "invalid_request"
    );
    let reply = raw(vec![b' '; 3 << 20]).await.unwrap();
    assert_eq!(reply.status(), 413);
    assert_eq!(
        reply.json::<Value>().await.unwrap()["error"]["code"],
        "too_large"
    );

    for id in [
        "x",
        "sb-1",
        "usr-0192f0c8-6a3e-7c3a-9d1e-5b8f3c2a1d00",
        "..%2f",
        "%00",
    ] {
        for (method, path) in [
            ("GET", ""),
            ("DELETE", ""),
            ("POST", "/ping"),
            ("GET", "/logs"),
            ("GET", "/processes"),
        ] {
            bed.refused(method, &format!("/v1/sandboxes/{id}{path}"), None, 400)
                .await;
        }
    }
    let none = "sb-0192f0c8-6a3e-7c3a-9d1e-5b8f3c2a1d00";
    for (method, path, body) in [
        ("GET", "", None),
        ("DELETE", "", None),
        ("POST", "/exec", Some(json!({"cmd": "echo"}))),
        ("POST", "/files/read", Some(json!({"path": "/x"}))),
    ] {
        let error = bed
            .refused(method, &format!("/v1/sandboxes/{none}{path}"), body, 404)
            .await;
        assert!(error["message"].as_str().unwrap().contains(none), "{error}");
    }
    bed.refused("GET", "/v1/sandboxes?limit=0", None, 400).await;
    bed.refused("GET", "/v1/sandboxes?sate=running", None, 400)
        .await;
    bed.refused("GET", "/v1/sandboxes?state=dancing", None, 400)
        .await;
    bed.refused("GET", "/v1/sandboxes?cursor=x", None, 400)
        .await;
    bed.refused("GET", "/v1/nothing", None, 404).await;
    bed.refused("PUT", "/v1/sandboxes", None, 405).await;
    assert!(bed.sim.created.lock().unwrap().is_empty());
    assert_eq!(
        bed.call("GET", "/v1/sandboxes?state=all", None).await.1,
        json!([])
    );
}

#[tokio::test]
async fn a_host_that_cannot_create_is_an_error_with_its_words() {
    let bed = bed().await;
    *bed.sim.broken.lock().unwrap() = Some("400 MiB are free, a sandbox needs 512".into());
    let send = || {
        bed.request("POST", "/v1/sandboxes")
            .header("Idempotency-Key", "k")
            .send()
    };
    let error: Value = send().await.unwrap().json().await.unwrap();
    assert_eq!(error["error"]["code"], "no_hosts_available");
    assert!(
        error["error"]["message"]
            .as_str()
            .unwrap()
            .contains("400 MiB")
    );
    let (_, list) = bed.call("GET", "/v1/sandboxes?state=error", None).await;
    assert!(list[0]["reason"].as_str().unwrap().contains("400 MiB"));
    // The same key may be tried again.
    *bed.sim.broken.lock().unwrap() = None;
    assert_eq!(send().await.unwrap().status(), 201);
}

#[tokio::test]
async fn g10_the_same_idempotency_key_makes_one_sandbox() {
    let bed = bed().await;
    *bed.sim.delay.lock().unwrap() = Duration::from_millis(100);
    let send = |body: Value| {
        bed.request("POST", "/v1/sandboxes")
            .header("Idempotency-Key", "once")
            .json(&body)
            .send()
    };
    let (a, b) = tokio::join!(
        send(json!({"timeout_sec": 5})),
        send(json!({"timeout_sec": 5}))
    );
    let mut statuses = [a.unwrap().status().as_u16(), b.unwrap().status().as_u16()];
    statuses.sort();
    assert_eq!(
        statuses,
        [201, 409],
        "the second while the first is under way"
    );
    let again: Value = send(json!({"timeout_sec": 5}))
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    assert_eq!(again["status"], "running");
    let other = send(json!({"timeout_sec": 6})).await.unwrap();
    assert_eq!(other.status(), 409);
    assert_eq!(
        other.json::<Value>().await.unwrap()["error"]["code"],
        "conflict"
    );
    assert_eq!(bed.sim.created.lock().unwrap().len(), 1);
    let bad = bed
        .request("POST", "/v1/sandboxes")
        .header("Idempotency-Key", "a b")
        .send()
        .await
        .unwrap();
    assert_eq!(bad.status(), 400);
}

#[tokio::test]
async fn g1_a_client_that_hangs_up_interrupts_nothing() {
    let bed = bed().await;
    *bed.sim.delay.lock().unwrap() = Duration::from_millis(200);
    let client = tokio::spawn(bed.request("POST", "/v1/sandboxes").send());
    bed.sim.until_begun("create").await;
    client.abort();
    assert!(client.await.unwrap_err().is_cancelled());
    for _ in 0..50 {
        let (_, list) = bed.call("GET", "/v1/sandboxes?state=running", None).await;
        if list.as_array().unwrap().len() == 1 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("the sandbox was never running");
}

#[tokio::test]
async fn g5_of_two_that_end_a_sandbox_one_wins() {
    let bed = bed().await;
    let id = bed.create().await;
    let path = format!("/v1/sandboxes/{id}");
    let (a, b) = tokio::join!(
        bed.call("DELETE", &path, None),
        bed.call("DELETE", &path, None)
    );
    let ok = [a.0, b.0].iter().filter(|s| **s == 204).count();
    assert!(
        ok >= 1 && [a.0, b.0].iter().all(|s| [204, 409].contains(s)),
        "{a:?} {b:?}"
    );
}

#[tokio::test]
async fn g40_keys_are_made_listed_and_deleted_and_shown_once() {
    let bed = bed().await;
    let file = bed.dir.path().join("api-key");
    assert_eq!(
        std::fs::metadata(&file).unwrap().permissions().mode() & 0o777,
        0o600
    );
    assert_eq!(
        std::fs::read_to_string(&file).unwrap().trim(),
        bed.key.reveal()
    );
    assert!(
        bed.control.ensure_first_key().await.unwrap().is_none(),
        "only once"
    );

    let (status, made) = bed
        .call("POST", "/v1/api-keys", Some(json!({"name": "ci"})))
        .await;
    assert_eq!(status, 201);
    let key = made["key"].as_str().unwrap();
    let list = bed
        .request("GET", "/v1/api-keys")
        .send()
        .await
        .unwrap()
        .text()
        .await
        .unwrap();
    assert!(list.contains(&key[..12]) && !list.contains(key));
    let with = |header: &'static str, value: String| {
        let request = bed.http.get(bed.url("/v1/sandboxes")).header(header, value);
        async move { request.send().await.unwrap().status().as_u16() }
    };
    assert_eq!(with("x-api-key", key.to_owned()).await, 200);
    assert_eq!(with("x-api-key", key.replace("wrn_", "e2b_")).await, 200);
    assert_eq!(with("authorization", format!("Bearer {key}")).await, 200);
    let path = format!("/v1/api-keys/{}", made["id"].as_str().unwrap());
    assert_eq!(bed.call("DELETE", &path, None).await.0, 204);
    assert_eq!(with("x-api-key", key.to_owned()).await, 401);
    bed.refused("DELETE", &path, None, 404).await;
    bed.refused("DELETE", "/v1/api-keys/x", None, 400).await;
    bed.refused("POST", "/v1/api-keys", Some(json!({"name": " "})), 400)
        .await;
}

#[tokio::test]
async fn g3_a_server_that_was_killed_makes_every_state_true_again() {
    let first = bed().await;
    let (kept, lost, ended) = (
        first.create().await,
        first.create().await,
        first.create().await,
    );
    // While nobody looks, one machine is gone and one ended with a reason.
    first.sim.sandboxes.lock().unwrap().remove(&lost);
    first.sim.end(&ended, "stopped", "its time was over");
    // One destroy fails half way, as it would at a crash.
    let stuck = first.create().await;
    first.sim.stuck.store(true, Ordering::SeqCst);
    assert_eq!(
        first
            .call("DELETE", &format!("/v1/sandboxes/{stuck}"), None)
            .await
            .0,
        502
    );
    first.sim.stuck.store(false, Ordering::SeqCst);

    first.control.reconcile().await.unwrap();
    let state = async |id: &str| {
        let (_, body) = first
            .call("GET", &format!("/v1/sandboxes/{id}"), None)
            .await;
        (
            body["status"].as_str().unwrap().to_owned(),
            body["reason"].as_str().unwrap_or("").to_owned(),
        )
    };
    assert_eq!(state(&kept).await, ("running".into(), "".into()));
    assert_eq!(state(&lost).await.0, "stopped");
    assert_eq!(
        state(&ended).await,
        ("stopped".into(), "its time was over".into())
    );
    assert_eq!(state(&stuck).await.0, "stopped");
    assert!(!first.sim.sandboxes.lock().unwrap().contains_key(&stuck));
}

#[tokio::test]
async fn g6_what_ended_by_itself_is_seen_at_the_next_look() {
    let bed = bed().await;
    let id = bed.create().await;
    bed.sim.end(&id, "error", "the VMM died: signal 9");
    let (_, seen) = bed.call("GET", &format!("/v1/sandboxes/{id}"), None).await;
    assert_eq!(
        (&seen["status"], &seen["reason"]),
        (&json!("error"), &json!("the VMM died: signal 9"))
    );
    let id = bed.create().await;
    bed.sim.sandboxes.lock().unwrap().remove(&id);
    let error = bed
        .refused(
            "POST",
            &format!("/v1/sandboxes/{id}/exec"),
            Some(json!({"cmd": "echo"})),
            409,
        )
        .await;
    assert_eq!(error["state"], "stopped");
}

#[tokio::test]
async fn rows_survive_the_server() {
    let bed = bed().await;
    let id = bed.create().await;
    let (sim, dir) = (bed.sim.clone(), tempfile::tempdir().unwrap());
    for entry in std::fs::read_dir(bed.dir.path()).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    let again = bed_in(dir, sim).await;
    let (status, seen) = again
        .call("GET", &format!("/v1/sandboxes/{id}"), None)
        .await;
    assert_eq!((status, &seen["status"]), (200, &json!("running")));
}

#[tokio::test]
async fn lists_have_pages() {
    let bed = bed().await;
    let mut ids = Vec::new();
    for _ in 0..5 {
        ids.push(bed.create().await);
    }
    ids.reverse();
    let (mut seen, mut path) = (Vec::new(), "/v1/sandboxes?limit=2".to_owned());
    loop {
        let reply = bed.request("GET", &path).send().await.unwrap();
        let next = reply
            .headers()
            .get("x-next-cursor")
            .map(|v| v.to_str().unwrap().to_owned());
        let page: Vec<Value> = reply.json().await.unwrap();
        seen.extend(page.iter().map(|s| s["id"].as_str().unwrap().to_owned()));
        let Some(next) = next else { break };
        path = format!("/v1/sandboxes?limit=2&cursor={next}");
    }
    assert_eq!(seen, ids);
}
