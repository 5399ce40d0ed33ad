//! The host's half and the server around it, against the real agent.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use connectrpc::client::CallOptions;
use support::{Envd, run, sh};

/// One request on a new connection; status line, headers and body as text.
fn http(
    envd: &Envd,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> (u16, String) {
    let mut stream = TcpStream::connect(envd.address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let mut text = format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n",
        body.len()
    );
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    stream
        .write_all(format!("{text}\r\n{body}").as_bytes())
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    (answer[9..12].parse().unwrap(), answer)
}

fn init(envd: &Envd, token: Option<&str>, body: &str) -> (u16, String) {
    let headers: Vec<(&str, &str)> = token.iter().map(|t| ("x-access-token", *t)).collect();
    http(envd, "POST", "/init", &headers, body)
}

#[test]
fn health_metrics_envs_and_versions_are_there() {
    let envd = Envd::start();
    let (status, text) = http(&envd, "GET", "/health", &[], "");
    assert_eq!(status, 204);
    assert!(
        text.to_lowercase().contains("x-envd-version: 0.6.13"),
        "{text}"
    );
    let (_, text) = http(&envd, "GET", "/metrics", &[], "");
    for key in [
        "ts",
        "cpu_count",
        "cpu_used_pct",
        "mem_total",
        "mem_used",
        "mem_cache",
        "mem_total_mib",
        "mem_used_mib",
        "disk_used",
        "disk_total",
    ] {
        assert!(text.contains(&format!("\"{key}\":")), "{key}: {text}");
    }
    assert_eq!(http(&envd, "GET", "/no-such", &[], "").0, 404);
    assert_eq!(http(&envd, "DELETE", "/health", &[], "").0, 405);
}

#[test]
fn g33_the_token_is_enforced_everywhere_but_where_it_must_not_be() {
    let envd = Envd::start();
    assert_eq!(
        http(&envd, "GET", "/envs", &[], "").0,
        200,
        "open until a token is set"
    );
    let body =
        r#"{"restoreID":"r1","accessToken":"secret","envVars":{"A":"1"},"sandboxID":"sb-1"}"#;
    assert_eq!(init(&envd, None, body).0, 204);
    for (method, path) in [
        ("GET", "/envs"),
        ("GET", "/metrics"),
        ("GET", "/ports"),
        ("POST", "/snapshot/prepare"),
        ("POST", "/snapshot/undo"),
        ("POST", "/snapshot/rehearse"),
        ("POST", "/process.Process/List"),
        ("POST", "/process.Process/Start"),
        ("POST", "/filesystem.Filesystem/Stat"),
        ("GET", "/files?path=/etc/passwd"),
        ("POST", "/files?path=/tmp/x"),
        ("POST", "/files/compose"),
        ("GET", "/no-such"),
    ] {
        for headers in [
            &[][..],
            &[("x-access-token", "wrong")],
            &[("x-access-token", "")],
        ] {
            let (status, text) = http(&envd, method, path, headers, "");
            assert_eq!(status, 401, "{method} {path} {headers:?}: {text}");
        }
    }
    assert_eq!(http(&envd, "GET", "/health", &[], "").0, 204);
    let token = &[("x-access-token", "secret")];
    let (_, text) = http(&envd, "GET", "/envs", token, "");
    assert!(
        text.contains(r#""A":"1""#) && text.contains(r#""E2B_SANDBOX_ID":"sb-1""#),
        "{text}"
    );
    // Nobody else takes the sandbox over.
    assert_eq!(
        init(&envd, None, r#"{"restoreID":"r2","accessToken":"mine"}"#).0,
        401
    );
    assert_eq!(
        init(
            &envd,
            Some("wrong"),
            r#"{"restoreID":"r2","accessToken":"mine"}"#
        )
        .0,
        401
    );
    // The same restore changes nothing, a new one replaces.
    assert_eq!(
        init(
            &envd,
            Some("secret"),
            r#"{"restoreID":"r1","envVars":{"B":"2"}}"#
        )
        .0,
        204
    );
    assert!(
        http(&envd, "GET", "/envs", token, "")
            .1
            .contains(r#""A":"1""#)
    );
    assert_eq!(
        init(
            &envd,
            Some("secret"),
            r#"{"restoreID":"r2","accessToken":"next","envVars":{"B":"2"}}"#
        )
        .0,
        204
    );
    assert_eq!(http(&envd, "GET", "/envs", token, "").0, 401);
    let (_, text) = http(&envd, "GET", "/envs", &[("x-access-token", "next")], "");
    assert!(
        text.contains(r#""B":"2""#) && !text.contains(r#""A""#),
        "{text}"
    );
    assert_eq!(init(&envd, Some("next"), "{").0, 400);
    assert_eq!(
        init(
            &envd,
            Some("next"),
            r#"{"restoreID":"r3","timestamp":"yesterday"}"#
        )
        .0,
        400
    );
}

/// What an answer to `/init` says that the hook did.
fn restored(answer: &str) -> serde_json::Value {
    let line = answer
        .lines()
        .find_map(|line| line.strip_prefix("x-wrenn-restored: "))
        .unwrap_or_else(|| panic!("no certificate: {answer}"));
    serde_json::from_str(line).unwrap()
}

#[test]
fn g25_the_restore_hook_says_what_it_did_and_says_the_same_again() {
    let envd = Envd::start();
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    let body = format!(
        r#"{{"restoreID":"r1","accessToken":"t","timestamp":{}}}"#,
        (now - Duration::from_secs(100)).as_nanos()
    );
    let (status, answer) = init(&envd, None, &body);
    assert_eq!(status, 204);
    let first = restored(&answer);
    // Outside a VM randomness, names and clock are the machine's, and stay.
    for key in ["entropyReseeded", "idsRotated", "clockSet"] {
        assert_eq!(first[key], false, "{first}");
    }
    let offset = first["clockOffsetMicros"].as_i64().unwrap();
    assert!((100_000_000..130_000_000).contains(&offset), "{first}");
    let steps = first["steps"].as_array().unwrap();
    let names: Vec<_> = steps.iter().map(|step| step[0].as_str().unwrap()).collect();
    assert_eq!(names, ["connections", "ports", "thaw"]);
    assert!(steps.iter().all(|step| step[1].is_u64()), "{first}");
    // The hook does not run again, so it has nothing else to say.
    let (_, again) = init(&envd, Some("t"), r#"{"restoreID":"r1"}"#);
    assert_eq!(restored(&again), first);
    let (_, next) = init(&envd, Some("t"), r#"{"restoreID":"r2"}"#);
    assert!(
        restored(&next)["clockOffsetMicros"].is_null(),
        "no time was sent: {next}"
    );
    // Who is refused learns nothing.
    let (status, refused) = init(&envd, Some("wrong"), r#"{"restoreID":"r2"}"#);
    assert_eq!(status, 401);
    assert!(!refused.contains("x-wrenn-restored"), "{refused}");
}

#[tokio::test]
async fn variables_of_the_sandbox_reach_its_programs() {
    let envd = Envd::start();
    assert_eq!(
        init(
            &envd,
            None,
            r#"{"envVars":{"A":"of sandbox"},"sandboxID":"sb-7","defaultWorkdir":"/usr"}"#
        )
        .0,
        204
    );
    let told = run(
        &envd.client(),
        sh("echo $A $E2B_SANDBOX $WRENN_SANDBOX_ID; pwd"),
        CallOptions::default(),
    )
    .await
    .unwrap();
    assert_eq!(
        String::from_utf8(told.stdout).unwrap(),
        "of sandbox true sb-7\n/usr\n"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn g25_a_prepared_guest_starts_nothing_and_goes_on_when_told() {
    let envd = Envd::start();
    let mut idle = TcpStream::connect(envd.address).unwrap();
    idle.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    idle.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        .unwrap();
    let mut answer = [0; 1024];
    assert!(idle.read(&mut answer).unwrap() > 0);
    // Its request is on its way.
    let mut fresh = TcpStream::connect(envd.address).unwrap();
    fresh
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    assert_eq!(http(&envd, "POST", "/snapshot/prepare", &[], "").0, 204);
    assert_eq!(
        http(&envd, "POST", "/snapshot/prepare", &[], "").0,
        204,
        "again is harmless"
    );
    assert_eq!(
        idle.read(&mut answer).unwrap(),
        0,
        "idle connections are closed"
    );
    fresh
        .write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")
        .unwrap();
    let mut served = String::new();
    fresh.read_to_string(&mut served).unwrap();
    assert!(
        served.starts_with("HTTP/1.1 200") && served.contains("cpu_count"),
        "one that was just opened is served, and closed then: {served}"
    );
    let client = envd.client();
    let waiting = tokio::spawn(async move {
        let told = run(&client, sh("echo ran"), CallOptions::default()).await;
        told.unwrap().stdout
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(
        !waiting.is_finished(),
        "nothing starts while it is prepared"
    );
    assert_eq!(http(&envd, "POST", "/snapshot/rehearse", &[], "").0, 204);
    assert!(!waiting.is_finished(), "a rehearsal lets nothing go on");
    for not_a_time in ["{", r#"{"timestamp":"yesterday"}"#] {
        assert_eq!(
            http(&envd, "POST", "/snapshot/undo", &[], not_a_time).0,
            400
        );
    }
    assert!(
        !waiting.is_finished(),
        "what is not understood does nothing"
    );
    let now = r#"{"timestamp":1795352700500000000}"#;
    assert_eq!(http(&envd, "POST", "/snapshot/undo", &[], now).0, 204);
    assert_eq!(waiting.await.unwrap(), b"ran\n");
    assert_eq!(http(&envd, "POST", "/snapshot/undo", &[], "").0, 204);
    assert_eq!(http(&envd, "POST", "/snapshot/rehearse", &[], "").0, 204);
    let client = envd.client();
    let told = run(&client, sh("echo ran"), CallOptions::default()).await;
    assert_eq!(told.unwrap().stdout, b"ran\n", "nor does it stop anything");
}

/// The head of the answer to one more request on a connection that may carry others.
fn ask_again(stream: &mut TcpStream) -> String {
    stream
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    stream
        .write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        .unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    String::from_utf8(head).unwrap().to_lowercase()
}

/// What is open and idle at a freeze is open and idle in the clone, whose host knows nothing of it.
#[test]
fn g25_a_connection_of_a_prepared_guest_is_not_left_open() {
    const CLOSES: &str = "connection: close";
    let envd = Envd::start();
    let connect = || TcpStream::connect(envd.address).unwrap();
    let prepare = || assert_eq!(http(&envd, "POST", "/snapshot/prepare", &[], "").0, 204);
    let ends = |stream: &mut TcpStream| assert_eq!(stream.read(&mut [0]).unwrap(), 0);

    prepare();
    let mut brief = connect();
    assert!(ask_again(&mut brief).contains(CLOSES), "its user is told");
    ends(&mut brief);
    let mut waiting = connect();
    // Asked on another connection first, so that the agent has accepted the one before.
    ask_again(&mut connect());
    assert_eq!(http(&envd, "POST", "/snapshot/undo", &[], "").0, 204);
    assert!(ask_again(&mut waiting).contains(CLOSES));
    ends(&mut waiting);
    let mut lasting = connect();
    for _ in 0..2 {
        assert!(!ask_again(&mut lasting).contains(CLOSES));
    }

    // What was opened to a restored guest before its hook ran, as the hook's own connection was.
    prepare();
    ends(&mut lasting);
    let mut early = connect();
    ask_again(&mut connect());
    assert_eq!(init(&envd, None, r#"{"restoreID":"r1"}"#).0, 204);
    for _ in 0..2 {
        assert!(!ask_again(&mut early).contains(CLOSES));
    }
}

#[test]
fn malformed_requests_harm_nobody() {
    let envd = Envd::start();
    let before = envd.descriptors();
    for bytes in [
        &b"\0\0\0\0\0\0\0"[..],
        b"GET",
        b"POST /process.Process/Start HTTP/1.1\r\nhost: x\r\ncontent-type: application/connect+json\r\ncontent-length: 9\r\n\r\n\0\xff\xff\xff\xff{}{}",
        b"POST /process.Process/Start HTTP/1.1\r\nhost: x\r\ncontent-type: application/connect+proto\r\ncontent-length: 7\r\n\r\n\0\0\0\0\x02\xff\xff",
        b"POST /process.Process/List HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99999999999\r\n\r\n{",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
    ] {
        let mut stream = TcpStream::connect(envd.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        stream.write_all(bytes).unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(!answer.starts_with(b"HTTP/1.1 200 OK") || answer.windows(7).any(|w| w == b"\"error\""));
    }
    assert_eq!(http(&envd, "GET", "/health", &[], "").0, 204);
    let until = Instant::now() + Duration::from_secs(10);
    while envd.descriptors() > before + 1 {
        assert!(Instant::now() < until, "no descriptor is lost");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The lines of a chunked answer's body.
fn lines(answer: &str) -> Vec<serde_json::Value> {
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    // The lines between are the lengths of chunks, and where one was cut in two.
    let mut whole = String::new();
    let mut rest = body;
    while let Some((length, after)) = rest.split_once("\r\n") {
        let length = usize::from_str_radix(length, 16).unwrap();
        whole.push_str(&after[..length]);
        rest = &after[length + 2..];
    }
    whole
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn an_inventory_has_programs_ports_and_files() {
    let envd = Envd::start();
    let dir = std::env::temp_dir().join(format!("envd-inventory-{}", std::process::id()));
    std::fs::create_dir_all(dir.join("sub")).unwrap();
    for n in 0..1500 {
        std::fs::write(dir.join(format!("sub/file-{n:04}")), "x").unwrap();
    }
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = u64::from(listener.local_addr().unwrap().port());
    let path = format!("/snapshot/inventory?path={}", dir.display());
    let (status, answer) = http(&envd, "POST", &path, &[], "");
    assert_eq!(status, 200, "{answer}");
    let lines = lines(&answer);
    let ports = lines[0]["ports"].as_array().unwrap();
    assert!(ports.iter().any(|one| one["port"] == port), "{ports:?}");
    let own = u64::from(envd.address.port());
    assert!(!ports.iter().any(|one| one["port"] == own), "{ports:?}");
    let processes = lines[0]["processes"].as_array().unwrap();
    let me = std::process::id();
    assert!(
        processes.iter().any(|one| one["pid"] == me),
        "{processes:?}"
    );
    assert!(!processes.iter().any(|one| one["pid"] == envd.pid()));
    assert_eq!(lines.len(), 1 + 2 + 1500 + 1);
    assert_eq!(lines[3]["path"], format!("{}/sub/file-0000", dir.display()));
    let last = lines.last().unwrap();
    assert_eq!(
        (&last["end"], &last["truncated"]),
        (&true.into(), &false.into())
    );
    // What two of them hold, and of what is not there, nothing.
    let body = serde_json::json!({"paths": [
        {"path": dir.join("sub/file-0000")}, {"path": dir.join("sub/file-0001")}, {"path": "/none"},
    ]});
    let (status, answer) = http(&envd, "POST", "/snapshot/digests", &[], &body.to_string());
    assert_eq!(status, 200, "{answer}");
    let body: serde_json::Value =
        serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
    let digests = body["digests"].as_array().unwrap();
    assert!(digests[0].is_string() && digests[0] == digests[1] && digests[2].is_null());
    std::fs::remove_dir_all(&dir).unwrap();
    for refused in ["relative", "/a/../b", "/proc/self"] {
        let path = format!("/snapshot/inventory?path={refused}");
        assert_eq!(http(&envd, "POST", &path, &[], "").0, 400, "{refused}");
    }
    assert_eq!(http(&envd, "POST", "/snapshot/digests", &[], "{}").0, 400);
}

#[test]
fn g33_an_inventory_needs_the_token() {
    let envd = Envd::start();
    init(&envd, None, r#"{"restoreID":"r1","accessToken":"secret"}"#);
    for (path, body) in [
        ("/snapshot/inventory?path=/tmp", ""),
        ("/snapshot/digests", r#"{"paths":[]}"#),
    ] {
        assert_eq!(http(&envd, "POST", path, &[], body).0, 401, "{path}");
        let wrong = [("x-access-token", "wrong")];
        assert_eq!(http(&envd, "POST", path, &wrong, body).0, 401, "{path}");
        let right = [("x-access-token", "secret")];
        assert_eq!(http(&envd, "POST", path, &right, body).0, 200, "{path}");
    }
}
