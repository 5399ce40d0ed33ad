//! G34: what survives a crash of the agent, with init's own supervisor in the place of
//! process 1. The supervisor needs a process without other threads, so this program is
//! that too when it is called with `--supervise`.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use connectrpc::client::{CallOptions, ClientConfig, HttpClient};
use libtest_mimic::{Arguments, Trial};
use support::{Client, Told, pty, sh, stdin, tag, timeout};
use wrenn_wire::process as wire;
use wrenn_wire::process::__buffa::oneof::process_event::Event;

/// The agent and what its life hangs on.
struct Guest {
    supervisor: Child,
    address: SocketAddr,
}

impl Guest {
    fn start() -> Guest {
        let mut supervisor = Command::new(std::env::current_exe().unwrap())
            .args(["--supervise", env!("CARGO_BIN_EXE_envd")])
            .args(["--no-vm", "--port", "0"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let stdout = supervisor.stdout.take().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        Guest {
            supervisor,
            address: line.trim().parse().unwrap(),
        }
    }

    /// The agent: the one child that runs `envd`.
    fn agent(&self) -> Option<u32> {
        let pid = self.supervisor.id();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        children
            .split_whitespace()
            .map(|pid| pid.parse().unwrap())
            .find(|pid| {
                std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|c| c == "envd\n")
            })
    }

    fn crash(&self) {
        let agent = self.agent().unwrap();
        let pid = rustix::process::Pid::from_raw(agent as i32).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        let until = Instant::now() + Duration::from_secs(10);
        while self.agent().is_none_or(|now| now == agent) {
            assert!(Instant::now() < until, "the agent does not come back");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn client(&self) -> Client {
        let url = format!("http://{}", self.address).parse().unwrap();
        let config = ClientConfig::new(url)
            .proto()
            .with_default_header("x-access-token", "secret");
        wire::ProcessClient::new(HttpClient::plaintext(), config)
    }

    fn http(&self, method: &str, path: &str, token: &str, body: &str) -> String {
        use std::io::{Read, Write};
        let mut stream = std::net::TcpStream::connect(self.address).unwrap();
        let length = body.len();
        let text = format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\nx-access-token: {token}\r\n\
             connection: close\r\ncontent-length: {length}\r\n\r\n{body}"
        );
        stream.write_all(text.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    /// Descriptors of init: what it keeps, and a few of its own.
    fn kept(&self) -> usize {
        let folder = format!("/proc/{}/fd", self.supervisor.id());
        std::fs::read_dir(folder).unwrap().count()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.supervisor);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.supervisor.wait();
    }
}

fn tagged(mut request: wire::StartRequest, tag: &str) -> wire::StartRequest {
    request.tag = Some(tag.into());
    request
}

/// Starts a program and leaves it.
async fn leave(client: &Client, request: wire::StartRequest, options: CallOptions) -> Told {
    let mut stream = client.start_with_options(request, options).await.unwrap();
    let mut told = Told::default();
    follow!(stream, told, |told| told.pid > 0).unwrap();
    told
}

async fn connect(client: &Client, name: &str, until: fn(&Told) -> bool) -> Told {
    connect_and(client, name, until, async {}).await
}

/// Follows a program, and does something once it is followed.
async fn connect_and(
    client: &Client,
    name: &str,
    until: fn(&Told) -> bool,
    act: impl Future<Output = ()>,
) -> Told {
    let request = wire::ConnectRequest {
        process: tag(name),
        ..Default::default()
    };
    let mut stream = client.connect(request).await.unwrap();
    let mut told = Told::default();
    let reading = async {
        follow!(stream, told, |told| told.pid > 0).unwrap();
        act.await;
        follow!(stream, told, until)
    };
    tokio::time::timeout(Duration::from_secs(10), reading)
        .await
        .unwrap_or_else(|_| panic!("{name}: not in time"))
        .unwrap();
    told
}

const COUNTER: &str = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.005; done";

/// What the counter writes, from its start.
fn counted(length: usize) -> Vec<u8> {
    let mut text = Vec::new();
    for n in 1.. {
        if text.len() >= length {
            break;
        }
        text.extend(format!("{n}\n").bytes());
    }
    text.truncate(length);
    text
}

/// Follows the counter from an offset: the bytes that were missed, and those that came.
async fn counter_from(client: &Client, offset: usize, enough: usize) -> (usize, Vec<u8>) {
    let options = CallOptions::default()
        .with_header("wrenn-from-offset", &*offset.to_string())
        .with_header("wrenn-mark-gaps", "1");
    let request = wire::ConnectRequest {
        process: tag("counter"),
        ..Default::default()
    };
    let mut stream = client.connect_with_options(request, options).await.unwrap();
    let (mut missed, mut told) = (0, Told::default());
    while told.stdout.len() < enough {
        let message = stream.message().await.unwrap().unwrap().to_owned_message();
        let event = message.event.into_option().and_then(|e| e.event);
        if let Some(Event::Keepalive(alive)) = &event {
            assert!(told.stdout.is_empty(), "the gap is where it is");
            missed += usize::try_from(alive.missed).unwrap();
        }
        told.take(event);
    }
    (missed, told.stdout)
}

async fn g34_running_programs_survive_the_agent() {
    let guest = Guest::start();
    let client = guest.client();
    let body =
        r#"{"restoreID":"r","accessToken":"secret","envVars":{"A":"kept"},"sandboxID":"sb-9"}"#;
    let answer = guest.http("POST", "/init", "", body);
    assert!(answer.starts_with("HTTP/1.1 204"), "{answer}");
    let certificate = |answer: &str| {
        let mut lines = answer.lines();
        let line = lines.find(|line| line.starts_with("x-wrenn-restored: "));
        line.unwrap_or_else(|| panic!("no certificate: {answer}"))
            .to_owned()
    };
    let certified = certificate(&answer);
    // Init takes what it is sent when it comes to it.
    let mut at_rest = guest.kept();
    loop {
        tokio::time::sleep(Duration::from_millis(500)).await;
        match guest.kept() {
            same if same == at_rest => break,
            other => at_rest = other,
        }
    }

    let plain = CallOptions::default;
    let sleeper = leave(&client, tagged(sh("exec sleep 300"), "sleeper"), plain()).await;
    leave(&client, tagged(sh(COUNTER), "counter"), plain()).await;
    let (missed, first) = counter_from(&client, 0, 100).await;
    assert_eq!((missed, first == counted(first.len())), (0, true));
    let mut cat = tagged(sh("exec cat"), "cat");
    cat.stdin = Some(true);
    let cat = leave(&client, cat, plain()).await.pid;
    let mut shell = tagged(sh("exec /bin/sh"), "terminal");
    shell.pty = buffa::MessageField::some(wire::PTY::default());
    let terminal = leave(&client, shell, plain()).await.pid;
    // One ends while no agent is there: it waits for just that.
    let agent = guest.agent().unwrap();
    let script = format!("while kill -0 {agent}; do :; done 2>/dev/null; echo last; exit 9");
    leave(&client, tagged(sh(&script), "meanwhile"), plain()).await;
    leave(
        &client,
        tagged(sh("exec sleep 300"), "limited"),
        timeout(Duration::from_secs(2)),
    )
    .await;
    let big = "x".repeat(100_000);
    let mut large = tagged(sh("exec sleep 301"), "large");
    large.process.get_or_insert_default().args.push(big.clone());
    leave(&client, large, plain()).await;

    guest.crash();
    // The restore hook has run; what it did is known, and it does not run again.
    let answer = guest.http("POST", "/init", "secret", r#"{"restoreID":"r"}"#);
    assert_eq!(certificate(&answer), certified);
    // The token holds, and so does everything that the host has told.
    assert!(
        guest
            .http("GET", "/envs", "", "")
            .starts_with("HTTP/1.1 401")
    );
    let envs = guest.http("GET", "/envs", "secret", "");
    assert!(envs.contains("kept") && envs.contains("sb-9"), "{envs}");
    let client = guest.client();
    let list = client.list(wire::ListRequest::default()).await.unwrap();
    let list = list.into_owned().processes;
    let mut tags: Vec<_> = list.iter().filter_map(|p| p.tag.clone()).collect();
    tags.sort();
    tags.retain(|tag| tag != "meanwhile");
    assert_eq!(
        tags,
        ["cat", "counter", "large", "limited", "sleeper", "terminal"]
    );
    let large = list.iter().find(|p| p.tag.as_deref() == Some("large"));
    assert_eq!(large.unwrap().config.args.last(), Some(&big));

    // Every byte of the counter is there, or is told to be missed.
    let (missed, rest) = counter_from(&client, first.len(), 400).await;
    let from = first.len() + missed;
    let all = counted(from + rest.len());
    assert_eq!(
        String::from_utf8_lossy(&rest),
        String::from_utf8_lossy(&all[from..])
    );

    let ended = connect(&client, "meanwhile", |told| told.end.is_some()).await;
    assert_eq!(ended.status(), "exit status 9");
    let limited = connect(&client, "limited", |told| told.end.is_some()).await;
    assert_eq!(limited.status(), "signal: killed");

    // Input reaches them, and its end does: init lets go of it too.
    let fed = async { drop(client.send_input(stdin(cat, b"meow")).await.unwrap()) };
    let told = connect_and(&client, "cat", |told| told.stdout == b"meow", fed).await;
    assert_eq!(told.stdout, b"meow");
    let close = async {
        let request = wire::CloseStdinRequest {
            process: tag("cat"),
            ..Default::default()
        };
        client.close_stdin(request).await.unwrap();
    };
    let told = connect_and(&client, "cat", |told| told.end.is_some(), close).await;
    assert_eq!(told.status(), "exit status 0");
    let line = b"echo $((6*7))$((6*7)); exit 5\n";
    let typed = async { drop(client.send_input(pty(terminal, line)).await.unwrap()) };
    let told = connect_and(&client, "terminal", |told| told.end.is_some(), typed).await;
    assert_eq!(told.status(), "exit status 5");
    assert!(String::from_utf8_lossy(&told.pty).contains("4242"));

    // And once more: what was adopted is handed over again.
    guest.crash();
    let report = guest.http("GET", "/restarts", "secret", "");
    assert!(report.contains(r#""restarts":2"#), "{report}");
    assert!(report.contains(&sleeper.pid.to_string()), "{report}");
    assert!(report.contains("watchers of directories"), "{report}");
    let client = guest.client();
    for name in ["sleeper", "counter", "large"] {
        let kill = async {
            let request = wire::SendSignalRequest {
                process: tag(name),
                signal: wire::Signal::SIGNAL_SIGKILL.into(),
                ..Default::default()
            };
            client.send_signal(request).await.unwrap();
        };
        let told = connect_and(&client, name, |told| told.end.is_some(), kill).await;
        assert_eq!(told.status(), "signal: killed", "{name}");
    }
    let until = Instant::now() + Duration::from_secs(5);
    while guest.kept() > at_rest {
        assert!(
            Instant::now() < until,
            "init keeps {} of {at_rest}",
            guest.kept()
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn g34_a_frozen_sandbox_stays_frozen_until_it_is_told() {
    let guest = Guest::start();
    let answer = guest.http("POST", "/snapshot/prepare", "", "");
    assert!(answer.starts_with("HTTP/1.1 204"), "{answer}");
    guest.crash();
    let client = guest.client();
    let starting =
        tokio::spawn(
            async move { support::run(&client, sh("echo ran"), CallOptions::default()).await },
        );
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(
        !starting.is_finished(),
        "nothing starts while it is prepared"
    );
    let answer = guest.http("POST", "/snapshot/undo", "", "");
    assert!(answer.starts_with("HTTP/1.1 204"), "{answer}");
    assert_eq!(starting.await.unwrap().unwrap().stdout, b"ran\n");
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let Some((first, argv)) = words.split_first()
        && first == "--supervise"
    {
        let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
        return match wrenn_init::supervise(&argv) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        };
    }
    let run = |test: fn() -> std::pin::Pin<Box<dyn Future<Output = ()>>>| {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap()
            .block_on(test());
        Ok(())
    };
    let trials = vec![
        Trial::test("g34_running_programs_survive_the_agent", move || {
            run(|| Box::pin(g34_running_programs_survive_the_agent()))
        }),
        Trial::test(
            "g34_a_frozen_sandbox_stays_frozen_until_it_is_told",
            move || run(|| Box::pin(g34_a_frozen_sandbox_stays_frozen_until_it_is_told())),
        ),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
