//! Content codings: which one to answer with, and gzip in both directions.

use bytes::Bytes;
use flate2::write::MultiGzDecoder;
use futures::{Stream, StreamExt, stream};
use http::{HeaderMap, header};
use std::io::Write;

/// How a file travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coding {
    /// As it is.
    Identity,
    /// Compressed.
    Gzip,
}

/// The coding that `Accept-Encoding` asks for: gzip where it is named and not liked less
/// than identity. `None` where neither will do (RFC 9110 section 12.5.3).
pub fn negotiate(headers: &HeaderMap) -> Option<Coding> {
    let mut gzip = None;
    let mut identity = None;
    let mut any = None;
    for value in headers.get_all(header::ACCEPT_ENCODING) {
        for item in value.to_str().unwrap_or("").split(',') {
            let mut parts = item.split(';').map(str::trim);
            let name = parts.next().unwrap_or("").to_ascii_lowercase();
            let quality = parts.find_map(quality).unwrap_or(1000);
            match name.as_str() {
                "gzip" | "x-gzip" => gzip = Some(quality),
                "identity" => identity = Some(quality),
                "*" => any = Some(quality),
                _ => {}
            }
        }
    }
    let plain = identity.or(any.filter(|q| *q == 0)).unwrap_or(1);
    let named = gzip.filter(|q| *q > 0);
    match (named, plain) {
        (Some(gzip), plain) if gzip >= plain => Some(Coding::Gzip),
        (_, 1..) => Some(Coding::Identity),
        // Identity is refused, and `*` includes gzip where gzip is not named.
        _ if named.is_some() || (gzip.is_none() && any.is_some_and(|q| q > 0)) => {
            Some(Coding::Gzip)
        }
        _ => None,
    }
}

/// `q=0.5` in thousandths; what is not a number counts as refused.
fn quality(parameter: &str) -> Option<u32> {
    let (name, value) = parameter.split_once('=')?;
    if !name.trim().eq_ignore_ascii_case("q") {
        return None;
    }
    let value: f32 = value.trim().parse().unwrap_or(0.0);
    Some((value.clamp(0.0, 1.0) * 1000.0) as u32)
}

/// The coding of a request's body.
///
/// # Errors
/// The coding's name, where it is one we do not know.
pub fn of_body(headers: &HeaderMap) -> Result<Coding, String> {
    let mut coding = Coding::Identity;
    for value in headers.get_all(header::CONTENT_ENCODING) {
        for name in value.to_str().unwrap_or("?").split(',') {
            match name.trim().to_ascii_lowercase().as_str() {
                "" | "identity" => {}
                "gzip" | "x-gzip" if coding == Coding::Identity => coding = Coding::Gzip,
                other => return Err(other.to_owned()),
            }
        }
    }
    Ok(coding)
}

/// Why a compressed body could not be read.
#[derive(Debug, thiserror::Error)]
pub enum GunzipError<E> {
    /// It is not gzip, or damaged, or ends too early.
    #[error("the body is not valid gzip: {0}")]
    Corrupt(std::io::Error),
    /// It did not arrive.
    #[error(transparent)]
    Source(E),
}

/// Compressed bytes taken at once. Deflate makes at most about a thousandfold of it, which
/// bounds what a malicious body can make us hold.
const STEP: usize = 4 << 10;

struct Gunzip<S> {
    source: S,
    decoder: MultiGzDecoder<Vec<u8>>,
    input: Bytes,
    ended: bool,
}

