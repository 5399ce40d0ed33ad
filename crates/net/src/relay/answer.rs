//! Reading and changing what a resolver has answered.

use std::net::Ipv4Addr;
use std::time::Duration;

use super::message::{A, AAAA, CNAME, HEADER, LONGEST_NAME, question_end};

/// Class "internet".
const INTERNET: u16 = 1;
/// Where an answer's number of records is, and the two numbers of other sections behind it.
const COUNTS: usize = 6;
/// Jumps within one name: more than there can be labels is a circle.
const MOST_JUMPS: usize = 128;

/// One record of an answer, by where it is in the message.
#[derive(Debug, Clone, Copy)]
struct Record {
    /// Where its name begins.
    start: usize,
    kind: u16,
    class: u16,
    /// Where its lifetime is; the length of the data is 4 bytes behind, the data 6.
    lifetime: usize,
    /// Where its data ends.
    end: usize,
}

impl Record {
    fn data<'a>(&self, bytes: &'a [u8]) -> &'a [u8] {
        bytes.get(self.lifetime + 6..self.end).unwrap_or_default()
    }

    /// The address, if that is what the record is.
    fn addr(&self, bytes: &[u8]) -> Option<Ipv4Addr> {
        let octets: [u8; 4] = self.data(bytes).try_into().ok()?;
        (self.kind == A && self.class == INTERNET).then(|| Ipv4Addr::from(octets))
    }
}

/// An answer with all its records.
#[derive(Debug)]
pub(super) struct Answer {
    bytes: Vec<u8>,
    /// Where the question ends.
    question: usize,
    /// Those of the answer section.
    records: Vec<Record>,
    /// Those of the other two: authorities, and what might be useful.
    others: Vec<Record>,
}

impl Answer {
    /// Reads an answer; `None` if it is not whole.
    pub(super) fn read(bytes: Vec<u8>) -> Option<Self> {
        let count = |at: usize| Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]));
        let question = match count(COUNTS - 2)? {
            0 => HEADER,
            _ => question_end(&bytes)?,
        };
        let numbers = [count(COUNTS)?, count(COUNTS + 2)?, count(COUNTS + 4)?];
        let mut at = question;
        let mut sections = numbers.map(|_| Vec::new());
        for (number, section) in numbers.iter().zip(&mut sections) {
            for _ in 0..*number {
                let record = read_record(&bytes, at)?;
                at = record.end;
                section.push(record);
            }
        }
        let [records, mut others, last] = sections;
        others.extend(last);
        Some(Self {
            bytes,
            question,
            records,
            others,
        })
    }

    /// Removes the addresses that are closed, and every IPv6 address.
    pub(super) fn without(self, is_closed: impl Fn(Ipv4Addr) -> bool) -> Self {
        let bytes = &self.bytes;
        let bad =
            |record: &Record| record.kind == AAAA || record.addr(bytes).is_some_and(&is_closed);
        if self.records.iter().any(bad) {
            let kept = |record: &&Record| matches!(record.kind, A | CNAME) && !bad(record);
            let records: Vec<Record> = self.records.iter().filter(kept).copied().collect();
            return self.rebuilt(&records);
        }
        if self.others.iter().any(bad) {
            // Names point backwards only, so that what comes last can be cut off.
            let end = self.records.last().map_or(self.question, |last| last.end);
            let mut cut = self;
            cut.bytes.truncate(end);
            cut.bytes[COUNTS + 2..HEADER].fill(0);
            cut.others.clear();
            return cut;
        }
        self
    }

    /// The same with these records only. Names in them may point into others, so they are
    /// written out.
    fn rebuilt(&self, records: &[Record]) -> Self {
        let mut bytes = self.bytes[..self.question].to_vec();
        let mut written = Vec::new();
        for record in records {
            let start = bytes.len();
            let Some(name) = whole_name(&self.bytes, record.start) else {
                continue;
            };
            let data = match record.kind {
                CNAME => whole_name(&self.bytes, record.lifetime + 6),
                _ => Some(record.data(&self.bytes).to_vec()),
            };
            let Some(data) = data else { continue };
            bytes.extend_from_slice(&name);
            bytes.extend_from_slice(&record.kind.to_be_bytes());
            bytes.extend_from_slice(&record.class.to_be_bytes());
            let lifetime = bytes.len();
            bytes.extend_from_slice(&self.bytes[record.lifetime..record.lifetime + 4]);
            let len = u16::try_from(data.len()).unwrap_or(u16::MAX);
            bytes.extend_from_slice(&len.to_be_bytes());
            bytes.extend_from_slice(&data);
            written.push(Record {
                start,
                lifetime,
                end: bytes.len(),
                ..*record
            });
        }
        let count = u16::try_from(written.len()).unwrap_or(u16::MAX);
        bytes[COUNTS..COUNTS + 2].copy_from_slice(&count.to_be_bytes());
        bytes[COUNTS + 2..HEADER].fill(0);
        Self {
            bytes,
            question: self.question,
            records: written,
            others: Vec::new(),
        }
    }

    /// The addresses that the name stands for.
    pub(super) fn addrs(&self) -> impl Iterator<Item = Ipv4Addr> {
        self.records
            .iter()
            .filter_map(|record| record.addr(&self.bytes))
    }

    /// Makes no record of the answer live longer.
    pub(super) fn live_at_most(&mut self, most: Duration) {
        let most = u32::try_from(most.as_secs()).unwrap_or(u32::MAX);
        for record in &self.records {
            let lifetime = record.lifetime..record.lifetime + 4;
            if let Some(bytes) = self.bytes.get_mut(lifetime)
                && let Some(now) = bytes.first_chunk::<4>()
                && u32::from_be_bytes(*now) > most
            {
                bytes.copy_from_slice(&most.to_be_bytes());
            }
        }
    }

    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

