//! The root file system: a tree by mmdebstrap, our files, an ext4 image by `mke2fs -d`.

use crate::apt::{self, Resolved};
use crate::error::{ImageError, at};
use crate::files;
use crate::progress::Running;
use crate::recipe;
use crate::tool::Tool;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{chown, symlink};
use std::path::Path;

/// Uid and gid of the user `user`.
const USER: u32 = 1000;

/// Gives mmdebstrap the host's lists and our downloads, so that it fetches nothing.
/// The folders come by environment: no path is ever part of a shell's text.
const SETUP_HOOK: &str = r#"set -e
mkdir -p "$1/var/lib/apt/lists" "$1/var/cache/apt/archives" "$1/etc/apt/preferences.d"
for list in /var/lib/apt/lists/*_InRelease /var/lib/apt/lists/*_Release /var/lib/apt/lists/*_Packages*; do
  if [ -f "$list" ]; then cp "$list" "$1/var/lib/apt/lists/"; fi
done
cp "$WRENN_PREFERENCES" "$1/etc/apt/preferences.d/wrenn"
for deb in "$WRENN_DEBS"/*.deb; do
  ln "$deb" "$1/var/cache/apt/archives/" 2>/dev/null || cp "$deb" "$1/var/cache/apt/archives/"
done"#;

/// Builds the tree, without our programs, at `tree`. `apt_work` is where [`apt::Apt`] keeps
/// its configuration.
pub fn build_tree(
    tree: &Path,
    apt_work: &Path,
    debs: &Path,
    resolved: &Resolved,
    running: &Running<'_>,
) -> Result<(), ImageError> {
    let mut tool = Tool::new("mmdebstrap", "", &apt_work.join("log"));
    let command = tool.command();
    command
        .env("WRENN_DEBS", debs)
        .env("WRENN_PREFERENCES", apt_work.join("prefs/wrenn"));
    command.args([
        "--mode=root",
        "--variant=apt",
        "--format=directory",
        "--architectures=amd64",
    ]);
    command.arg("--skip=update,cleanup/apt/lists,cleanup/apt/cache");
    command.arg("--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr");
    command.arg(format!("--setup-hook={SETUP_HOOK}"));
    command.arg(format!("--include={}", recipe::PACKAGES.join(",")));
    command.arg("--aptopt=APT::Install-Recommends \"false\"");
    // A tree that is thrown away after a crash needs no fsync.
    command.arg("--dpkgopt=force-unsafe-io");
    for path in recipe::EXCLUDED {
        command.arg(format!("--dpkgopt=path-exclude={path}"));
    }
    command
        .arg(&resolved.suite)
        .arg(tree)
        .arg(apt_work.join("sources.list"));
    let info = tree.join("var/lib/dpkg/info");
    let total = resolved.packages.len().max(1) as f32;
    tool.run(&mut || {
        running.fraction(Some(installed(&info) as f32 / total));
        !running.cancelled()
    })?;
    apt::check_installed(tree, apt_work, &resolved.packages)?;
    clean(tree)?;
    customise(tree, &resolved.suite)
}

/// Packages unpacked so far: each leaves a list of its files.
fn installed(info: &Path) -> usize {
    let entries = fs::read_dir(info).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.path().extension().is_some_and(|e| e == "list"))
        .count()
}

/// Removes what belongs to the build or to one machine.
fn clean(tree: &Path) -> Result<(), ImageError> {
    for folder in [
        "var/lib/apt/lists",
        "var/cache/apt",
        "var/cache/debconf",
        "var/log",
        "tmp",
        "run",
    ] {
        let folder = tree.join(folder);
        for entry in fs::read_dir(&folder).map_err(at("read", &folder))? {
            files::remove(&entry.map_err(at("read", &folder))?.path())?;
        }
    }
    for file in [
        "etc/machine-id",
        "var/lib/dbus/machine-id",
        "etc/apt/preferences.d/wrenn",
        "etc/apt/sources.list",
        "etc/hostname",
        "etc/resolv.conf",
        "var/lib/dpkg/status-old",
    ] {
        files::remove(&tree.join(file))?;
    }
    files::folder(&tree.join("var/lib/apt/lists/partial"))?;
    files::folder(&tree.join("var/cache/apt/archives/partial"))?;
    files::folder(&tree.join("var/log/chrony"))
}

/// Adds the user and our files.
fn customise(tree: &Path, suite: &str) -> Result<(), ImageError> {
    for file in &recipe::FILES {
        files::write(&tree.join(file.path), file.mode, file.content.as_bytes())?;
    }
    for (file, line) in recipe::ACCOUNT {
        append(&tree.join(file), line)?;
    }
    for file in ["etc/group", "etc/gshadow"] {
        join_sudo(&tree.join(file))?;
    }
    // The guest fetches from Debian itself: the host's mirror may be out of its reach.
    let sources = format!(
        "Types: deb\nURIs: http://deb.debian.org/debian\nSuites: {suite} {suite}-updates\nComponents: main\n\
         Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n\
         Types: deb\nURIs: http://deb.debian.org/debian-security\nSuites: {suite}-security\nComponents: main\n\
         Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
    );
    files::write(
        &tree.join("etc/apt/sources.list.d/debian.sources"),
        0o644,
        sources.as_bytes(),
    )?;
    let home = tree.join("home/user");
    files::folder(&home)?;
    files::set_mode(&home, 0o755)?;
    for file in [".profile", ".bashrc", ".bash_logout"] {
        let from = tree.join("etc/skel").join(file);
        let content = fs::read(&from).map_err(at("read", &from))?;
        files::write(&home.join(file), 0o644, &content)?;
        chown(home.join(file), Some(USER), Some(USER)).map_err(at("give away", home.join(file)))?;
    }
    chown(&home, Some(USER), Some(USER)).map_err(at("give away", &home))?;
    // A kernel started without our initramfs finds its init too.
    let init = tree.join("usr/sbin/init");
    files::remove(&init)?;
    symlink("wrenn-init", &init).map_err(at("link", &init))
}

fn append(path: &Path, line: &str) -> Result<(), ImageError> {
    let mut file = OpenOptions::new()
        .append(true)
        .open(path)
        .map_err(at("open", path))?;
    file.write_all(line.as_bytes()).map_err(at("write", path))
}

/// Puts `user` into the group sudo of a group file.
fn join_sudo(path: &Path) -> Result<(), ImageError> {
    let text = fs::read_to_string(path).map_err(at("read", path))?;
    fs::write(path, with_member(&text, "sudo", "user")).map_err(at("write", path))
}

/// A group file with one more member in one group (group(5)).
fn with_member(text: &str, group: &str, member: &str) -> String {
    let line = |line: &str| match line.split(':').next() {
        Some(name) if name == group && line.ends_with(':') => format!("{line}{member}\n"),
        Some(name) if name == group => format!("{line},{member}\n"),
        _ => format!("{line}\n"),
    };
    text.lines().map(line).collect()
}

/// Puts our programs into the tree; earlier ones are replaced.
pub fn add_programs(tree: &Path, init: &[u8], envd: &[u8]) -> Result<(), ImageError> {
    files::write(&tree.join(recipe::INIT_PATH), 0o755, init)?;
    files::write(&tree.join(recipe::ENVD_PATH), 0o755, envd)
}

/// Makes the ext4 image from the tree, without mounting anything.
pub fn make_ext4(
    tree: &Path,
    image: &Path,
    log: &Path,
    running: &Running<'_>,
) -> Result<(), ImageError> {
    let file = fs::File::create(image).map_err(at("create", image))?;
    file.set_len(recipe::ROOTFS_BYTES)
        .map_err(at("set the size of", image))?;
    drop(file);
    let mut tool = Tool::new("mke2fs", "; is the disk full?", log);
    tool.command()
        .args(recipe::MKE2FS)
        .arg("-d")
        .arg(tree)
        .arg(image);
    tool.run(&mut || {
        running.fraction(None);
        !running.cancelled()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_joins_empty_and_other_groups() {
        let text = "root:x:0:\nsudo:x:27:\nsudoers:x:28:\n";
        assert_eq!(
            with_member(text, "sudo", "user"),
            "root:x:0:\nsudo:x:27:user\nsudoers:x:28:\n"
        );
        assert_eq!(
            with_member("sudo:x:27:a\n", "sudo", "user"),
            "sudo:x:27:a,user\n"
        );
    }
}
