//! Maps of memories: what passes covers every page once, and has one spelling.

use wrenn_snapshot::{Digest, PageMap, PageRange, Source};

/// Bytes before the digests, which are of everything behind them and before them.
const FIELDS: usize = 72;

/// A `memory.index` without its two digests, which are put in.
pub fn check(data: &[u8]) {
    let _ = PageMap::parse(data);
    let Some((fields, body)) = data.split_at_checked(FIELDS) else {
        return;
    };
    let mut bytes = [fields, &Digest::of(body).0].concat();
    let header = Digest::of(&bytes);
    bytes.extend_from_slice(&header.0);
    bytes.extend_from_slice(body);
    let Ok(map) = PageMap::parse(&bytes) else {
        return;
    };
    assert_eq!(map.to_bytes(), bytes, "another spelling");
    let counts = map.counts();
    let sum = counts.inherited + counts.zero + counts.data;
    assert_eq!(sum, map.pages());
    let mut next = 0;
    for extent in map.extents() {
        assert_eq!(extent.range.first, next);
        next = extent.range.end();
        let last = PageRange {
            first: next - 1,
            count: 1,
        };
        for found in [map.lookup(next - 1), map.within(last).next()] {
            let found = found.expect("a page of the memory");
            assert_eq!(found.range, last);
            if let Source::Data { generation, page } = found.source {
                let generation = map.generations()[generation as usize];
                assert!(page < generation.pages, "behind the end of a generation");
            }
        }
    }
    assert_eq!(next, map.pages());
    assert_eq!(map.lookup(next), None);
    assert!(map.live_pages().iter().all(|live| *live > 0));
}
