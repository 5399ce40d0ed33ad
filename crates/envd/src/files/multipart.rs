//! Reading `multipart/form-data` (RFC 7578, RFC 2046 section 5.1) as it arrives.
//!
//! The parser is pushed chunks and gives back pieces of them, not copies, so that its memory
//! does not depend on the body and its speed is that of searching for the delimiter.
//!
//! ```text
//!   Preamble ──delimiter──▶ AfterDelimiter ──CRLF──▶ Headers ──▶ Data ─┐
//!                                 ▲   └──"--"──▶ Epilogue             │
//!                                 └────────────delimiter──────────────┘
//! ```

use bytes::{Buf, Bytes, BytesMut};
use memchr::memmem;

/// The header lines of one part together.
const MAX_HEADERS: usize = 16 << 10;
/// RFC 2046 allows 70 characters.
const MAX_BOUNDARY: usize = 70;

/// What a body consists of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// A part begins.
    Begin(Part),
    /// Some of its contents.
    Data(Bytes),
    /// It is complete.
    End,
}

/// The names of a part.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Part {
    /// Of the form's field.
    pub name: Option<String>,
    /// As the client calls the file, path included.
    pub filename: Option<String>,
}

/// Why a body is no multipart body.
#[derive(Debug, Clone, Copy, thiserror::Error, PartialEq, Eq)]
pub enum MultipartError {
    /// `Content-Type` has no usable `boundary`.
    #[error("Content-Type multipart/form-data has no valid boundary")]
    Boundary,
    /// Something after a delimiter that is neither a line's end nor the closing `--`.
    #[error("a multipart delimiter is followed by something else than a line end")]
    Delimiter,
    /// A part's headers are too long.
    #[error("the headers of a multipart part are longer than {MAX_HEADERS} bytes")]
    Headers,
    /// A part's headers are not text, or have no `Content-Disposition: form-data`.
    #[error("a multipart part has no readable Content-Disposition header")]
    Disposition,
    /// The body ended before the closing delimiter.
    #[error("the multipart body ends before its closing boundary")]
    Cut,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Preamble,
    AfterDelimiter,
    Headers,
    Data,
    Epilogue,
}

/// See the module.
#[derive(Debug)]
pub struct Multipart {
    finder: memmem::Finder<'static>,
    state: State,
    /// Not looked at yet.
    input: Bytes,
    /// The end of an earlier chunk that may be the beginning of a delimiter, or headers
    /// until they are complete.
    carry: BytesMut,
    /// A part's last data has been given out, and its end not yet.
    end_untold: bool,
}

impl Multipart {
    /// A parser for a body of this `Content-Type`; `None` when it is not
    /// `multipart/form-data`.
    ///
    /// # Errors
    /// [`MultipartError::Boundary`].
    pub fn of_type(content_type: &str) -> Result<Option<Multipart>, MultipartError> {
        let (kind, parameters) = content_type.split_once(';').unwrap_or((content_type, ""));
        if !kind.trim().eq_ignore_ascii_case("multipart/form-data") {
            return Ok(None);
        }
        let boundary = Parameters(parameters)
            .find(|(name, _)| name.eq_ignore_ascii_case("boundary"))
            .map(|(_, value)| value);
        match boundary {
            Some(b) if !b.is_empty() && b.len() <= MAX_BOUNDARY && b.is_ascii() => {
                Ok(Some(Multipart::new(&b)))
            }
            _ => Err(MultipartError::Boundary),
        }
    }

    fn new(boundary: &str) -> Multipart {
        let delimiter = format!("\r\n--{boundary}");
        Multipart {
            finder: memmem::Finder::new(delimiter.as_bytes()).into_owned(),
            state: State::Preamble,
            input: Bytes::new(),
            // The first delimiter has no line end of its own before it.
            carry: BytesMut::from(&b"\r\n"[..]),
            end_untold: false,
        }
    }

    /// Takes the next chunk; all pieces of the one before must have been taken.
    pub fn push(&mut self, chunk: Bytes) {
        debug_assert!(self.input.is_empty());
        self.input = chunk;
    }

