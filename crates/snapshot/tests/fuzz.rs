//! Files of snapshots in nonsense forms: their fuzz targets as ordinary tests. See
//! fuzz/runner.rs.
#![allow(clippy::unwrap_used)]

#[path = "../../../fuzz/properties/generation.rs"]
mod generation;
#[path = "../../../fuzz/properties/index.rs"]
mod index;
#[path = "../../../fuzz/properties/manifest.rs"]
mod manifest;
#[path = "../../../fuzz/runner.rs"]
mod runner;

use runner::run;

#[test]
fn g16_fuzz_generation() {
    run("generation", generation::check);
}

#[test]
fn g16_fuzz_index() {
    run("index", index::check);
}

#[test]
fn g16_fuzz_manifest() {
    run("manifest", manifest::check);
}
