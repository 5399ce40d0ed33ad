//! The whole surface: who gets in, the committed document, the documentation pages.

use serde_json::Value;

use crate::support::bed;

/// Routes that answer without a key, beside the documentation pages.
const OPEN: [&str; 3] = ["/health", "/ready", "/metrics"];

fn document() -> Value {
    serde_yaml_ng::from_str(&wrenn_control::openapi_yaml()).unwrap()
}

/// Method and path of every operation, with parameters filled in.
fn operations() -> Vec<(String, String)> {
    let mut all = Vec::new();
    for (path, item) in document()["paths"].as_object().unwrap() {
        for method in ["get", "post", "put", "patch", "delete"] {
            if item.get(method).is_some() {
                let path = path
                    .replace("{id}", "sb-0192f0c8-6a3e-7c3a-9d1e-5b8f3c2a1d00")
                    .replace("{key_id}", "key-0192f0c8-6a3e-7c3a-9d1e-5b8f3c2a1d00")
                    .replace("{process}", "1")
                    .replace("{name}", "mine")
                    .replace("{template}", "mine");
                assert!(!path.contains('{'), "{path}");
                all.push((method.to_uppercase(), path));
            }
        }
    }
    all
}

#[tokio::test]
async fn g39_no_route_answers_without_a_valid_key() {
    let bed = bed().await;
    let wrong = wrenn_types::ApiKey::generate().unwrap().reveal();
    let operations = operations();
    assert!(operations.len() > 25, "{}", operations.len());
    for (method, path) in operations {
        let ask = |headers: &[(&'static str, &str)]| {
            let mut request = bed.http.request(method.parse().unwrap(), bed.url(&path));
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            async move {
                let reply = request.send().await.unwrap();
                (reply.status().as_u16(), reply.text().await.unwrap())
            }
        };
        if OPEN.contains(&path.as_str()) {
            assert_eq!(ask(&[]).await.0, 200, "{method} {path}");
            continue;
        }
        let upgrade = [
            ("x-api-key", "wrn_x"),
            ("connection", "upgrade"),
            ("upgrade", "websocket"),
        ];
        let bearer = format!("Bearer {wrong}");
        for headers in [
            &[][..],
            &[("x-api-key", "")],
            &[("x-api-key", "x")],
            &[("x-api-key", &wrong)],
            &[("authorization", &bearer)],
            &upgrade,
        ] {
            let (status, body) = ask(headers).await;
            assert_eq!(status, 401, "{method} {path} {headers:?}: {body}");
            let body: Value = serde_json::from_str(&body).unwrap();
            if path.starts_with("/v1/") {
                assert_eq!(body["error"]["code"], "unauthorized");
            } else {
                assert_eq!(body["code"], 401);
            }
            assert!(!body.to_string().contains(&wrong));
        }
        // With the key it is another answer, so the route is there.
        let key = bed.key.reveal();
        let (status, body) = ask(&[("x-api-key", &key)]).await;
        assert_ne!(status, 401, "{method} {path}");
        assert_ne!(status, 405, "{method} {path}");
        assert!(
            !body.contains("there is nothing at"),
            "{method} {path}: {body}"
        );
    }
}

/// `UPDATE=1 cargo test --workspace --test api -- surface` writes it anew.
#[test]
fn the_committed_document_is_what_the_code_says() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/openapi.yaml");
    let now = wrenn_control::openapi_yaml();
    assert!(now.starts_with("openapi: 3.1"), "{}", &now[..40]);
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(path, &now).unwrap();
    }
    let committed = std::fs::read_to_string(path).unwrap_or_default();
    if committed != now {
        let differs = committed.lines().zip(now.lines()).position(|(a, b)| a != b);
        panic!(
            "docs/openapi.yaml is not what the code says from line {differs:?} on; run with UPDATE=1"
        );
    }
}

#[tokio::test]
async fn the_documentation_is_served_by_us_alone() {
    let bed = bed().await;
    let get = async |path: &str| {
        let reply = bed.http.get(bed.url(path)).send().await.unwrap();
        (reply.status().as_u16(), reply.text().await.unwrap())
    };
    assert_eq!(
        get("/openapi.yaml").await,
        (200, wrenn_control::openapi_yaml())
    );
    let (status, page) = get("/docs").await;
    assert_eq!(status, 200);
    for loaded in page
        .split(['"', '\''])
        .filter(|s| s.ends_with(".js") || s.ends_with(".css"))
    {
        assert!(!loaded.contains("//"), "{loaded} is loaded from elsewhere");
        let (status, _) = get(&format!("/docs/{}", loaded.trim_start_matches("./"))).await;
        assert_eq!(status, 200, "{loaded}");
    }
    let (_, start) = get("/docs/swagger-initializer.js").await;
    assert!(
        start.contains("/openapi.yaml") && start.contains("none"),
        "{start}"
    );
}
