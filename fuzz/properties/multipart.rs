//! Uploads as `multipart/form-data`: however a body is cut into chunks, the same is read.

use bytes::Bytes;

use super::parser::{Multipart, Piece};

/// Parts as name, file name and content, and whether all of the body was understood.
type Read = (Vec<(Option<String>, Option<String>, Vec<u8>)>, bool);

fn read(content_type: &str, body: &[u8], cut: usize) -> Option<Read> {
    let mut parser = Multipart::of_type(content_type).ok()??;
    let mut parts = Vec::new();
    for chunk in body.chunks(cut) {
        parser.push(Bytes::copy_from_slice(chunk));
        loop {
            match parser.next_piece() {
                Ok(Some(Piece::Begin(part))) => parts.push((part.name, part.filename, Vec::new())),
                Ok(Some(Piece::Data(data))) => {
                    assert!(!data.is_empty());
                    let (_, _, content) = parts.last_mut().expect("data are of a part");
                    content.extend_from_slice(&data);
                }
                Ok(Some(Piece::End)) => assert!(!parts.is_empty()),
                Ok(None) => break,
                Err(_) => return Some((parts, false)),
            }
        }
    }
    Some((parts, parser.finish().is_ok()))
}

/// How the body is cut, a line that is a content type, and the body.
pub fn check(data: &[u8]) {
    let Some((cut, data)) = data.split_first() else {
        return;
    };
    let end = data.iter().position(|byte| *byte == b'\n').unwrap_or(0);
    let (line, body) = data.split_at(end);
    let given = std::str::from_utf8(line).unwrap_or_default();
    for content_type in [given, "multipart/form-data; boundary=b"] {
        let whole = read(content_type, body, body.len().max(1));
        for cut in [1, usize::from(*cut).max(2)] {
            let other = read(content_type, body, cut);
            match (&whole, &other) {
                // Of what is broken, how much was read before that was seen may differ.
                (Some((_, false)), Some((_, false))) => {}
                _ => assert_eq!(whole, other, "chunks of {cut}"),
            }
        }
    }
}
