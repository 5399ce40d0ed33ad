//! What the host says of this machine beside its memory, on Firecracker: its metadata
//! service, version 2, which the VMM itself answers on the guest's network card.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

/// Where Firecracker answers: as `wrenn-vmm` configures it. Not 169.254.169.254, where programs
/// look for the metadata of a cloud, of which a guest is to find none.
pub(super) const ADDRESS: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(169, 254, 87, 1)), 80);
/// The VMM answers within a millisecond; somebody else, or nobody, may take for ever.
const LIMIT: Duration = Duration::from_millis(300);
/// The most that is read; the document is a few hundred bytes.
const MAX_ANSWER: usize = 16 * 1024;

/// The whole document as JSON. Blocks, a moment at most.
///
/// # Errors
/// Nobody answers, or not as the service does.
pub(super) fn document(address: SocketAddr) -> io::Result<Vec<u8>> {
    let token = ask(
        address,
        "PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60\r\n",
    )?;
    let token = String::from_utf8(token).map_err(io::Error::other)?;
    if !token.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(io::Error::other("the metadata token is no header's value"));
    }
    ask(
        address,
        &format!("GET / HTTP/1.1\r\nAccept: application/json\r\nX-metadata-token: {token}\r\n"),
    )
}

/// One request on a connection of its own: the body of its answer.
fn ask(address: SocketAddr, head: &str) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect_timeout(&address, LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    stream.write_all(format!("{head}Host: {}\r\n\r\n", address.ip()).as_bytes())?;
    let mut answer = Vec::new();
    let mut part = [0; 2048];
    loop {
        if let Some(body) = body(&answer)? {
            return Ok(body);
        }
        match stream.read(&mut part)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => answer.extend_from_slice(&part[..n]),
        }
        if answer.len() > MAX_ANSWER {
            return Err(io::Error::other("the metadata service says too much"));
        }
    }
}

/// The body, once the answer is whole.
fn body(answer: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let Some(end) = memchr::memmem::find(answer, b"\r\n\r\n") else {
        return Ok(None);
    };
    let head = std::str::from_utf8(&answer[..end]).map_err(io::Error::other)?;
    let mut lines = head.split("\r\n");
    let status = lines.next().unwrap_or_default();
    if status.split(' ').nth(1) != Some("200") {
        let message = format!("the metadata service says '{status}'");
        return Err(io::Error::other(message));
    }
    let length = lines
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .and_then(|(_, value)| value.trim().parse::<usize>().ok())
        .ok_or_else(|| io::Error::other("the metadata service does not say how much it says"))?;
    let body = &answer[end + 4..];
    Ok(body.get(..length).map(<[u8]>::to_vec))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::net::TcpListener;

    /// Answers as Firecracker does: no document without a token, and the connection stays.
    pub(crate) fn fake(json: &'static str) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let mut open = Vec::new();
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut request = Vec::new();
                let mut byte = [0];
                while !request.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap() > 0 {
                    request.push(byte[0]);
                }
                let request = String::from_utf8(request).unwrap();
                let (status, body) = if request.starts_with("PUT /latest/api/token ")
                    && request.contains("X-metadata-token-ttl-seconds: ")
                {
                    ("200 OK", "dG9rZW4=")
                } else if request.starts_with("GET / ")
                    && request.contains("X-metadata-token: dG9rZW4=\r\n")
                    && request.contains("Accept: application/json\r\n")
                {
                    ("200 OK", json)
                } else {
                    ("401 Unauthorized", "no")
                };
                let length = body.len();
                let answer = format!(
                    "HTTP/1.1 {status}\r\nServer: Firecracker API\r\nContent-Length: {length}\r\n\r\n{body}"
                );
                stream.write_all(answer.as_bytes()).unwrap();
                open.push(stream);
            }
        });
        address
    }

    #[test]
    fn a_token_is_fetched_and_used() {
        assert_eq!(document(fake(r#"{"a":1}"#)).unwrap(), br#"{"a":1}"#);
    }

    #[test]
    fn whoever_is_not_the_service_is_an_error_and_soon() {
        let began = std::time::Instant::now();
        let nobody = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = nobody.local_addr().unwrap();
        // Accepts in the kernel, and says nothing.
        assert!(document(address).is_err());
        drop(nobody);
        assert!(document(address).is_err());
        assert!(began.elapsed() < LIMIT * 4);
        for wrong in [
            "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
            "HTTP/1.1 200 OK\r\n\r\nbody",
            "nonsense\r\n\r\n",
        ] {
            assert!(body(wrong.as_bytes()).is_err(), "{wrong}");
        }
        let part = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf";
        assert_eq!(body(part).unwrap(), None);
    }
}
