//! The real thing: one image built from Debian packages, then everything that can be asked
//! of it. One test, because the build is most of its time. It fails where the tools are
//! missing: `make test` installs them.

#![allow(clippy::unwrap_used)]

use std::collections::HashSet;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};
use wrenn_image::{BuildRequest, GuestPrograms, ImageError, ImageStore, Progress, Step, StepEvent};

/// Notes the steps that were reported; ends the build once a given step is under way.
struct Watch {
    done: Mutex<Vec<Step>>,
    stop_at: Option<Step>,
    stop: Mutex<bool>,
}

impl Watch {
    fn new(stop_at: Option<Step>) -> Self {
        Watch {
            done: Mutex::default(),
            stop_at,
            stop: Mutex::new(false),
        }
    }
}

impl Progress for Watch {
    fn step(&self, event: StepEvent) {
        if event.done {
            self.done.lock().unwrap().push(event.step);
        } else if Some(event.step) == self.stop_at && event.fraction.is_some_and(|done| done > 0.1)
        {
            *self.stop.lock().unwrap() = true;
        }
    }

    fn cancelled(&self) -> bool {
        *self.stop.lock().unwrap()
    }
}

fn request<'a>(envd: &'a [u8]) -> BuildRequest<'a> {
    BuildRequest {
        name: "minimal",
        programs: GuestPrograms {
            init: b"init of the test",
            envd,
        },
    }
}

/// A file's content in an ext4 image.
fn read(image: &Path, path: &str) -> String {
    let output = Command::new("/usr/sbin/debugfs")
        .args(["-R", &format!("cat {path}")])
        .arg(image)
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn leftovers(root: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(root)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap());
    entries.filter(|name| name.starts_with("build-")).collect()
}

#[test]
fn g19_an_image_is_built_once_per_input_and_never_changed() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("images");
    let store = ImageStore::open(root.clone()).unwrap();

    // Cancelled in the middle of the installation: nothing stays but the downloads.
    let result = store.build(request(b"envd 1"), &Watch::new(Some(Step::Install)));
    assert!(matches!(result, Err(ImageError::Cancelled)), "{result:?}");
    assert_eq!(leftovers(&root), Vec::<String>::new());
    assert!(store.list().unwrap().is_empty());

    let watch = Watch::new(None);
    let image = store.build(request(b"envd 1"), &watch).unwrap();
    assert_eq!(leftovers(&root), Vec::<String>::new());
    assert_eq!(watch.done.lock().unwrap().last(), Some(&Step::Commit));
    assert_eq!(read(&image.rootfs(), "/usr/bin/envd"), "envd 1");
    assert!(
        read(&image.rootfs(), "/etc/passwd").contains("user:x:1000:1000::/home/user:/bin/bash")
    );
    assert!(
        read(&image.rootfs(), "/etc/group")
            .lines()
            .any(|l| l.starts_with("sudo:") && l.ends_with("user"))
    );
    assert_eq!(read(&image.rootfs(), "/etc/machine-id"), "");
    let elf = std::fs::read(image.vmlinux()).unwrap();
    assert_eq!(&elf[..4], b"\x7fELF");
    let check = Command::new("/usr/sbin/e2fsck")
        .args(["-fn"])
        .arg(image.rootfs())
        .output()
        .unwrap();
    assert!(
        check.status.success(),
        "{}",
        String::from_utf8_lossy(&check.stdout)
    );

    // The same inputs: the same image, at once.
    let start = Instant::now();
    let again = store.build(request(b"envd 1"), &Watch::new(None)).unwrap();
    assert_eq!(again.digest(), image.digest());
    assert!(
        start.elapsed() < Duration::from_secs(2),
        "a build with nothing to do took {:?}",
        start.elapsed()
    );

    // Another envd: another image, beside the untouched first one.
    let other = store.build(request(b"envd 2"), &Watch::new(None)).unwrap();
    assert_ne!(other.digest(), image.digest());
    assert_eq!(read(&other.rootfs(), "/usr/bin/envd"), "envd 2");
    store.verify(&image.digest().to_string()).unwrap();
    assert_eq!(store.get("minimal").unwrap().digest(), other.digest());

    store
        .remove(&image.digest().to_string(), &HashSet::new())
        .unwrap();
    assert!(matches!(
        store.get(&image.digest().to_string()),
        Err(ImageError::NotFound(_))
    ));
}
