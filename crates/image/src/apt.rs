//! Asking apt: which packages, which versions, which hashes; and fetching exactly those.
//!
//! The host's own lists of Debian's archives are used (so mirrors and proxies work), those of
//! other archives are not. They were verified by apt when they were fetched; packages are
//! checked here against the hashes in them. Nothing on the host is changed, except that
//! `apt-get update` runs where the lists are missing or too old to download from.

use crate::digest::Digest;
use crate::error::{ImageError, at};
use crate::files;
use crate::manifest::LockedPackage;
use crate::progress::Running;
use crate::recipe;
use crate::tool::Tool;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

const LISTS: &str = "/var/lib/apt/lists";
const NETWORK_HINT: &str = "; check the network and the mirrors in /etc/apt";

/// Packages of an image: what apt resolved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolved {
    /// Debian's release, for example `bookworm`.
    pub suite: String,
    /// One-line apt sources of Debian's archives.
    pub sources: String,
    /// Packages of the root file system, sorted.
    pub packages: Vec<LockedPackage>,
    /// The kernel's package.
    pub kernel: LockedPackage,
}

/// What the host's apt would answer depends only on this: its lists, its sources and our
/// recipe. Cheap: no list is read.
pub fn fingerprint() -> Result<Digest, ImageError> {
    let mut lines = vec![recipe::digest().to_string()];
    for folder in [LISTS, "/etc/apt", "/etc/apt/sources.list.d"] {
        let folder = Path::new(folder);
        let Ok(entries) = fs::read_dir(folder) else {
            continue;
        };
        for entry in entries {
            let entry = entry.map_err(at("read", folder))?;
            let metadata = entry.metadata().map_err(at("read", entry.path()))?;
            if metadata.is_file() && entry.file_name() != "lock" {
                let name = entry.path().display().to_string();
                lines.push(format!(
                    "{name} {} {} {}",
                    metadata.size(),
                    metadata.mtime(),
                    metadata.mtime_nsec()
                ));
            }
        }
    }
    lines.sort();
    Ok(Digest::of(lines.join("\n").as_bytes()))
}

/// apt with a configuration of its own in a build folder.
pub struct Apt<'a> {
    /// Scratch folder.
    work: PathBuf,
    /// Where downloaded packages are kept.
    debs: PathBuf,
    running: &'a Running<'a>,
}

impl<'a> Apt<'a> {
    /// Prepares the configuration below `work`; packages go to `debs`.
    pub fn new(work: &Path, debs: &Path, running: &'a Running<'a>) -> Result<Self, ImageError> {
        for folder in [
            work,
            &work.join("parts"),
            &work.join("prefs"),
            &work.join("none/partial"),
        ] {
            files::folder(folder)?;
        }
        files::folder(&debs.join("partial"))?;
        files::write(&work.join("status"), 0o644, b"")?;
        files::write(
            &work.join("prefs/wrenn"),
            0o644,
            recipe::PREFERENCES.as_bytes(),
        )?;
        Ok(Apt {
            work: work.to_owned(),
            debs: debs.to_owned(),
            running,
        })
    }

    /// Resolves the image's packages.
    pub fn resolve(&self) -> Result<Resolved, ImageError> {
        let (suite, sources) = match self.sources()? {
            Some(found) => found,
            None => {
                self.update()?;
                self.sources()?.ok_or(ImageError::NoDebianSources)?
            }
        };
        self.use_sources(&sources)?;
        let essential = ["install", "?essential"];
        let mut packages = self.plan(&[&essential[..], &recipe::PACKAGES].concat())?;
        packages.sort();
        let kernel = self
            .plan(&["install", recipe::KERNEL_PACKAGE])?
            .into_iter()
            .find(|package| is_kernel(&package.name))
            .ok_or_else(|| {
                ImageError::AptAnswer(format!("{} without a kernel", recipe::KERNEL_PACKAGE))
            })?;
        Ok(Resolved {
            suite,
            sources,
            packages,
            kernel,
        })
    }

