//! `wrenn service`: systemd units that run the server, or the agent of a host alone.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use super::Context;
use crate::error::Failure;
use crate::exit::Exit;
use crate::settings::DEFAULT_DATA_DIR;

/// The units that there may be.
pub(crate) const UNITS: [&str; 2] = [Kind::Server.unit(), Kind::HostAgent.unit()];
/// Where an administrator's own units are, see systemd.unit(5).
const FOLDER: &str = "/etc/systemd/system";

/// The commands about systemd.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Print the unit
    Print(PrintArgs),
    /// Write the unit where systemd finds it, and say how to start it
    Install(InstallArgs),
}

/// Options of `wrenn service print`.
#[derive(Debug, clap::Args)]
pub(crate) struct PrintArgs {
    /// The one that runs `wrenn host-agent` instead of `wrenn up`
    #[arg(long)]
    host_agent: bool,
}

/// Options of `wrenn service install`.
#[derive(Debug, clap::Args)]
pub(crate) struct InstallArgs {
    #[command(flatten)]
    print: PrintArgs,
    /// Where to write it
    #[arg(long, value_name = "FOLDER", default_value = FOLDER)]
    folder: PathBuf,
}

/// What a unit runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Server,
    HostAgent,
}

impl Kind {
    fn of(args: &PrintArgs) -> Kind {
        match args.host_agent {
            true => Kind::HostAgent,
            false => Kind::Server,
        }
    }

    const fn unit(self) -> &'static str {
        match self {
            Kind::Server => "wrenn.service",
            Kind::HostAgent => "wrenn-host-agent.service",
        }
    }

    const fn command(self) -> &'static str {
        match self {
            Kind::Server => "up",
            Kind::HostAgent => "host-agent",
        }
    }

    const fn description(self) -> &'static str {
        match self {
            Kind::Server => "Wrenn, virtual machines for AI agents",
            Kind::HostAgent => "Wrenn's agent of this host",
        }
    }
}

impl Command {
    /// Does it.
    pub(crate) fn run(&self, context: &Context) -> Result<Exit, Failure> {
        match self {
            Command::Print(args) => {
                let text = unit(Kind::of(args), context)?;
                context.printer.line(text.trim_end());
            }
            Command::Install(args) => install(args, context)?,
        }
        Ok(Exit::Ok)
    }
}

fn install(args: &InstallArgs, context: &Context) -> Result<(), Failure> {
    let kind = Kind::of(&args.print);
    let path = args.folder.join(kind.unit());
    fs::write(&path, unit(kind, context)?).map_err(|error| {
        let failure = Failure::message(format!("cannot write {}: {error}", path.display()));
        match error.kind() {
            std::io::ErrorKind::PermissionDenied => failure
                .code("not_root")
                .hint("run `sudo wrenn service install`"),
            _ => failure,
        }
    })?;
    context.printer.line(path.display().to_string());
    if args.folder == Path::new(FOLDER) {
        let told = std::process::Command::new("systemctl")
            .arg("daemon-reload")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        if !told.is_ok_and(|status| status.success()) {
            context
                .printer
                .warn("systemd was not told about it: `systemctl daemon-reload` does that");
        }
        let unit = kind.unit();
        context.printer.note(format!(
            "start it, now and at each boot: systemctl enable --now {unit}\nits log: journalctl --unit {unit}"
        ));
    }
    Ok(())
}

fn unit(kind: Kind, context: &Context) -> Result<String, Failure> {
    let exe = std::env::current_exe().map_err(|error| {
        Failure::message(format!("cannot find this program's own file: {error}"))
    })?;
    let mut command = word(&exe)?;
    let data_dir = &context.settings.data_dir;
    if data_dir != Path::new(DEFAULT_DATA_DIR) {
        command = format!("{command} --data-dir {}", word(data_dir)?);
    }
    if let Some(config) = &context.settings.config {
        command = format!("{command} --config {}", word(config)?);
    }
    // Only commands have variables.
    let mounts = word(data_dir)?.replace("$$", "$");
    Ok(text(
        kind,
        &format!("{command} {}", kind.command()),
        &mounts,
    ))
}

