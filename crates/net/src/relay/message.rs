//! As much of the DNS message format (RFC 1035, section 4) as a relay must understand.

/// The fixed header.
pub(super) const HEADER: usize = 12;
/// The longest encoded name.
pub(super) const LONGEST_NAME: usize = 255;
/// Bits of the header's third byte: answer, operation, truncated, recursion desired.
const ANSWER: u8 = 0x80;
const OPERATION: u8 = 0x78;
pub(super) const TRUNCATED: u8 = 0x02;
const RECURSION_DESIRED: u8 = 0x01;
/// Bits of the fourth: recursion available, and the result.
const RECURSION_AVAILABLE: u8 = 0x80;
const RESULT: u8 = 0x0f;

/// Results of a query.
pub(super) const NO_ERROR: u8 = 0;
pub(super) const SERVER_FAILURE: u8 = 2;
pub(super) const NO_SUCH_NAME: u8 = 3;
pub(super) const NOT_IMPLEMENTED: u8 = 4;

/// Types of records.
pub(super) const A: u16 = 1;
pub(super) const CNAME: u16 = 5;
pub(super) const AAAA: u16 = 28;
pub(super) const SVCB: u16 = 64;
pub(super) const HTTPS: u16 = 65;
pub(super) const ANY: u16 = 255;

/// A query that is fit to be passed on.
#[derive(Debug, Clone)]
pub(super) struct Query {
    bytes: Vec<u8>,
    /// The guest's number for it.
    id: [u8; 2],
    /// Where the question ends.
    end: usize,
}

impl Query {
    /// Reads a query: a standard query with exactly one question and no answers. Anything else
    /// is nothing a stub resolver sends.
    pub(super) fn read(bytes: &[u8]) -> Option<Self> {
        let header = bytes.first_chunk::<HEADER>()?;
        let [id0, id1, flags, _, qd0, qd1, an0, an1, ns0, ns1, ..] = *header;
        let plain = flags & (ANSWER | OPERATION) == 0;
        if !plain || [qd0, qd1] != [0, 1] || [an0, an1, ns0, ns1] != [0; 4] {
            return None;
        }
        let end = question_end(bytes)?;
        Some(Self {
            bytes: bytes.to_vec(),
            id: [id0, id1],
            end,
        })
    }

    /// The query under another number.
    pub(super) fn numbered(&self, id: [u8; 2]) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        bytes[..2].copy_from_slice(&id);
        bytes
    }

    /// If `reply` answers this query as sent under `id`: the reply under the guest's number.
    pub(super) fn answer(&self, reply: &[u8], id: [u8; 2]) -> Option<Vec<u8>> {
        let header = reply.first_chunk::<HEADER>()?;
        if header[..2] != id || header[2] & (ANSWER | OPERATION) != ANSWER {
            return None;
        }
        match [header[4], header[5]] {
            // A server that could not even read the question may leave it out.
            [0, 0] if header[3] & RESULT != 0 => {}
            [0, 1] => {
                let question = reply.get(HEADER..question_end(reply)?)?;
                if !question.eq_ignore_ascii_case(self.bytes.get(HEADER..self.end)?) {
                    return None;
                }
            }
            _ => return None,
        }
        let mut bytes = reply.to_vec();
        bytes[..2].copy_from_slice(&self.id);
        Some(bytes)
    }

    /// The answer "server failure".
    pub(super) fn failure(&self) -> Vec<u8> {
        self.result(SERVER_FAILURE)
    }

    /// An answer of the relay's own: the question, a result, and no records.
    pub(super) fn result(&self, result: u8) -> Vec<u8> {
        let mut bytes = self.bytes[..self.end].to_vec();
        bytes[2] = ANSWER | (bytes[2] & RECURSION_DESIRED);
        bytes[3] = RECURSION_AVAILABLE | result;
        bytes[4..HEADER].copy_from_slice(&[0, 1, 0, 0, 0, 0, 0, 0]);
        bytes
    }

    /// The answer "too long for a datagram, ask by TCP".
    pub(super) fn truncated(&self) -> Vec<u8> {
        let mut bytes = self.result(NO_ERROR);
        bytes[2] |= TRUNCATED;
        bytes
    }

    /// The type of record that is asked for.
    pub(super) fn kind(&self) -> u16 {
        // `end` is behind type and class.
        u16::from_be_bytes([self.bytes[self.end - 4], self.bytes[self.end - 3]])
    }

    /// The name that is asked for, in lower case and without a dot at the end. A label that
    /// contains a dot, or is no ASCII, makes a name that no pattern matches.
    pub(super) fn name(&self) -> String {
        let mut name = String::new();
        let mut at = HEADER;
        while let Some(len) = self.bytes.get(at).map(|len| usize::from(*len))
            && len > 0
        {
            if !name.is_empty() {
                name.push('.');
            }
            for byte in self.bytes.get(at + 1..at + 1 + len).unwrap_or_default() {
                let plain = byte.is_ascii_graphic() && *byte != b'.';
                let shown = if plain { *byte } else { b'?' };
                name.push(char::from(shown.to_ascii_lowercase()));
            }
            at += 1 + len;
        }
        name
    }
}

