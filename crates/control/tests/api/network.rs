//! What a sandbox may reach, by both APIs, on a host without machines.

use serde_json::{Value, json};

use crate::support::bed;

#[tokio::test]
async fn rules_are_given_at_the_start_replaced_and_read() {
    let bed = bed().await;
    let network = json!({"allow": ["*.example.com"], "deny": ["0.0.0.0/0"]});
    let (status, made) = bed
        .call("POST", "/v1/sandboxes", Some(json!({"network": network})))
        .await;
    assert_eq!(status, 201, "{made}");
    let id = made["id"].as_str().unwrap();
    let asked = bed.sim.created.lock().unwrap()[0].clone();
    assert!(asked.allow_internet);
    assert_eq!(asked.allow_out, ["*.example.com"]);
    assert_eq!(asked.deny_out, ["0.0.0.0/0"]);

    let path = format!("/v1/sandboxes/{id}/network");
    let (status, read) = bed.call("GET", &path, None).await;
    let whole = json!({"allow_internet": true, "allow": ["*.example.com"], "deny": ["0.0.0.0/0"]});
    assert_eq!((status, &read), (200, &whole));
    // Left out is cleared.
    let only = json!({"allow_internet": false, "allow": ["1.2.3.4"]});
    let now = json!({"allow_internet": false, "allow": ["1.2.3.4"], "deny": []});
    assert_eq!(bed.call("PUT", &path, Some(only)).await, (200, now.clone()));
    assert_eq!(bed.call("GET", &path, None).await, (200, now));
    let open = json!({"allow_internet": true, "allow": [], "deny": []});
    assert_eq!(bed.call("PUT", &path, Some(json!({}))).await, (200, open));
    // What the host cannot read, and what nobody knows.
    for (body, word) in [
        (json!({"allow": ["not-a-name!"]}), "not-a-name!"),
        (json!({"allow": "1.2.3.4"}), "expected"),
        (json!({"rules": {}}), "rules"),
    ] {
        let error = bed.refused("PUT", &path, Some(body.clone()), 400).await;
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(word), "{body}: {message}");
    }
    let (status, denials) = bed.call("GET", &format!("{path}/denials"), None).await;
    let denial = json!({"at": "2023-11-14T22:13:20.000Z", "protocol": "tcp",
        "destination": "10.0.0.1", "port": 443, "count": 2, "reason": "forbidden"});
    assert_eq!((status, denials), (200, json!([denial])));

    let nobody = "/v1/sandboxes/sb-0192f0c8-6a3e-7c3a-9d1e-5b8f3c2a1d00/network";
    for (method, path, body) in [
        ("GET", nobody.to_owned(), None),
        ("PUT", nobody.to_owned(), Some(json!({}))),
        ("GET", format!("{nobody}/denials"), None),
    ] {
        bed.refused(method, &path, body, 404).await;
    }
    let pause = format!("/v1/sandboxes/{id}/pause");
    assert!(bed.call("POST", &pause, None).await.0 < 300);
    assert_eq!(bed.call("GET", &path, None).await.0, 200);
    bed.refused("PUT", &path, Some(json!({})), 409).await;
    bed.refused("GET", &format!("{path}/denials"), None, 409)
        .await;
}

#[tokio::test]
async fn e2b_clients_set_and_see_them_in_their_words() {
    let bed = bed().await;
    let body = json!({"templateID": "base", "allow_internet_access": false,
        "network": {"allowOut": ["pypi.org"], "denyOut": ["9.9.9.9"], "egressProxy": null}});
    let (status, made) = bed.call("POST", "/v2/sandboxes", Some(body)).await;
    assert_eq!(status, 201, "{made}");
    let id = made["sandboxID"].as_str().unwrap();
    let detail = |of: Value| (of["allowInternetAccess"].clone(), of["network"].clone());
    let path = format!("/sandboxes/{id}");
    let (_, seen) = bed.call("GET", &path, None).await;
    assert_eq!(
        detail(seen),
        (
            json!(false),
            json!({"allowOut": ["pypi.org"], "denyOut": ["9.9.9.9"], "allowPublicTraffic": true})
        )
    );
    let put = format!("{path}/network");
    let all = json!({"allowOut": ["*.example.com", "1.1.1.1"], "denyOut": ["0.0.0.0/0"]});
    assert_eq!(bed.call("PUT", &put, Some(all)).await.0, 204);
    let (_, seen) = bed.call("GET", &path, None).await;
    assert_eq!(
        detail(seen),
        (
            json!(true),
            json!({"allowOut": ["*.example.com", "1.1.1.1"], "denyOut": ["0.0.0.0/0"],
                "allowPublicTraffic": true})
        )
    );
    for (body, word) in [
        (json!({"allowOut": ["pypi.org"]}), "0.0.0.0/0"),
        (json!({"dnsServers": ["1.1.1.1"]}), "dnsServers"),
        (json!({"egressProxy": {"address": "a:1"}}), "egressProxy"),
        (json!({"rules": {"a.example": [1]}}), "rules"),
    ] {
        let (status, answer) = bed.call("PUT", &put, Some(body.clone())).await;
        assert_eq!(status, 400, "{body}");
        assert!(
            answer["message"].as_str().unwrap().contains(word),
            "{answer}"
        );
    }
    let cleared = json!({"egressProxy": null, "rules": {}, "dnsServers": []});
    assert_eq!(bed.call("PUT", &put, Some(cleared)).await.0, 204);
    let (_, seen) = bed.call("GET", &path, None).await;
    assert_eq!(seen["network"]["denyOut"], json!([]));

    let nobody = "/sandboxes/sb-0192f0c8-6a3e-7c3a-9d1e-5b8f3c2a1d00/network";
    assert_eq!(bed.call("PUT", nobody, Some(json!({}))).await.0, 404);
    assert!(bed.call("POST", &format!("{path}/pause"), None).await.0 < 300);
    assert_eq!(bed.call("PUT", &put, Some(json!({}))).await.0, 409);
}
