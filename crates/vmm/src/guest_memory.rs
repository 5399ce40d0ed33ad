//! A clone's memory, seen from outside its monitor: through `/proc/PID/mem`, and through
//! `/proc/PID/pagemap` for what was written.
//!
//! A clone maps its template's memory privately. A page of such a mapping that is present or
//! swapped out, and no longer the file's, was written by the clone (proc_pid_pagemap(5)).

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;

use crate::delta::{DeltaError, PageRange};
use crate::kernel::{self, PagemapRegion};
use crate::machine::ProcessId;
use crate::memory::{MEMORY_NAME, PAGE};
use crate::process::identify;

/// Regions that one `PAGEMAP_SCAN` returns at most.
const REGIONS: usize = 4096;

/// Entries of a page map that are read at once.
const ENTRIES: usize = 64 << 10;

/// A monitor's memory. The descriptors stand for the process's address space: once it is
/// gone they read nothing, whoever has its number then.
#[derive(Debug)]
pub(crate) struct GuestMemory {
    pid: u32,
    mem: File,
    pagemap: File,
    map: Vec<Mapping>,
}

/// A part of the private mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mapping {
    /// Where it begins in the process.
    address: u64,
    /// Its pages in the guest's memory.
    pages: PageRange,
}

impl GuestMemory {
    /// The memory of a restored machine's monitor.
    pub(crate) fn open(process: ProcessId) -> Result<GuestMemory, DeltaError> {
        let pid = process.pid;
        let failed = |doing| {
            move |source: io::Error| match source.raw_os_error() {
                Some(libc::ESRCH | libc::ENOENT) => DeltaError::Ended { pid, doing: "read" },
                _ => DeltaError::Process { doing, pid, source },
            }
        };
        let mem = File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/{pid}/mem"))
            .map_err(failed("open the memory"))?;
        let pagemap =
            File::open(format!("/proc/{pid}/pagemap")).map_err(failed("open the page map"))?;
        let maps =
            fs::read_to_string(format!("/proc/{pid}/maps")).map_err(failed("read the mappings"))?;
        // Checked after all is open: a number that was reused shows another start time.
        if identify(pid).map_err(failed("read the identity"))? != process {
            return Err(DeltaError::Ended { pid, doing: "read" });
        }
        let map = private_map(&maps).map_err(|why| DeltaError::Map { pid, why })?;
        if map.is_empty() {
            return Err(DeltaError::NoTemplate { pid });
        }
        Ok(GuestMemory {
            pid,
            mem,
            pagemap,
            map,
        })
    }

    /// Pages of the whole memory.
    pub(crate) fn pages(&self) -> u64 {
        self.map.last().map_or(0, |mapping| mapping.pages.end())
    }

    /// The pages that were written since the machine was started; ascending, not adjacent.
    pub(crate) fn written(&self) -> Result<Vec<PageRange>, DeltaError> {
        match self.scan() {
            Ok(ranges) => Ok(ranges),
            // Linux before 6.7.
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => self
                .walk()
                .map_err(|source| self.failed("read the page map", source)),
            Err(source) => Err(self.failed("scan the page map", source)),
        }
    }

    /// By `PAGEMAP_SCAN`.
    fn scan(&self) -> io::Result<Vec<PageRange>> {
        let mut ranges = Ranges::default();
        let mut regions = vec![PagemapRegion::default(); REGIONS];
        for mapping in &self.map {
            let end = mapping.address + mapping.pages.count * PAGE as u64;
            let mut at = mapping.address;
            while at < end {
                let (found, walked) = kernel::scan_written(&self.pagemap, at..end, &mut regions)?;
                for region in &regions[..found] {
                    ranges.add(PageRange {
                        first: mapping.page_at(region.start),
                        count: (region.end - region.start) / PAGE as u64,
                    });
                }
                if walked <= at {
                    return Err(io::Error::other("the scan does not advance"));
                }
                at = walked;
            }
        }
        Ok(ranges.0)
    }

