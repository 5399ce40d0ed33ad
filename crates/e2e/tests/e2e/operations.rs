//! The server as its operator handles it: drained, stopped in each way, and in two processes.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};
use wrenn_e2e::{Cli, HostState, Server, eventually, wrenn_binary};

pub(crate) async fn g40_a_bundle_of_a_real_sandbox_holds_no_secret(server: &Server) {
    let variable = "correct horse battery staple";
    let api = server.api();
    let body = json!({"env": {"PASSPHRASE": variable}});
    let id = api.create(&body).await;
    api.speak(&id, "mine: $PASSPHRASE").await;
    let folder = server.machine_folder(&id).expect("a machine's folder");
    let mut secrets = vec![variable.to_owned(), server.key()[4..].to_owned()];
    for (file, field) in [
        ("record.json", "host_token"),
        ("sandbox.json", "access_token"),
    ] {
        let text = fs::read(folder.join(file)).expect("the host's file");
        let value: Value = serde_json::from_slice(&text).expect("JSON");
        secrets.extend(value[field].as_str().map(str::to_owned));
    }
    assert!(secrets.len() >= 3, "the host's token was not found");
    let out = tempfile::tempdir().expect("a folder");
    let file = out.path().join("bundle.tar.gz");
    let name = file.to_str().expect("a path in UTF-8");
    let cli = server.cli();
    cli.run(&["debug", &id, "--out", name]).await.expect_code(0);
    let unpacked = Command::new("tar").arg("xzOf").arg(&file).output();
    let text = unpacked.expect("tar runs").stdout;
    let text = String::from_utf8_lossy(&text);
    for secret in &secrets {
        assert!(!text.contains(secret.as_str()), "{secret} is in the bundle");
    }
    for part in [
        "mine: [redacted]",
        "\"PASSPHRASE\"",
        "\"started\"",
        "\"slot\"",
        &id,
    ] {
        assert!(text.contains(part), "{part} is not in the bundle:\n{text}");
    }
    api.destroy(&id).await;
}

/// A file in the guest, to be found again.
async fn mark(server: &Server, id: &str) {
    server.api().shell(id, "echo mine > /home/user/mark").await;
}

async fn expect_mark(server: &Server, id: &str) {
    let mark = server.api().shell(id, "cat /home/user/mark").await;
    assert_eq!(mark, "mine\n");
}

async fn status(server: &Server, id: &str) -> Value {
    let path = format!("/v1/sandboxes/{id}");
    server.api().get(&path).await.json()["status"].clone()
}

pub(crate) async fn a_drained_host_stays_drained_until_it_is_told(data_dir: &Path) {
    let server = Server::start(data_dir).await;
    let cli = server.cli();
    let id = server.api().create(&json!({})).await;
    mark(&server, &id).await;
    let drained = cli
        .run(&["drain", "--pause", "--json"])
        .await
        .expect_code(0)
        .json();
    assert_eq!(
        (&drained["paused"], &drained["running"]),
        (&json!([id]), &json!([]))
    );
    let alone = HostState::read(data_dir, None);
    server.signal(Signal::KILL);
    server.wait().await;

    let server = Server::start(data_dir).await;
    let doctor = cli.run(&["doctor", "--json"]).await.expect_code(0).json();
    assert!(doctor["drainingSince"].is_string(), "{doctor}\n{alone}");
    let resume = format!("/v1/sandboxes/{id}/resume");
    for path in ["/v1/sandboxes", &resume] {
        let refused = server.api().post(path, &json!({})).await;
        refused.expect_error(503, "draining", &["wrenn drain --off"]);
    }
    assert_eq!(status(&server, &id).await, "paused");
    cli.run(&["drain", "--off"]).await.expect_code(0);
    server.api().post(&resume, &json!({})).await.expect(200);
    expect_mark(&server, &id).await;
    server.destroy().await;
}