/// Where the first question ends, if there is one: labels, a zero byte, type and class. A name
/// in a first question has nothing before it to point to, so it is never compressed.
pub(super) fn question_end(bytes: &[u8]) -> Option<usize> {
    let mut at = HEADER;
    loop {
        let len = usize::from(*bytes.get(at)?);
        if len > 63 || at + len + 1 - HEADER > LONGEST_NAME {
            return None;
        }
        at += 1 + len;
        if len == 0 {
            break;
        }
    }
    let end = at + 4;
    (end <= bytes.len()).then_some(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A query for `name`, type A.
    fn query(id: [u8; 2], name: &str) -> Vec<u8> {
        let mut bytes = vec![id[0], id[1], RECURSION_DESIRED, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in name.split('.') {
            bytes.push(u8::try_from(label.len()).unwrap());
            bytes.extend(label.bytes());
        }
        bytes.extend([0, 0, 1, 0, 1]);
        bytes
    }

    #[test]
    fn a_query_travels_under_another_number() {
        let read = Query::read(&query([1, 2], "example.org")).unwrap();
        let sent = read.numbered([9, 9]);
        assert_eq!(sent, query([9, 9], "example.org"));
        let mut reply = query([9, 9], "EXAMPLE.org");
        reply[2] |= ANSWER;
        assert_eq!(read.answer(&reply, [9, 9]).unwrap()[..2], [1, 2]);
    }

    #[test]
    fn answers_that_were_not_asked_for_are_dropped() {
        let read = Query::read(&query([1, 2], "example.org")).unwrap();
        let mut reply = query([9, 9], "example.org");
        assert!(
            read.answer(&reply, [9, 9]).is_none(),
            "a query is no answer"
        );
        reply[2] |= ANSWER;
        assert!(read.answer(&reply, [9, 8]).is_none(), "another number");
        let mut other = query([9, 9], "example.com");
        other[2] |= ANSWER;
        assert!(read.answer(&other, [9, 9]).is_none(), "another question");
        let bare = [9, 9, ANSWER, 1, 0, 0, 0, 0, 0, 0, 0, 0];
        assert!(
            read.answer(&bare, [9, 9]).is_some(),
            "format error without the question"
        );
    }

    #[test]
    fn a_query_knows_what_it_asks_for() {
        let read = Query::read(&query([1, 2], "EXAMPLE.org")).unwrap();
        assert_eq!((read.name().as_str(), read.kind()), ("example.org", A));
        // "a.b" as one label is not the name a.b, nor is a byte that is no character.
        let mut odd = query([1, 2], "aXb.org");
        odd[14] = b'.';
        assert_eq!(Query::read(&odd).unwrap().name(), "a?b.org");
        odd[14] = 0xe4;
        assert_eq!(Query::read(&odd).unwrap().name(), "a?b.org");
        assert_eq!(read.truncated()[2] & TRUNCATED, TRUNCATED);
    }

    #[test]
    fn failure_repeats_the_question_only() {
        let mut bytes = query([1, 2], "a.b");
        bytes[11] = 1;
        bytes.extend([0, 0, 41, 4, 0, 0, 0, 0, 0, 0, 0]);
        let failure = Query::read(&bytes).unwrap().failure();
        assert_eq!(failure[..12], [1, 2, 0x81, 0x82, 0, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(failure[12..], query([0, 0], "a.b")[12..]);
    }

    #[test]
    fn what_is_no_query_is_not_read() {
        let good = query([1, 2], "example.org");
        for cut in 0..good.len() {
            assert!(Query::read(&good[..cut]).is_none(), "cut at {cut}");
        }
        for (at, value) in [
            (2, 0x80),
            (2, 0x28),
            (5, 2),
            (5, 0),
            (7, 1),
            (12, 0xc0),
            (12, 64),
        ] {
            let mut bad = good.clone();
            bad[at] = value;
            assert!(Query::read(&bad).is_none(), "byte {at} = {value}");
        }
        let long = query([1, 2], &vec!["x".repeat(63); 4].join("."));
        assert!(Query::read(&long).is_none(), "a name of 257 bytes");
    }
}