    /// Entry by entry.
    fn walk(&self) -> io::Result<Vec<PageRange>> {
        const PRESENT: u64 = 1 << 63;
        const SWAPPED: u64 = 1 << 62;
        const FILE: u64 = 1 << 61;
        let mut ranges = Ranges::default();
        let mut buffer = vec![0; ENTRIES * 8];
        for mapping in &self.map {
            let mut done = 0;
            while done < mapping.pages.count {
                let count = (mapping.pages.count - done).min(ENTRIES as u64);
                let entries = &mut buffer[..count as usize * 8];
                let offset = (mapping.address / PAGE as u64 + done) * 8;
                self.pagemap.read_exact_at(entries, offset)?;
                for (index, entry) in entries.chunks_exact(8).enumerate() {
                    let entry = entry
                        .iter()
                        .rev()
                        .fold(0, |all, byte| all << 8 | u64::from(*byte));
                    if entry & (PRESENT | SWAPPED) != 0 && entry & FILE == 0 {
                        ranges.add(PageRange {
                            first: mapping.pages.first + done + index as u64,
                            count: 1,
                        });
                    }
                }
                done += count;
            }
        }
        Ok(ranges.0)
    }

    /// Fills `into` (whole pages) from page `first` on.
    pub(crate) fn read(&self, first: u64, into: &mut [u8]) -> Result<(), DeltaError> {
        let mut rest = into;
        for (address, bytes) in self.places(first, rest.len())? {
            let (part, others) = rest.split_at_mut(bytes);
            self.read_at(address, part)?;
            rest = others;
        }
        Ok(())
    }

    /// Writes whole pages from page `first` on.
    pub(crate) fn write(&self, first: u64, bytes: &[u8]) -> Result<(), DeltaError> {
        let mut rest = bytes;
        for (address, bytes) in self.places(first, rest.len())? {
            let (part, others) = rest.split_at(bytes);
            self.write_at(address, part)?;
            rest = others;
        }
        Ok(())
    }

    /// Reads at an address of the process.
    pub(crate) fn read_at(&self, address: u64, into: &mut [u8]) -> Result<(), DeltaError> {
        self.mem
            .read_exact_at(into, address)
            .map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => DeltaError::Ended {
                    pid: self.pid,
                    doing: "read",
                },
                _ => self.failed("read the memory", error),
            })
    }

    /// Writes at an address of the process.
    pub(crate) fn write_at(&self, address: u64, bytes: &[u8]) -> Result<(), DeltaError> {
        self.mem
            .write_all_at(bytes, address)
            .map_err(|error| match error.kind() {
                io::ErrorKind::WriteZero => DeltaError::Ended {
                    pid: self.pid,
                    doing: "written",
                },
                _ => self.failed("write the memory", error),
            })
    }

    /// Where `bytes` bytes from page `first` on are in the process, piece by piece.
    fn places(&self, first: u64, bytes: usize) -> Result<Vec<(u64, usize)>, DeltaError> {
        if !bytes.is_multiple_of(PAGE) {
            return Err(DeltaError::Ragged { first, bytes });
        }
        let wanted = PageRange {
            first,
            count: (bytes / PAGE) as u64,
        };
        if wanted.end() > self.pages() {
            return Err(DeltaError::Outside {
                first,
                end: wanted.end(),
                pages: self.pages(),
            });
        }
        let begin = self.map.partition_point(|part| part.pages.end() <= first);
        let parts = self.map[begin..]
            .iter()
            .take_while(|part| part.pages.first < wanted.end());
        Ok(parts
            .map(|part| {
                let from = part.pages.first.max(first);
                let to = part.pages.end().min(wanted.end());
                let address = part.address + (from - part.pages.first) * PAGE as u64;
                // Not more than `bytes`, so it fits a usize.
                (address, (to - from) as usize * PAGE)
            })
            .collect())
    }

    fn failed(&self, doing: &'static str, source: io::Error) -> DeltaError {
        DeltaError::Process {
            doing,
            pid: self.pid,
            source,
        }
    }
}

