//! Kernel and initramfs from Debian's kernel package.

use crate::bzimage;
use crate::cpio::Archive;
use crate::error::{ImageError, at};
use crate::files;
use crate::module;
use crate::progress::Running;
use crate::recipe;
use crate::tool::Tool;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// What an image needs of a kernel package.
pub struct Kernel {
    /// `uname -r`.
    pub release: String,
    /// The bzImage, for QEMU.
    pub vmlinuz: Vec<u8>,
    /// The ELF kernel inside, for Firecracker.
    pub vmlinux: Vec<u8>,
    /// Modules in the order of loading: file name, optional, content.
    pub modules: Vec<(String, bool, Vec<u8>)>,
}

/// Unpacks `package` below `work` and reads what is needed.
pub fn read(package: &Path, work: &Path, running: &Running<'_>) -> Result<Kernel, ImageError> {
    let tree = work.join("kernel");
    let mut tool = Tool::new("dpkg-deb", "; is the disk full?", &work.join("log"));
    tool.command().arg("-x").arg(package).arg(&tree);
    tool.run(&mut || !running.cancelled())?;
    let (release, vmlinuz_path) = find_kernel(&tree.join("boot"))?;
    let vmlinuz = fs::read(&vmlinuz_path).map_err(at("read", &vmlinuz_path))?;
    let vmlinux =
        bzimage::extract_elf(&vmlinuz).map_err(|error| ImageError::Kernel(error.to_string()))?;
    let modules = modules(&tree.join("lib/modules").join(&release))?;
    files::remove(&tree)?;
    Ok(Kernel {
        release,
        vmlinuz,
        vmlinux,
        modules,
    })
}

fn find_kernel(boot: &Path) -> Result<(String, PathBuf), ImageError> {
    for entry in fs::read_dir(boot).map_err(at("read", boot))? {
        let entry = entry.map_err(at("read", boot))?;
        if let Some(release) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.strip_prefix("vmlinuz-"))
        {
            return Ok((release.to_owned(), entry.path()));
        }
    }
    Err(ImageError::Kernel("it has no boot/vmlinuz-*".into()))
}

/// Reads the wanted modules and what they depend on. A wanted one that is not there must be
/// built into the kernel, which `modules.builtin` tells.
fn modules(folder: &Path) -> Result<Vec<(String, bool, Vec<u8>)>, ImageError> {
    let mut paths = BTreeMap::new();
    collect(&folder.join("kernel"), &mut paths)?;
    let builtin_path = folder.join("modules.builtin");
    let builtin = fs::read_to_string(&builtin_path).map_err(at("read", &builtin_path))?;
    let is_builtin = |wanted: &str| {
        let names = builtin
            .lines()
            .filter_map(|line| line.rsplit('/').next()?.strip_suffix(".ko"));
        names.map(module::normal_name).any(|name| name == wanted)
    };
    let mut contents = BTreeMap::new();
    let mut direct = BTreeMap::new();
    let mut pending: Vec<String> = recipe::MODULES
        .iter()
        .map(|name| name.trim_start_matches('?').to_owned())
        .collect();
    while let Some(name) = pending.pop() {
        if direct.contains_key(&name) || is_builtin(&name) {
            continue;
        }
        let path = paths
            .get(&name)
            .ok_or_else(|| ImageError::Kernel(format!("it has no module {name}")))?;
        let content = fs::read(path).map_err(at("read", path))?;
        let needs = module::dependencies(&content)
            .map_err(|error| ImageError::Kernel(format!("its module {name}: {error}")))?;
        pending.extend(needs.iter().cloned());
        direct.insert(name.clone(), needs);
        contents.insert(name, content);
    }
    let wanted = recipe::MODULES.map(|name| name.trim_start_matches('?'));
    let optional = |name: &str| {
        recipe::MODULES
            .iter()
            .any(|m| m.strip_prefix('?') == Some(name))
    };
    let order = module::load_order(&wanted, &direct);
    Ok(order
        .into_iter()
        .filter_map(|name| {
            contents
                .remove(&name)
                .map(|content| (format!("{name}.ko"), optional(&name), content))
        })
        .collect())
}

fn collect(folder: &Path, paths: &mut BTreeMap<String, PathBuf>) -> Result<(), ImageError> {
    for entry in fs::read_dir(folder).map_err(at("read", folder))? {
        let entry = entry.map_err(at("read", folder))?;
        let kind = entry.file_type().map_err(at("read", entry.path()))?;
        if kind.is_dir() {
            collect(&entry.path(), paths)?;
        } else if let Some(name) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.strip_suffix(".ko"))
        {
            paths.insert(module::normal_name(name), entry.path());
        }
    }
    Ok(())
}

/// The initramfs: our init, the console it speaks on, the modules and their list. It is not
/// compressed: unpacking costs more under emulation than reading a few hundred KiB.
pub fn initramfs(init: &[u8], modules: &[(String, bool, Vec<u8>)]) -> Vec<u8> {
    let mut archive = Archive::new();
    for folder in ["dev", "proc", "sys", "mods", "newroot"] {
        archive.directory(folder, 0o755);
    }
    // The kernel opens this for process 1 before any devtmpfs is mounted.
    archive.character_device("dev/console", 0o600, 5, 1);
    let mut list = String::new();
    for (file, optional, content) in modules {
        archive.file(&format!("mods/{file}"), 0o444, content);
        list.push_str(if *optional { "?" } else { "" });
        list.push_str(file);
        list.push('\n');
    }
    archive.file("mods/list", 0o444, list.as_bytes());
    archive.file("init", 0o555, init);
    archive.finish()
}
