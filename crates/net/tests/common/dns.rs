//! A resolver of the test: a zone, served by UDP and TCP.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};

/// A query for `name`.
pub fn query(id: u16, name: &str, kind: u16) -> Vec<u8> {
    let mut bytes = id.to_be_bytes().to_vec();
    bytes.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    bytes.extend(encoded(name));
    bytes.extend(kind.to_be_bytes());
    bytes.extend([0, 1]);
    bytes
}

fn encoded(name: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for label in name.split('.') {
        bytes.push(u8::try_from(label.len()).unwrap());
        bytes.extend(label.bytes());
    }
    bytes.push(0);
    bytes
}

/// What a name stands for: another name, or addresses.
#[derive(Clone)]
pub enum Data {
    Alias(&'static str),
    Addrs(Vec<Ipv4Addr>),
}

/// Names and what they stand for, each for a day.
pub type Zone = HashMap<&'static str, Data>;

/// The answer about a query of type A: aliases are followed, names are compressed as servers
/// do it. A name that is not there does not exist.
fn answer(zone: &Zone, query: &[u8]) -> Vec<u8> {
    let end = 12 + query[12..].iter().position(|b| *b == 0).unwrap() + 5;
    let mut bytes = query[..end].to_vec();
    bytes[2] |= 0x80;
    bytes[6..12].fill(0);
    let mut name = String::new();
    let mut at = 12;
    while query[at] != 0 {
        let len = usize::from(query[at]);
        if !name.is_empty() {
            name.push('.');
        }
        name += std::str::from_utf8(&query[at + 1..at + 1 + len]).unwrap();
        at += 1 + len;
    }
    let mut name = name.to_lowercase();
    let mut owner = 12_u16;
    loop {
        let head = |bytes: &mut Vec<u8>, kind: u8, data: &[u8]| {
            bytes.extend((0xc000 | owner).to_be_bytes());
            bytes.extend([0, kind, 0, 1]);
            bytes.extend(86_400_u32.to_be_bytes());
            bytes.extend(u16::try_from(data.len()).unwrap().to_be_bytes());
            bytes.extend(data);
            bytes[7] += 1;
        };
        match zone.get(name.as_str()) {
            Some(Data::Alias(other)) => {
                let start = bytes.len() + 12;
                head(&mut bytes, 5, &encoded(other));
                owner = u16::try_from(start).unwrap();
                name = (*other).to_owned();
            }
            Some(Data::Addrs(addrs)) => {
                for addr in addrs {
                    head(&mut bytes, 1, &addr.octets());
                }
                return bytes;
            }
            None => {
                bytes[3] |= 3;
                return bytes;
            }
        }
    }
}

/// The addresses and the least lifetime in an answer, or its result if that is not success.
pub fn read(reply: &[u8]) -> Result<(Vec<Ipv4Addr>, u32), u8> {
    if reply[3] & 15 != 0 {
        return Err(reply[3] & 15);
    }
    let skip = |mut at: usize| loop {
        match reply[at] {
            0 => return at + 1,
            0xc0.. => return at + 2,
            len => at += 1 + usize::from(len),
        }
    };
    let mut at = skip(12) + 4;
    let mut addrs = Vec::new();
    let mut lifetime = u32::MAX;
    for _ in 0..u16::from_be_bytes([reply[6], reply[7]]) {
        at = skip(at);
        let kind = reply[at + 1];
        lifetime = lifetime.min(u32::from_be_bytes(
            reply[at + 4..at + 8].try_into().unwrap(),
        ));
        let len = usize::from(u16::from_be_bytes([reply[at + 8], reply[at + 9]]));
        at += 10;
        if kind == 1 {
            addrs.push(Ipv4Addr::from(
                <[u8; 4]>::try_from(&reply[at..at + 4]).unwrap(),
            ));
        }
        at += len;
    }
    Ok((addrs, lifetime))
}

/// Serves a zone on two sockets until the process ends.
pub fn serve(udp: UdpSocket, tcp: TcpListener, zone: Zone) -> SocketAddr {
    let addr = udp.local_addr().unwrap();
    let by_tcp = zone.clone();
    std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok((len, from)) = udp.recv_from(&mut buffer) {
            udp.send_to(&answer(&zone, &buffer[..len]), from).unwrap();
        }
    });
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = tcp.accept() {
            let asked = read_message(&mut stream);
            write_message(&mut stream, &answer(&by_tcp, &asked));
        }
    });
    addr
}

/// A message as TCP carries it.
pub fn read_message(stream: &mut TcpStream) -> Vec<u8> {
    let mut len = [0; 2];
    stream.read_exact(&mut len).unwrap();
    let mut message = vec![0; usize::from(u16::from_be_bytes(len))];
    stream.read_exact(&mut message).unwrap();
    message
}

/// Sends one.
pub fn write_message(stream: &mut TcpStream, message: &[u8]) {
    let mut bytes = u16::try_from(message.len()).unwrap().to_be_bytes().to_vec();
    bytes.extend_from_slice(message);
    stream.write_all(&bytes).unwrap();
}