impl Mapping {
    fn page_at(&self, address: u64) -> u64 {
        self.pages.first + (address - self.address) / PAGE as u64
    }
}

/// Ranges that grow at their end.
#[derive(Default)]
struct Ranges(Vec<PageRange>);

impl Ranges {
    fn add(&mut self, range: PageRange) {
        match self.0.last_mut() {
            Some(last) if last.end() == range.first => last.count += range.count,
            _ => self.0.push(range),
        }
    }
}

/// The private mappings of guest memory in `/proc/PID/maps`, by their place in it. None
/// where it is mapped shared; an error where parts of it are missing or mapped twice.
fn private_map(maps: &str) -> Result<Vec<Mapping>, String> {
    let name = format!("/memfd:{MEMORY_NAME}");
    let mut map = Vec::new();
    for line in maps.lines().filter(|line| line.contains(&name)) {
        let mapping =
            parse_mapping(line).ok_or_else(|| format!("{line:?} is not as proc(5) says"))?;
        if line
            .split(' ')
            .nth(1)
            .is_some_and(|mode| mode.ends_with('p'))
        {
            map.push(mapping);
        }
    }
    map.sort_by_key(|mapping| mapping.pages);
    let mut end = 0;
    for mapping in &map {
        if mapping.pages.first != end {
            return Err(format!(
                "its memory is mapped up to page {end} and then from page {}",
                mapping.pages.first
            ));
        }
        end = mapping.pages.end();
    }
    Ok(map)
}

