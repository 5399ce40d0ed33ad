//! A monitor's description of its memory: however it arrives, what passes has each page at
//! one address.

use std::collections::BTreeSet;

use wrenn_memory::{Regions, message_is_whole};
use wrenn_snapshot::PAGE;

/// The number of pages, and the message.
pub fn check(data: &[u8]) {
    let Some((pages, message)) = data.split_first() else {
        return;
    };
    let pages = u64::from(*pages);
    let found = Regions::parse(message, pages);
    if found.is_ok() {
        assert!(matches!(message_is_whole(message), Ok(true)));
        // Of a message that is right in the end no beginning may be called wrong, or whole.
        let text = message.trim_ascii_end();
        for length in 0..text.len() {
            assert!(
                matches!(message_is_whole(&text[..length]), Ok(false)),
                "{length}"
            );
        }
    }
    let Ok(regions) = found else {
        return;
    };
    let mut seen = BTreeSet::new();
    for page in 0..pages {
        let (address, count) = regions.address_of(page, pages).expect("it is somewhere");
        assert!((1..=pages - page).contains(&count));
        assert_eq!(address % PAGE as u64, 0);
        assert_eq!(regions.page_at(address), Some(page));
        assert_eq!(regions.page_at(address + PAGE as u64 - 1), Some(page));
        assert!(seen.insert(address), "two pages at {address:#x}");
        let around: Vec<_> = regions.pages_in(address..address + 1).collect();
        assert_eq!(
            (around.len(), around[0].first, around[0].count),
            (1, page, 1)
        );
    }
    assert_eq!(regions.address_of(pages, 1), None);
    let all: u64 = regions.pages_in(0..u64::MAX).map(|range| range.count).sum();
    assert_eq!(all, pages);
}
