//! QEMU's command line: pure, and free of paths.

use std::ffi::OsString;
use std::os::fd::OwnedFd;

use serde_json::{Value, json};
use wrenn_types::Shape;

use super::save::TRANSIENT;
use crate::Accelerator;
use crate::keeper::{FIRST_FD, SERIAL_FD};

/// The machine model. ACPI, or Debian's kernel finds no virtio device.
pub(super) const MACHINE: &str = "microvm,acpi=on";

/// Version of the device layout below; see [`crate::Fingerprint::layout`].
pub(super) const LAYOUT: u32 = 1;

/// MiB of translated code that TCG keeps. QEMU's default of up to 1 GiB would grow without
/// bound in a sandbox that runs many programs.
const TCG_CACHE_MIB: u32 = 64;

/// All of QEMU's own system call filter.
const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

/// The processor model: what the host has, or all that TCG can do.
pub(super) fn cpu(accelerator: Accelerator) -> &'static str {
    match accelerator {
        Accelerator::Kvm => "host",
        Accelerator::Tcg => "max",
    }
}

/// The descriptors of a monitor under way; each has the number it will have in QEMU.
#[derive(Debug, Default)]
pub(super) struct Descriptors {
    fds: Vec<OwnedFd>,
}

impl Descriptors {
    pub(super) fn add(&mut self, fd: impl Into<OwnedFd>) -> Number {
        self.fds.push(fd.into());
        // A machine has a dozen descriptors.
        Number(FIRST_FD + self.fds.len() as i32 - 1)
    }

    pub(super) fn into_fds(self) -> Vec<OwnedFd> {
        self.fds
    }
}

/// A descriptor as QEMU knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Number(pub(super) i32);

impl Number {
    /// For what QEMU opens anew in its jail: it must be open to any user, as a memfd is.
    fn path(self) -> String {
        format!("/fd/{}", self.0)
    }
}

/// One image of the disk chain.
#[derive(Debug, Clone, Copy)]
pub(super) struct Image {
    pub(super) fd: Number,
    pub(super) format: Format,
    /// For the top, which is writable: the same file, opened for reading only. QEMU takes
    /// it up when the layer is frozen.
    pub(super) spare: Option<Number>,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Format {
    Raw,
    Qcow2,
}

/// Whether QEMU starts a machine or waits for a saved one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Start {
    /// Boot, writing to the memory itself.
    Cold,
    /// Boot, mapping the memory privately.
    Private,
    /// Wait for a state, mapping the memory privately.
    Saved,
}

/// A machine in QEMU's terms.
#[derive(Debug)]
pub(super) struct Plan<'a> {
    pub(super) accelerator: Accelerator,
    pub(super) start: Start,
    pub(super) shape: Shape,
    pub(super) memory: Number,
    pub(super) kernel: Number,
    pub(super) initramfs: Option<Number>,
    pub(super) cmdline: &'a str,
    pub(super) identity: Number,
    pub(super) control: Number,
    /// From the base upwards.
    pub(super) disk: &'a [Image],
    pub(super) network: Option<(Number, [u8; 6])>,
}

impl Plan<'_> {
    pub(super) fn args(&self) -> Vec<OsString> {
        let mut args = Args::default();
        args.put("-M", format!("{MACHINE},memory-backend=mem"));
        args.put(
            "-accel",
            match self.accelerator {
                Accelerator::Kvm => "kvm".into(),
                Accelerator::Tcg => format!("tcg,tb-size={TCG_CACHE_MIB}"),
            },
        );
        args.put("-cpu", cpu(self.accelerator).into());
        args.put("-smp", self.shape.vcpus.0.to_string());
        args.put("-m", format!("{}M", self.shape.memory.0));
        args.put(
            "-object",
            format!(
                "memory-backend-file,id=mem,size={}M,mem-path={},share={}",
                self.shape.memory.0,
                self.memory.path(),
                match self.start {
                    Start::Cold => "on",
                    Start::Private | Start::Saved => "off",
                }
            ),
        );
        args.put("-kernel", self.kernel.path());
        if let Some(initramfs) = self.initramfs {
            args.put("-initrd", initramfs.path());
        }
        args.put("-append", self.cmdline.into());
        args.put(
            "-fw_cfg",
            format!("name=opt/wrenn/restore,file={}", self.identity.path()),
        );
        for flag in ["-nodefaults", "-no-user-config", "-no-reboot"] {
            args.flag(flag);
        }
        args.put("-display", "none".into());
        // Or a state saved without its memory cannot be loaded.
        args.put("-global", "migration.send-configuration=off".into());
        args.put("-sandbox", SANDBOX.into());
        args.put("-add-fd", format!("fd={SERIAL_FD},set={SERIAL_FD}"));
        args.put(
            "-chardev",
            // Appending, or QEMU tries to truncate the pipe.
            format!("file,id=console,path=/dev/fdset/{SERIAL_FD},append=on"),
        );
        args.put("-serial", "chardev:console".into());
        args.put(
            "-chardev",
            format!("socket,id=control,fd={},server=on,wait=off", self.control.0),
        );
        args.put("-mon", "chardev=control,mode=control".into());
        self.disk_args(&mut args);
        if let Some((tap, mac)) = self.network {
            let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
            args.put("-netdev", format!("tap,id=net0,fd={},vhost=off", tap.0));
            args.put(
                "-device",
                format!("virtio-net-device,netdev=net0,mac={mac}"),
            );
        }
        // All stand until they are told to run, so that what is known of that is right.
        args.flag("-S");
        if self.start == Start::Saved {
            args.put("-incoming", "defer".into());
        }
        args.list
    }

    /// The chain, joined by node names: no image has to name the one below it.
    fn disk_args(&self, args: &mut Args) {
        let top = self.disk.len().saturating_sub(1);
        for (level, image) in self.disk.iter().enumerate() {
            let set = image.fd.0;
            let name = disk_name(level);
            match image.spare {
                None => args.put("-add-fd", format!("fd={set},set={set},opaque={name}")),
                Some(spare) => {
                    let (fd, label) = (spare.0, spare_of(&name));
                    args.put("-add-fd", format!("fd={set},set={set},opaque={TRANSIENT}"));
                    args.put("-add-fd", format!("fd={fd},set={set},opaque={label}"));
                }
            }
            let mut node = disk_node(&name, image.format, set, image.spare.is_some());
            if level > 0 {
                node["backing"] = json!(disk_name(level - 1));
            }
            args.put("-blockdev", node.to_string());
        }
        // A host whose disk is full is an error for the guest's programs. QEMU's own way is to
        // stop the machine until there is room.
        args.put(
            "-device",
            format!(
                "virtio-blk-device,id={DISK_ID},drive={},rerror=report,werror=report",
                disk_name(top)
            ),
        );
    }
}

