//! Terminals, lent to a shell in a sandbox.

use std::io::{Read, Write};
use std::process::{Command, Stdio};

use serde_json::json;

use crate::fake::Fake;
use crate::{A, run, wait};

/// Runs `wrenn` under script(1), which gives it a terminal, and `stty` after it.
fn in_terminal(fake: &Fake, args: &str, typed: &[u8]) -> (Option<i32>, String) {
    let line = format!(
        "stty rows 33 cols 99; {} {args}; code=$?; stty -a | grep -o '.icanon'; exit $code",
        env!("CARGO_BIN_EXE_wrenn")
    );
    let mut child = Command::new("script")
        .args(["--quiet", "--return", "--command", &line, "/dev/null"])
        .env("WRENN_URL", fake.url())
        .env("WRENN_API_KEY", &fake.key)
        .env("WRENN_DATA_DIR", "/nonexistent")
        .env("TERM", "xterm-256color")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // Typed once the session is there, so that the terminal's own echo is off.
    fake.wait_until("the session is there", |seen| {
        seen.messages
            .iter()
            .any(|message| message["type"] == "pong")
    });
    stdin.write_all(typed).unwrap();
    let mut output = String::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut output)
        .unwrap();
    drop(stdin);
    (wait(child), output)
}

#[test]
fn shell_lends_its_terminal_and_gives_it_back() {
    let fake = Fake::start();
    fake.add(A);
    let (code, output) = in_terminal(&fake, "sandbox shell 00aa", b"hi\x03q");
    assert_eq!(code, Some(5), "{output}");
    assert!(output.contains("99x33 \"xterm-256color\""), "{output}");
    assert!(
        output.contains("hi\u{3}q"),
        "Ctrl-C goes to the sandbox: {output:?}"
    );
    assert!(
        output.trim_end().ends_with(" icanon"),
        "the terminal is as it was: {output:?}"
    );
}

#[test]
fn shell_can_be_left_and_taken_up_again() {
    let fake = Fake::start();
    fake.add(A);
    let (code, output) = in_terminal(&fake, "sandbox shell 00aa", b"\r~.");
    assert_eq!(code, Some(0), "{output}");
    assert!(
        output.contains(&format!("wrenn sandbox shell {A} --connect pty-1")),
        "{output}"
    );
    assert!(output.trim_end().ends_with(" icanon"), "{output:?}");
    assert!(
        fake.seen()
            .messages
            .iter()
            .all(|message| message["type"] != "kill"),
        "it lives on"
    );
    fake.seen().messages.clear();
    let (code, _) = in_terminal(&fake, "sandbox shell 00aa --connect pty-1", b"q");
    assert_eq!(code, Some(5));
    assert_eq!(
        fake.seen().messages[0],
        json!({"type": "connect", "tag": "pty-1"})
    );
}

#[test]
fn shell_without_a_terminal_is_refused() {
    let fake = Fake::start();
    fake.add(A);
    let ran = run(&fake, &["sandbox", "shell", A]);
    assert_eq!(ran.code, 2);
    assert!(ran.stderr.contains("wrenn sandbox exec"), "{}", ran.stderr);
}
