//! Manifests of snapshots: what passes means the same after it was written again.

use wrenn_snapshot::{Digest, Fault, Manifest, SnapshotId};

fn parse(bytes: &[u8]) -> Result<Manifest, Fault> {
    Manifest::parse(bytes, SnapshotId(Digest::of(bytes).0))
}

/// Whether there is a number in it that text may not hold exactly.
fn has_fraction(value: &serde_json::Value) -> bool {
    use serde_json::Value::{Array, Bool, Null, Number, Object, String};
    match value {
        Null | Bool(_) | String(_) => false,
        Number(number) => number.is_f64(),
        Array(values) => values.iter().any(has_fraction),
        Object(values) => values.values().any(has_fraction),
    }
}

/// The JSON of a manifest, which gets a right first line.
pub fn check(data: &[u8]) {
    // As it is: the first line has to be found out, which is another question.
    let _ = parse(data);
    let head = format!("wrenn-snapshot 1 {} {}\n", data.len(), Digest::of(data));
    let sealed = [head.as_bytes(), data].concat();
    let other = SnapshotId([0; 32]);
    assert!(Manifest::parse(&sealed, other).is_err(), "another's name");
    let Ok(manifest) = parse(&sealed) else {
        return;
    };
    for part in manifest.machine.iter().flat_map(|m| m.parts.keys()) {
        let name = part.to_string();
        assert!(!name.contains('/') && !name.starts_with('.'), "{name}");
    }
    assert!(manifest.objects().count() <= data.len() / 64);
    // Only what is nested deeply can become too long by being written out.
    let Ok((bytes, id)) = manifest.to_bytes() else {
        return;
    };
    let again = Manifest::parse(&bytes, id).expect("what was written is read");
    if !has_fraction(&manifest.description.vmm.fingerprint) {
        assert_eq!(again, manifest);
        assert_eq!(
            again.to_bytes().expect("it was written before"),
            (bytes, id)
        );
    }
}