/// A path as a word of a command line in a unit, see systemd.service(5).
fn word(path: &Path) -> Result<String, Failure> {
    let refused =
        |why: &str| Failure::message(format!("{} cannot stand in a unit: {why}", path.display()));
    let text = path.to_str().ok_or_else(|| refused("it is not UTF-8"))?;
    if !path.is_absolute() {
        return Err(refused("it is not absolute"));
    }
    if text.contains(['\n', '"', '\\', '\'']) {
        return Err(refused("it has quotation marks, backslashes or line ends"));
    }
    let text = text.replace('%', "%%").replace('$', "$$");
    Ok(match text.contains(char::is_whitespace) {
        true => format!("\"{text}\""),
        false => text,
    })
}

fn text(kind: Kind, command: &str, data_dir: &str) -> String {
    let description = kind.description();
    let after = match kind {
        // Where both are on one machine; nothing where there is only one.
        Kind::Server => "network-online.target wrenn-host-agent.service",
        Kind::HostAgent => "network-online.target",
    };
    format!(
        "\
# Made by `wrenn service`. What can be set is in /etc/wrenn/config.toml; docs/operations.md
# has the list.

[Unit]
Description={description}
Wants=network-online.target
After={after}
RequiresMountsFor={data_dir}

[Service]
Type=exec
ExecStart={command}
Restart=on-failure
RestartSec=2

# Virtual machines outlive this unit: only the server itself is told to end, and what it does
# with its sandboxes is its own setting (on_stop). Pausing many takes its time.
KillMode=process
TimeoutStopSec=10min
# A virtual machine that the kernel kills for want of memory is no failure of the server.
OOMPolicy=continue

# Virtual machines are in control groups of their own below /sys/fs/cgroup/wrenn. This keeps
# the controllers that they need switched on at the root, and systemd's hands off this unit's.
Delegate=yes
TasksMax=infinity
LimitNOFILE=1048576

# The server makes namespaces, taps and firewall rules and starts each virtual machine as a
# user of its own, which takes root. What it never needs it does not have, nor does anything
# that it starts.
NoNewPrivileges=yes
CapabilityBoundingSet=~CAP_SYS_MODULE CAP_SYS_BOOT CAP_SYS_RAWIO CAP_SYS_TIME CAP_SYS_PACCT
CapabilityBoundingSet=~CAP_MAC_ADMIN CAP_MAC_OVERRIDE CAP_SYSLOG CAP_WAKE_ALARM CAP_AUDIT_CONTROL
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictRealtime=yes
LockPersonality=yes
SystemCallArchitectures=native
SystemCallFilter=~@clock @cpu-emulation @module @obsolete @raw-io @reboot @swap
SystemCallErrorNumber=EPERM
# Nothing here that gives the unit a mount namespace (ProtectSystem, PrivateTmp, PrivateDevices
# and so on): the network namespaces of virtual machines are mounts in /run/netns, and after a
# restart the server would not find those of the machines that run on.

[Install]
WantedBy=multi-user.target
"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_outlive_the_unit() {
        for kind in [Kind::Server, Kind::HostAgent] {
            let text = text(kind, "/usr/bin/wrenn x", "/var/lib/wrenn");
            for line in ["KillMode=process", "Delegate=yes", "OOMPolicy=continue"] {
                assert!(text.lines().any(|have| have == line), "{line}");
            }
            // See systemd.exec(5) for which settings make a mount namespace.
            for namespaced in [
                "Protect",
                "Private",
                "ReadWritePaths",
                "ReadOnlyPaths",
                "InaccessiblePaths",
                "BindPaths",
                "TemporaryFileSystem",
                "MountFlags",
                "RootDirectory",
                "DynamicUser",
            ] {
                assert!(
                    !text.lines().any(|line| line.starts_with(namespaced)),
                    "{namespaced} makes a mount namespace"
                );
            }
        }
    }

    #[test]
    fn paths_are_one_word_or_refused() {
        let word = |path: &str| word(Path::new(path)).ok();
        assert_eq!(word("/usr/bin/wrenn").as_deref(), Some("/usr/bin/wrenn"));
        assert_eq!(word("/a b/100%").as_deref(), Some("\"/a b/100%%\""));
        for wrong in ["wrenn", "/a\"b", "/a\nExecStart=/bin/sh"] {
            assert_eq!(word(wrong), None, "{wrong}");
        }
    }
}
