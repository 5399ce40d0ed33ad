//! What cannot work is refused: by the right status or exit code, with a message that names
//! the thing and the remedy, and nothing is left behind.

use std::net::TcpListener;
use std::path::Path;
use std::process::Command as StdCommand;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::Command;
use wrenn_e2e::{Api, Cli, HostState, Ran, Server, free_address, wrenn_binary};

use crate::images;

const PATIENCE: Duration = Duration::from_secs(60);
/// An id in the right form that nothing has.
const NOBODY: &str = "sb-0192f0c8-6a3e-7c3a-9d1e-5b8f3c2a1d00";

pub(crate) async fn requests_are_refused_and_leave_nothing(data_dir: &Path) {
    let server = Server::start(data_dir).await;
    let api = server.api();
    let id = api.create(&json!({})).await;
    // The pool and the database are at rest before anything is compared.
    api.shell(&id, "true").await;
    let before = HostState::settled(data_dir, Some(server.pid()), PATIENCE).await;

    templates_and_shapes(&api).await;
    ids(&api).await;
    keys(&api, &server).await;
    commands_and_paths(&api, &id).await;
    bodies(&api, &server).await;

    assert_eq!(
        api.running().await.as_slice(),
        std::slice::from_ref(&id),
        "a refused request made a sandbox"
    );
    HostState::wait_for_return(&before, data_dir, Some(server.pid()), PATIENCE).await;
    // Refusals have not harmed what runs.
    assert_eq!(api.shell(&id, "echo well").await, "well\n");
    server.destroy().await;
}

