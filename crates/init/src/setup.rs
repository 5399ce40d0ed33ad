//! Second role, first half: everything the root needs before programs run in it.

use crate::cgroup;
use crate::console::{self, log};
use crate::netlink::{Netlink, NetlinkError};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::mount::MountFlags;
use std::ffi::CStr;
use std::net::Ipv4Addr;
use std::os::unix::fs::symlink;

/// Every guest's address, so that any snapshot runs in any slot (docs/architecture.md).
const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 21);
const PREFIX_LENGTH: u8 = 30;
const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 22);
/// Host name until envd gives the clone its own.
const DEFAULT_HOSTNAME: &str = "wrenn";

/// One mount of the finished system.
struct Mount {
    kind: &'static str,
    target: &'static str,
    flags: MountFlags,
    data: Option<&'static CStr>,
}

/// Kernel settings of a small guest, most of whose life is spent asleep or frozen.
const SYSCTLS: [(&str, &str); 8] = [
    // Under IPv6 stays only ::1, which programs expect; eth0 never gets an address, so no
    // route around the IPv4 rules exists (guarantee G35).
    ("net/ipv6/conf/default/disable_ipv6", "1"),
    ("net/ipv6/conf/eth0/disable_ipv6", "1"),
    // Timers that would wake a sleeping guest for nothing.
    ("vm/stat_interval", "120"),
    ("kernel/watchdog", "0"),
    // A restored guest has been "hung" for as long as its snapshot is old.
    ("kernel/hung_task_timeout_secs", "0"),
    // ping without privileges.
    ("net/ipv4/ping_group_range", "0 2147483647"),
    // Development servers watch whole source trees.
    ("fs/inotify/max_user_watches", "524288"),
    ("fs/inotify/max_user_instances", "1024"),
];

/// Sets the system up. Each step stands alone: a failure is told and the next one tried.
pub fn run() {
    let flags = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
    let mount_points = [
        Mount {
            kind: "devtmpfs",
            target: "/dev",
            flags: MountFlags::NOSUID,
            data: None,
        },
        Mount {
            kind: "proc",
            target: "/proc",
            flags,
            data: None,
        },
        Mount {
            kind: "sysfs",
            target: "/sys",
            flags,
            data: None,
        },
        Mount {
            kind: "devpts",
            target: "/dev/pts",
            flags: MountFlags::NOSUID | MountFlags::NOEXEC,
            data: Some(c"mode=0620,gid=5,ptmxmode=0666"),
        },
        Mount {
            kind: "tmpfs",
            target: "/dev/shm",
            flags: MountFlags::NOSUID | MountFlags::NODEV,
            data: Some(c"mode=1777"),
        },
        Mount {
            kind: "tmpfs",
            target: "/run",
            flags: MountFlags::NOSUID | MountFlags::NODEV,
            data: Some(c"mode=0755"),
        },
        Mount {
            kind: "tmpfs",
            target: "/tmp",
            flags: MountFlags::NOSUID | MountFlags::NODEV,
            data: Some(c"mode=1777"),
        },
        Mount {
            kind: "cgroup2",
            target: "/sys/fs/cgroup",
            flags,
            data: Some(c"nsdelegate"),
        },
    ];
    for mount in &mount_points {
        if let Err(error) = apply(mount) {
            log(format_args!(
                "cannot mount {} on {}: {error}",
                mount.kind, mount.target
            ));
        }
    }
    console::attach();
    rustix::process::umask(Mode::from_raw_mode(0o022));
    links();
    cgroup::make();
    host_name();
    for (name, value) in SYSCTLS {
        // A kernel without the feature lacks the file, which is as good as switched off.
        if let Err(error) = std::fs::write(format!("/proc/sys/{name}"), value)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            log(format_args!("cannot set {name} to {value}: {error}"));
        }
    }
    if let Err(error) = network() {
        log(format_args!("network: {error}"));
    }
}

fn apply(mount: &Mount) -> Result<(), Errno> {
    match rustix::fs::mkdir(mount.target, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error),
    }
    // The initramfs moved some of its own here.
    if is_mount_point(mount.target)? {
        return Ok(());
    }
    rustix::mount::mount(
        mount.kind,
        mount.target,
        mount.kind,
        mount.flags,
        mount.data,
    )
}

/// A mount point is on another device than the folder it is in.
fn is_mount_point(target: &str) -> Result<bool, Errno> {
    let outside = rustix::fs::stat(format!("{target}/.."))?;
    Ok(rustix::fs::stat(target)?.st_dev != outside.st_dev)
}

/// The names under /dev that programs expect and devtmpfs does not make, and folders in
/// tmpfs that Debian's programs want.
fn links() {
    for (target, link) in [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ] {
        if let Err(error) = symlink(target, link)
            && error.kind() != std::io::ErrorKind::AlreadyExists
        {
            log(format_args!("cannot link {link}: {error}"));
        }
    }
    for (folder, mode) in [
        ("/run/lock", 0o1777),
        ("/run/wrenn", 0o755),
        ("/run/e2b", 0o755),
    ] {
        let made = rustix::fs::mkdir(folder, Mode::from_raw_mode(mode))
            // mkdir's mode passes the umask; the sticky folder's must not.
            .and_then(|()| rustix::fs::chmod(folder, Mode::from_raw_mode(mode)));
        if let Err(error) = made {
            log(format_args!("cannot make {folder}: {error}"));
        }
    }
}

fn host_name() {
    let text = std::fs::read_to_string("/etc/hostname").unwrap_or_default();
    let name = match text.trim() {
        "" => DEFAULT_HOSTNAME,
        name => name,
    };
    if let Err(error) = rustix::system::sethostname(name.as_bytes()) {
        log(format_args!("cannot set the host name to {name}: {error}"));
    }
}

fn network() -> Result<(), NetlinkError> {
    let mut netlink = Netlink::open()?;
    netlink.link_up("lo")?;
    netlink.link_up("eth0")?;
    netlink.add_address("eth0", ADDRESS, PREFIX_LENGTH)?;
    netlink.add_default_route(GATEWAY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_told_from_folders() {
        assert_eq!(is_mount_point("/proc"), Ok(true));
        assert_eq!(is_mount_point("/etc/ssl"), Ok(false));
        assert_eq!(is_mount_point("/nonexistent"), Err(Errno::NOENT));
    }
}
