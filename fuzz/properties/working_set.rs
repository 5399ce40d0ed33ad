//! Recorded working sets: what passes has every page once, and has one spelling.

use std::collections::BTreeSet;

use wrenn_memory::WorkingSet;
use wrenn_snapshot::Digest;

/// Bytes before the digests, which are of everything behind them and before them.
const FIELDS: usize = 32;

/// A working set's file without its two digests, which are put in.
pub fn check(data: &[u8]) {
    let _ = WorkingSet::parse(data);
    let Some((fields, body)) = data.split_at_checked(FIELDS) else {
        return;
    };
    let mut bytes = [fields, &Digest::of(body).0].concat();
    let header = Digest::of(&bytes);
    bytes.extend_from_slice(&header.0);
    bytes.extend_from_slice(body);
    let Ok(set) = WorkingSet::parse(&bytes) else {
        return;
    };
    assert_eq!(set.to_bytes(), bytes, "another spelling");
    assert!(set.len() <= set.memory_pages());
    // What is done to each page, or kept for each, takes too long for a large memory.
    if set.memory_pages() > 1 << 20 || set.len() > 10_000 {
        return;
    }
    let mut seen = BTreeSet::new();
    for run in set.runs() {
        assert!(run.count > 0 && run.end() <= set.memory_pages());
        for page in run.first..run.end() {
            assert!(seen.insert(page), "page {page} twice");
        }
    }
    // Recorded again in the same order it is the same set, in perhaps fewer runs.
    let order = set.runs().iter().flat_map(|run| run.first..run.end());
    assert_eq!(WorkingSet::new(set.memory_pages(), order).len(), set.len());
}
