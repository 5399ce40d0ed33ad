//! `wrenn drain`, `wrenn debug` and `wrenn service`.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use flate2::read::GzDecoder;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::fake::Fake;
use crate::{A, B, C, bare, ran, run, wrenn};

#[test]
fn drain_tells_what_runs_and_what_could_not_be_paused() {
    let fake = Fake::start();
    for id in [A, B] {
        fake.add(id);
    }
    let begun = run(&fake, &["drain"]);
    assert_eq!(begun.code, 0, "{}", begun.stderr);
    assert!(fake.seen().draining);
    assert!(
        begun.text().contains("starts no sandboxes"),
        "{}",
        begun.text()
    );
    assert!(begun.text().contains(A) && begun.text().contains("runs"));

    // Nobody ends them, so the time is over.
    let waited = run(&fake, &["drain", "--wait", "0", "--json"]);
    assert_eq!(waited.code, 124, "{}", waited.stderr);
    assert_eq!(waited.json()["running"], json!([A, B]));
    assert!(
        waited.stderr.contains("2 sandboxes left"),
        "{}",
        waited.stderr
    );

    fake.add(C);
    let paused = run(&fake, &["drain", "--pause", "--json"]);
    assert_eq!(paused.code, 1, "one could not be");
    let told = paused.json();
    assert_eq!(told["paused"], json!([A, B]));
    assert_eq!(told["failed"][0]["id"], C);
    assert_eq!(told["running"], json!([C]));
    let table = run(&fake, &["drain", "--pause"]);
    assert!(
        table.text().contains("not paused") && table.text().contains("no room"),
        "{}",
        table.text()
    );

    let off = run(&fake, &["drain", "--off", "--json"]);
    assert_eq!((off.code, &off.json()["draining_since"]), (0, &Value::Null));
    assert!(!fake.seen().draining);
    for wrong in [
        &["drain", "--off", "--pause"][..],
        &["drain", "--pause", "--wait"],
    ] {
        assert_eq!(run(&fake, wrong).code, 2, "{wrong:?}");
    }
}

#[test]
fn drain_waits_as_long_as_something_runs() {
    let fake = Fake::start();
    fake.add(A);
    let waiting = wrenn(&fake, &["drain", "--wait"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    fake.wait_until("it drains", |seen| seen.draining);
    fake.seen().sandboxes.get_mut(A).unwrap()["status"] = json!("paused");
    let output = waiting.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.contains("nothing runs on it"), "{said}");
}

/// Name below the folder and content of each file of a bundle.
fn unpack(path: &Path) -> BTreeMap<String, String> {
    let mode = fs::metadata(path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "its owner's alone");
    let mut archive = tar::Archive::new(GzDecoder::new(fs::File::open(path).unwrap()));
    let mut parts = BTreeMap::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let name = entry.path().unwrap().display().to_string();
        let (_, name) = name.split_once('/').unwrap();
        let (name, mut text) = (name.to_owned(), String::new());
        entry.read_to_string(&mut text).unwrap();
        parts.insert(name, text);
    }
    parts
}

const HOST_TOKEN: &str = "5a5a00112233445566778899aabbccdd";
const ENVD_TOKEN: &str = "c0ffee00112233445566778899aabbcc";
const AGENT_TOKEN: &str = "beef0011223344556677889900aabbcc";
const VARIABLE: &str = "correct horse battery staple";

/// A data folder with a machine of sandbox `A` and every kind of secret in it.
fn data_folder() -> TempDir {
    let data = TempDir::new().unwrap();
    let machine = data.path().join("machines/m-0123");
    fs::create_dir_all(machine.join("vm")).unwrap();
    let write = |name: &str, value: Value| {
        fs::write(machine.join(name), value.to_string()).unwrap();
    };
    write(
        "sandbox.json",
        json!({
            "version": 1, "sandbox": A, "template": "minimal", "access_token": ENVD_TOKEN,
            "envs": {"PASSPHRASE": VARIABLE, "DEBUG": "1"},
        }),
    );
    write(
        "record.json",
        json!({"version": 1, "slot": 7, "host_token": HOST_TOKEN}),
    );
    write("vm/machine.json", json!({"vmm": {"pid": 4242}}));
    let console = format!("booted\nthe passphrase is {VARIABLE}\nand my token {ENVD_TOKEN}\n");
    fs::write(machine.join("vm/console.log"), console).unwrap();
    // A machine of the pool, and one of another sandbox.
    fs::create_dir_all(data.path().join("machines/m-4567")).unwrap();
    let other = data.path().join("machines/m-89ab");
    fs::create_dir_all(&other).unwrap();
    fs::write(
        other.join("sandbox.json"),
        json!({"sandbox": B}).to_string(),
    )
    .unwrap();
    fs::write(data.path().join("host-token"), AGENT_TOKEN).unwrap();
    let events = format!("{{\"sandbox\":\"{B}\"}}\n{{\"sandbox\":\"{A}\",\"kind\":\"started\"}}\n");
    fs::write(data.path().join("events.jsonl"), events).unwrap();
    let log = format!(
        "INFO adopted sandbox={A} slot=7\nINFO adopted sandbox={B}\n\
         WARN {A} came with {AGENT_TOKEN} and {HOST_TOKEN}\n"
    );
    fs::write(data.path().join("server.log"), log).unwrap();
    data
}

