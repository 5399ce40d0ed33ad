//! Metadata of uploads: headers `X-Metadata-<key>: value`, kept as extended attributes
//! `user.e2b.<key>` (xattr(7)).

use http::HeaderMap;

use crate::filesystem::entry::METADATA_PREFIX;

/// Prefix of the headers, as header names are compared.
const HEADER_PREFIX: &str = "x-metadata-";
/// The kernel takes 255 bytes as a name; the prefix is part of it.
const MAX_KEY: usize = 255 - METADATA_PREFIX.len();
/// Keys and values of one file together: ext4 keeps the attributes of a file in one block.
const MAX_TOTAL: usize = 4096;

/// Keys and values, sorted by key.
pub type Metadata = Vec<(String, String)>;

/// Why metadata is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum MetadataError {
    /// Nothing after the prefix.
    #[error("a metadata header has no key: use X-Metadata-<key>")]
    NoKey,
    /// Longer than an attribute's name may be.
    #[error("metadata key '{0}' is longer than {MAX_KEY} bytes")]
    LongKey(String),
    /// The same key more than once.
    #[error("metadata key '{0}' is given more than once")]
    Twice(String),
    /// Control characters or bytes beyond ASCII.
    #[error("the value of metadata key '{0}' is not printable ASCII")]
    Value(String),
    /// Too much together.
    #[error("metadata of {0} bytes is more than the {MAX_TOTAL} that are possible")]
    TooMuch(usize),
}

/// The metadata in the headers of an upload; keys come out in lower case.
///
/// # Errors
/// [`MetadataError`], for which the answer is 400.
pub fn from_headers(headers: &HeaderMap) -> Result<Metadata, MetadataError> {
    let mut metadata = Metadata::new();
    let mut total = 0;
    for (name, value) in headers {
        let Some(key) = name.as_str().strip_prefix(HEADER_PREFIX) else {
            continue;
        };
        if key.is_empty() {
            return Err(MetadataError::NoKey);
        }
        if key.len() > MAX_KEY {
            return Err(MetadataError::LongKey(key.to_owned()));
        }
        if metadata.iter().any(|(known, _)| known == key) {
            return Err(MetadataError::Twice(key.to_owned()));
        }
        let printable = |byte: &u8| matches!(byte, b' '..=b'~');
        let value = match std::str::from_utf8(value.as_bytes()) {
            Ok(text) if text.as_bytes().iter().all(printable) => text.to_owned(),
            _ => return Err(MetadataError::Value(key.to_owned())),
        };
        total += key.len() + value.len();
        metadata.push((key.to_owned(), value));
    }
    if total > MAX_TOTAL {
        return Err(MetadataError::TooMuch(total));
    }
    metadata.sort_unstable();
    Ok(metadata)
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::{HeaderName, HeaderValue};

    fn read(pairs: &[(&str, &[u8])]) -> Result<Metadata, MetadataError> {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(
                HeaderName::from_bytes(name.as_bytes()).unwrap(),
                HeaderValue::from_bytes(value).unwrap(),
            );
        }
        from_headers(&headers)
    }

    #[test]
    fn metadata_is_read_in_lower_case_and_within_its_limits() {
        assert_eq!(
            read(&[
                ("X-Metadata-B-x", b"2 "),
                ("x-metadata-a", b""),
                ("x-other", b"y")
            ])
            .unwrap(),
            [("a".into(), String::new()), ("b-x".into(), "2 ".into())]
        );
        assert_eq!(read(&[("x-metadata-", b"1")]), Err(MetadataError::NoKey));
        let longest = format!("x-metadata-{}", "k".repeat(246));
        assert!(read(&[(&longest, b"1")]).is_ok());
        assert!(matches!(
            read(&[(&format!("{longest}k"), b"1")]),
            Err(MetadataError::LongKey(_))
        ));
        assert!(matches!(
            read(&[("x-metadata-a", b"1"), ("X-Metadata-A", b"2")]),
            Err(MetadataError::Twice(_))
        ));
        assert!(matches!(
            read(&[("x-metadata-a", "é".as_bytes())]),
            Err(MetadataError::Value(_))
        ));
        assert!(matches!(
            read(&[("x-metadata-a", b"a\tb")]),
            Err(MetadataError::Value(_))
        ));
        assert!(read(&[("x-metadata-a", &[b'x'; 4095])]).is_ok());
        assert_eq!(
            read(&[("x-metadata-a", &[b'x'; 4096])]),
            Err(MetadataError::TooMuch(4097))
        );
    }
}