    /// Fetches what was resolved and checks each file.
    pub fn download(&self, resolved: &Resolved) -> Result<(), ImageError> {
        self.use_sources(&resolved.sources)?;
        let kernel = format!("{}={}", resolved.kernel.name, resolved.kernel.version);
        let all = || resolved.packages.iter().chain([&resolved.kernel]);
        let total: u64 = all().map(|package| package.size).sum();
        let mut tick = || {
            self.running
                .fraction(Some(folder_size(&self.debs) as f32 / total.max(1) as f32));
            !self.running.cancelled()
        };
        let mut install = self.tool(&self.debs);
        install
            .command()
            .args(["-y", "-d", "install", "?essential"])
            .args(recipe::PACKAGES);
        install.run(&mut tick)?;
        if !self.debs.join(resolved.kernel.file_name()).exists() {
            let mut download = self.tool(&self.debs);
            download
                .command()
                .current_dir(&self.debs)
                .args(["download", &kernel]);
            download.run(&mut tick)?;
        }
        for package in all() {
            let path = self.debs.join(package.file_name());
            let found = Digest::of_file(&path).map_err(at("read the downloaded package", &path))?;
            if found != package.sha256 {
                files::remove(&path)?;
                let (file, expected) = (package.file_name(), package.sha256);
                return Err(ImageError::WrongPackage {
                    file,
                    expected,
                    found,
                });
            }
        }
        Ok(())
    }

    /// Refreshes the host's lists.
    pub fn update(&self) -> Result<(), ImageError> {
        let log = self.work.join("log");
        let mut tool = Tool::new("apt-get", NETWORK_HINT, &log);
        tool.command().arg("update");
        tool.run(&mut || {
            self.running.fraction(None);
            !self.running.cancelled()
        })
    }

    /// The suite and the one-line sources of Debian's archives, if their lists are there.
    fn sources(&self) -> Result<Option<(String, String)>, ImageError> {
        let log = self.work.join("log");
        let mut tool = Tool::new("apt-get", "", &log);
        let format = "$(ORIGIN)|$(FILENAME)|$(CODENAME)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)";
        tool.command()
            .args(["indextargets", "--format", format, "Created-By: Packages"]);
        let answer = tool.output(&self.work.join("answer"), &mut || !self.running.cancelled())?;
        let targets: Vec<_> = answer
            .lines()
            .filter_map(target)
            .filter(|t| Path::new(t.file).exists())
            .collect();
        // `bookworm-updates` and `bookworm-security` go with `bookworm`, the shortest.
        let Some(suite) = targets
            .iter()
            .map(|t| t.codename)
            .min_by_key(|name| name.len())
        else {
            return Ok(None);
        };
        let sources = targets.iter().map(|t| {
            format!(
                "deb [trusted=yes] {} {} {}\n",
                t.uri, t.release, t.component
            )
        });
        Ok(Some((suite.to_owned(), sources.collect())))
    }

    fn use_sources(&self, sources: &str) -> Result<(), ImageError> {
        files::write(&self.work.join("sources.list"), 0o644, sources.as_bytes())
    }

    /// What apt would fetch for `arguments` on a system without any package.
    fn plan(&self, arguments: &[&str]) -> Result<Vec<LockedPackage>, ImageError> {
        // An empty archive folder: apt leaves out what it has already.
        let mut tool = self.tool(&self.work.join("none"));
        tool.command()
            .args(["-y", "-qq", "--print-uris"])
            .args(arguments);
        let answer = tool.output(&self.work.join("answer"), &mut || !self.running.cancelled())?;
        answer
            .lines()
            .filter(|line| !line.trim().is_empty())
            .map(package)
            .collect()
    }

    /// apt-get with our configuration: Debian's sources only, no package installed.
    fn tool(&self, archives: &Path) -> Tool {
        let mut tool = Tool::new("apt-get", NETWORK_HINT, &self.work.join("log"));
        let options = [
            ("Dir::Etc::sourcelist", self.work.join("sources.list")),
            ("Dir::Etc::sourceparts", self.work.join("parts")),
            ("Dir::Etc::preferences", self.work.join("no-preferences")),
            ("Dir::Etc::preferencesparts", self.work.join("prefs")),
            ("Dir::State::status", self.work.join("status")),
            ("Dir::Cache::archives", archives.to_owned()),
        ];
        for (name, path) in options {
            tool.command()
                .arg("-o")
                .arg(format!("{name}={}", path.display()));
        }
        for option in [
            "APT::Install-Recommends=false",
            "APT::Architecture=amd64",
            "APT::Sandbox::User=root",
            "Acquire::ForceHash=SHA256",
            "Acquire::Retries=3",
            // Nothing of the host is written, so its locks are not taken.
            "Debug::NoLocking=true",
        ] {
            tool.command().args(["-o", option]);
        }
        tool
    }
}

/// One line of `apt-get indextargets`.
struct Target<'a> {
    file: &'a str,
    codename: &'a str,
    uri: &'a str,
    release: &'a str,
    component: &'a str,
}

/// Reads such a line; `None` for archives that are not Debian's.
fn target(line: &str) -> Option<Target<'_>> {
    let mut fields = line.split('|');
    let mut next = || {
        fields
            .next()
            .filter(|field| !field.is_empty() && !field.contains(char::is_whitespace))
    };
    (next()? == "Debian").then_some(())?;
    Some(Target {
        file: next()?,
        codename: next()?,
        uri: next()?,
        release: next()?,
        component: next()?,
    })
}