/// Decompresses a stream of gzip members.
pub fn gunzip<S, E>(source: S) -> impl Stream<Item = Result<Bytes, GunzipError<E>>> + Send
where
    S: Stream<Item = Result<Bytes, E>> + Send + Unpin + 'static,
    E: Send + 'static,
{
    let start = Gunzip {
        source,
        decoder: MultiGzDecoder::new(Vec::new()),
        input: Bytes::new(),
        ended: false,
    };
    stream::try_unfold(start, |mut state| async move {
        loop {
            if state.ended {
                return Ok(None);
            }
            if state.input.is_empty() {
                match state.source.next().await {
                    Some(chunk) => state.input = chunk.map_err(GunzipError::Source)?,
                    None => {
                        state.ended = true;
                        state.decoder.try_finish().map_err(GunzipError::Corrupt)?;
                    }
                }
            } else {
                let step = state.input.split_to(state.input.len().min(STEP));
                state
                    .decoder
                    .write_all(&step)
                    .map_err(GunzipError::Corrupt)?;
            }
            let output = std::mem::take(state.decoder.get_mut());
            if !output.is_empty() {
                return Ok(Some((Bytes::from(output), state)));
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::Compression;
    use flate2::write::GzEncoder;
    use std::convert::Infallible;

    #[test]
    fn gzip_is_taken_when_it_is_named_and_liked() {
        for (accept, expected) in [
            (None, Some(Coding::Identity)),
            (Some(""), Some(Coding::Identity)),
            (Some("gzip"), Some(Coding::Gzip)),
            (Some("gzip, deflate, br, zstd"), Some(Coding::Gzip)),
            (Some("br;q=1.0, GZIP;q=0.5"), Some(Coding::Gzip)),
            (Some("gzip;q=0"), Some(Coding::Identity)),
            (Some("*"), Some(Coding::Identity)),
            (Some("identity"), Some(Coding::Identity)),
            (Some("identity, gzip;q=0.2"), Some(Coding::Identity)),
            (Some("identity;q=0"), None),
            (Some("identity;q=0, gzip"), Some(Coding::Gzip)),
            (Some("identity;q=0, gzip;q=0.001"), Some(Coding::Gzip)),
            (Some("identity;q=0, *"), Some(Coding::Gzip)),
            (Some("*;q=0"), None),
            (Some("*;q=0, gzip"), Some(Coding::Gzip)),
            (Some("*;q=0, identity"), Some(Coding::Identity)),
            (Some("identity;q=0, gzip;q=0, *"), None),
            (Some("deflate"), Some(Coding::Identity)),
        ] {
            let mut headers = HeaderMap::new();
            if let Some(accept) = accept {
                headers.insert(header::ACCEPT_ENCODING, accept.parse().unwrap());
            }
            assert_eq!(negotiate(&headers), expected, "{accept:?}");
        }
    }

    async fn unpack(packed: &[u8], step: usize) -> Result<Vec<u8>, String> {
        let chunks: Vec<Result<Bytes, Infallible>> = packed
            .chunks(step)
            .map(|c| Ok(Bytes::copy_from_slice(c)))
            .collect();
        let out: Vec<_> = Box::pin(gunzip(stream::iter(chunks))).collect().await;
        let mut all = Vec::new();
        for item in out {
            all.extend_from_slice(&item.map_err(|e| e.to_string())?);
        }
        Ok(all)
    }

    #[tokio::test]
    async fn gunzip_takes_members_in_any_pieces_and_refuses_what_is_cut_off() {
        let plain: Vec<u8> = (0..200_000u32)
            .map(|i| (i.wrapping_mul(i) % 251) as u8)
            .collect();
        let mut packed = Vec::new();
        for half in plain.chunks(100_000) {
            let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
            encoder.write_all(half).unwrap();
            packed.extend(encoder.finish().unwrap());
        }
        for step in [1, 7, 4096, packed.len()] {
            assert_eq!(unpack(&packed, step).await.unwrap(), plain, "{step}");
        }
        for cut in [1, 5, 11, packed.len() / 4, packed.len() - 1] {
            assert!(unpack(&packed[..cut], 1000).await.is_err(), "{cut}");
        }
        let mut damaged = packed.clone();
        let at = damaged.len() / 3;
        damaged[at] ^= 0x55;
        assert!(unpack(&damaged, 1000).await.is_err());
        assert!(unpack(b"plain text, not gzip", 1000).await.is_err());
    }
}
