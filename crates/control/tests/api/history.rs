//! What happened to sandboxes, why they ended and how busy they are, over a real connection on
//! a host without machines.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde_json::{Value, json};
use wrenn_wire::wrenn::host::v1::{DeathCertificate, MetricPoint};

use crate::support::{Bed, bed, now_ms};

async fn get(bed: &Bed, path: &str) -> Value {
    let (code, body) = bed.call("GET", path, None).await;
    assert_eq!(code, 200, "{path}: {body}");
    body
}

fn fallen() -> DeathCertificate {
    DeathCertificate {
        state: "error".into(),
        cause: "killed".into(),
        lived_ms: 5000,
        console: "Kernel panic\n".into(),
        last_command: "make all".into(),
        cpu_ms: 1200,
        memory_bytes: 1 << 20,
        disk_bytes: 2 << 20,
        ..Default::default()
    }
}

#[tokio::test]
async fn g06_a_death_is_explained_and_its_row_follows_at_once() {
    let bed = bed().await;
    let id = bed.create().await;
    let why = format!("/v1/sandboxes/{id}/why");
    bed.sim.happened(&id, "started", "request", None);
    bed.control.follow_events().await.unwrap();
    let alive = get(&bed, &why).await;
    assert_eq!(
        (&alive["status"], &alive["death"]),
        (&json!("running"), &Value::Null)
    );
    assert_eq!(alive["events"][0]["event"], "started");

    bed.sim.end(&id, "error", "it fell over");
    bed.sim.happened(&id, "ended", "host", Some(fallen()));
    bed.control.follow_events().await.unwrap();
    bed.control.reconcile().await.unwrap();
    let dead = get(&bed, &why).await;
    assert_eq!(dead["status"], "error");
    let death = &dead["death"];
    for (name, value) in [
        ("cause", json!("killed")),
        ("actor", json!("host")),
        ("reason", json!("it fell over")),
        ("lived_ms", json!(5000)),
        ("console", json!("Kernel panic\n")),
        ("last_command", json!("make all")),
    ] {
        assert_eq!(death[name], value, "{dead}");
    }
    assert_eq!(death["resources"]["cpu_ms"], 1200);
    let missing = "/v1/sandboxes/sb-0192f0c8-6a3e-7c3a-9d1e-5b8f3c2a1d00/why";
    bed.refused("GET", missing, None, 404).await;
}

#[tokio::test]
async fn g03_a_control_plane_that_was_away_misses_nothing_and_stores_nothing_twice() {
    let first = bed().await;
    let id = first.create().await;
    let events = format!("/v1/sandboxes/{id}/events");
    first.sim.happened(&id, "started", "request", None);
    first.control.follow_events().await.unwrap();
    assert_eq!(first.sim.acknowledged.load(Ordering::SeqCst), 0);
    first.control.follow_events().await.unwrap();
    assert_eq!(first.sim.acknowledged.load(Ordering::SeqCst), 1);
    // It goes away; meanwhile things happen.
    let sim = Arc::clone(&first.sim);
    sim.happened(&id, "paused", "clock", None);
    sim.happened(&id, "resumed", "traffic", None);
    let second = first.restarted().await;
    for _ in 0..3 {
        second.control.follow_events().await.unwrap();
    }
    let all = get(&second, &events).await;
    let kinds: Vec<&str> = all
        .as_array()
        .unwrap()
        .iter()
        .map(|e| e["event"].as_str().unwrap())
        .collect();
    assert_eq!(kinds, ["started", "paused", "resumed"]);
    assert_eq!(sim.acknowledged.load(Ordering::SeqCst), 3);
    let last = all[2]["id"].as_i64().unwrap();
    let page = get(&second, &format!("{events}?after={}&limit=1", all[0]["id"])).await;
    assert_eq!(page, json!([all[1]]));
    assert_eq!(
        get(&second, &format!("{events}?after={last}")).await,
        json!([])
    );
    second
        .refused("GET", &format!("{events}?after=-1"), None, 400)
        .await;
    second
        .refused("GET", &format!("{events}?since=1"), None, 400)
        .await;
}

