//! E2B's published clients, unmodified, against the agent as a plain process.
//!
//! With `E2B_DEBUG=true` they speak to `http://localhost:49983` and nothing else, so each
//! agent here has a network of its own, in which that port is free.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Where the clients look for an agent.
const PORT: &str = "49983";

/// The agent in a network name space of its own.
struct Envd(Child);

impl Envd {
    fn start() -> Envd {
        let mut child = Command::new("unshare")
            .args([
                "--net",
                "--",
                "sh",
                "-c",
                "ip link set lo up && exec \"$@\"",
            ])
            .args(["sh", env!("CARGO_BIN_EXE_envd"), "--no-vm", "--port", PORT])
            .env("ENVD_LOG", "warn")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        assert_eq!(line.trim(), format!("127.0.0.1:{PORT}"));
        Envd(child)
    }

    /// Runs a client beside the agent; its parts, all of which must have passed.
    fn serves(&self, program: &Path, script: &Path) -> usize {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/proc/{}/ns/net", self.0.id()))
            .arg(program)
            .arg(script)
            .env("E2B_DEBUG", "true")
            .env("PYTHONUNBUFFERED", "1");
        for name in ["http_proxy", "https_proxy", "all_proxy"] {
            command.env_remove(name);
            command.env_remove(name.to_uppercase());
        }
        let output = command.output().unwrap();
        let told = String::from_utf8_lossy(&output.stdout);
        let passed = told.lines().filter(|line| line.starts_with("ok ")).count();
        assert!(
            output.status.success() && told.contains(&format!("{passed} of {passed} passed")),
            "{told}\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
        passed
    }
}

impl Drop for Envd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .canonicalize()
        .unwrap()
}

fn installed(program: &str, made_by: &str) -> PathBuf {
    let path = repository().join("target").join(program);
    assert!(
        path.exists(),
        "{} is not there: `{made_by}` makes it",
        path.display()
    );
    path
}

#[test]
fn the_published_python_client_works_with_the_agent_alone() {
    let python = installed("python/bin/python", "make python");
    let script = repository().join("tests/python/test_envd.py");
    assert!(Envd::start().serves(&python, &script) >= 8);
}

#[test]
fn the_published_node_client_works_with_the_agent_alone() {
    let node = installed("node/python/bin/node", "make node");
    // Node looks for packages from the script's own folder upwards.
    let script = repository().join("target/node/test_envd.mjs");
    std::fs::copy(repository().join("tests/node/test_e2b.mjs"), &script).unwrap();
    assert!(Envd::start().serves(&node, &script) >= 14);
}
