//! Draining and emptying a host, on a host without machines.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::support::{Bed, Fault, bed};

async fn status(bed: &Bed, id: &str) -> Value {
    let (code, body) = bed.call("GET", &format!("/v1/sandboxes/{id}"), None).await;
    assert_eq!(code, 200, "{body}");
    body["status"].clone()
}

#[tokio::test]
async fn a_host_that_drains_starts_nothing_and_says_so() {
    let bed = bed().await;
    let [running, paused] = [bed.create().await, bed.create().await];
    let resume = format!("/v1/sandboxes/{paused}/resume");
    let pause = format!("/v1/sandboxes/{paused}/pause");
    assert_eq!(bed.call("POST", &pause, None).await.0, 200);
    let (code, host) = bed.call("GET", "/v1/host", None).await;
    assert_eq!((code, &host["draining_since"]), (200, &Value::Null));

    let (code, begun) = bed.call("PUT", "/v1/host/drain", None).await;
    assert_eq!(code, 200, "{begun}");
    assert!(begun["draining_since"].as_str().unwrap().ends_with('Z'));
    let (_, host) = bed.call("GET", "/v1/host", None).await;
    assert_eq!(host["draining_since"], begun["draining_since"]);
    for (path, body) in [("/v1/sandboxes", json!({})), (&resume, json!({}))] {
        let error = bed.refused("POST", path, Some(body), 503).await;
        assert_eq!(error["code"], "draining", "{path}: {error}");
    }
    // E2B's clients are told not to try again: it does not pass by itself.
    let body = json!({"templateID": "base"});
    let refused = bed
        .request("POST", "/sandboxes")
        .json(&body)
        .send()
        .await
        .unwrap();
    assert_eq!(refused.status(), 503);
    assert_eq!(refused.headers()["should-retry"], "false");
    // What runs is used as ever, and nothing is left of what was refused.
    let exec = format!("/v1/sandboxes/{running}/exec");
    let ran = bed.call("POST", &exec, Some(json!({"cmd": "echo"}))).await;
    assert_eq!(ran.0, 200, "{}", ran.1);
    assert_eq!(status(&bed, &paused).await, "paused");
    assert_eq!(bed.sim.sandboxes.lock().unwrap().len(), 2);

    let (code, ended) = bed.call("DELETE", "/v1/host/drain", None).await;
    assert_eq!((code, ended), (200, json!({})));
    assert_eq!(bed.call("POST", &resume, None).await.0, 200);
    bed.create().await;
}

#[tokio::test]
async fn g44_everything_is_paused_also_what_is_still_on_its_way() {
    let bed = bed().await;
    let mut ids = Vec::new();
    for _ in 0..6 {
        ids.push(bed.create().await);
    }
    *bed.sim.delay.lock().unwrap() = std::time::Duration::from_millis(300);
    let bed = Arc::new(bed);
    let late = tokio::spawn({
        let bed = Arc::clone(&bed);
        async move { bed.create().await }
    });
    bed.sim.until_begun("create").await;
    let (code, all) = bed.call("POST", "/v1/host/pause", None).await;
    ids.push(late.await.unwrap());
    assert_eq!(code, 200, "{all}");
    assert_eq!(all["failed"], json!([]));
    let mut paused: Vec<_> = all["paused"]
        .as_array()
        .unwrap()
        .iter()
        .map(|id| id.as_str().unwrap())
        .collect();
    paused.sort_unstable();
    ids.sort_unstable();
    assert_eq!(paused, ids);
    for id in &ids {
        assert_eq!(status(&bed, id).await, "paused");
    }
    let (_, again) = bed.call("POST", "/v1/host/pause", None).await;
    assert_eq!(again, json!({"paused": [], "failed": []}));
}

#[tokio::test]
async fn what_cannot_be_paused_is_named_and_runs_on() {
    let bed = bed().await;
    let id = bed.create().await;
    bed.sim.fault("pause", Some(Fault::Fails));
    let (code, all) = bed.call("POST", "/v1/host/pause", None).await;
    assert_eq!((code, &all["paused"]), (200, &json!([])));
    let failed = &all["failed"][0];
    assert_eq!(
        (&failed["id"], &failed["code"]),
        (&json!(id), &json!("agent_error"))
    );
    assert!(failed["message"].as_str().unwrap().contains("disk is full"));
    assert_eq!(status(&bed, &id).await, "running");
}

#[tokio::test]
async fn a_server_that_is_about_to_end_starts_nothing_and_keeps_what_it_paused() {
    let bed = bed().await;
    let [one, other] = [bed.create().await, bed.create().await];
    bed.control.close();
    let all = bed.control.pause_all().await.unwrap();
    assert_eq!((all.done.len(), all.failed.len()), (2, 0));
    for path in [
        "/v1/sandboxes".to_owned(),
        format!("/v1/sandboxes/{one}/resume"),
    ] {
        let error = bed.refused("POST", &path, None, 503).await;
        assert_eq!(error["code"], "host_unavailable", "{path}: {error}");
    }
    // Traffic, which wakes what is paused where that was asked for.
    let request = bed
        .request("GET", "/")
        .header("host", format!("80-{other}.localhost"));
    assert_eq!(request.send().await.unwrap().status(), 503);

    let bed = bed.restarted().await;
    for id in [&one, &other] {
        assert_eq!(status(&bed, id).await, "paused");
    }
    let all = bed.control.destroy_all().await.unwrap();
    assert_eq!((all.done.len(), all.failed.len()), (2, 0));
    assert_eq!(bed.sim.sandboxes.lock().unwrap().len(), 0);
}
