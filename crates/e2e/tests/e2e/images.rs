//! Images on disk: what is damaged is found before a guest can read it.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use wrenn_e2e::{Cli, HostState, free_address};

pub(crate) async fn list_inspect_and_verify_tell_the_truth(data_dir: &Path) {
    let cli = Cli::new(data_dir);
    let list = cli.run(&["image", "list"]).await.expect_code(0);
    assert!(list.stdout.contains("minimal"), "{list:?}");
    let image = cli
        .run(&["image", "inspect", "minimal", "--json"])
        .await
        .expect_code(0)
        .json()
        .to_string();
    // The lock says of what it is made.
    for part in ["python3", "bash", "sha256"] {
        assert!(image.contains(part), "{part} is not in {image}");
    }
    // What has a name, and what is made of it, is never pruned (G18).
    assert!(list.stdout.contains(" template"), "{list:?}");
    let would = cli.run(&["image", "prune", "--dry-run", "--json"]).await;
    let would = would.expect_code(0).json();
    let pruned = cli.run(&["image", "prune", "--json"]).await;
    assert_eq!(pruned.expect_code(0).json(), would);
    cli.run(&["image", "verify", "minimal"])
        .await
        .expect_code(0);
    let list = cli.run(&["image", "list"]).await.expect_code(0);
    assert!(list.stdout.contains(" template"), "{list:?}");
}

pub(crate) async fn an_unknown_image_is_named(data_dir: &Path) {
    let cli = Cli::new(data_dir);
    let before = HostState::read(data_dir, None);
    for name in ["no-such-image", "../../etc", "..", "names/minimal"] {
        for command in ["inspect", "verify", "remove"] {
            let ran = cli.run(&["image", command, name]).await;
            assert!([1, 2].contains(&ran.code), "{ran:?}");
            ran.expect_stderr(&[name]);
        }
    }
    let ran = cli.run(&["image", "build", "../evil"]).await;
    assert!([1, 2].contains(&ran.code), "{ran:?}");
    assert_eq!(
        HostState::read(data_dir, None),
        before,
        "a refused name changed the data folder"
    );
}

pub(crate) async fn g16_a_damaged_image_is_named_and_not_started(data_dir: &Path) {
    let folder = tempfile::tempdir_in(data_dir.parent().expect("a parent")).expect("a folder");
    let copy = folder.path().join("data");
    copy_images(data_dir, &copy);
    let cli = Cli::new(&copy);
    cli.run(&["image", "verify", "minimal"])
        .await
        .expect_code(0);

    for name in ["rootfs.ext4", "vmlinuz", "initramfs.cpio", "manifest.json"] {
        let path = find(&copy.join("images"), name);
        let (place, was) = flip(&path);
        cli.run(&["image", "verify", "minimal"])
            .await
            .expect_code(1)
            .expect_stderr(&[name]);
        // A server that has to make its template from that must not.
        let listen = free_address().to_string();
        let ran = cli
            .run(&["up", "--once", "--listen", &listen])
            .await
            .expect_code(1);
        ran.expect_stderr(&[name]);
        HostState::read(&copy, None).expect_nothing_alive();
        restore(&path, place, was);
    }
    cli.run(&["image", "verify", "minimal"])
        .await
        .expect_code(0);

    let path = find(&copy.join("images"), "vmlinuz");
    fs::remove_file(&path).expect("removed");
    cli.run(&["image", "verify", "minimal"])
        .await
        .expect_code(1)
        .expect_stderr(&["vmlinuz"]);
}

/// Everything but the cache of packages, which building needs and starting does not.
pub(crate) fn copy_images(from: &Path, to: &Path) {
    fs::create_dir_all(to.join("images")).expect("a folder");
    for entry in fs::read_dir(from.join("images")).expect("images") {
        let entry = entry.expect("an entry");
        if entry.file_name() == "cache" {
            continue;
        }
        let status = Command::new("cp")
            .args(["--archive", "--sparse=always", "--reflink=auto"])
            .arg(entry.path())
            .arg(to.join("images"))
            .status()
            .expect("cp runs");
        assert!(status.success(), "copying {}", entry.path().display());
    }
}

fn find(images: &Path, name: &str) -> PathBuf {
    let named = images.join("names/minimal");
    let target = fs::read_link(&named).map(|target| images.join("names").join(target));
    // A link or a file with the digest in it.
    let image =
        target.unwrap_or_else(|_| images.join(fs::read_to_string(&named).expect("a name").trim()));
    let path = image.join(name);
    assert!(path.is_file(), "{} is not there", path.display());
    path
}

/// Flips one bit in the middle and gives where and what was there.
fn flip(path: &Path) -> (u64, u8) {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .expect("an image's file");
    let place = file.metadata().expect("its size").size() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, place).expect("a byte");
    file.write_all_at(&[byte[0] ^ 1], place)
        .expect("another byte");
    (place, byte[0])
}

fn restore(path: &Path, place: u64, byte: u8) {
    let file = OpenOptions::new()
        .write(true)
        .open(path)
        .expect("an image's file");
    file.write_all_at(&[byte], place)
        .expect("the byte that was there");
}
