//! The monitors that are installed.

use std::env;
use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::Serialize;

use super::{FIRECRACKER_MINIMUM, QEMU_MINIMUM};

/// A virtual machine monitor that we know of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Monitor {
    /// QEMU's system emulator for x86-64.
    Qemu,
    /// Firecracker.
    Firecracker,
}

impl Monitor {
    fn program(self) -> &'static str {
        match self {
            Monitor::Qemu => "qemu-system-x86_64",
            Monitor::Firecracker => "firecracker",
        }
    }

    /// The environment variable that names the program where it is not in `PATH`.
    pub fn variable(self) -> &'static str {
        match self {
            Monitor::Qemu => "WRENN_QEMU",
            Monitor::Firecracker => "FIRECRACKER_BIN",
        }
    }

    fn minimum(self) -> &'static str {
        match self {
            Monitor::Qemu => QEMU_MINIMUM,
            Monitor::Firecracker => FIRECRACKER_MINIMUM,
        }
    }
}

/// An installed program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Tool {
    /// Where it is.
    pub path: PathBuf,
    /// The version it tells; `None` when it could not be run.
    pub version: Option<String>,
    /// The oldest version that works.
    pub minimum: &'static str,
    /// Whether its version is new enough.
    pub usable: bool,
}

/// Finds a monitor and asks its version.
pub(super) fn find(monitor: Monitor) -> Option<Tool> {
    let path = match env::var_os(monitor.variable()) {
        Some(path) => PathBuf::from(path),
        None => in_path(env::var_os("PATH"), monitor.program())?,
    };
    let output = Command::new(&path)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .ok();
    let version = output
        .filter(|output| output.status.success())
        .and_then(|output| version_in(&String::from_utf8_lossy(&output.stdout)));
    let minimum = monitor.minimum();
    Some(Tool {
        path,
        usable: version
            .as_deref()
            .is_some_and(|version| numbers(version) >= numbers(minimum)),
        version,
        minimum,
    })
}

fn in_path(path: Option<OsString>, program: &str) -> Option<PathBuf> {
    let executable = |file: &Path| {
        file.metadata()
            .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    // A service manager's PATH often lacks the administrator's folders.
    let path = path.unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into());
    env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|file| executable(file))
}

/// The first word that looks like a version: `7.2.22` in `QEMU emulator version 7.2.22 (…`,
/// `1.16.0` in `Firecracker v1.16.0`.
fn version_in(text: &str) -> Option<String> {
    text.split_ascii_whitespace()
        .map(|word| word.trim_start_matches('v'))
        .find(|word| word.contains('.') && word.starts_with(|first: char| first.is_ascii_digit()))
        .map(str::to_owned)
}

/// A version's leading numbers, for comparison.
fn numbers(version: &str) -> Vec<u32> {
    version
        .split(['.', '-', '+'])
        .map_while(|part| part.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_found_and_compared_as_numbers() {
        let debian = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright";
        assert_eq!(version_in(debian).as_deref(), Some("7.2.22"));
        assert_eq!(
            version_in("Firecracker v1.16.0\n").as_deref(),
            Some("1.16.0")
        );
        assert_eq!(version_in("hello"), None);
        assert!(numbers("10.0.2") > numbers("7.2"));
        assert!(numbers("7.2.0") >= numbers("7.2"));
        assert!(numbers("1.15.0") < numbers("1.15.1"));
        assert!(numbers("7.1.9-rc1") < numbers("7.2"));
    }
}
