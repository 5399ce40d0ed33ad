//! Puts the guest's programs, `wrenn-init` and `envd`, where `src/guest_programs.rs` can
//! include them.
//!
//! They are binaries of this workspace, built before this one (`make build` does it in
//! that order); Cargo cannot express that on stable Rust. Where one is missing an empty
//! file takes its place, so that checking and testing this crate needs no guest build, and
//! whoever asks for the programs at run time is told.

use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

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
        if let Err(error) = place(&source, &out.join(program)) {
            println!("cargo::error=cannot embed {}: {error}", source.display());
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn place(source: &Path, target: &Path) -> io::Result<()> {
    match fs::read(source) {
        Ok(program) => fs::write(target, program),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            println!(
                "cargo::warning={} is not there: this wrenn will not be able to build guest images \
                 (`make build` builds everything in order)",
                source.display()
            );
            fs::write(target, b"")
        }
        Err(error) => Err(error),
    }
}
