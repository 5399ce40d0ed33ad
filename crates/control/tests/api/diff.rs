//! Comparing sandboxes, on a host without machines.

use serde_json::json;
use wrenn_types::SandboxId;

use crate::support::{Fault, bed};

#[tokio::test]
async fn a_sandbox_is_compared_with_a_checkpoint_and_with_another() {
    let bed = bed().await;
    let (id, other) = (bed.create().await, bed.create().await);
    let one = format!("/v1/sandboxes/{id}");
    let point = json!({"name": "before"});
    let points = format!("{one}/checkpoints");
    assert_eq!(bed.call("POST", &points, Some(point)).await.0, 201);
    let path = format!("{one}/diff?against=before&path=/home");
    let reply = bed.request("GET", &path).send().await.unwrap();
    assert_eq!(reply.status(), 200);
    assert!(
        reply.headers()["server-timing"]
            .to_str()
            .unwrap()
            .contains("compare")
    );
    let body: serde_json::Value = reply.json().await.unwrap();
    let file = |size: u64| {
        json!({"type": "file", "size": size, "mode": "0644", "uid": 1000, "gid": 1000,
            "modified_at": "2023-11-14T22:13:20.000Z"})
    };
    let with = |mut file: serde_json::Value, path: &str, change: &str| {
        file["path"] = path.into();
        file["change"] = change.into();
        file
    };
    let mut changed = with(file(3), "/c", "changed");
    changed["before"] = file(4);
    assert_eq!(
        body,
        json!({
            "sandbox_id": id, "against": {"checkpoint": "before"},
            "files": [with(file(1), "/home/a", "added"), with(file(2), "/b", "removed"), changed],
            "processes": [
                {"change": "added", "pid": 7, "uid": 1000, "command": "sleep 9"},
                {"change": "removed", "pid": 8, "uid": 1000, "command": "sleep 9"},
            ],
            "ports": [{"change": "added", "address": "0.0.0.0", "port": 8000}],
            "truncated": false, "unread_files": 2,
        })
    );
    // A paused one is compared as well, and stays so.
    bed.call("POST", &format!("{one}/pause"), None).await;
    let path = format!("{one}/diff?against={other}&limit=2");
    let (status, body) = bed.call("GET", &path, None).await;
    assert_eq!(
        (status, &body["against"]),
        (200, &json!({"sandbox_id": other}))
    );
    assert_eq!(
        (body["files"].as_array().unwrap().len(), &body["truncated"]),
        (2, &json!(true))
    );
    let (_, still) = bed.call("GET", &one, None).await;
    assert_eq!(still["status"], "paused");
}

#[tokio::test]
async fn what_cannot_be_compared_is_said() {
    let bed = bed().await;
    let (id, other) = (bed.create().await, bed.create().await);
    let path = |query: &str| format!("/v1/sandboxes/{id}/diff{query}");
    let stranger = SandboxId::new();
    let against_other = format!("?against={other}");
    let cases = [
        ("".to_owned(), 400, "invalid_request"),
        ("?against=".to_owned(), 400, "invalid_request"),
        (format!("?against={id}"), 400, "invalid_request"),
        (format!("{against_other}&limit=0"), 400, "invalid_request"),
        (format!("{against_other}&depth=1"), 400, "invalid_request"),
        (
            format!("{against_other}&path=/proc"),
            400,
            "invalid_request",
        ),
        ("?against=never".to_owned(), 404, "not_found"),
        (format!("?against={stranger}"), 404, "not_found"),
    ];
    for (query, status, code) in &cases {
        let error = bed.refused("GET", &path(query), None, *status).await;
        assert_eq!(error["code"], *code, "{query}: {error}");
    }
    let unknown = format!("/v1/sandboxes/{stranger}/diff{against_other}");
    bed.refused("GET", &unknown, None, 404).await;
    // It was paused in the middle, or its agent lists nothing.
    bed.sim.fault("diff", Some(Fault::Unwilling));
    let error = bed.refused("GET", &path(&against_other), None, 409).await;
    assert_eq!(
        (&error["code"], &error["state"]),
        (&json!("invalid_state"), &json!("running"))
    );
    bed.sim.fault("diff", Some(Fault::Away));
    bed.refused("GET", &path(&against_other), None, 503).await;
    bed.sim.fault("diff", None);
    // What has ended is not compared, on either side.
    bed.call("DELETE", &format!("/v1/sandboxes/{other}"), None)
        .await;
    let error = bed.refused("GET", &path(&against_other), None, 409).await;
    assert_eq!(error["state"], "stopped");
    let turned = format!("/v1/sandboxes/{other}/diff?against={id}");
    bed.refused("GET", &turned, None, 409).await;
}
