//! The recipe of the minimal image: every choice that is not a package's version.

use crate::digest::Digest;

/// Raised when the code that builds changes what it makes without a change below.
const RECIPE_VERSION: u32 = 1;

/// Debian packages of the root file system; what they depend on comes by itself.
pub(crate) const PACKAGES: [&str; 14] = [
    "apt",
    "bash",
    "ca-certificates",
    "chrony",
    "coreutils",
    "curl",
    "git",
    "iproute2",
    "ncurses-bin",
    "procps",
    "python-is-python3",
    "python3",
    "sudo",
    // The tree is made with merged /usr from the start; the alternative that converts one
    // later is kept out by PREFERENCES, for it would bring more packages.
    "usr-is-merged",
];

/// apt preferences while packages are chosen.
pub(crate) const PREFERENCES: &str = "Package: usrmerge\nPin: version *\nPin-Priority: -1\n";

/// The package whose dependency is Debian's current cloud kernel.
pub(crate) const KERNEL_PACKAGE: &str = "linux-image-cloud-amd64";

/// Modules for the initramfs, in order; what they depend on comes before them by itself.
/// `?`: only some machines have what it drives.
pub(crate) const MODULES: [&str; 7] = [
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "overlay",
    "?qemu_fw_cfg",
    "?ptp_kvm",
];

/// Folders that no program needs in a sandbox, left out at unpacking. The locale C.UTF-8 is
/// part of the C library itself.
pub(crate) const EXCLUDED: [&str; 5] = [
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
    "/usr/share/lintian/*",
];

/// Size of the root file system: the default disk of a sandbox.
pub(crate) const ROOTFS_BYTES: u64 = 2 << 30;

/// Options of mke2fs. The journal is small because a sandbox's writes are; nothing is left
/// for the kernel to initialise later, which would cost every clone the same writes again;
/// no blocks are kept back for root, who is not a daemon here. The identifiers are fixed:
/// nothing outside the guest looks at them, and clones are copies of each other anyway.
pub(crate) const MKE2FS: [&str; 12] = [
    "-q",
    "-t",
    "ext4",
    "-b",
    "4096",
    "-m",
    "0",
    "-J",
    "size=16",
    "-E",
    "lazy_itable_init=0,lazy_journal_init=0,hash_seed=5ed5e8a6-4b8a-4f2c-9c39-6f5eb3a2c0d1",
    "-Uc1d5a5ac-0d61-4e0b-8ef9-3b1a4c2f7e90",
];

/// A file of ours in the root file system.
pub(crate) struct OwnFile {
    pub path: &'static str,
    pub mode: u32,
    pub content: &'static str,
}

const fn own(path: &'static str, content: &'static str) -> OwnFile {
    OwnFile {
        path,
        mode: 0o644,
        content,
    }
}

/// Files written over what the packages brought. The shell's start-up files run no program:
/// under emulation each fork costs tens of milliseconds, and clients send `bash -l -c`.
pub(crate) const FILES: [OwnFile; 13] = [
    own("etc/profile", include_str!("recipe/profile.sh")),
    own("etc/bash.bashrc", include_str!("recipe/bash.bashrc.sh")),
    own("etc/skel/.profile", include_str!("recipe/skel-profile.sh")),
    own("etc/skel/.bashrc", include_str!("recipe/skel-bashrc.sh")),
    own("root/.profile", include_str!("recipe/skel-profile.sh")),
    own("root/.bashrc", include_str!("recipe/skel-bashrc.sh")),
    own("etc/resolv.conf", "nameserver 169.254.0.22\n"),
    own("etc/hostname", "wrenn\n"),
    own(
        "etc/hosts",
        "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n127.0.1.1 wrenn\n",
    ),
    own("etc/default/locale", "LANG=C.UTF-8\n"),
    own(
        "etc/environment",
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\nLANG=C.UTF-8\n",
    ),
    // KVM's PTP clock; a restore may find the time far off, so it may always step (G24).
    own(
        "etc/chrony/chrony.conf",
        "refclock PHC /dev/ptp0 poll 2 dpoll 2\nmakestep 1.0 -1\ncmdport 0\nport 0\n",
    ),
    OwnFile {
        path: "etc/sudoers.d/wrenn",
        mode: 0o440,
        content: "user ALL=(ALL:ALL) NOPASSWD: ALL\n",
    },
];

