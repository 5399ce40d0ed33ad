//! What is saved and forked once, however often it is asked for.

use serde_json::{Value, json};

use crate::support::{Bed, Doomed, Fault, bed};

async fn keyed(bed: &Bed, path: &str, key: &str, body: &Value) -> (u16, Value) {
    let request = bed.request("POST", path).header("Idempotency-Key", key);
    let reply = request.json(body).send().await.unwrap();
    (reply.status().as_u16(), reply.json().await.unwrap())
}

#[tokio::test]
async fn g10_the_same_key_forks_and_saves_once_also_after_a_restart() {
    let mut bed = bed().await;
    let id = bed.create().await;
    let path = |verb: &str| format!("/v1/sandboxes/{id}/{verb}");
    let e2b = |verb: &str| format!("/sandboxes/{id}/{verb}");
    let requests = [
        (path("fork"), json!({"count": 3, "name": "child"})),
        (path("checkpoints"), json!({})),
        (
            "/v1/snapshots".to_owned(),
            json!({"sandbox_id": id, "name": "mine"}),
        ),
        (e2b("fork"), json!({"count": 2, "timeout": 60})),
        (e2b("snapshots"), json!({})),
    ];
    let counts = |bed: &Bed| {
        let sim = &bed.sim;
        let sandboxes = sim.sandboxes.lock().unwrap().len();
        (sandboxes, sim.snapshots.lock().unwrap().len())
    };
    let what = |answer: &Value| {
        let mut answer = answer.clone();
        for one in answer.as_array_mut().into_iter().flatten() {
            // Only the first answer can tell how it was restored, and since when it is used.
            let Some(one) = one.as_object_mut() else {
                continue;
            };
            one.remove("restore_certificate");
            one.remove("last_active_at");
        }
        answer
    };
    let mut first = Vec::new();
    for (n, (path, body)) in requests.iter().enumerate() {
        let (code, answer) = keyed(&bed, path, &format!("key-{n}"), body).await;
        assert_eq!(code, 201, "{path}: {answer}");
        first.push(what(&answer));
    }
    let made = counts(&bed);
    assert_eq!(made, (5, 3));
    for restart in [false, true] {
        if restart {
            bed = bed.restarted().await;
        }
        for (n, (path, body)) in requests.iter().enumerate() {
            let key = format!("key-{n}");
            let (code, answer) = keyed(&bed, path, &key, body).await;
            assert_eq!((code, &what(&answer)), (201, &first[n]), "{path}");
            let mut other = body.clone();
            other["name"] = json!("other");
            let (code, answer) = keyed(&bed, path, &key, &other).await;
            assert_eq!(code, 409, "{path}: {answer}");
        }
        assert_eq!(counts(&bed), made);
    }
    // What was made and is gone is not made again.
    assert_eq!(bed.call("DELETE", "/v1/snapshots/mine", None).await.0, 204);
    let (path, body) = &requests[2];
    let (code, answer) = keyed(&bed, path, "key-2", body).await;
    assert_eq!((code, &answer["error"]["code"]), (409, &json!("conflict")));
    // The query is part of what is asked for.
    let path = format!("{path}?overwrite=true");
    assert_eq!(keyed(&bed, &path, "key-2", body).await.0, 409);
}

#[tokio::test]
async fn g10_what_failed_may_be_tried_again_with_its_key() {
    let bed = bed().await;
    let id = bed.create().await;
    let fork = format!("/v1/sandboxes/{id}/fork");
    let snapshot = json!({"sandbox_id": id});
    for (request, path, body) in [
        ("fork", fork.as_str(), json!({"count": 2})),
        ("snapshot", "/v1/snapshots", snapshot),
    ] {
        bed.sim.fault(request, Some(Fault::Fails));
        assert_eq!(keyed(&bed, path, request, &body).await.0, 502);
        bed.sim.fault(request, None);
        assert_eq!(keyed(&bed, path, request, &body).await.0, 201);
    }
}

#[tokio::test]
async fn g10_a_key_whose_request_died_with_the_server_is_free_again() {
    for fault in [Fault::HangsBefore, Fault::HangsAfter] {
        let doomed = Doomed::start();
        let id = doomed.bed.create().await;
        doomed.bed.sim.fault("snapshot", Some(fault));
        let body = json!({"sandbox_id": id, "name": "mine"});
        let asked = doomed
            .bed
            .request("POST", "/v1/snapshots")
            .header("Idempotency-Key", "once")
            .json(&body);
        let asked = tokio::spawn(asked.send());
        doomed.bed.sim.until_hung(1).await;
        // While it is under way a repetition is told so.
        let (code, answer) = keyed(&doomed.bed, "/v1/snapshots", "once", &body).await;
        assert_eq!((code, &answer["error"]["code"]), (409, &json!("conflict")));
        let bed = doomed.killed(None).await;
        asked.abort();
        bed.control.reconcile().await.unwrap();
        let (code, answer) = keyed(&bed, "/v1/snapshots", "once", &body).await;
        assert_eq!((code, &answer["name"]), (201, &json!("mine")), "{answer}");
    }
}
