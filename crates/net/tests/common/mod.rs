//! What the tests share: a configuration per test, and a look at the host's objects.
#![allow(dead_code)]

use std::process::Command;

use wrenn_net::NetConfig;

/// A test's own name prefix, subnet and folder.
pub struct Bed {
    prefix: &'static str,
    subnet: u8,
    folder: tempfile::TempDir,
}

impl Bed {
    /// Each test has its own prefix and a subnet 10.`240 + subnet`.0.0/24 … so that tests run side by side.
    pub fn new(prefix: &'static str, subnet: u8) -> Self {
        Self { prefix, subnet, folder: tempfile::tempdir().unwrap() }
    }

    pub fn config(&self) -> NetConfig {
        let mut config = NetConfig::new(self.folder.path());
        config.name_prefix = self.prefix.to_owned();
        config.subnet = format!("10.251.{}.0/24", self.subnet).parse().unwrap();
        config.max_slots = 60;
        config.ready = 2;
        config
    }
}

/// Runs a program and returns what it printed; panics if it fails.
pub fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Everything on the host that carries a prefix: namespaces, links, tables, mounts.
pub fn host_objects(prefix: &str) -> Vec<String> {
    let lists = [
        run("ip", &["netns", "list"]),
        run("ip", &["-o", "link"]),
        run("nft", &["list", "tables"]),
        std::fs::read_to_string("/proc/self/mounts").unwrap(),
    ];
    lists
        .iter()
        .flat_map(|list| list.lines())
        .filter(|line| line.contains(&format!("{prefix}-")) || line.ends_with(&format!(" {prefix}")))
        .map(str::to_owned)
        .collect()
}
