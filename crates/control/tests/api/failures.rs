//! What clients are told of a host that cannot, and of machines that are gone.

use futures::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

use crate::support::{Bed, Fault, bed};

/// An answer to E2B's clients: status, body, and whether they are told not to try again.
async fn e2b(bed: &Bed, path: &str, body: Value) -> (u16, Value, bool) {
    let request = bed.request("POST", path).json(&body);
    let reply = request.send().await.unwrap();
    let status = reply.status().as_u16();
    let retry = reply.headers().get("should-retry");
    let never = retry.is_some_and(|retry| retry == "false");
    (status, reply.json().await.unwrap_or_default(), never)
}

#[tokio::test]
async fn a_full_disk_of_the_host_has_a_code_of_its_own() {
    let bed = bed().await;
    let [runs, paused] = [bed.create().await, bed.create().await];
    let native = |id: &str, verb: &str| format!("/v1/sandboxes/{id}/{verb}");
    let point = json!({"name": "point"});
    let path = native(&runs, "checkpoints");
    assert_eq!(bed.call("POST", &path, Some(point)).await.0, 201);
    bed.call("POST", &native(&paused, "pause"), None).await;
    for request in ["create", "pause", "resume", "snapshot", "fork", "rollback"] {
        bed.sim.fault(request, Some(Fault::DiskFull));
    }
    for (path, body) in [
        ("/v1/sandboxes".to_owned(), json!({})),
        (native(&runs, "pause"), json!({})),
        (native(&runs, "fork"), json!({"count": 1})),
        (native(&runs, "checkpoints"), json!({"name": "other"})),
        (native(&runs, "rollback"), json!({"checkpoint": "point"})),
        ("/v1/snapshots".to_owned(), json!({"sandbox_id": runs})),
        (native(&paused, "resume"), json!({})),
    ] {
        let error = bed.refused("POST", &path, Some(body), 507).await;
        assert_eq!(error["code"], "host_disk_full", "{path}: {error}");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains("disk is full"), "{path}: {error}");
    }
    for (path, body) in [
        ("/sandboxes".to_owned(), json!({"templateID": "base"})),
        (format!("/sandboxes/{runs}/pause"), json!({})),
        (format!("/sandboxes/{runs}/snapshots"), json!({})),
        (format!("/sandboxes/{paused}/connect"), json!({})),
    ] {
        let (status, body, never) = e2b(&bed, &path, body).await;
        assert_eq!((status, &body["code"]), (507, &json!(507)), "{path}");
        assert!(never, "{path}: trying again does not help");
        let message = body["message"].as_str().unwrap();
        assert!(message.contains("disk is full"), "{path}: {body}");
    }
    // Everything is as it was.
    for (id, state) in [(&runs, "running"), (&paused, "paused")] {
        let (_, seen) = bed.call("GET", &format!("/v1/sandboxes/{id}"), None).await;
        assert_eq!(seen["status"], state);
    }
}

#[tokio::test]
async fn a_child_that_finds_no_room_says_so() {
    let bed = bed().await;
    let id = bed.create().await;
    let (status, forked, _) =
        e2b(&bed, &format!("/sandboxes/{id}/fork"), json!({"count": 3})).await;
    assert_eq!((status, &forked[2]["error"]["code"]), (201, &json!(503)));
}

#[tokio::test]
async fn g8_a_guest_that_does_not_answer_is_not_saved_and_that_is_said() {
    let bed = bed().await;
    let id = bed.create().await;
    bed.sim.fault("pause", Some(Fault::Unresponsive));
    bed.sim.fault("snapshot", Some(Fault::Unresponsive));
    let word = "sandbox_snapshot_guest_agent_unresponsive";
    for (path, body) in [
        (format!("/v1/sandboxes/{id}/pause"), json!({})),
        (format!("/v1/sandboxes/{id}/checkpoints"), json!({})),
        ("/v1/snapshots".to_owned(), json!({"sandbox_id": id})),
    ] {
        let error = bed.refused("POST", &path, Some(body), 409).await;
        assert_eq!(error["code"], word, "{path}: {error}");
    }
    let path = format!("/sandboxes/{id}/snapshots");
    let (status, body, _) = e2b(&bed, &path, json!({})).await;
    assert_eq!((status, &body["error_code"]), (409, &json!(word)));
    // 409 would mean that it was paused before.
    let path = format!("/sandboxes/{id}/pause");
    let (status, body, _) = e2b(&bed, &path, json!({})).await;
    assert_eq!((status, &body["error_code"]), (503, &Value::Null), "{body}");
    let (_, seen) = bed.call("GET", &format!("/v1/sandboxes/{id}"), None).await;
    assert_eq!(seen["status"], "running");
}

#[tokio::test]
async fn g6_a_machine_that_dies_meanwhile_is_said_to_have() {
    let bed = bed().await;
    let id = bed.create().await;
    bed.sim.fault("exec", Some(Fault::Dies));
    let path = format!("/v1/sandboxes/{id}/exec");
    let body = Some(json!({"cmd": "echo"}));
    let error = bed.refused("POST", &path, body, 502).await;
    for (field, value) in [
        ("code", "sandbox_died"),
        ("cause", "killed"),
        ("state", "error"),
    ] {
        assert_eq!(error[field], value, "{error}");
    }
    assert!(error["message"].as_str().unwrap().contains("out of luck"));

    let url = format!("ws://{}/v1/sandboxes/{id}/exec/stream", bed.address);
    let mut request = url.into_client_request().unwrap();
    let key = bed.key.reveal().parse().unwrap();
    request.headers_mut().insert("x-api-key", key);
    let (mut socket, _) = tokio_tungstenite::connect_async(request).await.unwrap();
    let start = json!({"type": "start", "cmd": "doomed"}).to_string();
    socket.send(Message::text(start)).await.unwrap();
    let mut said: Vec<Value> = Vec::new();
    while let Some(Ok(Message::Text(text))) = socket.next().await {
        said.push(serde_json::from_str(&text).unwrap());
    }
    let last = said.last().unwrap();
    assert_eq!(said[0]["type"], "start");
    assert_eq!(
        (&last["type"], &last["code"], &last["fatal"]),
        (&json!("error"), &json!("sandbox_died"), &json!(true))
    );
}
