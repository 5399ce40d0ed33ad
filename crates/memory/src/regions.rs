//! Where a machine's pages are in its monitor's address space.

use std::ops::Range;

use serde::Deserialize;
use wrenn_snapshot::{PAGE, PageRange};

/// More regions than any machine has: x86-64 guests have two or three, hot-plugged memory
/// some more.
const MAX_REGIONS: usize = 256;

/// A region as Firecracker describes it. Fields that this version does not know are none of
/// its business.
#[derive(Debug, Clone, Deserialize)]
struct Described {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: Option<u64>,
    /// What the field above was called first. Released versions put bytes in it, whatever
    /// its name says.
    page_size_kib: Option<u64>,
}

/// What is wrong with a description of memory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegionError {
    /// It is not the JSON it should be.
    #[error("it is not a list of regions: {0}")]
    Json(String),
    /// Nothing, or far too much.
    #[error("it has {0} regions, not 1 to {MAX_REGIONS}")]
    Count(usize),
    /// Huge pages.
    #[error(
        "region {index} has pages of {bytes} bytes, and only pages of {PAGE} bytes are served: start the machine without huge pages"
    )]
    PageSize {
        /// Position in the list.
        index: usize,
        /// The size it has.
        bytes: u64,
    },
    /// Numbers that cannot be.
    #[error("region {index} {problem}")]
    Region {
        /// Position in the list.
        index: usize,
        /// What is wrong.
        problem: String,
    },
    /// Pages of the machine that are in no region.
    #[error("the regions have {described} pages, and the snapshot {expected}")]
    Coverage {
        /// Pages of all regions.
        described: u64,
        /// Pages of the snapshot.
        expected: u64,
    },
}

/// Consecutive pages at consecutive addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Region {
    address: u64,
    pages: PageRange,
}

impl Region {
    fn bytes(&self) -> u64 {
        self.pages.count * PAGE as u64
    }

    fn addresses(&self) -> Range<u64> {
        self.address..self.address + self.bytes()
    }
}

/// All of a machine's memory: each of its pages at one address, no address for two pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Regions {
    by_page: Vec<Region>,
    by_address: Vec<Region>,
}

impl Regions {
    /// Reads a monitor's description of a memory of `pages` pages, believing nothing in it.
    pub fn parse(json: &[u8], pages: u64) -> Result<Regions, RegionError> {
        let described: Vec<Described> =
            serde_json::from_slice(json).map_err(|error| RegionError::Json(error.to_string()))?;
        if described.is_empty() || described.len() > MAX_REGIONS {
            return Err(RegionError::Count(described.len()));
        }
        let mut by_page = Vec::with_capacity(described.len());
        for (index, region) in described.iter().enumerate() {
            by_page.push((index, region.check(index, pages)?));
        }
        let mut by_address = by_page.clone();
        by_page.sort_by_key(|(_, region)| region.pages.first);
        by_address.sort_by_key(|(_, region)| region.address);
        let overlap = |index, what| {
            Err(RegionError::Region {
                index,
                problem: format!("overlaps the {what} of another"),
            })
        };
        for pair in by_page.windows(2) {
            if pair[0].1.pages.end() > pair[1].1.pages.first {
                return overlap(pair[1].0, "part of the memory");
            }
        }
        for pair in by_address.windows(2) {
            if pair[0].1.addresses().end > pair[1].1.address {
                return overlap(pair[1].0, "addresses");
            }
        }
        // They lie inside the memory and do not overlap: if the sum is right, nothing is
        // missing.
        let sum = by_page.iter().map(|(_, region)| region.pages.count).sum();
        if sum != pages {
            return Err(RegionError::Coverage {
                described: sum,
                expected: pages,
            });
        }
        let bare = |list: Vec<(usize, Region)>| list.into_iter().map(|(_, r)| r).collect();
        Ok(Regions {
            by_page: bare(by_page),
            by_address: bare(by_address),
        })
    }

