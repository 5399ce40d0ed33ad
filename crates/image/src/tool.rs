//! Running other programs: output kept for the error, ended when the build is cancelled or
//! when this process dies.

use crate::error::{ImageError, at};
use rustix::process::{Pid, Signal};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

/// How often a running program is looked at.
const POLL: Duration = Duration::from_millis(100);
/// How much of a failed program's output goes into the error.
const TAIL: u64 = 2000;

/// Programs that a build starts and the Debian packages that have them.
const TOOLS: [(&str, &str); 7] = [
    ("mmdebstrap", "mmdebstrap"),
    ("mke2fs", "e2fsprogs"),
    ("apt-get", "apt"),
    ("dpkg-deb", "dpkg"),
    ("dpkg-query", "dpkg"),
    ("unshare", "util-linux"),
    ("setpriv", "util-linux"),
];

/// Checks that all of them are there.
pub fn check_tools() -> Result<(), ImageError> {
    for (program, package) in TOOLS {
        if !on_path(program) {
            return Err(ImageError::MissingTool { program, package });
        }
    }
    Ok(())
}

fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|folder: PathBuf| folder.join(program).is_file())
}

/// A program to run. It lives in a process id namespace of its own and dies, with all its
/// children, when this process does; what it mounts is gone with it and never seen outside.
pub struct Tool {
    name: &'static str,
    hint: &'static str,
    command: Command,
    /// Where its output goes; belongs to the build folder.
    log: PathBuf,
}

impl Tool {
    /// Prepares `name` with output to `log`; `hint` completes an error's first sentence.
    pub fn new(name: &'static str, hint: &'static str, log: &Path) -> Self {
        let mut command = Command::new("setpriv");
        command.args([
            "--pdeathsig",
            "KILL",
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
        ]);
        command.arg("--mount-proc").arg(name);
        command
            .env("LC_ALL", "C.UTF-8")
            .env("DEBIAN_FRONTEND", "noninteractive");
        // Some installations keep /usr/sbin, where mke2fs is, out of PATH.
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{path}:/usr/local/sbin:/usr/sbin:/sbin"));
        Tool {
            name,
            hint,
            command,
            log: log.to_owned(),
        }
    }

    /// The command to add arguments to.
    pub fn command(&mut self) -> &mut Command {
        &mut self.command
    }

    /// Runs it to its end. `tick` is called several times a second; false cancels.
    pub fn run(mut self, tick: &mut dyn FnMut() -> bool) -> Result<(), ImageError> {
        let log = File::create(&self.log).map_err(at("write", &self.log))?;
        let copy = log.try_clone().map_err(at("write", &self.log))?;
        self.command.stdin(Stdio::null()).stdout(log).stderr(copy);
        self.wait(tick)
    }

    /// Like [`Tool::run`], with its standard output as the result.
    pub fn output(
        mut self,
        output: &Path,
        tick: &mut dyn FnMut() -> bool,
    ) -> Result<String, ImageError> {
        let log = File::create(&self.log).map_err(at("write", &self.log))?;
        let out = File::create(output).map_err(at("write", output))?;
        self.command.stdin(Stdio::null()).stdout(out).stderr(log);
        self.wait(tick)?;
        let bytes = std::fs::read(output).map_err(at("read", output))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn wait(mut self, tick: &mut dyn FnMut() -> bool) -> Result<(), ImageError> {
        // A terminal's Ctrl-C is for us; the program is ended by us, in order.
        let child = self
            .command
            .process_group(0)
            .spawn()
            .map_err(at("run", self.name))?;
        let mut guard = Guard { child };
        let mut pause = Duration::from_millis(5);
        let status = loop {
            if let Some(status) = guard.child.try_wait().map_err(at("wait for", self.name))? {
                break status;
            }
            if !tick() {
                return Err(ImageError::Cancelled);
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(POLL);
        };
        self.judge(status)
    }

    fn judge(&self, status: ExitStatus) -> Result<(), ImageError> {
        if status.success() {
            return Ok(());
        }
        Err(ImageError::ToolFailed {
            program: self.name,
            status: status.to_string(),
            hint: self.hint,
            tail: tail(&self.log),
        })
    }
}

/// Kills the program, if it still runs, and waits for its end.
struct Guard {
    child: Child,
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait()
            && let Some(group) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw)
        {
            // The group is its own: the program is its leader and not yet reaped. Errors
            // mean that it has just ended, which the wait below settles.
            let _ = rustix::process::kill_process_group(group, Signal::KILL);
            let _ = self.child.wait();
        }
    }
}

/// The last lines of a log, without terminal control.
fn tail(log: &Path) -> String {
    let read = || -> std::io::Result<String> {
        let mut file = File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    match read() {
        Ok(text) => text
            .chars()
            .filter(|c| !c.is_control() || *c == '\n')
            .collect::<String>()
            .trim()
            .to_owned(),
        Err(error) => format!("(its output cannot be read: {error})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn a_failure_carries_the_end_of_the_output() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let mut tool = Tool::new("sh", "; look at the network", &log);
        tool.command()
            .args(["-c", "echo first; echo the reason >&2; exit 7"]);
        let told = tool.run(&mut || true).unwrap_err().to_string();
        assert!(
            told.contains("the reason") && told.contains('7') && told.contains("network"),
            "{told}"
        );
    }

    #[test]
    fn cancelling_ends_the_program_and_its_children() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let mark = folder.path().join("mark");
        let mut tool = Tool::new("sh", "", &log);
        tool.command()
            .arg("-c")
            .arg(format!("(sleep 1; touch {}) & sleep 60", mark.display()));
        let start = Instant::now();
        let result = tool.run(&mut || start.elapsed() < Duration::from_millis(300));
        assert!(matches!(result, Err(ImageError::Cancelled)));
        std::thread::sleep(Duration::from_millis(1200));
        assert!(!mark.exists(), "a grandchild outlived the cancelled build");
    }
}