    /// The next piece; `None` when another chunk is needed.
    ///
    /// # Errors
    /// [`MultipartError`]; the parser is of no use after it.
    pub fn next_piece(&mut self) -> Result<Option<Piece>, MultipartError> {
        loop {
            match self.state {
                State::Preamble | State::Data => {
                    let (data, found) = self.until_delimiter();
                    let in_part = self.state == State::Data;
                    let need_more = data.is_empty() && !found;
                    if found {
                        self.state = State::AfterDelimiter;
                    }
                    if in_part && !data.is_empty() {
                        self.end_untold = found;
                        return Ok(Some(Piece::Data(data)));
                    }
                    if in_part && found {
                        return Ok(Some(Piece::End));
                    }
                    if need_more {
                        return Ok(None);
                    }
                }
                State::AfterDelimiter => {
                    if std::mem::take(&mut self.end_untold) {
                        return Ok(Some(Piece::End));
                    }
                    self.fill(2);
                    // Padding between delimiter and line end is allowed.
                    while matches!(self.carry.first(), Some(b' ' | b'\t')) {
                        self.carry.advance(1);
                        self.fill(2);
                    }
                    match &self.carry[..] {
                        [] | [_] if self.input.is_empty() => return Ok(None),
                        b"\r\n" => self.state = State::Headers,
                        b"--" => self.state = State::Epilogue,
                        _ => return Err(MultipartError::Delimiter),
                    }
                    // The line end also ends an empty block of headers.
                    if self.state == State::Epilogue {
                        self.carry.clear();
                    }
                }
                State::Headers => match self.headers()? {
                    Some(part) => {
                        self.state = State::Data;
                        return Ok(Some(Piece::Begin(part)));
                    }
                    None => return Ok(None),
                },
                State::Epilogue => {
                    self.input.clear();
                    return Ok(None);
                }
            }
        }
    }

    /// To be called when the body has ended.
    ///
    /// # Errors
    /// [`MultipartError::Cut`].
    pub fn finish(&self) -> Result<(), MultipartError> {
        match self.state {
            State::Epilogue => Ok(()),
            _ => Err(MultipartError::Cut),
        }
    }

    /// Moves bytes from the input until the carry has `length`.
    fn fill(&mut self, length: usize) {
        let wanted = length
            .saturating_sub(self.carry.len())
            .min(self.input.len());
        self.carry.extend_from_slice(&self.input.split_to(wanted));
    }

    /// The bytes before the next delimiter, or those of which it is certain that they are
    /// not part of one; and whether the delimiter was found and taken.
    fn until_delimiter(&mut self) -> (Bytes, bool) {
        let length = self.finder.needle().len();
        if !self.carry.is_empty() {
            // Looks at the seam only: the carry is shorter than a delimiter.
            let carried = self.carry.len();
            let ahead = self.input.len().min(length);
            self.carry.extend_from_slice(&self.input[..ahead]);
            if let Some(at) = self.finder.find(&self.carry) {
                let data = self.carry.split_to(at).freeze();
                self.input.advance(at + length - carried);
                self.carry.clear();
                return (data, true);
            }
            if ahead == length {
                // A delimiter that began in the carry would have been seen.
                self.carry.truncate(carried);
                return (self.carry.split().freeze(), false);
            }
            self.input = self.carry.split().freeze();
        }
        if let Some(at) = self.finder.find(&self.input) {
            let data = self.input.split_to(at);
            self.input.advance(length);
            return (data, true);
        }
        let kept = self.possible_start();
        let data = self.input.split_to(self.input.len() - kept);
        self.carry.extend_from_slice(&self.input);
        self.input.clear();
        (data, false)
    }

    /// Length of the longest end of the input that is a beginning of the delimiter.
    fn possible_start(&self) -> usize {
        let needle = self.finder.needle();
        let longest = self.input.len().min(needle.len() - 1);
        (1..=longest)
            .rev()
            .find(|n| self.input[self.input.len() - n..] == needle[..*n])
            .unwrap_or(0)
    }

    /// Collects header lines until the empty one. The carry starts with the line end of the
    /// delimiter.
    fn headers(&mut self) -> Result<Option<Part>, MultipartError> {
        const END: &[u8] = b"\r\n\r\n";
        let from = self.carry.len().saturating_sub(END.len() - 1);
        let room = (MAX_HEADERS + END.len()).saturating_sub(self.carry.len());
        let taken = self.input.len().min(room);
        let carried = self.carry.len();
        self.carry.extend_from_slice(&self.input[..taken]);
        let Some(at) = memmem::find(&self.carry[from..], END) else {
            if room == taken {
                return Err(MultipartError::Headers);
            }
            self.input.clear();
            return Ok(None);
        };
        let end = from + at + END.len();
        self.input.advance(end - carried);
        let part = part_of(&self.carry[..end]);
        self.carry.clear();
        part.map(Some)
    }
}

fn part_of(headers: &[u8]) -> Result<Part, MultipartError> {
    let text = std::str::from_utf8(headers).map_err(|_| MultipartError::Disposition)?;
    let value = text
        .split("\r\n")
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.trim().eq_ignore_ascii_case("content-disposition"))
        .map(|(_, value)| value)
        .ok_or(MultipartError::Disposition)?;
    let (kind, parameters) = value.split_once(';').unwrap_or((value, ""));
    if !kind.trim().eq_ignore_ascii_case("form-data") {
        return Err(MultipartError::Disposition);
    }
    let mut part = Part::default();
    let mut extended = None;
    for (name, value) in Parameters(parameters) {
        match name.to_ascii_lowercase().as_str() {
            "name" => part.name = Some(unescape(&value)),
            "filename" => part.filename = Some(unescape(&value)),
            // RFC 8187, which some clients use for names beyond ASCII.
            "filename*" => extended = utf8_extended(&value),
            _ => {}
        }
    }
    if extended.is_some() {
        part.filename = extended;
    }
    Ok(part)
}

