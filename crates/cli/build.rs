//! Puts the guest's programs, `wrenn-init` and `envd`, where `src/guest_programs.rs` can
//! include them.
//!
//! They are binaries of this workspace, built before this one (`make build` does it in
//! that order); Cargo cannot express that on stable Rust. Where one is missing an empty
//! file takes its place, so that checking and testing this crate needs no guest build, and
//! whoever asks for the programs at run time is told.
//!
//! Beside each lies its digest, `envd.digest`, so that a server that only compares them with those
//! of its image need not read megabytes of itself at each start and keep them in memory.

use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use sha2::{Digest, Sha256};

/// Names the folder to take the programs from instead of the target folder.
const BIN_DIR: &str = "WRENN_GUEST_BIN_DIR";
const PROGRAMS: [&str; 2] = ["envd", "wrenn-init"];

fn main() -> ExitCode {
    println!("cargo::rerun-if-env-changed={BIN_DIR}");
    println!("cargo::rerun-if-changed=build.rs");
    let Some(out) = env::var_os("OUT_DIR").map(PathBuf::from) else {
        println!("cargo::error=OUT_DIR is not set: run this through cargo");
        return ExitCode::FAILURE;
    };
    // `OUT_DIR` is {profile folder}/build/wrenn-{hash}/out, wherever CARGO_TARGET_DIR is.
    let from = env::var_os(BIN_DIR)
        .map(PathBuf::from)
        .or_else(|| out.ancestors().nth(3).map(Path::to_path_buf));
    let Some(from) = from else {
        println!(
            "cargo::error={} is not inside a target folder: set {BIN_DIR}",
            out.display()
        );
        return ExitCode::FAILURE;
    };
    for program in PROGRAMS {
        let source = from.join(program);
        println!("cargo::rerun-if-changed={}", source.display());
        if let Err(error) = place(&source, &out, program) {
            println!("cargo::error=cannot embed {}: {error}", source.display());
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn place(source: &Path, out: &Path, program: &str) -> io::Result<()> {
    let bytes = read(source)?;
    let digest = Sha256::digest(&bytes);
    let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    fs::write(out.join(program), bytes)?;
    fs::write(
        out.join(format!("{program}.digest")),
        format!("sha256-{digest}"),
    )
}

/// A program; empty where it is not there.
fn read(source: &Path) -> io::Result<Vec<u8>> {
    match fs::read(source) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            println!(
                "cargo::warning={} is not there: this wrenn will not be able to build guest images \
                 (`make build` builds everything in order)",
                source.display()
            );
            Ok(Vec::new())
        }
        read => read,
    }
}