/// Lines appended to the account files: the one user of a sandbox, in the group sudo.
pub(crate) const ACCOUNT: [(&str, &str); 4] = [
    ("etc/passwd", "user:x:1000:1000::/home/user:/bin/bash\n"),
    ("etc/group", "user:x:1000:\n"),
    ("etc/shadow", "user:*:19000:0:99999:7:::\n"),
    ("etc/gshadow", "user:!::\n"),
];

/// Where our programs go in the root file system.
pub(crate) const INIT_PATH: &str = "usr/sbin/wrenn-init";
/// Ditto.
pub(crate) const ENVD_PATH: &str = "usr/bin/envd";

/// Digest of all of the above.
pub(crate) fn digest() -> Digest {
    let mut text = format!("wrenn image recipe {RECIPE_VERSION}\n");
    let mut part = |title: &str, lines: &mut dyn Iterator<Item = String>| {
        text.push_str(&format!("[{title}]\n"));
        for line in lines {
            text.push_str(&format!("{} {line}\n", line.len()));
        }
    };
    part("packages", &mut PACKAGES.iter().map(|s| s.to_string()));
    part("preferences", &mut [PREFERENCES.to_owned()].into_iter());
    part("kernel", &mut [KERNEL_PACKAGE.to_owned()].into_iter());
    part("modules", &mut MODULES.iter().map(|s| s.to_string()));
    part("excluded", &mut EXCLUDED.iter().map(|s| s.to_string()));
    part("mke2fs", &mut MKE2FS.iter().map(|s| s.to_string()));
    part("size", &mut [ROOTFS_BYTES.to_string()].into_iter());
    part(
        "files",
        &mut FILES
            .iter()
            .map(|f| format!("{} {:o} {}", f.path, f.mode, f.content)),
    );
    part(
        "account",
        &mut ACCOUNT.iter().map(|(file, line)| format!("{file} {line}")),
    );
    part(
        "programs",
        &mut [INIT_PATH, ENVD_PATH].iter().map(|s| s.to_string()),
    );
    Digest::of(text.as_bytes())
}

/// Debian packages that a host needs to build images.
pub const fn required_packages() -> &'static [&'static str] {
    &["apt", "dpkg", "e2fsprogs", "mmdebstrap", "util-linux"]
}

/// The kernel command line under emulation (QEMU's TCG). `tsc_khz` is the host's TSC rate:
/// without it one cold boot in three hangs at the calibration (design.md). An emulated CPU
/// speculates nothing, so the mitigations only cost: 100 forks took 2.9 s without, 3.6 s with.
///
/// The TSC is the host's own, so it is declared reliable: else the kernel checks it against
/// the timer tick, loses ticks on a busy host, and takes the tick for its clock. Then it runs
/// slow (512 ms for 793 ms were seen) and wakes 250 times a second, 3 % of a core while idle.
///
/// Programs lie at the same addresses each time: QEMU knows translated code by its address, so
/// where each run has addresses of its own it translates the program and all its libraries
/// anew. `bash -l -c true` takes 30 ms instead of 80. What keeps guests apart is the machine
/// around them; a guest that wants it back writes 2 to `kernel.randomize_va_space`.
pub fn kernel_command_line(tsc_khz: u32) -> String {
    format!(
        "{COMMON} tsc_early_khz={tsc_khz} tsc=reliable no_timer_check mitigations=off norandmaps edd=off"
    )
}

/// The kernel command line under QEMU with KVM.
pub fn kernel_command_line_kvm() -> String {
    format!("{COMMON} clocksource=kvm-clock")
}

/// Console on the serial port and quiet, for a serial line is slow; a kernel that panics or
/// an init that ends makes the machine end, which its keeper sees. Security modules without a
/// policy and the crypto self-tests are left out: together they are 0.8 s of a cold boot of
/// 2.7 s under emulation.
const COMMON: &str = "console=ttyS0 quiet loglevel=1 panic=1 reboot=t nowatchdog random.trust_cpu=on \
    lsm=landlock audit=0 cryptomgr.notests";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_carries_the_hosts_clock_rate() {
        assert!(kernel_command_line(2_596_150).contains(" tsc_early_khz=2596150 "));
        assert!(!kernel_command_line_kvm().contains("tsc_early_khz"));
    }

    #[test]
    fn start_up_files_run_no_program_in_a_login_shell() {
        for file in FILES.iter().filter(|f| f.path.ends_with("profile")) {
            let code = file.content.lines().filter(|line| !line.starts_with('#'));
            for line in code {
                assert!(
                    !line.contains("$(") && !line.contains('`'),
                    "{}: {line}",
                    file.path
                );
            }
        }
    }
}
