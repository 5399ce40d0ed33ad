use std::fs;

use serde_json::json;
use wrenn_image::{Digest, FileEntry, InputLock, LockedPackage, Manifest};
use wrenn_snapshot::{Description, Import, Origin, SnapshotId, Vmm};
use wrenn_types::{SandboxId, Shape};

use super::*;
use crate::lifetime::Lifetime;
use crate::machine::Record;
use crate::sandbox::{CreateSandbox, NetworkRules};

/// A data folder with images and what needs them.
struct Ground {
    _dir: tempfile::TempDir,
    config: HostConfig,
    images: ImageStore,
}

impl Ground {
    fn new() -> Ground {
        let dir = tempfile::tempdir().unwrap();
        let config = HostConfig::new(dir.path().to_owned(), HostId::new(), "wrenn".into());
        for made in [
            config.templates_dir(),
            config.machines_dir(),
            config.paused_dir(),
        ] {
            fs::create_dir_all(made).unwrap();
        }
        fs::create_dir_all(config.snapshots_dir()).unwrap();
        let images = ImageStore::open(config.images_dir()).unwrap();
        Ground {
            _dir: dir,
            config,
            images,
        }
    }

    /// An image with small files; its digest.
    fn image(&self, seed: &str, name: Option<&str>) -> String {
        let package = LockedPackage {
            name: "base".into(),
            version: "1".into(),
            architecture: "amd64".into(),
            size: 1,
            sha256: Digest::of(seed.as_bytes()),
        };
        let lock = InputLock {
            recipe: Digest::of(b"recipe"),
            packages: vec![package.clone()],
            kernel: package,
            init: Digest::of(b"init"),
            envd: Digest::of(b"envd"),
        };
        let files = ["rootfs.ext4", "vmlinuz", "vmlinux", "initramfs.cpio"];
        let folder = self.config.images_dir().join(lock.digest().to_string());
        fs::create_dir(&folder).unwrap();
        let mut manifest = Manifest {
            format: 1,
            digest: lock.digest(),
            created: 1,
            suite: "bookworm".into(),
            kernel_release: "6.1".into(),
            lock,
            files: Default::default(),
        };
        for file in files {
            fs::write(folder.join(file), file).unwrap();
            let entry = FileEntry {
                size: file.len() as u64,
                sha256: Digest::of(file.as_bytes()),
            };
            manifest.files.insert(file.into(), entry);
        }
        fs::write(folder.join("manifest.json"), manifest.to_bytes().unwrap()).unwrap();
        let digest = manifest.digest.to_string();
        if let Some(name) = name {
            let link = self.config.images_dir().join("names").join(name);
            std::os::unix::fs::symlink(format!("../{digest}"), link).unwrap();
        }
        digest
    }

    /// A template of that image; its digest.
    fn template(&self, seed: &str, image: &str) -> String {
        let digest = format!("sha256:{}", &Digest::of(seed.as_bytes()).to_string()[7..]);
        let folder = self.config.templates_dir().join(digest.replace(':', "-"));
        fs::create_dir(&folder).unwrap();
        let manifest = json!({"version": 1, "image": image, "of": "another version"});
        fs::write(folder.join("manifest.json"), manifest.to_string()).unwrap();
        fs::write(folder.join("memory"), "memory").unwrap();
        digest
    }

    fn record(template: &str) -> Record {
        let record = json!({"version": 1, "slot": 1, "template_digest": template,
            "shape": Shape::DEFAULT, "disk_mib": 1, "envd_version": "1", "generation": 1,
            "host_token": "00"});
        serde_json::from_value(record).unwrap()
    }

    fn machine(&self, name: &str, template: &str) {
        let folder = self.config.machines_dir().join(name);
        fs::create_dir(&folder).unwrap();
        let record = serde_json::to_vec(&Ground::record(template)).unwrap();
        fs::write(folder.join("record.json"), record).unwrap();
    }

    fn paused(&self, template: &str) {
        let create = CreateSandbox {
            id: SandboxId::new(),
            template: "minimal".into(),
            snapshot: None,
            shape: None,
            envs: Default::default(),
            lifetime: Lifetime::default(),
            network: NetworkRules::default(),
            secure: false,
            pause_at_end: false,
            pause_disk_only: false,
            auto_resume: false,
        };
        let journal = Journal::new(&create, None);
        let record = Ground::record(template);
        let paused = Paused::of(&record, &journal, SnapshotId([7; 32]), None);
        paused.write(&self.config.paused_dir()).unwrap();
    }