    /// The page at an address.
    pub fn page_at(&self, address: u64) -> Option<u64> {
        let behind = self
            .by_address
            .partition_point(|region| region.address <= address);
        let region = self.by_address.get(behind.checked_sub(1)?)?;
        let offset = address - region.address;
        (offset < region.bytes()).then(|| region.pages.first + offset / PAGE as u64)
    }

    /// The address of page `first`, and how many of the `count` pages from it on follow there.
    pub fn address_of(&self, first: u64, count: u64) -> Option<(u64, u64)> {
        let behind = self
            .by_page
            .partition_point(|region| region.pages.first <= first);
        let region = self.by_page.get(behind.checked_sub(1)?)?;
        if first >= region.pages.end() {
            return None;
        }
        let address = region.address + (first - region.pages.first) * PAGE as u64;
        Some((address, count.min(region.pages.end() - first)))
    }

    /// The pages that lie, wholly or in part, in a range of addresses.
    pub fn pages_in(&self, addresses: Range<u64>) -> impl Iterator<Item = PageRange> + '_ {
        self.by_address.iter().filter_map(move |region| {
            let own = region.addresses();
            let start = own.start.max(addresses.start) - own.start;
            let end = own.end.min(addresses.end).checked_sub(own.start)?;
            let first = start / PAGE as u64;
            let count = end.div_ceil(PAGE as u64).checked_sub(first)?;
            (start < end).then_some(PageRange {
                first: region.pages.first + first,
                count,
            })
        })
    }
}