/// What QEMU calls the guest's disk.
pub(super) const DISK_ID: &str = "disk";

/// Name of a layer's node in QEMU, from 0 for the base.
pub(super) fn disk_name(level: usize) -> String {
    format!("disk{level}")
}

/// Label of the descriptor for reading only of a layer that was, or is, the top. Those of other
/// layers are labelled with the layer's name.
pub(super) fn spare_of(name: &str) -> String {
    format!("{SPARE}-{name}")
}

/// How such labels begin.
pub(super) const SPARE: &str = "spare";

/// An image as QEMU's block layer takes it, opened from a set of descriptors.
pub(super) fn disk_node(
    name: &str,
    format: Format,
    set: impl std::fmt::Display,
    writable: bool,
) -> Value {
    json!({
        "node-name": name,
        "driver": match format { Format::Raw => "raw", Format::Qcow2 => "qcow2" },
        "read-only": !writable,
        // A running machine does not survive the host, so its flushes need not reach
        // the platter; a pause syncs the layer itself.
        "cache": { "direct": false, "no-flush": true },
        "discard": "ignore",
        // Without an access of its own, so that it follows when the image becomes
        // read-only.
        "file": {
            "driver": "file",
            "filename": format!("/dev/fdset/{set}"),
            "cache": { "direct": false, "no-flush": true },
            "aio": "threads",
            "discard": "ignore",
        },
    })
}

#[derive(Default)]
struct Args {
    list: Vec<OsString>,
}

impl Args {
    fn flag(&mut self, flag: &str) {
        self.list.push(flag.into());
    }

    fn put(&mut self, option: &str, value: String) {
        self.flag(option);
        self.list.push(value.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(start: Start) -> Vec<String> {
        let image = |fd, format, spare: Option<i32>| Image {
            fd: Number(fd),
            format,
            spare: spare.map(Number),
        };
        Plan {
            accelerator: Accelerator::Tcg,
            start,
            shape: Shape::DEFAULT,
            memory: Number(4),
            kernel: Number(5),
            initramfs: Some(Number(6)),
            cmdline: "console=ttyS0",
            identity: Number(7),
            control: Number(8),
            disk: &[
                image(9, Format::Raw, None),
                image(10, Format::Qcow2, None),
                image(11, Format::Qcow2, Some(13)),
            ],
            network: Some((Number(12), [2, 0xfc, 0, 0, 0, 5])),
        }
        .args()
        .into_iter()
        .map(|arg| arg.into_string().unwrap())
        .collect()
    }

    #[test]
    fn g20_no_path_but_descriptors_reaches_qemu() {
        for start in [Start::Cold, Start::Private, Start::Saved] {
            for arg in plan(start) {
                for (at, _) in arg.match_indices('/') {
                    let (before, rest) = arg.split_at(at);
                    let known = ["/fd/", "/dev/fdset/"]
                        .iter()
                        .any(|prefix| rest.starts_with(prefix));
                    let inside = ["/dev", "/fd", "/fdset", "opt", "wrenn"]
                        .iter()
                        .any(|part| before.ends_with(part));
                    assert!(known || inside, "{arg}");
                }
            }
        }
    }

    #[test]
    fn g43_no_device_can_discard_shared_memory() {
        assert!(plan(Start::Private).join(" ").contains("share=off"));
        let text = plan(Start::Saved).join(" ");
        assert!(text.contains("share=off"));
        for word in ["balloon", "virtio-mem", "free-page", "hostmem", "unmap"] {
            assert!(!text.contains(word), "{word}");
        }
        assert_eq!(text.matches("-device ").count(), 2);
    }

    #[test]
    fn only_the_top_of_the_disk_is_writable() {
        let text = plan(Start::Cold).join(" ");
        assert_eq!(text.matches(r#""node-name":"disk"#).count(), 3);
        assert_eq!(text.matches(r#""read-only":false"#).count(), 1);
        assert!(
            text.contains("fd=11,set=11,opaque=transient -add-fd fd=13,set=11,opaque=spare-disk2")
        );
        assert!(text.contains("fd=9,set=9,opaque=disk0 ") && text.contains("opaque=disk1 "));
        assert!(text.contains(r#""backing":"disk1""#) && text.contains("drive=disk2,"));
        assert!(!plan(Start::Cold).contains(&"-incoming".to_string()));
    }
}
