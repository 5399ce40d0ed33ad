//! The control plane is killed in the middle of what it does, its host stays; and the host is
//! away while the control plane stays.

use std::time::Duration;

use serde_json::{Value, json};

use crate::support::{Bed, Doomed, Fault, bed, bed_in};

async fn status(bed: &Bed, id: &str) -> String {
    // From the list, which does not ask the host about one: the row is what counts.
    let (_, all) = bed.call("GET", "/v1/sandboxes?state=all", None).await;
    let found = all.as_array().unwrap().iter().find(|one| one["id"] == id);
    found.unwrap()["status"].as_str().unwrap().to_owned()
}

/// Kills it while `request` hangs, and has the next one go round once.
async fn killed_during(
    request: &'static str,
    fault: Fault,
    paused: bool,
    path: &str,
    mut body: Value,
) -> (Bed, String) {
    let doomed = Doomed::start();
    let bed = &doomed.bed;
    let id = bed.create().await;
    let point = json!({"name": "point"});
    let points = format!("/v1/sandboxes/{id}/checkpoints");
    assert_eq!(bed.call("POST", &points, Some(point)).await.0, 201);
    if paused {
        let pause = format!("/v1/sandboxes/{id}/pause");
        assert_eq!(bed.call("POST", &pause, None).await.0, 200);
    }
    bed.sim.fault(request, Some(fault));
    let path = path.replace("{id}", &id);
    if path == "/v1/snapshots" {
        body["sandbox_id"] = json!(id);
    }
    let asked = tokio::spawn(bed.request("POST", &path).json(&body).send());
    bed.sim.until_hung(1).await;
    let between = status(bed, &id).await;
    assert!(between.ends_with("ing"), "{request}: {between}");
    let bed = doomed.killed(None).await;
    asked.abort();
    bed.control.reconcile().await.unwrap();
    (bed, id)
}

#[tokio::test]
async fn g3_a_kill_in_the_middle_of_a_pause_a_resume_or_a_rollback() {
    let one = "/v1/sandboxes/{id}";
    let back = json!({"checkpoint": "point"});
    for (request, paused, body, fault, state) in [
        ("pause", false, json!({}), Fault::HangsBefore, "running"),
        ("pause", false, json!({}), Fault::HangsAfter, "paused"),
        ("resume", true, json!({}), Fault::HangsBefore, "paused"),
        ("resume", true, json!({}), Fault::HangsAfter, "running"),
        (
            "rollback",
            false,
            back.clone(),
            Fault::HangsBefore,
            "running",
        ),
        ("rollback", true, back, Fault::HangsAfter, "running"),
    ] {
        let path = format!("{one}/{request}");
        let (bed, id) = killed_during(request, fault, paused, &path, body).await;
        assert_eq!(status(&bed, &id).await, state, "{request} {fault:?}");
        // It can be used on.
        let next = match state {
            "running" => "pause",
            _ => "resume",
        };
        let path = format!("/v1/sandboxes/{id}/{next}");
        assert_eq!(bed.call("POST", &path, None).await.0, 200, "{request}");
    }
}

#[tokio::test]
async fn g3_a_kill_in_the_middle_of_a_fork() {
    for (fault, children) in [(Fault::HangsBefore, 0), (Fault::HangsAfter, 2)] {
        let path = "/v1/sandboxes/{id}/fork";
        let body = json!({"count": 2, "name": "child"});
        let (bed, id) = killed_during("fork", fault, false, path, body.clone()).await;
        assert_eq!(status(&bed, &id).await, "running");
        let (_, all) = bed.call("GET", "/v1/sandboxes?state=all", None).await;
        let states: Vec<_> = all.as_array().unwrap().iter().collect();
        let running = states.iter().filter(|one| one["status"] == "running");
        assert_eq!(running.count(), 1 + children, "{fault:?}: {all}");
        let failed: Vec<_> = states
            .iter()
            .filter(|one| one["status"] == "error")
            .collect();
        assert_eq!(failed.len(), 2 - children, "{fault:?}: {all}");
        // Those that are there have their names, of the others they are free.
        let path = path.replace("{id}", &id);
        let (code, answer) = bed.call("POST", &path, Some(body)).await;
        assert_eq!(code, if children == 0 { 201 } else { 409 }, "{answer}");
    }
}

/// What the host keeps and nobody was told of is deleted by the next server, at once.
#[tokio::test]
async fn g3_a_kill_in_the_middle_of_a_snapshot() {
    for fault in [Fault::HangsBefore, Fault::HangsAfter] {
        let body = json!({"name": "s"});
        let (bed, id) = killed_during("snapshot", fault, false, "/v1/snapshots", body).await;
        assert_eq!(status(&bed, &id).await, "running");
        let listed = bed.call("GET", "/v1/snapshots?type=snapshot", None).await;
        assert_eq!(listed.1, json!([]));
        // The checkpoint from before has a row and stays.
        let kept = |bed: &Bed| bed.sim.snapshots.lock().unwrap().len();
        assert_eq!(kept(&bed), 1, "{fault:?}");
        let points = format!("/v1/sandboxes/{id}/checkpoints");
        let (_, points) = bed.call("GET", &points, None).await;
        assert_eq!(points.as_array().unwrap().len(), 1);
    }
}