pub(crate) async fn sandboxes_are_left_as_asked_when_the_server_ends(data_dir: &Path) {
    let server = Server::start_with(data_dir, &["--on-stop", "pause"]).await;
    let ids = [
        server.api().create(&json!({})).await,
        server.api().create(&json!({})).await,
    ];
    mark(&server, &ids[0]).await;
    server.signal(Signal::TERM);
    let (ended, said) = server.wait().await;
    assert!(
        ended.success() && said.contains("paused 2 sandboxes"),
        "{said}"
    );
    HostState::read(data_dir, None).expect_nothing_alive();

    // Kept is what happens where nothing is said; paused by `down` where that is said.
    let server = Server::start_with(data_dir, &["--on-stop", "destroy"]).await;
    for id in &ids {
        assert_eq!(status(&server, id).await, "paused");
    }
    let cli = server.cli();
    let refused = cli.run(&["down", "--pause"]).await.expect_code(1);
    refused.expect_stderr(&["--on-stop destroy"]);
    cli.run(&["down"]).await.expect_code(0);
    let (ended, said) = server.wait().await;
    assert!(
        ended.success() && said.contains("ended 2 sandboxes"),
        "{said}"
    );

    let server = Server::start(data_dir).await;
    for id in &ids {
        assert_eq!(status(&server, id).await, "stopped");
    }
    let id = server.api().create(&json!({})).await;
    mark(&server, &id).await;
    let down = cli.run(&["down", "--pause", "--json"]).await.expect_code(0);
    assert_eq!(down.json()["sandboxes"], json!([]));
    server.wait().await;
    let server = Server::start(data_dir).await;
    assert_eq!(status(&server, &id).await, "paused");
    let resume = format!("/v1/sandboxes/{id}/resume");
    server.api().post(&resume, &json!({})).await.expect(200);
    expect_mark(&server, &id).await;
    server.destroy().await;
}

/// A real `wrenn host-agent`; killed when dropped, as when a test fails, and its sandboxes with
/// it.
struct HostAgent {
    child: Child,
    data_dir: PathBuf,
    log: PathBuf,
}

impl HostAgent {
    fn start(data_dir: &Path, listen: &str) -> HostAgent {
        HostAgent::start_with(data_dir, listen, &[])
    }

    fn start_with(data_dir: &Path, listen: &str, args: &[&str]) -> HostAgent {
        let log = data_dir.join("host-agent.log");
        let file = fs::File::options().create(true).append(true).open(&log);
        let file = file.expect("a log file");
        // It dies with this thread, so that a killed test leaves none.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(wrenn_binary())
            .args(["host-agent", "--listen", listen, "--data-dir"])
            .arg(data_dir)
            .args(args)
            .env("XDG_CONFIG_HOME", "/nonexistent")
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(file.try_clone().expect("a second descriptor"))
            .stderr(file)
            .spawn()
            .expect("setpriv and wrenn start");
        HostAgent {
            child,
            data_dir: data_dir.to_owned(),
            log,
        }
    }

    fn kill(mut self) {
        self.child.kill().expect("a signal to our own child");
        self.child.wait().expect("its end");
    }

    /// Told to end, and gone. What it has said.
    fn end(mut self) -> String {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, Signal::TERM).expect("a signal to our own child");
        let status = self.child.wait().expect("its end");
        assert!(status.success(), "{status}\n{}", self.said());
        self.said()
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for HostAgent {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            // These can only fail when it has ended in this moment, which is as good.
            let _ = self.child.kill();
            let _ = self.child.wait();
            let _ = Command::new(wrenn_binary())
                .args(["down", "--destroy", "--data-dir"])
                .arg(&self.data_dir)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status();
        }
    }
}

/// The answer of a server in a sandbox, through the proxy.
async fn page(server: &Server, id: &str) -> Option<String> {
    let client = reqwest::Client::builder().no_proxy().build().ok()?;
    let request = client
        .get(format!("http://{}/", server.address()))
        .header("host", format!("8000-{id}.localhost"));
    let answer = request.send().await.ok()?;
    match answer.status().as_u16() {
        200 => answer.text().await.ok(),
        _ => None,
    }
}

async fn expect_page(server: &Server, id: &str) {
    let seen = eventually("a port answers", Duration::from_secs(30), || {
        page(server, id)
    })
    .await;
    assert_eq!(seen, "from inside");
}

