//! What QEMU sees of the host: itself, its libraries and firmware, read-only, and `/dev/kvm`
//! where it uses that. All else comes as descriptors.

use std::path::{Path, PathBuf};

use crate::info::Accelerator;
use crate::keeper::{Bind, Jail};

/// The folder that becomes its root, in the machine's folder.
const ROOT: &str = "jail";

/// Where libraries and the programs' interpreter are; those that a host does not have are left
/// out. `ld.so.cache` says which is where.
const LIBRARIES: [&str; 6] = [
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/lib",
    "/etc/ld.so.cache",
];

/// Firmware, relative to the folder that `bin` with QEMU is in.
const FIRMWARE: [&str; 4] = [
    "share/qemu",
    "share/seabios",
    "share/qemu-firmware",
    "lib/ipxe",
];

/// The jail of a machine in `dir`, in which `program` has the path it has outside. Makes its
/// root, which is empty and stays so: what is shown in it is in the monitor's mounts only.
pub(super) fn make(dir: &Path, program: &Path, accelerator: Accelerator) -> std::io::Result<Jail> {
    let root = dir.join(ROOT);
    match std::fs::remove_dir_all(&root) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    std::fs::create_dir(&root)?;
    // The machine's folder keeps all others out.
    std::fs::set_permissions(&root, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    Ok(Jail {
        root,
        binds: binds(program),
        devices: match accelerator {
            Accelerator::Kvm => vec!["/dev/kvm".into(), "/dev/null".into(), "/dev/urandom".into()],
            // It opens /dev/null to find out which locks the host has.
            Accelerator::Tcg => vec!["/dev/null".into(), "/dev/urandom".into()],
        },
        network: false,
    })
}

fn binds(program: &Path) -> Vec<Bind> {
    let prefix = program.parent().and_then(Path::parent);
    let firmware = FIRMWARE
        .iter()
        .filter_map(|folder| Some(prefix?.join(folder)));
    let mut shown: Vec<PathBuf> = Vec::new();
    for path in LIBRARIES.iter().map(PathBuf::from).chain(firmware) {
        // What is in a folder that is shown already is there with it.
        let inside = shown.iter().any(|folder| path.starts_with(folder));
        if path.exists() && !inside {
            shown.push(path);
        }
    }
    shown.push(program.to_owned());
    let bind = |from: PathBuf| Bind {
        to: from.strip_prefix("/").unwrap_or(&from).to_owned(),
        executable: true,
        from,
    };
    shown.into_iter().map(bind).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn g38_a_jail_shows_the_program_its_libraries_and_nothing_to_write_to() {
        let dir = tempfile::tempdir().unwrap();
        let program = Path::new("/usr/bin/qemu-system-x86_64");
        let jail = make(dir.path(), program, Accelerator::Tcg).unwrap();
        let shown: Vec<&Path> = jail.binds.iter().map(|bind| bind.from.as_path()).collect();
        assert!(shown.contains(&program) && shown.contains(&Path::new("/lib")));
        for path in [
            "/", "/etc", "/usr", "/var", "/home", "/proc", "/root", "/tmp",
        ] {
            assert!(!shown.contains(&Path::new(path)), "{path}");
        }
        assert!(!jail.network && !jail.devices.contains(&"/dev/kvm".into()));
        // A second one in the same folder begins anew.
        std::fs::write(jail.root.join("left"), b"").unwrap();
        make(dir.path(), program, Accelerator::Kvm).unwrap();
        assert!(!jail.root.join("left").exists());
    }
}
