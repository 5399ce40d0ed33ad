//! The real `wrenn` against a fake server: what it prints, sends and ends with.
#![allow(clippy::unwrap_used)]

mod fake;
mod operations;
mod snapshots;
mod terminal;

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use fake::Fake;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

const A: &str = "sb-0192f0c8-6a3e-7c3a-9d1e-0000000000aa";
const B: &str = "sb-0192f0c8-6a3e-7c3a-9d1e-0000000000bb";
const C: &str = "sb-0192f0c8-6a3e-7c3a-9d1e-0000000000cc";

/// `wrenn` in an environment without surprises.
fn bare(data_dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_wrenn"));
    command
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("HOME", "/nonexistent")
        .env("WRENN_DATA_DIR", data_dir)
        .stdin(Stdio::null());
    command
}

fn wrenn(fake: &Fake, args: &[&str]) -> Command {
    let mut command = bare(Path::new("/nonexistent"));
    command
        .env("WRENN_URL", fake.url())
        .env("WRENN_API_KEY", &fake.key)
        .args(args);
    command
}

struct Ran {
    code: i32,
    stdout: Vec<u8>,
    stderr: String,
}

impl Ran {
    fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.stdout)
            .unwrap_or_else(|error| panic!("{error}: {} {}", self.text(), self.stderr))
    }
}