fn utf8_extended(value: &str) -> Option<String> {
    let (charset, rest) = value.split_once('\'')?;
    let (_language, encoded) = rest.split_once('\'')?;
    if !charset.eq_ignore_ascii_case("utf-8") {
        return None;
    }
    let decoded = percent_encoding::percent_decode_str(encoded)
        .decode_utf8()
        .ok()?;
    Some(decoded.into_owned())
}

/// Undoes what browsers' form encoding does to names: `%22` for a quote, `%0D` and `%0A` for
/// line ends, and, as httpx does, other control characters. All other `%` stay as they are:
/// senders do not escape them.
fn unescape(value: &str) -> String {
    let mut out = String::with_capacity(value.len());
    let mut rest = value;
    while let Some(at) = rest.find('%') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let code = rest
            .get(1..3)
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match code {
            Some(code @ (b'"' | 0..=0x1f)) => {
                out.push(char::from(code));
                rest = &rest[3..];
            }
            _ => {
                out.push('%');
                rest = &rest[1..];
            }
        }
    }
    out.push_str(rest);
    out
}

/// `; name=token; name="quoted \" string"`.
struct Parameters<'a>(&'a str);

impl Iterator for Parameters<'_> {
    type Item = (String, String);

    fn next(&mut self) -> Option<Self::Item> {
        let text = self.0.trim_start_matches([';', ' ', '\t']);
        let (name, rest) = text.split_once('=')?;
        let name = name.trim().to_owned();
        let rest = rest.trim_start();
        let Some(quoted) = rest.strip_prefix('"') else {
            let (value, after) = rest.split_once(';').unwrap_or((rest, ""));
            self.0 = after;
            return Some((name, value.trim().to_owned()));
        };
        let mut value = String::new();
        let mut chars = quoted.char_indices();
        while let Some((at, c)) = chars.next() {
            match c {
                '"' => {
                    self.0 = &quoted[at + 1..];
                    return Some((name, value));
                }
                // Only these two are ever escaped; a backslash before anything else is part
                // of a name that its sender did not escape.
                '\\' => match quoted[at + 1..].chars().next() {
                    Some(next @ ('"' | '\\')) => {
                        value.push(next);
                        chars.next();
                    }
                    _ => value.push('\\'),
                },
                c => value.push(c),
            }
        }
        // The closing quote is missing.
        self.0 = "";
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type Parts = Vec<(Part, Vec<u8>)>;

    fn parse(body: &[u8], cuts: &[usize]) -> Result<Parts, MultipartError> {
        let mut parser = Multipart::of_type("multipart/form-data; boundary=\"XyZ\"")?.unwrap();
        let mut parts = Parts::new();
        let mut open = false;
        let mut rest = Bytes::copy_from_slice(body);
        let mut cuts = cuts.iter().cycle();
        while !rest.is_empty() {
            let length = cuts
                .next()
                .map_or(rest.len(), |c| (*c).clamp(1, rest.len()));
            parser.push(rest.split_to(length));
            while let Some(piece) = parser.next_piece()? {
                match piece {
                    Piece::Begin(part) => {
                        assert!(!open);
                        open = true;
                        parts.push((part, Vec::new()));
                    }
                    Piece::Data(data) => {
                        assert!(open && !data.is_empty());
                        parts.last_mut().unwrap().1.extend_from_slice(&data);
                    }
                    Piece::End => {
                        assert!(open);
                        open = false;
                    }
                }
            }
        }
        parser.finish()?;
        assert!(!open);
        Ok(parts)
    }

    fn body(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut body = Vec::new();
        for (name, data) in files {
            body.extend(
                format!("--XyZ\r\nContent-Disposition: form-data; name=\"file\"; filename=\"{name}\"\r\nContent-Type: text/plain\r\n\r\n").into_bytes(),
            );
            body.extend_from_slice(data);
            body.extend_from_slice(b"\r\n");
        }
        body.extend_from_slice(b"--XyZ--\r\n");
        body
    }

    #[test]
    fn parts_come_out_however_the_body_is_cut() {
        let files: [(&str, &[u8]); 4] = [
            ("/a/b", b"hello"),
            ("empty", b""),
            ("tricky", b"\r\n--Xy\r\n--XyX\r\r\n\r\n--\r\n--X"),
            ("last", b"\r\n"),
        ];
        let body = body(&files);
        for cut in 1..body.len() {
            let parts = parse(&body, &[cut]).unwrap();
            assert_eq!(parts.len(), 4, "cut every {cut}");
            for ((part, data), (name, expected)) in parts.iter().zip(files) {
                assert_eq!(part.filename.as_deref(), Some(name));
                assert_eq!(part.name.as_deref(), Some("file"));
                assert_eq!(data, expected, "{name}, cut every {cut}");
            }
        }
    }

    #[test]
    fn what_is_no_multipart_body_is_refused() {
        let good = body(&[("f", b"data")]);
        for cut in 0..good.len() - 4 {
            assert_eq!(
                parse(&good[..cut], &[]).map(|_| ()),
                Err(MultipartError::Cut),
                "{cut}"
            );
        }
        assert_eq!(parse(b"--XyZjunk\r\n", &[]), Err(MultipartError::Delimiter));
        let long = [b"--XyZ\r\nA: ", &[b'a'; 20_000][..]].concat();
        assert_eq!(parse(&long, &[1000]), Err(MultipartError::Headers));
        assert_eq!(
            parse(b"--XyZ\r\n\r\n", &[]),
            Err(MultipartError::Disposition)
        );
        assert_eq!(
            parse(
                b"--XyZ\r\nContent-Disposition: attachment; name=file\r\n\r\n",
                &[]
            ),
            Err(MultipartError::Disposition)
        );
        for wrong in [
            "multipart/form-data",
            "multipart/form-data; boundary=",
            "multipart/form-data; boundary=\"x",
        ] {
            assert!(
                matches!(Multipart::of_type(wrong), Err(MultipartError::Boundary)),
                "{wrong}"
            );
        }
        assert!(Multipart::of_type("application/json").unwrap().is_none());
    }

    #[test]
    fn preamble_padding_and_epilogue_are_allowed() {
        let body = b"preamble\r\n--XyZ \t\r\nCONTENT-DISPOSITION: form-data; name=file; filename=x\r\n\r\ndata\r\n--XyZ--  \r\nepilogue\r\n--XyZ";
        for cut in 1..body.len() {
            let parts = parse(body, &[cut]).unwrap();
            assert_eq!(parts.len(), 1);
            assert_eq!(parts[0].1, b"data");
            assert_eq!(parts[0].0.filename.as_deref(), Some("x"));
        }
    }

    #[test]
    fn names_are_read_as_httpx_undici_and_curl_write_them() {
        for (written, expected) in [
            (r#"filename="/home/user/a b.txt""#, "/home/user/a b.txt"),
            (r#"filename="say %22hi%22""#, "say \"hi\""),
            (r#"filename="say \"hi\"""#, "say \"hi\""),
            (r#"filename="back\\slash""#, r"back\slash"),
            (r#"filename="back\slash""#, r"back\slash"),
            (r#"filename="100%25 %zz %""#, "100%25 %zz %"),
            (r#"filename="two%0D%0Alines""#, "two\r\nlines"),
            (r#"filename="semi;colon=x""#, "semi;colon=x"),
            (r#"filename="žluť ☃""#, "žluť ☃"),
            (r#"filename="a"; filename*=UTF-8''%C5%BE"#, "ž"),
            (r#"filename="a"; filename*=latin1''%E9"#, "a"),
        ] {
            let header =
                format!("\r\nContent-Disposition: form-data; name=\"file\"; {written}\r\n\r\n");
            let part = part_of(header.as_bytes()).unwrap();
            assert_eq!(part.filename.as_deref(), Some(expected), "{written}");
        }
    }

    proptest! {
        #[test]
        fn any_contents_survive_any_cuts(
            files in prop::collection::vec(prop::collection::vec(
                prop_oneof![Just(b'\r'), Just(b'\n'), Just(b'-'), Just(b'X'), Just(b'y'), any::<u8>()], 0..60), 0..4),
            cuts in prop::collection::vec(1usize..40, 1..8),
        ) {
            let delimiter = b"\r\n--XyZ";
            prop_assume!(files.iter().all(|f| memmem::find(&[b"\r\n", &f[..]].concat(), delimiter).is_none()));
            let list: Vec<(&str, &[u8])> = files.iter().map(|f| ("n", &f[..])).collect();
            let parts = parse(&body(&list), &cuts).unwrap();
            let data: Vec<_> = parts.into_iter().map(|(_, data)| data).collect();
            prop_assert_eq!(data, files);
        }

        #[test]
        fn no_body_makes_the_parser_panic(body in prop::collection::vec(any::<u8>(), 0..300), cut in 1usize..50) {
            let _outcome = parse(&[b"--XyZ\r\n", &body[..]].concat(), &[cut]).is_ok();
            let text = String::from_utf8_lossy(&body).into_owned();
            let _outcome = part_of(format!("\r\nContent-Disposition: form-data; {text}\r\n\r\n").as_bytes()).is_ok();
        }
    }
}