fn read_record(bytes: &[u8], start: usize) -> Option<Record> {
    let kind = name_end(bytes, start)?;
    let fixed = bytes.get(kind..)?.first_chunk::<10>()?;
    let [k0, k1, c0, c1, _, _, _, _, l0, l1] = *fixed;
    let end = kind + 10 + usize::from(u16::from_be_bytes([l0, l1]));
    (end <= bytes.len()).then_some(Record {
        start,
        kind: u16::from_be_bytes([k0, k1]),
        class: u16::from_be_bytes([c0, c1]),
        lifetime: kind + 4,
        end,
    })
}

/// Where a name ends that begins there, in the message and not where it points to.
fn name_end(bytes: &[u8], start: usize) -> Option<usize> {
    let mut at = start;
    loop {
        let len = usize::from(*bytes.get(at)?);
        match len {
            0 => return Some(at + 1),
            1..=63 => at += 1 + len,
            // The rest is elsewhere: two bytes say where.
            0xc0.. => return Some(at + 2),
            _ => return None,
        }
    }
}

/// A name written out, as it is without pointers.
fn whole_name(bytes: &[u8], start: usize) -> Option<Vec<u8>> {
    let mut name = Vec::new();
    let mut at = start;
    for _ in 0..MOST_JUMPS {
        let len = *bytes.get(at)?;
        match len {
            0 => {
                name.push(0);
                return (name.len() <= LONGEST_NAME).then_some(name);
            }
            1..=63 => {
                let behind = at + 1 + usize::from(len);
                name.extend_from_slice(bytes.get(at..behind)?);
                at = behind;
            }
            0xc0.. => at = usize::from(u16::from_be_bytes([len & 0x3f, *bytes.get(at + 1)?])),
            _ => return None,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An answer about `www.example`: an alias, then addresses, each pointing to names before.
    fn answer(addrs: &[[u8; 4]], extra: &[u8]) -> Vec<u8> {
        let mut bytes = vec![1, 2, 0x81, 0x80, 0, 1, 0, 0, 0, 0, 0, 0];
        bytes.extend(b"\x03www\x07example\0\0\x01\0\x01");
        // An alias of 8 bytes of data: "cdn" and a pointer to "example".
        let alias = bytes.len() + 12;
        bytes.extend([0xc0, 12, 0, 5, 0, 1, 0, 1, 0, 0, 0, 6, 3]);
        bytes.extend(b"cdn\xc0\x10");
        for addr in addrs {
            bytes.extend([
                0xc0,
                u8::try_from(alias).unwrap(),
                0,
                1,
                0,
                1,
                0,
                1,
                0,
                0,
                0,
                4,
            ]);
            bytes.extend(addr);
        }
        bytes[7] = u8::try_from(addrs.len() + 1).unwrap();
        if !extra.is_empty() {
            bytes[11] = 1;
            bytes.extend(extra);
        }
        bytes
    }

    const CLOSED: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);

    fn filtered(bytes: &[u8]) -> Vec<u8> {
        Answer::read(bytes.to_vec())
            .unwrap()
            .without(|addr| addr == CLOSED)
            .into_bytes()
    }

    #[test]
    fn closed_addresses_are_taken_out_and_the_rest_still_reads() {
        let open = answer(&[[9, 9, 9, 9]], &[]);
        assert_eq!(filtered(&open), open, "nothing closed, nothing changed");
        let mixed = filtered(&answer(&[[10, 0, 0, 1], [9, 9, 9, 9]], &[]));
        let read = Answer::read(mixed).unwrap();
        assert_eq!(
            read.addrs().collect::<Vec<_>>(),
            [Ipv4Addr::new(9, 9, 9, 9)]
        );
        assert_eq!(read.records.len(), 2, "the alias is still there");
        let alias = read.records[0];
        assert_eq!(alias.data(&read.bytes), b"\x03cdn\x07example\0");
        let only = Answer::read(filtered(&answer(&[[10, 0, 0, 1]], &[]))).unwrap();
        assert_eq!(only.addrs().count(), 0);
    }

    #[test]
    fn an_address_on_the_side_is_cut_off_with_its_section() {
        let glue = [0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4, 10, 0, 0, 1];
        let cut = filtered(&answer(&[[9, 9, 9, 9]], &glue));
        assert_eq!(cut, answer(&[[9, 9, 9, 9]], &[]));
        let mut six = vec![0xc0, 12, 0, 28, 0, 1, 0, 0, 0, 9, 0, 16];
        six.extend([0; 16]);
        assert_eq!(filtered(&answer(&[[9, 9, 9, 9]], &six)), cut);
        let harmless = [0, 0, 41, 4, 0, 0, 0, 0, 0, 0, 0];
        let whole = answer(&[[9, 9, 9, 9]], &harmless);
        assert_eq!(filtered(&whole), whole);
    }

    #[test]
    fn lifetimes_are_shortened() {
        let mut read = Answer::read(answer(&[[9, 9, 9, 9]], &[])).unwrap();
        read.live_at_most(Duration::from_secs(300));
        let lifetimes: Vec<&[u8]> = read
            .records
            .iter()
            .map(|record| &read.bytes[record.lifetime..record.lifetime + 4])
            .collect();
        assert_eq!(lifetimes, [[0, 0, 1, 44]; 2]);
    }

    #[test]
    fn what_is_not_whole_is_not_read_and_circles_end() {
        let good = answer(&[[10, 0, 0, 1], [9, 9, 9, 9]], &[]);
        for cut in 0..good.len() {
            assert!(Answer::read(good[..cut].to_vec()).is_none(), "cut at {cut}");
        }
        for at in 0..good.len() {
            for value in [0, 1, 63, 64, 0xc0, 0xff] {
                let mut bad = good.clone();
                bad[at] = value;
                // Whatever it reads as, no closed address comes through and nothing panics.
                if let Some(read) = Answer::read(bad) {
                    let mut read = read.without(|addr| addr == CLOSED);
                    read.live_at_most(Duration::from_secs(1));
                    assert!(read.addrs().all(|addr| addr != CLOSED));
                }
            }
        }
        assert!(whole_name(&[0xc0, 0], 0).is_none());
    }
}