/// Reads a line of `--print-uris`: `'URI' file size SHA256:digest`.
fn package(line: &str) -> Result<LockedPackage, ImageError> {
    let read = || {
        let mut fields = line.rsplit(' ');
        let sha256 = Digest::from_hex(fields.next()?.strip_prefix("SHA256:")?).ok()?;
        let size = fields.next()?.parse().ok()?;
        let mut parts = fields.next()?.strip_suffix(".deb")?.split('_');
        let (name, version, architecture) = (parts.next()?, parts.next()?, parts.next()?);
        let plain = |text: &str| !text.is_empty() && !text.contains('/');
        if parts.next().is_some() || ![name, version, architecture].into_iter().all(plain) {
            return None;
        }
        Some(LockedPackage {
            name: name.into(),
            version: version.replace("%3a", ":"),
            architecture: architecture.into(),
            size,
            sha256,
        })
    };
    read().ok_or_else(|| ImageError::AptAnswer(line.chars().take(200).collect()))
}

/// A kernel itself, not the package that depends on the current one.
fn is_kernel(name: &str) -> bool {
    name.strip_prefix("linux-image-")
        .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
}

/// Bytes in a folder of packages, those still being fetched included.
fn folder_size(folder: &Path) -> u64 {
    let size = |folder: &Path| -> u64 {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries
            .filter_map(|entry| entry.metadata().ok())
            .filter(|m| m.is_file())
            .map(|m| m.len())
            .sum()
    };
    size(folder) + size(&folder.join("partial"))
}

/// Checks that exactly the locked packages are installed in a root file system.
pub fn check_installed(
    tree: &Path,
    work: &Path,
    locked: &[LockedPackage],
) -> Result<(), ImageError> {
    let mut tool = Tool::new("dpkg-query", "", &work.join("log"));
    tool.command().arg(format!(
        "--admindir={}",
        tree.join("var/lib/dpkg").display()
    ));
    tool.command()
        .args(["-W", "-f", "${Package} ${Version} ${Architecture}\n"]);
    let answer = tool.output(&work.join("answer"), &mut || true)?;
    let installed: BTreeSet<String> = answer.lines().map(str::to_owned).collect();
    let locked: BTreeSet<String> = locked
        .iter()
        .map(|p| format!("{} {} {}", p.name, p.version, p.architecture))
        .collect();
    let differing: Vec<&str> = installed
        .symmetric_difference(&locked)
        .map(String::as_str)
        .collect();
    if differing.is_empty() {
        Ok(())
    } else {
        Err(ImageError::LockMismatch(differing.join(", ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LINE: &str = "'http://deb.debian.org/debian/pool/main/libc/libcap2/libcap2_2.66-4_amd64.deb' \
        libcap2_1%3a2.66-4_amd64.deb 27892 SHA256:1896a2aacf4ad681ff5eacc24a5b0ca4d5d9c9b9c9e4b6de5197bc1e116ea619";

    #[test]
    fn a_line_of_apt_becomes_a_package() {
        let found = package(LINE).unwrap();
        assert_eq!(
            (found.name.as_str(), found.version.as_str(), found.size),
            ("libcap2", "1:2.66-4", 27892)
        );
        assert_eq!(found.file_name(), "libcap2_1%3a2.66-4_amd64.deb");
    }

    #[test]
    fn archives_of_others_are_left_out() {
        assert!(target("Debian|/l|bookworm|http://d/|bookworm|main").is_some());
        assert!(target(". nodistro|/l|nodistro|http://n/|nodistro|main").is_none());
        assert!(target("Debian|/l|bookworm|http://d/ evil|bookworm|main").is_none());
    }

    #[test]
    fn the_kernel_is_not_its_metapackage() {
        assert!(is_kernel("linux-image-6.1.0-56-cloud-amd64"));
        assert!(!is_kernel("linux-image-cloud-amd64"));
    }

    proptest! {
        #[test]
        fn damaged_lines_are_refused_or_harmless(at in any::<prop::sample::Index>(), with in any::<char>()) {
            let mut chars: Vec<char> = LINE.chars().collect();
            let place = at.index(chars.len());
            chars[place] = with;
            if let Ok(found) = package(&chars.into_iter().collect::<String>()) {
                prop_assert!(!found.file_name().contains('/'));
            }
        }

        #[test]
        fn any_line_is_survived(line in ".{0,200}") {
            let _ = package(&line);
            let _ = target(&line);
        }
    }
}
