//! The `wrenn` command as a person runs it, with its output and exit code.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::paths;

/// Longer than any single command may take on a loaded machine without KVM, building an
/// image included.
const PATIENCE: Duration = Duration::from_secs(600);

/// Runs `wrenn` on one data folder, out of reach of the developer's own configuration.
#[derive(Debug, Clone)]
pub struct Cli {
    data_dir: PathBuf,
}

/// What one run of a program gave.
#[derive(Debug)]
pub struct Ran {
    /// The command line, for messages.
    pub line: String,
    /// Exit code; -1 when a signal ended it.
    pub code: i32,
    /// All of standard output.
    pub stdout: String,
    /// All of standard error.
    pub stderr: String,
    /// How long it took.
    pub took: Duration,
}

impl Cli {
    /// For the server that uses, or used, `data_dir`.
    pub fn new(data_dir: &Path) -> Self {
        Cli {
            data_dir: data_dir.to_owned(),
        }
    }

    /// The bare command, for a test with special wishes.
    pub fn command(&self) -> Command {
        let mut command = Command::new(paths::wrenn_binary());
        clean(&mut command);
        command.env("WRENN_DATA_DIR", &self.data_dir);
        command
    }

    /// Runs `wrenn ARGS` with no input.
    pub async fn run<A: AsRef<OsStr>>(&self, args: &[A]) -> Ran {
        self.run_with_input(args, b"").await
    }

    /// Runs `wrenn ARGS` with `input` on standard input.
    pub async fn run_with_input<A: AsRef<OsStr>>(&self, args: &[A], input: &[u8]) -> Ran {
        let mut command = self.command();
        command.args(args);
        Ran::of(command, input).await
    }
}

/// Takes away what a developer's shell may have set.
pub(crate) fn clean(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("WRENN_") {
            command.env_remove(name);
        }
    }
    command
        .env_remove("RUST_LOG")
        .env("XDG_CONFIG_HOME", "/nonexistent")
        .env("NO_COLOR", "1");
}

impl Ran {
    /// Runs any command to its end.
    pub async fn of(mut command: Command, input: &[u8]) -> Ran {
        let line = format!("{:?}", command.as_std());
        let start = Instant::now();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {line}: {error}"));
        let mut stdin = child.stdin.take().expect("stdin is a pipe");
        let input = input.to_owned();
        let feeder = tokio::spawn(async move {
            // A program may end without reading what it was given.
            let _ = stdin.write_all(&input).await;
        });
        let output = tokio::time::timeout(PATIENCE, child.wait_with_output())
            .await
            .unwrap_or_else(|_| panic!("{line} did not end within {PATIENCE:?}"))
            .expect("output of a child");
        feeder.abort();
        Ran {
            line,
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            took: start.elapsed(),
        }
    }

    /// Fails unless it ended with `code`; gives itself back.
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Self {
        assert_eq!(
            self.code, code,
            "{} ended with {}, not {code}\nstdout: {}\nstderr: {}",
            self.line, self.code, self.stdout, self.stderr
        );
        self
    }

    /// Fails unless standard error has all of `parts`, in any case of letters.
    #[track_caller]
    pub fn expect_stderr(self, parts: &[&str]) -> Self {
        let said = self.stderr.to_lowercase();
        for part in parts {
            assert!(
                said.contains(&part.to_lowercase()),
                "{} did not say `{part}` but:\n{}",
                self.line,
                self.stderr
            );
        }
        // A stack trace is no message.
        assert!(
            !said.contains("panicked"),
            "{} panicked:\n{}",
            self.line,
            self.stderr
        );
        self
    }

    /// Standard output as JSON.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| {
            panic!(
                "{}: {error} in {}\nstderr: {}",
                self.line, self.stdout, self.stderr
            )
        })
    }
}