async fn templates_and_shapes(api: &Api) {
    let create = async |body: Value| api.post("/v1/sandboxes", &body).await;
    create(json!({"template": "no-such-template"}))
        .await
        .expect_error(404, "not_found", &["no-such-template"]);
    for name in ["../minimal", "..", "a/../../etc", "names/minimal"] {
        let answer = create(json!({ "template": name })).await;
        assert!(
            [400, 404].contains(&answer.status),
            "template {name}: {}",
            answer.describe()
        );
        let message = answer.json()["error"]["message"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        assert!(message.contains(name), "{message}");
    }
    for vcpus in [0, -1, 4097, i64::MAX] {
        create(json!({ "vcpus": vcpus })).await.expect_error(
            400,
            "invalid_request",
            &["vcpu", &vcpus.to_string()],
        );
    }
    for memory in [0, -512, 1, 513, 1_i64 << 40] {
        let answer = create(json!({ "memory_mb": memory })).await;
        answer.expect_error(400, "invalid_request", &["memory", &memory.to_string()]);
    }
    for body in [
        json!({"vcpus": "two"}),
        json!({"memory_mb": 512.5}),
        json!({"timeout_sec": -1}),
        json!({"on_timeout": "explode"}),
        json!({"env": ["A=1"]}),
        json!({"metadata": "x"}),
        json!([]),
    ] {
        create(body).await.expect_error(400, "invalid_request", &[]);
    }
    let request = api
        .request(reqwest::Method::POST, "/v1/sandboxes")
        .header("content-type", "application/json");
    api.send(request.body("{\"template\":"))
        .await
        .expect_error(400, "invalid_request", &[]);
}

async fn ids(api: &Api) {
    for id in [
        "nonsense",
        "sb-",
        "sb-1",
        "usr-0192f0c8-6a3e-7c3a-9d1e-5b8f3c2a1d00",
        "..%2f..",
        "%00",
        "sb-%ff",
    ] {
        for (method, path) in [
            ("GET", ""),
            ("DELETE", ""),
            ("POST", "/exec"),
            ("POST", "/files/read"),
        ] {
            let method: reqwest::Method = method.parse().expect("a method");
            let request = api.request(method, &format!("/v1/sandboxes/{id}{path}"));
            let answer = api
                .send(request.json(&json!({"cmd": "true", "path": "/etc/hostname"})))
                .await;
            answer.expect_error(400, "invalid_request", &[]);
        }
    }
    api.get("/v1/sandboxes/nonsense").await.expect_error(
        400,
        "invalid_request",
        &["nonsense", "sb-"],
    );
    api.get(&format!("/v1/sandboxes/{NOBODY}"))
        .await
        .expect_error(404, "not_found", &[NOBODY]);
    api.delete(&format!("/v1/sandboxes/{NOBODY}"))
        .await
        .expect_error(404, "not_found", &[NOBODY]);
    let exec = json!({"cmd": "true"});
    api.post(&format!("/v1/sandboxes/{NOBODY}/exec"), &exec)
        .await
        .expect_error(404, "not_found", &[NOBODY]);
    api.read_file(NOBODY, "/etc/hostname")
        .await
        .expect_error(404, "not_found", &[NOBODY]);
    api.get("/v1/no-such-route").await.expect(404);
}

async fn keys(api: &Api, server: &Server) {
    let right = server.key();
    let last = if right.ends_with('0') { "1" } else { "0" };
    let almost = format!("{}{last}", &right[..right.len() - 1]);
    let foreign = format!("wrn_{}", "0".repeat(64));
    for key in [
        None,
        Some(""),
        Some("wrn_"),
        Some("hunter2"),
        Some(almost.as_str()),
        Some(foreign.as_str()),
    ] {
        let stranger = api.with_key(key);
        for answer in [
            stranger.get("/v1/sandboxes").await,
            stranger.post("/v1/sandboxes", &json!({})).await,
            stranger.delete(&format!("/v1/sandboxes/{NOBODY}")).await,
            stranger
                .post(
                    &format!("/v1/sandboxes/{NOBODY}/exec"),
                    &json!({"cmd": "true"}),
                )
                .await,
        ] {
            let answer = answer.expect_error(401, "unauthorized", &["API key"]);
            let body = String::from_utf8_lossy(&answer.body).into_owned();
            assert!(
                key.is_none_or(|key| key.len() < 5 || !body.contains(key)),
                "the key is repeated: {body}"
            );
        }
        // E2B's form of the same refusal.
        let answer = stranger
            .post("/v2/sandboxes", &json!({"templateID": "base"}))
            .await
            .expect(401);
        assert_eq!(answer.json()["code"], 401, "{}", answer.describe());
    }
    // Only what is for people, on standard output, shows the first key.
    let log = server.stderr();
    assert!(
        !log.contains(right) && !log.contains("hunter2"),
        "a key is in the log"
    );
    // The same key in E2B's spelling is right.
    api.with_key(Some(&right.replacen("wrn_", "e2b_", 1)))
        .get("/v1/sandboxes")
        .await
        .expect(200);
}

async fn bodies(api: &Api, server: &Server) {
    // Announced: refused before it is sent. Only a start is sent, so that the answer is what
    // ends the exchange.
    let mut stream = TcpStream::connect(server.address())
        .await
        .expect("a connection");
    let head = format!(
        "POST /v1/sandboxes HTTP/1.1\r\nHost: {}\r\nX-API-Key: {}\r\nContent-Type: application/json\r\n\
         Content-Length: 4000000000\r\n\r\n{{\"metadata\":{{\"x\":\"",
        server.address(),
        server.key()
    );
    stream.write_all(head.as_bytes()).await.expect("a request");
    let answer = read_head(&mut stream).await;
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");

    // Not announced: refused when it has become too large.
    let mut stream = TcpStream::connect(server.address())
        .await
        .expect("a connection");
    let head = head.replace("Content-Length: 4000000000", "Transfer-Encoding: chunked");
    let head = head.split("\r\n\r\n").next().unwrap_or_default().to_owned() + "\r\n\r\n";
    stream.write_all(head.as_bytes()).await.expect("a request");
    let chunk = [b"10000\r\n".as_slice(), &[b' '; 0x10000], b"\r\n"].concat();
    // Just over the 2 MiB that a JSON body may have. More would be thrown away unread, and a
    // connection that is closed over unread bytes takes the answer with it (RFC 9293, 3.10.7).
    for _ in 0..=32 {
        stream
            .write_all(&chunk)
            .await
            .expect("the server reads up to its limit");
    }
    let answer = read_head(&mut stream).await;
    assert!(
        answer.starts_with("HTTP/1.1 413") && answer.contains("too_large"),
        "{answer}"
    );
    api.get("/health").await.expect(200);
}

async fn read_head(stream: &mut TcpStream) -> String {
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    let reading = async {
        while !String::from_utf8_lossy(&answer).contains("\r\n\r\n{") {
            match stream.read(&mut buffer).await {
                Ok(n) if n > 0 => answer.extend_from_slice(&buffer[..n]),
                Ok(_) | Err(_) => break,
            }
        }
    };
    // Past this the assertion on what has come says what is missing.
    let _ = tokio::time::timeout(Duration::from_secs(20), reading).await;
    String::from_utf8_lossy(&answer).into_owned()
}

async fn commands_and_paths(api: &Api, id: &str) {
    let exec = format!("/v1/sandboxes/{id}/exec");
    let answer = api.post(&exec, &json!({"cmd": "no-such-program"})).await;
    let said = answer.describe();
    assert!(said.contains("no-such-program"), "{said}");
    assert!(
        [400, 404].contains(&answer.status),
        "a command that is not there is the caller's mistake: {said}"
    );
    let answer = api
        .post(&exec, &json!({"cmd": "true", "cwd": "/no/such/folder"}))
        .await;
    assert!(
        [400, 404].contains(&answer.status) && answer.describe().contains("/no/such/folder"),
        "{}",
        answer.describe()
    );
    let answer = api
        .post(&exec, &json!({"cmd": "true", "user": "nemo"}))
        .await;
    assert!(
        (400..500).contains(&answer.status) && answer.describe().contains("nemo"),
        "{}",
        answer.describe()
    );
    api.post(&exec, &json!({"cmd": ""}))
        .await
        .expect_error(400, "invalid_request", &["cmd"]);
    api.post(&exec, &json!({}))
        .await
        .expect_error(400, "invalid_request", &["cmd"]);

    api.read_file(id, "/etc")
        .await
        .expect_error(400, "invalid_request", &["/etc", "directory"]);
    api.read_file(id, "/no/such/file")
        .await
        .expect_error(404, "not_found", &["/no/such/file"]);
    let answer = api.write_file(id, "/etc", b"x".to_vec()).await;
    answer.expect_error(400, "invalid_request", &["/etc", "directory"]);
    // With that user's rights: /etc/shadow is not for everybody.
    let answer = api.read_file(id, "/etc/shadow").await;
    assert!([400, 403].contains(&answer.status), "{}", answer.describe());
    // In the guest `..` is a folder like any other, and leads nowhere outside of it.
    let answer = api
        .read_file(id, "/home/../../../../etc/hostname")
        .await
        .expect(200);
    let host = std::fs::read("/etc/hostname").unwrap_or_default();
    assert_ne!(answer.body, host, "a path led out of the guest");
}

pub(crate) async fn a_command_line_is_refused_with_a_remedy(data_dir: &Path) {
    let server = Server::start(data_dir).await;
    let cli = server.cli();
    let before = HostState::settled(data_dir, Some(server.pid()), PATIENCE).await;

    let ran = cli
        .run(&["run", "--template", "no-such-template", "--", "true"])
        .await
        .expect_code(125);
    ran.expect_stderr(&["no-such-template", "minimal"]);
    let ran = cli.run(&["run", "--memory", "1", "--", "true"]).await;
    assert!([2, 125].contains(&ran.code), "{ran:?}");
    ran.expect_stderr(&["memory", "128"]);
    let ran = cli
        .run(&["run", "--vcpus", "4096", "--", "true"])
        .await
        .expect_code(125);
    ran.expect_stderr(&["vcpu", "4096"]);
    cli.run(&["run"])
        .await
        .expect_code(2)
        .expect_stderr(&["usage"]);
    cli.run(&["no-such-command"])
        .await
        .expect_code(2)
        .expect_stderr(&["no-such-command"]);
    for command in ["inspect", "kill", "logs"] {
        let ran = cli.run(&["sandbox", command, "nonsense"]).await;
        assert!([1, 2].contains(&ran.code), "{ran:?}");
        ran.expect_stderr(&["nonsense"]);
        let ran = cli.run(&["sandbox", command, NOBODY]).await.expect_code(1);
        ran.expect_stderr(&[NOBODY]);
    }
    let ran = cli.run(&["--api-key", "hunter2", "sandbox", "list"]).await;
    assert_ne!(ran.code, 0);
    assert!(
        !ran.stderr.contains("hunter2"),
        "a wrong key is repeated: {ran:?}"
    );
    let wrong = format!("wrn_{}", "0".repeat(64));
    let ran = cli
        .run(&["--api-key", wrong.as_str(), "sandbox", "list"])
        .await
        .expect_code(1);
    assert!(
        !ran.stderr.contains(&wrong),
        "a wrong key is repeated: {ran:?}"
    );
    ran.expect_stderr(&["key"]);

    HostState::wait_for_return(&before, data_dir, Some(server.pid()), PATIENCE).await;
    server.destroy().await;
}

pub(crate) async fn no_server_is_said_so(_: &Path) {
    let nowhere = tempfile::tempdir().expect("a folder");
    let cli = Cli::new(nowhere.path());
    let url = format!("http://{}", free_address());
    let remedy = ["no server", url.as_str(), "wrenn up"];
    let key = format!("wrn_{}", "0".repeat(64));
    let said = ["--url", url.as_str(), "--api-key", key.as_str()];
    cli.run(&[&said[..], &["sandbox", "list"]].concat())
        .await
        .expect_code(1)
        .expect_stderr(&remedy);
    cli.run(&[&said[..], &["run", "--", "true"]].concat())
        .await
        .expect_code(125)
        .expect_stderr(&remedy);
    // Without a key there is none to be found either; the remedy is the same.
    cli.run(&["sandbox", "list"])
        .await
        .expect_code(1)
        .expect_stderr(&["wrenn up"]);
    cli.run(&["down"]).await.expect_stderr(&[]);
    assert_eq!(
        std::fs::read_dir(nowhere.path())
            .expect("the folder")
            .count(),
        0,
        "a client made files"
    );
}

pub(crate) async fn a_port_in_use_is_said_so(data_dir: &Path) {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("its address").to_string();
    let before = HostState::read(data_dir, None);
    let ran = Cli::new(data_dir)
        .run(&["up", "--listen", &address])
        .await
        .expect_code(1);
    ran.expect_stderr(&[&address, "in use", "--listen"]);
    HostState::wait_for_return(&before, data_dir, None, PATIENCE).await;
}

pub(crate) async fn an_ordinary_user_is_told_to_use_root(_: &Path) {
    // Where the binary lies need not be a place that everybody can reach.
    let folder = tempfile::Builder::new()
        .prefix("wrenn-e2e-")
        .tempdir_in("/tmp")
        .expect("a folder");
    let binary = folder.path().join("wrenn");
    std::fs::copy(wrenn_binary(), &binary).expect("a copy of wrenn");
    let data_dir = folder.path().join("data");
    let modes = StdCommand::new("chmod")
        .args(["-R", "a+rwX"])
        .arg(folder.path())
        .status()
        .expect("chmod runs");
    assert!(modes.success());
    for line in [&["up"][..], &["image", "build", "minimal"]] {
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
            .arg(&binary);
        command
            .args(line)
            .arg("--data-dir")
            .arg(&data_dir)
            .env("HOME", "/nonexistent");
        let ran = Ran::of(command, b"").await.expect_code(1);
        ran.expect_stderr(&["root", "sudo"]);
        assert!(!data_dir.exists(), "it left {}", data_dir.display());
    }
}

pub(crate) async fn a_second_server_on_one_folder_is_refused(data_dir: &Path) {
    let server = Server::start(data_dir).await;
    let other = free_address().to_string();
    let ran = Cli::new(data_dir)
        .run(&["up", "--listen", &other])
        .await
        .expect_code(1);
    ran.expect_stderr(&[&data_dir.to_string_lossy()]);
    // The first has not noticed, and its note still leads to it.
    let id = server.api().create(&json!({})).await;
    server
        .cli()
        .run(&["sandbox", "exec", &id, "--", "true"])
        .await
        .expect_code(0);
    server.destroy().await;
}

pub(crate) async fn too_little_disk_is_said_so(data_dir: &Path) {
    // Room for the image and a template, not for what must stay free on top.
    let disk = Tmpfs::mount("1400m");
    // Below the mount, which is the test's own and no leftover.
    let small_data = disk.0.join("data");
    std::fs::create_dir(&small_data).expect("a folder");
    images::copy_images(data_dir, &small_data);
    let listen = free_address().to_string();
    let ran = Cli::new(&small_data)
        .run(&["up", "--once", "--listen", &listen])
        .await
        .expect_code(1);
    ran.expect_stderr(&["disk", &small_data.to_string_lossy()]);
    HostState::read(&small_data, None).expect_nothing_alive();
    drop(disk);

    let small = Tmpfs::mount("24m");
    let ran = Cli::new(&small.0)
        .run(&["image", "build", "minimal"])
        .await
        .expect_code(1);
    ran.expect_stderr(&["space", &small.0.to_string_lossy()]);
    let mut left = Vec::new();
    for entry in walk(&small.0) {
        let size = entry
            .metadata()
            .map_or(0, |meta| if meta.is_file() { meta.len() } else { 0 });
        left.extend((size > 64 << 10).then_some((entry, size)));
    }
    assert!(left.is_empty(), "a build that failed left {left:?}");
}

fn walk(folder: &Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(walk(&path));
        }
        found.push(path);
    }
    found
}

/// A small disk, gone with the test.
struct Tmpfs(std::path::PathBuf);

impl Tmpfs {
    fn mount(size: &str) -> Self {
        let folder = tempfile::Builder::new()
            .prefix("wrenn-e2e-disk-")
            .tempdir()
            .expect("a folder")
            .keep();
        let status = StdCommand::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(&folder)
            .status()
            .expect("mount runs");
        assert!(status.success());
        Tmpfs(folder)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = StdCommand::new("umount").arg(&self.0).status();
        let _ = std::fs::remove_dir(&self.0);
    }
}
