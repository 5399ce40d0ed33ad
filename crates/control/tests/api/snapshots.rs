//! Pause, resume, forks, checkpoints and snapshots over a real connection, on a host without
//! machines: what the control plane itself has to keep.

use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::{Bed, Fault, bed};

async fn post(bed: &Bed, path: &str, body: Value) -> (u16, Value) {
    bed.call("POST", path, Some(body)).await
}

async fn status(bed: &Bed, id: &str) -> String {
    let (_, body) = bed.call("GET", &format!("/v1/sandboxes/{id}"), None).await;
    body["status"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_sandbox_is_paused_and_resumed_with_a_certificate() {
    let bed = bed().await;
    let id = bed.create().await;
    let path = |verb: &str| format!("/v1/sandboxes/{id}/{verb}");
    let (code, paused) = post(&bed, &path("pause"), json!({})).await;
    assert_eq!((code, &paused["status"]), (200, &json!("paused")));
    let again = bed.refused("POST", &path("pause"), None, 409).await;
    assert_eq!(
        (&again["code"], &again["state"]),
        (&json!("invalid_state"), &json!("paused"))
    );
    let exec = bed
        .refused("POST", &path("exec"), Some(json!({"cmd": "echo"})), 409)
        .await;
    assert_eq!(exec["state"], "paused");
    let (code, resumed) = post(&bed, &path("resume"), json!({})).await;
    assert_eq!((code, &resumed["status"]), (200, &json!("running")));
    assert_eq!(resumed["restore_certificate"]["generation"], 2);
    assert_eq!(resumed["restore_certificate"]["entropy_reseeded"], true);
    // One that runs stays as it is, and was not restored.
    let (code, still) = post(&bed, &path("resume"), json!({})).await;
    assert_eq!((code, &still["restore_certificate"]), (200, &Value::Null));
    // A paused one can be ended.
    post(&bed, &path("pause"), json!({})).await;
    let path = format!("/v1/sandboxes/{id}");
    assert_eq!(bed.call("DELETE", &path, None).await.0, 204);
    assert_eq!(status(&bed, &id).await, "stopped");
}

#[tokio::test]
async fn g5_of_a_pause_and_an_end_one_wins_and_the_other_is_told_the_state() {
    for first in ["pause", "end"] {
        let bed = bed().await;
        let id = bed.create().await;
        *bed.sim.delay.lock().unwrap() = Duration::from_millis(200);
        let pause_path = format!("/v1/sandboxes/{id}/pause");
        let end_path = format!("/v1/sandboxes/{id}");
        let later = Duration::from_millis(60);
        let pause = async {
            tokio::time::sleep(if first == "pause" {
                Duration::ZERO
            } else {
                later
            })
            .await;
            bed.call("POST", &pause_path, None).await
        };
        let end = async {
            tokio::time::sleep(if first == "end" {
                Duration::ZERO
            } else {
                later
            })
            .await;
            bed.call("DELETE", &end_path, None).await
        };
        let (pause, end) = tokio::join!(pause, end);
        match first {
            "pause" => {
                assert_eq!((pause.0, end.0), (200, 409), "{pause:?} {end:?}");
                assert_eq!(end.1["error"]["state"], "pausing");
                assert_eq!(status(&bed, &id).await, "paused");
            }
            _ => {
                assert_eq!((pause.0, end.0), (409, 204), "{pause:?} {end:?}");
                assert_eq!(status(&bed, &id).await, "stopped");
            }
        }
    }
}

#[tokio::test]
async fn g5_of_two_resumes_one_restores() {
    let bed = bed().await;
    let id = bed.create().await;
    let path = |verb: &str| format!("/v1/sandboxes/{id}/{verb}");
    post(&bed, &path("pause"), json!({})).await;
    *bed.sim.delay.lock().unwrap() = Duration::from_millis(150);
    let resume = path("resume");
    let (a, b) = tokio::join!(
        bed.call("POST", &resume, None),
        bed.call("POST", &resume, None)
    );
    let mut codes = [a.0, b.0];
    codes.sort_unstable();
    assert_eq!(codes, [200, 409], "{a:?} {b:?}");
    assert_eq!(status(&bed, &id).await, "running");
}

#[tokio::test]
async fn g5_of_two_that_connect_neither_is_told_that_it_is_gone() {
    let bed = bed().await;
    let body = json!({"templateID": "base", "timeout": 60});
    let (_, made) = post(&bed, "/v2/sandboxes", body).await;
    let id = made["sandboxID"].as_str().unwrap();
    let pause = format!("/sandboxes/{id}/pause");
    assert_eq!(bed.call("POST", &pause, None).await.0, 204);
    *bed.sim.delay.lock().unwrap() = Duration::from_millis(150);
    let connect = format!("/v2/sandboxes/{id}/connect");
    let (a, b) = tokio::join!(
        post(&bed, &connect, json!({})),
        post(&bed, &connect, json!({}))
    );
    let mut codes = [a.0, b.0];
    codes.sort_unstable();
    assert_eq!(codes, [201, 409], "{a:?} {b:?}");
}

/// A paused sandbox is the same snapshot whatever it is called: the end of one name is not
/// that of the other.
#[tokio::test]
async fn g18_two_names_of_one_snapshot_are_let_go_of_one_by_one() {
    let bed = bed().await;
    let id = bed.create().await;
    for name in ["a", "b"] {
        let body = json!({"sandbox_id": id, "name": name});
        assert_eq!(post(&bed, "/v1/snapshots", body).await.0, 201);
    }
    // As the host does with one that is paused.
    let first = {
        let mut kept = bed.sim.snapshots.lock().unwrap();
        let first = kept.pop_first().unwrap();
        kept.clear();
        kept.insert(first.0.clone(), first.1);
        first.0
    };
    bed.control.reconcile().await.unwrap();
    assert_eq!(bed.call("DELETE", "/v1/snapshots/b", None).await.0, 204);
    assert!(bed.sim.snapshots.lock().unwrap().contains_key(&first));
    assert_eq!(bed.call("DELETE", "/v1/snapshots/a", None).await.0, 204);
    assert_eq!(bed.sim.snapshots.lock().unwrap().len(), 0);
}

#[tokio::test]
async fn g8_a_pause_that_fails_leaves_a_running_sandbox() {
    let bed = bed().await;
    let id = bed.create().await;
    bed.sim.cannot_move.store(true, Ordering::SeqCst);
    let path = format!("/v1/sandboxes/{id}/pause");
    let failed = bed.refused("POST", &path, None, 502).await;
    assert!(
        failed["message"].as_str().unwrap().contains("disk is full"),
        "{failed}"
    );
    assert_eq!(status(&bed, &id).await, "running");
    let exec = format!("/v1/sandboxes/{id}/exec");
    let (code, done) = post(&bed, &exec, json!({"cmd": "echo", "args": ["on"]})).await;
    assert_eq!((code, &done["stdout"]), (200, &json!("on\n")));
    bed.sim.cannot_move.store(false, Ordering::SeqCst);
    assert_eq!(bed.call("POST", &path, None).await.0, 200);
}

#[tokio::test]
async fn g4_what_the_host_paused_by_itself_is_paused_and_stays_so() {
    let bed = bed().await;
    let body = json!({"timeout_sec": 60, "on_timeout": "pause"});
    let (_, made) = post(&bed, "/v1/sandboxes", body).await;
    assert_eq!(made["on_timeout"], "pause");
    let id = made["id"].as_str().unwrap();
    assert!(bed.sim.created.lock().unwrap()[0].pause_at_end);
    bed.sim.end(id, "paused", "its time was over");
    bed.control.reconcile().await.unwrap();
    assert_eq!(status(&bed, id).await, "paused");
    // The host is away, or was and does not list it yet.
    let known = bed.sim.sandboxes.lock().unwrap().remove(id).unwrap();
    bed.control.reconcile().await.unwrap();
    assert_eq!(status(&bed, id).await, "paused");
    bed.sim
        .sandboxes
        .lock()
        .unwrap()
        .insert(id.to_owned(), known);
    let resume = format!("/v1/sandboxes/{id}/resume");
    assert_eq!(bed.call("POST", &resume, None).await.0, 200);
}

#[tokio::test]
async fn a_fork_has_children_and_says_which_were_not_born() {
    let bed = bed().await;
    let id = bed.create().await;
    let path = format!("/v1/sandboxes/{id}/fork");
    let (code, children) = post(&bed, &path, json!({"count": 3})).await;
    assert_eq!(code, 201, "{children}");
    let children = children.as_array().unwrap();
    assert_eq!(children.len(), 3);
    for child in &children[..2] {
        assert_eq!(child["status"], "running");
        assert_ne!(child["id"], id.as_str());
    }
    assert_eq!(children[2]["error"], "no room");
    assert_eq!(status(&bed, &id).await, "running");
    let (_, all) = bed.call("GET", "/v1/sandboxes?state=running", None).await;
    assert_eq!(all.as_array().unwrap().len(), 3);
    for count in [0, 101] {
        bed.refused("POST", &path, Some(json!({ "count": count })), 400)
            .await;
    }
}

#[tokio::test]
async fn checkpoints_are_gone_back_to_and_end_with_their_sandbox() {
    let bed = bed().await;
    let (id, other) = (bed.create().await, bed.create().await);
    let path = |verb: &str| format!("/v1/sandboxes/{id}/{verb}");
    let named = json!({"name": "before"});
    let (code, point) = post(&bed, &path("checkpoints"), named.clone()).await;
    assert_eq!((code, &point["name"]), (201, &json!("before")));
    let taken = bed
        .refused("POST", &path("checkpoints"), Some(named), 409)
        .await;
    assert_eq!(taken["code"], "template_name_taken");
    let back = json!({"checkpoint": "before"});
    let (code, answer) = post(&bed, &path("rollback"), back.clone()).await;
    assert_eq!((code, &answer["status"]), (200, &json!("running")));
    let elsewhere = format!("/v1/sandboxes/{other}/rollback");
    bed.refused("POST", &elsewhere, Some(back), 404).await;
    assert_eq!(bed.sim.snapshots.lock().unwrap().len(), 1);
    assert_eq!(
        bed.call("DELETE", &format!("/v1/sandboxes/{id}"), None)
            .await
            .0,
        204
    );
    bed.control.reconcile().await.unwrap();
    assert_eq!(bed.sim.snapshots.lock().unwrap().len(), 0);
}

#[tokio::test]
async fn a_snapshot_is_a_template_of_a_fixed_shape() {
    let bed = bed().await;
    let id = bed.create().await;
    let request = json!({"sandbox_id": id, "name": "mine"});
    let (code, made) = post(&bed, "/v1/snapshots", request.clone()).await;
    assert_eq!((code, &made["type"]), (201, &json!("snapshot")));
    let taken = bed
        .refused("POST", "/v1/snapshots", Some(request.clone()), 409)
        .await;
    assert_eq!(taken["code"], "template_name_taken");
    let reserved = json!({"sandbox_id": id, "name": "minimal"});
    let reserved = bed
        .refused("POST", "/v1/snapshots", Some(reserved), 409)
        .await;
    assert_eq!(reserved["code"], "name_reserved");
    let odd = json!({"sandbox_id": id, "name": "../x"});
    bed.refused("POST", "/v1/snapshots", Some(odd), 400).await;

    let (code, from) = post(&bed, "/v1/sandboxes", json!({"template": "mine"})).await;
    assert_eq!((code, &from["template"]), (201, &json!("mine")));
    let asked = bed.sim.created.lock().unwrap().last().unwrap().clone();
    assert_eq!(asked.snapshot_id.len(), 64);
    // Overwritten, the old one is let go of on the host.
    let (code, _) = post(&bed, "/v1/snapshots?overwrite=true", request).await;
    assert_eq!(code, 201);
    let kept: Vec<String> = bed.sim.snapshots.lock().unwrap().keys().cloned().collect();
    assert!(kept.len() == 1 && kept[0] != asked.snapshot_id, "{kept:?}");
    let list = bed.pages("/v1/snapshots?type=snapshot", "cursor").await;
    assert_eq!(list.len(), 1);
    assert_eq!(bed.call("DELETE", "/v1/snapshots/mine", None).await.0, 204);
    bed.refused("DELETE", "/v1/snapshots/mine", None, 404).await;
    assert_eq!(bed.sim.snapshots.lock().unwrap().len(), 0);
}

#[tokio::test]
async fn g11_a_snapshot_cannot_have_another_shape() {
    let bed = bed().await;
    let id = bed.create().await;
    post(
        &bed,
        "/v1/snapshots",
        json!({"sandbox_id": id, "name": "mine"}),
    )
    .await;
    let body = json!({"template": "mine", "memory_mb": 1024});
    let error = bed.refused("POST", "/v1/sandboxes", Some(body), 400).await;
    let message = error["message"].as_str().unwrap();
    assert!(
        message.contains("512 MiB") && message.contains("1024 MiB"),
        "{message}"
    );
    let body = json!({"template": "mine", "memory_mb": 512, "vcpus": 1});
    assert_eq!(post(&bed, "/v1/sandboxes", body).await.0, 201);
}

#[tokio::test]
async fn memory_is_left_out_where_that_is_asked_for() {
    let bed = bed().await;
    let (_, made) = post(
        &bed,
        "/v2/sandboxes",
        json!({"templateID": "base", "autoPause": true, "autoPauseMemory": false}),
    )
    .await;
    assert!(bed.sim.created.lock().unwrap()[0].pause_disk_only);
    let id = made["sandboxID"].as_str().unwrap();
    let (without, with) = (json!({"memory": false}), json!({"memory": true}));
    let e2b = |verb: &str| format!("/sandboxes/{id}/{verb}");
    let native = |verb: &str| format!("/v1/sandboxes/{id}/{verb}");
    let asked = || std::mem::take(&mut *bed.sim.disk_only.lock().unwrap());
    for (pause, resume, code) in [
        (e2b("pause"), e2b("connect"), (204, 201)),
        (native("pause"), native("resume"), (200, 200)),
    ] {
        assert_eq!(post(&bed, &pause, with.clone()).await.0, code.0);
        assert_eq!(post(&bed, &resume, with.clone()).await.0, code.1);
        assert!(asked().is_empty());
        assert_eq!(post(&bed, &pause, without.clone()).await.0, code.0);
        let (status, resumed) = post(&bed, &resume, without.clone()).await;
        assert_eq!(status, code.1);
        assert_eq!(asked(), ["pause", "resume"]);
        if let Some(certificate) = resumed.get("restore_certificate") {
            assert_eq!(certificate["booted"], true);
        }
    }
    assert_eq!(post(&bed, &e2b("snapshots"), without.clone()).await.0, 201);
    let body = json!({"sandbox_id": made["sandboxID"], "memory": false});
    let (code, answer) = post(&bed, "/v1/snapshots", body).await;
    assert_eq!(code, 201, "{answer}");
    assert_eq!(asked(), ["snapshot", "snapshot"]);
}

#[tokio::test]
async fn e2bs_clients_get_their_own_codes() {
    let bed = bed().await;
    let (_, made) = post(
        &bed,
        "/v2/sandboxes",
        json!({"templateID": "base", "autoPause": true, "autoResume": {"enabled": true}}),
    )
    .await;
    let id = made["sandboxID"].as_str().unwrap();
    let path = |verb: &str| format!("/sandboxes/{id}/{verb}");
    let (_, detail) = bed.call("GET", &format!("/sandboxes/{id}"), None).await;
    assert_eq!(
        detail["lifecycle"],
        json!({"autoResume": true, "onTimeout": "pause"})
    );
    assert_eq!(bed.call("POST", &path("pause"), None).await.0, 204);
    let (code, answer) = bed.call("POST", &path("pause"), None).await;
    assert_eq!((code, &answer["code"]), (409, &json!(409)));
    let (_, paused) = bed.call("GET", "/v2/sandboxes?state=paused", None).await;
    assert_eq!(paused[0]["sandboxID"], id);
    let connect = format!("/v2/sandboxes/{id}/connect");
    assert_eq!(post(&bed, &connect, json!({"timeout": 600})).await.0, 201);
    assert_eq!(post(&bed, &connect, json!({"timeout": 60})).await.0, 200);
    let (_, detail) = bed.call("GET", &format!("/sandboxes/{id}"), None).await;
    assert_eq!(detail["state"], "running");
    let (code, forked) = post(&bed, &path("fork"), json!({"count": 2, "timeout": 60})).await;
    assert_eq!((code, forked.as_array().unwrap().len()), (201, 2));
    assert!(forked[0]["sandbox"]["sandboxID"].is_string(), "{forked}");
    let (code, snapshot) = post(&bed, &path("snapshots"), json!({})).await;
    assert_eq!(code, 201);
    let snapshot = snapshot["snapshotID"].as_str().unwrap();
    let (code, _) = post(&bed, "/v2/sandboxes", json!({ "templateID": snapshot })).await;
    assert_eq!(code, 201);
    let (_, list) = bed
        .call("GET", &format!("/snapshots?sandboxID={id}&limit=1"), None)
        .await;
    assert_eq!(list[0]["snapshotID"], snapshot);
    let template = format!("/templates/{snapshot}");
    assert_eq!(bed.call("DELETE", &template, None).await.0, 204);
    assert_eq!(bed.call("DELETE", &template, None).await.0, 404);
    assert_eq!(
        bed.call(
            "POST",
            "/sandboxes/sb-0192f0c8-6a3e-7c3a-9d1e-5b8f3c2a1d00/pause",
            None
        )
        .await
        .0,
        404
    );
}

/// The host may know better than the row in what state a sandbox is.
#[tokio::test]
async fn g5_a_refusal_by_the_host_has_the_state_too() {
    let bed = bed().await;
    let (running, paused) = (bed.create().await, bed.create().await);
    let path = |id: &str, verb: &str| format!("/v1/sandboxes/{id}/{verb}");
    let point = json!({"name": "point"});
    for id in [&running, &paused] {
        let taken = post(&bed, &path(id, "checkpoints"), point.clone()).await;
        assert_eq!(taken.0, 201);
    }
    post(&bed, &path(&paused, "pause"), json!({})).await;
    let snapshot = |id: &str| json!({"sandbox_id": id, "name": "mine"});
    let back = json!({"checkpoint": "point"});
    let snapshots = || "/v1/snapshots".to_owned();
    let none = json!({});
    for (request, path, body, state) in [
        ("pause", path(&running, "pause"), none.clone(), "running"),
        ("fork", path(&running, "fork"), none.clone(), "running"),
        (
            "rollback",
            path(&running, "rollback"),
            back.clone(),
            "running",
        ),
        ("snapshot", snapshots(), snapshot(&running), "running"),
        ("lifetime", path(&running, "ping"), none.clone(), "running"),
        (
            "exec",
            path(&running, "exec"),
            json!({"cmd": "echo"}),
            "running",
        ),
        ("resume", path(&paused, "resume"), none.clone(), "paused"),
        ("fork", path(&paused, "fork"), none.clone(), "paused"),
        ("rollback", path(&paused, "rollback"), back, "paused"),
        ("snapshot", snapshots(), snapshot(&paused), "paused"),
    ] {
        bed.sim.fault(request, Some(Fault::Unwilling));
        let refused = bed.refused("POST", &path, Some(body), 409).await;
        bed.sim.fault(request, None);
        assert_eq!(refused["code"], "invalid_state", "{request}: {refused}");
        assert_eq!(refused["state"], state, "{request}: {refused}");
    }
    bed.sim.fault("destroy", Some(Fault::Unwilling));
    let path = format!("/v1/sandboxes/{running}");
    let refused = bed.refused("DELETE", &path, None, 409).await;
    assert_eq!(refused["state"], "stopping", "{refused}");
}

fn names(list: &[Value]) -> Vec<&str> {
    list.iter()
        .map(|one| one["name"].as_str().unwrap())
        .collect()
}

#[tokio::test]
async fn snapshots_checkpoints_and_templates_have_pages() {
    let bed = bed().await;
    let id = bed.create().await;
    let points = format!("/v1/sandboxes/{id}/checkpoints");
    for name in ["a", "b", "c", "d", "e"] {
        let body = json!({"sandbox_id": id, "name": name});
        assert_eq!(post(&bed, "/v1/snapshots", body).await.0, 201);
        assert_eq!(post(&bed, &points, json!({ "name": name })).await.0, 201);
    }
    let newest = ["e", "d", "c", "b", "a"];
    for limit in [1, 2, 5, 6] {
        let path = format!("{points}?limit={limit}");
        assert_eq!(names(&bed.pages(&path, "cursor").await), newest);
        let path = format!("/v1/snapshots?type=snapshot&limit={limit}");
        assert_eq!(names(&bed.pages(&path, "cursor").await), newest);
        // Of no type: all there is to start from, the images last.
        let path = format!("/v1/snapshots?limit={limit}");
        let all = bed.pages(&path, "cursor").await;
        assert_eq!(names(&all)[..5], newest);
        assert_eq!(names(&all)[5..], ["minimal", "other"], "{limit}");
        let path = format!("/snapshots?sandboxID={id}&limit={limit}");
        let listed = bed.pages(&path, "nextToken").await;
        let ids: Vec<_> = listed.iter().map(|one| &one["snapshotID"]).collect();
        assert_eq!(ids, newest);
    }
    let base = bed.pages("/v1/snapshots?type=base&limit=1", "cursor").await;
    let other = json!({"name": "other", "type": "base", "vcpus": 2, "memory_mb": 1024,
        "platform": true, "protected": true});
    assert_eq!((base.len(), &base[1]), (2, &other));
    for query in ["limit=0", "limit=1001", "cursor=x", "cursr=1"] {
        for path in [&points, "/v1/snapshots"] {
            bed.refused("GET", &format!("{path}?{query}"), None, 400)
                .await;
        }
    }
    bed.refused("GET", "/v1/snapshots?type=all", None, 400)
        .await;
}

#[tokio::test]
async fn children_have_the_name_that_was_asked_for() {
    let bed = bed().await;
    let id = bed.create().await;
    let path = format!("/v1/sandboxes/{id}/fork");
    let (code, one) = post(&bed, &path, json!({"name": "try"})).await;
    assert_eq!((code, &one[0]["name"]), (201, &json!("try")), "{one}");
    let (_, several) = post(&bed, &path, json!({"name": "try", "count": 2})).await;
    assert_eq!(names(several.as_array().unwrap()), ["try-1", "try-2"]);
    // One name that is taken is none of them.
    let before = bed.sim.sandboxes.lock().unwrap().len();
    let body = json!({"name": "try", "count": 3});
    let taken = bed.refused("POST", &path, Some(body), 409).await;
    assert!(
        taken["message"].as_str().unwrap().contains("`try-1`"),
        "{taken}"
    );
    assert_eq!(bed.sim.sandboxes.lock().unwrap().len(), before);
    assert_eq!(status(&bed, &id).await, "running");
    let odd = json!({"name": "../x"});
    bed.refused("POST", &path, Some(odd), 400).await;
    // The name is free again when its sandbox has ended.
    let child = format!("/v1/sandboxes/{}", one[0]["id"].as_str().unwrap());
    assert_eq!(bed.call("DELETE", &child, None).await.0, 204);
    assert_eq!(post(&bed, &path, json!({"name": "try"})).await.0, 201);
}
