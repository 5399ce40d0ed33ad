//! `/proc/net/tcp` and `/proc/net/tcp6`, see proc_net(5).

use std::fs::File;
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

const FILES: [&str; 2] = ["/proc/net/tcp", "/proc/net/tcp6"];
/// `TCP_LISTEN`
const LISTEN: &str = "0A";

/// A listening socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listener {
    /// Where; an IPv4 address mapped into IPv6 as what it is.
    pub address: SocketAddr,
    /// Names the socket itself.
    pub inode: u64,
}

/// Reads the tables into buffers that are used again.
#[derive(Debug, Default)]
pub(crate) struct Tables {
    buffers: [Vec<u8>; 2],
}

impl Tables {
    /// All listeners. A table that is not there (no IPv6) is empty.
    pub(crate) fn read(&mut self) -> io::Result<impl Iterator<Item = Listener> + '_> {
        for (path, buffer) in FILES.iter().zip(&mut self.buffers) {
            buffer.clear();
            match File::open(path) {
                Ok(mut file) => {
                    file.read_to_end(buffer)?;
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(self
            .buffers
            .iter()
            .flat_map(|buffer| buffer.split(|&b| b == b'\n'))
            .filter_map(line))
    }
}

/// One line of either table; `None` for the head, sockets that do not listen, and whatever
/// else it may be.
pub fn line(line: &[u8]) -> Option<Listener> {
    let text = std::str::from_utf8(line).ok()?;
    let mut fields = text.split_ascii_whitespace();
    let local = fields.nth(1)?;
    let state = fields.nth(1)?;
    if state != LISTEN {
        return None;
    }
    let inode = fields.nth(5)?.parse().ok()?;
    let (address, port) = local.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    Some(Listener {
        address: SocketAddr::new(ip(address)?, port),
        inode,
    })
}

/// Addresses are printed as 32-bit words in the machine's byte order.
fn ip(hex: &str) -> Option<IpAddr> {
    let word = |i: usize| {
        let digits = hex.get(i * 8..i * 8 + 8)?;
        u32::from_str_radix(digits, 16).ok().map(u32::to_ne_bytes)
    };
    match hex.len() {
        8 => Some(IpAddr::V4(Ipv4Addr::from(word(0)?))),
        32 => {
            let mut octets = [0; 16];
            for i in 0..4 {
                octets[i * 4..i * 4 + 4].copy_from_slice(&word(i)?);
            }
            Some(Ipv6Addr::from(octets).to_canonical())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_both_tables_are_read() {
        for (text, expected) in [
            (
                "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 12345 1 0 100 0",
                Some(("127.0.0.1:8080", 12345)),
            ),
            (
                "   1: 00000000000000000000000001000000:0050 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000  1000 0 99 1",
                Some(("[::1]:80", 99)),
            ),
            (
                "   1: 0000000000000000FFFF00000100007F:0050 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000  1000 0 98 1",
                Some(("127.0.0.1:80", 98)),
            ),
            (
                "   0: 0100007F:1F90 0100007F:0001 01 00000000:00000000 00:00000000 00000000     0        0 12345 1",
                None,
            ),
            (
                "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode",
                None,
            ),
            ("", None),
            ("0: 0100007F 0 0A 0 0 0 0 0 1", None),
            ("0: 010000é7F:1F90 0 0A 0 0 0 0 0 1", None),
        ] {
            let read = line(text.as_bytes());
            let expected = expected.map(|(a, inode)| Listener {
                address: a.parse().unwrap(),
                inode,
            });
            assert_eq!(read, expected, "{text}");
        }
    }

    #[test]
    fn a_real_listener_is_found() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let mut tables = Tables::default();
        assert!(
            tables
                .read()
                .unwrap()
                .any(|l| l.address == address && l.inode > 0)
        );
        drop(listener);
        assert!(!tables.read().unwrap().any(|l| l.address == address));
    }
}