fn ran(command: &mut Command) -> Ran {
    let output = command.output().unwrap();
    Ran {
        code: output.status.code().unwrap_or(-1),
        stdout: output.stdout,
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

fn run(fake: &Fake, args: &[&str]) -> Ran {
    ran(&mut wrenn(fake, args))
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

fn wait(mut child: Child) -> Option<i32> {
    let deadline = Instant::now() + Duration::from_secs(15);
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("it does not end");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn run_passes_streams_and_exit_code_and_ends_its_sandbox() {
    let fake = Fake::start();
    let ran = run(
        &fake,
        &[
            "run", "--vcpus", "2", "-e", "A=1", "--cwd", "/tmp", "--", "both", "7",
        ],
    );
    assert_eq!(ran.code, 7, "{}", ran.stderr);
    assert_eq!(ran.stdout, b"out\n\xff\x00");
    assert_eq!(ran.stderr, "err\n");
    let seen = fake.seen();
    assert_eq!(
        seen.created,
        [json!({"vcpus": 2, "timeout_sec": 300, "on_timeout": "kill"})],
        "what was not said is left to the server"
    );
    assert_eq!(seen.messages[0]["envs"], json!({"A": "1"}));
    assert_eq!(
        (&seen.messages[0]["cwd"], &seen.messages[0]["args"]),
        (&json!("/tmp"), &json!(["7"]))
    );
    assert_eq!(seen.destroyed.len(), 1);
    assert!(seen.sandboxes.is_empty());
}

#[test]
fn run_carries_input_of_any_bytes_to_its_end() {
    let fake = Fake::start();
    let input: Vec<u8> = (0..3_000_000u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let mut child = wrenn(&fake, &["run", "--", "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let given = input.clone();
    let feeder = std::thread::spawn(move || stdin.write_all(&given).unwrap());
    let mut output = Vec::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_end(&mut output)
        .unwrap();
    feeder.join().unwrap();
    assert_eq!(wait(child), Some(0));
    assert!(
        output == input,
        "{} bytes came back of {}",
        output.len(),
        input.len()
    );
}

#[test]
fn failed_starts_and_signals_have_the_codes_of_a_shell() {
    let fake = Fake::start();
    for (command, code) in [
        ("killed", 137),
        ("missing", 127),
        ("secret", 126),
        ("lost", 125),
    ] {
        let ran = run(&fake, &["run", "--", command]);
        assert_eq!(ran.code, code, "{command}: {}", ran.stderr);
    }
    let hinted = run(&fake, &["run", "missing"]);
    assert!(
        hinted.stderr.starts_with("error: missing: no such file"),
        "{}",
        hinted.stderr
    );
    assert_eq!(fake.seen().destroyed.len(), 5, "each sandbox was ended");
}

#[test]
fn run_ends_its_sandbox_on_ctrl_c_also_while_it_is_made() {
    let fake = Fake::start();
    let child = wrenn(&fake, &["run", "--", "wait"]).spawn().unwrap();
    fake.wait_until("the program runs", |seen| !seen.messages.is_empty());
    signal(&child, Signal::INT);
    assert_eq!(wait(child), Some(130));
    assert_eq!(fake.seen().destroyed.len(), 1);

    let child = wrenn(&fake, &["run", "--template", "slow", "--", "wait"])
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(300));
    signal(&child, Signal::TERM);
    assert_eq!(wait(child), Some(143));
    let seen = fake.seen();
    assert_eq!(
        (seen.created.len(), seen.destroyed.len()),
        (2, 2),
        "what was being made is ended too"
    );
}

#[test]
fn run_keeps_its_time_limit() {
    let fake = Fake::start();
    let ran = run(&fake, &["run", "--limit", "1", "--", "wait"]);
    assert_eq!(ran.code, 124, "{}", ran.stderr);
    assert!(fake.seen().sandboxes.is_empty());
}

#[test]
fn exec_asks_its_program_to_end_on_ctrl_c() {
    let fake = Fake::start();
    fake.add(A);
    let child = wrenn(&fake, &["sandbox", "exec", "00aa", "--", "wait"])
        .spawn()
        .unwrap();
    fake.wait_until("the program runs", |seen| !seen.messages.is_empty());
    signal(&child, Signal::INT);
    assert_eq!(wait(child), Some(128 + 15), "SIGTERM ended it");
    assert_eq!(fake.seen().messages.last().unwrap()["signal"], 15);
    assert!(fake.seen().destroyed.is_empty(), "the sandbox stays");
}

#[test]
fn a_reader_that_leaves_ends_the_program() {
    let fake = Fake::start();
    let mut child = wrenn(&fake, &["run", "--", "yes"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut start = [0; 4];
    child.stdout.take().unwrap().read_exact(&mut start).unwrap();
    assert_eq!(&start, b"y\ny\n");
    assert_eq!(wait(child), Some(128 + 13));
    assert!(fake.seen().sandboxes.is_empty());
}

#[test]
fn unknown_templates_are_answered_with_those_there_are() {
    let fake = Fake::start();
    let ran = run(&fake, &["run", "--template", "nope", "--", "true"]);
    assert_eq!(ran.code, 125);
    assert_eq!(
        ran.stderr,
        "error: no template `nope`\nhint: there are: minimal, python\n"
    );
    assert_eq!(
        run(&fake, &["sandbox", "create", "--template", "nope"]).code,
        1
    );
}

#[test]
fn no_server_is_said_with_the_remedy() {
    let free = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let url = format!("http://{free}");
    let key = format!("wrn_{}", "0".repeat(64));
    for (args, code) in [
        (vec!["sandbox", "list"], 1),
        (vec!["run", "--", "true"], 125),
    ] {
        let mut command = bare(Path::new("/nonexistent"));
        command
            .env("WRENN_URL", &url)
            .env("WRENN_API_KEY", &key)
            .args(args);
        let ran = ran(&mut command);
        assert_eq!(ran.code, code);
        assert!(
            ran.stderr
                .starts_with(&format!("error: no server at {url}\n")),
            "{}",
            ran.stderr
        );
        assert!(
            ran.stderr.contains("hint: start one with `wrenn up`"),
            "{}",
            ran.stderr
        );
    }
}

#[test]
fn g40_a_wrong_key_is_named_by_its_place_and_never_shown() {
    let fake = Fake::start();
    let wrong = format!("wrn_{}", "cd".repeat(32));
    let said = ran(wrenn(&fake, &["sandbox", "list"]).env("WRENN_API_KEY", &wrong));
    assert_eq!(said.code, 1);
    assert!(
        said.stderr.contains("WRENN_API_KEY") && !said.stderr.contains("cdcd"),
        "{}",
        said.stderr
    );

    let data = TempDir::new().unwrap();
    fs::write(data.path().join("api-key"), format!("{wrong}\n")).unwrap();
    fs::write(
        data.path().join("server.json"),
        json!({"address": fake.address, "pid": 1}).to_string(),
    )
    .unwrap();
    let said = ran(bare(data.path()).args(["sandbox", "list"]));
    let file = data.path().join("api-key").display().to_string();
    assert!(
        said.stderr.contains(&file) && !said.stderr.contains("cdcd"),
        "{}",
        said.stderr
    );

    // The server's own note and key, and nothing else, are enough.
    fs::write(data.path().join("api-key"), format!("{}\n", fake.key)).unwrap();
    let found = ran(bare(data.path()).args(["sandbox", "list", "--json"]));
    assert_eq!(
        (found.code, found.json()),
        (0, json!([])),
        "{}",
        found.stderr
    );
}

#[test]
fn data_is_json_for_programs_and_a_table_for_people() {
    let fake = Fake::start();
    for id in [A, B, C] {
        fake.add(id);
    }
    let list = run(&fake, &["sandbox", "list", "--json"]).json();
    let ids: Vec<_> = list
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["id"].as_str().unwrap())
        .collect();
    assert_eq!(ids, [A, B, C], "all pages, in order");
    assert_eq!(list[0]["new_field"], 7, "the server's own words");

    let table = run(&fake, &["sandbox", "list"]);
    let lines: Vec<_> = table.text().lines().collect();
    assert_eq!(lines.len(), 4);
    assert!(
        lines[0].starts_with("ID  ") && lines[1].starts_with(A),
        "{}",
        table.text()
    );
    assert!(!table.text().contains('\u{1b}'), "no colours into a pipe");
    assert!(
        run(&fake, &["--color", "always", "sandbox", "list"])
            .text()
            .contains('\u{1b}')
    );
    assert_eq!(
        run(&fake, &["sandbox", "list", "-q"]).text(),
        format!("{A}\n{B}\n{C}\n")
    );

    assert_eq!(
        run(&fake, &["sandbox", "inspect", "00bb", "--json"]).json()["id"],
        B
    );
    assert!(
        run(&fake, &["sandbox", "inspect", "00bb"])
            .text()
            .contains("a=b")
    );
    assert_eq!(
        run(&fake, &["sandbox", "logs", A]).text(),
        "line one\nline two\n"
    );
    let version = run(&fake, &["version", "--json"]).json();
    assert_eq!(
        (&version["version"], &version["server"]["vmm"]),
        (&json!("0.1.0"), &json!("qemu"))
    );

    let killed = run(&fake, &["sandbox", "kill", "00aa", "00bb", "--json"]).json();
    assert_eq!(killed, json!({"ended": [A, B], "failed": []}));
    assert_eq!(
        run(&fake, &["sandbox", "kill", "--all"]).text(),
        format!("{C}\n")
    );
}

#[test]
fn create_prints_the_id_and_where_the_time_went() {
    let fake = Fake::start();
    let args = [
        "sandbox",
        "create",
        "--timing",
        "--metadata",
        "k=v",
        "--timeout",
        "60",
        "--on-timeout",
        "kill",
        "--no-internet",
    ];
    let ran = run(&fake, &args);
    assert!(
        ran.text().starts_with("sb-") && ran.text().lines().count() == 1,
        "{}",
        ran.text()
    );
    assert!(
        ran.stderr.contains("restore") && ran.stderr.contains("12.5 ms"),
        "{}",
        ran.stderr
    );
    let expected = json!({
        "metadata": {"k": "v"}, "timeout_sec": 60, "on_timeout": "kill", "network": {"allow_internet": false},
    });
    assert_eq!(fake.seen().created, [expected]);
}

#[test]
fn unknown_and_ambiguous_ids_are_named() {
    let fake = Fake::start();
    fake.add(A);
    fake.add(B);
    let unknown = run(&fake, &["sandbox", "inspect", "nonsense", "--json"]);
    assert_eq!(unknown.code, 1);
    let error: Value = serde_json::from_str(&unknown.stderr).unwrap();
    assert_eq!(error["error"]["code"], "not_found");
    assert_eq!(error["error"]["message"], "no sandbox `nonsense`");
    let ambiguous = run(&fake, &["sandbox", "kill", "0192"]);
    assert_eq!(ambiguous.code, 1);
    assert!(
        ambiguous.stderr.contains(A) && ambiguous.stderr.contains(B),
        "{}",
        ambiguous.stderr
    );
    assert_eq!(run(&fake, &["sandbox", "kill", C]).code, 1);
    assert_eq!(run(&fake, &["sandbox", "exec", C, "--", "true"]).code, 125);
    // A slip in one ends none.
    assert_eq!(run(&fake, &["sandbox", "kill", "00aa", "nonsense"]).code, 1);
    assert!(fake.seen().destroyed.is_empty());
}

#[test]
fn cp_copies_both_ways_and_leaves_no_half_a_file() {
    let fake = Fake::start();
    fake.add(A);
    let folder = TempDir::new().unwrap();
    let content: Vec<u8> = (0..500_000u32).map(|n| n as u8).collect();
    let up = folder.path().join("up.bin");
    fs::write(&up, &content).unwrap();
    let up = up.to_str().unwrap();
    assert_eq!(run(&fake, &["sandbox", "cp", up, "00aa:/tmp/x"]).code, 0);
    assert_eq!(
        run(&fake, &["sandbox", "cp", up, "00aa:/tmp/"]).code,
        0,
        "keeps its name"
    );
    assert!(fake.seen().files["/tmp/x"] == content && fake.seen().files["/tmp/up.bin"] == content);

    let here = folder.path().to_str().unwrap();
    let ran = run(&fake, &["sandbox", "cp", "00aa:/tmp/x", here]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(fs::read(folder.path().join("x")).unwrap() == content);
    assert!(run(&fake, &["sandbox", "cp", "00aa:/tmp/x", "-"]).stdout == content);

    for (source, said) in [("00aa:/broken", "broke"), ("00aa:/none", "no file /none")] {
        let target = folder.path().join("target");
        let ran = run(&fake, &["sandbox", "cp", source, target.to_str().unwrap()]);
        assert_eq!(ran.code, 1);
        assert!(ran.stderr.contains(said), "{}", ran.stderr);
    }
    let mut left: Vec<_> = fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    left.sort();
    assert_eq!(left, ["up.bin", "x"]);

    for (args, said) in [
        (["a", "b"], "neither end is in a sandbox"),
        (["00aa:/a", "00aa:/b"], "both ends are in a sandbox"),
        (["00aa:/../a", "b"], "`..`"),
    ] {
        let ran = run(&fake, &[&["sandbox", "cp"][..], &args].concat());
        assert_eq!(ran.code, 2);
        assert!(ran.stderr.contains(said), "{}", ran.stderr);
    }
    let ran = run(&fake, &["sandbox", "cp", here, "00aa:/tmp/x"]);
    assert!(
        ran.code == 1 && ran.stderr.contains("tar -C"),
        "{}",
        ran.stderr
    );
}

#[test]
fn settings_that_are_wrong_are_refused_by_name() {
    let folder = TempDir::new().unwrap();
    let config = folder.path().join("config.toml");
    fs::write(&config, "url = 'http://127.0.0.1:1'\nlistne = 1\n").unwrap();
    let said = ran(bare(folder.path())
        .env("WRENN_CONFIG", &config)
        .arg("version"));
    assert_eq!(said.code, 1);
    assert!(
        said.stderr.contains("line 2") && said.stderr.contains("listne"),
        "{}",
        said.stderr
    );
    let said = ran(bare(folder.path())
        .env("WRENN_COLOR", "blue")
        .arg("version"));
    assert!(said.stderr.contains("WRENN_COLOR"), "{}", said.stderr);
    for (filter, why) in [("a=b=c", "too many '='"), ("x[span]=debug", "spans cannot")] {
        let said = ran(bare(folder.path()).args(["--log", filter, "version"]));
        assert_eq!(said.code, 1);
        let named = said.stderr.contains(filter) && said.stderr.contains(why);
        assert!(named, "{}", said.stderr);
    }
    assert_eq!(ran(bare(folder.path()).arg("nonsense")).code, 2);
    assert_eq!(ran(bare(folder.path()).arg("run")).code, 2);
}

#[test]
fn down_signals_nobody_but_the_server() {
    let data = TempDir::new().unwrap();
    let none = ran(bare(data.path()).arg("down"));
    assert!(
        none.code == 1 && none.stderr.contains("no server runs on"),
        "{}",
        none.stderr
    );
    // A note with the number of a process that is no server.
    let mut stranger = Command::new("sleep").arg("60").spawn().unwrap();
    let note = json!({"address": "127.0.0.1:1", "pid": stranger.id()});
    fs::write(data.path().join("server.json"), note.to_string()).unwrap();
    assert_eq!(ran(bare(data.path()).arg("down")).code, 1);
    assert!(stranger.try_wait().unwrap().is_none(), "the stranger lives");
    stranger.kill().unwrap();
    stranger.wait().unwrap();
}

#[test]
fn doctor_tells_what_is_missing_and_whether_sandboxes_can_run() {
    let data = TempDir::new().unwrap();
    let said = ran(bare(data.path())
        .args(["doctor", "--json"])
        .env("PATH", "/nonexistent"));
    assert_eq!(said.code, 1);
    let report = said.json();
    assert_eq!(
        (&report["usable"], &report["willUse"]),
        (&json!(false), &Value::Null)
    );
    assert!(
        report["missingPackages"]
            .as_array()
            .unwrap()
            .contains(&json!("qemu-system-x86"))
    );
    let table = ran(bare(data.path()).arg("doctor").env("PATH", "/nonexistent"));
    assert!(
        table.text().contains("apt-get install") && table.text().contains("qemu-system-x86"),
        "{}",
        table.text()
    );
}

#[test]
fn images_of_a_folder_without_any_are_none_and_no_folder_is_made() {
    let data = TempDir::new().unwrap();
    assert_eq!(
        ran(bare(data.path()).args(["image", "list", "--json"])).json(),
        json!([])
    );
    let missing = ran(bare(data.path()).args(["image", "inspect", "../etc"]));
    assert!(
        missing.code == 1 && missing.stderr.contains("../etc"),
        "{}",
        missing.stderr
    );
    assert_eq!(fs::read_dir(data.path()).unwrap().count(), 0);
}