#[tokio::test]
async fn g18_a_snapshot_of_a_sandbox_in_no_database_is_left_alone() {
    let bed = bed().await;
    let id = bed.create().await;
    let body = json!({"sandbox_id": id, "name": "mine"});
    assert_eq!(bed.call("POST", "/v1/snapshots", Some(body)).await.0, 201);
    for snapshot in bed.sim.snapshots.lock().unwrap().values_mut() {
        snapshot.created_at_unix_ms -= 24 * 3600 * 1000;
    }
    let sim = bed.sim.clone();
    let empty = bed_in(tempfile::tempdir().unwrap(), sim).await;
    empty.control.reconcile().await.unwrap();
    assert_eq!(empty.sim.snapshots.lock().unwrap().len(), 1);
}

/// What nobody is at work on while the host is away is true again with its return.
#[tokio::test]
async fn g3_states_are_true_again_when_the_host_is_back() {
    for (request, paused, lost, state) in [
        ("pause", false, false, "running"),
        ("pause", false, true, "stopped"),
        ("resume", true, false, "paused"),
        // Not even as paused: what is saved needs no host that lists it (G4).
        ("resume", true, true, "paused"),
    ] {
        let doomed = Doomed::start();
        let id = doomed.bed.create().await;
        let path = |verb: &str| format!("/v1/sandboxes/{id}/{verb}");
        if paused {
            assert_eq!(doomed.bed.call("POST", &path("pause"), None).await.0, 200);
        }
        doomed.bed.sim.fault(request, Some(Fault::HangsBefore));
        let asked = tokio::spawn(doomed.bed.request("POST", &path(request)).send());
        doomed.bed.sim.until_hung(1).await;
        let bed = doomed.killed(Some(Fault::Away)).await;
        asked.abort();
        assert!(bed.control.reconcile().await.is_err());
        let between = status(&bed, &id).await;
        assert!(
            between.ends_with("ing") && between != "running",
            "{between}"
        );
        bed.sim.fault("*", None);
        if lost {
            bed.sim.sandboxes.lock().unwrap().clear();
        }
        bed.control.reconcile().await.unwrap();
        assert_eq!(status(&bed, &id).await, state, "{request} {lost}");
    }
}

#[tokio::test]
async fn g1_a_client_that_hangs_up_ends_no_pause_and_no_fork() {
    let bed = bed().await;
    let id = bed.create().await;
    *bed.sim.delay.lock().unwrap() = Duration::from_millis(300);
    bed.sim.slow_to_answer("fork", 300);
    let hang_up = async |request: &str, verb: &str| {
        let path = format!("/v1/sandboxes/{id}/{verb}");
        let client = tokio::spawn(bed.request("POST", &path).send());
        bed.sim.until_begun(request).await;
        client.abort();
        assert!(client.await.unwrap_err().is_cancelled(), "{verb} was over");
    };
    let until = async |path: &str, count: usize| {
        for _ in 0..200 {
            let (_, list) = bed.call("GET", path, None).await;
            if list.as_array().unwrap().len() == count {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("not within 4 s: {count} at {path}");
    };
    hang_up("fork", "fork").await;
    until("/v1/sandboxes?state=running", 2).await;
    hang_up("pause", "pause").await;
    until("/v1/sandboxes?state=paused", 1).await;
    hang_up("resume", "resume").await;
    until("/v1/sandboxes?state=running", 2).await;
}

#[tokio::test]
async fn a_checkpoint_that_could_not_be_deleted_is_deleted_later() {
    let bed = bed().await;
    let (id, other) = (bed.create().await, bed.create().await);
    for id in [&id, &other] {
        let points = format!("/v1/sandboxes/{id}/checkpoints");
        assert_eq!(bed.call("POST", &points, None).await.0, 201);
    }
    bed.sim.fault("delete", Some(Fault::Fails));
    let path = format!("/v1/sandboxes/{id}");
    assert_eq!(bed.call("DELETE", &path, None).await.0, 204);
    let kept = || bed.sim.snapshots.lock().unwrap().len();
    for _ in 0..2 {
        assert!(bed.control.reconcile().await.is_err(), "it is told");
        assert_eq!(kept(), 2);
    }
    bed.sim.fault("delete", None);
    bed.control.reconcile().await.unwrap();
    assert_eq!(kept(), 1, "the other sandbox's stays");
}
