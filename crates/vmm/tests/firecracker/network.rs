//! Network card, metadata, and the devices that not every machine has. The guest has no
//! drivers, so these tests show that Firecracker has the devices, in the right place, and not
//! what a guest does with them.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use wrenn_vmm::{BootSpec, Machine, MemoryFile, Vmm, VmmError};

use crate::bed::{Bed, SHAPE, raw, rounds_of};

#[path = "../tap/mod.rs"]
mod tap;

/// A network namespace with a tap that stays; goes with this.
struct Network {
    name: String,
    tap: &'static str,
}

fn ip(args: &[&str]) -> String {
    let output = Command::new("ip").args(args).output().unwrap();
    assert!(output.status.success(), "ip {args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

impl Network {
    fn new(label: &str, tap: &'static str) -> Network {
        let name = format!("fctest-{}-{label}", std::process::id());
        ip(&["netns", "add", &name]);
        let network = Network { name, tap };
        ip(&[
            "-n",
            &network.name,
            "tuntap",
            "add",
            "name",
            tap,
            "mode",
            "tap",
        ]);
        ip(&["-n", &network.name, "link", "set", tap, "up"]);
        network
    }

    /// The tap as a slot hands it out.
    fn open(&self) -> OwnedFd {
        let namespace = File::open(self.path()).unwrap();
        let name = self.tap;
        // A thread of its own, since it does not come back.
        let opening = std::thread::spawn(move || {
            let kind = Some(LinkNameSpaceType::Network);
            move_into_link_name_space(namespace.as_fd(), kind).unwrap();
            tap::attach(name)
        });
        opening.join().unwrap()
    }

    fn path(&self) -> String {
        format!("/run/netns/{}", self.name)
    }

    /// Whether somebody has the tap open.
    fn in_use(&self) -> bool {
        ip(&["-n", &self.name, "link", "show", self.tap]).contains("LOWER_UP")
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        ip(&["netns", "del", &self.name]);
    }
}

/// Asks Firecracker something behind the driver's back.
async fn ask(dir: &Path, path: &str) -> serde_json::Value {
    let socket = dir.join("jail/run/api.sock");
    let output = tokio::process::Command::new("curl")
        .arg("--silent")
        .arg("--unix-socket")
        .arg(socket)
        .arg(format!("http://localhost{path}"))
        .output()
        .await
        .unwrap();
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

fn identity(page: &mut [u8], id: &str) {
    let json = serde_json::json!({ "restoreID": id, "envID": "test" }).to_string();
    page.fill(0);
    page[..json.len()].copy_from_slice(json.as_bytes());
}

async fn released(network: &Network) {
    let began = Instant::now();
    while network.in_use() {
        assert!(
            began.elapsed() < Duration::from_secs(5),
            "the tap stays open"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn g20_a_machine_comes_back_on_another_tap_with_its_own_identity() {
    let Some(bed) = Bed::new() else { return };
    let first = Network::new("one", "tap0");
    let mut machine = bed.spec(&bed.folder("template"), 10_280);
    machine.tap = Some(first.open());
    identity(&mut machine.identity[..], "first");
    let dir = machine.dir.clone();
    let memory = Arc::new(MemoryFile::create(SHAPE.memory.bytes()).unwrap());
    let spec = BootSpec {
        machine,
        memory: memory.clone(),
    };
    let machine = bed.vmm.boot(spec).await.unwrap();
    rounds_of(&machine, 2).await;
    assert!(first.in_use());
    // It runs in the tap's namespace, its keeper does not.
    let namespace = |of: &str| std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(of).unwrap());
    let inside = format!("/proc/{}/ns/net", machine.pids().vmm.pid);
    assert_eq!(namespace(&inside), namespace(&first.path()));
    let keeper = format!("/proc/{}/ns/net", machine.pids().keeper.pid);
    assert_eq!(namespace(&keeper), namespace("/proc/self/ns/net"));
    assert_eq!(ask(&dir, "/mmds").await["restoreID"], "first");
    let config = ask(&dir, "/vm/config").await;
    assert_eq!(config["mmds-config"]["version"], "V2", "{config}");
    // G35: not where programs look for the metadata of a cloud.
    assert_eq!(config["mmds-config"]["ipv4_address"], "169.254.87.1");
    let interface = &config["network-interfaces"][0];
    assert_eq!(interface["guest_mac"], "02:fc:00:00:00:05");
    assert_eq!(config["machine-config"]["track_dirty_pages"], true);
    assert!(config["entropy"].is_object(), "{config}");
    let state = bed.path().join("state");
    machine
        .save_state(File::create(&state).unwrap())
        .await
        .unwrap();
    machine.kill().await.unwrap();
    released(&first).await;

    let second = Network::new("two", "othertap7");
    let mut clone = bed.spec(&bed.folder("clone"), 10_281);
    clone.tap = Some(second.open());
    clone.disk.layers = vec![raw(bed.path().join("template/disk.raw"))];
    identity(&mut clone.identity[..], "second");
    let dir = clone.dir.clone();
    let spec = wrenn_vmm::RestoreSpec {
        machine: clone,
        memory: Arc::new(memory.seal().unwrap()),
        state: File::open(&state).unwrap(),
    };
    let machine = bed.vmm.restore(spec).await.unwrap();
    assert!(second.in_use() && !first.in_use());
    assert_eq!(ask(&dir, "/mmds").await["restoreID"], "second");
    machine.resume().await.unwrap();
    rounds_of(&machine, 3).await;
    machine.kill().await.unwrap();
    released(&second).await;
}

#[tokio::test]
async fn balloon_and_vsock_are_there_where_they_are_wanted() {
    let Some(bed) = Bed::with(|config| {
        config.devices.balloon = true;
        config.devices.vsock = true;
    }) else {
        return;
    };
    let template = bed.template("template", 10_282, 2).await;
    for name in ["one", "two"] {
        let spec = template.clone_spec(&bed, name, 10_283);
        let dir = spec.machine.dir.clone();
        let machine = bed.vmm.restore(spec).await.unwrap();
        machine.resume().await.unwrap();
        let machine = bed.vmm.adopt_machine(&dir).await.unwrap().unwrap();
        // Each has a socket of its own, though the state names it.
        let socket = machine.vsock_path();
        assert!(socket.starts_with(&dir));
        assert!(socket.metadata().unwrap().file_type().is_socket());
        let config = ask(&dir, "/vm/config").await;
        assert_eq!(config["balloon"]["amount_mib"], 0, "{config}");
        assert_eq!(config["vsock"]["guest_cid"], 3, "{config}");
        // A guest that does not know of its balloon gives nothing, and that is an error.
        let error = machine.set_balloon(8).await.unwrap_err();
        assert!(matches!(error, VmmError::Api { .. }), "{error:?}");
        machine.kill().await.unwrap();
    }
}

#[tokio::test]
async fn a_tap_that_would_vanish_is_refused() {
    let Some(bed) = Bed::new() else { return };
    let mut machine = bed.spec(&bed.folder("machine"), 10_285);
    machine.tap = Some(tap::open("brief0"));
    let memory = Arc::new(MemoryFile::create(SHAPE.memory.bytes()).unwrap());
    let error = bed
        .vmm
        .boot(BootSpec { machine, memory })
        .await
        .err()
        .unwrap();
    assert!(error.to_string().contains("TUNSETPERSIST"), "{error}");
}

#[tokio::test]
async fn an_identity_that_is_no_json_is_refused() {
    let Some(bed) = Bed::new() else { return };
    let network = Network::new("bad", "tap0");
    let mut machine = bed.spec(&bed.folder("machine"), 10_284);
    machine.tap = Some(network.open());
    machine.identity[..4].copy_from_slice(b"text");
    let memory = Arc::new(MemoryFile::create(SHAPE.memory.bytes()).unwrap());
    let error = bed
        .vmm
        .boot(BootSpec { machine, memory })
        .await
        .err()
        .unwrap();
    assert!(error.to_string().contains("JSON"), "{error}");
    released(&network).await;
}