    fn snapshot(&self, template: &str, image: &str) {
        let store = Store::open(&self.config.snapshots_dir()).unwrap();
        let disk = self.config.data_dir.join("layer");
        fs::write(&disk, image).unwrap();
        let mut draft = store.draft(&[]).unwrap();
        draft.disk_layer(&disk, "qcow2", Import::Copy).unwrap();
        let description = Description {
            created_unix_ms: 1,
            shape: Shape::DEFAULT,
            origin: Origin {
                template: Some(template.into()),
                image: image.into(),
                kernel: String::new(),
                envd_version: "1".into(),
            },
            vmm: Vmm {
                driver: "qemu".into(),
                version: "1".into(),
                fingerprint: json!({}),
            },
            labels: Default::default(),
        };
        draft.commit(description).unwrap();
    }

    fn left(&self) -> (usize, usize) {
        let count = |dir: PathBuf| {
            let names = fs::read_dir(dir).unwrap();
            names
                .filter(|one| {
                    one.as_ref()
                        .unwrap()
                        .file_name()
                        .to_string_lossy()
                        .starts_with("sha256-")
                })
                .count()
        };
        (
            count(self.config.images_dir()),
            count(self.config.templates_dir()),
        )
    }
}

#[test]
fn g18_only_what_nothing_needs_is_pruned() {
    let ground = Ground::new();
    let named = ground.image("named", Some("minimal"));
    ground.template("of named", &named);
    let old: Vec<_> = ["machine", "paused", "snapshot", "nobody"]
        .map(|who| (who, ground.image(who, None)))
        .into_iter()
        .map(|(who, image)| (ground.template(who, &image), image))
        .collect();
    let bare = ground.image("bare", None);
    ground.machine("m-1", &old[0].0);
    ground.paused(&old[1].0);
    ground.snapshot(&old[2].0, &old[2].1);
    // Half made, and of nobody.
    fs::create_dir(ground.config.machines_dir().join("m-2")).unwrap();
    // A second template of an image that is needed for another.
    ground.template("second", &old[0].1);

    let uses = image_uses(&ground.config.data_dir).unwrap();
    let counts = |image: &str| {
        uses.get(image)
            .map(|u| (u.templates, u.snapshots, u.sandboxes))
    };
    assert_eq!(counts(&named), Some((1, 0, 0)));
    // That machine has no journal: it waits in the pool.
    assert_eq!(counts(&old[0].1), Some((2, 0, 0)));
    assert_eq!(counts(&old[1].1), Some((1, 0, 1)));
    assert_eq!(counts(&old[2].1), Some((1, 1, 0)));
    assert_eq!(counts(&bare), None);

    assert_eq!(ground.left(), (6, 6));
    let would = prune(&ground.config, &ground.images, true).unwrap();
    assert_eq!(ground.left(), (6, 6), "a rehearsal changes nothing");
    let done = prune(&ground.config, &ground.images, false).unwrap();
    assert_eq!(
        (&would.images, &would.templates),
        (&done.images, &done.templates)
    );
    let removed: Vec<_> = done.images.keys().collect();
    let mut expected = [&old[3].1, &bare];
    expected.sort();
    assert_eq!(removed, expected);
    assert_eq!(done.templates.len(), 2, "of nobody, and the second");
    assert_eq!(ground.left(), (4, 4));
    let again = prune(&ground.config, &ground.images, false).unwrap();
    assert!(again.images.is_empty() && again.templates.is_empty());
}

#[test]
fn g18_what_cannot_be_read_may_need_anything() {
    for (dir, name) in [
        ("machines/m-1", "record.json"),
        ("paused", "sb-1.json"),
        ("templates/sha256-00", "manifest.json"),
        ("snapshots/snapshots/00", "manifest"),
    ] {
        let ground = Ground::new();
        ground.image("old", None);
        Store::open(&ground.config.snapshots_dir()).unwrap();
        let dir = ground.config.data_dir.join(match dir {
            "snapshots/snapshots/00" => format!("snapshots/snapshots/{}", "00".repeat(32)),
            other => other.to_owned(),
        });
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(name), "{").unwrap();
        let refused = prune(&ground.config, &ground.images, false);
        assert!(refused.is_err(), "{} was passed over", dir.display());
        assert_eq!(ground.left().0, 1);
    }
}

#[test]
fn a_template_that_was_being_removed_is_removed_at_last() {
    let ground = Ground::new();
    let half = ground.config.templates_dir().join(".removed-sha256-00");
    fs::create_dir(&half).unwrap();
    fs::write(half.join("memory"), "x").unwrap();
    prune(&ground.config, &ground.images, false).unwrap();
    assert!(!half.exists());
}
