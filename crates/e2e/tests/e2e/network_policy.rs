//! A sandbox's own policy, by the API and in a real machine: against a listener in a namespace
//! of the test, behind an address that looks public to the guest. No packet leaves this machine.

use std::net::TcpListener;
use std::process::Command;

use reqwest::Method;
use serde_json::{Value, json};
use wrenn_e2e::{Api, Server};

/// Of the range for AMT relays (RFC 7450), in which nobody has this address.
const OUTSIDE: &str = "192.52.193.77";
const NAMESPACE: &str = "e2e-policy";
const LINK: &str = "e2epolicy";
const PORT: u16 = 7077;

fn ip(line: &str) {
    let output = Command::new("ip").args(line.split(' ')).output();
    let output = output.expect("ip runs");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {line}: {stderr}");
}

/// The namespace, its link and a listener in it that says "reached".
struct Outside;

impl Outside {
    fn start() -> Self {
        Self::remove();
        ip(&format!("netns add {NAMESPACE}"));
        let outside = Outside;
        ip(&format!(
            "link add {LINK} type veth peer name eth0 netns {NAMESPACE}"
        ));
        ip(&format!("addr add 10.250.77.1/30 dev {LINK}"));
        ip(&format!("link set {LINK} up"));
        for line in [
            "addr add 10.250.77.2/30 dev eth0",
            "link set lo up",
            "link set eth0 up",
            "route add default via 10.250.77.1",
        ] {
            ip(&format!("-n {NAMESPACE} {line}"));
        }
        ip(&format!("-n {NAMESPACE} addr add {OUTSIDE}/32 dev lo"));
        ip(&format!("route add {OUTSIDE}/32 via 10.250.77.2"));
        let inside = std::fs::File::open(format!("/run/netns/{NAMESPACE}")).expect("a namespace");
        let listener = std::thread::spawn(move || {
            use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
            use std::os::fd::AsFd;
            move_into_link_name_space(inside.as_fd(), Some(LinkNameSpaceType::Network))
                .expect("the namespace can be entered");
            TcpListener::bind(("0.0.0.0", PORT)).expect("a listener")
        });
        let listener = listener.join().expect("a listener");
        // Ends with the test program.
        std::thread::spawn(move || {
            let mut open = Vec::new();
            for mut stream in listener.incoming().flatten() {
                let _ = std::io::Write::write_all(&mut stream, b"reached");
                open.push(stream);
            }
        });
        outside
    }

    fn remove() {
        for line in [format!("link del {LINK}"), format!("netns del {NAMESPACE}")] {
            let _ = Command::new("ip").args(line.split(' ')).output();
        }
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        Self::remove();
    }
}

/// What the guest gets from the listener.
async fn reach(api: &Api, id: &str) -> String {
    let program = format!(
        "import socket\ntry: print(socket.create_connection(('{OUTSIDE}', {PORT}), 3).recv(7).decode())\n\
         except OSError as e: print(type(e).__name__)"
    );
    let ran = api.exec(id, "python3", &["-c", &program]).await;
    ran["stdout"].as_str().unwrap_or_default().trim().to_owned()
}

async fn put(api: &Api, path: &str, body: Value) -> wrenn_e2e::Answer {
    let request = api.request(Method::PUT, path).json(&body);
    api.send(request).await
}

pub(crate) async fn g35_a_network_policy_holds_in_a_machine_and_through_a_pause(server: &Server) {
    let outside = Outside::start();
    let api = server.api();
    let denied = json!({"templateID": "base", "network": {"denyOut": ["192.52.193.0/24"]}});
    let made = api.post("/v2/sandboxes", &denied).await.expect(201).json();
    let id = made["sandboxID"].as_str().expect("an id").to_owned();
    let network = format!("/v1/sandboxes/{id}/network");
    for _ in 0..2 {
        assert_eq!(reach(&api, &id).await, "ConnectionRefusedError");
    }
    let denials = api.get(&format!("{network}/denials")).await.expect(200);
    let listed = denials.json();
    let ours = listed.as_array().expect("a list").iter();
    let ours: Vec<_> = ours.filter(|one| one["destination"] == OUTSIDE).collect();
    assert_eq!(ours.len(), 1, "{listed}");
    let (count, port) = (&ours[0]["count"], &ours[0]["port"]);
    assert_eq!((count, port), (&json!(2), &json!(PORT)), "{listed}");
    assert_eq!(
        (&ours[0]["reason"], &ours[0]["protocol"]),
        (&json!("denied"), &json!("tcp"))
    );

    // Changed while it runs, by each of the APIs.
    put(&api, &network, json!({})).await.expect(200);
    assert_eq!(reach(&api, &id).await, "reached");
    let e2b = format!("/sandboxes/{id}/network");
    put(&api, &e2b, json!({"denyOut": ["0.0.0.0/0"]}))
        .await
        .expect(204);
    assert_eq!(reach(&api, &id).await, "ConnectionRefusedError");
    let allowed = json!({"allowOut": [OUTSIDE], "denyOut": ["0.0.0.0/0"]});
    put(&api, &e2b, allowed).await.expect(204);
    assert_eq!(reach(&api, &id).await, "reached");
    put(&api, &e2b, json!({"denyOut": ["example.com"]}))
        .await
        .expect(400);
    assert_eq!(reach(&api, &id).await, "reached");

    // A pause, and a fork, keep it.
    put(&api, &network, json!({"deny": [OUTSIDE]}))
        .await
        .expect(200);
    api.post(&format!("/v1/sandboxes/{id}/pause"), &json!({}))
        .await;
    put(&api, &network, json!({})).await.expect(409);
    api.post(&format!("/v1/sandboxes/{id}/resume"), &json!({}))
        .await;
    assert_eq!(reach(&api, &id).await, "ConnectionRefusedError");
    let kept = api.get(&network).await.expect(200).json();
    assert_eq!(kept["deny"], json!([OUTSIDE]));
    let forked = api
        .post(&format!("/v1/sandboxes/{id}/fork"), &json!({"count": 1}))
        .await
        .json();
    let child = forked
        .as_array()
        .and_then(|children| children.first())
        .and_then(|child| child["id"].as_str().or(child["sandbox"]["id"].as_str()))
        .unwrap_or_else(|| panic!("no child in {forked}"))
        .to_owned();
    assert_eq!(reach(&api, &child).await, "ConnectionRefusedError");

    api.destroy(&child).await;
    api.destroy(&id).await;
    drop(outside);
}
