//! Where things are: found from the test program itself, so that any target folder works.

use std::env;
use std::path::{Path, PathBuf};

/// Root of the repository.
pub fn repository() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// The folder that cargo puts binaries into, `target/{triple}/release`.
fn binaries() -> PathBuf {
    let this = env::current_exe().expect("the path of this program");
    // {binaries}/deps/e2e-{hash}
    this.ancestors()
        .nth(2)
        .expect("a test program lies in target/…/deps")
        .to_owned()
}

/// The `wrenn` under test: `WRENN_BIN`, else the one built beside this program.
pub fn wrenn_binary() -> PathBuf {
    let binary = env::var_os("WRENN_BIN").map_or_else(|| binaries().join("wrenn"), PathBuf::from);
    assert!(
        binary.is_file(),
        "{} is not there: `make build` makes it",
        binary.display()
    );
    binary
}

/// Where the tests keep images and data folders from one run to the next:
/// `target/e2e-data`.
pub fn data_root() -> PathBuf {
    let target = binaries()
        .ancestors()
        .nth(2)
        .expect("binaries lie in target/{triple}/release")
        .to_owned();
    target.join("e2e-data")
}