/// `start-end mode offset device inode name`, numbers in hexadecimal.
fn parse_mapping(line: &str) -> Option<Mapping> {
    let mut fields = line.split(' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let offset = fields.nth(1)?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    let (start, end, offset) = (number(start)?, number(end)?, number(offset)?);
    let page = PAGE as u64;
    let whole = [start, end, offset]
        .iter()
        .all(|at| at.is_multiple_of(page));
    (whole && start < end).then(|| Mapping {
        address: start,
        pages: PageRange {
            first: offset / page,
            count: (end - start) / page,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryFile;
    use proptest::prelude::*;

    const MAPS: &str = "\
55d0c0a00000-55d0c0b00000 r-xp 00000000 fe:00 123    /usr/bin/qemu-system-x86_64
7f0000100000-7f0000200000 rw-p 00300000 00:01 7      /memfd:wrenn-memory (deleted)
7f0000400000-7f0000700000 rw-p 00000000 00:01 7      /memfd:wrenn-memory (deleted)
7f0001000000-7f0001001000 r--p 00000000 00:01 8      /memfd:wrenn-boot (deleted)
";

    #[test]
    fn a_memory_mapped_in_parts_is_put_together() {
        let map = private_map(MAPS).unwrap();
        let pages: Vec<_> = map.iter().map(|part| (part.address, part.pages)).collect();
        let range = |first, count| PageRange { first, count };
        assert_eq!(
            pages,
            [
                (0x7f0000400000, range(0, 0x300)),
                (0x7f0000100000, range(0x300, 0x100))
            ]
        );
        assert_eq!(private_map("").unwrap(), []);
        assert_eq!(private_map(&MAPS.replace("rw-p", "rw-s")).unwrap(), []);
    }

    #[test]
    fn gaps_overlaps_and_nonsense_are_refused() {
        for (from, to) in [
            ("00300000", "00400000"),
            ("00300000", "00200000"),
            ("7f0000400000-", "7f0000400001-"),
            ("7f0000400000-", "x-"),
        ] {
            assert!(private_map(&MAPS.replace(from, to)).is_err(), "{to}");
        }
    }

    /// Pages of the memory below: if every other is written, more regions than the kernel tells
    /// of at once, and many more than it collects at once.
    const MANY: usize = 64 + 2 * (REGIONS + 700);

    /// A private mapping of sealed memory in this very process, of whose first 64 pages the
    /// pages 1 and 3 (of 8 each) hold data; and what these 64 hold.
    fn mapped() -> (GuestMemory, Vec<u8>) {
        let memory = MemoryFile::create((MANY * PAGE) as u64).unwrap();
        let mut model = vec![0; 64 * PAGE];
        for page in (0..64).filter(|page| page % 8 == 1 || page % 8 == 3) {
            model[page * PAGE..(page + 1) * PAGE].fill(page as u8);
        }
        memory.write_for_tests(&model);
        let sealed = memory.seal().unwrap();
        kernel::map_privately(&sealed.share().unwrap(), MANY * PAGE).unwrap();
        let pid = std::process::id();
        let memory = GuestMemory::open(identify(pid).unwrap()).unwrap();
        (memory, model)
    }

    // One test, since each would find the mappings of the others.
    #[test]
    fn what_is_written_is_found_by_both_ways_and_reads_back() {
        let (memory, model) = mapped();
        let model = std::cell::RefCell::new((model, std::collections::BTreeSet::new()));
        assert_eq!(memory.pages(), MANY as u64);
        assert_eq!(memory.written().unwrap(), []);
        let page = (0u64..64, 1usize..6, any::<u8>());
        let steps = proptest::collection::vec(page, 1..6);
        let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(60));
        runner
            .run(&steps, |steps| {
                let (model, written) = &mut *model.borrow_mut();
                for (first, count, byte) in steps {
                    let range = first as usize..(first as usize + count);
                    let bytes = vec![byte; count * PAGE];
                    if range.end > 64 {
                        let outside = memory.write(first + MANY as u64 - 64, &bytes);
                        prop_assert!(
                            matches!(outside, Err(DeltaError::Outside { .. })),
                            "written"
                        );
                        continue;
                    }
                    memory.write(first, &bytes).unwrap();
                    model[range.start * PAGE..range.end * PAGE].copy_from_slice(&bytes);
                    written.extend(range);
                }
                let mut all = vec![1; 64 * PAGE];
                memory.read(0, &mut all).unwrap();
                prop_assert!(&all == model);
                let scanned = memory.scan().unwrap();
                prop_assert_eq!(&memory.walk().unwrap(), &scanned);
                let found = scanned.iter().flat_map(|range| range.first..range.end());
                let found: Vec<usize> = found.map(|page| page as usize).collect();
                prop_assert_eq!(found, written.iter().copied().collect::<Vec<_>>());
                Ok(())
            })
            .unwrap();
        let mut written: Vec<_> = model.into_inner().1.into_iter().collect();
        for page in (65..MANY).step_by(2) {
            memory.write(page as u64, &[7; PAGE]).unwrap();
            written.push(page);
            // Where the kernel's own buffer has just become full, and in between.
            if page % 64 != 1 && page + 2 < MANY {
                continue;
            }
            let scanned = memory.scan().unwrap();
            let found = scanned.iter().flat_map(|range| range.first..range.end());
            assert!(found.map(|page| page as usize).eq(written.iter().copied()));
        }
        assert_eq!(memory.walk().unwrap(), memory.scan().unwrap());
        assert!(matches!(
            memory.read(0, &mut [0; 100]),
            Err(DeltaError::Ragged { .. })
        ));
    }

    #[test]
    fn a_process_that_is_gone_or_another_is_told() {
        let id = ProcessId {
            pid: std::process::id(),
            start_time: 1,
        };
        assert!(matches!(
            GuestMemory::open(id),
            Err(DeltaError::Ended { .. })
        ));
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let id = identify(child.id()).unwrap();
        assert!(matches!(
            GuestMemory::open(id),
            Err(DeltaError::NoTemplate { .. })
        ));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(matches!(
            GuestMemory::open(id),
            Err(DeltaError::Ended { .. })
        ));
    }

    proptest! {
        #[test]
        fn damaged_lines_never_panic(at in 0usize..400, byte in 32u8..127) {
            let mut text = MAPS.as_bytes().to_vec();
            let at = at % text.len();
            text[at] = byte;
            let _ = private_map(&String::from_utf8(text).unwrap());
        }
    }
}