pub(crate) async fn g02_agent_and_control_plane_are_killed_apart_and_lose_nothing(data_dir: &Path) {
    let folder = tempfile::tempdir_in(data_dir.parent().expect("a parent")).expect("a folder");
    let data = folder.path();
    crate::images::copy_images(data_dir, data);
    let socket = data.join("agent/agent.sock");
    let place = socket.to_str().expect("a path in UTF-8");
    let agent = HostAgent::start(data, place);
    // The control plane waits for an agent that is not ready yet.
    let server = Server::start_with(data, &["--host", place]).await;
    let mode = |path: &Path| {
        let metadata = fs::metadata(path).expect("it is there");
        metadata.permissions().mode() & 0o777
    };
    assert_eq!(mode(socket.parent().expect("a folder")), 0o700);
    assert_eq!(mode(&socket), 0o600);

    let api = server.api();
    let id = api.create(&json!({"timeout_sec": 600})).await;
    let serve = "mkdir web; cd web; printf 'from inside' > index.html; \
                 setsid python3 -m http.server 8000 > /dev/null 2>&1 &";
    api.shell(&id, serve).await;
    expect_page(&server, &id).await;
    let boot = api.shell(&id, "cat /proc/sys/kernel/random/boot_id").await;
    let same_machine = async |server: &Server| {
        let path = "cat /proc/sys/kernel/random/boot_id";
        assert_eq!(server.api().shell(&id, path).await, boot);
        expect_page(server, &id).await;
    };
    let found_again = async |server: &Server| {
        let ready = || async { (server.api().get("/ready").await.status == 200).then_some(()) };
        eventually("the agent is found again", Duration::from_secs(60), ready).await;
    };

    // The agent dies: the control plane says that it is away, and finds the next one.
    agent.kill();
    let refused = api.post("/v1/sandboxes", &json!({})).await;
    refused.expect_error(503, "host_unavailable", &[]);
    let agent = HostAgent::start(data, place);
    found_again(&server).await;
    same_machine(&server).await;

    // The control plane dies.
    server.signal(Signal::KILL);
    server.wait().await;
    let server = Server::start_with(data, &["--host", place]).await;
    same_machine(&server).await;

    // Both are told to end, and come back at an address, with a token.
    Cli::new(data).run(&["down"]).await.expect_code(0);
    server.wait().await;
    agent.end();
    assert!(!socket.exists(), "the socket goes with its agent");
    let address = wrenn_e2e::free_address().to_string();
    let agent = HostAgent::start(data, &address);
    let token = data.join("host-token");
    eventually("a token is made", Duration::from_secs(10), || async {
        token.exists().then_some(())
    })
    .await;
    assert_eq!(mode(&token), 0o600);
    let server = Server::start_with(data, &["--host", &address]).await;
    same_machine(&server).await;
    let client = reqwest::Client::builder()
        .no_proxy()
        .build()
        .expect("a client");
    let info = format!("http://{address}/wrenn.host.v1.HostService/GetInfo");
    let tunnel = format!("http://{address}/dial/{id}/8000");
    for request in [client.post(info).json(&json!({})), client.get(tunnel)] {
        let answer = request.send().await.expect("an answer");
        assert_eq!(answer.status(), 401);
    }

    // An agent that is to pause all when it ends does so, and its control plane learns of it.
    agent.end();
    let agent = HostAgent::start_with(data, &address, &["--on-stop", "pause"]);
    eventually("it is taken over", Duration::from_secs(60), || async {
        page(&server, &id).await
    })
    .await;
    let said = agent.end();
    assert!(said.contains("paused 1 sandbox\n"), "{said}");
    let agent = HostAgent::start_with(data, &address, &["--on-stop", "destroy"]);
    eventually("it is told", Duration::from_secs(60), || async {
        (status(&server, &id).await == "paused").then_some(())
    })
    .await;
    // It may have been told by the agent that ended.
    found_again(&server).await;
    let api = server.api();
    let resume = format!("/v1/sandboxes/{id}/resume");
    api.post(&resume, &json!({})).await.expect(200);
    same_machine(&server).await;

    let said = agent.end();
    assert!(said.contains("ended 1 sandbox\n"), "{said}");
    let agent = HostAgent::start_with(data, &address, &[]);
    eventually("it is told", Duration::from_secs(60), || async {
        (status(&server, &id).await == "stopped").then_some(())
    })
    .await;
    server.destroy().await;
    agent.end();
    HostState::read(data, None).expect_nothing_alive();
}