impl Described {
    /// The region, if it is one of a memory of `pages` pages.
    fn check(&self, index: usize, pages: u64) -> Result<Region, RegionError> {
        let page = PAGE as u64;
        let wrong = |problem: String| Err(RegionError::Region { index, problem });
        let old = match self.page_size_kib {
            Some(4) => Some(page),
            other => other,
        };
        for bytes in [self.page_size, old].into_iter().flatten() {
            if bytes != page {
                return Err(RegionError::PageSize { index, bytes });
            }
        }
        let numbers = [self.base_host_virt_addr, self.size, self.offset];
        if numbers.iter().any(|number| !number.is_multiple_of(page)) {
            return wrong("is not whole pages".into());
        }
        if self.size == 0 {
            return wrong("is empty".into());
        }
        if self.base_host_virt_addr == 0
            || self.base_host_virt_addr.checked_add(self.size).is_none()
        {
            return wrong(format!(
                "of {:#x} bytes cannot be at address {:#x}",
                self.size, self.base_host_virt_addr
            ));
        }
        let range = PageRange {
            first: self.offset / page,
            count: self.size / page,
        };
        // Both are at most 2^52, so the sum does not overflow.
        if range.end() > pages {
            return wrong(format!(
                "ends with page {}, outside the snapshot's {pages} pages",
                range.end()
            ));
        }
        Ok(Region {
            address: self.base_host_virt_addr,
            pages: range,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn region(address: u64, size: u64, offset: u64) -> String {
        format!(
            r#"{{"base_host_virt_addr":{address},"size":{size},"offset":{offset},"page_size":4096}}"#
        )
    }

    fn parse(regions: &[String], pages: u64) -> Result<Regions, RegionError> {
        Regions::parse(format!("[{}]", regions.join(",")).as_bytes(), pages)
    }

    const KIB4: u64 = PAGE as u64;

    #[test]
    fn two_regions_in_any_order_are_found_by_page_and_address() {
        let low = region(0x7f00_0010_0000, 3 * KIB4, 0);
        let high = region(0x7f00_0000_0000, 5 * KIB4, 3 * KIB4);
        let found = parse(&[high.clone(), low.clone()], 8).unwrap();
        assert_eq!(parse(&[low, high], 8).unwrap(), found);
        assert_eq!(found.page_at(0x7f00_0010_0000), Some(0));
        assert_eq!(found.page_at(0x7f00_0000_0000 + KIB4 + 5), Some(4));
        assert_eq!(found.page_at(0x7f00_0000_5000), None);
        assert_eq!(found.page_at(0x7eff_ffff_ffff), None);
        assert_eq!(found.page_at(u64::MAX), None);
        assert_eq!(found.address_of(2, 9), Some((0x7f00_0010_2000, 1)));
        assert_eq!(found.address_of(7, 9), Some((0x7f00_0000_4000, 1)));
        assert_eq!(found.address_of(8, 1), None);
        let pages: Vec<_> = found.pages_in(0x7f00_0000_1001..0x7f00_0010_1001).collect();
        let range = |first, count| PageRange { first, count };
        assert_eq!(pages, [range(4, 4), range(0, 2)]);
        assert_eq!(found.pages_in(5..5).count(), 0);
        assert_eq!(found.pages_in(0..u64::MAX).count(), 2);
    }

    #[test]
    fn old_names_of_the_page_size_are_known_and_huge_pages_refused() {
        let with = |field: &str| {
            let json = format!(r#"[{{"base_host_virt_addr":4096,"size":4096,"offset":0{field}}}]"#);
            Regions::parse(json.as_bytes(), 1)
        };
        for fine in [
            "",
            r#","page_size":4096"#,
            r#","page_size_kib":4"#,
            r#","page_size_kib":4096,"page_size":4096"#,
            r#","page_size":null,"new_field":[1]"#,
        ] {
            assert!(with(fine).is_ok(), "{fine}");
        }
        for huge in [
            r#","page_size":2097152"#,
            r#","page_size_kib":2048"#,
            r#","page_size_kib":2097152"#,
            r#","page_size":4096,"page_size_kib":2097152"#,
        ] {
            assert!(
                matches!(with(huge), Err(RegionError::PageSize { .. })),
                "{huge}"
            );
        }
    }

    #[test]
    fn whatever_does_not_cover_the_memory_once_is_refused() {
        let at = 0x10_0000;
        let max = u64::MAX - (KIB4 - 1);
        let bad: &[&[String]] = &[
            &[],
            &[region(at, 7 * KIB4, 0)],
            &[region(at, 9 * KIB4, 0)],
            &[region(at, 8 * KIB4, KIB4)],
            &[region(at + 1, 8 * KIB4, 0)],
            &[region(at, 8 * KIB4 - 1, 0)],
            &[region(at, 0, 0), region(at, 8 * KIB4, 0)],
            &[region(0, 8 * KIB4, 0)],
            &[region(max, 8 * KIB4, 0)],
            &[region(at, max, 0)],
            &[region(at, max, max)],
            &[
                region(at, 4 * KIB4, 0),
                region(at + 8 * KIB4, 5 * KIB4, 3 * KIB4),
            ],
            &[
                region(at, 4 * KIB4, 0),
                region(at + 3 * KIB4, 4 * KIB4, 4 * KIB4),
            ],
            &[region(at, 4 * KIB4, 0), region(at, 4 * KIB4, 4 * KIB4)],
        ];
        for regions in bad {
            assert!(parse(regions, 8).is_err(), "{regions:?}");
        }
        assert!(parse(&vec![region(at, KIB4, 0); MAX_REGIONS + 1], 8).is_err());
        for text in ["", "{}", "[1]", "[{}]", "null", "[[]]", r#"[{"size":-1}]"#] {
            let found = Regions::parse(text.as_bytes(), 8);
            assert!(found.is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(Regions::parse(&bytes, 8).is_err());
        }

        /// Whatever is accepted is a one-to-one map.
        #[test]
        fn what_is_accepted_maps_every_page_once(
            parts in proptest::collection::vec((0u64..12, 0u64..5, 0u64..8), 1..5),
        ) {
            let regions: Vec<_> = parts
                .iter()
                .map(|(at, size, offset)| region(at * KIB4, size * KIB4, offset * KIB4))
                .collect();
            if let Ok(found) = parse(&regions, 8) {
                let mut seen = std::collections::BTreeSet::new();
                for page in 0..8 {
                    let (address, count) = found.address_of(page, 1).unwrap();
                    prop_assert_eq!(count, 1);
                    prop_assert_eq!(found.page_at(address), Some(page));
                    prop_assert!(seen.insert(address));
                }
                let all: u64 = found.pages_in(0..u64::MAX).map(|range| range.count).sum();
                prop_assert_eq!(all, 8);
            }
        }
    }
}
