//! Programs and files by the native API, on a host without machines.

use std::time::Duration;

use serde_json::{Value, json};

use crate::support::bed;

#[tokio::test]
async fn programs_run_to_their_end() {
    let bed = bed().await;
    let id = bed.create().await;
    let path = format!("/v1/sandboxes/{id}/exec");
    let (status, done) = bed
        .call(
            "POST",
            &path,
            Some(json!({"cmd": "echo", "args": ["a", "b"]})),
        )
        .await;
    assert_eq!(status, 200);
    assert_eq!(done["stdout"], "a b\n");
    assert_eq!(
        (&done["exit_code"], &done["duration_ms"], &done["encoding"]),
        (&json!(0), &json!(12), &json!("utf-8"))
    );
    let (_, done) = bed
        .call("POST", &path, Some(json!({"cmd": "cat", "stdin": "in"})))
        .await;
    assert_eq!(done["stdout"], "in");
    let (_, done) = bed.call("POST", &path, Some(json!({"cmd": "bytes"}))).await;
    assert_eq!(
        (&done["stdout"], &done["encoding"]),
        (&json!("/wA="), &json!("base64"))
    );
    let (_, done) = bed.call("POST", &path, Some(json!({"cmd": "big"}))).await;
    assert_eq!(done["truncated"], true);
    assert!(
        done["stdout"]
            .as_str()
            .unwrap()
            .ends_with("7 more were dropped]\n")
    );
    let (_, done) = bed
        .call(
            "POST",
            &path,
            Some(json!({"cmd": "slow", "timeout_sec": 1})),
        )
        .await;
    assert_eq!(
        (&done["timed_out"], &done["signal"]),
        (&json!(true), &json!(9))
    );
    let error = bed
        .refused("POST", &path, Some(json!({"cmd": "nope"})), 400)
        .await;
    assert!(error["message"].as_str().unwrap().contains("`nope`"));
    bed.refused("POST", &path, Some(json!({"cmd": ""})), 400)
        .await;
    bed.refused(
        "POST",
        &path,
        Some(json!({"cmd": "echo", "timeout_sec": -1})),
        400,
    )
    .await;
    bed.refused("POST", &path, Some(json!({"args": []})), 400)
        .await;

    let background = json!({"cmd": "cat", "background": true, "tag": "mine"});
    let (status, begun) = bed
        .call(
            "POST",
            &path,
            Some(json!({"cmd": "slow", "background": true})),
        )
        .await;
    assert_eq!(status, 202);
    assert!(begun["tag"].as_str().unwrap().starts_with("bg-"));
    let (status, _) = bed.call("POST", &path, Some(background)).await;
    assert_eq!(status, 202);
    bed.refused(
        "POST",
        &path,
        Some(json!({"cmd": "cat", "background": true, "tag": "12"})),
        400,
    )
    .await;
    let (_, list) = bed
        .call("GET", &format!("/v1/sandboxes/{id}/processes"), None)
        .await;
    assert!(
        list["processes"]
            .as_array()
            .unwrap()
            .iter()
            .any(|p| p["pid"] == begun["pid"]),
        "{list}"
    );
    let process = format!("/v1/sandboxes/{id}/processes/{}", begun["pid"]);
    bed.refused("DELETE", &format!("{process}?signal=SIGHUP"), None, 400)
        .await;
    assert_eq!(bed.call("DELETE", &process, None).await.0, 204);
    tokio::time::sleep(Duration::from_millis(20)).await;
    bed.refused("DELETE", &process, None, 404).await;
}

#[tokio::test]
async fn g31_files_stream_in_any_order_of_parts_and_broken_ones_leave_nothing() {
    let bed = bed().await;
    let id = bed.create().await;
    let write = format!("/v1/sandboxes/{id}/files/write");
    let part = |data: Vec<u8>| reqwest::multipart::Part::bytes(data).file_name("upload");
    let big: Vec<u8> = (0..3_000_000u32).map(|n| n as u8).collect();
    let forms = [
        (
            "/first",
            reqwest::multipart::Form::new()
                .text("path", "/first")
                .part("file", part(big.clone())),
        ),
        (
            "/second",
            reqwest::multipart::Form::new()
                .part("file", part(big.clone()))
                .text("path", "/second"),
        ),
    ];
    for (path, form) in forms {
        let reply = bed
            .request("POST", &write)
            .multipart(form)
            .send()
            .await
            .unwrap();
        assert_eq!(reply.status(), 200);
        assert_eq!(
            reply.json::<Value>().await.unwrap(),
            json!({"path": path, "size": big.len()})
        );
        for way in ["read", "stream/read"] {
            let read = format!("/v1/capsules/{id}/files/{way}");
            let reply = bed
                .request("POST", &read)
                .json(&json!({"path": path}))
                .send()
                .await
                .unwrap();
            assert_eq!(reply.content_length(), Some(big.len() as u64));
            assert!(reply.bytes().await.unwrap() == big);
        }
    }
    // Cut off before the closing boundary.
    let body = b"--b\r\nContent-Disposition: form-data; name=\"path\"\r\n\r\n/half\r\n--b\r\n\
        Content-Disposition: form-data; name=\"file\"\r\n\r\nhalf of it"
        .to_vec();
    let reply = bed
        .request("POST", &write)
        .header("content-type", "multipart/form-data; boundary=b")
        .body(body);
    assert_eq!(reply.send().await.unwrap().status(), 400);
    // Cut off by the connection.
    let stream = futures::stream::iter([
        Ok(b"--b\r\nContent-Disposition: form-data; name=\"file\"\r\n\r\nhalf".to_vec()),
        Err(std::io::Error::other("gone")),
    ]);
    let reply = bed
        .request("POST", &format!("{write}?path=/half"))
        .header("content-type", "multipart/form-data; boundary=b")
        .body(reqwest::Body::wrap_stream(stream));
    assert!(reply.send().await.is_err());
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!bed.sim.files.lock().unwrap().contains_key("/half"));
    let left: Vec<_> = std::fs::read_dir(bed.dir.path())
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert!(
        left.iter()
            .all(|n| !n.to_string_lossy().starts_with("upload-")),
        "{left:?}"
    );

    let form = || reqwest::multipart::Form::new();
    for (form, status) in [
        (form().text("path", "/x"), 400),
        (form().part("file", part(vec![1])), 400),
        (form().text("path", "").part("file", part(vec![1])), 400),
        (form().text("path", "/x").part("data", part(vec![1])), 400),
        (
            form().text("path", "/full").part("file", part(vec![1])),
            507,
        ),
    ] {
        let reply = bed
            .request("POST", &write)
            .multipart(form)
            .send()
            .await
            .unwrap();
        let got = reply.status().as_u16();
        let body: Value = reply.json().await.unwrap();
        assert_eq!(got, status, "{body}");
        assert!(body["error"]["message"].is_string());
    }
    bed.refused("POST", &write, Some(json!({"path": "/x"})), 400)
        .await;
    let read = format!("/v1/sandboxes/{id}/files/read");
    bed.refused("POST", &read, Some(json!({"path": "/dir/"})), 400)
        .await;
    let error = bed
        .refused("POST", &read, Some(json!({"path": "/none"})), 404)
        .await;
    assert!(error["message"].as_str().unwrap().contains("/none"));
}