#[test]
fn g40_a_support_bundle_explains_a_sandbox_and_holds_no_secret() {
    let fake = Fake::start();
    fake.add(A);
    let data = data_folder();
    fs::write(data.path().join("api-key"), &fake.key).unwrap();
    let out = data.path().join("bundle.tar.gz");
    let mut command = bare(data.path());
    command
        .env("WRENN_URL", fake.url())
        .args(["debug", "00aa", "--json", "--out"])
        .arg(&out)
        .arg("--log-file")
        .arg(data.path().join("server.log"));
    let said = ran(&mut command);
    assert_eq!(said.code, 0, "{}", said.stderr);
    let parts = unpack(&out);
    for name in [
        "README",
        "versions.json",
        "doctor.json",
        "sandbox.json",
        "why.json",
        "events.json",
        "metrics.json",
        "network.json",
        "denials.json",
        "host.json",
        "console.log",
        "server.log",
        "host/journal.json",
        "host/record.json",
        "host/machine.json",
        "host/events.jsonl",
    ] {
        assert!(
            parts.contains_key(name),
            "{name} is not in {:?}",
            parts.keys()
        );
    }
    let key = fake.key.trim_start_matches("wrn_");
    for secret in [
        key,
        HOST_TOKEN,
        ENVD_TOKEN,
        AGENT_TOKEN,
        VARIABLE,
        "a-token-nobody-knew",
        "abc.def-ghi",
    ] {
        for (name, text) in &parts {
            assert!(!text.contains(secret), "{secret} is in {name}:\n{text}");
        }
        assert!(!said.text().contains(secret), "{}", said.text());
    }
    // What explains it is there all the same.
    let log = &parts["server.log"];
    assert!(log.contains("slot=7") && !log.contains(B), "{log}");
    assert!(parts["host/machine.json"].contains("4242"));
    assert!(!parts["host/events.jsonl"].contains(B));
    let journal: Value = serde_json::from_str(&parts["host/journal.json"]).unwrap();
    assert_eq!(journal["envs"]["PASSPHRASE"], "[redacted]");
    assert_eq!(journal["template"], "minimal");
    assert!(parts["why.json"].contains("curl"));
    assert!(parts["console.log"].contains("line one"), "the API's");
}

#[test]
fn a_bundle_is_made_without_a_server_too() {
    let data = data_folder();
    let out = data.path().join("bundle.tar.gz");
    let debug = |id: &str| {
        let mut command = bare(data.path());
        command
            .env("WRENN_API_KEY", format!("wrn_{}", "ab".repeat(32)))
            .env("WRENN_URL", "http://127.0.0.1:1")
            .args(["debug", id, "--out"])
            .arg(&out)
            .arg("--log-file")
            .arg(data.path().join("server.log"));
        ran(&mut command)
    };
    let said = debug(A);
    assert_eq!(said.code, 0, "{}", said.stderr);
    assert!(
        said.stderr.contains("without sandbox.json: no server at"),
        "{}",
        said.stderr
    );
    let parts = unpack(&out);
    let console = &parts["host/console.log"];
    assert!(
        console.contains("booted") && !console.contains(VARIABLE),
        "{console}"
    );
    assert!(parts["README"].contains("Not here:"));
    let leftovers = fs::read_dir(data.path()).unwrap().filter(|entry| {
        let name = entry.as_ref().unwrap().file_name();
        name.to_string_lossy().starts_with(".wrenn-debug")
    });
    assert_eq!(leftovers.count(), 0);
    // The end of an id needs somebody who knows the rest.
    assert_eq!(debug("00aa").code, 1);
}

#[test]
fn a_unit_is_printed_and_installed_and_systemd_understands_it() {
    let data = TempDir::new().unwrap();
    let print = |extra: &[&str]| {
        let mut command = bare(data.path());
        ran(command.args(["service", "print"]).args(extra))
    };
    let server = print(&[]);
    let start = format!(
        "ExecStart={} --data-dir {} up",
        env!("CARGO_BIN_EXE_wrenn"),
        data.path().display()
    );
    assert!(server.text().contains(&start), "{}", server.text());
    let agent = print(&["--host-agent"]);
    assert!(agent.text().contains(" host-agent\n"), "{}", agent.text());

    let folder = TempDir::new().unwrap();
    for (extra, name) in [
        (None, "wrenn.service"),
        (Some("--host-agent"), "wrenn-host-agent.service"),
    ] {
        let mut command = bare(data.path());
        command
            .args(["service", "install", "--folder"])
            .arg(folder.path())
            .args(extra);
        let said = ran(&mut command);
        assert_eq!(said.code, 0, "{}", said.stderr);
        let path = folder.path().join(name);
        assert_eq!(said.text().trim_end(), path.display().to_string());
        let Ok(judged) = Command::new("systemd-analyze")
            .arg("verify")
            .arg(&path)
            .output()
        else {
            // Without systemd nobody can judge.
            continue;
        };
        let words = String::from_utf8_lossy(&judged.stderr);
        assert!(judged.status.success() && !words.contains(name), "{words}");
    }
    let mut nowhere = bare(data.path());
    nowhere.args(["service", "install", "--folder", "/nonexistent"]);
    assert_eq!(ran(&mut nowhere).code, 1);
}

#[test]
fn down_pauses_or_ends_and_needs_a_server_for_the_one() {
    let data = TempDir::new().unwrap();
    let none = ran(bare(data.path()).args(["down", "--pause"]));
    assert_eq!(none.code, 1);
    assert!(none.stderr.contains("no server runs on"), "{}", none.stderr);
    assert_eq!(
        ran(bare(data.path()).args(["down", "--pause", "--destroy"])).code,
        2
    );
}