fn point(at_unix_ms: i64, cpu: f64) -> MetricPoint {
    MetricPoint {
        at_unix_ms,
        cpu_count: 2,
        cpu_used_pct: cpu,
        mem_used_bytes: 100,
        mem_total_bytes: 200,
        mem_cache_bytes: 50,
        disk_used_bytes: 300,
        disk_total_bytes: 400,
        net_received_bytes: 10,
        net_sent_bytes: 20,
        ..Default::default()
    }
}

#[tokio::test]
async fn metrics_are_given_in_three_languages() {
    let bed = bed().await;
    let id = bed.create().await;
    let now = now_ms();
    let points = vec![
        point(now - 3_600_000, 1.0),
        point(now - 2000, 25.0),
        point(now, 50.0),
    ];
    bed.sim.points.lock().unwrap().insert(id.clone(), points);

    let native = get(&bed, &format!("/v1/sandboxes/{id}/metrics?range=1m")).await;
    let points = native["points"].as_array().unwrap();
    assert_eq!(points.len(), 2, "{native}");
    assert_eq!(points[1]["cpu_pct"], 50.0);
    assert_eq!(points[1]["mem_bytes"], 100);
    assert_eq!(points[1]["timestamp_unix"], now / 1000);
    bed.refused(
        "GET",
        &format!("/v1/sandboxes/{id}/metrics?range=1y"),
        None,
        400,
    )
    .await;

    let e2b = get(&bed, &format!("/sandboxes/{id}/metrics")).await;
    assert_eq!(e2b.as_array().unwrap().len(), 3);
    for (name, value) in [
        ("cpuCount", 2),
        ("memUsed", 100),
        ("memTotal", 200),
        ("memCache", 50),
        ("diskUsed", 300),
        ("diskTotal", 400),
    ] {
        assert_eq!(e2b[2][name], value, "{name}");
    }
    assert_eq!(e2b[2]["timestampUnix"], now / 1000);
    let since = now / 1000 - 60;
    let recent = get(
        &bed,
        &format!("/sandboxes/{id}/metrics?start={since}&end={}", now / 1000),
    )
    .await;
    assert_eq!(recent.as_array().unwrap().len(), 2);
    let (code, _) = bed
        .call(
            "GET",
            &format!("/sandboxes/{id}/metrics?start=5&end=4"),
            None,
        )
        .await;
    assert_eq!(code, 400);
    let none = "sb-0192f0c8-6a3e-7c3a-9d1e-5b8f3c2a1d00";
    let (code, _) = bed
        .call("GET", &format!("/sandboxes/{none}/metrics"), None)
        .await;
    assert_eq!(code, 404);
    let many = get(&bed, &format!("/sandboxes/metrics?sandbox_ids={id},{none}")).await;
    assert_eq!(many["sandboxes"].as_object().unwrap().len(), 1);
    assert_eq!(many["sandboxes"][&id]["cpuUsedPct"], 50.0);
    let (code, _) = bed.call("GET", "/sandboxes/metrics", None).await;
    assert_eq!(code, 400);

    let scrape = |key: Option<&'static str>| {
        let mut request = match key {
            None => bed.request("GET", "/metrics"),
            Some(_) => reqwest::Client::new().get(bed.url("/metrics")),
        };
        if let Some(key) = key.filter(|key| !key.is_empty()) {
            request = request.header("x-api-key", key);
        }
        async move {
            let answer = request.send().await.unwrap();
            (answer.status().as_u16(), answer.text().await.unwrap())
        }
    };
    let (code, known) = scrape(None).await;
    assert_eq!(code, 200);
    assert!(
        known.contains("wrenn_sandboxes{state=\"running\"} 1\n"),
        "{known}"
    );
    assert!(
        known.contains(&format!(
            "wrenn_sandbox_cpu_ratio{{sandbox=\"{id}\"}} 0.5\n"
        )),
        "{known}"
    );
    assert!(known.contains("wrenn_host_up 1\n"));
    let (code, open) = scrape(Some("")).await;
    assert_eq!(code, 200);
    assert!(
        open.contains("wrenn_host_up 1\n") && !open.contains(&id),
        "{open}"
    );
    assert_eq!(scrape(Some("wrn_wrong")).await.0, 401);
}
